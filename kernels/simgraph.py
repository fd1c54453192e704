# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Graph of tools whose parameters mean the same: cosine, threshold and OR over the rows of a tool (toolflow.py,
section 7).

    edge(s, t) = 1  iff  s != t and x_i . x_j > tau for some rows i of tool s and j of tool t    (> as in the paper)
                         of which one at least is a parameter: two returns make no edge

Shapes: x (K, D) fp32/fp16/bf16, rows of norm <= 1; owner (K,) integers in [0, n_owners), the tool of each row, in
any order; tau a number; returns (K,) bool, True for a tool's returns, or None: all rows are parameters.
Returns the adjacency as bits (n_owners, ceil(n_owners / 32)) int32: bit t % 32 of word t // 32 of row s (`unpack`
gives bools). Symmetric, zero diagonal; tools without rows have no edge. No gradient. NaN is not above tau.

Exactness: 16-bit x: exact products, sums in fp32. fp32 x: all tiles run in fp16 on the matrix units, with an error of
at most 2**-10 sum_k |x_ik x_jk| <= 2**-10 and the rounding of the sums; a pair further than MARGIN = 1e-3 from tau is
decided there, and a tile with a nearer one is computed again from the fp32 rows, never in tf32. Either way an edge
differs from fp64 only if its similarity is within a few 1e-6 of tau.

No races: a program owns one tile of the upper triangle and sets its bits, of s and of t, with atomic OR. OR commutes,
so the result is the same in any order: this is the one kernel here whose programs write to the same words.

Floor, b bytes an element: K D b + 4 K + n_owners**2 / 8 bytes, K**2 D FLOPs, half of the square.
"""
import torch
import torch.nn.functional as F

from kernels._common import INTERPRET, aot_case, check, launch, tl, triton, use_triton
from kernels.cosine_max import INTEGERS, dot_rows, padded

MARGIN = 1e-3                                                # bounds the error of a similarity of fp16 rows


# ------------------------------------------------------------------ storage and reference
def pack(adjacent):
    """bool (n, n) to int32 (n, ceil(n / 32)); the lowest bit holds the first column."""
    n = len(adjacent)
    bits = F.pad(adjacent, (0, -n % 32)).view(n, -(-n // 32), 32)
    return (bits.int() << torch.arange(32, dtype=torch.int32, device=bits.device)).sum(-1, dtype=torch.int32)


def unpack(bits):
    """int32 (n, ceil(n / 32)) to bool (n, n)."""
    single = bits[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bits.device) & 1
    return single.bool().flatten(1)[:, :len(bits)]


def simgraph_ref(x, owner, n_owners, tau, returns=None, block=2048):
    """Plain PyTorch, in fp32 (fp64 for fp64 rows), on blocks of block**2 products; the CPU path."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return blocked(x.detach().to(dtype), owner, n_owners, tau, returns, block)


def above(a, b, tau, parameter_a, parameter_b):
    """Pairs of a row of a and one of b that make an edge, (R, C) bool."""
    return (a @ b.T > tau) & (parameter_a[:, None] | parameter_b)


def blocked(x, owner, n_owners, tau, returns, block, step=above):
    """simgraph in the type of x, block by block on and above the diagonal."""
    owner = owner.long()
    parameter = torch.ones_like(owner, dtype=torch.bool) if returns is None else ~returns
    adjacent = torch.zeros(n_owners, n_owners, dtype=torch.bool, device=x.device)
    for i in range(0, len(x), block):
        for j in range(i, len(x), block):
            first, second = slice(i, i + block), slice(j, j + block)
            pairs = step(x[first], x[second], tau, parameter[first], parameter[second])
            rows, cols = pairs.nonzero(as_tuple=True)
            adjacent[owner[i + rows], owner[j + cols]] = True
    return pack((adjacent | adjacent.T).fill_diagonal_(False))


