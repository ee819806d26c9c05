"""No kernel touches the global random state or its arguments."""

import pytest
import torch

from spectral_lightning import linalg

WEIGHT = torch.linspace(-1, 2, 35, dtype=torch.float64).reshape(7, 5).sin()
VALUES = torch.tensor([3.0, 2.0, 1.0])

# One call of every public function that this file answers for.
CALLS = {
    "condition_number": lambda: linalg.condition_number(WEIGHT, method="inverse"),
    "effective_rank": lambda: linalg.effective_rank(VALUES),
    "energy_rank": lambda: linalg.energy_rank(VALUES),
    "frobenius_norm": lambda: linalg.frobenius_norm(VALUES),
    "gaussian_condition_number": lambda: linalg.gaussian_condition_number(7, 5),
    "gaussian_effective_rank": lambda: linalg.gaussian_effective_rank(7, 5),
    "gaussian_participation_ratio": lambda: linalg.gaussian_participation_ratio(7, 5),
    "gaussian_smallest_value": lambda: linalg.gaussian_smallest_value(7, 5),
    "gaussian_spectral_norm": lambda: linalg.gaussian_spectral_norm(7, 5),
    "gaussian_stable_rank": lambda: linalg.gaussian_stable_rank(7, 5),
    "marchenko_pastur_density": lambda: linalg.marchenko_pastur_density(VALUES, 0.5),
    "marchenko_pastur_quantile": lambda: linalg.marchenko_pastur_quantile(VALUES / 4, 0.5),
    "nuclear_norm": lambda: linalg.nuclear_norm(VALUES),
    "numerical_rank": lambda: linalg.numerical_rank(VALUES, rtol=0.1),
    "orthonormalize": lambda: linalg.orthonormalize(WEIGHT),
    "participation_ratio": lambda: linalg.participation_ratio(VALUES),
    "principal_angles": lambda: linalg.principal_angles(WEIGHT[:, :2], WEIGHT[:, 2:]),
    "singular_values": lambda: linalg.singular_values(WEIGHT),
    "stable_rank": lambda: linalg.stable_rank(VALUES),
}


@pytest.mark.parametrize("name", CALLS)
def test_global_random_state_and_arguments_stay_untouched(name):
    state, weight, values = torch.get_rng_state(), WEIGHT.clone(), VALUES.clone()
    CALLS[name]()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(WEIGHT, weight)
    assert torch.equal(VALUES, values)


def test_every_exported_name_exists():
    assert sorted(linalg.__all__) == list(linalg.__all__)
    assert all(hasattr(linalg, name) for name in linalg.__all__)
    assert set(CALLS) <= set(linalg.__all__)
