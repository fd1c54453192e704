# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Fast Moebius transform over subsets: Harsanyi dividends of a game (Jiang et al. 2024, arXiv 2410.08455, Sec. 2).

    I(S) = sum_{L subset of S} (-1)^(|S| - |L|) v(L)          forward
    v(S) = sum_{L subset of S} I(L)                           inverse (zeta)
    transpose: the transposed map, sums over supersets L of S, so <M v, w> = <v, M' w>

Shapes: v (..., 2^n), bit i of the last index says whether player i is in S; the result is alike. fp32 and fp64;
the reference takes int32 and int64 as well, where it is exact. n = 0 changes nothing. In n stages:
    stage i, for every pair (S without i, S with i):   v(S with i) -= v(S without i)
inverse adds; transpose changes the other member of the pair and goes from the highest bit to the lowest. So every
element is rounded in the order in which autograd of the reference rounds, and kernel and reference are equal bit
for bit. Error: |err(S)| <= n eps sum_{L subset of S} |v(L)| to first order, whatever |I(S)|: noise of standard
deviation sigma in v is one of 2^(|S| / 2) sigma in I(S), which is why 16-bit values are refused.

One launch up to n = 13 (fp32: 14). A program holds whole rows in registers, 32 elements a thread; the partner of
an element is in the same thread, in another one (a shuffle), or from n = 11 on in another warp (shared memory).
Above, n <= 16: one launch for the bits below 10, one for the others, the second in place. Each of its elements is
read and then written by the one program that owns it, the value written depends on the value read, and nothing is
read again: no program and no thread can see the store of another one.

