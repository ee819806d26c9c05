"""The data module for sentence embeddings: pairs of texts in, padded batches of tokens out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from spectral_lightning.data.base import PreparedDataModule
from spectral_lightning.data.pairs_batches import EvalSet, PairBatches
from spectral_lightning.data.pairs_preparation import (
    NamedRows,
    PreparedPairs,
    load_pairs,
    prepare_pairs,
)
from spectral_lightning.data.pairs_sampler import (
    EvaluationBatchSampler,
    PairBatchSampler,
    PairLoader,
)
from spectral_lightning.data.pairs_sets import (
    PairCounts,
    PairInputs,
    PairSettings,
    SourcesArgument,
)
from spectral_lightning.data.pairs_sources import PairsSource, source_weights
from spectral_lightning.data.pairs_tokenizer import (
    MIN_VOCAB_SIZE,
    load_pair_tokenizer,
    padding_id,
)
from spectral_lightning.data.text import default_cache_dir


class PairsDataModule(PreparedDataModule):
    """Pairs, triplets and scored pairs of texts for training sentence embeddings.

    A batch is a dict: ``input_ids`` and ``attention_mask``, ``(batch_size, k, length)``, int64,
    padded on the right to the longest text; ``text_ids``, ``(batch_size, k)``, int64, equal for
    texts that are equal up to white space; for scored pairs ``scores``, ``(batch_size,)``,
    float32, in [0, 1]. ``k`` is 2 (anchor, positive) or more (then hard negatives). A batch is of
    one source.

    Training batches are full, drawn from `seed` and the epoch, the same number on each rank, and
    a run resumes inside an epoch with exactly the batches it would have seen. Rows that fill no
    batch at the end of an epoch are left out. Validation and test have a list of loaders, which
    `eval_sets` and `test_sets` describe: held-out rows are the set ``pairs`` or, if they have
    scores, ``scored``. Their batches also have ``valid``, ``(batch_size,)``, bool: False marks
    a row that only fills up where rows do not divide among the ranks.

    Rows are held out by a digest of their anchor. A training row whose anchor or positive is the
    anchor or positive of a row of any evaluation data is left out, and so are rows with an empty
    text and repeated rows; texts that are too long are cut. All are counted and reported. Tokens
    are made once and kept in `cache_dir`.

    Args:
        sources: One or several sources: paths and names of datasets, or `PairsSource`, which says
            more. None takes 10,000 pairs of CPython's own documentation.
        tokenizer: Folder or name for ``AutoTokenizer.from_pretrained``, or a ready tokenizer.
            None trains one on the training texts.
        vocab_size: Largest vocabulary of a tokenizer that is trained. The default, like the next
            two, is chosen here for small data and a laptop.
        max_length: Largest number of tokens of a text.
        batch_size: Rows per batch and rank.
        eval_batch_size: The same for evaluation; None takes `batch_size`.
        no_duplicates: Let no two rows of a batch, over all ranks, share a text.
        pad_to_multiple_of: Round lengths up to a multiple of this, but not above `max_length`.
        valid_fraction: Expected share of anchors to hold out; 0 holds none out. Has no effect
            with `valid_sources`.
        max_valid: Largest number of rows to hold out.
        max_train_pairs: Largest number of training rows, chosen by their content.
        valid_sources: Rows for validation. None holds out a part of `sources`.
        test_sources: Rows for testing, named like `sources`.
        sts: Scored pairs for validation by name, as ``{"stsb-dev": "stsb-en-dev.csv"}``.
        test_sts: Scored pairs for testing by name. Without any test data, validation data test.
        seed: Chooses the order of the training rows.
        num_workers: Processes that load batches. Reading is cheap, so 0 is a good choice.
        cache_dir: Folder for tokens and tokenizers, by default that of `default_cache_dir`.

    Raises:
        ValueError: If an argument is outside its range; later, in `prepare_data`, if the data do
            not support what is asked of them.
        FileNotFoundError: In `prepare_data`, if a path does not exist.
    """

    def __init__(
        self,
        sources: SourcesArgument | None = None,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        vocab_size: int = 8192,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        no_duplicates: bool = True,
        pad_to_multiple_of: int = 8,
        valid_fraction: float = 0.05,
        max_valid: int = 5_000,
        max_train_pairs: int | None = None,
        valid_sources: SourcesArgument | None = None,
        test_sources: SourcesArgument | None = None,
        sts: Mapping[str, str | PairsSource] | None = None,
        test_sts: Mapping[str, str | PairsSource] | None = None,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        for name, value, low in (
            ("max_length", max_length, 4),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("pad_to_multiple_of", pad_to_multiple_of, 1),
            ("max_valid", max_valid, 1),
            ("max_train_pairs", 1 if max_train_pairs is None else max_train_pairs, 1),
            ("vocab_size", vocab_size, MIN_VOCAB_SIZE),
        ):
            if value < low:
                raise ValueError(f"`{name}` must be >= {low}, got {value}.")
        if not 0 <= valid_fraction < 1:
            raise ValueError(f"`valid_fraction` must be in [0, 1), got {valid_fraction}.")
        for argument, named in (("sts", sts), ("test_sts", test_sts)):
            if taken := {"pairs", "scored"} & set(named or {}):
                raise ValueError(f"`{argument}` must not use the name {taken.pop()!r}.")
        super().__init__(
            sequence_len=max_length, batch_size=batch_size, seed=seed, num_workers=num_workers
        )
        self.sources, self.valid_sources, self.test_sources = sources, valid_sources, test_sources
        self.sts, self.test_sts = dict(sts or {}), dict(test_sts or {})
        self.max_length = max_length
        self.eval_batch_size = eval_batch_size
        self.no_duplicates = no_duplicates
        self.pad_to_multiple_of = pad_to_multiple_of
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self._settings = PairSettings(
            max_length=max_length,
            valid_fraction=valid_fraction,
            max_valid=max_valid,
            max_train_pairs=max_train_pairs,
            vocab_size=vocab_size,
        )
        self._tokenizer = tokenizer
        self._data: PreparedPairs | None = None
        self._inputs: PairInputs | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; a given one at any time, one that is trained after `setup`."""
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_pair_tokenizer(self._tokenizer)
        if self._tokenizer is not None:
            return self._tokenizer
        tokenizer = self._opened().tokenizer
        assert tokenizer is not None
        return tokenizer

    @property
    def eval_sets(self) -> tuple[EvalSet, ...]:
        """What the loaders for validation evaluate, in their order; after `setup`."""
        return tuple(rows.describe() for rows in self._sets("valid"))

    @property
    def test_sets(self) -> tuple[EvalSet, ...]:
        """What the loaders for testing evaluate, in their order; after `setup`."""
        return tuple(rows.describe() for rows in self._sets("test"))

    @property
    def counts(self) -> PairCounts:
        """What became of the rows and texts; after `setup`."""
        return self._opened().counts

    @override
    def prepare_data(self) -> None:
        """Tokenize the data, or find them in the cache; nothing if they are open already.

        Warns:
            UserWarning: If rows are left out because they are empty or repeated.
        """
        if self._data is not None:
            return
        tokenizer = None if self._tokenizer is None else self.tokenizer
        data = prepare_pairs(self._all_inputs(), tokenizer, self._settings, self._cache())
        self.folder = data.folder.name
        if (faults := data.counts.faults()) is not None:
            rank_zero_warn(faults)
        described = (rows.describe() for rows in data.splits["valid"])
        evaluated = ", ".join(f"{one.num_rows:,} {one.name}" for one in described)
        rank_zero_info(
            f"Pairs: {data.counts.summary()}; rows for validation: {evaluated or 'none'}."
        )

    @override
    def open_folder(self, folder: str) -> None:
        """Open the tokens of all splits."""
        self._data = load_pairs(self._cache() / folder)

    @override
    def items(self, split: str) -> PairBatches:
        """Return the training rows, or those of the first set for validation or testing."""
        return self._batches(self._sets(split)[0], is_training=split == "train")

    @override
    def train_dataloader(self) -> PairLoader:
        """Return a loader of full batches that continues where a resumed run left off.

        Raises:
            ValueError: If a source has fewer rows than a batch, or only some have a weight.
        """
        items = self.items("train")
        inputs = self._all_inputs().train
        sampler = PairBatchSampler(
            items,
            ids=items.text_ids(),
            names=[one.description for one in inputs],
            batch_size=self.batch_size,
            no_duplicates=self.no_duplicates,
            weights=source_weights(inputs),
            seed=self.seed,
            **self._ranks(),
        )
        rank_zero_info(
            f"Pairs: {len(sampler):,} batches of {self.batch_size} rows per epoch and rank;"
            f" {sampler.num_left_over:,} of {len(items):,} rows fill no batch and are left out of"
            " an epoch."
        )
        loader = PairLoader(items, sampler=sampler, **self.loader_options())
        loader.load_state_dict(self._train_state)
        self._train_state, self._train_loader = {}, loader
        return loader

    @override
    def val_dataloader(self) -> list[DataLoader[Any]]:  # type: ignore[override]
        """Return one loader for each of `eval_sets`."""
        return self._evaluation_loaders("valid")

    @override
    def test_dataloader(self) -> list[DataLoader[Any]]:  # type: ignore[override]
        """Return one loader for each of `test_sets`."""
        return self._evaluation_loaders("test")

    @override
    def predict_dataloader(self) -> list[DataLoader[Any]]:  # type: ignore[override]
        """Return the loaders for testing."""
        return self._evaluation_loaders("test")

    @override
    def loader_options(self) -> dict[str, Any]:
        """Return what all loaders have in common, as arguments of `DataLoader`."""
        # The samplers choose whole batches, which the rows put together themselves.
        return {**super().loader_options(), "batch_size": None}

    def _evaluation_loaders(self, split: str) -> list[DataLoader[Any]]:
        loaders: list[DataLoader[Any]] = []
        for rows in self._sets(split):
            items = self._batches(rows, is_training=False)
            sampler = EvaluationBatchSampler(
                items,
                lengths=[len(part.texts) for part in rows.parts],
                batch_size=self.eval_batch_size,
                **self._ranks(),
            )
            loaders.append(DataLoader(items, sampler=sampler, **self.loader_options()))
        return loaders

    def _batches(self, rows: NamedRows, *, is_training: bool) -> PairBatches:
        return PairBatches(
            self._opened().table,
            rows.parts,
            pad_id=padding_id(self.tokenizer),
            multiple=self.pad_to_multiple_of,
            max_length=self.max_length,
            is_training=is_training,
        )

    def _sets(self, split: str) -> tuple[NamedRows, ...]:
        splits = self._opened().splits
        return splits[split] or splits["valid"]

    def _opened(self) -> PreparedPairs:
        if self._data is None:
            raise RuntimeError("`setup` must be called before the data are used.")
        return self._data

    def _cache(self) -> Path:
        return self.cache_dir / "pairs"

    def _all_inputs(self) -> PairInputs:
        if self._inputs is None:
            self._inputs = PairInputs.named(
                self.sources, self.valid_sources, self.test_sources, self.sts, self.test_sts
            )
        return self._inputs
