"""The doors for users of ASSR v1.5: its names and keys, and where the numbers differ on purpose."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spectral_lightning.callbacks import (
    ASSRConfig,
    analyze_layer,
    auto_calibrate,
    compute_condition_number,
    compute_spectral_health,
    compute_stable_rank,
    compute_stable_rank_ratio,
    legacy_assr,
    print_spectral_report,
)
from spectral_lightning.linalg import gaussian_condition_number
from spectral_lightning.testing.models import plant_spike_, relative_stable_rank
from spectral_lightning.testing.tasks import TinyTask

pytestmark = pytest.mark.filterwarnings("ignore:ASSR finds .* outside their bands at once")


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linears(*shapes):
    model = nn.Sequential(*(nn.Linear(n, m) for m, n in shapes))
    for seed, layer in enumerate(model):
        layer.weight.data.copy_(gaussian(*layer.weight.shape, seed=seed))
    return model


def test_health_has_the_keys_of_the_original_and_is_json():
    health = compute_spectral_health(gaussian(20, 30))
    assert set(health) - {"biased"} == {
        *("stable_rank", "stable_rank_ratio", "effective_rank", "condition", "spectral_norm"),
        *("min_singular_value", "frobenius_norm", "shape", "subsampled"),
    }
    json.dumps(health)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (30, 4, 3, 3), (1, 7)])
def test_all_numbers_are_those_of_the_whole_matrix(shape):
    weight = gaussian(*shape)
    values = torch.linalg.svdvals(weight.double().flatten(1))
    parts = values / values.sum()
    health = compute_spectral_health(weight)
    stable_rank = (values.square().sum() / values[0] ** 2).item()
    expected = {
        "stable_rank": stable_rank,
        "stable_rank_ratio": stable_rank / len(values),
        "effective_rank": torch.exp(-(parts * parts.log()).sum()).item(),
        "condition": (values[0] / values[-1]).item(),
        "spectral_norm": values[0].item(),
        "min_singular_value": values[-1].item(),
        "frobenius_norm": values.square().sum().sqrt().item(),
    }
    assert {name: health[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert health["shape"] == (shape[0], weight.flatten(1).shape[1])
    assert not health["biased"]
    assert not health["subsampled"]
    assert compute_stable_rank(weight) == health["stable_rank"]
    assert compute_stable_rank_ratio(weight) == health["stable_rank_ratio"]
    assert compute_condition_number(weight) == health["condition"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_and_not_taken_for_a_collapse(dtype):
    weight = gaussian(128, 192)
    health, exact = (compute_spectral_health(w) for w in (weight.to(dtype), weight))
    for measure in ("stable_rank", "condition", "effective_rank"):
        assert health[measure] == pytest.approx(exact[measure], rel=0.02)
    assert health["stable_rank_ratio"] > 0.2


def test_a_healthy_wide_matrix_is_well_conditioned_and_its_biopsy_is_marked_as_biased():
    weight = gaussian(256, 704)
    whole = compute_spectral_health(weight)
    assert whole["condition"] == pytest.approx(gaussian_condition_number(256, 704), rel=0.1)
    assert whole["condition"] == pytest.approx(4.0, rel=0.1)
    parts = [compute_spectral_health(weight, 128, seed=seed) for seed in range(5)]
    assert all(part["biased"] and part["subsampled"] for part in parts)
    assert all(part["condition"] > 10 * whole["condition"] for part in parts)
    assert all(part["stable_rank_ratio"] < 0.3 < whole["stable_rank_ratio"] for part in parts)
    assert not compute_spectral_health(weight, 1024)["biased"]


def test_a_biopsy_does_not_see_a_spike_that_the_whole_shows():
    weight = gaussian(512, 512)
    plant_spike_(weight, 1.5)
    whole, part = compute_stable_rank_ratio(weight), compute_stable_rank_ratio(weight, 128)
    assert whole < 0.1
    assert part > 0.2


def test_a_biopsy_draws_from_no_global_generator():
    state = torch.get_rng_state()
    weight = gaussian(100, 100)
    one, other = (compute_spectral_health(weight, 64) for _ in range(2))
    assert one == other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        (torch.zeros(3, 4), "`weight` must be finite and not zero, got: the weight is zero"),
        (torch.full((3, 4), torch.nan), "`weight` must be finite and not zero.*NaN"),
        (torch.ones(3), r"`weight` must be a matrix, got shape \(3,\)"),
        (torch.ones(0, 3), r"`weight` must be a matrix, got shape \(0, 3\)"),
    ],
)
def test_what_cannot_be_measured_is_an_error_and_never_a_number(weight, sentence):
    with pytest.raises(ValueError, match=sentence):
        compute_stable_rank(weight)


def test_a_limit_is_refused_as_in_the_settings():
    with pytest.raises(ValueError, match="`subsample_limit` must be >= 64, or None, got 10"):
        compute_stable_rank(gaussian(100, 100), 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibration_takes_all_layers_whole_in_any_precision(dtype):
    model = linears((64, 64), (64, 200), (30, 64))
    healths = [compute_spectral_health(layer.weight) for layer in model]
    lowest = sorted(health["stable_rank_ratio"] for health in healths)
    expected = 0.8 * (lowest[0] + 0.2 * (lowest[1] - lowest[0]))
    config = auto_calibrate(model.to(dtype), verbose=False)
    assert config.stable_rank_floor == pytest.approx(expected, rel=0.01)
    assert config.condition_ceiling != 750.0
    assert auto_calibrate(model, verbose=False) == config


@pytest.mark.parametrize(
    ("num_parameters", "sample_freq"), [(0, 1), (100e6, 2), (500e6, 5), (2e9, 10)]
)
def test_calibration_takes_the_tier_from_all_parameters(num_parameters, sample_freq):
    model = linears((64, 64))
    model.append(nn.Embedding(int(num_parameters / 1000), 1000, device="meta"))
    config = auto_calibrate(model, verbose=False)
    assert config.sample_freq == sample_freq
    floor = 0.8 * compute_stable_rank_ratio(model[0].weight)
    assert config.stable_rank_floor == pytest.approx(floor)


def test_calibration_leaves_out_layers_that_are_still_zero():
    model, with_zero = linears((64, 64)), linears((64, 64), (64, 8))
    nn.init.zeros_(with_zero[1].weight)
    assert auto_calibrate(with_zero, verbose=False) == auto_calibrate(model, verbose=False)


def test_a_model_without_a_matrix_gets_the_defaults_and_a_warning():
    with pytest.warns(UserWarning, match="`model` has no weight matrix that can be measured"):
        assert auto_calibrate(nn.LayerNorm(4)) == ASSRConfig()


def test_calibration_prints_what_it_found(capsys):
    config = auto_calibrate(linears((64, 64)))
    printed = capsys.readouterr().out
    assert "calibrated on 1 layers" in printed
    assert f"{config.stable_rank_floor:.3g}" in printed


def test_a_layer_is_analyzed_as_rows_times_columns_whatever_its_type(capsys):
    layer = Conv1D(30, 20)  # stores (in, out)
    layer.weight.data.copy_(gaussian(20, 30))
    health = analyze_layer(layer, "attn.c_attn")
    assert health["shape"] == (30, 20)
    assert health["stable_rank"] == pytest.approx(compute_stable_rank(layer.weight.T))
    printed = capsys.readouterr().out
    assert "attn.c_attn: 30 x 20" in printed
    assert "biased" not in printed
    analyze_layer(linears((100, 100))[0], subsample_limit=64)
    assert "a random part, which is biased" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`layer` must hold one weight matrix, got 2"):
        analyze_layer(linears((4, 4), (4, 4)))


def test_the_report_lists_the_worst_layers_first(capsys):
    model = linears((64, 64), (64, 64), (64, 64))
    plant_spike_(model[1].weight, 5.0)
    print_spectral_report(model, top_k=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:2] for line in lines[4:6]] == ["1 ", "0 "]
    assert lines[6].startswith("2 of 3 layers")
    print_spectral_report(model, 2, 64)
    assert "biased" in capsys.readouterr().out


def test_legacy_assr_shrinks_by_the_weight_of_the_penalty_and_moves_no_reading(fit):
    class Still(TinyTask):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

        def training_step(self, batch, batch_idx):
            return 0.0 * super().training_step(batch, batch_idx)

    task, twin = Still(), TinyTask()
    for model in (task, twin):
        plant_spike_(model.net[2].weight, 20.0)
    before = twin.net[2].weight.detach()
    config = ASSRConfig(base_lambda=0.01, sample_ratio=1.0)
    assr = legacy_assr(config, layers="net.2", table_rows=0)
    fit(assr, task=task, max_steps=5)
    after = task.net[2].weight.detach()
    weight = config.penalty_weight(0.0, 1.0)  # such a spike is all there is
    exact = config.penalty_weight(compute_stable_rank_ratio(before), 1.0)
    assert exact == pytest.approx(weight, rel=0.1)
    assert (after.norm() / before.norm()).item() == pytest.approx((1 - 0.2 * weight) ** 5, rel=1e-4)
    assert relative_stable_rank(after) == pytest.approx(relative_stable_rank(before), rel=1e-5)
    assert assr.interventions["net.2"].num_interventions == 5


@pytest.mark.filterwarnings("ignore:ASSR has not acted on .* before they were calibrated")
def test_legacy_assr_samples_as_the_tier_says(fit):
    config = ASSRConfig(sample_ratio=0.25, sample_freq=2, stable_rank_floor=0.4)
    assr = legacy_assr(config, table_rows=0)
    fit(assr, max_steps=8)
    assert assr.every_n_steps == 2
    assert assr.assr_stats["rank_int"] <= 8  # one of four layers, in each step


def test_stats_summary_and_settings_can_be_written_as_json(fit):
    assr = legacy_assr(ASSRConfig(stable_rank_floor=0.4), table_rows=0)
    fit(assr)
    json.dumps(assr.assr_stats)
    json.dumps(assr.get_assr_summary(), default=asdict)
    json.dumps({name: asdict(done) for name, done in assr.interventions.items()})
