# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""The test tools themselves: conftest.py, blocks.py, readme.py and mutate.py, on small invented scripts."""
import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import blocks
import mutate
import peers
import pytest
import readme
import style

# Ten steps of a sum, saved after each one. FORGET makes --resume lose the sum, as a broken checkpoint would.
COUNTER = '''
import argparse, importlib.util, json, os, pathlib, socket, time
p = argparse.ArgumentParser()
p.add_argument("--scale")
p.add_argument("--resume", action="store_true")
args, out = p.parse_args(), pathlib.Path("out")
out.mkdir(exist_ok=True)
state, step, total = out / "state.pt", 0, 0.0
if args.resume:
    step, total = json.loads(state.read_text())
    total = 0.0 if FORGET else total
while step < 10:
    time.sleep(0.03)
    step, total = step + 1, total + step / 7
    state.with_suffix(".tmp").write_text(json.dumps([step, total]))
    state.with_suffix(".tmp").rename(state)

def connects(address):
    try:
        socket.create_connection(address, timeout=5).close()
        return True
    except RuntimeError:
        return False

server = socket.create_server(("127.0.0.1", 0))
metrics = {"a/total": total, "a/steps_per_s": time.time(), "a/not": float("nan"),
           "a/loopback": connects(server.getsockname()), "a/network": connects(("192.0.2.1", 80)),
           "a/interpreted": "TRITON_INTERPRET" in os.environ,
           "a/repository": any(importlib.util.find_spec(n) for n in ("kernels", "conftest", "readme")),
           "a/files": len(list(pathlib.Path().glob("*.py")))}
record = json.dumps({"minutes": time.time(), "argv": str(args), "metrics": metrics})
(out / "model.safetensors").write_text(str(total))
(out / "result.json").write_text(record)
print("RESULT " + record)
'''


@pytest.fixture
def counter(tmp_path):
    def write(forget):
        path = tmp_path / "counter.py"
        path.write_text(COUNTER.replace("FORGET", str(forget)))
        return path
    return write


def test_alone_sees_no_repository_and_no_network(smoke, counter):
    script = counter(False)
    run = smoke(script)
    seen = {key.split("/")[1]: value for key, value in run.result["metrics"].items()}
    assert seen["loopback"] and not seen["network"] and not seen["interpreted"] and not seen["repository"]
    assert seen["files"] == 1 and run.out == run.cwd / "out" and smoke(script) is run


def test_kill_and_resume_accepts_an_exact_resume(kill_and_resume, counter, capsys):
    run = kill_and_resume(counter(False))
    assert run.args[-1] == "--resume" and "SIGKILL" in capsys.readouterr().out


def test_kill_and_resume_notices_a_lost_sum(kill_and_resume, counter):
    with pytest.raises(AssertionError, match="total|safetensors"):
        kill_and_resume(counter(True))


@pytest.mark.parametrize("text, status, leaves, fine", [
    ("error: --lr: give a positive number", 2, False, True), ("error: --lr", 1, False, False),
    ("error: --lr\nusage", 2, False, False), ("--lr is wrong", 2, False, False),
    ("error: --steps", 2, False, False), ("error: --lr", 2, True, False)])
def test_rejects(rejects, text, status, leaves, fine):
    def main(argv):
        if leaves:
            Path("half.json").write_text("{")
        print(text, file=sys.stderr)
        raise SystemExit(status)

    if fine:
        rejects(main, ["--lr", -1], "--lr")
    else:
        with pytest.raises(AssertionError):
            rejects(main, ["--lr", -1], "--lr")


@pytest.mark.slow
def test_options_and_time_limit_of_a_session(tmp_path, monkeypatch):
    (tmp_path / "tests" / "deep").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "tests")
    (tmp_path / "tests" / "deep" / "test_x.py").write_text(
        "import pytest, time\n@pytest.mark.real\ndef test_real(): time.sleep(1)\n"
        "def test_plain(): time.sleep(0.1)\n")

    def session(factor, *argv):
        monkeypatch.setenv("TEST_TIME_FACTOR", factor)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *argv]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return run.returncode, run.stdout

    status, text = session("0.01", "tests/deep/test_x.py", "--real")  # limit 0.45 s, opt-in not counted
    assert status == 0 and "2 passed" in text
    status, text = session("0.001")
    assert status == 1 and "1 passed, 1 skipped" in text and "TOO SLOW tests/deep/test_x.py: 0.1 s" in text
    assert "skipped 1: needs --real" in text


