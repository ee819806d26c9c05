"""The functions of ASSR v1.5 under their names, on the sensors of this project.

Thin doors for those who come from there; the callback to use is `ASSR`. All that v1.5 computed of
a matrix is computed here of the *whole* matrix, exactly. v1.5 drew at most 1024 random rows and
columns, anew at each look, which hides a spike of 1.5 times the rest altogether (its share of a
part of half the side is half as large) and reports a condition number hundreds of times too high
for a healthy wide matrix, whose square parts are not healthy. It also took half precision, sharded
and failed measurements for collapsed layers: stable rank 1, condition number infinite. Here they
are measured, or an error says why not. `subsample_limit` brings the biased numbers back, marked as
such, to compare with old ones.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypedDict

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from torch import Tensor, nn

from spectral_lightning.callbacks.assr import ASSR
from spectral_lightning.control import ASSRConfig, calibrated_config
from spectral_lightning.dashboards import worst_layers_table
from spectral_lightning.spectra import Reading, Target, find_targets
from spectral_lightning.spectra.cold import cold_readings


class SpectralHealth(TypedDict):
    """Numbers of one matrix, under the names of v1.5."""

    stable_rank: float
    """``||W||_F^2 / ||W||_2^2``."""
    stable_rank_ratio: float
    """Stable rank over ``min(m, n)``: 1/4 for a random square matrix, more for others."""
    effective_rank: float
    """Exponential of the entropy of the normalised singular values."""
    condition: float
    """Condition number; infinite for a singular matrix only, where v1.5 had it infinite for
    smallest values below 1e-10."""
    spectral_norm: float
    """Largest singular value."""
    min_singular_value: float
    """Smallest singular value."""
    frobenius_norm: float
    """Root of the sum of squares."""
    shape: tuple[int, int]
    """Shape ``(m, n)`` of the whole matrix."""
    subsampled: bool
    """Whether a random part was measured."""
    biased: bool
    """Whether the numbers are those of a part, which are not those of the matrix."""


def compute_spectral_health(
    weight: Tensor, subsample_limit: int | None = None, *, seed: int = 0
) -> SpectralHealth:
    """Measure one matrix by all its singular values, in float64; waits for the device.

    Differs from v1.5 in what the head of this module says: by default nothing is subsampled, half
    precision is measured as it is, and a failure is an error.

    Args:
        weight: Matrix, shape ``(m, n)``; more dimensions are flattened into the second.
        subsample_limit: Side of a random part to measure instead, as v1.5 did; None for all.
        seed: Seed of that part's private generator.

    Returns:
        The numbers.

    Raises:
        ValueError: If the weight has fewer than two dimensions, is zero or not finite, or the
            limit is below 64.

    Example:
        >>> health = compute_spectral_health(torch.diag(torch.tensor([4.0, 2.0])))
        >>> round(health["stable_rank"], 6), health["condition"], health["biased"]
        (1.25, 2.0, False)
    """
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(f"`weight` must be a matrix, got shape {tuple(weight.shape)}.")
    matrix = weight.detach().flatten(1)
    part = _biopsy(matrix, subsample_limit, seed)
    (reading,) = cold_readings([("weight", part)], full=True)
    if reading.failure is not None:
        raise ValueError(f"`weight` must be finite and not zero, got: {reading.failure}.")
    assert reading.condition_number is not None
    assert reading.effective_rank is not None
    is_part = part.shape != matrix.shape
    return SpectralHealth(
        stable_rank=reading.stable_rank,
        stable_rank_ratio=_ratio(reading),
        effective_rank=reading.effective_rank,
        condition=reading.condition_number,
        spectral_norm=reading.spectral_norm,
        min_singular_value=reading.spectral_norm / reading.condition_number,
        frobenius_norm=reading.frobenius_norm,
        shape=(matrix.shape[0], matrix.shape[1]),
        subsampled=is_part,
        biased=is_part,
    )


def compute_stable_rank(weight: Tensor, subsample_limit: int | None = None) -> float:
    """Stable rank of a matrix (`compute_spectral_health`)."""
    return compute_spectral_health(weight, subsample_limit)["stable_rank"]


def compute_stable_rank_ratio(weight: Tensor, subsample_limit: int | None = None) -> float:
    """Stable rank of a matrix over its shorter side (`compute_spectral_health`)."""
    return compute_spectral_health(weight, subsample_limit)["stable_rank_ratio"]


def compute_condition_number(weight: Tensor, subsample_limit: int | None = None) -> float:
    """Condition number of a matrix (`compute_spectral_health`)."""
    return compute_spectral_health(weight, subsample_limit)["condition"]


def analyze_layer(
    layer: nn.Module, name: str = "layer", subsample_limit: int | None = None
) -> SpectralHealth:
    """Measure the one matrix of a layer, and print its numbers.

    Args:
        layer: Any layer that `find_targets` knows, Hugging Face's Conv1D included.
        name: Name to print.
        subsample_limit: As in `compute_spectral_health`.

    Returns:
        The numbers.

    Raises:
        ValueError: If the layer has not one matrix, or it cannot be measured.
    """
    targets = find_targets(layer, embeddings=True).targets
    if len(targets) != 1:
        raise ValueError(
            f"`layer` must hold one weight matrix, got {len(targets)}; `print_spectral_report`"
            " takes whole models."
        )
    health = compute_spectral_health(targets[0].matrix(), subsample_limit)
    lines = [f"{name}: {health['shape'][0]} x {health['shape'][1]}"]
    for measure, value in health.items():
        if isinstance(value, float):
            lines.append(f"  {measure}: {value:.6g}")
    if health["biased"]:
        lines.append("  measured on a random part, which is biased")
    _say("\n".join(lines))
    return health


def print_spectral_report(
    model: nn.Module, top_k: int = 10, subsample_limit: int | None = None
) -> None:
    """Print the layers whose stable rank is farthest from that of a random matrix.

    v1.5 subsampled to 1024 here; the numbers differ as the head of this module says.

    Args:
        model: Any model.
        top_k: Layers to print, at least 1.
        subsample_limit: As in `compute_spectral_health`.

    Raises:
        ValueError: If the model has no matrix, or an argument is out of its range.
    """
    readings = _readings(find_targets(model).targets, subsample_limit)
    table = worst_layers_table(readings, top_k)
    if subsample_limit is not None:
        table.title = f"{table.title} (biased: random parts up to {subsample_limit})"
    Console(file=sys.stdout).print(table)


def auto_calibrate(model: nn.Module, percentile: float = 10.0, verbose: bool = True) -> ASSRConfig:
    """Settings of v1.5 for a model, from its size and the spectra it has now.

    The laws are those of v1.5 (`calibrated_config`). The readings are not: all layers instead of
    50 random ones, whole instead of in part, also in half precision, where v1.5 found all layers
    collapsed. `ASSR` needs none of this: it calibrates each layer while training.

    Args:
        model: Any model.
        percentile: As in `thresholds`.
        verbose: Whether to print what was found.

    Returns:
        The settings; the defaults, with a warning, for a model without a matrix to measure.
    """
    try:
        targets = find_targets(model).targets
    except ValueError:  # there is no matrix
        targets = ()
    readings = [reading for reading in _readings(targets, None) if reading.failure is None]
    if not readings:
        rank_zero_warn("`model` has no weight matrix that can be measured: defaults are returned.")
        return ASSRConfig()
    config = calibrated_config(
        sum(parameter.numel() for parameter in model.parameters()),
        [_ratio(reading) for reading in readings],
        [r.condition_number for r in readings if r.condition_number is not None],
        percentile,
    )
    if verbose:
        _say(
            f"ASSR v1.5, calibrated on {len(readings)} layers: stable rank over side at least"
            f" {config.stable_rank_floor:.3g}, condition number at most"
            f" {config.condition_ceiling:.4g}, {config.sample_ratio:.0%} of the layers every"
            f" {config.sample_freq} steps, lambda {config.base_lambda:g}."
        )
    return config


def legacy_assr(config: ASSRConfig, **settings: Any) -> ASSR:
    """`ASSR` that shrinks layers of low stable rank about as v1.5 did: to compare with, not to use.

    Shrinking a weight moves neither its stable rank nor its condition number. Same as v1.5: tier,
    sampling, the floor for square layers, the strength (`ASSRConfig.regulator` says what is not).
    Different: the weight decays by ``2 lr lambda`` after the optimizer's step, as the penalty does
    under plain SGD, instead of through Adam; once per optimizer step; exact readings; nothing in
    the loss. `subsample_limit` and `log_interventions` have no counterpart.

    Args:
        config: Settings, e.g. of `auto_calibrate`.
        settings: Other arguments of `ASSR`, such as `layers`; they go first.

    Returns:
        The callback.

    Example:
        >>> legacy_assr(ASSRConfig(sample_freq=5)).every_n_steps
        5
    """
    legacy: dict[str, Any] = {
        "actuator": "legacy_l2",
        "regulator": config.regulator(),
        "sample_ratio": config.sample_ratio,
        "every_n_steps": config.sample_freq,
        "spectrum_every_n_steps": None,
    }
    return ASSR(**{**legacy, **settings})


def _readings(targets: Iterable[Target], subsample_limit: int | None) -> Iterator[Reading]:
    """Readings of all matrices, one matrix at a time."""
    parts = (
        (target.name, _biopsy(target.matrix(), subsample_limit, seed=0))
        for target in targets
        if 0 not in target.shape
    )
    return cold_readings(parts, full=True)


def _biopsy(matrix: Tensor, limit: int | None, seed: int) -> Tensor:
    """Random rows and columns of a matrix, at most `limit` of each."""
    if limit is None:
        return matrix
    if limit < 64:
        raise ValueError(f"`subsample_limit` must be >= 64, or None, got {limit}.")
    generator = torch.Generator().manual_seed(seed)
    for dim, size in enumerate(matrix.shape):
        if size > limit:
            kept = torch.randperm(size, generator=generator)[:limit]
            matrix = matrix.index_select(dim, kept.to(matrix.device))
    return matrix


def _ratio(reading: Reading) -> float:
    return reading.stable_rank / min(reading.shape)


def _say(text: str) -> None:
    Console(file=sys.stdout).print(text, markup=False, highlight=False, soft_wrap=True)
