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

  python rise.py                 # 8 min on one core: base 51 % right, DPO 78, RISE 79, likelihood 83 (one base)
  python rise.py --scale long --arms 0,A,C,D,E,F --bases 1 --seed 1    # one base of the long run
  python rise.py --task math --scale smoke --model DIR    # 13 min: a chat model of 135M, 50 problems
  python rise.py --task math --model DIR --data train.jsonl --test-data test.jsonl    # on real problems, LoRA
  ... --endpoint https://host/v1 --endpoint-model NAME    # samples and edits from there, training here
  torchrun --nproc-per-node 8 rise.py ... --resume    # after --until pairs; evaluate by python rise.py ... --resume

Symbols (B pairs, L tokens of a row, M tokens of a side)
  paper         code           shape       meaning
  x, s_<i       question, before           context of a step: the question and the right steps before
  s_i, s~_i     chosen, rejected           a step and its edit; for whole solutions y+ and y-
  LD, alpha     levenshtein, edit_alpha    Eq. 1: an edit is kept below this distance
  log pi        logp, ref      (B, 2)      of both sides, summed over their tokens: policy, starting model
  m             margin         (B,)        gain of the chosen side less that of the rejected one
  r             gain[:, 0]     (B,)        gain of the chosen side; NLL acts where it is below 0
  K, N          k, num_edits               samples of a problem, edited pairs of a problem

Stages, JSONL in OUT/b0: samples, edits, pairs, each with the reason where one was dropped. Finished problems are never
asked again.

Differences from the paper, of which the official code and summaries were at hand, not the text
  world       generated problems with an exact verifier in place of GSM8K and MATH, and of GPT-4o as judge of errors.
              Longer problems and rare words are in the tiny model's pre-training, not in its pairs.
  model       a tiny decoder in place of an instruct model. Its pre-training has wrong solutions too (HABITS): it can
              compute and errs by habit. This was chosen after a first look: with right solutions alone it lacked
              skill, and no arm improved it beyond noise (dev). A fifth of the pre-training is edits made by rule: their
              style is taught, and their errors are like those of the habits, which favours C before E.
  prompt      a chat model sees two problems with solutions before its own, and an edit (official code: none).
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
  endpoint    its replies cannot be begun with "Step 1:": the two solutions alone show the form.
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
import zipfile
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
    n_head: int = 4  # attention heads of the tiny model
    n_embd: int = 64  # width of the tiny model
    base_steps: int = 1000  # optimizer steps of the tiny model's own pre-training
    base_batch: int = 64  # examples in one step of this pre-training
    base_lr: float = 4e-3  # peak learning rate of this pre-training
    # data
    data: str = ""  # JSONL with question, answer (GSM8K's too: a number after ####) to sample; "" = generated ones
    test_data: str = ""  # the same, to measure on; "" = generated ones
    n_problems: int = 1500  # problems to sample (paper: 8,888)
    n_dev: int = 300  # held-out problems on which settings were chosen
    n_test: int = 1000  # held-out problems; half as many of the splits long and reworded
    # pairs
    k: int = 5  # samples of a problem, K (paper: 5)
    temp: float = 0.8  # temperature of sampling (official code: 0.2)
    top_p: float = 1.0  # share of probability that sampling is cut to (official code: 0.9)
    max_new: int = 90  # most tokens of a sample or an edit (official code: 2048)
    edit_temp: float = 1.0  # temperature of editing (official code: 0)
    edit_alpha: int = 5  # an edit is kept below this distance, in words and numbers (paper: alpha, not known)
    num_edits: int = 1  # edited pairs of a problem, N (paper: 1 for Qwen2-7B, 3 for Llama-3.1-8B)
    max_len: int = 320  # pairs of more tokens, context and both sides, are dropped (official code: cut at 1024)
    sample_batch: int = 640  # sequences decoded at once; samples of so many are written to a file at once
    # training
    beta: float = 0.4  # strength of DPO (official code: 0.4)
    nll: float = 1.0  # lambda of NLL (paper: not known)
    steps: int = 60  # optimizer steps of each arm
    batch_size: int = 64  # pairs in one optimizer step, over all devices (official code: 128)
    micro_batch: int = 0  # pairs per forward pass; 0 = no split; saves memory, same gradient
    lr: float = 0.0  # peak learning rate, cosine to 0; 0 = the arm's own out of RATES (official code: 5e-7)
    lora_rank: int = 0  # rank of LoRA in all linear layers; 0 = all are trained (paper); torchrun spreads them (FSDP)
    # machine
    device: str = "auto"  # auto|cpu|cuda|mps: auto is cuda if there is one, else cpu
    dtype: str = "auto"  # auto|float32|bfloat16: auto is bfloat16 on cuda, else float32
    kernels: bool = False  # Triton kernel token_logp (cuda only; compared with PyTorch at first use)
    # running
    save_every: int = 100  # steps between two checkpoints
    out: str = ""  # output directory; "" = out/rise/TASK-SCALE[-TAG]-sSEED
    resume: bool = False  # continue an interrupted run: the same command with this flag
    dry_run: bool = False  # print parameters, FLOPs, memory and hours, and stop

    def __post_init__(self):
        arms, real = self.arms.split(","), self.task == "math"
        zeros = "seed micro_batch temp edit_temp nll beta lr lora_rank base_lr top_p".split()
        for name, value in vars(self).items():
            low, high = int(name not in zeros), 1.0 if name == "top_p" else math.inf
            if not isinstance(value, (str, bool)) and not (low <= value <= high and value < math.inf):
                limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                fail(f"--{name.replace('_', '-')} {value}: must be {limits}")
        rules = [
            (not set(arms) <= set(ARMS) or len(set(arms)) < len(arms),
             f"--arms {self.arms}: a comma list, each once, out of {', '.join(ARMS)}"),
            (not self.top_p, "--top-p 0: must be more"),
            (self.n_test == 1, "--n-test 1: must be more"),
            (self.k < 2, f"--k {self.k}: at least 2, one sample that is right and one that is wrong"),
            (self.n_embd % (2 * self.n_head) or self.n_embd < 8,
             f"--n-embd {self.n_embd}: must be a multiple of twice --n-head {self.n_head}, and at least 8")]
        rules += [] if self.dry_run else [
            (real and not self.model, "--task math needs --model, a directory or a hub id"),
            (self.test_data and not self.data, "--test-data needs --data"),
            (not real and (self.model or self.endpoint or self.data),
             "--model, --endpoint, --data and --test-data need --task math"),
            (bool(self.endpoint) != bool(self.endpoint_model), "--endpoint and --endpoint-model go together"),
            (real and self.bases > 1, f"--bases {self.bases}: --model is one base"),
            (real and "F" in arms, f"--arms {self.arms}: F needs the verifier of --task chain"),
            (self.scale == "paper" and not real, "--scale paper needs --task math")]
        for wrong, text in rules:
            if wrong:
                fail(text)


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
REAL = dict(seeds=1, arms="0,A,C,E", max_new=320, max_len=1024, edit_alpha=16, temp=0.7, top_p=0.95, edit_temp=0.0,
            sample_batch=80, n_problems=1000, n_test=500, lora_rank=16, lr=1e-4)