def test_peers_keeps_what_the_scripts_print(tmp_path, capsys):
    for name, body in (("good", "print('ours 2 x')"), ("bad", "raise SystemExit(3)")):
        (tmp_path / f"speed_{name}.py").write_text(f'"""Title of {name}.\n\nHow."""\n{body}\n')
    scripts = sorted(tmp_path.glob("speed_*.py"))
    peers.main((), tmp_path, scripts)
    found = json.loads((tmp_path / "peers.json").read_text())["found"]
    assert found == dict(bad=["ended with status 3"], good=["ours 2 x"])
    scripts[0].write_text(scripts[0].read_text().replace("raise SystemExit(3)", "print('mended')"))
    peers.main(["bad"], tmp_path, scripts)  # the other one is not run again
    found = json.loads((tmp_path / "peers.json").read_text())["found"]
    assert found == dict(bad=["mended"], good=["ours 2 x"])
    assert capsys.readouterr().out.split() == ["bad", "good", "bad"]
    text = (tmp_path / "peers.md").read_text()
    assert "## Title of good.\n\nHow.\n\n```\nours 2 x\n```\n" in text and "torch 2" in text


# ---------------------------------------------------------------- blocks.py
def block(name, body):
    return f"x = 1\n# --- block: {name} ---\n{body}# --- end block ---\n"


def test_blocks_copy_makes_them_identical(tmp_path):
    (tmp_path / "a.py").write_text(block("cli", "a = r'\\1'\n") + block("log", "b = 1\n"))
    (tmp_path / "b.py").write_text(block("cli", "a = 2\n") + "y = 2\n" + block("log", "b = 1\n"))
    (tmp_path / "c.py").write_text("z = 3\n")
    assert blocks.problems(tmp_path) == ["b.py: block cli differs from the one in a.py"]
    assert blocks.copy(tmp_path / "a.py", "cli", tmp_path) == ["b.py"]
    expected = block("cli", "a = r'\\1'\n") + "y = 2\n" + block("log", "b = 1\n")
    assert (tmp_path / "b.py").read_text() == expected and blocks.problems(tmp_path) == []


@pytest.mark.parametrize("text, words", [
    (block("cli", "a = 1\n" * 32), "has 32 lines, its limit is 31"),
    (block("own", "a = 1\n"), "its limit is 0"),
    ("# --- block: cli ---\na = 1\n", "pair up"), ("# --- end block ---\n", "pair up"),
    (block("cli", "a = 1\n") + block("cli", "a = 2\n"), "differs")])
def test_blocks_problems(tmp_path, text, words):
    (tmp_path / "a.py").write_text(text)
    assert len(blocks.problems(tmp_path)) == 1 and words in blocks.problems(tmp_path)[0]


# ---------------------------------------------------------------- readme.py
SCRIPT = '''
Config, SCALES = None, {}
def verdict(statistic, ci, threshold):
    return "HOLDS" if ci[0] > threshold else "INCONCLUSIVE"
def method_hash(cfg):
    return cfg
CLAIMS = [(name, "x - y", 0.0, "") for name in "c0 c1 c2 c3 c4 above around below".split()]
def cli(cls, scales, argv):
    if "--bad" in argv:
        raise SystemExit(2)
    return "h1"
def main(argv):
    import os, pathlib, sys
    pathlib.Path("made").write_text("")
    print(f"{1000:,} parameters of {argv[0]}", "no number here", "3 s a step, measured", sep=chr(10))
    print(f"{len(os.listdir())} file")
    if "--fails" in argv:
        print("error: --fails: not here", file=sys.stderr)
        raise SystemExit(2)
'''
REGION = "Text\n<!-- results: toy-t-small-main columns: nll, acc x -->\nformer\n<!-- end results -->\nEnd\n"


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "toy.py").write_text(SCRIPT)
    (tmp_path / "README.md").write_text(REGION)
    (tmp_path / "results").mkdir()
    for seed in range(3):
        record = {"script": "toy", "task": "t", "scale": "small", "tag": "main", "seed": seed,
                  "method_hash": "h1", "argv": ["--seed", str(seed)], "commit": "0123456789abcdef",
                  "device": "cpu", "threads": 2, "versions": {"torch": "2"}, "minutes": 1.0 + seed,
                  "metrics": {"a/nll": 1.0 + seed, "a/acc x": 0.5, "b/top": float("nan"), "b/nll": 0.1},
                  "claims": [{"id": "c1", "statistic": 1.0 + seed, "ci": [0.0, 9.0], "threshold": -1.0}]}
        (tmp_path / "results" / f"toy-t-small-main-s{seed}.json").write_text(json.dumps(record))
    return tmp_path


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_readme_region_over_three_seeds(repository):
    """Mean 2, deviation 1, t(2) = 4.303: the interval is 2 +- 4.303 / sqrt(3) = [-0.4844, 4.484]."""
    assert readme.main([], repository) == 1 and readme.main(["--write"], repository) == 0
    text = (repository / "README.md").read_text()
    assert "| arm | nll | acc x |\n| --- | --- | --- |\n| a | 2.0 ± 1.0 | 0.5 |\n| b | 0.1 |  |\n" in text
    assert "former" not in text
    assert "- c1: x - y = 2, 95 % interval over seeds [-0.4843, 4.484], threshold -1: HOLDS\n" in text
    assert ("`python toy.py --seed S`: n = 3 (seed 0, 1, 2), 2.0 min each, cpu, 2 threads, torch 2, "
            "commit 0123456789\n") in text
    assert text.startswith("Text\n") and text.endswith("<!-- end results -->\nEnd\n")
    assert readme.main([], repository) == 0


