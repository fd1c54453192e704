# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "safetensors", "tqdm", "matplotlib"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""mdm.py: Beyond Autoregression: Discrete Diffusion for Complex Reasoning and Planning
Ye, Gao, Gong, Zheng, Jiang, Li, Kong, ICLR 2025, arXiv 2410.14157 (MDM; the final version says MGDM)

A left-to-right model must write the hard parts of an answer before the easy ones are known. A network that learns to
fill in masked answers at every noise level, and reveals the positions it is surest of first, can leave them for last:
it solves sudokus and finds paths where an autoregressive model of the same size, data and updates does not.

  python mdm.py                 # sudoku, 11 min on 2 cores: 99.7 % of the easy test boards exact (3 seeds), ar 2.3 %
  python mdm.py --task path     # 10 min: 99.8 % or more at every planning distance (3 seeds), ar 49 to 52 % from 2 on
  python mdm.py --task cd3      # countdown, 15 min: 71 %, ar 77 %, so that claim fails here; sat5 (3-SAT), 6 min: 99 %
  python mdm.py --solve boards.txt --load out/mdm/sudoku-small-s0    # 81 digits a line, 0 for a blank

Symbols (N problems, B canvases, L positions, F symbols a position, R masked positions, V symbols, H heads)
  paper   code              shape      meaning
  x_0     ids               (B, L, F)  canvas: question and answer, F symbols per position
  x_t     noisy             (B, L, F)  the canvas with masked answer positions
  t, T    t, T              (B,), -    noise level 0..T-1: a position is masked with probability (t+1)/T
  u       u                 (R,)       -log p(x_0 | x_t) at the R masked positions
  w(t)    sequence_weight   (B,)       T - t: more weight where little is masked
  v(u)    token_weight      (R,)       alpha (1 - exp(-u))^beta: more weight on hard tokens