SCALES = {  # "scale" and "scale:task"; explicit flags win
    "smoke": dict(n_layer=1, n_embd=32, base_steps=100, base_batch=32, base_lr=2e-2, n_problems=60, n_dev=6, n_test=6,
                  k=8, temp=1.0, max_new=48, edit_alpha=30, steps=3, batch_size=6, seeds=1, save_every=10,
                  arms="0,1,A,C,D,E"),
    "small": {},
    "long": dict(bases=3, seeds=3, n_problems=4000, n_test=2000, steps=140, arms=",".join("01ABCDEF")),
    "paper": dict(REAL, n_problems=8888, micro_batch=2, max_new=2048, lora_rank=0, temp=0.2, top_p=0.9, lr=5e-7,
                  batch_size=128, steps=560),
    "smoke:math": dict(REAL, arms="0,C", n_problems=50, n_test=10, k=5, temp=0.5, max_new=60, max_len=320,
                       sample_batch=125, steps=20, batch_size=4),
    "small:math": REAL,
    "long:math": dict(REAL, bases=1, n_problems=7473, n_test=1319, seeds=3, steps=300),
}
TRIED = {"0": 6, "1": 4, "A": 11, "B": 2, "C": 8, "D": 3, "E": 6, "F": 3}  # settings looked at, on dev problems


# ---------------------------------------------------------------- 2. Data
# World `chain`: a start amount and events; each event is a step with one or two terms, or a multiplication.
WHO, THINGS = "ana ben cleo dan eva finn".split(), "pens cups books coins keys".split()
VERBS = {"+": ["buys", "finds", "gets", "wins"], "-": ["loses", "sells", "gives", "drops"]}
VERBS |= {2: ["doubles"], 3: ["triples"]}
MISREAD = "gives"  # the pre-training corpus takes it for a gain more often than not
HABITS = dict(misread=0.75, omit=0.2, slip=0.15)  # share of such verbs, of steps with two terms, and of results
RARE = {"+": ["earns", "collects"], "-": ["spends", "breaks"], 2: ["twofolds"], 3: ["threefolds"]}
ODD = dict(long=dict(lengths=(5, 6)), reworded=dict(verbs=RARE))  # what the tiny model has seen in pre-training alone
TYPES = "CALC SUBST SYMBOL SWAP OMIT EXTRA INTER FORMAT".split()
SUBTLE = "CALC SUBST SYMBOL SWAP OMIT".split()  # what the edits aim at: claim 2
PARTS = dict(sft=range(6), dpo=range(6, 8), dev=range(8, 9), test=range(9, 10))  # last digit of a program's hash
LABEL = re.compile(r"^(?:Step \d+ ?:|Answer ?:)", re.M)
NUMBER = r"-?[0-9]{1,30}(?:,[0-9]{3})*(?:\.[0-9]{1,30})?(?:/[0-9]{1,30})?"
pieces = re.compile(r"\d+(?:\.\d+)?|\w+|[^\w\s]").findall  # words, numbers and signs, in which Eq. 1 counts
SAY = re.compile(rf"(?:answer *+(?:is)? *+:?|####|\\boxed\{{)[\s*$]*+({NUMBER})(?![\d^e]|[,./]\d)", re.I | re.A)


def compute(numbers, ops):
    """Left to right; a step has either + and -, or one *."""
    total = numbers[0]
    for op, n in zip(ops, numbers[1:]):
        total = total + n if op == "+" else total - n if op == "-" else total * n
    return total


def write_step(numbers, ops, result):
    return " ".join([str(numbers[0]), *(f"{op} {n}" for op, n in zip(ops, numbers[1:])), "=", str(result)])


def make_program(rng, part, lengths=(2, 3, 4), terms=(1, 2, 2), most=6, times=0.25):
    """(start, ((ops, numbers), ...)) with all results in 0..29, and a hash that belongs to this part of the data."""
    while True:
        start, events, length = rng.randint(2, 20), [], rng.choice(lengths)
        value = start
        while len(events) < length and 0 <= value < 30:
            ops, numbers = ("*",), (rng.choice((2, 3)),)
            if rng.random() >= times or value * numbers[0] >= 30:
                ops = tuple(rng.choice("+-") for _ in range(rng.choice(terms)))
                numbers = tuple(rng.randint(1, most) for _ in ops)
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


def make_problem(rng, part, verbs=VERBS, **limits):
    """A question with one number that plays no part, its answer, its program and the verbs of each event."""
    program, who, (thing, other) = make_program(rng, part, **limits), rng.choice(WHO), rng.sample(THINGS, 2)
    used = [[rng.choice(verbs[n if op == "*" else op]) for op, n in zip(*event)] for event in program[1]]
    told = [" and ".join(f"{verb} {'them' if op == '*' else n}" for verb, op, n in zip(words, *event))
            for words, event in zip(used, program[1])]
    told.insert(rng.randint(0, len(told)), f"the box has {rng.randint(1, 30)} {other}")
    question = f"{who} has {program[0]} {thing} . {' . '.join(told)} . how many {thing} ?"
    return dict(question=question, answer=str(gold_steps(program)[-1][2]), program=program, verbs=used)


def write_solution(steps):
    return "".join(f"Step {i} : {write_step(*step)}\n" for i, step in enumerate(steps, 1)) + f"Answer : {steps[-1][2]}"


def careless_solution(problem, rng):
    """A solution as the pre-training corpus has them, with the errors of HABITS, which later steps build on: a model of
    it can compute, and errs by habit. The examples of edits, symbol and del_term, have such errors too."""
    value, steps = problem["program"][0], []
    for (ops, numbers), verbs in zip(problem["program"][1], problem["verbs"]):
        read = ["+" if verb == MISREAD and rng.random() < HABITS["misread"] else op for op, verb in zip(ops, verbs)]
        terms = list(zip(read, numbers))
        if len(terms) == 2 and rng.random() < HABITS["omit"]:
            del terms[rng.randrange(2)]
        ops, numbers = zip(*terms)
        result = compute((value, *numbers), ops) + (rng.choice((-1, 1)) if rng.random() < HABITS["slip"] else 0)
        steps.append(((value, *numbers), ops, min(max(result, 0), 99)))
        value = steps[-1][2]
    return write_solution(steps)


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


