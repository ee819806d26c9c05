"""Measures of weight, gradient and update that mode policies look at."""

import math

import pytest
import torch

from spectral_lightning.control import CalibratedPolicy, Mode, ModeReading, ModeState
from spectral_lightning.linalg import SingularTriplets, singular_triplets
from spectral_lightning.spectra.mode_measures import (
    effect_measures,
    gradient_triplets,
    intent_measures,
    on_host,
    principal_weight,
    rotation_measures,
    spectrum_measures,
    vectors_on_host,
)
from spectral_lightning.testing.matrices import matrix_with_spectrum

SHAPES = [(64, 64), (96, 32), (32, 96)]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def first(triplets, k):
    return SingularTriplets(triplets.left[:, :k], triplets.values[:k], triplets.right[:, :k])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["two_sided", "left", "right", "block"])
def test_noise_has_lift_one_and_erosion_zero_with_deviation_one(shape, side):
    weight = randn(*shape)
    triplets = singular_triplets(weight)
    found = [
        on_host(
            [intent_measures(randn(*shape, seed=s), principal_weight(weight, triplets, 8), side)]
        )[0]
        for s in range(1, 301)
    ]
    lifts = torch.tensor([f["intent_lift"] for f in found])
    erosions = torch.tensor([f["intent_erosion"] for f in found])
    assert lifts.mean().item() == pytest.approx(1, abs=0.05)
    assert erosions.mean().item() == pytest.approx(0, abs=0.2)
    assert erosions.std().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("shape", SHAPES)
def test_alignments_add_up_and_a_tall_weight_has_an_outside(shape):
    weight = randn(*shape)
    triplets = singular_triplets(weight)
    gradients = [randn(*shape, seed=s) for s in range(1, 101)]
    found = [
        on_host([intent_measures(g, principal_weight(weight, triplets, 8), "left")])[0]
        for g in gradients
    ]
    names = ("principal_alignment", "minor_alignment", "outside_alignment")
    assert all(sum(f[n] ** 2 for n in names) == pytest.approx(1) for f in found)
    inside = sum(1 - f["outside_alignment"] ** 2 for f in found) / len(found)
    m, n = shape
    assert inside == pytest.approx(min(1, n / m), abs=0.02)


def test_without_all_triplets_what_is_not_principal_is_minor():
    weight, gradient = randn(64, 64), randn(64, 64, seed=1)
    triplets = singular_triplets(weight)
    whole, part = (
        on_host([intent_measures(gradient, principal_weight(weight, t, 8), "left")])[0]
        for t in (triplets, first(triplets, 8))
    )
    assert part["minor_alignment"] == pytest.approx(whole["minor_alignment"])
    assert "outside_alignment" not in part


def test_a_principal_gradient_is_all_principal():
    weight = randn(64, 64)
    triplets = singular_triplets(weight)
    gradient = triplets.left[:, :8] @ randn(8, 64, seed=1)
    found = on_host([intent_measures(gradient, principal_weight(weight, triplets, 8), "left")])[0]
    assert found["principal_alignment"] == pytest.approx(1)
    assert found["minor_alignment"] == pytest.approx(0, abs=1e-6)
    assert found["left_lift"] == pytest.approx(8)


def test_shrinking_principal_values_is_erosion_growing_them_and_decay_are_not():
    weight = randn(64, 64)
    triplets = singular_triplets(weight)
    principal = triplets.left[:, :8] * triplets.values[:8] @ triplets.right[:, :8].mT
    noise = 0.1 * randn(64, 64, seed=1)

    def erosion(update):
        return on_host([effect_measures(update, principal_weight(weight, triplets, 8), "block")])[0]

    assert erosion(-principal)["effect_erosion"] == pytest.approx(64)  # the most there is
    assert erosion(principal)["effect_erosion"] == pytest.approx(-64)
    assert abs(erosion(noise - weight)["effect_erosion"]) < 3
    assert erosion(-0.01 * principal)["largest_erosion"] == pytest.approx(0.01)
    assert erosion(0.01 * principal)["largest_erosion"] == pytest.approx(-0.01)


