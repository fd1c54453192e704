# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""mdm.py: formulas against brute force or a closed form, data, training, claims, command line."""

import collections
import functools
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import mdm as m
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

OFFICIAL = dict(format="chars", canvas="source", positions="learned")
SMALL = dict(n_layer=2, n_head=2, n_embd=32)
EXAMPLE = ("6,2/2,10/1,9/2,0/5,3/0,11/4,1/10,4/8,2/11,5-8,3", "8,2/2,0/0,11/11,5/5,3")  # of the paper's data
ARMS = ("--task", "path", "--arms", "mdm,ar,ar_rev,teacherless")
A, B = m.SYMBOL["1"], m.SYMBOL["2"]  # two digits for invented answers


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors are faster so; the former number comes back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def config(**changes):
    return m.Config(**{**SMALL, **changes})


def network(arm="mdm", noise=0.1, **changes):
    """A network whose biases and norms are random too, in evaluation mode."""
    cfg = config(**changes)
    model = m.build(cfg, arm).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return cfg, model


@functools.cache
def boards(level, n):
    return m.sudoku_problems(n, level, np.random.default_rng(5))


def places(ids):
    """Canvases as they stand: position i is place i."""
    return torch.arange(ids.shape[1]).expand(ids.shape[:2])


def digits(board):
    return np.array([list(map(int, board))], np.int8)


def canvas(n, rows=1, L=None):
    """ids (rows, L, 1) whose last n positions are the answer, and the target."""
    L = L or n + 2
    ids = torch.full((rows, L, 1), A)
    return ids, (torch.arange(L) >= L - n).repeat(rows, 1)


# ---------------------------------------------------------------- model
@pytest.mark.parametrize("changes", [dict(), dict(canvas="source", positions="learned", shift=True)])
def test_mdm_sees_both_sides(changes):
    """(official code) Another last symbol changes the prediction at position 0: no mask is left over."""
    cfg, model = network(**changes)
    ids = m.encode(boards("easy", 2), cfg, "mdm")[0]
    other = ids.clone()
    other[:, -1] = m.MASK
    at = places(ids)
    assert ((model(ids, at) - model(other, at)).abs().amax(2) > 1e-6).all()


@pytest.mark.parametrize("changes", [dict(task="path"), dict(task="path", **OFFICIAL)])
def test_baselines_see_only_what_stands_before(changes):
    """A symbol at j reaches the predictions of all later positions, and none of those up to j itself."""
    cfg, model = network("ar", **changes)
    ids, _, at = m.in_order(*m.encode([EXAMPLE], cfg, "ar"), cfg, "ar")
    for j in (1, 7, ids.shape[1] - 2):
        other = ids.clone()
        other[:, j] = m.MASK
        differs = (model(ids, at) - model(other, at)).abs().amax(2)[0] > 1e-6
        assert not differs[: j + 1].any() and differs[j + 1 :].all()


def test_shift_reads_the_prediction_one_to_the_left():
    """(official code) logits = cat([logits[:, :1], logits[:, :-1]])"""
    cfg, model = network(task="path", **OFFICIAL, shift=True)
    ids = m.encode([EXAMPLE], cfg, "mdm")[0]
    at = places(ids)
    shifted = model(ids, at)
    model.shift = False
    plain = model(ids, at)
    assert torch.equal(shifted, torch.cat([plain[:, :1], plain[:, :-1]], 1))
    select = torch.rand(ids.shape[:2]) < 0.3
    model.shift = True
    assert torch.allclose(model(ids, at, select), shifted[select], atol=1e-6)


@pytest.mark.parametrize("size, count", [("tiny", 5_532_672), ("base", 85_473_024), ("medium", 302_867_456)])
@pytest.mark.parametrize("task", ["sudoku", "path"])
def test_parameters_of_the_published_sizes(task, size, count):
    for arm in ("mdm", "ar"):
        assert m.cost(m.Config(task=task, size=size, **OFFICIAL), arm)[0] == count


@pytest.mark.parametrize("arm", ["mdm", "ar"])
def test_first_loss_is_uniform(arm):
    """Whatever the initial weights, every symbol is about equally likely."""
    for size in ("nano", "tiny"):
        cfg = m.Config(task="path", size=size)
        ids, _, at = m.in_order(*m.encode([EXAMPLE], cfg, arm), cfg, arm)
        logits = m.build(cfg, arm)(ids, at).log_softmax(-1)
        assert (-logits).mean().item() == pytest.approx(math.log(31), abs=0.2)


def test_structured_positions_name_row_column_box():
    table, size = m.coordinates(config())
    cell = 9 * 4 + 7  # fifth row, eighth column: the middle right box
    assert table[cell].tolist() == [4, 9 + 7, 18 + 5, 29] and size == 31 and table.shape == (81, 4)
    table, _ = m.coordinates(config(canvas="source"))
    assert table[cell].tolist() == [4, 16, 23, 28] and table[82 + cell].tolist() == [4, 16, 23, 29]
    assert table[81].tolist() == table[163].tolist() == [27, 27, 27, 30]


@pytest.mark.parametrize("arm", ["ar", "ar_rev", "teacherless"])
def test_causal_arms_in_place_read_first_and_then_write(arm):
    """All that is given stands before the gaps; each position is told its own place and the next one."""
    cfg, model = network(arm, task="path")
    ids, target = m.encode(m.path_problems(3, "pd2", np.random.default_rng(0)), cfg, arm)
    moved, asked, at = m.in_order(ids, target, cfg, arm)
    assert asked.tolist() == [[False] * 13 + [True] * 4] * 3
    assert torch.equal(ids.gather(1, at[..., None].expand_as(ids)), moved)
    assert at[0].tolist() == [*range(12), 16, *([15, 14, 13, 12] if arm == "ar_rev" else [12, 13, 14, 15])]
    other = at.clone()
    other[:, -1], other[:, -2] = at[:, -2], at[:, -1]  # the third gap is asked for another place
    differs = (model(moved, at) - model(moved, other)).abs().amax(2)[0] > 1e-6
    assert not differs[:-2].any() and differs[-2:].all()  # logits of position i come from what i-1 is told
    quiz = boards("easy", 1)
    ids, target, at = m.in_order(*m.encode(quiz, config(), "ar"), config(), "ar")
    clues = sum(c != "0" for c in quiz[0][0])
    assert not target[0, :clues].any() and target[0, clues:].all()
    assert (at[0, clues:].diff() > 0).all() and (at[0, :clues].diff() > 0).all()


@pytest.mark.peers
@pytest.mark.parametrize("arm", ["mdm", "ar"])
def test_logits_equal_transformers_gpt2(arm):
    """(official code) GPT-2, and GPT-2 without its causal mask, with the same weights."""
    peers = pytest.importorskip("transformers")
    cfg, model = network(arm, task="path", size="tiny", **OFFICIAL)
    shape = dict(vocab_size=m.VOCAB, n_positions=512, n_embd=32, n_layer=2, n_head=2)
    peer = peers.GPT2LMHeadModel(peers.GPT2Config(**shape)).eval()
    names = [
        ("attn.c_attn", "qkv"),
        ("attn.c_proj", "attn_out"),
        ("mlp.c_fc", "mlp_in"),
        ("mlp.c_proj", "mlp_out"),
    ]
    ours, state = model.state_dict(), {}
    for name in peer.state_dict():
        key = name.removeprefix("transformer.").replace("h.", "blocks.", 1) if ".h." in name else name
        key = key.removeprefix("transformer.").replace("lm_head", "wte")
        for theirs, own in names:
            key = key.replace(theirs, own)
        linear = any(f"{own}.weight" in key for _, own in names)
        state[name] = ours[key].T if linear else ours[key]  # Conv1D stores the transpose
    peer.load_state_dict(state)
    ids = m.encode([EXAMPLE], cfg, arm)[0]
    L = ids.shape[1]
    everything = dict(attention_mask=torch.zeros(1, 1, L, L)) if arm == "mdm" else {}
    with torch.no_grad():
        theirs = peer(ids[..., 0], **everything).logits
        model.shift = False
        assert (model(ids, places(ids)) - theirs).abs().max() < 1e-5


# ---------------------------------------------------------------- method: the forward process
def test_q_sample_masks_the_answer_at_its_rate():
    """(official code) paper Sec. 3: each answer position with probability (t+1)/T, the question never."""
    ids, target = canvas(50, rows=4000, L=60)
    ids[..., 0] = torch.randint(5, m.VOCAB, ids.shape[:2])
    for t, T in ((0, 20), (9, 20), (0, 1), (19, 20)):
        noisy, masked = m.q_sample(ids, target, torch.full((4000,), t), T)
        rate = masked[target].float().mean().item()
        assert rate == pytest.approx((t + 1) / T, abs=0.005) and not masked[~target].any()
        assert torch.equal(noisy[..., 0] == m.MASK, masked) and torch.equal(noisy[~masked], ids[~masked])
        assert torch.equal(masked, target) or t + 1 < T
    mixed = torch.arange(4000) % 20
    share = m.q_sample(ids, target, mixed, 20)[1].sum(1) / 50
    assert torch.allclose(share.view(-1, 20).mean(0), (torch.arange(20) + 1) / 20, atol=0.02)


