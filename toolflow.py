# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "tiktoken", "safetensors", "tqdm", "matplotlib", "requests"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""toolflow.py: ToolFlow: Boosting LLM Tool-Calling Through Natural and Coherent Dialogue Synthesis
Wang, Zeng, Liu, Li, Wang, Shang, Jiang, Liu, Wong, NAACL 2025, arXiv 2410.18447

Tools whose parameters and returns mean the same are joined in a graph. A dialogue is about tools along a walk on it,
and follows a plan, so that requests build on what was said and returned before. A student trained on such dialogues
shall use the history better than one trained on as many tokens about random tools without a plan.

  python toolflow.py    # 9 minutes on a core. Right arguments with graph and plan, and without: returned by a tool 61
                        # and 50 %, said before 40 and 46, in the request itself 79 and 84; three seeds decide none
  python toolflow.py --task graph --data BFCL --encoder MINILM --show-graph g.svg    # 2 min; 1,441 real tools: of pairs
          # with an edge 75 % are used in one task, of all 21 %; inside one API, where nearly all edges lie, 80 and 68 %
  python toolflow.py --task synth --tools mcp.json --teacher https://host/v1 --model a,b --dialogues 100
  python toolflow.py --task sft --data openai.jsonl --model DIR --lora-rank 16  # by torchrun too; --task bfcl scores it

Symbols
  paper        code                shape     meaning
  p, r         texts, returns      (K,)      "name: description" of each parameter and return, and which are returns
  cos > tau    simgraph            (n, n)    e_ij, edges of n tools: P-P, or P-R in either direction
  H, D-N, SS   entropy, distinct, coherence  entropy of words in bits, share of different trigrams, 100 cos(round, next)

Files in OUT: dialogues-ARM.jsonl (with broken rules and origins), openai-ARM.jsonl, hermes-ARM.jsonl (the kept ones),
answers-ARM.jsonl, ARM.safetensors; synth: the first three without -ARM, replies/; sft: model/; bfcl: answers-*.jsonl.

Differences from the paper, whose text was read without its tables and prompts: tables are from notes of others
  tools       made up, 550 and 136 unseen ones (new pairs of known words), not 16,000 from RapidAPI; or your own.
              Near-duplicates are merged. No model writes missing descriptions; no schema of returns, no P-R edge.
  encoder     all-MiniLM-L6-v2 with --encoder; else hashed n-grams, for which tau is set to 6 neighbours a tool
  graph       P-R in either direction. Alg. 1 as noted goes on from the last tool added, ours from visited ones too; it
              never starts where it cannot end. 3 to 6 tools, 3 to 5 requests: the paper does not state them.
  teacher     `sim`, one simulator of all parts, in place of GPT-4; or --teacher. Sim chats as often in all arms, and
              refers back as often where it can, which a plan makes possible. H and D-3 measure its phrasings.
  data        F1 to F10 are ours, none by a model. SS, H, D-3 of what is said; equal tokens count JSON; no EnR, no judge
  students    tiny decoders from random weights, whose keys also see the token before, and which first learn single
              requests, in place of an 8B model; loss on the assistant's tokens; AdamW (0.9, 0.98), decay 0.1 on all
              weights. Held out are tools and frames of words; verbs are known. One simulator makes training and test.
  left out    API-Bank, ToolAlpaca, MMLU, BBH, MT-Bench, correlations, self-synthesis, sharegpt, xlam, leakage checks

Copy out: simgraph, walk, broken_rules, ast_correct, to_hermes with from_hermes, pack with packed_states
"""

import argparse
import ast
import contextlib
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
from decimal import Decimal
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
    task: str = "world"  # world|graph|synth|sft|bfcl: all of it, made up; real tools' graph; dialogues; tuning; a score
    scale: str = "small"  # smoke|small|long|paper: a row of SCALES below; explicit flags win over it
    arms: str = "both,no-plan,no-graph,neither"  # comma list out of ARMS below; task synth takes the first
    students: str = "neither,both"  # arms whose dialogues a student is trained on; "" = none
    tag: str = "main"  # name of this variant in the RESULT record
    seed: int = 0  # dialogues, first weights, order of training
    data: str = ""  # graph, bfcl: folder of the unzipped package bfcl-eval; sft: JSONL in OpenAI's format
    tools: str = ""  # synth, graph: file of tools (OpenAI, BFCL, or an MCP answer to tools/list); "" = the made world
    encoder: str = ""  # directory or hub id of all-MiniLM-L6-v2 or another BERT-type encoder; "" = hashed n-grams
    tau: float = 0.0  # cosine above which two tools are joined (paper: 0.82, of its encoder); 0 = 6 neighbours a tool
    n_tools: str = "3-6"  # fewest-most tools of a dialogue (not stated in the paper)
    show_graph: str = ""  # file .svg or .png to draw the graph and one walk to
    teacher: str = ""  # synth: an endpoint https://host/v1; or checkpoints, a comma list of directories or hub ids
    model: str = ""  # synth: the endpoint's models a,b,c, one drawn for each dialogue; sft, bfcl: directory or hub id
    dialogues: int = 8000  # synth: how many, kept or not (paper: 8000)
    budget: int = 10_000_000  # synth: tokens after which nothing is asked; dialogues under way are dropped then
    workers: int = 8  # synth: requests at a time
    part: int = 100  # dialogues that are made, and written to the file, at a time
    tokens: int = 300_000  # kept tokens of each arm (paper: 8M)
    n_test: int = 300  # held-out dialogues; bfcl: items of each category
    n_layer: int = 3  # layers of a student
    n_embd: int = 96  # its width; it has 4 heads
    base_steps: int = 600  # optimizer steps of the base on single requests, from which all students start
    steps: int = 400  # optimizer steps, of all students alike
    batch_size: int = 4  # packed lines in one optimizer step, over all devices (not stated in the paper)
    micro_batch: int = 4  # packed lines per forward pass; saves memory, same gradient
    seq_len: int = 512  # tokens of a line, and most of a dialogue
    lr: float = 4e-3  # peak learning rate (not stated in the paper)
    lora_rank: int = 0  # sft: rank of LoRA in all linear layers; 0 = all are learned; torchrun spreads them (FSDP)
    max_new: int = 80  # most tokens of an answer
    device: str = "auto"  # auto|cpu|cuda|mps: auto is cuda if there is one, else cpu
    dtype: str = "auto"  # auto|float32|bfloat16: auto is bfloat16 on cuda, else float32
    kernels: bool = False  # Triton kernels simgraph, token_logp (cuda only; compared with PyTorch at first use)
    log_every: int = 20  # steps between two lines of log.jsonl
    save_every: int = 200  # steps between two checkpoints
    out: str = ""  # output directory; "" = out/toolflow/TASK-SCALE[-TAG]-sSEED
    resume: bool = False  # continue an interrupted run: the same command with this flag
    dry_run: bool = False  # print parameters, tokens, cost and hours, and stop

    def __post_init__(self):
        arms, students = self.arms.split(","), [arm for arm in self.students.split(",") if arm]
        if not set(arms) <= ARMS.keys() or len(set(arms)) < len(arms):
            fail(f"--arms {self.arms}: a comma list, each once, out of {', '.join(ARMS)}")
        if self.task == "world" and (not set(students) <= set(arms) or len(set(students)) < len(students)):
            fail(f"--students {self.students}: must be among --arms {self.arms}, each once")
        for name, value in vars(self).items():
            low, high = dict(seed=0, tau=0, lora_rank=0, lr=0).get(name, 1), 1 if name == "tau" else math.inf
            if not isinstance(value, (str, bool)) and not (low <= value <= high and value < math.inf):
                fail(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
        if not re.fullmatch(r"\d-\d", self.n_tools) or not 1 <= int(self.n_tools[0]) <= int(self.n_tools[2]):
            fail(f"--n-tools {self.n_tools}: must look like 3-6, from 1 to 9")
        if self.n_embd % 8:
            fail(f"--n-embd {self.n_embd}: must be a multiple of 8")
        if self.show_graph and not re.search(r"\.(svg|png)$", self.show_graph):
            fail(f"--show-graph {self.show_graph}: must end in .svg or .png")
        if self.task == "graph" and self.data and self.tools:
            fail("--task graph: takes --data or --tools, not both")
        need = dict(sft=["model", *["data"] * (not self.dry_run)], bfcl=["data", "model"])
        need["synth"] = ["tools", "teacher", *["model"] * ("://" in self.teacher)] * (not self.dry_run)
        if missing := [f"--{name}" for name in need.get(self.task, ()) if not getattr(self, name)]:
            fail(f"--task {self.task}: needs {' and '.join(missing)} (-h says of what form)")


ARMS = {  # (are a dialogue's tools a walk on the graph, is there a plan)
    "both": (True, True), "no-plan": (True, False), "no-graph": (False, True), "neither": (False, False)}
SYNTH, SFT = dict(seq_len=8192, part=20, max_new=1024), dict(
    lr=2e-4, batch_size=8, micro_batch=1, seq_len=2048, steps=200, max_new=200)
SCALES = {  # "scale" and "scale:task"; explicit flags win
    "smoke": dict(tokens=4000, n_test=6, n_layer=1, n_embd=32, base_steps=4, steps=4, batch_size=2, seq_len=640,
                  part=20, save_every=3, dialogues=4, max_new=12), "smoke:synth": SYNTH | dict(part=4),
    "smoke:sft": dict(lr=2e-4, micro_batch=1, seq_len=1024), "small": {}, "small:sft": SFT, "small:synth": SYNTH,
    "small:bfcl": dict(max_new=200), "long:bfcl": dict(max_new=200), "paper:bfcl": dict(max_new=512, n_test=5000),
    "long": dict(tokens=1_000_000, steps=2500, n_embd=128, n_test=500), "long:sft": SFT | dict(steps=1000),
    "long:synth": SYNTH, "paper:synth": SYNTH | dict(tau=0.82, part=32, workers=32, budget=200_000_000),
    "paper": dict(tokens=8_000_000, tau=0.82), "paper:sft": SFT | dict(steps=375, seq_len=8192, lr=1e-5),  # 3 epochs
}
TRIED = 6  # settings of the students that were looked at, on seed 7 and alike for all arms
ROLES = "system", "user", "assistant", "tool"


# ---------------------------------------------------------------- 2. Data
# The made world. Tools are about things; parameters and returns are of kinds, and what is of one kind composes. The
# graph and the student see names and descriptions only.
HEADS = {  # shape of a thing: what it is. A thing is a pair of words such as "river hotel"
    "stay": "hotel hostel cabin villa museum house", "trip": "flight train ferry bus tram",
    "good": "laptop lamp chair camera watch bike", "help": "doctor dentist plumber painter tutor guide",
    "show": "concert opera lecture match", "paper": "invoice report contract loan",
}
FIRST = "sea river night north garden silver royal summer market harbor mountain island".split()
SHAPES = {  # shape: tools as "verb: parameters -> returns", ? is optional; N is the thing
    "stay": ["find: city date? -> N_id price", "reserve: N_id date guests -> N_booking total",
             "cancel: N_booking -> refund", "describe: N_id -> city price", "review: N_id stars -> points"],
    "trip": ["find: origin destination date -> N_id price", "reserve: N_id person seats? -> N_ticket total",
             "cancel: N_ticket -> refund", "describe: N_id -> city time"],
    "good": ["find: colour budget? -> N_id price", "order: N_id city count? -> N_order delivery_date",
             "track: N_order -> city date", "cancel: N_order -> refund", "review: N_id stars -> points"],
    "help": ["find: city date? -> person price", "appoint: person date time -> N_visit", "move: N_visit date -> time",
             "cancel: N_visit -> refund"],
    "show": ["find: city date? -> N_id price", "buy: N_id seats -> N_ticket total", "cancel: N_ticket -> refund",
             "describe: N_id -> date time"],
    "paper": ["write: person amount -> N_id", "send: N_id person -> date", "settle: N_id amount -> balance",
              "describe: N_id -> person amount"],
    "any": ["weather: city date -> temperature", "convert: amount currency -> amount", "remind: topic date -> time",
            "message: person topic -> time", "transfer: person amount -> balance",
            "route: origin destination -> minutes"],
}
VERBS = {  # verb, the last word of a tool's name: what a user wants to do
    "find": "find a N|look for a N|search for a N", "reserve": "reserve the N|book the N|make a booking of the N",
    "cancel": "cancel my N|call off the N|stop my N", "describe": "tell me about the N|describe the N|check the N",
    "review": "review the N|rate the N|leave stars about the N", "order": "order the N|have the N sent|purchase the N",
    "track": "track my N|trace the N|see where my N is", "appoint": "see a N|make a visit to the N|schedule a N",
    "move": "move my N visit|shift the N visit|put off the N visit",
    "buy": "buy seats at the N|get seats at the N|take seats at the N", "write": "write a N|create a N|make a new N",
    "send": "send the N|forward the N|pass on the N", "settle": "settle the N|pay the N|pay off the N",
    "weather": "know the weather|hear about the weather|check the weather",
    "convert": "convert money|change money|see what money is worth",
    "remind": "set up a reminder|be told in time|create a reminder",
    "message": "send a message|write a message|leave a message", "transfer": "transfer money|send money|move money",
    "route": "find a way|know the way|plan a way",
}
KIND = dict(origin="city", destination="city", delivery_date="date") | dict.fromkeys(
    "price total refund budget balance".split(), "amount")  # of a parameter or return, where it is not its name
ENUMS = dict(colour=["red", "blue", "green", "black"], currency=["dollar", "pound", "franc", "yen"])
NUMBERS = "amount guests seats stars count temperature minutes points".split()  # kinds that are integers
LINKED = re.compile(r"city|date|time|person|amount|.+_(id|booking|ticket|order|visit)")  # kinds one refers back to
PREPOSITIONS = dict(city="in|near|around", origin="from", destination="to", date="on|for", time="at", person="with|for",
                    amount="of|worth", budget="under|below", topic="about", colour="in", currency="to|into")
MONTHS = "may june july august".split()
BANKS = {  # act: phrasings; behind the bar those of the held-out split alone. {} is what is wanted, found or missing
    "ask": ("please {}.;can you {}?;i want to {}.;i need to {}.;could you {}?;i would like to {}.;help me {}.;now {}.;"
            "let us {}.;go ahead and {}.;my plan is to {}.;it is time to {}.;we should {}.",
            "would you {}?;i have to {}.;you can now {}.;time to {}, please."),
    "said": ("the same {};the same {} as before;the {} i told you;the {} from before;my {} from before;the {} i gave;"
             "the {} i said;the same {} again;the {} we had;the {} i gave before;once more the {};the {} of before",
             "the {} i told you before;again the same {}"),
    "returned": ("that {};this {};the {} you found;the {} you told me;the {} you gave me;your {};the {} of your answer;"
                 "the {} you said;the {} you just found;the new {};the {} i got;the {} you got",
                 "the {} you just gave me;that new {}"),
    "and": ("and then;and also;and after that;and;also;then;after that;next;and next;and please;and now;then please",
            "and then please;also please"),
    "missing": ("which {}?;what is the {}?;please tell me the {}.;i need the {}.;could you give me the {}?;"
                "what {} do you want?;the {}, please?;may i have the {}?;i still need a {}.;tell me the {} first.;"
                "what {} should i take?;you have not said the {}.", "which {} do you want?;please give me the {}."),
    "given": ("it is {}.;{}.;{}, please.;take {}.;the answer is {}.;that is {}.;i want {}.;let us take {}.;use {}.;"
              "make it {}.;you can use {}.;i said {}?", "please take {}.;use {}, please."),
    "done": ("done: {}.;here it is: {}.;all set: {}.;i did it: {}.;you have it: {}.;as you like: {}.;ready: {}.;"
             "that worked: {}.;good news: {}.;this is it: {}.;i have it: {}.;it worked: {}.",
             "it is done: {}.;here you have it: {}."),
    "sorry": ("sorry, {}.;that did not work: {}.;i could not do it: {}.;no luck: {}.;it is not to be: {}.;bad news: {}."
              ";not done: {}.;there is bad news: {}.;it did not work: {}.;i am sorry: {}.;that is not to be: {}.;"
              "it is not done: {}.", "sorry, it did not work: {}."),
    "chat": ("thank you, that is great.;how are you today?;i am so tired of work.;what a day it was.;"
             "you are a great help.;do you like music?;i love the sea.;it is raining again.;tell me something nice.;"
             "my dog is asleep.;i had too many meetings.;that was quick.;good morning to you.;work was so long today.",
             "you are so quick.;do you like the sea?;i had a long day.;it was a great morning."),
    "reply": ("you are welcome.;i am glad to hear that.;i am here to help.;that is nice.;tell me more.;i am well.;"
              "take a rest.;good to know.;that sounds nice.;any time.;have a good day.;i hear you.",
              "glad to help.;have a rest."),
}
SYLLABLES = [c + v for c in "klmrst" for v in "aio"]


def random_of(*key):
    return random.Random(repr(key))  # what is drawn depends on the key alone, in all arms and after a kill


def make_value(kind, rng):
    """A value out of an open vocabulary, so that it has to be copied."""
    if kind in ENUMS:
        return rng.choice(ENUMS[kind])
    if kind in NUMBERS:
        return rng.randint(*dict(amount=(10, 999), temperature=(10, 39), minutes=(10, 99)).get(kind, (2, 9)))
    if kind in ("city", "person"):
        return "".join(rng.choice(SYLLABLES) for _ in range(3)).capitalize()
    if kind == "date":
        return f"{rng.choice(MONTHS)} {rng.randint(1, 28)}"
    if kind == "time":
        return f"{rng.randint(7, 21)}:{rng.choice(['00', '15', '30', '45'])}"
    return rng.choice(TOPICS) if kind == "topic" else "#" + "".join(rng.choices("ABCDEFGHKX23456789", k=3))


def make_tool(thing, line):
    """What the simulator knows of a tool, with its document in OpenAI's form under "tool"."""
    head = thing.split()[-1] if thing else ""
    verb, params, results = re.fullmatch(r"(\w+): (.*) -> (.*)", line.replace("N", head)).groups()
    names, required = params.replace("?", "").split(), [p for p in params.split() if p[-1] != "?"]

    def schema(name):
        about = name.replace("_", " ") + f" of the {thing}" * bool(thing)
        shown = dict(type="integer" if KIND.get(name, name) in NUMBERS else "string", description=about)
        return shown | (dict(enum=ENUMS[name]) if name in ENUMS else {})

    function = dict(name=f"{thing} {verb}".strip().replace(" ", "_"), description=wanted(verb, thing), parameters=dict(
        type="object", properties={p: schema(p) for p in names}, required=required), results=dict(
        type="object", properties={r: schema(r) for r in results.split()}))
    kinds = {name: f"{thing} {name}" if head and name.startswith(head) else KIND.get(name, name)
             for name in names + results.split()}  # ids are of a thing
    return dict(tool=dict(type="function", function=function), verb=verb, thing=thing, required=required,
                params={p: kinds[p] for p in names}, results={r: kinds[r] for r in results.split()})


