"""One group of matrices: first readings, failures and repairs, what is kept between readings."""

import math

import pytest
import torch

from spectral_lightning.spectra.tracker import FIELDS, WHOLE_SPACE, is_measured
from spectral_lightning.testing import RefuseHostSync, matrix_with_spectrum

EPS = torch.finfo(torch.float32).eps


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def with_spectrum(values, shape, seed):
    values = torch.as_tensor(values, dtype=torch.float64)
    return matrix_with_spectrum(values, shape, generator=rng(seed), dtype=torch.float32)


def clustered(shape, seed):
    k = min(shape)
    values = 1 - 1e-4 * torch.arange(k, dtype=torch.float64)
    values[(k + 1) // 2 :] = 0.3
    return with_spectrum(values, shape, seed)


KINDS = {
    "gaussian": gaussian,
    "clustered": clustered,
    "rank_one": lambda shape, seed: with_spectrum([2.0], shape, seed),
    "rank_deficient": lambda shape, seed: with_spectrum(
        torch.linspace(1, 0.5, (min(shape) + 1) // 2), shape, seed
    ),
    "decaying": lambda shape, seed: with_spectrum(
        10.0 ** -torch.linspace(0, 7, min(shape)), shape, seed
    ),
    "signs": lambda shape, seed: 1e-3 * gaussian(shape, seed).sign(),
    "constant": lambda shape, seed: torch.full(shape, 0.1),
    "identity": lambda shape, seed: torch.eye(*shape),
    "one_entry": lambda shape, seed: gaussian(shape, seed) * (torch.arange(shape[1]) == seed % 2),
}
SHAPES = [(1, 1), (1, 7), (7, 1), (2, 3), (3, 50), (50, 3), (33, 33), (34, 40), (64, 48), (40, 300)]


def rows_of(tracker, index=None):
    """Measure, and learn from the rows at once as the cache does one step later."""
    index = range(len(tracker.names)) if index is None else index
    table = tracker.measure(index)
    names = [tracker.names[i] for i in index]
    tracker.settle(dict(zip(names, table.tolist(), strict=True)))
    return dict(zip(FIELDS, table.unbind(dim=1), strict=True))


def assert_right(rows, truth, rtol):
    margin = 4 * EPS * truth
    assert (rows["spectral_norm"] <= truth * (1 + 1e-5)).all()
    assert (rows["spectral_norm"] >= truth * (1 - rtol)).all()
    assert (rows["low"] <= truth + margin).all()
    assert (truth <= rows["high"] + margin).all()


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_first_reading_is_accurate(make_tracker, spectral_norms, kind, shape, wait):
    weights = [KINDS[kind](shape, seed) for seed in range(10)]
    tracker, layers = make_tracker(weights, wait=wait)
    rows = rows_of(tracker)
    exact = min(shape) <= WHOLE_SPACE
    assert_right(rows, spectral_norms(layers), 20 * EPS if exact else 1e-3)
    frobenius = torch.stack([weight.double().norm() for weight in weights])
    torch.testing.assert_close(rows["frobenius_norm"], frobenius, rtol=1e-5, atol=0)


def test_first_readings_do_not_stop_at_the_second_value(make_tracker, spectral_norms):
    """Two random vectors would, for one matrix in a thousand."""
    spectrum = torch.cat([torch.tensor([1.0, 0.98]), torch.full((38,), 0.2)])
    weights = [with_spectrum(spectrum, (40, 40), seed) for seed in range(400)]
    tracker, layers = make_tracker(weights)
    assert_right(rows_of(tracker), spectral_norms(layers), 1e-3)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("shape", [(48, 40), (20, 60), (60, 20)])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, 1e-20, 1e19])
def test_a_failed_weight_disturbs_no_other_and_recovers_after_repair(
    make_tracker, spectral_norms, bad, shape, wait
):
    weights = [gaussian(shape, seed) for seed in range(4)]
    tracker, layers = make_tracker(weights, wait=wait)
    rows_of(tracker)
    for step in range(3):
        layers[1].weight.data.fill_(bad)
        table = torch.stack(list(rows_of(tracker).values()), dim=1).tolist()
        assert [is_measured(row) for row in table] == [True, False, True, True], step
        good = [layers[i] for i in (0, 2, 3)]
        low, high = ([table[i][column] for i in (0, 2, 3)] for column in (1, 2))
        truth = spectral_norms(good)
        assert (torch.tensor(low).double() <= truth).all()
        assert (truth <= torch.tensor(high).double()).all()
    layers[1].weight.data.copy_(gaussian(shape, 9).sign())
    assert_right(rows_of(tracker), spectral_norms(layers), 1e-3)


