import gzip
import json
import math
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from spectral_lightning.cli.main import SpectralCLI
from spectral_lightning.data import TokenFileDataModule
from spectral_lightning.data.windows import IGNORED
from spectral_lightning.models import GPT
from spectral_lightning.tasks import LanguageModeling, load_language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

RHYME = "the cat saw the dog and the dog saw <unk> cats\n" * 8 + "the owl saw a cat\n" * 2
WORDS = RHYME.split()  # 98 of them, the last 10 with three words of their own


@pytest.fixture(autouse=True)
def one_thread():
    """Models of a few numbers are slower with more threads, many times so on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def make_data(tmp_path):
    """A data module on a tiny text, by default 98 words of which 20 are held out."""

    def make(text=RHYME, *, ready=True, name="rhyme.txt", **settings):
        (tmp_path / name).write_text(text, encoding="utf-8")
        settings = {
            "sequence_len": 8,
            "batch_size": 2,
            "valid_fraction": 0.2,
            "cache_dir": str(tmp_path / "cache"),
        } | settings
        data = TokenFileDataModule(str(tmp_path / name), **settings)
        if ready:
            data.prepare_data()
            data.setup("fit")
        return data

    return make


@pytest.fixture
def make_trainer():
    def make(**settings):
        quiet = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "max_epochs": -1,
        }
        return pl.Trainer(**quiet | settings)

    return make


def make_task(data):
    torch.manual_seed(0)
    gpt = GPT(depth=1, head_dim=16, vocab_size=data.vocab_size, sequence_len=data.sequence_len)
    return LanguageModeling(gpt)


def ids(data, split):
    """All ids of one part."""
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    shard = loader.dataset.shard
    return shard.read(0, len(shard)).tolist()


class Plain(pl.LightningModule):
    """Knows nothing of vocabularies."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        pass


def test_word_ids_are_ranks_in_sorted_order(make_data):
    data = make_data("b a c b <unk> a Z\n b\tc a", valid_fraction=0.3, sequence_len=2)
    assert data.tokenizer.get_vocab() == {"<unk>": 0, "Z": 1, "a": 2, "b": 3, "c": 4}
    assert ids(data, "train") == [3, 2, 4, 3, 0, 2, 1]
    assert ids(data, "valid") == [3, 4, 2]
    assert data.decode([3, 0, 1]) == "b <unk> Z"


def test_vocabulary_has_no_word_of_the_validation_text_alone(make_data):
    data = make_data()
    train, valid = WORDS[:78], WORDS[78:]
    assert set(data.tokenizer.get_vocab()) == set(train)  # <unk> is a word of the text: one id
    assert data.vocab_size == len(set(train))
    assert data.decode(ids(data, "train")) == " ".join(train)
    known = [word if word in set(train) else "<unk>" for word in valid]
    assert data.decode(ids(data, "valid")) == " ".join(known)
    assert known.count("<unk>") == valid.count("<unk>") + 4  # "owl" and "a", twice


def test_unk_is_added_where_the_text_has_none(make_data):
    data = make_data("a b c a b c d", sequence_len=1, valid_fraction=0.3)
    assert sorted(data.tokenizer.get_vocab()) == ["<unk>", "a", "b", "c"]
    assert data.decode(ids(data, "valid")) == "b c <unk>"


def test_whole_vocabulary_is_that_of_the_original(make_data):
    data = make_data(vocabulary="all")
    stoi = {word: rank for rank, word in enumerate(sorted(set(WORDS)))}
    assert data.tokenizer.get_vocab() == stoi
    assert ids(data, "train") + ids(data, "valid") == [stoi[word] for word in WORDS]


@pytest.mark.parametrize("num_words", [18, 19, 24, 25, 26, 60])
def test_every_word_of_both_parts_is_reached_and_none_crosses_over(make_data, num_words):
    text = " ".join(f"w{number:02}" for number in range(num_words))
    data = make_data(text, vocabulary="all", valid_fraction=0.5)
    num_train = num_words // 2
    seen = torch.cat([batch.flatten() for batch in data.train_dataloader()])
    assert set(seen.tolist()) == set(range(num_train))
    held_out = torch.cat([batch[:, 1:].flatten() for batch in data.val_dataloader()])
    assert held_out[held_out != IGNORED].tolist() == list(range(num_train + 1, num_words))


