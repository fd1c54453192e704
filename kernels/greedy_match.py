# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Greedy matching of the tokens of many pairs of texts, as BERTScore does it (reviseval.py, section 7).

    row[p, i] = max over j of a[p, i] . b[p, j]      col[p, j] = max over i of a[p, i] . b[p, j]     unmasked i and j

Shapes: a (B, M, D), b (B, N, D) fp32/fp16/bf16; a_mask (B, M), b_mask (B, N) bool, True for tokens that count.
Returns row (B, M) and col (B, N), fp32: recall and precision are their means over the unmasked tokens. No gradient.
Tokens are multiplied as they are: norm them before, for cosines. Norming inside would cost the square sums of a tile
in each of the programs that read it.

A masked token, and a token whose partners are all masked, has 0. What masked tokens hold is never looked at, NaN
neither. An unmasked token that holds NaN makes its own maximum NaN and that of all its partners.

The (B, M, N) similarities are never there. A program owns one tile of one pair; its row maxima go to a buffer
(B, tiles of N, M), its column maxima to one (B, tiles of M, N), and PyTorch reduces both: no atomics, and no program
reads what another writes. Tiles without an unmasked pair, padding for the most part, are not multiplied.

Error: sums in fp32 of exact products (16 bits) or rounded ones (fp32, never tf32): at most D 2**-24 sum_k |a_k b_k|.

Floor, b bytes an element: B (M + N) (D b + 5) bytes, 2 B M N D FLOPs. In PyTorch the similarities are written once
and read three times, for the mask and the two maxima: 4 B M N b bytes more.
"""
import torch

from kernels._common import INTERPRET, aot_case, check, launch, tl, triton, use_triton
from kernels.cosine_max import dot_rows, padded


# ------------------------------------------------------------------ reference
def greedy_match_ref(a, b, a_mask, b_mask):
    """Plain PyTorch, in fp32 (fp64 for fp64 tokens); the CPU path."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return unfused(a.detach().to(dtype), b.detach().to(dtype), a_mask, b_mask)


def unfused(a, b, a_mask, b_mask):
    """Both maxima in the type of a and b."""
    pair = a_mask[:, :, None] & b_mask[:, None]                                           # (B, M, N)
    s = (a @ b.mT).masked_fill(~pair, -float("inf"))
    return tuple(x.masked_fill(x == -float("inf"), 0) for x in (s.amax(2), s.amax(1)))    # (B, M), (B, N)


# ------------------------------------------------------------------ kernel
@triton.jit
def _greedy_match_kernel(a_ptr, b_ptr, a_mask_ptr, b_mask_ptr, row_ptr, col_ptr, stride_ap, stride_am, stride_bp,
                         stride_bn, M, N, D, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                         BLOCK_D: tl.constexpr):
    """One program: a (BLOCK_M, BLOCK_N) tile of one pair, its maxima along either side; +inf stands for NaN.

    Neighbouring programs share the pair, which they find in the L2."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pair = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m % tiles_n
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)                                       # (BLOCK_M,)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)                                       # (BLOCK_N,)
    live_a = tl.load(a_mask_ptr + (pair * M + rows), mask=rows < M, other=0).to(tl.int32)
    live_b = tl.load(b_mask_ptr + (pair * N + cols), mask=cols < N, other=0).to(tl.int32)
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    col_max = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    if (tl.max(live_a, axis=0) > 0) & (tl.max(live_b, axis=0) > 0):
        s = dot_rows(a_ptr + pair * stride_ap, tl.minimum(rows, M - 1), stride_am,
                     b_ptr + pair * stride_bp, tl.minimum(cols, N - 1), stride_bn, D,
                     WIDE, BLOCK_M, BLOCK_N, BLOCK_D)                                     # (BLOCK_M, BLOCK_N)
        s = tl.where(s == s, s, float("inf"))                # a maximum would pass over NaN
        s = tl.where(live_a[:, None] > 0, s, -float("inf"))
        s = tl.where(live_b[None, :] > 0, s, -float("inf"))
        row_max, col_max = tl.max(s, axis=1), tl.max(s, axis=0)
    tl.store(row_ptr + ((pair * tiles_n + tile_n) * M + rows), row_max, mask=rows < M)
    tl.store(col_ptr + ((pair * tiles_m + tile_m) * N + cols), col_max, mask=cols < N)


def plan(B, M, N, dtype):
    """Block sizes and options: large tiles where they give a program to each of 132 processors. Matrix units in
    16 bits; exact fp32 runs on the others."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 16}, {"num_warps": 4, "num_stages": 3}
    if min(M, N) > 128 and B * -(-M // 128) * -(-N // 256) >= 132:
        return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_D": 32}, {"num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64}, {"num_warps": 4, "num_stages": 3}


