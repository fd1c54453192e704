# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""gametheory.py: interactions against sums over subsets, the split into AND and OR, measures, worlds, command line."""
import copy
import itertools
import json
import math
import re
import shlex
import shutil

import gametheory as m
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imsave
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_thread")

SMOKE = ["--scale", "smoke"]
ONE = ("--arms", "related", "--n-train", "20")
SHAPES = ("--task", "shapes", "--arms", "random", "--n-train", "20", "--seeds", "1")


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An empty directory, which is the current one; no plot of curves (the smoke run has it)."""
    (work := tmp_path / "work").mkdir()
    monkeypatch.setattr(m, "plot_curves", lambda *_: None)
    monkeypatch.chdir(work)
    return work


def integers(*shape):
    return torch.randint(-9, 10, shape)


def subsets(S):
    """All T in S, as bit masks."""
    return [T for T in range(S + 1) if T & S == T]


def size(S):
    return bin(S).count("1")


def plain_moebius(v):
    """I (2^n,) by the sum over subsets."""
    return [sum((-1) ** (size(S) - size(T)) * v[T] for T in subsets(S)) for S in range(len(v))]


@pytest.mark.peers
def test_moebius_and_shapley_equal_shapiq():
    shapiq, n = pytest.importorskip("shapiq"), 6
    v, bits = torch.randn(2**n, dtype=torch.float64), 1 << np.arange(n)
    v[0] = 0
    exact = shapiq.ExactComputer(lambda there: v.numpy()[there.astype(np.int64) @ bits], n_players=n)
    found, theirs = m.moebius(v), exact.moebius_transform
    sets = {sum(1 << p for p in players): at for players, at in theirs.interaction_lookup.items()}
    assert max(abs(theirs.values[sets[S]] - found[S].item()) for S in range(2**n)) < 1e-9
    shares = exact(index="SV", order=1)
    assert all(abs(shares[(i,)] - x) < 1e-9 for i, x in enumerate(m.shapley(found).tolist()))


def orders(n):
    return torch.tensor([size(S) for S in range(2**n)])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A directory of pictures of two classes, red and green, with noise; weights of a ViT of smoke's sizes."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    for part, name, i in itertools.product(("train", "test"), "ab", range(20)):
        (folder / part / name).mkdir(parents=True, exist_ok=True)
        x = 0.5 * rng.random((30 + i, 40, 3)) + 0.5 * np.eye(3)[ord(name) - 97]
        imsave(folder / part / name / f"{i}.{'jpg' if i % 2 else 'png'}", x)
    m.replace_file(folder / "vit.safetensors", m.save(timm_names(m.Network(images(), 2).state_dict())))
    return folder


def images(**changes):
    """Settings of --task images at smoke's sizes."""
    return m.Config(**m.SCALES["smoke"] | m.SCALES["smoke:images"] | dict(task="images", dry_run=True) | changes)


def timm_names(state):
    """Weights of a Network as timm names them."""
    names = {"backbone.": "blocks.", "start": "cls_token", "position": "pos_embed", "embed.": "patch_embed.proj.",
             "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj": "attn.proj", "linear": "mlp.fc"}
    found = {}
    for name, x in state.items():
        for ours, theirs in names.items():
            name = re.sub(rf"(^|\.){re.escape(ours)}", rf"\1{theirs}", name)
        found[name] = x.clone()
    return found


# ---------------------------------------------------------------- interactions
@pytest.mark.parametrize("n", range(6))
def test_moebius_is_the_sum_over_subsets(n):
    """Exact for integers, in any leading shape and memory order; the input stays; inverse gives it back."""
    v = integers(2**n, 2, 3).permute(1, 2, 0)
    before, got = v.clone(), m.moebius(v)
    assert torch.equal(got.flatten(0, 1), torch.tensor([plain_moebius(row) for row in v.flatten(0, 1).tolist()]))
    assert torch.equal(v, before) and torch.equal(m.moebius(got, inverse=True), v)
    wanted = [[sum(row[T] for T in subsets(S)) for S in range(2**n)] for row in got.flatten(0, 1).tolist()]
    assert torch.equal(v.flatten(0, 1), torch.tensor(wanted))


def test_sixteen_players_and_wrong_sizes():
    v = torch.randint(-9, 9, (1, 2**16))
    assert torch.equal(m.moebius(m.moebius(v), inverse=True), v)
    assert m.moebius(v)[0, 5] == v[0, 5] - v[0, 4] - v[0, 1] + v[0, 0]
    with pytest.raises(AssertionError):
        m.moebius(torch.zeros(2, 6))


def test_order_is_the_number_of_players():
    assert m.order_of(torch.arange(2**16)).tolist() == [size(S) for S in range(2**16)]


def test_and_and_or_games_have_one_interaction():
    """v = 1 where T is in S: I of T; v = 1 where T meets S: I_or of T, and as AND (-1)^(|S| + 1) on subsets of T."""
    n = 4
    for T in range(1, 2**n):
        one = torch.zeros(2**n).index_fill(0, torch.tensor([T]), 1.0)
        v_and = torch.tensor([float(T & S == T) for S in range(2**n)])
        v_or = torch.tensor([float(T & S != 0) for S in range(2**n)])
        assert torch.equal(m.moebius(v_and), one) and torch.equal(m.or_interactions(v_or), one)
        assert torch.equal(m.values_of_or(one), v_or)
        wanted = [(-1.0) ** (size(S) + 1) if S and S & T == S else 0.0 for S in range(2**n)]
        assert m.moebius(v_or).tolist() == wanted


def test_or_interactions_are_the_sum_over_complements():
    """I_or(S) = - sum (-1)^(|S| - |T|) v(N less T), I_or of nothing is v of nothing; and every value is given back."""
    n = 4
    v = integers(3, 2**n)
    got = m.or_interactions(v)
    for row, found in zip(v.tolist(), got.tolist()):
        for S in range(1, 2**n):
            assert found[S] == -sum((-1) ** (size(S) - size(T)) * row[2**n - 1 - T] for T in subsets(S))
        assert found[0] == row[0]
        for S in range(2**n):
            assert row[S] == found[0] + sum(found[T] for T in range(1, 2**n) if T & S)
    assert torch.equal(m.values_of_or(got), v)


def test_dividends_add_up_and_ignore_dummies_and_names():
    n, v = 4, torch.randn(2, 16).double()
    found = m.moebius(v)
    assert torch.allclose(found[:, 1:].sum(1), v[:, -1] - v[:, 0], atol=1e-12)
    assert torch.allclose(m.moebius(2 * v[0] - 3 * v[1]), 2 * found[0] - 3 * found[1], atol=1e-12)
    dummy = v.clone()
    without = torch.tensor([S for S in range(16) if not S & 4])
    dummy[:, without | 4] = dummy[:, without]
    assert m.moebius(dummy)[:, without | 4].abs().max() == 0
    renamed = torch.tensor([S >> 1 | (S & 1) << n - 1 for S in range(16)])  # player i becomes i - 1
    assert torch.allclose(m.moebius(v[:, renamed]), found[:, renamed], atol=1e-12)


def test_shapley_is_the_mean_over_orders_of_arrival():
    n, v = 4, torch.randn(16).double()
    wanted = torch.zeros(n).double()
    for arrival in itertools.permutations(range(n)):
        there = 0
        for i in arrival:
            wanted[i] += (v[there | 1 << i] - v[there]) / math.factorial(n)
            there |= 1 << i
    got = m.shapley(m.moebius(v))
    assert torch.allclose(got, wanted, atol=1e-12) and torch.allclose(got.sum(), v[-1] - v[0])


