"""Mode switching of all attention layers against the same run without it, over some seeds.

Runs `spectral fit` with the quick start and with configs/svd_phase2.yaml on top of it, one pair for
each seed, in processes of their own; then judges each pair by the criteria of the original's second
phase, as `spectral compare` does. Without `--source` the text is the embedded documentation. Prints
one JSON object as its last line::

    python scripts/svd_phase2.py --source wiki.train.txt --valid-source wiki.valid.txt
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_common import report

from spectral_lightning.dashboards.pairs import relative_difference, validation_pairs
from spectral_lightning.dashboards.phases import Phase, judge
from spectral_lightning.dashboards.runs import RunRecord, read_run
from spectral_lightning.spectra import LayerAnalysis

CONFIGS = Path(__file__).parents[1] / "configs"


def fit(folder: Path, seed: int, configs: list[str], options: argparse.Namespace) -> RunRecord:
    """Train once, and read what was logged."""
    command = [sys.executable, "-m", "spectral_lightning.cli.entry", "fit"]
    command += [f"--config={CONFIGS / name}" for name in configs]
    command += [f"--seed_everything={seed}", f"--trainer.logger.save_dir={folder}"]
    command += [f"--trainer.max_steps={options.steps}", f"--data.cache_dir={options.cache}"]
    command += ["--trainer.limit_val_batches=40", "--trainer.logger.name=run"]
    command += [f"--trainer.val_check_interval={options.steps // 5}"]
    if options.source is not None:
        command += [f"--data.source={options.source}"]
        command += [f"--data.valid_source={options.valid_source}"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(result.stderr[-2000:])
    return read_run(folder / "run")


def switches(record: RunRecord) -> dict[str, Any]:
    """How often layers switched, and how their ranks moved."""
    layers: dict[str, list[LayerAnalysis]] = {}
    for event in record.events or ():
        if isinstance(event, LayerAnalysis):
            layers.setdefault(event.layer, []).append(event)
    entered = [e for found in layers.values() for e in found if e.switches and e.mode == "full"]
    left = [e for found in layers.values() for e in found if e.switches and e.mode != "full"]
    moves = [found[-1].next_rank - found[0].rank for found in layers.values()]
    return {
        "layers": len(layers),
        "analyses": sum(len(found) for found in layers.values()),
        "layers_that_switched": len({e.layer for e in entered}),
        "switches_to_low_rank": len(entered),
        "switches_back": len(left),
        "ranks_that_fell": sum(move < 0 for move in moves),
        "ranks_that_rose": sum(move > 0 for move in moves),
    }


def pair(seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One seed: baseline and run, judged."""
    runs = []
    for name, configs in (
        ("baseline", ["gpt_quickstart.yaml"]),
        ("switching", ["gpt_quickstart.yaml", "svd_phase2.yaml"]),
    ):
        (folder / name).mkdir()
        runs.append(fit(folder / name, seed, configs, options))
    report = judge(*runs, Phase.PHASE2)
    points = validation_pairs(*runs).points
    last = points[-1]
    return {
        "seed": seed,
        "baseline_bpb": round(last.baseline, 4),
        "switching_bpb": round(last.run, 4),
        "difference_percent": round(100 * relative_difference(last.baseline, last.run), 3),
        "curve": [[p.step, round(p.baseline, 4), round(p.run, 4)] for p in points],
        **switches(runs[1]),
        "criteria": {c.name: [c.passed, c.value] for c in report.criteria},
    }


def main() -> None:
    """Run all seeds, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path)
    parser.add_argument("--valid-source", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        options.cache = Path(folder) / "cache"
        for seed in options.seeds:
            (Path(folder) / str(seed)).mkdir()
            pairs.append(pair(seed, Path(folder) / str(seed), options))
            print(pairs[-1], flush=True)
    results = {
        "script": "svd_phase2",
        "text": "embedded" if options.source is None else options.source.name,
        "steps": options.steps,
        "mean_difference_percent": round(
            statistics.fmean(found["difference_percent"] for found in pairs), 3
        ),
        "pairs": pairs,
    }
    report(results, options.save)


if __name__ == "__main__":
    main()