def make_problems(part, count, seed, **odd):
    """Problems of one part of the data, no program twice; odd: other lengths or verbs."""
    rng, rows = random_of(part, seed, odd), {}
    for _ in range(1000 * count):
        row = make_problem(rng, part, **odd)
        rows.setdefault(row["program"], dict(id=len(rows), **row))
        if len(rows) == count:
            return [*rows.values()]
    fail(f"--n-problems, --n-test: there are no {count} different problems of this kind; --data takes yours")


def random_of(*key):
    return random.Random(repr(key))  # what is drawn depends on the key alone: a continued run draws the same


def in_sentences(question):
    """A generated problem as one tells it: Ana has 6 pens. Ana gives 2. How many pens does Ana have now?"""
    first, *events, last = question.split(" . ")
    who = first.split()[0]
    told = [first, *(f"{who} {part}" for part in events if not part.startswith("the box"))]
    told.append(last.replace(" ?", f" does {who.capitalize()} have now?"))
    return ". ".join(part[0].upper() + part[1:] for part in told)


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


@functools.cache
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
        return self.chat(solve_request(question))

    def edit_prompt(self, kind, question, before, step):
        return self.chat(edit_request(kind, question, before, step))


# --- block: lora ---
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
    """LoRA in all linear layers; rank 0: none, all weights are learned."""
    model.requires_grad_(not rank)
    for layer in model.layers if rank else ():
        for name, linear in list(layer.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(layer, name, Lora(linear, rank))
    return model
# --- end block ---


# ---------------------------------------------------------------- 4. Method (official code, reviews, our choices)
# Steps, edits and filters
INSTRUCTIONS = {  # seven, as in the official code, in our words: replace, exchange or leave out
    "value": "Change one number in it, so that the calculation is wrong.",
    "multi_value": "Change one number in it, or a chain of numbers that depend on each other.",
    "wrong_sub": "Put a wrong value or symbol in the place of one in the calculation.",
    "symbol": "Change one operator of the calculation, such as + to -.",
    "swap": "Exchange two terms of the calculation.",
    "del_term": "Leave out one term of the calculation.",
    "wording": "Change related words, so that the question is misread.",
}
EXAMPLES = [("Tom has 12 apples. Tom finds 5. How many apples does Tom have now?",
             "Step 1: Tom has 12 apples and finds 5, so 12 + 5 = 17.\nAnswer: 17"),
            ("Mia has 14 cards. Mia loses 4. How many cards does Mia have now?",
             "Step 1: Mia has 14 cards and loses 4, so 14 - 4 = 10.\nAnswer: 10")]
EDIT = ("Question:\n```\n{}\n```\nSolution so far:\n```\n{}\n```\nCurrent step:\n```\n{}\n```\nRewrite the current "
        "step. {} Do not say that there is a mistake. Reply with the edited step alone, between ``` and ```.")
EDITED = ["Tom has 12 apples and finds 5, so 12 + 5 = 17.", "Tom has 12 apples and finds 5, so 12 + 5 = 15."]
TELLTALE = "a mistake", "let's reconsider", "let me reconsider", "the correct", "python"  # (official code)
GIVEAWAY = (*TELLTALE, "mistake", "incorrect", "wrong", "erroneous", "an error")  # a longer list for edits


def solve_request(question):
    """Messages that ask a chat model for a solution, after two that show the form. (our choice; official code: none)"""
    turns = [*itertools.chain(*EXAMPLES), question]
    return [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(turns)]


def edit_request(kind, question, before, step):
    """The same for an edit, after one that shows the form."""
    example = EDIT.format(EXAMPLES[0][0], "Step 1:", EDITED[0], INSTRUCTIONS["multi_value"])
    return [dict(role="user", content=example), dict(role="assistant", content=f"Edited step:\n```\n{EDITED[1]}\n```"),
            dict(role="user", content=EDIT.format(question, before, step, INSTRUCTIONS[kind]))]


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
    kinds = [["wording"] * (not equation), ["value"], ["multi_value"]][min(numbers, 2)]
    return kinds + ["wrong_sub", "symbol", "swap", "del_term"] * equation


def levenshtein(a, b):
    """Fewest insertions, deletions and replacements that turn sequence a into b: O(len a len b), two rows."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def parse_edit(reply):
    """The text in the first fenced block, None without one; a label that the model repeats is taken off."""
    found = re.search(r"```(?:[a-z]*\n)?(.*?)```", reply, re.S)
    return re.sub(r"^\s*Step \d+ ?: *", "", found[1]).strip() or None if found else None


def filter_edit(question, step, edited, alpha):
    """Why an edit is dropped, "" if it is kept: Eq. 1 keeps LD(s, s~) < alpha, here in words, numbers and signs."""
    return ("not parsed" if edited is None else
            "gives it away" if gives_away(question, edited, GIVEAWAY) else
            "unchanged" if step.split() == edited.split() else
            "too far" if levenshtein(pieces(step), pieces(edited)) >= alpha else "")


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


# --- block: logp ---
def token_logp(h, w, target, kernels=False):
    """log p (T,) of targets (T,), in fp32 at least, from outputs h (T, d) and the head's weight w (V, d)."""
    if kernels:
        return load_kernel("token_logp")(h, w.to(h.dtype), target)  # never (T, V)
    logits = F.linear(h, w)  # (T, V)
    return logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32)).gather(1, target[:, None])[:, 0]
# --- end block ---


class PairLogp(nn.Module):
    """Log-probabilities (B, 2) of the chosen and the rejected side of pairs under a decoder."""

    def __init__(self, model, kernels=False):
        super().__init__()
        self.model, self.kernels = model, kernels

    def forward(self, ids, place, segment, source, target):
        """A row (B, L) holds a pair: its context (segment 0), the chosen side (1), the rejected one (2), padding (3);
        no side sees the other. place: positions; source (B, 2, M): behind which token of the row target follows, -100
        is none."""
        L, model = ids.shape[1], self.model
        past = torch.ones(L, L, dtype=torch.bool, device=ids.device).tril()
        mask = past & ((segment[:, None] == 0) | (segment[:, None] == segment[:, :, None]))  # (B, L, L)
        x, turn = model.embed_tokens(ids), model.turn(place)
        for layer in model.layers:
            x = layer(x, turn, mask[:, None])
        live = target >= 0
        logp = token_logp(model.norm(x)[live.nonzero()[:, 0], source[live]],
                          (model.lm_head or model.embed_tokens).weight, target[live], self.kernels)
        return logp.new_zeros(live.shape).masked_scatter(live, logp).sum(-1)


