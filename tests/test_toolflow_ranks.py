# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""toolflow.py --task sft on two processes over gloo, the weights spread by FSDP, against one process."""
import json

import pytest
import toolflow as m
from safetensors.torch import load_file
from test_toolflow import checkpoint, sound  # noqa: F401


@pytest.mark.parametrize("rank", ["0", "2"], ids=["all", "lora"])
def test_two_ranks_are_one_process(alone, two_ranks, one_thread, rank, checkpoint, monkeypatch, tmp_path):  # noqa: F811
    """Two processes, stopped after two of four steps and resumed, write the checkpoint and log the losses of one.
    The lines of a batch are of unequal length."""
    rows = [m.to_openai(dict(messages=made["messages"][: 2 + 2 * i]), tools[:1])
            for i, (made, tools) in enumerate(sound(4))]
    (data := tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--task", "sft", "--scale", "smoke", "--data", str(data), "--model", str(checkpoint), "--out", "x", "--lr",
             "0.03", "--batch-size", "4", "--seq-len", "2000", "--lora-rank", rank, "--save-every", "2",
             "--log-every", "1"]
    cwd = alone.new()
    text = two_ranks("toolflow", flags, cwd, 4)
    assert text.count("RESULT") == text.count("stopped; continue with") == 1
    monkeypatch.chdir(tmp_path)
    m.main(flags)
    ours, theirs = (load_file(folder / "x/model/model.safetensors") for folder in (cwd, tmp_path))
    first, changed = load_file(checkpoint / "model.safetensors"), 0
    assert ours.keys() == theirs.keys() == first.keys()
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() < 1e-4, key
        changed += (value - first[key]).abs().max() > 0.02
    assert changed > (5 if rank == "2" else 8)
    ours, theirs = ([json.loads(line) for line in (folder / "x/log.jsonl").read_text().splitlines()]
                    for folder in (cwd, tmp_path))
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["gnorm"] == pytest.approx(b["gnorm"], rel=1e-3)
