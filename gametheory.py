# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "safetensors", "tqdm", "matplotlib"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""gametheory.py: Why pre-training is beneficial for downstream classification tasks?
Jiang, Cheng, Li, 2024, arXiv 2410.08455

What a network says of an input is a sum of interactions, one number I(S) for each set S of its parts, exact on every
masked copy. The paper sorts those of a pre-trained network into what fine-tuning keeps, drops and adds: little is kept,
and a network trained from scratch learns only some of that; this is why pre-training helps and speeds up training.

  python gametheory.py    # 5 worlds of known concepts; with --seeds 20, 13 min: fine-tuning discards 0.81
  python gametheory.py --task shapes    # drawn outlines, a CNN, 9 parts, 7 min: it discards 0.25
  python gametheory.py --explain 3      # the strongest interactions of held-out input 3, after the first of these
  python gametheory.py --callable module:function --explain input.npy    # those of any network
  python gametheory.py --scale paper --task images --data DIR --load vit.safetensors    # a ViT and folders of pictures

Symbols (S inputs, n players: parts of an input, 2^n sets; bit i of a set's index: player i is in it)
  paper         code        shape        meaning
  v(x_T)        v           (S, 2^n)     log p / (1 - p) of the class where only the players of T are there
  I(S|x)        moebius(v)  (S, 2^n)     AND interaction: what S adds that no smaller set explains
  I_pre, I_ft   a, f        (S, 2^n)     of the pre-trained network with a linear probe, and of the fine-tuned one
  I_scratch     s           (S, 2^n)     of one of random start, trained on the same data
  K_preserve    kept        (S, 2^n)     min(|a|, |f|) where the signs agree; K_discard, K_new: |a|, |f| less that
  m             order       (2^n,)       number of players of a set

An arm is a pre-training: related (the task is made of it in part), disjoint (other concepts), random (random labels).

Differences from the paper, of which the abstract, summaries and reviews were at hand, not the text
  formulas    those of what is kept, dropped and new, and of scratch's share r of what is kept, are inferred.
  data        worlds with known concepts and drawn outlines beside folders of pictures, for CUB, Cars, CIFAR-10, SST-2;
              small networks and a ViT for VGG, ResNet, ViT, BERT. Held-out inputs of concepts show states of the
              players that no training shows. Pictures are not augmented.
  absent      players of a concept world look like state 0, so that masked inputs are like others; pictures: zero.
  head        fine-tuning starts at the probe, so that the pre-trained network is its checkpoint 0, to the bit.
  salient     above 0.05 of an input's largest and three noise floors of its order; names in _all: no threshold.
  and-or      one split into AND and OR for all networks compared (group norm, ADMM); the school's SGD finds one for
              each. No q, which would hide 4 % of the output.
  left out    text, VGG and ResNet (--callable takes any network), learned baselines.

Copy out: moebius, values with masked and logodds, decompose, sparsify, shapley
"""

import argparse
import ast
import copy
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
from pathlib import Path
from types import SimpleNamespace

import numpy as np
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
    task: str = "concepts"  # concepts|tiles|shapes|images: tokens or tiles with known concepts, drawn outlines, --data
    scale: str = "small"  # smoke|small|long|paper: a row of SCALES below; explicit flags win over it
    arms: str = "related,disjoint,random"  # comma list of pre-trainings; from scratch is always trained beside them
    tag: str = "main"  # name of this variant in the RESULT record
    seed: int = 0  # seed of the first world
    seeds: int = 5  # worlds: each has its own concepts, inputs and weights
    # data
    data: str = ""  # images: directory with train/CLASS/*.jpg and test/CLASS/*.jpg, of any size, jpg or png
    image_size: int = 224  # images: pixels of a side after scaling the shorter one and cutting out the middle
    n_players: int = 8  # parts of an input that are masked; pictures: 9 or 16 (paper: not known)
    n_train: str = "50,150,400,1600"  # comma list of sizes of the downstream training set
    n_eval: int = 32  # held-out inputs whose interactions are taken, for each world (paper: 2 a class)
    n_test: int = 1000  # held-out inputs for accuracy
    noise: float = 0.3  # standard deviation of the noise on an input
    # model
    arch: str = "mlp"  # mlp|transformer: for --task concepts; tiles and shapes have a CNN, images a ViT
    patch: int = 16  # images: pixels of a side of the ViT's patches
    n_layer: int = 3  # layers; the CNN has three
    n_head: int = 4  # attention heads of the transformer
    n_embd: int = 128  # width (paper: networks of 21 M parameters and more)
    # training
    steps: int = 2500  # optimizer steps of pre-training
    batch_size: int = 256  # inputs in one optimizer step of pre-training
    lr: float = 1e-2  # peak learning rate of pre-training; all rates rise for a tenth of the steps, then cosine to 0
    epochs: str = "0,1,2,3,4,6,8,12,16,24,32,40"  # passes over the downstream data at which interactions are taken
    batch_fine: int = 16  # inputs in one optimizer step downstream
    lr_fine: float = 1e-2  # peak learning rate of fine-tuning
    lr_scratch: float = 1e-2  # peak learning rate from scratch
    smoothing: float = 0.1  # label smoothing downstream: log-odds would grow without bound
    weight_decay: float = 0.01  # AdamW; betas are PyTorch's
    # interactions
    tau: float = 0.05  # an interaction is salient above this share of its input's largest (paper: not known)
    interactions: str = "and"  # and|and-or: AND alone, or the sparsest mixture of AND and OR
    mask_batch: int = 8192  # masked inputs in one forward pass
    # explain
    explain: str = ""  # number of a held-out input, or with --callable a file .npy: list its interactions and stop
    load: str = ""  # images: the pre-trained ViT, safetensors; with --explain the network, "" = one that --out has
    callable: str = ""  # module:function that returns a model, players and a baseline, see explain below
    # machine
    device: str = "auto"  # auto|cpu|cuda: auto is cuda if there is one; mps has no fp64
    dtype: str = "float32"  # float32|float64: bf16 would drown interactions of high order in noise
    kernels: bool = False  # Triton kernels moebius, masked_blend (cuda only; compared with PyTorch at first use)
    # running
    log_every: int = 100  # steps between two lines of log.jsonl
    save_every: int = 1000  # steps between two checkpoints of the run
    out: str = ""  # output directory; "" = out/gametheory/TASK-SCALE[-TAG]-sSEED
    resume: bool = False  # continue an interrupted run: the same command with this flag
    dry_run: bool = False  # print parameters, FLOPs, memory and hours, and stop

    def __post_init__(self):
        arms = self.arms.split(",")
        if not set(arms) <= set(ARMS) or len(set(arms)) < len(arms):
            fail(f"--arms {self.arms}: a comma list, each once, out of {', '.join(ARMS)}")
        for flag, text in (("n-train", self.n_train), ("epochs", self.epochs)):
            if not re.fullmatch(r"\d+(,\d+)*", text) or numbers(text) != sorted(set(numbers(text))):
                fail(f"--{flag} {text}: rising numbers, as in 50,150")
        if numbers(self.n_train)[0] < 10:
            fail(f"--n-train {self.n_train}: at least 10, a fifth of which chooses the probe's penalty")
        if numbers(self.epochs)[0] or numbers(self.epochs) == [0]:
            fail(f"--epochs {self.epochs}: from 0, the pre-trained network, to the last one, as in 0,1,40")
        # numbers are at least 0 where listed here, else at least 1, and some have an upper limit
        zeros = "seed noise weight_decay lr lr_fine lr_scratch smoothing tau".split()
        most = dict(tau=0.99, smoothing=0.9)
        for name, value in vars(self).items():
            low, high = int(name not in zeros), most.get(name, math.inf)
            if not isinstance(value, (str, bool)) and not (low <= value <= high and value < math.inf):
                limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                fail(f"--{name.replace('_', '-')} {value}: must be {limits}")
        sizes = dict(concepts=range(8, 17), tiles=range(8, 17, 2), shapes=(9, 16), images=(9, 16))[self.task]
        if self.n_players not in sizes:
            fail(f"--n-players {self.n_players}: --task {self.task} takes {', '.join(map(str, sizes))}")
        heads = self.task == "images" or self.task == "concepts" and self.arch == "transformer"
        if heads and self.n_embd % self.n_head or self.n_embd < 4:
            fail(f"--n-embd {self.n_embd}: at least 4, and for a transformer a multiple of --n-head {self.n_head}")
        if self.load and self.task != "images" and not self.explain:
            fail("--load is for --explain, and for --task images")
        if self.scale == "paper" and self.task != "images":
            fail("--scale paper: the published kind of run is --task images --data DIR --load vit.safetensors")
        if self.task == "images":
            self.check_images()
        if self.callable and not (self.explain and re.fullmatch(r"[\w.]+:\w+", self.callable)):
            fail(f"--callable {self.callable}: write module:function, and --explain FILE.npy for the input")
        if self.explain and not self.callable and not (self.explain.isdecimal() and int(self.explain) < self.n_eval):
            fail(f"--explain {self.explain}: a held-out input from 0 to {self.n_eval - 1}, or FILE.npy and --callable")


    def check_images(self):
        if self.arms != "related":
            fail(f"--arms {self.arms}: images have one pre-training, that of --load: --arms related")
        if self.image_size % self.patch or self.kernels and self.image_size % math.isqrt(self.n_players):
            fail(f"--image-size {self.image_size}: must be a multiple of --patch {self.patch}, and for --kernels of "
                 f"{math.isqrt(self.n_players)}, players in a row")
        if self.dry_run:
            return
        train, test = (picture_files(self.data, part) for part in ("train", "test"))
        if len({file.parent.name for file in train}) < 2 or not test:
            fail(f"--data {self.data}: needs pictures train/CLASS/*.jpg or *.png of two classes, and test/CLASS/*")
        if strange := {file.parent.name for file in test} - {file.parent.name for file in train}:
            fail(f"--data {self.data}: test/{min(strange)} is a class that train does not have")
        if numbers(self.n_train)[-1] > len(train) or self.n_eval > len(test):
            fail(f"--data {self.data}: has {len(train)} pictures to train and {len(test)} to test, fewer than "
                 f"--n-train {self.n_train} or --n-eval {self.n_eval}")
        if not self.load and not self.explain:
            fail("--task images needs --load vit.safetensors, the weights of a pre-trained ViT")


ARMS = "related", "disjoint", "random"
PICTURES = dict(seeds=3, n_train="50,150,400", n_eval=16, n_embd=32, steps=1500, batch_size=128)
PICTURES |= dict(epochs="0,1,2,4,8,16,40", lr_fine=3e-3, lr_scratch=3e-3)
PICTURES |= dict(mask_batch=256)  # what a CNN makes of 8192 leaves a CPU's caches: half as many a second
OUTLINES = dict(PICTURES, n_players=9, noise=0.1, lr_fine=3e-4, lr_scratch=1e-3)
VIT = dict(arms="related", n_players=9, n_layer=12, n_head=6, n_embd=384)  # ViT-S; ViT-B: --n-embd 768 --n-head 12
VIT |= dict(lr_fine=1e-4, lr_scratch=5e-4)
SCALES = {  # "scale" and "scale:task"; explicit flags win
    "smoke": dict(seeds=2, n_train="20,40", n_eval=8, n_test=64, n_embd=16, steps=20, batch_size=32, epochs="0,1,3",
                  log_every=5, save_every=10),
    "smoke:shapes": dict(n_players=9),
    "smoke:images": dict(arms="related", n_players=9, n_layer=1, n_head=2, image_size=24, patch=8),
    "small": {},
    "small:tiles": PICTURES,
    "small:shapes": OUTLINES,
    "small:images": dict(VIT, seeds=1, n_train="400", n_eval=16, epochs="0,1,2,4,8", mask_batch=256),
    "long": dict(n_players=10, n_eval=64, steps=5000),
    "long:tiles": dict(PICTURES, n_players=10, steps=5000),
    "long:shapes": dict(OUTLINES, n_embd=64, steps=5000),
    "long:images": dict(VIT, mask_batch=256),
    "paper": {},
    "paper:images": dict(VIT, seeds=3, n_train="400,1600,5994", epochs="0,1,2,4,8,16,32,64,100", n_eval=200,
                         n_test=10000, batch_fine=128, mask_batch=1024),  # sizes of CUB
}
TRIED = dict(related=14, scratch=8)  # configurations tried for an arm, on worlds that are not reported: rates; of
# pictures at most six. disjoint and random have related's


def numbers(text):
    return [int(x) for x in text.split(",")]


# ---------------------------------------------------------------- 2. Data
def generator(*key):
    """Random numbers that depend on the key alone, so that a continued run draws what an uninterrupted one draws."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


class Concepts:
    """Inputs whose n players are each in state 0 or 1, and labels made of AND concepts: is a set of players all 1?

    Pre-training asks 26 such questions. The downstream class is whether a weighted sum of seven of their concepts,
    `useful`, and of three `fresh` ones is above its median. Arm disjoint asks for 26 other concepts, random for 26
    coins thrown for each state. A quarter of the states is held out of all training. A player is a token of 8 numbers,
    or for tiles 8 x 8 pixels; its two states have two codes. Absent players look like state 0, so that a masked copy
    is an input like those of training and its class is known."""

    def __init__(self, cfg, arm, seed):
        n, g = cfg.n_players, generator("world", seed)
        self.noise, self.tiles, index = cfg.noise, cfg.task == "tiles", torch.arange(2**n)
        by_order = [index[order_of(index) == m][torch.randperm(math.comb(n, m), generator=g)] for m in range(1, 5)]
        counts = 4, 8, 8, 6
        related = torch.cat([sets[:count] for sets, count in zip(by_order, counts)])
        other = torch.cat([sets[count : 2 * count] for sets, count in zip(by_order, counts)])
        self.fresh = torch.stack([sets[-1] for sets in by_order[1:]])
        self.useful = related[torch.randperm(len(related), generator=g)[:7]]
        self.unused = related[~torch.isin(related, self.useful)]
        total = holds(index, torch.cat([self.useful, self.fresh])) @ torch.randn(10, generator=g)
        self.answer = (total > total.median()).long()  # (2^n,) class of each state
        self.asked = holds(index, other if arm == "disjoint" else related)  # (2^n, 26)
        if arm == "random":
            self.asked = torch.rand(2**n, 26, generator=generator("coins", seed)).lt(0.3).float()
        self.held, self.seen = torch.randperm(2**n, generator=g).tensor_split([2**n // 4])
        self.classes, self.labels = 2, 26
        self.code = torch.randn(2, 8, generator=g)
        if self.tiles:  # upright and level stripes
            wave = torch.sin(torch.arange(8) * math.pi / 2 + 0.5).expand(8, 8)
            self.code = torch.stack([wave, wave.T]).flatten(1)  # (2, 64)
        self.baseline = self.arrange(self.code[:1].expand(1, n, -1))[0]
        self.player = self.arrange(torch.arange(n)[None, :, None].expand(1, n, self.code.shape[1]))[0]

    def arrange(self, x):
        """Players' codes (B, n, D) as an input: as they are, or tiles in two rows, (B, 1, 16, 4 n)."""
        if self.tiles:
            x = x.unflatten(2, (8, 8)).unflatten(1, (2, -1)).transpose(2, 3).flatten(3).flatten(1, 2)[:, None]
        return x

    def show(self, state, g):
        """Inputs (B, ...) in these states (B,)."""
        codes = self.code[state[:, None] >> torch.arange(self.player.max() + 1) & 1]  # (B, n, D)
        return self.arrange(codes + self.noise * torch.randn(codes.shape, generator=g))

    def before(self, count, g):
        """A batch of pre-training: inputs x and targets, here the answers (B, 26)."""
        state = self.seen[torch.randint(len(self.seen), (count,), generator=g)]
        return dict(x=self.show(state, g), target=self.asked[state])

    def after(self, count, g, held=False):
        """Inputs of the downstream task, for training or held out, and their classes (B,)."""
        states = self.held if held else self.seen
        state = states[torch.randint(len(states), (count,), generator=g)]
        return dict(x=self.show(state, g), target=self.answer[state])


def holds(state, sets):
    """1 where all players of a set are 1: states (B,) and sets (C,) as bit masks to (B, C)."""
    return (state[:, None] & sets == sets).float()


def players_of_grid(side, size):
    """Which of side x side players a pixel of a picture (1, size, size) belongs to."""
    row = torch.arange(size) * side // size
    return (row[:, None] * side + row)[None]


class Shapes:
    """Pictures of one outline each, filled or hollow: five polygons, five flowers, anywhere, of any size and angle.

    Pre-training names the outline. The four downstream classes are pentagon or hexagon, filled or hollow: the second
    question is new. Arm disjoint has no pentagons and hexagons, random has 500 pictures with random names."""

    def __init__(self, cfg, arm, seed):
        self.noise, self.side, self.classes, self.labels = cfg.noise, math.isqrt(cfg.n_players), 4, 10
        g, self.outlines = generator("world", seed), torch.tensor([0, 1, 4, 5, 6, 7, 8, 9, 2, 3])
        self.outlines = self.outlines[: 8 if arm == "disjoint" else 10]
        self.pool, self.names = None, torch.randint(10, (500,), generator=g)
        if arm == "random":
            self.pool = self.draw(torch.randint(10, (500,), generator=g), torch.rand(500, generator=g) < 0.5, g)
        self.baseline, self.player = torch.zeros(1, 24, 24), players_of_grid(self.side, 24)

    def draw(self, outline, hollow, g):
        """Pictures (B, 1, 24, 24) of outlines (B,): 0 to 4 polygons of 3, 4, 5, 6, 8 sides, 5 to 9 flowers."""
        u = torch.rand(len(outline), 4, 1, 1, generator=g)
        size, turn, centre = 6 + 4 * u[:, 0], 2 * math.pi * u[:, 1], 9 + 5 * u[:, 2:]
        at = torch.arange(24.0)
        dy, dx = at[:, None] - centre[:, 0], at - centre[:, 1]  # (B, 24, 1), (B, 1, 24)
        angle = (torch.atan2(dy, dx) + turn) % (2 * math.pi)  # (B, 24, 24)
        k = torch.tensor([3.0, 4, 5, 6, 8, 3, 4, 5, 6, 7])[outline][:, None, None]
        polygon = torch.cos(math.pi / k) / torch.cos(angle % (2 * math.pi / k) - math.pi / k)
        edge = size * torch.where((outline < 5)[:, None, None], polygon, 0.7 + 0.3 * torch.cos(k * angle))
        distance = (dy.square() + dx.square()).sqrt()
        ink = torch.sigmoid(3 * (edge - distance))
        ink = ink - hollow[:, None, None] * torch.sigmoid(3 * (0.6 * edge - distance))
        return (ink + self.noise * torch.randn(ink.shape, generator=g))[:, None]

    def before(self, count, g):
        if self.pool is not None:
            pick = torch.randint(len(self.pool), (count,), generator=g)
            return dict(x=self.pool[pick], target=self.names[pick])
        outline = self.outlines[torch.randint(len(self.outlines), (count,), generator=g)]
        return dict(x=self.draw(outline, torch.rand(count, generator=g) < 0.5, g), target=outline)

    def after(self, count, g, held=False):
        target = torch.randint(4, (count,), generator=g)
        return dict(x=self.draw(2 + target % 2, target >= 2, g), target=target)


def picture_files(folder, part):
    files = sorted(Path(folder).glob(f"{part}/*/*")) if folder else []
    return [file for file in files if file.suffix.lower() in (".png", ".jpg", ".jpeg")]


class Images:
    """Pictures of DIR/train/CLASS/ and DIR/test/CLASS/, channels from -1 to 1; they are read when they are drawn."""

    def __init__(self, cfg, arm, seed):
        self.size, self.files = cfg.image_size, [picture_files(cfg.data, part) for part in ("train", "test")]
        self.names = sorted({file.parent.name for file in self.files[0]})
        self.classes = self.labels = max(2, len(self.names))
        self.player = players_of_grid(math.isqrt(cfg.n_players), self.size).expand(3, -1, -1)
        self.baseline = torch.zeros(3, self.size, self.size)

    def after(self, count, g, held=False):
        files = self.files[held]
        files = [files[i] for i in torch.randperm(len(files), generator=g)[:count].tolist()]
        target = torch.tensor([self.names.index(file.parent.name) for file in files])
        return dict(x=torch.stack([self.read(file) for file in files]), target=target)

    def read(self, file):
        """(3, size, size): the shorter side is scaled to size, and the middle cut out."""
        from matplotlib.image import imread

        try:
            pixels = np.atleast_3d(imread(file))  # (H, W, channels): floats, or bytes
        except (OSError, ValueError, SyntaxError) as error:
            fail(f"{file}: not a picture: {error}")
        x = torch.from_numpy(pixels / (255 if pixels.dtype == np.uint8 else 1)).float().movedim(2, 0)
        x = (x[:3] if len(x) > 2 else x[:1].expand(3, -1, -1))[None]  # without transparency
        scale = self.size / min(x.shape[2:])
        sides = [max(self.size, round(side * scale)) for side in x.shape[2:]]
        x = F.interpolate(x, sides, mode="bicubic", antialias=True)[0]
        top, left = ((side - self.size) // 2 for side in sides)
        return 2 * x[:, top : top + self.size, left : left + self.size].clamp(0, 1) - 1


def make_world(cfg, arm, seed):
    return dict(shapes=Shapes, images=Images).get(cfg.task, Concepts)(cfg, arm, seed)


# ---------------------------------------------------------------- 3. Model
class Network(nn.Module):
    """Backbone, inputs (B, ...) to features (B, d), and a linear head to logits (B, outputs)."""

    def __init__(self, cfg, outputs):
        super().__init__()
        d, n, self.position, self.start = cfg.n_embd, cfg.n_players, None, None
        if cfg.task in ("tiles", "shapes"):
            height, width = (24, 24) if cfg.task == "shapes" else (16, 4 * n)
            convs = [m for c, e, step in ((1, d // 4, 1), (d // 4, d // 2, 2), (d // 2, d // 2, 2))
                     for m in (nn.Conv2d(c, e, 3, step, 1), nn.ReLU())]
            last = nn.Linear(d // 2 * height * width // 16, d)
            self.backbone = nn.Sequential(*convs, nn.Flatten(), last, nn.ReLU())
        elif cfg.task == "concepts" and cfg.arch == "mlp":
            sizes = [8 * n] + cfg.n_layer * [d]
            layers = [m for pair in zip(sizes, sizes[1:]) for m in (nn.Linear(*pair), nn.ReLU())]
            self.backbone = nn.Sequential(nn.Flatten(), *layers)
        else:
            self.embed = nn.Linear(8, d)
            if cfg.task == "images":  # a ViT: patches are tokens, and a first one that stands for the whole picture
                n, self.embed = (cfg.image_size // cfg.patch) ** 2 + 1, nn.Conv2d(3, d, cfg.patch, cfg.patch)
                self.start = nn.Parameter(torch.zeros(1, 1, d))
            self.position, self.norm = nn.Parameter(0.02 * torch.randn(1, n, d)), nn.LayerNorm(d, 1e-6)
            layer = functools.partial(nn.TransformerEncoderLayer, d, cfg.n_head, 4 * d, 0.0, "gelu", 1e-6, True, True)
            self.backbone = nn.Sequential(*(layer() for _ in range(cfg.n_layer)))
        self.head = nn.Linear(d, outputs)

    def features(self, x):
        if self.position is None:
            return self.backbone(x)
        if self.start is None:
            return self.norm(self.backbone(self.embed(x) + self.position)).mean(1)  # (B, n, d) to (B, d)
        x = self.embed(x).flatten(2).transpose(1, 2)  # (B, patches, d)
        x = torch.cat([self.start.expand(len(x), 1, -1), x], 1) + self.position
        return self.norm(self.backbone(x))[:, 0]  # (B, d)

    def forward(self, x):
        return self.head(self.features(x))


VIT_NAMES = (  # parts of names in the files of timm and of transformers, and what they are called here
    ("patch_embeddings.projection", "embed"), ("patch_embed.proj", "embed"), ("vit.", ""), ("embeddings.", ""),
    ("cls_token", "start"), ("position_embeddings", "position"), ("pos_embed", "position"),
    ("encoder.layer.", "backbone."), ("blocks.", "backbone."), ("attn.qkv.", "self_attn.in_proj_"),
    ("attention.attention.", "self_attn."), ("attention.output.dense", "self_attn.out_proj"),
    ("attn.proj", "self_attn.out_proj"), ("intermediate.dense", "linear1"), ("mlp.fc1", "linear1"),
    ("output.dense", "linear2"), ("mlp.fc2", "linear2"), ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
    ("layernorm", "norm"))


def load_vit(net, path):
    """Read the weights of a pre-trained ViT, all but its head, as timm or transformers save them."""
    try:
        found = {}
        for name, x in load_file(path).items():
            for theirs, ours in VIT_NAMES:
                name = name.replace(theirs, ours)
            found[name] = x
        for name in [name for name in found if ".query." in name]:  # one matrix here
            parts = [found.pop(name.replace("query", part)) for part in ("query", "key", "value")]
            found[name.replace("query.", "in_proj_")] = torch.cat(parts)
        net.load_state_dict({name: x for name, x in net.state_dict().items() if "head" in name} | {
            name: found[name] for name in net.state_dict() if "head" not in name})
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        fail(f"--load {path}: not the weights of a ViT of these sizes (--n-embd, --n-layer, --patch, --image-size), "
             f"named as timm or transformers do: {str(error).splitlines()[0]}")


# ---------------------------------------------------------------- 4. Method (inferred where no source is named)
# A game of n players has 2^n values, one for each set; bit i of a set's index says whether player i is in it.
def order_of(index):
    """How many players a set has: number of bits of indices below 2^16."""
    return sum(index >> i & 1 for i in range(16))


def moebius(v, inverse=False):
    """AND interactions of games v (..., 2^n): I(S) = sum over T in S of (-1)^(|S| - |T|) v(T). (Harsanyi 1963)

    inverse: every masked output from its interactions, v(S) = sum over T in S of I(T). n passes, one for each player,
    in the place of the 3^n terms of the sums; exact for integers."""
    n = v.shape[-1].bit_length() - 1
    assert v.shape[-1] == 1 << n, "a game has 2^n values"
    found = v.clone(memory_format=torch.contiguous_format)
    for i in range(n):
        pairs = found.view(-1, 2, 1 << i)  # (others above i, without i and with i, others below i)
        pairs[:, 1] += pairs[:, 0] if inverse else -pairs[:, 0]
    return found


def or_interactions(v):
    """I_or(S) = - sum over T in S of (-1)^(|S| - |T|) v(N less T), which acts as soon as one of S is there; I_or of
    nothing is v of nothing. (official code of the school: interaction-concept)"""
    found = -moebius(v.flip(-1))  # flip: every set becomes its complement
    found[..., 0] = v[..., 0]
    return found


def values_of_or(interactions):
    """The games whose or_interactions these are: I_or(nothing) + sum over T that meet S of I_or(T)."""
    others = interactions.clone()
    others[..., 0] = 0
    inside = moebius(others, inverse=True)  # sum over T in S; those that do not meet S are inside its complement
    return interactions[..., :1] + inside[..., -1:] - inside.flip(-1)


def kron(x, m):
    """The n-fold Kronecker power of a 2 x 2 matrix m times x (..., 2^n)."""
    for i in range(x.shape[-1].bit_length() - 1):
        without, with_i = x.reshape(-1, 2, 1 << i).unbind(1)
        parts = [m[0, 0] * without + m[0, 1] * with_i, m[1, 0] * without + m[1, 1] * with_i]
        x = torch.stack(parts, 1).view(x.shape)
    return x


def normal_solver(n):
    """x -> (M'M + F M'M F)^-1 x for x (..., 2^n), M: moebius, F: flip, in 2 n passes.

    Both terms are Kronecker powers, of P = (2 -1; -1 1) and Q = (1 -1; -1 2). With b such that b'Pb = diag(d) and
    b'Qb = 1 the inverse is b^(n) diag(1 / (product of d + 1)) b'^(n)."""
    P, Q = (torch.tensor(m, dtype=torch.float64) for m in ([[2, -1], [-1, 1]], [[1, -1], [-1, 2]]))
    lower = torch.linalg.inv(torch.linalg.cholesky(Q))
    d, vectors = torch.linalg.eigh(lower @ P @ lower.T)
    b, m = lower.T @ vectors, order_of(torch.arange(2**n))
    scale = 1 / (d[0] ** (n - m) * d[1] ** m + 1)
    return lambda x: kron(kron(x, b.T) * scale.to(x.device), b)


def sparsify(v, steps=200, rho=20.0):
    """Split games v (K networks, S, 2^n) into v / 2 + p, explained by AND, and v / 2 - p, explained by OR, with few
    interactions: I_and, I_or (K, S, 2^n). For every p both parts together give v exactly. (our choice)

    p minimises the sum over sets of the norm over the K networks of I_and and of I_or, so the networks compared agree
    on what is AND and OR where they can: with one network this is the L1 norm of the school, with a split for each
    they could not be compared. Convex; ADMM: p by normal_solver, then shrinking, then the dual variables u."""
    assert v.ndim == 3
    v = v.double() - v[..., :1].double()
    scale = v.abs().amax((0, 2), keepdim=True).clamp(min=1e-300)
    order = order_of(torch.arange(v.shape[-1], device=v.device))
    solve, half = normal_solver(v.shape[-1].bit_length() - 1), v / scale / 2
    start = parts = torch.stack([moebius(half), or_interactions(half)])  # (AND and OR, K, S, 2^n) of p = 0
    y, u = start, torch.zeros_like(start)
    for _ in range(steps):
        back = moebius((y - u - start).flip(-1))  # the transpose of M is F M F, that of M F is M F
        p = solve(back[0].flip(-1) + back[1])
        parts = start + torch.stack([moebius(p), moebius(p.flip(-1))])
        moved = parts + u
        y = moved * (1 - (order > 0) / rho / moved.norm(dim=1, keepdim=True).clamp(min=1e-300)).clamp(min=0)
        u = moved - y
    # one player alone is AND as well as OR: count it as AND (official code: reorganize); the empty set is left out
    found_and, found_or = parts * scale
    return (found_and + found_or * (order == 1)) * (order > 0), found_or * (order > 1)


def logodds(logits, label):
    """log p / (1 - p) of classes (B,) from logits (B, C), in fp64: 1 - p itself would round to nothing."""
    logits = logits.double()
    others = logits.scatter(1, label[:, None], -math.inf).logsumexp(1)
    return logits.gather(1, label[:, None])[:, 0] - others  # (B,)


def masked(x, baseline, player, index, kernels=False):
    """Copies (S, M, ...) of inputs x (S, ...) in which only the players of each set index (M,) are there.

    player (...): to whom an entry of x belongs, -1: it is always there; the others have the baseline (...)."""
    assert x.shape[1:] == baseline.shape == player.shape
    if kernels:  # the players' entries side by side: they must have equally many
        order = player.flatten().argsort(stable=True)
        parts, base = x.flatten(1)[:, order].unflatten(1, (int(player.max()) + 1, -1)), baseline.flatten()[order]
        copies = load_kernel("masked_blend")(parts.contiguous(), base.view(parts.shape[1:]), index)  # (S, M, n, D)
        return copies.flatten(2)[:, :, order.argsort()].unflatten(2, player.shape)
    sets = index.view(-1, *[1] * player.ndim)  # (M, 1, ...)
    there = (sets >> player.clamp(min=0) & 1).bool() | (player < 0)  # (M, ...)
    return torch.where(there, x[:, None], baseline)


@torch.no_grad()
def values(net, x, label, baseline, player, chunk=8192, kernels=False):
    """Games v (S, 2^n) in fp64: log-odds of each input's class for every set of players, chunk copies at once."""
    index, found = torch.arange(2 ** (int(player.max()) + 1), device=x.device), []
    for part in index.split(max(1, chunk // len(x))):
        logits = net(masked(x, baseline, player, part, kernels).flatten(0, 1))  # (S M, C)
        found.append(logodds(logits, label.repeat_interleave(len(part))).view(len(x), -1))
    return torch.cat(found, 1)


def noise_floor(v, net, x, label, baseline, player, chunk=8192):
    """Standard deviation of the errors of games v, which these arguments gave: beside the same network in fp64."""
    exact = copy.deepcopy(net).double() if isinstance(net, nn.Module) else net
    exact = values(exact, x.double(), label, baseline.double(), player, chunk)
    return (v - exact).square().mean().sqrt() + 2**-50 * exact.square().mean().sqrt()


def salient(found, order, tau, floor=0.0):
    """Zero all interactions (..., C) of sets of these orders (C,) that are not above tau times the largest of their
    input, or not above three noise floors: errors sigma of values are sigma 2^(m / 2) in an interaction of order m."""
    size = found.abs() * (order > 0)
    largest = size.amax(-1, keepdim=True)
    return torch.where((size > tau * largest) & (size > 3 * floor * 2 ** (order / 2)), found, 0.0)


def decompose(a, f):
    """What of interactions a (..., C) the network with f keeps, drops and adds: preserved = min(|a|, |f|) where the
    signs agree, discarded = |a| - preserved, new = |f| - preserved. (inferred)"""
    kept = torch.where(a * f > 0, torch.minimum(a.abs(), f.abs()), 0.0)
    return kept, a.abs() - kept, f.abs() - kept


def unit(found):
    """Interactions (..., C) of an input, of which the sizes sum to 1: networks differ in how much they have of all."""
    return found / found.abs().sum(-1, keepdim=True).clamp(min=1e-300)


def similarity(a, b):
    """Sum of the smaller over sum of the larger of a, b (..., C), each of sum of sizes 1, positive and negative parts
    apart: 1 if equal, 0 if they share nothing. (official code of the school: get_overlap)"""
    kept, gone, new = (x.sum(-1) for x in decompose(unit(a), unit(b)))
    return kept / (kept + gone + new).clamp(min=1e-300)


def shapley(found):
    """Shapley values (..., n) of AND interactions (..., 2^n): the players of a set share its interaction equally."""
    assert found.shape[-1] <= 1 << 16, "at most 16 players"
    index = torch.arange(found.shape[-1], device=found.device)
    share = found / order_of(index).clamp(min=1)
    return torch.stack([share[..., index >> i & 1 == 1].sum(-1) for i in range(len(index).bit_length() - 1)], -1)


# ---------------------------------------------------------------- 5. Evaluation and claims
def interactions(cfg, v):
    """Games v (K networks, S, 2^n) to interactions (K, S, C) and the orders (C,) of their sets; C is 2^n, or twice
    that, AND and behind it OR. The empty set has 0."""
    order = order_of(torch.arange(v.shape[-1]))
    if cfg.interactions == "and-or":
        return torch.cat(sparsify(v), -1), order.repeat(2)
    found = load_kernel("moebius")(v.cuda()).cpu() if cfg.kernels else moebius(v)
    return found * (order > 0), order


def rebuild(found, sets):
    """The games (..., 2^n), sets = 2^n, that interactions (..., C) explain, 0 where nobody is there."""
    v = moebius(found[..., :sets], inverse=True)
    return v + values_of_or(found[..., sets:]) if found.shape[-1] > sets else v


def shares(a, f, s, order):
    """What is preserved and so on of interactions (S, C), as ratios of sums over inputs and sets: of all, of orders 1
    and 2 (_low) and of the others (_high). only_scratch: what scratch has and the fine-tuned network has not.

    Controls, shares of a: what agrees with scratch; with f where player i has become player i + 1; with f if every sign
    were a coin's (r_coin: the same of r)."""
    n, index = int(order.max()), torch.arange(len(order))
    inside = index & (1 << n) - 1  # bits of the players; a set of OR has one bit more
    moved = f[:, index - inside + (inside << 1 & (1 << n) - 1 | inside >> n - 1)]
    kept, gone, new = decompose(a, f)
    coin, r_coin = (torch.minimum(x.abs(), y.abs()) / 2 for x, y in ((a, f), (kept, s)))
    parts = dict(preserved=(kept, a), discarded=(gone, a), new=(new, f), r=(decompose(kept * a.sign(), s)[0], kept),
                 r_coin=(r_coin, kept), only_scratch=(decompose(f, s)[2], s), preserved_coin=(coin, a),
                 preserved_scratch=(decompose(a, s)[0], a), preserved_moved=(decompose(a, moved)[0], a))
    groups = {"": order > 0, "_low": (order > 0) & (order < 3), "_high": order > 2}
    return {name + group: float(part[:, sets].sum() / whole[:, sets].abs().sum().clamp(min=1e-300))
            for name, (part, whole) in parts.items() for group, sets in groups.items()}


def truth(world, a, f, order):
    """Scored against the world's concepts, sets of two players and more: preserved shares of interactions inside
    useful concepts and inside those the task has no use for, each the mean of the shares of orders 2 and 3; share of
    f's inside the task's concepts, and of all sets."""
    def inside(concepts):
        return holds(concepts, torch.arange(len(order)) % 2 ** int(order.max())).bool().any(0) & (order > 1)  # (C,)

    useful, task = inside(world.useful), inside(torch.cat([world.useful, world.fresh]))
    unused, kept, found = inside(world.unused) & ~task, decompose(a, f)[0], {}
    for name, sets in (("useful", useful), ("unused", unused)):
        of_order = [kept[:, sets & (order == m)].sum() / a[:, sets & (order == m)].abs().sum().clamp(min=1e-300)
                    for m in (2, 3)]
        found[f"preserved_{name}"] = float(sum(of_order) / 2)
    on_task = f[:, task].abs().sum() / f[:, order > 1].abs().sum().clamp(min=1e-300)
    return found | dict(on_task=float(on_task), on_task_chance=float(task.sum() / (order > 1).sum()))


def area(curve, epochs):
    """Mean of a curve (E,) over the epochs at which it was taken."""
    at = torch.tensor(epochs).double()
    return float(torch.trapezoid(curve.double(), at / at[-1]))


def convergence(found, other, epochs):
    """How interactions (E, S, C) at these epochs come to their last state: similarity to it, mean over the epochs, and
    its detour (total variation less net gain); mean similarity to another network's last state, (S, C) (a curve to
    the own end is 1 there by construction, this one is not); salient sets that vanish. Also both curves (E,)."""
    own, toward = (similarity(found, end[None]).mean(1) for end in (found[-1], other))
    vanished = ((found[:-1] != 0).any(0) & (found[-1] == 0)).sum(1).double().mean()
    detour = own.diff().abs().sum() - (own[-1] - own[0])
    numbers = dict(similarity=area(own, epochs), detour=float(detour), toward_other=area(toward, epochs))
    return numbers | dict(vanished=float(vanished)), own.tolist(), toward.tolist()


def speech(a, f, v):
    """What the preserved interactions (S, C) of fine-tuned networks say for an input's class, where v (S, 2^n) are
    log-odds: their sum over the sum of sizes, right answers, and right answers if they are taken out."""
    kept = decompose(a, f)[0] * f.sign()  # each adds itself to the output for the whole input
    right = dict(right=v[:, -1] > 0, right_without_preserved=v[:, -1] - kept.sum(1) > 0)
    found = {name: float(x.double().mean()) for name, x in right.items()}
    return found | dict(speaks_for_class=float(kept.sum() / kept.abs().sum().clamp(min=1e-300)))


def compare(cfg, world, fine, scratch, floor):
    """All measures from games (E, S, 2^n) of a fine-tuned and a scratch network at the same epochs: {name: number} of
    the fine-tuned, of scratch, and curves by order and epoch. _all: no threshold; _unit: of unit interactions."""
    (E, S, sets), v0 = fine.shape, fine[-1] - fine[-1, :, :1]
    every, order = interactions(cfg, torch.cat([fine, scratch]))  # (2 E, S, C)
    big, ends = salient(every, order, cfg.tau, floor), [0, E - 1, 2 * E - 1]
    a, f, s = big[ends]  # pre-trained, fine-tuned, scratch
    found = shares(a, f, s, order) | speech(a, f, fine[-1])
    if isinstance(world, Concepts):
        found |= truth(world, a, f, order)
    for name, three in (("all", every[ends]), ("unit", unit(big[ends]))):
        totals = shares(*three, order)
        found |= {f"{key}_{name}": x for key, x in totals.items() if not key.endswith(("_low", "_high"))}
    found |= dict(error=float((rebuild(f, sets) - v0).norm() / v0.norm()), size=float(f.abs().sum() / S),
                  size_pre=float(a.abs().sum() / S), salient=float((f != 0).sum() / S),
                  salient_pre=float((a != 0).sum() / S))
    by_fine, own, toward = convergence(big[:E], s, numbers(cfg.epochs))
    by_scratch, own_scratch, toward_scratch = convergence(big[E:], f, numbers(cfg.epochs))
    curves = {name: [x[:, order == m].sum().item() / S for m in range(1, cfg.n_players + 1)]
              for name, x in zip(("preserved", "discarded", "new"), decompose(a, f))}
    curves |= dict(similarity_fine=own, similarity_scratch=own_scratch)
    curves |= dict(toward_scratch_fine=toward, toward_fine_scratch=toward_scratch)
    return found | by_fine, by_scratch, curves


# Fixed before the evidence, from the paper's claims: id, statistic, threshold, what would refute it. Those with _unit,
# coin, learning, on_task and random's similarity were added after a first run that is not reported.
# "arm/size of training/measure": a ratio of sums over held-out inputs; mean and interval are over worlds.
CLAIMS = [
    ("most-is-discarded", "related/400/discarded", 0.5, "fine-tuning keeps half of the interactions or more"),
    ("most-is-discarded-unit", "related/400/discarded_unit", 0.5, "so it does if both networks have equally much"),
    ("discarded-at-high-order", "related/400/discarded_high - related/400/discarded_low", 0.0, "no trend by order"),
    ("much-is-new", "related/400/new", 0.5, "most of what the fine-tuned network says was there before"),
    ("new-at-high-order", "related/400/new_high - related/400/new_low", 0.0, "new knowledge is not more complex"),
    ("scratch-lacks-the-preserved", "1 - related/400/r", 0.5, "scratch learns half of it or more (paper: 13 to 45 %)"),
    ("scratch-has-more-than-chance", "related/400/r - related/400/r_coin", 0.0, "what it has of it could be coins'"),
    *((f"more-accurate-{n}", f"related/{n}/accuracy - scratch/{n}/accuracy", 0.0, "pre-training does not help")
      for n in (50, 150, 400, 1600)),
    *((f"learns-faster-{n}", f"related/{n}/learning - scratch/{n}/learning", 0.0, "no better on the way either")
      for n in (50, 150, 400, 1600)),
    *((f"converges-faster-{n}", f"related/{n}/similarity - scratch/{n}/similarity", 0.0, "scratch is as fast")
      for n in (50, 150, 400, 1600)),
    *((f"faster-than-random-labels-{n}", f"related/{n}/similarity - random/{n}/similarity", 0.0, "these are as fast")
      for n in (50, 150, 400, 1600)),
    ("steadier", "scratch/400/detour - related/400/detour", 0.0, "scratch comes as straight to its last state"),
    ("disjoint-preserves-less", "related/400/preserved - disjoint/400/preserved", 0.0, "as much of concepts of no use"),
    ("random-preserves-less", "related/400/preserved - random/400/preserved", 0.0, "as much of random labels"),
    ("not-by-chance-low", "related/400/preserved_low - related/400/preserved_coin_low", 0.0, "coins agree as much"),
    ("not-by-chance-high", "related/400/preserved_high - related/400/preserved_coin_high", 0.0, "coins agree as much"),
    ("not-of-other-players", "related/400/preserved - related/400/preserved_moved", 0.0, "as much agrees with theirs"),
    ("not-of-the-task", "related/400/preserved - related/400/preserved_scratch", 0.0, "scratch agrees as much"),
    ("useful-is-preserved", "related/400/preserved_useful - related/400/preserved_unused", 0.0, "no more than others"),
    ("fine-tuned-is-on-task", "related/400/on_task - related/400/on_task_chance", 0.0, "as any sets of players"),
]
STUDENT = 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262  # 97.5 % quantiles for 2 worlds and more


def statistics(table):
    """Claim id to (mean, 95 % interval over worlds), where it was run. table: "arm/size/measure" to (worlds,)."""
    found = {}
    for name, formula, *_ in CLAIMS:
        *first, last = formula.split(" - ")  # 1 or a key of the table, if any, and a key
        if {last, *first} <= {*table, "1"} and (worlds := len(table[last])) > 1:
            x = sum(1.0 if key == "1" else table[key] for key in first) - table[last] if first else table[last]
            spread = STUDENT[min(worlds, 10) - 2] * np.std(x, ddof=1) / math.sqrt(worlds)
            found[name] = np.mean(x), (np.mean(x) - spread, np.mean(x) + spread)
    return found


# ---------------------------------------------------------------- 6. Training
def loss_of(net, batch, smoothing=0.0):
    """Cross-entropy, for targets in fp32 that of yes-or-no questions."""
    logits, target = net(batch["x"]), batch["target"]
    if target.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, target.to(logits))
    return F.cross_entropy(logits, target, label_smoothing=smoothing)


def to_device(run, batch):
    return {name: x.to(run.device, run.dtype if name == "x" else x.dtype) for name, x in batch.items()}


def fit_probe(cfg, net, data):
    """Fit the head on frozen, standardised features of data, x (N, ...) and target (N,), in fp64, with the penalty
    that is best on a fifth of the data."""
    with torch.no_grad():
        features = net.eval().features(data["x"]).double()  # (N, d)
    mean, std, target, fifth = features.mean(0), features.std(0) + 1e-6, data["target"], len(data["target"]) // 5
    features = F.pad((features - mean) / std, (0, 1), value=1.0)  # (N, d + 1)

    def fit(start, penalty):
        weight = features.new_zeros(net.head.out_features, features.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(features[start:] @ weight.T, target[start:], label_smoothing=cfg.smoothing)
            loss = loss + penalty / 2 * weight[:, :-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return weight.detach()

    trials = {penalty: features[:fifth] @ fit(fifth, penalty).T for penalty in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)}
    weight = fit(0, min(trials, key=lambda penalty: F.cross_entropy(trials[penalty], target[:fifth]).item()))
    net.head.weight.data.copy_(weight[:, :-1] / std)
    net.head.bias.data.copy_(weight[:, -1] - weight[:, :-1] @ (mean / std))


def train(cfg, run, job, net, draw, steps, lr, smoothing, state, marks=(), watch=None):
    """Train a network on batches draw(step); returns what `watch` saw of it at the steps `marks`, and the seconds.

    state: what load_state gave, {} for a new run."""
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=cfg.weight_decay, fused=True)
    step, seen, spent = 0, [], 0.0
    if state.get("job") == job:
        step, seen, spent = state["step"], state["seen"], state["seconds"]
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    log, began = Log(run, job, steps, step), time.perf_counter() - spent
    while True:
        if step in marks:
            seen.append(watch(net.eval()))
        if step == steps:
            return seen, time.perf_counter() - began
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2
        loss = loss_of(net.train(), to_device(run, draw(step)), smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % cfg.log_every == 0 or step == steps:
            per_s = step / (time.perf_counter() - began)
            log(step, loss=loss.item(), lr=group["lr"], steps_per_s=per_s, eta_min=(steps - step) / per_s / 60)
        stop = should_stop(run)
        if stop or step % cfg.save_every == 0:
            parts = dict(model=net.state_dict(), optimizer=optimizer.state_dict(), done=state.get("done", {}))
            save_state(run, job=job, step=step, seen=seen, seconds=time.perf_counter() - began, **parts)
        if stop:
            stopped(run)


def pretrain(cfg, run, job, seed, arm, state):
    """A backbone on an arm's pre-training; returns its network, {} and the seconds."""
    torch.manual_seed(generator("backbone", seed, arm).initial_seed())
    world = make_world(cfg, arm, seed)
    net = Network(cfg, world.labels).to(run.device, run.dtype)
    if cfg.task == "images":
        load_vit(net, cfg.load)
        return net, {}, 0.0

    def draw(step):
        return world.before(cfg.batch_size, generator("before", seed, arm, step))

    return net, {}, train(cfg, run, job, net, draw, cfg.steps, cfg.lr, 0.0, state)[1]


def downstream(cfg, run, job, seed, arm, size, state):
    """A network on `size` inputs, from an arm's backbone and with a linear probe, or from scratch.

    Returns it, games (E, S, 2^n) of held-out inputs and accuracies (E,) by checkpoint, of which the first is the
    pre-trained network with its probe, and the seconds."""
    torch.manual_seed(generator("downstream", seed).initial_seed())
    world, per_epoch = make_world(cfg, arm, seed), -(-size // cfg.batch_fine)
    data = to_device(run, world.after(size, generator(seed)))
    net = Network(cfg, world.classes).to(run.device, run.dtype)
    if arm != "scratch":
        backbone = load_file(run.out / f"w{seed}-{arm}.safetensors")
        net.load_state_dict({name: x for name, x in backbone.items() if "head" not in name}, strict=False)
        fit_probe(cfg, net, data)
    explained, test = (to_device(run, world.after(n, generator(seed, name), held=True))
                       for n, name in ((cfg.n_eval, "explained"), (cfg.n_test, "test")))
    game = explained["x"], explained["target"], world.baseline.to(run.device, run.dtype), world.player.to(run.device)

    def draw(step):
        order = torch.randperm(size, generator=generator("epoch", seed, step // per_epoch))
        rows = order[step % per_epoch * cfg.batch_fine :][: cfg.batch_fine].to(run.device)
        return {name: x[rows] for name, x in data.items()}

    @torch.no_grad()
    def watch(net):
        right = (net(test["x"]).argmax(1) == test["target"]).double().mean()
        return values(net, *game, cfg.mask_batch, cfg.kernels).cpu(), right.cpu()

    marks = [per_epoch * epoch for epoch in numbers(cfg.epochs)]
    lr = cfg.lr_scratch if arm == "scratch" else cfg.lr_fine
    seen, seconds = train(cfg, run, job, net, draw, marks[-1], lr, cfg.smoothing, state, marks, watch)
    games, accuracy = (torch.stack(x) for x in zip(*seen))
    if not games.isfinite().all():
        fail(f"{job}: training diverged: lower --lr, --lr-fine or --lr-scratch")
    floor = noise_floor(games[-1].to(run.device), net, *game, cfg.mask_batch).cpu()
    majority = test["target"].bincount().max().cpu() / len(test["target"])
    return net, dict(games=games, accuracy=accuracy, floor=floor, majority=majority), seconds


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


def jobs(cfg):
    """(seed, arm, size): for each world every pre-training, size 0, what is fine-tuned from it, and scratch."""
    return [(seed, arm, size) for seed in range(100 * cfg.seed, 100 * cfg.seed + cfg.seeds)
            for arm in [*cfg.arms.split(","), "scratch"] for size in [0, *numbers(cfg.n_train)]
            if size or arm != "scratch"]


def cost(cfg, run=None):
    """Say what a run takes, without allocating a network; with a run, also what was measured."""
    from torch.utils.flop_counter import FlopCounterMode

    world, sizes = make_world(cfg, "related", 0), [size for _, _, size in jobs(cfg)]
    shape = world.player.shape
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        (net := Network(cfg, world.classes))(torch.empty(1, *shape))
    n, flops, epochs = sum(p.numel() for p in net.parameters()), counter.get_total_flops(), numbers(cfg.epochs)
    before = cfg.steps * sizes.count(0) * (cfg.task != "images")
    after = epochs[-1] * sum(-(-size // cfg.batch_fine) for size in sizes)
    forwards = (len(sizes) - sizes.count(0)) * (len(epochs) + 1) * cfg.n_eval * 2**cfg.n_players
    batch = max(cfg.batch_fine, cfg.batch_size * (before > 0))
    memory = 16 * n + batch * flops / 50 + 16 * cfg.mask_batch * shape.numel()
    total = flops * (3 * before * cfg.batch_size + 3 * after * cfg.batch_fine + forwards)
    print(f"{n:,} parameters | steps: {before:,} of pre-training, {after:,} downstream | {forwards:,} masked forwards, "
          f"{total:.2e} FLOPs | about {memory / 2**30:.2f} GiB | on one H100 "
          f"{total / 2e13 / 3600:.2f} hours at 20 TFLOP/s, at least 1 ms a step", flush=True)
    if run is None:
        return
    net, seconds, x = net.to_empty(device=run.device).to(run.dtype), [], torch.randn(1024, 1024, device=run.device)
    for count in (cfg.batch_size, cfg.batch_fine, many := min(1024, cfg.mask_batch)):
        batch = to_device(run, dict(x=torch.zeros(count, *shape), target=torch.zeros(count, dtype=torch.long)))
        seconds.append(min(timeit.repeat(lambda: loss_of(net, batch).backward(), number=1, repeat=3)))
    peak = 2 * 1024**3 / min(timeit.repeat(lambda: (x @ x).sum().item(), number=1, repeat=3))
    minutes = (2 * before * seconds[0] + 2 * after * seconds[1] + forwards * seconds[2] / many / 2) / 60
    print(f"a gradient takes {1e3 * seconds[0]:.2f} ms in pre-training, {1e3 * seconds[1]:.2f} ms downstream; of "
          f"{many} inputs it has {3 * flops * many / seconds[2] / peak:.0%} of a matmul's {peak / 1e9:.0f} GFLOP/s; "
          f"with data and AdamW about {minutes:.1f} minutes"
          + ", more than the 10 minutes of --scale small" * (cfg.scale == "small" and minutes > 10), flush=True)


def load_input(cfg, out):
    """What --explain names: network, input x (1, ...), players, baseline, true class or None."""
    if cfg.callable:
        return load_callable(cfg)
    seed, arm = 100 * cfg.seed, cfg.arms.split(",")[0]
    path = Path(cfg.load or out / f"w{seed}-{arm}-{numbers(cfg.n_train)[-1]}.safetensors")
    if (saved := path.parent / "config.json").exists():  # the run's own inputs are explained, not others like them
        try:
            saved, ours = dict(json.loads(saved.read_text())), asdict(cfg)
        except (ValueError, TypeError, RecursionError) as error:
            fail(f"{saved}: damaged: {error}")
        flags = "task", "seed", "data", "n_players", "n_eval", "noise"
        if changed := [k for k in flags if saved.get(k) != ours[k]]:
            fail(f"--load {path}: its run had other flags: " + ", ".join(f"{k} {saved.get(k)}" for k in changed))
    world = make_world(cfg, arm, seed)
    net, held = Network(cfg, world.classes).eval(), world.after(cfg.n_eval, generator(seed, "explained"), held=True)
    try:
        net.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        fail(f"--load {path}: not the weights of a downstream network of these sizes, which a run without --explain "
             f"leaves there: {str(error).splitlines()[0]}")
    i = int(cfg.explain)
    return net, held["x"][i : i + 1], world.player, world.baseline, int(held["target"][i])


def load_callable(cfg):
    """--callable module:function is imported from the current directory and returns a model, nn.Module or a function
    that also takes fp64, from inputs (B, ...) to logits (B, C), players (...), integers that say to whom an entry of
    an input belongs, -1: it is never masked, and a baseline (...), what an absent player looks like, on the model's
    device."""
    module, name = cfg.callable.split(":")
    sys.path.insert(0, os.getcwd())
    try:
        net, player, baseline = getattr(importlib.import_module(module), name)()
        net = net.eval() if isinstance(net, nn.Module) else net
        player, baseline = torch.as_tensor(player), torch.as_tensor(baseline)
    except Exception as error:  # it is the user's code: whatever it raises is named, not traced through this file
        fail(f"--callable {cfg.callable}: {type(error).__name__}: {str(error).splitlines()[:1]}; the function must "
             "return (model, players, baseline)")
    try:
        x = torch.from_numpy(np.load(cfg.explain, allow_pickle=False))[None]
        if x.is_complex() or not baseline.is_floating_point():
            raise TypeError(f"the input must be real, {x.dtype}, and the baseline of floats, {baseline.dtype}")
        x = x.to(baseline)
    except Exception as error:  # a damaged header raises nearly anything
        fail(f"--explain {cfg.explain}: not a file .npy of numbers: {error}")
    if player.is_floating_point() or set(player.flatten().tolist()) - {-1} not in [set(range(n)) for n in range(1, 17)]:
        fail(f"--callable {cfg.callable}: players must be the integers 0 to n - 1, n at most 16, or -1: never masked")
    if not x.shape[1:] == player.shape == baseline.shape:
        shapes = (tuple(part.shape) for part in (x[0], player, baseline))
        fail("--explain {}: input {}, players {} and baseline {} must have one shape".format(cfg.explain, *shapes))
    try:
        with torch.no_grad():
            logits = net(x)
            (copy.deepcopy(net).double() if isinstance(net, nn.Module) else net)(x.double())
    except Exception as error:
        fail(f"--callable {cfg.callable}: the model fails on the input {tuple(x.shape)}, or in fp64: {error}")
    if not torch.is_tensor(logits) or logits.ndim != 2 or logits.shape[1] < 2 or not logits.isfinite().all():
        fail(f"--callable {cfg.callable}: the model must return finite logits (1, C) of two classes or more")
    return net, x, player.to(baseline.device), baseline, None


def explain(cfg):
    """List and plot the strongest interactions of one input, for the class that the network says."""
    out = Path(cfg.out or f"out/gametheory/{cfg.task}-{cfg.scale}-s{cfg.seed}")
    net, x, player, baseline, label = load_input(cfg, out)
    with torch.no_grad():
        said = net(x).argmax(1)
    game = net, x, said, baseline, player, cfg.mask_batch
    v = values(*game)
    if not v.isfinite().all():
        fail(f"--explain {cfg.explain}: the network's log-odds of masked inputs are not finite")
    v, floor = v.cpu(), noise_floor(v, *game).cpu()
    every, order = interactions(cfg, v[None])
    tau = 0.0 if cfg.interactions == "and" else 1e-3  # what ADMM leaves of interactions that are none
    found, sets, v0 = salient(every, order, tau, floor)[0, 0], v.shape[1], v[0] - v[0, 0]
    strongest = [i for i in found.abs().argsort(descending=True, stable=True)[:20].tolist() if found[i]]
    names = [(" or " if i >= sets else " and ").join(str(p) for p in range(16) if i % sets >> p & 1) for i in strongest]
    print(f"class {said.item()}, true {label} | log-odds {v[0, -1]:.3f}, of the baseline {v[0, 0]:.3f} | Shapley "
          + " ".join(f"{i}:{x:.2f}" for i, x in enumerate(shapley(moebius(v))[0].tolist())))
    print("\n".join(f"{found[i]:+9.4f}  {name}" for i, name in zip(strongest, names)))
    listed = torch.zeros_like(found).index_copy_(0, torch.tensor(strongest, dtype=torch.long), found[strongest])
    error = (rebuild(listed, sets) - v0).norm() / v0.norm().clamp(min=1e-300)
    print(f"{int((found != 0).sum())} of {len(found) - 1} are above the noise; those listed explain the {sets} masked "
          f"outputs with a relative error of {error:.3f}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1 + 0.22 * len(names)), layout="constrained")
    axes, sizes = figure.subplots(), found[strongest].tolist()
    axes.barh(names, sizes, color=["tab:blue" if x > 0 else "tab:red" for x in sizes])
    axes.invert_yaxis()
    axes.set(xlabel="interaction of players")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"explain-{Path(cfg.explain).stem}.png", dpi=110)
    return dict(zip(names, sizes))


def plot_curves(path, cfg, curves):
    """For each size of training: preserved, discarded, new by order, and similarity and accuracy by epoch."""
    from matplotlib.figure import Figure

    sizes, arm = numbers(cfg.n_train), cfg.arms.split(",")[0]
    figure = Figure(figsize=(3.4 * len(sizes), 6), layout="constrained")
    axes = figure.subplots(2, len(sizes), squeeze=False, sharey="row")
    for column, size in enumerate(sizes):
        mean = {name: np.mean([c[name] for c in curves[f"{arm}/{size}"]], 0) for name in curves[f"{arm}/{size}"][0]}
        for name, y in mean.items():
            top = name in ("preserved", "discarded", "new")
            at = range(1, cfg.n_players + 1) if top else numbers(cfg.epochs)
            axes[0 if top else 1, column].plot(at, y, marker=".", label=name.replace("_", ", "))
        axes[0, column].set(title=f"{arm}, {size} inputs", xlabel="order", ylabel="sum of |I|, an input")
        axes[1, column].set(xlabel="epoch")
    for row in axes:
        row[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- 8. Main
def analyse(cfg, out):
    """All that is computed from the saved games: {"arm/size/measure": (worlds,)}, and curves."""
    table, curves, load = {}, {}, functools.cache(lambda job: load_file(out / f"games-{job}.safetensors"))
    for seed, arm, size in jobs(cfg):
        if not size or arm == "scratch":
            continue
        fine, scratch = load(f"w{seed}-{arm}-{size}"), load(f"w{seed}-scratch-{size}")
        world, floor = make_world(cfg, arm, seed), max(fine["floor"], scratch["floor"]).item()
        found, other, curve = compare(cfg, world, fine["games"], scratch["games"], floor)
        found |= dict(probe=fine["accuracy"][0].item(), majority=fine["majority"].item(), floor=floor)
        parts = {arm: found}
        if arm == cfg.arms.split(",")[0]:
            parts["scratch"] = other
        for row, games in zip(parts, (fine, scratch)):
            accuracy = games["accuracy"]
            parts[row] |= dict(accuracy=accuracy[-1].item(), learning=area(accuracy, numbers(cfg.epochs)))
        for name, value in ((f"{row}/{size}/{k}", x) for row, part in parts.items() for k, x in part.items()):
            table.setdefault(name, []).append(value)
        curve |= {f"accuracy_{k}": x["accuracy"].tolist() for k, x in (("fine", fine), ("scratch", scratch))}
        curves.setdefault(f"{arm}/{size}", []).append(curve)
    return {key: np.array(x) for key, x in table.items()}, curves


def print_table(metrics):
    """A row for each arm and size of training."""
    columns = "probe accuracy salient preserved discarded_low discarded_high new_low new_high r similarity".split()
    print(f"{'':14}" + "".join(f"{column:>15}" for column in columns))
    for row in dict.fromkeys(key.rpartition("/")[0] for key in metrics):
        cells = (f"{metrics[f'{row}/{name}']:.3f}" if f"{row}/{name}" in metrics else "" for name in columns)
        print(f"{row:14}" + "".join(f"{cell:>15}" for cell in cells))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = cli(Config, SCALES, argv)
    torch.backends.cudnn.allow_tf32 = False  # its rounding would look like interactions of high order
    if cfg.dry_run:
        return cost(cfg)
    if cfg.kernels and not torch.cuda.is_available():
        fail("--kernels needs a CUDA device; without the flag the same run takes plain PyTorch")
    if cfg.explain:
        return explain(cfg)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("torchrun: the networks are small; run one process for each --seed instead")
    run, began = start_run(cfg, "gametheory"), time.perf_counter()
    cost(cfg, run)
    state = load_state(run)
    done, seconds = state.get("done", {}), time.perf_counter() - began
    for seed, arm, size in jobs(cfg):
        job = f"w{seed}-{arm}" + f"-{size}" * bool(size)
        if job in done:
            continue
        net, found, done[job] = downstream(cfg, run, job, seed, arm, size, state) if size else \
            pretrain(cfg, run, job, seed, arm, state)
        if found:
            replace_file(run.out / f"games-{job}.safetensors", save(found))
        replace_file(run.out / f"{job}.safetensors", export(net))
        state = dict(done=done)
        save_state(run, **state)
    table, curves = analyse(cfg, run.out)
    replace_file(run.out / "curves.json", json.dumps(curves).encode())
    plot_curves(run.out / "plot.png", cfg, curves)
    metrics = {key: float(x.mean()) for key, x in table.items()}
    print_table(metrics)
    tried = {arm: TRIED.get(arm, 1) for arm in [*cfg.arms.split(","), "scratch"]}
    minutes, digest = (seconds + sum(done.values())) / 60, hashlib.sha256()
    files = [file for part in ("train", "test") for file in picture_files(cfg.data, part)]
    for file in [*files, cfg.load] if files else []:
        digest.update(Path(file).read_bytes())
    record = dict(tried=tried, metrics=metrics, data_sha256=digest.hexdigest() if files else "", minutes=minutes)
    return report(cfg, run, "gametheory", argv, statistics(table), CLAIMS, **record)


if __name__ == "__main__":
    from_shell(main)
