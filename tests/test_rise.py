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
import signal
from fractions import Fraction
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import rise as m
import torch
import torch.nn.functional as F
from fake_chat import FakeChat

SMOKE = ["--scale", "smoke"]


@pytest.fixture(autouse=True)
def quick(one_thread):
    """Small tensors are faster on one thread."""


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An empty directory, which is the current one; no plots (the smoke run draws one)."""
    (work := tmp_path / "work").mkdir()
    monkeypatch.setattr(m, "plot_curves", lambda *_: None)
    monkeypatch.chdir(work)
    return work


def a_run(out, world=1):
    return SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, rank=0, world=world, out=out, stop=False,
                           began=0.0, state=dict(done={}, seconds=0.0))


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


def gold_solution(program):
    return m.write_solution(m.gold_steps(program))


def problems(count, part="dpo", seed=0, **options):
    return m.make_problems(part, count, seed, **options)


# ---------------------------------------------------------------- the world and its verifier
def test_t9_gold_solutions_are_right_and_parts_do_not_meet():
    """T9: the verifier accepts every gold solution; programs of two parts are never the same."""
    rows = {part: problems(60, part) for part in m.PARTS}
    rows["long"] = problems(30, "test", lengths=(5, 6))
    for row in itertools.chain(*rows.values()):
        text = gold_solution(row["program"])
        assert m.verify(row["program"], text) is None and m.is_correct(text, row["answer"])
        tok = m.Words()
        assert tok.decode(tok.encode(text)) == text and tok.decode(tok.encode(row["question"])) == row["question"]
        assert all(0 <= result < 30 for *_, result in m.gold_steps(row["program"]))
    programs = [{row["program"] for row in part} for part in rows.values()]
    assert all(not a & b for a, b in itertools.combinations(programs, 2))
    assert [len(p) for p in programs] == [len(part) for part in rows.values()]
    assert {len(row["program"][1]) for row in rows["long"]} == {5, 6}


def test_careless_solutions_have_the_errors_of_habits_and_no_others(monkeypatch):
    """Shares of misread verbs and of omitted terms; without habits the solution is the gold one."""
    rows, rng = problems(400, "sft"), random.Random(0)
    monkeypatch.setattr(m, "HABITS", dict(misread=0.0, omit=0.0, slip=0.0))
    assert all(m.careless_solution(row, rng) == gold_solution(row["program"]) for row in rows)
    monkeypatch.setattr(m, "HABITS", dict(misread=1.0, omit=0.0, slip=0.0))
    for row in rows:
        first = [verb for words in row["verbs"] for verb in words].count(m.MISREAD)
        found = m.verify(row["program"], m.careless_solution(row, rng))
        assert found is None if not first else found[1] in ("SYMBOL", "INTER", "CALC", "FORMAT")
    for habit, kinds in (dict(omit=0.3), {"OMIT"}), (dict(slip=0.3), {"CALC"}):
        monkeypatch.setattr(m, "HABITS", dict(misread=0.0, omit=0.0, slip=0.0) | habit)
        found = {(m.verify(row["program"], m.careless_solution(row, rng)) or ("", ""))[1] for row in rows}
        assert found == {"", *kinds}


def test_t9_corruptions_are_of_their_own_type():
    """T9: each rule-based error is judged as what it is, in a step and in a whole solution; a + b may be swapped."""
    types = dict(multi_value="CALC", wrong_sub="SUBST", symbol="SYMBOL", swap="SWAP", del_term="OMIT")
    rng, seen = random.Random(0), set()
    for row in problems(40):
        text, gold = gold_solution(row["program"]), m.gold_steps(row["program"])
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
    double = (21, 2), ("*",), 42
    assert m.judge_step(double, " 2 * 21 = 42") == "" and m.judge_step(double, "21 + 2 = 23") == "SYMBOL"


def test_verify_whole_solutions():
    program = (12, ((("+",), (7,)), (("*",), (2,))))
    right = "Step 1 : 12 + 7 = 19\nStep 2 : 19 * 2 = 38\nAnswer : 38"
    assert gold_solution(program) == right and m.verify(program, right) is None
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
    for text in ("Answer: 7", "so\n#### 7", "The answer is 7.", r"\boxed{7}", "Answer : 1\nAnswer : $14/2",
                 "answer: 7.0"):
        assert m.is_correct(text, "7"), text
    for text in ("", "7", "Answer:", "Answer: 7e2", "Answer: 70", "Answer: 7/0", "Answer: " + "7" * 40,
                 "Answer: 7\nAnswer: 8", "Answer: 7.5", "Answer: 7^2", "Answer: 7,5",
                 "answer" + " " * 10**5 + "x"):  # the last one in linear time: else it takes days
        assert not m.is_correct(text, "7"), text
    assert m.is_correct("Answer: 1,000", "1000") and m.is_correct("Answer: 0.50", "1/2")


# ---------------------------------------------------------------- steps, edits, filters
TEXTS = ["Step 1 : 1 + 2 = 3\nStep 2 : 3 * 2 = 6\nAnswer : 6",
         "So.\nStep 1: as in Step 2: this\n\nStep 2:x\nAnswer: 5\n",
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
    assert made == m.edit_problems(m.Config(edit_alpha=20), Backend(), rows, 0)  # by the key alone


def test_tail_is_a_part_of_the_step():
    """(official code) At most four sentences, without space around, also of blank texts. Bug: it begins behind its end,
    so that a step with its tail replaced by itself grows."""
    rng = random.Random(0)
    for _ in range(300):
        step = "".join(rng.choice("a ab .\n ") + rng.choice(["", ". "]) for _ in range(rng.randint(0, 9)))
        i, j = m.tail(step)
        assert 0 <= i <= j <= len(step) and step[i:j] == step[i:j].strip() and not step[j:].strip()
        assert step[:i] + step[i:j] + step[j:] == step and bool(step[i:j]) == bool(step.strip())


def test_random_corruption_has_the_size_of_the_edit():
    """Arm E: as many places as Eq. 1's distance of the edit beside it. Bug: at least two, or at most one."""
    step, edits = " 12 + 7 = 19\n", (" 12 + 8 = 19\n", " 12 + 8 = 20\n", " 12 - 8 = 20\n", " 13 - 8 = 20\n")
    rows = [dict(before="Step 1:", step=step, edited=text, kind="value", drop="") for text in edits]
    row = dict(id=1, question="q", combinations=[("Step 1:" + step, "Step 1:" + edits[0])])
    made = m.build_pairs(m.Config(arms="E"), row, dict(steps=rows), None, 0)
    assert len(made["edit"]) == len(made["random"]) == 4
    for edit, other in zip(made["edit"], made["random"]):
        places = [sum(a != b for a, b in zip(m.pieces(step), m.pieces(pair["rejected"]))) for pair in (edit, other)]
        assert edit["distance"] == places[0] == places[1] == 1 + edits.index(edit["rejected"])


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
    assert m.parse_edit("Edited:\n```\nStep 3: 1 = 2\n``` ok ```x```") == "1 = 2"
    assert m.parse_edit("```12 = 3```") == "12 = 3"
    assert [m.parse_edit(x) for x in ("", "1 = 2", "```\n1 = 2", "```\n\n```")] == [None] * 4


