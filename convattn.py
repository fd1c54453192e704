# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "safetensors", "tqdm", "matplotlib"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""convattn.py: DAPE V2: Process Attention Score as Feature Map for Length Extrapolation
Zheng, Gao, Shi, Xiong, Sun, Li, Huang, Ren, Ng, Jiang, Li, Li, ACL 2025, arXiv 2410.04798 (also called CDAPE)

Attention compares a query with each key alone. DAPE V2 takes the scores and position biases of all heads as channels of
a feature map and runs two small convolutions along the keys over it before the softmax, so that a score also sees its
neighbours: one layer can look for what came after an earlier copy; bytes of text are predicted a little better.

  python convattn.py                # recall, 5 min on a core: at 8 times the training length 100 %, 1x1 6 % (guessing)
  python convattn.py --task text    # 14 min: 2.42 bits a byte at 16 times the training length, 1x1 2.48, Kerple 2.62
  python convattn.py --task che     # 11 min: even pairs on 41 to 100 symbols 100 %, 1x1 56 %, Kerple 51 %

Symbols (B sequences, H heads, T positions, d channels a head, W hidden width, k kernel size, p = k // 2)
  paper        code      shape              meaning
  S            s         (B, H, M, N)       scores Q K^T / sqrt(d) of M queries with N keys
  R            r         (H, M, N)          bias by distance: ALiBi, Kerple, FIRE; none for NoPE and RoPE
  F            ScoreConv (B, H, M, N)       conv2(LeakyReLU(conv1([S, R]))), both convolutions 1xk
  A            a         (B, H, M, N)       S + R + F: what the softmax sees

An arm is a position encoding and what is added: nope, kerple+1x3, alibi+1x1w96 (hidden width 96), nope+keyconv (a
convolution of width 3 along the keys themselves: a control), kerple@2 (two layers). 1x1 is DAPE V1.

Differences from the paper
  edge        hidden columns right of the diagonal, read by the second convolution, exist for every query. The official
              code has zeros behind the tensor's end: the last p rows, a decoded one too, differ (--edge official).
  biases      convolved once for the whole batch: the first convolution is linear. Distances are fp32, the biases are
              in the type of the scores. Without a bias H channels (the official modules for NoPE and RoPE expect 2 H).
  decay       r1, r2 of Kerple and FIRE's c, m are not decayed; r1, r2 are kept above 0.01 after each step.
  memory      long inputs are taken in blocks of queries and their scores computed again in the backward pass. On Linux
              set MALLOC_MMAP_THRESHOLD_=1048576 for them: glibc keeps the blocks' freed memory otherwise.
  recall      ours: one layer has to name the value that followed an earlier copy of a key.
  text        bytes of the standard library's sources; the paper: ArXiv and Books3 (--data takes tokens). The same last
              128 bytes are predicted from growing contexts; the paper: the last 256 of windows that differ by length.
              Batches are random windows, not epochs; bf16 on cuda for fp16.
  che         9 of the 15 tasks; encoder without a mask (the paper does not say), so biases of |i - j|; 5 layers, 64
              channels, GELU (ReLU there); fewer steps, tests to length 100.
  left out    T5, CoPE and Transformer-XL biases, k > 7, dropout, the 350M to 6.7B models.
The paper's text was not at hand where a tag says "official code": the formula is read from chuanyang-Zheng/DAPE.

Copy out: score_conv with visible, ScoreConv, attend (without its branch for kernels), attend_in_blocks, Kerple
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
import sysconfig
import time
import timeit
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
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# ---------------------------------------------------------------- 1. Config
@dataclass
class Config:
    task: str = "recall"  # recall|text|che: find what followed an earlier copy, bytes of sources, Chomsky hierarchy
    scale: str = "small"  # smoke|small|long|paper: a row of SCALES below; explicit flags win over it
    arms: str = ""  # comma list of variants (see above); "" = those of the task's claims, see ARMS below
    tag: str = "main"  # name of this variant in the RESULT record
    seed: int = 0  # training batches and initial weights; not the held-out data
    # data
    data: str = ""  # text: file of uint16 token ids, the last tenth is held out; "" = sources of Python, bytes
    problems: str = "even_pairs,missing_dup,odds_first"  # che: comma list out of PROBLEMS below
    seq_len: int = 64  # training length; che: the longest (paper: 128, 512, 1024; che: 40)
    eval_lens: str = "64,128,256,512"  # lengths of the test; che: first and last
    n_eval: int = 64  # held-out sequences of each length
    # model
    n_layer: int = 1  # blocks; an arm's @2 wins (paper: 12; che: 5)
    n_head: int = 4  # attention heads (paper: 12; che: 8)
    n_embd: int = 64  # width (paper: 768; che: 64)
    conv_width: int = 32  # hidden channels of the score convolution; an arm's w96 wins (paper: 32)
    slope: float = 0.01  # slope of LeakyReLU below 0 (paper: 0.01)
    edge: str = "extend"  # extend|official: hidden columns right of the diagonal, or zeros at the input's end
    impl: str = "chunked"  # chunked|dense: blocks of queries, computed again in the backward pass, or all at once
    chunk: int = 64  # queries of a block, on a GPU better 1024; an input of at most as many is one dense block
    # training
    steps: int = 700  # optimizer steps of each arm (paper: 50,000; che: 200,000)
    batch_size: int = 24  # sequences in one optimizer step, over all devices (paper: 256, inferred; che: 128)
    micro_batch: int = 0  # sequences per forward pass; 0 = no split; saves memory, same gradient
    lr: float = 3e-3  # peak learning rate, cosine to min_lr (paper: 6e-4; che: 1e-3)
    min_lr: float = 0.0  # learning rate of the last step (paper: 6e-5)
    warmup_steps: int = 50  # linear warm-up (paper: 1 %)
    weight_decay: float = 0.01  # AdamW, on matrices and kernels (paper: 0.1)
    beta2: float = 0.95  # AdamW; beta1 is 0.9 (paper: 0.95)
    grad_clip: float = 1.0  # largest gradient norm (paper: 1)
    # machine
    device: str = "auto"  # auto|cpu|cuda|mps: auto is cuda if there is one, else cpu
    dtype: str = "auto"  # auto|float32|bfloat16: auto is bfloat16 on cuda, else float32
    kernels: bool = False  # Triton kernel score_conv (cuda only; compared with PyTorch at first use)
    # running
    log_every: int = 20  # steps between two lines of log.jsonl
    save_every: int = 100  # steps between two checkpoints
    out: str = ""  # output directory; "" = out/convattn/TASK-SCALE[-TAG]-sSEED
    resume: bool = False  # continue an interrupted run: the same command with this flag
    dry_run: bool = False  # print parameters, FLOPs, memory and hours, and stop

    def __post_init__(self):
        self.arms = self.arms or ARMS[self.task]
        arms, problems = self.arms.split(","), self.problems.split(",")
        for arm in arms:
            if not ARM.fullmatch(arm) or arms.count(arm) > 1:
                fail(f"--arms {arm}: once each, {'|'.join(ENCODINGS)}, then +1x1, +1x3, ... or +keyconv, then @LAYERS")
        if not set(problems) <= set(PROBLEMS) or len(set(problems)) < len(problems):
            fail(f"--problems {self.problems}: a comma list, each once, out of {', '.join(PROBLEMS)}")
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.eval_lens):
            fail(f"--eval-lens {self.eval_lens}: must look like 64,128")
        # numbers are at least 1 where listed here, else at least 0, and some have an upper limit
        ones = "seq_len n_eval n_layer n_head n_embd conv_width chunk steps batch_size log_every save_every"
        for name, value in vars(self).items():
            low, high = int(name in ones.split()), dict(beta2=0.9999, slope=1.0).get(name, math.inf)
            if not isinstance(value, str) and not (low <= value <= high and value < math.inf):
                limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                fail(f"--{name.replace('_', '-')} {value}: must be {limits}")
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            fail(f"--n-embd {self.n_embd}: must be a multiple of --n-head {self.n_head}, the quotient even")
        if self.scale == "paper" and (self.task == "recall" or self.task == "text" and not (self.data or self.dry_run)):
            fail("--scale paper: choose --task che, or --task text with --data FILE of uint16 token ids")
        if self.task == "recall" and any(n % 2 or not 4 <= n <= 4 * KEYS for n in [self.seq_len, *lengths(self)]):
            fail(f"--task recall: --seq-len and --eval-lens must be even and from 4 to {4 * KEYS}: keys and values")
        if self.task == "che" and (len(lengths(self)) != 2 or lengths(self)[0] > lengths(self)[1]):
            fail(f"--eval-lens {self.eval_lens}: for --task che the first and the last length, as in 41,100")
        if self.task == "text" and min(lengths(self)) < LAST:
            fail(f"--eval-lens {self.eval_lens}: at least {LAST}, so many bytes are predicted from each context")
        if self.kernels and (self.task == "che" or self.edge != "extend" or "fire+1x" in self.arms):
            fail("--kernels: the kernel knows causal masks, --edge extend and biases of the distance (not fire) alone")


