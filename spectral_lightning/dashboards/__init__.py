"""How spectra are seen: TensorBoard, figures and a table for the terminal."""

from spectral_lightning.dashboards.figures import heat_map, spectrum_figure
from spectral_lightning.dashboards.interventions import (
    Interventions,
    interventions_scalars,
    interventions_table,
)
from spectral_lightning.dashboards.rank_figure import rank_figure, write_rank_figure
from spectral_lightning.dashboards.rank_report import rank_document, rank_table, rank_types
from spectral_lightning.dashboards.table import worst_layers_table
from spectral_lightning.dashboards.tensorboard import (
    MEASURES,
    write_heat_map,
    write_histograms,
    write_layout,
)

__all__ = [
    "MEASURES",
    "Interventions",
    "heat_map",
    "interventions_scalars",
    "interventions_table",
    "rank_document",
    "rank_figure",
    "rank_table",
    "rank_types",
    "spectrum_figure",
    "worst_layers_table",
    "write_heat_map",
    "write_histograms",
    "write_layout",
    "write_rank_figure",
]
