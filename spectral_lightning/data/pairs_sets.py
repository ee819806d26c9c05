"""Which rows of the data make the training set and which sets they are evaluated on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from spectral_lightning.data.embedded_pairs import EmbeddedPairs
from spectral_lightning.data.pairs_batches import EvalKind
from spectral_lightning.data.pairs_columns import PairRow
from spectral_lightning.data.pairs_sources import (
    PairInput,
    PairsSource,
    as_source,
    source_weights,
)
from spectral_lightning.data.pairs_splits import limited, linked, split_pairs

SourcesArgument = str | PairsSource | Sequence[str | PairsSource]
"""One source or several; a string is a path or the name of a dataset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSettings:
    """What decides the tokens and the splits, apart from the data themselves."""

    max_length: int
    """Largest number of tokens of a text."""
    valid_fraction: float
    """Expected share of anchors to hold out where no validation data are given."""
    max_valid: int
    """Largest number of rows to hold out."""
    max_train_pairs: int | None
    """Largest number of training rows."""
    vocab_size: int
    """Largest vocabulary of a tokenizer that is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairInputs:
    """All data, each where the user has named it."""

    train: Sequence[PairInput]
    """What to train on."""
    valid: Sequence[PairInput] | None = None
    """Rows for validation; None holds out a part of `train`."""
    test: Sequence[PairInput] = ()
    """Rows for testing."""
    sts: Mapping[str, PairInput] = field(default_factory=dict)
    """Scored pairs for validation, by name."""
    test_sts: Mapping[str, PairInput] = field(default_factory=dict)
    """Scored pairs for testing, by name."""

    @classmethod
    def named(
        cls,
        sources: SourcesArgument | None,
        valid: SourcesArgument | None,
        test: SourcesArgument | None,
        sts: Mapping[str, str | PairsSource],
        test_sts: Mapping[str, str | PairsSource],
    ) -> Self:
        """Find out what a user's arguments name; None trains on the embedded pairs.

        Raises:
            FileNotFoundError: If what looks like a path does not exist.
            ValueError: If there are no sources, or only some have a weight.
        """
        train = [EmbeddedPairs()] if sources is None else _listed(sources)
        if not train:
            raise ValueError("`sources` must name at least one source, got an empty list.")
        source_weights(train)
        return cls(
            train=train,
            valid=None if valid is None else _listed(valid),
            test=[] if test is None else _listed(test),
            sts={name: _as_scored(one) for name, one in sts.items()},
            test_sts={name: _as_scored(one) for name, one in test_sts.items()},
        )

    def all(self) -> Iterator[tuple[str, PairInput]]:
        """Yield every input with its role."""
        for role, inputs in (("train", self.train), ("valid", self.valid), ("test", self.test)):
            for number, one in enumerate(inputs or ()):
                yield f"{role} {number}", one
        for role, named in (("sts", self.sts), ("test_sts", self.test_sts)):
            for name, one in named.items():
                yield f"{role} {name}", one


def _listed(sources: SourcesArgument) -> list[PairInput]:
    several = [sources] if isinstance(sources, str | PairsSource) else sources
    return [as_source(source) for source in several]


def _as_scored(source: str | PairsSource) -> PairsSource:
    opened = as_source(source)
    return replace(opened, kind="scored") if opened.kind == "auto" else opened


@dataclass(kw_only=True, slots=True)
class PairCounts:
    """What became of the rows and texts; plain numbers, so that it goes into JSON as a dict."""

    empty: int = 0
    """Rows left out because a text is empty."""
    duplicates: int = 0
    """Training and held-out rows left out because they repeat another of their source."""
    shared: int = 0
    """Training rows left out because a text of theirs stands in evaluation data."""
    surplus: int = 0
    """Training rows left out because of `max_train_pairs`."""
    train: int = 0
    """Rows to train on."""
    texts: int = 0
    """Different texts."""
    cut: int = 0
    """Texts that are longer than `max_length` tokens and lose their end."""

    def faults(self) -> str | None:
        """Return how many rows are left out because of a fault in the data, or None."""
        if self.empty == self.duplicates == 0:
            return None
        return (
            f"Left out {self.empty:,} rows because a text is empty, and {self.duplicates:,} because"
            " they repeat another row of their source."
        )

    def summary(self) -> str:
        """Return what was trained on, what was left out on purpose, and what was cut."""
        return (
            f"{self.train:,} training rows, {self.shared:,} more left out because their anchor or"
            f" positive is evaluated on and {self.surplus:,} because of `max_train_pairs`;"
            f" {self.cut:,} of {self.texts:,} texts are cut at `max_length`"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSet:
    """Rows of one set, as texts."""

    name: str
    """Name of the set."""
    kind: EvalKind
    """What it measures; without meaning in training."""
    parts: list[list[PairRow]]
    """Rows with equally many texts each, of one source in training."""


def gather_sets(
    inputs: PairInputs, settings: PairSettings
) -> tuple[dict[str, list[TextSet]], PairCounts]:
    """Read all data and decide which row is for what.

    Returns:
        The sets by split, ``train``, ``valid`` and ``test``, and what became of the rows.

    Raises:
        ValueError: If data are malformed, or a split is empty.
    """
    counts = PairCounts()
    named = {
        split: [_scored_set(name, one, counts) for name, one in sets.items()]
        for split, sets in (("valid", inputs.sts), ("test", inputs.test_sts))
    }
    test = _read(inputs.test, counts)
    given = _read(inputs.valid or (), counts)
    evaluation = [part for one in (*named["valid"], *named["test"]) for part in one.parts]
    evaluation += [*test.values(), *given.values()]
    rows = _read(inputs.train, counts)
    split = split_pairs(
        rows,
        valid_fraction=settings.valid_fraction if inputs.valid is None else 0.0,
        max_valid=settings.max_valid,
        reserved={digest for part in evaluation for row in part for digest in linked(row)},
    )
    counts.shared = split.num_dropped
    train = split.train
    if settings.max_train_pairs is not None:
        train = limited(train, settings.max_train_pairs)
    counts.train = sum(map(len, train.values()))
    counts.surplus = sum(map(len, split.train.values())) - counts.train
    valid = split.valid if inputs.valid is None else given
    _check(inputs, settings, train, valid)
    return {
        "train": [TextSet(name="train", kind="retrieval", parts=list(train.values()))],
        "valid": [*_evaluation_sets(valid), *named["valid"]],
        "test": [*_evaluation_sets(test), *named["test"]],
    }, counts


def _read(inputs: Sequence[PairInput], counts: PairCounts) -> dict[int, list[PairRow]]:
    """Return the rows of each input, without empty texts and repetitions."""
    found: dict[int, list[PairRow]] = {}
    for number, one in enumerate(inputs):
        rows = list(one.rows())
        full = [row for row in rows if all(map(str.strip, row.texts))]
        found[number] = list(dict.fromkeys(full))
        counts.empty += len(rows) - len(full)
        counts.duplicates += len(full) - len(found[number])
        if not full:
            raise ValueError(
                f"A source must hold pairs, but all {len(rows)} rows of {one.description} have an"
                " empty text."
            )
    return found


def _scored_set(name: str, one: PairInput, counts: PairCounts) -> TextSet:
    """Return a named set of scored pairs, repetitions included."""
    rows = list(one.rows())
    full = [row for row in rows if all(map(str.strip, row.texts))]
    counts.empty += len(rows) - len(full)
    if len(full) < 2 or full[0].score is None:
        raise ValueError(
            f"The set '{name}' must hold two or more pairs with a score, but {one.description} has"
            f" {len(full)} pairs{'' if not full or full[0].score is not None else ' without one'}."
        )
    return TextSet(name=name, kind="sts", parts=[full])


def _evaluation_sets(rows: Mapping[int, list[PairRow]]) -> list[TextSet]:
    """Return one set of the rows to be found, and one of those with scores."""
    parts: dict[int, list[PairRow]] = {}
    scored: list[PairRow] = []
    for part in rows.values():
        for row in part:
            if row.score is None:
                parts.setdefault(len(row.texts), []).append(row)
            else:
                scored.append(row)
    sets = []
    if parts:
        sets.append(TextSet(name="pairs", kind="retrieval", parts=list(parts.values())))
    if scored:
        sets.append(TextSet(name="scored", kind="sts", parts=[scored]))
    return sets


def _check(
    inputs: PairInputs,
    settings: PairSettings,
    train: Mapping[int, list[PairRow]],
    valid: Mapping[int, list[PairRow]],
) -> None:
    for one, part in zip(inputs.train, train.values(), strict=True):
        if not part:
            raise ValueError(
                f"A source must leave a row to train on, but all rows of {one.description} are"
                " held out, share a text with evaluation data or exceed `max_train_pairs`."
            )
    total = sum(map(len, train.values()))
    if not valid and inputs.valid is None and settings.valid_fraction > 0:
        raise ValueError(
            f"`valid_fraction` must hold a row out of {total}, got {settings.valid_fraction}, which"
            " takes none. Raise it, or 0 for no held-out rows."
        )
