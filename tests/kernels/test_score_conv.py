# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/score_conv.py against its reference in fp64 and brute force.

Three bugs that must be caught here: `(col <= i[:, None])` dropped from _neighbours (no tril); `cols - (tap - K // 2)`
-> `cols + (tap - K // 2)` in the dS kernel; `i + K // 2` -> `i` in _hidden (no extension columns).
"""
import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import convattn
import kernels
from kernels import score_conv as op
from kernels.score_conv import score_conv, score_conv_ref

ROOT = Path(__file__).resolve().parents[2]
INF = float("inf")
LAYOUTS = ("heads last", "expanded batch", "expanded rows", "expanded columns", "every other", "transposed")
CASES = [(3, 1, True, 0.01), (3, 3, False, 1.0), (4, 5, True, 0.01), (4, 3, True, 1.0), (12, 3, True, 0.01),
         (12, 5, False, 0.01), (4, 1, False, 1.0), (12, 1, True, 0.01), (3, 5, True, 1.0)]  # H, k, bias, slope
TILES = [(1, 16, 128), (2, 16, 1), (4, 32, 3), (1, 64, 5), (16, 16, 16)]                  # rows, columns, part
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture
def tiles(monkeypatch):
    """tiles(rows, columns, part) sets a size; else on a CPU one large tile: each program costs the interpreter time."""
    def use(rows=16, columns=32, part=16):
        def plan(*args):
            constants, _, options = own(*args)
            return {**constants, "BLOCK_M": rows, "BLOCK_N": columns}, part, options
        monkeypatch.setattr(op, "plan", plan)
    own = op.plan
    if op.INTERPRET:
        use()
    return use


def arguments(H, k, bias=True, M=11, N=23, row0=9, W=5, B=2, dtype=torch.float32, device="cpu"):
    """As example(), with columns after the last row's diagonal unless row0 = N - M."""
    *args, _ = op.example(B, H, M, N, W, k, dtype, device, bias)
    return [*args, row0]


def agree(args, slope=0.01):
    """A and all gradients of the kernel by the rule of the file."""
    def run(impl):
        return lambda *a: score_conv(*a, slope=slope, impl=impl)
    out, eager = op.outputs(run("triton"), args), op.outputs(run("ref"), args)
    ref64 = op.outputs(run("ref"), [x.double() if torch.is_tensor(x) else x for x in args])
    assert {x.dtype for x in out.values()} == {args[0].dtype}
    for name in out:
        op.rule(name, out[name], ref64[name], eager[name], args[0].numel() if name == "dw1" else 200)
    return out


def brute_force(s, r, w1, b1, w2, b2, row0, slope):
    """A of one batch element by the formulas of the docstring, number by number."""
    (H, M, N), (W, k) = s.shape, w2.shape[1:]
    p, a = k // 2, torch.full_like(s, -INF)
    for m in range(M):
        i = row0 + m
        x = [[float(s[h, m, j]) for j in range(i + 1)] for h in range(H)]
        x += [] if r is None else [[float(r[h, i - j]) for j in range(i + 1)] for h in range(H)]
        g = {}
        for w in range(W):
            for j in range(i + p + 1):
                hid = float(b1[w]) + sum(float(w1[w, c, e + p]) * x[c][j + e] for c in range(len(x))
                                         for e in range(-p, p + 1) if 0 <= j + e <= i)
                g[w, j] = hid if hid > 0 else slope * hid
        for h in range(H):
            for j in range(i + 1):
                f = sum(float(w2[h, w, e + p]) * g.get((w, j + e), 0.0) for w in range(W) for e in range(-p, p + 1))
                a[h, m, j] = x[h][j] + float(b2[h]) + f + (0.0 if r is None else x[H + h][j])
    return a


