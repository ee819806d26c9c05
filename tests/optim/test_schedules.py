"""The schedule against its closed form, and its behaviour on restore."""

import pytest
import torch

from spectral_lightning.optim import WarmupConstantWarmdown


def make_optimizer(*rates):
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def advance(scheduler, num_steps):
    rates = []
    for _ in range(num_steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def test_default_holds_for_80_percent_and_falls_to_zero():
    rates = advance(WarmupConstantWarmdown(make_optimizer(2.0), 10), 12)
    assert rates == pytest.approx([2.0] * 9 + [1.0] + [0.0] * 2)


def test_warmup_rises_linearly_and_the_fall_ends_at_the_final_fraction():
    scheduler = WarmupConstantWarmdown(
        make_optimizer(1.0), 10, warmup_steps=4, warmdown_fraction=0.5, final_fraction=0.2
    )
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.84, 0.68, 0.52, 0.36, 0.2, 0.2]
    assert advance(scheduler, 12) == pytest.approx(expected)


def test_the_rate_never_rises_after_warmup_nor_leaves_its_bounds():
    scheduler = WarmupConstantWarmdown(
        make_optimizer(1.0), 37, warmup_steps=5, warmdown_fraction=0.65, final_fraction=0.05
    )
    rates = advance(scheduler, 60)
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert min(rates[5:]) == pytest.approx(0.05)
    assert max(rates) == 1.0


def test_a_warmdown_fraction_of_zero_never_falls():
    rates = advance(WarmupConstantWarmdown(make_optimizer(1.0), 3, warmdown_fraction=0.0), 6)
    assert rates == [1.0] * 6


def test_every_group_keeps_its_own_rate():
    optimizer = make_optimizer(1.0, 0.1)
    scheduler = WarmupConstantWarmdown(optimizer, 4, warmup_steps=2, warmdown_fraction=0.0)
    assert scheduler.get_last_lr() == pytest.approx([0.5, 0.05])
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1.0, 0.1]


def test_a_restored_schedule_continues_where_it_was():
    whole = advance(WarmupConstantWarmdown(make_optimizer(1.0), 10, warmdown_fraction=0.5), 10)
    first = WarmupConstantWarmdown(make_optimizer(1.0), 10, warmdown_fraction=0.5)
    advance(first, 6)
    optimizer = make_optimizer(1.0)
    second = WarmupConstantWarmdown(optimizer, 10, warmdown_fraction=0.5)
    optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert advance(second, 4) == pytest.approx(whole[6:])


def test_a_restored_schedule_obeys_its_new_length():
    first = WarmupConstantWarmdown(make_optimizer(1.0), 4, warmdown_fraction=0.5)
    advance(first, 4)
    longer = WarmupConstantWarmdown(make_optimizer(1.0), 20, warmdown_fraction=0.5)
    longer.load_state_dict(first.state_dict())
    advance(longer, 1)
    assert longer.get_last_lr() == [1.0]


def test_its_state_loads_as_plain_weights(tmp_path):
    scheduler = WarmupConstantWarmdown(make_optimizer(1.0), 10)
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["last_epoch"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, r"`num_steps` must be >= 1, got 0\."),
        ({"warmup_steps": -1}, r"`warmup_steps` must be in \[0, num_steps=10\], got -1\."),
        ({"warmup_steps": 11}, r"`warmup_steps` must be in \[0, num_steps=10\], got 11\."),
        ({"warmdown_fraction": 1.5}, r"`warmdown_fraction` must be in \[0, 1\], got 1\.5\."),
        ({"final_fraction": -0.1}, r"`final_fraction` must be in \[0, 1\], got -0\.1\."),
        ({"warmup_steps": 9}, r"room for the warm-down of 2 out of num_steps=10 steps, got 9;"),
    ],
)
def test_a_setting_outside_its_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WarmupConstantWarmdown(make_optimizer(1.0), **{"num_steps": 10, **settings})
