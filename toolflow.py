# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "tiktoken", "safetensors", "tqdm", "matplotlib", "requests"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""toolflow.py: ToolFlow: Boosting LLM Tool-Calling Through Natural and Coherent Dialogue Synthesis
Wang, Zeng, Liu, Li, Wang, Shang, Jiang, Liu, Wong, NAACL 2025, arXiv 2410.18447

Tools whose parameters and returns mean the same are joined in a graph. A dialogue is about tools along a walk on it, and
follows a plan, so that requests build on what was said and returned before. A student trained on such dialogues shall use
the history better than one trained on as many tokens about random tools without a plan.

DOCSTRING_COMMANDS
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
import unicodedata
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
    task: str = "world"  # world|graph|synth|sft|bfcl: all of it in a made world; a graph of real tools; dialogues for your tools; fine-tune --model on --data; score --model on BFCL
    scale: str = "small"  # smoke|small|long|paper: a row of SCALES below; explicit flags win over it
    arms: str = "both,no-plan,no-graph,neither"  # comma list out of ARMS below; task synth takes one
    students: str = "neither,both"  # arms whose dialogues a student is trained on; "" = none
    tag: str = "main"  # name of this variant in the RESULT record
    seed: int = 0  # dialogues, first weights, order of training
    data: str = ""  # graph and bfcl: folder of the unzipped package bfcl-eval; sft: JSONL in OpenAI's format
    tools: str = ""  # synth, graph: file of tools (OpenAI, BFCL, or an MCP answer to tools/list); "" = the made world
    # graph
    encoder: str = ""  # folder or hub id of all-MiniLM-L6-v2 or another BERT-type encoder; "" = hashed n-grams
    tau: float = 0.0  # cosine above which two tools are joined (paper: 0.82, of its encoder); 0 = by --degree
    degree: float = 6.0  # mean number of neighbours that tau is chosen for
    walk: str = "pure"  # pure|last-added: may the walk move onto a tool it has
    n_tools: str = "3-6"  # fewest-most tools of a dialogue (not stated in the paper)
    show_graph: str = ""  # file .svg or .png to draw the graph and one walk to
    # teacher
    teacher: str = "sim"  # sim, an endpoint https://host/v1, or the folder of a checkpoint
    model: str = ""  # endpoint: names a,b,c of which one is drawn for each dialogue; sft, bfcl: folder or hub id
    dialogues: int = 8000  # synth: how many, kept or not (paper: 8000)
    turns: str = "3-5"  # fewest-most requests of a dialogue (the paper's example has 5)
    budget: int = 10_000_000  # synth: tokens of an endpoint after which nothing more is asked
    workers: int = 8  # requests at a time
    replies: str = ""  # folder of an endpoint's replies, none of which is paid for twice; "" = OUT/replies
    part: int = 100  # dialogues that are made, and written to the file, at a time
    # data and students
    tokens: int = 300_000  # kept tokens of each arm (paper: 8M)
    n_test: int = 200  # held-out dialogues; bfcl: items of each category
    n_layer: int = 3  # layers of a student
    n_head: int = 4  # its attention heads
    n_embd: int = 96  # its width
    steps: int = 600  # optimizer steps, of all students alike
    batch_size: int = 4  # packed lines of a step (not stated in the paper)
    micro_batch: int = 4  # lines that are in memory at once
    seq_len: int = 512  # tokens of a line, and most of a dialogue
    lr: float = 4e-3  # peak learning rate (not stated in the paper)
    weight_decay: float = 0.1  # of matrices
    lora_rank: int = 0  # sft: rank of LoRA in all linear layers; 0 = all weights are learned
    max_new: int = 80  # most tokens of an answer
    # machine and running
    device: str = "auto"  # auto|cpu|cuda|mps: auto is cuda if there is one, else cpu
    dtype: str = "auto"  # auto|float32|bfloat16: auto is bfloat16 on cuda, else float32
    kernels: bool = False  # Triton kernels simgraph, token_logp (cuda only; compared with PyTorch at first use)
    log_every: int = 20  # steps between two lines of log.jsonl
    save_every: int = 200  # steps between two checkpoints
    out: str = ""  # output directory; "" = out/toolflow/TASK-SCALE-sSEED
    resume: bool = False  # continue an interrupted run: the same command with this flag
    dry_run: bool = False  # print parameters, tokens, cost and hours, and stop

    def __post_init__(self):
        arms, students = self.arms.split(","), [arm for arm in self.students.split(",") if arm]
        if not set(arms) <= ARMS.keys() or len(set(arms)) < len(arms):
            fail(f"--arms {self.arms}: a comma list out of {', '.join(ARMS)}")
        if self.task == "world" and (not set(students) <= set(arms) or len(set(students)) < len(students)):
            fail(f"--students {self.students}: a comma list out of --arms {self.arms}, or nothing")
        for name, value in vars(self).items():
            low, high = LEAST.get(name, 1), dict(tau=1).get(name, math.inf)
            if not isinstance(value, (str, bool)) and not (low <= value <= high and value < math.inf):
                fail(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
        for name in ("n_tools", "turns"):
            low, dash, high = getattr(self, name).partition("-")
            if not (dash and low.isdigit() and high.isdigit() and 1 <= int(low) <= int(high) <= 12):
                fail(f"--{name.replace('_', '-')} {getattr(self, name)}: must look like 3-6, from 1 to 12")
        if self.n_embd % (2 * self.n_head):
            fail(f"--n-embd {self.n_embd}: must be a multiple of twice --n-head {self.n_head}")
        if self.walk not in ("pure", "last-added"):
            fail(f"--walk {self.walk}: pure or last-added")
        if self.show_graph and not re.search(r"\.(svg|png)$", self.show_graph):
            fail(f"--show-graph {self.show_graph}: must end in .svg or .png")
        self.check_task(arms)

    def check_task(self, arms):
        need = dict(synth=("tools", "teacher"), sft=("data", "model"), bfcl=("data", "model")).get(self.task, ())
        if missing := [name for name in need if not getattr(self, name)]:
            fail(f"--task {self.task}: needs {' and '.join('--' + name for name in missing)}")
        if self.task == "synth" and (self.teacher == "sim" or len(arms) > 1):
            fail("--task synth: one arm (--arms both), and --teacher https://host/v1 or a folder; sim knows its own tools")
        if self.task == "synth" and re.match("https?://", self.teacher) and not self.model:
            fail("--task synth: --model a,b,c names the models of the endpoint")


LEAST = dict(seed=0, tau=0, lora_rank=0, weight_decay=0, lr=1e-9, degree=0.1)
ARMS = {  # (is the subset a walk on the graph, is there a plan)
    "both": (True, True), "no-plan": (True, False), "no-graph": (False, True), "neither": (False, False)}
SCALES = {  # "scale" and "scale:task"; explicit flags win
    "smoke": dict(tokens=4000, n_test=6, n_layer=1, n_embd=32, steps=6, seq_len=640, part=20, log_every=2, save_every=3,
                  dialogues=4, max_new=12),
    "small": {}, "small:synth": dict(arms="both"),
    "long": dict(tokens=1_000_000, steps=2500, n_embd=128, n_test=500),
    "paper": dict(tokens=8_000_000, tau=0.82, steps=375, batch_size=64, micro_batch=1, seq_len=8192, lr=1e-5,
                  weight_decay=0.0, max_new=512, arms="both", students="", workers=32),
}
TRIED = 4  # settings of the students that were looked at, on seed 7 and alike for all arms
ROLES = "system", "user", "assistant", "tool"

# ---------------------------------------------------------------- 2. Data
# The world of the teacher `sim`. Tools are about things; parameters and returns are of kinds, and what is of one kind
# composes. The graph and the student see names and descriptions only.
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
VERBS = {  # verb: names of tools; what a user wants to do, the last only in dialogues of the held-out split
    "find": ("find search lookup", "find a N|look for a N|search for a N|get me a N"),
    "reserve": ("reserve book", "reserve the N|book the N|make a booking of the N|hold the N"),
    "cancel": ("cancel drop", "cancel my N|call off the N|stop my N|drop the N"),
    "describe": ("describe inspect", "tell me about the N|describe the N|check the N|look at the N"),
    "review": ("review rate", "review the N|rate the N|leave stars about the N|give the N stars"),
    "order": ("order purchase", "order the N|have the N sent|purchase the N|send me the N"),
    "track": ("track trace", "track my N|trace the N|see where my N is|follow my N"),
    "appoint": ("appoint schedule", "see a N|make a visit to the N|schedule a N|meet a N"),
    "move": ("move shift", "move my N visit|shift the N visit|put off the N visit|change the N visit"),
    "buy": ("buy get", "buy seats at the N|get seats at the N|take seats at the N|find seats at the N"),
    "write": ("write create", "write a N|create a N|make a new N|set up a N"),
    "send": ("send forward", "send the N|forward the N|pass on the N|give the N away"),
    "settle": ("settle pay", "settle the N|pay the N|pay off the N|take care of the N"),
    "weather": ("weather", "know the weather|hear about the weather|check the weather|see the weather"),
    "convert": ("convert", "convert money|change money|see what money is worth|get money"),
    "remind": ("remind", "set up a reminder|be told in time|create a reminder|have a reminder"),
    "message": ("message", "send a message|write a message|leave a message|get a message out"),
    "transfer": ("transfer", "transfer money|send money|move money|pass on money"),
    "route": ("route", "find a way|know the way|plan a way|see the way"),
}
KIND = dict(origin="city", destination="city", delivery_date="date") | dict.fromkeys(
    "price total refund budget balance".split(), "amount")  # of a parameter or return, where it is not its name
ENUMS = dict(colour=["red", "blue", "green", "black"], currency=["dollar", "pound", "franc", "yen"])
NUMBERS = "amount guests seats stars count temperature minutes points".split()  # kinds that are integers
LINKED = re.compile(r"city|date|time|person|amount|\w+_(id|booking|ticket|order|visit)")  # kinds one refers back to
PREPOSITIONS = dict(city="in|near|around", origin="from", destination="to", date="on|for", time="at", person="with|for",
                    amount="of|worth", budget="under|below", topic="about", colour="in", currency="to|into")
MONTHS = "january february march april may june july august september october november december".split()
BANKS = {  # act: phrasings; behind the bar those of the held-out split alone. {} is what is wanted, found or missing
    "ask": ("please {}.;can you {}?;i want to {}.;i need to {}.;could you {}?;i would like to {}.;help me {}.;now {}.;"
            "let us {}.;go ahead and {}.;my plan is to {}.;it is time to {}.;we should {}.",
            "would you {}?;i have to {}.;you can now {}.;time to {}, please."),
    "said": ("the same {};the same {} as before;the {} i told you;the {} from before;my {} from before;the {} i gave;"
             "the {} i said;the same {} again;the {} we had;the {} i gave before;once more the {};the {} of before",
             "the {} i told you before;again the same {}"),
    "returned": ("that {};this {};the {} you found;the {} you told me;the {} you gave me;your {};the {} from your answer;"
                 "the {} you said;the {} you just found;the new {};the {} i got;the {} you got", "the {} you just gave me;that new {}"),
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
    "sorry": ("sorry, {}.;that did not work: {}.;i could not do it: {}.;no luck: {}.;it is not to be: {}.;sad news: {}.;"
              "not done: {}.;there is bad news: {}.;it did not work: {}.;i am sorry: {}.;that is not to be: {}.;"
              "it is not done: {}.", "sorry, it did not work: {}."),
    "chat": ("thank you, that is great.;how are you today?;i am so tired of work.;what a day it was.;"
             "you are a great help.;do you like music?;i love the sea.;it is raining here again.;tell me something nice.;"
             "my dog is asleep.;i had too many meetings.;that was quick.;good morning to you.;work was so long today.",
             "you are so quick.;do you like the sea?;i had a long day.;it was a great morning."),
    "reply": ("you are welcome.;i am glad to hear that.;i am here to help.;that is nice.;tell me more.;i am well.;"
              "take a rest.;good to know.;that sounds nice.;any time.;have a good day.;i hear you.",
              "glad to help.;have a rest."),
}
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def random_of(*key):
    return random.Random(repr(key))  # what is drawn depends on the key alone, in all arms and after a kill


def kind_of(name):
    return KIND.get(name, name)


def make_value(kind, rng):
    """A value out of an open vocabulary, so that it has to be copied."""
    if kind in ENUMS:
        return rng.choice(ENUMS[kind])
    if kind in NUMBERS:
        return rng.randint(*dict(amount=(10, 999), temperature=(10, 39), minutes=(10, 99)).get(kind, (2, 9)))
    if kind in ("city", "person"):
        return "".join(rng.choice(SYLLABLES) for _ in range(2)).capitalize()
    if kind == "date":
        return f"{rng.choice(MONTHS)} {rng.randint(1, 28)}"
    if kind == "time":
        return f"{rng.randint(7, 21)}:{rng.choice(['00', '15', '30', '45'])}"
    return rng.choice(TOPICS) if kind == "topic" else "#" + "".join(rng.choices("ABCDEFGHKX23456789", k=3))


def schema(name, noun):
    """JSON schema of a parameter or return."""
    words, whose = name.replace("_", " "), f" of the {noun}" if noun else ""
    shown = dict(type="integer" if kind_of(name) in NUMBERS else "string", description=words + whose)
    return shown | (dict(enum=ENUMS[name]) if name in ENUMS else {})


def make_tool(thing, line):
    """What the simulator knows of a tool, with its document in OpenAI's form under "tool"."""
    verb, params, results = re.fullmatch(r"(\w+): (.*) -> (.*)", line.replace("N", thing.replace(" ", "_"))).groups()
    names, required = params.replace("?", "").split(), [p for p in params.split() if p[-1] != "?"]
    which = random_of("name", thing, verb).choice(VERBS[verb][0].split())
    function = dict(name=f"{which} {thing}".strip().replace(" ", "_"), description=wanted(verb, thing), parameters=dict(
        type="object", properties={p: schema(p, thing) for p in names}, required=required), results=dict(
        type="object", properties={r: schema(r, thing) for r in results.split()}))
    return dict(tool=dict(type="function", function=function), verb=verb, thing=thing, required=required,
                params={p: kind_of(p) for p in names}, results={r: kind_of(r) for r in results.split()})


def wanted(verb, thing, form=0):
    """What a user wants from a tool, in words."""
    text = VERBS[verb][1].split("|")[form].replace("N", thing)
    return text.replace(" a island", " an island")


@functools.cache
def library(unseen=False):
    """{name: tool of the world}. For each last word four things are in training, and one is unseen; the words of an
    unseen thing are in training apart."""
    tools = [] if unseen else [make_tool("", line) for line in SHAPES["any"]]
    for shape, heads in HEADS.items():
        for head in heads.split():
            firsts = random_of("first", head).sample(FIRST, 5)
            for first in firsts[4:] if unseen else firsts[:4]:
                tools += [make_tool(f"{first} {head}", line) for line in SHAPES[shape]]
    return {tool["tool"]["function"]["name"]: tool for tool in tools}


TOPICS = sorted(" ".join(HEADS.values()).split())  # what messages are about

# Tools of others: OpenAI, MCP and the Berkeley leaderboard (BFCL)
FOREIGN = dict(dict="object", float="number", tuple="array", list="array", any=None)  # types of BFCL


def normal_schema(schema):
    """A JSON schema with OpenAI's names of types, at any depth."""
    if not isinstance(schema, dict):
        return schema
    out = {key: {name: normal_schema(value) for name, value in part.items()} if key == "properties" and isinstance(
        part, dict) else normal_schema(part) if key == "items" else part for key, part in schema.items()}
    if isinstance(out.get("type"), str) and (kind := out["type"].lower()) in FOREIGN:
        out["type"] = FOREIGN[kind]
    return {key: part for key, part in out.items() if part is not None}


def normal_tool(raw, where):
    """One tool in OpenAI's form, with its returns under "results" and, where it had to change, its "given_name"."""
    f = raw.get("function", raw) if isinstance(raw, dict) else {}
    name = f.get("name") if isinstance(f, dict) else None
    if not isinstance(name, str) or not name.strip():
        fail(f"{where}: a tool needs a text \"name\"")
    parameters, results = (normal_schema(next((f[key] for key in keys if f.get(key)), {})) for keys in (
        ("parameters", "inputSchema", "input_schema"), ("results", "response", "outputSchema")))
    for key, part in (("parameters", parameters), ("results", results)):
        properties = part.get("properties", {}) if isinstance(part, dict) else None
        if not isinstance(properties, dict) or not all(isinstance(p, dict) for p in properties.values()):
            fail(f"{where}: {key} of {name!r} must be a JSON schema whose properties are objects")
        if unknown := set(part.get("required", ())) - properties.keys():
            fail(f"{where}: {key} of {name!r} require {', '.join(sorted(map(str, unknown)))}, which is no property")
    function = dict(name=re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:64], description=str(f.get("description") or ""),
                    parameters=dict(type="object", properties={}) | parameters, results=results)
    return dict(type="function", function=function | (dict(given_name=name) if function["name"] != name else {}))