def wanted(verb, thing, form=0):
    """What a user wants from a tool, in words."""
    return VERBS[verb].split("|")[form].replace("N", thing).replace(" a island", " an island")


@functools.cache
def library(unseen=False):
    """{name: tool}. For each last word four things are in training; one is unseen, whose words training has apart."""
    tools = [] if unseen else [make_tool("", line) for line in SHAPES["any"]]
    for shape, heads in HEADS.items():
        for head in heads.split():
            firsts = random_of("first", head).sample(FIRST, 5)
            for first in firsts[4:] if unseen else firsts[:4]:
                tools += [make_tool(f"{first} {head}", line) for line in SHAPES[shape]]
    return {tool["tool"]["function"]["name"]: tool for tool in tools}


TOPICS = sorted(" ".join(HEADS.values()).split())  # what messages are about


# Tools of others: OpenAI, MCP and the Berkeley leaderboard (BFCL)
FOREIGN = dict(dict="object", float="number", tuple="array", any=None)  # types of BFCL; any: none is stated


def normal_schema(schema):
    """A JSON schema with OpenAI's names of types, at any depth; what may be null has "null" among its types."""
    if not isinstance(schema, dict):
        return schema
    kinds = schema.get("type") if isinstance(schema.get("type"), list) else [schema.get("type")]
    kinds = [FOREIGN.get(kind, kind) if isinstance(kind, str) else None for kind in kinds]
    kinds += ["null"] * (schema.get("nullable") is True and "null" not in kinds)
    out = schema | dict(type=None if None in kinds else kinds[0] if len(kinds) == 1 else kinds, nullable=None,
                        items=normal_schema(schema.get("items")))
    out["required"] = schema["required"] if isinstance(schema.get("required"), list) else None
    if isinstance(schema.get("anyOf"), list):
        out["anyOf"] = [normal_schema(part) for part in schema["anyOf"] + [dict(type="null")] * ("null" in kinds)]
    if isinstance(schema.get("properties"), dict):
        out["properties"] = {name: normal_schema(part) for name, part in schema["properties"].items()}
    return {key: part for key, part in out.items() if part is not None}


def normal_tool(raw, where):
    """A tool in OpenAI's form, its returns under "results"; and under "given_name" its name, if OpenAI forbids that."""
    f = raw.get("function", raw) if isinstance(raw, dict) else {}
    given = f.get("name") if isinstance(f, dict) else None
    if not isinstance(given, str) or not given.strip():
        fail(f"{where}: a tool needs a text \"name\"")
    schemas = [normal_schema(next((f[key] for key in keys.split() if f.get(key)), {})) for keys in (
        "parameters inputSchema", "results response outputSchema")]
    for part in schemas:
        properties = part.get("properties", {}) if isinstance(part, dict) else None
        if not isinstance(properties, dict) or not all(isinstance(p, dict) for p in properties.values()):
            fail(f"{where}: parameters and returns of {given!r} must be JSON schemas whose properties are objects")
        if unknown := set(map(str, part.get("required", ()))) - properties.keys():
            fail(f"{where}: {given!r} requires {', '.join(sorted(unknown))}, which is no property of it")
    name, odd = re.sub(r"[^a-zA-Z0-9_-]", "_", given), not given.isascii() or len(given) > 64
    name = f"{name[:55]}_{zlib.crc32(given.encode()):08x}" if odd else name  # different names stay different
    function = dict(name=name, description=str(f.get("description") or ""),
                    parameters=dict(type="object", properties={}) | schemas[0], results=schemas[1])
    return dict(type="function", function=function | (dict(given_name=given) if given != name else {}))


def name_of(tool):
    return tool["function"].get("given_name", tool["function"]["name"])


def read_json_lines(path):
    """[(where, value)] of a file of JSON, or of JSON lines."""
    where, rows = str(path), []
    try:
        text = path.read_text("utf-8")
        with contextlib.suppress(ValueError):
            return [(where, json.loads(text))]
        for n, line in enumerate(text.split("\n"), 1):
            where = f"{path} line {n}"
            rows += [(where, json.loads(line))] if line.strip() else []
        return rows
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{where}: no JSON or JSON lines: {error}")


def load_tools(path):
    """Tools of a file: a list, an MCP answer to tools/list, or lines with a tool or with BFCL's list of functions."""
    tools = []
    for where, value in read_json_lines(path):
        value = value.get("result", value) if isinstance(value, dict) else value
        lists = [value.get(key) for key in ("tools", "function")] if isinstance(value, dict) else [value]
        found = next((part for part in lists if isinstance(part, list)), [value])
        tools += [normal_tool(raw, f"{where}, tool {i}") for i, raw in enumerate(found, 1)]
    return tools or fail(f"{path}: holds no tool")


AST_FILES = [live + kind for live in ("", "live_") for kind in ("simple", "multiple", "parallel", "parallel_multiple")]


def bfcl_file(folder, name):
    """[(row, its possible answers)] of a file of the package bfcl-eval, which is not part of this repository."""
    name = "simple_python" if name == "simple" else name
    found = sorted(folder.rglob(f"BFCL_v4_{name}.json"), key=lambda path: "possible_answer" in path.parts)
    if len(found) != 2:
        fail(f"--data {folder}: no BFCL_v4_{name}.json with answers: `pip download bfcl-eval --no-deps`, and unzip it")
    rows, answers = ([row for _, row in read_json_lines(path)] for path in found)
    truth = {row["id"]: row["ground_truth"] for row in answers}
    return [(row, truth[row["id"]]) for row in rows]


def bfcl_tools(folder):
    """All documents of multi-turn functions, {file: tools}, and of the other tools the first of each name."""
    docs = {path.stem: load_tools(path) for path in sorted(folder.rglob("multi_turn_func_doc/*.json"))}
    names, others = {name_of(tool) for tools in docs.values() for tool in tools}, {}
    for row, _ in (item for name in AST_FILES for item in bfcl_file(folder, name)):
        for raw in row["function"]:
            others.setdefault(raw["name"], normal_tool(raw, f"BFCL {row['id']}"))
    return docs, [tool for name, tool in others.items() if name not in names]


# The student's tokens
FRAGMENTS = ['<tool_call>\n{"name": "', '", "arguments": {"', '", "arguments": {', '"}}\n</tool_call>',
             '}}\n</tool_call>', '<tool_response>\n{"', '"}\n</tool_response>', '}\n</tool_response>', "\n",
             '": "', '": ', '", "', ', "']
SIGNS, DIGITS, LETTERS = ".,?:_()#", "0123456789", "ABCDEFGHKX"
PIECE = re.compile("|".join(re.escape(f) for f in sorted(FRAGMENTS, key=len, reverse=True))
                   + r"|[A-Z][a-z](?:[a-z]{2})*|[a-z]+|[A-Z0-9.,?:_()#]")


class Words:
    """The student's tokens: words, syllables of names, digits, signs, pieces of JSON; a value is a few to copy."""

    def __init__(self):
        texts = [json.dumps(tool["tool"]) for tool in [*library().values(), *library(True).values()]]
        texts += [" ".join(bank) for bank in BANKS.values()] + [*VERBS, *VERBS.values(), *PREPOSITIONS.values()]
        texts += [*MONTHS, *sum(ENUMS.values(), []), *FIRST, *TOPICS, "an tools with using by error gone"]
        heads, tails = [s.capitalize() for s in SYLLABLES], ["~" + s for s in SYLLABLES]
        self.words = [*ROLES, "<end>", *FRAGMENTS, *SIGNS, *DIGITS, *LETTERS, *heads, *tails,
                      *sorted(set(re.findall("[a-z]+", " ".join(texts))))]
        self.index, self.stop = {word: i for i, word in enumerate(self.words)}, [len(ROLES)]

    @functools.lru_cache(2**12)
    def encode(self, text):
        """Ids; what has no token is left out, and control tokens have none here."""
        pieces = []
        for piece in PIECE.findall(text):
            name = piece[0].isupper() and len(piece) > 1
            pieces += [piece[:2], *("~" + piece[i : i + 2] for i in range(2, len(piece), 2))] if name else [piece]
        return [self.index[piece] for piece in pieces if self.index.get(piece, 0) > len(ROLES)]

    def chat(self, messages):
        """Ids of messages up to where the assistant's answer begins, as a checkpoint's tokenizer gives them."""
        turns = ([self.index[m["role"]], *self.encode(m["content"]), *self.stop] for m in messages)
        return [*itertools.chain.from_iterable(turns), self.index["assistant"]]

    def decode(self, ids):
        """The text: blanks stand between words, but not in a number, an id or a name."""
        text, last = "", ""
        for word in (self.words[i] for i in ids):
            code = len(word) == len(last) == 1 and word in DIGITS + LETTERS and last in DIGITS + LETTERS + "#:"
            glue = code or word in [*".,?:_()", *FRAGMENTS] or last in ["", "_", "(", *FRAGMENTS] or word[0] == "~"
            text, last = text + " " * (not glue) + word.lstrip("~"), word
        return text


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


