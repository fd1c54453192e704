# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""The shared blocks: lines between `# --- block: NAME ---` and `# --- end block ---`, identical everywhere.

python tests/blocks.py                        # one line per problem, status 1 when there is one
python tests/blocks.py --from SCRIPT.py NAME  # copy that script's version into all that carry the block
"""
import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Lines between the markers, blank ends not counted.
LIMITS = {"cli": 31, "run": 41, "stop": 8, "log": 25, "result": 40, "checkpoint": 52, "kernel": 8, "train_utils": 32,
          "decoder": 120, "pretrained": 107, "encoder": 75, "chat": 46, "lora": 25, "logp": 8}
BLOCK = re.compile(r"^# --- block: (\w+) ---\n(.*?)^# --- end block ---$", re.M | re.S)


def problems(root=None):
    """One line for each broken marker, unknown or too long block, and block that differs between scripts."""
    found, first = [], {}
    for path in sorted((root or ROOT).glob("*.py")):
        text = path.read_text()
        pairs = BLOCK.findall(text)
        if not text.count("# --- block") == text.count("# --- end block") == len(pairs):
            found.append(f"{path.name}: block markers that do not pair up")
        for name, body in pairs:
            lines = len(body.strip("\n").splitlines())
            if lines > LIMITS.get(name, 0):
                limit = LIMITS.get(name, "0: no such block is known")
                found.append(f"{path.name}: block {name} has {lines} lines, its limit is {limit}")
            if first.setdefault(name, (path.name, body))[1] != body:
                found.append(f"{path.name}: block {name} differs from the one in {first[name][0]}")
    return found


def copy(source, name, root=None):
    """Put block `name` of the script `source` into all other scripts that carry it; returns their names."""
    body, changed = dict(BLOCK.findall(source.read_text()))[name], []
    for path in sorted((root or ROOT).glob("*.py")):
        old = path.read_text()
        new = BLOCK.sub(lambda m: m[0].replace("\n" + m[2], "\n" + body, 1) if m[1] == name else m[0], old)
        if new != old:
            path.write_text(new)
            changed.append(path.name)
    return changed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--from", dest="source", nargs=2, metavar=("SCRIPT.py", "NAME"))
    source = parser.parse_args().source
    lines = [f"changed {name}" for name in copy(ROOT / source[0], source[1])] if source else problems()
    print("".join(line + "\n" for line in lines), end="")
    sys.exit(bool(lines and not source))
