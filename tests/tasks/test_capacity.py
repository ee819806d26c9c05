"""A run that goes on with another capacity is the run that it was, optimizer included."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from spectral_lightning.callbacks import RankAdaptation
from spectral_lightning.models import LowRankTransformer
from spectral_lightning.nn import LowRankLinear
from spectral_lightning.optim import MuonAdamW
from spectral_lightning.tasks import LanguageModeling
from spectral_lightning.testing.ranks import Plan

RANK, CAPACITY, SAVED = 8, 16, 10

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "muon": lambda groups: MuonAdamW(groups, lr=0.02),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
}


class Steps(pl.Callback):
    """The loss of each step, and a checkpoint after the tenth."""

    def __init__(self, path):
        self.losses, self.path = [], path

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.losses.append(outputs["loss"].item())
        if trainer.global_step == SAVED:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.ckpt"


@pytest.fixture
def run(make_trainer, make_data, path):
    """Train a low-rank model of one block, anew or from a checkpoint: losses and task."""

    def fit(optimizer, capacity=CAPACITY, *callbacks, ckpt_path=None, max_steps=2 * SAVED):
        data, steps = make_data(), Steps(path)
        torch.manual_seed(0)
        options = {"depth": 1, "model_dim": 32, "num_heads": 2, "rank": RANK, "capacity": capacity}
        model = LowRankTransformer(data.vocab_size, data.sequence_len, **options)
        task = LanguageModeling(model, OPTIMIZERS[optimizer], warmup_steps=2, warmdown_fraction=0)
        callbacks = [*callbacks, steps]
        trainer = make_trainer(max_steps=max_steps, limit_val_batches=0, callbacks=callbacks)
        trainer.fit(task, data, ckpt_path=ckpt_path)
        return steps.losses, task

    return fit


def layers(task):
    return {n: m for n, m in task.named_modules() if isinstance(m, LowRankLinear)}


@pytest.mark.parametrize("capacity", [12, 24])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_losses_go_on_as_if_nothing_had_changed(run, path, optimizer, capacity):
    expected, _ = run(optimizer)
    losses, task = run(optimizer, capacity, ckpt_path=path)
    assert losses == expected[SAVED:]
    assert {(m.capacity, m.rank) for m in layers(task).values()} == {(capacity, RANK)}


@pytest.mark.parametrize("capacity", [12, 24])
def test_muon_goes_on_with_its_momentum_at_the_rate_of_the_new_shapes(run, path, capacity):
    """Its rate is ``sqrt(max(1, m / n))`` of a matrix of shape ``(m, n)``, zeros included."""
    losses, same = run("muon", max_steps=SAVED + 1)
    other_losses, other = run("muon", capacity, ckpt_path=path, max_steps=SAVED + 1)
    assert other_losses == losses[SAVED:]
    before = torch.load(path, weights_only=True)["state_dict"]
    scale = math.sqrt(CAPACITY / capacity)
    for name, layer in layers(other).items():
        V, U = before[f"{name}.right_factor"][:RANK], before[f"{name}.left_factor"][:, :RANK]
        twin = layers(same)[name]
        moved = (layer.right_factor[:RANK] - V, layer.left_factor[:, :RANK] - U)
        expected = (twin.right_factor[:RANK] - V, scale * (twin.left_factor[:, :RANK] - U))
        for own, wanted in zip(moved, expected, strict=True):
            assert (own - wanted).norm() < 1e-4 * wanted.norm()  # 1e-5, of Newton-Schulz in float32


@pytest.mark.parametrize("capacity", [12, 24])
def test_a_fade_goes_on(run, path, capacity):
    def fading():
        return RankAdaptation("*", Plan(ranks={9: 6}), 1, fade_steps=4, probes=0)

    expected, _ = run("adamw", CAPACITY, fading())
    losses, task = run("adamw", capacity, fading(), ckpt_path=path)
    assert losses == expected[SAVED:]
    assert {layer.rank for layer in layers(task).values()} == {6}


def probing(rank):
    """Probes are at work while the checkpoint is written; what they find decides the growth."""
    return RankAdaptation("*", Plan(ranks={12: rank}), 12, probes=4, probe_steps=4)


@pytest.mark.parametrize("capacity", [12, 24])
def test_probes_go_on_where_there_is_room(run, path, capacity):
    expected, whole = run("adamw", CAPACITY, probing(10))
    losses, task = run("adamw", capacity, probing(10), ckpt_path=path)
    assert losses == expected[SAVED:]
    for name, layer in layers(task).items():
        assert torch.equal(layer.spectral_weight(), layers(whole)[name].spectral_weight())


def test_probes_without_room_end(run, path):
    callback = probing(RANK)
    run("adamw", CAPACITY, callback, max_steps=SAVED)
    states = torch.load(path, weights_only=True)["callbacks"][callback.state_key]["layers"]
    assert all(len(state["probe"]["rows"]) == 4 for state in states.values())
    _, task = run("adamw", 10, probing(RANK), ckpt_path=path)
    assert not any(layer.left_factor[:, RANK:].any() for layer in layers(task).values())


def test_an_average_of_the_weights_goes_on_too(run, path):
    _, whole = run("adamw", CAPACITY, EMAWeightAveraging(decay=0.9))
    _, task = run("adamw", 12, EMAWeightAveraging(decay=0.9), ckpt_path=path)
    for name, layer in layers(task).items():
        assert torch.equal(layer.spectral_weight(), layers(whole)[name].spectral_weight())


def test_a_state_that_cannot_follow_is_refused(run, path):
    _, task = run("adafactor")
    run("adafactor", ckpt_path=path)
    name = next(iter(layers(task)))
    message = (
        rf"The optimizer's state must have the factor's shape \(32, 16\) to follow it to \(32, 24\)"
        rf", but `row_var` of `{name}\.left_factor` is \(32, 1\); go on with the checkpoint's"
        r" `capacity`, 16, or load its weights alone"
    )
    with pytest.raises(ValueError, match=message):
        run("adafactor", 24, ckpt_path=path)
