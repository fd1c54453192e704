# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""What every test file shares: running a script alone, kill and resume, bad input, markers, time limits.

--real, --peers and --battery switch on the tests with that marker; `-m battery` runs these alone. A test that starts
a script as a process is marked slow by itself (`-m "not slow"` leaves the quick ones). What is skipped is counted by
reason at the end. TEST_TIME_FACTOR scales the time limits; where it is set, as in .ci/run, a slow
test file is a failure.
"""
import collections
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
import site
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, when it is imported
FACTOR = float(os.environ.get("TEST_TIME_FACTOR", "1"))
OPT_IN = {"real": "fetches real weights or data", "peers": "needs a peer library", "battery": "is long"}
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
SECONDS = collections.Counter()  # test file -> seconds of its tests, fixtures included
BLOCK_NETWORK = """
import socket
def guard(connect):
    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"the test blocks the network: {address}")
        return connect(self, address)
    return guarded
socket.socket.connect = guard(socket.socket.connect)
socket.socket.connect_ex = guard(socket.socket.connect_ex)
"""


@pytest.fixture
def one_thread(monkeypatch):
    """Small tensors are faster so; the former number comes back, and the handler of Ctrl-C."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)


# ---------------------------------------------------------------- running a script as a user does
class Alone:
    """Run a script as somebody has it who copied that one file: no repository, no network, no TRITON_*."""

    def __init__(self, factory):
        self.new = lambda: factory.mktemp("alone")
        home = factory.mktemp("home")  # a cache in the real home would hide a download
        (home / "sitecustomize.py").write_text(BLOCK_NETWORK)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON_", "XDG_"))}
        self.env |= {"HOME": str(home), "PYTHONPATH": str(home), "PYTHONUSERBASE": site.getuserbase()}
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        worker = os.environ.get("PYTEST_XDIST_WORKER")  # with `pytest -n 2`: gw0, gw1
        self.core = itertools.cycle(cores[int(worker[2:]) % len(cores) :][:1] if worker and cores else cores)

    def pin(self):
        """A preexec_fn that gives each process one core, in turn: small runs on shared cores only wait."""
        core = next(self.core, None)
        return None if core is None else lambda: os.sched_setaffinity(0, {core})

    def __call__(self, script, *argv, cwd=None, timeout=60, codes=(0,), meanwhile=None, gpu=False):
        """`python script argv` in `cwd` (a new empty directory), beside `meanwhile(process)` in a thread.

        Fails when the exit status is not among `codes`. Returns the CompletedProcess with .cwd, .seconds,
        .result (the RESULT line, else None) and .out (the directory of the newest result.json, else None).
        """
        cwd, began = Path(cwd or self.new()), time.monotonic()
        path = shutil.copy((ROOT / script).with_suffix(".py"), cwd)
        command = [sys.executable, Path(path).name, *map(str, argv)]
        env = self.env | ({} if gpu else NO_GPU)
        process = subprocess.Popen(command, cwd=cwd, env=env, text=True, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=self.pin())
        if meanwhile:
            threading.Thread(target=meanwhile, args=(process,), daemon=True).start()
        try:
            out, err = process.communicate(timeout=timeout * FACTOR)
        finally:
            process.kill()  # nothing to a process that has ended
        run = subprocess.CompletedProcess(command, process.returncode, out, err)
        assert run.returncode in codes, f"{command} gave {run.returncode}\n{out[-2000:]}\n{err[-4000:]}"
        records = [json.loads(line[7:]) for line in out.splitlines() if line.startswith("RESULT ")]
        outs = sorted(cwd.rglob("result.json"), key=lambda p: p.stat().st_mtime_ns)
        run.result, run.out = records[-1] if records else None, outs[-1].parent if outs else None
        run.cwd, run.seconds = cwd, time.monotonic() - began
        return run


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """`alone(script, *argv, cwd=None, timeout=60, codes=(0,))`: see Alone.__call__."""
    return Alone(tmp_path_factory)


STOP_AND_RESUME = """
import sys, {name} as script
checks = []
script.should_stop = lambda run: checks.append(0) or len(checks) == {stop}
try:
    script.main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code == 130
script.dist.barrier()  # until the first has saved; torchrun starts again when all have ended
script.main([*sys.argv[1:], "--resume"])
"""


