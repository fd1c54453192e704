# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Every kernel case compiled for four architectures without a GPU, by `python -m kernels --compile`.

A bug that must be caught here: `.to(tl.int64)` dropped from a kernel's row numbers.
"""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import __main__ as report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("aot")


def run_report(folder, *argv, **extra):
    """`python -m kernels --compile` in a fresh process: an interpreting one cannot compile."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    env |= {"TRITON_CACHE_DIR": str(folder / "cache"), **extra}
    command = [sys.executable, "-m", "kernels", "--compile", *argv]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def compiled(folder):
    """Rows of the report of all cases."""
    run = run_report(folder, "--json", str(folder / "rows.json"))
    assert run.returncode == 0, run.stderr[-3000:]
    assert "nothing was run" in run.stdout and "masked_focal_ce" in run.stdout
    return json.loads((folder / "rows.json").read_text())["rows"]


def label(row):
    return " ".join(str(row[key]) for key in ("op", "mode", "dtype", "size", "arch"))


def test_every_case_compiles_for_every_architecture(compiled):
    cases = {op: len(importlib.import_module(f"kernels.{op}").AOT_CASES) for op in report.OPS}
    counts = {op: sum(row["op"] == op for row in compiled) for op in report.OPS}
    assert counts == {op: n * len(report.TARGETS) for op, n in cases.items()}
    for op in report.OPS:
        types = {"fp32", "fp64"} if op == "moebius" else {"fp32", "fp16", "bf16"}
        assert {row["dtype"] for row in compiled if row["op"] == op} == types


def test_shared_memory_fits(compiled):
    assert [label(row) for row in compiled if row["shared"] > report.SHARED_LIMIT[row["arch"]]] == []


def test_nothing_spills(compiled):
    readable = [row for row in compiled if row["spills"] is not None]
    assert {"gfx942"} <= {row["arch"] for row in readable}       # AMD's needs no tool
    assert [label(row) for row in readable if row["spills"] > 0] == []
    assert all(0 < row["registers"] <= (512 if row["arch"] == "gfx942" else 255) for row in readable)


def test_no_register_is_read_before_it_is_written(compiled):
    """score_conv with 64 columns and 4 warps was wrong on an H200, and right in the interpreter: undefined."""
    assert [label(row) for row in compiled if row["undefined"]] == []


def test_matrix_instructions(compiled):
    """None in operations without products; always for 16-bit and integer ones; NVIDIA has none for exact fp32."""
    products = "kron_quant", "int4_gemm", "score_conv", "token_logp", "cosine_max", "hard_assign", \
        "greedy_match", "simgraph"
    without = [row for row in compiled if row["op"] not in products or row["mode"] == "backward dots"]
    fp32 = [row for row in compiled if row["dtype"] == "fp32" and row["op"] != "int4_gemm" and row not in without]
    assert [label(row) for row in without if row["mma"]] == []
    assert {row["arch"] for row in fp32 if row["mma"]} == {"gfx942"}        # anywhere else it would be tf32
    assert [label(row) for row in compiled if not row["mma"] and row not in without + fp32] == []


def test_offsets_are_64_bit(compiled):
    assert [label(row) for row in compiled if row["offsets"] != "i64"] == []


def test_interpret_flag_of_the_user_does_not_matter(compiled, folder):
    """An exported TRITON_INTERPRET=1 must not break the report (compiled: the cache is warm)."""
    run = run_report(folder, "decode_scores", TRITON_INTERPRET="1")
    assert run.returncode == 0 and "gfx942" in run.stdout, run.stderr[-2000:]
