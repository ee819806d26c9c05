"""What the events of mode switching say about a run: counts, and findings to judge it by."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spectral_lightning.spectra.mode_events import (
    Condition,
    LayerAnalysis,
    ModeEvent,
    ModeSettings,
    SkippedAnalysis,
)
from spectral_lightning.spectra.names import some_names

ALIGNMENTS = ("principal_alignment", "minor_alignment", "reconstruction_error")
"""Measures in [0, 1], of every analysis."""
ANGLE = "subspace_angle"
"""Measure in [0, pi/2], of every analysis but a layer's first: it compares two."""
EROSION = "effect_erosion"
"""How strongly the applied update shrinks the principal part, in standard deviations of chance;
negative where it grows."""
PROTECTED_CHANGE = "protected_change"
"""How far the protected part has moved in low-rank mode, as a share of its norm."""
MOST_CHANGE = 0.01
"""Largest `PROTECTED_CHANGE` that is still protection. Chosen here: half-precision rounding of all
entries stays below it, and a principal part that nothing protects moves by about 1."""
MOST_EROSION = 0.5
"""Most erosion in low-rank mode, as a share of that in full mode. Chosen here."""
_CLOBBERING = "gradient_clobbering_risk"  # verdict of the policies in `control`
_LOW_RANK = "lowrank"
_CHANCE_EROSION = 0.4  # mean of the positive part of a standard normal number, 1 / sqrt(2 pi)
_SLACK = 1e-6  # rounding of single precision


class Finding(NamedTuple):
    """What was found, and whether it is what was wanted."""

    value: str
    """What was found; or why it is not known."""
    passed: bool | None
    """Whether a criterion is met; None if the logs do not tell."""


@dataclass(frozen=True, slots=True)
class ModeHistory:
    """The events of a run's file, in its order, as questions.

    Args:
        events: All events.
    """

    events: Sequence[ModeEvent]

    @property
    def analyses(self) -> list[LayerAnalysis]:
        """All analyses."""
        return [event for event in self.events if isinstance(event, LayerAnalysis)]

    @property
    def skipped(self) -> list[SkippedAnalysis]:
        """All analyses that could not be made."""
        return [event for event in self.events if isinstance(event, SkippedAnalysis)]

    @property
    def switches(self) -> list[LayerAnalysis]:
        """Analyses after which the mode changed."""
        return [analysis for analysis in self.analyses if analysis.switches]

    @property
    def detections(self) -> list[LayerAnalysis]:
        """Analyses that found clobbering: they met a danger condition, or say so in the verdict."""
        found = []
        conditions: tuple[Condition, ...] = ()
        for event in self.events:
            if isinstance(event, ModeSettings):
                conditions = tuple(c for c in event.conditions if c.role == "danger")
            elif isinstance(event, LayerAnalysis):
                is_met = any(c.is_met(event.measures.get(c.measure)) for c in conditions)
                if is_met or event.verdict == _CLOBBERING:
                    found.append(event)
        return found

    @property
    def layers(self) -> dict[str, list[LayerAnalysis]]:
        """Analyses of each layer that was analysed or skipped."""
        found: dict[str, list[LayerAnalysis]] = {}
        for event in self.events:
            if not isinstance(event, ModeSettings):
                found.setdefault(event.layer, [])
        for analysis in self.analyses:
            found[analysis.layer].append(analysis)
        return found


def intervals(history: ModeHistory, last_step: int) -> Finding:
    """Look for an analysis of each layer, made or skipped, at every interval of the run.

    A layer may be analysed later than at the multiple of the interval, as long as it is before the
    next one: optimizer steps may come in jumps, and layers may take turns.

    Args:
        history: Events of the run.
        last_step: Last step of the run on the loggers' axis.
    """
    steps: dict[str, list[int]] = {}
    for event in history.events:
        if not isinstance(event, ModeSettings):
            steps.setdefault(event.layer, []).append(event.step)
    due, missing = 0, []
    for begin, end, every in _stretches(history, last_step):
        for layer, done in steps.items():
            late = done[0] % every
            for multiple in range(math.ceil(begin / every) * every, end + 1 - late, every):
                due += 1
                if not any(multiple <= step < multiple + every for step in done):
                    missing.append(f"{layer} at step {multiple}")
    if not steps:
        return Finding("no layer was analysed or skipped", False)
    if not any(isinstance(event, ModeSettings) for event in history.events):
        return Finding("the events do not say how long an interval is", None)
    if not due:
        return Finding("the run ended before the first interval", None)
    skipped = f"{len(history.skipped)} skipped"
    if missing:
        return Finding(
            f"{len(missing)} of {due} are missing: {some_names(missing, none='')}; {skipped}", False
        )
    return Finding(f"all {due} in {_layers(len(steps))}; {skipped}", True)


def switched(history: ModeHistory) -> Finding:
    """Count the switches."""
    names = {analysis.layer for analysis in history.switches}
    return Finding(f"{len(history.switches)} in {_layers(len(names))}", bool(names))


