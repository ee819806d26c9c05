import pytest
import torch

from spectral_lightning.data import ModularArithmetic


@pytest.mark.parametrize(
    ("operation", "answer"),
    [
        ("add", lambda a, b: (a + b) % 7),
        ("subtract", lambda a, b: (a - b) % 7),
        ("multiply", lambda a, b: (a * b) % 7),
    ],
)
def test_batches_hold_every_pair_once_with_its_answer(operation, answer):
    data = ModularArithmetic(operation, modulus=7)
    (train,), (valid,) = data.train_dataloader(), data.val_dataloader()
    assert len(train[0]) == 19  # 40 % of 49
    pairs, answers = (torch.cat(parts) for parts in zip(train, valid, strict=True))
    assert (pairs.dtype, answers.dtype) == (torch.int64, torch.int64)
    assert sorted(map(tuple, pairs.tolist())) == [(a, b) for a in range(7) for b in range(7)]
    for (a, b), c in zip(pairs.tolist(), answers.tolist(), strict=True):
        assert c == answer(a, b)


def test_the_seed_alone_chooses_the_training_pairs():
    state = torch.random.get_rng_state()
    first, same, other = (ModularArithmetic(modulus=7, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.train_pairs.pairs, same.train_pairs.pairs)
    assert not torch.equal(first.train_pairs.pairs, other.train_pairs.pairs)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_small_batches_come_in_another_order_each_epoch_and_cover_it():
    data = ModularArithmetic(modulus=7, batch_size=5)
    loader = data.train_dataloader()
    epochs = [torch.cat([pairs for pairs, _ in loader]) for _ in range(2)]
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(data.train_pairs.pairs.tolist())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"operation": "divide"}, "`operation` must be one of add, subtract, multiply, got 'div"),
        ({"modulus": 1}, "`modulus` must be >= 2, got 1."),
        ({"train_fraction": 1.0}, "`train_fraction` must be above 0 and below 1 .* got 1.0 of 12"),
        ({"modulus": 2, "train_fraction": 0.1}, "give a pair to train on, got 0.1 of 4 pairs"),
        ({"batch_size": 0}, "`batch_size` must be >= 1 or None, got 0."),
    ],
)
def test_bad_arguments_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModularArithmetic(**arguments)
