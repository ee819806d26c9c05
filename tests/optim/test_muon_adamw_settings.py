"""MuonAdamW as a user sets it up: from YAML, and what it refuses."""

import math

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from spectral_lightning.optim import MuonAdamW, parameter_groups


@pytest.fixture
def model():
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 7))


# jsonargparse 4.49 renamed `instantiate_classes`; older supported versions know only this name.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_yaml_file_builds_the_optimizer(model):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=OptimizerCallable)
    parser.add_argument("--schedule", type=LRSchedulerCallable)
    text = """
    optimizer:
      class_path: spectral_lightning.optim.MuonAdamW
      init_args: {lr: 0.03, betas: [0.7, 0.9], ns_dtype: bfloat16}
    schedule:
      class_path: spectral_lightning.optim.WarmupConstantWarmdown
      init_args: {num_steps: 50, warmup_steps: 10}
    """
    built = parser.instantiate_classes(parser.parse_string(text))
    optimizer = built.optimizer(parameter_groups(model))
    built.schedule(optimizer)
    assert isinstance(optimizer, MuonAdamW)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.003)
    assert optimizer.param_groups[1]["betas"] == (0.7, 0.9)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([torch.zeros(2, 2)], r"`params` must be groups with a `role` .*, got None; pass `param"),
        (
            [{"params": [torch.zeros(2, 2)], "role": "gate"}],
            r"a `role` out of matrix, embedding, head, vector, got 'gate'; pass",
        ),
        (
            [{"params": [torch.zeros(3)], "role": "matrix"}],
            r"only 2-D tensors in the matrix group, got shape \(3,\); give it the role vector",
        ),
        (
            [{"params": [nn.Parameter(torch.zeros(2))] * 2, "role": "vector"}],
            r"`params` must name each parameter once, got one twice in the vector group\.",
        ),
        ([], "optimizer got an empty parameter list"),
    ],
)
def test_params_that_cannot_be_optimized_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        MuonAdamW(params)


def test_a_parameter_in_two_groups_is_refused():
    parameter = nn.Parameter(torch.zeros(2, 2))
    groups = [{"params": [parameter], "role": role} for role in ("matrix", "vector")]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        MuonAdamW(groups)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = MuonAdamW([{"params": [embedding.weight], "role": "embedding"}])
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"dense gradients, got a sparse one in the embedding gro"):
        optimizer.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, r"`lr` must be finite and >= 0, got -0\.1\."),
        ({"embedding_lr": math.nan}, r"`embedding_lr` must be finite and >= 0, got nan\."),
        ({"head_lr": math.inf}, r"`head_lr` must be finite and >= 0, got inf\."),
        ({"vector_lr": -1.0}, r"`vector_lr` must be finite and >= 0, got -1\.0\."),
        ({"eps": -1.0}, r"`eps` must be finite and >= 0, got -1\.0\."),
        ({"weight_decay": -1.0}, r"`weight_decay` must be finite and >= 0, got -1\.0\."),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\), got 1\.0\."),
        ({"momentum_start": -0.5}, r"`momentum_start` must be in \[0, 1\), got -0\.5\."),
        ({"betas": (0.9, 1.0)}, r"`betas` must be in \[0, 1\), got \(0\.9, 1\.0\)\."),
        ({"momentum_warmup_steps": -1}, r"`momentum_warmup_steps` must be >= 0, got -1\."),
        ({"ns_steps": 0}, r"`ns_steps` must be >= 1, got 0\."),
        ({"ns_dtype": "float8"}, r"must be float32, bfloat16 or None, got 'float8'\."),
    ],
)
def test_a_setting_outside_its_range_is_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        MuonAdamW(parameter_groups(model), **settings)
