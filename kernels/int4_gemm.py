# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Product of two matrices of 4-bit codes, dequantized on the way out (the linear layers of FlatQuant, QuaRot).

    y[m, n] = sa[m] * (sum_k a[m, k] w[n, k]) * sw[n]  (+ bias[n])        a, w in -8 ... 7, the sum an integer

Shapes: qa (M, K/2) and qw (N, K/2) uint8, two codes a byte (`pack`: low nibble = even k, two's complement);
sa (M,), sw (N,), bias (N,) fp32. Returns (M, N) in dtype: fp32, fp16 or bf16. No gradient.
K < 2**18: |sum| <= 64 K < 2**24 is exact in int32 and in fp32, whatever the order, so that fp32 results are
equal to the reference's in every bit. Order of the epilogue: (sum * sa) * sw, then + bias, each rounded.

Triton has no 4-bit dot. A byte is unpacked to two int8 by shifts that keep the sign, and the low nibbles of a
meet the low ones of w, the high ones the high ones: two int8 dots, and no nibble moves to another lane.
What this buys: operands of a quarter of fp16's bytes (decoding is bound by them) and the rate of int8.

Floor: (M + N) K / 2 bytes of codes, 4 (M + N) of scales, M N elements written; 2 M N K integer operations.
"""
import torch

from kernels._common import DTYPES, aot_case, check, last_dim_contiguous, launch, tl, triton, use_triton


# ------------------------------------------------------------------ storage and reference
def pack(codes):
    """int8 codes (..., K) in -8 ... 7, K even, to uint8 (..., K/2); the low nibble holds the even index."""
    check(codes.dtype == torch.int8, f"codes must be int8, got {codes.dtype}")
    check(codes.ndim >= 1 and codes.shape[-1] % 2 == 0, f"codes must be (..., even), got {tuple(codes.shape)}")
    check(codes.numel() == 0 or -8 <= codes.min() and codes.max() <= 7, "codes must lie in -8 ... 7")
    return pack_in_range(codes)


def pack_in_range(codes):
    """pack without its checks, which wait for the values."""
    return (codes[..., ::2] & 15 | codes[..., 1::2] << 4).view(torch.uint8)


def unpack(packed):
    """uint8 (..., K/2) to int8 codes (..., K)."""
    check(packed.dtype == torch.uint8, f"packed codes must be uint8, got {packed.dtype}")
    byte = packed.view(torch.int8)
    return torch.stack([byte << 4 >> 4, byte >> 4], dim=-1).flatten(-2)


def int4_gemm_ref(qa, sa, qw, sw, bias=None, dtype=torch.float32):
    """Plain PyTorch (fp64 for fp64 scales); the CPU path. An fp32 product of these integers is exact."""
    total = unpack(qa).float() @ unpack(qw).float().T                                     # (M, N)
    y = total.to(sa.dtype) * sa.detach()[:, None] * sw.detach()
    y = y if bias is None else y + bias.detach()
    return y if sa.dtype == torch.float64 else y.to(dtype)


# ------------------------------------------------------------------ kernel
@triton.jit
def _int4_gemm_kernel(qa_ptr, sa_ptr, qw_ptr, sw_ptr, bias_ptr, y_ptr, stride_a, stride_w, M, N, H,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr):
    """One program: a (BLOCK_M, BLOCK_N) tile of y, in steps of BLOCK_H of the H = K / 2 bytes of a row.

    Neighbouring programs share their columns: w is read once from memory, a again and again from the L2.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    rows = (tl.program_id(0) % blocks_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)   # (BLOCK_M,)
    cols = (tl.program_id(0) // blocks_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, H, BLOCK_H):
        k = start + tl.arange(0, BLOCK_H)
        a = tl.load(qa_ptr + (rows[:, None] * stride_a + k[None, :]),
                    mask=(rows[:, None] < M) & (k[None, :] < H), other=0).to(tl.int8, bitcast=True)
        w = tl.load(qw_ptr + (cols[None, :] * stride_w + k[:, None]),
                    mask=(cols[None, :] < N) & (k[:, None] < H), other=0).to(tl.int8, bitcast=True)
        acc = tl.dot((a << 4) >> 4, (w << 4) >> 4, acc, out_dtype=tl.int32)               # even k
        acc = tl.dot(a >> 4, w >> 4, acc, out_dtype=tl.int32)                             # odd k
    sa = tl.load(sa_ptr + rows, mask=rows < M, other=0.0)
    sw = tl.load(sw_ptr + cols, mask=cols < N, other=0.0)
    y = acc.to(tl.float32) * sa[:, None] * sw[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0)[None, :]
    tl.store(y_ptr + (rows[:, None] * N + cols[None, :]), y.to(y_ptr.dtype.element_ty),
             mask=(rows[:, None] < M) & (cols[None, :] < N))


def tiles(M, H):
    """Block sizes and options: decoding wants many programs, prefill large tiles. Rows of bytes that 16 does not
    divide are read byte by byte: more threads, for the addresses."""
    odd, small, middle, large = (64, 64, 64, 8), (16, 32, 128, 4), (64, 64, 64, 4), (128, 128, 64, 8)
    *blocks, warps = odd if H % 16 else small if M <= 16 else middle if M <= 64 else large
    # no fusion: product and bias are rounded one after the other, as in the reference
    options = {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": False}
    return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_H"), blocks)), options


def _int4_gemm(qa, sa, qw, sw, bias, dtype):
    qa, qw = last_dim_contiguous(qa), last_dim_contiguous(qw)
    sa, sw = sa.detach().contiguous(), sw.detach().contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    (M, H), N = qa.shape, len(qw)
    y = torch.empty((M, N), dtype=dtype, device=qa.device)
    blocks, options = tiles(M, H)
    n_programs = -(-M // blocks["BLOCK_M"]) * -(-N // blocks["BLOCK_N"])
    launch(_int4_gemm_kernel, n_programs, qa, sa, qw, sw, bias, y, qa.stride(0), qw.stride(0), M, N, H,
           **blocks, **options)
    return y


# ------------------------------------------------------------------ public function
def int4_gemm(qa, sa, qw, sw, bias=None, *, dtype=torch.float32, impl="auto"):
    """y (M, N) from packed codes qa (M, K/2), qw (N, K/2) and scales sa (M,), sw (N,); bias (N,) or None.

    impl: "auto" (kernel on CUDA, else reference), "triton", "ref". fp64 scales: reference, fp64 result.
    Raises ValueError for wrong shapes, dtypes or devices and for K >= 2**18.
    """
    for name, q, scale in (("a", qa, sa), ("w", qw, sw)):
        check(q.dtype == torch.uint8 and q.ndim == 2,
              f"q{name} must be a uint8 matrix, got {q.dtype} {tuple(q.shape)}")
        check(scale.shape == q.shape[:1], f"s{name} must be ({len(q)},), got {tuple(scale.shape)}")
    check(qa.shape[1] == qw.shape[1], f"rows of {qa.shape[1]} and {qw.shape[1]} bytes")
    check(1 <= qa.shape[1] < 2 ** 17, f"K must be in 2 ... 2**18 - 2, got {2 * qa.shape[1]}")
    check(bias is None or bias.shape == sw.shape, f"bias must be ({len(qw)},)")
    floats = [sa, sw] if bias is None else [sa, sw, bias]
    check(all(x.dtype in (torch.float32, torch.float64) and x.dtype == sa.dtype for x in floats),
          f"scales and bias must be float32, got {[x.dtype for x in floats]}")
    check(all(x.device == qa.device for x in (qw, *floats)), "all arguments must be on one device")
    check(dtype in DTYPES, f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if not use_triton(impl, sa) or not len(qa) or not len(qw):
        return int4_gemm_ref(qa, sa, qw, sw, bias, dtype)
    return _int4_gemm(qa, sa, qw, sw, bias, dtype)


# ------------------------------------------------------------------ compile cases and benchmark
MATMUL = "int8"                                                                # the unit whose peak counts
CHECK_SHAPES = [(1, 96, 192, torch.float32), (257, 200, 576, torch.float16), (512, 1536, 4096, torch.bfloat16)]
BENCH_SHAPES = [(1, 4096, 4096, torch.float16), (16, 4096, 14336, torch.float16),
                (2048, 4096, 4096, torch.float16), (2048, 14336, 4096, torch.bfloat16)]


def floor(M, N, K, itemsize):
    """{mode: (bytes, operations)} that any implementation needs."""
    return {"forward": ((M + N) * (K // 2 + 4) + M * N * itemsize, 2 * M * N * K)}


def _aot_case(dtype, M, N, K, **bias):
    arguments = {"qa_ptr": "*u8", "qw_ptr": "*u8", "sa_ptr": "*fp32", "sw_ptr": "*fp32", "y_ptr": f"*{dtype}",
                 "stride_a": K // 2, "stride_w": K // 2, "M": M, "N": N, "H": K // 2}
    blocks, options = tiles(M, K // 2)
    constants = {} if "bias_ptr" in bias else {"bias_ptr": None}
    return aot_case(_int4_gemm_kernel, "forward", dtype, (N, K), arguments | bias, options, **blocks, **constants)


AOT_CASES = [_aot_case("fp32", 1, 96, 192, bias_ptr="*fp32"), _aot_case("fp16", 64, 576, 1536),
             _aot_case("bf16", 2048, 4096, 14336, bias_ptr="*fp32"), _aot_case("fp16", 77, 31, 18)]


def example(M, N, K, dtype, device):
    """Arguments (qa, sa, qw, sw, bias, dtype) for checks and benchmarks."""
    gen = torch.Generator().manual_seed(0)
    qa, qw = (torch.randint(256, (rows, K // 2), generator=gen).to(torch.uint8).to(device) for rows in (M, N))
    sa, sw, bias = (torch.rand(n, generator=gen).to(device) + 0.1 for n in (M, N, N))
    return qa, sa, qw, sw, bias, dtype


def outputs(fn, args):
    """{name: tensor} to compare between implementations."""
    return {"y": fn(*args)}


def kernel(*args):
    *args, dtype = args
    return int4_gemm(*args, dtype=dtype, impl="triton")


reference = int4_gemm_ref


def bench(args):
    """{mode: {provider: thunk}}. "fp16 matmul": the unquantized layer, which this must beat to be of use."""
    qa, _, qw, *_ = args
    a, w = unpack(qa).half(), unpack(qw).half()
    fns = {"kernel": kernel, "eager": reference, "torch.compile": torch.compile(reference)}
    thunks = {name: lambda fn=fn: fn(*args) for name, fn in fns.items()}
    return {"forward": thunks | {"fp16 matmul": lambda: a @ w.T}}
