# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/int4_gemm.py against integer arithmetic, bit for bit.

A bug that must be caught here: `(a << 4) >> 4` -> `a & 15` (the low nibble without its sign).
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import int4_gemm as op
from kernels.int4_gemm import int4_gemm, int4_gemm_ref, pack, unpack

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 2), (3, 5, 34), (16, 32, 256), (17, 33, 258), (70, 65, 130), (130, 40, 96)]
BLOCKS = [(16, 16, 32), (32, 16, 64), (16, 64, 32), (64, 64, 128)]
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def integers(qa, sa, qw, sw, bias=None):
    """The docstring's formula on int64 codes taken from the bytes by arithmetic, rounded to fp32 at each step."""
    codes = []
    for q in (qa, qw):
        nibbles = torch.stack([q.cpu().long() % 16, q.cpu().long() // 16], dim=-1).flatten(-2)
        codes.append(torch.where(nibbles > 7, nibbles - 16, nibbles))
    y = (codes[0] @ codes[1].T).float() * sa.cpu()[:, None] * sw.cpu()
    return y if bias is None else y + bias.cpu()


def agree(qa, sa, qw, sw, bias=None, dtype=torch.float32):
    """Equal in every bit; the interpreter's bf16 stores truncate, so one ulp there."""
    y, exact = int4_gemm(qa, sa, qw, sw, bias, dtype=dtype, impl="triton"), integers(qa, sa, qw, sw, bias)
    assert y.dtype == dtype and torch.equal(int4_gemm_ref(qa, sa, qw, sw, bias, dtype).cpu(), exact.to(dtype))
    if dtype == torch.bfloat16:
        assert ((y.cpu().float() - exact).abs() <= 2 ** -7 * exact.abs()).all()
    else:
        assert torch.equal(y.cpu(), exact.to(dtype))


# ------------------------------------------------------------------ storage
def test_pack_and_unpack_are_inverse():
    every_byte = torch.arange(256).to(torch.uint8)
    assert torch.equal(pack(unpack(every_byte[:, None])), every_byte[:, None])
    pairs = torch.cartesian_prod(*2 * [torch.arange(-8, 8).to(torch.int8)])                # (256, 2)
    assert torch.equal(unpack(pack(pairs)), pairs)
    codes = torch.randint(-8, 8, (3, 4, 10), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(unpack(pack(codes)), codes) and pack(codes).shape == (3, 4, 5)
    assert torch.equal(unpack(pack(codes.mT.contiguous().mT)), codes)
    assert pack(codes[:0]).shape == (0, 4, 5) and torch.equal(unpack(pack(codes)[..., ::2])[..., 2], codes[..., 4])


def test_low_nibble_is_the_even_index():
    assert pack(torch.tensor([1, -1, -8, 7], dtype=torch.int8)).tolist() == [0xF1, 0x78]


@pytest.mark.parametrize("codes, message", [
    (torch.zeros(4), "must be int8"), (torch.zeros(2, 3, dtype=torch.int8), "even"),
    (torch.tensor([8, 0], dtype=torch.int8), "-8 ... 7"), (torch.tensor([0, -9], dtype=torch.int8), "-8 ... 7"),
])
def test_pack_errors(codes, message):
    with pytest.raises(ValueError, match=message):
        pack(codes)
    with pytest.raises(ValueError, match="must be uint8"):
        unpack(codes)


# ------------------------------------------------------------------ kernel against integers
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_forward(device, M, N, K, dtype):
    *args, bias, _ = op.example(M, N, K, dtype, device)
    agree(*args, None, dtype)
    agree(*args, bias, dtype)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_each_block_size_alone(device, monkeypatch, blocks):
    tiles = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_H"), blocks)), {"num_warps": 4, "enable_fp_fusion": False}
    monkeypatch.setattr(op, "tiles", lambda M, H: tiles)
    agree(*op.example(50, 41, 138, torch.float32, device))


def test_extreme_sums(device):
    """64 K at K = 14336 is 917504, beyond fp16, and odd sums keep their last digit."""
    qa, sa, qw, sw, _, _ = op.example(3, 4, 14336, torch.float32, device)
    qa[0], qw[0], qa[1], qw[1] = 0x88, 0x88, 0x77, 0x77                                   # -8 and 7
    agree(qa, sa, qw, sw)
    ones = torch.ones(4, device=device)
    y = int4_gemm(qa, ones[:3], qw, ones, impl="triton")
    assert y[:2, :2].tolist() == [[64 * 14336, -56 * 14336], [-56 * 14336, 49 * 14336]]
    assert int4_gemm(qa, ones[:3] / 2 ** 10, qw, ones, dtype=torch.float16, impl="triton")[0, 0] == 896


def test_product_and_bias_are_rounded_one_after_the_other(device):
    """A fused multiply-add would give 2**-24 here: (1 + 2**-12)**2 rounds to 1 + 2**-11 first."""
    q, s = torch.tensor([[1]], dtype=torch.uint8, device=device), torch.tensor([1 + 2 ** -12], device=device)
    y = int4_gemm(q, s, q, s, -torch.tensor([1 + 2 ** -11], device=device), impl="triton")
    assert y.item() == 0.0


@pytest.mark.parametrize("layout", ["padded", "transposed", "expanded", "every other"])
def test_strides(device, layout):
    """Views into bytes of 0x77, which no kernel may read."""
    qa, sa, qw, sw, bias, _ = op.example(8, 12, 40, torch.float32, device)

    def view(q):
        buffer = torch.full((len(q) + 2, q.shape[1] + 8), 0x77, dtype=torch.uint8, device=device)
        buffer[1:-1, 3:-5] = q
        return {"padded": buffer[1:-1, 3:-5], "transposed": q.T.contiguous().T, "expanded": q[:1].expand(q.shape),
                "every other": q.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]}[layout]
    agree(view(qa), sa.repeat_interleave(2)[::2], view(qw), sw[:1].expand(12), bias.flip(0))


def test_a_quantized_layer_is_the_layer_on_dequantized_tensors(device):
    """kron_quant of activations with P and of weights with P^-T, multiplied: x W^T up to the quantization."""
    from kernels.kron_quant import kron_quant
    gen = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 12 * 16, generator=gen).to(device) for n in (9, 20))
    p1, p2 = (torch.eye(n) + 0.3 * torch.randn(n, n, generator=gen) / n ** 0.5 for n in (12, 16))
    one = torch.ones(1, 2, device=device)
    (qa, sa), (qw, sw) = (kron_quant(t, *(p.to(device) for p in ps), one, impl="triton") for t, ps in (
        (x, (p1, p2)), (w, (p1.inverse().T, p2.inverse().T))))
    y = int4_gemm(qa[0], sa[0], qw[0], sw[0], impl="triton")
    a, b = (unpack(q[0]).double() * s[0].double()[:, None] for q, s in ((qa, sa), (qw, sw)))
    torch.testing.assert_close(y.double(), a @ b.T, rtol=1e-5, atol=1e-5)
    exact = x.double() @ w.double().T
    assert (y - exact).square().mean() < 0.1 * exact.square().mean()                     # unrelated: about 2


