# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""kernels/fused_adamw.py against its reference in fp64, the closed form and torch.optim.AdamW.

A bug that must be caught here: `squares += g * g` after `g *= scale` (the norm of the scaled gradient).
"""
import copy

import pytest
import torch

from kernels import cast, checked
from kernels import fused_adamw as op
from kernels.fused_adamw import fused_adamw, fused_adamw_ref, squared_norm, squared_norm_ref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1,), (3, 7), (0, 5), (2048,), (33, 64), (), (8193,), (9, 1000)]
OPTIONS = {"plain": {}, "ema": {"ema": True}, "scale": {"scale": 0.3}, "all": {"ema": True, "scale": 1.7}}
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def model(device, dtype=torch.float32, shapes=SHAPES, ema=True, scale=None):
    """Keyword arguments of a step: lists of tensors, decay for matrices."""
    gen = torch.Generator().manual_seed(0)

    def normal(size):
        return [(size * (0.5 + torch.randn(shape, generator=gen))).to(device) for shape in shapes]
    return {"params": normal(0.1), "grads": [g.to(dtype) for g in normal(1e-2)], "exp_avgs": normal(1e-2),
            "exp_avg_sqs": [x.square() for x in normal(1e-2)], "emas": normal(0.1) if ema else None,
            "scale": None if scale is None else torch.tensor(scale, device=device),
            "step": 3, "lr": 1e-2, "weight_decay": [0.1 if len(shape) == 2 else 0.0 for shape in shapes]}


def take(fn, args, dtype=None, **options):
    """{name: tensor} after a step on copies, floating-point ones in dtype."""
    copies = dict(zip(args, cast(args.values(), dtype)))
    norm2 = fn(**copies, **options)
    lists = {name: xs for name, xs in copies.items() if isinstance(xs, list) and torch.is_tensor(xs[0])}
    return {"norm2": norm2} | {f"{name}[{i}]": x for name, xs in lists.items() for i, x in enumerate(xs)}


def agree(args):
    """Every tensor and the norm meet the rule against fp64."""
    out, eager = take(fused_adamw, args, impl="triton"), take(fused_adamw_ref, args)
    ref64 = take(fused_adamw_ref, args, torch.float64)
    assert out["norm2"].dtype == torch.float32 and out["norm2"].shape == ()
    assert len(out) == 1 + len(args["params"]) * (4 if args["emas"] is None else 5)
    for name in out:
        assert out[name].dtype == eager[name].dtype
        op.rule(name, out[name], ref64[name], eager[name], sum(g.numel() for g in args["grads"]))
    return out


# ------------------------------------------------------------------ the reference
def test_reference_equals_the_closed_form():
    """The docstring's lines in fp64, element by element."""
    args = model("cpu", shapes=[(3,), (2, 2)], scale=0.7)
    args = dict(zip(args, cast(args.values(), torch.float64))) | {"betas": (0.8, 0.9), "eps": 1e-3, "ema_decay": 0.6}
    out, norm2 = take(fused_adamw_ref, args), 0.0
    for i, wd in enumerate(args["weight_decay"]):
        p, g, m, v, e = (args[name][i].flatten() for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas"))
        for k in range(len(p)):
            h = args["scale"].item() * g[k]
            m_new, v_new = 0.8 * m[k] + 0.2 * h, 0.9 * v[k] + 0.1 * h ** 2
            update = m_new / (1 - 0.8 ** 3) / ((v_new / (1 - 0.9 ** 3)) ** 0.5 + 1e-3)
            p_new = (1 - 1e-2 * wd) * p[k] - 1e-2 * update
            expected = {"params": p_new, "exp_avgs": m_new, "exp_avg_sqs": v_new, "emas": e[k] + 0.4 * (p_new - e[k])}
            for name, x in expected.items():
                assert out[f"{name}[{i}]"].flatten()[k].item() == pytest.approx(x.item(), rel=1e-11)
            norm2 += g[k].item() ** 2
    assert out["norm2"].item() == pytest.approx(norm2, rel=1e-12)


def steps_of_torch(args, n, clip=None, **kind):
    """Parameters after n steps of torch.optim.AdamW with the gradients i * grads, and their averages."""
    params = [p.clone() for p in args["params"]]
    groups = [{"params": [p], "weight_decay": wd} for p, wd in zip(params, args["weight_decay"])]
    optimizer, emas = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), **kind), [e.clone() for e in args["emas"]]
    for i in range(1, n + 1):
        for p, g in zip(params, args["grads"]):
            p.grad = i * g.float()
        if clip:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        torch._foreach_lerp_(emas, params, 1 - 0.999)
    return params + emas