def read_json_lines(path):
    """[(where, value)] of a file of JSON, or of JSON lines."""
    try:
        text = path.read_text("utf-8")
        with contextlib.suppress(ValueError):
            return [(str(path), json.loads(text))]
        rows = []
        for n, line in enumerate(text.splitlines(), 1):
            rows += [(f"{path} line {n}", json.loads(line))] if line.strip() else []
        return rows
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path}{f' line {n}' if 'n' in locals() else ''}: no JSON or JSON lines: {error}")


def load_tools(path):
    """Tools of a file: a list, an MCP answer to tools/list, BFCL's documents or questions, one tool a line."""
    tools = []
    for where, value in read_json_lines(path):
        value = value.get("result", value) if isinstance(value, dict) else value
        if isinstance(value, dict):
            value = value["tools"] if "tools" in value else value["function"] if isinstance(
                value.get("function"), list) else [value]
        if not isinstance(value, list):
            fail(f"{where}: must be a tool, or a list of tools")
        tools += [normal_tool(raw, f"{where}, tool {i}") for i, raw in enumerate(value, 1)]
    return tools or fail(f"{path}: holds no tool")


AST_FILES = "simple_python multiple parallel parallel_multiple live_simple live_multiple live_parallel " \
            "live_parallel_multiple".split()


def bfcl_file(folder, name):
    """Rows of a file of the package bfcl-eval, which is not part of this repository."""
    found = sorted(folder.rglob(f"BFCL_v4_{name}.json"), key=lambda p: len(p.parts))
    inner = [p for p in found if "possible_answer" in p.parts], [p for p in found if "possible_answer" not in p.parts]
    if not (inner[0] and inner[1]):
        fail(f"--data {folder}: has no BFCL_v4_{name}.json: fetch with `pip download bfcl-eval --no-deps` and unzip it")
    answers = {row["id"]: row["ground_truth"] for _, row in read_json_lines(inner[0][0])}
    return [(row, answers.get(row["id"])) for _, row in read_json_lines(inner[1][0])]


def bfcl_tools(folder):
    """All documents of multi-turn functions, {file: tools}, and of the other tools the first of each name."""
    docs = {path.stem: load_tools(path) for path in sorted(folder.rglob("multi_turn_func_doc/*.json"))}
    names = {name_of(tool) for tools in docs.values() for tool in tools}
    others = {}
    for name in AST_FILES:
        for row, _ in bfcl_file(folder, name):
            for raw in row["function"]:
                tool = normal_tool(raw, f"BFCL_v4_{name} {row['id']}")
                others.setdefault(name_of(tool), tool)
    return docs, [tool for name, tool in others.items() if name not in names]


def name_of(tool):
    """The name that a tool's document gave."""
    return tool["function"].get("given_name", tool["function"]["name"])

# The student's tokens
FRAGMENTS = ['<tool_call>\n{"name": "', '", "arguments": {"', '", "arguments": {', '"}}\n</tool_call>', '}}\n</tool_call>',
             '<tool_response>\n{"', '"}\n</tool_response>', '}\n</tool_response>', "\n", '": "', '": ', '", "', ', "']
SIGNS, DIGITS, LETTERS = ".,?:_()#", "0123456789", "ABCDEFGHKX"
PIECE = re.compile("|".join(re.escape(f) for f in sorted(FRAGMENTS, key=len, reverse=True))
                   + r"|[A-Z][a-z](?:[a-z]{2})*|[a-z]+|[A-Z0-9.,?:_()#]")


class Words:
    """The student's tokenizer. A word, a syllable of a name, a digit, a sign, a piece of JSON is one token, so that any
    value is copied in a few."""

    def __init__(self):
        texts = [json.dumps(tool["tool"]) for tool in [*library().values(), *library(True).values()]]
        texts += [" ".join(bank) for bank in BANKS.values()] + [forms for _, forms in VERBS.values()]
        texts += [*PREPOSITIONS.values(), *MONTHS, *sum(ENUMS.values(), []), *FIRST, *TOPICS, "an tools with using by gone"]
        words = sorted(set(re.findall("[a-z]+", " ".join(texts))))
        heads, tails = [s.capitalize() for s in SYLLABLES], ["~" + s for s in SYLLABLES]
        self.words = [*ROLES, "<end>", *FRAGMENTS, *SIGNS, *DIGITS, *LETTERS, *heads, *tails, *words]
        self.index = {word: i for i, word in enumerate(self.words)}
        self.head, self.stop, self.between = {role: [i] for i, role in enumerate(ROLES)}, [len(ROLES)], []

    def encode(self, text):
        """Ids; what has no token is left out, and control tokens have none here."""
        pieces = []
        for piece in PIECE.findall(text):
            name = piece[0].isupper() and len(piece) > 1
            pieces += [piece[:2], *("~" + piece[i : i + 2] for i in range(2, len(piece), 2))] if name else [piece]
        return [self.index[piece] for piece in pieces if self.index.get(piece, 0) > len(ROLES)]

    def decode(self, ids):
        """The text: blanks stand between words, but not in a number, an id or a name."""
        text, last = "", ""
        for word in (self.words[i] for i in ids):
            code = DIGITS + LETTERS + "#"
            glue = (word[0] == "~" or word in FRAGMENTS or last in ("", "_", "(", *FRAGMENTS)
                    or len(word) == 1 and (word in SIGNS.replace("#", "") or word in code and last and last in code + ":"))
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

def student_shape(cfg, tok):
    return read_shape(dict(model_type="llama", hidden_size=cfg.n_embd, intermediate_size=8 * cfg.n_embd // 3 // 8 * 8,
                           num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head, tie_word_embeddings=True,
                           vocab_size=len(tok.words)))

# ---------------------------------------------------------------- 4. Method (paper Sec. 2; else inferred, our choice)
# The tool graph (Sec. 2.1)
def tool_texts(tools):
    """Texts "name: description" of all parameters and returns, the tool of each (K,), and which are returns (K,)."""
    rows = [(f"{name}: {p.get('description', '')}", i, part == "results")
            for i, tool in enumerate(tools) for part in ("parameters", "results")
            for name, p in tool["function"].get(part, {}).get("properties", {}).items()]
    texts, owner, returns = map(list, zip(*rows)) if rows else ([], [], [])
    return texts, torch.tensor(owner, dtype=torch.long), torch.tensor(returns, dtype=torch.bool)


def hashed_ngrams(texts, size=1024):
    """Unit rows (K, size): character 3- and 4-grams of a text, hashed and weighted by their rarity. Without --encoder
    this stands for Sentence-BERT; its cosines mean something else, so tau does too. (our choice)"""
    x = np.zeros((len(texts), size), np.float32)
    for row, text in zip(x, texts):
        text = f" {text.lower()} "
        for i, n in itertools.product(range(len(text) - 2), (3, 4)):
            row[zlib.crc32(text[i : i + n].encode()) % size] += 1
    x *= np.log((1 + len(x)) / (1 + (x > 0).sum(0))) + 0.1
    return F.normalize(torch.from_numpy(x), dim=1)


def simgraph(x, owner, n, tau, returns, kernels=False, block=2048):
    """(n, n) bool: e_ij = 1 iff cos(p_i, p_j) > tau or cos(r_i, p_j) > tau or cos(p_i, r_j) > tau for a parameter p or
    return r of each, i != j; x (K, d) unit rows, owner (K,) the tool of a row, returns (K,) bool."""
    if kernels:
        bits = load_kernel("simgraph")(x, owner, n, tau, returns)  # (n, ceil(n / 32)) int32
        return (bits[:, :, None] >> torch.arange(32, device=bits.device) & 1).bool().flatten(1)[:, :n].cpu()
    edges = torch.zeros(n, n, dtype=torch.bool)
    for i, j in itertools.combinations_with_replacement(range(0, len(x), block), 2):
        a, b = slice(i, i + block), slice(j, j + block)
        near = (x[a] @ x[b].T > tau) & ~(returns[a, None] & returns[b])  # (block, block); two returns make no edge
        s, t = near.nonzero().T.cpu()
        edges[owner[a][s], owner[b][t]] = True
    return (edges | edges.T).fill_diagonal_(False)


def best_cosine(x, owner, n, rows, columns):
    """(n, n): the largest cosine between a text of tool i out of `rows` (K,) bool and one of j out of `columns`; -1 if
    there is none."""
    a, b = x[rows], x[columns]
    best = torch.full((n, len(b)), -1.0).scatter_reduce_(0, owner[rows][:, None].expand(-1, len(b)), a @ b.T, "amax")
    return torch.full((n, n), -1.0).scatter_reduce_(1, owner[columns].expand(n, -1), best, "amax")


def pair_scores(x, owner, n, returns):
    """Best cosines (n, n) of two parameters (PP) and, symmetric, of a return and a parameter (PR)."""
    pr = best_cosine(x, owner, n, returns, ~returns)
    return best_cosine(x, owner, n, ~returns, ~returns).fill_diagonal_(-1), torch.maximum(pr, pr.T).fill_diagonal_(-1)


