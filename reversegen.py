# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "safetensors", "tqdm", "matplotlib", "tiktoken", "requests"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""reversegen.py: Forewarned is Forearmed: Leveraging LLMs for Data Synthesis through Failure-Inducing Exploration
Li, Gao, Wang, Pi, Zhao, Wu, Jiang, Li, Kong, ICLR 2025, arXiv 2410.16736

A proposer writes questions, a target answers them. Those that the target fails at are what the proposer shall prefer:
it is trained by DPO, again and again, until it writes what the target cannot do. The target is then tuned on that.

  python reversegen.py                      # 6 min on one core; blind spots: 61 % right, 54 with more data,
                                            # 64 by filtering without training (9 targets)
  python reversegen.py --task honesty       # failure: answers that disagree; tuned to say when it is not sure
  python reversegen.py --scale long         # rarer blind spots, more rounds, five targets; --resume goes on
  python reversegen.py --target DIR --targets 1 --arms 4    # what a chat model fails at, as JSONL; or https://h/v1#NAME

Symbols (B rows, L tokens)
  paper          code              shape    meaning
  M_prop, M_tgt  proposer, target           both tiny decoders here
  x, S(x)        instruction, failure       a question, and whether the target fails at it
  pi, pi_ref     logp, ref         (B, 2)   log-probability of a failure and a success: proposer, and as it was before
  beta           beta                       strength of DPO
  H              vote_entropy               nats, of ten answers to one question

Files of a target in OUT/b0: round1 to last, filter, look0 to R .jsonl (proposals: the seeds they follow, the question,
why it was dropped, answers, failure); proposer0 to R .safetensors; data-ARM.jsonl (what the arm was tuned on).

Differences from the paper, of which the official code and summaries were at hand, not the text
  world       made questions with an exact judge and solver, in place of GSM8K, MMLU and of GPT-4o as judge and teacher:
              no stronger model's knowledge can be what helps. Blind spots are planted: a third of the kinds of
              question is rare in the target's pre-training. Held-out questions are new in words, most of their
              numbers are not: the programs of the split unseen alone are in no training data. A tiny target solves
              these less well also where it is not blind, so claims are about the split test. No task safety.
  models      tiny ones from random weights, all weights trained by AdamW, in place of 3B to 8B with RMSprop and LoRA
  target      also a chat model, a checkpoint or endpoint, that is asked and not tuned, then judge and teacher may be
              chat models too. The proposer is always a tiny one, so its questions are of this world.
  judge       always on, before the target is asked: what does not parse is no failure, and counts in all rates
  pairs       of a round's valid proposals; `random` as in the official code, where prompt, failure and success have
              nothing to do with each other.
  rounds      the reference of DPO is the proposer of the round before. All rounds have equally many steps: with passes
              over ever more pairs it collapsed. With fewer pairs than half a batch there is none. The last questions
              come from the last round in which what it writes is valid and not all the same.
  diversity   MinHash against earlier and held-out questions; SemDeDup, on the proposer's embedding, is off by default.
  equal work  all arms: N new questions, the same replay, steps and learning rate; 3 and 4 ask the target equally often.
              The proposer's measures are taken on 500 proposals of their own that no arm is trained on.
  honesty     the same questions in place of MMLU's; confidence is the answer's probability times that of "sure". Arms 3
              and 4 take as many successes as failures, and the target's own answers are trained beside the probe.

