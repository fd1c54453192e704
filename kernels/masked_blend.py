# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Every masked copy of every sample of a game (Jiang et al. 2024, arXiv 2410.08455, Sec. 2), and its backward.

    out[s, m, p, :] = x[s, p, :] if bit p of masks[m] else b[p, :]
    dx[s, p, :] = sum of dout[s, m, p, :] over the m with bit p;  db[p, :] = sum over s and the m without it

Shapes: x (S, P, D), S samples of P players of D numbers each (a patch, a token's embedding); baseline b (P, D);
masks (M,) int64, bit p for player p < P <= 63, higher bits ignored; out (S, M, P, D). fp32, fp16, bf16.
The forward copies: out is bit for bit x or b. The backward adds up in fp32, in an order that the shape alone fixes:
parts of 256 masks by the kernel, the parts (and the samples, for db) by PyTorch. No atomics.

Floor, b bytes an element: forward (S M + S + 1) P D b + 8 M bytes, which is nearly all writing, no FLOPs; backward
the same bytes, now reading, and S M P D FLOPs. There is no (M, P) table of bools and no expanded copy. torch.where
writes out in one pass, too, but keeps the table; its backward makes two tensors of the size of out.
"""
import torch

from kernels._common import DTYPES, aot_case, check, launch, tl, triton, use_triton

MASKS_FWD, MASKS_BWD, ROWS_BWD = 32, 256, 4                   # masks a program, and of those at once


# ------------------------------------------------------------------ reference
def masked_blend_ref(x, b, masks):
    """Plain PyTorch, in the type of x; the CPU path."""
    players = torch.arange(x.shape[1], device=x.device)
    keep = (masks[:, None] >> players & 1).bool()                                         # (M, P)
    return torch.where(keep[:, :, None], x[:, None], b)                                   # (S, M, P, D)


# ------------------------------------------------------------------ kernels
@triton.jit
def _tile(M, D, PD, MASKS: tl.constexpr, BLOCK: tl.constexpr):
    """What a program owns: sample s, masks [first, end), columns (BLOCK,) of the P D, and their players' bits."""
    blocks, slices = tl.cdiv(PD, BLOCK), tl.cdiv(M, MASKS)
    pid = tl.program_id(0)
    s = (pid // blocks // slices).to(tl.int64)
    first = pid // blocks % slices * MASKS
    cols = pid % blocks * BLOCK + tl.arange(0, BLOCK)                                     # (BLOCK,)
    bits = tl.full((BLOCK,), 1, tl.int64) << (cols // D).to(tl.int64)
    return s, first, tl.minimum(first + MASKS, M), cols, bits


@triton.jit
def _masked_blend_fwd_kernel(x_ptr, b_ptr, masks_ptr, out_ptr, M, D, PD, MASKS: tl.constexpr,
                             BLOCK: tl.constexpr):
    """One program: BLOCK columns of x[s] and b, kept in registers, and MASKS blends of them, written."""
    s, first, end, cols, bits = _tile(M, D, PD, MASKS, BLOCK)
    inside = cols < PD
    x = tl.load(x_ptr + (s * PD + cols), mask=inside, other=0.0)
    b = tl.load(b_ptr + cols.to(tl.int64), mask=inside, other=0.0)
    for m in range(first, end):
        keep = (tl.load(masks_ptr + tl.cast(m, tl.int64)) & bits) != 0                    # (BLOCK,)
        tl.store(out_ptr + ((s * M + m) * PD + cols), tl.where(keep, x, b), mask=inside)


@triton.jit
def _masked_blend_bwd_kernel(dout_ptr, masks_ptr, dx_ptr, db_ptr, M, D, PD, MASKS: tl.constexpr,
                             ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK columns of dout[s], MASKS masks, ROWS at once; writes their sums, a part of dx and of db."""
    s, first, end, cols, bits = _tile(M, D, PD, MASKS, BLOCK)
    inside = cols < PD
    dx = tl.zeros((BLOCK,), tl.float32)
    db = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, ROWS):
        m = (start + tl.arange(0, ROWS)).to(tl.int64)                                     # (ROWS,)
        masks = tl.load(masks_ptr + m, mask=m < end, other=0)
        keep = (masks[:, None] & bits[None, :]) != 0                                      # (ROWS, BLOCK)
        dout = tl.load(dout_ptr + ((s * M + m)[:, None] * PD + cols[None, :]),
                       mask=(m < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        dx += tl.sum(tl.where(keep, dout, 0.0), axis=0)
        db += tl.sum(tl.where(keep, 0.0, dout), axis=0)
    part = s * tl.cdiv(M, MASKS) + first // MASKS
    tl.store(dx_ptr + (part * PD + cols), dx, mask=inside)
    tl.store(db_ptr + (part * PD + cols), db, mask=inside)


def columns(PD, itemsize):
    """BLOCK: 16 bytes for each of 128 threads, or less for short rows."""
    return min(2048 // itemsize, 1 << (PD - 1).bit_length())


# ------------------------------------------------------------------ autograd
class _MaskedBlend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b, masks):
        (S, P, D), M = x.shape, len(masks)
        x, b, masks = x.contiguous(), b.contiguous(), masks.contiguous()
        out, block = torch.empty((S, M, P, D), dtype=x.dtype, device=x.device), columns(P * D, x.element_size())
        launch(_masked_blend_fwd_kernel, S * -(-M // MASKS_FWD) * -(-P * D // block), x, b, masks, out, M, D, P * D,
               MASKS=MASKS_FWD, BLOCK=block, num_warps=4)
        ctx.save_for_backward(masks)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        (S, M, P, D), (masks,) = dout.shape, ctx.saved_tensors
        slices, block = -(-M // MASKS_BWD), columns(P * D, dout.element_size())
        dx, db = (torch.empty((S, slices, P, D), dtype=torch.float32, device=dout.device) for _ in range(2))
        launch(_masked_blend_bwd_kernel, S * slices * -(-P * D // block), dout.contiguous(), masks, dx, db, M, D,
               P * D, MASKS=MASKS_BWD, ROWS=ROWS_BWD, BLOCK=block, num_warps=4)
        return dx.sum(1).to(dout.dtype), db.sum((0, 1)).to(dout.dtype), None


# ------------------------------------------------------------------ public function
def masked_blend(x, b, masks, *, impl="auto"):
    """out (S, M, P, D): x[s, p] where bit p of masks[m] is set, else b[p]; x (S, P, D), b (P, D), masks (M,) int64.

    impl: "auto" (kernel on CUDA, else reference), "triton", "ref". Gradients to x and b.
    Raises ValueError for wrong shapes, dtypes or devices and for P > 63.
    """
    check(x.ndim == 3, f"x must be (S, P, D), got {tuple(x.shape)}")
    P, D = x.shape[1:]
    check(b.shape == (P, D), f"b must be ({P}, {D}), got {tuple(b.shape)}")
    check(masks.ndim == 1 and masks.dtype == torch.int64, f"masks must be (M,) int64, got {masks.dtype}")
    check(P <= 63 and P * D < 2 ** 31 - 2048, f"at most 63 players and 2^31 columns, got {P} x {D}")
    check(x.dtype in DTYPES + (torch.float64,) and b.dtype == x.dtype, f"x is {x.dtype}, b {b.dtype}")
    check(x.device == b.device == masks.device, "x, b and masks must be on one device")
    if not use_triton(impl, x) or x.numel() * len(masks) == 0:
        return masked_blend_ref(x, b, masks)
    return _MaskedBlend.apply(x, b, masks)


# ------------------------------------------------------------------ compile cases and benchmark
# (S, M, P, D) and dtype: an image of 224 x 224 in 12 patches, a sentence of 10 tokens
CHECK_SHAPES = [(3, 300, 9, 37, torch.float32), (2, 600, 63, 5, torch.float16), (2, 1024, 12, 768, torch.bfloat16)]
BENCH_SHAPES = [(8, 1024, 12, 12544, torch.bfloat16), (8, 1024, 12, 12544, torch.float32),
                (100, 1024, 10, 768, torch.bfloat16)]


def floor(S, M, P, D, itemsize):
    """{mode: (bytes, FLOPs)} that any implementation needs."""
    moved = (S * M + S + 1) * P * D * itemsize + 8 * M
    return {"forward": (moved, 0), "backward": (moved, S * M * P * D)}


def _aot_cases(dtype, M, P, D):
    block = columns(P * D, 4 if dtype == "fp32" else 2)
    ints, masks = {"M": M, "D": D, "PD": P * D}, {"masks_ptr": "*i64"}
    forward = dict.fromkeys(("x_ptr", "b_ptr", "out_ptr"), f"*{dtype}") | masks | ints
    backward = {"dout_ptr": f"*{dtype}", "dx_ptr": "*fp32", "db_ptr": "*fp32"} | masks | ints
    return [aot_case(_masked_blend_fwd_kernel, "forward", dtype, (M, P, D), forward, {"num_warps": 4},
                     MASKS=MASKS_FWD, BLOCK=block),
            aot_case(_masked_blend_bwd_kernel, "backward", dtype, (M, P, D), backward, {"num_warps": 4},
                     MASKS=MASKS_BWD, ROWS=ROWS_BWD, BLOCK=block)]


AOT_CASES = [case for shape in (("fp32", 1024, 12, 12544), ("fp32", 256, 8, 1), ("fp16", 1000, 9, 37),
                                ("bf16", 1024, 10, 768)) for case in _aot_cases(*shape)]


def example(S, M, P, D, dtype, device):
    """Arguments (x, b, masks) for checks and benchmarks."""
    gen = torch.Generator().manual_seed(0)
    x, b = (torch.randn(shape, generator=gen).to(device=device, dtype=dtype) for shape in ((S, P, D), (P, D)))
    return x, b, torch.randint(min(2 ** P, 2 ** 63 - 1), (M,), generator=gen).to(device)


def outputs(fn, args):
    """{name: tensor} to compare between implementations."""
    x, b = (a.detach().requires_grad_() for a in args[:2])
    out = fn(x, b, args[2])
    dout = torch.randint(-4, 5, out.shape, generator=torch.Generator().manual_seed(1)) / 4
    return {"out": out.detach()} | dict(zip(("dx", "db"), torch.autograd.grad(out, (x, b), dout.to(out))))


def kernel(*args):
    return masked_blend(*args, impl="triton")


reference = masked_blend_ref


def bench(args):
    """{mode: {provider: thunk}}; a backward thunk repeats one graph's backward, to x and b."""
    fns = {"kernel": kernel, "eager": reference, "torch.compile": torch.compile(reference)}
    forward = {name: torch.no_grad()(lambda fn=fn: fn(*args)) for name, fn in fns.items()}
    x, b, masks = args[0].requires_grad_(), args[1].requires_grad_(), args[2]
    graphs = {name: fn(x, b, masks) for name, fn in fns.items()}
    dout = torch.ones_like(graphs["kernel"])
    backward = {name: lambda out=out: torch.autograd.grad(out, (x, b), dout, retain_graph=True)
                for name, out in graphs.items()}
    return {"forward": forward, "backward": backward}