def test_q_sample_masks_an_edge_in_its_first_symbol():
    ids = torch.full((3, 4, 2), A)
    noisy, masked = m.q_sample(ids, torch.ones(3, 4, dtype=torch.bool), torch.tensor([4, 4, 4]), 5)
    assert (
        masked.all() and (noisy[..., 0] == m.MASK).all() and (noisy[..., 1] == A).all() and (ids == A).all()
    )


def test_sequence_weights():
    """(official code) w(t): the ELBO's 1/(t+1), the paper's T - t, and 1."""
    t = torch.arange(4)
    wanted = dict(original=[1, 1 / 2, 1 / 3, 1 / 4], linear=[4, 3, 2, 1], none=[1, 1, 1, 1])
    for kind, values in wanted.items():
        assert torch.allclose(m.sequence_weight(t, 4, kind), torch.tensor(values, dtype=torch.float))


def test_corrupt_gives_each_arm_its_own_problem():
    """(official code) mdm a noisy answer, ar the true one, teacherless none; t covers 0..T-1 evenly."""
    cfg = config(task="path", T=4)
    ids, target, _ = m.in_order(*m.encode([EXAMPLE] * 4000, cfg, "ar"), cfg, "ar")
    generator = torch.Generator().manual_seed(0)
    noisy, asked, weight = m.corrupt(ids, target, "mdm", cfg, generator)
    assert torch.equal(noisy[..., 0] == m.MASK, asked) and (asked <= target).all()
    assert torch.allclose(
        torch.bincount(weight.long(), minlength=5)[1:] / 4000, torch.full((4,), 0.25), atol=0.03
    )
    for w, rate in ((4, 0.25), (1, 1.0)):  # weight T - t belongs to the rate (t+1)/T of the same canvas
        assert (asked.sum(1) / target.sum(1))[weight == w].mean() == pytest.approx(rate, abs=0.03)
    noisy, asked, weight = m.corrupt(ids, target, "ar", cfg, generator)
    assert torch.equal(noisy, ids) and torch.equal(asked, target) and (weight == 1).all()
    noisy, asked, weight = m.corrupt(ids, target, "teacherless", cfg, generator)
    assert torch.equal(asked, target) and (noisy[..., 0][target] == m.MASK).all() and (weight == 1).all()
    assert torch.equal(noisy[~target], ids[~target])


# ---------------------------------------------------------------- method: the loss
def test_plain_weight_is_cross_entropy():
    """(official code) alpha 1, beta 0: value and gradient of F.cross_entropy."""
    logits, answer = torch.randn(40, 7, requires_grad=True), torch.randint(7, (40,))
    ours = m.focal_loss(logits, answer, torch.ones(40), 1.0, 0.0)
    plain = F.cross_entropy(logits, answer, reduction="sum")
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, plain)]
    assert torch.allclose(ours, plain) and torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("alpha, beta", [(0.25, 1.0), (0.25, 2.0), (1.0, 0.0), (0.7, 3.5)])
def test_token_weight_gradient_is_the_closed_form(alpha, beta):
    """(official code) dL/du = alpha [(1-p)^beta + beta u p (1-p)^(beta-1)]: v is not detached."""
    u = torch.linspace(0.01, 9, 50, dtype=torch.float64, requires_grad=True)
    p = torch.exp(-u)
    (gradient,) = torch.autograd.grad((m.token_weight(u, alpha, beta) * u).sum(), u)
    closed = alpha * ((1 - p) ** beta + beta * u * p * (1 - p) ** (beta - 1))
    assert torch.allclose(gradient, closed, rtol=1e-12)
    detached = alpha * (1 - p) ** beta
    assert beta == 0 or (gradient > detached * (1 + 1e-6)).all()


def test_token_weight_limits():
    """(official code) v(0) = 0, v(inf) = alpha, and no digits are lost where p is close to 1."""
    u = torch.tensor([0.0, 1e-10, 200.0])
    for beta in (1.0, 2.0):
        v = m.token_weight(u, 0.25, beta)
        assert v[0] == 0 and v[2] == 0.25 and v[1].item() == pytest.approx(0.25 * 1e-10**beta, rel=1e-5)


def test_focal_loss_gradient_runs_through_the_token_weight():
    """(official code) dL/dlogits = w alpha [(1-p)^beta + beta u p (1-p)^(beta-1)] (softmax - onehot)."""
    logits, answer, weight = torch.randn(30, 9, requires_grad=True), torch.randint(9, (30,)), torch.rand(30)
    (gradient,) = torch.autograd.grad(m.focal_loss(logits, answer, weight, 0.25, 2.0), logits)
    probability, label = logits.softmax(1), F.one_hot(answer, 9)
    p = (probability * label).sum(1)
    slope = 0.25 * ((1 - p) ** 2 - 2 * p.log() * p * (1 - p))
    assert torch.allclose(gradient, (weight * slope)[:, None] * (probability - label), atol=1e-6)


def test_focal_loss_is_the_weighted_sum():
    """(official code) sum of w v(u) u against a loop in Python floats."""
    logits, answer, weight = torch.randn(30, 9), torch.randint(9, (30,)), torch.rand(30) * 20
    total = 0.0
    for row, a, w in zip(logits.tolist(), answer.tolist(), weight.tolist()):
        u = math.log(sum(math.exp(x) for x in row)) - row[a]
        total += w * 0.25 * (1 - math.exp(-u)) ** 2 * u
    assert m.focal_loss(logits, answer, weight, 0.25, 2.0).item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("arm", ["mdm", "ar"])
def test_loss_asks_only_at_asked_positions(arm):
    """(official code) Gradients of the logits are exactly 0 elsewhere; the baselines take no token weight."""
    table = torch.randn(4, 6, m.VOCAB, requires_grad=True)
    asked = torch.rand(4, 6) < 0.5
    part = dict(noisy=None, at=None, asked=asked, answer=torch.randint(m.VOCAB, (4, 6)), weight=torch.rand(4) + 1)
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    loss, count = m.make_loss(config(alpha=0.5, beta=2.0), run, arm)(lambda noisy, at, rows: table[rows], part)
    u = F.cross_entropy(table.flatten(0, 1), part["answer"].flatten(), reduction="none").view(4, 6)
    v = 0.5 * (1 - torch.exp(-u)) ** 2 if arm == "mdm" else 1.0
    assert (
        torch.allclose(loss, (part["weight"][:, None] * v * u)[asked].sum(), rtol=1e-5)
        and count == asked.sum()
    )
    (gradient,) = torch.autograd.grad(loss, table)
    assert (gradient[~asked] == 0).all() and (gradient[asked].abs().sum(1) > 0).all()


def any_order_table(N):
    """u(S, n) = -log p(x_n | all but S) for every set S of masked positions: any numbers will do."""
    chance = random.Random(N)
    sets = [S for k in range(1, N + 1) for S in itertools.combinations(range(N), k)]
    return {S: {n: chance.uniform(0.1, 3) for n in S} for S in sets}


@pytest.mark.parametrize("N", [2, 3, 4])
def test_any_order_identity(N):
    """paper Sec. 3: the loss weighted by 1/t is the mean of -log p over all N! orders, brute force.

    The Monte-Carlo loss of this file (w "original", times T) comes to the same number as T grows."""
    table, f = any_order_table(N), math.factorial
    orders = []
    for order in itertools.permutations(range(N)):
        orders.append(sum(table[tuple(sorted(order[i:]))][order[i]] for i in range(N)))
    mean = sum(orders) / len(orders)
    closed = sum(f(len(S) - 1) * f(N - len(S)) / f(N) * sum(u.values()) for S, u in table.items())
    assert closed == pytest.approx(mean, rel=1e-12)

    T, samples = 500, 200_000
    ids, target = canvas(N, rows=samples, L=N)
    t = torch.randint(T, (samples,))
    masked = m.q_sample(ids, target, t, T)[1]
    values = torch.zeros(2**N, N)
    for S, u in table.items():
        values[sum(2**n for n in S), list(S)] = torch.tensor(list(u.values()))
    u = values[(masked * 2 ** torch.arange(N)).sum(1)][masked]  # (R,)
    logits = torch.stack([-u, torch.log(-torch.expm1(-u))], 1)  # so that -log p(symbol 0) = u
    weight = m.sequence_weight(t, T, "original")[:, None].expand_as(masked)[masked]
    loss = m.focal_loss(logits, torch.zeros(len(u), dtype=torch.long), weight, 1.0, 0.0)
    assert loss.item() * T / samples == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize("kind", ["original", "linear", "none"])
def test_weight_of_a_mask_of_k_positions(kind):
    """(official code) (1/T) sum_t w(t) r^k (1-r)^(N-k) with r = (t+1)/T, against samples."""
    T, N, samples = 5, 4, 100_000
    ids, target = canvas(N, rows=samples, L=N)
    t = torch.randint(T, (samples,))
    weight = m.sequence_weight(t, T, kind)
    number = m.q_sample(ids, target, t, T)[1].sum(1)
    w = dict(original=lambda t: 1 / (t + 1), linear=lambda t: T - t, none=lambda t: 1)[kind]
    for k in range(N + 1):
        exact = sum(w(s) * ((s + 1) / T) ** k * (1 - (s + 1) / T) ** (N - k) for s in range(T)) / T
        seen = weight * (number == k) / math.comb(N, k)
        assert seen.mean().item() == pytest.approx(exact, abs=5 * seen.std().item() / samples**0.5)