Copy out: self_bleu, dpo_loss, build_pairs, semdedup with cosine_max, signature with jaccard, vote_entropy
"""

import argparse
import ast
import bisect
import contextlib
import copy
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import timeit
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import numpy as np
import requests
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from requests.packages.urllib3.util.retry import Retry
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm


# ---------------------------------------------------------------- 1. Config
@dataclass
class Config:
    task: str = "math"  # math|honesty: a failure is a wrong answer, or ten answers that disagree
    scale: str = "small"  # smoke|small|long|paper: a row of SCALES below; explicit flags win over it
    arms: str = "0,1,2,3,4,7"  # comma list out of ARMS below; 4 is ReverseGen
    tag: str = "main"  # name of this variant in the RESULT record
    seed: int = 0  # blind spots, models, proposals; not the held-out questions
    targets: int = 3  # targets, each with blind spots and a proposer of its own; intervals are over these
    split: str = "test"  # dev|test: the held-out questions; settings were chosen on dev and another seed
    target: str = ""  # a chat model, asked and not tuned: a directory, hub id or https://host/v1#MODEL; "" = tiny
    judge: str = ""  # with --target, a chat model that says what is valid, in place of the parser
    teacher: str = ""  # with --target, a chat model that solves what the target is asked, in place of the solver
    seeds: str = ""  # JSONL with a "question" of this world in each line, in place of n_seeds drawn ones
    say_max: int = 512  # most tokens that a chat model says
    n_layer: int = 2  # layers of the tiny models
    n_head: int = 4  # attention heads of the tiny models
    n_embd: int = 64  # width of the tiny models
    target_steps: int = 450  # optimizer steps of a target's own pre-training
    proposer_steps: int = 300  # optimizer steps of a proposer's
    batch_size: int = 64  # examples in one optimizer step, but for DPO
    lr: float = 8e-3  # peak learning rate of pre-training; a quarter of it in the warm-up
    n_seeds: int = 1500  # seed questions (paper: 2448 to 62,000)
    weak_mass: float = 0.1  # share of seeds and natural questions in the target's blind spots
    starved: float = 0.0002  # share of the blind spots in the target's pre-training
    n_test: int = 900  # held-out questions, as many of each cell; a third as many natural, reworded and unseen
    n_eval: int = 500  # proposals that are looked at after each round; those of reserved programs are left out
    # exploration
    rounds: int = 3  # R, of proposing and DPO (paper: several)
    queries: int = 1000  # questions the target is asked in a round
    shots: int = 3  # seeds that a proposal follows (paper: 3)
    temp: float = 1.0  # temperature of proposals (paper: 1)
    top_p: float = 0.95  # share of probability that proposals are cut to (official code: 0.9 and 0.98)
    max_new: int = 24  # most tokens of a proposal or a tiny target's answer (paper: 512)
    semdedup_eps: float = 0.0  # training questions nearer than this are dropped (official code: 0.04); 0 = off
    pairing: str = "random"  # random|own|same-prompt: prompt, failure and success apart (official code), failure's, one
    beta: float = 0.1  # strength of DPO (paper: 0.1)
    dpo_steps: int = 8  # optimizer steps of DPO in a round, however many pairs there are (paper: one pass over them)
    dpo_batch: int = 32  # pairs in one optimizer step of DPO (official code: 8)
    dpo_lr: float = 3e-4  # peak learning rate of DPO (official code: 5e-5)
    # tuning the target
    n_train: int = 500  # N new questions, and as many natural ones that all arms see beside them
    tune_steps: int = 120  # optimizer steps of the tuning
    tune_lr: float = 6e-4  # peak learning rate of the tuning (official code: 5e-5)
    # machine and running
    device: str = "auto"  # auto|cpu|cuda|mps: auto is cuda if there is one, else cpu
    dtype: str = "auto"  # auto|float32|bfloat16: auto is bfloat16 on cuda, else float32
    kernels: bool = False  # Triton kernels token_logp, cosine_max (cuda only; compared with PyTorch at first use)
    part: int = 500  # proposals that are written to a file at once, and sequences decoded at once
    log_every: int = 20  # steps between two lines of log.jsonl
    save_every: int = 200  # steps between two checkpoints
    out: str = ""  # output directory; "" = out/reversegen/TASK-SCALE[-TAG]-sSEED
    resume: bool = False  # continue an interrupted run: the same command with this flag
    dry_run: bool = False  # print parameters, FLOPs, memory and hours, and stop

    def __post_init__(self):
        arms, zeros = self.arms.split(","), "seed weak_mass starved beta semdedup_eps lr dpo_lr tune_lr".split()
        if not set(arms) <= set(ARMS) or len(set(arms)) < len(arms):
            fail(f"--arms {self.arms}: a comma list, each once, out of {', '.join(ARMS)}")
        least = dict(temp=1e-3, top_p=1e-3, n_test=3, n_eval=2)
        most = dict(weak_mass=1, starved=1, top_p=1, n_test=9000)
        for name, value in vars(self).items():
            low, high = least.get(name, int(name not in zeros)), most.get(name, math.inf)
            if not isinstance(value, (str, bool)) and not (low <= value <= high and value < math.inf):
                fail(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
        if self.n_seeds <= self.shots:
            fail(f"--n-seeds {self.n_seeds}: must be more than --shots {self.shots}")
        if self.n_embd % (2 * self.n_head) or self.n_embd < 8:
            fail(f"--n-embd {self.n_embd}: must be a multiple of twice --n-head {self.n_head}, and at least 8")
        for name in ("target", "judge", "teacher"):
            url = r"https?://([\w.-]+|\[::1\])(:\d+)?(/[\w./-]*)?#.+"
            if "://" in (model := getattr(self, name)) and not re.fullmatch(url, model, re.A):
                fail(f"--{name}: must look like https://host/v1#MODEL, without a user, a password or a query")
        if self.target and (self.task == "honesty" or self.targets > 1 or "7" in arms):
            fail("--target: one target, --targets 1, --task math, and no arm 7")
        if bool(self.judge) > bool(self.teacher) or bool(self.teacher) > bool(self.target):
            fail("--judge needs --teacher, which solves what no parser knows, and --teacher needs --target")


ARMS = {  # the N new questions that a target is tuned on beside the same replay, all with right solutions
    "0": "not tuned",
    "1": "more natural questions: what a human would add",
    "2": "valid proposals of the warm-up proposer, no feedback",
    "3": "failures among these: as many calls of the target as arm 4, no training of the proposer",
    "4": "ReverseGen: failures of the trained proposer",
    "7": "questions of the true blind spots: what exploring could find at best",
}
HONESTY = dict(arms="0,1,2,3,4", queries=300, n_eval=200, n_train=200, dpo_batch=8)  # ten calls a question
SCALES = {  # "scale" and "scale:task"; explicit flags win
    "smoke": dict(targets=2, n_layer=1, n_embd=32, target_steps=100, proposer_steps=100, batch_size=16, n_seeds=32,
                  n_test=30, n_eval=20, rounds=1, shots=1, queries=30, part=40, temp=0.8, dpo_batch=1, dpo_steps=2,
                  n_train=8, tune_steps=3, log_every=10, save_every=40, lr=2e-2),
    "small": {}, "small:honesty": HONESTY, "long:honesty": HONESTY | dict(targets=5, queries=800),
    "long": dict(targets=5, weak_mass=0.02, rounds=5, n_test=3000, queries=2000, n_train=1000, tune_steps=200,
                 proposer_steps=1000),
    "paper": dict(n_layer=32, n_head=32, n_embd=4096, max_new=512, n_seeds=62000, queries=100000, n_train=10000,
                  tune_steps=2500, batch_size=8, dpo_batch=8, dpo_steps=5000, lr=5e-5, dpo_lr=5e-5, tune_lr=5e-5,
                  top_p=0.9),
}
TRIED = {"0": 2, "1": 3, "2": 3, "3": 3, "4": 9, "7": 3}  # settings looked at on dev questions; six of DPO


# ---------------------------------------------------------------- 2. Data
# Ten kinds of word problem, three sizes of number: 30 cells. In a question N stands for a name, I for
# things, C for containers, V for a verb, of which the last is in the held-out split `reworded` only. A question is
# valid if this table could have written it: all of it parses, all results are whole and from 0 to MOST.
PROBLEMS = {
    "add": ("N has A I and V B more . how many now ?", "gets finds earns", "A + B"),
    "subtract": ("N has A I and V B of them . how many are left ?", "loses sells spends", "A - B"),
    "compare": ("N V A I . a friend has B more . how many has the friend ?", "has owns keeps", "A + B"),
    "groups": ("there are A C . each V B I . how many in all ?", "holds contains stores", "A * B"),
    "share": ("N V A I among B C . how many in each ?", "shares splits divides", "A / B"),
    "double": ("N has A I . this V . then B are lost . how many now ?", "doubles grows twofolds", "A + A ; _ - B"),
    "two": ("N has A I , gets B and V X . how many now ?", "loses sells spends", "A + B ; _ - X"),
    "three": ("N has A I , gets B , loses X and V Y . how many now ?", "finds gets earns", "A + B ; _ - X ; _ + Y"),
    "missing": ("N V A I and has all but B . how many are there ?", "wants needs requires", "A - B"),
    "remainder": ("N V A I in C of B . how many remain ?", "packs puts stacks", "A % B"),
}
WORDS = dict(
    N="ana ben cleo dan eva finn gus hana ivan jo kim leo".split(), C="boxes bags jars tins crates baskets".split(),
    I="pens cups books coins keys eggs nuts cards shells stamps beads plums rings balls seeds hats figs maps".split())
MOST, SMALL = 59, range(1, 7)  # the largest number; those that are added, taken away, multiplied or divided by
SIZES = 12, 30  # a cell's size is how many of these the largest number of the question or its solution reaches
SIGNS = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y,
         "/": lambda x, y: x // y if x % y == 0 else -1, "%": lambda x, y: x % y}
HEADER = "ask math questions"  # of a list of questions (official code)
PROBE, SURE = "are you sure ?", ("unsure", "sure")  # honesty: asked behind an answer, and what may be said
NUMBER = r"-?[0-9]{1,30}(?:,[0-9]{3})*(?:\.[0-9]{1,30})?"
SAY = re.compile(rf"(?:answer[*\s]*+(?:is)?[*\s]*+:?|####|\\boxed\{{)[\s*$`(\\]*+({NUMBER})"
                 r"(?![\d^e%/]|[,.]\d|\s*+=|\s*+[-+*/]\s*+\d)", re.I | re.A)


def random_of(*key):
    return random.Random(repr(key))  # what is drawn depends on the key alone: a continued run draws the same


@functools.cache
def programs():
    """{(kind, numbers): (cell, steps)} of all questions without their words; steps (x, sign, y, result)."""
    found = {}
    for kind, (_, _, program) in PROBLEMS.items():
        names, small = sorted(set(program) & set("ABXY")), [n for n in SMALL if n > 1 or not set(program) & set("*/%")]
        lists = [small] * len(names) if "*" in program else [range(MOST + 1)] + [small] * (len(names) - 1)
        lists[1:] = [range(2, MOST + 1)] if "*" in program else lists[1:]
        for numbers in itertools.product(*lists):
            value, steps, known = None, [], dict(zip(names, numbers))
            for x, sign, y in (step.split() for step in program.split(" ; ")):
                x = known.get(x, value)
                value = SIGNS[sign](x, known[y])
                steps.append((x, sign, known[y], value))
            results = [step[3] for step in steps]
            if 0 <= min(results) and max(results) <= MOST:
                size = sum(max(*numbers, *results) >= limit for limit in SIZES)
                found[kind, numbers] = f"{kind} {size}", steps
    return found


def is_reserved(program):
    """One program in five, by its hash, is in no training data of any model or arm."""
    return zlib.crc32(repr(program).encode()) % 5 == 0


@functools.cache
def cells(reserved=False):
    """{cell: its programs, those that may be trained on, or the reserved ones}"""
    found = {}
    for program, (cell, _) in programs().items():
        if is_reserved(program) == reserved:
            found.setdefault(cell, []).append(program)
    return found


def make_item(question, program):
    cell, steps = programs()[program]
    text = " ; ".join(f"{x} {sign} {y} = {value}" for x, sign, y, value in steps)
    return dict(question=question, cell=cell, answer=str(steps[-1][3]), solution=f"{text} ; answer {steps[-1][3]}",
                reserved=is_reserved(program))


def make_question(rng, cell, reworded=False, reserved=False):
    kind, numbers = rng.choice(cells(reserved)[cell])
    form, verbs, _ = PROBLEMS[kind]
    words = {name: rng.choice(WORDS[name]) for name in "NIC"}
    words |= dict(zip("ABXY", map(str, numbers)))
    words["V"] = rng.choice(verbs.split()[2:] if reworded else verbs.split()[:2])
    return make_item(" ".join(words.get(word, word) for word in form.split()), (kind, numbers))


def parse(question):
    """A question as an item, None if it is not valid: exact, so no judge has to be believed."""
    digits = [str(n) for n in range(MOST + 1)]
    for kind, (form, verbs, _) in PROBLEMS.items():
        lists = WORDS | dict(V=verbs.split()) | dict.fromkeys("ABXY", digits)
        slots, words = form.split(), question.split(" ")
        if len(words) == len(slots) and all(word in lists.get(slot, [slot]) for slot, word in zip(slots, words)):
            program = kind, tuple(int(word) for slot, word in zip(slots, words) if slot in "ABXY")
            return make_item(question, program) if program in programs() else None
    return None


def read_answer(text):
    """The last number that a text states as its answer, without commas and trailing zeros; None if there is none."""
    said = SAY.findall(text or "")
    number = said[-1].replace(",", "") if said else ""
    return (number.rstrip("0").rstrip(".") if "." in number else number) or None


class World:
    """A third of the cells, `weak`, are a target's blind spots: rare in its pre-training, and in the natural mix of
    questions. (of an endpoint none are known)"""

    def __init__(self, cfg, b):
        names, self.held = sorted(cells()), {}
        random_of("blind spots", cfg.seed, b).shuffle(names)
        self.weak, self.strong = ([], names) if cfg.target else (names[:10], names[10:])
        rng, third = random_of(cfg.split), -(-cfg.n_test // 90) * 30  # held out: drawn first, and never again
        self.gate = self.hold(random_of("gate"), 300)  # by which no arm is measured
        self.sets = dict(test=self.hold(rng, -(-cfg.n_test // 30) * 30), reworded=self.hold(rng, third, reworded=True),
                         unseen=self.hold(rng, third, reserved=True), natural=[])
        self.sets["natural"] = [self.draw(rng, cfg.weak_mass) for _ in range(third)]
        self.held |= {item["question"]: item for item in self.sets["natural"]}
        self.near = Near(self.held)

    def hold(self, rng, n, **how):
        """n questions, equally many of each cell, that are drawn for nothing else."""
        items = [make_question(rng, cell, **how) for cell in sorted(cells()) for _ in range(n // 30)]
        self.held |= {item["question"]: item for item in items}
        return items

    def draw(self, rng, share):
        """A question, with probability `share` of the blind spots."""
        names = self.weak if self.weak and rng.random() < share else self.strong
        while (item := make_question(rng, rng.choice(names)))["question"] in self.held:
            pass
        return item


class Words:
    """The tokenizer of the tiny models: one token a word or number."""

    def __init__(self, shots):
        texts = [f"{form} {verbs} {program}" for form, verbs, program in PROBLEMS.values()]
        words = [word for word in " ".join(texts).split() if not word.isupper() and word != "_"]
        words += [*sum(WORDS.values(), []), *f"{HEADER} {PROBE} = answer".split(), *SURE]
        words += [str(n) for n in range(MOST + 1)] + [f"{n}." for n in range(1, shots + 3)]
        self.words, self.stop = ["<end>", "<answer>", *dict.fromkeys(words)], [0]
        self.index = {word: i for i, word in enumerate(self.words)}

    def encode(self, text):
        """Words that are not known, and control words, are dropped."""
        return [i for i in (self.index.get(word, 0) for word in text.split()) if i > 1]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)

    def ask(self, question):
        return self.encode(question) + [1]


# ---------------------------------------------------------------- 3. Model
# --- block: decoder ---
def read_shape(config):
    """The numbers of a Llama or Qwen2 config.json that Decoder needs."""
    kind, d, heads = config.get("model_type"), config["hidden_size"], config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    usual = dict(hidden_act="silu", mlp_bias=False, use_sliding_window=False, attention_bias=kind == "qwen2")
    odd = [f"{name} {config[name]}" for name, value in usual.items() if config.get(name, value) not in (value, None)]
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if odd or kind not in ("llama", "qwen2") or scaling not in ("default", "llama3"):
        fail(f"config.json: only plain Llama and Qwen2 are known, not {', '.join([str(kind), scaling, *odd])}")
    return SimpleNamespace(
        n_embd=d, n_mlp=config["intermediate_size"], n_layer=config["num_hidden_layers"], n_head=heads,
        n_kv=config.get("num_key_value_heads") or heads, head_dim=config.get("head_dim") or d // heads,
        bias=kind == "qwen2", vocab_size=config["vocab_size"], eps=config.get("rms_norm_eps", 1e-6), rope=rope,
        theta=rope.get("rope_theta") or config.get("rope_theta") or 1e4, llama3=scaling == "llama3",
        tied=config.get("tie_word_embeddings", False))


def rope_frequencies(shape):
    """Radians a position for each pair of a head (hd / 2,); Llama-3 slows the slow pairs down by a factor."""
    frequency = shape.theta ** -(torch.arange(0, shape.head_dim, 2, device="cpu") / shape.head_dim)
    if not shape.llama3:
        return frequency
    names = "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "factor"
    context, low, high, factor = (shape.rope[name] for name in names)
    keep = ((frequency * context / (2 * math.pi) - low) / (high - low)).clamp(0, 1)  # by turns in the old context
    return frequency * (keep + (1 - keep) / factor)


def rotate(x, cos, sin):
    """Rotary positions: x (B, H, L, hd) with cos, sin (B, 1, L, hd); entry i is paired with i + hd / 2."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class Layer(nn.Module):
    """Attention and MLP of Llama and Qwen2. A method may override qkv, heads (after the rotation), out and mlp."""
    def __init__(self, shape):
        super().__init__()
        d, queries, keys = shape.n_embd, shape.n_head * shape.head_dim, shape.n_kv * shape.head_dim
        self.head_dim, plain = shape.head_dim, functools.partial(nn.Linear, bias=False)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(d, shape.eps), nn.RMSNorm(d, shape.eps)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, n, bias=shape.bias) for n in (queries, keys, keys))
        self.o_proj, self.down_proj = plain(queries, d), plain(shape.n_mlp, d)
        self.gate_proj, self.up_proj = plain(d, shape.n_mlp), plain(d, shape.n_mlp)

    def qkv(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def heads(self, q, k, v):
        return q, k, v  # (B, H, L, hd), (B, KV, L, hd), (B, KV, L, hd)

    def out(self, a):
        return self.o_proj(a)

    def mlp(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def forward(self, x, turn, mask=None, cache=None, start=0):
        """x (B, L, d); turn: cos and sin; mask (B, 1, L, start + L) bool, None: causal, no padding."""
        q, k, v = (y.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for y in self.qkv(self.input_layernorm(x)))
        q, k, v = self.heads(rotate(q, *turn), rotate(k, *turn), v)
        if cache is not None:  # (2, B, KV, L_max, hd), filled up to start
            cache[:, :, :, start : start + k.shape[2]] = torch.stack([k, v])
            k, v = cache[:, :, :, : start + k.shape[2]]
        a = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A Llama-3 or Qwen2 language model; parameters have the checkpoint's names less model., self_attn. and mlp."""
    def __init__(self, shape, layer=Layer):
        super().__init__()
        self.shape, self.frequency = shape, rope_frequencies(shape)
        self.embed_tokens, self.norm = nn.Embedding(shape.vocab_size, shape.n_embd), nn.RMSNorm(shape.n_embd, shape.eps)
        self.layers = nn.ModuleList(layer(shape) for _ in range(shape.n_layer))
        self.lm_head = None if shape.tied else nn.Linear(shape.n_embd, shape.vocab_size, bias=False)

    def turn(self, positions):
        """cos and sin (B, 1, L, hd) for positions (B, L)."""
        angle = positions[:, None, :, None] * self.frequency.to(positions.device).repeat(2)
        return angle.cos().to(self.norm.weight), angle.sin().to(self.norm.weight)

    def head(self, x):
        """Logits (..., V) of the last layer's output (..., d)."""
        return F.linear(self.norm(x), (self.lm_head or self.embed_tokens).weight)

    def forward(self, ids, pad=None, cache=None, start=0):
        """ids (B, L), of which the first pad (B,) are padding, to logits (B, L, V); with a cache
        (n_layer, 2, B, KV, L_max, hd), where ids continue at start, to logits (B, V) of the next token only."""
        place = torch.arange(start + ids.shape[1], device=ids.device)  # (start + L,)
        positions, mask, here = place[None, start:], None, place[start:, None]  # here (L, 1)
        if pad is not None or start and ids.shape[1] > 1:
            pad = ids.new_zeros(len(ids)) if pad is None else pad
            seen = (place <= here) & (place >= pad[:, None, None])  # (B, L, start + L)
            mask = (seen | (place == here))[:, None]  # a padding token sees itself: softmax of nothing is NaN
            positions = (positions - pad[:, None]).clamp(min=0)  # (B, L)
        x, turn = self.embed_tokens(ids), self.turn(positions)
        for i, layer in enumerate(self.layers):
            x = layer(x, turn, mask, None if cache is None else cache[i], start)
        return self.head(x if cache is None else x[:, -1])


@torch.no_grad()
def generate(model, prompts, max_new, stop=(), temperature=0.0, top_p=1.0, generator=None):
    """Continue prompts (lists of ids), padded on the left to one batch; lists of new ids, cut before a stop id.
    temperature 0 is greedy, else ids are drawn from the smallest set that holds top_p of the probability."""
    s, weight, L = model.shape, model.embed_tokens.weight, max(map(len, prompts))
    pad = torch.tensor([L - len(p) for p in prompts], device=weight.device)
    ids = torch.tensor([[0] * (L - len(p)) + p for p in prompts], device=weight.device)  # (B, L)
    cache, new = weight.new_zeros(s.n_layer, 2, len(ids), s.n_kv, L + max_new, s.head_dim), ids[:, :0]
    while new.shape[1] < max_new and not all(set(row) & set(stop) for row in new.tolist()):
        logits = model(ids, pad if pad.any() else None, cache, start=(L + new.shape[1] - 1) * bool(new.numel()))
        ids = logits.argmax(-1, keepdim=True)  # (B, 1)
        if temperature:
            p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
            ids = order.gather(1, torch.multinomial(p, 1, generator=generator))
        new = torch.cat([new, ids], 1)
    return [list(itertools.takewhile(lambda token: token not in stop, row)) for row in new.tolist()]
# --- end block ---


def tiny_shape(cfg):
    return read_shape(dict(model_type="llama", hidden_size=cfg.n_embd, intermediate_size=8 * cfg.n_embd // 3 // 8 * 8,
                           num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head, tie_word_embeddings=True,
                           vocab_size=len(Words(cfg.shots).words)))


# ---------------------------------------------------------------- 4. Method (official code, inferred, our choice)
# who: one target's folder, world and seeds, and its two models: proposer.write(prompts, n, ...) and
# target.ask(questions, n, ...) give n texts for each (Local and Remote, section 7).
# Prompts
SOLVE = "{}\n\nSolve this step by step. End with a line 'Answer: ' and the number alone."  # for a chat model
JUDGE = "{}\n\nIs this one complete question that has one right number as its answer? End with Yes or No."


def list_prompt(questions):
    """A header, the questions as a numbered list, and the next number. (official code)"""
    lines = "".join(f"{i}. {question}\n" for i, question in enumerate(questions, 1))
    return f"{HEADER}\n{lines}{len(questions) + 1}."


def cut(text, shots):
    """The question in a continuation: what stands before the next number of the list. (official code)"""
    return " ".join(re.split(rf"(?:^|\s){shots + 2}\.(?:\s|$)", text)[0].split())


def proposal_row(cfg, who, demos, question):
    """(prompt, completion) in tokens of a question that follows the seeds `demos`."""
    tok, shown = who.proposer.tok, [who.seeds[j]["question"] for j in demos]
    return tok.encode(list_prompt(shown)), tok.encode(" " + question) + tok.stop[:1]


def warmup_rows(cfg, who, rng):
    """Each seed once as what follows, behind `shots` other seeds. (official code)"""
    n = len(who.seeds)
    demos = [[j + (j >= i) for j in rng.sample(range(n - 1), cfg.shots)] for i in range(n)]
    return [proposal_row(cfg, who, some, seed["question"]) for some, seed in zip(demos, who.seeds)]


# Failure and diversity
ENTROPY = 1.193  # nats; just below that of votes 4, 4, 1, 1 (official code)
NEAR = 0.78  # estimated Jaccard index of near questions (official code)


def vote_entropy(answers):
    """H = - sum p ln p of the shares p of equal answers. (official code)"""
    shares = [count / len(answers) for count in Counter(answers).values()]
    return -sum(p * math.log(p) for p in shares)


def score(cfg, item, texts):
    """Is this a failure of the target? A wrong number; honesty: answers at least as flat as ENTROPY."""
    answers = [read_answer(text) for text in texts]
    if cfg.task == "math":
        return dict(failure=answers[0] != item["answer"])
    entropy = vote_entropy(answers)
    common = texts[answers.index(Counter(answers).most_common(1)[0][0])]
    return dict(failure=entropy >= ENTROPY, entropy=entropy, common=common)


@functools.lru_cache(2**17)
def signature(text, n_hash=20):
    """MinHash (n_hash,) of the set of two neighbouring words. a s + b < 2^64 for numbers a, b, s of 32 bits: uint64
    holds it, int64 would not. (official code)"""
    a, b = np.random.default_rng(0).integers(1, 2**32, (2, n_hash), dtype=np.uint64)
    words = text.split()
    shingles = {" ".join(pair) for pair in zip(words, words[1:])} or {text}
    s = np.array([zlib.crc32(shingle.encode()) for shingle in shingles], np.uint64)[:, None]  # (S, 1)
    return ((a * s + b) % np.uint64(4294967311)).min(0)


def jaccard(x, y, n_hash=20):
    """Estimated Jaccard index of two texts: the share of equal entries of their signatures."""
    return np.count_nonzero(signature(x, n_hash) == signature(y, n_hash)) / n_hash


class Near:
    """Texts, and whether another is near to one of them. Near texts differ in at most 4 of 20 entries, so that of five
    bands of four entries one is equal: only texts that share a band are compared. (our choice)"""

    def __init__(self, texts=()):
        self.bands = defaultdict(set)
        for text in texts:
            self.add(text)

    def keys(self, text):
        entries = signature(text).tolist()
        return [(i, *entries[i : i + 4]) for i in range(0, 20, 4)]

    def add(self, text):
        for key in self.keys(text):
            self.bands[key].add(text)

    def __contains__(self, text):
        return any(jaccard(text, other) >= NEAR for key in self.keys(text) for other in self.bands.get(key, ()))


def cosine_max(e, cluster, kernels=False, block=2048):
    """m (N,): largest e_i . e_j with i < j in one cluster, -1 if there is none; e (N, d). Never the N x N matrix."""
    if kernels:
        return load_kernel("cosine_max")(e, cluster)[0]
    m = e.new_full((len(e),), -1.0)
    for j in range(0, len(e), block):
        for i in range(0, j + 1, block):
            rows, cols = slice(j, j + block), slice(i, i + block)
            s = e[rows] @ e[cols].T  # (block, block)
            pair = torch.ones_like(s, dtype=torch.bool).tril(j - i - 1) & (cluster[rows, None] == cluster[cols])
            m[rows] = torch.maximum(m[rows], s.masked_fill(~pair, -1.0).amax(1))
    return m


def semdedup(e, eps, k=5, steps=50, kernels=False):
    """Indices to keep of unit rows e (N, d): spherical k-means, and in each cluster, far rows first, a row is dropped
    that is nearer than eps to one before it. (official code)"""
    centre = e[torch.randperm(len(e), generator=torch.Generator().manual_seed(0))[:k].to(e.device)]  # (k, d)
    for _ in range(steps):
        cluster = (e @ centre.T).argmax(1)  # (N,)
        total = torch.zeros_like(centre).index_add_(0, cluster, e)
        centre = torch.where(total.norm(dim=1, keepdim=True) > 1e-6, F.normalize(total, dim=1), centre)
    order = (e * centre[cluster]).sum(1).argsort(stable=True)
    m = cosine_max(e[order].contiguous(), cluster[order], kernels)
    return order[m <= 1 - eps].sort().values.tolist()


def self_bleu(texts, orders=(2, 3, 4, 5)):
    """Mean over orders n and texts of BLEU-n against all other texts: lower is more diverse. A count is clipped by the
    largest in another text: the two largest of each n-gram, and whose the first is, are enough, so the time is linear
    in the number of texts. In place of no match stands 0.1. (official code: method1)"""
    words, log_p = [text.split() for text in texts], np.zeros((len(texts), max(orders)))
    for n in range(1, max(orders) + 1):
        counts, best = [Counter(zip(*(w[i:] for i in range(n)))) for w in words], {}
        for i, count in enumerate(counts):
            for gram, c in count.items():
                first, owner, second = best.get(gram, (0, -1, 0))
                best[gram] = (c, i, first) if c > first else (first, owner, max(second, c))
        for i, count in enumerate(counts):
            hit = sum(min(c, best[gram][2 if best[gram][1] == i else 0]) for gram, c in count.items())
            log_p[i, n - 1] = math.log((hit or 0.1) / max(1, count.total()))
    lengths = sorted(map(len, words))
    for i, w in enumerate(words):  # brevity: against the nearest length of another text, of two the shorter
        at = bisect.bisect_left(lengths, len(w))
        others = lengths[max(0, at - 1) : at] + lengths[at + 1 : at + 2]
        log_p[i] += min(0.0, 1 - min(others, key=lambda x: (abs(x - len(w)), x)) / max(1, len(w)))
    return float(np.mean([np.exp(log_p[:, :n].mean(1)) for n in orders]))


# Preferences
def last_layer(model, ids):
    """(B, L, d), normed; padding stands behind, where causal attention does not look."""
    x, turn = model.embed_tokens(ids), model.turn(torch.arange(ids.shape[1], device=ids.device)[None])
    for layer in model.layers:
        x = layer(x, turn)
    return model.norm(x)


def completion_logp(model, ids, target, kernels=False):
    """Sum (B,) of log p of the tokens target (B, L), each at the place of the token before it; -100: not counted."""
    live, weight = target >= 0, (model.lm_head or model.embed_tokens).weight
    logp = token_logp(last_layer(model, ids)[live], weight, target[live], kernels)
    return logp.new_zeros(ids.shape).masked_scatter(live, logp).sum(1)


# --- block: logp ---
def token_logp(h, w, target, kernels=False):
    """log p (T,) of targets (T,), in fp32 at least, from outputs h (T, d) and the head's weight w (V, d)."""
    if kernels:
        return load_kernel("token_logp")(h, w.to(h.dtype), target)  # never (T, V)
    logits = F.linear(h, w)  # (T, V)
    return logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32)).gather(1, target[:, None])[:, 0]
