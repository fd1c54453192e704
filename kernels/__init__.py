# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Triton kernels, one operation per file, each with a plain PyTorch reference; see README.md here."""
import functools
import importlib

import torch


def checked(name, impl="auto"):
    """The operation kernels.<name>.<name>, which at its first call with a dtype compares itself with its reference.

    The comparison runs on copies of the real tensors: every output, the gradient of the first output with respect
    to the first argument, and the tensors in arguments that are lists, which are changed in place. Outside the
    error rule of _common.assert_kernel, or the operation's own `rule`, it raises AssertionError.
    """
    module = importlib.import_module(f"kernels.{name}")
    from kernels._common import assert_kernel

    rule = getattr(module, "rule", assert_kernel)
    kernel, reference = functools.partial(getattr(module, name), impl=impl), getattr(module, f"{name}_ref")
    compared = set()  # dtypes of the first argument

    def operation(*args, **options):
        first = args[0] if torch.is_tensor(args[0]) else args[0][0]
        if first.dtype not in compared:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):  # a checkpoint's would count these
                results = [outcome(f, args, options, dtype) for f, dtype in (
                    (kernel, None), (reference, torch.float64), (reference, None))]
            for i, (out, ref64, eager) in enumerate(zip(*results)):
                rule(f"{name}, output {i}", out, ref64, eager, first.numel())
            compared.add(first.dtype)
        return kernel(*args, **options)

    return operation


def cast(args, dtype):
    """Detached copies of the arguments, also inside lists, floating-point tensors in dtype (None: their own)."""
    return [type(a)(cast(a, dtype)) if isinstance(a, (list, tuple)) else
            a.detach().to(dtype or a.dtype, copy=True) if torch.is_tensor(a) and a.is_floating_point() else a
            for a in args]


def outcome(function, args, options, dtype):
    """Outputs on copies of the arguments in dtype, the first argument's gradient, where there is one, and what the
    tensors in lists have become."""
    copies, options = cast(args, dtype), dict(zip(options, cast(options.values(), dtype)))
    lists = [xs for xs in (*copies, *options.values()) if isinstance(xs, (list, tuple))]
    if torch.is_tensor(copies[0]):
        copies[0].requires_grad_(copies[0].is_floating_point())
    outputs = function(*copies, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs[0].sum(), copies[:1]) if outputs[0].requires_grad else ()
    return [*(out.detach() for out in outputs), *grads, *(x for xs in lists for x in xs if torch.is_tensor(x))]