# ------------------------------------------------------------------ the reference
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_reference_equals_brute_force(k, bias):
    args = [x.double() if torch.is_tensor(x) else x for x in arguments(2, k, bias, M=4, N=8, row0=2, W=3)]
    for slope in (0.01, 1.0):
        a = score_conv_ref(*args, slope)
        for b in range(2):
            torch.testing.assert_close(a[b], brute_force(args[0][b], *args[1:], slope), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_reference_equals_the_padded_convolutions_but_for_the_last_rows(k):
    """Those end at the tensor's last column: there the last k // 2 rows lack their extension columns."""
    s, r, w1, b1, w2, b2, _ = (x.double() if torch.is_tensor(x) else x for x in arguments(4, k, M=12, N=12, row0=0))
    t, p = torch.arange(12)[:, None] - torch.arange(12), k // 2
    x = torch.cat([s, r[:, t.abs()].expand_as(s)], 1).tril()
    g = F.leaky_relu(F.conv2d(x, w1[:, :, None], b1, padding=(0, p)), 0.01)
    a = x[:, :4] + x[:, 4:] + F.conv2d(g, w2[:, :, None], b2, padding=(0, p))
    error = (score_conv_ref(s, r, w1, b1, w2, b2) - a).masked_fill(t < 0, 0).abs().amax((0, 1, 3))
    assert error[:12 - p].max() < 1e-12 and (error[12 - p:] > 1e-3).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_gradcheck_of_the_reference(k, bias):
    *args, row0 = arguments(2, k, bias, M=3, N=5, row0=1, W=2, B=1)
    args = [x.double().requires_grad_() if torch.is_tensor(x) else x for x in args]

    def legal(*a):
        out = score_conv_ref(*a, row0)
        return out.masked_fill(out == -INF, 0)
    assert torch.autograd.gradcheck(legal, args)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_tables_equal_the_convolution_of_the_bias(k):
    """Also in the columns that the left edge cuts, where the table of the other columns alone is wrong."""
    H, T, W, p = 3, 9, 5, k // 2
    _, r, w1, b1, _, b2, _ = (x.double() if torch.is_tensor(x) else x for x in arguments(H, k, M=T, N=T, row0=0, W=W))
    table, bias = op.tables(r, w1, b1, b2, T, k)
    assert table.shape == (p + 1, T + p, 16) and not table[..., W:].any() and not bias[:, H:].any()
    torch.testing.assert_close(bias[:, :H], r[:, :T].T + b2)
    t = torch.arange(T)[:, None] - torch.arange(T + p)                                    # (T, T + p)
    x = F.pad(r[:, t.clamp(min=0)] * (t >= 0), (p, p))
    exact = F.conv2d(x[None], w1[:, H:, None], b1)[0]                                     # (W, T, T + p)
    exists, columns = t >= -p, torch.arange(T + p).expand(T, -1)
    found = table[columns.clamp(max=p), (t + p).clamp(min=0)].permute(2, 0, 1)[:W]
    torch.testing.assert_close(found[:, exists], exact[:, exists], rtol=0, atol=1e-12)
    wrong = (table[p, (t + p).clamp(min=0)].permute(2, 0, 1)[:W] - exact)[:, :, :p]
    assert p == 0 or wrong.abs().amax() > 0.1


def test_permuted_heads_give_permuted_scores():
    s, r, w1, b1, w2, b2, row0 = arguments(4, 3)
    order = torch.tensor([2, 0, 3, 1])
    a = score_conv_ref(s[:, order], r[order], w1[:, torch.cat([order, order + 4])], b1, w2[order], b2[order], row0)
    torch.testing.assert_close(a, score_conv_ref(s, r, w1, b1, w2, b2, row0)[:, order])


# ------------------------------------------------------------------ kernel against reference
@pytest.mark.parametrize("H, k, bias, slope", CASES)
def test_forward_and_backward(device, tiles, H, k, bias, slope):
    tiles(8, 16, 8)                                               # several in each direction
    agree(arguments(H, k, bias, device=device), slope)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("H, k, bias", [(12, 3, True), (4, 5, False)])
def test_16_bit_scores(device, tiles, H, k, bias, dtype):
    agree(arguments(H, k, bias, N=20, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_tiles_of_the_plan(device, dtype):
    agree(op.example(1, 12, 5, 70, 32, 3, dtype, device))


@pytest.mark.parametrize("shape", TILES)
def test_each_tile_alone(device, tiles, shape):
    tiles(*shape)
    agree(arguments(3, 3, M=7, N=19, device=device))


@pytest.mark.parametrize("k", [1, 3])
def test_sizes_that_need_no_padding(device, tiles, k):
    agree(arguments(16, k, W=16, B=1, device=device))


@pytest.mark.parametrize("M, N, row0, k", [(1, 1, 0, 5), (2, 2, 0, 3), (1, 9, 8, 3), (3, 40, 0, 5), (17, 17, 0, 3)])
def test_edge_shapes(device, tiles, M, N, row0, k):
    tiles(8, 16, 8)
    agree(arguments(3, k, M=M, N=N, row0=row0, B=1, device=device))


def test_bias_longer_than_the_rows(device, tiles):
    s, r, *rest = arguments(3, 3, N=20, device=device)
    out = agree([s, F.pad(r, (0, 9), value=7.0), *rest])
    assert not out["dr"][:, 20:].any()


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_no_row_depends_on_the_rows_and_columns_after_it(device, tiles, impl):
    """The last rows too: all rows at once equal a shorter input, and each row alone (decoding)."""
    s, r, *weights, _ = arguments(3, 5, M=14, N=14, B=1, device=device)
    full = score_conv(s, r, *weights, impl=impl)
    for n in (9, 13):
        part = score_conv(s[:, :, :n, :n], r[:, :n], *weights, impl=impl)
        torch.testing.assert_close(part, full[:, :, :n, :n], rtol=1e-5, atol=1e-5)
    for i in (0, 1, 7, 13):
        row = score_conv(s[:, :, i:i + 1, :i + 1], r, *weights, row0=i, impl=impl)
        torch.testing.assert_close(row, full[:, :, i:i + 1, :i + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_the_future_is_never_looked_at(device, tiles, impl):
    """Scores and upstream gradients with j > i: NaN there changes no bit."""
    *args, row0 = arguments(3, 3, device=device)
    inputs = [x.requires_grad_() for x in args]
    future = torch.arange(23, device=device) > torch.arange(row0, row0 + 11, device=device)[:, None]
    da = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0)).to(device)
    results = []
    for value in (0.0, float("nan")):
        inputs[0] = args[0].detach().masked_fill(future, value).requires_grad_()
        a = score_conv(*inputs, row0, impl=impl)
        grads = torch.autograd.grad(a, inputs, da.masked_fill(future, value))
        assert (a[..., future] == -INF).all() and not grads[0][..., future].any()
        results.append([a, *grads])
    assert all(map(torch.equal, *results)) and all(x.isfinite().all() for x in results[1][1:])


def test_reads_nothing_outside(device, tiles, nan_padded):
    s, *rest = arguments(3, 3, N=20, device=device)
    agree([nan_padded(s.flatten(0, 2)).unflatten(0, s.shape[:3]), *rest])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device, tiles, layout):
    s, r, w1, b1, w2, b2, row0 = arguments(3, 3, M=11, N=20, W=5, device=device)
    views = {"heads last": s.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3), "expanded batch": s[:1].expand_as(s),
             "expanded rows": s[:, :, :1].expand_as(s), "expanded columns": s[..., :1].expand_as(s),
             "every other": s.repeat_interleave(2, 3).repeat_interleave(2, 1)[:, ::2, :, ::2],
             "transposed": s.mT.contiguous().mT}
    agree([views[layout], r.T.contiguous().T, w1.mT.contiguous().mT, b1[:1].expand(5), w2.flip(0), b2[::1], row0])
    agree([views[layout][:, :, :2], r[:1].expand_as(r), w1[:1].expand_as(w1), b1, w2[..., :1].expand_as(w2), b2, 3])


# ------------------------------------------------------------------ special values
def test_zero_second_layer_gives_the_plain_scores(device, tiles):
    s, r, w1, b1, w2, b2, row0 = arguments(3, 3, N=20, device=device)
    a = score_conv(s, r, w1, b1, 0 * w2, 0 * b2, row0, impl="triton")
    t = torch.arange(row0, 20, device=device)[:, None] - torch.arange(20, device=device)
    assert torch.equal(a, (s + r[:, t.clamp(min=0)]).masked_fill(t < 0, -INF))


def test_extreme_values(device, tiles):
    s, r, *rest = arguments(3, 3, N=20, device=device)
    s[0, :, 1], s[0, :, 2], s[0, :, 3], s[1] = 1e4 * s[0, :, 1], 7.0, 0.0, s[1] + 30
    agree([s, -100 * torch.arange(23.0, device=device)[:20].expand(3, 20), *rest])


def test_nan_stays_in_its_row(device, tiles):
    s, *rest = arguments(3, 3, N=20, device=device)
    good = score_conv(s, *rest, impl="triton")
    s[1, 2, 4, 5] = float("nan")
    a = score_conv(s, *rest, impl="triton")
    assert torch.equal(a[0], good[0]) and torch.equal(a[1, :, [0, 3, 5, 10]], good[1, :, [0, 3, 5, 10]])
    assert a[1, :, 4].isnan().any(0).tolist() == [3 <= j <= 7 for j in range(20)]


@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("B, M", [(0, 3), (2, 0)])
def test_nothing_to_do(device, impl, B, M):
    s, *rest = arguments(3, 3, B=B, M=M, device=device)
    a = score_conv(s.requires_grad_(), *rest, impl=impl)
    a.sum().backward()
    assert a.shape == s.shape == s.grad.shape


# ------------------------------------------------------------------ autograd
def test_expanded_upstream_gradient_two_backwards_and_b2(device, tiles):
    *args, row0 = arguments(3, 3, device=device)
    before, inputs = args[0].clone(), [x.requires_grad_() for x in args]
    a = score_conv(*inputs, row0, impl="triton")
    first = torch.autograd.grad(a.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(3 * a.sum(), inputs)
    torch.testing.assert_close(second, tuple(3 * grad for grad in first))
    assert torch.equal(args[0].detach(), before)
    torch.testing.assert_close(first[-1], torch.full((3,), 2.0 * sum(row0 + m + 1 for m in range(11)), device=device))


@pytest.mark.parametrize("wanted", [[0], [2], [1, 5]])
def test_only_what_is_needed_is_computed(device, tiles, monkeypatch, wanted):
    *args, row0 = arguments(3, 3, M=5, N=14, B=1, device=device)
    a = score_conv(*(x.requires_grad_() for x in args), row0, impl="triton")
    everything = torch.autograd.grad(a.sum(), args)
    args, launched, launch = [x.detach() for x in args], [], op.launch
    inputs = [args[n].requires_grad_() for n in wanted]
    monkeypatch.setattr(op, "launch", lambda kernel, *a, **b: launched.append(kernel) or launch(kernel, *a, **b))
    grads = torch.autograd.grad(score_conv(*args, row0, impl="triton").sum(), inputs)
    assert all(torch.equal(grad, everything[n]) for grad, n in zip(grads, wanted)) and len(launched) == 2


def test_autocast_changes_nothing(device, tiles):
    args = arguments(3, 3, N=20, device=device)
    with torch.autocast(device, torch.bfloat16):
        inside = [score_conv(*args, impl=impl) for impl in ("ref", "triton")]
    assert all(map(torch.equal, inside, [score_conv(*args, impl=impl) for impl in ("ref", "triton")]))


def test_integration_same_training_losses(device, tiles):
    """One attention layer with a learned logarithmic bias on a task that needs a shift of the keys."""
    tiles(16, 16, 16)
    gen, losses = torch.Generator().manual_seed(0), {}
    x = torch.randn(2, 12, 16, generator=gen).to(device)
    start = [torch.randn(shape, generator=gen) / 4 for shape in
             ((16, 24), (16, 24), (16, 16), (8, 6, 3), (8,), (3, 8, 3), (3,), (3, 2))]
    for impl in ("ref", "triton"):
        q, k, v, w1, b1, w2, b2, kerple = weights = [w.clone().to(device).requires_grad_() for w in start]
        optimizer, losses[impl] = torch.optim.AdamW(weights, lr=2e-2), []
        for _ in range(6):
            heads = [(x @ w).unflatten(2, (3, 8)).transpose(1, 2) for w in (q, k)]
            r = -kerple[:, :1].exp() * torch.log1p(kerple[:, 1:].exp() * torch.arange(12, device=device))
            a = score_conv(heads[0] @ heads[1].mT / 8 ** 0.5, r, w1, b1, w2, b2, impl=impl)
            loss = ((a.softmax(-1).mean(1) @ x @ v)[:, 1:] - x[:, :-1]).square().mean()
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
    monkeypatch.setattr(op._ScoreConv, "apply", launched)
    args = arguments(3, 3)
    assert torch.equal(score_conv(*args), score_conv_ref(*args))
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    with pytest.raises(RuntimeError, match="needs a CUDA tensor"):
        score_conv(*args, impl="triton")
    with pytest.raises(ValueError, match="impl must be"):
        score_conv(*args, impl="cuda")


@pytest.mark.parametrize("change, message", [
    ({0: torch.zeros(3, 11, 23)}, "s must be"), ({0: torch.zeros(2, 4, 11, 23)}, "w2 must be"),
    ({4: torch.zeros(3, 5, 2)}, "k odd"), ({4: torch.zeros(3, 0, 3)}, "at least 1"),
    ({4: torch.zeros(3, 5)}, "w2 must be"), ({2: torch.zeros(5, 3, 3)}, "w1 must be"),
    ({1: None}, "w1 must be"), ({2: torch.zeros(5, 6, 5)}, "w1 must be"), ({3: torch.zeros(3)}, "b1 must be"),
    ({5: torch.zeros(5)}, "b2 .3,"), ({6: 13}, "reach beyond 23"),
    ({6: -1}, "reach beyond"), ({1: torch.zeros(3, 19)}, "r must be"), ({1: torch.zeros(4, 23)}, "r must be"),
    ({1: torch.zeros(23)}, "r must be"), ({2: torch.zeros(5, 6, 3).long()}, "floating point"),
    ({5: torch.zeros(3, device="meta")}, "one device"),
])
def test_errors(change, message):
    args = arguments(3, 3)
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        score_conv(*args)


def test_what_the_kernel_does_not_take(device):
    args = op.example(1, 33, 2, 2, 64, 3, torch.float32, device)
    assert torch.equal(score_conv(*args), score_conv_ref(*args))
    with pytest.raises(ValueError, match="too large"):
        score_conv(*args, impl="triton")
    args = [x.double() if torch.is_tensor(x) else x for x in arguments(3, 3, device=device)]
    assert score_conv(*args).dtype == torch.float64
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        score_conv(*args, impl="triton")


# ------------------------------------------------------------------ large tensors
FAR_ROWS = """
import mmap, tempfile, torch
import convattn
import kernels
from kernels import score_conv as op
file = tempfile.TemporaryFile()
file.truncate(2**32 + 2**12)                    # sparse: 4 GB of addresses, a few pages of memory
memory = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float16)
for shape in ((3, 1, 1, 5), (1, 3, 1, 5), (1, 1, 3, 5)):                       # elements, heads, rows
    s, *rest = op.example(*shape, 4, 3, torch.float16, "cpu")
    far = memory.as_strided(shape, (2**30, 2**30, 2**30, 1)).copy_(s)
    near, out = (op.outputs(op.kernel, (x, *rest)) for x in (s, far))
    print(all(torch.equal(near[name], out[name]) for name in near))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; a GPU has a test of its own")
def test_offsets_beyond_int32():
    """In a process of its own: a wrapped offset reads 4 GB in front of the tensor, which may crash it."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", FAR_ROWS], env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == 3 * ["True"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_large_and_repeatable(dtype):
    args = op.example(2, 12, 300, 500, 32, 3, dtype, "cuda")
    first = agree(list(args))
    for _ in range(10):
        again = op.outputs(op.kernel, args)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_blocks_of_queries_take_the_kernel(monkeypatch, device):
    """convattn.py's attention by blocks, which are computed again in the backward pass, self-check included."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    bias, settings = convattn.Kerple(3, 64).to(device), SimpleNamespace(slope=0.01, edge="extend", kernels=False)
    conv = convattn.ScoreConv(6, 3, 4, 3, settings).to(device)
    qkv = [torch.randn(1, 3, 11, 4, device=device, requires_grad=True) for _ in range(3)]
    monkeypatch.setattr(convattn, "load_kernel", functools.cache(functools.partial(kernels.checked, impl="triton")))
    found = []
    for conv.kernels in (False, True):
        a = convattn.attend_in_blocks(*qkv, torch.arange(11, device=device), bias, conv, chunk=6)
        found.append([a, *torch.autograd.grad(a.square().sum(), [*qkv, *conv.parameters(), *bias.parameters()])])
    for plain, kernel in zip(*found):
        assert torch.allclose(plain, kernel, rtol=1e-3, atol=1e-3)  # sums over many pixels, in different orders


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    T = 2 ** 15
    _, r, *weights, _ = op.example(1, 3, 1, 1, 8, 3, torch.bfloat16, "cuda")
    s = torch.zeros(1, 3, T, T, dtype=torch.bfloat16, device="cuda")
    s[:, :, -1] = torch.randn(3, T, device="cuda").bfloat16()
    r = torch.randn(3, T, device="cuda")
    a = score_conv(s, r, *weights, impl="triton")
    last = score_conv(s[:, :, -1:].contiguous(), r, *weights, row0=T - 1, impl="triton")
    assert torch.equal(a[:, :, -1:], last) and (a[:, :, 0, 1:] == -INF).all()
