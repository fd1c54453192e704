# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/cross_entropy.py against its reference in fp64, the closed form and torch's own function.

A bug that must be caught here: `s * e + 1` -> `s + 1` in the forward kernel (the old sum is not rescaled).
"""
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import checked
from kernels import cross_entropy as op
from kernels._common import assert_kernel
from kernels.cross_entropy import cross_entropy, cross_entropy_ref

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VIEWS = {"transposed": lambda x: x.T.contiguous().T, "expanded rows": lambda x: x[:1].expand(8, 40),
         "expanded columns": lambda x: x[:, :1].expand(8, 40), "every other": lambda x: x[::2, ::2],
         "offset": lambda x: x.flatten()[7:].unfold(0, 38, 40)[:7]}
BLOCKS = [(1, 16, 4), (4, 16, 4), (64, 16, 4), (2, 64, 4), (1, 1024, 4), (1, 4096, 8)]  # rows, columns, warps
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def agree(args, fn=op.kernel):
    """Losses, their mean and the gradient of the mean meet the error rule against fp64."""
    out, eager = op.outputs(fn, args), op.outputs(op.reference, args)
    ref64 = op.outputs(op.reference, (args[0].double(), *args[1:]))
    assert out["losses"].dtype == out["mean"].dtype == torch.float32 and out["dlogits"].dtype == args[0].dtype
    for name in out:
        assert_kernel(name, out[name], ref64[name], eager[name], sum(args[0].shape))


def impl(name, **options):
    return lambda *args: cross_entropy(*args, impl=name, **options)


# ------------------------------------------------------------------ the reference
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_reference_equals_the_closed_form(z_loss):
    """The docstring's two lines, row by row in fp64."""
    logits, target, ignore, _ = op.example(12, 9, torch.float64, "cpu")
    losses, grad, n = torch.zeros(12).double(), torch.zeros(12, 9).double(), (target != ignore).sum()
    assert n == 10
    for r, y in enumerate(target.tolist()):
        if y != ignore:
            lse = logits[r].exp().sum().log()
            losses[r] = lse - logits[r, y] + z_loss * lse ** 2
            grad[r] = ((1 + 2 * z_loss * lse) * (logits[r] - lse).exp() - F.one_hot(target[r], 9)) / n
    out = op.outputs(op.reference, (logits, target, ignore, z_loss))
    for name, expected in {"losses": losses, "mean": losses.sum() / n, "dlogits": grad}.items():
        torch.testing.assert_close(out[name], expected, rtol=1e-12, atol=1e-14)
    assert cross_entropy(logits, target, ignore, z_loss, "sum").item() == pytest.approx(losses.sum().item())
    assert torch.autograd.gradcheck(lambda x: cross_entropy_ref(x, target, ignore, z_loss), logits.requires_grad_())


