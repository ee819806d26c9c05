"""Protected parts: taken out of gradients, put back into weights."""

import pytest
import torch
from torch import nn

from spectral_lightning.actuators import ProtectedPart, first_moments
from spectral_lightning.linalg import singular_triplets
from spectral_lightning.optim import MuonAdamW, parameter_groups

SIDES = ["two_sided", "left", "right", "block"]
SHAPES = [(24, 24), (40, 16), (16, 40)]
K = 6


def part_of(weight, side, k=K):
    found = singular_triplets(weight)
    return ProtectedPart(weight, found.left[:, :k], found.right[:, :k], side)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_a_gradient_without_the_part_does_not_move_it(shape, side):
    weight, gradient = randn(*shape), randn(*shape, seed=1)
    part = part_of(weight, side)
    part.remove_(gradient)
    assert part.change(weight - 10 * gradient) < 1e-5
    assert gradient.norm() > 0.5 * randn(*shape, seed=1).norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_restoring_undoes_the_part_of_any_change_and_nothing_else(shape, side):
    weight = randn(*shape, dtype=torch.float64)
    part = part_of(weight, side)
    moved = weight + randn(*shape, seed=1, dtype=torch.float64)
    assert part.change(moved) > 0.1
    restored = moved.clone()
    part.restore_(restored)
    assert part.change(restored) < 1e-13
    again = restored.clone()
    part.restore_(again)
    assert torch.allclose(again, restored, atol=1e-13)
    # What was undone lies in the part: seen by it, the undone change is whole.
    undone = moved - restored
    rest = undone.clone()
    part.remove_(rest)
    assert rest.norm() < 1e-12 * undone.norm()


def test_two_sided_keeps_the_singular_triplets():
    weight = torch.diag(torch.arange(24.0, 0, -1).double()) + 0.01 * randn(24, 24).double()
    before = singular_triplets(weight)
    part = part_of(weight, "two_sided")
    moved = weight + 0.1 * randn(24, 24, seed=1).double()
    part.restore_(moved)
    U, S, V = (t[..., :K] for t in before)
    assert torch.allclose(moved @ V, U * S, atol=1e-12)
    assert torch.allclose(U.mT @ moved, S[:, None] * V.mT, atol=1e-12)


def test_block_leaves_all_else_free():
    weight = randn(24, 24, dtype=torch.float64)
    part = part_of(weight, "block")
    found = singular_triplets(weight)
    moved = weight + found.left[:, :1] @ found.right[:, -1:].mT  # principal output, minor input
    restored = moved.clone()
    part.restore_(restored)
    assert torch.allclose(restored, moved, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_part_to_its_rounding(dtype):
    weight = randn(24, 24).to(dtype)
    part = part_of(weight, "two_sided")
    for step in range(50):
        weight += 0.05 * randn(24, 24, seed=step + 1).to(dtype)
        part.restore_(weight)
    assert part.change(weight) < 2 * torch.finfo(dtype).eps


def test_the_state_gives_the_same_part():
    weight = randn(24, 24)
    for side in SIDES:
        part = part_of(weight, side)
        again = ProtectedPart.from_state_dict(part.state_dict(), weight.device)
        first, second = randn(24, 24, seed=1), randn(24, 24, seed=1)
        part.restore_(first)
        again.restore_(second)
        assert torch.equal(first, second)
        assert (again.num_principal, again.side) == (K, side)


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="`side` must be one of two_sided, left, right, block,"):
        part_of(randn(8, 8), "both", k=2)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.AdamW(p, lr=0.1), 1),
        (lambda p: torch.optim.Muon(p, lr=0.1), 1),
    ],
)
def test_running_means_of_the_gradient_are_found(make, count):
    weight = nn.Parameter(randn(8, 8))
    optimizer = make([weight])
    assert first_moments(optimizer, weight) == []
    weight.grad = randn(8, 8, seed=1)
    optimizer.step()
    found = first_moments(optimizer, weight)
    assert len(found) == count
    assert all(moment.shape == weight.shape for moment in found)


def test_running_means_of_our_own_optimizer_are_found():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = MuonAdamW(parameter_groups(model))
    model(randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert [len(first_moments(optimizer, m.weight)) for m in model] == [1, 1]