def choose_tau(scores, degree):
    """The threshold at which a tool has `degree` neighbours on average."""
    above = scores[torch.ones_like(scores, dtype=torch.bool).triu(1)].sort(descending=True).values
    return float(above[min(len(above) - 1, round(degree * len(scores) / 2))])


def merge_tools(tools, embed):
    """Tools without near-duplicates, which would be neighbours without being complements, and how many were merged:
    the same name but for case and signs, or all parameters (> 0.95) and the descriptions (> 0.9) alike. (our choice)"""
    kept, names = [], {re.sub(r"[\W_]", "", tool["function"]["name"].lower()): i for i, tool in reversed(list(enumerate(
        tools)))}
    first = [tools[i] for i in sorted(names.values())]
    texts, owner, _ = tool_texts([dict(function=tool["function"] | dict(results={})) for tool in first])
    about = embed([tool["function"].get("description", "") for tool in first])  # (n, d)
    x, like = embed(texts) if texts else about[:0], (about @ about.T > 0.9).tril(-1)
    rows = [(owner == i).nonzero()[:, 0] for i in range(len(first))]
    for i, tool in enumerate(first):
        def same(j):
            near = x[rows[i]] @ x[rows[j]].T > 0.95  # (p_i, p_j)
            return near.shape[0] == near.shape[1] and bool(near.any(0).all() and near.any(1).all())

        if not any(j in kept and same(j) for j in like[i].nonzero()[:, 0].tolist()):
            kept.append(i)
    return [first[i] for i in kept], len(tools) - len(kept)


def components(edges):
    """The component (n,) of each node of a graph (n, n) bool, named by its smallest node."""
    label = torch.arange(len(edges))
    while True:
        lowest = torch.where(edges, label, len(edges)).amin(1).minimum(label) if len(edges) else label
        lowest = lowest[lowest]
        if torch.equal(lowest, label):
            return label
        label = lowest


def walk(edges, n, rng, kind="pure", most=10_000):
    """n different nodes of a walk along edges (Alg. 1). pure: move to any neighbour; last-added: draw neighbours of the
    node that was added last. It starts only where n nodes can be reached, and raises if that is nowhere; a walk of
    `most` steps (last-added can dead-end) starts anew, at most 100 times."""
    label = components(edges)
    starts = (label.bincount(minlength=len(edges))[label] >= n).nonzero()[:, 0].tolist()
    if not starts:
        raise ValueError(f"no component of the graph has {n} tools: lower tau or the number of tools")
    neighbours = functools.cache(lambda i: edges[i].nonzero()[:, 0].tolist())
    for _ in range(100):
        node = rng.choice(starts)  # Alg. 1 l.1
        found = [node]
        for _ in range(most):
            if len(found) == n:  # Alg. 1 l.3
                return found
            drawn = rng.choice(neighbours(node))  # Alg. 1 l.2
            node = drawn if kind == "pure" or drawn not in found else node
            found += [drawn] * (drawn not in found)
    raise ValueError(f"no walk found {n} tools in 100 times {most} steps")


# Agents (Sec. 2.3). What a language model is asked, and how its reply is read; a reply that cannot be read is asked
# for again, three times at most. All replies are JSON, so one that was cut off is noticed.
PLAN = """Plan a conversation in which a user asks an assistant for {n} things, one after another. The assistant has these
tools:
{tools}
Rules: never name a tool, say what the user needs. Each request follows from the ones before it: it uses something that was
said or found earlier. Some requests need several tools or calls. One or more may be small talk that needs no tool.
Reply with a JSON list of {n} objects {{"type": "tool" or "chitchat", "request": "what the user wants"}} and nothing else."""
USER = """You play a user who talks to an assistant. {task}
The conversation so far:
{history}
Reply with JSON and nothing else: {form}. "done": has the assistant finished your current request? If it asked you
something, it has not: answer it. Never name a tool."""
WITH_PLAN = "Your requests, in this order:\n{plan}\nYou are at request {k}. When it is done, write request {next}."
NO_PLAN = "The assistant has these tools:\n{tools}\nThink of your next request yourself."
ASSIST = """You are an assistant with these tools:
{tools}
The conversation so far:
{history}
Reply with JSON and nothing else: {{"calls": [{{"name": "...", "arguments": {{...}}}}, ...]}} to call one or more tools at
once, or {{"say": "..."}} to answer, or to ask the user for what a tool requires and nobody has said. Do not make up
arguments."""
TOOL = """You play this tool:
{tool}
It was called with {arguments}. Reply with its result, a JSON object with the properties {results} and nothing else."""


class Dropped(Exception):
    """A dialogue that cannot go on, and the rule that says why."""


def read_json(text, kind):
    """The JSON value in a reply, fenced or not; ValueError if it is not one of `kind`."""
    found = re.search(r"[\[{].*[\]}]", text or "", re.S)
    value = json.loads(found[0] if found else "")
    if not isinstance(value, kind):
        raise ValueError(f"not a {kind.__name__}")
    return value


def read_plan(text, n, names):
    """[{"type", "request"}] out of JSON or of lines "k. Tool Call Request: ..."; n - 1 to n + 1 of them, one of a tool
    at least, no name of a tool in any. (our choice)"""
    lines = re.findall(r"^\s*\d+[.)]\s*\**(tool|chit)[^:\n]*:\**\s*(.+)$", text or "", re.M | re.I)
    items = [dict(type="tool" if kind.lower() == "tool" else "chitchat", request=request) for kind, request in lines]
    for item in items or read_json(text, list):
        ok = isinstance(item, dict) and item.get("type") in ("tool", "chitchat") and isinstance(item.get("request"), str)
        if not ok or not item["request"].strip() or leaks(item["request"], names):
            raise ValueError("an item that is none, or that names a tool")
        items += [] if lines else [dict(type=item["type"], request=item["request"])]
    if abs(len(items) - n) > 1 or all(item["type"] != "tool" for item in items):
        raise ValueError("not as many requests as asked for, or none for a tool")
    return items


def read_calls(text):
    """What the assistant said, or its calls [(name, arguments)]; arguments may be JSON in a string."""
    value = read_json(text, dict)
    if isinstance(value.get("say"), str) and value["say"].strip():
        return value["say"], []
    calls = []
    for call in value.get("calls") or [{}]:
        arguments = call.get("arguments") if isinstance(call, dict) else None
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
            raise ValueError("a call without a name or arguments")
        calls.append((call["name"], arguments))
    return None, calls


def leaks(text, names):
    """Does a text name a tool? Names of one plain word are left out: nobody could speak without them."""
    return any(name in text for name in names if re.search(r"[_.\d-]|[a-z][A-Z]", name))


class Agents:
    """User, assistant and tools of one dialogue, played by a language model. Their methods are generators: they yield
    what is asked, (prompt, temperature, try), and are sent the reply. Only the user sees the plan."""

    def __init__(self, tools, most):
        self.tools, self.most, self.names = tools, most, [tool["function"]["name"] for tool in tools]
        self.docs = {tool["function"]["name"]: tool["function"] for tool in tools}
        self.text = "\n".join(json.dumps(without_results(tool)["function"]) for tool in tools)

    def ask(self, rule, prompt, temperature, read):
        for n in range(3):
            text = yield prompt, temperature, n
            with contextlib.suppress(ValueError, RecursionError):
                return read(text)
        raise Dropped(rule)

    def plan(self):
        prompt = PLAN.format(n=self.most, tools="\n".join(json.dumps(tool["function"]) for tool in self.tools))
        items = yield from self.ask("no plan", prompt, 1.0, lambda text: read_plan(text, self.most, self.names))
        self.most = len(items)
        return items

    def user(self, plan, k, messages):
        def read(text):
            value = read_json(text, dict)
            if not isinstance(value.get("message"), str) or not isinstance(value.get("done"), bool):
                raise ValueError("no message")
            kind = value.get("type") if value.get("type") in ("tool", "chitchat") else "tool"
            return dict(done=value["done"], message=value["message"], type=kind, request=value["message"])

        told = "" if plan is None else "\n".join(f"{i}. {item['request']}" for i, item in enumerate(plan, 1))
        task = NO_PLAN.format(tools=self.text) if plan is None else WITH_PLAN.format(plan=told, k=k + 1, next=k + 2)
        form = '{"done": true or false, "message": "what you say"' + ', "type": "tool" or "chitchat"' * (plan is None)
        prompt = USER.format(task=task, history=history(messages), form=form + "}")
        return (yield from self.ask("no message", prompt, 1.0, read))

    def assistant(self, messages):
        prompt = ASSIST.format(tools=self.text, history=history(messages))
        said, calls = yield from self.ask("F1", prompt, 0.2, read_calls)
        return said, [(name, arguments, {}) for name, arguments in calls]

    def tool(self, name, arguments):
        if name not in self.docs:
            raise Dropped("F1")
        prompt = TOOL.format(tool=json.dumps(self.docs[name]), arguments=json.dumps(arguments), results=", ".join(
            self.docs[name].get("results", {}).get("properties", {})) or "that fit its description")
        return (yield from self.ask("F3", prompt, 0.7, lambda text: read_json(text, dict)))


def history(messages):
    """The conversation as a prompt shows it. Contents are JSON strings there, so that no text can pose as a turn."""
    lines = []
    for m in messages:
        calls = [dict(name=c["function"]["name"], arguments=c["function"]["arguments"]) for c in m.get("tool_calls", [])]
        lines.append(f"{m['role']}: {json.dumps(calls or m['content'])}")
    return "\n".join(lines) or "(nothing yet)"


def wait(answer):
    """The value of a generator of Agents, or what Sim returns at once."""
    return (yield from answer) if inspect.isgenerator(answer) else answer


MOST_TURNS, MOST_ROUNDS = 12, 5  # of the user, and of tools for one of these (our choice)


def converse(teacher, with_plan):
    """One dialogue (Sec. 2.3), as a generator in case its agents are. The assistant never sees the plan."""
    items = plan = (yield from wait(teacher.plan())) if with_plan else None
    items, messages, origins, about, k, ended = items or [], [], [], [], 0, False
    while len(about) < MOST_TURNS:
        said = yield from wait(teacher.user(plan, k, messages))
        k += bool(messages) and said["done"]
        ended = k >= teacher.most
        if ended:
            break
        if k == len(items):
            items.append(dict(type=said["type"], request=said["request"]))
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

# The teacher `sim`: the same part for all agents, played by one engine that knows the world
def phrase(rng, act, held, *fills):
    """A phrasing of an act; those behind the bar only if `held`, and then no others."""
    return rng.choice(BANKS[act][held].split(";")).format(*fills)


