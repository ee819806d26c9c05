"""The mode that finds host syncs is tried on code known to wait, and on code that does not."""

import pytest
import torch

from spectral_lightning.testing import RefuseHostSync

VECTOR = torch.arange(4.0)
MATRIX = torch.eye(3)

WAITING = {
    "item": lambda: VECTOR.sum().item(),
    "float": lambda: float(VECTOR[0]),
    "bool": lambda: bool(VECTOR.any()),
    "nonzero": lambda: VECTOR.nonzero(),
    "where_of_one": lambda: torch.where(VECTOR > 1),
    "mask": lambda: VECTOR[VECTOR > 1],
    "masked_assignment": lambda: VECTOR.clone().__setitem__(VECTOR > 1, torch.zeros(2)),
    "masked_select": lambda: VECTOR.masked_select(VECTOR > 1),
    "equal": lambda: torch.equal(VECTOR, VECTOR),
    "unique": lambda: VECTOR.unique(),
    "eigh": lambda: torch.linalg.eigh(MATRIX),
    "svdvals": lambda: torch.linalg.svdvals(MATRIX),
    "eig": lambda: torch.linalg.eig(MATRIX),
}
FREE = {
    "product": lambda: MATRIX @ MATRIX,
    "where_of_three": lambda: torch.where(VECTOR > 1, VECTOR, 0.0),
    "index": lambda: VECTOR[torch.tensor([0, 2])],
    "slice": lambda: VECTOR[1:].clone(),
    "cholesky_ex": lambda: torch.linalg.cholesky_ex(MATRIX),
    "sort": lambda: VECTOR.sort(),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_refused(name):
    with RefuseHostSync(), pytest.raises(AssertionError, match="makes the host wait"):
        WAITING[name]()


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_let_through(name):
    with RefuseHostSync():
        FREE[name]()
