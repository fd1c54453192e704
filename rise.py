# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "safetensors", "tqdm", "matplotlib", "tiktoken", "requests"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""rise.py: Subtle Errors Matter: Preference Learning via Error-injected Self-editing (RISE)
Xu, Yu, Hou, Cheng, Leong, Li, Jiang, Shang, Liu, Li, ACL 2025, arXiv 2410.06638

Most wrong solutions go wrong in one small place. RISE lets a model put such an error into a step of its own right
solution, and trains it by DPO to prefer the step that it had, beside pairs of whole right and wrong samples.

  python rise.py                 # 7 min on one core: base 53 % right, DPO 83, RISE 80, likelihood 88 (one base)
  python rise.py --scale long --arms 0,A,C,D,E,F --bases 1 --seed 1    # one base of the long run
  python rise.py --task math --model DIR --data train.jsonl --test-data test.jsonl    # a chat model, LoRA
  ... --endpoint https://host/v1 --endpoint-model NAME    # samples and edits from there, training here
  torchrun --nproc-per-node 8 rise.py ... --resume    # after --until pairs; evaluate by python rise.py ... --resume

Symbols (B pairs, R rows of a pair, L tokens of a row, M tokens of a side)
  paper         code           shape       meaning
  x, s_<i       question, before           context of a step: the question and the right steps before
  s_i, s~_i     chosen, rejected           a step and its edit; for whole solutions y+ and y-
  LD, alpha     levenshtein, edit_alpha    Eq. 1: an edit is kept below this distance
  log pi        logp, ref      (B, 2)      of both sides, summed over their tokens: policy, starting model
  m             margin         (B,)        gain of the chosen side less that of the rejected one
  r             gain[:, 0]     (B,)        gain of the chosen side; NLL acts where it is below 0
  K, N          k, num_edits               samples of a problem, edited pairs of a problem

Stages, JSONL in OUT/b0: samples, edits (every step, with the reason if it was dropped), pairs. Finished problems are
never asked again.

Differences from the paper, of which the official code and summaries were at hand, not the text
  world       generated problems with an exact verifier in place of GSM8K and MATH, and of GPT-4o as judge of errors.
              Longer problems and rare words are in the tiny model's pre-training, not in its pairs.
  model       a tiny decoder in place of an instruct model. Its pre-training has wrong solutions too (HABITS): it can
              compute and errs by habit. This was chosen after a first look: with right solutions alone it lacked
              skill, and no arm improved it beyond noise (dev). A fifth of the pre-training is edits made by rule: their
              style is taught, and their errors are like those of the habits, which favours C before E.
  filter      alpha is not known: 5 words (16 for a chat model); edits that change nothing are dropped (official
              code: neither filter nor check). Words that give an edit away are a shorter list.
  NLL         lambda is not known: 1, by token, gated as later notes say (the official script has none).
  answers     exact rationals that the text states, no LaTeX; nothing is taken out of the rejected side, as the
              official code does with boxes. The line of the answer is no step and is not edited.
  ends        the end is a token of whole solutions only (official code: of none). Pairs that are too long are dropped
              instead of cut, for both sides might become the same.
  evaluation  the plain prompt, as in the official code; greedy. Problems whose number ends in 9 are held out.
  equal work  all arms see equally many pairs; arm A has a second sampled pair for each edit of C. Each arm has its
              best learning rate on dev problems out of two to five (TRIED counts all settings, more for A and C); that
              of 1, B and F is at the end of those tried. E changes as many words as the edit did, numbers by numbers.
  endpoint    its replies cannot be begun with "Step 1:": it is asked for the format instead.
  left out    MATH's answers, AQuA, logic and code tasks, edits verified to be wrong as an arm.