# ---------------------------------------------------------------- method: decoding
class Fake:
    """A network by a function of (ids (b, L, F), number of the call) to logits; keeps what it was shown."""

    def __init__(self, function):
        self.function, self.seen = function, []

    def __call__(self, ids, at):
        assert at.shape == ids.shape[:2]
        self.seen.append(ids[..., 0].clone())
        return self.function(ids, len(self.seen)).clone()


def spread(ids, call, token=A):
    """Logits that favour `token` with another confidence at each place and call."""
    logits = torch.zeros(*ids.shape[:2], m.VOCAB)
    generator = torch.Generator().manual_seed(call)
    logits[..., token] = 1 + torch.rand(ids.shape[:2], generator=generator)
    return logits


@pytest.mark.parametrize("commit", ["freeze", "revise"])
@pytest.mark.parametrize("n, T", [(7, 3), (20, 20), (13, 5), (6, 1)])
def test_easy_first_counts(n, T, commit):
    """Alg. easy-first (official code): after call s, floor(n (T - s) / T) positions are masked."""
    ids, target = canvas(n, rows=3)
    ids[..., 0] = B
    model = Fake(spread)
    x, _ = m.decode(model, ids, target, places(ids), steps=T, commit=commit)
    left = [(seen == m.MASK).sum(1).tolist() for seen in model.seen]
    assert left == [[n * (T - s) // T] * 3 for s in range(T)]
    assert torch.equal(x[..., 0], torch.where(target, A, B)) and (ids == B).all()
    assert m.remaining(torch.tensor([n]), T, T) == 0


def test_choose_keeps_the_lowest_scores_masked():
    """Alg. easy-first: among eligible positions only; the others stay as they are."""
    score = torch.tensor([[0.1, 0.9, 0.2, 0.5, 0.3]])
    eligible = torch.tensor([[False, True, True, True, True]])
    for remain, stay in ((0, []), (1, [2]), (2, [2, 4]), (3, [2, 3, 4]), (4, [1, 2, 3, 4])):
        assert m.choose(score, eligible, torch.tensor([remain])).nonzero()[:, 1].tolist() == stay
    both = m.choose(score.repeat(2, 1), eligible.repeat(2, 1), torch.tensor([1, 3])).sum(1)
    assert both.tolist() == [1, 3]


def test_equal_scores_go_left_to_right():
    """Alg. easy-first, as the docstring of the file says."""
    ids, target = canvas(4)
    _, call = m.decode(Fake(lambda ids, call: torch.zeros(*ids.shape[:2], m.VOCAB)), ids, target, places(ids), steps=0)
    stay = m.choose(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), torch.tensor([3]))
    assert stay.tolist() == [[False, True, True, True]] and call[0, 2:].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("steps", [0, 9, 50])
def test_easy_first_one_position_a_call(steps):
    """Alg. easy-first: 0 calls means as many as positions; more calls than positions reveal one each."""
    ids, target = canvas(9, rows=2)
    ids[1, 2:5] = B
    target[1, 2:5] = False  # a row with six gaps
    model = Fake(lambda ids, call: spread(ids, call, B))
    _, call = m.decode(model, ids, target, places(ids), steps=steps)
    assert sorted(call[0, target[0]].tolist()) == list(range(1, 10)) and len(model.seen) == 9
    assert steps != 0 or sorted(call[1, target[1]].tolist()) == list(range(1, 7))
    assert len(set(call[1, target[1]].tolist())) == 6 or steps == 9


def test_one_call_is_the_argmax():
    """(official code) T = 1: one parallel forward pass, [SEP], [MASK] and [UNK] left out."""
    cfg, model = network()
    ids, target = m.encode(boards("easy", 8), cfg, "mdm")
    hidden = ids.masked_fill(target[..., None], m.MASK)
    with torch.no_grad():
        logits = model(hidden, places(hidden))
    logits[..., [m.SEP, m.MASK, m.UNK]] = -math.inf
    for commit in ("freeze", "revise"):
        x, call = m.decode(model, ids, target, places(ids), steps=1, commit=commit)
        assert torch.equal(x[..., 0], torch.where(target, logits.argmax(-1), ids[..., 0]))
        assert torch.equal(call, target.long())


@pytest.mark.parametrize("order", ["confidence", "margin", "random", "l2r"])
@pytest.mark.parametrize("commit", ["freeze", "revise"])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_decode_fills_the_answer_and_keeps_the_question(order, commit, threshold):
    """Alg. easy-first: no [MASK] is left, the question stands, forbidden symbols never come out."""
    cfg, model = network(task="path", canvas="source")
    ids, target = m.encode(m.path_problems(5, "pd2", np.random.default_rng(0)), cfg, "mdm")
    with torch.no_grad():
        model.wte.weight[[m.SEP, m.MASK, m.UNK]] *= 9  # a network that wants to say them
    for steps in (0, 1, 3, 20):
        x, call = m.decode(model, ids, target, places(ids), steps, order, commit, threshold)
        assert torch.equal(x[~target], ids[~target]) and torch.equal(x[..., 1], ids[..., 1])
        assert not torch.isin(x[..., 0][target], torch.tensor([m.SEP, m.MASK, m.UNK])).any()
        assert (call[~target] == 0).all() and (call[target] > 0).all()


def test_freeze_keeps_and_revise_changes():
    """Alg. easy-first (official code) A network that changes its mind at every call."""

    def fickle(ids, call):
        return spread(ids, call, 5 + call)  # call 1 says "1", call 2 says "2", and so on

    ids, target = canvas(8, rows=3)
    frozen = Fake(fickle)
    x, call = m.decode(frozen, ids, target, places(ids), steps=4)
    for before, after in itertools.pairwise([*frozen.seen, x[..., 0]]):
        assert torch.equal(after[before != m.MASK], before[before != m.MASK])
    assert torch.equal((x[..., 0] - 5)[target], call[target])
    x, call = m.decode(revised := Fake(fickle), ids, target, places(ids), steps=4, commit="revise")
    assert (x[..., 0][target] == 9).all() and (call[target] == 4).all()
    assert any(((a != m.MASK) & (a != b))[target].any() for a, b in itertools.pairwise(revised.seen))


def test_the_call_that_changed_a_position_last():
    """Where a network never changes its mind, revise tells the same calls as freeze (official code)."""
    ids, target = canvas(8, rows=2)
    ids.fill_(B)
    steady = Fake(lambda ids, call: spread(ids, 1))
    calls = [m.decode(steady, ids, target, places(ids), 4, commit=commit)[1] for commit in ("freeze", "revise")]
    assert torch.equal(*calls) and calls[0][0, target[0]].sort().values.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


def test_revise_may_mask_a_revealed_token_again():
    """Alg. easy-first (official code) Scores of revealed positions count anew."""

    def turning(ids, call):
        logits = torch.zeros(*ids.shape[:2], m.VOCAB)
        logits[..., A] = 9 + torch.arange(ids.shape[1]) * (1.0 if call % 2 else -1.0)
        return logits

    ids, target = canvas(4, L=4)
    model = Fake(turning)
    x, _ = m.decode(model, ids, target, places(ids), steps=4, commit="revise")
    masked = [(seen[0] == m.MASK).nonzero()[:, 0].tolist() for seen in model.seen]
    assert masked == [[0, 1, 2, 3], [0, 1, 2], [2, 3], [0]] and (x != m.MASK).all()


def test_threshold_reveals_all_above_and_at_least_one():
    """Two of five are sure at call 1, none after it; a call without a sure one reveals the surest."""

    def sure(ids, call):
        logits = torch.zeros(*ids.shape[:2], m.VOCAB)
        logits[..., A] = torch.tensor([9.0, 1, 9, 2, 3] if call == 1 else [0.0, 1, 0, 2, 3])
        return logits

    ids, target = canvas(5, L=5)
    _, call = m.decode(model := Fake(sure), ids.fill_(B), target, places(ids), steps=0, threshold=0.9)
    assert call.tolist() == [[1, 4, 1, 3, 2]] and len(model.seen) == 4


def test_orders_score_what_they_say():
    """(official code) confidence; margin p1 - p2 (Kim et al. 2025); random; left to right."""
    p = torch.full((1, 3, m.VOCAB), 1e-9)
    p[0, 0, [A, B]] = torch.tensor([0.5, 0.45])
    p[0, 1, [A, B, B + 1]] = torch.tensor([0.4, 0.2, 0.2])
    p[0, 2, [B, m.MASK]] = torch.tensor([0.1, 0.9])  # [MASK] is never an answer: what is left is certain
    token, logp, confidence = m.position_scores(p.log())
    norm = torch.tensor([[0.95, 0.8, 0.1]])
    assert token.tolist() == [[A, A, B]] and torch.equal(logp, confidence)
    assert torch.allclose(confidence.exp(), torch.tensor([[0.5, 0.4, 0.1]]) / norm, atol=1e-5)
    margin = m.position_scores(p.log(), "margin")[2]
    assert torch.allclose(margin, torch.tensor([[0.05, 0.2, 0.1]]) / norm, atol=1e-5)
    ids, target = canvas(4, L=4)
    ids.fill_(B)
    assert m.decode(Fake(spread), ids, target, places(ids), 0, "l2r")[1].tolist() == [[1, 2, 3, 4]]
    rows = 3000
    ids, target = canvas(3, rows, L=3)
    generator = torch.Generator().manual_seed(0)
    call = m.decode(Fake(spread), ids.fill_(B), target, places(ids), 0, "random", generator=generator)[1]
    orders = collections.Counter(map(tuple, call.tolist()))
    assert len(orders) == 6 and all(abs(n / rows - 1 / 6) < 0.04 for n in orders.values())


@pytest.mark.parametrize("order", ["confidence", "margin"])
def test_kernel_and_script_agree(order, monkeypatch):
    """The reference of kernels/decode_scores.py gives what position_scores gives. Bug: rows that are not positions."""
    from kernels.decode_scores import decode_scores_ref

    logits = 3 * torch.randn(2, 3, m.VOCAB)
    wanted = m.position_scores(logits.clone(), order)
    monkeypatch.setattr(m, "load_kernel", dict(decode_scores=decode_scores_ref).get)
    found = m.position_scores(logits, order, kernels=True)
    assert torch.equal(found[0], wanted[0]) and all(map(torch.allclose, found[1:], wanted[1:]))


@pytest.mark.parametrize("steps, agreement", [(1, 0.5), (2, 1.0)])
def test_two_calls_make_two_answers_agree(steps, agreement):
    """paper Sec. 3: x1 = x2 is a fair bit. Both at once agree half of the time, in turn always."""
    generator = torch.Generator().manual_seed(0)

    def joint(ids, call):
        seen = ids[..., 0].flip(1)  # what stands at the other place
        logits = torch.full((len(ids), 2, m.VOCAB), -30.0)
        logits[..., [A, B]] = 1e-3 * torch.rand(len(ids), 2, 2, generator=generator)  # ties, broken at random
        for bit in (A, B):
            logits[..., bit] += 30.0 * (seen == bit)
        return logits

    ids, target = canvas(2, rows=4000, L=2)
    x = m.decode(Fake(joint), ids, target, places(ids), steps)[0][..., 0]
    assert (x[:, 0] == x[:, 1]).float().mean() == pytest.approx(agreement, abs=0.03 if steps == 1 else 0)
    assert (x[:, 0] == A).float().mean() == pytest.approx(0.5, abs=0.03)


def candidates(board, cell):
    row, col = divmod(cell, 9)
    held = {
        board[c]
        for c in range(81)
        if c // 9 == row or c % 9 == col or (c // 27, c % 9 // 3) == (row // 3, col // 3)
    }
    return set(range(1, 10)) - held


def singles_round(board, hidden):
    """The cells that are forced now, by definition: {cell: digit}."""
    free = {c: candidates(board, c) for c in range(81) if not board[c]}
    forced = {c: min(d) for c, d in free.items() if len(d) == 1}
    if hidden:
        box = [r // 3 * 3 + c // 3 for r, c in (divmod(i, 9) for i in range(81))]
        units = [
            [i for i in range(81) if key[i] == u]
            for key in ([i // 9 for i in range(81)], [i % 9 for i in range(81)], box)
            for u in range(9)
        ]
        for unit, d in itertools.product(units, range(1, 10)):
            places = [c for c in unit if c in free and d in free[c]]
            if len(places) == 1:
                forced[places[0]] = d
    return forced


def slow_singles(board, hidden):
    """The board after all rounds, and how many there were."""
    board, rounds = list(board), 0
    while forced := singles_round(board, hidden):
        rounds += 1
        for cell, digit in forced.items():
            board[cell] = digit
    return board, rounds


def test_easy_first_with_an_oracle_solves_sudoku():
    """Alg. easy-first: a network sure of naked singles alone; with the threshold, one call a round."""

    def oracle(ids, call):
        logits = torch.zeros(*ids.shape[:2], m.VOCAB)
        for row, board in zip(logits, (ids[..., 0] - m.SYMBOL["0"]).clamp(min=0).tolist()):
            for cell, digit in singles_round(board, hidden=False).items():
                row[cell, m.SYMBOL[str(digit)]] = 100.0
        return logits

    problems = boards("easy", 4)
    ids, target = m.encode(problems, config(), "mdm")
    x, _ = m.decode(Fake(oracle), ids, target, places(ids), steps=0)
    assert torch.equal(x, ids)
    x, call = m.decode(Fake(oracle), ids, target, places(ids), steps=0, threshold=0.99)
    rounds = [slow_singles(map(int, quiz), False)[1] for quiz, _ in problems]
    assert torch.equal(x, ids) and call.amax(1).tolist() == rounds and min(rounds) >= 2


@pytest.mark.parametrize("arm, changes", [("ar", {}), ("ar", OFFICIAL), ("ar_rev", {})])
def test_kv_cache_changes_nothing(arm, changes):
    """Greedy decoding with a cache equals greedy decoding that reads everything anew."""
    cfg, model = network(arm, noise=0.5, task="path", **changes)
    problems = [p for p in m.path_problems(40, "pd3", np.random.default_rng(1)) if len(p[0]) == 47][:5] or [EXAMPLE]
    ids, target, at = m.in_order(*m.encode(problems, cfg, arm), cfg, arm)
    prompt = int(target[0].int().argmax())
    x, done = ids.clone(), torch.zeros(len(ids), dtype=torch.bool)
    x[:, prompt:] = m.PAD
    for i in range(prompt, ids.shape[1]):
        with torch.no_grad():
            logits = model(x, at)[:, i]
        logits[:, [m.PAD, m.SEP, m.MASK, m.UNK]] = -math.inf
        x[:, i, 0] = torch.where(done, m.PAD, logits.argmax(1))
        done |= x[:, i, 0] == m.EOS
    assert torch.equal(m.decode_left_to_right(model, ids, target, at), x)
    assert len(x[:, prompt:, 0].unique()) > 1


@pytest.mark.parametrize("task, changes", [("path", OFFICIAL), ("sudoku", {})])
def test_questions_of_all_lengths_are_answered_together(task, changes):
    """Questions have several lengths, boards several numbers of clues; each answer is the one that it gets alone."""
    cfg, model = network("ar", noise=0.5, task=task, **changes)
    problems = boards("easy", 6) if task == "sudoku" else m.path_problems(30, "pd1", np.random.default_rng(2))
    assert len({len(source.replace("0", "")) for source, _ in problems}) > 1
    texts, _ = m.answer(model, "ar", problems, cfg)
    assert texts == [m.answer(model, "ar", [problem], cfg)[0][0] for problem in problems]
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    "task, layout, arm",
    [
        ("sudoku", {}, "mdm"),
        ("sudoku", dict(canvas="source"), "mdm"),
        ("sudoku", {}, "ar"),
        ("path", {}, "mdm"),
        ("path", OFFICIAL, "mdm"),
        ("path", OFFICIAL, "teacherless"),
        ("path", {}, "ar"),
        ("path", {}, "ar_rev"),
        ("path", {}, "teacherless"),
    ],
)
def test_answers_do_not_depend_on_the_label(task, layout, arm):
    """--solve: the network is shown the question alone, so an unknown or false label changes nothing."""
    cfg, model = network(arm, task=task, noise=0.3, **layout)
    problems = boards("easy", 2) if task == "sudoku" else m.path_problems(3, "pd4", np.random.default_rng(0))
    texts, _ = m.answer(model, arm, problems, cfg, **dict(steps=3) if arm == "mdm" else {})
    false = [(source, problems[i - 1][1]) for i, (source, _) in enumerate(problems)]
    for others in ([(source, "") for source, _ in problems], false):
        assert m.answer(model, arm, others, cfg, **dict(steps=3) if arm == "mdm" else {})[0] == texts
    if task == "sudoku" and arm == "mdm" and not layout:
        assert all(a in ("0", b) for (quiz, _), text in zip(problems, texts) for a, b in zip(quiz, text))


# ---------------------------------------------------------------- data
def valid(board):
    return all({board[c] for c in np.flatnonzero(unit)} == set(range(1, 10)) for unit in m.UNITS)


def brute_force(board):
    """Every completion, cell after cell in reading order."""
    if 0 not in board:
        return [tuple(board)]
    at, found = board.index(0), []
    for digit in candidates(board, at):
        found += brute_force([*board[:at], digit, *board[at + 1 :]])
    return found


def test_solutions_against_brute_force():
    grid = [(3 * (r % 3) + r // 3 + c) % 9 + 1 for r in range(9) for c in range(9)]
    assert valid(grid) and list(m.solutions(grid)) == [grid]
    chance, counts = random.Random(0), set()
    for blanks in (range(18), [c for c in range(81) if grid[c] in (1, 2, 3)], chance.sample(range(81), 40)):
        board = [0 if c in blanks else digit for c, digit in enumerate(grid)]
        found = [tuple(s) for s in m.solutions(board)]
        assert sorted(found) == sorted(brute_force(board)) and len(set(found)) == len(found)
        counts.add(len(found))
        assert m.has_one_solution(np.array([board])).tolist() == [len(found) == 1]
    assert max(counts) > 1
    stuck = [0, *range(1, 9), *[0] * 72]
    stuck[9] = 9  # no digit is left for the first cell
    assert list(m.solutions(stuck)) == []
    assert m.has_one_solution(np.array([[0] * 81, stuck, grid])).tolist() == [False, False, True]


@pytest.mark.parametrize(
    "level, n, clues",
    [("easy", 12, (30, 36)), ("medium", 12, (34, 34)), ("tough", 12, (22, 47)), ("hard", 1, (17, 25))],
)
def test_levels(level, n, clues):
    """One solution, the clues of the class, and exactly the singles that the class needs."""
    problems = boards(level, n)
    assert len(problems) == len(set(problems)) == n
    for quiz, solution in problems:
        board = [int(c) for c in quiz]
        assert valid([int(c) for c in solution]) and clues[0] <= sum(map(bool, board)) <= clues[1]
        assert ["".join(map(str, s)) for s in itertools.islice(m.solutions(board), 2)] == [solution]
        naked, singles = ("".join(map(str, slow_singles(board, hidden)[0])) for hidden in (False, True))
        assert (singles == solution) == (level != "hard")
        assert level == "medium" or (naked == solution) == (level == "easy")


@pytest.mark.parametrize("hidden", [False, True])
def test_fill_singles_against_its_definition(hidden):
    quizzes = [
        quiz for level, n in (("easy", 12), ("tough", 12), ("hard", 1)) for quiz, _ in boards(level, n)
    ][8:]
    filled = m.fill_singles(np.concatenate([digits(quiz) for quiz in quizzes]), hidden)
    assert filled.tolist() == [slow_singles(map(int, quiz), hidden)[0] for quiz in quizzes]


def test_hidden_single_by_definition():
    board = digits(boards("tough", 12)[0][0])
    blanks = [(c, d) for c in np.flatnonzero(board[0] == 0) for d in range(1, 10)]
    cell, digit = (np.array(x) for x in zip(*blanks))
    told = m.is_hidden_single(board.repeat(len(blanks), 0), cell, digit)
    lists = {c: candidates(board[0].tolist(), c) for c in set(cell.tolist())}
    for (c, d), answer in zip(blanks, told):
        rivals = [[o for o in np.flatnonzero(u) if o != c and d in lists.get(o, ())] for u in m.UNITS if u[c]]
        # the digit dug from the cell could always stand there; others are not asked for
        assert d not in lists[c] or answer == any(not r for r in rivals)


@pytest.mark.parametrize("distance", range(6))
def test_paths_have_one_route_and_their_distance(distance):
    for source, target in m.path_problems(40, f"pd{distance}", np.random.default_rng(distance)):
        edges, ends = source.split("-")
        edges = [tuple(edge.split(",")) for edge in edges.split("/")]
        start, goal = ends.split(",")

        def routes(node):
            onward = [[(u, v), *rest] for u, v in edges if u == node for rest in routes(v)]
            return onward + ([[]] if node == goal else [])

        (route,) = routes(start)
        assert "/".join(map(",".join, route)) == target and len(set(edges)) == 10 and len(route) == 5
        assert m.planning_distance(source, target) == f"pd{distance}"
        assert len({node for edge in edges for node in edge}) == 11


def test_paths_are_shuffled_and_cover_all_nodes():
    problems = m.path_problems(300, "pd3", np.random.default_rng(0))
    assert len(set(problems)) == 300 and {s.split("-")[1].split(",")[0] for s, _ in problems} == set(
        map(str, range(12))
    )
    places = collections.Counter(s.split("-")[0].split("/").index(t.split("/")[0]) for s, t in problems)
    assert len(places) == 10 and max(places.values()) < 60


def test_vocabulary_is_the_official_one():
    """(official code) 31 ids."""
    assert (m.PAD, m.SEP, m.MASK, m.EOS, m.UNK, m.VOCAB) == (0, 1, 2, 3, 4, 31)
    wanted = {"0": 5, "9": 14, "*": 15, "+": 16, "-": 17, "/": 18, "=": 19, ",": 20, "a": 21, "j": 30}
    assert {c: m.SYMBOL[c] for c in wanted} == wanted and len(m.SYMBOL) == 26


@pytest.mark.parametrize("layout", [dict(), OFFICIAL])
@pytest.mark.parametrize("arm", ["mdm", "ar", "ar_rev", "teacherless"])
def test_published_path_round_trips(layout, arm):
    cfg = config(task="path", **layout)
    ids, target = m.encode([EXAMPLE], cfg, arm)
    route = m.reverse_path(EXAMPLE[1]) if arm == "ar_rev" and layout else EXAMPLE[1]
    begin = int(target[0].int().argmax()) if layout else 11
    assert m.to_text(ids[0, begin:, 0].tolist(), cfg) == route
    if layout:
        assert m.to_text([*ids[0, : begin - 1, 0].tolist(), m.EOS], cfg) == EXAMPLE[0]
    else:
        edges = [
            f"{u - 5 if u < 15 else u - 11},{v - 5 if v < 15 else v - 11}" for u, v in ids[0, :11].tolist()
        ]
        assert "/".join(edges[:10]) + f"-{edges[10]}" == EXAMPLE[0]
    assert m.reverse_path("1,2/2,11/11,3") == "3,11/11,2/2,1"


def test_exact_ids_of_the_paper_layout():
    """(official code) source [SEP] target [EOS] [PAD]...; padding is asked of mdm, not of ar."""
    cfg = config(task="path", **OFFICIAL)
    ids, target = m.encode([EXAMPLE], cfg, "mdm")
    n, k = len(EXAMPLE[0]), len(EXAMPLE[1])
    assert ids.shape == (1, 75, 1) and ids[0, :8, 0].tolist() == [11, 20, 7, 18, 7, 20, 6, 5]  # 6,2/2,10
    assert ids[0, n - 4 : n + 4, 0].tolist() == [17, 13, 20, 8, 1, 13, 20, 7]  # -8,3 [SEP] 8,2
    assert ids[0, n + 1 + k :, 0].tolist() == [3] + [0] * (75 - n - k - 2) and n + k + 2 < 75
    assert target[0].tolist() == [False] * (n + 1) + [True] * (74 - n)
    assert m.encode([EXAMPLE], cfg, "ar")[1][0].tolist() == [False] * (n + 1) + [True] * (k + 1) + [False] * (
        73 - n - k
    )
    quiz, solution = boards("easy", 2)[0]
    ids, target = m.encode([(quiz, solution)], config(canvas="source"), "mdm")
    assert ids[0, :, 0].tolist() == [5 + int(c) for c in quiz] + [1] + [5 + int(c) for c in solution] + [3]
    assert target[0].tolist() == [False] * 82 + [True] * 82
    ids, target = m.encode([(quiz, solution)], config(), "mdm")
    assert ids[0, :, 0].tolist() == [5 + int(c) for c in solution]
    assert target[0].tolist() == [c == "0" for c in quiz]


def test_exact_ids_of_a_path_in_place():
    """Ten edges, start and goal, then the six nodes of the route, of which only the ends are seen."""
    ids, target = m.encode([EXAMPLE], config(task="path"), "mdm")
    assert ids[0, [0, 1, 10]].tolist() == [[11, 7], [7, 21], [13, 8]]  # 6,2  2,10  8,3 (ten is "a")
    assert ids[0, 11:].tolist() == [[13, 0], [7, 0], [5, 0], [22, 0], [10, 0], [8, 0]]
    assert target[0].tolist() == [False] * 12 + [True] * 4 + [False]
    ids, target = m.encode([EXAMPLE], config(task="path", canvas="source"), "teacherless")
    assert ids[0, [11, 18]].tolist() == [[m.SEP, 0], [m.EOS, 0]]
    assert target[0].tolist() == [False] * 12 + [True] * 7


def test_lengths():
    path = [config(task="path"), config(task="path", canvas="source"), config(task="path", **OFFICIAL)]
    for arm in ("mdm", "ar"):
        lengths = [m.encode(boards("easy", 2), config(canvas=c), arm)[0].shape[1] for c in ("inplace", "source")]
        assert lengths + [m.encode([EXAMPLE], cfg, arm)[0].shape[1] for cfg in path] == [81, 164, 17, 19, 75]
    longest = max(
        len(s) + len(t) + 2
        for d in range(6)
        for s, t in m.path_problems(300, f"pd{d}", np.random.default_rng(0))
    )
    assert longest <= 75


@pytest.mark.parametrize("canvas_name, L", [("inplace", 81), ("source", 164)])
def test_augmentation_is_a_symmetry(canvas_name, L):
    """Boards stay valid with one solution; question and answer move and are renamed together."""
    problems = boards("easy", 4)
    cfg = config(canvas=canvas_name)
    ids, target = m.encode(problems * 2, cfg, "mdm")
    new, hidden = m.augment_sudoku(ids, target, torch.Generator().manual_seed(0))
    assert new.shape == (8, L, 1) and len({tuple(row) for row in new[..., 0].tolist()}) == 8
    for row, blank, (quiz, _) in zip(new[..., 0].tolist(), hidden.tolist(), problems * 2):
        if L == 164:
            asked, solution = [x - 5 for x in row[:81]], [x - 5 for x in row[82:163]]
            assert (row[81], row[163]) == (m.SEP, m.EOS) and blank == [False] * 82 + [True] * 82
        else:
            solution = [x - 5 for x in row]
            asked = [0 if b else x for b, x in zip(blank, solution)]
        assert valid(solution) and sum(map(bool, asked)) == sum(c != "0" for c in quiz)
        assert list(itertools.islice(m.solutions(asked), 2)) == [solution]
    again = m.augment_sudoku(ids, target, torch.Generator().manual_seed(0))[0]
    assert torch.equal(again, new)


def test_augmentation_reaches_every_cell_and_digit():
    """Any cell can come to any place, any digit take any name, rows become columns half of the time."""
    n = 5000
    ids, target = m.encode(boards("easy", 2)[:1] * n, config(), "mdm")
    first_row = (torch.arange(81) < 9).repeat(n, 1)
    new, row = m.augment_sudoku(ids, first_row, torch.Generator().manual_seed(1))
    row = row.view(n, 9, 9)
    across, down = row.all(2).any(1), row.all(1).any(1)
    assert (across ^ down).all() and across.float().mean() == pytest.approx(0.5, abs=0.03)
    for lines in (row.all(2), row.all(1)):
        assert (lines.float().mean(0) * 18 - 1).abs().max() < 0.3
    corner = m.augment_sudoku(ids, torch.arange(81).repeat(n, 1) == 40, torch.Generator().manual_seed(2))[1]
    assert (corner.float().mean(0) * 81 - 1).abs().max() < 0.6
    rate = torch.bincount(new[:, 0, 0], minlength=m.VOCAB)[6:15] / n
    assert (rate * 9 - 1).abs().max() < 0.2


@pytest.mark.parametrize("task", ["sudoku", "path"])
def test_training_and_test_problems_are_disjoint(task):
    small = dict(n_train=24, n_val=2, n_test=4, task=task, levels="easy", test_levels="easy")
    train, val, test = m.load_problems(config(**small), {})
    held_out = {source for group in [*val.values(), *test.values()] for source, _ in group}
    assert list(test) == (["easy"] if task == "sudoku" else [f"pd{k}" for k in range(6)])
    assert held_out.isdisjoint(source for source, _ in train) and len(train) >= 24
    assert all(len(x) == 4 for x in test.values()) and all(len(x) == 2 for x in val.values())
    again = m.load_problems(config(**small, seed=1), {})
    assert again[1:] == (val, test) and again[0] != train
    problems = train[:9] + list(test.values())[0][:2]
    kept, _, _ = m.load_problems(config(**small), dict(data=problems))
    assert kept == train[:9]  # a file's problems that are held out are dropped
    kept, _, test = m.load_problems(config(**small), dict(test_data=train[:7]))
    assert sum(map(len, test.values())) == 7 and {s for s, _ in kept}.isdisjoint(s for s, _ in train[:7])


def test_file_formats(tmp_path):
    quiz, solution = boards("easy", 2)[0]
    texts = dict(
        csv=f"quizzes,solutions\n{quiz},{solution}\n\n",
        txt=f"{quiz.replace('0', '.')} {solution}\n",
        jsonl=json.dumps(dict(input=quiz, output=solution)),
    )
    for kind, text in texts.items():
        (tmp_path / f"x.{kind}").write_text(text)
        assert m.read_problems(str(tmp_path / f"x.{kind}"), "sudoku") == [(quiz, solution)]
    (tmp_path / "x.txt").write_text(f"{quiz}\n{EXAMPLE[0]}"[:82])
    assert m.read_problems(str(tmp_path / "x.txt"), "sudoku", need_target=False) == [(quiz, "")]
    (tmp_path / "x.txt").write_text(" ".join(EXAMPLE))
    assert m.read_problems(str(tmp_path / "x.txt"), "path") == [EXAMPLE]


@pytest.mark.parametrize("n, size", [(10, 4), (7, 7), (5, 12)])
def test_batches_cover_each_epoch_once(n, size):
    rows = torch.cat([m.batch_rows(step, size, n, seed=3) for step in range(n)])
    epochs = rows.view(-1, n)
    assert len(epochs) == size and torch.equal(epochs.sort(1).values, torch.arange(n).repeat(size, 1))
    assert len({tuple(e) for e in epochs.tolist()}) > 1
    assert not torch.equal(rows, torch.cat([m.batch_rows(step, size, n, seed=4) for step in range(n)]))


def test_ranks_share_a_batch():
    cfg, data = config(task="path", batch_size=6), m.encode([EXAMPLE] * 9, config(task="path"), "mdm")
    whole, *parts = (
        m.make_batch(cfg, SimpleNamespace(device=torch.device("cpu"), rank=r, world=w), "mdm", data, 2)
        for r, w in ((0, 1), (0, 2), (1, 2))
    )
    for name, x in whole.items():
        assert torch.equal(torch.stack([parts[0][name], parts[1][name]], 1).flatten(0, 1), x)


# ---------------------------------------------------------------- evaluation and claims
def test_method_hash_knows_settings_and_method(tmp_path, monkeypatch):
    """Other settings or another line of sections 2-6 give another hash; other docstrings, plumbing or scales do not."""
    text, hashes = Path(m.__file__).read_text(), {}
    edits = dict(same=("", ""), method=("return alpha * (-", "return alpha * (+"), words=("v(u) = al", "V(u) = al"),
                 plumbing=("# --- end block ---", "X = 1\n# --- end block ---"), scales=("steps=293_000", "steps=1"))
    for name, (old, new) in edits.items():
        assert old in text
        (tmp_path / f"{name}.py").write_text(text.replace(old, new) if old else text)
        monkeypatch.setattr(m, "__file__", str(tmp_path / f"{name}.py"))
        hashes[name] = m.method_hash(config())
        assert hashes[name] != m.method_hash(config(lr=1e-4))
    assert hashes["same"] == hashes["words"] == hashes["plumbing"] == hashes["scales"] != hashes["method"]


def test_grade_sudoku():
    quiz, solution = boards("easy", 2)[0]
    given, blank = quiz.index(next(c for c in quiz if c != "0")), quiz.index("0")

    def put(cell, digit):
        return solution[:cell] + digit + solution[cell + 1 :]

    assert m.grade("sudoku", quiz, solution, solution) == (True, True)
    wrong = "1" if solution[blank] != "1" else "2"
    assert m.grade("sudoku", quiz, solution, put(blank, wrong)) == (False, False)
    renamed = solution.translate(str.maketrans("12", "21"))  # a valid board that changes givens
    assert m.grade("sudoku", quiz, solution, renamed) == (False, False)
    assert m.grade("sudoku", "0" * 81, solution, renamed) == (True, False)
    assert m.grade("sudoku", quiz, solution, solution[:-1]) == (False, False)
    assert m.grade("sudoku", quiz, solution, put(given, "?")) == (False, False)


def test_grade_path():
    source, target = EXAMPLE
    assert m.grade("path", source, target, target) == (True, True)
    assert m.grade("path", source, target, m.reverse_path(target)) == (False, True)  # official only
    other = "8,2/2,10/10,4/4,1/1,9"  # real edges, another end
    assert m.grade("path", source, target, other) == (False, False)
    assert m.grade("path", source, target, "8,2/2,0/0,11/11,3") == (False, False)  # an edge that is not there
    assert m.grade("path", source, target, "8,2/0,11/2,0/11,5/5,3") == (False, False)  # not linked
    for text in ("", "?,?", "8", "8,2", "8,2/"):
        assert m.grade("path", source, target, text) == (False, False)
    assert m.grade("path", source, "", target) == (True, False)  # no label: the rules alone


def test_verdict_has_three_outcomes():
    assert m.verdict(0.5, (0.3, 0.7), 0.2) == "HOLDS"
    assert m.verdict(0.1, (0.0, 0.15), 0.2) == "DOES NOT HOLD"
    assert m.verdict(0.25, (0.1, 0.4), 0.2) == m.verdict(0.2, (0.2, 0.3), 0.2) == "INCONCLUSIVE"
    with pytest.raises(AssertionError):
        m.verdict(0.9, (0.1, 0.4), 0.2)


def test_mean_interval_covers():
    """The true gap lies inside about 95 times in 100; without variance the interval is still wide."""
    rng, inside, p = np.random.default_rng(0), 0, [0.05, 0.65, 0.3]
    for _ in range(1500):
        mean, (low, high) = m.mean_interval(rng.choice([-1, 0, 1], 100, p=p))
        inside += low <= 0.25 <= high
        assert (low + high) / 2 == pytest.approx(mean)
    assert 0.93 < inside / 1500 < 0.985
    mean, (low, high) = m.mean_interval(np.ones(98))
    x = [1] * 99 + [-1]
    assert mean == 1 and high - mean == pytest.approx(
        1.96 * (sum((a - 0.98) ** 2 for a in x) / 99) ** 0.5 / 10
    )


def curve(*rows):
    return [dict(step=i, examples=100 * i, exact=dict(a=a, b=b)) for i, (a, b) in enumerate(rows)]


def test_examples_needed():
    assert m.examples_needed(curve((0, 0), (0.95, 0.5), (0.95, 0.9), (1, 1))) == (100, 200)
    assert m.examples_needed(curve((0, 0), (1, 1), (0.8, 1), (1, 1))) == (0, 100)  # the first time counts
    assert m.examples_needed(curve((0, 0), (0.5, 1))) == (100, math.inf)  # never
    assert m.examples_needed(curve((0, 0), (0.6, 1), (0.7, 0.7)), bar=0.65) == (100, 200)


def test_statistics():
    def result(points, **correct):
        return dict(
            curve=points, correct={k.replace("__", "/").replace("_", " "): v for k, v in correct.items()}
        )

    mdm_curve, ar_curve = curve((0, 0), (1, 1), (1, 1)), curve((0, 0), (0, 1), (0, 1), (1, 1))
    done = dict(mdm=result(mdm_curve, mdm__worst=[1, 1, 1, 0], mdm__pd5=[1, 1, 1, 1]))
    found = m.statistics("path", done)
    assert set(found) == {"mdm-at-every-distance"} and found["mdm-at-every-distance"][0] == 0.75
    done["ar"] = result(ar_curve, ar__pd5=[1, 0, 0, 0])
    found = m.statistics("path", done)
    assert set(found) == {claim[0] for claim in m.CLAIMS["path"]} and found["mdm-beats-ar-far"][0] == 0.75
    assert found["mdm-beats-ar-far"][1] == m.mean_interval(np.array([0, 1, 1, 1]))[1]
    # ar needs 200..300 examples, mdm 0..100
    assert found["mdm-needs-fewer-examples"] == (3.0, (2.0, 300.0))
    done = dict(
        mdm=result(mdm_curve, mdm__medium=[1, 1], mdm_random__medium=[0, 1], mdm_1_call__medium=[0, 0])
    )
    found = {name: x[0] for name, x in m.statistics("sudoku", done).items()}
    assert found == {"easy-first-beats-random": 0.5, "calls-buy-accuracy": 1.0}


# ---------------------------------------------------------------- training
def test_lr_starts_above_zero_and_ends_at_the_minimum():
    lr = [m.lr_at(step, 1.0, 0.1, 10, 50) for step in range(60)]
    assert 0 < lr[0] < 0.2 and max(lr) == lr[10] == 1.0 and lr[49:] == [pytest.approx(0.1)] * 11
    assert lr[:11] == sorted(lr[:11]) and lr[10:] == sorted(lr[10:], reverse=True)
    assert m.lr_at(0, 1.0, 0.0, 0, 1) == 1.0 and lr[30] == pytest.approx(
        0.1 + 0.45 * (1 + math.cos(math.pi * 20 / 39))
    )


def cpu_run(out=None):
    return SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.float32, rank=0, world=1, out=out, stop=False
    )


@pytest.mark.parametrize("arm", ["mdm", "ar"])
def test_accumulation_does_not_change_the_gradient(arm):
    """One batch in parts of 8, 4, 3 and 1: the sum over the batch divided by its count (official code)."""
    cfg = config(task="path", batch_size=8)
    problems = [p for d in range(4) for p in m.path_problems(2, f"pd{d}", np.random.default_rng(d))]
    data, model, _ = m.prepare(cfg, cpu_run(), arm, problems)
    batch = m.make_batch(cfg, cpu_run(), arm, data, 0)
    asked = batch["asked"]
    u = F.cross_entropy(model(batch["noisy"], batch["at"])[asked], batch["answer"][asked], reduction="none")
    w = batch["weight"][:, None].expand_as(asked)[asked] * (0.25 * (1 - torch.exp(-u)) if arm == "mdm" else 1)
    by_hand = (w * u).sum() / asked.sum()
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(by_hand, list(model.parameters()))])
    assert len(set(asked.sum(1).tolist())) > 1 or arm == "ar"  # canvases with different numbers of masks
    for micro in (8, 4, 3, 1):
        model.zero_grad()
        mean = m.accumulate(model, batch, micro, m.make_loss(cfg, cpu_run(), arm))
        got = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert torch.allclose(got, wanted, atol=1e-6) and mean.item() == pytest.approx(
            by_hand.item(), rel=1e-5
        )


def test_nothing_masked_is_no_division_by_zero():
    cfg, model = network(task="path")
    ids, target = m.encode([EXAMPLE], cfg, "mdm")
    batch = dict(noisy=ids, at=places(ids), asked=target & False, answer=ids[..., 0], weight=torch.ones(1))
    assert m.accumulate(model, batch, 1, m.make_loss(cfg, cpu_run(), "mdm")) == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def overfit(out, monkeypatch=None, corrupt=None):
    """Exact answers on the eight problems that a small mdm is trained on."""
    if corrupt:
        monkeypatch.setattr(m, "corrupt", corrupt)
    cfg = config(
        task="path",
        n_embd=48,
        steps=180,
        batch_size=16,
        warmup_steps=10,
        lr=6e-3,
        eval_every=180,
        save_every=1000,
        log_every=1000,
    )
    problems = [p for d in range(4) for p in m.path_problems(2, f"pd{d}", np.random.default_rng(d))]
    return m.train(cfg, cpu_run(out), "mdm", problems, dict(train=problems), {})[1][-1]["exact"]["train"]


def test_mdm_learns(tmp_path):
    """All of eight problems, with the method as it is."""
    assert overfit(tmp_path) == 1.0


def test_mdm_does_not_learn_from_what_it_sees(tmp_path, monkeypatch):
    """The same run, asked for the visible positions instead of the masked ones, answers none of the eight."""
    original = m.corrupt

    def broken(ids, target, *rest):
        noisy, asked, weight = original(ids, target, *rest)
        return noisy, ~asked, weight

    assert overfit(tmp_path, monkeypatch, broken) <= 0.25


# ---------------------------------------------------------------- command line
FIELDS = (
    "script task scale tag seed argv commit method_hash data_sha256 device threads versions minutes tried "
    "metrics claims"
).split()


def test_smoke(smoke):
    """Both tasks, side by side: every file, every field of RESULT, every row of the table, and no claim."""
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda argv: smoke("mdm", *argv), ((), ARMS)))
    for run, arms, classes in zip(
        runs, ("mdm,ar", ARMS[-1]), (["easy", "medium"], [f"pd{k}" for k in range(6)])
    ):
        arms, result = arms.split(","), run.result
        assert set(FIELDS) <= set(result) and result["script"] == "mdm" and result["claims"] == []
        assert result == json.loads((run.out / "result.json").read_text()) and "CLAIM" not in run.stdout
        wanted = {"config.json", "log.jsonl", "result.json", "state.pt", "plot.png"}
        assert wanted | {f"{arm}.safetensors" for arm in arms} == {p.name for p in run.out.iterdir()}
        metrics, second = result["metrics"], "blanks" if result["task"] == "sudoku" else "official"
        cells = itertools.product(arms, classes, ("", f" {second}"))
        assert all(0 <= metrics[f"{arm}/{group}{more}"] <= 1 for arm, group, more in cells)
        assert {key.split("/")[0] for key in metrics} == {*arms, *(f"mdm {name}" for name in m.SWEEP)}
        assert metrics["mdm 1 call/calls"] == 1 and all(np.isfinite(x) for x in metrics.values())
        log = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
        assert {line["name"] for line in log} == set(arms) and len(result["method_hash"]) == 12


