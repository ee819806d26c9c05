import functools
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import AdamW
from torch.optim.lr_scheduler import ConstantLR

from spectral_lightning.callbacks import ASSR, SpectralMonitor
from spectral_lightning.callbacks.non_finite_guard import NonFiniteGuard
from spectral_lightning.data import PairsSource
from spectral_lightning.losses import CosineTemperature, LearnableTemperature, SpectraLoss
from spectral_lightning.tasks import SentenceEmbedding
from spectral_lightning.testing.differences import first_difference
from tests.data.pairs_cases import triplets
from tests.tasks.embedding_cases import (
    TINY,
    assert_same,
    loader,
    make_batch,
    make_task,
    pairs_data,
    weights,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Watch(pl.Callback):
    """What is logged after each batch, under one name."""

    def __init__(self, name):
        self.name, self.seen = name, []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(trainer.callback_metrics[self.name].item())


def losses(make_trainer, task, *batches, **settings):
    watch = Watch("train/loss")
    make_trainer(max_steps=len(batches), callbacks=[watch], **settings).fit(task, loader(*batches))
    return watch.seen


def adamw(groups):
    return AdamW(groups, lr=1e-3)


def test_training_learns_and_logs_each_term(make_trainer, tmp_path):
    data = pairs_data(tmp_path, PairsSource(records=triplets(40)), batch_size=8)
    watch = Watch("train/loss")
    trainer = make_trainer(max_steps=24, callbacks=[watch], check_val_every_n_epoch=3)
    task = make_task(optimizer=adamw)
    trainer.fit(task, data)
    assert sum(watch.seen[-4:]) < 0.9 * sum(watch.seen[:4])
    logged = {name.removeprefix("train/") for name in trainer.callback_metrics}
    assert {"loss", "temperature", *task.loss.term_weights()} <= logged
    assert set(task.last_loss_terms()) == set(task.loss.term_weights())
    total = sum(w * task.last_loss_terms()[n] for n, w in task.loss.term_weights().items())
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(total.item(), rel=1e-5)


def test_temperature_falls_in_optimizer_steps_and_not_in_batches(make_trainer):
    watch = Watch("train/temperature")
    batches = [make_batch(4, seed=seed) for seed in range(20)]
    trainer = make_trainer(max_steps=10, accumulate_grad_batches=2, callbacks=[watch])
    task = make_task(temperature=CosineTemperature(start=0.07, end=0.05, hold_fraction=0.2))
    trainer.fit(task, loader(*batches))
    assert watch.seen[0::2] == watch.seen[1::2]
    at = dict(zip((step / 10 for step in range(10)), watch.seen[::2], strict=True))
    assert [at[0.0], at[0.2], at[0.6]] == pytest.approx([0.07, 0.07, 0.06])
    assert 0.05 < at[0.9] < 0.051


@pytest.mark.filterwarnings("ignore:The `max_epochs` was not specified")
def test_temperature_of_a_run_without_end_stays_at_its_start(make_trainer):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    watch = Watch("train/temperature")
    trainer = make_trainer(callbacks=[watch, Stop()])
    trainer.fit(make_task(), loader(make_batch(4), make_batch(4)))
    assert watch.seen == pytest.approx([0.07])


def test_learned_temperature_is_trained_and_does_not_decay(make_trainer):
    def optimizer(groups):
        named = {group["name"]: group for group in groups}
        assert named["temperature"]["weight_decay"] == 0.0
        return AdamW(groups, lr=1e-2)

    task = make_task(temperature=LearnableTemperature(), optimizer=optimizer)
    losses(make_trainer, task, make_batch(), make_batch())
    assert task.temperature().item() != pytest.approx(0.07, abs=1e-4)


def test_pairs_with_scores_are_ranked_by_them(make_trainer):
    scored = make_batch(8, scores=torch.linspace(0, 1, 8))
    task = make_task(optimizer=adamw)
    losses(make_trainer, task, *[scored] * 30)
    with torch.no_grad():
        first, second = task.eval().represent(scored)
    cosines = (first["semantic"] * second["semantic"]).sum(1)
    assert cosines.argsort().tolist() == list(range(8))


def test_every_part_that_is_left_out_is_gone_from_model_and_loss():
    whole = make_task()
    names = set(weights(whole))
    for part, prefix, terms in (
        ("spectral", ".spectral.", {"spectral"}),
        ("anchor", "heads.anchor", {"anchor"}),
        ("bridge", "heads.entity", {"bridge"}),
        ("angular", None, {"alignment"}),
        ("matryoshka", None, {"alignment"}),
    ):
        task = make_task(without=[part])
        gone = {name for name in names if prefix and prefix in name and "heads.rank" not in name}
        assert names - set(weights(task)) >= gone
        assert bool(names - set(weights(task))) == bool(prefix)
        assert set(whole.loss.term_weights()) - set(task.loss.term_weights()) == terms
    # 2 layers of 4 * 64 * 16 weights, 3 * 16 + 64 biases and a gate.
    count = sum(weight.numel() for weight in whole.model.parameters())
    bare = sum(weight.numel() for weight in make_task(without=["spectral"]).model.parameters())
    assert count - bare == 2 * (4 * 64 * 16 + 3 * 16 + 64 + 1)


def test_without_matryoshka_the_largest_dimension_has_the_weight_of_all(make_trainer):
    task = make_task(without=["matryoshka"])
    assert task.model.head_dims()["semantic"] == (64, 48, 32)
    batch = make_batch(4)
    columns = task.represent(batch)
    with torch.no_grad():
        terms = task.loss(*columns, temperature=0.1, text_ids=batch["text_ids"]).terms
        cosines = columns[0]["semantic"] @ columns[1]["semantic"].T / 0.1
        places = torch.arange(4)
        both = [torch.nn.functional.cross_entropy(c, places) for c in (cosines, cosines.T)]
    assert terms["semantic"].item() == pytest.approx(0.9 * sum(both).item() / 2, rel=1e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_a_resumed_run_ends_where_the_whole_run_does(make_trainer, tmp_path, learned):
    def state(name, ckpt_path=None):
        temperature = LearnableTemperature() if learned else None
        task = make_task(
            temperature=temperature, optimizer=adamw, warmup_steps=2, warmdown_fraction=0.5
        )
        saver = ModelCheckpoint(
            tmp_path / name, filename="{step}", every_n_train_steps=3, save_top_k=-1
        )
        trainer = make_trainer(
            max_steps=6, limit_val_batches=0, enable_checkpointing=True, callbacks=[saver]
        )
        trainer.fit(task, pairs_data(tmp_path, batch_size=4), ckpt_path=ckpt_path)
        assert trainer.num_training_batches > 6
        saved = torch.load(tmp_path / name / "step=6.ckpt", weights_only=True)
        return saved["state_dict"], saved["optimizer_states"], saved["lr_schedulers"]

    whole = state("whole")
    (tmp_path / "whole" / "step=6.ckpt").unlink()
    assert first_difference(state("resumed", tmp_path / "whole" / "step=3.ckpt"), whole) is None


def test_bfloat16_gives_the_loss_of_float32_roughly(make_trainer):
    expected = losses(make_trainer, make_task(), make_batch())
    (found,) = losses(make_trainer, make_task(), make_batch(), precision="bf16-mixed")
    assert found == pytest.approx(expected[0], rel=0.02)
    assert found != expected[0]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_of_gradients_changes_nothing(make_trainer, dropout):
    results = []
    for enabled in (False, True):
        task = make_task({"hidden_dropout": dropout}, gradient_checkpointing=enabled)
        assert any(layer.gradient_checkpointing for layer in task.model.encoder.layers) == enabled
        torch.manual_seed(1)
        found = losses(make_trainer, task, make_batch(), make_batch(seed=1))
        results.append((found, weights(task)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert_same(results[1][1], results[0][1], atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_give_the_same_loss(make_trainer, monkeypatch):
    calls = []

    def backend(graph, _inputs):
        calls.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    expected = losses(make_trainer, make_task(), make_batch(4))
    found = losses(make_trainer, make_task(compile=True), make_batch(4))
    assert calls
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.filterwarnings("ignore:ASSR has not acted on")
@pytest.mark.parametrize("callback", [SpectralMonitor, ASSR])
def test_callbacks_of_this_library_run_on_it(make_trainer, callback):
    trainer = make_trainer(max_steps=1, callbacks=[callback(every_n_steps=1)])
    trainer.fit(make_task(), loader(make_batch(4)))
    assert trainer.global_step == 1


def test_a_term_that_is_not_finite_is_named(make_trainer):
    task = make_task()
    with torch.no_grad():
        task.model.heads.anchor.output.bias.fill_(math.nan)
    trainer = make_trainer(max_steps=1, callbacks=[NonFiniteGuard()])
    with pytest.warns(UserWarning, match="loss term 'anchor' is not finite"):
        trainer.fit(task, loader(make_batch(4)))


def test_anchors_and_positives_of_the_last_step_can_be_read(make_trainer):
    task = make_task()
    assert task.last_representations() is None
    losses(make_trainer, task, make_batch(4))
    rows = task.last_representations()
    assert rows["semantic"].shape == (4, 2, 64)
    assert rows["spectral"].shape == (4, 2, 16)
    assert not rows["semantic"].requires_grad


def test_a_scheduler_of_ones_own_needs_no_other_setting(make_trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = SentenceEmbedding(TINY, lr_scheduler=ConstantLR)
    assert task.schedule.warmup_steps == 0


def test_only_matrices_decay():
    seen = []

    def optimizer(groups):
        seen.extend(groups)
        return AdamW(groups)

    task = make_task(optimizer=optimizer)
    task.trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1
    )
    task.configure_optimizers()
    decaying = {id(w) for group in seen if group["weight_decay"] for w in group["params"]}
    for name, weight in task.model.named_parameters():
        is_table = name.endswith(("tokens.weight", "positions.weight", "ranking.basis"))
        is_matrix = weight.ndim == 2 and not is_table
        assert (id(weight) in decaying) == is_matrix, name


@pytest.mark.parametrize("dims", [(64,), (64, 32), (64, 48, 32, 16)])
def test_the_semantic_term_weighs_the_same_whatever_the_number_of_prefixes(dims):
    found = make_task({"semantic_dims": dims}).loss.semantic_dims
    assert found.dims == dims
    assert sum(found.weights) == pytest.approx(sum(SpectraLoss().semantic_dims.weights))