def test_named_validation_text_replaces_the_held_out_part(make_data, tmp_path):
    with gzip.open(tmp_path / "valid.tokens.gz", "wt") as file:
        file.write("the owl saw the dog and the cat and the dog")
    data = make_data(valid_source=str(tmp_path / "valid.tokens.gz"))
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
def test_unit_is_detected_or_asked_for(make_data, text, settings, unit, train, valid):
    data = make_data(text, sequence_len=2, valid_fraction=0.5, **settings)
    cached = json.loads((data.cache_dir / "tokens" / data.folder / "index.json").read_text())
    assert cached["unit"] == unit
    assert ids(data, "train") == train
    assert ids(data, "valid") == valid


def test_vocabulary_of_integers_ends_with_the_largest(make_data):
    data = make_data("4 0 2 4 1 7 0 30", sequence_len=2, valid_fraction=0.5)
    assert data.vocab_size == 31
    assert data.decode([30, 5]) == "30 5"
    assert data.token_bytes is None


def test_data_are_the_same_when_loaded_again(make_data, monkeypatch):
    first = make_data()
    monkeypatch.setattr(
        "spectral_lightning.data.token_preparation.read_types", lambda *_: pytest.fail("read")
    )
    second = make_data()
    assert second.tokenizer.to_str() == first.tokenizer.to_str()
    for split in ("train", "valid"):
        assert ids(second, split) == ids(first, split)
    batches = [batch.tolist() for batch in first.train_dataloader()]
    assert [batch.tolist() for batch in second.train_dataloader()] == batches
    assert [batch.tolist() for batch in make_data(seed=1).train_dataloader()] != batches


def test_vocabulary_stands_as_json_beside_the_ids(make_data):
    data = make_data()
    folder = data.cache_dir / "tokens" / data.folder
    assert {path.name for path in folder.iterdir()} >= {"train.bin", "valid.bin", "index.json"}
    saved = Tokenizer.from_file(str(folder / "vocabulary.json"))
    assert saved.get_vocab() == data.tokenizer.get_vocab()


def test_other_text_or_settings_get_their_own_ids(make_data, tmp_path):
    folders = {make_data().folder, make_data(name="copy.txt").folder}
    assert len(folders) == 1
    (tmp_path / "valid.txt").write_text(RHYME)
    for settings in (
        {"vocabulary": "all"},
        {"valid_fraction": 0.3},
        {"unit": "char"},
        {"text": RHYME + "more"},
        {"valid_source": str(tmp_path / "valid.txt")},
    ):
        folders.add(make_data(**settings).folder)
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
def test_damaged_cache_is_reported_and_built_again(make_data, name, damage, reason):
    first = make_data()
    whole = ids(first, "train")
    damage(first.cache_dir / "tokens" / first.folder / name)
    with pytest.warns(UserWarning, match=f"The token cache is built again: .*{reason}"):
        assert ids(make_data(), "train") == whole
    make_data()


def test_size_of_the_vocabulary_is_known_before_setup(make_data):
    data = make_data(ready=False)
    assert data.vocab_size == len(set(WORDS[:78]))
    assert data.decode([0]) == "<unk>"
    data.setup("fit")
    assert next(iter(data.train_dataloader())).shape == (2, 9)


def test_config_can_link_the_model_to_the_vocabulary(make_data):
    class Linked(SpectralCLI):
        def add_arguments_to_parser(self, parser):
            target = "model.init_args.model.init_args.vocab_size"
            parser.link_arguments("data.vocab_size", target, apply_on="instantiate")

    data = make_data(ready=False)
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