def test_zero_weights_that_begin_to_move_are_read_accurately_at_once(make_tracker, spectral_norms):
    """Projections that start at zero do so, in every GPT of this kind, at the first step."""
    tracker, layers = make_tracker([torch.zeros(96, 64)] * 20)
    assert rows_of(tracker)["spectral_norm"].tolist() == [0.0] * 20
    for seed, layer in enumerate(layers):
        layer.weight.data.add_(1e-3 * gaussian((96, 64), seed).sign())
    assert_right(rows_of(tracker), spectral_norms(layers), 1e-3)


def test_failures_and_new_starts_cost_the_others_nothing(make_tracker):
    tracker, layers = make_tracker([gaussian((48, 40), seed) for seed in range(4)])
    layers[1].weight.data.fill_(math.nan)
    rows_of(tracker)
    tracker.forget("layer2")
    passes = rows_of(tracker)["passes"]
    assert passes[0] == passes[3] == 1
    assert passes[1] == 1
    assert passes[2] > 3


def test_warm_readings_are_cheaper_than_the_first(make_tracker):
    tracker, layers = make_tracker([gaussian((96, 64), seed) for seed in range(8)])
    first = rows_of(tracker)["passes"]
    for seed, layer in enumerate(layers):
        layer.weight.data.add_(1e-3 * gaussian((96, 64), 50 + seed))
    assert first.min() >= 5
    assert rows_of(tracker)["passes"].tolist() == [1.0] * 8


def test_without_waiting_passes_follow_the_width_of_settled_intervals(make_tracker):
    tracker, layers = make_tracker([gaussian((96, 64), seed) for seed in range(3)], wait=False)
    assert rows_of(tracker)["passes"].tolist() == [16.0] * 3
    assert rows_of(tracker)["passes"].tolist() == [2.0] * 3
    layers[0].weight.data.copy_(gaussian((96, 64), 9))
    assert rows_of(tracker)["passes"].tolist() == [2.0] * 3
    assert rows_of(tracker)["passes"].tolist() == [4.0] * 3
    for _ in range(6):
        rows = rows_of(tracker)
    assert rows["passes"].tolist() == [2.0] * 3


@pytest.mark.usefixtures("accelerator_route")
@pytest.mark.parametrize("shape", [(48, 40), (8, 60)])
def test_without_waiting_no_reading_syncs_with_the_device(make_tracker, shape):
    tracker, _ = make_tracker([gaussian(shape, seed) for seed in range(4)], wait=False)
    with RefuseHostSync():
        tracker.measure(range(4))  # first
        tracker.measure(range(4))  # all of them, warm
        tracker.measure([0, 2])  # some of them
        tracker.forget("layer1")
        tracker.measure([0, 1, 3])  # warm and new ones together


def test_rows_come_in_the_order_asked_for_whatever_is_new(make_tracker, spectral_norms):
    tracker, layers = make_tracker([(i + 1) * torch.eye(40) for i in range(5)])
    rows_of(tracker)
    tracker.forget("layer2")
    tracker.forget("layer4")
    rows = rows_of(tracker, [1, 2, 4])
    torch.testing.assert_close(rows["spectral_norm"], spectral_norms(layers)[[1, 2, 4]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_weights_are_read_in_float32_and_float64_in_float64(
    make_tracker, spectral_norms, dtype
):
    weights = [gaussian((48, 40), seed, dtype) for seed in range(4)]
    tracker, layers = make_tracker(weights, num_vectors=4)
    for _ in range(12):
        rows = rows_of(tracker)
    assert tracker.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (rows["spectral_norm"] / spectral_norms(layers) - 1).abs().max()
    # The iteration has converged after 12 readings of a still weight; measured 1e-14 and 7e-8.
    assert error <= (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("num_vectors", [1, 40, 1000])
def test_any_number_of_vectors_will_do(make_tracker, spectral_norms, num_vectors):
    weights = [gaussian((48, 40), seed) for seed in range(4)]
    tracker, layers = make_tracker(weights, num_vectors=num_vectors)
    for _ in range(3):
        assert_right(rows_of(tracker), spectral_norms(layers), 1e-3)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (20, 500)])
def test_memory_between_readings_is_a_few_vectors_per_matrix(make_tracker, shape):
    weights = [gaussian(shape, seed) for seed in range(10)]
    tracker, _ = make_tracker(weights, num_vectors=2)
    rows_of(tracker)
    tensors = [value for value in vars(tracker).values() if isinstance(value, torch.Tensor)]
    stored = sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in tensors)
    assert stored <= 10 * 2 * sum(shape)


