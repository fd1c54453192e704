# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""flatquant.py: transforms, quantizers and merging against plain references, decoder, learning, command line."""

import collections
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
from types import SimpleNamespace

import flatquant as m
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

LEARNED = [arm for arm, plan in m.ARMS.items() if plan.get("rotation") == "learned"]
LLAMA = dict(model_type="llama", hidden_size=48, intermediate_size=80, num_hidden_layers=2, vocab_size=256,
             num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
QWEN = LLAMA | dict(model_type="qwen2", tie_word_embeddings=False)
LLAMA3 = dict(rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
FULL = dict(w_bits=16, a_bits=16)
kinds = pytest.mark.parametrize("kind", [LLAMA, QWEN], ids=["llama", "qwen2"])
each_arm = pytest.mark.parametrize("arm", m.ARMS)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Small tensors are faster so; the former number comes back, and the handler of Ctrl-C."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)


def network(kind=LLAMA, factor=1.0, seed=0):
    """A decoder with random weights, norms and biases, in fp32."""
    torch.manual_seed(seed)
    model = m.Decoder(m.read_shape(kind))
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim == 2 and "embed" not in name else 1)
        if "norm" in name:
            p.data = 1 + p.data.abs() / 5
    m.add_outliers(model, factor, torch.Generator().manual_seed(seed))
    return model.requires_grad_(False).eval()


def inputs_of(model, rows=3, L=10, correlated=False):
    """Inputs (N, L, d) of the first block, and turn. Correlated: four directions hold most of their length."""
    d = model.shape.n_embd
    table = torch.randn(64, 4) @ torch.randn(4, d) * 2 + torch.randn(64, d) * 0.3
    x = table[torch.randint(64, (rows, L))] if correlated else torch.randn(rows, L, d)
    return x, model.turn(torch.arange(L)[None])


def scramble(student):
    """In fp64, with transforms far from orthogonal, c of any size, and thresholds that cut nothing."""
    student.double()
    for name, p in student.named_parameters():
        if name.endswith(".raw"):
            p.data = torch.randn_like(p)
        elif name.endswith(".s") or name.startswith("c."):
            p.data = torch.rand_like(p) * 1.5 + 0.5
            p.data[::2] *= 1 if name.startswith("c.") else -1
        elif name.startswith("clip"):
            p.data.fill_(50.0)
    for fixed in (module for module in student.modules() if isinstance(module, m.Fixed)):
        fixed.p = fixed.inverse = fixed.p.sign() / len(fixed.p) ** 0.5  # Hadamard to the last digit
    return student


def block(arm, kind=LLAMA, clip=50.0, **settings):
    """A plain block and an arm's scrambled one with the same weights, inputs and turn, all in fp64."""
    model = network(kind)
    cfg, (x, turn), layer = m.Config(**settings), inputs_of(model), model.layers[0]
    largest = m.largest_inputs(m.site_inputs(layer, x, turn)[1])
    student = scramble(m.make_student(cfg, model.shape, arm, layer, 0, largest))
    for name, p in student.named_parameters():
        if name.startswith("clip"):
            p.data.fill_(clip)
    return layer.double(), student, x.double(), [t.double() for t in turn]


def plain_heads(monkeypatch):
    """Keys and values stay as they are, while the transform of queries and keys is there."""
    monkeypatch.setattr(m, "fake_quantize_heads", lambda x, bits, clip=None: x)


# ---------------------------------------------------------------- Kronecker products, invertible matrices
def test_factor_pair():
    """Sec. 2.2 of the specification: the official table; no divisor lies between n1 and the root."""
    table = {576: (24, 24), 1536: (32, 48), 4096: (64, 64), 5120: (64, 80), 8192: (64, 128), 11008: (86, 128),
             13824: (108, 128), 14336: (112, 128), 28672: (128, 224), 6: (2, 3), 1: (1, 1)}
    assert {n: m.factor_pair(n) for n in table} == table
    for n in range(4, 400):
        if any(n % d == 0 for d in range(2, n)):
            n1, n2 = m.factor_pair(n)
            assert n1 * n2 == n and n1 <= n2 and not any(n % d == 0 for d in range(n1 + 1, math.isqrt(n) + 1))
        else:
            with pytest.raises(ValueError, match=str(n)):
                m.factor_pair(n)


def test_kron_mm_is_the_whole_matrix():
    """x (P1 (x) P2) with sides that differ; the inverse transpose leads back."""
    p1, p2 = torch.randn(32, 32).double(), torch.randn(48, 48).double()
    x = torch.randn(2, 3, 1536).double()
    y = m.kron_mm(x, p1, p2)
    assert torch.allclose(y, x @ torch.kron(p1, p2), rtol=1e-10)
    assert torch.allclose(m.kron_mm(y, p1.inverse(), p2.inverse()), x, rtol=1e-6)
    w = torch.randn(5, 1536).double()  # W P^-T, by factors
    assert torch.allclose(m.kron_mm(w, p1.inverse().T, p2.inverse().T) @ y[0].T, w @ x[0].T, rtol=1e-6)


def test_invertible_is_what_torch_parametrizes():
    """(official code) U and V are torch's Cayley maps of the raw matrices; P (P^-T)^T = I."""
    transform = m.Invertible(12).double()
    transform.raw.data, transform.s.data = torch.randn(2, 12, 12).double(), torch.rand(12).double() + 0.5
    theirs = []
    for raw in transform.raw.data:
        linear = torch.nn.Linear(12, 12, bias=False, dtype=torch.float64)
        torch.nn.utils.parametrizations.orthogonal(linear, orthogonal_map="cayley", use_trivialization=False)
        linear.parametrizations.weight.original.data = raw
        theirs.append(linear.weight)
    u, v = theirs
    p, inverse = transform()
    assert torch.allclose(u @ u.T, torch.eye(12).double()) and torch.allclose(v @ v.T, torch.eye(12).double())
    assert torch.allclose(p, u @ transform.s.diag() @ v.T) and torch.allclose(p @ inverse.T, torch.eye(12).double())
    assert (p - inverse).abs().max() > 0.1 and (p - p.T).abs().max() > 0.1  # no orthogonal, no symmetric one


def test_invertible_starts_as_a_moderate_rotation():
    """(official code) Raw matrices are orthogonal; mean diagonal of U about 0.65, angles about 45 degrees."""
    transform = m.Invertible(64, torch.Generator().manual_seed(0))
    assert torch.allclose(transform.raw @ transform.raw.mT, torch.eye(64).expand(2, 64, 64), atol=1e-5)
    assert (transform.s == 1).all() and (transform.raw[0] - transform.raw[1]).abs().max() > 0.1
    transform.raw.data[1] = 0  # V = I
    u = transform()[0].detach()
    angles = torch.linalg.eigvals(u).angle().abs().rad2deg()
    assert u.diagonal().mean().item() == pytest.approx(0.65, abs=0.05)
    assert 40 < angles.mean() < 50 and 70 < angles.max() < 90
    again, other = (m.Invertible(64, torch.Generator().manual_seed(seed)).raw for seed in (0, 1))
    assert torch.equal(again[0], transform.raw[0]) and not torch.equal(other, again)


def test_hadamard():
    """H H^T = n I in whole numbers, or an error; all orders that the checkpoints' sizes need."""
    known = []
    for n in [*range(1, 130), 576]:
        try:
            h = m.hadamard(n)
        except ValueError as error:
            assert re.search(r"\d", str(error))
            continue
        known.append(n)
        assert h.shape == (n, n) and torch.allclose(h.abs(), torch.full((n, n), n**-0.5))
        assert torch.equal(h.sign() @ h.sign().T, n * torch.eye(n))
    assert {1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 60, 64, 76, 80, 96, 108, 112, 128, 576} <= set(known)
    assert all(n <= 2 or n % 4 == 0 for n in known)


@pytest.mark.parametrize("n, sides", [(576, (24, 24)), (1536, (32, 48)), (14336, (112, 128)), (192, (12, 16)),
                                      (48, (4, 12)), (896, (28, 32)), (4864, (64, 76))])
def test_hadamard_pair(n, sides):
    assert tuple(map(len, m.hadamard_pair(n))) == sides


def test_hadamard_pair_refuses():
    for n in (27, 23, 9):
        with pytest.raises(ValueError, match=str(n)):
            m.hadamard_pair(n)


# ---------------------------------------------------------------- quantizers
ROWS = torch.tensor([  # one of zeros, one all positive, one all negative; two with ties: their scale is 1 at four bits
    [0.0] * 8, [1.0, 2, 3, 4, 5, 6, 0.3, 8], [-1.0, -2, -3, -4, -5, -6, -0.3, -8],
    [7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -3.5], [-7, 3.5, 4.5, 5.5, 6.5, -6.5, -5.5, 0]]).double()


def rows(n=60):
    return torch.cat([ROWS, torch.randn(n, 8).double() * torch.logspace(-3, 3, n).double()[:, None]])


def by_hand(x, low, high, top):
    """A row of Python floats, its scale from a range: codes from -top-1 to top, ties half to even."""
    scale = max(high, -low) / top or 1.0
    return [min(max(round(value / scale), -top - 1), top) for value in x], scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", [None, (4.0, 4.0), (0.5, -1.0)])
def test_tokens_and_weights_against_a_loop(bits, clip):
    """(official code) Scale = largest kept value / 7 at four bits, one a row; weights are cut at the range first."""
    x, top = rows(), 2 ** (bits - 1) - 1
    keep = (1.0, 1.0) if clip is None else torch.tensor(clip).double().sigmoid().tolist()
    ranges = [(keep[1] * min(row), keep[0] * max(row)) for row in x.tolist()]
    wanted = [by_hand(row, min(low, 0.0), max(high, 0.0), top) for row, (low, high) in zip(x.tolist(), ranges)]
    codes, scale = m.quantize_tokens(x, bits, clip and torch.tensor(clip).double())
    assert codes.tolist() == [c for c, _ in wanted] and scale.flatten().tolist() == [s for _, s in wanted]

    cut = [[min(max(v, low), high) for v in row] for row, (low, high) in zip(x.tolist(), ranges)]
    w = m.clip_rows(x, torch.tensor(clip).double().expand(len(x), 2)) if clip else x
    assert w.tolist() == cut
    codes, scale = m.quantize_weight(w, bits)
    wanted = [by_hand(row, 0.0, max(1e-5, *map(abs, row)), top) for row in cut]
    assert codes.tolist() == [c for c, _ in wanted] and scale.flatten().tolist() == [s for _, s in wanted]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("clip", [None, (0.5, -1.0)])
def test_heads_against_a_loop(bits, clip):
    """(official code) 2^bits levels from the smallest to the largest value, one of them exactly 0."""
    x, top = rows(), 2**bits - 1
    keep = (1.0, 1.0) if clip is None else torch.tensor(clip).double().sigmoid().tolist()
    got = m.fake_quantize_heads(x, bits, clip and torch.tensor(clip).double())
    for row, ours in zip(x.tolist(), got.tolist()):
        low, high = keep[1] * min(0.0, *row), keep[0] * max(0.0, *row)
        low, high = (-1.0, 1.0) if low == high == 0 else (low, high)
        scale = (high - low) / top
        zero = round(-low / scale)
        assert ours == [scale * (min(max(round(v / scale) + zero, 0), top) - zero) for v in row]
        assert len(set(ours)) <= top + 1 and (clip or max(abs(a - b) for a, b in zip(row, ours)) <= scale * 1.0000001)
    assert (m.fake_quantize_heads(torch.cat([x, 0 * x[:, :1]], 1), bits)[:, -1] == 0).all()
    with_value = m.fake_quantize_heads(x[None, None], bits)  # the range is each token's and head's own
    assert torch.equal(with_value[0, 0], m.fake_quantize_heads(x, bits))


@pytest.mark.parametrize("quantize", [m.quantize_weight, m.quantize_tokens])
def test_symmetric_rounding_errors(quantize):
    """Without clipping: codes within +-7, errors of half a step at most, a second rounding changes nothing."""
    x = rows()
    codes, scale = quantize(x, 4)
    assert codes.abs().amax(1)[1:].eq(7).all() and ((codes * scale - x).abs() <= scale / 2 * (1 + 1e-9)).all()
    again, same = quantize(codes * scale, 4)
    assert torch.equal(again, codes) and torch.allclose(same, scale, rtol=1e-12)
    assert torch.isfinite(codes).all() and (codes[0] == 0).all()
    cut, _ = m.quantize_tokens(x, 4, torch.tensor([-1.0, -1.0]).double())
    assert cut.min() == -8 and cut.max() == 7


def test_straight_through_gradients():
    """(official code) Rounding counts as nothing, clamp and scale do count: the closed form, with thresholds."""
    x, g = torch.randn(50, 8).double().requires_grad_(), torch.randn(50, 8).double()
    clip = torch.tensor([0.5, -0.3]).double().requires_grad_()
    codes, scale = m.quantize_tokens(x, 4, clip)
    got = torch.autograd.grad((g * codes * scale).sum(), [x, clip])
    keep, q = clip.detach().sigmoid(), (x.detach() / scale.detach()).round()
    inside, z = ((q >= -8) & (q <= 7)).double(), x.detach() / scale.detach()
    by_scale = (g * (q.clamp(-8, 7) - inside * z)).sum(1)  # dL / dscale
    high, low = keep[0] * x.detach().amax(1), -keep[1] * x.detach().amin(1)
    of_x, of_clip = g * inside, torch.zeros(2).double()
    for i, (top, bottom) in enumerate(zip(high, low)):
        side, sign, j = (0, 1, x[i].argmax()) if top > bottom else (1, -1, x[i].argmin())
        of_x[i, j] += by_scale[i] * sign * keep[side] / 7
        of_clip[side] += by_scale[i] * sign * x[i, j].detach() * keep[side] * (1 - keep[side]) / 7
    assert torch.allclose(got[0], of_x) and torch.allclose(got[1], of_clip) and inside.min() == 0

    codes, scale = m.quantize_weight(x, 4)
    (got,) = torch.autograd.grad((g * codes * scale).sum(), [x])
    largest = F.one_hot(x.abs().argmax(1), 8) * x.sign() / 7
    assert torch.allclose(got, g + largest * (g * (codes - x / scale)).sum(1, keepdim=True))


def test_gradients_are_finite_differences(monkeypatch):
    """With rounding taken out: every learned tensor, thresholds of weights, inputs, keys and values included."""
    monkeypatch.setattr(m, "round_ste", lambda x: x)
    layer, student, x, turn = block("flatquant", clip=1.0, w_bits=3, a_bits=3, k_bits=3, v_bits=3)
    y, fit = layer(x, turn), {k: p for k, p in student.named_parameters() if p.requires_grad}
    F.mse_loss(student(x, turn), y).backward()
    assert {"raw", "s", "attn", "mlp", "down", "v", "v_proj"} <= {name.split(".")[-1] for name in fit}
    for name, p in fit.items():
        direction, home, loss = torch.randn_like(p), p.data, []
        for step in (1e-6, -1e-6):
            p.data = home + step * direction
            loss.append(F.mse_loss(student(x, turn), y).item())
        p.data = home
        slope = (p.grad * direction).sum().item()
        assert (loss[0] - loss[1]) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-7), name
        assert abs(slope) > 1e-9, name


