# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""AdamW for all tensors of a model in one launch, with weight averaging and the gradient's squared norm (batchlaw).

    p *= 1 - lr wd;   g' = scale g;   m = b1 m + (1 - b1) g';   v = b2 v + (1 - b2) g'^2
    p -= lr / (1 - b1^t)  m / (sqrt(v / (1 - b2^t)) + eps);     ema += (1 - ema_decay) (p - ema)

    scale = None                                                          # a training loop that clips:
    if clip: scale = (clip / (squared_norm(grads).sqrt() + 1e-6)).clamp(max=1)
    norm2 = fused_adamw(params, grads, exp_avgs, exp_avg_sqs, step, lr, weight_decay=decays, scale=scale)

Lists of equally many contiguous tensors: p, m, v, ema fp32 and changed in place; g fp32, fp16 or bf16. scale is a
tensor of one element or None: nothing waits for the device. Returns sum of g^2 (of g, not of scale g), an fp32
scalar. The arithmetic is torch.optim.AdamW's: bias corrections in double on the host, the rest fp32. Error: at
most twice that of PyTorch's loop + 8 ulp of the largest element of the tensor; the norm 16 eps sqrt(n).
Models stacked along a first axis, a learning rate each: one call per model, on the slices p[k].

One launch for any list: a table of addresses says where the tensors are, so that parameters stay where the model
made them and gradients where autograd put them. Flat buffers would need no table, but a zeroing and an addition
for gradients that autograd now hands over for nothing. Program by program, owner[pid] is its tensor. The copies
of these lists to the device are cached, do not wait, and are new only when an address is: do not capture a call
in a CUDA graph. Norms are summed in two stages in a fixed order: bit for bit the same each time.

