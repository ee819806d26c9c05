import math

import pytest
import scipy.stats
import torch

from spectral_lightning.tasks.embedding_statistics import (
    average_ranks,
    bootstrap_interval,
    mean,
    pearson,
    retained_fraction,
    spearman,
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_ties(*shape, seed=0):
    return noise(*shape, seed=seed).mul(2).round()


@pytest.mark.parametrize("make", [noise, with_ties])
def test_ranks_and_correlations_are_those_of_scipy(make):
    first, second = make(3, 50), make(3, 50, seed=1)
    second = first + second
    torch.testing.assert_close(average_ranks(first).numpy(), scipy.stats.rankdata(first, axis=-1))
    for row in range(3):
        pair = first[row], second[row]
        expected = scipy.stats.spearmanr(*pair).statistic, scipy.stats.pearsonr(*pair).statistic
        found = spearman(first, second)[row].item(), pearson(first, second)[row].item()
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("correlation", [spearman, pearson])
@pytest.mark.parametrize(
    "broken",
    [
        torch.full((4,), 0.7),
        0.7 + 1e-8 * noise(4),  # what float32 leaves of a constant
        torch.tensor([0.1, math.nan, 0.3, 0.4]),
        torch.tensor([0.1, math.inf, 0.3, 0.4]),
        torch.zeros(4),
    ],
)
def test_a_degenerate_side_has_no_correlation(correlation, broken):
    assert correlation(broken, noise(4)).isnan()
    assert correlation(noise(4), broken).isnan()
    assert correlation(noise(1), noise(1)).isnan()


def coverage(statistic, truth, draw):
    """Share of data sets whose interval holds the truth."""
    hits = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        columns = draw(torch.Generator().manual_seed(1000 + seed))
        interval = bootstrap_interval(
            *columns, generator=generator, statistic=statistic, num_resamples=300, level=0.9
        )
        hits += interval.low <= truth <= interval.high
    return hits / 200


def test_interval_of_a_mean_covers_the_true_mean():
    def draw(generator):
        return (torch.rand(60, generator=generator),)

    assert 0.84 <= coverage(mean, 0.5, draw) <= 0.96  # 90 % within three standard errors


def test_interval_of_spearman_covers_the_true_correlation():
    correlation = 0.6

    def draw(generator):
        first, other = torch.randn(2, 80, generator=generator)
        return first, correlation * first + math.sqrt(1 - correlation**2) * other

    truth = 6 / math.pi * math.asin(correlation / 2)  # Spearman of a bivariate normal
    assert 0.84 <= coverage(spearman, truth, draw) <= 0.96


def test_interval_is_the_same_for_the_same_generator_and_narrower_for_more_rows():
    def interval(num_rows, seed):
        generator = torch.Generator().manual_seed(seed)
        return bootstrap_interval(noise(num_rows), generator=generator)

    assert interval(50, 1) == interval(50, 1) != interval(50, 2)
    few, many = interval(50, 1), interval(5000, 1)
    assert many.high - many.low < (few.high - few.low) / 5
    assert few.low < few.value < few.high


def test_interval_takes_one_row_and_keeps_nan():
    generator = torch.Generator()
    assert bootstrap_interval(torch.tensor(0.5), generator=generator) == (0.5, 0.5, 0.5)
    nothing = bootstrap_interval(torch.tensor([0.5, math.nan]), generator=generator)
    assert all(math.isnan(number) for number in nothing)


def test_intervals_refuse_what_they_cannot_resample():
    generator = torch.Generator()
    with pytest.raises(ValueError, match=r"`columns` must be .* got \[\(3,\), \(4,\)\]"):
        bootstrap_interval(torch.ones(3), torch.ones(4), generator=generator)
    with pytest.raises(ValueError, match=r"`columns` must be .* got \[\(0,\)\]"):
        bootstrap_interval(torch.ones(0), generator=generator)
    with pytest.raises(ValueError, match=r"`num_resamples` must be >= 1 .* got 0 and 0.95"):
        bootstrap_interval(torch.ones(3), generator=generator, num_resamples=0)


def test_a_share_of_no_quality_is_not_a_number():
    assert retained_fraction({64: 0.2, 256: 0.4}) == {64: 0.5, 256: 1.0}
    for full in (0.0, -0.1, math.nan):
        assert math.isnan(retained_fraction({64: 0.2, 256: full})[64])
    with pytest.raises(ValueError, match="`values` must have a dimension"):
        retained_fraction({})