# ---------------------------------------------------------------- a block of each arm
@kinds
@each_arm
def test_sixteen_bits_change_nothing(arm, kind, monkeypatch):
    """Every transform is undone to fp64: with grouped heads, biases, P and c of any size."""
    plain_heads(monkeypatch)
    layer, student, x, turn = block(arm, kind, **FULL, k_bits=4)
    got, plan = student(x, turn), m.ARMS[arm]
    assert torch.allclose(got, layer(x, turn), rtol=1e-8, atol=1e-8)
    assert ("key" in student.now) == ("attn" in student.now) == ("rotation" in plan)
    assert ("attn" in student.c) == ("c" in plan) and bool(student.clip_w) == bool(student.clip_a) == ("clip" in plan)
    if arm in LEARNED:
        assert all((p - inverse).abs().max() > 0.1 for pair in student.now.values() for p, inverse in zip(*pair))


def test_whole_model_of_sixteen_bits():
    model = network()
    wanted, (x, turn) = model(torch.arange(24).view(2, 12)), inputs_of(model)
    students = []
    for i, layer in enumerate(model.layers):
        largest = m.largest_inputs(m.site_inputs(layer, x, turn)[1])
        students.append(m.make_student(m.Config(**FULL), model.shape, "lt_ps", layer, i, largest))
    model.layers = torch.nn.ModuleList(students)
    assert torch.allclose(model(torch.arange(24).view(2, 12)), wanted, atol=1e-3)


