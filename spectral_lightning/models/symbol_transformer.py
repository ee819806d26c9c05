"""A transformer that reads a few symbols in no order and names another."""

from torch import Tensor, nn
from typing_extensions import override


class SymbolTransformer(nn.Module):
    """Post-norm transformer encoder without positions, read out at the last symbol.

    The default is the one-layer transformer of Prieto et al. (2025), which sees how often each
    symbol occurs, and which one is last.

    Args:
        num_symbols: Symbols, and classes to tell apart, at least 1.
        model_dim: Width of the residual stream, a multiple of `num_heads`.
        num_heads: Attention heads.
        feedforward_dim: Width of the hidden layer of each block.
        num_layers: Blocks, at least 1.
        dropout: Probability of dropout.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> model = SymbolTransformer(7, model_dim=8, feedforward_dim=16)
        >>> model(torch.tensor([[0, 6]])).shape
        torch.Size([1, 7])
    """

    def __init__(
        self,
        num_symbols: int = 113,
        model_dim: int = 128,
        num_heads: int = 4,
        feedforward_dim: int = 2048,
        num_layers: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value in (("num_symbols", num_symbols), ("num_layers", num_layers)):
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}.")
        if num_heads < 1 or model_dim % num_heads:
            raise ValueError(
                f"`model_dim` must be a multiple of `num_heads`={num_heads}, got {model_dim}."
            )
        self.embedding = nn.Embedding(num_symbols, model_dim)
        block = nn.TransformerEncoderLayer(
            model_dim, num_heads, feedforward_dim, dropout, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(block, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(model_dim, num_symbols)

    @override
    def forward(self, symbols: Tensor) -> Tensor:
        """Return logits.

        Args:
            symbols: Shape ``(B, T)``, int64, in ``[0, num_symbols)``.

        Returns:
            Shape ``(B, num_symbols)``.
        """
        return self.head(self.encoder(self.embedding(symbols))[:, -1])
