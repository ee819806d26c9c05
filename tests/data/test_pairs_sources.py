import gzip
import json
import lzma
import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from spectral_lightning.data import PairsSource, nli_triplets
from spectral_lightning.data.pairs_sources import as_source
from tests.data.pairs_cases import pairs, triplets, write_json_lines


def texts(source):
    return [row.texts for row in as_source(source).rows()]


def scores(source):
    return [row.score for row in as_source(source).rows()]


@pytest.fixture
def make_file(tmp_path):
    def make(name, content):
        path = tmp_path / name
        packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        path.write_bytes(packed(content.encode()))
        return str(path)

    return make


ROWS = [("a", "b, c"), ('say "x"', "d")]
CONTENTS = {
    "csv": 'query,answer\na,"b, c"\n"say ""x""",d\n',
    "tsv": 'query\tanswer\na\tb, c\n\nsay "x"\td\n',
    "json": json.dumps([{"query": q, "answer": a} for q, a in ROWS]),
    "jsonl": "".join(json.dumps({"query": q, "answer": a}) + "\n\n" for q, a in ROWS),
}


@pytest.mark.parametrize("packing", ["", ".gz", ".xz"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_same_pairs_are_read_from_every_kind_of_file(make_file, kind, packing):
    assert texts(make_file(f"a.{kind}{packing}", CONTENTS[kind])) == ROWS


def test_pairs_are_read_from_parquet_and_saved_datasets(tmp_path):
    dataset = Dataset.from_list([{"query": q, "answer": a} for q, a in ROWS])
    dataset.to_parquet(tmp_path / "folder" / "a.parquet")
    DatasetDict(train=dataset, dev=dataset.select([1])).save_to_disk(tmp_path / "saved")
    assert texts(str(tmp_path / "folder" / "a.parquet")) == ROWS
    assert texts(str(tmp_path / "folder")) == ROWS
    assert texts(str(tmp_path / "saved")) == ROWS
    assert texts(PairsSource(path=str(tmp_path / "saved"), split="dev")) == ROWS[1:]
    with pytest.raises(ValueError, match=r"`split` must be a split of .* one of \['train', 'dev'"):
        texts(PairsSource(path=str(tmp_path / "saved"), split="test"))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (("a", "b"), ("a", "b")),
        (("a", "b", "c", "d"), ("a", "b", "c", "d")),
        ({"sentence1": " a ", "sentence2": "b\n"}, ("a", "b")),
        ({"question": "a", "passage": "b", "negatives": ["c", "d"]}, ("a", "b", "c", "d")),
        ({"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": "d"}, tuple("abcd")),
        ({"premise": "a", "hypothesis": "b"}, ("a", "b")),
    ],
)
def test_columns_are_found_by_their_names(record, expected):
    assert texts(PairsSource(records=[record])) == [expected]


def test_named_columns_come_before_the_conventional_ones():
    record = {"title": "a", "question": "b", "words": "c", "wrong": "d"}
    columns = {"anchor": "title", "positive": "words", "negative": ["wrong"]}
    assert texts(PairsSource(records=[record], columns=columns)) == [("a", "c", "d")]


def test_kind_pairs_leaves_negatives_and_scores_alone():
    record = {"anchor": "a", "positive": "b", "negative": "c", "score": 0.3}
    assert list(PairsSource(records=[record], kind="pairs").rows()) == [(("a", "b"), None)]


@pytest.mark.parametrize(
    ("given", "score_range", "expected"),
    [
        ([0.0, 0.25, 1.0], None, [0.0, 0.25, 1.0]),
        ([0.0, 2.5, 5.0], None, [0.0, 0.5, 1.0]),
        ([0.5, 1.0], (0.0, 2.0), [0.25, 0.5]),
        ([-1.0, 0.0, 1.0], (-1.0, 1.0), [0.0, 0.5, 1.0]),
    ],
)
def test_scores_are_scaled_to_one(given, score_range, expected):
    records = [("a", "b", score) for score in given]
    assert scores(PairsSource(records=records, score_range=score_range)) == expected


