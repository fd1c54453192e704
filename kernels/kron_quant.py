# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Kronecker transform and 4-bit quantization of activations, fused (FlatQuant: Sun et al. 2024, arXiv 2410.09426).

    y = P1^T mat(x * c) P2   = (x * c) (P1 kron P2)            mat(x): the C = n1 n2 values as n1 rows of n2
    scale_g = max(clip[g, 0] max(y, 0), clip[g, 1] |min(y, 0)|) / 7, or 1 where that is 0      one for each token
    q_g = clamp(round(y / scale_g), -8, 7)                      ties to even, true division

Shapes: x (T, C) fp32/fp16/bf16, n2 even; p1 (n1, n1), p2 (n2, n2) and c (C,) of any floating type; clip (G, 2),
the clipping factors after their sigmoid. G = 3 serves q, k and v: one transform, three thresholds.
Returns codes (G, T, C/2) uint8, packed as in int4_gemm.py, and scale (G, T) fp32. No gradient.
Rounded to the type of x, here and in the reference: p1, p2, x * c and mat(x * c) P2. All sums are fp32.
A token whose y holds NaN or an infinity (fp16 can overflow) has a NaN scale and codes 0.

Blocks are padded with zeros to powers of two. That changes nothing: the range of a token includes 0 anyway.
Where both factors and a token fit on chip, a program keeps y between the range and the codes. Where they do
not, it takes the columns of y in blocks (they need only the same columns of mat(x) P2) and sweeps twice, for
the range and then for the codes: twice the FLOPs, but no y in memory, no second kernel and no atomics.

Floor: a token reads C elements and writes G (C/2 + 4) bytes; 2 C (n1 + n2) FLOPs.
"""
import torch

from kernels._common import INTERPRET, aot_case, check, last_dim_contiguous, launch, tl, triton, use_triton
from kernels.int4_gemm import pack_in_range, unpack


# ------------------------------------------------------------------ reference
def kron_quant_ref(x, p1, p2, clip, c=None):
    """Plain PyTorch, in fp32 (fp64 for fp64 x); the CPU path."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def rounded(t):
        return t.detach().to(x.dtype).to(wide)

    clip = clip.detach().to(wide)[:, None]                                                # (G, 1, 2)
    xc = rounded(x) if c is None else rounded(x.to(wide) * c.to(wide))
    half = rounded(xc.reshape(-1, len(p1), len(p2)) @ rounded(p2))                        # (T, n1, n2)
    y = (rounded(p1).T @ half).flatten(1)                                                 # (T, C)
    high, low = y.amax(-1).clamp(min=0), y.amin(-1).clamp(max=0)
    scale = torch.maximum(clip[..., 0] * high, clip[..., 1] * -low) / 7                   # (G, T)
    scale = scale.masked_fill(scale == 0, 1) + (y * 0).sum(-1)
    codes = (y / scale[..., None]).nan_to_num(0).round().clamp(-8, 7)                     # (G, T, C)
    return pack_in_range(codes.to(torch.int8)), scale


# ------------------------------------------------------------------ kernels
@triton.jit
def _load(ptr, offsets, mask, WIDE: tl.constexpr):
    """An operand of tl.dot, 0 outside. WIDE: bf16 in the interpreter, which cannot compute in it, as fp32."""
    x = tl.load(ptr + offsets, mask=mask, other=0.0)
    return x.to(tl.float32) if WIDE else x


@triton.jit
def _round(x, dtype: tl.constexpr, WIDE: tl.constexpr):
    """fp32 to an operand of tl.dot; WIDE: to the nearest bf16, ties to even, still held in fp32."""
    if WIDE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    else:
        rounded = x.to(dtype)
    return rounded


