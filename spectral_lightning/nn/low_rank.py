"""A linear layer whose weight is a product of two thin factors, of a rank that can change."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from typing_extensions import override

from spectral_lightning.linalg import singular_triplets

Init = Literal["balanced", "spectral", "v10"]
Mode = Literal["sliced", "masked"]

INITS = ("balanced", "spectral", "v10")
MODES = ("sliced", "masked")


class LowRankLinear(nn.Module):
    """Linear layer ``x V^T U^T + b`` whose weight ``W = U V`` has at most `rank` dimensions.

    Costs ``rank (m + n)`` instead of ``m n`` multiplications per input, ``m`` outputs and ``n``
    inputs: less if ``rank < m n / (m + n)``. The factors are stored at a fixed `capacity`, so that
    optimizers, wrappers (DDP, FSDP) and checkpoints never see a change of shape when the rank
    changes; the first `rank` components are active, the others' gates and columns of ``U`` are
    zero.

    Args:
        in_features: Size ``n`` of the inputs.
        out_features: Size ``m`` of the outputs.
        rank: Active components at first, in ``[1, capacity]``.
        bias: Whether there is an additive bias; starts at zero.
        capacity: Components that are stored, the largest rank the layer can have; None for `rank`.
        mode: ``"sliced"`` multiplies by the active components only, in blocks of `quantum`, so that
            a smaller rank is faster. ``"masked"`` always multiplies by all, so that
            `torch.compile` makes one graph whatever the rank.
        init: ``"balanced"``: ``V ~ N(0, 1 / n)``, ``U ~ N(0, 1 / rank)``: outputs as large as the
            inputs at every rank. ``"spectral"``: the leading singular components of a Gaussian
            matrix, scaled to the same (Khodak et al. 2021, sec. 3). ``"v10"``: ``U ~ N(0, 1 / m)``,
            ``V ~ N(0, 1 / n)``, of the system that this layer is modelled on: outputs have variance
            ``rank / m``.
        gain: Factor on the initial weight.
        quantum: Components per block of ``"sliced"``; 8 suits the vector units of CPUs and half
            precision on GPUs (NVIDIA, "Matrix multiplication background", sec. 2.2).
        device: Where the parameters are.
        dtype: Their dtype.

    Raises:
        ValueError: If an argument is outside its range.

    Attributes:
        left_factor: ``U``, shape ``(out_features, capacity)``.
        right_factor: ``V``, shape ``(capacity, in_features)``.
        gate: Factor on each component's activation, shape ``(capacity,)``: 1 for active ones, 0 for
            the others, in between while a component fades out. A buffer.
        active_rank: `rank` as a buffer, int64, 0-d: checkpoints hold it.

    References:
        Khodak et al. (2021), "Initialization and regularization of factorized neural layers".
        https://arxiv.org/abs/2105.01029

    Example:
        >>> layer = LowRankLinear(6, 4, rank=2, capacity=3)
        >>> layer.rank, layer(torch.zeros(5, 6)).shape
        (2, torch.Size([5, 4]))
    """

    bias: nn.Parameter | None
    gate: Tensor
    active_rank: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        *,
        capacity: int | None = None,
        mode: Mode = "sliced",
        init: Init = "balanced",
        gain: float = 1.0,
        quantum: int = 8,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        capacity = rank if capacity is None else capacity
        _check(in_features, out_features, rank, capacity)
        for name, value, known in (("mode", mode, MODES), ("init", init, INITS)):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        if quantum < 1:
            raise ValueError(f"`quantum` must be >= 1, got {quantum}.")
        if not (math.isfinite(gain) and gain > 0):
            raise ValueError(f"`gain` must be finite and > 0, got {gain}.")
        self.in_features, self.out_features = in_features, out_features
        self.mode, self.init, self.gain, self.quantum = mode, init, gain, quantum
        options = {"device": device, "dtype": dtype}
        self.left_factor = nn.Parameter(torch.empty(out_features, capacity, **options))
        self.right_factor = nn.Parameter(torch.empty(capacity, in_features, **options))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, **options)) if bias else None
        )
        self.register_buffer("gate", torch.empty(capacity, **options))
        self.register_buffer("active_rank", torch.tensor(rank, device="cpu"))
        self._rank, self._num_probes = rank, 0
        self.reset_parameters()

    @property
    def rank(self) -> int:
        """Active components."""
        return self._rank

    @property
    def capacity(self) -> int:
        """Components that are stored."""
        return self.left_factor.shape[1]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Overwrite the factors with fresh initial values of the present rank, and the bias with 0.

        Args:
            generator: Source of randomness on the parameters' device; None means PyTorch's global
                one, as in any PyTorch module.
        """
        self.set_rank(self._rank)
        (m, n), r = (self.out_features, self.in_features), self._rank
        self.left_factor.zero_()
        self.right_factor.zero_()
        if self.bias is not None:
            self.bias.zero_()
        U, V = self.left_factor[:, :r], self.right_factor[:r]
        if self.init != "spectral":
            variance = 1 / r if self.init == "balanced" else 1 / m
            U.normal_(std=self.gain * math.sqrt(variance), generator=generator)
            V.normal_(std=math.sqrt(1 / n), generator=generator)
        elif U.device.type != "meta":
            dense = torch.empty(m, n, device=U.device).normal_(generator=generator)
            found = singular_triplets(dense)
            values = found.values[:r] / torch.linalg.vector_norm(found.values[:r])
            roots = (self.gain * math.sqrt(m) * values).sqrt()
            U.copy_(found.left[:, :r] * roots)
            V.copy_((found.right[:, :r] * roots).mT)

    @torch.no_grad()
    def set_rank(self, rank: int, *, keep_gates: bool = False) -> None:
        """Make the first `rank` components the active ones, and no others.

        The factors stay as they are, and so the function only if what leaves or enters is zero: to
        change a rank in training, see `spectral_lightning.actuators`.

        Args:
            rank: In ``[1, capacity]``.
            keep_gates: Whether components that stay active keep their gates, which else become 1.

        Raises:
            ValueError: If it is out of its range.
        """
        if not 1 <= rank <= self.capacity:
            raise ValueError(f"`rank` must be in [1, capacity = {self.capacity}], got {rank}.")
        start = min(self._rank, rank) if keep_gates else 0
        self._rank, self._num_probes = rank, 0
        self.active_rank.fill_(rank)
        self.gate[rank:] = 0
        self.gate[start:rank] = 1

    @torch.no_grad()
    def set_probes(self, num: int) -> None:
        """Compute the first `num` unused components too, though they write nothing.

        Their columns of ``U`` are zero, so that the function stays as it is, but get a gradient.

        Args:
            num: In ``[0, capacity - rank]``; 0 for none any more.

        Raises:
            ValueError: If it is out of its range.
        """
        most = self.capacity - self._rank
        if not 0 <= num <= most:
            raise ValueError(f"`num` must be in [0, capacity - rank = {most}], got {num}.")
        self._num_probes = num
        self.gate[self._rank :] = 0
        self.gate[self._rank : self._rank + num] = 1

    def factors(self) -> tuple[Tensor, Tensor]:
        """``U`` with its gates, shape ``(m, rank)``, and ``V``, ``(rank, n)``: what is active."""
        r, (left, right) = self._rank, map(_whole, (self.left_factor, self.right_factor))
        return left[:, :r] * self.gate[:r], right[:r]

    def spectral_weight(self) -> Tensor:
        """The weight ``U V``, shape ``(out_features, in_features)``."""
        left, right = self.factors()
        with torch.autocast(left.device.type, enabled=False):
            return left @ right

    @property
    def weight(self) -> Tensor:
        """The same, for code that reads it off linear layers; formed anew at every access."""
        return self.spectral_weight()

    def frobenius_norm_squared(self) -> Tensor:
        """``||U V||_F^2`` without forming the product, 0-d, differentiable.

        To add to a loss, instead of decaying the factors themselves, which favours low rank
        (Khodak et al. 2021, sec. 3.2).
        """
        left, right = self.factors()
        return ((left.mT @ left) * (right @ right.mT)).sum()

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, shape ``(*, in_features)`` to ``(*, out_features)``."""
        left: Tensor = self.left_factor
        right: Tensor = self.right_factor
        gate = self.gate
        if self.mode == "sliced":  # else no Python number may be read, or compilers depend on it
            blocks = -(-(self._rank + self._num_probes) // self.quantum)
            used = min(self.capacity, blocks * self.quantum)
            left, right, gate = left[:, :used], right[:used], gate[:used]
        hidden = F.linear(input, right)
        return F.linear(hidden * gate.to(hidden.dtype), left, self.bias)

    def to_linear(self) -> nn.Linear:
        """A plain layer with the same function, for export or above the break-even rank."""
        weight = self.spectral_weight().detach()
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        made.weight = nn.Parameter(weight, requires_grad=self.left_factor.requires_grad)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return made.train(self.training)

    @override
    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self._rank},"
            f" capacity={self.capacity}, bias={self.bias is not None}, mode={self.mode}"
        )

    @override
    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.active_rank.fill_(self._rank)  # an average of whole numbers is rounded down
        super()._save_to_state_dict(*args, **kwargs)

    @override
    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take over a saved rank, and factors of another capacity if their rank fits."""
        state_dict = {**state_dict, **self.fitted(state_dict, prefix)}
        if prefix + "active_rank" in state_dict:
            self._rank, self._num_probes = int(state_dict[prefix + "active_rank"]), 0
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        with torch.no_grad():
            self.gate[self._rank :] = 0  # probes belong to who measures with them

    def fitted(self, state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
        """Saved factors of another capacity, cut or padded with zeros to this one.

        Args:
            state_dict: State dict that may hold this layer's tensors.
            prefix: What their names begin with, such as ``"blocks.0."``.

        Returns:
            Those of the tensors that have to change, by their names in `state_dict`.

        Raises:
            ValueError: If the saved rank is above this layer's capacity.
        """
        dims = {"left_factor": 1, "right_factor": 0, "gate": 0}
        if any(prefix + name not in state_dict for name in (*dims, "active_rank")):
            return {}
        rank = int(state_dict[prefix + "active_rank"])
        if rank > self.capacity:
            raise ValueError(
                f"`capacity` must be at least the rank of the checkpoint, {rank} for"
                f" {prefix.rstrip('.')}, got {self.capacity}."
            )
        found = {}
        for name, dim in dims.items():
            old = state_dict[prefix + name]
            if old.shape[dim] != self.capacity:
                shape = list(old.shape)
                shape[dim] = self.capacity
                new, kept = old.new_zeros(shape), min(self.capacity, old.shape[dim])
                new.narrow(dim, 0, kept).copy_(old.narrow(dim, 0, kept))
                found[prefix + name] = new
        return found


def _whole(factor: Tensor) -> Tensor:
    """A factor that may be sharded, differentiably."""
    return factor.full_tensor() if isinstance(factor, DTensor) else factor


def _check(in_features: int, out_features: int, rank: int, capacity: int) -> None:
    for name, value in {"in_features": in_features, "out_features": out_features}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be >= 1, got {value}.")
    most = min(in_features, out_features)
    if not 1 <= capacity <= most:
        raise ValueError(
            f"`capacity` must be in [1, {most}], as the weight is {(out_features, in_features)},"
            f" got {capacity}."
        )
    if not 1 <= rank <= capacity:
        raise ValueError(f"`rank` must be in [1, capacity = {capacity}], got {rank}.")