Differences from the paper (--scale paper sets those with a flag back)
  canvas      the gaps of a board, a route or a list of equations are filled in place: what the question shows of the
              answer is in view (clues; start and goal; the countdown's target, so a lost plan must end in a false
              equation). A causal arm reads all that is given, then writes the gaps, told the place of each and of the
              next. The paper writes source [SEP] target (--canvas source).
  positions   row + column + box (sudoku), kind of place (others); the paper learns a table of 512.
  symbols     an edge, a clause, a number is one position; the paper writes characters. Numbers start on circles, and
              training problems of countdown whose label needs one above 999 are left out (1 % of cd3, 6 % of cd4);
              test problems stay.
  problems    medium, tough and hard boards are ours; game24 is drawn, not the 100 games of Tree of Thoughts.
  model       nano: 2 or 3 blocks of width 96, ReLU, wider initial weights (final norm narrower), no dropout or shift.
  training    AdamW beta2 0.99, warm-up, batches of 32 or 128, augmented boards; the paper: 1024, 300 epochs; bf16 on
              cuda for fp16, decoding in fp32.
  commit      a revealed token stays; the official code revises every position at every call (--commit revise).
  decoding    every call reveals at least one position; [SEP], [MASK], [UNK] are never chosen (by ar nor [PAD]); equal
              scores go left to right; no Gumbel noise; --order random reveals exact counts.
  equal work  every arm takes as many steps on the same examples; the paper's ar has 100 epochs against 300 for mdm on
              sudoku, 200 against 100 on path, 40 against 600 on cd4. Settings tried: TRIED below; more for mdm.
  grading     an answer is right when the rules say so; "official" is the authors' script: it never checks which numbers
              a countdown used, and asks for the one stored assignment of 3-SAT.
  left out    LLaMA, VDM, Stream-of-Search; D3PM and RDM are the settings --sequence-weight original
              --no-token-reweighting, and linear without token reweighting.
  unknown     size of the paper's sudoku AR; decoding of its tables; steps of sat5, sat7 (here sat9's), cd3, cd5 (cd4's)
The paper's text was not at hand where a tag says "official code": the formula is read from HKUNLP/diffusion-vs-ar.

Copy out: q_sample, token_weight, focal_loss, position_scores, choose, decode (it uses the two before it and remaining)
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import timeit
import zipfile
from dataclasses import asdict, dataclass, fields
from itertools import combinations, islice, product, zip_longest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


# ---------------------------------------------------------------- 1. Config
@dataclass
class Config:
    task: str = "sudoku"  # sudoku|path|cd3|cd4|cd5|sat5|sat7|sat9: the problems to learn (cd: countdown)
    scale: str = "small"  # smoke|small|long|paper: a row of SCALES below; explicit flags win over it
    arms: str = "mdm,ar"  # comma list out of mdm, ar and, for path, ar_rev, teacherless: trained and compared
    tag: str = "main"  # name of this variant in the RESULT record
    seed: int = 0  # training problems, initial weights, order and masks; not the held-out problems
    # data
    n_train: int = 6000  # training problems (paper: 100k sudoku, sat9; 50k path, sat5, sat7; 500k cd)
    n_val: int = 60  # held-out problems of the learning curve, per class
    n_test: int = 500  # held-out problems of the final table, per class (paper: 1k in all)
    levels: str = "easy,medium,tough"  # comma list of easy, medium, tough, hard: sudoku training boards
    test_levels: str = "easy,medium,tough"  # the same list for the held-out boards
    data: str = ""  # training file, jsonl (input, output) or csv (quizzes, solutions); "" = generated
    test_data: str = ""  # test file in the same formats; "" = generated
    augment: bool = True  # sudoku: relabel, permute and transpose every training board at random
    # layout
    format: str = "tokens"  # tokens|chars: one position per edge, number or clause, or per character (paper)
    canvas: str = "inplace"  # inplace|source: mdm fills the problem's gaps, or source [SEP] target (paper)
    positions: str = "structured"  # structured|learned: e.g. row + column + box, or a table of 512 (paper)
    # model: GPT-2, causal for the autoregressive arms only
    size: str = "nano"  # nano|tiny|base|medium: a row of SIZES below (paper: tiny, base, medium)
    n_layer: int = 0  # blocks; 0 = by size
    n_head: int = 0  # attention heads; 0 = by size
    n_embd: int = 0  # width; 0 = by size
    dropout: float = 0.0  # on embeddings, attention and residuals (paper: 0.1)
    shift: bool = False  # mdm reads the prediction for position i at i-1, as the official code does
    # diffusion
    T: int = 20  # noise levels of the forward process (paper: 20)
    alpha: float = 0.25  # scale of the token weight v(u) (paper: 0.25)
    beta: float = 1.0  # exponent of the token weight v(u) (paper: 1; countdown 2)
    token_reweighting: bool = True  # token weight v(u), or plain cross-entropy
    sequence_weight: str = "linear"  # linear|original|none: w(t) = T-t (paper), 1/(t+1) (the ELBO), 1
    # decoding
    decode_steps: int = 20  # network calls per answer; 0 = one position per call (paper: 20)
    order: str = "confidence"  # confidence|margin|random|l2r: which masked positions are revealed first
    commit: str = "freeze"  # freeze|revise: revealed tokens stay, or every call may change them (official)
    threshold: float = 0.0  # also reveal all of higher probability; 0 = off; alone with --decode-steps 0
    # training
    steps: int = 4400  # optimizer steps of each arm
    batch_size: int = 32  # problems in one optimizer step, over all devices (paper: 1024)
    micro_batch: int = 0  # problems per forward pass; 0 = no split; saves memory, same gradient but for dropout
    lr: float = 3e-3  # peak learning rate, cosine to 0 (paper: 1e-3 for tiny, 3e-4 for base)
    warmup_steps: int = 100  # linear warm-up (paper: 0)
    weight_decay: float = 0.0  # AdamW, on matrices only (paper: 0)
    beta2: float = 0.99  # AdamW; beta1 is 0.9 (paper: 0.999)
    grad_clip: float = 1.0  # largest gradient norm (paper: 1)
    # machine
    device: str = "auto"  # auto|cpu|cuda|mps: auto is cuda if there is one, else cpu
    dtype: str = "auto"  # auto|float32|bfloat16: auto is bfloat16 on cuda, else float32
    kernels: bool = False  # Triton kernels masked_focal_ce, decode_scores (cuda only; compared at first use)
    compile: bool = False  # torch.compile the blocks
    # running
    eval_every: int = 500  # steps between two points of the learning curve
    log_every: int = 20  # steps between two lines of log.jsonl
    save_every: int = 100  # steps between two checkpoints
    out: str = ""  # output directory; "" = out/mdm/TASK-SCALE[-TAG]-sSEED
    resume: bool = False  # continue an interrupted run: the same command with this flag
    load: str = ""  # directory of a finished run; the first of --arms answers --solve
    solve: str = ""  # file of problems to answer ("-" = standard input); needs --load
    trace: bool = False  # draw the order in which the last test problem's answer is revealed (trace.png)
    dry_run: bool = False  # print parameters, FLOPs, memory and hours, and stop

    def __post_init__(self):
        arms = ["mdm", "ar"] + ["ar_rev", "teacherless"] * (self.task == "path")
        for flag, known in dict(arms=arms, levels=LEVELS, test_levels=LEVELS).items():
            names = getattr(self, flag).split(",")
            if not set(names) <= set(known) or len(set(names)) < len(names):
                flag = flag.replace("_", "-")
                fail(f"--{flag} {','.join(names)}: a comma list, each once, out of {', '.join(known)}")
        ones = "n_train n_val n_test T batch_size steps eval_every log_every save_every".split()
        for name, value in vars(self).items():
            low, high = int(name in ones), dict(dropout=0.99, threshold=1, beta2=0.9999).get(name, math.inf)
            if not isinstance(value, str) and not (low <= value <= high and value < math.inf):
                limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                fail(f"--{name.replace('_', '-')} {value}: must be {limits}")
        if 0 < self.beta < 1:
            fail(f"--beta {self.beta}: between 0 and 1 the slope at a certain token is infinite; take 0, or 1 or more")
        plain = (self.canvas, self.positions) == ("source", "learned")
        if self.task != "sudoku" and self.format == "chars" and not plain:
            fail("--format chars needs --canvas source --positions learned: characters show no structure")
        if self.shift and self.canvas == "inplace":
            fail("--shift needs --canvas source: the first position in place has no left neighbour to be read at")
        if bool(self.solve) != bool(self.load):
            fail("--solve FILE and --load DIR go together: the problems, and the directory of a finished run")
        for name, value in SIZES[self.size].items():
            setattr(self, name, getattr(self, name) or value)
        if self.n_embd % self.n_head:
            fail(f"--n-embd {self.n_embd}: must be a multiple of --n-head {self.n_head}")


LEVELS = ["easy", "medium", "tough", "hard"]
SIZES = dict(  # the three GPT-2 shapes of the paper, and one for a laptop
    nano=dict(n_layer=2, n_head=6, n_embd=96),
    tiny=dict(n_layer=3, n_head=12, n_embd=384),
    base=dict(n_layer=12, n_head=12, n_embd=768),
    medium=dict(n_layer=24, n_head=16, n_embd=1024),
)
TINY_RUN = dict(n_train=64, n_val=4, n_test=6, steps=6, batch_size=8, n_layer=1, n_head=2, n_embd=32)
PUBLISHED = dict(format="chars", canvas="source", positions="learned", shift=True, augment=False, size="tiny")
PUBLISHED |= dict(batch_size=1024, lr=1e-3, warmup_steps=0, beta2=0.999, dropout=0.1, compile=True)
PUBLISHED |= dict(levels="easy", test_levels="easy", n_train=100_000, n_test=1000)
PATH = dict(arms="mdm,ar,ar_rev,teacherless", n_train=50_000, n_val=100, n_test=200, n_layer=3, batch_size=128)
SAT = dict(n_train=50_000, n_val=200, batch_size=128, eval_every=200)
COUNTDOWN = dict(n_train=100_000, n_val=200, batch_size=128, n_layer=3, lr=2e-3, steps=6000)
SCALES = {  # "scale" and "scale:task"; explicit flags win
    "smoke": dict(**TINY_RUN, eval_every=3, save_every=2, log_every=2),
    "small": {},
    "small:path": dict(**PATH, steps=2000, eval_every=100),
    "long": dict(n_train=20_000, steps=20_000, eval_every=4000, test_levels="easy,medium,tough,hard", n_test=300),
    "long:path": dict(**PATH, steps=10_000, eval_every=250),
    "paper": dict(**PUBLISHED, steps=29_300, eval_every=1000),
    "paper:path": dict(arms=PATH["arms"], n_train=50_000, n_test=167, steps=4900, eval_every=200),
}
OF_COUNTDOWN = dict(
    small=COUNTDOWN,
    long=COUNTDOWN | dict(n_train=500_000, steps=25_000, eval_every=1000),
    paper=dict(size="base", lr=3e-4, beta=2.0, n_train=500_000, steps=293_000, eval_every=5000),
)
OF_SAT = dict(
    small=dict(**SAT, steps=2000),
    long=SAT | dict(n_train=100_000, n_layer=3, steps=10_000),
    paper=dict(n_train=50_000, steps=29_300),
)
SCALES |= {f"{scale}:cd{k}": row for k in (3, 4, 5) for scale, row in OF_COUNTDOWN.items()}
SCALES |= {f"{scale}:sat{n}": row for n in (5, 7, 9) for scale, row in OF_SAT.items()}
SCALES["paper:sat9"] = dict(n_train=100_000, steps=58_600)
SCALES["small:sat5"] = SAT | dict(steps=1200)
SCALES["small:sat9"] = SAT | dict(steps=1500)
SCALES["small:cd4"] = COUNTDOWN | dict(n_train=50_000, steps=4000)
SCALES["small:cd5"] = COUNTDOWN | dict(n_train=20_000, steps=2800)
TRIED = dict(  # configurations looked at on separate problems (learning rate, batch, width, heads, initial weights)
    sudoku=dict(mdm=22, ar=8),
    path=dict(mdm=21, ar=5, ar_rev=1, teacherless=1),  # most of them on sudoku and taken over
    cd=dict(mdm=6, ar=2),
    sat=dict(mdm=1, ar=1),
)


# ---------------------------------------------------------------- 2. Data (official generators)
# A problem is a pair of strings in the authors' format, whether generated, loaded or typed.
PAD, SEP, MASK, EOS, UNK = range(5)
CHARS = "0123456789*+-/=,abcdefghij"
SYMBOL = {char: 5 + i for i, char in enumerate(CHARS)}  # the official 31 ids
VOCAB = 5 + len(CHARS)

ROW, COL = np.divmod(np.arange(81), 9)
BOX = ROW // 3 * 3 + COL // 3
UNITS = np.concatenate([np.arange(9)[:, None] == line for line in (ROW, COL, BOX)])  # (27, 81)
PEERS = (UNITS.astype(np.float32).T @ UNITS > 0).astype(np.float32) - np.eye(81, dtype=np.float32)  # share a unit
PEERS_OF = [set(np.flatnonzero(row).tolist()) for row in PEERS]  # the 20 peers of each of the 81 cells


def solutions(board, digits=range(1, 10)):
    """Yield every completion of a board (81 ints, 0 = blank): depth first, the cell with fewest candidates first."""

    def search(board, free):  # free: blank cell to its candidates
        if not free:
            yield board
            return
        cell = min(free, key=lambda c: len(free[c]))
        for digit in free[cell]:
            left = {c: [d for d in x if d != digit] if c in PEERS_OF[cell] else x for c, x in free.items() if c != cell}
            yield from search(board[:cell] + [digit] + board[cell + 1 :], left)

    seen = [{board[peer] for peer in peers} for peers in PEERS_OF]
    return search(list(board), {c: [d for d in digits if d not in seen[c]] for c in range(81) if not board[c]})


def full_grid(rng):
    """A random solved grid (81 ints): three random diagonal boxes, completed by search in random digit order."""
    board = np.zeros(81, int)
    for box in (0, 4, 8):
        board[BOX == box] = rng.permutation(9) + 1
    return next(solutions(board.tolist(), (rng.permutation(9) + 1).tolist()))


def fill_singles(boards, hidden=True):
    """Fill every forced cell of boards (B, 81), round by round, until there is none.

    A naked single is a cell with one candidate; a hidden single is a digit with one place in a unit."""
    boards, live = boards.copy(), np.arange(len(boards))
    while len(live):
        now = boards[live]
        held = (now[:, None] == np.arange(1, 10)[:, None]).astype(np.float32)  # (b, 9, 81)
        free = (held @ PEERS == 0) & (now == 0)[:, None]  # digit d could stand in cell c
        forced = free & (free.sum(1, keepdims=True) == 1)
        if hidden:
            lone = free.astype(np.float32) @ UNITS.T == 1  # (b, 9, 27)
            forced |= free & (lone[:, :, ROW] | lone[:, :, 9 + COL] | lone[:, :, 18 + BOX])
        digit = np.where(forced.any(1), forced.argmax(1) + 1, 0).astype(boards.dtype)  # (b, 81)
        boards[live] = now + digit
        live = live[digit.any(1)]
    return boards


def dig(boards, removable, rng):
    """Blank the clues of boards (B, 81) one by one in random order, each if removable(trial, cell, digit) is true."""
    quiz, count = boards.copy(), (boards > 0).sum(1)
    order = np.where(boards > 0, rng.random(boards.shape), 2).argsort(1)  # clues first
    for k in range(count.max()):
        rows = np.flatnonzero(k < count)
        trial, cell, at = quiz[rows], order[rows, k], np.arange(len(rows))
        digit = trial[at, cell]
        trial[at, cell] = 0
        good = removable(trial, cell, digit)
        quiz[rows[good]] = trial[good]
    return quiz


def is_hidden_single(boards, cell, digit):
    """Is the blank cell (B,) of each board the only place for the digit (B,) in its row, column or box?"""
    seen = (boards == digit[:, None]).astype(np.float32) @ PEERS > 0
    places = (boards == 0) & ~seen  # (B, 81)
    lone, row = places.astype(np.float32) @ UNITS.T == 1, np.arange(len(cell))  # (B, 27)
    return lone[row, ROW[cell]] | lone[row, 9 + COL[cell]] | lone[row, 18 + BOX[cell]]


def while_singles_solve(boards, *_, clues=34):
    """Naked and hidden singles still solve the board, and it has clues enough."""
    return fill_singles(boards).all(1) & ((boards > 0).sum(1) >= clues)


def until_naked_singles_stall(boards, cell, digit):
    """Singles still solve the board, and before the cell was blanked naked singles alone did."""
    before = boards.copy()
    before[np.arange(len(cell)), cell] = digit
    return fill_singles(boards).all(1) & fill_singles(before, hidden=False).all(1)


def has_one_solution(boards, *_):
    return np.array([len(list(islice(solutions(board), 2))) == 1 for board in boards.tolist()])


def sudoku_problems(n, level, rng):
    """n boards with one solution each, as (quiz, solution) strings.

    easy:   the paper's class (Kyubyong/sudoku): the fewest clues of ten digs; naked singles solve them
    medium: as many clues, 34; naked and hidden singles solve them, one in three needs a hidden one
    tough:  clues taken away until naked singles get stuck, so that every board needs a hidden single
    hard:   dug on as long as there is one solution, to at most 25 clues; singles get stuck, search is needed"""
    problems = []
    while len(problems) < n:
        solved = np.array([full_grid(rng) for _ in range(min(n - len(problems) + 9, 1000))], np.int8)
        if level in ("medium", "tough"):
            quiz = dig(solved, while_singles_solve if level == "medium" else until_naked_singles_stall, rng)
            fits = (level == "medium") | ~fill_singles(quiz, hidden=False).all(1)
        else:
            digs = [dig(solved, is_hidden_single, rng) for _ in range(10 if level == "easy" else 1)]
            quiz = np.stack(digs)[np.argmin([(x > 0).sum(1) for x in digs], 0), np.arange(len(solved))]
            fits = fill_singles(quiz, hidden=False).all(1)
        if level == "hard":
            quiz = dig(quiz, has_one_solution, rng)
            fits = ~fill_singles(quiz).all(1) & ((quiz > 0).sum(1) <= 25)
        problems += [("".join(map(str, q)), "".join(map(str, s))) for q, s in zip(quiz[fits], solved[fits])]
    return problems[:n]


def path_problems(n, distance, rng):
    """n pairs (shuffled edges and start,goal; edges of the route): two paths of six nodes that cross at one node.

    distance "pd0" to "pd5": steps from the crossing to the goal, the planning distance."""
    order, cross = rng.random((n, 12)).argsort(1), 5 - int(distance[2])
    route, other = order[:, :6], order[:, 6:].copy()
    other[:, cross] = route[:, cross]
    edges = np.concatenate([np.stack([p[:, :-1], p[:, 1:]], 2) for p in (route, other)], 1)  # (n, 10, 2)
    edges = np.take_along_axis(edges, rng.random((n, 10)).argsort(1)[..., None], 1)
    problems = []
    for pairs, r in zip(edges.tolist(), route.tolist()):
        source, target = ("/".join(f"{u},{v}" for u, v in steps) for steps in (pairs, zip(r, r[1:])))
        problems.append((f"{source}-{r[0]},{r[-1]}", target))
    return problems


def planning_distance(source, target):
    """The class of a loaded path: its crossing is the first node that two edges leave (official script)."""
    tails = [edge.split(",")[0] for edge in source.split("-")[0].split("/")]
    route = [edge.split(",")[0] for edge in target.split("/")]
    return f"pd{next((len(route) - i for i, node in enumerate(route) if tails.count(node) > 1), 0)}"


HELD_OUT = dict(  # targets that no countdown training problem has (the authors' test files)
    cd3=[22, 24, 25, 30, 32, 50, 65, 67, 96],
    cd4=[14, 39, 41, 57, 62, 81, 87, 89, 96],
    cd5=[43, 48, 51, 68, 73, 80, 92, 95, 98],
)


def first_solutions(numbers, target):
    """Which countdowns, numbers (N, k) and target (N,), have a solution; the first ones (N, k - 1, 4) as a, op, b, c.

    Depth first as in Stream-of-Search, which labelled the authors' data: pairs in order, each with a + b, a * b,
    larger - smaller, larger / smaller if exact; the result goes behind the other numbers; all are used."""
    N, k = numbers.shape
    solved, steps = np.zeros(N, bool), np.zeros((N, k - 1, 4), int)
    if k == 1:
        return numbers[:, 0] == target, steps
    low, high = numbers.min(1), numbers.max(1)
    hits = (low + high == target) | (low * high == target) | (high - low == target) | (low * target == high) & (low > 0)
    possible = hits | (k > 2)  # of two numbers the answer is seen at once
    for (i, j), op in product(combinations(range(k), 2), range(4)):
        live = np.flatnonzero(possible & ~solved)
        if not len(live):
            break
        a, b = numbers[live, i], numbers[live, j]
        if op > 1:
            a, b = np.maximum(a, b), np.minimum(a, b)
        c = (a + b, a * b, a - b, a // np.maximum(b, 1))[op]
        fits = (op < 3) | ((b > 0) & (b * c == a))
        live, equation = live[fits], np.stack([a, np.full_like(a, op), b, c], 1)[fits]
        others = np.delete(numbers[live], (i, j), 1)
        found, later = first_solutions(np.column_stack([others, equation[:, 3]]), target[live])
        solved[live], steps[live[found], 0], steps[live[found], 1:] = found, equation[found], later[found]
    return solved, steps


def countdown_problems(n, kind, rng):
    """n pairs (numbers and target; equations): numbers 1 to 99, targets 10 to 100, drawn until there is a solution.

    kind: "cd4 old" has none of the held-out targets, "cd4 new" only those, "cd4 game24" is 24 from numbers 1 to 13."""
    task, kind = kind.split()
    game, problems = kind == "game24", []
    targets = [24] if game else [x for x in range(10, 101) if (x in HELD_OUT[task]) == (kind == "new")]
    target = rng.choice(targets, n)
    while len(target):
        numbers = rng.integers(1, 14 if game else 100, (len(target), int(task[2])))
        solved, steps = first_solutions(numbers, target)
        for row, goal, lines in zip(numbers[solved].tolist(), target[solved].tolist(), steps[solved].tolist()):
            equations = ",".join(f"{a}{'+*-/'[op]}{b}={c}" for a, op, b, c in lines)
            problems.append((",".join(map(str, [*row, goal])), equations))
        target = target[~solved]
    return problems


CLAUSES = {5: 41, 7: 45, 9: 51}  # 3-SAT: variables to clauses, at the threshold of satisfiability
LITERALS = {5: ("12345", "67890"), 7: ("1234567", "bcdefgh"), 9: ("123456789", "bcdefghij")}  # true, false


def sat_problems(n, kind, rng):
    """n pairs (clauses; one satisfying assignment) for kind "sat5 ...", "sat7 ..." or "sat9 ...".

    Distinct clauses of three variables, drawn again until the formula can be satisfied; the label is random."""
    count, problems = int(kind[3]), []
    m, (true, false) = CLAUSES[count], LITERALS[count]
    truth = np.array(list(product((False, True), repeat=count)))  # (2^n, n) every assignment
    table = [(x, sign) for x in combinations(range(count), 3) for sign in product((False, True), repeat=3)]
    clauses = np.array([",".join((true if s else false)[i] for i, s in zip(*clause)) for clause in table])  # (C,)
    killed = np.array([(truth[:, x] != sign).all(1) for x, sign in table], np.float32)  # (C, 2^n)
    while len(problems) < n:
        chosen = rng.random((4000, len(table))).argpartition(m, 1)[:, :m]  # (4000, m)
        member = np.zeros((4000, len(table)), np.float32)
        np.put_along_axis(member, chosen, 1, 1)
        alive = member @ killed == 0  # (4000, 2^n)
        rows = np.flatnonzero(alive.any(1))
        label = truth[(alive[rows] * rng.random((len(rows), len(truth)))).argmax(1)]  # (r, n)
        for ids, values in zip(rng.permuted(chosen[rows], axis=1), label):
            assignment = ",".join((true if x else false)[i] for i, x in enumerate(values))
            problems.append(("/".join(clauses[ids]), assignment))
    return problems[:n]


def family(task):
    return task.rstrip("3456789")


MAKE = dict(sudoku=sudoku_problems, path=path_problems, cd=countdown_problems, sat=sat_problems)
EDGE = "(1[01]|[0-9]),(1[01]|[0-9])"
FORMS = dict(  # what a question looks like, as a pattern and in words
    sudoku=("[0-9.]{81}", "81 digits, 0 for a blank"),
    path=(f"({EDGE}/){{9}}{EDGE}-{EDGE}", "6,2/2,10/...-start,goal with ten edges"),
)
FORMS |= {f"cd{k}": (r"(\d{1,3},){%d}\d{1,3}" % k, f"{k} numbers and the target, as in 5,3,9,72") for k in (3, 4, 5)}
CLAUSE = {n: ",".join(["[" + "".join(LITERALS[n]) + "]"] * 3) for n in CLAUSES}
FORMS |= {
    f"sat{n}": (f"({CLAUSE[n]}/){{{m - 1}}}{CLAUSE[n]}", f"{m} clauses, as in 1,4,5/1,9,0") for n, m in CLAUSES.items()
}


def read_problems(name, task, need_target=True):
    """Problems of a file ("-" = standard input): jsonl (input, output), csv (quizzes,solutions) or "source target"."""
    problems = []
    try:
        lines = (sys.stdin.read() if name == "-" else Path(name).read_text("utf-8-sig")).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{name}: cannot be read: {error}")
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line == "quizzes,solutions"):
            continue
        source, _, target = line.strip().partition("," if task == "sudoku" and "," in line else " ")
        if line.startswith("{"):
            try:
                source, target = (str(json.loads(line).get(field, "")) for field in ("input", "output"))
            except ValueError as error:
                fail(f"{name}:{number}: not a JSON object: {error}")
        if not re.fullmatch(FORMS[task][0], source, re.ASCII):
            fail(f"{name}:{number}: source {source[:50]!r} does not fit --task {task}; expected {FORMS[task][1]}")
        source = source.replace(".", "0")
        if (target or need_target) and not grade(task, source, target, target)[0]:
            fail(f"{name}:{number}: target {target[:50]!r} is not a right answer to the source")
        problems.append((source, target))
    return problems or fail(f"{name}: holds no problem")


def load_problems(cfg, files):
    """Training problems (list), validation and test problems (class to list).

    files: what was read for --data and --test-data. A class is a level, a planning distance, "cd3 old" and the like;
    its last word is its name in the tables."""
    if cfg.task == "sudoku":
        train_classes, val_classes = cfg.levels.split(","), cfg.test_levels.split(",")
    elif cfg.task == "path":
        train_classes = val_classes = [f"pd{k}" for k in range(6)]
    else:
        train_classes = val_classes = [f"{cfg.task} {'old' if family(cfg.task) == 'cd' else 'formulas'}"]
    new = [f"{cfg.task} new"] + ["cd4 game24"] * (cfg.task == "cd4")
    test_classes = new if family(cfg.task) == "cd" else val_classes
    make = MAKE[family(cfg.task)]
    rngs = [np.random.default_rng(key) for key in ([0, cfg.seed], [1], [2])]  # held-out problems never change
    val = {x.split()[-1]: make(cfg.n_val, x, rngs[1]) for x in val_classes}
    test = {x.split()[-1]: make(cfg.n_test, x, rngs[2]) for x in test_classes}
    if "data" in files:
        train = files["data"][: cfg.n_train]
    else:
        train = [p for x in train_classes for p in make(math.ceil(cfg.n_train / len(train_classes)), x, rngs[0])]
    if "test_data" in files:
        test = {}
        for problem in files["test_data"]:
            test.setdefault(planning_distance(*problem) if cfg.task == "path" else "file", []).append(problem)
    held_out = {source for group in [*val.values(), *test.values()] for source, _ in group}
    train = [problem for problem in train if problem[0] not in held_out and fits(problem, cfg)]
    return train or fail(f"--data {cfg.data}: no problem in it is new and fits the canvas"), val, test


# The canvas of --format tokens: the kinds of the question's positions, and how many the answer has.
SLOTS = {f"cd{k}": (list(range(k + 1)), 4 * k - 4) for k in (3, 4, 5)}
SLOTS |= {f"sat{k}": ([0] * m, k) for k, m in CLAUSES.items()} | dict(path=([0] * 10 + [1], 6))
CUTOFF = dict(sudoku=164, path=75, cd3=37, cd4=64, cd5=74, sat5=258, sat7=285, sat9=325)  # of question [SEP] answer
NUMBERS = 1000  # countdown, --format tokens: the numbers below have a symbol each


def vocabulary(cfg):
    return VOCAB + NUMBERS * (family(cfg.task) == "cd" and cfg.format == "tokens")


def fits(problem, cfg):
    """Can the answer be written on the canvas?"""
    if vocabulary(cfg) > VOCAB:
        return max(map(int, re.findall(r"\d+", problem[1]))) < NUMBERS
    return len(",".join(problem)) < CUTOFF[cfg.task] or cfg.format == "tokens"


def reverse_path(text):
    """1,2/2,3 to 3,2/2,1"""
    return "/".join(",".join(edge.split(",")[::-1]) for edge in text.split("/")[::-1])


def to_symbols(source, target, cfg):
    """Question, answer, and for each position of the answer what the question shows of it, or None.

    A position is a tuple of symbols. --format tokens: an edge is one position of two symbols and the answer is the six
    nodes of the route; a clause is one position of three symbols; a number of countdown is one symbol, an equation the
    four positions a, op, b, c. An unknown target is ""."""
    if cfg.task == "sudoku" or cfg.format == "chars":
        question, answer = ([(SYMBOL[c],) for c in text] for text in (source, target))
        return question, answer, [None if c == "0" else (SYMBOL[c],) for c in source]
    if cfg.task == "path":
        nodes = [SYMBOL["0123456789ab"[int(x)]] for x in re.findall(r"\d+", f"{source}-{target}")]
        edges = list(zip(nodes[::2], nodes[1::2]))  # ten edges, (start, goal), then the five of the route
        start, goal = ((node, PAD) for node in edges[10])
        route = [(u, PAD) for u, _ in edges[11:]] + [goal] * bool(target)
        return edges[:11], route, [start, None, None, None, None, goal]
    if family(cfg.task) == "sat":
        clauses = [tuple(SYMBOL[c] for c in clause.split(",")) for clause in source.split("/")]
        return clauses, [(SYMBOL[c], PAD, PAD) for c in target.replace(",", "")], [None] * int(cfg.task[3])
    question, answer = ([(SYMBOL.get(w) if w in "+-*/" else VOCAB + int(w),) for w in re.findall(r"\d+|[-+*/]", text)]
                        for text in (source, target))
    return question, answer, [None] * (4 * len(question) - 9) + [question[-1]]


def to_text(ids, cfg):
    """The answer that stands in ids (list of ints, up to [EOS]) as a string; "?" is a symbol without a character."""
    ids = ids[: ids.index(EOS) if EOS in ids else None]
    words = ["?" if i < 5 else CHARS[i - 5] if i < VOCAB else str(i - VOCAB) for i in ids]
    if cfg.task == "sudoku" or cfg.format == "chars":
        return "".join(words)
    if cfg.task == "path":
        nodes = ["0123456789ab".find(c) for c in words]
        return "/".join(f"{u},{v}" for u, v in zip(nodes, nodes[1:]))
    if family(cfg.task) == "sat":
        return ",".join(words)
    return ",".join("".join(words[i : i + 3] + ["="] + words[i + 3 : i + 4]) for i in range(0, len(words), 4))


def canvas_length(cfg):
    """L; for question [SEP] answer in characters the official cutoff_len."""
    if cfg.task == "sudoku" or cfg.format == "chars":
        return 81 if cfg.canvas == "inplace" else CUTOFF[cfg.task]
    question, answer = SLOTS[cfg.task]
    return len(question) + answer + (0 if cfg.canvas == "inplace" else 2)


def features(cfg):
    """F, symbols per position: an edge has two, a clause three."""
    return 1 if cfg.format == "chars" else dict(path=2, sat=3).get(family(cfg.task), 1)


def backwards(cfg, arm):
    """Does the arm write its text from the goal back? (In place it is the order of the positions that turns.)"""
    return arm == "ar_rev" and cfg.canvas == "source"


def encode(problems, cfg, arm):
    """Canvases with the answers filled in, ids (N, L, F), and which positions are to be generated (N, L).

    inplace: the answer, with what the question shows of it in view, behind the question (a board is its own).
    source:  source [SEP] target [EOS] [PAD]... (paper): who writes all at once writes the padding, so the length."""
    ids, target, L, blank = [], [], canvas_length(cfg), (PAD,) * features(cfg)
    for source, text in problems:
        question, answer, given = to_symbols(source, reverse_path(text) if backwards(cfg, arm) else text, cfg)
        if cfg.canvas == "inplace":
            question = [] if cfg.task == "sudoku" else question
            answer = [g or a for g, a in zip_longest(given, answer, fillvalue=blank)]
            mask = [False] * len(question) + [g is None for g in given]
        else:
            question, answer = question + [(SEP, *blank[1:])], answer + [(EOS, *blank[1:])]
            mask = [False] * len(question) + [True] * len(answer)
        pad = L - len(mask)
        ids.append(question + answer + [blank] * pad)
        target.append(mask + [not arm.startswith("ar")] * pad)
    return torch.tensor(ids), torch.tensor(target)


def in_order(ids, target, cfg, arm):
    """Canvases in the order in which an arm reads and writes them, and the place of each position, at (N, L).

    In place a causal arm reads all that is given, then writes the gaps from left to right (ar_rev: from right to left);
    so it is asked for the same positions as mdm, and its sequence is as long."""
    place = torch.arange(ids.shape[1], device=ids.device)
    at = place.expand_as(target)
    if arm != "mdm" and cfg.canvas == "inplace":
        at = torch.where(target, 2 * len(place) + (-place if arm == "ar_rev" else place), place).argsort(1)
    return ids.gather(1, at[..., None].expand_as(ids)), target.gather(1, at), at


def coordinates(cfg):
    """What the network is told about places: entries (L, P) of a table of C rows, to be summed; returns both."""
    L = canvas_length(cfg)
    if cfg.positions == "learned":
        return torch.arange(L)[:, None], 512
    if cfg.task == "sudoku":  # 0-26 row, column and box, 27 none, 28-30 question, answer, separator
        cells, mark = torch.tensor(np.stack([ROW, 9 + COL, 18 + BOX], 1)), torch.tensor([[27, 27, 27, 30]])
        answer = F.pad(cells, (0, 1), value=29)  # (81, 4)
        return answer if L == 81 else torch.cat([F.pad(cells, (0, 1), value=28), mark, answer, mark]), 31
    # the kinds of the question, then one kind for each place of the answer, and the separator
    question, length = SLOTS[cfg.task]
    begin, last = max(question) + 1, max(question) + 1 + length
    mark = [last] * (L > len(question) + length)
    return torch.tensor([*question, *mark, *range(begin, last), *mark])[:, None], last + 1


def augment_sudoku(ids, target, generator):
    """Every board under a random symmetry: digits, bands, rows in a band, the same for columns, transpose.

    ids (B, L, 1), target (B, L), L = 81 in place, 164 for question and answer."""
    B, L, device = *target.shape, ids.device

    def shuffles(*shape):  # random permutations along the last axis
        return torch.rand(B, *shape, generator=generator, device=device).argsort(-1)

    rows, columns = ((3 * shuffles(3)[:, :, None] + shuffles(3, 3)).view(B, 9) for _ in range(2))
    cells = 9 * rows[:, :, None] + columns[:, None, :]  # (B, 9, 9) where each new cell comes from
    cells = torch.where(shuffles(2)[:, :1, None] > 0, cells.mT, cells).reshape(B, 81)
    source = torch.arange(L, device=device).repeat(B, 1)  # (B, L)
    for begin in (0, 82)[: L // 81]:
        source[:, begin : begin + 81] = begin + cells
    names = torch.arange(VOCAB, device=device).repeat(B, 1)  # (B, V) what each symbol is called now
    names[:, SYMBOL["1"] : SYMBOL["9"] + 1] = SYMBOL["1"] + shuffles(9)
    return names.gather(1, ids[..., 0].gather(1, source))[..., None], target.gather(1, source)


# ---------------------------------------------------------------- 3. Model (GPT-2; official code)
class Block(nn.Module):
    """Pre-norm attention and MLP; act is GPT-2's tanh GELU, for nano ReLU (it saves a fifth of a CPU's step)."""

    def __init__(self, d, n_head, dropout, causal, act):
        super().__init__()
        self.n_head, self.causal, self.act, self.dropout = n_head, causal, act, nn.Dropout(dropout)
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.attn_out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp_in, self.mlp_out = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x, cache=None, start=0):
        B, L, d = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(B, L, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, L, d / H)
        if cache is not None:  # (2, B, H, L_max, d / H), filled up to start
            cache[:, :, :, start : start + L] = torch.stack([k, v])
            k, v = cache[:, :, :, : start + L]
        drop, causal = self.dropout.p if self.training else 0.0, self.causal and L > 1
        a = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=drop)  # (B, H, L, d / H)
        x = x + self.dropout(self.attn_out(a.transpose(1, 2).reshape(B, L, d)))
        return x + self.dropout(self.mlp_out(self.act(self.mlp_in(self.ln_2(x)))))