class StudentLayer(Layer):
    """Keys are made of a token and the one before it, without which a model this small needs many times as many steps
    until it copies. The first token has itself before it: so it is also behind padding, of id 0 like itself."""

    def __init__(self, shape):
        super().__init__(shape)
        self.mix, self.first, self.last = nn.Parameter(torch.full((shape.n_embd,), 0.5)), None, None

    def qkv(self, x):
        start = self.last if x.shape[1] == 1 and self.last is not None else x[:, :1]  # one token: decoding goes on
        before = torch.cat([start, x[:, :-1]], 1)  # (B, L, d)
        if self.first is not None:  # (B, L, 1): where documents begin in packed lines
            before = torch.where(self.first, x, before)
        self.last = x[:, -1:].detach()
        return self.q_proj(x), self.k_proj(torch.lerp(x, before, self.mix)), self.v_proj(x)


def student_shape(cfg, tok):
    return read_shape(dict(model_type="llama", hidden_size=cfg.n_embd, intermediate_size=8 * cfg.n_embd // 3 // 8 * 8,
                           num_hidden_layers=cfg.n_layer, num_attention_heads=4, tie_word_embeddings=True,
                           vocab_size=len(tok.words)))


# ---------------------------------------------------------------- 4. Method (paper Sec. 2; else inferred, our choice)
# The graph of tools (Sec. 2.1)
def tool_texts(tools):
    """Texts "name: description" of all parameters and returns, the tool of each (K,), and which are returns (K,)."""
    rows = [(f"{name}: {p.get('description', '')}", i, part == "results")
            for i, tool in enumerate(tools) for part in ("parameters", "results")
            for name, p in tool["function"].get(part, {}).get("properties", {}).items()]
    texts, owner, returns = zip(*rows) if rows else ((), (), ())
    return list(texts), torch.tensor(owner, dtype=torch.long), torch.tensor(returns, dtype=torch.bool)


def hashed_ngrams(texts, size=1024):
    """Unit rows (K, size): character 3- and 4-grams of a text, hashed and weighted by rarity. Without --encoder this
    stands for Sentence-BERT; its cosines mean something else, so tau does too. (our choice)"""
    x = np.zeros((len(texts), size), np.float32)
    for row, text in zip(x, (f" {text.lower()} " for text in texts)):
        for i, n in itertools.product(range(len(text) - 2), (3, 4)):
            row[zlib.crc32(text[i : i + n].encode()) % size] += 1
    x *= np.log((1 + len(x)) / (1 + (x > 0).sum(0))) + 0.1
    return F.normalize(torch.from_numpy(x), dim=1)


def simgraph(x, owner, n, tau, returns, kernels=False, block=2048):
    """(n, n) bool: e_ij = 1 iff cos(p_i, p_j) > tau or cos(r_i, p_j) > tau or cos(p_i, r_j) > tau for a parameter p or
    return r of each, i != j; x (K, d) unit rows, owner (K,) the tool of a row, returns (K,) bool. (Sec. 2.1)"""
    if kernels:
        there = [part.to("cuda" if torch.cuda.is_available() else "cpu") for part in (x, owner, returns)]
        bits = load_kernel("simgraph")(*there[:2], n, tau, there[2]).cpu()  # (n, ceil(n / 32)) int32
        return (bits[:, :, None] >> torch.arange(32) & 1).bool().flatten(1)[:, :n]
    edges = torch.zeros(n, n, dtype=torch.bool)
    for i, j in itertools.combinations_with_replacement(range(0, len(x), block), 2):
        a, b = slice(i, i + block), slice(j, j + block)
        near = (x[a] @ x[b].T > tau) & ~(returns[a, None] & returns[b])  # (block, block); two returns make no edge
        s, t = near.nonzero().T
        edges[owner[a][s], owner[b][t]] = True
    return (edges | edges.T).fill_diagonal_(False)


def pair_scores(x, owner, n, returns):
    """(n, n) each: the best cosine of two parameters (PP), and of a return and a parameter, either way (PR)."""
    def best(rows):
        s, columns = x[rows] @ x[~returns].T, owner[~returns].expand(n, -1)
        s = torch.full((n, s.shape[1]), -1.0).scatter_reduce_(0, owner[rows, None].expand(-1, s.shape[1]), s, "amax")
        s = torch.full((n, n), -1.0).scatter_reduce_(1, columns, s, "amax")
        return torch.maximum(s, s.T).fill_diagonal_(-1)

    return best(~returns), best(returns)


def merge_tools(tools, embed):
    """Tools without near-duplicates, which would be neighbours and no complements, and how many those are: equal names
    but for case and signs, or all parameters (> 0.95) and the descriptions (> 0.9) alike. (our choice)"""
    named = {}
    for name, tool in ((name_of(tool), tool) for tool in tools):
        named.setdefault("".join(c for c in name.lower() if c.isalnum() or not c.isascii()) or name, tool)
    first, kept = list(named.values()), []
    texts, owner, _ = tool_texts([dict(function=dict(tool["function"], results={})) for tool in first])
    about = embed([tool["function"]["description"] for tool in first])  # (n, d)
    x, like = embed(texts) if texts else about[:0], about @ about.T > 0.9
    rows = x.split(owner.bincount(minlength=len(first)).tolist())  # a tool's texts stand together
    for i in range(len(first)):
        alike = (rows[i] @ rows[j].T > 0.95 for j in kept if like[i, j] and len(rows[i]) == len(rows[j]))
        if not any(near.any(0).all() and near.any(1).all() for near in alike):
            kept.append(i)
    return [first[i] for i in kept], len(tools) - len(kept)


def components(edges):
    """The component (n,) of each node of a graph (n, n) bool, named by its smallest node."""
    label, before = torch.arange(len(edges)), None
    while before is None or not torch.equal(label, before):
        before = label
        label = torch.where(edges, label, len(edges)).amin(1).minimum(label)
        label = label[label]
    return label


def walk(edges, n, rng, label=None):
    """n different nodes of a random walk along edges (Alg. 1). It starts only where n nodes can be reached, and raises
    if that is nowhere. label: components(edges), where they are known."""
    label = components(edges) if label is None else label
    starts = (label.bincount(minlength=len(edges))[label] >= n).nonzero()[:, 0].tolist()
    if not starts:
        raise ValueError(f"no component of the graph has {n} tools: lower --tau, or --n-tools")
    node = rng.choice(starts)  # Alg. 1 l.1
    found = [node]
    while len(found) < n:  # Alg. 1 l.3
        node = rng.choice(edges[node].nonzero()[:, 0].tolist())  # Alg. 1 l.2
        found += [node] * (node not in found)
    return found


def build_graph(cfg, tools, embed, degree=6):
    """Edges (n, n) of tools, and their components (n,). If tau is 0 it is one with `degree` neighbours on average."""
    texts, owner, returns = tool_texts(tools)
    x, tau, n = embed(texts), cfg.tau, len(tools)
    if not tau:
        best = torch.maximum(*pair_scores(x, owner, n, returns))[torch.ones(n, n, dtype=torch.bool).triu(1)]
        tau = float(best.sort(descending=True).values[min(len(best) - 1, round(degree * n / 2))])
    edges = simgraph(x, owner, n, tau, returns, cfg.kernels)
    near, label = edges.sum(1), components(edges)
    print(f"graph: {n} tools, {len(texts)} texts ({sum(text.endswith(': ') for text in texts)} without a description), "
          f"tau {tau:.3f}, {int(near.sum()) // 2} edges, {int((near == 0).sum())} isolated, mean degree "
          f"{near.float().mean():.1f}, largest components {sorted(label.bincount().tolist())[:-4:-1]}")
    return edges, label


def subset(cfg, edges, label, graph, i):
    """The tools of dialogue i: a walk, or equally many at random."""
    rng = random_of("subset", cfg.seed, i)
    n = rng.randint(int(cfg.n_tools[0]), int(cfg.n_tools[2]))
    return walk(edges, n, rng, label) if graph else rng.sample(range(len(edges)), n)


# Agents (Sec. 2.3): what a language model is asked, and how its reply is read. All replies are JSON, so that one that
# was cut off is noticed; a reply that cannot be read is asked for again, three times at most.
PLAN = """Plan a conversation in which a user asks an assistant for {n} things, one after another. The assistant has the
tools\n{tools}
Never name a tool: say what the user needs. Each request follows from those before it and uses what was said or found
there. Some requests need several tools, or several calls. Some are small talk that needs no tool.
Reply with a JSON list of {n} objects {{"type": "tool" or "chitchat", "request": "..."}} and nothing else."""
USER = """You play a user who talks to an assistant. {task}
The conversation so far:\n{history}
Reply with JSON and nothing else: {{"done": true or false, "type": "tool" or "chitchat", "message": "what you say"}}.
done: has the assistant finished your current request? If it asked you something it has not: answer it. Name no tool."""
WITH_PLAN = "Your requests, in this order:\n{plan}\nYou are at request {k}. If it is done, write the next one."
NO_PLAN = "The assistant has these tools:\n{tools}\nThink of your next request yourself."
ASSIST = """You are an assistant with these tools:\n{tools}
The conversation so far:\n{history}
Reply with JSON and nothing else: {{"calls": [{{"name": "...", "arguments": {{...}}}}, ...]}} to call tools, several at
once if you can, or {{"say": "..."}} to answer, or to ask the user for what a tool requires. Make up no arguments."""
TOOL = """You play this tool:\n{tool}
It was called with {arguments}. Reply with its result, a JSON object with the properties {results}, and nothing else."""


def record(**properties):
    """The JSON schema of an object with these properties, and perhaps more."""
    return dict(type="object", properties=properties, required=[*properties], additionalProperties=True)


TEXT = dict(type="string")


class Dropped(Exception):
    """A dialogue that cannot go on, and the rule that says why."""


def read_json(text, shape):
    """The JSON of a schema in a reply, fenced or not, else ValueError: a reply that was cut lacks its last bracket."""
    found = re.search(r"[\[{].*[\]}]", text or "", re.S)
    value = json.loads(found[0] if found else "")
    if not fits(value, shape):
        raise ValueError("JSON of another form")
    return value


def read_plan(text, n, names):
    """[{"type", "request"}]: n - 1 to n + 1 of them, one for a tool at least, none that names one. (our choice)"""
    shape = dict(type="array", items=record(type=dict(enum=["tool", "chitchat"]), request=TEXT))
    items = [{key: item[key] for key in ("type", "request")} for item in read_json(text, shape)]
    if abs(len(items) - n) > 1 or all(item["type"] != "tool" for item in items) or any(
            not item["request"].strip() or leaks(item["request"], names) for item in items):
        raise ValueError("no plan as asked for")
    return items


def read_reply(text):
    """What the assistant says, or its calls [(name, arguments, {})]; arguments may be JSON in a string."""
    value, calls = read_json(text, record()), []
    for call in value.get("calls") or ():
        arguments = json.loads(call["arguments"]) if isinstance(call["arguments"], str) else call["arguments"]
        calls.append((str(call["name"]), dict(arguments), {}))
    if not calls and not value["say"].strip():
        raise ValueError("neither a text nor a call")
    return None if calls else value["say"], calls


class Agents:
    """User, assistant and tools of one dialogue, played by a language model. Its methods are generators: they yield
    what is asked, (prompt, temperature, how often before), and are sent the reply. Only the user sees the plan."""

    def __init__(self, tools, most):
        self.docs, self.most = {tool["function"]["name"]: tool["function"] for tool in tools}, most
        self.shown = "\n".join(json.dumps(without_results(tool)["function"]) for tool in tools)

    def ask(self, rule, temperature, prompt, read=None, **properties):
        """What `read` makes of the reply, or a JSON object with these properties."""
        read = read or functools.partial(read_json, shape=record(**properties))
        for n in range(3):
            text = yield prompt, temperature, n
            with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
                return read(text)
        raise Dropped(rule)

    def plan(self):
        docs = "\n".join(map(json.dumps, self.docs.values()))  # with returns: the plan may build on them
        items = yield from self.ask("no plan", 1.0, PLAN.format(n=self.most, tools=docs),
                                    lambda text: read_plan(text, self.most, self.docs))
        self.most = len(items)
        return items

    def user(self, plan, k, messages):
        told = "\n".join(f"{i}. {item['request']}" for i, item in enumerate(plan or (), 1))
        task = WITH_PLAN.format(plan=told, k=k + 1) if plan else NO_PLAN.format(tools=self.shown)
        said = yield from self.ask("no message", 1.0, USER.format(task=task, history=history(messages)),
                                   done=dict(type="boolean"), message=TEXT)
        kind = "chitchat" if said.get("type") == "chitchat" else "tool"
        return dict(done=said["done"], message=said["message"], request=said["message"], type=kind)

    def assistant(self, messages):
        return self.ask("F1", 0.2, ASSIST.format(tools=self.shown, history=history(messages)), read_reply)

    def tool(self, name, arguments):
        doc = self.docs.get(name)
        if not doc:
            raise Dropped("F1")
        results = ", ".join(doc.get("results", {}).get("properties", {})) or "that fit its description"
        return self.ask("F3", 0.7, TOOL.format(tool=json.dumps(doc), arguments=json.dumps(arguments), results=results))


def history(messages):
    """The conversation in a prompt. Contents are JSON strings there, so that no text can pose as a turn."""
    rows = [(m["role"], [call["function"] for call in m.get("tool_calls", ())] or m["content"]) for m in messages]
    return "\n".join(f"{role}: {json.dumps(content)}" for role, content in rows) or "(nothing yet)"


def leaks(text, names):
    """Does a text name a tool? A name of one plain word is left out: one could hardly speak without it."""
    return any(name in text for name in names if re.search(r"[_.\d-]|[a-z][A-Z]", name))


MOST_TURNS, MOST_ROUNDS = 12, 5  # of the user, and of tools for one of these (our choice)


