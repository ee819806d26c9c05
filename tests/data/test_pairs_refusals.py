from functools import partial

import pytest

from spectral_lightning.data import PairsDataModule, PairsSource
from tests.data.pairs_cases import open_pairs, pairs


@pytest.fixture
def make_data(tmp_path):
    return partial(open_pairs, tmp_path / "cache")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 3}, "`max_length` must be >= 4, got 3"),
        ({"batch_size": 0}, "`batch_size` must be >= 1, got 0"),
        ({"eval_batch_size": 0}, "`eval_batch_size` must be >= 1, got 0"),
        ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of` must be >= 1, got 0"),
        ({"vocab_size": 260}, "`vocab_size` must be >= 261, got 260"),
        ({"max_train_pairs": 0}, "`max_train_pairs` must be >= 1, got 0"),
        ({"valid_fraction": 1.0}, r"`valid_fraction` must be in \[0, 1\), got 1.0"),
        ({"sts": {"pairs": "a.csv"}}, "`sts` must not use the name 'pairs'"),
    ],
)
def test_setting_outside_its_range_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        PairsDataModule("a.csv", **settings)


@pytest.mark.parametrize(
    ("sources", "settings", "message"),
    [
        ([], {}, "`sources` must name at least one source"),
        (PairsSource(records=[("", "b")] * 3), {}, "all 3 rows of `records` have an empty text"),
        (PairsSource(records=pairs(2)), {"valid_fraction": 0.001}, "must hold a row out of 2, got"),
        (
            PairsSource(records=pairs(9)),
            {"valid_sources": PairsSource(records=pairs(9))},
            "must leave a row to train on, but all rows of `records` are held out",
        ),
        (
            [PairsSource(records=pairs(9), weight=1.0), PairsSource(records=pairs(9))],
            {},
            r"`weight` must be given for all sources or for none, got \[1.0, None\]",
        ),
        (
            PairsSource(records=pairs(9)),
            {"sts": {"own": PairsSource(records=pairs(9), kind="pairs")}},
            "'own' must hold two or more pairs with a score, but `records` has 9 pairs without",
        ),
    ],
)
def test_data_that_do_not_support_training_are_refused(make_data, sources, settings, message):
    with pytest.raises(ValueError, match=message):
        make_data(sources, **settings)


def test_batch_larger_than_the_data_is_refused(make_data):
    with pytest.raises(ValueError, match="but 64 is more than `records` has in its"):
        make_data(batch_size=64).train_dataloader()


def test_data_must_be_prepared_before_use(make_data):
    data = make_data(ready=False)
    with pytest.raises(RuntimeError, match="`prepare_data` must be called before `setup`"):
        data.setup("fit")
    with pytest.raises(RuntimeError, match="`setup` must be called before the data are used"):
        data.train_dataloader()
    with pytest.raises(RuntimeError, match="`setup` must be called before the data are used"):
        _ = data.tokenizer