Copy out: rise_loss, PairLogp with token_logp and collate, levenshtein, split_steps with LABEL, Lora
"""

import argparse
import ast
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
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
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
    task: str = "chain"  # chain|math: generated problems and a tiny model, or a chat model and --data
    scale: str = "small"  # smoke|small|long|paper: a row of SCALES below; explicit flags win over it
    arms: str = "0,1,A,C,E"  # comma list out of ARMS below; C is RISE
    tag: str = "main"  # name of this variant in the RESULT record
    seed: int = 0  # problems that are sampled, base models, samples, order of pairs; not the held-out problems
    bases: int = 1  # base models, each with samples and pairs of its own
    seeds: int = 2  # runs of each arm on a base: orders of the pairs
    until: str = "eval"  # pairs|eval: where to stop; go on with --resume
    # models
    model: str = ""  # directory or hub id (org/name or org/name@commit) of a Llama or Qwen2 chat model, trained
    endpoint: str = ""  # https://host/v1: samples and edits come from there, --model is trained on them
    endpoint_model: str = ""  # the model's name at the endpoint
    n_layer: int = 3  # layers of the tiny model
    n_head: int = 4  # its attention heads
    n_embd: int = 64  # its width
    base_steps: int = 1000  # optimizer steps of the tiny model's own pre-training
    base_batch: int = 64  # examples in one of them
    base_lr: float = 4e-3  # its peak learning rate
    base_every: int = 200  # steps between two looks at its dev accuracy
    # data
    data: str = ""  # JSONL with question, answer (GSM8K's too: a number after ####) to sample; "" = generated ones
    test_data: str = ""  # the same, to measure on
    n_problems: int = 1500  # problems to sample (paper: 8,888)
    n_dev: int = 300  # held-out problems on which settings were chosen
    n_test: int = 1000  # held-out problems; half as many of the splits long and reworded
    # pairs
    k: int = 5  # samples of a problem, K (paper: 5)
    temp: float = 0.8  # temperature of sampling (official code: 0.2)
    top_p: float = 1.0  # and the share of probability it is cut to (official code: 0.9)
    max_new: int = 90  # most tokens of a sample or an edit (official code: 2048)
    edit_temp: float = 1.0  # temperature of editing (official code: 0)
    edit_alpha: int = 5  # an edit is kept below this distance, in words and numbers (paper: alpha, not known)
    num_edits: int = 1  # edited pairs of a problem, N (paper: 1 for Qwen2-7B, 3 for Llama-3.1-8B)
    max_len: int = 320  # pairs of more tokens, context and both sides, are dropped (official code: cut at 1024)
    part: int = 256  # problems that are written to a stage's file at once
    sample_batch: int = 640  # sequences decoded at once
    # training
    beta: float = 0.4  # beta of DPO (official code: 0.4)
    nll: float = 1.0  # lambda of NLL (paper: not known)
    nll_gate: str = "ref"  # ref|none: NLL acts where the chosen side has become less likely (paper), or always
    steps: int = 60  # optimizer steps of an arm
    batch_size: int = 64  # pairs of a step (official code: 128)
    micro_batch: int = 0  # pairs of a forward pass; 0 = no split; saves memory, same gradient
    lr: float = 0.0  # peak learning rate, cosine to 0; 0 = the arm's own out of RATES (official code: 5e-7)
    warmup_steps: int = 6  # linear warm-up (official code: a tenth)
    weight_decay: float = 0.0  # AdamW's
    grad_clip: float = 1.0  # largest gradient norm
    lora_rank: int = 0  # rank of LoRA in all linear layers; 0 = all weights are trained (paper)
    share_prefix: bool = True  # both sides of a pair in one row behind one copy of their context
    # machine
    device: str = "auto"  # auto|cpu|cuda|mps: auto is cuda if there is one, else cpu
    dtype: str = "auto"  # auto|float32|bfloat16: auto is bfloat16 on cuda, else float32
    kernels: bool = False  # Triton kernel token_logp (cuda only; compared with PyTorch at first use)
    # running
    log_every: int = 10  # steps between two lines of log.jsonl
    save_every: int = 100  # steps between two checkpoints
    out: str = ""  # output directory; "" = out/rise/TASK-SCALE-sSEED
    resume: bool = False  # continue an interrupted run: the same command with this flag
    dry_run: bool = False  # print parameters, FLOPs, memory and hours, and stop

    def __post_init__(self):
        arms = self.arms.split(",")
        if not set(arms) <= set(ARMS) or len(set(arms)) < len(arms):
            fail(f"--arms {self.arms}: a comma list out of {', '.join(ARMS)}")
        # numbers are at least 0 where listed here, else at least 1, and some have an upper limit
        zeros = "seed micro_batch temp edit_temp nll beta warmup_steps weight_decay lr lora_rank".split()
        zeros += ["base_lr", "grad_clip", "top_p"]
        most = dict(top_p=1.0)
        if not (self.top_p and self.grad_clip and self.n_test > 1):
            fail("--top-p 0, --grad-clip 0, --n-test 1: must be more")
        for name, value in vars(self).items():
            low, high = int(name not in zeros), most.get(name, math.inf)
            if not isinstance(value, (str, bool)) and not (low <= value <= high and value < math.inf):
                limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                fail(f"--{name.replace('_', '-')} {value}: must be {limits}")
        if self.k < 2:
            fail(f"--k {self.k}: at least 2, one sample that is right and one that is wrong")
        if self.n_embd % (2 * self.n_head) or self.n_embd < 8:
            fail(f"--n-embd {self.n_embd}: must be a multiple of twice --n-head {self.n_head}, and at least 8")
        if self.dry_run:
            return
        if self.task == "math" and not self.model:
            fail("--task math needs --model, a directory or a hub id")
        if self.test_data and not self.data:
            fail("--test-data needs --data")
        if self.task == "chain" and (self.model or self.endpoint or self.data or self.test_data):
            fail("--model, --endpoint, --data and --test-data need --task math")
        if bool(self.endpoint) != bool(self.endpoint_model):
            fail("--endpoint and --endpoint-model go together")
        if self.task == "math" and self.bases > 1:
            fail(f"--bases {self.bases}: --model is one base")
        if self.task == "math" and "F" in arms:
            fail(f"--arms {self.arms}: F needs the verifier of --task chain")
        if self.scale == "paper" and self.task == "chain":
            fail("--scale paper needs --task math")


KINDS = "full", "edit", "random", "oracle"
ARMS = {  # kinds of pairs, one full and num_edits others for each problem
    "0": (),  # the base
    "1": ("full",),  # likelihood of right samples
    "A": ("full",),  # DPO on sampled pairs
    "B": ("edit",),  # edited steps alone
    "C": ("full", "edit"),  # RISE
    "D": ("full", "edit"),  # without NLL
    "E": ("full", "random"),  # errors at random places
    "F": ("full", "oracle"),  # Step-DPO with a perfect judge: the first wrong step of a wrong sample
}
REAL = dict(bases=1, seeds=1, arms="0,A,C,E", max_new=320, max_len=1024, edit_alpha=16, temp=0.7, top_p=0.95,
            edit_temp=0.0, part=16, sample_batch=80, n_problems=1000, n_test=500, lora_rank=16, lr=1e-4)
SCALES = {  # "scale" and "scale:task"; explicit flags win
    "smoke": dict(n_layer=1, n_embd=32, base_steps=100, base_batch=32, base_lr=2e-2, base_every=100,
                  n_problems=60, n_dev=6, n_test=6, k=8, temp=1.0, max_new=48, edit_alpha=30, steps=3, batch_size=6,
                  seeds=1, part=60, log_every=5, save_every=10, warmup_steps=1, arms="0,1,A,C,D,E"),
    "small": {},
    "long": dict(bases=3, seeds=3, n_problems=4000, n_test=2000, steps=140, warmup_steps=14,
                 arms=",".join("01ABCDEF")),
    "paper": dict(REAL, n_problems=8888, micro_batch=2, max_new=2048, lora_rank=0, temp=0.2, top_p=0.9, lr=5e-7,
                  batch_size=128, steps=560, warmup_steps=56),
}
SCALES |= {"small:math": REAL, "long:math": REAL | dict(n_problems=7473, n_test=1319, seeds=3, steps=300)}
TRIED = {"0": 6, "1": 4, "A": 11, "B": 2, "C": 8, "D": 3, "E": 6, "F": 3}  # settings looked at, on dev problems


# ---------------------------------------------------------------- 2. Data
# World `chain`: a start amount and events; each event is a step with one or two terms, or a multiplication.
WHO, THINGS = "ana ben cleo dan eva finn".split(), "pens cups books coins keys".split()
VERBS = {"+": ["buys", "finds", "gets", "wins"], "-": ["loses", "sells", "gives", "drops"]}
VERBS |= {2: ["doubles"], 3: ["triples"]}
MISREAD = "gives"  # the pre-training corpus takes it for a gain more often than not
HABITS = dict(misread=0.75, omit=0.2, slip=0.15)  # share of such verbs, of steps with two terms, and of results
RARE = {"+": ["earns", "collects"], "-": ["spends", "breaks"], 2: ["twofolds"], 3: ["threefolds"]}  # split reworded
TYPES = "CALC SUBST SYMBOL SWAP OMIT EXTRA INTER FORMAT".split()
SUBTLE = "CALC SUBST SYMBOL SWAP OMIT".split()  # what the edits aim at: claim 2
PARTS = dict(sft=range(6), dpo=range(6, 8), dev=range(8, 9), test=range(9, 10))  # last digit of a program's hash
LABEL = re.compile(r"^(?:Step \d+ ?:|Answer ?:)", re.M)
NUMBER = r"-?[0-9]{1,30}(?:,[0-9]{3})*(?:\.[0-9]{1,30})?(?:/[0-9]{1,30})?"
SAY = re.compile(rf"(?:answer *(?:is)? *:?|####|\\boxed\{{)[\s*$]*({NUMBER})(?![\d^e]|[,./]\d)", re.I | re.A)


def compute(numbers, ops):
    """Left to right; a step has either + and -, or one *."""
    total = numbers[0]
    for op, n in zip(ops, numbers[1:]):
        total = total + n if op == "+" else total - n if op == "-" else total * n
    return total


def write_step(numbers, ops, result):
    return " ".join([str(numbers[0]), *(f"{op} {n}" for op, n in zip(ops, numbers[1:])), "=", str(result)])


def make_program(rng, part, lengths):
    """(start, ((ops, numbers), ...)) with all results in 0..29, and a hash that belongs to this part of the data."""
    while True:
        start, events, length = rng.randint(2, 20), [], rng.choice(lengths)
        value = start
        while len(events) < length and 0 <= value < 30:
            ops, numbers = ("*",), (rng.choice((2, 3)),)
            if rng.random() < 0.75 or value * numbers[0] >= 30:
                ops = tuple(rng.choice("+-") for _ in range(rng.choice((1, 2, 2))))
                numbers = tuple(rng.randint(1, 6) for _ in ops)
            value = compute((value, *numbers), ops)
            events.append((ops, numbers))
        program = start, tuple(events)
        if 0 <= value < 30 and zlib.crc32(repr(program).encode()) % 10 in PARTS[part]:
            return program


def gold_steps(program):
    """(numbers, ops, result) of each step; its first number is the result before."""
    value, steps = program[0], []
    for ops, numbers in program[1]:
        steps.append(((value, *numbers), ops, compute((value, *numbers), ops)))
        value = steps[-1][2]
    return steps


def make_problem(rng, part, lengths, verbs=VERBS):
    """A question with one number that plays no part, its answer, its program and the verbs of each event."""
    program, who, (thing, other) = make_program(rng, part, lengths), rng.choice(WHO), rng.sample(THINGS, 2)
    used = [[rng.choice(verbs[n if op == "*" else op]) for op, n in zip(*event)] for event in program[1]]
    told = [" and ".join(f"{verb} {'them' if op == '*' else n}" for verb, op, n in zip(words, *event))
            for words, event in zip(used, program[1])]
    told.insert(rng.randint(0, len(told)), f"the box has {rng.randint(1, 30)} {other}")
    question = f"{who} has {program[0]} {thing} . {' . '.join(told)} . how many {thing} ?"
    return dict(question=question, answer=str(gold_steps(program)[-1][2]), program=program, verbs=used)


def gold_solution(program):
    steps = "".join(f"Step {i} : {write_step(*step)}\n" for i, step in enumerate(gold_steps(program), 1))
    return f"{steps}Answer : {gold_steps(program)[-1][2]}"


def careless_solution(problem, rng):
    """A solution as the pre-training corpus has them, with the errors of HABITS, which later steps build on: a model of
    it can compute, and errs by habit. The examples of edits, symbol and del_term, have such errors too."""
    value, lines = problem["program"][0], []
    for (ops, numbers), verbs in zip(problem["program"][1], problem["verbs"]):
        read = ["+" if verb == MISREAD and rng.random() < HABITS["misread"] else op for op, verb in zip(ops, verbs)]
        terms = list(zip(read, numbers))
        if len(terms) == 2 and rng.random() < HABITS["omit"]:
            del terms[rng.randrange(2)]
        ops, numbers = zip(*terms)
        result = compute((value, *numbers), ops) + (rng.choice((-1, 1)) if rng.random() < HABITS["slip"] else 0)
        lines.append(write_step((value, *numbers), ops, min(max(result, 0), 99)))
        value = min(max(result, 0), 99)
    return "".join(f"Step {i} : {line}\n" for i, line in enumerate(lines, 1)) + f"Answer : {value}"


def corrupt(kind, step, rng):
    """The text of a gold step (numbers, ops, result) with an error of one kind: the tiny model's examples of edits.
    But for multi_value, which changes the result, the result follows from what was changed."""
    for _ in range(20):
        numbers, ops, result = list(step[0]), list(step[1]), step[2]
        i, j = sorted(rng.sample(range(len(numbers)), 2))
        if kind == "multi_value":
            result += rng.choice((-10, -2, -1, 1, 2, 10))
        elif kind == "wrong_sub":
            numbers[i] = rng.randint(1, 6) if i else rng.randint(1, 30)
        elif kind == "symbol":
            ops[j - 1] = rng.choice([op for op in "+-*" if op != ops[j - 1]])
        elif kind == "swap":
            numbers[i], numbers[j] = numbers[j], numbers[i]
        else:  # del_term
            del numbers[j], ops[j - 1]
        result = result if kind == "multi_value" else compute(numbers, ops)
        if 0 <= result <= 99 and (numbers, ops, result) != (list(step[0]), list(step[1]), step[2]):
            return write_step(numbers, ops, result)
    return None


def judge_step(step, text):
    """"" if the text of a step is right, else the type of its error; step: the gold one."""
    found = re.fullmatch(r"\s*(\d+)((?: [-+*] \d+)*) = (\d+)\s*", text)
    if not found:
        return "FORMAT"
    pairs = re.findall(r"([-+*]) (\d+)", found[2])
    ops, numbers = [op for op, _ in pairs], [int(found[1])] + [int(n) for _, n in pairs]
    want, want_ops = list(step[0]), list(step[1])
    signed, want_signed = (Counter(zip(["+", *o], n)) for o, n in ((ops, numbers), (want_ops, want)))
    same_numbers, changed = Counter(numbers) == Counter(want), Counter(numbers) - Counter(want)
    if signed == want_signed or same_numbers and ops == want_ops == ["*"]:  # the order of addends does not matter
        return "" if int(found[3]) == step[2] else "CALC"
    if same_numbers:
        return "SWAP" if ops == want_ops else "SYMBOL"
    if len(numbers) != len(want):
        return "EXTRA" if not Counter(want) - Counter(numbers) else "INTER" if changed else "OMIT"
    return "SUBST" if changed.total() == 1 and ops == want_ops else "INTER"


def verify(program, text):
    """(index, type) of the first step of a solution that is wrong, None if all are right. (our choice, for GPT-4o)"""
    steps, gold = split_steps(text)[1], gold_steps(program)
    for i, step in enumerate(gold):
        if i >= len(steps) or steps[i][0].startswith("Answer"):
            return i, "INTER"  # a step is missing
        if kind := judge_step(step, steps[i][1]):
            return i, kind
    last = steps[len(gold)] if len(steps) == len(gold) + 1 else ("", "")
    return None if last[0].startswith("Answer") and last[1].strip() == str(gold[-1][2]) else (len(gold), "INTER")


def read_number(text):
    """A number as an exact rational, None where there is none: at most 30 digits and no exponent, so no attack."""
    text = text.strip()
    if not re.fullmatch(NUMBER, text) or sum(map(str.isdecimal, text)) > 30:
        return None
    top, _, bottom = text.replace(",", "").partition("/")
    return Fraction(top) / int(bottom or 1) if not bottom or int(bottom) else None


def is_correct(text, answer):
    """Does the last answer that a solution states equal the right one, as rationals? (our choice: no LaTeX)"""
    said = SAY.findall(text)
    return bool(said) and read_number(said[-1]) is not None and read_number(said[-1]) == read_number(answer)


def make_problems(cfg, part, count, seed, lengths=(2, 3, 4), verbs=VERBS):
    rng, seen, rows = random.Random(f"{part} {seed} {lengths} {verbs is RARE}"), set(), []
    while len(rows) < count:
        row = make_problem(rng, part, lengths, verbs)
        if row["program"] not in seen:
            seen.add(row["program"])
            rows.append(dict(id=len(rows), **row))
    return rows


def read_problems(path, flag, count):
    """JSONL rows (question, answer) as in GSM8K: what follows #### in the answer is the number."""
    rows = []
    try:
        text = Path(path).read_text("utf-8-sig").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{flag} {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}")
    for n, line in enumerate(text.split("\n")[:count] if text else [], 1):
        try:
            row = json.loads(line)
            question, answer = row["question"], str(row["answer"]).rpartition("####")[2].strip()
        except (ValueError, KeyError, TypeError, RecursionError):
            fail(f"{flag} {path}, line {n}: needs a JSON object with question and answer")
        if not isinstance(question, str) or read_number(answer) is None:
            fail(f"{flag} {path}, line {n}: question must be text, and answer a number or text with #### and a number")
        rows.append(dict(id=n - 1, question=question, answer=answer))
    return rows or fail(f"{flag} {path}: no problems")


