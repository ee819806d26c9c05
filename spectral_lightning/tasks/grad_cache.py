"""Contrastive batches larger than memory: gradients of the whole batch, a chunk at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class GradCache:
    """Representations of a batch, encoded chunk by chunk, and the way back to the parameters.

    Each chunk is encoded twice: at construction without a graph, and in `backward` with one, under
    the random numbers of the first time, so that dropout is the same. In between, the loss is
    computed on `representations` as on those of any batch. Memory is that of one chunk's graph;
    the gradients are those of the whole batch, which accumulation does not give, as it compares
    texts within a chunk alone.

    For manual optimization in Lightning. Gradients are clipped, schedules stepped and gradients set
    to zero by the caller. Random numbers end as after one pass over the chunks.

    Args:
        encode: From a chunk to representations by name, shape ``(rows, ...)`` each; their rows are
            joined in the order of the chunks.
        chunks: What `encode` is called with.
        device: Device whose random numbers dropout draws, besides the CPU.
        no_sync: Context in which gradients are not synchronised, which holds for all chunks but
            the last, e.g. ``strategy.block_backward_sync`` of a Lightning strategy for several
            devices, or ``no_sync`` of a DDP module.

    Attributes:
        representations: All rows by name, without a graph, for the loss to be computed on.

    Raises:
        ValueError: If there is no chunk.

    References:
        Gao et al. (2021), "Scaling deep contrastive learning batch size under memory limited
        setup", section 3.2. https://arxiv.org/abs/2101.06983

    Example:
        >>> layer, batch = torch.nn.Linear(3, 2), torch.ones(4, 3)
        >>> cache = GradCache(lambda chunk: {"head": layer(chunk)}, batch.split(2))
        >>> cache.backward(cache.representations["head"].sum())
        >>> layer.bias.grad
        tensor([4., 4.])
    """

    def __init__(
        self,
        encode: Callable[[Any], Mapping[str, Tensor]],
        chunks: Sequence[Any],
        *,
        device: torch.device | str = "cpu",
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if not chunks:
            raise ValueError("`chunks` must be at least one part of a batch, got none.")
        self._encode, self._chunks, self._no_sync = encode, chunks, no_sync
        self._device = torch.device(device)
        self._shared: list[tuple[Tensor, Tensor]] = []
        self._random_states = []
        parts: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for chunk in chunks:
                self._random_states.append(self._random_state())
                for name, rows in encode(chunk).items():
                    parts.setdefault(name, []).append(rows)
        # Before its pull request 165068, PyTorch kept casts of weights that were made without a
        # graph, which would cut the graph of the second pass.
        torch.clear_autocast_cache()
        self._num_rows = {name: [len(rows) for rows in found] for name, found in parts.items()}
        self.representations: dict[str, Tensor] = {
            name: torch.cat(found).requires_grad_() for name, found in parts.items()
        }

    def detach(self, value: Tensor) -> Tensor:
        """Stand-in for another tensor that the loss needs and that is learned.

        For a learned temperature, say. Its gradient goes to its own graph with the last chunk,
        when gradients are synchronised.

        Args:
            value: Tensor with a graph of its own, computed once for the whole batch.
        """
        stand_in = value.detach().requires_grad_()
        self._shared.append((value, stand_in))
        return stand_in

    def backward(
        self, loss: Tensor, backward: Callable[[Tensor], Any] = torch.Tensor.backward
    ) -> None:
        """Add the gradients of a loss of `representations` to those of the parameters.

        Args:
            loss: Scalar.
            backward: What to call with a scalar of each chunk, e.g. ``manual_backward`` of a
                LightningModule, which scales it where gradients are scaled.

        Raises:
            ValueError: If the loss depends on none of the representations.
        """
        leaves = list(self.representations.values())
        stand_ins = [stand_in for _, stand_in in self._shared]
        found = torch.autograd.grad(loss, leaves + stand_ins, allow_unused=True)
        gradients = {
            name: torch.split(gradient, self._num_rows[name])
            for name, gradient in zip(self.representations, found, strict=False)
            if gradient is not None
        }
        if not gradients:
            raise ValueError("`loss` must be computed from `representations`, got one that is not.")
        pairs = zip(self._shared, found[len(leaves) :], strict=True)
        shared = [(value * grad).sum() for (value, _), grad in pairs if grad is not None]
        with self._replay():
            for index, chunk in enumerate(self._chunks):
                is_last = index == len(self._chunks) - 1
                with nullcontext() if is_last else self._no_sync():
                    self._set_random_state(self._random_states[index])
                    rows = self._encode(chunk)
                    parts = [(rows[name] * grad[index]).sum() for name, grad in gradients.items()]
                    backward(torch.stack(parts + shared if is_last else parts).sum())

    @contextmanager
    def _replay(self) -> Iterator[None]:
        """Put the random numbers back to where they are."""
        state = self._random_state()
        try:
            yield
        finally:
            self._set_random_state(state)

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type != "cpu":
            states.append(torch.get_device_module(self._device).get_rng_state(self._device))
        return states

    def _set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type != "cpu":
            module = torch.get_device_module(self._device)
            module.set_rng_state(states[1], self._device)
