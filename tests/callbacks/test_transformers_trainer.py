"""Spectral callbacks under Hugging Face's Trainer: the same readings, steps and checkpoints."""

import csv
import json
import re
from dataclasses import asdict
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from transformers import Trainer, TrainerCallback, TrainingArguments

import spectral_lightning.callbacks
from spectral_lightning.callbacks import ASSR, SpectralMonitor, SpectralTrainerCallback
from spectral_lightning.control import Regulator, Thermostat
from spectral_lightning.spectra import find_targets, read_history
from spectral_lightning.testing.differences import first_difference
from spectral_lightning.testing.models import plant_spike_, relative_stable_rank, tiny_gpt2
from spectral_lightning.testing.tasks import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:ASSR finds .* outside their bands at once")

LAYER = "transformer.h.1.mlp.c_fc"


def with_spike(model):
    plant_spike_(model.get_submodule(LAYER).weight)
    return model


def sentences(count):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 40, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


@pytest.fixture
def make_hf_trainer(tmp_path):
    """A quiet Trainer of six optimizer steps on four sentences each, in their order."""

    def make(*callbacks, model=None, lr=0.01, optimizer=torch.optim.AdamW, **settings):
        model = tiny_gpt2() if model is None else model
        settings = {
            "output_dir": str(tmp_path),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "train_sampling_strategy": "sequential",
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "logging_steps": 2,
            "max_grad_norm": 0.0,
            **settings,
        }
        optimizer = optimizer(model.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return Trainer(
            model=model,
            args=TrainingArguments(**settings),
            train_dataset=sentences(96),
            eval_dataset=sentences(4),
            optimizers=(optimizer, schedule),
            callbacks=list(callbacks),
        )

    return make


class AtStepEnd(TrainerCallback):
    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(state.global_step, kwargs["model"])


class LanguageModel(pl.LightningModule):
    """The same steps under Lightning, on layers of the same names."""

    def __init__(self):
        super().__init__()
        gpt2 = tiny_gpt2()
        self.transformer, self.lm_head = gpt2.transformer, gpt2.lm_head
        self.model = [gpt2]  # in a list, so that its layers are not found again

    def training_step(self, batch, batch_idx):
        count = batch["labels"].numel()  # as the Trainer counts
        return self.model[0](**batch, num_items_in_batch=count).loss

    def train_dataloader(self):
        return torch.utils.data.DataLoader(sentences(96), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def static(floor, **settings):
    return Regulator(calibration="static", floor=floor, **settings)


def readings(callback):
    return {name: asdict(callback.spectra[name]) for name in callback.names}


def both(**settings):
    """A monitor and an ASSR that acts on all layers at once."""
    return SpectralMonitor(table_rows=0), ASSR(regulator=static(2.0), table_rows=0, **settings)


def test_readings_and_weights_are_those_of_a_run_under_lightning(make_hf_trainer, tmp_path):
    monitor, assr = both()
    trainer = make_hf_trainer(SpectralTrainerCallback(monitor, assr))
    trainer.train()
    twin, other = both()
    task = LanguageModel()
    quiet_trainer(tmp_path, twin, other, max_steps=6).fit(task)
    assert first_difference(trainer.model.state_dict(), task.model[0].state_dict()) is None
    assert first_difference(readings(monitor), readings(twin)) is None
    assert monitor.spectra is assr.spectra
    assert monitor.spectra.num_decompositions == twin.spectra.num_decompositions
    assert assr.assr_stats == other.assr_stats
    assert assr.assr_stats["rank_int"] == 6 * len(assr.interventions)


def test_conv1d_layers_are_measured_as_they_are_after_each_step(make_hf_trainer):
    truth = {}

    def look(step, model):
        truth[step] = {t.name: t.matrix().double() for t in find_targets(model).targets}

    monitor = SpectralMonitor(spectrum_every_n_steps=None, table_rows=0)
    make_hf_trainer(SpectralTrainerCallback(monitor), AtStepEnd(look)).train()
    assert {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"} <= set(monitor.names)
    for name, reading in monitor.readings.items():
        weight = truth[reading.step][name]
        assert reading.shape == tuple(weight.shape)
        low, high = reading.spectral_norm_interval
        assert low <= torch.linalg.matrix_norm(weight, 2) <= high
        assert reading.frobenius_norm == pytest.approx(weight.norm().item(), rel=1e-5)


def test_a_monitor_does_not_change_the_run(make_hf_trainer):
    trainers = make_hf_trainer(), make_hf_trainer(SpectralTrainerCallback(both()[0]))
    for trainer in trainers:
        torch.manual_seed(3)
        trainer.train()
    plain, monitored = (trainer.model.state_dict() for trainer in trainers)
    assert first_difference(monitored, plain) is None


def test_one_reading_and_one_action_per_step_under_accumulation(make_hf_trainer):
    steps = []

    class Spy(ASSR):
        def on_readings(self, trainer, pl_module, step):
            steps.append(step)
            super().on_readings(trainer, pl_module, step)

    assr = Spy(LAYER, regulator=static(2.0), table_rows=0)
    trainer = make_hf_trainer(SpectralTrainerCallback(assr), gradient_accumulation_steps=3)
    trainer.train()
    assert steps == [0, 1, 2, 3, 4, 5]
    assert assr.interventions[LAYER].num_interventions == 6


def test_a_step_that_the_gradient_scaler_skips_is_left_alone(make_hf_trainer):
    class Overflowing(Trainer):
        def compute_loss(self, *args, **kwargs):
            factor = float("inf") if self.state.global_step in (1, 3) else 1.0
            return factor * super().compute_loss(*args, **kwargs)

    assr = ASSR(LAYER, regulator=static(2.0), table_rows=0)
    trainer = make_hf_trainer(SpectralTrainerCallback(assr), logging_nan_inf_filter=False)
    trainer.__class__ = Overflowing
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.train()
    assert assr.interventions[LAYER].num_interventions == 4
    assert torch.isfinite(trainer.model.get_submodule(LAYER).weight).all()


def test_a_planted_spike_in_a_conv1d_is_healed_and_other_layers_stay(make_hf_trainer):
    models = [with_spike(tiny_gpt2()) for _ in range(2)]
    before = relative_stable_rank(models[0].get_submodule(LAYER).weight)
    assr = ASSR(regulator=static(0.3, thermostat=Thermostat(strength=30.0)), table_rows=0)
    settings = {"max_steps": 120, "lr": 1e-3, "optimizer": torch.optim.SGD}
    make_hf_trainer(SpectralTrainerCallback(assr), model=models[0], **settings).train()
    make_hf_trainer(model=models[1], **settings).train()
    healed, left = (relative_stable_rank(m.get_submodule(LAYER).weight) for m in models)
    assert before < 0.15
    assert left < 0.15
    assert healed > 0.3
    done = assr.interventions
    assert done[LAYER].num_interventions > 0
    assert sum(layer.num_interventions for name, layer in done.items() if name != LAYER) == 0


def test_a_resumed_run_equals_the_one_that_ran_through(make_hf_trainer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole, resumed = both(), both()
    first = make_hf_trainer(SpectralTrainerCallback(*whole), **saving)
    first.train()
    second = make_hf_trainer(SpectralTrainerCallback(*resumed), **saving)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert first_difference(second.model.state_dict(), first.model.state_dict()) is None
    for one, other in zip(resumed, whole, strict=True):
        assert first_difference(readings(one), readings(other)) is None
        assert first_difference(one.state_dict(), other.state_dict()) is None


def test_a_checkpoint_elsewhere_is_found_by_its_folder(make_hf_trainer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    make_hf_trainer(SpectralTrainerCallback(*both()), **saving).train()
    elsewhere = {"output_dir": str(tmp_path / "other"), "max_steps": 4}
    folder = str(tmp_path / "checkpoint-3")
    lost = make_hf_trainer(SpectralTrainerCallback(*both()), **elsewhere)
    with pytest.warns(UserWarning, match="resumes at step 3 without the state of its spectral"):
        lost.train(resume_from_checkpoint=folder)
    found, other = both(sample_ratio=1.0), SpectralMonitor("*.mlp.*", table_rows=0)
    adapter = SpectralTrainerCallback(*found, other, resume_from=folder)
    with pytest.warns(UserWarning, match="holds no state for SpectralMonitor.*which starts afresh"):
        make_hf_trainer(adapter, **elsewhere).train(resume_from_checkpoint=folder)
    assert found[1].assr_stats["steps_with_int"] == 4


def test_values_reach_the_log_loggers_and_history(make_hf_trainer, tmp_path):
    logger = CSVLogger(tmp_path, name="csv", version="", flush_logs_every_n_steps=1)
    trainer = make_hf_trainer(
        SpectralTrainerCallback(*both(), loggers=[logger]),
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(row["spectral/stable_rank/min"] > 1 for row in rows)
    assert [row["assr/steps_acted"] for row in rows] == [2, 4, 6]
    assert not any("c_fc" in key for row in rows for key in row)
    assert not any("spectral/stable_rank/min" in row for row in trainer.state.log_history[-1:])
    json.dumps(trainer.state.log_history)
    table = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").read_text().splitlines()))
    history = read_history(tmp_path / "spectral_history.jsonl")
    assert [step.step for step in history] == [0, 2, 4, 6]
    logged = {
        int(row["step"]): float(value)
        for row in table
        if (value := row[f"spectral/stable_rank/{LAYER}"])
    }
    known = {step.step: step.readings[LAYER].stable_rank for step in history}
    assert logged == pytest.approx(known)
    assert [int(row["step"]) for row in table if row[f"assr/severity/{LAYER}"]] == [2, 4, 6]


def test_evaluation_before_and_after_training_needs_nothing(make_hf_trainer):
    trainer = make_hf_trainer(SpectralTrainerCallback(*both()))
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()


def test_misuse_is_refused_with_one_sentence(make_hf_trainer):
    with pytest.raises(ValueError, match="`callbacks` must be one or more spectral callbacks"):
        SpectralTrainerCallback()
    with pytest.raises(TypeError, match=r"`callbacks` must be spectral callbacks.*Learning"):
        SpectralTrainerCallback(ASSR(), LearningRateMonitor())
    with pytest.raises(TypeError, match="`callbacks` must be spectral callbacks"):
        SpectralTrainerCallback(ASSR)
    with pytest.raises(ValueError, match="`callbacks` must have different state keys"):
        SpectralTrainerCallback(ASSR(), ASSR())
    trainer = make_hf_trainer(SpectralTrainerCallback(ASSR()))
    trainer.args.deepspeed = "zero3.json"
    with pytest.raises(ValueError, match="`deepspeed` must be off for spectral callbacks"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_only_the_adapter_needs_transformers():
    sources = Path(spectral_lightning.callbacks.__file__).parent.glob("*.py")
    pattern = re.compile(r"^(from|import) (transformers|accelerate)\b", re.MULTILINE)
    needing = [path.stem for path in sources if pattern.search(path.read_text())]
    assert needing == ["transformers_trainer"]
    with pytest.raises(AttributeError, match="has no attribute 'SpectralTrainer'"):
        spectral_lightning.callbacks.SpectralTrainer  # noqa: B018