def test_random_corruption():
    """Arm E: so many numbers and operators are others, nothing else; uniform over places."""
    rng, step, hits = random.Random(0), " 12 + 7 - 4 = 15\n", [0] * 6
    for _ in range(300):
        new = m.random_corruption(step, 2, rng)
        changed = [i for i, (a, b) in enumerate(zip(m.pieces(step), m.pieces(new))) if a != b]
        assert m.Words().decode(m.Words().encode(new)) == new[1:]  # the tiny model knows all of it
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
    loss, margin = m.rise_loss(logp, ref, count, 0.4, 0)
    swapped, other = m.rise_loss(logp.flip(1), ref.flip(1), count, 0.4, 0)
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
        assert math.isclose(always[i], plain[i] + extra)
        assert math.isclose(gated[i], plain[i] + extra * (logp[i, 0] < ref[i, 0]))
    assert 0 < (gated != plain).sum() < 40
    assert torch.allclose(m.rft_loss(logp, ref, count)[0], -logp[:, 0] / count)


def test_likelihood_arm_by_hand():
    """Arm 1: -log p(w) per token; its margin is that of the other arms, 0 at the start. Bug: the margin adds the
    reference instead of taking it off."""
    logp, ref, count = sums()
    loss, margin = m.rft_loss(logp, ref, count)
    assert torch.allclose(loss, torch.tensor([-a / n for (a, _), n in zip(logp.tolist(), count.tolist())]).double())
    assert torch.allclose(margin, m.rise_loss(logp, ref, count)[1])
    assert torch.equal(m.rft_loss(logp, logp, count)[1], torch.zeros(len(count)).double())


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
@pytest.mark.parametrize("nll", [0.0, 0.2])
def test_loss_is_that_of_trl(nll):
    """DPO, and DPO with NLL that has no gate, pair by pair: loss and gradients on the same log-probabilities."""
    trl = pytest.importorskip("trl")
    kinds = dict(loss_types=["sigmoid", "sft"], loss_weights=[1.0, nll]) if nll else \
        dict(loss_types=["sigmoid"], loss_weights=[1.0])
    trainer = MagicMock(beta=0.4, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
                        use_weighting=False, aux_loss_enabled=False, _tp_size=1, _total_train_tokens=0, **kinds)
    trainer.accelerator.gather.side_effect = trainer.accelerator.gather_for_metrics.side_effect = lambda x: x
    for count in (1, 3, 7):
        tokens, ref = -torch.rand(2, count, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64) - count / 2
        ours, theirs = (tokens.clone().requires_grad_() for _ in range(2))
        none, true = torch.zeros(2, count), torch.ones(2, count + 1, dtype=torch.bool)
        outputs = SimpleNamespace(log_probs=theirs, entropy=none, mean_logits=none, is_top1=none.bool())
        inputs = dict(input_ids=true.long(), attention_mask=true, completion_mask=true,
                      ref_chosen_logps=ref[:, 0], ref_rejected_logps=ref[:, 1])
        wanted = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
        loss = m.rise_loss(ours.sum(1)[None], ref, torch.tensor([count]), 0.4, nll, "none")[0].sum()
        loss.backward()
        wanted.backward()
        assert torch.allclose(loss, wanted) and torch.allclose(ours.grad, theirs.grad)


