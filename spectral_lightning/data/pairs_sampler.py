"""Which rows of texts come into one batch, and in which order.

Training batches are full, of one source each, and drawn from the seed and the epoch; evaluation
keeps the order of the rows and counts each of them once. Both are sharded over ranks.
"""

import hashlib
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from spectral_lightning.data.windows import ResumableLoader, WindowSampler

Ids = npt.NDArray[np.int64]
"""Ids of the texts of each row, shape ``(rows, texts)``, equal for equal texts."""


def full_batches(ids: Ids, order: npt.NDArray[np.int64], size: int) -> list[list[int]]:
    """Cut an order into full batches in which no two rows share a text.

    A row that shares a text with the batch at hand waits for the next one that has none of its
    texts. What is left at the end and fills no batch is left out.

    Args:
        ids: Ids of the texts.
        order: Numbers of the rows, shape ``(rows,)``.
        size: Rows per batch.

    Example:
        >>> full_batches(np.array([[1, 2], [1, 3], [4, 5], [6, 7]]), np.arange(4), size=2)
        [[0, 2], [1, 3]]
    """
    texts = ids.tolist()
    stream = iter(order.tolist())
    # Rows that wait, by the text that they were refused for: only the first of each can be next.
    waiting: OrderedDict[int, deque[int]] = OrderedDict()
    batches: list[list[int]] = []
    while True:
        batch = _next_batch(texts, stream, waiting, size)
        if not batch:
            return batches
        if len(batch) == size:
            batches.append(batch)


def _next_batch(
    texts: list[list[int]],
    stream: Iterator[int],
    waiting: "OrderedDict[int, deque[int]]",
    size: int,
) -> list[int]:
    """Return the next rows without a common text, at most `size`; the others wait."""
    batch: list[int] = []
    used: set[int] = set()

    def offer(row: int) -> None:
        clash = next((text for text in texts[row] if text in used), None)
        if clash is None:
            batch.append(row)
            used.update(texts[row])
        else:
            waiting.setdefault(clash, deque()).append(row)

    for _ in range(len(waiting)):
        if len(batch) == size:
            return batch
        text, rows = waiting.popitem(last=False)
        row = rows.popleft()
        if rows:
            waiting[text] = rows
        offer(row)
    while len(batch) < size and (row := next(stream, -1)) >= 0:
        offer(row)
    return batch


