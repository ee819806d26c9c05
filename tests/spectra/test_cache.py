"""The shared cache: what is measured, when it is delivered, what it costs, what failures say."""

import math
import re

import pytest
import torch
from torch import nn

from spectral_lightning.linalg import gaussian_stable_rank
from spectral_lightning.spectra import Need, SpectrumCache, find_targets
from spectral_lightning.testing import RefuseHostSync

NAMES = ["wide", "same", "tall", "small", "bfloat16_", "float64_"]


def assert_exact(reading, weight):
    """A reading against the float64 spectrum of the weight it was taken of."""
    truth = torch.linalg.svdvals(weight.detach().double())
    low, high = reading.spectral_norm_interval
    assert reading.spectral_norm == pytest.approx(truth[0].item(), rel=1e-3)
    assert low <= truth[0] <= high
    assert reading.frobenius_norm == pytest.approx(truth.norm().item(), rel=1e-5)
    stable_rank = (truth.norm() / truth[0]).item() ** 2
    assert reading.stable_rank == pytest.approx(stable_rank, rel=2e-3)
    null = gaussian_stable_rank(*weight.shape)
    assert reading.relative_stable_rank == pytest.approx(stable_rank / null, rel=2e-3)
    assert reading.failure is None


def scale(model, factor):
    for parameter in model.parameters():
        parameter.data.mul_(factor)


def test_every_matrix_is_read_right_whatever_its_shape_and_dtype(model, make_cache):
    cache = make_cache(model)
    for step in range(3):
        cache.measure(step)
    cache.flush()
    assert list(cache) == NAMES
    for name, reading in cache.items():
        assert reading.name == name
        assert reading.step == 2
        assert reading.shape == tuple(model[name].weight.shape)
        assert reading.trainable == (name != "same")
        assert_exact(reading, model[name].weight)


def test_readings_arrive_exactly_one_step_late_whatever_became_of_them(model, make_cache):
    model["tall"].weight.data.zero_()
    model["bfloat16_"].weight.data.fill_(math.nan)
    model["small"].weight = nn.Parameter(torch.empty(0, 5))
    cache = make_cache(model, {"spectrum_every_n_steps": 1})
    cache.measure(10)
    assert len(cache) == 0
    assert cache.delivered_step is None
    assert not cache.failures
    cache.measure(11)
    assert set(cache) == set(NAMES)
    assert {reading.step for reading in cache.values()} == {10}
    assert {reading.spectrum_step for reading in cache.values()} == {10}
    assert set(cache.failures) == {"tall", "bfloat16_", "small"}
    assert cache.delivered_step == 10
    cache.flush()
    assert {reading.step for reading in cache.values()} == {11}
    assert cache.delivered_step == 11


def test_a_reading_is_of_the_weight_at_its_step_not_at_delivery(model, make_cache):
    cache = make_cache(model, {"spectrum_every_n_steps": 1})
    cache.measure(0)
    before = {name: model[name].weight.detach().clone() for name in NAMES}
    scale(model, 2)
    cache.measure(1)
    for name in NAMES:
        assert_exact(cache[name], before[name])
        assert cache[name].values[0] == pytest.approx(cache[name].spectral_norm, rel=1e-3)


def test_one_measurement_per_matrix_and_step_however_many_ask(model, make_cache):
    cache = make_cache(model, {}, {"every_n_steps": 3}, {"names": frozenset({"wide"})})
    assert cache.measure(0) == sorted(NAMES)
    assert cache.measure(0) == []
    assert cache.measure(0, everything=True) == []
    assert cache.num_decompositions == len(NAMES)
    assert cache.measure(1) == sorted(NAMES)
    assert cache.num_decompositions == 2 * len(NAMES)


def test_the_bill_of_joined_needs_is_that_of_the_most_demanding(model, make_cache):
    needs = [
        {"every_n_steps": 2, "spectrum_every_n_steps": 4},
        {"every_n_steps": 4, "spectrum_every_n_steps": 8},
        {"every_n_steps": 6, "names": frozenset({"wide", "tall"})},
        {"every_n_steps": 2},
    ]
    alone, joined = make_cache(model, needs[0]), make_cache(model, *needs)
    for step in range(13):
        alone.measure(step)
        joined.measure(step)
    assert joined.num_decompositions == alone.num_decompositions == len(NAMES) * (7 + 4)


