"""Blocks of the GPT: rotary positions, attention, feed-forward. No layer has a bias or a gain."""

# Shape suffixes: B batch, T tokens, S tokens so far (cache included), C model dimension,
# H query heads, K key/value heads, D head dimension.

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from spectral_lightning.models.kv_cache import KVCache

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the positions' angles, each of shape ``(T, D / 2)``; see `rotary_table`."""
ROTARY_BASE = 10_000.0  # Su et al. 2021, sec. 3.2.2; nanochat of November 2025


def rms_norm(x: Tensor) -> Tensor:
    """Scale the last dimension to root mean square one, without weights.

    Args:
        x: Any shape ``(..., C)``, floating point.

    Returns:
        Tensor of the same shape and dtype.

    References:
        Zhang and Sennrich (2019), https://arxiv.org/abs/1910.07467.
    """
    return F.rms_norm(x, (x.shape[-1],))


def rotary_table(start: int, stop: int, head_dim: int, device: torch.device) -> Rotation:
    """Return cosine and sine of the rotation angle of every position and channel pair.

    Computed anew in every forward pass, which costs less than one layer's norm: a buffer would be
    lost in meta-device construction and rounded by ``module.bfloat16()``.

    Args:
        start: First position, 0 or more.
        stop: One past the last position.
        head_dim: Channels per head, even.
        device: Where to compute.

    Returns:
        Two tables of shape ``(stop - start, head_dim / 2)``, float32.

    References:
        Su et al. (2021), "RoFormer", sec. 3.2.2. https://arxiv.org/abs/2104.09864
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    positions = torch.arange(start, stop, dtype=torch.float32, device=device)
    angles = torch.outer(positions, ROTARY_BASE ** (-channels / head_dim))
    return angles.cos(), angles.sin()


def rotate(x_BHTD: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the channel pairs ``(i, i + D/2)`` of each position by minus its angles.

    The direction is that of nanochat and the opposite of the paper's; scores between queries and
    keys see only differences of angles, but trained weights depend on the convention.

    Args:
        x_BHTD: Queries or keys, shape ``(B, H, T, D)``.
        rotation: Cosines and sines from `rotary_table`, each of shape ``(T, D / 2)``.

    Returns:
        Tensor of the same shape and dtype.
    """
    cos, sin = (table.to(x_BHTD.dtype) for table in rotation)
    first, second = x_BHTD.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class CausalSelfAttention(nn.Module):
    """Each token's weighted mean over itself and the tokens before it.

    Queries and keys are rotated by their position and, with `qk_norm`, then normalised (Henry et
    al. 2020, https://arxiv.org/abs/2010.04245), so their scale in the weights has no effect. Fewer
    key/value heads than query heads share keys and values among groups of queries (Ainslie et
    al. 2023, https://arxiv.org/abs/2305.13245).

    Args:
        layer: Index of the layer in the key/value cache.
        model_dim: Width of the residual stream.
        num_heads: Query heads; divides `model_dim`.
        num_kv_heads: Key/value heads; divides `num_heads`.
        qk_norm: Whether queries and keys are normalised.
    """

    def __init__(
        self, layer: int, model_dim: int, num_heads: int, num_kv_heads: int, *, qk_norm: bool = True
    ) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.qk_norm = qk_norm
        kv_dim = model_dim // num_heads * num_kv_heads
        self.c_q = nn.Linear(model_dim, model_dim, bias=False)
        self.c_k = nn.Linear(model_dim, kv_dim, bias=False)
        self.c_v = nn.Linear(model_dim, kv_dim, bias=False)
        self.c_proj = nn.Linear(model_dim, model_dim, bias=False)

    @override
    def forward(self, x_BTC: Tensor, rotation: Rotation, kv_cache: KVCache | None = None) -> Tensor:
        """Mix each token with those before it.

        Args:
            x_BTC: Normalised residual stream, shape ``(B, T, C)``.
            rotation: Cosines and sines of the tokens' positions, from `rotary_table`.
            kv_cache: Keys and values of earlier tokens; this layer's new ones are appended.

        Returns:
            What to add to the residual stream, shape ``(B, T, C)``.
        """
        q_BHTD = self.c_q(x_BTC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_BKTD = self.c_k(x_BTC).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        v_BKTD = self.c_v(x_BTC).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        q_BHTD, k_BKTD = rotate(q_BHTD, rotation), rotate(k_BKTD, rotation)
        if self.qk_norm:
            q_BHTD, k_BKTD = rms_norm(q_BHTD), rms_norm(k_BKTD)
        k_BKSD, v_BKSD = k_BKTD, v_BKTD
        if kv_cache is not None:
            k_BKSD, v_BKSD = kv_cache.append(self.layer, k_BKSD, v_BKSD)
        num_new, num_all = q_BHTD.shape[2], k_BKSD.shape[2]
        mask = None
        if 1 < num_new < num_all:  # a chunk after cached tokens: token t sees all up to itself
            mask = torch.ones(num_new, num_all, dtype=torch.bool, device=x_BTC.device)
            mask = mask.tril(num_all - num_new)
        y_BHTD = F.scaled_dot_product_attention(
            q_BHTD,
            k_BKSD,
            v_BKSD,
            attn_mask=mask,
            is_causal=num_new == num_all,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        mixed: Tensor = self.c_proj(y_BHTD.transpose(1, 2).flatten(-2))
        return mixed


class MLP(nn.Module):
    """Two linear layers around a squared ReLU, four times as wide in the middle.

    Args:
        model_dim: Width of the residual stream.

    References:
        So et al. (2021), "Primer", sec. 4 (squared ReLU). https://arxiv.org/abs/2109.08668
    """

    def __init__(self, model_dim: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(model_dim, 4 * model_dim, bias=False)
        self.c_proj = nn.Linear(4 * model_dim, model_dim, bias=False)

    @override
    def forward(self, x_BTC: Tensor) -> Tensor:
        """Transform each token of `x_BTC`, shape ``(B, T, C)``, by itself; keeps the shape."""
        y_BTC: Tensor = self.c_proj(F.relu(self.c_fc(x_BTC)).square())
        return y_BTC


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream.

    Args:
        layer: Index of the layer in the key/value cache.
        model_dim: Width of the residual stream.
        num_heads: Query heads; divides `model_dim`.
        num_kv_heads: Key/value heads; divides `num_heads`.
        qk_norm: Whether queries and keys are normalised.
    """

    def __init__(
        self, layer: int, model_dim: int, num_heads: int, num_kv_heads: int, *, qk_norm: bool = True
    ) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(layer, model_dim, num_heads, num_kv_heads, qk_norm=qk_norm)
        self.mlp = MLP(model_dim)

    @override
    def forward(self, x_BTC: Tensor, rotation: Rotation, kv_cache: KVCache | None = None) -> Tensor:
        """Return the residual stream ``(B, T, C)`` with this layer's two contributions added."""
        attended_BTC: Tensor = x_BTC + self.attn(rms_norm(x_BTC), rotation, kv_cache)
        transformed_BTC: Tensor = self.mlp(rms_norm(attended_BTC))
        return attended_BTC + transformed_BTC
