"""Initial values of the low-rank transformer, this library's and those of the original."""

import math
from typing import Literal

import torch
from torch import nn

from spectral_lightning.nn import LowRankLinear
from spectral_lightning.nn.low_rank import Init

TransformerInit = Literal["balanced", "spectral", "v10", "v13", "v18"]

SMALL_STD = 0.02  # Radford et al. 2018 (GPT), sec. 4.1; of everything in version 18
UNIT_EMBEDDINGS = ("v10", "v13")  # PyTorch's own initial values, which those versions leave alone


def layer_init(init: TransformerInit) -> Init:
    """What a layer's own `init` is; `init_module_` overwrites the values of versions 13 and 18."""
    return "balanced" if init == "v13" or init == "v18" else init


def residual_gain(init: TransformerInit, depth: int) -> float:
    """Factor on the initial weight of projections onto the residual stream."""
    return 1 / math.sqrt(2 * depth) if init in ("balanced", "spectral") else 1.0


@torch.no_grad()
def init_module_(
    module: nn.Module,
    init: TransformerInit,
    *,
    gain: float = 1.0,
    is_head: bool = False,
    generator: torch.Generator | None = None,
) -> None:
    """Overwrite the weights of one module, but not of those in it, with fresh initial values.

    Args:
        module: Any module; one without initial values of its own stays as it is.
        init: As for `LowRankTransformer`.
        gain: Factor on the weight of a plain linear layer; low-rank layers know their own.
        is_head: Whether a linear layer is the output head.
        generator: Source of randomness on the weights' device; None means PyTorch's global one.
    """
    if isinstance(module, nn.Embedding):
        std = 1.0 if init in UNIT_EMBEDDINGS else SMALL_STD
        module.weight.normal_(std=std, generator=generator)
    elif isinstance(module, LowRankLinear):
        module.reset_parameters(generator)
        if init in ("v13", "v18"):
            std = SMALL_STD if init == "v18" else module.out_features**-0.5
            module.left_factor[:, : module.rank].normal_(std=std, generator=generator)
            module.right_factor[: module.rank].normal_(std=std, generator=generator)
    elif isinstance(module, nn.Linear) and init in UNIT_EMBEDDINGS:
        bound = module.in_features**-0.5  # as PyTorch, whose own method takes no generator
        for parameter in module.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    elif isinstance(module, nn.Linear):
        is_small = is_head or init == "v18"
        std = SMALL_STD if is_small else gain * module.in_features**-0.5
        module.weight.normal_(std=std, generator=generator)
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, nn.LayerNorm):
        module.reset_parameters()
