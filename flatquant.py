# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "safetensors", "tqdm", "matplotlib", "tiktoken", "requests"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""flatquant.py: FlatQuant: Flatness Matters for LLM Quantization
Sun, Liu, Bai, Bao, Zhao, Li, Hu, Yu, Hou, Yuan, Jiang, Liu, Yao, ICML 2025, arXiv 2410.09426

Four bits have sixteen steps, so a tensor with a few large channels loses the others to rounding. An invertible matrix,
learned per layer and small because it is a Kronecker product, flattens activations and weights; its inverse goes into
the weights, so nothing changes but the rounding. On a real model it loses less than Hadamard, without being flatter.

  python flatquant.py  # 4 min on 2 cores: a small Llama, perplexity 3.49; four bits 3.57, best Hadamard 3.73, rtn 254
  python flatquant.py --model smollm2-135m-instruct  # (tests/real.py) 12 min: 19.4; four bits 41.7, Hadamard 69.2
  python flatquant.py --model DIR --save q4 && python flatquant.py --load q4 --generate "Gravity is"

Symbols (T tokens, C channels in, N channels out, H heads, hd channels a head)
  paper    code            shape            meaning
  X, W     x, weight       (T, C), (N, C)   input and weight of a linear layer, y = X W^T
  P1, P2   pair            (n1, n1), ...    P = P1 (x) P2, n1 n2 = C: x P = P1^T mat(x) P2
  P^-T     inverse         (n1, n1), ...    the inverse transposes; the weight becomes W diag(c)^-1 P^-T
  c        c               (C,)             scale of a channel, merged into the norm or the layer before
  alpha    clip_a          (2,)             sigmoid: share of a token's maximum and minimum that is kept
  beta     clip_w          (N, 2)           the same for a row of the weight

Differences from the paper
  factors     the divisor of C next below its root; the official rule gives the same for the models of the paper.
  text        the standard library's documentation of Python, split by topic; --data and --test-data take files.
              Calibration takes windows side by side (official code: at random places).
  small       8 x 256 tokens to calibrate on, batch 2, 8 epochs, fp32 (paper: 128 x 2048, batch 4, 15 epochs, AMP).
  tiny        bytes, 4 layers; outliers are put in by scaling norm gains and undoing it in the weights: the function
              stays the same. It shows the mechanism; the evidence is the real model.
  baselines   SmoothQuant (alpha 0.5) also scales the input of o_proj, online, and of down_proj. Hadamard matrices stand
              at the same places as FlatQuant's, all online, with random signs; QuaRot folds one into the residual
              stream, clips by a constant, and moves the gains of the norms into the weights (the arms hadamard_gain).
  hq          the arm flatquant_hq is ours: P starts at a Hadamard matrix, and a block is calibrated on the inputs that
              the rounded blocks before it give; the steps and all else as flatquant.
  s           |s| below 1e-3 stops the run: P would not be invertible.
  left out    GPTQ, zero-shot tasks, asymmetric and grouped weights, direct inverse, separate P_v, rounded queries.
The paper's text was not at hand where a tag says "official code": the formula is read from ruikangliu/FlatQuant.