class Sim:
    """Planner, user, assistant and tools of dialogue i, in one engine for all arms. What it draws depends on the seed,
    the dialogue, the request and the parameter, never on the arm. `tools`: names out of `world`."""

    def __init__(self, seed, i, world, tools, held=False):
        self.world, self.tools, self.held, self.draw = world, tools, held, functools.partial(random_of, seed, held, i)
        self.said, self.returned = {}, {}  # kind: (value, name) of the latest
        self.goals, self.missing, self.gone, self.facts, self.results = [], {}, set(), {}, []
        self.k, self.most = -1, self.draw("turns").randint(3, 5)

    def pick(self, k):
        """Tools of request k without a plan, each at random: one, or two in a fifth of the requests."""
        rng = self.draw("tools", k)
        return rng.sample(self.tools, min(len(self.tools), 1 + (self.draw("two", k).random() < 0.2)))

    def item(self, k, names):
        """Request k: a quarter of them, after the first, is chitchat."""
        chat = k > 0 and self.draw("chat", k).random() < 0.25
        wants = [wanted(self.world[name]["verb"], self.world[name]["thing"]) for name in names]
        return dict(type="chitchat" if chat else "tool", goals=[] if chat else names,
                    request="be friendly" if chat else " and ".join(wants))

    def plan(self):
        """Requests in an order in which arguments can come from what was returned or said before: greedily the tool
        of which most is known, what is returned counts twice; new tools before used ones. (our choice)"""
        items, known, used = [], {}, Counter()
        order = self.draw("order").sample(self.tools, len(self.tools))

        def worth(name):
            tool = self.world[name]
            feeds = sum(kind in self.world[other]["params"].values() for other in order if other != name
                        for kind in linked(tool["results"]))
            return sum(known.get(tool["params"][p], 0) for p in tool["required"]) - 3 * used[name] + 0.1 * feeds

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

    def origin(self, rng, tool, p, ahead):
        """(value, how the user says it, origin) of an argument, None if it is left out. What was returned is referred
        to 7 times in 10, what was said before 5 in 10; 6 % of what is required is forgotten. A value None is looked up
        when the call is made: the goal before it returns it."""
        kind, (keep, back, again, forget) = tool["params"][p], (rng.random() for _ in range(4))
        fresh, found = make_value(kind, rng), self.returned | ahead
        if p not in tool["required"] and keep < 0.6:
            return None
        if LINKED.fullmatch(kind) and kind in found and back < 0.7:
            return found[kind][0], phrase(rng, "returned", self.held, found[kind][1].replace("_", " ")), "return"
        if LINKED.fullmatch(kind) and kind in self.said and again < 0.5:
            value, name = self.said[kind]
            return value, phrase(rng, "said", self.held, name.replace("_", " ")), "earlier"
        if p in tool["required"] and forget < 0.06:
            return fresh, "", "clarified"
        return fresh, str(fresh), "current"

    def fill(self, k, place, name):
        """A goal, and how the user says it. `place` 1: the second of a request, which may need what the first returns."""
        tool, args, clauses = self.world[name], {}, []
        ahead = {kind: (None, r) for other, _ in self.goals for r, kind in self.world[other]["results"].items()}
        for p, kind in tool["params"].items():
            rng = self.draw("argument", k, place, p)
            chosen = self.origin(rng, tool, p, ahead)
            before = rng.choice(PREPOSITIONS.get(p, PREPOSITIONS.get(kind, "with|using|by")).split("|"))
            if chosen:
                value, said, origin = chosen
                args[p] = value, origin
                clauses += [f"{before} {said}"] if said else []
                self.missing |= {} if said else {p: value}
        self.goals.append((name, args))
        self.draw("clauses", k, place).shuffle(clauses)
        form = 3 if self.held else self.draw("want", k, place).randrange(3)
        return " ".join([wanted(tool["verb"], tool["thing"], form), *clauses])

    def user(self, plan, k, messages):
        """The next request, or what was missing in this one."""
        if self.missing:
            p, value = self.missing.popitem()
            self.said[kind_of(p)] = value, p
            return dict(done=False, message=phrase(self.draw("given", k, p), "given", self.held, value))
        self.k, self.step, self.results = self.k + 1, 0, []
        if self.k == self.most:
            return dict(done=True, message="")
        item = plan[self.k] if plan else self.item(self.k, self.pick(self.k))
        parts = [self.fill(self.k, place, name) for place, name in enumerate(item["goals"])]
        for name, args in self.goals:
            self.said |= {self.world[name]["params"][p]: (value, p) for p, (value, origin) in args.items()
                          if origin == "current"}
        rng = self.draw("user", self.k)
        text = f" {phrase(rng, 'and', self.held)} ".join(parts)
        return dict(item, done=True, message=phrase(rng, "ask" if parts else "chat", self.held, text))

    def assistant(self, messages):
        """Asks for what is missing, makes all calls of which the arguments are known, or says what was found."""
        rng, self.step = self.draw("assistant", self.k, self.step), self.step + 1
        if self.missing:
            return phrase(rng, "missing", self.held, list(self.missing)[-1].replace("_", " ")), []
        broken = any("error" in result for result in self.results)
        ready = [goal for j, goal in enumerate(self.goals) if j == 0 or all(v is not None for v, _ in goal[1].values())]
        if ready and not broken:
            self.goals = [goal for goal in self.goals if goal not in ready]
            return None, [(name, {p: self.returned[self.world[name]["params"][p]][0] if v is None else v
                                  for p, (v, _) in args.items()}, {p: origin for p, (_, origin) in args.items()})
                          for name, args in ready]
        self.goals = []
        if not self.results:
            return phrase(rng, "reply", self.held), []
        facts = [f"the {name.replace('_', ' ')} is {value}" for result in self.results for name, value in result.items()]
        return (phrase(rng, "sorry", self.held, "it is gone") if broken else
                phrase(rng, "done", self.held, " and ".join(facts))), []

    def tool(self, name, arguments):
        """The result of a call, the same for the same call. Facts of a thing stay, and what is cancelled is gone."""
        tool, key, result = self.world[name], json.dumps(arguments, sort_keys=True), {}
        handle = next((value for value in arguments.values() if str(value)[0] == "#"), None)
        if handle in self.gone:
            result["error"] = "it is gone"
        else:
            self.gone |= {handle} if tool["verb"] == "cancel" else set()
            result = {r: self.facts.get((handle, r)) or make_value(kind, self.draw("fact", name, key, r))
                      for r, kind in tool["results"].items()}
            self.returned |= {kind: (result[r], r) for r, kind in tool["results"].items() if LINKED.fullmatch(kind)}
            self.facts |= {(value, r): other for value in result.values() if str(value)[0] == "#"
                           for r, other in (arguments | result).items()}
        self.results.append(result)
        return result


def linked(names):
    """Kinds, out of {name: kind}, that one refers back to."""
    return [kind for kind in names.values() if LINKED.fullmatch(kind)]

# Rules (Sec. 2.3): which dialogues are kept. The paper names the kind of rule, the list is our choice
RULES = {"F1": "a call is no JSON, or not of this tool", "F2": "a call without a result, or a result without a call",
         "F3": "a result that is not as documented", "F4": "roles, an empty message or one said twice, no last word",
         "F5": "a request for a tool without a call, or chitchat with one", "F6": "requests are left",
         "F7": "an argument that nobody said", "F8": "the user names a tool", "F9": "near to an earlier dialogue",
         "F10": "too long"}
TYPES = dict(string=str, integer=int, number=(int, float), boolean=bool, array=list, object=dict)


def fits(value, shape):
    """Is a value of a JSON schema's type, and of its enum?"""
    kind = TYPES.get(shape.get("type"), object)
    return (isinstance(value, kind) and (kind is bool or not isinstance(value, bool) or kind is object)
            and ("enum" not in shape or value in shape["enum"]))


def call_fits(call, docs):
    """F1: arguments parse, the tool exists, nothing is unknown, nothing required is missing, types and enums fit."""
    with contextlib.suppress(ValueError, RecursionError):
        arguments, shape = json.loads(call["function"]["arguments"]), docs[call["function"]["name"]]["parameters"]
        known = shape.get("properties", {})
        return (isinstance(arguments, dict) and arguments.keys() <= known.keys()
                and set(shape.get("required", ())) <= arguments.keys()
                and all(fits(value, known[name]) for name, value in arguments.items()))
    return False


def grounded(value, shape, seen):
    """F7: was it said or found before, or is it in the schema?"""
    if isinstance(value, (list, dict)):
        return all(grounded(v, {}, seen) for v in (value.values() if isinstance(value, dict) else value))
    plain = isinstance(value, bool) or value is None or value in shape.get("enum", ()) or value == shape.get("default")
    return plain or re.search(rf"(?<!\w){re.escape(str(value).lower())}(?!\w)", seen) is not None


def broken_rules(dialogue, tools, most_tokens):
    """The rules that a dialogue breaks, F9 aside. Contents are data: they are compared, and never followed."""
    docs, messages, broken = {tool["function"]["name"]: tool["function"] for tool in tools}, dialogue["messages"], set()
    seen, called, open_calls, last, used = "", set(), {}, "", Counter()
    turn = -1
    for m in messages:
        turn += m["role"] == "user"
        calls, content = m.get("tool_calls", []), m["content"] or ""
        if m["role"] != "tool" and open_calls:
            broken.add("F2")
        for call in calls:
            broken |= set() if call_fits(call, docs) else {"F1"}
            used[turn] += 1
            if "F1" not in broken:
                known = docs[call["function"]["name"]]["parameters"]["properties"]
                told = json.loads(call["function"]["arguments"]).items()
                broken |= set() if all(grounded(v, known[p], seen) for p, v in told) else {"F7"}
            broken |= {"F2"} if call["id"] in called else set()
            called.add(call["id"])
            open_calls[call["id"]] = call["function"]["name"]
        if m["role"] == "tool":
            name = open_calls.pop(m["tool_call_id"], None)
            broken |= set() if name else {"F2"}
            broken |= set() if result_fits(content, docs.get(name, {})) else {"F3"}
        expected = {"": ("user",), "user": ("assistant",), "assistant": ("user",), "calls": ("tool",),
                    "tool": ("tool", "assistant")}[last]
        if m["role"] not in expected or not (calls or content.strip()):
            broken.add("F4")
        last = "calls" if calls else m["role"]
        seen += "\n" + content.lower() if m["role"] in ("user", "tool") else ""
    said = [m["content"] for m in messages if m["role"] == "user"]
    broken |= {"F2"} if open_calls else set()
    broken |= {"F4"} if last != "assistant" or len(set(said)) < len(said) else set()
    by_item = Counter()
    for turn, k in enumerate(dialogue["about"]):
        by_item[k] += used[turn]
    broken |= {"F5"} if any((item["type"] == "tool") != (by_item[k] > 0) for k, item in enumerate(dialogue["plan"])
                            if k in dialogue["about"]) else set()
    broken |= set() if dialogue["ended"] else {"F6"}
    broken |= {"F8"} if any(leaks(text, docs) for text in said) else set()
    return broken | ({"F10"} if dialogue["tokens"] > most_tokens else set())


def result_fits(content, doc):
    """F3: a JSON object of documented returns, or of an error; a tool without documented returns may say anything."""
    with contextlib.suppress(ValueError, RecursionError):
        value, known = json.loads(content), doc.get("results", {}).get("properties", {})
        return isinstance(value, dict) and (not known or value.keys() <= known.keys() | {"error"})
    return False


def eight_grams(dialogue):
    words = " ".join(m["content"] or "" for m in dialogue["messages"] if m["role"] in ("user", "assistant")).split()
    return {zlib.crc32(" ".join(words[i : i + 8]).encode()) for i in range(max(1, len(words) - 7))}


class Near:
    """F9: is the Jaccard index of 8-grams with an earlier dialogue above 0.7? Only those are compared that share one of
    the rarest 30 %, as two sets with a larger index must."""

    def __init__(self):
        self.sets, self.where = [], {}

    def __call__(self, dialogue):
        grams = eight_grams(dialogue)
        counts = Counter(i for gram in grams for i in self.where.get(gram, ()))
        near = any(both / (len(grams) + len(self.sets[i]) - both) > 0.7 for i, both in counts.items())
        if not near:
            for gram in grams:
                self.where.setdefault(gram, []).append(len(self.sets))
            self.sets.append(grams)
        return near


# Formats
def without_results(tool):
    """A tool as OpenAI has it: the schema of returns is not part of that."""
    return dict(type="function", function={k: v for k, v in tool["function"].items() if k != "results"})


def to_openai(dialogue, tools):
    """The row of a fine-tuning file: arguments are a JSON string, content is null beside calls."""
    return dict(messages=dialogue["messages"], tools=[without_results(tool) for tool in tools])


HERMES = ("You may call functions to help the user. Their signatures are within <tools></tools>:\n<tools>{}</tools>\n"
          "For each call reply with a JSON object within <tool_call></tool_call>.")
CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.S)


def escaped(value):
    """JSON in which nothing can close or open a tag."""
    return json.dumps(value, ensure_ascii=False).replace("</", "<\\/").replace("<tool", "\\u003ctool")


def to_hermes(row):
    """Messages as text alone: calls and results as tags in it, the tools in a system message."""
    shown = [dict(role="system", content=HERMES.format(escaped(row["tools"])))]
    for m in row["messages"]:
        calls = [c["function"] for c in m.get("tool_calls") or ()]
        text = "\n".join("<tool_call>\n" + escaped(dict(name=c["name"], arguments=json.loads(c["arguments"])))
                         + "\n</tool_call>" for c in calls)
        result = f"<tool_response>\n{escaped(json.loads(m['content']))}\n</tool_response>" if m["role"] == "tool" else ""
        shown.append(dict(role=m["role"], content=text or result or m["content"]))
    return dict(messages=shown)


def from_hermes(row):
    """The row of to_openai again; calls are numbered."""
    system, *shown = row["messages"]
    before, after = HERMES.split("{}")
    tools, messages, n, waiting = json.loads(system["content"][len(before) : -len(after)]), [], 0, []
    for m in shown:
        calls = read_hermes(m["content"]) if m["role"] == "assistant" else []
        if calls:
            waiting = [f"call_{n + j}" for j in range(len(calls))]
            n += len(calls)
            messages.append(dict(role="assistant", content=None, tool_calls=[dict(id=i, type="function", function=dict(
                name=name, arguments=json.dumps(arguments))) for i, (name, arguments) in zip(waiting, calls)]))
        elif m["role"] == "tool":
            value = json.loads(m["content"].removeprefix("<tool_response>\n").removesuffix("\n</tool_response>"))
            messages.append(dict(role="tool", tool_call_id=waiting.pop(0), content=json.dumps(value)))
        else:
            messages.append(dict(m))
    return dict(messages=messages, tools=tools)


def read_hermes(text):
    """Calls [(name, arguments)] in a model's reply; those that cannot be read are left out."""
    calls = []
    for body in CALL.findall(text):
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            call = json.loads(body)
            calls.append((call["name"], dict(call["arguments"])))
    return calls


def signature(function):
    """A tool in a line, for the small student: name(parameter, optional?)."""
    required = function["parameters"].get("required", ())
    names = [name + "?" * (name not in required) for name in function["parameters"].get("properties", {})]
    return f"{function['name']}({', '.join(names)})"