class Words:
    """The tiny model's tokenizer: one token a word, a number from 0 to 99, or the end of a line."""

    def __init__(self):
        verbs = [verb for table in (VERBS, RARE) for group in table.values() for verb in group]
        words = ["<eos>", "|", "=>", *(f"<{kind}>" for kind in INSTRUCTIONS), "\n", *WHO, *THINGS, *verbs]
        words += "has . the box and them how many ? Step Answer : + - * =".split() + [str(n) for n in range(100)]
        self.words, self.index, self.stop = words, {word: i for i, word in enumerate(words)}, [0]
        self.lead, self.edit_lead, self.edit_end = "", "```", "```"  # a fence is no token here

    def encode(self, text):
        """Words that are not known, and control words, are dropped."""
        ids = [self.index.get(word, 0) for word in re.findall(r"\n|\S+", text)]
        return [i for i in ids if i > 2 + len(INSTRUCTIONS)]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids).replace(" \n ", "\n").replace(" \n", "\n")

    def solve_prompt(self, question):
        return self.encode(question) + [2]

    def edit_prompt(self, kind, question, before, step):
        """before: the solution so far, with the label of the step."""
        return [self.index[f"<{kind}>"], *self.encode(f"{question} {before}"), 1, *self.encode(step), 2]


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
                           vocab_size=len(Words().words)))


class Chatter:
    """The tokenizer of a checkpoint with its chat template, and the words of the two requests."""

    def __init__(self, folder):
        bpe = load_tokenizer(folder)
        self.encode, self.decode, self.chat = bpe.encode, bpe.decode, bpe.chat
        ends = [bpe.special.get(name) for name in ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")]
        self.stop = [i for i in dict.fromkeys([bpe.eos, *ends]) if i is not None]
        self.lead, self.edit_lead, self.edit_end = "Step 1:", "Edited step:\n```\n", ""

    def solve_prompt(self, question):
        return self.chat([dict(role="user", content=SOLVE.format(question))])

    def edit_prompt(self, kind, question, before, step):
        return self.chat([dict(role="user", content=edit_request(kind, question, before, step))])


class Lora(nn.Module):
    """y = x W^T + 2 x A^T B^T: W stays, A and B of rank r are learned; B starts at 0. (Hu et al. 2021)"""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear, w = linear.requires_grad_(False), linear.weight
        self.a = nn.Parameter(torch.randn(rank, w.shape[1], device=w.device) / math.sqrt(w.shape[1]))
        self.b = nn.Parameter(torch.zeros(len(w), rank, device=w.device))

    def forward(self, x):
        return self.linear(x) + 2 * F.linear(F.linear(x, self.a), self.b)


def add_lora(model, rank):
    model.requires_grad_(False)
    for layer in model.layers:
        for name, linear in list(layer.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(layer, name, Lora(linear, rank))
    return model


# ---------------------------------------------------------------- 4. Method (official code, reviews, our choices)
# Steps, edits and filters
INSTRUCTIONS = {  # seven, as in the official code, in our words: id, group, what is asked for
    "value": ("REPLACE", "Change one number in it, so that the calculation is wrong."),
    "multi_value": ("REPLACE", "Change one number in it, or a chain of numbers that depend on each other."),
    "wrong_sub": ("REPLACE", "Put a wrong value or symbol in the place of one in the calculation."),
    "symbol": ("REPLACE", "Change one operator of the calculation, such as + to -."),
    "swap": ("SWAP", "Exchange two terms of the calculation."),
    "del_term": ("DELETE", "Leave out one term of the calculation."),
    "wording": ("REPLACE", "Change related words, so that the question is misread."),
}
SOLVE = ("{}\n\nSolve this step by step. Write each step on a line of its own that begins with 'Step 1:', 'Step 2:' "
         "and so on, and then a last line 'Answer: ' with the number alone.")
EDIT = ("Question:\n```\n{}\n```\nSolution so far:\n```\n{}\n```\nCurrent step:\n```\n{}\n```\nRewrite the current "
        "step. {} Do not say that there is a mistake. Reply with the edited step alone, between ``` and ```.")
TELLTALE = "a mistake", "let's reconsider", "let me reconsider", "the correct", "python"  # (official code)
GIVEAWAY = (*TELLTALE, "mistake", "incorrect", "wrong", "erroneous", "an error")  # a longer list for edits


def edit_request(kind, question, before, step):
    return EDIT.format(question, before, step, INSTRUCTIONS[kind][1])


def split_steps(text):
    """Head and [(label, step), ...] of a solution, which joined give it byte for byte; a step is what follows a label
    at the beginning of a line, "Step k:" or "Answer:", up to the next one. (official code; Answer: our choice)"""
    at = [found.span() for found in LABEL.finditer(text)]
    ends = [begin for begin, _ in at[1:]] + [len(text)]
    return text[: at[0][0]] if at else text, [(text[i:j], text[j:end]) for (i, j), end in zip(at, ends)]


def tail(step):
    """(begin, end) of the last four sentences of a step, of which the model sees no more. (official code)"""
    end = len(step.rstrip())
    starts = [0] + [found.end() for found in re.finditer(r"\n+|\. ", step[:end])]
    begin = ([i for i in starts if step[i:end].strip()] or [0])[-4:][0]
    return begin + len(step[begin:end]) - len(step[begin:end].lstrip()), end


def admissible(text):
    """Instructions that fit a text: by how many numbers it has, and whether it has an equals sign. (official code)"""
    numbers, equation = len(re.findall(r"\d+(?:\.\d+)?", text)), "=" in text
    return [kind for kind, fits in dict(
        value=numbers == 1, multi_value=numbers > 1, wrong_sub=equation, symbol=equation, swap=equation,
        del_term=equation, wording=not numbers and not equation).items() if fits]


def levenshtein(a, b):
    """Fewest insertions, deletions and replacements that turn sequence a into b: O(len a len b), two rows."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def pieces(text):
    return re.findall(r"\d+(?:\.\d+)?|\w+|[^\w\s]", text)


def parse_edit(reply):
    """The text in the first fenced block, None without one; a label that the model repeats is taken off."""
    found = re.search(r"```(?:[a-z]*\n)?(.*?)```", reply, re.S)
    return re.sub(r"^\s*Step \d+ ?: *", "", found[1]).strip() or None if found else None


def filter_edit(question, step, edited, alpha):
    """Why an edit is dropped, "" if it is kept: Eq. 1 keeps LD(s, s~) < alpha, here in words, numbers and signs."""
    if edited is None:
        return "not parsed"
    if gives_away(question, edited, GIVEAWAY):
        return "gives it away"
    if step.split() == edited.split():
        return "unchanged"
    if levenshtein(pieces(step), pieces(edited)) >= alpha:
        return "too far"
    return ""


def gives_away(question, text, words):
    """A text that talks of errors, unless the question does. (official code)"""
    text, question = text.lower(), question.lower()
    return any(word in text for word in words) and not re.search("wrong|correct", question)


def random_corruption(step, count, rng):
    """Arm E: `count` places of a step, numbers and operators, are drawn at random and replaced at random."""
    parts = re.findall(r"\d+(?:\.\d+)?|\w+|\s+|[^\w\s]", step)
    places = [i for i, part in enumerate(parts) if re.match(r"\d|[-+*/]$", part)] or \
        [i for i, part in enumerate(parts) if part.strip()]
    for i in rng.sample(places, min(count, len(places))):
        old, number = parts[i], parts[i].isdecimal()  # a number becomes one of as many digits at most
        signs = "+-*/" if "/" in step else "+-*"
        others = signs if old in "+-*/" else [part for part in parts if part.strip()]
        while parts[i] == old and (number or set(others) > {old}):
            parts[i] = str(rng.randrange(10 ** len(old))) if number else rng.choice(others)
    return "".join(parts)


def rise_loss(logp, ref, count, beta=0.4, nll=1.0, gate="ref"):
    """Loss (B,) and margin m (B,) of pairs from log-probabilities (B, 2) of chosen and rejected side, summed over their
    tokens, under the policy and the starting model; count (B,): tokens of the chosen side.

    L = -log sigmoid(beta m) + nll 1[r < 0] L_NLL, where r is what the chosen side has gained, and L_NLL is
    -logp / count: it acts only on a chosen side that is less likely than it was. (later notes; gate "none": always)"""
    assert logp.shape == ref.shape == (len(count), 2)
    gain = logp - ref  # (B, 2)
    m = gain[:, 0] - gain[:, 1]
    loss = -F.logsigmoid(beta * m)
    if nll:
        on = (gain[:, 0] < -1e-4).to(loss) if gate == "ref" else 1.0  # at the start r is 0 but for rounding
        loss = loss + nll * on * -logp[:, 0] / count
    return loss, m


def rft_loss(logp, ref, count):
    """Baseline 1: likelihood of the chosen side alone, per token."""
    return -logp[:, 0] / count, (logp - ref) @ logp.new_tensor([1.0, -1.0])


def token_logp(h, w, target, kernels=False):
    """log p (T,) of targets (T,), in fp32 at least, from outputs h (T, d) and the head's weight w (V, d)."""
    if kernels:
        return load_kernel("token_logp")(h, w.to(h.dtype), target)  # never (T, V)
    logits = F.linear(h, w)  # (T, V)
    return logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32)).gather(1, target[:, None])[:, 0]


