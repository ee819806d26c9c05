from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from spectral_lightning.data import PairsSource
from tests.data.pairs_cases import SCORED, open_pairs, pairs, triplets

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.fixture
def make_data(tmp_path):
    return partial(open_pairs, tmp_path / "cache")


class Reader(pl.LightningModule):
    """Learns nothing and writes down which rows it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []
        self.evaluated = []

    def configure_optimizers(self):
        # Lightning then makes the loader before it restores its state.
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].tolist())
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.evaluated.append((dataloader_idx, "scores" in batch))


def read(data, folder=None, ckpt_path=None):
    saver = pl.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saver] if folder is not None else [],
        max_epochs=2,
        num_sanity_val_steps=0,
    )
    reader = Reader()
    trainer.fit(reader, data, ckpt_path=ckpt_path)
    return reader


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("step", [3, 11])
def test_resumed_run_sees_the_batches_it_would_have_seen(make_data, tmp_path, step, num_workers):
    sources = [PairsSource(records=pairs(20)), PairsSource(records=triplets(20, first=100))]
    settings = {"num_workers": num_workers, "sts": {"own": PairsSource(records=SCORED)}}
    whole = read(make_data(sources, **settings), tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / f"step={step}.ckpt"
    resumed = read(make_data(sources, **settings), ckpt_path=path)
    assert len(whole.seen) > 11
    assert resumed.seen == whole.seen[step:]
    assert set(whole.evaluated) == {(0, False), (1, True)}


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_run_without_evaluation_data_trains(make_data):
    data = make_data(valid_fraction=0.0)
    assert data.eval_sets == ()
    assert len(read(data).seen) == 30
