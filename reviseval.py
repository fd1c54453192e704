# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "safetensors", "tqdm", "matplotlib", "tiktoken", "requests"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""reviseval.py: RevisEval: Improving LLM-as-a-Judge via Response-Adapted References
Zhang, Wang, Yu, Jiang, Wu, Li, Wang, Jiang, Shang, Tang, Lyu, Ma, ICLR 2025, arXiv 2410.05193

A fixed reference says the right thing in other words, so that metrics measure the words. RevisEval lets a model revise
the very response that is judged: what the revision keeps was right, and even BLEU against it measures what was wrong.

  python reviseval.py    # 5 min on a busy core: tau-b of BLEU with quality 0.76 against r*, 0.24 against fixed ones
  python reviseval.py --task data --data my.jsonl --endpoint https://host/v1 --model NAME --report report.html
  python reviseval.py --task data --data sfres.json --schema unieval --encoder DIR --scorer DIR    # metrics alone

Symbols (N responses, P pairs of them)
  paper        code                          meaning
  x, y         source, response              instruction or record, and an answer to it
  r^, D.R.     human, direct                 the reference that came with x; the model's own answer
  r* = R(x,y)  adapted                       y as the reviser leaves it
  F_M(y, r)    measure                       metrics (N,) of y against any reference
  F_E(y|x,r)   Tiny.judge, make_judgments    the judge with a reference, or without one (column none)
               prefer                        winners (P,) of pairs by whose revision judges them: random, own, both

my.jsonl has rows {"id", "instruction", "source", "response", "reference", "scores": {"overall": 3}}; pairs have "a",
"b", "label": 1 in place of response and scores. id, reference and one of instruction and source may be missing. The run
writes direct.jsonl, references.jsonl, judgments.jsonl (16 rows at a time, none twice), result.json and the page.

Differences from the paper, of which the official code, figures and tables were at hand, not the text
  world       records of restaurants and texts with counted errors (D2T-R), not annotated texts: quality is exact, and
              only factual; length says nothing of it. Contradictions, a quarter of the phrasings are new to models.
  model       four tiny decoders, as reviser, judge with and without reference, and writer (D.R.), from equally many
              examples. The judges explain, then score: with scores alone they learned little. Two readings: expected
              score by logits (judge), likeliest score (verdict). Scores are 1 to 5, ours.
  pairs       metrics take the mean over the revisions of both answers: with a single revision of a random answer, as in
              the official code, that answer wins too often (column random, row "primary wins"). An LLM judge sees it.
  verdicts    the last [[A]] or [[3]]; else none: of pairs a half, of ratings left out (official code: first substring).
  edit        words that the reviser changed: if this is as good as BLEU, the revision and not the metric judges.
  control     mismatched: the revision of another response to x (pairs, lone responses: to another x); no random text,
              no direct reference of equal length.
  revising    the answer stands in for a revision that is empty or thrice as long. D.R. at the reviser's temperature.
  metrics     BERTScore without idf and rescaling; BARTScore from a causal model and "In other words,", both directions.
  left out    tuned LLMs, METEOR, MOVERScore, majority vote, agreement by system, judging by logits outside the world.

Copy out: tau_b, tau_draws with resampled, bleu, rouge, greedy_f1, prefer
"""

import argparse
import ast
import contextlib
import copy
import difflib
import functools
import hashlib
import html
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
import unicodedata
import zipfile
import zlib
from collections import Counter
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
    task: str = "world"  # world|data: generated texts of exact quality and a tiny model, or human judgements
    scale: str = "small"  # smoke|small|long|paper: a row of SCALES below; explicit flags win over it
    arms: str = "human,direct,adapted,mismatched"  # comma list of references; scorers without any always run
    tag: str = "main"  # name of this variant in the RESULT record
    seed: int = 0  # weights, training texts, held-out texts, random primaries
    pair_ref: str = "both"  # random|both|own: whose revision judges a pair in column adapted (official code: random)
    # task world: a tiny model for each role
    n_layer: int = 3  # layers of a tiny model
    n_head: int = 4  # attention heads of a tiny model
    n_embd: int = 64  # width of a tiny model
    steps: int = 1200  # optimizer steps of each tiny model
    batch_size: int = 16  # examples in one optimizer step
    lr: float = 4e-3  # learning rate, constant after 50 steps
    n_records: int = 150  # held-out records, each with SYSTEMS responses
    part: str = "test"  # dev|test: which held-out records; settings were chosen on dev, with seed 7
    # task data: human judgements
    data: str = ""  # file of human judgements
    schema: str = "jsonl"  # jsonl|llmbar|unieval: form of the file of --data
    n_rows: int = 0  # how many rows of --data; 0 = all
    aspect: str = ""  # which of the scores of a rating; "" = overall, else the first
    rubric: str = "helpfulness, accuracy and completeness"  # what reviser and judge are told to look at
    endpoint: str = ""  # https://host/v1: revises and judges; --model is its model's name
    model: str = ""  # without an endpoint: directory or hub id of a Llama or Qwen2 chat model, which does so
    encoder: str = ""  # directory or hub id of a BERT-type encoder, for BERTScore
    scorer: str = ""  # directory or hub id of a Llama or Qwen2, for BARTScore and likelihood
    max_new: int = 512  # most tokens of a revision or a verdict
    report: str = ""  # write a self-contained HTML page here
    device: str = "auto"  # auto|cpu|cuda|mps: auto is cuda if there is one, else cpu
    dtype: str = "auto"  # auto|float32|bfloat16: auto is bfloat16 on cuda, else float32; the tiny model is float32
    kernels: bool = False  # Triton kernels greedy_match, token_logp (cuda only; compared with PyTorch at first use)
    log_every: int = 50  # steps between two lines of log.jsonl
    save_every: int = 200  # steps between two checkpoints
    out: str = ""  # output directory; "" = out/reviseval/TASK-SCALE[-TAG]-sSEED
    resume: bool = False  # continue an interrupted run: the same command with this flag
    dry_run: bool = False  # print parameters, FLOPs, memory and hours, or calls and tokens, and stop

    def __post_init__(self):
        arms = self.arms.split(",")
        if not set(arms) <= set(REFERENCES) or len(set(arms)) < len(arms):
            fail(f"--arms {self.arms}: a comma list, each once, out of {', '.join(REFERENCES)}")
        for name, value in vars(self).items():
            low = int(name not in ("seed", "n_rows"))
            if not isinstance(value, (str, bool)) and not low <= value < math.inf and name != "lr":
                fail(f"--{name.replace('_', '-')} {value}: must be at least {low}")
        if not 0 < self.lr < 1:
            fail(f"--lr {self.lr}: must be between 0 and 1")
        if self.n_embd % (2 * self.n_head) or self.n_embd < 8:
            fail(f"--n-embd {self.n_embd}: must be a multiple of twice --n-head {self.n_head}, and at least 8")
        if (self.task == "data") != bool(self.data) and not self.dry_run:
            fail("--task data and --data FILE go together")
        if self.task == "world" and (self.endpoint or self.model or self.report):
            fail("--endpoint, --model and --report need --task data")
        if self.endpoint and not (self.model and re.fullmatch(ENDPOINT, self.endpoint, re.A)):
            fail("--endpoint needs --model, and looks like https://host/v1, without a user, a password or a query")


ENDPOINT = r"https?://([\w.-]+|\[::1\])(:\d+)?(/[\w./-]*)?"  # as Chat has it
REFERENCES = "human", "direct", "adapted", "mismatched"  # what a response is compared with, see above
COLUMNS = "none", *REFERENCES, "random", "own", "both"  # of the table; the last three: see prefer
ROLES = "revise judge compare write".split()
SCALES = {  # "scale" and "scale:task"; explicit flags win
    "smoke": dict(n_layer=1, n_head=2, n_embd=16, steps=8, batch_size=4, n_records=8, log_every=4, save_every=2),
    "small": {},
    "long": dict(steps=5000, n_records=600),
    "paper": dict(task="data", max_new=1024),
}
TRIED = dict(revise=8, judge=6, compare=6, write=5)  # settings looked at, on dev records and seed 7


# ---------------------------------------------------------------- 2. Data
# World D2T-R: a record of a restaurant, and texts of one clause for each slot: a verb, the value, and a noun or adverb.
# No two verbs and no two last words are alike: a tiny model that copies a text can tell where in it it is.
NAMES = "adler bella carmen dorado ember fiesta giraffe harvest iris jade kiosk lotus"
OPENINGS = "{} is a restaurant", "{} is a bistro", "{} is a diner", "{} is a tavern"
WORLD = {  # slot: values, verbs, last words
    "food": ("thai italian french indian greek mexican korean spanish", "serves cooks offers prepares",
             "food dishes cuisine plates"),
    "area": ("riverside downtown harbour uptown oldtown parkside", "occupies decorates overlooks enlivens",
             "corner square street quarter"),
    "price": ("cheap moderate costly luxury", "has keeps takes asks", "prices fees bills sums"),
    "rating": ("poor fair good great superb", "gets earns wins collects", "reviews marks notes comments"),
    "guests": ("families couples students groups", "welcomes suits hosts attracts", "always daily mostly gladly"),
    "near": (NAMES, "neighbours faces adjoins borders", "nearby directly closely outright"),
}
VALUES = {slot: values.split() for slot, (values, *_) in WORLD.items()} | {"name": NAMES.split()}
SLOT_OF = {value: slot for slot, values in VALUES.items() for value in values}  # of a proper name: name
WAYS = list(itertools.product(range(4), range(4)))  # verb and last word; a quarter is for held-out texts only
KNOWN_WAYS = [(i, j) for i, j in WAYS if (i + j) % 4 != 3]
COUNTS = 0, 0, 1, 1, 2, 3  # errors that a response gets, drawn uniformly
SYSTEMS = 4  # responses to a record
# Shares of errors. As many clauses are added as left out, so that length says nothing of quality; contradictions are
# never seen in training.
TRAIN_MIX = dict(wrong=0.3, omit=0.3, extra=0.3, swap=0.1)
TEST_MIX = dict(wrong=0.3, omit=0.3, extra=0.15, contradict=0.15, swap=0.1)
FINDINGS = "right wrong missing extra".split()  # of a slot, in a judge's explanation
PARTS = dict(train=range(8), dev=range(8, 9), test=range(9, 10))  # last digit of a record's hash


def random_of(*key):
    return random.Random(repr(key))  # what is drawn depends on the key alone: a continued run draws the same


def another(slot, value, rng):
    return rng.choice([other for other in VALUES[slot] if other != value])


def make_record(rng, part):
    """A name and three to five of six slots, {slot: value}, whose hash belongs to this part of the data."""
    while True:
        record, chosen = {"name": rng.choice(VALUES["name"])}, rng.sample(list(WORLD), rng.randint(3, 5))
        record |= {slot: another(slot, record["name"], rng) for slot in WORLD if slot in chosen}
        if zlib.crc32(repr(record).encode()) % 10 in PARTS[part]:
            return record


def clause(slot, value, rng, ways):
    """(slot, value, verb, last word, joined by "and"?)"""
    return slot, value, *rng.choice(ways), rng.random() < 0.3


def tell(record, rng, ways=KNOWN_WAYS):
    """A right text in a random style as clauses; the name comes first."""
    slots = rng.sample(list(record)[1:], len(record) - 1)
    return [("name", record["name"], 0, rng.randrange(4), False), *(clause(s, record[s], rng, ways) for s in slots)]


def say(clauses):
    """Clauses as text."""
    (_, name, _, opening, _), *rest = clauses
    parts = [f"{'and' if joined else ','} {WORLD[slot][1].split()[i]} {value} {WORLD[slot][2].split()[j]}"
             for slot, value, i, j, joined in rest]
    return " ".join([OPENINGS[opening].format(name), *parts, "."])


def add_errors(record, clauses, count, mix, rng, ways=KNOWN_WAYS):
    """A copy of right clauses with `count` errors, each on a slot of its own. An error that finds no slot to its kind
    (extra: one that the record has not; swap: near) is a wrong value, in place of the right one."""
    clauses, fresh = list(clauses), set(record) - {"name"}
    for kind in rng.choices(list(mix), mix.values(), k=count):
        at = {slot: i for i, (slot, *_) in enumerate(clauses)}
        fit = dict(extra=set(WORLD) - set(at) - set(record), swap={"near"} & fresh).get(kind, fresh)
        slot, kind = rng.choice(sorted(fit or fresh)), kind if fit else "wrong"
        fresh.discard(slot)
        if kind in ("extra", "contradict"):
            new = clause(slot, another(slot, record.get(slot, record["name"]), rng), rng, ways)
            clauses.insert(rng.randint(1, len(clauses)), new)
        elif kind == "omit":
            del clauses[at[slot]]
        elif kind == "swap":  # two names take each other's place: two slots are wrong
            for i, other in ((0, "near"), (at["near"], "name")):
                clauses[i] = (clauses[i][0], record[other], *clauses[i][2:])
        else:
            clauses[at[slot]] = (slot, another(slot, record[slot], rng), *clauses[at[slot]][2:])
    return clauses


def repair(record, clauses, rng=None, p_fix=1.0, p_dmg=0.0):
    """Clauses as a reviser leaves them who mends errors with p_fix, breaks right clauses with p_dmg and keeps the
    style. p_fix 1 and p_dmg 0, the gold revision, draws nothing at random."""
    made, seen = [], set()
    for slot, value, *style in clauses:
        right, mended = record.get(slot), p_fix == 1 or rng.random() < p_fix
        if (right is None or slot in seen) and mended:
            continue  # was not asked for, or was said before
        if value == right:
            value = another(slot, right, rng) if p_dmg and rng.random() < p_dmg else value
        elif right is not None and mended:
            value = right
        made.append((slot, value, *style))
        seen.add(slot)
    left = [slot for slot in record if slot not in seen and (p_fix == 1 or rng.random() < p_fix)]
    return made + [(slot, record[slot], 0, 0, False) for slot in left]


def stated(text):
    """{slot: values} of a text; the first proper name is the restaurant's own, further ones are near it."""
    found = {}
    for word in text.split():
        if slot := SLOT_OF.get(word):
            found.setdefault("near" if slot == "name" and "name" in found else slot, []).append(word)
    return found


