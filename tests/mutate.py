# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Mutants of a script's section 4 against its quick tests: python tests/mutate.py SCRIPT [--n 20] [--seed 0]

A mutant is one small mistake in one expression, written into a copy of the repository. It is killed when
tests/test_SCRIPT.py fails or takes longer than 60 s there. The survivors show which line no test pins.
"""
import argparse
import ast
import copy
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SWAP = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Lt: ast.GtE, ast.GtE: ast.Lt,
        ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
NAMES = {"min": "max", "minimum": "maximum", "amin": "amax", "argmin": "argmax"}
NAMES |= {new: old for old, new in NAMES.items()}


def changed(node, **values):
    """A copy of `node` with some fields replaced."""
    node = copy.copy(node)
    for name, value in values.items():
        setattr(node, name, value)
    return node


def mistake(node):
    """The mistake that one expression offers, as an expression; None where it offers none."""
    match node:
        case ast.BinOp(op=ast.BitAnd()):
            return node.left  # a dropped mask
        case ast.BinOp(op=op) if type(op) in SWAP:
            return changed(node, op=SWAP[type(op)]())
        case ast.UnaryOp(op=ast.USub()):
            return node.operand
        case ast.Compare(ops=[first, *rest]) if type(first) in SWAP:
            return changed(node, ops=[SWAP[type(first)](), *rest])
        case ast.Constant(value=bool(value)):
            return ast.Constant(not value)
        case ast.Constant(value=int(value)):
            return ast.Constant(value + 1)
        case ast.Call(func=ast.Attribute(value=inner, attr="detach")):
            return inner
        case ast.Call(func=ast.Attribute(attr="where"), args=[condition, yes, no]):
            return changed(node, args=[condition, no, yes])
        case ast.Attribute(attr=name) if name in NAMES:
            return changed(node, attr=NAMES[name])
        case ast.Name(id=name) if name in NAMES:
            return changed(node, id=NAMES[name])


def walk(node):
    """All (expression, mistake) in `node`, but for annotations, defaults, messages and f-strings."""
    if isinstance(node, ast.keyword) and node.arg in ("dim", "axis"):
        axis = ast.unparse(node.value)
        if re.fullmatch(r"-?\d+", axis):
            yield node.value, ast.Constant(int(axis == "0"))  # another axis: 0, or 1 instead of 0
            return
    if new := mistake(node):
        yield node, new
    if isinstance(node, (ast.arguments, ast.JoinedStr, ast.Raise)):
        return
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        if name not in ("annotation", "returns", "decorator_list", "msg"):
            for child in children:
                yield from walk(child) if isinstance(child, ast.AST) else ()


def mutants(text):
    """Every mutated text of section 4, as (line number, text), in the order of the source."""
    start, end = (re.search(rf"^# -{{10,}} {n}\. .*$", text, re.M).start() for n in (4, 5))
    first, last = (text.count("\n", 0, position) + 1 for position in (start, end))
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    for node, new in walk(ast.parse(text)):
        if first < node.lineno < last:
            before = b"".join(lines[:node.lineno - 1]) + lines[node.lineno - 1][:node.col_offset]
            after = lines[node.end_lineno - 1][node.end_col_offset:] + b"".join(lines[node.end_lineno:])
            yield node.lineno, before.decode() + f"({ast.unparse(new)})" + after.decode()


def passes(repository, name, text, timeout=600):
    """Do the script's quick tests pass with `text` as the script? A mutant that hangs does not."""
    (repository / f"{name}.py").write_text(text)
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "TEST_TIME_FACTOR": "1000"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/test_{name}.py",
               "-m", "not slow", "-k", "not smoke and not resume"]
    try:
        run = subprocess.run(command, cwd=repository, env=env, capture_output=True, timeout=timeout)
        return run.returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("script")
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    name = Path(args.script).stem
    text = (ROOT / f"{name}.py").read_text()
    pool, survivors = list(mutants(text)), []
    chosen = sorted(random.Random(args.seed).sample(pool, min(args.n, len(pool))))
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder, "repository")
        shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(".*", "out"))
        began = time.perf_counter()
        if not passes(copied, name, text):
            sys.exit(f"error: the quick tests of {name}.py fail before any mutation")
        timeout = 30 + 4 * (time.perf_counter() - began)
        for line, mutant in chosen:
            old, new = text.splitlines()[line - 1].strip(), mutant.splitlines()[line - 1].strip()
            report = f"{name}.py:{line}\n    - {old}\n    + {new}"
            alive = passes(copied, name, mutant, timeout)
            survivors += [report] if alive else []
            print("survived" if alive else "killed  ", report, flush=True)
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} killed ({len(pool)} possible); survivors:")
    print("\n".join(survivors) or "none")


if __name__ == "__main__":
    main()
