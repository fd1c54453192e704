# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Cross-entropy over a large vocabulary with the z-loss of PaLM (training of language models: batchlaw).

    lse_r = log sum_j exp(x_rj)        L_r = lse_r - x_r[y_r] + z lse_r^2        (0 where y_r = ignore_index)
    dL_r/dx_r = (1 + 2 z lse_r) softmax(x_r) - onehot(y_r)

Shapes: logits x (R, V) fp32/fp16/bf16, V to 200k and beyond; target y (R,) integers; z = z_loss >= 0, a float.
Returns fp32: the mean over the rows that are not ignored (0 if there is none; PyTorch: NaN), their "sum", or
"none": all L_r (R,), for losses by position or a weight of one's own. Every statistic is fp32, and no fp32 copy
of the logits exists. Error: that of an fp32 log_softmax; lse is kept in two parts, max and log of the sum.

inplace=True: the backward pass writes dx over the logits and returns that memory, which saves R V elements.
The logits are garbage from then on: only for logits that nothing else reads and no operation before saved
(a linear layer does not; a softcap does). Autograd is told: a second backward is an error, not a wrong result.
Why not in the forward pass: the upstream gradient (1 / accumulation steps, a weight) is not known there.

An ignored row is not read and has a zero gradient, whatever it holds. In the others, a target outside [0, V) is
an error in the reference and a NaN loss in the kernel; NaN logits give NaN.

Floor: forward reads x (R V elements), backward reads x and writes dx (2 R V); both together could be 2 R V.
6 and 4 FLOPs an element. PyTorch in fp32 moves about 5 times as much. Source: section 7 of batchlaw's notes.
"""
import torch
import torch.nn.functional as F

from kernels._common import aot_rows, block_sizes, check, check_logits, check_rows, last_dim_contiguous
from kernels._common import launch, tl, triton, use_triton


# ------------------------------------------------------------------ reference
def cross_entropy_ref(logits, target, ignore_index=-100, z_loss=0.0, reduction="mean", inplace=False):
    """Plain PyTorch, in fp32 (fp64 for fp64 logits); the CPU path. Never in place, whatever is asked for."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    live = target != ignore_index
    x = logits.to(dtype).masked_fill(~live[:, None], 0)                                   # (R, V)
    y = target.long().masked_fill(~live, 0)[:, None]                                      # (R, 1)
    losses = -torch.log_softmax(x, dim=-1).gather(1, y)[:, 0]                             # (R,)
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(x, dim=-1).square()
    return _reduce(losses.masked_fill(~live, 0), live, reduction)


def _reduce(losses, live, reduction):
    """Losses (R,), 0 where not live, to what was asked for; the number of live rows stays on the device."""
    if reduction == "none":
        return losses
    return losses.sum() / live.sum().clamp(min=1) if reduction == "mean" else losses.sum()


