# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/masked_focal_ce.py against its reference in fp64 and the closed form.

A bug that must be caught here: `1 + beta * g` -> `1` in the backward kernel (the focal factor detached).
"""
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import masked_focal_ce as op
from kernels._common import assert_kernel, launch, tl, triton
from kernels.masked_focal_ce import masked_focal_ce, masked_focal_ce_ref

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("transposed", "expanded rows", "expanded columns", "offset", "every other")
BLOCKS = [(1, 16, 4), (4, 16, 4), (64, 16, 4), (2, 64, 4), (1, 1024, 4), (1, 4096, 8)]  # rows, columns, warps
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def agree(args):
    """Kernel loss and gradient meet the error rule against fp64."""
    out, eager = op.outputs(op.kernel, args), op.outputs(op.reference, args)
    ref64 = op.outputs(op.reference, (args[0].double(), *args[1:]))
    R, V = args[0].shape
    assert out["loss"].dtype == torch.float32 and out["dlogits"].dtype == args[0].dtype
    for name in out:
        assert_kernel(name, out[name], ref64[name], eager[name], R + V)


def closed_form(logits, target, weight, alpha, beta):
    """Loss and gradient of the docstring's two lines, row by row in fp64."""
    loss, grad = 0.0, torch.zeros_like(logits)
    for r, y in enumerate(target.tolist()):
        p = logits[r].exp() / logits[r].exp().sum()
        u = -p[y].log()
        slope = alpha * ((1 - p[y]) ** beta + beta * u * p[y] * (1 - p[y]) ** (beta - 1))
        loss += weight[r] * alpha * (1 - p[y]) ** beta * u
        grad[r] = weight[r] * slope * (p - F.one_hot(target[r], len(p)))
    return loss, grad


# ------------------------------------------------------------------ the reference
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_reference_equals_the_closed_form(beta):
    logits, target, weight, alpha, _ = op.example(6, 9, torch.float64, "cpu")
    out = op.outputs(op.reference, (logits, target, weight, alpha, beta))
    loss, grad = closed_form(logits, target, weight.double(), alpha, beta)
    torch.testing.assert_close(out["loss"], loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(out["dlogits"], grad, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: masked_focal_ce_ref(x, target, weight, alpha, beta),
                                    logits.requires_grad_())


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_beta_zero_is_weighted_cross_entropy(device, impl):
    logits, target, weight, _, _ = op.example(20, 31, torch.float32, device)
    expected = (weight * F.cross_entropy(logits, target, reduction="none")).sum()
    torch.testing.assert_close(masked_focal_ce(logits, target, weight, 1, 0, impl=impl), expected)


# ------------------------------------------------------------------ kernel against reference
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("R, V", [(1, 1), (65, 2), (5, 31), (70, 33), (3, 1024), (2, 4097)])
def test_forward_and_backward(device, R, V, beta, dtype):
    *args, _ = op.example(R, V, dtype, device)
    agree((args[0] + 2, *args[1:], beta))


@pytest.mark.parametrize("V", [31, 9000])
def test_reads_nothing_outside(device, nan_padded, V):
    logits, *rest = op.example(5, V, torch.float32, device)
    agree((nan_padded(logits), *rest))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device, layout):
    logits, target, weight, *rest = op.example(8, 40, torch.float32, device)
    views = {"transposed": logits.T.contiguous().T, "expanded rows": logits[:1].expand(8, 40),
             "expanded columns": logits[:, :1].expand(8, 40),
             "offset": logits.flatten()[7:].unfold(0, 38, 40)[:7], "every other": logits[::2, ::2]}
    x = views[layout]
    agree((x, (target % x.shape[1]).repeat_interleave(2)[::2][:len(x)], weight[:1].expand(len(x)), *rest))


@pytest.mark.parametrize("blocks", BLOCKS)
def test_each_block_size_alone(device, monkeypatch, blocks):
    monkeypatch.setattr(op, "block_sizes", lambda V: blocks)
    agree(op.example(7, 100, torch.float32, device))


def test_duplicate_targets_and_integer_types(device):
    logits, _, weight, *rest = op.example(6, 31, torch.float32, device)
    agree((logits, torch.full((6,), 30, dtype=torch.int32, device=device), weight, *rest))