# ---------------------------------------------------------------- AND and OR together
@pytest.mark.parametrize("n", [1, 2, 5])
def test_normal_solver_inverts_the_dense_matrix(n):
    M = m.moebius(torch.eye(2**n).double()).T
    dense = M.T @ M + (M.T @ M).flip(0, 1)
    x = torch.randn(3, 2**n).double()
    assert torch.allclose(m.normal_solver(n)(x @ dense), x, atol=1e-9)
    both = torch.randn(2, 2).double()
    power = torch.ones(1, 1).double()
    for _ in range(n):
        power = torch.kron(power, both)
    assert torch.allclose(m.kron(x, both), x @ power.T, atol=1e-9)


def planted(K, n=6, count=4):
    """Games (K, 1, 2^n) of few AND and OR interactions of two players and more, and these: (K, 1, 2^n) each."""
    sets = torch.arange(2**n)[orders(n) > 1]
    found = torch.zeros(2, K, 1, 2**n).double()
    for part in found:
        part[:, :, sets[torch.randperm(len(sets))[:count]]] = torch.randn(K, 1, count).double()
    return m.moebius(found[0], inverse=True) + m.values_of_or(found[1]), found


@pytest.mark.parametrize("K", [1, 3])
def test_sparsify_finds_planted_interactions(K):
    v, wanted = planted(K)
    got = torch.stack(m.sparsify(v + 5.0, steps=600))  # a constant does not matter
    assert torch.allclose(got, wanted, atol=1e-3)


def test_both_parts_give_the_games_exactly():
    """(our choice) For any number of steps; and orders 0 and 1 are counted once."""
    v = torch.randn(2, 3, 32).double()
    for steps in (1, 7, 100):
        found_and, found_or = m.sparsify(v, steps=steps)
        back = m.moebius(found_and, inverse=True) + m.values_of_or(found_or)
        assert torch.allclose(back, v - v[..., :1], atol=1e-9)
        assert found_or[..., orders(5) < 2].abs().max() == 0 and found_and[..., 0].abs().max() == 0


def test_sparsify_does_not_split_equal_networks():
    v = torch.randn(1, 2, 32).double()
    one, three = m.sparsify(v, steps=400), m.sparsify(v.expand(3, -1, -1), steps=400)
    assert all(torch.allclose(part, part[:1].expand_as(part), atol=1e-9) for part in three)
    sizes = [sum(part[0].abs().sum().item() for part in parts) for parts in (one, three)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)


def test_sparsify_is_the_linear_program():
    """The smallest sum of sizes, by scipy; for the pure AND the sum is larger."""
    scipy = pytest.importorskip("scipy.optimize")
    n, v = 4, torch.randn(1, 1, 16).double()
    v = v - v[..., :1]
    M = m.moebius(torch.eye(2**n).double()).T
    rows = torch.cat([M[1:], M.flip(1)[1:]]).numpy()  # d I / d p
    start = torch.cat([m.moebius(v / 2)[0, 0, 1:], -m.moebius((v / 2).flip(-1))[0, 0, 1:]]).numpy()
    eye = np.eye(len(rows))
    program = scipy.linprog(np.r_[np.zeros(2**n), np.ones(len(rows))], np.block([[rows, -eye], [-rows, -eye]]),
                            np.r_[-start, start], bounds=[(None, None)] * 2**n + [(0, None)] * len(rows))
    found_and, found_or = m.sparsify(v, steps=1000)
    got = (found_and.abs() + found_or.abs()).sum().item()
    assert got < m.moebius(v)[..., 1:].abs().sum() and got <= program.fun * 1.001


# ---------------------------------------------------------------- values
def test_logodds_is_the_logarithm_of_the_odds():
    logits, label = torch.randn(50, 4).double(), torch.randint(4, (50,))
    p = logits.softmax(1).gather(1, label[:, None])[:, 0]
    assert torch.allclose(m.logodds(logits, label), (p / (1 - p)).log(), atol=1e-12)
    two, zero = torch.randn(9, 2), torch.zeros(9, dtype=torch.long)
    assert torch.allclose(m.logodds(two, zero), (two[:, 0].double() - two[:, 1].double()))
    assert m.logodds(torch.tensor([[200.0, 0.0, -300.0]]), torch.tensor([0])).item() == 200  # 1 - p is 0 in fp64


def toy(player):
    """Inputs (3, ...), classes, baseline, and a network that is not symmetric."""
    x, baseline = torch.randn(3, *player.shape), torch.randn(player.shape)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(player.numel(), 5), torch.nn.Tanh(),
                               torch.nn.Linear(5, 3)), x, torch.tensor([0, 2, 1]), baseline


@pytest.mark.parametrize("player", [torch.arange(4), torch.tensor([[0, 2, -1], [1, 1, 0]]), torch.arange(3)[:, None]
                                    .expand(3, 2)], ids=["flat", "uneven", "tokens"])
def test_values_are_those_of_single_masked_inputs(player):
    """Bit i: player i; entries of player -1 are always there; whatever the size of a chunk."""
    net, x, label, baseline = toy(player)
    n = int(player.max()) + 1
    wanted = torch.zeros(3, 2**n).double()
    for s, S in itertools.product(range(3), range(2**n)):
        copy = x[s].clone().flatten()
        for i, who in enumerate(player.flatten().tolist()):
            if who >= 0 and not S >> who & 1:
                copy[i] = baseline.flatten()[i]
        wanted[s, S] = m.logodds(net(copy.view(1, *player.shape)), label[s : s + 1]).item()
    for chunk in (1, 7, 10_000):
        got = m.values(net, x, label, baseline, player, chunk)
        assert got.dtype == torch.float64 and torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("player", [torch.arange(3)[:, None].expand(3, 4), torch.tensor([[0, 1, 0, 1], [2, 3, 2, 3]])])
def test_masked_by_the_kernel_layout(player):
    """Players' entries side by side and back: the same copies, to the bit."""
    _, x, _, baseline = toy(player)
    index = torch.arange(2 ** (int(player.max()) + 1))
    assert torch.equal(m.masked(x, baseline, player, index), m.masked(x, baseline, player, index, kernels=True))


def test_polynomial_network_has_its_coefficients():
    """sum of w_S times the product of the inputs of S, zeros as baseline: I(S) = w_S at ones."""
    n, w = 4, torch.randn(16).double()

    def net(x):  # (B, 4)
        terms = torch.stack([w[S] * x[:, [i for i in range(n) if S >> i & 1]].prod(1) for S in range(16)], 1)
        return torch.stack([terms.sum(1), torch.zeros(len(x)).double()], 1)

    v = m.values(net, torch.ones(1, n).double(), torch.tensor([0]), torch.zeros(n).double(), torch.arange(n))
    assert torch.allclose(m.moebius(v)[0], w, atol=1e-12)


# ---------------------------------------------------------------- measures
def test_noise_grows_with_the_order():
    """Errors sigma of values are sigma 2^(m / 2) in I; so none of pure noise is salient."""
    n, sigma = 8, 0.01
    v = sigma * torch.randn(400, 2**n).double()
    found, order, floor = m.moebius(v), orders(n), torch.tensor(sigma)
    for k in range(1, n + 1):
        assert abs(found[:, order == k].std() / (sigma * 2 ** (k / 2)) - 1) < 0.1
    assert (m.salient(found, order, 0.0, floor) != 0).double().mean() < 0.01  # of a normal distribution 0.3 %


