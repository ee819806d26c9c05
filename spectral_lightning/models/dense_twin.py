"""Dense controls of low-rank transformers: equally large, or equally expensive."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from spectral_lightning.models.accounting import macs_per_token, parameter_counts
from spectral_lightning.models.low_rank_transformer import LowRankTransformer

Match = Literal["parameters", "flops"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseTwin:
    """A dense model that costs about what a low-rank one does."""

    model: LowRankTransformer
    """The dense model, freshly initialised."""
    wanted: int
    """Cost of the low-rank model at its present ranks: parameters, or multiply-accumulates."""
    reached: int
    """The same of the dense model."""

    @property
    def relative_error(self) -> float:
        """How much more the dense model costs, as a share of what was wanted."""
        return self.reached / self.wanted - 1


def dense_twin(
    model: LowRankTransformer, match: Match = "parameters", *, multiple_of: int = 8
) -> DenseTwin:
    """Build the dense model that a low-rank model has to beat: the same, but narrower.

    Depth, context, vocabulary, kind of head and the share of `mlp_dim` in the width stay. The width
    is the multiple of `multiple_of` whose cost is nearest; it is split into the fewest heads that
    are no wider than the low-rank model's.

    Args:
        model: Low-rank model, which may be on the meta device.
        match: What shall be equal: ``"parameters"`` those of the blocks that have an effect, as
            embeddings and head are what both models have alike; ``"flops"`` the
            multiply-accumulates per token of the whole forward pass over `sequence_len` tokens,
            head and attention included.
        multiple_of: Step of the width, at least 1. 8 suits half-precision matrix products (NVIDIA,
            "Matrix multiplication background", sec. 2.2).

    Returns:
        The dense model on PyTorch's default device, and both costs.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> twin = dense_twin(LowRankTransformer(50, 16, depth=2, model_dim=64, rank=8))
        >>> twin.model.model_dim, twin.wanted, twin.reached, twin.model.config["rank"]
        (24, 18944, 14016, None)
    """
    if match not in get_args(Match):
        raise ValueError(f"`match` must be one of {get_args(Match)}, got {match!r}.")
    if multiple_of < 1:
        raise ValueError(f"`multiple_of` must be >= 1, got {multiple_of}.")

    def cost(candidate: LowRankTransformer) -> int:
        if match == "parameters":
            return parameter_counts(candidate.blocks).active
        return macs_per_token(candidate, candidate.sequence_len).active

    def cost_at(step: int) -> int:
        with torch.device("meta"):
            return cost(_dense(model, step * multiple_of))

    wanted = cost(model)
    step = _nearest(cost_at, wanted)
    return DenseTwin(model=_dense(model, step * multiple_of), wanted=wanted, reached=cost_at(step))


def _dense(model: LowRankTransformer, width: int) -> LowRankTransformer:
    mlp_dim = model.config["mlp_dim"]
    head_dim = model.model_dim // model.num_heads
    num_heads = -(-width // head_dim)
    while width % num_heads:
        num_heads += 1
    changes = {
        "model_dim": width,
        "num_heads": num_heads,
        "mlp_dim": None if mlp_dim is None else max(1, round(mlp_dim * width / model.model_dim)),
        "rank": None,
        "capacity": None,
    }
    return type(model)(**{**model.config, **changes})


def _nearest(cost_at: Callable[[int], int], wanted: int) -> int:
    """The step, at least 1, whose cost is nearest; costs grow with the step."""
    above = 1
    while cost_at(above) < wanted:
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (above + below) // 2
        below, above = (middle, above) if cost_at(middle) < wanted else (below, middle)
    if below == 0 or cost_at(above) - wanted < wanted - cost_at(below):
        return above
    return below