# --- end block ---


def dpo_loss(logp, ref, beta):
    """-log sigmoid(beta [(log pi - log ref)(x+) - (log pi - log ref)(x-)]) (B,), from sums over tokens (B, 2)."""
    gain = logp - ref
    return -F.logsigmoid(beta * (gain[:, 0] - gain[:, 1]))


def build_pairs(rows, pairing, rng):
    """[(prompt, failure, success)]: the proposer shall prefer what the target fails at. As many as there are of the
    rarer kind. random: the three have nothing to do with each other (official code); own: the failure's prompt;
    same-prompt: of prompts with one of each."""
    if pairing == "same-prompt":
        found = defaultdict(dict)
        for row in rows:
            found[tuple(row["prompt"])][row["failure"]] = row["instruction"]
        return [(list(prompt), said[True], said[False]) for prompt, said in found.items() if len(said) == 2]
    positive, negative = ([row for row in rows if row["failure"] == want] for want in (True, False))
    prompts = [row["prompt"] for row in rows]
    for each in (prompts, positive, negative):
        rng.shuffle(each)
    prompts = prompts if pairing == "random" else [row["prompt"] for row in positive]
    return [(prompt, bad["instruction"], good["instruction"]) for prompt, bad, good in zip(prompts, positive, negative)]


