# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""README's regions, generated from the records in results/ and from dry runs, and README's commands.

python tests/readme.py          # one line per difference or mistake, status 1 when there is one
python tests/readme.py --write  # fill the regions first
A region stands between `<!-- results: SCRIPT-TASK-SCALE-TAG columns: a, b rows: c claims: d -->` (the last three may be
left out) and `<!-- end results -->`; its records are results/SCRIPT-TASK-SCALE-TAG-s<seed>.json. Where claims are
named the others are counted by their verdicts; `claims: none` is for a second table of the same records, and leaves out
claims and command. The one table of all scripts stands between `<!-- summary` and
`<!-- end summary -->`; a line `SCRIPT-TASK-SCALE-TAG | claim | our measure | the baseline's measure` makes a row.
Between `<!-- failed claims -->` and `<!-- end failed claims -->` stands each claim of these records that does not hold;
between `<!-- dry-run: python SCRIPT.py FLAGS -->` and `<!-- end dry-run -->` what that command prints.
Run it with Python 3.11: the hash of a syntax tree differs between Python versions.
"""
import contextlib
import functools
import importlib.util
import inspect
import io
import json
import math
import re
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
REGION = re.compile(r"(<!-- results: (\S+)(?: \[?columns: (.*?)\]?)?(?: rows: (.*?))?(?: claims: (.*?))? -->\n).*?"
                    r"(<!-- end results -->)", re.S)
SUMMARY = re.compile(r"(<!-- summary\n(.*?)-->\n).*?(<!-- end summary -->)", re.S)
FAILED = re.compile(r"(<!-- failed claims -->\n).*?(<!-- end failed claims -->)", re.S)
DRY_RUN = re.compile(r"(<!-- dry-run: (python (\w+\.py) ([^\n]*)) -->\n).*?(<!-- end dry-run -->)", re.S)
COMMAND = re.compile(r"\b(?:python|uv run|torchrun\b[^\n`]*?) (\w+\.py)\b((?:[^\n`#|&;<>()]|(?<=\S)#)*)")
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's quantile, 1 to 9 degrees


@functools.cache
def load(path):
    """The script as a module, registered because dataclasses and inspect look their module up."""
    spec = importlib.util.spec_from_file_location(f"readme_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def half_width(values):
    """Half the 95 % interval of a mean by Student's t (from 10 degrees of freedom on by its expansion)."""
    n = len(values) - 1
    t = T_975[n - 1] if n < 10 else 1.95996 + 2.37227 / n + 2.8225 / n**2
    return t * statistics.stdev(values) / math.sqrt(len(values))


def cell(values, n):
    """Mean ± sample standard deviation, to two digits of the latter; says so where fewer than n seeds have a value."""
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) if len(values) > 1 and math.isfinite(mean) else 0.0
    few = f" ({len(values)} of {n} seeds)" if len(values) < n else ""
    if spread == 0:
        return f"{mean:.4g}{few}"
    digits = max(0, 1 - math.floor(math.log10(spread)))
    return f"{mean:.{digits}f} ± {spread:.{digits}f}{few}"


