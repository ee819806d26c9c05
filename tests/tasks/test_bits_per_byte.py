import math

import pytest
import torch

from spectral_lightning.data import count_token_bytes, train_tokenizer
from spectral_lightning.tasks import BitsPerByte, TokenLoss
from spectral_lightning.tasks.bits_per_byte import token_nats

TEXT = "the singular values of the weights of the layer, the na\u00efve \u20ac way"


def tokenized(vocab_size):
    tokenizer = train_tokenizer(iter([TEXT]), vocab_size)
    return torch.tensor([tokenizer.encode(TEXT).ids]), count_token_bytes(tokenizer)


@pytest.mark.parametrize("vocab_size", [257, 270, 285])
def test_uniform_model_costs_the_logarithm_of_the_vocabulary_per_token(vocab_size):
    targets, token_bytes = tokenized(vocab_size)
    metric = BitsPerByte()
    metric.update(torch.zeros(*targets.shape, vocab_size), targets, token_bytes)
    num_tokens = targets.numel() - 1  # the special token is not text
    expected = math.log2(vocab_size) * num_tokens / len(TEXT.encode())
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("vocab_size", [257, 270, 285])
def test_same_probability_of_the_text_is_the_same_number_for_every_tokenizer(vocab_size):
    targets, token_bytes = tokenized(vocab_size)
    metric = BitsPerByte()
    metric.update(1.5 * math.log(2) * token_bytes[targets], targets, token_bytes)
    assert metric.compute().item() == pytest.approx(1.5, rel=1e-6)


def test_special_tokens_and_ignored_targets_do_not_count():
    token_bytes = torch.tensor([1, 3, 0])
    nats = torch.tensor([[1.0, 2.0, 100.0, 100.0]])
    targets = torch.tensor([[0, 1, 2, -1]])
    metric = BitsPerByte()
    metric.update(nats, targets, token_bytes)
    assert metric.compute().item() == pytest.approx(3.0 / (4 * math.log(2)))
    loss = TokenLoss()
    loss.update(torch.where(targets == -1, 0, nats), targets)
    assert loss.compute().item() == pytest.approx(103.0 / 3)


def test_logits_and_their_surprises_are_the_same():
    logits, targets = torch.randn(2, 5, 7), torch.randint(-1, 7, (2, 5))
    token_bytes = torch.arange(7)
    results = []
    for predictions in (logits, token_nats(logits, targets)):
        metric = BitsPerByte()
        metric.update(predictions, targets, token_bytes)
        results.append(metric.compute().item())
    assert results[0] == results[1]


@pytest.mark.parametrize("make_metric", [BitsPerByte, TokenLoss])
def test_result_does_not_depend_on_batches_or_ranks(make_metric):
    nats, targets = torch.rand(6, 5), torch.randint(0, 7, (6, 5))
    token_bytes = () if make_metric is TokenLoss else (torch.arange(7),)
    whole, first, second = make_metric(), make_metric(), make_metric()
    whole.update(nats, targets, *token_bytes)
    first.update(nats[:1], targets[:1], *token_bytes)
    second.update(nats[1:3], targets[1:3], *token_bytes)
    second.update(nats[3:], targets[3:], *token_bytes)
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(whole.compute().item(), rel=1e-6)


def test_long_evaluations_are_summed_without_loss():
    metric = BitsPerByte()
    targets, token_bytes = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([1])
    metric.update(torch.tensor([[2.0**24]]), targets, token_bytes)
    metric.update(torch.tensor([[1.0]]), targets, token_bytes)
    assert metric.nats.item() == 2.0**24 + 1  # float32 would drop the one


def test_devices_without_float64_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert BitsPerByte().nats.dtype == TokenLoss().nats.dtype == torch.float32


def test_half_precision_logits_are_judged_in_float32():
    logits = torch.full((1, 1, 1000), 8.0, dtype=torch.bfloat16)
    nats = token_nats(logits, torch.tensor([[3]]))
    assert nats.item() == pytest.approx(math.log(1000), rel=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shape of `targets` \(2, 5\), .* got \(2, 4, 7\)"):
        BitsPerByte().update(
            torch.zeros(2, 4, 7), torch.zeros(2, 5, dtype=torch.int64), torch.ones(7)
        )
