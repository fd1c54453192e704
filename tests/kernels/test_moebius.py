# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/moebius.py against its reference, bit for bit, and the reference against sums over subsets.

A bug that must be caught here: `pid % side * C` dropped (each second launch takes the first columns only).
"""
import pytest
import torch

from kernels import moebius as op
from kernels.moebius import moebius, moebius_ref

FLOATS = (torch.float32, torch.float64)
MAPS = [(inverse, transpose) for inverse in (False, True) for transpose in (False, True)]
LAYOUTS = ("transposed", "expanded rows", "expanded columns", "offset", "every other", "one dimension", "three")
# launches of n = 6: one; low and high bits, 2, 4 and 32 columns beside each other; three
PLANS = [[(6, 0, 64, 1, 1)], [(6, 0, 256, 1, 4)], [(3, 0, 32, 1, 1), (3, 1, 16, 8, 1)],
         [(4, 0, 32, 1, 1), (2, 2, 16, 16, 1)], [(5, 0, 64, 1, 1), (1, 5, 64, 32, 2)],
         [(2, 0, 16, 1, 1), (2, 1, 8, 4, 1), (2, 2, 16, 16, 1)]]
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def agree(v, maps=None):
    """Kernel and reference are equal bit for bit in all maps and the gradient; fp32 meets the error rule."""
    if maps is None:
        out, eager, ref64 = (op.outputs(fn, (x,)) for fn, x in (
            (op.kernel, v), (op.reference, v), (op.reference, v.double())))
    else:
        out, eager, ref64 = ({m: fn(x, *m) for m in maps} for fn, x in (
            (op.kernel, v), (op.reference, v), (op.reference, v.double())))
    for name in out:
        op.rule(name, out[name], ref64[name], eager[name], v.shape[-1])


def games(R, n, dtype, device):
    return op.example(R, n, dtype, device)[0] + 2


def subset_sum(v, inverse, transpose):
    """The sums of the docstring, one subset after the other, for a list of 2^n integers."""
    def term(S, L):
        return v[L] if inverse else (-1) ** (S.bit_count() + L.bit_count()) * v[L]
    every = range(len(v))
    return [sum(term(S, L) for L in every if (S & L) == (S if transpose else L)) for S in every]


def integers(R, n):
    return torch.randint(-9, 10, (R, 2 ** n), generator=torch.Generator().manual_seed(n))


# ------------------------------------------------------------------ the reference
@pytest.mark.parametrize("inverse, transpose", MAPS)
@pytest.mark.parametrize("n", [0, 1, 2, 5, 8])
def test_reference_equals_sums_over_subsets(n, inverse, transpose):
    v = integers(2, n)
    assert moebius(v, inverse, transpose).tolist() == [subset_sum(row, inverse, transpose) for row in v.tolist()]


@pytest.mark.parametrize("transpose", [False, True])
def test_reference_inverse_and_adjoint(transpose):
    v, w = integers(3, 10), integers(3, 10).flip(0)
    assert torch.equal(moebius(moebius(v, transpose=transpose), inverse=True, transpose=transpose), v)
    for inverse in (False, True):
        left, right = (moebius(v, inverse) * w).sum(), (v * moebius(w, inverse, transpose=True)).sum()
        assert left == right


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_known_games(device, impl):
    """An AND of T has one dividend; a constant one of the empty set; a sum of players those of order 1."""
    subsets, T = torch.arange(64, device=device), 0b101100
    game = torch.stack([subsets & T == T, subsets >= 0, (subsets & 1) + (subsets >> 3 & 1)]).double()
    expected = torch.zeros(3, 64, dtype=torch.float64, device=device)
    expected[0, T] = expected[1, 0] = expected[2, 1] = expected[2, 8] = 1
    assert torch.equal(moebius(game, impl=impl), expected)
    assert torch.equal(moebius(expected, inverse=True, impl=impl), game)


def test_reference_gradients():
    v = op.example(2, 4, torch.float64, "cpu")[0].requires_grad_()
    for inverse, transpose in MAPS:
        assert torch.autograd.gradcheck(lambda v: moebius_ref(v, inverse, transpose), v)


@pytest.mark.parametrize("n", [0, 5, 10])
def test_all_providers_of_the_benchmark_agree(monkeypatch, device, n):
    monkeypatch.setattr(torch, "compile", lambda fn: fn)
    v = games(3, n, torch.float64, device)
    fns = op.bench((v,))["forward"]
    assert len(fns) == (5 if n == 10 else 4)
    for fn in fns.values():
        torch.testing.assert_close(fn(), moebius_ref(v), rtol=1e-12, atol=1e-10)


# ------------------------------------------------------------------ kernel against reference
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("R, n", [(1, 0), (1030, 0), (513, 1), (1, 2), (200, 3), (3, 9), (2, 10), (3, 11), (2, 13)])
def test_forward_and_backward(device, R, n, dtype):
    agree(games(R, n, dtype, device))


@pytest.mark.parametrize("dtype, n, maps", [(torch.float32, 14, MAPS[1:3]), (torch.float64, 14, MAPS[:2]),
                                            (torch.float32, 15, MAPS[3:]), (torch.float64, 16, MAPS[1:2])])
def test_large_n(device, dtype, n, maps):
    agree(games(1, n, dtype, device), maps)


@pytest.mark.parametrize("plan", PLANS)
def test_each_plan_alone(device, monkeypatch, plan):
    monkeypatch.setattr(op, "plan", lambda n, itemsize: plan)
    agree(games(3, 6, torch.float64, device), MAPS)
    agree(games(1, 6, torch.float32, device), MAPS[2:3])


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("n", range(op.MAX_N + 1))
def test_plans_cover_every_bit_once_in_tiles_that_fit(n, itemsize):
    done = 0
    for bits, low, tile, inner, warps in op.plan(n, itemsize):
        assert inner == (1 << done if low else 1) and 1 << low <= inner and tile >= 1 << bits + low
        assert tile * itemsize <= 65536 and warps * 1024 == tile and warps <= 16
        done += bits
    assert done == n


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device, layout):
    v = games(16, 4, torch.float64, device)
    agree({"transposed": v.T, "expanded rows": v[:1].expand(5, 16), "expanded columns": v[:, :1].expand(16, 8),
           "offset": v.flatten()[7:].unfold(0, 16, 16), "every other": v[::2, ::2], "one dimension": v[3],
           "three": v.view(2, 8, 16)}[layout])


# ------------------------------------------------------------------ special rows
@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_values(device, dtype):
    v = games(6, 5, dtype, device)
    v[0] += 1e4
    v[1] *= 1e30
    v[2] *= 1e-30
    v[3] = 7.0                                                    # all equal: one dividend
    v[4] = 0.0
    v[5, 9] = 1e20
    agree(v)
    out = moebius(v, impl="triton")
    assert out[3, 0] == 7 and not out[3, 1:].any() and not out[4].any()


def test_nan_reaches_the_supersets_only(device):
    v = games(2, 5, torch.float32, device)
    v[1, 0b00110] = float("nan")
    supersets = torch.arange(32, device=device) & 0b00110 == 0b00110
    for impl in ("ref", "triton"):
        out = moebius(v, impl=impl)
        assert torch.equal(out[1].isnan(), supersets) and out[0].isfinite().all()


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_no_rows_and_no_players(device, impl):
    assert moebius(torch.zeros(0, 8, device=device), impl=impl).shape == (0, 8)
    v = games(3, 0, torch.float64, device)
    for inverse, transpose in MAPS:
        out = moebius(v, inverse, transpose, impl=impl)
        assert torch.equal(out, v) and out.data_ptr() != v.data_ptr()


def test_the_argument_is_not_changed(device, monkeypatch):
    for plan in (PLANS[0], PLANS[2]):
        monkeypatch.setattr(op, "plan", lambda n, itemsize: plan)
        v = games(2, 6, torch.float64, device)
        before = v.clone()
        for inverse, transpose in MAPS:
            moebius(v, inverse, transpose, impl="triton")
        assert torch.equal(v, before)


# ------------------------------------------------------------------ autograd
@pytest.mark.parametrize("inverse, transpose", MAPS)
def test_gradient_is_the_transposed_map_any_number_of_times(device, inverse, transpose):
    v = games(3, 2, torch.float64, device).requires_grad_()
    fn = (lambda v: moebius(v, inverse, transpose, impl="triton"))
    dv, = torch.autograd.grad(fn(v).sum(), v)                     # the upstream gradient is expanded
    assert torch.equal(dv, moebius_ref(torch.ones_like(v), inverse, not transpose).detach())
    assert torch.autograd.gradcheck(fn, v[:1].detach().requires_grad_())
    assert torch.autograd.gradgradcheck(fn, v[:1].detach().requires_grad_())


def test_integration_same_losses_of_an_l1_fit(device):
    """Gradient descent on |I(v + p)|_1 over p, the sparsification of the paper's school."""
    v, losses = games(4, 6, torch.float64, device), {}
    for impl in ("ref", "triton"):
        p = torch.zeros_like(v).requires_grad_()
        optimizer, losses[impl] = torch.optim.SGD([p], lr=2e-3, momentum=0.9), []
        for _ in range(10):
            loss = moebius(v + p, impl=impl).abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[impl].append(loss.item())
    assert losses["ref"] == losses["triton"] and losses["ref"][-1] < 0.9 * losses["ref"][0]


