# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""rise.py: world and verifier, steps and filters, loss and log-probabilities, the chain's stages, command line."""
import copy
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rise as m
import torch
import torch.nn.functional as F
from fake_chat import FakeChat

SMOKE = ["--scale", "smoke"]


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


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An empty directory, which is the current one; no plots (the smoke run draws one)."""
    (work := tmp_path / "work").mkdir()
    monkeypatch.setattr(m, "plot_curves", lambda *_: None)
    monkeypatch.chdir(work)
    return work


def a_run(out, world=1):
    return SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, rank=0, world=world, out=out, stop=False,
                           began=0.0)


def network(dtype=torch.float64, n_embd=16):
    """A decoder of two layers with large random weights."""
    torch.manual_seed(0)
    model = m.Decoder(m.tiny_shape(m.Config(n_layer=2, n_head=2, n_embd=n_embd))).to(dtype)
    for p in model.parameters():
        p.data = torch.randn_like(p) * (0.5 if p.ndim == 2 else 0.2) + (p.ndim == 1)
    return model


def token_pairs(count=5, seed=0, n=30):
    """Random (context, chosen, rejected) of all lengths from 1 on."""
    rng = random.Random(seed)
    return [tuple([rng.randrange(n) for _ in range(rng.randint(1, 9))] for _ in range(3)) for _ in range(count)]


def loop_logp(model, context, side):
    """log p of a side behind its context, one forward of the whole, in plain PyTorch."""
    logits = model(torch.tensor([context + side]))[0].log_softmax(-1)
    return sum(logits[len(context) - 1 + i, token] for i, token in enumerate(side))


def problems(count, part="dpo", seed=0, **options):
    return m.make_problems(m.Config(), part, count, seed, **options)


# ---------------------------------------------------------------- the world and its verifier
def test_t9_gold_solutions_are_right_and_parts_do_not_meet():
    """T9: the verifier accepts every gold solution; programs of two parts are never the same."""
    rows = {part: problems(60, part) for part in m.PARTS}
    rows["long"] = problems(30, "test", lengths=(5, 6))
    for row in itertools.chain(*rows.values()):
        text = m.gold_solution(row["program"])
        assert m.verify(row["program"], text) is None and m.is_correct(text, row["answer"])
        tok = m.tiny_words()
        assert tok.decode(tok.encode(text)) == text and tok.decode(tok.encode(row["question"])) == row["question"]
        assert all(0 <= result < 60 for *_, result in m.gold_steps(row["program"]))
    programs = [{row["program"] for row in part} for part in rows.values()]
    assert all(not a & b for a, b in itertools.combinations(programs, 2))
    assert [len(p) for p in programs] == [len(part) for part in rows.values()]
    assert {len(row["program"][1]) for row in rows["long"]} == {5, 6}


def test_t9_corruptions_are_of_their_own_type():
    """T9: each rule-based error is judged as what it is, in a step and in a whole solution; a + b may be swapped."""
    types = dict(multi_value="CALC", wrong_sub="SUBST", symbol="SYMBOL", swap="SWAP", del_term="OMIT")
    rng, seen = random.Random(0), set()
    for row in problems(40):
        text, gold = m.gold_solution(row["program"]), m.gold_steps(row["program"])
        head, parts = m.split_steps(text)
        for (i, step), (kind, wanted) in itertools.product(enumerate(gold), types.items()):
            edited = m.corrupt(kind, step, rng)
            if edited is None:
                continue
            found = m.judge_step(step, f" {edited}\n")
            assert found == wanted or found == "" and kind == "swap", (step, kind, edited, found)
            changed = [*parts[:i], (parts[i][0], f" {edited}\n"), *parts[i + 1 :]]
            whole = m.verify(row["program"], head + "".join(label + part for label, part in changed))
            assert whole == ((i, wanted) if found else None)
            seen.add(found)
    assert seen == {*types.values(), ""}


@pytest.mark.parametrize("text, wanted", [
    ("12 + 7 - 4 = 15", ""), ("7 + 12 - 4 = 15", ""), ("12 - 4 + 7 = 15", ""), ("12 + 7 - 4 = 16", "CALC"),
    ("12 + 4 - 7 = 9", "SWAP"), ("12 - 7 - 4 = 1", "SYMBOL"), ("12 + 7 = 19", "OMIT"), ("12 + 7 - 5 = 14", "SUBST"),
    ("12 + 7 - 4 + 1 = 16", "EXTRA"), ("1 + 2 = 3", "INTER"), ("3 + 8 - 9 = 2", "INTER"), ("12 plus 7", "FORMAT"),
    ("12 + 7 - 4 =", "FORMAT"), ("", "FORMAT")])
def test_judge_step(text, wanted):
    assert m.judge_step(((12, 7, 4), ("+", "-"), 15), f" {text}\n") == wanted
    assert m.judge_step(((21, 2), ("*",), 42), " 2 * 21 = 42") == "" != m.judge_step(((21, 2), ("*",), 42), "21 + 2 = 23")


def test_verify_whole_solutions():
    program = (12, ((("+",), (7,)), (("*",), (2,))))
    right = "Step 1 : 12 + 7 = 19\nStep 2 : 19 * 2 = 38\nAnswer : 38"
    assert m.gold_solution(program) == right and m.verify(program, right) is None
    for text, wanted in (("", (0, "INTER")), ("Step 1 : 12 + 7 = 19\nAnswer : 19", (1, "INTER")),
                         (right.replace("Answer : 38", "Answer : 39"), (2, "INTER")),
                         (right.replace("Answer", "Step 3 : 38 + 1 = 39\nAnswer"), (2, "INTER")),
                         (right.replace("7 = 19", "7 = 20"), (0, "CALC")), (right[:42], (2, "INTER"))):
        assert m.verify(program, text) == wanted, text


@pytest.mark.parametrize("text, wanted", [
    ("42", 42), ("1,234", 1234), ("-3.50", Fraction(-7, 2)), ("6/4", Fraction(3, 2)), ("1/0", None), ("1e9", None),
    ("", None), ("9" * 31, None), ("9" * 30, 10**30 - 1), ("1,23", None), ("0x1", None), ("٣", None), ("3/", None)])
def test_numbers_are_exact(text, wanted):
    assert m.read_number(text) == wanted


def test_answers():
    """The last number that is stated as an answer; exponents and numbers that are too long are none."""
    for text in ("Answer: 7", "so\n#### 7", "The answer is 7.", r"\boxed{7}", "Answer : 1\nAnswer : $14/2", "answer: 7.0"):
        assert m.is_correct(text, "7"), text
    for text in ("", "7", "Answer:", "Answer: 7e2", "Answer: 70", "Answer: 7/0", "Answer: " + "7" * 40, "Answer: 7\nAnswer: 8",
                 "Answer: 7.5", "Answer: 7^2", "Answer: 7,5"):
        assert not m.is_correct(text, "7"), text
    assert m.is_correct("Answer: 1,000", "1000") and m.is_correct("Answer: 0.50", "1/2")


# ---------------------------------------------------------------- steps, edits, filters
TEXTS = ["Step 1 : 1 + 2 = 3\nStep 2 : 3 * 2 = 6\nAnswer : 6", "So.\nStep 1: as in Step 2: this\n\nStep 2:x\nAnswer: 5\n",
         "no steps", "", "Step 1:", "\nStep 10 :  a\r\nStep 11: b"]


@pytest.mark.parametrize("text", TEXTS)
def test_t8_steps_give_the_text_back(text):
    """T8: head, labels and steps are the solution, byte for byte; labels only at the beginning of a line."""
    head, parts = m.split_steps(text)
    assert head + "".join(label + step for label, step in parts) == text
    assert len(parts) == len(re.findall(r"(?m)^(Step \d+ ?:|Answer ?:)", text))


def test_t8_edits_are_applied_once_and_in_place():
    """T8: what was shown is replaced where it stands, though it stands elsewhere too; the rest stays, byte for byte."""
    class Backend:
        def edit(self, requests, key):
            seen.extend(requests)
            return [f"```\n{text.replace('2', '5')}\n```" for *_, text in requests]

    seen, text = [], "Step 1: a = 2. b = 2. c = 2. d = 2. e = 2.\nStep 2:  1 + 2 = 3\n\nAnswer: 2"
    rows = [dict(id=4, question="q", chosen=text)]
    made = m.edit_problems(m.Config(edit_alpha=20), Backend(), rows, 0)
    first, second = made[0]["steps"]
    assert first["before"] == "Step 1:" and first["step"] == " a = 2. b = 2. c = 2. d = 2. e = 2.\n"
    assert first["edited"] == " a = 2. b = 5. c = 5. d = 5. e = 5.\n" and first["drop"] == ""
    assert seen[0][2:] == ("Step 1: a = 2. ", "b = 2. c = 2. d = 2. e = 2.")
    assert second["before"] == text[: text.index("Step 2:") + 7] and second["edited"] == "  1 + 5 = 3\n\n"
    assert made == m.edit_problems(m.Config(edit_alpha=20), Backend(), rows, 0)  # what is drawn depends on the key alone


def test_admissible_instructions():
    """(official code) By the count of numbers and an equals sign."""
    equation = ["wrong_sub", "symbol", "swap", "del_term"]
    assert m.admissible("x = 3") == ["value", *equation] and m.admissible("1 + 2 = 3") == ["multi_value", *equation]
    assert m.admissible("so it is") == ["wording"] and m.admissible("he has 4.5") == ["value"]
    assert m.admissible("from 3 to 4") == ["multi_value"] and m.admissible("x = y") == equation
    assert list(m.INSTRUCTIONS) == ["value", "multi_value", "wrong_sub", "symbol", "swap", "del_term", "wording"]


def naive(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(naive(a[1:], b) + 1, naive(a, b[1:]) + 1, naive(a[1:], b[1:]) + (a[0] != b[0]))


def test_t7_levenshtein_eq_1():
    """T7: equal to the recursion; symmetric, triangle inequality, 0 only for equals, between the bounds."""
    rng = random.Random(0)
    words = ["".join(rng.choice("ab c") for _ in range(rng.randint(0, 5))) for _ in range(25)]
    for a, b in itertools.product(words, words):
        d = m.levenshtein(a, b)
        assert d == m.levenshtein(b, a) and (d == 0) == (a == b) and abs(len(a) - len(b)) <= d <= max(len(a), len(b))
        assert len(a) + len(b) > 7 or d == naive(a, b)
        assert d <= m.levenshtein(a, words[0]) + m.levenshtein(words[0], b)


def test_eq_1_and_the_other_filters():
    """Eq. 1 is LD < alpha, absolute, in words, numbers and signs; each reason by an example."""
    def check(edited, alpha=3, question="q"):
        return m.filter_edit(question, "12 + 7 = 19", edited, alpha)

    assert m.levenshtein(m.pieces("12 + 7 = 19"), m.pieces("12 + 8 = 20")) == 2
    assert check("12 + 8 = 20") == "" and check("12 + 8 = 20", 2) == "too far" and check(None) == "not parsed"
    assert check("12  + 7 = 19") == "unchanged" and check("12 + 7 = 19 (wrong)", 99) == "gives it away"
    assert check("12 + 7 = 19 (Wrong)", 99, "which is wrong ?") == "" and check("12 + 7 = 18 python") == "gives it away"
    assert m.parse_edit("Edited:\n```\nStep 3: 1 = 2\n``` ok ```x```") == "1 = 2" and m.parse_edit("```12 = 3```") == "12 = 3"
    assert [m.parse_edit(x) for x in ("", "1 = 2", "```\n1 = 2", "```\n\n```")] == [None] * 4


def test_random_corruption():
    """Arm E: so many numbers and operators are others, nothing else; uniform over places."""
    rng, step, hits = random.Random(0), " 12 + 7 - 4 = 15\n", [0] * 6
    for _ in range(300):
        new = m.random_corruption(step, 2, rng)
        changed = [i for i, (a, b) in enumerate(zip(m.pieces(step), m.pieces(new))) if a != b]
        assert len(changed) == 2 and 5 not in changed and re.fullmatch(r" \d+ \S \d+ \S \d+ = \d+\n", new), new
        hits = [n + (i in changed) for i, n in enumerate(hits + [0])][:7]
    assert min(n for i, n in enumerate(hits) if i != 5) > 50
    assert m.random_corruption("so it is", 1, rng) != "so it is"


# ---------------------------------------------------------------- the loss
def sums(n=6, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(n, 2, dtype=dtype) * 3 - 20, torch.randn(n, 2, dtype=dtype) * 3 - 20, torch.arange(1, n + 1)


def test_t1_at_the_reference():
    """T1: the loss is log 2, and its gradient -beta / 2 (grad log p(w) - grad log p(l))."""
    logp, _, count = sums()
    loss, margin = m.rise_loss(logp.requires_grad_(), logp.detach(), count, 0.4, nll=0.2)  # r = 0: NLL is off
    assert torch.allclose(loss, torch.full_like(loss, math.log(2))) and (margin == 0).all()
    grad, = torch.autograd.grad(loss.sum(), logp)
    assert torch.allclose(grad, torch.tensor([[-0.2, 0.2]]).double().expand(6, 2))


def test_t2_swapping_the_sides():
    """T2: -log s(-z) = -log s(z) + z, and the margin changes its sign."""
    logp, ref, count = sums()
    (loss, margin), (swapped, other) = (m.rise_loss(x, r, count, 0.4, 0) for x, r in ((logp, ref), (logp.flip(1), ref.flip(1))))
    assert torch.allclose(swapped, loss + 0.4 * margin) and torch.equal(other, -margin)


def test_t3_identical_sides_have_no_gradient():
    """T3: both sides the same tokens: DPO moves nothing, NLL alone does."""
    model, pair = network(), [([1, 2], [3, 4], [3, 4])]
    net = m.PairLogp(model)
    logp = net(**m.collate(pair))
    for nll, gate in ((0.0, "ref"), (0.2, "none")):
        loss, _ = m.rise_loss(logp, logp.detach() + 1, torch.tensor([2]), 0.4, nll, gate)
        grads = torch.autograd.grad(loss.sum(), list(model.parameters()), retain_graph=True)
        size = sum(g.abs().sum() for g in grads)
        assert size < 1e-9 if nll == 0 else size > 1e-3


def test_t6_the_loss_by_hand():
    """T6 and the gate of section 9: nll = 0 is plain DPO to the bit; else -logp / count is added where the chosen side
    has become less likely, or always."""
    logp, ref, count = sums(40)
    plain = -F.logsigmoid(0.4 * ((logp[:, 0] - ref[:, 0]) - (logp[:, 1] - ref[:, 1])))
    assert torch.equal(m.rise_loss(logp, ref, count, 0.4, 0)[0], plain)
    gated, always = (m.rise_loss(logp, ref, count, 0.4, 0.3, gate)[0] for gate in ("ref", "none"))
    for i in range(40):
        extra = 0.3 * -logp[i, 0] / count[i]
        assert math.isclose(always[i], plain[i] + extra) and math.isclose(gated[i], plain[i] + extra * (logp[i, 0] < ref[i, 0]))
    assert 0 < (gated != plain).sum() < 40
    assert torch.allclose(m.rft_loss(logp, ref, count)[0], -logp[:, 0] / count)


def test_t6_finite_differences_of_the_whole_loss():
    """T6: every weight's gradient of the whole loss, pairs packed with a shared context, in fp64."""
    model, pairs = network(), token_pairs(3)
    net, batch, ref = m.PairLogp(model), m.collate(pairs), torch.randn(3, 2).double() - 30
    count = (batch["target"][:, 0] >= 0).sum(1)

    def loss():
        return m.rise_loss(net(**batch), ref, count, 0.4, 0.2, "none")[0].sum()

    loss().backward()
    for p in model.parameters():
        v, before = torch.randn_like(p), p.data.clone()
        with torch.no_grad():
            p.data = before + 1e-6 * v
            up = loss()
            p.data = before - 1e-6 * v
            slope, p.data = (up - loss()) / 2e-6, before
        assert torch.allclose(slope, (p.grad * v).sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.peers
def test_loss_is_that_of_trl():
    """Loss and gradients on the same log-probabilities. NLL there has no gate."""
    trl = pytest.importorskip("trl")
    logp, ref, count = sums()
    ours, theirs = (logp.clone().requires_grad_() for _ in range(2))
    stub = SimpleNamespace(beta=0.4, loss_type=["sigmoid"], label_smoothing=0.0, reference_free=False, f_divergence_type="reverse_kl",
                           f_divergence_params=None, accelerator=SimpleNamespace(device="cpu"), use_weighting=False)
    losses, *_ = trl.DPOTrainer.dpo_loss(stub, theirs[:, 0], theirs[:, 1], ref[:, 0], ref[:, 1])
    loss = m.rise_loss(ours, ref, count, 0.4, 0)[0]
    loss.sum().backward()
    losses.sum().backward()
    assert torch.allclose(loss, losses) and torch.allclose(ours.grad, theirs.grad)


# ---------------------------------------------------------------- log-probabilities of pairs
@pytest.mark.parametrize("shared", [True, False])
def test_logp_is_the_sum_over_the_sides_tokens(shared):
    """Against one forward of the decoder for each side; a shared context changes nothing."""
    model, pairs = network(), token_pairs(7)
    found = m.PairLogp(model)(**m.collate(pairs, shared))
    wanted = torch.stack([torch.stack([loop_logp(model, c, side) for side in sides]) for c, *sides in pairs])
    assert found.shape == (7, 2) and torch.allclose(found, wanted, rtol=1e-10)


def test_shared_contexts_have_the_same_gradient_and_fewer_tokens():
    model, pairs = network(), token_pairs(6)
    grads = []
    for shared in (True, False):
        batch = m.collate(pairs, shared)
        (m.PairLogp(model)(**batch) @ torch.tensor([1.0, -2.0]).double()).sum().backward()
        grads.append(([p.grad.clone() for p in model.parameters()], (batch["segment"] < 3).sum()))
        model.zero_grad()
    (one, few), (two, many) = grads
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(one, two))
    assert many - few == sum(len(c) for c, *_ in pairs)


