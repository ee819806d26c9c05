"""What a checkpoint of the cache keeps: a resumed run reads bitwise what it would have read."""

import copy
import io

import pytest
import torch
from torch import nn

INTERVALS = {"every_n_steps": 2, "spectrum_every_n_steps": 3}


def saved(cache):
    """The state after a way through a file that holds plain containers and tensors only."""
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def train(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        noise = 0.02 * torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(noise.to(parameter.dtype))


def readings(cache):
    return {name: repr(reading) for name, reading in cache.items()}


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_a_resumed_cache_continues_bitwise(model, make_cache, stop, wait):
    model["small"].weight.data.zero_()
    cache = make_cache(model, {}, INTERVALS, wait=wait)
    for step in range(stop + 1):
        train(model, step)
        cache.measure(step)
    state, twin = saved(cache), copy.deepcopy(model)
    resumed = make_cache(twin, {}, INTERVALS, seed=17, wait=wait)
    resumed.load_state_dict(state)
    assert readings(resumed) == readings(cache)
    assert resumed.delivered_step == cache.delivered_step
    assert resumed.measure(stop) == cache.measure(stop) == []
    for step in range(stop + 1, stop + 5):
        for one, of in ((cache, model), (resumed, twin)):
            train(of, step)
            one.measure(step)
        assert readings(resumed) == readings(cache)
        assert resumed.failures == cache.failures
    cache.flush()
    resumed.flush()
    assert readings(resumed) == readings(cache)


def test_saving_neither_delivers_nor_disturbs(model, make_cache):
    cache, twin = make_cache(model), make_cache(model)
    for step in range(3):
        cache.measure(step)
        twin.measure(step)
        saved(cache)
        assert readings(cache) == readings(twin)


def test_failures_survive(model, make_cache):
    model["tall"].weight.data.zero_()
    cache = make_cache(model)
    cache.measure(0)
    cache.measure(1)
    resumed = make_cache(model)
    resumed.load_state_dict(saved(cache))
    assert resumed.failures == cache.failures
    assert set(cache.failures) == {"tall"}


def test_layers_that_are_no_more_are_left_out_and_new_ones_start_cold(model, make_cache):
    cache = make_cache(model, {"spectrum_every_n_steps": 1})
    cache.measure(0)
    cache.measure(1)
    other = nn.ModuleDict({"wide": model["wide"], "new": nn.Linear(48, 40)})
    resumed = make_cache(other, {"spectrum_every_n_steps": 1})
    resumed.load_state_dict(saved(cache))
    assert set(resumed) == {"wide"}
    assert resumed.measure(1) == ["new"]
    resumed.flush()
    assert set(resumed) == {"wide", "new"}
    for name, layer in other.items():
        truth = torch.linalg.matrix_norm(layer.weight.detach().double(), 2).item()
        assert resumed[name].spectral_norm == pytest.approx(truth, rel=1e-3)


def test_a_layer_of_another_shape_than_in_the_checkpoint_is_read_right(model, make_cache):
    cache = make_cache(model, {"spectrum_every_n_steps": 1})
    cache.measure(0)
    model["wide"] = nn.Linear(60, 35)
    resumed = make_cache(model, {"spectrum_every_n_steps": 1})
    resumed.load_state_dict(saved(cache))
    resumed.measure(1)
    resumed.flush()
    truth = torch.linalg.matrix_norm(model["wide"].weight.detach().double(), 2).item()
    assert resumed["wide"].spectral_norm == pytest.approx(truth, rel=1e-3)
    assert resumed["wide"].shape == (35, 60)


def test_warm_starts_make_the_first_reading_after_a_resume_as_cheap_as_any(model, make_cache):
    cache = make_cache(model)
    for step in range(2):
        cache.measure(step)
    resumed = make_cache(model)
    resumed.load_state_dict(saved(cache))
    resumed.measure(2)
    resumed.flush()
    assert cache.num_passes("wide") > 3
    assert resumed.num_passes("wide") == 1
