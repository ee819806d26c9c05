"""Terms of embedding models against formulas written out."""

import pytest
import torch
from torch.autograd import gradcheck

from spectral_lightning.losses import (
    alignment_loss,
    bridge_loss,
    cosent_loss,
    renyi_entropy,
    softmax_entropy,
    triplet_loss,
)


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def cosine(x, y):
    return (unit(x) * unit(y)).sum(-1)


def test_bridge_compares_unit_prefixes(make_groups):
    entity, semantic = make_groups(dim=6), make_groups(dim=9, seed=1)
    e, s = unit(entity[..., :4]), unit(semantic[..., :4])
    original = bridge_loss(entity, semantic, dims=(4,), form="original")
    torch.testing.assert_close(original, (e - s).square().mean())
    found = bridge_loss(entity, semantic, dims=(4, 2))
    expected = 1 - (cosine(e, s) + cosine(e[..., :2], s[..., :2])).mean() / 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("form", "learns"), [("cosine", False), ("original", True)])
def test_the_semantic_head_learns_from_the_original_bridge_alone(make_groups, form, learns):
    entity, semantic = (make_groups(seed=seed).requires_grad_() for seed in (0, 1))
    bridge_loss(entity, semantic, dims=(4,), form=form).backward()
    assert entity.grad.any()
    assert (semantic.grad is not None) == learns


def test_alignment_is_the_mean_square_of_cosines_and_leaves_the_teacher(make_groups):
    student, teacher = make_groups(num_texts=4), make_groups(num_texts=4, dim=7, seed=1)
    student.requires_grad_()
    teacher.requires_grad_()

    def square(i):
        return (
            cosine(student[:, 0], student[:, i]) - cosine(teacher[:, 0], teacher[:, i])
        ).square()

    found = alignment_loss(student, teacher)
    expected = (square(1).mean() + (square(2) + square(3)).mean() / 2) / 2
    torch.testing.assert_close(found, expected)
    found.backward()
    assert student.grad.any()
    assert teacher.grad is None
    alone = alignment_loss(student[:, :2], teacher[:, :2])
    torch.testing.assert_close(alone, square(1).mean())


def test_triplets_want_negatives_farther_than_positives(make_groups):
    groups = make_groups(num_texts=4)
    a, p, *negatives = unit(groups).unbind(1)
    distances = [(a - x).norm(dim=1) for x in (p, *negatives)]
    expected = torch.cat([distances[0] - d + 0.3 for d in distances[1:]]).clamp(min=0).mean()
    # PyTorch adds 1e-6 to differences, so that a distance of 0 has a gradient.
    torch.testing.assert_close(triplet_loss(groups), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(6, 4), (3, 8)])
def test_renyi_entropy_is_that_of_the_eigenvalues(shape):
    rows = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.eigvalsh(unit(rows).T @ unit(rows) / shape[0])
    torch.testing.assert_close(values.sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(renyi_entropy(rows), -values.square().sum().log())
    assert renyi_entropy(torch.ones(shape)).item() == pytest.approx(0, abs=1e-6)


def test_softmax_entropy_is_the_mean_over_rows(make_groups):
    rows = make_groups()[:, 0]
    shares = rows.softmax(1)
    torch.testing.assert_close(softmax_entropy(rows), -(shares * shares.log()).sum(1).mean())


def test_cosent_counts_pairs_in_the_wrong_order(make_groups):
    first, second = make_groups(num_texts=2).unbind(1)
    scores = torch.tensor([0.0, 1.0, 2.0, 2.0, 5.0, 1.0])
    cosines = cosine(first, second)
    total = 1 + sum(
        torch.exp(7 * (cosines[i] - cosines[j]))
        for i in range(6)
        for j in range(6)
        if scores[i] < scores[j]
    )
    torch.testing.assert_close(cosent_loss(first, second, scores, scale=7.0), total.log())


def test_equal_scores_say_nothing(make_groups):
    first, second = make_groups(num_texts=2).requires_grad_().unbind(1)
    loss = cosent_loss(first, second, torch.ones(6))
    gradient = torch.autograd.grad(loss, first)[0]
    assert loss.item() == 0
    assert (gradient == 0).all()


TERMS = {
    "bridge": lambda x, y: bridge_loss(x, y, dims=(3, 2)),
    "bridge_original": lambda x, y: bridge_loss(x, y, dims=(3,), form="original"),
    "alignment": lambda x, y: alignment_loss(x, y),
    "triplet": lambda x, y: triplet_loss(x) + triplet_loss(y),
    "renyi": lambda x, y: renyi_entropy(x[:, 0]) + renyi_entropy(y.flatten(0, 1)),
    "softmax_entropy": lambda x, y: softmax_entropy(x) + softmax_entropy(y),
    "cosent": lambda x, y: cosent_loss(x[:, 0], y[:, 0], torch.arange(len(x))),
}


@pytest.mark.parametrize("term", TERMS)
def test_gradients_agree_with_differences(make_groups, term):
    # What a term takes as it is has no gradient, whatever the differences say.
    x, y = (make_groups(num_rows=3, dim=4, seed=seed).requires_grad_() for seed in (0, 1))
    if term in ("bridge", "alignment"):
        assert gradcheck(lambda x: TERMS[term](x, y), x)
    else:
        assert gradcheck(TERMS[term], (x, y))


@pytest.mark.parametrize("term", TERMS)
def test_half_precision_is_computed_in_float32(make_groups, term):
    x, y = (make_groups(num_rows=16, dim=32, seed=s, dtype=torch.bfloat16) for s in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = TERMS[term](x, y)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(TERMS[term](x.double(), y.double()).item(), rel=2e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"second": torch.ones(3, 5)},
            r"one shape \(B, d\), and `scores` \(B,\), got \(4, 5\), \(",
        ),
        ({"scores": torch.ones(3)}, r"got \(4, 5\), \(4, 5\) and \(3,\)"),
        ({"scale": 0.0}, "`scale` must be finite and > 0, got 0.0"),
    ],
)
def test_scored_pairs_that_do_not_fit_are_refused(changes, sentence):
    pairs = {"first": torch.ones(4, 5), "second": torch.ones(4, 5), "scores": torch.ones(4)}
    with pytest.raises(ValueError, match=sentence):
        cosent_loss(**pairs | changes)
