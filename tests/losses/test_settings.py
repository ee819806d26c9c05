"""Settings of the cross-entropy as an object, and what is refused."""

import math

import pytest
import torch

from spectral_lightning.losses import CrossEntropy, cross_entropy

TARGET = torch.tensor([0])


def test_settings_are_those_of_the_function():
    x, ids = torch.linspace(-3, 5, 20).view(4, 5), torch.tensor([0, -1, 2, 3])
    loss = CrossEntropy(transform="stablemax", label_smoothing=0.2, z_loss=0.1)
    options = {"transform": "stablemax", "label_smoothing": 0.2, "z_loss": 0.1, "ignore_index": -1}
    for reduction in ("mean", "sum", "none"):
        expected = cross_entropy(x, ids, reduction=reduction, **options)
        assert torch.equal(loss(x, ids, reduction, ignore_index=-1), expected)
    assert loss.likelihood() == CrossEntropy(transform="stablemax")
    assert CrossEntropy(compute_dtype="float64")(x, ids.clamp(min=0)).dtype == torch.float64


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"transform": "sparsemax"}, "`transform` must be one of softmax, stablemax, got 'spars"),
        ({"label_smoothing": 1.5}, r"`label_smoothing` must be in \[0, 1\], got 1.5"),
        ({"z_loss": -1.0}, "`z_loss` must be finite and >= 0, got -1.0"),
        ({"z_loss": math.nan}, "`z_loss` must be finite and >= 0, got nan"),
        ({"compute_dtype": "float16"}, "`compute_dtype` must be float32 or float64, got 'float16'"),
    ],
)
def test_settings_outside_their_range_are_refused(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        CrossEntropy(**setting)
    if "compute_dtype" not in setting:  # for the function it is no name, but a dtype
        with pytest.raises(ValueError, match=sentence):
            cross_entropy(torch.zeros(1, 2), TARGET, **setting)


@pytest.mark.parametrize(
    ("logits", "targets", "options", "error", "sentence"),
    [
        ((2, 5, 3), torch.zeros(2, 3).long(), {}, ValueError, r"shape \(2, 5\) for logits of shap"),
        ((2, 5), torch.zeros(2, 3), {}, ValueError, r"must have shape \(2, 5\) .* got \(2, 3\)"),
        ((1, 2), torch.tensor([True]), {}, TypeError, "integer ids or floating-point prob.*bool"),
        ((1, 2), TARGET, {"weight": torch.ones(3)}, ValueError, r"`weight` must have shape \(2,\)"),
        ((1, 2), TARGET, {"reduction": "max"}, ValueError, "`reduction` must be one of mean, none"),
        ((1, 2), TARGET, {"compute_dtype": torch.float16}, ValueError, "`compute_dtype` must be"),
        ((1, 2), torch.ones(1, 2, requires_grad=True), {}, ValueError, "must be constants"),
    ],
)
def test_what_does_not_fit_is_refused(logits, targets, options, error, sentence):
    with pytest.raises(error, match=sentence):
        cross_entropy(torch.zeros(logits), targets, **options)


def test_logits_must_be_floating_point():
    with pytest.raises(TypeError, match=r"Logits must be floating point, got torch\.int64"):
        cross_entropy(torch.zeros(1, 2).long(), TARGET)
