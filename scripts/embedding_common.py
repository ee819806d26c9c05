"""What the scripts on sentence embeddings share: data, kept runs, intervals, tables."""

import argparse
import csv
import json
import lzma
import os
import statistics
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_lightning.data import PairsDataModule, PairsSource
from spectral_lightning.data.documents import content_digest
from spectral_lightning.tasks import SimilarityCorrelation

T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Quantiles of Student's t with 1 to 20 degrees of freedom."""

Encode = Callable[[list[str]], Tensor]
Scored = tuple[list[str], list[str], list[float]]


class Runs:
    """Finished runs, one JSON object per line of a file, found again by their settings.

    Args:
        path: File, made with its folder when the first run is finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.known = {_key(run["settings"]): run for run in map(json.loads, lines)}

    def get(self, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the run with these settings, after making it if it is missing."""
        key = _key(settings)
        if key not in self.known:
            run = {"settings": settings, **make()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(run) + "\n")
            self.known[key] = json.loads(json.dumps(run))
            print(json.dumps(run), flush=True)
        return self.known[key]


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def mean_interval(values: list[float]) -> dict[str, float | None]:
    """Mean, and the ends of its 95 % t interval, which one value does not have."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return {"mean": round(mean, 4), "low": None, "high": None}
    half = T_975[min(count - 1, len(T_975)) - 1] * statistics.stdev(values) / count**0.5
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Rows as a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def data_path(name: str) -> str:
    """Path of a file in the folder that the environment names."""
    return str(Path(os.environ["SPECTRAL_DATA"]) / name)


def sts_pairs(part: str, every: int = 1) -> Scored:
    """Both texts and the scores of every n-th pair of a part of STS-B."""
    with lzma.open(data_path(f"sts/stsb-en-{part}.csv.xz"), "rt", encoding="utf-8") as file:
        first, second, scores = zip(*list(csv.reader(file))[::every], strict=True)
    return list(first), list(second), [float(score) for score in scores]


def spearman(encode: Encode, pairs: Scored, dims: tuple[int, ...]) -> dict[str, float]:
    """Spearman correlation of cosines with scores at each dimension, times 100."""
    first, second, scores = pairs
    metric = SimilarityCorrelation(dims)
    metric.update(encode(first), encode(second), torch.tensor(scores))
    found = metric.compute().by_dim
    return {str(dim): round(100 * found[dim].spearman.item(), 3) for dim in dims}


def sources() -> list[PairsSource]:
    """What is trained on, in equal shares."""
    return [
        PairsSource(path=data_path("pairs/nli-dev.tsv.xz"), kind="nli", weight=1.0),
        PairsSource(
            path=data_path("pairs/wordnet-glosses.tsv.xz"),
            columns={"anchor": "words", "positive": "definition"},
            weight=1.0,
        ),
        PairsSource(
            path=data_path("pairs/wikisplit.tsv.xz"),
            columns={"anchor": "sentence", "positive": "two_sentences"},
            weight=1.0,
        ),
    ]


def pairs_data(seed: int, options: argparse.Namespace) -> PairsDataModule:
    """Batches of tokens, in an order of the seed."""
    data = PairsDataModule(
        sources(),
        tokenizer=str(options.folder),
        max_length=options.max_length,
        batch_size=options.batch_size,
        valid_fraction=0.0,
        sts={"stsb-dev": data_path("sts/stsb-en-dev.csv.xz")},
        seed=seed,
        cache_dir=str(options.work / "data"),
    )
    data.prepare_data()
    data.setup("fit")
    return data


def text_batches(data: PairsDataModule, steps: int) -> list[list[list[str]]]:
    """The texts of the first batches, by their ids."""
    texts = {text_id(text): text for one in sources() for row in one.rows() for text in row.texts}
    batches = islice(data.train_dataloader(), steps)
    return [[[texts[i] for i in row] for row in batch["text_ids"].tolist()] for batch in batches]


def text_id(text: str) -> int:
    """The number that batches have for a text."""
    return int.from_bytes(content_digest(text)[:8], "big") >> 1
