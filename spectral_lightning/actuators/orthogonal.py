"""Taking out of gradients and updates what points along the weights themselves.

Lives here: the projection. Does not live here: which parameters take part.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

Granularity = Literal["tensor", "row", "global"]

MAX_GAIN = 10.0
"""Largest factor by which a projection may enlarge what it leaves: chosen here. Without a limit the
rounding errors of a gradient that is parallel to its weight would get the gradient's whole norm."""

# A dot product of more float32 numbers than this loses digits on a CPU; partial ones are summed in
# float64. Elsewhere it only limits the memory of casts.
_PIECE = {"cpu": 2**16}
_LARGEST_PIECE = 2**24

# Below this ||g||^2, squares of float32 numbers lose their digits.
_SMALLEST_SQUARE = 1e-30


@torch.no_grad()
def project_(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    granularity: Granularity | Sequence[Granularity] = "tensor",
    *,
    rescale: bool = True,
    max_gain: float = MAX_GAIN,
) -> Tensor:
    """Make gradients orthogonal to their weights: ``g <- c (g - (w.g / w.w) w)``, in place.

    With ``c = min(1 / sqrt(1 - cos^2), max_gain)`` the norm stays what it was, unless gradient and
    weight are nearly parallel. A step along the result leaves ``||w||`` as it is to first order.
    Costs three dot products and one pass of writing; dot products are in float32 (float64 for
    float64), their sums and all scalars in float64, and the host never waits. Gradients stay as
    they are where the weight is zero, where a dot product is not finite, and, up to the rescaling,
    where ``||g||`` is below 1e-15; so do those of complex and sparse tensors and of single numbers.

    Sharded tensors (DTensor) are projected as the whole they are part of: each rank adds up its
    shard's products, and one all-reduce of a few numbers per tensor completes them all (one for
    each set of mesh dimensions that shards some of them). All ranks have to call it.

    Args:
        gradients: Gradients, or anything shaped like the weights; overwritten.
        weights: Weights, any shape and strides.
        granularity: What is one vector, for all or for each: the ``"tensor"``, each of its
            ``"row"`` (first dimension; rows without gradient stay so), or ``"global"``, all tensors
            that say so together.
        rescale: Whether norms are kept, as in the paper; else ``c = 1``.
        max_gain: Largest ``c``, at least 1; infinite in the paper.

    Returns:
        ``cos(g, w)`` of each whole tensor before the projection, 0 where it is not defined, shape
        ``(len(weights),)``, float64 where the device has it.

    Raises:
        ValueError: If an argument is out of its range, or a weight and its gradient differ in
            shape, or in how they are sharded.

    References:
        Prieto et al. (2025), "Grokking at the edge of numerical stability" (orthograd.py of their
        code). https://arxiv.org/abs/2501.04697

    Example:
        >>> gradient = torch.tensor([[1.0, 1.0]])
        >>> project_([gradient], [torch.tensor([[0.0, 2.0]])], rescale=False)
        tensor([0.7071], dtype=torch.float64)
        >>> gradient
        tensor([[1., 0.]])
    """
    kinds = [granularity] * len(weights) if isinstance(granularity, str) else list(granularity)
    check_projection(kinds, max_gain)
    pairs = zip(weights, gradients, kinds, strict=True)
    parts = [_Part(i, w, g, kind) for i, (w, g, kind) in enumerate(pairs) if _fits(w, g)]
    if not parts:
        return torch.zeros(len(weights))
    for part in parts:
        part.measure()
    _all_reduce(parts)
    _pool([part for part in parts if part.kind == "global"])
    first = parts[0].total
    slopes, gains = _factors(torch.cat([part.rows.to(first) for part in parts]))
    gains = gains.clamp_max(max_gain if rescale else 1.0)
    sizes = [len(part.rows) for part in parts]
    factors = zip(torch.split(slopes, sizes), torch.split(gains, sizes), strict=True)
    for part, (slope, gain) in zip(parts, factors, strict=True):
        part.apply(slope, gain)
    cosines = [torch.zeros_like(first[0, 0])] * len(weights)
    found = _cosines(torch.cat([part.total.to(first) for part in parts]))
    for part, cosine in zip(parts, found.unbind(), strict=True):
        cosines[part.index] = cosine
    return torch.stack(cosines)


def check_projection(kinds: Sequence[str], max_gain: float) -> None:
    """Refuse what `project_` cannot do.

    Raises:
        ValueError: If a granularity is unknown, or `max_gain` is below 1.
    """
    for kind in kinds:
        if kind not in get_args(Granularity):
            allowed = ", ".join(get_args(Granularity))
            raise ValueError(f"`granularity` must be one of {allowed}, got {kind!r}.")
    if not max_gain >= 1:
        raise ValueError(f"`max_gain` must be >= 1, got {max_gain}.")


