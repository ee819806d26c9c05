"""Blocks of the low-rank transformer: attention and feed-forward, with factorised projections."""

# Shape suffixes: B batch, T tokens, S tokens so far (cache included), C model dimension,
# H heads, D head dimension.

from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from spectral_lightning.models.kv_cache import KVCache
from spectral_lightning.models.low_rank_init import (
    TransformerInit,
    layer_init,
    residual_gain,
)
from spectral_lightning.nn import LowRankLinear
from spectral_lightning.nn.low_rank import Mode


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSettings:
    """How the blocks are made; `LowRankTransformer` explains the arguments.

    Raises:
        ValueError: If an argument is outside its range.
    """

    depth: int
    model_dim: int
    num_heads: int
    mlp_dim: int | None
    rank: int | None
    capacity: int | None
    mode: Mode
    mlp_bias: bool
    dropout: float
    init: TransformerInit
    bidirectional: bool

    def __post_init__(self) -> None:
        for name, value in (
            ("depth", self.depth),
            ("model_dim", self.model_dim),
            ("num_heads", self.num_heads),
            ("mlp_dim", self.hidden_dim),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}.")
        if self.model_dim % self.num_heads:
            raise ValueError(
                f"`num_heads` must divide model_dim={self.model_dim}, got {self.num_heads}."
            )
        if self.rank is None and self.capacity is not None:
            raise ValueError(
                f"`capacity` must be None for a dense model (rank=None), got {self.capacity}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout}.")
        if self.init not in get_args(TransformerInit):
            raise ValueError(
                f"`init` must be one of {get_args(TransformerInit)}, got {self.init!r}."
            )

    @property
    def hidden_dim(self) -> int:
        """Width in the middle of the feed-forward."""
        return 4 * self.model_dim if self.mlp_dim is None else self.mlp_dim

    def projection(
        self, in_features: int, out_features: int, *, bias: bool = False, residual: bool = False
    ) -> nn.Module:
        """Make one layer; `residual` says that its outputs are added to the residual stream."""
        if self.rank is None:
            return nn.Linear(in_features, out_features, bias)
        return LowRankLinear(
            in_features,
            out_features,
            self.rank,
            bias,
            capacity=self.capacity,
            mode=self.mode,
            init=layer_init(self.init),
            gain=residual_gain(self.init, self.depth) if residual else 1.0,
        )


class SelfAttention(nn.Module):
    """Each token's weighted mean over itself and the tokens before it, or over all tokens.

    Args:
        layer: Index of the layer in the key/value cache.
        settings: How the blocks are made.
    """

    def __init__(self, layer: int, settings: BlockSettings) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = settings.num_heads
        self.dropout = settings.dropout
        self.bidirectional = settings.bidirectional
        dim = settings.model_dim
        self.c_q = settings.projection(dim, dim)
        self.c_k = settings.projection(dim, dim)
        self.c_v = settings.projection(dim, dim)
        self.c_proj = settings.projection(dim, dim, residual=True)
        self.drop = nn.Dropout(settings.dropout)

    @override
    def forward(self, x_BTC: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """Mix each token with those it may see.

        Args:
            x_BTC: Normalised residual stream, shape ``(B, T, C)``.
            kv_cache: Keys and values of earlier tokens; this layer's new ones are appended.

        Returns:
            What to add to the residual stream, shape ``(B, T, C)``.
        """
        q_BHTD, k_BHSD, v_BHSD = (
            project(x_BTC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.c_q, self.c_k, self.c_v)
        )
        if kv_cache is not None:
            k_BHSD, v_BHSD = kv_cache.append(self.layer, k_BHSD, v_BHSD)
        num_new, num_all = q_BHTD.shape[2], k_BHSD.shape[2]
        mask = None
        if 1 < num_new < num_all:  # a chunk after cached tokens: token t sees all up to itself
            mask = torch.ones(num_new, num_all, dtype=torch.bool, device=x_BTC.device)
            mask = mask.tril(num_all - num_new)
        y_BHTD = F.scaled_dot_product_attention(
            q_BHTD,
            k_BHSD,
            v_BHSD,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=num_new == num_all and not self.bidirectional,
        )
        mixed: Tensor = self.drop(self.c_proj(y_BHTD.transpose(1, 2).flatten(-2)))
        return mixed


class GELUFeedForward(nn.Module):
    """Two linear layers around an exact GELU.

    Args:
        settings: How the blocks are made.
    """

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        dim, hidden_dim, bias = settings.model_dim, settings.hidden_dim, settings.mlp_bias
        self.c_fc = settings.projection(dim, hidden_dim, bias=bias)
        self.c_proj = settings.projection(hidden_dim, dim, bias=bias, residual=True)
        self.drop = nn.Dropout(settings.dropout)

    @override
    def forward(self, x_BTC: Tensor) -> Tensor:
        """Transform each token of `x_BTC`, shape ``(B, T, C)``, by itself; keeps the shape."""
        y_BTC: Tensor = self.drop(self.c_proj(F.gelu(self.c_fc(x_BTC))))
        return y_BTC


class LowRankBlock(nn.Module):
    """One layer: attention, then feed-forward, each of the normalised stream and added to it.

    Args:
        layer: Index of the layer in the key/value cache.
        settings: How the blocks are made.
    """

    def __init__(self, layer: int, settings: BlockSettings) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(settings.model_dim)
        self.attn = SelfAttention(layer, settings)
        self.ln_2 = nn.LayerNorm(settings.model_dim)
        self.mlp = GELUFeedForward(settings)

    @override
    def forward(self, x_BTC: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """Return the residual stream ``(B, T, C)`` with this layer's two contributions added."""
        attended_BTC: Tensor = x_BTC + self.attn(self.ln_1(x_BTC), kv_cache)
        transformed_BTC: Tensor = self.mlp(self.ln_2(attended_BTC))
        return attended_BTC + transformed_BTC