# ------------------------------------------------------------------ special cases, dispatch, errors
@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("M, N", [(0, 5), (5, 0)])
def test_nothing_to_do_and_no_gradient(device, impl, M, N):
    *args, bias, _ = op.example(M, N, 10, torch.float32, device)
    y = int4_gemm(*args, bias.requires_grad_(), dtype=torch.float16, impl=impl)
    assert y.shape == (M, N) and y.dtype == torch.float16 and not y.requires_grad


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_a_nan_scale_stays_in_its_row(device, impl):
    qa, sa, qw, sw, bias, _ = op.example(4, 5, 10, torch.float32, device)
    sa[1] = float("nan")
    assert int4_gemm(qa, sa, qw, sw, bias, impl=impl).isnan().all(1).tolist() == [False, True, False, False]


def test_dispatch_cpu_uses_ref(monkeypatch):
    def launched(*args):
        raise AssertionError("the kernel ran on a CPU tensor")
    monkeypatch.setattr(op, "_int4_gemm", launched)
    *args, _ = op.example(3, 5, 10, torch.float32, "cpu")
    assert torch.equal(int4_gemm(*args), int4_gemm_ref(*args))
    with pytest.raises(ValueError, match="impl must be"):
        int4_gemm(*args, impl="cuda")


@pytest.mark.parametrize("change, message", [
    ({0: torch.zeros(3, 5)}, "qa must be a uint8"), ({2: torch.zeros(5, dtype=torch.uint8)}, "qw must be a uint8"),
    ({1: torch.zeros(4)}, "sa must be"), ({3: torch.zeros(5, 1)}, "sw must be"), ({4: torch.zeros(3)}, "bias must be"),
    ({0: torch.zeros(3, 4, dtype=torch.uint8)}, "rows of 4 and 5 bytes"), ({1: torch.zeros(3).half()}, "float32"),
    ({1: torch.zeros(3).double()}, "float32"), ({4: torch.zeros(5).long()}, "float32"),
    ({0: torch.zeros(3, 0, dtype=torch.uint8), 2: torch.zeros(5, 0, dtype=torch.uint8)}, "K must be"),
    ({0: torch.zeros(3, 2 ** 17, dtype=torch.uint8), 2: torch.zeros(5, 2 ** 17, dtype=torch.uint8)}, "K must be"),
    ({3: torch.zeros(5, device="meta")}, "one device"),
])
def test_errors(change, message):
    *args, _ = op.example(3, 5, 10, torch.float32, "cpu")
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        int4_gemm(*args)