ENCODINGS = "nope", "rope", "alibi", "kerple", "fire"
ARM = re.compile(rf"({'|'.join(ENCODINGS)})(?:\+1x([1357])(?:w([1-9]\d*))?|\+(keyconv))?(?:@([1-9]\d*))?")
ARMS = dict(
    recall="nope,nope+1x1,nope+1x1w96,nope+1x3,kerple,kerple+1x1,kerple+1x3,rope,nope+keyconv,kerple@2",
    text="kerple+1x3,kerple+1x1,kerple+keyconv,kerple,alibi+1x3,alibi,nope+1x3,nope,rope",
    che="kerple+1x3,kerple+1x1,kerple",
)
TINY_RUN = dict(n_eval=4, n_layer=1, n_head=2, n_embd=8, conv_width=4, steps=6, batch_size=4, log_every=2, save_every=2)
TEXT = dict(seq_len=128, eval_lens="128,256,512,1024,2048", n_eval=32, n_layer=3, n_embd=96, conv_width=16)
TEXT |= dict(batch_size=16, lr=2e-3, min_lr=2e-4, weight_decay=0.1)
CHE = dict(seq_len=40, eval_lens="41,100", n_eval=16, n_layer=5, n_head=8, lr=1e-3, beta2=0.999, weight_decay=0.0)
PUBLISHED = dict(seq_len=512, eval_lens="512,1024,2048,4096,8192", n_layer=12, n_head=12, n_embd=768, steps=50_000)
PUBLISHED |= dict(batch_size=256, micro_batch=32, lr=6e-4, min_lr=6e-5, warmup_steps=500, weight_decay=0.1)
SCALES = {  # "scale" and "scale:task"; explicit flags win
    "smoke": dict(TINY_RUN, chunk=32),
    "smoke:recall": dict(seq_len=16, eval_lens="16,64"),
    "smoke:text": dict(seq_len=32, eval_lens="128,256"),
    "smoke:che": dict(seq_len=6, eval_lens="7,9"),
    "small": {},
    "small:text": dict(TEXT, steps=450),
    "small:che": dict(CHE, steps=600, batch_size=32),
    "long": dict(steps=2000),
    "long:text": dict(TEXT, eval_lens="128,256,512,1024,2048,4096,8192", steps=3000),
    "long:che": dict(CHE, steps=10_000, batch_size=64, problems="even_pairs,parity,cycle_nav,mod_arith,reverse,"
                     "duplicate,odds_first,missing_dup,bucket_sort"),
    "paper": dict(PUBLISHED, n_eval=20),
    "paper:che": dict(CHE, n_embd=64, micro_batch=0, steps=200_000, batch_size=128, eval_lens="41,500"),
}
TRIED = dict(  # settings looked at, on a seed not reported: steps of recall; learning rates of text, at 128 bytes
    recall={"nope+1x3": 2, "nope+keyconv": 2, "kerple@2": 2},
    text={"kerple": 3, "kerple+1x3": 3},
    che={},
)


