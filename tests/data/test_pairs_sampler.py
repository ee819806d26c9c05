from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from spectral_lightning.data.pairs_sampler import (
    EvaluationBatchSampler,
    PairBatchSampler,
    PairLoader,
    full_batches,
)


class Rows(Dataset):
    """Rows whose batch is their numbers."""

    def __init__(self, num_rows):
        self.num_rows = num_rows

    def __len__(self):
        return self.num_rows

    def __getitem__(self, rows):
        return torch.tensor(rows)


def distinct(num_rows, first=0):
    return np.arange(2 * num_rows).reshape(-1, 2) + first


def repeated(num_rows, num_anchors):
    """Rows of which many share their anchor."""
    rows = np.arange(num_rows)
    return np.stack([rows % num_anchors, rows + num_anchors], axis=1)


def make_sampler(*ids, batch_size=4, **settings):
    names = [f"source {number}" for number in range(len(ids))]
    rows = Rows(sum(map(len, ids)))
    return PairBatchSampler(rows, ids=ids, names=names, batch_size=batch_size, **settings)


def make_loader(*ids, num_workers=0, **settings):
    sampler = make_sampler(*ids, **settings)
    return PairLoader(sampler.dataset, sampler=sampler, batch_size=None, num_workers=num_workers)


def batches(loader):
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_no_two_rows_of_a_batch_over_all_ranks_share_a_text(num_replicas):
    ids = repeated(400, 60)
    ranks = [make_sampler(ids, num_replicas=num_replicas, rank=r) for r in range(num_replicas)]
    for parts in zip(*ranks, strict=True):
        together = list(chain(*parts))
        texts = ids[together].flatten()
        assert len(together) == 4 * num_replicas
        assert len(set(texts.tolist())) == len(texts)


def test_rows_with_common_texts_may_meet_if_the_user_says_so():
    ids = repeated(400, 60)
    found = [len(set(ids[batch, 0])) for batch in make_sampler(ids, no_duplicates=False)]
    assert min(found) < 4


@pytest.mark.parametrize(("num_anchors", "most_lost"), [(403, 3), (60, 3), (7, 20)])
def test_every_row_is_seen_once_but_for_incomplete_batches(num_anchors, most_lost):
    ids = repeated(403, num_anchors)
    sampler = make_sampler(ids)
    seen = list(chain(*sampler))
    assert len(seen) == len(set(seen)) == 403 - sampler.num_left_over
    assert sampler.num_left_over <= most_lost


def test_row_that_clashes_is_in_the_next_batch_without_its_texts():
    ids = np.array([[0, 1], [0, 2], [0, 3], [4, 5], [6, 2], [7, 8]])
    assert full_batches(ids, np.arange(6), size=2) == [[0, 3], [1, 5], [2, 4]]


def test_row_may_pair_a_text_with_itself():
    ids = np.array([[1, 1], [2, 2]])
    assert full_batches(ids, np.arange(2), size=2) == [[0, 1]]


def test_time_of_a_shuffle_does_not_explode_with_a_common_text():
    ids = np.stack([np.arange(40_000) % 3, np.arange(40_000) + 3], axis=1)
    assert sum(map(len, full_batches(ids, np.arange(40_000), size=3))) >= 39_990


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = make_sampler(distinct(100), seed=seed)
        sampler.set_epoch(epoch)
        np.random.seed(epoch)  # the global source has no influence
        return tuple(map(tuple, sampler))

    orders = {(seed, epoch): order(seed, epoch) for seed in range(2) for epoch in range(3)}
    assert len(set(orders.values())) == 6
    assert order(1, 2) == orders[1, 2]


def test_batch_is_of_one_source_and_each_source_gives_all_it_has():
    sampler = make_sampler(distinct(40), distinct(83, first=1_000))
    sources = [{row >= 40 for row in batch} for batch in sampler]
    assert all(len(one) == 1 for one in sources)
    assert [one.pop() for one in sources].count(True) == 20 == sampler.num_batches[1]
    assert len(sampler) == 30


def test_weights_share_the_batches_and_repeat_a_small_source():
    sampler = make_sampler(distinct(40), distinct(360, first=1_000), weights=[1.0, 1.0])
    seen = list(chain(*sampler))
    assert sampler.num_batches == [50, 50]
    assert {seen.count(row) for row in range(40)} == {5}
    assert max(seen.count(row) for row in range(40, 400)) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("seen", [0, 1, 9])
@pytest.mark.parametrize("rank", [0, 1])
def test_loader_continues_after_the_last_batch_it_handed_out(seen, num_workers, rank):
    settings = {"num_workers": num_workers, "num_replicas": 2, "rank": rank}
    ids = repeated(90, 20), distinct(60, first=1_000)
    whole_loader, loader, resumed = (make_loader(*ids, **settings) for _ in range(3))
    whole_loader.sampler.set_epoch(2)
    loader.sampler.set_epoch(2)
    whole = batches(whole_loader)
    iterator = iter(loader)
    for _ in range(seen):
        next(iterator)
    resumed.load_state_dict(loader.state_dict())
    resumed.sampler.set_epoch(2)
    assert batches(resumed) == whole[seen:]
    assert batches(resumed) == whole  # only the first pass is shortened
    assert len(resumed) == len(whole)


def test_run_resumes_on_another_number_of_ranks_with_the_same_batches_over_all():
    ids = repeated(90, 30)
    loader = make_loader(ids, batch_size=8)
    whole = batches(make_loader(ids, batch_size=8))
    next(iter(loader))
    ranks = [make_loader(ids, num_replicas=2, rank=rank) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(loader.state_dict())
    together = [first + second for first, second in zip(*map(batches, ranks), strict=True)]
    assert together == whole[1:]


@pytest.mark.parametrize("changed", [{"batch_size": 5}, {"seed": 1}, {"no_duplicates": False}])
def test_state_of_other_batches_starts_the_epoch_anew(changed):
    loader = make_loader(distinct(90))
    next(iter(loader))
    other = make_loader(distinct(90), **changed)
    with pytest.warns(UserWarning, match="was written for other pairs, another batch size"):
        other.load_state_dict(loader.state_dict())
    assert len(batches(other)) == len(other)


def test_loader_with_another_sampler_keeps_no_position():
    loader = PairLoader(Rows(3), batch_size=None)
    assert loader.state_dict() == {}
    loader.load_state_dict({"pairs": "x"})
    assert batches(loader) == [0, 1, 2]


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("lengths", [[1], [7], [8, 3]])
def test_evaluation_counts_every_row_once_in_equally_many_batches(num_replicas, lengths):
    rows = Rows(sum(lengths))
    ranks = [
        list(
            EvaluationBatchSampler(
                rows, lengths=lengths, batch_size=2, num_replicas=num_replicas, rank=rank
            )
        )
        for rank in range(num_replicas)
    ]
    assert len({tuple(map(len, rank)) for rank in ranks}) == 1
    seen = [row for rank in ranks for batch in rank for row in batch]
    assert sorted(row for row in seen if row >= 0) == list(range(len(rows)))
    firsts = {0, lengths[0]}
    assert {~row for row in seen if row < 0} <= firsts


def test_batch_larger_than_a_source_is_refused():
    message = (
        r"`batch_size` times the ranks must be at most .* that share no text, but 8 is more than"
        r" source 1 has in its 30 rows"
    )
    with pytest.raises(ValueError, match=message):
        make_sampler(distinct(90), repeated(30, 7), num_replicas=2)
