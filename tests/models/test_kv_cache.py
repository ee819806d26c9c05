"""The cache through the model: reading in pieces must equal reading at once."""

import pytest
import torch

from spectral_lightning.models import KVCache


@pytest.mark.parametrize("pieces", [[10], [1] * 10, [6, 1, 1, 2], [3, 7]], ids=str)
@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_reading_in_pieces_gives_the_logits_of_reading_at_once(
    tiny_gpt, tokens, pieces, num_kv_heads
):
    model, tokens_BT = tiny_gpt(head_dim=6, num_kv_heads=num_kv_heads), tokens(2, 10)
    kv_cache = KVCache(10)
    with torch.no_grad():
        parts = [model(part, kv_cache=kv_cache) for part in tokens_BT.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens_BT))
    assert kv_cache.length == 10


def test_storage_is_allocated_once_for_the_full_capacity():
    kv_cache = KVCache(4)
    first, _ = kv_cache.append(0, torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3))
    kv_cache.advance(1)
    second, _ = kv_cache.append(0, torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2, 3))
    assert first.data_ptr() == second.data_ptr()
    assert second.shape == (1, 2, 3, 3)
    assert second[0, 0, :, 0].tolist() == [1.0, 0.0, 0.0]


def test_fewer_key_value_heads_take_less_memory(tiny_gpt, tokens):
    sizes = []
    for num_kv_heads in (4, 1):
        model, kv_cache = tiny_gpt(head_dim=6, num_kv_heads=num_kv_heads), KVCache(8)
        with torch.no_grad():
            model(tokens(1, 1), kv_cache=kv_cache)
            keys, _ = kv_cache.append(0, *[torch.zeros(1, num_kv_heads, 7, 6)] * 2)
        sizes.append(keys.numel())
    assert sizes[0] == 4 * sizes[1]


def test_an_empty_cache_is_refused():
    with pytest.raises(ValueError, match=r"`capacity` must be >= 1, got 0\."):
        KVCache(0)


def test_more_tokens_than_the_capacity_are_refused(tiny_gpt, tokens):
    with pytest.raises(ValueError, match=r"capacity=3 tokens, got 4 tokens; use a larger"):
        tiny_gpt()(tokens(1, 4), kv_cache=KVCache(3))


def test_another_batch_size_is_refused(tiny_gpt, tokens):
    model, kv_cache = tiny_gpt(), KVCache(8)
    model(tokens(2, 3), kv_cache=kv_cache)
    with pytest.raises(ValueError, match=r"the cache's batch size 2, got 1; start a new cache"):
        model(tokens(1, 1), kv_cache=kv_cache)
