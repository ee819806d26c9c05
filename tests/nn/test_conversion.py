"""From dense models to low-rank ones and back."""

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from spectral_lightning.nn import (
    LowRankLinear,
    compact,
    factorize,
    input_moments,
    merge,
    merged_state,
)


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 24, bias=False), nn.Linear(24, 3)
    )


X = torch.randn(64, 20, generator=torch.Generator().manual_seed(9))


def test_full_rank_there_and_back_is_the_same_function():
    model = make_model()
    before = model(X)
    assert factorize(model, rank=100) == {"0": 16, "2": 16, "3": 3}
    assert all(isinstance(model[i], LowRankLinear) for i in (0, 2, 3))
    assert torch.allclose(model(X), before, atol=1e-5)
    assert merge(model) == ["0", "2", "3"]
    assert all(type(model[i]) is nn.Linear for i in (0, 2, 3))
    assert torch.allclose(model(X), before, atol=1e-5)


def test_each_layer_is_the_nearest_of_its_rank():
    model = make_model()
    weight = model[2].weight.detach().clone()
    factorize(model, "2", rank=5)
    U, S, Vh = torch.linalg.svd(weight)
    assert torch.allclose(model[2].spectral_weight(), U[:, :5] * S[:5] @ Vh[:5], atol=1e-5)


def test_an_energy_is_kept_by_the_fewest_components():
    model = make_model()
    values = {n: torch.linalg.svdvals(model[int(n)].weight.detach()) for n in ("0", "2")}
    ranks = factorize(model, ["0", "2"], energy=0.8)
    for name, rank in ranks.items():
        shares = values[name].square().cumsum(0) / values[name].square().sum()
        assert shares[rank - 1] >= 0.8 > shares[rank - 2]


def test_a_budget_is_kept_and_spent_on_what_holds_most():
    model = make_model()
    with torch.no_grad():
        model[0].weight.copy_(torch.outer(torch.randn(16), torch.randn(20)))  # one direction only
    dense = sum(model[i].weight.numel() for i in (0, 2, 3))
    ranks = factorize(model, budget=0.5)
    spent = sum(p.numel() for i in (0, 2, 3) for n, p in model[i].named_parameters() if n != "bias")
    assert 0.4 * dense < spent <= 0.5 * dense
    assert ranks["0"] <= 2 < ranks["2"]


def test_known_inputs_keep_more_of_the_outputs():
    scales = torch.logspace(1, -1.5, 20)
    batches = [
        torch.randn(256, 20, generator=torch.Generator().manual_seed(s)) * scales for s in range(4)
    ]
    x, errors = torch.cat(batches), {}
    for name in ("plain", "weighted"):
        model = make_model()
        inputs = input_moments(model, "0", batches) if name == "weighted" else None
        before = model[0](x)
        factorize(model, "0", rank=4, inputs=inputs)
        errors[name] = (model[0](x) - before).square().mean().item()
    assert errors["weighted"] < 0.5 * errors["plain"]


def test_moments_are_the_mean_over_all_inputs():
    model = make_model()
    batches = [X[:10], X[10:40].reshape(3, 10, 20)]
    found = input_moments(model, "*", batches)
    assert torch.allclose(found["0"], X[:40].mT @ X[:40] / 40, atol=1e-5)
    hidden = model[0](X[:40]).relu()
    assert torch.allclose(found["2"], hidden.mT @ hidden / 40, atol=1e-5)


def test_a_compact_model_stores_only_what_is_active(tmp_path):
    model = make_model()
    factorize(model, "2", rank=4, capacity=16, mode="masked")
    before, size = model(X), sum(p.numel() for p in model.parameters())
    assert compact(model) == ["2"]
    assert size - sum(p.numel() for p in model.parameters()) == 12 * (16 + 24)
    assert torch.allclose(model(X), before, atol=1e-6)
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    fresh = make_model(1)
    factorize(fresh, "2", rank=4)
    load_model(fresh, path)
    assert torch.allclose(fresh(X), before, atol=1e-5)


def test_what_is_shared_stays_shared():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first

    model = Twice()
    factorize(model, rank=2)
    assert model.first is model.second


def test_frozen_layers_and_modes_stay_as_they_are():
    model = make_model().eval()
    model[0].requires_grad_(False)
    factorize(model, rank=2)
    assert not any(p.requires_grad for p in model[0].parameters())
    assert all(p.requires_grad for p in model[2].parameters())
    assert not model[0].training


def test_conversion_draws_no_random_numbers():
    model = make_model()
    state = torch.get_rng_state()
    factorize(model, rank=2, init="spectral")
    compact(model)
    merge(model)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` must be >= 1, got 0"),
        ({}, "exactly one of `rank`, `energy` and `budget` must be given"),
        ({"rank": 2, "energy": 0.5}, "exactly one of"),
        ({"energy": 1.5}, r"`energy` must be in \(0, 1\], got 1\.5"),
        ({"budget": 0.0}, r"`budget` must be in \(0, 1\], got 0\.0"),
        ({"budget": 0.01}, r"`budget` must be at least 0\.\d+ for rank 1, got 0\.01"),
        ({"rank": 2, "layers": "nope"}, r"`layers` must match a plain nn\.Linear, got \['nope'\]"),
        ({"rank": 4, "capacity": 99}, r"`capacity` must be in \[1, 16\]"),
        ({"rank": 4, "inputs": {"0": torch.eye(3)}}, r"`inputs` must have shape \(20, 20\), got"),
    ],
)
def test_a_wrong_conversion_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        factorize(make_model(), **options)


def test_a_tied_head_is_refused():
    model = nn.ModuleDict({"wte": nn.Embedding(10, 8), "head": nn.Linear(8, 10, bias=False)})
    model["head"].weight = model["wte"].weight
    with pytest.raises(ValueError, match=r"must leave out what shares its weight .* got 'head'"):
        factorize(model, rank=2)


def test_moments_need_a_batch():
    with pytest.raises(ValueError, match="`batches` must hold at least one batch, got none"):
        input_moments(make_model(), "*", [])


def test_torchs_encoder_keeps_its_function_on_its_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    sequence = torch.randn(3, 5, 16)
    before = encoder(sequence).detach()
    factorize(encoder, "*linear*", rank=16)
    with torch.no_grad():  # where the layer hands its weights to one fused kernel
        assert torch.allclose(encoder(sequence), before, atol=1e-5)
    encoder.train()(sequence).sum().backward()
    assert encoder.layers[0].linear1.left_factor.grad is not None


def test_a_converted_layer_shows_its_weight_as_linear_layers_do():
    model = make_model()
    factorize(model, "0", rank=5)
    assert model[0].weight.dtype == torch.float32
    left, right = model[0].left_factor, model[0].right_factor
    assert torch.allclose(model[0].weight, left @ right)
    assert torch.allclose(model[0](X), X @ model[0].weight.mT + model[0].bias, atol=1e-5)


def test_a_state_dict_is_merged_without_the_model():
    model = make_model()
    factorize(model, rank=5)
    state = merged_state(model)
    assert isinstance(model[0], LowRankLinear)
    plain = make_model(seed=1)
    plain.load_state_dict(state)
    assert torch.allclose(plain(X), model(X), atol=1e-5)
    assert merged_state(plain).keys() == plain.state_dict().keys()