def test_kill_and_resume_and_ctrl_c(kill_and_resume, alone):
    """Both at once, each on a core of its own."""
    with ThreadPoolExecutor() as pool:
        ctrl_c = pool.submit(ctrl_c_saves_and_says_how_to_go_on, alone)
        kill_and_resume("mdm", *ARMS, seed=4)  # early kills: less is done twice
        ctrl_c.result()


def test_two_ranks_give_the_weights_of_one(alone, smoke):
    """Six steps of mdm by two processes over gloo: the same weights as by one."""
    cwd = alone.new()
    shutil.copy(m.__file__, cwd)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = alone.env | dict(
            WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1])
        )
    command = [sys.executable, "mdm.py", *"--scale smoke --task path --arms mdm --n-val 1 --n-test 1".split()]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)
    ranks = [
        subprocess.Popen(
            command, cwd=cwd, env=env | dict(RANK=str(r), LOCAL_RANK=str(r)), preexec_fn=alone.pin(), **pipes
        )
        for r in range(2)
    ]
    try:
        end = time.monotonic() + 20 * float(os.environ.get("TEST_TIME_FACTOR", "1"))
        while (
            time.monotonic() < end
            and any(p.poll() is None for p in ranks)
            and not any(p.poll() for p in ranks)
        ):
            time.sleep(0.05)
    finally:
        status = [process.poll() for process in ranks]
        for process in ranks:
            process.kill()
        texts = [process.communicate()[0][-1500:] for process in ranks]
    assert status == [0, 0], texts
    whole = load_file(smoke("mdm", *ARMS).out / "mdm.safetensors")
    ours = load_file(cwd / "out/mdm/path-smoke-s0/mdm.safetensors")
    assert whole.keys() == ours.keys() and max((whole[k] - ours[k]).abs().max() for k in whole) < 1e-6


