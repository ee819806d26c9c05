"""Texts of a batch in chunks of like length, and the way through a model and back.

Rows of a batch differ in length, anchors from positives above all. Sorted by length and cut, each
chunk is only as wide as its own longest text.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Encode = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


class Chunks(NamedTuple):
    """Texts in chunks of like length.

    Attributes:
        input_ids: Token ids of each chunk, shape ``(n_i, S_i)``.
        attention_mask: 1 at tokens, of the same shapes.
        places: Where text ``j`` of the batch stands in the chunks, shape ``(num_texts,)``; None if
            they are in order.
    """

    input_ids: list[Tensor]
    attention_mask: list[Tensor]
    places: Tensor | None


def cut(batch: Mapping[str, Any], chunk_size: int | None, multiple_of: int = 8) -> Chunks:
    """Cut the texts of a batch into chunks of like length.

    Args:
        batch: With `input_ids` and `attention_mask` ``(B, k, S)``, padded on the right. On another
            device than the CPU the host waits for the lengths.
        chunk_size: Texts per chunk, at least 1; None for one chunk, in order and as it is.
        multiple_of: Widths are rounded up to a multiple of this, but not above ``S``.

    Returns:
        The chunks, shortest texts first, each cut to its longest text.
    """
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    num_texts, width = ids.shape
    if chunk_size is None or chunk_size >= num_texts:
        return Chunks([ids], [mask], None)
    lengths = mask.sum(1).cpu()
    order = lengths.argsort(stable=True)
    chunks = Chunks([], [], order.argsort().to(ids.device, non_blocking=True))
    for chunk in order.split(chunk_size):
        longest = max(int(lengths[chunk[-1]]), 1)
        kept = min(-(-longest // multiple_of) * multiple_of, width)
        rows = chunk.to(ids.device, non_blocking=True)
        chunks.input_ids.append(ids[rows, :kept])
        chunks.attention_mask.append(mask[rows, :kept])
    return chunks


def encode_chunks(
    encode: Encode, chunks: Chunks, num_columns: int, *, recompute: bool
) -> list[dict[str, Tensor]]:
    """Encode all texts of a batch.

    With `recompute` the forward pass keeps nothing but its inputs, and the backward pass makes that
    of one chunk after the other anew, with the random numbers it had: the gradient is that of the
    whole batch, in the memory of one chunk (gradient caching).

    Args:
        encode: Gives representations ``(n, d)`` by name for token ids and mask ``(n, S)``.
        chunks: The texts, ``B * num_columns`` of them.
        num_columns: Texts per row of the batch.
        recompute: Whether to keep no activations.

    Returns:
        For each column, its representations ``(B, d)`` by name.

    References:
        Gao et al. (2021), "Scaling deep contrastive learning batch size under memory limited
        setup". https://arxiv.org/abs/2101.06983
    """
    parts = [
        checkpoint(_plain(encode), ids, mask, use_reentrant=False)
        if recompute and torch.is_grad_enabled()
        else dict(encode(ids, mask))
        for ids, mask in zip(chunks.input_ids, chunks.attention_mask, strict=True)
    ]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if chunks.places is not None:
        joined = {name: whole[chunks.places] for name, whole in joined.items()}
    columns = {
        name: whole.view(-1, num_columns, *whole.shape[1:]) for name, whole in joined.items()
    }
    return [{name: whole[:, i] for name, whole in columns.items()} for i in range(num_columns)]


def _plain(encode: Encode) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    return lambda ids, mask: dict(encode(ids, mask))
