"""Models that are trained: plain PyTorch modules, without Lightning."""

from spectral_lightning.models.generation import CausalModel, generate
from spectral_lightning.models.gpt import GPT
from spectral_lightning.models.kv_cache import KVCache

__all__ = ["GPT", "CausalModel", "KVCache", "generate"]