# ------------------------------------------------------------------ kernels
@triton.jit
def _cross_entropy_fwd_kernel(x_ptr, target_ptr, loss_ptr, max_ptr, logsum_ptr, stride_x, R, V, z,
                              IGNORE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """One program: BLOCK_R rows in one pass. Reads R V elements, writes 12 bytes a row.

    Every lane keeps a maximum and a sum of its own, so that nothing crosses lanes before the end. One exponential
    an element: of -|x - m|, which scales either the new term or the old sum.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)                # (BLOCK_R,)
    inside = rows < R
    target = tl.load(target_ptr + rows, mask=inside, other=IGNORE)
    live = target != IGNORE                                  # False beyond R as well: rows that are not read
    m = tl.full((BLOCK_R, BLOCK_V), -3.4028234663852886e38, tl.float32)       # finite: -inf - -inf never occurs
    s = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)             # sum of exp(x - m)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)[None, :]
        x = tl.load(x_ptr + (rows[:, None] * stride_x + cols), mask=live[:, None] & (cols < V),
                    other=-float("inf")).to(tl.float32)
        d = x - m
        e = tl.exp(-tl.abs(d))
        s = tl.where(d > 0, s * e + 1, s + e)
        m = tl.maximum(m, x)
    top = tl.max(m, axis=1)                                                   # (BLOCK_R,)
    total = tl.sum(s * tl.exp(m - top[:, None]), axis=1)
    logsum = tl.log(tl.where(live, total, 1.0))
    valid = live & (target >= 0) & (target < V)
    x_target = tl.load(x_ptr + (rows * stride_x + target), mask=valid, other=float("nan")).to(tl.float32)
    lse = top + logsum
    loss = top - x_target + logsum + z * lse * lse
    tl.store(loss_ptr + rows, tl.where(live, loss, 0.0), mask=inside)
    tl.store(max_ptr + rows, top, mask=inside)
    tl.store(logsum_ptr + rows, logsum, mask=inside)


@triton.jit
def _cross_entropy_bwd_kernel(x_ptr, target_ptr, dloss_ptr, max_ptr, logsum_ptr, dx_ptr, stride_x, stride_dx, R, V,
                              z, IGNORE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """One program: BLOCK_R rows of dx, which may be x: a thread reads an element before it writes it.
    Reads R V elements and writes R V elements."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)                # (BLOCK_R,)
    inside = rows < R
    target = tl.load(target_ptr + rows, mask=inside, other=IGNORE)
    live = target != IGNORE
    top = tl.load(max_ptr + rows, mask=live, other=0.0)
    logsum = tl.load(logsum_ptr + rows, mask=live, other=0.0)
    dloss = tl.load(dloss_ptr + rows, mask=live, other=0.0)
    slope = 1 + 2 * z * (top + logsum)                       # of the log-sum-exp
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)[None, :]
        x = tl.load(x_ptr + (rows[:, None] * stride_x + cols), mask=live[:, None] & (cols < V),
                    other=-float("inf")).to(tl.float32)
        p = tl.exp(x - top[:, None] - logsum[:, None])
        delta = slope[:, None] * p - tl.where(cols == target[:, None], 1.0, 0.0)
        dx = (dloss[:, None] * delta).to(dx_ptr.dtype.element_ty)             # 0 in an ignored row: dloss is
        tl.store(dx_ptr + (rows[:, None] * stride_dx + cols), dx, mask=inside[:, None] & (cols < V))