# ---------------------------------------------------------------- log-probabilities of pairs
def test_logp_is_the_sum_over_the_sides_tokens():
    """Against one forward of the decoder for each side; that the context is shared changes nothing."""
    model, pairs = network(), token_pairs(7)
    found = m.PairLogp(model)(**m.collate(pairs))
    wanted = torch.stack([torch.stack([loop_logp(model, c, side) for side in sides]) for c, *sides in pairs])
    assert found.shape == (7, 2) and torch.allclose(found, wanted, rtol=1e-10)


def test_shared_contexts_have_the_same_gradient_and_fewer_tokens():
    """Against a row for each side, whose other side is empty: a context less for each pair."""
    model, pairs, grads = network(), token_pairs(6), []
    for rows in (pairs, [(c, side, []) for c, *sides in pairs for side in sides]):
        batch = m.collate(rows)
        logp = m.PairLogp(model)(**batch).sum(1) if len(rows) > 6 else m.PairLogp(model)(**batch).flatten()
        (logp @ torch.tensor([1.0, -2.0] * 6).double()).backward()
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
    assert torch.allclose(m.pair_logp(a_run(None), net, pairs, 3), together, rtol=1e-5, atol=1e-5)


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
    assert h == (sum(len(a) + len(b) for _, a, b in pairs), 16) and target.min() >= 0
    assert w == model.embed_tokens.weight.shape


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


# ---------------------------------------------------------------- the chain, with planted samples
TINY = "--scale smoke --n-problems 24 --k 4 --sample-batch 32 --n-embd 16 --n-test 4 --n-dev 2 --steps 2".split()
TINY += ["--batch-size", "4"]


def planted_sample(program, rng):
    """A right solution, or one with an error in a step and another answer, or one without any answer."""
    text, i = gold_solution(program), rng.randrange(len(program[1]))
    step = m.gold_steps(program)[i]
    wrong = m.corrupt("multi_value", step, rng) or m.write_step(*step)
    broken = re.sub(r"Answer : \d+", "Answer : 77", text.replace(m.write_step(*step), wrong, 1))
    return rng.choice([text, text, broken, broken, "Step 1 : hm"])


def planted_edit(text, rng):
    """A wrong result in a fence, or a reply that must be dropped."""
    wrong = re.sub(r"\d+$", lambda n: str((int(n[0]) + 1) % 100), text)
    return rng.choice([f"```\n{wrong}\n```"] * 5 + [wrong, f"```{text}```", "```this is wrong : 1```"])


@pytest.fixture
def planted(monkeypatch, here):
    """A base with random weights whose samples and edits are planted; `programs`: question to program."""
    programs, make = {}, m.make_problems

    def make_problems(*args, **options):
        rows = make(*args, **options)
        programs.update({row["question"]: row["program"] for row in rows})
        return rows

    def sample(self, questions, k, key):
        rng = m.random_of("planted", key)
        return [planted_sample(programs[question], rng) for question in questions for _ in range(k)]

    def edit(self, requests, key):
        rng = m.random_of("planted", key)
        return [planted_edit(text, rng) for *_, text in requests]

    def solve(self, questions):
        return sample(self, questions, 1, "solve")

    monkeypatch.setattr(m, "make_problems", make_problems)
    monkeypatch.setattr(m.Local, "solve", solve)
    monkeypatch.setattr(m.Local, "sample", sample)
    monkeypatch.setattr(m.Local, "edit", edit)
    def train_base(cfg, *_):
        torch.manual_seed(0)
        return m.Decoder(m.tiny_shape(cfg))

    monkeypatch.setattr(m, "train_base", train_base)
    return programs


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def stages(out):
    return {name: (out / "b0" / f"{name}.jsonl").read_bytes() for name in ("samples", "edits", "pairs")}


def weights(out):
    return {path.name: path.read_bytes() for path in sorted((out / "b0").glob("*.safetensors"))}