# ---------------------------------------------------------------- 2. Data
LAST = 128  # text: the bytes that are predicted at the end of each window (paper: 256)


def lengths(cfg):
    return [int(n) for n in cfg.eval_lens.split(",")]


def read_sources():
    """The standard library's Python files as bytes: training, and a tenth of the files, by the hash of the name.
    Without tests, which not all machines have, and without prose and tables of characters."""
    root, parts = Path(sysconfig.get_paths()["stdlib"]), ([], [])
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if not re.match(r"(site|dist)-packages/|(.*/)?(tests?|idlelib|lib2to3|pydoc_data|encodings)/", name):
            parts[hashlib.sha256(name.encode()).digest()[0] < 26].append(path.read_bytes())
    return (np.frombuffer(b"".join(part), np.uint8) for part in parts)


def load_text(cfg):
    """Training and held-out tokens (n,) each, and the size of the vocabulary."""
    if not cfg.data:
        return *read_sources(), 256
    try:
        tokens = np.memmap(cfg.data, np.uint16, "r")
    except (OSError, ValueError) as error:
        fail(f"--data {cfg.data}: not a file of uint16 token ids: {error}")
    held = len(tokens) // 10
    if held < max(lengths(cfg)) + 2 or len(tokens) - held < cfg.seq_len + 2:
        fail(f"--data {cfg.data}: {len(tokens)} tokens are too few; a tenth must exceed the longest of --eval-lens")
    if tokens.max() >= 50304:
        fail(f"--data {cfg.data}: token id {tokens.max()}: must be below 50304, as those of GPT-2")
    return tokens[:-held], tokens[-held:], 50304  # GPT-2's vocabulary, padded as in the official configuration


def text_windows(tokens, n, length, generator):
    """n random windows (n, length + 1): length inputs and the next tokens."""
    starts = torch.randint(len(tokens) - length - 1, (n,), generator=generator)
    return torch.from_numpy(np.stack([tokens[i : i + length + 1] for i in starts.tolist()]).astype(np.int64))


KEYS, VALUES = 256, 32


def recall_batch(n, length, generator):
    """Pairs of a key and its value, keys drawn again and again from a pool of a quarter of the length.

    Returns ids (n, length), target (n, length), asked (n, length): keys that occurred before; their value is asked."""
    pairs, pool = length // 2, max(2, length // 4)
    keys = torch.rand(n, KEYS, generator=generator).argsort(1)[:, :pool]
    values = torch.randint(KEYS, KEYS + VALUES, (n, pool), generator=generator)
    pick = torch.randint(pool, (n, pairs), generator=generator)
    ids = torch.stack([keys.gather(1, pick), values.gather(1, pick)], 2).flatten(1)
    asked = torch.zeros_like(ids, dtype=torch.bool)
    asked[:, ::2] = (pick[:, :, None] == pick[:, None]).tril(-1).any(2)
    return dict(ids=ids, target=ids.roll(-1, 1), asked=asked)


def evaluate_digits(x):
    """Digits with + (5), - (6), * (7) between them, x (n, odd), modulo 5; products first."""
    total, product = torch.zeros_like(x[:, 0]), x[:, 0]
    for op, digit in zip(x[:, 1::2].T, x[:, 2::2].T):
        total = torch.where(op == 7, total, total + product)
        product = torch.where(op == 7, product * digit, torch.where(op == 5, digit, -digit)) % 5
    return (total + product) % 5