class PairBatchSampler(WindowSampler):
    """Choose the training batches of one rank: full, of one source each, all ranks equally many.

    Rows are shuffled by ``(seed, epoch)`` and cut into batches for all ranks together, so with
    `no_duplicates` no two rows share a text even where negatives are gathered over the ranks.
    The number of batches is that of the first epoch.

    Args:
        rows: The rows to choose from.
        ids: Ids of the texts of each source, in the order of `rows`.
        names: What each source is, for error messages.
        batch_size: Rows per batch and rank.
        no_duplicates: Let no two rows of a batch share a text.
        weights: Share of the batches for each source. None takes as many as each has; else a
            source that has too few is seen again, in another order.
        seed: Chooses the orders.
        num_replicas: Number of ranks that see different rows.
        rank: This rank.

    Raises:
        ValueError: If a source fills no batch.
    """

    def __init__(
        self,
        rows: Dataset[Any],
        *,
        ids: Sequence[Ids],
        names: Sequence[str],
        batch_size: int,
        no_duplicates: bool = True,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(
            rows,
            batch_size=batch_size,
            shuffle=True,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
        )
        self.no_duplicates = no_duplicates
        self.ids = ids
        self._firsts = np.cumsum([0, *map(len, ids)]).tolist()
        self._cached: tuple[int, list[list[int]]] | None = None
        size = batch_size * num_replicas
        found = [len(self._pass(source, epoch=0, number=0)) for source in range(len(ids))]
        for name, number, part in zip(names, found, ids, strict=True):
            if number == 0:
                clause = " that share no text" if no_duplicates else ""
                raise ValueError(
                    f"`batch_size` times the ranks must be at most the number of training rows"
                    f"{clause}, but {size} is more than {name} has in its {len(part)} rows. Lower"
                    " it or give more data."
                )
        self.num_left_over = sum(map(len, ids)) - size * sum(found)
        """Rows of the first epoch that fill no batch."""
        self.num_batches = _shares(found, weights)
        """Batches per epoch from each source."""
        self.num_samples = sum(self.num_batches)
        self.total_size = self.num_samples * size

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides the order."""
        settings = (self.batch_size * self.num_replicas, self.no_duplicates, self.num_batches)
        digest = hashlib.blake2b(repr((settings, self.seed)).encode(), digest_size=16)
        for part in self.ids:
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    @override
    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        """Yield the rows of each batch of this rank, from where a resumed epoch continues."""
        first = self.start // (self.batch_size * self.num_replicas)
        low = self.rank * self.batch_size
        for batch in self._epoch_batches()[first:]:
            yield batch[low : low + self.batch_size]

    def _epoch_batches(self) -> list[list[int]]:
        if self._cached is None or self._cached[0] != self.epoch:
            sources = np.repeat(np.arange(len(self.ids)), self.num_batches)
            np.random.default_rng((self.seed, self.epoch)).shuffle(sources)
            parts = [
                iter(self._source_batches(source, number))
                for source, number in enumerate(self.num_batches)
            ]
            self._cached = self.epoch, [next(parts[source]) for source in sources.tolist()]
        return self._cached[1]

    def _source_batches(self, source: int, number: int) -> list[list[int]]:
        """Return `number` batches of one source, from as many passes over it as it takes."""
        batches: list[list[int]] = []
        passes = 0
        while len(batches) < number:
            batches += self._pass(source, self.epoch, passes)
            passes += 1
        return batches[:number]

    def _pass(self, source: int, epoch: int, number: int) -> list[list[int]]:
        ids, first = self.ids[source], self._firsts[source]
        size = self.batch_size * self.num_replicas
        # A seed sequence mixes the numbers: seed 0 in epoch 1 is not seed 1 in epoch 0.
        generator = np.random.default_rng((self.seed, epoch, source, number))
        order = generator.permutation(len(ids))
        if self.no_duplicates:
            batches = full_batches(ids, order, size)
        else:
            batches = order[: len(ids) // size * size].reshape(-1, size).tolist()
        return [[first + row for row in batch] for batch in batches]


def _shares(found: list[int], weights: Sequence[float] | None) -> list[int]:
    """Spread the batches that were found over the sources by weight, at least one each."""
    if weights is None:
        return found
    total = sum(found)
    return [max(1, round(total * weight / sum(weights))) for weight in weights]


class PairLoader(ResumableLoader):
    """A loader over a `PairBatchSampler` that continues inside an epoch.

    On another number of ranks it continues if the batch over all ranks keeps its size.
    """

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values; empty if the sampler was replaced."""
        sampler = self.sampler
        if not isinstance(sampler, PairBatchSampler):
            return {}
        return {**super().state_dict(), "pairs": sampler.fingerprint}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last batch that was handed out when the state was taken.

        Warns:
            UserWarning: If the state belongs to other data, batches or seed; the epoch then
                starts from its first batch.
        """
        sampler = self.sampler
        if not state_dict or not isinstance(sampler, PairBatchSampler):
            return
        if state_dict.get("pairs") != sampler.fingerprint:
            warnings.warn(
                "The checkpoint was written for other pairs, another batch size, number of ranks"
                " or seed, so the training data start from the beginning of the epoch.",
                stacklevel=2,
            )
            state_dict = {**state_dict, "windows": 0}
        own = super().state_dict()
        super().load_state_dict(state_dict | {key: own[key] for key in ("num_windows", "seed")})


class EvaluationBatchSampler(DistributedSampler[list[int]]):
    """Choose the evaluation batches of one rank: in order, each row once, no rank short of any.

    A batch has rows of one part only. Where the rows do not divide among the ranks, ``~row`` (a
    negative number) asks for a row that fills up and does not count.

    Args:
        rows: The rows to choose from.
        lengths: Number of rows of each part.
        batch_size: Rows per batch and rank.
        num_replicas: Number of ranks that see different rows.
        rank: This rank.
    """

    def __init__(
        self,
        rows: Dataset[Any],
        *,
        lengths: Sequence[int],
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(rows, num_replicas=num_replicas, rank=rank, shuffle=False)
        self._batches: list[list[int]] = []
        first = 0
        for length in lengths:
            missing = -length % num_replicas
            order = [*range(first, first + length), *([~first] * missing)]
            own = order[rank::num_replicas]
            self._batches += [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
            first += length
        self.num_samples = len(self._batches)

    @override
    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rows of each batch of this rank."""
        return iter(self._batches)