@pytest.mark.parametrize("arm", ["hadamard", "flatquant"])
def test_scores_keep_their_values(arm, monkeypatch):
    """(official code) (q P^-T)(k P)^T = q k^T for grouped heads; values pass. No transform where keys stay whole."""
    plain_heads(monkeypatch)
    student = block(arm, k_bits=4)[1]
    student.materialise()
    q, k, v = torch.randn(2, 4, 5, 12).double(), torch.randn(2, 2, 5, 12).double(), torch.randn(2, 2, 5, 12).double()
    q2, k2, v2 = student.heads(q, k, v)
    scores = [a @ b.repeat_interleave(2, 1).mT for a, b in ((q, k), (q2, k2))]
    assert torch.allclose(*scores) and not torch.allclose(k, k2) and torch.equal(v, v2)
    student = block(arm, v_bits=4)[1]
    student.materialise()
    assert "key" not in student.now


def test_value_transform_stays_within_a_head():
    """(official code) v_proj, turned: each head of the values (and of the bias) times P2, before or after repeat_kv."""
    student = block("flatquant", QWEN)[1]
    student.materialise()
    p2, x = student.now["o"][0][1], torch.randn(7, 48).double()
    w, bias = student.v_proj.weight, student.v_proj.bias
    turned = F.linear(x, student.within_heads(w), student.within_heads(bias)).unflatten(1, (2, 12))
    plain = F.linear(x, w, bias).unflatten(1, (2, 12))
    assert p2.shape == (12, 12) and torch.allclose(turned, plain @ p2) and student.within_heads(None) is None
    assert torch.allclose(turned.repeat_interleave(2, 1), plain.repeat_interleave(2, 1) @ p2)


@kinds
@each_arm
def test_merged_is_trained(arm, kind):
    """The same whole numbers as in training (fp64), c in norms and up_proj, and the same output."""
    layer, student, x, turn = block(arm, kind, clip=1.0, k_bits=4, v_bits=4)
    wanted, c = student(x, turn), {site: p.detach().clone() for site, p in student.c.items()}
    parts = {name: student.rounded_weight(name) for name in m.SITE_OF}
    merged = copy.deepcopy(student).merge()
    for name, (codes, scale, bias) in parts.items():
        ours, factor = getattr(merged, name), c.get("down", torch.ones(80))[:, None] if name == "up_proj" else 1.0
        assert ours.codes.dtype == torch.int8 and torch.equal(ours.codes.double(), codes), name
        assert torch.allclose(ours.scale.double(), scale * factor, rtol=1e-6)
        assert (ours.bias is None) == (bias is None) and (bias is None or torch.allclose(ours.bias.double(), bias))
    for site, norm in (("attn", "input_layernorm"), ("mlp", "post_attention_layernorm")):
        gain = getattr(layer, norm).weight * c.get(site, 1.0)
        assert torch.allclose(getattr(merged, norm).weight.double(), gain)
    assert set(merged.c) <= {"o"} and not merged.clip_w and not any(p.requires_grad for p in merged.parameters())
    error = (merged.double()(x, turn) - wanted).abs().amax(-1)  # (N, L): transforms are kept in fp32
    assert error.median() < 1e-4 and (error > 1e-3).float().mean() < 0.1  # a tie may fall to the other side


