# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/cosine_max.py against its reference in fp64, the dense formula and brute force.

A bug that must be caught here: `index = tl.where(value > best, ...)` -> `>=` (a tie gives the last tile).
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import cosine_max as op
from kernels.cosine_max import blocked, cosine_max, cosine_max_ref, tile_max

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("padded", "aligned in NaN", "transposed", "expanded rows", "expanded columns", "every other")
BLOCKS = [(16, 16, 32), (16, 64, 16), (64, 16, 16), (64, 64, 64), (128, 256, 32)]        # rows j, rows i, columns
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture
def small_blocks(monkeypatch):
    """16 rows a tile and 8 tiles a program: tiles of all kinds and several chunks from 200 rows on."""
    sizes = dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_D"), 16)
    monkeypatch.setattr(op, "plan", lambda dtype: (sizes, {"num_warps": 4}))


def clusters(kind, N, device):
    if kind == "one":
        return None
    ids = torch.randint(3, (N,), generator=torch.Generator().manual_seed(1)) * 7 - 7
    return {"mixed": ids, "grouped": ids.sort().values, "alone": torch.arange(N)}[kind].to(device)


def agree(e, cluster=None):
    """Kernel outputs meet the rule against fp64; every index is a legal one that reaches the maximum."""
    args = e, cluster
    m, index = op.kernel(*args)
    ref64, eager = cosine_max_ref(e.double(), cluster), op.reference(*args)
    assert m.dtype == torch.float32 and index.dtype == torch.int64
    for name, out, exact, plain in zip(("max", "index"), (m, index), ref64, eager):
        op.rule(name, out, exact, plain, e.shape[1])
    some = index >= 0
    j = torch.arange(len(e), device=e.device)
    assert (index < j).all() and (m[~some] == -1).all()
    assert cluster is None or torch.equal(cluster[some], cluster[index[some]])
    reached = (e.double()[some] * e.double()[index[some]]).sum(1)
    torch.testing.assert_close(m[some].double(), reached, rtol=1e-5, atol=1e-5)


def brute_force(e, cluster):
    """The docstring's first line by plain Python."""
    m, index = [], []
    for j, row in enumerate(e.tolist()):
        products = {i: sum(x * y for x, y in zip(row, e[i].tolist())) for i in range(j)
                    if cluster is None or cluster[i] == cluster[j]}
        m.append(max(products.values(), default=-1.0))
        index.append(min((i for i in products if products[i] == m[-1]), default=-1))
    return m, index


# ------------------------------------------------------------------ the reference
@pytest.mark.parametrize("kind", ["one", "mixed", "grouped", "alone"])
def test_reference_equals_brute_force(kind):
    e = torch.randint(-3, 4, (25, 6), generator=torch.Generator().manual_seed(0)).double()    # exact, with ties
    cluster = clusters(kind, 25, "cpu")
    for block in (1, 4, 7, 25, 100):
        m, index = cosine_max_ref(e, cluster, block)
        assert (m.tolist(), index.tolist()) == brute_force(e, cluster)


def test_reference_is_the_official_formula_and_never_builds_the_matrix():
    e, _ = op.example(1, 300, 48, torch.float32, "cpu")
    assert torch.allclose(cosine_max_ref(e, block=64)[0].clamp(min=0), (e @ e.T).triu(1).max(0).values, atol=1e-6)
    shapes = []
    blocked(e, None, 64, lambda a, b, *rest: shapes.append((len(a), len(b))) or tile_max(a, b, *rest))
    assert max(shapes) == (64, 64) and len(shapes) == 15                               # of 25 tiles


# ------------------------------------------------------------------ kernel against reference
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["one", "mixed", "grouped"])
@pytest.mark.parametrize("N, D", [(1, 1), (65, 33), (300, 100)])
def test_forward(device, N, D, kind, dtype):
    e, _ = op.example(1, N, D, dtype, device)
    agree(e, clusters(kind, N, device))


@pytest.mark.parametrize("kind", ["one", "mixed", "grouped", "alone"])
@pytest.mark.parametrize("N", [15, 16, 17, 270])
def test_several_tiles_and_chunks(device, small_blocks, N, kind):
    e, _ = op.example(1, N, 32, torch.float32, device)
    agree(e, clusters(kind, N, device))


@pytest.mark.parametrize("blocks", BLOCKS)
def test_each_block_size_alone(device, monkeypatch, blocks):
    sizes = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_D"), blocks))
    monkeypatch.setattr(op, "plan", lambda dtype: (sizes, {"num_warps": 4}))
    e, cluster = op.example(2, 150, 70, torch.float16, device)
    agree(e, cluster)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device, nan_padded, layout):
    e, cluster = op.example(2, 70, 64, torch.float32, device)
    nan = torch.full((72, 96), float("nan"), device=device)
    nan[1:-1, 16:80] = e
    views = {"padded": nan_padded(e), "aligned in NaN": nan[1:-1, 16:80], "transposed": e.T.contiguous().T,
             "expanded rows": e[:1].sign().expand(70, 64), "expanded columns": e[:, :1].expand(70, 64),
             "every other": e.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]}
    m, index = cosine_max(views[layout], cluster.repeat_interleave(2)[::2], impl="triton")
    if layout == "expanded rows":
        assert index.tolist() == [-1] + 34 * [0] + [-1] + 34 * [35]    # exact sums: no BLAS rounds them apart
    else:
        agree(views[layout], cluster.repeat_interleave(2)[::2])


