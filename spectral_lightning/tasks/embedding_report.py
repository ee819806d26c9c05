"""The results of embedding metrics as log values, as a table, and next to published targets."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from spectral_lightning.tasks.embedding_metrics import CorrelationResult
from spectral_lightning.tasks.embedding_retrieval import RetrievalResult
from spectral_lightning.tasks.embedding_statistics import (
    Interval,
    bootstrap_interval,
    retained_fraction,
    spearman,
)

Result = CorrelationResult | RetrievalResult


class ReportRow(NamedTuple):
    """One measure of one head at one dimension.

    Attributes:
        head: Name of the head.
        dim: Dimension of the prefix.
        measure: Name of the measure.
        interval: Value with its bootstrap interval.
        retained: Share of the value at the full dimension, NaN where that is not above 0.
        chance: Value without any skill.
        num_rows: Number of pairs or queries.
    """

    head: str
    dim: int
    measure: str
    interval: Interval
    retained: float
    chance: float
    num_rows: int


def log_values(result: Result) -> dict[str, float]:
    """Return the numbers of a result under names like ``spearman_256`` and ``ndcg@10_256``.

    Retrieval also has ``corpus_size``, ``num_queries`` and the chance of each measure, under names
    like ``chance_ndcg@10``; pairs have ``num_pairs``.
    """
    if isinstance(result, CorrelationResult):
        values: dict[str, float] = {"num_pairs": result.num_pairs}
        for dim, found in result.by_dim.items():
            values[f"spearman_{dim}"] = found.spearman.item()
            values[f"pearson_{dim}"] = found.pearson.item()
        return values
    values = {"num_queries": result.num_queries, "corpus_size": result.corpus_size}
    for dim, scores in result.by_dim.items():
        values |= {f"{name}_{dim}": value.item() for name, value in scores.named().items()}
    values |= {f"chance_{name}": value.item() for name, value in result.chance.named().items()}
    if result.neighbour_overlap is not None:
        for dim, overlap in result.neighbour_overlap.by_dim.items():
            values[f"neighbour_overlap_{dim}"] = overlap
        values["chance_neighbour_overlap"] = result.neighbour_overlap.chance
    return values


def report_rows(
    results: Mapping[str, Sequence[Result]], seed: int = 0, num_resamples: int = 1000
) -> list[ReportRow]:
    """Return every measure of every head at every dimension, with bootstrap intervals.

    The same rows are drawn at every dimension, so that intervals of dimensions compare.

    Args:
        results: Results of the metrics, by name of the head.
        seed: Seed of the bootstrap.
        num_resamples: Samples of the bootstrap.

    Returns:
        Rows, ordered by head, measure and dimension.
    """
    rows = []
    for head, found in results.items():
        for result in found:
            for measure, chance, intervals in _measures(result, seed, num_resamples):
                retained = retained_fraction({dim: row.value for dim, row in intervals.items()})
                count = result[0]
                rows += [
                    ReportRow(head, dim, measure, interval, retained[dim], chance, count)
                    for dim, interval in intervals.items()
                ]
    return rows


def _measures(
    result: Result, seed: int, num_resamples: int
) -> Iterator[tuple[str, float, dict[int, Interval]]]:
    """Yield the name, the chance and the intervals by dimension of every measure."""

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    if isinstance(result, CorrelationResult):
        intervals = {
            dim: bootstrap_interval(
                found.similarities,
                result.scores,
                generator=draws(),
                statistic=spearman,
                num_resamples=num_resamples,
            )
            for dim, found in result.by_dim.items()
        }
        yield "spearman", 0.0, intervals
        return
    for name, chance in result.chance.named().items():
        intervals = {
            dim: bootstrap_interval(
                scores.named()[name], generator=draws(), num_resamples=num_resamples
            )
            for dim, scores in result.per_query.items()
        }
        yield name, chance.item(), intervals


def report_table(rows: Sequence[ReportRow]) -> str:
    """Return rows of a report as a Markdown table."""
    lines = [
        "| head | dim | measure | value | 95 % interval | of the full dim | chance | rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        value, low, high = row.interval
        retained = "-" if math.isnan(row.retained) else f"{row.retained:.1%}"
        lines.append(
            f"| {row.head} | {row.dim} | {row.measure} | {value:.4f} | {low:.4f} to {high:.4f} |"
            f" {retained} | {row.chance:.4f} | {row.num_rows} |"
        )
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetScore:
    """A score to compare with, which someone else states.

    Args:
        measure: Name of the measure, as in `log_values`.
        value: The score, above 0.
        source: Who states it.
        split: Data and split that it is stated for.
        verified: Whether someone has measured it anew.

    Raises:
        ValueError: If `value` is not above 0, or a text is empty.
    """

    measure: str
    value: float
    source: str
    split: str
    verified: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise ValueError(f"`value` must be above 0 and finite, got {self.value}.")
        if not (self.measure and self.source and self.split):
            raise ValueError(
                "`measure`, `source` and `split` must not be empty, got"
                f" {self.measure!r}, {self.source!r} and {self.split!r}."
            )

    def progress(self, measured: Mapping[str, float]) -> float | None:
        """Return the measured share of the target; None if it was not measured, or is NaN."""
        value = measured.get(self.measure, math.nan)
        return None if math.isnan(value) else value / self.value


def target_table(measured: Mapping[str, float], targets: Sequence[TargetScore]) -> str:
    """Return the targets and how much of each is reached, as a Markdown table."""
    lines = [
        "| measure | measured | target | reached | source | split |",
        "|---|---|---|---|---|---|",
    ]
    for target in targets:
        progress = target.progress(measured)
        found = "not measured" if progress is None else f"{measured[target.measure]:.4f}"
        reached = "-" if progress is None else f"{progress:.1%}"
        source = target.source if target.verified else f"{target.source} (unverified)"
        lines.append(
            f"| {target.measure} | {found} | {target.value:.4f} | {reached} | {source} |"
            f" {target.split} |"
        )
    return "\n".join(lines)
