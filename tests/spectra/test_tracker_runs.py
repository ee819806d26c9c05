"""Whole runs of moving weights: the interval holds the truth, also while directions overtake."""

import pytest
import torch

from spectral_lightning.spectra.tracker import FIELDS

SHAPE, NUM_MATRICES, NUM_STEPS = (48, 40), 24, 45


def unit(num_entries, generator):
    vectors = torch.randn(NUM_MATRICES, num_entries, generator=generator)
    return vectors / vectors.norm(dim=-1, keepdim=True)


def planted(generator):
    """Rank-one directions that start at zero."""
    return unit(SHAPE[0], generator)[:, :, None] * unit(SHAPE[1], generator)[:, None, :]


def noise(generator):
    """Changes of spectral norm about 2."""
    return torch.randn(NUM_MATRICES, *SHAPE, generator=generator) / SHAPE[0] ** 0.5


def quiet(weights, step, generator, memory):
    return weights + 0.003 * noise(generator)


def hot(weights, step, generator, memory):
    return weights + 0.1 * noise(generator)


def overtaking(weights, step, generator, memory):
    """One new direction grows from nothing and passes the old ones within a few steps."""
    if step == 0:
        memory["new"] = planted(generator)
    return weights + 0.002 * noise(generator) + memory["speed"] * memory["new"]


def alternating(weights, step, generator, memory):
    """Every 15 steps another direction grows, and all that is old decays."""
    if step % 15 == 0:
        memory["new"] = planted(generator)
    return 0.97 * weights + memory["speed"] * memory["new"]


def signs(weights, step, generator, memory):
    """Updates of equal size in every entry, with a common part: the first steps of Adam."""
    if step == 0:
        memory["new"] = planted(generator)
    common = 30 * memory["new"]
    return weights + memory["speed"] * (SHAPE[0] ** 0.5 * noise(generator) + common).sign()


RUNS = {
    "quiet": (quiet, 0.0),
    "hot": (hot, 0.0),
    "slowly_overtaking": (overtaking, 0.05),
    "overtaking": (overtaking, 0.15),
    "overtaking_at_once": (overtaking, 3.0),
    "slowly_alternating": (alternating, 0.05),
    "alternating": (alternating, 0.3),
    "small_signs": (signs, 0.001),
    "large_signs": (signs, 0.01),
}


def play(tracker, layers, run, seed=0):
    """Relative errors and coverage, each of shape (steps, matrices), and passes per reading."""
    change, speed = RUNS[run]
    generator, memory = torch.Generator().manual_seed(seed), {"speed": speed}
    weights = torch.stack([layer.weight.detach() for layer in layers])
    errors, covered, passes = [], [], 0.0
    for step in range(NUM_STEPS):
        weights = change(weights, step, generator, memory)
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data.copy_(weight)
        table = tracker.measure(range(NUM_MATRICES))
        tracker.settle(dict(zip(tracker.names, table.tolist(), strict=True)))
        rows = dict(zip(FIELDS, table.unbind(dim=1), strict=True))
        truth = torch.linalg.eigvalsh(weights.double().mT @ weights.double())[:, -1].sqrt()
        errors.append((rows["spectral_norm"] / truth - 1).abs())
        covered.append((rows["low"] <= truth) & (truth <= rows["high"]))
        passes += rows["passes"].mean().item() / NUM_STEPS
    return torch.stack(errors), torch.stack(covered), passes


@pytest.fixture
def start(make_tracker):
    def make(**settings):
        return make_tracker(list(noise(torch.Generator().manual_seed(99))), **settings)

    return make


def test_readings_stay_accurate_and_certified_on_a_cpu(start):
    played = [play(*start(), run) for run in RUNS]
    errors, covered = (torch.cat([run[i] for run in played]) for i in range(2))
    # In four of the nine runs every matrix is overtaken once or more, far more than in training.
    assert covered.double().mean() >= 0.999
    assert errors.flatten().quantile(0.999) <= 1e-3


@pytest.mark.usefixtures("accelerator_route")
@pytest.mark.parametrize("run", ["hot", "overtaking", "alternating", "large_signs"])
def test_intervals_hold_the_truth_where_nothing_waits(start, run):
    errors, covered, _ = play(*start(wait=False), run)
    assert covered.double().mean() >= 0.999
    # Measured: at most 1.5e-3, with a fixed number of passes while every weight moves by 10 %.
    assert errors.flatten().quantile(0.999) <= 3e-3


def test_a_direction_that_dominates_is_found_within_a_reading(start):
    """Ten times larger than all before, from one step to the next."""
    tracker, layers = start()
    play(tracker, layers, "quiet")
    new = planted(torch.Generator().manual_seed(5))
    for layer, direction in zip(layers, new, strict=True):
        layer.weight.data.add_(20 * direction)
    table = tracker.measure(range(NUM_MATRICES))
    truth = torch.stack([torch.linalg.matrix_norm(layer.weight.double(), 2) for layer in layers])
    torch.testing.assert_close(table[:, 0], truth.detach(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("wait", [True, False])
def test_a_direction_at_right_angles_to_all_that_is_tracked_is_found_by_the_probe(
    make_tracker, wait
):
    """Products alone never leave the coordinate plane that the tracked vectors span."""
    diagonal = torch.ones(40)
    diagonal[:2] = torch.tensor([10.0, 9.0])
    tracker, layers = make_tracker([torch.diag(diagonal)] * 20, wait=wait)
    tracker.measure(range(20))
    for layer in layers:
        layer.weight.data[30, 30] = 20.0
    for _ in range(8):
        table = tracker.measure(range(20))
    torch.testing.assert_close(
        table[:, 0], torch.full((20,), 20.0, dtype=torch.float64), rtol=1e-3, atol=0
    )


def test_passes_go_where_they_are_needed(start):
    _, _, quiet_passes = play(*start(), "quiet")
    _, _, hot_passes = play(*start(), "hot")
    # Measured: 1.1 with the first reading included, and 3.
    assert quiet_passes <= 1.2
    assert 2 <= hot_passes <= 5
