"""Events of mode switching with everything filled in that a test does not care about."""

from spectral_lightning.spectra import Condition, LayerAnalysis, ModeSettings, SkippedAnalysis

DANGER = Condition("principal_alignment", "danger", above=True, threshold=0.4)
"""The danger condition of `SeedPolicy`."""
OPTIMAL = Condition("subspace_angle", "optimal", above=False, threshold=0.1)
"""One of its optimal conditions."""
CONDITIONS = (
    DANGER,
    Condition("largest_erosion", "danger", above=True, threshold=0.5),
    OPTIMAL,
    Condition("minor_alignment", "optimal", above=True, threshold=0.6),
    Condition("reconstruction_error", "optimal", above=False, threshold=0.01),
    Condition("intent_lift", "release", above=False, threshold=1.2),
)
"""Two of danger, three of optimal conditions, one of release."""
QUIET = {
    "principal_alignment": 0.2,
    "largest_erosion": 0.1,
    "subspace_angle": 0.9,
    "minor_alignment": 0.3,
    "reconstruction_error": 0.9,
    "intent_lift": 3.0,
}
"""Measures that meet none of `CONDITIONS`, and are near none."""


def mode_settings(
    *conditions: Condition, step: int = 0, every_n_steps: int = 20, policy: str = "SeedPolicy"
) -> ModeSettings:
    """Return settings; `DANGER` and `OPTIMAL` if no conditions are given."""
    return ModeSettings(
        step=step,
        every_n_steps=every_n_steps,
        policy=policy,
        protection="block",
        conditions=conditions or (DANGER, OPTIMAL),
    )


def layer_analysis(
    step: int = 20,
    layer: str = "fc",
    mode: str = "full",
    to: str | None = None,
    *,
    rank: int = 12,
    to_rank: int | None = None,
    loss: float | None = 1.0,
    verdict: str = "continue_current_mode",
    **measures: float | None,
) -> LayerAnalysis:
    """Return an analysis of a layer of size 16; it keeps mode and rank unless told otherwise."""
    return LayerAnalysis(
        step=step,
        layer=layer,
        mode=mode,
        rank=rank,
        num_principal=16 - rank,
        next_mode=mode if to is None else to,
        next_rank=rank if to_rank is None else to_rank,
        verdict=verdict,
        loss=loss,
        measures=measures,
    )


def skipped_analysis(step: int = 20, layer: str = "fc") -> SkippedAnalysis:
    """Return an analysis that could not be made."""
    return SkippedAnalysis(step=step, layer=layer, reason="the gradient is zero")