def shown(row, brief):
    """Messages of a row as a model sees them, text alone; `brief`: of tools the signatures."""
    system, *rest = to_hermes(row)["messages"]
    if brief:
        system = dict(role="system", content="\n".join(["tools", *(signature(t["function"]) for t in row["tools"])]))
    if rest and rest[0]["role"] == "system":
        rest[0] = dict(role="system", content=rest[0]["content"] + ("\n" + system["content"]) * bool(row["tools"]))
        return rest
    return [system, *rest] if row["tools"] else rest

# Making the data
def build_graph(cfg, tools, embed):
    """Edges (n, n) of a list of tools, and the threshold."""
    texts, owner, returns = tool_texts(tools)
    bare = sum(text.endswith(": ") for text in texts)
    x, tau = embed(texts), cfg.tau
    if not tau:  # as dense as asked for: what 0.82 means depends on the encoder
        tau = choose_tau(torch.maximum(*pair_scores(x, owner, len(tools), returns)), cfg.degree)
    edges = simgraph(x, owner, len(tools), tau, returns, cfg.kernels)
    degree = edges.sum(1)
    print(f"graph: {len(tools)} tools, {len(texts)} texts ({bare} without a description), tau {tau:.3f}, "
          f"{int(degree.sum()) // 2} edges, {int((degree == 0).sum())} isolated, mean degree "
          f"{degree.float().mean():.1f}, largest components {sorted(components(edges).bincount().tolist())[:-4:-1]}")
    return edges, tau


def subsets(cfg, edges, graph, i):
    """Indices of the tools of dialogue i: a walk, or as many at random."""
    rng = random_of("subset", cfg.seed, i)
    low, high = map(int, cfg.n_tools.split("-"))
    n = rng.randint(low, high)
    return walk(edges, n, rng, cfg.walk) if graph else rng.sample(range(len(edges)), n)


def finish(cfg, tok, dialogue, tools, near):
    """Rules and length of a dialogue; F9 alone changes `near`."""
    row = to_openai(dialogue, tools)
    try:
        dialogue["tokens"] = len(encode_row(tok, row, cfg.task == "world")[0])
    except (ValueError, TypeError, AttributeError):
        dialogue["tokens"] = 0  # it has a call or a result that is no JSON, which is broken below
    broken = broken_rules(dialogue, tools, cfg.seq_len)
    if not broken and near(dialogue):
        broken = {"F9"}
    return dialogue | dict(broken=sorted(broken, key=lambda rule: int(rule[1:])))


def sim_dialogues(cfg, run, arm, world, edges, tok):
    """Kept and dropped dialogues of an arm, until the kept ones have cfg.tokens tokens; by parts to a JSONL file."""
    graph, with_plan = ARMS[arm]
    path, names, near = run.out / f"dialogues-{arm}.jsonl", list(world), Near()
    rows, log = read_rows(path, cfg.part), Log(run, f"dialogues {arm}", cfg.tokens)
    for row in rows:
        _ = row["broken"] or near(row)
    while (have := sum(row["tokens"] for row in rows if not row["broken"])) < cfg.tokens:
        new = []
        for i in range(len(rows), len(rows) + cfg.part):
            picked = [names[j] for j in subsets(cfg, edges, graph, i)]
            made = last_value(converse(Sim(cfg.seed, i, world, picked), with_plan))
            made |= dict(id=i, tools=picked, model="sim")
            new.append(finish(cfg, tok, made, [world[name]["tool"] for name in made["tools"]], near))
        append_rows(path, new)
        rows += new
        log(have)
        if len(rows) > 100 * cfg.part and have < len(rows):
            fail(f"arm {arm}: next to nothing passes the rules; see broken in {path}")
        if should_stop(run):
            stopped(run)
    return rows


def last_value(generator):
    """What a generator returns that never has to wait."""
    try:
        next(generator)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


def within(rows, tokens):
    """The first kept dialogues whose tokens are at most `tokens`: arms compare at equal size."""
    total, kept = 0, []
    for row in rows:
        if not row["broken"] and total + row["tokens"] <= tokens:
            total += row["tokens"]
            kept.append(row)
    return kept


def rule_counts(rows):
    """{"kept": share, rule: number of dialogues that broke it}."""
    broken = Counter(rule for row in rows for rule in row["broken"])
    return {"kept": sum(not row["broken"] for row in rows) / len(rows)} | {rule: broken[rule] for rule in RULES}

# ---------------------------------------------------------------- 5. Evaluation and claims
# Data (Sec. 2.4)
def said_in(dialogue):
    """[(user's words, assistant's words)] of the rounds; no JSON, no system message, no results."""
    rounds = []
    for m in dialogue["messages"]:
        if m["role"] == "user":
            rounds.append((m["content"], ""))
        elif m["role"] == "assistant" and m["content"]:
            rounds[-1] = rounds[-1][0], m["content"]
    return rounds


def entropy(words):
    """H = - sum p log2 p over the frequencies of words. (Sec. 2.4, the base is inferred)"""
    counts = np.array([*Counter(words).values()], float)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def distinct(texts, n=3):
    """D-n: different n-grams of words over all n-grams, of a list of lists of words."""
    grams = [gram for words in texts for gram in zip(*(words[i:] for i in range(n)))]
    return len(set(grams)) / max(1, len(grams))


def coherence(rounds, embed):
    """SS: 100 times the mean cosine of a request and the round before it."""
    pairs = [(" ".join(before), after[0]) for each in rounds for before, after in zip(each, each[1:])]
    if not pairs:
        return 0.0
    a, b = (embed(list(side)) for side in zip(*pairs))
    return float(100 * (a * b).sum(1).mean())


def data_measures(dialogues, embed):
    """H, D-3 and SS of what was said, the origins of arguments, and how many calls and questions back there are."""
    rounds = [said_in(dialogue) for dialogue in dialogues]
    texts = [re.findall(r"[\w#:]+", text.lower()) for each in rounds for pair in each for text in pair]
    origins = Counter(origin for d in dialogues for call in d["origins"] for origin in call.values())
    calls, turns = sum(len(d["origins"]) for d in dialogues), sum(len(d["about"]) for d in dialogues)
    asked = sum(len(d["about"]) - len(set(d["about"])) for d in dialogues)
    found = {"H": entropy(sum(texts, [])), "D-3": distinct(texts), "SS": coherence(rounds, embed),
             "calls": calls / len(dialogues), "turns": turns / len(dialogues), "asked back": asked / len(dialogues)}
    return found | {name: origins[name] / max(1, origins.total()) for name in ORIGINS}


# Calls, by the rules of the Berkeley leaderboard's AST checker
AST_TYPES = dict(string=str, integer=int, float=float, number=float, boolean=bool, array=list, tuple=list, dict=dict,
                 object=dict, any=str)


def plain(value):
    """Strings without blanks and , . / - _ * ^, in lower case, with double quotes."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value


def dict_matches(value, answers):
    """A dict against answers, dicts of lists; "" among the answers of a key: it may be left out."""
    return any(answer != "" and all(key in answer and plain(v) in map(plain, answer[key]) for key, v in value.items())
               and all(key in value or "" in answer[key] for key in answer) for answer in answers)


def item_fits(value, kind, answers):
    """Type of an element: the documented one, or that of the first answer."""
    first = next((answer for answer in answers if answer != ""), None)
    return type(value) is kind or first is not None and type(value) is type(first)


def value_matches(value, shape, answers):
    """Is an argument among the answers? An int is taken for a float; a value of the answers' type instead of the
    documented one stands for a variable and is compared as it is."""
    kind, inner = AST_TYPES[shape["type"]], None
    if shape["type"] in ("array", "tuple"):
        inner = AST_TYPES[shape["items"]["type"]]
    value = float(value) if kind is float and type(value) is int else value
    first = next((answer for answer in answers if answer != ""), None)
    variable = first is not None and type(first) is not kind
    if type(value) is not kind:
        return first is not None and type(value) is type(first) and value in answers
    if inner and not any(not isinstance(answer, list) or all(item_fits(v, inner, answer) for v in value)
                         for answer in answers):
        return False
    if variable:
        return value in answers
    if kind is dict:
        return dict_matches(value, answers)
    if inner is dict:
        return any(len(value) == len(answer) and all(dict_matches(v, [a]) for v, a in zip(value, answer))
                   for answer in answers)
    if kind is list:
        return list(map(plain, value)) in [list(map(plain, answer)) for answer in answers]
    return plain(value) in map(plain, [a for a in answers if isinstance(a, str)]) if kind is str else value in answers


def call_matches(call, doc, answer):
    """call (name, arguments) against answer {name: {parameter: [values]}}; "" among the values: it may be left out."""
    (name, allowed), = answer.items()
    known = doc["parameters"]["properties"]
    return (call[0] == name and all(p in call[1] for p in doc["parameters"].get("required", ()))
            and all(p in known and p in allowed and value_matches(v, known[p], allowed[p]) for p, v in call[1].items())
            and all(p in call[1] or "" in values for p, values in allowed.items()))


def ast_correct(calls, docs, answers):
    """As many calls as answers, and each answer has a call of its own, in any order. docs {name: function}"""
    left = list(calls)
    for answer in answers if len(calls) == len(answers) else ():
        match = next((call for call in left if call_matches(call, docs[next(iter(answer))], answer)), None)
        if match is None:
            return False
        left.remove(match)
    return len(calls) == len(answers)


# Students
ORIGINS = "current", "earlier", "return", "clarified"  # of an argument: said in this turn, before, returned, asked for
MIX = dict(current=0.44, earlier=0.19, **{"return": 0.11})  # shares in the Berkeley data's gold calls (measured)


def questions(dialogues, docs):
    """What an assistant is asked on held-out dialogues: (messages before, gold message, origins of its calls, is the
    request chitchat) for each of its turns."""
    rows = []
    for dialogue in dialogues:
        origins, turn = iter(dialogue["origins"]), -1
        for i, m in enumerate(dialogue["messages"]):
            turn += m["role"] == "user"
            if m["role"] == "assistant":
                kind = dialogue["plan"][dialogue["about"][turn]]["type"]
                rows.append(dict(id=dialogue["id"], before=dialogue["messages"][:i], gold=m, kind=kind,
                                 after=dialogue["messages"][i - 1]["role"],
                                 tools=[docs[name] for name in dialogue["tools"]],
                                 origins=[next(origins) for _ in m.get("tool_calls", ())]))
    return rows


def marks(row, text):
    """{measure: [right, all]} of one reply: arguments by origin, whole calls, asking back, calls where none is due."""
    gold = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in row["gold"].get("tool_calls", ())]
    docs, calls, found = {t["function"]["name"]: t["function"] for t in row["tools"]}, read_hermes(text), {}
    asks = row["after"] == "user" and not gold and row["kind"] == "tool"
    if row["after"] == "user" and row["kind"] == "tool":
        found["asks when it should"] = [int(asks and not calls), int(asks)]
        found["should when it asks"] = [int(asks and not calls), int(not calls)]
    if row["after"] == "user" and row["kind"] == "chitchat":
        found["calls in chitchat"] = [int(bool(calls)), 1]
    if not gold:
        return found
    answers = [{name: {p: [v] for p, v in arguments.items()}} for name, arguments in gold]
    found["calls right"] = [int(ast_correct(calls, docs, answers)), 1]
    found["tools right"] = [int(Counter(n for n, _ in calls) == Counter(n for n, _ in gold)), 1]
    for (name, arguments), origins in zip(gold, row["origins"]):
        same = [other for n, other in calls if n == name]
        best = max(same, key=lambda other: sum(other.get(p) == v for p, v in arguments.items()), default={})
        for p, v in arguments.items():
            tally = found.setdefault(origins[p], [0, 0])
            tally[0] += plain(best.get(p)) == plain(v)
            tally[1] += 1
    if all(set(origins.values()) <= {"current"} for origins in row["origins"]):
        found["calls right, all current"] = found["calls right"]
    return found


def tallies(rows, texts, names):
    """(dialogues, measures, 2): sums of marks over the turns of a dialogue."""
    ids = {i: n for n, i in enumerate(dict.fromkeys(row["id"] for row in rows))}
    total = np.zeros((len(ids), len(names), 2))
    for row, text in zip(rows, texts):
        for name, pair in marks(row, text).items():
            total[ids[row["id"]], names.index(name)] += pair
    return total


MARKS = [*ORIGINS, "calls right", "calls right, all current", "tools right", "calls in chitchat", "asks when it should",
         "should when it asks"]


def rates(total, weight):
    """(..., measures): shares from tallies (dialogues, measures, 2), dialogues weighted (..., dialogues)."""
    sums = np.tensordot(weight, total, (-1, 0))
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def resample(n, draws=2000):
    """Weights (draws, n) of bootstrap samples; the same for all arms, which makes differences paired."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws)


def interval(draws, statistic):
    low, high = np.quantile(draws, [0.025, 0.975])
    return statistic, (min(low, statistic), max(high, statistic))


