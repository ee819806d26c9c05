"""One line for each target after each validation, checkpoints by name, early stopping, speed."""

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from spectral_lightning.callbacks.named_checkpoints import FinalCheckpoint
from spectral_lightning.callbacks.target_progress import TargetProgress
from spectral_lightning.callbacks.throughput import Throughput, batch_size
from spectral_lightning.testing.distributed import run_ranks
from spectral_lightning.testing.tasks import TinyTask, quiet_trainer

METRIC = "valid/stsb-dev/spearman"


class Scored(TinyTask):
    """Logs a loss, a temperature, and one score after the other."""

    def __init__(self, scores, **settings):
        super().__init__(**settings)
        self.scores, self.num_validated = scores, 0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log_dict({"train/loss": 1.2345, "train/temperature": 0.0695})
        return loss

    def on_validation_epoch_end(self):
        score = self.scores[min(self.num_validated, len(self.scores) - 1)]
        self.num_validated += 1
        self.log_dict({METRIC: score, "valid/loss": 1 - score}, sync_dist=True)


def run(folder, task, *callbacks, **settings):
    defaults = {"max_steps": 6, "limit_val_batches": 1, "val_check_interval": 2}
    trainer = quiet_trainer(folder, *callbacks, **defaults | settings)
    trainer.fit(task)
    return trainer


def test_the_line_says_how_far_the_target_is(tmp_path, capsys):
    stopping = EarlyStopping(METRIC, mode="max", patience=5)
    progress = TargetProgress({METRIC: 0.825, "valid/ndcg": 0.42})
    run(tmp_path, Scored([0.7, 0.6892]), stopping, progress, max_steps=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert lines[2] == (
        f"step 4 | loss 1.2345 | temperature 0.0695 | {METRIC} 0.6892 | target 0.8250"
        " | progress 83.5 % | patience 1/5"
    )
    assert lines[3].endswith(
        "valid/ndcg not measured | target 0.4200 | progress not measured | patience 1/5"
    )


def test_the_order_of_callbacks_is_asked_for(tmp_path, capsys):
    stopping = EarlyStopping(METRIC, mode="max", patience=5)
    with pytest.warns(UserWarning, match="EarlyStopping stands after it in `callbacks`; put"):
        run(tmp_path, Scored([0.7]), TargetProgress({METRIC: 0.8}), stopping)
    run(tmp_path, Scored([0.7]), TargetProgress({METRIC: 0.8}))
    assert capsys.readouterr().out.splitlines()[-1].endswith("87.5 % | patience off")


@pytest.mark.parametrize("targets", [{}, {METRIC: 0.0}, {METRIC: float("nan")}])
def test_targets_have_to_be_positive(targets):
    with pytest.raises(ValueError, match="`targets` must give each metric a positive"):
        TargetProgress(targets)


def test_all_ranks_stop_together_when_patience_ends(tmp_path):
    def on_rank():
        stopping = EarlyStopping(METRIC, mode="max", patience=5)
        settings = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        task = Scored([0.5, 0.6, 0.6], num_batches=100)
        trainer = run(
            tmp_path, task, stopping, max_steps=100, check_val_every_n_epoch=None, **settings
        )
        return trainer.global_step, stopping.wait_count

    assert run_ranks(on_rank) == [(14, 5)] * 2


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_checkpoints_have_their_names_and_rotate(tmp_path):
    settings = {"dirpath": tmp_path, "enable_version_counter": False}
    named = [
        ModelCheckpoint(filename="best_sts", monitor=METRIC, mode="max", **settings),
        ModelCheckpoint(filename="best_val", monitor="valid/loss", **settings),
        ModelCheckpoint(
            **settings | {"filename": "step-{step}", "auto_insert_metric_name": False},
            every_n_train_steps=2,
            monitor="step",
            mode="max",
            save_top_k=3,
            save_last=True,
        ),
        FinalCheckpoint(tmp_path),
    ]
    task = Scored([0.5, 0.7, 0.6], num_batches=20)
    run(tmp_path, task, *named, max_steps=9, enable_checkpointing=True)
    saved = {path.stem: torch.load(path)["global_step"] for path in tmp_path.glob("*.ckpt")}
    assert saved == {
        "best_sts": 4,
        "best_val": 4,
        "last": 8,
        "final": 9,
        "step-4": 4,
        "step-6": 6,
        "step-8": 8,
    }
    resumed = FinalCheckpoint(tmp_path)
    trainer = quiet_trainer(tmp_path, resumed, max_steps=11, enable_checkpointing=True)
    trainer.fit(Scored([0.5], num_batches=20), ckpt_path=tmp_path / "final.ckpt")
    assert torch.load(tmp_path / "final.ckpt")["global_step"] == 11


def test_throughput_and_memory_are_logged(tmp_path):
    speed, logger = Throughput(every_n_steps=2), CSVLogger(tmp_path, "", "")
    run(tmp_path, TinyTask(), speed, logger=logger)
    assert speed.measured["throughput/samples_per_second"] > 0
    assert 0.05 < speed.measured["throughput/peak_memory_gib"] < 500
    assert "throughput/tokens_per_second" not in speed.measured
    logger.save()
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 4


def test_speed_is_samples_over_the_time_of_training_alone(tmp_path, monkeypatch):
    clock = iter([0.0, 2.0, 100.0, 101.0])  # a batch, validation, and another batch
    monkeypatch.setattr("time.perf_counter", lambda: next(clock, 101.0))
    speed = Throughput(every_n_steps=2)
    trainer = quiet_trainer(tmp_path)
    task, batch = TinyTask(), torch.ones(6, 4, dtype=torch.int64)
    speed.on_train_start(trainer, task)
    speed.on_train_batch_start(trainer, task, batch, 0)
    speed.on_train_batch_end(trainer, task, None, batch, 0)
    speed.on_validation_start(trainer, task)
    speed.on_train_batch_start(trainer, task, batch, 1)
    monkeypatch.setattr(type(trainer), "global_step", 2)
    speed.on_train_batch_end(trainer, task, None, batch, 1)
    assert speed.measured["throughput/samples_per_second"] == 12 / 3
    assert speed.measured["throughput/tokens_per_second"] == 48 / 3


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ((torch.ones(3, 5), torch.ones(3)), (3, None)),
        (torch.ones(3, 5, dtype=torch.int64), (3, 15)),
        ({"input_ids": torch.ones(3, 5)}, (3, 15)),
        ({"x": torch.ones(3, 5)}, (3, None)),
        ("text", (0, None)),
    ],
)
def test_sizes_of_batches(batch, size):
    assert batch_size(batch) == size


def test_an_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="`every_n_steps` must be >= 1 or None, got 0"):
        Throughput(0)
