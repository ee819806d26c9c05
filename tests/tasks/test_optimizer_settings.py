"""An optimizer named on the command line has the defaults of its own class, in every task."""

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from spectral_lightning.optim import MuonAdamW, RoleAdamW, parameter_groups
from spectral_lightning.tasks import Classification, HFCausalLM, LanguageModeling

TASKS = (LanguageModeling, HFCausalLM, Classification)


def settings(optimizer):
    """Of its only group, without the parameters."""
    (group,) = optimizer.param_groups
    return {name: value for name, value in group.items() if name != "params"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, RoleAdamW, MuonAdamW])
def test_a_named_optimizer_has_the_defaults_of_its_class(task, optimizer):
    parser = ArgumentParser()
    parser.add_class_arguments(task, "task", skip={"model"}, instantiate=False)
    name = f"{optimizer.__module__}.{optimizer.__qualname__}"
    built = parser.instantiate_classes(parser.parse_args([f"--task.optimizer={name}"]))
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "role": "vector"}]
    assert settings(built.task.optimizer(groups)) == settings(optimizer(groups))


def test_none_is_the_optimizer_that_a_task_tells(make_bigram):
    groups = parameter_groups(nn.Linear(2, 2))
    assert type(LanguageModeling(make_bigram()).optimizer(groups)) is MuonAdamW
    assert type(Classification(nn.Linear(2, 2)).optimizer(groups)) is torch.optim.AdamW