def slot_errors(record, text):
    """{slot: errors} of a text, exact: wrong values, also beside the right one, or a missing one."""
    found, errors = stated(text), {}
    for slot in VALUES:
        said, right = found.get(slot, []), record.get(slot)
        wrong = sum(value != right for value in said)
        errors[slot] = max(wrong, 1) if right is not None and right not in said else wrong
    return errors


def make_responses(cfg):
    """Held-out records with SYSTEMS responses each, and a human reference: a right text in another style."""
    rows, rng = [], random_of("responses", cfg.part, cfg.seed)
    for g in range(cfg.n_records):
        record = make_record(rng, cfg.part)
        human = say(tell(record, rng, WAYS))
        for _ in range(SYSTEMS):
            clauses = add_errors(record, tell(record, rng, WAYS), rng.choice(COUNTS), TEST_MIX, rng, WAYS)
            quality = -sum(slot_errors(record, say(clauses)).values())
            rows.append(dict(id=len(rows), group=g, record=record, source=" ".join(itertools.chain(*record.items())),
                             clauses=clauses, response=say(clauses), human=human, quality=quality))
    return rows


# The tiny models' tokens: words; roles, the bar and the arrow are control tokens
STYLES = " ".join([*OPENINGS, *(words for _, *both in WORLD.values() for words in both)]).replace("{}", "").split()
CONTROL = "<eos>", "|", "=>", *(f"<{role}>" for role in ROLES), *"12345"
TOKENS = list(dict.fromkeys([*CONTROL, ",", ".", "and", *FINDINGS, *VALUES, *SLOT_OF, *STYLES]))
INDEX = {word: i for i, word in enumerate(TOKENS)}


def encode(text):
    return [INDEX[word] for word in text.split()]


def decode(ids):
    return " ".join(TOKENS[i] for i in ids)


def prompt_of(role, *parts):
    return encode(f"<{role}> {' | '.join(parts)} =>")


# Human judgements
FORMS = {  # schema: names in the file, names here
    "llmbar": dict(input="instruction", output_1="a", output_2="b", label="label"),
    "unieval": dict(source="source", system_output="response", reference="reference", scores="scores",
                    system_id="system"),
    "jsonl": {name: name for name in "id instruction source response reference scores a b label".split()},
}
WRITERS = "Original Ground Truth", "New Human Generated"  # unieval's dialogues: these people are the others' reference


def read_row(cfg, item, n):
    """One judgement: dict(id, source, human, system, and response, quality or a, b, label, primary); ValueError tells
    what is wrong."""
    if not isinstance(item, dict):
        raise ValueError("must be a JSON object")
    row = {new: item[old] for old, new in FORMS[cfg.schema].items() if item.get(old) is not None}
    texts = {name: row.get(name) for name in (("a", "b") if "a" in row else ("response",))}
    about = [row[name] for name in ("instruction", "source") if name in row]
    wrong = [text for text in [*texts.values(), *about, row.get("reference", "")] if not isinstance(text, str)]
    if wrong or not about or not all(text.strip() for text in [*texts.values(), about[0]]):
        raise ValueError(f"needs text in instruction or source and in {', '.join(texts)} (and reference)")
    made = dict(id=str(row.get("id", n)), source="\n\n".join(about), human=row.get("reference", ""),
                system=row.get("system"), **texts)
    if "b" in texts:
        if str(row.get("label")) not in ("1", "2"):
            raise ValueError(f"label {row.get('label')!r}: must be 1 or 2")
        return made | dict(label=3 - 2 * int(row["label"]), primary=random_of("primary", cfg.seed, n).randrange(2))
    scores = row["scores"] if isinstance(row.get("scores"), dict) else {}
    aspect = cfg.aspect or ("overall" if "overall" in scores else next(iter(scores), "overall"))
    if type(scores.get(aspect)) not in (int, float) or not math.isfinite(scores[aspect]):
        raise ValueError(f"needs a finite number in scores under {aspect!r}")
    return made | dict(quality=float(scores[aspect]))


def read_data(cfg):
    """All rows of a file; `group` is the number of the source."""
    rows, groups, ids, by_line = [], {}, {}, cfg.schema == "jsonl"
    try:
        text = Path(cfg.data).read_text("utf-8-sig")
        items = list(enumerate(text.split("\n") if by_line else list(json.loads(text)), 1))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "not a list in JSON; one object a line: --schema jsonl"
        fail(f"--data {cfg.data}: {reason}")
    items = [(n, item) for n, item in items if not by_line or item.strip()]
    for n, item in items[: cfg.n_rows or None]:
        try:
            row = read_row(cfg, json.loads(item) if by_line else item, n)
            if ids.setdefault(row["id"], n) != n:
                raise ValueError(f"needs an id of its own, number {ids[row['id']]} has {row['id']!r}")
            if rows and ("b" in row) != ("b" in rows[0]):
                raise ValueError("is of another kind than the first row: all ratings or all pairs")
        except (ValueError, OverflowError, RecursionError) as error:
            text = "not JSON" if isinstance(error, (json.JSONDecodeError, RecursionError)) else error
            fail(f"--data {cfg.data}, {'line' if by_line else 'item'} {n}: {text} (--schema {cfg.schema})")
        rows.append(row | dict(group=groups.setdefault(row["source"], len(groups))))
    if len(rows) < 3:
        fail(f"--data {cfg.data}: needs three rows or more, has {len(rows)}")
    people = {(row["group"], row["system"]): row["response"] for row in rows if row["system"] in WRITERS}
    for row in rows:
        others = [people.get((row["group"], writer), "") for writer in WRITERS if row["system"] != writer]
        row["human"] = row["human"] or next(filter(None, others), "")
    return rows