# ------------------------------------------------------------------ special rows
@pytest.mark.parametrize("first, second", [(3, 4), (15, 16), (40, 130)])
def test_ties_give_the_lowest_index(device, small_blocks, first, second):
    """Two equal rows, in one tile, in two of a chunk, in two chunks: the last row is near to both."""
    e = torch.eye(128, device=device)[torch.arange(140) % 70 + 50]
    e[[first, second]] = e[139] = torch.eye(128, device=device)[0]
    m, index = cosine_max(e, impl="triton")
    assert (m[139].item(), index[139].item()) == (1.0, first)
    assert (m[second].item(), index[second].item(), m[0].item(), index[0].item()) == (1.0, first, -1.0, -1)
    assert all(map(torch.equal, (m, index), cosine_max_ref(e)))


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_negative_products_and_rows_that_are_alone(device, impl):
    e = torch.tensor([[1.0, 0], [-1, 0], [0.6, -0.8], [-0.8, 0.6], [0, 1]], device=device)
    m, index = cosine_max(e, torch.tensor([5, 5, -2, -2, 9], device=device), impl=impl)
    assert index.tolist() == [-1, 0, -1, 2, -1]
    torch.testing.assert_close(m.cpu(), torch.tensor([-1, -1, -1, -0.96, -1]))


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_rows_with_nan_are_skipped(device, impl):
    e, _ = op.example(1, 40, 32, torch.float32, device)
    e[0], e[20, 3] = float("nan"), float("nan")
    keep = [j for j in range(40) if j not in (0, 20)]
    m, index = cosine_max(e, impl=impl)
    expected, at = cosine_max_ref(e[keep])
    assert m[[0, 1, 20]].tolist() == [-1, -1, -1] and index[[0, 1, 20]].tolist() == [-1, -1, -1]
    torch.testing.assert_close(m[keep], expected)
    assert index[keep[1:]].tolist() == [keep[i] for i in at[1:].tolist()]


def test_extreme_values(device):
    """Not unit rows: products of fp16 up to 4e9, negative ones alone, and 0."""
    e, _ = op.example(1, 60, 32, torch.float16, device)
    e[10:20] = 65504 * e[10:20].sign()
    e[20:30] *= 0
    agree(e)
    agree((-1) ** torch.arange(60, device=device)[:, None] * e[:1].float())


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_no_rows_and_no_gradient(device, impl):
    m, index = cosine_max(torch.zeros(0, 7, device=device), torch.zeros(0, dtype=torch.int8, device=device), impl=impl)
    assert m.shape == index.shape == (0,) and index.dtype == torch.int64
    assert not any(x.requires_grad for x in cosine_max(torch.ones(3, 7, device=device, requires_grad=True), impl=impl))


# ------------------------------------------------------------------ dispatch, errors
def test_dispatch_cpu_uses_ref(monkeypatch):
    def launched(*args):
        raise AssertionError("the kernel ran on a CPU tensor")
    monkeypatch.setattr(op, "_cosine_max", launched)
    e, cluster = op.example(3, 20, 8, torch.float32, "cpu")
    assert all(map(torch.equal, cosine_max(e, cluster), cosine_max_ref(e, cluster)))
    with pytest.raises(ValueError, match="impl must be"):
        cosine_max(e, impl="cuda")


@pytest.mark.parametrize("e, cluster, message", [
    (torch.zeros(3), None, "must be .N, D."), (torch.zeros(3, 0), None, "D >= 1"),
    (torch.zeros(3, 4).int(), None, "floating point"), (torch.zeros(3, 4), torch.zeros(4).int(), "cluster must be"),
    (torch.zeros(3, 4), torch.zeros(3), "integers"), (torch.zeros(3, 4), torch.zeros(3, device="meta").int(), "is on"),
])
def test_errors(e, cluster, message):
    with pytest.raises(ValueError, match=message):
        cosine_max(e, cluster)


def test_fp64_never_reaches_the_kernel(device):
    e, _ = op.example(1, 9, 8, torch.float64, device)
    assert cosine_max(e)[0].dtype == torch.float64
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        cosine_max(e, impl="triton")


# ------------------------------------------------------------------ large tensors
FAR_ROWS = """
import mmap, tempfile, torch
from kernels.cosine_max import cosine_max
file = tempfile.TemporaryFile()
file.truncate(2**32 + 256)                      # sparse: 4 GB of addresses, a few pages of memory
e = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float16).as_strided((3, 64), (2**30, 1))
e.copy_(torch.randn(3, 64))
print(*map(torch.allclose, cosine_max(e, impl="triton"), cosine_max(e.contiguous(), impl="ref")))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; a GPU has a test of its own")
def test_row_offsets_beyond_int32():
    """In a process of its own: a wrapped offset reads 4 GB in front of the tensor, which may crash it."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", FAR_ROWS], env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["True", "True"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C, N, D", [(1, 10000, 384), (7, 9999, 383), (1, 3000, 1024)])
def test_gpu_large_and_repeatable(C, N, D, dtype):
    args = op.example(C, N, D, dtype, "cuda")
    agree(*args)
    first = op.kernel(*args)
    for _ in range(10):
        assert all(map(torch.equal, op.kernel(*args), first))


@pytest.mark.gpu
def test_gpu_duplicates_are_found_where_they_were_put():
    """Row j is a copy of row j - 2500, and of no other one."""
    e = torch.randn(2500, 384, generator=torch.Generator().manual_seed(0)).half().cuda().repeat(4, 1)
    m, index = cosine_max(e, impl="triton")
    j = torch.arange(2500, 10000, device="cuda")
    assert torch.equal(index[2500:], j % 2500)                    # the first of up to three equal ones


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    e = torch.zeros(2 ** 13 + 1, 2 ** 18, dtype=torch.bfloat16, device="cuda")
    e[5, -1] = e[-1, -1] = 1.0
    m, index = cosine_max(e, impl="triton")
    assert (m[-1].item(), index[-1].item()) == (1.0, 5) and not m[1:-1].any() and not index[1:-1].any()
