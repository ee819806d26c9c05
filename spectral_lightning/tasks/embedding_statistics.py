"""Correlations and intervals of a few columns of numbers; no model, no metric state."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

CONSTANT_RTOL = 1e-6
"""Spread, relative to the largest magnitude, below which float32 numbers count as constant."""

_MAX_RESAMPLED = 2**22  # numbers held at a time by the bootstrap: 32 MiB in float64


class Interval(NamedTuple):
    """A statistic and the range that it plausibly lies in.

    Attributes:
        value: The statistic of all rows.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def mean(values: Tensor) -> Tensor:
    """Return the mean over the last dimension."""
    return values.mean(-1)


def average_ranks(values: Tensor) -> Tensor:
    """Rank numbers from 1 along the last dimension; equal numbers share the mean of their ranks.

    Args:
        values: Shape ``(..., n)``, finite.

    Returns:
        Ranks, shape ``(..., n)``, float64, on the CPU.

    Example:
        >>> average_ranks(torch.tensor([3.0, 1.0, 3.0]))
        tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    ascending, order = values.detach().cpu().sort(-1)
    differs = torch.zeros_like(order)
    differs[..., 1:] = ascending[..., 1:] != ascending[..., :-1]
    group = differs.cumsum(-1)
    counts = torch.zeros_like(order).scatter_add_(-1, group, torch.ones_like(group))
    middle = counts.cumsum(-1) - (counts - 1) / 2.0
    ranks = torch.empty(values.shape, dtype=torch.float64)
    return ranks.scatter_(-1, order, middle.double().gather(-1, group))


def _is_degenerate(values: Tensor) -> Tensor:
    """Return where the last dimension is constant, not finite, or has fewer than two numbers."""
    if values.shape[-1] < 2:
        return torch.ones(values.shape[:-1], dtype=torch.bool)
    spread = values.amax(-1) - values.amin(-1)
    # Neither NaN nor infinity is greater, so both count as degenerate.
    return ~(spread > CONSTANT_RTOL * values.abs().amax(-1))


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    first = first - first.mean(-1, keepdim=True)
    second = second - second.mean(-1, keepdim=True)
    scale = (first.square().sum(-1) * second.square().sum(-1)).sqrt()
    return ((first * second).sum(-1) / scale).clamp(-1.0, 1.0)


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Return the linear correlation along the last dimension.

    Args:
        first: Shape ``(..., n)``.
        second: Shape ``(..., n)``.

    Returns:
        Correlation in [-1, 1], shape ``(...)``, float64, on the CPU; NaN where a side is constant
        (within `CONSTANT_RTOL`), not finite, or shorter than two numbers.
    """
    first, second = first.detach().cpu().double(), second.detach().cpu().double()
    undefined = _is_degenerate(first) | _is_degenerate(second)
    return _correlation(first, second).masked_fill(undefined, math.nan)


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Return the rank correlation along the last dimension, with shared ranks for equal numbers.

    Args:
        first: Shape ``(..., n)``.
        second: Shape ``(..., n)``.

    Returns:
        Correlation in [-1, 1], shape ``(...)``, float64, on the CPU; NaN where `pearson` is NaN.

    Example:
        >>> spearman(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1.0, 2.0, 9.0])).item()
        1.0
    """
    first, second = first.detach().cpu().double(), second.detach().cpu().double()
    undefined = _is_degenerate(first) | _is_degenerate(second)
    ranks = _correlation(average_ranks(first), average_ranks(second))
    return ranks.masked_fill(undefined, math.nan)


def bootstrap_interval(
    *columns: Tensor,
    generator: torch.Generator,
    statistic: Callable[..., Tensor] = mean,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Return a statistic of the rows and its percentile bootstrap interval.

    Rows (pairs, queries) are drawn with replacement as often as there are rows; the ends are
    quantiles of the statistic over such samples. Samples of which the statistic is NaN are left
    out. Intervals of few rows are too narrow.

    Args:
        columns: One or more tensors of ``n`` numbers; row ``i`` is drawn from all of them at once.
        generator: Source of randomness, on the CPU.
        statistic: Takes the columns in float64, each of shape ``(..., n)``, and returns shape
            ``(...)``: `mean` of per-query numbers, or `spearman` of two columns.
        num_resamples: Number of samples; 1000 resolves the ends of 95 % [Efron and Tibshirani].
        level: Share of the samples inside the interval, between 0 and 1.

    Returns:
        The statistic and the ends; all NaN if the statistic is NaN.

    Raises:
        ValueError: If there are no rows, columns differ in length, or a setting is out of range.

    References:
        Efron and Tibshirani (1993), "An Introduction to the Bootstrap", sections 13.3 and 19.3.
    """
    # torchmetrics turns a vector of one number into a scalar.
    rows = [column.detach().cpu().double() for column in columns]
    rows = [column[None] if column.ndim == 0 else column for column in rows]
    lengths = [tuple(column.shape) for column in rows]
    if not rows or len(set(lengths)) > 1 or len(lengths[0]) != 1 or not lengths[0][0]:
        raise ValueError(f"`columns` must be one or more vectors of one length > 0, got {lengths}.")
    if num_resamples < 1 or not 0 < level < 1:
        raise ValueError(
            "`num_resamples` must be >= 1 and `level` between 0 and 1, got"
            f" {num_resamples} and {level}."
        )
    value = statistic(*rows).item()
    if math.isnan(value):
        return Interval(value, value, value)
    num_rows = len(rows[0])
    chunk = max(1, _MAX_RESAMPLED // num_rows)
    samples = []
    for start in range(0, num_resamples, chunk):
        shape = (min(chunk, num_resamples - start), num_rows)
        drawn = torch.randint(num_rows, shape, generator=generator)
        samples.append(statistic(*(column[drawn] for column in rows)))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(samples).nanquantile(tails).tolist()
    return Interval(value, low, high)


def retained_fraction(values: Mapping[int, float]) -> dict[int, float]:
    """Return how much of the full dimension's quality each shorter prefix keeps.

    Args:
        values: Measure at every dimension, larger is better; the largest dimension is the full one.

    Returns:
        Value at each dimension over the value at the full one, dimensionless; NaN where that is
        not above 0, since a share of it means nothing.

    Raises:
        ValueError: If `values` is empty.

    Example:
        >>> retained_fraction({768: 0.5, 256: 0.25})
        {768: 1.0, 256: 0.5}
    """
    if not values:
        raise ValueError("`values` must have a dimension at least, got none.")
    full = float(values[max(values)])
    return {dim: float(value) / full if full > 0 else math.nan for dim, value in values.items()}
