"""Two runs paired step by step: validation, speed, and whether they differ in one thing only."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from spectral_lightning.dashboards.runs import RunRecord

TRAINING_LOSS = "train/loss"
"""Tag of the training loss, nats per token, that `LanguageModeling` logs."""
VALIDATION = {"valid/bpb": "validation bits per byte", "valid/loss": "validation loss"}
"""Tags of validation and what they mean; the first that both runs have is compared."""
PACE = (TRAINING_LOSS, *VALIDATION)
"""Tags whose last step says how far a run came; callbacks may log on other axes."""
TOKENS_PER_SECOND = "train/tokens_per_second"
"""Tag of the speed where a run logs it."""
ABSENT = "absent"
"""Stands for the value of a setting that a run does not have."""
_NOT_COMPARED = ("trainer.callbacks", "trainer.logger")
_LONGEST = 40  # letters of a setting in a warning


class ValidationPair(NamedTuple):
    """One validation of both runs."""

    step: int
    """Step on the loggers' axis."""
    baseline: float
    """The baseline's number."""
    run: float
    """The run's number."""

    @property
    def difference(self) -> float:
        """The run's number less the baseline's; positive is worse."""
        return self.run - self.baseline

    @property
    def relative_difference(self) -> float:
        """Difference as a share of the baseline's number; NaN unless that is positive, finite."""
        return relative_difference(self.baseline, self.run)


class ValidationPairs(NamedTuple):
    """The validations that two runs have in common."""

    tag: str
    """What was compared, a key of `VALIDATION`."""
    points: tuple[ValidationPair, ...]
    """At least one, in ascending order of their steps."""


class Speed(NamedTuple):
    """Training speed of a run."""

    tokens_per_second: float | None
    """Tokens of all ranks per second; None if the logs do not tell."""
    source: str
    """Where the number comes from, or why there is none."""


def relative_difference(baseline: float, value: float) -> float:
    """Return how far a value lies above the baseline's, as a share of it.

    Returns:
        The share, dimensionless; NaN unless the baseline's value is positive and finite.

    Example:
        >>> relative_difference(2.0, 2.5)
        0.25
    """
    if not (math.isfinite(baseline) and baseline > 0):
        return math.nan
    return value / baseline - 1


def common_values(baseline: RunRecord, run: RunRecord, tag: str) -> list[ValidationPair]:
    """Return the numbers of a tag at every step at which both runs have logged it."""
    first, second = baseline.values(tag), run.values(tag)
    return [ValidationPair(x, first[x], second[x]) for x in sorted(first.keys() & second.keys())]


def validation_pairs(baseline: RunRecord, run: RunRecord) -> ValidationPairs:
    """Pair the validations of two runs: bits per byte if both have them, or else the loss.

    Args:
        baseline: The run to compare with.
        run: The run to judge.

    Raises:
        ValueError: If both are the same run, or were never validated at the same step.
    """
    if baseline.folder.resolve() == run.folder.resolve():
        raise ValueError(f"The two runs must be different ones, got `{run.folder}` twice.")
    for tag in VALIDATION:
        if points := common_values(baseline, run, tag):
            return ValidationPairs(tag, tuple(points))
    steps = " and ".join(f"{_validated(record)} in `{record.folder}`" for record in (baseline, run))
    raise ValueError(
        f"The two runs must have a validation step in common ({' or '.join(VALIDATION)}), got"
        f" {steps}."
    )