def between(a, b):
    """Mean and 95 % t-interval of the difference of two lists of measures of equal parts."""
    gap = np.subtract(a, b)
    half = T_975 * gap.std(ddof=1) / math.sqrt(len(gap))
    return gap.mean(), (gap.mean() - half, gap.mean() + half)


PARTS, T_975 = 10, 2.262  # equal parts of an arm's data; Student's quantile for 9 degrees of freedom

# Fixed before the first evidence run: id, statistic, threshold, what would refute it. Tokens, updates, first weights and
# the order of training are equal in all arms. current, earlier, return: right arguments of unseen tools by their origin.
CLAIMS = [
    ("edges-compose", "composable pairs, among edges - among all", 0.0, "the graph finds what a random pair is as well"),
    ("earlier-turns", "earlier, both - neither", 0.0, "graph and plan do not teach to use what was said before"),
    ("earlier-returns", "return, both - neither", 0.0, "graph and plan do not teach to use what was returned"),
    ("current-not-lower", "current, both - neither", -0.02, "it is paid for with what is said in the same turn"),
    ("plan-links", "share of arguments said or returned before, both - no-plan", 0.0, "a plan links no more requests"),
    ("graph-links", "the same, both - no-graph", 0.0, "the graph gives the planner no more to link"),
    ("graph-is-diverse", "D-3, both - no-graph", 0.0, "the graph makes what is said no more diverse (paper: +0.147)"),
    ("graph-has-entropy", "H, both - no-graph", 0.0, "nor its words (paper: +0.54)"),
    ("plan-is-coherent", "SS, both - no-plan", 0.0, "a plan makes rounds no more alike (paper: +1.33)"),
    ("edges-are-used-together", "precision of edges - base rate, same task", 0.0, "real: edges are no sign of co-use"),
]


def data_claims(parts):
    """Claims on the data: {arm: [measures of a part]}."""
    found = {}
    for name, other, what in (("plan-links", "no-plan", ("earlier", "return")),
                              ("graph-links", "no-graph", ("earlier", "return")),
                              ("graph-is-diverse", "no-graph", ("D-3",)), ("graph-has-entropy", "no-graph", ("H",)),
                              ("plan-is-coherent", "no-plan", ("SS",))):
        if "both" in parts and other in parts:
            a, b = ([sum(part[w] for w in what) for part in parts[arm]] for arm in ("both", other))
            found[name] = between(a, b)
    return found


def student_claims(totals):
    """Claims on the students: {arm: tallies}; a paired bootstrap over dialogues."""
    if not {"both", "neither"} <= totals.keys():
        return {}
    weight, gap = resample(len(totals["both"])), lambda w: rates(totals["both"], w) - rates(totals["neither"], w)
    draws, whole = gap(weight), gap(np.ones(weight.shape[1]))
    return {claim: interval(draws[:, MARKS.index(name)], whole[MARKS.index(name)]) for claim, name in (
        ("earlier-turns", "earlier"), ("earlier-returns", "return"), ("current-not-lower", "current"))}


def edge_precision(edges, truth, draws=2000):
    """Share of true pairs among edges, among all pairs, and the difference with its bootstrap interval over tools."""
    pair = np.triu(np.ones(edges.shape), 1)
    weight = resample(len(edges), draws).astype(float)

    def share(which):
        hit, all_ = (((weight @ m) * weight).sum(1) for m in (which * truth, which))
        return hit / np.maximum(all_, 1)

    precision, base = (edges * pair * truth).sum() / max(1, (edges * pair).sum()), (pair * truth).sum() / pair.sum()
    return precision, base, interval(share(edges * pair) - share(pair), precision - base)


def auc(score, truth):
    """Probability that a true pair scores above a false one; ties count one half."""
    order, ranks = np.argsort(score, kind="stable"), np.empty(len(score))
    ranks[order] = np.arange(1, len(score) + 1)
    values, inverse = np.unique(score, return_inverse=True)
    ranks = (np.bincount(inverse, ranks) / np.bincount(inverse))[inverse]
    n = truth.sum()
    return float((ranks[truth].sum() - n * (n + 1) / 2) / (n * (len(truth) - n)))

def composes(world):
    """(n, n) bool: can a return of one tool be an argument of the other? Known in the made world."""
    needs, gives = ([set(linked(tool[part])) for tool in world.values()] for part in ("params", "results"))
    one = np.array([[bool(g & n) for n in needs] for g in gives])
    return one | one.T


def test_dialogues(cfg):
    """Held-out dialogues of unseen tools and phrasings, by a generator of their own, which uses no graph: half of them
    have the tools of two things, half random ones; half are ordered by the planner."""
    world, made, i = library(True), [], 0
    things = sorted({tool["thing"] for tool in world.values()})
    while len(made) < cfg.n_test:
        rng = random_of("test", cfg.seed, i)
        some = rng.sample(things, 2)
        names = [name for name, tool in world.items() if tool["thing"] in some]
        picked = rng.sample(names if i % 2 else list(world), min(len(names), rng.randint(3, 6)))
        dialogue = last_value(converse(Sim(cfg.seed, i, world, picked, True), i % 4 > 1)) | dict(id=i, tools=picked)
        dialogue["tokens"] = 0
        if not broken_rules(dialogue, [world[name]["tool"] for name in picked], 1):
            made.append(dialogue)
        i += 1
    return made

def prompt_ids(tok, tools, before, brief):
    """Ids of a conversation up to where the assistant begins."""
    row = dict(messages=before, tools=[without_results(tool) for tool in tools])
    return encode_row(tok, row, brief)[0] + tok.head["assistant"]


def answer_all(model, tok, prompts, max_new, size=64):
    """Greedy replies to prompts (lists of ids), those of like length together."""
    order, texts = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    for i in range(0, len(order), size):
        some = order[i : i + size]
        texts |= zip(some, map(tok.decode, generate(model, [prompts[j] for j in some], max_new, tok.stop)))
    return [texts[i] for i in range(len(prompts))]

# ---------------------------------------------------------------- 6. Training
def encode_row(tok, row, brief):
    """Token ids and which of them are learned, of a row of to_openai: what the assistant says and the end of its turn."""
    ids, learned = [], []
    for m in shown(row, brief):
        body = tok.encode(m["content"]) + tok.stop[:1]
        for part, counts in ((tok.head[m["role"]], False), (body, m["role"] == "assistant"), (tok.between, False)):
            ids += part
            learned += [counts] * len(part)
    return ids, learned


def pack(rows, seq_len):
    """Rows (ids, learned) side by side in lines of seq_len: ids, targets (-100: not learned), the document of a token
    (-1: padding) and its place in it, all (N, seq_len). First fit, in order; a longer row is left out."""
    lines, room = [], []
    for ids, learned in rows:
        if len(ids) > seq_len:
            continue
        at = next((i for i in range(max(0, len(room) - 32), len(room)) if room[i] >= len(ids)), len(lines))
        if at == len(lines):
            lines.append([])
            room.append(seq_len)
        lines[at].append((ids, learned))
        room[at] -= len(ids)
    out = {name: torch.full((len(lines), seq_len), fill) for name, fill in
           (("ids", 0), ("target", -100), ("doc", -1), ("place", 0))}
    for i, line in enumerate(lines):
        start = 0
        for j, (ids, learned) in enumerate(line):
            here, n = slice(start, start + len(ids)), len(ids)
            out["ids"][i, here], out["place"][i, here] = torch.tensor(ids), torch.arange(n)
            out["doc"][i, here] = j
            ahead = torch.where(torch.tensor(learned[1:]), torch.tensor(ids[1:]), -100)
            out["target"][i, start : start + n - 1] = ahead  # each at the place of the token before it
            start += n
    return out


def packed_states(model, ids, doc, place):
    """Outputs (B, L, d) of the last layer: a token sees those before it in its own document."""
    same = (doc[:, :, None] == doc[:, None]) & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool,
                                                          device=ids.device).tril()
    x, turn = model.embed_tokens(ids), model.turn(place)
    mask = torch.zeros(same.shape, dtype=x.dtype, device=x.device).masked_fill(~same, -math.inf)[:, None]
    for layer in model.layers:
        x = layer(x, turn, mask)
    return model.norm(x)


def token_logp(h, w, target, kernels=False):
    """log p (T,) of targets (T,), in fp32 at least, from outputs h (T, d) and the head's weight w (V, d)."""
    if kernels:
        return load_kernel("token_logp")(h, w.to(h.dtype), target)  # never (T, V)
    logits = F.linear(h, w)  # (T, V)
    return logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32)).gather(1, target[:, None])[:, 0]


def sft_loss(model, batch, kernels=False):
    """Sum of - log p over what is learned, and how many tokens that are; no logits are made for others."""
    h, live = packed_states(model, batch["ids"], batch["doc"], batch["place"]), batch["target"] >= 0
    weight = (model.lm_head or model.embed_tokens).weight
    return -token_logp(h[live], weight, batch["target"][live], kernels).sum(), live.sum()


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


def merge_lora(model):
    """Add A and B to W, in place."""
    for layer in model.layers:
        for name, part in list(layer.named_children()):
            if isinstance(part, Lora):
                part.linear.weight.data += 2 * part.b.data @ part.a.data
                setattr(layer, name, part.linear)
    return model


