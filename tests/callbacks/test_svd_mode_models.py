"""Mode switching in whole models: attention and MLP, ours and Hugging Face's, both optimizers."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_lightning.callbacks import SVDModeSwitch
from spectral_lightning.control import ScheduledPolicy, SeedPolicy
from spectral_lightning.models import GPT
from spectral_lightning.optim import MuonAdamW, parameter_groups
from spectral_lightning.testing.tasks import TinyTask

LOW = ScheduledPolicy(schedule={2: "lowrank", 6: "full"}, principal=0.25)
WORDS = torch.tensor([list(b"the rank of a matrix")]).repeat(4, 1)


class Task(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        found = self.model(batch)
        logits = getattr(found, "logits", found)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self):
        return MuonAdamW(parameter_groups(self.model), weight_decay=0.1)

    def train_dataloader(self):
        return DataLoader([WORDS] * 40, batch_size=None)


def gpt(depth=4):
    return GPT(depth, 256, 32, model_dim=32, head_dim=16)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=48,
            num_attention_heads=2,
            vocab_size=256,
            max_position_embeddings=32,
        )
    )


@pytest.mark.parametrize(
    ("glob", "count"),
    [("*.blocks.0.attn.c_q", 1), ("*.attn.*", 16), ("*.mlp.*", 8), ("*.blocks.*", 24)],
)
def test_globs_select_one_layer_all_attention_or_all_layers(fit, glob, count):
    switch = SVDModeSwitch(glob, 2, LOW)
    fit(switch, task=Task(gpt()), max_steps=5)
    assert len(switch.names) == count
    assert {state.mode for state in switch.modes.values()} == {"lowrank"}


@pytest.mark.parametrize("make", [gpt, llama])
@pytest.mark.parametrize("protection", ["gradients", "two_sided", "factored"])
def test_any_model_learns_on_through_both_modes(fit, make, protection):
    task = Task(make())
    switch = SVDModeSwitch("*", 2, LOW, protection)
    losses = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            losses.append(outputs["loss"].item())

    fit(switch, Keep(), task=task, max_steps=30)
    assert all(state.num_switches >= 2 for state in switch.modes.values())
    assert losses[-1] < 0.7 * losses[0]
    logits = task.model(WORDS)
    assert torch.isfinite(getattr(logits, "logits", logits)).all()


def test_parts_of_a_fused_projection_are_switched_by_themselves(fit):
    net = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 6))
    switch = SVDModeSwitch("net.0", 1, LOW, splits={"net.0": {"q": 12, "kv": 12}})
    fit(switch, task=TinyTask(net), max_steps=5)
    assert set(switch.parts) == {"net.0.q", "net.0.kv"}
    for name, part in switch.parts.items():
        assert part.change(switch.spectra.targets[name].matrix()) < 1e-5


def test_the_originals_policy_switches_by_itself_and_its_rank_falls(fit):
    """The original's run, small: gradients that keep to a few directions are taken for danger."""
    task = Task(gpt(2))
    policy = SeedPolicy(preset="phase1", initial_principal=10)
    switch = SVDModeSwitch("*.attn.c_q", 5, policy, "two_sided")
    fit(switch, task=task, max_steps=40)
    states = switch.modes.values()
    assert any(state.mode == "lowrank" and state.rank < 22 for state in states)
