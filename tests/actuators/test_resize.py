"""Ranks change without a scar: function, gradients, and what the optimizer remembers."""

import copy

import pytest
import torch
from torch import nn

from spectral_lightning.actuators import best_components, fresh_rows, grow_, regauge_, shrink_
from spectral_lightning.linalg import truncation
from spectral_lightning.nn import LowRankLinear
from spectral_lightning.optim import MuonAdamW, parameter_groups

N, M = 20, 14


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer(rank=8, capacity=12, seed=0):
    torch.manual_seed(seed)
    return LowRankLinear(N, M, rank, capacity=capacity).double()


def gradients(seed):
    return randn(M, N, seed=seed)


def step(layer, optimizer, seed, *, is_taken=True):
    """One optimizer step on a gradient of the weight that does not depend on the weight."""
    optimizer.zero_grad()
    (layer.spectral_weight() * gradients(seed)).sum().backward()
    if is_taken:
        optimizer.step()


def trained(make, steps=20, **options):
    layer = make_layer(**options)
    optimizer = make(layer.parameters())
    for seed in range(steps):
        step(layer, optimizer, 100 + seed)
    return layer, optimizer


def order_(layer, optimizer=None, moment=None):
    found = best_components(layer, layer.rank, moment=moment, is_balanced=False)
    regauge_(layer, optimizer, found, moments="carry")


def grow_to(layer, optimizer, rank, directions=None):
    rows = fresh_rows(layer, rank - layer.rank, directions=directions)
    grow_(layer, optimizer, rows)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95))


def test_shrinking_gives_the_nearest_weight_of_that_rank_in_balanced_form():
    layer = make_layer()
    U, S, Vh = torch.linalg.svd(layer.spectral_weight().detach())
    kept = shrink_(layer, None, 5)
    assert layer.rank == 5
    assert torch.allclose(layer.spectral_weight(), U[:, :5] * S[:5] @ Vh[:5], atol=1e-10)
    left, right = layer.factors()
    assert torch.allclose(left.mT @ left, torch.diag(S[:5]), atol=1e-10)
    assert torch.allclose(right @ right.mT, torch.diag(S[:5]), atol=1e-10)
    assert kept.item() == pytest.approx((S[:5].square().sum() / S.square().sum()).item())
    assert not layer.left_factor[:, 5:].any()
    assert not layer.right_factor[5:].any()


def test_with_a_moment_the_outputs_stay_nearest():
    x = randn(3000, N, seed=3) * torch.logspace(1, -2, N, dtype=torch.float64)
    errors = {}
    for name in ("plain", "weighted"):
        layer = make_layer()
        before, hidden = layer(x), x @ layer.factors()[1].mT
        moment = hidden.mT @ hidden / len(x) if name == "weighted" else None
        shrink_(layer, None, 3, moment=moment.detach() if moment is not None else None)
        errors[name] = (layer(x) - before).square().sum(1).mean().item()
    best = torch.linalg.svdvals(before)[3:].square().sum().item() / len(x)
    assert errors["weighted"] == pytest.approx(best, rel=1e-5)
    assert errors["plain"] > 1.2 * errors["weighted"]


@pytest.mark.parametrize("is_known", [True, False])
def test_ordering_keeps_the_function_and_makes_every_prefix_the_best(is_known):
    layer, x = make_layer(), randn(2000, N, seed=3) * torch.logspace(1, -2, N).double()
    before, hidden = layer(x).detach(), x @ layer.factors()[1].detach().mT
    moment = hidden.mT @ hidden / len(x) if is_known else None
    truth = torch.linalg.svdvals(before if is_known else layer.spectral_weight().detach())
    order_(layer, None, moment=moment)
    assert torch.allclose(layer(x), before, atol=1e-7)
    for k in (2, 5, 7):
        cut = copy.deepcopy(layer)
        cut.set_rank(k)
        lost = (cut(x) - before) if is_known else (cut.spectral_weight() - layer.spectral_weight())
        assert lost.norm().item() == pytest.approx(truth[k:].norm().item(), rel=1e-4)


@pytest.mark.parametrize("rank", [9, 12])
@pytest.mark.parametrize("directions", [None, 1, 6])
def test_growth_leaves_the_weight_bit_for_bit_and_reads_what_is_new(rank, directions):
    layer, _ = trained(adamw)
    before = layer.spectral_weight().detach().clone()
    old = layer.factors()[1].detach().clone()
    wanted = None if directions is None else randn(directions, N, seed=7)
    grow_to(layer, None, rank, wanted)
    assert layer.rank == rank
    assert torch.equal(layer.spectral_weight(), before)
    new = layer.right_factor.detach()[8:rank]
    assert (new @ old.mT).abs().max() < 1e-12
    lengths = new.norm(dim=1)
    assert torch.allclose(lengths, old.norm(dim=1).mean().expand_as(lengths))
    assert torch.allclose(new @ new.mT, torch.diag(lengths.square()), atol=1e-12)
    if wanted is not None:  # the first new row is the first direction, without what was read
        basis = torch.linalg.qr(old.mT).Q
        rest = wanted[0] - basis @ (basis.mT @ wanted[0])
        assert abs((new[0] @ rest) / (new[0].norm() * rest.norm())).item() == pytest.approx(1)