def test_merged_without_rounding_is_the_reference():
    for bits in (12, 16):
        layer, student, x, turn = block("flatquant", w_bits=bits, a_bits=16)
        error = (student.merge().double()(x, turn) - layer(x, turn)).abs().max()
        assert error < (1e-4 if bits == 16 else 0.3)


def test_product_of_codes_is_exact():
    """Whole numbers of four bits, 14336 of them, in fp32: the int64 product, then both scales."""
    student = m.QuantLayer(m.read_shape(LLAMA), "rtn", m.Config())
    a, w = torch.randint(-8, 8, (6, 14336)), torch.randint(-8, 8, (5, 14336))
    a[0], w[0] = -8, -8  # the largest sum
    scale, scale_a, bias = torch.rand(5, 1), torch.rand(6, 1), torch.randn(5)
    student.q_proj = m.WholeLinear(w, scale, bias, 4)
    product = a @ w.T
    assert product[0, 0] == 64 * 14336
    assert torch.equal(student.linear("q_proj", a.float(), scale_a), product.float() * scale_a * scale.T + bias)


def test_pack_and_unpack():
    """All pairs of nibbles; the even channel is the low one."""
    codes = torch.tensor(list(itertools.product(range(-8, 8), repeat=2)), dtype=torch.int8).view(32, 16)
    packed = m.pack(codes)
    assert packed.dtype == torch.uint8 and torch.equal(m.unpack(packed), codes)
    assert packed.flatten().tolist() == [a % 16 + 16 * (b % 16) for a, b in codes.view(-1, 2).tolist()]


# ---------------------------------------------------------------- scales of channels, outliers
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_start_of_c(alpha):
    """(official code) c = max|W|^(1-a) / max|X|^a; a = 0 levels the weights, a = 1 the inputs."""
    model = network(factor=40.0)
    layer, (x, turn) = model.layers[0], inputs_of(model)
    inputs = m.site_inputs(layer, x, turn)[1]
    student = m.make_student(m.Config(), model.shape, "smoothquant", layer, 0, m.largest_inputs(inputs))
    student.start_c(m.largest_inputs(inputs), alpha)
    assert set(student.c) == set(m.SITES) == {"attn", "o", "mlp", "down"}
    for site, names in m.SITES.items():
        rows = [row for name in names for row in getattr(layer, name).weight.tolist()]
        for j in range(0, len(student.c[site]), 7):
            w, biggest = max(abs(row[j]) for row in rows), max(map(abs, inputs[site][..., j].flatten().tolist()))
            assert student.c[site][j].item() == pytest.approx(w ** (1 - alpha) / biggest**alpha, rel=1e-4)
            if alpha == 1:
                assert (inputs[site] * student.c[site])[..., j].abs().max().item() == pytest.approx(1, rel=1e-4)
            if alpha == 0:
                assert w / student.c[site][j].item() == pytest.approx(1, rel=1e-4)
    fixed, moving = (m.make_student(m.Config(), model.shape, arm, layer, 0, m.largest_inputs(inputs))
                     for arm in ("smoothquant", "flatquant"))
    student.start_c(m.largest_inputs(inputs), 0.5)
    assert torch.equal(fixed.c["attn"], student.c["attn"]) and not fixed.c["attn"].requires_grad
    student.start_c(m.largest_inputs(inputs), 0.3)
    assert torch.equal(moving.c["attn"], student.c["attn"]) and moving.c["attn"].requires_grad
    student.start_c({site: 0 * x for site, x in m.largest_inputs(inputs).items()}, 1.0)  # a dead channel
    assert all(torch.isfinite(c).all() for c in student.c.values())


def fitted(arm, model, x, turn, held, **settings):
    """Error of a calibrated block, per token of held-out inputs, and before calibration."""
    cfg, layer = m.Config(batch_size=2, **settings), model.layers[0]
    y, inputs = m.site_inputs(layer, x, turn)
    student = m.make_student(cfg, model.shape, arm, layer, 0, m.largest_inputs(inputs))
    held_y, before = layer(held, turn), m.block_error(student, held, layer(held, turn), turn)
    m.calibrate(student, x, y, turn, cfg)
    return m.block_error(student, held, held_y, turn).mean().item(), before.mean().item()


def test_outliers_keep_the_function_and_break_rounding():
    """(our choice) Same logits, four channels a site 40 times as large; learned c brings the error back."""
    calm, model = network(), network(factor=40.0)
    ids = torch.randint(256, (2, 16))
    assert torch.allclose(calm.double()(ids), model.double()(ids), rtol=1e-8, atol=1e-10)
    calm, model = calm.float(), model.float()
    x, turn = inputs_of(model, rows=8, L=16)
    seen = [m.largest_inputs(m.site_inputs(net.layers[0], x, turn)[1]) for net in (calm, model)]
    for site in m.SITES:
        ratio = seen[1][site] / seen[0][site]
        assert (ratio > 39).sum() == (0 if site == "o" else 4) and (ratio < 1.01).sum() >= len(ratio) - 4
    held, cfg = inputs_of(model, rows=8, L=16)[0], dict(epochs=4)
    plain, broken = (fitted("rtn", net, x, turn, held, **cfg)[0] for net in (calm, model))
    assert broken > 4 * plain and fitted("lt_ps", model, x, turn, held, **cfg)[0] < 1.1 * plain


# ---------------------------------------------------------------- learning
def test_flatquant_beats_hadamard_by_learning():
    """On held-out inputs of a block with outliers, equal thresholds and steps; without steps it does not."""
    model = network(factor=1.5)
    x, turn = inputs_of(model, rows=8, L=24, correlated=True)
    held, order = x[4:], dict(epochs=30)
    x = x[:4]
    learned, before = fitted("flatquant", model, x, turn, held, **order)
    peer = fitted("hadamard_lct", model, x, turn, held, **order)[0]
    still = fitted("flatquant", model, x, turn, held, **order, lr=0.0)[0]
    assert learned < 0.75 * before and learned < 0.95 * peer < peer < still


