# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""The block `decoder`, the one in rise.py, beside Hugging Face's Llama with the same weights: time and memory.

python tests/speed_decoder.py   # needs transformers; run it on an idle machine, four minutes

Shape: six layers of SmolLM2-135M (576 channels, 9 heads, 3 of keys) and 8,192 tokens, fp32. A training step is forward
(cross-entropy of all tokens), backward and AdamW on 4 x 256 tokens; generation is greedy, 16 prompts of 8 to 64 tokens
padded on the left, 64 new ones, with a cache. Medians of rounds in which the two take turns, ratios within a round.
Memory is the most that a call adds to the largest resident size of the process (Linux): the first one, as a rule.
"""
import contextlib
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rise as m  # noqa: E402

SHAPE = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9,
             num_key_value_heads=3, vocab_size=8192, tie_word_embeddings=True, rms_norm_eps=1e-5)


def memory(call):
    """MiB that a call adds to the largest resident size."""
    def status(name):
        return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10

    Path("/proc/self/clear_refs").write_text("5")  # the largest size so far becomes the present one
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def compare(title, ways, rounds, amount, unit):
    """Rate and memory of ours and the peer's, and the medians of their ratios."""
    seconds, added = {name: [] for name in ways}, {name: [] for name in ways}
    for i in range(rounds + 1):  # the first warms up
        for name, call in ways.items():
            began = time.perf_counter()
            added[name].append(memory(call))
            if i:
                seconds[name].append(time.perf_counter() - began)
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values())]
    print(f"{title}: " + " | ".join(f"{name} {amount / statistics.median(seconds[name]):,.0f} {unit}, "
                                    f"{max(added[name]):.0f} MiB" for name in ways)
          + f" | ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def step_of(model, loss):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def main():
    torch.manual_seed(0)
    peer = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa", pad_token_id=0, eos_token_id=None))
    ours = m.Decoder(m.read_shape(dict(SHAPE, model_type="llama")))
    ours.load_state_dict({re.sub(r"^model\.|self_attn\.|mlp\.", "", name): x.clone()
                          for name, x in peer.state_dict().items() if name != "lm_head.weight"})
    ids = torch.randint(1, 8192, (4, 257))
    print(f"{torch.get_num_threads()} threads; largest difference of the logits "
          f"{(ours(ids) - peer(ids).logits).abs().max():.1e}")
    steps = {"ours": step_of(ours, lambda: F.cross_entropy(ours(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())),
             "transformers": step_of(peer, lambda: peer(ids, labels=ids).loss)}
    compare("training step", steps, 7, 1024, "tokens/s")
    prompts = [ids[i % 4, : 8 + 56 * i // 15].tolist() for i in range(16)]
    padded = torch.tensor([[0] * (64 - len(p)) + p for p in prompts])
    ours.load_state_dict({re.sub(r"^model\.|self_attn\.|mlp\.", "", name): x.clone()
                          for name, x in peer.state_dict().items() if name != "lm_head.weight"})
    found = {}

    def theirs():
        with torch.no_grad(), contextlib.redirect_stderr(None):
            new = peer.generate(padded, attention_mask=(padded > 0).long(), do_sample=False, max_new_tokens=64,
                                min_new_tokens=64)
        found["transformers"] = new[:, 64:].tolist()

    compare("generation", {"ours": lambda: found.update(ours=m.generate(ours, prompts, 64)), "transformers": theirs},
            5, 16 * 64, "tokens/s")
    same = sum(a == b for a, b in zip(found["ours"], found["transformers"]))
    print(f"{same} of 16 continuations are equal")


if __name__ == "__main__":
    main()
