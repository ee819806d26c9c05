"""MuonAdamW against torch.optim.Muon, torch.optim.AdamW and hand-computed steps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectral_lightning.linalg.polar import newton_schulz
from spectral_lightning.models import GPT
from spectral_lightning.optim import MuonAdamW, WarmupConstantWarmdown, parameter_groups

SHAPES = [(8, 8), (16, 8), (8, 16), (16, 8), (1, 8)]


def random_parameters(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def matrices(parameters, **settings):
    return MuonAdamW([{"params": parameters, "role": "matrix"}], **settings)


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 7))


@pytest.fixture
def model():
    return small_model()


def train(model, optimizer, num_steps, first_seed=0):
    losses = []
    for seed in range(first_seed, first_seed + num_steps):
        tokens = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matrices_move_as_under_torch_muon(weight_decay):
    ours, theirs = random_parameters(), random_parameters()
    optimizer = matrices(
        ours, ns_dtype="bfloat16", weight_decay=weight_decay, momentum_warmup_steps=0
    )
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=weight_decay)
    for seed in range(10):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        optimizer.step()
        reference.step()
    # Bitwise equal where measured. Products that sum in another order may differ by bfloat16's
    # rounding, which came to 0.8 % of the way gone (float32 against bfloat16, 10 steps).
    for our, their, start in zip(ours, theirs, random_parameters(), strict=True):
        assert (our - their).norm() < 0.01 * (their - start).norm()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_other_parameters_move_exactly_as_under_torch_adamw(weight_decay):
    ours, theirs = random_parameters([(9, 4), (4,), ()]), random_parameters([(9, 4), (4,), ()])
    settings = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": weight_decay}
    optimizer = MuonAdamW(
        [{"params": ours, "role": "vector"}], vector_lr=0.01, weight_decay=weight_decay
    )
    reference = torch.optim.AdamW(theirs, lr=0.01, **settings)
    for seed in range(10):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        optimizer.step()
        reference.step()
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


def test_first_muon_step_is_the_polar_factor_of_the_gradient_times_the_rate():
    for rows, cols in [(6, 6), (12, 3), (3, 12)]:
        [parameter] = random_parameters([(rows, cols)])
        start = parameter.detach().clone()
        set_gradients([parameter], seed=1)
        matrices([parameter], lr=0.5).step()
        expected = 0.5 * math.sqrt(max(1, rows / cols)) * newton_schulz(parameter.grad)
        torch.testing.assert_close(start - parameter, expected)


def test_momentum_rises_linearly_over_its_warmup():
    [parameter] = random_parameters([(4, 4)])
    optimizer = matrices([parameter], momentum=0.9, momentum_start=0.5, momentum_warmup_steps=4)
    average = torch.zeros(4, 4)
    for step, momentum in enumerate([0.5, 0.6, 0.7, 0.8, 0.9, 0.9]):
        set_gradients([parameter], seed=step)
        optimizer.step()
        average = momentum * average + (1 - momentum) * parameter.grad
        torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], average)


def test_gradients_are_left_as_they_were(model):
    optimizer = MuonAdamW(parameter_groups(model))
    set_gradients(model.parameters(), seed=0)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_the_role_chooses_algorithm_and_rate(model):
    optimizer = MuonAdamW(parameter_groups(model), lr=0.1, vector_lr=0.2)
    width_scale = (6 / 768) ** -0.5
    found = {group["name"]: (group["algorithm"], group["lr"]) for group in optimizer.param_groups}
    assert found == {
        "matrix": ("muon", 0.1),
        "embedding": ("adamw", pytest.approx(0.2 * width_scale)),
        "head": ("adamw", pytest.approx(0.004 * width_scale)),
        "vector": ("adamw", 0.2),
    }


def test_width_scaling_can_be_switched_off(model):
    optimizer = MuonAdamW(parameter_groups(model), scale_lr_with_width=False)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.2, 0.004, 3e-4]


def test_an_explicit_rate_of_a_group_is_taken_as_it_is():
    [parameter] = random_parameters([(4, 4)])
    optimizer = MuonAdamW([{"params": parameter, "role": "head", "lr": 0.5}])
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_groups_handed_in_are_not_changed(model):
    groups = parameter_groups(model)
    MuonAdamW(groups)
    assert all(set(group) == {"params", "name", "role"} for group in groups)


def test_groups_of_named_parameters_work():
    [weight, bias] = random_parameters([(4, 4), (4,)])
    optimizer = MuonAdamW(
        [
            {"params": [("weight", weight)], "role": "matrix"},
            {"params": [("bias", bias)], "role": "vector"},
        ]
    )
    assert optimizer.param_groups[0]["param_names"] == ["weight"]


def test_a_group_can_be_added_later():
    first, second = random_parameters([(4, 4), (4, 4)])
    optimizer = matrices([first])
    optimizer.add_param_group({"params": [second], "role": "vector"})
    set_gradients([first, second], seed=0)
    optimizer.step()
    assert set(optimizer.state[second]) == {"step", "exp_avg", "exp_avg_sq"}


def test_parameters_without_gradient_are_skipped_entirely(model):
    optimizer = MuonAdamW(parameter_groups(model), weight_decay=0.5)
    start = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert not optimizer.state
    assert optimizer.param_groups[0]["step"] == 0
    set_gradients([model[1].bias], seed=0)
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]) == (name != "1.bias"), name


def test_batched_matrices_move_as_single_ones(monkeypatch):
    batched, single = random_parameters([(6, 4)] * 5), random_parameters([(6, 4)] * 5)
    monkeypatch.setattr("spectral_lightning.optim.muon.MAX_STACK_ELEMENTS", 2 * 6 * 4)
    optimizers = [matrices(batched), *[matrices([parameter]) for parameter in single]]
    for seed in range(3):
        set_gradients(batched, seed)
        set_gradients(single, seed)
        for optimizer in optimizers:
            optimizer.step()
    for left, right in zip(batched, single, strict=True):
        torch.testing.assert_close(left, right)


def test_float64_matrices_are_computed_in_float64():
    parameter = nn.Parameter(random_parameters([(5, 3)])[0].double())
    start = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter) + torch.eye(5, 3, dtype=torch.float64)
    matrices([parameter], lr=1.0).step()
    expected = math.sqrt(5 / 3) * newton_schulz(parameter.grad)
    torch.testing.assert_close(start - parameter, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("momentum_warmup_steps", [0, 6])
def test_resuming_from_a_state_dict_equals_the_uninterrupted_run(tmp_path, momentum_warmup_steps):
    settings = {"momentum_warmup_steps": momentum_warmup_steps}
    whole = small_model()
    train(whole, MuonAdamW(parameter_groups(whole), **settings), 6)
    first = small_model()
    optimizer = MuonAdamW(parameter_groups(first), **settings)
    train(first, optimizer, 3)
    torch.save((first.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = small_model()
    second.load_state_dict(weights)
    optimizer = MuonAdamW(parameter_groups(second), **settings)
    optimizer.load_state_dict(state)
    train(second, optimizer, 3, first_seed=3)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_copied_optimizer_works_like_the_original(model):
    optimizer = copy.deepcopy(MuonAdamW(parameter_groups(model)))
    [parameter] = random_parameters([(4, 4)])
    optimizer.add_param_group({"params": [parameter], "role": "matrix"})
    set_gradients([parameter], seed=0)
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[parameter]


def test_step_calls_the_closure_once_with_gradients_and_returns_its_loss(model):
    optimizer = MuonAdamW(parameter_groups(model))
    start, losses = copy.deepcopy(model.state_dict()), []

    def closure():
        optimizer.zero_grad()
        loss = model(torch.arange(7)).square().mean()
        loss.backward()
        losses.append(loss)
        return loss

    assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    assert not torch.equal(model[1].weight, start["1.weight"])
    assert optimizer.step() is None


def test_schedules_scale_every_group_from_its_own_initial_rate(model):
    optimizer = MuonAdamW(parameter_groups(model))
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = WarmupConstantWarmdown(optimizer, num_steps=4, warmup_steps=2)
    assert [group["initial_lr"] for group in optimizer.param_groups] == rates
    assert scheduler.get_last_lr() == pytest.approx([rate / 2 for rate in rates])


def test_a_tiny_gpt_overfits_a_repeated_batch():
    torch.manual_seed(0)
    gpt = GPT(depth=2, vocab_size=32, sequence_len=16, model_dim=32, head_dim=16)
    tokens = torch.randint(32, (4, 17))
    optimizer = MuonAdamW(parameter_groups(gpt))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(gpt(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(32), abs=1e-5)
    assert losses[-1] < 0.3
