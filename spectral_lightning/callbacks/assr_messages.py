"""What ASSR tells its user while it works."""

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from spectral_lightning.callbacks.assr_layer import Layer, has_failed
from spectral_lightning.control import Regulator, is_calm
from spectral_lightning.spectra import Reading
from spectral_lightning.spectra.names import some_names

_MAX_DUTY = 0.05  # of the layers may be outside their bands after calibration (ASSR design)
_HALF = (torch.bfloat16, torch.float16)

ZERO = "zero, and left alone until training moves it"


def what_is_odd(layer: Layer, reading: Reading) -> str | None:
    """What keeps a layer from being regulated after a reading; None for nothing."""
    if has_failed(reading):
        return f"skipped, as {reading.failure}"
    if reading.failure is not None:
        return ZERO
    hopeless = layer.state.rank.side < 0 and layer.is_rank_one
    return "exactly of rank one, and no step can revive it" if hopeless else None


class Messages:
    """Warnings and notes of one fit, from rank 0.

    Attributes:
        said: Statements about single layers that have been made.
    """

    def __init__(self) -> None:
        self.said: set[str] = set()

    def begin(self, layers: Mapping[str, Layer]) -> None:
        """Warn if no layer can be acted on, or some only by rounding."""
        num_half = sum(layer.target.stored().dtype in _HALF for layer in layers.values())
        if num_half:
            rank_zero_warn(
                f"ASSR acts on {num_half} layers in half precision, whose spacing is coarser than"
                " its steps, and rounds them stochastically; float32 weights (precision"
                " 'bf16-mixed') are more exact."
            )
        if not layers:
            rank_zero_warn(
                "ASSR has no effect for now: no optimizer trains a layer that `layers` selects, at"
                " a learning rate that it says."
            )

    def odd(self, statements: Mapping[str, list[str]], step: int) -> None:
        """Say once of each layer that a statement holds for it; as a warning, but of zeros.

        Args:
            statements: What holds, as the rest of a sentence, to the layers it holds for.
            step: Optimizer step at which it was seen.
        """
        for what, names in statements.items():
            new = [name for name in names if f"{name} {what}" not in self.said]
            self.said.update(f"{name} {what}" for name in new)
            if new:
                who = f"{some_names(new, none='')} {'is' if len(new) == 1 else 'are'}"
                say = rank_zero_info if what == ZERO else rank_zero_warn
                say(f"ASSR: {who} {what} (seen at step {step}). Training goes on.")

    def calibrated(self, layers: Mapping[str, Layer], step: int) -> None:
        """Say that layers have their bands, and warn if many are outside at once."""
        done = {name: layer.state for name, layer in layers.items() if layer.state.bands}
        sides = {name: state.rank.side for name, state in done.items()}
        rank_zero_info(f"ASSR: {len(done)} layers are calibrated since step {step}.")
        if not is_calm(sides.values(), max_duty=_MAX_DUTY):
            outside = [name for name, side in sides.items() if side]
            rank_zero_warn(
                f"ASSR finds {len(outside)} of {len(sides)} layers, such as {outside[0]},"
                " outside their bands at once; lower `floor` or calibrate on a window if the run"
                " is healthy."
            )

    def end(self, layers: Mapping[str, Layer], regulator: Regulator) -> None:
        """Warn of layers that the run was too short for."""
        waiting = [name for name, layer in layers.items() if layer.state.bands is None]
        if waiting:
            rank_zero_warn(
                f"ASSR has not acted on {len(waiting)} layers, such as {waiting[0]}: the run ended"
                f" before they were calibrated (on readings of {regulator.num_steps} steps, from"
                f" step {regulator.first_step} on)."
            )