def config_differences(baseline: RunRecord, run: RunRecord) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, but for callbacks and loggers.

    Returns:
        Both values by dotted key, `ABSENT` for one that there is not. Empty if one of the
        configurations is not known.
    """
    first, second = baseline.config, run.config
    if first is None or second is None or baseline.config_file != run.config_file:
        return {}
    values = {
        key: (first.get(key, ABSENT), second.get(key, ABSENT))
        for key in [*first, *(key for key in second if key not in first)]
        if not any(key == name or key.startswith(f"{name}.") for name in _NOT_COMPARED)
    }
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def pairing_warnings(baseline: RunRecord, run: RunRecord) -> list[str]:
    """Say why a difference between two runs may not come from callbacks alone.

    Returns:
        Sentences; none if both have the same settings and are seeded.
    """
    unknown = [record for record in (baseline, run) if record.config is None]
    if unknown:
        reasons = " and ".join(f"`{record.folder}` has {record.config_file}" for record in unknown)
        return [f"Whether the pairing is exact is not known: {reasons}."]
    if baseline.config_file != run.config_file:
        files = f"one has a {baseline.config_file}, the other a {run.config_file}"
        return [f"Whether the pairing is exact is not known: {files}."]
    warnings = []
    if differences := config_differences(baseline, run):
        listed = ", ".join(
            f"{key} ({_short(first)}, {_short(second)})"
            for key, (first, second) in differences.items()
        )
        warnings.append(f"The pairing is not exact, because settings differ: {listed}.")
    is_cli = baseline.config_file == "config.yaml"
    seeds = [(record.config or {}).get("seed_everything") for record in (baseline, run)]
    if is_cli and any(seed is None or seed is False for seed in seeds):
        warnings.append("The pairing is not exact, because `seed_everything` was not set.")
    return warnings


def training_speed(record: RunRecord) -> Speed:
    """Return the tokens per second of training.

    Takes the median of what was logged under `TOKENS_PER_SECOND`. Without that it divides the
    tokens by the wall time between entries of the training loss, leaving out the stretches in which
    there was a validation or the run was resumed; what callbacks cost in between is counted.

    Args:
        record: A run.

    Returns:
        Speed over the whole run, without its start.
    """
    logged = sorted(x for x in record.values(TOKENS_PER_SECOND).values() if 0 < x < math.inf)
    if logged:
        return Speed(logged[len(logged) // 2], f"median of {TOKENS_PER_SECOND}")
    breaks = [
        scalar.wall_time
        for tag in VALIDATION
        for scalar in record.scalars.get(tag, ())
        if scalar.wall_time is not None
    ]
    num_steps, seconds = 0, 0.0
    for first, second in pairwise(record.scalars.get(TRAINING_LOSS, ())):
        if first.wall_time is None or second.wall_time is None:
            return Speed(None, "not logged, and CSV logs have no times")
        begin, end = first.wall_time, second.wall_time
        if not any(begin < time <= end for time in (*breaks, *record.starts)):
            num_steps += second.step - first.step
            seconds += end - begin
    if seconds <= 0:
        return Speed(None, "not logged, and no two entries of the training loss tell")
    tokens = _tokens_per_step(record.config or {})
    if tokens is None:
        return Speed(None, "not logged, and the configuration does not say the tokens per step")
    return Speed(num_steps * tokens / seconds, f"from the times of {TRAINING_LOSS}")


def _tokens_per_step(config: Mapping[str, Any]) -> int | None:
    devices = config.get("trainer.devices")
    if isinstance(devices, list):
        devices = len(devices)
    elif devices == "auto" and config.get("trainer.accelerator") == "cpu":
        devices = 1  # Lightning's choice
    elif isinstance(devices, str) and devices.isdecimal():
        devices = int(devices)
    factors = [
        config.get("data.init_args.batch_size"),
        config.get("data.init_args.sequence_len"),
        config.get("trainer.accumulate_grad_batches", 1),
        config.get("trainer.num_nodes", 1),
        devices,
    ]
    strategy = config.get("trainer.strategy.class_path", "")
    if devices != 1 and strategy.endswith("ModelParallelStrategy"):
        return None  # ranks may share a batch
    if not all(type(factor) is int and factor > 0 for factor in factors):
        return None
    return math.prod(factors)


def _validated(record: RunRecord) -> str:
    steps = sorted({step for tag in VALIDATION for step in record.values(tag)})
    if not steps:
        return "none"
    return f"{len(steps)} from step {steps[0]} to {steps[-1]}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
