"""What `RankAdaptation` refuses, in a sentence each."""

import math
from collections.abc import Iterable
from typing import get_args

from spectral_lightning.actuators import Moments
from spectral_lightning.callbacks.base import SpectralCallback
from spectral_lightning.callbacks.rank_layer import Shrink
from spectral_lightning.control import RankController

LEAST = {"fade_steps": 1, "probes": 0, "probe_steps": 2}
"""Smallest values of what is counted."""


def check_settings(controller: object, shrink: str, moments: str, **numbers: float) -> None:
    """Refuse what is no controller, an unknown word, or a number out of its range.

    Raises:
        TypeError: If `controller` is no rank controller.
        ValueError: If something else is wrong.
    """
    if not isinstance(controller, RankController):
        raise TypeError(f"`controller` must be a RankController or None, got {controller!r}.")
    for name, value, known in (("shrink", shrink, Shrink), ("moments", moments, Moments)):
        if value not in get_args(known):
            allowed = ", ".join(get_args(known))
            raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")
    for name, number in numbers.items():
        if not (math.isfinite(number) and number >= LEAST.get(name, 0)):
            raise ValueError(f"`{name}` must be >= {LEAST.get(name, 0)}, got {number}.")


def refuse_overlap(names: Iterable[str], others: Iterable[SpectralCallback]) -> None:
    """Refuse layers that another instance adapts too: each would undo the other's work.

    Raises:
        ValueError: If there is one.
    """
    for other in others:
        both = sorted(set(names) & set(other.names))
        if both:
            raise ValueError(
                "`layers` of several RankAdaptation callbacks must not overlap, got"
                f" {both[0]!r} in two; give each its own layers."
            )
