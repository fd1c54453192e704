# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""mdm.py's speed beside a plain peer: Hugging Face's GPT-2 of the same size, on the same batches of sudoku.

python tests/speed_mdm.py [--size tiny] [--batch 32]   # needs transformers; run it on an idle machine

Training: one step = forward, backward, AdamW. Decoding: answers a second at batch 1 and 256, greedy with a cache (the
peer: generate) or in 20 calls (mdm). Peer, ar and mdm have the paper's 164 positions; "in place" is mdm on 81.
Every number is the median of rounds in which all contenders take turns; ratios are within one round.
"""
import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mdm as m  # noqa: E402


def peer(cfg):
    """transformers' GPT-2 with the shape of cfg, and its plain training step and generation."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(n_embd=cfg.n_embd, n_layer=cfg.n_layer, n_head=cfg.n_head, n_positions=512, vocab_size=m.VOCAB)
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=m.SEP, eos_token_id=m.EOS, pad_token_id=m.PAD))


def rounds(contenders, n):
    """Seconds of each contender (name to function), n rounds after a warm-up, in turn."""
    seconds = {name: [] for name in contenders}
    for i in range(n + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def show(title, seconds, boards):
    """Boards a second of each contender, and the median ratio to the peer."""
    for name, times in seconds.items():
        ratio = statistics.median(p / t for p, t in zip(seconds["GPT-2"], times))
        print(f"{title:24}{name:10}{boards / statistics.median(times):10.1f} boards/s{ratio:8.2f} x")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="nano", choices=m.SIZES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    layouts = {"ar": dict(canvas="source"), "mdm": dict(canvas="source"), "in place": {}}
    cfgs = {name: m.Config(size=args.size, batch_size=args.batch, **layout) for name, layout in layouts.items()}
    arms = {"ar": "ar", "mdm": "mdm", "in place": "mdm"}
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, rank=0, world=1)
    problems = m.sudoku_problems(256, "easy", np.random.default_rng(0))
    gpt2 = peer(cfgs["ar"])
    optimizer = torch.optim.AdamW(gpt2.parameters(), 1e-3)
    ids, target = m.encode(problems[: args.batch], cfgs["ar"], "ar")
    labels = ids[..., 0].where(target, -100)

    def peer_step():
        gpt2.train()
        gpt2(ids[..., 0], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def our_step(name):
        cfg, arm = cfgs[name], arms[name]
        data, model, adamw = m.prepare(cfg, run, arm, problems)
        loss = m.make_loss(cfg, run, arm)

        def step():
            m.accumulate(model.train(), m.make_batch(cfg, run, arm, data, 0), args.batch, loss)
            adamw.step()
            adamw.zero_grad()

        return step

    steps = {"GPT-2": peer_step} | {name: our_step(name) for name in arms}
    show(f"train, batch {args.batch}", rounds(steps, args.rounds), args.batch)
    models = {name: m.build(cfgs[name], arm).eval() for name, arm in arms.items()}
    gpt2.eval()
    for batch in (1, 256):
        some = problems[:batch]
        prompt = m.encode(some, cfgs["ar"], "ar")[0][:, :82, 0]

        def generate():
            with torch.no_grad(), contextlib.redirect_stderr(None):
                gpt2.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=82,
                              max_new_tokens=82)

        answers = {name: (lambda name=name: m.answer(models[name], arms[name], some, cfgs[name], 256)) for name in arms}
        show(f"decode, batch {batch}", rounds({"GPT-2": generate} | answers, 3), batch)


if __name__ == "__main__":
    main()