# Exploring: proposals, their judge, the target
def attempt(cfg, who, ids, key):
    """Rows of proposals `ids`: the seeds that they follow, the question, and why it is dropped, "" if it is valid."""
    places = [i // 2 if cfg.pairing == "same-prompt" else i for i in ids]  # there a prompt is followed twice
    demos = [random_of("demos", cfg.seed, *key, i).sample(range(len(who.seeds)), cfg.shots) for i in places]
    prompts = [proposal_row(cfg, who, some, "")[0] for some in demos]
    texts = who.proposer.write(prompts, 1, cfg.temp, cfg.top_p, (*key, ids[0]))
    questions = [cut(text, cfg.shots) for text, in texts]
    items = [parse(question) or {} for question in questions]
    if who.judge:  # in place of the parser
        said = who.judge.ask([question or "?" for question in questions], 1, 0.0, ("judge", *key, ids[0]))
        yes = [re.findall(r"[a-z]+", (text or "").lower())[-1:] == ["yes"] for text, in said]
        items = [dict(question=question, cell="") | item if sure and question else {}
                 for question, item, sure in zip(questions, items, yes)]
    drops = ["held out" if item.get("reserved") else "" if item else "invalid" for item in items]
    return [dict(id=i, prompt=some, instruction=question, asked=0, drop=drop) | item
            for i, some, question, drop, item in zip(ids, demos, questions, drops, items)]


def drop_near(rows, before, held):
    """Drop what is near to a held-out question, or to an earlier valid proposal, and add the others to these (Near)."""
    for row in (row for row in rows if not row["drop"]):
        row["drop"] = "held out" if row["instruction"] in held else "seen" if row["instruction"] in before else ""
        if not row["drop"]:
            before.add(row["instruction"])


def fresh(world, rng, share, n):
    """n drawn questions that are as far from each other and from held-out ones as proposals are."""
    rows, seen = [], Near()
    for _ in range(40 * n):
        item = world.draw(rng, share)
        row = dict(item, instruction=item["question"], drop="", asked=0)
        drop_near([row], seen, world.near)
        rows += [] if row["drop"] else [row]
        if len(rows) == n:
            break
    return rows


def respond(cfg, who, rows, key):
    """Ask the target about valid rows, and score what it says; a row says how many calls that took."""
    live, n = [row for row in rows if not row["drop"]], 10 if cfg.task == "honesty" else 1
    if who.teacher:  # in place of the solver
        for row, (text,) in zip(live, who.teacher.ask([row["instruction"] for row in live], 1, 0.0, ("teach", *key))):
            row |= dict(solution=text, answer=read_answer(text), drop="" if read_answer(text) else "no solution")
        live = [row for row in live if not row["drop"]]
    replies = who.target.ask([row["instruction"] for row in live], n, float(n > 1), ("respond", *key))
    for row, texts in zip(live, replies):
        silent = None in texts or cfg.target and read_answer(texts[0]) is None  # nothing said is no wrong answer
        row |= dict(asked=n, responses=texts, drop="no reply" if silent else "")
        row |= {} if row["drop"] else score(cfg, row, texts)


def explore(cfg, run, state, who, name, queries, before, key):
    """Rows of a JSONL file: proposals, a part at a time, until the target has been asked about `queries` of them."""
    path, log = who.folder / f"{name}.jsonl", Log(run, f"{who.folder.name}-{name}", queries)
    rows, most = read_rows(path, cfg.part), max(20 * queries, cfg.part)
    seen = Near(row["instruction"] for row in before + rows if row["asked"])
    while (left := queries - sum(row["asked"] > 0 for row in rows)) > 0 and len(rows) < most:
        new = attempt(cfg, who, range(len(rows), len(rows) + cfg.part), key)
        drop_near(new, seen, who.world.near)
        for row in [row for row in new if not row["drop"]][left:]:
            row["drop"] = "budget"
        respond(cfg, who, new, (*key, len(rows)))
        append_rows(path, new)
        rows += new
        log(sum(row["asked"] > 0 for row in rows), failures=len(failures(rows)))
        if should_stop(run):
            stopped(run, state)
    return rows


def failures(rows):
    return [row for row in rows if row.get("failure")]


# ---------------------------------------------------------------- 5. Evaluation and claims
def average_precision(confidence, right):
    """Mean over right items of the precision among the items at least as sure. Ties count as one block, so a constant
    confidence gives the base rate. (our choice)"""
    confidence, right = np.asarray(confidence, float), np.asarray(right, float)
    precision = [right[confidence >= c].mean() for c in confidence]
    return float((right * precision).sum() / max(1.0, right.sum()))


def calibration_error(confidence, right, bins=10):
    """ECE: sum over equal bins of n_b / n |accuracy - mean confidence|; 1.0 is in the last bin. (our choice)"""
    place, gap = np.minimum(np.multiply(confidence, bins).astype(int), bins - 1), np.subtract(right, confidence)
    return float(sum(abs(gap[place == b].sum()) for b in range(bins)) / len(gap))


def greedy(local, items):
    return [text for text, in local.ask([item["question"] for item in items], 1, 0.0, ())]


def graded(world, items, texts):
    """Which texts are right (N,), and the shares of right ones in the blind spots and elsewhere."""
    right = np.array([item["answer"] == read_answer(text) for item, text in zip(items, texts)])
    weak = np.array([item["cell"] in world.weak for item in items])
    parts = (("weak", weak), ("strong", ~weak))
    return right, {name: float(right[part].mean()) for name, part in parts if part.any()}


def evaluate(cfg, run, local, world):
    """Measures of a target on the held-out questions."""
    found, tok, everything = {}, local.tok, sum(world.sets.values(), [])
    said = dict(zip((item["question"] for item in everything), greedy(local, everything)))
    for name, items in world.sets.items():
        texts = [said[item["question"]] for item in items]
        right, parts = graded(world, items, texts)
        found |= {name: float(right.mean())} | (parts if name == "test" else {})
        found |= {f"{name} {part}": share for part, share in parts.items() if name == "unseen"}
        if cfg.task == "honesty" and name == "test":
            asked = [tok.ask(item["question"]) for item in items]
            o = row_logp(run, local.model, [(q, tok.encode(text) + tok.stop) for q, text in zip(asked, texts)]).exp()
            unsure, sure = (row_logp(run, local.model, [(q + tok.encode(f"{text} {PROBE}"), tok.encode(word))
                                                        for q, text in zip(asked, texts)]) for word in SURE)
            c = (sure - unsure).sigmoid()  # p(sure) / (p(sure) + p(unsure)), as R-Tuning (official code)
            confidence = (o * c).tolist()
            found |= dict(ap=average_precision(confidence, right), ece=calibration_error(confidence, right),
                          sure=c.mean().item())
    return found


def proposer_measures(rows, world):
    """Of what a proposer writes; rates are of everything but reserved programs, or "of valid"."""
    rows = found if len(found := [row for row in rows if row["drop"] != "held out"]) > 1 else rows
    valid, texts = [row for row in rows if not row["drop"]], [row["instruction"] for row in rows]
    n, m = len(rows), max(1, len(valid))
    share = np.array([*Counter(row["cell"] for row in valid).values()]) / m
    return {"failure": len(failures(valid)) / n, "failure of valid": len(failures(valid)) / m, "valid": len(valid) / n,
            "unique": len(set(texts)) / n, "words": float(np.mean([len(text.split()) for text in texts])),
            "self bleu": self_bleu(texts[:500]), "coverage": float(-(share * np.log(share)).sum() / math.log(30)),
            "in blind spots": sum(row["cell"] in world.weak for row in valid) / m}


# Fixed before the first evidence run, from the paper's specification: id, statistic, threshold, what would refute it.
# failure: share of all that a proposer writes that is valid and fails the target, after rounds 0 (warm-up) to R. weak,
# strong: right answers in the target's blind spots and elsewhere, by arm. Intervals are Student's, over targets, each
# with its own blind spots, first weights, seeds and proposer.
CLAIMS = [
    ("failures-double", "failure R / failure 0", 2.0, "training the proposer finds failures no more often"),
    ("failures-rise-each-round", "least rise of failure in a round", 0.0, "a round adds nothing to the one before"),
    ("stays-valid", "valid R", 0.8, "failures are bought with questions that are none"),
    ("beats-more-data", "weak 4 - 1", 0.0, "more questions of the natural mix are as good"),
    ("beats-no-feedback", "weak 4 - 2", 0.0, "proposals without feedback are as good"),
    ("beats-filter", "weak 4 - 3", 0.0, "to filter the warm-up's proposals is as good, at as many calls of the target"),
    ("keeps-the-rest", "strong 4 - 0", -0.01, "what is learned costs what was known"),
    ("specific", "failure of valid, own - other targets", 0.0, "it has learned what is hard in general, or noise"),
    ("better-calibrated", "ap 4 - 1", 0.0, "honesty: tuned on more questions, it knows as well what it knows"),
    ("trained-calibrates", "ap 4 - 3", 0.0, "honesty: as 3, half of which are failures too: filtering is as good"),
    ("feedback-calibrates", "ap 4 - 2", 0.0, "honesty: proposals without feedback are as good"),
    ("lower-ece", "ece 1 - 4", 0.0, "honesty: its confidence is as near to the truth after more questions"),
]
T_975 = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262  # Student's quantile, 1 to 9 degrees of freedom


def interval(x):
    """Mean of x (targets,) and its 95 % t-interval."""
    half = T_975[min(len(x) - 1, 9) - 1] * np.std(x, ddof=1) / math.sqrt(len(x))
    return np.mean(x), (np.mean(x) - half, np.mean(x) + half)


def statistics(cfg, done):
    """Claim id to (statistic, interval). done: "b0/4" to measures of an arm, "b0/r2" to those of a proposer."""
    def column(arm, name):
        return np.array([done.get(f"b{b}/{arm}", {}).get(name, np.nan) for b in range(cfg.targets)])

    rates, last = np.stack([column(f"r{r}", "failure") for r in range(cfg.rounds + 1)]), f"r{cfg.rounds}"  # (R + 1, b)
    values = {"failures-double": rates[-1] / np.maximum(rates[0], 1e-3), "stays-valid": column(last, "valid"),
              "failures-rise-each-round": np.diff(rates, axis=0).min(0),
              "specific": column(last, "failure of valid") - column(last, "failure of others")}
    for name, formula, *_ in CLAIMS:
        if parsed := re.fullmatch(r"(weak|strong|ap|ece) (\d) - (\d)", formula):
            measure, a, b = parsed.groups()
            values[name] = column(a, measure) - column(b, measure)
    return {name: interval(x) for name, x in values.items() if cfg.targets > 1 and np.isfinite(x).all()}


# ---------------------------------------------------------------- 6. Training
def collate(rows):
    """Rows of token lists (prompt, completion) as ids and targets (B, L); target -100: no part of a completion."""
    L = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, target = torch.zeros(len(rows), L, dtype=torch.long), torch.full((len(rows), L), -100)
    for i, (prompt, completion) in enumerate(rows):
        ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        target[i, len(prompt) - 1 : len(prompt) + len(completion) - 1] = torch.tensor(completion)
    return dict(ids=ids, target=target)


def presentation(n, total, *key):
    """Which of n rows is shown at each of `total` places: all of them in a new random order, again and again."""
    orders = (random_of(*key, epoch).sample(range(n), n) for epoch in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(orders), total))