def test_language_model_trains_on_words(make_data, make_trainer):
    data = make_data("the cat saw the dog and ran\n" * 40, ready=False)
    before = make_trainer().validate(make_task(data), data, verbose=False)[0]["valid/loss"]
    trainer = make_trainer(max_epochs=2)
    trainer.fit(make_task(data), data)
    assert before == pytest.approx(math.log(data.vocab_size), rel=0.1)  # nats per word
    assert trainer.callback_metrics["valid/loss"] < before - 0.5
    assert math.isfinite(trainer.callback_metrics["valid/bpb"])


@pytest.mark.parametrize("unit", ["word", "char"])
def test_bits_per_byte_are_those_of_the_text(make_data, make_trainer, unit):
    data = make_data(unit=unit, vocabulary="all", text=RHYME.replace("<unk>", "caf\u00e9"))
    metrics = make_trainer().validate(make_task(data), data, verbose=False)[0]
    predicted = ids(data, "valid")[1:]
    num_bytes = len(data.decode(predicted).encode()) + (unit == "word")  # the last word's space
    bits = metrics["valid/loss"] * len(predicted) / math.log(2)
    assert metrics["valid/bpb"] == pytest.approx(bits / num_bytes)


def test_integers_have_a_loss_but_no_bits_per_byte(make_data, make_trainer):
    data = make_data(" ".join(str(number % 7) for number in range(100)))
    metrics = make_trainer().validate(make_task(data), data, verbose=False)[0]
    assert math.isfinite(metrics["valid/loss"])
    assert "valid/bpb" not in metrics


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("step", [3, 6])
def test_run_resumes_bit_exactly_inside_an_epoch(make_data, make_trainer, tmp_path, step, used):
    saves = pl.callbacks.ModelCheckpoint(
        tmp_path / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    settings = {"max_epochs": 2, "limit_val_batches": 0}  # of 5 steps
    whole, data = make_task(make_data(ready=False)), make_data(ready=False)
    trainer = make_trainer(callbacks=[saves], enable_checkpointing=True, **settings)
    trainer.fit(whole, data)
    assert trainer.global_step == 10
    resumed, data = make_task(data), data if used else make_data(ready=False)
    path = tmp_path / "checkpoints" / f"step={step}.ckpt"
    make_trainer(**settings).fit(resumed, data, ckpt_path=path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_evaluating_a_checkpoint_does_not_move_the_training_position(
    make_data, make_trainer, tmp_path
):
    data = make_data()
    trainer = make_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(Plain(), data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    data = make_data()
    make_trainer().validate(Plain(), data, ckpt_path=tmp_path / "run.ckpt", verbose=False)
    batches = [batch.tolist() for batch in make_data().train_dataloader()]
    assert [batch.tolist() for batch in data.train_dataloader()] == batches


def test_checkpoint_brings_its_vocabulary(make_data, make_trainer, tmp_path):
    data = make_data()
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(make_task(data), data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    model, tokenizer = load_language_model(tmp_path / "run.ckpt")
    assert tokenizer.get_vocab() == data.tokenizer.get_vocab()
    assert model(torch.tensor([tokenizer.encode("the unicorn saw").ids])).shape[1] == 3


@pytest.mark.parametrize("plain", [True, False])
def test_run_refuses_to_go_on_with_another_vocabulary(make_data, make_trainer, tmp_path, plain):
    def task(data):
        return Plain() if plain else make_task(data)

    data, path = make_data(), tmp_path / "run.ckpt"
    trainer = make_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(task(data), data)
    trainer.save_checkpoint(path)
    settings = {"text": RHYME.replace("owl", "cow").replace("cats", "hens"), "name": "other.txt"}
    other = make_data(**settings, ready=False)
    message = (
        r"`source` must have the vocabulary of the checkpoint, got .*other.txt, whose 7 tokens"
        if plain
        else "The data module's tokenizer must be the one the model was trained with"
    )
    for run in (make_trainer(max_steps=4).fit, make_trainer().validate):
        with pytest.raises(ValueError, match=message):
            run(task(data), other, ckpt_path=path)
    saved = torch.load(path, weights_only=True)["TokenFileDataModule"]["vocabulary"]
    (tmp_path / "saved.json").write_text(saved)
    other = make_data(**settings, ready=False, tokenizer=str(tmp_path / "saved.json"))
    make_trainer(max_steps=4, limit_val_batches=0).fit(task(data), other, ckpt_path=path)
    assert other.tokenizer.get_vocab() == data.tokenizer.get_vocab()


def test_whole_vocabulary_has_no_effect_beside_a_tokenizer(make_data, tmp_path):
    data = make_data()
    data.tokenizer.save(str(tmp_path / "words.json"))
    with pytest.warns(UserWarning, match="`vocabulary` has no effect when a `tokenizer` is given"):
        other = make_data(tokenizer=str(tmp_path / "words.json"), vocabulary="all")
    assert ids(other, "valid") == ids(data, "valid")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": "byte"}, "`unit` must be 'auto', 'word', 'int' or 'char', got 'byte'"),
        ({"vocabulary": "valid"}, "`vocabulary` must be 'train' or 'all', got 'valid'"),
        ({"sequence_len": 0}, "`sequence_len` must be >= 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be >= 1, got 0"),
        ({"seed": -1}, "`seed` must be >= 0, got -1"),
        ({"num_workers": -1}, "`num_workers` must be >= 0, got -1"),
        ({"valid_fraction": 0.0}, r"`valid_fraction` must be in \(0, 1\), got 0.0"),
        ({"valid_fraction": 1}, r"`valid_fraction` must be in \(0, 1\), got 1"),
    ],
)
def test_setting_outside_its_range_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenFileDataModule("text.txt", **settings)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("", {}, "`source` must hold text, but .*rhyme.txt is empty"),
        ("a a\na " * 20, {}, "`source` must hold at least two different tokens, .* only 'a'"),
        ("3 -1 4 " * 20, {}, "`source` must hold non-negative integers, but field 2 of"),
        ("3 1 4 " * 20 + "x", {}, "`source` must hold non-negative integers, but field 61 of"),
        ("a b c d", {}, "`sequence_len` must be at most 2 for this text of 3 tokens, got 8"),
        (
            RHYME,
            {"valid_fraction": 0.01},
            r"`valid_fraction` must leave at least 9 tokens \(`sequence_len` \+ 1\) of the 98 for"
            r" validation, got 0.01, which leaves 1. Raise it",
        ),
    ],
    ids=["empty", "one-type", "negative", "word-among-integers", "short", "no-validation"],
)
def test_text_that_cannot_be_used_is_refused_in_one_sentence(make_data, text, settings, message):
    with pytest.raises(ValueError, match=message):
        make_data(text, **settings)


