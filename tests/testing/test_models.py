import pytest
import torch

from spectral_lightning.testing.models import plant_spike_, relative_stable_rank, tiny_gpt2


@pytest.mark.parametrize("shape", [(48, 32), (16, 8, 3, 3)])
def test_a_spike_adds_one_singular_value_of_the_given_size(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = weight.clone().flatten(1)
    plant_spike_(weight, 5.0)
    added = torch.linalg.svdvals(weight.flatten(1) - before)
    assert added[0] == pytest.approx(5 * torch.linalg.matrix_norm(before, 2).item(), rel=1e-5)
    assert added[1] < 1e-4 * added[0]


def test_the_relative_stable_rank_of_a_random_matrix_is_near_1():
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    assert relative_stable_rank(weight) == pytest.approx(1.0, abs=0.05)


def test_equal_seeds_give_equal_models_and_leave_the_global_state():
    state = torch.get_rng_state()
    one, other, third = (tiny_gpt2(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(one[name], other[name])
    assert not torch.equal(one[name], third[name])
