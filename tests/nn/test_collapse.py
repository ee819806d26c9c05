import math

import pytest
import torch

from spectral_lightning.nn import symlog
from spectral_lightning.nn.collapse import DTYPES, softmax_collapse
from spectral_lightning.testing.host_sync import RefuseHostSync

CLASSES = 113
BITS = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}


def rows(gap):
    """A correct class that is `gap` above all others, as of a network that is sure."""
    logits = torch.zeros(1, CLASSES, dtype=torch.float64)
    logits[0, 5] = gap
    return logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_vanishes_beyond_the_threshold_of_the_dtype(dtype):
    name = str(dtype).removeprefix("torch.")
    threshold = math.log(2 ** BITS[name] * (CLASSES - 1))
    logits = torch.cat([rows(threshold - 2), rows(threshold + 2)])
    found = softmax_collapse(logits, torch.tensor([5, 5]), [dtype]).dtypes[name]
    assert found.zero_loss == found.zero_gradient == found.absorbed == 0.5


def test_the_headroom_is_one_at_the_threshold_of_each_dtype():
    for name, bits in BITS.items():
        logits = rows(math.log(2**bits * (CLASSES - 1))).float()
        found = softmax_collapse(logits, torch.tensor([5])).dtypes[name]
        torch.testing.assert_close(found.headroom, torch.ones(3), rtol=1e-5, atol=0)


def test_the_fractions_are_of_the_samples_that_count():
    gaps = [30.0, 30.0, 30.0, 1.0, 30.0]
    logits = torch.cat([rows(gap) for gap in gaps]).float()
    targets = torch.tensor([5, 5, 6, 5, -100])  # right, right, wrong, unsure, ignored
    found = softmax_collapse(logits, targets).dtypes
    assert found["float32"].zero_loss == found["float32"].zero_gradient == 0.5
    assert found["float32"].absorbed == 0.75  # whatever the target is
    assert found["float64"].zero_loss == found["float64"].absorbed == 0
    # Leads of -30, 1 - log 112 = -3.7, and twice 30 - log 112 = 25.3 nats, over 16.6.
    leads = torch.tensor([-30.0, 30 - math.log(112), 30 - math.log(112)])
    torch.testing.assert_close(found["float32"].headroom, leads / (24 * math.log(2)))


def test_logits_of_stablemax_are_as_far_from_collapse_as_their_logarithms():
    logits = 100 * torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    targets = logits.argmax(1)
    bent = softmax_collapse(logits, targets, transform="stablemax").dtypes["float32"]
    plain = softmax_collapse(symlog(logits), targets).dtypes["float32"]
    torch.testing.assert_close(bent.headroom, plain.headroom)
    assert softmax_collapse(logits, targets).dtypes["float32"].zero_loss > 0.5
    assert bent.zero_loss == 0


@pytest.mark.parametrize("transform", ["softmax", "stablemax"])
def test_logit_scaling_is_the_derivative_of_the_loss(transform):
    logits = 3 * torch.randn(20, 9, generator=torch.Generator().manual_seed(0)).double()
    targets = torch.arange(20) % 9
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    scaled = factor * logits
    bent = symlog(scaled) if transform == "stablemax" else scaled
    torch.nn.functional.cross_entropy(bent, targets).backward()
    found = softmax_collapse(logits, targets, transform=transform).logit_scaling
    torch.testing.assert_close(found, factor.grad.float(), rtol=1e-5, atol=0)


def test_logit_scaling_of_sure_samples_keeps_its_digits():
    found = softmax_collapse(torch.tensor([[40.0, 0.0]]), torch.tensor([0])).logit_scaling
    assert found.item() == pytest.approx(-40 * math.exp(-40), rel=1e-4)


def test_masked_classes_and_no_targets_are_no_surprise():
    logits = torch.tensor([[2.0, -torch.inf, 1.0]])
    assert softmax_collapse(logits, torch.tensor([0])).logit_scaling.isfinite()
    nothing = softmax_collapse(logits, torch.tensor([-100]))
    assert nothing.logit_scaling.isnan()
    assert nothing.dtypes["float32"].headroom.isnan().all()


def test_the_host_does_not_wait():
    logits = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    for transform in ("softmax", "stablemax"):
        with RefuseHostSync():
            softmax_collapse(logits, torch.arange(8), transform=transform)
