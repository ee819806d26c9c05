"""Choose the constants of `spectra.cold` and the healthy range of `spectral scan`.

Error and time by tolerance and number of vectors, on matrices whose leading values nearly agree
(which mislead an error estimate) and on the models given; time of the leading values against all of
them by size; time together against alone; relative stable ranks of the models. The last line
printed is one JSON object::

    python scripts/choose_scan.py MODEL... --save scripts/results/choose_scan.json
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import SEED, report
from torch import Tensor

from spectral_lightning.spectra import cold, scan_model
from spectral_lightning.testing import matrix_with_spectrum

VECTORS, TOLERANCES = (1, 2, 3, 4), (2e-6, 5e-7, 2e-7)
CLUSTER_SIZES, GAPS = (2, 3, 5, 10, 30), (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
SIDES = (64, 96, 128, 192, 256)
SHAPES = ((384, 384), (1024, 1024), (1024, 4096))


def clustered(repeats: int) -> list[Tensor]:
    """Matrices with 2 to 30 leading values within 1e-6 to 1e-3, random otherwise."""
    generator = torch.Generator().manual_seed(SEED)
    weights = []
    for _ in range(repeats):
        for size in CLUSTER_SIZES:
            for gap in GAPS:
                draws = torch.rand(160, generator=generator, dtype=torch.float64)
                values = torch.cat([1 - gap * draws[:size].sort().values, 0.6 * draws[size:]])
                weights += [
                    matrix_with_spectrum(values, shape, generator=generator, dtype=torch.float32)
                    for shape in ((160, 160), (300, 160))
                ]
    return weights


def by_tolerance(models: list[Path], repeats: int, rounds: int) -> list[dict[str, Any]]:
    """Worst error and time of each pair of tolerance and number of vectors."""
    weights = clustered(repeats)
    truth = [torch.linalg.matrix_norm(weight.double(), 2).item() for weight in weights]
    cases = []
    for vectors in VECTORS:
        for tolerance in TOLERANCES:
            cold.NUM_VECTORS, cold.RTOL = vectors, tolerance
            named = [(str(index), weight) for index, weight in enumerate(weights)]
            found = {int(x.name): x.spectral_norm for x in cold.cold_readings(named)}
            errors = [abs(found[index] / norm - 1) for index, norm in enumerate(truth)]
            times = {
                path.stem: milliseconds(lambda p=path: scan_model(p), rounds) for path in models
            }
            cases.append(
                {
                    "num_vectors": vectors,
                    "rtol": tolerance,
                    "worst_error": float(f"{max(errors):.1e}"),
                    "models_ms": times,
                }
            )
            print(cases[-1], flush=True)
    return cases


def leading_against_all(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds per square matrix, of the leading values and of all."""
    cases = []
    for kind, exponent in (("gaussian", None), ("power law", 0.35)):
        for side in SIDES:
            weights = matrices((side, side), 16, exponent)
            cases.append({"kind": kind, "side": side})
            for label, exact_side in (("leading", 0), ("all", side)):
                cold.EXACT_SIDE = exact_side
                took = milliseconds(lambda w=weights: list(cold.cold_readings(w)), rounds)
                cases[-1][f"{label}_ms"] = round(took / len(weights), 2)
            print(cases[-1], flush=True)
    return cases


def together_against_alone(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds per power-law matrix, measured alone and with others of its shape."""
    cases = []
    for shape in SHAPES:
        weights = matrices(shape, max(64 * 2**18 // (shape[0] * shape[1]), 2), 0.35)
        cases.append({"shape": shape, "matrices": len(weights)})
        for label, alone in (("alone", 0), ("together", 2**30)):
            cold.ALONE_BYTES, cold.TOGETHER_BYTES = alone, 2 * alone
            took = milliseconds(lambda w=weights: list(cold.cold_readings(w)), rounds)
            cases[-1][f"{label}_ms"] = round(took / len(weights), 2)
        print(cases[-1], flush=True)
    return cases


def matrices(
    shape: tuple[int, int], count: int, exponent: float | None
) -> list[tuple[str, Tensor]]:
    """Gaussian matrices, or some with the values ``i ** -exponent``."""
    generator = torch.Generator().manual_seed(SEED)
    values = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -(exponent or 0.0)
    return [
        (
            str(index),
            torch.randn(shape, generator=generator)
            if exponent is None
            else matrix_with_spectrum(values, shape, generator=generator, dtype=torch.float32),
        )
        for index in range(count)
    ]


def relative_stable_ranks(models: list[Path]) -> dict[str, Any]:
    """Extremes and quartiles over the matrices of all models."""
    layers = [layer for path in models for layer in scan_model(path).layers]
    ranks = [layer.reading.relative_stable_rank for layer in layers]
    return {
        "models": [path.stem for path in models],
        "matrices": len(ranks),
        "lowest": round(min(ranks), 4),
        "quartiles": [round(x, 3) for x in statistics.quantiles(ranks, n=4)],
        "highest": round(max(ranks), 4),
    }


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    """Median time of a call, after an untimed one."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times[1:]), 2)


def main() -> None:
    """Measure each choice with the others at their defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*", help="files or folders of models")
    parser.add_argument("--repeats", type=int, default=3, help="draws of each clustered spectrum")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path, help="file for the JSON record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {
        "what": "choice of the constants of spectra.cold, medians; clustered matrices are 160 x 160"
        " and 300 x 160 with known leading values",
        "relative_stable_ranks": relative_stable_ranks(options.models) if options.models else None,
    }
    defaults = {name: getattr(cold, name) for name in dir(cold) if name.isupper()}
    for name, measure in {
        "by_tolerance": lambda: by_tolerance(options.models[:1], options.repeats, options.rounds),
        "leading_against_all": lambda: leading_against_all(options.rounds),
        "together_against_alone": lambda: together_against_alone(options.rounds),
    }.items():
        results[name] = measure()
        for constant, value in defaults.items():
            setattr(cold, constant, value)
    report(results, options.save)


if __name__ == "__main__":
    main()
