# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/token_logp.py against its reference in fp64 and a brute force.

A bug that must be caught here: `s * tl.exp(m - m_new)` -> `s` in the forward kernel (the sum not moved to the new
maximum).
"""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import checked
from kernels import token_logp as op
from kernels._common import assert_kernel
from kernels.token_logp import token_logp, token_logp_ref

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 1), (1, 5, 40), (17, 16, 16), (9, 64, 33), (33, 20, 100), (40, 70, 65)]  # T, D, V
PLANS = [(16, 16, 16, 1, 16), (16, 32, 64, 2, 32), (32, 16, 16, 99, 48), (64, 64, 32, 1, 128)]
LAYOUTS = ("transposed", "expanded rows", "expanded columns", "every other")
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture
def tiles(monkeypatch):
    """tiles(tokens, vocabulary, columns, part, chunk, group) sets a plan; else several tiles each way."""
    def use(t=16, v=32, d=32, part=2, chunk=64, group=32):
        def plan(T, D, V, itemsize, roomy):
            constants = dict(BLOCK_T=t, BLOCK_V=v, BLOCK_D=d, EVEN_D=D % d == 0, GROUP=group)
            return constants, {}, part, min(chunk, -(-V // v) * v)
        monkeypatch.setattr(op, "plan", plan)
    use()
    return use


def arguments(T, D, V, dtype=torch.float32, device="cpu"):
    """As example(), with every third row skipped where there are several."""
    h, w, targets = op.example(T, D, V, dtype, device)
    targets[1::3] = op.SKIP
    return h, w, targets


def agree(args):
    """Log-probabilities and gradients of the kernel by assert_kernel, and what must be exactly zero is."""
    h, w, targets = args
    out, eager = op.outputs(op.kernel, args), op.outputs(op.reference, args)
    ref64 = op.outputs(op.reference, (h.double(), w.double(), targets))
    assert out["logp"].dtype == torch.float32 and out["dh"].dtype == out["dw"].dtype == h.dtype
    for name in out:
        assert_kernel(name, out[name], ref64[name], eager[name], sum(w.shape) + len(h))
    skipped = targets == op.SKIP
    assert (out["logp"] <= 0).all() and not out["logp"][skipped].any() and not out["dh"][skipped].any()
    return out


def brute_force(h, w, targets):
    """The definition, number by number."""
    rows = []
    for row, y in zip(h.tolist(), targets.tolist()):
        x = [math.fsum(a * b for a, b in zip(row, column)) for column in w.tolist()]
        rows.append(0.0 if y == op.SKIP else x[y] - math.log(math.fsum(math.exp(v) for v in x)))
    return torch.tensor(rows, dtype=torch.float64)


# ------------------------------------------------------------------ the reference
def test_reference_equals_brute_force():
    args = arguments(7, 5, 9, torch.float64)
    torch.testing.assert_close(token_logp_ref(*args), brute_force(*args), rtol=1e-12, atol=1e-14)


def test_gradcheck_of_the_reference():
    h, w, targets = arguments(4, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: token_logp_ref(*a, targets), (h.requires_grad_(), w.requires_grad_()))


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_equals_cross_entropy(device, tiles, impl):
    """Value and gradients of the mean over the rows that count."""
    h, w, targets = arguments(20, 24, 70, device=device)
    leaves = [x.requires_grad_() for x in (h, w)]
    plain = F.cross_entropy(h @ w.T, targets, ignore_index=op.SKIP)
    fused = -token_logp(h, w, targets, impl=impl).sum() / (targets != op.SKIP).sum()
    for a, b in zip((plain, *torch.autograd.grad(plain, leaves)), (fused, *torch.autograd.grad(fused, leaves))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ kernel against reference
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, D, V", SHAPES)
def test_forward_and_backward(device, tiles, T, D, V, dtype):
    agree(arguments(T, D, V, dtype, device))


@pytest.mark.parametrize("T, D, V", [(3, 40, 300), (70, 48, 300), (5, 33, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_plan_itself(device, T, D, V, dtype):
    agree(arguments(T, D, V, dtype, device))


@pytest.mark.parametrize("plan", PLANS)
def test_each_tile_alone(device, tiles, plan):
    tiles(*plan)
    agree(arguments(40, 50, 150, device=device))


@pytest.mark.parametrize("group", [1, 2, 3])
def test_groups_of_token_blocks(device, tiles, group):
    """5 blocks of tokens: the last group is smaller than the others."""
    tiles(group=group)
    agree(op.example(80, 16, 100, torch.float32, device))


@pytest.mark.parametrize("T, D, V, roomy", [(1, 576, 49152, True), (64, 64, 31, True), (4096, 2048, 151936, True),
                                            (8192, 576, 49152, False), (10 ** 6, 2048, 50257, True), (5, 9, 7, False)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_plans(T, D, V, roomy, itemsize):
    """Enough programs, and the memory that the docstring promises."""
    constants, _, part, chunk = op.plan(T, D, V, itemsize, roomy)
    blocks_v, blocks_t = -(-V // constants["BLOCK_V"]), -(-T // constants["BLOCK_T"])
    parts = -(-blocks_v // part)
    assert min(2048, blocks_t * blocks_v) <= blocks_t * parts <= max(8192, blocks_t)
    assert 8 * parts * T <= max(9e6, 8 * T)
    assert chunk % constants["BLOCK_V"] == 0 and chunk <= max(4096, 2 ** 26 // T)
    assert D % constants["BLOCK_D"] == 0 or not constants["EVEN_D"]


@pytest.mark.parametrize("V", [32, 100])
def test_reads_nothing_outside(device, tiles, nan_padded, V):
    h, w, targets = arguments(20, 33, V, device=device)
    agree((nan_padded(h), nan_padded(w), targets))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device, tiles, layout):
    views = {"transposed": lambda x: x.T.contiguous().T, "expanded rows": lambda x: x[:1].expand_as(x),
             "expanded columns": lambda x: x[:, :1].expand_as(x),
             "every other": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]}
    h, w, targets = arguments(20, 40, 70, device=device)
    agree((views[layout](h), w, targets.repeat_interleave(2)[::2]))
    if layout != "expanded rows":                                 # equal rows of w: dh is exactly 0
        agree((h, views[layout](w), targets))


# ------------------------------------------------------------------ skipped rows, special values
@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_skipped_rows_are_never_looked_at(device, tiles, impl):
    h, w, targets = arguments(20, 24, 70, device=device)
    live = targets != op.SKIP
    expected = op.outputs(lambda *a: token_logp(*a, impl=impl), (h, w, targets))
    h[~live] = float("nan")
    out = op.outputs(lambda *a: token_logp(*a, impl=impl), (h, w, targets))
    assert all(torch.equal(out[name], expected[name]) for name in out)
    assert not out["dh"][~live].any() and out["dh"][live].isfinite().all()


def test_skipped_rows_cost_nothing(device, tiles, monkeypatch):
    launched, launch = [], op.launch
    monkeypatch.setattr(op, "launch", lambda kernel, n, *a, **b: launched.append(n) or launch(kernel, n, *a, **b))
    h, w, targets = op.example(64, 16, 64, torch.float32, device)
    token_logp(h, w, targets.clone().fill_(3), impl="triton")
    targets[:] = op.SKIP
    targets[50:60] = 5
    token_logp(h, w, targets, impl="triton")
    assert launched == [4, 1]                                     # blocks of 16 tokens


@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("T", [0, 5])
def test_nothing_to_do(device, impl, T):
    h, w, targets = op.example(T, 8, 30, torch.float32, device)
    out = op.outputs(lambda *a: token_logp(*a, impl=impl), (h, w, torch.full_like(targets, op.SKIP)))
    assert out["logp"].tolist() == T * [0.0] and not out["dh"].any() and not out["dw"].any()
    assert out["dh"].shape == h.shape and out["dw"].shape == w.shape


def test_extreme_values(device, tiles):
    """Rows 0 and 1: logits of 1e4; 2: all equal; 3 and 4: probability 1 and exp(-300) in fp32. Exact products."""
    h, w = torch.zeros(5, 16, device=device), torch.zeros(100, 16, device=device)
    w[:, 0], w[:, 1], w[70, 2] = torch.arange(100) / 64, 1.0, 1.0
    h[0, :2], h[1, :2] = torch.tensor([64.0, 1e4]), torch.tensor([64.0, -1e4])
    h[3, 2] = h[4, 2] = 300.0
    targets = torch.tensor([99, 0, 50, 70, 7], device=device)
    agree((h, w, targets))
    logp = token_logp(h, w, targets, impl="triton").tolist()
    tail = math.log(sum(math.exp(-i) for i in range(100)))
    assert logp == pytest.approx([-tail, -99 - tail, -math.log(100), 0.0, -300.0], rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("order", [1, -1])
def test_rising_and_falling_logits(device, tiles, order):
    """The maximum in the last and in the first tile of every part."""
    h, w, targets = op.example(5, 16, 200, torch.float32, device)
    w[:, 0], h[:, 0] = order * torch.linspace(-8, 8, 200), 3.0
    tiles(16, 16, 16, part=4)
    agree((h, w, targets))


def test_targets_at_the_edges_of_tiles_and_duplicates(device, tiles):
    h, w, targets = op.example(12, 16, 100, torch.float32, device)
    targets[:] = torch.tensor([0, 31, 32, 63, 64, 65, 95, 96, 99, 99, 99, 0])
    agree((h, w, targets))


def test_nan_stays_in_its_row(device, tiles):
    h, w, targets = op.example(20, 16, 70, torch.float32, device)
    targets[1] = 5
    good = token_logp(h, w, targets, impl="triton")
    h[3, 2], h[4, 0] = float("nan"), float("inf")
    logp = token_logp(h, w, targets, impl="triton")
    bad = torch.tensor([3, 4], device=device)
    assert logp[bad].isnan().all() and torch.equal(logp.index_fill(0, bad, 0), good.index_fill(0, bad, 0))


# ------------------------------------------------------------------ autograd
def test_two_backwards_and_untouched_inputs(device, tiles):
    h, w, targets = arguments(20, 24, 70, device=device)
    copies, leaves = (h.clone(), w.clone()), [x.requires_grad_() for x in (h, w)]
    logp = token_logp(h, w, targets, impl="triton")
    first = torch.autograd.grad(logp.sum(), leaves, retain_graph=True)     # an expanded upstream gradient
    second = torch.autograd.grad(2 * logp.sum(), leaves)
    torch.testing.assert_close(second, tuple(2 * grad for grad in first))
    assert torch.equal(h.detach(), copies[0]) and torch.equal(w.detach(), copies[1])


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_what_is_needed_is_computed(device, tiles, wanted):
    h, w, targets = arguments(20, 24, 70, device=device)
    both = torch.autograd.grad(token_logp(h.requires_grad_(), w.requires_grad_(), targets, impl="triton").sum(), (h, w))
    args = [h.detach(), w.detach()]
    args[wanted].requires_grad_()
    grad, = torch.autograd.grad(token_logp(*args, targets, impl="triton").sum(), args[wanted])
    assert torch.equal(grad, both[wanted])
    assert not token_logp(h.detach(), w.detach(), targets, impl="triton").requires_grad


def test_autocast_changes_nothing(device, tiles):
    args = arguments(20, 24, 70, device=device)
    plain = [op.outputs(lambda *a: token_logp(*a, impl=impl), args) for impl in ("ref", "triton")]
    with torch.autocast(device, torch.bfloat16):
        inside = [op.outputs(lambda *a: token_logp(*a, impl=impl), args) for impl in ("ref", "triton")]
    for impl, (a, b) in enumerate(zip(plain, inside)):            # the reference's products in its backward: bf16
        names = a if impl else ("logp",)
        assert all(torch.equal(a[name], b[name]) for name in names)


def test_integration_same_training_losses(device, tiles):
    """Preference training of a tied embedding by sequence log-probabilities: a step is the same on both paths."""
    gen, losses = torch.Generator().manual_seed(0), {}
    start, mix = torch.randn(40, 16, generator=gen) / 4, torch.randn(16, 16, generator=gen) / 4
    ids = torch.randint(40, (2, 2, 9), generator=gen).to(device)  # pairs, chosen and rejected
    targets = ids[..., 1:].masked_fill(torch.arange(8, device=device) < 3, op.SKIP).flatten()
    for impl in ("ref", "triton"):
        weights = [x.clone().to(device).requires_grad_() for x in (start, mix)]
        optimizer, losses[impl] = torch.optim.AdamW(weights, lr=1e-2), []
        for _ in range(6):
            h = (weights[0][ids[..., :-1]] @ weights[1]).tanh().flatten(0, 2)             # (32, 16)
            logp = token_logp(h, weights[0], targets, impl=impl).view(2, 2, 8).sum(-1)
            loss = -F.logsigmoid(logp[:, 0] - logp[:, 1]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[impl].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["ref"], abs=1e-4)
    assert losses["ref"][-1] < 0.95 * losses["ref"][0]            # it did train


# ------------------------------------------------------------------ dispatch, errors
def test_dispatch_cpu_uses_ref(monkeypatch):
    def launched(*args):
        raise AssertionError("the kernel ran on a CPU tensor")
    monkeypatch.setattr(op._TokenLogp, "apply", launched)
    args = arguments(5, 8, 30)
    assert torch.equal(token_logp(*args), token_logp_ref(*args))
    with pytest.raises(ValueError, match="impl must be"):
        token_logp(*args, impl="cuda")


@pytest.mark.parametrize("change, message", [
    ({0: torch.zeros(5)}, "h must be"), ({0: torch.zeros(5, 9)}, "h must be"), ({1: torch.zeros(0, 8)}, "one row"),
    ({1: torch.zeros(30, 8).half()}, "of one floating-point type"), ({2: torch.zeros(4).long()}, "targets must be .5,"),
    ({2: torch.zeros(5).int()}, "int64"), ({2: torch.full((5,), 30)}, "in .0, 30. or -100"),
    ({2: torch.full((5,), -1)}, "in .0, 30. or -100"), ({1: torch.zeros(30, 8, device="meta")}, "one device"),
])
def test_errors(change, message):
    args = list(arguments(5, 8, 30))
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        token_logp(*args)


def test_fp64_never_reaches_the_kernel(device):
    args = arguments(5, 8, 30, torch.float64, device)
    assert token_logp(*args).dtype == torch.float64
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        token_logp(*args, impl="triton")


@pytest.mark.parametrize("size", [1, 8])
def test_a_model_that_is_sure_of_its_tokens_passes_the_self_check(device, size):
    """Log-probabilities of 1e-4 and less, whose error is that of logits of 14: measured by their own size it fails."""
    w = torch.eye(24, device=device) * 14 ** 0.5
    targets = torch.arange(24, device=device) % size
    h = w[targets] + 0.01 * torch.randn(24, 24, generator=torch.Generator().manual_seed(0)).to(device)
    logp = checked("token_logp", impl="triton")(h, w, targets)
    assert -1e-4 < logp.min() < logp.max() <= 0
    with pytest.raises(AssertionError, match="allowed"):
        op.rule("logp", logp.exp(), logp.double(), logp, h.numel())


# ------------------------------------------------------------------ large tensors
FAR_ROWS = """
import mmap, tempfile, torch
from kernels import checked
from kernels import token_logp as op
file = tempfile.TemporaryFile()
file.truncate(2**32 + 2**12)                    # sparse: 4 GB of addresses, a few pages of memory
memory = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float16)
h, w, _ = op.example(3, 16, 3, torch.float16, "cpu")
targets = torch.tensor([1, 2, 0])
near = op.outputs(op.kernel, (h, w, targets))
for i in (0, 1):
    far = [h, w]
    far[i] = memory.as_strided((3, 16), (2**30, 1)).copy_(far[i])
    out = op.outputs(op.kernel, (*far, targets))
    print(torch.equal(near["logp"], out["logp"]) and all(torch.allclose(near[x], out[x], 1e-2, 1e-3) for x in near))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; a GPU has a test of its own")
