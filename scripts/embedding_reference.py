"""The side of sentence-transformers in `embedding_table`: the same batches under its trainer."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from embedding_common import Encode
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import TrainerCallback
from typing_extensions import override

SCALE = 20.0
"""What cosines are multiplied by; the default of sentence-transformers."""

Texts = list[list[list[str]]]
"""Batches of rows of texts."""


class StepEnds(TrainerCallback):
    """Calls a function after each step."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    @override
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.tick()


def reference_model(folder: Path, options: argparse.Namespace) -> Any:
    """The backbone as sentence-transformers runs it."""
    backbone = Transformer(str(folder), max_seq_length=options.max_length)
    pooling = Pooling(options.dims[0], "mean")
    return SentenceTransformer(modules=[backbone, pooling, Normalize()], device="cpu")


def train_reference(
    folder: Path,
    batches: Texts,
    rate: float,
    seed: int,
    tick: Callable[[], None],
    options: argparse.Namespace,
) -> Encode:
    """Train by the trainer of sentence-transformers."""
    model = reference_model(folder, options)
    ranking = MultipleNegativesRankingLoss(model, scale=SCALE)
    datasets, replay = as_datasets(batches)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(options.work / "reference"),
        per_device_train_batch_size=options.batch_size,
        max_steps=len(batches),
        learning_rate=rate,
        optim="adamw_torch_fused",
        warmup_steps=len(batches) // 10,
        multi_dataset_batch_sampler=replay,
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets,
        loss=MatryoshkaLoss(model, ranking, options.dims),
        callbacks=[StepEnds(tick)],
    )
    trainer.train()
    return partial(model.encode, batch_size=64, convert_to_tensor=True, show_progress_bar=False)


def as_datasets(batches: Texts) -> tuple[Any, Callable[..., Any]]:
    """Datasets of pairs and of triplets, and a sampler of their joined rows, batch for batch."""
    by_width: dict[int, list[list[str]]] = {}
    for batch in batches:
        by_width.setdefault(len(batch[0]), []).extend(batch)
    datasets, firsts, total = DatasetDict(), {}, 0
    for width, rows in by_width.items():
        names = ("anchor", "positive", "negative")[:width]
        columns = zip(*rows, strict=True)
        datasets[str(width)] = Dataset.from_dict(dict(zip(names, map(list, columns), strict=True)))
        firsts[width], total = total, total + len(rows)

    class Replay(MultiDatasetDefaultBatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            places = dict(firsts)
            for batch in batches:
                start = places[len(batch[0])]
                places[len(batch[0])] = start + len(batch)
                yield list(range(start, start + len(batch)))

        def __len__(self) -> int:
            return len(batches)

    return datasets, Replay
