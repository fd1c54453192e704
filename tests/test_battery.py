# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Reliability: `pytest -m battery` does all of it, about half an hour on two cores; plain `pytest` does a sample.

Each script is killed 20 times at random moments and resumed, runs into a full disk or a directory that it may not
write, finds its checkpoint damaged or another run's, and other files of its run cut. Each reader of READERS, by which
the scripts take files of their users (tables, JSON, tokens, text, pictures, checkpoints) and rows of their own, is
given 200 mutants of a good file. The block `chat` asks an endpoint at which three requests in ten fail. What is asked
each time: the same result as without, or one line `error: ...` and exit code 2; no traceback, nothing lost.
"""
import importlib
import io
import json
import random
import re
import resource
import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_chat import FakeChat
from PIL import Image
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
    sys.stderr.reconfigure(errors="backslashreplace")  # as it is outside of a test
    found = []
    try:
        importlib.import_module(SAMPLE).from_shell(lambda: found.append(call()))  # a block, the same in all scripts
        return found[0]
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
          b'"\\ud800"', b"\\ud800", b"\\n", b"9" * 5000, b"[" * 3000, b"\xff\xfe", b"\xf0\x9f\x98\x80", b"#### ", b"=",
          b"\r", b"\t"]


def mutant(content, rng):
    """One to three random changes: a bit, a slice that is gone or doubled, a scrap put in, or put in place of a word or
    of a text in quotes, or bytes put in."""
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        b = min(b, a + rng.choice([1, 4, 64]))
        kind, words = rng.randrange(6), list(re.finditer(rb'"[^"\\]*"|[\w.+-]+', content))
        if kind == 0 and content:
            content = flipped(content, rng)
        elif kind == 1:
            content = content[:a] + content[b:]
        elif kind == 2:
            content = content[:b] + content[a:b] + content[b:]
        elif kind == 3:
            content = content[:a] + rng.choice(SCRAPS) + content[b:]
        elif kind == 4 and words:
            word = rng.choice(words)
            content = content[: word.start()] + rng.choice(SCRAPS) + content[word.end():]
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
CITY = dict(type="object", properties=dict(city=dict(type="string"), days=dict(type=["number", "null"])),
            required=["city"])
TOOLS = [dict(type="function", function=dict(name="get_rain", description="now", parameters=CITY)),  # OpenAI, MCP, BFCL
         dict(result=dict(tools=[dict(name="get_snow", inputSchema=CITY, outputSchema=CITY)])),
         dict(id="0", function=[dict(name="get.sun", parameters=CITY | dict(type="dict"), response=CITY)])]
CALL = dict(id="c0", type="function", function=dict(name="get_rain", arguments='{"city": "Kelo"}'))
DIALOGUE = dict(tools=TOOLS[:1], messages=[
    dict(role="user", content="Rain in Kelo?"), dict(role="assistant", content=None, tool_calls=[CALL]),
    dict(role="tool", tool_call_id="c0", content='{"rain": 3}'), dict(role="assistant", content="Yes.")])
BERKELEY = [dict(id=f"multiple_{i}", question=[[dict(role="user", content="Sun?")]], function=TOOLS[2]["function"])
            for i in range(3)]
GOLD = [dict(id=row["id"], ground_truth=[{"get.sun": dict(city=["Kelo"])}]) for row in BERKELEY]
TOLD = [dict(id="0", image="a.png", conversations=[{"from": "human", "value": "<image>\nWhich?"},
                                                   {"from": "gpt", "value": "red"}])] * 3
POPE = [dict(question_id=i, image="a.png", text="Is it red?", label=("yes", "no")[i % 2]) for i in range(3)]
DIGITS = "".join(",".join(str((7 * i + j) % 17) for j in range(64)) + f",{i % 10}\n" for i in range(25)).encode()
SEEDS = [dict(question=f"ana has {n} pens and finds 3 more . how many now ?") for n in range(1, 9)]
PIXELS = np.uint8(np.arange(15 * 12 * 3) % 256).reshape(15, 12, 3)


def beside(file, content, good):
    """A good content that is a function: it writes the file that the reader needs beside it."""
    def make():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(content() if callable(content) else content)
        return good() if callable(good) else good
    return make


def written(write, what):
    """The bytes that write(file, what) writes."""
    write(file := io.BytesIO(), what)
    return file.getvalue()


def small_game():
    return torch.nn.Linear(4, 2), torch.arange(4), torch.zeros(4)


def tokenizer():
    """A tokenizer.json of single bytes and two merges."""
    plain = [b for b in range(256) if chr(b).isprintable() and b != 32]
    names = [*map(chr, plain), *(chr(256 + i) for i in range(256 - len(plain))), "it", "\u0120it", "<|im_end|>"]
    vocab = {name: i for i, name in enumerate(names)}
    return json.dumps(dict(
        normalizer=None, pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True),
        added_tokens=[dict(id=vocab["<|im_end|>"], content="<|im_end|>")],
        model=dict(type="BPE", merges=["i t", "\u0120 it"], vocab=vocab))).encode()


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
    "flatquant config": ("flatquant", "config.json",
                         beside("model.safetensors", weights, json.dumps(SHAPE).encode()),
                         lambda m, path: m.load_real(Path(path).parent)),
    "flatquant weights": ("flatquant", "model.safetensors", beside("config.json", json.dumps(SHAPE).encode(), weights),
                          lambda m, path: m.load_real(Path(path).parent)),
    "tokenizer": ("flatquant", "tokenizer.json", tokenizer, lambda m, path: m.load_tokenizer(
        Path(path).parent).encode("it is")),
    "toolflow tools": ("toolflow", "t.json", lines(*TOOLS), lambda m, path: m.load_tools(Path(path))),
    "toolflow training": ("toolflow", "d.jsonl", lines(DIALOGUE, DIALOGUE),
                          lambda m, path: m.read_training(Path(path))),
    "toolflow bfcl": ("toolflow", "BFCL_v4_multiple.json",
                      beside("possible_answer/BFCL_v4_multiple.json", lines(*GOLD), lines(*BERKELEY)),
                      lambda m, path: m.read_bfcl(Path(path).parent, "multiple")),
    "toolflow bfcl answers": ("toolflow", "possible_answer/BFCL_v4_multiple.json",
                              beside("BFCL_v4_multiple.json", lines(*BERKELEY), lines(*GOLD)),
                              lambda m, path: m.read_bfcl(Path(path).parents[1], "multiple")),
    "vistog llava": ("vistog", "d.json", beside("a.png", b"", json.dumps(TOLD).encode()),
                     lambda m, path: m.read_records(path, ".", m.llava_turns)),
    "vistog pope": ("vistog", "d.jsonl", beside("a.png", b"", lines(*POPE)),
                    lambda m, path: m.read_records(path, ".", m.pope_turns)),
    "vistog digits": ("vistog", "d.csv", DIGITS, lambda m, path: m.read_digits(path)),
    "vistog picture": ("vistog", "p.jpg", written(Image.fromarray(PIXELS).save, "JPEG"),
                       lambda m, path: m.read_image(path, 8)),
    "reversegen seeds": ("reversegen", "s.jsonl", lines(*SEEDS), lambda m, path: m.read_seeds(m.Config(seeds=path))),
    "reversegen rows": ("reversegen", "r.jsonl", lines(*(dict(id=i, drop="") for i in range(6))),
                        lambda m, path: m.read_rows(Path(path), 2)),
    "rise rows": ("rise", "r.jsonl", lines(*(dict(id=i, text="so") for i in range(6))),
                  lambda m, path: m.read_rows(Path(path))),
    "gametheory png": ("gametheory", "p.png", written(Image.fromarray(PIXELS).save, "PNG"),
                       lambda m, path: m.Images.read(SimpleNamespace(size=8), Path(path))),
    "gametheory jpg": ("gametheory", "p.jpg", written(Image.fromarray(PIXELS).save, "JPEG"),
                       lambda m, path: m.Images.read(SimpleNamespace(size=8), Path(path))),
    "gametheory npy": ("gametheory", "x.npy", written(np.save, np.ones(4, np.float32)),
                       lambda m, path: m.load_callable(m.Config(callable=f"{__name__}:small_game", explain=path))),
}


@pytest.mark.parametrize("n", [10, pytest.param(200, marks=pytest.mark.battery)])
@pytest.mark.parametrize("kind", READERS)
def test_mutants_of_files(kind, n, tmp_path, capsys, monkeypatch):
    """The good file is read; of its mutants none raises anything but the one line and code 2, and some are refused."""
    name, file, good, read = READERS[kind]
    script, path, rng, refused = importlib.import_module(name), tmp_path / file, random.Random(kind), 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which gametheory's --callable adds
    path.parent.mkdir(exist_ok=True)
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


# ---------------------------------------------------------------- an endpoint that fails
CHATS = "reversegen reviseval rise toolflow".split()  # those with the block `chat`
AGAIN, NONE = [429, 500, 503], [b"no json", b"{}", "huge"]  # is asked again, up to five times; comes back as None
FAULTS = [*AGAIN, *NONE] * 2 + ["cut"]  # ends the call in a line
LINE = r"error: endpoint \S+: (ChunkedEncoding|Retry)Error .*; replies are kept: run again\n"


@pytest.mark.parametrize("name, seed", [
    pytest.param(name, seed, marks=() if (name, seed) == (CHATS[0], 0) else pytest.mark.battery)
    for name in CHATS for seed in range(10)])
def test_endpoint_at_which_three_requests_in_ten_fail(name, seed, tmp_path, capsys, request):
    """Called until all is had. Each reply comes back once, for its prompt; a call asks only for what is missing."""
    def answer(payload):
        return f"{payload['messages'][0]['content']} {id(payload)}"  # no two replies are the same

    def log():
        """(prompt, reply, fault) of each request until now."""
        return [(answer(payload).split()[0], answer(payload), fault)
                for (payload, _), fault in zip(server.seen, faults)]

    def count(rows, kinds):
        """{prompt: requests with such a fault}"""
        return Counter(prompt for prompt, _, fault in rows if fault in kinds)

    rng, replies, tokens = random.Random(seed), [None], 0
    faults = [rng.choice(FAULTS) if rng.random() < 0.3 else None for _ in range(1000)]
    prompts = [f"prompt{i // 2}" for i in range(60)]  # two samples of each
    jobs = [(dict(messages=[dict(role="user", content=prompt)]), i % 2) for i, prompt in enumerate(prompts)]
    server = FakeChat(answer)
    server.faults += faults
    request.addfinalizer(server.close)
    while None in replies:
        before, client = log(), importlib.import_module(name).Chat(server.url, "name", tmp_path)
        client.http.adapters["http://"].max_retries.backoff_max = 0.01
        try:
            replies, line = client.ask(jobs), ""
        except SystemExit as stop:
            replies, line = [None], capsys.readouterr().err
            assert stop.code == 2 and re.fullmatch(LINE, line), line
        for thread in threading.enumerate():  # a call that ended in the line has left some at work
            if thread.name.startswith("ThreadPoolExecutor"):
                thread.join()
        new, tokens = log()[len(before):], tokens + client.tokens
        missing, cut = Counter(prompts) - count(before, [None]), count(new, ["cut"])
        asked = cut + count(new, [None, *NONE])
        if line:
            assert asked <= missing and (cut if "Chunked" in line else max(count(new, AGAIN).values()) > 4)
        else:
            none = Counter(prompt for prompt, reply in zip(prompts, replies) if reply is None)
            assert asked == missing and not cut and none == count(new, NONE)
        said = sorted(row[:2] for row in log() if row[2] is None)
        assert len(list(tmp_path.iterdir())) == len(said) and tokens == 7 * len(said)
    assert sorted(zip(prompts, replies)) == said
    assert client.ask(jobs) == replies and len(log()) == len(before + new) < len(faults)
    server.faults.clear()
    next(tmp_path.iterdir()).write_bytes(b'"cut')  # a damaged reply is asked for again
    assert sum(a != b for a, b in zip(client.ask(jobs), replies)) == 1
