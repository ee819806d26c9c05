"""Partition of parameters: every trainable one in exactly one group, by module type."""

import pytest
import torch
from torch import nn

from spectral_lightning.models import GPT
from spectral_lightning.optim import MuonAdamW, parameter_groups


def names_by_role(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        group["role"]: [names[id(parameter)] for parameter in group["params"]]
        for group in parameter_groups(model)
    }


def mixed_model():
    return nn.Sequential(
        nn.Embedding(9, 4),
        nn.Linear(4, 6),
        nn.LayerNorm(6),
        nn.Conv1d(6, 6, 1),
        nn.Linear(6, 9, bias=False),
    )


def test_gpt_splits_into_matrices_embedding_and_head():
    roles = names_by_role(GPT(depth=2, vocab_size=8, sequence_len=4))
    assert roles["embedding"] == ["wte.weight"]
    assert roles["head"] == ["lm_head.weight"]
    assert len(roles["matrix"]) == 12
    assert "vector" not in roles


def test_module_type_decides_and_the_last_linear_is_the_head():
    assert names_by_role(mixed_model()) == {
        "matrix": ["1.weight"],
        "embedding": ["0.weight"],
        "head": ["4.weight"],
        "vector": ["1.bias", "2.weight", "2.bias", "3.weight", "3.bias"],
    }


@pytest.mark.parametrize("frozen", [[], ["1.weight"], ["0.weight", "4.weight"]], ids=str)
def test_every_trainable_parameter_is_in_exactly_one_group(frozen):
    model = mixed_model()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    grouped = [name for names in names_by_role(model).values() for name in names]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)


def test_a_weight_shared_by_embedding_and_head_appears_once_as_head():
    model = mixed_model()
    model.append(nn.Linear(4, 9, bias=False))
    model[5].weight = model[0].weight
    roles = names_by_role(model)
    assert roles["head"] == ["0.weight"]
    assert "embedding" not in roles
    assert "4.weight" in roles["matrix"]


def test_a_model_can_name_its_heads():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.start = nn.Linear(3, 2)
            self.stop = nn.Linear(3, 2)
            self.body = nn.Linear(3, 3)

        def head_names(self):
            return ("start", "stop")

    roles = names_by_role(TwoHeads())
    assert roles["head"] == ["start.weight", "stop.weight"]
    assert roles["matrix"] == ["body.weight"]


def test_hugging_face_models_name_their_head_themselves():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.register_module("extra", nn.Linear(8, 8, bias=False))
    roles = names_by_role(model)
    assert roles["head"] == ["lm_head.weight"]
    assert roles["embedding"] == ["model.embed_tokens.weight"]
    assert "extra.weight" in roles["matrix"]
    assert len(roles["vector"]) == 3  # RMSNorm weights


def test_layers_of_gpt2_are_matrices_too_and_move_by_muon_as_linear_ones_do():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    theirs = nn.Sequential(conv1d(12, 4), nn.Linear(12, 9, bias=False))
    ours = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 9, bias=False))
    with torch.no_grad():
        ours[0].weight.copy_(theirs[0].weight.mT)
        ours[0].bias.copy_(theirs[0].bias)
        ours[1].weight.copy_(theirs[1].weight)
    names = [group["name"] for group in parameter_groups(theirs)]
    assert names == ["matrix_transposed", "head", "vector"]
    for model in (ours, theirs):
        optimizer = MuonAdamW(parameter_groups(model), ns_dtype="float32")
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 20).view(5, 4)).square().sum().backward()
            optimizer.step()
    assert torch.allclose(ours[0].weight, theirs[0].weight.mT, atol=1e-5)


def test_group_names_are_unique_so_that_loggers_accept_them():
    groups = parameter_groups(mixed_model())
    assert [group["name"] for group in groups] == ["matrix", "embedding", "head", "vector"]


def test_any_torch_optimizer_accepts_the_groups():
    optimizer = torch.optim.AdamW(parameter_groups(mixed_model()), lr=0.1)
    assert [group["role"] for group in optimizer.param_groups] == [
        "matrix",
        "embedding",
        "head",
        "vector",
    ]


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match=r"`model` must have a trainable parameter, got none; set"):
        parameter_groups(mixed_model().requires_grad_(False))