class PairLogp(nn.Module):
    """Log-probabilities (B, 2) of the chosen and the rejected side of pairs under a decoder."""

    def __init__(self, model, kernels=False):
        super().__init__()
        self.model, self.kernels = model, kernels

    def forward(self, ids, place, segment, source, target):
        """ids, place, segment (B, R, L): tokens, their positions, and what they are: 0 context, 1 chosen, 2 rejected,
        3 padding. R = 2: a row for each side. R = 1: one row for both, where no side sees the other. source (B, 2, M):
        at which of the pair's R L tokens the next one is target (B, 2, M), -100: none."""
        (B, R, L), model, mask = ids.shape, self.model, None
        ids, place, segment = (x.flatten(0, 1) for x in (ids, place, segment))  # (B R, L)
        if R == 1:
            mine, past = segment[:, :, None], torch.ones(L, L, dtype=torch.bool, device=ids.device).tril()
            mask = (past & ((segment[:, None] == 0) | (segment[:, None] == mine)))[:, None]  # (B, 1, L, L)
        x, turn = model.embed_tokens(ids), model.turn(place)
        for layer in model.layers:
            x = layer(x, turn, mask)
        x, live = model.norm(x).view(B, R * L, -1), target.flatten(1) >= 0  # (B, 2 M)
        pair, at = live.nonzero().T
        logp = token_logp(x[pair, source.flatten(1)[pair, at]], (model.lm_head or model.embed_tokens).weight,
                          target.flatten(1)[pair, at], self.kernels)
        return logp.new_zeros(live.shape).masked_scatter(live, logp).view(target.shape).sum(-1)


def collate(pairs, shared=True):
    """Pairs of token lists (context, chosen, rejected) as the tensors that PairLogp takes. shared: both sides behind
    one copy of their context."""
    layouts = []
    for context, *sides in pairs:
        c, (n, _) = len(context), map(len, sides)
        rows = [(context, *sides)] if shared else [(context, side) for side in sides]
        kinds = [(0, 1, 2)] if shared else [(0, 1), (0, 2)]
        ids = [sum(row, []) for row in rows]
        segment = [[kind for part, kind in zip(row, ks) for _ in part] for row, ks in zip(rows, kinds)]
        place = [[j - n * (kind == 2 and shared) for j, kind in enumerate(row)] for row in segment]
        layouts.append((ids, place, segment, c, n))
    L = max(len(row) for ids, *_ in layouts for row in ids)
    M = max(len(side) for _, *sides in pairs for side in sides)

    def padded(column, fill):
        return torch.tensor([[row + [fill] * (L - len(row)) for row in layout[column]] for layout in layouts])

    first = [[0, n] if shared else [0, L] for *_, n in layouts]  # where a side's tokens begin, less the context
    source = torch.tensor([[[c - 1] + [c + f + j for j in range(M - 1)] for f in fs]
                           for fs, (*_, c, _) in zip(first, layouts)])
    if not shared:
        source[:, 1, 0] += L
    target = torch.tensor([[side + [-100] * (M - len(side)) for side in sides] for _, *sides in pairs])
    return dict(ids=padded(0, 0), place=padded(1, 0), segment=padded(2, 3), source=source.where(target >= 0, 0),
                target=target)


# The chain: each stage appends finished problems to a JSONL file, whichever back-end answers
class Local:
    """A decoder as sampler and editor."""

    def __init__(self, cfg, model, tok):
        self.cfg, self.model, self.tok = cfg, model.eval(), tok

    def write(self, prompts, lead, temperature, top_p, key):
        """Texts that continue prompts after `lead`, longest prompts first in batches; and whether they ended."""
        device, tok = self.model.embed_tokens.weight.device, self.tok
        g = torch.Generator(device).manual_seed(zlib.crc32(repr((self.cfg.seed, *key)).encode()))
        order, texts = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), {}
        for i in range(0, len(order), self.cfg.sample_batch):
            part = order[i : i + self.cfg.sample_batch]
            new = generate(self.model, [prompts[j] + tok.encode(lead) for j in part], self.cfg.max_new, tok.stop,
                           temperature, top_p, g)
            texts |= {j: (lead + tok.decode(ids), len(ids) < self.cfg.max_new) for j, ids in zip(part, new)}
        return [texts[i] for i in range(len(prompts))]

    def sample(self, questions, k, key):
        prompts = [self.tok.solve_prompt(question) for question in questions for _ in range(k)]
        found = self.write(prompts, self.tok.lead, self.cfg.temp, self.cfg.top_p, key)
        texts = [text if ended else None for text, ended in found]  # one that was cut has no end to learn
        return [texts[i : i + k] for i in range(0, len(texts), k)]

    def edit(self, requests, key):
        prompts = [self.tok.edit_prompt(*request) for request in requests]
        texts = self.write(prompts, self.tok.edit_lead, self.cfg.edit_temp, 1.0, key)
        return [text + self.tok.edit_end * ended for text, ended in texts]

    def solve(self, questions):
        """Greedy solutions of the plain prompt. (official code: evaluation has no lead)"""
        return [text for text, _ in self.write([self.tok.solve_prompt(q) for q in questions], "", 0.0, 1.0, ())]


class Remote:
    """A chat endpoint as sampler and editor; it cannot be trained."""

    def __init__(self, cfg, chat):
        self.cfg, self.chat = cfg, chat

    def ask(self, contents, k, **options):
        jobs = [dict(messages=[dict(role="user", content=text)], max_tokens=self.cfg.max_new, **options)
                for text in contents]
        return self.chat.ask([(job, i) for job in jobs for i in range(k)])

    def sample(self, questions, k, key):
        texts = self.ask([SOLVE.format(q) for q in questions], k, temperature=self.cfg.temp, top_p=self.cfg.top_p)
        return [texts[i : i + k] for i in range(0, len(texts), k)]

    def edit(self, requests, key):
        return self.ask([edit_request(*request) for request in requests], 1, temperature=self.cfg.edit_temp)


def random_of(*key):
    return random.Random(repr(key))  # what is drawn depends on the key alone: a continued run draws the same


def sample_problems(cfg, backend, problems, b):
    """K solutions of each problem, and whether their answers are right."""
    drawn = backend.sample([x["question"] for x in problems], cfg.k, ("sample", b, problems[0]["id"]))
    return [dict(id=x["id"], question=x["question"], answer=x["answer"],
                 samples=[dict(text=text, correct=is_correct(text or "", x["answer"])) for text in texts])
            for x, texts in zip(problems, drawn)]


def select(row, rng):
    """A correct and a wrong sample at random, or why there are none: (correct, wrong, ""). (official code)"""
    good, bad = ([s["text"] for s in row["samples"] if s["text"] and s["correct"] == want] for want in (True, False))
    clean = [text for text in good if not gives_away(row["question"], text, TELLTALE)]
    reason = "no correct sample" if not good else "no wrong sample" if not bad else "talks of errors" * (not clean)
    pairs = [] if reason else [(a, b) for a in dict.fromkeys(clean) for b in dict.fromkeys(bad)]
    rng.shuffle(pairs)
    return pairs, reason


def edit_problems(cfg, backend, rows, b):
    """One edit of each step of the chosen solution, by an instruction drawn from those that fit."""
    made, requests = [], []
    for row in rows:
        rng = random_of("edit", cfg.seed, b, row["id"])
        text, at, steps = row["chosen"], 0, []
        head, parts = split_steps(text)
        at = len(head)
        for label, step in parts:
            at, (i, j) = at + len(label) + len(step), tail(step)
            if kinds := admissible(step[i:j]) if label.startswith("Step") and step.strip() else []:
                steps.append(dict(before=text[: at - len(step)], step=step, kind=rng.choice(kinds)))
                requests.append((steps[-1]["kind"], row["question"], steps[-1]["before"] + step[:i], step[i:j]))
        made.append(dict(id=row["id"], steps=steps))
    replies = iter(backend.edit(requests, ("edit", b, rows[0]["id"])))
    for row, new in zip(rows, made):
        for step in new["steps"]:
            reply, (i, j) = next(replies), tail(step["step"])
            edited = parse_edit(reply or "")
            step |= dict(reply=reply, drop=filter_edit(row["question"], step["step"][i:j], edited, cfg.edit_alpha),
                         edited=edited and step["step"][:i] + edited + step["step"][j:])  # at an offset: once
    return made