# ------------------------------------------------------------------ dispatch, errors
def test_dispatch_cpu_and_integers_use_ref(monkeypatch, device):
    def launched(*args):
        raise AssertionError("the kernel ran")
    monkeypatch.setattr(op._Moebius, "apply", launched)
    v = games(3, 5, torch.float32, "cpu")
    assert torch.equal(moebius(v), moebius_ref(v))
    assert moebius(integers(2, 3).to(device)).dtype == torch.int64
    assert moebius(torch.zeros(1, 2 ** 17, device=device)).shape == (1, 2 ** 17)
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    with pytest.raises(RuntimeError, match="needs a CUDA tensor"):
        moebius(v, impl="triton")
    with pytest.raises(ValueError, match="impl must be"):
        moebius(v, impl="cuda")


@pytest.mark.parametrize("v, impl, message", [
    (torch.tensor(1.0), "auto", "got a scalar"), (torch.zeros(2, 12), "auto", r"must be \(..., 2\^n\)"),
    (torch.zeros(3, 0), "auto", r"must be \(..., 2\^n\)"), (torch.zeros(2, 8).half(), "auto", "fp32, fp64"),
    (torch.zeros(2, 8, dtype=torch.int64), "triton", "float32 or float64"),
    (torch.zeros(1, 2 ** 17), "triton", "at most 2.16 columns"),
])
def test_errors(v, impl, message, device):
    with pytest.raises(ValueError, match=message):
        moebius(v.to(device), impl=impl)


# ------------------------------------------------------------------ on a GPU only
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("R, n", [(3600, 10), (1000, 12), (200, 13), (100, 14), (64, 16)])
def test_gpu_large_and_repeatable(R, n, dtype):
    v = games(R, n, dtype, "cuda")
    agree(v)
    first = moebius(v, impl="triton")
    for _ in range(10):
        assert torch.equal(moebius(v, impl="triton"), first)


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    v = torch.zeros(2 ** 21 + 1, 2 ** 10, device="cuda")
    v[-1, 5] = 1.0
    out = moebius(v, inverse=True, impl="triton")
    assert out[-1].sum() == 2 ** 8 and not out[:-1].any()