def table(records, columns, arms=()):
    """Rows are arms, columns are measures: the named ones, else all. An arm with none of them has no row."""
    values = {}
    for record in records:
        for key, value in record["metrics"].items():
            values.setdefault(tuple(key.split("/", 1)), []).append(value)
    columns = columns or list(dict.fromkeys(what for _, what in values))
    if missing := set(columns) - {what for _, what in values}:
        raise ValueError(f"no measure named {', '.join(sorted(missing))}")
    rows = [["arm", *columns], ["---"] * (len(columns) + 1)]
    found = list(dict.fromkeys(arm for arm, what in values if what in columns))
    if missing := set(arms) - set(found):
        raise ValueError(f"no row named {', '.join(sorted(missing))}")
    for arm in arms or found:
        row = (values.get((arm, what)) for what in columns)
        rows.append([arm, *(cell(v, len(records)) if v else "" for v in row)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def over_seeds(same):
    """Mean, interval and what it is over, of one claim in several records. Where no seed changes it, the run's own."""
    values = [c["statistic"] for c in same]
    mean = statistics.fmean(values)
    if len(set(values)) == 1:
        return values[0], same[0]["ci"], "of the run"
    return mean, [mean - half_width(values), mean + half_width(values)], "over seeds"


def outcomes(records, script):
    """Of each claim its id, its outcome and a line with its numbers. Two seeds or more: mean and t interval over seeds;
    one: the run's own interval. A claim that some seeds could not measure says so."""
    task = records[0]["task"].rstrip("0123456789")  # mdm.py has the same claims for cd3 and cd4
    formula = {x[0]: x[1] for x in (script.CLAIMS if isinstance(script.CLAIMS, list) else script.CLAIMS[task])}
    for name in dict.fromkeys(c["id"] for r in records for c in r["claims"]):
        same = [c for r in records for c in r["claims"] if c["id"] == name]
        limit = same[0]["threshold"]
        if {c["threshold"] for c in same} != {limit}:
            raise ValueError(f"claim {name} has two thresholds")
        mean, (low, high), over = over_seeds(same)
        outcome = script.verdict(mean, [low, high], limit)
        few = f" (measured in {len(same)} of {len(records)} seeds)" if len(same) < len(records) else ""
        yield name, outcome, (f"{name}: {formula[name]} = {mean:.4g}, 95 % interval {over} "
                              f"[{low:.4g}, {high:.4g}], threshold {limit:.4g}: {outcome}{few}\n")


def claims(records, script, named=(), elsewhere=()):
    """A line per claim. Where some are named, the others are only counted, but for those that other regions name."""
    found = list(outcomes(records, script))
    if missing := set(named) - {name for name, _, _ in found}:
        raise ValueError(f"no claim named {', '.join(sorted(missing))}")
    lines = [f"- {line}" for name, _, line in found if not named or name in named]
    others = sorted(outcome for name, outcome, _ in found if named and name not in {*named, *elsewhere})
    if others:
        counts = (f"{others.count(outcome)} {outcome}" for outcome in dict.fromkeys(others))
        lines.append(f"- the other claims: {', '.join(counts)}\n")
    return "".join(lines)


def different(keys, root):
    """(records, script, key, outcome, line) of each claim of these keys. What a second run of the same networks says
    again, number by number, comes once."""
    seen = set()
    for key in sorted(keys, key=lambda key: ("-main" not in key, key)):
        records, script = read(key, root)
        for _, outcome, line in outcomes(records, script):
            if (script.__name__, line) not in seen:
                yield records, script, key, outcome, line
            seen.add((script.__name__, line))


def failed(keys, root):
    """A line for each claim of the records of these keys that does not hold, the script in front."""
    lines = []
    for records, script, key, outcome, line in different(keys, root):
        name, old = records[0]["script"], "**STALE** " if stale(records, script) else ""
        if outcome == "DOES NOT HOLD":
            lines.append(f"- {old}[{name}.py]({name}.py), {key.partition('-')[2]}, {line}")
    return "".join(sorted(lines)) or "None.\n"


def tally(name, keys, root):
    """How many claims of a script's records hold, are open, do not hold."""
    found = [x[3] for x in different([key for key in keys if key.startswith(name + "-")], root)]
    return ", ".join(str(found.count(outcome)) for outcome in ("HOLDS", "INCONCLUSIVE", "DOES NOT HOLD"))


@functools.cache
def hash_now(script, *argv):
    """The method hash that a run with these flags would have; "" where the script no longer takes them."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return script.method_hash(script.cli(script.Config, script.SCALES, list(argv)))
    except SystemExit:
        return ""


def commands(records):
    """The commands of the records, each once, the seed as a letter, without their directories and --resume."""
    lines = [shlex.join(["python", f"{r['script']}.py", *r["argv"]]) for r in records]
    lines = [re.sub(r" --out[ =]\S+| --resume", "", line) for line in lines]
    lines = [re.sub(r"--seed[ =]\d+", "--seed S", re.sub(r"-s\d+\b", "-sS", line)) for line in lines]
    return [f"`{line}`" for line in dict.fromkeys(lines)]


def stale(records, script):
    """Have the settings or sections 2 to 6 changed since one of the records was made?"""
    return any(r["method_hash"] != hash_now(script, *r["argv"]) for r in records)


def source(records, script):
    """Command, cost and origin of the numbers, and STALE where the script has changed since."""
    form = "{device}, {threads} thread{plural}, torch {versions[torch]}, commit {commit!s:.10}"
    facts = dict.fromkeys(form.format(**r, plural="s" * (r["threads"] > 1)) for r in records)
    seeds = ", ".join(str(r["seed"]) for r in records)
    minutes = statistics.fmean(r["minutes"] for r in records)
    return (f"{' and '.join(commands(records))}: n = {len(records)} (seed {seeds}), {minutes:.1f} min each, "
            f"{' and '.join(facts)}{', **STALE**' if stale(records, script) else ''}\n")


def read(key, root):
    """The records of a key in the order of their seeds, and their script."""
    paths = [p for p in (root / "results").glob("*.json") if re.fullmatch(re.escape(key) + r"-s\d+", p.stem)]
    records = sorted((json.loads(path.read_text()) for path in paths), key=lambda r: r["seed"])
    if not records:
        raise ValueError(f"there is no results/{key}-s<seed>.json")
    return records, load(root / f"{records[0]['script']}.py")


def summary(lines, keys, root):
    """The table of all scripts: for each line its claim, our number, the baseline's, verdict, how all claims of the
    script's records (of these keys) went, cost and evidence."""
    rows = [["script", "claim", "ours", "baseline", "verdict", "all claims", "command", "min", "evidence"], ["---"] * 9]
    for key, claim, *measures in (re.split(r" *\| *", line) for line in lines):
        records, script = read(key, root)
        same = [c for r in records for c in r["claims"] if c["id"] == claim]
        cells = [[r["metrics"][m] for r in records if m in r["metrics"]] for m in measures]
        if len(measures) != 2 or not same or not all(cells):
            raise ValueError(f"{key}: no claim {claim} or no measure {', '.join(measures)}")
        mean, interval, _ = over_seeds(same)
        outcome = "STALE" if stale(records, script) else script.verdict(mean, interval, same[0]["threshold"])
        name, first = records[0]["script"], f"results/{key}-s{records[0]['seed']}.json"
        rows.append([f"[{name}.py]({name}.py)", claim,
                     *(f"{cell(v, len(records))} ({m})" for v, m in zip(cells, measures)), outcome,
                     tally(name, keys, root), " and ".join(commands(records)),
                     f"{statistics.fmean(r['minutes'] for r in records):.1f}", f"[n = {len(records)}]({first})"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def render(key, columns, arms, named, elsewhere, root):
    """The text of one region. Raises ValueError where its records, measures or claims do not fit together."""
    records, script = read(key, root)
    if named == ["none"]:
        return f"\n{table(records, columns, arms)}\n"
    parts = table(records, columns, arms), claims(records, script, named, elsewhere), source(records, script)
    return "\n" + "\n".join(part for part in parts if part) + "\n"


def dry_run(script, flags, root):
    """What the script prints about a run that it does not start, in an empty directory: the lines with a number, but
    for those that tell of this machine."""
    said = io.StringIO()
    if "--dry-run" not in flags:
        raise ValueError("the command has no --dry-run")
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                load(root / script).main(shlex.split(flags))
    except (SystemExit, FileNotFoundError) as error:
        raise ValueError(said.getvalue().strip() or str(error)) from error
    return "".join(line + "\n" for line in said.getvalue().splitlines()
                   if re.search(r"\d", line) and not re.search("measured|this machine", line))


def generate(text, root):
    """README with its regions filled, and one line per mistake in a region or a record's name or use."""
    mistakes, used, filled, bare, told = [], set(), set(), set(), {}
    for match in REGION.finditer(text):
        told.setdefault(match[2], set()).update(re.split(", *", match[5] or ""))

    def fill(match):
        used.add(match[2])
        try:
            columns, arms, named = (re.split(", *", x) if x else [] for x in match.groups()[2:5])
            body = render(match[2], columns, arms, named, told[match[2]], root)
        except ValueError as error:
            mistakes.append(f"region {match[2]}: {error}")
            return match[0]
        (bare if named == ["none"] else filled).add(match[2])
        return match[1] + body + match[6]

    def fill_summary(match):
        try:
            return f"{match[1]}\n{summary(match[2].strip().splitlines(), filled, root)}\n{match[3]}"
        except ValueError as error:
            mistakes.append(f"summary: {error}")
            return match[0]

    def fill_failed(match):
        return f"{match[1]}\n{failed(sorted(filled), root)}\n{match[2]}"

    def fill_dry_run(match):
        try:
            return f"{match[1]}\n```\n{dry_run(match[3], match[4], root)}```\n\n{match[5]}"
        except ValueError as error:
            mistakes.append(f"dry run {match[2]}: {error}")
            return match[0]

    new = SUMMARY.sub(fill_summary, REGION.sub(fill, text))
    new = DRY_RUN.sub(fill_dry_run, FAILED.sub(fill_failed, new))
    mistakes += [f"region {key}: no other region has its claims and command" for key in sorted(bare - filled)]
    for name, form in {"results": REGION, "summary": SUMMARY, "failed claims": FAILED, "dry-run": DRY_RUN}.items():
        if not text.count(f"<!-- {name}") == text.count(f"<!-- end {name}") == len(form.findall(text)):
            mistakes.append(f"README.md has a region of {name} that is not well formed")
    for path in sorted({*(root / "results").glob("*.json")} - {root / "results" / "peers.json"}):
        if path.stem != "{script}-{task}-{scale}-{tag}-s{seed}".format(**json.loads(path.read_text())):
            mistakes.append(f"results/{path.name}: the name is not that of the record in it")
        if path.stem.rpartition("-s")[0] not in used:
            mistakes.append(f"results/{path.name}: no region of README uses it")
    return new, mistakes


def refused(text, root):
    """One line for each command in README that its script's own parser does not take."""
    for name, rest in dict.fromkeys(COMMAND.findall(text.replace("\\\n", " ").replace(" -->", "\n"))):
        argv, said = ["0" if word == "S" else word for word in shlex.split(rest)], io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                script = load(root / name)
                script.cli(script.Config, script.SCALES, argv)
        except (SystemExit, FileNotFoundError) as error:
            if str(error) != "0":  # -h stops with 0
                yield f"README: python {name} {rest.strip()}: {said.getvalue().strip() or error}"


@mock.patch.object(inspect, "getsource", functools.cache(inspect.getsource))  # of Config, for each command
def main(argv, root=ROOT):
    """Fill README with --write, else compare; prints the mistakes and returns the exit status."""
    text = (root / "README.md").read_text()
    new, mistakes = generate(text, root)
    if "--write" in argv:
        (root / "README.md").write_text(new)
    elif new != text:
        mistakes.append("README.md differs from results/: run python tests/readme.py --write")
    mistakes += refused(new, root)
    print("".join(line + "\n" for line in mistakes), end="")
    return int(bool(mistakes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
