"""What thin factors save: their spectrum against a dense SVD, training against the dense twin.

First part: singular values of a product of factors (2048 x 128 and 128 x 2048) by
`product_singular_values`, beside `torch.linalg.svdvals` of the product, and the error of either
against float64. Second part: forward and backward pass of a transformer of dimension 512 with
rank 64, against the same with full matrices: the blocks alone, and the whole model with embeddings
and head. Blocks of timing in the order A B B A; the last line printed is one JSON object::

    python scripts/bench_low_rank.py --save scripts/results/<date>_low_rank_cpu.json
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import SEED, report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spectral_lightning.linalg import product_singular_values
from spectral_lightning.models import LowRankTransformer, macs_per_token, parameter_counts

VOCAB_SIZE, SEQUENCE_LEN, BATCH_SIZE, RANK = 8192, 256, 4, 64


def interleaved(
    first: Callable[[], Any], second: Callable[[], Any], quadruples: int
) -> dict[str, Any]:
    """Milliseconds of both, and the median of the ratios of neighbours."""
    times: list[list[float]] = [[], []]
    for call in (first, second):
        call()
    for _ in range(quadruples):
        for index in (0, 1, 1, 0):
            start = time.perf_counter()
            (first, second)[index]()
            times[index].append(1e3 * (time.perf_counter() - start))
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    return {
        "ms": [round(statistics.median(found), 3) for found in times],
        "ratio": round(statistics.median(ratios), 2),
        "range": [round(ratios[0], 2), round(ratios[-1], 2)],
        "blocks": len(ratios),
    }


def spectrum(size: int, rank: int, quadruples: int) -> dict[str, Any]:
    """Time and error of all singular values of a product."""
    generator = torch.Generator().manual_seed(SEED)
    left = torch.randn(size, rank, generator=generator)
    right = torch.randn(rank, size, generator=generator) * torch.logspace(0, -2, rank)[:, None]
    product = left @ right
    truth = torch.linalg.svdvals(left.double() @ right.double())[:rank]
    error = ((product_singular_values(left, right).double() - truth).abs() / truth).max()
    timed = interleaved(
        lambda: product_singular_values(left, right),
        lambda: torch.linalg.svd(product, full_matrices=False),
        quadruples,
    )
    return {"size": size, "rank": rank, "largest_relative_error": error.item(), **timed}


def training(quadruples: int, *, is_whole: bool) -> dict[str, Any]:
    """Time of forward and backward passes, low-rank against dense."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(VOCAB_SIZE, (BATCH_SIZE, SEQUENCE_LEN + 1), generator=generator)
    x = torch.randn(BATCH_SIZE, SEQUENCE_LEN, 512, generator=generator, requires_grad=True)
    models = []
    for rank in (RANK, None):
        torch.manual_seed(SEED)
        models.append(LowRankTransformer(VOCAB_SIZE, SEQUENCE_LEN, rank=rank))

    def run(model: LowRankTransformer) -> None:
        model.zero_grad()
        if is_whole:
            logits = model(tokens[:, :-1])
            cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        else:
            through(model.blocks, x).square().mean().backward()

    timed = interleaved(lambda: run(models[0]), lambda: run(models[1]), quadruples)
    speed = [round(1e3 * BATCH_SIZE * SEQUENCE_LEN / ms) for ms in timed["ms"]]
    return {
        "what": "whole model" if is_whole else "blocks",
        "tokens_per_second": speed,
        "parameters": [parameter_counts(model).active for model in models],
        "macs_per_token": [macs_per_token(model, SEQUENCE_LEN).active for model in models],
        **timed,
    }


def through(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """Apply all blocks."""
    for block in blocks:
        x = block(x)
    return x


def main() -> None:
    """Run both parts, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quadruples", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    found = {"spectrum": spectrum(2048, 128, 3)}
    print(found["spectrum"], flush=True)
    found["training"] = [  # type: ignore[assignment]
        training(options.quadruples, is_whole=is_whole) for is_whole in (False, True)
    ]
    report({"script": "bench_low_rank", "model": "depth 6, 512, rank 64", **found}, options.save)


if __name__ == "__main__":
    main()