def test_readme_says_stale_and_takes_the_interval_of_a_single_run(repository):
    for seed in (1, 2):
        (repository / "results" / f"toy-t-small-main-s{seed}.json").unlink()
    edit(repository / "results" / "toy-t-small-main-s0.json", method_hash="h0")
    assert readme.main(["--write"], repository) == 0
    text = (repository / "README.md").read_text()
    assert "**STALE**" in text and "interval of the run [0, 9]" in text and "| a | 1 | 0.5 |" in text


def test_readme_takes_the_interval_of_the_run_where_no_seed_changes_the_statistic(repository):
    for seed in range(3):
        claim = {"id": "c1", "statistic": 1.0, "ci": [0.0, 9.0], "threshold": -1.0}
        edit(repository / "results" / f"toy-t-small-main-s{seed}.json", claims=[claim])
    assert readme.main(["--write"], repository) == 0
    text = (repository / "README.md").read_text()
    assert "- c1: x - y = 1, 95 % interval of the run [0, 9], threshold -1: HOLDS\n" in text


@pytest.mark.parametrize("readme_text, words", [
    (REGION + "`python toy.py --bad`\n", "--bad"), (REGION + "`python gone.py`\n", "gone.py"),
    (REGION.replace("nll", "speed"), "no measure named speed"),
    (REGION.replace("acc x", "acc x rows: z"), "no row named z"), ("nothing", "no region of README uses it"),
    (REGION.replace("main", "other"), "there is no results/toy-t-small-other"),
    (REGION.replace("<!-- end results -->", ""), "not well formed")])
def test_readme_mistakes(repository, capsys, readme_text, words):
    (repository / "README.md").write_text(readme_text)
    assert readme.main(["--write"], repository) == 1 and words in capsys.readouterr().out


def test_readme_rows(repository):
    (repository / "README.md").write_text(REGION.replace("acc x -->", "acc x rows: b -->"))
    assert readme.main(["--write"], repository) == 0
    text = (repository / "README.md").read_text()
    assert "| b | 0.1 |  |\n" in text and "| a |" not in text


def test_readme_refuses_a_misnamed_record_and_two_thresholds(repository, capsys):
    edit(repository / "results" / "toy-t-small-main-s1.json", seed=7)
    claim = {"id": "c1", "statistic": 1.0, "ci": [0.0, 9.0], "threshold": 0.5}
    edit(repository / "results" / "toy-t-small-main-s2.json", claims=[claim])
    assert readme.main(["--write"], repository) == 1
    out = capsys.readouterr().out
    assert "toy-t-small-main-s1.json: the name is not" in out and "claim c1 has two thresholds" in out


