"""Energy of one matrix in the singular subspaces of another."""

import math

import pytest
import torch

from spectral_lightning.linalg import (
    chance_share,
    principal_energy,
    principal_part,
    singular_triplets,
    singular_values,
)
from spectral_lightning.testing.matrices import matrix_with_spectrum

SHAPES = [(24, 24), (40, 16), (16, 40)]
SIDES = ["two_sided", "left", "right", "block"]
K = 5


def bases(shape, k=K, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.linspace(3, 1, min(shape), dtype=torch.float64)
    weight = matrix_with_spectrum(values, shape, generator=generator, dtype=dtype)
    found = singular_triplets(weight)
    return weight, found.left[:, :k], found.right[:, :k]


def noise(shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_the_share_is_that_of_the_projected_matrix(shape, side):
    _, U, V = bases(shape)
    X = noise(shape)
    P, Q = U @ U.mT, V @ V.mT
    parts = {
        "left": P @ X,
        "right": X @ Q,
        "block": P @ X @ Q,
        "two_sided": P @ X + X @ Q - P @ X @ Q,
    }
    expected = parts[side].square().sum() / X.square().sum()
    assert torch.allclose(principal_energy(X, U, V).of(side), expected)
    assert torch.allclose(principal_part(X, U, V, side).matrix(U, V), parts[side])
    assert torch.allclose(principal_part(X, U, V, side).norm(), parts[side].norm())


@pytest.mark.parametrize("side", SIDES)
def test_a_gradient_in_the_principal_subspaces_is_all_there(side):
    _, U, V = bases((24, 24))
    X = U @ noise((K, K)) @ V.mT
    assert principal_energy(X, U, V).of(side).item() == pytest.approx(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_the_share_of_noise_is_the_chance_share(shape, side):
    _, U, V = bases(shape)
    shares = [principal_energy(noise(shape, seed=s), U, V).of(side) for s in range(300)]
    assert torch.stack(shares).mean().item() / chance_share(shape, K, side) == pytest.approx(
        1, abs=0.05
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_changes_are_those_of_the_singular_values_to_first_order(shape):
    weight, U, V = bases(shape, k=min(shape))
    update = 1e-6 * noise(shape)
    exact = singular_values(weight + update) - singular_values(weight)
    assert torch.allclose(principal_energy(update, U, V).changes, exact, rtol=0, atol=1e-9)
    assert torch.allclose(
        principal_energy(-0.1 * weight, U, V).changes, -0.1 * singular_values(weight)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    _, U, V = bases((24, 24), dtype=torch.float32)
    X = noise((24, 24), torch.float32).to(dtype)
    found = principal_energy(X, U, V)
    assert found.left.dtype == torch.float32
    assert torch.equal(found.left, principal_energy(X.float(), U, V).left)
    assert principal_part(X, U, V, "left").rows.dtype == torch.float32


def test_a_matrix_of_zeros_has_no_share():
    _, U, V = bases((24, 24))
    assert math.isnan(principal_energy(torch.zeros(24, 24), U, V).of("left").item())


@pytest.mark.bad_input
def test_bases_of_another_matrix_are_refused():
    _, U, V = bases((24, 24))
    with pytest.raises(ValueError, match=r"`left` and `right` must have shapes \(16, k\) and"):
        principal_energy(torch.zeros(16, 24), U, V)
    with pytest.raises(ValueError, match="`left` and `right` must have shapes"):
        principal_part(torch.zeros(24, 24), U, V[:, :2], "left")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_triplets_give_the_matrix_back(shape, dtype):
    weight, _, _ = bases(shape)
    weight = weight.to(dtype)
    found = singular_triplets(weight)
    again = found.left * found.values @ found.right.mT
    compute = torch.promote_types(dtype, torch.float32)
    assert found.values.dtype == compute
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}[compute]
    assert torch.allclose(again, weight.to(compute), atol=tolerance)


def test_a_device_without_a_decomposition_has_it_made_on_the_cpu(monkeypatch):
    weight, _, _ = bases((24, 24))
    expected, svd, refused = singular_triplets(weight), torch.linalg.svd, []

    def missing(matrix, **options):
        if not refused:
            refused.append(matrix)
            raise NotImplementedError("aten::_linalg_svd is not implemented for this device")
        return svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", missing)
    assert torch.equal(singular_triplets(weight).values, expected.values)
    assert len(refused) == 1


def test_what_is_not_finite_is_not_decomposed():
    weight = torch.full((4, 4), math.nan)
    with pytest.raises(ValueError, match="`weight` must be finite"):
        singular_triplets(weight)