def test_noise_floor_is_the_error_of_the_network():
    """The same weights in fp64 have none; with errors put into fp32 it is their size; a plain function computes in the
    type of its input."""
    n = 6
    net, x, label = torch.nn.Linear(n, 3), torch.randn(4, n), torch.tensor([0, 1, 2, 0])
    game = x, label, torch.zeros(n), torch.arange(n)
    v = m.values(net, *game)
    exact = m.values(copy.deepcopy(net).double(), x.double(), label, game[2].double(), game[3])
    error = (v - exact).square().mean().sqrt()
    assert abs(m.noise_floor(v, net, *game) / error - 1) < 1e-3 and 1e-8 < error < 1e-6
    assert abs(m.noise_floor(exact + 0.01 * torch.randn_like(exact), net, *game) / 0.01 - 1) < 0.2
    assert m.noise_floor(exact, net, *game) < 1e-12 and next(net.parameters()).dtype == torch.float32
    w = torch.randn(n, 3).double()
    assert m.noise_floor(m.values(lambda x: x @ w.to(x), *game), lambda x: x @ w.to(x), *game) < 1e-6


def test_salient_by_loops():
    found, order, tau, floor = torch.randn(3, 16).double(), orders(4), 0.3, 0.1
    found[:, 0] = 99.0
    got = m.salient(found, order, tau, floor)
    for s, S in itertools.product(range(3), range(16)):
        largest = max(abs(x) for x in found[s, 1:].tolist())
        x = found[s, S].item()
        keep = S > 0 and abs(x) > tau * largest and abs(x) > 3 * floor * 2 ** (size(S) / 2)
        assert got[s, S] == (x if keep else 0.0)
    assert torch.equal(m.salient(found, order, 0.0)[:, 1:], found[:, 1:])


def test_decompose():
    """preserved + discarded = |a|, preserved + new = |f|; equal: all kept; opposite signs: nothing; symmetric."""
    a, f = torch.randn(2, 500).double()
    kept, gone, new = m.decompose(a, f)
    for i in range(500):
        x, y = a[i].item(), f[i].item()
        assert kept[i] == (min(abs(x), abs(y)) if x * y > 0 else 0.0)
    assert torch.allclose(kept + gone, a.abs()) and torch.allclose(kept + new, f.abs())
    assert torch.equal(m.decompose(f, a)[0], kept) and torch.equal(m.decompose(a, a)[0], a.abs())
    assert m.decompose(a, -a)[0].abs().max() == 0 and min(part.min() for part in (kept, gone, new)) >= 0


def test_similarity_is_the_sign_split_overlap():
    """(official code) sum of min over sum of max of positive and negative parts, each input's sizes adding up to 1."""
    a, b = torch.randn(2, 4, 16).double()
    x, y = (z / z.abs().sum(1, keepdim=True) for z in (a, b))
    parts = [(x.clamp(min=0), y.clamp(min=0)), ((-x).clamp(min=0), (-y).clamp(min=0))]
    wanted = sum(torch.minimum(*p).sum(1) for p in parts) / sum(torch.maximum(*p).sum(1) for p in parts)
    assert torch.allclose(m.similarity(a, b), wanted) and torch.allclose(m.similarity(b, a), wanted)
    assert torch.allclose(m.similarity(a, 3 * a), torch.ones(4).double()) and m.similarity(a, -a).abs().max() == 0


def test_shares_by_loops():
    n = 4
    a, f, s = (torch.randn(3, 5, 2**n) * (torch.rand(3, 5, 2**n) < 0.7)).double()
    for part in (a, f, s):
        part[:, 0] = 0
    got = m.shares(a, f, s, orders(n))

    def overlap(x, y):
        return min(abs(x), abs(y)) if x * y > 0 else 0.0

    for group, sizes in (("", (1, 2, 3, 4)), ("_low", (1, 2)), ("_high", (3, 4))):
        total = dict.fromkeys("a f s kept learned fs as moved coin r_coin".split(), 0.0)
        for i, S in itertools.product(range(5), range(2**n)):
            if size(S) in sizes:
                x, y, z = (part[i, S].item() for part in (a, f, s))
                kept = overlap(x, y)
                shifted = (S << 1 | S >> n - 1) & 2**n - 1
                new = dict(a=abs(x), f=abs(y), s=abs(z), kept=kept, learned=min(kept, abs(z)) if x * z > 0 else 0.0,
                           fs=overlap(y, z), moved=overlap(x, f[i, shifted].item()))
                new |= {"as": overlap(x, z), "coin": min(abs(x), abs(y)) / 2, "r_coin": min(kept, abs(z)) / 2}
                total = {name: total[name] + new[name] for name in total}
        t = total
        wanted = dict(preserved=t["kept"] / t["a"], discarded=1 - t["kept"] / t["a"], new=1 - t["kept"] / t["f"],
                      r=t["learned"] / t["kept"], only_scratch=1 - t["fs"] / t["s"],
                      preserved_scratch=t["as"] / t["a"], preserved_moved=t["moved"] / t["a"],
                      preserved_coin=t["coin"] / t["a"], r_coin=t["r_coin"] / t["kept"])
        for name, value in wanted.items():
            assert abs(got[name + group] - value) < 1e-9, name + group


def test_shares_of_equal_networks():
    """Nothing changes: all kept, none new, and scratch equal to the fine-tuned one knows all of it."""
    a = torch.randn(4, 16).double() * (orders(4) > 0)
    got = m.shares(a, a, a, orders(4))
    assert abs(got["preserved"] - 1) < 1e-12 and got["new"] == got["discarded"] == got["only_scratch"] == 0
    assert abs(got["r"] - 1) < 1e-12 and got["preserved_moved"] < 0.9
    assert got["preserved_coin"] == got["r_coin"] == pytest.approx(0.5)
    assert m.shares(0 * a, a, a, orders(4))["preserved"] == 0  # 0 / 0 is 0
    twice = m.shares(*3 * [torch.cat([a, a], 1)], orders(4).repeat(2))  # AND and OR: players move within each half
    assert twice["preserved_moved"] == pytest.approx(got["preserved_moved"])


def test_truth_counts_sets_inside_concepts():
    world = m.make_world(m.Config(), "related", 0)
    world.useful, world.fresh, world.unused = (torch.tensor([x]) for x in (0b111, 0b11000, 0b1110))
    a = torch.zeros(1, 256).double()
    a[0, [0b11, 0b111, 0b1100, 0b11000, 0b110, 1]] = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 99.0]).double()
    f = a * torch.tensor([0.5]).double()
    f[0, 0b1100] = 1.0
    got = m.truth(world, a, f, orders(8))
    assert got["preserved_useful"] == pytest.approx((8.5 / 17 + 1.0 / 2) / 2)  # 0b11, 0b110, and of order 3 0b111
    assert got["preserved_unused"] == pytest.approx(0.25 / 2)  # 0b1100 alone: 0b110 is useful; none of order 3
    assert got["on_task"] == pytest.approx(13.5 / 14.5)  # with 0b11000, without single players
    assert got["on_task_chance"] == pytest.approx(5 / (256 - 9))