def che_problem(name, n, length, generator):
    """n questions and their answers, (n, <= length) and (n, m): symbols 0 to 7. (DeepMind's Chomsky hierarchy)"""
    def draw(high, size=length):
        return torch.randint(high, (n, size), generator=generator)

    bits = draw(2)
    if name == "cycle_nav":  # steps of -1, 0, 1 on a circle of five
        actions = draw(3)
        return actions, (actions - 1).sum(1, keepdim=True) % 5
    if name == "mod_arith":
        x = draw(5, length - (length + 1) % 2)
        x[:, 1::2] = draw(3, x.shape[1] // 2) + 5
        return x, evaluate_digits(x)[:, None]
    if name == "bucket_sort":
        digits = draw(5)
        return digits, digits.sort(1).values
    if name == "missing_dup":  # a string twice, one of its bits hidden (2); an odd length ends in 3
        half = bits[:, : length // 2]
        x, at = torch.cat([half, half, torch.full((n, length % 2), 3)], 1), draw(max(1, length // 2 * 2), 1)
        answer = x.gather(1, at) if length > 1 else torch.ones_like(at)
        return x.scatter(1, at, 2) if length > 1 else x, answer
    return bits, dict(
        even_pairs=bits[:, :1] ^ bits[:, -1:],  # is the number of 01 and 10 odd? So when the ends differ
        parity=bits.sum(1, keepdim=True) % 2,
        reverse=bits.flip(1),
        duplicate=torch.cat([bits, bits], 1),
        odds_first=torch.cat([bits[:, 1::2], bits[:, ::2]], 1),
    )[name]


PROBLEMS = "even_pairs parity cycle_nav mod_arith reverse duplicate odds_first missing_dup bucket_sort".split()
EMPTY = 8  # che: stands where the answer is to be written
VOCAB = dict(recall=KEYS + VALUES, text=256, che=EMPTY + 1)


def che_batch(name, n, length, generator):
    """Questions and behind them empty places, where the answer is asked: ids, target, asked (n, L)."""
    question, answer = che_problem(name, n, length, generator)
    ids = torch.cat([question, torch.full_like(answer, EMPTY)], 1)
    target = torch.cat([question, answer], 1)
    asked = torch.arange(ids.shape[1]) >= question.shape[1]
    return dict(ids=ids, target=target, asked=asked.expand_as(ids))


def make_batch(cfg, problem, data, step):
    """Batch `step` of a task: ids, target, asked (B, L). Drawn from (seed, step) alone, so resume is exact."""
    generator = torch.Generator().manual_seed(1_000_003 * cfg.seed + step)
    if cfg.task == "recall":
        return recall_batch(cfg.batch_size, cfg.seq_len, generator)
    if cfg.task == "che":
        length = int(torch.randint(1, cfg.seq_len + 1, (), generator=generator))
        return che_batch(problem, cfg.batch_size, length, generator)
    windows = text_windows(data[0], cfg.batch_size, cfg.seq_len, generator)
    return dict(ids=windows[:, :-1], target=windows[:, 1:], asked=torch.ones_like(windows[:, 1:], dtype=torch.bool))


# ---------------------------------------------------------------- 3. Model
class Alibi(nn.Module):
    """-m_h t for the distance t, with fixed slopes. (Press et al.; official code)"""

    def __init__(self, n_head, seq_len):
        super().__init__()
        power = 2 ** math.floor(math.log2(n_head))
        slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
        slopes += [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (n_head - power), 2)]  # every second of 2 power
        self.register_buffer("slopes", torch.tensor(slopes), persistent=False)

    def forward(self, rows, cols):
        """Biases (H, M, N) for queries at rows (M,) and keys at cols (N,); the other encodings likewise."""
        return -self.slopes[:, None, None] * (rows[:, None] - cols).abs()


class Kerple(nn.Module):
    """-r1 log(1 + r2 t), r1 and r2 learned for each head. (Chi et al., logarithmic; official code)"""

    def __init__(self, n_head, seq_len):
        super().__init__()
        self.r1, self.r2 = nn.Parameter(2 * torch.rand(n_head)), nn.Parameter(torch.rand(n_head))

    def forward(self, rows, cols):
        distance = (rows[:, None] - cols).abs()
        return -self.r1[:, None, None] * torch.log1p(self.r2[:, None, None] * distance)

    @torch.no_grad()
    def project(self):
        """After each step: a clamp inside the forward pass would stop the gradient at the bound."""
        self.r1.clamp_(min=0.01)
        self.r2.clamp_(min=0.01)


class Fire(nn.Module):
    """An MLP of log(|c t| + 1) over log(|c max(i, m L0)| + 1) for query i, L0 half the training length. (official code)
    It depends on i and not on the distance alone."""

    def __init__(self, n_head, seq_len):
        super().__init__()
        self.c, self.m, self.start = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(1.0)), seq_len // 2
        self.mlp = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, n_head))

    def forward(self, rows, cols):
        whole = torch.maximum(rows[:, None].float(), (self.m * self.start).abs())  # (M, 1)
        whole = torch.log((self.c * whole).abs() + 1) + 1e-6
        part = torch.log((self.c * (rows[:, None] - cols)).abs() + 1)  # (M, N)
        return self.mlp((part / whole)[..., None]).permute(2, 0, 1)


BIASES = dict(alibi=Alibi, kerple=Kerple, fire=Fire)