def converse(teacher, with_plan):
    """One dialogue (Sec. 2.3), as a generator in case its agents are. The assistant never sees the plan."""
    def wait(answer):
        return (yield from answer) if inspect.isgenerator(answer) else answer

    plan = (yield from wait(teacher.plan())) if with_plan else None
    items, messages, origins, about, k, ended = list(plan or ()), [], [], [], 0, False
    while len(about) < MOST_TURNS:
        said = yield from wait(teacher.user(plan, k, messages))
        k += bool(messages) and said["done"]
        ended = k >= teacher.most
        if ended:
            break
        items += [{key: said[key] for key in ("type", "request", "goals") if key in said}] if k == len(items) else []
        about.append(k)
        messages.append(dict(role="user", content=said["message"]))
        for _ in range(MOST_ROUNDS + 1):
            text, calls = yield from wait(teacher.assistant(messages))
            if not calls:
                messages.append(dict(role="assistant", content=text))
                break
            shown = [dict(id=f"call_{len(origins) + j}", type="function", function=dict(
                name=name, arguments=json.dumps(arguments))) for j, (name, arguments, _) in enumerate(calls)]
            messages.append(dict(role="assistant", content=None, tool_calls=shown))
            origins += [origin for _, _, origin in calls]
            for call, (name, arguments, _) in zip(shown, calls):
                result = yield from wait(teacher.tool(name, arguments))
                messages.append(dict(role="tool", tool_call_id=call["id"], content=json.dumps(result)))
    return dict(messages=messages, plan=items, about=about, origins=origins, ended=ended)


# The teacher of the made world
def linked(names):
    """Kinds, out of {name: kind}, that one refers back to."""
    return [kind for kind in names.values() if LINKED.fullmatch(kind)]


class Sim:
    """Planner, user, assistant and tools of dialogue i, in one engine for all arms, with the methods of Agents. What it
    draws depends on the seed, the dialogue, the request and the parameter, never on the arm. tools: names in world."""

    def __init__(self, seed, i, world, tools, held=False, most=0):
        self.world, self.tools, self.held, self.draw = world, tools, held, functools.partial(random_of, seed, held, i)
        self.said, self.returned = {}, {}  # kind: (value, name) of the latest
        self.goals, self.missing, self.gone, self.facts, self.results = [], {}, set(), {}, []
        self.k, self.most = -1, most or self.draw("turns").randint(3, 5)

    def phrase(self, rng, act, *fills):
        """A phrasing of an act; those behind the bar only if `held`, and then no others."""
        return rng.choice(BANKS[act][self.held].split(";")).format(*fills)

    def pick(self, k):
        """Tools of request k without a plan, each at random: one, or two in a fifth of the requests."""
        return self.draw("tools", k).sample(self.tools, min(len(self.tools), 1 + (self.draw("two", k).random() < 0.2)))

    def item(self, k, names):
        """Request k: a quarter of them, after the first, is chitchat."""
        chat = k > 0 and self.draw("chat", k).random() < 0.25
        wants = " and ".join(wanted(self.world[name]["verb"], self.world[name]["thing"]) for name in names)
        return dict(type="chitchat" if chat else "tool", request="" if chat else wants, goals=[] if chat else names)

    def plan(self):
        """Requests in an order in which arguments can come from what was returned or said before: greedily the tool of
        which most is known; what is returned counts two, what is said one, a use before one less. (our choice)"""
        items, known, used, order = [], {}, Counter(), self.draw("order").sample(self.tools, len(self.tools))

        def worth(name):
            tool = self.world[name]
            feeds = sum(kind in self.world[other]["params"].values() for other in order if other != name
                        for kind in linked(tool["results"]))
            return sum(known.get(tool["params"][p], 0) for p in tool["required"]) - used[name] + 0.1 * feeds

        for k in range(self.most):
            names = []
            for _ in self.pick(k):
                names.append(max((name for name in order if name not in names), key=worth))
            items.append(self.item(k, names))
            for name in items[-1]["goals"]:
                used[name] += 1
                known |= {kind: max(1, known.get(kind, 0)) for kind in linked(self.world[name]["params"])}
                known |= dict.fromkeys(linked(self.world[name]["results"]), 2)
        return items

    def argument(self, rng, tool, p, ahead):
        """(value, how the user says it, origin), None if it is left out. 7 times in 10 the user refers to what was
        returned, else 5 times in 10 to what was said; 6 % of what is required is forgotten. A value None is returned
        by the goal before, and looked up when the call is made."""
        kind, (keep, back, again, forget) = tool["params"][p], (rng.random() for _ in range(4))
        fresh, found = make_value(kind, rng), self.returned | ahead
        if p not in tool["required"] and keep < 0.6:
            return None
        if LINKED.fullmatch(kind) and kind in found and back < 0.7:
            return found[kind][0], self.phrase(rng, "returned", found[kind][1].replace("_", " ")), "return"
        if LINKED.fullmatch(kind) and kind in self.said and again < 0.5:
            value, name = self.said[kind]
            return value, self.phrase(rng, "said", name.replace("_", " ")), "earlier"
        forgotten = p in tool["required"] and forget < 0.06
        return fresh, "" if forgotten else str(fresh), "clarified" if forgotten else "current"

    def fill(self, k, place, name):
        """A goal, and how the user says it. place 1: the second of a request, which may need what the first returns."""
        tool, args, clauses = self.world[name], {}, []
        ahead = {kind: (None, r) for other, _ in self.goals for r, kind in self.world[other]["results"].items()}
        for p, kind in tool["params"].items():
            rng = self.draw("argument", k, place, p)
            chosen = self.argument(rng, tool, p, ahead)
            before = rng.choice(PREPOSITIONS.get(p, PREPOSITIONS.get(kind, "with|using|by")).split("|"))
            if chosen:
                value, said, origin = chosen
                args[p] = value, origin
                clauses += [f"{before} {said}"] * bool(said)
                self.missing |= {} if said else {p: (kind, value)}
        self.goals.append((name, args))
        self.draw("clauses", k, place).shuffle(clauses)
        return " ".join([wanted(tool["verb"], tool["thing"], self.draw("want", k, place).randrange(3)), *clauses])

    def user(self, plan, k, messages):
        """The next request, or what was missing in this one."""
        if self.missing:
            p, (kind, value) = self.missing.popitem()
            self.said[kind] = value, p
            return dict(done=False, message=self.phrase(self.draw("given", k, p), "given", value))
        self.k, self.step, self.results = self.k + 1, 0, []
        if self.k == self.most:
            return dict(done=True, message="")
        item = plan[self.k] if plan else self.item(self.k, self.pick(self.k))
        parts = [self.fill(self.k, place, name) for place, name in enumerate(item["goals"])]
        for name, args in self.goals:
            self.said |= {self.world[name]["params"][p]: (value, p) for p, (value, origin) in args.items()
                          if origin == "current"}
        rng = self.draw("user", self.k)
        text = f" {self.phrase(rng, 'and')} ".join(parts)
        return dict(item, done=True, message=self.phrase(rng, "ask" if parts else "chat", text))

    def assistant(self, messages):
        """Asks for what is missing, makes all calls of which the arguments are known, or says what was found."""
        rng, self.step = self.draw("assistant", self.k, self.step), self.step + 1
        if self.missing:
            return self.phrase(rng, "missing", list(self.missing)[-1].replace("_", " ")), []
        broken = any("error" in result for result in self.results)
        ready = [goal for j, goal in enumerate(self.goals) if j == 0 or all(v is not None for v, _ in goal[1].values())]
        if ready and not broken:
            self.goals = [goal for goal in self.goals if goal not in ready]
            return None, [(name, {p: self.returned[self.world[name]["params"][p]][0] if v is None else v
                                  for p, (v, _) in args.items()}, {p: origin for p, (_, origin) in args.items()})
                          for name, args in ready]
        self.goals = []
        facts = " and ".join(f"the {r.replace('_', ' ')} is {v}" for found in self.results for r, v in found.items())
        act = "sorry" if broken else "done" if self.results else "reply"
        return self.phrase(rng, act, "it is gone" if broken else facts), []

    def tool(self, name, arguments):
        """The result of a call, the same for the same call. Facts of a thing stay, and what is cancelled is gone."""
        tool, key, result = self.world[name], json.dumps(arguments, sort_keys=True), dict(error="it is gone")
        handle = next((value for value in arguments.values() if str(value)[0] == "#"), None)
        if handle not in self.gone:
            self.gone |= {handle} if tool["verb"] == "cancel" else set()
            result = {r: self.facts.get((handle, r)) or make_value(kind, self.draw("fact", name, key, r))
                      for r, kind in tool["results"].items()}
            self.returned |= {kind: (result[r], r) for r, kind in tool["results"].items() if LINKED.fullmatch(kind)}
            self.facts |= {(value, r): other for value in result.values() if str(value)[0] == "#"
                           for r, other in (arguments | result).items()}
        self.results.append(result)
        return result


# Rules (Sec. 2.3): the paper names the kinds of rule, the list is our choice
RULES = {"F1": "a call is no JSON, or not of these tools", "F2": "a call without a result, a result without a call",
         "F3": "a result is not as documented", "F4": "order of roles, an empty message, one said twice, no last word",
         "F5": "a request for a tool without a call, or chitchat with one", "F6": "requests are left",
         "F7": "an argument that nobody said", "F8": "the user names a tool", "F9": "near to an earlier dialogue",
         "F10": "too long"}
TYPES = dict(string=str, integer=int, number=(int, float), boolean=bool, array=list, object=dict, null=type(None))
NUMBER = re.compile(r"(?<!\w)(?<!\d\.)-?\d+(?:,\d{3})*(?:\.\d+)?")
NEXT = {"": ["user"], "user": ["assistant"], "assistant": ["user"], "calls": ["tool"], "tool": ["tool", "assistant"]}


def fits(value, shape):
    """Is a value of a JSON schema's types and of its enum, and are its parts?"""
    if not isinstance(shape, dict):
        return True
    beside = dict(additionalProperties=True) if "properties" in shape else {}  # its parts need not know all names
    if "anyOf" in shape and not any(fits(value, beside | part if isinstance(part, dict) else part)
                                    for part in shape["anyOf"]):
        return False
    kinds, known = shape.get("type"), shape.get("properties")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if value is None and "null" in kinds:
        return True
    right = any(isinstance(value, TYPES.get(kind, object)) and (kind not in ("integer", "number") or not isinstance(
        value, bool)) for kind in kinds) and value in shape.get("enum", [value])
    if isinstance(value, dict):
        right &= set(shape.get("required", ())) <= value.keys() and (known is None or all(
            fits(part, known.get(name)) and (name in known or bool(shape.get("additionalProperties")))
            for name, part in value.items()))
    return right and (not isinstance(value, list) or all(fits(part, shape.get("items")) for part in value))


def grounded(value, shape, seen):
    """F7: is it a default or in an enum, or in what the user said and tools returned? Or are all of its parts?"""
    shape = shape if isinstance(shape, dict) else {}
    if any(fits(value, part) and grounded(value, part, seen) for part in shape.get("anyOf", ())):
        return True
    if isinstance(value, bool) or value is None or value in shape.get("enum", ()) or value == shape.get("default"):
        return True
    if isinstance(value, dict):
        return all(grounded(v, shape.get("properties", {}).get(name), seen) for name, v in value.items())
    if isinstance(value, list):
        return all(grounded(v, shape.get("items"), seen) for v in value)
    if isinstance(value, (int, float)):  # 1000 and 1000.0 are "1,000"; 5 is in "5 pm", not in "5.25"
        return any(Decimal(n.replace(",", "")) == Decimal(str(value)) for n in NUMBER.findall(seen))
    return re.search(rf"(?<!\w){re.escape(str(value).lower())}(?!\w)", seen) is not None


def spoken(content):
    """Names and values of a tool's JSON, a line each, without JSON's escapes; a text that is no JSON as it is."""
    try:
        parts, lines = [json.loads(content)], []
    except (ValueError, RecursionError):
        return content
    while parts:
        part = parts.pop()
        if isinstance(part, (dict, list)):
            parts += [*part, *part.values()] if isinstance(part, dict) else part
        else:
            lines.append(str(part))
    return "\n".join(lines)


def call_breaks(call, docs, seen):
    """F1 and F7 of one call."""
    try:
        arguments, shape = json.loads(call["arguments"]), docs[call["name"]]["parameters"]
        return {"F1"} if not fits(arguments, shape) else set() if grounded(arguments, shape, seen) else {"F7"}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {"F1"}


def result_fits(content, doc):
    """F3: an object of documented returns, or of an error; a tool without documented returns may say anything."""
    with contextlib.suppress(ValueError, RecursionError):
        value, known = json.loads(content), doc.get("results", {}).get("properties", {})
        return isinstance(value, dict) and (not known or value.keys() <= known.keys() | {"error"})
    return False


def broken_rules(dialogue, tools, most_tokens=math.inf):
    """The rules that a dialogue breaks, F9 aside. Contents are data: they are compared, and never followed."""
    docs, checks = {tool["function"]["name"]: tool["function"] for tool in tools}, []  # (rule, is it broken?)
    seen, last, waiting, used, said = "", "", {}, [], []
    for m in dialogue["messages"]:
        calls, content, role = m.get("tool_calls", []), m["content"] or "", m["role"]
        checks += [("F1", role == "assistant" and "<tool_call>" in content), ("F2", len(waiting) and role != "tool"),
                   ("F4", role not in NEXT[last] or not (calls or content.strip()))]
        for call in calls:
            checks += [(rule, True) for rule in call_breaks(call["function"], docs, seen)]
            checks.append(("F2", call["id"] in waiting))
            waiting[call["id"]] = call["function"]["name"]
        if role == "tool":
            name = waiting.pop(m["tool_call_id"], None)
            checks += [("F2", name is None), ("F3", not result_fits(content, docs.get(name, {})))]
        if role == "user":
            said.append(content)
            used.append(0)
        used[-1:] = [n + len(calls) for n in used[-1:]]
        seen += "\n" + (spoken(content) if role == "tool" else content).lower() if role in ("user", "tool") else ""
        last = "calls" if calls else role
    called = {k for k, n in zip(dialogue["about"], used) if n}
    checks += [("F5", (item["type"] == "tool") != (k in called)) for k, item in enumerate(dialogue["plan"])
               if k in dialogue["about"]]
    checks += [("F2", len(waiting)), ("F4", last != "assistant" or len(set(said)) < len(said)),
               ("F6", not dialogue["ended"]), ("F8", any(leaks(text, docs) for text in said)),
               ("F10", dialogue["tokens"] > most_tokens)]
    return {rule for rule, broken in checks if broken}