def test_convergence_by_hand():
    """Similarities 0, 1/3, 0, 1: area, detour 2/3; one set was there and is gone."""
    found = torch.zeros(4, 1, 4).double()
    found[0, 0, 1] = found[2, 0, 1] = 1.0
    found[1, 0, 1:3] = torch.tensor([1.0, 1.0])
    found[3, 0, 2] = 1.0
    end = torch.tensor([[0.0, 1.0, 0, 0]]).double()
    got, own, toward = m.convergence(found, end, [0, 1, 2, 4])
    third = 0.5 / 1.5  # halves {1, 2} beside {2}: min 0.5, max 0.5 + 1
    assert own == pytest.approx([0, third, 0, 1]) and toward == pytest.approx([1, third, 1, 0])
    assert got["similarity"] == pytest.approx((third / 2 + third / 2 + 1.0) / 4)
    assert got["toward_other"] == pytest.approx(((1 + third) / 2 + (third + 1) / 2 + 1.0) / 4)
    assert got["detour"] == pytest.approx(2 * third) and got["vanished"] == 1
    assert m.area(torch.tensor([0.0, 1, 3]), [0, 1, 3]) == pytest.approx((0.5 + 4) / 3)


def test_speech_of_what_is_preserved():
    """Two inputs: 2 of 3 kept for the class, where the output is 1; 1 kept against it, where the output is -0.5."""
    a = torch.tensor([[0, 2.0, 0, 0], [0, 0, -1.0, 5.0]]).double()
    f = torch.tensor([[0, 3.0, 0, 0], [0, 0, -4.0, -5.0]]).double()
    v = torch.tensor([[0, 0, 0, 1.0], [0, 0, 0, -0.5]]).double()
    got = m.speech(a, f, v)
    assert got["speaks_for_class"] == pytest.approx((2 - 1) / 3)
    assert (got["right"], got["right_without_preserved"]) == (0.5, 0.5)  # 1 - 2 is wrong, -0.5 + 1 is right


def test_compare_of_games_that_do_not_change(here):
    """All checkpoints and scratch the same games: everything is preserved and salient ones explain the output."""
    cfg = m.Config(n_eval=3, tau=0.0)
    v = torch.randn(1, 3, 256).double().expand(len(m.numbers(cfg.epochs)), -1, -1)
    for kind in ("and", "and-or"):
        cfg.interactions = kind
        found, other, curves = m.compare(cfg, m.make_world(cfg, "related", 0), v, v, 0.0)
        for name in ("preserved", "r", "similarity", "preserved_all", "preserved_unit", "preserved_useful",
                     "toward_other"):
            assert found[name] == pytest.approx(1, abs=1e-6), name
        assert found["error"] < 1e-6 and found["new"] < 1e-6 and found["only_scratch"] < 1e-6
        assert found["right_without_preserved"] == (v[0, :, 0] > 0).double().mean()  # v of nothing is left
        assert other["detour"] == pytest.approx(0, abs=1e-6) and sum(curves["new"]) < 1e-6
        assert sum(curves["preserved"]) == pytest.approx(found["size"]) == pytest.approx(found["size_pre"])


def test_compare_knows_who_is_who():
    """Three epochs of other games each: pre-trained is the first, fine-tuned the last, scratch the last of its own;
    measures are of salient ones, _all of all, _unit of unit ones; curves run to the own end and to the other's."""
    cfg = m.Config(n_eval=4, tau=0.3, epochs="0,1,3")
    fine, scratch = torch.randn(2, 3, 4, 256).double()
    world, order, floor = m.make_world(cfg, "related", 0), orders(8), 0.02
    found, other, curves = m.compare(cfg, world, fine, scratch, floor)
    every = m.moebius(torch.cat([fine, scratch])) * (order > 0)
    big = m.salient(every, order, 0.3, floor)
    wanted = m.shares(big[0], big[2], big[5], order) | m.truth(world, big[0], big[2], order)
    wanted |= m.speech(big[0], big[2], fine[2])
    for name, of in (("all", every), ("unit", m.unit(big))):
        wanted |= {f"{k}_{name}": x for k, x in m.shares(of[0], of[2], of[5], order).items() if k in ("r", "new")}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value), name
    assert abs(found["preserved_all"] - found["preserved"]) > 0.01  # the threshold matters here
    rebuilt = m.moebius(big[2], inverse=True)
    v0 = fine[2] - fine[2, :, :1]
    assert found["error"] == pytest.approx(float((rebuilt - v0).norm() / v0.norm()))
    assert found["salient"] == float((big[2] != 0).sum()) / 4 and found["salient_pre"] == float((big[0] != 0).sum()) / 4
    for got, of, end in ((found, big[:3], big[5]), (other, big[3:], big[2])):
        numbers = m.convergence(of, end, [0, 1, 3])[0]
        assert {name: got[name] for name in numbers} == pytest.approx(numbers)
    assert curves["similarity_fine"] == pytest.approx(m.similarity(big[:3], big[2]).mean(1).tolist())
    assert curves["toward_fine_scratch"] == pytest.approx(m.similarity(big[3:], big[2]).mean(1).tolist())
    by_hand = [m.decompose(big[0], big[2])[2][:, order == k].sum().item() / 4 for k in range(1, 9)]
    assert curves["new"] == pytest.approx(by_hand)


def test_statistics_and_verdicts():
    """Student's interval over worlds, by the table; paired differences; no interval without a second world."""
    keys = {key for _, formula, *_ in m.CLAIMS for key in formula.split(" - ")} - {"1"}
    table = {key: np.array([0.2, 0.3, 0.4]) + i for i, key in enumerate(sorted(keys))}
    found = m.statistics(table)
    assert set(found) == {name for name, *_ in m.CLAIMS}
    for name, key, minus in (("converges-faster-150", "related/150/similarity", "scratch/150/similarity"),
                             ("learns-faster-50", "related/50/learning", "scratch/50/learning"),
                             ("more-accurate-1600", "related/1600/accuracy", "scratch/1600/accuracy"),
                             ("steadier", "scratch/400/detour", "related/400/detour"),
                             ("discarded-at-high-order", "related/400/discarded_high", "related/400/discarded_low"),
                             ("new-at-high-order", "related/400/new_high", "related/400/new_low"),
                             ("random-preserves-less", "related/400/preserved", "random/400/preserved"),
                             ("not-by-chance-high", "related/400/preserved_high", "related/400/preserved_coin_high")):
        assert found[name][0] == pytest.approx(table[key][0] - table[minus][0]), name
    found = m.statistics({key: np.array([0.2, 0.3, 0.4]) for key in keys})
    mean, (low, high) = found["most-is-discarded"]
    spread = 4.303 * 0.1 / math.sqrt(3)
    assert mean == pytest.approx(0.3) and (low, high) == pytest.approx((0.3 - spread, 0.3 + spread))
    assert found["more-accurate-50"][0] == 0 and found["scratch-lacks-the-preserved"][0] == pytest.approx(0.7)
    assert m.statistics({key: x[:1] for key, x in table.items()}) == {}
    assert set(m.statistics({"related/400/new": np.ones(12)})) == {"much-is-new"}
    assert [m.verdict(x, (x - 1, x + 1), 0.0) for x in (2, -2, 0.5)] == ["HOLDS", "DOES NOT HOLD", "INCONCLUSIVE"]


