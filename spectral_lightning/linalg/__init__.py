"""Pure kernels: tensors in, tensors out; torch and jaxtyping only."""

from spectral_lightning.linalg.alignment import (
    PrincipalEnergy,
    PrincipalPart,
    Side,
    chance_share,
    principal_energy,
    principal_part,
)
from spectral_lightning.linalg.condition import condition_number
from spectral_lightning.linalg.exact import singular_values
from spectral_lightning.linalg.intervals import spectral_norm_interval, vector_angle_bound
from spectral_lightning.linalg.lanczos import LeadingTriplets, leading_triplets
from spectral_lightning.linalg.measures import (
    effective_rank,
    energy_rank,
    frobenius_norm,
    nuclear_norm,
    numerical_rank,
    participation_ratio,
    stable_rank,
)
from spectral_lightning.linalg.null import (
    gaussian_condition_number,
    gaussian_effective_rank,
    gaussian_participation_ratio,
    gaussian_smallest_value,
    gaussian_spectral_norm,
    gaussian_stable_rank,
    marchenko_pastur_density,
    marchenko_pastur_quantile,
)
from spectral_lightning.linalg.polar import newton_schulz
from spectral_lightning.linalg.precision import full_precision
from spectral_lightning.linalg.products import (
    Regauge,
    product_core,
    product_singular_values,
    product_triplets,
    truncation,
    truncation_values,
)
from spectral_lightning.linalg.ritz import (
    leading_eigenpairs,
    orthonormalize_rows,
    rayleigh_ritz,
)
from spectral_lightning.linalg.storage import whole_tensor
from spectral_lightning.linalg.subspaces import orthonormalize, principal_angles
from spectral_lightning.linalg.triplets import (
    SingularTriplets,
    leading_singular_triplets,
    singular_triplets,
    smallest_singular_triplets,
)

__all__ = [
    "LeadingTriplets",
    "PrincipalEnergy",
    "PrincipalPart",
    "Regauge",
    "Side",
    "SingularTriplets",
    "chance_share",
    "condition_number",
    "effective_rank",
    "energy_rank",
    "frobenius_norm",
    "full_precision",
    "gaussian_condition_number",
    "gaussian_effective_rank",
    "gaussian_participation_ratio",
    "gaussian_smallest_value",
    "gaussian_spectral_norm",
    "gaussian_stable_rank",
    "leading_eigenpairs",
    "leading_singular_triplets",
    "leading_triplets",
    "marchenko_pastur_density",
    "marchenko_pastur_quantile",
    "newton_schulz",
    "nuclear_norm",
    "numerical_rank",
    "orthonormalize",
    "orthonormalize_rows",
    "participation_ratio",
    "principal_angles",
    "principal_energy",
    "principal_part",
    "product_core",
    "product_singular_values",
    "product_triplets",
    "rayleigh_ritz",
    "singular_triplets",
    "singular_values",
    "smallest_singular_triplets",
    "spectral_norm_interval",
    "stable_rank",
    "truncation",
    "truncation_values",
    "vector_angle_bound",
    "whole_tensor",
]
