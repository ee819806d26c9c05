"""How `RankAdaptation` carries out what was decided for a layer, the same on all ranks."""

from dataclasses import dataclass

import lightning.pytorch as pl

from spectral_lightning.actuators import Moments, best_components, fresh_rows
from spectral_lightning.callbacks.rank_layer import RankLayer, Shrink, components_of
from spectral_lightning.callbacks.rank_reading import moment_of, shared
from spectral_lightning.control import RankReading


@dataclass(frozen=True, slots=True)
class RankResizing:
    """Settings of `RankAdaptation` that say how ranks change."""

    shrink: Shrink
    fade_steps: int
    moments: Moments

    def __str__(self) -> str:
        return f"{self.shrink}, moments: {self.moments}"

    def carry_out(
        self, trainer: pl.Trainer, layer: RankLayer, reading: RankReading, rank: int
    ) -> float | None:
        """Give a layer another rank, or let the components that go begin to fade.

        Returns:
            Share of the energy that is kept if the rank becomes smaller.
        """
        module = layer.module
        directions = None
        if layer.probe is not None:
            if rank > module.rank and reading.growth is not None:
                directions = layer.probe.directions()
            layer.end_probe()
        if rank > module.rank:
            rows = fresh_rows(module, rank - module.rank, directions=directions)
            layer.grow(shared(trainer, [rows])[0])
            return None
        found = shared(trainer, components_of(layer, rank, moment_of(trainer, layer), self.shrink))
        if self.shrink == "cut":
            layer.shrink(found, self.moments)
        else:
            layer.begin_fade(found, rank, reading.step)
        energies = [value**2 for value in reading.values]
        return sum(energies[:rank]) / sum(energies)

    def advance_fade(self, trainer: pl.Trainer, layer: RankLayer, step: int) -> bool:
        """Fade a little more, and drop what has faded.

        Returns:
            Whether it is gone.
        """
        if layer.fade is None or not layer.advance_fade(step, self.fade_steps):
            return False
        keep, layer.fade = layer.fade.keep, None
        layer.shrink(shared(trainer, best_components(layer.module, keep)), self.moments)
        return True