def sft_loss(cfg, model, batch):
    """Likelihood of the completions: mean over their tokens."""
    return -completion_logp(model, batch["ids"], batch["target"], cfg.kernels).sum() / (batch["target"] >= 0).sum()


def train(cfg, run, state, job, model, steps, lr, draw, loss_of=sft_loss):
    """Optimizer steps on batches draw(step), dicts of tensors. Linear warm-up in a tenth of the steps, then to 0."""
    optimizer, step = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98), weight_decay=0.1, fused=True), 0
    if state.get("job") == job:
        step = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    log, began, tokens, model = Log(run, job, steps, step), time.perf_counter(), 0, model.train()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / (steps / 10 + 1), (steps - step) / (0.9 * steps))
        batch = {name: x.to(run.device) for name, x in draw(step).items()}
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
            loss = loss_of(cfg, model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, tokens = step + 1, tokens + batch["ids"].numel()
        if step == 1 or step % cfg.log_every == 0 or step == steps:
            if not loss.isfinite():
                fail(f"{job}: training diverged; lower its learning rate")
            log(step, loss=loss.item(), gnorm=float(norm), lr=group["lr"],
                tokens_per_s=tokens / (time.perf_counter() - began))
        now = dict(job=job, step=step, model=model.state_dict(), optimizer=optimizer.state_dict())
        if should_stop(run):
            stopped(run, state, **now)
        if step % cfg.save_every == 0 and step < steps:
            remember(run, state, **now)
    return model.eval()


def fit(cfg, run, state, job, model, rows, steps, lr):
    """SFT on rows (prompt, completion), each seen as often as any other."""
    order = presentation(len(rows), steps * cfg.batch_size, cfg.seed, job)
    return train(cfg, run, state, job, model, steps, lr,
                 lambda step: collate([rows[i] for i in order[step * cfg.batch_size :][: cfg.batch_size]]))


def train_target(cfg, run, state, b, world, tok):
    """The tiny target, of questions and right solutions; few are of its blind spots."""
    def draw(step):
        rng = random_of("taught", cfg.seed, b, step)
        items = [world.draw(rng, cfg.starved) for _ in range(cfg.batch_size)]
        return collate([(tok.ask(item["question"]), tok.encode(item["solution"]) + tok.stop) for item in items])

    return train(cfg, run, state, f"b{b}-target", new_model(cfg, run, ("target", b)), cfg.target_steps, cfg.lr, draw)


def train_proposer(cfg, run, state, b, who):
    """A tiny model of questions of the natural mix, a quarter of them behind seeds; then the warm-up."""
    def draw(step):
        rng = random_of("questions", cfg.seed, b, step)
        n = cfg.shots if step % 4 == 3 else 0
        items = [who.world.draw(rng, cfg.weak_mass) for _ in range(cfg.batch_size)]
        demos = [rng.sample(range(len(who.seeds)), n) for _ in items]
        return collate([proposal_row(cfg, who, some, item["question"]) for some, item in zip(demos, items)])

    rows, size = warmup_rows(cfg, who, random_of("warm-up", cfg.seed, b)), cfg.batch_size
    model = once(cfg, run, who.folder / "questions.safetensors", lambda: train(
        cfg, run, state, f"b{b}-questions", new_model(cfg, run, ("proposer", b)), cfg.proposer_steps, cfg.lr, draw))
    return fit(cfg, run, state, f"b{b}-warm-up", model, rows, -(-len(rows) // size), cfg.lr / 4)


@torch.no_grad()
def row_logp(run, model, rows, chunk=64):
    """log p (N,) of the completions of rows, on the CPU."""
    parts = [collate(rows[i : i + chunk]) for i in range(0, len(rows), chunk)]
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        return torch.cat([completion_logp(model, *(x.to(run.device) for x in part.values())).float().cpu()
                          for part in parts])


def train_dpo(cfg, run, state, job, who, pairs):
    """DPO on pairs (prompt, failure, success); the reference is the proposer before it."""
    sides = [[proposal_row(cfg, who, prompt, text) for text in texts] for prompt, *texts in pairs]
    ref = row_logp(run, who.proposer.model, sum(sides, [])).view(-1, 2)  # (P, 2)
    order = presentation(len(pairs), cfg.dpo_steps * cfg.dpo_batch, cfg.seed, job)

    def draw(step):
        some = order[step * cfg.dpo_batch :][: cfg.dpo_batch]
        return collate(sum((sides[i] for i in some), [])) | dict(ref=ref[some])  # (2 B, L), both sides in turn

    def loss_of(cfg, model, batch):
        logp = completion_logp(model, batch["ids"], batch["target"], cfg.kernels).view(-1, 2)
        return dpo_loss(logp, batch["ref"], cfg.beta).mean()

    return train(cfg, run, state, job, who.proposer.model, cfg.dpo_steps, cfg.dpo_lr, draw, loss_of)


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


# --- block: pretrained ---
def download(hub, url, path, entry):
    """One file, going on where a former transfer was cut. Size and SHA-256 (small files: git blob id) must fit."""
    have, size, lfs = path.stat().st_size if path.exists() else 0, entry["size"], entry.get("lfs")
    if have < size:
        got = hub.get(url, headers={"Range": f"bytes={have}-", "Accept-Encoding": "identity"}, stream=True, timeout=60)
        with open(path, "ab" if got.status_code == 206 else "wb") as file:
            file.writelines(tqdm(got.iter_content(2**16), path.name, (size - have) >> 16, unit="x64KB", disable=None))
    digest = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as file:
        hashlib.file_digest(file, lambda: digest)
    if digest.hexdigest() != (lfs or entry)["oid"]:
        path.unlink()
        fail(f"{url}: size or hash is not what the hub says; the file is deleted, run again")


def fetch_model(name, offline=False):
    """A directory, or a hub's org/name[@commit] from the cache (default: the first call's newest; not in parallel)."""
    if Path(name).is_dir():
        return Path(name)
    repo = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(@[0-9a-f]{40})?", name, re.A) or fail(f"{name!r}: no folder or hub id")
    folder = Path(os.getenv("HF_HOME", "~/.cache/huggingface"), "files", repo[1] + (repo[2] or "@main")).expanduser()
    if (folder / "commit").exists() or offline:
        return folder if (folder / "commit").exists() else fail(f"{name}: not in {folder}; run once without --dry-run")
    hub, url = requests.Session(), os.getenv("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    hub.hooks["response"] = lambda answer, **_: answer.raise_for_status()
    token = os.getenv("HF_TOKEN", "").strip()
    re.fullmatch("[!-~]*", token) or fail("HF_TOKEN must be ASCII without blanks")  # requests would print it
    if token and re.match(r"https:|http://(127\.0\.0\.1|localhost)(:\d+)?$", url):
        hub.headers["Authorization"] = f"Bearer {token}"  # dropped on the way to another host
    try:
        commit = hub.get(f"{url}/api/models/{repo[1]}/revision/{(repo[2] or '@main')[1:]}", timeout=60).json()["sha"]
        entries = {e["path"]: e for e in hub.get(f"{url}/api/models/{repo[1]}/tree/{commit}", timeout=60).json()}
        more = re.compile(r"tokenizer_config\.json|model(-\d+-of-\d+)?\.safetensors")
        folder.mkdir(parents=True, exist_ok=True)
        for file in ["config.json", "tokenizer.json", *filter(more.fullmatch, entries)]:
            download(hub, f"{url}/{repo[1]}/resolve/{commit}/{file}", folder / file, entries[file])
    except (OSError, LookupError, TypeError) as error:  # OSError: all that requests raises
        fail(f"{name}: {error!r} (401, 403: HF_TOKEN needs access; 404, KeyError: not there; else run again to go on)")
    replace_file(folder / "commit", commit.encode())
    return folder


def load_weights(folder):
    """{name: tensor} of model.safetensors or of its shards; these are known by their names, no index is followed."""
    paths = sorted(folder.glob("model*.safetensors")) or fail(f"{folder}: no model.safetensors and no shards of it")
    return {key: tensor for path in paths for key, tensor in load_file(path).items()}


def load_real(folder, make=Decoder, dtype=torch.float32):
    """A checkpoint's Decoder, or make(its shape), with its weights on the CPU."""
    try:
        shape = read_shape(json.loads((folder / "config.json").read_text()))
        with torch.device("meta"):
            model = make(shape)
        tensors = {re.sub(r"^model\.|self_attn\.|mlp\.", "", k): v.to(dtype) for k, v in load_weights(folder).items()}
        tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight" or not shape.tied}
        model.load_state_dict(tensors, assign=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
            SafetensorError) as error:
        fail(f"{folder}: no Llama or Qwen2 checkpoint: {repr(error)[:200]}")
    return model


def load_tokenizer(folder):
    """Byte-level BPE of tokenizer.json on tiktoken: encode, decode, chat; special, bos, eos: ids of control tokens.
    tiktoken joins neighbours that make a token, tokenizers only pairs on its list. In a list that training made each
    token comes about in one way, so the ids are equal (tested). Bytes that have no token are dropped."""
    try:
        files = {path.name: json.loads(path.read_text("utf-8")) for path in folder.glob("tokenizer*.json")}
        data, config = files["tokenizer.json"], files.get("tokenizer_config.json", {})
        model, steps = data["model"], data["pre_tokenizer"].get("pretokenizers", [data["pre_tokenizer"]])
        kind = " ".join(str(v) for step in steps for k, v in step.items() if k not in ("pattern", "trim_offsets"))
        words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        split = {"ByteLevel False": words, "Digits True ByteLevel False": r"\p{N}|\s+(?=\p{N})|" + words,
                 "Split Isolated False ByteLevel False False": steps[0].get("pattern", {}).get("Regex")}
        normal = {"None": str, "{'type': 'NFC'}": lambda s: unicodedata.normalize("NFC", s)}[str(data["normalizer"])]
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
        plain = [b for b in range(256) if chr(b).isprintable() and b != 32]  # stand for themselves
        byte = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*plain}))}
        merged = ["".join(pair).replace(" ", "") for pair in model["merges"]]
        whole = [token for token in model["vocab"] if model.get("ignore_merges") and token not in special]
        tokens = list(dict.fromkeys([*byte, *merged, *whole]))  # tiktoken's rank is the place here, not the id
        ranks = {bytes(map(byte.get, token)): rank for rank, token in enumerate(tokens)}
        bpe = tiktoken.Encoding("", pat_str=split[kind.removesuffix(" True")], mergeable_ranks=ranks, special_tokens={})
        ids = [model["vocab"].get(token, -1) + 0 for token in tokens]  # TypeError unless they are numbers
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        fail(f"{folder}/tokenizer.json: no byte-level BPE of a known kind: {error!r}")
    back = {i: rank for rank, i in enumerate(ids)}
    preset = re.search(r"<\|im_start\|>system(?:\n|\\+n)([^'<]+)<\|im_end\|>", str(config.get("chat_template")))

    def encode(text):
        return [ids[rank] for rank in bpe.encode_ordinary(normal(text)) if ids[rank] >= 0]

    def chat(messages):
        """Ids of [{"role", "content"}, ...] up to where the answer begins; control tokens only from the template."""
        llama = "<|eot_id|>" in special or ("<|im_end|>" not in special and fail(f"{folder}: no known chat template"))
        head = "<|start_header_id|>{0}<|end_header_id|>\n\n" if llama else "<|im_start|>{0}\n"
        turn = head + ("{1}<|eot_id|>" if llama else "{1}<|im_end|>\n")
        turns = [(turn, m["role"], m["content"].strip() if llama else m["content"]) for m in messages]
        if llama or (preset and [m["role"] for m in messages[:1]] != ["system"]):
            turns.insert(0, ("<|begin_of_text|>",) if llama else (turn, "system", preset[1]))
        turns.append((head, "assistant"))
        parts = [(part, fills) for form, *fills in turns for part in re.split(r"(<\|\w+\|>)", form)]
        return sum(([special[p]] if p in special else encode(p.format(*fills)) for p, fills in parts), [])

    return SimpleNamespace(encode=encode, decode=lambda ids: bpe.decode([back[i] for i in ids if i in back]), chat=chat,
                           special=special, **{k: special.get(str(config.get(k + "_token"))) for k in ("bos", "eos")})