def test_readme_counts_claims_that_are_not_named(repository, capsys):
    for seed in range(3):
        more = [{"id": f"c{i}", "statistic": i + seed / 100 - 0.01, "ci": [i - 1.0, i + 1.0], "threshold": 2.5}
                for i in range(5)]
        edit(repository / "results" / f"toy-t-small-main-s{seed}.json", claims=more)
    (repository / "README.md").write_text(REGION.replace(" -->\nformer", " claims: c4, c0 -->\nformer"))
    assert readme.main(["--write"], repository) == 0 and readme.main([], repository) == 0
    text = (repository / "README.md").read_text()
    assert "- c0: x - y = 0" in text and "- c4: x - y = 4" in text and "c1: " not in text
    assert "| arm | nll | acc x |" in text
    assert "- the other claims: 1 HOLDS, 2 INCONCLUSIVE" in text
    (repository / "README.md").write_text(text.replace("c4, c0", "c9"))
    assert readme.main(["--write"], repository) == 1 and "no claim named c9" in capsys.readouterr().out


def test_readme_counts_a_claim_once_that_another_region_names(repository):
    for seed in range(3):
        more = [{"id": f"c{i}", "statistic": i + 0.1, "ci": [i - 1.0, i + 1.0], "threshold": 2.5} for i in range(3)]
        edit(repository / "results" / f"toy-t-small-main-s{seed}.json", claims=more)
    one, other = (REGION.replace(" -->\nformer", f" claims: {name} -->\nformer") for name in ("c0", "c1"))
    (repository / "README.md").write_text(one + other)
    assert readme.main(["--write"], repository) == 0
    assert (repository / "README.md").read_text().count("- the other claims: 1 INCONCLUSIVE") == 2


def test_readme_second_table_of_the_same_records(repository, capsys):
    bare = REGION.replace(" -->\nformer", " claims: none -->\nformer")
    (repository / "README.md").write_text(REGION + bare)
    assert readme.main(["--write"], repository) == 0
    text = (repository / "README.md").read_text()
    assert text.count("| a | 2.0 ± 1.0 | 0.5 |") == 2 and text.count("- c1: ") == text.count("`python toy.py") == 1
    (repository / "README.md").write_text(bare)
    assert readme.main(["--write"], repository) == 1 and "no other region has its claims" in capsys.readouterr().out


def test_readme_says_how_many_seeds_measured_a_claim(repository):
    """Seeds 1 and 2, of 2 and 3: mean 2.5, t(1) = 12.706; no seed but one: its own interval."""
    edit(repository / "results" / "toy-t-small-main-s0.json", claims=[])
    assert readme.main(["--write"], repository) == 0
    text = (repository / "README.md").read_text()
    assert "c1: x - y = 2.5, 95 % interval over seeds [-3.853, 8.853]" in text and "(measured in 2 of 3 seeds)" in text
    edit(repository / "results" / "toy-t-small-main-s1.json", claims=[])
    assert readme.main(["--write"], repository) == 0
    text = (repository / "README.md").read_text()
    assert "c1: x - y = 3, 95 % interval of the run [0, 9]" in text and "(measured in 1 of 3 seeds)" in text


def test_readme_summary(repository, capsys):
    """A row per script: ours and the baseline's measure over seeds, the verdict over seeds, STALE where it changed."""
    spec = "<!-- summary\ntoy-t-small-main | c1 | a/nll | b/nll\n-->\nformer\n<!-- end summary -->\n"
    (repository / "README.md").write_text(REGION + spec)
    assert readme.main(["--write"], repository) == 0 and readme.main([], repository) == 0
    row = (repository / "README.md").read_text().splitlines()[-3]
    assert row == ("| [toy.py](toy.py) | c1 | 2.0 ± 1.0 (a/nll) | 0.1 (b/nll) | HOLDS | 1, 0, 0 "
                   "| `python toy.py --seed S` | 2.0 "
                   "| [n = 3](results/toy-t-small-main-s0.json) |")
    edit(repository / "results" / "toy-t-small-main-s0.json", method_hash="h0")
    assert readme.main(["--write"], repository) == 0
    assert "| STALE |" in (repository / "README.md").read_text()
    for wrong in (spec.replace("c1", "c9"), spec.replace("a/nll", "a/speed"), spec.replace(" | b/nll", "")):
        (repository / "README.md").write_text(REGION + wrong)
        assert readme.main(["--write"], repository) == 1 and "summary: toy-t-small-main" in capsys.readouterr().out


