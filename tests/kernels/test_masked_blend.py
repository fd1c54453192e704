# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/masked_blend.py against its reference, and the reference against loops over samples, masks and players.

A bug that must be caught here: `cols // D` -> `cols % D` (the bit of the wrong player).
"""
import pytest
import torch

from kernels import masked_blend as op
from kernels._common import assert_kernel
from kernels.masked_blend import masked_blend, masked_blend_ref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("transposed", "expanded samples", "expanded columns", "offset", "every other")
SETTINGS = [(1, 1, 1, 16), (3, 3, 2, 64), (32, 4, 4, 32), (8, 16, 8, 128)]  # masks fwd, bwd, rows, columns
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def agree(args):
    """The blends are equal bit for bit; the gradients meet the error rule against fp64."""
    out, eager = op.outputs(op.kernel, args), op.outputs(op.reference, args)
    ref64 = op.outputs(op.reference, (args[0].double(), args[1].double(), args[2]))
    assert out["out"].dtype == out["dx"].dtype == out["db"].dtype == args[0].dtype
    assert torch.equal(out["out"], eager["out"])
    for name in ("dx", "db"):
        assert_kernel(name, out[name], ref64[name], eager[name], len(args[0]) * len(args[2]))


# ------------------------------------------------------------------ the reference
def test_reference_equals_loops():
    S, M, P, D = 2, 7, 5, 3
    x, b, masks = op.example(S, M, P, D, torch.float64, "cpu")
    x.requires_grad_(), b.requires_grad_()
    out = masked_blend(x, b, masks)
    dout = torch.randn_like(out)
    dx, db = torch.autograd.grad(out, (x, b), dout)
    expected_dx, expected_db = torch.zeros_like(x), torch.zeros_like(b)
    for s in range(S):
        for m, mask in enumerate(masks.tolist()):
            for p in range(P):
                kept = bool(mask & 1 << p)
                assert torch.equal(out[s, m, p], x[s, p] if kept else b[p])
                (expected_dx[s, p] if kept else expected_db[p]).add_(dout[s, m, p])
    torch.testing.assert_close(dx, expected_dx)
    torch.testing.assert_close(db, expected_db)


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_all_none_and_every_single_player(device, impl):
    """Up to 63 players; negative masks are two's complement, so -1 keeps all; bits from P on are ignored."""
    x, b, _ = op.example(2, 1, 63, 2, torch.float32, device)
    masks = torch.tensor([0, -1, 2 ** 63 - 1, -2 ** 63] + [1 << p for p in range(63)], device=device)
    out = masked_blend(x, b, masks, impl=impl)                                            # (2, 67, 63, 2)
    assert torch.equal(out[:, 0], b.expand(2, 63, 2)) and torch.equal(out[:, 3], out[:, 0])
    assert torch.equal(out[:, 1], x) and torch.equal(out[:, 2], x)
    kept = torch.eye(63, dtype=torch.bool, device=device)[None, :, :, None]
    assert torch.equal(out[:, 4:], torch.where(kept, x[:, None], b))
    assert torch.equal(masked_blend(x[:, :4], b[:4], masks + 16, impl=impl)[:, 0], b[:4].expand(2, 4, 2))


# ------------------------------------------------------------------ kernel against reference
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S, M, P, D", [(1, 1, 1, 1), (2, 33, 9, 7), (1, 257, 3, 5), (3, 2, 63, 1), (2, 5, 4, 512),
                                        (1, 3, 12, 100)])
def test_forward_and_backward(device, S, M, P, D, dtype):
    x, b, masks = op.example(S, M, P, D, dtype, device)
    agree((x + 2, b, masks))


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_setting_alone(device, monkeypatch, setting):
    for name, value in zip(("MASKS_FWD", "MASKS_BWD", "ROWS_BWD"), setting):
        monkeypatch.setattr(op, name, value)
    monkeypatch.setattr(op, "columns", lambda PD, itemsize: setting[3])
    agree(op.example(2, 5, 3, 13, torch.float32, device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device, layout):
    x, b, masks = op.example(6, 10, 4, 6, torch.float32, device)
    x, b = {"transposed": (x.transpose(0, 2).contiguous().transpose(0, 2), b.T.contiguous().T),
            "expanded samples": (x[:1].expand(6, 4, 6), b[:1].expand(4, 6)),
            "expanded columns": (x[:, :, :1].expand(6, 4, 6), b[:, :1].expand(4, 6)),
            "offset": (x.flatten()[7:127].view(5, 4, 6), b.flatten()[:24].view(4, 6)),
            "every other": (x[::2, ::2, ::2], b[::2, ::2])}[layout]
    agree((x, b, masks))
    agree((x, b, masks[1::2]))
    agree((x, b, masks[:1].expand(3)))


def test_columns():
    for PD in (1, 2, 3, 333, 1024, 1025, 150528):
        for itemsize in (2, 4):
            block = op.columns(PD, itemsize)
            assert block & (block - 1) == 0 and (PD <= block < 2 * PD or block * itemsize == 2048)


# ------------------------------------------------------------------ special values
@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_values_are_copied_not_computed(device, impl):
    """NaN and infinity stay where they are: in the player that has them, on the side that has them."""
    x, b, _ = op.example(1, 1, 3, 4, torch.float32, device)
    x[0, 0], x[0, 1, 2], b[2] = float("nan"), float("inf"), -float("inf")
    out = masked_blend(x, b, torch.arange(8, device=device), impl=impl)[0]                # (8, 3, 4)
    kept = torch.arange(8, device=device)[:, None] >> torch.arange(3, device=device) & 1 == 1
    assert torch.equal(out[:, 0].isnan().all(-1), kept[:, 0]) and not out[:, 1:].isnan().any()
    assert torch.equal(out[:, 1, 2] == float("inf"), kept[:, 1])
    assert torch.equal((out[:, 2] == -float("inf")).all(-1), ~kept[:, 2])


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_nan_upstream_reaches_one_side_only(device, impl):
    x, b, _ = op.example(1, 1, 3, 4, torch.float32, device)
    x.requires_grad_(), b.requires_grad_()
    out = masked_blend(x, b, torch.tensor([0b101, 0b111], device=device), impl=impl)
    dout = torch.ones_like(out)
    dout[0, 0, 1], dout[0, 1, 2] = float("nan"), 1e30
    dx, db = torch.autograd.grad(out, (x, b), dout)
    assert dx[0, 0].tolist() == [2.0] * 4 and dx[0, 1].tolist() == [1.0] * 4 and (dx[0, 2] == 1e30).all()
    assert not db[[0, 2]].any() and db[1].isnan().all()


@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("S, M, P, D", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)])
def test_empty(device, impl, S, M, P, D):
    x, b = torch.zeros(S, P, D, device=device, requires_grad=True), torch.zeros(P, D, device=device)
    out = masked_blend(x, b, torch.zeros(M, dtype=torch.int64, device=device), impl=impl)
    out.sum().backward()
    assert out.shape == (S, M, P, D) and x.grad.shape == x.shape and not x.grad.any()