def rotate(x, at):
    """RoPE: x (B, H, L, d) at positions (L,); channel i is paired with i + d / 2."""
    d = x.shape[-1]
    angle = at[:, None] * 10000 ** -(torch.arange(0, d, 2, device=x.device) / d)  # (L, d / 2)
    cos, sin, (left, right) = angle.cos().to(x), angle.sin().to(x), x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Block(nn.Module):
    """Attention and MLP behind a LayerNorm each, as in GPT-2; an arm fills in how the scores are made."""

    def __init__(self, cfg, arm):
        super().__init__()
        encoding, kernel, width, keyconv, _ = ARM.fullmatch(arm).groups()
        d, self.n_head, self.cfg, self.rope = cfg.n_embd, cfg.n_head, cfg, encoding == "rope"
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj, self.fc, self.out = (nn.Linear(*n) for n in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)))
        self.keyconv = nn.Conv1d(d, d, 3, groups=d) if keyconv else None
        self.bias = BIASES[encoding](cfg.n_head, cfg.seq_len) if encoding in BIASES else None
        channels = cfg.n_head * (1 if self.bias is None else 2)
        width = int(width or cfg.conv_width)
        self.conv = ScoreConv(channels, cfg.n_head, width, int(kernel), cfg) if kernel else None

    def attention(self, x, at, cache):
        """x (B, L, d) at positions (L,), which are the last of all; cache (2, B, H, L_max, hd) of keys and values."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, hd) each
        if cache is not None:
            cache[:, :, :, at] = torch.stack([k, v])
            k, v = cache[:, :, :, : at[-1] + 1]
        if self.keyconv:  # over the raw keys, so that the cache needs nothing more
            late = F.pad(k.mT.flatten(1, 2), (2, 0))  # (B, d, 2 + L)
            k = k + self.keyconv(late).unflatten(1, (self.n_head, -1)).mT
        if self.rope:
            q, k = rotate(q, at), rotate(k, torch.arange(k.shape[2], device=k.device))
        chunk = self.cfg.chunk if self.cfg.impl == "chunked" else len(at)
        return attend_in_blocks(q, k, v, at, self.bias, self.conv, chunk, causal=self.cfg.task != "che")

    def forward(self, x, at, cache=None):
        a = self.attention(self.ln_1(x), at, cache)  # (B, H, L, hd)
        x = x + self.proj(a.transpose(1, 2).flatten(2))
        return x + self.out(F.gelu(self.fc(self.ln_2(x))))


class Network(nn.Module):
    """Language model, or for che an encoder: embedding, blocks, LayerNorm, head (not tied)."""

    def __init__(self, cfg, arm, vocab):
        super().__init__()
        d, n_layer = cfg.n_embd, int(ARM.fullmatch(arm)[5] or cfg.n_layer)
        self.wte, self.head, self.ln_f = nn.Embedding(vocab, d), nn.Linear(d, vocab, bias=False), nn.LayerNorm(d)
        self.blocks = nn.ModuleList(Block(cfg, arm) for _ in range(n_layer))
        for name, p in self.named_parameters():
            if ".conv." in name or ".bias." in name or ".keyconv." in name or p.ndim < 2:
                continue  # PyTorch's own start
            std = 2 / (n_layer * math.sqrt(d)) if re.search(r"\.(proj|out)\.", name) else math.sqrt(2 / (5 * d))
            nn.init.normal_(p, 0, std)  # (official code: wang_init and small_init)
        for block in self.blocks:
            for linear in (block.qkv, block.proj, block.fc, block.out):
                nn.init.zeros_(linear.bias)

    def forward(self, ids, asked=None, cache=None, start=0):
        """ids (B, L) at positions start, start + 1, ... to logits (B, L, V), or (n, V) of the asked (B, L) ones.
        cache (n_layer, 2, B, H, L_max, hd) is read and filled."""
        assert ids.ndim == 2 and (cache is None or cache.shape[-2] >= start + ids.shape[1])
        x, at = self.wte(ids), torch.arange(start, start + ids.shape[1], device=ids.device)
        for i, block in enumerate(self.blocks):
            x = block(x, at, None if cache is None else cache[i])
        x = self.ln_f(x)
        return self.head(x if asked is None else x[asked])


# ---------------------------------------------------------------- 4. Method (official code)
def score_conv(s, r, w1, b1, w2, b2, past=None, more=0, slope=0.01):
    """F of A = S + R + F: two convolutions along the keys, all heads' scores and biases are channels of the first.

    s (B, H, M, N) scores, r (H, M, N) biases or None, w1 (W, H or 2 H, 1, k), w2 (H, W, 1, k), past (M, N): true where
    a query may look, None: everywhere. Ahead of the convolution the future is zero: else row i would see keys up to
    i + 2p. F at key j reads hidden columns j - p to j + p, and each of those keys as far around it; so row i reads
    hidden columns up to i + p, made of keys it may see. more = p keeps those behind the last key, 0 cuts them off, as
    padding inside Conv2d does. Returns (B, H, M, N)."""
    H, p = s.shape[1], w1.shape[-1] // 2
    assert w1.shape[1] == (H if r is None else 2 * H) and 0 <= more <= p
    hidden = F.conv2d(visible(s, past, more), w1[:, :H], b1, padding=(0, p))  # (B, W, M, N + more)
    if r is not None:  # the convolution is linear: once for all sequences
        hidden = hidden + F.conv2d(visible(r[None], past, more), w1[:, H:], padding=(0, p))
    return F.conv2d(F.leaky_relu(hidden, slope), w2, b2, padding=(0, p))[..., : s.shape[-1]]


def visible(x, past, more):
    """x (B, C, M, N) with zeros where past (M, N) is false, and `more` columns of zeros on the right."""
    x = F.pad(x if past is None else x.masked_fill(~past, 0), (0, more))
    return x.contiguous(memory_format=torch.channels_last)  # the faster order of entries for few channels on a CPU


class ScoreConv(nn.Module):
    """The weights of score_conv; a layer has its own."""

    def __init__(self, channels, n_head, width, kernel, cfg):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, (1, kernel))
        self.conv2 = nn.Conv2d(width, n_head, (1, kernel))
        self.slope, self.edge, self.kernels = cfg.slope, cfg.edge, cfg.kernels

    def forward(self, s, r, past, total):
        """total: keys of the whole input, of which s has the first N."""
        p, N = self.conv1.kernel_size[1] // 2, s.shape[-1]
        more = 0 if past is None else p if self.edge == "extend" else min(p, total - N)
        weights = self.conv1.weight, self.conv1.bias, self.conv2.weight, self.conv2.bias
        return score_conv(s, r, *weights, past, more, self.slope)


def attend(q, k, v, at, bias=None, conv=None, total=0, causal=True):
    """Attention of queries (B, H, M, hd) at positions (M,) to keys and values (B, H, N, hd): (B, H, M, hd)."""
    places = torch.arange(k.shape[2], device=k.device)
    past = places <= at[:, None] if causal else None  # (M, N)
    s = q / math.sqrt(q.shape[-1]) @ k.mT  # (B, H, M, N)
    r = None if bias is None else bias(at, places).to(s)  # (H, M, N)
    if conv and conv.kernels:
        table = None if r is None else bias(places[-1:], places)[:, 0].flip(1)  # (H, N) by distance
        weights = conv.conv1.weight[:, :, 0], conv.conv1.bias, conv.conv2.weight[:, :, 0], conv.conv2.bias
        a = load_kernel("score_conv")(s, table, *weights, row0=int(at[0]), slope=conv.slope)
    else:
        a = s if r is None else s + r
        a = a + conv(s, r, past, total) if conv else a
        a = a.masked_fill(~past, -math.inf) if causal else a
    return a.softmax(-1, dtype=torch.float32).to(v) @ v


def attend_in_blocks(q, k, v, at, bias=None, conv=None, chunk=128, causal=True):
    """attend, exact, by blocks of queries which see the keys up to their end; no tensor of T x T entries is ever there.

    The backward pass computes the scores of a block again. q, k, v (B, H, L, hd), the last L positions in q."""
    total, outs, first = k.shape[2], [], k.shape[2] - len(at)
    if len(at) <= chunk:
        return attend(q, k, v, at, bias, conv, total, causal)
    for i in range(0, len(at), chunk):
        end = min(first + i + chunk, total) if causal else total
        part = q[:, :, i : i + chunk], k[:, :, :end], v[:, :, :end], at[i : i + chunk]
        out = checkpoint(attend, *part, bias, conv, total, causal, use_reentrant=False, preserve_rng_state=False)
        outs.append(out)
    return torch.cat(outs, 2)


# ---------------------------------------------------------------- 5. Evaluation and claims
@torch.no_grad()
def hits(model, batch, device):
    """Share of the asked tokens of each sequence (B,) that are right (numpy)."""
    batch = {name: x.to(device) for name, x in batch.items()}
    right = (model(batch["ids"]).argmax(-1) == batch["target"]) & batch["asked"]  # (B, L)
    return (right.sum(1) / batch["asked"].sum(1).clamp(min=1)).cpu().double().numpy()


@torch.no_grad()
def bits_per_token(model, windows, length, device):
    """Bits a token for the last LAST tokens of windows (B, longest + 1), read from `length` tokens on: (B,) (numpy)."""
    ids = windows[:, -length - 1 :].to(device)
    asked = torch.arange(length, device=device).expand(len(ids), -1) >= length - LAST
    losses = F.cross_entropy(model(ids[:, :-1], asked).float(), ids[:, -LAST:].flatten(), reduction="none")
    return (losses.view(len(ids), LAST).mean(1) / math.log(2)).cpu().double().numpy()


def evaluate(model, cfg, problem, data, device):
    """Column of the table to a number for each held-out sequence; the sequences are the same for every arm and seed.

    recall, che: share of right answers by length, or for che by problem, a mean for each length; text: bits a token."""
    model.eval()
    found, generator = {}, torch.Generator().manual_seed(-1)  # of no training batch: their seeds are not negative
    if cfg.task == "che":
        first, last = lengths(cfg)
        batches = (che_batch(problem, cfg.n_eval, length, generator) for length in range(first, last + 1))
        return {problem: np.array([hits(model, batch, device).mean() for batch in batches])}
    windows = text_windows(data[1], cfg.n_eval, max(lengths(cfg)), generator) if cfg.task == "text" else None
    for length in lengths(cfg):
        if cfg.task == "recall":
            found[str(length)] = hits(model, recall_batch(cfg.n_eval, length, generator), device)
        else:
            parts = windows.split(max(1, 4096 // length))
            found[str(length)] = np.concatenate([bits_per_token(model, part, length, device) for part in parts])
    return found


# Fixed before the first evidence run, from the paper's claims: id, statistic, threshold, what would refute it.
# "arm/column" is a mean over held-out sequences (che: over lengths); a difference is paired, so its interval covers the
# sequences, not the seeds. Bits a byte: less is better, so "a - b" is what b gains.
CLAIMS = dict(
    recall=[
        ("conv-recalls-at-8-times-the-length", "nope+1x3/512", 0.99, "one layer with 1x3 does not find what followed"),
        ("no-conv-does-not", "0.5 - nope/64", 0.0, "one layer without positions or convolution recalls"),
        ("1x1-does-not", "0.5 - nope+1x1/64", 0.0, "mixing heads alone recalls"),
        ("1x1-of-equal-size-does-not", "0.5 - nope+1x1w96/64", 0.0, "it is the parameters, not the neighbours"),
        ("1x1-with-kerple-does-not", "0.5 - kerple+1x1/64", 0.0, "mixing heads and distances recalls"),
        ("conv-of-keys-recalls-too", "nope+keyconv/512", 0.99, "it takes scores; a convolution of keys is not enough"),
    ],
    text=[
        ("1x3-beats-1x1", "kerple+1x1/2048 - kerple+1x3/2048", 0.0, "neighbours add nothing (paper: 4.17 to 4.09)"),
        ("1x1-beats-kerple", "kerple/2048 - kerple+1x1/2048", 0.0, "DAPE V1 adds nothing (paper: 5.09 to 4.17)"),
        ("1x3-gains-by-context", "kerple+1x3/128 - kerple+1x3/2048", 0.0, "longer contexts do not help"),
        ("1x3-gains-by-longer-context", "kerple+1x3/256 - kerple+1x3/2048", 0.0, "longer contexts add nothing"),
        ("1x3-beats-conv-of-keys", "kerple+keyconv/2048 - kerple+1x3/2048", 0.0, "convolved keys do as well"),
        ("1x3-helps-alibi", "alibi/2048 - alibi+1x3/2048", 0.0, "worse for ALiBi, as reviewers found"),
        ("1x3-helps-nope", "nope/2048 - nope+1x3/2048", 0.0, "no better without position information"),
        ("1x3-beats-rope", "rope/2048 - kerple+1x3/2048", 0.0, "RoPE extrapolates as well (paper: 237 to 4.09)"),
    ],
    che=[
        (f"1x3-helps-{name}", f"kerple+1x3/{name} - kerple/{name}", 0.0, "Kerple alone is as good (paper: 8 of 11)")
        for name in PROBLEMS
    ],
)


def interval(x):
    """Mean of (n,) and its 95 % interval; from n = 8 on 1.96 + 2.8 / (n - 1) is Student's quantile, -0.2 to +0.7 %."""
    spread = (1.96 + 2.8 / (len(x) - 1)) * np.std(x, ddof=1) / math.sqrt(len(x))
    return np.mean(x), (np.mean(x) - spread, np.mean(x) + spread)


