import pytest

from spectral_lightning.data import PairsSource
from spectral_lightning.data.pairs_sources import as_source
from tests.data.pairs_cases import write_json_lines

PAIR = {"anchor": "a", "positive": "b"}
TRIPLET = {**PAIR, "negative": "c"}
SNLI = [("p", "e", "entailment"), ("p", "n", "neutral"), ("p", "c", "contradiction")]


def texts(source):
    return [row.texts for row in as_source(source).rows()]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("gold_label", SNLI),
        ("gold_label", [("q", "x", "-"), *SNLI]),
        ("gold_label", [("p", "e", 0), ("p", "c", 2)]),
        ("label", SNLI),
        ("label", [("p", "e", " Entailment"), ("p", "c", "CONTRADICTION")]),
        ("label", [("q", "x", "-"), *SNLI]),
    ],
)
def test_original_columns_of_inference_are_no_pairs(name, rows):
    records = [{"sentence1": a, "sentence2": b, name: label} for a, b, label in rows]
    assert texts(PairsSource(records=records)) == [("p", "e", "c")]


def test_original_snli_file_is_read_by_its_gold_label(tmp_path):
    head = "gold_label\tsentence1_parse\tsentence1\tsentence2\tpairID\tlabel1\n"
    lines = "".join(f"{label}\t(P)\t{a}\t{b}\t7\t{label}\n" for a, b, label in SNLI)
    path = tmp_path / "snli.tsv"
    path.write_text(head + lines)
    assert texts(str(path)) == [("p", "e", "c")]


def test_gold_label_goes_before_label():
    records = [
        {"sentence1": a, "sentence2": b, "label": 1, "gold_label": label} for a, b, label in SNLI
    ]
    assert texts(PairsSource(records=records)) == [("p", "e", "c")]


def test_number_beside_two_sentences_is_a_score():
    records = [{"sentence1": "a", "sentence2": "b", "label": n} for n in (0, "1", 2)]
    assert [row.score for row in PairsSource(records=records).rows()] == [0.0, 0.2, 0.4]
    assert texts(PairsSource(records=records, kind="nli")) == [("a", "b", "b")]


@pytest.mark.parametrize(
    ("more", "expected"),
    [({"score": 0.5}, (("a", "b"), 0.5)), ({"negative": "c"}, (("a", "b", "c"), None))],
)
def test_score_and_negatives_beside_two_sentences_go_before_a_label(more, expected):
    record = {"sentence1": "a", "sentence2": "b", "gold_label": "entailment", **more}
    assert list(PairsSource(records=[record]).rows()) == [expected]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [({"score": "match"}, (("a", "b"), 1.0)), ({"negative": "wrong"}, (("a", "b", "c"), None))],
)
def test_named_score_or_negative_goes_before_a_label(columns, expected):
    record = {"premise": "a", "hypothesis": "b", "label": 0, "match": 1, "wrong": "c"}
    assert list(PairsSource(records=[record], columns=columns).rows()) == [expected]


@pytest.mark.parametrize(
    ("first", "more", "remedy"),
    [
        (PAIR, {"negative": "c"}, "`kind='pairs'`"),
        (PAIR, {"negatives": ["c"]}, "`kind='pairs'`"),
        (PAIR, {"negative_1": "c"}, "`kind='pairs'`"),
        (PAIR, {"score": 0.5}, "`kind='pairs'`"),
        ({"sentence1": "a", "sentence2": "b"}, {"gold_label": "neutral"}, "`kind='pairs'`"),
        (TRIPLET, {"score": 0.5}, "`kind='triplets'`"),
        ({**PAIR, "score": 0.5}, {"negative": "c"}, "`kind='scored'`"),
        (
            {"premise": "a", "hypothesis": "b", "label": 0},
            {"negative": "c"},
            "`kind='nli'`",
        ),
        (
            {**PAIR, "negative_1": "c"},
            {"negative_2": "d"},
            r"`columns=\{'negative': \['negative_1'\]\}`",
        ),
    ],
)
def test_column_that_only_a_later_record_has_is_refused(tmp_path, first, more, remedy):
    path = write_json_lines(tmp_path / "a.jsonl", [first, {**first, **more}])
    message = rf"line 2 of .*a.jsonl has '{next(iter(more))}', which .* unused by {remedy}\.$"
    with pytest.raises(ValueError, match=message):
        texts(path)


def test_tuple_with_more_texts_than_the_first_is_refused():
    with pytest.raises(ValueError, match="record 1 of `records` has 'negative_1', which the first"):
        texts(PairsSource(records=[("a", "b"), ("a", "b", "c")]))


def test_column_that_all_triplets_must_have_is_refused_in_a_later_record():
    records = [{**PAIR, "negative_1": "c"}, {**PAIR, "negative_1": "c", "negative_2": "d"}]
    with pytest.raises(ValueError, match="record 1 of `records` has 'negative_2'"):
        texts(PairsSource(records=records, kind="triplets"))


@pytest.mark.parametrize(
    ("settings", "records"),
    [
        ({"kind": "pairs"}, [PAIR, {**TRIPLET, "score": 0.5}]),
        ({}, [PAIR, {**PAIR, "negative": None, "source": "web"}]),
        ({}, [{**TRIPLET, "score": 0.5}, TRIPLET]),
        ({"kind": "triplets"}, [TRIPLET, {**TRIPLET, "score": 0.5}]),
        ({"columns": {"negative": "negative"}}, [TRIPLET, {**TRIPLET, "negative_2": "d"}]),
    ],
)
def test_column_that_no_record_lost_may_stand_in_some_alone(settings, records):
    assert len(set(texts(PairsSource(records=records, **settings)))) == 1
