# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Time of an answer of vistog.py with 576 patches and with 64 semantic tokens, and of the reducer's training step.

OMP_NUM_THREADS=1 taskset -c 0 python tests/speed_vistog.py [--rounds 11] [--vision CLIP_DIRECTORY]
Random weights (the encoder's from a checkpoint with --vision); full and vistog take turns. Encoder, reducer with
projector, prefill of the image and 40 words, and 8 words of decoding; medians in ms. The paper's claim is more than
27 % less inference time; F4: less than 10 % refutes it. A training step: forward and backward of the semantic tokens
with the image's keys and values kept, computed, or in one masked stream (aim: kept twice as fast as masked).
"""
import argparse
import sys
import time
import timeit
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import vistog  # noqa: E402

CLIP_LIKE = dict(hidden_size=256, image_size=336, patch_size=14, num_attention_heads=4, intermediate_size=1024,
                 num_hidden_layers=6, layer_norm_eps=1e-5)
WORDS, NEW = 40, 8


@torch.no_grad()
def answer(net, pixels):
    """Seconds of the parts of one answer."""
    vision, lm, times = net.vision[0], net.lm, [time.perf_counter()]
    streams = vision.streams(pixels)
    times.append(time.perf_counter())
    visual = net.visual(streams)
    times.append(time.perf_counter())
    x = torch.cat([visual, lm.embed_tokens(torch.zeros(1, WORDS, dtype=torch.long))], 1)
    x, caches = lm(x, torch.arange(x.shape[1])[None])
    word = lm.head(x[:, -1:]).argmax(-1)
    times.append(time.perf_counter())
    for i in range(NEW):
        y, caches = lm(lm.embed_tokens(word), torch.tensor([[x.shape[1] + i]]), caches=caches)
        word = lm.head(y).argmax(-1)
    times.append(time.perf_counter())
    return np.diff(times)


def training_step(net, pixels):
    """Seconds of forward and backward of the semantic tokens: image kept, computed, and in one masked stream."""
    vision, semantic = net.vision[0], net.reduce.semantic
    with torch.no_grad():
        kept = vision.streams(pixels)["kept"]

    def start():
        return vision.pre_layrnorm(semantic).expand(len(pixels), -1, -1)

    def computed():
        with torch.no_grad():
            now = vision.streams(pixels)["kept"]
        return vistog.semantic_stream(vision, start(), now)

    forms = (lambda: vistog.semantic_stream(vision, start(), kept), computed,
             lambda: vistog.joint_stream(vision, vision.enter(pixels), start())[1])
    return [timeit.timeit(lambda: form().square().mean().backward(), number=1) for form in forms]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--vision", default="")
    args = parser.parse_args()
    torch.manual_seed(0)
    vision = vistog.load_clip(args.vision) if args.vision else vistog.Vision(CLIP_LIKE).requires_grad_(False)
    lm, side = vistog.LanguageModel(32000, 512, 8, 8), vision.shape["image_size"]
    nets = {arm: vistog.Network(vistog.Config(n_sem=64, arms=arm), arm, vision, lm) for arm in ("full", "vistog")}
    pixels, spent, steps = torch.rand(1, 3, side, side), {arm: [] for arm in nets}, []
    for _ in range(args.rounds + 1):  # the first one warms up
        for arm, net in nets.items():
            spent[arm].append(answer(net, pixels))
        steps.append(training_step(nets["vistog"], pixels.expand(4, -1, -1, -1)))
    spent = {arm: np.array(rows[1:]) for arm, rows in spent.items()}
    names = "encoder", "reducer", "prefill", "decode"
    print(f"{torch.get_num_threads()} threads, medians of {args.rounds} rounds, ms")
    print(f"{'':8}" + "".join(f"{name:>10}" for name in (*names, "total")) + f"{'GFLOP':>10}")
    for arm, rows in spent.items():
        row = [*np.median(rows, 0), np.median(rows.sum(1))]
        print(f"{arm:8}" + "".join(f"{1e3 * x:10.1f}" for x in row)
              + f"{sum(vistog.work(nets[arm], WORDS).values()) / 1e9:10.1f}")
    ratio = spent["vistog"].sum(1) / spent["full"].sum(1)
    low, median, high = np.quantile(1 - ratio, [0.025, 0.5, 0.975])
    outcome = vistog.verdict(median, (low, high), 0.10)
    print(f"time saved: {100 * median:.1f} % [{100 * low:.1f}, {100 * high:.1f}], bar 10 %: {outcome}; paper: 27 %")
    kept, computed, masked = 1e3 * np.median(steps[1:], 0)
    print(f"training step of the semantic tokens, 4 images: kept {kept:.1f} ms, computed {computed:.1f}, "
          f"masked {masked:.1f}: kept is {masked / kept:.1f} times as fast as masked")


if __name__ == "__main__":
    main()
