"""Every n-th checkpoint is copied, whoever saved it, and a copy that fails ends no run."""

import fsspec
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from spectral_lightning.callbacks.checkpoint_backup import CheckpointBackup, copy_atomically
from spectral_lightning.testing.differences import first_difference
from spectral_lightning.testing.distributed import run_ranks
from spectral_lightning.testing.tasks import TinyTask, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


@pytest.fixture
def run(tmp_path):
    """Save at each step, and return the Trainer and the callback."""

    def fit(destination=None, max_steps=13, ckpt_path=None, others=(), **settings):
        backup = CheckpointBackup(str(destination or tmp_path / "new" / "backup"), **settings)
        saver = ModelCheckpoint(
            *(tmp_path / "run", "step-{step}"),
            auto_insert_metric_name=False,
            every_n_train_steps=1,
            save_top_k=-1,
        )
        trainer = quiet_trainer(
            tmp_path, saver, backup, *others, max_steps=max_steps, enable_checkpointing=True
        )
        trainer.fit(TinyTask(num_batches=20), ckpt_path=ckpt_path, weights_only=bool(ckpt_path))
        return trainer, backup

    return fit


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_of_thirteen_saves_two_are_copied(run, tmp_path):
    run()
    assert names(tmp_path / "new/backup") == ["000006-step-6.ckpt", "000012-step-12.ckpt"]
    copy = torch.load(tmp_path / "new/backup/000006-step-6.ckpt")
    original = torch.load(tmp_path / "run/step-6.ckpt")
    assert first_difference(copy["state_dict"], original["state_dict"]) is None


def test_saves_of_all_callbacks_count(run, tmp_path):
    second = ModelCheckpoint(tmp_path / "other", "best", every_n_train_steps=2)
    run(max_steps=4, every_n_saves=3, others=[second])  # saves at 1, 2, 2, 3, 4, 4
    assert len(names(tmp_path / "new/backup")) == 2


def test_a_resumed_run_goes_on_counting(run, tmp_path):
    run(max_steps=4)
    run(max_steps=7, ckpt_path=tmp_path / "run/step-4.ckpt")
    assert names(tmp_path / "new/backup") == ["000006-step-6.ckpt"]


def test_only_the_last_copies_of_this_run_are_kept(run, tmp_path):
    (tmp_path / "new/backup").mkdir(parents=True)
    (tmp_path / "new/backup/000001-mine.ckpt").touch()
    run(max_steps=4, every_n_saves=1, keep_last=2)
    run(max_steps=5, every_n_saves=1, keep_last=2, ckpt_path=tmp_path / "run/step-4.ckpt")
    left = ["000001-mine.ckpt", "000004-step-4.ckpt", "000005-step-5.ckpt"]
    assert names(tmp_path / "new/backup") == left


def test_any_filesystem_will_do(run):
    run("memory://backup", max_steps=6)
    memory = fsspec.filesystem("memory")
    found = memory.ls("/backup", detail=False)
    memory.rm("/backup", recursive=True)
    assert found == ["/backup/000006-step-6.ckpt"]


def test_a_copy_that_fails_ends_no_run(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="could not copy .*step-6.ckpt to .*file: .*Error"):
        trainer, backup = run(tmp_path / "file", max_steps=8)
    assert trainer.global_step == 8
    assert backup.state_dict()["num_saves"] == 8


def test_a_copy_that_breaks_off_leaves_the_one_before(tmp_path, monkeypatch):
    (tmp_path / "a.ckpt").write_text("old")
    copy_atomically(str(tmp_path / "a.ckpt"), str(tmp_path / "to"), "a.ckpt")
    (tmp_path / "a.ckpt").write_text("new and longer")

    def half(reader, writer, length):
        writer.write(reader.read()[:3])
        raise OSError("the cable was pulled")

    monkeypatch.setattr("shutil.copyfileobj", half)
    with pytest.raises(OSError, match="cable"):
        copy_atomically(str(tmp_path / "a.ckpt"), str(tmp_path / "to"), "a.ckpt")
    assert (tmp_path / "to/a.ckpt").read_text() == "old"
    monkeypatch.undo()
    copy_atomically(str(tmp_path / "a.ckpt"), str(tmp_path / "to"), "a.ckpt")
    assert (tmp_path / "to/a.ckpt").read_text() == "new and longer"
    assert names(tmp_path / "to") == ["a.ckpt"]


def test_two_backups_and_a_second_fit_do_not_disturb_each_other(run, tmp_path):
    other = CheckpointBackup(str(tmp_path / "second"), every_n_saves=4)
    trainer, _ = run(max_steps=6, others=[other])
    assert names(tmp_path / "second") == ["000004-step-4.ckpt"]
    trainer.save_checkpoint(tmp_path / "after.ckpt")  # no part of the run
    assert other.state_dict()["num_saves"] == 6
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(TinyTask(num_batches=20))
    assert other.state_dict()["num_saves"] == 2


class Sharded(TinyTask):
    def configure_model(self):
        if not isinstance(self.net[0].weight, DTensor):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def test_rank_zero_copies_whole_folders_of_shards(tmp_path):
    def on_rank():
        backup = CheckpointBackup(str(tmp_path / "backup"), every_n_saves=2)
        saver = ModelCheckpoint(tmp_path / "run", every_n_train_steps=1, save_top_k=-1)
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        settings = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}
        settings |= {"enable_checkpointing": True, "max_steps": 2}
        quiet_trainer(tmp_path, saver, backup, **settings).fit(Sharded())
        return backup.state_dict()["copies"]

    copies, others = run_ranks(on_rank)
    assert (names(tmp_path / "backup"), others) == (copies, copies)
    (copy,) = copies
    original = tmp_path / "run" / copy.removeprefix("000002-")
    assert original.is_dir()
    assert names(tmp_path / "backup" / copy) == names(original)


@pytest.mark.parametrize("name", ["every_n_saves", "keep_last"])
def test_bad_arguments_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be >= 1.*, got 0."):
        CheckpointBackup("there", **{name: 0})
