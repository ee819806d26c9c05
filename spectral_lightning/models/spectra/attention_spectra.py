"""Attention with enriched logits, and a second branch of squared sigmoids beside it."""

# B batch, A heads, S tokens, D head dimension (last of a factor: D * 2^t after t enrichments).

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_spectra import SpectraConfig

FRACTAL_START = 0.02  # the original's
FUSION_START = 0.1  # the original's
FUSION_LIMIT = 0.5  # the original's
MASKED_LOGIT = -10_000.0  # of the original; see `original_attention`

# Least squared norm of a row of products, relative to the squared norms of all queries and keys
# (typically 1e-9): below it a row counts as zero.
_LEAST_ENERGY = 1e-20


def fractal_factors(
    query: Tensor, key: Tensor, weights: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Factors whose product is the enriched attention logits.

    One enrichment turns the logits ``A`` into ``A + w * rownorm(A A^T)``, where the rows of
    ``A A^T`` are scaled to norm one: tokens attend more to tokens that attend alike. With
    ``A = Q K^T``, ``G = K^T K`` and ``C = Q^T Q`` over the tokens that are no padding, the second
    term is ``R Q^T / n`` with ``R = Q G`` and ``n_i^2 = r_i C r_i^T``, so the new logits are the
    product of ``[Q, w R / n]`` and ``[K, Q]``. That is exact, costs ``O(S D^2)`` in place of
    ``O(S^3)``, and holds again for the new factors. Computed in float32 at least; a token of no
    query keeps its logits.

    Args:
        query: Queries times the scale of the logits, shape ``(B, A, S, D)``.
        key: Keys, of the same shape.
        weights: One weight per enrichment, shape ``(F,)``.
        mask: True for tokens that are no padding, shape ``(B, S)``; None if all are.

    Returns:
        Two factors of shape ``(B, A, S, D * 2 ** F)``, in the dtype of `query`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        left, right = query.to(dtype), key.to(dtype)
        valid = None if mask is None else mask[:, None, :, None].to(dtype)
        for weight in weights.to(dtype).unbind():
            unit, scale = _unit(left, valid)
            keys, _ = _unit(right, valid)
            # Both scales cancel in rows / norm: they only keep the numbers near one.
            rows = left / scale @ (keys.mT @ keys)
            energy = ((rows @ (unit.mT @ unit)) * rows).sum(dim=-1, keepdim=True)
            directions = rows / energy.clamp_min(_LEAST_ENERGY).sqrt()
            left = torch.cat((left, weight * directions), dim=-1)
            right = torch.cat((right, unit), dim=-1)
    return left.to(query.dtype), right.to(query.dtype)


def _unit(rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows without padding, scaled to Frobenius norm one, and the scale; no gradient through it."""
    rows = rows if valid is None else rows * valid
    scale = torch.linalg.vector_norm(rows.detach(), dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    return rows / scale, scale


def original_attention(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Compute the original's main branch, with its flaws.

    Masked logits are -10000 before the enrichment, which then is the same for all keys of a padded
    row, and overflows in float16. Costs ``O(S^3)``. For reproduction only.

    Args:
        query: As for `fractal_factors`.
        key: As for `fractal_factors`.
        value: Values, shape ``(B, A, S, D)``.
        weights: As for `fractal_factors`; None for no enrichment.
        mask: As for `fractal_factors`.

    Returns:
        Outputs of the heads, shape ``(B, A, S, D)``.
    """
    logits = query @ key.mT
    if mask is not None:
        logits = logits + MASKED_LOGIT * (~mask[:, None, None, :]).to(logits.dtype)
    for weight in () if weights is None else weights.unbind():
        logits = logits + weight * F.normalize(logits @ logits.mT, dim=-1)
    return logits.softmax(dim=-1) @ value


class SpectraAttention(nn.Module):
    """Self-attention with enriched logits, and the spectral branch added to it.

    Args:
        config: Shape and options.
    """

    fractal: Tensor | None

    def __init__(self, config: SpectraConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = (dim // self.num_heads) ** -0.5
        self.original = config.compat == "original"
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self.o_proj.writes_to_residual = True  # type: ignore[assignment]
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.spectral = SpectralBranch(config) if config.use_spectral else None
        start = torch.full((config.fractal_depth,), FRACTAL_START)
        if config.fractal_depth == 0:
            self.fractal = None
        elif config.learnable_fractal:
            self.fractal = nn.Parameter(start)
        else:
            self.register_buffer("fractal", start)

    def reset_gates(self) -> None:
        """Overwrite the weights of the enrichments with their initial value."""
        if self.fractal is not None:
            nn.init.constant_(self.fractal, FRACTAL_START)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Mix tokens.

        Args:
            hidden: Shape ``(B, S, H)``.
            mask: True for tokens that are no padding, shape ``(B, S)``; None if all are.

        Returns:
            What is added to the residual stream, shape ``(B, S, H)``.
        """
        query, key, value = (
            layer(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = query * self.scale
        if self.original:
            mixed = original_attention(query, key, value, self.fractal, mask)
        else:
            mixed = self._attend(query, key, value, mask)
        mixed = self.o_proj(self.dropout(mixed.transpose(1, 2).flatten(2)))
        return mixed if self.spectral is None else mixed + self.spectral(hidden, mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        head_dim = value.shape[-1]
        if self.fractal is not None:
            query, key = fractal_factors(query, key, self.fractal, mask)
            # Fused kernels want values as wide as keys: 2.7 times as fast, seen on one CPU core.
            value = F.pad(value, (0, key.shape[-1] - head_dim))
        attended = None
        if mask is not None:  # a row without tokens attends to its padding: finite, and unused
            attended = (mask | ~mask.any(dim=-1, keepdim=True))[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attended, scale=1.0)
        return mixed[..., :head_dim]


class SpectralBranch(nn.Module):
    """Mean of values weighted by squared sigmoids, behind a gate in (0, 0.5).

    The weights do not compete as those of a softmax do. The original sums over padding too and
    without dividing by the number of tokens, and its gate is clamped, so that it can die.

    Args:
        config: Shape and options.
    """

    gate: Tensor

    def __init__(self, config: SpectraConfig) -> None:
        super().__init__()
        hidden_size, dim = config.hidden_size, config.spectral_dim
        self.scale = dim**-0.5
        self.original = config.compat == "original"
        self.q_proj = nn.Linear(hidden_size, dim)
        self.k_proj = nn.Linear(hidden_size, dim)
        self.v_proj = nn.Linear(hidden_size, dim)
        self.o_proj = nn.Linear(dim, hidden_size)
        self.o_proj.writes_to_residual = True  # type: ignore[assignment]
        start = torch.full((1,), self._gate_start())  # FSDP shards no scalars
        if config.learnable_fusion:
            self.gate = nn.Parameter(start)
        else:
            self.register_buffer("gate", start)

    def _gate_start(self) -> float:
        share = FUSION_START / FUSION_LIMIT
        return FUSION_START if self.original else math.log(share / (1 - share))

    def reset_gates(self) -> None:
        """Overwrite the gate with its initial value."""
        nn.init.constant_(self.gate, self._gate_start())

    def fusion(self) -> Tensor:
        """Return the factor on this branch, shape ``(1,)``, between 0 and 0.5; 0.1 at first."""
        if self.original:
            return self.gate.clamp(0, FUSION_LIMIT)
        return FUSION_LIMIT * self.gate.sigmoid()

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Mix tokens.

        Args:
            hidden: Shape ``(B, S, H)``.
            mask: True for tokens that are no padding, shape ``(B, S)``; None if all are.

        Returns:
            What is added to the residual stream, shape ``(B, S, H)``.
        """
        query, key, value = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        if not self.original:
            if mask is None:
                value = value / hidden.shape[1]
            else:
                share = mask / mask.sum(dim=-1, keepdim=True).clamp_min(1)
                value = value * share[:, :, None].to(value.dtype)
        weights = (query @ key.mT * self.scale).sigmoid().square()
        mixed: Tensor = self.o_proj(weights @ value)
        return self.fusion() * mixed