def test_everything_takes_what_is_not_due_too(model, make_cache):
    cache = make_cache(model, {"every_n_steps": 5, "spectrum_every_n_steps": 7})
    assert cache.measure(1) == []
    assert cache.measure(1, everything=True) == sorted(NAMES)
    cache.measure(1, all_spectra=True)
    cache.flush()
    assert {(r.step, r.spectrum_step) for r in cache.values()} == {(1, 1)}


def test_a_forgotten_weight_is_measured_anew_within_the_step(model, make_cache):
    cache = make_cache(model, {"spectrum_every_n_steps": 1})
    cache.measure(0)
    model["wide"].weight.data.copy_(torch.eye(40, 48))
    cache.forget("wide")
    assert cache.measure(0) == ["wide"]
    assert cache.num_decompositions == 2 * len(NAMES) + 2
    cache.flush()
    assert cache["wide"].spectral_norm == pytest.approx(1, rel=1e-6)
    assert cache["wide"].values == pytest.approx([1.0] * 40, rel=1e-6)
    assert_exact(cache["same"], model["same"].weight)


def test_the_exact_spectrum_keeps_its_own_cadence(make_cache):
    layer = nn.Linear(3, 2, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[4.0, 0, 0], [0, 1, 0]]))
    cache = make_cache(nn.ModuleDict({"a": layer}), {"spectrum_every_n_steps": 2})
    for step in range(4):
        cache.measure(step)
        if step == 2:
            layer.weight.data[1, 1] = 0.0  # after step 2 was measured
    reading = cache["a"]
    assert (reading.step, reading.spectrum_step) == (2, 2)
    assert reading.values == (4, 1)
    assert reading.condition_number == 4
    p = torch.tensor([0.8, 0.2])
    assert reading.effective_rank == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-6)
    cache.measure(4)
    cache.flush()
    assert cache["a"].condition_number == math.inf
    assert cache["a"].effective_rank == 1


def test_without_an_exact_spectrum_its_numbers_are_none(model, make_cache):
    cache = make_cache(model)
    cache.measure(0)
    cache.flush()
    reading = cache["wide"]
    assert reading.values is reading.condition_number is reading.effective_rank is None
    assert reading.relative_condition_number is reading.spectrum_step is None


