"""The original project's criteria for its three phases, judged on the logs of two runs.

A run is always judged against a paired baseline, which the original never had. What the logs do
not tell is not passed: it is reported as unknown, with the reason.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from spectral_lightning.dashboards import mode_findings
from spectral_lightning.dashboards.mode_findings import Finding, ModeHistory
from spectral_lightning.dashboards.pairs import (
    PACE,
    VALIDATION,
    ValidationPairs,
    relative_difference,
    training_speed,
    validation_pairs,
)
from spectral_lightning.dashboards.runs import RunRecord
from spectral_lightning.spectra.mode_events import MODE_EVENTS_FILE

MOST_SLOWDOWN = 0.1
"""Share of the baseline's tokens per second that may be lost. Chosen here: the original asks only
for a competitive time."""
_SLACK = 1e-6  # TensorBoard stores numbers in single precision


class Phase(StrEnum):
    """Phase of the original project."""

    PHASE1 = "phase1"
    """One layer switches modes in a short run."""
    PHASE2 = "phase2"
    """All attention layers do, in a run of thousands of steps."""
    PHASE3 = "phase3"
    """A run at full scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Criterion:
    """One criterion, judged."""

    name: str
    """What it is about."""
    target: str
    """What is wanted."""
    value: str
    """What was found; or why it is not known."""
    passed: bool | None
    """Whether it is met; None if the logs do not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseReport:
    """The criteria of a phase, judged."""

    phase: Phase
    """Phase."""
    criteria: tuple[Criterion, ...]
    """All criteria that logs can show."""
    not_judged: str
    """What the original also asks for and no logs show; empty if that is nothing."""
    pairs: ValidationPairs
    """The validations that both runs have in common."""

    @property
    def passed(self) -> bool:
        """Whether all criteria are met, and none is unknown."""
        return all(criterion.passed is True for criterion in self.criteria)


class _Evidence(NamedTuple):
    baseline: RunRecord
    run: RunRecord
    pairs: ValidationPairs


class _Check(NamedTuple):
    name: str
    target: str
    find: Callable[[_Evidence], Finding]


def judge(baseline: RunRecord, run: RunRecord, phase: Phase) -> PhaseReport:
    """Judge a run by the criteria of a phase.

    Args:
        baseline: The same run without mode switching.
        run: The run with it.
        phase: Whose criteria.

    Returns:
        Every criterion with what was found.

    Raises:
        ValueError: If both are the same run, or were never validated at the same step.
    """
    pairs = validation_pairs(baseline, run)
    evidence = _Evidence(baseline, run, pairs)
    criteria = tuple(
        Criterion(name=name, target=target, **find(evidence)._asdict())
        for name, target, find in _CHECKS[phase]
    )
    return PhaseReport(
        phase=phase, criteria=criteria, not_judged=_NOT_JUDGED.get(phase, ""), pairs=pairs
    )


def _on_events(find: Callable[[ModeHistory], Finding]) -> Callable[[_Evidence], Finding]:
    def found(evidence: _Evidence) -> Finding:
        if evidence.run.events is None:
            return Finding(f"the run has no {MODE_EVENTS_FILE}", None)
        return find(ModeHistory(evidence.run.events))

    return found


def _finished(evidence: _Evidence) -> Finding:
    baseline, run, _ = evidence
    tags = [tag for tag in PACE if tag in baseline.scalars and tag in run.scalars]
    wanted, reached = baseline.last_step(tags), run.last_step(tags)
    assert wanted is not None  # they have a validation in common
    assert reached is not None
    if reached < wanted:
        return Finding(f"stopped at step {reached}, the baseline reached {wanted}", False)
    if reached < (planned := _planned(run)):
        return Finding(f"stopped at step {reached}, its settings say {planned}", False)
    return Finding(f"step {reached}, the baseline {wanted}", True)


def _planned(run: RunRecord) -> int:
    """Return the last step at which the run logs if it makes all its steps; -1 if not known."""
    config = run.config or {}
    steps, every = (config.get(f"trainer.{key}") for key in ("max_steps", "log_every_n_steps"))
    if type(steps) is int and type(every) is int and steps > 0 and every > 0:
        return steps - steps % every - 1
    return -1


def _intervals(evidence: _Evidence) -> Finding:
    last_step = evidence.run.last_step(PACE)
    assert last_step is not None  # it has a validation
    return _on_events(lambda history: mode_findings.intervals(history, last_step))(evidence)


def _checkpoint(evidence: _Evidence) -> Finding:
    found = evidence.run.checkpoints
    if not found:
        return Finding("none below the run's folder", False)
    return Finding(f"{len(found)}, e.g. {found[-1].name}", True)


def _sample(evidence: _Evidence) -> Finding:
    run = evidence.run
    if any(text.strip() for text in run.samples.values()):
        return Finding(f"{len(run.samples)} in the logs", True)
    if run.samples:
        return Finding("empty texts only", False)
    if not run.starts:
        return Finding("not logged: CSV logs take no text", None)
    if (run.config or {}).get("model.init_args.sample_prompts"):
        return Finding("none, though `sample_prompts` were given", False)
    return Finding("not logged: no `sample_prompts` were given", None)


def _validation_within(share: float) -> _Check:
    def find(evidence: _Evidence) -> Finding:
        last = evidence.pairs.points[-1]
        value = f"{last.run:.5g} against {last.baseline:.5g} at step {last.step}"
        if not (math.isfinite(last.baseline) and last.baseline > 0):
            return Finding(f"{value}, where the baseline's is nothing to compare with", None)
        if not math.isfinite(last.run):
            return Finding(value, False)
        above = last.relative_difference
        return Finding(f"{value}: {100 * above:+.3f} %", above <= share + _SLACK)

    target = f"at most {100 * share:g} % above the baseline at the last common step"
    return _Check("validation", target, find)


def _curves(evidence: _Evidence) -> Finding:
    tag, points = evidence.pairs
    finite = [point for point in points if math.isfinite(point.relative_difference)]
    if len(finite) < 2:
        return Finding(f"{len(finite)} common steps with numbers in both, no curves", None)
    mean = 100 * sum(point.relative_difference for point in finite) / len(finite)
    better = sum(point.difference < 0 for point in finite)
    text = (
        f"{VALIDATION[tag]} at {len(finite)} common steps: mean {mean:+.3f} %, better at {better}"
    )
    return Finding(text, True)


def _speed(evidence: _Evidence) -> Finding:
    first, second = training_speed(evidence.baseline), training_speed(evidence.run)
    if first.tokens_per_second is None or second.tokens_per_second is None:
        of_baseline = first.tokens_per_second is None
        reason = first.source if of_baseline else second.source
        return Finding(f"{'baseline' if of_baseline else 'run'}: {reason}", None)
    above = relative_difference(first.tokens_per_second, second.tokens_per_second)
    value = f"{second.tokens_per_second:,.0f} against {first.tokens_per_second:,.0f}"
    return Finding(f"{value}: {100 * above:+.2f} %", above >= -MOST_SLOWDOWN - _SLACK)


_FINISHED = _Check(
    "run finished", "reached the last step of the baseline and of its plan", _finished
)
_CHECKS: dict[Phase, tuple[_Check, ...]] = {
    Phase.PHASE1: (
        _FINISHED,
        _Check("analyses", "every layer at every interval, made or skipped", _intervals),
        _Check("mode switches", "at least 1", _on_events(mode_findings.switched)),
        _Check(
            "sane measures",
            "alignments in [0, 1], angles in [0, pi/2], none missing",
            _on_events(mode_findings.sane_measures),
        ),
        _Check("checkpoint", "saved below the run's folder", _checkpoint),
        _Check("text sample", "written", _sample),
    ),
    Phase.PHASE2: (
        _FINISHED,
        _validation_within(0.05),
        _Check("layers analysed", "all", _on_events(mode_findings.layers_analysed)),
        _Check("attention layers that switch", "all", _on_events(mode_findings.attention_switches)),
        _Check("clobbering detected", "at least once", _on_events(mode_findings.clobbering)),
        _Check("rank falls", "in at least 1 layer", _on_events(mode_findings.rank_falls)),
        _Check("validation curves", "compared at 2 or more common steps", _curves),
    ),
    Phase.PHASE3: (
        _FINISHED,
        _validation_within(0.03),
        _Check(
            "tokens per second",
            f"at most {100 * MOST_SLOWDOWN:g} % below the baseline (a bound of ours)",
            _speed,
        ),
        _Check(
            "evidence of prevention",
            f"protected part moved by at most {mode_findings.MOST_CHANGE:g}; erosion, if any, at"
            f" most {100 * mode_findings.MOST_EROSION:g} % of that in full mode (bounds of ours)",
            _on_events(mode_findings.prevention),
        ),
        _Check(
            "rank falls",
            "in more than half of the layers",
            _on_events(lambda history: mode_findings.rank_falls(history, 0.5)),
        ),
    ),
}
_NOT_JUDGED = {
    Phase.PHASE2: "coherence of the text samples",
    Phase.PHASE3: "a CORE score as good as the baseline's",
}
