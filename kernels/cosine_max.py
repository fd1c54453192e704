# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Largest cosine of each row with an earlier row, and where (SemDeDup, nearest neighbours: reversegen.py, section 7).

    m_j = max over i < j, cluster[i] = cluster[j], of e_i . e_j        index_j = the lowest i that reaches it

Shapes: e (N, D) fp32/fp16/bf16, unit rows for cosines: e is taken as it is; cluster (N,) integers within 32 bits,
or None for one cluster. Returns m (N,) fp32 and index (N,) int64. No gradient. SemDeDup drops j if m_j > 1 - eps.
A row without an earlier one in its cluster, row 0 above all, has m = -1, the least cosine, and index -1. The
official triu(e e^T, 1).max(0) has a 0 for each pair that is no pair: it is m.clamp(min=0).
Products that are NaN are skipped: a row that holds NaN is as if it were alone, and no other row sees it.

The N x N matrix is never there. A program owns a block of rows j and up to `tiles` blocks of rows i; tiles above the
diagonal are skipped, and tiles of which no row i can share a cluster with a row j: with rows grouped by cluster,
almost all tiles between clusters. Its maxima go to a buffer (at most 64, N) that PyTorch reduces. No atomics, and no
program reads what another writes.

Error: sums in fp32 of exact products (16 bits) or rounded ones (fp32, never tf32), so |error of m| <= D 2**-24
sum_k |e_ik e_jk|, about 1e-6. Which of two rows nearer to each other than that is `index` may differ; equal rows
have equal products, and ties give the lowest index.

Floor, b bytes an element: N D b + 12 N bytes, N**2 D FLOPs, half of the square; with C equal clusters 1 / C of it.
"""
import torch
import torch.nn.functional as F

from kernels._common import INTERPRET, aot_case, assert_kernel, check, launch, tl, triton, use_triton

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


# ------------------------------------------------------------------ reference
def cosine_max_ref(e, cluster=None, block=2048):
    """Plain PyTorch, in fp32 (fp64 for fp64 rows), on blocks of block**2 products; the CPU path."""
    return blocked(e.detach().to(torch.float64 if e.dtype == torch.float64 else torch.float32), cluster, block)


def tile_max(a, b, cluster_a, cluster_b, ahead):
    """Of each row of a the largest product with a row of b, and which; b's first row is `ahead` rows before a's."""
    s = a @ b.T                                                                           # (R, C)
    i, j = torch.arange(len(b), device=a.device), torch.arange(len(a), device=a.device) + ahead
    pair = (i < j[:, None]) & (cluster_a[:, None] == cluster_b) & ~s.isnan()
    return s.masked_fill(~pair, -float("inf")).max(dim=1)    # a tie gives the first


def blocked(e, cluster, block, step=tile_max):
    """cosine_max in the type of e, block by block on and below the diagonal."""
    N = len(e)
    cluster = torch.zeros(N, dtype=torch.int32, device=e.device) if cluster is None else cluster
    m = torch.full((N,), -float("inf"), dtype=e.dtype, device=e.device)
    index = torch.full((N,), -1, device=e.device)
    for j in range(0, N, block):
        rows = slice(j, j + block)
        for i in range(0, j + 1, block):
            value, at = step(e[rows], e[i:i + block], cluster[rows], cluster[i:i + block], j - i)
            index[rows] = torch.where(value > m[rows], at + i, index[rows])               # strict: the first wins
            m[rows] = torch.maximum(m[rows], value)
    return m.masked_fill(index < 0, -1), index


# ------------------------------------------------------------------ kernel
@triton.jit
def dot_rows(a_ptr, rows, stride_a, b_ptr, cols, stride_b, D, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_M, BLOCK_N) fp32: products of the rows `rows` of a and the rows `cols` of b, all of which exist.

    BLOCK_D divides D. WIDE: bf16 in the interpreter, which cannot compute in it, as fp32."""
    k = tl.arange(0, BLOCK_D)
    a_ptrs = a_ptr + (rows.to(tl.int64)[:, None] * stride_a + k[None, :])                 # (BLOCK_M, BLOCK_D)
    b_ptrs = b_ptr + (cols.to(tl.int64)[None, :] * stride_b + k[:, None])                 # (BLOCK_D, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        shift = tl.cast(start, tl.int64)
        a, b = tl.load(a_ptrs + shift), tl.load(b_ptrs + shift)
        if WIDE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _cosine_max_kernel(e_ptr, cluster_ptr, max_ptr, index_ptr, stride_e, N, D, blocks, tiles, WIDE: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: BLOCK_M rows j against the chunk of `tiles` times BLOCK_N rows i; both maxima of slice `chunk`.

    Neighbouring programs share the chunk, and find it in the L2."""
    block, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)                                        # (BLOCK_M,)
    inside = rows < N
    if cluster_ptr is not None:
        mine = tl.load(cluster_ptr + rows.to(tl.int64), mask=inside, other=-1)
        low, high = tl.min(mine, axis=0), tl.max(mine, axis=0)
    best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    index = tl.full((BLOCK_M,), -1, tl.int32)
    end = tl.cdiv((block + 1) * BLOCK_M, BLOCK_N)            # the tiles behind this one lie above the diagonal
    for tile in range(chunk * tiles, tl.minimum((chunk + 1) * tiles, end)):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)                                     # (BLOCK_N,)
        wanted = True
        if cluster_ptr is not None:
            theirs = tl.load(cluster_ptr + cols.to(tl.int64), mask=cols < N, other=-1)
            wanted = (tl.max(theirs, axis=0) >= low) & (tl.min(theirs, axis=0) <= high)
        if wanted:
            s = dot_rows(e_ptr, tl.minimum(rows, N - 1), stride_e, e_ptr, tl.minimum(cols, N - 1), stride_e, D,
                         WIDE, BLOCK_M, BLOCK_N, BLOCK_D)                                 # (BLOCK_M, BLOCK_N)
            if (tile + 1) * BLOCK_N > block * BLOCK_M:       # all other tiles lie below the diagonal
                s = tl.where(cols[None, :] < rows[:, None], s, -float("inf"))
            if cluster_ptr is not None:
                s = tl.where(theirs[None, :] == mine[:, None], s, -float("inf"))
            value = tl.max(s, axis=1)
            # a minimum over columns needs no tie rule of argmax; strict below: an earlier tile wins a tie
            at = tl.min(tl.where(s == value[:, None], cols[None, :], 2147483647), axis=1)
            index = tl.where(value > best, at, index)
            best = tl.maximum(best, value)
    out = chunk.to(tl.int64) * N + rows
    tl.store(max_ptr + out, best, mask=inside)
    tl.store(index_ptr + out, index, mask=inside)


def plan(dtype):
    """Block sizes and options. Matrix units in 16 bits; exact fp32 runs on the others, in smaller tiles."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 16}, {"num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 32}, {"num_warps": 8, "num_stages": 4}


