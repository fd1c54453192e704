# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""mdm.py, countdown and 3-SAT: labels and grades against plain searches, generators, layouts, files, sizes."""

import collections
import functools
import itertools
import json
import math
import operator
import random
import re
from concurrent.futures import ThreadPoolExecutor

import mdm as m
import numpy as np
import pytest
import torch

OFFICIAL = dict(format="chars", canvas="source", positions="learned")
LAYOUTS = dict(inplace={}, beside=dict(canvas="source"), official=OFFICIAL)
SMALL = dict(n_layer=2, n_head=2, n_embd=32)
COUNTDOWNS, SATS = ("cd3", "cd4", "cd5"), ("sat5", "sat7", "sat9")
TASKS = COUNTDOWNS + SATS
EXAMPLE = ("86,28,13,31,96", "86+28=114,31-13=18,114-18=96")  # of the authors' data
EASY = ("5,3,9,72", "5+3=8,8*9=72")
CLAUSES = dict(sat5=41, sat7=45, sat9=51)  # floor(4.258 n + 58.26 n^(-2/3))
NEW_TARGETS = dict(  # those of the authors' test files
    cd3={22, 24, 25, 30, 32, 50, 65, 67, 96},
    cd4={14, 39, 41, 57, 62, 81, 87, 89, 96},
    cd5={43, 48, 51, 68, 73, 80, 92, 95, 98},
    game24={24},
)
LUCKY = {"cd5 new": 0}  # a seed whose first draw has a solution: another takes longer, no more


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors are faster so; the former number comes back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def config(task, **changes):
    return m.Config(task=task, **{**SMALL, **changes})


def network(task, arm="mdm", noise=0.3, **changes):
    """A network whose biases and norms are random too, in evaluation mode."""
    cfg = config(task, **changes)
    model = m.build(cfg, arm).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return cfg, model


@functools.cache
def countdowns(kind, n):
    return m.countdown_problems(n, kind, np.random.default_rng(LUCKY.get(kind, 5)))


@functools.cache
def formulas(task, n):
    return m.sat_problems(n, f"{task} formulas", np.random.default_rng(5))


@functools.cache
def draws(k, n):
    """n random countdowns with their first solutions: numbers (n, k), target (n,), solved (n,), steps (n, k - 1, 4)."""
    rng = np.random.default_rng(k)
    numbers = rng.integers(1, rng.choice([6, 20, 100], n)[:, None], (n, k))  # small numbers often come twice
    target = rng.integers(1, 101, n)
    return numbers, target, *m.first_solutions(numbers, target)


def written(steps):
    return ",".join(f"{a}{'+*-/'[op]}{b}={c}" for a, op, b, c in steps)


@functools.cache
def problems_of(task, n):
    """Some problems with their labels, whatever made them."""
    if task in SATS:
        return formulas(task, n)
    numbers, target, solved, steps = draws(int(task[2]), dict(cd3=1000, cd4=300, cd5=60)[task])
    rows = zip(numbers[solved].tolist(), target[solved].tolist(), steps[solved].tolist())
    found = [(",".join(map(str, [*row, goal])), written(lines)) for row, goal, lines in rows]
    return [p for p in found if max(map(int, re.findall(r"\d+", p[1]))) < 1000][:n]