def answers_of(row):
    return [row[name] for name in ("response", "a", "b") if name in row]


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


# --- block: encoder ---
def wordpieces(text, vocab, lower=True):
    """Ids of a text by BERT's rules: clean, cut at blanks and punctuation, then the longest known pieces of a word."""
    kept = (c for c in text if c in "\t\n\r" or unicodedata.category(c)[0] != "C" and c != "\ufffd")
    chinese = "[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f]"
    text = re.sub(chinese, r" \g<0> ", "".join(kept))
    if lower:
        text = "".join(c.lower() for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    signs = (f" {c} " if unicodedata.category(c)[0] == "P" or c in "$+<=>^`|~" else c for c in text)
    ids = []
    for word in "".join(signs).split():
        pieces, start = [], 0
        while start < len(word) <= 100 and pieces is not None:
            names = (("##" * (start > 0) + word[start:end], end) for end in range(len(word), start, -1))
            name, start = next((x for x in names if x[0] in vocab), ("", start))
            pieces = pieces + [vocab[name]] if name else None
        ids += pieces or [vocab["[UNK]"]]
    return ids


class EncoderLayer(nn.Module):
    def __init__(self, d, heads, hidden, eps):
        super().__init__()
        self.query, self.key, self.value, self.attention = (nn.Linear(d, d) for _ in range(4))
        self.intermediate, self.output, self.heads = nn.Linear(d, hidden), nn.Linear(hidden, d), heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d, eps), nn.LayerNorm(d, eps)

    def forward(self, x, mask):
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        a = F.scaled_dot_product_attention(q, k, v, mask)  # (B, H, L, hd)
        x = self.norm_1(x + self.attention(a.transpose(1, 2).flatten(2)))
        return self.norm_2(x + self.output(F.gelu(self.intermediate(x))))


