"""Where pairs come from: files, datasets, records in memory, or the embedded documentation."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, get_args

from spectral_lightning.data.pairs_columns import (
    ROLES,
    Kind,
    PairRow,
    find_columns,
    parse_nli,
    parse_row,
)
from spectral_lightning.data.pairs_consistency import like_first
from spectral_lightning.data.pairs_records import Record, load_split, read_records, resolve_path

_HASH_CHUNK_BYTES = 1 << 20
_SCALES = ((0.0, 1.0), (0.0, 5.0))


class PairInput(Protocol):
    """Rows of texts that can be read more than once."""

    @property
    def description(self) -> str:
        """What this is, in a few words, for logs and error messages."""

    @property
    def weight(self) -> float | None:
        """Share of the batches, relative to other inputs, or None."""

    def fingerprint(self) -> str:
        """Return a digest that changes whenever `rows` would."""

    def rows(self) -> Iterator[PairRow]:
        """Yield the rows; those with an empty text too."""


@dataclass(frozen=True, kw_only=True)
class PairsSource:
    """Pairs, triplets or scored pairs of texts from one place.

    Exactly one of `path`, `name` and `records` says where. Columns are found by their names:
    ``anchor``, ``query``, ``question``, ``sentence1``, ``premise``, ``text1``, ``prompt`` or
    ``title`` with ``positive``, ``answer``, ``passage``, ``document``, ``sentence2``,
    ``hypothesis``, ``text2``, ``response``, ``completion``, ``abstract`` or ``body``; hard
    negatives are ``negative``, ``negatives`` or ``negative_1``, ``negative_2`` and so on.

    Raises:
        ValueError: If an argument is outside its range.
    """

    path: str | None = None
    """A ``.csv``, ``.tsv``, ``.json`` or ``.jsonl`` (each also ``.xz`` or ``.gz``) or ``.parquet``
    file, or a folder that a dataset's ``save_to_disk`` has written or that holds Parquet files."""
    name: str | None = None
    """Name of a dataset on the Hugging Face Hub."""
    records: Sequence[Any] | None = None
    """Rows in memory: dicts of columns, tuples ``(anchor, positive, negative, ...)``, or scored
    pairs ``(text, text, number)``."""
    kind: Kind = "auto"
    """``"pairs"``, ``"triplets"`` (one or more hard negatives), ``"scored"``, or ``"nli"``, which
    makes triplets of premise, hypothesis and label as `nli_triplets` says. ``"auto"`` goes by the
    columns of the first record; a later one with hard negatives, a score or a label that the first
    lacks is refused. It takes a label beside ``premise`` and ``hypothesis`` for NLI; beside
    ``sentence1`` and ``sentence2`` only ``gold_label`` or a ``label`` in words, since a number
    there may be a score: it is read as one, so name ``"nli"`` if it is a class."""
    columns: Mapping[str, str | list[str]] = field(default_factory=dict)
    """Names of columns by role, for those that do not go by their names. Roles are ``anchor``,
    ``positive``, ``negative`` (one name or a list), ``score`` and ``label``."""
    weight: float | None = None
    """Share of the batches, relative to the weights of the other sources. None, for all sources
    alike, takes as many batches from each as it has."""
    score_range: tuple[float, float] | None = None
    """Scores that become 0 and 1. None takes 0 to 1, or 0 to 5 if a score is above 1."""
    split: str = "train"
    """Split of a dataset, on the Hub also a slice such as ``train[:100000]``."""
    config: str | None = None
    """Configuration of a dataset."""

    def __post_init__(self) -> None:
        places = {"path": self.path, "name": self.name, "records": self.records}
        given = [name for name, value in places.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"A source must have exactly one of `path`, `name` and `records`, got {given}."
            )
        if self.kind not in get_args(Kind):
            raise ValueError(f"`kind` must be one of {get_args(Kind)}, got {self.kind!r}.")
        if unknown := sorted(set(self.columns) - set(ROLES)):
            raise ValueError(f"The keys of `columns` must be among {ROLES}, got {unknown}.")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"`weight` must be positive, got {self.weight}.")
        if self.score_range is not None and not self.score_range[0] < self.score_range[1]:
            raise ValueError(
                f"`score_range` must be a smaller and a larger number, got {self.score_range}."
            )

    @property
    def description(self) -> str:
        """What this is, in a few words, for logs and error messages."""
        if self.records is not None:
            return "`records`"
        name = self.path or self.name or ""
        return str(path) if (path := self._file()) else f"{name} [{self.split}]"

    def fingerprint(self) -> str:
        """Return a digest that changes whenever `rows` would."""
        settings = [self.kind, sorted(self.columns.items()), self.score_range]
        digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
        if (path := self._file()) is None:
            for _, record in self._records():
                digest.update(repr(record).encode("utf-8", "surrogatepass"))
            return digest.hexdigest()
        digest.update("".join(path.suffixes[-2:]).lower().encode())
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def rows(self) -> Iterator[PairRow]:
        """Yield the rows, scores in [0, 1].

        Raises:
            FileNotFoundError: If `path` does not exist or is of another kind.
            ValueError: If the source cannot be read, or a record is malformed.
        """
        records = self._records()
        first = next(records, None)
        if first is None:
            raise ValueError(f"A source must hold pairs, but {self.description} is empty.")
        columns = find_columns(first[1], self.kind, self.columns, self.description)
        records = like_first(chain([first], records), columns, self.kind, self.columns)
        if columns.label is not None:
            yield from parse_nli(records, columns)
            return
        if columns.score is not None:
            yield from self._scaled((record, parse_row(record, columns)) for record in records)
            return
        num_texts = len(parse_row(first, columns).texts)
        for record in records:
            row = parse_row(record, columns)
            if len(row.texts) != num_texts:
                raise ValueError(
                    f"Every record must have {num_texts - 2} hard negatives as the first one of"
                    f" {self.description} does, but {record[0]} has {len(row.texts) - 2}."
                )
            yield row

    def _scaled(self, rows: Iterator[tuple[Record, PairRow]]) -> Iterator[PairRow]:
        read = list(rows)
        scores = [row.score for _, row in read if row.score is not None]
        fitting = (scale for scale in _SCALES if scale[0] <= min(scores) <= max(scores) <= scale[1])
        scale = self.score_range or next(fitting, None)
        if scale is None:
            raise ValueError(
                f"`score_range` must be given where scores are not in 0 to 5, but those of"
                f" {self.description} are in {min(scores):g} to {max(scores):g}."
            )
        low, high = scale
        for (place, _), row in read:
            assert row.score is not None
            if not low <= row.score <= high:
                raise ValueError(
                    f"A score must be in `score_range` = {scale}, but in {place} it is"
                    f" {row.score:g}."
                )
            yield row._replace(score=(row.score - low) / (high - low))

    def _file(self) -> Path | None:
        return None if self.path is None else resolve_path(self.path)

    def _records(self) -> Iterator[Record]:
        if self.records is not None:
            for number, record in enumerate(self.records):
                yield _in_memory(record, f"record {number} of `records`")
        elif (path := self._file()) is not None:
            yield from read_records(path)
        else:
            name = str(Path(self.path).expanduser()) if self.path else self.name or ""
            for number, record in enumerate(load_split(name, self.config, self.split)):
                yield f"row {number} of {name} [{self.split}]", record


