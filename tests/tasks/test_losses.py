"""Other losses than PyTorch's cross-entropy in language modelling."""

import math

import pytest
import torch
from torch.nn import functional as F

from spectral_lightning.cli.main import SpectralCLI
from spectral_lightning.losses import CrossEntropy, cross_entropy
from spectral_lightning.nn import log_stablemax
from spectral_lightning.tasks import LanguageModeling

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to `self.log"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.13
]
BATCH = torch.tensor([[1, 2, 3, 4, -1], [5, 6, 7, 8, 9]])
LOSSES = [
    CrossEntropy(),
    CrossEntropy(transform="stablemax"),
    CrossEntropy(transform="stablemax", label_smoothing=0.1, z_loss=0.01),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_chosen_loss_is_trained(make_bigram, loss):
    model = make_bigram(10)
    found = LanguageModeling(model, loss=loss).training_step(BATCH, 0)
    logits = model(BATCH[:, :-1].clamp(min=0))
    expected = cross_entropy(logits, BATCH[:, 1:], ignore_index=-1, **vars(loss))
    torch.testing.assert_close(found, expected)
    found.backward()
    assert model.head.weight.grad.any()


def test_without_a_loss_it_is_that_of_torch_to_the_last_bit(make_bigram):
    model = make_bigram(10)
    logits = model(BATCH[:, :-1].clamp(min=0)).flatten(0, 1)
    nats = F.cross_entropy(logits, BATCH[:, 1:].flatten(), ignore_index=-1, reduction="none")
    assert torch.equal(LanguageModeling(model).training_step(BATCH, 0), nats.sum() / 7)


@pytest.mark.parametrize("loss", LOSSES)
def test_validation_logs_the_loss_and_bits_of_the_same_probabilities(
    make_trainer, make_data, make_bigram, loss
):
    data, model = make_data(), make_bigram()
    (logged,) = make_trainer().validate(LanguageModeling(model, loss=loss), data, verbose=False)
    batch = torch.cat(list(data.val_dataloader()))
    ids = batch[:, 1:].flatten()
    with torch.no_grad():
        logits = model(batch[:, :-1].clamp(min=0)).flatten(0, 1)
    expected = cross_entropy(logits, ids, ignore_index=-1, **vars(loss))
    assert logged["valid/loss"] == pytest.approx(expected.item(), rel=1e-5)
    log = log_stablemax if loss.transform == "stablemax" else torch.nn.LogSoftmax(-1)
    nats = -log(logits).gather(1, ids.clamp(min=0)[:, None]).squeeze(1)
    num_bytes = data.token_bytes[ids.clamp(min=0)] * (ids >= 0)
    bits = nats[num_bytes > 0].double().sum() / math.log(2) / num_bytes.sum()
    assert logged["valid/bpb"] == pytest.approx(bits.item(), rel=1e-5)


def test_a_configuration_can_choose_the_loss(tmp_path):
    config = tmp_path / "loss.yaml"
    config.write_text("model: {loss: {transform: stablemax, label_smoothing: 0.1, z_loss: 0.0}}")
    names = ["--model=LanguageModeling", "--model.model=GPT", "--data=TextDataModule"]
    options = [*names, "--model.model.depth=1", "--seed_everything=0"]
    options.append(f"--trainer.default_root_dir={tmp_path}")
    for settings, expected in (
        (["--model.loss.transform", "stablemax"], CrossEntropy(transform="stablemax")),
        ([f"--config={config}"], CrossEntropy(transform="stablemax", label_smoothing=0.1)),
        ([], None),
    ):
        assert SpectralCLI([*options, *settings], run=False).model.loss == expected
