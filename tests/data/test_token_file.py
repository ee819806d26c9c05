"""Ids of the tokens of a file: their order, their parts, and what is kept of them."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from spectral_lightning.cli.main import SpectralCLI
from spectral_lightning.data import TokenFileDataModule
from spectral_lightning.data.windows import IGNORED
from tests.data.token_file_cases import RHYME, WORDS, ids


def test_word_ids_are_ranks_in_sorted_order(make_words):
    data = make_words("b a c b <unk> a Z\n b\tc a", valid_fraction=0.3, sequence_len=2)
    assert data.tokenizer.get_vocab() == {"<unk>": 0, "Z": 1, "a": 2, "b": 3, "c": 4}
    assert ids(data, "train") == [3, 2, 4, 3, 0, 2, 1]
    assert ids(data, "valid") == [3, 4, 2]
    assert data.decode([3, 0, 1]) == "b <unk> Z"


def test_vocabulary_has_no_word_of_the_validation_text_alone(make_words):
    data = make_words()
    train, valid = WORDS[:78], WORDS[78:]
    assert set(data.tokenizer.get_vocab()) == set(train)  # <unk> is a word of the text: one id
    assert data.vocab_size == len(set(train))
    assert data.decode(ids(data, "train")) == " ".join(train)
    known = [word if word in set(train) else "<unk>" for word in valid]
    assert data.decode(ids(data, "valid")) == " ".join(known)
    assert known.count("<unk>") == valid.count("<unk>") + 4  # "owl" and "a", twice


def test_unk_is_added_where_the_text_has_none(make_words):
    data = make_words("a b c a b c d", sequence_len=1, valid_fraction=0.3)
    assert sorted(data.tokenizer.get_vocab()) == ["<unk>", "a", "b", "c"]
    assert data.decode(ids(data, "valid")) == "b c <unk>"


def test_whole_vocabulary_is_that_of_the_original(make_words):
    data = make_words(vocabulary="all")
    stoi = {word: rank for rank, word in enumerate(sorted(set(WORDS)))}
    assert data.tokenizer.get_vocab() == stoi
    assert ids(data, "train") + ids(data, "valid") == [stoi[word] for word in WORDS]


@pytest.mark.parametrize("num_words", [18, 19, 24, 25, 26, 60])
def test_every_word_of_both_parts_is_reached_and_none_crosses_over(make_words, num_words):
    text = " ".join(f"w{number:02}" for number in range(num_words))
    data = make_words(text, vocabulary="all", valid_fraction=0.5)
    num_train = num_words // 2
    seen = torch.cat([batch.flatten() for batch in data.train_dataloader()])
    assert set(seen.tolist()) == set(range(num_train))
    held_out = torch.cat([batch[:, 1:].flatten() for batch in data.val_dataloader()])
    assert held_out[held_out != IGNORED].tolist() == list(range(num_train + 1, num_words))


def test_named_validation_text_replaces_the_held_out_part(make_words, tmp_path):
    with gzip.open(tmp_path / "valid.tokens.gz", "wt") as file:
        file.write("the owl saw the dog and the cat and the dog")
    data = make_words(valid_source=str(tmp_path / "valid.tokens.gz"))
    assert data.decode(ids(data, "train")) == " ".join(WORDS)
    assert data.decode(ids(data, "valid")).startswith("the owl saw the dog and the cat")
    assert [batch.tolist() for batch in data.test_dataloader()] == [
        batch.tolist() for batch in data.val_dataloader()
    ]


@pytest.mark.parametrize(
    ("text", "settings", "unit", "train", "valid"),
    [
        ("4 0 2 4 1 7\n0 3", {}, "int", [4, 0, 2, 4], [1, 7, 0, 3]),
        ("d a c d b d a c", {"vocabulary": "all"}, "word", [3, 0, 2, 3], [1, 3, 0, 2]),
        ("dacdbdac", {"vocabulary": "all"}, "char", [3, 0, 2, 3], [1, 3, 0, 2]),
        ("4 0 2 4", {"unit": "char"}, "char", [2, 0, 1], [0, 3, 0, 2]),
        ("4 0 2 4 1 7 0 3", {"unit": "word"}, "word", [2, 0, 1, 2], [3, 3, 0, 3]),
    ],
    ids=["int", "word", "char", "asked-for-char", "asked-for-word"],
)
def test_unit_is_detected_or_asked_for(make_words, text, settings, unit, train, valid):
    data = make_words(text, sequence_len=2, valid_fraction=0.5, **settings)
    cached = json.loads((data.cache_dir / "tokens" / data.folder / "index.json").read_text())
    assert cached["unit"] == unit
    assert ids(data, "train") == train
    assert ids(data, "valid") == valid


def test_vocabulary_of_integers_ends_with_the_largest(make_words):
    data = make_words("4 0 2 4 1 7 0 30", sequence_len=2, valid_fraction=0.5)
    assert data.vocab_size == 31
    assert data.decode([30, 5]) == "30 5"
    assert data.token_bytes is None


def test_data_are_the_same_when_loaded_again(make_words, monkeypatch):
    first = make_words()
    monkeypatch.setattr(
        "spectral_lightning.data.token_preparation.read_types", lambda *_: pytest.fail("read")
    )
    second = make_words()
    assert second.tokenizer.to_str() == first.tokenizer.to_str()
    for split in ("train", "valid"):
        assert ids(second, split) == ids(first, split)
    batches = [batch.tolist() for batch in first.train_dataloader()]
    assert [batch.tolist() for batch in second.train_dataloader()] == batches
    assert [batch.tolist() for batch in make_words(seed=1).train_dataloader()] != batches


def test_vocabulary_stands_as_json_beside_the_ids(make_words):
    data = make_words()
    folder = data.cache_dir / "tokens" / data.folder
    assert {path.name for path in folder.iterdir()} >= {"train.bin", "valid.bin", "index.json"}
    saved = Tokenizer.from_file(str(folder / "vocabulary.json"))
    assert saved.get_vocab() == data.tokenizer.get_vocab()


def test_other_text_or_settings_get_their_own_ids(make_words, tmp_path):
    folders = {make_words().folder, make_words(name="copy.txt").folder}
    assert len(folders) == 1
    (tmp_path / "valid.txt").write_text(RHYME)
    for settings in (
        {"vocabulary": "all"},
        {"valid_fraction": 0.3},
        {"unit": "char"},
        {"text": RHYME + "more"},
        {"valid_source": str(tmp_path / "valid.txt")},
    ):
        folders.add(make_words(**settings).folder)
    assert len(folders) == 6


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
        ("vocabulary.json", flip, r"vocabulary\.json does not match its checksum"),
        ("index.json", cut, "cannot be read"),
        ("index.json", lambda path: path.write_text("{}"), "cannot be read"),
    ],
)
def test_damaged_cache_is_reported_and_built_again(make_words, name, damage, reason):
    first = make_words()
    whole = ids(first, "train")
    damage(first.cache_dir / "tokens" / first.folder / name)
    with pytest.warns(UserWarning, match=f"The token cache is built again: .*{reason}"):
        assert ids(make_words(), "train") == whole
    make_words()


def test_size_of_the_vocabulary_is_known_before_setup(make_words):
    data = make_words(ready=False)
    assert data.vocab_size == len(set(WORDS[:78]))
    assert data.decode([0]) == "<unk>"
    data.setup("fit")
    assert next(iter(data.train_dataloader())).shape == (2, 9)


def test_config_can_link_the_model_to_the_vocabulary(make_words):
    class Linked(SpectralCLI):
        def add_arguments_to_parser(self, parser):
            target = "model.init_args.model.init_args.vocab_size"
            parser.link_arguments("data.vocab_size", target, apply_on="instantiate")

    data = make_words(ready=False)
    cli = Linked(
        [
            *("--model=LanguageModeling", "--model.model=GPT", "--model.model.depth=1"),
            *("--model.model.sequence_len=8", "--data=TokenFileDataModule"),
            *(f"--data.source={data.source}", f"--data.cache_dir={data.cache_dir}"),
            *("--data.sequence_len=8", "--data.unit=word", "--data.valid_fraction=0.2"),
            *("--trainer.accelerator=cpu", "--trainer.logger=false", "--seed_everything=0"),
        ],
        run=False,
    )
    assert isinstance(cli.datamodule, TokenFileDataModule)
    assert cli.model.vocab_size == cli.datamodule.vocab_size == data.vocab_size


@pytest.mark.skipif(
    "SPECTRAL_DATA" not in os.environ, reason="SPECTRAL_DATA does not name a folder with WikiText-2"
)
def test_wikitext_is_numbered_and_cut_as_by_the_original(tmp_path):
    path = Path(os.environ["SPECTRAL_DATA"]) / "lm" / "wikitext-2.train.txt.xz"
    data = TokenFileDataModule(str(path), vocabulary="all", cache_dir=str(tmp_path))
    assert data.vocab_size == 33_277  # with <unk>; line ends are white space, so no <eos>
    data.prepare_data()
    data.setup("fit")
    assert (len(ids(data, "train")), len(ids(data, "valid"))) == (2_031_390, 20_520)
    honest = TokenFileDataModule(str(path), cache_dir=str(tmp_path))
    assert honest.vocab_size == 33_243  # the held-out end has 34 words of its own
    windows = data.train_dataloader().dataset
    assert windows[len(windows) - 1].tolist() == ids(data, "train")[-257:]