@pytest.mark.parametrize("arm", ["flatquant", "hadamard_lct"])
def test_calibrate_is_adamw_with_cosine_by_torch(arm):
    """(official code) Block MSE, AdamW with decay 0.01, CosineAnnealingLR to 5e-6, thresholds ten times as fast."""
    model = network(factor=3.0)
    cfg, (x, turn), layer = m.Config(batch_size=2, epochs=2, lr=2e-3), inputs_of(model, rows=5), model.layers[0]
    y, inputs = m.site_inputs(layer, x, turn)
    ours, plain = (m.make_student(cfg, model.shape, arm, layer, 0, m.largest_inputs(inputs)) for _ in range(2))
    fit = [(name, p) for name, p in plain.named_parameters() if p.requires_grad]
    groups = [dict(params=[p], lr=2e-2 if "clip" in name else 2e-3) for name, p in fit]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6, 5e-6)
    for part in [slice(0, 2), slice(2, 4), slice(4, 5)] * 2:
        optimizer.zero_grad()
        loss = (plain(x[part], turn) - y[part]).square().mean()
        (loss / loss.item()).backward()
        optimizer.step()
        schedule.step()
    assert m.calibrate(ours, x, y, turn, cfg) == pytest.approx(loss.item(), rel=1e-3)
    for name, p in fit:
        assert torch.allclose(ours.get_parameter(name), p, atol=1e-4), name
    changed = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in changed} == {"clip_w", "clip_a"} | {"pairs", "c"} * (arm == "flatquant")
    assert torch.equal(ours.q_proj.weight, layer.q_proj.weight) and m.calibrate(
        m.make_student(cfg, model.shape, "rtn", layer, 0, {}), x, y, turn, cfg) is None


def test_calibrate_stops_at_a_singular_transform():
    model = network()
    cfg, (x, turn), layer = m.Config(epochs=1, lr=0.0), inputs_of(model), model.layers[0]
    y, inputs = m.site_inputs(layer, x, turn)
    student = m.make_student(cfg, model.shape, "flatquant", layer, 0, m.largest_inputs(inputs))
    student.pairs["mlp"][1].s.data[3] = 1e-4
    with pytest.raises((FloatingPointError, SystemExit)):
        m.calibrate(student, x, y, turn, cfg)


def test_blocks_learn_from_full_precision(monkeypatch, tmp_path):
    """(official code) Inputs and targets of every block are the plain model's; held-out windows run through all."""
    model, seen = network(factor=5.0), []
    cfg = m.Config(arms="rtn,flatquant", seq_len=12, epochs=1)
    run = SimpleNamespace(device=torch.device("cpu"), rank=0, world=1, out=tmp_path, stop=False)
    ids = dict(calib=torch.randint(256, (4, 12)), eval=torch.randint(256, (5, 12)))
    monkeypatch.setattr(m, "calibrate", lambda student, x, y, turn, cfg: seen.append((x, y)))
    streams, learned, measured = m.quantize_model(cfg, run, model, ids, {}, 0.0)
    x, turn = model.embed_tokens(ids["calib"]), model.turn(torch.arange(12)[None])
    held = other = model.embed_tokens(ids["eval"])
    for i, layer in enumerate(model.layers):
        for got in seen[2 * i : 2 * i + 2]:  # once for each arm
            assert torch.equal(got[0], x) and torch.allclose(got[1], layer(x, turn), atol=1e-5)
        student = m.make_student(cfg, model.shape, "rtn", layer, i, {}).merge()
        error = (student(held, turn) - layer(held, turn)).square().mean(-1)
        assert measured[f"rtn.{i}"]["mse"] == pytest.approx(error.mean().item(), rel=1e-3)
        assert measured[f"rtn.{i}"]["median"] == pytest.approx(error.median().item(), rel=1e-3)
        assert torch.allclose(measured[f"rtn.{i}"]["by_position"], error.mean(0), rtol=1e-3)
        x, held, other = seen[2 * i][1], layer(held, turn), student(other, turn)
    assert torch.allclose(streams["reference"], held, atol=1e-4) and torch.allclose(streams["rtn"], other, atol=1e-3)
    assert learned["rtn.0"] == {} and not torch.equal(*(learned[f"flatquant.{i}"]["pairs.attn.0.raw"] for i in (0, 1)))


# ---------------------------------------------------------------- data, measures, claims
def test_parts_of_the_documentation_share_no_topic():
    from pydoc_data.topics import topics

    texts, parts = [topics[name] for name in sorted(topics)], [m.documentation(i) for i in range(4)]
    assert all(text in parts[i % 4] for i, text in enumerate(texts))
    assert sum(map(len, parts)) == sum(map(len, texts)) + 2 * (len(texts) - 4)  # and nothing twice


def test_windows():
    assert m.windows("abcdefg", m.encode_bytes, 2, 3, "x").tolist() == [[97, 98], [99, 100], [101, 102]]
    assert m.encode_bytes("aé") == [97, 195, 169]


def test_window_nll_is_the_mean_over_predictions():
    model, ids = network(), torch.randint(256, (5, 9))
    p, seen = model(ids).double().log_softmax(-1), []
    turn, x = model.turn(torch.arange(9)[None]), model.embed_tokens(ids)
    for layer in model.layers:
        x = layer(x, turn)
    for i in range(5):
        seen.append(-sum(p[i, t, ids[i, t + 1]].item() for t in range(8)) / 8)
    assert m.window_nll(model, x, ids).tolist() == pytest.approx(seen, rel=1e-5)


def test_what_linear_layers_read():
    """Block = x + o_proj(o) + down_proj(down); attn and mlp are the norms' outputs."""
    model = network()
    layer, (x, turn) = model.layers[0], inputs_of(model, rows=5)
    y, inputs = m.site_inputs(layer, x, turn)
    middle = x + layer.o_proj(inputs["o"])
    assert torch.allclose(y, layer(x, turn), atol=1e-5)
    assert torch.allclose(y, middle + layer.down_proj(inputs["down"]), atol=1e-5)
    assert torch.allclose(inputs["attn"], layer.input_layernorm(x))
    assert torch.allclose(inputs["mlp"], layer.post_attention_layernorm(middle), atol=1e-5)
    assert not layer.q_proj._forward_pre_hooks