def ctrl_c_saves_and_says_how_to_go_on(alone):
    def interrupt(process):
        while process.poll() is None and not list(cwd.rglob("log.jsonl")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)

    cwd = alone.new()
    argv = "--scale smoke --task path --arms mdm --steps 1000000 --save-every 1000000".split()
    run = alone("mdm", *argv, cwd=cwd, codes=(130,), meanwhile=interrupt)
    command = re.search(r"continue with: (.*)", run.stdout)[1]
    assert shlex.split(command)[1:] == ["mdm.py", *argv, "--resume"]
    state = torch.load(next(cwd.rglob("state.pt")), weights_only=True)
    assert state["arm"] == "mdm" and state["step"] < 1_000_000 and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--colour red", ["--colour"]),
        ("--ste 5", ["--ste"]),
        ("--task chess", ["chess", "sudoku", "path"]),
        ("--order entropy", ["entropy", "margin"]),
        ("--steps 0", ["--steps", "at least 1"]),
        ("--batch-size 0", ["--batch-size", "at least 1"]),
        ("--micro-batch -1", ["--micro-batch", "at least 0"]),
        ("--dropout 1.5", ["--dropout", "from 0 to 0.99"]),
        ("--arms ar_rev", ["--arms", "mdm, ar"]),
        ("--arms mdm,mdm", ["--arms"]),
        ("--levels easy,brutal", ["--levels", "easy, medium, tough, hard"]),
        ("--test-levels brutal", ["--test-levels", "easy, medium, tough, hard"]),
        ("--shift", ["--shift", "--canvas source"]),
        ("--task path --format chars", ["--format chars", "--canvas source"]),
        ("--n-embd 97", ["--n-embd 97", "--n-head"]),
        ("--solve boards.txt", ["--solve", "--load"]),
        ("--load out", ["--solve", "--load"]),
        ("--scale smoke --data missing.csv", ["missing.csv", "cannot be read"]),
    ],
)
def test_wrong_flags(rejects, argv, words):
    rejects(m.main, argv.split(), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_kernels_need_cuda(rejects):
    rejects(m.main, ["--kernels"], "--kernels", "CUDA")
    rejects(m.main, ["--scale", "smoke", "--device", "cuda"], "--device cuda", "auto")


GOOD = "".join(str((3 * (r % 3) + r // 3 + c) % 9 + 1) for r in range(9) for c in range(9))  # a solved board
OTHER = GOOD.translate(str.maketrans("12", "21"))
BAD_LINES = dict(
    csv=("sudoku", f"quizzes,solutions\n{GOOD},{GOOD}\n{GOOD[:80]},{GOOD}\n", 3, "source"),
    target=("sudoku", f"{GOOD},{GOOD}\n{GOOD},{GOOD[:80]}0\n", 2, "target"),
    rules=("sudoku", f"{'0' * 81},{'123456789' * 9}\n", 1, "not a right answer"),
    given=("sudoku", f"{GOOD},{OTHER}\n", 1, "not a right answer"),
    text=("path", f"{' '.join(EXAMPLE)}\n\n{EXAMPLE[0]} 8,2/2,0\n", 3, "target"),
    node=("path", f"{EXAMPLE[0].replace('11', '12')} {EXAMPLE[1]}\n", 1, "source"),
    jsonl=("path", json.dumps(dict(input=EXAMPLE[0], output=EXAMPLE[1])) + '\n{"input": \n', 2, "JSON"),
    field=("sudoku", json.dumps(dict(quiz=GOOD)), 1, "source"),
)


@pytest.mark.parametrize("kind", BAD_LINES)
def test_malformed_lines_are_named(rejects, tmp_path, kind):
    task, text, number, word = BAD_LINES[kind]
    (file := tmp_path / "bad.txt").write_text(text)
    rejects(lambda argv: m.read_problems(argv[0], task), [file], f"bad.txt:{number}:", word)


def test_unreadable_files(rejects, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "list").write_text('{"input": 5}\n')
    for name, word in (
        ("binary", "cannot be read"),
        (".", "cannot be read"),
        ("empty", "holds no problem"),
        ("list", "does not fit"),
    ):
        rejects(lambda argv: m.read_problems(argv[0], "sudoku"), [tmp_path / name], word)


def test_training_file_that_is_the_test_file(rejects, tmp_path):
    """Held-out problems are dropped from the training file; where nothing is left, say so."""
    (file := tmp_path / "x.txt").write_text(" ".join(EXAMPLE))
    argv = ["--scale", "smoke", "--task", "path", "--arms", "mdm", "--data", file, "--test-data", file]
    same = dict(data=[EXAMPLE], test_data=[EXAMPLE])
    rejects(lambda a: m.load_problems(m.cli(m.Config, m.SCALES, a), same), argv, "x.txt")


def test_out_directory_that_holds_a_run(rejects, smoke, tmp_path):
    out = smoke("mdm", *ARMS).out
    same = ["--scale", "smoke", *ARMS]
    rejects(m.main, [*same, "--out", out], "finished run", "--out")
    rejects(m.main, [*same, "--out", out, "--resume"], "finished run")
    shutil.copytree(out, tmp_path / "broken", ignore=shutil.ignore_patterns("result.json"))
    rejects(m.main, [*same, "--out", tmp_path / "broken"], "--resume")
    rejects(
        m.main,
        [*same, "--out", tmp_path / "broken", "--resume", "--lr", "1", "--T", "5"],
        "different are: T, lr",
    )


def test_load_of_what_is_no_run(rejects, smoke, tmp_path):
    (file := tmp_path / "x.txt").write_text(EXAMPLE[0])
    rejects(m.main, ["--task", "path", "--solve", file, "--load", tmp_path / "none"], "--load", "none")
    (board := tmp_path / "board.txt").write_text(GOOD)
    rejects(m.main, ["--solve", board, "--load", smoke("mdm", *ARMS).out], "board.txt:1:", "source")
    shutil.copytree(smoke("mdm", *ARMS).out, tmp_path / "run", ignore=shutil.ignore_patterns("ar.*"))
    argv = ["--task", "path", "--solve", file, "--load", tmp_path / "run"]
    rejects(m.main, [*argv, "--arms", "ar"], "--load", "ar")
    (tmp_path / "run" / "mdm.safetensors").write_bytes(b"no weights")
    rejects(m.main, argv, "--load", "mdm")


@pytest.mark.parametrize("arm", ["mdm", "ar", "ar_rev", "teacherless"])
def test_solve_answers_every_line(smoke, capsys, monkeypatch, tmp_path, arm):
    """One line each, with or without a target; accuracy on standard error; "-" reads standard input."""
    run, problems = smoke("mdm", *ARMS), m.path_problems(3, "pd2", np.random.default_rng(0))
    text = "".join(" ".join(p) + "\n" for p in problems) + problems[0][0] + "\n"
    (file := tmp_path / "x.txt").write_text(text)
    argv = ["--task", "path", "--arms", arm, "--load", str(run.out), "--solve"]
    m.main([*argv, str(file)])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 4 and lines[0] == lines[3]  # the same question with and without its answer
    assert re.search(r"strict \d/4, official \d/3", err)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    m.main([*argv, "-"])
    assert capsys.readouterr().out == out


def test_solve_counts_what_is_right(smoke, capsys, monkeypatch, tmp_path):
    """Two right answers of three, one target: strict 2/3, official 1/1."""
    problems = m.path_problems(3, "pd2", np.random.default_rng(0))
    texts = [problems[0][1], problems[1][1], m.reverse_path(problems[2][1])]
    monkeypatch.setattr(m, "answer", lambda *args, **kwargs: (texts, None))
    (file := tmp_path / "x.txt").write_text(
        f"{problems[0][0]} {texts[0]}\n{problems[1][0]}\n{problems[2][0]}\n"
    )
    m.main(["--task", "path", "--load", str(smoke("mdm", *ARMS).out), "--solve", str(file)])
    out, err = capsys.readouterr()
    assert out.splitlines() == texts and "strict 2/3, official 1/1" in err


def test_trace_draws_the_order(smoke, tmp_path, capsys):
    (file := tmp_path / "x.txt").write_text(EXAMPLE[0])
    shutil.copytree(smoke("mdm", *ARMS).out, tmp_path / "run")
    m.main(["--task", "path", "--load", str(tmp_path / "run"), "--solve", str(file), "--trace"])
    assert (tmp_path / "run" / "trace.png").read_bytes().startswith(b"\x89PNG")
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("changes", [dict(), dict(canvas="source"), dict(task="path", **OFFICIAL)])
def test_trace_of_an_untrained_network(tmp_path, changes):
    """Answers of any length, also of one that never says [EOS]."""
    cfg, model = network(**changes)
    problem = EXAMPLE if changes.get("task") else boards("easy", 2)[0]
    m.draw_trace(tmp_path / "trace.png", problem, model, cfg)
    assert (tmp_path / "trace.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "size, count", [("tiny", "5,532,672"), ("base", "85,473,024"), ("medium", "302,867,456")]
)
def test_dry_run_prints_and_creates_nothing(size, count, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    m.main(["--scale", "paper", "--task", "path", "--arms", "mdm,ar", "--size", size, "--dry-run"])
    out = capsys.readouterr().out
    assert out.count(f"{count} parameters") == 2 and "FLOPs" in out and "GiB" in out and "hours" in out
    assert list(Path(tmp_path).rglob("*")) == []