class GPT(nn.Module):
    """GPT-2 over canvases. It is never told the noise level t, so one network decodes in any number of calls.

    shift: the prediction for position i is read at i-1, always in a causal network and in the official mdm."""

    def __init__(self, cfg, places, n_places, vocab, features, causal):
        super().__init__()
        d, nano, self.vocab, self.n_places = cfg.n_embd, cfg.size == "nano", vocab, n_places
        self.told_next = causal and cfg.canvas == "inplace"  # in place the next position differs from row to row
        self.shift, self.dropout, self.n_head = causal or cfg.shift, nn.Dropout(cfg.dropout), cfg.n_head
        self.wte, self.wpe = nn.Embedding(vocab * features, d), nn.Embedding(n_places * (1 + self.told_next), d)
        act = nn.ReLU() if nano else nn.GELU(approximate="tanh")
        self.blocks = nn.ModuleList(Block(d, cfg.n_head, cfg.dropout, causal, act) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(d)
        self.register_buffer("places", places, persistent=False)  # (L, P)
        self.register_buffer("offsets", vocab * torch.arange(features), persistent=False)  # (F,)
        # GPT-2's N(0, 0.02) suits a width of 768; at 96 the network never leaves the plateau of uniform guesses.
        embedding_std, linear_std = (0.5, 0.06) if nano else (0.02, 0.02)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = embedding_std if name in ("wte.weight", "wpe.weight") else linear_std
                nn.init.normal_(p, 0, std / math.sqrt(2 * cfg.n_layer) if "_out" in name else std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if vocab > VOCAB:  # our choice: a number starts as a point on each of ten circles, which makes a sum a turn
            angle = torch.arange(vocab - VOCAB)[:, None] / torch.tensor([2, 5, 10, 20, 50, 100, 200, 400, 1000, 2000])
            circles = torch.cat([(2 * math.pi * angle).sin(), (2 * math.pi * angle).cos()], 1)  # (NUMBERS, 20)
            points = circles @ nn.init.orthogonal_(torch.empty(20, d)) * math.sqrt(d / 10)  # (NUMBERS, d), std 1
            self.wte.weight.data[VOCAB:].mul_(0.1).add_(embedding_std * points)
        nn.init.constant_(self.ln_f.weight, 0.02 / embedding_std)  # tied head: the first loss must be ln V

    def forward(self, ids, at, select=None, cache=None, start=0):
        """ids (B, L, F) at places at (B, L) to logits (B, L, V) that predict each position, or only those selected
        (B, L) as (R, V).

        cache (n_layer, 2, B, H, L_max, d / H): ids continue at position start of at, logits (B, V) of the next one."""
        places = self.places[at]  # (B, L, P)
        if self.told_next:
            places = torch.cat([places, self.n_places + places.roll(-1, 1)], 2)  # (B, L, 2 P)
        x = self.wte(ids + self.offsets).sum(2)  # (B, L, d)
        x = self.dropout(x + self.wpe(places[:, start : start + ids.shape[1]]).sum(2))
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], start)
        if cache is not None:
            x = x[:, -1]  # (B, d)
        elif self.shift:
            x = torch.cat([x[:, :1], x[:, :-1]], 1)  # position 0 reads itself; it is never asked for
        x = x if select is None else x[select]  # (R, d)
        return F.linear(self.ln_f(x), self.wte.weight[: self.vocab])


