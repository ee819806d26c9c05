import csv
import gzip
import json
import lzma

import datasets
import pytest

from spectral_lightning.data.instruction_formats import read_dialogue
from spectral_lightning.data.instruction_records import open_records

RECORDS = [{"prompt": f"question {n}", "completion": f"é {n}\nend"} for n in range(3)]
LINES = "\n".join(map(json.dumps, RECORDS)) + "\n\n"


def write_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, RECORDS[0].keys())
        writer.writeheader()
        writer.writerows(RECORDS)


WRITERS = {
    "a.jsonl": lambda path: path.write_text(LINES),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES.encode())),
    "a.json": lambda path: path.write_text("\n" + json.dumps(RECORDS, indent=1)),
    "lines.json": lambda path: path.write_text(LINES),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(RECORDS).encode())),
    "a.csv": write_csv,
    "A.PARQUET": lambda path: datasets.Dataset.from_list(RECORDS).to_parquet(path),
    "saved": lambda path: datasets.Dataset.from_list(RECORDS).save_to_disk(path),
}


def prompts(source):
    return [read_dialogue(document).prompt for document in source.documents()]


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_holds_the_same_records(tmp_path, name):
    WRITERS[name](tmp_path / name)
    source = open_records(str(tmp_path / name), "auto").train
    dialogues = list(map(read_dialogue, source.documents()))
    assert [{"prompt": d.prompt, "completion": d.answer} for d in dialogues] == RECORDS


def test_splits_of_a_dataset_are_used(tmp_path):
    parts = {
        split: datasets.Dataset.from_dict({"prompt": [split], "completion": ["x"]})
        for split in ("train", "validation", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    sources = open_records(str(tmp_path / "saved"), "auto")
    found = (sources.train, sources.valid, sources.test)
    assert [prompts(source) for source in found] == [["train"], ["validation"], ["test"]]


def test_fingerprint_follows_the_dialogues(tmp_path):
    def fingerprint(records, format="auto"):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(records))
        return open_records(str(path), format).train.fingerprint()

    assert fingerprint(RECORDS) == fingerprint([r | {"id": 1} for r in RECORDS], "text-pairs")
    assert fingerprint(RECORDS) != fingerprint(RECORDS[:2])


def test_hub_dataset_is_loaded_by_name_and_offline_advice_is_given(monkeypatch):
    def load_dataset(name, config):
        assert (name, config) == ("owner/name", "main")
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr("datasets.load.load_dataset", load_dataset)
    message = r"got owner/name \(Couldn't reach .*\)\. Without a network, give the folder where"
    with pytest.raises(ValueError, match=message):
        open_records("owner/name", "auto", config_name="main")


@pytest.mark.parametrize("name", ["./missing.jsonl", "missing.csv", "notes.txt", "folder"])
def test_path_that_is_no_data_is_named_with_its_argument(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=f"`valid_source` must be an existing .* {name}"):
        open_records(name, "auto", argument="valid_source")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a", "answer": "b"}\n{', "but line 2 of .*a.jsonl does not"),
        ("a.json", b'[{"prompt": ', "one array of objects .* but .*a.json does not"),
        ("a.jsonl", b"\xff{}", "must be UTF-8, but .*a.jsonl is not"),
        ("a.jsonl.xz", b"no", "a.jsonl.xz is damaged"),
        ("a.parquet", b"no", "a.parquet is damaged"),
        ("a.jsonl", b'{"prompt": "a"}', r"record 1 of .*a.jsonl has \['prompt'\]"),
    ],
)
def test_damaged_file_is_refused_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(open_records(str(tmp_path / name), "auto").train.documents())
