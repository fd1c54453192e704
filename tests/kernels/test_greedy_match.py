# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/greedy_match.py against its reference in fp64 and brute force.

A bug that must be caught here: the line `s = tl.where(live_a[:, None] > 0, ...)` left out (rows that are masked, or
that lie beyond M, count for the column maxima).
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import greedy_match as op
from kernels._common import assert_kernel
from kernels.greedy_match import greedy_match, greedy_match_ref

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 1, 1), (3, 5, 40, 33), (2, 64, 65, 64), (2, 130, 17, 100)]
BLOCKS = [(16, 16, 16), (16, 64, 32), (64, 16, 16), (128, 128, 64)]                      # M, N, D
NAN = float("nan")
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def agree(a, b, a_mask, b_mask):
    """Kernel outputs meet the error rule against fp64, and are 0 where a token is masked."""
    args = a, b, a_mask, b_mask
    out, eager = op.kernel(*args), op.reference(*args)
    ref64 = greedy_match_ref(a.double(), b.double(), a_mask, b_mask)
    for name, x, exact, plain, mask in zip(("row", "col"), out, ref64, eager, (a_mask, b_mask)):
        assert x.dtype == torch.float32 and not x[~mask].any()
        assert_kernel(name, x, exact, plain, a.shape[2])


def random_masks(B, M, N, device):
    gen = torch.Generator().manual_seed(1)
    return [(torch.rand(B, n, generator=gen) < 0.6).to(device) for n in (M, N)]


def brute_force(a, b, a_mask, b_mask):
    """Row maxima of each pair by plain Python."""
    maxima = torch.zeros(a.shape[:2], dtype=torch.float64)
    for p, i in a_mask.nonzero().tolist():
        partners = [b[p, j] for j in range(b.shape[1]) if b_mask[p, j]]
        maxima[p, i] = max((sum(a[p, i] * v).item() for v in partners), default=0.0)
    return maxima