def collate(pairs):
    """Token lists (context, chosen, rejected) as what PairLogp takes: both sides behind one copy of their context."""
    B, L = len(pairs), max(sum(map(len, pair)) for pair in pairs)
    M = max(len(side) for _, *sides in pairs for side in sides)
    (ids, place), segment = torch.zeros(2, B, L, dtype=torch.long), torch.full((B, L), 3)
    source, target = torch.zeros(B, 2, M, dtype=torch.long), torch.full((B, 2, M), -100)
    for b, pair in enumerate(pairs):
        c, begin = len(pair[0]), 0
        for s, part in enumerate(pair):
            n, part = len(part), torch.tensor(part, dtype=torch.long)
            at = torch.arange(begin, begin + n)
            ids[b, at], segment[b, at], place[b, at] = part, s, at - begin + (c if s else 0)
            if s:  # the first token of a side follows the context, also that of the second side
                source[b, s - 1, :n], target[b, s - 1, :n] = (at - 1).where(at > begin, c - 1), part
            begin += n
    return dict(ids=ids, place=place, segment=segment, source=source, target=target)


# The chain: each stage appends finished problems to a JSONL file, whichever back-end answers
class Local:
    """A decoder as sampler and editor, in the run's dtype."""

    def __init__(self, cfg, model, tok, dtype=torch.float32):
        half = {id(p): nn.Parameter(p.detach().to(dtype), False) for p in model.parameters() if p.dtype != dtype}
        self.cfg, self.model, self.tok = cfg, copy.deepcopy(model, half).eval() if half else model.eval(), tok

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
        return [text if ended else None for text, ended in found]  # one that was cut has no end to learn

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

    def ask(self, requests, k, **options):
        return self.chat.ask([(dict(messages=messages, max_tokens=self.cfg.max_new, **options), i)
                              for messages in requests for i in range(k)])

    def sample(self, questions, k, key):
        return self.ask(map(solve_request, questions), k, temperature=self.cfg.temp, top_p=self.cfg.top_p)

    def edit(self, requests, key):
        return self.ask([edit_request(*request) for request in requests], 1, temperature=self.cfg.edit_temp)


def sample_problems(cfg, backend, problems, b):
    """K solutions of each problem, and whether their answers are right."""
    texts = iter(backend.sample([x["question"] for x in problems], cfg.k, ("sample", b, problems[0]["id"])))
    return [dict(id=x["id"], question=x["question"], answer=x["answer"],
                 samples=[dict(text=text, correct=is_correct(text or "", x["answer"]))
                          for text in itertools.islice(texts, cfg.k)]) for x in problems]


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
        rng, steps = random_of("edit", cfg.seed, b, row["id"]), []
        before, parts = split_steps(row["chosen"])
        for label, step in parts:
            before, (i, j) = before + label, tail(step)
            if kinds := admissible(step[i:j]) if label.startswith("Step") and step.strip() else []:
                steps.append(dict(before=before, step=step, kind=rng.choice(kinds)))
                requests.append((steps[-1]["kind"], row["question"], before + step[:i], step[i:j]))
            before += step
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
    """All pairs of a problem that the arms take, by kind."""
    rng, found = random_of("pairs", cfg.seed, b, row["id"]), {kind: [] for kind in KINDS}
    found["full"] = [dict(before="", chosen=good, rejected=bad, end=True) for good, bad in row["combinations"]]
    kept = [step for step in edits["steps"] if not step["drop"]]
    rng.shuffle(kept)
    for step in kept:
        pair = dict(before=step["before"], chosen=step["step"], end=False)
        count = max(1, levenshtein(pieces(step["step"]), pieces(step["edited"])))
        found["edit"].append(pair | dict(rejected=step["edited"], kind=step["kind"], distance=count))
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
            found["oracle"] = [dict(before=before, chosen=ours[i][1], rejected=theirs[i][1], end=False)]
            break
    used = {"full", "edit"} | {kind for arm in cfg.arms.split(",") for kind in ARMS[arm]}
    return dict(id=row["id"], question=row["question"], **{kind: found[kind] * (kind in used) for kind in KINDS})


def tokens_of(tok, question, pair):
    """(context, chosen, rejected) as token lists, encoded apart, so that the context is the same for both sides. The
    end is a token of whole solutions only: a step does not end an answer. (our choice; official code: of none)"""
    end = tok.stop[:1] * pair["end"]
    return (tok.solve_prompt(question) + tok.encode(pair["before"]), tok.encode(pair["chosen"]) + end,
            tok.encode(pair["rejected"]) + end)


@torch.no_grad()
def pair_logp(run, net, pairs, chunk=16):
    """Log-probabilities (P, 2) on the CPU of token pairs, computed as in training: else r would not begin at 0."""
    found = [torch.zeros(0, 2)]
    for i in range(0, len(pairs), chunk):
        batch = {name: x.to(run.device) for name, x in collate(pairs[i : i + chunk]).items()}
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
            found.append(net(**batch).float().cpu())
    return torch.cat(found)


def add_reference(cfg, run, net, tok, rows):
    """Write into each pair why it cannot be trained on, else its log-probabilities under the starting model."""
    kept = []
    for row, pair in ((row, pair) for row in rows for kind in KINDS for pair in row[kind]):
        tokens = context, chosen, rejected = tokens_of(tok, row["question"], pair)
        pair["drop"] = "same tokens" * (chosen == rejected) or "empty" * (not (chosen and rejected)) or \
            "too long" * (sum(map(len, tokens)) > cfg.max_len)  # cut, both sides might be the same
        kept += [(pair, tokens)] * (not pair["drop"])
    refs = pair_logp(run, net, [tokens for _, tokens in kept]).tolist()
    for (pair, (*_, rejected)), ref in zip(kept, refs):
        pair |= dict(ref=ref, hardness=ref[1] / len(rejected))
    return rows


def pairs_of_arm(cfg, arm, rows):
    """[(question, pair)]: what an arm is trained on. In place of N edits, arm A has N more full pairs, so that each
    problem is seen as often in all arms."""
    wanted = {kind: 1 if kind == "full" and len(ARMS[arm]) > 1 else cfg.num_edits + (len(ARMS[arm]) == 1)
              for kind in ARMS[arm]}
    return [(row["question"], row[kind][i % len(row[kind])]) for row in rows for kind, n in wanted.items()
            if row[kind] for i in range(n)]