def test_t4_a_prefix_cancels():
    """T4: a whole solution with one edited step, and the pair of that step behind its prefix, have one margin."""
    model, old = network(), network()
    for p in old.parameters():
        p.data = p.data + 0.05 * torch.randn_like(p)
    x, prefix, step, edited = [1, 2, 3], [4, 5, 6, 7], [8, 9], [8, 10, 11]
    margins = []
    for pair in ((x, prefix + step, prefix + edited), (x + prefix, step, edited)):
        logp, ref = (m.PairLogp(net)(**m.collate([pair])) for net in (model, old))
        margins.append(m.rise_loss(logp, ref, torch.tensor([1]))[1])
    assert torch.allclose(*margins, atol=1e-10) and margins[0].abs() > 1e-3


def test_t5_batches_and_padding_do_not_matter():
    """T5: alone, in any order, beside longer ones: the same log-probabilities, in fp32 to 1e-5."""
    net, pairs = m.PairLogp(network(torch.float32)), token_pairs(8)
    alone = torch.cat([net(**m.collate([pair])) for pair in pairs])
    together = net(**m.collate(pairs[::-1])).flip(0)
    assert torch.allclose(alone, together, rtol=1e-5, atol=1e-5)
    assert torch.allclose(m.pair_logp(net, pairs, "cpu", 3), together, rtol=1e-5, atol=1e-5)


