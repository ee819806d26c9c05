"""Another form of a low-rank layer's factors, which an optimizer's running means follow.

Lives here: factors, gradients and optimizer state. Does not live here: which components are kept
(`resize`).
"""

import warnings
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectral_lightning.actuators.protection import FIRST_MOMENTS
from spectral_lightning.linalg import Regauge, whole_tensor
from spectral_lightning.nn import LowRankLinear

Moments = Literal["carry", "carry_second", "reset"]
"""What becomes of an optimizer's running means: all follow the factors; the second moments do, and
the first begin at zero; this layer's optimizer state begins anew."""

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


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
    forget_unknown_(layer, optimizer)
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


def factor_states(
    layer: LowRankLinear, optimizer: Optimizer | None
) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
    """The factors that an optimizer has a state of, with it."""
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


def forget_unknown_(layer: LowRankLinear, optimizer: Optimizer | None) -> None:
    """Begin anew, with a warning, where an optimizer keeps what is not known to follow.

    Args:
        layer: Layer whose state it is.
        optimizer: Optimizer that trains it; None for none.
    """
    for _, state in factor_states(layer, optimizer):
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
    for parameter, state in factor_states(layer, optimizer):
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
