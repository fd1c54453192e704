# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""convattn.py: score convolution against index loops, causality, blocks of queries, data, learning, command line."""
import functools
import gc
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import convattn as m
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("one_thread")

SMOKE = ["--scale", "smoke"]
TEXT, CHE = ("--task", "text", "--arms", "kerple+1x3,rope"), ("--task", "che", "--arms", "kerple+1x3,kerple")
TINY = dict(n_head=2, n_embd=8, conv_width=3, seq_len=6, eval_lens="128,256")
CPU = torch.device("cpu")
KERNELS, EDGES = (1, 3, 5), ("extend", "official")
each_kernel, each_edge = pytest.mark.parametrize("k", KERNELS), pytest.mark.parametrize("edge", EDGES)
each_encoding = pytest.mark.parametrize("encoding", m.ENCODINGS)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An empty directory, which is the current one; no plots and no measured matmuls (the smoke run has them)."""
    (work := tmp_path / "work").mkdir()
    for name in ("plot_lengths", "ledger"):
        monkeypatch.setattr(m, name, lambda *_: None)
    monkeypatch.chdir(work)
    return work


def config(**changes):
    return m.Config(**{"task": "text", **TINY, **changes})


def randomised(module):
    """fp64, every parameter random and of order one; Kerple's stay positive."""
    for name, p in module.double().named_parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 and "wte" not in name else 0.5
        p.data = torch.rand_like(p) + 0.1 if re.search(r"\br[12]$", name) else torch.randn_like(p) * scale
    return module


def network(arm, **changes):
    """An arm's network in fp64 with random weights, always the same."""
    torch.manual_seed(0)
    return randomised(m.Network(config(arms=arm, **changes), arm, 16)).eval()


def score_conv_module(channels, H=2, W=3, k=3, edge="extend", slope=0.01):
    return randomised(m.ScoreConv(channels, H, W, k, SimpleNamespace(slope=slope, edge=edge, kernels=False)))


def queries(H=2, T=7, d=4, B=2, rows=None):
    """q of the last `rows` positions, k, v in fp64, and their positions."""
    rows = rows or T
    q, k, v = (torch.randn(B, H, n, d).double() for n in (rows, T, T))
    return q, k, v, torch.arange(T - rows, T)


def loss_of(dtype):
    return functools.partial(m.loss_sum, SimpleNamespace(device=CPU, dtype=dtype))


def past(T):
    return torch.ones(T, T).tril().bool()


def bias_module(encoding, H=2, seq_len=6):
    return randomised(m.BIASES[encoding](H, seq_len)) if encoding in m.BIASES else None


