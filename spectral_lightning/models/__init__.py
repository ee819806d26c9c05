"""Models that are trained: plain PyTorch modules, without Lightning."""

from spectral_lightning.models.accounting import (
    MacsPerToken,
    ParameterCounts,
    macs_per_token,
    optimizer_bytes,
    parameter_counts,
)
from spectral_lightning.models.causality import assert_causal, assert_uses_past
from spectral_lightning.models.dense_twin import DenseTwin, dense_twin
from spectral_lightning.models.generation import CausalModel, generate
from spectral_lightning.models.gpt import GPT
from spectral_lightning.models.kv_cache import KVCache
from spectral_lightning.models.low_rank_transformer import LowRankTransformer
from spectral_lightning.models.mlp import SymbolMLP
from spectral_lightning.models.symbol_transformer import SymbolTransformer

__all__ = [
    "GPT",
    "CausalModel",
    "DenseTwin",
    "KVCache",
    "LowRankTransformer",
    "MacsPerToken",
    "ParameterCounts",
    "SymbolMLP",
    "SymbolTransformer",
    "assert_causal",
    "assert_uses_past",
    "dense_twin",
    "generate",
    "macs_per_token",
    "optimizer_bytes",
    "parameter_counts",
]
