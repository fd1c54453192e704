# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""flatquant.py's calibration step beside the official module's mathematics, and its transform beside a dense matrix.

python tests/speed_flatquant.py   # run it on an idle machine; a minute

A step is the forward pass of one block of SmolLM2-135M's shape (4 bits everywhere, keys and values too) on 4 windows of
256 tokens, the squared error, the backward pass and AdamW. official: whoever reads a transform, an input or a weight,
solves for its orthogonal matrices anew, as the official attribute does; here a step solves for each once. Both
have the same gradients. A transform is x (1024, C) P, with P a Kronecker product of two factors or one C x C matrix.
Times are medians of rounds in which both take turns; ratios are within one round.
"""
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import flatquant as m  # noqa: E402

SMOLLM2 = dict(model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9,
               num_key_value_heads=3, vocab_size=8, rms_norm_eps=1e-5, rope_theta=1e5)


class Readers(list):
    """The matrices of one site, [P or P^-T][factor], each solved for when it is read."""

    def __init__(self, pair):
        super().__init__(Column(pair, inverse) for inverse in (0, 1))


class Column:
    def __init__(self, pair, inverse):
        self.pair, self.inverse = pair, inverse

    def __getitem__(self, i):
        return self.pair[i]()[self.inverse]  # IndexError ends an iteration


class Official(m.QuantLayer):
    def materialise(self):
        self.now = {site: Readers(list(pair)) for site, pair in self.pairs.items()}

    def transform(self, site, x):
        if site != "o":
            return super().transform(site, x)
        p1 = self.now["o"][0][0]  # its other factor came with the values
        return (p1.T @ x.unflatten(-1, (len(p1), -1))).flatten(-2)


def step_of(student, x, y, turn):
    learned = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, 5e-3)

    def step(update=True):
        optimizer.zero_grad()
        F.mse_loss(student(x, turn), y).backward()
        if update:
            optimizer.step()
        return [p.grad.clone() for p in learned]

    return step


def compare(what, ways, rounds):
    """Rounds in which all ways take turns; prints medians in ms and the ratio of the first to the second."""
    times = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name] += [1e3 * (time.perf_counter() - began)] * (i > 0)  # the first warms up
    ratios = [a / b for a, b in zip(*times.values())]
    shown = " | ".join(f"{name} {statistics.median(found):.2f} ms" for name, found in times.items())
    print(f"{what}: {shown} | ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


@torch.no_grad()
def example():
    torch.manual_seed(0)
    shape = m.read_shape(SMOLLM2)
    model = m.Decoder(shape)
    x = torch.randn(4, 256, shape.n_embd)
    turn = model.turn(torch.arange(256)[None])
    return shape, model.layers[0], x, model.layers[0](x, turn), turn


def main():
    shape, layer, x, y, turn = example()
    cfg = m.Config(w_bits=4, a_bits=4, k_bits=4, v_bits=4)
    largest = m.largest_inputs(layer, x, turn)
    ours = m.make_student(cfg, shape, "flatquant", layer, 0, largest)
    official = copy.deepcopy(ours)
    official.__class__ = Official
    ways = dict(official=step_of(official, x, y, turn), ours=step_of(ours, x, y, turn))
    theirs, mine = (way(update=False) for way in ways.values())
    apart = max((a - b).abs().max().item() / b.abs().max().clamp(min=1e-12).item() for a, b in zip(theirs, mine))
    print(f"{torch.get_num_threads()} threads; gradients differ by {apart:.0e} of their largest entry")
    compare("calibration step", ways, 15)
    for C in (576, 4096):
        n1, n2 = m.factor_pair(C)
        rows, p1, p2 = torch.randn(1024, C), torch.randn(n1, n1), torch.randn(n2, n2)
        whole = torch.kron(p1, p2)
        ways = dict(dense=lambda: rows @ whole, kronecker=lambda: m.kron_mm(rows, p1, p2))
        compare(f"transform of {C} channels", ways, 15)


if __name__ == "__main__":
    main()