def sane_measures(history: ModeHistory) -> Finding:
    """Look for measures outside of what they can be, or missing where they cannot be."""
    analyses = history.analyses
    if not analyses:
        return Finding("no layer was analysed", None)
    known = {name for analysis in analyses for name in analysis.measures}
    if unknown := [name for name in (*ALIGNMENTS, ANGLE) if name not in known]:
        return Finding(f"not among the measures: {', '.join(unknown)}", None)
    wrong, num_missing = [], 0
    for layer, found in history.layers.items():
        for number, analysis in enumerate(found):
            for name, limit in [*((name, 1.0) for name in ALIGNMENTS), (ANGLE, math.pi / 2)]:
                value = analysis.measures.get(name)
                if value is not None and not -_SLACK <= value <= limit + _SLACK:
                    wrong.append(f"{name} {value:.4g} of {layer} at step {analysis.step}")
                is_first = name == ANGLE and number == 0 and len(found) > 1
                num_missing += value is None and not is_first
    if wrong or num_missing:
        listed = some_names(wrong, none="none")
        return Finding(f"{num_missing} missing; outside their range: {listed}", False)
    return Finding(f"those of {len(analyses)} analyses", True)


def layers_analysed(history: ModeHistory) -> Finding:
    """Look for layers that were skipped throughout."""
    never = [layer for layer, found in history.layers.items() if not found]
    count = f"{len(history.layers) - len(never)} of {len(history.layers)}"
    if never:
        return Finding(f"{count}; never: {some_names(never, none='')}", False)
    return Finding(count, bool(history.layers))


def attention_switches(history: ModeHistory) -> Finding:
    """Count the attention layers, those with ``attn`` or ``attention`` in the name, that switch."""
    layers = [name for name in history.layers if "attn" in name or "attention" in name]
    if not layers:
        return Finding("no layer's name says that it is of attention", None)
    switching = {analysis.layer for analysis in history.switches}
    never = [layer for layer in layers if layer not in switching]
    count = f"{len(layers) - len(never)} of {len(layers)}"
    return Finding(f"{count}; never: {some_names(never, none='')}" if never else count, not never)


def clobbering(history: ModeHistory) -> Finding:
    """Count the detections of clobbering."""
    if found := history.detections:
        names = {analysis.layer for analysis in found}
        return Finding(f"{len(found)} in {_layers(len(names))}", True)
    settings = [event for event in history.events if isinstance(event, ModeSettings)]
    measures = {c.measure for event in settings for c in event.conditions if c.role != "release"}
    if not any(a.measures.get(name) is not None for a in history.analyses for name in measures):
        return Finding("the policy looks at nothing that would show it", None)
    return Finding("none", False)


def rank_falls(history: ModeHistory, share: float | None = None) -> Finding:
    """Count the layers whose rank is lower after the last analysis than at the first.

    Args:
        history: Events of the run.
        share: More than this share of the layers are wanted; None for at least one layer.
    """
    ranks = [(x[0].rank, x[-1].next_rank, name) for name, x in history.layers.items() if x]
    if not ranks:
        return Finding("no layer was analysed", None)
    fallen = [f"{name} {first} to {last}" for first, last, name in ranks if last < first]
    wanted = len(fallen) > share * len(ranks) if share is not None else bool(fallen)
    example = f", e.g. {fallen[0]}" if fallen else ""
    return Finding(f"{len(fallen)} of {len(ranks)}{example}", wanted)


def prevention(history: ModeHistory) -> Finding:
    """Look for evidence that low-rank mode keeps what it protects.

    That is `PROTECTED_CHANGE`, never above `MOST_CHANGE`, and the mean of `EROSION` (growth counts
    as 0), in low-rank mode at most `MOST_EROSION` of that in full mode, over the layers that were
    analysed in both. Where full mode erodes no more than chance, there is nothing to compare with.
    """
    low = [analysis for analysis in history.analyses if analysis.mode == _LOW_RANK]
    texts, good = [], []
    if changes := _values(low, PROTECTED_CHANGE):
        texts.append(f"protected part moved by at most {max(changes):.2g}")
        good.append(max(changes) <= MOST_CHANGE)
    inside, outside = [], []
    for analyses in history.layers.values():
        modes = [
            [x for x in analyses if (x.mode == _LOW_RANK) is is_low] for is_low in (True, False)
        ]
        in_low, in_full = (_values(found, EROSION) for found in modes)
        if in_low and in_full:
            inside += in_low
            outside += in_full
    if inside:
        erosion, before = (
            statistics.fmean(max(x, 0) for x in found) for found in (inside, outside)
        )
        texts.append(f"erosion of {erosion:.2g} in low-rank mode, {before:.2g} in full mode")
        if before > _CHANCE_EROSION:
            good.append(erosion <= MOST_EROSION * before)
        else:
            texts.append("no more than chance to compare with")
    if not good:
        texts = texts or [f"no {PROTECTED_CHANGE} or {EROSION} in low-rank mode"]
        return Finding("; ".join(texts), None)
    return Finding("; ".join(texts), all(good))


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


def _values(analyses: Sequence[LayerAnalysis], name: str) -> list[float]:
    numbers = (analysis.measures.get(name) for analysis in analyses)
    return [number for number in numbers if number is not None]


def _stretches(history: ModeHistory, last_step: int) -> Iterator[tuple[int, int, int]]:
    """Yield first step, last step and interval of each start of the run.

    The first step has no analysis unless the run was resumed: nothing was there to be due.
    """
    settings = [event for event in history.events if isinstance(event, ModeSettings)]
    begins = [event.step + (number == 0) for number, event in enumerate(settings)]
    ends = [*(event.step - 1 for event in settings[1:]), last_step]
    for event, begin, end in zip(settings, begins, ends, strict=False):
        yield begin, end, event.every_n_steps
