import weakref

import pytest
import torch

from spectral_lightning.losses import SpectraLoss
from spectral_lightning.tasks.embedding_batches import cut, encode_chunks
from tests.tasks.embedding_cases import assert_same, make_batch, make_task


def gradients(chunk_size, *, recompute):
    """Gradients of the whole loss for one batch of triplets."""
    task = make_task(loss=SpectraLoss(triplet_weight=0.5), chunk_size=chunk_size)
    task.double()
    columns = task.represent(make_batch(6, 3), recompute=recompute)
    first, second, third = columns
    task.loss(first, second, third, temperature=0.1).total.backward()
    return {name: weight.grad for name, weight in task.model.named_parameters()}


def test_texts_are_cut_by_length_and_padding_goes():
    batch = make_batch(5, 2, width=20)
    chunks = cut(batch, 3, multiple_of=4)
    lengths = [mask.sum(1) for mask in chunks.attention_mask]
    assert [len(chunk) for chunk in lengths] == [3, 3, 3, 1]
    assert torch.cat(lengths).diff().min() >= 0
    for mask, rows in zip(chunks.attention_mask, lengths, strict=True):
        assert mask.shape[1] == min(-(-int(rows[-1]) // 4) * 4, 20)
    back = torch.cat([ids.sum(1) for ids in chunks.input_ids])[chunks.places]
    assert torch.equal(back, batch["input_ids"].flatten(0, 1).sum(1))


@pytest.mark.parametrize(("settings", "expected"), [({}, 3), ({"chunk_size": None}, 1)])
def test_chunks_are_small_on_a_cpu_unless_they_are_off(settings, expected):
    task = make_task(**settings)
    calls = []
    task.model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    task.represent(make_batch(20))
    assert len(calls) == expected
    assert sum(calls) == 40


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 5, 18])
def test_chunks_have_the_gradients_of_the_whole_batch(chunk_size, recompute):
    whole = gradients(None, recompute=False)
    assert_same(gradients(chunk_size, recompute=recompute), whole, atol=1e-12)


def test_recomputing_draws_the_dropout_of_the_first_pass():
    results = []
    for recompute in (False, True):
        task = make_task({"hidden_dropout": 0.3}, chunk_size=4)
        torch.manual_seed(1)
        first, second = task.represent(make_batch(6), recompute=recompute)
        task.loss(first, second, temperature=0.1).total.backward()
        found = {name: weight.grad for name, weight in task.model.named_parameters()}
        results.append(found | {"random": torch.rand(3)})
    assert_same(results[1], results[0])


def test_recomputing_holds_the_activations_of_one_chunk():
    weight = torch.ones(400, 4, requires_grad=True)
    alive, counts = weakref.WeakSet(), []

    def encode(ids, mask):
        counts.append(len(alive))
        hidden = weight[ids].exp()
        squared = hidden.pow(2)  # keeps `hidden` for its gradient
        alive.add(hidden)
        return {"head": squared.sum((1, 2))[:, None]}

    columns = encode_chunks(encode, cut(make_batch(4), 2), 2, recompute=True)
    sum(column["head"].pow(2).sum() for column in columns).backward()
    assert len(counts) == 8
    assert max(counts) <= 1
