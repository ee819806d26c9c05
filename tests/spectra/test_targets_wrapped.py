"""Discovery through wrappers, parametrizations and models of other libraries."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from spectral_lightning.spectra import Target, find_targets


def names(model, *args, **settings):
    return [target.name for target in find_targets(model, *args, **settings).targets]


def test_wrappers_do_not_show_in_names():
    plain = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Sequential(nn.Linear(4, 4))})
    model = nn.ModuleDict(
        {
            "a": torch.compile(plain["a"], backend="eager"),
            "b": checkpoint_wrapper(plain["b"]),
        }
    )
    assert names(model) == names(plain) == ["a", "b.0"]
    assert names(torch.compile(model, backend="eager")) == ["a", "b.0"]
    assert names(model, "b.*") == ["b.0"]


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_a_parametrized_weight_is_read_as_evaluation_uses_it(kind):
    model = nn.Sequential(PARAMETRIZATIONS[kind](nn.Linear(5, 5)))
    (target,) = find_targets(model).targets
    found = target.matrix()
    assert target.trainable
    assert target.shape == (5, 5)
    assert torch.equal(found, model.eval()[0].weight.detach())
    assert not found.requires_grad


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_looking_at_a_parametrized_weight_in_training_changes_nothing(kind):
    """The power iteration of `spectral_norm` moves its vectors whenever the weight is computed."""
    model = nn.Sequential(PARAMETRIZATIONS[kind](nn.Linear(5, 4))).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (target,) = find_targets(model).targets
    target.matrix()
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(module.training for module in model.modules())


def test_what_is_behind_a_parametrization_is_not_measured_as_well():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(3, 8, 5)), nn.Linear(4, 4))
    found = find_targets(model)
    assert [(target.name, target.shape) for target in found.targets] == [
        ("0", (8, 15)),
        ("1", (4, 4)),
    ]
    assert found.skipped == {}


def test_a_parametrized_attention_projection_is_found():
    attention = nn.MultiheadAttention(6, 2)
    parametrizations.weight_norm(attention, "in_proj_weight")
    assert names(nn.ModuleDict({"a": attention})) == ["a.q", "a.k", "a.v", "a.out_proj"]


def test_a_parametrization_with_a_frozen_original_is_marked_as_frozen():
    layer = parametrizations.orthogonal(nn.Linear(4, 4))
    layer.parametrizations.weight.original.requires_grad_(False)
    (target,) = find_targets(nn.Sequential(layer)).targets
    assert not target.trainable


def test_a_removed_parametrization_is_read_anew():
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    (target,) = find_targets(nn.Sequential(layer)).targets
    parametrize.remove_parametrizations(layer, "weight")
    layer.weight.data.fill_(3.0)
    assert target.matrix().unique().tolist() == [3.0]


class OnAppleGPU:
    """A tensor as seen on a device that this machine does not have."""

    device = torch.device("mps")

    def __init__(self, tensor):
        self.cpu = lambda: tensor


def test_a_weight_without_float64_is_brought_where_it_can_be_read(monkeypatch):
    layer = nn.Linear(4, 3)
    (target,) = find_targets(nn.Sequential(layer)).targets
    monkeypatch.setattr(Target, "stored", lambda self: OnAppleGPU(self.module.weight.detach()))
    assert torch.equal(target.matrix(), layer.weight)


@pytest.fixture(scope="module")
def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=6))


def test_gpt2_is_measured_with_output_rows_first_and_its_tied_head_once(gpt2):
    found = find_targets(gpt2)
    shapes = {target.name: target.shape for target in found.targets}
    assert shapes["transformer.h.0.attn.c_attn"] == (24, 8)
    assert shapes["transformer.h.1.mlp.c_fc"] == (32, 8)
    assert len(shapes) == 2 * 4 + 1
    assert shapes["lm_head"] == (11, 8)
    with_tables = find_targets(gpt2, embeddings=True)
    assert {"transformer.wte", "transformer.wpe"} <= {t.name for t in with_tables.targets}
    assert with_tables.skipped["lm_head"] == "shares its weight with transformer.wte"


def test_fused_rows_of_gpt2_are_those_of_its_outputs(gpt2):
    splits = {"*.c_attn": {"q": 8, "k": 8, "v": 8}}
    found = {t.name: t.matrix() for t in find_targets(gpt2, splits=splits).targets}
    fused = gpt2.transformer.h[0].attn.c_attn
    inputs = torch.randn(3, 8)
    _, keys, _ = (fused(inputs) - fused.bias).split(8, dim=-1)
    torch.testing.assert_close(inputs @ found["transformer.h.0.attn.c_attn.k"].mT, keys)


def test_all_linears_of_a_llama_are_found():
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=11,
        )
    )
    found = find_targets(model)
    assert len(found.targets) == 2 * 7 + 1
    assert found.targets[1].name == "model.layers.0.self_attn.k_proj"
    assert found.targets[1].shape == (8, 16)
    assert list(found.skipped) == ["model.embed_tokens"]


def test_experts_of_a_mixtral_are_found_one_by_one():
    model = MixtralForCausalLM(
        MixtralConfig(
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
            vocab_size=11,
        )
    )
    experts = find_targets(model, "*experts*").targets
    assert len(experts) == 3 * 2
    assert {target.shape for target in experts} == {(24, 8), (8, 12)}
    assert all(target.matrix().ndim == 2 for target in experts)
