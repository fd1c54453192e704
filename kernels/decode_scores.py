# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""What easy-first decoding needs of each row of logits, in one read (MDM's TopK, margin and entropy orders).

    p = softmax(x with the forbidden ids at -inf)
    argmax (lowest index of the largest x), log p_1, margin p_1 - p_2, negentropy sum_j p_j log p_j

Shapes: logits x (R, V) fp32/fp16/bf16; forbidden: a short tuple of ids never to be decoded ([MASK], [SEP]).
Returns argmax (R,) int64 and log p_1, margin, negentropy (R,) fp32. V = 1 has margin 1. No gradient.
With m = max x, m2 the second largest x, s = sum e^(x-m), t = sum e^(x-m) (x-m):
log p_1 = -log s,  margin = (1 - e^(m2-m)) / s,  negentropy = t / s - log s (both <= 0: nothing cancels).
A row that holds NaN or +inf, or only -inf, has NaN scores; its argmax is some id in [0, V).

Floor: R V elements read, 20 bytes a row written; about 10 FLOPs an element. In PyTorch log_softmax, argmax,
topk and sum are 4-5 passes and an fp32 (R, V) temporary.
"""
import torch

from kernels._common import aot_rows, block_sizes, check, check_logits, last_dim_contiguous, launch
from kernels._common import tl, triton, use_triton


# ------------------------------------------------------------------ reference
def decode_scores_ref(logits, forbidden=()):
    """Plain PyTorch, in fp32 (fp64 for fp64 logits); the CPU path."""
    x = logits.detach().to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    x = x.index_fill(1, torch.tensor(forbidden, dtype=torch.long, device=x.device), -float("inf"))
    logp = torch.log_softmax(x, dim=-1)                                                   # (R, V)
    p = logp.exp()
    top = p.topk(min(2, x.shape[1]), dim=-1).values                                       # (R, 1 or 2)
    margin = top[:, 0] if x.shape[1] == 1 else top[:, 0] - top[:, 1]
    negentropy = (p * logp.clamp(min=-1e30)).sum(-1)                                      # 0 log 0 = 0
    argmax = x.argmax(-1)
    return argmax, logp.gather(1, argmax[:, None])[:, 0], margin, negentropy


# ------------------------------------------------------------------ kernel
@triton.jit
def _decode_scores_kernel(x_ptr, argmax_ptr, logp_ptr, margin_ptr, negentropy_ptr, stride_x, R, V,
                          FORBIDDEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """One program: BLOCK_R rows, one online pass keeping m, its index, m2, s and t. Writes 20 bytes a row."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)                # (BLOCK_R,)
    inside = rows < R
    m = tl.full((BLOCK_R,), -float("inf"), tl.float32)       # largest
    m2 = tl.full((BLOCK_R,), -float("inf"), tl.float32)      # second largest, equal to m in a tie
    best = tl.zeros((BLOCK_R,), tl.int32)
    s = tl.zeros((BLOCK_R,), tl.float32)
    t = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)[None, :]
        x = tl.load(x_ptr + (rows[:, None] * stride_x + cols), mask=inside[:, None] & (cols < V),
                    other=-float("inf")).to(tl.float32)
        for i in tl.static_range(len(FORBIDDEN)):
            x = tl.where(cols == FORBIDDEN[i], -float("inf"), x)
        # lowest column of the block's maximum; a minimum over columns needs no tie rule of argmax
        b = tl.max(x, axis=1)
        b_col = tl.min(tl.where(x == b[:, None], cols, 2147483647), axis=1)
        b2 = tl.max(tl.where(cols == b_col[:, None], -float("inf"), x), axis=1)
        m2 = tl.maximum(tl.maximum(m2, b2), tl.minimum(m, b))
        best = tl.where(b > m, b_col, best)                  # strict: an earlier block wins a tie
        m_new = tl.maximum(m, b)
        # rescale s and t from m to m_new; exp(-inf) * -inf and -inf - -inf are kept out of the sums
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        step = tl.where(m == -float("inf"), 0.0, m - shift)
        z = x - shift[:, None]
        e = tl.exp(z)
        t = tl.exp(step) * (t + step * s) + tl.sum(tl.where(x == -float("inf"), 0.0, e * z), axis=1)
        s = tl.exp(step) * s + tl.sum(e, axis=1)
        m = m_new
    normal = s > 0                                           # False for NaN and for a row of -inf
    log_s = tl.log(tl.where(normal, s, 1.0))
    nan = float("nan")
    tl.store(argmax_ptr + rows, best.to(tl.int64), mask=inside)
    tl.store(logp_ptr + rows, tl.where(normal, -log_s, nan), mask=inside)
    tl.store(margin_ptr + rows, tl.where(normal, (1 - tl.exp(m2 - m)) / s, nan), mask=inside)
    tl.store(negentropy_ptr + rows, tl.where(normal, t / s - log_s, nan), mask=inside)