Floor: 2 R 2^n b bytes for R rows of b bytes an element (two launches: twice that, where the L2 cache is too small),
n R 2^(n - 1) FLOPs. In PyTorch: n passes over 1.5 rows, and one copy; as a matrix product 2 R 4^n FLOPs.
"""
import torch

from kernels._common import aot_case, assert_kernel, check, launch, tl, triton, use_triton

FLOATS = (torch.float32, torch.float64)                       # what the kernel takes
MAX_N = 16


# ------------------------------------------------------------------ reference
def moebius_ref(v, inverse=False, transpose=False):
    """Plain PyTorch, in the type of v; the CPU path."""
    n = v.shape[-1].bit_length() - 1
    out = v.clone(memory_format=torch.contiguous_format)                                  # (..., 2^n)
    for i in reversed(range(n)) if transpose else range(n):
        pairs = out.view(-1, 2, 1 << i)                       # (R 2^(n-1-i), 2: without player i and with, 2^i)
        changed, other = (pairs[:, 0], pairs[:, 1]) if transpose else (pairs[:, 1], pairs[:, 0])
        changed.add_(other) if inverse else changed.sub_(other)
    return out


# ------------------------------------------------------------------ kernel
@triton.jit
def _stage(x, BIT: tl.constexpr, TILE: tl.constexpr, INVERSE: tl.constexpr, TRANSPOSE: tl.constexpr):
    """changed -+= other for all pairs of elements whose indices differ in BIT; x (any shape of TILE elements)."""
    x = tl.reshape(x, (TILE // (2 << BIT), 2, 1 << BIT))
    changed = tl.arange(0, 2)[None, :, None] == (0 if TRANSPOSE else 1)                   # (1, 2, 1)
    terms = x if INVERSE else tl.where(changed, x, -x)
    return tl.where(changed, tl.sum(terms, axis=1, keep_dims=True), x)        # the sum of two: rounded once


@triton.jit
def _moebius_kernel(v_ptr, out_ptr, inner, total, BITS: tl.constexpr, LOW: tl.constexpr, TILE: tl.constexpr,
                    INVERSE: tl.constexpr, TRANSPOSE: tl.constexpr):
    """The middle axis of (total / (2^BITS inner), 2^BITS, inner), total elements in all, is transformed.

    One program: TILE = G 2^BITS 2^LOW elements, G groups of 2^LOW neighbours along the last axis (inner = 1: LOW = 0).
    In the tile's own index the transformed bits are LOW ... LOW + BITS - 1. Reads and writes TILE elements.
    """
    C: tl.constexpr = 1 << LOW
    pid, side = tl.program_id(0).to(tl.int64), inner // C     # side: tiles beside each other
    j = tl.arange(0, TILE)
    offsets = pid // side * (TILE // C * inner) + pid % side * C + (j // C * inner + j % C)   # (TILE,)
    x = tl.load(v_ptr + offsets, mask=offsets < total, other=0.0)
    for stage in tl.static_range(BITS):
        x = _stage(x, LOW + (BITS - 1 - stage if TRANSPOSE else stage), TILE, INVERSE, TRANSPOSE)
    tl.store(out_ptr + offsets, tl.reshape(x, (TILE,)), mask=offsets < total)


def plan(n, itemsize):
    """[(BITS, LOW, TILE, inner, warps)], a launch each; tiles of 1024 elements a warp, 64 KB at most."""
    if n <= (13 if itemsize == 8 else 14):
        tile = max(1024, 1 << n)
        return [(n, 0, tile, 1, tile // 1024)]
    return [(10, 0, 1024, 1, 1), (n - 10, 20 - n, 1024, 1024, 1)]             # above: 2^(20-n) >= 16 columns


def _moebius(v, inverse, transpose):
    source, out = v.contiguous(), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    steps = plan(v.shape[-1].bit_length() - 1, v.element_size())
    for bits, low, tile, inner, warps in reversed(steps) if transpose else steps:
        launch(_moebius_kernel, -(-v.numel() // tile), source, out, inner, v.numel(), BITS=bits, LOW=low, TILE=tile,
               INVERSE=inverse, TRANSPOSE=transpose, num_warps=warps)
        source = out                                          # a second launch works in place
    return out


# ------------------------------------------------------------------ autograd
class _Moebius(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, inverse, transpose):
        ctx.inverse, ctx.transpose = inverse, transpose
        return _moebius(v, inverse, transpose)

    @staticmethod
    def backward(ctx, dout):                                  # linear: differentiable any number of times
        return _Moebius.apply(dout, ctx.inverse, not ctx.transpose), None, None


# ------------------------------------------------------------------ public function
def moebius(v, inverse=False, transpose=False, *, impl="auto"):
    """Dividends I (..., 2^n) of a game v (..., 2^n), or v of I (inverse), or either map transposed.

    impl: "auto" (kernel on CUDA up to n = 16, else reference), "triton", "ref". Gradient: the transposed map.
    Raises ValueError for a length that is no power of two and types other than fp32, fp64, int32, int64.
    """
    check(v.ndim >= 1, "v must be (..., 2^n), got a scalar")
    N = v.shape[-1]
    check(N >= 1 and N & (N - 1) == 0, f"v must be (..., 2^n), got shape {tuple(v.shape)}")
    check(v.dtype in FLOATS + (torch.int32, torch.int64), f"v must be fp32, fp64, int32 or int64, got {v.dtype}")
    fits = N <= 1 << MAX_N
    if not use_triton(impl, v, FLOATS) or v.numel() == 0 or impl == "auto" and not fits:
        return moebius_ref(v, inverse, transpose)
    check(fits, f"the kernel takes at most 2^{MAX_N} columns, got {N}")
    return _Moebius.apply(v, bool(inverse), bool(transpose))


def rule(name, out, ref64, eager, n_reduce):
    """Bit for bit what plain PyTorch gives in the same type; fp32 within assert_kernel of fp64 as well."""
    assert out.dtype == eager.dtype and torch.equal(out, eager), f"{name}: differs from PyTorch in {out.dtype}"
    if out.dtype == torch.float32:
        assert_kernel(name, out, ref64, eager, n_reduce)


# ------------------------------------------------------------------ compile cases and benchmark
# (R, n) and dtype
CHECK_SHAPES = [(3600, 10, torch.float64), (77, 3, torch.float32), (33, 13, torch.float64), (9, 14, torch.float32),
                (5, 14, torch.float64), (5, 16, torch.float32)]
BENCH_SHAPES = [(3600, 10, torch.float64), (1000, 12, torch.float64), (1000, 12, torch.float32),
                (64, 16, torch.float64)]


def floor(R, n, itemsize):
    """{mode: (bytes, FLOPs)} that any implementation needs."""
    return {"forward": (2 * R * 2 ** n * itemsize, R * n * 2 ** n // 2)}


def _aot_cases(dtype, n, inverse, transpose):
    return [aot_case(_moebius_kernel, "forward", dtype, (n,),
                     {"v_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "inner": inner, "total": 1000 * 2 ** n},
                     {"num_warps": warps}, BITS=bits, LOW=low, TILE=tile, INVERSE=inverse, TRANSPOSE=transpose)
            for bits, low, tile, inner, warps in plan(n, 8 if dtype == "fp64" else 4)]


AOT_CASES = [case for setting in (("fp64", 3, False, False), ("fp64", 10, False, True), ("fp32", 12, False, False),
                                  ("fp64", 12, True, True), ("fp64", 13, False, False), ("fp32", 14, True, False),
                                  ("fp64", 14, False, False), ("fp64", 16, False, True), ("fp32", 16, True, False))
             for case in _aot_cases(*setting)]


def example(R, n, dtype, device):
    """Arguments (v,) for checks and benchmarks."""
    gen = torch.Generator().manual_seed(0)
    return torch.randn(R, 2 ** n, generator=gen, dtype=torch.float64).to(device=device, dtype=dtype),


def outputs(fn, args):
    """{name: tensor} to compare between implementations: all four maps, and the gradient of one."""
    v, = args
    maps = {f"inverse={i} transpose={t}": fn(v, i, t) for i in (False, True) for t in (False, True)}
    leaf = v.detach().requires_grad_()
    return maps | {"dv": torch.autograd.grad(fn(leaf), leaf, v.flip(-1))[0]}


def kernel(*args):
    return moebius(*args, impl="triton")


reference = moebius_ref


def dense(n, dtype, device):
    """The 2^n x 2^n matrix of the forward transform, transposed: v @ dense(...) = moebius(v)."""
    return moebius_ref(torch.eye(2 ** n, dtype=dtype, device=device))


def out_of_place(v):
    """The forward transform for torch.compile, which takes much longer over slices changed in place."""
    out = v
    for i in range(v.shape[-1].bit_length() - 1):
        without, with_i = out.view(-1, 2, 1 << i).unbind(1)                               # 2 x (R 2^(n-1-i), 2^i)
        out = torch.stack([without, with_i - without], 1)
    return out.view(v.shape)


def bench(args):
    """{mode: {provider: thunk}}; two matmuls: by the matrices of the high and of the low bits, that of all bits
    being their Kronecker product; dense matmul: by that one, for n = 10 only."""
    v, = args
    n = v.shape[-1].bit_length() - 1
    high, low = (dense(k, v.dtype, v.device) for k in (n // 2, n - n // 2))

    def two_matmuls(v):
        return (high.T @ (v.view(-1, len(high), len(low)) @ low)).view(v.shape)

    fns = {"kernel": kernel, "eager": reference, "torch.compile": torch.compile(out_of_place),
           "two matmuls": two_matmuls}
    if n == 10:
        matrix = dense(n, v.dtype, v.device)
        fns["dense matmul"] = lambda v: v @ matrix
    return {"forward": {name: lambda fn=fn: fn(v) for name, fn in fns.items()}}
