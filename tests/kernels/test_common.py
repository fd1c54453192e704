# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/_common.py and the GPU half of kernels/__main__.py, as far as a CPU can tell.

A bug that must be caught here: assert_kernel without its maximum-error line (one wrong element passes).
"""
import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map

from kernels import __main__ as report
from kernels import cross_entropy, decode_scores, fused_adamw, int4_gemm, kron_quant, masked_focal_ce, score_conv
from kernels import cosine_max, greedy_match, hard_assign, masked_blend, moebius, simgraph, token_logp
from kernels._common import aot_case, assert_kernel, block_sizes

ROOT = Path(__file__).resolve().parents[2]
ROWS = [(9, 31, torch.float32), (3, 2000, torch.float16)]
SHAPES = {masked_focal_ce: ROWS, decode_scores: ROWS, cross_entropy: ROWS,
          kron_quant: [(5, 9, 16, 3, torch.float32), (3, 4, 6, 1, torch.float16)],
          int4_gemm: [(5, 9, 34, torch.float32), (3, 40, 96, torch.float16)],
          score_conv: [(1, 3, 2, 20, 5, 3, torch.float32), (2, 2, 3, 3, 4, 1, torch.float16)],
          moebius: [(5, 6, torch.float32), (3, 4, torch.float64)],
          masked_blend: [(2, 5, 3, 7, torch.float32), (2, 9, 4, 5, torch.float16)],
          fused_adamw: [(1, 8, 9, 3, torch.float32), (1, 3, 5, 2, torch.float16)],
          token_logp: [(9, 20, 31, torch.float32), (3, 48, 200, torch.float16)],
          cosine_max: [(1, 70, 33, torch.float32), (3, 40, 64, torch.float16)],
          hard_assign: [(2, 3, 20, 5, torch.float32), (1, 4, 9, 40, torch.float16)],
          greedy_match: [(2, 30, 9, 20, torch.float32), (1, 5, 70, 64, torch.float16)],
          simgraph: [(3, 70, 33, torch.float32), (1, 40, 64, torch.float16)]}


def test_every_operation_has_shapes():
    assert {module.__name__ for module in SHAPES} == {f"kernels.{op}" for op in report.OPS}


def test_block_sizes():
    for V in (1, 2, 15, 16, 17, 31, 1000, 4096, 4097, 151936):
        rows, columns, warps = block_sizes(V)
        assert columns & (columns - 1) == 0 and rows & (rows - 1) == 0 and warps in (4, 8)
        assert min(V, 4096) <= columns <= max(16, 2 * V) and rows * columns <= 4096


def test_aot_case_has_the_hints_of_a_launch():
    """Pointers aligned; of ints, 1 is a constant and multiples of 16 are marked."""
    case = aot_case(None, "forward", "fp16", (7,), {"p": "*fp16", "a": 1, "b": 48, "c": 9, "d": "i32"}, {}, BLOCK=16)
    assert case["signature"] == {"p": "*fp16", "b": "i32", "c": "i32", "d": "i32"}
    assert case["aligned"] == ["p", "b"] and case["constexprs"] == {"a": 1, "BLOCK": 16}


# ------------------------------------------------------------------ the error rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_assert_kernel_accepts_rounding_and_rejects_bugs(dtype):
    exact = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    good = exact.to(dtype)
    assert_kernel("good", good, exact, good, 1)
    one_wrong, nan, scaled = good.clone(), good.clone(), (exact * 1.03).to(dtype)
    one_wrong[5, 5] += 0.2
    nan[0, 0] = float("nan")
    for bad in (one_wrong, nan, scaled, good[:-1]):
        with pytest.raises(AssertionError):
            assert_kernel("bad", bad, exact, good, 1)
    if dtype != torch.float32:
        with pytest.raises(AssertionError, match="RMS"):          # as bad as eager, but both are bad
            assert_kernel("bad eager", scaled, exact, scaled, 1)


def test_assert_kernel_integers_and_zeros():
    ids = torch.tensor([1, 2, 3])
    assert_kernel("equal", ids, ids.clone(), ids, 1)
    with pytest.raises(AssertionError, match="1 of 3 differ"):
        assert_kernel("other", ids, torch.tensor([1, 2, 4]), ids, 1)
    zero = torch.zeros(3)
    assert_kernel("zero", zero, zero.double(), zero, 1)
    with pytest.raises(AssertionError):
        assert_kernel("not zero", zero + 1e-30, zero.double(), zero, 1)


# ------------------------------------------------------------------ the compile report
@pytest.mark.parametrize("code, undefined", [
    (["UIADD3 UR34, UP1, UR34, 0x40, URZ", "UMOV UR34, 0x1"], {34}),
    (["UMOV UR4, 0x1", "UIADD3 UR5, UR4, UR4, URZ"], set()),
    (["ULDC.64 UR4, c[0x0][0x28]", "IMAD.U32 R5, RZ, RZ, UR5"], set()), (["@!UP0 UMOV UR4, UR7"], {7}),
    (["UIMAD.WIDE UR4, UR6, 0x2, URZ", "STS [R3+UR5], R2"], {6}), (["STS.128 [R3+UR8], R4"], {8}),
    (["HGMMA.64x32x16.F32.BF16 R40, gdesc[UR12].tnspB, R40"], {12, 13, 14, 15}),
    (["UMOV UR14, UR1", "UMOV UR15, 0x8", "HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR12].tnspB, RZ, !UPT"], {1})])
def test_undefined_registers(code, undefined):
    lines = [f"        /*{16 * i:04x}*/       {line} ;        /* 0x0000003f00057c82 */" for i, line in enumerate(code)]
    assert report.undefined_registers("\n".join(lines)) == undefined


# ------------------------------------------------------------------ parts of python -m kernels on a GPU
@pytest.mark.parametrize("module, shapes", SHAPES.items())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_check_op_passes_and_notices_a_wrong_kernel(module, shapes, monkeypatch, device):
    def wrong(*args):
        i = next(i for i, x in enumerate(args) if torch.is_floating_point(x))
        return module.reference(*args[:i], args[i] * 1.01, *args[i + 1:])
    report.check_op(module, device, shapes)
    monkeypatch.setattr(module, "kernel", wrong)
    with pytest.raises(AssertionError):
        report.check_op(module, device, shapes)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_benchmark_rows(monkeypatch, device):
    """Real thunks of every provider, a clock that always says 2 ms: the arithmetic of the columns."""
    def clock(fn, grad_to_none=None):
        fn()
        return 2.0, 1.0, 3.0
    monkeypatch.setattr(report, "time_gpu", clock)
    monkeypatch.setattr(report, "peak_memory", lambda fn: 5e6)
    monkeypatch.setattr(torch, "compile", lambda fn: fn)
    shapes = {module.__name__.removeprefix("kernels."): shapes[:1] for module, shapes in SHAPES.items()}
    shapes["masked_focal_ce"] = [(10, 100, torch.float32)]
    rows = [row for op in report.OPS for row in report.bench_op(op, device, shapes[op], (8e6, 1e12))]
    for (op, mode), group in itertools.groupby(rows, key=lambda row: (row["op"], row["mode"])):
        group = list(group)
        assert [row["provider"] for row in group][:2] == ["kernel", "eager"] and len(group) >= 2, (op, mode)
        assert {row["size"] for row in group} == {report.by(shapes[op][0][:-1])}
    backward = rows[3]                                            # 8000 bytes in 2 ms, peak 8 MB/s: 1 ms
    assert (backward["ms"], backward["floor ms"], backward["x floor"], backward["% of copy"]) == \
        ("2.0000", "1.0000", "2.00", "50")
    assert backward["GB/s"] == "0" and backward["graph ms"] is None and backward["peak MB"] == "5"
    report.table(rows)


def test_readme_shows_the_saved_benchmark(capsys):
    report.main(["--show", str(ROOT / "kernels" / "h200.json")])
    assert capsys.readouterr().out in (ROOT / "kernels" / "README.md").read_text()
    report.main(["moebius", "--show", str(ROOT / "kernels" / "h200.json")])
    assert "moebius" in (shown := capsys.readouterr().out) and "int4_gemm" not in shown


def test_works_without_triton():
    """On macOS and Windows the package imports, the reference runs, and the rest says what is missing."""
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        from kernels.cosine_max import cosine_max
        from kernels.cross_entropy import cross_entropy
        from kernels.decode_scores import decode_scores
        from kernels.fused_adamw import squared_norm
        from kernels.greedy_match import greedy_match
        from kernels.hard_assign import hard_assign
        from kernels.int4_gemm import int4_gemm
        from kernels.kron_quant import kron_quant
        from kernels.masked_blend import masked_blend
        from kernels.masked_focal_ce import masked_focal_ce
        from kernels.moebius import moebius
        from kernels.score_conv import score_conv
        from kernels.simgraph import simgraph
        from kernels.token_logp import token_logp
        x = torch.zeros(2, 4)
        w, b = torch.zeros(2, 2, 3), torch.zeros(2)
        assert score_conv(x.expand(1, 2, 2, 4), None, w, b, w, b)[0, 0, 0].tolist() == [0, *3 * [-torch.inf]]
        codes, scale = kron_quant(x, torch.eye(2), torch.eye(2), torch.ones(1, 2))
        assert int4_gemm(codes[0], scale[0], codes[0], scale[0]).tolist() == [[0, 0], [0, 0]]
        assert decode_scores(x)[0].tolist() == [0, 0]
        assert moebius(torch.tensor([1.0, 3.0])).tolist() == [1, 2]
        assert masked_blend(x[None] + 1, x, torch.tensor([1]))[0, 0, :, 0].tolist() == [1, 0]
        assert squared_norm([x + 2]) == 32 and cross_entropy(x, torch.tensor([0, -100])) == torch.tensor(4.0).log()
        assert token_logp(x, x, torch.tensor([-100, 1])).tolist() == [0, -torch.tensor(2.0).log()]
        assert simgraph(x + 0.5, torch.tensor([0, 1]), 2, 0.9).tolist() == [[2], [1]]
        assert cosine_max(x)[1].tolist() == [-1, 0]
        assert hard_assign(*x.expand(3, 1, 2, 4), 1.0, 1.0, seed=3)[2].sum() == 2
        assert greedy_match(x[None] + 1, x[None] + 1, *2 * [x[None, :, 0] == 0])[0].tolist() == [[4, 4]]
        assert masked_focal_ce(x, torch.tensor([0, 1]), torch.ones(2), 1.0, 0.0) > 2.7
        try:
            decode_scores(x, impl="triton")
        except RuntimeError as error:
            print(error)
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "needs the triton package" in run.stdout, run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("module", SHAPES, ids=lambda module: module.__name__.removeprefix("kernels."))
def test_gpu_check_shapes(module):
    report.check_op(module, "cuda", getattr(module, "CHECK_SHAPES", report.CHECK_SHAPES))


@pytest.mark.parametrize("name", report.OPS)
def test_checked_compares_at_the_first_call_and_only_then(name, monkeypatch, device):
    import kernels
    module = importlib.import_module(f"kernels.{name}")
    args = {"masked_focal_ce": (torch.randn(7, 31), torch.arange(7), torch.ones(7), 0.25, 2.0),
            "decode_scores": (torch.randn(7, 31), (1, 2)),
            "kron_quant": kron_quant.example(7, 4, 6, 3, torch.float16, "cpu"),
            "int4_gemm": int4_gemm.example(7, 5, 12, torch.float32, "cpu")[:-1],
            "score_conv": score_conv.example(1, 3, 2, 4, 5, 3, torch.float16, "cpu"),
            "cross_entropy": cross_entropy.example(7, 31, torch.float32, "cpu"),
            "moebius": moebius.example(7, 4, torch.float64, "cpu"),
            "masked_blend": masked_blend.example(2, 3, 4, 5, torch.float16, "cpu"),
            "token_logp": token_logp.example(7, 5, 12, torch.float32, "cpu"),
            "cosine_max": cosine_max.example(3, 20, 12, torch.float16, "cpu"),
            "hard_assign": hard_assign.example(2, 3, 20, 5, torch.float16, "cpu"),
            "greedy_match": greedy_match.example(3, 4, 5, 12, torch.float16, "cpu"),
            "simgraph": simgraph.example(2, 40, 12, torch.float16, "cpu"),
            "fused_adamw": (*fused_adamw.example(1, 3, 5, 2, torch.float16, "cpu")[1:5], 1, 1e-2)}[name]
    args = tree_map(lambda x: x.to(device) if torch.is_tensor(x) else x, list(args))
    reference, calls = getattr(module, f"{name}_ref"), []
    monkeypatch.setattr(module, f"{name}_ref", lambda *a, **k: calls.append(1) or reference(*a, **k))
    operation = kernels.checked(name, impl="triton")
    first, second = operation(*args), operation(*args)
    assert len(calls) == 2 and all(map(torch.equal, *((x if isinstance(x, tuple) else (x,)) for x in (first, second))))

    def wrong(*a, **k):
        out = reference(*a, **k)
        return (*out[:-1], out[-1] + 0.01) if isinstance(out, tuple) else out * 1.01
    monkeypatch.setattr(module, f"{name}_ref", wrong)
    with pytest.raises(AssertionError, match=name):
        kernels.checked(name, impl="triton")(*args)