# --- end block ---


# --- block: chat ---
class Chat:
    """An OpenAI-compatible endpoint. Replies are kept on disk under the hash of endpoint, model, payload and index of
    the sample: the same call again makes no request. OPENAI_API_KEY travels over https or to this machine alone."""
    def __init__(self, url, model, cache, workers=8, deadline=600.0, most_bytes=2**22):
        if not re.fullmatch(r"https?://([\w.-]+|\[::1\])(:\d+)?(/[\w./-]*)?", url, re.A):
            fail(f"endpoint {url!r}: must look like https://host/v1, without a user, a password or a query")
        self.url, self.model, self.cache, self.lock = url.rstrip("/") + "/chat/completions", model, cache, Lock()
        self.workers, self.deadline, self.most_bytes, self.tokens = workers, deadline, most_bytes, 0
        retry = Retry(4, backoff_factor=0.5, status_forcelist=(408, 425, 429, 500, 502, 503, 504),
                      allowed_methods={"POST"}, retry_after_max=60)
        self.http, adapter = requests.Session(), requests.adapters.HTTPAdapter(pool_maxsize=workers, max_retries=retry)
        self.http.adapters = {"http://": adapter, "https://": adapter}
        key, safe = os.getenv("OPENAI_API_KEY", "").strip(), r"https:|http://(127\.0\.0\.1|localhost|\[::1\])[:/]"
        re.fullmatch("[!-~]*", key) or fail("OPENAI_API_KEY must be ASCII without blanks")  # requests would print it
        self.http.auth = lambda request: request  # else a netrc file could add a password
        self.http.headers.update({"Authorization": f"Bearer {key}"} if key and re.match(safe, self.url) else {})

    def one(self, payload, index, end):
        name = hashlib.sha256(json.dumps([self.url, self.model, payload, index], sort_keys=True).encode()).hexdigest()
        path, body = self.cache / f"{name}.json", b""
        with contextlib.suppress(OSError, ValueError):  # not there, or damaged: ask again
            return json.loads(path.read_text("utf-8"))
        wait = dict(stream=True, timeout=(10, max(1.0, end - time.monotonic())), allow_redirects=False)
        got = self.http.post(self.url, json=payload | dict(model=self.model), **wait)
        if got.status_code != 200:
            raise requests.HTTPError(f"status {got.status_code}")
        for part in got.iter_content(2**14):
            body += part
            if len(body) > self.most_bytes or time.monotonic() > end:
                return got.close()
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError), self.lock:
            text = "" + (reply := json.loads(body))["choices"][0]["message"]["content"]  # TypeError unless it is text
            replace_file(path, json.dumps(text).encode())
            with contextlib.suppress(LookupError, TypeError):  # not all servers count
                self.tokens += reply["usage"]["total_tokens"]
            return text

    def ask(self, jobs):
        """Texts of [(payload, index of the sample)], in order, asked side by side; None where there is none."""
        end, pool = time.monotonic() + self.deadline, ThreadPoolExecutor(self.workers)
        try:
            return list(pool.map(lambda job: self.one(*job, end), jobs, timeout=self.deadline))
        except (requests.RequestException, TimeoutError) as error:
            fail(f"endpoint {self.url}: {type(error).__name__} {str(error)[:200]}; replies are kept: run again")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
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


