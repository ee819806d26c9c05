"""An embedding model in a Trainer: how good its vectors are, and how to get them."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from spectral_lightning.models.spectra import SpectraModel
from spectral_lightning.tasks.checkpoint import CHECKPOINT_KEY, CheckedCheckpointIO
from spectral_lightning.tasks.embedding_batches import cut, encode_chunks
from spectral_lightning.tasks.embedding_checkpoint import check_same_tokens, unpack_tokenizer
from spectral_lightning.tasks.embedding_metrics import SimilarityCorrelation
from spectral_lightning.tasks.embedding_report import Result, log_values, report_rows, report_table
from spectral_lightning.tasks.embedding_retrieval import CorpusRetrieval
from spectral_lightning.tasks.sentence_encoder import SentenceEncoder

Representations = dict[str, Tensor]

ChunkSize = int | Literal["auto"] | None
_CPU_CHUNK = 16


class EmbeddingTask(pl.LightningModule):
    """The half of `SentenceEmbedding` that does not train: evaluation, and vectors of texts.

    What the loaders evaluate is told by the data module's `eval_sets` (`test_sets` when testing).
    For each set, head and Matryoshka dimension this logs, over all ranks and rows,
    ``valid/<set>/<head>/<measure>_<dim>``: ``spearman`` and ``pearson`` of scored pairs; else
    ``recall@k``, ``ndcg@10``, ``mrr`` and ``map`` of finding the positive among all distinct
    positives of the set, with their chance levels. ``valid/sts`` is the mean Spearman correlation
    of the first head at its largest dimension over the scored sets, ``valid/recall@10`` that recall
    over the others, and ``valid/loss`` the loss of the batches at a fixed temperature.

    Args:
        model: Model of embeddings.
        eval_heads: Heads to evaluate; None for all. The first one is selected on.

    Raises:
        ValueError: If the model lacks a head.
    """

    def __init__(self, model: SpectraModel, eval_heads: Sequence[str] | None) -> None:
        super().__init__()
        dims = model.head_dims()
        self.eval_heads = tuple(dims) if eval_heads is None else tuple(eval_heads)
        unknown = sorted(set(self.eval_heads) - set(dims))
        if unknown or not self.eval_heads:
            raise ValueError(
                f"`eval_heads` must be out of the model's heads {', '.join(dims)}, got"
                f" {list(self.eval_heads)}."
            )
        self.model = model
        self.chunk_size: ChunkSize = "auto"
        self.max_length: int = model.config.max_length
        self.metrics = nn.ModuleDict()
        self.results: dict[str, dict[str, Result]] = {}
        self._eval_loss = MeanMetric(nan_strategy="disable")
        self._sets: dict[str, tuple[Any, ...]] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Return the model's output for token ids and mask of shape ``(B, S)``."""
        return self.model(input_ids, attention_mask)

    @override
    def setup(self, stage: str) -> None:
        """Take tokenizer and evaluation sets from the data module.

        Raises:
            ValueError: If model, tokenizer and data module do not fit together.
        """
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = CheckedCheckpointIO()
        data = getattr(self.trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is not None:
            if self._tokenizer is not None:
                check_same_tokens(self._tokenizer, tokenizer)
            self._tokenizer = tokenizer
            self.max_length = getattr(data, "max_length", self.max_length)
            _check_fit(self.model, len(tokenizer), self.max_length)
        for name, sets in (("valid", "eval_sets"), ("test", "test_sets")):
            self._sets[name] = tuple(getattr(data, sets, ()))
            for one in self._sets[name]:
                for head in self.eval_heads:
                    key = _key(name, one.name, head)
                    if key not in self.metrics:
                        self.metrics[key] = self._metric(one.kind, head)
        if stage == "fit":
            count = sum(parameter.numel() for parameter in self.model.parameters())
            rank_zero_info(f"The embedding model has {count:,} parameters.")

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the tokenizer of a checkpoint.

        Raises:
            ValueError: If the data module has another one.
        """
        saved = checkpoint.get(CHECKPOINT_KEY, {})
        if saved.get("tokenizer") is None:
            return
        tokenizer = unpack_tokenizer(saved["tokenizer"])
        if self._tokenizer is None:
            self._tokenizer, self.max_length = tokenizer, saved["max_length"]
        check_same_tokens(self._tokenizer, tokenizer)

    def _metric(self, kind: str, head: str) -> nn.Module:
        dims = self.model.head_dims()[head]
        return SimilarityCorrelation(dims) if kind == "sts" else CorpusRetrieval(dims)

    def represent(
        self, batch: Mapping[str, Any], *, recompute: bool = False
    ) -> list[Representations]:
        """Encode the texts of a batch.

        Args:
            batch: With `input_ids` and `attention_mask` ``(B, k, S)``.
            recompute: See `encode_chunks`.

        Returns:
            For each column, its representations ``(B, d)`` by the name of their head.
        """
        num_columns = batch["input_ids"].shape[1]
        size = self.chunk_size
        if size == "auto":
            size = _CPU_CHUNK if batch["input_ids"].device.type == "cpu" else None
        chunks = cut(batch, size)
        return encode_chunks(self._encode, chunks, num_columns, recompute=recompute)

    def _encode(self, input_ids: Tensor, attention_mask: Tensor) -> Representations:
        output = self.model(input_ids, attention_mask)
        names = (*self.model.head_dims(), "spectral", "anomaly_score")
        return {name: output[name] for name in names if output.get(name) is not None}

    def eval_loss(self, columns: list[Representations], batch: Mapping[str, Any]) -> Tensor | None:
        """Return the loss of an evaluation batch, or None; a task overrides it."""
        return None

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count the batch towards the numbers of its set."""
        self._evaluate("valid", batch, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count the batch towards the numbers of its set."""
        self._evaluate("test", batch, dataloader_idx)

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the vectors of the first head of a batch's texts, shape ``(B, k, d)``."""
        columns = self.represent(batch)
        return torch.stack([column[self.eval_heads[0]] for column in columns], 1)

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the numbers of all sets."""
        self._report("valid")

    @override
    def on_test_epoch_end(self) -> None:
        """Log the numbers of all sets."""
        self._report("test")

    @override
    def on_validation_end(self) -> None:
        """After ``validate`` alone, print a table of all numbers with their intervals."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._print_table()

    @override
    def on_test_end(self) -> None:
        """Print a table of all numbers with their intervals."""
        self._print_table()

    def _print_table(self) -> None:
        if not self.trainer.is_global_zero:
            return
        by_set = {
            name: {head: [result] for head, result in found.items()}
            for name, found in self.results.items()
        }
        for name, results in by_set.items():
            sys.stdout.write(f"\n{name}\n\n{report_table(report_rows(results))}\n")

    def _evaluate(self, stage: str, batch: Any, number: int) -> None:
        if not self._sets[stage]:
            raise ValueError(
                "Evaluation needs a data module that says in `eval_sets` and `test_sets` what its"
                " loaders evaluate; give a `PairsDataModule`."
            )
        columns, found = self.represent(batch), self._sets[stage][number]
        loss = None if found.kind == "sts" else self.eval_loss(columns, batch)
        if loss is not None:
            self._eval_loss.update(loss, len(batch["text_ids"]))
        valid, ids = batch.get("valid"), batch["text_ids"]
        for head in self.eval_heads:
            metric: Any = self.metrics[_key(stage, found.name, head)]
            first, second = columns[0][head], columns[1][head]
            if found.kind == "sts":
                metric.update(first, second, batch["scores"], valid)
                continue
            metric.update(first, second, ids[:, 0], ids[:, 1], valid)

    def _report(self, stage: str) -> None:
        values: dict[str, float] = {}
        selected: dict[str, list[float]] = {"sts": [], "recall@10": []}
        self.results = {}
        for one in self._sets[stage]:
            self.results[one.name] = {}
            for head in self.eval_heads:
                metric: Any = self.metrics[_key(stage, one.name, head)]
                result = self.results[one.name][head] = metric.compute()
                metric.reset()
                numbers = log_values(result)
                values |= {f"{stage}/{one.name}/{head}/{k}": v for k, v in numbers.items()}
                if head == self.eval_heads[0]:
                    dim = self.model.head_dims()[head][0]
                    name, measure = ("sts", "spearman") if one.kind == "sts" else ("recall@10",) * 2
                    selected[name].append(numbers[f"{measure}_{dim}"])
        means = {f"{stage}/{k}": sum(v) / len(v) for k, v in selected.items() if v}
        if self._eval_loss.update_called:
            means[f"{stage}/loss"] = self._eval_loss.compute().item()
            self._eval_loss.reset()
        self.log_dict(values, sync_dist=True)
        self.log_dict(means, sync_dist=True, prog_bar=True)

    def encoder(self, head: str | None = None, dim: int | None = None) -> SentenceEncoder:
        """Return what turns texts into vectors.

        Args:
            head: Name of a head; None for the first one evaluated.
            dim: Length of the prefix; None for all of it.

        Raises:
            ValueError: If no tokenizer is known, or the model has no such head or prefix.
        """
        if self._tokenizer is None:
            raise ValueError(
                "`encoder` needs a tokenizer: run with a data module that offers one, or load a"
                " checkpoint of such a run."
            )
        return SentenceEncoder(
            self.model,
            self._tokenizer,
            self.max_length,
            head=head or self.eval_heads[0],
            dim=dim,
        )

    def encode(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """Return vectors of texts, as ``SentenceTransformer.encode`` does (`SentenceEncoder`)."""
        return self.encoder().encode(sentences, **options)


def _key(stage: str, name: str, head: str) -> str:
    return f"{stage} {name} {head}".replace(".", "_")


def _check_fit(model: SpectraModel, num_tokens: int, max_length: int) -> None:
    """Refuse data that the model has no rows for.

    Raises:
        ValueError: If there are more tokens, or longer texts, than the model takes.
    """
    config = model.config
    for name, needed, offered in (
        ("vocab_size", num_tokens, config.vocab_size),
        ("max_position_embeddings", max_length, config.max_position_embeddings),
    ):
        if needed > offered:
            raise ValueError(
                f"The model's `{name}` must be at least {needed}, that of the data, got {offered}."
            )
