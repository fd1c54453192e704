# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""rise.py on two processes over gloo, its weights spread by FSDP, against one process."""
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import rise as m
import torch
from safetensors.torch import load_file

RANKS = """
import os, sys, torch._dynamo, rise
rank = str(int(os.fork() > 0))
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
rise.main(sys.argv[2:])
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) if rank == "1" else 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("argv", [(), ("--lora-rank", "2")], ids=["all", "lora"])
def test_two_ranks_are_one_process(alone, one_thread, argv, monkeypatch, tmp_path):
    """After the pairs of one process: what two processes learn, evaluated by one, is what one process learns alone."""
    monkeypatch.setattr(m, "plot_curves", lambda *_: None)
    monkeypatch.setattr(m, "ledger", lambda *_: None)
    flags, cwd = ["--scale", "smoke", "--arms", "1,C", "--micro-batch", "1", *argv], alone.new()
    shutil.copy(m.__file__, cwd)
    monkeypatch.chdir(cwd)
    m.main([*flags, "--until", "pairs"])
    shutil.copytree(cwd / "out", tmp_path / "one/out")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = subprocess.Popen([sys.executable, "-c", RANKS, port, *flags, "--resume"], cwd=cwd, env=alone.env,
                               text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        text = process.communicate(timeout=40 * float(os.environ.get("TEST_TIME_FACTOR", "1")))[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0 and text.count("--resume") == 1, text[-3000:]
    spread = m.main([*flags, "--resume"])
    monkeypatch.chdir(tmp_path / "one")
    whole = m.main([*flags, "--resume"])
    for arm in "1C":
        name = f"out/rise/chain-smoke-s0/b0/{arm}-s0.safetensors"
        ours, theirs = load_file(cwd / name), load_file(name)
        assert ours.keys() == theirs.keys() and len(ours) == (14 if argv else 11)
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)
        assert spread["metrics"][f"{arm}/sampled"] == whole["metrics"][f"{arm}/sampled"]
