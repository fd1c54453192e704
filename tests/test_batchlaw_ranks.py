# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""batchlaw.py on two processes over gloo, with DDP and with FSDP, against one process."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import batchlaw as m
import pytest

SMOKE = ["--scale", "smoke"]
ONE = ("--sizes", "1x8x1", "--batches", "64,128", "--tokens", "1024", "--points", "2")


@pytest.fixture(autouse=True)
def quick(monkeypatch, one_thread):
    """No plot, no stage A, no timing."""
    monkeypatch.setattr(m, "plot_laws", lambda *_: None)
    monkeypatch.setattr(m, "quadratic_world", dict)
    monkeypatch.setattr(m, "ledger", lambda *_: {})


def steady(path):
    """Rows of runs.jsonl without measures of time."""
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_s")}
            for line in path.read_text().splitlines()]


RANKS = """
import os, sys, torch._dynamo, batchlaw
rank = str(int(os.fork() > 0))
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
batchlaw.ledger = batchlaw.quadratic_world = batchlaw.plot_laws = lambda *_: {}
batchlaw.main(sys.argv[2:])
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) if rank == "1" else 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("argv", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_two_ranks_are_one_process(alone, argv, monkeypatch, tmp_path):
    """Two processes over gloo, DDP with six models and FSDP with one: the losses of one process."""
    one = () if not argv else ("--lrs", "2e-2", "--beta2s", "0.95")
    flags, cwd = [*SMOKE, *ONE, *one, "--micro-batch", "1", "--grad-clip", "0.5"], alone.new()
    shutil.copy(m.__file__, cwd)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    timeout = 40 * float(os.environ.get("TEST_TIME_FACTOR", "1"))
    process = subprocess.Popen([sys.executable, "-c", RANKS, port, *flags, *argv], cwd=cwd, env=alone.env, text=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        text = process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0 and text.count("RESULT") == 1, text[-3000:]
    (here := tmp_path / "one").mkdir()
    monkeypatch.chdir(here)
    m.main(flags)
    ours, whole = (steady(path / "out/batchlaw/zipf-smoke-s0/runs.jsonl") for path in (cwd, here))
    assert len(ours) == len(whole) == (4 if argv else 24)
    for a, b in zip(ours, whole):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
        assert (a["B"], a["D"], a["lr"]) == (b["B"], b["D"], b["lr"])