def test_readme_lists_the_claims_that_fail(repository):
    """Over seeds 1, 2, 3 the interval is [-0.48, 4.48]: above -1, around 0, below 5; the script in front."""
    kinds = dict(above=-1.0, around=0.0, below=5.0)
    for seed in range(3):
        some = [{"id": name, "statistic": 1.0 + seed, "ci": [0.0, 9.0], "threshold": t} for name, t in kinds.items()]
        edit(repository / "results" / f"toy-t-small-main-s{seed}.json", claims=some)
    code = SCRIPT.replace('else "INC', 'else "DOES NOT HOLD" if ci[1] < threshold else "INC')
    (repository / "toy.py").write_text(code)
    (repository / "README.md").write_text(REGION + "<!-- failed claims -->\nformer\n<!-- end failed claims -->\n")
    assert readme.main([], repository) == 1
    assert readme.main(["--write"], repository) == 0 and readme.main([], repository) == 0
    found = (repository / "README.md").read_text().split("<!-- failed claims -->")[1]
    assert found == ("\n\n- [toy.py](toy.py), t-small-main, below: x - y = 2, 95 % interval over seeds "
                     "[-0.4843, 4.484], threshold 5: DOES NOT HOLD\n\n<!-- end failed claims -->\n")
    for seed in range(3):  # the same networks in another run: listed once
        path = repository / "results" / f"toy-t-small-again-s{seed}.json"
        path.write_text((repository / "results" / f"toy-t-small-main-s{seed}.json").read_text())
        edit(path, tag="again")
    text = (repository / "README.md").read_text()
    (repository / "README.md").write_text(text + REGION.replace("small-main", "small-again"))
    assert readme.main(["--write"], repository) == 0
    assert (repository / "README.md").read_text().count("below: x - y = 2") == 3  # in two regions, and here
    edit(repository / "results" / "toy-t-small-main-s1.json", method_hash="h0")
    assert readme.main(["--write"], repository) == 0
    assert "\n- **STALE** [toy.py](toy.py), t-small-main, below" in (repository / "README.md").read_text()


def test_readme_dry_run(repository, capsys):
    """Lines with a number, in an empty directory; not what was measured. No --dry-run or an error: a mistake."""
    region = "<!-- dry-run: python toy.py --x --dry-run -->\nformer\n<!-- end dry-run -->\n"
    (repository / "README.md").write_text(REGION + region)
    assert readme.main([], repository) == 1
    assert readme.main(["--write"], repository) == 0 and readme.main([], repository) == 0
    text = (repository / "README.md").read_text()
    assert "--dry-run -->\n\n```\n1,000 parameters of --x\n1 file\n```\n\n<!-- end dry-run -->\n" in text
    assert not (repository / "made").exists() and not Path("made").exists()
    for flags, words in (("--x", "the command has no --dry-run"), ("--fails --dry-run", "error: --fails: not here")):
        (repository / "README.md").write_text(REGION + region.replace("--x --dry-run", flags))
        assert readme.main(["--write"], repository) == 1 and words in capsys.readouterr().out
        assert "former" in (repository / "README.md").read_text()


