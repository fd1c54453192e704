# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Measures of the scripts' code, a row for each: python tests/style.py

lines: of the file, and outside of its blocks. functions: how many, median and longest length. nesting: the deepest.
wide: lines over 120 columns. comments: per 100 lines of code, docstrings and banners left out. tags: of equations,
algorithms, sections, tables, or of a formula's source. shapes: notes such as (B, L, d), per 100 lines of code of
sections 3 and 4. asserts, and third-party imports. Tags and shapes are counted by regular expressions, roughly.
tests/test_repo.py holds the limits on lines, functions, nesting and imports.
"""
import ast
import io
import re
import statistics
import sys
import tokenize
from pathlib import Path

import blocks

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NESTS = (*FUNCTIONS, ast.ClassDef, ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
TAG = re.compile(r"\b(?:Eq|Alg|Sec|Tab)\. ?\(?(?:[A-Z]\.?)?\d|\b(?:official code|inferred|our choice)\b")
SHAPE = re.compile(r"\([A-Z1-9]\w{0,2}(?: ?[-+*^] ?\w+)*,[^()]*\)")
SPACE = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
COLUMNS = "script lines outside functions median longest nesting wide comments tags shapes asserts imports".split()


def depth(node):
    """Nesting: def, class, if (not elif), for, while, with, try, match add one."""
    def below(child):
        is_elif = type(child) is type(node) is ast.If and child.col_offset == node.col_offset
        return depth(child) - is_elif

    return max(map(below, ast.iter_child_nodes(node)), default=0) + isinstance(node, NESTS)


def imported(node):
    """The top-level packages that an import statement names."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
    return {name.split(".")[0] for name in names}


def outside_blocks(text):
    """Lines of a script that do not belong to a block."""
    return len(text.splitlines()) - sum(len(body.splitlines()) + 2 for _, body in blocks.BLOCK.findall(text))


def prose_and_code(text):
    """{line: comment} without banners, {first line: docstring}, and the set of lines that hold code."""
    tree, comments, code = ast.parse(text), {}, set()
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    docstrings = {s.lineno: s.value for s in strings if isinstance(s, ast.Constant) and isinstance(s.value, str)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# ---"):
            comments[token.start[0]] = token.string
        elif token.type not in SPACE | {tokenize.COMMENT} and token.start[0] not in docstrings:
            code |= {*range(token.start[0], token.end[0] + 1)}
    return comments, docstrings, code


def measures(text):
    """The values of a script's row, after its name."""
    nodes = list(ast.walk(ast.parse(text)))
    sizes = [node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, FUNCTIONS)]
    comments, docstrings, code = prose_and_code(text)
    banners = [text[: found.start()].count("\n") + 1 for found in re.finditer(r"^# -{10,} [35]\. ", text, re.M)]
    inside = range(*banners) if len(banners) == 2 else range(0)
    told = [*comments.items(), *docstrings.items()]
    shapes = sum(len(SHAPE.findall(words)) for line, words in told if line in inside)
    packages = set().union(*(imported(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))))
    return [len(text.splitlines()), outside_blocks(text), len(sizes), round(statistics.median(sizes)), max(sizes),
            max(map(depth, ast.parse(text).body)), sum(len(line) > 120 for line in text.splitlines()),
            round(100 * len(comments) / len(code)), sum(len(TAG.findall(words)) for _, words in told),
            round(100 * shapes / max(1, len(code & {*inside}))), sum(isinstance(node, ast.Assert) for node in nodes),
            len(packages - {*sys.stdlib_module_names, "kernels"})]


def main(root=ROOT):
    rows = [COLUMNS, *([path.stem, *measures(path.read_text())] for path in sorted(root.glob("*.py")))]
    for name, *values in rows:
        print(f"{name:12}" + "".join(f"{value:>10}" for value in values))


if __name__ == "__main__":
    main()