def as_source(source: str | PairsSource) -> PairsSource:
    """Return the source that a bare path or name stands for.

    Raises:
        FileNotFoundError: If it looks like a path but does not exist.
    """
    if isinstance(source, PairsSource):
        return source
    is_path = resolve_path(source) is not None or Path(source).expanduser().exists()
    return PairsSource(path=source) if is_path else PairsSource(name=source)


def source_weights(inputs: Sequence[PairInput]) -> list[float] | None:
    """Return the weight of each input, or None where none has one.

    Raises:
        ValueError: If only some have a weight.
    """
    weights = [one.weight for one in inputs if one.weight is not None]
    if weights and len(weights) < len(inputs):
        raise ValueError(
            f"`weight` must be given for all sources or for none, got"
            f" {[one.weight for one in inputs]}."
        )
    return weights or None


def _in_memory(record: Any, place: str) -> Record:
    if isinstance(record, Mapping):
        return place, record
    if isinstance(record, str) or not isinstance(record, Sequence) or len(record) < 2:
        raise ValueError(
            f"`records` must hold dicts or tuples of two or more texts, but {place} is {record!r}."
        )
    anchor, positive, *rest = record
    if len(rest) == 1 and isinstance(rest[0], int | float):
        return place, {"anchor": anchor, "positive": positive, "score": rest[0]}
    negatives = {f"negative_{number}": text for number, text in enumerate(rest, start=1)}
    return place, {"anchor": anchor, "positive": positive, **negatives}
