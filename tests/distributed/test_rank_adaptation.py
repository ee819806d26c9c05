"""Rank adaptation on two ranks: the same ranks and weights, whole or sharded."""

import pytest
import torch

from spectral_lightning.testing.ranks import Plan

pytestmark = [
    pytest.mark.distributed,
    # Gloo in torch 2.13 says so at every barrier; Lightning chooses the call.
    pytest.mark.filterwarnings("ignore:.*barrier\\(\\).*device:UserWarning"),
]


def settings(**changes):
    ranks = {"layers": "net.[25]", "every_n_steps": 1, "shrink": "cut", "probe_steps": 2}
    return {"ranks": ranks | {"controller": Plan(ranks={2: 5, 4: 12})} | changes, "logger": False}


@pytest.mark.parametrize(
    "changes",
    [{}, {"shrink": "fade", "fade_steps": 2, "controller": Plan(ranks={2: 5})}, {"probes": 0}],
)
def test_both_ranks_change_their_layers_as_one_process_does(fit_one, fit_two, changes):
    _, weights, metrics = fit_one(**settings(**changes))
    (_, first, one), (_, second, two) = fit_two(**settings(**changes))
    assert one["ranks"] == two["ranks"] == metrics["ranks"]
    assert set(one["ranks"].values()) <= {5, 12}
    for name, weight in weights.items():
        assert torch.equal(first[name], second[name]), name
        assert weight.shape == first[name].shape


def test_a_resumed_run_equals_an_uninterrupted_one(fit_two, tmp_path):
    path, changes = tmp_path / "run.ckpt", settings()
    whole = fit_two(**changes)
    fit_two(**changes, max_steps=3, save=path)
    resumed = fit_two(**changes, ckpt_path=path)
    for (_, weights, metrics), (_, again, others) in zip(whole, resumed, strict=True):
        assert others["ranks"] == metrics["ranks"]
        assert all(torch.equal(again[name], weights[name]) for name in weights)