# ------------------------------------------------------------------ the reference
def test_reference_equals_brute_force():
    a, b, *_ = op.example(4, 6, 7, 5, torch.float64, "cpu")
    a_mask, b_mask = random_masks(4, 6, 7, "cpu")
    a_mask[2], b_mask[3] = False, False
    row, col = greedy_match_ref(a, b, a_mask, b_mask)
    torch.testing.assert_close(row, brute_force(a, b, a_mask, b_mask), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(col, brute_force(b, a, b_mask, a_mask), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_bert_score_of_a_text_with_itself_shuffled_is_one(device, impl):
    a, *_ = op.example(3, 20, 20, 48, torch.float32, device)
    order, mask = torch.randperm(20, generator=torch.Generator().manual_seed(0)), torch.ones(3, 20).bool().to(device)
    for maxima in greedy_match(a, a[:, order], mask, mask, impl=impl):
        torch.testing.assert_close(maxima, torch.ones_like(maxima))


# ------------------------------------------------------------------ kernel against reference
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, M, N, D", SHAPES)
def test_forward(device, B, M, N, D, dtype):
    a, b, *masks = op.example(B, M, N, D, dtype, device)
    agree(a, b, *masks)
    agree(a, b, *random_masks(B, M, N, device))


@pytest.mark.parametrize("blocks", BLOCKS)
def test_each_block_size_alone(device, monkeypatch, blocks):
    sizes = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_D"), blocks))
    monkeypatch.setattr(op, "plan", lambda *args: (sizes, {"num_warps": 4}))
    a, b, *_ = op.example(2, 50, 37, 70, torch.float16, device)
    agree(a, b, *random_masks(2, 50, 37, device))


@pytest.mark.parametrize("layout", ["padded", "aligned in NaN", "transposed", "expanded", "every other"])
def test_strides(device, layout):
    """Views, most of them into NaN, which no kernel may read."""
    a, b, *_ = op.example(3, 18, 21, 32, torch.float32, device)

    def view(x):
        buffer = torch.full((x.shape[0] + 2, x.shape[1] + 2, 64), NAN, device=device)
        inside = buffer[1:-1, 1:-1, 16:48] if layout == "aligned in NaN" else buffer[1:-1, 1:-1, 3:35]
        inside.copy_(x)
        every = x.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2)
        return {"transposed": x.permute(2, 1, 0).contiguous().permute(2, 1, 0), "expanded": x[:1, :1].expand(x.shape),
                "every other": every[::2, ::2, ::2]}.get(layout, inside)
    a_mask, b_mask = random_masks(3, 18, 21, device)
    agree(view(a), view(b), a_mask.T.contiguous().T, b_mask[:1].expand(3, 21))


# ------------------------------------------------------------------ masks and special tokens
@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_masked_tokens_are_never_looked_at(device, impl):
    a, b, *_ = op.example(3, 40, 50, 16, torch.float32, device)
    masks = random_masks(3, 40, 50, device)
    expected = greedy_match_ref(a, b, *masks)
    for x, mask in zip((a, b), masks):
        x[~mask] = NAN
    for out, exact in zip(greedy_match(a, b, *masks, impl=impl), expected):
        torch.testing.assert_close(out, exact)


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_no_partner_gives_zero_and_negative_maxima_stay(device, monkeypatch, impl):
    sizes = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": 16}
    monkeypatch.setattr(op, "plan", lambda *args: (sizes, {"num_warps": 4}))
    a = torch.ones(4, 20, 3, device=device)
    masks = [torch.ones(4, 20, dtype=torch.bool, device=device), torch.ones(4, 35, dtype=torch.bool, device=device)]
    masks[0][1], masks[1][2] = False, False                       # all of a's tokens, all of b's
    masks[1][3, :34] = False                                      # two tiles without a token, one with one
    row, col = greedy_match(a, -torch.ones(4, 35, 3, device=device), *masks, impl=impl)
    assert (row == torch.tensor([-3.0, 0, 0, -3], device=device)[:, None]).all()
    assert (col[:3] == torch.tensor([-3.0, 0, 0], device=device)[:, None]).all()
    assert not col[3, :34].any() and col[3, 34] == -3


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_an_unmasked_nan_is_loud(device, impl):
    a, b, a_mask, b_mask = op.example(3, 70, 30, 16, torch.float32, device)
    a[0, 65, 3] = NAN
    row, col = greedy_match(a, b, a_mask, b_mask, impl=impl)
    assert row.isnan().nonzero().tolist() == [[0, 65]] and col.isnan().sum(1).tolist() == [30, 0, 0]


def test_extreme_values(device):
    """Not unit tokens: products of fp16 up to 7e10; zeros."""
    a, b, *masks = op.example(2, 20, 30, 16, torch.float16, device)
    a[0], b[0, ::2], b[1] = 65504 * a[0].sign(), 65504 * b[0, ::2].sign(), 0
    agree(a, b, *masks)


@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("B, M, N", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(device, impl, B, M, N):
    a, b = torch.ones(B, M, 5, device=device), torch.ones(B, N, 5, device=device)
    row, col = greedy_match(a, b, a[..., 0] > 0, b[..., 0] > 0, impl=impl)
    assert row.shape == (B, M) and col.shape == (B, N) and not row.any() and not col.any()


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_no_gradient(device, impl):
    a, b, *masks = op.example(1, 3, 4, 5, torch.float32, device)
    assert not any(x.requires_grad for x in greedy_match(a.requires_grad_(), b.requires_grad_(), *masks, impl=impl))


# ------------------------------------------------------------------ dispatch, errors
def test_dispatch_cpu_uses_ref(monkeypatch):
    def launched(*args):
        raise AssertionError("the kernel ran on a CPU tensor")
    monkeypatch.setattr(op, "_greedy_match", launched)
    args = op.example(2, 3, 4, 5, torch.float16, "cpu")
    assert all(map(torch.equal, greedy_match(*args), greedy_match_ref(*args)))
    with pytest.raises(ValueError, match="impl must be"):
        greedy_match(*args, impl="cuda")


@pytest.mark.parametrize("change, message", [
    ({0: torch.zeros(3, 5)}, "a must be"), ({0: torch.zeros(2, 3, 0)}, "D >= 1"),
    ({1: torch.zeros(2, 4, 6)}, "b must be"), ({1: torch.zeros(3, 4, 5)}, "b must be"),
    ({1: torch.zeros(2, 4, 5).half()}, "one float type"),
    ({2: torch.zeros(2, 3)}, "a_mask must be bool"), ({3: torch.zeros(2, 3).bool()}, "b_mask must be bool"),
    ({3: torch.zeros(2, 4, device="meta").bool()}, "one device"),
])
def test_errors(change, message):
    args = list(op.example(2, 3, 4, 5, torch.float32, "cpu"))
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        greedy_match(*args)


def test_fp64_never_reaches_the_kernel(device):
    args = op.example(2, 3, 4, 5, torch.float64, device)
    assert greedy_match(*args)[0].dtype == torch.float64
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        greedy_match(*args, impl="triton")


# ------------------------------------------------------------------ large tensors
FAR_PAIRS = """
import mmap, tempfile, torch
from kernels.greedy_match import greedy_match
file = tempfile.TemporaryFile()
file.truncate(2**32 + 2**12)                    # sparse: 4 GB of addresses, a few pages of memory
memory = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float16)
a, b = memory.as_strided((3, 2, 64), (2**30, 64, 1)), memory[512:].as_strided((3, 2, 64), (64, 2**31, 1))
masks = 2 * [torch.ones(3, 2, dtype=torch.bool)]
for x in (a, b):
    x.copy_(torch.randn(3, 2, 64))
print(*map(torch.allclose, greedy_match(a, b, *masks, impl="triton"), greedy_match(a, b, *masks, impl="ref")))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; a GPU has a test of its own")
def test_offsets_beyond_int32():
    """Of pairs and of tokens. In a process of its own: a wrapped offset may crash it."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", FAR_PAIRS], env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["True", "True"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, M, N, D", [(64, 128, 128, 576), (33, 300, 257, 1024), (300, 77, 129, 383)])
def test_gpu_large_and_repeatable(B, M, N, D, dtype):
    a, b, *_ = op.example(B, M, N, D, dtype, "cuda")
    masks = random_masks(B, M, N, "cuda")
    agree(a, b, *masks)
    first = greedy_match(a, b, *masks, impl="triton")
    for _ in range(10):
        assert all(map(torch.equal, greedy_match(a, b, *masks, impl="triton"), first))


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    a = torch.zeros(2 ** 13 + 1, 64, 2 ** 12, dtype=torch.bfloat16, device="cuda")
    a[-1, 40, -1] = 1.0
    mask = torch.ones(a.shape[:2], dtype=torch.bool, device="cuda")
    row, col = greedy_match(a, a, mask, mask, impl="triton")
    assert torch.equal(row, col) and row.nonzero().tolist() == [[2 ** 13, 40]]