class Encoder(nn.Module):
    """A BERT-type encoder: a folder with config.json, model.safetensors and a WordPiece tokenizer.json."""
    def __init__(self, folder):
        super().__init__()
        try:
            config, words = (json.loads((folder / f"{n}.json").read_text("utf-8")) for n in ("config", "tokenizer"))
            d, eps, act = (config[k] for k in ("hidden_size", "layer_norm_eps", "hidden_act"))
            normal, self.vocab = words["normalizer"], words["model"]["vocab"]
            if (act, words["model"]["type"], normal["type"]) != ("gelu", "WordPiece", "BertNormalizer"):
                raise ValueError("not BERT with GELU and WordPiece")
            self.lower = normal["lowercase"]
            self.word_embeddings, self.token_type_embeddings, self.position_embeddings = (nn.Embedding(
                config[k], d) for k in ("vocab_size", "type_vocab_size", "max_position_embeddings"))
            self.norm, size = nn.LayerNorm(d, eps), (d, config["num_attention_heads"], config["intermediate_size"], eps)
            self.layers = nn.ModuleList(EncoderLayer(*size) for _ in range(config["num_hidden_layers"]))
            names = "bert.:", "embeddings.LayerNorm:norm", "embeddings.:", "encoder.layer:layers", "attention.self.:", \
                "attention.output.LayerNorm:norm_1", "output.LayerNorm:norm_2", "attention.output:attention", ".dense:"
            rename = lambda key: functools.reduce(lambda k, name: k.replace(*name.split(":"), 1), names, key)
            self.load_state_dict({rename(key): x.float() for key, x in load_file(folder / "model.safetensors").items()
                                  if not re.search("pooler|position_ids|^cls", key)})
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            fail(f"encoder {folder}: no BERT checkpoint: {' '.join(str(error).split())[:200]}")

    @torch.no_grad()
    def forward(self, texts):
        """Texts to the last layer's output (B, L, d), CLS first and SEP last, and which of the tokens count (B, L)."""
        most, ends, device = len(self.position_embeddings.weight), [self.vocab["[CLS]"], self.vocab["[SEP]"]], \
            self.norm.weight.device
        rows = [ends[:1] + wordpieces(text, self.vocab, self.lower)[: most - 2] + ends[1:] for text in texts]
        mask = torch.arange(max(map(len, rows))) < torch.tensor(list(map(len, rows)))[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, torch.tensor(sum(rows, []))).to(device)
        places, mask = self.position_embeddings.weight[: ids.shape[1]], mask.to(device)
        x = self.norm(self.word_embeddings(ids) + self.token_type_embeddings.weight[0] + places)
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        return x, mask

    def embed(self, texts):
        """Unit vectors (B, d): the mean over a text's tokens, CLS and SEP too."""
        x, mask = self(texts)
        return F.normalize((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
# --- end block ---


def tiny_shape(cfg):
    return read_shape(dict(model_type="llama", hidden_size=cfg.n_embd, intermediate_size=8 * cfg.n_embd // 3 // 8 * 8,
                           num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head, tie_word_embeddings=True,
                           vocab_size=len(TOKENS), rope_theta=100))  # positions up to 100, not 10,000


def pad_right(rows, device):
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)  # (B, L)


def in_batches(rows, size, work, length=len):
    """work(part) for `size` rows of about equal length at a time; its results in the order of the rows."""
    order, found = sorted(range(len(rows)), key=lambda i: length(rows[i])), {}
    for i in range(0, len(order), size):
        part = order[i : i + size]
        found |= zip(part, work([rows[j] for j in part]))
    return [found[i] for i in range(len(rows))]


# ---------------------------------------------------------------- 4. Method (official code; else: our choice)
# Classic metrics F_M(y, r): all compare a text with a reference
@functools.lru_cache(4096)  # a reference meets several texts, a text several references
def words_13a(text):
    """The tokens of mteval-v13a, as sacrebleu has them."""
    text = " " + text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ") + " "
    for sign, code in (('"', "&quot;"), ("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(code, sign)
    for pattern, new in ((r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 "), (r"([^0-9])([\.,])", r"\1 \2 "),
                         (r"([\.,])([^0-9])", r" \1 \2"), (r"([0-9])(-)", r"\1 \2 ")):
        text = re.sub(pattern, new, text)
    return text.split()


def ngrams(words, n):
    return Counter(zip(*(words[i:] for i in range(n))))


def bleu(text, reference):
    """Sentence BLEU-4 (0 to 100): geometric mean of the precisions of n-grams, as many orders as the text has, zeros
    smoothed to 1/2, 1/4, ... of a hit; times the penalty for brevity. (sacrebleu's sentence_bleu)"""
    a, b = words_13a(text), words_13a(reference)
    logs, miss = [], 1.0
    for n in range(1, min(4, len(a)) + 1):
        hits, total = (ngrams(a, n) & ngrams(b, n)).total(), len(a) - n + 1
        if n == 1 and not hits:
            return 0.0
        miss = miss if hits else 2 * miss
        logs.append(math.log((hits or 1 / miss) / total))
    brevity = min(0.0, 1 - len(b) / len(a)) if a else 0.0
    return 100 * math.exp(sum(logs) / len(logs) + brevity) if logs else 0.0


def lcs(a, b):
    """Length of the longest common subsequence; a row of the table is the bits of one integer. (Hyyrö 2004)"""
    at, full = {}, (1 << len(a)) - 1
    for i, x in enumerate(a):
        at[x] = at.get(x, 0) | 1 << i
    row = full
    for y in b:
        hit = row & at.get(y, 0)
        row = (row + hit | row - hit) & full
    return len(a) - row.bit_count()


def rouge(text, reference):
    """ROUGE-1, -2 and -L, F1. (rouge-score, without stemming)"""
    a, b = (re.findall("[a-z0-9]+", s.lower()) for s in (text, reference))
    hits = [*((ngrams(a, n) & ngrams(b, n)).total() for n in (1, 2)), lcs(a, b)]
    return tuple(2 * n / (len(a) + len(b) - 2 * (i == 1)) if n else 0.0 for i, n in enumerate(hits))


def classic(text, reference):
    """Metrics of strings. edit: less the words that a revision deletes and inserts, the plainest way to use one; on
    dev records its tau with scripted revisers was higher by 0.02 to 0.08 than that of Levenshtein's distance."""
    (r1, r2, r_l), a, b = rouge(text, reference), text.split(), reference.split()
    return dict(bleu=bleu(text, reference), rouge1=r1, rouge2=r2, rougeL=r_l, edit=2 * lcs(a, b) - len(a) - len(b))


def greedy_f1(a, b, a_mask, b_mask, a_weight, b_weight, kernels=False):
    """BERTScore: P, R, F (B,) of unit token vectors a (B, M, d) of texts and b (B, N, d) of references. A token counts
    with its best cosine among the other side's unmasked ones; means are weighted. (bert-score: CLS and SEP may be
    matched, but have weight 0)"""
    if kernels:
        row, col = load_kernel("greedy_match")(a, b, a_mask, b_mask)
    else:
        s = (a @ b.mT).masked_fill(~(a_mask[:, :, None] & b_mask[:, None]), -math.inf)  # (B, M, N)
        row, col = (x.masked_fill(x == -math.inf, 0) for x in (s.amax(2), s.amax(1)))
    p, r = ((x * w).sum(1) / w.sum(1).clamp(min=1e-9) for x, w in ((row, a_weight), (col, b_weight)))
    return p, r, (2 * p * r / (p + r)).nan_to_num(0)


def bert_score(embed, pairs, kernels=False, size=16, length=len):
    """F of (text, reference) pairs; each text is read once. embed(texts): token vectors (B, L, d), what counts (B, L),
    weights (B, L). length(text): its tokens, or about, so that few of a batch are padding."""
    texts = list(dict.fromkeys(itertools.chain(*pairs)))

    def read(part):
        return [(F.normalize(v[m], dim=-1), w[m]) for v, m, w in zip(*embed(part))]

    known = dict(zip(texts, in_batches(texts, size, read, length)))

    def side(column):
        vectors, weights = (nn.utils.rnn.pad_sequence(x, batch_first=True) for x in zip(*map(known.get, column)))
        return vectors, vectors.any(2), weights  # (B, L, d), (B, L), (B, L)

    def match(part):
        (a, a_mask, a_weight), (b, b_mask, b_weight) = map(side, zip(*part))
        return greedy_f1(a, b, a_mask, b_mask, a_weight, b_weight, kernels)[2].tolist()

    return in_batches(pairs, size, match, lambda pair: max(len(known[text][0]) for text in pair))


# --- block: logp ---
def token_logp(h, w, target, kernels=False):
    """log p (T,) of targets (T,), in fp32 at least, from outputs h (T, d) and the head's weight w (V, d)."""
    if kernels:
        return load_kernel("token_logp")(h, w.to(h.dtype), target)  # never (T, V)
    logits = F.linear(h, w)  # (T, V)
    return logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32)).gather(1, target[:, None])[:, 0]
# --- end block ---


@torch.no_grad()
def mean_logp(model, pairs, kernels=False, size=64):
    """BARTScore of one direction: mean log-probability of the target's tokens, for (context, target) in tokens."""
    def work(part):
        ids = pad_right([context + target for context, target in part], model.norm.weight.device)  # (B, L)
        row = torch.tensor([i for i, (_, target) in enumerate(part) for _ in target], device=ids.device)  # (T,)
        at = torch.tensor([len(context) + j for context, target in part for j in range(len(target))], device=ids.device)
        x, turn = model.embed_tokens(ids), model.turn(torch.arange(ids.shape[1], device=ids.device)[None])
        for layer in model.layers:
            x = layer(x, turn)  # no token sees the padding: it is on the right
        weight = (model.lm_head or model.embed_tokens).weight
        logp = token_logp(model.norm(x[row, at - 1]), weight, ids[row, at], kernels)
        return logp.new_zeros(len(part)).index_add(0, row, logp).div(torch.bincount(row)).tolist()

    return in_batches(pairs, size, work, lambda pair: len(pair[0]) + len(pair[1]))


@torch.no_grad()
def choice(model, prompts, options, size=64):
    """Probabilities (P, K) of the next token among K options: a judge by logits."""
    def work(part):
        last = [len(prompt) - 1 for prompt in part]
        logits = model(pad_right(part, model.norm.weight.device))[range(len(part)), last]  # (B, V)
        return logits[:, options].float().softmax(-1).tolist()

    return np.array(in_batches(prompts, size, work))


def measure(texts, references, real=None):
    """Scores {"metric/kind": (N,)} of texts (N,) against references {kind: (N,) texts}, NaN where one is "". Equal
    pairs are measured once. real: further metrics {name: function of (text, reference) pairs}."""
    unique = list(dict.fromkeys(pair for column in references.values() for pair in zip(texts, column) if pair[1]))
    rows, table = [classic(*pair) for pair in unique], {}
    found = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    found |= {name: score(unique) for name, score in (real or {}).items() if unique}
    for name, scores in found.items():
        known = dict(zip(unique, scores))
        table |= {f"{name}/{kind}": np.array([known.get(pair, math.nan) for pair in zip(texts, column)], float)
                  for kind, column in references.items()}
    return table


def prefer(scores, protocol, primary):
    """Which answer of a pair wins, 1: the first, -1: the second, 0: none. scores (P, 2, 2): of answer i against the
    revision of answer j. random: that of answer primary (P,) for both (official code); own: of each its own; both:
    means over both revisions (our choice)."""
    s = dict(random=scores[np.arange(len(scores)), :, primary], own=scores.diagonal(0, 1, 2), both=scores.mean(2))
    return np.sign(s[protocol][:, 0] - s[protocol][:, 1])  # (P,)


# Tiny models as reviser and judge
MOST_WORDS = 48  # that they write; the longest text of the world has 37


class Tiny:
    """A tiny model for each role, {role: model}; greedy."""
    def __init__(self, models):
        self.models = {role: model.eval() for role, model in models.items()}

    def ask(self, role, prompts, stop=(0,)):
        return in_batches(prompts, 640, lambda part: generate(self.models[role], part, MOST_WORDS, stop))

    def revise(self, rows):
        """r* = R(x, y), y itself where it is empty. The reviser sees neither the quality nor the human reference."""
        told = self.ask("revise", [prompt_of("revise", row["source"], row["response"]) for row in rows])
        return [decode(ids) or row["response"] for row, ids in zip(rows, told)]

    def write(self, rows):
        """D.R.: the model's own answers to the sources."""
        return [decode(ids) or "." for ids in self.ask("write", [prompt_of("write", row["source"]) for row in rows])]

    def judge(self, sources, texts, references=None):
        """F_E(y | x), or F_E(y | x, r). The judge writes what it found. Then its expected score (N,) by the logits of
        the five scores, and the likeliest of them (N,), NaN where the explanation did not end in MOST_WORDS."""
        role, scores = "compare" if references else "judge", encode("1 2 3 4 5")
        columns = (sources, references, texts) if references else (sources, texts)
        prompts = [prompt_of(role, *parts) for parts in zip(*columns)]
        told = self.ask(role, prompts, (0, *scores))
        p = choice(self.models[role], [prompt + ids for prompt, ids in zip(prompts, told)], scores)  # (N, 5)
        return p @ np.arange(1, 6), np.where([len(ids) < MOST_WORDS for ids in told], p.argmax(1) + 1.0, math.nan)


# Prompts of an LLM as reviser and judge (official code: what they ask for; the words are ours)
REVISE = """You are an expert editor. Below are an instruction and an answer to it. Revise the answer so that it
follows the instruction better. Look at {rubric}; be accurate and honest, and keep what is already right in its own
words. If the answer needs no change, give it back unchanged.{hint}

[Instruction]
{source}

[Answer]
{answer}
{helper}
Reply with the complete revised answer and nothing else."""
HINT = " Another answer is shown as well. It is not necessarily better: take what is good in it, avoid what is bad."
JUDGE = """You are an impartial judge. {task} Look at {rubric}.{compare} Explain in a few sentences, then {end}.

[Instruction]
{source}
{reference}{answers}"""
RATE = dict(task="Rate how good the answer to the instruction is.",
            end="give a score from 1 (very bad) to 5 (very good) in double brackets, such as [[3]]")
CHOOSE = dict(task="Decide which of two answers follows the instruction better; order and length must not matter.",
              end="end with [[A]] if answer A is better or with [[B]] if answer B is")
COMPARE = " First compare with the reference answer."
quoted = functools.partial(re.sub, r"\[(?=\[)", "[ ")  # [[A]] is no verdict, should the judge repeat it


def revise_request(rubric, source, answer, other=""):
    helper = f"\n[Another answer]\n{other}\n" if other else ""
    return REVISE.format(rubric=rubric, source=source, answer=answer, helper=helper, hint=HINT * bool(other))


def judge_request(rubric, source, answers, reference=""):
    """Rate one answer, or choose between two, with a reference or without."""
    shown = f"\n[Reference answer]\n{quoted(reference)}\n" if reference else ""
    names = ["Answer"] if len(answers) == 1 else ["Answer A", "Answer B"]
    texts = "".join(f"\n[{name}]\n{quoted(text)}\n" for name, text in zip(names, answers))
    return JUDGE.format(rubric=rubric, source=quoted(source), compare=COMPARE * bool(reference), reference=shown,
                        answers=texts, **(RATE if len(answers) == 1 else CHOOSE))


def read_verdict(reply, options):
    """Index of the last [[option]] of a reply, None where there is none: never guessed."""
    found = re.findall(rf"\[\[({'|'.join(options)})\]\]", reply or "")
    return options.index(found[-1]) if found else None


def clean_revision(reply, answer):
    """The revised answer in a reply, without what a model puts around it and the answer does not begin with: a first
    line such as "Revised:", a fence, quotes."""
    text, begin = (reply or "").strip(), answer.strip()
    if text.split() == begin.split():
        return text
    head, _, rest = text.partition("\n")
    if head.endswith(":") and len(head.split()) <= 8 and rest.strip() and not begin.partition("\n")[0].endswith(":"):
        text = rest.strip()
    fenced = None if begin.startswith("```") else re.fullmatch(r"```\w*\n(.*?)\n?```", text, re.S)
    text = fenced[1].strip() if fenced else text
    inner = text[1:-1].strip()
    return inner if text == f'"{text[1:-1]}"' and '"' not in inner and not begin.startswith('"') else text


TEMPERATURES = dict(revise=0.3, judge=0.1, free=0.0)  # the judge with and without a reference (official code)
MOST_CHARACTERS = 20_000  # of a text that a model made


class Local:
    """A chat checkpoint as reviser and judge."""
    def __init__(self, cfg, run):
        self.cfg, folder, self.tokens = cfg, fetch_model(cfg.model), 0
        self.model, self.tok = load_real(folder).to(run.device, run.dtype).eval(), load_tokenizer(folder)
        ends = self.tok.eos, *map(self.tok.special.get, ("<|im_end|>", "<|eot_id|>", "<|endoftext|>"))
        self.stop = [i for i in ends if i is not None]

    def ask(self, contents, temperature, key):
        g = torch.Generator(self.model.norm.weight.device).manual_seed(random_of(self.cfg.seed, key).getrandbits(60))

        def work(part):
            new = generate(self.model, part, self.cfg.max_new, self.stop, temperature, generator=g)
            self.tokens += sum(map(len, part)) + sum(map(len, new))
            return [self.tok.decode(ids) for ids in new]

        return in_batches([self.tok.chat([dict(role="user", content=text)]) for text in contents], 16, work)


class Remote:
    """A chat endpoint as reviser and judge."""
    def __init__(self, cfg, run):
        (run.out / "replies").mkdir(exist_ok=True)
        self.cfg, self.chat = cfg, Chat(cfg.endpoint, cfg.model, run.out / "replies")

    tokens = property(lambda self: self.chat.tokens)

    def ask(self, contents, temperature, key):
        common = dict(max_tokens=self.cfg.max_new, temperature=temperature)
        return self.chat.ask([(dict(messages=[dict(role="user", content=text)], **common), 0) for text in contents])


def make_direct(cfg, backend, rows):
    """Rows of direct.jsonl: the model's own answers to the sources of these rows."""
    replies = backend.ask([row["source"] for row in rows], TEMPERATURES["revise"], ("direct", rows[0]["id"]))
    return [dict(id=row["id"], text=(text or "")[:MOST_CHARACTERS]) for row, text in zip(rows, replies)]


def make_revisions(cfg, backend, rows):
    """Rows of references.jsonl: revisions {answer: ...}. The reviser of an answer of a pair is shown the other; with
    --pair-ref random only the primary answer is revised. (official code) Where a reply is empty or more than three
    times as long as the answer, the answer itself stands in, and "failed" says so. (our choice)"""
    made = [dict(id=row["id"], adapted={}) for row in rows]
    asked = [(row, target, j) for row, target in zip(rows, made) for j in range(len(answers_of(row)))
             if "b" not in row or cfg.pair_ref != "random" or j == row["primary"]]
    requests = [revise_request(cfg.rubric, row["source"], answers_of(row)[j], row["ba"[j]] if "b" in row else "")
                for row, _, j in asked]
    replies = backend.ask(requests, TEMPERATURES["revise"], ("references", rows[0]["id"]))
    for (row, target, j), reply in zip(asked, replies):
        answer = answers_of(row)[j]
        text = clean_revision(reply, answer)[:MOST_CHARACTERS]
        failed = not 0 < len(text.split()) <= max(20, 3 * len(answer.split()))
        text = answer if failed else text
        target["adapted"][str(j)] = dict(text=text, failed=failed, identity=text.split() == answer.split())
    return made


def make_judgments(cfg, backend, rows):
    """Rows of judgments.jsonl: verdicts with each reference and with none, of pairs in both orders."""
    options, asked, made = list("AB" if "b" in rows[0] else "12345"), [], []
    for row in rows:
        verdicts, texts = [], answers_of(row)
        for (arm, reference), order in itertools.product(row["references"].items(), range(len(texts))):
            request = judge_request(cfg.rubric, row["source"], texts[::-1] if order else texts, reference)
            digest = hashlib.sha256(request.encode("utf-8", "replace")).hexdigest()
            verdicts.append(dict(arm=arm, order=order, prompt=digest[:16]))
            asked.append((request, verdicts[-1]))
        made.append(dict(id=row["id"], verdicts=verdicts))
    for name in ("free", "judge"):
        part = [(request, verdict) for request, verdict in asked if (verdict["arm"] == "none") == (name == "free")]
        replies = backend.ask([request for request, _ in part], TEMPERATURES[name], (name, rows[0]["id"]))
        for (_, verdict), reply in zip(part, replies):
            verdict |= dict(raw=reply, verdict=read_verdict(reply, options))
    return made


# ---------------------------------------------------------------- 5. Evaluation and claims
def tau_b(x, y):
    """Kendall's tau-b in O(n log n), NaN where one side is constant. (Knight 1966)"""
    x, y = np.asarray(x, float), np.asarray(y, float)
    order = np.lexsort((y, x))
    n, y = len(x), y[order]

    def tied(*columns):
        """Pairs that are equal in all columns."""
        count = np.unique(np.stack(columns), axis=1, return_counts=True)[1]
        return (count * (count - 1) // 2).sum()

    swaps, block = 0, 1
    rank = np.unique(y, return_inverse=True)[1]
    while block < n:  # merge sort: how many pairs stand in the wrong order
        for i in range(0, n - block, 2 * block):
            left, right = rank[i : i + block], rank[i + block : i + 2 * block]
            swaps += (len(left) - np.searchsorted(left, right, "right")).sum()
            rank[i : i + 2 * block] = np.sort(rank[i : i + 2 * block], kind="stable")
        block *= 2
    pairs, tx, ty = n * (n - 1) // 2, tied(x), tied(y)
    if tx == pairs or ty == pairs:
        return math.nan
    return float((pairs - tx - ty + tied(x, y[np.argsort(order)]) - 2 * swaps) / math.sqrt((pairs - tx) * (pairs - ty)))


def ranks(x):
    """Average ranks of x (n,)."""
    _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[inverse]


def spearman(x, y):
    """Pearson's correlation of average ranks, NaN where one side is constant."""
    a, b = ranks(np.asarray(x)), ranks(np.asarray(y))
    return float(np.corrcoef(a, b)[0, 1]) if len(set(a)) > 1 < len(set(b)) else math.nan


def resampled(group, draws=1000):
    """Bootstrap: how often each source, with all its responses, is in each draw (1 + draws, G); the first row is the
    data as it is. group (n,) in 0..G-1."""
    G = int(max(group)) + 1
    return np.concatenate([np.ones((1, G)), np.random.default_rng(0).multinomial(G, np.full(G, 1 / G), draws)])


def tau_draws(x, y, group, weight):
    """tau-b of the data and of all draws (1 + draws,): its sums over pairs of responses are quadratic in the weights of
    the sources. A response drawn twice is tied with itself on both sides, as in the sample that is written out."""
    order = np.argsort(group, kind="stable")
    here, starts = np.unique(group[order], return_index=True)
    x, y, weight = np.asarray(x, float)[order], np.asarray(y, float)[order], weight[:, here]
    sx, sy = (np.sign(v[:, None] - v) for v in (x, y))  # (n, n)
    between = [np.add.reduceat(np.add.reduceat(s, starts, 1), starts, 0) for s in (sx * sy, np.abs(sx), np.abs(sy))]
    both, left, right = ((weight @ part * weight).sum(1) for part in between)  # part (G, G) of sources
    with np.errstate(invalid="ignore", divide="ignore"):
        return both / np.sqrt(left * right)


def mean_draws(x, group, weight):
    """Mean of x (n,) in the data and in all draws (1 + draws,)."""
    total, count = (weight @ np.bincount(group, v, weight.shape[1]) for v in (np.asarray(x, float), np.ones(len(x))))
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def competence(rows, revisions):
    """p_fix: share of the errors of responses that a revision mends. p_dmg: share of the right slots that it breaks.
    identity: share of right responses that come back unchanged."""
    before, after = (np.array([list(slot_errors(row["record"], text).values()) for row, text in zip(rows, texts)])
                     for texts in ([row["response"] for row in rows], revisions))  # (N, slots)
    asked = np.array([[slot in row["record"] for slot in VALUES] for row in rows])
    same = [row["response"] == text for row, text in zip(rows, revisions) if not row["quality"]]
    return dict(p_fix=(after[before > 0] == 0).mean(), p_dmg=(after[(before == 0) & asked] > 0).mean(),
                identity=np.mean(same))


def baselines(rows):
    """Scores that look at no reference: words, and the share of the words that stand in the source."""
    texts, sources = ([row[name].split() for row in rows] for name in ("response", "source"))
    copied = [np.mean([word in set(source) for word in text]) for source, text in zip(sources, texts)]
    return {"length/none": np.array([len(text) for text in texts], float), "copy/none": np.array(copied)}


def together(draws, *keys):
    """Draws of each key on the rows that all of them have: what is paired. draws: see rating_table."""
    rows = np.logical_and.reduce([draws[key][0] for key in keys])
    return [x if (ok == rows).all() else redo(rows) for ok, x, redo in map(draws.get, keys)]


def rating_table(table, quality, group):
    """Of scores {"scorer/reference": (N,)}, NaN where there is none: metrics, of which n counts the rows where not all
    have a score, and {key: (which rows have one (N,), draws of tau, function that draws tau of other rows)}."""
    metrics, draws, weight = {"rows/none": len(quality)}, {}, resampled(group)
    for key, x in table.items():
        (name, kind), ok = key.split("/"), ~np.isnan(x)
        if not ok.any():
            continue
        redo = lambda rows, x=x: tau_draws(x[rows], quality[rows], group[rows], weight)
        draws[key] = ok, redo(ok), redo
        inside = [tau_b(x[ok & (group == i)], quality[ok & (group == i)]) for i in np.unique(group[ok])]
        inside = [tau for tau in inside if not math.isnan(tau)]  # sources whose responses are all alike say nothing
        metrics |= {key: tau_b(x[ok], quality[ok]), f"{name} rho/{kind}": spearman(x[ok], quality[ok])}
        metrics[f"{name} by source/{kind}"] = float(np.mean(inside)) if inside else math.nan
        metrics |= {} if ok.all() else {f"{name} n/{kind}": int(ok.sum())}
    return metrics, draws


def pair_table(cfg, table, pair, label, group, primary, more=()):
    """The same for pairs (P, 2) of responses with labels (P,), 1: the first is better, or -1. Accuracy, where no
    preference counts half, of all pairs and of those whose worse answer is longer. Columns "0", "1", ... of the table
    are scores against the revision of that response to the source; `more`: preferences made elsewhere."""
    preferences, metrics, bias, draws = {}, {"pairs/none": len(label)}, {}, {}
    size = 1 + max((int(key[-1]) for key in table if key[-1].isdigit()), default=0)  # responses to a source
    for key, x in table.items():
        name, kind = key.split("/")
        if kind == "0":
            against = np.stack([table[f"{name}/{j}"] for j in range(size)], 1)  # (N, size)
            square = against[pair[:, :, None], pair[:, None] % size]  # (P, 2, 2), see prefer
            for protocol in ("random", "own", "both"):  # with --pair-ref random the others are not known
                preferences[f"{name}/{protocol}"] = prefer(square, protocol, primary)
            preferences[f"{name}/adapted"] = preferences[f"{name}/{cfg.pair_ref}"]
            wins = 0.5 + preferences[f"{name}/random"] * (1 - 2 * primary) / 2  # 1: the anchor decides; no bias: 0.5
            bias[f"{name} primary wins/random"] = float(wins.mean())
        elif not kind.isdigit() and kind != "adapted":
            preferences[key] = np.sign(x[pair[:, 0]] - x[pair[:, 1]])
    preferences = {key: x for key, x in (preferences | dict(more)).items() if not np.isnan(x).all()}
    longer, weight = (table["length/none"][pair] @ [1, -1]) * label < 0, resampled(group)
    for key, x in preferences.items():
        (name, kind), hits, ok = key.split("/"), 0.5 + x * label / 2, ~np.isnan(x)
        redo = lambda rows, hits=hits: mean_draws(hits[rows], group[rows], weight)
        draws |= {f"{name} {what}/{kind}": (rows, redo(rows), redo)
                  for what, rows in (("pairs", ok), ("longer", ok & longer))}
        metrics |= {} if ok.all() else {f"{name} pairs n/{kind}": int(ok.sum())}
    return metrics | {key: float(x[0]) for key, (_, x, _) in draws.items()} | bias, draws, preferences


def evaluate_world(cfg, run, tiny, rows, real):
    """All arms on the held-out responses: metrics, and draws for the claims."""
    texts, sources, N = [row["response"] for row in rows], [row["source"] for row in rows], len(rows)
    revisions, own = tiny.revise(rows), tiny.write(rows[::SYSTEMS])
    first = [i - i % SYSTEMS for i in range(N)]  # response to the same record
    columns = dict(human=[row["human"] for row in rows], direct=[own[i // SYSTEMS] for i in range(N)],
                   adapted=revisions, mismatched=[revisions[first[i] + (i + 1) % SYSTEMS] for i in range(N)])
    columns = {kind: columns[kind] for kind in cfg.arms.split(",")}
    everything = columns | {str(j): [revisions[i + j] for i in first] for j in range(SYSTEMS)}
    quality, group = (np.array([row[name] for row in rows]) for name in ("quality", "group"))
    table = baselines(rows) | {"checker/none": quality.astype(float)}  # the upper bound
    table |= measure(texts, everything, real)
    for kind, column in ({"none": None} | everything).items():
        pause(run)
        table[f"judge/{kind}"], verdict = tiny.judge(sources, texts, column)
        table |= {} if kind.isdigit() else {f"verdict/{kind}": verdict}
    metrics, draws = rating_table({key: x for key, x in table.items() if not key[-1].isdigit()}, quality, group)
    pair = np.array([(i, j) for i in range(N) for j in range(i + 1, first[i] + SYSTEMS) if quality[i] != quality[j]])
    label, primary = np.sign(quality[pair] @ [1, -1]), np.random.default_rng(cfg.seed).integers(2, size=len(pair))
    found, more, _ = pair_table(cfg, table, pair, label, group[pair[:, 0]], primary)
    metrics |= found | {f"reviser/{key}": float(x) for key, x in competence(rows, revisions).items()}
    for kind, k in itertools.product(columns, range(4)):  # r* of a good response must be near to it: it is no new text
        metrics[f"likeness, {k} errors/{kind}"] = float(table[f"rougeL/{kind}"][quality == -k].mean())
    return metrics, draws | more


def worth(rows, revisions):
    """What a reviser is worth: its competence, and tau of each metric of the responses against its revisions."""
    scores, quality = measure([row["response"] for row in rows], dict(r=revisions)), [row["quality"] for row in rows]
    found = competence(rows, revisions) | {key.split("/")[0]: tau_b(x, quality) for key, x in scores.items()}
    return {name: float(x) for name, x in found.items()}


def judge_scores(rows, judged):
    """From rows of judgments.jsonl: scores, or for pairs preferences, {"judge/reference": (N,)}; coverage, the share of
    verdicts that could be read; for pairs the shares of the first place and of one winner in both orders."""
    found, metrics = {}, {}
    for arm in dict.fromkeys(v["arm"] for row in judged for v in row["verdicts"]):
        parts = [[v["verdict"] for v in row["verdicts"] if v["arm"] == arm] for row in judged]
        metrics[f"judge coverage/{arm}"] = float(np.mean([x is not None for part in parts for x in part]))
        size = 1 + ("b" in rows[0])
        x = np.array([part or [None] * size for part in parts], float)  # (N, size), NaN where there is no verdict
        wins = np.nan_to_num((1 - 2 * x) * [1, -1][:size]).mean(1) + np.where(list(map(bool, parts)), 0, math.nan)
        found[f"judge/{arm}"] = x[:, 0] + 1 if size == 1 else wins  # of a pair without that reference: not known
        both = x[np.isfinite(x).all(1)]
        if size == 2 and len(both):  # 0: the first place wins, 1: the second
            metrics[f"judge consistent/{arm}"] = float((both.sum(1) == 1).mean())
            metrics[f"judge first/{arm}"] = float((both == 0).mean())
    return found, metrics


GRID = [(f / 10, d / 10) for d, fs in ((0, (10, 8, 6, 4, 2)), (1, (8, 6)), (2, (6, 4, 2))) for f in fs]  # p_fix, p_dmg
# Fixed before the first evidence run: id, statistic, threshold, what would refute it. "scorer/reference" is tau-b with
# the exact quality; "pairs" and "longer": accuracy on pairs of responses to a record, and on those whose worse one is
# longer. Intervals: 1000 draws of records, for one trained model.
CLAIMS = [(f"{name}-adapted-beats-{kind}", f"{name}/adapted - {name}/{kind}", 0.0, f"{kind} ones are as good (C1)")
          for kind in ("human", "direct") for name in ("bleu", "rougeL", "bertscore", "bartscore")] + [
    ("metric-beats-judge", "bleu/adapted - verdict/none", 0.0, "the judge is better than reviser and BLEU (C2)"),
    ("adapted-helps-judge", "verdict/adapted - verdict/none", 0.0, "the judge gains nothing from r* (C3)"),
    ("adapted-resists-length", "bleu longer/adapted - bleu longer/human", 0.0, "long bad answers win as often (C4)"),
    ("mismatched-loses-bleu", "bleu/adapted + bleu/human - 2 * bleu/mismatched", 0.0, "half of the gain is kept (C5)"),
    ("mismatched-loses-judge", "verdict/adapted - verdict/mismatched", 0.0, "any revision helps as much (C5)"),
    ("bleu-beats-edit", "bleu/adapted - edit/adapted", 0.0, "counting the reviser's edits does as well (tautology)"),
    ("both-beats-random", "bleu pairs/both - bleu pairs/random", 0.0, "one revision is no anchor (ours)"),
]


def interval(draws):
    """Statistic and 95 % interval of draws, of which the first is the data."""
    known = draws[1:][np.isfinite(draws[1:])]  # a draw of one source has no tau
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (-math.inf, math.inf)
    return float(draws[0]), (min(low, draws[0]), max(high, draws[0]))


def statistics(draws):
    """Claim id to (statistic, interval), where what it needs was measured; sums and differences are paired."""
    found = {}
    for name, formula, *_ in CLAIMS:
        terms = re.findall(r"(^|[+-]) ?(?:(\d) \* )?([a-zA-Z][\w ]*/\w+)", formula)
        if all(key in draws for *_, key in terms):
            parts = zip(terms, together(draws, *(key for *_, key in terms)))
            x = sum(float(sign + (n or "1")) * part for (sign, n, _), part in parts)
            found |= {name: interval(x)} if math.isfinite(x[0]) else {}
    return found


# ---------------------------------------------------------------- 6. Training
def example(role, rng):
    """(prompt, answer) in tokens of one role, from a training record."""
    record = make_record(rng, "train")
    source, right = " ".join(itertools.chain(*record.items())), tell(record, rng)
    if role == "write":
        return prompt_of(role, source), encode(say(right)) + [0]
    clauses = add_errors(record, right, rng.choice(COUNTS), TRAIN_MIX, rng)
    gold = say(repair(record, clauses))
    if role == "revise":
        return prompt_of(role, source, say(clauses)), encode(gold) + [0]
    reference = [gold if rng.random() < 0.5 else say(tell(record, rng))] * (role == "compare")
    return prompt_of(role, source, *reference, say(clauses)), encode(explain(record, say(clauses))) + [0]


def explain(record, text):
    """A verdict as the judges learn to write it: what is true of each slot, then the score, 5 less the errors."""
    errors, found = slot_errors(record, text), stated(text)
    words = {slot: "right" if not n else "wrong" if slot in found else "missing" for slot, n in errors.items()}
    told = [f"{slot} {words[slot]}" for slot in record] + [f"{slot} extra" for slot in found if slot not in record]
    return f"{' '.join(told)} {5 - min(4, sum(errors.values()))}"


def budgets(cfg):
    """Steps after which the model is kept and measured: little, more and all of the training."""
    return sorted({max(1, round(cfg.steps * share)) for share in (0.15, 0.25, 0.4, 0.65, 1.0)})


def batch_of(cfg, role, step):
    """ids (B, L) of one role's examples and what of them is an answer (B, L), drawn from (seed, role, step) alone."""
    rng = random_of("train", cfg.seed, role, step)
    rows = [example(role, rng) for _ in range(cfg.batch_size)]
    ids = pad_right([prompt + answer for prompt, answer in rows], "cpu")
    place, (begin, end) = torch.arange(ids.shape[1]), torch.tensor([[len(p), len(p) + len(a)] for p, a in rows]).T
    return ids, (place >= begin[:, None]) & (place < end[:, None])


def train(cfg, run, role, state):
    """Train the model of one role; at each budget the running average of its weights, which reaches back about a tenth
    of the way, is kept."""
    torch.manual_seed(random_of("weights", cfg.seed, role).getrandbits(60))
    model, step = Decoder(tiny_shape(cfg)).to(run.device), 0
    nn.init.normal_(model.embed_tokens.weight, 0, 0.05)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, 0.98), weight_decay=0.01, fused=True)
    if state.get("job") == role:
        step = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    log, began, first = Log(run, role, cfg.steps, step), time.perf_counter(), step
    while step < cfg.steps:
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, (step + 1) / 50)
        ids, answer = (x.to(run.device) for x in batch_of(cfg, role, step))
        loss = F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:], reduction="none") * answer[:, 1:]  # (B, L - 1)
        loss = (loss.sum(1) / answer.sum(1)).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        torch._foreach_lerp_([*average.parameters()], [*model.parameters()], min(1.0, 10 / step))
        if step % cfg.log_every == 0 or step == cfg.steps:
            rate = (step - first) / (time.perf_counter() - began)
            log(step, loss=loss.item(), gnorm=norm.item(), per_s=rate * cfg.batch_size)
        if step in budgets(cfg):
            replace_file(run.out / f"{role}-{step}.safetensors", export(average))
        stop = should_stop(run)
        if stop or step % cfg.save_every == 0 or step == cfg.steps:
            run.keep["trained"] += [role] * (step == cfg.steps)
            save_state(run, job=role, step=step, model=model.state_dict(), average=average.state_dict(),
                       optimizer=optimizer.state_dict(), **run.keep, seconds=time.perf_counter() - run.began)
        if stop:
            pause(run)


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