@pytest.mark.parametrize("beta", [0.95, 0.999])
def test_the_first_step_of_new_components_is_no_larger_than_that_of_old_ones(beta):
    def make(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, beta), weight_decay=0.0)

    layer, optimizer = trained(make, steps=400)
    grow_to(layer, optimizer, 12)
    before = layer.left_factor.detach().clone()
    step(layer, optimizer, 999)
    moved = (layer.left_factor.detach() - before).abs()
    assert 0 < moved[:, 8:].max() <= 1.5e-2
    naive, optimizer = trained(make, steps=400)
    grow_to(naive, optimizer, 12)
    optimizer.state[naive.left_factor]["exp_avg_sq"][:, 8:] = 0
    before = naive.left_factor.detach().clone()
    step(naive, optimizer, 999)
    expected = (1 - 0.9) / (1 - beta) ** 0.5 * 1e-2 * (1 - beta**401) ** 0.5 / (1 - 0.9**401)
    worst = (naive.left_factor.detach() - before).abs()[:, 8:].max().item()
    assert worst == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_first_moments_are_those_of_gradients_taken_in_the_new_form(name):
    makers = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.0, weight_decay=0.0),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
        "muon": lambda p: torch.optim.Muon(p, lr=0.0, weight_decay=0.0),
    }
    states = []
    found = truncation(*(f.detach() for f in make_layer().factors()), 8)
    for first in (True, False):  # before the gradients or after them
        layer = make_layer()
        optimizer = makers[name](layer.parameters())
        if first:
            regauge_(layer, optimizer, found)
        for seed in range(20):
            step(layer, optimizer, seed)
        if not first:
            regauge_(layer, optimizer, found, moments="carry")
        key = "exp_avg" if name == "adamw" else "momentum_buffer"
        states.append([optimizer.state[p][key].clone() for p in layer.parameters()])
    for own, other in zip(*states, strict=True):
        assert torch.allclose(own, other, rtol=0, atol=1e-10)


def test_second_moments_are_right_on_average_for_uncorrelated_entries():
    found = truncation(*(f.detach() for f in make_layer().factors()), 5)
    sums = []
    for first in (True, False):
        layer = make_layer()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0, betas=(0.9, 0.99))
        if first:
            regauge_(layer, optimizer, found)
        for seed in range(300):
            step(layer, optimizer, seed)
        if not first:
            regauge_(layer, optimizer, found, moments="carry")
        sums.append([optimizer.state[p]["exp_avg_sq"].sum().item() for p in layer.parameters()])
        assert all(optimizer.state[p]["step"] == 300 for p in layer.parameters())
    for own, other in zip(*sums, strict=True):
        assert own == pytest.approx(other, rel=0.15)  # 0.09 at most in 300 draws


def test_gradients_under_accumulation_follow():
    layer, optimizer = trained(adamw)
    twin, _ = trained(adamw)
    step(layer, optimizer, 5, is_taken=False)
    shrink_(layer, optimizer, 8)
    twin.load_state_dict(layer.state_dict())
    twin.zero_grad()
    (twin.spectral_weight() * gradients(5)).sum().backward()
    for own, other in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(own.grad, other.grad, atol=1e-10)


def test_parameters_and_optimizer_stay_the_same_objects_and_go_on():
    layer, optimizer = trained(adamw)
    other = nn.Parameter(randn(3))
    optimizer.add_param_group({"params": [other]})
    other.grad = torch.ones_like(other)
    optimizer.step()
    kept = copy.deepcopy(optimizer.state[other])
    ids = [id(p) for p in layer.parameters()]
    shrink_(layer, optimizer, 4)
    grow_to(layer, optimizer, 10)
    assert ids == [id(p) for p in layer.parameters()]
    assert all(torch.equal(kept[k], optimizer.state[other][k]) for k in kept)
    before = layer.spectral_weight().detach().clone()
    step(layer, optimizer, 1)
    assert (layer.spectral_weight() - before).norm() > 0
    assert not layer.left_factor[:, 10:].any()


