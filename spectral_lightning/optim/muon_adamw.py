"""Muon for the hidden matrices and AdamW for the rest, as one optimizer."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from typing_extensions import override

from spectral_lightning.optim.groups import ROLES
from spectral_lightning.optim.muon import muon_

REFERENCE_WIDTH = 768  # width at which nanochat tuned its AdamW rates

NS_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}


class MuonAdamW(torch.optim.Optimizer):
    r"""Muon for hidden matrices and AdamW for embeddings, heads and vectors, in one optimizer.

    One optimizer keeps Lightning's automatic optimization, gradient clipping and accumulation,
    and one `global_step` per batch. The role of each group chooses the algorithm: ``matrix`` is
    updated by Muon, every other role by AdamW. The defaults are nanochat's of November 2025.

    Muon moves a matrix by the polar factor of its averaged gradient (see `optim.muon`), so all
    directions move alike; AdamW is PyTorch's. A parameter without gradient is skipped by both,
    weight decay included.

    A group may set any of ``lr, betas, eps, weight_decay, momentum, ...`` for itself; an explicit
    ``lr`` is used as it is, without width scaling.

    Args:
        params: Groups from `parameter_groups`, or dicts with ``params`` and ``role``.
        lr: Rate of the matrices: about the spectral norm of one step of a square matrix, in the
            weight's own units.
        embedding_lr: Rate of the embeddings at width 768.
        head_lr: Rate of the output heads at width 768.
        vector_lr: Rate of all other parameters. Default from the README of Jordan 2024;
            nanochat had no such parameters.
        scale_lr_with_width: Multiply `embedding_lr` and `head_lr` by ``(width / 768) ** -0.5``,
            where the width is the last dimension of the group's widest weight.
        momentum: Decay of Muon's averaged gradient, in ``[0, 1)``.
        momentum_start: Decay at the first step, in ``[0, 1)``.
        momentum_warmup_steps: Optimizer steps over which the decay goes linearly from
            `momentum_start` to `momentum`; 0 uses `momentum` at once.
        ns_steps: Newton-Schulz iterations, at least 1.
        ns_dtype: Compute dtype of Newton-Schulz; None means bfloat16 on CUDA (but not for
            float64 weights) and the weight's own precision elsewhere, at least float32.
        betas: AdamW's decays of the averaged gradient and of its square, in ``[0, 1)``.
        eps: AdamW's addition to the denominator, at least 0.
        weight_decay: Decoupled weight decay of all groups, per unit of learning rate, at least 0.

    Raises:
        ValueError: If an argument is outside its range, a group has no known role, a matrix
            group holds anything but matrices, or a parameter appears twice.

    References:
        Karpathy (2025), nanochat, ``setup_optimizers`` in nanochat/gpt.py and
        ``get_muon_momentum`` in scripts/base_train.py. https://github.com/karpathy/nanochat
        Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural networks",
        https://kellerjordan.github.io/posts/muon/ and https://github.com/KellerJordan/Muon.
        Loshchilov and Hutter (2019), "Decoupled weight decay regularization",
        https://arxiv.org/abs/1711.05101.

    Example:
        >>> from torch import nn
        >>> from spectral_lightning.optim import parameter_groups
        >>> model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2))
        >>> optimizer = MuonAdamW(parameter_groups(model))
        >>> [(group["name"], group["algorithm"]) for group in optimizer.param_groups]
        [('matrix', 'muon'), ('head', 'adamw'), ('vector', 'adamw')]
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 0.02,
        *,
        embedding_lr: float = 0.2,
        head_lr: float = 0.004,
        vector_lr: float = 3e-4,
        scale_lr_with_width: bool = True,
        momentum: float = 0.95,
        momentum_start: float = 0.85,
        momentum_warmup_steps: int = 300,
        ns_steps: int = 5,
        ns_dtype: Literal["float32", "bfloat16"] | None = None,
        betas: tuple[float, float] = (0.8, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "momentum_start": momentum_start,
            "momentum_warmup_steps": momentum_warmup_steps,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
        }
        _check_defaults(
            {**defaults, "embedding_lr": embedding_lr, "head_lr": head_lr, "vector_lr": vector_lr}
        )
        self._rates = {
            "matrix": lr,
            "embedding": embedding_lr,
            "head": head_lr,
            "vector": vector_lr,
        }
        self._width_scaled_roles = ("embedding", "head") if scale_lr_with_width else ()
        super().__init__(params, defaults)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of one role; the group's ``algorithm`` and ``lr`` follow from it.

        Args:
            param_group: Dict with ``params`` and ``role``, and optionally ``name``, ``lr`` or any
                other setting of this group. It is copied, not changed.

        Raises:
            ValueError: If the role is missing or unknown, a matrix group holds anything but
                matrices, or a parameter appears twice.
        """
        role = param_group.get("role")
        if role not in ROLES:
            raise ValueError(
                f"`params` must be groups with a `role` out of {', '.join(ROLES)}, got {role!r}; "
                "pass `parameter_groups(model)`."
            )
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        tensors = [param[1] if isinstance(param, tuple) else param for param in params]
        if len(set(tensors)) < len(tensors):
            raise ValueError(
                f"`params` must name each parameter once, got one twice in the {role} group."
            )
        for tensor in tensors:
            if role == "matrix" and tensor.ndim != 2:
                raise ValueError(
                    "`params` must hold only 2-D tensors in the matrix group, got shape "
                    f"{tuple(tensor.shape)}; give it the role vector (FSDP1 and DeepSpeed flatten "
                    "parameters and cannot run Muon)."
                )
        lr = self._rates[role]
        if role in self._width_scaled_roles:
            width = max((tensor.shape[-1] for tensor in tensors), default=REFERENCE_WIDTH)
            lr *= (width / REFERENCE_WIDTH) ** -0.5
        algorithm = {"algorithm": "muon", "step": 0} if role == "matrix" else {"algorithm": "adamw"}
        super().add_param_group({"lr": lr, **param_group, "params": params, **algorithm})

    @override
    def __getstate__(self) -> dict[str, Any]:
        extra = {"_rates": self._rates, "_width_scaled_roles": self._width_scaled_roles}
        return {**super().__getstate__(), **extra}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, once.

        Args:
            closure: Recomputes the loss and its gradients, called once before the update.

        Returns:
            The closure's loss, or None without closure.

        Raises:
            ValueError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if any(param.grad.is_sparse for param in params):
                raise ValueError(
                    f"`params` must have dense gradients, got a sparse one in the {group['role']} "
                    "group; build the embedding with `sparse=False`."
                )
            if params and group["algorithm"] == "muon":
                self._muon_step(group, params)
            elif params:
                self._adamw_step(group, params)
        return loss

    def _muon_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Move matrices by Muon; the group's ``step`` counts these calls."""
        warmup_steps = group["momentum_warmup_steps"]
        warm = min(group["step"] / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
        momentum = (1 - warm) * group["momentum_start"] + warm * group["momentum"]
        group["step"] += 1
        group["momentum_now"] = momentum  # for those who watch, or average along
        for param in params:
            if not self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        muon_(
            params,
            [self.state[param]["momentum_buffer"] for param in params],
            lr=group["lr"],
            momentum=momentum,
            weight_decay=group["weight_decay"],
            ns_steps=group["ns_steps"],
            ns_dtype=NS_DTYPES[group["ns_dtype"]],
            transposed=group.get("transposed", False),
        )

    def _adamw_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
        adamw(
            params,
            [param.grad for param in params if param.grad is not None],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            [self.state[param]["step"] for param in params],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _check_defaults(defaults: dict[str, Any]) -> None:
    """Refuse settings outside their range."""
    for name in ("lr", "embedding_lr", "head_lr", "vector_lr", "eps", "weight_decay"):
        if not 0 <= defaults[name] < math.inf:
            raise ValueError(f"`{name}` must be finite and >= 0, got {defaults[name]}.")
    for name in ("momentum", "momentum_start"):
        if not 0 <= defaults[name] < 1:
            raise ValueError(f"`{name}` must be in [0, 1), got {defaults[name]}.")
    if not all(0 <= beta < 1 for beta in defaults["betas"]):
        raise ValueError(f"`betas` must be in [0, 1), got {defaults['betas']}.")
    if defaults["momentum_warmup_steps"] < 0:
        raise ValueError(
            f"`momentum_warmup_steps` must be >= 0, got {defaults['momentum_warmup_steps']}."
        )
    if defaults["ns_steps"] < 1:
        raise ValueError(f"`ns_steps` must be >= 1, got {defaults['ns_steps']}.")
    if defaults["ns_dtype"] not in NS_DTYPES:
        raise ValueError(
            f"`ns_dtype` must be float32, bfloat16 or None, got {defaults['ns_dtype']!r}."
        )
