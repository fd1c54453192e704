# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "safetensors", "tqdm", "matplotlib"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""batchlaw.py: Scaling Law for Language Models Training Considering Batch Size
Shuai, Wang, Wu, Jiang, Ren, 2024, arXiv 2412.01505

Which batch and learning rate go with N parameters and D tokens? The paper trains models of 125M to 2.6B; others report
of it B_opt = 3240 D^0.264 tokens, and learning rates that grow with the batch. Here the same sweep with small models,
a learning rate and an Adam beta2 of its own for each batch, fits of the laws, and their intervals.

  python batchlaw.py    # a sweep of three sizes, 10 min on one core: at beta2 0.95 B_opt grows as about D^0.6, at the
                        # best beta2 no batch is measurably better than the smallest
  python batchlaw.py --fit "out/batchlaw/zipf-small-s*/runs.jsonl"    # laws of finished runs, or of any table FILE.csv
  python batchlaw.py --recommend --params 1.3e9 --tokens 3e11 --devices 64 --micro-batch 8 --seq-len 2048

Symbols (K models are trained at once: stacked, each with its learning rate and beta2; n sequences of T tokens)
  paper      code           meaning
  N, D       N, D           parameters without embeddings and head; training tokens, each seen once
  B, S, C    B, S           tokens (not sequences) of an optimizer step; steps D / B; FLOPs 6 N D
  L(N, D)    law(p, N, D)   E + A / N^alpha + K / D^beta; p = (log A, log K, log E, alpha, beta)
  L(N,S,B)   law(p, N, S, B)  E + A / N^alpha + K_S / S^sigma + K_B / B^rho: one surface that gives both batch laws
  B_opt      optima         batch of the lowest loss, for N and D
  gamma      gammas         power of B in the best learning rate, below and above B_opt
  B_noise    grad_noise     tr(Sigma) / |G|^2, gradient noise scale (McCandlish et al. 2018)

Differences from the paper, of which the abstract, summaries and citing code were at hand, not the text
  unknown     E, A, alpha and so on, model table, optimizer, corpus: not in this file. Constants that are carry the tag
              of their reading: P primary text, S secondary source, M memory of a well-known paper.
  data        a random bigram language whose best loss is known, or bytes of Python's sources (--task text).
  model       GPT without biases and norm gains, learned positions; AdamW, constant rate after a warm-up counted in
              tokens; losses are those of averaged weights (over the last tenth of the steps), so that one run gives
              the loss at many D; all batches share initial weights, stream and held-out data.
  beta2       arm fixed: 0.95 for every batch; arm tuned: the best of --beta2s for each, from the same sweep.
  optimum     the vertex of a parabola in log lr, then in log B; at the edge of a grid there is none, never a guess.
  fits        Huber on log losses, sum over runs, many starts, by Levenberg-Marquardt in fp64 (Chinchilla's third
              approach as corrected by Epoch); the three-term law is a surrogate for the paper's batch laws.
  left out    critical batch at a target loss of trained models (the quadratic has it), cosine and WSD schedules.

Copy out: law with terms, huber_lm and fit_law, allocate, parabola, grad_noise, steps_examples, quadratic_loss
"""

import argparse
import ast
import contextlib
import copy
import csv
import functools
import glob
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
import sysconfig
import time
import timeit
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


# ---------------------------------------------------------------- 1. Config
@dataclass
class Config:
    task: str = "zipf"  # zipf|text: a random bigram language, or bytes of Python's sources (or --data)
    scale: str = "small"  # smoke|small|long|paper: a row of SCALES below; explicit flags win over it
    tag: str = "main"  # name of this variant in the RESULT record
    seed: int = 0  # language, stream and initial weights
    # sweep: a group of runs is one size and one batch; its learning rates and beta2s are trained at once
    sizes: str = "1x16x1,1x32x1,1x64x2"  # layers x width x heads, or 125M, 350M, 760M, 1.3B, 2.6B (paper: to 2.6B)
    tokens: float = 2.0**18  # D, training tokens (paper: up to 300e9)
    points: int = 5  # the loss is taken at D, D / 2, D / 4, ...
    batches: str = "16,32,64,128,256,512,1024"  # tokens of an optimizer step (paper: up to 32e6)
    lrs: str = "2e-3,4e-3,8e-3,1.6e-2,3.2e-2"  # learning rates at width --lr-width and a batch of --lr-batch tokens
    lr_batch: int = 1024  # other batches have these rates times (B / lr_batch)^lr_power
    lr_power: float = 0.5  # power of B in the rates, so that the same few bracket the best one at every batch
    lr_width: int = 64  # the rates are also times lr_width / width; 0 = the same for all widths
    beta2s: str = "0.95,0.99,0.999"  # AdamW; the first is arm fixed, the best of all is arm tuned
    shard: str = ""  # i/n: train every n-th group from the i-th on, for n machines, and fit later with --fit
    # data and model
    seq_len: int = 16  # T, tokens of a sequence (paper: not known)
    vocab_size: int = 64  # of the zipf language; bytes have 256, --data has 50304
    data: str = ""  # text: file of uint16 token ids, the last tenth is held out; "" = sources of Python, bytes
    n_eval: int = 256  # held-out sequences
    # training
    warmup_tokens: int = 4096  # tokens of linear warm-up, the same for every batch
    weight_decay: float = 0.0  # AdamW, beta1 is 0.9
    grad_clip: float = 0.0  # largest gradient norm of a model; 0 = no limit
    micro_batch: int = 0  # sequences per forward pass of one device; 0 = no split; saves memory, same gradient
    # fit
    fit: str = ""  # comma list or pattern of runs.jsonl files, or a table FILE.csv: fit the laws to it and stop
    columns: str = "N=N,D=D,B=B,lr=lr,loss=loss"  # which columns a table has; C=... instead of D: D is C / 6N
    batch_unit: int = 1  # tokens in one unit of the table's B: 2048 where sequences of 2048 are counted
    max_loss: float = 0.0  # leave out rows of a table with a larger loss; 0 = none
    boots: int = 400  # bootstrap samples
    # recommend
    recommend: bool = False  # batch, steps and learning rate for --params and --tokens by the published laws, and stop
    params: float = 0.0  # N of the model to train
    devices: int = 1  # devices it is trained on; --micro-batch is the number of sequences in a forward pass of each
    # machine
    device: str = "auto"  # auto|cpu|cuda|mps: auto is cuda if there is one, else cpu
    dtype: str = "auto"  # auto|float32|bfloat16: auto is bfloat16 on cuda, else float32
    kernels: bool = False  # Triton kernels fused_adamw, cross_entropy (cuda only; compared with PyTorch at first use)
    compile: bool = False  # torch.compile the blocks
    fsdp: bool = False  # split parameters over the devices of torchrun (one model at a time); else DDP
    # running
    log_every: int = 2**14  # tokens between two lines of log.jsonl
    save_every: int = 2**17  # tokens between two checkpoints
    out: str = ""  # output directory; "" = out/batchlaw/TASK-SCALE[-TAG]-sSEED
    resume: bool = False  # continue an interrupted run: the same command with this flag
    dry_run: bool = False  # print parameters, FLOPs, memory and hours, and stop

    def __post_init__(self):
        for flag in ("batches", "lrs", "beta2s"):
            try:
                values = numbers(text := getattr(self, flag))
            except ValueError:
                fail(f"--{flag} {text}: a comma list of numbers")
            good = values and values == sorted(set(values)) and values[0] > 0 and math.isfinite(values[-1])
            if not good or flag == "batches" and any(x % 1 for x in values) or flag == "beta2s" and values[-1] >= 1:
                fail(f"--{flag} {text}: rising numbers, above 0" + ", below 1" * (flag == "beta2s"))
        zeros = "seed lr_power lr_width weight_decay grad_clip micro_batch warmup_tokens params max_loss".split()
        for name, value in vars(self).items():
            low = int(name not in zeros)
            if not isinstance(value, (str, bool)) and not low <= value < math.inf:
                fail(f"--{name.replace('_', '-')} {value}: must be at least {low}")
        if self.recommend and not 0 < self.params < self.tokens:
            fail("--recommend needs --params N and --tokens D, more than N, as in --params 1.3e9 --tokens 3e11")
        if self.recommend and self.seq_len < 64:
            fail("--recommend needs --seq-len, tokens of a sequence of the model to train, as in --seq-len 2048")
        if self.task == "zipf" and self.vocab_size > 256:
            fail(f"--vocab-size {self.vocab_size}: the zipf language has at most 256 symbols")
        if not (self.fit or self.recommend):
            self.check_sweep()

    def check_sweep(self):
        for size in self.sizes.split(","):
            shape = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", SIZES.get(size, size))
            if not shape or int(shape[2]) % int(shape[3]):
                fail(f"--sizes {size}: layers x width x heads, as in 2x64x2, the width a multiple of the heads, "
                     f"or one of {', '.join(SIZES)}")
        if len(set(self.sizes.split(","))) < len(self.sizes.split(",")):
            fail(f"--sizes {self.sizes}: a size is named twice")
        batches, first = [int(x) for x in numbers(self.batches)], int(self.tokens) >> self.points - 1
        if bad := [B for B in batches if B % self.seq_len or B > first or len(batches) > 1 and first % B]:
            fail(f"--batches {bad[0]}: a multiple of --seq-len {self.seq_len}, and the smallest number of tokens at "
                 f"which a loss is taken, {first}, a multiple of it: losses at unequal D cannot be compared")
        if self.fsdp and len(numbers(self.lrs)) * len(numbers(self.beta2s)) > 1:
            fail("--fsdp trains one model at a time: give one number for --lrs and for --beta2s")
        if self.fsdp and self.kernels:
            fail("--kernels: not with --fsdp, whose parameters are split over devices")
        if self.scale == "paper" and not (self.data or self.dry_run):
            fail("--scale paper: name the tokens to train on, --task text --data FILE of uint16 token ids")
        if self.data and self.task != "text":
            fail(f"--data {self.data}: needs --task text")
        if self.shard:
            part = re.fullmatch(r"(\d+)/([1-9]\d*)", self.shard)
            if not part or int(part[1]) >= int(part[2]):
                fail(f"--shard {self.shard}: i/n with i from 0 to n - 1, as in 0/4")
            self.out = self.out or f"out/batchlaw/{self.task}-{self.scale}-s{self.seed}-{part[1]}of{part[2]}"


SIZES = {"125M": "12x768x12", "350M": "24x1024x16", "760M": "24x1536x16", "1.3B": "24x2048x16", "2.6B": "32x2560x32"}
SCALES = {  # "scale" and "scale:task"; explicit flags win
    "smoke": dict(sizes="1x8x1,1x16x1", tokens=2**12, points=3, batches="64,128,256", lrs="5e-3,1e-2,2e-2", n_eval=32,
                  beta2s="0.95,0.99", boots=20, log_every=512, save_every=1024),
    "small": {},
    "small:text": dict(sizes="2x32x1,2x64x2", batches="32,64,128,256,512", lrs="1e-3,2e-3,4e-3,8e-3,1.6e-2",
                       seq_len=32),
    "long": dict(sizes="1x16x1,1x32x1,1x64x2,2x64x2", tokens=2**20, points=7),
    "long:text": dict(sizes="2x32x1,2x48x2,2x64x2,2x96x3", tokens=2**19, batches="32,64,128,256,512",
                      lrs="1e-3,2e-3,4e-3,8e-3,1.6e-2", beta2s="0.95,0.99", seq_len=32),
    "paper": dict(sizes="125M", tokens=3e11, batches="4194304", lrs="6e-4", lr_power=0.0, lr_width=0, beta2s="0.95",
                  seq_len=2048, warmup_tokens=375_000_000, weight_decay=0.1, grad_clip=1.0, micro_batch=8, compile=True,
                  points=8, n_eval=512, log_every=2**24, save_every=2**32),
}
TRIED = dict(fixed=2, tuned=2)  # grids of rates looked at, on a seed that is not reported


def numbers(text):
    return [float(x) for x in text.split(",")]


# ---------------------------------------------------------------- 2. Data
def generator(*key):
    """Random numbers that depend on the key alone, so that a continued run draws what an uninterrupted one draws."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


