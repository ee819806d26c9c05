"""Changing the rank of a layer while it trains, with its optimizer state.

Lives here: which components a `LowRankLinear` keeps, and what it gets instead.
Does not live here: which rank a layer should have (`control`), and when it changes.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from spectral_lightning.actuators.protection import FIRST_MOMENTS
from spectral_lightning.actuators.regauge import (
    SECOND_MOMENTS,
    Moments,
    factor_states,
    forget_unknown_,
    regauge_,
)
from spectral_lightning.linalg import (
    Regauge,
    orthonormalize,
    truncation,
    truncation_values,
    whole_tensor,
)
from spectral_lightning.nn import LowRankLinear


@torch.no_grad()
def gathered_factors(layer: LowRankLinear) -> tuple[Tensor, Tensor]:
    """Whole active factors with their gates, in the compute dtype, detached."""
    r, (left, right) = layer.rank, map(_gathered, (layer.left_factor, layer.right_factor))
    dtype = torch.promote_types(left.dtype, torch.float32)
    return left[:, :r].to(dtype) * layer.gate[:r].to(dtype), right[:r].to(dtype)


@torch.no_grad()
def best_components(
    layer: LowRankLinear, rank: int, *, moment: Tensor | None = None, is_balanced: bool = True
) -> Regauge:
    """The components of a layer's weight that are worth keeping; changes nothing.

    Args:
        layer: Layer.
        rank: Components to keep, in ``[1, layer.rank]``.
        moment: ``E[h h^T]`` of the active hidden activations ``h = V x``, shape
            ``(layer.rank, layer.rank)``, any scale: what is kept then are the outputs, and else the
            weight.
        is_balanced: Whether both factors get equal shares; if not, and with `moment`, components
            are ordered by importance, so that every prefix is the best of its size.

    Returns:
        How to get the kept factors, for `regauge_`.

    Raises:
        ValueError: If `rank` is out of its range, `moment` does not fit, or the factors are not
            finite or their product is zero.
    """
    if not 1 <= rank <= layer.rank:
        raise ValueError(f"`rank` must be in [1, {layer.rank}] to shrink, got {rank}.")
    found = truncation(*gathered_factors(layer), rank, moment, is_balanced=is_balanced)
    if not bool(found.of_left.any()):
        raise ValueError("`layer` must not have a weight of zeros, which no component holds.")
    return found


@torch.no_grad()
def component_values(layer: LowRankLinear, *, moment: Tensor | None = None) -> Tensor:
    """What each of a layer's best components holds; nothing is asked of the host.

    Args:
        layer: Layer.
        moment: As of `best_components`.

    Returns:
        Roots of energies, shape ``(layer.rank,)``, descending: of the outputs with `moment`, else
        the weight's singular values. All NaN if something is not finite.

    Raises:
        ValueError: If `moment` does not fit.
    """
    return truncation_values(*gathered_factors(layer), moment)


@torch.no_grad()
def shrink_(
    layer: LowRankLinear,
    optimizer: Optimizer | None,
    rank: int,
    *,
    moment: Tensor | None = None,
    moments: Moments = "carry_second",
) -> Tensor:
    """Keep the best components of a layer, in balanced form.

    The weight becomes the nearest one of that rank, or, with `moment`, the one whose outputs are
    nearest. With the present rank nothing but the form changes. Components that hold nothing are
    replaced by ones that can learn (`fresh_rows`).

    Args:
        layer: Layer; overwritten.
        optimizer: Optimizer that trains it; None for none.
        rank: Components to keep, in ``[1, layer.rank]``.
        moment: As of `best_components`.
        moments: What becomes of the optimizer's running means.

    Returns:
        Share of the weight's energy that is kept (of the output's with `moment`), 0-d, in [0, 1].

    Raises:
        ValueError: As of `best_components`, or if `moments` is unknown.
    """
    found = best_components(layer, rank, moment=moment)
    regauge_(layer, optimizer, found, moments=moments)
    if layer.rank < rank:
        grow_(layer, optimizer, fresh_rows(layer, rank - layer.rank))
    kept = found.values.square().sum()
    return kept / (kept + found.discarded.square())


@torch.no_grad()
def fresh_rows(
    layer: LowRankLinear,
    num: int,
    *,
    directions: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Inputs for new components to read: what the layer does not read yet.

    Args:
        layer: Layer.
        num: How many.
        directions: Inputs to read first, rows of shape ``(j, in_features)``, most wanted first;
            what the layer reads already is taken out. Where they are too few: random ones.
        generator: Source of the random ones, on the CPU; None for one with a seed that depends on
            the ranks alone.

    Returns:
        Rows for `grow_`, shape ``(num, in_features)``, orthogonal to the layer's and to each other,
        as long as those are on average.
    """
    _, V = gathered_factors(layer)
    old, n = V.shape
    if generator is None:
        generator = torch.Generator().manual_seed(1000 * old + num)
    rows = [V] if directions is None else [V, directions[:num].to(V)]
    spare = torch.randn(num, n, generator=generator).to(V)[: old + num - sum(map(len, rows))]
    new = orthonormalize(torch.cat([*rows, spare]).mT).mT[old:]
    scale = torch.linalg.vector_norm(V, dim=1).mean()
    return new * torch.where(scale > 0, scale, 1.0)


@torch.no_grad()
def grow_(layer: LowRankLinear, optimizer: Optimizer | None, rows: Tensor) -> None:
    """Add components that read new inputs and write nothing yet; the weight stays bit for bit.

    New columns of ``U`` are zero, so that the next step moves them. First moments begin at zero;
    second moments at the mean of the other components', for with zero Adam's first steps would be
    ``(1 - beta_1) / sqrt(1 - beta_2)`` times the rate, 3.2 times at the usual betas.

    Args:
        layer: Layer; overwritten.
        optimizer: Optimizer that trains it; None for none.
        rows: Rows of ``V`` to add, as of `fresh_rows`.

    Raises:
        ValueError: If they do not fit into the layer's capacity.
    """
    old, rank = layer.rank, layer.rank + len(rows)
    if rank > layer.capacity:
        raise ValueError(f"`rows` must be at most {layer.capacity - old} rows, got {len(rows)}.")
    with whole_tensor(layer.right_factor) as right, whole_tensor(layer.left_factor) as left:
        right[old:rank] = rows
        left[:, old:rank] = 0
    forget_unknown_(layer, optimizer)
    for parameter, state in factor_states(layer, optimizer):
        for name in (*FIRST_MOMENTS, *SECOND_MOMENTS):
            if state.get(name) is not None:
                with whole_tensor(state[name]) as whole:
                    columns = whole if parameter is layer.left_factor else whole.mT
                    mean = columns[:, :old].mean(dim=1, keepdim=True)
                    columns[:, old:rank] = mean if name in SECOND_MOMENTS else 0
    layer.set_rank(rank, keep_gates=True)


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
