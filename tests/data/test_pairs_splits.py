import pytest

from spectral_lightning.data.documents import content_digest
from spectral_lightning.data.pairs_columns import PairRow
from spectral_lightning.data.pairs_splits import limited, split_pairs


def rows(*texts):
    return {0: [PairRow(tuple(one.split("/"))) for one in texts]}


def split(found, *, fraction=0.3, max_valid=1_000, reserved=()):
    return split_pairs(found, valid_fraction=fraction, max_valid=max_valid, reserved=reserved)


def linked_texts(parts):
    return {text for part in parts.values() for row in part for text in row.texts[:2]}


def chained(num_rows):
    """Rows of which each has the positive of another as anchor, and two share each anchor."""
    return rows(
        *(f"text {n}/text {(n * 7 + i) % num_rows}" for n in range(num_rows) for i in (1, 2))
    )


def test_no_anchor_or_positive_is_on_both_sides():
    found = split(chained(200))
    assert linked_texts(found.train).isdisjoint(linked_texts(found.valid))
    num_kept = len(found.train[0]) + len(found.valid[0])
    assert found.num_dropped == 400 - num_kept > 0


def test_rows_of_one_anchor_stay_together_and_keep_their_side_when_others_come():
    found = rows(*(f"anchor {n}/positive {n} {i}" for n in range(100) for i in range(3)))
    valid = split(found).valid[0]
    anchors = [row.texts[0] for row in valid]
    assert {anchors.count(anchor) for anchor in anchors} == {3}
    assert 15 <= len(set(anchors)) <= 45
    more = {**found, 1: rows("other/text")[0]}
    assert split(more).valid[0] == valid


def test_no_more_rows_are_held_out_than_allowed_and_the_others_are_trained_on():
    found = rows(*(f"anchor {n}/positive {n}" for n in range(200)))
    part = split(found, max_valid=10)
    assert (len(part.valid[0]), len(part.train[0]), part.num_dropped) == (10, 190, 0)


def test_row_with_a_text_of_other_evaluation_data_is_dropped():
    found = chained(200)
    reserved = {content_digest(text) for text in ("text 5", "text  6")}
    part = split(found, reserved=reserved, fraction=0.0)
    assert part.valid == {}
    assert linked_texts(part.train).isdisjoint({"text 5", "text 6"})
    assert part.num_dropped == 400 - len(part.train[0])


def test_hard_negative_may_be_on_both_sides():
    found = rows(*(f"anchor {n}/positive {n}/same negative" for n in range(50)))
    assert split(found).num_dropped == 0


@pytest.mark.parametrize("max_rows", [1, 20, 60, 100])
def test_limit_chooses_rows_of_all_sources_by_content_and_keeps_their_order(max_rows):
    parts = {s: rows(*(f"a {s} {n}/b" for n in range(30)))[0] for s in range(2)}
    found = limited(parts, max_rows)
    together = [row for part in found.values() for row in part]
    assert len(together) == min(max_rows, 60)
    backwards = limited({s: part[::-1] for s, part in parts.items()}, max_rows)
    assert {s: part[::-1] for s, part in backwards.items()} == found
    assert all(part == [row for row in parts[s] if row in part] for s, part in found.items())