@pytest.fixture
def two_ranks(alone):
    """`two_ranks(name, argv, cwd, stop)`: the script as two processes of torchrun, stopped at its stop-th look for
    Ctrl-C and resumed; what the first process prints."""
    def run(name, argv, cwd, stop):
        shutil.copy(ROOT / f"{name}.py", cwd)
        code = STOP_AND_RESUME.format(name=name, stop=stop)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            world = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
        ranks = [subprocess.Popen([sys.executable, "-c", code, *argv], cwd=cwd, text=True, stdin=subprocess.DEVNULL,
                                  env=alone.env | NO_GPU | world | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(2)]
        try:
            texts = [process.communicate(timeout=60 * FACTOR)[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        assert [process.returncode for process in ranks] == [0, 0], "\n".join(text[-3000:] for text in texts)
        return texts[0]
    return run


@pytest.fixture(scope="session")
def smoke(alone):
    """`smoke(script, *argv)`: the copied-alone run at --scale smoke, done once per session and arguments."""
    return functools.cache(lambda script, *argv: alone(script, "--scale", "smoke", *argv))


@pytest.fixture(autouse=True)
def scripts_run_on_the_cpu(request, monkeypatch):
    """Also where there is a GPU: what they promise to the bit holds there. Not for kernels, nor the mark gpu."""
    if "kernels" not in request.path.parts and not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ---------------------------------------------------------------- kill and resume
def kill_after_save(cwd, share, whole):
    """A `meanwhile`: SIGKILL after the next state.pt and `share` of the time that is then left of `whole`."""
    def saves():
        return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in cwd.rglob("state.pt")}

    def kill(process):
        while process.poll() is None and saves() == before:
            time.sleep(0.002)
        time.sleep(share * max(0.0, whole.seconds - (time.monotonic() - began)))
        if process.poll() is None and not list(cwd.rglob("result.json")):
            print(f"SIGKILL {time.monotonic() - began:.2f} s after the start")
            process.kill()

    before, began = saves(), time.monotonic()
    return kill


def result_of(run):
    """A run's exported weights as hashes, and its result.json without minutes, argv and measures of speed."""
    def steady(record):
        timing = re.compile(r"^(minutes|argv)$|per_s(?![a-z])|seconds|mfu")
        return {key: value for key, value in record.items() if not timing.search(key)}

    weights = {str(p.relative_to(run.out)): hashlib.sha256(p.read_bytes()).hexdigest()
               for p in run.out.rglob("*.safetensors")}
    text = (run.out / "result.json").read_text()
    return weights, json.loads(text, object_hook=steady, parse_constant=str)  # as text, NaN equals NaN


@pytest.fixture
def outcome():
    """`outcome(run)`: see result_of."""
    return result_of


@pytest.fixture
def kill_and_resume(alone, smoke):
    """`kill_and_resume(script, *argv, seed=0)`: the smoke run, killed and continued, equals the whole one.

    One kill is certain; a second, during the first continuation, may come too late. Returns the last run.
    """
    def check(script, *argv, seed=0):
        whole, rng, codes = smoke(script, *argv), random.Random(seed), (0, -signal.SIGKILL)
        start = functools.partial(alone, script, "--scale", "smoke", *argv, codes=codes)
        for share in (0.9, 0.3, 0.0):  # where the run ended before the kill: kill a new one earlier
            cwd = alone.new()
            run = start(cwd=cwd, meanwhile=kill_after_save(cwd, share * rng.random(), whole))
            if run.returncode:
                break
        assert run.returncode, "the run ended before the kill: it writes state.pt only at its end, or never"
        kill = kill_after_save(cwd, 0.3 * rng.random(), whole)
        while run.returncode:
            run = start("--resume", cwd=cwd, meanwhile=kill)
            kill = None
        assert result_of(run) == result_of(whole)
        return run
    return check


# ---------------------------------------------------------------- bad input
@pytest.fixture
def rejects(capsys, monkeypatch, tmp_path):
    """`rejects(main, argv, *words)`: one line `error: ...` with all words, exit status 2, no file written."""
    def check(main, argv, *words):
        (work := tmp_path / "rejects").mkdir(exist_ok=True)
        monkeypatch.chdir(work)
        capsys.readouterr()  # forget what an earlier call printed
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and len(err.splitlines()) == 1 and err.startswith("error: "), err
        assert [word for word in words if str(word) not in err] == [], err
        assert "Traceback" not in out and list(work.rglob("*")) == []
    return check


# ---------------------------------------------------------------- markers and time limits
def pytest_addoption(parser):
    for name, text in OPT_IN.items():
        parser.addoption(f"--{name}", action="store_true", help=f"also run a test that {text}")


def asked(config, name):
    """Is the marker on by its flag or in `-m`?"""
    return config.getoption(name) or re.search(rf"(?<!not )\b{name}\b", config.getoption("-m"))


def peers_missing():
    """Libraries that tests import if they are there, and that are not."""
    text = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    return sorted(name for name in {*re.findall(r'importorskip\("(\w+)', text)} if not importlib.util.find_spec(name))


def pytest_configure(config):
    if asked(config, "peers") and (missing := peers_missing()):
        raise pytest.UsageError(f"no {', '.join(missing)} for --peers: pip install -r tests/requirements-peers.txt")
    for name, text in {**OPT_IN, "gpu": "needs CUDA", "slow": "starts a script as a process"}.items():
        config.addinivalue_line("markers", f"{name}: a test that {text}")
    config.addinivalue_line("filterwarnings", "error::pytest.PytestUnknownMarkWarning")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config, items):
    missing = {name: f"needs --{name}" for name in OPT_IN if not asked(config, name)}
    missing |= {} if torch.cuda.is_available() else {"gpu": "needs CUDA"}
    for item in items:
        if {"alone", "smoke", "kill_and_resume"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
        for name in missing.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=missing[name]))


def pytest_runtest_logreport(report):
    if not OPT_IN.keys() & set(report.keywords):  # the limits are about plain `pytest`
        SECONDS[report.nodeid.split("::")[0]] += report.duration


def late():
    """One line for each test file over its limit: 45 s, 90 s in tests/kernels and for test_repo.py, which dry-runs all
    scripts, 300 s for compiling all kernels."""
    long = {"tests/kernels/test_aot.py": 300, "tests/test_repo.py": 90}
    limits = {name: FACTOR * long.get(name, 90 if "kernels/" in name else 45) for name in SECONDS}
    return [f"TOO SLOW {name}: {SECONDS[name]:.1f} s, limit {limits[name]:.0f} s\n"
            for name in SECONDS if SECONDS[name] > limits[name]]


def pytest_sessionfinish(session):
    limited = "TEST_TIME_FACTOR" in os.environ  # else the machine may be slow, which is told and no failure
    session.exitstatus = session.exitstatus or int(limited and bool(late()))


def pytest_terminal_summary(terminalreporter):
    reasons = collections.Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    for reason, n in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped {n}: {reason.removeprefix('Skipped: ')}")
    terminalreporter.write("".join(late()), red=True)