def test_dtypes_that_the_kernel_does_not_write(device):
    *args, _ = op.example(3, 5, 10, torch.float32, device)
    with pytest.raises(ValueError, match="dtype must be"):
        int4_gemm(*args, dtype=torch.int32)
    doubles = [x.double() if x.is_floating_point() else x for x in args]
    assert int4_gemm(*doubles).dtype == torch.float64
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        int4_gemm(*doubles, impl="triton")


# ------------------------------------------------------------------ large tensors
FAR_ROWS = """
import mmap, tempfile, torch
from kernels import int4_gemm, kron_quant
file = tempfile.TemporaryFile()
file.truncate(2**32 + 2**12)                    # sparse: 4 GB of addresses, a few pages of memory
memory = mmap.mmap(file.fileno(), 0)
x = torch.frombuffer(memory, dtype=torch.float16).as_strided((3, 24), (2**30, 1))
q, s, w, sw, _, _ = int4_gemm.example(3, 5, 36, torch.float32, "cpu")
far = torch.frombuffer(memory, dtype=torch.uint8)[64:].as_strided((3, 18), (2**31, 1))
for x, ops in ((x.copy_(torch.randn(3, 24)), kron_quant), (far.copy_(q), int4_gemm)):
    rest = (torch.eye(4), torch.eye(6), torch.ones(1, 2)) if ops is kron_quant else (s, w, sw)
    fn = getattr(ops, ops.__name__.split(".")[1])
    near, out = fn(x.contiguous(), *rest, impl="ref"), fn(x, *rest, impl="triton")
    print(all(map(torch.equal, near, out)))
    if ops is kron_quant:                       # the other kernel as well
        blocks = dict.fromkeys(("BLOCK_1", "BLOCK_I", "BLOCK_J", "BLOCK_K"), 16)
        ops.plan = lambda *a: (ops._kron_quant_tiled_kernel, 1, blocks, {})
        print(all(map(torch.equal, near, fn(x, *rest, impl="triton"))))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; a GPU has a test of its own")
def test_row_offsets_beyond_int32():
    """Both kernels of kron_quant too. In a process of its own: a wrapped offset may crash it."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", FAR_ROWS], env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == 3 * ["True"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, K", [(1, 4096, 14336), (48, 576, 1536), (2047, 1536, 4096), (300, 31, 1022)])
def test_gpu_large_and_repeatable(M, N, K, dtype):
    args = op.example(M, N, K, dtype, "cuda")
    exact = integers(*args[:-1]).to(dtype)
    for _ in range(10):
        assert torch.equal(op.kernel(*args).cpu(), exact)


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    M, N = 2 ** 16 + 1, 2 ** 15
    qa, qw = (torch.full((n, 1), 0x01, dtype=torch.uint8, device="cuda") for n in (M, N))
    qa[-1] = 0x07
    y = int4_gemm(qa, torch.ones(M, device="cuda"), qw, torch.ones(N, device="cuda"), dtype=torch.float16)
    assert (y[-1] == 7).all() and (y[:-1] == 1).all()