# ---------------------------------------------------------------- worlds
@pytest.mark.parametrize("task", ["concepts", "tiles"])
@pytest.mark.parametrize("arm", m.ARMS)
def test_concepts(task, arm):
    """Answers are those of the concepts; downstream states held out; disjoint asks for none of the task's concepts."""
    cfg = m.Config(task=task, noise=0.0, n_players=8)
    world, related = m.make_world(cfg, arm, 3), m.make_world(cfg, "related", 3)
    assert torch.equal(world.answer, related.answer) and torch.equal(world.code, related.code)
    assert not set(world.seen.tolist()) & set(world.held.tolist()) and len(world.seen) + len(world.held) == 256
    assert len(world.held) == 64 and 0.3 < world.answer.float().mean() <= 0.5
    asked = {tuple(column) for column in world.asked.T.tolist()}
    task_sets = {tuple(float(S & C == C) for S in range(256)) for C in [*world.useful.tolist(), *world.fresh.tolist()]}
    assert len(asked) == 26 and len(asked & task_sets) == (7 if arm == "related" else 0)
    assert [size(C) for C in world.fresh.tolist()] == [2, 3, 4]
    # states are read back from inputs
    batch = world.after(200, m.generator(0), held=True)
    for x, target in zip(batch["x"], batch["target"]):
        codes = [[x[world.player == i] for i in range(8)], [world.baseline[world.player == i] for i in range(8)]]
        state = sum((torch.equal(part, world.code[1])) << i for i, part in enumerate(codes[0]))
        assert state in world.held.tolist() and world.answer[state] == target
        assert all(torch.equal(part, world.code[0]) for part in codes[1])
        assert torch.equal(world.baseline.flatten().sort()[0], world.code[0].repeat(8).sort()[0])
    before = world.before(64, m.generator(0))
    possible = {tuple(world.asked[S].tolist()) for S in world.seen.tolist()}
    assert {tuple(row) for row in before["target"].tolist()} <= possible
    assert before["target"].shape == (64, 26) and before["x"].shape[1:] == world.player.shape == world.baseline.shape


def test_shapes():
    """Areas of drawn outlines; hollow ones have less ink; classes; players are squares of the picture."""
    world = m.make_world(m.Config(task="shapes", n_players=9, noise=0.0), "related", 0)
    outline = torch.arange(10).repeat(200)
    filled = world.draw(outline, torch.zeros(2000).bool(), m.generator(1))
    hollow = world.draw(outline, torch.ones(2000).bool(), m.generator(1))
    assert filled.shape == (2000, 1, 24, 24) and filled.min() >= -1e-3 and filled.max() <= 1.001
    ink = filled.sum((1, 2, 3)).view(200, 10).mean(0)
    assert (ink[:5].diff() > 0).all()  # from triangle to octagon
    assert ((hollow - filled).sum((1, 2, 3)) < -10).all()
    batch = world.after(400, m.generator(2))
    assert set(batch["target"].tolist()) == {0, 1, 2, 3} and batch["target"].dtype == torch.long
    assert [(world.player == i).sum().item() for i in range(9)] == [64] * 9
    assert world.player[0, 0, 23] == 2 and world.player[0, 23, 0] == 6
    names = m.make_world(m.Config(task="shapes", n_players=9), "disjoint", 0).before(500, m.generator(0))["target"]
    assert set(names.tolist()) == {0, 1, 4, 5, 6, 7, 8, 9}
    random = m.make_world(m.Config(task="shapes", n_players=16), "random", 0)
    assert random.before(50, m.generator(0))["x"].shape == (50, 1, 24, 24) and random.player.max() == 15


def test_area_of_a_polygon():
    """A hexagon of radius 8: 3 sqrt(3) / 2 times 64, in the middle of the picture (no part is cut off)."""
    world = m.make_world(m.Config(task="shapes", n_players=9, noise=0.0), "related", 0)
    original = torch.rand

    def middle(*shape, **options):
        return original(*shape, **options) * 0 + (0.5 if shape[-1] == 1 else 0)

    torch.rand = middle
    try:
        areas = [world.draw(torch.tensor([k]), torch.tensor([False]), m.generator(0)).sum().item() for k in range(5)]
    finally:
        torch.rand = original
    wanted = [sides / 2 * 64 * math.sin(2 * math.pi / sides) for sides in (3, 4, 5, 6, 8)]
    assert areas == pytest.approx(wanted, rel=0.05)


def test_random_numbers_come_from_the_key():
    draws = [torch.rand(3, generator=m.generator(*key)) for key in ((1, "a"), (1, "a"), (1, "b"), (2, "a"))]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2]) and not torch.equal(*draws[2:])


# ---------------------------------------------------------------- networks and training
@pytest.mark.parametrize("task, arch", [("concepts", "mlp"), ("concepts", "transformer"), ("tiles", "mlp"),
                                        ("shapes", "mlp")])
def test_networks(task, arch):
    cfg = m.Config(task=task, arch=arch, n_embd=16, n_players=9 if task == "shapes" else 10)
    world = m.make_world(cfg, "related", 0)
    net, x = m.Network(cfg, 3), world.after(5, m.generator(0))["x"]
    assert net.features(x).shape == (5, 16) and net(x).shape == (5, 3)
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    with torch.no_grad():  # no input depends on the others
        assert torch.allclose(net.eval()(x)[2:3], net(x[2:3]), atol=1e-5)


def test_probe_is_the_regression_on_frozen_features():
    """Backbone untouched; the gradient of the penalised loss is 0 at the head that it finds."""
    cfg = m.Config(n_embd=16)
    world = m.make_world(cfg, "related", 0)
    net, data = m.Network(cfg, 2).double(), world.after(100, m.generator(0))
    data["x"] = data["x"].double()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    m.fit_probe(cfg, net, data)
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items() if "head" not in name)
    features = net.features(data["x"]).detach()
    std = features.std(0) + 1e-6
    loss = F.cross_entropy(features @ net.head.weight.T + net.head.bias, data["target"], label_smoothing=cfg.smoothing)
    bias = torch.autograd.grad(loss, net.head.bias)[0]
    assert bias.abs().max() < 1e-4 and loss < math.log(2)
    weight = (net.head.weight * std).detach().requires_grad_()  # on standardised features
    bias = (net.head.bias + net.head.weight @ features.mean(0)).detach()
    logits = (features - features.mean(0)) / std @ weight.T + bias
    loss = F.cross_entropy(logits, data["target"], label_smoothing=cfg.smoothing)
    ratio = (-torch.autograd.grad(loss, weight)[0] / weight.detach())[:, std > 1e-5]  # without dead features
    assert min(abs(ratio.median().item() / penalty - 1) for penalty in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)) < 0.05


def test_a_planted_concept_is_learned(tmp_path):
    """A network trained on one AND of two players has that interaction first; an untrained one has not."""
    cfg = m.Config(n_embd=32, noise=0.1, log_every=1000)
    world = m.make_world(cfg, "related", 0)
    run = m.SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, rank=0, world=1, out=tmp_path, stop=False)
    net, index = m.Network(cfg, 2), torch.arange(256)
    label = (index & 0b10100) == 0b10100

    def draw(step):
        state = torch.randint(256, (64,), generator=m.generator(step))
        return dict(x=world.show(state, m.generator(step, 1)), target=label[state].long())

    def strongest():
        x = world.show(torch.tensor([0b10100, 0b11101, 0b10111]), m.generator("x"))
        v = m.values(net, x, torch.ones(3, dtype=torch.long), world.baseline, world.player)
        found = m.moebius(v).abs()
        return (found[:, 0b10100] / found[:, orders(8) > 1].amax(1)).min()

    before = strongest()
    m.train(cfg, run, "job", net, draw, 300, 3e-3, 0.1, {})
    assert before < 0.9 and strongest() == 1


