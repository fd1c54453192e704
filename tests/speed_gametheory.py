# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""gametheory.py's Moebius transform beside shapiq's exact computation and a dense matrix, and masked forwards a second.

python tests/speed_gametheory.py   # needs shapiq; run it on an idle machine; 1 GiB of memory, half a minute

1,000 games of 12 players in fp64. The dense way multiplies by the 2^n x 2^n matrix of signs, which is built before.
shapiq computes the first five games, which is multiplied up to 1,000; in a call it also makes a dictionary. Times are
medians of five rounds in which all take turns. A masked forward is one masked copy of an input through the network,
logits and log-odds in fp64 included; beside it the same with one set of players at a time.
"""
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import shapiq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gametheory as m  # noqa: E402

N, GAMES, FEW = 12, 1000, 5


def seconds(function):
    began = time.perf_counter()
    found = function()
    return time.perf_counter() - began, found


def by_shapiq(games):
    """(len(games), 2^n) in the order of our bits."""
    bits, found = 1 << np.arange(N), torch.zeros(len(games), 2**N, dtype=torch.float64)
    for row, game in zip(found, games.numpy()):
        computer = shapiq.ExactComputer(lambda there: game[there.astype(np.int64) @ bits], n_players=N)
        exact = computer.moebius_transform
        for players, at in exact.interaction_lookup.items():
            row[sum(1 << p for p in players)] = exact.values[at]
    return found


def main():
    torch.manual_seed(0)
    games = torch.randn(GAMES, 2**N, dtype=torch.float64)
    games -= games[:, :1].clone()
    index = torch.arange(2**N)
    parity = m.order_of(index[:, None] ^ index) % 2
    signs = torch.where(index[:, None] & index == index, 1.0 - 2 * parity, 0.0).double()  # (S, T)
    ways = {"ours": lambda: m.moebius(games), "dense matrix": lambda: games @ signs.T,
            "shapiq": lambda: by_shapiq(games[:FEW])}
    rounds = [{name: seconds(way) for name, way in ways.items()} for _ in range(5)]
    ours, wanted = statistics.median(one["ours"][0] for one in rounds), rounds[-1]["ours"][1]
    print(f"{GAMES} games of {N} players, {torch.get_num_threads()} threads")
    for name in ways:
        spent = statistics.median(one[name][0] for one in rounds) * (GAMES / FEW if name == "shapiq" else 1)
        found = rounds[-1][name][1]
        difference = (found - wanted[: len(found)]).abs().max().item()
        print(f"{name:14}{1e3 * spent:12.1f} ms{spent / ours:12.1f} x ours   largest difference {difference:.1e}")
    for task, players in (("concepts", 8), ("tiles", 8), ("shapes", 9)):
        cfg = m.cli(m.Config, m.SCALES, ["--task", task])
        world, sets = m.make_world(cfg, "related", 0), 2**players
        net, held = m.Network(cfg, world.classes).eval(), world.after(cfg.n_eval, m.generator(0), held=True)
        game = net, held["x"], held["target"], world.baseline, world.player
        chunks = cfg.mask_batch, cfg.n_eval
        rounds = [[seconds(lambda: m.values(*game, chunk))[0] for chunk in chunks] for _ in range(5)]
        many, one = (cfg.n_eval * sets / statistics.median(column) for column in zip(*rounds))
        print(f"{task:10}{many:12,.0f} masked forwards/s, one set at a time {one:,.0f}: {many / one:.2f} x")


if __name__ == "__main__":
    main()
