import datasets
import pytest

from spectral_lightning.data.corpus import EmbeddedSource
from spectral_lightning.data.sources import open_sources


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl").write_text('{"text": "second"}\n')
    (tmp_path / "notes.md").write_text("not read")
    return tmp_path


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that is out of reach, as `datasets` reports it."""

    def load_dataset(name, config_name=None):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub (ConnectTimeout)\nmore")

    monkeypatch.setattr("datasets.load.load_dataset", load_dataset)


def documents(source, **settings):
    return list(open_sources(source, **settings).train.documents())


def test_nothing_named_is_the_embedded_corpus():
    assert isinstance(open_sources(None).train, EmbeddedSource)


def test_file_folder_pattern_and_list_name_files(folder):
    assert documents(str(folder / "a.txt")) == ["first"]
    assert documents(str(folder)) == ["first", "second"]
    assert documents(str(folder / "**" / "*.jsonl")) == ["second"]
    assert documents([str(folder / "sub"), str(folder / "a.txt")]) == ["second", "first"]
    assert "a.txt and 1 more" in open_sources(str(folder)).train.description


def test_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert documents("~/a.txt") == ["first"]


def test_fingerprint_depends_on_content_and_not_on_place(folder):
    def fingerprint(path, **settings):
        return open_sources(str(path), **settings).train.fingerprint()

    (folder / "copy.txt").write_text("first")
    before = fingerprint(folder / "a.txt")
    assert fingerprint(folder / "copy.txt") == before
    assert fingerprint(folder / "copy.txt", text_column="body") != before
    (folder / "copy.txt").write_text("First")
    assert fingerprint(folder / "copy.txt") != before


@pytest.mark.parametrize(
    "name", ["./missing", "/no/such/file", "~/missing", "missing.txt", "a.TXT.xz", "a/b/c", "a.csv"]
)
def test_what_looks_like_a_path_must_exist(name, no_hub):
    with pytest.raises(FileNotFoundError, match=f"`source` must be an existing path, got {name}"):
        open_sources(name)


def test_pattern_and_folder_must_hold_text(folder):
    (folder / "empty").mkdir()
    for name in ("empty", "*.log", "notes.md"):
        with pytest.raises(
            FileNotFoundError, match=r"`valid_source` must name files that end in \.txt, .* got"
        ):
            open_sources(str(folder / name), argument="valid_source")


def test_empty_list_is_refused():
    with pytest.raises(ValueError, match="`source` must name at least one file, got an empty list"):
        open_sources([])


def test_other_names_are_datasets_of_the_hub(monkeypatch):
    calls = []

    def load_dataset(name, config_name=None):
        calls.append((name, config_name))
        split = datasets.Dataset.from_dict({"text": ["one", "", "two"]})
        return datasets.DatasetDict({"train": split, "validation": split.select([0])})

    monkeypatch.setattr("datasets.load.load_dataset", load_dataset)
    sources = open_sources("owner/name", config_name="raw")
    assert calls == [("owner/name", "raw")]
    assert list(sources.train.documents()) == ["one", "two"]
    assert list(sources.valid.documents()) == ["one"]
    assert sources.test is None
    assert sources.valid.description == "owner/name [validation]"


def test_dataset_that_cannot_be_reached_is_one_sentence(no_hub):
    with pytest.raises(
        ValueError, match=r"`source` must be .* got owner/name \(Couldn't"
    ) as caught:
        open_sources("owner/name")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_saved_dataset_is_read_from_its_folder(tmp_path):
    splits = {
        name: datasets.Dataset.from_dict({"text": [f"{name} text"]})
        for name in ("train", "validation", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "all")
    splits["train"].save_to_disk(tmp_path / "one")
    sources = open_sources(str(tmp_path / "all"))
    texts = [list(source.documents()) for source in (sources.train, sources.valid, sources.test)]
    assert texts == [["train text"], ["validation text"], ["test text"]]
    assert open_sources(str(tmp_path / "one")).valid is None
    assert documents(str(tmp_path / "one")) == ["train text"]
    assert sources.train.fingerprint() != sources.valid.fingerprint()


def test_folder_of_parquet_files_is_a_dataset_with_splits(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("train", "validation"):
        dataset = datasets.Dataset.from_dict({"text": [f"{name} text"]})
        dataset.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    sources = open_sources(str(folder))
    assert list(sources.train.documents()) == ["train text"]
    assert list(sources.valid.documents()) == ["validation text"]


def test_dataset_without_train_split_or_text_is_refused(tmp_path):
    split = datasets.Dataset.from_dict({"body": ["one"], "id": [1]})
    datasets.DatasetDict({"dev": split}).save_to_disk(tmp_path / "dev")
    split.save_to_disk(tmp_path / "body")
    with pytest.raises(ValueError, match=r"must be a dataset with a split 'train', .* \['dev'\]"):
        open_sources(str(tmp_path / "dev"))
    with pytest.raises(ValueError, match=r"`text_column` must be a column of .*'id'\], got text"):
        open_sources(str(tmp_path / "body"))
    with pytest.raises(ValueError, match="must name a column of strings, but 'id' holds int"):
        documents(str(tmp_path / "body"), text_column="id")


def test_damaged_dataset_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="dataset that can be loaded, got"):
        open_sources(str(tmp_path / "one"))
