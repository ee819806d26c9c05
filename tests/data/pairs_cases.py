"""Rows of texts that tests of pairs share."""

import json

from spectral_lightning.data import PairsDataModule, PairsSource

WORDS = ("matrix", "vector", "layer", "norm", "rank", "value", "step", "weight", "loss", "token")

SCORED = [(f"left {n}", f"right {n}", n / 40) for n in range(40)]


def pair(number):
    """A row whose texts have between 2 and 30 words and stand in no other row."""
    words = " ".join(WORDS[(number + i) % 10] for i in range(1 + number % 29))
    return {"anchor": f"question {number} {words}", "positive": f"answer {number}"}


def pairs(num_rows, first=0):
    return [pair(number) for number in range(first, first + num_rows)]


def triplets(num_rows, first=0):
    return [{**row, "negative": f"wrong {row['positive']}"} for row in pairs(num_rows, first)]


def write_json_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def open_pairs(cache_dir, sources=None, *, ready=True, **settings):
    """A data module, by default on 60 pairs, that is ready for its loaders."""
    defaults = {
        "vocab_size": 400,
        "max_length": 32,
        "batch_size": 4,
        "valid_fraction": 0.2,
        "cache_dir": str(cache_dir),
    }
    sources = PairsSource(records=pairs(60)) if sources is None else sources
    data = PairsDataModule(sources, **(defaults | settings))
    if ready:
        data.prepare_data()
        data.setup("fit")
    return data