# --- block: stop ---
def stopped(run):
    """After Ctrl-C, when the state is saved: say how to go on, and leave."""
    again = shlex.join([sys.executable, *sys.argv]) + " --resume" * ("--resume" not in sys.argv)
    if not run.rank:
        print("stopped; continue with:", again if run.world == 1 else "the same command and --resume")
    raise SystemExit(130)
# --- end block ---


def pause(run):
    """At Ctrl-C the run ends."""
    if should_stop(run):
        stopped(run)


def stage(run, path, todo, make, spent=lambda: 0, size=16):
    """Rows of a JSONL file for the items `todo`, by parts of `size`; the first row of one has seconds and tokens. What
    a former call has written is not made again, but for a part that a kill has cut: it is made whole."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    lines = lines if len(lines) == len(todo) and lines[-1:][0].endswith(b"\n") else lines[: len(lines) // size * size]
    try:
        rows = [json.loads(line) for line in lines]
        if [row["id"] for row in rows] != [x["id"] for x in todo[: len(rows)]]:
            raise ValueError("rows of other data")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f"{path}: not a file of this run: {error!r}; remove it, and it will be made again")
    log = Log(run, path.stem, len(todo), len(rows))
    run.began -= sum(row.get("seconds", 0) for row in rows)
    with open(path, "ab") as file:
        file.truncate(sum(map(len, lines)))
        while len(rows) < len(todo):
            began, before = time.perf_counter(), spent()
            new = make(todo[len(rows) : len(rows) + size])
            new[0] |= dict(tokens=spent() - before, seconds=time.perf_counter() - began)
            file.write("".join(json.dumps(row) + "\n" for row in new).encode())
            file.flush()
            os.fsync(file.fileno())
            rows += new
            log(len(rows))
            pause(run)
    return rows


def real_metrics(cfg, device):
    """{metric: (text, reference) pairs to scores} of the networks that --encoder and --scorer name."""
    found = {}
    if cfg.encoder:
        encoder = Encoder(fetch_model(cfg.encoder)).to(device).eval()

        def embed(texts):
            x, mask = encoder(texts)
            weight = mask.float()
            weight[:, 0] = 0
            return x, mask, weight.scatter(1, mask.sum(1, keepdim=True) - 1, 0)  # CLS and SEP

        length = functools.cache(lambda text: len(wordpieces(text, encoder.vocab, encoder.lower)))
        found["bertscore"] = lambda pairs: bert_score(embed, pairs, cfg.kernels, length=length)
    if cfg.scorer:
        folder = fetch_model(cfg.scorer)
        model, tok = load_real(folder).to(device).eval(), load_tokenizer(folder)

        def bart_score(pairs):  # a causal model needs a phrase that asks for a paraphrase (our choice)
            both = [side for y, r in pairs for side in ((r, y), (y, r))]
            tokens = [(tok.encode(a + " In other words,")[-400:], tok.encode(" " + b)[:400]) for a, b in both]
            return np.array(mean_logp(model, tokens, cfg.kernels, 8)).reshape(-1, 2).mean(1)

        found["bartscore"] = bart_score
    return found


def dry_run(cfg):
    """What a run takes, without allocating a network."""
    if cfg.task == "data":
        rows = read_data(cfg) if cfg.data else [dict(group=i, source="", a="word " * 300, b="") for i in range(1000)]
        arms, sides, words = cfg.arms.split(","), len(answers_of(rows[0])), [len(str(row).split()) for row in rows]
        before = len(rows) * (sides if cfg.pair_ref != "random" else 1) * bool({"adapted", "mismatched"} & set(arms))
        before += len({row["group"] for row in rows}) * ("direct" in arms)
        calls = before + len(rows) * sides * (1 + len(arms))
        return print(f"{len(rows)} rows: {calls} calls at most, {before} of them for references, repeats aside, "
                     f"{1.4 * calls * (1.5 * np.mean(words) + 150):.1e} tokens (1.4 a word, replies of 150 words)")
    shape, d = tiny_shape(cfg), cfg.n_embd
    n = d * (len(TOKENS) + 1 + cfg.n_layer * (4 * d + 3 * shape.n_mlp + 2))
    tokens = len(ROLES) * cfg.steps * cfg.batch_size * 60
    memory = (16 * n + cfg.batch_size * 80 * (34 * cfg.n_layer * cfg.n_embd + 1600)) / 2**30
    print(f"{len(ROLES)} x {n:,} parameters, {tokens:.1e} tokens, {6 * n * tokens:.1e} FLOPs, {memory:.2f} GiB, loss "
          f"of a guess {math.log(len(TOKENS)):.2f}, {n * tokens / 1.2e13:.2f} hours on a core (20 GFLOP/s), "
          f"{n * tokens / 1.2e15:.4f} on one H100 (2 TFLOP/s)")


def plot_world(path, metrics):
    """tau by budget, and where the budgets lie between scripted revisers of known competence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = sorted(int(key.split()[1].split("/")[0]) for key in metrics if re.fullmatch(r"step \d+/p_fix", key))
    by_step = lambda name: [metrics[f"step {step}/{name}"] for step in steps]
    for name in ("bleu", "rougeL", "edit", "verdict"):
        left.plot(steps, by_step(name), marker=".", label=f"{name} with r*" if name != "verdict" else "judge without")
    left.axhline(metrics.get("bleu/human", math.nan), color="gray", linestyle=":", label="bleu with human reference")
    left.set(xlabel="optimizer steps of the tiny model", ylabel="Kendall's tau-b with quality")
    dots = right.scatter(*zip(*GRID), c=[metrics[f"scripted {f} {d}/bleu"] for f, d in GRID], s=120, vmin=0, vmax=0.8)
    figure.colorbar(dots, label="tau of BLEU, scripted revisers")
    right.plot(by_step("p_fix"), by_step("p_dmg"), "k.-", label="tiny model, by budget")
    right.set(xlabel="p_fix: errors mended", ylabel="p_dmg: right slots broken", xlim=(0, 1.05), ylim=(-0.03, 0.6))
    for side in (left, right):
        side.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def rows_of(metrics, draws):
    """Columns that are references, and {row: {column: text}} of metrics "row/column", half their interval behind ±."""
    table = {}
    for key, x in metrics.items():
        name, _, column = key.rpartition("/")
        low, high = interval(draws[key][1])[1] if key in draws and math.isfinite(x) else (x, x)
        text = str(x) if type(x) is int else f"{x:.3f}" if math.isfinite(x) else "-"
        table.setdefault(name, {})[column] = text + (f" ±{(high - low) / 2:.3f}" if high > low else "")
    return [c for c in COLUMNS if any(c in row for row in table.values())], table


