import json
import threading
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, normalizers

from spectral_lightning.data import BOS
from spectral_lightning.data.preparation import TextSettings, prepare_text
from spectral_lightning.data.sources import open_sources

SETTINGS = TextSettings(vocab_size=300, valid_fraction=0.2)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path):
    def written(name, *documents):
        path = tmp_path / name
        path.write_text("\n\n\n".join(documents))
        return str(path)

    return written


def texts(prepared, split):
    """The documents of a split, read back from its tokens."""
    shard, tokenizer = prepared.shards[split], prepared.tokenizer
    text = tokenizer.decode(shard.read(0, len(shard)).tolist(), skip_special_tokens=False)
    return text.split(BOS)[1:]


def test_every_document_lands_in_one_split_unchanged(text_file, cache):
    prepared = prepare_text(open_sources(str(text_file)), SETTINGS, cache)
    written = text_file.read_text().strip().split("\n\n\n")
    train, valid = texts(prepared, "train"), texts(prepared, "valid")
    assert sorted(train + valid) == sorted(written)
    assert len(valid) > 0
    info = prepared.shards["train"].info
    assert (info.num_documents, info.num_bytes) == (len(train), sum(map(len, train)))
    shard = prepared.shards["train"]
    assert prepared.token_bytes[shard.read(0, len(shard))].sum() == info.num_bytes


def test_copies_of_a_document_never_stand_on_both_sides(write, cache):
    documents = [f"document number {number}" for number in range(40)]
    copies = [f"  {document} \n" for document in documents]
    source = open_sources(write("a.txt", *documents, *copies))
    prepared = prepare_text(source, replace(SETTINGS, vocab_size=260), cache)
    train, valid = ({text.strip() for text in texts(prepared, s)} for s in ("train", "valid"))
    assert train.isdisjoint(valid)
    assert train | valid == set(documents)


def test_document_keeps_its_side_when_others_are_added(write, cache):
    documents = [f"document number {number}" for number in range(40)]
    settings = replace(SETTINGS, vocab_size=260)
    few = prepare_text(open_sources(write("few.txt", *documents[:20])), settings, cache)
    all_ = prepare_text(open_sources(write("all.txt", *documents)), settings, cache)
    assert set(texts(few, "valid")) <= set(texts(all_, "valid"))


def test_training_leaves_out_what_stands_in_the_evaluation_text(write, cache):
    sources = replace(
        open_sources(write("train.txt", "only here", "also there", "and here")),
        valid=open_sources(write("valid.txt", "also  there", "only there")).train,
        test=open_sources(write("test.txt", "for the test")).train,
    )
    with pytest.warns(UserWarning, match="1 of 3 documents of .*train.txt also stand in the eval"):
        prepared = prepare_text(sources, replace(SETTINGS, vocab_size=258), cache)
    assert texts(prepared, "train") == ["only here", "and here"]
    assert texts(prepared, "valid") == ["also  there", "only there"]
    assert texts(prepared, "test") == ["for the test"]


def test_tokenizer_learns_from_training_documents_only(write, cache):
    sources = replace(
        open_sources(write("train.txt", "aaaa bbbb")),
        valid=open_sources(write("valid.txt", "zzzz zzzz")).train,
    )
    tokenizer = prepare_text(sources, replace(SETTINGS, vocab_size=259), cache).tokenizer
    assert not any("zz" in token for token in tokenizer.get_vocab())


def test_same_text_is_tokenized_once(text_file, cache, monkeypatch):
    first = prepare_text(open_sources(str(text_file)), SETTINGS, cache)
    monkeypatch.setattr(
        "spectral_lightning.data.preparation.train_tokenizer", lambda *_: pytest.fail("trained")
    )
    second = prepare_text(open_sources(str(text_file)), SETTINGS, cache)
    assert second.folder == first.folder
    assert second.tokenizer.to_str() == first.tokenizer.to_str()