def own_steps(args, n, impl, clip=None):
    params, emas = ([x.clone() for x in args[name]] for name in ("params", "emas"))
    states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for i in range(1, n + 1):
        grads, scale = [i * g for g in args["grads"]], None
        if clip:
            scale = (clip / (squared_norm(grads, impl=impl).sqrt() + 1e-6)).clamp(max=1)
        decays = args["weight_decay"]
        fused_adamw(params, grads, *states, i, 1e-2, weight_decay=decays, emas=emas, scale=scale, impl=impl)
    return params + emas


def test_reference_is_torch_adamw_bit_for_bit():
    args = model("cpu")
    assert all(map(torch.equal, own_steps(args, 5, "ref"), steps_of_torch(args, 5, foreach=False)))


@pytest.mark.parametrize("kind", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_equals_torch_step_by_step(device, impl, clip, kind):
    args = model(device, shapes=SHAPES[:6])
    for ours, theirs in zip(own_steps(args, 4, impl, clip), steps_of_torch(args, 4, clip, **kind)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------ kernel against reference
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_step(device, options, dtype):
    agree(model(device, dtype, **{"ema": False, **options}))


@pytest.mark.parametrize("change", [
    {"betas": (0.0, 0.0)}, {"betas": (0.4, 0.999)}, {"betas": (0.999, 0.99999)}, {"step": 1}, {"step": 10 ** 6},
    {"eps": 1.0}, {"eps": 1e-15}, {"lr": 0.0}, {"ema_decay": 0.0}, {"ema_decay": 1.0}, {"weight_decay": 2.0},
], ids=str)
def test_each_number(device, change):
    agree(model(device, shapes=SHAPES[:4], scale=0.5) | change)


@pytest.mark.parametrize("block, chunk", [(16, 16), (16, 64), (256, 2048), (8192, 8192)])
def test_each_block_size_alone(device, monkeypatch, block, chunk):
    monkeypatch.setattr(op, "BLOCK", block)
    monkeypatch.setattr(op, "CHUNK", chunk)
    agree(model(device, torch.float16, shapes=[(5, 17), (64,), (1,)]))


@pytest.mark.parametrize("n", [1, 63, 2044, 8192, 8196, 10001])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_touches_nothing_outside(device, offset, n):
    """Aligned or not: views into buffers whose other elements are NaN and stay what they are."""
    args = model(device, torch.bfloat16, shapes=[(n,), (64,)])
    buffers = []

    def padded(x):
        buffers.append(torch.full((n + 64,), float("nan"), dtype=x.dtype, device=device))
        buffers[-1][offset:offset + n] = x
        return buffers[-1][offset:offset + n]
    expected = take(fused_adamw, args, impl="triton")
    lists = {name: [padded(args[name][0]), args[name][1]] for name in
             ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas")}
    norm2 = fused_adamw(**args | lists, impl="triton")
    torch.testing.assert_close(norm2, expected["norm2"])
    assert all(torch.equal(xs[i], expected[f"{name}[{i}]"]) for name, xs in lists.items() for i in range(2))
    assert all(x.isnan().sum() == 64 and x[:offset].isnan().all() for x in buffers)


def test_gradients_of_any_layout(device):
    args = model(device, shapes=[(4, 6), (6, 4), (5,), (8,)])
    transposed = {**args, "grads": [args["grads"][1].T, args["grads"][0].T, args["grads"][2][:1].expand(5),
                                    args["grads"][3].repeat_interleave(2)[::2]]}
    plain = {**args, "grads": [g.contiguous() for g in transposed["grads"]]}
    out, expected = (take(lambda **a: fused_adamw(**a, impl="triton"), x) for x in (transposed, plain))
    agree(transposed)
    assert all(torch.equal(out[name], expected[name]) for name in out)


def test_stacked_models_have_learning_rates_of_their_own(device):
    """One call per model on slices, as the docstring says; three elements each are not aligned."""
    args, single = model(device, shapes=[(2, 3, 5), (2, 3)]), []
    lists = ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas")
    args["weight_decay"] = 0.1
    for k, lr in enumerate((1e-2, 1e-1)):
        single.append(take(fused_adamw_ref, args | {"lr": lr} | {name: [x[k] for x in args[name]] for name in lists}))
        fused_adamw(**args | {"lr": lr} | {name: [x[k] for x in args[name]] for name in lists}, impl="triton")
    for i, p in enumerate(args["params"]):
        torch.testing.assert_close(p, torch.stack([out[f"params[{i}]"] for out in single]), rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------ special values
def test_no_gradient_decays_only(device):
    args = model(device, scale=0.0)
    args["exp_avgs"] = [0 * m for m in args["exp_avgs"]]
    out = agree(args)
    for i, (p, wd) in enumerate(zip(args["params"], args["weight_decay"])):
        torch.testing.assert_close(out[f"params[{i}]"], p * (1 - 1e-2 * wd), rtol=1e-6, atol=0)
    assert out["norm2"] > 0                                       # of the gradient, not of the scaled one


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_bad_gradient_stays_in_its_element(device, bad):
    """As in PyTorch: where v overflows, the step is 0."""
    args = model(device, shapes=SHAPES[3:5])
    args["grads"][0][5] = bad
    out, eager = take(fused_adamw, args, impl="triton"), take(fused_adamw_ref, args)
    for name in out:
        torch.testing.assert_close(out[name], eager[name], rtol=1e-5, atol=1e-7, equal_nan=True)
    assert not out["norm2"].isfinite() and out["params[0]"].isfinite().sum() >= 2047


def test_norms(device):
    """Of large, tiny and heavy-tailed gradients; both functions alike, and the same in every bit each time."""
    args = model(device, torch.float16)
    norm2, again = (squared_norm(args["grads"], impl="triton") for _ in range(2))
    assert torch.equal(norm2, again) and torch.equal(norm2, take(fused_adamw, args, impl="triton")["norm2"])
    for size in (1e-9, 1e9):                                      # fp32 squares reach from 1e-38 to 1e38
        grads = [size * (50 * g.float()) ** 5 for g in args["grads"]]
        exact = squared_norm_ref([g.double() for g in grads])
        torch.testing.assert_close(squared_norm(grads, impl="triton").double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_nothing_to_do(device, impl):
    args = model(device, shapes=[(0,), (0, 3)])
    assert take(fused_adamw, args, impl=impl)["norm2"] == 0 and squared_norm(args["grads"], impl=impl) == 0


# ------------------------------------------------------------------ in a training loop
def test_tables_follow_the_addresses(device):
    """The cached tables must not be those of an earlier list: same sizes elsewhere, same addresses regrouped."""
    first, x = model(device, shapes=[(8,), (8,)]), torch.arange(16.0, device=device)
    assert squared_norm([x[:8], x[8:]], impl="triton") == squared_norm([x], impl="triton") == 1240
    assert squared_norm([x[:4], x[:12]], impl="triton") == 14 + 506
    for _ in range(3):
        agree(copy.deepcopy(first))


def test_only_aligned_tensors_are_read_four_at_a_time(device):
    """The hints that the interpreter does not look at: a wrong one is a misaligned access on a GPU."""
    x, other = torch.zeros(80, device=device), torch.zeros(80, device=device)
    pairs = [(x[:8], other[4:12]), (x[4:8], other[:4]), (x[:6], other[:6]), (x[1:5], other[:4]), (x[:4], other[2:6])]
    table, owners, *_ = op._tables(*map(list, zip(*pairs)))
    assert table.view(-1, 8)[:, 2].tolist() == [1, 1, 0, 0, 0] and owners.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("wrong", [False, True])
def test_checked_compares_and_changes_only_once(device, wrong, monkeypatch):
    """Everything that a step changes is compared; the comparison itself changes nothing. Tuples are lists, too."""
    args = model(device, torch.bfloat16, shapes=[(3, 5), (7,)], scale=0.5)
    args["grads"] = tuple(args["grads"])
    expected, lists = take(fused_adamw, args, impl="triton"), [args.pop(name) for name in
                                                               ("params", "grads", "exp_avgs", "exp_avg_sqs")]
    if wrong:
        monkeypatch.setattr(op, "fused_adamw", lambda *a, **k: fused_adamw(*a, **k | {"ema_decay": 0.99}))
        with pytest.raises(AssertionError, match="fused_adamw, output"):
            checked("fused_adamw", impl="triton")(*lists, **args)
        return
    assert torch.equal(checked("fused_adamw", impl="triton")(*lists, **args), expected["norm2"])
    for name, xs in {"params": lists[0], "emas": args["emas"]}.items():
        assert all(torch.equal(x, expected[f"{name}[{i}]"]) for i, x in enumerate(xs))


def test_autograd_notices_the_step(device):
    args = model(device, shapes=[(3, 4)])
    weight = args["params"][0].requires_grad_()
    loss = (weight ** 2).sum()
    norm2 = fused_adamw(**args, impl="triton")
    assert weight.requires_grad and not norm2.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_integration_same_training_losses(device):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Embedding(12, 32), torch.nn.Linear(32, 32), torch.nn.GELU(),
                              torch.nn.Linear(32, 11)).to(device)
    ids = torch.randint(12, (10, 16), device=device)
    losses = {}
    for impl in ("ref", "triton"):
        trained, losses[impl] = copy.deepcopy(net), []
        params = list(trained.parameters())
        states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        for step, x in enumerate(ids, 1):
            loss = torch.nn.functional.cross_entropy(trained(x), x % 11)
            grads = torch.autograd.grad(loss, params)
            fused_adamw(params, grads, *states, step, 1e-2, impl=impl)
            losses[impl].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["ref"], abs=1e-4)
    assert losses["ref"][-1] < 0.9 * losses["ref"][0]             # it did train


# ------------------------------------------------------------------ dispatch, errors
def test_dispatch_cpu_uses_ref(monkeypatch):
    def launched(*args):
        raise AssertionError("the kernel ran on a CPU tensor")
    monkeypatch.setattr(op, "launch", launched)
    args = model("cpu", scale=0.5)
    out, expected = take(fused_adamw, args), take(fused_adamw_ref, args)
    assert all(torch.equal(out[name], expected[name]) for name in out)
    assert torch.equal(squared_norm(args["grads"]), squared_norm_ref(args["grads"]))
    with pytest.raises(ValueError, match="impl must be"):
        fused_adamw(**args, impl="cuda")


@pytest.mark.parametrize("change, message", [
    ({"grads": []}, "equally long"), ({"emas": [torch.zeros(3)]}, "equally long"),
    ({"grads": [torch.zeros(3), torch.zeros(5, 2)]}, "must have its shape"),
    ({"exp_avgs": [torch.zeros(3), torch.zeros(2, 5, device="meta")]}, "one device"),
    ({"grads": [torch.zeros(3), torch.zeros(2, 5).half()]}, "one dtype"),
    ({"grads": [torch.zeros(3).int(), torch.zeros(2, 5).int()]}, "floating point"),
    ({"params": [torch.zeros(3).half(), torch.zeros(2, 5).half()]}, "must be float32"),
    ({"exp_avg_sqs": [torch.zeros(3), torch.zeros(2, 5).half()]}, "must all be"),
    ({"params": [torch.zeros(3), torch.zeros(5, 2).T]}, "contiguous"), ({"step": 0}, "counts from 1"),
    ({"scale": torch.ones(2)}, "scale must be"), ({"weight_decay": [0.1]}, "1 weight decays for 2 tensors"),
], ids=str)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        fused_adamw(**model("cpu", shapes=[(3,), (2, 5)]) | change)


def test_fp64_never_reaches_the_kernel(device):
    args = model(device, shapes=[(3,)])
    doubles = dict(zip(args, cast(args.values(), torch.float64)))
    assert fused_adamw(**doubles).dtype == torch.float64
    for wrong in (doubles, args | {"grads": doubles["grads"]}):
        with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
            fused_adamw(**wrong, impl="triton")


# ------------------------------------------------------------------ large tensors
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_large_and_repeatable(dtype):
    args = model("cuda", dtype, [(1000, 768), (50257, 64), (3, 12345), *SHAPES], scale=0.5)
    first = agree(args)
    for _ in range(10):
        again = take(fused_adamw, args, impl="triton")
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    n = 2 ** 31 + 4096 + 5
    p, m, v = (torch.zeros(n, device="cuda") for _ in range(3))
    g = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    g[-1] = g[2 ** 31 - 1] = 2.0
    norm2 = fused_adamw([p], [g], [m], [v], 1, 0.5, impl="triton")
    assert norm2 == 8 and p[-1].item() == pytest.approx(-0.5) and p[2 ** 31 - 1].item() == pytest.approx(-0.5)
    assert p.count_nonzero() == 2