@pytest.mark.parametrize("arm", ["rtn", "smoothquant", "hadamard", "flatquant"])
def test_channel_norms_are_of_the_transformed(arm):
    """Fig. 1: norms of the columns of X diag(c) P and of W diag(c)^-1 P^-T, largest first, with whole matrices."""
    layer, student, x, turn = block(arm, **FULL)
    inputs = m.site_inputs(layer, x, turn)[1]
    curves = m.channel_norms(student, inputs)
    for site, names in m.SITES.items():
        n = inputs[site].shape[-1]
        c, p = student.c[site] if site in student.c else torch.ones(n).double(), torch.eye(n).double()
        if site in student.now:
            p = torch.kron(*student.now[site][0])
        weights = []
        for name in names:
            w = getattr(layer, name).weight / c @ p.inverse().T
            if name == "v_proj" and arm in LEARNED:
                w = torch.block_diag(*[student.now["o"][0][1]] * 2).T @ w
            weights.append(w)
        for got, plain in zip(curves[site], ((inputs[site] * c).flatten(0, 1) @ p, torch.cat(weights))):
            wanted = sorted((column.square().sum().sqrt().item() for column in plain.T), reverse=True)
            assert got.tolist() == pytest.approx(wanted, rel=1e-6), (site, len(wanted))


def test_flatness():
    assert m.flatness(torch.tensor([3.0, 3.0, 3.0])) == 1.0 and m.flatness(torch.tensor([6.0, 1.0, 2.0])) == 2.0


def test_statistics_and_their_signs():
    """Positive where FlatQuant is better: less loss, less uneven channels; claims of arms not run are left out."""
    nll = dict(hadamard_lct=np.array([2.0, 3.0, 4.0]), flatquant=np.array([1.5, 2.0, 3.9]), hadamard=np.ones(3) * 9)
    found = m.statistics(nll, dict(hadamard=[2.0, 8.0], flatquant=[1.0, 2.0]))
    assert set(found) == {"flatquant-beats-hadamard-lct", "flatquant-beats-hadamard", "flatquant-is-flatter"}
    mean, (low, high) = found["flatquant-beats-hadamard-lct"]
    gaps = [0.5, 1.0, 0.1]
    deviation = math.sqrt(sum((gap - sum(gaps) / 3) ** 2 for gap in gaps) / 2)
    assert mean == pytest.approx(sum(gaps) / 3) and high - mean == pytest.approx(3.16 * deviation / 3**0.5)
    assert mean - low == pytest.approx(high - mean) and found["flatquant-beats-hadamard"][0] > 6
    assert found["flatquant-is-flatter"][0] == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert {formula for _, formula, *_ in m.CLAIMS} <= {
        f"{a} - {b}" for a, b in itertools.permutations(m.ARMS, 2)} | {"flatness hadamard / flatquant"}


@pytest.mark.parametrize("n, student", [(16, 2.131), (62, 2.000), (141, 1.977)])
def test_interval_is_close_to_students(n, student):
    x = np.random.default_rng(0).normal(size=n)
    mean, (low, high) = m.interval(x)
    assert high - mean == pytest.approx(student * x.std(ddof=1) / n**0.5, rel=0.01) and low < mean < high


def test_verdict():
    assert m.verdict(2, (1, 3), 0.5) == "HOLDS" and m.verdict(-2, (-3, -1), 0) == "DOES NOT HOLD"
    assert m.verdict(1, (-1, 3), 0) == "INCONCLUSIVE" == m.verdict(0, (0, 0), 0)


# ---------------------------------------------------------------- block decoder
@pytest.mark.peers
@pytest.mark.parametrize("kind, peer", [(LLAMA | dict(rope_parameters=LLAMA3), "Llama"), (LLAMA, "Llama"),
                                        (QWEN, "Qwen2")])
def test_logits_equal_transformers(kind, peer):
    """Random weights; Llama 3 with its slower pairs, tied; Qwen2 with biases, untied."""
    transformers = pytest.importorskip("transformers")
    settings = {k: v for k, v in kind.items() if k != "model_type"}
    config = getattr(transformers, f"{peer}Config")(**settings, max_position_embeddings=512)
    theirs = getattr(transformers, f"{peer}ForCausalLM")(config).eval()
    for p in theirs.parameters():
        p.data = torch.randn_like(p) / 7 + (1 if p.ndim == 1 else 0)
    shape = m.read_shape(config.to_dict())
    assert shape.llama3 == ("rope_parameters" in kind) and shape.tied == kind["tie_word_embeddings"]
    model = m.Decoder(shape)
    tensors = {re.sub(r"^model\.|self_attn\.|mlp\.", "", k): v for k, v in theirs.state_dict().items()}
    model.load_state_dict({k: v for k, v in tensors.items() if not (shape.tied and k == "lm_head.weight")})
    ids = torch.randint(256, (2, 100))
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() < 1e-4


@kinds
def test_cache_and_padding_change_nothing(kind):
    """Tokens in pieces behind a cache, and behind padding on the left: the logits of the whole text."""
    model, ids = network(kind), torch.randint(256, (2, 9))
    whole = model(ids)
    cache = torch.zeros(2, 2, 2, 2, 12, 12)
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 9)):
        got = model(ids[:, start:stop], cache=cache, start=start)
        assert torch.allclose(got, whole[:, stop - 1], atol=1e-4), (start, stop)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    got = model(padded, pad=torch.tensor([3, 3]))
    assert torch.allclose(got[:, 3:], whole, atol=1e-4) and torch.isfinite(got).all()


