import pytest
import torch
from torch import nn

from spectral_lightning.linalg import leading_eigenpairs
from spectral_lightning.spectra import Need, SpectrumCache, find_targets
from spectral_lightning.spectra.target import Target
from spectral_lightning.spectra.tracker import Tracker


@pytest.fixture
def make_tracker():
    """A tracker of copies of some matrices, and the layers whose weights it reads."""

    def make(weights, **settings):
        layers = [nn.Linear(*weight.shape[::-1], bias=False) for weight in weights]
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = nn.Parameter(weight.clone())
        targets = [Target(name=f"layer{i}", module=layer) for i, layer in enumerate(layers)]
        return Tracker(targets, **settings), layers

    return make


@pytest.fixture
def spectral_norms():
    """True spectral norms of some layers of one shape, in float64."""

    def norms(layers):
        weights = torch.stack([layer.weight.detach().double() for layer in layers])
        return torch.linalg.matrix_norm(weights, 2)

    return norms


@pytest.fixture
def accelerator_route(monkeypatch):
    """Solve small eigenproblems by products as on an accelerator, where `eigh` would wait."""

    def by_products(matrix):
        size = matrix.shape[-1]
        values, rows = leading_eigenpairs(matrix, size if size <= 8 else 6)
        return values.flip(-1), rows.flip(-2).mT

    monkeypatch.setattr(torch.linalg, "eigh", by_products)


@pytest.fixture
def make_cache():
    """A cache that has been asked for all matrices of a model, at every step by default."""

    def make(model, *needs, wait=None, seed=0):
        found = find_targets(model)
        names = frozenset(target.name for target in found.targets)
        cache = SpectrumCache(seed=seed, wait=wait)
        for need in needs or ({},):
            cache.declare(Need(**{"names": names} | need), found.targets)
        return cache

    return make


@pytest.fixture
def model():
    """Layers of several shapes and dtypes, one of them frozen, with weights from a seed."""
    generator = torch.Generator().manual_seed(0)
    layers = {
        "wide": nn.Linear(48, 40),
        "same": nn.Linear(48, 40),
        "tall": nn.Linear(36, 50),
        "small": nn.Linear(5, 7),
        "bfloat16_": nn.Linear(48, 40, dtype=torch.bfloat16),
        "float64_": nn.Linear(34, 34, dtype=torch.float64),
    }
    for layer in layers.values():
        weight = torch.randn(layer.weight.shape, generator=generator)
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype))
    layers["same"].requires_grad_(False)
    return nn.ModuleDict(layers)
