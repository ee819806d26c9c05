"""AdamW with a rate for each role: the rates, the steps of PyTorch's AdamW, and refusals."""

import copy
import pickle

import pytest
import torch
from torch import nn

from spectral_lightning.nn import LowRankLinear
from spectral_lightning.optim import RoleAdamW, WarmupConstantWarmdown, parameter_groups


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 6), LowRankLinear(6, 6, 2), nn.Linear(6, 9))


def rates(optimizer):
    return {group["role"]: group["lr"] for group in optimizer.param_groups}


def test_each_role_has_its_rate_and_factors_are_matrices(model):
    optimizer = RoleAdamW(parameter_groups(model), 1e-3, matrix_lr=2e-4, head_lr=5e-4, vector_lr=0)
    assert rates(optimizer) == {"matrix": 2e-4, "embedding": 1e-3, "head": 5e-4, "vector": 0}
    optimizer = RoleAdamW(parameter_groups(model), 1e-3, embedding_lr=0.1, weight_decay=0.3)
    assert rates(optimizer)["embedding"] == 0.1
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}


def test_a_group_of_its_own_rate_keeps_it(model):
    groups = parameter_groups(model)
    groups[0]["lr"] = 0.5
    assert rates(RoleAdamW(groups, matrix_lr=2e-4))["matrix"] == 0.5


def test_steps_are_those_of_adamw_with_these_groups(model):
    twin = copy.deepcopy(model)
    ours = RoleAdamW(parameter_groups(model), 1e-2, matrix_lr=1e-3, weight_decay=0.1)
    groups = parameter_groups(twin)
    for group in groups:
        group["lr"] = 1e-3 if group["role"] == "matrix" else 1e-2
    theirs = torch.optim.AdamW(groups, weight_decay=0.1)
    for _ in range(3):
        for network, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            network(torch.arange(9)).square().sum().backward()
            optimizer.step()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own, other)


def test_schedules_scale_every_rate_and_copies_keep_them(model):
    optimizer = RoleAdamW(parameter_groups(model), 1e-3, matrix_lr=2e-4)
    WarmupConstantWarmdown(optimizer, num_steps=10, warmup_steps=2)
    found = rates(optimizer)
    assert found["matrix"] / found["embedding"] == pytest.approx(0.2)
    again = pickle.loads(pickle.dumps(optimizer))
    again.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "role": "matrix"})
    assert again.param_groups[-1]["lr"] == 2e-4


@pytest.mark.parametrize("name", ["matrix_lr", "embedding_lr", "head_lr", "vector_lr"])
@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_rates_outside_their_range_are_refused(model, name, rate):
    with pytest.raises(ValueError, match=f"`{name}` must be finite and >= 0, got"):
        RoleAdamW(parameter_groups(model), **{name: rate})


def test_groups_without_a_role_are_refused(model):
    with pytest.raises(ValueError, match="must be groups with a `role` out of matrix, embedding"):
        RoleAdamW(model.parameters())