# ---------------------------------------------------------------- pictures and a ViT
def test_images_are_scaled_and_cut(tmp_path):
    """A wide picture: its middle square, the shorter side scaled; grey, transparent and 1-pixel pictures; the class."""
    for part, name in itertools.product(("train", "test"), "ab"):
        (tmp_path / part / name).mkdir(parents=True)
    wide = np.zeros((24, 60, 4))
    wide[..., 3] = 0.5  # transparency is left out
    wide[:, 18:42, 0] = 1  # the middle is red
    imsave(tmp_path / "test/b/wide.png", wide)
    read = (world := m.Images(images(data=str(tmp_path)), "related", 0)).read
    assert torch.equal(read(tmp_path / "test/b/wide.png"), torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 24, 24))
    grey = np.linspace(0, 1, 48).repeat(48).reshape(48, 48)  # rows become brighter; half as large
    imsave(tmp_path / "train/a/grey.PNG", np.dstack([grey] * 3))
    x = read(tmp_path / "train/a/grey.PNG")
    assert x.shape == (3, 24, 24) and (x[:, 1:, 5] > x[:, :-1, 5]).all()
    assert (x[0, :, 3] - torch.linspace(-1, 1, 48).view(24, 2).mean(1)).abs().max() < 0.03
    imsave(tmp_path / "train/b/dot.jpg", np.ones((1, 1, 3)))
    assert read(tmp_path / "train/b/dot.jpg").min() > 0.97
    (tmp_path / "train/b/notes.txt").write_text("no picture")
    world = m.Images(images(data=str(tmp_path)), "related", 0)
    assert world.names == ["a", "b"] and world.classes == 2
    held = world.after(5, m.generator(0), held=True)
    assert held["target"].tolist() == [1] and torch.equal(held["x"][0], read(tmp_path / "test/b/wide.png"))
    assert sorted(world.after(9, m.generator(0))["target"].tolist()) == [0, 1]


def test_players_of_a_grid():
    """9 players of 24 pixels are 8 x 8 each, from left to right and down; those of 10 pixels are 3 or 4 wide."""
    player = m.players_of_grid(3, 24)
    assert player.shape == (1, 24, 24) and player.flatten().bincount().tolist() == [64] * 9
    assert player[0, 0, [0, 8, 16]].tolist() == [0, 1, 2] and player[0, [0, 8, 23], 0].tolist() == [0, 3, 6]
    assert m.players_of_grid(3, 10).flatten().bincount().tolist() == [16, 12, 12, 12, 9, 9, 12, 9, 9]


def test_vit_reads_names_of_timm(tmp_path):
    """Every weight but the head's arrives; the head and another network's sizes do not."""
    cfg = images(n_layer=2)
    theirs, ours = m.Network(cfg, 5), m.Network(cfg, 2)
    m.replace_file(tmp_path / "vit.safetensors", m.save(timm_names(theirs.state_dict())))
    head = ours.head.weight.clone()
    m.load_vit(ours, tmp_path / "vit.safetensors")
    for name, x in ours.state_dict().items():
        assert torch.equal(x, theirs.state_dict()[name]) if "head" not in name else True
    assert torch.equal(ours.head.weight, head)


@pytest.mark.peers
def test_vit_equals_transformers(tmp_path):
    """Its file as it saves it; features are its last hidden state of the first token."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    theirs = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=24, patch_size=8, layer_norm_eps=1e-6))
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path)
    m.load_vit(net := m.Network(images(n_layer=2), 3), tmp_path / "model.safetensors")
    x = torch.randn(4, 3, 24, 24)
    with torch.no_grad():
        wanted = theirs.eval()(x).last_hidden_state[:, 0]
        assert (net.eval().features(x) - wanted).abs().max() < 1e-5 and wanted.std() > 0.1


def test_images_from_weights_to_interactions(pictures, here, capsys):
    """The pre-trained network is the file's, to the bit; the probe finds red and green; --explain reads the result."""
    argv = [*SMOKE, "--task", "images", "--data", str(pictures), "--n-train", "20", "--seeds", "1"]
    result = m.main([*argv, "--load", str(pictures / "vit.safetensors"), "--out", "o"])
    assert result["metrics"]["related/20/probe"] > 0.9 and len(result["data_sha256"]) == 64
    saved, file = load_file("o/w0-related.safetensors"), load_file(pictures / "vit.safetensors")
    assert all(torch.equal(x, file[name]) for name, x in timm_names(saved).items() if "head" not in name)
    assert load_file("o/games-w0-related-20.safetensors")["games"].shape == (3, 8, 512)
    m.main([*argv, "--out", "o", "--explain", "7"])
    assert "class" in capsys.readouterr().out and (here / "o/explain-7.png").exists()


def test_wrong_pictures(pictures, rejects, tmp_path):
    """Every line names the directory or the file, before anything is written."""
    argv, load = [*SMOKE, "--task", "images", "--out", tmp_path / "o"], ["--load", pictures / "vit.safetensors"]
    data, size = ["--data", pictures], ["--n-train", "20"]
    rejects(m.main, [*argv, *load], "--data", "train/CLASS")
    rejects(m.main, [*argv, *load, "--data", tmp_path], "--data", str(tmp_path))
    rejects(m.main, [*argv, *load, *data, "--n-train", "41"], "--n-train 41", "40")
    rejects(m.main, [*argv, *load, *data, *size, "--n-eval", "41"], "--n-eval 41", "40")
    rejects(m.main, [*argv, *load, *data, *size, "--arms", "random"], "--arms random", "related")
    rejects(m.main, [*argv, *load, *data, *size, "--image-size", "25"], "--image-size 25", "--patch 8")
    rejects(m.main, [*argv, *data, *size], "--load")
    shutil.copytree(pictures, mine := tmp_path / "mine")
    (mine / "test/c").mkdir()
    shutil.copy(mine / "test/a/0.png", mine / "test/c")
    rejects(m.main, [*argv, *load, "--data", mine, *size], "test/c")
    assert not (tmp_path / "o").exists()
    for wrong in (tmp_path / "none.safetensors", mine / "test/a/0.png"):
        rejects(m.main, [*argv, *data, *size, "--load", wrong], "--load", str(wrong), "timm")
    rejects(m.main, [*argv, *data, *size, *load, "--n-layer", "2"], "--load", "--n-layer")
    (tmp_path / "broken.jpg").write_text("text")
    world = m.Images(images(), "related", 0)
    rejects(lambda argv: world.read(*argv), [tmp_path / "broken.jpg"], "broken.jpg", "not a picture")


# ---------------------------------------------------------------- command line
FIELDS = ("script task scale tag seed argv commit method_hash data_sha256 device threads versions minutes tried "
          "metrics claims").split()