def build_pairs(cfg, row, edits, program, b):
    """All pairs of a problem by kind; the arms take what they need."""
    rng = random_of("pairs", cfg.seed, b, row["id"])
    full = [dict(before="", chosen=good, rejected=bad, end=True) for good, bad in row["combinations"]]
    kept = [step for step in edits["steps"] if not step["drop"]]
    rng.shuffle(kept)
    found = dict(full=full, edit=[], random=[], oracle=[])
    for step in kept:
        pair = dict(before=step["before"], chosen=step["step"], end=False)
        count = max(1, levenshtein(pieces(step["step"]), pieces(step["edited"])))
        found["edit"].append(pair | dict(rejected=step["edited"], kind=step["kind"]))
        found["random"].append(pair | dict(rejected=random_corruption(step["step"], count, rng)))
        if program:
            n = len(split_steps(step["before"])[1]) - 1
            gold = gold_steps(program)[n] if n < len(program[1]) else None
            found["edit"][-1]["error"] = judge_step(gold, step["edited"]) if gold else "INTER"
    for good, bad in row["combinations"] if program else []:
        i, _ = verify(program, bad) or (99, "")
        (_, ours), (head, theirs) = split_steps(good), split_steps(bad)
        if verify(program, good) is None and i < min(len(ours), len(theirs)) and ours[i][0] == theirs[i][0]:
            before = head + "".join(label + step for label, step in theirs[:i]) + theirs[i][0]
            found["oracle"].append(dict(before=before, chosen=ours[i][1], rejected=theirs[i][1], end=False))
            break
    return dict(id=row["id"], question=row["question"], **found)


def tokens_of(tok, question, pair):
    """(context, chosen, rejected) as token lists, encoded apart, so that the context is the same for both sides. The
    end is a token of whole solutions only: a step does not end an answer. (our choice; official code: of none)"""
    end = tok.stop[:1] * pair["end"]
    return (tok.solve_prompt(question) + tok.encode(pair["before"]), tok.encode(pair["chosen"]) + end,
            tok.encode(pair["rejected"]) + end)


def pairs_of_arm(cfg, arm, rows):
    """[(problem's id, kind, place in its list)]: what an arm is trained on. In place of N edits, arm A has N more full
    pairs, so that each problem is seen as often in all arms."""
    wanted = {kind: 1 if kind == "full" and len(ARMS[arm]) > 1 else cfg.num_edits + (len(ARMS[arm]) == 1)
              for kind in ARMS[arm]}
    return [(row["id"], kind, i % len(row[kind])) for row in rows for kind, n in wanted.items() if row[kind]
            for i in range(n)]


# ---------------------------------------------------------------- 5. Evaluation and claims
@torch.no_grad()
def pair_logp(run, net, pairs, chunk=16):
    """Log-probabilities (P, 2) on the CPU of token pairs, computed as in training: else r would not begin at 0."""
    found = [torch.zeros(0, 2)]
    for i in range(0, len(pairs), chunk):
        batch = {name: x.to(run.device) for name, x in collate(pairs[i : i + chunk]).items()}
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
            found.append(net(**batch).float().cpu())
    return torch.cat(found)


def evaluate(run, local, net, sets, held):
    """What one policy does: right answers (N,) of each set, errors by type on the test set, held-out pairs (P, 2)."""
    found = dict(correct={}, errors={})
    for name, problems in sets.items():
        texts = local.solve([x["question"] for x in problems])
        found["correct"][name] = torch.tensor([is_correct(t, x["answer"]) for t, x in zip(texts, problems)])
        if name == "test":
            drawn = local.sample([x["question"] for x in problems], EVAL_SAMPLES, ("evaluate",))
            found["correct"]["sampled"] = torch.tensor([[is_correct(t or "", x["answer"]) for t in texts]
                                                        for texts, x in zip(drawn, problems)]).double().mean(1)
        if name == "test" and "program" in problems[0]:
            kinds = [verify(x["program"], text) for text, x in zip(texts, problems)]
            found["errors"] = {kind: torch.tensor([k is not None and k[1] == kind for k in kinds]) for kind in TYPES}
    return found | dict(held={kind: pair_logp(run, net, pairs) for kind, pairs in held.items()})


def audit(rows, edits):
    """Shares of edits that were dropped, by reason, and of those kept by what they are: still right, or which error."""
    steps = [step for row in edits for step in row["steps"]]
    count = Counter(step["drop"] or "kept" for step in steps)
    found = {f"edits/{reason}": n / len(steps) for reason, n in count.items()} | {"edits/asked": len(steps)}
    kept = [pair for row in rows for pair in row["edit"]]
    if kept and "error" in kept[0]:
        hits = dict(multi_value="CALC", wrong_sub="SUBST", symbol="SYMBOL", swap="SWAP", del_term="OMIT")
        found["edits/still right"] = sum(not pair["error"] for pair in kept) / len(kept)
        found["edits/of the type asked for"] = sum(hits.get(x["kind"]) == x["error"] for x in kept) / len(kept)
    if kept:
        distance = [levenshtein(pieces(pair["chosen"]), pieces(pair["rejected"])) for pair in kept]
        found["edits/distance"] = sum(distance) / len(kept)
    return found


EVAL_SAMPLES = 4  # of each test problem, at the temperature of the chain: a measure of less noise than greedy answers
# Fixed before the first evidence run, from the paper's claims: id, statistic, threshold, what would refute it.
# right: share of test problems with a right greedy answer; sampled: of right samples; subtle: with an error out of
# SUBTLE; chosen: gain of the chosen side of held-out pairs, nats. Differences are paired; intervals over bases, their
# runs (DPO seeds) and problems; with one base they say nothing of other bases, with two runs little of other orders.
CLAIMS = [
    ("rise-beats-dpo", "right C - A", 0.0, "edits add nothing to DPO on sampled pairs (paper: 0.1 to 1.7 points)"),
    ("edits-beat-random", "right C - E", 0.0, "errors at random places are as good: any hard negative will do"),
    ("rise-samples-beat-dpo", "sampled C - A", 0.0, "the same of four samples in place of the greedy answer"),
    ("samples-beat-random", "sampled C - E", 0.0, "the same of four samples"),
    ("fewer-subtle-errors", "subtle A - C", 0.0, "DPO on sampled pairs lowers these types of error as much"),
    ("dpo-beats-base", "right A - 0", 0.0, "preference learning does not help here at all"),
    ("rise-beats-rft", "right C - 1", 0.0, "likelihood of right samples alone is as good"),
    ("without-nll-chosen-falls", "chosen 0 - D", 0.0, "without NLL the chosen side does not lose probability"),
    ("nll-keeps-chosen", "chosen C - D", 0.0, "NLL does not keep it up"),
]


def bootstrap(x, draws=1000):
    """Mean of x (bases, runs, N) and its 95 % interval: bases, their runs and problems are drawn with replacement."""
    rng, (B, R, N) = np.random.default_rng(0), x.shape
    weight = rng.multinomial(N, np.full(N, 1 / N), draws) / N  # (draws, N)
    base = rng.integers(B, size=(draws, B))
    of_runs = rng.integers(R, size=(draws, B, R))
    by_run = np.einsum("brn,dn->dbr", x, weight)
    means = by_run[np.arange(draws)[:, None, None], base[:, :, None], of_runs].mean((1, 2))
    low, high = np.quantile(means, (0.025, 0.975))
    return x.mean(), (min(low, x.mean()), max(high, x.mean()))


def statistics(done, ref):
    """Claim id to (statistic, interval). done: "base/arm" to a list of evaluations; ref: base to held-out log-probs."""
    found, bases = {}, list(ref)

    def stack(arm, get):
        runs = [[get(result, b) for result in done.get(f"{b}/{arm}", [])] for b in bases]
        if not all(runs):
            return None
        n = min(len(x) for row in runs for x in row)  # bases may have different numbers of held-out pairs
        return np.array([[x[:n] for x in row] for row in runs], float)  # (bases, runs, n)

    def right(result, b):
        return result["correct"]["test"].tolist()

    def sampled(result, b):
        return result["correct"]["sampled"].tolist()

    def subtle(result, b):
        return torch.stack([result["errors"][k] for k in SUBTLE]).any(0).tolist()

    def chosen(result, b):  # as many held-out pairs of samples as of edits
        gains = [(result["held"][k] - ref[b][k])[:, 0].tolist() for k in ("full", "edit") if k in ref[b]]
        return [gain for both in zip(*gains) for gain in both]

    measures = dict(right=right, sampled=sampled, subtle=subtle, chosen=chosen)
    for name, formula, *_ in CLAIMS:
        measure, a, _, b = formula.split()  # the base has one evaluation, which is taken for each run
        if measure == "subtle" and not all(result["errors"] for results in done.values() for result in results):
            continue  # without a verifier
        x, y = stack(a, measures[measure]), stack(b, measures[measure])
        if x is not None and y is not None and x.size:
            found[name] = bootstrap(x - y)
    return found


# ---------------------------------------------------------------- 6. Training
def base_example(rng, lengths=(2, 3, 4), verbs=VERBS):
    """(prompt, answer) in tokens for the tiny model's own pre-training: four of five times a solution, else an edit."""
    tok, problem = tiny_words(), make_problem(rng, "sft", lengths, verbs)
    if rng.random() < 0.8:
        return tok.solve_prompt(problem["question"]), tok.encode(careless_solution(problem, rng)) + tok.stop
    solution = gold_solution(problem["program"])
    steps, (head, parts) = gold_steps(problem["program"]), split_steps(solution)
    i = rng.randrange(len(steps))
    kind = rng.choice(admissible(parts[i][1]))
    edited = corrupt(kind, steps[i], rng) or write_step(*steps[i])
    before = head + "".join(label + step for label, step in parts[:i]) + parts[i][0]
    return tok.edit_prompt(kind, problem["question"], before, parts[i][1].strip()), tok.encode(edited) + tok.stop


