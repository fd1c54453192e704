# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""convattn.py's training step beside the official module's math, and its memory beside its own dense form.

python tests/speed_convattn.py   # run it on an idle machine; 6 GiB of memory, on a GPU 40

A step is the forward and backward pass of one block of the 125M model (768 channels, 12 heads, Kerple + 1x3), in fp32,
on a GPU in bfloat16. official: scores and tiled biases concatenated, tril of all of them, two convolutions, both added
back, mask, softmax. Times are medians of five rounds in which all take turns (on a CPU one round from T = 2048 on).
Memory is what a step adds at its peak: on a CPU, how much the largest resident size grows, in its own process (Linux,
MALLOC_MMAP_THRESHOLD_=1048576). python tests/speed_convattn.py blocks64 8192 1 prints one of these numbers alone.
"""
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import convattn as m  # noqa: E402


def official(q, k, v, at, bias, conv, chunk, causal):
    """The formula of the official Kerple module, all queries and keys at once."""
    T = len(at)
    s = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, T)
    r = bias(at, at)  # (H, T, T)
    x = torch.tril(torch.cat([s, r.expand_as(s)], 1))
    f = conv.conv2(F.leaky_relu(conv.conv1(x)))  # built with padding (0, 1)
    a = (s + r + f).masked_fill(torch.ones(T, T, dtype=torch.bool, device=s.device).triu(1), torch.finfo(s.dtype).min)
    return a.softmax(-1).to(v) @ v


RETURN = {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # else glibc keeps freed blocks of the many sizes that blocks have
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def step(kind, T, batch):
    """A function that runs one training step of a block. kind: official, dense or blocks of queries, e.g. blocks64."""
    torch.manual_seed(0)
    cfg = m.cli(m.Config, m.SCALES, ["--task", "text", "--scale", "paper", "--dry-run", "--impl", "dense"])
    cfg.impl, cfg.kernels = "chunked" if kind.startswith("blocks") else "dense", kind.endswith("kernel")
    cfg.chunk = int(re.search(r"\d+", kind)[0]) if kind.startswith("blocks") else 0
    block, at = m.Block(cfg, "kerple+1x3").to(DEVICE), torch.arange(T, device=DEVICE)
    x = torch.randn(batch, T, cfg.n_embd, device=DEVICE, requires_grad=True)
    if kind == "official":
        block.conv.conv1.padding = block.conv.conv2.padding = (0, 1)

    def run():
        ours = m.attend_in_blocks
        m.attend_in_blocks = official if kind == "official" else ours
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            y = block(x, at)
        y.float().square().mean().backward()
        m.attend_in_blocks = ours
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def timed(kinds, T, batch, rounds=5):
    """Median seconds of each kind and median ratio to the first, rounds in turn after a warm-up."""
    runs, seconds = {kind: step(kind, T, batch) for kind in kinds}, {kind: [] for kind in kinds}
    for i in range(rounds + 1):
        for kind, run in runs.items():
            began = time.perf_counter()
            run()
            if i:
                seconds[kind].append(time.perf_counter() - began)
    first = seconds[kinds[0]]
    return {k: (statistics.median(x), statistics.median(a / b for a, b in zip(first, x))) for k, x in seconds.items()}


def peak():
    """The largest resident size of this process so far, in MiB (getrusage would begin at the parent's)."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


def memory(kind, T, batch):
    """MiB that a step adds, on a CPU in a process of its own."""
    if DEVICE == "cuda":
        run = step(kind, T, batch)
        run()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, __file__, kind, str(T), str(batch)]
    return float(subprocess.run(command, env=os.environ | RETURN, capture_output=True, text=True, check=True).stdout)


def main():
    if len(sys.argv) > 1:
        step(sys.argv[1], 128, 1)()  # what libraries take at their first use
        run = step(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
        before = peak()
        run()
        return print(peak() - before)
    few, all_ = ["dense", "blocks64"], ["official", "dense", "blocks64"]
    cases = [(all_, 512, 4), (all_, 1024, 1), (few, 2048, 1), (["blocks64"], 8192, 1)]
    if DEVICE == "cuda":
        few = ["dense", "blocks256", "blocks1024", "dense, kernel", "blocks1024, kernel"]
        all_ = ["official", "dense", "blocks128", "blocks256", "dense, kernel", "blocks256, kernel"]
        cases = [(all_, 512, 32), (["official", *few], 2048, 4), (few, 4096, 1), (few, 8192, 1)]
    for kinds, T, batch in cases:
        used = {kind: memory(kind, T, batch) for kind in kinds}
        for kind, (seconds, ratio) in timed(kinds, T, batch, 5 if T < 2048 or DEVICE == "cuda" else 1).items():
            print(f"T {T:5} batch {batch:2} {kind:17} {1e3 * seconds:8.1f} ms {ratio:6.2f} x {kinds[0]} "
                  f"{used[kind]:8.0f} MiB, {used[kinds[0]] / used[kind]:5.1f} times less", flush=True)


if __name__ == "__main__":
    main()