def test_three_cells_without_a_header_are_a_scored_pair(make_file):
    content = "a,b,5.0\nc,d,2.5\n"
    assert scores(make_file("sts.csv", content)) == [1.0, 0.5]
    assert scores(make_file("sts.tsv", content.replace(",", "\t"))) == [1.0, 0.5]
    assert scores(make_file("head.csv", "sentence1,sentence2,score\n" + content)) == [1.0, 0.5]


def test_inference_rows_become_triplets_of_one_premise(make_file):
    rows = [
        ("p", "e1", "entailment"),
        ("p", "c1", "contradiction"),
        ("p", "n", "neutral"),
        ("q", "e", "entailment"),
        ("p", "e2", 0),
        ("p", "x", "-"),
        ("p", "e3", 0),
        ("p", "c2", 2),
        ("r", "c", 2),
    ]
    expected = [("p", "e1", "c1"), ("p", "e2", "c2"), ("p", "e3", "c1")]
    assert list(nli_triplets(rows)) == expected
    lines = "".join(f"{label}\t{premise}\t{text}\n" for premise, text, label in rows)
    assert texts(make_file("nli.tsv", f"label\tpremise\thypothesis\n{lines}")) == expected
    with pytest.raises(ValueError, match=r"label must be entailment, .* got 'maybe'"):
        list(nli_triplets([("p", "h", "maybe")]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "query,answer\na,b\nc\n", "line 3 of .*a.csv has no 'answer'"),
        ("a.csv", 'query,answer\n"a\nb",c\nd\n', "line 4 of .*a.csv has no 'answer'"),
        ("a.tsv", "query\tanswer\na\tb\tc\n", "line 2 of .*a.tsv has 3 cells. Take the tab"),
        ("a.csv", "words,gloss\na,b\n", r"column for the anchor .* \['words', 'gloss'\]"),
        (
            "a.jsonl",
            '{"anchor": "a", "positive": "b", "negative": "c"}\n{"anchor": "a", "positive": "b"}\n',
            "must have the field 'negative', but line 2 of .*a.jsonl has none",
        ),
        (
            "a.jsonl",
            '{"anchor": "a", "positive": null}\n',
            "the field 'positive', but line 1 of .*a.jsonl has none",
        ),
        (
            "a.jsonl",
            '{"anchor": "a", "positive": 3}\n',
            "'positive' must be a text, but in line 1 of .*a.jsonl it is int",
        ),
        (
            "a.jsonl",
            '{"anchor": "a", "positive": "\\ud800"}\n',
            "'positive' of line 1 of .* half a surrogate pair",
        ),
        ("a.jsonl", '{"anchor": "a"\n', "but line 1 of .*a.jsonl does not"),
        ("a.jsonl", "3\n", "must hold objects, but line 1 of .*a.jsonl is int"),
        (
            "a.jsonl",
            '{"anchor": "a", "positive": "b", "neg": ["c"]}\n'
            '{"anchor": "a", "positive": "b", "neg": []}\n',
            "must have 1 hard negatives .* but line 2 of .* has 0",
        ),
        ("a.csv", "a,b,5\nc,d,high\n", "'score' must be a finite number, but in line 2 of"),
        ("a.csv", "a,b,1\nc,d,70\n", "`score_range` must be given .* are in 1 to 70"),
        (
            "a.csv",
            "premise,hypothesis,label\na,b,yes\n",
            "'label' must be one of entailment, .* but in line 2 of .* it is 'yes'",
        ),
        ("a.csv", "anchor,positive\n", "must hold pairs, but .*a.csv is empty"),
    ],
)
def test_malformed_record_is_named_with_file_line_and_field(make_file, name, content, message):
    with pytest.raises(ValueError, match=message):
        texts(make_file(name, content))


