import pytest
import torch

from spectral_lightning.spectra import read_history

pytestmark = [
    pytest.mark.distributed,
    # Gloo in torch 2.13 says so at every barrier; Lightning chooses the call.
    pytest.mark.filterwarnings("ignore:.*barrier\\(\\).*device:UserWarning"),
]


def test_both_ranks_read_what_one_process_reads(fit_one, fit_two):
    readings, weights, metrics = fit_one()
    for other_readings, other_weights, other_metrics in fit_two():
        # Ranks see the same batch, so the mean of their gradients is that of one process.
        for name, weight in weights.items():
            assert torch.equal(other_weights[name], weight), name
        assert other_readings == readings
        assert other_metrics == metrics


def test_readings_are_those_of_the_whole_matrix(fit_two, largest_value):
    for readings, weights, _ in fit_two():
        assert {name: reading.step for name, reading in readings.items()} == dict.fromkeys(
            ["net.0", "net.2", "net.5", "net.7"], 6
        )
        for name, reading in readings.items():
            weight = weights[f"{name}.weight"]
            truth = largest_value(weight)
            low, high = reading.spectral_norm_interval
            assert reading.shape == tuple(weight.shape)
            assert low <= truth <= high
            assert reading.spectral_norm == pytest.approx(truth, rel=1e-3)


def test_one_rank_writes(fit_two, tmp_path):
    fit_two()
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "metrics.csv",
        "spectral_history.jsonl",
    ]
    history = read_history(folder / "spectral_history.jsonl")
    assert [entry.step for entry in history] == [0, 1, 2, 3, 4, 5, 6]


def test_one_rank_prints_the_table(fit_two, capfd):
    fit_two()
    assert capfd.readouterr().out.count("Layers whose stable rank is farthest from random") == 1


def test_a_resumed_run_reads_what_an_uninterrupted_one_reads(fit_two, tmp_path):
    path = tmp_path / "run.ckpt"
    whole = fit_two(logger=False)
    fit_two(logger=False, max_steps=3, save=path)
    resumed = fit_two(logger=False, ckpt_path=path)
    assert [readings for readings, _, _ in resumed] == [readings for readings, _, _ in whole]


def test_validation_between_steps_does_not_disturb(fit_one, fit_two):
    """After it FSDP2 leaves the root's weights gathered."""
    readings, _, _ = fit_one()
    settings = {"limit_val_batches": 1, "val_check_interval": 2, "num_sanity_val_steps": 1}
    for other, _, _ in fit_two(**settings):
        assert other == readings