# ---------------------------------------------------------------- plain references
def plain_bias(encoding, bias, i, j, seq_len=6):
    """R (H,) of query i and key j <= i, from the table of encodings."""
    t = i - j
    if encoding == "alibi":  # of two heads
        return [-(2**-4) * t, -(2**-8) * t]
    if encoding == "kerple":
        return [-r1 * math.log(1 + r2 * t) for r1, r2 in zip(bias.r1.tolist(), bias.r2.tolist())]
    c, far = bias.c.item(), abs(bias.m.item() * (seq_len // 2))
    ratio = math.log(abs(c * t) + 1) / (math.log(abs(c * max(i, far)) + 1) + 1e-6)
    first, last = (layer for layer in bias.mlp if hasattr(layer, "weight"))
    hidden = [max(0.0, w * ratio + b) for (w,), b in zip(first.weight.tolist(), first.bias.tolist())]
    return [sum(w * h for w, h in zip(row, hidden)) + b for row, b in zip(last.weight.tolist(), last.bias.tolist())]


def plain_conv(x, weights, edge, slope=0.01, causal=True):
    """F[h][i][j] from x[c][i][j], index by index: hidden columns j - p..j + p of columns j - 2p..j + 2p."""
    w1, b1, w2, b2 = weights
    p, T, C, H, W = len(w1[0][0][0]) // 2, len(x[0]), len(x), len(w2), len(w1)

    def entry(c, i, j):
        return x[c][i][j] if 0 <= j < T and (j <= i or not causal) else 0.0

    def hidden(w, i, j):
        end = T + p if edge == "extend" and causal else T
        if not 0 <= j < end:
            return 0.0
        y = b1[w] + sum(w1[w][c][0][e + p] * entry(c, i, j + e) for c in range(C) for e in range(-p, p + 1))
        return y if y > 0 else slope * y

    def f(h, i, j, g):
        return b2[h] + sum(w2[h][w][0][e + p] * g[w, j + e] for w in range(W) for e in range(-p, p + 1))

    result = [[] for _ in range(H)]
    for i in range(T):
        g = {(w, j): hidden(w, i, j) for w in range(W) for j in range(-p, T + p)}
        for h in range(H):
            result[h].append([f(h, i, j, g) for j in range(T)])
    return result


def plain_attention(q, k, v, r, conv, edge, causal=True):
    """One sequence: q, k, v[h][i] lists, r[h][i][j] or None, conv None or weights as lists; o[h][i]."""
    H, T, d = len(q), len(q[0]), len(q[0][0])
    s = [[[sum(a * b for a, b in zip(q[h][i], k[h][j])) / math.sqrt(d) for j in range(T)] for i in range(T)]
         for h in range(H)]
    f = plain_conv(s + (r or []), conv, edge, causal=causal) if conv else None
    out = [[[0.0] * d for _ in range(T)] for _ in range(H)]
    for h, i in itertools.product(range(H), range(T)):
        keys = range(i + 1 if causal else T)
        a = [s[h][i][j] + (r[h][i][j] if r else 0) + (f[h][i][j] if f else 0) for j in keys]
        e = [math.exp(x - max(a)) for x in a]
        for j in keys:
            for c in range(d):
                out[h][i][c] += e[j] / sum(e) * v[h][j][c]
    return out


def weights_of(conv):
    return [p.tolist() for p in (conv.conv1.weight, conv.conv1.bias, conv.conv2.weight, conv.conv2.bias)]


def official(s, r, conv):
    """A of the official module: concat, tril of all channels, two Conv2d with padding, residual. (official code)"""
    x = s if r is None else torch.cat([s, r.expand(len(s), -1, -1, -1)], 1)
    p = conv.conv1.kernel_size[1] // 2
    hidden = F.leaky_relu(F.conv2d(x.tril(), conv.conv1.weight, conv.conv1.bias, padding=(0, p)), 0.01)
    f = F.conv2d(hidden, conv.conv2.weight, conv.conv2.bias, padding=(0, p))
    return s + f if r is None else s + r + f


# ---------------------------------------------------------------- the formula
@each_kernel
@each_edge
@pytest.mark.parametrize("with_bias", [False, True])
def test_score_conv_is_the_index_form(k, edge, with_bias):
    """(official code) F[h,i,j] by loops over w, c and both e, to fp64; without a mask too."""
    T = 6
    s, r = torch.randn(2, 2, T, T).double(), torch.randn(2, T, T).double() if with_bias else None
    conv = score_conv_module(4 if with_bias else 2, k=k, edge=edge)
    for causal in (True, False):
        got = conv(s, r, past(T) if causal else None, T)
        for b in range(2):
            x = s[b].tolist() + (r.tolist() if with_bias else [])
            wanted = torch.tensor(plain_conv(x, weights_of(conv), edge, causal=causal), dtype=torch.float64)
            assert got.shape == s.shape and torch.allclose(got[b], wanted, rtol=1e-12, atol=1e-12)


@each_encoding
@each_edge
@pytest.mark.parametrize("k", [0, *KERNELS])
def test_attention_of_a_block_is_the_formula(encoding, k, edge):
    """(official code) S scaled, rotated first (rope), R, F, mask, softmax, values: one sequence by loops."""
    T, d = 5, 4
    block = network(encoding + (f"+1x{k}" if k else ""), edge=edge).blocks[0]
    x, at = torch.randn(1, T, 8).double(), torch.arange(T)
    q, key, v = F.linear(x[0], block.qkv.weight, block.qkv.bias).view(T, 3, 2, d).permute(1, 2, 0, 3).tolist()
    if encoding == "rope":
        for h, i in itertools.product(range(2), range(T)):
            for vectors in (q, key):
                pairs = [complex(vectors[h][i][c], vectors[h][i][c + 2]) for c in range(2)]
                turned = [z * complex(math.cos(a), math.sin(a)) for z, a in zip(pairs, (i, i / 100))]
                vectors[h][i] = [z.real for z in turned] + [z.imag for z in turned]
    r = None
    if encoding in m.BIASES:
        table = [[plain_bias(encoding, block.bias, i, min(i, j)) for j in range(T)] for i in range(T)]
        r = [[[table[i][j][h] for j in range(T)] for i in range(T)] for h in range(2)]
    wanted = plain_attention(q, key, v, r, weights_of(block.conv) if k else None, edge)
    got = block.attention(x, at, None)[0]
    assert torch.allclose(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("encoding", ["nope", "rope", "kerple"])
def test_keyconv_is_a_convolution_of_the_keys(encoding):
    """(our choice) k_j + b + sum_e w_e k_{j-2+e}, each channel for itself, zeros ahead of the first; before RoPE."""
    T, arm = 6, network(f"{encoding}+keyconv").blocks[0]
    x, at = torch.randn(1, T, 8).double(), torch.arange(T)
    got, (w, b) = arm.attention(x, at, None), (p.detach() for p in arm.keyconv.parameters())
    keys = F.linear(x[0], arm.qkv.weight[8:16], arm.qkv.bias[8:16])  # (T, d)
    late = keys.clone()
    for j, c in itertools.product(range(T), range(8)):
        late[j, c] = keys[j, c] + b[c] + sum(w[c, 0, e] * keys[j - 2 + e, c] for e in range(3) if j - 2 + e >= 0)
    q, _, v = F.linear(x, arm.qkv.weight, arm.qkv.bias).view(1, T, 3, 2, 4).permute(2, 0, 3, 1, 4)
    k = late.view(1, T, 2, 4).transpose(1, 2)
    q, k = (m.rotate(q, at), m.rotate(k, at)) if encoding == "rope" else (q, k)
    assert torch.allclose(got, m.attend(q, k, v, at, arm.bias, None, T), atol=1e-6)


@each_kernel
@pytest.mark.parametrize("encoding", ["nope", "kerple"])
def test_encoder_sees_both_sides(k, encoding):
    """(our choice) che: no mask, zeros at both ends, distances without a sign."""
    block, T = network(f"{encoding}+1x{k}", task="che", eval_lens="7,9").blocks[0], 5
    x = torch.randn(1, T, 8).double()
    q, key, v = F.linear(x[0], block.qkv.weight, block.qkv.bias).view(T, 3, 2, 4).permute(1, 2, 0, 3).tolist()
    r = None
    if encoding == "kerple":
        r = [[[plain_bias("kerple", block.bias, abs(i - j), 0)[h] for j in range(T)] for i in range(T)]
             for h in range(2)]
    wanted = plain_attention(q, key, v, r, weights_of(block.conv), "extend", causal=False)
    got = block.attention(x, torch.arange(T), None)[0]
    assert torch.allclose(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@each_kernel
@pytest.mark.parametrize("with_bias", [False, True])
def test_edge_official_is_the_official_module(k, with_bias):
    """(official code) To fp64 on the causal half; extend differs from it in the last p rows and nowhere else."""
    T, p = 9, k // 2
    s, r = torch.randn(2, 2, T, T).double(), torch.randn(2, T, T).double() if with_bias else None
    conv, seen = score_conv_module(4 if with_bias else 2, k=k, edge="official"), past(T)
    wanted = official(s, r, conv)
    for edge in EDGES:
        conv.edge = edge
        a = s + (r if with_bias else 0) + conv(s, r, seen, T)
        error = ((a - wanted).abs() * seen).amax((0, 1, 3))  # by row
        assert (error[: T - p] < 1e-12).all()
        assert (error[T - p :] < 1e-12).all() if edge == "official" else (error[T - p :] > 1e-4).all()


@pytest.mark.parametrize("encoding", ["nope", "kerple"])
def test_1x1_is_the_mlp_of_v1(encoding):
    """(official code) Two linear layers over the channels of each pair; and 1x3 with the centre taps alone."""
    T, C = 6, 2 if encoding == "nope" else 4
    s, r = torch.randn(2, 2, T, T).double(), torch.randn(2, T, T).double() if C == 4 else None
    one, three = score_conv_module(C, k=1), score_conv_module(C, k=3)
    x = (s if r is None else torch.cat([s, r.expand(2, -1, -1, -1)], 1)).movedim(1, -1)
    hidden = F.leaky_relu(F.linear(x, one.conv1.weight[:, :, 0, 0], one.conv1.bias), 0.01)
    wanted = F.linear(hidden, one.conv2.weight[:, :, 0, 0], one.conv2.bias).movedim(-1, 1)
    got = one(s, r, past(T), T)
    assert torch.allclose((got - wanted) * past(T), torch.zeros(1).double(), atol=1e-12)
    for ours, theirs in ((three.conv1, one.conv1), (three.conv2, one.conv2)):
        ours.weight.data.zero_()
        ours.weight.data[..., 1:2], ours.bias.data = theirs.weight.data, theirs.bias.data
    assert torch.allclose(three(s, r, past(T), T), got, atol=1e-12)


def test_parameter_counts():
    """3,500 and 1,196 a layer for 12 heads and width 32 with a bias, 4,656 for 16 heads; without one H channels."""
    def count(arm, heads=12):
        block = m.Block(m.Config(n_head=heads, n_embd=4 * heads), arm)
        return sum(p.numel() for p in block.conv.parameters()) if block.conv else 0

    wanted = {"kerple+1x3": 3500, "kerple+1x1": 1196, "alibi+1x3": 3500, "fire+1x3": 3500, "nope+1x3": 2348,
              "rope+1x1": 812, "kerple": 0, "kerple+1x3w64": 6988}
    assert {arm: count(arm) for arm in wanted} == wanted and count("kerple+1x3", 16) == 4656
    nets = [m.Network(config(n_layer=3), arm, 16) for arm in ("kerple+1x3", "kerple", "kerple+1x3@2")]
    assert [len(net.blocks) for net in nets] == [3, 3, 2]
    sizes = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert sizes[0] - sizes[1] == 3 * (3 * 4 * 3 + 3 + 2 * 3 * 3 + 2)  # a module of its own in each layer


# ---------------------------------------------------------------- causality, lengths, caches
@pytest.mark.parametrize("n_layer", [1, 3])
@pytest.mark.parametrize("arm", ["nope+1x3", "kerple+1x5", "alibi+1x1", "fire+1x3", "rope+1x7", "nope+keyconv"])
@pytest.mark.parametrize("chunk", [64, 3])
def test_no_token_reaches_an_earlier_output(arm, n_layer, chunk):
    """Another token at m: outputs before it stay, it and the last one change."""
    model, ids = network(arm, n_layer=n_layer, chunk=chunk), torch.randint(15, (2, 10))
    before = model(ids)
    for place in (1, 5, 9):
        other = ids.clone()
        other[:, place] = 15
        change = (model(other) - before).abs().amax((0, 2))
        assert change[:place].max() < 1e-6 and change[place] > 1e-4 and change[-1] > 1e-6


@each_kernel
@each_edge
def test_jacobian_is_causal(k, edge):
    """Row i does not depend on keys and values j > i: exact zeros; and it depends on all others."""
    q, key, v, at = queries(T=6, d=2, B=1)
    conv, bias = score_conv_module(4, k=k, edge=edge), bias_module("kerple")
    for which in (0, 1):
        def out(x):
            return m.attend(q, *((x, v) if which == 0 else (key, x)), at, bias, conv, 6).sum((0, 1, 3))

        jacobian = torch.autograd.functional.jacobian(out, (key, v)[which]).abs().amax((1, 2, 4))  # (i, j)
        assert (jacobian.triu(1) == 0).all() and (jacobian[past(6)] > (0 if which else 1e-9)).sum() >= 20


@each_kernel
def test_without_the_mask_before_the_convolution_rows_see_2p_ahead(k):
    """The classic mistake, masked only after the convolution: row i reads keys up to i + 2p, exactly."""
    T, p = 9, k // 2
    q, key, v, _ = queries(T=T, B=1)
    conv = score_conv_module(2, k=k)
    weights = conv.conv1.weight, conv.conv1.bias, conv.conv2.weight, conv.conv2.bias

    def out(x):
        s = q / 2 @ x.mT
        a = s + m.score_conv(s, None, *weights)
        return (a.masked_fill(~past(T), -math.inf).softmax(-1) @ v).sum((0, 1, 3))

    reached = torch.autograd.functional.jacobian(out, key).abs().amax((1, 2, 4)) > 1e-12  # (i, j)
    for i in range(1, T):
        assert reached[i].nonzero().max() == min(i + 2 * p, T - 1), i


@pytest.mark.parametrize("arm", ["nope+1x3", "kerple+1x5", "fire+1x1", "rope", "nope+keyconv", "alibi+1x3@2"])
@pytest.mark.parametrize("chunk", [64, 3])
def test_outputs_do_not_depend_on_the_length(arm, chunk):
    """(our choice) edge extend: all T outputs of a prefix are those of the whole input."""
    model, ids = network(arm, chunk=chunk), torch.randint(16, (2, 11))
    whole = model(ids)
    for T in (1, 2, 4, 10):
        assert torch.allclose(model(ids[:, :T]), whole[:, :T], atol=1e-6), T


@each_kernel
@pytest.mark.parametrize("chunk", [64, 4])
def test_edge_official_depends_on_the_length_in_the_last_rows(k, chunk):
    """(official code) One layer: exactly the last p rows of a prefix differ."""
    model, ids, p = network(f"kerple+1x{k}", edge="official", chunk=chunk), torch.randint(16, (2, 13)), k // 2
    whole = model(ids)
    for T in (6, 9):
        error = (model(ids[:, :T]) - whole[:, :T]).abs().amax((0, 2))
        assert (error[: T - p] < 1e-6).all() and (error[T - p :] > 1e-5).all()


ARMS = ["nope", "rope", "alibi", "kerple", "fire", "nope+1x3", "rope+1x3", "alibi+1x1", "kerple+1x5", "fire+1x3",
        "nope+keyconv", "rope+keyconv", "kerple+keyconv@3", "kerple+1x3@2"]


@pytest.mark.parametrize("arm", ARMS)
def test_cached_decoding_is_the_whole_pass(arm):
    """Keys and values alone are cached: token by token, and behind a prompt in blocks, then two at once."""
    model, ids = network(arm, chunk=3), torch.randint(16, (2, 9))
    whole = model(ids)
    for cuts in (range(10), (0, 5, 6, 8, 9)):
        cache = torch.full((len(model.blocks), 2, 2, 2, 12, 4), math.nan).double()
        for start, stop in itertools.pairwise(cuts):
            got = model(ids[:, start:stop], cache=cache, start=start)
            assert torch.allclose(got, whole[:, start:stop], atol=1e-6), (start, stop)
        assert cache[..., 9:, :].isnan().all() and not cache[..., :9, :].isnan().any()


def test_asked_positions_are_picked_from_the_logits():
    model, ids = network("kerple+1x3"), torch.randint(16, (3, 8))
    asked = torch.rand(3, 8) < 0.4
    assert torch.allclose(model(ids, asked), model(ids)[asked], atol=1e-12)


# ---------------------------------------------------------------- what the convolution can and cannot do
@pytest.mark.parametrize("encoding", m.ENCODINGS)
def test_conv2_of_zeros_is_the_baseline_to_the_bit(encoding):
    plain, conv = network(encoding, n_layer=2), network(f"{encoding}+1x3", n_layer=2)
    missing = conv.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(".conv." in name for name in missing.missing_keys)
    ids = torch.randint(16, (2, 10))
    assert not torch.allclose(conv(ids), plain(ids), atol=1e-3)
    for block in conv.blocks:
        block.conv.conv2.weight.data.zero_()
        block.conv.conv2.bias.data.zero_()
    assert torch.equal(conv(ids), plain(ids))


@each_kernel
def test_b2_is_dead_and_b1_is_not(k):
    """It shifts a whole row of a head, which the softmax takes out again."""
    model, ids = network(f"kerple+1x{k}"), torch.randint(16, (2, 10))
    conv = model.blocks[0].conv
    before = model(ids)
    (before * torch.randn_like(before)).sum().backward()
    assert conv.conv2.bias.grad.abs().max() < 1e-5 and conv.conv1.bias.grad.abs().max() > 1e-2
    conv.conv2.bias.data += torch.tensor([3.0, -2.0])
    assert torch.allclose(model(ids), before, atol=1e-5)
    conv.conv1.bias.data += 0.5
    assert not torch.allclose(model(ids), before, atol=1e-3)


@pytest.mark.parametrize("k", [3, 5])
def test_slope_1_is_attention_with_mixed_convolved_keys(k):
    """Away from the edges: q of all heads with keys convolved by w2 * w1, plus a constant for each head."""
    T, p, (q, key, _, _) = 16, k // 2, queries(T=16)
    conv = score_conv_module(2, k=k, slope=1.0)
    w1, w2 = conv.conv1.weight[:, :, 0], conv.conv2.weight[:, :, 0]  # (W, H, k), (H, W, k)
    mix = torch.zeros(2, 2, 2 * k - 1).double()  # (to head, from head, shift + 2p)
    for e, f in itertools.product(range(k), range(k)):
        mix[:, :, e + f] += w2[:, :, f] @ w1[:, :, e]
    convolved = torch.zeros(2, 2, 2, T, 4).double()  # (B, to head, from head, T, d)
    for j, shift in itertools.product(range(2 * p, T - 2 * p), range(-2 * p, 2 * p + 1)):
        convolved[:, :, :, j] += mix[None, :, :, shift + 2 * p, None] * key[:, None, :, j + shift]
    s = q @ key.mT / 2
    wanted = s + torch.einsum("bcid,bhcjd->bhij", q, convolved) / 2
    wanted = wanted + (conv.conv2.bias + w2.sum(2) @ conv.conv1.bias)[:, None, None]
    got, inner = s + conv(s, None, past(T), T), torch.zeros(T, T).bool()
    for i in range(T):
        inner[i, 2 * p : max(2 * p, i - 2 * p + 1)] = True
    assert inner.sum() > 20 and ((got - wanted).abs() * inner).max() < 1e-12
    conv.slope = 0.01
    assert ((s + conv(s, None, past(T), T) - wanted).abs() * inner).max() > 0.01


@pytest.mark.parametrize("T", [8, 64, 512])
def test_hand_set_weights_recall_at_any_length(T):
    """One head, no positions: hidden channels S_{j-1} and S_j, F = their difference, so that A_j = S_{j-1}."""
    conv = score_conv_module(1, H=1, W=2)
    for p in conv.parameters():
        p.data.zero_()
    conv.conv1.weight.data[0, 0, 0, 0] = conv.conv1.weight.data[1, 0, 0, 1] = 1  # taps j - 1 and j
    conv.conv2.weight.data[0, :, 0, 1] = torch.tensor([1.0, -1.0])
    batch = m.recall_batch(6, T, torch.Generator().manual_seed(3))
    code = F.one_hot(batch["ids"], m.KEYS + m.VALUES).double()[:, None]  # (B, 1, T, 288)
    key = code * (torch.arange(m.KEYS + m.VALUES) < m.KEYS) * 30
    for chunk in (T, 100):
        out = m.attend_in_blocks(key * 288**0.5, key / 30, code, torch.arange(T), None, conv, chunk)
        assert m.hits(lambda ids: out[:, 0], batch, CPU).tolist() == [1.0] * 6
    plain = m.attend(key * 288**0.5, key / 30, code, torch.arange(T), None, None, T)[:, 0]
    assert m.hits(lambda ids: plain, batch, CPU).mean() == 0


def test_1x1_cannot_tell_the_order_of_the_context():
    """One layer without positions: the last row is the same for any order of what stands before; not so for 1x3."""
    ids = torch.randint(16, (2, 10))
    order = torch.cat([torch.randperm(9), torch.tensor([9])])
    for arm, same in (("nope", True), ("nope+1x1", True), ("nope+1x3", False), ("kerple+1x1", False),
                      ("nope+keyconv", False), ("nope+1x1@2", False)):
        model = network(arm)
        assert torch.allclose(model(ids)[:, -1], model(ids[:, order])[:, -1], atol=1e-5) == same, arm


@each_kernel
def test_heads_can_be_permuted(k):
    """With the channels of both convolutions and the heads of the bias: all heads mix, none is special."""
    H, order = 4, torch.tensor([2, 0, 3, 1])
    q, key, v, at = queries(H=H)
    conv, bias = score_conv_module(2 * H, H=H, k=k), bias_module("kerple", H)
    before = m.attend(q, key, v, at, bias, conv, 7)
    conv.conv1.weight.data = conv.conv1.weight.data[:, torch.cat([order, H + order])]
    conv.conv2.weight.data, conv.conv2.bias.data = conv.conv2.weight.data[order], conv.conv2.bias.data[order]
    bias.r1.data, bias.r2.data = bias.r1.data[order], bias.r2.data[order]
    after = m.attend(q[:, order], key[:, order], v[:, order], at, bias, conv, 7)
    assert torch.allclose(after, before[:, order], atol=1e-6) and not torch.allclose(after, before, atol=1e-2)
    conv.conv1.weight.data[:, :H] = conv.conv1.weight.data[:, order]
    other = m.attend(q[:, order], key[:, order], v[:, order], at, bias, conv, 7)
    assert not torch.allclose(other, after, atol=1e-3)


# ---------------------------------------------------------------- blocks of queries
@pytest.mark.parametrize("chunk", [1, 3, 5, 12])
@pytest.mark.parametrize("encoding, k, edge, causal", [
    ("kerple", 3, "extend", True), ("kerple", 3, "official", True), ("fire", 5, "extend", True),
    ("nope", 5, "official", True), ("alibi", 1, "extend", True), ("kerple", 0, "extend", True),
    ("kerple", 3, "extend", False), ("nope", 5, "official", False)])
def test_blocks_are_exact(chunk, encoding, k, edge, causal):
    """Values and the gradients of q, k, v, both convolutions and the bias, for blocks that do not divide 13; also
    for queries of the last 8 positions alone."""
    conv = score_conv_module(2 if encoding == "nope" else 4, k=k, edge=edge) if k else None
    bias = bias_module(encoding)
    for rows in (13, 8):
        *qkv, at = queries(T=13, rows=rows)
        learned = [p for module in (conv, bias) if module for p in module.parameters()]
        leaves, g = [x.requires_grad_() for x in qkv] + learned, torch.randn(2, 2, rows, 4).double()
        whole = m.attend(*qkv, at, bias, conv, 13, causal)
        parts = m.attend_in_blocks(*qkv, at, bias, conv, chunk, causal)
        assert torch.allclose(parts, whole, atol=1e-6)
        for ours, theirs in zip(*(torch.autograd.grad((x * g).sum(), leaves) for x in (parts, whole))):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_are_finite_differences():
    """Blocks of 3, edge extend, Kerple: along a random direction of each tensor."""
    *qkv, at = queries(T=7)
    conv, bias, g = score_conv_module(4), bias_module("kerple"), torch.randn(2, 2, 7, 4).double()
    leaves = [x.requires_grad_() for x in qkv] + [*conv.parameters(), *bias.parameters()]

    def loss():
        return (m.attend_in_blocks(*qkv, at, bias, conv, 3) * g).sum()

    for p, gradient in zip(leaves, torch.autograd.grad(loss(), leaves)):
        direction, home, found = torch.randn_like(p), p.data, []
        for step in (1e-3, -1e-3):  # probabilities are fp32
            p.data = home + step * direction
            found.append(loss().item())
        p.data, slope = home, (gradient * direction).sum().item()
        assert (found[0] - found[1]) / 2e-3 == pytest.approx(slope, rel=0.02, abs=2e-3)


class Created(TorchDispatchMode):
    """The sizes of all tensors that are made, in the forward and the backward pass."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(x):
                self.shapes.add(tuple(x.shape))
        return result


def test_blocks_keep_little_memory():
    """T 512, 12 heads, width 32: at most an eighth of the bytes is kept for backward; nothing has T x T entries."""
    H, T, kept, shapes = 12, 512, {}, {}
    q, key, v = (torch.randn(1, H, T, 8, requires_grad=True) for _ in range(3))
    conv, bias = score_conv_module(2 * H, H=H, W=32).float(), m.Kerple(H, T)
    for name, chunk in (("dense", T), ("blocks", 64)):
        saved = {}

        def pack(x):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with Created() as created, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = m.attend_in_blocks(q, key, v, torch.arange(T), bias, conv, chunk)
            kept[name] = sum(saved.values()) + sum(x.nbytes for x in (q, key, v)) * (name == "blocks")
            out.sum().backward()
        shapes[name] = created.shapes
        gc.collect()
    assert kept["dense"] > 4 * T * T * (4 * H + 32) and kept["blocks"] < kept["dense"] / 8
    large = {name: [s for s in found if len(s) > 1 and s[-1] >= T and s[-2] >= T] for name, found in shapes.items()}
    assert large["blocks"] == [] and len(large["dense"]) > 2
    assert {s[-1] for s in shapes["blocks"] if s[:-1] == (1, H, 64)} >= {64 * n for n in range(1, 9)}  # no later keys
    assert 64 * T * 32 <= max(map(math.prod, shapes["blocks"])) < 1.1 * 64 * T * 32


@each_kernel
@pytest.mark.parametrize("encoding", ["nope", "kerple", "alibi"])
def test_kernel_is_given_the_same_problem(k, encoding, monkeypatch):
    """A stand-in for kernels.score_conv: scores, biases by distance, weights, first row, slope to the masked sum A."""
    def score_conv(s, table, w1, b1, w2, b2, row0, slope):
        M, N = s.shape[2:]
        t, conv = torch.arange(row0, row0 + M)[:, None] - torch.arange(N), score_conv_module(w1.shape[1], k=k)
        for p, x in zip(conv.parameters(), (w1[:, :, None], b1, w2[:, :, None], b2)):
            p.data = x.detach()
        r = None if table is None else table[:, t.clamp(min=0)].to(s)
        assert slope == 0.2 and (table is None) == (encoding == "nope")
        conv.slope = slope
        return (s + (0 if r is None else r) + conv(s, r, t >= 0, N)).masked_fill(t < 0, -math.inf)

    monkeypatch.setattr(m, "load_kernel", dict(score_conv=score_conv).get)
    conv, bias = score_conv_module(2 if encoding == "nope" else 4, k=k, slope=0.2), bias_module(encoding)
    for rows in (9, 5):
        q, key, v, at = queries(T=9, rows=rows)
        for chunk in (9, 4):
            found = []
            for conv.kernels in (False, True):
                found.append(m.attend_in_blocks(q, key, v, at, bias, conv, chunk))
            assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("arm", ["kerple+1x3", "nope+keyconv"])
def test_impl_dense_is_chunked(arm):
    ids, calls = torch.randint(16, (2, 11)), []
    wanted = network(arm, impl="dense", chunk=4)(ids)
    model = network(arm, impl="chunked", chunk=4)
    original, m_attend = m.attend, lambda *a: calls.append(len(a[3])) or original(*a)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "attend", m_attend)
        assert torch.allclose(model(ids), wanted, atol=1e-6) and calls == [4, 4, 3]
        network(arm, impl="dense", chunk=4)(ids)
    assert calls == [4, 4, 3, 11]


def test_bfloat16_is_near():
    """Training in autocast: loss and gradients of the same size as in fp32."""
    batch, found = dict(ids=torch.randint(16, (4, 12)), target=torch.randint(16, (4, 12))), []
    batch["asked"] = torch.ones_like(batch["ids"], dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16):
        model = network("kerple+1x3", chunk=5).float()
        loss = m.accumulate(model, batch, 4, loss_of(dtype))
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (a, x), (b, y) = found
    assert a != b == pytest.approx(a, rel=0.05) and F.cosine_similarity(x, y, 0) > 0.98 and y.dtype == torch.float32


# ---------------------------------------------------------------- position encodings
def test_alibi_slopes():
    """2^(-8 (h + 1) / H) for powers of two; 12 heads: those of 8, then every second of 16. (official code)"""
    wanted = {1: [2**-8], 2: [2**-4, 2**-8], 4: [1 / 4, 1 / 16, 1 / 64, 1 / 256],
              8: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256],
              12: [*(2**-n for n in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5], 3: [2**-4, 2**-8, 2**-2]}
    for n, slopes in wanted.items():
        alibi = m.Alibi(n, 64)
        assert alibi.slopes.tolist() == pytest.approx(slopes, rel=1e-6) and not list(alibi.parameters())
    r = m.Alibi(2, 64)(torch.tensor([5, 7]), torch.arange(8))
    assert r.shape == (2, 2, 8) and r[1, 0, 3] == -2 / 256 and r[0, 1, 0] == -7 / 16 and not m.Alibi(2, 9).state_dict()


def test_kerple_is_the_logarithmic_kernel():
    """(official code) -r1 log(1 + r2 t), r1 from U(0, 2) and r2 from U(0, 1)."""
    kerple = m.Kerple(5000, 64)
    for r, top in ((kerple.r1, 2), (kerple.r2, 1)):
        assert 0 <= r.min() and r.max() <= top and r.mean().item() == pytest.approx(top / 2, abs=0.05)
    kerple = m.Kerple(3, 64)
    r = kerple(torch.arange(4, 9), torch.arange(9))
    for h, i, j in itertools.product(range(3), range(5), range(9)):
        wanted = -kerple.r1[h].item() * math.log(1 + kerple.r2[h].item() * abs(i + 4 - j))
        assert r[h, i, j].item() == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_kerple_is_projected_and_its_gradient_lives_at_the_bound():
    """(our choice) r1, r2 >= 0.01 after a step; at the bound they can still move up."""
    kerple = m.Kerple(3, 64)
    kerple.r1.data, kerple.r2.data = torch.tensor([-1.0, 0.01, 0.5]), torch.tensor([0.002, 0.01, -0.2])
    kerple.project()
    assert kerple.r1.tolist() == pytest.approx([0.01, 0.01, 0.5])
    assert kerple.r2.tolist() == pytest.approx([0.01, 0.01, 0.01])
    kerple(torch.tensor([9]), torch.arange(9)).sum().backward()  # the less, the nearer to 0
    assert (kerple.r1.grad < -1e-3).all() and (kerple.r2.grad < -1e-3).all()


def trained(arm, out, **changes):
    """A network after a few steps of --task recall in this process."""
    base = dict(task="recall", arms=arm, seq_len=32, eval_lens="32,256", n_eval=32, n_embd=32, n_head=2, conv_width=8)
    base |= dict(steps=150, batch_size=16, lr=1e-2, warmup_steps=20, log_every=10**6, save_every=10**6)
    cfg = m.Config(**{**base, **changes})
    run = SimpleNamespace(device=CPU, dtype=torch.float32, rank=0, world=1, out=out, stop=False)
    return cfg, m.train(cfg, run, arm, "", (), m.VOCAB["recall"], {})


def test_training_projects_kerple(tmp_path, monkeypatch):
    """Steps of about one: without the projection some of r1, r2 are negative."""
    wild = dict(steps=4, lr=1.0, warmup_steps=0, n_head=8)
    bias = trained("kerple+1x3", tmp_path, **wild)[1].blocks[0].bias
    assert min(bias.r1.min(), bias.r2.min()).item() == pytest.approx(0.01)
    monkeypatch.setattr(m.Kerple, "project", lambda self: None)
    bias = trained("kerple+1x3", tmp_path, **wild)[1].blocks[0].bias
    assert not min(bias.r1.min(), bias.r2.min()) >= 0  # negative, or already not a number


def test_fire_against_a_loop():
    """(official code) c 0.1, m 1, L0 half the training length; it depends on i and on the distance."""
    fire = m.Fire(2, 12)
    assert (fire.c.item(), fire.m.item(), fire.start) == (pytest.approx(0.1), 1.0, 6)
    fire = randomised(fire)
    fire.c.data, fire.m.data = torch.tensor(-0.3).double(), torch.tensor(1.5).double()
    r = fire(torch.arange(20), torch.arange(20))
    for i, j in itertools.product(range(20), range(20)):
        if j <= i:
            assert r[:, i, j].tolist() == pytest.approx(plain_bias("fire", fire, i, j, 12), rel=1e-5)
    assert (r[:, 5, 3] - r[:, 8, 6]).abs().max() < 1e-9 and (r[:, 15, 3] - r[:, 18, 6]).abs().max() > 1e-5
    fire(torch.arange(20), torch.arange(20)).sum().backward()
    assert fire.c.grad != 0 and fire.m.grad != 0


def test_rope_depends_on_the_distance():
    """Scores of rotated q and k: the same after any shift; the length stays; position 0 turns nothing."""
    q, k, at = torch.randn(1, 1, 6, 8).double(), torch.randn(1, 1, 6, 8).double(), torch.arange(6)
    scores = [m.rotate(q, at + shift) @ m.rotate(k, at + shift).mT for shift in (0, 1, 50)]
    assert torch.allclose(scores[0], scores[1], atol=1e-5) and torch.allclose(scores[0], scores[2], atol=1e-4)
    assert not torch.allclose(scores[0], m.rotate(q, at + 1) @ m.rotate(k, at).mT, atol=0.1)
    assert torch.allclose(m.rotate(q, at).norm(dim=-1), q.norm(dim=-1)) and torch.equal(m.rotate(q, at * 0), q)
    turned = m.rotate(torch.eye(8).double()[None, None, :1], torch.tensor([3]))[0, 0, 0]  # 1 in channel 0
    assert turned.tolist() == pytest.approx([math.cos(3), 0, 0, 0, math.sin(3), 0, 0, 0], abs=1e-6)
    turned = m.rotate(torch.eye(8).double()[None, None, 3:4], torch.tensor([700]))[0, 0, 0]
    assert turned[[3, 7]].tolist() == pytest.approx([math.cos(0.7), math.sin(0.7)], abs=1e-5)  # 10000^(-3/4)


def test_start_and_decay_of_weights():
    """(official code) small_init, wang_init, PyTorch's start for the convolution; r1, r2, c, m are not decayed."""
    cfg = config(n_embd=64, n_head=4, n_layer=3, conv_width=32)
    run = SimpleNamespace(device=CPU)
    model, optimizer = m.prepare(cfg, run, "kerple+1x3", 256)
    block, small, wang = model.blocks[1], math.sqrt(2 / 320), 2 / (3 * 8)
    for p, std in ((model.wte.weight, small), (model.head.weight, small), (block.qkv.weight, small),
                   (block.fc.weight, small), (block.proj.weight, wang), (block.out.weight, wang)):
        assert p.std().item() == pytest.approx(std, rel=0.1)
    bound = (2 * 4 * 3) ** -0.5
    assert bound * 0.9 < block.conv.conv1.weight.abs().max() <= bound and block.conv.conv1.bias.abs().max() > 0
    assert all((linear.bias == 0).all() for linear in (block.qkv, block.proj, block.fc, block.out))
    fire = m.Network(cfg, "fire", 256).blocks[0].bias.mlp
    assert fire[0].bias.abs().max() > 0 and fire[2].bias.abs().max() > 0
    for arm in ("kerple+1x3", "fire"):
        model, optimizer = m.prepare(cfg, run, arm, 256)
        names = {id(p): name for name, p in model.named_parameters()}
        decay, still = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
        assert decay | still == set(names.values()) and not decay & still
        assert [group["weight_decay"] for group in optimizer.param_groups] == [cfg.weight_decay, 0.0]
        assert {name for name in names.values() if re.search(r"\.(bias|r1|r2|c|m)$|ln_", name)} == still
    a, b, other = (m.prepare(config(seed=seed), run, "kerple+1x3", 256)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(a["wte.weight"], other["wte.weight"])


# ---------------------------------------------------------------- data
@pytest.mark.parametrize("T", [4, 16, 64])
def test_recall_batch_by_its_definition(T):
    """Keys from a pool of max(2, T / 4), asked where they occurred before, always with the same value."""
    batch, pool, sizes = m.recall_batch(300, T, torch.Generator().manual_seed(0)), max(2, T // 4), set()
    for ids, target, asked in zip(*(batch[name].tolist() for name in ("ids", "target", "asked"))):
        value = {}
        for i in range(0, T, 2):
            key = ids[i]
            assert 0 <= key < m.KEYS <= ids[i + 1] < m.KEYS + m.VALUES and target[i] == ids[i + 1]
            assert asked[i] == (key in value) and not asked[i + 1] and value.setdefault(key, target[i]) == target[i]
        sizes.add(len(value))
    assert max(sizes) == min(pool, T // 2) and min(sizes) >= 1
    assert all(len(set(batch["ids"][:, i].tolist())) > 20 for i in range(T))  # pools and values differ


def arithmetic(x):
    """Digits and + - * with products first, in Python integers."""
    total, sign, product = 0, 1, x[0]
    for op, digit in zip(x[1::2], x[2::2]):
        if op == 7:
            product *= digit
        else:
            total, sign, product = total + sign * product, 1 if op == 5 else -1, digit
    return (total + sign * product) % 5


SOLVE = dict(
    even_pairs=lambda x: [sum(a != b for a, b in itertools.pairwise(x)) % 2],
    parity=lambda x: [x.count(1) % 2],
    cycle_nav=lambda x: [(x.count(2) - x.count(0)) % 5],
    mod_arith=lambda x: [arithmetic(x)],
    reverse=lambda x: x[::-1],
    duplicate=lambda x: x + x,
    odds_first=lambda x: [b for i, b in enumerate(x) if i % 2] + [b for i, b in enumerate(x) if not i % 2],
    bucket_sort=sorted,
)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("name", [name for name in m.PROBLEMS if name != "missing_dup"])
def test_che_problems_against_slow_solutions(name, length):
    """(DeepMind's Chomsky hierarchy) Questions of all symbols, and their answers."""
    x, y = m.che_problem(name, 200, length, torch.Generator().manual_seed(0))
    assert x.shape == (200, length - (name == "mod_arith" and length % 2 == 0)) and x.dtype == y.dtype == torch.long
    for question, answer in zip(x.tolist(), y.tolist()):
        assert answer == SOLVE[name](question)
    symbols = dict(cycle_nav=range(3), bucket_sort=range(5), mod_arith=range(8 if length > 2 else 5))
    assert set(x.flatten().tolist()) == set(symbols.get(name, range(2)))
    if name == "mod_arith":
        assert x[:, ::2].max() <= 4 and (x[:, 1::2] >= 5).all()


def test_every_problem_is_listed():
    assert sorted([*SOLVE, "missing_dup"]) == sorted(m.PROBLEMS) and len(m.PROBLEMS) == 9
    assert arithmetic([2, 5, 3, 7, 4, 6, 1]) == (2 + 3 * 4 - 1) % 5 and arithmetic([1, 6, 2, 7, 2, 7, 2]) == -7 % 5


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9])
def test_missing_duplicate(length):
    """A string twice with one place hidden by 2, 3 at the end of odd lengths; the hidden bit is asked. Length 1: 1."""
    x, y = m.che_problem("missing_dup", 300, length, torch.Generator().manual_seed(0))
    assert x.shape == (300, length) and y.shape == (300, 1)
    if length == 1:
        assert (x == 3).all() and (y == 1).all()
        return
    hidden, n = set(), length // 2
    for question, (answer,) in zip(x.tolist(), y.tolist()):
        assert question[2 * n :] == [3] * (length % 2) and question.count(2) == 1
        at = question.index(2)
        assert answer == question[(at + n) % (2 * n)] and answer in (0, 1)
        question[at] = answer
        assert question[:n] == question[n : 2 * n]
        hidden.add(at)
    assert hidden == set(range(2 * n)) and 0.3 < y.double().mean() < 0.7


@pytest.mark.parametrize("name", m.PROBLEMS)
def test_che_batch_asks_behind_the_question(name):
    for length in (1, 6):
        batch = m.che_batch(name, 5, length, torch.Generator().manual_seed(2))
        x, y = m.che_problem(name, 5, length, torch.Generator().manual_seed(2))
        assert torch.equal(batch["ids"], torch.cat([x, torch.full_like(y, m.EMPTY)], 1))
        assert (batch["asked"].sum(1) == y.shape[1]).all() and batch["asked"].shape == batch["ids"].shape
        assert torch.equal(batch["target"][batch["asked"]], y.flatten()) and batch["target"].max() < m.VOCAB["che"]
        assert torch.equal(batch["ids"] == m.EMPTY, batch["asked"]) and m.EMPTY == 8 == m.VOCAB["che"] - 1


def test_text_windows_are_runs_of_the_text():
    """Of length + 1, from everywhere; the shortest text that load_text takes is enough."""
    tokens = np.arange(100, dtype=np.uint16)
    windows = m.text_windows(tokens, 2000, 9, torch.Generator().manual_seed(0))
    assert windows.shape == (2000, 10) and windows.dtype == torch.long and (windows.diff(dim=1) == 1).all()
    assert windows.min() == 0 and 98 <= windows.max() <= 99 and len(set(windows[:, 0].tolist())) >= 89
    assert m.text_windows(tokens[:11], 3, 9, torch.Generator()).shape == (3, 10)


def source_tree(root, text=lambda name: f"[{name}]"):
    names = [f"a{i}.py" for i in range(150)] + [f"package/b{i}.py" for i in range(150)]
    out = ["site-packages/x.py", "dist-packages/deep/x.py", "test/x.py", "package/tests/x.py", "idlelib/x.py", "a.txt"]
    for name in names + out:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text(name))
    return names


def test_training_and_held_out_sources_are_other_files(tmp_path, monkeypatch):
    """Each file is in one part, by its name alone, about a tenth held out; no installed packages, no tests."""
    monkeypatch.setattr(m.sysconfig, "get_paths", lambda: dict(stdlib=str(tmp_path)))
    names, found = source_tree(tmp_path), []
    for _ in range(2):
        parts = [bytes(part) for part in m.read_sources()]
        found.append([re.findall(r"\[(.*?)\]", part.decode()) for part in parts])
        source_tree(tmp_path, lambda name: f"[{name}] other text")
    train, held = found[0]
    assert found[1] == found[0] and sorted(train + held) == sorted(names) and not set(train) & set(held)
    assert 0.05 < len(held) / len(names) < 0.17
    assert all((m.hashlib.sha256(name.encode()).digest()[0] < 26) == (name in held) for name in names)
    cfg = m.Config(task="text", eval_lens="128")
    assert [len(x) for x in m.load_text(cfg)[:2]] == [len(x) for x in parts] and m.load_text(cfg)[2] == 256


def tokens_file(path, n, top=50000):
    np.random.default_rng(0).integers(0, top, n).astype(np.uint16).tofile(path)
    return path


def test_token_files(tmp_path):
    """uint16: the last tenth is held out, training does not see it; GPT-2's vocabulary."""
    path = tokens_file(tmp_path / "x.bin", 3000)
    train, held, vocab = m.load_text(m.Config(task="text", data=str(path), eval_lens="128,256"))
    whole = np.fromfile(path, np.uint16)
    assert (len(train), len(held), vocab) == (2700, 300, 50304) and whole.max() > 40000
    assert (np.concatenate([train, held]) == whole).all()
    cfg = m.Config(task="text", data=str(path), eval_lens="128", batch_size=50)
    batch = m.make_batch(cfg, "", (train, held), 0)
    assert batch["ids"].max() > 40000 and torch.equal(batch["ids"][:, 1:], batch["target"][:, :-1])


def test_wrong_token_files(rejects, tmp_path):
    """Missing, a directory, empty, half a token, too short for the held-out windows, no ids of GPT-2."""
    argv = [*SMOKE, "--task", "text", "--data"]
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "half.bin").write_bytes(b"\0" * 20001)
    for name in ("none.bin", "", "empty.bin", "half.bin"):
        rejects(m.main, [*argv, tmp_path / name], "--data", "uint16")
    rejects(m.main, [*argv, tokens_file(tmp_path / "short.bin", 2579)], "short.bin", "2579 tokens", "tenth")
    rejects(m.main, [*argv, tokens_file(tmp_path / "ids.bin", 9000, 2**16)], "ids.bin", "50304")
    cfg = config(data=str(tokens_file(tmp_path / "enough.bin", 2580)))
    train, held, _ = m.load_text(cfg)
    assert m.text_windows(held, 2, 256, torch.Generator()).shape == (2, 257)
    assert len(train) == 2322


TASKS = [dict(task="recall", seq_len=16, eval_lens="16,64"), dict(task="che", seq_len=9, eval_lens="7,9"),
         dict(task="text", eval_lens="128,256")]
each_task = pytest.mark.parametrize("task", TASKS, ids=[task["task"] for task in TASKS])
PIECES = [np.random.default_rng(0).integers(low, low + 128, 5000).astype(np.uint8) for low in (0, 128)]


@each_task
def test_batches_come_from_seed_and_step_alone(task):
    """Not from torch's own generator; another step or seed gives another batch."""
    def batch(seed, step):
        torch.manual_seed(torch.randint(10**6, ()))
        found = m.make_batch(config(**task, seed=seed, batch_size=5), "reverse", PIECES, step)
        return {name: x.tolist() for name, x in found.items()}

    assert batch(0, 3) == batch(0, 3) and batch(2, 3) == batch(2, 3)
    different = [batch(seed, step)["target"] for seed in range(3) for step in range(5)]
    assert all(a != b for a, b in itertools.combinations(different, 2))
    if task["task"] == "che":  # lengths from 1 to seq_len
        lengths = {sum(map(any, zip(*batch(0, step)["asked"]))) for step in range(60)}
        assert lengths == set(range(1, 10))


# ---------------------------------------------------------------- evaluation and claims
class Told:
    """A model by a function of ids (B, L) to logits (B, L, V); keeps what it was shown."""

    def __init__(self, function):
        self.function, self.seen = function, []

    def __call__(self, ids, asked=None):
        self.seen.append(ids)
        logits = self.function(ids)
        return logits if asked is None else logits[asked]

    def eval(self):
        return self


@each_task
def test_held_out_data_are_the_same_for_every_seed_and_in_no_batch(task):
    """Also where the sizes of both are equal: no sequence of a test is one of training."""
    shown = []
    for seed in (0, 7):
        cfg = config(**task, seed=seed, n_eval=4)
        model = Told(lambda ids: torch.zeros(*ids.shape, 288))
        m.evaluate(model, cfg, "bucket_sort", PIECES, CPU)
        shown.append([ids.tolist() for ids in model.seen])
    assert shown[0] == shown[1] and len(shown[0]) >= 2
    batches = (m.make_batch(config(**task, seed=seed, batch_size=4), "bucket_sort", PIECES, step)
               for seed in range(3) for step in range(100))
    trained_on = {tuple(row) for batch in batches for row in batch["ids"].tolist()}
    assert not trained_on & {tuple(row) for ids in shown[0] for row in ids}
    if task["task"] == "recall":  # not even the keys of a sequence
        sets = {frozenset(row[::2]) for row in trained_on}
        assert not sets & {frozenset(row[::2]) for ids in shown[0] for row in ids}
    if task["task"] == "text":
        assert max(map(max, trained_on)) < 128 <= min(min(row) for ids in shown[0] for row in ids)


def test_hits_count_what_is_asked():
    """By hand: 2 of 3, 0 of 1, none asked; answers elsewhere do not count."""
    target = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    asked = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    said = torch.tensor([[1, 2, 0, 4], [1, 2, 3, 0], [1, 2, 3, 4]])
    model = Told(lambda ids: F.one_hot(said, 5).double())
    found = m.hits(model, dict(ids=target, target=target, asked=asked), CPU)
    assert found.tolist() == pytest.approx([2 / 3, 0, 0]) and found.dtype == np.float64


def test_bits_per_token_by_hand():
    """A table of next-token logits: mean of -log2 p of the last 128 tokens; a uniform model has log2 V bits."""
    table, windows = torch.randn(7, 7).double(), torch.randint(7, (3, 301))
    p = table.log_softmax(1)
    for length in (128, 200, 300):
        found = m.bits_per_token(Told(lambda ids: table[ids]), windows, length, CPU)
        for row, bits in zip(windows.tolist(), found):
            wanted = [-p[row[i - 1], row[i]].item() / math.log(2) for i in range(301 - 128, 301)]
            assert bits == pytest.approx(sum(wanted) / 128, rel=1e-5)
    uniform = m.bits_per_token(Told(lambda ids: torch.zeros(*ids.shape, 8)), windows, 128, CPU)
    assert uniform == pytest.approx([3.0] * 3)


def test_contexts_grow_before_the_same_tokens():
    """(our choice) Each length reads so many tokens and predicts the same last 128 of the held-out text."""
    held = (np.arange(6000) % 251).astype(np.uint8)
    for lens in ("128,256,1024", "1024,128,256"):
        cfg = config(eval_lens=lens, n_eval=6)
        model = Told(lambda ids: F.one_hot((ids + 1) % 251, 251).float() * 100)  # knows the next
        found = m.evaluate(model, cfg, "", (None, held), CPU)
        assert list(found) == lens.split(",") and all((x < 1e-6).all() and len(x) == 6 for x in found.values())
        by_length = {n: torch.cat([ids for ids in model.seen if ids.shape[1] == n]) for n in map(int, lens.split(","))}
        ends = [ids[:, -128:] for ids in by_length.values()]
        assert all(torch.equal(ends[0], end) for end in ends) and len(ends[0]) == 6
        assert len(model.seen) == 4  # 4096 tokens at once


def test_evaluation_of_recall_and_che():
    """A column for each length, a number for each sequence; che: a mean for each length from first to last."""
    def copy(ids):  # a lookup: says the value behind the latest earlier copy
        logits = torch.zeros(*ids.shape, 288)
        for b, row in enumerate(ids.tolist()):
            for i, key in enumerate(row):
                for j in range(i - 1):
                    logits[b, i, row[j + 1]] += row[j] == key
        return logits

    cfg = config(task="recall", seq_len=8, eval_lens="8,16", n_eval=5)
    found = m.evaluate(Told(copy), cfg, "", (), CPU)
    assert {name: x.tolist() for name, x in found.items()} == {"8": [1.0] * 5, "16": [1.0] * 5}
    cfg, model = config(task="che", eval_lens="4,9", n_eval=50), Told(lambda ids: F.one_hot(ids * 0 + 1, 9))
    found = m.evaluate(model, cfg, "reverse", (), CPU)
    assert list(found) == ["reverse"] and found["reverse"].shape == (6,)
    assert [ids.shape[1] for ids in model.seen] == [2 * n for n in range(4, 10)]
    shares = [(ids[:, : n + 4] == 1).double().mean().item() for n, ids in enumerate(model.seen)]
    assert found["reverse"].tolist() == pytest.approx(shares)


def table_of(task, better, worse, n=12):
    """Numbers (n,) for every arm and column: arms with 1x3 and recall's keyconv are better, all others worse."""
    columns = m.PROBLEMS if task == "che" else ["64", "128", "256", "512", "2048"]
    noise = np.random.default_rng(0).normal(size=n) * 1e-6
    return {f"{arm}/{column}": noise * (i + 1) + (better if "1x3" in arm or arm == "nope+keyconv" else worse)
            for i, (arm, column) in enumerate(itertools.product(m.ARMS[task].split(","), columns))}


@pytest.mark.parametrize("task", m.CLAIMS)
def test_claims_are_of_the_default_arms(task):
    """Every formula names arms that run by default and columns of the default lengths: none is left out."""
    for scale in ("small", "long"):
        argv = ["--task", task, "--scale", scale]
        cfg = m.cli(m.Config, m.SCALES, argv)
        columns = m.PROBLEMS if task == "che" else cfg.eval_lens.split(",")
        table = {f"{arm}/{column}": np.arange(9.0) for arm in cfg.arms.split(",") for column in columns}
        assert list(m.statistics(task, table)) == [name for name, *_ in m.CLAIMS[task]], scale
    assert len({name for name, *_ in m.CLAIMS[task]}) == len(m.CLAIMS[task])
    assert all(len(claim) == 4 and isinstance(claim[2], float) for claim in m.CLAIMS[task])


@pytest.mark.parametrize("task, better, worse", [("recall", 0.9999, 0.1), ("text", 1.0, 2.0), ("che", 0.9, 0.5)])
def test_claims_hold_where_1x3_is_better(task, better, worse):
    """More right answers, fewer bits a byte; and the other way round none that compares with 1x3 holds."""
    def outcomes(*sides):
        found = m.statistics(task, table_of(task, *sides))
        return {name: m.verdict(*found[name], bar) for name, _, bar, _ in m.CLAIMS[task]}

    compare = [name for name, formula, *_ in m.CLAIMS[task] if "1x3" in formula and formula.count("1x3") != 2]
    right, wrong = outcomes(better, worse), outcomes(worse, better)
    assert {right[name] for name in compare} == {"HOLDS"} and {wrong[name] for name in compare} == {"DOES NOT HOLD"}
    if task == "recall":
        assert set(right.values()) == {"HOLDS"} and wrong["no-conv-does-not"] == "DOES NOT HOLD"


def test_statistics():
    """Paired means and intervals by hand; arms not run are left out, and samples of fewer than 8."""
    a, b = np.arange(10.0), np.arange(10.0)[::-1] / 2
    table = {"kerple/2048": a, "kerple+1x1/2048": b, "kerple+1x3/128": a}
    found = m.statistics("text", table)
    assert list(found) == ["1x1-beats-kerple"]
    mean, (low, high) = found["1x1-beats-kerple"]
    half = (a - b).std(ddof=1) / 10**0.5 * 2.262  # Student's quantile, 9 degrees of freedom
    assert mean == pytest.approx(2.25) and [high - mean, mean - low] == pytest.approx([half, half], rel=0.01)
    assert m.statistics("text", {key: x[:7] for key, x in table.items()}) == {} == m.statistics("recall", {})
    assert m.statistics("text", {key: x[:8] for key, x in table.items()}).keys() == found.keys()
    found = m.statistics("recall", {"nope/64": np.full(8, 0.2), "nope+1x3/512": np.ones(8)})
    assert found == {"conv-recalls-at-8-times-the-length": (1, (1, 1)), "no-conv-does-not": (0.3, (0.3, 0.3))}
    for n, quantile in ((8, 2.365), (16, 2.131), (60, 2.001)):
        x = np.random.default_rng(0).normal(size=n)
        mean, (low, high) = m.interval(x)
        assert high - mean == pytest.approx(quantile * x.std(ddof=1) / n**0.5, rel=0.01) and low < mean < high


def test_verdict_has_three_outcomes():
    assert m.verdict(2, (1, 3), 0.5) == "HOLDS" and m.verdict(-2, (-3, -1), 0) == "DOES NOT HOLD"
    assert m.verdict(1, (-1, 3), 0) == "INCONCLUSIVE" == m.verdict(0, (0, 0), 0)


# ---------------------------------------------------------------- learning, steps
@pytest.mark.parametrize("arm", ["nope+1x3", "nope+keyconv", "nope", "nope+1x1"])
def test_one_layer_recalls_by_neighbours_alone(arm, tmp_path):
    """150 steps at length 32: 1x3 recalls everything, at 8 times the length too, and so does the control, with 0.94
    there; without neighbours a guess among the values of the context is all there is, about 0.28 and 0.07."""
    cfg, model = trained(arm, tmp_path)
    found = {n: x.mean() for n, x in m.evaluate(model, cfg, "", (), CPU).items()}
    if arm in ("nope+1x3", "nope+keyconv"):
        assert found["32"] > 0.9 and found["256"] > (0.9 if "1x3" in arm else 0.7), found
    else:
        assert found["32"] < 0.45 and found["256"] < 0.2, found


@pytest.mark.parametrize("arm", ["kerple+1x3", "nope+keyconv"])
def test_splitting_a_batch_does_not_change_the_gradient(arm):
    """Sequences with different numbers of asked places: the sum over all, divided once."""
    cfg = m.Config(task="recall", arms=arm, seq_len=32, eval_lens="16", n_embd=8, batch_size=8, chunk=9)
    batch = m.make_batch(cfg, "", (), 0)
    model = m.Network(cfg, arm, m.VOCAB["recall"])
    loss = F.cross_entropy(model(batch["ids"])[batch["asked"]], batch["target"][batch["asked"]])
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert len(set(batch["asked"].sum(1).tolist())) > 1
    for micro in (8, 3, 1):
        model.zero_grad()
        mean = m.accumulate(model, batch, micro, loss_of(torch.float32))
        got = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert torch.allclose(got, wanted, atol=1e-6) and mean.item() == pytest.approx(loss.item(), rel=1e-5)


TWO_RANKS = """
import os, sys, torch._dynamo, convattn
rank = str(int(os.fork() > 0))
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
convattn.ledger = convattn.plot_lengths = lambda *_: None
convattn.main(sys.argv[2:])
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) if rank == "1" else 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_two_ranks_give_the_weights_of_one(alone, smoke):
    """Six steps by two processes over gloo: the same weights as by one, but for b2, which no loss depends on: Adam
    makes steps of its rounding errors."""
    cwd = alone.new()
    shutil.copy(m.__file__, cwd)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", TWO_RANKS, port, *SMOKE, "--arms", "kerple+1x3", "--eval-lens", "16"]
    timeout = 30 * float(os.environ.get("TEST_TIME_FACTOR", "1"))
    process = subprocess.Popen(command, cwd=cwd, env=alone.env, text=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        text = process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0 and text.count("RESULT") == 1, text[-3000:]
    whole = load_file(smoke("convattn").out / "kerple+1x3.safetensors")
    ours = load_file(cwd / "out/convattn/recall-smoke-s0/kerple+1x3.safetensors")
    assert whole.keys() == ours.keys()
    assert all((whole[k] - ours[k]).abs().max() < 1e-6 for k in whole if not k.endswith("conv2.bias"))


# ---------------------------------------------------------------- command line
FIELDS = ("script task scale tag seed argv commit method_hash data_sha256 device threads versions minutes tried "
          "metrics claims").split()


@pytest.mark.parametrize("argv", [(), TEXT, CHE], ids=["recall", "text", "che"])
def test_smoke(smoke, argv):
    """Alone: every file, every field of RESULT, a row for each arm, no claim."""
    run = smoke("convattn", *argv)
    lines, result, arms = run.stdout.splitlines(), run.result, (argv[3] if argv else m.ARMS["recall"]).split(",")
    assert set(FIELDS) <= set(result) and result["script"] == "convattn" and result["claims"] == []
    assert result == json.loads((run.out / "result.json").read_text()) and "CLAIM" not in run.stdout
    assert lines[-1].startswith("RESULT ") and len(result["method_hash"]) == 12 and result["tried"]
    che = result["task"] == "che"
    columns = dict(recall="16,64", text="128,256", che="even_pairs,missing_dup,odds_first")[result["task"]].split(",")
    assert set(result["metrics"]) == {f"{arm}/{column}" for arm in arms for column in columns}
    top = 20 if result["task"] == "text" else 1
    assert all(0 <= x <= top for x in result["metrics"].values())
    for arm in arms:
        assert any(line.split()[0] == arm for line in lines) and any(line.startswith(arm + ": ") for line in lines)
    jobs = [f"{arm}-{column}" for arm in arms for column in columns] if che else arms
    files = {"config.json", "log.jsonl", "result.json", "state.pt", *(f"{job}.safetensors" for job in jobs)}
    assert {path.name for path in run.out.iterdir()} == files | (set() if che else {"plot.png"})
    assert che or (run.out / "plot.png").read_bytes().startswith(b"\x89PNG")
    log = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert {line["name"].replace(" ", "-") for line in log} == set(jobs)
    assert [line["step"] for line in log] == [2, 4, 6] * len(jobs)
    assert all(math.isfinite(line["loss"]) and line["gnorm"] > 0 for line in log)


def test_kill_and_resume(kill_and_resume):
    kill_and_resume("convattn", *CHE, seed=1)


def test_ctrl_c_says_how_to_go_on(here, smoke, monkeypatch, capsys):
    """Stopped in the second arm: exit status 130, the command to go on, and the same numbers at the end."""
    checks, argv = [], [*SMOKE, *CHE]
    monkeypatch.setattr(m, "should_stop", lambda run: checks.append(0) or len(checks) == 21)
    monkeypatch.setattr(m.sys, "argv", ["convattn.py", *argv])
    with pytest.raises(SystemExit) as stop:
        m.main(argv)
    command = re.search(r"continue with: (.*)", capsys.readouterr().out)[1]
    assert stop.value.code == 130 and shlex.split(command)[1:] == ["convattn.py", *argv, "--resume"]
    state = torch.load(here / "out/convattn/che-smoke-s0/state.pt", weights_only=True)
    assert (state["job"], state["step"], len(state["done"])) == ("kerple even_pairs", 3, 3)
    again = m.main([*argv, "--resume"])
    assert again["metrics"] == smoke("convattn", *CHE).result["metrics"] and len(checks) == 36


def test_directories_of_another_run(rejects, smoke, tmp_path):
    out, argv = smoke("convattn", *CHE).out, [*SMOKE, *CHE]
    rejects(m.main, [*argv, "--out", out], "finished run", "--out")
    shutil.copytree(out, tmp_path / "broken", ignore=shutil.ignore_patterns("result.json"))
    rejects(m.main, [*argv, "--out", tmp_path / "broken"], "interrupted run", "--resume")
    rejects(m.main, [*argv, "--out", tmp_path / "broken", "--resume", "--lr", "1", "--edge", "official"],
            "different are: edge, lr")


def test_a_variant_has_a_directory_of_its_own(here):
    outs = [m.start_run(m.Config(tag=tag), "convattn").out for tag in ("main", "wide")]
    assert list(map(str, outs)) == ["out/convattn/recall-small-s0", "out/convattn/recall-small-wide-s0"]


def test_training_that_diverges_ends_in_one_line(rejects, here, tmp_path):
    argv = [*SMOKE, "--arms", "nope", "--lr", "1e30", "--out", tmp_path / "out"]
    rejects(m.main, argv, "not a number", "learning rate")


BAD = {
    "--colour red": "--colour -h", "--ste 5": "--ste", "--task chess": "chess recall", "--edge round": "round extend",
    "--impl triton": "triton chunked", "--scale huge": "huge smoke", "--dtype half": "half bfloat16",
    "--steps x": "--steps", "--arms nope,": "--arms", "--seed -1": "--seed 0", "--eval-lens many": "--eval-lens many",
    "--task che --eval-lens 7": "--eval-lens 41,100", "--task text --eval-lens 100,256": "--eval-lens 128",
    "--kernels": "--kernels CUDA", "--device cuda": "--device cuda auto"}
LIMITS = {  # settings of Config that it refuses
    "arms": ["t5", "nope,nope", "nope+1x2", "nope+1x9", "nope+1x3+keyconv", "nope+keyconv@0", "kerple+1x3w0", "nope "],
    "problems": ["sums", "parity,parity", "parity,"], "eval_lens": ["64,", "0", "16,17", "1026", "2", "64, 128", "-64"],
    "seq_len": [15, 2, 0, 1026], "micro_batch": [-1], "lr": [math.nan, math.inf, -1.0], "slope": [1.5, -0.1],
    "beta2": [1.0], "weight_decay": [-0.1], "grad_clip": [-1.0], "warmup_steps": [-1], "n_embd": [10, 12, 0],
    **{name: [0, -1] for name in ("n_eval", "n_layer", "n_head", "conv_width", "chunk", "steps", "batch_size",
                                  "log_every", "save_every")}}


@pytest.mark.parametrize("argv, words", BAD.items(), ids=list(BAD))
def test_wrong_flags(rejects, argv, words):
    if argv in ("--device cuda", "--kernels") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    rejects(m.main, [*SMOKE, *argv.split()], *words.split())


@pytest.mark.parametrize("name", LIMITS)
def test_refused_settings(rejects, name):
    """The line names the flag, and the value where there is one."""
    for value in LIMITS[name]:
        rejects(lambda argv: m.Config(**{name: value}), [], f"--{name.replace('_', '-')}")
    assert m.Config(seq_len=4, eval_lens="4,1024", micro_batch=0, slope=1.0, beta2=0.9999, n_eval=1, n_embd=8)


def test_refused_combinations(rejects):
    for words, changes in {"--n-embd 10 --n-head 4": dict(n_embd=10), "--n-embd 12 even": dict(n_embd=12),
                           "--eval-lens 9,7": dict(task="che", eval_lens="9,7"),
                           "--eval-lens 7,8,9 41,100": dict(task="che", eval_lens="7,8,9"),
                           "--kernels causal": dict(kernels=True, task="che", eval_lens="7,9"),
                           "--kernels --edge": dict(kernels=True, edge="official"),
                           "--kernels fire": dict(kernels=True, arms="nope,fire+1x1"),
                           "--scale paper --task --data": dict(scale="paper", task="text", eval_lens="512"),
                           "--scale --task che": dict(scale="paper")}.items():
        rejects(lambda argv: m.Config(**changes), [], *words.split())
    assert m.Config(arms="fire,alibi+1x3", kernels=True).kernels and m.Config(task="che", eval_lens="7,7")


def test_missing_kernels(rejects):
    rejects(lambda argv: m.load_kernel(*argv), ["no_such_kernel"], "--kernels", "kernels/", "triton")


def test_arms_and_their_limits():
    """Widths, layers and kernels 1 to 7 are read from an arm's name."""
    for arm, wanted in {"nope": (None, None, None, None), "kerple+1x3w96@2": ("3", "96", None, "2"),
                        "rope+keyconv@12": (None, None, "keyconv", "12"), "fire+1x7": ("7", None, None, None)}.items():
        assert m.ARM.fullmatch(arm).groups()[1:] == wanted and m.Config(arms=arm).arms == arm
    assert m.Config(task="text", eval_lens="128").arms == m.ARMS["text"]
    block = m.Block(config(), "kerple+1x5w6")
    assert block.conv.conv1.weight.shape == (6, 4, 1, 5) and block.conv.conv2.weight.shape == (2, 6, 1, 5)


def test_published_settings():
    """(official code) 125M on text; che: five layers of 64 channels and 8 heads, as in DeepMind's code."""
    argv = ["--scale", "paper", "--dry-run", "--task"]
    text, che = (m.cli(m.Config, m.SCALES, [*argv, task]) for task in ("text", "che"))
    names = "n_layer n_embd n_head conv_width seq_len batch_size steps lr weight_decay".split()
    assert [getattr(text, name) for name in names] == [12, 768, 12, 32, 512, 256, 50_000, 6e-4, 0.1]
    assert [getattr(che, name) for name in names] == [5, 64, 8, 32, 40, 128, 200_000, 1e-3, 0.0]
    assert (text.min_lr, text.warmup_steps, text.beta2, text.slope, text.grad_clip) == (6e-5, 500, 0.95, 0.01, 1.0)
    assert text.eval_lens == "512,1024,2048,4096,8192" and che.eval_lens == "41,500" and not che.micro_batch


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        m.main(["-h"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert [f.name for f in m.fields(m.Config) if f"--{f.name.replace('_', '-')}" not in text] == []


def parameters(V, D, H, n_layer, more=0):
    """Of GPT-2's blocks with biases, embedding and head apart, no positions; more: what an arm adds to a layer."""
    block = 2 * 2 * D + (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D)
    return 2 * V * D + 2 * D + n_layer * (block + more)


def test_dry_run_prints_and_creates_nothing(here, capsys, monkeypatch):
    """The paper's model has 162.3 M parameters, 85 M of them in blocks; all of it on the meta device."""
    devices, original = set(), m.Network.__init__

    def init(self, *args):
        original(self, *args)
        devices.update(p.device.type for p in self.parameters())

    monkeypatch.setattr(m.Network, "__init__", init)
    arms = {"kerple+1x3": 3500 + 24, "kerple+1x1": 1196 + 24, "kerple": 24, "alibi": 0, "nope+1x3": 2348, "rope": 0,
            "fire": 2 + 64 + 33 * 12}
    m.main(["--task", "text", "--scale", "paper", "--dry-run", "--arms", ",".join(arms)])
    lines = {line.split(": ")[0]: line for line in capsys.readouterr().out.splitlines()}
    for arm, more in arms.items():
        assert f" {parameters(50304, 768, 12, 12, more):,} parameters" in lines[arm]
        assert all(word in lines[arm] for word in ("6.55e+09 tokens", "FLOPs", "GiB", "hours"))
    assert devices == {"meta"} and list(here.rglob("*")) == []
    m.main(["--task", "che", "--scale", "paper", "--dry-run", "--arms", "kerple+1x3"])
    m.main(["--task", "che", "--scale", "paper", "--dry-run", "--arms", "kerple+1x3", "--problems", "even_pairs"])
    many, one = capsys.readouterr().out.splitlines()[::2]
    assert f" {parameters(9, 64, 8, 5, 2344 + 16):,} parameters" in many
    many, one = (float(re.search(r"(\S+) tokens", line)[1]) for line in (many, one))
    assert many == pytest.approx(one * len(m.cli(m.Config, m.SCALES, ["--task", "che"]).problems.split(",")), rel=0.01)
    m.main(["--dry-run", "--arms", "nope"])
    assert f" {parameters(288, 64, 4, 1):,} parameters" in capsys.readouterr().out
