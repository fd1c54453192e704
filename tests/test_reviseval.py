# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""reviseval.py: the world, metrics, statistics, revising and judging, human data, command line."""

import inspect
import json
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import reviseval as m
import torch
from fake_chat import FakeChat

SMOKE = ["--scale", "smoke"]


@pytest.fixture(autouse=True)
def quick(one_thread):
    """Small tensors are faster on one thread."""


def responses(n=150, seed=0):
    return m.make_responses(m.Config(n_records=n, seed=seed))


def revised(rows, p_fix, p_dmg, seed=0):
    rng = random.Random(seed)
    return [m.say(m.repair(row["record"], row["clauses"], rng, p_fix, p_dmg)) for row in rows]


def taus(rows, texts):
    """tau of BLEU and ROUGE-L of the responses against texts."""
    return [m.worth(rows, texts)[name] for name in ("bleu", "rougeL")]


# ---------------------------------------------------------------- the world
RECORD = dict(name="adler", food="thai", area="uptown", near="iris")


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("adler is a restaurant . it serves thai food and it lies in uptown . it faces iris .", {}),
        ("adler is a restaurant . it serves thai food and it lies in harbour . it faces iris .", dict(area=1)),
        ("adler is a restaurant . it serves thai food . it faces iris .", dict(area=1)),
        ("iris is a restaurant . it serves thai food and it lies in uptown . it faces adler .", dict(name=1, near=1)),
        (
            "adler is a restaurant . it serves thai food and it lies in uptown . it faces iris . it suits groups .",
            dict(guests=1),
        ),
        (
            "adler is a restaurant . it serves thai food . it cooks greek dishes . it lies in uptown . it faces iris .",
            dict(food=1),
        ),
        ("it serves greek food and it cooks korean dishes", dict(name=1, food=2, area=1, near=1)),
    ],
)
def test_slot_errors(text, wrong):
    assert {slot: n for slot, n in m.slot_errors(RECORD, text).items() if n} == wrong


def test_errors_are_those_of_the_mix_and_gold_revisions_mend_all():
    """A response has as many wrong slots as errors were put in (a swap: two); the gold revision has none and keeps a
    right response; a text in words is the clauses; each kind alone does what it says."""
    rng = random.Random(0)
    for kind, sizes in dict(wrong=(0, 1), omit=(-1, 1), extra=(1, 1), contradict=(1, 1), swap=(0, 2)).items():
        for _ in range(60):
            record = m.make_record(rng, "test")
            right = m.tell(record, rng, m.WAYS)
            assert sum(m.slot_errors(record, m.say(right)).values()) == 0 and m.repair(record, right) == right
            wrong = m.add_errors(record, right, 1, {kind: 1.0}, rng, m.WAYS)
            errors = sum(m.slot_errors(record, m.say(wrong)).values())
            assert len(wrong) == len(right) + sizes[0] and errors == (sizes[1] if "near" in record else 1)
            many = m.add_errors(record, right, 3, m.TEST_MIX, rng, m.WAYS)
            gold = m.repair(record, many)
            assert sum(m.slot_errors(record, m.say(gold)).values()) == 0
            assert m.decode(m.encode(m.say(many))) == m.say(many)


def test_parts_do_not_meet_and_length_says_nothing():
    """Records of training are not held out; some held-out phrasings are new; neither length nor the human reference's
    style tells the quality."""
    rng = random.Random(1)
    parts = {part: {repr(m.make_record(rng, part)) for _ in range(300)} for part in m.PARTS}
    assert not parts["train"] & parts["test"] and not parts["train"] & parts["dev"] and not parts["dev"] & parts["test"]
    rows = responses(600)
    ways = {clause[2:4] for row in rows for clause in row["clauses"][1:]}
    assert ways == set(m.WAYS) > set(m.KNOWN_WAYS) and len(m.KNOWN_WAYS) == 12
    quality = [row["quality"] for row in rows]
    assert abs(m.tau_b([len(row["response"].split()) for row in rows], quality)) < 0.05
    assert 0.3 < np.mean([q == 0 for q in quality]) < 0.37 and all(row["quality"] <= 0 for row in rows)
    kinds = {kind for seed in range(200) for kind in m.FINDINGS if kind in example("judge", seed)[1]}
    assert kinds == set(m.FINDINGS)


def example(role, seed):
    return [m.decode(ids) for ids in m.example(role, random.Random(seed))]


def test_examples_teach_what_the_roles_say():
    """The reviser's answer is right and keeps the style; the judge's names each slot and counts."""
    for seed in range(60):
        prompt, answer = example("revise", seed)
        source, text = prompt.removesuffix(" =>").removeprefix("<revise> ").split(" | ")
        record = dict(zip(source.split()[::2], source.split()[1::2]))
        assert sum(m.slot_errors(record, answer.removesuffix(" <eos>")).values()) == 0
        if not sum(m.slot_errors(record, text).values()):
            assert answer == f"{text} <eos>"
        prompt, answer = example("judge", seed)
        source, text = prompt.removesuffix(" =>").removeprefix("<judge> ").split(" | ")
        record = dict(zip(source.split()[::2], source.split()[1::2]))
        *found, score, end = answer.split()
        errors = m.slot_errors(record, text)
        assert int(score) == 5 - min(4, sum(errors.values())) and end == "<eos>"
        told = dict(zip(found[::2], found[1::2]))
        assert {slot for slot, word in told.items() if word != "right"} == {slot for slot, n in errors.items() if n}
        assert len(example("compare", seed)[0].split(" | ")) == 3


# ---------------------------------------------------------------- section 5.2 and 6: scripted revisers
def test_tau_by_p_fix_and_p_dmg():
    """The table of section 6: what a fixed reference, revisers of known competence and the gold revision are worth."""
    rows = responses(100)
    human = taus(rows, [row["human"] for row in rows])
    grid = {(f, d): taus(rows, revised(rows, f, d)) for f, d in ((1, 0), (0.6, 0), (0.2, 0), (0.6, 0.1), (0.2, 0.2))}
    assert max(human) < 0.3 < min(grid[1, 0]) and min(grid[1, 0]) > 0.75
    for i in range(2):
        order = [grid[key][i] for key in ((0.2, 0.2), (0.2, 0), (0.6, 0), (1, 0))]
        assert order == sorted(order) and grid[0.6, 0.1][i] < grid[0.6, 0][i] - 0.05
        assert grid[0.6, 0][i] > human[i] + 0.2 > grid[0.2, 0.2][i] + 0.1  # beyond and before the break-even line