# ------------------------------------------------------------------ special rows
@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_rows_of_weight_zero_are_never_looked_at(device, impl):
    logits, target, weight, *rest = op.example(9, 31, torch.float32, device)
    dead = torch.arange(9, device=device) % 3 == 1
    live = op.outputs(op.reference, (logits[~dead], target[~dead], weight[~dead], *rest))
    logits[dead], target[dead], weight[dead] = float("nan"), -100, 0.0
    out = op.outputs(lambda *a: masked_focal_ce(*a, impl=impl), (logits, target, weight, *rest))
    torch.testing.assert_close(out["loss"], live["loss"])
    torch.testing.assert_close(out["dlogits"][~dead], live["dlogits"])
    assert (out["dlogits"][dead] == 0).all()
    nothing = op.outputs(lambda *a: masked_focal_ce(*a, impl=impl), (logits, target, weight * 0, *rest))
    assert nothing["loss"] == 0 and (nothing["dlogits"] == 0).all()


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_no_rows(device, impl):
    args = op.example(0, 31, torch.float32, device)
    out = op.outputs(lambda *a: masked_focal_ce(*a, impl=impl), args)
    assert out["loss"] == 0 and out["dlogits"].shape == (0, 31)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_extreme_values(device, beta):
    logits, target, weight, alpha, _ = op.example(6, 50, torch.float32, device)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2] *= 1e4                                              # u of the order of 1e4
    logits[3] = 7.0                                               # all equal
    logits[4, target[4]] = 12.0                                   # p = 0.99..., 1 - p from the series
    logits[5, :40], target[5] = -float("inf"), 45                 # forbidden ids of the model
    agree((logits, target, weight, alpha, beta))
    loss = masked_focal_ce(logits[3:4], target[3:4], torch.ones(1, device=device), 1, 0, impl="triton")
    assert loss.item() == pytest.approx(3.912023005)              # ln 50


def test_first_blocks_hold_only_minus_infinity(device, monkeypatch):
    monkeypatch.setattr(op, "block_sizes", lambda V: (2, 16, 4))
    logits, target, *rest = op.example(3, 60, torch.float32, device)
    logits[:, :35] = -float("inf")
    agree((logits, target % 20 + 40, *rest))


@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0, 2.0])
def test_rule_at_p_equal_to_one(device, impl, beta):
    logits = torch.tensor([[0.0, -200.0], [-200.0, 0.0]], device=device)
    args = (logits, torch.tensor([0, 1], device=device), torch.ones(2, device=device), 0.25, beta)
    out = op.outputs(lambda *a: masked_focal_ce(*a, impl=impl), args)
    assert out["loss"] == 0 and (out["dlogits"] == 0).all()  # finite: beta < 1 too, where q^(beta-1) is not


@triton.jit
def _focal_probe(u_ptr, out_ptr, beta, N: tl.constexpr):
    lane = tl.arange(0, N)
    q, v, g = op._focal(tl.load(u_ptr + lane), beta)
    tl.store(out_ptr + lane, q)
    tl.store(out_ptr + N + lane, v)
    tl.store(out_ptr + 2 * N + lane, g)


def test_one_minus_p_keeps_its_digits(device):
    """q, q^beta and u p / q to a few ulp for every u, where 1 - exp(-u) alone would lose all digits."""
    u = torch.cat([torch.logspace(-30, 4, 250), torch.tensor([0.2499999, 0.25, 0.2500001, 80.0, 90.0, 1.0])])
    out = torch.empty(3, 256, device=device)
    launch(_focal_probe, 1, u.to(device), out, 0.5, N=256)
    q = -torch.expm1(-u.double())
    expected = torch.stack([q, q ** 0.5, u.double() * torch.exp(-u.double()) / q])
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("bad", [31, -1, -100])
def test_target_outside_the_vocabulary_is_loud(device, nan_padded, bad):
    logits, target, *rest = op.example(4, 31, torch.float32, device)
    target[2] = bad
    assert masked_focal_ce(logits, target, *rest, impl="triton").isnan()
    if device == "cpu":                                           # on CUDA it kills the context
        with pytest.raises((RuntimeError, IndexError)):
            masked_focal_ce(logits, target, *rest, impl="ref")


def test_nan_logits_give_nan(device):
    logits, *rest = op.example(4, 31, torch.float32, device)
    logits[1, 3] = float("nan")
    assert masked_focal_ce(logits, *rest, impl="triton").isnan()


