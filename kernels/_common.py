# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""What every kernel file needs: import guard, dispatch, input checks, block sizes, launch, the error rule."""
import contextlib
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
    HAS_TRITON = True
    INTERPRET = bool(triton.knobs.runtime.interpret)      # TRITON_INTERPRET=1 when triton was first imported
except ImportError:                                       # no triton wheel (macOS, Windows): references only
    triton = SimpleNamespace(jit=lambda fn: fn)
    tl = SimpleNamespace(constexpr=None)
    HAS_TRITON = INTERPRET = False

DTYPES = (torch.float32, torch.float16, torch.bfloat16)   # what the kernels read; fp64 takes the reference


# ------------------------------------------------------------------ dispatch
def use_triton(impl, x, dtypes=DTYPES):
    """Whether to run the kernel: "ref" never, "auto" for CUDA tensors, "triton" always (or a RuntimeError).
    The interpreter runs only when asked for by name: it costs about 2 ms per program, so it is for tests."""
    if impl not in ("auto", "triton", "ref"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'ref', got {impl!r}")
    if impl == "triton":
        if not HAS_TRITON:
            raise RuntimeError("impl='triton' needs the triton package (Linux): pip install triton==3.7.1")
        if not (x.is_cuda or INTERPRET):
            raise RuntimeError(f"impl='triton' needs a CUDA tensor, got one on {x.device}; use impl='ref'")
        *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        check(x.dtype in dtypes, f"the kernel takes {', '.join(most)} or {last}, got {x.dtype}")
        return True
    return impl == "auto" and HAS_TRITON and x.is_cuda and x.dtype in dtypes


def check(condition, message):
    """ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_logits(logits):
    """Logits must be a floating (R, V) matrix with V >= 1; R may be 0."""
    check(logits.ndim == 2, f"logits must be (R, V), got shape {tuple(logits.shape)}")
    check(logits.shape[1] >= 1, "logits need at least one column")
    check(logits.dtype in DTYPES + (torch.float64,), f"logits must be floating point, got {logits.dtype}")


def check_rows(name, x, logits):
    """A per-row argument must be (R,) on the device of the logits."""
    check(x.shape == logits.shape[:1], f"{name} must be ({logits.shape[0]},), got {tuple(x.shape)}")
    check(x.device == logits.device, f"{name} is on {x.device}, logits are on {logits.device}")


# ------------------------------------------------------------------ launch
def last_dim_contiguous(x):
    """The kernels take any row stride (0 too, from expand) but want neighbouring columns side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def block_sizes(n_cols):
    """(BLOCK_R, BLOCK_V, num_warps) of a row-wise kernel: short rows share a program, long ones are looped.
    4096 columns at 8 warps are 16 fp32 values a thread, so that a handful of live tiles fit the registers."""
    block_v = min(4096, max(16, 1 << (n_cols - 1).bit_length()))
    return max(1, 1024 // block_v), block_v, 4 if block_v < 2048 else 8


def launch(kernel, n_programs, x, *args, **meta):
    """kernel[(n_programs,)](x, *args, **meta) on the device of x; unguarded, Triton launches on cuda:0."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[(n_programs,)](x, *args, **meta)


def aot_case(kernel, mode, dtype, size, arguments, options, **constexprs):
    """A compile case with the hints of a real launch: pointers are aligned; ints (here a type, or a value as an
    example) become a constant if 1 and are marked where 16 divides. size: what follows the rows in floor()."""
    signature = {name: kind if isinstance(kind, str) else "i32" for name, kind in arguments.items() if kind != 1}
    aligned = [name for name, kind in arguments.items()
               if (kind[0] == "*" if isinstance(kind, str) else kind % 16 == 0)]
    ones = dict.fromkeys(arguments.keys() - signature.keys(), 1)
    return {"kernel": kernel, "mode": mode, "dtype": dtype, "size": size, "signature": signature,
            "aligned": aligned, "constexprs": {**ones, **constexprs}, "options": options}


def aot_rows(kernel, mode, dtype, V, arguments, **constexprs):
    """aot_case of a row-wise kernel on (R, V) logits."""
    block_r, block_v, warps = block_sizes(V)
    arguments = {"stride_x": V, "R": "i32", "V": V, **arguments}
    return aot_case(kernel, mode, dtype, (V,), arguments, {"num_warps": warps},
                    **constexprs, BLOCK_R=block_r, BLOCK_V=block_v)


# ------------------------------------------------------------------ the error rule
def assert_kernel(name, out, ref64, eager, n_reduce):
    """AssertionError unless `out` is as good as plain PyTorch in the same dtype, measured against fp64.

    out, eager: kernel and reference result; ref64: reference on fp64 inputs; n_reduce: terms of one element.
    Integers: equal. fp32: max|err| <= 16 eps sqrt(n_reduce) RMS(ref).
    fp16, bf16: max|err| <= 2 max|eager err| + 1 ulp of max|ref|, which alone would pass where eager is bad,
    and RMS(err) <= 0.005 or 0.02 RMS(ref), which alone would hide one wrong row.
    """
    assert out.shape == ref64.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref64.shape)}"
    if out.numel() == 0:
        return
    if not out.is_floating_point():
        assert torch.equal(out, ref64), f"{name}: {int((out != ref64).sum())} of {out.numel()} differ"
        return
    assert torch.isfinite(out).all(), f"{name}: not finite"
    error = (out.double() - ref64).abs()
    rms = ref64.square().mean().sqrt()
    eps = torch.finfo(out.dtype).eps
    if out.dtype == torch.float32:
        limit = 16 * eps * max(n_reduce, 1) ** 0.5 * rms
    else:
        limit = 2 * (eager.double() - ref64).abs().max() + eps * ref64.abs().max()
        ratio, bound = error.square().mean().sqrt() / rms.clamp(min=1e-30), 2e-2 if eps > 5e-3 else 5e-3
        assert ratio <= bound, f"{name}: RMS error {ratio:.1e} of the RMS value, allowed {bound:.0e}"
    assert error.max() <= limit, f"{name}: max error {error.max():.1e}, allowed {limit:.1e}"
