# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Reliability: `pytest -m battery` does all of it, about half an hour on two cores; plain `pytest` does a sample.

Each script is killed 20 times at random moments and resumed, runs into a full disk, finds its checkpoint damaged or
another run's; each reader of a file is given 200 mutants of a good one. What is asked each time: the same result as
without, or one line `error: ...` and exit code 2; no traceback, nothing lost.
"""
import importlib
import json
import random
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save

SCRIPTS = sorted(path.stem for path in Path(__file__).resolve().parents[1].glob("*.py"))
SAMPLE = "convattn"  # the quickest at --scale smoke
each_script = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == SAMPLE else pytest.mark.battery) for name in SCRIPTS])
KILLED = -9


# ---------------------------------------------------------------- running
def after(seconds, cwd):
    """A `meanwhile`: SIGKILL after some seconds, unless the run has ended."""
    def kill(process):
        time.sleep(seconds)
        if not list(cwd.rglob("result.json")):
            process.kill()
    return kill


@pytest.mark.battery
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_at_random_moments(name, alone, smoke, outcome):
    """20 kills, wherever they fall; every run that comes to its end gives the whole run's result."""
    whole, rng, kills, ends = smoke(name), random.Random(name), 20, 0
    while kills or not ends:
        cwd, code = alone.new(), KILLED
        while code == KILLED:
            meanwhile = after(rng.uniform(0.1, 1.1) * whole.seconds, cwd) if kills else None
            more = ["--resume"] if list(cwd.rglob("state.pt")) else []
            run = alone(name, "--scale", "smoke", *more, cwd=cwd, codes=(0, KILLED), meanwhile=meanwhile)
            code, kills = run.returncode, kills - (run.returncode == KILLED)
        assert outcome(run) == outcome(whole)
        ends += 1


def limit_files(size):
    """A `meanwhile`: no file of the process may grow beyond `size` bytes, which ends a write like a full disk."""
    return lambda process: resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))