# ------------------------------------------------------------------ kernel
@triton.jit
def _simgraph_kernel(x_ptr, owner_ptr, tile_ptr, bits_ptr, near_ptr, stride_x, K, D, W, tau, margin,
                     WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: tile (i, j) of the list, two int32; sets bits for products above tau + margin. near_ptr, or None:
    whether a product of the tile is within margin of tau. Rows beyond K are the last row again, which adds no edge."""
    tile = tile_ptr + 2 * tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    rows = tl.minimum(tl.load(tile) * BLOCK + lane, K - 1)                                # (BLOCK,)
    cols = tl.minimum(tl.load(tile + tl.full((), 1, tl.int64)) * BLOCK + lane, K - 1)     # (BLOCK,)
    ours = tl.load(owner_ptr + rows.to(tl.int64))            # 2 owner + (1 for a row of `returns`)
    theirs = tl.load(owner_ptr + cols.to(tl.int64))
    s = dot_rows(x_ptr, rows, stride_x, x_ptr, cols, stride_x, D, WIDE, BLOCK, BLOCK, BLOCK_D)   # (BLOCK, BLOCK)
    s = tl.where((ours & 1)[:, None] + (theirs & 1)[None, :] == 2, -float("inf"), s)
    ours, theirs = ours >> 1, theirs >> 1
    s = tl.where(ours[:, None] == theirs[None, :], -float("inf"), s)
    if near_ptr is not None:
        tl.store(near_ptr + tl.program_id(0).to(tl.int64), (tl.min(tl.abs(s - tau)) <= margin).to(tl.int32))
    if tl.max(s) > tau + margin:                             # most tiles hold no edge
        hit = s > tau + margin
        one = tl.full((BLOCK,), 1, tl.int32)
        word = ours.to(tl.int64)[:, None] * W + (theirs >> 5)[None, :]                    # (BLOCK, BLOCK)
        bit = tl.broadcast_to((one << (theirs & 31))[None, :], (BLOCK, BLOCK))
        tl.atomic_or(bits_ptr + word, bit, mask=hit, sem="relaxed")
        word = theirs.to(tl.int64)[None, :] * W + (ours >> 5)[:, None]
        bit = tl.broadcast_to((one << (ours & 31))[:, None], (BLOCK, BLOCK))
        tl.atomic_or(bits_ptr + word, bit, mask=hit, sem="relaxed")


def plan(dtype):
    """Block sizes and options. Matrix units in 16 bits; exact fp32 runs on the others, in tiles of half the side.
    Many warps: the addresses of the atomics need registers beside the products."""
    if dtype == torch.float32:
        return {"BLOCK": 64, "BLOCK_D": 16}, {"num_warps": 8, "num_stages": 3}
    return {"BLOCK": 128, "BLOCK_D": 32}, {"num_warps": 16, "num_stages": 4}


def upper_tiles(n, device):
    """(n (n + 1) / 2, 2) int32: the tiles on and above the diagonal, 8 rows of tiles at a time: neighbouring programs
    find their rows in the L2."""
    i, j = torch.triu_indices(n, n, device=device)
    order = ((i // 8 * n + j) * 8 + i % 8).argsort()
    return torch.stack([i, j], dim=1)[order].int()


def quarters(tiles):
    """(T, 2) to (4 T, 2): the tiles of half the side."""
    corner = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.int32, device=tiles.device)
    return (2 * tiles[:, None] + corner).flatten(0, 1)


def _set_bits(bits, x, owner, tiles, tau, margin, near=None):
    sizes, options = plan(x.dtype)
    x = padded(x, sizes["BLOCK_D"])
    launch(_simgraph_kernel, len(tiles), x, owner, tiles, bits, near, x.stride(0), *x.shape, bits.shape[1],
           tau, margin, WIDE=INTERPRET and x.dtype == torch.bfloat16, **sizes, **options)


def _simgraph(x, owner, n_owners, tau, returns):
    x, owner, tau = x.detach(), 2 * owner.to(torch.int32), float(tau)
    owner = (owner if returns is None else owner + returns.int()).contiguous()            # as the kernel reads it
    bits = torch.zeros((n_owners, -(-n_owners // 32)), dtype=torch.int32, device=x.device)
    tiles = upper_tiles(-(-len(x) // plan(torch.float16)[0]["BLOCK"]), x.device)
    if x.dtype != torch.float32:
        _set_bits(bits, x, owner, tiles, tau, 0.0)
        return bits
    near = torch.empty(len(tiles), dtype=torch.int32, device=x.device)
    _set_bits(bits, x.half(), owner, tiles, tau, MARGIN, near)
    tiles = quarters(tiles[near > 0])                        # waits for the first launch: how many are there?
    if len(tiles):
        _set_bits(bits, x, owner, tiles, tau, 0.0)
    return bits


# ------------------------------------------------------------------ public function
def simgraph(x, owner, n_owners, tau, returns=None, *, impl="auto"):
    """Bits (n_owners, ceil(n_owners / 32)) int32: owners with a pair of rows above tau that are not both `returns`.

    impl: "auto" (kernel on CUDA, else reference), "triton", "ref". fp64: reference.
    Raises ValueError for wrong shapes, dtypes or devices and for owners outside [0, n_owners).
    """
    check(x.ndim == 2 and x.shape[1] >= 1, f"x must be (K, D) with D >= 1, got shape {tuple(x.shape)}")
    check(x.is_floating_point(), f"x must be floating point, got {x.dtype}")
    check(owner.shape == x.shape[:1] and owner.dtype in INTEGERS,
          f"owner must hold ({len(x)},) integers, got {owner.dtype} {tuple(owner.shape)}")
    check(owner.device == x.device, f"owner is on {owner.device}, x is on {x.device}")
    check(0 <= n_owners < 2 ** 30, f"n_owners must be in [0, 2**30), got {n_owners}")
    if returns is not None:
        check(returns.shape == owner.shape and returns.dtype == torch.bool and returns.device == x.device,
              f"returns must be bool ({len(x)},) on {x.device}, got {returns.dtype} {tuple(returns.shape)}")
    fused = use_triton(impl, x)
    if len(x) == 0:
        return torch.zeros((n_owners, -(-n_owners // 32)), dtype=torch.int32, device=x.device)
    check(0 <= owner.min() and owner.max() < n_owners, f"owners must lie in [0, {n_owners})")
    return (_simgraph if fused else simgraph_ref)(x, owner, n_owners, tau, returns)


# ------------------------------------------------------------------ the rule, compile cases and benchmark
def rule(name, out, ref64, eager, n_reduce):
    """Of 1000 set bits one may differ, where a similarity is tau up to rounding."""
    assert out.shape == ref64.shape and out.dtype == ref64.dtype == torch.int32, f"{name}: {out.dtype} {out.shape}"
    count, allowed = int(unpack(out ^ ref64).sum()), int(unpack(ref64).sum()) // 1000
    assert count <= allowed, f"{name}: {count} bits differ, allowed {allowed}"


MATMUL = "bf16"                                                                # the unit whose peak counts
# (rows a tool, K, D) and dtype
CHECK_SHAPES = [(8, 3000, 384, torch.float32), (8, 5000, 384, torch.float16), (3, 3000, 383, torch.bfloat16),
                (1, 2000, 384, torch.float32)]
BENCH_SHAPES = [(8, 16384, 384, torch.float16), (8, 65536, 384, torch.float16), (8, 16384, 384, torch.float32),
                (8, 65536, 384, torch.float32)]


def floor(R, K, D, itemsize):
    """{mode: (bytes, FLOPs)} that any implementation needs."""
    return {"forward": (K * (D * itemsize + 4) + (-(-K // R)) ** 2 // 8, K * K * D)}


def _aot_case(dtype, K, D, W, **near):
    sizes, options = plan(torch.float32 if dtype == "fp32" else torch.float16)
    arguments = {"x_ptr": f"*{dtype}", "owner_ptr": "*i32", "tile_ptr": "*i32", "bits_ptr": "*i32", "stride_x": D,
                 "K": K, "D": D, "W": W, "tau": "fp32", "margin": "fp32"}
    constants = {} if near else {"near_ptr": None}
    return aot_case(_simgraph_kernel, "forward", dtype, (K, D), arguments | near, options, WIDE=False, **sizes,
                    **constants)


AOT_CASES = [_aot_case("fp32", 65536, 384, 256), _aot_case("fp16", 65536, 384, 256, near_ptr="*i32"),
             _aot_case("bf16", 3781, 384, 46)]


def example(R, K, D, dtype, device):
    """Arguments (x, owner, n_owners, tau) for checks and benchmarks: R rows a tool, each near some other rows."""
    gen = torch.Generator().manual_seed(0)
    centres = torch.randn(K // 2 + 1, D, generator=gen)
    x = centres[torch.randint(len(centres), (K,), generator=gen)] + 0.5 * torch.randn(K, D, generator=gen)
    owner = (torch.arange(K) // R).to(device)
    return (x / x.norm(dim=1, keepdim=True)).to(device=device, dtype=dtype), owner, -(-K // R), 0.8


def outputs(fn, args):
    """{name: tensor} to compare between implementations."""
    return {"bits": fn(*args)}


def kernel(*args):
    return simgraph(*args, impl="triton")


reference = simgraph_ref


def bench(args):
    """{mode: {provider: thunk}}. The blocks of eager and torch.compile are of 8192 rows, in the type of x: faster
    than the reference and, in 16 bits, less exact than the kernel."""
    step = torch.compile(above)
    return {"forward": {"kernel": lambda: kernel(*args), "eager": lambda: blocked(*args, None, 8192),
                        "torch.compile": lambda: blocked(*args, None, 8192, step)}}
