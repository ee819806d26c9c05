"""What `SVDModeSwitch` refuses, in a sentence each."""

from collections.abc import Iterable, Mapping
from typing import get_args

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spectral_lightning.callbacks.base import SpectralCallback
from spectral_lightning.callbacks.svd_mode_factored import Protection
from spectral_lightning.callbacks.svd_mode_layer import parameter_of
from spectral_lightning.control import ModePolicy
from spectral_lightning.spectra import Target


def check_settings(policy: object, protection: str) -> None:
    """Refuse what is no policy or no protection, and those that do not go together.

    Raises:
        TypeError: If `policy` is no policy.
        ValueError: If `protection` is unknown, or cannot serve the policy.
    """
    if not isinstance(policy, ModePolicy):
        raise TypeError(f"`policy` must be a ModePolicy or None, got {policy!r}.")
    if protection not in get_args(Protection):
        allowed = ", ".join(get_args(Protection))
        raise ValueError(f"`protection` must be one of {allowed}, got {protection!r}.")
    if protection == "gradients" and policy.needs_all_values:
        raise ValueError(
            "`protection` must be one of the weight's own directions for a policy that looks at all"
            f" singular values, as {type(policy).__name__}, got 'gradients'; take 'two_sided'."
        )


def refuse_overlap(own: Iterable[Target], others: Iterable[Target]) -> None:
    """Refuse a weight that another instance switches too: each would undo the other's work.

    Raises:
        ValueError: If there is one.
    """
    others = list(others)
    for target in own:
        for other in others:
            if _overlap(target, other):
                raise ValueError(
                    f"`layers` of several SVDModeSwitch callbacks must not overlap, got"
                    f" {target.name!r} and {other.name!r}; give each its own layers."
                )


def warn_of_writers(names: Iterable[str], others: Iterable[SpectralCallback]) -> None:
    """Warn of layers that another callback writes to, such as ASSR."""
    for other in others:
        both = sorted(set(names) & set(other.names))
        if both and type(other).on_weights is not SpectralCallback.on_weights:
            rank_zero_warn(
                f"SVDModeSwitch and {type(other).__name__} share {len(both)} layers, such as"
                f" {both[0]}: what the latter changes in a protected part is undone at the next"
                " step."
            )


def _overlap(first: Target, second: Target) -> bool:
    """Whether two targets have entries in common."""
    parameters = parameter_of(first), parameter_of(second)
    if parameters[0] is None or parameters[0] is not parameters[1]:
        return False
    if first.expert != second.expert:
        return False
    if first.rows is None or second.rows is None:
        return True
    return first.rows[0] < second.rows[1] and second.rows[0] < first.rows[1]


def require_protection(saved: str, protection: str) -> None:
    """Refuse to go on from a checkpoint with another protection.

    Raises:
        ValueError: If it is another one.
    """
    if saved != protection:
        raise ValueError(
            f"`protection` must be {saved!r} as in the checkpoint, got {protection!r}; or start"
            " without `ckpt_path`."
        )


def refuse_thawed(model: nn.Module | None, frozen: Mapping[str, Target]) -> None:
    """Refuse a layer that DDP took for frozen: its gradients differ from rank to rank.

    Raises:
        RuntimeError: If one of them is trained now.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    for name, target in frozen.items():
        if target.trainable:
            raise RuntimeError(
                f"SVDModeSwitch cannot switch {name}: it was frozen when DDP wrapped the model,"
                " which never averages its gradients; unfreeze it before `fit`, or freeze it by a"
                " learning rate of 0."
            )
