# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/simgraph.py against three nested loops, bit for bit.

A bug that must be caught here: `_set_bits(bits, x.half(), ..., MARGIN, near)` with a margin of 0 (pairs near tau are
decided by rounded rows).
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import simgraph as op
from kernels.simgraph import blocked, pack, simgraph, simgraph_ref, unpack

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiles of 32 rows in 16 bits, of 16 in fp32."""
    monkeypatch.setattr(op, "plan", lambda dtype: (
        {"BLOCK": 16 if dtype == torch.float32 else 32, "BLOCK_D": 16}, {"num_warps": 4}))


def naive(x, owner, n_owners, tau, returns=None):
    """The docstring's formula, and whether a pair of the two tools is within 1e-4 of tau."""
    s = (x.double() @ x.double().T).tolist()
    edge, unsure = (torch.zeros(n_owners, n_owners, dtype=torch.bool) for _ in range(2))
    for i, a in enumerate(owner.tolist()):
        for j, b in enumerate(owner.tolist()):
            if a != b and not (returns is not None and returns[i] and returns[j]):
                edge[a, b] |= s[i][j] > tau
                unsure[a, b] |= abs(s[i][j] - tau) < 1e-4
    return edge, unsure


def agree(x, owner, n_owners, tau, returns=None):
    """Kernel and reference are equal to the loops wherever those are sure; symmetric, zero diagonal. The edges."""
    edge, unsure = naive(x, owner, n_owners, tau, returns)
    for impl in ("ref", "triton"):
        bits = simgraph(x, owner, n_owners, tau, returns, impl=impl)
        assert bits.dtype == torch.int32 and bits.shape == (n_owners, -(-n_owners // 32))
        adjacent = unpack(bits).cpu()
        assert torch.equal(adjacent | unsure, edge | unsure)
        assert torch.equal(adjacent, adjacent.T) and not adjacent.diagonal().any()
        assert torch.equal(pack(unpack(bits)), bits)                  # the bits behind the last owner are 0
    return edge


# ------------------------------------------------------------------ storage and reference
def test_pack_and_unpack():
    assert pack(torch.eye(2).bool()).tolist() == [[1], [2]]
    adjacent = torch.rand(70, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = pack(adjacent)
    assert bits.shape == (70, 3) and bits.dtype == torch.int32 and torch.equal(unpack(bits), adjacent)
    assert all((bits[s, t // 32].item() >> t % 32) & 1 == adjacent[s, t] for s in (0, 9) for t in range(70))
    assert pack(torch.ones(32, 32).bool()).unique().tolist() == [-1]


def test_reference_never_builds_the_matrix_and_does_not_depend_on_the_block():
    args, shapes = op.example(3, 60, 8, torch.float64, "cpu"), []
    bits = simgraph_ref(*args)
    for block in (1, 7, 16):
        assert torch.equal(simgraph_ref(*args, block=block), bits)
    blocked(*args, None, 16, lambda a, b, *rest: shapes.append((len(a), len(b))) or op.above(a, b, *rest))
    assert max(shapes) == (16, 16) and len(shapes) == 10                               # of 16 tiles
    assert torch.equal(unpack(bits), naive(*args)[0])


# ------------------------------------------------------------------ kernel against the loops
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R, K, D", [(1, 1, 1), (3, 70, 40), (1, 150, 33)])
def test_forward(device, R, K, D, dtype):
    edge = agree(*op.example(R, K, D, dtype, device))
    assert K == 1 or 0 < edge.sum() < 0.2 * edge.numel()


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("K, n_owners", [(31, 40), (97, 33), (100, 7)])
def test_tools_of_all_sizes(device, small_blocks, K, n_owners, dtype):
    """Also tools without rows, and tools that cross tiles."""
    x, *_ = op.example(1, K, 24, dtype, device)
    owner = torch.randint(n_owners, (K,), generator=torch.Generator().manual_seed(2)).sort().values.to(device)
    assert agree(x, owner, n_owners, 0.75).any()
    agree(x, owner.flip(0).int(), n_owners, 0.75)                 # sorted the other way
    order = torch.randperm(K, generator=torch.Generator().manual_seed(3)).to(device)
    agree(x, owner[order], n_owners, 0.75)                        # not sorted


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_returns_make_no_edge(device, small_blocks, dtype):
    x, owner, n_owners, tau = op.example(3, 90, 24, dtype, device)
    returns = (torch.rand(90, generator=torch.Generator().manual_seed(4)) < 0.5).to(device)
    some, all_ = agree(x, owner, n_owners, tau, returns), agree(x, owner, n_owners, tau, ~returns & False)
    assert 0 < some.sum() < all_.sum() and not agree(x, owner, n_owners, tau, returns | True).any()


@pytest.mark.parametrize("layout", ["padded", "aligned in NaN", "transposed", "expanded", "every other"])
def test_strides(device, nan_padded, layout):
    x, owner, n_owners, tau = op.example(2, 40, 32, torch.float16, device)
    nan = torch.full((42, 64), float("nan"), dtype=x.dtype, device=device)
    nan[1:-1, 16:48] = x
    view = {"padded": nan_padded(x), "aligned in NaN": nan[1:-1, 16:48], "transposed": x.T.contiguous().T,
            "expanded": x[:1].expand(40, 32),
            "every other": x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]}
    agree(view[layout], owner.repeat_interleave(2)[::2], n_owners, tau)


# ------------------------------------------------------------------ near the threshold
def pairs(rows):
    """(n, 2, D) to (2 n, n D): rows of different pairs are orthogonal."""
    n, _, D = rows.shape
    x = torch.zeros(n, 2, n, D, dtype=torch.float64)
    x[torch.arange(n), :, torch.arange(n)] = rows.double()
    return x.view(2 * n, n * D).float()


def test_pairs_near_the_threshold_are_decided_in_fp32(device, small_blocks):
    """Beyond 1e-4 of tau all is exact, where fp16 rows alone would be wrong: 15 columns that fp16 rounds down by
    almost half a digit, 2**-11 of them, and one that sets the similarity."""
    gaps = torch.tensor([sign * gap for gap in (1.1e-4, 2e-4, 4e-4, 7e-4, 9.9e-4, 1.1e-3, 2e-3) for sign in (1, -1)])
    rows, tau = torch.full((len(gaps), 2, 16), 0.25 + 0.98 * 2 ** -13, dtype=torch.float64), 0.97
    rows[:, 0, 15] = 0.22
    rows[:, 1, 15] = (tau + gaps.double() - 15 * rows[0, 0, 0] ** 2) / 0.22
    x = pairs(rows).to(device)
    assert (x.norm(dim=1) <= 1).all()
    owner = torch.arange(len(x), device=device)
    edge = agree(x, owner, len(x), tau)
    assert torch.equal(edge[::2, 1::2].diagonal(), gaps > 0)
    rounded = unpack(simgraph(x.half(), owner, len(x), tau, impl="triton")).cpu()
    assert (rounded != edge).sum() >= 6                           # three of the seven pairs at the least


def test_only_tiles_near_the_threshold_are_computed_again(device, small_blocks, monkeypatch):
    counts, launch = [], op.launch

    def counted(kernel, n_programs, *args, **meta):
        counts.append(n_programs)
        launch(kernel, n_programs, *args, **meta)
    monkeypatch.setattr(op, "launch", counted)
    c = torch.tensor([0.1] * 40 + [0.8005] + [0.9] * 23)
    x = pairs(torch.stack([1 - 0 * c, 0 * c, c, (1 - c * c).sqrt()], 1).view(64, 2, 2)).to(device)
    # 128 rows are 4 x 4 tiles; rows 80 and 81, alone within 1e-3 of 0.8, lie in the third
    simgraph(x, torch.arange(128, device=device), 128, 0.8, impl="triton")
    assert counts == [10, 4]
    counts.clear()
    simgraph(x, torch.arange(128, device=device), 128, 0.7, impl="triton")
    assert counts == [10]


@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_similarity_equal_to_the_threshold_is_no_edge(device, impl, dtype):
    x = torch.tensor([[1.0, 0], [0.5, 0.75], [1, 0]], dtype=dtype, device=device)
    owner = torch.tensor([0, 1, 2], device=device)
    assert unpack(simgraph(x, owner, 3, 0.5, impl=impl)).nonzero().tolist() == [[0, 2], [2, 0]]
    assert unpack(simgraph(x, owner, 3, 0.499, impl=impl)).sum() == 6
    assert unpack(simgraph(x, owner, 3, -2, impl=impl)).sum() == 6            # all but the diagonal


def test_upper_tiles_and_quarters():
    for n in (1, 2, 9, 17):
        tiles = op.upper_tiles(n, "cpu").tolist()
        assert sorted(tiles) == [[i, j] for i in range(n) for j in range(i, n)]
    assert op.quarters(torch.tensor([[1, 3]])).tolist() == [[2, 6], [2, 7], [3, 6], [3, 7]]


# ------------------------------------------------------------------ special cases, dispatch, errors
@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_monotone_in_the_threshold_and_rows_with_nan_have_no_edge(device, small_blocks, impl):
    x, owner, n_owners, _ = op.example(3, 60, 16, torch.float32, device)
    x[7] = float("nan")                                           # tool 2 keeps rows 6 and 8
    x[21:24] = float("nan")                                       # tool 7 has no other
    low, high = (unpack(simgraph(x, owner, n_owners, tau, impl=impl)) for tau in (0.5, 0.8))
    assert high.sum() > 0 and not (high & ~low).any() and low.sum() > high.sum() and not low[7].any()


@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("n_owners", [0, 3, 33])
def test_no_rows_and_no_gradient(device, impl, n_owners):
    nothing = torch.zeros(0, 5, device=device), torch.zeros(0, dtype=torch.long, device=device)
    bits = simgraph(*nothing, n_owners, 0.8, impl=impl)
    assert bits.shape == (n_owners, -(-n_owners // 32)) and not bits.any() and bits.dtype == torch.int32
    x = torch.ones(2, 5, device=device, requires_grad=True)
    assert not simgraph(x, torch.tensor([0, 1], device=device), 2, 0.8, impl=impl).requires_grad


def test_dispatch_cpu_uses_ref(monkeypatch):
    def launched(*args):
        raise AssertionError("the kernel ran on a CPU tensor")
    monkeypatch.setattr(op, "_simgraph", launched)
    args = op.example(2, 20, 8, torch.float16, "cpu")
    assert torch.equal(simgraph(*args), simgraph_ref(*args))
    with pytest.raises(ValueError, match="impl must be"):
        simgraph(*args, impl="cuda")


@pytest.mark.parametrize("change, message", [
    ({0: torch.zeros(3)}, "x must be"), ({0: torch.zeros(3, 0)}, "D >= 1"),
    ({0: torch.zeros(3, 4).int()}, "floating point"), ({1: torch.zeros(4).int()}, "owner must hold"),
    ({1: torch.zeros(3)}, "owner must hold"),
    ({1: torch.tensor([0, 1, 3])}, "owners must lie"), ({1: torch.tensor([-1, 0, 1])}, "owners must lie"),
    ({1: torch.zeros(3, device="meta").int()}, "owner is on"), ({2: -1}, "n_owners must be"),
    ({4: torch.zeros(3)}, "returns must be bool"), ({4: torch.zeros(2).bool()}, "returns must be bool"),
])
def test_errors(change, message):
    args = [torch.zeros(3, 4), torch.tensor([0, 1, 2]), 3, 0.8, None]
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        simgraph(*args)


def test_fp64_never_reaches_the_kernel(device):
    args = op.example(2, 20, 8, torch.float64, device)
    assert torch.equal(unpack(simgraph(*args)).cpu(), naive(*args)[0])
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        simgraph(*args, impl="triton")


# ------------------------------------------------------------------ large tensors
FAR_ROWS = """
import mmap, tempfile, torch
from kernels.simgraph import simgraph
file = tempfile.TemporaryFile()
file.truncate(2**32 + 256)                      # sparse: 4 GB of addresses, a few pages of memory
x = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float16).as_strided((3, 64), (2**30, 1))
x.copy_(torch.nn.functional.one_hot(torch.tensor([4, 5, 5]), 64))
print(simgraph(x, torch.tensor([0, 1, 2]), 3, 0.9, impl="triton").flatten().tolist())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; a GPU has a test of its own")
def test_row_offsets_beyond_int32():
    """In a process of its own: a wrapped offset reads 4 GB in front of the tensor, which may crash it."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", FAR_ROWS], env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "[0, 4, 2]"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R, K, D", [(8, 9001, 384), (3, 5000, 383), (1, 3000, 64)])
def test_gpu_large_and_repeatable(R, K, D, dtype):
    """Equal to fp64 but for the pairs of tools that have a similarity within 1e-4 of tau."""
    x, owner, n_owners, tau = op.example(R, K, D, dtype, "cuda")
    low, high = (unpack(simgraph_ref(x.double(), owner, n_owners, t)) for t in (tau + 1e-4, tau - 1e-4))
    first = simgraph(x, owner, n_owners, tau, impl="triton")
    adjacent = unpack(first)
    assert not (low & ~adjacent).any() and not (adjacent & ~high).any() and low.sum() > 0
    assert torch.equal(adjacent, adjacent.T)
    for _ in range(10):
        assert torch.equal(simgraph(x, owner, n_owners, tau, impl="triton"), first)


@pytest.mark.gpu
def test_gpu_dense_graph():
    """Every word of every row is written by many programs at once."""
    x = torch.ones(4096, 64, device="cuda") / 8
    owner = torch.arange(4096, device="cuda") // 2
    for dtype in DTYPES:
        adjacent = unpack(simgraph(x.to(dtype), owner, 2048, 0.9, impl="triton"))
        assert torch.equal(~adjacent, torch.eye(2048, dtype=torch.bool, device="cuda"))


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    x = torch.zeros(2 ** 13 + 1, 2 ** 18, dtype=torch.bfloat16, device="cuda")
    x[5, -1] = x[-1, -1] = 1.0
    adjacent = unpack(simgraph(x, torch.arange(len(x), device="cuda"), len(x), 0.8, impl="triton"))
    assert adjacent.nonzero().tolist() == [[5, 2 ** 13], [2 ** 13, 5]]
