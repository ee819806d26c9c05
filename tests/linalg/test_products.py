"""Spectra and truncations of products of thin factors, against dense truth."""

import math

import pytest
import torch

from spectral_lightning.linalg import (
    product_core,
    product_singular_values,
    product_triplets,
    truncation,
    truncation_values,
)
from spectral_lightning.testing import RefuseHostSync

SHAPES = [(40, 30, 8), (30, 40, 8), (12, 50, 12), (50, 12, 12), (6, 40, 9), (1, 7, 1)]


def factors(m, n, r, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(s, generator=generator, dtype=dtype) for s in ((m, r), (r, n)))
    return left, right * torch.logspace(0, -2, r, dtype=dtype)[:, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_triplets_are_those_of_the_product(shape):
    left, right = factors(*shape)
    dense = left @ right
    U, S, V = product_triplets(left, right)
    truth = torch.linalg.svdvals(dense)[: len(S)]
    assert len(S) == min(shape)
    assert torch.allclose(S, truth, rtol=0, atol=1e-13 * truth[0])
    assert torch.allclose(U * S @ V.mT, dense, atol=1e-12)
    for basis in (U, V):
        identity = torch.eye(len(S), dtype=torch.float64)
        assert torch.allclose(basis.mT @ basis, identity, atol=1e-12)
    assert torch.allclose(product_singular_values(left, right), truth, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_in_lower_precision_are_right_to_1e5(dtype):
    left, right = (x.to(dtype) for x in factors(256, 192, 32))
    truth = torch.linalg.svdvals(left.double() @ right.double())[:32]
    found = product_singular_values(left, right)
    assert found.dtype == torch.float32
    assert ((found - truth).abs() / truth[0]).max() < 1e-6
    assert ((found - truth).abs() / truth).max() < 1e-5


def test_the_product_is_never_formed(monkeypatch):
    """No result of any operation is as large as the product."""
    m, n, r = 300, 200, 5
    left, right = factors(m, n, r)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            results = out if isinstance(out, tuple | list) else [out]
            sizes.extend(x.numel() for x in results if isinstance(x, torch.Tensor))
            return out

    with Watch():
        product_triplets(left, right)
        product_singular_values(left, right)
        truncation(left, right, 3, torch.eye(r, dtype=torch.float64))
    assert max(sizes) <= max(m, n) * r


def test_the_core_has_the_values_of_the_product():
    left, right = factors(20, 6, 8)
    core = product_core(left, right)
    assert core.shape == (8, 6)
    truth = torch.linalg.svdvals(left @ right)
    assert torch.allclose(torch.linalg.svdvals(core), truth, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_is_the_nearest_of_its_rank_in_balanced_form(shape):
    left, right = factors(*shape)
    dense, k = left @ right, max(1, min(shape) // 2)
    T, P, values, discarded = truncation(left, right, k)
    new_left, new_right = left @ T, P.mT @ right
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    assert torch.allclose(new_left @ new_right, U[:, :k] * S[:k] @ Vh[:k], atol=1e-11)
    assert torch.allclose(new_left.mT @ new_left, torch.diag(S[:k]), atol=1e-11)
    assert torch.allclose(new_right @ new_right.mT, torch.diag(S[:k]), atol=1e-11)
    assert torch.allclose(P.mT @ T, torch.eye(k, dtype=torch.float64), atol=1e-11)
    assert torch.allclose(values, S[:k])
    assert discarded.item() == pytest.approx(S[k:].norm().item(), abs=1e-12)


def moment_of(right, inputs):
    hidden = inputs @ right.mT
    return hidden.mT @ hidden / len(inputs)


def test_with_a_moment_no_truncation_keeps_more_of_the_output():
    left, right = factors(30, 24, 10)
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(4000, 24, generator=generator, dtype=torch.float64)
    inputs = inputs * torch.logspace(1, -2, 24, dtype=torch.float64)
    outputs = inputs @ (left @ right).mT
    errors = {}
    for name, moment in (("plain", None), ("weighted", moment_of(right, inputs))):
        T, P, values, discarded = truncation(left, right, 4, moment)
        kept = inputs @ (left @ T @ P.mT @ right).mT
        errors[name] = (outputs - kept).square().sum(1).mean().item()
        assert torch.allclose(P.mT @ T, torch.eye(4, dtype=torch.float64), atol=1e-8)
    # The best is the projection onto the leading principal components of the outputs.
    energies = torch.linalg.svdvals(outputs).square() / len(outputs)
    assert errors["weighted"] == pytest.approx(energies[4:].sum().item(), rel=1e-6)
    assert errors["plain"] > 1.5 * errors["weighted"]
    assert values.square().tolist() == pytest.approx(energies[:4].tolist(), rel=1e-6)
    assert discarded.square().item() == pytest.approx(errors["weighted"], rel=1e-6)


def test_a_moment_without_some_directions_still_has_a_balanced_answer():
    left, right = factors(20, 16, 6)
    inputs = torch.zeros(50, 16, dtype=torch.float64)
    inputs[:, :3] = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    T, P, _, _ = truncation(left, right, 5, moment_of(right, inputs))
    new_left, new_right = left @ T, P.mT @ right
    assert torch.allclose(inputs @ (new_left @ new_right).mT, inputs @ (left @ right).mT, atol=1e-5)
    assert torch.allclose(new_left.mT @ new_left, new_right @ new_right.mT, atol=1e-8)


def test_components_that_are_only_rounding_become_zeros():
    left, right = factors(20, 16, 4)
    left[:, 3] = left[:, 2]
    right[3] = right[2]
    T, P, values, _ = truncation(left, right, 4)
    assert values[3] < 1e-14 * values[0]
    assert not T[:, 3].any()
    assert not P[:, 3].any()
    assert torch.allclose(left @ T @ P.mT @ right, left @ right, atol=1e-12)
    zeros = truncation(torch.zeros(5, 2), torch.zeros(2, 5), 2)
    assert not any(part.any() for part in zeros)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: product_triplets(torch.ones(3, 2), torch.ones(3, 2)), "must be matrices"),
        (lambda: product_core(torch.ones(3), torch.ones(3, 2)), "`left` must have at least two"),
        (
            lambda: truncation(torch.ones(3, 2), torch.ones(2, 4), 3),
            r"`k` must be in \[1, 2\], got 3",
        ),
        (
            lambda: truncation(torch.ones(3, 2), torch.ones(2, 4), 0),
            r"`k` must be in \[1, 2\], got 0",
        ),
        (
            lambda: truncation(torch.ones(3, 2), torch.ones(2, 4), 1, torch.eye(3)),
            r"`moment` must have shape \(2, 2\), got \(3, 3\)",
        ),
        (
            lambda: truncation(torch.ones(3, 2), torch.ones(2, 4), 1, torch.full((2, 2), math.nan)),
            "`moment` must be finite",
        ),
        (
            lambda: product_triplets(torch.full((3, 2), math.nan), torch.ones(2, 4)),
            "`left` must be",
        ),
        (
            lambda: product_triplets(torch.ones(3, 2), torch.full((2, 4), math.inf)),
            "`right` must be",
        ),
    ],
)
def test_factors_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("is_weighted", [False, True])
def test_values_of_all_components_are_those_of_the_truncation(is_weighted):
    left, right = factors(40, 30, 8)
    moment = torch.diag(torch.logspace(0, 2, 8, dtype=torch.float64)) if is_weighted else None
    found = truncation_values(left, right, moment)
    truth = truncation(left, right, 8, moment).values
    assert torch.allclose(found, truth, rtol=1e-12)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_values_of_what_is_not_finite_are_nan_and_no_error(where):
    parts = [*factors(20, 10, 3), torch.eye(3, dtype=torch.float64)]
    parts[where][0, 0] = math.inf
    assert truncation_values(*parts).isnan().all()


def test_values_of_all_components_are_found_without_reading_anything():
    class OnlyDecompositions(RefuseHostSync):
        """Decompositions wait on an accelerator by themselves."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_linalg_" in str(func):
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    left, right = factors(20, 10, 3)
    with OnlyDecompositions():
        truncation_values(left, right, torch.eye(3, dtype=torch.float64))