def test_trap_1_identity_has_no_tau():
    """r* = y: every metric is at its maximum and constant; tau is undefined, never 0 or 1."""
    rows = responses(20)
    texts = [row["response"] for row in rows]
    table = m.measure(texts, dict(adapted=texts))
    assert set(table["bleu/adapted"].round(9)) == {100} and set(table["edit/adapted"]) == {0}
    metrics, draws = m.rating_table(table, np.array([row["quality"] for row in rows]), np.arange(80) // 4)
    assert all(math.isnan(metrics[key]) for key in ("bleu/adapted", "bleu rho/adapted", "bleu by source/adapted"))
    assert np.isnan(draws["bleu/adapted"][1]).all() and m.statistics(draws) == {}


def test_trap_2_one_revision_is_an_anchor():
    """Section 5.2: with one shared r* of a random primary the primary wins whatever its quality; the mean over both
    revisions is better. Swapping the answers leaves `both` and `own` as they are, to the bit."""
    rows = responses(150)
    texts = [row["response"] for row in rows]
    own = revised(rows, 0.6, 0.1, seed=1)
    columns = {str(j): [own[i // 4 * 4 + j] for i in range(len(rows))] for j in range(4)}
    table = m.measure(texts, columns) | m.baselines(rows)
    quality = np.array([row["quality"] for row in rows])
    pair = np.array(
        [(i, j) for i in range(len(rows)) for j in range(i + 1, i // 4 * 4 + 4) if quality[i] != quality[j]]
    )
    label, primary = np.sign(quality[pair] @ [1, -1]), np.random.default_rng(0).integers(2, size=len(pair))
    cfg, group = m.Config(), pair[:, 0] // 4
    found, draws, wins = m.pair_table(cfg, table, pair, label, group, primary)
    assert found["bleu primary wins/random"] > 0.8 and found["bleu pairs/random"] < 0.65
    assert found["bleu pairs/both"] > 0.72 and found["bleu pairs/own"] > 0.68
    assert found["bleu pairs/adapted"] == found["bleu pairs/both"] == draws["bleu pairs/both"][1][0]
    swapped = m.pair_table(cfg, table, pair[:, ::-1], -label, group, 1 - primary)[2]
    for protocol in ("both", "own", "random"):
        assert (wins[f"bleu/{protocol}"] == -swapped[f"bleu/{protocol}"]).all()
    only = m.pair_table(m.Config(pair_ref="random"), table, pair, label, group, primary)[0]
    assert only["bleu pairs/adapted"] == found["bleu pairs/random"]


def test_trap_5_a_revision_of_another_response_is_worth_no_more_than_a_human_reference():
    rows = responses(100)
    texts = revised(rows, 0.9, 0.0)
    other = [texts[i // 4 * 4 + (i + 1) % 4] for i in range(len(rows))]
    human, adapted, mismatched = (taus(rows, x)[0] for x in ([row["human"] for row in rows], texts, other))
    assert adapted > 0.6 > 0.3 > mismatched > -0.1 and abs(mismatched - human) < 0.15


def test_trap_4_good_responses_are_near_to_their_revision():
    rows = responses(100)
    likeness = m.measure([row["response"] for row in rows], dict(r=revised(rows, 0.8, 0.05)))["rougeL/r"]
    by = [np.mean([x for x, row in zip(likeness, rows) if row["quality"] == -k]) for k in range(4)]
    assert by == sorted(by, reverse=True) and by[0] > 0.97


def test_competence_finds_what_was_scripted():
    rows = responses(300)
    found = m.competence(rows, revised(rows, 0.7, 0.1))
    assert abs(found["p_fix"] - 0.7) < 0.06 and abs(found["p_dmg"] - 0.1) < 0.02 and 0.4 < found["identity"] < 0.75
    assert m.competence(rows, revised(rows, 1.0, 0.0)) == dict(p_fix=1, p_dmg=0, identity=1)


# ---------------------------------------------------------------- metrics
def test_bleu_by_hand():
    assert m.bleu("the cat sat on the mat", "the cat sat on the mat") == pytest.approx(100)
    assert m.bleu("the cat", "the cat sat on") == pytest.approx(100 * math.exp(1 - 2))  # as many orders as words
    value = 100 * ((3 / 4) * (1 / 3) * (1 / 2 / 2) * (1 / 4 / 1)) ** 0.25  # zeros: a half, a quarter of a hit
    assert m.bleu("a b x d", "a b c d") == pytest.approx(value)
    assert m.bleu("", "a") == m.bleu("a", "") == m.bleu("x y", "a b") == 0
    assert m.words_13a("It's 3.5, x-2&quot;!") == ["It's", "3.5", ",", "x-2", '"', "!"]


def test_rouge_and_distances_by_brute_force():
    def longest(a, b):
        return (
            0
            if not a or not b
            else max(
                longest(a[1:], b), longest(a, b[1:]), (a[0] == b[0]) + longest(a[1:], b[1:]) if a[0] == b[0] else 0
            )
        )

    rng = random.Random(0)
    for _ in range(60):
        a, b = ([rng.choice("abc") for _ in range(rng.randint(0, 7))] for _ in range(2))
        assert m.lcs(a, b) == longest(a, b)
        assert m.classic(" ".join(a), " ".join(b))["edit"] == 2 * longest(a, b) - len(a) - len(b)
    assert m.classic("it serves thai food", "it serves greek food")["edit"] == -2  # a word out, a word in
    assert m.rouge("the Cat sat!", "the cat lay") == pytest.approx((2 / 3, 1 / 2, 2 / 3))
    assert m.rouge("", "a") == m.rouge("?", "?") == (0, 0, 0)


@pytest.mark.peers
def test_bleu_and_rouge_equal_their_peers():
    sacrebleu, scorer = pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score.rouge_scorer")
    rng, kinds = random.Random(0), ["rouge1", "rouge2", "rougeL"]
    words = "the The cat 3.5 1,000 x-2 it's &amp; $5 (a) b. c, d-e 7-8 ünï - a\nb & <skipped> end. U.S. 4.".split(" ")
    texts = [" ".join(rng.choices(words, k=rng.randint(0, 14))) for _ in range(400)] + ["a-\nb", "4."]
    for a, b in zip(texts, texts[::-1]):
        assert m.bleu(a, b) == pytest.approx(sacrebleu.sentence_bleu(a, [b]).score, abs=1e-6)
        score = scorer.RougeScorer(kinds).score(b, a)
        assert m.rouge(a, b) == pytest.approx([score[kind].fmeasure for kind in kinds], abs=1e-9)


def vectors(sizes, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(len(sizes), max(sizes), d, generator=g, dtype=torch.float64), dim=-1)
    return x, torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]


def test_greedy_f1_by_loops():
    """Masks, weights, P and R change places with the texts, a text equals itself; the kernel's reference agrees."""
    (a, a_mask), (b, b_mask) = vectors([4, 2, 5]), vectors([3, 6, 1], seed=1)
    a_w, b_w = a_mask * torch.rand(3, 5), b_mask * torch.rand(3, 6)
    p, r, f = m.greedy_f1(a, b, a_mask, b_mask, a_w, b_w)
    for i in range(3):
        s = a[i][a_mask[i]] @ b[i][b_mask[i]].T
        want_p, want_r = (
            (s.amax(1) * a_w[i][a_mask[i]]).sum() / a_w[i].sum(),
            (s.amax(0) * b_w[i][b_mask[i]]).sum() / b_w[i].sum(),
        )
        assert p[i] == pytest.approx(float(want_p)) and r[i] == pytest.approx(float(want_r))
        assert f[i] == pytest.approx(float(2 * want_p * want_r / (want_p + want_r)))
    p2, r2, f2 = m.greedy_f1(b, a, b_mask, a_mask, b_w, a_w)
    assert torch.allclose(p, r2) and torch.allclose(r, p2) and torch.allclose(f, f2)
    assert torch.allclose(m.greedy_f1(a, a, a_mask, a_mask, a_w, a_w)[2], torch.ones(3, dtype=torch.float64))


def test_greedy_f1_without_a_common_direction():
    """P = R = 0 gives F = 0. Bug: 0 / 0 counts as a perfect score."""
    both = torch.ones(1, 2, dtype=torch.bool)
    a, b = torch.eye(4).split(2)  # all four tokens at right angles
    assert [x.tolist() for x in m.greedy_f1(a[None], b[None], both, both, both.float(), both.float())] == [[0.0]] * 3


def test_kernels_get_what_they_take(monkeypatch):
    from kernels.greedy_match import greedy_match
    from kernels.token_logp import token_logp

    (a, a_mask), (b, b_mask) = vectors([4, 2, 5]), vectors([3, 6, 1], seed=1)
    args, h, w, y = (
        (a, b, a_mask, b_mask, a_mask.double(), b_mask.double()),
        torch.randn(5, 8),
        torch.randn(9, 8),
        torch.arange(5),
    )
    plain = m.greedy_f1(*args), m.token_logp(h, w, y)
    monkeypatch.setattr(m, "load_kernel", dict(greedy_match=greedy_match, token_logp=token_logp).get)
    fused = m.greedy_f1(*args, kernels=True), m.token_logp(h, w, y, True)
    assert torch.allclose(torch.stack(plain[0]), torch.stack(fused[0])) and torch.allclose(plain[1], fused[1])


def test_bert_score_reads_each_text_once_and_batches_change_nothing():
    seen, g = [], torch.Generator().manual_seed(0)
    table = torch.randn(128, 6, generator=g)

    def embed(texts):
        seen.extend(texts)
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor([ord(c) for c in text]) for text in texts], batch_first=True
        )
        return table[ids], ids > 0, (ids > 0).float()

    pairs = [("abc", "abd"), ("abc", "abc"), ("xy", "a"), ("abd", "abc"), ("longer text", "xy")]
    found = m.bert_score(embed, pairs)
    assert sorted(seen) == sorted({text for pair in pairs for text in pair}) and found[1] == pytest.approx(1, abs=1e-6)
    assert found[0] == pytest.approx(found[3]) and found[0] < 1
    assert m.bert_score(embed, pairs, size=1) == pytest.approx(found, abs=1e-6)


def network(seed=0):
    torch.manual_seed(seed)
    model = m.Decoder(m.tiny_shape(m.Config(n_layer=2, n_head=2, n_embd=16)))
    for p in model.parameters():
        p.data = torch.randn_like(p) * (0.5 if p.ndim == 2 else 0.2) + (p.ndim == 1)
    return model


def test_mean_logp_and_choice_by_loops():
    """BARTScore's means and the judge's probabilities, one by one through the decoder; direction matters."""
    model, rng = network(), random.Random(0)
    pairs = [tuple([rng.randrange(60) for _ in range(rng.randint(1, 9))] for _ in range(2)) for _ in range(7)]
    with torch.no_grad():
        for size in (1, 64):
            found = m.mean_logp(model, pairs, size=size)
            p = m.choice(model, [context for context, _ in pairs], [3, 5, 8], size=size)
            for (context, target), x, row in zip(pairs, found, p):
                logits = model(torch.tensor([context + target]))[0]
                logp = [logits[len(context) - 1 + i].log_softmax(-1)[token] for i, token in enumerate(target)]
                assert x == pytest.approx(float(sum(logp) / len(logp)), abs=1e-4)
                assert row == pytest.approx(logits[len(context) - 1][[3, 5, 8]].softmax(-1).numpy(), abs=1e-4)
    assert m.mean_logp(model, [(b, a) for a, b in pairs]) != pytest.approx(found, abs=0.1)


# ---------------------------------------------------------------- statistics
def brute_tau(x, y):
    pairs = [(np.sign(a - b), np.sign(c - d)) for i, (a, c) in enumerate(zip(x, y)) for b, d in list(zip(x, y))[:i]]
    both, left, right = (
        sum(f(*p) for p in pairs) for f in (lambda a, b: a * b, lambda a, b: a * a, lambda a, b: b * b)
    )
    return both / math.sqrt(left * right) if left and right else math.nan


def test_trap_6_tau_and_rho():
    """Knight's count equals the pairs one by one, ties too; the draws equal samples that are written out."""
    rng = np.random.default_rng(0)
    for n, k in ((2, 2), (5, 2), (9, 3), (40, 4), (41, 1000), (6, 1)):
        x, y = rng.integers(k, size=n), rng.integers(k, size=n)
        assert m.tau_b(x, y) == pytest.approx(brute_tau(x, y), abs=1e-12, nan_ok=True)
        group = np.arange(n) // 2
        weight = m.resampled(group, 5)
        for draw, tau, mean in zip(weight, m.tau_draws(x, y, group, weight), m.mean_draws(x, group, weight)):
            at = [i for i in range(n) for _ in range(int(draw[group[i]]))]
            assert tau == pytest.approx(brute_tau(x[at], y[at]), abs=1e-12, nan_ok=True)
            assert mean == pytest.approx(x[at].mean())
    x = rng.normal(size=30)
    assert m.tau_b(x, 3 * x + 1) == m.tau_b(x, np.exp(x)) == 1 == -m.tau_b(x, -x) and math.isnan(m.tau_b(x, x * 0))
    assert m.ranks([3, 1, 3, 2]).tolist() == [3.5, 1, 3.5, 2] and math.isnan(m.spearman(x, x * 0))
    assert m.spearman(x, x**3) == pytest.approx(1) and m.spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)


@pytest.mark.peers
def test_tau_and_rho_equal_scipy():
    stats, rng = pytest.importorskip("scipy.stats"), np.random.default_rng(1)
    for n, k in ((10, 3), (100, 5), (2000, 50), (500, 10**6)):
        x, y = rng.integers(k, size=n), rng.integers(k, size=n)
        assert m.tau_b(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
        assert m.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_claims_and_verdicts():
    """Signs and factors of all statistics, paired draws, and the three outcomes."""
    keys = {key for _, formula, *_ in m.CLAIMS for key in re.findall(r"[a-zA-Z][\w ]*/\w+", formula)}
    spread = np.linspace(-0.1, 0.1, 101)
    draws = {key: np.append(0.5, 0.5 + spread) for key in keys}
    draws["bleu/adapted"], draws["bleu/human"] = draws["bleu/adapted"] + 0.2, draws["bleu/human"] - 0.1
    draws = {key: (np.ones(3, bool), x, None) for key, x in draws.items()}
    found = m.statistics(draws)
    assert set(found) == {name for name, *_ in m.CLAIMS}
    assert found["bleu-adapted-beats-human"][0] == pytest.approx(0.3)
    assert found["bleu-adapted-beats-human"][1] == pytest.approx((0.3, 0.3))  # what both draw alike takes no part
    assert found["mismatched-loses-bleu"][0] == pytest.approx(0.1) and found["metric-beats-judge"][0] == pytest.approx(
        0.2
    )
    outcomes = [m.verdict(*m.interval(np.append(x, x + spread)), 0.0) for x in (0.3, -0.3, 0.01)]
    assert outcomes == ["HOLDS", "DOES NOT HOLD", "INCONCLUSIVE"]
    del draws["verdict/none"]
    assert "metric-beats-judge" not in m.statistics(draws) and "adapted-helps-judge" not in m.statistics(draws)


# ---------------------------------------------------------------- training
def test_the_model_learns_from_right_answers_and_not_from_wrong_ones(tmp_path, monkeypatch):
    """After some steps a text of its own record is likelier than that of another one; a model that was taught the texts
    of other records does not know the difference."""

    def gap():
        cfg = m.Config(n_layer=1, n_embd=32, steps=60, batch_size=16, lr=2e-2)
        run = SimpleNamespace(device=torch.device("cpu"), rank=0, world=1, out=tmp_path, stop=False, began=0.0)
        run.keep = dict(done={}, trained=[])
        m.train(cfg, run, "write", {})
        assert run.keep["trained"] == ["write"]
        model = m.Decoder(m.tiny_shape(cfg))
        model.load_state_dict(m.load_file(tmp_path / "write-60.safetensors"))
        rows, other = (
            [right("write", random.Random(seed)) for seed in seeds] for seeds in (range(900, 1000), range(100))
        )
        mixed = [(prompt, answer) for (prompt, _), (_, answer) in zip(rows, other)]
        return np.mean(m.mean_logp(model, rows)) - np.mean(m.mean_logp(model, mixed))

    right = m.example
    assert gap() > 0.2
    monkeypatch.setattr(m, "example", lambda role, rng: (right(role, rng)[0], right(role, rng)[1]))
    assert abs(gap()) < 0.05


def test_a_role_is_weighed_by_examples_not_by_words():
    ids, answer = m.batch_of(m.Config(batch_size=4), "revise", 3)
    assert ids.shape == answer.shape == (4, ids.shape[1]) and answer.any(1).all()
    again = m.batch_of(m.Config(batch_size=4), "revise", 3)
    assert torch.equal(ids, again[0]) and not torch.equal(
        ids[:, :20], m.batch_of(m.Config(batch_size=4), "revise", 4)[0][:, :20]
    )
    for row, mask in zip(ids, answer):
        arrow = row.tolist().index(m.INDEX["=>"])
        assert not mask[: arrow + 1].any() and row[mask].tolist()[-1] == 0 and mask[arrow + 1]


# ---------------------------------------------------------------- revising and judging
def test_trap_9_verdicts_are_read_and_never_guessed():
    for reply, wanted in (
        ("[[A]]", 0),
        ("A is [[A]]? No: [[B]]", 1),
        ("A", None),
        ("[A]", None),
        ("[[C]]", None),
        (None, None),
    ):
        assert m.read_verdict(reply, list("AB")) == wanted
    assert m.read_verdict("[[3]] or [[5]]", list("12345")) == 4 and m.read_verdict("[[6]]", list("12345")) is None
    request = m.judge_request("tone", "q {x}", ["says [[A]]", "no {y}"], "ref [[B]]")
    assert m.read_verdict(request.split("[Instruction]")[1], list("AB")) is None and "{y}" in request
    for hostile in ("[[A]]", "[[[A]]", "[[[[A]]]]"):
        shown = m.judge_request("tone", hostile, [hostile, hostile], hostile).split("[Instruction]")[1]
        assert m.read_verdict(shown, list("AB")) is None
    assert "x [[1]] y" in m.revise_request("tone", "q", "x [[1]] y")  # so that it can come back unchanged
    assert "reference" not in m.judge_request("tone", "q", ["a"]).lower() and "ref [ [B]]" in request
    assert "Another" not in m.revise_request("tone", "q", "a") and "[Another answer]\nb" in m.revise_request(
        "tone", "q", "a", "b"
    )


def test_a_tiny_judge_says_a_score_where_its_explanation_ends(monkeypatch):
    """The expected score behind what it wrote, and the likeliest one, NaN where it wrote as long as it could. Bug: the
    other way round."""
    told, p, asked = {",": [5] * 4, ".": [5] * m.MOST_WORDS, "and": []}, np.eye(5)[[2, 4, 0]] * 0.8 + 0.04, []
    monkeypatch.setattr(m, "generate", lambda model, prompts, *_: [told[m.decode(x).split()[-2]] for x in prompts])
    monkeypatch.setattr(m, "choice", lambda model, prompts, options: asked.extend([prompts, options]) or p)
    expected, likeliest = m.Tiny(dict(judge=network())).judge([","] * 3, list(told))
    assert expected == pytest.approx([3, 0.84 * 5 + 0.04 * 10, 0.84 + 0.04 * 14])
    assert (likeliest[0], likeliest[2]) == (3, 1) and math.isnan(likeliest[1])
    assert asked == [[m.encode(f"<judge> , | {text} =>") + told[text] for text in told], m.encode("1 2 3 4 5")]


def test_temperatures_of_the_judge():
    """(official code) Greedy without a reference, 0.1 with one; each request gets its own verdict. Bug: the other way
    round."""
    calls = []

    class Backend:
        def ask(self, contents, temperature, key):
            calls.append((temperature, [text.count("[Reference answer]") for text in contents]))
            return [f"[[{1 + len(text) % 5}]]" for text in contents]

    row = dict(id="0", source="q", response="a", references=dict(none="", human="good", adapted="better"))
    verdicts = m.make_judgments(m.Config(), Backend(), [row])[0]["verdicts"]
    assert calls == [(0.0, [0]), (0.1, [1, 1])]
    for verdict, text in zip(verdicts, row["references"].values()):
        assert verdict["verdict"] == len(m.judge_request(m.Config().rubric, "q", ["a"], text)) % 5


@pytest.mark.parametrize(
    "reply, text, answer",
    [
        (reply, text, "an answer")
        for reply, text in [
        ("  plain ", "plain"),
        ("Revised answer:\nBetter.", "Better."),
        ('"quoted"', "quoted"),
        ('"a" and "b"', '"a" and "b"'),
        ("```text\nin a fence\n```", "in a fence"),
        ("Here:\n```\nx\n```", "x"),
        (None, ""),
        ("Steps:", "Steps:"),
        ("use `a`:\n```\ncode\n```\nthen run", "```\ncode\n```\nthen run"),
        ]
    ]
    + [(text, text, text) for text in ("Steps:\n1. a\n2. b", "```\ncode\n```", '"Quoted."', "")]
    + [(text + "d", text + "d", text + "c") for text in ("Steps:\n1. a\n2. ", "```\nx\n```\nand ")]
    + [("Revised:\nSteps:\n1", "Revised:\nSteps:\n1", "Steps:\n1. b"), ('"No."', '"No."', '"Yes."')],
)
def test_clean_revision(reply, text, answer):
    """What the answer itself begins with stays; an unchanged answer comes back as it is."""
    assert m.clean_revision(reply, answer) == text


def test_revisions_that_fail_are_marked():
    """Empty and overlong replies: the answer itself stands in."""
    calls = []

    class Backend:
        def ask(self, contents, temperature, key):
            calls.append((len(contents), temperature, key))
            return ["" if "bad" in text else "word " * 21 if "long" in text else " good " for text in contents]

    rows = [dict(id=str(i), source="q", response=text) for i, text in enumerate(("good", "bad", "long", "fine"))]
    made = m.make_revisions(m.Config(), Backend(), rows)
    assert calls == [(4, 0.3, ("references", "0"))]
    assert [tuple(row["adapted"]["0"].values()) for row in made] == [
        ("good", False, True),
        ("bad", True, True),
        ("long", True, True),
        ("good", False, False),
    ]


# ---------------------------------------------------------------- human data through an endpoint
PAIRS = [
    dict(
        id=f"p{i}",
        instruction=f"Question {i} <b>?",
        a=f"good words {i}",
        b=f"bad words & more words {i}",
        label=1 + i % 2,
    )
    for i in range(6)
]
RATINGS = [
    dict(
        id=f"r{i}",
        source=f"source {i // 2}",
        response=f"answer {'good ' * (i % 3)}{i}",
        reference=f"answer good {i}",
        scores=dict(overall=i % 3, tone=1),
    )
    for i in range(8)
]


def reply(payload):
    """A reviser that says good for bad, a judge that likes good; it does not always decide."""
    text = payload["messages"][0]["content"]
    if text.startswith("You are an expert editor"):
        return text.split("[Answer]\n")[1].split("\n")[0].replace("bad", "good")
    if "[Answer A]" in text:
        first, second = text.split("[Answer A]\n")[1].split("[Answer B]\n")
        return "none" if "6" in first else f"I would say [[{'A' if 'good' in first else 'B'}]]"
    return f"[[{1 + text.split('[Answer]')[1].count('good')}]]" if "[Answer]" in text else "my own answer"


@pytest.fixture
def chat(monkeypatch, tmp_path):
    server = FakeChat(reply)
    monkeypatch.chdir(tmp_path)
    yield server
    server.close()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pairs_through_an_endpoint(chat, tmp_path, capsys):
    """References and verdicts in JSONL, both orders; a second run asks nothing; the page is escaped."""
    argv = ["--task", "data", "--data", write(tmp_path / "d.jsonl", PAIRS), "--endpoint", chat.url, "--model", "name"]
    result = m.main([*argv, "--out", "x", "--report", "page.html"])
    metrics, asked = result["metrics"], len(chat.seen)
    assert metrics["judge pairs/none"] == metrics["judge pairs/adapted"] == 0.5 and metrics["judge coverage/none"] == 1
    assert (
        metrics["judge consistent/none"] == 1 and metrics["judge first/none"] == 0.5 and metrics["reviser/failed"] == 0
    )
    assert {"bleu pairs/both", "bleu pairs/own", "bleu primary wins/random", "length longer/none"} < set(metrics)
    assert asked == 6 + 6 * 2 + 6 * 4 * 2 - 0 and metrics["tokens/references"] == 7 * 18  # direct, revisions, verdicts
    references = [json.loads(line) for line in (tmp_path / "x" / "references.jsonl").read_text().splitlines()]
    assert references[0]["adapted"]["1"] == dict(text="good words & more words 0", failed=False, identity=False)
    verdicts = json.loads((tmp_path / "x" / "judgments.jsonl").read_text().splitlines()[0])["verdicts"]
    assert {(v["arm"], v["order"]) for v in verdicts} == {
        (a, o) for a in ("none", "direct", "adapted", "mismatched") for o in (0, 1)
    }
    page = (tmp_path / "page.html").read_text()
    assert (
        "Question 1 &lt;b&gt;?" in page and "<b>" not in page and "<del>bad</del>" in page and "<ins>good</ins>" in page
    )
    assert not re.search(r"<script|https?://|src=", page)
    for path in ("result.json", "state.pt"):
        (tmp_path / "x" / path).unlink()
    again = m.main([*argv, "--out", "x", "--report", "page.html"])
    spent = dict.fromkeys(["tokens/references", "tokens/verdicts", "tokens/per verdict"])
    assert len(chat.seen) == asked and again["metrics"] | spent == metrics | spent
    assert metrics["tokens/per verdict"] == 7
    few = m.main([*argv, "--out", "y", "--pair-ref", "random", "--arms", "adapted"])["metrics"]
    assert (
        "bleu pairs/own" not in few
        and few["bleu pairs/adapted"] == few["bleu pairs/random"] == metrics["bleu pairs/random"]
    )


def test_trap_3_nothing_leaks_to_the_reviser_and_ratings(chat, tmp_path):
    """No request tells a score, a label or, to the reviser, the human reference; ratings of all arms."""
    rows = [
        row | dict(reference=f"SECRET {row['reference']}", scores=dict(overall=row["scores"]["overall"] + 77001))
        for row in RATINGS
    ]
    argv = ["--task", "data", "--data", write(tmp_path / "d.jsonl", rows), "--endpoint", chat.url, "--model", "name"]
    metrics = m.main([*argv, "--out", "x", "--report", "page.html"])["metrics"]
    texts = [payload["messages"][0]["content"] for payload, _ in chat.seen]
    assert not [text for text in texts if "7700" in text]
    assert not [text for text in texts if "SECRET" in text and not text.startswith("You are an impartial judge")]
    assert any("SECRET" in text for text in texts)
    assert metrics["judge/none"] == pytest.approx(1) and metrics["judge coverage/human"] == 1
    assert {"bleu/human", "bleu/mismatched", "bleu rho/direct", "rougeL by source/human"} < set(metrics)
    assert all(
        json.loads(line)["adapted"]["0"]["identity"]
        for line in (tmp_path / "x" / "references.jsonl").read_text().splitlines()
    )


def test_rows_without_a_reference_take_no_part(monkeypatch):
    """They are no half; differences are of the rows that both columns have; the rows are counted."""
    rng, n = np.random.default_rng(0), 40
    quality, group = rng.integers(5, size=n).astype(float), np.arange(n) // 2
    x, y = quality + rng.normal(size=n), quality + rng.normal(size=n)
    y[::4] = math.nan
    metrics, draws = m.rating_table({"bleu/adapted": x, "bleu/human": y, "edit/human": y * math.nan}, quality, group)
    ok = ~np.isnan(y)
    assert metrics["bleu n/human"] == 30 and metrics["rows/none"] == 40 and "edit/human" not in metrics
    assert "bleu n/adapted" not in metrics
    a, b = m.together(draws, "bleu/adapted", "bleu/human")
    assert a[0] == pytest.approx(m.tau_b(x[ok], quality[ok])) != metrics["bleu/adapted"]
    assert b is draws["bleu/human"][1]
    pair, label = np.arange(2 * n).reshape(-1, 2), np.ones(n, int)
    human = np.where(np.arange(2 * n) < 20, np.arange(2 * n) % 2, math.nan)
    table = {"length/none": np.zeros(2 * n), "bleu/human": human}
    table |= {"bleu/0": np.zeros(2 * n), "bleu/1": np.full(2 * n, math.nan), "bleu/adapted": np.zeros(2 * n)}
    found, draws, _ = m.pair_table(m.Config(), table, pair, label, group, np.zeros(n, int))
    assert found["bleu pairs/human"] == 0 and found["bleu pairs n/human"] == 10
    assert found["bleu pairs/random"] == 0.5 and not {"bleu pairs/own", "bleu pairs/both"} & set(found)
    judged = [dict(verdicts=[dict(arm="human", order=o, verdict=0)] * (i > 0)) for i in range(3) for o in (0,)]
    judged[1]["verdicts"] += [dict(arm="human", order=1, verdict=None)]
    judged[2]["verdicts"] += [dict(arm="human", order=1, verdict=1)]
    found, _ = m.judge_scores([dict(b="")] * 3, judged)
    assert math.isnan(found["judge/human"][0]) and found["judge/human"][1:].tolist() == [0.5, 1]


def test_what_is_not_needed_is_not_asked(chat, tmp_path):
    """--arms human makes no revision; the own answer is asked once for a source; random primaries may be all alike."""
    argv = ["--task", "data", "--endpoint", chat.url, "--model", "name"]
    data = write(tmp_path / "r.jsonl", RATINGS)
    found = m.main([*argv, "--data", data, "--arms", "human", "--out", "x"])["metrics"]
    texts = [payload["messages"][0]["content"] for payload, _ in chat.seen]
    assert len(texts) == 8 * 2 and {text[:24] for text in texts} == {"You are an impartial jud"}
    assert "reviser/failed" not in found and found["tokens/references"] == 0 < found["tokens/verdicts"]
    chat.seen.clear()
    m.main([*argv, "--data", data, "--arms", "direct", "--out", "y"])
    assert sum(payload["messages"][0]["content"].startswith("source") for payload, _ in chat.seen) == 4
    for wanted in (0, 1):
        seed = next(s for s in range(99) if {m.random_of("primary", s, n).randrange(2) for n in (1, 2, 3)} == {wanted})
        pairs = write(tmp_path / f"p{wanted}.jsonl", PAIRS[:3])
        flags = ["--pair-ref", "random", "--seed", str(seed), "--arms", "adapted", "--out", f"z{wanted}"]
        found = m.main([*argv, "--data", pairs, *flags])["metrics"]
        assert found["bleu pairs/adapted"] == found["bleu pairs/random"] and "bleu primary wins/random" in found


def test_resume_takes_the_same_data_and_adds_up(chat, tmp_path, monkeypatch):
    """Stopped after the first part, continued: tokens of both calls are counted; other data are refused; old files
    without a state are not taken."""
    rows = [
        row | dict(id=f"{k}{row['id']}", source=f"{row['source']} {k}", reference=f"nice {row['id']}")
        for k in range(3)
        for row in RATINGS
    ]
    argv = ["--task", "data", "--data", write(tmp_path / "d.jsonl", rows), "--endpoint", chat.url, "--model", "name"]
    argv += ["--arms", "human,adapted", "--out", str(tmp_path / "x")]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(m, "should_stop", lambda run: True)
        m.main(argv)
    assert len((tmp_path / "x" / "references.jsonl").read_text().splitlines()) == 16
    write(tmp_path / "d.jsonl", [rows[0] | dict(response="another")] + rows[1:])
    with pytest.raises(SystemExit) as stop:
        m.main([*argv, "--resume"])
    assert stop.value.code == 2
    write(tmp_path / "d.jsonl", rows)
    found = m.main([*argv, "--resume"])["metrics"]
    assert (found["tokens/references"], found["tokens/verdicts"]) == (24 * 7, 24 * 3 * 7) and len(chat.seen) == 96
    for path in ("result.json", "state.pt"):
        (tmp_path / "x" / path).unlink()
    (tmp_path / "x" / "references.jsonl").write_text("{}")
    assert m.main(argv)["metrics"]["tokens/verdicts"] == 0  # all replies are kept


def test_weights_of_an_unknown_run_are_not_taken(tmp_path, monkeypatch):
    """Only what the state knows is trained already, whatever files there are."""
    (tmp_path / "judge-1200.safetensors").write_bytes(b"of another run")
    trained, run = [], SimpleNamespace(out=tmp_path, keep=dict(done={}, trained=["revise"]))
    monkeypatch.setattr(m, "train", lambda cfg, run, role, state: trained.append(role))
    monkeypatch.setattr(m, "budgets", lambda cfg: [])
    with pytest.raises(KeyError):  # no budget was measured
        m.run_world(m.Config(), run, {}, [], (None, None))
    assert trained == ["judge", "compare", "write"]


def test_a_mistyped_flag_locks_no_directory(chat, tmp_path, capsys):
    argv = ["--task", "data", "--data", write(tmp_path / "d.jsonl", RATINGS), "--endpoint", chat.url, "--model", "name"]
    argv += ["--arms", "human", "--out", "x"]
    for wrong in (["--encoder", "no folder"], ["--scorer", "no folder"], ["--report", str(tmp_path)]):
        with pytest.raises(SystemExit) as stop:
            m.main([*argv, *wrong])
        assert stop.value.code == 2 and not (tmp_path / "x" / "state.pt").exists() and chat.seen == []
    with pytest.raises(SystemExit):
        m.main([*argv, "--endpoint", "https://user:secret@host/v1"])
    assert "secret" not in "".join(capsys.readouterr()) and m.ENDPOINT in inspect.getsource(m.Chat)
    m.main(argv)


def test_texts_with_lone_surrogates(chat, tmp_path):
    rows = [row | dict(response=row["response"] + " \ud800 [[5]]", reference="\udfff x") for row in RATINGS]
    argv = ["--task", "data", "--data", write(tmp_path / "d.jsonl", rows), "--endpoint", chat.url, "--model", "name"]
    m.main([*argv, "--arms", "human,adapted", "--out", "x", "--report", "page.html"])
    assert "answer" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("left", [0, 1, 60, 200, 10**6])
def test_a_stage_goes_on_where_it_was_cut(tmp_path, left):
    """Whatever is left of the file, the rows are the same in the end, and whole parts are not made again."""
    run, path, made = SimpleNamespace(out=tmp_path, rank=0, world=1, stop=False, device="cpu"), tmp_path / "x.jsonl", []
    run.began = 0.0
    todo = [dict(id=str(i)) for i in range(20)]

    def make(part):
        made.append(len(part))
        return [dict(id=x["id"], text=f"{x['id']} of {len(part)}") for x in part]

    whole = m.stage(run, path, todo, make, size=8)
    content = path.read_bytes()
    assert made == [8, 8, 4] and [row["id"] for row in whole] == [x["id"] for x in todo]
    path.write_bytes(content[:left])
    kept = content[:left].count(b"\n")
    made.clear()
    again, steady = m.stage(run, path, todo, make, size=8), lambda rows: [row | dict(seconds=0) for row in rows]
    assert steady(again) == steady(whole) == steady(map(json.loads, path.read_text().splitlines()))
    assert whole[0]["seconds"] > 0 == whole[8]["tokens"] and run.began <= 0
    assert made == ([] if kept == 20 else [8, 8, 4][kept // 8 :])
    for wrong in (todo[::-1], [dict(id="other")] * 20):
        with pytest.raises(SystemExit):
            m.stage(run, path, wrong, make, size=8)


def test_verdicts_that_cannot_be_read_are_counted():
    rows = [dict(id=str(i), a="", b="") for i in range(3)]
    judged = [
        dict(id=str(i), verdicts=[dict(arm="none", order=o, verdict=v) for o, v in enumerate(pair)])
        for i, pair in enumerate([(0, 1), (0, 0), (None, 1)])
    ]
    found, metrics = m.judge_scores(rows, judged)
    assert found["judge/none"].tolist() == [1, 0, 0.5] and metrics["judge coverage/none"] == pytest.approx(5 / 6)
    assert metrics["judge consistent/none"] == 0.5 and metrics["judge first/none"] == 0.75
    judged = [dict(id="0", verdicts=[dict(arm="none", order=0, verdict=v)]) for v in (2, None)]
    found, _ = m.judge_scores([dict(response="")] * 2, judged)
    assert found["judge/none"][0] == 3 and math.isnan(found["judge/none"][1])


def test_classic_metrics_alone_and_other_schemas(tmp_path, monkeypatch):
    """No back-end: fixed references and baselines; dialogues take another person's words as reference."""
    monkeypatch.chdir(tmp_path)
    llmbar = [dict(input=f"q{i}", output_1="a b c", output_2="a b", label=1 + i % 2) for i in range(4)]
    (tmp_path / "l.json").write_text(json.dumps(llmbar))
    found = m.main(["--task", "data", "--schema", "llmbar", "--data", "l.json", "--out", "l"])["metrics"]
    assert found["length pairs/none"] == 0.5 and found["length longer/none"] == 0 and "bleu pairs/human" not in found
    talk = [
        dict(source=f"hello {i // 3}", system_id=name, system_output=f"{name} says {i}", scores=dict(overall=i))
        for i, name in enumerate(["Original Ground Truth", "New Human Generated", "Nucleus"] * 3)
    ]
    (tmp_path / "u.json").write_text(json.dumps(talk))
    rows = m.read_data(m.Config(task="data", schema="unieval", data="u.json"))
    assert [row["human"] for row in rows[:3]] == [rows[1]["response"], rows[0]["response"], rows[0]["response"]]
    found = m.main(["--task", "data", "--schema", "unieval", "--data", "u.json", "--out", "u"])["metrics"]
    assert {"bleu/human", "length/none", "copy/none"} < set(found) and "bleu/adapted" not in found


def chat_folder(folder):
    """A random chat model whose tokens are bytes."""
    plain = [b for b in range(256) if chr(b).isprintable() and b != 32]
    names = {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*plain}))}}
    special = ["<|im_start|>", "<|im_end|>"]
    vocab = {name: i for i, name in enumerate([names[b] for b in range(256)] + special)}
    steps = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    added = [dict(id=256 + i, content=name, special=True) for i, name in enumerate(special)]
    data = dict(model=dict(type="BPE", vocab=vocab, merges=[]), pre_tokenizer=steps, normalizer=None)
    data |= dict(added_tokens=added)
    config = dict(model_type="llama", hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config |= dict(vocab_size=258, tie_word_embeddings=True)
    files = dict(config=config, tokenizer=data, tokenizer_config=dict(eos_token="<|im_end|>"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    (folder / "model.safetensors").write_bytes(m.export(m.Decoder(m.read_shape(config))))
    return str(folder)


def test_a_local_checkpoint_does_what_an_endpoint_does(tmp_path, monkeypatch):
    """A random model says nothing that can be read: no verdict, and revisions that fail; the same bits every time."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    folder, found = chat_folder(tmp_path / "model"), []
    argv = ["--task", "data", "--data", write(tmp_path / "d.jsonl", PAIRS), "--model", folder, "--scorer", folder]
    for out in ("x", "y"):
        found.append(m.main([*argv, "--max-new", "6", "--arms", "direct,adapted", "--out", out])["metrics"])
    assert json.dumps(found[0]) == json.dumps(found[1]) and found[0]["judge coverage/adapted"] == 0
    assert found[0]["judge pairs/none"] == 0.5 and found[0]["tokens/verdicts"] > found[0]["tokens/references"] > 1000
    assert {"bartscore pairs/direct", "bartscore pairs/both", "bleu primary wins/random"} < set(found[0])
    for name in ("direct", "references"):
        files = [(tmp_path / out / f"{name}.jsonl").read_text().splitlines() for out in "xy"]
        a, b = ([json.loads(line) | dict(seconds=0) for line in lines] for lines in files)
        assert a == b and len(a) == len(PAIRS) and (name == "references" or all(row["text"] for row in a))


# ---------------------------------------------------------------- the encoder
def bert_folder(folder, seed=0, words="the cat sat un ##able ##s , . ! $ ü ##x 中 a b c".split()):
    """A random BERT with its tokenizer in transformers, saved to folder."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(vocab),
        hidden_size=24,
        num_hidden_layers=1 + seed,
        num_attention_heads=2 + seed,
        intermediate_size=40,
        max_position_embeddings=30,
        initializer_range=0.5,
    )
    model = transformers.BertModel(config).eval()
    model.save_pretrained(folder)
    tok = tokenizers.BertWordPieceTokenizer(vocab, lowercase=seed == 0, strip_accents=None)
    tok.save(str(folder / "tokenizer.json"))
    return model, tok


@pytest.mark.peers
@pytest.mark.parametrize("seed", [0, 1])
def test_encoder_equals_transformers(tmp_path, seed):
    """Ids, hidden states and masked means of random models on odd texts; long texts are cut."""
    model, tok = bert_folder(tmp_path, seed)
    texts = [
        "The cat sat.",
        "unables, $ cat!",
        "",
        "中a\tb\x00\u200bc ü U\u0308x",
        "cat " * 50,
        "x" * 101 + " cat",
        "^ cat|cat",
    ]
    encoder = m.Encoder(tmp_path).eval()
    x, mask = encoder(texts)
    for text, row, keep, unit in zip(texts, x, mask, encoder.embed(texts)):
        ids = tok.encode(text).ids
        ids = ids if len(ids) <= 30 else ids[:29] + ids[-1:]
        with torch.no_grad():
            want = model(torch.tensor([ids])).last_hidden_state[0]
        assert keep.sum() == len(ids) and torch.allclose(row[keep], want, atol=1e-5)
        assert torch.allclose(unit, torch.nn.functional.normalize(want.mean(0), dim=0), atol=1e-5)


@pytest.mark.peers
def test_bert_score_equals_its_peer(tmp_path):
    """bert-score on the same encoder, to 1e-5."""
    peer, transformers = pytest.importorskip("bert_score"), pytest.importorskip("transformers")
    _, tok = bert_folder(tmp_path)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok._tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=30,
    ).save_pretrained(tmp_path)
    rng, words = random.Random(0), "the cat sat unable a b c , .".split()
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(40)]
    score = m.real_metrics(m.Config(encoder=str(tmp_path)), torch.device("cpu"))["bertscore"]
    found = score(list(zip(texts, texts[::-1])))
    want = peer.score(texts, texts[::-1], model_type=str(tmp_path), num_layers=1)[2]
    assert found == pytest.approx(want.tolist(), abs=1e-5)


@pytest.mark.real
@pytest.mark.peers
def test_minilm_equals_transformers():
    """all-MiniLM-L6-v2 as it is packaged: sentence embeddings to 1e-5."""
    import real

    transformers = pytest.importorskip("transformers")
    folder, texts = real.minilm(), ["A café in the old town.", "Don't panic!", "北京 is 3.5 km away", "word " * 600]
    tok, model = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder)
    batch = tok(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    want = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert torch.allclose(m.Encoder(folder).eval().embed(texts), want, atol=1e-5)


@pytest.mark.real
def test_smollm2_revises_judges_and_scores(tmp_path, monkeypatch):
    """A real chat model as reviser, judge and BARTScore on three pairs."""
    import real

    monkeypatch.chdir(tmp_path)
    folder = str(real.smollm2())
    rows = [
        dict(id=str(i), instruction="Name a colour.", a="Blue.", b="A table is a colour.", label=1) for i in range(3)
    ]
    found = m.main(
        [
            "--task",
            "data",
            "--data",
            write(tmp_path / "d.jsonl", rows),
            "--model",
            folder,
            "--scorer",
            folder,
            "--max-new",
            "12",
            "--arms",
            "adapted",
            "--out",
            "x",
        ]
    )["metrics"]
    assert 0 <= found["judge coverage/none"] <= 1 and {"bleu pairs/both", "bartscore pairs/both"} < set(found)
    assert found["tokens/references"] > 100


# ---------------------------------------------------------------- command line
def test_smoke(smoke):
    run = smoke("reviseval")
    assert run.result["claims"] == []
    metrics = run.result["metrics"]
    assert {
        "bleu/human",
        "bleu/adapted",
        "judge/none",
        "judge/direct",
        "step 8/verdict",
        "length/none",
        "copy/none",
        "checker/none",
        "reviser/p_fix",
        "bleu pairs/random",
        "judge pairs/both",
        "step 8/p_dmg",
        "scripted 0.6 0.1/bleu",
    } < set(metrics)
    names = {
        "config.json",
        "log.jsonl",
        "plot.png",
        "result.json",
        "state.pt",
        *(f"{role}-{n}.safetensors" for role in m.ROLES for n in (1, 2, 3, 5, 8)),
    }
    assert names == {path.name for path in run.out.iterdir()}


def test_kill_and_resume(kill_and_resume):
    kill_and_resume("reviseval")


BAD = {
    "--colour red": "--colour -h",
    "--task chess": "chess world",
    "--arms human,": "--arms",
    "--arms own": "--arms human",
    "--seed -1": "--seed 0",
    "--steps 0": "--steps 1",
    "--lr nan": "--lr",
    "--n-embd 30": "--n-embd --n-head",
    "--batch-size 0": "--batch-size 1",
    "--kernels": "--kernels CUDA",
    "--device cuda": "--device cuda",
    "--task data": "--task --data",
    "--data x": "--task --data",
    "--model x": "--model --task",
    "--report x.html": "--report --task",
    "--task data --data x --endpoint http://h/v1": "--endpoint --model",
    "--task data --data x --model m --endpoint http://u:secret@h/v1": "--endpoint password",
    "--task data --data none.jsonl": "none.jsonl",
    "--task data --data none.jsonl --report no/page.html": "--report no/page.html",
    "--pair-ref all": "all random",
}


@pytest.mark.parametrize("argv, words", BAD.items(), ids=list(BAD))
def test_wrong_flags(rejects, argv, words):
    rejects(m.main, [*SMOKE, *argv.split()], *words.split())


GOOD = '{"instruction": "q", "response": "a", "scores": {"overall": 1}}'


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "line 2 JSON"),
        ("[]", "line 2 object"),
        ('{"response": "a"}', "line 2 instruction"),
        ('{"instruction": "q"}', "response"),
        ('{"instruction": "q", "response": " "}', "response"),
        ('{"instruction": 3, "response": "a"}', "text"),
        ('{"instruction": "q", "response": "a"}', "scores overall"),
        ("\n{", "line 3 JSON"),
        (GOOD.replace("1", "1" + "0" * 400), "line 2 large"),
        ("[" * 100000, "line 2 JSON"),
        (GOOD.replace("1", "NaN"), "finite"),
        (GOOD.replace("1", "true"), "finite"),
        (GOOD.replace('"overall"', '"tone"').replace("}}", '}, "reference": 3}'), "reference"),
        ('{"instruction": "q", "a": "x", "b": "y", "label": 3}', "label 3"),
        ('{"instruction": "q", "a": "x", "label": 1}', "line 2 b"),
        ('{"instruction": "q", "a": "x", "b": "y", "label": 1}', "all ratings"),
        ("", "three rows"),
        (GOOD.replace("{", '{"id": "1", ', 1), "id of its own"),
    ],
)
def test_wrong_data(rejects, tmp_path, line, words):
    (tmp_path / "d.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD if line else ''}\n")
    rejects(m.main, ["--task", "data", "--data", tmp_path / "d.jsonl"], "--data", *words.split())


def test_wrong_files(rejects, tmp_path):
    (tmp_path / "d.json").write_text(GOOD)
    rejects(m.main, ["--task", "data", "--schema", "llmbar", "--data", tmp_path / "d.json"], "item 1")
    (tmp_path / "d.json").write_bytes(b"\xff\xfe")
    rejects(m.main, ["--task", "data", "--data", tmp_path / "d.json"], "--data")
    (tmp_path / "config.json").write_text("{}")
    rejects(lambda argv: m.Encoder(tmp_path), [], "encoder", "BERT")
    rejects(lambda argv: m.load_kernel(*argv), ["no_such_kernel"], "--kernels", "kernels/", "triton")


def test_dry_run_prints_and_creates_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    m.main(["--dry-run"])
    text = capsys.readouterr().out
    model = m.Decoder(m.tiny_shape(m.Config()))
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in text and "H100" in text
    m.main(["--scale", "paper", "--dry-run"])
    assert "1000 rows" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