def test_t10_t11_the_whole_chain(planted, here, capsys):
    """T11: counts by hand from the files; no test problem in a pair; the cached reference is what one computes (T10);
    equal presentations; every arm trained; nothing claimed at smoke scale."""
    result = m.main([*TINY, "--arms", "0,1,A,B,C,D,E,F", "--out", "x"])
    out, found = here / "x", result["metrics"]
    rows = {name: {row["id"]: row for row in read(out / "b0" / f"{name}.jsonl")} for name in stages(out)}
    assert len(rows["samples"]) == 24 and result["claims"] == []
    mixed = 0
    for i, row in rows["samples"].items():
        for s in row["samples"]:
            assert s["correct"] == (s["text"] == gold_solution(planted[row["question"]]))
        mixed += len({s["correct"] for s in row["samples"]}) == 2
        assert (i in rows["pairs"]) == (len({s["correct"] for s in row["samples"]}) == 2)
    assert found["problems/mixed"] == mixed / 24 and found["samples/right"] == np.mean(
        [s["correct"] for row in rows["samples"].values() for s in row["samples"]])
    assert sum(found.get(f"dropped/problem: no {kind} sample", 0) for kind in ("wrong", "correct")) == 24 - mixed
    steps = [step for row in rows["edits"].values() for step in row["steps"]]
    assert found["edits/asked"] == len(steps) == sum(len(planted[row["question"]][1]) for row in rows["pairs"].values())
    for reason in ("not parsed", "unchanged", "gives it away"):
        assert found[f"edits/{reason}"] == sum(step["drop"] == reason for step in steps) / len(steps) > 0
    assert sum(len(row["edit"]) for row in rows["pairs"].values()) == sum(not step["drop"] for step in steps)
    assert found["edits/still right"] == 0
    tests = {x["question"] for part in m.load_sets(m.cli(m.Config, m.SCALES, TINY))[1].values() for x in part}
    assert not tests & {row["question"] for row in rows["samples"].values()}
    for row in rows["pairs"].values():
        text = rows["edits"][row["id"]]["steps"]
        for pair in row["edit"] + row["random"]:
            assert any(step["before"] == pair["before"] and step["step"] == pair["chosen"] for step in text)
            assert gold_solution(planted[row["question"]]).startswith(pair["before"] + pair["chosen"])
            assert pair["chosen"] != pair["rejected"] and not pair["end"]
        for pair in row["oracle"]:  # the first wrong step behind right ones
            assert gold_solution(planted[row["question"]]).startswith(pair["before"] + pair["chosen"])
            assert any((pair["before"] + pair["rejected"]) in s["text"] for s in rows["samples"][row["id"]]["samples"])
    net = m.PairLogp(m.make_policy(m.cli(m.Config, m.SCALES, TINY), a_run(out), 0))
    pairs = [(row["question"], pair) for row in rows["pairs"].values() for kind in m.KINDS for pair in row[kind]
             if not pair["drop"]]
    again = m.pair_logp(a_run(None), net, [m.tokens_of(m.Words(), *both) for both in pairs])
    assert torch.allclose(torch.tensor([pair["ref"] for _, pair in pairs]), again, atol=1e-5)
    assert {f"{arm}-s0.safetensors" for arm in "1ABCDEF"} < set(weights(out))
    assert len(set(weights(out).values())) == len(weights(out))
    assert found["0/full margin"] == pytest.approx(0, abs=1e-4) and found["0/test"] >= 0
    text = capsys.readouterr().out
    assert text.index("tokens/s in training") < text.index("samples step")  # the ledger comes first


def test_a_stage_goes_on_where_it_was_cut(planted, here):
    """What a kill leaves of a file, cut anywhere, is completed to the same bytes; finished items are not made again."""
    m.main([*TINY, "--until", "pairs", "--out", "x"])
    whole, asked = stages(here / "x"), []
    rng, sample = random.Random(0), m.Local.sample
    m.Local.sample = lambda self, questions, k, key: asked.append(len(questions)) or sample(self, questions, k, key)
    try:
        for name, content in whole.items():
            (here / "x" / "b0" / f"{name}.jsonl").write_bytes(content[: rng.randrange(len(content))])
        m.main([*TINY, "--until", "pairs", "--out", "x", "--resume"])
    finally:
        m.Local.sample = sample
    assert stages(here / "x") == whole and sum(asked) < 24
    result = m.main([*TINY, "--out", "x", "--resume"])
    assert stages(here / "x") == whole and result["metrics"]["C/test"] >= 0


def test_training_goes_on_after_ctrl_c(planted, here, monkeypatch, capsys):
    """Stopped in a stage, then in an arm, and continued: the same files and numbers as in one go."""
    argv = [*TINY, "--arms", "0,A,C"]
    whole = m.main([*argv, "--out", "whole"])
    seconds = 0
    for stop in (2, 12):
        calls = itertools.count(1)
        monkeypatch.setattr(m, "should_stop", lambda run: next(calls) == stop)
        with pytest.raises(SystemExit) as end:
            m.main([*argv, "--out", "x", *["--resume"] * (stop == 12)])
        assert end.value.code == 130 and "--resume" in capsys.readouterr().out
        state = torch.load("x/state.pt", weights_only=True)
        assert state["seconds"] > seconds  # also those of stages before
        seconds = state["seconds"]
    assert state["job"] in ("b0-s0-A", "b0-s0-C")
    monkeypatch.setattr(m, "should_stop", lambda run: False)
    again = m.main([*argv, "--out", "x", "--resume"])
    assert stages(here / "x") == stages(here / "whole") and weights(here / "x") == weights(here / "whole")
    assert again["metrics"] == whole["metrics"] and again["minutes"] > seconds / 60


def test_micro_batches_give_the_same_weights(planted, here):
    """A batch of 4 in parts of 1 and 3; the same seed of pairs: weights to rounding."""
    argv = [*TINY, "--arms", "C", "--dtype", "float32"]
    for name, size in (("one", 0), ("parts", 3)):
        m.main([*argv, "--micro-batch", str(size), "--out", name])
    one, parts = (m.load_file(here / name / "b0" / "C-s0.safetensors") for name in ("one", "parts"))
    assert all(torch.allclose(one[key], parts[key], atol=1e-5) for key in one)


