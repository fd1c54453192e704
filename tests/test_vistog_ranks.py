# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""vistog.py --task llava on two processes over gloo, its weights spread by FSDP, against one process."""
import pytest
import vistog as m
from safetensors.torch import load_file
from test_vistog_llava import FLAGS, here, quiet  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_ranks_are_one_process(here, two_ranks, monkeypatch):
    """What two processes over gloo learn with --fsdp, stopped in stage 2 and resumed, is what one learns. Bugs: a
    language model that stays frozen in stage 2 after it was spread, gradients summed or averaged twice, a rank that
    reads the other's rows, a part of the optimizer's state saved as if it were the whole."""
    quiet(monkeypatch)
    argv = [*FLAGS, "--arms", "vistog", "--micro-batch", "2", "--lr", "1e-3"]
    text = two_ranks("vistog", [*argv, "--fsdp", "--out", "two"], here, 5)
    assert text.count("continue with: ") == 1
    m.main([*argv, "--out", "one"])
    old = load_file("lm/model.safetensors")["model.embed_tokens.weight"]
    for name in ("vistog-align", "vistog"):
        ours, theirs = load_file(f"two/{name}.safetensors"), load_file(f"one/{name}.safetensors")
        assert ours.keys() == theirs.keys()
        for k in ours:  # a bias of keys has no gradient but rounding
            assert (ours[k] - theirs[k]).abs().max() < 2e-4, k
    assert (ours["lm.embed_tokens.weight"] - old).abs().max() > 1e-4
