# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Our speed and memory beside the peers' on this machine: python tests/peers.py [NAME ...]

Runs tests/speed_NAME.py one after the other, on one core and thread, and writes results/peers.md and
results/peers.json: all of them in twenty minutes, or those that are named, beside what the others gave before. What is
compared, and how, stands in each of these files. Needs tests/requirements-peers.txt and an idle machine.
"""
import ast
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = "torch transformers shapiq bert-score sacrebleu numpy".split()


def versions():
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def main(names=(), folder=ROOT / "results", scripts=None):
    """One section per script: its docstring and what it printed. With names only these run, the others stay."""
    core = {min(os.sched_getaffinity(0))}
    head = f"{platform.machine()}, one core, one thread; " + ", ".join(f"{k} {v}" for k, v in versions())
    scripts = scripts or sorted((ROOT / "tests").glob("speed_*.py"))
    scripts = {path.stem.removeprefix("speed_"): path for path in scripts}
    found = json.loads((folder / "peers.json").read_text())["found"] if names else {}
    for name in names or scripts:
        print(name, flush=True)
        run = subprocess.run([sys.executable, scripts[name]], env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                             stdout=subprocess.PIPE, preexec_fn=lambda: os.sched_setaffinity(0, core))
        found[name] = run.stdout.splitlines() + [f"ended with status {run.returncode}"] * (run.returncode != 0)
    text = f"# Speed and memory beside peers\n\n{head}\n"
    for name, lines in found.items():
        about = ast.get_docstring(ast.parse(scripts[name].read_text())).split("\n", 1)
        text += "\n".join(["", f"## {about[0]}", about[1], "", "```", *lines, "```", ""])
    (folder / "peers.md").write_text(text)
    (folder / "peers.json").write_text(json.dumps(dict(machine=head, found=found), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