def near(dialogue, earlier):
    """F9: is the Jaccard index of its 8-grams of words with a set of `earlier` above 0.7? If not it joins these."""
    words = " ".join(m["content"] or "" for m in dialogue["messages"] if m["role"] in ("user", "assistant")).split()
    grams = {tuple(words[i : i + 8]) for i in range(max(1, len(words) - 7))}
    found = any((n := len(grams & other)) > 0.7 * (len(grams) + len(other) - n) for other in earlier)
    earlier += [] if found else [grams]
    return found


# Formats
def without_results(tool):
    """A tool as OpenAI has it: returns are no part of that."""
    ours = "results", "given_name"
    return dict(type="function", function={k: v for k, v in tool["function"].items() if k not in ours})


def to_openai(dialogue, tools):
    """The row of a fine-tuning file: arguments are a JSON string, content is null beside calls."""
    return dict(messages=dialogue["messages"], tools=[without_results(tool) for tool in tools])


HERMES = ("You may call functions to help the user. Their signatures are within <tools></tools>:\n<tools>{}</tools>\n"
          "For each call reply with a JSON object with name and arguments within <tool_call></tool_call>.")


def escaped(value):
    """JSON in which nothing opens or closes a tag."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def to_hermes(row):
    """The same messages as text alone: the tools in a system message, calls and results in tags."""
    shown = [dict(role="system", content=HERMES.format(escaped(row["tools"])))]
    for m in row["messages"]:
        calls = [dict(name=call["function"]["name"], arguments=dict(json.loads(call["function"]["arguments"])))
                 for call in m.get("tool_calls") or ()]
        said = [m["content"]] if m.get("content") else []
        content = "\n".join([*said, *(f"<tool_call>\n{escaped(call)}\n</tool_call>" for call in calls)])
        if m["role"] == "tool":
            with contextlib.suppress(ValueError):  # a result of somebody else's file may be plain text
                content = json.loads(content)
            content = f"<tool_response>\n{escaped(content)}\n</tool_response>"
        shown.append(dict(role=m["role"], content=content))
    return dict(messages=shown)


def from_hermes(row):
    """The row of to_openai again; calls are numbered."""
    (before, after), (system, *shown), messages, n, waiting = HERMES.split("{}"), row["messages"], [], 0, []
    for m in shown:
        calls = read_hermes(m["content"]) if m["role"] == "assistant" else []
        if calls:
            waiting = [f"call_{n + j}" for j in range(len(calls))]
            n += len(calls)
            said = m["content"].partition("<tool_call>")[0].removesuffix("\n") or None
            messages.append(dict(role="assistant", content=said, tool_calls=[dict(id=i, type="function", function=dict(
                name=name, arguments=json.dumps(arguments))) for i, (name, arguments) in zip(waiting, calls)]))
        elif m["role"] == "tool":
            value = json.loads(m["content"].removeprefix("<tool_response>\n").removesuffix("\n</tool_response>"))
            messages.append(dict(role="tool", tool_call_id=waiting.pop(0), content=json.dumps(value)))
        else:
            messages.append(m)
    return dict(messages=messages, tools=json.loads(system["content"][len(before) : -len(after)]))


def read_hermes(text):
    """Calls [(name, arguments)] in a reply. Unreadable ones are left out; a name that is no text is "", no tool's."""
    calls = []
    for body in re.findall(r"<tool_call>\s*(.*?)\s*</tool_call>", text, re.S):
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            call = json.loads(body)
            calls.append((call["name"] if isinstance(call["name"], str) else "", dict(call["arguments"])))
    return calls


def shown(row, brief):
    """Messages of a row as text, as a model sees them; `brief`: of a tool only a line name(parameter, optional?)."""
    system, *rest = to_hermes(row)["messages"]
    if brief:
        system["content"] = "tools"
        for name, shape in ((tool["function"]["name"], tool["function"]["parameters"]) for tool in row["tools"]):
            words = (p + "?" * (p not in shape.get("required", ())) for p in shape.get("properties", ()))
            system["content"] += f"\n{name}({', '.join(words)})"
    if rest and rest[0]["role"] == "system":  # somebody else's file may have its own: the tools stand below it
        system["content"] = rest.pop(0)["content"] + ("\n" + system["content"]) * bool(row["tools"])
        return [system, *rest]
    return [system, *rest] if row["tools"] else rest


# Making the data
def finish(cfg, dialogue, tools, tok=None):
    """A dialogue with its length, in a tokenizer's tokens or characters / 4, and the rules that it breaks."""
    if not dialogue["messages"]:
        return dialogue
    row = to_openai(dialogue, tools)
    dialogue["tokens"] = len(encode_row(tok, row, True)[0]) if tok else len(json.dumps(to_hermes(row))) // 4
    return dialogue | dict(broken=sorted(broken_rules(dialogue, tools, cfg.seq_len), key=lambda rule: int(rule[1:])))


def make_dialogues(cfg, run, name, make, have, goal, tok=None):
    """Dialogues, kept or dropped, until have(rows) is `goal`: by parts, each a file, which a kill leaves whole or out.
    make(ids): those dialogues, each with its tools."""
    rows, earlier, log, folder = [], [], Log(run, name, goal), run.out / name
    folder.mkdir(exist_ok=True)
    while (path := folder / f"{len(rows):06}.jsonl").exists() or have(rows) < goal:
        if not path.exists():
            made = make(range(len(rows), len(rows) + cfg.part))
            write_lines(path, [finish(cfg, dialogue, tools, tok) for dialogue, tools in made])
        for _, row in read_json_lines(path):
            row["broken"] += ["F9"] if not row["broken"] and near(row, earlier) else []
            rows.append(row)
        log(have(rows))
        if len(rows) >= 50 * cfg.part and all(row["broken"] for row in rows):
            fail(f"nothing passes the rules, see \"broken\" in {folder}; F10 asks for a higher --seq-len")
        pause(run)
    write_lines(run.out / f"{name}.jsonl", rows)
    return rows


def sim_dialogues(cfg, run, arm, world, graph, tok):
    """Dialogues of an arm, until the kept ones have cfg.tokens tokens."""
    (walks, with_plan), names = ARMS[arm], list(world)

    def make(ids):
        for i in ids:
            picked = [names[j] for j in subset(cfg, *graph, walks, i)]
            made = last_value(converse(Sim(cfg.seed, i, world, picked), with_plan)) | dict(id=i, tools=picked)
            yield made, [world[name]["tool"] for name in picked]

    return make_dialogues(cfg, run, f"dialogues-{arm}", make, lambda rows: sum(
        row["tokens"] for row in rows if not row["broken"]), cfg.tokens, tok)


def last_value(generator):
    """What a generator returns that never waits."""
    try:
        next(generator)
    except StopIteration as end:
        return end.value


# ---------------------------------------------------------------- 5. Evaluation and claims
# Data (Sec. 2.4)
ORIGINS = "current", "earlier", "return", "clarified"  # an argument was said in this turn, before, returned, asked for


def entropy(words):
    """H = - sum p log2 p over the frequencies of words. (Sec. 2.4, the base is inferred)"""
    p = np.array([*Counter(words).values()]) / len(words)
    return float(-(p * np.log2(p)).sum())


def distinct(texts, n=3):
    """D-n: different n-grams over all n-grams of lists of words."""
    grams = [gram for words in texts for gram in zip(*(words[i:] for i in range(n)))]
    return len(set(grams)) / max(1, len(grams))


def coherence(rounds, embed):
    """SS: 100 times the mean cosine of a request and the round before it; rounds: lists of (request, response)."""
    pairs = [(" ".join(before), after[0]) for each in rounds for before, after in zip(each, each[1:])]
    a, b = (embed(list(side)) for side in (zip(*pairs) if pairs else [["none"]] * 2))
    return float(100 * (a * b).sum(1).mean())


def data_measures(dialogues, embed):
    """H, D-3 and SS of what user and assistant say (no JSON, no results), origins of arguments, questions back."""
    rounds = [[(m["content"], answer) for m, answer in zip(turns, answers)] for turns, answers in (
        ([m for m in d["messages"] if m["role"] == "user"],
         [m["content"] for m in d["messages"] if m["role"] == "assistant" and m["content"]]) for d in dialogues)]
    texts = [re.findall(r"[\w#:]+", text.lower()) for each in rounds for pair in each for text in pair]
    origins = Counter(origin for d in dialogues for call in d["origins"] for origin in call.values())
    counts = dict(calls=sum(len(d["origins"]) for d in dialogues), turns=sum(len(d["about"]) for d in dialogues))
    counts["asked back"] = counts["turns"] - sum(len(set(d["about"])) for d in dialogues)
    found = {"H": entropy(sum(texts, [])), "D-3": distinct(texts), "SS": coherence(rounds, embed)}
    found |= {name: count / len(dialogues) for name, count in counts.items()}
    return found | {name: origins[name] / max(1, origins.total()) for name in ORIGINS}


# Calls, by the rules of the Berkeley leaderboard's AST checker
AST_TYPES = dict(string=str, integer=int, float=float, number=float, boolean=bool, array=list, tuple=list, dict=dict,
                 object=dict, any=str)


def plain(value):
    """Strings without blanks and , . / - _ * ^, in lower case, with double quotes; other values as they are."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value


def same_type(value, kind, answers):
    """The documented type, or that of the first answer."""
    return type(value) is kind or type(value) is type(next((answer for answer in answers if answer != ""), kind))


def dict_matches(value, answers):
    """A dict against answers, dicts of lists; "" among the answers of a key: it may be left out."""
    return any(answer != "" and all(key in answer and plain(v) in map(plain, answer[key]) for key, v in value.items())
               and all(key in value or "" in answer[key] for key in answer) for answer in answers)


def value_matches(value, shape, answers):
    """Is an argument among the answers? An int is taken for a float. Where the answers are of another type than the
    documented one they name a variable, and are compared as they are."""
    kind = AST_TYPES[shape["type"]]
    inner = AST_TYPES[shape["items"]["type"]] if kind is list else None
    value = float(value) if kind is float and type(value) is int else value
    variable = any(type(answer) is not kind for answer in [a for a in answers if a != ""][:1])
    if not same_type(value, kind, answers) or inner and type(value) is kind and not any(
            not isinstance(a, list) or all(same_type(v, inner, a) for v in value) for a in answers):
        return False
    if variable or type(value) is not kind:
        return value in answers
    if kind is dict:
        return dict_matches(value, answers)
    if inner is dict:
        return any(len(value) == len(a) and all(dict_matches(v, [b]) for v, b in zip(value, a)) for a in answers)
    if kind is list:
        return list(map(plain, value)) in [list(map(plain, a)) for a in answers]
    return plain(value) in [plain(a) for a in answers if isinstance(a, str) == (kind is str)]


def call_matches(call, doc, answer):
    """call (name, arguments) against answer {name: {parameter: [values]}}; "" among these: it may be left out."""
    (name, allowed), = answer.items()
    known = doc["parameters"]["properties"]
    return (call[0] == name and all(p in call[1] for p in doc["parameters"].get("required", ()))
            and all(p in known and p in allowed and value_matches(v, known[p], allowed[p]) for p, v in call[1].items())
            and all(p in call[1] or "" in values for p, values in allowed.items()))


def ast_correct(calls, docs, answers):
    """As many calls as answers, and for each answer a call of its own, in any order; docs {name: function}."""
    left = list(calls)
    for answer in answers if len(calls) == len(answers) else ():
        match = next((call for call in left if call_matches(call, docs[next(iter(answer))], answer)), None)
        left = [call for call in left if call is not match]
    return len(calls) == len(answers) and not left


# Students
MARKS = [*ORIGINS, "calls right", "tools right", "calls in chitchat", "asks when it should", "should when it asks"]


def held_out(cfg):
    """Dialogues of unseen tools, in unseen frames of words, by a way of choosing tools that uses no graph: half have
    tools of two things, half random ones; of each half one in two follows a plan."""
    world, rows, i = library(True), [], -1
    things = sorted({tool["thing"] for tool in world.values()})
    while len(rows) < cfg.n_test:
        i += 1
        rng = random_of("held out", cfg.seed, i)
        some = rng.sample(things, 2)
        names = [name for name, tool in world.items() if i % 2 or tool["thing"] in some]
        picked = rng.sample(names, min(len(names), rng.randint(3, 6)))
        made = last_value(converse(Sim(cfg.seed, i, world, picked, True), i % 4 > 1))
        made |= dict(id=i, tools=picked, tokens=0)
        rows += [] if broken_rules(made, [world[name]["tool"] for name in picked]) else [made]
    return rows


def questions(dialogues, docs):
    """What an assistant is asked in held-out dialogues: all before each of its turns, and what is right there."""
    rows = []
    for d in dialogues:
        origins, turn = iter(d["origins"]), -1
        for i, m in enumerate(d["messages"]):
            turn += m["role"] == "user"
            if m["role"] == "assistant":
                calls = [(call["function"]["name"], json.loads(call["function"]["arguments"]), next(origins))
                         for call in m.get("tool_calls", ())]
                chat = d["plan"][d["about"][turn]]["type"] == "chitchat"
                rows.append(dict(id=d["id"], before=d["messages"][:i], calls=calls, tools=[docs[n] for n in d["tools"]],
                                 kind="chitchat" if chat else d["messages"][i - 1]["role"]))
    return rows


def marks(row, text):
    """{measure: [right, all]} of a reply: arguments by origin, whole messages, asking back, calls where none is due."""
    docs, calls, gold = {t["function"]["name"]: t["function"] for t in row["tools"]}, read_hermes(text), row["calls"]
    if row["kind"] == "chitchat":
        return {"calls in chitchat": [bool(calls), 1]}
    found, asks = {}, row["kind"] == "user" and not calls
    if row["kind"] == "user":  # a request: call, or ask for what is missing
        found = {"asks when it should": [asks and not gold, not gold], "should when it asks": [asks and not gold, asks]}
    if not gold:
        return found
    answers = [{name: {p: [v] for p, v in arguments.items()}} for name, arguments, _ in gold]
    found["calls right"] = [ast_correct(calls, docs, answers), 1]
    found["tools right"] = [sorted(name for name, _ in calls) == sorted(name for name, *_ in gold), 1]
    found |= {origin: [0, 0] for origin in ORIGINS}
    for name, arguments, origins in gold:
        said = max((a for n, a in calls if n == name), default={},
                   key=lambda a: sum(plain(a.get(p)) == plain(v) for p, v in arguments.items()))
        for p, v in arguments.items():
            found[origins[p]][0] += plain(said.get(p)) == plain(v)
            found[origins[p]][1] += 1
    return found


def tallies(rows, texts):
    """(dialogues, MARKS, 2): sums of marks over the turns of a dialogue."""
    place = {i: n for n, i in enumerate(dict.fromkeys(row["id"] for row in rows))}
    total = np.zeros((len(place), len(MARKS), 2))
    for row, text in zip(rows, texts):
        for name, pair in marks(row, text).items():
            total[place[row["id"]], MARKS.index(name)] += pair
    return total


def rates(total, weight):
    """(..., MARKS): shares from tallies (dialogues, MARKS, 2), dialogues weighted (..., dialogues)."""
    sums = np.tensordot(weight, total, (-1, 0))
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


# Fixed before the first evidence run: id, statistic, threshold, what would refute it. Tokens, updates, first weights
# and order of training are equal in all arms. current, earlier, return: right arguments of unseen tools by origin;
# earlier + return: the share of a dialogue's arguments that were said before or returned.
CLAIMS = [
    ("edges-compose", "composable pairs, among edges - among all", 0.0, "random pairs are as good"),
    ("earlier-turns", "earlier, both - neither", 0.0, "graph and plan do not teach to use what was said before"),
    ("earlier-returns", "return, both - neither", 0.0, "graph and plan do not teach to use what was returned"),
    ("current-not-lower", "current, both - neither", -0.02, "it is paid for with what is said in the same turn"),
    ("plan-links", "earlier + return, both - no-plan", 0.0, "a plan links no more of the arguments"),
    ("graph-links", "earlier + return, both - no-graph", 0.0, "the graph gives a planner no more to link"),
    ("graph-is-diverse", "D-3, both - no-graph", 0.0, "the graph makes texts no more diverse (paper: +0.147)"),
    ("graph-has-entropy", "H, both - no-graph", 0.0, "nor their words (paper: +0.54)"),
    ("plan-is-coherent", "SS, both - no-plan", 0.0, "a plan makes rounds no more alike (paper: +1.33)"),
    ("edges-are-used-together", "same task, edges at 0.82 - all pairs", 0.0, "edges are no sign of co-use"),
]
PARTS, T_975 = 10, 2.262  # equal parts of an arm's data; Student's quantile for 9 degrees of freedom


def resample(n, draws=2000):
    """Weights (draws, n) of bootstrap samples; the same for all arms, which makes differences paired."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws).astype(float)