def padded(x, block_d):
    """x, or a copy with columns of 0 behind it: block_d then divides the columns, 16 bytes all row addresses."""
    even = x.shape[-1] % block_d == 0 and x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    if even and all(stride % 16 == 0 for stride in x.stride()[:-1]):
        return x
    return F.pad(x, (0, -x.shape[-1] % block_d)).contiguous()


def _cosine_max(e, cluster):
    sizes, options = plan(e.dtype)
    e = padded(e.detach(), sizes["BLOCK_D"])
    cluster = None if cluster is None else cluster.to(torch.int32).contiguous()
    N, D = e.shape
    blocks, all_tiles = -(-N // sizes["BLOCK_M"]), -(-N // sizes["BLOCK_N"])
    tiles = max(8, -(-all_tiles // 64))                      # of a program: enough programs, and a small buffer
    chunks = -(-all_tiles // tiles)
    m = torch.empty((chunks, N), dtype=torch.float32, device=e.device)
    index = torch.empty((chunks, N), dtype=torch.int32, device=e.device)
    launch(_cosine_max_kernel, blocks * chunks, e, cluster, m, index, e.stride(0), N, D, blocks, tiles,
           WIDE=INTERPRET and e.dtype == torch.bfloat16, **sizes, **options)
    m, chunk = m.max(dim=0)                                  # a tie gives the first chunk, the lowest index
    index = index.gather(0, chunk[None])[0].long()                                        # (N,)
    return m.masked_fill(index < 0, -1), index


# ------------------------------------------------------------------ public function
def cosine_max(e, cluster=None, *, impl="auto"):
    """(m fp32, index int64), both (N,), of e (N, D): the largest e_i . e_j with i < j of the same cluster (N,).

    impl: "auto" (kernel on CUDA, else reference), "triton", "ref". fp64: reference, fp64 m.
    Raises ValueError for wrong shapes, dtypes or devices and for N >= 2**31 - 128.
    """
    check(e.ndim == 2 and e.shape[1] >= 1, f"e must be (N, D) with D >= 1, got shape {tuple(e.shape)}")
    check(e.is_floating_point(), f"e must be floating point, got {e.dtype}")
    check(len(e) < 2 ** 31 - 128, f"N must be below 2**31 - 128, got {len(e)}")
    if cluster is not None:
        check(cluster.shape == e.shape[:1], f"cluster must be ({len(e)},), got {tuple(cluster.shape)}")
        check(cluster.dtype in INTEGERS, f"cluster must hold integers, got {cluster.dtype}")
        check(cluster.device == e.device, f"cluster is on {cluster.device}, e is on {e.device}")
    if not use_triton(impl, e) or len(e) == 0:
        return cosine_max_ref(e, cluster)
    return _cosine_max(e, cluster)


# ------------------------------------------------------------------ the rule, compile cases and benchmark
def rule(name, out, ref64, eager, n_reduce):
    """assert_kernel for m; of 1000 indices one may differ, where two rows are equally near up to rounding."""
    if out.is_floating_point():
        return assert_kernel(name, out, ref64, eager, n_reduce)
    assert out.shape == ref64.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref64.shape)}"
    count, allowed = int((out != ref64).sum()), out.numel() // 1000
    assert count <= allowed, f"{name}: {count} of {out.numel()} differ, allowed {allowed}"


MATMUL = "bf16"                                                                # the unit whose peak counts
# (clusters, N, D) and dtype
CHECK_SHAPES = [(1, 1000, 384, torch.float32), (5, 3000, 384, torch.float32), (1, 5000, 384, torch.float16),
                (5, 16001, 383, torch.bfloat16), (1, 20000, 768, torch.bfloat16)]
BENCH_SHAPES = [(1, 16384, 384, torch.float16), (1, 65536, 384, torch.float16), (5, 65536, 384, torch.bfloat16),
                (1, 16384, 384, torch.float32)]


def floor(C, N, D, itemsize):
    """{mode: (bytes, FLOPs)} that any implementation needs."""
    return {"forward": (N * (D * itemsize + 12 + (4 if C > 1 else 0)), N * N * D // C)}


def _aot_case(dtype, N, D, **cluster):
    sizes, options = plan(torch.float32 if dtype == "fp32" else torch.float16)
    arguments = {"e_ptr": f"*{dtype}", "max_ptr": "*fp32", "index_ptr": "*i32", "stride_e": D, "N": N, "D": D,
                 "blocks": "i32", "tiles": 8}
    constants = {} if cluster else {"cluster_ptr": None}
    return aot_case(_cosine_max_kernel, "forward", dtype, (N, D), arguments | cluster, options, WIDE=False,
                    **sizes, **constants)


AOT_CASES = [_aot_case("fp32", 16384, 384), _aot_case("fp32", 16384, 384, cluster_ptr="*i32"),
             _aot_case("fp16", 65536, 384), _aot_case("bf16", 65536, 384, cluster_ptr="*i32")]


def example(C, N, D, dtype, device):
    """Arguments (e, cluster) for checks and benchmarks: rows around shared centres, grouped by cluster."""
    gen = torch.Generator().manual_seed(0)
    centres = torch.randn(N // 8 + 1, D, generator=gen)
    e = centres[torch.randint(len(centres), (N,), generator=gen)] + 0.7 * torch.randn(N, D, generator=gen)
    cluster = None if C == 1 else (torch.arange(N) * C // max(N, 1)).to(device)
    return (e / e.norm(dim=1, keepdim=True)).to(device=device, dtype=dtype), cluster


def outputs(fn, args):
    """{name: tensor} to compare between implementations."""
    return dict(zip(("max", "index"), fn(*args)))


def kernel(*args):
    return cosine_max(*args, impl="triton")


reference = cosine_max_ref


def bench(args):
    """{mode: {provider: thunk}}. The blocks of eager and torch.compile are of 8192 rows, in the type of e: faster
    than the reference and, in 16 bits, less exact than the kernel. "dense": the official N x N, without clusters."""
    e, cluster = args
    step = torch.compile(tile_max)
    return {"forward": {"kernel": lambda: kernel(*args), "eager": lambda: blocked(e, cluster, 8192),
                        "torch.compile": lambda: blocked(e, cluster, 8192, step),
                        "dense": lambda: (e @ e.T).triu(1).max(dim=0)}}
