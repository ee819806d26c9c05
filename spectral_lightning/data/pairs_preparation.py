"""From pairs of texts to token ids in the cache, once per data, tokenizer and length."""

import hashlib
import json
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import tokenizers

from spectral_lightning.data.cache import fill_folder
from spectral_lightning.data.documents import content_digest
from spectral_lightning.data.pairs_batches import (
    EvalKind,
    EvalSet,
    RowPart,
    TextTable,
    TextWriter,
)
from spectral_lightning.data.pairs_sets import (
    PairCounts,
    PairInputs,
    PairSettings,
    TextSet,
    gather_sets,
)
from spectral_lightning.data.pairs_tokenizer import encode, tokenizer_digest, train_pair_tokenizer
from spectral_lightning.data.shards import ShardInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LAYOUT = 2  # of the cache folder and of how columns are read; a new number leaves old ones alone
_INDEX, _ROWS, _TOKENIZER = "index.json", "rows.npz", "tokenizer"
_ENCODE_TEXTS = 1024  # per call of the tokenizer, which spreads them over its threads


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedRows:
    """Rows of one set."""

    name: str
    """Name of the set."""
    kind: EvalKind
    """What it measures; without meaning in training."""
    parts: tuple[RowPart, ...]
    """Its rows."""

    def describe(self) -> EvalSet:
        """Return what users are told about it."""
        num_rows = sum(len(part.texts) for part in self.parts)
        return EvalSet(name=self.name, kind=self.kind, num_rows=num_rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedPairs:
    """Tokenized rows in the cache."""

    folder: Path
    """Where they are kept."""
    table: TextTable
    """The texts."""
    splits: dict[str, tuple[NamedRows, ...]]
    """Sets by split: one for ``train``, those for ``valid``, and those for ``test``."""
    counts: PairCounts
    """What became of rows and texts."""
    tokenizer: "PreTrainedTokenizerBase | None"
    """The tokenizer, if it was trained."""


def prepare_pairs(
    inputs: PairInputs,
    tokenizer: "PreTrainedTokenizerBase | None",
    settings: PairSettings,
    cache_dir: Path,
) -> PreparedPairs:
    """Split and tokenize pairs, or find them in the cache.

    All texts are held in memory once while they are prepared.

    Args:
        inputs: The data.
        tokenizer: The tokenizer, or None to train one on the training texts.
        settings: What else decides the result.
        cache_dir: Folder for the results; created if missing.

    Raises:
        ValueError: If data are empty or malformed, a split is or becomes empty, or the cache
            cannot be written.

    Warns:
        UserWarning: If the cache was damaged.
    """
    parts = [(role, one.fingerprint()) for role, one in inputs.all()]
    named = tokenizers.__version__ if tokenizer is None else tokenizer_digest(tokenizer)
    content = [_LAYOUT, parts, inputs.valid is None, named, asdict(settings)]
    key = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
    folder = cache_dir / key
    fill_folder(folder, lambda building: _build(inputs, settings, tokenizer, building), _damage)
    return load_pairs(folder)


def load_pairs(folder: Path) -> PreparedPairs:
    """Open what `prepare_pairs` left in a folder."""
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    splits: dict[str, tuple[NamedRows, ...]] = {}
    with np.load(folder / _ROWS) as arrays:
        for split, sets in index["splits"].items():
            splits[split] = tuple(
                NamedRows(
                    name=one["name"],
                    kind=one["kind"],
                    parts=tuple(
                        RowPart(arrays[f"{key}.texts"], arrays.get(f"{key}.scores"))
                        for key in one["parts"]
                    ),
                )
                for one in sets
            )
    tokenizer = None
    if (folder / _TOKENIZER).is_dir():
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / _TOKENIZER)
    return PreparedPairs(
        folder=folder,
        table=TextTable(folder, ShardInfo(**index["shard"])),
        splits=splits,
        counts=PairCounts(**index["counts"]),
        tokenizer=tokenizer,
    )


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a cache folder, or None."""
    # `zipfile` and `numpy` answer files that are not theirs with these.
    try:
        return load_pairs(folder).table.shard.damage(deep=True)
    except (OSError, ValueError, LookupError, TypeError, zipfile.BadZipFile) as error:
        return f"{folder} cannot be read ({error})"


def _build(
    inputs: PairInputs,
    settings: PairSettings,
    tokenizer: "PreTrainedTokenizerBase | None",
    folder: Path,
) -> None:
    splits, counts = gather_sets(inputs, settings)
    if tokenizer is None:
        tokenizer = train_pair_tokenizer(
            iter(_texts(splits["train"])),
            vocab_size=settings.vocab_size,
            max_length=settings.max_length,
        )
        tokenizer.save_pretrained(folder / _TOKENIZER)
    numbers = _texts(one for sets in splits.values() for one in sets)
    num_ids = max(tokenizer.get_vocab().values()) + 1
    writer = TextWriter(folder, num_ids)
    texts = iter(numbers)
    while chunk := list(islice(texts, _ENCODE_TEXTS)):
        encoded, num_cut = encode(tokenizer, chunk, settings.max_length)
        counts.cut += num_cut
        for tokens in encoded:
            writer.append(tokens)
    shard = writer.finish([_text_id(text) for text in numbers])
    counts.texts = len(numbers)
    index = {
        "shard": asdict(shard),
        "counts": asdict(counts),
        "splits": _write_rows(splits, numbers, folder),
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _texts(sets: Iterable[TextSet]) -> dict[str, int]:
    """Number all different texts in their order."""
    rows = (row for one in sets for part in one.parts for row in part)
    texts = dict.fromkeys(text for row in rows for text in row.texts)
    return {text: number for number, text in enumerate(texts)}


def _text_id(text: str) -> int:
    """Return a number below 2 ** 63 that is equal for texts that differ in white space only."""
    return int.from_bytes(content_digest(text)[:8], "big") >> 1


def _write_rows(
    splits: dict[str, list[TextSet]], numbers: dict[str, int], folder: Path
) -> dict[str, list[dict[str, object]]]:
    """Write the rows of all sets into one file and return where each stands in it."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    described: dict[str, list[dict[str, object]]] = {}
    for split, sets in splits.items():
        described[split] = []
        for one in sets:
            keys = [f"{split}.{len(described[split])}.{part}" for part in range(len(one.parts))]
            described[split].append({"name": one.name, "kind": one.kind, "parts": keys})
            for key, rows in zip(keys, one.parts, strict=True):
                table = [[numbers[text] for text in row.texts] for row in rows]
                arrays[f"{key}.texts"] = np.array(table, dtype=np.int64)
                if rows[0].score is not None:
                    scores = [row.score for row in rows]
                    arrays[f"{key}.scores"] = np.array(scores, dtype=np.float32)
    np.savez(folder / _ROWS, allow_pickle=False, **arrays)
    return described