def statistics(task, table):
    """Claim id to (statistic, interval), where the arms it needs were run. table: "arm/column" to (n,), n >= 8."""
    found = {}
    for name, formula, *_ in CLAIMS[task]:
        *first, last = formula.split(" - ")  # a number or a key of the table, if any, and a key
        if {last, *first} <= {*table, "0.5"} and len(table[last]) >= 8:
            minuend = [0.5 if key == "0.5" else table[key] for key in first]
            found[name] = interval(minuend[0] - table[last] if first else table[last])
    return found


# ---------------------------------------------------------------- 6. Training
def prepare(cfg, run, arm, vocab):
    """Network and optimizer of an arm; every arm starts from the same seed."""
    torch.manual_seed(cfg.seed)
    model = Network(cfg, arm, vocab).to(run.device)
    groups = param_groups(model, cfg.weight_decay)
    return model, torch.optim.AdamW(groups, cfg.lr, (0.9, cfg.beta2), fused=True)


def loss_sum(run, net, part):
    """Summed cross-entropy and number of asked positions."""
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        logits = net(part["ids"], part["asked"])  # (n, V)
    return F.cross_entropy(logits.float(), part["target"][part["asked"]], reduction="sum"), part["asked"].sum()


def train(cfg, run, arm, problem, data, vocab, state):
    """Train one arm on one problem; returns its network. state: what load_state gave, {} for a new run."""
    (model, optimizer), job, step, spent = prepare(cfg, run, arm, vocab), f"{arm} {problem}".strip(), 0, 0.0
    if state.get("job") == job:
        step, spent = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    net = DistributedDataParallel(model) if run.world > 1 else model
    log, began = Log(run, job, cfg.steps, step), time.perf_counter() - spent
    while step < cfg.steps:
        lr = lr_at(step, cfg.lr, cfg.min_lr, cfg.warmup_steps, cfg.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = make_batch(cfg, problem, data, step)
        batch = {name: x[run.rank :: run.world].to(run.device) for name, x in batch.items()}
        loss = accumulate(net, batch, cfg.micro_batch or cfg.batch_size, functools.partial(loss_sum, run))
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        for module in model.modules():
            if isinstance(module, Kerple):
                module.project()
        step += 1
        if step % cfg.log_every == 0:
            rate = step * cfg.batch_size / (time.perf_counter() - began)
            eta = (cfg.steps - step) * cfg.batch_size / rate / 60
            log(step, loss=loss.item(), gnorm=norm.item(), lr=lr, per_s=rate, eta_min=eta)
        stop = should_stop(run)
        if stop or step == cfg.steps or step % cfg.save_every == 0:
            parts = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), done=state.get("done", {}))
            save_state(run, job=job, step=step, seconds=time.perf_counter() - began, **parts)
        if stop:
            stopped(run)
    return model


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