@each_script
def test_full_disk(name, alone, smoke, outcome):
    """One line and code 2, and with room again --resume ends in the whole run's result."""
    whole, cwd = smoke(name), alone.new()
    biggest = max(path.stat().st_size for path in whole.out.rglob("*") if path.suffix != ".png")
    for size in (biggest // 2, 600)[: 1 if name == SAMPLE else 2]:
        run = alone(name, "--scale", "smoke", "--resume", cwd=cwd, codes=(2,), meanwhile=limit_files(size))
        last = run.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and "Traceback" not in run.stderr, run.stderr
    run = alone(name, "--scale", "smoke", "--resume", cwd=cwd)
    assert outcome(run) == outcome(whole)


@each_script
def test_directory_that_cannot_be_written(name, alone):
    run = alone(name, "--scale", "smoke", "--out", "/proc/here", codes=(2,))
    assert run.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in run.stderr


# ---------------------------------------------------------------- damaged files
def flipped(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:]


def told(call, capsys):
    """What `call` returns, or None where it ended in one line `error: ...` and code 2. Anything else is raised."""
    capsys.readouterr()
    try:
        return call()
    except SystemExit as stop:
        err = capsys.readouterr().err
        assert stop.code == 2 and len(err.splitlines()) == 1 and err.startswith("error: "), err


@pytest.fixture(scope="session")
def interrupted(alone, smoke):
    """`interrupted(name, seed)`: the directory of a run that was killed after its first checkpoint."""
    def make(name, seed):
        cwd, seconds = alone.new(), smoke(name).seconds
        for _ in range(20):
            def kill(process):
                while process.poll() is None and not list(cwd.rglob("state.pt")):
                    time.sleep(0.002)
                time.sleep(0.2 * seconds * random.random())
                process.kill()
            run = alone(name, "--scale", "smoke", "--seed", seed, cwd=cwd, codes=(0, KILLED), meanwhile=kill)
            if run.returncode == KILLED and list(cwd.rglob("state.pt")):
                return next(cwd.rglob("state.pt")).parent
            shutil.rmtree(cwd)
            cwd.mkdir()
        raise AssertionError(f"{name} could not be killed between two checkpoints")
    return make


@each_script
def test_damaged_checkpoint(name, interrupted, tmp_path, capsys):
    """state.pt cut short, with a flipped bit, empty, or of another run: told, or (a flip in padding) read right."""
    script, folder, rng = importlib.import_module(name), interrupted(name, 0), random.Random(name)
    run, good = SimpleNamespace(out=tmp_path, rank=0), (folder / "state.pt").read_bytes()
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())

    def tensors(content):
        (tmp_path / "state.pt").write_bytes(content)
        state = told(lambda: script.load_state(run), capsys)
        if state is not None:
            torch.save(state, tmp_path / "again.pt")
            return (tmp_path / "again.pt").read_bytes()

    whole = tensors(good)
    assert whole is not None
    n = 20 if name == SAMPLE else 200
    for content in [b"", *(good[: rng.randrange(len(good))] for _ in range(n // 4))]:
        assert tensors(content) is None
    found = [tensors(flipped(good, rng)) for _ in range(n)]
    assert set(found) <= {None, whole} and found.count(None) > n / 2
    assert tensors((interrupted(name, 1) / "state.pt").read_bytes()) is None  # its shapes may differ
    (tmp_path / "config.json").write_text("{")
    assert tensors(good) is None


@pytest.mark.battery
@pytest.mark.parametrize("name", SCRIPTS)
def test_damaged_directory(name, interrupted, alone, smoke, outcome):
    """Any other file of an interrupted run, cut to its half: told, or the run does without it. What an arm has left as
    an export (model weights that are not read again) may stay cut."""
    folder = interrupted(name, 0)
    base = folder
    while base.name != "out":
        base = base.parent
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("state.pt", "log.jsonl")]
    for path in random.Random(name).sample(sorted(files), min(len(files), 6)):
        cwd = alone.new()
        shutil.copytree(base, cwd / "out")
        copied = cwd / "out" / path.relative_to(base)
        copied.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        run = alone(name, "--scale", "smoke", "--resume", cwd=cwd, codes=(0, 2))
        assert "Traceback" not in run.stderr, f"{path.name}: {run.stderr[-3000:]}"
        if run.returncode == 0:
            assert outcome(run)[1] == outcome(smoke(name))[1], path.name


# ---------------------------------------------------------------- mutants of files
SUDOKU = ("004300209005009001070060043006002087190007400050083000600000105003508690042910300,"
          "864371259325849761971265843436192587198657432257483916689734125713528694542916378\n")
SCRAPS = [b"{", b"}", b"[", b"]", b'"', b"\\", b",", b"\n", b"\0", b"1e999", b"NaN", b"-1", b"0", b"null", b"[]", b"{}",
          b'"\\ud800"', b"9" * 5000, b"[" * 3000, b"\xff\xfe", b"\xf0\x9f\x98\x80", b"#### ", b"=", b"\r", b"\t"]


def mutant(content, rng):
    """One to three random changes: a bit, a byte, a slice that is gone, doubled or moved, or a scrap put in."""
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        b = min(b, a + rng.choice([1, 4, 64]))
        kind = rng.randrange(5)
        if kind == 0 and content:
            content = flipped(content, rng)
        elif kind == 1:
            content = content[:a] + content[b:]
        elif kind == 2:
            content = content[:b] + content[a:b] + content[b:]
        elif kind == 3:
            content = content[:a] + rng.choice(SCRAPS) + content[b:]
        else:
            content = content[:a] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 8))) + content[a:]
    return content


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


SHAPE = dict(model_type="llama", hidden_size=8, num_attention_heads=2, intermediate_size=12, num_hidden_layers=1,
             vocab_size=20)
TOKENS = np.arange(4000, dtype=np.uint16).tobytes()


def weights():
    script = importlib.import_module("flatquant")
    return save(script.Decoder(script.read_shape(SHAPE)).state_dict())


