"""What a model costs: parameters, multiplications per token, bytes of optimizer state."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from spectral_lightning.nn import LowRankLinear


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """Parameters of a model, and of the factors in it; a shared parameter counts once."""

    stored: int
    """All that are in memory."""
    active: int
    """Those with an effect: without the factors' inactive components."""
    dense: int
    """Those of the same model with one full matrix in place of each pair of factors."""
    factors_stored: int
    """Both factors of all `LowRankLinear` layers at their capacity, without biases."""
    factors_active: int
    """The same at their present rank."""
    factors_dense: int
    """The full matrices in their place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MacsPerToken:
    """Multiply-accumulates of one forward pass, per token; a training step takes about 3 times it.

    The first four are totals that differ in how `LowRankLinear` layers are counted; `head` and
    `attention` are parts of each.
    """

    active: int
    """With factors of the present rank."""
    executed: int
    """As the layers multiply: in whole blocks of `quantum` if sliced, by everything if masked."""
    stored: int
    """With factors at their capacity."""
    dense: int
    """With one full matrix in place of each pair of factors."""
    head: int
    """The output heads."""
    attention: int
    """Scores and weighted means of all layers."""


class Transformer(Protocol):
    """What `macs_per_token` needs of a model; `GPT` and `LowRankTransformer` are such.

    Attributes:
        model_dim: Width of the residual stream, and of all queries of a layer together.
        blocks: Layers, each with one attention.
    """

    model_dim: int
    blocks: nn.ModuleList

    def head_names(self) -> tuple[str, ...]:
        """Return the module names of the output heads."""

    def get_submodule(self, target: str) -> nn.Module:
        """Return the module of that name."""

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over the model and everything in it, as ``nn.Module`` does."""


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Count the parameters of any model.

    Reads shapes and ranks only, so that a model on the meta device will do.

    Args:
        model: Any module.

    Returns:
        The counts.

    Example:
        >>> counts = parameter_counts(LowRankLinear(10, 6, rank=2, bias=True, capacity=3))
        >>> counts.stored, counts.active, counts.dense  # 6 biases each
        (54, 38, 66)
    """
    factors = [_Sizes.of(layer) for layer in _low_rank_layers(model)]
    stored = sum(parameter.numel() for parameter in model.parameters())
    factors_stored = sum(sizes.stored for sizes in factors)
    factors_active = sum(sizes.active for sizes in factors)
    factors_dense = sum(sizes.dense for sizes in factors)
    return ParameterCounts(
        stored=stored,
        active=stored - factors_stored + factors_active,
        dense=stored - factors_stored + factors_dense,
        factors_stored=factors_stored,
        factors_active=factors_active,
        factors_dense=factors_dense,
    )


def macs_per_token(model: Transformer, sequence_len: int) -> MacsPerToken:
    """Count the multiply-accumulates that a token costs in a forward pass over a full sequence.

    Counts matrix products: linear layers, output heads (a head that is tied to the embedding too),
    and attention as if every token saw all `sequence_len` tokens, ``2 * sequence_len * model_dim``
    per layer (Chowdhery et al. 2022, app. B). A kernel that skips what a causal mask hides needs
    about half of that. Embeddings, norms, biases and activations are left out.

    Args:
        model: Transformer, which may be on the meta device.
        sequence_len: Tokens per sequence, at least 1.

    Returns:
        The counts.

    Raises:
        ValueError: If `sequence_len` is below 1.

    References:
        Chowdhery et al. (2022), "PaLM", app. B. https://arxiv.org/abs/2204.02311

    Example:
        >>> from spectral_lightning.models import GPT
        >>> macs = macs_per_token(GPT(depth=1, vocab_size=10, sequence_len=4), sequence_len=4)
        >>> macs.head, macs.attention, macs.active - macs.head - macs.attention  # 12 * 64^2
        (640, 512, 49152)
    """
    if sequence_len < 1:
        raise ValueError(f"`sequence_len` must be >= 1, got {sequence_len}.")
    heads = [model.get_submodule(name) for name in model.head_names()]
    head = sum(_weight(module).numel() for module in heads)
    attention = 2 * sequence_len * model.model_dim * len(model.blocks)
    linear = sum(
        module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, nn.Linear) and module not in heads
    )
    factors = [_Sizes.of(layer) for layer in _low_rank_layers(model)]
    shared = head + attention + linear
    return MacsPerToken(
        active=shared + sum(sizes.active for sizes in factors),
        executed=shared + sum(sizes.executed for sizes in factors),
        stored=shared + sum(sizes.stored for sizes in factors),
        dense=shared + sum(sizes.dense for sizes in factors),
        head=head,
        attention=attention,
    )


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state, such as moments; 0 before its first step.

    Args:
        optimizer: Any optimizer that is not sharded over processes.

    Returns:
        Bytes, on all devices together.

    Example:
        >>> import torch
        >>> weight = torch.zeros(3, 2, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> optimizer_bytes(optimizer)
        24
    """
    return _nbytes(dict(optimizer.state))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """Multiplications per input of one layer, which are its parameters too."""

    stored: int
    executed: int
    active: int
    dense: int

    @classmethod
    def of(cls, layer: LowRankLinear) -> "_Sizes":
        m, n = layer.out_features, layer.in_features
        blocks = -(-layer.rank // layer.quantum) * layer.quantum
        used = min(layer.capacity, blocks) if layer.mode == "sliced" else layer.capacity
        return cls(
            stored=layer.capacity * (m + n),
            executed=used * (m + n),
            active=layer.rank * (m + n),
            dense=m * n,
        )


def _low_rank_layers(model: nn.Module | Transformer) -> list[LowRankLinear]:
    return [module for module in model.modules() if isinstance(module, LowRankLinear)]


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _nbytes(value: Any) -> int:
    """Bytes of the tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_nbytes(entry) for entry in value.values())
    if isinstance(value, list | tuple):
        return sum(_nbytes(entry) for entry in value)
    return 0
