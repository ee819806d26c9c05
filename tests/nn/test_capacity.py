"""An optimizer's state follows its factors into another capacity."""

import pytest
import torch
from torch import nn

from spectral_lightning.nn import CapacityFit, LowRankLinear


def trained(capacity):
    torch.manual_seed(0)
    model = nn.Sequential(LowRankLinear(12, 10, 3, bias=True, capacity=capacity), nn.Linear(10, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 12)).square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("capacity", [4, 10])
def test_running_means_are_cut_or_padded_behind_the_rank(capacity):
    (saved, saved_optimizer), (model, optimizer) = trained(6), trained(capacity)
    fit = CapacityFit(model)
    model.load_state_dict(fit.model_state(saved.state_dict()))
    optimizer.register_load_state_dict_pre_hook(fit.optimizer_state)
    optimizer.load_state_dict(saved_optimizer.state_dict())
    for old, new in zip(saved.parameters(), model.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            was, now = saved_optimizer.state[old][name], optimizer.state[new][name]
            assert now.shape == new.shape
            assert now.sum() == pytest.approx(was.sum().item())
    for name in ("exp_avg", "exp_avg_sq"):
        was = saved_optimizer.state[saved[0].left_factor][name][:, :3]
        assert torch.equal(optimizer.state[model[0].left_factor][name][:, :3], was)
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_the_state_of_another_optimizer_is_left_to_pytorch():
    model, optimizer = trained(6)
    optimizer.register_load_state_dict_pre_hook(CapacityFit(model).optimizer_state)
    other = torch.optim.AdamW(model[0].parameters()).state_dict()
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(other)
