"""Changing the rank of a layer while it trains, with its optimizer state.

Lives here: factors, gradients and running means of a `LowRankLinear`, and how they follow a change.
Does not live here: which rank a layer should have (`control`), and when it changes.
"""

import warnings
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from spectral_lightning.actuators.protection import FIRST_MOMENTS
from spectral_lightning.linalg import (
    Regauge,
    orthonormalize,
    truncation,
    truncation_values,
    whole_tensor,
)
from spectral_lightning.nn import LowRankLinear

Moments = Literal["carry", "carry_second", "reset"]
"""What becomes of an optimizer's running means: all follow the factors; the second moments do, and
the first begin at zero; this layer's optimizer state begins anew."""

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


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
    _forget_unknown_(layer, optimizer)
    for parameter, state in _states(layer, optimizer):
        for name in (*FIRST_MOMENTS, *SECOND_MOMENTS):
            if state.get(name) is not None:
                with whole_tensor(state[name]) as whole:
                    columns = whole if parameter is layer.left_factor else whole.mT
                    mean = columns[:, :old].mean(dim=1, keepdim=True)
                    columns[:, old:rank] = mean if name in SECOND_MOMENTS else 0
    layer.set_rank(rank, keep_gates=True)


@torch.no_grad()
def regauge_(
    layer: LowRankLinear,
    optimizer: Optimizer | None,
    found: Regauge,
    *,
    moments: Moments = "carry_second",
) -> None:
    """Write a layer's active components as others: factors, gradients, and running means.

    Gradients are linear in the factors' transforms, so that first moments follow exactly: as if all
    gradients had been taken in the new form. Second moments follow as if the deviations of the
    gradient's entries from their mean were uncorrelated. Step counts stay, except in a reset.

    Args:
        layer: Layer; overwritten, its rank becomes the number of new components that are not zero.
        optimizer: Optimizer that trains it; None for none.
        found: New components, as of `best_components`.
        moments: What becomes of the optimizer's running means.

    Raises:
        ValueError: If `moments` is unknown.

    References:
        Robert et al. (2025), "LDAdam", sec. 3.2 (projection-aware update of Adam's states).
        https://arxiv.org/abs/2410.16103
    """
    if moments not in get_args(Moments):
        known = ", ".join(get_args(Moments))
        raise ValueError(f"`moments` must be one of {known}, got {moments!r}.")
    _forget_unknown_(layer, optimizer)
    _absorb_gates(layer, optimizer)
    k = int(found.of_left.any(dim=0).sum())
    T, P = found.of_left[:, :k], found.of_right[:, :k]
    for parameter, own, other in ((layer.left_factor, T, P), (layer.right_factor, P, T)):
        is_left = parameter is layer.left_factor
        _map_(parameter, own, is_left)
        if parameter.grad is not None:
            _map_(parameter.grad, other, is_left)
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        if moments == "reset":
            _forget_(state)
            continue
        for name in SECOND_MOMENTS:
            if state.get(name) is not None:
                assert optimizer is not None
                _map_second_(optimizer, parameter, state, name, other, is_left)
        for name in FIRST_MOMENTS:
            if state.get(name) is not None:
                by = other if moments == "carry" else torch.zeros_like(other)
                _map_(state[name], by, is_left)
    layer.set_rank(k)


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _states(
    layer: LowRankLinear, optimizer: Optimizer | None
) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
    for parameter in (layer.left_factor, layer.right_factor):
        if optimizer is not None and parameter in optimizer.state:
            yield parameter, optimizer.state[parameter]


def _forget_(state: dict[str, Any]) -> None:
    """Begin anew, step count included: with it alone Adam would divide by means of nothing."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            value.zero_()
        elif name == "step":
            state[name] = 0


def _forget_unknown_(layer: LowRankLinear, optimizer: Optimizer | None) -> None:
    """Begin anew, with a warning, where an optimizer keeps what is not known to follow."""
    for _, state in _states(layer, optimizer):
        known = {*FIRST_MOMENTS, *SECOND_MOMENTS}
        tensors = {name for name, value in state.items() if isinstance(value, Tensor)}
        unknown = sorted(name for name in tensors - known if state[name].numel() > 1)
        if unknown:
            warnings.warn(
                f"{type(optimizer).__name__} keeps {', '.join(unknown)} of low-rank layers, which"
                " cannot follow a change of rank and begins anew; Adam, SGD and Muon carry theirs.",
                stacklevel=3,
            )
            _forget_(state)


def _absorb_gates(layer: LowRankLinear, optimizer: Optimizer | None) -> None:
    """Take fractional gates into ``U``, so that all active gates are 1."""
    r = layer.rank
    gate = layer.gate[:r].clone()
    if bool((gate == 1).all()):
        return
    diagonal = torch.diag(gate.to(torch.promote_types(gate.dtype, torch.float32)))
    inverse = torch.diag(torch.where(gate > 0, gate.to(diagonal.dtype).reciprocal(), 0.0))
    # U' = U D and V' = V, which is no change of form: its gradients are those of U over D.
    _map_(layer.left_factor, diagonal, True)
    if layer.left_factor.grad is not None:
        _map_(layer.left_factor.grad, inverse, True)
    for parameter, state in _states(layer, optimizer):
        if parameter is layer.left_factor:
            for name in (*FIRST_MOMENTS, *SECOND_MOMENTS):
                if state.get(name) is not None:
                    by = inverse.square() if name in SECOND_MOMENTS else inverse
                    _map_(state[name], by, True)
    layer.set_rank(r)


def _map_(stored: Tensor, by: Tensor, is_left: bool) -> None:
    """Put ``X[:, :r] B`` in place of the columns of ``X`` (of ``X^T`` on the right side)."""
    r, k = by.shape
    with whole_tensor(stored) as whole:
        columns = whole if is_left else whole.mT
        new = columns[:, :r].to(by.dtype) @ by
        columns.zero_()
        columns[:, :k] = new.to(columns.dtype)


def _map_second_(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    state: dict[str, Any],
    name: str,
    by: Tensor,
    is_left: bool,
) -> None:
    """``v' = (v - m^2) B^2 + (m B)^2``, of moments whose bias by the start at zero is corrected."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    first, second = group["betas"]
    step, (r, k) = float(state["step"]), by.shape
    correction = [1 - beta**step for beta in (first, second)]
    with whole_tensor(state["exp_avg"]) as mean, whole_tensor(state[name]) as whole:
        m, v = (x if is_left else x.mT for x in (mean, whole))
        m, active = m[:, :r].to(by.dtype) / correction[0], v[:, :r].to(by.dtype) / correction[1]
        spread = (active - m.square()).clamp_min(0) @ by.square() + (m @ by).square()
        v.zero_()
        v[:, :k] = (correction[1] * spread).to(v.dtype)