def moved(layers, step):
    for i, layer in enumerate(layers):
        layer.weight.data.add_(0.02 * gaussian(layer.weight.shape, 100 * step + i))


@pytest.mark.parametrize("wait", [True, False])
def test_a_restored_tracker_continues_bitwise(make_tracker, wait):
    weights = [gaussian((48, 40), seed) for seed in range(4)]
    tracker, layers = make_tracker(weights, wait=wait)
    twin, others = make_tracker(weights, seed=5, wait=wait)
    for step in range(3):
        moved(layers, step)
        rows_of(tracker)
    tracker.forget("layer3")
    state = tracker.state_dict()
    twin.load_state_dict(state)
    for step in range(3):
        moved(others, step)
    for step in range(3, 6):
        moved(layers, step)
        moved(others, step)
        expected, found = rows_of(tracker), rows_of(twin)
        assert all(torch.equal(found[field], expected[field]) for field in FIELDS)


def test_state_is_a_snapshot_that_later_readings_leave_alone(make_tracker):
    tracker, layers = make_tracker([gaussian((48, 40), seed) for seed in range(2)])
    rows_of(tracker)
    state = tracker.state_dict()
    before = state["start"].clone()
    moved(layers, 1)
    rows_of(tracker)
    assert torch.equal(state["start"], before)


@pytest.mark.parametrize("changed", ["num_vectors", "dtype", "generator"])
def test_state_of_other_settings_gives_right_readings_all_the_same(
    make_tracker, spectral_norms, changed
):
    weights = [gaussian((48, 40), seed) for seed in range(3)]
    source, _ = make_tracker([weight.double() for weight in weights], num_vectors=3)
    if changed == "generator":  # saved on another kind of device
        source, _ = make_tracker(weights)
    elif changed == "num_vectors":
        source, _ = make_tracker(weights, num_vectors=3)
    rows_of(source)
    state = source.state_dict()
    if changed == "generator":
        state["generator"] = state["generator"][:16]
    tracker, layers = make_tracker(weights)
    tracker.load_state_dict(state)
    assert_right(rows_of(tracker), spectral_norms(layers), 1e-3)


def test_a_weight_of_another_shape_than_before_is_a_failed_row(make_tracker, spectral_norms):
    tracker, layers = make_tracker([gaussian((48, 40), seed) for seed in range(3)])
    rows_of(tracker)
    layers[1].weight = torch.nn.Parameter(gaussian((48, 41)))
    rows = rows_of(tracker)
    assert rows["spectral_norm"].isnan().tolist() == [False, True, False]


def test_weights_and_the_global_random_state_stay_untouched(make_tracker):
    tracker, layers = make_tracker([gaussian((48, 40), seed) for seed in range(2)])
    before = [torch.get_rng_state(), *(layer.weight.detach().clone() for layer in layers)]
    rows_of(tracker)
    rows_of(tracker)
    after = [torch.get_rng_state(), *(layer.weight.detach() for layer in layers)]
    assert all(map(torch.equal, after, before))


def test_two_trackers_of_one_seed_agree_bitwise(make_tracker):
    weights = [gaussian((48, 40), seed) for seed in range(2)]
    first, second = (make_tracker(weights, seed=3)[0] for _ in range(2))
    for _ in range(2):
        assert torch.equal(first.measure(range(2)), second.measure(range(2)))