def cost(cfg, arm, vocab, L):
    """Parameters, and FLOPs of a step for a sequence of L: 6 a parameter and token, and those of the scores."""
    with torch.device("meta"):
        model = Network(cfg, arm, vocab)
    n, scored = sum(p.numel() for p in model.parameters()), 0
    for block in model.blocks:
        conv = sum(p.numel() for name, p in block.conv.named_parameters() if "weight" in name) if block.conv else 0
        scored += 12 * cfg.n_embd + 6 * conv
    return n, L * 6 * (n - model.wte.weight.numel()) + L * L * scored // (1 if cfg.task == "che" else 2)


def dry_run(cfg):
    """What a run takes, without allocating a network."""
    vocab = 50304 if cfg.task == "text" and (cfg.data or cfg.scale == "paper") else VOCAB[cfg.task]
    rows, L = cfg.micro_batch or cfg.batch_size, cfg.seq_len
    for arm in cfg.arms.split(","):
        (n, flops), sequences = cost(cfg, arm, vocab, L), cfg.batch_size * cfg.steps
        sequences *= len(cfg.problems.split(",")) if cfg.task == "che" else 1
        scores = rows * min(L, cfg.chunk if cfg.impl == "chunked" else L) * L * (4 * cfg.n_head + 2 * cfg.conv_width)
        memory = (16 * n + rows * L * (34 * cfg.n_layer * cfg.n_embd + 8 * vocab) + 4 * scores) / 2**30
        print(f"{arm}: {n:,} parameters, {sequences * L:.2e} tokens, {sequences * flops:.2e} FLOPs, "
              f"{memory:.2f} GiB per device, {sequences * flops / 100e12 / 3600:.2f} hours on one H100")
    print("assumed: AdamW in fp32, 34 bytes a layer, position and channel, 100 TFLOP/s, no evaluation")


