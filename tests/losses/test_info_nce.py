"""InfoNCE in one process: values, false negatives, margins, precision, and what is refused."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from spectral_lightning.losses import CrossEntropy, LearnableTemperature, info_nce
from spectral_lightning.nn import symlog


def cosines(rows, columns):
    return F.normalize(rows, dim=-1) @ F.normalize(columns, dim=-1).T


def test_loss_is_the_surprise_at_the_positive_among_all_texts(make_groups):
    groups = make_groups(num_texts=4)
    a, p, n = groups[:, 0], groups[:, 1], groups[:, 2:]
    texts = torch.cat([p, n[:, 0], n[:, 1]])
    forward = -(cosines(a, texts) / 0.1).log_softmax(1).diagonal().mean()
    backward = -(cosines(p, a) / 0.1).log_softmax(1).diagonal().mean()
    found = info_nce(a, p, n, temperature=0.1)
    torch.testing.assert_close(found, (forward + backward) / 2)
    torch.testing.assert_close(info_nce(a, p, n, temperature=0.1, symmetric=False), forward)
    one = info_nce(a, p, n[:, 0], temperature=0.1)
    torch.testing.assert_close(one, info_nce(a, p, n[:, :1], temperature=0.1))


def test_texts_known_to_fit_are_no_negatives(make_groups):
    groups = make_groups(num_rows=4)
    a, p, n = groups.unbind(1)
    # Rows 0 and 1 ask the same; 2 has the positive of 0; a hard negative of 3 is its own anchor,
    # and one of 2 is its own positive.
    ids = torch.tensor([[10, 20, 30], [10, 21, 31], [12, 20, 20], [13, 23, 13]])
    false_texts = {(0, 1), (1, 0), (0, 2), (2, 0), (2, 4 + 2), (0, 4 + 2), (3, 4 + 3)}
    false_anchors = {(0, 1), (1, 0), (0, 2), (2, 0)}

    def direction(rows, columns, false):
        logits = cosines(rows, columns) / 0.1
        for index in false:
            logits[index] = -torch.inf
        return -logits.log_softmax(1).diagonal().mean()

    options = {"anchor_ids": ids[:, 0], "positive_ids": ids[:, 1], "negative_ids": ids[:, 2]}
    forward = direction(a, torch.cat([p, n]), false_texts)
    found = info_nce(a, p, n, temperature=0.1, symmetric=False, **options)
    torch.testing.assert_close(found, forward)
    found = info_nce(a, p, n, temperature=0.1, **options)
    torch.testing.assert_close(found, (forward + direction(p, a, false_anchors)) / 2)


def test_texts_closer_than_the_margin_do_not_count():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    n = torch.tensor([[0.96, 0.28], [0.6, 0.8]])
    p = torch.tensor([[0.9, math.sqrt(0.19)], [0.0, 1.0]])
    # Cosines with anchor 0: target 0.9, the other positive 0, negatives 0.96 and 0.6.
    kept = torch.tensor([0.9, 0.0, 0.6])
    expected = kept.logsumexp(0) - 0.9
    row = info_nce(a, p, n, temperature=1.0, margin=0.1, symmetric=False)
    other = torch.tensor([1.0, math.sqrt(0.19), 0.28, 0.8])
    torch.testing.assert_close(row, (expected + other.logsumexp(0) - 1) / 2)


def test_another_cross_entropy_may_replace_softmax(make_groups):
    a, p = make_groups(num_texts=2).unbind(1)
    logits = symlog(cosines(a, p) / 0.1)
    expected = F.cross_entropy(logits, torch.arange(6))
    loss = CrossEntropy(transform="stablemax")
    found = info_nce(a, p, temperature=0.1, symmetric=False, loss=loss)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("margin", [None, 0.1])
def test_gradients_agree_with_differences(make_groups, margin):
    groups = make_groups(num_rows=3, dim=4).requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 1, 2], [3, 1, 4], [5, 6, 5]])

    def loss(groups, temperature):
        a, p, n = groups.unbind(1)
        names = ("anchor_ids", "positive_ids", "negative_ids")
        options = dict(zip(names, ids.unbind(1), strict=True))
        return info_nce(a, p, n, temperature=temperature, margin=margin, **options)

    assert gradcheck(loss, (groups, temperature))


def test_half_precision_is_computed_in_float32(make_groups):
    groups = make_groups(num_rows=32, dim=64, dtype=torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce(*groups.unbind(1), temperature=0.05)
    found.backward()
    wide = groups.detach().double().requires_grad_()
    expected = info_nce(*wide.unbind(1), temperature=0.05)
    expected.backward()
    assert found.dtype == torch.float32
    assert groups.grad.dtype == torch.bfloat16
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(groups.grad.double(), wide.grad, rtol=1e-2, atol=1e-7)


def test_a_learned_temperature_gets_its_gradient_also_where_texts_are_masked(make_groups):
    a, p = make_groups(num_texts=2, dtype=torch.float32).unbind(1)
    temperature = LearnableTemperature()
    ids = {"anchor_ids": torch.arange(6) // 2, "positive_ids": 9 + torch.arange(6)}
    info_nce(a, p, temperature=temperature(), **ids).backward()
    gradient = temperature.log_temperature.grad.item()
    assert math.isfinite(gradient)
    assert gradient != 0


def test_a_single_row_is_compared_with_its_negatives_alone(make_groups):
    a, p, n = make_groups(num_rows=1).unbind(1)
    assert info_nce(a, p, n, temperature=0.1, symmetric=False).item() > 0
    with pytest.raises(ValueError, match=r"at least 2 rows over all ranks.*raise the batch size"):
        info_nce(a, p, temperature=0.1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"temperature": 0.0}, "`temperature` must be finite and > 0, got 0.0"),
        ({"temperature": torch.ones(2)}, r"`temperature` must be one number, got shape \(2,\)"),
        ({"margin": math.inf}, "`margin` must be finite, got inf"),
        ({"loss": CrossEntropy(label_smoothing=0.1)}, "`label_smoothing` must be 0 in a contrast"),
        ({"positives": torch.ones(3, 5)}, r"must have one shape \(B, d\), got \(6, 5\) and \(3, 5"),
        ({"negatives": torch.ones(6, 4)}, r"`negatives` must have shape \(6, 5\) or \(6, n, 5\)"),
        ({"anchor_ids": torch.arange(6)}, r"all texts or for none, got ids for \[True, False, F"),
        ({"negative_ids": torch.arange(6)}, "positives and no negatives"),
        (
            {"anchor_ids": torch.arange(6), "positive_ids": torch.arange(12).view(6, 2)},
            r"`text_ids` must have shape \(6, 2\), one id per text, got \(6, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, sentence):
    arguments = {"anchors": torch.ones(6, 5), "positives": torch.ones(6, 5), "temperature": 1.0}
    with pytest.raises(ValueError, match=sentence):
        info_nce(**arguments | changes)
