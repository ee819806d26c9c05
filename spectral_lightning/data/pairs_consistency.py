"""Whether all records of a source can be read by the columns of the first."""

from collections.abc import Iterable, Iterator, Mapping

from spectral_lightning.data.pairs_columns import Kind, PairColumns, is_conventional
from spectral_lightning.data.pairs_records import Record


def like_first(
    records: Iterable[Record],
    columns: PairColumns,
    kind: Kind,
    given: Mapping[str, str | list[str]],
) -> Iterator[Record]:
    """Yield records, all read by the columns of the first, and let none lose a column by that.

    Columns that `kind` or `given` say not to use may stand in any record.

    Raises:
        ValueError: If a record has hard negatives, a score or a label in a column that the first
            one lacks.
    """
    roles = {"auto": ("negative", "score", "label"), "triplets": ("negative",)}.get(kind, ())
    if any(given.get(role) for role in roles):
        roles = ()
    known: set[str] | None = None
    for place, fields in records:
        known = set(fields) if known is None else known
        for name in fields:
            if name in known or fields[name] is None:
                continue
            if any(is_conventional(name, role) for role in roles):
                raise ValueError(_left_out(name, place, columns))
        yield place, fields


def _left_out(name: str, place: str, columns: PairColumns) -> str:
    remedy = f"`kind='{columns.kind}'`"
    if columns.negatives and is_conventional(name, "negative"):
        remedy = f"`columns={{'negative': {list(columns.negatives)}}}`"
    return (
        "Every record must have the same columns of negatives, scores and labels as the first, but"
        f" {place} has '{name}', which the first lacks. Add it to every record, move those that"
        f" have it to a source of their own, or leave it unused by {remedy}."
    )