def greedy(model, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_batched_generation_is_one_by_one():
    """Prompts of different lengths; an answer ends before its stop token."""
    model, prompts = network(QWEN), [[1, 2, 3, 4, 5], [200], [9, 8, 7]]
    wanted = [greedy(model, prompt, 6) for prompt in prompts]
    assert m.generate(model, prompts, 6) == wanted
    stop = wanted[1][2]
    cut = [list(itertools.takewhile(lambda token: token != stop, row)) for row in wanted]
    assert m.generate(model, prompts, 6, stop=[stop]) == cut and len(cut[1]) <= 2
    assert m.generate(model, [prompts[0]], 1) == [wanted[0][:1]]


@pytest.mark.parametrize("temperature, top_p, wanted", [
    (1.0, 1.0, [0.15, 0.5, 0.05, 0.3]), (0.5, 1.0, [0.0225, 0.25, 0.0025, 0.09]), (1.0, 0.7, [0, 0.5, 0, 0.3]),
    (1.0, 0.9, [0.15, 0.5, 0, 0.3]), (1.0, 0.1, [0, 1, 0, 0])])
def test_sampling_frequencies(temperature, top_p, wanted):
    """Temperature sharpens; top_p keeps the smallest set that holds so much."""
    model = network()
    model.forward = lambda ids, *_, **__: torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(len(ids), 4)
    drawn = m.generate(model, [[0]] * 4000, 1, temperature=temperature, top_p=top_p,
                       generator=torch.Generator().manual_seed(0))
    seen = collections.Counter(token for row in drawn for token in row)
    for token, p in enumerate(wanted):
        assert seen[token] / 4000 == pytest.approx(p / sum(wanted), abs=0.03) and (p or not seen[token])


@pytest.mark.parametrize("odd", [dict(model_type="gemma"), dict(hidden_act="gelu"), dict(attention_bias=True),
                                 dict(mlp_bias=True), dict(rope_scaling=dict(type="yarn")),
                                 dict(model_type="qwen2", use_sliding_window=True)])
def test_shapes_that_are_refused(rejects, odd):
    rejects(lambda argv: m.read_shape(LLAMA | odd), [], "config.json", str(list(odd.values())[-1]).split("'")[-2:][0])


def test_shape_defaults():
    s = m.read_shape(dict(LLAMA, num_key_value_heads=None, head_dim=None, rope_scaling=None, rope_theta=7.0))
    assert (s.n_kv, s.head_dim, s.theta, s.llama3, s.eps) == (4, 12, 7.0, False, 1e-6)


# ---------------------------------------------------------------- command line
FIELDS = ("script task scale tag seed argv commit method_hash data_sha256 device threads versions minutes tried "
          "metrics claims").split()
SMOKE = ["--scale", "smoke"]


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An empty directory, which is the current one."""
    (work := tmp_path / "work").mkdir()
    monkeypatch.chdir(work)
    return work


def test_smoke(smoke):
    """Alone: a row for each arm, every file, no claim, RESULT last."""
    run = smoke("flatquant")
    lines, result, arms = run.stdout.splitlines(), run.result, m.Config.arms.split(",")
    assert lines[-1].startswith("RESULT ") and "CLAIM" not in run.stdout and result["claims"] == []
    assert set(FIELDS) <= set(result) and result == json.loads((run.out / "result.json").read_text())
    assert {p.name for p in run.out.iterdir()} == {
        *"config.json log.jsonl result.json state.pt tiny.safetensors learned.safetensors plot.png mse.png".split()}
    for arm in ("reference", *arms):
        assert any(line.split()[:1] == [arm] for line in lines) and 1 < result["metrics"][f"{arm}/ppl"] < 1e4
    assert all(math.isfinite(x) for x in result["metrics"].values()) and set(result["tried"]) == set(arms)
    assert all((run.out / name).read_bytes().startswith(b"\x89PNG") for name in ("plot.png", "mse.png"))
    learned = load_file(run.out / "learned.safetensors")
    assert {key.split(".")[0] for key in learned} == set(arms) - {"rtn"}
    log = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert {line["name"] for line in log} == {"tiny", "blocks"}


def test_kill_and_resume(kill_and_resume):
    kill_and_resume("flatquant", seed=1)


def test_ctrl_c_at_any_time(here, smoke, monkeypatch, capsys):
    """Stopped in training and after a block: exit status 130, the command to go on, and the same bits at the end."""
    checks, original = [], m.should_stop
    monkeypatch.setattr(m, "should_stop", lambda run: checks.append(0) or len(checks) in (2, 7))
    monkeypatch.setattr(m.sys, "argv", ["flatquant.py", *SMOKE])
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit) as stop:
            m.main([*SMOKE, *more])
        command = re.search(r"continue with: (.*)", capsys.readouterr().out)[1]
        assert stop.value.code == 130 and shlex.split(command) == ["python", "flatquant.py", *SMOKE, "--resume"]
    result, whole = m.main([*SMOKE, "--resume"]), smoke("flatquant")
    assert result["metrics"] == whole.result["metrics"] and len(checks) == 8 and original
    for name in ("learned", "tiny"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (next(here.glob("out/*/*")), whole.out))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_blocks_apart_are_the_whole(here, smoke, monkeypatch):
    """--layers 0:1 and 1:2, put together by --load: to the bit what one run learns and measures."""
    whole = smoke("flatquant")
    for name, layers in (("a", "0:1"), ("b", "1:2")):
        m.main([*SMOKE, "--layers", layers, "--out", name])
        assert not (here / name / "result.json").exists()
    learned, parts = load_file(whole.out / "learned.safetensors"), {}
    for name, block in (("a", "0"), ("b", "1")):
        part = load_file(here / name / "learned.safetensors")
        assert {key.split(".")[1] for key in part} == {block}
        parts |= part
    assert parts.keys() == learned.keys() and all(torch.equal(parts[k], learned[k]) for k in parts)
    monkeypatch.setattr(m, "ledger", lambda *_: None)
    monkeypatch.setattr(m, "calibrate", lambda *_: pytest.fail("calibrated what was loaded"))
    result = m.main([*SMOKE, "--load", "a,b", "--out", "c"])
    assert result["metrics"] == whole.result["metrics"]
    assert (here / "c" / "learned.safetensors").read_bytes() == (whole.out / "learned.safetensors").read_bytes()


def caught(monkeypatch):
    """What generate_text hands to generate: [(model, prompts), ...]."""
    calls, original = [], m.generate
    monkeypatch.setattr(m, "generate", lambda model, prompts, *a: calls.append((model, prompts))
                        or original(model, prompts, *a))
    return calls, original


@kinds
@pytest.mark.parametrize("arm", ["smoothquant", "hadamard", "hadamard_lct", "flatquant"])
def test_packed_is_merged(arm, kind, here, monkeypatch, capsys):
    """--save and --load in four bits, keys and values too: to the bit the logits of the merged model."""
    model, (calls, original) = network(kind, factor=8.0), caught(monkeypatch)
    cfg = m.Config(arms=f"rtn,{arm},rtn" if 0 else f"{arm},rtn", save="q", k_bits=4, v_bits=4)
    (x, turn), learned = inputs_of(model), {}
    for i, layer in enumerate(model.layers):
        largest = m.largest_inputs(m.site_inputs(layer, x, turn)[1])
        student = m.make_student(cfg, model.shape, arm, layer, i, largest)
        student.load_state_dict({k: v + 0.1 for k, v in student.state_dict().items() if "raw" in k or "clip" in k},
                                strict=False)
        learned[f"{arm}.{i}"] = {k: v.clone() for k, v in student.state_dict().items() if k.startswith(("pairs", "c"))}
    merged = copy.deepcopy(model)
    merged.layers = torch.nn.ModuleList(
        m.make_student(cfg, model.shape, arm, layer, i, learned=learned[f"{arm}.{i}"]).merge()
        for i, layer in enumerate(model.layers))
    m.save_packed(cfg, model, learned, kind | dict(tokenizer=""))
    m.main(["--load", "q", "--generate", "Gravity", "--max-new", "5"])
    ids = torch.tensor([list(b"Gravity"), list(b"is here")])
    assert torch.equal(calls[0][0](ids), merged(ids)) and calls[0][1] == [list(b"Gravity")]
    new = bytes(original(merged, [list(b"Gravity")], 5)[0]).decode(errors="replace")
    assert capsys.readouterr().out.splitlines()[1:] == f"Gravity{new}".splitlines()
    packed = load_file(here / "q" / "model.safetensors")
    assert packed["layers.0.up_proj.codes"].dtype == torch.uint8 and packed["layers.0.up_proj.codes"].shape == (80, 24)
    settings = json.loads((here / "q" / "config.json").read_text())["flatquant"]
    assert settings == dict(arm=arm, w_bits=4, a_bits=4, k_bits=4, v_bits=4)


def test_save_then_generate(here, monkeypatch, capsys):
    """Through main, with keys and values in four bits: the model that was measured continues the prompt."""
    calls, _ = caught(monkeypatch)
    argv = [*SMOKE, "--arms", "rtn,flatquant", "--k-bits", "4", "--v-bits", "4", "--save", "q", "--out", "o"]
    result = m.main(argv)
    learned = load_file(here / "o" / "learned.safetensors")
    assert {"flatquant.1.pairs.key.0.raw", "flatquant.0.clip_a.k", "flatquant.0.clip_a.v"} <= learned.keys()
    capsys.readouterr()
    m.main(["--load", "q", "--generate", "Gravity is", "--max-new", "3"])
    assert capsys.readouterr().out.startswith("Gravity is")
    ids = m.windows(m.documentation(1), m.encode_bytes, 16, 2, "eval")
    loss = F.cross_entropy(calls[0][0](ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.exp().item() == pytest.approx(result["metrics"]["flatquant/ppl"], rel=0.02)


@pytest.mark.parametrize("argv, words", [
    ("--colour red", ["--colour"]),
    ("--arms awq", ["--arms", "flatquant", "hadamard_lct"]),
    ("--arms rtn,rtn", ["--arms"]),
    ("--task real", ["--task real", "--model"]),
    ("--generate x", ["--generate", "--load"]),
    ("--w-bits 1", ["--w-bits", "at least 2"]),
    ("--a-bits 17", ["--a-bits", "16"]),
    ("--v-bits 0", ["--v-bits", "at least 2"]),
    ("--layers nonsense", ["--layers nonsense", "0:10"]),
    ("--scale smoke --layers 5:9", ["--layers 5:9"]),
    ("--scale smoke --layers 0:5", ["--layers 0:5"]),
    ("--scale smoke --layers 1:1", ["--layers 1:1"]),
    ("--scale smoke --data missing.txt", ["--data", "missing.txt"]),
    ("--scale smoke --test-data missing.txt", ["--test-data", "missing.txt"]),
    ("--load nowhere", ["--load", "nowhere"]),
    ("--load nowhere --generate x", ["--load", "nowhere", "--save"]),
    ("--save q --w-bits 8", ["--save", "--w-bits"]),
    ("--save q --arms rtn", ["--save", "--arms"]),
    ("--scale smoke --save q --layers 0:1", ["--save", "--layers"]),
    ("--outliers 0", ["--outliers"]),
    ("--n-eval 1", ["--n-eval"]),
    ("--epochs 0", ["--epochs", "at least 1"]),
    ("--device cuda", ["--device cuda", "auto"]),
    ("--scale smoke --n-calib 100000", ["100000 windows", "calib"]),
])
def test_wrong_flags(rejects, argv, words):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    rejects(m.main, argv.split(), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_kernels_need_cuda(rejects):
    rejects(m.main, ["--kernels"], "--kernels", "CUDA")


def test_bad_files(rejects, tmp_path):
    """Too short or no text, no calibrated blocks, and files with other tensors than they should hold."""
    (short := tmp_path / "short.txt").write_text("too short")
    (binary := tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    rejects(m.main, [*SMOKE, "--data", short], "9 tokens", "32")
    rejects(m.main, [*SMOKE, "--test-data", binary], "--test-data", "UTF-8")
    rejects(m.main, [*SMOKE, "--data", tmp_path], "--data")
    (empty := tmp_path / "empty").mkdir()
    rejects(m.main, [*SMOKE, "--load", empty], "--load", "empty")
    (other := tmp_path / "other").mkdir()
    (other / "learned.safetensors").write_bytes(b"no tensors")
    rejects(m.main, [*SMOKE, "--load", other], "--load", "other")
    save_file({"weight": torch.ones(2)}, other / "learned.safetensors")
    rejects(m.main, [*SMOKE, "--load", other], "--load", "other")
    (other / "config.json").write_text("{")
    rejects(m.main, ["--generate", "x", "--load", other], "--load", "other", "--save")


def test_blocks_of_another_run_are_refused(rejects, smoke):
    """Learned for 16-bit keys, asked for with four bits: the transform of the keys was never learned."""
    rejects(m.main, [*SMOKE, "--k-bits", "4", "--load", smoke("flatquant").out], "--load")


def test_processes_do_not_share_a_block(rejects, monkeypatch):
    """torchrun with two ranks: an error before anything is waited for or written."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(m.dist, "init_process_group", lambda *_: pytest.fail("waits for the other process"))
    rejects(m.main, SMOKE, "--layers", "--load")


def test_out_directory_that_holds_a_run(rejects, smoke):
    rejects(m.main, [*SMOKE, "--out", smoke("flatquant").out], "finished run", "--out")


def test_dry_run_prints_and_creates_nothing(here, capsys):
    """The paper's scale is LLaMA-3-8B: 218,112,000 numbers a block; only what learns has learned numbers."""
    m.main(["--scale", "paper", "--dry-run"])
    lines = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert all("32 blocks of 218,112,000 weights" in lines[arm] for arm in m.Config.arms.split(","))
    assert "and 0 learned" in lines["hadamard"] and "and 0 learned" not in lines["flatquant"]
    assert "GiB" in lines["flatquant"] and "hours" in lines["flatquant"] and list(here.rglob("*")) == []