def build(cfg, arm):
    return GPT(cfg, *coordinates(cfg), vocabulary(cfg), features(cfg), causal=arm != "mdm")


# ---------------------------------------------------------------- 4. Method (from the official code) and the baselines
def q_sample(ids, target, t, T, generator=None):
    """Forward process: at noise level t (B,) in 0..T-1 each target position becomes [MASK] with probability (t+1)/T.

    ids (B, L, F), target (B, L) bool; returns the noisy ids and the mask (B, L). (official code)"""
    assert ids.shape[:2] == target.shape and t.shape == ids.shape[:1]
    coin = torch.rand(target.shape, generator=generator, device=ids.device)
    masked = (coin < ((t + 1) / T)[:, None]) & target
    noisy = ids.clone()
    noisy[..., 0].masked_fill_(masked, MASK)
    return noisy, masked


def sequence_weight(t, T, kind):
    """w(t): "original" is the ELBO's 1/(t+1) (D3PM, MDLM), "linear" the paper's T-t, "none" is 1. (official code)"""
    return {"original": 1 / (t + 1), "linear": (T - t).float(), "none": torch.ones_like(t, dtype=torch.float)}[kind]


def token_weight(u, alpha, beta):
    """v(u) = alpha (1 - p)^beta with p = exp(-u): hard tokens count more. Not detached. (official code)

    alpha only matters through gradient clipping and Adam's eps; it is kept for fidelity."""
    return alpha * (-torch.expm1(-u)) ** beta