def test_other_text_or_settings_get_their_own_folder(text_file, cache):
    folders = {prepare_text(open_sources(str(text_file)), SETTINGS, cache).folder}
    for change in ({"vocab_size": 301}, {"valid_fraction": 0.3}):
        settings = replace(SETTINGS, **change)
        folders.add(prepare_text(open_sources(str(text_file)), settings, cache).folder)
    text_file.write_text(text_file.read_text() + "more")
    folders.add(prepare_text(open_sources(str(text_file)), SETTINGS, cache).folder)
    assert len(folders) == 4
    assert set(cache.iterdir()) == folders


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("train.bin", cut, r"train\.bin has \d+ bytes instead of \d+"),
        ("valid.bin", flip, r"valid\.bin does not match its checksum"),
        ("valid.bin", lambda path: path.unlink(), r"valid\.bin is missing"),
        ("tokenizer.json", flip, r"tokenizer\.json does not match its checksum"),
        ("index.json", cut, "cannot be read"),
        ("index.json", lambda path: path.write_text("{}"), "cannot be read"),
    ],
)
def test_damaged_cache_is_reported_and_built_again(text_file, cache, name, damage, reason):
    first = prepare_text(open_sources(str(text_file)), SETTINGS, cache)
    content = (first.folder / "train.bin").read_bytes()
    damage(first.folder / name)
    with pytest.warns(UserWarning, match=f"The token cache is built again: .*{reason}"):
        second = prepare_text(open_sources(str(text_file)), SETTINGS, cache)
    assert (second.folder / "train.bin").read_bytes() == content
    assert list(cache.iterdir()) == [second.folder]
    prepare_text(open_sources(str(text_file)), SETTINGS, cache)


def test_processes_that_build_the_same_text_do_not_disturb_each_other(text_file, cache):
    results = []
    barrier = threading.Barrier(4)

    def build():
        barrier.wait()
        results.append(prepare_text(open_sources(str(text_file)), SETTINGS, cache).folder)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert list(cache.iterdir()) == list(set(results))


def test_failure_leaves_nothing_in_the_cache(text_file, cache):
    with pytest.raises(ValueError, match="`vocab_size` must be at most"):
        prepare_text(open_sources(str(text_file)), replace(SETTINGS, vocab_size=60_000), cache)
    assert list(cache.iterdir()) == []


def test_cache_that_cannot_be_written_is_refused(text_file, cache):
    cache.write_text("a file")
    with pytest.raises(ValueError, match="`cache_dir` must be a folder that can be written, got"):
        prepare_text(open_sources(str(text_file)), SETTINGS, cache)


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_empty_text_is_refused(write, cache, content):
    empty, full = open_sources(write("a.txt", content)), open_sources(write("b.txt", "text"))
    with pytest.raises(ValueError, match=r"`source` must hold text, but .*a\.txt is empty\."):
        prepare_text(empty, SETTINGS, cache)
    for name in ("valid", "test"):
        sources = replace(full, **{name: empty.train})
        with pytest.raises(ValueError, match=rf"`{name}_source` must hold text, but .*a\.txt is e"):
            prepare_text(sources, SETTINGS, cache)


def test_split_that_would_be_empty_is_refused(write, cache):
    source = open_sources(write("a.txt", "one", "two", "three"))
    with pytest.raises(ValueError, match=r"must hold one out of the 3 documents of .*, got 1e-09"):
        prepare_text(source, replace(SETTINGS, valid_fraction=1e-9), cache)
    with pytest.raises(ValueError, match=r"must leave one to train on of the 3 .* which takes 3"):
        prepare_text(source, replace(SETTINGS, valid_fraction=1 - 1e-9), cache)
    with pytest.raises(ValueError, match=r"that is not in the evaluation text, but all 3 docu"):
        prepare_text(replace(source, valid=source.train), SETTINGS, cache)


def test_tokenizer_that_changes_the_text_is_refused(text_file, cache):
    made = prepare_text(open_sources(str(text_file)), SETTINGS, cache).tokenizer
    made.normalizer = normalizers.Strip()
    settings = replace(SETTINGS, tokenizer=made.to_str())
    text_file.write_text(text_file.read_text().replace("Note", "  Note"))
    with pytest.raises(ValueError, match="`tokenizer` must keep every byte of the text, but it tu"):
        prepare_text(open_sources(str(text_file)), settings, cache)


def test_given_tokenizer_is_used_as_it_is(text_file, cache, write):
    made = prepare_text(open_sources(str(text_file)), SETTINGS, cache).tokenizer
    other = open_sources(write("b.txt", *(f"other text {number}" for number in range(20))))
    settings = replace(SETTINGS, tokenizer=made.to_str())
    assert prepare_text(other, settings, cache).tokenizer.to_str() == made.to_str()


def test_index_records_the_text_and_the_python(text_file, cache):
    folder = prepare_text(open_sources(str(text_file)), SETTINGS, cache).folder
    index = json.loads((folder / "index.json").read_text())
    assert index["sources"] == [str(text_file), None, None]
    assert "3." in index["python"]
    assert isinstance(Tokenizer.from_file(str(folder / "tokenizer.json")), Tokenizer)
