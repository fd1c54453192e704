# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""The smoke run of every task on a GPU, with and without kernels; all other tests of scripts are about the CPU.

A bug that must be caught here: a tensor made without device= in a model's forward pass.
"""
import math
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = (), ("--kernels",)
TASKS = {"mdm": ("sudoku", "path", "cd3", "sat5"), "convattn": ("recall", "text"), "batchlaw": ("zipf", "text"),
         "gametheory": ("concepts", "tiles", "shapes"), "rise": ("chain",), "reversegen": ("math",),
         "reviseval": ("world",), "vistog": ("scenes",), "toolflow": ("world",)}
RUNS = [(script, "--task", task, *kernels) for script in TASKS for task in TASKS[script] for kernels in KERNELS]
RUNS += [("convattn", "--task", "che"), ("convattn", "--task", "recall", "--impl", "dense"), ("flatquant",),
         ("reversegen", "--task", "honesty", "--arms", "0,1,2")]  # the other arms need right answers


@pytest.mark.gpu
@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_smoke_on_a_gpu(run, alone):
    (script, *argv), cwd = run, alone.new()
    shutil.copytree(ROOT / "kernels", cwd / "kernels")
    record = alone(script, "--scale", "smoke", "--device", "cuda", *argv, cwd=cwd, timeout=120, gpu=True).result
    assert record["device"] != "cpu" and record["metrics"]
    numbers = [x for x in record["metrics"].values() if isinstance(x, float)]
    assert not any(map(math.isinf, numbers)) and sum(map(math.isfinite, numbers)) > 0.8 * len(numbers)
    assert script == "reviseval" or all(map(math.isfinite, numbers))  # a tau of equal scores is not a number


@pytest.mark.gpu
def test_kernels_on_a_gpu_answer_a_prompt(alone):
    """flatquant.py --generate with the four-bit weights, through kron_quant and int4_gemm, says what PyTorch says."""
    out = alone("flatquant", "--scale", "smoke", "--device", "cuda", "--save", "q", timeout=120, gpu=True).cwd
    shutil.copytree(ROOT / "kernels", out / "kernels")
    generate = ("--load", "q", "--generate", "The ", "--max-new", "8")
    runs = [alone("flatquant", *generate, *extra, cwd=out, gpu=True) for extra in ((), ("--kernels",))]
    assert all(run.stdout.strip() for run in runs)