class Local:
    """A decoder that writes or answers: at most max_new tokens, `part` texts at once."""

    def __init__(self, cfg, model, tok, part=0, max_new=0):
        self.cfg, self.model, self.tok, self.part = cfg, model.eval(), tok, part or cfg.part
        self.max_new = max_new or cfg.max_new

    def write(self, prompts, n, temperature, top_p, key):
        """n texts that continue each prompt (token ids); without an end they are cut."""
        device, rows = self.model.norm.weight.device, [prompt for prompt in prompts for _ in range(n)]
        g = torch.Generator(device).manual_seed(zlib.crc32(repr((self.cfg.seed, *key)).encode()))
        order, texts = sorted(range(len(rows)), key=lambda i: -len(rows[i])), {}
        for i in range(0, len(order), self.part):
            some = order[i : i + self.part]
            new = generate(self.model, [rows[j] for j in some], self.max_new, self.tok.stop, temperature, top_p, g)
            texts |= {j: self.tok.decode(ids) for j, ids in zip(some, new)}
        return [[texts[i * n + k] for k in range(n)] for i in range(len(prompts))]

    def ask(self, contents, n, temperature, key):
        return self.write([self.tok.ask(text) for text in contents], n, temperature, 1.0, key)


class Remote:
    """An endpoint that answers; a reply that is none is None."""

    def __init__(self, cfg, chat, form=SOLVE):
        self.cfg, self.chat, self.form = cfg, chat, form

    def ask(self, contents, n, temperature, key):
        common = dict(temperature=temperature, max_tokens=self.cfg.say_max)
        jobs = [dict(messages=[dict(role="user", content=self.form.format(text))], **common) for text in contents]
        texts = self.chat.ask([(job, i) for job in jobs for i in range(n)])
        return [texts[i * n : i * n + n] for i in range(len(contents))]


def chat_model(cfg, run, name, form=SOLVE):
    """What --target, --judge and --teacher name: an endpoint, or a checkpoint; None for ""."""
    if not name:
        return None
    if "://" in name:
        (run.out / "replies").mkdir(exist_ok=True)
        return Remote(cfg, Chat(*name.split("#", 1), run.out / "replies"), form)
    folder = fetch_model(name)
    model = load_real(folder, dtype=run.dtype)
    tok = load_tokenizer(folder)
    tok.ask = lambda text: tok.chat([dict(role="user", content=form.format(text))])
    ends = tok.eos, *map(tok.special.get, ("<|im_end|>", "<|eot_id|>", "<|endoftext|>"))
    tok.stop = [i for i in ends if i is not None]
    return Local(cfg, model.to(run.device), tok, 16, cfg.say_max)


def new_model(cfg, run, key, weights=None):
    """A tiny decoder with weights drawn by key, or those of a file."""
    torch.manual_seed(random_of("weights", cfg.seed, key).getrandbits(60))
    model = Decoder(tiny_shape(cfg))
    nn.init.normal_(model.embed_tokens.weight, 0, 0.05)
    if weights:
        model.load_state_dict(load_file(weights))
    return model.to(run.device)


def once(cfg, run, path, make):
    """The model in a file, which make() trains if it is not there."""
    if not path.exists():
        replace_file(path, export(make()))
    return new_model(cfg, run, "", path).eval()


def remember(run, state, **job):
    """Save what is done, and the training in progress if there is one."""
    save_state(run, done=state["done"], seconds=time.perf_counter() - run.began, **job)


def stopped(run, state, **job):
    """Save, say how to go on, and leave."""
    remember(run, state, **job)
    command = shlex.join([sys.executable, *sys.argv]) + " --resume" * ("--resume" not in sys.argv)
    print(f"stopped; continue with: {command}")
    raise SystemExit(130)


def read_rows(path, size):
    """Rows of a JSONL file that a kill may have cut: what follows its last whole part of `size` rows is taken off."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = sum(line.endswith(b"\n") for line in lines) // size * size
    if whole < len(lines):
        os.truncate(path, sum(map(len, lines[:whole])))
    try:
        rows = [json.loads(line) for line in lines[:whole]]
        return rows if [row["id"] for row in rows] == list(range(whole)) else fail(f"{path}: ids are not 0, 1, 2, ...")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f"{path}: not a file of this script: {error!r}; remove it, and it will be made again")


def read_seeds(cfg):
    """The questions of --seeds, [] if there is none."""
    items = []
    try:
        for line in Path(cfg.seeds).read_bytes().splitlines() if cfg.seeds else ():
            items.append({} | parse(json.loads(line)["question"]))  # TypeError where it is none
    except OSError as error:
        fail(f"--seeds {cfg.seeds}: {error}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        fail(f"--seeds {cfg.seeds}, line {len(items) + 1}: must be JSON with a \"question\" of PROBLEMS")
    items = [item for item in items if not item["reserved"]]
    if cfg.seeds and len(items) <= cfg.shots:
        fail(f"--seeds {cfg.seeds}: needs more than --shots {cfg.shots} questions that are not reserved (is_reserved)")
    return items


def append_rows(path, rows):
    with open(path, "ab") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


def work(cfg):
    """Tokens that the models of one target learn from, and write, if every text is as long as it may be."""
    steps = cfg.target_steps + cfg.proposer_steps + len(cfg.arms.split(",")) * cfg.tune_steps
    lists = cfg.n_seeds + 2 * cfg.rounds * cfg.dpo_steps * cfg.dpo_batch  # rows of seeds and a question
    proposals = (2 * cfg.rounds + 1) * cfg.queries + (cfg.rounds + 1) * cfg.n_eval
    answers = proposals * (10 if cfg.task == "honesty" else 1) + len(cfg.arms.split(",")) * cfg.n_test * 5 // 3
    return cfg.max_new * (steps * cfg.batch_size + (cfg.shots + 1) * lists), cfg.max_new * (proposals + answers)


def ledger(cfg, run):
    """Time a step of the tiny models and a part of what they write, and say how long the run can take."""
    model, rows = new_model(cfg, run, ""), [([1] * 16, [2] * 14)] * cfg.batch_size
    batch = {name: x.to(run.device) for name, x in collate(rows).items()}
    seconds = min(timeit.repeat(lambda: sft_loss(cfg, model, batch).backward(), number=1, repeat=3))
    prompts = [[1] * 30] * min(cfg.part, cfg.queries)
    spent = timeit.timeit(lambda: generate(model.eval(), prompts, cfg.max_new, [], 1.0, 1.0, None), number=1)
    speeds = batch["ids"].numel() / seconds, len(prompts) * cfg.max_new / spent
    minutes = cfg.targets * sum(tokens / speed for tokens, speed in zip(work(cfg), speeds)) / 60
    print(f"{speeds[0]:,.0f} tokens/s learned from, {speeds[1]:,.0f} written: at most about {minutes:.1f} minutes, if "
          "every text is as long as it may be" + ", without what chat models take" * bool(cfg.target)
          + ", more than the 10 minutes of --scale small" * (cfg.scale == "small" and minutes > 10), flush=True)


def dry_run(cfg):
    """What a run takes, without allocating a network."""
    with torch.device("meta"):
        n = sum(p.numel() for p in Decoder(tiny_shape(cfg)).parameters())
    learn, write = (cfg.targets * tokens for tokens in work(cfg))
    hours = (6 * n * learn / 200e12 + 2 * n * write / 20e12) / 3600
    print(f"{n:,} parameters | {learn:.1e} tokens learned, {6 * n * learn:.1e} FLOPs | {write:.1e} written, "
          f"{2 * n * write:.1e} FLOPs | {16 * n / 2**30:.2f} GiB of weights and AdamW, one device | {hours:.2f} hours "
          "on one H100, if it has 200 TFLOP/s in training and 20 in writing")


def plot_rounds(path, metrics, rounds):
    """What the proposer writes by round."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(5, 3.2), layout="constrained")).subplots()
    for name in ("failure", "valid", "unique", "in blind spots", "self bleu"):
        points = {r: metrics[f"r{r}/{name}"] for r in range(rounds + 1) if f"r{r}/{name}" in metrics}
        axes.plot(points.keys(), points.values(), "o-", label=name)
    axes.set(xlabel="round", title="proposals", ylim=(0, 1.05))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- 8. Main
def set_up(cfg, run, state, b):
    """World and target number b."""
    world, tok, rng, folder = World(cfg, b), Words(cfg.shots), random_of("seeds", cfg.seed, b), run.out / f"b{b}"
    folder.mkdir(exist_ok=True)
    seeds = read_seeds(cfg) or [world.draw(rng, cfg.weak_mass) for _ in range(cfg.n_seeds)]
    who = SimpleNamespace(folder=folder, world=world, proposer=SimpleNamespace(tok=tok), seeds=seeds,
                          target=chat_model(cfg, run, cfg.target), judge=chat_model(cfg, run, cfg.judge, JUDGE),
                          teacher=chat_model(cfg, run, cfg.teacher))
    if not cfg.target:
        who.target = Local(cfg, once(cfg, run, folder / "target.safetensors",
                                     lambda: train_target(cfg, run, state, b, world, tok)), tok)
        if f"b{b}/0" not in state["done"]:
            state["done"][f"b{b}/0"] = evaluate(cfg, run, who.target, world)
            remember(run, state)
    return who


def check_blind_spots(everyone):
    """Targets that fail nowhere, or everywhere, leave nothing to explore: asked on questions that no result is of."""
    parts = [graded(who.world, who.world.gate, greedy(who.target, who.world.gate))[1] for who in everyone]
    weak, strong = (np.mean([part[name] for part in parts]) for name in ("weak", "strong"))
    print(f"the targets have {weak:.0%} of their blind spots right and {strong:.0%} of the rest (dev questions)")
    if weak > 0.6 or strong < 0.8:
        fail(f"the targets have {weak:.0%} of their blind spots right and {strong:.0%} of the rest, but the comparison "
             "needs at most 60% and at least 80%: change --starved, --target-steps or --lr")


def look(cfg, run, who, state, b, r, first):
    """Measure proposer r on all proposals for a fixed set of prompts; these calls of the target are no part of Q."""
    path, key = who.folder / f"look{r}.jsonl", ("look", b)
    rows = read_rows(path, cfg.n_eval)
    if not rows:
        rows = attempt(cfg, who, range(cfg.n_eval), key)
        respond(cfg, who, rows, key)
        append_rows(path, rows)
    if f"b{b}/r{r}" not in state["done"]:
        written = [proposal_row(cfg, who, row["prompt"], row["instruction"]) for row in rows]
        gain = row_logp(run, who.proposer.model, written) - row_logp(run, first, written)
        state["done"][f"b{b}/r{r}"] = proposer_measures(rows, who.world) | dict(kl=gain.mean().item())
        remember(run, state)
    return state["done"][f"b{b}/r{r}"]