def interval(draws, statistic):
    low, high = np.quantile(draws, [0.025, 0.975])
    return statistic, (min(low, statistic), max(high, statistic))


def gaps(parts, totals):
    """What the claims "WHAT, both - ARM" say of the arms that there are. Of students, from {arm: tallies}, with paired
    bootstrap intervals over dialogues; of data, from {arm: [measures of a part]}, with t-intervals over the parts."""
    found, forms = {}, {name: re.fullmatch(r"(.+), both - (.+)", formula) for name, formula, *_ in CLAIMS}
    for name, what, other in ((name, *form.groups()) for name, form in forms.items() if form):
        if what in MARKS and {"both", other} <= totals.keys():
            n, k = len(totals["both"]), MARKS.index(what)
            found[name] = interval(*(rates(totals["both"], weight)[..., k] - rates(totals[other], weight)[..., k]
                                     for weight in (resample(n), np.ones(n))))
        elif what not in MARKS and {"both", other} <= parts.keys():
            gap = [sum(a[w] - b[w] for w in what.split(" + ")) for a, b in zip(parts["both"], parts[other])]
            half = T_975 * np.std(gap, ddof=1) / math.sqrt(PARTS)
            found[name] = np.mean(gap), (np.mean(gap) - half, np.mean(gap) + half)
    return found


def edge_precision(edges, truth):
    """Share of true pairs among edges, among all pairs, and their difference with its bootstrap interval over tools."""
    def share(weight, which):
        hit, every = (((weight @ m) * weight).sum(-1) for m in (which * truth, which))
        return hit / np.maximum(every, 1)

    pair, one, draws = np.triu(np.ones(edges.shape), 1), np.ones(len(edges)), resample(len(edges))
    edges = pair * edges
    precision, base = share(one, edges), share(one, pair)
    return precision, base, interval(share(draws, edges) - share(draws, pair), precision - base)


def auc(score, truth):
    """Probability that a true pair scores above a false one; ties count one half."""
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    rank, n = (count.cumsum() - (count - 1) / 2)[inverse], truth.sum()
    return float((rank[truth].sum() - n * (n + 1) / 2) / (n * (len(truth) - n)))


# ---------------------------------------------------------------- 6. Training
def encode_row(tok, row, brief):
    """Ids of a row, as the chat template writes it, and which are learned: answers, and the ends of their turns."""
    ids, learned, messages = [], [], []
    for m in shown(row, brief):
        if m["role"] == "assistant":
            m = dict(m, content=m["content"].strip())  # else its first token could join the template's last
            before, body = tok.chat(messages), tok.encode(m["content"]) + tok.stop[:1]
            learned += [False] * (len(before) - len(ids)) + [True] * len(body)
            ids = before + body
        messages.append(m)
    return ids, learned


def prompt_ids(tok, tools, before, brief):
    """Ids of a conversation up to where the assistant begins."""
    return tok.chat(shown(dict(messages=before, tools=[*map(without_results, tools)]), brief))


def pack(rows, seq_len):
    """Rows (ids, learned) side by side in lines: ids, targets (-100: not learned), the document of a token (-1: none)
    and its place in it, all (N, seq_len). First fit among the last 32 lines; a longer row is left out."""
    lines, fills = [], dict(ids=0, target=-100, doc=-1, place=0)
    for ids, learned in (row for row in rows if len(row[0]) <= seq_len):
        line = next((line for line in lines[-32:] if len(line["ids"]) + len(ids) <= seq_len), None)
        if line is None:
            lines.append(line := {name: [] for name in fills})
        line["doc"] += [(line["doc"] or [-1])[-1] + 1] * len(ids)
        line["ids"] += ids
        line["place"] += range(len(ids))
        line["target"] += [token if counts else -100 for token, counts in zip(ids[1:], learned[1:])] + [-100]
    return {name: torch.tensor([line[name] + [fill] * (seq_len - len(line[name])) for line in lines], dtype=torch.long)
            .view(-1, seq_len) for name, fill in fills.items()}  # a target stands at the place of the token before it


def packed_states(model, ids, doc, place):
    """Outputs (B, L, d) of the last layer: a token sees those before it in its own document."""
    x, turn, L = model.embed_tokens(ids), model.turn(place), ids.shape[1]
    same = (doc[:, :, None] == doc[:, None]) & torch.ones(L, L, dtype=torch.bool, device=ids.device).tril()
    mask = torch.zeros(same.shape, dtype=x.dtype, device=x.device).masked_fill(~same, -math.inf)[:, None]
    for layer in model.layers:
        layer.first = place[..., None] == 0
        x = layer(x, turn, mask)
        layer.first = None
    return model.norm(x)


# --- block: logp ---
def token_logp(h, w, target, kernels=False):
    """log p (T,) of targets (T,), in fp32 at least, from outputs h (T, d) and the head's weight w (V, d)."""
    if kernels:
        return load_kernel("token_logp")(h, w.to(h.dtype), target)  # never (T, V)
    logits = F.linear(h, w)  # (T, V)
    return logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32)).gather(1, target[:, None])[:, 0]
# --- end block ---


def sft_loss(model, batch, kernels=False):
    """Sum of - log p over what is learned; no logits are made for other tokens."""
    h, live = packed_states(model, batch["ids"], batch["doc"], batch["place"]), batch["target"] >= 0
    return -token_logp(h[live], (model.lm_head or model.embed_tokens).weight, batch["target"][live], kernels).sum()


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


def merge_lora(model):
    """Add A and B to W."""
    for layer in model.layers:
        for name, part in list(layer.named_children()):
            if isinstance(part, Lora):
                part.linear.weight.data += 2 * part.b.data @ part.a.data
                setattr(layer, name, part.linear)
    return model


def train(cfg, run, state, job, model, data, steps):
    """Optimizer steps on packed lines, in an order that depends on the seed alone; a rank takes its share of a batch.
    Linear warm-up in a tenth of the steps, constant to the half, then linear to 0."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, cfg.lr, (0.9, 0.98), weight_decay=0.1, fused=True)
    step, n = 0, len(data["ids"])  # all n lines in a new random order, again and again
    orders = (random_of("order", cfg.seed, epoch).sample(range(n), n) for epoch in itertools.count())
    order = list(itertools.islice(itertools.chain.from_iterable(orders), steps * cfg.batch_size))
    if state.get("job") == job:
        step = state["step"]
        put_state(run, state, model, optimizer)
    loss_of = model.loss if run.world > 1 else functools.partial(sft_loss, model)
    log, began, seen, model = Log(run, job, steps, step), time.perf_counter(), 0, model.train()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min((step + 1) / (steps / 10 + 1), 1, 2 * (1 - step / steps))
        lines, total = order[step * cfg.batch_size :][: cfg.batch_size], torch.zeros((), device=run.device)
        count, mine = (data["target"][lines] >= 0).sum().to(run.device), lines[run.rank :: run.world]
        for i in range(0, len(mine), cfg.micro_batch):
            part = {name: x[mine[i : i + cfg.micro_batch]].to(run.device) for name, x in data.items()}
            with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
                loss = loss_of(part, cfg.kernels) / count  # a token counts as much in any micro-batch and rank
            (loss * run.world).backward()  # the mean over ranks is taken of gradients
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + len(lines) * cfg.seq_len
        if step == 1 or step % cfg.log_every == 0 or step == steps:
            if run.world > 1:
                dist.all_reduce(total)
            if not total.isfinite():
                fail(f"{job}: training diverged; lower --lr")
            speed = seen / (time.perf_counter() - began)
            log(step, loss=total.item(), gnorm=float(norm), lr=group["lr"], tokens_per_s=speed)
        if should_stop(run) or step % cfg.save_every == 0 and step < steps:
            remember(run, state, job=job, step=step, **get_state(run, model, optimizer))
        pause(run)
    return model.eval()


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


def remember(run, state, **job):
    """Save what is done, and the training in progress if there is one."""
    save_state(run, done=state["done"], seconds=time.perf_counter() - run.began, **job)


def write_formats(out, name, rows):
    """Rows of to_openai as two JSONL files."""
    for form, write in (("openai", dict), ("hermes", to_hermes)):
        write_lines(out / f"{form}{name}.jsonl", map(write, rows))


def write_lines(path, rows):
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


# --- block: kernel ---
@functools.cache
def load_kernel(name):
    """A Triton operation of kernels/; at its first call it compares itself with PyTorch on the real tensors."""
    try:
        return importlib.import_module("kernels").checked(name)
    except ImportError as error:
        fail(f"--kernels: {error}: the folder kernels/ must stand beside this file, and triton be installed")
# --- end block ---


def encoder_of(cfg, device):
    """embed(texts) -> unit rows on the CPU, and its name: a BERT-type checkpoint, or hashed n-grams."""
    if not cfg.encoder:
        return hashed_ngrams, "hashed n-grams"
    encoder, known = Encoder(fetch_model(cfg.encoder)).to(device).eval(), {}

    def embed(texts):
        new = sorted(set(texts) - known.keys(), key=lambda text: (len(text), text))
        for i in range(0, len(new), 64):  # those of like length together, none twice
            known.update(zip(new[i : i + 64], encoder.embed([text[:1500] for text in new[i : i + 64]]).cpu()))
        return torch.stack([known[text] for text in texts]) if texts else torch.zeros(0, 1)

    return embed, Path(cfg.encoder).name


def new_student(cfg, run, tok, weights=None):
    """A tiny decoder with first weights that depend on the seed alone, or those of a file."""
    torch.manual_seed(random_of("weights", cfg.seed).getrandbits(60))
    model = Decoder(student_shape(cfg, tok), StudentLayer)
    nn.init.normal_(model.embed_tokens.weight, 0, cfg.n_embd**-0.5)
    if weights:
        model.load_state_dict(load_file(weights))
    return model.to(run.device)


@contextlib.contextmanager
def one_line(what):
    """What is wrong with a user's file is one line."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
            SafetensorError) as error:
        fail(f"{what}: {repr(error)[:200]}")


def read_bfcl(folder, name, n=None):
    """bfcl_file, of n items, each with the tools of its question."""
    with one_line(f"--data {folder}: BFCL_v4_{name}.json and its answers do not fit"):
        items = bfcl_file(folder, name)[:n]
        return [(row, gold, row["question"][0], [normal_tool(raw, name) for raw in row["function"]])
                for row, gold in items]


def load_chat(folder):
    """A checkpoint's decoder in fp32 on the CPU, and its tokenizer with the ends of a turn, ChatML's or Llama-3's."""
    model, tok = load_real(folder), load_tokenizer(folder)
    ends = [tok.special[end] for end in ("<|eot_id|>", "<|im_end|>") if end in tok.special]
    tok.stop = ends + [tok.eos] * (tok.eos not in (None, *ends))  # the first is learned, the end of a turn
    return model, tok if ends else fail(f"{folder}: neither ChatML nor Llama-3 turns")


