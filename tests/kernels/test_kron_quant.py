# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/kron_quant.py against its reference, torch.kron and plain Python.

A bug that must be caught here: `one[None, :] * N1 + one[:, None]` with its two indices swapped (P1 for P1^T).
"""
import pytest
import torch

from kernels import kron_quant as op
from kernels.int4_gemm import pack, unpack
from kernels.kron_quant import kron_quant, kron_quant_ref, plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = [(3, 24, 24, 3), (2, 32, 48, 1), (5, 9, 64, 3), (1, 12, 16, 1), (4, 3, 6, 3), (2, 1, 2, 1), (2, 40, 2, 1),
         (1, 112, 128, 1), (1, 128, 224, 3)]                      # the last two: tiled in fp32; tiled in every type
ON_CHIP = [(1, 32, 64), (2, 32, 64), (4, 64, 64)]                 # tokens, block 1, block 2
TILED = [(32, 16, 16, 16), (32, 32, 16, 64), (64, 16, 64, 32), (32, 32, 64, 16)]   # block 1, i, j, k
LAYOUTS = ("transposed", "expanded rows", "expanded columns", "offset", "every other")
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def agree(x, p1, p2, clip, c=None):
    """Kernel against reference by the rule of the file, and the rule's fp64 side against torch.kron."""
    out, eager = kron_quant(x, p1, p2, clip, c, impl="triton"), kron_quant_ref(x, p1, p2, clip, c)
    doubles = [None if t is None else t.double() for t in (x, p1, p2, clip, c)]
    ref64 = kron_quant_ref(*doubles)
    assert [t.dtype for t in out] == [torch.uint8, torch.float32]
    assert out[0].shape == (len(clip), len(x), x.shape[1] // 2)
    for name, *results in zip(("codes", "scale"), out, ref64, eager):
        op.rule(name, *results, n_reduce=x.shape[1])
    return unpack(out[0]), out[1]


def brute_force(x, p1, p2, clip, c):
    """Bytes and scales of one token by plain Python; the product of the two factors by torch.kron."""
    y = (torch.tensor([a * b for a, b in zip(x, c)], dtype=p1.dtype) @ torch.kron(p1, p2)).tolist()
    found = []
    for up, down in clip:
        scale = max(up * max(0.0, *y), down * -min(0.0, *y)) / 7 or 1.0
        codes = [min(7, max(-8, round(value / scale))) for value in y]        # Python's round: ties to even
        found.append(([a % 16 + 16 * (b % 16) for a, b in zip(codes[::2], codes[1::2])], scale))
    return found


# ------------------------------------------------------------------ the reference
@pytest.mark.parametrize("n1, n2", [(2, 4), (3, 4), (5, 2), (1, 6)])
def test_reference_equals_brute_force(n1, n2):
    x, p1, p2, clip, c = (t.double() for t in op.example(6, n1, n2, 3, torch.float32, "cpu"))
    x[1], x[2], x[3] = 0, x[2].abs(), -x[3].abs()
    codes, scale = kron_quant_ref(x, p1, p2, clip, c)
    for t in range(6):
        for g, (expected, s) in enumerate(brute_force(x[t].tolist(), p1, p2, clip.tolist(), c.tolist())):
            assert codes[g, t].tolist() == expected and scale[g, t].item() == pytest.approx(s, rel=1e-12)


# ------------------------------------------------------------------ kernel against reference
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, n1, n2, G", SIZES)
def test_forward(device, T, n1, n2, G, dtype):
    agree(*op.example(T, n1, n2, G, dtype, device))


@pytest.mark.parametrize("dtype, slack", [(torch.float32, 1e-4), (torch.float16, 0.02)])
def test_dequantized_codes_are_near_the_kronecker_product(device, dtype, slack):
    """Without clipping no value is further than half a step; asymmetric factors, 32 x 48."""
    x, p1, p2, clip, _ = op.example(3, 32, 48, 1, dtype, device)
    codes, scale = agree(x, p1, p2, torch.ones_like(clip))
    y = x.double() @ torch.kron(p1.double(), p2.double())
    steps = (codes[0] - y / scale[0, :, None]).abs()
    assert steps.max() <= 0.5 + slack and codes.min() >= -7
    for wrong in (torch.kron(p1.T.contiguous(), p2), torch.kron(p1, p2.T.contiguous()), torch.kron(p2, p1)):
        assert (codes[0] - (x.double() @ wrong.double()) / scale[0, :, None]).abs().max() > 3


@pytest.mark.parametrize("blocks", ON_CHIP + TILED)
def test_each_block_size_alone(device, monkeypatch, blocks):
    names = {3: ("TOKENS", "BLOCK_1", "BLOCK_2"), 4: ("BLOCK_1", "BLOCK_I", "BLOCK_J", "BLOCK_K")}[len(blocks)]
    kernel = op._kron_quant_kernel if len(blocks) == 3 else op._kron_quant_tiled_kernel
    tokens = blocks[0] if len(blocks) == 3 else 1
    args = op.example(5, 20, 36, 3, torch.float32, device)
    args[0][3] = 0
    monkeypatch.setattr(op, "plan", lambda *a: (kernel, tokens, dict(zip(names, blocks)), {"num_warps": 4}))
    agree(*args)
    args[0][1, 700] = float("nan")                                # the tiled sweep sees it in the last block only
    codes, scale = kron_quant(*args, impl="triton")
    assert scale.isnan().any(0).tolist() == [False, True, False, False, False] and not codes[:, 1].any()


def test_reads_nothing_outside(device, nan_padded):
    x, *rest = op.example(3, 9, 20, 1, torch.float32, device)
    agree(nan_padded(x), *rest)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device, layout):
    x, p1, p2, clip, c = op.example(8, 5, 8, 3, torch.float32, device)
    views = {"transposed": x.T.contiguous().T, "expanded rows": x[:1].expand(8, 40),
             "expanded columns": x[:, :1].expand(8, 40), "offset": x.flatten()[7:].unfold(0, 40, 40)[:7],
             "every other": x.repeat_interleave(2, 1)[::2, ::2]}
    agree(views[layout], p1.T, p2.T, clip[:1].expand(3, 2), c.flip(0))
    agree(views[layout], p1[:1].expand(5, 5), p2.T.contiguous().T, clip.T.contiguous().T, c[:1].expand(40))