def focal_loss(logits, answer, weight, alpha, beta):
    """sum over rows of w v(u) u with u = -log p(answer): logits (R, V), answer (R,), weight w (R,). (official code)"""
    assert logits.ndim == 2 and answer.shape == weight.shape == logits.shape[:1]
    u = F.cross_entropy(logits.float(), answer, reduction="none")  # (R,)
    return (weight * token_weight(u, alpha, beta) * u).sum()


def corrupt(ids, target, arm, cfg, generator):
    """What an arm reads (B, L, F), the positions it is asked for (B, L), the weight of each canvas (B,).

    mdm reads a noisy answer. ar reads the true one: attention is causal and logits are shifted, so position i is
    predicted from those before it. teacherless (Bachmann & Nagarajan 2024) reads no answer at all."""
    t = torch.randint(cfg.T, ids.shape[:1], generator=generator, device=ids.device)
    if arm == "mdm":
        return *q_sample(ids, target, t, cfg.T, generator), sequence_weight(t, cfg.T, cfg.sequence_weight)
    noisy = q_sample(ids, target, t, 1)[0] if arm == "teacherless" else ids  # T = 1 masks everything
    return noisy, target, torch.ones_like(t, dtype=torch.float)


def remaining(n, step, steps):
    """How many of n positions (B,) are still masked after call number `step` of `steps`: floor(n t / T)."""
    return torch.div(n * (steps - step), steps, rounding_mode="floor")


def choose(score, eligible, remain):
    """Easy-first: of the eligible positions (B, L) the `remain` (B,) with the lowest score (B, L) stay masked.

    Among equal scores the leftmost is revealed first, hence the sort from right to left."""
    score = score.masked_fill(~eligible, math.inf).flip(1)
    rank = score.argsort(dim=1, stable=True).argsort(1).flip(1)  # (B, L)
    return eligible & (rank < remain[:, None])


def position_scores(logits, order="confidence", generator=None, kernels=False):
    """Candidate, its log-probability and the order's score: logits (B, L, V) to three (B, L).

    confidence: max p (paper, LLaDA); margin: p1 - p2 (Kim et al. 2025); random; l2r: left to right."""
    B, L, V = logits.shape
    if kernels:
        rows = load_kernel("decode_scores")(logits.reshape(B * L, V), forbidden=(SEP, MASK, UNK))
        token, logp, margin = (x.view(B, L) for x in rows[:3])
    else:
        logits = logits.float()
        logits[..., [SEP, MASK, UNK]] = -math.inf  # never part of an answer
        top = logits.log_softmax(-1).topk(2, -1)  # fp32: ties of saturated scores would unmask too much
        token, logp = top.indices[..., 0], top.values[..., 0]
        margin = logp.exp() - top.values[..., 1].exp()
    if order == "random":
        return token, logp, torch.rand(B, L, generator=generator, device=logits.device)
    if order == "l2r":
        return token, logp, -torch.arange(L, device=logits.device).expand(B, L).float()
    return token, logp, margin if order == "margin" else logp


@torch.no_grad()
def decode(model, ids, target, at, steps=20, order="confidence", commit="freeze", threshold=0.0, **options):
    """Reverse process: from all target positions masked to none, in `steps` network calls (0: one position a call).

    ids (B, L, F), target and at (B, L); returns the answers (B, L, F) and the call (B, L) that last changed a position.
    A call scores the positions, chooses which stay masked and commits the others. "freeze" keeps what is committed;
    "revise" (official code) lets every call change any position of the answer, or mask it again. (official code)"""
    x, masked, n = ids.clone(), target.clone(), target.sum(1)
    symbol, call = x[..., 0], torch.zeros_like(target, dtype=torch.long)  # symbol is a view: writing it writes x
    symbol.masked_fill_(target, MASK)
    for step in range(1, (steps or int(n.max())) + 1):
        live = masked.any(1).nonzero()[:, 0]  # (b,) canvases with gaps left
        if not len(live):
            break
        token, logp, score = position_scores(model(x[live], at[live]), order, **options)  # (b, L) each
        eligible = masked[live] if commit == "freeze" else target[live]
        remain = remaining(n[live], step, steps or n[live])
        stay = choose(score, eligible, torch.minimum(remain, masked[live].sum(1) - 1))  # at least one is revealed
        if threshold:
            stay &= logp.exp() <= threshold
        fixed = eligible & ~stay
        call[live] = call[live].masked_fill(fixed & (token != symbol[live]), step)
        symbol[live] = torch.where(fixed, token, symbol[live]).masked_fill(stay, MASK)
        masked[live] = stay  # (B, L) still masked after this call
    return x, call


@torch.no_grad()
def decode_left_to_right(model, ids, target, at):
    """Baseline: greedy decoding with a KV cache. ids (B, L, F), target and at (B, L); all from the first target on is
    written. Rows whose question is longer than the shortest one read on while the others write."""
    B, L, _ = ids.shape
    writes = torch.arange(L, device=ids.device) >= target.int().argmax(1)[:, None]  # (B, L)
    x, prompt = ids.masked_fill(writes[..., None], PAD), int(target.int().argmax(1).min())
    shape = len(model.blocks), 2, B, model.n_head, L, model.wte.embedding_dim // model.n_head
    cache, done = torch.zeros(shape, device=ids.device), torch.zeros_like(writes[:, 0])
    logits = model(x[:, :prompt], at, cache=cache)  # (B, V)
    for i in range(prompt, L):
        logits[:, [PAD, SEP, MASK, UNK]] = -math.inf
        x[:, i, 0] = torch.where(writes[:, i], logits.argmax(1).masked_fill(done, PAD), x[:, i, 0])
        done |= x[:, i, 0] == EOS
        if done.all():
            break
        logits = model(x[:, i : i + 1], at, cache=cache, start=i)
    return x


# ---------------------------------------------------------------- 5. Evaluation and claims
def follow(source, text):
    """Of each equation of an answer to a countdown whether it is true, and the numbers at hand after it.

    An equation that is false, or takes a number that is not at hand, leaves none."""
    *hand, _ = map(int, source.split(","))
    true, hands = [], []
    for line in text.split(","):
        match = re.fullmatch(r"(\d{1,6})([-+*/])(\d{1,6})=(\d{1,6})", line, re.ASCII)
        a, b, c = (int(match[i]) for i in (1, 3, 4)) if match else (0, 0, -1)
        sums = {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b > 0 and a == b * c}
        true.append(bool(match) and sums[match[2]])
        fits = true[-1] and hand.count(a) > (a == b) and b in hand
        hand = hand.copy() if fits else []
        if fits:
            hand.remove(a)
            hand.remove(b)
            hand.append(c)
        hands.append(hand)
    return true, hands


def grade(task, source, target, text):
    """(strict, official) for strings: right by the rules of the problem, and right for the authors' script.

    Theirs asks for the label, for a path also read backwards; a countdown needs true equations of which the last
    gives the target, whatever numbers they use."""
    if task == "sudoku":
        kept = all(given in ("0", cell) for given, cell in zip(source, text))
        whole = re.fullmatch("[1-9]{81}", text) and all(len({text[c] for c in np.flatnonzero(u)}) == 9 for u in UNITS)
        return bool(kept and whole), text == target
    if task == "path":
        edges, ends = source.split("-")
        walk = [edge.split(",") for edge in text.split("/")]
        linked = all(a[-1] == b[0] for a, b in zip(walk, walk[1:]))
        known = set(text.split("/")) <= set(edges.split("/"))
        return linked and known and ends == f"{walk[0][0]},{walk[-1][-1]}", text in (target, reverse_path(target))
    if family(task) == "sat":
        true, false = LITERALS[int(task[3])]
        chosen = text.split(",")
        assigned = len(chosen) == len(true) and all(c in pair for c, *pair in zip(chosen, true, false))
        return assigned and all(set(c.split(",")) & set(chosen) for c in source.split("/")), text == target
    (true, hands), goal = follow(source, text), source.split(",")[-1]
    return all(true) and hands[-1] == [int(goal)], all(true) and text.split("=")[-1] == goal


def count_solutions(source, n):
    """How many assignments of n variables satisfy a formula."""
    truth = np.array(list(product((False, True), repeat=n))).T  # (n, 2^n)
    column = dict(zip("".join(LITERALS[n]), [*truth, *~truth]))
    return int(np.all([np.any([column[c] for c in clause.split(",")], 0) for clause in source.split("/")], 0).sum())


def details(task, problems, texts):
    """Metrics that tell what goes wrong in a class: blank cells filled right (sudoku); the authors' accuracy; the share
    of false equations and of plans lost by then (countdown); what exact match gives a perfect solver (3-SAT)."""
    if task == "sudoku":
        cells = (cell for (s, t), text in zip(problems, texts) for cell in zip(s, t, text.ljust(81)))
        return dict(blanks=float(np.mean([label == cell for given, label, cell in cells if given == "0"] or [True])))
    found = dict(official=float(np.mean([grade(task, s, t, text)[1] for (s, t), text in zip(problems, texts)])))
    if family(task) == "sat":
        found["ceiling"] = float(np.mean([1 / count_solutions(s, int(task[3])) for s, _ in problems]))
    elif family(task) == "cd":
        found |= equation_errors(int(task[2]), problems, texts)
    return found


def equation_errors(k, problems, texts):
    """Per equation the share that is false (calculation), and the share of answers from whose numbers the target can
    no longer be made after it (planning)."""
    goals, found = np.array([int(source.split(",")[-1]) for source, _ in problems]), {}
    answers = [follow(source, text) for (source, _), text in zip(problems, texts)]
    for i in range(1, k):
        hands = [hands[i - 1] if i <= len(hands) else [] for _, hands in answers]
        planned = np.array([len(hand) == k - i for hand in hands])  # (N,)
        left = np.array([hand for hand, kept in zip(hands, planned) if kept], int).reshape(-1, k - i)
        planned[planned] = first_solutions(left, goals[planned])[0]
        found[f"equation {i} false"] = float(np.mean([i > len(true) or not true[i - 1] for true, _ in answers]))
        found[f"plan lost by {i}"] = float(1 - planned.mean())
    return found