def save_real(folder, source, model):
    """A checkpoint's folder with other weights."""
    weights = {}
    for name, p in model.state_dict().items():
        name = re.sub(r"(\w_proj)", r"self_attn.\1", re.sub(r"(gate|up|down)_proj", r"mlp.\1_proj", name))
        weights[("" if name.startswith("lm_head") else "model.") + name] = p.contiguous().cpu()
    folder.mkdir(exist_ok=True)
    replace_file(folder / "model.safetensors", save(weights))
    for path in [source / "config.json", *source.glob("tokenizer*.json")]:
        replace_file(folder / path.name, path.read_bytes())


def shard(run, model):
    """Spread a network over the ranks: each holds a part of every layer, and gathers the rest when it is used."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    half = MixedPrecisionPolicy(run.dtype, torch.float32) if run.dtype != torch.float32 else MixedPrecisionPolicy()
    mesh = dist.device_mesh.init_device_mesh(run.device.type, (run.world,))
    for part in [*model.layers, model]:
        fully_shard(part, mesh=mesh, mp_policy=half)
    model.loss = functools.partial(sft_loss, model)
    register_fsdp_forward_method(model, "loss")
    return model


def get_state(run, model, optimizer=None):
    """Learned weights and the optimizer's state by their names, whole on rank 0's CPU where they are spread."""
    from torch.distributed.checkpoint import state_dict as whole

    options = whole.StateDictOptions(full_state_dict=run.world > 1, cpu_offload=run.world > 1,
                                     ignore_frozen_params=True)
    return dict(model=whole.get_model_state_dict(model, options=options),
                optimizer=optimizer and whole.get_optimizer_state_dict(model, optimizer, options=options))


def put_state(run, state, model, optimizer):
    from torch.distributed.checkpoint import state_dict as whole

    whole.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                         options=whole.StateDictOptions(full_state_dict=run.world > 1, strict=False))


def answer_all(model, tok, prompts, max_new, size=64, **sampling):
    """Replies to prompts (lists of ids), greedy unless `sampling` says otherwise, those of like length together."""
    order, texts = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    for i in range(0, len(order), size):
        some = order[i : i + size]
        texts |= zip(some, map(tok.decode, generate(model, [prompts[j] for j in some], max_new, tok.stop, **sampling)))
    return [texts[i] for i in range(len(prompts))]


class Local:
    """A checkpoint, asked like Chat. What it draws depends on what it is asked: what a kill cut is the same again."""

    def __init__(self, run, name):
        (model, self.tok), self.tokens = load_chat(fetch_model(name)), 0
        self.model = model.to(run.device, run.dtype).eval()

    def ask(self, jobs):
        """Texts of [(payload, index of the sample)], in order; those of one temperature side by side."""
        texts = {}
        for temperature in sorted({job["temperature"] for job, _ in jobs}):
            some = [i for i, (job, _) in enumerate(jobs) if job["temperature"] == temperature]
            prompts = [self.tok.chat(jobs[i][0]["messages"]) for i in some]
            g = torch.Generator(self.model.norm.weight.device)
            g.manual_seed(zlib.crc32(repr([jobs[i] for i in some]).encode()))
            new = answer_all(self.model, self.tok, prompts, jobs[some[0]][0]["max_tokens"], 16, temperature=temperature,
                             generator=g)
            self.tokens += sum(map(len, [*prompts, *map(self.tok.encode, new)]))
            texts |= zip(some, new)
        return [texts[i] for i in range(len(jobs))]


def read_training(path):
    """Rows of a fine-tuning file in OpenAI's format."""
    rows = []
    for where, row in read_json_lines(path):
        with one_line(f"{where}: not OpenAI's format (messages, contents or calls, arguments as JSON text)"):
            rows.append(dict(messages=row["messages"], tools=row.get("tools") or []))
            if not (all(m.get("tool_calls") or isinstance(m["content"], str) for m in row["messages"])
                    and all(m["role"] in ROLES for m in shown(rows[-1], False))):
                raise ValueError("a role or a content of another kind")
    return [row for row in rows if row["messages"]] or fail(f"--data {path}: no dialogue in it")