@triton.jit
def _load_token(x_ptr, c_ptr, x_row, offsets, mask, WIDE: tl.constexpr):
    """mat(x * c) of one token or a part of it."""
    x = _load(x_ptr, x_row + offsets, mask, WIDE)
    if c_ptr is not None:
        c = tl.load(c_ptr + offsets, mask=mask, other=0.0)
        x = _round(x.to(tl.float32) * c, x_ptr.dtype.element_ty, WIDE)
    return x


@triton.jit
def _scale(clip_ptr, g: tl.constexpr, high, low, bad):
    """Scale of one group from the range of y; bad is 0, or NaN for a token that holds NaN or an infinity."""
    top = tl.load(clip_ptr + tl.full((), 2 * g, tl.int64)) * high
    bottom = tl.load(clip_ptr + tl.full((), 2 * g + 1, tl.int64)) * -low
    scale = tl.div_rn(tl.maximum(top, bottom), 7.0)
    return tl.where(scale == 0, 1.0, scale) + bad


@triton.jit
def _pack(y, scale, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) fp32 to (ROWS, COLS / 2) bytes of two codes."""
    q = tl.minimum(tl.maximum(tl.div_rn(y, scale), -8.0), 7.0)
    q = (q + 12582912.0) - 12582912.0       # 1.5 * 2**23: a sum that has no bit for a fraction; ties to even
    q = tl.where(scale == scale, q, 0.0).to(tl.int32)
    even, odd = tl.split(tl.reshape(q, (ROWS, COLS // 2, 2)))
    return ((even & 15) | ((odd & 15) << 4)).to(tl.uint8)


@triton.jit
def _kron_quant_kernel(x_ptr, p1_ptr, p2_ptr, clip_ptr, c_ptr, codes_ptr, scale_ptr, stride_x, T,
                       G: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, WIDE: tl.constexpr,
                       TOKENS: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr):
    """One program: TOKENS tokens, one after the other; both factors are read once and stay on chip."""
    one = tl.arange(0, BLOCK_1).to(tl.int64)
    two = tl.arange(0, BLOCK_2).to(tl.int64)
    byte = tl.arange(0, BLOCK_2 // 2).to(tl.int64)
    p1t = _load(p1_ptr, one[None, :] * N1 + one[:, None], (one[None, :] < N1) & (one[:, None] < N1), WIDE)
    p2 = _load(p2_ptr, two[:, None] * N2 + two[None, :], (two[:, None] < N2) & (two[None, :] < N2), WIDE)
    inside = (one[:, None] < N1) & (two[None, :] < N2)
    for i in range(TOKENS):
        token = tl.program_id(0).to(tl.int64) * TOKENS + i
        x = _load_token(x_ptr, c_ptr, token * stride_x, one[:, None] * N2 + two[None, :],
                        inside & (token < T), WIDE)                                       # (n1, n2)
        half = _round(tl.dot(x, p2, input_precision="ieee"), x_ptr.dtype.element_ty, WIDE)
        y = tl.dot(p1t, half, input_precision="ieee")                                     # (n1, n2) fp32
        high = tl.maximum(tl.max(y), 0.0)
        low = tl.minimum(tl.min(y), 0.0)
        bad = tl.sum(y * 0.0)
        for g in tl.static_range(G):
            scale = _scale(clip_ptr, g, high, low, bad)
            tl.store(scale_ptr + (g * T + token), scale, mask=token < T)
            packed = _pack(y, scale, BLOCK_1, BLOCK_2)
            offsets = (g * T + token) * (N1 * N2 // 2) + (one[:, None] * (N2 // 2) + byte[None, :])
            tl.store(codes_ptr + offsets, packed,
                     mask=(one[:, None] < N1) & (byte[None, :] < N2 // 2) & (token < T))


@triton.jit
def _kron_quant_tiled_kernel(x_ptr, p1_ptr, p2_ptr, clip_ptr, c_ptr, codes_ptr, scale_ptr, stride_x, T,
                             G: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, WIDE: tl.constexpr,
                             BLOCK_1: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
                             BLOCK_K: tl.constexpr):
    """One program: one token, y in blocks of BLOCK_I rows and BLOCK_J columns; see the top of the file.

    Rows of x and of mat(x) P2, all BLOCK_1 of them, are summed over in the second product; mat(x) P2 itself is
    summed up in steps of BLOCK_K columns of x.
    """
    token = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, BLOCK_1).to(tl.int64)
    high = tl.full((), 0.0, tl.float32)
    low = tl.full((), 0.0, tl.float32)
    bad = tl.full((), 0.0, tl.float32)
    for sweep in tl.static_range(2):
        for start_j in range(0, N2, BLOCK_J):
            j = start_j + tl.arange(0, BLOCK_J).to(tl.int64)
            half = tl.zeros((BLOCK_1, BLOCK_J), tl.float32)
            for start_k in range(0, N2, BLOCK_K):
                k = start_k + tl.arange(0, BLOCK_K).to(tl.int64)
                x = _load_token(x_ptr, c_ptr, token * stride_x, one[:, None] * N2 + k[None, :],
                                (one[:, None] < N1) & (k[None, :] < N2), WIDE)
                p2 = _load(p2_ptr, k[:, None] * N2 + j[None, :], (k[:, None] < N2) & (j[None, :] < N2), WIDE)
                half = tl.dot(x, p2, half, input_precision="ieee")
            half = _round(half, x_ptr.dtype.element_ty, WIDE)                             # (n1, BLOCK_J)
            for start_i in range(0, N1, BLOCK_I):
                i = start_i + tl.arange(0, BLOCK_I).to(tl.int64)
                p1t = _load(p1_ptr, one[None, :] * N1 + i[:, None], (one[None, :] < N1) & (i[:, None] < N1), WIDE)
                y = tl.dot(p1t, half, input_precision="ieee")                             # (BLOCK_I, BLOCK_J)
                if sweep == 0:
                    high = tl.maximum(tl.max(y), high)
                    low = tl.minimum(tl.min(y), low)
                    bad += tl.sum(y * 0.0)
                else:
                    byte = start_j // 2 + tl.arange(0, BLOCK_J // 2).to(tl.int64)
                    inside = (i[:, None] < N1) & (byte[None, :] < N2 // 2)
                    for g in tl.static_range(G):
                        packed = _pack(y, _scale(clip_ptr, g, high, low, bad), BLOCK_I, BLOCK_J)
                        offsets = (g * T + token) * (N1 * N2 // 2) + (i[:, None] * (N2 // 2) + byte[None, :])
                        tl.store(codes_ptr + offsets, packed, mask=inside)
    for g in tl.static_range(G):
        tl.store(scale_ptr + (g * T + token), _scale(clip_ptr, g, high, low, bad))


# ------------------------------------------------------------------ launch
def on_chip(device):
    """Bytes of shared memory that a program may take; 64 KiB where torch does not say (AMD)."""
    if device.type != "cuda":
        return 2 ** 17                                                         # the interpreter has no limit
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 2 ** 16)


def plan(n1, n2, itemsize, T, shared):
    """(kernel, tokens a program, block sizes, options) for factors of n1 and n2 and a budget of shared memory.

    On chip if both factors, x and mat(x) P2 fit together. fp32 has no matrix unit on NVIDIA and keeps its
    operands in registers: only small sizes. Several tokens a program once that leaves enough programs.
    """
    block_1, block_2 = (max(16, 1 << (n - 1).bit_length()) for n in (n1, n2))
    tile = block_1 * block_2
    fits = (block_1 + block_2) ** 2 * itemsize <= shared
    if fits and (itemsize == 2 or tile <= 2048 and max(block_1, block_2) <= 64):
        tokens = 8 if T >= 8192 and tile <= 4096 else 1
        blocks = {"TOKENS": tokens, "BLOCK_1": block_1, "BLOCK_2": block_2}
        warps = 2 if tile < 2048 else 4 if tile <= 4096 else 8
        return _kron_quant_kernel, tokens, blocks, {"num_warps": warps, "num_stages": 1}
    block, stages = (64, 2) if itemsize == 2 else (32, 1)
    blocks = {"BLOCK_1": block_1, "BLOCK_I": min(block, block_1), "BLOCK_J": block, "BLOCK_K": 32}
    return _kron_quant_tiled_kernel, 1, blocks, {"num_warps": 8, "num_stages": stages}


def _kron_quant(x, p1, p2, clip, c):
    x = last_dim_contiguous(x.detach())
    p1, p2 = (p.detach().to(x.dtype).contiguous() for p in (p1, p2))
    clip, c = (None if t is None else t.detach().float().contiguous() for t in (clip, c))
    (T, C), G = x.shape, len(clip)
    program, tokens, blocks, options = plan(len(p1), len(p2), x.element_size(), T, on_chip(x.device))
    codes = torch.empty((G, T, C // 2), dtype=torch.uint8, device=x.device)
    scale = torch.empty((G, T), dtype=torch.float32, device=x.device)
    launch(program, -(-T // tokens), x, p1, p2, clip, c, codes, scale, x.stride(0), T, G=G, N1=len(p1),
           N2=len(p2), WIDE=INTERPRET and x.dtype == torch.bfloat16, **blocks, **options)
    return codes, scale


# ------------------------------------------------------------------ public function
def kron_quant(x, p1, p2, clip, c=None, *, impl="auto"):
    """Codes (G, T, C/2) uint8 and scales (G, T) fp32 of x (T, C), P1 (n1, n1), P2 (n2, n2), clip (G, 2), c (C,).

    impl: "auto" (kernel on CUDA for n1 <= 128, else reference), "triton", "ref". No gradient.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    check(x.ndim == 2, f"x must be (tokens, channels), got {tuple(x.shape)}")
    for name, p in (("p1", p1), ("p2", p2)):
        check(p.ndim == 2 and 1 <= p.shape[0] == p.shape[1], f"{name} must be square, got {tuple(p.shape)}")
    n1, n2 = len(p1), len(p2)
    check(x.shape[1] == n1 * n2, f"x has {x.shape[1]} channels, the factors make {n1} * {n2}")
    check(n2 % 2 == 0, f"two neighbouring codes share a byte: n2 must be even, got {n2}")
    check(clip.ndim == 2 and len(clip) >= 1 and clip.shape[1] == 2, f"clip must be (G, 2), got {tuple(clip.shape)}")
    check(c is None or c.shape == x.shape[1:], f"c must be ({x.shape[1]},)")
    given = [x, p1, p2, clip] if c is None else [x, p1, p2, clip, c]
    check(all(t.is_floating_point() for t in given), "all arguments must be floating point")
    check(all(t.device == x.device for t in given), "all arguments must be on one device")
    if not use_triton(impl, x) or len(x) == 0 or impl == "auto" and n1 > 128:
        return kron_quant_ref(x, p1, p2, clip, c)
    check(n1 <= 128, f"the kernel sums over n1 on chip: n1 <= 128, got {n1}")
    return _kron_quant(x, p1, p2, clip, c)


