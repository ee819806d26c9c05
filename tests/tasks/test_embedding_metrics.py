import math

import pytest
import scipy.stats
import sklearn.metrics
import torch
import torchmetrics.functional as reference
from torch.nn import functional as F

from spectral_lightning.tasks.embedding_metrics import AnomalyDetection, SimilarityCorrelation

IGNORE_EARLY_COMPUTE = pytest.mark.filterwarnings("ignore:The ``compute`` method")


def make_pairs(num_pairs=40, dim=16, seed=0):
    """Vectors that are not of unit length, and scores that follow their cosines loosely."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, num_pairs, dim, generator=generator)
    second = second + torch.rand(num_pairs, 1, generator=generator) * first
    scores = F.cosine_similarity(first, second) + 0.3 * torch.randn(num_pairs, generator=generator)
    return 3 * first, second, (5 * scores).round()


def test_correlations_are_those_of_scipy_at_every_dimension():
    first, second, scores = make_pairs()
    metric = SimilarityCorrelation((4, 16, 8))
    metric.update(first[:7], second[:7], scores[:7])
    metric.update(first[7:], second[7:], scores[7:])
    result = metric.compute()
    assert result.num_pairs == 40
    assert list(result.by_dim) == [16, 8, 4]
    for dim, found in result.by_dim.items():
        units = F.normalize(first[:, :dim], dim=-1), F.normalize(second[:, :dim], dim=-1)
        cosines = (units[0] * units[1]).sum(-1)
        spearman = scipy.stats.spearmanr(cosines, scores).statistic
        assert found.spearman.item() == pytest.approx(spearman, abs=1e-6)
        pearson = scipy.stats.pearsonr(cosines, scores).statistic
        assert found.pearson.item() == pytest.approx(pearson, abs=1e-6)
        other = reference.spearman_corrcoef(cosines, scores)
        assert found.spearman.item() == pytest.approx(other.item(), abs=1e-5)
    assert result.by_dim[4].spearman != result.by_dim[16].spearman


def test_rows_that_are_not_valid_do_not_count():
    first, second, scores = make_pairs()
    valid = torch.arange(40) % 3 > 0
    some, all_of_them = SimilarityCorrelation((16,)), SimilarityCorrelation((16,))
    some.update(first, second, scores, valid)
    all_of_them.update(first[valid], second[valid], scores[valid])
    assert some.compute().by_dim[16].spearman == all_of_them.compute().by_dim[16].spearman
    assert some.compute().num_pairs == 26


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_vectors_are_compared_in_float32(dtype):
    first, second, scores = make_pairs()
    first, second = (300 * first).to(dtype), (300 * second).to(dtype)  # squares overflow float16
    half, full = SimilarityCorrelation((16,)), SimilarityCorrelation((16,))
    half.update(first, second, scores)
    full.update(first.float(), second.float(), scores)
    found, expected = half.compute().by_dim[16], full.compute().by_dim[16]
    assert torch.equal(found.similarities, expected.similarities)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_collapsed_model_has_no_correlation_and_a_warning_says_so(value):
    vectors = torch.full((5, 8), value)
    metric = SimilarityCorrelation((8, 4))
    metric.update(vectors, vectors, torch.arange(5.0))
    with pytest.warns(UserWarning, match=r"dimensions \[8, 4\] is NaN: .* of the 5 pairs"):
        result = metric.compute()
    assert result.by_dim[4].spearman.isnan()
    assert result.by_dim[8].pearson.isnan()


@IGNORE_EARLY_COMPUTE
@pytest.mark.parametrize("metric", [SimilarityCorrelation((8,)), AnomalyDetection()])
def test_nothing_comes_of_no_rows(metric):
    with pytest.raises(ValueError, match="must see at least one row before `compute`, got none"):
        metric.compute()


def test_pairs_that_do_not_fit_are_refused():
    metric = SimilarityCorrelation((8,))
    vectors = torch.ones(5, 8)
    with pytest.raises(ValueError, match=r"one shape \(B, d\) with d >= 8, .* got \(5, 4\)"):
        metric.update(vectors[:, :4], vectors[:, :4], torch.ones(5))
    with pytest.raises(ValueError, match=r"`scores` must have shape \(5,\), got \(4,\)"):
        metric.update(vectors, vectors, torch.ones(4))
    with pytest.raises(ValueError, match=r"`dims` must be positive and distinct, got \(8, 8\)"):
        SimilarityCorrelation((8, 8))


def make_scores(num_texts=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    anomalous = torch.rand(num_texts, generator=generator) < 0.2
    # Beyond the range where a sigmoid in float32 tells numbers apart.
    return 100 + 3 * anomalous + 2 * torch.randn(num_texts, generator=generator), anomalous


def test_anomaly_measures_are_those_of_sklearn():
    scores, anomalous = make_scores()
    metric = AnomalyDetection()
    metric.update(scores[:100], anomalous[:100])
    metric.update(scores[100:], anomalous[100:])
    result = metric.compute()
    assert result.auroc.item() == pytest.approx(sklearn.metrics.roc_auc_score(anomalous, scores))
    precision = sklearn.metrics.average_precision_score(anomalous, scores)
    assert result.average_precision.item() == pytest.approx(precision)
    flagged, found, _ = sklearn.metrics.roc_curve(anomalous, scores, drop_intermediate=False)
    assert result.fpr_at_95.item() == pytest.approx(flagged[found >= 0.95].min())
    assert (result.num_anomalous, result.num_normal) == (anomalous.sum(), (~anomalous).sum())


def test_direction_is_declared_and_not_guessed():
    scores, anomalous = make_scores()
    results = []
    for higher in (True, False):
        metric = AnomalyDetection(higher_is_anomalous=higher)
        metric.update(-scores, anomalous)
        results.append(metric.compute())
    wrong, right = results
    assert right.auroc.item() == pytest.approx(1 - wrong.auroc.item())
    assert wrong.auroc < 0.5 < right.auroc
    assert (wrong.higher_is_anomalous, right.higher_is_anomalous) == (True, False)


def test_a_constant_score_is_at_chance():
    metric = AnomalyDetection()
    metric.update(torch.ones(10), torch.arange(10) < 3)
    result = metric.compute()
    assert result.auroc.item() == pytest.approx(0.5)
    assert result.average_precision.item() == pytest.approx(0.3)
    assert result.fpr_at_95.item() == 1.0


@pytest.mark.parametrize(
    ("scores", "anomalous"),
    [
        ([1.0, 2.0], [True, True]),
        ([1.0, 2.0], [False, False]),
        ([1.0, math.nan], [True, False]),
    ],
)
def test_anomaly_measures_without_both_kinds_or_finite_scores_are_nan(scores, anomalous):
    metric = AnomalyDetection()
    metric.update(torch.tensor(scores), torch.tensor(anomalous))
    with pytest.warns(UserWarning, match="The anomaly measures are NaN"):
        result = metric.compute()
    assert result.auroc.isnan()
    assert result.average_precision.isnan()
    assert result.fpr_at_95.isnan()