def test_offsets_beyond_int32():
    """In a process of its own: a wrapped offset reads 4 GB in front of the tensor, which may crash it."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", FAR_ROWS], env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == 2 * ["True"]


@pytest.mark.gpu
@pytest.mark.parametrize("T, D, V, dtype", [(300, 576, 50257, torch.float32), (1000, 2048, 49152, torch.bfloat16),
                                            (40, 576, 49152, torch.float16), (1, 1600, 50257, torch.bfloat16),
                                            (200, 99, 5000, torch.bfloat16)])
def test_gpu_large_and_repeatable(T, D, V, dtype):
    args = op.example(T, D, V, dtype, "cuda")
    first = agree(args)
    for _ in range(10):
        again = op.outputs(op.kernel, args)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
def test_gpu_memory():
    """Forward and backward together stay far below one (T, V) matrix in 16 bits, gradients aside."""
    h, w, targets = op.example(16384, 256, 100000, torch.bfloat16, "cuda")
    leaves = [x.requires_grad_() for x in (h, w)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(token_logp(h, w, targets, impl="triton").sum(), leaves)
    assert torch.cuda.max_memory_allocated() - before < 0.12 * 2 * len(h) * len(w)        # 0.39 of 3.3 GB


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    """A vocabulary of 2**16 + 1 rows of 2**15, of which the last one is the likely token."""
    V, D = 2 ** 16 + 1, 2 ** 15
    w = torch.zeros(V, D, dtype=torch.bfloat16, device="cuda")
    w[-1, -1] = 1.0
    h = torch.zeros(2, D, dtype=torch.bfloat16, device="cuda")
    h[1, -1] = 16.0
    targets = torch.tensor([3, V - 1], device="cuda")
    logp = token_logp(h.requires_grad_(), w.requires_grad_(), targets, impl="triton")
    expected = [-math.log(V), -math.log1p((V - 1) * math.exp(-16))]
    assert logp.tolist() == pytest.approx(expected, rel=1e-5)
    logp.sum().backward()
    assert w.grad[-1, -1].item() == pytest.approx(16 * (1 - math.exp(expected[1])), rel=0.01)