Copy out: factor_pair, kron_mm, Invertible, quantize_weight and quantize_tokens, hadamard
"""

import argparse
import ast
import contextlib
import dataclasses
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
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import timeit
import unicodedata
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import requests
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm


# ---------------------------------------------------------------- 1. Config
@dataclass
class Config:
    task: str = "tiny"  # tiny|real: a small Llama trained here, or the checkpoint of --model
    scale: str = "small"  # smoke|small|long|paper: a row of SCALES below; explicit flags win over it
    arms: str = ""  # comma list out of ARMS below; "" = the paper's, its baselines and ours, without ablations
    tag: str = "main"  # name of this variant in the RESULT record
    seed: int = 0  # tiny's weights and batches, initial transforms, the calibration windows; not the test text
    model: str = ""  # directory or hub id (org/name or org/name@commit) of a Llama or Qwen2 checkpoint
    # text
    data: str = ""  # calibration text file; "" = documentation of Python (paper: WikiText-2 train)
    test_data: str = ""  # text file for the perplexity; "" = documentation of Python, other topics
    seq_len: int = 256  # tokens of a window (paper: 2048)
    n_calib: int = 8  # windows for calibration (paper: 128)
    n_eval: int = 16  # windows for perplexity; claims need 8 or more
    # bits
    w_bits: int = 4  # weights: symmetric, one scale a row (paper: 4)
    a_bits: int = 4  # inputs of linear layers: symmetric, one scale a token; 16 = not quantized (paper: 4)
    k_bits: int = 16  # keys: asymmetric, one scale a token and head; 16 = not quantized (paper: 4)
    v_bits: int = 16  # values: the same (paper: 4)
    # calibration, block by block
    epochs: int = 8  # passes over the calibration windows (paper: 15)
    batch_size: int = 2  # windows in one optimizer step (paper: 4)
    lr: float = 5e-3  # learning rate of transforms and c, of thresholds ten times it; cosine to lr / 1000 (paper: 5e-3)
    layers: str = ""  # a:b = calibrate blocks a to b-1 alone and stop; needs --out; merge such runs with --load
    # tiny: training the small Llama
    steps: int = 700  # optimizer steps of the small Llama
    n_layer: int = 4  # blocks of the small Llama; width 192, 6 heads, 2 of keys and values, MLP 512
    outliers: float = 40.0  # factor of the channels made large without changing the function; 1 = none
    # machine
    device: str = "auto"  # auto|cpu|cuda|mps: auto is cuda if there is one, else cpu
    dtype: str = "auto"  # auto|float32|bfloat16: auto is bfloat16 on cuda, else float32; for training tiny
    kernels: bool = False  # for --generate, Triton kernels kron_quant, int4_gemm (cuda only; compared at first use)
    # running
    log_every: int = 20  # steps between two lines of log.jsonl
    save_every: int = 100  # steps of tiny's training between two checkpoints; calibration saves after every block
    out: str = ""  # output directory; "" = out/flatquant/TASK-SCALE[-TAG]-sSEED
    resume: bool = False  # continue an interrupted run: the same command with this flag
    save: str = ""  # directory for the last arm with a rotation, in four bits: packed weights, scales, transforms
    load: str = ""  # output directories with calibrated blocks (comma list), or with --generate one made by --save
    generate: str = ""  # prompt that the model of --load continues
    max_new: int = 40  # tokens of --generate
    dry_run: bool = False  # print parameters, FLOPs, memory and hours, and stop

    def __post_init__(self):
        self.task = "real" if self.model else self.task
        more = "hadamard_gain_lct," if self.task == "tiny" else ""  # on SmolLM2 gains in the weights do harm
        self.arms = self.arms or f"rtn,smoothquant,hadamard,hadamard_lct,{more}flatquant,flatquant_hq"
        arms = self.arms.split(",")
        if not set(arms) <= set(ARMS) or len(set(arms)) < len(arms):
            fail(f"--arms {self.arms}: a comma list, each once, out of {', '.join(ARMS)}")
        if self.task == "real" and not self.model:
            fail("--task real needs --model: a directory or a hub id, HuggingFaceTB/SmolLM2-135M-Instruct for one")
        if self.layers and not (re.fullmatch(r"\d+:\d+", self.layers) and self.out):
            fail(f"--layers {self.layers}: must look like 0:10, the first block and the one after the last; with --out")
        if self.layers and any("rounded_inputs" in ARMS[arm] for arm in arms):
            fail("--layers: flatquant_hq needs the blocks before; give --arms without it")
        if self.scale == "paper" and not (self.model or self.dry_run):
            fail("--scale paper needs --model: a directory or a hub id")
        if self.generate and not self.load or self.kernels and not self.generate:
            fail("--generate needs --load with a directory made by --save, and --kernels needs --generate")
        ones = "n_calib epochs batch_size steps n_layer outliers log_every save_every max_new".split()
        lows = dict.fromkeys(ones, 1) | dict.fromkeys([*BITS, "seq_len", "n_eval"], 2)
        for name, value in vars(self).items():
            if not isinstance(value, str) and not lows.get(name, 0) <= value < math.inf:
                fail(f"--{name.replace('_', '-')} {value}: must be at least {lows.get(name, 0)} and finite")
        if max(getattr(self, name) for name in BITS) > 16:
            fail(f"--{', --'.join(BITS).replace('_', '-')}: at most 16, which means not rounded")
        if self.save and (self.w_bits > 4 or self.layers or not any("rotation" in ARMS[arm] for arm in arms)):
            fail("--save needs all blocks, --w-bits 4 or less, and one of --arms with a rotation; the last is saved")


BITS = "w_bits", "a_bits", "k_bits", "v_bits"
PLAIN = dict(rotation="none", c="none", clip=False, near_hadamard=False, rounded_inputs=False)
ARMS = dict(  # what each arm does other than PLAIN
    rtn=dict(),
    smoothquant=dict(c="smooth"),
    hadamard=dict(rotation="hadamard"),
    hadamard_lct=dict(rotation="hadamard", clip=True),
    hadamard_gain=dict(rotation="hadamard", c="gain"),
    hadamard_gain_lct=dict(rotation="hadamard", c="gain", clip=True),
    flatquant=dict(rotation="learned", c="learned", clip=True),
    flatquant_hq=dict(rotation="learned", c="learned", clip=True, near_hadamard=True, rounded_inputs=True),  # ours
    lt=dict(rotation="learned"),
    lt_ps=dict(rotation="learned", c="learned"),
    lt_lct=dict(rotation="learned", clip=True),
)
SCALES = {
    "smoke": dict(seq_len=16, n_calib=2, n_eval=2, epochs=1, steps=6, n_layer=2, log_every=2, save_every=2),
    "small": {},
    "long": dict(n_calib=32, batch_size=4, epochs=15, n_eval=62,
                 arms="rtn,smoothquant,hadamard,hadamard_lct,lt,lt_ps,lt_lct,flatquant,flatquant_hq"),
    "paper": dict(seq_len=2048, n_calib=128, batch_size=4, epochs=15, n_eval=141, k_bits=4, v_bits=4),
}
TRIED = dict.fromkeys(ARMS, 1) | dict(flatquant_hq=4)  # configurations looked at; 1: published starts and rates


# ---------------------------------------------------------------- 2. Data
def documentation(part):
    """The standard library's English text on the Python language; topics i, i + 4, ... make part i = 0..3."""
    from pydoc_data.topics import topics

    return "\n\n".join(text for i, (_, text) in enumerate(sorted(topics.items())) if i % 4 == part)


def read_text(path, flag):
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{flag} {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}")