def answer(model, arm, problems, cfg, chunk=250, **changes):
    """Answers of an arm (N strings) and, for mdm, the call that fixed each position of the canvas (N, L).

    The network is shown the questions alone. changes: decoding options other than the flags'."""
    device = model.places.device
    canvases, gaps = (x.to(device) for x in encode([(source, "") for source, _ in problems], cfg, arm))
    ids, target, at = in_order(canvases, gaps, cfg, arm)
    calls, random = torch.zeros_like(at), torch.Generator(device).manual_seed(0)
    options = dict(steps=cfg.decode_steps, order=cfg.order, commit=cfg.commit, threshold=cfg.threshold) | changes
    options |= dict(steps=1) if arm == "teacherless" else {}
    for rows in torch.arange(len(ids), device=device).split(chunk):
        part = ids[rows], target[rows], at[rows]
        if arm.startswith("ar"):
            ids[rows] = decode_left_to_right(model, *part)
        else:
            ids[rows], calls[rows] = decode(model, *part, **options, generator=random, kernels=cfg.kernels)
    ids, calls = (torch.empty_like(x).scatter_(1, at, x) for x in (ids[..., 0], calls))  # back to the canvas
    begin = gaps.int().argmax(1)  # (N,) where the answer begins
    if cfg.canvas == "inplace":
        begin = begin.fill_(0 if cfg.task == "sudoku" else len(SLOTS[cfg.task][0]))
    texts = [to_text(row[b:], cfg) for row, b in zip(ids.tolist(), begin.tolist())]
    return [reverse_path(text) for text in texts] if backwards(cfg, arm) else texts, calls


def accuracy(model, arm, problems, cfg, **changes):
    """Of each problem whether the answer is right (strictly), the answers, the mean number of calls, the seconds."""
    began = time.perf_counter()
    texts, calls = answer(model, arm, problems, cfg, **changes)
    seconds = time.perf_counter() - began
    right = [int(grade(cfg.task, s, t, text)[0]) for (s, t), text in zip(problems, texts)]
    return right, texts, calls.amax(1).float().mean().item(), seconds


# Further rows of the final table: mdm under other orders and numbers of calls, on half of the test problems.
SWEEP = {"margin": dict(order="margin"), "random": dict(order="random"), "left to right": dict(order="l2r")}
SWEEP |= {"revise": dict(commit="revise"), "1 call": dict(steps=1), "2 calls": dict(steps=2), "5 calls": dict(steps=5)}
SWEEP |= {"10 calls": dict(steps=10), "one a call": dict(steps=0), "all p > 0.9": dict(steps=0, threshold=0.9)}