@pytest.mark.parametrize("argv", [(), SHAPES], ids=["concepts", "shapes"])
def test_smoke(smoke, argv):
    """Alone: every file, every field of RESULT, a row for each arm and size, no claim."""
    run = smoke("gametheory", *argv)
    lines, result, cfg = run.stdout.splitlines(), run.result, m.cli(m.Config, m.SCALES, [*SMOKE, *argv])
    arms, sizes, worlds = cfg.arms.split(","), m.numbers(cfg.n_train), range(cfg.seeds)
    assert set(FIELDS) <= set(result) and result["script"] == "gametheory" and result["claims"] == []
    assert result == json.loads((run.out / "result.json").read_text()) and "CLAIM" not in run.stdout
    assert lines[-1].startswith("RESULT ") and set(result["tried"]) == {*arms, "scratch"}
    rows = {key.rpartition("/")[0] for key in result["metrics"]}
    assert rows == {f"{arm}/{size}" for arm in [*arms, "scratch"] for size in sizes}
    assert all(any(line.startswith(row + " ") for line in lines) for row in rows)
    assert all(math.isfinite(x) for x in result["metrics"].values())
    downstream = {f"w{w}-{row.replace('/', '-')}" for w in worlds for row in rows}
    weights = downstream | {f"w{w}-{arm}" for w in worlds for arm in arms}
    files = {f"{job}.safetensors" for job in weights} | {f"games-{job}.safetensors" for job in downstream}
    assert {path.name for path in run.out.iterdir()} == files | {"config.json", "log.jsonl", "result.json", "state.pt",
                                                                 "plot.png", "curves.json"}
    assert (run.out / "plot.png").read_bytes().startswith(b"\x89PNG")
    if not argv:  # every claim's measure is there
        names = {key.split("/")[2] for _, formula, *_ in m.CLAIMS for key in formula.split(" - ") if key != "1"}
        assert names <= {key.split("/")[2] for key in result["metrics"]}
        curves = json.loads((run.out / "curves.json").read_text())
        assert all(curve["similarity_fine"][-1] == pytest.approx(1) for worlds in curves.values() for curve in worlds)


def test_checkpoint_0_is_the_pretrained_network(smoke):
    """Backbone of pre-training, the probe as head: games of checkpoint 0, to the bit; and the last one's weights."""
    out, cfg = smoke("gametheory").out, m.cli(m.Config, m.SCALES, SMOKE)
    world, games = m.make_world(cfg, "related", 1), load_file(out / "games-w1-related-40.safetensors")
    held = world.after(cfg.n_eval, m.generator(1, "explained"), held=True)
    net = m.Network(cfg, 2)
    backbone = {k: x for k, x in load_file(out / "w1-related.safetensors").items() if "head" not in k}
    net.load_state_dict(backbone, strict=False)
    m.fit_probe(cfg, net, world.after(40, m.generator(1)))
    game = held["x"], held["target"], world.baseline, world.player, cfg.mask_batch
    assert torch.equal(m.values(net.eval(), *game), games["games"][0])
    net.load_state_dict(load_file(out / "w1-related-40.safetensors"))
    assert torch.equal(m.values(net, *game), games["games"][-1]) and games["games"].shape == (3, 8, 256)
    assert 0 < games["floor"] < 1e-5


def test_kill_and_resume(kill_and_resume):
    kill_and_resume("gametheory", *ONE, seed=1)


def test_ctrl_c_says_how_to_go_on(here, smoke, monkeypatch, capsys):
    """Stopped while it fine-tunes: exit status 130, the command to go on, and the same numbers at the end."""
    checks, argv = [], [*SMOKE, *ONE]
    monkeypatch.setattr(m, "should_stop", lambda run: checks.append(0) or len(checks) == 23)
    monkeypatch.setattr(m.sys, "argv", ["gametheory.py", *argv])
    with pytest.raises(SystemExit) as stop:
        m.main(argv)
    command = re.search(r"continue with: (.*)", capsys.readouterr().out)[1]
    assert stop.value.code == 130 and shlex.split(command)[1:] == ["gametheory.py", *argv, "--resume"]
    state = torch.load(here / "out/gametheory/concepts-smoke-s0/state.pt", weights_only=True)
    assert (state["job"], state["step"], len(state["done"]), len(state["seen"])) == ("w0-related-20", 3, 1, 2)
    assert m.main([*argv, "--resume"])["metrics"] == smoke("gametheory", *ONE).result["metrics"]


def test_directories_of_another_run(rejects, smoke, tmp_path):
    out, argv = smoke("gametheory", *ONE).out, [*SMOKE, *ONE]
    rejects(m.main, [*argv, "--out", out], "finished run", "--out")
    shutil.copytree(out, tmp_path / "broken", ignore=shutil.ignore_patterns("result.json"))
    rejects(m.main, [*argv, "--out", tmp_path / "broken"], "interrupted run", "--resume")
    rejects(m.main, [*argv, "--out", tmp_path / "broken", "--resume", "--lr", "1", "--tau", "0.1"],
            "different are: lr, tau")


def test_explain(smoke, here, capsys):
    """The listed interactions are those of the network, strongest first; all of them explain the outputs."""
    out = smoke("gametheory").out
    got = m.main([*SMOKE, "--explain", "3", "--out", str(here), "--load", str(out / "w0-related-40.safetensors")])
    text, sizes = capsys.readouterr().out, [abs(x) for x in got.values()]
    assert sizes == sorted(sizes, reverse=True) and len(got) == 20 and "relative error" in text
    games = load_file(out / "games-w0-related-40.safetensors")["games"][-1, 3]
    found = m.moebius(games)
    said = -1 if games[-1] < 0 else 1  # the class that the network says may be the other one: log-odds change sign
    for name, x in got.items():
        S = sum(1 << int(i) for i in name.split(" and "))
        assert found[S].item() * said == pytest.approx(x, abs=1e-4) and f"{x:+9.4f}  {name}" in text
    assert (here / "explain-3.png").read_bytes().startswith(b"\x89PNG")
    again = m.main([*SMOKE, "--explain", "3", "--out", str(here), "--load", str(out / "w0-related-40.safetensors"),
                    "--interactions", "and-or"])
    assert any(" or " in name for name in again)


MINE = """import numpy as np
import torch
def both():
    def net(x):
        return torch.stack([3 * x[:, 0] * x[:, 1] - 2 * x[:, 2] + x[:, 3], 0 * x[:, 0]], 1)
    return net, torch.tensor([0, 1, 2, -1]), torch.zeros(4)
def module():
    net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Dropout(0.9))
    return net, np.arange(4), np.zeros(4, np.float32)
def wrong():
    return both()[0], torch.tensor([0, 2, 2, 2]), torch.zeros(4)
def halves():
    return both()[0], torch.tensor([0.0, 1, 2, 3]), torch.zeros(4)
def whole():
    return both()[0], torch.tensor([0, 1, 2, 3]), torch.zeros(4, dtype=torch.long)
def short():
    return None
def broken():
    return 1 / 0
def narrow():
    return lambda x: x[:, :3] @ torch.ones(4, 2), torch.tensor([0, 1, 2, 3]), torch.zeros(4)
def flat():
    return lambda x: x[:, 0], torch.tensor([0, 1, 2, 3]), torch.zeros(4)
def single():
    return lambda x: x[:, :1], torch.tensor([0, 1, 2, 3]), torch.zeros(4)
def nan():
    return lambda x: x[:, :2] * torch.nan, torch.tensor([0, 1, 2, 3]), torch.zeros(4)
def nan_if_masked():
    return lambda x: x[:, :2] / x[:, 2:3], torch.tensor([0, 1, 2, 3]), torch.zeros(4)
"""


def test_explain_a_callable(here, capsys):
    (here / "mine.py").write_text(MINE)
    np.save(here / "x.npy", np.ones(4))
    got = m.main(["--callable", "mine:both", "--explain", "x.npy", "--out", "here"])
    assert got == {"0 and 1": pytest.approx(3), "2": pytest.approx(-2)}
    assert "2 of 7 are above the noise" in capsys.readouterr().out and (here / "here" / "explain-x.png").exists()
    got = m.main(["--callable", "mine:both", "--explain", "x.npy", "--out", "here", "--interactions", "and-or"])
    assert got == {"0 and 1": pytest.approx(3, abs=0.01), "2": pytest.approx(-2, abs=0.01)}
    m.main(["--callable", "mine:module", "--explain", "x.npy", "--out", "here"])  # no dropout: four players alone
    assert "4 of 15 are above the noise" in capsys.readouterr().out


