import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.nn import functional as F
from torch.utils.data import DataLoader

from spectral_lightning.data import TextDataModule
from spectral_lightning.optim import MuonAdamW
from spectral_lightning.tasks import LanguageModeling

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.13
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def targets_of(data):
    """All targets of the validation set, and the batches they come from."""
    data.prepare_data()
    data.setup("fit")
    batches = list(data.val_dataloader())
    return batches, torch.cat([batch[:, 1:].flatten() for batch in batches])


def test_fresh_gpt_loses_the_logarithm_of_the_vocabulary(make_trainer, make_data, make_gpt):
    data, trainer = make_data(), make_trainer(max_steps=1)
    trainer.validate(LanguageModeling(make_gpt()), data, verbose=False)
    metrics = trainer.callback_metrics
    assert metrics["valid/loss"].item() == pytest.approx(math.log(300), rel=1e-4)
    _, targets = targets_of(data)
    num_bytes = data.token_bytes[targets[targets >= 0]]
    expected = math.log2(300) * (num_bytes > 0).sum() / num_bytes.sum()
    assert metrics["valid/bpb"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_training_learns_and_logs_both_numbers(make_trainer, make_data, make_gpt):
    trainer = make_trainer(max_steps=30, limit_val_batches=2, check_val_every_n_epoch=1)
    trainer.fit(LanguageModeling(make_gpt()), make_data())
    metrics = trainer.callback_metrics
    assert metrics["train/loss"] < 0.8 * math.log(300)
    assert metrics["valid/loss"] < 0.9 * math.log(300)
    assert {"train/bpb", "valid/bpb"} <= metrics.keys()


def test_evaluation_weighs_every_token_alike(make_trainer, make_data, make_bigram):
    data, model = make_data(batch_size=5), make_bigram()
    batches, targets = targets_of(data)
    assert (targets == -1).any()
    with torch.no_grad():
        nats = torch.cat(
            [
                F.cross_entropy(
                    model(batch[:, :-1].clamp(min=0)).flatten(0, 1),
                    batch[:, 1:].flatten(),
                    ignore_index=-1,
                    reduction="none",
                )
                for batch in batches
            ]
        ).double()
    num_bytes = data.token_bytes[targets.clamp(min=0)] * (targets >= 0)
    trainer, task = make_trainer(), LanguageModeling(model)
    (valid,) = trainer.validate(task, data, verbose=False)
    (test,) = trainer.test(task, data, verbose=False)
    assert valid["valid/loss"] == pytest.approx((nats.sum() / (targets >= 0).sum()).item())
    bits = nats[num_bytes > 0].sum() / math.log(2)
    assert valid["valid/bpb"] == pytest.approx((bits / num_bytes.sum()).item())
    assert [test["test/loss"], test["test/bpb"]] == list(valid.values())
    predicted = torch.cat(trainer.predict(task, data))
    weights = num_bytes.view(-1, 16).sum(1)
    assert (predicted * weights).sum() / weights.sum() == pytest.approx(valid["valid/bpb"])


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_ignored_targets_have_no_influence(make_bigram):
    task = LanguageModeling(make_bigram(10))
    batch = torch.tensor([[1, 2, 3, 4]])
    padded = torch.tensor([[1, 2, 3, 4, -1, -1], [-1, -1, -1, -1, -1, -1]])
    assert torch.equal(task.training_step(batch, 0), task.training_step(padded, 0))
    assert task.training_step(padded[1:], 0).item() == 0.0


def test_data_without_bytes_still_give_a_loss(make_trainer, make_bigram):
    trainer, task = make_trainer(max_steps=2), LanguageModeling(make_bigram(10))
    loader = DataLoader([torch.arange(5)] * 4, batch_size=2)
    trainer.fit(task, loader, loader)
    assert "valid/loss" in trainer.callback_metrics
    assert "valid/bpb" not in trainer.callback_metrics
    with pytest.raises(ValueError, match="must know the bytes per token"):
        trainer.predict(task, loader)


def test_a_task_can_be_validated_before_it_is_trained(make_trainer, make_data, make_gpt):
    task, data = LanguageModeling(make_gpt()), make_data()
    (before,) = make_trainer(max_steps=2).validate(task, data, verbose=False)
    trainer = make_trainer(max_steps=2, val_check_interval=1, check_val_every_n_epoch=None)
    trainer.fit(task, data)
    assert trainer.callback_metrics["valid/loss"] < before["valid/loss"]


def rates(make_trainer, make_data, task, **settings):
    """Learning rates of the steps of a run, relative to the first group's setting."""
    seen = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(optimizer.param_groups[0]["lr"])

    trainer = make_trainer(callbacks=[Watch()], limit_val_batches=0, **settings)
    trainer.fit(task, make_data())
    return seen


def sgd(groups):
    return torch.optim.SGD(groups, lr=1.0)


def test_learning_rate_falls_at_the_end_of_the_run(make_trainer, make_data, make_bigram):
    task = LanguageModeling(
        make_bigram(), sgd, warmup_steps=2, warmdown_fraction=0.4, final_fraction=0.5
    )
    assert rates(make_trainer, make_data, task, max_steps=5) == [0.5, 1.0, 1.0, 1.0, 0.75]


def test_run_of_epochs_knows_its_length(make_trainer, make_data, make_bigram):
    task = LanguageModeling(make_bigram(), sgd, warmdown_fraction=1.0)
    seen = rates(make_trainer, make_data, task, max_epochs=2, accumulate_grad_batches=2)
    assert len(seen) == task.trainer.estimated_stepping_batches
    assert seen == pytest.approx([1 - step / len(seen) for step in range(len(seen))])


def test_given_scheduler_is_stepped_every_optimizer_step(make_trainer, make_data, make_bigram):
    def halve(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    task = LanguageModeling(make_bigram(), sgd, lr_scheduler=halve)
    assert rates(make_trainer, make_data, task, max_steps=3) == [1.0, 0.5, 0.25]


def test_plateau_scheduler_watches_the_validation_loss(make_trainer, make_data, make_bigram):
    task = LanguageModeling(
        make_bigram(), sgd, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau
    )
    trainer = make_trainer(max_epochs=2, limit_train_batches=2)
    trainer.fit(task, make_data())
    assert trainer.lr_scheduler_configs[0].monitor == "valid/loss"
    assert trainer.lr_scheduler_configs[0].scheduler.best < math.inf


def test_warmup_beside_a_given_scheduler_is_reported(make_bigram):
    with pytest.warns(UserWarning, match="`warmup_steps` has no effect"):
        LanguageModeling(
            make_bigram(), lr_scheduler=torch.optim.lr_scheduler.ConstantLR, warmup_steps=3
        )


def test_run_without_an_end_cannot_warm_down(make_trainer, make_data, make_bigram):
    trainer = make_trainer(max_time={"seconds": 20})
    with pytest.raises(ValueError, match="`warmdown_fraction` must be 0 in a run without an end"):
        trainer.fit(LanguageModeling(make_bigram()), make_data())
    task = LanguageModeling(make_bigram(), sgd, warmup_steps=2, warmdown_fraction=0.0)
    seen = rates(make_trainer, make_data, task, max_time={"seconds": 1}, enable_progress_bar=False)
    assert seen[:3] == [0.5, 1.0, 1.0]


def test_fast_dev_run_is_too_short_for_a_schedule(make_trainer, make_data, make_gpt):
    task = LanguageModeling(make_gpt(), warmup_steps=100, sample_prompts=["Note"], sample_tokens=4)
    trainer = make_trainer(fast_dev_run=True)
    trainer.fit(task, make_data())
    assert trainer.global_step == 1


@pytest.mark.parametrize("optimizer", [MuonAdamW, torch.optim.AdamW, torch.optim.SGD])
def test_any_optimizer_takes_the_parameter_groups(make_trainer, make_data, make_gpt, optimizer):
    task = LanguageModeling(make_gpt(), optimizer)
    make_trainer(max_steps=2, limit_val_batches=0).fit(task, make_data())
    groups = task.trainer.optimizers[0].param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(task.parameters()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_equals_the_uninterrupted_one(
    make_trainer, make_data, make_gpt, tmp_path, accumulate
):
    def run(ckpt_path=None):
        task = LanguageModeling(make_gpt(), warmup_steps=2, warmdown_fraction=0.5)
        saving = pl.callbacks.ModelCheckpoint(
            tmp_path / "run", every_n_train_steps=3, save_top_k=-1, filename="{step}"
        )
        trainer = make_trainer(
            max_steps=6,
            max_epochs=3,
            accumulate_grad_batches=accumulate,
            limit_val_batches=1,
            enable_checkpointing=ckpt_path is None,
            callbacks=[saving] if ckpt_path is None else [],
        )
        trainer.fit(task, make_data(), ckpt_path=ckpt_path)
        return dict(task.named_parameters())

    whole = run()
    resumed = run(tmp_path / "run" / "step=3.ckpt")
    for name, parameter in whole.items():
        assert torch.equal(parameter, resumed[name]), name


def test_model_smaller_than_the_data_is_refused(make_trainer, make_data, make_bigram):
    for name, model in (
        ("vocab_size", make_bigram(vocab_size=299)),
        ("sequence_len", make_bigram(sequence_len=15)),
    ):
        with pytest.raises(ValueError, match=f"The model's `{name}` must be at least"):
            make_trainer().validate(LanguageModeling(model), make_data())
    make_trainer().validate(LanguageModeling(make_bigram(320)), make_data(), verbose=False)


def test_model_that_does_not_say_its_sizes_is_refused():
    with pytest.raises(TypeError, match="`model` must have an integer attribute `vocab_size`"):
        LanguageModeling(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": -1}, "`warmup_steps` must be >= 0, got -1"),
        ({"warmdown_fraction": 1.5}, r"`warmdown_fraction` must be in \[0, 1\], got 1.5"),
        ({"final_fraction": -0.5}, r"`final_fraction` must be in \[0, 1\], got -0.5"),
        ({"sample_tokens": 0}, "`sample_tokens` must be >= 1, got 0"),
    ],
)
def test_setting_outside_its_range_is_refused_at_once(make_bigram, settings, message):
    with pytest.raises(ValueError, match=message):
        LanguageModeling(make_bigram(), **settings)


def test_command_line_builds_the_task(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["spectral"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 calls old names
    cli = LightningCLI(
        LanguageModeling,
        TextDataModule,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        args={
            "model": {
                "model": {
                    "class_path": "spectral_lightning.models.GPT",
                    "init_args": {"depth": 1, "vocab_size": 300, "sequence_len": 16},
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5}},
                "lr_scheduler": {
                    "class_path": "spectral_lightning.optim.WarmupConstantWarmdown",
                    "init_args": {"num_steps": 9},
                },
                "sample_prompts": ["a", "b"],
            },
            "data": {"source": ["a.txt"], "vocab_size": 300, "cache_dir": str(tmp_path)},
        },
    )
    assert cli.model.model.vocab_size == cli.datamodule.vocab_size == 300
    optimizer = cli.model.optimizer(cli.model.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert cli.model.schedule.lr_scheduler(optimizer).get_last_lr() == [0.5]
    assert cli.model.sample_prompts == ["a", "b"]