@pytest.mark.parametrize("name", ["ref", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore", [-100, 0, 1, 16])
def test_equals_torch(device, name, reduction, ignore):
    logits, target, *_ = op.example(20, 31, torch.float32, device)
    target = torch.where(target == -100, ignore, target)
    expected = F.cross_entropy(logits, target, ignore_index=ignore, reduction=reduction)
    torch.testing.assert_close(cross_entropy(logits, target, ignore, reduction=reduction, impl=name), expected)


# ------------------------------------------------------------------ kernel against reference
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("R, V", [(1, 1), (65, 2), (5, 31), (70, 33), (3, 1024), (2, 4097)])
def test_forward_and_backward(device, R, V, z_loss, dtype):
    logits, *rest, _ = op.example(R, V, dtype, device)
    agree((logits + 2, *rest, z_loss))


@pytest.mark.parametrize("V", [31, 9000])
def test_reads_nothing_outside(device, nan_padded, V):
    logits, *rest = op.example(5, V, torch.float32, device)
    agree((nan_padded(logits), *rest))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(device, view):
    """In place, too: the gradient of what the logits are a view of."""
    logits, target, *rest = op.example(8, 40, torch.float32, device)
    x = view(logits)
    target = torch.where(target < 0, target, target % x.shape[1]).repeat_interleave(2)[::2][:len(x)]
    agree((x, target, *rest))
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(view(leaf), target, *rest, inplace=inplace, impl="triton")
        grads += torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(*grads)  # not equal: PyTorch adds up the gradients of expanded rows


@pytest.mark.parametrize("blocks", BLOCKS)
def test_each_block_size_alone(device, monkeypatch, blocks):
    monkeypatch.setattr(op, "block_sizes", lambda V: blocks)
    agree(op.example(7, 100, torch.float32, device))


def test_duplicate_targets_and_integer_types(device):
    logits, _, *rest = op.example(6, 31, torch.float32, device)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        agree((logits, torch.full((6,), 30, dtype=dtype, device=device), *rest))


# ------------------------------------------------------------------ special rows
@pytest.mark.parametrize("name", ["ref", "triton"])
def test_ignored_rows_are_never_looked_at(device, name):
    logits, target, ignore, z_loss = op.example(9, 31, torch.float32, device)
    dead = torch.arange(9, device=device) % 3 == 0
    target[3] = 5                                                 # the example's own ignored row
    live = op.outputs(op.reference, (logits[~dead], target[~dead], ignore, z_loss))
    logits[dead], target[dead] = float("nan"), ignore
    out = op.outputs(impl(name), (logits, target, ignore, z_loss))
    torch.testing.assert_close(out["losses"][~dead], live["losses"])
    torch.testing.assert_close(out["mean"], live["mean"])
    torch.testing.assert_close(out["dlogits"][~dead], live["dlogits"])
    assert (out["dlogits"][dead] == 0).all() and (out["losses"][dead] == 0).all()
    nothing = op.outputs(impl(name), (logits, torch.full_like(target, ignore), ignore, z_loss))
    assert nothing["mean"] == 0 and not nothing["losses"].any() and not nothing["dlogits"].any()


@pytest.mark.parametrize("name", ["ref", "triton"])
def test_no_rows(device, name):
    out = op.outputs(impl(name), op.example(0, 31, torch.float32, device))
    assert out["mean"] == 0 and out["losses"].shape == (0,) and out["dlogits"].shape == (0, 31)


def test_extreme_values(device):
    logits, target, ignore, _ = op.example(7, 50, torch.float32, device)
    target[3] = 11
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2] *= 1e4                                              # losses of the order of 1e4
    logits[3] = 7.0                                               # all equal
    logits[4] *= 1e-30
    logits[5, :40], target[5] = -float("inf"), 45                 # forbidden ids of the model
    logits[6, 1], logits[6, 2] = 3e38, -3e38                      # the ends of fp32
    target[6] = 1
    agree((logits, target, ignore, 0.0))
    assert cross_entropy(logits[3:4], target[3:4], impl="triton").item() == pytest.approx(3.912023005)   # ln 50


def test_first_blocks_hold_only_minus_infinity(device, monkeypatch):
    monkeypatch.setattr(op, "block_sizes", lambda V: (2, 16, 4))
    logits, target, *rest = op.example(3, 60, torch.float32, device)
    logits[:, :35] = -float("inf")
    agree((logits, target % 20 + 40, *rest))


@pytest.mark.parametrize("bad", [31, -1, 2 ** 33])
def test_target_outside_the_vocabulary_is_loud(device, nan_padded, bad):
    logits, target, *_ = op.example(4, 31, torch.float32, device)
    target[2] = bad
    assert cross_entropy(nan_padded(logits), target, impl="triton").isnan()
    if device == "cpu":                                           # on CUDA it kills the context
        with pytest.raises((RuntimeError, IndexError)):
            cross_entropy(logits, target, impl="ref")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("whole", [False, True])
def test_nan_and_infinite_logits_are_loud(device, bad, whole):
    logits, target, *_ = op.example(4, 31, torch.float32, device)
    logits[1, slice(None) if whole else 3] = bad
    losses = cross_entropy(logits, target, reduction="none", impl="triton")
    assert losses.isfinite().tolist() == [True, False, True, True] and losses[3] == 0
    logits[1] = -float("inf")
    assert cross_entropy(logits, target, impl="triton").isnan()


# ------------------------------------------------------------------ autograd
def test_expanded_upstream_gradient_and_two_backwards(device):
    logits, *rest = op.example(5, 31, torch.float32, device)
    before, x = logits.clone(), logits.requires_grad_()
    loss = cross_entropy(x, *rest, impl="triton")
    first, = torch.autograd.grad(loss, x, retain_graph=True)
    second, = torch.autograd.grad(loss.expand(3).sum(), x)
    torch.testing.assert_close(second, 3 * first)
    assert torch.equal(x.detach(), before)              # the gradient did not reuse the logits' memory


def test_weights_of_ones_own(device):
    """Losses by row, weighted outside: the upstream gradient differs from row to row."""
    logits, target, ignore, z_loss = op.example(9, 31, torch.float32, device)
    weight, grads = torch.linspace(-1, 2, 9, device=device), []
    for name in ("ref", "triton"):
        x = logits.clone().requires_grad_()
        losses = cross_entropy(x, target, ignore, z_loss, "none", impl=name)
        grads += torch.autograd.grad((weight * losses).sum(), x)
    torch.testing.assert_close(*grads)


def test_in_place_overwrites_the_logits_once(device):
    logits, *rest = op.example(5, 31, torch.float32, device)
    expected = op.outputs(op.kernel, (logits, *rest))["dlogits"]
    x = logits.clone().requires_grad_()
    y = x * 1                                           # what the head gives: no leaf, and not saved by x * 1
    tanh_like = y.exp()                                 # exp saves its output, not y
    loss = cross_entropy(y, *rest, inplace=True, impl="triton")
    grad, = torch.autograd.grad(loss, y, retain_graph=True)
    assert torch.equal(grad, expected) and grad.data_ptr() == y.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, y)                    # the logits are gone
    assert torch.equal(torch.autograd.grad(tanh_like.sum(), x)[0], logits.exp())
    y = (x * 1).exp()                                   # an output that its operation saved
    grads = torch.autograd.grad(cross_entropy(y, *rest, inplace=True, impl="triton"), y, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grads[0])
    assert torch.equal(x.detach(), logits)


