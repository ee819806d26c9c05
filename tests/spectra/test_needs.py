"""Which steps a declared need makes due."""

from itertools import pairwise

import pytest

from spectral_lightning.spectra import Need
from spectral_lightning.spectra.needs import due_norms, due_spectra


def test_norms_are_due_where_anybody_wants_them():
    needs = [
        Need(names=frozenset({"a", "b"}), every_n_steps=2),
        Need(names=frozenset({"b", "c"}), every_n_steps=3),
    ]
    due = [due_norms(needs, step, step - 1) for step in range(7)]
    assert due == [
        {"a", "b", "c"},
        set(),
        {"a", "b"},
        {"b", "c"},
        {"a", "b"},
        set(),
        {"a", "b", "c"},
    ]


def test_spectra_are_due_only_where_an_interval_is_declared():
    needs = [
        Need(names=frozenset({"a"})),
        Need(names=frozenset({"b"}), every_n_steps=7, spectrum_every_n_steps=2),
    ]
    assert [due_spectra(needs, step, step - 1) for step in range(4)] == [{"b"}, set(), {"b"}, set()]


def test_at_the_first_step_all_that_is_ever_wanted_is_due():
    needs = [
        Need(names=frozenset({"a"}), every_n_steps=5),
        Need(names=frozenset({"b"}), every_n_steps=7, spectrum_every_n_steps=9),
    ]
    assert due_norms(needs, 1, None) == {"a", "b"}
    assert due_spectra(needs, 1, None) == {"b"}


def test_no_interval_is_missed_where_steps_come_in_jumps():
    needs = [Need(names=frozenset({"a"}), every_n_steps=3)]
    steps = (1, 4, 5, 7, 13)
    due = [bool(due_norms(needs, step, before)) for before, step in pairwise(steps)]
    assert due == [True, False, True, True]


def test_nothing_is_due_without_needs():
    assert due_norms([], 0, None) == due_spectra([], 0, None) == set()


@pytest.mark.parametrize("name", ["every_n_steps", "spectrum_every_n_steps"])
def test_an_interval_below_one_is_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be >= 1, got 0\."):
        Need(names=frozenset(), **{name: 0})