def test_readme_dry_runs_do_not_depend_on_the_machine(monkeypatch, one_thread):
    """On eight cores README's dry runs print what stands there, which was written on fewer."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    text = (readme.ROOT / "README.md").read_text()
    for region, _, script, flags, _ in readme.DRY_RUN.findall(text):
        printed = readme.dry_run(script, flags, readme.ROOT)
        assert printed and f"{region}\n```\n{printed}```\n\n<!-- end" in text, flags


def test_interval_uses_the_t_quantile_beyond_the_table():
    """t(0.975, 11) = 2.200985 and t(0.975, 29) = 2.045230 in printed tables."""
    for n, t in ((12, 2.200985), (30, 2.045230)):
        values = [0.0, 1.0] * (n // 2)
        expected = t * (n / (4 * (n - 1))) ** 0.5 / n**0.5
        assert readme.half_width(values) == pytest.approx(expected, rel=2e-3)


# ---------------------------------------------------------------- style.py
MEASURED = '''"""Of a paper.
Eq. 3 is (B, L, d)."""
import json
import torch
from kernels import f
# ---------------------------------------------------------------- 3. Model
def a(x):
    """x (B, L, d) and (B,), not (see there, please). (our choice)"""
    # why
    assert x
    if x:
        return 1
    elif f:
        for y in x:
            return y  # (2^n, T)
# --- block: cli ---
class B:
    def b(self): return ("(C, D)", "# no comment")
# --- end block ---
# ---------------------------------------------------------------- 5. Evaluation
''' + "z = 1" + 120 * " " + "# (E, F) Alg. 2\n"


def test_style_counts(tmp_path, capsys):
    """21 lines, 4 of them in a block; 9 lines of code in section 3 with 3 shapes, 13 in all with 3 comments."""
    (tmp_path / "tiny.py").write_text(MEASURED)
    style.main(tmp_path)
    names, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert dict(zip(names, row, strict=True)) == dict(
        script="tiny", lines="21", outside="17", functions="2", median="5", longest="9", nesting="3", wide="1",
        comments="23", tags="3", shapes="33", asserts="1", imports="1")


# ---------------------------------------------------------------- README's exercises
def exercises():
    """Script -> its part of the reading path."""
    text = (readme.ROOT / "README.md").read_text().split("\n## A reading path\n")[1].split("\n## ")[0]
    parts = re.split(r"^### \[(\w+)\.py\].*$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def test_readme_has_exercises_for_each_script():
    scripts = {path.stem for path in readme.ROOT.glob("*.py")}
    assert exercises().keys() == scripts


@pytest.mark.parametrize("name", exercises())
def test_readme_exercises(name, one_thread):
    """Three questions, each with an answer of up to four lines of Python that is right when it is pasted alone."""
    answers = re.findall(r"<summary>answer</summary>\n\n```python\n(>>> .*?\n)```\n", exercises()[name], re.S)
    assert len(answers) == exercises()[name].count("```python") == 3
    for answer in answers:
        test, said = doctest.DocTestParser().get_doctest(answer, {}, name, "README.md", 0), []
        assert test.examples[-1].want and len(re.findall("^>>> ", answer, re.M)) <= 4
        assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)


def test_readme_as_a_doctest(one_thread):
    """What `python -m doctest README.md` does."""
    found = doctest.testfile(str(readme.ROOT / "README.md"), module_relative=False)
    assert found.failed == 0 and found.attempted >= 6 * len(exercises())


# ---------------------------------------------------------------- mutate.py
TINY = '''"""Not mutated: 1 - 2."""
# ---------------------------------------------------------------- 4. Method
def f(x, y=1, *, z: int = 2):
    """Docstring 3."""
    assert y == 1, f"message {y - 1}"
    é = x.sum(dim=-1) - max(x.detach(), y)
    return torch.where((x < y) & z, é, True)
# ---------------------------------------------------------------- 5. Evaluation and claims
g = 1 - 2
'''


def test_mutants_are_the_listed_mistakes_and_nothing_else():
    original = TINY.splitlines()
    found = set()
    for line, text in mutate.mutants(TINY):
        changed = [new.strip() for old, new in zip(original, text.splitlines(), strict=True) if old != new]
        assert len(changed) == 1 and changed[0] == text.splitlines()[line - 1].strip()
        found.add(changed[0])
        compile(text, "mutant", "exec")
    assert found == {
        'assert (y != 1), f"message {y - 1}"', 'assert y == (2), f"message {y - 1}"',
        "é = (x.sum(dim=-1) + max(x.detach(), y))", "é = x.sum(dim=(0)) - max(x.detach(), y)",
        "é = x.sum(dim=-1) - (min)(x.detach(), y)", "é = x.sum(dim=-1) - max((x), y)",
        "return (torch.where((x < y) & z, True, é))", "return torch.where((x < y), é, True)",
        "return torch.where(((x >= y)) & z, é, True)", "return torch.where((x < y) & z, é, (False))"}


@pytest.mark.slow
def test_mutate_reports_what_no_test_pins(tmp_path, monkeypatch, capsys):
    head, _, tail = TINY.partition(TINY[TINY.index("def f"):TINY.rindex("# --")])
    code = f"{head}def f(x):\n    unused = x - 1\n    return x + x\n{tail}"
    (tmp_path / "tests").mkdir()
    (tmp_path / "tiny.py").write_text(code)
    (tmp_path / "tests" / "test_tiny.py").write_text(
        "import sys\nsys.path.insert(0, '.')\nimport tiny\ndef test_f():\n    assert tiny.f(3) == 6\n")
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    mutate.main(["tiny.py"])
    out = capsys.readouterr().out
    assert "1 of 3 killed (3 possible); survivors:" in out and "+ unused = (x + 1)" in out
    assert (tmp_path / "tiny.py").read_text() == code
    (tmp_path / "tests" / "test_tiny.py").write_text("def test_f():\n    assert False\n")
    with pytest.raises(SystemExit, match="before any mutation"):
        mutate.main(["tiny.py"])