PROBLEM = dict(question="Ann has 3 nuts. She gives 1 away. How many?", answer="3 - 1 = 2\n#### 2")
RATING = [dict(id=str(i), instruction="Say it.", response=f"It is {i}.", reference="It.", scores=dict(overall=i))
          for i in range(4)]
PAIR = [dict(input="Say it.", output_1="It is.", output_2="No.", label=1 + i % 2) for i in range(4)]
RUNS = [dict(N=n, D=d, B=b, lr=lr, loss=2 + 1 / n + 1 / d) for n in (1e4, 4e4) for d in (1e5, 4e5)
        for b in (32, 64, 128) for lr in (1e-3, 2e-3, 4e-3)]
TABLE = ("N,D,B,lr,loss\n" + "".join(",".join(map(str, r.values())) + "\n" for r in RUNS)).encode()
READERS = {  # script, file name, good content, reader of (script, path)
    "mdm csv": ("mdm", "p.csv", b"quizzes,solutions\n" + SUDOKU.encode() * 3,
                lambda m, path: m.read_problems(path, "sudoku")),
    "mdm jsonl": ("mdm", "p.jsonl", lines(*(dict(zip(("input", "output"), SUDOKU.strip().split(",")))
                                            for _ in range(3))), lambda m, path: m.read_problems(path, "sudoku")),
    "rise jsonl": ("rise", "p.jsonl", lines(PROBLEM, PROBLEM), lambda m, path: m.read_problems(path, "--data", 9)),
    "reviseval jsonl": ("reviseval", "d.jsonl", lines(*RATING), lambda m, path: m.read_data(
        m.Config(task="data", data=path))),
    "reviseval llmbar": ("reviseval", "d.json", json.dumps(PAIR).encode(), lambda m, path: m.read_data(
        m.Config(task="data", data=path, schema="llmbar"))),
    "batchlaw csv": ("batchlaw", "t.csv", TABLE, lambda m, path: m.read_runs(m.Config(
        fit=path, columns="N=N,D=D,B=B,lr=lr,loss=loss"))),
    "batchlaw jsonl": ("batchlaw", "runs.jsonl", lines(*RUNS), lambda m, path: m.read_runs(m.Config(fit=path))),
    "batchlaw tokens": ("batchlaw", "t.bin", TOKENS, lambda m, path: m.Text.read(None, m.Config(
        task="text", data=path))),
    "convattn tokens": ("convattn", "t.bin", TOKENS, lambda m, path: m.load_text(m.Config(
        task="text", data=path, seq_len=256, eval_lens="256"))),
    "flatquant text": ("flatquant", "t.txt", b"some text\n" * 50, lambda m, path: m.read_text(path, "--data")),
    "flatquant config": ("flatquant", "config.json", json.dumps(SHAPE).encode(), lambda m, path: m.read_config(
        Path(path).parent)),
    "flatquant weights": ("flatquant", "model.safetensors", weights, lambda m, path: m.load_real(
        Path(path).parent, m.read_shape(SHAPE))),
}


@pytest.mark.parametrize("n", [10, pytest.param(200, marks=pytest.mark.battery)])
@pytest.mark.parametrize("kind", READERS)
def test_mutants_of_files(kind, n, tmp_path, capsys, monkeypatch):
    """The good file is read; of its mutants none raises anything but the one line and code 2, and some are refused."""
    name, file, good, read = READERS[kind]
    script, path, rng, refused = importlib.import_module(name), tmp_path / file, random.Random(kind), 0
    monkeypatch.chdir(tmp_path)
    good = good() if callable(good) else good
    path.write_bytes(good)
    assert told(lambda: read(script, str(path)), capsys) is not None
    for i in range(n):
        path.write_bytes(content := mutant(good, rng))
        try:
            refused += told(lambda: read(script, str(path)), capsys) is None
        except Exception as error:
            raise AssertionError(f"mutant {i} of {kind}: {error!r}: {content[:2000]!r}") from error
    assert refused or "tokens" in kind or "text" in kind  # nearly any bytes are tokens