def marked(old, new):
    """Two texts as HTML with their different words marked; all of it escaped."""
    a, b, sides = old.split(), new.split(), [[], []]
    for kind, i, j, k, l in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for side, words, tag in ((sides[0], a[i:j], "del"), (sides[1], b[k:l], "ins")):
            text = html.escape(" ".join(words))
            side.append(text if kind == "equal" or not text else f"<{tag}>{text}</{tag}>")
    return [" ".join(side) for side in sides]


STYLE = """:root{color-scheme:light dark}body{font:15px/1.5 system-ui;max-width:72em;margin:auto;padding:1em}
div{overflow-x:auto}table{border-collapse:collapse}th,td{border:1px solid #8888;padding:.2em .6em;text-align:right}
div .t{position:sticky;left:0;background:Canvas}
div td{white-space:nowrap}th:first-child,.t{text-align:left;vertical-align:top}details{margin:1em 0}
details table{width:100%;table-layout:fixed}p,details td{white-space:pre-wrap;overflow-wrap:anywhere}
del,ins{text-decoration:none;background:#f004}ins{background:#0a04}
.bar{background:linear-gradient(90deg,#0000 49%,#888 0 51%,#0000 0),linear-gradient(90deg,#48f6 var(--p),#0000 0)}"""


def write_report(path, cfg, metrics, draws, worst):
    """One self-contained page. Texts come from data and models: all are escaped, and the page has no script."""
    columns, table = rows_of(metrics, draws)

    def cell(name, column):
        text = table[name].get(column, "")
        bar = text and name.endswith(("primary wins", "judge first", "judge consistent"))
        return f"<td class=bar style='--p:{metrics[f'{name}/{column}']:.0%}'>{text}" if bar else f"<td>{text}"

    lines = "".join(f"<tr><td class=t>{html.escape(name)}{''.join(cell(name, c) for c in columns)}"
                    for name, row in table.items() if set(row) & set(columns))
    page = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>"
            f"RevisEval</title><style>{STYLE}</style><h1>RevisEval: {html.escape(Path(cfg.data).name)}</h1>"
            "<p>Agreement with people by scorer and reference, ± half its 95 % interval: Kendall's tau-b, Spearman's "
            "rho, mean tau-b within a source; of pairs accuracy, also where the worse answer is longer. Columns random "
            "to both: by the revision of one answer, of each its own, of both. Bars: without bias the first place "
            "and the answer that was revised win in a half (the tick); consistent: one winner in both orders.</p><div>"
            f"<table><tr><th>scorer<th>{'<th>'.join(columns)}{lines}</table></div><h2>Worst disagreements</h2>"]
    for row in worst:
        sides = "<tr>".join("<td class=t>{}<td class=t>{}".format(*marked(*pair)) for pair in row["pairs"])
        page.append(f"<details open><summary>{html.escape(row['title'])}</summary><p>{html.escape(row['source'])}</p>"
                    f"<table><tr><th>answer<th class=t>adapted (else human) reference<tr>{sides}</table></details>")
    replace_file(Path(path), "".join(page).encode("utf-8", "replace"))