# ------------------------------------------------------------------ autograd
class _CrossEntropy(torch.autograd.Function):
    """Losses (R,) of logits (R, V)."""

    @staticmethod
    def forward(ctx, logits, target, ignore_index, z_loss, inplace):
        x, target = last_dim_contiguous(logits), target.long().contiguous()
        R, V = x.shape
        if inplace and x.stride(0) < V:                      # expanded rows share their memory
            x = x.contiguous()
        block_r, block_v, warps = block_sizes(V)
        loss, *saved = [torch.empty(R, dtype=torch.float32, device=x.device) for _ in range(3)]
        launch(_cross_entropy_fwd_kernel, -(-R // block_r), x, target, loss, *saved, x.stride(0), R, V, z_loss,
               IGNORE=ignore_index, BLOCK_R=block_r, BLOCK_V=block_v, num_warps=warps)
        ctx.save_for_backward(x, target, *saved)
        ctx.args = ignore_index, z_loss, inplace
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        (x, target, *saved), (ignore_index, z_loss, inplace) = ctx.saved_tensors, ctx.args
        R, V = x.shape
        block_r, block_v, warps = block_sizes(V)
        dx = x.detach() if inplace else torch.empty((R, V), dtype=x.dtype, device=x.device)
        launch(_cross_entropy_bwd_kernel, -(-R // block_r), x, target, dloss.contiguous(), *saved, dx, x.stride(0),
               dx.stride(0), R, V, z_loss, IGNORE=ignore_index, BLOCK_R=block_r, BLOCK_V=block_v, num_warps=warps)
        if inplace:
            torch.autograd.graph.increment_version(x)        # whoever saved the logits will notice
        return dx, None, None, None, None


# ------------------------------------------------------------------ public function
def cross_entropy(logits, target, ignore_index=-100, z_loss=0.0, reduction="mean", inplace=False, *, impl="auto"):
    """Mean (or "sum", or "none") of the losses of logits (R, V) and target (R,), fp32; gradient to logits only.

    inplace: the backward pass overwrites the logits (see above); the reference never does.
    impl: "auto" (kernel on CUDA, else reference), "triton", "ref".
    Raises ValueError for wrong shapes, dtypes or devices, an unknown reduction and for z_loss < 0.
    """
    check_logits(logits)
    check_rows("target", target, logits)
    integer = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    check(integer, f"target must hold integers, got {target.dtype}")
    check(z_loss >= 0, f"z_loss must be >= 0, got {z_loss}")
    check(reduction in ("mean", "sum", "none"), f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not use_triton(impl, logits) or logits.shape[0] == 0:
        return cross_entropy_ref(logits, target, ignore_index, z_loss, reduction)
    losses = _CrossEntropy.apply(logits, target, int(ignore_index), float(z_loss), inplace)
    return _reduce(losses, target != ignore_index, reduction)


# ------------------------------------------------------------------ compile cases and benchmark
BENCH_SHAPES = [(8192, 50304, torch.bfloat16), (4096, 151936, torch.bfloat16)]


def floor(R, V, itemsize):
    """{mode: (bytes, FLOPs)} that any implementation needs; full: read once, written once."""
    return {"forward": (R * V * itemsize, 6 * R * V), "backward": (2 * R * V * itemsize, 4 * R * V),
            "full": (2 * R * V * itemsize, 10 * R * V)}


def _aot_cases(dtype, V):
    shared = {"x_ptr": f"*{dtype}", "target_ptr": "*i64", "z": "fp32"}
    shared |= dict.fromkeys(("max_ptr", "logsum_ptr"), "*fp32")
    return [aot_rows(_cross_entropy_fwd_kernel, "forward", dtype, V, {**shared, "loss_ptr": "*fp32"}, IGNORE=-100),
            aot_rows(_cross_entropy_bwd_kernel, "backward", dtype, V,
                     {**shared, "dloss_ptr": "*fp32", "dx_ptr": f"*{dtype}", "stride_dx": V}, IGNORE=-100)]


AOT_CASES = [case for dtype, V in (("fp32", 1), ("fp32", 31), ("fp16", 50257), ("bf16", 151936))
             for case in _aot_cases(dtype, V)]


def example(R, V, dtype, device, z_loss=1e-4):
    """Arguments (logits, target, ignore_index, z_loss) for checks and benchmarks; made where they are used, for
    they are large; every eighth row is ignored."""
    gen = torch.Generator(device).manual_seed(0)
    logits = (3 * torch.randn(R, V, generator=gen, device=device)).to(dtype)
    target = torch.randint(V, (R,), generator=gen, device=device)
    target[3::8] = -100
    return logits, target, -100, z_loss


def outputs(fn, args):
    """{name: tensor} to compare between implementations."""
    logits = args[0].detach().requires_grad_()
    losses = fn(logits, *args[1:], "none")
    mean = fn(logits, *args[1:])
    return {"losses": losses.detach(), "mean": mean.detach(), "dlogits": torch.autograd.grad(mean, logits)[0]}


def kernel(*args):
    return cross_entropy(*args, impl="triton")


reference = cross_entropy_ref


def bench(args):
    """{mode: {provider: thunk}}, without z-loss, which PyTorch's function does not have. A backward thunk repeats
    one graph's backward. In place, the logits of the next call are the gradient of the last: same work."""
    logits, target = args[0].requires_grad_(), args[1]

    def plain(logits, target):
        return F.cross_entropy(logits.float(), target)

    def full(fn, logits):
        logits.grad = None                                   # the driver resets the grad of args[0] only
        fn(logits, target).backward()

    fns = {"kernel": kernel, "eager": plain, "torch.compile": torch.compile(plain)}
    graphs = {name: fn(logits, target) for name, fn in fns.items()}
    own, in_place = logits.detach().clone().requires_grad_(), lambda *args: cross_entropy(
        *args, inplace=True, impl="triton")
    return {"forward": {name: lambda fn=fn: fn(logits.detach(), target) for name, fn in fns.items()},
            "backward": {name: lambda loss=loss: loss.backward(retain_graph=True) for name, loss in graphs.items()},
            "full": {name: lambda fn=fn: full(fn, logits) for name, fn in fns.items()}
            | {"kernel in place": lambda: full(in_place, own)}}