FAILURES = {
    "nan": (lambda w: w[0].fill_(math.nan), "has a NaN or infinite entry .*"),
    "inf": (lambda w: w[0].fill_(-math.inf), "has a NaN or infinite entry .*"),
    "overflow": (lambda w: w.fill_(1e25), r".* \(or entries beyond 1e17\)"),
    "zero": (lambda w: w.zero_(), "is zero .*, which has no stable rank"),
    "vanishing": (lambda w: w.fill_(1e-25), r".* \(or below 1e-16 in norm\), .*"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_says_why_and_goes_with_the_repair(model, make_cache, kind):
    spoil, message = FAILURES[kind]
    cache = make_cache(model, {"spectrum_every_n_steps": 1})
    cache.measure(0)
    original = model["wide"].weight.detach().clone()
    spoil(model["wide"].weight.data)
    cache.measure(1)
    model["wide"].weight.data.copy_(original)
    cache.measure(2)
    reading = cache["wide"]
    assert reading.step == 1
    assert cache.failures == {"wide": reading.failure}
    assert re.fullmatch(f"the weight {message}", reading.failure)
    assert math.isnan(reading.stable_rank)
    assert_exact(cache["same"], model["same"].weight)
    cache.flush()
    assert not cache.failures
    assert_exact(cache["wide"], original)


def test_a_zero_weight_has_norms_but_no_ranks(make_cache):
    layer = nn.Linear(40, 34)
    layer.weight.data.zero_()
    cache = make_cache(nn.ModuleDict({"a": layer}), {"spectrum_every_n_steps": 1})
    cache.measure(0)
    cache.flush()
    reading = cache["a"]
    assert reading.spectral_norm == reading.frobenius_norm == 0
    assert reading.spectral_norm_interval == (0, 0)
    assert math.isnan(reading.relative_stable_rank)
    assert math.isnan(reading.effective_rank)
    assert reading.values == (0.0,) * 34


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_weight_is_a_failure_and_not_a_crash(make_cache, shape):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.empty(shape))
    cache = make_cache(
        nn.ModuleDict({"a": layer, "b": nn.Linear(4, 4)}), {"spectrum_every_n_steps": 1}
    )
    cache.measure(0)
    cache.flush()
    assert cache["a"].failure == f"the weight is empty, of shape {shape}"
    assert math.isnan(cache["a"].spectral_norm)
    assert cache["b"].failure is None


def test_a_weight_that_changes_its_shape_is_a_failure_and_not_a_crash(model, make_cache):
    cache = make_cache(model, {"spectrum_every_n_steps": 1})
    cache.measure(0)
    model["wide"].weight = nn.Parameter(torch.ones(41, 48))
    cache.measure(1)
    cache.flush()
    assert cache["wide"].failure == "the weight has changed its shape from (40, 48) to (41, 48)"
    assert_exact(cache["same"], model["same"].weight)


def test_a_weight_replaced_after_discovery_is_read_anew(model, make_cache):
    cache = make_cache(model)
    cache.measure(0)
    model["wide"].weight = nn.Parameter(7 * torch.eye(40, 48))
    cache.measure(1)
    cache.flush()
    assert cache["wide"].spectral_norm == pytest.approx(7, rel=1e-6)


def test_it_is_a_mapping_of_what_has_been_delivered(model, make_cache):
    cache = make_cache(model, {"names": frozenset({"wide", "tall"})})
    assert dict(cache) == {}
    assert set(cache.targets) == set(NAMES)
    cache.measure(0)
    cache.flush()
    assert set(cache) == {"wide", "tall"}
    assert len(cache) == 2
    assert "same" not in cache
    assert cache.get("same") is None
    assert cache["wide"] == cache["wide"]
    with pytest.raises(KeyError, match="same"):
        cache["same"]


def test_measuring_changes_no_weight_and_no_global_random_state(model, make_cache):
    before = [torch.get_rng_state(), *(p.detach().clone() for p in model.parameters())]
    cache = make_cache(model, {"spectrum_every_n_steps": 2})
    for step in range(4):
        cache.measure(step)
    cache.flush()
    after = [torch.get_rng_state(), *(p.detach() for p in model.parameters())]
    assert all(map(torch.equal, after, before))


@pytest.mark.usefixtures("accelerator_route")
def test_where_nothing_waits_no_step_syncs_with_the_device(model, make_cache):
    cache = make_cache(model, {}, {"names": frozenset({"wide"}), "every_n_steps": 2}, wait=False)
    with RefuseHostSync():
        for step in range(3):
            cache.measure(step)
            scale(model, 1.01)
        cache.forget("tall")
        cache.measure(2)
    cache.flush()
    assert cache["wide"].step == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_syncs_with_a_gpu(model, make_cache):
    cache = make_cache(model.cuda())
    cache.measure(0)  # allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.measure(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cache.flush()
    for name in NAMES:
        assert_exact(cache[name], model[name].weight.cpu())


def test_known_targets_stay_as_they_are_when_declared_again(model):
    cache = SpectrumCache()
    first, second = find_targets(model).targets, find_targets(model).targets
    cache.declare(Need(names=frozenset(NAMES)), first)
    cache.declare(Need(names=frozenset(NAMES)), second)
    assert all(cache.targets[target.name] is target for target in first)


def test_a_need_must_name_known_matrices(model):
    with pytest.raises(AssertionError, match="a need names a matrix that is not a target"):
        SpectrumCache().declare(Need(names=frozenset({"nope"})), find_targets(model).targets)
