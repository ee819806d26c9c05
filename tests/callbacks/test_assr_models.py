"""ASSR on models of others: every layer is found, a spike is healed, the rest is left alone."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from spectral_lightning.callbacks import ASSR
from spectral_lightning.control import Regulator, Thermostat
from spectral_lightning.testing.models import plant_spike_, relative_stable_rank, tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore:ASSR finds .* outside their bands at once")

FLOOR = 0.3


def healing(**settings):
    regulator = Regulator(
        calibration="static", floor=FLOOR, thermostat=Thermostat(strength=60.0), **settings
    )
    return ASSR(regulator=regulator, spectrum_every_n_steps=None, table_rows=0)


class Task(pl.LightningModule):
    """Train a model on one batch, again and again."""

    def __init__(self, model, loss, *batch):
        super().__init__()
        self.model, self.loss, self.batch = model, loss, batch

    def training_step(self, batch, batch_idx):
        return self.loss(self.model, *self.batch)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    def train_dataloader(self):
        return torch.utils.data.DataLoader([0] * 100, batch_size=1)


def gpt2_task():
    tokens = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(1))
    return Task(tiny_gpt2(), lambda model, x: model(input_ids=x, labels=x).loss, tokens)


def vit_task():
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=5,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(config).train()
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(4, 3, 16, 16, generator=generator), torch.arange(4)

    def loss(model, x, y):
        return model(pixel_values=x, labels=y).loss

    return Task(model, loss, images, labels)


def convolutional_task():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, groups=4),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 5),
        )
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)
    return Task(model, lambda model, x, y: F.cross_entropy(model(x), y), images, labels)


def blocks(path, parts):
    return {f"model.{path}.{block}.{part}" for block in range(2) for part in parts}


GPT2_LAYERS = {
    "model.lm_head",  # the same weight as the token embedding, which is no matrix product
    *blocks("transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
}
VIT_LAYERS = {
    "model.vit.embeddings.patch_embeddings.projection",
    "model.classifier",
    *blocks("vit.layers", [f"attention.{part}_proj" for part in "qkvo"]),
    *blocks("vit.layers", ("mlp.fc1", "mlp.fc2")),
}
CONVOLUTIONAL_LAYERS = {"model.0", "model.3", "model.5", "model.8"}


@pytest.mark.parametrize(
    ("make_task", "layers", "spiked"),
    [
        (gpt2_task, GPT2_LAYERS, "model.transformer.h.0.attn.c_attn"),
        (vit_task, VIT_LAYERS, "model.vit.layers.1.attention.o_proj"),
        (vit_task, VIT_LAYERS, "model.vit.embeddings.patch_embeddings.projection"),
        (convolutional_task, CONVOLUTIONAL_LAYERS, "model.3"),
        (convolutional_task, CONVOLUTIONAL_LAYERS, "model.5"),
    ],
    ids=["Conv1D", "attention", "patches", "Conv2d", "grouped Conv2d"],
)
def test_all_layers_are_found_and_only_the_spiked_one_is_moved(fit, make_task, layers, spiked):
    task, assr = make_task(), healing()
    weight = task.get_submodule(spiked).weight
    plant_spike_(weight, 8.0)
    assert relative_stable_rank(weight) < FLOOR / 2
    fit(assr, task=task, max_steps=80)
    assert set(assr.interventions) == layers
    assert relative_stable_rank(weight) > FLOOR
    acted = {name for name, done in assr.interventions.items() if done.num_interventions}
    assert acted == {spiked}
    assert assr.interventions[spiked].side == 0


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter that adds nothing yet."""

    def __init__(self, width, rank):
        super().__init__()
        self.base = nn.Linear(width, width)
        self.base.weight.requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapted_task():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second, third = (nn.Linear(32, 32) for _ in range(3))
        second.weight = first.weight
        model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third, Adapted(32, 8))
    x, y = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    return Task(model, lambda model, x, y: F.mse_loss(model(x), y), x, y)


@pytest.mark.filterwarnings("ignore:ASSR. model.5.up is skipped, as the weight is zero")
@pytest.mark.parametrize("spiked", ["model.0", "model.4"], ids=["tied", "beside tied"])
def test_a_tied_weight_is_one_layer_and_a_frozen_one_is_left_alone(fit, spiked):
    task, assr = adapted_task(), healing()
    plant_spike_(task.get_submodule(spiked).weight, 8.0)
    plant_spike_(task.model[5].base.weight, 8.0)
    frozen = task.model[5].base.weight.clone()
    fit(assr, task=task, max_steps=80)
    assert set(assr.names) == {"model.0", "model.4", "model.5.base", "model.5.down", "model.5.up"}
    assert set(assr.interventions) == set(assr.names) - {"model.5.base"}
    assert task.model[0].weight is task.model[2].weight
    assert relative_stable_rank(task.get_submodule(spiked).weight) > FLOOR
    assert torch.equal(task.model[5].base.weight, frozen)
    other = ({"model.0", "model.4"} - {spiked}).pop()
    assert assr.interventions[other].num_interventions == 0


def test_an_adapter_that_starts_at_zero_is_named_and_can_leave_zero(fit, caplog):
    task, assr = adapted_task(), healing()
    with caplog.at_level("INFO"):
        fit(assr, task=task, max_steps=20)
    assert "model.5.up is zero, and left alone until training moves it" in caplog.text
    assert assr.interventions["model.5.up"].num_skipped == 0
    assert assr.interventions["model.5.down"].num_interventions == 0
    assert 0 < task.model[5].up.weight.norm() < 1
    assert torch.isfinite(task.model[5].up.weight).all()