class _Part:
    """One weight and its gradient as this process holds them, as matrices at least.

    Attributes:
        index: Place among the weights of the call.
        kind: What is one vector.
        total: Products ``w.w, w.g, g.g`` of the whole tensor, shape ``(1, 3)``.
        rows: The same of each vector of its own, shape ``(num_vectors, 3)``.
        mesh: Mesh of a sharded tensor.
        total_dims: Mesh dimensions over which `total` is still to be summed.
        rows_dims: Those over which `rows` is.
    """

    def __init__(self, index: int, weight: Tensor, gradient: Tensor, kind: str) -> None:
        self.index = index
        self.kind = "tensor" if kind == "row" and weight.ndim < 2 else kind
        self.mesh: DeviceMesh | None = None
        self.total_dims: tuple[int, ...] = ()
        self.rows_dims: tuple[int, ...] = ()
        if isinstance(weight, DTensor):
            self.mesh = weight.device_mesh
            shards = _shards(weight)
            self.total_dims = tuple(shards)
            self.rows_dims = tuple(i for i, dim in shards.items() if dim != 0)
        weight, gradient = _local(weight), _local(gradient)
        self.weight = weight if weight.ndim > 1 else weight.unsqueeze(0)
        self.gradient = gradient if gradient.ndim > 1 else gradient.unsqueeze(0)
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.total = self.rows = torch.empty(0)

    def measure(self) -> None:
        """Take the products of what this process holds."""
        w, g = self.weight, self.gradient
        exact = _exact(w.device)
        if self.kind == "row":
            w, g = w.flatten(1).to(self.dtype), g.flatten(1).to(self.dtype)
            products = [torch.linalg.vecdot(*pair).to(exact) for pair in ((w, w), (w, g), (g, g))]
            self.rows = torch.stack(products, 1)
            self.total = self.rows.sum(0, keepdim=True)
            return
        size = _PIECE.get(w.device.type, _LARGEST_PIECE)
        pieces = zip(torch.split(w.flatten(), size), torch.split(g.flatten(), size), strict=True)
        products = []
        for w, g in ((one.to(self.dtype), other.to(self.dtype)) for one, other in pieces):
            products += [torch.dot(w, w), torch.dot(w, g), torch.dot(g, g)]
        self.total = torch.stack(products).view(-1, 3).sum(0, keepdim=True, dtype=exact)
        self.rows = self.total

    def apply(self, slope: Tensor, gain: Tensor) -> None:
        """Make the gradient ``gain (g - slope w)``, with factors of shape ``(num_vectors,)``."""
        gradient = self.gradient.to(self.dtype)
        # One factor for each row: of a single number the CPU's kernel takes 20 times as long.
        shape = (len(gradient), *[1] * (gradient.ndim - 1))
        down, up = (
            factor.to(gradient.device, self.dtype).expand(len(gradient)).reshape(shape)
            for factor in (-slope, gain)
        )
        gradient.addcmul_(self.weight.to(self.dtype), down).mul_(up)
        if gradient is not self.gradient:
            self.gradient.copy_(gradient)


def _fits(weight: Tensor, gradient: Tensor) -> bool:
    """Whether there is something to project.

    Raises:
        ValueError: If weight and gradient do not belong together.
    """
    if weight.layout != torch.strided or gradient.layout != torch.strided:
        return False
    if not weight.is_floating_point() or weight.numel() < 2:
        return False
    if weight.shape != gradient.shape or _placements(weight) != _placements(gradient):
        raise ValueError(
            "`gradients` must be shaped and sharded like their weights, got"
            f" {tuple(gradient.shape)} {_placements(gradient)} for"
            f" {tuple(weight.shape)} {_placements(weight)}."
        )
    return True


def _placements(tensor: Tensor) -> tuple[Placement, ...]:
    return tuple(tensor.placements) if isinstance(tensor, DTensor) else ()


def _shards(tensor: DTensor) -> dict[int, int]:
    """Mesh dimensions that shard a tensor, each with the dimension of the tensor."""
    shards: dict[int, int] = {}
    for i, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise ValueError(
                f"`gradients` must be complete on each rank, got {placement}; reduce them first."
            )
        if not placement.is_replicate():
            shards[i] = placement.dim  # type: ignore[attr-defined]
    return shards


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _all_reduce(parts: list[_Part]) -> None:
    """Complete the products of sharded tensors, by one all-reduce per set of mesh dimensions."""
    waiting: dict[tuple[DeviceMesh, tuple[int, ...]], list[Tensor]] = {}
    for part in parts:
        if part.mesh is None:
            continue
        if part.total_dims:
            waiting.setdefault((part.mesh, part.total_dims), []).append(part.total)
        if part.kind == "row" and part.rows_dims:
            waiting.setdefault((part.mesh, part.rows_dims), []).append(part.rows)
    for (mesh, dims), products in waiting.items():
        buffer = torch.cat(products)
        for dim in dims:
            torch.distributed.all_reduce(buffer, group=mesh.get_group(dim))
        completed = torch.split(buffer, [len(own) for own in products])
        for own, whole in zip(products, completed, strict=True):
            own.copy_(whole)


def _pool(parts: list[_Part]) -> None:
    """Make several tensors one vector."""
    if parts:
        first = parts[0].total
        whole = torch.cat([part.total.to(first) for part in parts]).sum(0, keepdim=True)
        for part in parts:
            part.rows = whole


def _factors(products: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes ``w.g / w.w`` and gains ``1 / sqrt(1 - cos^2)`` of vectors, shape ``(k,)`` each."""
    ww, wg, gg = products.unbind(1)
    usable = torch.isfinite(products).all(1) & (ww > 0)
    slopes = torch.where(usable, wg / ww, 0.0)
    rest = (1 - wg / ww * (wg / gg)).clamp(1e-12, 1.0)
    return slopes, torch.where(usable & (gg > _SMALLEST_SQUARE), rest.rsqrt(), 1.0)


def _cosines(products: Tensor) -> Tensor:
    ww, wg, gg = products.unbind(1)
    return torch.where((ww > 0) & (gg > 0), wg / ww.sqrt() / gg.sqrt(), 0.0).clamp(-1.0, 1.0)
