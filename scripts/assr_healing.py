"""Damage one layer of a trained GPT and watch ASSR heal it, for each actuator.

A small GPT is trained on real text with ASSR calibrating itself and doing nothing else. Then a
rank-one spike of 10 times the layer's spectral norm is added to one layer, and training goes on
from the same checkpoint: without the spike, with the spike left alone, and with the spike under
each actuator. Prints a table and one JSON object as its last line; ``--plot`` draws the readings::

    python scripts/assr_healing.py --save healing.json --plot healing.png
"""

import argparse
import math
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import torch
from bench_common import quiet_trainer, report

from spectral_lightning.callbacks import ASSR, SpectralMonitor
from spectral_lightning.callbacks.assr_steps import Actuator
from spectral_lightning.control import Regulator, Thermostat
from spectral_lightning.data import TextDataModule
from spectral_lightning.linalg import singular_values
from spectral_lightning.models import GPT
from spectral_lightning.tasks import LanguageModeling

LAYER = "model.blocks.1.mlp.c_fc"
V15_STRENGTH = 1e-4  # `base_lambda` of ASSR v1.5


def small_gpt(options: argparse.Namespace) -> LanguageModeling:
    """A GPT with AdamW, warmed up over 20 steps and constant afterwards."""
    return LanguageModeling(
        GPT(options.depth, options.vocab_size, options.sequence_len),
        optimizer=partial(torch.optim.AdamW, lr=options.lr, weight_decay=0.1),
        warmup_steps=20,
        warmdown_fraction=0.0,
    )


class Damage(pl.Callback):
    """Add the spike at the start of the fit, in a random direction."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add ten times the spectral norm along random unit vectors."""
        weight = pl_module.get_submodule(LAYER).weight.data
        generator = torch.Generator().manual_seed(0)
        u, v = (torch.randn(n, generator=generator) for n in weight.shape)
        edge = torch.linalg.matrix_norm(weight, 2)
        weight += 10 * edge * torch.outer(u / u.norm(), v / v.norm())


class Watch(SpectralMonitor):
    """Keep the relative stable rank of the layer at each step, and its norms."""

    def __init__(self) -> None:
        super().__init__(LAYER, spectrum_every_n_steps=None, table_rows=0)
        self.ranks: dict[int, float] = {}

    def on_readings(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Note the reading."""
        super().on_readings(trainer, pl_module, step)
        self.ranks[step] = self.spectra[LAYER].relative_stable_rank


def spectrum_of(task: pl.LightningModule) -> tuple[float, float]:
    """Frobenius norm of the layer, and root mean square of all but its ten largest values."""
    values = singular_values(task.get_submodule(LAYER).weight.detach())
    return values.norm().item(), values[10:].square().mean().sqrt().item()


def run(options: argparse.Namespace, data: pl.LightningDataModule, **how: Any) -> dict[str, Any]:
    """Train on from the checkpoint; what came of the layer and of the loss."""
    torch.manual_seed(0)
    task = small_gpt(options)
    watch = Watch()
    callbacks = [*([Damage()] if how["damage"] else []), watch, *how["callbacks"]]
    trainer = quiet_trainer(
        max_steps=how["until"], callbacks=callbacks, accelerator="cpu", gradient_clip_val=1.0
    )
    trainer.limit_val_batches = options.valid_batches
    trainer.fit(task, data, ckpt_path=how.get("ckpt_path"), weights_only=None)
    loss = trainer.validate(task, data, verbose=False)[0]["valid/loss"]
    norm, bulk = spectrum_of(task)
    if how.get("save"):
        trainer.save_checkpoint(how["save"])
    return {"valid_loss": loss, "norm": norm, "bulk": bulk, "ranks": watch.ranks}


def experiment(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """All runs: the one without damage, the one left alone, and one for each actuator."""
    data = TextDataModule(
        vocab_size=options.vocab_size,
        sequence_len=options.sequence_len,
        batch_size=options.batch_size,
    )
    regulator = Regulator(first_step=50, num_steps=options.steps - 100)
    path = folder / "trained.ckpt"

    def assr(actuator: Actuator = "log_stable_rank") -> ASSR:
        settings = {"strength": V15_STRENGTH} if actuator == "legacy_l2" else {}
        rule = replace(regulator, thermostat=Thermostat(**settings))
        return ASSR(actuator=actuator, regulator=rule, table_rows=0)

    first = assr()
    trained = run(options, data, damage=False, callbacks=[first], until=options.steps, save=path)
    floor = first.interventions[LAYER].floor
    until = 2 * options.steps
    settings = {"until": until, "ckpt_path": path}
    runs = {"before": {**trained, "interventions": first.assr_stats["total_int"], "floor": floor}}
    runs["no spike, no ASSR"] = run(options, data, damage=False, callbacks=[], **settings)
    healthy = assr()
    runs["no spike, ASSR"] = run(options, data, damage=False, callbacks=[healthy], **settings)
    runs["no spike, ASSR"]["interventions"] = healthy.assr_stats["total_int"]
    runs["spike left alone"] = run(options, data, damage=True, callbacks=[], **settings)
    for actuator in get_args(Actuator):
        healer = assr(actuator)
        runs[actuator] = run(options, data, damage=True, callbacks=[healer], **settings)
        runs[actuator]["interventions"] = healer.assr_stats["total_int"]
    for record in runs.values():
        ranks = record["ranks"]
        last_below = max((s for s, rank in ranks.items() if not rank >= floor), default=None)
        back = last_below != max(ranks)
        record["steps_to_floor"] = (last_below or options.steps) - options.steps if back else None
        record["relative_stable_rank"] = list(ranks.values())[-1]
    return runs


def draw(runs: dict[str, dict[str, Any]], floor: float, path: Path) -> None:
    """Plot the relative stable rank of the damaged layer over the steps."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    drawn = {name: record["ranks"] for name, record in runs.items() if name != "before"}
    for index, (name, ranks) in enumerate(drawn.items()):
        style = "--" if index % 2 else "-"  # some lie on each other
        axes.plot(list(ranks), list(ranks.values()), style, label=name)
    axes.axhline(floor, color="black", linestyle=":", label="floor")
    axes.set(yscale="log", xlabel="optimizer step", ylabel="relative stable rank", title=LAYER)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse the options, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("--sequence_len", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400, help="steps before, and after, the spike")
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW learning rate")
    parser.add_argument("--valid_batches", type=int, default=20)
    parser.add_argument("--plot", type=Path, help="file for the picture")
    parser.add_argument("--save", type=Path, help="file for the JSON record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = experiment(options, Path(folder))
    floor = runs["before"]["floor"]
    if options.plot is not None:
        draw(runs, floor, options.plot)
    reference = runs["no spike, no ASSR"]["valid_loss"]
    for name, record in runs.items():
        record["loss_change_percent"] = round(100 * (record["valid_loss"] / reference - 1), 3)
        del record["ranks"]
        print(f"{name:20}", {k: _short(v) for k, v in record.items()})
    setting = vars(options) | {"save": None, "plot": None, "floor": floor, "layer": LAYER}
    report({"what": "spike of 10x the spectral norm", **setting, "runs": runs}, options.save)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value


if __name__ == "__main__":
    main()