def ledger(cfg, run, tok, rows, asked):
    """Time a step and an answer of a student, and say how long all of them will take."""
    model, lines = new_student(cfg, run, tok), pack([encode_row(tok, row, True) for row in rows[:99]], cfg.seq_len)
    part = {name: x[: cfg.micro_batch].to(run.device) for name, x in lines.items()}
    step = min(timeit.repeat(lambda: sft_loss(model, part).backward(), number=1, repeat=3))
    step *= cfg.batch_size / len(part["ids"])
    answer = timeit.timeit(lambda: generate(model.eval(), [[0] * (cfg.seq_len // 2)] * 32, 30), number=1) / 32
    n = len(cfg.students.split(","))
    minutes = ((cfg.base_steps + n * cfg.steps) * step + (1 + n) * asked * answer) / 60
    print(f"students: {step:.2f} s a step, {asked} answers of {answer:.3f} s, about {minutes:.1f} minutes"
          + ", more than the 10 minutes of --scale small" * (cfg.scale == "small" and minutes > 10), flush=True)


def estimate(cfg):
    """Tokens of dialogues: a plan; for 4 requests user, call, result, answer of 60 tokens each; tools of 150."""
    asked = cfg.dialogues * 17
    read, written = asked * (4.5 * 150 + 8 * 60), asked * 60
    print(f"{cfg.dialogues:,} dialogues: about {asked:,} requests, {read:.1e} tokens read, {written:.1e} written, of "
          f"{cfg.budget:,} at most; {(read + 4 * written) / 1e6:,.2f} $ at 1 $ a million read, 4 $ written", flush=True)
    return round(read + written)


def dry_run(cfg):
    """What a run takes, without allocating a network or asking anybody."""
    if cfg.task in ("synth", "graph"):
        return print("nothing is trained") if cfg.task == "graph" else estimate(cfg)
    folder = fetch_model(cfg.model, offline=True) if cfg.model else None
    with one_line(f"--model {cfg.model}: no Llama or Qwen2 checkpoint"), torch.device("meta"):
        shape = read_shape(json.loads((folder / "config.json").read_text())) if folder else student_shape(cfg, Words())
        parameters = [*add_lora(Decoder(shape), cfg.lora_rank * (cfg.task == "sft")).parameters()]
    n, learned = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    if cfg.task == "bfcl":
        return print(f"{n:,} parameters | {4 * n / 2**30:.2f} GiB of weights; nothing is trained")
    n_students = len(re.findall("[^,]+", cfg.students))
    steps = cfg.steps if cfg.task == "sft" else n_students * cfg.steps + bool(n_students) * cfg.base_steps
    tokens = steps * cfg.batch_size * cfg.seq_len
    memory = (4 * n + 12 * learned + cfg.micro_batch * cfg.seq_len * 40 * shape.n_layer * shape.n_embd) / 2**30
    print(f"{n:,} parameters | {tokens:.1e} tokens, {6 * n * tokens:.1e} FLOPs | {memory:.2f} GiB, one device | "
          f"{6 * n * tokens / 7.2e13:.2f} hours on a core (20 GFLOP/s), {6 * n * tokens / 7.2e17:.4f} at 200 TFLOP/s")


def walkable(cfg, graph, arms):
    """The graph, if the longest walk of a dialogue is possible on it, or these arms have no walks."""
    enough = graph[1].bincount().max() >= int(cfg.n_tools[2]) or not any(ARMS[arm][0] for arm in arms)
    return graph if enough else fail(f"no component of the graph has {cfg.n_tools[2]} tools: lower --tau or --n-tools")


def show_graph(cfg, graph, names):
    """Draw components as rings, the largest first, and one walk."""
    from matplotlib.figure import Figure

    edges, label = graph
    found = walk(edges, min(6, int(label.bincount().max())), random_of("shown", cfg.seed), label)
    groups = sorted(((label == c).nonzero()[:, 0] for c in label.unique()), key=len, reverse=True)
    place, columns = np.full((len(edges), 2), np.nan), math.isqrt(sum(len(group) > 1 for group in groups)) or 1
    for c, group in enumerate(group for group in groups if len(group) > 1):
        angle = torch.arange(len(group)) * 2 * math.pi / len(group)
        ring = torch.stack([angle.cos(), angle.sin()], 1) * min(1.1, 0.3 + len(group) / 40)
        place[group] = ring + torch.tensor([c % columns, -(c // columns)]) * 2.4
    axes, pairs = Figure(figsize=(11, 11), layout="constrained").subplots(), edges.triu().nonzero().numpy()
    axes.plot(*place[pairs].transpose(2, 1, 0), color="0.75", lw=0.5)
    axes.plot(*place.T, ".", color="tab:blue")
    axes.plot(*place[found].T, "o-", color="tab:red")
    for i in found:
        axes.annotate(names[i], place[i], color="tab:red", parse_math=False)
    axes.set(title=f"{len(edges)} tools, {len(pairs)} edges; those without are left out; red: one walk")
    axes.set_axis_off()
    axes.figure.savefig(cfg.show_graph, dpi=110)


def print_table(metrics):
    """{"arm/measure": value} as a table: measures as rows, arms as columns."""
    arms, rows = (dict.fromkeys(key.split("/")[part] for key in metrics if key[:6] != "graph/") for part in (0, 1))
    wide = max(17, *map(len, arms)) + 1
    print(f"{'':22}" + "".join(f"{arm:>{wide}}" for arm in arms))
    for row in rows:
        cells = [metrics.get(f"{arm}/{row}") for arm in arms]
        print(f"{row:22}" + "".join(f"{'' if cell is None else f'{cell:.4g}':>{wide}}" for cell in cells))


# ---------------------------------------------------------------- 8. Main
def composes(world):
    """(n, n) bool: is a return of one tool of the kind of a parameter of the other? Known in the made world."""
    needs, gives = ([set(linked(tool[part])) for tool in world.values()] for part in ("params", "results"))
    one = np.array([[bool(g & n) for n in needs] for g in gives])
    return one | one.T


def run_students(cfg, run, state, data, world, tok):
    """A base that has learned single requests, in which one argument in a hundred is linked (to a return); from there a
    student for each arm's dialogues. {arm: tallies} on unseen tools."""
    docs, single = {name: tool["tool"] for name, tool in library(True).items()}, []
    for i in range(cfg.tokens // 100):
        rng = random_of("single", cfg.seed, i)
        picked = rng.sample(list(world), rng.randint(3, 6))
        made = last_value(converse(Sim(cfg.seed, ("single", i), world, picked, most=1), False))
        single.append(to_openai(made, [world[name]["tool"] for name in picked]))
    rows, totals, start = questions(held_out(cfg), docs), {}, None
    prompts = [prompt_ids(tok, row["tools"], row["before"], True) for row in rows]
    ledger(cfg, run, tok, single, len(prompts))
    for arm, lessons, steps in [("base", single, cfg.base_steps)] + [
            (arm, data[arm], cfg.steps) for arm in filter(None, cfg.students.split(","))]:
        if not (path := run.out / f"{arm}.safetensors").exists():
            lines = pack([encode_row(tok, row, True) for row in lessons], cfg.seq_len)
            replace_file(path, export(train(cfg, run, state, arm, new_student(cfg, run, tok, start), lines, steps)))
            remember(run, state)
        if arm not in state["done"]:
            texts = answer_all(new_student(cfg, run, tok, path).eval(), tok, prompts, cfg.max_new)
            write_lines(run.out / f"answers-{arm}.jsonl", (
                dict(id=row["id"], to=row["before"][-1]["content"], right=row["calls"], reply=text)
                for row, text in zip(rows, texts)))
            state["done"][arm] = tallies(rows, texts).tolist()
            remember(run, state)
        totals[arm], start = np.array(state["done"][arm]), start or path
    return totals


def run_world(cfg, run, state):
    """Graph, dialogues of all arms, what they are like, and what students learn from them."""
    (embed, name), tok, arms = encoder_of(cfg, run.device), Words(), cfg.arms.split(",")
    tools, merged = merge_tools([tool["tool"] for tool in library().values()], embed)
    world = {tool["function"]["name"]: library()[tool["function"]["name"]] for tool in tools}
    graph, metrics, parts, data = walkable(cfg, build_graph(cfg, tools, embed), arms), {}, {}, {}
    metrics["graph/precision"], metrics["graph/base rate"], gain = edge_precision(graph[0].numpy(), composes(world))
    print(f"{merged} tools merged; {metrics['graph/precision']:.1%} of edges compose, "
          f"{metrics['graph/base rate']:.1%} of all pairs ({name})")
    if cfg.show_graph:
        show_graph(cfg, graph, list(world))
    for arm in arms:
        rows, kept, total = sim_dialogues(cfg, run, arm, world, graph, tok), [], 0
        for row in rows:  # arms are compared at as many tokens
            total += 0 if row["broken"] else row["tokens"]
            kept += [row] if not row["broken"] and total <= cfg.tokens else []
        if len(kept) < PARTS:
            fail(f"--tokens {cfg.tokens}: {len(kept)} dialogues of {arm} are too few to compare, {PARTS} are needed")
        cuts = np.linspace(0, len(kept), PARTS + 1).astype(int)
        parts[arm] = [data_measures(kept[a:b], embed) for a, b in zip(cuts, cuts[1:])]
        broken = Counter(rule for row in rows for rule in row["broken"])
        measures = data_measures(kept, embed) | dict(dialogues=len(kept)) | {
            "kept of 100": 100 * sum(not row["broken"] for row in rows) / len(rows)} | {r: broken[r] for r in RULES}
        metrics |= {f"{arm}/{key}": value for key, value in measures.items()}
        data[arm] = [to_openai(row, [world[n]["tool"] for n in row["tools"]]) for row in kept]
        write_formats(run.out, f"-{arm}", data[arm])
    print_table(metrics)
    totals = run_students(cfg, run, state, data, world, tok) if cfg.students else {}
    shares = {f"student {arm}/{mark}": share for arm, total in totals.items()
              for mark, share in zip(MARKS, rates(total, np.ones(len(total))).tolist())}
    learned = shares.get("student neither/current", 0.0) >= 0.5
    if totals:
        print("unseen tools, by students; training and test come from one simulator, which is a limit of this design")
        print_table(shares)
        if not learned:
            print("not compared: the student of neither is missing or has hardly learned to call; raise --steps")
    found = {"edges-compose": gain} | gaps(parts, totals if learned else {})
    return found, metrics | shares, dict(encoder=name, merged=merged)


API = dict(GorillaFileSystem="gorilla_file_system", MathAPI="math_api", MessageAPI="message_api",
           TwitterAPI="posting_api", TicketAPI="ticket_api", TradingBot="trading_bot", TravelAPI="travel_booking",
           VehicleControlAPI="vehicle_control")  # class of BFCL's multi-turn tasks: file of its documents


def used_together(folder, where):
    """{relation: pairs (i, j), i < j} of tools in BFCL's gold trajectories; where {(file, name): tool}."""
    pairs = {"same task": set(), "same turn": set(), "consecutive calls": set()}
    for row, gold in bfcl_file(folder, "multi_turn_base"):
        known = {name: i for (file, name), i in where.items() if file in map(API.get, row["involved_classes"])}
        turns = [[known[re.match(r"\w+", call)[0]] for call in turn] for turn in gold]
        flat = sum(turns, [])
        for relation, groups in zip(pairs, ([flat], turns, zip(flat, flat[1:]))):
            pairs[relation] |= {pair for group in groups for pair in itertools.combinations(sorted({*group}), 2)}
    return pairs


def co_use(cfg, docs, embed, pp, pr):
    """E1: are pairs with an edge used together? Beside it the similarity of descriptions, which is not in the paper."""
    metrics, apis, tools = {}, [file for file, tools in docs.items() for _ in tools], sum(docs.values(), [])
    where = {(file, name_of(tool)): i for i, (file, tool) in enumerate(zip(apis, tools))}
    with one_line(f"--data {cfg.data}: BFCL_v4_multi_turn_base.json and its answers do not fit"):
        pairs = used_together(Path(cfg.data), where)
    used = sorted({i for pair in pairs["same task"] for i in pair})
    about = embed([f"{name_of(tools[i])}: {tools[i]['function']['description']}" for i in used])
    pp, pr, upper = pp[used][:, used].numpy(), pr[used][:, used].numpy(), np.triu_indices(len(used), 1)
    inside = np.array([[apis[i] == apis[j] for j in used] for i in used])[upper]
    scores = dict(PP=pp, PR=pr, edge=np.maximum(pp, pr), description=(about @ about.T).numpy())
    truths = {relation: np.array([[(min(i, j), max(i, j)) in some for j in used] for i in used])
              for relation, some in pairs.items()}
    for (relation, truth), (part, mask) in itertools.product(truths.items(), [
            ("", inside | True), (", one API", inside)]):
        row = {f"AUC {key}": auc(score[upper][mask], truth[upper][mask]) for key, score in scores.items()}
        row |= {"base rate": truth[upper][mask].mean()} | {
            f"precision {tau}": truth[upper][mask & (scores["edge"][upper] > tau)].mean() for tau in (0.82, 0.7, 0.6)}
        metrics |= {f"{relation}{part}/{key}": float(value) for key, value in row.items()}
    print_table(metrics)
    return {"edges-are-used-together": edge_precision(scores["edge"] > 0.82, truths["same task"])[2]}, metrics


def run_graph(cfg, run, state):
    """The graph of the Berkeley data's tools, or of --tools, by threshold; and E1."""
    embed, name = encoder_of(cfg, run.device)
    with one_line(f"--data {cfg.data} --tools {cfg.tools}: not files of tools"):
        docs, others = bfcl_tools(Path(cfg.data)) if cfg.data else ({}, [])
        tools = sum(docs.values(), []) + others or (
            load_tools(Path(cfg.tools)) if cfg.tools else [tool["tool"] for tool in library().values()])
    if len(tools) < 2:
        fail(f"--tools {cfg.tools}: one tool makes no graph")
    texts, owner, returns = tool_texts(tools)
    x, metrics = embed(texts), {}
    pp, pr = pair_scores(x, owner, len(tools), returns)
    print(f"{len(tools)} tools, {int((~returns).sum())} parameters, {int(returns.sum())} returns, {len(set(texts))} "
          f"different texts ({name}); {merge_tools(tools, embed)[1]} near-duplicates")
    for tau in (0.6, 0.7, 0.75, 0.82, 0.9):
        edges = simgraph(x, owner, len(tools), tau, returns, cfg.kernels)
        sizes = components(edges).bincount()
        row = dict(PP=(pp > tau).sum() // 2, PR=(pr > tau).sum() // 2, all=edges.sum() // 2,
                   components=(sizes > 0).sum(), largest=sizes.max(), isolated=(edges.sum(1) == 0).sum(),
                   degree=edges.sum(1).float().mean())
        metrics |= {f"tau {tau}/{key}": float(value) for key, value in row.items()}
    print_table(metrics)
    if cfg.show_graph:
        show_graph(cfg, build_graph(cfg, tools, embed), [*map(name_of, tools)])
    found, more = co_use(cfg, docs, embed, pp, pr) if docs else ({}, {})
    return found, metrics | more, dict(encoder=name)


def converse_all(cfg, tools, graph, chats, ids, over):
    """Dialogues `ids`, each with its tools, by language models. What they wait for is asked at once, until over()."""
    (walks, with_plan), done, live, jobs = ARMS[cfg.arms.split(",")[0]], {}, {}, {}
    for i in ids:
        picked, rng = subset(cfg, *graph, walks, i), random_of("teacher", cfg.seed, i)
        done[i] = dict(id=i, tools=picked, model=rng.choice(list(chats)), messages=[], broken=["over budget"])
        live[i] = converse(Agents([tools[j] for j in picked], rng.randint(3, 5)), with_plan)
    replies = dict.fromkeys(live)
    while not over() and live:
        for i, talk in list(live.items()):
            try:
                prompt, temperature, n = talk.send(replies[i])
                asked = dict(messages=[dict(role="user", content=prompt)], temperature=temperature)
                jobs[i] = asked | dict(max_tokens=cfg.max_new), 3 * i + n  # in another dialogue it is another sample
            except (StopIteration, Dropped) as end:
                done[i] |= end.value if isinstance(end, StopIteration) else dict(broken=[str(end)])
                del live[i]
        for name, chat in chats.items():
            mine = [i for i in live if done[i]["model"] == name]
            replies |= zip(mine, chat.ask([jobs[i] for i in mine]))
    return [(d, [tools[j] for j in d["tools"]]) for d in done.values()]


def run_synth(cfg, run, state):
    """Dialogues for --tools by language models, by parts. An endpoint's replies are kept: nothing is asked twice."""
    (embed, name), before = encoder_of(cfg, run.device), state["done"].get("tokens", 0)
    with one_line(f"--tools {cfg.tools}: not a file of tools"):
        tools = load_tools(Path(cfg.tools))
    tools, merged = merge_tools(tools, embed)
    if len(tools) < max(2, int(cfg.n_tools[2])):
        fail(f"--tools {cfg.tools}: {len(tools)} tools, --n-tools {cfg.n_tools} takes more of them into a dialogue")
    graph = walkable(cfg, build_graph(cfg, tools, embed), cfg.arms.split(",")[:1])
    (folder := run.out / "replies").mkdir(exist_ok=True)
    chats = {model: Chat(cfg.teacher, model, folder, cfg.workers) for model in cfg.model.split(",")} \
        if "://" in cfg.teacher else {folder: Local(run, folder) for folder in cfg.teacher.split(",")}

    def spent():  # remembered at each round of requests, so that a kill forgets one at most
        state["done"]["tokens"] = before + sum(chat.tokens for chat in chats.values())
        remember(run, state)
        return state["done"]["tokens"]

    def make(ids):
        ids = range(ids.start, min(ids.stop, cfg.dialogues))
        made = converse_all(cfg, tools, graph, chats, ids, lambda: spent() > cfg.budget)
        broken = [finish(cfg, *pair)["broken"] for pair in made]
        tqdm.write(f"dialogues {ids.start} to {ids.stop - 1}: {broken.count([])} kept, dropped by rule: "
                   f"{dict(Counter(sum(broken, [])))}; {spent():,} of {cfg.budget:,} tokens spent")
        return made

    rows = make_dialogues(cfg, run, "dialogues", make, lambda rows: len(
        rows) if spent() <= cfg.budget else cfg.dialogues, cfg.dialogues)
    kept = [to_openai(row, [tools[j] for j in row["tools"]]) for row in rows if not row["broken"]]
    write_formats(run.out, "", kept)
    broken = Counter(rule for row in rows for rule in row["broken"])
    metrics = dict(made=len(rows), kept=len(kept), tokens=spent()) | broken
    print(f"{len(kept)} of {len(rows)} dialogues kept, {merged} tools merged; dropped by rule: {dict(broken)}")
    if spent() > cfg.budget and any(folder.iterdir()):
        print(f"--budget is spent: with {folder} copied into another --out the same command goes on from these replies")
    return {}, {f"dialogues/{key}": value for key, value in metrics.items()}, dict(encoder=name)


def run_sft(cfg, run, state):
    """Fine-tune --model on --data, all weights or LoRA, on all ranks of torchrun, to a folder that --model takes."""
    rows = read_training(Path(cfg.data))
    if not run.rank:
        fetch_model(cfg.model)
    if run.world > 1:  # the others find it
        dist.barrier()
    folder = fetch_model(cfg.model)
    model, tok = load_chat(folder)
    data = pack([encode_row(tok, row, False) for row in rows], cfg.seq_len)
    if not len(data["ids"]):
        fail(f"--seq-len {cfg.seq_len}: every dialogue is longer")
    share = float((data["target"] >= 0).sum() / (data["doc"] >= 0).sum())
    used = int((data["place"][data["doc"] >= 0] == 0).sum())
    if not share:
        fail(f"--data {cfg.data}: the assistant says nothing that could be learned")
    if not run.rank:
        print(f"{used} dialogues in {len(data['ids'])} lines of {cfg.seq_len} tokens, {share:.0%} of them learned; "
              f"{len(rows) - used} longer ones are left out, see --seq-len")
    torch.manual_seed(random_of("lora", cfg.seed).getrandbits(60))
    model = add_lora(model, cfg.lora_rank)
    model = train(cfg, run, state, "sft", shard(run, model) if run.world > 1 else model.to(run.device), data, cfg.steps)
    learned = get_state(run, model)["model"] if run.world > 1 else {}  # all ranks take part, rank 0 alone has it
    if not run.rank and learned:
        model = add_lora(load_real(folder), cfg.lora_rank)
        model.load_state_dict(learned, strict=False)
    if not run.rank:
        save_real(run.out / "model", folder, merge_lora(model))
        print(f"wrote {run.out / 'model'}")
    return {}, {"sft/dialogues": used, "sft/left out": len(rows) - used, "sft/learned": share}, {}


def run_bfcl(cfg, run, state):
    """Calls of --model on the Berkeley data's Python categories, by the AST rules; a category is done at once."""
    model, tok = load_chat(fetch_model(cfg.model))
    for category in (name for name in AST_FILES if name not in state["done"]):
        items = read_bfcl(Path(cfg.data), category, cfg.n_test)
        prompts = [prompt_ids(tok, tools, question, False) for _, _, question, tools in items]
        texts, rows = answer_all(model.to(run.device).eval(), tok, prompts, cfg.max_new, 8), []
        for (item, gold, _, tools), text in zip(items, texts):
            back = {tool["function"]["name"]: name_of(tool) for tool in tools}
            calls = [(back.get(name, name), arguments) for name, arguments in read_hermes(text)]
            whole = len(calls) == text.count("<tool_call>")  # one that cannot be read spoils the reply
            right = whole and ast_correct(calls, {f["name"]: f for f in item["function"]}, gold)
            rows.append(dict(id=item["id"], reply=text, right=right))
        write_lines(run.out / f"answers-{category}.jsonl", rows)
        state["done"][category] = float(np.mean([row["right"] for row in rows]))
        remember(run, state)
        pause(run)
    metrics = {f"bfcl/{category}": state["done"][category] for category in AST_FILES}
    print_table(metrics)
    return {}, metrics, {}


def data_hash(cfg):
    """Of the files that were read, or of the made world."""
    paths = [Path(path) for path in (cfg.data, cfg.tools) if path]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.json*")))]
    world = json.dumps([library(), library(True), SHAPES, BANKS], default=str).encode()
    return hashlib.sha256(b"".join(file.read_bytes() for file in files) if files else world).hexdigest()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = cli(Config, SCALES, argv)
    if cfg.dry_run:
        return dry_run(cfg)
    if cfg.kernels and not torch.cuda.is_available():
        fail("--kernels needs a CUDA device; without the flag the same run takes plain PyTorch")
    for name in ("data", "tools"):
        if (path := getattr(cfg, name)) and not Path(path).exists():
            fail(f"--{name} {path}: no such file or folder")
    if cfg.task == "synth" and (tokens := estimate(cfg)) > cfg.budget:
        fail(f"--budget {cfg.budget:,}: about {tokens:,} tokens are needed; raise it, or lower --dialogues")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and (cfg.task != "sft" or cfg.batch_size % world or cfg.kernels):
        fail(f"torchrun: for --task sft without --kernels, and --batch-size must be a multiple of {world}")
    run = start_run(cfg, "toolflow")
    state = load_state(run) or dict(done={}, seconds=0.0)
    run.began = time.perf_counter() - state["seconds"]
    if world > 1:
        dist.barrier()  # until all have looked into the directory
    if not (run.out / "state.pt").exists():
        remember(run, state)  # from here on the directory belongs to these flags
    go = dict(world=run_world, graph=run_graph, synth=run_synth, sft=run_sft, bfcl=run_bfcl)[cfg.task]
    found, metrics, record = go(cfg, run, state)
    tried = {arm: TRIED for arm in cfg.students.split(",") if arm and cfg.task == "world"}
    minutes = (time.perf_counter() - run.began) / 60
    record |= dict(tried=tried, data_sha256=data_hash(cfg), metrics=metrics, minutes=minutes)
    return None if run.rank else report(cfg, run, "toolflow", argv, found, CLAIMS, **record)


if __name__ == "__main__":
    from_shell(main)
