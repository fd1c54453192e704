# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""reviseval.py's metrics beside bert-score, sacrebleu and rouge-score: pairs a second, one process, one thread.

python tests/speed_reviseval.py   # needs these and the packaged encoder (tests/real.py); an idle core, a minute

BLEU and ROUGE-1, -2, -L: sentence by sentence. sacrebleu remembers the tokens of texts it saw; each round has texts of
its own, but four responses share a reference. BERTScore, with all-MiniLM-L6-v2. short: 400 responses of the world, each
with its human and another response's text as reference; long: 160 pairs of one to eight such texts in a row. Both read
a text once a call; the arithmetic is the encoder's for nine tenths, so what is to be won is padding. In padded batches
bert-score counts 0 for a token whose best cosine is below 0, so that single pairs differ by up to 1e-4; alone such a
pair agrees to 1e-6. Rounds in which the two take turns; ratios within a round.
"""
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from bert_score import BERTScorer
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import real  # noqa: E402
import reviseval as m  # noqa: E402


def told(name, seconds, pairs, difference):
    """One line out of {way: seconds of each round}; the peer comes first."""
    ratios = [theirs / ours for theirs, ours in zip(*seconds.values())]
    rates = " | ".join(f"{way} {pairs / statistics.median(times):.1f}" for way, times in seconds.items())
    print(f"{name}: {rates} pairs/s | ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
          f"largest difference {difference:.1e}")


def words():
    """BLEU and ROUGE: our functions take one pair, so do the peers'."""
    kinds, scored = ["rouge1", "rouge2", "rougeL"], BLEU(effective_order=True)
    scorer = rouge_scorer.RougeScorer(kinds)
    ways = {"BLEU": {"sacrebleu": lambda a, b: [scored.sentence_score(a, [b]).score],
                     "ours": lambda a, b: [m.bleu(a, b)]},
            "ROUGE": {"rouge-score": lambda a, b: [scorer.score(b, a)[kind].fmeasure for kind in kinds],
                      "ours": m.rouge}}
    for name, pair in ways.items():
        seconds, difference = {way: [] for way in pair}, 0.0
        for i in range(6):
            rows, found = m.make_responses(m.Config(n_records=150, seed=100 + i)), []
            for way, run in pair.items():
                began = time.perf_counter()
                found.append([run(row["response"], row["human"]) for row in rows])
                seconds[way] += [time.perf_counter() - began] * (i > 0)  # the first warms up
            difference = max(difference, *(abs(a - b) for one in zip(*found) for a, b in zip(*one)))
        told(name, seconds, len(rows), difference)


def workloads():
    rows, rng = m.make_responses(m.Config(n_records=100)), random.Random(0)
    texts = [row["response"] for row in rows]
    short = [(text, other) for i, row in enumerate(rows) for text in [row["response"]]
             for other in (row["human"], texts[i - 1])]
    long = [tuple(" ".join(rng.choices(texts, k=rng.randint(1, 8))) for _ in range(2)) for _ in range(160)]
    return dict(short=short, long=long)


def main():
    torch.set_num_threads(1)
    words()
    folder = str(real.minilm())
    peer = BERTScorer(model_type=folder, num_layers=6, device="cpu", batch_size=64)
    ours = m.real_metrics(m.Config(encoder=folder), torch.device("cpu"))["bertscore"]
    for name, pairs in workloads().items():
        ways = {"bert-score": lambda: peer.score(*map(list, zip(*pairs)))[2].tolist(),
                "ours": lambda: ours(pairs)}
        seconds, found = {way: [] for way in ways}, {}
        for i in range(6):
            for way, run in ways.items():
                began = time.perf_counter()
                found[way] = run()
                seconds[way] += [time.perf_counter() - began] * (i > 0)  # the first warms up
        told(f"BERTScore, {name}", seconds, len(pairs), max(abs(a - b) for a, b in zip(*found.values())))


if __name__ == "__main__":
    main()