def _decode_scores(logits, forbidden):
    x = last_dim_contiguous(logits.detach())
    R, V = x.shape
    block_r, block_v, warps = block_sizes(V)
    argmax = torch.empty(R, dtype=torch.int64, device=x.device)
    scores = [torch.empty(R, dtype=torch.float32, device=x.device) for _ in range(3)]
    launch(_decode_scores_kernel, -(-R // block_r), x, argmax, *scores, x.stride(0), R, V,
           FORBIDDEN=forbidden, BLOCK_R=block_r, BLOCK_V=block_v, num_warps=warps)
    return argmax, *scores


# ------------------------------------------------------------------ public function
def decode_scores(logits, forbidden=(), *, impl="auto"):
    """(argmax int64, log p_1, margin p_1 - p_2, sum p log p), each (R,), of logits (R, V) less forbidden ids.

    impl: "auto" (kernel on CUDA, else reference), "triton", "ref". One compilation per forbidden tuple.
    Raises ValueError for wrong shapes or dtypes, ids outside [0, V), and when every id is forbidden.
    """
    check_logits(logits)
    V = logits.shape[1]
    forbidden = tuple(sorted({int(i) for i in forbidden}))
    check(all(0 <= i < V for i in forbidden), f"forbidden ids must be in [0, {V}), got {forbidden}")
    check(len(forbidden) < V, f"all {V} ids are forbidden")
    if not use_triton(impl, logits) or logits.shape[0] == 0:
        return decode_scores_ref(logits, forbidden)
    return _decode_scores(logits, forbidden)


# ------------------------------------------------------------------ compile cases and benchmark
def floor(R, V, itemsize):
    """{mode: (bytes, FLOPs)} that any implementation needs."""
    return {"forward": (R * V * itemsize + 20 * R, 10 * R * V)}


def _aot_case(dtype, V, forbidden):
    scores = dict.fromkeys(("logp_ptr", "margin_ptr", "negentropy_ptr"), "*fp32")
    return aot_rows(_decode_scores_kernel, "forward", dtype, V,
                    {"x_ptr": f"*{dtype}", "argmax_ptr": "*i64", **scores}, FORBIDDEN=forbidden)


AOT_CASES = [_aot_case("fp32", 1, ()), _aot_case("fp32", 31, (0, 30)), _aot_case("fp16", 50257, ()),
             _aot_case("bf16", 151936, (151935,))]


def example(R, V, dtype, device):
    """Arguments (logits, forbidden) for checks and benchmarks."""
    gen = torch.Generator().manual_seed(0)
    return (3 * torch.randn(R, V, generator=gen)).to(device=device, dtype=dtype), (0, V - 1)


def outputs(fn, args):
    """{name: tensor} to compare between implementations."""
    return dict(zip(("argmax", "logp", "margin", "negentropy"), fn(*args)))


def kernel(*args):
    return decode_scores(*args, impl="triton")


reference = decode_scores_ref


def bench(args):
    """{mode: {provider: thunk}}."""
    fns = {"kernel": kernel, "eager": reference, "torch.compile": torch.compile(reference)}
    return {"forward": {name: lambda fn=fn: fn(*args) for name, fn in fns.items()}}
