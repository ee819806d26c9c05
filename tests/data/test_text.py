import hashlib

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from spectral_lightning.data import TextDataModule, default_cache_dir
from spectral_lightning.data.windows import IGNORED

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.13
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
]


class Reader(pl.LightningModule):
    """Learns nothing and writes down which batches it was given."""

    def __init__(self, asks_for_length=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.asks_for_length = asks_for_length
        self.seen = []

    def configure_optimizers(self):
        if self.asks_for_length:  # Lightning then makes the loader before it restores its state
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        self.seen.append(hashlib.sha256(batch.numpy().tobytes()).hexdigest()[:8])
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        pass


def read(data, folder=None, ckpt_path=None, asks_for_length=False, **settings):
    """Run a Trainer over the data, with a checkpoint after every optimizer step."""
    callbacks = []
    if folder is not None:
        callbacks.append(
            pl.callbacks.ModelCheckpoint(
                folder, filename="{step}", every_n_train_steps=1, save_top_k=-1
            )
        )
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **{"max_epochs": 2, "limit_val_batches": 0} | settings,
    )
    reader = Reader(asks_for_length)
    trainer.fit(reader, data, ckpt_path=ckpt_path)
    return reader.seen


def test_batches_are_windows_of_tokens(make_data):
    data = make_data()
    batches = list(data.train_dataloader())
    assert all(batch.shape == (4, 17) and batch.dtype == torch.int64 for batch in batches)
    assert all(batch.min() >= 0 and batch.max() < data.vocab_size for batch in batches)
    assert (data.vocab_size, data.sequence_len) == (300, 16)
    assert data.token_bytes.shape == (300,)
    assert data.tokenizer.get_vocab_size() == 300


def test_validation_predicts_every_token_but_the_first_once(make_data):
    data = make_data()
    targets = torch.cat([batch[:, 1:].flatten() for batch in data.val_dataloader()])
    counted = targets[targets != IGNORED]
    text_bytes = data.token_bytes[counted].sum()
    shard = data._text.shards["valid"]
    assert len(counted) == len(shard) - 1
    assert text_bytes == shard.info.num_bytes
    assert [batch.tolist() for batch in data.test_dataloader()] == [
        batch.tolist() for batch in data.val_dataloader()
    ]


def test_named_evaluation_texts_are_used(make_data, tmp_path):
    for name in ("valid", "test"):
        (tmp_path / f"{name}.txt").write_text(f"text for the {name} split")
    data = make_data(
        valid_source=str(tmp_path / "valid.txt"), test_source=[str(tmp_path / "test.txt")]
    )
    loaders = {"valid": data.val_dataloader(), "test": data.predict_dataloader()}
    for name, loader in loaders.items():
        tokens = torch.cat([batch[:, 1:].flatten() for batch in loader])
        text = data.tokenizer.decode(tokens[tokens >= 0].tolist())
        assert text == f"text for the {name} split"


def test_runs_with_the_same_seed_see_the_same_batches(make_data):
    assert read(make_data()) == read(make_data())
    assert read(make_data(seed=1)) != read(make_data())


def test_each_epoch_has_its_own_order(make_data):
    seen = read(make_data())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    ("settings", "num_workers"),
    [
        ({}, 0),
        ({"asks_for_length": True}, 0),
        ({"accumulate_grad_batches": 2, "asks_for_length": True}, 0),
        ({"limit_train_batches": 4}, 0),
        ({"accumulate_grad_batches": 2}, 2),
    ],
    ids=str,
)
def test_resumed_run_sees_the_batches_it_would_have_seen(
    make_data, tmp_path, settings, num_workers
):
    data = {"num_workers": num_workers, "batch_size": 10}
    whole = read(make_data(**data), tmp_path / "checkpoints", **settings)
    per_epoch = len(whole) // 2
    accumulate = settings.get("accumulate_grad_batches", 1)
    steps_per_epoch = -(-per_epoch // accumulate)
    for step in (2, steps_per_epoch, steps_per_epoch + 1):
        epochs, steps = divmod(step, steps_per_epoch)
        path = tmp_path / "checkpoints" / f"step={step}.ckpt"
        rest = read(make_data(**data), ckpt_path=path, **settings)
        assert rest == whole[epochs * per_epoch + steps * accumulate :]


def test_evaluating_a_checkpoint_does_not_move_the_training_position(make_data, tmp_path):
    whole = read(make_data(), tmp_path / "checkpoints")
    data = make_data()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.validate(Reader(), data, ckpt_path=tmp_path / "checkpoints" / "step=2.ckpt")
    assert read(data) == whole


def test_overfit_batches_repeats_the_same_batches(make_data):
    with pytest.warns(UserWarning, match="You requested to overfit"):
        seen = read(make_data(), overfit_batches=2, max_epochs=3)
    assert seen == seen[:2] * 3


def test_training_leaves_the_global_random_numbers_alone(make_data):
    data = make_data()
    before = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_tokenizer_of_another_run_can_be_given(make_data, tmp_path):
    path = tmp_path / "tokenizer.json"
    first = make_data()
    first.tokenizer.save(str(path))
    assert make_data(tokenizer=str(path)).tokenizer.to_str() == first.tokenizer.to_str()
    with pytest.raises(ValueError, match=r"`vocab_size` must be 300, the size of the tokenizer"):
        make_data(tokenizer=str(path), vocab_size=310)
    with pytest.raises(FileNotFoundError, match="`tokenizer` must be an existing file, got"):
        make_data(tokenizer=str(tmp_path / "missing.json"))


def test_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "spectral_lightning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "spectral_lightning"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 256}, "`vocab_size` must be >= 257"),
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
        TextDataModule(**settings)


def test_sequence_longer_than_the_text_names_the_longest_possible(make_data):
    with pytest.raises(ValueError, match=r"`sequence_len` must be at most \d+ for this") as caught:
        make_data(sequence_len=100_000)
    longest = int(str(caught.value).split("at most ")[1].split(" ")[0])
    data = make_data(sequence_len=longest)
    assert next(iter(data.train_dataloader())).shape == (4, longest + 1)


def test_path_that_does_not_exist_is_named_with_its_argument(make_data):
    for argument in ("source", "valid_source", "test_source"):
        with pytest.raises(FileNotFoundError, match=f"`{argument}` must be an existing path, got"):
            make_data(**{argument: "./no/such/file.txt"})


def test_data_must_be_prepared_before_use(make_data):
    data = make_data(ready=False)
    with pytest.raises(RuntimeError, match="`prepare_data` must be called before `setup`"):
        data.setup("fit")
    with pytest.raises(RuntimeError, match="`setup` must be called before the data are used"):
        data.train_dataloader()