def evaluate(model, arm, test, cfg):
    """Rows of the final table: metrics, "mdm random/pd5": 0.41, and per row and class 1 or 0 for each test problem."""
    model.eval()
    metrics, correct = {}, {}
    for name, changes in ({"": {}} | (SWEEP if arm == "mdm" else {})).items():
        row, calls, seconds = f"{arm} {name}".strip(), [], []
        for group, problems in test.items():
            problems = problems[: -(-len(problems) // 2)] if name else problems
            correct[f"{row}/{group}"], texts, *used = accuracy(model, arm, problems, cfg, **changes)
            metrics[f"{row}/{group}"] = float(np.mean(correct[f"{row}/{group}"]))
            metrics |= {f"{row}/{group} {k}": v for k, v in details(cfg.task, problems, texts).items() if not name}
            calls.append(used[0])
            seconds.append(used[1] / len(problems))
        metrics |= {f"{row}/calls": float(np.mean(calls))} if arm == "mdm" else {}
        metrics[f"{row}/answers_per_s"] = 1 / float(np.mean(seconds))
        correct[f"{row}/worst"] = min((correct[f"{row}/{group}"] for group in test), key=np.mean)
    return metrics, correct


def decoding_claims(group):
    return [
        ("easy-first-beats-random", f"mdm/{group} - mdm random/{group}", 0.0, "a random order is as good"),
        ("calls-buy-accuracy", f"mdm/{group} - mdm 1 call/{group}", 0.0, "one parallel call is as good"),
    ]


# Fixed before the first evidence run, from the paper's claims: id, statistic, threshold, what would refute it.
# "a - b" is the gap in exact answers on the same test problems, "a" an accuracy ("worst": of the worst class, so it is
# a little low); their intervals cover the test problems, not the seeds. "examples a / b" compares the training examples
# after which every class of the validation set is first 90 % right; its interval is the spacing of the learning
# curve's points, without sampling error.
CLAIMS = dict(
    sudoku=[
        ("mdm-beats-ar-easy", "mdm/easy - ar/easy", 0.2, "AR within 20 points on the paper's class (paper: 79)"),
        ("mdm-beats-ar-medium", "mdm/medium - ar/medium", 0.2, "AR within 20 points where hidden singles are needed"),
        *decoding_claims("medium"),
    ],
    path=[
        ("mdm-at-every-distance", "mdm/worst", 0.95, "MDM below 95 % at some planning distance"),
        ("mdm-beats-ar-far", "mdm/pd5 - ar/pd5", 0.1, "AR within 10 points at the longest distance (paper: 50)"),
        ("mdm-needs-fewer-examples", "examples ar / mdm", 1.0, "AR reaches 90 % everywhere as early as MDM"),
    ],
    cd=[
        ("mdm-beats-ar", "mdm/new - ar/new", 0.0, "AR as good (paper: 99.5 to 95.9 on cd3, 91.5 to 45.8 on cd4)"),
        *decoding_claims("new"),
    ],
    sat=[
        ("mdm-beats-ar", "mdm/formulas - ar/formulas", 0.0, "AR satisfies as many (paper: the gap grows with n)"),
        *decoding_claims("formulas"),
    ],
)


def mean_interval(x):
    """Mean of paired gaps or hits (n,) and its 95 % interval, with one pseudo-pair won and one lost.

    A little wider than that of Agresti and Min (2005), and not empty where all pairs are equal."""
    spread = 1.96 * np.append(x, [1, -1]).std(ddof=1) / math.sqrt(len(x) + 2)
    return np.mean(x), (np.mean(x) - spread, np.mean(x) + spread)


def examples_needed(curve, bar=0.9):
    """Examples seen at the last point before every class first reaches the bar, and at that point (inf: never)."""
    for before, point in zip([curve[0], *curve], curve):
        if min(point["exact"].values()) >= bar:
            return before["examples"], point["examples"]
    return curve[-1]["examples"], math.inf


def statistics(task, done):
    """Claim id to (statistic, interval), where the arms it needs were run. done: arm to its result."""
    correct = {key: hits for arm in done.values() for key, hits in arm["correct"].items()}
    found = {}
    for name, formula, *_ in CLAIMS[family(task)]:
        rows = [correct.get(row) for row in formula.split(" - ")]
        if formula == "examples ar / mdm" and {"ar", "mdm"} <= set(done):
            (ar_before, ar), (mdm_before, mdm) = (examples_needed(done[arm]["curve"]) for arm in ("ar", "mdm"))
            high = min(ar / max(mdm_before, 1), 1e6)  # 1e6: ar never got there, so there is no upper end
            found[name] = (ar_before if ar == math.inf else ar) / mdm, (ar_before / mdm, high)
        elif None not in rows:
            n = min(map(len, rows))  # a row of the sweep has the first half of the problems
            found[name] = mean_interval(np.array(rows[0][:n]) - np.array(rows[1][:n] if rows[1:] else 0))
    return found


# ---------------------------------------------------------------- 6. Training
def batch_rows(step, size, n, seed):
    """Which of n problems make batch `step`: every epoch is a new permutation, computed from (seed, epoch) alone."""
    first, last = step * size // n, (step * size + size - 1) // n  # epochs that the batch touches
    seeds = (torch.Generator().manual_seed(1_000_003 * seed + epoch) for epoch in range(first, last + 1))
    return torch.cat([torch.randperm(n, generator=generator) for generator in seeds])[step * size - first * n :][:size]


def make_batch(cfg, run, arm, data, step):
    """This rank's share of batch `step`; everything random in it is drawn from (seed, step), so resume is exact."""
    generator = torch.Generator(run.device).manual_seed(1_000_003 * cfg.seed + step)
    rows = batch_rows(step, cfg.batch_size, len(data[0]), cfg.seed).to(run.device)
    ids, target = data[0][rows], data[1][rows]
    if cfg.augment and cfg.task == "sudoku":
        ids, target = augment_sudoku(ids, target, generator)
    ids, target, at = in_order(ids, target, cfg, arm)
    noisy, asked, weight = corrupt(ids, target, arm, cfg, generator)
    batch = dict(noisy=noisy, asked=asked, at=at, answer=ids[..., 0], weight=weight)
    return {name: x[run.rank :: run.world] for name, x in batch.items()}


def make_loss(cfg, run, arm):
    """loss(net, part) -> summed loss and number of asked positions. The baselines take plain cross-entropy."""
    alpha, beta = (cfg.alpha, cfg.beta) if arm == "mdm" and cfg.token_reweighting else (1.0, 0.0)
    focal = load_kernel("masked_focal_ce") if cfg.kernels else focal_loss

    def loss(net, part):
        asked = part["asked"]  # (b, L)
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
            logits = net(part["noisy"], part["at"], asked)  # (R, V)
        weight = part["weight"][:, None].expand_as(asked)[asked]  # (R,)
        return focal(logits, part["answer"][asked], weight, alpha, beta), asked.sum()

    return loss


def prepare(cfg, run, arm, problems):
    """Data, network and optimizer of an arm; every arm starts from the same seed."""
    torch.manual_seed(cfg.seed)
    data = [x.to(run.device) for x in encode(problems, cfg, arm)]
    model = build(cfg, arm).to(run.device)
    groups = param_groups(model, cfg.weight_decay)
    return data, model, torch.optim.AdamW(groups, cfg.lr, (0.9, cfg.beta2), fused=True)


def train(cfg, run, arm, problems, val, state):
    """Train one arm; returns its network and learning curve. state: what load_state gave, {} for a new run."""
    data, model, optimizer = prepare(cfg, run, arm, problems)
    step, curve, spent = 0, [], 0.0
    if state.get("arm") == arm:
        step, curve, spent = state["step"], state["curve"], state["seconds"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    if cfg.compile:
        for block in model.blocks:
            block.compile()
    net = DistributedDataParallel(model) if run.world > 1 else model
    loss_sum, log, began = make_loss(cfg, run, arm), Log(run, arm, cfg.steps, step), time.perf_counter() - spent
    while True:
        if (step % cfg.eval_every == 0 or step == cfg.steps) and (not curve or curve[-1]["step"] < step):
            model.eval()
            exact = {name: float(np.mean(accuracy(model, arm, p, cfg)[0])) for name, p in val.items()}
            curve.append(dict(step=step, examples=step * cfg.batch_size, exact=exact))
            log(always=True, **curve[-1])
        stop = should_stop(run)
        if stop or step == cfg.steps or (step % cfg.save_every == 0 and step):
            parts = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), done=state.get("done", {}))
            save_state(run, arm=arm, step=step, curve=curve, seconds=time.perf_counter() - began, **parts)
        if stop:
            stopped(run)
        if step == cfg.steps:
            return model, curve
        lr = lr_at(step, cfg.lr, 0.0, cfg.warmup_steps, cfg.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        torch.manual_seed((1_000_003 * cfg.seed + step) * run.world + run.rank)  # dropout, different on each rank
        loss = accumulate(net, make_batch(cfg, run, arm, data, step), cfg.micro_batch or cfg.batch_size, loss_sum)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % cfg.log_every == 0:
            rate = step * cfg.batch_size / (time.perf_counter() - began)
            eta = (cfg.steps - step) * cfg.batch_size / rate / 60
            log(step, loss=loss.item(), gnorm=norm.item(), lr=lr, per_s=rate, eta_min=eta)


# ---------------------------------------------------------------- 7. Plumbing (shared blocks, then this file's own)
# --- block: cli ---
def fail(text):
    """A user's mistake: one line, exit code 2."""
    print("error:", " ".join(str(text).split()), file=sys.stderr)
    raise SystemExit(2)


def cli(config, scales, argv=None):
    """argv to config: a field's trailing comment is its help (a|b: ... are choices), --scale picks overrides."""
    notes = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", inspect.getsource(config), re.M))
    style = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    for f in fields(config):
        options = re.match(r"[\w-]+(\|[\w-]+)+(?=:)", notes[f.name])
        kind = dict(type=type(f.default), choices=options and options[0].split("|"))
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(f.default, bool) else kind
        text = f"{notes[f.name]} [{f.default}]".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **kind)
    parser.error = lambda message: fail(f"{message} (-h lists every flag)")
    given = vars(parser.parse_args(argv))
    scale, task = given.get("scale", config.scale), given.get("task", config.task)
    return config(**{**scales[scale], **scales.get(f"{scale}:{task}", {}), **given})


def from_shell(main):
    """main(); what the system refuses (a full disk), JSON nested too deep, and damaged files are one line as well."""
    try:
        main()
    except (OSError, RecursionError) as error:
        fail(f"{error}; mend that, and if a run was under way go on with --resume")
    except SafetensorError as error:
        fail(f"a file of the run is damaged ({error}): remove its directory and start again")
# --- end block ---


# --- block: run ---
def start_run(cfg, script):
    """Device, dtype, threads, rank and output directory; Ctrl-C sets .stop, a second Ctrl-C kills."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    rank, world, local = (int(os.environ.get(k, d)) for k, d in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "010"))
    kind = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if kind == "cuda" else "float32"
    if not dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available()).get(kind, True):
        fail(f"--device {kind}: this machine has none; --device auto takes what there is")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    tag = f"-{cfg.tag}" * (cfg.tag != "main")
    out = Path(cfg.out or f"out/{script}/{cfg.task}-{cfg.scale}{tag}-s{cfg.seed}")
    if (out / "result.json").exists():
        fail(f"{out} holds a finished run: choose another --out or --seed, or remove it")
    if (out / "state.pt").exists() and not cfg.resume:
        fail(f"{out} holds an interrupted run: continue it with --resume, or remove it")
    settings, saved = {k: v for k, v in asdict(cfg).items() if k not in ("resume", "out")}, out / "config.json"
    try:
        before = dict(json.loads(saved.read_text())) if cfg.resume and saved.exists() else settings
    except (ValueError, TypeError):
        fail(f"{saved} is damaged: remove {out} and start again")
    if before != settings:
        changed = [k for k in settings if before.get(k) != settings[k]]
        fail(f"--resume needs the flags of the interrupted run, different are: {', '.join(changed)}")
    if not rank:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(saved, json.dumps(settings, indent=1).encode())
    device = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)  # fully_shard takes the current device of a process
    run = SimpleNamespace(device=device, dtype=getattr(torch, dtype), rank=rank, world=world, out=out, stop=False)
    signal.signal(signal.SIGINT, lambda *_: setattr(run, "stop", True) or signal.signal(signal.SIGINT, signal.SIG_DFL))
    return run


def should_stop(run):
    """Was Ctrl-C pressed, on any rank?"""
    flag = torch.tensor(int(run.stop), device=run.device)
    if run.world > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
# --- end block ---


# --- block: log ---
class Log:
    """Progress: a bar on a terminal, else a line every five seconds; every record also goes to out/log.jsonl."""

    def __init__(self, run, name, total, done=0):
        self.run, self.name, self.total, self.shown = run, name, total, 0.0
        self.bar = tqdm(total=total, initial=done, desc=name, disable=run.rank > 0 or not sys.stderr.isatty())

    def __call__(self, step, always=False, **numbers):
        if math.isnan(numbers.get("gnorm", 0.0)):
            fail(f"{self.name} step {step}: the gradient is not a number; take a smaller learning rate")
        if self.run.rank:
            return
        with open(self.run.out / "log.jsonl", "a") as file:
            file.write(json.dumps(dict(name=self.name, step=step, **numbers)) + "\n")
        groups = [v if isinstance(v, dict) else {k: v} for k, v in numbers.items()]
        text = " | ".join(f"{k} {v:.4g}" for group in groups for k, v in group.items())
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(text)
        if self.bar.disable and (always or time.monotonic() - self.shown > 5):
            self.shown = time.monotonic()
            print(f"{self.name} step {step}/{self.total} | {text}", flush=True)
# --- end block ---


# --- block: result ---
def verdict(statistic, ci, threshold):
    """Where the whole interval lies on one side of the threshold the claim HOLDS or DOES NOT HOLD."""
    assert ci[0] <= statistic <= ci[1], "the interval must contain the statistic"
    return "HOLDS" if ci[0] > threshold else "DOES NOT HOLD" if ci[1] < threshold else "INCONCLUSIVE"


def method_hash(cfg):
    """Hash of the settings and of the syntax tree of sections 2-6 without docstrings: a change makes evidence stale."""
    parts = re.split(r"^# -{10,} [27]\. .*", Path(__file__).read_text("utf-8"), flags=re.M)
    tree = ast.parse(parts[1])
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    settings = asdict(cfg) | dict(resume=False)  # a resumed run gives the same bits
    return hashlib.sha256((ast.dump(tree) + json.dumps(settings)).encode()).hexdigest()[:12]


def report(cfg, run, script, argv, found, claims, **record):
    """CLAIM lines for what was found, {id: (statistic, ci)}, then the RESULT line, which is also result.json."""
    rows = []
    for name, formula, threshold, _ in (claim for claim in claims if claim[0] in found and cfg.scale != "smoke"):
        statistic, ci = float(found[name][0]), [float(x) for x in found[name][1]]
        outcome = verdict(statistic, ci, threshold)
        rows.append(dict(id=name, statistic=statistic, ci=ci, threshold=threshold, verdict=outcome))
        print(f"CLAIM {name} {outcome}: {formula} = {statistic:.3f} [{ci[0]:.3f}, {ci[1]:.3f}], threshold {threshold}")
    try:
        git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    device = torch.cuda.get_device_name() if run.device.type == "cuda" else f"{run.device.type} {platform.machine()}"
    versions = dict(python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__)
    result = dict(script=script, task=cfg.task, scale=cfg.scale, tag=cfg.tag, seed=cfg.seed, argv=argv, commit=commit)
    result |= dict(method_hash=method_hash(cfg), device=device, threads=torch.get_num_threads(), versions=versions)
    result |= record | dict(claims=rows)
    replace_file(run.out / "result.json", json.dumps(result, indent=1).encode())
    print("RESULT", json.dumps(result))
    return result
# --- end block ---


# --- block: checkpoint ---
def replace_file(path, content):
    """Write bytes so that a kill at any moment leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def flags_of(run):
    """The text of config.json, by which a checkpoint knows its run."""
    return (run.out / "config.json").read_text() if (run.out / "config.json").exists() else ""


def save_state(run, **state):
    """All that a run needs to continue, in one file: its parts, the length of the log. Random numbers are to be drawn
    from (seed, step), so that there is no state of a generator to save."""
    if run.rank:
        return
    log, buffer = run.out / "log.jsonl", io.BytesIO()
    state |= dict(threads=torch.get_num_threads(), torch=str(torch.__version__))
    state |= dict(flags=flags_of(run), log=log.stat().st_size if log.exists() else 0)
    torch.save(state, buffer)
    replace_file(run.out / "state.pt", buffer.getvalue())


def load_state(run):
    """What save_state saved, {} if there is nothing; the log is cut to its length at that time."""
    path = run.out / "state.pt"
    if not path.exists():
        (run.out / "log.jsonl").unlink(missing_ok=True)
        return {}
    try:  # torch.load does not compare the checksums that torch.save writes
        damaged = zipfile.ZipFile(path).testzip()
        state = {} if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged archive raises nearly anything
        state = {}
    if state.get("flags") != flags_of(run):
        fail(f"{path} is damaged, or not of the run of config.json: remove {run.out} and start again")
    if (state["threads"], state["torch"]) != (torch.get_num_threads(), str(torch.__version__)):
        print("note: the number of threads or torch has changed: the result will not be the same to the bit")
    if (run.out / "log.jsonl").exists() and not run.rank:
        os.truncate(run.out / "log.jsonl", state["log"])
    return state


def export(model):
    """A model's weights as safetensors bytes, tied weights once."""
    once = {p.data_ptr(): (name, p.detach().contiguous()) for name, p in reversed(model.state_dict().items())}
    return save(dict(once.values()))
# --- end block ---


# --- block: train_utils ---
def lr_at(step, lr, min_lr, warmup_steps, steps):
    """Linear warm-up, then cosine to min_lr at the last step; never 0 at step 0."""
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * done)) / 2