def test_wrong_callables(rejects, tmp_path, monkeypatch):
    """One line names the flag at fault: the user's function, what it returns, the file, or the model."""
    (tmp_path / "theirs.py").write_text(MINE)
    (tmp_path / "typo.py").write_text("def f(:")
    monkeypatch.syspath_prepend(tmp_path)
    np.save(tmp_path / "x.npy", np.ones(4))
    np.save(tmp_path / "y.npy", np.ones(5))
    np.save(tmp_path / "z.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "complex.npy", np.ones(4, complex))
    np.save(tmp_path / "text.npy", np.array(["a"] * 4))
    (tmp_path / "empty.npy").write_bytes(b"")
    for name, file, words in (("no_module:f", "x", "--callable no_module"), ("theirs:none", "x", "--callable none"),
                              ("theirs:short", "x", "--callable (model,"), ("theirs:wrong", "x", "players integers"),
                              ("theirs:halves", "x", "players integers"), ("theirs:whole", "x", "baseline int64"),
                              ("theirs:broken", "x", "--callable ZeroDivisionError"), ("typo:f", "x", "SyntaxError"),
                              ("theirs:narrow", "x", "--callable model (1, 4)"), ("theirs:flat", "x", "(1, C) classes"),
                              ("theirs:single", "x", "two classes"), ("theirs:nan", "x", "finite logits"),
                              ("theirs:nan_if_masked", "x", "--explain finite"),
                              ("theirs:both", "y", "--explain (5,) (4,)"), ("theirs:both", "z", "--explain .npy"),
                              ("theirs:both", "complex", "--explain real"), ("theirs:both", "text", "--explain .npy"),
                              ("theirs:both", "empty", "--explain .npy"), ("theirs:both", "none", "none.npy")):
        rejects(m.main, ["--callable", name, "--explain", tmp_path / f"{file}.npy"], *words.split())
    rejects(m.main, ["--callable", "theirs", "--explain", "x.npy"], "--callable", "module:function")
    rejects(m.main, ["--callable", "theirs:both"], "--callable", "--explain")


def test_explain_needs_weights(rejects, tmp_path):
    rejects(m.main, [*SMOKE, "--explain", "0"], "--load", "w0-related-40.safetensors")
    (tmp_path / "bad.safetensors").write_text("not weights")
    rejects(m.main, [*SMOKE, "--explain", "0", "--load", tmp_path / "bad.safetensors"], "--load", "bad.safetensors")
    m.replace_file(tmp_path / "other.safetensors", m.export(torch.nn.Linear(2, 2)))
    rejects(m.main, [*SMOKE, "--explain", "0", "--load", tmp_path / "other.safetensors"], "--load", "other.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(vars(m.cli(m.Config, m.SCALES, [*SMOKE, "--noise", "0.5"]))))
    rejects(m.main, [*SMOKE, "--explain", "0", "--load", tmp_path / "other.safetensors"], "--load", "noise 0.5")


BAD = {
    "--colour red": "--colour -h", "--ste 5": "--ste", "--task chess": "chess concepts", "--arch cnn": "cnn mlp",
    "--scale huge": "huge smoke", "--dtype bfloat16": "bfloat16 float32", "--steps x": "--steps",
    "--arms related,": "--arms", "--seed -1": "--seed 0", "--n-train many": "--n-train many",
    "--kernels": "--kernels CUDA",
    "--device cuda": "--device cuda auto", "--scale paper": "--scale paper --task images",
    "--explain 8": "--explain 8 7",
    "--explain x.npy": "--explain --callable", "--interactions or": "or and-or"}
LIMITS = {  # settings of Config that it refuses
    "arms": ["", "related,related", "scratch", "related "], "n_train": ["5,50", "50,40", "50,50", "50,", "0"],
    "epochs": ["1,2", "0", "0,2,1", "40", "", "0,-1"], "n_players": [7, 17, 0], "tau": [1.0, -0.1, math.nan],
    "smoothing": [1.0], "noise": [-1.0, math.inf], "lr": [math.nan, -1.0], "lr_fine": [math.inf], "seed": [-1],
    "weight_decay": [-0.1], "n_embd": [3, 0], "explain": ["32", "-1", "a"], "callable": ["a:b", "a"],
    **{name: [0, -1] for name in ("seeds", "n_eval", "n_test", "n_layer", "n_head", "steps", "batch_size",
                                  "batch_fine", "mask_batch", "log_every", "save_every")}}


@pytest.mark.parametrize("argv, words", BAD.items(), ids=list(BAD))
def test_wrong_flags(rejects, argv, words):
    rejects(m.main, [*SMOKE, *argv.split()], *words.split())


@pytest.mark.parametrize("name", LIMITS)
def test_refused_settings(rejects, name):
    """The line names the flag, and the value where there is one."""
    for value in LIMITS[name]:
        rejects(lambda argv: m.Config(**{name: value}), [], f"--{name.replace('_', '-')}")
    assert m.Config(n_train="10", epochs="0,1", tau=0.0, seed=0, noise=0.0, n_players=16, explain="31")


def test_refused_combinations(rejects):
    for words, changes in {"--n-players 9 tiles": dict(task="tiles", n_players=9),
                           "--n-players 8 shapes 9, 16": dict(task="shapes"),
                           "--n-embd 128 --n-head 3": dict(n_head=3, arch="transformer"),
                           "--load --explain": dict(load="x")}.items():
        rejects(lambda argv: m.Config(**changes), [], *words.split())


def test_one_process(rejects, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    rejects(m.main, SMOKE, "torchrun", "--seed")


def test_missing_kernels(rejects):
    rejects(lambda argv: m.load_kernel(*argv), ["no_such_kernel"], "--kernels", "kernels/", "triton")


def test_jobs():
    """Pre-training before what needs it; the worlds of two seeds have nothing in common."""
    cfg = m.Config(seeds=2, arms="related,random", n_train="50,150", seed=1)
    jobs = m.jobs(cfg)
    assert jobs[:7] == [(100, "related", 0), (100, "related", 50), (100, "related", 150), (100, "random", 0),
                        (100, "random", 50), (100, "random", 150), (100, "scratch", 50)]
    assert len(jobs) == len(set(jobs)) == 16 and {seed for seed, _, _ in jobs} == {100, 101}


def test_dry_run_prints_and_creates_nothing(here, capsys):
    """Parameters and steps by hand: an MLP of three layers; 15 pre-trainings, 20 fits of each size."""
    m.main(["--dry-run"])
    text = capsys.readouterr().out
    parameters = 64 * 128 + 128 + 2 * (128 * 128 + 128) + 128 * 2 + 2
    after = 20 * 40 * sum(math.ceil(n / 16) for n in (50, 150, 400, 1600))
    assert f"{parameters:,} parameters" in text and f"{15 * 2500:,} of pre-training, {after:,} downstream" in text
    assert f"{80 * 13 * 32 * 256:,} masked forwards" in text and "H100" in text
    m.main(["--scale", "paper", "--task", "images", "--dry-run"])  # ViT-S/16 with 1,000 classes: 22.05 M
    assert "21,666,434 parameters" in capsys.readouterr().out
    m.main(["--scale", "paper", "--task", "images", "--n-embd", "768", "--n-head", "12", "--dry-run"])
    assert "GiB" in capsys.readouterr().out and list(here.rglob("*")) == []


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        m.main(["-h"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert [f.name for f in m.fields(m.Config) if f"--{f.name.replace('_', '-')}" not in text] == []