def _greedy_match(a, b, a_mask, b_mask):
    (B, M, _), N = a.shape, b.shape[1]
    sizes, options = plan(B, M, N, a.dtype)
    a, b = padded(a.detach(), sizes["BLOCK_D"]), padded(b.detach(), sizes["BLOCK_D"])
    masks = [mask.contiguous().view(torch.uint8) for mask in (a_mask, b_mask)]
    tiles_m, tiles_n = -(-M // sizes["BLOCK_M"]), -(-N // sizes["BLOCK_N"])
    row = torch.empty((B, tiles_n, M), dtype=torch.float32, device=a.device)
    col = torch.empty((B, tiles_m, N), dtype=torch.float32, device=a.device)
    launch(_greedy_match_kernel, B * tiles_m * tiles_n, a, b, *masks, row, col, *a.stride()[:2], *b.stride()[:2],
           M, N, a.shape[2], WIDE=INTERPRET and a.dtype == torch.bfloat16, **sizes, **options)
    maxima = row.amax(1), col.amax(1)                                                     # (B, M), (B, N)
    return tuple(x.masked_fill(x == -float("inf"), 0).masked_fill(x == float("inf"), float("nan")) for x in maxima)


# ------------------------------------------------------------------ public function
def greedy_match(a, b, a_mask, b_mask, *, impl="auto"):
    """Row maxima (B, M) and column maxima (B, N), fp32, of a b^T among the unmasked tokens of each pair.

    impl: "auto" (kernel on CUDA, else reference), "triton", "ref". fp64: reference, fp64 result.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    check(a.ndim == 3 and a.shape[2] >= 1, f"a must be (B, M, D) with D >= 1, got shape {tuple(a.shape)}")
    check(b.ndim == 3 and b.shape[::2] == a.shape[::2], f"b must be ({len(a)}, N, {a.shape[2]}), got {tuple(b.shape)}")
    check(a.is_floating_point() and a.dtype == b.dtype, f"a and b must be of one float type, got {a.dtype}, {b.dtype}")
    for name, x, mask in (("a", a, a_mask), ("b", b, b_mask)):
        check(mask.shape == x.shape[:2] and mask.dtype == torch.bool,
              f"{name}_mask must be bool {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
    check(all(x.device == a.device for x in (b, a_mask, b_mask)), "all arguments must be on one device")
    fused = use_triton(impl, a)
    if a.numel() == 0 or b.numel() == 0:
        dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
        return tuple(torch.zeros(x.shape[:2], dtype=dtype, device=a.device) for x in (a, b))
    return (_greedy_match if fused else greedy_match_ref)(a, b, a_mask, b_mask)


# ------------------------------------------------------------------ compile cases and benchmark
MATMUL = "bf16"                                                                # the unit whose peak counts
# (B, M, N, D) and dtype
CHECK_SHAPES = [(5, 70, 33, 96, torch.float32), (64, 128, 128, 576, torch.float16),
                (40, 300, 260, 1024, torch.bfloat16), (70, 129, 200, 383, torch.float16)]
BENCH_SHAPES = [(256, 512, 512, 1024, torch.float16), (256, 512, 512, 1024, torch.bfloat16),
                (64, 128, 128, 576, torch.float16), (64, 128, 128, 576, torch.float32),
                (256, 512, 512, 1024, torch.float32)]


def floor(B, M, N, D, itemsize):
    """{mode: (bytes, FLOPs)} that any implementation needs where no token is masked."""
    return {"forward": (B * (M + N) * (D * itemsize + 5), 2 * B * M * N * D)}


def _aot_case(dtype, B, M, N, D):
    sizes, options = plan(B, M, N, torch.float32 if dtype == "fp32" else torch.float16)
    arguments = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "a_mask_ptr": "*u8", "b_mask_ptr": "*u8",
                 "row_ptr": "*fp32", "col_ptr": "*fp32", "stride_ap": M * D, "stride_am": D, "stride_bp": N * D,
                 "stride_bn": D, "M": M, "N": N, "D": D}
    return aot_case(_greedy_match_kernel, "forward", dtype, (M, N, D), arguments, options, WIDE=False, **sizes)


AOT_CASES = [_aot_case("fp32", 64, 128, 128, 576), _aot_case("fp16", 64, 128, 128, 576),
             _aot_case("bf16", 256, 512, 512, 1024), _aot_case("fp16", 256, 77, 129, 384)]


def example(B, M, N, D, dtype, device):
    """Arguments (a, b, a_mask, b_mask) for checks and benchmarks: unit tokens, of which the last ones are masked in
    every second pair. Drawn on the device: a CPU needs seconds for the large ones."""
    gen = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(B, n, D, generator=gen, device=device) for n in (M, N))
    b += 2 * a[:, torch.randint(M, (N,), generator=gen, device=device)]       # each token of b is near one of a
    a, b = ((x / x.norm(dim=2, keepdim=True)).to(dtype) for x in (a, b))
    cut = torch.rand(B, 1, generator=gen, device=device) / 4 * (torch.arange(B, device=device)[:, None] % 2)
    masks = [torch.arange(n, device=device) < n - cut * n for n in (M, N)]                # (B, M), (B, N)
    return a, b, *masks


def outputs(fn, args):
    """{name: tensor} to compare between implementations."""
    return dict(zip(("row", "col"), fn(*args)))


def kernel(*args):
    return greedy_match(*args, impl="triton")


reference = greedy_match_ref


def bench(args):
    """{mode: {provider: thunk}}; eager and torch.compile in the type of a: faster than the reference and, in
    16 bits, less exact than the kernel."""
    fns = {"kernel": kernel, "eager": unfused, "torch.compile": torch.compile(unfused)}
    return {"forward": {name: lambda fn=fn: fn(*args) for name, fn in fns.items()}}
