# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/decode_scores.py against its reference in fp64 and brute force.

A bug that must be caught here: `t + step * s` -> `t` (the entropy sum not moved to the new maximum).
"""
import math

import pytest
import torch

from kernels import decode_scores as op
from kernels._common import assert_kernel
from kernels.decode_scores import decode_scores, decode_scores_ref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("transposed", "expanded rows", "expanded columns", "offset", "every other")
BLOCKS = [(1, 16, 4), (4, 16, 4), (64, 16, 4), (2, 64, 4), (1, 1024, 4), (1, 4096, 8)]  # rows, columns, warps
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def agree(logits, forbidden=()):
    """Kernel outputs meet the error rule against fp64; the argmax is equal."""
    out, eager = decode_scores(logits, forbidden, impl="triton"), decode_scores_ref(logits, forbidden)
    ref64 = decode_scores_ref(logits.double(), forbidden)
    assert [x.dtype for x in out] == [torch.int64] + 3 * [torch.float32]
    for name, x, exact, plain in zip(("argmax", "logp", "margin", "negentropy"), out, ref64, eager):
        assert_kernel(name, x, exact, plain, logits.shape[1])


def random_logits(R, V, dtype, device):
    return op.example(R, V, dtype, device)[0] + 2


def brute_force(row, forbidden):
    """The four numbers of one row by plain Python."""
    x = {j: v for j, v in enumerate(row) if j not in forbidden}
    total = sum(math.exp(v) for v in x.values())
    p = sorted((math.exp(v) / total for v in x.values()), reverse=True)
    best = min(j for j in x if x[j] == max(x.values()))
    return best, math.log(p[0]), p[0] - (p[1] if len(p) > 1 else 0.0), sum(q * math.log(q) for q in p)


# ------------------------------------------------------------------ the reference
@pytest.mark.parametrize("forbidden", [(), (3,), (0, 4, 8)])
def test_reference_equals_brute_force(forbidden):
    logits = random_logits(5, 9, torch.float64, "cpu")
    logits[0, 1] = logits[0].max() + 1                            # far ahead
    logits[1, 2:7] = 9.0                                          # five-fold tie
    rows = [brute_force(row, forbidden) for row in logits.tolist()]
    for got, expected in zip(decode_scores_ref(logits, forbidden), zip(*rows)):
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(got.double(), expected, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------ kernel against reference
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R, V, forbidden", [(1, 1, ()), (65, 2, (0,)), (5, 31, (0, 30)), (70, 33, ()),
                                             (3, 1024, (5,)), (2, 4097, (4096,)), (2, 9000, ())])
def test_forward(device, R, V, forbidden, dtype):
    agree(random_logits(R, V, dtype, device), forbidden)


@pytest.mark.parametrize("V", [31, 9000])
def test_reads_nothing_outside(device, nan_padded, V):
    agree(nan_padded(random_logits(5, V, torch.float32, device)), (1, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device, layout):
    x = random_logits(8, 40, torch.float32, device)
    views = {"transposed": x.T.contiguous().T, "expanded rows": x[:1].expand(8, 40),
             "expanded columns": x[:, :1].expand(8, 40), "offset": x.flatten()[7:].unfold(0, 38, 40)[:7],
             "every other": x[::2, ::2]}
    agree(views[layout], (0,))


@pytest.mark.parametrize("blocks", BLOCKS)
def test_each_block_size_alone(device, monkeypatch, blocks):
    monkeypatch.setattr(op, "block_sizes", lambda V: blocks)
    agree(random_logits(7, 100, torch.float32, device), (0, 50, 99))


# ------------------------------------------------------------------ special rows
def test_extreme_values(device):
    x = random_logits(6, 50, torch.float32, device)
    x[0] += 1e4
    x[1] -= 1e4
    x[2] *= 1e4
    x[3] = 7.0                                                    # all equal
    x[4, 9] = 60.0                                                # saturated: p = 1 in fp32
    x[5, :45] = -float("inf")
    agree(x, (49,))
    argmax, logp, margin, negentropy = decode_scores(x[3:4], impl="triton")
    assert argmax.item() == 0 and margin.item() == 0.0
    assert logp.item() == pytest.approx(-math.log(50)) and negentropy.item() == pytest.approx(-math.log(50))


@pytest.mark.parametrize("block_v", [16, 32, 64])
def test_ties_give_the_lowest_index(device, monkeypatch, block_v):
    monkeypatch.setattr(op, "block_sizes", lambda V: (2, block_v, 4))
    x = torch.zeros(4, 60, device=device)
    for row, columns in enumerate([(3, 4), (15, 16), (20, 59), (1, 33)]):
        x[row, list(columns)] = 5.0             # within a block, across blocks, beside a forbidden id
    agree(x, (1,))
    argmax, _, margin, _ = decode_scores(x, (1,), impl="triton")
    assert argmax.tolist() == [3, 15, 20, 33]
    assert margin[:3].tolist() == [0.0, 0.0, 0.0] and margin[3] > 0.1


@pytest.mark.parametrize("order", [1, -1])
def test_second_largest_across_blocks(device, monkeypatch, order):
    """Rising and falling rows: the runner-up arrives before, with and after the maximum."""
    monkeypatch.setattr(op, "block_sizes", lambda V: (1, 16, 4))
    ramp = order * torch.linspace(-2, 2, 50, device=device)
    agree(torch.stack([ramp, ramp.roll(7), ramp.roll(-1)]))


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_one_column_and_one_allowed_id(device, impl):
    for x, forbidden, best in ((torch.tensor([[3.0]]), (), 0), (torch.tensor([[9.0, 1.0, 9.0]]), (0, 2), 1)):
        argmax, logp, margin, negentropy = decode_scores(x.to(device), forbidden, impl=impl)
        assert (argmax.item(), logp.item(), margin.item(), negentropy.item()) == (best, 0.0, 1.0, 0.0)


def test_forbidden_equals_minus_infinity_before_the_softmax(device):
    x = random_logits(5, 31, torch.float32, device)
    masked = x.clone()
    masked[:, [4, 7]] = -float("inf")
    for a, b in zip(decode_scores(x, (7, 4, 7), impl="triton"), decode_scores(masked, impl="triton")):
        assert torch.equal(a, b)
    x[:, 4] = float("nan")                                        # a forbidden column is never looked at
    for a, b in zip(decode_scores(x, (4, 7), impl="triton"), decode_scores(masked, impl="triton")):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_rows_without_a_distribution_have_nan_scores(device, impl):
    x = random_logits(4, 20, torch.float32, device)
    x[0, 3], x[1], x[2, 19] = float("nan"), -float("inf"), float("inf")
    argmax, *scores = decode_scores(x, impl=impl)
    assert all(s[:3].isnan().all() and s[3].isfinite() for s in scores)
    assert ((argmax >= 0) & (argmax < 20)).all()


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_no_rows_and_no_gradient(device, impl):
    assert [tuple(s.shape) for s in decode_scores(torch.zeros(0, 7, device=device), impl=impl)] == [(0,)] * 4
    outputs = decode_scores(torch.zeros(2, 7, device=device, requires_grad=True), impl=impl)
    assert not any(s.requires_grad for s in outputs)


# ------------------------------------------------------------------ dispatch, errors
def test_dispatch_cpu_uses_ref(monkeypatch):
    def launched(*args):
        raise AssertionError("the kernel ran on a CPU tensor")
    monkeypatch.setattr(op, "_decode_scores", launched)
    x = random_logits(3, 31, torch.float32, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(decode_scores(x, (2,)), decode_scores_ref(x, (2,))))
    with pytest.raises(ValueError, match="impl must be"):
        decode_scores(x, impl="cuda")


@pytest.mark.parametrize("shape, forbidden, message", [
    ((3,), (), "must be .R, V."), ((3, 0), (), "at least one column"), ((3, 4), (4,), "must be in .0, 4."),
    ((3, 4), (-1,), "must be in .0, 4."), ((3, 2), (0, 1, 1), "all 2 ids are forbidden"),
])
def test_errors(shape, forbidden, message):
    with pytest.raises(ValueError, match=message):
        decode_scores(torch.zeros(shape), forbidden)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_large_and_repeatable(dtype):
    x = random_logits(300, 50257, dtype, "cuda")
    agree(x, (0, 50256))
    first = decode_scores(x, impl="triton")
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(decode_scores(x, impl="triton"), first))


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    x = torch.zeros(2 ** 16 + 1, 2 ** 15, dtype=torch.bfloat16, device="cuda")
    x[-1, 77] = 5.0
    argmax, logp, *_ = decode_scores(x, impl="triton")
    assert argmax[-1] == 77 and not argmax[:-1].any()
    assert logp[0].item() == pytest.approx(-15 * math.log(2))
