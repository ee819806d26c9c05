"""The numbers of a reading that are relative to a random matrix of the same shape."""

import math
import statistics

import pytest
import torch
from torch import nn

from spectral_lightning.spectra import HistoryWriter


@pytest.fixture
def read(make_cache):
    """Readings of some matrices, with their exact spectra."""

    def read(*weights, num_steps=1):
        layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in weights)
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = nn.Parameter(weight)
        cache = make_cache(layers, {"spectrum_every_n_steps": 100})
        for step in range(num_steps):
            cache.measure(step)
            cache.flush()
            yield list(cache.values())

    return read


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(512, 256), (128, 768)])
def test_a_gaussian_rectangle_is_about_one_in_every_relative_number(read, shape):
    ((reading,),) = read(gaussian(*shape))
    assert reading.relative_stable_rank == pytest.approx(1, abs=0.05)
    assert reading.relative_condition_number == pytest.approx(1, abs=0.05)


def test_the_median_gaussian_square_has_a_relative_condition_number_of_about_one(read):
    (readings,) = read(*(gaussian(16, 16, seed=seed) for seed in range(200)))
    assert statistics.median(r.relative_condition_number for r in readings) == pytest.approx(
        1, abs=0.25
    )


def test_an_ill_conditioned_rectangle_is_far_above_one(read):
    weight = gaussian(128, 64)
    weight[:, 0] *= 1e-3
    ((reading,),) = read(weight)
    assert reading.relative_condition_number > 100


def test_a_single_row_has_the_condition_number_of_a_random_one(read):
    ((reading,),) = read(gaussian(1, 5))
    assert reading.relative_condition_number == 1


def test_a_singular_matrix_is_infinitely_far_from_a_random_one(read):
    ((reading,),) = read(torch.diag(torch.tensor([1.0, 0.0])))
    assert reading.relative_condition_number == math.inf


@pytest.mark.parametrize("weight", [torch.full((3, 2), math.nan), torch.empty(0, 4)])
def test_what_has_no_condition_number_has_no_relative_one(read, weight):
    ((reading,),) = read(weight)
    assert math.isnan(reading.condition_number)
    assert math.isnan(reading.relative_condition_number)


def test_a_condition_number_without_value_is_written_to_the_history_once(read, tmp_path):
    path = tmp_path / "history.jsonl"
    with HistoryWriter(path) as writer:
        for readings in read(torch.full((3, 2), math.nan), num_steps=3):
            writer.append(readings)
    lines = path.read_text().splitlines()
    assert ["relative_condition_number" in line for line in lines] == [True, False, False]