def test_held_out_part_of_one_window_is_enough(make_data):
    data = make_data("a b " * 45, valid_fraction=0.1)
    assert [batch.tolist() for batch in data.val_dataloader()] == [[ids(data, "valid")]]
    with pytest.raises(
        ValueError, match=r"`valid_fraction` must leave at least 10 tokens .* 9\. R"
    ):
        make_data("a b " * 45, valid_fraction=0.1, sequence_len=9)


def test_validation_text_is_checked_like_the_training_text(make_data, tmp_path):
    path = tmp_path / "valid.txt"
    for text, message in (
        ("", "`valid_source` must hold text, but .*valid.txt is empty"),
        ("the cat", r"`valid_source` must hold at least 9 tokens \(`sequence_len` \+ 1\), got 2"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            make_data(valid_source=str(path))


def test_path_that_is_no_file_is_named_with_its_argument(make_data, tmp_path):
    make_data()
    for argument in ("valid_source", "tokenizer"):
        with pytest.raises(FileNotFoundError, match=f"`{argument}` must be an existing file, got"):
            make_data(**{argument: "./no/such/file"})
    data = TokenFileDataModule(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="`source` must be an existing file, got"):
        data.prepare_data()


def test_data_must_be_prepared_before_use(make_data):
    data = make_data(ready=False)
    with pytest.raises(RuntimeError, match="`prepare_data` must be called before `setup`"):
        data.setup("fit")
    with pytest.raises(RuntimeError, match="`setup` must be called before the data are used"):
        data.train_dataloader()


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