def ledger(cfg, run, data, vocab):
    """Say before training what it takes: measured steps, throughput against a matmul's, the first loss."""
    size = 1024 if run.device.type == "cpu" else 8192
    x, total = torch.randn(size, size, device=run.device, dtype=run.dtype), 0.0
    peak = 2 * size**3 / min(timeit.repeat(lambda: (x @ x).sum().item(), number=1, repeat=5))
    problem, loss = cfg.problems.split(",")[0], functools.partial(loss_sum, run)
    for arm in cfg.arms.split(","):
        model, _ = prepare(cfg, run, arm, vocab)
        batch = make_batch(cfg, problem, data, 0)
        if cfg.task == "che":  # of the mean length
            batch = che_batch(problem, cfg.batch_size, (cfg.seq_len + 1) // 2, torch.Generator().manual_seed(0))
        batch = {name: x.to(run.device) for name, x in batch.items()}
        part = {name: x[: cfg.micro_batch or None] for name, x in batch.items()}
        seconds = min(timeit.repeat(lambda: loss(model, part)[0].backward(), number=1, repeat=3))
        seconds *= len(batch["ids"]) / len(part["ids"])
        summed, count = loss(model, part)
        (n, flops), rate = cost(cfg, arm, vocab, batch["ids"].shape[1]), cfg.batch_size / seconds
        total += seconds * cfg.steps / 60 * (len(cfg.problems.split(",")) if cfg.task == "che" else 1)
        print(f"{arm}: {n:,} parameters | {cfg.steps} steps x {1e3 * seconds:.0f} ms | {rate:.0f} sequences/s, "
              f"{100 * rate * flops / peak:.0f} % of a matmul's {peak / 1e9:.0f} GFLOP/s | "
              f"first nll {summed.item() / count.item():.2f}, uniform {math.log(vocab):.2f}")
    print(f"training will take about {total:.1f} minutes, evaluation not counted"
          + ", more than the 10 minutes of --scale small" * (cfg.scale == "small" and total > 10), flush=True)


# --- block: stop ---
def stopped(run):
    """After Ctrl-C, when the state is saved: say how to go on, and leave."""
    again = shlex.join([sys.executable, *sys.argv]) + " --resume" * ("--resume" not in sys.argv)
    if not run.rank:
        print("stopped; continue with:", again if run.world == 1 else "the same command and --resume")
    raise SystemExit(130)
# --- end block ---


def plot_lengths(path, cfg, metrics):
    """What each arm reaches at each length, a dotted line at the length of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, columns = figure.subplots(), lengths(cfg)
    for arm in cfg.arms.split(","):
        axes.plot(columns, [metrics[f"{arm}/{n}"] for n in columns], marker=".", label=arm)
    axes.axvline(cfg.seq_len, color="gray", linestyle=":")
    axes.set(xscale="log", xticks=columns, xticklabels=columns, xlabel="tokens of context",
             ylabel="right answers" if cfg.task == "recall" else "bits a token")
    axes.minorticks_off()
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- 8. Main
def print_table(metrics):
    """A row for each arm, a column for each length or problem."""
    columns = list(dict.fromkeys(key.split("/")[1] for key in metrics))
    print(f"{'':20}" + "".join(f"{column:>14}" for column in columns))
    for arm in dict.fromkeys(key.split("/")[0] for key in metrics):
        cells = (f"{metrics[f'{arm}/{column}']:.4g}" if f"{arm}/{column}" in metrics else "" for column in columns)
        print(f"{arm:20}" + "".join(f"{cell:>14}" for cell in cells))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = cli(Config, SCALES, argv)
    if cfg.dry_run:
        return dry_run(cfg)
    if cfg.kernels and not torch.cuda.is_available():
        fail("--kernels needs a CUDA device; without the flag the same run takes plain PyTorch")
    data, vocab = (), VOCAB[cfg.task]
    if cfg.task == "text":
        *data, vocab = load_text(cfg)
    run, began = start_run(cfg, "convattn"), time.perf_counter()
    if not run.rank:
        ledger(cfg, run, data, vocab)
    state = load_state(run)
    done, seconds = state.get("done", {}), time.perf_counter() - began
    problems = cfg.problems.split(",") if cfg.task == "che" else [""]
    for arm, problem in ((arm, problem) for arm in cfg.arms.split(",") for problem in problems):
        job = f"{arm} {problem}".strip()
        if job in done:
            continue
        began = time.perf_counter() - (state["seconds"] if state.get("job") == job else 0)
        model = train(cfg, run, arm, problem, data, vocab, state)
        found = {f"{arm}/{column}": x.tolist() for column, x in evaluate(model, cfg, problem, data, run.device).items()}
        done[job] = dict(found=found, seconds=time.perf_counter() - began)
        if run.rank:
            continue
        replace_file(run.out / f"{job.replace(' ', '-')}.safetensors", export(model))
        state = dict(done=done)
        save_state(run, **state)
    if run.rank:
        return
    table = {key: np.array(x) for part in done.values() for key, x in part["found"].items()}
    metrics = {key: float(x.mean()) for key, x in table.items()}
    print_table(metrics)
    if cfg.task != "che":
        plot_lengths(run.out / "plot.png", cfg, metrics)
    digest = hashlib.sha256()
    for part in data:
        digest.update(np.ascontiguousarray(part))
    tried = {arm: TRIED[cfg.task].get(arm, 1) for arm in cfg.arms.split(",")}
    record = dict(tried=tried, metrics=metrics, data_sha256=digest.hexdigest() if data else "")
    record |= dict(minutes=(seconds + sum(part["seconds"] for part in done.values())) / 60)
    return report(cfg, run, "convattn", argv, statistics(cfg.task, table), CLAIMS[cfg.task], **record)


if __name__ == "__main__":
    from_shell(main)
