# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Focal cross-entropy of masked-diffusion training (MDM: Ye et al. 2024, arXiv 2410.14157) and its backward.

    L     = sum_r  w_r  alpha (1 - p_r)^beta  u_r        u_r = -log softmax(x_r)[y_r],  p_r = exp(-u_r)
    dL/dx = w_r  alpha [(1 - p)^beta + beta u p (1 - p)^(beta - 1)]  (softmax(x_r) - onehot(y_r))

The gradient flows through the focal factor (not detached). beta = 0, alpha = 1 is weighted cross-entropy.
Shapes: logits x (R, V) fp32/fp16/bf16, already gathered to the masked rows; target y (R,) integers;
weight w (R,), a constant, which carries 1/N. Returns an fp32 scalar. All statistics are fp32.

Rule at p -> 1: 1 - p is floored at 2**-126, the smallest normal fp32, before a power or a quotient is taken.
Only u = 0 is affected. Value and dL/du are then 0 and alpha 2**(-126 beta), the limit alpha 0^beta up to that
floor, also for 0 < beta < 1, where autograd of the formula gives 0 * inf. The kernel writes dL/du as
alpha (1 - p)^beta [1 + beta g] with g = u p / (1 - p) in [0, 1].

Rows of weight 0 give no loss and a zero gradient whatever they hold (NaN, or a target such as -100).
In the other rows a target outside [0, V) is an error in the reference and a NaN loss in the kernel.

Floor: forward reads x, backward reads x and writes dx: 3 R V elements moved; 4 and 6 FLOPs an element.
"""
import torch

from kernels._common import aot_rows, block_sizes, check, check_logits, check_rows, last_dim_contiguous
from kernels._common import launch, tl, triton, use_triton


# ------------------------------------------------------------------ reference
def masked_focal_ce_ref(logits, target, weight, alpha, beta):
    """Plain PyTorch, in fp32 (fp64 for fp64 logits); the CPU path."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    live = weight != 0
    x = logits.to(dtype).masked_fill(~live[:, None], 0)                                   # (R, V)
    y = target.long().masked_fill(~live, 0)[:, None]                                      # (R, 1)
    u = -torch.log_softmax(x, dim=-1).gather(1, y)[:, 0]                                  # (R,)
    q = (-torch.expm1(-u)).clamp(min=2.0 ** -126)                                         # 1 - p
    return (weight.detach().to(dtype) * alpha * q ** beta * u).sum()


# ------------------------------------------------------------------ kernels
@triton.jit
def _focal(u, beta):
    """q = 1 - p = 1 - exp(-u); q ** beta; u p / q, with the floor. tl has no expm1: below 1/4 a series."""
    w = tl.minimum(u, 0.25)
    series = w * (1 - w / 2 * (1 - w / 3 * (1 - w / 4 * (1 - w / 5 * (1 - w / 6)))))
    p = tl.exp(-u)
    q = tl.where(u < 0.25, series, 1 - p)
    floored = tl.maximum(q, 1.1754943508222875e-38)          # 2**-126
    return q, tl.exp(beta * tl.log(floored)), u * p / floored


@triton.jit
def _masked_focal_ce_fwd_kernel(x_ptr, target_ptr, weight_ptr, loss_ptr, max_ptr, logsum_ptr, u_ptr,
                                stride_x, R, V, alpha, beta, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """One program: BLOCK_R rows, one online-softmax pass. Reads R V elements, writes 16 bytes a row.

    The log-sum-exp is saved in two parts: at logits of 1e4 their fp32 sum would be off by 1e-3.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)                # (BLOCK_R,)
    weight = tl.load(weight_ptr + rows, mask=rows < R, other=0.0)
    live = weight != 0                                       # False beyond R as well: rows that are not read
    m = tl.full((BLOCK_R,), -float("inf"), tl.float32)       # running max
    s = tl.zeros((BLOCK_R,), tl.float32)                     # running sum of exp(x - m)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)[None, :]
        mask = live[:, None] & (cols < V)
        x = tl.load(x_ptr + (rows[:, None] * stride_x + cols), mask=mask, other=-float("inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=1))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)                  # only -inf so far: no NaN
        s = s * tl.exp(m - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
        m = m_new
    target = tl.load(target_ptr + rows, mask=live, other=0)
    valid = live & (target >= 0) & (target < V)
    x_target = tl.load(x_ptr + (rows * stride_x + target), mask=valid, other=float("nan")).to(tl.float32)
    logsum = tl.log(tl.where(live, s, 1.0))
    u = m - x_target + logsum
    _q, v, _g = _focal(u, beta)
    tl.store(loss_ptr + rows, tl.where(live, weight * alpha * v * u, 0.0), mask=rows < R)
    tl.store(max_ptr + rows, m, mask=rows < R)
    tl.store(logsum_ptr + rows, logsum, mask=rows < R)
    tl.store(u_ptr + rows, u, mask=rows < R)


@triton.jit
def _masked_focal_ce_bwd_kernel(x_ptr, target_ptr, weight_ptr, dloss_ptr, max_ptr, logsum_ptr, u_ptr, dx_ptr,
                                stride_x, R, V, alpha, beta, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """One program: BLOCK_R rows of dx (contiguous). Reads R V elements and writes R V elements."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)                # (BLOCK_R,)
    inside = rows < R
    weight = tl.load(weight_ptr + rows, mask=inside, other=0.0)
    live = weight != 0
    target = tl.load(target_ptr + rows, mask=live, other=0)
    m = tl.load(max_ptr + rows, mask=live, other=0.0)
    logsum = tl.load(logsum_ptr + rows, mask=live, other=0.0)
    u = tl.load(u_ptr + rows, mask=live, other=0.0)
    q, v, g = _focal(u, beta)
    coef = tl.load(dloss_ptr) * weight * alpha * v * (1 + beta * g)                       # dL/du
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)[None, :]
        mask = live[:, None] & (cols < V)
        x = tl.load(x_ptr + (rows[:, None] * stride_x + cols), mask=mask, other=-float("inf")).to(tl.float32)
        p = tl.exp(x - m[:, None] - logsum[:, None])
        delta = tl.where(cols == target[:, None], -q[:, None], p)             # -q: no cancellation in p - 1
        dx = tl.where(mask, coef[:, None] * delta, 0.0)
        tl.store(dx_ptr + (rows[:, None] * V + cols), dx.to(dx_ptr.dtype.element_ty),
                 mask=inside[:, None] & (cols < V))