def test_factors_and_thresholds_of_other_types_are_cast(device):
    x, p1, p2, clip, c = op.example(3, 4, 6, 3, torch.float16, device)
    rounded = agree(x, p1, p2, clip, c)
    given = agree(x, p1.double(), p2.float(), clip.double(), c.double())
    assert all(map(torch.equal, rounded, given))


# ------------------------------------------------------------------ the quantizer
def identity(rows, device, clip=((1.0, 1.0),), dtype=torch.float32):
    """Codes and scales of rows that no transform changes (2 x 4)."""
    x = torch.tensor(rows, dtype=dtype, device=device)
    eye = [torch.eye(n, dtype=dtype, device=device) for n in (2, 4)]
    return agree(x, *eye, torch.tensor(clip, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_even(device, dtype):
    codes, scale = identity([[7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5], [-7, 3.5, 4.5, 5.5, -3.5, -4.5, -5.5, -6.5]],
                            device, dtype=dtype)
    assert scale.tolist() == [[1, 1]]
    assert codes[0].tolist() == [[7, 0, 2, 2, 0, -2, -2, 6], [-7, 4, 4, 6, -4, -4, -6, -6]]


def test_each_sign_has_its_own_threshold_and_the_range_holds_zero(device):
    row = [14.0, 3.0, 1.0, 0.0, -28.0, -7.0, -1.0, 2.0]
    codes, scale = identity([row, [abs(v) for v in row], [-abs(v) for v in row]], device,
                            ((1.0, 1.0), (0.5, 0.0625), (0.0625, 0.5)))
    assert scale.tolist() == [[4, 4, 4], [1, 2, 0.25], [2, 0.25, 2]]
    assert codes[1, 0].tolist() == [7, 3, 1, 0, -8, -7, -1, 2]    # clipped at both ends
    assert codes[0, 2].max() == 0 and codes[0, 1].min() == 0


def test_zero_tokens_have_scale_one_and_a_padded_block_adds_nothing(device):
    x, p1, p2, clip, _ = op.example(4, 9, 20, 1, torch.float32, device)
    x[1], x[3] = 0, -0.0
    codes, scale = agree(x, p1, p2, clip)
    assert scale[0, 1::2].tolist() == [1, 1] and not codes[0, 1::2].any()
    eye = torch.eye(9, device=device), torch.eye(20, device=device)           # all values positive, smallest 5:
    codes, scale = agree(x.abs() + 5, *eye, torch.ones(1, 2, device=device))  # the zeros of padding are in range
    torch.testing.assert_close(scale[0], (x.abs() + 5).amax(1) / 7)


@pytest.mark.parametrize("dtype, factors", [(torch.float32, (1e30, 1e-30, 3e4)), (torch.float16, (1e3, 1e-3, 1)),
                                            (torch.bfloat16, (1e30, 1e-30, 3e4))])
def test_extreme_magnitudes(device, dtype, factors):
    x, *rest = op.example(4, 6, 8, 3, dtype, device)
    x[:3] *= torch.tensor(factors, device=device).to(dtype)[:, None]
    codes, scale = agree(x, *rest)
    assert (codes.abs().amax(-1) >= 7).all()


@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "overflow"])
def test_a_token_that_is_not_finite_is_loud_and_alone(device, impl, bad):
    x, p1, p2, clip, c = op.example(4, 6, 8, 3, torch.float16, device)
    if bad == "overflow":
        p2[:, 1] = 2.0                                            # the sum of eight times 6e4 overflows fp16
    good = kron_quant(x, p1, p2, clip, c, impl=impl)
    if bad == "overflow":
        x[2] = 6e4 / c.max()
    else:
        x[2, 5] = bad
    codes, scale = kron_quant(x, p1, p2, clip, c, impl=impl)
    assert scale[:, 2].isnan().all() and not codes[:, 2].any()
    others = [0, 1, 3]
    assert torch.equal(codes[:, others], good[0][:, others]) and torch.equal(scale[:, others], good[1][:, others])


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_groups_are_independent_and_tokens_too(device, impl):
    x, p1, p2, clip, c = op.example(5, 6, 8, 3, torch.float32, device)
    codes, scale = kron_quant(x, p1, p2, clip, c, impl=impl)
    for g in range(3):
        alone = kron_quant(x, p1, p2, clip[g:g + 1], c, impl=impl)
        assert torch.equal(alone[0][0], codes[g]) and torch.equal(alone[1][0], scale[g])
    one = kron_quant(x[2:3], p1, p2, clip, c, impl="triton")
    assert torch.equal(one[0], codes[:, 2:3])
    torch.testing.assert_close(one[1], scale[:, 2:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_no_tokens_and_no_gradient(device, impl):
    x, *rest = op.example(0, 6, 8, 3, torch.float16, device)
    codes, scale = kron_quant(x, *rest, impl=impl)
    assert codes.shape == (3, 0, 24) and scale.shape == (3, 0) and scale.dtype == torch.float32
    args = [t.requires_grad_() for t in op.example(2, 6, 8, 3, torch.float32, device)]
    assert not kron_quant(*args, impl=impl)[1].requires_grad


# ------------------------------------------------------------------ plan and rule
def test_plan():
    on_chip, tiled = op._kron_quant_kernel, op._kron_quant_tiled_kernel
    consumer, data_center = 101_376, 166_912                      # shared memory of sm_86 and sm_80
    assert [plan(112, 128, 2, 9, shared)[0] for shared in (2 ** 16, consumer, data_center)] == [tiled, tiled, on_chip]
    assert plan(64, 128, 2, 9, consumer)[0] == on_chip and plan(64, 128, 2, 9, 2 ** 16)[0] == tiled
    assert plan(32, 48, 4, 9, 2 ** 16)[0] == on_chip and plan(64, 64, 4, 9, data_center)[0] == tiled
    assert [plan(24, 24, 2, T, 2 ** 16)[1] for T in (1, 8191, 8192)] == [1, 1, 8]
    for n1, n2 in ((1, 2), (9, 64), (86, 128), (128, 224), (112, 128)):
        for itemsize in (2, 4):
            *_, blocks, options = plan(n1, n2, itemsize, 10, data_center)
            sizes = [value for name, value in blocks.items() if name != "TOKENS"]
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes) and blocks["BLOCK_1"] >= n1
            assert blocks.get("BLOCK_2", n2) >= n2 and options["num_warps"] in (2, 4, 8)


def test_rule_accepts_rounding_and_rejects_bugs():
    exact = torch.randint(-7, 7, (1, 50, 60), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    few, many, far = exact.clone(), exact.clone(), exact.clone()
    few[0, 3, :3] += 1                                            # 3 of 3000
    many[0, 3, :4] += 1
    far[0, 3, 3] = exact[0, 3, 3] - 2 if exact[0, 3, 3] > 0 else exact[0, 3, 3] + 2
    op.rule("few", pack(few), pack(exact), pack(exact), 1)
    for bad in (pack(many), pack(far), pack(exact)[:, 1:]):
        with pytest.raises(AssertionError, match="bad"):
            op.rule("bad", bad, pack(exact), pack(exact), 1)
    scale, eager = torch.linspace(0.1, 9, 50), torch.linspace(0.1, 9, 50) * (1 + 1e-3)
    op.rule("scale", scale * (1 - 1e-3), scale.double(), eager, 1)
    one_wrong, nan = scale.clone(), scale.clone()
    one_wrong[0] *= 1.003
    nan[7] = float("nan")
    for bad in (one_wrong, nan):
        with pytest.raises(AssertionError, match="bad"):
            op.rule("bad", bad, scale.double(), eager, 1)
    op.rule("none", pack(exact[:, :0]), pack(exact[:, :0]), pack(exact[:, :0]), 1)


# ------------------------------------------------------------------ dispatch, errors
def test_dispatch_cpu_uses_ref(monkeypatch):
    def launched(*args):
        raise AssertionError("the kernel ran on a CPU tensor")
    monkeypatch.setattr(op, "_kron_quant", launched)
    args = op.example(3, 4, 6, 3, torch.float16, "cpu")
    assert all(map(torch.equal, kron_quant(*args), kron_quant_ref(*args)))
    with pytest.raises(ValueError, match="impl must be"):
        kron_quant(*args, impl="cuda")


def test_more_rows_than_the_kernel_takes(device):
    args = op.example(1, 130, 2, 1, torch.float32, device)
    assert all(map(torch.equal, kron_quant(*args), kron_quant_ref(*args)))
    with pytest.raises(ValueError, match="n1 <= 128"):
        kron_quant(*args, impl="triton")


@pytest.mark.parametrize("change, message", [
    ({0: torch.zeros(24)}, "must be .tokens, channels."), ({0: torch.zeros(3, 23)}, "23 channels"),
    ({1: torch.zeros(4, 3)}, "p1 must be square"), ({2: torch.zeros(6)}, "p2 must be square"),
    ({1: torch.zeros(0, 0), 0: torch.zeros(3, 0)}, "p1 must be square"),
    ({1: torch.eye(8), 2: torch.eye(3)}, "n2 must be even"), ({3: torch.ones(2)}, "clip must be"),
    ({3: torch.ones(0, 2)}, "clip must be"), ({3: torch.ones(3, 3)}, "clip must be"),
    ({4: torch.ones(6)}, "c must be"),
    ({0: torch.zeros(3, 24).long()}, "floating point"), ({1: torch.eye(4, device="meta")}, "one device"),
])
def test_errors(change, message):
    args = list(op.example(3, 4, 6, 3, torch.float32, "cpu"))
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        kron_quant(*args)


def test_fp64_never_reaches_the_kernel(device):
    args = [t.double() for t in op.example(3, 4, 6, 3, torch.float32, device)]
    assert kron_quant(*args)[1].dtype == torch.float64
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        kron_quant(*args, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, n1, n2, G", [(20000, 24, 24, 3), (3001, 32, 48, 1), (9001, 64, 64, 1), (700, 64, 128, 3),
                                          (700, 112, 128, 1), (99, 128, 224, 3)])
def test_gpu_large_and_repeatable(T, n1, n2, G, dtype):
    args = op.example(T, n1, n2, G, dtype, "cuda")
    agree(*args)
    first = op.kernel(*args)
    for _ in range(10):
        assert all(map(torch.equal, op.kernel(*args), first))


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    x = torch.zeros(2 ** 16 + 1, 2 ** 15, dtype=torch.bfloat16, device="cuda")
    x[-1, 77] = 7.0
    eye = [torch.eye(n, dtype=torch.bfloat16, device="cuda") for n in (128, 256)]
    codes, scale = kron_quant(x, *eye, torch.ones(1, 2, device="cuda"), impl="triton")
    assert codes[0, -1, 38] == 7 << 4 and codes.count_nonzero() == 1 and (scale == 1).all()