def rule(name, out, ref64, eager, n_reduce):
    """What replaces assert_kernel: fp64 rounds at no other place than x * c and mat(x) P2, which moves codes.

    Codes against plain PyTorch in the type of x: 99.9 % equal (one may always differ), none off by more than 1.
    Scales against fp64: at most twice the error of plain PyTorch + 1e-5, relative to each token's scale.
    """
    assert out.shape == ref64.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref64.shape)}"
    if out.numel() == 0:
        return
    if out.dtype == torch.uint8:
        apart = (unpack(out) - unpack(eager)).abs()
        count, allowed = int((apart > 0).sum()), max(1, apart.numel() // 1000)
        assert apart.max() <= 1, f"{name}: a code is off by {int(apart.max())}"
        assert count <= allowed, f"{name}: {count} of {apart.numel()} codes differ, allowed {allowed}"
        return
    assert torch.isfinite(out).all(), f"{name}: not finite"
    error, plain = ((scale.double() / ref64 - 1).abs().max() for scale in (out, eager))
    assert error <= 2 * plain + 1e-5, f"{name}: relative error {error:.1e}, plain PyTorch {plain:.1e}"


# ------------------------------------------------------------------ compile cases and benchmark
MATMUL = "bf16"                                                                # the unit whose peak counts
CHECK_SHAPES = [(9, 9, 64, 3, torch.float32), (300, 112, 128, 1, torch.float16), (64, 128, 224, 3, torch.bfloat16),
                (8200, 24, 24, 3, torch.float16), (257, 32, 48, 1, torch.bfloat16), (5, 112, 128, 1, torch.float32)]
BENCH_SHAPES = [(8192, 24, 24, 3, torch.float16), (8192, 32, 48, 1, torch.float16), (1, 64, 64, 1, torch.float16),
                (2048, 64, 64, 1, torch.float16), (2048, 112, 128, 1, torch.float16),
                (2048, 128, 224, 1, torch.bfloat16)]


def floor(T, n1, n2, G, itemsize):
    """{mode: (bytes, FLOPs)} that any implementation needs."""
    C = n1 * n2
    return {"forward": (T * (C * itemsize + G * (C // 2 + 4)), 2 * T * C * (n1 + n2))}


def _aot_case(dtype, T, n1, n2, G, shared):
    pointers = dict.fromkeys(("x_ptr", "p1_ptr", "p2_ptr"), f"*{dtype}") | {"codes_ptr": "*u8"}
    pointers |= dict.fromkeys(("clip_ptr", "scale_ptr"), "*fp32") | ({"c_ptr": "*fp32"} if G > 1 else {})
    program, _, blocks, options = plan(n1, n2, 4 if dtype == "fp32" else 2, T, shared)
    return aot_case(program, "forward", dtype, (n1, n2, G), {**pointers, "stride_x": n1 * n2, "T": "i32"}, options,
                    G=G, N1=n1, N2=n2, WIDE=False, **blocks, **({} if G > 1 else {"c_ptr": None}))


AOT_CASES = [_aot_case(*case, shared=2 ** 17) for case in (
    ("fp32", 8192, 24, 24, 3), ("bf16", 1, 9, 64, 1), ("fp16", 8192, 32, 48, 3), ("bf16", 8192, 64, 64, 3),
    ("bf16", 2048, 112, 128, 3), ("fp32", 2048, 112, 128, 1), ("fp16", 2048, 128, 224, 3))]


def example(T, n1, n2, G, dtype, device):
    """Arguments (x, p1, p2, clip, c) for checks and benchmarks; c for several groups only."""
    gen = torch.Generator().manual_seed(0)
    x, p1, p2 = (torch.randn(shape, generator=gen) for shape in ((T, n1 * n2), (n1, n1), (n2, n2)))
    x[:, ::7] *= 10                                                            # channels with outliers
    c, clip = torch.rand(n1 * n2, generator=gen) + 0.5, 0.7 + 0.3 * torch.rand(G, 2, generator=gen)
    x, p1, p2 = (t.to(device=device, dtype=dtype) for t in (x, p1 / n1 ** 0.5, p2 / n2 ** 0.5))
    return x, p1, p2, clip.to(device), c.to(device) if G > 1 else None


def outputs(fn, args):
    """{name: tensor} to compare between implementations."""
    return dict(zip(("codes", "scale"), fn(*args)))


def kernel(*args):
    return kron_quant(*args, impl="triton")


reference = kron_quant_ref


def bench(args):
    """{mode: {provider: thunk}}."""
    fns = {"kernel": kernel, "eager": reference, "torch.compile": torch.compile(reference)}
    return {"forward": {name: lambda fn=fn: fn(*args) for name, fn in fns.items()}}
