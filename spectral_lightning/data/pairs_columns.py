"""What the columns of a record mean: anchor, positive, hard negatives, score, or an NLI label."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from spectral_lightning.data.pairs_records import Record

Kind = Literal["auto", "pairs", "triplets", "scored", "nli"]
"""How records are read; ``"auto"`` goes by the columns of the first one."""

ROLES = ("anchor", "positive", "negative", "score", "label")
"""What a column can be."""

# By convention, in this order of preference; the first name that exists is taken.
_NAMES = {
    "anchor": ("anchor", "query", "question", "sentence1", "premise", "text1", "prompt", "title"),
    "positive": (
        *("positive", "pos", "answer", "passage", "document", "sentence2", "hypothesis", "text2"),
        *("response", "completion", "abstract", "body"),
    ),
    "negative": ("negative", "negatives", "neg", "hard_negative", "hard_negatives"),
    "score": ("score", "similarity_score", "similarity", "label"),
    "label": ("gold_label", "label"),
}
_NUMBERED_NEGATIVE = re.compile(r"negative_?\d+")

# SNLI and MultiNLI number their classes so; "-" and -1 mark rows on which annotators disagreed.
_LABEL_NAMES = ("entailment", "neutral", "contradiction", "-")
_LABELS = {
    **{name: name for name in _LABEL_NAMES},
    "0": "entailment",
    "1": "neutral",
    "2": "contradiction",
    "-1": "-",
}


class PairRow(NamedTuple):
    """One row to train or evaluate on."""

    texts: tuple[str, ...]
    """Anchor, positive, and any hard negatives."""
    score: float | None = None
    """How alike anchor and positive are, in the units of its source; None if only ranked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairColumns:
    """Names of the columns of one source."""

    anchor: str
    """Column of the anchor, in NLI the premise."""
    positive: str
    """Column of the positive, in NLI the hypothesis."""
    negatives: tuple[str, ...] = ()
    """Columns of hard negatives; each holds a text or a list of texts."""
    score: str | None = None
    """Column of the score."""
    label: str | None = None
    """Column of the NLI label."""

    @property
    def kind(self) -> Kind:
        """What rows these columns make."""
        if self.label is not None:
            return "nli"
        if self.score is not None:
            return "scored"
        return "triplets" if self.negatives else "pairs"


def find_columns(
    fields: Mapping[str, Any], kind: Kind, given: Mapping[str, str | list[str]], description: str
) -> PairColumns:
    """Find out which column is which.

    Args:
        fields: The first record.
        kind: How the records are read.
        given: Names by role, which come before the conventional ones.
        description: What the source is, for error messages.

    Raises:
        ValueError: If a column that is needed is missing.
    """
    names = list(fields)
    found: dict[str, list[str]] = {}
    for role in ROLES:
        chosen = given.get(role, [])
        found[role] = [chosen] if isinstance(chosen, str) else list(chosen)
        for name in found[role]:
            if name not in names:
                raise ValueError(
                    f"`columns` must name columns of {description}, which are {names}, got"
                    f" '{name}' as {role}."
                )
        if not found[role]:
            found[role] = [name for name in _NAMES[role] if name in names][:1]
    if not found["negative"]:
        found["negative"] = [name for name in names if _NUMBERED_NEGATIVE.fullmatch(name)]
    if kind == "auto":
        kind = _guessed(fields, found, given)
    needed = ["anchor", "positive"]
    needed += {"triplets": ["negative"], "scored": ["score"], "nli": ["label"]}.get(kind, [])
    for role in needed:
        if not found[role]:
            raise ValueError(
                f"{description} must have a column for the {role} of kind '{kind}', such as"
                f" {', '.join(_NAMES[role][:4])}, but its columns are {names}. Name it in"
                f" `columns`, as {{'{role}': ...}}."
            )
    return PairColumns(
        anchor=found["anchor"][0],
        positive=found["positive"][0],
        negatives=tuple(found["negative"]) if kind == "triplets" else (),
        score=found["score"][0] if kind == "scored" else None,
        label=found["label"][0] if kind == "nli" else None,
    )


def _guessed(
    fields: Mapping[str, Any], found: dict[str, list[str]], given: Mapping[str, str | list[str]]
) -> Kind:
    named: dict[str, Kind] = {"label": "nli", "score": "scored", "negative": "triplets"}
    for role, kind in named.items():
        if given.get(role):
            return kind
    if {"premise", "hypothesis"} <= fields.keys() and found["label"]:
        return "nli"
    if found["negative"]:
        return "triplets"
    # As in the original SNLI and MultiNLI. A number as `label` may be a score as well as a class.
    is_class = "gold_label" in fields or _spelled(fields.get("label")) in _LABEL_NAMES
    has_score = found["score"] not in ([], ["label"])
    if {"sentence1", "sentence2"} <= fields.keys() and is_class and not has_score:
        return "nli"
    return "scored" if found["score"] else "pairs"


