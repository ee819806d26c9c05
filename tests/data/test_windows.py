from itertools import chain

import numpy as np
import pytest
import torch

from spectral_lightning.data.shards import ShardWriter, TokenShard
from spectral_lightning.data.windows import IGNORED, ResumableLoader, TokenWindows, WindowSampler

LENGTH = 4


@pytest.fixture
def make_windows(tmp_path):
    def make(num_tokens, *, full=True):
        with ShardWriter(tmp_path / "a.bin", torch.ones(1_000)) as writer:
            writer.append(range(num_tokens))
        return TokenWindows(TokenShard(tmp_path / "a.bin", writer.info()), LENGTH, full=full)

    return make


def make_loader(windows, *, batch_size=3, num_workers=0, **settings):
    sampler = WindowSampler(windows, batch_size=batch_size, shuffle=True, **settings)
    return ResumableLoader(windows, batch_size=batch_size, sampler=sampler, num_workers=num_workers)


def first_tokens(loader):
    return [batch[:, 0].tolist() for batch in loader]


@pytest.mark.parametrize("num_tokens", [5, 6, 8, 9, 10, 41])
def test_evaluation_predicts_every_token_but_the_first_once(make_windows, num_tokens):
    windows = make_windows(num_tokens, full=False)
    targets = torch.cat([windows[index][1:] for index in range(len(windows))])
    assert targets[targets != IGNORED].tolist() == list(range(1, num_tokens))
    assert all(len(windows[index]) == LENGTH + 1 for index in range(len(windows)))


@pytest.mark.parametrize("num_tokens", [5, 6, 8, 9, 10, 41])
def test_training_sees_every_token_and_no_filling(make_windows, num_tokens):
    windows = make_windows(num_tokens)
    seen = [windows[index] for index in range(len(windows))]
    assert set(torch.cat(seen).tolist()) == set(range(num_tokens))
    assert all((window.diff() == 1).all() and len(window) == LENGTH + 1 for window in seen)


def test_evaluation_text_shorter_than_a_window_is_filled_up(make_windows):
    windows = make_windows(3, full=False)
    assert len(windows) == 1
    assert windows[0].tolist() == [0, 1, 2, IGNORED, IGNORED]
    assert (windows[-1] == IGNORED).all()


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_ranks_share_the_windows_in_full_batches(make_windows, num_replicas, batch_size):
    windows = make_windows(43)
    ranks = [
        WindowSampler(
            windows, batch_size=batch_size, shuffle=True, num_replicas=num_replicas, rank=r
        )
        for r in range(num_replicas)
    ]
    orders = [list(rank) for rank in ranks]
    assert {len(order) for order in orders} == {len(ranks[0])}
    assert len(orders[0]) % batch_size == 0
    together = [index for step in zip(*orders, strict=True) for index in step]
    assert sorted(together[: len(windows)]) == list(range(len(windows)))
    assert together[len(windows) :] == (together * 50)[: len(together) - len(windows)]


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 20])
def test_ranks_evaluate_every_window_once_in_equally_many_steps(make_windows, num_replicas):
    windows = make_windows(43, full=False)
    orders = [
        list(WindowSampler(windows, batch_size=2, shuffle=False, num_replicas=num_replicas, rank=r))
        for r in range(num_replicas)
    ]
    assert len({len(order) for order in orders}) == 1
    real = [index for order in orders for index in order if index >= 0]
    assert sorted(real) == list(range(len(windows)))


def test_order_depends_on_seed_and_epoch_alone(make_windows):
    def order(seed, epoch):
        sampler = WindowSampler(make_windows(401), batch_size=1, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        np.random.seed(epoch)  # the global source has no influence
        return tuple(sampler)

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert order(1, 2) == orders[1, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("seen", [0, 1, 3])
def test_loader_continues_after_the_last_batch_it_handed_out(make_windows, seen, num_workers):
    loader, other = (make_loader(make_windows(43), num_workers=num_workers) for _ in range(2))
    loader.sampler.set_epoch(2)
    other.sampler.set_epoch(2)
    whole = first_tokens(other)
    iterator = iter(loader)
    for _ in range(seen):
        next(iterator)
    state = loader.state_dict()
    resumed = make_loader(make_windows(43), num_workers=num_workers)
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(2)
    assert first_tokens(resumed) == whole[seen:]
    assert len(resumed) == len(whole)
    resumed.sampler.set_epoch(2)
    assert first_tokens(resumed) == whole  # only the first pass is shortened


def test_finished_epoch_continues_with_the_next(make_windows):
    loader = make_loader(make_windows(43))
    first_tokens(loader)
    resumed = make_loader(make_windows(43))
    resumed.load_state_dict(loader.state_dict())
    loader.sampler.set_epoch(1)
    assert first_tokens(resumed) == first_tokens(loader)


def test_position_belongs_to_its_epoch(make_windows):
    loader = make_loader(make_windows(43))
    next(iter(loader))
    resumed = make_loader(make_windows(43))
    resumed.load_state_dict(loader.state_dict())
    resumed.sampler.set_epoch(1)
    assert len(first_tokens(resumed)) == len(resumed)


def test_run_resumes_on_another_number_of_ranks(make_windows):
    windows = make_windows(81)
    loader = make_loader(windows, batch_size=2)
    iterator = iter(loader)
    seen = [next(iterator)[:, 0].tolist() for _ in range(3)]
    rest = []
    for rank in range(2):
        resumed = make_loader(windows, batch_size=2, num_replicas=2, rank=rank)
        resumed.load_state_dict(loader.state_dict())
        rest += first_tokens(resumed)
    assert sorted(chain(*seen, *rest)) == list(range(0, 80, LENGTH))


def test_state_of_another_text_starts_the_epoch_anew(make_windows):
    loader = make_loader(make_windows(43))
    next(iter(loader))
    other = make_loader(make_windows(83))
    with pytest.warns(UserWarning, match="was written for another text, sequence length or seed"):
        other.load_state_dict(loader.state_dict())
    assert len(first_tokens(other)) == len(other)


def test_loader_leaves_the_global_random_numbers_alone(make_windows):
    loader = make_loader(make_windows(43))
    loader.generator = torch.Generator()  # as the data module does
    before = torch.get_rng_state()
    first_tokens(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_with_another_sampler_keeps_no_position(make_windows):
    windows = make_windows(43)
    loader = ResumableLoader(windows, batch_size=2)
    assert len(first_tokens(loader)) == len(loader)
    assert loader.state_dict() == {}
    loader.load_state_dict({})
