"""The encoder: embeddings, layers of attention and feed-forward, last norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_spectra import SpectraAttention
from .configuration_spectra import SpectraConfig


class SpectraEmbeddings(nn.Module):
    """Sum of a token's embedding, its position's and, if any, its type's.

    Positions count tokens that are no padding, so that padding on either side changes nothing.

    Args:
        config: Shape and options.
    """

    def __init__(self, config: SpectraConfig) -> None:
        super().__init__()
        dim, types = config.hidden_size, config.type_vocab_size
        self.num_positions = config.max_position_embeddings
        self.original = config.compat == "original"
        self.tokens = nn.Embedding(config.vocab_size, dim)
        self.positions = nn.Embedding(self.num_positions, dim)
        self.token_types = nn.Embedding(types, dim) if types else None
        self.norm = nn.LayerNorm(dim, config.layer_norm_eps) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, input_ids: Tensor, mask: Tensor | None, token_types: Tensor | None) -> Tensor:
        """Embed tokens.

        Args:
            input_ids: Token ids, shape ``(B, S)``.
            mask: True for tokens that are no padding, shape ``(B, S)``; None if all are.
            token_types: Shape ``(B, S)``; None for type 0. Ignored if types have no embedding.

        Returns:
            Shape ``(B, S, H)``.

        Raises:
            ValueError: If a text has more tokens than there are positions.
        """
        embedded = self.tokens(input_ids) + self.positions(self._positions(input_ids, mask))
        if self.token_types is not None:
            types = torch.zeros_like(input_ids) if token_types is None else token_types
            embedded = embedded + self.token_types(types)
        if self.norm is not None:
            embedded = self.norm(embedded)
        return self.dropout(embedded)

    def _positions(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        num_tokens = input_ids.shape[1]
        if mask is None or self.original:
            self._check_length(num_tokens)
            return torch.arange(num_tokens, device=input_ids.device)
        if num_tokens > self.num_positions:  # else the device is not asked
            self._check_length(int(mask.sum(dim=-1).max()))
        return (mask.cumsum(dim=-1) - 1).clamp_min(0)

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens > self.num_positions:
            raise ValueError(
                f"`input_ids` must have at most max_position_embeddings={self.num_positions} tokens"
                f" per text, got {num_tokens}; truncate the texts."
            )


class SpectraFeedForward(nn.Module):
    """Feed-forward of each token for itself: SwiGLU (Shazeer 2020), or a GELU as in BERT.

    Args:
        config: Shape and options.
    """

    def __init__(self, config: SpectraConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        dim, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(dim, inner) if config.feedforward == "swiglu" else None
        self.up_proj = nn.Linear(dim, inner)
        self.down_proj = nn.Linear(inner, dim)
        self.down_proj.writes_to_residual = True  # type: ignore[assignment]
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what is added to the residual stream, shape ``(B, S, H)`` like the input."""
        up = self.up_proj(hidden)
        inner = F.gelu(up) if self.gate_proj is None else F.silu(self.gate_proj(hidden)) * up
        return self.dropout(self.down_proj(inner))


class SpectraLayer(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """Attention and feed-forward, each with a residual connection and a layer norm.

    Args:
        config: Shape and options.
    """

    def __init__(self, config: SpectraConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = SpectraAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.feedforward = SpectraFeedForward(config)
        self.feedforward_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Transform tokens, shape ``(B, S, H)`` to the same; `mask` as in `SpectraEncoder`."""
        if self.pre_norm:
            hidden = hidden + self.attention(self.attention_norm(hidden), mask)
            return hidden + self.feedforward(self.feedforward_norm(hidden))
        hidden = self.attention_norm(hidden + self.attention(hidden, mask))
        return self.feedforward_norm(hidden + self.feedforward(hidden))


class SpectraEncoder(nn.Module):
    """Embeddings, layers and last norm.

    Args:
        config: Shape and options.
    """

    def __init__(self, config: SpectraConfig) -> None:
        super().__init__()
        self.embeddings = SpectraEmbeddings(config)
        self.layers = nn.ModuleList(SpectraLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = (
            nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.final_norm else None
        )

    def forward(self, input_ids: Tensor, mask: Tensor | None, token_types: Tensor | None) -> Tensor:
        """Encode tokens.

        Args:
            input_ids: Token ids, shape ``(B, S)``.
            mask: True for tokens that are no padding, shape ``(B, S)``; None if all are.
            token_types: Shape ``(B, S)``; None for type 0.

        Returns:
            Hidden states, shape ``(B, S, H)``; at padding they mean nothing.
        """
        hidden: Tensor = self.embeddings(input_ids, mask, token_types)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden if self.norm is None else self.norm(hidden)
