"""A rolling buffer of embeddings, and readings of it that do not make the device wait."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_lightning.linalg.embeddings import alignment, embedding_spread, unit_gram
from spectral_lightning.spectra.launch import Launch, sent

__all__ = ["EmbeddingBuffer", "EmbeddingLaunch", "alignment", "launch_embeddings"]


class EmbeddingBuffer:
    """The latest rows of a stream of batches, on the device they come from, in float32.

    Args:
        num_rows: Rows that are kept.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.rows: Tensor | None = None
        """Shape ``(num_rows, d)``, in no order, zero where none has come yet; None at first."""
        self._num_seen = 0

    @property
    def is_full(self) -> bool:
        """Whether every row has been written."""
        return self._num_seen >= self.num_rows

    def push(self, rows: Tensor) -> None:
        """Take the rows of a batch in, in place of the oldest; never waits for the device."""
        rows = rows.detach()[-self.num_rows :].float()
        if self.rows is None or self.rows.shape[1] != rows.shape[1]:
            self.rows, self._num_seen = rows.new_zeros(self.num_rows, rows.shape[1]), 0
        self.rows = self.rows.to(rows.device)
        start = self._num_seen % self.num_rows
        num_first = min(len(rows), self.num_rows - start)
        self.rows[start : start + num_first] = rows[:num_first]
        self.rows[: len(rows) - num_first] = rows[num_first:]
        self._num_seen += len(rows)

    def state_dict(self) -> dict[str, Any]:
        """Rows and their number."""
        rows = None if self.rows is None else self.rows.to("cpu", copy=True)
        return {"rows": rows, "seen": self._num_seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the rows of a checkpoint, unless their number has changed."""
        rows = state["rows"]
        if rows is not None and len(rows) == self.num_rows:
            self.rows, self._num_seen = rows.clone(), state["seen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingLaunch:
    """Measures of embeddings on their way from the device to the host, in one packed tensor."""

    launch: Launch
    num_rows: int
    max_rank: int

    def measures(self) -> dict[str, float]:
        """Measures by name, the ranks from eigenvalues that are taken here, on the host."""
        table = self.launch.on_host()
        num_cosines = self.num_rows**2
        gram = table[:num_cosines].reshape(self.num_rows, self.num_rows)
        others = zip(self.launch.names, table[num_cosines:].tolist(), strict=True)
        return {**embedding_spread(gram)._asdict(), **dict(others)}

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain containers and tensors; waits for the device."""
        return {
            "step": self.launch.step,
            "names": list(self.launch.names),
            "table": self.launch.on_host().clone(),
            "num_rows": self.num_rows,
            "max_rank": self.max_rank,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "EmbeddingLaunch":
        """Return the launch that a state is of."""
        launch = Launch(state["step"], tuple(state["names"]), state["table"], None)
        return cls(launch=launch, num_rows=state["num_rows"], max_rank=state["max_rank"])


def launch_embeddings(step: int, rows: Tensor, others: Mapping[str, Tensor]) -> EmbeddingLaunch:
    """Measure embeddings and send what was measured to the host, without waiting for it.

    Args:
        step: Optimizer steps done.
        rows: Embeddings, shape ``(n, d)``.
        others: Scalars to send along, by name.

    Returns:
        What will be on the host.
    """
    scalars = dict(others) | {"std": rows.std(0).mean()}
    parts = [value.detach().to(rows.device, torch.float64).reshape(1) for value in scalars.values()]
    table = torch.cat([unit_gram(rows).flatten(), *parts])
    n, d = rows.shape
    return EmbeddingLaunch(
        launch=sent(step, tuple(scalars), table), num_rows=n, max_rank=min(n - 1, d)
    )