# ---------------------------------------------------------------- 5. Evaluation and claims
def evaluate(run, local, net, sets, held):
    """What one policy does: right answers (N,) of each set, errors by type on the test set, and what both sides of the
    pairs of held-out problems have gained (P, 2): the mean over the pairs of each problem, by kind."""
    found = dict(correct={}, errors={}, gain={})
    for name, problems in sets.items():
        questions, answers = [x["question"] for x in problems], [x["answer"] for x in problems]
        texts = local.solve(questions)
        found["correct"][name] = torch.tensor([is_correct(*both) for both in zip(texts, answers)]).double()
        if name == "test":
            drawn = zip(local.sample(questions, EVAL_SAMPLES, ("evaluate",)), np.repeat(answers, EVAL_SAMPLES))
            right = torch.tensor([is_correct(text or "", answer) for text, answer in drawn]).double()
            found["correct"]["sampled"] = right.view(-1, EVAL_SAMPLES).mean(1)
        if name == "test" and "program" in problems[0]:
            kinds = [(verify(x["program"], text) or (0, ""))[1] for text, x in zip(texts, problems)]
            found["errors"] = {kind: torch.tensor([k == kind for k in kinds]).double() for kind in TYPES}
    for kind in KINDS:
        pairs = [[(tokens_of(local.tok, row["question"], pair), pair["ref"]) for pair in row[kind]] for row in held]
        if any(pairs):
            tokens, ref = zip(*itertools.chain(*pairs))
            gain = (pair_logp(run, net, tokens) - torch.tensor(ref)).double()
            found["gain"][kind] = torch.stack([x.mean(0) for x in gain.split([*map(len, pairs)]) if len(x)])
    return found


def audit(rows, edits):
    """Shares of edits that were dropped, by reason, and of those kept by what they are: still right, or which error."""
    steps = [step for row in edits for step in row["steps"]]
    kept = [pair for row in rows for pair in row["edit"]]
    count = Counter(step["drop"] or "kept" for step in steps)
    found = {f"edits/{reason}": n / len(steps) for reason, n in count.items()} | {"edits/asked": len(steps)}
    if kept:
        found["edits/distance"] = np.mean([pair["distance"] for pair in kept])
    if kept and "error" in kept[0]:
        hits = dict(multi_value="CALC", wrong_sub="SUBST", symbol="SYMBOL", swap="SWAP", del_term="OMIT")
        found["edits/still right"] = np.mean([not pair["error"] for pair in kept])
        found["edits/of the type asked for"] = np.mean([hits.get(x["kind"]) == x["error"] for x in kept])
    return found


EVAL_SAMPLES = 4  # of each test problem, at the temperature of the chain: a measure of less noise than greedy answers
# Fixed before the first evidence run, from the paper's claims: id, statistic, threshold, what would refute it.
# right: share of test problems with a right greedy answer; sampled: of right samples; subtle: with an error out of
# SUBTLE; chosen: gain of the chosen side of held-out pairs, nats, mean over a problem's full and edited pairs.
# Differences are paired; intervals over bases, their runs (DPO seeds) and problems; with one base they say nothing of
# other bases, with two runs little of other orders.
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
MEASURES = dict(
    right=lambda found: found["correct"]["test"], sampled=lambda found: found["correct"]["sampled"],
    subtle=lambda found: sum(found["errors"][kind] for kind in SUBTLE),  # a solution has one first error
    chosen=lambda found: (found["gain"]["full"] + found["gain"]["edit"])[:, 0] / 2)


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


def statistics(done):
    """Claim id to (statistic, interval), of what was measured. done: {base: {arm: [evaluation, ...]}}"""
    found = {}
    for name, formula, *_ in CLAIMS:
        measure, *arms = formula.replace("- ", "").split()
        runs = [[by_arm.get(arm, []) for by_arm in done.values()] for arm in arms]  # two arms, bases, runs
        needs = dict(subtle="errors", chosen="gain").get(measure, "correct")
        if not all(of_base and all(result[needs] for result in of_base) for arm in runs for of_base in arm):
            continue  # an arm that was not asked for; a model without a verifier; no problem is held out
        values = [[[MEASURES[measure](result) for result in of_base] for of_base in arm] for arm in runs]
        n = min(len(x) for arm in values for of_base in arm for x in of_base)  # bases may differ in held-out problems
        first, second = (np.array([[x[:n] for x in of_base] for of_base in arm]) for arm in values)  # (bases, runs, n)
        found[name] = bootstrap(first - second)  # the base has one evaluation, which is taken for each run
    return found


# ---------------------------------------------------------------- 6. Training
def base_example(rng, odd):
    """(prompt, answer) in tokens for the tiny model's own pre-training: four of five times a solution, else an edit."""
    tok, problem = Words(), make_problem(rng, "sft", **odd)
    if rng.random() < 0.8:
        return tok.solve_prompt(problem["question"]), tok.encode(careless_solution(problem, rng)) + tok.stop
    steps, (head, parts) = gold_steps(problem["program"]), split_steps(write_solution(gold_steps(problem["program"])))
    i = rng.randrange(len(steps))
    kind = rng.choice(admissible(parts[i][1]))
    edited = corrupt(kind, steps[i], rng) or write_step(*steps[i])
    before = head + "".join(label + step for label, step in parts[:i]) + parts[i][0]
    return tok.edit_prompt(kind, problem["question"], before, parts[i][1].strip()), tok.encode(edited) + tok.stop


def train_base(cfg, run, b):
    """The tiny model that stands for the instruct model: the average of the weights on the way. Not averaged, its
    accuracy jumps by 0.3 from one look to the next, and any training at a low learning rate would seem to teach it."""
    torch.manual_seed(random_of("base", cfg.seed, b).getrandbits(60))
    model, job, step = Decoder(tiny_shape(cfg)).to(run.device), f"b{b}-base", 0
    nn.init.normal_(model.embed_tokens.weight, 0, 0.05)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), cfg.base_lr, (0.9, 0.98), fused=True)
    if run.state.get("job") == job:
        step = run.state["step"]
        for name, part in dict(model=model, average=average, optimizer=optimizer).items():
            part.load_state_dict(run.state[name])
    log = Log(run, job, cfg.base_steps, step)
    while step < cfg.base_steps:
        for group in optimizer.param_groups:
            group["lr"] = cfg.base_lr * min(1.0, (step + 1) / 50)
        rng = random_of("sft", cfg.seed, b, step)
        # one batch in ten is of longer problems, one of rare words: the splits long and reworded are known, not common
        odd = {0: ODD["long"], 5: ODD["reworded"]}.get(step % 10, {})
        rows = [base_example(rng, odd) for _ in range(cfg.base_batch)]
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
        if step % 10 == 0 or step == cfg.base_steps:
            log(step, loss=loss.item())
        after_step(run, step % cfg.save_every == 0, lambda: dict(
            job=job, step=step, model=model.state_dict(), average=average.state_dict(),
            optimizer=optimizer.state_dict()))
    return average


# Peak learning rates: each the best of two to five from 5e-5 to 1e-3, by greedy answers to 1000 dev problems after one
# run on one base; those of 1, B and F are at the end of what was tried
RATES = {"1": 1e-4, "A": 1e-4, "B": 4e-4, "C": 2e-4, "D": 2e-4, "E": 2e-4, "F": 1e-4}