class Zipf:
    """A language of V symbols: the next one has rank r with probability in proportion to r^-1.5, and which symbol has
    rank r after which symbol is a random table. Held-out losses are expectations over the next symbol."""

    def __init__(self, cfg):
        V, T = cfg.vocab_size, cfg.seq_len
        g, p = generator("language", cfg.seed), torch.arange(1, V + 1).double() ** -1.5
        self.rank, self.p, self.vocab = torch.stack([torch.randperm(V, generator=g) for _ in range(V)]), p / p.sum(), V
        self.table = torch.zeros(V, V).scatter_(1, self.rank, self.p.float().expand(V, V).clone())  # (previous, next)
        self.floor = -(self.p * self.p.log()).sum().item()  # the best loss there is
        self.stream = self.draw(int(cfg.tokens) // T, T, generator("stream", cfg.seed))
        self.held = self.draw(cfg.n_eval, T, generator("held", cfg.seed)).long()
        self.sha256 = ""

    def draw(self, n, T, g):
        """n sequences (n, T + 1) as uint8, a symbol's predecessor being all that it depends on."""
        ids, ranks = torch.randint(self.vocab, (n, T + 1), generator=g), torch.rand(n, T, generator=g)
        ranks = torch.searchsorted(self.p.cumsum(0).float(), ranks).clamp(max=self.vocab - 1)
        for t in range(T):
            ids[:, t + 1] = self.rank[ids[:, t], ranks[:, t]]
        return ids.to(torch.uint8)

    def batch(self, first, n):
        return self.stream[first : first + n].long()

    def target(self, ids):
        """Probabilities (n, T, V) of what comes next."""
        return self.table[ids[:, :-1]]


class Text:
    """Windows of T + 1 tokens out of a file, each once, in an order that looks random and needs no memory."""

    def __init__(self, cfg):
        tokens, held, self.vocab, self.sha256 = self.read(cfg)
        self.tokens, self.T, self.floor = tokens, cfg.seq_len, 0.0
        self.count = (len(tokens) - 1) // self.T
        if self.count * self.T < int(cfg.tokens) or len(held) <= cfg.n_eval * self.T:
            fail(f"--tokens {int(cfg.tokens)}: the data has {self.count * self.T} tokens for training, each seen once, "
                 f"and {len(held)} held out, of which --n-eval takes {cfg.n_eval * self.T}")
        g = generator("order", cfg.seed)
        self.start, step = torch.randint(self.count, (2,), generator=g).tolist()
        self.step = next(x for x in range(max(step, 1), 2 * self.count + 2) if math.gcd(x, self.count) == 1)
        starts = np.arange(cfg.n_eval) * ((len(held) - 1) // cfg.n_eval)
        self.held = self.windows(held, starts)

    def read(self, cfg):
        """Training and held-out tokens, size of the vocabulary, hash."""
        if not cfg.data:
            parts = [np.frombuffer(b"".join(part), np.uint8) for part in read_sources()]
            return *parts, 256, hashlib.sha256(b"".join(parts)).hexdigest()
        try:
            tokens = np.memmap(cfg.data, np.uint16, "r")
        except (OSError, ValueError) as error:
            fail(f"--data {cfg.data}: not a file of uint16 token ids: {error}")
        if tokens[: 10**6].max() >= 50304:
            fail(f"--data {cfg.data}: token id {tokens[: 10**6].max()}: must be below 50304, as those of GPT-2")
        held = max(1, len(tokens) // 10)
        return tokens[:-held], tokens[-held:], 50304, hashlib.sha256(tokens[: 10**6]).hexdigest()

    def windows(self, tokens, starts):
        return torch.from_numpy(np.stack([tokens[i : i + self.T + 1] for i in starts.tolist()]).astype(np.int64))

    def batch(self, first, n):
        index = [(self.start + i * self.step) % self.count for i in range(first, first + n)]
        return self.windows(self.tokens, np.array(index) * self.T)

    def target(self, ids):
        return ids[:, 1:]


def read_sources():
    """The standard library's Python files as lists of bytes: training, and a tenth of the files, by the hash of the
    name. Without tests, which not all machines have, and without prose and tables of characters."""
    root, parts = Path(sysconfig.get_paths()["stdlib"]), ([], [])
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if not re.match(r"(site|dist)-packages/|(.*/)?(tests?|idlelib|lib2to3|pydoc_data|encodings)/", name):
            parts[hashlib.sha256(name.encode()).digest()[0] < 26].append(path.read_bytes())
    return parts


# ---------------------------------------------------------------- 3. Model
class Block(nn.Module):
    """Attention and MLP of K stacked models, without biases and norm gains."""

    def __init__(self, d, n_head, layers):
        super().__init__()
        self.n_head, deep = n_head, 0.02 / math.sqrt(2 * layers)
        self.qkv, self.up = nn.Parameter(0.02 * torch.randn(1, d, 3 * d)), nn.Parameter(0.02 * torch.randn(1, d, 4 * d))
        self.out, self.down = nn.Parameter(deep * torch.randn(1, d, d)), nn.Parameter(deep * torch.randn(1, 4 * d, d))

    def forward(self, x, T):
        K, rows, d = x.shape  # rows: n sequences of T positions
        qkv = torch.bmm(F.layer_norm(x, (d,)), self.qkv).view(K * rows // T, T, 3, self.n_head, -1)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)  # (K n, heads, T, d / heads)
        x = x + torch.bmm(y.transpose(1, 2).reshape(x.shape), self.out)
        return x + torch.bmm(F.gelu(torch.bmm(F.layer_norm(x, (d,)), self.up)), self.down)


class Stack(nn.Module):
    """K GPTs of one shape and the same initial weights, trained at once on the same sequences: every parameter has K
    as its first dimension, so that one call does the work of K small ones."""

    def __init__(self, K, shape, vocab, T):
        super().__init__()
        layers, d, n_head = shape
        self.T, self.vocab = T, vocab
        self.wte, self.wpe = nn.Parameter(0.02 * torch.randn(1, vocab, d)), nn.Parameter(0.02 * torch.randn(1, T, d))
        self.blocks = nn.ModuleList(Block(d, n_head, layers) for _ in range(layers))
        self.head = nn.Parameter(0.02 * torch.randn(1, d, vocab))
        for p in self.parameters():
            p.data = p.data.repeat(K, 1, 1)

    def forward(self, ids):
        """Logits (K, n T, V) of sequences ids (n, T)."""
        (K, V, d), n = self.wte.shape, len(ids)
        index = torch.arange(K, device=ids.device)[:, None] * V + ids.flatten()  # (K, n T)
        x = F.embedding(index, self.wte.reshape(K * V, d))
        x = (x.view(K, n, self.T, d) + self.wpe[:, None]).view(K, -1, d)
        for block in self.blocks:
            x = block(x, self.T)
        return torch.bmm(F.layer_norm(x, (d,)), self.head)


def shape_of(size):
    return tuple(int(x) for x in SIZES.get(size, size).split("x"))


def parameters(size):
    """N: what the blocks have, without embeddings, positions and head."""
    layers, d, _ = shape_of(size)
    return 12 * layers * d * d


# ---------------------------------------------------------------- 4. Method (the paper's equations are inferred)
# Every law is E + sum_j A_j / x_j^alpha_j; its parameters are p = (log A_1 .. log A_n, log E, alpha_1 .. alpha_n).
def terms(*xs):
    """X (n + 1, R, 2 n + 1) of which law's logarithm is log sum_j exp(X_j @ p), for n inputs (R,)."""
    n, logs = len(xs), np.log(np.array(xs, float))
    X = np.zeros((n + 1, logs.shape[1], 2 * n + 1))
    for j in range(n + 1):
        X[j, :, j] = 1
    for j in range(n):
        X[j, :, n + 1 + j] = -logs[j]
    return X


def law(p, *xs):
    """L(N, D) or L(N, S, B), or any other sum of power laws."""
    n = len(xs)
    assert len(p) == 2 * n + 1
    return np.exp(p[n]) + sum(np.exp(p[j]) / np.asarray(x, float) ** p[n + 1 + j] for j, x in enumerate(xs))


def huber_lm(X, y, starts, counts=None, delta=1e-3, steps=200):
    """Minimise sum_r counts_r Huber(y_r - log sum_j exp(X[j, r] @ p)) over p, from all starts (M, P) at once.

    X (J, R, P), y (R,), counts (M, R): how often a run counts (bootstrap). Returns p (M, P), objectives (M,) and
    Gauss-Newton matrices (M, P, P). Levenberg-Marquardt; Huber is least squares with weights min(1, delta / |r|).
    The sum, not the mean: with a solver's usual tolerances the mean stops early, as Chinchilla's fit did."""
    (J, R, P), p = X.shape, np.array(starts, float)
    counts, damp = np.ones((len(p), R)) if counts is None else counts, np.full(len(p), 1e-2)

    def evaluate(p):
        t = (p @ X.reshape(-1, P).T).reshape(-1, J, R)
        top = t.max(1, keepdims=True)
        w = np.exp(t - top)
        total = w.sum(1)
        r = y - top[:, 0] - np.log(total)  # (M, R)
        size = np.abs(r)
        huber = np.where(size <= delta, r * r / 2, delta * (size - delta / 2))
        return (counts * huber).sum(1), r, w / total[:, None]

    def normal(r, w):
        jacobian = sum(w[:, j, :, None] * X[j] for j in range(J))  # (M, R, P)
        u = counts * np.minimum(1, delta / np.maximum(np.abs(r), 1e-300))
        back = (jacobian * u[..., None]).transpose(0, 2, 1)
        return back @ jacobian, (back @ r[..., None])[..., 0]

    with np.errstate(all="ignore"):  # a trial step may overflow: it is then not taken
        f, r, w = evaluate(p)
        for _ in range(steps):
            H, g = normal(r, w)
            diagonal = np.einsum("mpp->mp", H)
            A = H + np.eye(P) * (damp[:, None] * (diagonal + 1e-12))[:, None]
            trial = p + np.linalg.solve(A, g[..., None])[..., 0]
            f_new, r_new, w_new = evaluate(trial)
            better = f_new < f
            p[better], f[better], r[better], w[better] = trial[better], f_new[better], r_new[better], w_new[better]
            damp = np.clip(np.where(better, 0.3 * damp, 4 * damp), 1e-12, 1e12)
    return p, f, normal(r, w)[0]


def fit_law(loss, *xs, boots=0, starts=96):
    """Fit E + sum_j A_j / x_j^alpha_j to losses (R,): p, objective, condition number, bootstrap p (boots, P).

    The bootstrap draws runs with replacement and restarts at the optimum."""
    n, rng = len(xs), np.random.default_rng(0)
    X, y = terms(*xs), np.log(np.asarray(loss, float))
    grid = np.concatenate([rng.integers(0, 6, (starts, n)) * 5.0, rng.integers(-2, 3, (starts, 1)) * 0.5,
                           rng.integers(0, 5, (starts, n)) * 0.5], 1)
    p, f, _ = huber_lm(X, y, grid)
    p, f, H = huber_lm(X, y, p[f.argmin()][None], steps=1000)
    counts = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), boots).astype(float)
    draws = huber_lm(X, y, np.repeat(p, boots, 0), counts, steps=60)[0] if boots else p[:0]
    return p[0], f[0], np.linalg.cond(H[0]), draws


def allocate(amplitudes, exponents, product):
    """The x_j > 0 with the smallest sum_j A_j / x_j^alpha_j at a given product of all x_j.

    At the minimum all alpha_j A_j / x_j^alpha_j are equal, so x_j grows as the product to the power
    (1 / alpha_j) / sum_i 1 / alpha_i. N and D of L(N, D): product C / 6, the powers are beta / (alpha + beta) and
    alpha / (alpha + beta); S and B of L(N, S, B) at product D: B_opt of fixed data; N, S, B: of fixed compute."""
    exponents = np.asarray(exponents, float)
    slope = np.log(exponents * np.asarray(amplitudes, float))
    mu = ((slope / exponents).sum() - np.log(np.asarray(product, float)[..., None])) / (1 / exponents).sum()
    return np.exp((slope - mu) / exponents)  # (..., n)


def parabola(x, y, reach):
    """Lowest point (x, y) of a parabola through the smallest y and up to `reach` neighbours on each side; None where
    the smallest is at the edge, the curve not convex or its lowest point outside. Not finite y are left out."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    i = np.argmin(np.where(np.isfinite(y), y, np.inf))
    near = slice(max(0, i - reach), i + reach + 1)
    good = np.isfinite(y[near])
    if not 0 < i < len(x) - 1 or not np.isfinite(y[i - 1 : i + 2]).all():
        return None
    a, b, c = np.polyfit(x[near][good] - x[i], y[near][good], 2)
    if a <= 0 or not x[near][0] <= x[i] - b / (2 * a) <= x[near][-1]:
        return None
    return x[i] - b / (2 * a), c - b * b / (4 * a)


def power_law(y, *xs, counts=None):
    """Least squares of log y = c + sum_j e_j log x_j, once for each row of counts (M, R): coefficients (M, 1 + n)."""
    X = np.stack([np.ones(len(y)), *np.log(np.array(xs, float))], 1)  # (R, 1 + n)
    counts = np.ones((1, len(y))) if counts is None else counts
    back = X.T * counts[:, None]  # (M, 1 + n, R)
    return (np.linalg.pinv(back @ X) @ (back @ np.log(np.asarray(y, float)))[..., None])[..., 0]


def grad_noise(small, big, b, B):
    """Unbiased |G|^2 and tr(Sigma) from the squared norms of gradients of b and of B sequences. (McCandlish et al.
    2018 [M]) Average both before dividing: the ratio B_noise = tr(Sigma) / |G|^2 is biased."""
    assert 0 < b < B
    return (B * big - b * small) / (B - b), (small - big) / (1 / b - 1 / B)


def steps_examples(S_min, E_min, B):
    """Steps and examples to a loss: (S / S_min - 1)(E / E_min - 1) = 1, so S = S_min (1 + B_crit / B). [M]"""
    return S_min + E_min / B, S_min * B + E_min


def lr_for_batch(B, B0, lr0, gamma=0.75):
    """Learning rate at B where lr0 is best at B0, the best batch: below it grows as B^gamma, gamma from 0.75 to 1 in
    the paper; above it stays, as the public StepLaw runs show. (our choice)"""
    return lr0 * min(1.0, B / B0) ** gamma


def quadratic_loss(S, B, lr, modes=2000):
    """Expected loss of SGD in the noisy quadratic world, exact: curvatures i^-1.2, start 1, an example's gradient noise
    equal to the curvature. S steps of rate lr at batch B; arrays are broadcast. (our choice)"""
    curve = np.arange(1, modes + 1) ** -1.2
    S, B, lr = (np.asarray(x, float)[..., None] for x in (S, B, lr))
    r, noise = (1 - lr * curve) ** 2, lr**2 * curve / B
    left = r**S
    return (curve * (left + noise * (1 - left) / (1 - r))).sum(-1) / 2


# Published laws: name, tag of the reading, what it is, tokens of a batch from N, D and a loss L.
PUBLISHED = [
    ("Shuai et al. 2024", "S", "best at fixed data", lambda N, D, L: 3.24e3 * D**0.264),
    ("StepLaw 2503.04715", "P", "best at fixed data", lambda N, D, L: 0.58 * D**0.571),
    ("Power Lines 2505.13738", "S/M", "best at fixed data", lambda N, D, L: 2048 * 0.0306 * D**0.383),
    ("DeepSeek 2401.02954", "M", "best at fixed compute", lambda N, D, L: 0.2920 * (6 * N * D) ** 0.3271),
    ("MiniCPM 2404.06395", "M", "best at a loss", lambda N, D, L: 1.21e9 / L**6.24),
    ("CBS 2410.21676", "M", "critical, 20 % more data", lambda N, D, L: 512 * 22.91 * (D / 1e6) ** 0.47),
    ("Power Lines 2505.13738", "S/M", "critical", lambda N, D, L: 2048 * 0.0471 * D**0.462),
    ("Kaplan 2001.08361", "M", "critical at a loss", lambda N, D, L: 2e8 / L ** (1 / 0.21)),
]
FRONTIER = dict(N=0.464, D=0.536, S=0.434, B=0.102)  # the paper's powers of C on its compute frontier [S]
CHINCHILLA = 477.83, 2143.4, 1.81721, 0.34731, 0.36717  # A, K, E, alpha, beta: Epoch's public points, refitted [P]


def steplaw_rate(N, D):
    """Best learning rate. (StepLaw [P])"""
    return 1.79 * N**-0.713 * D**0.307


def recommend(N, D, T, devices=1, micro=1):
    """Rows for each published law: name, tag, kind, tokens, and the batch that devices * micro sequences of T tokens
    can make of it: accumulation, tokens used, steps, learning rate by StepLaw and the rule of lr_for_batch."""
    A, K, E, alpha, beta = CHINCHILLA
    loss, rows = E + A / N**alpha + K / D**beta, []
    best, once = PUBLISHED[1][3](N, D, loss), devices * micro * T
    for name, tag, kind, formula in PUBLISHED:
        tokens = formula(N, D, loss)
        accumulation = max(1, math.ceil(tokens / once))
        used = accumulation * once
        rate = lr_for_batch(used, best, steplaw_rate(N, D))
        rows.append(dict(law=name, tag=tag, kind=kind, tokens=tokens, accumulation=accumulation, used=used,
                         steps=max(1, round(D / used)), lr=rate))
    return rows


# ---------------------------------------------------------------- 5. Evaluation and claims
def quadratic_world():
    """Stage A: batch laws where everything is known; prints a table, returns numbers. With a tuned rate the smallest
    batch is always best, and there is a critical batch; with a fixed rate there is a best batch that grows with D."""
    rates, batches, found = np.geomspace(0.003, 1.95, 30), 2.0 ** np.arange(11), {}
    for D in (2**12, 2**16):
        losses = quadratic_loss(D / batches[:, None], batches[:, None], rates)
        best, loss = rates[losses.argmin(1)], losses.min(1)
        print(f"noisy quadratic, D {D}, batch: best rate, loss | "
              + ", ".join(f"{B:.0f}: {lr:.2f}, {x:.3f}" for B, lr, x in zip(batches, best, loss)))
        below = best < 0.4  # where the rate does not yet saturate
        found |= {f"quadratic/smallest_is_best_{D}": float(loss.argmin() == 0),
                  f"quadratic/gamma_{D}": power_law(best[below], batches[below])[0, 1]}
    fine = np.geomspace(1, 1024, 150)
    for lr in (0.1, 0.3):
        best = [(D, parabola(np.log(fine), quadratic_loss(D / fine, fine, lr), 2)) for D in 2.0 ** np.arange(12, 19)]
        D, B = np.array([(D, math.exp(at[0])) for D, at in best if at]).T
        found[f"quadratic/exponent_at_rate_{lr}"] = power_law(B, D)[0, 1]
    for target in (1.0, 0.5, 0.25):  # S = S_min (1 + B_crit / B), least squares
        steps, critical = steps_to(target, batches, rates), np.geomspace(1, 300, 2000)
        shape = 1 + critical[:, None] / batches
        S_min = (shape @ steps) / (shape**2).sum(1)
        error = np.square(steps - S_min[:, None] * shape).sum(1)
        found[f"quadratic/B_crit_at_{target}"] = critical[error.argmin()]
    print("noisy quadratic: " + ", ".join(f"{key.split('/')[1]} {x:.3g}" for key, x in found.items()), flush=True)
    return found


def steps_to(target, batches, rates):
    """Fewest steps, over rates, to a loss of the quadratic, for each batch: bisection in log S."""
    low, high = np.zeros((2, len(batches), len(rates)))
    high += 15.0
    for _ in range(24):
        middle = (low + high) / 2
        there = quadratic_loss(np.exp(middle), batches[:, None], rates) <= target
        low, high = np.where(there, low, middle), np.where(there, middle, high)
    return np.exp(high).min(1)


def best_rates(table, use, vertex=True):
    """{(seed, N, D): {B: (loss, lr)}} of the rows `use` of a table {name: (R,)}: the lowest loss over beta2 and lr.

    With a grid of rates, by the parabola in log lr (vertex=False: the lowest of the grid); a best rate at the edge of
    its grid gives loss nan: not measured. Where a table has no rates, the loss as it is and lr nan."""
    groups, found = {}, {}
    for i in np.flatnonzero(use):
        groups.setdefault(tuple(table[k][i] for k in ("seed", "N", "D", "B")), {}).setdefault(
            table["beta2"][i], {}).setdefault(table["lr"][i], []).append(table["loss"][i])
    for (seed, N, D, B), by_beta2 in sorted(groups.items()):
        trials = []
        for losses in by_beta2.values():
            lrs = sorted(losses)
            y = np.array([np.mean(losses[lr]) for lr in lrs])  # of runs that differ in nothing
            best = parabola(np.log(lrs), y, 1) if len(lrs) > 2 else None
            lowest = np.nanmin(np.append(y, np.inf))
            if best:
                trials.append((best[1] if vertex else lowest, math.exp(best[0])))
            else:  # one or two rates are a table's own choice, three and more a grid with the best at its edge
                trials.append((lowest, math.nan) if len(lrs) < 3 else (lowest, None))
        loss, lr = min(trials, key=lambda trial: trial[0])
        found.setdefault((seed, N, D), {})[B] = (math.nan, math.nan) if lr is None else (loss, lr)
    return found


def optima(cells):
    """Rows (seed, N, D, B_opt, loss) of cells whose best batch is inside the grid, by the parabola in log B."""
    rows = []
    for (seed, N, D), curve in cells.items():
        measured = [(B, loss) for B, (loss, _) in sorted(curve.items())]  # nan where not measured
        best = len(measured) > 2 and parabola(*np.log(np.array(measured)).T, 2)
        if best:
            rows.append((seed, N, D, math.exp(best[0]), math.exp(best[1])))
    return np.array(rows).reshape(-1, 5)


def best_losses(cells):
    """Rows (seed, N, D, loss): the lowest loss over batches."""
    rows = [(*key, min(x for x, _ in curve.values() if math.isfinite(x))) for key, curve in cells.items()
            if any(math.isfinite(x) for x, _ in curve.values())]
    return np.array(rows).reshape(-1, 4)


def gammas(cells):
    """Power of B in the best rate of each cell (one below and one above its best batch, nan where not measured)."""
    rows = []
    for curve in cells.values():
        B, loss, lr = np.array([(B, *x) for B, x in sorted(curve.items()) if np.isfinite(x).all()]).reshape(-1, 3).T
        if len(B) > 2:
            at = B[loss.argmin()]
            rows.append([power_law(lr[part], B[part])[0, 1] if part.sum() > 1 else math.nan
                         for part in (B <= at, B >= at)])
    return np.array(rows).reshape(-1, 2)


def interval(statistic, draws):
    """95 % percentile interval, made to contain the statistic."""
    draws = draws[np.isfinite(draws)]
    low, high = np.percentile(draws, (2.5, 97.5)) if len(draws) else (-math.inf, math.inf)
    return float(statistic), (float(min(low, statistic)), float(max(high, statistic)))


def resample(n, boots):
    return np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), boots).astype(float)


def mean_interval(x, boots):
    """Mean of x where it is finite, with the bootstrap's interval from four numbers on."""
    x = np.asarray(x, float)
    x = x[np.isfinite(x)]
    return interval(x.mean(), resample(len(x), boots) @ x / len(x)) if len(x) > 3 else None


def batch_law(rows, cells, boots):
    """log B_opt = c + e_D log D + e_N log N of rows of optima, (c, e_D, e_N) and bootstrap draws; None where half of
    the cells or more have no best batch inside the grid: what is left would be selected, by noise, from cells where
    the loss is flat, which are those of large D. The draws know nothing of what the cells of one run share."""
    if 2 * len(rows) <= cells or len(set(rows[:, 2])) < 3:
        return None
    xs = [rows[:, 2]] + [rows[:, 1]] * (len(set(rows[:, 1])) > 1)
    counts = resample(len(rows), boots)
    spread = [len(set(rows[count > 0, 2])) > 1 and len(set(rows[count > 0, 1])) > len(xs) - 1 for count in counts]
    return power_law(rows[:, 3], *xs)[0], power_law(rows[:, 3], *xs, counts=counts[spread])


def size_law(rows, p):
    """Half the 95 % interval of e_N of a batch law p, by Student's t over runs: the cells (seed, N) of a run share its
    path, so that each gives one number, the mean of log B_opt - e_D log D."""
    runs = sorted({(seed, N) for seed, N, *_ in rows})
    if len(runs) < 3 or len({N for _, N in runs}) < 2:
        return math.inf
    left = np.log(rows[:, 3]) - p[1] * np.log(rows[:, 2])
    y = np.array([left[(rows[:, 0] == seed) & (rows[:, 1] == N)].mean() for seed, N in runs])
    x = np.log([N for _, N in runs])
    x, y = x - x.mean(), y - y.mean()
    error = math.sqrt(((y - x * (x @ y) / (x @ x)) ** 2).sum() / (len(runs) - 2) / (x @ x))
    return STUDENT[min(len(runs) - 2, len(STUDENT)) - 1] * error


STUDENT = 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262  # 97.5 % quantiles, 1 degree of freedom and on


def predict_batch(p, N, D):
    return np.exp(p[..., 0] + p[..., 1] * math.log(D) + (p[..., 2] * math.log(N) if p.shape[-1] > 2 else 0))


def extrapolation(cells, boots):
    """{"loss_error", "batch_error"} at the largest D by laws fitted to D up to half of it: the largest relative error
    of the loss, and of |log B_opt|, over N; with intervals from the bootstrap of the fits."""
    best, rows, found = best_losses(cells), optima(cells), {}
    top = max(best[:, 2], default=0)
    fit, held = best[best[:, 2] <= top / 2], best[best[:, 2] == top]
    if len(fit) > 5 and len(set(fit[:, 1])) > 1:
        p, _, _, draws = fit_law(fit[:, 3], fit[:, 1], fit[:, 2], boots=boots)
        errors = [max(abs(law(q, N, D) / loss - 1) for _, N, D, loss in held) for q in (p, *draws)]
        found["loss_error"] = interval(errors[0], np.array(errors[1:]))
    early = rows[rows[:, 2] <= top / 2]
    fitted, held = batch_law(early, sum(D <= top / 2 for _, _, D in cells), boots), rows[rows[:, 2] == top]
    if fitted and len(held):
        errors = np.stack([np.abs(np.log(predict_batch(np.vstack([fitted[0], fitted[1]]), N, D) / B))
                           for _, N, D, B, _ in held]).max(0)
        found["batch_error"] = interval(errors[0], errors[1:])
    return found


def penalty(cells):
    """By how many percent the smallest batch is worse than another one, at the two largest D. The other is the best on
    average of the other sizes and seeds: chosen by its own losses it would be better by luck alone."""
    found, large = [], sorted({D for _, _, D in cells})[-2:]
    for D in large:
        here = {key: {B: math.log(loss) for B, (loss, _) in curve.items()} for key, curve in cells.items()
                if key[2] == D and any(math.isfinite(loss) for loss, _ in curve.values())}
        for key, curve in here.items():
            others = [c for k, c in here.items() if k != key and min(c) == min(curve)]
            means = {B: np.mean([c.get(B, math.nan) - np.nanmean(list(c.values())) for c in others])
                     for B in curve if B > min(curve)} if others else {}
            if good := {B: x for B, x in means.items() if math.isfinite(x)}:
                found.append(100 * math.expm1(curve[min(curve)] - curve[min(good, key=good.get)]))
    return found


def noise_of(table, rows, use):
    """Gradient noise scale in tokens, by sums over the runs of lowest loss at optima (seed, N, D, B_opt, loss)."""
    trace = signal = 0.0
    for seed, N, D, B, _ in rows:
        here = use & (table["seed"] == seed) & (table["N"] == N) & (table["D"] == D) & np.isfinite(table["loss"])
        near = np.abs(np.log(table["B"] / B))
        here &= near == near[here].min()
        best = np.flatnonzero(here)[table["loss"][here].argmin()]
        trace, signal = trace + table["noise_num"][best], signal + table["noise_den"][best]
    return trace / signal if signal > 0 else math.nan


def batches_and_rates(cells, rows, boots):
    """What cells and their optima say of B_opt, of the smallest batch, of the best rate: {name: (number, interval)},
    None where there is no interval."""
    slopes, found = gammas(cells), dict(cells=(len(cells), None), optima=(len(rows), None))
    p, draws = batch_law(rows, len(cells), boots) or ((), None)
    if len(p):
        found |= dict(prefactor=(math.exp(p[0]), None), exponent=interval(p[1], draws[:, 1]))
    if len(p) > 2:
        half = size_law(rows, p)
        for name, x in (("exponent_N", p[2]), ("D_less_N", abs(p[1]) - abs(p[2]))):
            found[name] = x, (x - half, x + half) if half < math.inf else None
    means = dict(gamma_below=slopes[:, 0], gamma_above=slopes[:, 1], penalty=penalty(cells))
    return found | {name: mean for name, x in means.items() if (mean := mean_interval(x, boots))}


def analyse(table, boots):
    """All laws of a table {name: (R,)}, for each arm: {"arm/measure": (number, interval or None)}, and the cells."""
    first, found, every = table["beta2"].min(), {}, {}
    arms = dict(fixed=table["beta2"] == first)
    if len(set(table["beta2"])) > 1:
        arms["tuned"] = table["beta2"] >= first
    for arm, use in arms.items():
        cells = every[arm] = best_rates(table, use)
        rows = optima(cells)
        here = batches_and_rates(cells, rows, boots)
        here |= surfaces(cells, best_losses(cells), boots) | extrapolation(cells, boots)
        if "noise_num" in table and len(rows) and math.isfinite(noise := noise_of(table, rows, use)):
            here["noise_by_B_opt"] = noise / math.exp(np.log(rows[:, 3]).mean()), None
        found |= {f"{arm}/{name}": x for name, x in here.items()}
    return found, every


def surfaces(cells, best, boots):
    """Fits of L(N, D) to the best losses and of L(N, S, B) to all cells, and what they say of allocation, with a
    warning where the data do not determine it."""
    found = {}
    if len(best) > 5 and len(set(best[:, 1])) > 1 and len(set(best[:, 2])) > 2:
        p, objective, condition, draws = fit_law(best[:, 3], best[:, 1], best[:, 2], boots=boots)
        for i, name in enumerate(("A", "K", "E", "alpha", "beta")):
            value, spread = (np.exp(p[i]), np.exp(draws[:, i])) if i < 3 else (p[i], draws[:, i])
            found[name] = interval(value, spread)
        power = interval(p[4] / (p[3] + p[4]), draws[:, 4] / (draws[:, 3] + draws[:, 4]))
        found |= dict(objective=(objective, None), condition=(condition, None), N_power_of_C=power)
    rows = np.array([(N, D / B, B, loss) for (_, N, D), curve in cells.items() for B, (loss, _) in curve.items()
                     if math.isfinite(loss)]).reshape(-1, 4)
    if len(rows) > 9 and all(len(set(column)) > 1 for column in rows[:, :3].T):
        p, *_, draws = fit_law(rows[:, 3], *rows[:, :3].T, boots=boots // 4)
        power = interval(p[5] / (p[5] + p[6]), draws[:, 5] / (draws[:, 5] + draws[:, 6]))
        errors = law(p, *rows[:, :3].T) / rows[:, 3] - 1
        found |= dict(surface_error=(np.sqrt(np.mean(errors**2)), None), surface_exponent=power)
        found |= {f"surface_{k}": (math.exp(x) if i < 4 else x, None) for i, (k, x) in
                  enumerate(zip(("A", "K_S", "K_B", "E", "alpha", "sigma", "rho"), p))}
    return found


# Fixed before the first evidence run, from the paper's claims: id, statistic, threshold, what would refute it.
# Intervals are over cells (N, D) of a run, of what concerns N over its runs; over seeds where records are put together.
CLAIMS = [
    ("batch-grows-with-data", "fixed/exponent", 0.0, "beta2 0.95: B_opt does not grow with D"),
    ("batch-grows-with-data-tuned", "tuned/exponent", 0.0, "the same with the best beta2 for each batch"),
    ("small-batch-loses", "fixed/penalty", 0.0, "beta2 0.95: the smallest batch is best: no best batch inside"),
    ("small-batch-loses-tuned", "tuned/penalty", 0.0, "the same with the best beta2 for each batch"),
    ("data-not-size", "fixed/D_less_N", 0.0, "B_opt changes with N as with D, or more: |e_D| - |e_N|"),
    ("rate-grows-below", "fixed/gamma_below", 0.5, "below B_opt the best rate grows as B^0.5 or slower (paper 0.75-1)"),
    ("rate-stays-above", "0.3 - fixed/gamma_above", 0.0, "above B_opt it grows on, as B^0.3 or faster"),
    ("loss-extrapolates", "0.01 - fixed/loss_error", 0.0, "L(N, D) of D <= D_max / 2 is more than 1 % off at D_max"),
    ("batch-extrapolates", "0.693 - fixed/batch_error", 0.0, "B_opt(D) of D <= D_max / 2 is off by more than 2 x"),
]


def statistics(found):
    """Claim id to (statistic, interval), where it was measured; a formula is a measure, or a number less one."""
    result = {}
    for name, formula, *_ in CLAIMS:
        *first, key = formula.split(" - ")
        if found.get(key, (0, None))[1]:
            value, (low, high) = found[key]
            result[name] = (float(first[0]) - value, (float(first[0]) - high, float(first[0]) - low)) if first else \
                (value, (low, high))
    return result


# ---------------------------------------------------------------- 6. Training
def grid_of(cfg, size, B):
    """(lr, beta2) of the models trained at once, of one size at batch B."""
    scale = (B / cfg.lr_batch) ** cfg.lr_power * (cfg.lr_width / shape_of(size)[1] if cfg.lr_width else 1)
    return [(lr * scale, beta2) for beta2 in numbers(cfg.beta2s) for lr in numbers(cfg.lrs)]


def as_rows(model):
    """Make the parameters of K stacked models views of one tensor (K, P), a row each: AdamW needs K calls, not one for
    each part. Returns rows and gradients, to which a backward pass adds."""
    warnings.filterwarnings("ignore", message="grad and param do not obey")  # strides of a row: no matter here
    parts = list(model.parameters())
    rows = torch.cat([p.detach().flatten(1) for p in parts], 1)
    grads, sizes = torch.zeros_like(rows), [p[0].numel() for p in parts]
    for p, x, g in zip(parts, rows.split(sizes, 1), grads.split(sizes, 1)):
        p.data, p.grad = x.view(p.shape), g.view(p.shape)
    return rows, grads


class Trainer:
    """K stacked models, their averages, and AdamW with a learning rate and a beta2 for each."""

    def __init__(self, cfg, run, size, grid, vocab):
        torch.manual_seed(generator("weights", cfg.seed, size).initial_seed())
        self.cfg, self.run, self.grid = cfg, run, grid
        self.model = Stack(len(grid), shape_of(size), vocab, cfg.seq_len).to(run.device)
        self.average = copy.deepcopy(self.model)
        groups = [dict(lr=lr, betas=(0.9, beta2), weight_decay=cfg.weight_decay) for lr, beta2 in grid]
        if cfg.fsdp:
            shard(self.model, run)
            shard(self.average, run)
            groups[0]["params"] = list(self.model.parameters())
        else:
            self.rows, self.grads = as_rows(self.model)
            self.averages, _ = as_rows(self.average)
            self.average.zero_grad()
            for group, row, grad in zip(groups, self.rows, self.grads):
                row.grad = grad
                group["params"] = [row]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        if cfg.compile:
            for block in [*self.model.blocks, *self.average.blocks]:
                block.compile()
        self.net = DistributedDataParallel(self.model) if run.world > 1 and not cfg.fsdp else self.model

    def losses(self, net, ids, target):
        """Summed cross-entropy (K,) of sequences ids (n, T + 1); target: (n, T), or probabilities (n, T, V)."""
        with torch.autocast(self.run.device.type, self.run.dtype, enabled=self.run.dtype != torch.float32):
            logits = net(ids[:, :-1]).float()  # (K, n T, V)
        target = target.flatten(0, 1).repeat(len(logits), *[1] * (target.ndim - 2))
        if self.cfg.kernels and target.ndim == 1:
            loss = load_kernel("cross_entropy")(logits.flatten(0, 1), target, -100, 0.0, "none")
        else:
            loss = F.cross_entropy(logits.flatten(0, 1), target, reduction="none")
        return loss.view(len(logits), -1).sum(1)

    def gradients(self, ids, net=None):
        """Gradients of the mean loss of all ranks' sequences ids (n, T + 1), in parts that fit; returns the loss (K,)
        of this rank's."""
        net, world, total = net or self.net, self.run.world, 0.0
        mine = ids[self.run.rank :: world] if net is self.net else ids
        self.optimizer.zero_grad(set_to_none=self.cfg.fsdp)
        parts = mine.split(self.cfg.micro_batch or len(mine))
        for i, part in enumerate(parts):
            last = i == len(parts) - 1 or not isinstance(net, DistributedDataParallel)
            with contextlib.nullcontext() if last else net.no_sync():
                loss = self.losses(net, part, part[:, 1:]) / mine[:, 1:].numel()
                loss.sum().backward()
            total = total + loss.detach()
        return total

    def step(self, number, warm):
        """Optimizer step `number`, 1, 2, ..., at `warm` times the rates; averages over a tenth of the steps taken."""
        cfg, share = self.cfg, min(1.0, 10 / number)
        for group, (lr, _) in zip(self.optimizer.param_groups, self.grid):
            group["lr"] = lr * warm
        if cfg.fsdp:
            if cfg.grad_clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip)
            self.optimizer.step()
            for mean, p in zip(self.average.parameters(), self.model.parameters()):
                mean.detach().to_local().lerp_(p.detach().to_local(), share)
            return
        if cfg.grad_clip:
            self.grads *= (cfg.grad_clip / (self.grads.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
        if not cfg.kernels:
            self.optimizer.step()
            self.averages.lerp_(self.rows, share)
            return
        for group, mean in zip(self.optimizer.param_groups, self.averages):
            row = group["params"][0]
            state = self.optimizer.state[row]
            if not state:
                state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(row), exp_avg_sq=torch.zeros_like(row))
            state["step"] += 1
            load_kernel("fused_adamw")([row], [row.grad], [state["exp_avg"]], [state["exp_avg_sq"]], number,
                                       group["lr"], betas=group["betas"], weight_decay=cfg.weight_decay,
                                       emas=[mean], ema_decay=1 - share)

    @torch.no_grad()
    def evaluate(self, data):
        """Held-out losses (K,) of the averaged weights, in nats a token."""
        ids, total = data.held, 0.0
        for part in ids.split(self.cfg.micro_batch or max(1, 4096 // self.cfg.seq_len)):
            target = data.target(part).to(self.run.device)
            total = total + self.losses(self.average, part.to(self.run.device), target).double()
        return total.cpu() / ids[:, 1:].numel()

    def noise(self, data, b=2, k=32):
        """tr(Sigma), in tokens, and |G|^2 (K,) at the present weights, whose ratio of sums is the noise scale: from k
        gradients of b held-out sequences and their mean, of B = k b. In sequences first: tokens of one depend on each
        other."""
        if self.cfg.fsdp or len(data.held) < k * b:
            return torch.full((2, len(self.grid)), math.nan)
        small, mean = 0.0, torch.zeros_like(self.grads)
        for part in data.held[: k * b].to(self.run.device).split(b):
            self.gradients(part, self.model)
            small = small + self.grads.square().sum(1) / k
            mean += self.grads / k
        signal, trace = grad_noise(small, mean.square().sum(1), b, k * b)
        return torch.stack([trace * self.cfg.seq_len, signal]).cpu()

    def state(self):
        if not self.cfg.fsdp:
            return dict(model=self.rows, average=self.averages, optimizer=self.optimizer.state_dict())
        from torch.distributed.checkpoint import state_dict as whole

        full = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, average = (whole.get_model_state_dict(m, options=full) for m in (self.model, self.average))
        optimizer = whole.get_optimizer_state_dict(self.model, self.optimizer, options=full)
        return dict(model=model, average=average, optimizer=optimizer)

    def load(self, state):
        if not self.cfg.fsdp:
            self.rows.copy_(state["model"])
            self.averages.copy_(state["average"])
            return self.optimizer.load_state_dict(state["optimizer"])
        from torch.distributed.checkpoint import state_dict as whole

        full = whole.StateDictOptions(full_state_dict=True)
        for model, name in ((self.model, "model"), (self.average, "average")):
            whole.set_model_state_dict(model, state[name], options=full)
        whole.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=full)


def shard(model, run):
    """Split every parameter over the ranks of torchrun along its second dimension (the first one is K = 1)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    policy = MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32)
    for module in [*model.blocks, model]:
        fully_shard(module, mp_policy=policy, reshard_after_forward=True, shard_placement_fn=lambda p: Shard(1))


def train(cfg, run, size, B, data, state):
    """Train a group, one size at one batch, every rate and beta2 at once; returns its rows of runs.jsonl.

    state: what load_state gave, {} for a new run."""
    job, T, N, grid = f"{size}-B{B}", cfg.seq_len, parameters(size), grid_of(cfg, size, B)
    marks = {(int(cfg.tokens) >> i) // B for i in range(cfg.points)}  # steps at which losses are taken
    trainer, step, rows, spent = Trainer(cfg, run, size, grid, data.vocab), 0, [], 0.0
    if state.get("job") == job:
        step, rows, spent, first = (state[name] for name in ("step", "rows", "seconds", "first"))
        trainer.load(state)
    else:
        first = trainer.evaluate(data).tolist()
    log, began = Log(run, job, max(marks), step), time.perf_counter() - spent
    while step < max(marks):
        loss = trainer.gradients(data.batch(step * B // T, B // T).to(run.device))
        step += 1
        trainer.step(step, min(1.0, step * B / max(1, cfg.warmup_tokens)))
        rate = step * B * len(grid) / (time.perf_counter() - began)
        if step * B % cfg.log_every < B:
            eta = (max(marks) - step) * B * len(grid) / rate / 60
            log(step, loss=loss.min().item(), tokens_per_s=rate, eta_min=eta)
        if step in marks:
            held, noise = trainer.evaluate(data).tolist(), trainer.noise(data).T.tolist()
            for (lr, beta2), x, before, (trace, signal) in zip(grid, held, first, noise):
                good = x < before  # not where it is nan
                trace, signal = (y if math.isfinite(y) else None for y in (trace, signal))
                rows.append(dict(data=f"{cfg.task} T {T} {data.sha256[:8]}", size=size, N=N, D=step * B, B=B, S=step,
                                 lr=lr, beta2=beta2, seed=cfg.seed,
                                 loss=x if good else None, noise_num=trace, noise_den=signal, first=before,
                                 tokens_per_s=rate, seconds=time.perf_counter() - began))
        stop = should_stop(run)
        if stop or step * B % cfg.save_every < B:
            parts = dict(rows=rows, first=first, seconds=time.perf_counter() - began)
            save_state(run, job=job, step=step, **parts, **trainer.state())
        if stop:
            stopped(run)
    if len(grid) == 1:  # one model, not a sweep: somebody wants it
        weights = trainer.state()["average"] if cfg.fsdp else trainer.average.state_dict()
        if not run.rank:
            replace_file(run.out / f"{job}.safetensors", export(SimpleNamespace(state_dict=lambda: weights)))
    return rows


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


def groups_of(cfg):
    """(size, B) that this process trains."""
    every = [(size, int(B)) for size in cfg.sizes.split(",") for B in numbers(cfg.batches)]
    i, n = (int(x) for x in (cfg.shard or "0/1").split("/"))
    return every[i::n]


def flops_of(size, vocab, T):
    """FLOPs of training on a token: 6 for each parameter of a matrix product, and causal attention."""
    layers, d, _ = shape_of(size)
    return 6 * (parameters(size) + d * vocab) + 6 * layers * T * d


def dry_run(cfg):
    """What a run takes, without allocating a model."""
    vocab = 50304 if cfg.data or cfg.scale == "paper" else 256 if cfg.task == "text" else cfg.vocab_size
    K, T = len(numbers(cfg.lrs)) * len(numbers(cfg.beta2s)), cfg.seq_len
    for size in cfg.sizes.split(","):
        batches, (layers, d, _) = [B for s, B in groups_of(cfg) if s == size], shape_of(size)
        with torch.device("meta"):
            n = sum(p.numel() for p in Stack(1, shape_of(size), vocab, T).parameters())
        rows = cfg.micro_batch * T or max(batches, default=0)
        memory = K * (20 * n + rows * (34 * layers * d + 8 * vocab)) / 2**30
        tokens = K * len(batches) * cfg.tokens
        flops = tokens * flops_of(size, vocab, T)
        print(f"{size}: {n:,} parameters, N {parameters(size):,} | {len(batches)} batches, {K} models, {tokens:.3g} "
              f"tokens, {flops:.2e} FLOPs | {memory:.2f} GiB on one device | on one H100 {flops / 1.44e18:.4g} hours")
    print("assumed: fp32 weights, gradients, AdamW and average; 400 TFLOP/s, which only large models reach")


def ledger(cfg, run, data):
    """Say before training what it takes: measured steps, throughput against a matmul's, stacked against one by one."""
    size = 1024 if run.device.type == "cpu" else 8192
    x, total, found = torch.randn(size, size, device=run.device, dtype=run.dtype), 0.0, {}
    peak = 2 * size**3 / min(timeit.repeat(lambda: (x @ x).sum().item(), number=1, repeat=5))

    def seconds_of(size, B, grid):
        trainer, ids = Trainer(cfg, run, size, grid, data.vocab), data.batch(0, B // cfg.seq_len).to(run.device)
        return min(timeit.repeat(lambda: (trainer.gradients(ids), trainer.step(1, 1.0)), number=1, repeat=4))

    groups = groups_of(cfg)
    for size in dict.fromkeys(size for size, _ in groups):
        parts = [(B, seconds_of(size, B, grid_of(cfg, size, B))) for s, B in groups if s == size]
        total += sum(cfg.tokens / B * seconds for B, seconds in parts) / 60
        B, seconds = parts[len(parts) // 2]
        grid = grid_of(cfg, size, B)
        alone, K = seconds_of(size, B, grid[:1]), len(grid)
        flops = K * B * flops_of(size, data.vocab, cfg.seq_len) / seconds
        print(f"{size}: N {parameters(size):,} | steps of {K} models in ms by batch: "
              + " ".join(f"{B}:{1e3 * s:.1f}" for B, s in parts) + f" | at {B} {K * B / seconds:,.0f} tokens/s, "
              f"{flops / peak:.0%} of a matmul's {peak / 1e9:.0f} GFLOP/s; one by one {B / alone:,.0f}")
        found |= {f"{size}/stacked_tokens_per_s": K * B / seconds, f"{size}/alone_tokens_per_s": B / alone}
    print(f"{len(groups)} groups of runs will take about {total:.1f} minutes, held-out losses not counted"
          + ", more than the 10 minutes of --scale small" * (cfg.scale == "small" and total > 10) + "; first loss "
          f"{math.log(data.vocab):.2f} expected" + f", best possible {data.floor:.4f}" * bool(data.floor), flush=True)
    return found


def read_csv(cfg, path, lines):
    """Rows of a table with the columns that --columns names."""
    names = dict(pair.split("=", 1) for pair in cfg.columns.split(",") if "=" in pair)
    reader = csv.DictReader(lines)
    given = set(reader.fieldnames or ())
    optional = {key for key in ("B", "lr") if names.get(key) == key}
    if missing := [f"{key}={name}" for key, name in names.items() if name not in given and key not in optional]:
        fail(f"{path}:1: no column {', '.join(missing)} among {', '.join(sorted(given))}: name them with --columns")
    if not {"N", "loss"} <= set(names) or not {"C", "D"} & set(names):
        fail(f"--columns {cfg.columns}: N, D (or C) and loss are needed, as in N=params,D=tokens,loss=val_loss")

    def number(line, name, text):
        try:
            return float(text)
        except ValueError:
            fail(f"{path}:{line}: column {name}: {text!r} is not a number")

    for line, row in enumerate(reader, 2):  # a run without a loss has diverged
        yield line, {key: number(line, name, row.get(name) or "") for key, name in names.items()
                     if name in given and (row.get(name) or key != "loss")}


def check_run(cfg, path, line, row):
    """A row of a file with its D, and B in tokens; the first thing that is wrong with it is said."""
    if not isinstance(row, dict):
        fail(f"{path}:{line}: not a run: a line is {{\"N\": ..., \"D\": ..., \"loss\": ...}}")
    for key in ("N", "C", "D", "B", "lr", "beta2", "seed", "loss"):
        need, x = key == "N" or key == "D" and "C" not in row, row.get(key)
        good = isinstance(x, (int, float)) and (0 < x < math.inf or key == "seed" or key == "loss" and x != x)
        if not good and (need or x is not None):
            fail(f"{path}:{line}: {key} must be a number above 0, not {x!r}")
    if "C" in row:
        row["D"] = row["C"] / (6 * row["N"])
    if row.get("B") and not path.endswith(".jsonl"):
        row["B"] *= cfg.batch_unit
    return row


def read_runs(cfg):
    """The table {name: (R,)} of --fit; rows without a loss have nan."""
    rows, names = [], sorted({name for part in cfg.fit.split(",") for name in glob.glob(part)})
    if not names:
        fail(f"--fit {cfg.fit}: there is no such file")
    for path in names:
        try:
            lines = Path(path).read_text("utf-8-sig").splitlines()
            found = enumerate(map(json.loads, lines), 1) if path.endswith(".jsonl") else read_csv(cfg, path, lines)
            found = list(found)
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            fail(f"--fit {path}: {error}: runs.jsonl of finished runs, or a table FILE.csv with a line of names")
        rows += [check_run(cfg, path, line, row) for line, row in found]
    if cfg.max_loss:
        rows = [row for row in rows if (row.get("loss") or 0) <= cfg.max_loss]
    if not any(row.get("loss") for row in rows):
        fail(f"--fit {cfg.fit}: there is no run with a loss")
    if len(kinds := {row.get("data") for row in rows}) > 1:
        fail(f"--fit {cfg.fit}: runs on different data cannot be fitted together: {', '.join(sorted(map(str, kinds)))}")
    return table_of(rows)


def table_of(rows):
    """Rows of runs.jsonl as {name: (R,)}. Without a batch every row is a run of its own, its number in place of a
    seed; missing beta2 and rates are all the same."""
    table = {key: np.array([row[key] for row in rows], float) for key in ("N", "D")}
    has_batch = all(row.get("B") for row in rows)
    table["B"] = np.array([row["B"] if has_batch else 1 for row in rows], float)
    table["seed"] = np.array([row.get("seed", 0) if has_batch else i for i, row in enumerate(rows)], float)
    table |= {key: np.array([row.get(key, 1) for row in rows], float) for key in ("lr", "beta2")}
    table["loss"] = np.array([math.nan if row.get("loss") is None else row["loss"] for row in rows])
    for key in ("noise_num", "noise_den"):
        if all(row.get(key) is not None for row in rows):
            table[key] = np.array([row[key] for row in rows], float)
    return table


def print_laws(found):
    """Every measure of each arm with its interval, and what the data do not determine."""
    for key, (value, ci) in found.items():
        print(f"{key:28} {value:.5g}" + (f" [{ci[0]:.4g}, {ci[1]:.4g}]" if ci else ""))
    for arm in dict.fromkeys(key.split("/")[0] for key in found):
        of = {key.split("/")[1]: x for key, (x, _) in found.items() if key.startswith(arm)}
        print(f"{arm}: {of['optima']} of {of['cells']} cells (N, D) have a best batch inside the grid"
              + "; too few for a law of the batch: more than half, at 3 values of D" * ("exponent" not in of))
        low, high = found.get(f"{arm}/N_power_of_C", (0, (0, 0)))[1]
        if high - low > 0.2:
            print(f"{arm}: WARNING: these runs do not say how to divide compute between N and D: the interval of the "
                  f"power is {high - low:.2f} wide; use the fit inside its range only; no allocation is given")
        elif high:
            for C in (1e18, 1e21, 1e24):
                N, D = allocate((of["A"], of["K"]), (of["alpha"], of["beta"]), C / 6)
                print(f"{arm}: C {C:.0e} FLOPs: N {N:.3g}, D {D:.3g} tokens")


def plot_laws(path, cells):
    """Loss and best rate by batch, a line for each D of the largest N, and best batch by D with the paper's law."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.2 * len(cells)), layout="constrained")
    for row, (arm, part) in zip(figure.subplots(len(cells), 3, squeeze=False), cells.items()):
        rows, top, D = optima(part), max(N for _, N, _ in part), np.array(sorted({D for _, _, D in part}))
        curves = [(d, [(B, *x) for B, x in sorted(curve.items()) if np.isfinite(x).all()])
                  for (_, N, d), curve in part.items() if N == top]
        for d, points in curves:
            B, loss, lr = np.array(points or [(1, 1, 1)]).T
            row[0].plot(B, loss / loss.min() - 1, marker=".", label=f"D {d:.2g}")
            row[2].plot(B, lr, marker=".")
        for N in sorted(set(rows[:, 1])):
            row[1].plot(*rows[rows[:, 1] == N, 2:4].T, ".", label=f"N {N:.3g}")
        row[1].plot(D, PUBLISHED[0][3](0, D, 0), color="gray", label="Shuai et al.")
        labels = ("B, tokens", "loss above the best"), ("D, tokens", "best B, tokens"), ("B, tokens", "best rate")
        for axes, (x, y), scale in zip(row, labels, ("linear", "log", "log")):
            axes.set(xscale="log", yscale=scale, xlabel=x, ylabel=y)
            axes.xaxis.set_minor_formatter("")
        row[0].set(title=f"{arm}, N {top:.3g}")
        row[0].legend(fontsize="x-small")
        row[1].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


def print_recommendation(cfg):
    """The published laws side by side for one model; returns the rows."""
    N, D, T, micro = cfg.params, cfg.tokens, cfg.seq_len, max(1, cfg.micro_batch)
    once = cfg.devices * micro * T
    if D < once:
        fail(f"--tokens {D:.3g}: less than one forward pass of {cfg.devices} devices, {once} tokens")
    if not 125e6 <= N <= 2.6e9 or D > 300e9:
        print("WARNING: the paper's law is fitted to 125M to 2.6B parameters and up to 300B tokens: this extrapolates")
    rows = recommend(N, D, T, cfg.devices, micro)
    print(f"N {N:.3g}, D {D:.3g} tokens; read: P primary text, S secondary source, M memory of a well-known paper")
    head = "read", "what", "tokens", "sequences", "accumulation", "used", "steps", "lr"
    print(f"{'law':25}{head[0]:5}{head[1]:26}" + "".join(f"{name:>13}" for name in head[2:]))
    for row in rows:
        cells = (row["tokens"], row["tokens"] / T, row["accumulation"], row["used"], row["steps"])
        print(f"{row['law']:25}{row['tag']:5}{row['kind']:26}" + "".join(f"{x:13,.0f}" for x in cells)
              + f"{row['lr']:13.2e}")
    best, first = [row["tokens"] for row in rows if row["kind"] == "best at fixed data"], rows[0]
    print(f"the laws of the best batch at fixed data differ by a factor of {max(best) / min(best):.1f}; rates are "
          f"StepLaw's, below its batch times (B / its batch)^0.75; DeepSeek has {0.3118 * (6 * N * D) ** -0.125:.2e}")
    powers = ", ".join(f"{name} as C^{power}" for name, power in FRONTIER.items())
    print(f"at fixed compute C the paper's best grow: {powers} [S]")
    print(f"take the first: {first['used']:,} tokens = {first['accumulation']} x {cfg.devices} devices x {micro} "
          f"sequences of {T}, {first['steps']:,} steps, lr {first['lr']:.2e}")
    return rows


# ---------------------------------------------------------------- 8. Main
def fit_files(cfg):
    """The laws of finished runs or of a table; returns the measures."""
    found, cells = analyse(read_runs(cfg), cfg.boots)
    print_laws(found)
    path = Path(cfg.out or ".") / "laws.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_laws(path, cells)
    except OSError as error:
        fail(f"--out {cfg.out}: {error}")
    print(f"drawn in {path}")
    return found


def finished(path):
    """Rows of runs.jsonl, in which every group is whole."""
    try:
        return [dict(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    except (ValueError, TypeError) as error:
        fail(f"{path}: damaged ({error}): remove {path.parent} and start again")


def sweep(cfg, run, data):
    """Train all groups that are not finished; returns the rows of all."""
    path, state = run.out / "runs.jsonl", load_state(run)
    rows = finished(path)
    if not state:
        save_state(run, job="")
    for size, B in groups_of(cfg):
        if (size, B) in {(row["size"], row["B"]) for row in rows}:
            continue
        rows += train(cfg, run, size, B, data, state)
        if not run.rank:
            replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        save_state(run, job="")
    return rows


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = cli(Config, SCALES, argv)
    if cfg.recommend or cfg.fit or cfg.dry_run:
        return print_recommendation(cfg) if cfg.recommend else fit_files(cfg) if cfg.fit else dry_run(cfg)
    if cfg.kernels and not torch.cuda.is_available():
        fail("--kernels needs a CUDA device; without the flag the same run takes plain PyTorch")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if bad := [B for _, B in groups_of(cfg) if B // cfg.seq_len % world]:
        fail(f"--batches {bad[0]}: {bad[0] // cfg.seq_len} sequences cannot be divided among {world} processes")
    if cfg.fsdp and world < 2:
        fail("--fsdp needs torchrun and two devices or more")
    data = Text(cfg) if cfg.task == "text" else Zipf(cfg)
    run, began = start_run(cfg, "batchlaw"), time.perf_counter()
    speed = ledger(cfg, run, data)
    before = time.perf_counter() - began
    rows, began = sweep(cfg, run, data), time.perf_counter()
    if run.rank:
        return None
    if cfg.shard:
        return print(f"shard {cfg.shard} is done: its runs are in {run.out / 'runs.jsonl'}; fit all with --fit")
    found, cells = analyse(table_of(rows), cfg.boots)
    print_laws(found)
    measured = statistics(found)
    for name, formula, *_ in (claim for claim in CLAIMS if claim[0] not in measured and cfg.scale != "smoke"):
        print(f"CLAIM {name} INCONCLUSIVE: {formula}: not measured: too few cells have a best batch inside the grid")
    metrics = {key: float(x) for key, (x, _) in found.items()} | quadratic_world() | speed
    plot_laws(run.out / "plot.png", cells)
    minutes = before + time.perf_counter() - began + sum({(r["size"], r["B"]): r["seconds"] for r in rows}.values())
    record = dict(tried=TRIED, metrics=metrics, data_sha256=data.sha256, minutes=minutes / 60)
    return report(cfg, run, "batchlaw", argv, measured, CLAIMS, **record)


if __name__ == "__main__":
    from_shell(main)