def param_groups(model, weight_decay):
    """Decay matrices, not biases and norms."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == big] for big in (True, False))
    return [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]


def accumulate(net, batch, micro_batch, loss_sum):
    """Gradient of sum(loss) / sum(count) over the batch of all ranks, however it is split; returns that mean.

    batch: dict of tensors with equal first axis; loss_sum(net, part) -> summed loss, count."""
    size, total, ranks = len(next(iter(batch.values()))), 0.0, dist.get_world_size() if dist.is_initialized() else 1
    for i in range(0, size, micro_batch):
        with net.no_sync() if ranks > 1 and i + micro_batch < size else contextlib.nullcontext():
            loss, count = loss_sum(net, {name: x[i : i + micro_batch] for name, x in batch.items()})
            loss.backward()
        total = total + torch.stack([loss.detach(), count.to(loss.dtype)])
    if ranks > 1:
        dist.all_reduce(total)
    total[1].clamp_(min=1)
    for p in net.parameters():
        p.grad *= ranks / total[1]  # DDP has averaged the sums over the ranks
    return total[0] / total[1]
# --- end block ---


# --- block: kernel ---
@functools.cache
def load_kernel(name):
    """A Triton operation of kernels/; at its first call it compares itself with PyTorch on the real tensors."""
    try:
        return importlib.import_module("kernels").checked(name)
    except ImportError as error:
        fail(f"--kernels: {error}: the folder kernels/ must stand beside this file, and triton be installed")
# --- end block ---


# --- block: stop ---
def stopped(run):
    """After Ctrl-C, when the state is saved: say how to go on, and leave."""
    again = shlex.join([sys.executable, *sys.argv]) + " --resume" * ("--resume" not in sys.argv)
    if not run.rank:
        print("stopped; continue with:", again if run.world == 1 else "the same command and --resume")
    raise SystemExit(130)
# --- end block ---


def cost(cfg, arm):
    """Parameters, canvas length L, training FLOPs per canvas: 6 a weight and position, 12 L d a layer and position."""
    with torch.device("meta"):
        model = build(cfg, arm)
    L, weights = canvas_length(cfg), sum(p.numel() for p in model.blocks.parameters()) + model.vocab * cfg.n_embd
    return sum(p.numel() for p in model.parameters()), L, L * (6 * weights + 12 * cfg.n_layer * cfg.n_embd * L)


def dry_run(cfg):
    """What a run takes, without allocating a network."""
    for arm in cfg.arms.split(","):
        n, L, flops = cost(cfg, arm)
        canvases, rows = cfg.batch_size * cfg.steps, cfg.micro_batch or cfg.batch_size
        memory = (16 * n + rows * L * (68 * cfg.n_layer * cfg.n_embd + 8 * vocabulary(cfg))) / 2**30
        print(f"{arm}: {n:,} parameters, {canvases * L:.2e} tokens, {canvases * flops:.2e} FLOPs, "
              f"{memory:.2f} GiB per device, {canvases * flops / 200e12 / 3600:.2f} hours on one H100")
    print("assumed: AdamW in fp32, 34 bf16 activations of width d per layer and position, 200 TFLOP/s, no evaluation")


def ledger(cfg, run, problems):
    """Say before training what it takes: measured steps, throughput against a matmul's, the first loss."""
    size = 1024 if run.device.type == "cpu" else 8192
    x, total = torch.randn(size, size, device=run.device, dtype=run.dtype), 0.0
    peak = 2 * size**3 / min(timeit.repeat(lambda: (x @ x).sum().item(), number=1, repeat=5))
    for arm in cfg.arms.split(","):
        data, model, _ = prepare(cfg, run, arm, problems[: cfg.batch_size])
        batch, loss = make_batch(cfg, run, arm, data, 0), make_loss(cfg, run, arm)
        part = {name: x[: cfg.micro_batch or None] for name, x in batch.items()}
        seconds = min(timeit.repeat(lambda: loss(model, part)[0].backward(), number=1, repeat=3))
        seconds *= len(batch["answer"]) / len(part["answer"])
        with torch.no_grad():
            logits = model(batch["noisy"], batch["at"], batch["asked"]).float()  # (R, V)
        nll = F.cross_entropy(logits, batch["answer"][batch["asked"]])
        (n, L, flops), rate, total = cost(cfg, arm), cfg.batch_size / seconds, total + seconds * cfg.steps / 60
        print(f"{arm}: {n:,} parameters | {cfg.steps} steps x {1e3 * seconds:.0f} ms | {rate:.0f} problems/s, "
              f"{rate * L:,.0f} tokens/s, {100 * rate * flops / peak:.0f} % of a matmul's {peak / 1e9:.0f} GFLOP/s | "
              f"first nll {nll:.2f}, uniform {math.log(vocabulary(cfg)):.2f}")
    print(f"training will take about {total:.1f} minutes, evaluation not counted"
          + ", more than the 10 minutes of --scale small" * (cfg.scale == "small" and total > 10), flush=True)


def plot_curves(path, done):
    """Learning curves: exact answers on validation problems per class, one panel per arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(done), 3.2), layout="constrained")
    for axes, (arm, result) in zip(figure.subplots(1, len(done), sharey=True, squeeze=False)[0], done.items()):
        for group in result["curve"][0]["exact"]:
            axes.plot(*zip(*((p["examples"], p["exact"][group]) for p in result["curve"])), marker=".", label=group)
        axes.set(title=arm, xlabel="training examples", ylabel="exact answers", ylim=(-0.02, 1.02))
        axes.locator_params(axis="x", nbins=4)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def draw_trace(path, problem, model, cfg):
    """The problem, and beside it the order in which mdm reveals the answer: the small numbers are network calls."""
    from matplotlib.figure import Figure

    (text,), calls = answer(model.eval(), "mdm", [problem], cfg)
    board, question = cfg.task == "sudoku", len(to_symbols(*problem, cfg)[0])
    if board or cfg.format == "chars":
        labels = list(text.ljust(81 * board, "?")) or ["?"]
    elif cfg.task == "path":
        labels = re.findall(r"\d+", text)[::2] + re.findall(r"\d+$", text)  # the six nodes
    else:
        labels = re.findall(r"\d+|[-+*/a-j?]", text) or ["?"]
    begin = question + 1 if cfg.canvas == "source" else 0 if board else question
    calls, width = calls[0, begin : begin + len(labels)].tolist(), 9 if board else len(labels)
    figure = Figure(figsize=(9, 4.6) if board else (9, 1.8), layout="constrained")
    for axes, shown in zip(figure.subplots(1, 2), (problem[0] if board else [], labels)):
        axes.imshow(np.reshape(calls, (-1, width)), cmap="YlGnBu", alpha=0.6 if shown is labels else 0.0)
        for i, label in enumerate(shown):
            axes.text(i % width, i // width, label.replace("0", "") if board else label, ha="center", fontsize=13)
            axes.text(i % width + 0.3, i // width + 0.4, calls[i] if shown is labels else "", ha="center", fontsize=6)
        axes.set(xticks=[2.5, 5.5] if board else [], yticks=[2.5, 5.5] if board else [])
        axes.tick_params(length=0, labelbottom=False, labelleft=False)
        axes.grid(visible=board)
    figure.suptitle("" if board else problem[0])
    figure.savefig(path, dpi=110)


SHAPE = "task format canvas positions size n_layer n_head n_embd shift".split()  # what a saved network fixes


def solve(cfg):
    """Answer the problems of a file, one line each; accuracy goes to standard error."""
    folder, arm = Path(cfg.load), cfg.arms.split(",")[0]
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        saved = json.loads((folder / "config.json").read_text())
        for name in SHAPE:
            setattr(cfg, name, saved[name])
        model = build(cfg, arm).to(device).eval()
        model.load_state_dict(load_file(folder / f"{arm}.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        fail(f"--load {folder}: not a finished run with the arm {arm}: {str(error).splitlines()[0]}")
    problems, began = read_problems(cfg.solve, cfg.task, need_target=False), time.perf_counter()
    texts, _ = answer(model, arm, problems, cfg)
    rate = len(problems) / (time.perf_counter() - began)
    marks = [(grade(cfg.task, s, t, text), bool(t)) for (s, t), text in zip(problems, texts)]
    print("\n".join(texts))
    official = [mark[1] for mark, known in marks if known]
    strict = f"strict {sum(mark[0] for mark, _ in marks)}/{len(marks)}"
    print(f"{strict}, official {sum(official)}/{len(official)} with a target, {rate:.1f} answers/s", file=sys.stderr)
    if cfg.trace and arm == "mdm":
        draw_trace(folder / "trace.png", problems[-1], model, cfg)


# ---------------------------------------------------------------- 8. Main
def print_table(metrics):
    """Rows "arm" and "arm variant", one column per class; then what went wrong in each class."""
    columns = [c for c in dict.fromkeys(key.split("/")[1] for key in metrics) if " " not in c]
    print(f"{'':20}" + "".join(f"{column:>16}" for column in columns))
    for row in dict.fromkeys(key.split("/")[0] for key in metrics):
        cells = (f"{metrics[f'{row}/{column}']:.4g}" if f"{row}/{column}" in metrics else "" for column in columns)
        print(f"{row:20}" + "".join(f"{cell:>16}" for cell in cells))
    print("".join(f"{key}: {value:.4g}\n" for key, value in metrics.items() if " " in key.split("/")[1]), end="")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = cli(Config, SCALES, argv)
    if cfg.dry_run:
        return dry_run(cfg)
    if cfg.kernels and not torch.cuda.is_available():
        fail("--kernels needs a CUDA device; without the flag the same run takes plain PyTorch")
    if cfg.solve:
        return solve(cfg)
    names = dict(data=cfg.data, test_data=cfg.test_data)
    files = {flag: read_problems(name, cfg.task) for flag, name in names.items() if name}  # before anything is written
    run, began = start_run(cfg, "mdm"), time.perf_counter()
    train_set, val, test = load_problems(cfg, files)
    digest = hashlib.sha256(repr((train_set, test)).encode()).hexdigest()
    if not run.rank:
        print(f"{len(train_set)} training problems; test: {', '.join(f'{len(v)} {k}' for k, v in test.items())}")
        ledger(cfg, run, train_set)
    state = load_state(run)
    done, seconds = state.get("done", {}), time.perf_counter() - began
    for arm in cfg.arms.split(","):
        if arm in done:
            continue
        began = time.perf_counter() - (state["seconds"] if state.get("arm") == arm else 0)
        model, curve = train(cfg, run, arm, train_set, val, state)
        metrics, correct = evaluate(model, arm, test, cfg)
        if cfg.task == "path":
            reach = {name: examples_needed([p | dict(exact={name: p["exact"][name]}) for p in curve]) for name in val}
            metrics |= {f"{arm}/examples {name}": at for name, (_, at) in reach.items() if at < math.inf}
        done[arm] = dict(metrics=metrics, correct=correct, curve=curve, seconds=time.perf_counter() - began)
        if run.rank:
            continue
        replace_file(run.out / f"{arm}.safetensors", export(model))
        if cfg.trace and arm == "mdm":
            draw_trace(run.out / "trace.png", list(test.values())[-1][-1], model, cfg)
        state = dict(done=done)
        save_state(run, **state)
    if run.rank:
        return
    plot_curves(run.out / "plot.png", done)
    metrics = {key: value for arm in done.values() for key, value in arm["metrics"].items()}
    print_table(metrics)
    record = dict(tried=TRIED[family(cfg.task)], metrics=metrics, curves={arm: x["curve"] for arm, x in done.items()})
    record |= dict(data_sha256=digest, minutes=(seconds + sum(arm["seconds"] for arm in done.values())) / 60)
    return report(cfg, run, "mdm", argv, statistics(cfg.task, done), CLAIMS[family(cfg.task)], **record)


if __name__ == "__main__":
    from_shell(main)
