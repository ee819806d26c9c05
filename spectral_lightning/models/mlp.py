"""A perceptron on symbols, the smallest network that is seen to grok."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override


class SymbolMLP(nn.Module):
    """Perceptron with ReLU and without biases, on the one-hot codes of several symbols.

    Scaling every weight by ``c`` scales the logits by ``c ** (number of layers)``. The first layer
    is a linear layer like the others, and picks the columns of its symbols instead of multiplying
    by zeros.

    Args:
        num_symbols: Symbols, and classes to tell apart, at least 1.
        num_inputs: Symbols per example, at least 1.
        hidden_dims: Widths of the hidden layers; the default is that of Prieto et al. (2025).

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> SymbolMLP(num_symbols=7)(torch.tensor([[0, 6], [3, 3]])).shape
        torch.Size([2, 7])
    """

    offsets: Tensor

    def __init__(
        self,
        num_symbols: int = 113,
        num_inputs: int = 2,
        hidden_dims: Sequence[int] = (200, 200),
    ) -> None:
        super().__init__()
        for name, value in (("num_symbols", num_symbols), ("num_inputs", num_inputs)):
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}.")
        if not hidden_dims or min(hidden_dims) < 1:
            raise ValueError(
                f"`hidden_dims` must be one or more numbers >= 1, got {list(hidden_dims)}."
            )
        widths = (num_inputs * num_symbols, *hidden_dims, num_symbols)
        self.layers = nn.ModuleList(nn.Linear(m, n, bias=False) for m, n in pairwise(widths))
        self.register_buffer("offsets", num_symbols * torch.arange(num_inputs), persistent=False)

    @override
    def forward(self, symbols: Tensor) -> Tensor:
        """Return logits.

        Args:
            symbols: Shape ``(B, num_inputs)``, int64, in ``[0, num_symbols)``.

        Returns:
            Shape ``(B, num_symbols)``.
        """
        first, *rest = self.layers
        columns = first.get_parameter("weight").t().contiguous()
        hidden = F.embedding_bag(symbols + self.offsets, columns, mode="sum")
        for layer in rest:
            hidden = layer(torch.relu(hidden))
        return hidden
