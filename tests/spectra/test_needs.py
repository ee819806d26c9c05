"""Which steps a declared need makes due."""

import pytest

from spectral_lightning.spectra import Need
from spectral_lightning.spectra.needs import due_norms, due_spectra


def test_norms_are_due_where_anybody_wants_them():
    needs = [
        Need(names=frozenset({"a", "b"}), every_n_steps=2),
        Need(names=frozenset({"b", "c"}), every_n_steps=3),
    ]
    due = [due_norms(needs, step) for step in range(7)]
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
    assert [due_spectra(needs, step) for step in range(4)] == [{"b"}, set(), {"b"}, set()]


def test_without_a_step_all_that_is_ever_wanted_is_due():
    needs = [
        Need(names=frozenset({"a"}), every_n_steps=5),
        Need(names=frozenset({"b"}), every_n_steps=7, spectrum_every_n_steps=9),
    ]
    assert due_norms(needs, None) == {"a", "b"}
    assert due_spectra(needs, None) == {"b"}


def test_nothing_is_due_without_needs():
    assert due_norms([], 0) == due_spectra([], 0) == set()


@pytest.mark.parametrize("name", ["every_n_steps", "spectrum_every_n_steps"])
def test_an_interval_below_one_is_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be >= 1, got 0\."):
        Need(names=frozenset(), **{name: 0})