def test_the_effect_of_an_exactly_orthogonal_update_does_not_depend_on_the_gradient():
    """Why Muon has to be judged by what it did: its lift is 1 whatever the gradient asked for."""
    weight = randn(64, 64)
    triplets = singular_triplets(weight)
    gradient = 1e-3 * randn(64, 64, seed=1) + 10 * triplets.left[:, :8] @ randn(8, 64, seed=2)
    polar = singular_triplets(gradient)
    update = -0.01 * polar.left @ polar.right.mT
    intent = on_host([intent_measures(gradient, principal_weight(weight, triplets, 8), "left")])[0]
    effect = on_host([effect_measures(update, principal_weight(weight, triplets, 8), "left")])[0]
    assert intent["left_lift"] > 7.9
    assert effect["effect_lift"] == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("theta", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_angle_is_the_largest_and_accurate_when_small(theta, dtype):
    basis = torch.eye(12, dtype=dtype)
    turned = basis.clone()
    turned[:, 3] = math.cos(theta) * basis[:, 3] + math.sin(theta) * basis[:, 4]
    turned[:, 4] = math.cos(theta) * basis[:, 4] - math.sin(theta) * basis[:, 3]
    triplets = SingularTriplets(turned, torch.ones(12, dtype=dtype), basis)
    found = on_host([rotation_measures(basis, triplets.left, 4)])[0]
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    assert found["subspace_angle"] == pytest.approx(theta, abs=tolerance)
    assert found["subspace_overlap"] == pytest.approx((3 + math.cos(theta) ** 2) / 4)


def test_the_angle_ignores_signs_and_rotations_inside_and_is_right_when_orthogonal():
    basis = singular_triplets(randn(12, 12)).left
    rotation = singular_triplets(randn(4, 4, seed=1)).left
    turned = basis.clone()
    turned[:, :4] = -basis[:, :4] @ rotation
    same = SingularTriplets(turned, torch.ones(12), basis)
    assert on_host([rotation_measures(basis, same.left, 4)])[0]["subspace_angle"] < 1e-12
    other = SingularTriplets(basis.flip(1), torch.ones(12), basis)
    angle = on_host([rotation_measures(basis, other.left, 4)])[0]["subspace_angle"]
    assert angle == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("shape", [(20, 20), (20, 8), (8, 20)])
def test_the_reconstruction_error_is_that_of_the_product(shape):
    weight = randn(*shape)
    triplets = singular_triplets(weight)
    size, norm = min(shape), weight.norm()
    for k in (1, 5, size - 1):
        principal = triplets.left[:, :k] * triplets.values[:k] @ triplets.right[:, :k].mT
        expected = ((weight - principal).norm() / norm).item()
        for known in (triplets, first(triplets, k)):
            found = on_host([spectrum_measures(known, norm, k, size)])[0]
            assert found["reconstruction_error"] == pytest.approx(expected, abs=1e-9)


def test_a_weight_of_rank_one_is_held_by_one_direction():
    generator = torch.Generator().manual_seed(0)
    weight = matrix_with_spectrum(torch.tensor([3.0]), (10, 10), generator=generator)
    found = on_host([spectrum_measures(singular_triplets(weight), weight.norm(), 1, 10)])[0]
    assert found["reconstruction_error"] == pytest.approx(0, abs=1e-7)
    assert found["concentration"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("values", "expected"), [([1.0] * 10, 1.0), ([2.0, *[1e-3] * 9], 0.1), ([3.0, 4.0], 1.0)]
)
def test_concentration_counts_the_directions_of_95_percent(values, expected):
    values = torch.tensor(values, dtype=torch.float64).sort(descending=True).values
    basis = torch.eye(len(values), dtype=torch.float64)
    triplets = SingularTriplets(basis, values, basis)
    found = on_host([spectrum_measures(triplets, values.norm(), 1, len(values))])[0]
    assert found["concentration"] == pytest.approx(expected)


def test_gradients_are_averaged_with_what_came_before():
    """With room for all directions it is the running mean of G^T G / ||G||^2 itself."""
    weight, generator = randn(12, 8), torch.Generator().manual_seed(0)
    past, mean = None, None
    for seed in range(1, 7):
        gradient = randn(12, 8, seed=seed) * seed  # its size does not count
        found = gradient_triplets(gradient, weight, past, 8, decay=0.7, generator=generator)
        past = found.values, found.right
        new = gradient.mT @ gradient / gradient.square().sum()
        mean = new if mean is None else 0.7 * mean + 0.3 * new
    assert torch.allclose(found.right * found.values**2 @ found.right.mT, mean, atol=1e-10)
    assert found.values.square().sum().item() == pytest.approx(1)
    assert torch.allclose(found.left.mT @ found.left, torch.eye(8, dtype=torch.float64), atol=1e-12)


def test_inputs_that_gradients_read_again_and_again_come_first():
    weight, generator = randn(48, 48), torch.Generator().manual_seed(0)
    inputs, past = singular_triplets(randn(48, 48, seed=99)).right[:, :3], None
    for seed in range(1, 20):
        gradient = randn(48, 3, seed=seed) @ inputs.mT + 0.05 * randn(48, 48, seed=100 + seed)
        found = gradient_triplets(gradient, weight, past, 6, decay=0.9, generator=generator)
        past = found.values, found.right
    angle = on_host([rotation_measures(inputs, found.right, 3)])[0]["subspace_angle"]
    assert angle < 0.1


def test_zeros_are_undefined_and_no_error():
    basis = torch.eye(6, dtype=torch.float64)
    zero = SingularTriplets(basis, torch.zeros(6, dtype=torch.float64), basis)
    weight = torch.zeros(6, 6, dtype=torch.float64)
    found = on_host(
        [
            spectrum_measures(zero, weight.norm(), 2, 6)
            | intent_measures(weight, principal_weight(weight, zero, 2), "block")
        ]
    )[0]
    assert math.isnan(found["intent_lift"])
    assert found["gradient_norm"] == 0


def test_numbers_of_many_layers_come_over_in_order():
    vectors = [torch.arange(n, dtype=torch.float64) for n in (3, 1, 5)]
    assert vectors_on_host(vectors) == [vector.tolist() for vector in vectors]
    assert on_host([]) == []


def test_random_gradients_never_lock_a_layer_in():
    """200 analyses of noise at every rank; the original locks in 20 times of 20."""
    policy = CalibratedPolicy(warmup_steps=0)
    weight = randn(64, 64)
    triplets = singular_triplets(weight)
    values, norm = triplets.values.tolist(), weight.norm().item()
    for start in (ModeState(), ModeState(mode=Mode.LOW_RANK, rank=60)):
        state, in_low_rank = start, 0
        for step in range(200):
            k = policy.num_principal(state, values, norm, 64)
            gradient, update = randn(64, 64, seed=2 * step), randn(64, 64, seed=2 * step + 1)
            numbers = on_host(
                [
                    intent_measures(gradient, principal_weight(weight, triplets, k), "block")
                    | effect_measures(update, principal_weight(weight, triplets, k), "block")
                ]
            )[0]
            shared = {
                n: numbers[n]
                for n in ("principal_alignment", "minor_alignment", "intent_lift", "intent_erosion")
            }
            is_full = state.mode is Mode.FULL
            found = ModeReading(
                step=step,
                size=64,
                num_principal=k,
                values=values,
                previous_values=None,
                subspace_angle=None,
                reconstruction_error=0.5,
                effect_lift=numbers["effect_lift"] if is_full else None,
                effect_erosion=numbers["effect_erosion"] if is_full else None,
                **shared,
            )
            state, _ = policy.update(state, found)
            in_low_rank += state.mode is Mode.LOW_RANK
        assert in_low_rank < 20
        assert state.num_switches <= 1