# ------------------------------------------------------------------ autograd
def test_expanded_upstream_gradient_and_two_backwards(device):
    logits, *rest = op.example(5, 31, torch.float32, device)
    before, x = logits.clone(), logits.requires_grad_()
    loss = masked_focal_ce(x, *rest, impl="triton")
    first, = torch.autograd.grad(loss, x, retain_graph=True)
    second, = torch.autograd.grad(loss.expand(3).sum(), x)
    torch.testing.assert_close(second, 3 * first)
    assert torch.equal(x.detach(), before)              # the gradient did not reuse the logits' memory


def test_integration_same_training_losses(device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(12, 32), torch.nn.Linear(32, 32), torch.nn.GELU(),
                                torch.nn.Linear(32, 11)).to(device)
    ids = torch.randint(12, (10, 16), device=device)
    losses = {}
    for impl in ("ref", "triton"):
        net = copy.deepcopy(model)
        optimizer, losses[impl] = torch.optim.AdamW(net.parameters(), lr=1e-2), []
        for x in ids:
            loss = masked_focal_ce(net(x), x % 11, (x % 3 > 0) / 16, 0.25, 1.0, impl=impl)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[impl].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["ref"], abs=1e-4)
    assert losses["ref"][-1] < 0.9 * losses["ref"][0]             # it did train


# ------------------------------------------------------------------ dispatch, errors
def test_dispatch_cpu_uses_ref(monkeypatch):
    def launched(*args):
        raise AssertionError("the kernel ran on a CPU tensor")
    monkeypatch.setattr(op._MaskedFocalCE, "apply", launched)
    args = op.example(3, 31, torch.float32, "cpu")
    assert torch.equal(masked_focal_ce(*args), masked_focal_ce_ref(*args))
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    with pytest.raises(RuntimeError, match="needs a CUDA tensor"):
        masked_focal_ce(*args, impl="triton")
    with pytest.raises(ValueError, match="impl must be"):
        masked_focal_ce(*args, impl="cuda")


@pytest.mark.parametrize("change, message", [
    ({0: torch.zeros(3)}, "must be .R, V."), ({0: torch.zeros(3, 0)}, "at least one column"),
    ({0: torch.zeros(3, 31, dtype=torch.int32)}, "floating point"), ({1: torch.zeros(3)}, "integers"),
    ({1: torch.zeros(4).long()}, "target must be"), ({2: torch.zeros(3, 1)}, "weight must be"),
    ({4: -1.0}, "beta must be"),
])
def test_errors(change, message):
    args = list(op.example(3, 31, torch.float32, "cpu"))
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        masked_focal_ce(*args)


def test_fp64_logits_never_reach_the_kernel(device):
    args = op.example(3, 31, torch.float64, device)
    assert masked_focal_ce(*args).dtype == torch.float64
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        masked_focal_ce(*args, impl="triton")


# ------------------------------------------------------------------ large tensors
FAR_ROWS = """
import mmap, tempfile, torch
from kernels.masked_focal_ce import masked_focal_ce
file = tempfile.TemporaryFile()
file.truncate(2**32 + 128)                      # sparse: 4 GB of addresses, a few pages of memory
x = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float16).as_strided((3, 31), (2**30, 1))
x.copy_(torch.randn(3, 31))
args = torch.tensor([1, 2, 3]), torch.ones(3), 1.0, 1.0
print(float(masked_focal_ce(x, *args, impl="triton") - masked_focal_ce(x.contiguous(), *args, impl="ref")))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; a GPU has a test of its own")
def test_row_offsets_beyond_int32():
    """In a process of its own: a wrapped offset reads 4 GB in front of the tensor, which may crash it."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FAR_ROWS]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr[-2000:]
    assert abs(float(run.stdout)) < 1e-5              # False for NaN


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_large_and_repeatable(dtype):
    args = op.example(300, 50257, dtype, "cuda")
    agree(args)
    first = op.outputs(op.kernel, args)
    for _ in range(10):
        again = op.outputs(op.kernel, args)
        assert torch.equal(again["loss"], first["loss"]) and torch.equal(again["dlogits"], first["dlogits"])


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    R, V = 2 ** 16 + 1, 2 ** 15
    logits = torch.zeros(R, V, dtype=torch.bfloat16, device="cuda").requires_grad_()
    weight = torch.zeros(R, device="cuda")
    weight[-1] = 1.0
    target = torch.zeros(R, dtype=torch.long, device="cuda")
    loss = masked_focal_ce(logits, target, weight, 1.0, 0.0, impl="triton")
    loss.backward()
    assert loss.item() == pytest.approx(10.39720771)              # 15 ln 2
    assert logits.grad[-1, 0].item() == pytest.approx(-1.0, abs=0.01) and not logits.grad[:-1].any()
