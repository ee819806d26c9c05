"""AdamW with a learning rate for each role that a parameter can have."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from typing_extensions import override

from spectral_lightning.optim.groups import ROLES


class RoleAdamW(torch.optim.AdamW):
    """AdamW whose learning rate depends on what a parameter does.

    Hidden matrices, and the factors of low-rank ones, want smaller steps than embeddings: on words
    of WikiText-2 both did best at a sixtieth of the embeddings' rate, or less, of what was tried
    (scripts/results, ``low_rank_wikitext_rates``).

    Args:
        params: Groups from `parameter_groups`, or dicts with ``params`` and ``role``. A group's own
            ``lr`` comes first.
        lr: Rate of every role that has none of its own, at least 0.
        matrix_lr: Rate of hidden matrices and of factors, at least 0; None for `lr`.
        embedding_lr: Rate of embeddings; None for `lr`.
        head_lr: Rate of output heads; None for `lr`.
        vector_lr: Rate of the rest: biases, norms; None for `lr`.
        **options: Further arguments of ``torch.optim.AdamW``.

    Raises:
        ValueError: If a rate is out of its range, or a group has no known role.

    Example:
        >>> from torch import nn
        >>> from spectral_lightning.optim import parameter_groups
        >>> model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2))
        >>> optimizer = RoleAdamW(parameter_groups(model), lr=1e-3, matrix_lr=2e-4)
        >>> [(group["role"], group["lr"]) for group in optimizer.param_groups]
        [('matrix', 0.0002), ('head', 0.001), ('vector', 0.001)]
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        matrix_lr: float | None = None,
        embedding_lr: float | None = None,
        head_lr: float | None = None,
        vector_lr: float | None = None,
        **options: Any,
    ) -> None:
        rates = {
            "matrix_lr": matrix_lr,
            "embedding_lr": embedding_lr,
            "head_lr": head_lr,
            "vector_lr": vector_lr,
        }
        for name, rate in rates.items():
            if rate is not None and not (math.isfinite(rate) and rate >= 0):
                raise ValueError(f"`{name}` must be finite and >= 0, got {rate}.")
        self._rates = rates
        super().__init__(params, lr, **options)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of one role, at its rate unless the group has its own ``lr``.

        Raises:
            ValueError: If the role is missing or unknown, or a parameter appears twice.
        """
        role = param_group.get("role")
        if role not in ROLES:
            raise ValueError(
                f"`params` must be groups with a `role` out of {', '.join(ROLES)}, got {role!r}; "
                "pass `parameter_groups(model)`."
            )
        rate = self._rates[f"{role}_lr"]
        own = {} if rate is None else {"lr": rate}
        super().add_param_group({**own, **param_group})

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rates": self._rates}