def windows(text, encode, seq_len, count, name, seed=0):
    """`count` windows of seq_len tokens, side by side (count, seq_len): the first ones, another seed the next ones."""
    ids = torch.tensor(encode(text))
    if len(ids) < count * seq_len:
        fail(f"{name} has {len(ids)} tokens, {count} windows of {seq_len} need {count * seq_len}")
    start = seed * count % (len(ids) // seq_len - count + 1)
    return ids[start * seq_len :][: count * seq_len].view(count, seq_len)


def encode_bytes(text):
    return list(text.encode())


BYTES = SimpleNamespace(encode=encode_bytes, decode=lambda ids: bytes(ids).decode(errors="replace"), eos=None)


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


def tiny_config(cfg):
    return dict(model_type="llama", hidden_size=192, intermediate_size=512, num_hidden_layers=cfg.n_layer,
                num_attention_heads=6, num_key_value_heads=2, vocab_size=256, tie_word_embeddings=True, tokenizer="")


@torch.no_grad()
def add_outliers(model, factor, generator):
    """Make four channels of each norm, and of the MLP's inner layer, `factor` times as large, and the weights behind
    them as much smaller: the function stays, the envelope of trained language models appears. (our choice)"""
    for layer in model.layers:
        for gain, readers in ((layer.input_layernorm.weight, (layer.q_proj, layer.k_proj, layer.v_proj)),
                              (layer.post_attention_layernorm.weight, (layer.gate_proj, layer.up_proj)),
                              (layer.up_proj.weight, (layer.down_proj,))):
            some = torch.randperm(len(gain), generator=generator)[:4]
            gain[some] *= factor
            for linear in readers:
                linear.weight[:, some] /= factor


# ---------------------------------------------------------------- 4. Method (from the official code) and the baselines
def factor_pair(n):
    """(n1, n2) with n1 n2 = n, n1 <= n2, n1 as large as possible: 576 = 24 x 24, 14336 = 112 x 128. (our choice)"""
    n1 = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    if n1 == 1 and n > 3:
        raise ValueError(f"{n} channels: a prime number has no Kronecker factors")
    return n1, n // n1


def kron_mm(x, p1, p2):
    """x (P1 (x) P2) for the rows of x (..., n1 n2), as P1^T mat(x) P2: 2 C (n1 + n2) FLOPs a row instead of 2 C^2."""
    assert x.shape[-1] == len(p1) * len(p2)
    y = x.reshape(-1, len(p1), len(p2)) @ p2  # (T, n1, n2)
    return (p1.T.expand(len(y), -1, -1) @ y).view(x.shape)  # expanded: a batched product, which copies nothing


class Invertible(nn.Module):
    """P = U diag(s) V^T and its inverse transpose U diag(1/s) V^T; U and V are Cayley maps, so orthogonal.

    The raw matrices start as random orthogonal ones. Their Cayley map turns by 45 degrees on average: P starts as a
    moderate random rotation. (official code) near_hadamard: P starts close to a Hadamard matrix, or to a random
    orthogonal one where there is none, which stays as a factor on the left. (our choice)"""

    def __init__(self, n, generator=None, near_hadamard=False):
        super().__init__()
        self.raw, self.s, self.first = nn.Parameter(torch.empty(2, n, n)), nn.Parameter(torch.ones(n)), None
        for raw in self.raw.data:
            nn.init.orthogonal_(raw, generator=generator)
        if near_hadamard:
            self.raw.data *= 0.02
            first = nn.init.orthogonal_(torch.empty(n, n), generator=generator)
            with contextlib.suppress(ValueError):
                first = hadamard(n)
            self.first = nn.Parameter(first, requires_grad=False)

    def forward(self):
        a = self.raw.tril()
        a, one = a - a.mT, torch.eye(len(self.s), dtype=a.dtype, device=a.device)  # antisymmetric
        u, v = torch.linalg.solve(one - a / 2, one + a / 2)  # (n, n) each
        u = u if self.first is None else self.first.to(u) @ u
        return (u * self.s) @ v.T, (u / self.s) @ v.T


class Fixed(nn.Module):
    """A matrix and its inverse transpose, as Invertible gives them, that are not learned (any more)."""

    def __init__(self, p, inverse):
        super().__init__()
        self.register_buffer("p", p.float().contiguous())
        self.register_buffer("inverse", inverse.float().contiguous())

    def forward(self):
        return self.p, self.inverse


def hadamard(n):
    """Orthogonal matrix with entries +-1/sqrt(n): Paley's constructions and doubling, for orders such as 1, 2, 12, 20,
    24, 28, 32, 36, 48. ValueError where these give none."""
    def prime(q):
        return q > 2 and all(q % d for d in range(2, math.isqrt(q) + 1))

    pair, q = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), n - 1 if prime(n - 1) else n // 2 - 1
    if n <= 2:
        return pair[:n, :n] / math.sqrt(n)
    if n % 4 == 0 and prime(q) and q % 4 == (3 if q == n - 1 else 1):
        square = {i * i % q for i in range(1, q)}
        chi = torch.tensor([0.0] + [1.0 if i in square else -1.0 for i in range(1, q)])
        conference = torch.zeros(q + 1, q + 1)  # C C^T = q I
        conference[1:, 1:] = chi[(torch.arange(q)[:, None] - torch.arange(q)) % q]
        conference[0, 1:], conference[1:, 0] = 1.0, chi[-1]  # symmetric for q = 1 mod 4, else skew
        if q == n - 1:
            return (conference + torch.eye(n)) / math.sqrt(n)
        mixed = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return (torch.kron(conference, pair) + torch.kron(torch.eye(n // 2), mixed)) / math.sqrt(n)
    if n % 2:
        raise ValueError(f"no Hadamard matrix of order {n} is known here")
    return torch.kron(pair, hadamard(n // 2)) / math.sqrt(2)


def hadamard_pair(n):
    """Two Hadamard matrices whose orders multiply to n, as equal as possible."""
    for n1 in (d for d in range(math.isqrt(n), 0, -1) if n % d == 0):
        with contextlib.suppress(ValueError):
            return hadamard(n1), hadamard(n // n1)
    raise ValueError(f"no pair of Hadamard matrices for {n} channels")


def random_signs(p, generator=None):
    """A random sign for each row of P: else its first column, nearly constant, adds up what channels share. (QuaRot)"""
    return torch.where(torch.rand(len(p), 1, generator=generator) < 0.5, -p, p)


class Round(torch.autograd.Function):
    """Round half to even; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def kept_range(x, clip=None):
    """Range (..., 1) of x (..., C), cut at sigmoid(clip) (..., 2): shares of the largest entry and of the smallest."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return (low, high) if clip is None else (clip[..., 1:].sigmoid() * low, clip[..., :1].sigmoid() * high)


def quantize_weight(w, bits, clip=None):
    """Codes (N, C) and scale (N, 1): symmetric, one scale a row, rows clipped by clip (N, 2). (official code)"""
    low, high = kept_range(w, clip)
    w = w if clip is None else torch.clamp(w, low, high)
    scale = torch.maximum(high.abs(), low.abs()).clamp(min=1e-5) / (2 ** (bits - 1) - 1)
    return Round.apply(w / scale), scale


def quantize_tokens(x, bits, clip=None):
    """Codes (..., C) and scale (..., 1): symmetric, one a token, range cut by clip (2,) and with 0. (official code)"""
    (low, high), top = kept_range(x, clip), 2 ** (bits - 1) - 1
    scale = torch.maximum(high, -low).clamp(min=0) / top
    scale = torch.where(scale == 0, 1.0, scale)
    return Round.apply(x / scale).clamp(-top - 1, top), scale


def fake_quantize_heads(x, bits, clip=None):
    """Keys or values (..., hd) on 2^bits levels: asymmetric, one range with 0 a token and head. (official code)"""
    if bits == 16:
        return x
    (low, high), top = kept_range(x, clip), 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    empty = (high == 0) & (low == 0)
    scale = torch.where(empty, 2.0, high - low) / top
    zero = (torch.where(empty, 1.0, -low) / scale).round()
    return scale * ((Round.apply(x / scale) + zero).clamp(0, top) - zero)


class WholeLinear(nn.Module):
    """A merged linear layer: whole numbers (N, C), one scale a row (N, 1), bias (N,) or None."""

    def __init__(self, codes, scale, bias, bits):
        super().__init__()
        self.register_buffer("codes", codes.to(torch.int8 if bits <= 8 else torch.float32))
        self.register_buffer("scale", scale.float())
        self.register_buffer("bias", None if bias is None else bias.float())


SITES = dict(attn=["q_proj", "k_proj", "v_proj"], o=["o_proj"], mlp=["gate_proj", "up_proj"], down=["down_proj"])
SITE_OF = {name: site for site, names in SITES.items() for name in names}


class QuantLayer(Layer):
    """A block whose linear layers round inputs and weights, after a transform that each arm fills in differently.

    A site is what some linear layers read: attn (q, k, v), o, mlp (gate, up), down. It has a pair P1, P2 and a scale c.
    Learned, o's P2 turns the values head by head and is merged into v_proj; one more P turns rotated queries and keys,
    if keys are rounded."""

    def __init__(self, shape, arm, cfg, generator=None):
        super().__init__(shape)
        self.requires_grad_(False)
        plan, self.cfg, pairs = PLAIN | ARMS[arm], cfg, {}
        sizes = {site: getattr(self, names[0]).in_features for site, names in SITES.items()}
        self.learned, keys = plan["rotation"] == "learned", [shape.head_dim] * (cfg.k_bits < 16)
        if self.learned:
            orders = {site: factor_pair(n) for site, n in sizes.items()}
            orders |= dict(o=(shape.n_head, shape.head_dim), key=keys)
            near = plan["near_hadamard"]
            pairs = {site: [Invertible(n, generator, near) for n in pair] for site, pair in orders.items() if pair}
        elif plan["rotation"] == "hadamard":
            fixed = {site: hadamard_pair(n) for site, n in sizes.items()} | dict(key=[hadamard(n) for n in keys])
            fixed = {site: [random_signs(p, generator) for p in pair] for site, pair in fixed.items() if pair}
            pairs = {site: [Fixed(p, p) for p in pair] for site, pair in fixed.items()}
        self.pairs = nn.ModuleDict({site: nn.ModuleList(pair) for site, pair in pairs.items()})
        self.kind = plan["c"]
        sites = dict(none=[], gain=["attn", "mlp"], learned=["attn", "mlp", "down"], smooth=SITES)[self.kind]
        self.c = nn.ParameterDict({site: torch.ones(sizes[site]) for site in sites}).requires_grad_(self.learned)
        rows = {name: getattr(self, name).out_features for name in SITE_OF} if plan["clip"] else {}
        self.clip_w = nn.ParameterDict({name: torch.full((n, 2), 4.0) for name, n in rows.items()})
        self.clip_a = nn.ParameterDict({name: torch.full((2,), 4.0) for name in ([*rows, "k", "v"] if rows else [])})

    def learned_numbers(self):
        """Name to tensor, of all that --load needs beside the checkpoint."""
        return {k: p.detach() for k, p in self.named_parameters() if k.startswith(("pairs", "c.", "clip"))}

    @torch.no_grad()
    def start_c(self, largest, alpha):
        """c per channel: max|W|^(1-alpha) / max|X|^alpha from largest |X| by site (C,). (official code)
        Hadamard: 1 / gain of the norm, which moves the gain into the weights behind it. (QuaRot)"""
        for site, c in self.c.items():
            weight = torch.cat([getattr(self, name).weight for name in SITES[site]])  # (N, C)
            c.copy_((weight.abs().amax(0) ** (1 - alpha) / largest[site].clamp(min=1e-5) ** alpha).clamp(min=1e-5))
            if self.kind == "gain":
                gain = (self.input_layernorm if site == "attn" else self.post_attention_layernorm).weight
                c.copy_(torch.where(gain.abs() < 1e-5, 1.0, 1 / gain))

    def materialise(self):
        """The matrices of this step, each solved for once: site to ((P1, P2), (P1^-T, P2^-T))."""
        self.now = {site: tuple(zip(*(p() for p in pair))) for site, pair in self.pairs.items()}

    def transform(self, site, x):
        """The input of a site (..., C) to x diag(c) P."""
        x = x * self.c[site] if site in self.c else x
        if site not in self.now:
            return x
        p1, p2 = self.now[site][0]
        if site == "o" and self.learned:  # its P2 came with the values
            return (p1.T @ x.unflatten(-1, (len(p1), -1))).flatten(-2)
        return kron_mm(x, p1, p2)

    def within_heads(self, rows):
        """Rows (KV hd, ...) of v_proj's weight or bias through o's P2, head by head. (official code)"""
        p2 = self.now["o"][0][1]  # (hd, hd)
        return (p2.T @ rows.reshape(-1, len(p2), rows[0].numel())).view(rows.shape)

    def rounded_weight(self, name):
        """Codes (N, C), scale (N, 1) and bias: W diag(c)^-1 P^-T, clipped; v_proj's heads are turned after clipping."""
        site, layer = SITE_OF[name], getattr(self, name)
        if isinstance(layer, WholeLinear):
            return layer.codes, layer.scale, layer.bias
        w, bias = layer.weight, layer.bias
        w = w * self.c[site].reciprocal() if site in self.c else w
        w = kron_mm(w, *self.now[site][1]) if site in self.now else w
        clip = self.clip_w.get(name) if self.cfg.w_bits < 16 else None
        if name == "v_proj" and self.learned:
            w, clip = w if clip is None else torch.clamp(w, *kept_range(w, clip)), None
            w, bias = self.within_heads(w), None if bias is None else self.within_heads(bias)
        if self.cfg.w_bits == 16:
            return w, torch.ones_like(w[:, :1]), bias
        return *quantize_weight(w, self.cfg.w_bits, clip), bias

    def rounded_input(self, site, x):
        """Codes (..., C) and scale (..., 1) of a site's input, for each linear layer that reads it."""
        clips, bits = [self.clip_a.get(name) for name in SITES[site]], self.cfg.a_bits
        if self.cfg.kernels:
            keep = torch.stack([torch.ones(2) if clip is None else clip.sigmoid().cpu() for clip in clips])  # (G, 2)
            p1, p2 = self.now[site][0]
            p2 = torch.eye(len(p2)).to(p2) if site == "o" and self.learned else p2
            packed, scales = load_kernel("kron_quant")(x.flatten(0, -2), p1, p2, keep.to(x.device))
            return [(a.unflatten(0, x.shape[:-1]), s.view(*x.shape[:-1], 1)) for a, s in zip(packed, scales)]
        x = self.transform(site, x)
        return [(x, torch.ones_like(x[..., :1])) if bits == 16 else quantize_tokens(x, bits, clip) for clip in clips]

    def linear(self, name, a, scale_a):
        """Rounded linear layer: a product of whole numbers, exact in fp32 below 2^24, times both scales."""
        w, scale_w, bias = self.rounded_weight(name)
        if self.cfg.kernels:
            rows = a.flatten(0, -2), scale_a.flatten(), w, scale_w.flatten()
            return load_kernel("int4_gemm")(*rows, bias, dtype=scale_a.dtype).unflatten(0, a.shape[:-1])
        y = F.linear(a, w.to(a.dtype)) * scale_a * scale_w.T
        return y if bias is None else y + bias

    def qkv(self, x):
        return [self.linear(name, *a) for name, a in zip(SITES["attn"], self.rounded_input("attn", x))]

    def heads(self, q, k, v):
        (p,), (inverse,) = self.now.get("key", ([None], [None]))
        if p is not None:
            q, k = q @ inverse, k @ p  # the scores stay the same
        k = fake_quantize_heads(k, self.cfg.k_bits, self.clip_a.get("k"))
        if p is None or self.learned:  # o's learned P2 turns the values already
            return q, k, fake_quantize_heads(v, self.cfg.v_bits, self.clip_a.get("v"))
        return q, k, fake_quantize_heads(v @ p, self.cfg.v_bits, self.clip_a.get("v")) @ inverse.T

    def out(self, a):
        return self.linear("o_proj", *self.rounded_input("o", a)[0])

    def mlp(self, x):
        gate, up = (self.linear(name, *a) for name, a in zip(SITES["mlp"], self.rounded_input("mlp", x)))
        return self.linear("down_proj", *self.rounded_input("down", F.silu(gate) * up)[0])

    def forward(self, x, *args, **options):
        self.materialise()
        return super().forward(x, *args, **options)

    @torch.no_grad()
    def merge(self):
        """Weights to whole numbers, in float64; c goes into the norms and the rows of up_proj, codes unchanged.
        On the meta device: the same form, empty, to load tensors into."""
        self.double().materialise()
        parts = {name: self.rounded_weight(name) for name in SITE_OF}
        for site, norm in dict(attn=self.input_layernorm, mlp=self.post_attention_layernorm).items():
            norm.weight *= self.c.pop(site) if site in self.c else 1.0
        if "down" in self.c:
            w, scale, bias = parts["up_proj"]
            parts["up_proj"] = w, scale * self.c.pop("down")[:, None], bias
        for name, part in parts.items():
            setattr(self, name, WholeLinear(*part, self.cfg.w_bits))
        self.pairs = nn.ModuleDict({site: nn.ModuleList(map(Fixed, *both)) for site, both in self.now.items()})
        self.clip_w = nn.ParameterDict()
        return self.float().requires_grad_(False)


def pack(codes):
    """Whole numbers -8..7 (N, C) to nibbles uint8 (N, C / 2), even channels low."""
    return (codes[:, ::2] & 15 | codes[:, 1::2] << 4).view(torch.uint8)


def unpack(packed):
    """Nibbles (N, C / 2) back to int8 (N, C)."""
    return torch.stack([(packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4], -1).flatten(1)


# ---------------------------------------------------------------- 5. Evaluation and claims
@torch.no_grad()
def run_block(block, x, turn):
    """The output of a block (N, L, d), four windows at a time; x and the output are on the CPU."""
    return torch.cat([block(part.to(turn[0]), turn).cpu() for part in x.split(4)])


@torch.no_grad()
def site_inputs(layer, x, turn):
    """By site what a block's linear layers read (N, L, C), for its input x (N, L, d)."""
    seen = {}
    hooks = [getattr(layer, names[0]).register_forward_pre_hook(lambda _, args, site=site: seen.update({site: args[0]}))
             for site, names in SITES.items()]
    layer(x, turn)
    for hook in hooks:
        hook.remove()
    return seen


def largest_inputs(layer, x, turn):
    """By site the largest |input| of each channel (C,), for the block's input x (N, L, d)."""
    parts = [site_inputs(layer, part.to(turn[0]), turn) for part in x.split(4)]
    return {site: torch.stack([part[site].abs().amax((0, 1)) for part in parts]).amax(0) for site in SITES}


def flatness(norms):
    """Largest norm of a channel over the mean: 1 is flat. norms (C,)."""
    return (norms.max() / norms.mean()).item()


@torch.no_grad()
def channel_norms(student, inputs):
    """By site the norms of the channels of the transformed input, and of the rounded weight, largest first (C,).
    For a block that is not merged yet."""
    student.materialise()
    curves = {}
    for site, names in SITES.items():
        x = inputs[site] * (student.c[site] if site in student.c else 1.0)
        x = kron_mm(x, *student.now[site][0]) if site in student.now else x
        weight = torch.cat([w * scale for w, scale, _ in map(student.rounded_weight, names)])  # (N, C)
        curves[site] = [a.flatten(0, -2).norm(dim=0).sort(descending=True).values.cpu() for a in (x, weight)]
    return curves


@torch.no_grad()
def window_nll(model, x, ids):
    """Mean negative log-likelihood of each window's tokens but the first: last block's output x (N, L, d) to (N,)."""
    logits = (model.head(part[:, :-1].to(model.norm.weight)) for part in x.split(2))  # (2, L - 1, V)
    losses = [F.cross_entropy(a.mT, b[:, 1:].to(a.device), reduction="none") for a, b in zip(logits, ids.split(2))]
    return torch.cat(losses).mean(1).cpu()


# Fixed before the first evidence run, from the paper's claims: id, statistic, threshold, what would refute it.
# "a - b" is the gap in nats a token over the same windows (8 or more), and its interval covers the windows, not the
# seeds; "flatness a / b" compares largest over mean channel norms of inputs, as a mean log over blocks and sites.
CLAIMS = [
    ("flatquant-beats-hadamard-lct", "hadamard_lct - flatquant", 0.0, "with equal thresholds Hadamard is as good"),
    ("flatquant-beats-hadamard-gain-lct", "hadamard_gain_lct - flatquant", 0.0, "the same with gains in the weights"),
    ("flatquant-hq-beats-flatquant", "flatquant - flatquant_hq", 0.0, "our start and inputs are no better"),
    ("flatquant-beats-hadamard", "hadamard - flatquant", 0.0, "Hadamard without learning is as good"),
    ("hadamard-beats-smoothquant", "smoothquant - hadamard", 0.0, "scaling channels is as good as rotating them"),
    ("flatquant-is-flatter", "flatness hadamard / flatquant", 0.0, "learned transforms are not flatter (Fig. 1)"),
    ("scaling-helps", "lt_lct - flatquant", 0.0, "c adds nothing to transform and thresholds (paper: 7.11 to 6.98)"),
    ("thresholds-help", "lt_ps - flatquant", 0.0, "thresholds add nothing (paper: 7.95 to 6.98)"),
]


def interval(x):
    """Mean of (n,) and its 95 % interval; from n = 8 on 1.96 + 2.8 / (n - 1) is Student's quantile, -0.2 to +0.7 %."""
    spread = (1.96 + 2.8 / (len(x) - 1)) * np.std(x, ddof=1) / math.sqrt(len(x))
    return np.mean(x), (np.mean(x) - spread, np.mean(x) + spread)


def statistics(nll, flat):
    """Claim id to (statistic, interval), where the arms it needs were run.

    nll: arm to (n_eval,); flat: arm to flatness of inputs by block and site."""
    found = {}
    for name, formula, *_ in CLAIMS if min(map(len, nll.values())) >= 8 else []:
        a, sign, b = formula.removeprefix("flatness ").split()
        table = nll if sign == "-" else {arm: np.log(x) for arm, x in flat.items()}
        if a in table and b in table:
            found[name] = interval(np.subtract(table[a], table[b]))
    return found


# ---------------------------------------------------------------- 6. Training
def train_tiny(cfg, run, shape, state):
    """Train the small Llama on half of the topics; returns it with outliers put in. state: {} for a new run."""
    torch.manual_seed(cfg.seed)
    model, step = Decoder(shape).to(run.device), 0
    for name, p in model.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(p, 0, 0.02)
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), 3e-3, (0.9, 0.95), fused=True)
    if "tiny" in state:
        step = state["step"]
        model.load_state_dict(state["tiny"])
        optimizer.load_state_dict(state["optimizer"])
    ids = torch.tensor(encode_bytes(documentation(2) + documentation(3)), device=run.device)
    log = Log(run, "tiny", cfg.steps, step)

    while step < cfg.steps:
        generator = torch.Generator().manual_seed(1_000_003 * cfg.seed + step)
        starts = torch.randint(len(ids) - cfg.seq_len, (8,), generator=generator)
        batch = ids[starts[:, None].to(run.device) + torch.arange(cfg.seq_len + 1, device=run.device)]  # (8, L + 1)
        lr = lr_at(step, 3e-3, 0.0, 50, cfg.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().mT, batch[:, 1:])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % cfg.log_every == 0:
            log(step, loss=loss.item(), gnorm=norm.item(), lr=lr)
        stop = should_stop(run)
        if stop or step % cfg.save_every == 0 or step == cfg.steps:
            save_state(run, tiny=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
        if stop:
            stopped(run)
    add_outliers(model, cfg.outliers, torch.Generator().manual_seed(cfg.seed))
    return model


def calibrate(student, x, y, turn, cfg):
    """Fit what an arm learns in one block: mean squared error between its output on the full-precision inputs
    x (N, L, d) and the full-precision outputs y, rounding switched on. Returns the last loss. (official code)"""
    fit = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if not fit:
        return None
    groups = [dict(params=[p for name, p in fit.items() if name.startswith("clip") == (rate == 10)], rate=rate)
              for rate in (1, 10)]  # thresholds learn ten times as fast
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    per_epoch = -(-len(x) // cfg.batch_size)
    for step in range(cfg.epochs * per_epoch):
        rows = slice(step % per_epoch * cfg.batch_size, (step % per_epoch + 1) * cfg.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, group["rate"] * cfg.lr, cfg.lr / 1000, 0, cfg.epochs * per_epoch + 1)
        loss = F.mse_loss(student(x[rows].to(turn[0]), turn), y[rows].to(turn[0]))
        (loss / loss.detach()).backward()  # the size of the error does not matter to Adam, but to half precision
        optimizer.step()
        optimizer.zero_grad()
    smallest = min((p.abs().min().item() for name, p in fit.items() if name.endswith(".s")), default=1.0)
    if not (smallest >= 1e-3 and loss.isfinite()):
        fail(f"calibration failed: loss {loss.item():.1e}, smallest |s| {smallest:.0e}; lower --lr")
    return loss.item()


def which_blocks(cfg, n_layer):
    """The blocks of --layers, all if it is not given."""
    first, last = map(int, (cfg.layers or f"0:{n_layer}").split(":"))
    return range(first, last) if first < last <= n_layer else fail(f"--layers {cfg.layers}: there are {n_layer} blocks")


def make_student(cfg, shape, arm, layer, index, largest=None, learned=None):
    """A block of an arm, ready to be calibrated or, with what was learned, to be merged."""
    generator = torch.Generator().manual_seed(1_000_003 * cfg.seed + index)  # by block: blocks are independent
    student = QuantLayer(shape, arm, cfg, generator)
    student.load_state_dict(layer.state_dict(), strict=False)
    student.to(layer.q_proj.weight.device)
    if learned is None:
        student.start_c(largest, 0.5 if arm == "smoothquant" else 0.3)
    else:
        student.load_state_dict(learned, strict=False)
    return student


def quantize_model(cfg, run, model, ids, state, given, began):
    """Block by block: calibrate each arm, merge it, measure it, and pass the held-out windows on.

    ids: calib and eval (N, L); given: "arm.block" to what an earlier run has learned. Returns streams (arm to the
    output of its last block on the held-out windows), learned, measured. Streams stay on the CPU."""
    arms, done, blocks = cfg.arms.split(","), state.get("block", 0), which_blocks(cfg, len(model.layers))
    with torch.no_grad():
        x, held = (model.embed_tokens(part.to(run.device)).cpu() for part in (ids["calib"], ids["eval"]))  # (N, L, d)
        turn = model.turn(torch.arange(x.shape[1], device=run.device)[None])
    streams, calib, learned, measured = (state.get(k, {}) for k in ("streams", "calib", "learned", "measured"))
    streams = streams or dict.fromkeys(arms, held)
    calib = calib or {arm: x for arm in arms if "rounded_inputs" in ARMS[arm]}
    log = Log(run, "blocks", len(model.layers), done)
    for i, layer in enumerate(model.layers[: blocks[-1] + 1]):
        layer.to(run.device)
        y, held_y, start = run_block(layer, x, turn), run_block(layer, held, turn), time.perf_counter()
        largest, inputs = largest_inputs(layer, x, turn), site_inputs(layer, held[:4].to(run.device), turn)
        for arm in arms if i >= done and i in blocks else []:
            key = f"{arm}.{i}"
            student = make_student(cfg, model.shape, arm, layer, i, largest, given.get(key))
            if key not in given:
                calibrate(student, calib.get(arm, x), y, turn, cfg)
            learned[key] = {k: p.clone() for k, p in student.learned_numbers().items()}
            curves = channel_norms(student, inputs)
            error = (run_block(student.merge(), held[:4], turn) - held_y[:4]).square().mean(-1)  # (4, L)
            measured[key] = dict(curves=curves, mse=error.mean().item(), median=error.median().item(),
                                 by_position=error.mean(0))
            for flow in (flow for flow in (streams, calib) if arm in flow):
                flow[arm] = run_block(student, flow[arm], turn)
        layer.cpu()
        x, held = y, held_y
        if i < done or i not in blocks:
            continue
        log(i + 1, seconds=time.perf_counter() - start, **{arm: measured[f"{arm}.{i}"]["mse"] for arm in arms})
        save_state(run, block=i + 1, streams=streams, calib=calib, learned=learned, measured=measured,
                   seconds=time.perf_counter() - began)
        if should_stop(run):
            stopped(run)
    return dict(reference=held) | streams, learned, measured


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


def read_config(folder):
    """config.json of a checkpoint, with the place of its tokenizer."""
    try:
        config = json.loads((folder / "config.json").read_text())
        read_shape(config)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        fail(f"{folder}/config.json: not one of a Llama or Qwen2 checkpoint: {error!r}")
    return config | dict(tokenizer=str(folder))


def network_config(cfg):
    return read_config(fetch_model(cfg.model, offline=cfg.dry_run)) if cfg.model else tiny_config(cfg)


def load_tiny(cfg, run, shape, state):
    """The small Llama with its outliers, trained at the first call of a run."""
    saved, model = run.out / "tiny.safetensors", Decoder(shape)
    if not saved.exists():
        replace_file(saved, export(train_tiny(cfg, run, shape, state)))
    model.load_state_dict(load_file(saved))
    return model


def read_learned(cfg):
    """Calibrated blocks of other runs: "arm.block" to what was learned; a block that is missing is calibrated here."""
    found, free = {}, "scale arms tag n_eval test_data layers device dtype log_every save_every out resume save load"
    for folder in map(Path, filter(None, cfg.load.split(","))):
        try:
            before = json.loads((folder / "config.json").read_text())
            changed = [k for k, v in asdict(cfg).items() if before.get(k, v) != v and k not in free.split()]
            for key, tensor in load_file(folder / "learned.safetensors").items():
                arm, block, name = key.split(".", 2)
                found.setdefault(f"{arm}.{int(block)}", {})[name] = tensor
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            fail(f"--load {folder}: no calibrated blocks there: {str(error).splitlines()[0]}")
        if changed:
            fail(f"--load {folder}: its blocks were calibrated with another {', '.join(changed)}")
    return found


def save_packed(cfg, model, learned, config):
    """The last arm with a rotation in four bits, in a directory; config.json says what it is."""
    arm, folder = [arm for arm in cfg.arms.split(",") if "rotation" in ARMS[arm]][-1], Path(cfg.save)
    full = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    folder.mkdir(parents=True, exist_ok=True)
    students = (make_student(cfg, model.shape, arm, layer, i, learned=learned[f"{arm}.{i}"])
                for i, layer in enumerate(model.layers))
    model.layers = nn.ModuleList(student.merge() for student in students)
    tensors = {k: pack(v) if k.endswith("codes") else v.contiguous() for k, v in model.state_dict().items()}
    replace_file(folder / "model.safetensors", save(tensors))
    for file in Path(config["tokenizer"]).glob("tokenizer*.json") if cfg.model else []:
        replace_file(folder / file.name, file.read_bytes())
    settings = dict(arm=arm, **{name: getattr(cfg, name) for name in BITS})
    config |= dict(flatquant=settings, tokenizer="tokenizer.json" if cfg.model else "")
    replace_file(folder / "config.json", json.dumps(config, indent=1).encode())
    size = (folder / "model.safetensors").stat().st_size / 2**20
    print(f"{folder}: {arm}, {size:.1f} MiB on disk, {full:.1f} MiB in fp32")


def generate_text(cfg):
    """Continue a prompt with the model that save_packed wrote."""
    folder = Path(cfg.load)
    try:
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        for name in BITS:
            setattr(cfg, name, config["flatquant"][name])
        with torch.device("meta"):
            model = Decoder(read_shape(config), functools.partial(QuantLayer, arm=config["flatquant"]["arm"], cfg=cfg))
            for layer in model.layers:
                layer.merge()
        tensors = {k: unpack(v) if k.endswith("codes") else v for k, v in tensors.items()}
        model.load_state_dict(tensors, assign=True)
        tokenizer = load_tokenizer(folder) if config["tokenizer"] else BYTES
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        fail(f"--load {folder}: not a directory made by --save: {str(error).splitlines()[0]}")
    if cfg.kernels and cfg.a_bits != 4:
        fail(f"--kernels: {folder} rounds inputs to {cfg.a_bits} bits, the kernels to 4")
    for whole in (m for m in model.modules() if isinstance(m, WholeLinear) and cfg.kernels):
        whole.codes = pack(whole.codes)
    began, auto = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    model.to(auto if cfg.device == "auto" else cfg.device)
    new = generate(model.eval(), [tokenizer.encode(cfg.generate)], cfg.max_new, [tokenizer.eos])[0]
    rate = len(new) / (time.perf_counter() - began)
    print(cfg.generate + tokenizer.decode(new))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{rate:.1f} tokens/s, peak memory {peak:.2f} GiB", file=sys.stderr)


LLAMA_3_8B = dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=8, vocab_size=128256)


def dry_run(cfg):
    """What a run takes, without allocating a network; the paper's scale without --model is LLaMA-3-8B."""
    paper = cfg.scale == "paper" and not cfg.model
    shape, tokens = read_shape(LLAMA_3_8B if paper else network_config(cfg)), cfg.n_calib * cfg.seq_len
    for arm in cfg.arms.split(","):
        with torch.device("meta"):
            student = QuantLayer(shape, arm, cfg)
        fit, total = (sum(p.numel() for p in student.parameters() if p.requires_grad or kind) for kind in (0, 1))
        weights = total - sum(p.numel() for p in student.learned_numbers().values())
        flops = shape.n_layer * tokens * weights * (2 + 6 * cfg.epochs * bool(fit))
        memory = 4 * (3 * weights + 4 * fit + 2 * shape.vocab_size * shape.n_embd) / 2**30
        print(f"{arm}: {shape.n_layer} blocks of {weights:,} weights and {fit:,} learned numbers, {flops:.2e} FLOPs, "
              f"{memory:.1f} GiB and activations, {flops / 50e12 / 3600:.2f} hours on one H100")
    print(f"{tokens:,} tokens; assumed: 50 TFLOP/s in fp32, one block and its twin at a time, no evaluation")


def ledger(cfg, model, ids):
    """Measure a step of each learned arm on the first block, and say what the calibration will take."""
    total, steps, x = 0.0, -(-cfg.n_calib // cfg.batch_size) * cfg.epochs, model.embed_tokens(ids[: cfg.batch_size])
    turn, layer = model.turn(torch.arange(x.shape[1], device=x.device)[None]), model.layers[0].to(x.device)
    y, largest = run_block(layer, x, turn), largest_inputs(layer, x, turn)
    for arm in (arm for arm in cfg.arms.split(",") if "clip" in ARMS[arm] or "learned" in ARMS[arm].values()):
        student = make_student(cfg, model.shape, arm, layer, 0, largest)
        step = functools.partial(calibrate, student, x, y, turn, dataclasses.replace(cfg, epochs=1))
        seconds = min(timeit.repeat(step, number=1, repeat=3))
        print(f"{arm}: {len(model.layers)} blocks x {steps} steps x {1e3 * seconds:.0f} ms")
        total += len(model.layers) * steps * seconds / 60
    print(f"calibration will take about {total:.1f} minutes, evaluation not counted"
          + ", more than the 10 minutes of --scale small" * (cfg.scale == "small" and total > 10), flush=True)


def plot_flatness(path, measured, arms, block):
    """Channel norms of one block, largest first: transformed inputs above, rounded weights below (Fig. 1)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    grid = figure.subplots(2, 4)
    for column, site in enumerate(SITES):
        for row, what in enumerate(("input", "weight")):
            for arm in arms:
                curve = measured[f"{arm}.{block}"]["curves"][site][row]
                grid[row, column].plot((curve / curve.mean()).numpy(), label=arm)
            grid[row, column].set(title=f"block {block}, {site} {what}", yscale="log")
    grid[0, 0].legend(fontsize="small")
    figure.supylabel("channel norm / mean")
    figure.savefig(path, dpi=90)


def plot_errors(path, measured, arms, n_layer):
    """Squared error of each block by position, log10; the last panel divides the first arm by the last (Fig. 2)."""
    from matplotlib.figure import Figure

    surfaces = {arm: torch.stack([measured[f"{arm}.{i}"]["by_position"] for i in range(n_layer)]) for arm in arms}
    surfaces[f"{arms[0]} / {arms[-1]}"] = surfaces[arms[0]] / surfaces[arms[-1]]
    figure = Figure(figsize=(3.2 * len(surfaces), 3), layout="constrained")
    for axes, (name, surface) in zip(figure.subplots(1, len(surfaces), sharey=True), surfaces.items()):
        figure.colorbar(axes.imshow(surface.clamp(min=1e-12).log10().numpy(), aspect="auto"), ax=axes)
        axes.set(title=name, xlabel="position", ylabel="block" if name == arms[0] else "")
    figure.savefig(path, dpi=90)


# ---------------------------------------------------------------- 8. Main
def print_table(metrics):
    columns = list(dict.fromkeys(key.split("/")[1] for key in metrics))
    print(f"{'':14}" + "".join(f"{column:>14}" for column in columns))
    for arm in dict.fromkeys(key.split("/")[0] for key in metrics):
        cells = (f"{metrics[f'{arm}/{column}']:.5g}" if f"{arm}/{column}" in metrics else "" for column in columns)
        print(f"{arm:14}" + "".join(f"{cell:>14}" for cell in cells))


def summarise(nll, measured, n_layer):
    """Metrics by arm: perplexity on all windows and on the first eight; means over blocks of error and flatness."""
    metrics, flat = {}, {}
    for arm, losses in nll.items():
        metrics |= {f"{arm}/ppl": math.exp(losses.mean()), f"{arm}/ppl8": math.exp(losses[:8].mean())}
        if arm != "reference":
            blocks = [measured[f"{arm}.{i}"] for i in range(n_layer)]
            flat[arm], weights = zip(*(map(flatness, pair) for block in blocks for pair in block["curves"].values()))
            found = dict(mse=[block["mse"] for block in blocks], median_mse=[block["median"] for block in blocks],
                         flat_inputs=flat[arm], flat_weights=weights)
            metrics |= {f"{arm}/{name}": float(np.mean(values)) for name, values in found.items()}
    return metrics, flat


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = cli(Config, SCALES, argv)
    if cfg.dry_run:
        return dry_run(cfg)
    if cfg.kernels and not torch.cuda.is_available():
        fail("--kernels needs a CUDA device; without the flag the same run takes plain PyTorch")
    if cfg.generate:
        return generate_text(cfg)
    texts = dict(calib=read_text(cfg.data, "--data") if cfg.data else documentation(0),
                 eval=read_text(cfg.test_data, "--test-data") if cfg.test_data else documentation(1))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("blocks are independent: start one process for each --layers a:b, and merge them with --load")
    config, counts = network_config(cfg), dict(calib=cfg.n_calib, eval=cfg.n_eval)
    tokenizer, shape = load_tokenizer(Path(config["tokenizer"])) if cfg.model else BYTES, read_shape(config)
    ids = {part: windows(text, tokenizer.encode, cfg.seq_len, counts[part], f"the {part} text",
                         cfg.seed if part == "calib" else 0) for part, text in texts.items()}
    which_blocks(cfg, shape.n_layer)
    given, loaded = read_learned(cfg), load_real(Path(config["tokenizer"])) if cfg.model else None
    if cfg.save and Path(cfg.save, "config.json").exists() and not cfg.resume:
        fail(f"--save {cfg.save}: holds a model")
    run, began = start_run(cfg, "flatquant"), time.perf_counter()
    state = load_state(run)
    began -= state.get("seconds", 0.0)
    model = (loaded or load_tiny(cfg, run, shape, state)).requires_grad_(False)
    for part in (model.embed_tokens, model.norm, model.lm_head or model.norm):
        part.to(run.device)  # the blocks follow one by one
    ledger(cfg, model, ids["calib"].to(run.device))
    streams, learned, measured = quantize_model(cfg, run, model, ids, state, given, began)
    tensors = {f"{key}.{name}": x.contiguous() for key, part in learned.items() for name, x in part.items()}
    replace_file(run.out / "learned.safetensors", save(tensors))
    if cfg.layers:
        (run.out / "state.pt").unlink(missing_ok=True)
        return print(f"{run.out / 'learned.safetensors'}: blocks {cfg.layers}; give their directories to --load")
    nll = {arm: window_nll(model, x, ids["eval"]).double().numpy() for arm, x in streams.items()}
    metrics, flat = summarise(nll, measured, len(model.layers))
    print_table(metrics)
    plot_flatness(run.out / "plot.png", measured, cfg.arms.split(","), len(model.layers) // 2)
    plot_errors(run.out / "mse.png", measured, cfg.arms.split(","), len(model.layers))
    if cfg.save:
        save_packed(cfg, model, learned, config)
    digest = hashlib.sha256(repr({part: x.tolist() for part, x in ids.items()}).encode()).hexdigest()
    record = dict(tried={arm: TRIED[arm] for arm in cfg.arms.split(",")}, metrics=metrics, data_sha256=digest)
    record |= dict(minutes=(time.perf_counter() - began) / 60)
    return report(cfg, run, "flatquant", argv, statistics(nll, flat), CLAIMS, **record)


if __name__ == "__main__":
    from_shell(main)