def test_damaged_file_is_named(tmp_path):
    for name, content, message in [
        ("a.csv.xz", b"no xz", "The file .*a.csv.xz is damaged"),
        ("a.csv", b"anchor,positive\n\xff,b\n", "must be UTF-8, but .*a.csv is not"),
        ("a.parquet", b"no parquet", "The file .*a.parquet is damaged"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            texts(str(tmp_path / name))


def test_score_outside_the_given_range_is_named_with_its_place():
    source = PairsSource(records=[("a", "b", 1), ("a", "c", 3)], score_range=(0.0, 2.0))
    with pytest.raises(ValueError, match=r"\(0.0, 2.0\), but in record 1 of `records` it is 3"):
        texts(source)


def test_record_in_memory_must_have_two_texts():
    with pytest.raises(ValueError, match="two or more texts, but record 1 of `records` is 'b'"):
        texts(PairsSource(records=[("a", "b"), "b"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"exactly one of `path`, `name` and `records`, got \[\]"),
        ({"path": "a.csv", "name": "a"}, r"exactly one of .*, got \['path', 'name'\]"),
        ({"path": "a.csv", "kind": "csv"}, "`kind` must be one of .* got 'csv'"),
        ({"path": "a.csv", "columns": {"query": "q"}}, r"keys of `columns` .* got \['query'\]"),
        ({"path": "a.csv", "weight": 0.0}, "`weight` must be positive, got 0.0"),
        ({"path": "a.csv", "score_range": (5.0, 0.0)}, "`score_range` must be a smaller"),
    ],
)
def test_setting_outside_its_range_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        PairsSource(**settings)


def test_column_that_does_not_exist_is_named():
    source = PairsSource(records=pairs(2), columns={"positive": "answer"})
    with pytest.raises(ValueError, match=r"`columns` must name columns of .* got 'answer' as posi"):
        texts(source)


@pytest.mark.parametrize("name", ["missing.tsv", "./missing", "/a/b/c", "notes.txt"])
def test_missing_file_is_not_taken_for_a_dataset(name):
    with pytest.raises(FileNotFoundError, match=f"must be an existing file .* got {name}"):
        as_source(name)


def test_name_of_a_dataset_without_network_is_answered_with_advice(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr("datasets.load.load_dataset", load_dataset)
    message = r"got owner/data \[train\] \(Couldn't reach the Hub\)\. Without a network, give the"
    with pytest.raises(ValueError, match=message):
        texts("owner/data")


def test_fingerprint_follows_the_rows_and_what_they_mean(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", triplets(3))
    first = as_source(path).fingerprint()
    assert as_source(write_json_lines(tmp_path / "b.jsonl", triplets(3))).fingerprint() == first
    assert PairsSource(path=path, kind="pairs").fingerprint() != first
    assert PairsSource(records=triplets(3)).fingerprint() != first
    assert as_source(write_json_lines(tmp_path / "a.jsonl", triplets(4))).fingerprint() != first


@pytest.mark.skipif(
    "SPECTRAL_DATA" not in os.environ, reason="SPECTRAL_DATA does not name a folder with pairs"
)
def test_real_files_are_read_in_full():
    folder = Path(os.environ["SPECTRAL_DATA"])
    found = texts(str(folder / "pairs" / "nli-dev.tsv.xz"))
    assert {len(row) for row in found} == {3}
    assert len({row[0] for row in found}) == 5_875  # premises with both kinds of hypotheses
    columns = {"anchor": "words", "positive": "definition"}
    glosses = PairsSource(path=str(folder / "pairs" / "wordnet-glosses.tsv.xz"), columns=columns)
    assert len(texts(glosses)) == 117_659
    columns = {"anchor": "sentence", "positive": "two_sentences"}
    splits = PairsSource(path=str(folder / "pairs" / "wikisplit.tsv.xz"), columns=columns)
    assert len(texts(splits)) == 15_000
    found = scores(str(folder / "sts" / "stsb-en-dev.csv.xz"))
    assert (len(found), min(found), max(found)) == (1_500, 0.0, 1.0)
