# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/hard_assign.py against its reference in fp64, brute force and the straight-through formulas.

Three bugs that must be caught here: `tl.sum(a * da, axis=1)` dropped from the dX kernel (not a softmax's gradient);
`- dots[None, :]` dropped there (c held constant); in _logits the noise of number `(b * N + n) * M + m`, transposed.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import hard_assign as op
from kernels._common import assert_kernel, launch, tl, triton
from kernels.hard_assign import gumbel, hard_assign, hard_assign_ref

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("transposed", "expanded batch", "expanded rows", "expanded columns", "part of a wider tensor", "every other")
TILES = [(16, 16, 16), (16, 64, 16), (32, 16, 32), (64, 32, 64), (128, 128, 16)]          # BLOCK_N, BLOCK_D, BLOCK_M
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def arguments(B=2, M=5, N=37, d=20, dtype=torch.float32, device="cpu"):
    return list(op.example(B, M, N, d, dtype, device))


def noise_like(args, seed=3):
    B, M, N = len(args[0]), args[0].shape[1], args[1].shape[1]
    return gumbel(seed, torch.arange(B * M * N).view(B, M, N)).to(args[0].device)


def agree(args):
    """All outputs and gradients of the kernel meet the error rule; index and count are equal."""
    out, eager = op.outputs(op.kernel, args), op.outputs(op.reference, args)
    ref64 = op.outputs(op.reference, [x.double() if torch.is_tensor(x) else x for x in args])
    assert {out[x].dtype for x in ("G", "dq", "dk", "dv")} == {args[0].dtype}
    assert [out[x].dtype for x in ("index", "count", "lse")] == [torch.int32, torch.float32, torch.float32]
    for name in out:
        assert_kernel(name, out[name], ref64[name], eager[name], sum(args[0].shape) + args[1].shape[1])
    return out


def brute_force(q, k, v, tau, eps, noise):
    """Outputs of one image by plain loops."""
    (M, d), N = q.shape, len(k)
    x = [[float(q[i] @ k[j]) / d ** 0.5 + float(noise[i, j]) for i in range(M)] for j in range(N)]
    index = [row.index(max(row)) for row in x]
    lse = [torch.tensor([value / tau for value in row]).exp().sum().log() for row in x]
    g, count = torch.zeros_like(q), torch.tensor([float(index.count(i)) for i in range(M)])
    for j, i in enumerate(index):
        g[i] += v[j] / (index.count(i) + eps)
    return g, torch.tensor(index, dtype=torch.int32), count, torch.stack(lse)


# ------------------------------------------------------------------ the reference
@pytest.mark.parametrize("tau, eps", [(1.0, 1.0), (0.3, 0.01)])
def test_reference_equals_brute_force(tau, eps):
    q, k, v, *_ = (x.double() if torch.is_tensor(x) else x for x in arguments(B=2, M=4, N=11, d=6))
    for noise in (torch.zeros(2, 4, 11), torch.randn(2, 4, 11)):
        out = hard_assign_ref(q, k, v, tau, eps, noise=noise)
        for b in range(2):
            for got, expected in zip(out, brute_force(q[b], k[b], v[b], tau, eps, noise[b])):
                torch.testing.assert_close(got[b].double(), expected.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eps", [1.0, 1e-2])
def test_reference_gradients_equal_the_straight_through_formulas(eps):
    q, k, v, tau, _, _ = (x.double() if torch.is_tensor(x) else x for x in arguments(M=6, N=9))
    q[:, 5] = -100 * k.mean(1)                                    # an empty group has a gradient, too
    q[:, 4] = q[:, 3]                                             # and so has one that lost all ties
    inputs, scale = [x.requires_grad_() for x in (q, k, v)], q.shape[-1] ** -0.5
    g, index, count, lse = hard_assign_ref(*inputs, tau, eps)
    dg = torch.randn(g.shape, dtype=torch.float64)
    dq, dk, dv = torch.autograd.grad(g, inputs, dg)
    assert not count[:, 4].any() and torch.isfinite(dq).all()
    with torch.no_grad():
        c, a = count[..., None] + eps, ((q @ k.mT * scale) / tau - lse[:, None]).exp()
        da = (dg @ v.mT - (dg * g).sum(2, keepdim=True)) / c                              # (B, M, N)
        dx = a * (da - (a * da).sum(1, keepdim=True)) / tau
        exact = dx @ k * scale, dx.mT @ q * scale, (dg / c).gather(1, index.long()[..., None].expand_as(v))
    for got, expected in zip((dq, dk, dv), exact):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_philox_known_answer():
    """The first word of Philox-4x32-10 at counter 0 and key 0, as its authors publish it."""
    u = torch.tensor([0x6627E8D5], dtype=torch.int64).float() * 4.6566127342e-10
    assert torch.equal(gumbel(0, torch.tensor([0])), -(-u.log()).log())


def test_noise_is_gumbel_and_indices_follow_the_softmax():
    g = gumbel(5, torch.arange(100_000))
    assert g.isfinite().all() and abs(g.mean() - 0.5772) < 0.02 and abs(g.var() - 1.6449) < 0.05
    for level in (-1.0, 0.0, 1.0, 3.0):                           # the distribution function
        assert abs((g <= level).double().mean() - torch.tensor(-level).exp().neg().exp()) < 0.006
    q, k = torch.tensor([[[0.0], [0.5], [1.0], [-1.0], [0.2]]]), torch.ones(1, 20_000, 1)
    _, _, count, _ = hard_assign_ref(q, k, k, 1.0, 1.0, seed=11)
    expected = 20_000 * q[0, :, 0].softmax(0)
    assert ((count[0] - expected) ** 2 / expected).sum() < 18.5   # chi square, 4 degrees: 0.1 %


@triton.jit
def _gumbel_probe(number_ptr, out_ptr, seed, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out_ptr + lane, op._gumbel(seed, tl.load(number_ptr + lane)))


@pytest.mark.parametrize("seed", [0, 1, 16, 2 ** 31 - 1, 2 ** 40 + 3])
def test_kernel_and_pytorch_make_the_same_noise(device, seed):
    number = torch.cat([torch.arange(500), 2 ** 32 + torch.arange(-6, 6)])
    out = torch.empty(512, device=device)
    launch(_gumbel_probe, 1, number.to(device), out, seed, N=512)
    torch.testing.assert_close(out.cpu(), gumbel(seed, number), rtol=1e-5, atol=1e-6)


def test_benchmark_baseline_is_the_same_operation():
    q, k, v, tau, eps, seed = arguments()
    k = k + 0.01 * torch.arange(37)[None, :, None]                # no ties
    usual = op.usual(1e6 * q, k, v, tau, eps, seed)               # beside which the noise is nothing
    expected = hard_assign_ref(1e6 * q, k, v, tau, eps)
    torch.testing.assert_close(usual, expected[::2])


# ------------------------------------------------------------------ kernel against reference
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", ["none", "seed", "tensor"])
@pytest.mark.parametrize("B, M, N, d", [(2, 5, 37, 20), (1, 33, 70, 70)])
def test_forward_and_backward(device, B, M, N, d, noise, dtype):
    *args, seed = arguments(B, M, N, d, dtype, device)
    agree(args + {"none": [], "seed": [seed], "tensor": [None, noise_like(args)]}[noise])


@pytest.mark.parametrize("B, M, N, d", [(1, 1, 1, 1), (3, 2, 1, 5), (1, 16, 64, 64), (1, 1, 65, 3), (1, 130, 20, 16),
                                        (1, 256, 10, 8), (1, 3, 16, 130)])
def test_edge_shapes(device, B, M, N, d):
    agree(arguments(B, M, N, d, device=device))


@pytest.mark.parametrize("block_n, block_d, block_m", TILES)
def test_each_tile_alone(device, monkeypatch, block_n, block_d, block_m):
    def plan(q):
        sizes = {"BLOCK_N": block_n, "BLOCK_D": block_d}
        return *3 * ({"MP": 32, **sizes},), {"BLOCK_M": block_m, **sizes}
    if device == "cuda" and block_n == 128:
        pytest.skip("too much shared memory: for the interpreter")
    monkeypatch.setattr(op, "_plan", plan)
    agree(arguments(2, 20, 50, 40, device=device))


def test_reads_nothing_outside(device, nan_padded):
    q, k, v, *rest = arguments(device=device)
    agree([nan_padded(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (q, k, v)] + rest)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device, layout):
    def view(x):
        return {"transposed": x.mT.contiguous().mT, "expanded batch": x[:1].expand_as(x),
                "expanded rows": x[:, :1].expand_as(x), "expanded columns": x[..., :1].expand_as(x),
                "part of a wider tensor": torch.cat([x, x], 2).repeat(1, 2, 1)[:, 1:x.shape[1] + 1, 7:27],
                "every other": x.repeat_interleave(2, 2).repeat_interleave(2, 1)[:, ::2, ::2]}[layout]
    q, k, v, *rest = arguments(device=device)
    equal = layout == "expanded rows"                            # groups that are all equal have no gradient
    agree([q if equal else view(q), view(k), view(v), *rest])


# ------------------------------------------------------------------ what must hold
@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_every_patch_has_one_group_and_ties_go_to_the_lowest(device, impl):
    q, k, v, *_ = arguments(B=1, M=9, N=70, device=device)
    g, index, count, lse = hard_assign(q, k, v, 1.0, 1.0, impl=impl)
    assert count.sum() == 70 and torch.equal(count[0], torch.bincount(index[0].long(), minlength=9).float())
    twins = torch.cat([q, q[:, :4]], 1)                           # groups 9 to 12 tie with 0 to 3
    assert torch.equal(hard_assign(twins, k, v, 1.0, 1.0, impl=impl)[1], index)
    _, index, count, lse = hard_assign(0 * q, k, v, 1.0, 1.0, impl=impl)
    assert not index.any() and count[0].tolist() == [70] + 8 * [0]
    torch.testing.assert_close(lse, torch.full_like(lse, 2.1972246))                      # ln 9


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_one_group_for_each_patch_gives_the_patches_back(device, impl):
    v = torch.randn(2, 18, 20, generator=torch.Generator().manual_seed(0)).to(device)
    own = 50 * torch.eye(18, 20, device=device).expand(2, 18, 20)
    g, index, count, _ = hard_assign(own, own, v, 1.0, 0.0, impl=impl)
    assert torch.equal(g, v) and (count == 1).all() and (index == torch.arange(18, device=device)).all()


def test_permuted_patches_and_groups(device):
    q, k, v, tau, eps, _ = arguments(B=1, N=33, device=device)
    k = k + 0.01 * torch.arange(33, device=device)[None, :, None]                         # no ties
    order, groups = torch.randperm(33).to(device), torch.tensor([3, 1, 0, 4, 2], device=device)
    g, index, *_ = hard_assign(q, k, v, tau, eps, impl="triton")
    other, moved, *_ = hard_assign(q[:, groups], k[:, order], v[:, order], tau, eps, impl="triton")
    torch.testing.assert_close(other, g[:, groups])
    assert torch.equal(groups[moved.long()].int(), index[:, order])


def test_seeds(device):
    args = arguments(device=device)[:5]
    first, again, other = (hard_assign(*args, seed=seed, impl="triton") for seed in (7, 7, 8))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[1], other[1])
    tensor = hard_assign(*args, noise=noise_like(args, 7), impl="triton")
    assert torch.equal(tensor[1], first[1])
    torch.testing.assert_close(tensor, first)


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_noise_of_minus_infinity_forbids_a_group(device, impl):
    *args, _ = arguments(device=device)
    noise = torch.zeros(2, 5, 37, device=device)
    noise[:, 2] = -float("inf")
    out = op.outputs(lambda *a: hard_assign(*a, noise=noise, impl=impl), args)
    assert not out["count"][:, 2].any() and not out["dq"][:, 2].any() and out["dk"].isfinite().all()


def test_empty_groups_and_eps(device):
    q, k, v, tau, _, seed = arguments(device=device)
    q[:, 3:] = -10 * k.mean(1, keepdim=True)
    for eps in (1.0, 1e-3):
        assert agree([q, k, v, tau, eps])["count"].eq(0).any()
    q[:, 3:] = q[:, 2:3]                                          # they lose every tie
    g, *_ = hard_assign(q, k, v, tau, 0.0, impl="triton")
    assert g[:, 3:].isnan().all() and g[:, :2].isfinite().all()


def test_extreme_values(device):
    q, k, v, tau, eps, _ = arguments(device=device)
    k[0, :9] *= 1e4                                               # saturated
    k[0, 9:12] = 0                                                # all groups equal
    v[1] += 100                                                   # far from zero mean
    agree([q, k, v, tau, eps])
    agree([q, k, v, 100.0, 30.0, 5])


def test_nan_stays_in_its_image_and_patch(device):
    args = arguments(device=device)
    good = hard_assign(*args, impl="triton")
    args[1][1, 4, 3] = float("nan")
    out = hard_assign(*args, impl="triton")
    assert all(torch.equal(a[0], b[0]) for a, b in zip(out, good))
    assert out[3].isnan().nonzero().tolist() == [[1, 4]] and ((out[1] >= 0) & (out[1] < 5)).all()


@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("B, N", [(0, 4), (2, 0)])
def test_nothing_to_do(device, impl, B, N):
    inputs = [x.requires_grad_() for x in arguments(B=B, N=N, device=device)[:3]]
    g, index, count, lse = hard_assign(*inputs, 1.0, 1.0, seed=1, impl=impl)
    g.sum().backward()
    assert not g.any() and index.shape == lse.shape == (B, N) and count.shape == (B, 5)
    assert all(x.grad.shape == x.shape for x in inputs)


# ------------------------------------------------------------------ autograd
def test_expanded_upstream_gradient_two_backwards_and_constants(device):
    args = arguments(device=device)
    before, inputs = args[1].clone(), [x.requires_grad_() for x in args[:3]]
    g, *others = hard_assign(*args, impl="triton")
    assert not any(x.requires_grad for x in others)
    first = torch.autograd.grad(g.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(3 * g.sum(), inputs)
    torch.testing.assert_close(second, tuple(3 * grad for grad in first))
    assert torch.equal(args[1].detach(), before)


def test_only_what_is_needed_is_computed(device, monkeypatch):
    args, launched, launch_ = arguments(device=device), [], op.launch
    everything = op.outputs(op.kernel, args)
    monkeypatch.setattr(op, "launch", lambda kernel, *a, **b: launched.append(kernel) or launch_(kernel, *a, **b))
    args[2].requires_grad_()
    g, *_ = hard_assign(*args, impl="triton")
    dg = torch.randint(-4, 5, g.shape, generator=torch.Generator().manual_seed(1)) / 4
    dv, = torch.autograd.grad(g, args[2], dg.to(g))
    assert torch.equal(dv, everything["dv"]) and op._hard_assign_bwd_dq_kernel not in launched


def test_autocast_changes_nothing(device):
    args = arguments(device=device)
    with torch.autocast(device, torch.bfloat16):
        inside = [hard_assign(*args, impl=impl) for impl in ("ref", "triton")]
    for found, impl in zip(inside, ("ref", "triton")):
        assert all(map(torch.equal, found, hard_assign(*args, impl=impl)))


def test_integration_same_training_losses(device):
    gen, losses = torch.Generator().manual_seed(0), {}
    patches, start = torch.randn(3, 24, 16, generator=gen).to(device), torch.randn(4, 16, 16, generator=gen) / 4
    for impl in ("ref", "triton"):
        slots, wq, wk, wv = weights = [w.clone().to(device).requires_grad_() for w in start]
        optimizer, losses[impl] = torch.optim.AdamW(weights, lr=1e-2), []
        for step in range(6):
            q, k, v = (slots[:6] @ wq).expand(3, 6, 16), patches @ wk, patches @ wv
            g, *_ = hard_assign(q, k, v, 1.0, 1.0, step, impl=impl)
            loss = (g.sum(1) - patches[:, :6].sum(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[impl].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["ref"], rel=1e-4)
    assert losses["ref"][-1] < 0.95 * losses["ref"][0]            # it did train


# ------------------------------------------------------------------ the rule, dispatch, errors
def test_rule_allows_one_image_of_eight():
    good, bad = torch.randn(8, 4, 5), torch.randn(8, 4, 5)
    one = torch.cat([bad[:1], good[1:]])
    op.rule("one of eight", one, good.double(), good, 1)
    for out, ref in ((torch.cat([bad[:2], good[2:]]), good), (one[:7], good[:7]), (good[:7], good)):
        with pytest.raises(AssertionError):
            op.rule("too many", out, ref.double(), ref, 1)


def test_dispatch_cpu_uses_ref(monkeypatch):
    def launched(*args):
        raise AssertionError("the kernel ran on a CPU tensor")
    monkeypatch.setattr(op._HardAssign, "apply", launched)
    args = arguments()
    assert all(map(torch.equal, hard_assign(*args), hard_assign_ref(*args)))
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    with pytest.raises(RuntimeError, match="needs a CUDA tensor"):
        hard_assign(*args, impl="triton")
    with pytest.raises(ValueError, match="impl must be"):
        hard_assign(*args, impl="cuda")


@pytest.mark.parametrize("change, message", [
    ({0: torch.zeros(5, 20)}, "q must be"), ({0: torch.zeros(2, 0, 20)}, "q must be"),
    ({1: torch.zeros(2, 37, 19)}, "k must be"), ({1: torch.zeros(3, 37, 20)}, "k must be"),
    ({2: torch.zeros(2, 36, 20)}, "v must have"), ({2: torch.zeros(2, 37, 20).half()}, "one float dtype"),
    ({0: torch.zeros(2, 5, 20).long()}, "one float dtype"), ({3: 0.0}, "tau must be"), ({4: -1.0}, "eps not negative"),
    ({5: -1}, "seed must be"), ({6: torch.zeros(2, 5, 37)}, "not both"),
    ({5: None, 6: torch.zeros(2, 37, 5)}, "noise must be"), ({2: torch.zeros(2, 37, 20, device="meta")}, "one device"),
])
def test_errors(change, message):
    args = [*arguments(), None]
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        hard_assign(*args)


def test_what_the_kernel_does_not_take(device):
    args = arguments(M=257, N=3, d=2, device=device)
    assert all(map(torch.equal, hard_assign(*args), hard_assign_ref(*args)))
    with pytest.raises(ValueError, match="M = 257 is too large"):
        hard_assign(*args, impl="triton")
    args = arguments(dtype=torch.float64, device=device)
    assert hard_assign(*args)[0].dtype == torch.float64
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        hard_assign(*args, impl="triton")


# ------------------------------------------------------------------ large tensors
FAR_ROWS = """
import mmap, tempfile, torch
from kernels import hard_assign as op
file = tempfile.TemporaryFile()
file.truncate(2**32 + 2**12)                    # sparse: 4 GB of addresses, a few pages of memory
memory = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float16)
for shape in ((3, 1, 1, 5), (1, 3, 3, 5)):                                     # images, then groups and patches
    args = op.example(*shape, torch.float16, "cpu")
    near = op.outputs(op.kernel, args)
    for which in range(3):
        moved = memory.as_strided(args[which].shape, (2**30, 2**30, 1)).copy_(args[which])
        far = op.outputs(op.kernel, (*args[:which], moved, *args[which + 1:]))
        print(all(torch.equal(near[name], far[name]) for name in near))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; a GPU has a test of its own")
def test_offsets_beyond_int32():
    """In a process of its own: a wrapped offset reads 4 GB in front of the tensor, which may crash it."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", FAR_ROWS], env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == 6 * ["True"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, M, N, d", [(4, 64, 576, 1024), (2, 200, 577, 1000)])
def test_gpu_large_and_repeatable(dtype, B, M, N, d):
    args = arguments(B, M, N, d, dtype, "cuda")
    first = agree(args)
    for _ in range(10):
        again = op.outputs(op.kernel, args)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    q, k, v, *rest = arguments(1, 4, 3, 1024, torch.bfloat16, "cuda")
    wide = torch.zeros(1, 2 ** 21 + 3, 1024, dtype=torch.bfloat16, device="cuda")
    wide[:, -3:] = k
    _, index, count, _ = hard_assign(q, wide, wide, 1.0, 1.0, impl="triton")
    last = hard_assign(q, k, v, 1.0, 1.0, impl="triton")[1]
    assert torch.equal(index[:, -3:], last) and not index[:, :-3].any() and count.sum() == 2 ** 21 + 3