def worst_of(rows, made, scores, truth, count=20):
    """For the report: where people and the first scorer there is are farthest apart, in rank or in preference."""
    key = next(k for k in ("judge/adapted", "judge/none", "bleu/adapted", "bleu/human", "length/none") if k in scores)
    known, found = np.flatnonzero(~np.isnan(scores[key])), []
    x, y = scores[key][known], truth[known]
    gap = -x * y if "b" in rows[0] else np.abs(ranks(x) - ranks(y))
    for at in [i for i in np.argsort(-gap, kind="stable")[:count] if gap[i] > 0]:
        row, revised = rows[known[at]], made[known[at]]["adapted"]
        title = f"{row['id']}: people {y[at]:.3g}, {key} {x[at]:.3g}" + " (1: first answer, -1: second)" * ("b" in row)
        pairs = [(text, revised.get(str(j), dict(text=row["human"]))["text"]) for j, text in enumerate(answers_of(row))]
        found.append(dict(source=row["source"], title=title, pairs=pairs))
    return found


# ---------------------------------------------------------------- 8. Main
def run_world(cfg, run, state, rows, real):
    """Train, measure every budget, then all arms with the last one: metrics and draws."""
    done = run.keep["done"]
    if not run.keep["trained"]:
        dry_run(cfg)
    for role in ROLES:
        if role not in run.keep["trained"]:  # a file alone could be of other settings
            train(cfg, run, role, state)
    for step in budgets(cfg):
        models = {role: Decoder(tiny_shape(cfg)).to(run.device) for role in ROLES}
        for role, model in models.items():
            model.load_state_dict(load_file(run.out / f"{role}-{step}.safetensors"))
        if str(step) not in done:
            tiny = Tiny(models)
            verdict = tiny.judge([row["source"] for row in rows], [row["response"] for row in rows])[1]
            ok, quality = ~np.isnan(verdict), np.array([row["quality"] for row in rows])
            done[str(step)] = worth(rows, tiny.revise(rows)) | dict(verdict=tau_b(verdict[ok], quality[ok]))
            save_state(run, **run.keep, seconds=time.perf_counter() - run.began)
        pause(run)
        print(f"budget {step}: " + " | ".join(f"{name} {x:.3f}" for name, x in done[str(step)].items()), flush=True)
    last = done[str(cfg.steps)]
    if last["p_fix"] < 0.6 or last["p_dmg"] > 0.1:
        print("note: the claims are about a reviser with p_fix of at least 0.6 and p_dmg of at most 0.1: raise --steps")
    metrics, draws = evaluate_world(cfg, run, Tiny(models), rows, real)
    metrics |= {f"step {step}/{name}": x for step, row in done.items() for name, x in row.items()}
    for f, d in GRID:  # where is the break-even line of a reviser of known competence?
        rng = random_of("scripted", f, d)
        made = worth(rows, [say(repair(row["record"], row["clauses"], rng, f, d)) for row in rows])
        metrics |= {f"scripted {f} {d}/{name}": x for name, x in made.items()}
    plot_world(run.out / "plot.png", metrics)
    return metrics, draws


