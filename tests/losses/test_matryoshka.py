"""Losses of nested prefixes."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from spectral_lightning.losses import Matryoshka, info_nce, prefix


def nce(*representations):
    return info_nce(*representations, temperature=0.2)


def test_loss_is_the_weighted_sum_over_unit_prefixes(make_groups):
    a, p, n = make_groups(dim=8).unbind(1)
    single = {d: nce(a[:, :d], p[:, :d], n[:, :d]) for d in (8, 4, 2)}
    found = Matryoshka(dims=(8, 4, 2), weights=(0.35, 0.3, 0.25))(nce, a, p, n)
    torch.testing.assert_close(found, 0.35 * single[8] + 0.3 * single[4] + 0.25 * single[2])
    found = Matryoshka(dims=(8, 4, 2))(nce, a, p, n)
    torch.testing.assert_close(found, sum(single.values()))


def test_prefixes_are_unit_rows_at_least_in_float32(make_groups):
    rows = make_groups(dtype=torch.bfloat16)
    found = prefix(rows, 3)
    torch.testing.assert_close(found, F.normalize(rows.float()[..., :3], dim=-1))
    assert prefix(rows.double(), 3).dtype == torch.float64


def test_every_prefix_comes_up_equally_often_and_the_mean_is_the_whole_sum(make_groups):
    a, p = make_groups(num_texts=2, dim=8).unbind(1)
    nested = {"dims": (8, 4, 2, 1), "weights": (0.4, 0.3, 0.2, 0.1)}
    some = Matryoshka(**nested, num_dims_per_step=2)
    assert [list(some.at(step)) for step in range(3)] == [[8, 4], [2, 1], [8, 4]]
    mean = (some(nce, a, p, step=6) + some(nce, a, p, step=7)) / 2
    torch.testing.assert_close(mean, Matryoshka(**nested)(nce, a, p))


def test_top_keeps_the_weight_of_all():
    nested = Matryoshka(dims=(2, 8), weights=(0.25, 0.5), num_dims_per_step=1)
    assert nested.top().at(0) == {8: 0.75}


def test_gradients_agree_with_differences(make_groups):
    a, p = make_groups(num_rows=3, num_texts=2, dim=4).unbind(1)
    nested = Matryoshka(dims=(4, 2), weights=(1.0, 0.5))
    assert gradcheck(lambda *rows: nested(nce, *rows), (a.requires_grad_(), p.requires_grad_()))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dims": ()}, r"`dims` must be different sizes, at least 1 each, got \(\)"),
        ({"dims": (4, 0)}, r"`dims` must be different sizes"),
        ({"dims": (4, 4)}, r"`dims` must be different sizes"),
        ({"dims": (4, 2), "weights": (1.0,)}, "`weights` must be 2 finite numbers > 0"),
        ({"dims": (4, 2), "weights": (1.0, 0.0)}, "`weights` must be 2 finite numbers > 0"),
        ({"dims": (4, 2), "num_dims_per_step": 3}, r"`num_dims_per_step` must be in \[1, 2\], got"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Matryoshka(**settings)


def test_a_prefix_longer_than_the_representation_is_refused():
    with pytest.raises(ValueError, match=r"between 1 and 3 dimensions.* got 4"):
        prefix(torch.ones(2, 3), 4)