def is_conventional(name: str, role: str) -> bool:
    """Return whether a column of this name has the role by convention."""
    is_numbered = role == "negative" and _NUMBERED_NEGATIVE.fullmatch(name) is not None
    return is_numbered or name in _NAMES[role]


def parse_row(record: Record, columns: PairColumns) -> PairRow:
    """Read one row, with the white space around its texts removed.

    Raises:
        ValueError: If a field is missing or of the wrong kind.
    """
    texts = [_text(record, columns.anchor), _text(record, columns.positive)]
    for name in columns.negatives:
        texts += _texts(record, name)
    score = None if columns.score is None else _score(record, columns.score)
    return PairRow(tuple(texts), score)


def _field(record: Record, name: str) -> Any:
    place, fields = record
    if fields.get(name) is None:
        raise ValueError(
            f"Every record must have the field '{name}', but {place} has none. Add it or remove"
            " the record."
        )
    return fields[name]


def _text(record: Record, name: str) -> str:
    return _checked_text(_field(record, name), record[0], name)


def _texts(record: Record, name: str) -> list[str]:
    value = _field(record, name)
    values = value if isinstance(value, list) else [value]
    return [_checked_text(text, record[0], name) for text in values]


def _checked_text(value: object, place: str, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"The field '{name}' must be a text, but in {place} it is {type(value).__name__}."
        )
    # JSON can spell half a surrogate pair, which no tokenizer accepts.
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(
            f"Text must be valid Unicode, but the field '{name}' of {place} holds half a surrogate"
            " pair."
        )
    return value.strip()


def _score(record: Record, name: str) -> float:
    value = _field(record, name)
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(
            f"The field '{name}' must be a finite number, but in {record[0]} it is {value!r}. For"
            " labels of natural language inference use `kind='nli'`."
        )
    return score


def _spelled(label: object) -> str:
    return str(label).strip().lower()


def nli_triplets(rows: Iterable[tuple[str, str, str | int]]) -> Iterator[tuple[str, str, str]]:
    """Make triplets out of natural language inference: anchor, entailed, contradicted.

    Each hypothesis that a premise entails is a positive; its hard negative is a hypothesis that
    contradicts the same premise, in turn if there are several. Premises that lack either kind
    give nothing, and neutral hypotheses are not used.

    Args:
        rows: Premise, hypothesis and label: ``entailment``, ``neutral``, ``contradiction`` or
            ``-``, or 0, 1, 2 or -1.

    Yields:
        Triplets, in the order of their premises.

    Raises:
        ValueError: If a label is unknown.

    References:
        Gao, Yao and Chen (2021), "SimCSE", section 4. https://arxiv.org/abs/2104.08821

    Example:
        >>> list(nli_triplets([("a dog runs", "it moves", 0), ("a dog runs", "it sits", 2)]))
        [('a dog runs', 'it moves', 'it sits')]
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for premise, hypothesis, label in rows:
        name = _LABELS.get(_spelled(label))
        if name is None:
            raise ValueError(
                f"A label must be entailment, neutral, contradiction or -, or 0, 1, 2 or -1, got"
                f" {label!r}."
            )
        groups.setdefault(premise, {}).setdefault(name, []).append(hypothesis)
    for premise, hypotheses in groups.items():
        negatives = hypotheses.get("contradiction", [])
        for number, positive in enumerate(hypotheses.get("entailment", [])):
            if not negatives:
                break
            yield premise, positive, negatives[number % len(negatives)]


def parse_nli(records: Iterable[Record], columns: PairColumns) -> Iterator[PairRow]:
    """Yield the triplets of records of natural language inference.

    Raises:
        ValueError: If a field is missing or of the wrong kind, or a label is unknown.
    """
    column = columns.label
    assert column is not None

    def rows() -> Iterator[tuple[str, str, str | int]]:
        for record in records:
            label = _field(record, column)
            if _spelled(label) not in _LABELS:
                raise ValueError(
                    f"The field '{column}' must be one of {', '.join(_LABELS)}, but in"
                    f" {record[0]} it is {label!r}."
                )
            yield _text(record, columns.anchor), _text(record, columns.positive), label

    for triplet in nli_triplets(rows()):
        yield PairRow(triplet)