def test_checked_in_place(device):
    """The first call's comparison works on copies: the logits are overwritten by the backward pass only."""
    logits, *rest = op.example(5, 31, torch.float32, device)
    expected, x = op.outputs(op.kernel, (logits, *rest)), logits.clone().requires_grad_()
    loss = checked("cross_entropy", impl="triton")(x, *rest, inplace=True)
    assert torch.equal(loss, expected["mean"]) and torch.equal(x, logits)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected["dlogits"])


@pytest.mark.parametrize("inplace", [False, True])
def test_integration_same_training_losses(device, inplace):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(12, 32), torch.nn.Linear(32, 32), torch.nn.GELU(),
                                torch.nn.Linear(32, 11)).to(device)
    ids = torch.randint(12, (10, 16), device=device)
    losses = {}
    for name in ("ref", "triton"):
        net = copy.deepcopy(model)
        optimizer, losses[name] = torch.optim.AdamW(net.parameters(), lr=1e-2), []
        for x in ids:
            loss = cross_entropy(net(x), x % 11, 0, 1e-3, inplace=inplace, impl=name)
            optimizer.zero_grad()
            (loss / 3).backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["ref"], abs=1e-4)
    assert losses["ref"][-1] < 0.9 * losses["ref"][0]             # it did train


# ------------------------------------------------------------------ dispatch, errors
def test_dispatch_cpu_uses_ref(monkeypatch):
    def launched(*args):
        raise AssertionError("the kernel ran on a CPU tensor")
    monkeypatch.setattr(op._CrossEntropy, "apply", launched)
    args = op.example(3, 31, torch.float32, "cpu")
    assert torch.equal(cross_entropy(*args), cross_entropy_ref(*args))
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    with pytest.raises(RuntimeError, match="needs a CUDA tensor"):
        cross_entropy(*args, impl="triton")
    with pytest.raises(ValueError, match="impl must be"):
        cross_entropy(*args, impl="cuda")


@pytest.mark.parametrize("change, message", [
    ({0: torch.zeros(3)}, "must be .R, V."), ({0: torch.zeros(3, 0)}, "at least one column"),
    ({0: torch.zeros(3, 31, dtype=torch.int32)}, "floating point"), ({1: torch.zeros(3)}, "integers"),
    ({1: torch.zeros(4).long()}, "target must be"), ({3: -1.0}, "z_loss must be"), ({4: "max"}, "reduction must be"),
])
def test_errors(change, message):
    args = [*op.example(3, 31, torch.float32, "cpu"), "mean"]
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        cross_entropy(*args)


def test_fp64_logits_never_reach_the_kernel(device):
    args = op.example(3, 31, torch.float64, device)
    assert cross_entropy(*args).dtype == torch.float64
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        cross_entropy(*args, impl="triton")


# ------------------------------------------------------------------ large tensors
FAR_ROWS = """
import mmap, tempfile, torch
from kernels.cross_entropy import cross_entropy
file = tempfile.TemporaryFile()
file.truncate(2**32 + 128)                      # sparse: 4 GB of addresses, a few pages of memory
x = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float16).as_strided((3, 31), (2**30, 1))
x.copy_(torch.randn(3, 31))
grads, target = [], torch.tensor([1, 2, 3])
for leaf, options in ((x.contiguous(), {"impl": "ref"}), (x, {"impl": "triton", "inplace": True})):
    loss = cross_entropy(leaf.requires_grad_(), target, **options)
    grads += [loss.detach(), *torch.autograd.grad(loss, leaf)]
print(float((grads[0] - grads[2]).abs() + (grads[1] - grads[3]).abs().max()))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; a GPU has a test of its own")
def test_row_offsets_beyond_int32():
    """In a process of its own: a wrapped offset reads 4 GB in front of the tensor, which may crash it."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FAR_ROWS]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout) < 1e-3                   # fp16; False for NaN


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [50257, 151936])
def test_gpu_large_and_repeatable(dtype, V):
    args = op.example(300, V, dtype, "cuda")
    agree(args)
    agree(args, lambda x, *rest: cross_entropy(x * 1, *rest, inplace=True, impl="triton"))
    first = op.outputs(op.kernel, args)
    for _ in range(10):
        again = op.outputs(op.kernel, args)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [False, True])
def test_gpu_more_than_2_to_the_31_elements(inplace):
    R, V = 2 ** 16 + 1, 2 ** 15
    logits = torch.zeros(R, V, dtype=torch.bfloat16, device="cuda").requires_grad_()
    target = torch.full((R,), -100, device="cuda")
    target[-1] = 0
    loss = cross_entropy(logits, target, inplace=inplace, impl="triton")
    loss.backward()
    assert loss.item() == pytest.approx(10.39720771)              # 15 ln 2
    assert logits.grad[-1, 0].item() == pytest.approx(-1.0, abs=0.01) and not logits.grad[:-1].any()