def test_an_arm_learns_what_its_pairs_say(tmp_path):
    """Chosen sides of even tokens, rejected ones of odd: the margin of new pairs rises; with the sides swapped, which
    would pass if the loss ignored them, it falls. Without NLL the chosen side loses probability."""
    def pairs(seed):
        return [(c, [2 * (t // 2) for t in a], [2 * (t // 2) + 1 for t in b]) for c, a, b in token_pairs(40, seed)]

    cfg, margin, chosen = m.Config(steps=12, batch_size=16, lr=3e-3, seeds=1), {}, {}
    for name, arm in (("right", "C"), ("swapped", "C"), ("dpo", "D")):
        net = m.PairLogp(network(torch.float32))
        fit = [(c, b, a) for c, a, b in pairs(0)] if name == "swapped" else pairs(0)
        before = m.pair_logp(a_run(None), net, pairs(1))
        m.train(cfg, a_run(tmp_path), name, arm, net, fit, m.pair_logp(a_run(None), net, fit), 0)
        gain = m.pair_logp(a_run(None), net, pairs(1)) - before
        margin[name], chosen[name] = (gain[:, 0] - gain[:, 1]).mean(), gain[:, 0].mean()
    assert margin["right"] > 1 and margin["dpo"] > 1 and margin["swapped"] < -1
    assert chosen["right"] >= chosen["dpo"]


def test_arms_see_each_problem_equally_often():
    rows = [dict(question=i, **{kind: [f"{kind}{j}" for j in range(n)] for kind, n in zip(m.KINDS, (3, 4, 4, 1))})
            for i in range(2)]
    for n in (1, 2):
        cfg = m.Config(num_edits=n)
        found = {arm: m.pairs_of_arm(cfg, arm, rows) for arm in "1ABCDEF"}
        assert all(len(found[arm]) == 2 * (n + 1) for arm in "1ABCDEF") and found["C"] == found["D"]
        assert found["C"][: n + 1] == [(0, "full0"), *((0, f"edit{i}") for i in range(n))]
        assert {pair[:4] for _, pair in found["E"]} == {"full", "rand"} and {p[:4] for _, p in found["A"]} == {"full"}
    rows[1]["full"] = ["only"]  # no second one: the first is seen twice, and no other problem more often
    assert m.pairs_of_arm(m.Config(), "A", rows)[2:] == [(1, "only")] * 2
    order = m.presentation(5, 23, "key")
    assert len(order) == 23 and all(sorted(order[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))
    assert order != m.presentation(5, 23, "other") and order == m.presentation(5, 23, "key")


def test_ends_are_tokens_of_whole_solutions_only():
    tok = m.Words()
    pair = dict(before="Step 1 :", chosen=" 1 + 2 = 3\n", rejected=" 1 + 2 = 4\n", end=False)
    context, chosen, rejected = m.tokens_of(tok, "ana has 1 pens", pair)
    assert context == tok.solve_prompt("ana has 1 pens") + tok.encode("Step 1 :")
    assert tok.decode(chosen) == "1 + 2 = 3\n"
    assert m.tokens_of(tok, "", pair | dict(end=True))[1:] == (chosen + tok.stop, rejected + tok.stop)


def test_what_was_cut_has_no_end(monkeypatch):
    """A sample as long as --max-new is none, and an edit as long has no closing fence, so that it is not parsed."""
    tok = m.Words()
    word, cfg = tok.encode("keys"), m.Config(max_new=4)
    monkeypatch.setattr(m, "generate", lambda model, prompts, *_: [word * (len(p) % 2 + 3) for p in prompts])
    local = m.Local(cfg, network(), tok)
    odd, even = "ana has", "ana"  # with the token of a request: three and two
    assert local.sample([odd, even], 1, ()) == [None, "keys keys keys"]
    found = local.edit([("swap", q, "", "1") for q in (odd + " 1", odd)], ())
    assert sorted(map(m.parse_edit, found), key=str) == [None, "keys keys keys"]


def test_text_is_no_control_token():
    """Words that stand for the end, a request or an edit are dropped from texts."""
    tok = m.Words()
    assert tok.encode("<eos> | => <swap> ana") == tok.encode("ana") and tok.encode("no such words") == []


def test_select():
    """One right and one wrong sample, each as likely; texts that talk of errors are no chosen side."""
    def row(*samples):
        return dict(question="q", samples=[dict(text=t, correct=c) for t, c in samples])

    rng = random.Random(0)
    assert m.select(row(("a", True)), rng) == ([], "no wrong sample")
    assert m.select(row(("a", False), (None, False)), rng) == ([], "no correct sample")
    assert m.select(row(("a mistake", True), ("b", False)), rng) == ([], "talks of errors")
    drawn = [m.select(row(("a", True), ("b", True), ("c", False), ("d", False)), rng)[0][0] for _ in range(200)]
    assert {pair: drawn.count(pair) > 25 for pair in set(drawn)} == dict.fromkeys(itertools.product("ab", "cd"), True)


# ---------------------------------------------------------------- statistics and verdicts
def test_bootstrap():
    """Covers the mean of known noise in nearly 95 of 100 cases; runs of one base are one draw."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(60):
        mean, (low, high) = m.bootstrap(rng.normal(0.5, 1, (1, 1, 200)), 300)
        hits += low <= 0.5 <= high
    assert hits >= 51
    shift = np.array([0.0, 1.0])[:, None, None] + np.zeros((2, 4, 50))
    assert m.bootstrap(shift)[1] == pytest.approx((0, 1)) and m.bootstrap(np.ones((1, 2, 9)))[0] == 1


def evaluation(right, types=(), chosen=0.0):
    wrong = {kind: torch.tensor([kind in types] * 40).double() for kind in m.TYPES}
    good = torch.tensor([i < right for i in range(40)]).double()
    return dict(correct=dict(test=good, sampled=good / 2), errors=wrong,
                gain={kind: torch.full((3, 2), chosen).double() for kind in ("full", "edit")})


def test_claims_and_verdicts():
    """Signs of all statistics, and the three outcomes."""
    arms = {"0": [evaluation(10)], "1": [evaluation(12)] * 2, "A": [evaluation(20, ["CALC"])] * 2,
            "C": [evaluation(30, ["INTER"], 1.0)] * 2, "D": [evaluation(30, (), -2.0)] * 2, "E": [evaluation(40)] * 2}
    found = m.statistics(dict(b0=arms))
    assert {name: round(float(x), 6) for name, (x, _) in found.items()} == {
        "rise-beats-dpo": 0.25, "edits-beat-random": -0.25, "fewer-subtle-errors": 1.0, "dpo-beats-base": 0.25,
        "rise-samples-beat-dpo": 0.125, "samples-beat-random": -0.125,
        "rise-beats-rft": 0.45, "without-nll-chosen-falls": 2.0, "nll-keeps-chosen": 3.0}
    verdicts = {name: m.verdict(*found[name], 0.0) for name in found}
    assert verdicts["rise-beats-dpo"] == "HOLDS" and verdicts["edits-beat-random"] == "DOES NOT HOLD"
    arms["A"], arms["E"] = [evaluation(30), evaluation(29)], []
    found = m.statistics(dict(b0=arms))
    assert m.verdict(*found["rise-beats-dpo"], 0.0) == "INCONCLUSIVE" and "edits-beat-random" not in found
    for result in sum(arms.values(), []):
        result["errors"] = {}  # a chat model: no verifier reads its steps
    assert m.statistics(dict(b0=arms)).keys() == found.keys() - {"fewer-subtle-errors"}
    for result in sum(arms.values(), []):
        result["gain"] = {}  # no problem is held out
    assert not {"nll-keeps-chosen", "without-nll-chosen-falls"} & m.statistics(dict(b0=arms)).keys()


def test_held_out_pairs_are_clustered_by_problem():
    """One row for each problem, the mean over its pairs: the bootstrap draws problems, not pairs."""
    net, texts = m.PairLogp(network(torch.float32)), ["1 + 2 = 3", "4 - 1 = 3", "5", "6 * 2 = 12", "9 + 9 = 18"]
    pairs = [dict(before="Step 1 :", chosen=x, rejected=y, end=True, ref=[-i, i / 2])
             for i, (x, y) in enumerate(zip(texts, texts[::-1]))]
    pairs[2]["rejected"] = "7"
    held = [dict(question="ana has 3 pens", full=x, edit=[], random=[], oracle=[]) for x in (pairs[:1], pairs[1:4],
                                                                                             [], pairs[4:])]
    found = m.evaluate(a_run(None), m.Local(m.Config(), net.model, m.Words()), net, {}, held)["gain"]
    logp = m.pair_logp(a_run(None), net, [m.tokens_of(m.Words(), "ana has 3 pens", pair) for pair in pairs])
    gain = logp.double() - torch.tensor([pair["ref"] for pair in pairs])
    assert found.keys() == {"full"} and torch.allclose(found["full"], torch.stack(
        [gain[0], gain[1:4].mean(0), gain[4]]), atol=1e-5)


def test_sampling_has_the_dtype_of_the_run():
    """A bfloat16 copy for what is written; the weights that are trained stay as they are."""
    model = network(torch.float32)
    local = m.Local(m.Config(max_new=3), model, m.Words(), torch.bfloat16)
    assert {p.dtype for p in local.model.parameters()} == {torch.bfloat16} and len(local.solve(["ana has"])) == 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert m.Local(m.Config(), model, m.Words()).model is model


# ---------------------------------------------------------------- endpoint
@pytest.fixture
def chat(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-a-test\n")
    server = FakeChat(lambda payload: "re: " + payload["messages"][-1]["content"])
    yield server
    server.close()


def ask(client, *texts, index=0):
    return client.ask([(dict(messages=[dict(role="user", content=text)]), index) for text in texts])


def test_chat_retries_caches_and_counts(chat, tmp_path):
    chat.faults += [500, 429]
    client = m.Chat(chat.url, "name", tmp_path, workers=1)
    assert ask(client, "a", "b") == ["re: a", "re: b"] and len(chat.seen) == 4 and client.tokens == 14
    assert ask(client, "b", "a") == ["re: b", "re: a"] and len(chat.seen) == 4
    assert ask(client, "a", index=1) == ["re: a"] and len(chat.seen) == 5  # another sample is another request
    assert ask(m.Chat(chat.url, "other", tmp_path), "a") == ["re: a"] and len(chat.seen) == 6
    payload, headers = chat.seen[0]
    assert payload["model"] == "name" and headers["Authorization"] == "Bearer sk-secret-of-a-test"
    assert "secret" not in "".join(path.read_text() for path in tmp_path.iterdir())
    assert "Authorization" not in m.Chat("http://example.com/v1", "name", tmp_path).http.headers
    assert "Authorization" in m.Chat("https://example.com/v1", "name", tmp_path).http.headers


@pytest.mark.parametrize("fault", [b"", b"[]", b"{}", b'{"choices": []}', "huge",
                                   b'{"choices": [{"message": {"content": 3}}]}'])
def test_malformed_replies_are_none(chat, tmp_path, fault):
    chat.faults += [fault]
    client = m.Chat(chat.url, "name", tmp_path, workers=1)
    assert ask(client, "a", "b") == [None, "re: b"] and len(list(tmp_path.iterdir())) == 1
    assert ask(client, "a") == ["re: a"]  # it was not kept


@pytest.mark.parametrize("fault, words", [(404, "404"), (302, "302"), ("cut", "Chunked"), ("slow", "")])
def test_an_endpoint_that_fails_ends_in_one_line(chat, tmp_path, fault, words, capsys):
    chat.faults += [fault]
    client = m.Chat(chat.url, "name", tmp_path, workers=1, deadline=0.5)
    with pytest.raises(SystemExit) as stop:
        assert ask(client, "a") != [None]
        raise SystemExit(2)  # a slow body may also end as no reply
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and "secret" not in err


def test_wrong_endpoints(rejects, tmp_path):
    for url in ("ftp://host", "https://user:pw@host/v1", "http://host/v1?key=1", "host"):
        rejects(lambda argv: m.Chat(url, "name", tmp_path), [], "endpoint", "https://host/v1")


def test_t12_endpoint_and_local_give_the_same_rows(chat, tmp_path):
    """T12: for scripted replies the JSONL of both back-ends is one; a malformed reply is a dropped item."""
    rows = problems(4)
    answers = {x["question"]: gold_solution(x["program"]) for x in rows}
    chat.answer = lambda payload: answers.get(payload["messages"][-1]["content"], "```\n1 + 1 = 3\n```")

    class Scripted:
        def sample(self, questions, k, key):
            return [answers[q] for q in questions for _ in range(k)]

        def edit(self, requests, key):
            return ["```\n1 + 1 = 3\n```"] * len(requests)

    cfg = m.Config()
    remote, made = m.Remote(cfg, m.Chat(chat.url, "name", tmp_path)), {}
    for name, backend in (("local", Scripted()), ("remote", remote)):
        samples = m.sample_problems(cfg, backend, rows, 0)
        edits = m.edit_problems(cfg, backend, [x | dict(chosen=x["samples"][0]["text"]) for x in samples], 0)
        made[name] = json.dumps([samples, edits])
    assert made["local"] == made["remote"] and len(chat.seen) == 4 * 5 + len(re.findall('"kind"', made["local"]))
    chat.faults += [b"no json"]
    backend = m.Remote(cfg, m.Chat(chat.url, "new", tmp_path, workers=1))
    sample, = m.sample_problems(m.Config(k=2), backend, rows[:1], 0)
    assert [s["correct"] for s in sample["samples"]] == [False, True] and sample["samples"][0]["text"] is None


# ---------------------------------------------------------------- command line
def test_smoke(smoke):
    run = smoke("rise")
    assert run.result["metrics"]["edits/asked"] > 0 and run.result["claims"] == []
    assert {f"{arm}/test" for arm in "01ACDE"} < set(run.result["metrics"])
    names = {"config.json", "log.jsonl", "plot.png", "result.json", "state.pt", "b0"}
    assert names == {p.name for p in run.out.iterdir()}


def test_kill_and_resume(kill_and_resume):
    kill_and_resume("rise")


BAD = {
    "--colour red": "--colour -h", "--ste 5": "--ste", "--task chess": "chess chain", "--scale huge": "huge smoke",
    "--arms C,": "--arms", "--arms C,C": "--arms", "--seed -1": "--seed 0", "--k 1": "--k 2", "--steps 0": "--steps 1",
    "--top-p 1.5": "--top-p", "--lr nan": "--lr", "--n-embd 30": "--n-embd --n-head", "--kernels": "--kernels CUDA",
    "--device cuda": "--device cuda", "--model x": "--task math", "--task math": "--model", "--nll -1": "--nll",
    "--scale paper": "--scale paper --task math", "--endpoint http://h": "--endpoint --task math",
    "--task math --model x --data no.jsonl": "no.jsonl", "--task math --model x --data y --arms F": "F verifier",
    "--task math --model x --data y --endpoint http://h/v1": "--endpoint-model"}


@pytest.mark.parametrize("argv, words", BAD.items(), ids=list(BAD))
def test_wrong_flags(rejects, argv, words):
    rejects(m.main, [*SMOKE, *argv.split()], *words.split())


def test_wrong_data(rejects, tmp_path):
    for text, words in (("", "no problems"), ("{", "line 1"), ('{"question": "q"}', "answer"), ("[]", "JSON object"),
                        ('{"question": "q", "answer": "1e9"}', "number"), ('{"question": 1, "answer": "1"}', "text")):
        (tmp_path / "d.jsonl").write_text(text)
        rejects(m.main, ["--task", "math", "--model", "x", "--data", tmp_path / "d.jsonl"], "--data", *words.split())
    (tmp_path / "d.jsonl").write_text('{"question": "q", "answer": "so\\n#### 1,000"}')
    both = ["--data", tmp_path / "d.jsonl", "--test-data", tmp_path / "d.jsonl"]
    rejects(m.main, ["--task", "math", "--model", "x", *both], "--test-data", "'q'")
    assert m.read_problems(tmp_path / "d.jsonl", "--data", 9) == [dict(id=0, question="q", answer="1,000")]


def test_problems_that_do_not_exist(rejects):
    """The simplest ones are few: one line, no endless search."""
    odd = dict(lengths=(1,), terms=(1,), most=2, times=0.0)
    rejects(lambda argv: m.make_problems("dpo", 60, 0, **odd), [], "--n-problems", "60")
    assert m.in_sentences("ana has 6 pens . the box has 3 cups . gives 2 and wins 1 . how many pens ?") == \
        "Ana has 6 pens. Ana gives 2 and wins 1. How many pens does Ana have now?"


def test_too_few_pairs_and_other_directories(planted, here, rejects, monkeypatch):
    monkeypatch.setattr(m.Local, "sample", lambda self, questions, k, key: ["nothing"] * k * len(questions))
    with pytest.raises(SystemExit) as stop:
        m.main([*TINY, "--out", "x"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        m.main([*TINY, "--out", "x", "--k", "5", "--resume"])
    assert stop.value.code == 2
    (here / "x" / "b0" / "samples.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as stop:
        m.main([*TINY, "--out", "x", "--resume"])
    assert stop.value.code == 2


def test_missing_kernels(rejects):
    rejects(lambda argv: m.load_kernel(*argv), ["no_such_kernel"], "--kernels", "kernels/", "triton")


def test_dry_run_prints_and_creates_nothing(here, capsys):
    m.main(["--dry-run"])
    text = capsys.readouterr().out
    model = m.Decoder(m.tiny_shape(m.Config()))
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in text and "H100" in text
    m.main(["--scale", "paper", "--task", "math", "--dry-run"])
    assert "7,615,616,512 parameters" in capsys.readouterr().out and list(here.rglob("*")) == []


# ---------------------------------------------------------------- a real model
@pytest.mark.real
def test_smollm2_edits_and_learns(here, monkeypatch):
    """Edits, LoRA and greedy answers of a real chat model; its samples are planted, for it is seldom right."""
    import real

    flags = ["--task", "math", "--model", str(real.smollm2()), "--out", "x", "--arms", "0,C", "--n-problems", "11",
             "--n-test", "2", "--k", "2", "--max-new", "40", "--steps", "2", "--batch-size", "2", "--micro-batch", "1",
             "--edit-alpha", "99", "--lora-rank", "4"]
    answers = {x["question"]: x["answer"] for x in m.load_sets(m.cli(m.Config, m.SCALES, flags))[0]}
    monkeypatch.setattr(m.Local, "sample", lambda self, questions, k, key: [
        text for question in questions for _ in range(k // 2) for text in (
            f"Step 1: There are 2 + 3 = 5 of them.\nStep 2: So 5 are left.\nAnswer: {answers.get(question)}",
            "Step 1: There are 2 + 3 = 6 of them.\nAnswer: -1")])
    result = m.main(flags)
    assert result["metrics"]["edits/asked"] == 22 and result["metrics"]["edits/kept"] > 0.1
    margins = [row["margin"] for row in read(here / "x/log.jsonl") if "margin" in row]
    assert len(margins) == 2 and abs(margins[0]) < 1e-3 and "C/edit margin" in result["metrics"]
    assert "fewer-subtle-errors" not in {claim["id"] for claim in result["claims"]} and result["metrics"]["C/test"] <= 1


@pytest.mark.real
def test_smollm2_makes_pairs_of_its_own_samples(here, capsys):
    """README's command with fewer problems, up to the pairs: some samples are right, and steps are edited."""
    import real

    flags = ["--task", "math", "--scale", "smoke", "--model", str(real.smollm2()), "--out", "x", "--until", "pairs"]
    found = m.main([*flags, "--n-problems", "8", "--k", "4"])
    assert 0 < found["samples/right"] < 1 and found["problems/mixed"] > 0 and found["edits/asked"] > 0
    assert "edits/asked" in capsys.readouterr().out
    for row in read(here / "x/b0/pairs.jsonl"):
        assert all(pair["end"] and max(pair["ref"]) < 0 for pair in row["full"])
