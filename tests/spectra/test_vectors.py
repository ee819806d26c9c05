"""Singular vectors on request: warm starts of several consumers do not disturb each other."""

import torch
from torch import nn

from spectral_lightning.spectra import VectorCache, find_targets


def make_cache(module):
    return VectorCache({target.name: target for target in find_targets(module).targets})


def error(found, exact):
    return ((found.values - exact).abs() / exact).max().item()


def test_consumers_with_different_numbers_of_vectors_both_start_warm():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64))
    exact, cache = torch.linalg.svdvals(module[0].weight.detach()), make_cache(module)
    errors = [[error(cache.leading("0", k), exact[:k]) for k in (3, 8)] for _ in range(40)]
    assert max(errors[-1]) < 0.1 * min(errors[0])


def test_warm_starts_of_all_consumers_survive_a_checkpoint():
    module = nn.Sequential(nn.Linear(32, 32))
    caches = [make_cache(module) for _ in range(2)]
    for k in (2, 5, 2, 5):
        caches[0].leading("0", k)
    caches[1].load_state_dict(caches[0].state_dict())
    for k in (5, 2):
        first, second = (cache.leading("0", k) for cache in caches)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_start_for_another_shape_is_not_used():
    old, new = (
        make_cache(nn.Sequential(nn.Linear(32, 32))),
        make_cache(nn.Sequential(nn.Linear(16, 32))),
    )
    old.leading("0", 4)
    new.load_state_dict(old.state_dict())
    assert new.leading("0", 4).right.shape == (16, 4)
