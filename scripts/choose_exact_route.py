"""Time the routes of `singular_values` and `condition_number`, to choose what "auto" takes.

The routes of one shape are timed in turn within each round, so that a busy machine slows all of
them alike, and the median over rounds is kept. The last line printed is one JSON object::

    python scripts/choose_exact_route.py --save scripts/results/exact_route.json
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_common import SEED, report

from spectral_lightning.linalg.condition import cheapest_condition_route, condition_number
from spectral_lightning.linalg.exact import cheapest_route, singular_values

SHAPES = [
    (256, 256),
    (384, 384),
    (512, 512),
    (640, 512),
    (1376, 512),
    (4096, 512),
    (64, 1024),
    (768, 3072),
    (1024, 1024),
    (1280, 1024),
]
DTYPES = [torch.float32, torch.float64]


def time_in_turn(routes: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each route, after one untimed call each."""
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for route in routes.values():
        route()
    for _ in range(rounds):
        for name, route in routes.items():
            start = time.perf_counter()
            route()
            seconds[name].append(time.perf_counter() - start)
    return {name: round(1e3 * statistics.median(times), 2) for name, times in seconds.items()}


def measure(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """Times of all routes for a Gaussian matrix of one shape."""
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(shape, dtype=dtype, generator=generator)
    norm = singular_values(weight)[0]
    num_rows, num_cols = max(shape), min(shape)
    values = time_in_turn(
        {
            "gram": lambda: singular_values(weight, method="gram"),
            "qr": lambda: singular_values(weight, method="qr"),
            "svd": lambda: singular_values(weight, method="svd"),
        },
        rounds,
    )
    condition = time_in_turn(
        {
            "gram": lambda: condition_number(weight, method="gram"),
            "inverse": lambda: condition_number(weight, method="inverse"),
            "inverse, norm given": lambda: condition_number(
                weight, method="inverse", spectral_norm=norm
            ),
        },
        rounds,
    )
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "values_ms": values,
        "values_auto": cheapest_route(num_rows, num_cols, dtype),
        "condition_ms": condition,
        "condition_auto": cheapest_condition_route(num_rows, num_cols),
    }


def main() -> None:
    """Measure every shape and dtype and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each route")
    parser.add_argument("--save", type=Path, help="file for the JSON record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = []
    for dtype in DTYPES:
        for shape in SHAPES:
            cases.append(measure(shape, dtype, options.rounds))
            print(cases[-1], flush=True)
    results = {
        "what": "milliseconds of the routes to singular values and condition number, Gaussian"
        " matrices, median over the rounds",
        "rounds": options.rounds,
        "cases": cases,
    }
    report(results, options.save)


if __name__ == "__main__":
    main()