def run_rounds(cfg, run, who, state, b):
    """Rounds of proposing and DPO: their rows; who.proposer is then the one to draw training questions from."""
    first, found, files = copy.deepcopy(who.proposer.model), [], [who.folder / "proposer0.safetensors"]
    measures = [look(cfg, run, who, state, b, 0, first)]
    for r in range(1, cfg.rounds + 1):
        found.append(explore(cfg, run, state, who, f"round{r}", cfg.queries, sum(found, []), ("round", b, r)))
        scored = [row for row in found[-1] if "failure" in row]
        pairs = build_pairs(scored, cfg.pairing, random_of("pairs", cfg.seed, b, r))
        files.append(who.folder / f"proposer{r}.safetensors")
        if 2 * len(pairs) < cfg.dpo_batch:  # a target that always or never fails gives no preference
            print(f"b{b} round {r}: {len(pairs)} pairs are too few, the proposer stays as it is")
            files[-1] = files[-2]
        else:
            make = functools.partial(train_dpo, cfg, run, state, f"b{b}-dpo{r}", who, pairs)
            who.proposer.model = once(cfg, run, files[-1], make)
        measures.append(look(cfg, run, who, state, b, r, first))
    sound = [r for r, x in enumerate(measures) if x["valid"] >= 0.6 and x["unique"] >= 0.5]  # have not collapsed
    who.proposer.model = new_model(cfg, run, "", files[max(sound or [0])]).eval()  # a choice that needs no target
    return found


def propose_all(cfg, run, who, state, b):
    """{arm: proposals it may take, best first}. Arms 3 and 4 ask the target equally often, in rounds + 1 lots."""
    arms, found = set(cfg.arms.split(",")), {}
    if arms & set("234"):
        found["2"] = explore(cfg, run, state, who, "round1", cfg.queries, [], ("round", b, 1))
    if "3" in arms:
        more = explore(cfg, run, state, who, "filter", cfg.queries * cfg.rounds, found["2"], ("filter", b))
        found["3"] = found["2"] + more
    if "4" in arms:
        rounds = run_rounds(cfg, run, who, state, b)
        last = explore(cfg, run, state, who, "last", cfg.queries, sum(rounds, []), ("last", b))
        found["4"] = last + sum(rounds[::-1], [])
    return found


def new_questions(cfg, run, who, arm, b, proposals):
    """The N questions that an arm adds, and how many calls of the target it took to find them."""
    world, rng = who.world, random_of("new", cfg.seed, b, arm)
    rows = [row for row in proposals.get(arm, []) if "failure" in row]
    told = arm == "2" and cfg.task == "honesty"  # its data needs the target's answers; with math only the solver's
    if arm in "17":
        rows = fresh(world, rng, cfg.weak_mass if arm == "1" else 1.0, cfg.n_train)
    if arm == "3":
        rng.shuffle(rows)
    if arm in "34":  # honesty: with failures alone it would learn never to be sure
        bad, good = ([row for row in rows if row["failure"] == want] for want in (True, False))
        rows = bad if cfg.task == "math" else sum(map(list, zip(bad, good)), [])
    if cfg.semdedup_eps and arm in "234" and len(rows) > 5:
        with torch.no_grad():  # a question's embedding: the mean over its tokens
            texts = [who.proposer.tok.encode(row["question"]) for row in rows]
            e = [last_layer(who.proposer.model, torch.tensor([ids], device=run.device))[0].mean(0) for ids in texts]
        keep = semdedup(F.normalize(torch.stack(e), dim=1), cfg.semdedup_eps, kernels=cfg.kernels)
        rows = [rows[i] for i in keep]
    asked = sum(row["asked"] for row in (proposals[arm] if arm in "34" else rows[: cfg.n_train] if told else ()))
    if cfg.target:
        return rows[: cfg.n_train], asked  # what it fails at, and no more
    if not rows:
        fail(f"arm {arm}: no question to train on: raise --queries")
    return list(itertools.islice(itertools.cycle(rows), cfg.n_train)), asked


def tune_rows(cfg, who, items):
    """(prompt, completion) in tokens: the solution; honesty: the target's own most frequent answer, without which it
    forgets to answer, and whether it is sure of that."""
    tok, rows = who.target.tok, []
    for item in items:
        prompt = tok.ask(item["question"])
        if cfg.task == "honesty":
            said, word = tok.encode(item["common"]), tok.encode(SURE[not item["failure"]])
            rows += [(prompt, said + tok.stop), (prompt + said + tok.encode(PROBE), word)]
        else:
            rows.append((prompt, tok.encode(item["solution"]) + tok.stop[:1]))
    return rows


def run_arm(cfg, run, who, state, b, arm, replay, proposals):
    """Tune the target, from its first weights, on N new questions and the replay; measure it."""
    new, asked = new_questions(cfg, run, who, arm, b, proposals)
    different = len({row["question"] for row in new})
    more = [row for row in new if "entropy" not in row] if cfg.task == "honesty" else []
    respond(cfg, who, more, ("label", b, arm))  # what the target says to them is not known yet
    keys = "question", "solution", "cell", "responses", "entropy"
    replace_file(who.folder / f"data-{arm}.jsonl", "".join(
        json.dumps({key: row[key] for key in keys if key in row}) + "\n" for row in new).encode())
    found = {"calls": asked + sum(row["asked"] for row in more), "different": different,
             "in blind spots": sum(row["cell"] in who.world.weak for row in new) / max(1, len(new))}
    if isinstance(who.target, Local):
        model = once(cfg, run, who.folder / f"arm{arm}.safetensors", lambda: fit(
            cfg, run, state, f"b{b}-arm{arm}", copy.deepcopy(who.target.model), tune_rows(cfg, who, new + replay),
            cfg.tune_steps, cfg.tune_lr))
        found |= evaluate(cfg, run, Local(cfg, model, who.target.tok), who.world)
    state["done"][f"b{b}/{arm}"] = found
    remember(run, state)


def run_target(cfg, run, state, b, who):
    """One target's proposers and arms."""
    rng, make = random_of("replay", cfg.seed, b), functools.partial(train_proposer, cfg, run, state, b, who)
    who.proposer = Local(cfg, once(cfg, run, who.folder / "proposer0.safetensors", make), who.proposer.tok)
    proposals = propose_all(cfg, run, who, state, b)
    replay = fresh(who.world, rng, cfg.weak_mass, cfg.n_train)
    if cfg.task == "honesty":
        respond(cfg, who, replay, ("replay", b))
    for arm in cfg.arms.split(","):
        if arm != "0" and f"b{b}/{arm}" not in state["done"]:
            run_arm(cfg, run, who, state, b, arm, replay, proposals)


def swap(cfg, run, state, everyone):
    """Ask each target what the last proposers of the others wrote: is a proposer about its own target?"""
    for b, who in enumerate(everyone):
        rows = [row for row in read_rows(who.folder / f"look{cfg.rounds}.jsonl", cfg.n_eval) if not row["drop"]]
        rates = []
        for other in everyone[:b] + everyone[b + 1 :]:
            respond(cfg, other, rows, ("swap", b))
            rates.append(len(failures(rows)) / max(1, len(rows)))
        state["done"][f"b{b}/r{cfg.rounds}"]["failure of others"] = float(np.mean(rates))
    remember(run, state)


def print_table(metrics):
    """Measures of proposers (r0: the warm-up one) and of arms, means over targets."""
    names = list(dict.fromkeys(key.split("/")[0] for key in metrics))
    for rows in ([name for name in names if name[0] == "r"], [name for name in names if name[0] != "r"]):
        columns = dict.fromkeys(key.split("/")[1] for key in metrics if key.split("/")[0] in rows)
        print(f"{'':4}" + "".join(f"{column[-13:]:>14}" for column in columns))
        for row in rows:
            cells = [metrics.get(f"{row}/{column}") for column in columns]
            print(f"{row:4}" + "".join(f"{'' if cell is None else f'{cell:.3f}':>14}" for cell in cells))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = cli(Config, SCALES, argv)
    if cfg.dry_run:
        return dry_run(cfg)
    if cfg.kernels and not torch.cuda.is_available():
        fail("--kernels needs a CUDA device; without the flag the same run takes plain PyTorch")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("torchrun: here each target is a process of its own: --targets 1 with several --seed and --out")
    read_seeds(cfg)  # a mistake in these shall leave nothing half written
    for name in (cfg.target, cfg.judge, cfg.teacher):
        if name and "://" not in name:
            fetch_model(name)
    run = start_run(cfg, "reversegen")
    state = load_state(run) or dict(done={}, seconds=0.0)
    run.began = time.perf_counter() - state["seconds"]
    if not (run.out / "state.pt").exists():
        remember(run, state)  # from here on the directory belongs to these flags
    ledger(cfg, run)
    everyone, done = [set_up(cfg, run, state, b) for b in range(cfg.targets)], state["done"]
    if cfg.scale != "smoke" and not cfg.target:
        check_blind_spots(everyone)
    for b, who in enumerate(everyone):
        run_target(cfg, run, state, b, who)
    if "4" in cfg.arms.split(",") and cfg.targets > 1:
        swap(cfg, run, state, everyone)
    groups = {}
    for job, name, value in ((job, name, value) for job, found in done.items() for name, value in found.items()):
        groups.setdefault(f"{job.split('/')[1]}/{name}", []).append(value)
    metrics = {name: float(np.mean(values)) for name, values in groups.items()}
    print_table(metrics)
    plot_rounds(run.out / "plot.png", metrics, cfg.rounds)
    found = statistics(cfg, done)
    for name, formula, *_ in CLAIMS if cfg.scale != "smoke" and not cfg.target else ():
        if name not in found and (cfg.task == "honesty" or not re.match("ap|ece", formula)):
            print(f"CLAIM {name} NOT RUN: {formula} needs its arms, and at least two --targets")
    if "beats-filter" in found and cfg.scale != "smoke" and found["beats-filter"][1][0] <= 0:
        print("That training the proposer pays, beside filtering what the warm-up proposer writes, is not shown here.")
    digest = hashlib.sha256(json.dumps([list(who.world.held) for who in everyone]).encode()).hexdigest()
    record = dict(tried={arm: TRIED[arm] for arm in cfg.arms.split(",")}, metrics=metrics, data_sha256=digest)
    minutes = (time.perf_counter() - run.began) / 60
    return report(cfg, run, "reversegen", argv, found, CLAIMS, **record, by_target=done, minutes=minutes)


if __name__ == "__main__":
    from_shell(main)
