"""Spectra in TensorBoard, with no set-up by the user.

The writer of every function is the `SummaryWriter` of `torch.utils.tensorboard` or tensorboardX
(in Lightning: ``trainer.logger.experiment``). Scalars are not written here; the layout only
arranges them and expects these tags:

- ``spectral/<measure>/<layer>`` for each name in `MEASURES`, per layer,
- ``spectral/spectral_norm_low/<layer>`` and ``spectral/spectral_norm_high/<layer>`` for the bounds
  of the spectral norm,
- ``spectral/<measure>/min``, ``.../median`` and ``.../max`` over all layers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from spectral_lightning.dashboards.figures import heat_map_pixels
from spectral_lightning.spectra.timeline import HeatMapMeasure

MEASURES = (
    "relative_stable_rank",
    "stable_rank",
    "spectral_norm",
    "frobenius_norm",
    "relative_condition_number",
    "condition_number",
    "effective_rank",
)
"""Fields of `Reading` that are shown as scalars, in the order of the Custom Scalars tab."""

_NUM_BINS = 64  # TensorBoard shows 30


class Writer(Protocol):
    """What is used of a `SummaryWriter`."""

    def add_custom_scalars(self, layout: dict[str, dict[str, list[Any]]]) -> Any:
        """Write a layout of the Custom Scalars tab."""

    def add_image(self, tag: str, img_tensor: Any, global_step: int, *, dataformats: str) -> Any:
        """Write a picture."""

    def add_histogram(self, tag: str, values: Any, global_step: int, bins: int) -> Any:
        """Write a histogram."""


def write_layout(writer: Writer, names: Iterable[str], measures: Sequence[str] = MEASURES) -> None:
    """Write the layout of the Custom Scalars tab; once per run, TensorBoard takes the last one.

    Three groups of charts: the median over all layers with the range from the smallest to the
    largest, for each measure; each measure with one chart per kind of layer, where layers whose
    names differ only in a number, such as the index of their block, are of one kind; and the
    spectral norm of each layer with its interval.

    Args:
        writer: Where to write.
        names: Names of the layers, in the order of the charts.
        measures: Measures that will be logged; a chart without data stays empty.
    """
    names = list(names)
    kinds = dict.fromkeys(map(_kind, names))
    layout: dict[str, dict[str, list[Any]]] = {}
    layout["spectra: median, smallest and largest over all layers"] = {
        measure: ["Margin", [f"spectral/{measure}/{part}" for part in ("median", "min", "max")]]
        for measure in reversed(measures)  # TensorBoard 2.21 shows margin charts last to first
    }
    for measure in measures:
        layout[f"spectra: {measure} of each layer"] = {
            kind: ["Multiline", [f"^spectral/{measure}/{_pattern(kind)}$"]] for kind in kinds
        }
    if "spectral_norm" in measures:
        norm = "spectral/spectral_norm"
        layout["spectra: spectral_norm of each layer with its interval"] = {
            name: ["Margin", [f"{norm}/{name}", f"{norm}_low/{name}", f"{norm}_high/{name}"]]
            for name in names
        }
    writer.add_custom_scalars(layout)


def write_heat_map(
    writer: Writer,
    names: Sequence[str],
    steps: Sequence[int],
    rows: Sequence[Sequence[float | None]],
    *,
    step: int,
    measure: HeatMapMeasure = "relative_stable_rank",
) -> None:
    """Write the picture of `dashboards.figures.heat_map` under the tag ``spectral/heat_map``.

    Takes about 0.2 s for 57 layers x 512 columns on one CPU core, the first time 0.4 s. Nothing
    is written before the first reading.

    Args:
        writer: Where to write.
        names: See `heat_map`.
        steps: See `heat_map`.
        rows: See `heat_map`.
        step: Step under which the picture is logged.
        measure: See `heat_map`.

    Raises:
        ValueError: If `rows` does not fit `names` and `steps`, or `measure` is unknown.
    """
    if not names and not steps and not rows:
        return
    pixels = heat_map_pixels(names, steps, rows, measure)
    writer.add_image("spectral/heat_map", pixels, step, dataformats="HWC")


def write_histograms(
    writer: Writer, values: Mapping[str, Sequence[float] | None], *, step: int
) -> None:
    """Write a histogram of the singular values of each layer under ``spectral/values/<layer>``.

    Args:
        writer: Where to write.
        values: Singular values of each layer, in the weight's own units. Layers with None, with
            no value or with one that is not finite are left out.
        step: Step under which the histograms are logged.
    """
    for name, layer_values in values.items():
        data = np.asarray(() if layer_values is None else layer_values, dtype=float)
        if data.size and np.isfinite(data).all():
            # A fixed number of bins: the automatic choice makes thousands for a few outliers.
            writer.add_histogram(f"spectral/values/{name}", data, step, bins=_NUM_BINS)


def _kind(name: str) -> str:
    """Return the name with its numbers replaced: ``blocks.*.fc`` for ``blocks.3.fc``."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _pattern(kind: str) -> str:
    return r"\.".join(r"\d+" if part == "*" else re.escape(part) for part in kind.split("."))
