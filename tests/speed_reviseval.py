# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""reviseval.py's BERTScore beside bert-score, both with all-MiniLM-L6-v2: pairs a second, one process, one thread.

python tests/speed_reviseval.py   # needs bert-score and the packaged encoder (tests/real.py); an idle core, a minute

short: 400 responses of the world, each with its human and another response's text as reference; long: 160 pairs of one
to eight such texts in a row. Both read a text once a call; the arithmetic is the encoder's for nine tenths, so what is
to be won is padding. Rounds in which the two take turns; ratios within a round. In padded batches bert-score counts 0
for a token whose best cosine is below 0, so that single pairs differ by up to 1e-4; alone such a pair agrees to 1e-6.
"""
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from bert_score import BERTScorer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import real  # noqa: E402
import reviseval as m  # noqa: E402


def workloads():
    rows, rng = m.make_responses(m.Config(n_records=100)), random.Random(0)
    texts = [row["response"] for row in rows]
    short = [(text, other) for i, row in enumerate(rows) for text in [row["response"]]
             for other in (row["human"], texts[i - 1])]
    long = [tuple(" ".join(rng.choices(texts, k=rng.randint(1, 8))) for _ in range(2)) for _ in range(160)]
    return dict(short=short, long=long)


def main():
    torch.set_num_threads(1)
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
        ratios = [theirs / ours for theirs, ours in zip(*seconds.values())]
        difference = max(abs(a - b) for a, b in zip(*found.values()))
        rates = " | ".join(f"{way} {len(pairs) / statistics.median(times):.1f}" for way, times in seconds.items())
        print(f"{name}: {rates} pairs/s | ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
              f"{max(ratios):.2f}) | largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