# ---------------------------------------------------------------- countdown: labels
def search(numbers, target):
    """Depth first as in Stream-of-Search: the first list of (a, op, b, c) that uses all numbers, None without one."""
    if len(numbers) == 1:
        return [] if numbers[0] == target else None
    for i, j in itertools.combinations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        large, small = max(a, b), min(a, b)
        tries = [(a, 0, b, a + b), (a, 1, b, a * b), (large, 2, small, large - small)]
        tries += [(large, 3, small, large // small)] if small and large % small == 0 else []
        rest = [x for place, x in enumerate(numbers) if place not in (i, j)]
        for step in tries:
            later = search([*rest, step[3]], target)
            if later is not None:
                return [step, *later]
    return None


@pytest.mark.parametrize("k, n", [(3, 1000), (4, 300), (5, 60)])
def test_labels_are_the_first_solutions_of_the_search(k, n):
    """All at once or one after the other, with a solution or without, the same equations."""
    numbers, target, solved, steps = draws(k, n)
    assert steps.shape == (n, k - 1, 4) and 0.05 < solved.mean() < 0.9
    for row, goal, known, lines in zip(numbers.tolist(), target.tolist(), solved, steps.tolist()):
        found = search(row, goal)
        assert known == (found is not None)
        assert not known or list(map(tuple, lines)) == found
    ops = collections.Counter(steps[solved][..., 1].ravel().tolist())
    assert len(ops) == 4 and any(len(set(row)) < k for row in numbers[solved].tolist())


def first(*numbers, target):
    solved, steps = m.first_solutions(np.array([numbers]), np.array([target]))
    return written(steps[0].tolist()) if solved[0] else None


def test_published_label():
    assert first(86, 28, 13, 31, target=96) == EXAMPLE[1]
    assert first(5, 3, 9, target=72) == "5+3=8,9*8=72"  # the result goes behind the 9


def test_first_solution_by_hand():
    """The order of pairs and of operations, equal numbers, zeros, what is left over."""
    assert first(4, 4, target=8) == "4+4=8" and first(4, 4, target=16) == "4*4=16"
    assert first(4, 4, target=0) == "4-4=0" and first(4, 4, target=1) == "4/4=1"
    assert first(2, 2, target=4) == "2+2=4"  # the sum comes before the product
    assert first(3, 12, target=9) == "12-3=9" and first(3, 12, target=4) == "12/3=4"
    assert first(3, 13, target=4) is None and first(3, 13, target=39) == "3*13=39"
    assert first(7, 7, 9, target=9) == "7-7=0,9+0=9"  # the result goes behind the others
    assert first(7, 7, 1, target=49) == "7*7=49,1*49=49"
    assert first(7, 7, target=7) is None  # all must be used
    assert first(5, target=5) == "" and first(5, target=6) is None
    solved, _ = m.first_solutions(np.zeros((1, 2), int), np.array([1]))
    assert not solved[0]  # nothing divides by zero


# ---------------------------------------------------------------- countdown: problems
@pytest.mark.parametrize(
    "kind, n",
    [("cd3 old", 200), ("cd3 new", 90), ("cd4 old", 6), ("cd4 new", 12), ("cd5 new", 1)],
)
def test_countdowns(kind, n):
    """Numbers, targets of the class, labels that are the first solution and strictly right."""
    task, group = kind.split()
    problems = countdowns(kind, n)
    assert len(problems) == len(set(problems)) == n
    for source, label in problems:
        *numbers, target = map(int, source.split(","))
        assert len(numbers) == int(task[2]) and all(1 <= x <= 99 for x in numbers) and 10 <= target <= 100
        assert (target in NEW_TARGETS[task]) == (group == "new")
        assert m.grade(task, source, label, label) == (True, True)
        assert label == written(search(numbers, target))


def test_countdowns_cover_numbers_and_targets():
    old, new = countdowns("cd3 old", 200), countdowns("cd3 new", 90)
    numbers, targets = set(), collections.Counter()
    for source, _ in [*old, *new]:
        *row, target = map(int, source.split(","))
        numbers |= set(row)
        targets[target] += 1
    assert len(numbers) > 90 and {1, 99} & numbers and len(targets) > 70
    assert all(2 <= targets[x] <= 25 for x in NEW_TARGETS["cd3"])
    assert max(targets[x] for x in targets if x not in NEW_TARGETS["cd3"]) < 12


def test_game_of_24():
    """Four numbers of a deck of cards, 24, which countdown 4 does learn."""
    numbers = set()
    for source, label in countdowns("cd4 game24", 100):
        *row, target = map(int, source.split(","))
        numbers |= set(row)
        assert len(row) == 4 and target == 24 and m.grade("cd4", source, label, label) == (True, True)
    assert numbers == set(range(1, 14)) and 24 not in NEW_TARGETS["cd4"]


def test_countdowns_of_training_and_test():
    """No held-out target in training; those too large for the symbols are left out; a seed changes only training."""
    small = dict(n_train=300, n_val=5, n_test=9)
    train, val, test = m.load_problems(config("cd3", **small), {})
    assert list(val) == ["old"] and list(test) == ["new"] and len(val["old"]) == 5 and len(test["new"]) == 9
    goals = {int(source.split(",")[-1]) for source, _ in [*train, *val["old"]]}
    assert goals.isdisjoint(NEW_TARGETS["cd3"])
    assert NEW_TARGETS["cd3"] >= {int(source.split(",")[-1]) for source, _ in test["new"]}
    again = m.load_problems(config("cd3", **small, seed=1), {})
    assert again[1:] == (val, test) and again[0] != train
    every = m.load_problems(config("cd3", **small, **OFFICIAL), {})[0]
    dropped = set(every) - set(train)
    assert dropped and all(max(map(int, re.findall(r"\d+", label))) > 999 for _, label in dropped)
    assert {p for p in every if p not in dropped} == set(train)
    kept, *_, given = m.load_problems(config("cd3", **small), dict(data=train[:9] + test["new"][:2]))
    assert kept == train[:9] and given == test  # a file's problems that are held out are dropped


def test_fits():
    """In tokens, numbers below 1000; in characters, the canvas of the official code."""
    chars = config("cd3", **OFFICIAL)
    for product, fits in ((999, True), (1000, False)):
        problem = ("9,9,9,10", f"1*{product}={product},{product}-0=10")
        assert m.fits(problem, config("cd3")) == fits and m.fits(problem, chars)
    for length, fits in ((35, True), (36, False)):  # [SEP] and [EOS] make 37
        problem = ("9,9,9,10", "1" * (length - 8))
        assert m.fits(problem, chars) == fits
    assert m.encode([("9,9,9,10", "1" * 27)], chars, "mdm")[0].shape == (1, 37, 1)
    assert all(m.fits(p, config(task, **layout)) for task in TASKS for layout in LAYOUTS.values()
               for p in problems_of(task, 20))


# ---------------------------------------------------------------- countdown: grades
RIGHT = [
    "5+3=8,8*9=72",
    "3+5=8,9*8=72",  # either order
    "5+3=8,9*8=72",
]
WRONG = {  # answer to 5,3,9,72: is it right for the authors' script?
    "": False,
    "?": False,
    ",": False,
    "72": False,
    "=72": False,
    "5+3=8": False,  # an unused number
    "8*9=72": True,  # a number that is not there
    "5+3=9,9*9=81": False,
    "5-3=8,8*9=72": False,  # false, then true
    "5+3=8,8*9=73": False,
    "3+5=8,8+8=16,16+56=72": True,  # a number used twice
    "3+3=6,6+66=72": True,
    "9*9=81,81-9=72": True,  # 9 used three times
    "5+3=8,8*9=72,72+0=72": True,  # goes on
    "70+2=72,71+1=72": True,  # right value, other numbers
    "5+3=8,8*9=72,": False,
    "8*9=72,5+3=8": False,  # before it is made
    "5/0=5,3+9=12": False,
    "5+3=8,72/0=72": False,
    "0/0=72": False,
    "5+3=8 ,8*9=72": False,
    "5+3=8;8*9=72": False,
    "5+3=8,8*9=７２": False,
    "5+3==8,8*9=72": False,
    "5-3=2,9*8=72": True,
    "3-5=-2,9*8=72": False,
    "9/5=1,72*1=72": False,
    "1000000+3=1000003,8*9=72": False,  # more than six digits
}


@pytest.mark.parametrize("text", RIGHT)
def test_grade_right_countdowns(text):
    assert m.grade("cd3", *EASY, text) == (True, True) and m.grade("cd3", EASY[0], "", text) == (True, True)


@pytest.mark.parametrize("text", WRONG)
def test_grade_wrong_countdowns(text):
    """Strictly wrong all of them; the authors' script checks neither which numbers are used nor how many."""
    assert m.grade("cd3", *EASY, text) == (False, WRONG[text])


def test_grade_unused_numbers():
    """The right value is not enough: nothing else may be left."""
    assert m.grade("cd3", "5,3,9,8", "", "5+3=8") == (False, True)
    assert m.grade("cd3", "5,3,9,8", "", "9-5=4,3+5=8") == (False, True)
    assert m.grade("cd4", "5,3,1,1,8", "", "1*5=5,3+5=8") == (False, True)
    assert m.grade("cd4", "5,3,1,1,8", "", "1*5=5,3+5=8,8*1=8") == (True, True)


def test_grade_equal_numbers():
    """A number may be used as often as it stands there."""
    assert m.grade("cd3", "6,6,6,72", "", "6+6=12,12*6=72") == (True, True)
    assert m.grade("cd3", "6,5,7,72", "", "6+6=12,12*6=72") == (False, True)
    assert m.grade("cd3", "7,7,9,10", "", "7/7=1,9+1=10") == (True, True)
    assert m.grade("cd3", "7,8,9,10", "", "7/7=1,9+1=10") == (False, True)
    assert m.grade("cd4", "4,4,4,4,24", "", "4*4=16,4+4=8,16+8=24") == (True, True)
    assert m.grade("cd4", "4,4,4,4,24", "", "4*4=16,16+4=20,20+4=24") == (True, True)
    assert m.grade("cd4", "4,4,4,24", "", "4*4=16,4+4=8,16+8=24") == (False, True)


def obeys(source, text):
    """The rules of countdown, one after the other."""
    *numbers, target = map(int, source.split(","))
    for line in text.split(","):
        parts = re.fullmatch(r"(\d+)(\D)(\d+)=(\d+)", line)
        if not parts:
            return False
        a, b, c = (int(parts[i]) for i in (1, 3, 4))
        for x in (a, b):
            if x not in numbers:
                return False
            numbers.remove(x)
        result = dict(zip("+-*/", (operator.add, operator.sub, operator.mul, operator.truediv))).get(parts[2])
        if not result or (parts[2] == "/" and b == 0) or result(a, b) != c:
            return False
        numbers.append(c)
    return numbers == [target]


def spoilt(text, chance):
    """The answer with its equations exchanged, operands exchanged, or one character replaced."""
    kind, lines = chance.randrange(4), text.split(",")
    if kind == 0:
        chance.shuffle(lines)
    if kind == 1:
        lines = [re.sub(r"(\d+)([+*])(\d+)", r"\3\2\1", line) for line in lines]
    text = ",".join(lines)
    at = chance.randrange(len(text))
    return text[:at] + chance.choice("0123456789+-*/=,") + text[at + 1 :] if kind == 2 else text


@pytest.mark.parametrize("task", ["cd3", "cd4"])
def test_grade_by_the_rules(task):
    """Right labels and spoilt ones, against another reading of the rules."""
    chance, seen = random.Random(0), collections.Counter()
    for source, label in problems_of(task, 150):
        text = spoilt(label, chance)
        strict, official = m.grade(task, source, label, text)
        assert strict == obeys(source, text) and official >= strict
        seen[strict, text != label] += 1
    assert len(seen) >= 3 and seen[True, True] > 5 and seen[False, True] > 5


def errors(problem, text):
    """Of each equation: (is it false, is the plan lost by then), for one answer."""
    k = problem[0].count(",")
    found = m.details(f"cd{k}", [problem], [text])
    return [(found[f"equation {i} false"], found[f"plan lost by {i}"]) for i in range(1, k)]


def test_where_the_plan_is_lost():
    """A plan is lost with the first equation after which the target cannot be made, and stays lost."""
    assert errors(EASY, "5+3=8,8*9=72") == [(0, 0), (0, 0)]
    assert errors(EASY, "5-3=2,2*9=18") == [(0, 1), (0, 1)]  # 2 and 9 cannot make 72
    assert errors(EASY, "5+3=9,9*9=81") == [(1, 1), (0, 1)]
    assert errors(EASY, "5-3=8,8*9=72") == [(1, 1), (0, 1)]  # what a false one claims is not at hand
    assert errors(EASY, "5+3=8,8*9=73") == [(0, 0), (1, 1)]
    assert errors(EASY, "70+2=72,5+3=8") == [(0, 1), (0, 1)]
    assert errors(EASY, "") == errors(EASY, "?") == errors(EASY, "5/0=5") == [(1, 1), (1, 1)]
    assert errors(("7,8,9,10", ""), "7/7=1,9+1=10") == [(0, 1), (0, 1)]  # 7 stands there once
    assert errors(("5,5,5,15", ""), "5-5=0,5+0=5") == [(0, 1), (0, 1)]
    assert errors(("5,5,5,15", ""), "5+5=10,5+10=15") == [(0, 0), (0, 0)]


def test_lost_plans_against_the_search():
    """A first equation of any two numbers, then what can still be made of the others."""
    chance, seen = random.Random(0), collections.Counter()
    for source, _ in problems_of("cd4", 40):
        *numbers, target = map(int, source.split(","))
        chance.shuffle(numbers)
        a, b, *rest = sorted(numbers[:2], reverse=True) + numbers[2:]
        op = chance.choice("+*-")
        c = dict(zip("+*-", (a + b, a * b, a - b)))[op]
        (false, lost), *others = errors((source, ""), f"{a}{op}{b}={c}")
        assert false == 0 and lost == (search([*rest, c], target) is None) and others == [(1, 1)] * 2
        seen[lost] += 1
    assert min(seen[0], seen[1]) >= 3


def test_details_of_countdown():
    """Shares of false equations and of lost plans, by hand; a missing equation is false."""
    texts = [
        "5+3=8,8*9=72",
        "5+3=9,9*9=81",  # first false
        "5-3=2,2*9=18",  # plan lost at once
        "",  # both missing
        "5+3=8,8*9=73",  # second false
        "5+3=8",  # second missing
        "8*9=72,5+3=8",  # true, with a number that is not there
        "5+3=8,8*9=72,72+1=74",  # a third equation is not counted here
    ]
    found = m.details("cd3", [EASY] * 8, texts)
    wanted = {"equation 1 false": 2, "plan lost by 1": 4, "equation 2 false": 3, "plan lost by 2": 6, "official": 1}
    assert found == {name: pytest.approx(count / 8) for name, count in wanted.items()}
    found = m.details("cd4", [EXAMPLE], [EXAMPLE[1]])
    lost = {f"{name} {i}": 0.0 for i in (1, 2, 3) for name in ("plan lost by",)}
    assert found == lost | {f"equation {i} false": 0.0 for i in (1, 2, 3)} | dict(official=1.0)


# ---------------------------------------------------------------- 3-SAT: formulas
def literal(i, value, n):
    """(official data) Variable i as it is written when true and when false."""
    return str(i) if value else str((i + 5) % 10) if n == 5 else chr(ord("a") + i)


def satisfying(source, n):
    """Every satisfying assignment, by trying all."""
    clauses, found = [set(clause.split(",")) for clause in source.split("/")], []
    for values in itertools.product((False, True), repeat=n):
        chosen = [literal(i, value, n) for i, value in enumerate(values, 1)]
        if not any(clause.isdisjoint(chosen) for clause in clauses):
            found.append(",".join(chosen))
    return found


@pytest.mark.parametrize("task", SATS)
def test_formulas(task):
    """Clauses are distinct and of three variables in order; the label is one of all solutions, which are counted."""
    n = int(task[3])
    name = {literal(i, value, n): i for i in range(1, n + 1) for value in (True, False)}
    assert len(name) == 2 * n and CLAUSES[task] == math.floor(4.258 * n + 58.26 * n ** (-2 / 3))
    problems = formulas(task, 40)
    assert len(set(problems)) == 40
    for source, label in problems:
        clauses = source.split("/")
        assert len(clauses) == len(set(clauses)) == CLAUSES[task]
        variables = [[name[x] for x in clause.split(",")] for clause in clauses]
        assert all(len(row) == 3 and row[0] < row[1] < row[2] for row in variables)
        found = satisfying(source, n)
        assert label in found and m.count_solutions(source, n) == len(found)
        assert m.grade(task, source, label, label) == (True, True)


def test_count_solutions_by_hand():
    """No clause rules out an eighth; a formula with all signs of three variables has no solution."""
    signs = ["/".join(",".join(literal(i, s, 5) for i, s in enumerate(row, 1)) for row in rows)
             for rows in itertools.combinations(itertools.product((False, True), repeat=3), 7)]
    assert [m.count_solutions(source, 5) for source in signs] == [4] * 8
    every = "/".join({clause for source in signs for clause in source.split("/")})
    assert m.count_solutions(every, 5) == 0 and m.count_solutions("1,2,3", 5) == 28


@pytest.mark.parametrize("task, mean, tolerance, ceiling", [
    ("sat5", 1.008, 0.006, 0.996), ("sat7", 1.228, 0.05, 0.900), ("sat9", 1.661, 0.1, 0.769),
])
def test_formulas_are_uniform_among_the_satisfiable(task, mean, tolerance, ceiling):
    """Drawn again until satisfiable; clauses built around an assignment would give 1.016, 1.458 and 2.355."""
    n, problems = int(task[3]), formulas(task, 1500)
    counts = np.array([m.count_solutions(source, n) for source, _ in problems])
    assert counts.min() == 1 and counts.mean() == pytest.approx(mean, abs=tolerance)
    assert (1 / counts).mean() == pytest.approx(ceiling, abs=0.03)
    true = np.array([[x == str(i) for i, x in enumerate(label.split(","), 1)] for _, label in problems])
    assert np.abs(true.mean(0) - 0.5).max() < 0.06
    names = collections.Counter(clause for source, _ in problems for clause in source.split("/"))
    total = 8 * math.comb(n, 3)
    assert len(names) == total
    p = CLAUSES[task] / total
    assert max(abs(count - 1500 * p) for count in names.values()) < 5 * (1500 * p * (1 - p)) ** 0.5


def test_labels_are_any_solution():
    """Of two solutions the first is the label half of the time, and clauses stand in any order."""
    problems = formulas("sat9", 1500)
    pairs = [(satisfying(source, 9), label) for source, label in problems if m.count_solutions(source, 9) == 2]
    assert len(pairs) > 150
    assert np.mean([found[0] == label for found, label in pairs]) == pytest.approx(0.5, abs=0.12)
    places = [source.split("/").index(min(source.split("/"))) for source, _ in problems]
    assert np.mean(places) == pytest.approx(25, abs=2) and min(places) == 0 and max(places) == 50


def test_formulas_of_training_and_test():
    small = dict(n_train=30, n_val=2, n_test=4)
    train, val, test = m.load_problems(config("sat7", **small), {})
    assert len(train) == 30 and list(val) == list(test) == ["formulas"]
    assert {s for s, _ in train}.isdisjoint(s for s, _ in val["formulas"] + test["formulas"])
    again = m.load_problems(config("sat7", **small, seed=1), {})
    assert again[1:] == (val, test) and set(again[0]).isdisjoint(train)
    kept, _, given = m.load_problems(config("sat7", **small), dict(data=train[:9], test_data=train[:4]))
    assert kept == train[4:9] and list(given.values()) == [train[:4]]


# ---------------------------------------------------------------- 3-SAT: grades
@pytest.mark.parametrize("task", SATS)
def test_grade_formulas(task):
    """All clauses count; the authors' script asks for the stored assignment."""
    n, seen = int(task[3]), collections.Counter()
    for source, label in formulas(task, 60):
        found = satisfying(source, n)
        for values in itertools.product((False, True), repeat=min(n, 5)):
            chosen = label.split(",")
            chosen[: len(values)] = [literal(i, x, n) for i, x in enumerate(values, 1)]
            text = ",".join(chosen)
            assert m.grade(task, source, label, text) == (text in found, text == label)
            seen[text in found, text == label] += 1
    assert seen[True, True] == 60 and seen[False, False] > 1000 and (task == "sat5" or seen[True, False] > 2)


@pytest.mark.parametrize("task", SATS)
def test_grade_what_is_no_assignment(task):
    """One literal for each variable, in their order."""
    n = int(task[3])
    source, label = formulas(task, 40)[0]
    chosen = label.split(",")
    other = literal(1, chosen[0] != "1", n)
    texts = ["", "?", ",".join(chosen[:-1]), ",".join([*chosen, other]), ",".join([*chosen, chosen[0]]), label + ","]
    texts += [",".join(chosen[::-1]), ",".join([chosen[0], other, *chosen[2:]]), "".join(chosen), label.upper() + "A"]
    texts += [",".join([chosen[1], chosen[0], *chosen[2:]]), ",".join(["?", *chosen[1:]]), label.replace(",", "/")]
    assert [m.grade(task, source, label, text) for text in texts] == [(False, False)] * len(texts)
    assert m.grade(task, source, "", label) == (True, False)  # no label: the rules alone


def test_details_of_sat():
    """What exact match gives to a perfect solver: one over the number of solutions, on average."""
    problems = formulas("sat9", 40)
    counts = [len(satisfying(source, 9)) for source, _ in problems]
    texts = [label for _, label in problems[:10]] + [problems[0][1]] * 30
    found = m.details("sat9", problems, texts)
    assert found == dict(official=10 / 40, ceiling=pytest.approx(np.mean([1 / x for x in counts])))
    assert max(counts) > 1 and found["ceiling"] < 1


# ---------------------------------------------------------------- layouts
def question(ids, task, layout):
    """The question that stands in ids (list of positions), read back by hand."""
    if layout == "official":
        return "".join(m.CHARS[i - 5] for (i,) in ids)
    if task in SATS:
        return "/".join(",".join(m.CHARS[i - 5] for i in clause) for clause in ids)
    return ",".join(str(i - m.VOCAB) for (i,) in ids)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arm", ["mdm", "ar"])
def test_problems_round_trip(task, layout, arm):
    """Question and answer come back from the canvas; what is asked for is the answer alone."""
    cfg, problems = config(task, **LAYOUTS[layout]), problems_of(task, 15)
    ids, target = m.encode(problems, cfg, arm)
    k, n = int(task[-1]), CLAUSES.get(task)
    length = (n + k if n else k + 1 + 4 * (k - 1)) + 2 * (layout != "inplace")
    official = dict(cd3=37, cd4=64, cd5=74, sat5=258, sat7=285, sat9=325)[task]
    assert ids.shape[:2] == target.shape == (15, official if layout == "official" else length)
    for row, asked, (source, label) in zip(ids.tolist(), target.tolist(), problems):
        begin = asked.index(True)
        assert m.to_text([x[0] for x in row[begin:]], cfg) == label
        assert question(row[: begin - (layout != "inplace")], task, layout) == source
        assert layout == "inplace" or row[begin - 1][0] == m.SEP
        size = len(label) if layout == "official" else k if n else 4 * (k - 1)
        end = begin + size + 1 if layout != "inplace" else len(row) - (task in COUNTDOWNS)
        end = len(row) if (arm, layout) == ("mdm", "official") else end  # mdm writes the padding too
        assert asked == [begin <= i < end for i in range(len(row))]


@pytest.mark.parametrize("task", TASKS)
def test_characters_fit_the_official_canvas(task):
    """3-SAT: 6 m - 1 characters, [SEP], 2 n - 1, [EOS]; countdown: whatever a label of five numbers needs."""
    lengths = {len(source) + len(label) + 2 for source, label in problems_of(task, 200)}
    canvas = m.canvas_length(config(task, **OFFICIAL))
    known = dict(sat5=256, sat7=284, sat9=324)
    assert lengths == {known[task]} if task in known else len(lengths) > 3
    assert max(lengths) <= canvas


def test_exact_ids_of_a_countdown():
    """A number is one symbol behind the 31; an equation is a, op, b, c, and the target is in view."""
    ids, target = m.encode([EASY], config("cd3"), "mdm")
    number = [31 + x for x in (5, 3, 9, 72)]
    assert m.vocabulary(config("cd3")) == 1031 and m.vocabulary(config("cd3", **OFFICIAL)) == 31
    assert ids[0, :, 0].tolist() == [*number, 36, 16, 34, 39, 39, 15, 40, 103]
    assert target[0].tolist() == [False] * 4 + [True] * 7 + [False]
    ids, target = m.encode([EASY], config("cd3", canvas="source"), "mdm")
    assert ids[0, :, 0].tolist() == [*number, m.SEP, 36, 16, 34, 39, 39, 15, 40, 103, m.EOS]
    assert target[0].tolist() == [False] * 5 + [True] * 9
    ids, target = m.encode([EASY], config("cd3", **OFFICIAL), "mdm")
    answer = [10, 16, 8, 19, 13, 20, 13, 15, 14, 19, 12, 7]
    assert ids[0, :, 0].tolist() == [10, 20, 8, 20, 14, 20, 12, 7, m.SEP, *answer, m.EOS] + [m.PAD] * 15
    assert target[0].tolist() == [False] * 9 + [True] * 28
    assert m.encode([EASY], config("cd3", **OFFICIAL), "ar")[1][0].tolist() == [False] * 9 + [True] * 13 + [False] * 15


def test_exact_ids_of_a_formula():
    """A clause is one position of three symbols; (official data) 1,4,5/1,9,0/... and 1,2,3,9,5."""
    problem = ("/".join(["1,4,5", "1,9,0"] + ["2,3,6"] * 39), "1,2,3,9,5")
    ids, target = m.encode([problem], config("sat5"), "mdm")
    assert ids[0, :3].tolist() == [[6, 9, 10], [6, 14, 5], [7, 8, 11]] and ids.shape == (1, 46, 3)
    assert ids[0, 41:].tolist() == [[6, 0, 0], [7, 0, 0], [8, 0, 0], [14, 0, 0], [10, 0, 0]]
    assert target[0].tolist() == [False] * 41 + [True] * 5
    ids, target = m.encode([problem], config("sat5", **OFFICIAL), "mdm")
    assert ids[0, :7, 0].tolist() == [6, 20, 9, 20, 10, 18, 6] and ids[0, 245, 0] == m.SEP
    assert ids[0, 246:, 0].tolist() == [6, 20, 7, 20, 8, 20, 14, 20, 10, m.EOS, m.PAD, m.PAD]
    assert target[0].tolist() == [False] * 246 + [True] * 12
    assert m.to_symbols("1,b,7", "b,2", config("sat7"))[:2] == ([(6, 22, 12)], [(22, 0, 0), (7, 0, 0)])


def test_to_text_of_any_symbols():
    """Nothing that a network may say stops the evaluation; symbols without a character are question marks."""
    cd, sat, chars = config("cd3"), config("sat5"), config("cd3", **OFFICIAL)
    assert m.to_text([36, 16, 34, 39, m.EOS, 36], cd) == "5+3=8" and m.to_text([m.EOS, 36], cd) == ""
    assert m.to_text([36, m.PAD, m.MASK, 1030, 36], cd) == "5??=999,5=" and m.to_text([6, m.PAD, 21], sat) == "1,?,a"
    assert m.to_text([10, 16, 8, m.PAD], chars) == "5+3?"
    rng, texts = np.random.default_rng(0), []
    for task, cfg in (("cd3", cd), ("cd3", chars), ("sat5", sat)):
        problem = problems_of(task, 15)[0]
        ids = rng.integers(0, m.vocabulary(cfg), (200, 12)).tolist()
        texts += [m.to_text(row, cfg) for row in ids]
        marks = [m.grade(task, *problem, text)[0] for text in texts[-200:]]
        assert not any(marks) and all(np.isfinite(list(m.details(task, [problem] * 200, texts[-200:]).values())))
    assert len(set(texts)) > 500


def test_causal_arms_read_all_that_is_given_first():
    """In place the target stands behind the question, before the gaps; nothing moves for mdm or beside the question."""
    order = [0, 1, 2, 3, 4, 16, *range(5, 16)]
    for task, arm, layout, wanted in (
        ("cd4", "ar", {}, order), ("cd4", "mdm", {}, range(17)), ("sat5", "ar", {}, range(46)),
        ("cd4", "ar", OFFICIAL, range(64)),
    ):
        cfg = config(task, **layout)
        canvases, gaps = m.encode(problems_of(task, 15), cfg, arm)
        ids, target, at = m.in_order(canvases, gaps, cfg, arm)
        assert at.tolist() == [list(wanted)] * 15
        assert torch.equal(ids, canvases[:, list(wanted)]) and torch.equal(target, gaps[:, list(wanted)])
    ids, target, _ = m.in_order(*m.encode([EXAMPLE], config("cd4"), "ar"), config("cd4"), "ar")
    assert target[0].tolist() == [False] * 6 + [True] * 11 and ids[0, 4:7, 0].tolist() == [127, 127, 117]


@pytest.mark.parametrize("task, layout, arm", [
    ("cd4", "inplace", "mdm"), ("cd4", "inplace", "ar"), ("cd4", "official", "mdm"), ("cd4", "official", "ar"),
    ("cd3", "beside", "mdm"), ("cd5", "inplace", "mdm"), ("sat5", "inplace", "mdm"), ("sat5", "inplace", "ar"),
    ("sat9", "beside", "ar"), ("sat7", "official", "mdm"),
])
def test_answers_do_not_depend_on_the_label(task, layout, arm):
    """--solve: the network is shown the question alone, so an unknown or false label changes nothing."""
    cfg, model = network(task, arm, **LAYOUTS[layout])
    torch.nn.init.zeros_(model.ln_f.bias)  # no symbol is every answer
    problems = problems_of(task, 15)
    options = dict(steps=3) if arm == "mdm" else {}
    texts, _ = m.answer(model, arm, problems, cfg, **options)
    false = [(source, problems[i - 1][1]) for i, (source, _) in enumerate(problems)]
    for others in ([(source, "") for source, _ in problems], false):
        assert m.answer(model, arm, others, cfg, **options)[0] == texts
    assert len(set(texts)) > 1  # of different questions
    goals = [source.split(",")[-1] for source, _ in problems]
    shown = (task, layout) in (("cd4", "inplace"), ("cd5", "inplace"))
    assert not shown or all(text.endswith(f"={goal}") for text, goal in zip(texts, goals) if len(text.split("=")) > 3)


@pytest.mark.parametrize("positions", ["structured", "learned"])
def test_only_learned_positions_tell_one_clause_from_another(positions):
    cfg, model = network("sat5", positions=positions)
    source, label = formulas("sat5", 40)[0]
    shuffled = ["/".join(random.Random(i).sample(source.split("/"), 41)) for i in range(8)]
    texts, _ = m.answer(model, "mdm", [(text, label) for text in shuffled], cfg, steps=1)
    assert (len(set(texts)) == 1) == (positions == "structured")


@pytest.mark.parametrize("task, layout, known", [
    ("cd3", "inplace", False), ("sat5", "inplace", False), ("sat5", "beside", False), ("sat5", "official", True),
])
def test_trace_of_an_untrained_network(task, layout, known, tmp_path):
    """--solve --trace: also where the last question comes without an answer."""
    cfg, model = network(task, **LAYOUTS[layout])
    source, label = problems_of(task, 15)[0]
    m.draw_trace(tmp_path / "trace.png", (source, label if known else ""), model, cfg)
    assert (tmp_path / "trace.png").stat().st_size > 5000


@pytest.mark.parametrize("task, layout", [("cd3", "inplace"), ("sat5", "official")])
def test_trace_of_an_empty_answer(task, layout, tmp_path):
    """A network that says [EOS] at once, as one after a step or two of training may do."""
    cfg, model = network(task, **LAYOUTS[layout])
    with torch.no_grad():
        model.ln_f.bias += 50.0 * model.wte.weight[m.EOS]
    problem = problems_of(task, 15)[0]
    assert m.answer(model, "mdm", [problem], cfg)[0] == [""]
    m.draw_trace(tmp_path / "trace.png", problem, model, cfg)
    assert (tmp_path / "trace.png").stat().st_size > 1000


# ---------------------------------------------------------------- files
FORMULA = "/".join(["1,4,5"] * 41), "1,2,3,9,5"
SEVEN = "/".join(["1,d,7"] * 45), "1,c,3,4,5,6,h"
GOOD = dict(cd3=EASY, cd4=EXAMPLE, cd5=("9,9,9,9,9,45", "9+9=18,18+9=27,27+9=36,36+9=45"), sat5=FORMULA, sat7=SEVEN)


@pytest.mark.parametrize("task", GOOD)
def test_files(task, tmp_path):
    """The authors' jsonl and "source target" lines, labels where they are known."""
    (file := tmp_path / "x.jsonl").write_text(json.dumps(dict(input=GOOD[task][0], output=GOOD[task][1])) + "\n" * 2)
    assert m.read_problems(str(file), task) == [GOOD[task]]
    file.write_text(f"{' '.join(GOOD[task])}\n\n{GOOD[task][0]}\n")
    assert m.read_problems(str(file), task, need_target=False) == [GOOD[task], (GOOD[task][0], "")]
    others = problems_of(task, 15)
    file.write_text("".join(f"{' '.join(problem)}\n" for problem in others))
    assert m.read_problems(str(file), task) == others


BAD_LINES = dict(  # task, lines, number of the bad one, words of the message
    few=("cd3", ["5,3,72 5+3=8,8*9=72"], 1, ["source '", "cd3", "3 numbers"]),
    other=("cd4", [" ".join(EXAMPLE), " ".join(EASY)], 2, ["source '", "cd4"]),
    large=("cd3", ["", "5,3,9,1000 5+3=8,8*9=72"], 2, ["source '"]),
    sign=("cd3", ["5,-3,9,72 5+3=8,8*9=72"], 1, ["source '"]),
    comma=("cd3", ["5,3,9,72, 5+3=8,8*9=72"], 1, ["source '"]),
    json=("cd3", [json.dumps(dict(input=EASY[0], output=EASY[1])), '{"input": '], 2, ["JSON"]),
    field=("cd3", [json.dumps(dict(source=EASY[0], output=EASY[1]))], 1, ["source '"]),
    short=("cd3", [" ".join(EASY), EASY[0] + " 5+3=8"], 2, ["target '5+3=8'"]),
    long=("cd4", [EXAMPLE[0] + " " + EXAMPLE[1] + ",96+0=96"], 1, ["target '"]),
    sides=("cd3", [EASY[0] + " 5+3=8,8*9"], 1, ["target '"]),
    operator=("cd3", [EASY[0] + " 5+3=8,8^9=72"], 1, ["target '"]),
    digits=("cd3", [EASY[0] + " 5+3=8,8*9=７２"], 1, ["target '"]),
    false=("cd3", [EASY[0] + " 5+3=9,9*8=72"], 1, ["target '"]),
    numbers=("cd3", [" ".join(EASY), "", EASY[0] + " 6+2=8,8*9=72"], 3, ["target '"]),
    clauses=("sat5", [" ".join(FORMULA), FORMULA[0][6:] + " 1,2,3,9,5"], 2, ["source '", "41 clauses"]),
    more=("sat5", [f"1,2,3/{FORMULA[0]} 1,2,3,9,5"], 1, ["source '"]),
    slash=("sat5", [f"{FORMULA[0]}/ 1,2,3,9,5"], 1, ["source '"]),
    letter=("sat5", [FORMULA[0][:-1] + "a 1,2,3,9,5"], 1, ["source '", "sat5"]),
    variable=("sat7", [" ".join(SEVEN), SEVEN[0][:-1] + "8 " + SEVEN[1]], 2, ["source '", "45 clauses"]),
    pair=("sat7", [SEVEN[0][:-2] + " " + SEVEN[1]], 1, ["source '"]),
    size=("sat9", [" ".join(SEVEN)], 1, ["source '", "51 clauses"]),
    missing=("sat7", [SEVEN[0] + " 1,c,3,4,5,6"], 1, ["target '1,c,3,4,5,6'"]),
    unknown=("sat7", [SEVEN[0] + " 1,c,3,4,5,6,9"], 1, ["target '"]),
    unsatisfied=("sat7", [" ".join(SEVEN), SEVEN[0] + " b,c,3,4,5,6,h"], 2, ["target '"]),
)


@pytest.mark.parametrize("kind", BAD_LINES)
def test_malformed_lines_are_named(rejects, tmp_path, kind):
    """For training, and for --solve, which takes a question without its answer."""
    task, lines, number, words = BAD_LINES[kind]
    (file := tmp_path / "bad.txt").write_text("\n".join(lines) + "\n", "utf-8")
    for need in (True, False):
        read = functools.partial(m.read_problems, task=task, need_target=need)
        rejects(lambda argv: read(argv[0]), [file], f"bad.txt:{number}:", *words)


@pytest.mark.parametrize("task", GOOD)
def test_training_needs_labels(rejects, tmp_path, task):
    (file := tmp_path / "x.txt").write_text(f"{' '.join(GOOD[task])}\n{GOOD[task][0]}\n")
    rejects(lambda argv: m.read_problems(argv[0], task), [file], "x.txt:2:", "target")


# ---------------------------------------------------------------- sizes and settings
@pytest.mark.parametrize("task", TASKS)
def test_parameters_of_the_published_sizes(task):
    for size, count in (("tiny", 5_532_672), ("base", 85_473_024)):
        for arm in ("mdm", "ar"):
            n, length, _ = m.cost(m.Config(task=task, size=size, **OFFICIAL), arm)
            assert n == count and length == m.CUTOFF[task]


@pytest.mark.parametrize("task", TASKS)
def test_dry_run_prints_and_creates_nothing(task, capsys, monkeypatch, tmp_path):
    """The paper's scale: base for countdown, tiny for 3-SAT."""
    monkeypatch.chdir(tmp_path)
    m.main(["--scale", "paper", "--task", task, "--dry-run"])
    out, count = capsys.readouterr().out, "85,473,024" if task in COUNTDOWNS else "5,532,672"
    assert out.count(f"{count} parameters") == 2 and "FLOPs" in out and "GiB" in out and "hours" in out
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("task", TASKS)
def test_the_papers_settings(task):
    """(official code) 600 epochs in batches of 1024; countdown: beta 2, lr 3e-4."""
    cfg = m.cli(m.Config, m.SCALES, ["--scale", "paper", "--task", task])
    n = 500_000 if task in COUNTDOWNS else 100_000 if task == "sat9" else 50_000
    assert cfg.n_train == n and cfg.steps * cfg.batch_size / n == pytest.approx(600, abs=1)
    assert (cfg.beta, cfg.lr) == ((2.0, 3e-4) if task in COUNTDOWNS else (1.0, 1e-3))
    assert (cfg.format, cfg.canvas, cfg.positions, cfg.shift) == (*OFFICIAL.values(), True)
    assert (cfg.T, cfg.alpha, cfg.dropout, cfg.sequence_weight, cfg.arms) == (20, 0.25, 0.1, "linear", "mdm,ar")


@pytest.mark.parametrize("argv, words", [
    ("--task cd4 --arms ar_rev", ["--arms", "mdm, ar"]),
    ("--task sat5 --arms mdm,teacherless", ["--arms", "mdm, ar"]),
    ("--task cd3 --format chars", ["--format chars", "--canvas source"]),
    ("--task sat9 --format chars --canvas source", ["--format chars", "--positions learned"]),
    ("--task cd6", ["cd6", "cd3", "sat9"]),
])
def test_wrong_flags(rejects, argv, words):
    rejects(m.main, argv.split(), *words)


# ---------------------------------------------------------------- command line
TRAINED = dict(cd4=("--task", "cd4", "--arms", "mdm,ar"), sat7=("--task", "sat7", "--arms", "mdm,ar"))


def test_smoke(smoke):
    """Both tasks, side by side: every row and column of the table, whatever the claims compare, and no claim."""
    with ThreadPoolExecutor(2) as pool:
        runs = dict(zip(TRAINED, pool.map(lambda argv: smoke("mdm", *argv), TRAINED.values())))
    steps = [f"{name}{i}{more}" for i in (1, 2, 3) for name, more in (("equation ", " false"), ("plan lost by ", ""))]
    columns = dict(cd4=("new", "game24", ["official", *steps]), sat7=("formulas", ["official", "ceiling"]))
    for task, run in runs.items():
        metrics, (*classes, more) = run.result["metrics"], columns[task]
        rows = ["mdm", "ar", *(f"mdm {name}" for name in m.SWEEP)]
        wanted = {f"{row}/{group}" for row in rows for group in classes}
        wanted |= {f"{arm}/{group} {name}" for arm in ("mdm", "ar") for group in classes for name in more}
        assert wanted <= set(metrics) and all(0 <= metrics[key] <= 1 for key in wanted)
        others = {key.split("/")[1] for key in set(metrics) - wanted}
        assert others == {"calls", "answers_per_s"} and {key.split("/")[0] for key in metrics} == set(rows)
        assert run.result["task"] == task and run.result["claims"] == [] and "CLAIM" not in run.stdout
        compared = {row for _, formula, *_ in m.CLAIMS[m.family(task)] for row in formula.split(" - ")}
        assert compared <= set(metrics) and len(compared) >= 4
        assert all(re.search(rf"^{row} .*\d", run.stdout, re.M) for row in rows)
        assert all(f"6 {group}" in run.stdout for group in classes)
        for arm in ("mdm", "ar"):
            assert (run.out / f"{arm}.safetensors").exists()
            lost = [metrics.get(f"{arm}/new plan lost by {i}", 1.0) for i in (1, 2, 3)]
            assert lost == sorted(lost)  # what is lost stays lost


@pytest.mark.parametrize("task", TRAINED)
@pytest.mark.parametrize("arm", ["mdm", "ar"])
def test_solve_answers_every_line(smoke, capsys, tmp_path, task, arm):
    """One line each, with or without a target; accuracy on standard error."""
    problems = problems_of(task, 15)[:3]
    (file := tmp_path / "x.txt").write_text("".join(" ".join(p) + "\n" for p in problems) + problems[0][0] + "\n")
    m.main(["--task", task, "--arms", arm, "--load", str(smoke("mdm", *TRAINED[task]).out), "--solve", str(file)])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 4 and lines[0] == lines[3]  # the same question with and without its answer
    assert re.search(r"strict \d/4, official \d/3", err)


@pytest.mark.parametrize("task, right, other", [
    ("cd4", "28+86=114,31-13=18,114-18=96", "90+6=96"),
    ("sat7", None, None),
])
def test_solve_counts_what_is_right(smoke, capsys, monkeypatch, tmp_path, task, right, other):
    """Right by the rules, right for the authors' script, without a target: each counted for itself."""
    if task == "sat7":
        source, found = next((s, x) for s, _ in formulas("sat7", 1500) if len(x := satisfying(s, 7)) > 1)
        problem, texts, marks = (source, found[0]), [found[0], found[1], found[1]], "strict 3/3, official 1/2"
    else:
        problem, texts, marks = EXAMPLE, [right, other, right], "strict 2/3, official 2/2"
    monkeypatch.setattr(m, "answer", lambda *args, **kwargs: (texts, None))
    (file := tmp_path / "x.txt").write_text(f"{' '.join(problem)}\n{' '.join(problem)}\n{problem[0]}\n")
    m.main(["--task", task, "--load", str(smoke("mdm", *TRAINED[task]).out), "--solve", str(file)])
    out, err = capsys.readouterr()
    assert out.splitlines() == texts and marks in err