def train(cfg, run, state, job, model, data):
    """cfg.steps optimizer steps on batches of packed lines, in an order that depends on the seed alone. Linear warm-up
    in a tenth of the steps, constant to the half, then linear to 0."""
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learned.values(), cfg.lr, (0.9, 0.98), weight_decay=cfg.weight_decay, fused=True)
    step, order = 0, presentation(len(data["ids"]), cfg.steps * cfg.batch_size, cfg.seed)
    if state.get("job") == job:
        step = state["step"]
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
    log, began, seen, model = Log(run, job, cfg.steps, step), time.perf_counter(), 0, model.train()
    while step < cfg.steps:
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min((step + 1) / (cfg.steps / 10 + 1), 1, 2 * (1 - step / cfg.steps))
        lines = order[step * cfg.batch_size :][: cfg.batch_size]
        batch, total = {name: x[lines].to(run.device) for name, x in data.items()}, 0.0
        count = (batch["target"] >= 0).sum()
        for i in range(0, len(lines), cfg.micro_batch):
            part = {name: x[i : i + cfg.micro_batch] for name, x in batch.items()}
            with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
                loss = sft_loss(model, part, cfg.kernels)[0] / count  # a token counts as much in any micro-batch
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(learned.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + batch["ids"].numel()
        if step == 1 or step % cfg.log_every == 0 or step == cfg.steps:
            if not math.isfinite(total):
                fail(f"{job}: training diverged; lower --lr")
            log(step, loss=total, gnorm=float(norm), lr=group["lr"], tokens_per_s=seen / (time.perf_counter() - began))
        stop = should_stop(run)
        if stop or step % cfg.save_every == 0 and step < cfg.steps:
            weights = {name: p.detach() for name, p in learned.items()}
            remember(run, state, job=job, step=step, model=weights, optimizer=optimizer.state_dict())
        if stop:
            stopped(run)
    return model.eval()

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

class Remote:
    """Endpoints as teachers, one for each model; texts come from --replies where they were paid for before."""

    def __init__(self, cfg, run, state):
        folder = Path(cfg.replies or run.out / "replies")
        folder.mkdir(parents=True, exist_ok=True)
        self.names = cfg.model.split(",")
        self.chats = {name: Chat(cfg.teacher, name, folder, cfg.workers) for name in self.names}
        self.before = state.get("spent", 0)

    def spent(self):
        return self.before + sum(chat.tokens for chat in self.chats.values())

    def ask(self, jobs):
        """Texts of [(model, prompt, temperature, index)]."""
        texts = [None] * len(jobs)
        for name, chat in self.chats.items():
            mine = [i for i, job in enumerate(jobs) if job[0] == name]
            replies = chat.ask([(dict(messages=[dict(role="user", content=jobs[i][1])], temperature=jobs[i][2],
                                      max_tokens=MOST_REPLY), jobs[i][3]) for i in mine])
            for i, text in zip(mine, replies):
                texts[i] = text
        return texts


class LocalTeacher:
    """A checkpoint as teacher; a small one writes little that passes."""

    def __init__(self, cfg, run):
        folder = fetch_model(cfg.teacher)
        self.model, self.tok, self.names = load_real(folder).to(run.device).eval(), load_tokenizer(folder), [folder.name]

    def spent(self):
        return 0

    def ask(self, jobs):
        texts = []
        for _, prompt, temperature, index in jobs:
            g = torch.Generator(self.model.norm.weight.device).manual_seed(zlib.crc32(repr((prompt, index)).encode()))
            ids = self.tok.chat([dict(role="user", content=prompt)])
            new, = generate(self.model, [ids], MOST_REPLY, [self.tok.eos], temperature, 0.95, g)
            texts.append(self.tok.decode(new).decode("utf-8", "replace") if isinstance(self.tok.decode(new), bytes)
                         else self.tok.decode(new))
        return texts


MOST_REPLY = 1024  # most tokens of a reply


def synthesize(cfg, run, state, tools, edges, teacher, tok):
    """Dialogues by language models, cfg.part of them side by side. What is asked is kept under its hash, so a killed
    run asks nothing twice; a part is written at once. Over --budget no new question is asked."""
    path, near, log = run.out / "dialogues.jsonl", Near(), Log(run, "dialogues", cfg.dialogues)
    rows = read_rows(path, cfg.part)
    for row in rows:
        _ = row["broken"] or near(row)
    while len(rows) < cfg.dialogues and teacher.spent() <= cfg.budget:
        ids = range(len(rows), min(len(rows) + cfg.part, cfg.dialogues))
        new = converse_all(cfg, tools, edges, teacher, ids)
        if new is None:
            print(f"stopped after {teacher.spent():,} tokens: --budget {cfg.budget:,}; the replies are kept in --replies")
            break
        new = [finish(cfg, tok, d, [tools[j] for j in d["tools"]], near) if d["messages"] else d for d in new]
        append_rows(path, new)
        rows += new
        remember(run, state, spent=teacher.spent())
        log(len(rows), kept=sum(not row["broken"] for row in rows), tokens=teacher.spent())
        if should_stop(run):
            stopped(run)
    return rows


def converse_all(cfg, tools, edges, teacher, ids):
    """Dialogues `ids`, all at once: what they wait for is asked together. None when the budget is used up."""
    live, done, jobs = {}, {}, {}
    for i in ids:
        picked, rng = subsets(cfg, edges, ARMS[cfg.arms][0], i), random_of("teacher", cfg.seed, i)
        low, high = map(int, cfg.turns.split("-"))
        agents = Agents([tools[j] for j in picked], rng.randint(low, high))
        done[i] = dict(id=i, tools=picked, model=rng.choice(teacher.names), messages=[])
        live[i] = converse(agents, ARMS[cfg.arms][1])
    replies = dict.fromkeys(live)
    while live:
        for i, talk in list(live.items()):
            try:
                prompt, temperature, n = talk.send(replies[i])
                jobs[i] = done[i]["model"], prompt, temperature, 3 * i + n
            except StopIteration as end:
                done[i] |= end.value
            except Dropped as why:
                done[i]["broken"] = [str(why)]
            if live[i].gi_frame is None:
                del live[i]
                jobs.pop(i, None)
        if teacher.spent() > cfg.budget:
            return None
        replies = dict(zip(live, teacher.ask([jobs[i] for i in live])))
    return [done[i] for i in ids]


def load_real(folder):
    """A checkpoint's decoder in fp32 on the CPU."""
    try:
        shape = read_shape(json.loads((folder / "config.json").read_text()))
        with torch.device("meta"):
            model = Decoder(shape)
        tensors = {re.sub(r"^model\.|self_attn\.|mlp\.", "", k): v.float() for k, v in load_weights(folder).items()}
        tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight" or not shape.tied}
        model.load_state_dict(tensors, assign=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        fail(f"{folder}: no Llama or Qwen2 checkpoint: {' '.join(str(error).split())[:200]}")
    return model


def chat_tokens(folder):
    """A checkpoint's tokenizer with its turns: ChatML or Llama-3."""
    tok = load_tokenizer(folder)
    if "<|im_start|>" in tok.special:
        head = {role: [tok.special["<|im_start|>"], *tok.encode(role + "\n")] for role in ROLES}
        stop, between = [tok.special["<|im_end|>"]], tok.encode("\n")
    elif "<|eot_id|>" in tok.special:
        start, end = tok.special["<|start_header_id|>"], tok.special["<|end_header_id|>"]
        head = {role: [start, *tok.encode(role), end, *tok.encode("\n\n")] for role in ROLES}
        stop, between = [tok.special["<|eot_id|>"]], []
    else:
        fail(f"{folder}: neither ChatML nor Llama-3 turns")
    text = lambda ids: tok.decode(ids)
    return SimpleNamespace(encode=tok.encode, decode=text, head=head, stop=stop, between=between)

def encoder_of(cfg, device):
    """embed(texts) -> unit rows on the CPU, and its name: a BERT-type checkpoint, or hashed n-grams."""
    if not cfg.encoder:
        return hashed_ngrams, "hashed n-grams"
    encoder = Encoder(fetch_model(cfg.encoder)).to(device).eval()

    def embed(texts):
        order, rows = sorted(range(len(texts)), key=lambda i: len(texts[i])), {}
        for i in range(0, len(order), 64):
            some = order[i : i + 64]
            rows |= zip(some, encoder.embed([texts[j][:1500] for j in some]).cpu())
        return torch.stack([rows[i] for i in range(len(texts))]) if texts else torch.zeros(0, 1)

    return embed, Path(cfg.encoder).name

def new_student(cfg, run, tok, weights=None):
    """A tiny decoder with first weights that depend on the seed alone, or those of a file."""
    torch.manual_seed(random_of("weights", cfg.seed).getrandbits(60))
    model = Decoder(student_shape(cfg, tok))
    nn.init.normal_(model.embed_tokens.weight, 0, cfg.n_embd**-0.5)
    if weights:
        model.load_state_dict(load_file(weights))
    return model.to(run.device)


def once(path, make, load):
    """What is in a file of weights, which make() trains if it is not there."""
    if not path.exists():
        replace_file(path, export(make()))
    return load(path)


def remember(run, state, **job):
    """Save what is done, and the training in progress if there is one."""
    state.update({key: job.pop(key) for key in ("spent",) if key in job})
    save_state(run, done=state["done"], spent=state["spent"], seconds=time.perf_counter() - run.began, **job)


def stopped(run):
    """Say how to go on, and leave."""
    print(f"stopped; continue with: {shlex.join([sys.executable, *sys.argv, '--resume'])}")
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
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{path}: not a file of this script: {error!r}; remove it, and it will be made again")


def append_rows(path, rows):
    with open(path, "ab") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


@functools.cache
def load_kernel(name):
    """A Triton operation of kernels/; at its first call it compares itself with PyTorch on the real tensors."""
    try:
        return importlib.import_module("kernels").checked(name)
    except ImportError as error:
        fail(f"--kernels: {error}: the folder kernels/ must stand beside this file, and triton be installed")


def presentation(n, total, *key):
    """Which of n rows is shown at each of `total` places: all of them in a new random order, again and again."""
    orders = (random_of("order", *key, epoch).sample(range(n), n) for epoch in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(orders), total))


def dry_run(cfg):
    """What a run takes, without allocating a network or asking anybody."""
    if cfg.task == "synth":
        low, high = map(int, cfg.turns.split("-"))
        turns = (low + high) / 2
        asked = 1 + 4.5 * turns  # a plan; for each request the user, a call, its result and an answer, and some again
        read, written = asked * (150 * 4.5 + 60 * 2.25 * turns), asked * 60
        return print(f"{cfg.dialogues:,} dialogues: about {cfg.dialogues * asked:,.0f} requests, "
                     f"{cfg.dialogues * read:.1e} tokens read and {cfg.dialogues * written:.1e} written (tools of 150 "
                     f"tokens, messages of 60); at 1 $ a million read and 4 $ written {cfg.dialogues * (read + 4 * written) / 1e6:,.2f} $; "
                     f"--budget stops after {cfg.budget:,}")
    shape = student_shape(cfg, Words())
    if cfg.task == "sft" and cfg.model and Path(cfg.model).is_dir():
        shape = read_shape(json.loads((Path(cfg.model) / "config.json").read_text()))
    with torch.device("meta"):
        n = sum(p.numel() for p in Decoder(shape).parameters())
    runs = 1 if cfg.task == "sft" else len(cfg.students.split(","))
    tokens = runs * cfg.steps * cfg.batch_size * cfg.seq_len
    memory = (16 * n + cfg.micro_batch * cfg.seq_len * 40 * shape.n_layer * shape.n_embd) / 2**30
    print(f"{n:,} parameters | {tokens:.1e} tokens, {6 * n * tokens:.1e} FLOPs | {memory:.2f} GiB, one device | "
          f"{6 * n * tokens / 2e10 / 3600:.2f} hours on a core (20 GFLOP/s), {6 * n * tokens / 2e14 / 3600:.3f} on one "
          "H100 (200 TFLOP/s; a model this small has less)")


def draw_graph(path, edges, names, found):
    """The graph with one walk in it: clusters as rings, so that a person can see them."""
    from matplotlib.figure import Figure

    label = components(edges)
    order = sorted(range(len(edges)), key=lambda i: (-int((label == label[i]).sum()), int(label[i])))
    sizes = [len(list(group)) for _, group in itertools.groupby(int(label[i]) for i in order)]
    place, start, columns = np.zeros((len(edges), 2)), 0, max(1, math.isqrt(len([s for s in sizes if s > 1])))
    for c, size in enumerate(s for s in sizes if s > 1):
        angle = 2 * np.pi * np.arange(size) / size
        centre = np.array([c % columns, -(c // columns)]) * 2.4
        for i, a in zip(order[start : start + size], angle):
            place[i] = centre + min(1.1, 0.3 + size / 40) * np.array([np.cos(a), np.sin(a)])
        start += size
    figure = Figure(figsize=(11, 11))
    axes = figure.add_axes((0, 0, 1, 0.96))
    pairs = edges.triu().nonzero().numpy()
    axes.plot(place[pairs][..., 0].T, place[pairs][..., 1].T, color="0.75", lw=0.5, zorder=1)
    axes.scatter(*place[order[:start]].T, s=9, color="tab:blue", zorder=2)
    axes.plot(*place[found].T, "o-", color="tab:red", lw=1.5, zorder=3)
    for i in found:
        axes.annotate(names[i], place[i], fontsize=9, color="tab:red", parse_math=False)
    axes.set_axis_off()
    figure.suptitle(f"{len(edges)} tools, {len(pairs)} edges; {len(edges) - start} tools without a neighbour are left "
                    "out; red: one walk", fontsize=11)
    figure.savefig(path, dpi=110)

# ---------------------------------------------------------------- 8. Main
def run_students(cfg, run, state, data, world, tok):
    """Train a student on each arm's dialogues and ask it about unseen tools: {arm: tallies}."""
    docs = {name: tool["tool"] for name, tool in library(True).items()}
    rows, totals = questions(test_dialogues(cfg), docs), {}
    prompts = [prompt_ids(tok, row["tools"], row["before"], True) for row in rows]
    for arm in cfg.students.split(","):
        encoded = [encode_row(tok, to_openai(d, [world[name]["tool"] for name in d["tools"]]), True) for d in data[arm]]
        make = lambda: train(cfg, run, state, f"student {arm}", new_student(cfg, run, tok), pack(encoded, cfg.seq_len))
        model = once(run.out / f"student-{arm}.safetensors", make, lambda path: new_student(cfg, run, tok, path)).eval()
        if f"marks {arm}" not in state["done"]:
            texts = answer_all(model, tok, prompts, cfg.max_new)
            replace_file(run.out / f"answers-{arm}.jsonl", "".join(
                json.dumps(dict(id=row["id"], gold=row["gold"], reply=text)) + "\n"
                for row, text in zip(rows, texts)).encode())
            state["done"][f"marks {arm}"] = tallies(rows, texts, MARKS).tolist()
            remember(run, state)
        totals[arm] = np.array(state["done"][f"marks {arm}"])
    return totals


def run_world(cfg, run, state):
    """Graph, dialogues of all arms, what they are like, and what students learn from them."""
    embed, name = encoder_of(cfg, run.device)
    tools, merged = merge_tools([tool["tool"] for tool in library().values()], embed)
    world, tok = {tool["function"]["name"]: library()[tool["function"]["name"]] for tool in tools}, Words()
    edges, tau = build_graph(cfg, tools, embed)
    precision, base, gain = edge_precision(edges.numpy(), composes(world))
    print(f"{merged} tools merged; {precision:.1%} of the edges compose, {base:.1%} of all pairs do ({name})")
    if cfg.show_graph:
        draw_graph(cfg.show_graph, edges, list(world), walk(edges, 6, random_of("shown", cfg.seed)))
    found, metrics, parts, data = {"edges-compose": gain}, {"graph/precision": precision, "graph/base rate": base}, {}, {}
    for arm in cfg.arms.split(","):
        rows = sim_dialogues(cfg, run, arm, world, edges, tok)
        data[arm] = within(rows, cfg.tokens)
        size = len(data[arm]) // PARTS
        parts[arm] = [data_measures(data[arm][i * size : (i + 1) * size], embed) for i in range(PARTS)]
        measures = data_measures(data[arm], embed) | rule_counts(rows) | dict(dialogues=len(data[arm]))
        metrics |= {f"{arm}/{key}": value for key, value in measures.items()}
        for form, write in (("openai", lambda row: row), ("hermes", to_hermes)):
            replace_file(run.out / f"{form}-{arm}.jsonl", "".join(json.dumps(write(to_openai(
                d, [world[n]["tool"] for n in d["tools"]]))) + "\n" for d in data[arm]).encode())
    print_table(metrics, [*cfg.arms.split(",")], ["dialogues", "H", "D-3", "SS", "calls", "turns", "asked back", *ORIGINS,
                                                  "kept", *RULES])
    if cfg.students:
        totals = run_students(cfg, run, state, data, world, tok)
        for arm, total in totals.items():
            shares = dict(zip(MARKS, rates(total, np.ones(len(total)))))
            shares["by the real mix"] = sum(MIX[o] * shares[o] for o in MIX) / sum(MIX.values())
            metrics |= {f"student {arm}/{key}": float(value) for key, value in shares.items()}
        print("right answers about unseen tools; train and test share one simulator")
        print_table(metrics, [f"student {arm}" for arm in totals], [*MARKS, "by the real mix"])
        found |= student_claims(totals)
        if cfg.scale != "smoke" and metrics["student neither/current"] < 0.5:
            print("The students have not learned to call: raise --steps or --tokens before arms are compared.")
    return found | data_claims(parts), metrics, dict(tau=tau, encoder=name, merged=merged)


def print_table(metrics, arms, columns):
    """Measures as rows, arms as columns."""
    print(f"{'':26}" + "".join(f"{arm:>18}" for arm in arms))
    for column in columns:
        cells = [metrics.get(f"{arm}/{column}") for arm in arms]
        print(f"{column:26}" + "".join(f"{'' if cell is None else f'{cell:.4g}':>18}" for cell in cells))

API = dict(GorillaFileSystem="gorilla_file_system", MathAPI="math_api", MessageAPI="message_api", TwitterAPI="posting_api",
           TicketAPI="ticket_api", TradingBot="trading_bot", TravelAPI="travel_booking",
           VehicleControlAPI="vehicle_control")  # class of BFCL's multi-turn tasks: file of its documents


def used_together(folder, where):
    """{relation: set of pairs (i, j), i < j} of tools in BFCL's gold trajectories; where {(file, name): tool}."""
    pairs = dict.fromkeys(("same task", "same turn", "consecutive calls"), frozenset())
    for row, turns in bfcl_file(folder, "multi_turn_base"):
        files = [API[name] for name in row["involved_classes"]]
        names = [[re.match(r"\w+", call)[0] for call in turn] for turn in turns]
        turns = [[next(where[f, name] for f in files if (f, name) in where) for name in turn] for turn in names]
        flat = sum(turns, [])
        for relation, groups in (("same task", [flat]), ("same turn", turns), ("consecutive calls", zip(flat, flat[1:]))):
            pairs[relation] |= {pair for group in groups for pair in itertools.combinations(sorted(set(group)), 2)}
    return pairs


def run_graph(cfg, run, state):
    """The graph of real tools by threshold, and whether its edges are used together (E1); else of --tools."""
    embed, name = encoder_of(cfg, run.device)
    metrics, found, docs, folder = {}, {}, {}, Path(cfg.data)
    if cfg.data:
        docs, others = bfcl_tools(folder)
        tools = sum(docs.values(), []) + others
    else:
        tools = load_tools(Path(cfg.tools)) if cfg.tools else [tool["tool"] for tool in library().values()]
    texts, owner, returns = tool_texts(tools)
    x = embed(texts)
    pp, pr = pair_scores(x, owner, len(tools), returns)
    print(f"{len(tools)} tools, {int((~returns).sum())} parameters, {int(returns.sum())} returns, {len(set(texts))} "
          f"different texts ({name}); {merge_tools(tools, embed)[1]} near-duplicates")
    for tau in (0.6, 0.7, 0.75, 0.82, 0.9):
        edges = simgraph(x, owner, len(tools), tau, returns, cfg.kernels)
        label, degree = components(edges), edges.sum(1).float()
        row = dict(PP=int((pp > tau).sum()) // 2, PR=int((pr > tau).sum()) // 2, all=int(edges.sum()) // 2)
        row |= dict(isolated=int((degree == 0).sum()), components=len(label.unique()), degree=float(degree.mean()),
                    largest=int(label.bincount().max()))
        metrics |= {f"tau {tau}/{key}": value for key, value in row.items()}
    print_table(metrics, [f"tau {tau}" for tau in (0.6, 0.7, 0.75, 0.82, 0.9)], list(row))
    if cfg.show_graph:
        edges, tau = build_graph(cfg, tools, embed)
        draw_graph(cfg.show_graph, edges, [name_of(tool) for tool in tools], walk(edges, 6, random_of("shown", cfg.seed)))
    if cfg.data:
        found = co_use(cfg, metrics, docs, tools, embed, pp.numpy(), pr.numpy())
    return found, metrics, dict(encoder=name)


def co_use(cfg, metrics, docs, tools, embed, pp, pr):
    """E1: do pairs of tools with an edge occur together in gold trajectories? Beside it the similarity of descriptions,
    which is not in the paper."""
    where = {(file, name_of(tool)): i for i, (file, tool) in enumerate(
        (file, tool) for file, tools in docs.items() for tool in tools)}
    pairs = used_together(Path(cfg.data), where)
    used = sorted({i for pair in pairs["same task"] for i in pair})
    about = embed([f"{name_of(tools[i])}: {tools[i]['function']['description']}" for i in used])
    best, upper, apis = np.maximum(pp, pr)[np.ix_(used, used)], np.triu_indices(len(used), 1), [
        next(file for (file, _), j in where.items() if j == i) for i in used]
    inside = np.array([[a == b for b in apis] for a in apis])
    scores = dict(PP=pp[np.ix_(used, used)], PR=pr[np.ix_(used, used)], edge=best, description=(about @ about.T).numpy())
    for relation, some in pairs.items():
        truth = np.array([[(min(i, j), max(i, j)) in some for j in used] for i in used])
        for part, mask in (("", np.ones_like(inside)), (" in one API", inside)):
            chosen = mask[upper]
            row = {f"AUC {key}": auc(s[upper][chosen], truth[upper][chosen]) for key, s in scores.items()}
            row["base rate"] = truth[upper][chosen].mean()
            for tau in (0.82, 0.7, 0.6):
                edges = (best > tau)[upper] & chosen
                row |= {f"precision {tau}": truth[upper][edges].mean(), f"edges {tau}": int(edges.sum())}
            metrics |= {f"{relation}{part}/{key}": float(value) for key, value in row.items()}
        if relation == "same task":
            found = {"edges-are-used-together": edge_precision(best > 0.82, truth)[2]}
    print_table(metrics, list(pairs), list(row))
    print_table(metrics, [f"{relation} in one API" for relation in pairs], list(row))
    return found


def run_synth(cfg, run, state):
    """Dialogues for --tools by a language model (or for the made world, by sim), as JSONL in both formats."""
    embed, name = encoder_of(cfg, run.device)
    tools, merged = merge_tools(load_tools(Path(cfg.tools)), embed)
    edges, tau = build_graph(cfg, tools, embed)
    teacher = (Remote(cfg, run, state) if re.match("https?://", cfg.teacher) else LocalTeacher(cfg, run))
    rows = synthesize(cfg, run, state, tools, edges, teacher, SimpleNamespace(
        encode=str.split, head=dict.fromkeys(ROLES, [0]), stop=[0], between=[]))  # words stand for tokens here
    kept = [row for row in rows if not row["broken"]]
    for form, write in (("openai", lambda row: row), ("hermes", to_hermes)):
        replace_file(run.out / f"{form}.jsonl", "".join(json.dumps(write(to_openai(
            d, [tools[j] for j in d["tools"]]))) + "\n" for d in kept).encode())
    broken = Counter(rule for row in rows for rule in row["broken"])
    metrics = {f"dialogues/{key}": value for key, value in dict(made=len(rows), kept=len(kept), **broken).items()}
    metrics["dialogues/tokens"] = teacher.spent()
    print(f"{len(kept)} of {len(rows)} dialogues kept, in {run.out / 'openai.jsonl'} and hermes.jsonl; dropped by rule: "
          f"{dict(broken)}")
    return {}, metrics, dict(tau=tau, encoder=name, merged=merged)


def read_training(path):
    """Rows of a fine-tuning file in OpenAI's format."""
    rows = []
    for where, row in read_json_lines(path):
        try:
            for m in row["messages"]:
                ok = m["role"] in ROLES and (m.get("tool_calls") or isinstance(m["content"], str))
                for call in m.get("tool_calls") or ():
                    ok = ok and isinstance(json.loads(call["function"]["arguments"]), dict) and call["function"]["name"]
                if not ok:
                    raise ValueError(f"a message of {m['role']} without content or calls")
            rows.append(dict(messages=row["messages"], tools=row.get("tools") or []))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            fail(f"{where}: no row in OpenAI's format: {error!r}; needs messages, and calls whose arguments are JSON text")
    return rows


def run_sft(cfg, run, state):
    """Fine-tune --model on --data, all weights or LoRA; the result is a folder that --model takes."""
    rows, folder = read_training(Path(cfg.data)), fetch_model(cfg.model)
    tok, model = chat_tokens(folder), load_real(folder)
    encoded = [encode_row(tok, row, False) for row in rows]
    data = pack(encoded, cfg.seq_len)
    print(f"{len(rows)} dialogues, {sum(len(ids) <= cfg.seq_len for ids, _ in encoded)} of them in {len(data['ids'])} "
          f"lines of {cfg.seq_len} tokens, {(data['target'] >= 0).sum() / (data['doc'] >= 0).sum():.0%} learned")
    if not len(data["ids"]):
        fail(f"--seq-len {cfg.seq_len}: no dialogue is as short")
    torch.manual_seed(random_of("lora", cfg.seed).getrandbits(60))
    model = train(cfg, run, state, "sft", add_lora(model, cfg.lora_rank).to(run.device), data)
    tensors = {name if name.startswith("lm_head") else "model." + re.sub(
        r"\.((?:[qkvo])_proj)", r".self_attn.\1", re.sub(r"\.((?:gate|up|down)_proj)", r".mlp.\1", name)): p
        for name, p in merge_lora(model).state_dict().items()}
    (run.out / "model").mkdir(exist_ok=True)
    replace_file(run.out / "model" / "model.safetensors", save({k: p.contiguous().cpu() for k, p in tensors.items()}))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        replace_file(run.out / "model" / name, (folder / name).read_bytes())
    print(f"wrote {run.out / 'model'}")
    return {}, {"sft/dialogues": len(rows)}, {}


def run_bfcl(cfg, run, state):
    """Calls of --model on the Berkeley data's Python categories, by the AST rules."""
    folder = fetch_model(cfg.model)
    tok, model, metrics = chat_tokens(folder), load_real(folder).to(run.device).eval(), {}
    for category in AST_FILES:
        items = bfcl_file(Path(cfg.data), category)[: cfg.n_test]
        rows = [dict(tools=[normal_tool(raw, category) for raw in item["function"]], messages=item["question"][0])
                for item, _ in items]
        prompts = [prompt_ids(tok, row["tools"], row["messages"], False) for row in rows]
        texts, right = answer_all(model, tok, prompts, cfg.max_new, 8), []
        for (item, gold), row, text in zip(items, rows, texts):
            back = {tool["function"]["name"]: name_of(tool) for tool in row["tools"]}
            calls = [(back.get(name, name), arguments) for name, arguments in read_hermes(text)]
            right.append(ast_correct(calls, {f["name"]: f for f in item["function"]}, gold))
        metrics[f"bfcl/{category}"] = float(np.mean(right))
        append_rows(run.out / "answers.jsonl", [dict(id=item["id"], reply=text, right=ok)
                                                for (item, _), text, ok in zip(items, texts, right)])
    print_table(metrics, ["bfcl"], AST_FILES)
    return {}, metrics, {}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = cli(Config, SCALES, argv)
    if cfg.dry_run:
        return dry_run(cfg)
    if cfg.kernels and not torch.cuda.is_available():
        fail("--kernels needs a CUDA device; without the flag the same run takes plain PyTorch")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("torchrun: one process only; several --seed and --out spread over machines")
    for name, path in dict(data=cfg.data, tools=cfg.tools).items():
        if path and not Path(path).exists():
            fail(f"--{name} {path}: no such file or folder")
    run = start_run(cfg, "toolflow")
    state = load_state(run) or dict(done={}, spent=0, seconds=0.0)
    run.began = time.perf_counter() - state["seconds"]
    if not (run.out / "state.pt").exists():
        remember(run, state)  # from here on the directory belongs to these flags
    go = dict(world=run_world, graph=run_graph, synth=run_synth, sft=run_sft, bfcl=run_bfcl)[cfg.task]
    found, metrics, record = go(cfg, run, state)
    tried = {arm: TRIED for arm in cfg.students.split(",")} if cfg.task == "world" and cfg.students else {}
    digest = hashlib.sha256(json.dumps([*library(), *library(True), BANKS]).encode()).hexdigest()
    minutes = (time.perf_counter() - run.began) / 60
    return report(cfg, run, "toolflow", argv, found, CLAIMS, tried=tried, data_sha256=digest, metrics=metrics,
                  minutes=minutes, **record)


if __name__ == "__main__":
    main()