def attach_references(cfg, rows, made):
    """Put {"none": "", kind: reference} into each row; made: its row of references.jsonl."""
    alike, n = {}, len(rows)
    for i, row in enumerate(rows):
        alike.setdefault(row["group"], []).append(i)
    adapted = [x["adapted"].get(str(row.get("primary", 0)), dict(text=""))["text"] for row, x in zip(rows, made)]
    for i, row in enumerate(rows):
        here = alike[row["group"]]
        other = here[(here.index(i) + 1) % len(here)]
        if "b" in row or other == i:  # the next row about something else
            other = next((j % n for j in range(i + 1, i + n) if rows[j % n]["group"] != row["group"]), i)
        found = dict(human=row["human"], direct=made[i]["direct"], adapted=adapted[i],
                     mismatched=adapted[other] if other != i else "")
        row["references"] = {"none": ""} | {k: text for k, text in found.items() if text and k in cfg.arms.split(",")}


def run_data(cfg, run, rows, backend, real):
    """Human judgements: references and verdicts if there is a back-end, then agreement of all scorers with people."""
    made, judged, metrics, pairs, arms = [dict(adapted={}) for _ in rows], [], {}, "b" in rows[0], cfg.arms.split(",")

    def make(name, work, todo):
        path = run.out / f"{name}.jsonl"
        return stage(run, path, todo, functools.partial(work, cfg, backend), lambda: backend.tokens)

    first = {row["group"]: row for row in rows[::-1]}  # of each source
    own = make("direct", make_direct, [first[g] for g in range(len(first))]) if backend and "direct" in arms else []
    if backend and {"adapted", "mismatched"} & set(arms):
        made = make("references", make_revisions, rows)
        revised = [x for row in made for x in row["adapted"].values()]
        metrics = {f"reviser/{name}": float(np.mean([x[name] for x in revised])) for name in ("identity", "failed")}
    made = [x | dict(direct=own[row["group"]]["text"] if own else "") for row, x in zip(rows, made)]
    attach_references(cfg, rows, made)
    if backend:
        judged = make("judgments", make_judgments, rows)
        for name, part in (("references", own + made), ("verdicts", judged)):
            metrics[f"tokens/{name}"] = sum(row.get("tokens", 0) for row in part)
        metrics["tokens/per verdict"] = metrics["tokens/verdicts"] / sum(len(row["verdicts"]) for row in judged)
    answers = [dict(row=row, revised=x["adapted"], source=row["source"], response=text)
               for row, x in zip(rows, made) for text in answers_of(row)]
    columns = {kind: [x["row"]["references"].get(kind, "") for x in answers] for kind in arms}
    columns = {kind: column for kind, column in columns.items() if any(column)}
    columns |= {str(j): [x["revised"].get(str(j), dict(text=""))["text"] for x in answers]
                for j in range(2) if pairs and "adapted" in columns}
    table = measure([x["response"] for x in answers], columns, real) | baselines(answers)
    verdicts, more = judge_scores(rows, judged)
    group, truth = (np.array([row[name] for row in rows]) for name in ("group", "label" if pairs else "quality"))
    if pairs:
        index, primary = np.arange(len(answers)).reshape(-1, 2), np.array([row["primary"] for row in rows])
        found, draws, scores = pair_table(cfg, table, index, truth, group, primary, verdicts)
    else:
        scores = table | verdicts
        found, draws = rating_table(scores, truth, group)
    if cfg.report:
        write_report(cfg.report, cfg, metrics | found | more, draws, worst_of(rows, made, scores, truth))
    return metrics | found | more, draws


def print_table(metrics, draws):
    """A row for each scorer, a column for each reference; what is left; what the adapted reference gains."""
    columns, table = rows_of(metrics, draws)
    print(f"{'':26}" + "".join(f"{c:>14}" for c in columns))
    for name, row in table.items():
        if set(row) & set(columns):
            print(f"{name:26}" + "".join(f"{row.get(c, ''):>14}" for c in columns))
        else:
            print(f"{name}: " + " | ".join(f"{column} {text}" for column, text in row.items()))
    for name, other in itertools.product(table, ("none", "human", "direct")):
        keys = f"{name}/adapted", f"{name}/{other}"
        if set(keys) <= set(draws) and all(np.isfinite(draws[key][1][0]) for key in keys):
            a, b = together(draws, *keys)
            x, (low, high) = interval(a - b)
            print(f"paired: {name}, adapted - {other}: {x:.3f} [{low:.3f}, {high:.3f}]")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = cli(Config, SCALES, argv)
    if cfg.dry_run:
        return dry_run(cfg)
    if cfg.kernels and not torch.cuda.is_available():
        fail("--kernels needs a CUDA device; without the flag the same run takes plain PyTorch")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("torchrun: this script runs in one process")
    if cfg.report and (not Path(cfg.report).resolve().parent.is_dir() or Path(cfg.report).is_dir()):
        fail(f"--report {cfg.report}: must be a file in a directory that there is")
    rows = read_data(cfg) if cfg.task == "data" else make_responses(cfg)
    told = [[row["source"], row["human"], *answers_of(row), row.get("label", row.get("quality"))] for row in rows]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    run = start_run(cfg, "reviseval")
    real = real_metrics(cfg, run.device)  # before there is a state: a mistyped name must not lock the directory
    backend = Remote(cfg, run) if cfg.endpoint else Local(cfg, run) if cfg.model else None
    state = load_state(run) or dict(done={}, trained=[], data=digest, seconds=0.0)
    if state["data"] != digest:
        fail(f"--data {cfg.data}: is not what the interrupted run in {run.out} has read")
    run.began, run.keep = time.perf_counter() - state["seconds"], {k: state[k] for k in ("done", "trained", "data")}
    if not (run.out / "state.pt").exists():
        for name in ("direct", "references", "judgments"):  # of an unknown run; an endpoint's replies are kept
            (run.out / f"{name}.jsonl").unlink(missing_ok=True)
        save_state(run, **state)  # from here on the directory belongs to these flags
    world = cfg.task == "world"
    metrics, draws = run_world(cfg, run, state, rows, real) if world else run_data(cfg, run, rows, backend, real)
    print_table(metrics, draws)
    record = dict(tried=TRIED if world else {}, metrics=metrics, data_sha256=digest)
    record["minutes"] = (time.perf_counter() - run.began) / 60
    return report(cfg, run, "reviseval", argv, statistics(draws) if world else {}, CLAIMS, **record)


if __name__ == "__main__":
    from_shell(main)