def test_t10_greedy_decoding_with_and_without_cache():
    """T10: prompts of all lengths in one batch give what one forward a token gives."""
    model = network(torch.float32)
    prompts = [c for c, *_ in token_pairs(4)]
    for prompt, new in zip(prompts, m.generate(model, prompts, 6)):
        ids = list(prompt)
        for _ in range(6):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        assert ids[len(prompt) :] == new


def test_token_logp_and_its_kernel_layout(monkeypatch):
    """--kernels hands (T, d), (V, d) and targets over, none of them padding."""
    seen, model, pairs = [], network(), token_pairs(3)

    def kernel(h, w, target):
        seen.append((h.shape, w.shape, target))
        return m.token_logp(h, w, target)

    monkeypatch.setattr(m, "load_kernel", lambda name: dict(token_logp=kernel)[name])
    found = m.PairLogp(model, kernels=True)(**m.collate(pairs))
    assert torch.allclose(found, m.PairLogp(model)(**m.collate(pairs)))
    (h, w, target), = seen
    assert h == (sum(len(a) + len(b) for _, a, b in pairs), 16) and w == model.embed_tokens.weight.shape and target.min() >= 0


def test_lora():
    """At its start the model is the base, to the bit; y = x W^T + 2 x A^T B^T; only A and B are learned."""
    model = network(torch.float32)
    x = torch.tensor([[1, 2, 3]])
    base, lora = model(x), m.add_lora(copy.deepcopy(model), 3)
    assert torch.equal(lora(x), base)
    learned = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert len(learned) == 2 * 7 * 2 and all(name.endswith((".a", ".b")) for name in learned)
    layer = lora.layers[0].q_proj
    layer.b.data = torch.randn_like(layer.b)
    h = torch.randn(4, 16)
    assert torch.allclose(layer(h), h @ (layer.linear.weight + 2 * layer.b @ layer.a).T, atol=1e-5)
