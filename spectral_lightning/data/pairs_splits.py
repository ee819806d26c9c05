"""Which rows of texts are for training and which for validation, without leaks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from spectral_lightning.data.documents import content_digest, is_held_out
from spectral_lightning.data.pairs_columns import PairRow

Parts = Mapping[int, Sequence[PairRow]]
"""Rows by the number of their source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSplits:
    """Rows of both sides, by the number of their source."""

    train: dict[int, list[PairRow]]
    """Rows to train on."""
    valid: dict[int, list[PairRow]]
    """Rows that are held out; sources without any are missing."""
    num_dropped: int
    """Rows on neither side, because a text of theirs stands in evaluation data."""


def split_pairs(
    rows: Parts, *, valid_fraction: float, max_valid: int, reserved: Collection[bytes]
) -> PairSplits:
    """Hold rows out by a digest of their anchor, so that no text is on both sides.

    All rows of an anchor go to one side. Where more than `max_valid` rows would be held out, the
    anchors with the smallest digests are taken. A training row whose anchor or positive is
    the anchor or positive of a held-out row is dropped; hard negatives may be on both sides, since
    nothing is learnt about what they belong to.

    Args:
        rows: All rows.
        valid_fraction: Expected share of anchors to hold out; 0 holds none out.
        max_valid: Largest number of rows to hold out.
        reserved: Digests of anchors and positives of other evaluation data; rows that have one
            are dropped.
    """
    kept = (
        {
            source: [row for row in part if reserved.isdisjoint(linked(row))]
            for source, part in rows.items()
        }
        if (reserved := set(reserved))
        else rows
    )
    held = _held_anchors(kept, valid_fraction, max_valid)
    valid = {
        source: chosen
        for source, part in kept.items()
        if (chosen := [row for row in part if content_digest(row.texts[0]) in held])
    }
    seen = {digest for part in valid.values() for row in part for digest in linked(row)}
    train = {
        source: [row for row in part if seen.isdisjoint(linked(row))]
        for source, part in kept.items()
    }
    total = sum(map(len, rows.values()))
    num_kept = sum(map(len, train.values())) + sum(map(len, valid.values()))
    return PairSplits(train=train, valid=valid, num_dropped=total - num_kept)


def linked(row: PairRow) -> tuple[bytes, bytes]:
    """Return the digests of a row's anchor and positive."""
    return content_digest(row.texts[0]), content_digest(row.texts[1])


def _held_anchors(rows: Parts, fraction: float, max_valid: int) -> set[bytes]:
    counts: dict[bytes, int] = {}
    for part in rows.values():
        for row in part:
            digest = content_digest(row.texts[0])
            if is_held_out(digest, fraction):
                counts[digest] = counts.get(digest, 0) + 1
    held: set[bytes] = set()
    room = max_valid
    for digest in sorted(counts):
        if counts[digest] > room:
            break
        room -= counts[digest]
        held.add(digest)
    return held


def limited(rows: Parts, max_rows: int) -> dict[int, list[PairRow]]:
    """Return at most `max_rows` rows, those with the smallest digests, in their order."""
    if sum(map(len, rows.values())) <= max_rows:
        return {source: list(part) for source, part in rows.items()}
    ranked = sorted(
        (content_digest("\n".join(row.texts)), source, number)
        for source, part in rows.items()
        for number, row in enumerate(part)
    )
    chosen = {(source, number) for _, source, number in ranked[:max_rows]}
    return {
        source: [row for number, row in enumerate(part) if (source, number) in chosen]
        for source, part in rows.items()
    }