def presentation(n, total, *key):
    """The pair shown at each of `total` places: all n in a new random order, again and again."""
    orders = [torch.randperm(n, generator=torch.Generator().manual_seed(zlib.crc32(repr((*key, epoch)).encode())))
              for epoch in range(-(-total // n))]
    return torch.cat(orders)[:total].tolist()


def train(cfg, run, job, arm, net, pairs, ref, seed):
    """One arm: preference learning on token pairs with their reference log-probabilities ref (P, 2)."""
    fit = {name: p for name, p in net.named_parameters() if p.requires_grad}
    lr, step, total = cfg.lr or RATES[arm], 0, cfg.steps * cfg.batch_size
    optimizer = torch.optim.AdamW(fit.values(), lr, weight_decay=0.0)
    if run.state.get("job") == job:
        step = run.state["step"]
        put_state(run, net, optimizer)
    order = presentation(len(pairs), total, cfg.seed, seed, arm)
    loss_of = rft_loss if arm == "1" else functools.partial(
        rise_loss, beta=cfg.beta, nll=0.0 if arm == "D" else cfg.nll)
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
            group["lr"] = lr_at(step, lr, 0.0, cfg.steps // 10, cfg.steps)  # (official code)
        rows = order[step * cfg.batch_size :][: cfg.batch_size][run.rank :: run.world]
        seen.clear()
        loss = accumulate(view, collate([pairs[i] for i in rows]) | dict(ref=ref[rows]), cfg.micro_batch or len(rows),
                          loss_sum)
        norm = nn.utils.clip_grad_norm_(fit.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step == 1 or step % 10 == 0 or step == cfg.steps:
            if not loss.isfinite():
                fail(f"{job}: training diverged; lower --lr")
            margin, right, chosen, rejected = torch.cat(seen, 1).mean(1).tolist()
            per_s = (step - first) * cfg.batch_size / (time.perf_counter() - began)
            log(step, loss=loss.item(), margin=margin, right=right, chosen=chosen, rejected=rejected,
                gnorm=float(norm), lr=group["lr"], pairs_per_s=per_s)
        after_step(run, step % cfg.save_every == 0, lambda: dict(job=job, step=step, **get_state(run, net, optimizer)))


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


# --- block: stop ---
def stopped(run):
    """After Ctrl-C, when the state is saved: say how to go on, and leave."""
    again = shlex.join([sys.executable, *sys.argv]) + " --resume" * ("--resume" not in sys.argv)
    if not run.rank:
        print("stopped; continue with:", again if run.world == 1 else "the same command and --resume")
    raise SystemExit(130)
# --- end block ---


def save_progress(run, parts=None):
    """What --resume needs: finished jobs, seconds of all parts of the run, and parts of the job at hand, if new."""
    run.state = run.state if parts is None else dict(done=run.state["done"], **parts)
    run.state["seconds"] = time.perf_counter() - run.began
    save_state(run, **run.state)


def after_step(run, due, make_parts=lambda: None):
    """Save if it is due, and at Ctrl-C, where the run ends."""
    stop = should_stop(run)
    if stop or due:
        save_progress(run, make_parts())
    if stop:
        stopped(run)


def read_rows(path):
    """{id: row} of a JSONL file that a kill may have cut: what follows the last whole line is taken off."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    try:
        return {row["id"]: row for row in map(json.loads, whole.splitlines())}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f"{path}: not a file of this script: {error!r}; remove it, and it will be made again")


def stage(cfg, run, path, todo, make):
    """Rows of a JSONL file for the items `todo`, in their order; make(part) gives those of some, which are appended at
    once. What is there is not made again; a part is always made whole, as its random numbers need."""
    rows, log, size = read_rows(path), Log(run, path.stem, len(todo)), max(1, cfg.sample_batch // cfg.k)
    for i in range(0, len(todo), size):
        part = todo[i : i + size]
        missing = {x["id"] for x in part} - rows.keys()
        if missing and run.world > 1:
            fail(f"torchrun trains on finished pairs: run the same command alone with --until pairs first ({path})")
        if missing:
            new = {row["id"]: row for row in make(part) if row["id"] in missing}
            with open(path, "ab") as file:
                file.write("".join(json.dumps(row) + "\n" for row in new.values()).encode())
                file.flush()
                os.fsync(file.fileno())
            rows |= new
        log(min(i + size, len(todo)))
        after_step(run, missing)
    return [rows[x["id"]] for x in todo]


QWEN2_7B = dict(model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                num_attention_heads=28, num_key_value_heads=4, vocab_size=152064)


def shape_of(cfg):
    """The numbers of --model's config.json; without it the paper's scale is Qwen2-7B."""
    if not cfg.model:
        return read_shape(QWEN2_7B) if cfg.scale == "paper" else tiny_shape(cfg)
    folder = fetch_model(cfg.model, offline=cfg.dry_run)
    try:
        return read_shape(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        fail(f"{folder}/config.json: not one of a Llama or Qwen2 checkpoint: {error!r}")


def make_policy(cfg, run, b, weights=None):
    """A decoder in fp32 as the base is, with what an arm learned in it, on the device; LoRA if asked for."""
    if cfg.model:
        model = load_real(fetch_model(cfg.model))
    else:
        model, base = Decoder(shape_of(cfg)), run.out / f"b{b}" / "base.safetensors"
        try:
            model.load_state_dict(load_file(base))
        except (OSError, RuntimeError, SafetensorError) as error:
            fail(f"{base}: damaged, remove {run.out} and start again: {error}")
    torch.manual_seed(random_of("lora", cfg.seed).getrandbits(60))
    model = add_lora(model, cfg.lora_rank)
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
    """Learned weights and the optimizer's state by their names, whole on rank 0's CPU where they are spread."""
    from torch.distributed.checkpoint import state_dict as whole

    options = whole.StateDictOptions(full_state_dict=run.world > 1, cpu_offload=run.world > 1,
                                     ignore_frozen_params=True)
    return dict(model=whole.get_model_state_dict(net, options=options),
                optimizer=optimizer and whole.get_optimizer_state_dict(net, optimizer, options=options))


def put_state(run, net, optimizer):
    from torch.distributed.checkpoint import state_dict as whole

    whole.set_state_dict(net, optimizer, model_state_dict=run.state["model"], optim_state_dict=run.state["optimizer"],
                         options=whole.StateDictOptions(full_state_dict=run.world > 1, strict=False))


def work(cfg, model):
    """What a run takes at most: tokens of a pair, half of it prompt; tokens that are trained, read as prompts, written;
    all parameters and those learned; FLOPs of a token in training."""
    length, jobs = cfg.max_len if cfg.task == "math" else 100, cfg.bases * len(jobs_of(cfg))
    base = cfg.bases * cfg.base_steps * cfg.base_batch * length // 2 * (cfg.task == "chain")
    answers = cfg.bases * cfg.n_problems * (cfg.k + 4) + (jobs + cfg.bases) * cfg.n_test * (1 + EVAL_SAMPLES)
    total, fit = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False))
    tokens = base + jobs * cfg.steps * cfg.batch_size * length, answers * length // 2, answers * cfg.max_new
    return length, tokens, total, fit, 4 * total + 2 * fit


def ledger(cfg, run):
    """Before anything is trained: measure what a token costs in training and in writing, and say what all will take."""
    with run.device:
        model, x = add_lora(Decoder(shape_of(cfg)), cfg.lora_rank), torch.randn(1024, 1024)
    length, (trained, read, written), *_, flops = work(cfg, model)
    quarter = [1] * (length // 4)
    batch = collate([(quarter * 2, quarter, quarter)] * (1 if cfg.model else 64))
    batch = {name: part.to(run.device) for name, part in batch.items()}
    net, local = PairLogp(model, cfg.kernels), Local(cfg, model, Words(), run.dtype)

    def step():
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
            logp = net(**batch)
        logp.sum().backward()

    def seconds(function):
        return min(timeit.repeat(lambda: (function(), x.sum().item()), number=1, repeat=2))  # item() waits for a GPU

    train = seconds(step) / batch["ids"].numel()
    write = seconds(lambda: generate(local.model, [[1]] * cfg.sample_batch, 4)) / (4 * cfg.sample_batch)
    share = flops / train * seconds(lambda: x @ x) / (2 * 1024**3)
    minutes = ((trained + read / 3) * train + written * write) / 60
    print(f"{1 / train:,.0f} tokens/s in training ({share:.0%} of a matmul's FLOP/s), {1 / write:,.0f} in writing; at "
          f"most {trained:,} trained, {read:,} read, {written:,} written = {minutes:.1f} minutes"
          + ", more than the 10 minutes of --scale small" * (cfg.scale == "small" and minutes > 10), flush=True)


def dry_run(cfg):
    """The same without a measurement and without allocating a network."""
    shape, rows = shape_of(cfg), cfg.micro_batch or cfg.batch_size
    with torch.device("meta"):
        length, (trained, read, written), total, fit, flops = work(cfg, add_lora(Decoder(shape), cfg.lora_rank))
    memory = 4 * total + 12 * fit + rows * length * (34 * shape.n_layer * shape.n_embd + 8 * shape.vocab_size)
    hours = (flops * trained / 200e12 + 2 * total * (read / 200e12 + written / 20e12)) / 3600
    print(f"{total:,} parameters, {fit:,} learned | at most {trained:.2e} tokens trained, {flops * trained:.2e} FLOPs, "
          f"{read:.2e} read, {written:.2e} written | {memory / 2**30:.1f} GiB (spread over the ranks of torchrun) | "
          f"{hours:.2f} hours on one H100")
    print("assumed: fp32 weights and AdamW, 200 TFLOP/s in training and reading, 20 in writing")


def plot_curves(path, log):
    """Gain in log-probability of the chosen side (drawn through) and the rejected one (dashed), for each arm."""
    from matplotlib.figure import Figure

    figure, curves = Figure(figsize=(6, 4), layout="constrained"), {}
    axes = figure.subplots()
    for row in map(json.loads, log.read_text().splitlines()):
        if "chosen" in row:
            arm = curves.setdefault(row["name"].rpartition("-")[2], {})
            arm.setdefault(row["step"], []).append((row["chosen"], row["rejected"]))
    for i, (arm, points) in enumerate(curves.items()):
        means = np.array([np.mean(points[step], 0) for step in sorted(points)])  # (steps, 2), over bases and seeds
        axes.plot(sorted(points), means[:, 0], "-", color=f"C{i}", label=f"{arm} chosen")
        axes.plot(sorted(points), means[:, 1], "--", color=f"C{i}", label=f"{arm} rejected")
    axes.set(xlabel="step", ylabel="gain in log-probability")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- 8. Main
def jobs_of(cfg):
    """(arm, DPO seed); arm 0 is the base itself."""
    return [(arm, seed) for seed in range(cfg.seeds) for arm in cfg.arms.split(",") if arm != "0"]


def make_pairs(cfg, run, b, tok, problems):
    """The chain up to the pairs of base b: problems with pairs to train on, why others were dropped, and the audit."""
    folder, net, backend = run.out / f"b{b}", PairLogp(make_policy(cfg, run, b), cfg.kernels), None
    if cfg.endpoint:
        (run.out / "replies").mkdir(exist_ok=True)
        backend = Remote(cfg, Chat(cfg.endpoint, cfg.endpoint_model, run.out / "replies"))
    elif run.world == 1:
        backend = Local(cfg, net.model, tok, run.dtype)
    samples = stage(cfg, run, folder / "samples.jsonl", problems, lambda part: sample_problems(cfg, backend, part, b))
    chosen, drops = [], Counter()
    for row in samples:
        pairs, reason = select(row, random_of("select", cfg.seed, b, row["id"]))
        drops[f"problem: {reason}"] += bool(reason)
        if pairs:
            chosen.append(row | dict(chosen=pairs[0][0], combinations=pairs[: 1 + cfg.num_edits]))
    edits = stage(cfg, run, folder / "edits.jsonl", chosen, lambda part: edit_problems(cfg, backend, part, b))
    programs, edit_of = {x["id"]: x.get("program") for x in problems}, {row["id"]: row for row in edits}
    rows = stage(cfg, run, folder / "pairs.jsonl", chosen, lambda part: add_reference(cfg, run, net, tok, [
        build_pairs(cfg, row, edit_of[row["id"]], programs[row["id"]], b) for row in part]))
    counts = {"samples/right": np.mean([s["correct"] for row in samples for s in row["samples"]]),
              "problems/mixed": len(rows) / len(samples)} | audit(rows, edits)
    for kind in KINDS:
        drops.update(f"pair: {pair['drop']}" for row in rows for pair in row[kind] if pair["drop"])
        for row in rows:
            row[kind] = [pair for pair in row[kind] if not pair["drop"]]
        if hardness := [pair["hardness"] for row in rows for pair in row[kind]]:
            counts[f"hardness/{kind}"] = np.mean(hardness)
    drops["problem: no edit left"] += sum(not row["edit"] for row in rows)
    if cfg.endpoint:
        print(f"{backend.chat.tokens:,} tokens of the endpoint", flush=True)
    counts |= {f"dropped/{name}": n for name, n in drops.items() if n}
    return [row for row in rows if row["edit"] and row["full"]], counts


def run_base(cfg, run, b, problems, sets, until):
    """One base model: its pairs, then the arms. Returns counts of what the pairs are."""
    folder = run.out / f"b{b}"
    folder.mkdir(exist_ok=True)
    if not cfg.model and not (folder / "base.safetensors").exists():
        replace_file(folder / "base.safetensors", export(train_base(cfg, run, b)))
    tok = Chatter(fetch_model(cfg.model)) if cfg.model else Words()
    rows, counts = make_pairs(cfg, run, b, tok, problems)
    if until == "pairs":
        return counts
    held, rows = ([row for row in rows if (row["id"] % 10 == 9) == out] for out in (True, False))
    if len(rows) < 2:
        fail(f"{folder}/pairs.jsonl: pairs of {len(rows)} problems are too few to train on: raise --n-problems or --k")
    for arm, seed in [("0", 0)] * ("0" in cfg.arms.split(",")) + jobs_of(cfg):
        job, weights = f"b{b}-s{seed}-{arm}", folder / f"{arm}-s{seed}.safetensors"
        if job in run.state["done"]:
            continue
        if arm != "0" and not weights.exists():
            wanted = pairs_of_arm(cfg, arm, rows) or fail(
                f"{job}: no pair that arm {arm} can use: raise --n-problems or --max-len")
            net = PairLogp(make_policy(cfg, run, b), cfg.kernels)
            net = shard(run, net) if run.world > 1 else net
            train(cfg, run, job, arm, net, [tokens_of(tok, *both) for both in wanted],
                  torch.tensor([pair["ref"] for _, pair in wanted]), (b, seed))
            learned = {name.removeprefix("model."): p.contiguous() for name, p in get_state(run, net)["model"].items()}
            if not run.rank:
                replace_file(weights, save(learned))
            save_progress(run, {})
        if run.world == 1:
            net = PairLogp(make_policy(cfg, run, b, weights if arm != "0" else None), cfg.kernels)
            run.state["done"][job] = evaluate(run, Local(cfg, net.model, tok, run.dtype), net, sets, held)
            save_progress(run)
    return counts


def summarise(done):
    """{"arm/measure": mean over runs}, and the evaluations as {base: {arm: [evaluation, ...]}}."""
    metrics, groups = {}, {}
    for job, found in done.items():
        b, _, arm = job.split("-")
        groups.setdefault(b, {}).setdefault(arm, []).append(found)
        values = found["correct"] | {kind: 100 * wrong for kind, wrong in found["errors"].items()}
        for kind, gain in found["gain"].items():
            values |= {f"{kind} margin": gain[:, 0] - gain[:, 1], f"{kind} chosen": gain[:, 0]}
        for name, value in values.items():
            metrics.setdefault(f"{arm}/{name}", []).append(value.mean().item())
    return {name: float(np.mean(x)) for name, x in metrics.items()}, groups


def print_table(metrics, arms):
    """A row for each measure, a column for each arm: shares of right answers, errors in 100 problems, nats."""
    print(f"{'':18}" + "".join(f"{arm:>10}" for arm in arms))
    for name in dict.fromkeys(key.split("/")[1] for key in metrics if key.split("/")[0] in arms):
        cells = (f"{metrics[f'{arm}/{name}']:.3f}" if f"{arm}/{name}" in metrics else "" for arm in arms)
        print(f"{name:18}" + "".join(f"{cell:>10}" for cell in cells))
    print(" | ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key.split("/")[0] not in arms))


def load_sets(cfg):
    """Problems to sample, and those to measure on by name."""
    if cfg.data:
        test = dict(test=read_problems(cfg.test_data, "--test-data", cfg.n_test)) if cfg.test_data else {}
        problems = read_problems(cfg.data, "--data", cfg.n_problems)
        both = {x["question"] for x in problems} & {x["question"] for rows in test.values() for x in rows}
        return (problems, test) if not both else fail(f"--data has questions of --test-data: {min(both)[:60]!r}")
    easy = dict(lengths=(1,), terms=(1,), most=12, times=0.0) if cfg.scale == "smoke" else dict(lengths=(1, 2))
    easy = easy if cfg.model else {}
    problems = make_problems("dpo", cfg.n_problems, cfg.seed, **easy)
    sets = dict(dev=make_problems("dev", cfg.n_dev, 0), test=make_problems("test", cfg.n_test, 0, **easy))
    if cfg.model:  # such a model does not write its steps as the verifier reads them: without programs
        problems, test = ([dict(id=x["id"], question=in_sentences(x["question"]), answer=x["answer"]) for x in rows]
                          for rows in (problems, sets["test"]))
        return problems, dict(test=test)
    return problems, sets | {name: make_problems("test", cfg.n_test // 2, 1, **odd) for name, odd in ODD.items()}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = cli(Config, SCALES, argv)
    if cfg.dry_run:
        return dry_run(cfg)
    if cfg.kernels and not torch.cuda.is_available():
        fail("--kernels needs a CUDA device; without the flag the same run takes plain PyTorch")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % world:
        fail(f"torchrun: --batch-size {cfg.batch_size} must be a multiple of {world}")
    problems, sets = load_sets(cfg)
    until, cfg.until = cfg.until, "eval"  # a run goes on from its pairs
    run = start_run(cfg, "rise")
    run.state = load_state(run) or dict(done={}, seconds=0.0)
    run.began = time.perf_counter() - run.state["seconds"]
    if not (run.out / "state.pt").exists():
        save_progress(run)  # from here on the directory belongs to these flags
    if run.world == 1:
        ledger(cfg, run)
    found = [run_base(cfg, run, b, problems, sets, until) for b in range(cfg.bases)]
    counts = {name: [x[name] for x in found if name in x] for name in dict.fromkeys(itertools.chain(*found))}
    counts = {name: float(np.sum(x)) / (len(x) if "hardness" in name else cfg.bases) for name, x in counts.items()}
    if until == "pairs" or run.world > 1:
        if not run.rank:
            print(f"{run.out}: {json.dumps(counts)}; go on with the same command, --until eval and --resume")
        return counts
    metrics, groups = summarise(run.state["done"])
    arms = cfg.arms.split(",")
    print_table(metrics | counts, arms)
    plot_curves(run.out / "plot.png", run.out / "log.jsonl")
    found = statistics(groups) if "test" in sets else {}
    if "rise-beats-dpo" in found and cfg.scale != "smoke" and found["rise-beats-dpo"][1][0] <= 0:
        print("The interval of C - A includes 0: that RISE is better than DPO on sampled pairs is not reproduced here.")
    digest = hashlib.sha256(json.dumps([problems, sets]).encode()).hexdigest()
    record = dict(tried={arm: TRIED[arm] for arm in arms}, metrics=metrics | counts, data_sha256=digest)
    return report(cfg, run, "rise", argv, found, CLAIMS, **record, minutes=(time.perf_counter() - run.began) / 60)


if __name__ == "__main__":
    from_shell(main)