# ------------------------------------------------------------------ autograd
class _MaskedFocalCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, weight, alpha, beta):
        x, target = last_dim_contiguous(logits), target.contiguous()
        weight = weight.to(torch.float32).contiguous()
        R, V = x.shape
        block_r, block_v, warps = block_sizes(V)
        row_stats = [torch.empty(R, dtype=torch.float32, device=x.device) for _ in range(4)]
        loss, *saved = row_stats                                              # saved: max, logsum, u
        launch(_masked_focal_ce_fwd_kernel, -(-R // block_r), x, target, weight, *row_stats,
               x.stride(0), R, V, alpha, beta, BLOCK_R=block_r, BLOCK_V=block_v, num_warps=warps)
        ctx.save_for_backward(x, target, weight, *saved)
        ctx.alpha, ctx.beta = alpha, beta
        return loss.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        x, target, weight, *saved = ctx.saved_tensors
        R, V = x.shape
        block_r, block_v, warps = block_sizes(V)
        dx = torch.empty((R, V), dtype=x.dtype, device=x.device)
        launch(_masked_focal_ce_bwd_kernel, -(-R // block_r), x, target, weight, dloss.contiguous(), *saved,
               dx, x.stride(0), R, V, ctx.alpha, ctx.beta, BLOCK_R=block_r, BLOCK_V=block_v, num_warps=warps)
        return dx, None, None, None, None


# ------------------------------------------------------------------ public function
def masked_focal_ce(logits, target, weight, alpha, beta, *, impl="auto"):
    """Sum over rows of w_r alpha (1 - p_r)^beta u_r; logits (R, V), target (R,), weight (R,) -> fp32 scalar.

    impl: "auto" (kernel on CUDA, else reference), "triton", "ref". Gradient to logits only, out of place.
    Raises ValueError for wrong shapes, dtypes or devices and for beta < 0.
    """
    check_logits(logits)
    check_rows("target", target, logits)
    check_rows("weight", weight, logits)
    integer = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    check(integer, f"target must hold integers, got {target.dtype}")
    check(beta >= 0, f"beta must be >= 0, got {beta}")
    if not use_triton(impl, logits) or logits.shape[0] == 0:
        return masked_focal_ce_ref(logits, target, weight, alpha, beta)
    return _MaskedFocalCE.apply(logits, target, weight, float(alpha), float(beta))


# ------------------------------------------------------------------ compile cases and benchmark
def floor(R, V, itemsize):
    """{mode: (bytes, FLOPs)} that any implementation needs."""
    return {"forward": (R * V * itemsize, 4 * R * V), "backward": (2 * R * V * itemsize, 6 * R * V)}


def _aot_cases(dtype, V):
    shared = {"x_ptr": f"*{dtype}", "target_ptr": "*i64", "alpha": "fp32", "beta": "fp32"}
    shared |= dict.fromkeys(("weight_ptr", "max_ptr", "logsum_ptr", "u_ptr"), "*fp32")
    return [aot_rows(_masked_focal_ce_fwd_kernel, "forward", dtype, V, {**shared, "loss_ptr": "*fp32"}),
            aot_rows(_masked_focal_ce_bwd_kernel, "backward", dtype, V,
                     {**shared, "dloss_ptr": "*fp32", "dx_ptr": f"*{dtype}"})]


AOT_CASES = [case for dtype, V in (("fp32", 1), ("fp32", 31), ("fp16", 50257), ("bf16", 151936))
             for case in _aot_cases(dtype, V)]


def example(R, V, dtype, device):
    """Arguments (logits, target, weight, alpha, beta) for checks and benchmarks."""
    gen = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(R, V, generator=gen)).to(device=device, dtype=dtype)
    target = torch.randint(V, (R,), generator=gen).to(device)
    weight = (torch.rand(R, generator=gen) + 0.5).to(device) / R
    return logits, target, weight, 0.25, 1.0


def outputs(fn, args):
    """{name: tensor} to compare between implementations."""
    logits = args[0].detach().requires_grad_()
    loss = fn(logits, *args[1:])
    return {"loss": loss.detach(), "dlogits": torch.autograd.grad(loss, logits)[0]}


def kernel(*args):
    return masked_focal_ce(*args, impl="triton")


reference = masked_focal_ce_ref


def bench(args):
    """{mode: {provider: thunk}}; a backward thunk repeats one graph's backward; the driver resets grads."""
    logits = args[0].requires_grad_()
    fns = {"kernel": kernel, "eager": reference, "torch.compile": torch.compile(reference)}
    graphs = {name: fn(*args) for name, fn in fns.items()}
    forward = {name: lambda fn=fn: fn(logits.detach(), *args[1:]) for name, fn in fns.items()}
    backward = {name: lambda loss=loss: loss.backward(retain_graph=True) for name, loss in graphs.items()}
    return {"forward": forward, "backward": backward}