def test_all_providers_of_the_benchmark_agree(monkeypatch, device):
    monkeypatch.setattr(torch, "compile", lambda fn: fn)
    for fns in op.bench(op.example(2, 5, 3, 4, torch.float32, device)).values():
        first, *others = (fn() for fn in fns.values())
        for other in others:
            torch.testing.assert_close(other, first)


# ------------------------------------------------------------------ autograd
def test_expanded_upstream_gradient_and_one_leaf_alone(device):
    x, b, masks = op.example(2, 9, 4, 5, torch.float32, device)
    bits = masks[:, None] >> torch.arange(4, device=device) & 1                           # (9, 4)
    for leaf, expected in ((x, bits.sum(0).expand(2, 4)), (b, 2 * (1 - bits).sum(0))):
        leaf.requires_grad_()
        masked_blend(x, b, masks, impl="triton").sum().backward()
        assert torch.equal(leaf.grad, expected[..., None].expand_as(leaf).float())
        leaf.requires_grad_(False)


def test_integration_same_losses_of_a_learned_baseline(device):
    """SGD on a baseline such that the masked sentences give a constant output."""
    x, b0, masks = op.example(3, 16, 4, 6, torch.float32, device)
    weight, losses = torch.randn(24, generator=torch.Generator().manual_seed(2)).to(device), {}
    for impl in ("ref", "triton"):
        b, losses[impl] = b0.clone().requires_grad_(), []
        optimizer = torch.optim.SGD([b], lr=0.02, momentum=0.9)
        for _ in range(10):
            loss = (masked_blend(x, b, masks, impl=impl).flatten(2) @ weight).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[impl].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["ref"], rel=1e-4)
    assert losses["ref"][-1] < 0.9 * losses["ref"][0]


# ------------------------------------------------------------------ dispatch, errors
def test_dispatch_cpu_uses_ref(monkeypatch):
    def launched(*args):
        raise AssertionError("the kernel ran on a CPU tensor")
    monkeypatch.setattr(op._MaskedBlend, "apply", launched)
    args = op.example(2, 3, 4, 5, torch.float32, "cpu")
    assert torch.equal(masked_blend(*args), masked_blend_ref(*args))
    assert masked_blend(args[0].double(), args[1].double(), args[2]).dtype == torch.float64
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    with pytest.raises(RuntimeError, match="needs a CUDA tensor"):
        masked_blend(*args, impl="triton")
    with pytest.raises(ValueError, match="impl must be"):
        masked_blend(*args, impl="cuda")


@pytest.mark.parametrize("change, message", [
    ({0: torch.zeros(3, 4)}, "x must be .S, P, D."), ({1: torch.zeros(5)}, "b must be .4, 5."),
    ({1: torch.zeros(4, 5).half()}, "x is torch.float32, b torch.float16"), ({2: torch.zeros(3)}, "must be .M,. int64"),
    ({2: torch.zeros(3, 4).long()}, "must be .M,. int64"), ({2: torch.zeros(3).int()}, "must be .M,. int64"),
    ({0: torch.zeros(1, 64, 2), 1: torch.zeros(64, 2)}, "at most 63 players"),
    ({0: torch.zeros(2, 4, 5).long(), 1: torch.zeros(4, 5).long()}, "x is torch.int64"),
])
def test_errors(change, message):
    args = list(op.example(2, 3, 4, 5, torch.float32, "cpu"))
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        masked_blend(*args)


def test_fp64_never_reaches_the_kernel(device):
    args = op.example(2, 3, 4, 5, torch.float64, device)
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        masked_blend(*args, impl="triton")


# ------------------------------------------------------------------ on a GPU only
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_large_and_repeatable(dtype):
    args = op.example(4, 1000, 12, 1000, dtype, "cuda")
    agree(args)
    first = op.outputs(op.kernel, args)
    for _ in range(10):
        again = op.outputs(op.kernel, args)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    x = torch.ones(1, 1, 2 ** 15, dtype=torch.bfloat16, device="cuda").requires_grad_()
    masks = torch.zeros(2 ** 16 + 1, dtype=torch.int64, device="cuda")
    masks[-1] = 1
    out = masked_blend(x, torch.zeros_like(x[0]), masks, impl="triton")
    assert out[0, -1].all() and not out[0, :-1].any()
    assert (torch.autograd.grad(out.sum(), x)[0] == 1).all()
