# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""What Triton's interpreter gets wrong, or differently from a GPU, and these kernels are written around.

A failure here after an upgrade is news, not a bug: read the test, then drop the workaround or the test.
A bug that must be caught here: a masked_load test without its mask (the zeros become ones).
"""
import pytest
import torch

from kernels._common import INTERPRET, tl, triton

pytestmark = [pytest.mark.skipif(not INTERPRET, reason="these are about the interpreter"),
              pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@triton.jit
def _multiply_add(x_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    x = tl.load(x_ptr + lane)
    tl.store(out_ptr + lane, x * x + x)


def test_bf16_arithmetic_is_garbage():
    """So: cast to fp32 right after every load."""
    x = torch.linspace(0.5, 2, 16).bfloat16()
    out = torch.zeros_like(x)
    _multiply_add[(1,)](x, out, 16)
    assert not torch.allclose(out.float(), (x * x + x).float(), rtol=0.5)


@triton.jit
def _cast(x_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out_ptr + lane, tl.load(x_ptr + lane).to(out_ptr.dtype.element_ty))


def test_bf16_stores_truncate_and_fp16_stores_round():
    """So: one ulp for bf16 in assert_kernel; its rounding is tested on a GPU only."""
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    for dtype, share in ((torch.bfloat16, 0.5), (torch.float16, 0.0)):
        out = torch.zeros(1024, dtype=dtype)
        _cast[(1,)](x, out, 1024)
        assert (out != x.to(dtype)).float().mean().item() == pytest.approx(share, abs=0.05)
        assert (out.float().abs() <= x.abs()).all() == (dtype == torch.bfloat16)


@triton.jit
def _maximum(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr, tl.max(x, axis=0))


def test_max_ignores_nan():
    """So: a NaN logit reaches the results through the sum of exponentials, not through the maximum."""
    out = torch.zeros(1)
    _maximum[(1,)](torch.tensor([1.0, float("nan"), 3.0, 2.0]), out, 4)
    assert out.item() == 3.0


@triton.jit
def _method_on_scalar(out_ptr, value):
    tl.store(out_ptr, value.to(tl.float32))


def test_float_arguments_are_python_floats():
    """So: alpha and beta are only multiplied, never `.to(...)`."""
    with pytest.raises(Exception, match="no attribute 'to'"):
        _method_on_scalar[(1,)](torch.zeros(1), 0.5)


@triton.jit
def _offsets(out_ptr, stride):
    row = tl.program_id(0) + 700001
    tl.store(out_ptr, row * stride)
    tl.store(out_ptr + 1, row.to(tl.int64) * stride)


def test_int32_offsets_wrap_as_on_a_gpu():
    """So: the test with a row stride of 2**30 means something, and rows are int64 before the product."""
    out = torch.zeros(2, dtype=torch.int64)
    _offsets[(1,)](out, 4096)
    assert out.tolist() == [700001 * 4096 - 2 ** 32, 700001 * 4096]


@triton.jit
def _count(out_ptr):
    tl.store(out_ptr, tl.load(out_ptr) + 1)


def test_races_are_invisible():
    """So: no program of these kernels reads what another one writes; the interpreter would not tell."""
    out = torch.zeros(1)
    _count[(64,)](out)
    assert out.item() == 64                                       # a GPU loses most of these


@triton.jit
def _masked_load(x_ptr, out_ptr, n, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out_ptr + lane, tl.load(x_ptr + lane, mask=lane < n))


def test_masked_load_without_other_is_zero():
    """So: a forgotten `other=` can pass here; every masked load states it (undefined on a GPU)."""
    out = torch.full((8,), 7.0)
    _masked_load[(1,)](torch.ones(8), out, 3, 8)
    assert out.tolist() == [1.0] * 3 + [0.0] * 5


@triton.jit
def _dot(x_ptr, out_ptr, N: tl.constexpr):
    tile = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + tile)
    tl.store(out_ptr + tile, tl.dot(x, x, input_precision="ieee"))


def test_bf16_dot_is_garbage_and_fp32_dot_is_exact():
    """So: kron_quant holds bf16 values in fp32 here (WIDE) and rounds them by hand; tf32 shows on a GPU only."""
    x, out = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.zeros(16, 16)
    _dot[(1,)](x, out, 16)
    assert not torch.allclose(out, x.float() @ x.float(), rtol=0.5)
    _dot[(1,)](x.float() + 1e-3, out, 16)
    torch.testing.assert_close(out, (x.float() + 1e-3) @ (x.float() + 1e-3), rtol=1e-6, atol=1e-6)


@triton.jit
def _round_and_divide(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    quotient = tl.div_rn(tl.load(x_ptr + lane), tl.load(y_ptr + lane))
    tl.store(out_ptr + lane, quotient)
    tl.store(out_ptr + N + lane, (quotient + 12582912.0) - 12582912.0)


def test_division_and_rounding_are_those_of_torch():
    """So: kron_quant's codes can be compared with the reference's; libdevice.rint does not exist here."""
    gen = torch.Generator().manual_seed(0)
    x, y, out = 50 * torch.randn(4096, generator=gen), torch.rand(4096, generator=gen) + 0.1, torch.zeros(2, 4096)
    x[:32], y[:32] = torch.arange(-16, 16) + 0.5, 1.0                        # ties
    _round_and_divide[(1,)](x, y, out, 4096)
    assert torch.equal(out[0], x / y) and torch.equal(out[1], (x / y).round())


@triton.jit
def _nibbles(x_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    byte = tl.load(x_ptr + lane).to(tl.int8, bitcast=True)
    tl.store(out_ptr + lane, (byte << 4) >> 4)
    tl.store(out_ptr + N + lane, byte >> 4)


def test_int8_shifts_drop_high_bits_and_keep_the_sign():
    """So: int4_gemm unpacks a byte by shifts. Python's own integers would keep the high bits."""
    out = torch.zeros(2, 256, dtype=torch.int8)
    _nibbles[(1,)](torch.arange(256).to(torch.uint8), out, 256)
    signed = torch.cat([torch.arange(8), torch.arange(-8, 0)])
    assert torch.equal(out[0].long(), signed.repeat(16)) and torch.equal(out[1].long(), signed.repeat_interleave(16))
