"""Keys and values of the tokens a causal model has already read."""

# Shape suffixes: B batch, H key/value heads, T new tokens, S tokens so far, D head dimension.

from torch import Tensor


class KVCache:
    """Keys and values of the tokens read so far, so that each new token costs one step.

    Every layer gets storage for the full capacity at its first `append`, with that call's batch
    size, heads, dtype and device; nothing is reallocated later. Made for inference: gradients do
    not survive the in-place writes, so use it under ``torch.no_grad()``.

    Args:
        capacity: Largest number of tokens per row, at least 1.

    Attributes:
        capacity: Largest number of tokens per row.
        length: Number of tokens per row already read.

    Raises:
        ValueError: If `capacity` is below 1.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"`capacity` must be >= 1, got {capacity}.")
        self.capacity = capacity
        self.length = 0
        self._storage: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values of the new tokens and return those of all tokens.

        The new tokens count as read only after `advance`, which the model calls once per
        forward pass, when all its layers have appended.

        Args:
            layer: Index of the layer.
            keys_BHTD: Keys of the new tokens, shape ``(B, H, T, D)``.
            values_BHTD: Values of the new tokens, shape ``(B, H, T, D)``.

        Returns:
            Views of the keys and the values of all tokens, each of shape
            ``(B, H, length + T, D)``.

        Raises:
            ValueError: If the tokens do not fit into the capacity or the batch size changes.
        """
        batch_size, num_heads, num_new, head_dim = keys_BHTD.shape
        end = self.length + num_new
        if end > self.capacity:
            raise ValueError(
                f"`keys_BHTD` must fit into the cache's capacity={self.capacity} tokens, "
                f"got {end} tokens; use a larger `capacity`."
            )
        if layer not in self._storage:
            shape = (batch_size, num_heads, self.capacity, head_dim)
            self._storage[layer] = (keys_BHTD.new_empty(shape), values_BHTD.new_empty(shape))
        keys_BHSD, values_BHSD = self._storage[layer]
        if keys_BHSD.shape[0] != batch_size:
            raise ValueError(
                f"`keys_BHTD` must have the cache's batch size {keys_BHSD.shape[0]}, "
                f"got {batch_size}; start a new cache for another batch."
            )
        keys_BHSD[:, :, self.length : end] = keys_BHTD
        values_BHSD[:, :, self.length : end] = values_BHTD
        return keys_BHSD[:, :, :end], values_BHSD[:, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` appended tokens per row as read."""
        self.length += num_tokens