def test_running_means_can_begin_anew():
    layer, optimizer = trained(adamw)
    shrink_(layer, optimizer, 4, moments="carry_second")
    state = optimizer.state[layer.left_factor]
    assert not state["exp_avg"].any()
    assert state["exp_avg_sq"][:, :4].all()
    assert not state["exp_avg_sq"][:, 4:].any()
    shrink_(layer, optimizer, 3, moments="reset")
    assert not state["exp_avg_sq"].any()
    assert state["step"] == 0
    before = layer.left_factor.detach().clone()
    step(layer, optimizer, 7)  # a first step of Adam is as long as its rate
    assert (layer.left_factor - before)[:, :3].abs().max() <= 1.01e-2 + 1e-4


def test_muon_trains_factors_through_a_change_of_rank():
    model = nn.Sequential(make_layer(), nn.Linear(M, 2).double())
    optimizer = MuonAdamW(parameter_groups(model), lr=0.02)
    for seed in range(6):
        optimizer.zero_grad()
        model(randn(8, N, seed=seed)).square().sum().backward()
        optimizer.step()
        if seed == 2:
            shrink_(model[0], optimizer, 4, moments="carry")
    assert "momentum_buffer" in optimizer.state[model[0].left_factor]
    assert model[0].spectral_weight().isfinite().all()


def test_a_fading_component_is_dropped_without_a_jump():
    layer, optimizer = trained(adamw)
    order_(layer, optimizer)
    with torch.no_grad():
        layer.gate[5:8] = 0
    before = layer.spectral_weight().detach().clone()
    step(layer, optimizer, 3)
    before = layer.spectral_weight().detach().clone()
    shrink_(layer, optimizer, 5)
    assert torch.allclose(layer.spectral_weight(), before, atol=1e-12)


def test_half_faded_gates_are_taken_into_the_factor():
    layer, optimizer = trained(adamw)
    with torch.no_grad():
        layer.gate[5:8] = 0.5
    before = layer.spectral_weight().detach().clone()
    shrink_(layer, optimizer, 8)
    assert (layer.gate[:8] == 1).all()
    assert torch.allclose(layer.spectral_weight(), before, atol=1e-12)


def test_dependent_components_are_replaced_by_ones_that_can_learn():
    layer, optimizer = trained(adamw)
    with torch.no_grad():
        layer.left_factor[:, 7] = layer.left_factor[:, 6]
        layer.right_factor[7] = layer.right_factor[6]
    before = layer.spectral_weight().detach().clone()
    shrink_(layer, optimizer, 8)
    assert layer.rank == 8
    assert torch.allclose(layer.spectral_weight(), before, atol=1e-12)
    step(layer, optimizer, 3)
    assert torch.linalg.matrix_rank(layer.spectral_weight()) == 8


def test_bf16_factors_keep_their_product_to_rounding():
    layer = make_layer().bfloat16()
    before = layer.spectral_weight().float()
    shrink_(layer, None, 8)
    change = (layer.spectral_weight().float() - before).norm() / before.norm()
    assert change < 1e-2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer: shrink_(layer, None, 9), r"`rank` must be in \[1, 8\] to shrink, got 9"),
        (lambda layer: shrink_(layer, None, 0), r"`rank` must be in \[1, 8\] to shrink, got 0"),
        (lambda layer: grow_to(layer, None, 13), "`rows` must be at most 4 rows, got 5"),
        (lambda layer: shrink_(layer, None, 4, moments="none"), "`moments` must be one of carry,"),
        (lambda layer: shrink_(layer, None, 4, moment=torch.eye(3)), r"`moment` must have shape"),
    ],
)
def test_a_wrong_resize_is_refused_and_nothing_is_changed(call, message):
    layer = make_layer()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        call(layer)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_weights_of_zeros_or_without_finite_values_are_refused():
    layer = make_layer()
    with torch.no_grad():
        layer.left_factor.zero_()
    with pytest.raises(ValueError, match="`layer` must not have a weight of zeros"):
        shrink_(layer, None, 4)
    with torch.no_grad():
        layer.left_factor.fill_(torch.nan)
    with pytest.raises(ValueError, match="`left` must be finite"):
        shrink_(layer, None, 4)


@pytest.mark.parametrize("make", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Rprop])
@pytest.mark.parametrize("change", [lambda *run: shrink_(*run, 6), lambda *run: grow_to(*run, 10)])
def test_what_is_not_known_to_follow_begins_anew_with_a_warning(make, change):
    layer, optimizer = trained(make, rank=8)
    with pytest.warns(UserWarning, match=f"{make.__name__} keeps .* which cannot follow a change"):
        change(layer, optimizer)
    for state in optimizer.state.values():
        assert not any(torch.as_tensor(value).any() for value in state.values())
