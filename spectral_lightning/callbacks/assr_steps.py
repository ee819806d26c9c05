"""The steps that ASSR takes: from a verdict on a layer to an edit of its weight."""

import zlib
from typing import Literal

import torch
from torch import Tensor

from spectral_lightning.actuators import (
    SpectralUpdate,
    add_,
    condition_update,
    legacy_l2_update,
    log_stable_rank_update,
    lower_stable_rank_update,
    spectral_cap_update,
)
from spectral_lightning.callbacks.assr_layer import Layer, num_left_out
from spectral_lightning.spectra import VectorCache

Actuator = Literal["spectral_cap", "log_stable_rank", "legacy_l2"]


class Stepper:
    """Takes steps on single layers, on their device and without waiting for it.

    Args:
        actuator: Which update answers a stable rank outside its band.
        num_vectors: Singular directions that a step acts on.
        max_relative_step: Largest ``||step||_F / ||W||_F``.
        hysteresis: Of the thermostat: steps aim at twice that above the floor, so that it can
            switch off.
    """

    def __init__(
        self, actuator: Actuator, num_vectors: int, max_relative_step: float, hysteresis: float
    ) -> None:
        self._actuator = actuator
        self._num_vectors = num_vectors
        self._max_relative_step = max_relative_step
        self._inside = 1 + 2 * hysteresis

    def against_stable_rank(self, layer: Layer, vectors: VectorCache, rate: float | Tensor) -> bool:
        """Step towards the band of the stable rank; whether one was taken."""
        state = layer.state.rank
        if not state.side or layer.is_rank_one:
            return False
        if state.side > 0 and self._actuator != "log_stable_rank":
            return False  # the others cannot lower a stable rank
        with layer.target.editing() as weight:
            norm = _norm(weight)
            update = self._update_of(layer, vectors, norm)
            self._take(layer, weight, update, norm, rate, state.strength)
        return True

    def against_condition_number(
        self, layer: Layer, vectors: VectorCache, rate: float | Tensor, num_steps: int
    ) -> bool:
        """Lift the smallest singular values, for as many steps at once; whether any was."""
        state = layer.state.condition
        assert layer.state.bands is not None
        assert layer.reading is not None
        if state.side <= 0:
            return False
        with layer.target.editing() as weight:
            if not bool(torch.isfinite(weight).all()):
                return False  # it broke after the reading, which the next one will say
            left_out = num_left_out(min(layer.reading.shape))  # the next one is what is read
            trailing = vectors.smallest(layer.target.name, left_out + 1)
            norm = _norm(weight)
            largest = torch.full_like(norm, layer.reading.spectral_norm)
            update = condition_update(trailing, largest, layer.state.bands[1].ceiling)
            self._take(layer, weight, update, norm, rate, state.strength * num_steps)
        return True

    def _update_of(self, layer: Layer, vectors: VectorCache, norm: Tensor) -> SpectralUpdate:
        """Update that brings the stable rank of a layer back into its band."""
        state, reading = layer.state, layer.reading
        assert state.bands is not None
        assert reading is not None
        triplets = vectors.leading(layer.target.name, self._num_vectors)
        null = reading.stable_rank / reading.relative_stable_rank
        floor = state.bands[0].floor * null * self._inside
        if self._actuator == "legacy_l2":
            return legacy_l2_update(triplets)
        if self._actuator == "spectral_cap":
            return spectral_cap_update(triplets, norm, floor)
        if state.rank.side > 0:
            ceiling = state.bands[0].ceiling * null / self._inside
            return lower_stable_rank_update(triplets, norm, ceiling)
        healthy = state.healthy_norm
        keeps_norm = healthy is not None and reading.frobenius_norm <= healthy
        return log_stable_rank_update(triplets, norm, floor, keeps_norm=keeps_norm)

    def _take(
        self,
        layer: Layer,
        weight: Tensor,
        update: SpectralUpdate,
        norm: Tensor,
        rate: float | Tensor,
        strength: float,
    ) -> None:
        fraction = torch.zeros_like(norm) + rate * strength
        size = add_(
            weight,
            update,
            norm,
            fraction=fraction,
            max_relative_step=self._max_relative_step,
            generator=_generator(layer, weight.device),
        )
        layer.add_applied(size)


def _norm(weight: Tensor) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dtype=dtype)


def _generator(layer: Layer, device: torch.device) -> torch.Generator:
    """Generator of one step's stochastic rounding: another each time, and equal on all ranks."""
    seed = zlib.crc32(f"{layer.target.name}/{layer.num_interventions}".encode())
    return torch.Generator(device).manual_seed(seed)
