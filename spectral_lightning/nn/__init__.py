"""Layers whose weight has a form that can be changed while training."""

from spectral_lightning.nn.factored import FactoredLinear, factorize

__all__ = ["FactoredLinear", "factorize"]