Floor a parameter, b bytes a gradient: 24 + b, with ema 32 + b; squared_norm b; about 16, 19 and 2 FLOPs. One pass
each for decay, m, v, root, division, p (torch's foreach) moves 2-3 times as much.
Source: section 7 of batchlaw's notes.
"""
import functools
import itertools
import math

import torch

from kernels._common import DTYPES, aot_case, assert_kernel, check, launch, tl, triton, use_triton

BLOCK, CHUNK = 2048, 8192                                     # elements at a time, and of a program


# ------------------------------------------------------------------ references
@torch.no_grad()
def fused_adamw_ref(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
                    emas=None, ema_decay=0.999, scale=None):
    """Plain PyTorch, tensor by tensor, in the type of the parameters; the CPU path."""
    (beta1, beta2), norm2 = betas, squared_norm_ref(grads)
    step_size, root = lr / (1 - beta1 ** step), (1 - beta2 ** step) ** 0.5
    for i, (p, g, m, v, decay) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, _decays(weight_decay, params))):
        g = g.to(p.dtype) if scale is None else g.to(p.dtype) * scale
        p.mul_(1 - lr * decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, (v.sqrt() / root).add_(eps), value=-step_size)
        if emas is not None:
            emas[i].lerp_(p, 1 - ema_decay)
    return norm2


@torch.no_grad()
def squared_norm_ref(grads):
    """Plain PyTorch, in fp32 (fp64 for fp64 gradients)."""
    dtype = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    return torch.stack([g.to(dtype).square().sum() for g in grads]).sum()


def _decays(weight_decay, params):
    """One number a tensor, from one for all or a sequence of them."""
    return [weight_decay] * len(params) if isinstance(weight_decay, (int, float)) else list(weight_decay)


# ------------------------------------------------------------------ kernels
# A row of the table: elements, first program, whether four at a time are allowed, addresses (that of g first).
# Each helper reads its row itself: a hint on a value that the caller loaded would hold in both of its branches.
@triton.jit
def _extent(table_ptr, row, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    """The elements of this program, first ... end - 1, of a tensor of n; the last end is n."""
    n = tl.load(table_ptr + row)
    if ALIGNED:
        n = tl.multiple_of(n, 4)
    first = (tl.program_id(0) - tl.load(table_ptr + (row + 1))) * CHUNK
    return n, first, tl.minimum(first + CHUNK, n)


@triton.jit
def _pointer(table_ptr, at, like_ptr, ALIGNED: tl.constexpr):
    """An address of the table as a pointer of the type of like_ptr; hint: 4 elements, in bytes, for any type, so
    that all tensors get one layout."""
    ptr = tl.load(table_ptr + at).to(like_ptr.dtype)
    if ALIGNED:
        ptr = tl.multiple_of(ptr, like_ptr.dtype.element_ty.primitive_bitwidth // 2)
    return ptr


@triton.jit
def _squares(table_ptr, row, g_ptr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Sum of g^2 over the program's elements."""
    n, first, end = _extent(table_ptr, row, ALIGNED, CHUNK)
    g_ptr = _pointer(table_ptr, row + 3, g_ptr, ALIGNED)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        squares += g * g
    return tl.sum(squares, axis=0)


@triton.jit
def _step(table_ptr, row, g_ptr, p_ptr, scale, keep, step_size, root, beta1, rest1, beta2, rest2, eps, rest_ema,
          EMA: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The docstring's formulas on the program's elements, and the sum of g^2. keep: 1 - lr wd; rest1: 1 - b1."""
    n, first, end = _extent(table_ptr, row, ALIGNED, CHUNK)
    g_ptr = _pointer(table_ptr, row + 3, g_ptr, ALIGNED)
    m_ptr = _pointer(table_ptr, row + 5, p_ptr, ALIGNED)
    v_ptr = _pointer(table_ptr, row + 6, p_ptr, ALIGNED)
    ema_ptr = _pointer(table_ptr, row + 7, p_ptr, ALIGNED)
    p_ptr = _pointer(table_ptr, row + 4, p_ptr, ALIGNED)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        p = tl.load(p_ptr + at, mask=mask, other=0.0)
        m = tl.load(m_ptr + at, mask=mask, other=0.0)
        v = tl.load(v_ptr + at, mask=mask, other=0.0)
        squares += g * g
        g *= scale
        d = g - m
        m = tl.where(rest1 < 0.5, m + rest1 * d, g - beta1 * d)               # as torch.lerp
        v = beta2 * v + rest2 * (g * g)
        p = keep * p - step_size * (m / (tl.sqrt(v) / root + eps))
        tl.store(p_ptr + at, p, mask=mask)
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)
        if EMA:
            e = tl.load(ema_ptr + at, mask=mask, other=0.0)
            tl.store(ema_ptr + at, e + rest_ema * (p - e), mask=mask)
    return tl.sum(squares, axis=0)


@triton.jit
def _squared_norm_kernel(table_ptr, owner_ptr, g_ptr, partial_ptr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """One program: the sum of g^2 over CHUNK elements of one tensor. g_ptr is read for its type only."""
    pid = tl.program_id(0).to(tl.int64)
    row = tl.load(owner_ptr + pid).to(tl.int64) * 8
    if tl.load(table_ptr + (row + 2)) != 0:
        squares = _squares(table_ptr, row, g_ptr, True, BLOCK, CHUNK)
    else:
        squares = _squares(table_ptr, row, g_ptr, False, BLOCK // 8, CHUNK)
    tl.store(partial_ptr + pid, squares)


@triton.jit
def _fused_adamw_kernel(table_ptr, owner_ptr, g_ptr, p_ptr, decay_ptr, scale_ptr, partial_ptr, lr, step_size, root,
                        beta1, rest1, beta2, rest2, eps, rest_ema, EMA: tl.constexpr, BLOCK: tl.constexpr,
                        CHUNK: tl.constexpr):
    """One program: CHUNK elements of one tensor, each read once and written once. g_ptr, p_ptr: for their types."""
    pid = tl.program_id(0).to(tl.int64)
    tensor = tl.load(owner_ptr + pid).to(tl.int64)
    keep = 1 - lr * tl.load(decay_ptr + tensor)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    if tl.load(table_ptr + (tensor * 8 + 2)) != 0:
        squares = _step(table_ptr, tensor * 8, g_ptr, p_ptr, scale, keep, step_size, root, beta1, rest1, beta2,
                        rest2, eps, rest_ema, EMA, True, BLOCK, CHUNK)
    else:
        squares = _step(table_ptr, tensor * 8, g_ptr, p_ptr, scale, keep, step_size, root, beta1, rest1, beta2,
                        rest2, eps, rest_ema, EMA, False, BLOCK // 8, CHUNK)
    tl.store(partial_ptr + pid, squares)


# ------------------------------------------------------------------ launch
@functools.lru_cache(maxsize=16)
def _on_device(values, dtype, device, stream):
    """A tuple as a tensor. The copy does not wait; the stream is part of the key, for no other knows of it."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@functools.lru_cache(maxsize=16)
def _owners(sizes, chunk, device, stream):
    """The tensor of each program, (programs,) int32."""
    counts = torch.tensor([-(-n // chunk) for n in sizes])
    return torch.repeat_interleave(torch.arange(len(sizes)), counts).to(torch.int32).to(device, non_blocking=True)


@functools.lru_cache(maxsize=16)
def _table(sizes, addresses, chunk, device, stream):
    """(T, 8) int64; addresses: of all tensors of the first list, then of the second, ..."""
    rows, firsts = [], itertools.accumulate((-(-n // chunk) for n in sizes), initial=0)
    for i, (n, first) in enumerate(zip(sizes, firsts)):
        row = addresses[i::len(sizes)]
        rows += n, first, n % 4 == 0 and not any(a % 16 for a in row), *row, *[0] * (5 - len(row))
    return _on_device(tuple(rows), torch.int64, device, stream)


def _tables(*lists):
    """Table and owners of lists of T tensors, gradients first, an empty partial sum for each program, the device and
    the stream."""
    device = lists[0][0].device
    where = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    sizes, addresses = tuple(x.numel() for x in lists[0]), tuple(x.data_ptr() for xs in lists for x in xs)
    owners = _owners(sizes, CHUNK, *where)
    partial = torch.empty(len(owners), dtype=torch.float32, device=device)
    return _table(sizes, addresses, CHUNK, *where), owners, partial, where


@torch.no_grad()
def _fused_adamw(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, decays, emas, ema_decay, scale):
    grads = [g.contiguous() for g in grads]
    changed = [*params, *exp_avgs, *exp_avg_sqs, *(emas or ())]
    table, owners, partial, where = _tables(grads, params, exp_avgs, exp_avg_sqs, *([] if emas is None else [emas]))
    decays, (beta1, beta2) = _on_device(tuple(map(float, decays)), torch.float32, *where), betas
    scale = None if scale is None else scale.detach().float()
    floats = (lr, lr / (1 - beta1 ** step), math.sqrt(1 - beta2 ** step), beta1, 1 - beta1, beta2, 1 - beta2, eps,
              1 - ema_decay)                                  # never integers: those are specialised
    launch(_fused_adamw_kernel, len(owners), table, owners, grads[0], params[0], decays, scale, partial,
           *map(float, floats), EMA=emas is not None, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=8)
    torch.autograd.graph.increment_version(changed)           # whoever saved a parameter will notice
    return partial.sum()


# ------------------------------------------------------------------ public functions
def fused_adamw(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
                emas=None, ema_decay=0.999, scale=None, *, impl="auto"):
    """One step, number `step` = 1, 2, ... of all tensors, in place; returns the sum of g^2, fp32, on the device.

    weight_decay: one number, or one for each tensor (0 for vectors). impl: "auto" (kernel on CUDA, else
    reference), "triton", "ref"; fp64 parameters take the reference.
    Raises ValueError for wrong lengths, shapes, dtypes, devices, layouts and step < 1.
    """
    states = [params, exp_avgs, exp_avg_sqs] + ([] if emas is None else [emas])
    _check_lists(grads, *states)
    dtype, device = params[0].dtype, params[0].device
    check(dtype in (torch.float32, torch.float64), f"parameters must be float32, got {dtype}")
    check(all(x.dtype == dtype for xs in states for x in xs), f"parameters and states must all be {dtype}")
    check(all(x.is_contiguous() for xs in states for x in xs), "parameters and states must be contiguous")
    check(step >= 1, f"step counts from 1, got {step}")
    check(scale is None or scale.numel() == 1 and scale.device == device, f"scale must be one number on {device}")
    decays = _decays(weight_decay, params)
    check(len(decays) == len(params), f"{len(decays)} weight decays for {len(params)} tensors")
    function = _fused_adamw
    if not all(use_triton(impl, xs[0]) for xs in (params, grads)):
        function = fused_adamw_ref
    return function(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, decays, emas, ema_decay, scale)


@torch.no_grad()
def squared_norm(grads, *, impl="auto"):
    """Sum of squares of all tensors of a list, fp32, on the device; no gradient. impl as in fused_adamw."""
    _check_lists(grads)
    if not use_triton(impl, grads[0]):
        return squared_norm_ref(grads)
    table, owners, partial, _ = _tables(grads := [g.contiguous() for g in grads])
    launch(_squared_norm_kernel, len(owners), table, owners, grads[0], partial, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=8)
    return partial.sum()


def _check_lists(grads, *states):
    """Gradients of one kind, and beside each its parameter and states, of the same shape and device."""
    check(len(grads) >= 1 and all(len(xs) == len(grads) for xs in states), "lists must be equally long, and not empty")
    g = grads[0]
    check(g.dtype in DTYPES + (torch.float64,), f"gradients must be floating point, got {g.dtype}")
    check(all(x.dtype == g.dtype for x in grads), "gradients must all have one dtype")
    shapes = [x.shape for x in grads]
    check(all([x.shape for x in xs] == shapes for xs in states), "a tensor's gradient and states must have its shape")
    check(all(x.device == g.device for xs in (grads, *states) for x in xs), "all tensors must be on one device")


def rule(name, out, ref64, eager, n_reduce):
    """assert_kernel for the norm. The others are not sums, but have rare large elements, so that a limit by the RMS
    value is wrong: maximum and RMS of the error at most twice PyTorch's own in fp32 + 8 ulp of those of the tensor
    (a step can be larger than the parameter that remains)."""
    if out.ndim == 0 or out.numel() == 0:
        return assert_kernel(name, out, ref64, eager, n_reduce)
    assert torch.isfinite(out).all(), f"{name}: not finite"
    error, plain, ulp = (out.double() - ref64).abs(), (eager.double() - ref64).abs(), torch.finfo(out.dtype).eps
    for what, size in (("max", torch.max), ("RMS", lambda x: x.square().mean().sqrt())):
        found, limit = size(error), 2 * size(plain) + 8 * ulp * size(ref64.abs())
        assert found <= limit, f"{name}: {what} error {found:.1e}, allowed {limit:.1e}"


# ------------------------------------------------------------------ compile cases and benchmark
# (blocks, width, vocabulary, positions) of a GPT-2, and the type of the gradients; the first is the 125M model
BENCH_SHAPES = [(12, 768, 50304, 1024, torch.float32), (12, 768, 50304, 1024, torch.bfloat16)]
CHECK_SHAPES = [(2, 24, 31, 5, torch.float32), (2, 64, 1000, 16, torch.float16), (2, 768, 50304, 1024, torch.bfloat16)]
HYPER = dict(step=7, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)


def _shapes(blocks, width, vocab, positions):
    """The tensors of a GPT-2 with a tied head: two embeddings, 12 a block, the last norm."""
    d = width
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(vocab, d), (positions, d), *blocks * block, (d,), (d,)]


def floor(blocks, width, vocab, positions, itemsize):
    """{mode: (bytes, FLOPs)} that any implementation needs; itemsize: of the gradients."""
    n = sum(math.prod(shape) for shape in _shapes(blocks, width, vocab, positions))
    return {"step": ((24 + itemsize) * n, 16 * n), "step, ema": ((32 + itemsize) * n, 19 * n),
            "norm": (itemsize * n, 2 * n)}


def _aot_case(mode, dtype, scaled=False):
    arguments = {"table_ptr": "*i64", "owner_ptr": "*i32", "g_ptr": f"*{dtype}", "partial_ptr": "*fp32"}
    constants, kernel = {"BLOCK": BLOCK, "CHUNK": CHUNK}, _squared_norm_kernel
    if mode != "norm":
        floats = ("lr", "step_size", "root", "beta1", "rest1", "beta2", "rest2", "eps", "rest_ema")
        arguments |= {"p_ptr": "*fp32", "decay_ptr": "*fp32", **dict.fromkeys(floats, "fp32")}
        arguments |= {"scale_ptr": "*fp32"} if scaled else {}
        constants |= {"EMA": mode != "step"} | ({} if scaled else {"scale_ptr": None})
        kernel = _fused_adamw_kernel
    return aot_case(kernel, mode, dtype, (768, 50304, 1024), arguments, {"num_warps": 8}, **constants)


AOT_CASES = [_aot_case("step", "fp32"), _aot_case("step", "bf16", True), _aot_case("step, ema", "fp32", True),
             _aot_case("step, ema", "fp16"), _aot_case("step, ema", "bf16", True), _aot_case("norm", "fp32"),
             _aot_case("norm", "bf16")]


def example(blocks, width, vocab, positions, dtype, device):
    """Arguments (scale, params, grads, exp_avgs, exp_avg_sqs, emas) for checks and benchmarks."""
    gen, shapes = torch.Generator(device).manual_seed(0), _shapes(blocks, width, vocab, positions)

    def normal(size):
        return [size * torch.randn(shape, generator=gen, device=device) for shape in shapes]
    params, grads, exp_avgs, emas = (normal(size) for size in (0.02, 1e-3, 1e-3, 0.02))
    return (torch.tensor(0.7, device=device), params, [g.to(dtype) for g in grads], exp_avgs,
            [x.square() for x in normal(1e-3)], emas)


def _call(fn, scale, params, grads, exp_avgs, exp_avg_sqs, emas, **options):
    """A function's step with the example's numbers: matrices decay, vectors do not."""
    decays = [0.1 if p.ndim > 1 else 0.0 for p in params]
    return fn(params, grads, exp_avgs, exp_avg_sqs, **HYPER, weight_decay=decays, emas=emas, ema_decay=0.99,
              scale=scale, **options)


def outputs(fn, args):
    """{name: tensor} to compare between implementations; the step is taken on copies."""
    scale, *lists = [[x.clone() for x in xs] if isinstance(xs, list) else xs for xs in args]
    names, norm2 = ("p", "g", "m", "v", "ema"), fn(scale, *lists)
    return {"norm2": norm2} | {f"{name}[{i}]": x for name, xs in zip(names, lists) for i, x in enumerate(xs)}


def kernel(*args):
    return _call(fused_adamw, *args, impl="triton")


def reference(*args):
    return _call(fused_adamw_ref, *args)


def _torch_adamw(args, emas, **kind):
    """A step of torch.optim.AdamW, whose gradients must be fp32; then the average, if there is one."""
    _, params, grads, *_ = args
    params = [p.clone() for p in params]
    buffers = [g if g.dtype == torch.float32 else g.float() for g in grads]
    for p, g in zip(params, buffers):
        p.grad = g
    groups = [{"params": [p for p in params if (p.ndim > 1) == matrix], "weight_decay": 0.1 * matrix}
              for matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=HYPER["lr"], betas=HYPER["betas"], eps=HYPER["eps"], **kind)

    def step():
        if buffers[0] is not grads[0]:
            torch._foreach_copy_(buffers, grads)
        optimizer.step()
        if emas is not None:
            torch._foreach_lerp_(emas, params, 0.01)
    return step


def bench(args):
    """{mode: {provider: thunk}}; eager is torch's AdamW(foreach=True) and get_total_norm. torch.compile is left
    out: it takes minutes over so many tensors. Only the kernel returns the norm and takes a scale, too."""
    *state, emas = args
    steps = {mode: {"kernel": lambda e=e: _call(fused_adamw, *state, e, impl="triton"),
                    "eager": _torch_adamw(args, e, foreach=True), "torch fused": _torch_adamw(args, e, fused=True)}
             for mode, e in (("step", None), ("step, ema", emas))}
    return steps | {"norm": {"kernel": lambda: squared_norm(args[2], impl="triton"),
                             "eager": lambda: torch.nn.utils.get_total_norm(args[2], foreach=True)}}