def train_base(cfg, run, b, state):
    """The tiny model that stands for the instruct model: the average of the weights on the way. Not averaged, its
    accuracy jumps by 0.3 from one look to the next, and any training at a low learning rate would seem to teach it."""
    torch.manual_seed(random_of("base", cfg.seed, b).getrandbits(60))
    model, job, step = Decoder(tiny_shape(cfg)).to(run.device), f"b{b}-base", 0
    nn.init.normal_(model.embed_tokens.weight, 0, 0.05)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), cfg.base_lr, (0.9, 0.98), fused=True)
    if state.get("job") == job:
        step = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    dev, log = make_problems(cfg, "dev", min(cfg.n_dev, 250), 0), Log(run, job, cfg.base_steps, step)
    while step < cfg.base_steps:
        for group in optimizer.param_groups:
            group["lr"] = cfg.base_lr * min(1.0, (step + 1) / 50)
        rng = random_of("sft", cfg.seed, b, step)
        # one batch in ten is of longer problems, one of rare words: the splits long and reworded are known, not common
        odd = {0: dict(lengths=(5, 6)), 5: dict(verbs=RARE)}.get(step % 10, {})
        rows = [base_example(rng, **odd) for _ in range(cfg.base_batch)]
        L = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.tensor([p + a + [0] * (L - len(p) - len(a)) for p, a in rows], device=run.device)  # (B, L)
        target = torch.tensor([[-100] * len(p) + a + [-100] * (L - len(p) - len(a)) for p, a in rows])
        loss = F.cross_entropy(model(ids[:, :-1]).mT, target[:, 1:].to(run.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        torch._foreach_lerp_([*average.parameters()], [*model.parameters()], min(1.0, 10 / step))  # the last tenth
        if step % cfg.base_every == 0 or step == cfg.base_steps:
            texts = Local(cfg, average, tiny_words()).solve([x["question"] for x in dev])
            log(step, loss=loss.item(), dev=sum(is_correct(t, x["answer"]) for t, x in zip(texts, dev)) / len(dev))
        elif step % cfg.log_every == 0:
            log(step, loss=loss.item())
        stop = should_stop(run)
        if stop or step % cfg.save_every == 0:
            save_state(run, job=job, step=step, model=model.state_dict(), average=average.state_dict(),
                       optimizer=optimizer.state_dict(), done=state["done"], seconds=time.perf_counter() - run.began)
        if stop:
            stopped(run)
    return average


# Peak learning rates: each the best of two to five from 5e-5 to 1e-3, by greedy answers to 1000 dev problems after one
# run on one base; those of 1, B and F are at the end of what was tried
RATES = {"1": 1e-4, "A": 1e-4, "B": 4e-4, "C": 2e-4, "D": 2e-4, "E": 2e-4, "F": 1e-4}


def presentation(n, total, *key):
    """The pair shown at each of `total` places: all n in a new random order, again and again."""
    orders = [torch.randperm(n, generator=torch.Generator().manual_seed(zlib.crc32(repr((*key, epoch)).encode())))
              for epoch in range(-(-total // n))]
    return torch.cat(orders)[:total].tolist()


def train(cfg, run, job, arm, net, pairs, ref, seed, state):
    """One arm: preference learning on token pairs with cached reference log-probabilities ref (P, 2)."""
    fit = {name: p for name, p in net.named_parameters() if p.requires_grad}
    lr = cfg.lr or RATES[arm]
    optimizer = torch.optim.AdamW(fit.values(), lr, weight_decay=cfg.weight_decay)
    step, total = 0, cfg.steps * cfg.batch_size
    if state.get("job") == job:
        step = state["step"]
        put_state(run, net, optimizer, state)
    order = presentation(len(pairs), total, cfg.seed, seed, arm)
    loss_of = rft_loss if arm == "1" else functools.partial(
        rise_loss, beta=cfg.beta, nll=0.0 if arm == "D" else cfg.nll, gate=cfg.nll_gate)
    # what accumulate needs: parameters that are learned; sharded ones sum up their gradients at every part
    view, seen = SimpleNamespace(parameters=fit.values, no_sync=contextlib.nullcontext), []

    def loss_sum(_, part):
        part = {name: x.to(run.device) for name, x in part.items()}
        before = part.pop("ref")
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
            logp = net(**part)
        loss, m = loss_of(logp, before, (part["target"][:, 0] >= 0).sum(1))
        seen.append(torch.stack([m, (m > 0).to(m), *(logp - before).T]).detach())  # (4, B)
        return loss.sum(), torch.tensor(len(m), device=run.device)

    log, began = Log(run, job, cfg.steps, step), time.perf_counter()
    first, net = step, net.train()
    while step < cfg.steps:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, lr, 0.0, cfg.warmup_steps, cfg.steps)
        rows = order[step * cfg.batch_size :][: cfg.batch_size][run.rank :: run.world]
        batch = collate([pairs[i] for i in rows], cfg.share_prefix) | dict(ref=ref[rows])
        seen.clear()
        loss = accumulate(view, batch, cfg.micro_batch or len(rows), loss_sum)
        norm = nn.utils.clip_grad_norm_(fit.values(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step == 1 or step % cfg.log_every == 0 or step == cfg.steps:
            if not loss.isfinite():
                fail(f"{job}: training diverged; lower --lr")
            margin, right, chosen, rejected = torch.cat(seen, 1).mean(1).tolist()
            per_s = (step - first) * cfg.batch_size / (time.perf_counter() - began)
            log(step, loss=loss.item(), margin=margin, right=right, chosen=chosen, rejected=rejected,
                gnorm=float(norm), lr=group["lr"], pairs_per_s=per_s)
        stop = should_stop(run)
        if stop or step % cfg.save_every == 0:
            save_state(run, job=job, step=step, done=state["done"], seconds=time.perf_counter() - run.began,
                       **get_state(run, net, optimizer))
        if stop:
            stopped(run)


# ---------------------------------------------------------------- 7. Plumbing (shared blocks, then this file's own)
# --- block: cli ---
def fail(text):
    """A user's mistake: one line, exit code 2."""
    print("error:", text, file=sys.stderr)
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
    out = Path(cfg.out or f"out/{script}/{cfg.task}-{cfg.scale}-s{cfg.seed}")
    if (out / "result.json").exists():
        fail(f"{out} holds a finished run: choose another --out or --seed, or remove it")
    if (out / "state.pt").exists() and not cfg.resume:
        fail(f"{out} holds an interrupted run: continue it with --resume, or remove it")
    settings, saved = {k: v for k, v in asdict(cfg).items() if k not in ("resume", "out")}, out / "config.json"
    before = json.loads(saved.read_text()) if cfg.resume and saved.exists() else settings
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
        print(f"CLAIM {name} {outcome}: {formula} = {statistic:.3f} [{ci[0]:.3f}, {ci[1]:.3f}], bar {threshold}")
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


def save_state(run, **state):
    """All that a run needs to continue, in one file: its parts, the length of the log. Random numbers are to be drawn
    from (seed, step), so that there is no state of a generator to save."""
    log, buffer = run.out / "log.jsonl", io.BytesIO()
    state |= dict(threads=torch.get_num_threads(), torch=str(torch.__version__))
    torch.save(state | dict(log=log.stat().st_size if log.exists() else 0), buffer)
    if not run.rank:
        replace_file(run.out / "state.pt", buffer.getvalue())


def load_state(run):
    """What save_state saved, {} if there is nothing; the log is cut to its length at that time."""
    if not (run.out / "state.pt").exists():
        (run.out / "log.jsonl").unlink(missing_ok=True)
        return {}
    state = torch.load(run.out / "state.pt", map_location="cpu", weights_only=True)
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
        return folder if (folder / "commit").exists() else fail(f"{name}: not in {folder}; run once without --offline")
    hub, url = requests.Session(), os.getenv("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    hub.hooks["response"] = lambda answer, **_: answer.raise_for_status()
    if os.getenv("HF_TOKEN") and re.match(r"https:|http://(127\.0\.0\.1|localhost)(:\d+)?$", url):
        hub.headers["Authorization"] = "Bearer " + os.environ["HF_TOKEN"].strip()  # dropped on the way to another host
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
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        fail(f"{folder}/tokenizer.json: no byte-level BPE of a known kind: {error!r}")
    ids = [model["vocab"].get(token, -1) for token in tokens]
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
        if llama or (preset and messages[0]["role"] != "system"):
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
        self.http.auth = lambda request: request  # else a netrc file could add a password
        self.http.headers.update({"Authorization": f"Bearer {key}"} if key and re.match(safe, self.url) else {})

    def one(self, payload, index, end):
        name = hashlib.sha256(json.dumps([self.url, self.model, payload, index], sort_keys=True).encode()).hexdigest()
        path, body = self.cache / f"{name}.json", b""
        if path.exists():
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
            reply = json.loads(body)
            text = "" + reply["choices"][0]["message"]["content"]  # TypeError unless it is text
            replace_file(path, json.dumps(text).encode())
            self.tokens += reply["usage"]["total_tokens"] if reply.get("usage") else 0
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


@functools.cache
def load_kernel(name):
    """A Triton operation of kernels/; at its first call it compares itself with PyTorch on the real tensors."""
    try:
        return importlib.import_module("kernels").checked(name)
    except ImportError as error:
        fail(f"--kernels: {error}: the folder kernels/ must stand beside this file, and triton be installed")


@functools.cache
def tiny_words():
    return Words()


def stopped(run):
    """Say how to go on, and leave."""
    if not run.rank:
        print(f"stopped; continue with: {shlex.join([sys.executable, *sys.argv, '--resume'])}")
    raise SystemExit(130)


def read_rows(path):
    """{id: row} of a JSONL file that a kill may have cut: what follows the last whole line is taken off."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    try:
        return {row["id"]: row for row in map(json.loads, whole.splitlines())}
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{path}: not a file of this script: {error!r}; remove it, and it will be made again")


def stage(run, path, todo, size, make):
    """Rows of a JSONL file for the items `todo`, in their order; make(part) gives those of `size` items, which are
    appended at once. What is there is not made again; a part is always made whole, as its random numbers need."""
    rows, log = read_rows(path), Log(run, path.stem, len(todo))
    for i in range(0, len(todo), size):
        part = todo[i : i + size]
        if any(x["id"] not in rows for x in part):
            if run.world > 1:
                fail(f"torchrun trains on finished pairs: run the same command alone with --until pairs first ({path})")
            new = [row for row in make(part) if row["id"] not in rows]
            with open(path, "ab") as file:
                file.write("".join(json.dumps(row) + "\n" for row in new).encode())
                file.flush()
                os.fsync(file.fileno())
            rows |= {row["id"]: row for row in new}
        log(min(i + size, len(todo)))
        if should_stop(run):
            stopped(run)
    return [rows[x["id"]] for x in todo]


def load_real(cfg, folder):
    """A checkpoint's decoder in fp32 on the CPU."""
    try:
        shape = read_shape(json.loads((folder / "config.json").read_text()))
        with torch.device("meta"):
            model = Decoder(shape)
        tensors = {re.sub(r"^model\.|self_attn\.|mlp\.", "", k): v.float() for k, v in load_weights(folder).items()}
        tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight" or not shape.tied}
        model.load_state_dict(tensors, assign=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        fail(f"--model {folder}: no Llama or Qwen2 checkpoint: {' '.join(str(error).split())[:200]}")
    return model


def make_policy(cfg, run, b, weights=None):
    """A decoder as the base is, with what an arm learned in it, on the device; LoRA if asked for."""
    if cfg.model:
        model = load_real(cfg, fetch_model(cfg.model))
    else:
        model = Decoder(tiny_shape(cfg))
        model.load_state_dict(load_file(run.out / f"b{b}" / "base.safetensors"))
    torch.manual_seed(random_of("lora", cfg.seed).getrandbits(60))
    model = add_lora(model, cfg.lora_rank) if cfg.lora_rank else model
    if weights:
        model.load_state_dict(load_file(weights), strict=False)
    return model if run.world > 1 else model.to(run.device)


def shard(run, net):
    """Spread a network over the ranks: each holds a part of every block, and gathers the rest when it is used."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = MixedPrecisionPolicy(run.dtype, torch.float32) if run.dtype != torch.float32 else MixedPrecisionPolicy()
    mesh = dist.device_mesh.init_device_mesh(run.device.type, (run.world,))
    for part in [*net.model.layers, net]:
        fully_shard(part, mesh=mesh, mp_policy=half)
    return net


def get_state(run, net, optimizer=None):
    """Learned weights and optimizer state, whole, on rank 0's CPU where they are spread."""
    if run.world == 1:
        model = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
        return dict(model=model, optimizer=optimizer and optimizer.state_dict())
    from torch.distributed.checkpoint import state_dict as whole

    options = whole.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return dict(model=whole.get_model_state_dict(net, options=options),
                optimizer=optimizer and whole.get_optimizer_state_dict(net, optimizer, options=options))


def put_state(run, net, optimizer, state):
    if run.world == 1:
        net.load_state_dict(state["model"], strict=False)
        return optimizer.load_state_dict(state["optimizer"])
    from torch.distributed.checkpoint import state_dict as whole

    options = whole.StateDictOptions(full_state_dict=True, strict=False)
    whole.set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                         options=options)


def ledger(cfg, run, net, pairs, jobs):
    """Measure a step with shared and with separate contexts, and say what the arms will take."""
    rows, seconds, tokens = [pairs[i % len(pairs)] for i in range(cfg.micro_batch or cfg.batch_size)], [], []

    def step_of(batch):
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
            loss = net(**batch).sum()
        loss.backward()
        should_stop(run)  # waits for the device

    for shared in (True, False):
        batch = {k: x.to(run.device) for k, x in collate(rows, shared).items()}
        tokens.append(int((batch["segment"] < 3).sum()))
        seconds.append(min(timeit.repeat(lambda: step_of(batch), number=1, repeat=3)))
    net.zero_grad()
    step = seconds[0 if cfg.share_prefix else 1] * cfg.batch_size / len(rows)
    n, x = sum(p.numel() for p in net.parameters()), torch.randn(1024, 1024, device=run.device)
    peak = 2 * 1024**3 / min(timeit.repeat(lambda: (x @ x).sum().item(), number=1, repeat=3))
    rate = tokens[0] / seconds[0]
    saved = [1 - x[0] / x[1] for x in (tokens, seconds)]
    print(f"shared contexts save {saved[0]:.0%} of the tokens and {saved[1]:.0%} of the time: {rate:,.0f} tokens/s, "
          f"{6 * n * rate / peak:.0%} of a matmul's {peak / 1e9:.0f} GFLOP/s; {jobs} runs x {cfg.steps} steps x "
          f"{1e3 * step:.0f} ms = {jobs * cfg.steps * step / 60:.1f} minutes, evaluation not counted", flush=True)


QWEN2_7B = dict(model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                num_attention_heads=28, num_key_value_heads=4, vocab_size=152064)


def dry_run(cfg):
    """What the arms take, without allocating a network; the paper's scale without --model is Qwen2-7B."""
    if cfg.model:
        folder = fetch_model(cfg.model, offline=True)
        try:
            shape = read_shape(json.loads((folder / "config.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"{folder}/config.json: not one of a Llama or Qwen2 checkpoint: {error!r}")
    else:
        shape = read_shape(QWEN2_7B) if cfg.scale == "paper" else tiny_shape(cfg)
    with torch.device("meta"):
        model = Decoder(shape)
        model = add_lora(model, cfg.lora_rank) if cfg.lora_rank else model
    total, fit = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False))
    length = cfg.max_len if cfg.model or cfg.scale == "paper" else 100
    runs = len(jobs_of(cfg)) * cfg.bases
    tokens, rows = runs * cfg.steps * cfg.batch_size * length, cfg.micro_batch or cfg.batch_size
    memory = 4 * total + 12 * fit + rows * length * (34 * shape.n_layer * shape.n_embd + 8 * shape.vocab_size)
    write = 2 * total * cfg.bases * cfg.n_problems * (cfg.k + 4) * cfg.max_new
    flops = (4 + 2 * fit / total) * total * tokens
    print(f"{total:,} parameters, {fit:,} learned | {runs} runs x {cfg.steps} steps x {cfg.batch_size} pairs, at most "
          f"{tokens:.2e} tokens, {flops:.2e} FLOPs | sampling and editing {write:.2e} FLOPs | {memory / 2**30:.1f} GiB "
          f"(spread over the ranks of torchrun) | {flops / 200e12 / 3600 + write / 20e12 / 3600:.2f} hours on one H100")
    print("assumed: fp32 weights and AdamW, 200 TFLOP/s in training, 20 in sampling; no evaluation")


def plot_curves(path, log):
    """Gain in log-probability of the chosen and the rejected side by step, for each arm."""
    from matplotlib.figure import Figure

    curves = {}
    for row in map(json.loads, log.read_text().splitlines()):
        if "chosen" in row:
            curves.setdefault(row["name"].rpartition("-")[2], []).append([row["step"], row["chosen"], row["rejected"]])
    figure = Figure(figsize=(3 * max(1, len(curves)), 3), layout="constrained")
    panels = figure.subplots(1, max(1, len(curves)), squeeze=False, sharey=True)[0]
    for axes, (arm, points) in zip(panels, curves.items()):
        for column, side in ((1, "chosen"), (2, "rejected")):
            axes.plot([p[0] for p in points], [p[column] for p in points], ".", markersize=3, label=side)
        axes.set(title=f"arm {arm}", xlabel="step")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- 8. Main
def jobs_of(cfg):
    """(arm, DPO seed); arm 0 is the base itself."""
    return [(arm, seed) for seed in range(cfg.seeds) for arm in cfg.arms.split(",") if arm != "0"]


def make_pairs(cfg, run, b, policy, tok, problems):
    """The chain up to the pairs of base b: samples, edits and pairs in JSONL, why items were dropped, the audit."""
    folder, size = run.out / f"b{b}", cfg.part
    backend = Local(cfg, policy, tok)
    if cfg.endpoint:
        (run.out / "replies").mkdir(exist_ok=True)
        backend = Remote(cfg, Chat(cfg.endpoint, cfg.endpoint_model, run.out / "replies"))
    samples = stage(run, folder / "samples.jsonl", problems, size, lambda x: sample_problems(cfg, backend, x, b))
    chosen, drops = [], Counter()
    for row in samples:
        pairs, reason = select(row, random_of("select", cfg.seed, b, row["id"]))
        drops[f"problem: {reason}"] += bool(reason)
        if pairs:
            chosen.append(row | dict(chosen=pairs[0][0], combinations=pairs[: 1 + cfg.num_edits]))
    edits = stage(run, folder / "edits.jsonl", chosen, size, lambda x: edit_problems(cfg, backend, x, b))
    programs = {x["id"]: x.get("program") for x in problems}
    both = {row["id"]: (row, edit) for row, edit in zip(chosen, edits)}
    rows = stage(run, folder / "pairs.jsonl", chosen, size, lambda x: [
        build_pairs(cfg, *both[row["id"]], programs[row["id"]], b) for row in x])
    drops.update(f"edit: {step['drop']}" for row in edits for step in row["steps"] if step["drop"])
    drops["problem: no edit left"] += sum(not row["edit"] for row in rows)
    right = sum(s["correct"] for row in samples for s in row["samples"]) / (cfg.k * len(samples))
    counts = {"samples/right": right, "problems/mixed": len(rows) / len(samples)}
    counts |= {f"dropped/{name}": n for name, n in drops.items() if n} | audit(rows, edits)
    if cfg.endpoint:
        print(f"{backend.chat.tokens:,} tokens of the endpoint", flush=True)
    return [row for row in rows if row["edit"]], counts


def prepare(cfg, run, b, net, tok, rows):
    """{(id, kind, place): tokens} of all pairs that can be trained on, their reference log-probabilities (P, 2), which
    are computed once, and counts of those that cannot."""
    tokens, drops, path = {}, Counter(), run.out / f"b{b}" / "reference.safetensors"
    for row, kind, i in ((row, kind, i) for row in rows for kind in KINDS for i in range(len(row[kind]))):
        context, chosen, rejected = tokens_of(tok, row["question"], row[kind][i])
        reason = "same tokens" * (chosen == rejected) or "empty" * (not (chosen and rejected))
        if len(context) + len(chosen) + len(rejected) > cfg.max_len:
            reason = "too long"  # cut, both sides might be the same
        drops[f"dropped/pair: {reason}"] += bool(reason)
        if not reason:
            tokens[row["id"], kind, i] = context, chosen, rejected
    if not path.exists():
        if run.world > 1:
            fail(f"{path} is missing: run the same command without torchrun and with --until pairs first")
        replace_file(path, save(dict(logp=pair_logp(run, net.eval(), list(tokens.values())))))
    ref = load_file(path)["logp"]
    if len(ref) != len(tokens):
        fail(f"{path}: not of these pairs; remove it, and it will be made again")
    return tokens, dict(zip(tokens, ref)), {name: n for name, n in drops.items() if n}


def run_base(cfg, run, b, state, problems, sets, until):
    """One base model: pairs, then arms. Returns reference log-probabilities of held-out pairs by kind, and counts."""
    done, folder = state["done"], run.out / f"b{b}"
    folder.mkdir(exist_ok=True)
    if not cfg.model and not (folder / "base.safetensors").exists():
        replace_file(folder / "base.safetensors", export(train_base(cfg, run, b, state)))
    tok = Chatter(fetch_model(cfg.model)) if cfg.model else tiny_words()
    net = PairLogp(make_policy(cfg, run, b), cfg.kernels)
    rows, counts = make_pairs(cfg, run, b, net.model, tok, problems)
    tokens, ref, dropped = prepare(cfg, run, b, net, tok, rows)
    keys = {kind: [key for key in tokens if key[1] == kind and key[0] % 10 == 9] for kind in KINDS}  # held out
    held = {kind: [tokens[key] for key in part] for kind, part in keys.items() if part}
    before = {kind: torch.stack([ref[key] for key in keys[kind]]) for kind in held}
    counts |= dropped | {f"hardness/{kind}": float(torch.stack([ref[key][1] / len(tokens[key][2]) for key in tokens
                         if key[1] == kind]).mean()) for kind in held}
    rows = [row for row in rows if row["id"] % 10 != 9]
    if until == "pairs":
        return before, counts
    if len(rows) < 2 or not tokens:
        fail(f"{folder}/pairs.jsonl: pairs of {len(rows)} problems are too few to train on: raise --n-problems or --k")
    if cfg.batch_size % run.world:
        fail(f"--batch-size {cfg.batch_size}: must be a multiple of the {run.world} ranks")
    if b == 0 and run.world == 1:
        ledger(cfg, run, net, list(tokens.values()), cfg.bases * len(jobs_of(cfg)))
    del net
    for arm, seed in [("0", 0)] * ("0" in cfg.arms.split(",")) + jobs_of(cfg):
        job, weights = f"b{b}-s{seed}-{arm}", folder / f"{arm}-s{seed}.safetensors"
        if job in done:
            continue
        if arm != "0" and not weights.exists():
            wanted = [key for key in pairs_of_arm(cfg, arm, rows) if key in tokens]
            if not wanted:
                fail(f"{job}: no pair that arm {arm} can use: raise --n-problems or --max-len")
            net = PairLogp(make_policy(cfg, run, b), cfg.kernels)
            net = shard(run, net) if run.world > 1 else net
            train(cfg, run, job, arm, net, [tokens[key] for key in wanted], torch.stack([ref[key] for key in wanted]),
                  (b, seed), state)
            learned = {name.removeprefix("model."): p.contiguous() for name, p in get_state(run, net)["model"].items()}
            if not run.rank:
                replace_file(weights, save(learned))
            save_state(run, done=done, seconds=time.perf_counter() - run.began)
        if run.world == 1:
            net = PairLogp(make_policy(cfg, run, b, weights if arm != "0" else None), cfg.kernels)
            done[job] = evaluate(run, Local(cfg, net.model, tok), net, sets, held)
            state = dict(done=done)
            save_state(run, **state, seconds=time.perf_counter() - run.began)
    return before, counts


def summarise(cfg, done, ref):
    """{"arm/measure": mean over runs}, and "base/arm" to its evaluations."""
    metrics, groups = {}, {}
    for job, found in done.items():
        b, _, arm = job.split("-")
        groups.setdefault(f"{b}/{arm}", []).append(found)
        values = {name: right.double().mean().item() for name, right in found["correct"].items()}
        values |= {kind: 100 * wrong.double().mean().item() for kind, wrong in found["errors"].items()}
        for kind, logp in found["held"].items():
            gain = (logp - ref[b][kind]).double()
            values |= {f"{kind} margin": (gain[:, 0] - gain[:, 1]).mean().item(),
                       f"{kind} chosen": gain[:, 0].mean().item()}
        for name, value in values.items():
            metrics.setdefault(f"{arm}/{name}", []).append(value)
    return {name: float(np.mean(x)) for name, x in metrics.items()}, groups


def print_table(metrics, arms):
    """A row for each measure, a column for each arm: shares of right answers, errors in 100 problems, nats."""
    print(f"{'':18}" + "".join(f"{arm:>10}" for arm in arms))
    for name in dict.fromkeys(key.split("/")[1] for key in metrics if key.split("/")[0] in arms):
        cells = (f"{metrics[f'{arm}/{name}']:.3f}" if f"{arm}/{name}" in metrics else "" for arm in arms)
        print(f"{name:18}" + "".join(f"{cell:>10}" for cell in cells))
    print(" | ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key.split("/")[0] not in arms))


def plain(rows):
    """Generated problems for a chat model, such as: Ana has 6 pens. Gives 2. How many pens?"""
    def said(text):
        return ". ".join(part[0].upper() + part[1:] for part in re.sub(r" ([.?])", r"\1", text).split(". "))

    return [dict(id=x["id"], question=said(x["question"]), answer=x["answer"]) for x in rows]


def load_sets(cfg):
    """Problems to sample, and those to measure on by name."""
    if cfg.data:
        test = dict(test=read_problems(cfg.test_data, "--test-data", cfg.n_test)) if cfg.test_data else {}
        problems = read_problems(cfg.data, "--data", cfg.n_problems)
        both = {x["question"] for x in problems} & {x["question"] for rows in test.values() for x in rows}
        return (problems, test) if not both else fail(f"--data has questions of --test-data: {min(both)[:60]!r}")
    if cfg.model:  # easier ones, in sentences; such a model does not write its steps as the verifier reads them
        return plain(make_problems(cfg, "dpo", cfg.n_problems, cfg.seed, lengths=(1, 2))), dict(
            test=plain(make_problems(cfg, "test", cfg.n_test, 0, lengths=(1, 2))))
    return make_problems(cfg, "dpo", cfg.n_problems, cfg.seed), dict(
        dev=make_problems(cfg, "dev", cfg.n_dev, 0), test=make_problems(cfg, "test", cfg.n_test, 0),
        long=make_problems(cfg, "test", cfg.n_test // 2, 0, lengths=(5, 6)),
        reworded=make_problems(cfg, "test", cfg.n_test // 2, 1, verbs=RARE))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = cli(Config, SCALES, argv)
    if cfg.dry_run:
        return dry_run(cfg)
    if cfg.kernels and not torch.cuda.is_available():
        fail("--kernels needs a CUDA device; without the flag the same run takes plain PyTorch")
    problems, sets = load_sets(cfg)
    until, cfg.until = cfg.until, "eval"  # a run goes on from its pairs
    run = start_run(cfg, "rise")
    state = load_state(run) or dict(done={}, seconds=0.0)
    run.began = time.perf_counter() - state["seconds"]
    if not (run.out / "state.pt").exists():
        save_state(run, **state)  # from here on the directory belongs to these flags
    done, ref, counts = state["done"], {}, {}
    for b in range(cfg.bases):
        ref[f"b{b}"], found = run_base(cfg, run, b, state, problems, sets, until)
        for name, value in found.items():
            counts.setdefault(name, []).append(value)
    counts = {name: float(np.sum(x)) / (len(x) if "hardness" in name else cfg.bases) for name, x in counts.items()}
    if until == "pairs" or run.world > 1:
        if not run.rank:
            print(f"{run.out}: {json.dumps(counts)}; go on with the same command, --until eval and --resume")
        return counts
    metrics, groups = summarise(cfg, done, ref)
    arms = cfg.arms.split(",")
    print_table(metrics | counts, arms)
    plot_curves(run.out / "plot.png", run.out / "log.jsonl")
    found = statistics(groups, ref) if "test" in sets else {}
    if "rise-beats-dpo" in found and cfg.scale != "smoke" and found["rise-beats-dpo"][1][0] <= 0:
        print("The interval of C - A includes 0: that RISE is better than DPO on sampled pairs is not reproduced here.")
    digest = hashlib.sha256(json.dumps([problems, sets]).encode()).hexdigest()
    record = dict(tried={arm: TRIED[arm] for arm in arms}, metrics=metrics | counts, data_sha256=digest)
    return report(cfg, run, "rise", argv, found, CLAIMS, **record, minutes=(time.perf_counter() - run.began) / 60)


if __name__ == "__main__":
    main()
