"""`spectral compare` as a user meets it: tables, JSON, exit status and sentences about mistakes."""

import json
import math
import shutil
import subprocess
import sys

import pytest
from torch.utils.tensorboard import SummaryWriter

from spectral_lightning.cli.entry import main
from spectral_lightning.spectra import (
    MODE_EVENTS_FILE,
    LayerAnalysis,
    ModeEventWriter,
    ModeSettings,
)

WITHOUT_TORCH = """
import sys
from spectral_lightning.cli.entry import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
assert not {"torch", "lightning", "tensorboard"} & set(sys.modules)
sys.exit(status)
"""
CONFIG = """\
seed_everything: {seed}
trainer: {{max_steps: 40, log_every_n_steps: 10, devices: 1, accumulate_grad_batches: 1}}
data: {{init_args: {{batch_size: 4, sequence_len: 8}}}}
model: {{init_args: {{sample_prompts: [Once]}}}}
"""
LAYER = "model.blocks.0.attn.c_q"


def write_run(folder, validation, *, seed=0, last=39, step_seconds=1.0):
    """A run of 40 steps as `spectral fit` leaves it."""
    writer = SummaryWriter(str(folder))
    for step in range(9, last + 1, 10):
        writer.add_scalar("train/loss", 4.0 - step / 40, step, walltime=1e3 + step * step_seconds)
    for step, value in validation.items():
        writer.add_scalar("valid/bpb", value, step, walltime=1.0)
        writer.add_scalar("valid/loss", 2 * value, step, walltime=1.0)
    writer.add_text("samples/0", "    Once upon a time", 39)
    writer.close()
    (folder / "config.yaml").write_text(CONFIG.format(seed=seed))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step=40.ckpt").write_bytes(b"x")
    return folder


def write_modes(folder, num_layers=1):
    """Layers that switch at step 20 of a run with an analysis every 10 steps."""
    log = ModeEventWriter(folder / MODE_EVENTS_FILE)
    log.append(
        ModeSettings(
            step=0, every_n_steps=10, policy="SeedPolicy", protection="block", conditions=()
        )
    )
    names = ("principal_alignment", "minor_alignment", "reconstruction_error", "subspace_angle")
    modes = ("full", "full", "lowrank", "lowrank")
    for step, mode, following in zip((10, 20, 30), modes, modes[1:], strict=False):
        for number in range(num_layers):
            log.append(
                LayerAnalysis(
                    step=step,
                    layer=LAYER.replace("0", str(number)),
                    mode=mode,
                    rank=246,
                    num_principal=10,
                    next_mode=following,
                    next_rank=196 if following == "lowrank" else 246,
                    verdict="gradient_clobbering_risk" if mode != following else "scheduled",
                    loss=3.0,
                    measures=dict.fromkeys(names, 0.5),
                )
            )


@pytest.fixture
def pair(tmp_path):
    """Baseline and run, which is 2 % worse and switches modes."""
    baseline = write_run(tmp_path / "base" / "version_0", {19: 3.0, 39: 2.0})
    run = write_run(tmp_path / "modes" / "version_0", {19: 3.0, 39: 2.04})
    write_modes(run)
    return baseline, run


@pytest.fixture
def compare(capsys):
    """Run the command in this process: exit status, standard output and standard error."""

    def run(*args):
        try:
            status = main(["compare", *map(str, args)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def words(text):
    return [line.split() for line in text.splitlines()]


def read_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_both_runs_stand_side_by_side_with_every_common_validation(compare, pair):
    status, out, err = compare(*pair)
    assert (status, err) == (0, "")
    found = words(out)
    assert ["last", "step", "39", "39"] in found
    assert ["validation", "loss", "39", "4", "4.08", "+0.08", "+2.00", "%"] in found
    assert ["training", "loss", "39", "3.025", "3.025", "+0", "+0.00", "%"] in found
    assert ["tokens", "per", "second", "32", "32", "+0", "+0.00", "%"] in found
    assert ["19", "3", "3", "+0", "+0.00", "%"] in found
    assert ["39", "2", "2.04", "+0.04", "+2.00", "%"] in found
    assert ["mode", "switches", "-", "1"] in found
    assert "without svd_mode.jsonl" in " ".join(out.split())
    switch = [LAYER, "20", "full", "lowrank", "246", "to", "196", "gradient_clobbering_risk"]
    assert switch in found
    assert "Criteria" not in out


def test_a_run_that_meets_all_criteria_ends_well(compare, pair):
    status, out, err = compare(*pair, "--criteria", "phase1")
    assert (status, err) == (0, "")
    verdicts = [row[-1] for row in words(out) if row and row[-1] in ("passed", "failed", "unknown")]
    assert verdicts == ["passed"] * 6


def test_criteria_that_are_not_met_or_unknown_end_with_1_and_are_named(compare, pair):
    status, out, err = compare(*pair, "--criteria", "phase2")
    assert (status, err) == (0, "")  # 2 % are less than 5 %, and all layers switched
    assert "Not judged, because no logs show it: coherence of the text samples." in out
    status, out, err = compare(*pair, "--criteria", "phase3")
    assert (status, err) == (1, "error: Criteria of phase3 unknown: evidence of prevention.\n")
    status, out, err = compare(*reversed(pair), "--criteria", "phase1")
    assert status == 1
    assert err == "error: Criteria of phase1 unknown: analyses, mode switches, sane measures.\n"


def test_a_criterion_that_is_not_met_is_named_before_what_is_unknown(compare, tmp_path):
    baseline = write_run(tmp_path / "a", {39: 2.0})
    run = write_run(tmp_path / "b", {39: 2.07}, step_seconds=2.0)
    status, _, err = compare(baseline, run, "--criteria", "phase3")
    assert status == 1
    assert err == (
        "error: Criteria of phase3 not met: validation, tokens per second; unknown: evidence of"
        " prevention, rank falls.\n"
    )


def test_json_holds_all_that_the_tables_show(compare, pair):
    status, out, err = compare(*pair, "--criteria=phase2", "--json")
    assert (status, err) == (0, "")
    found = read_json(out)
    assert found["baseline"]["folder"] == str(pair[0])
    assert found["run"]["tokens_per_second"] == pytest.approx(32.0)
    assert found["baseline"]["modes"] is None
    assert found["run"]["modes"]["switches"] == 1
    assert found["run"]["switches"][0]["layer"] == LAYER
    assert [point["step"] for point in found["validation"]["points"]] == [19, 39]
    assert found["validation"]["tag"] == "valid/bpb"
    assert found["validation"]["points"][1]["relative_difference"] == pytest.approx(0.02)
    assert [point["step"] for point in found["training_loss"]] == [9, 19, 29, 39]
    assert found["criteria"]["passed"] is True
    assert {row["passed"] for row in found["criteria"]["criteria"]} == {True}
    assert found["warnings"] == []


def test_json_without_criteria_and_with_losses_that_are_not_finite(compare, tmp_path):
    baseline = write_run(tmp_path / "a", {19: 3.0, 39: math.nan})
    run = write_run(tmp_path / "b", {19: math.inf, 39: 2.0})
    status, out, _ = compare(baseline, run, "--json")
    found = read_json(out)
    assert status == 0
    assert found["criteria"] is None
    assert found["run"]["switches"] == []
    points = found["validation"]["points"]
    assert [point["run"] for point in points] == ["inf", 2.0]
    assert [point["relative_difference"] for point in points] == ["inf", "nan"]
    assert compare(baseline, run)[0] == 0


def test_the_newest_version_is_read_and_named(compare, pair, tmp_path):
    write_run(tmp_path / "modes" / "version_1", {39: 9.0})
    status, out, err = compare(pair[0], tmp_path / "modes", "--json")
    assert status == 0
    assert read_json(out)["run"]["folder"] == str(tmp_path / "modes" / "version_1")
    parent = tmp_path / "modes"
    assert err == f"Reading {parent / 'version_1'}, the newest version in {parent}.\n"


def test_other_settings_are_a_warning_and_no_error(compare, tmp_path):
    baseline = write_run(tmp_path / "a", {39: 2.0})
    run = write_run(tmp_path / "b", {39: 2.0}, seed=1)
    status, out, err = compare(baseline, run, "--json")
    assert status == 0
    sentence = "The pairing is not exact, because settings differ: seed_everything (0, 1)."
    assert err == f"WARNING: {sentence}\n"
    assert read_json(out)["warnings"] == [sentence]
    assert read_json(out)["config_differences"] == {"seed_everything": ["0", "1"]}


def test_csv_logs_are_compared_without_a_speed(compare, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text("step,train/loss,valid/bpb\n9,4.0,2.0\n")
    status, out, err = compare(tmp_path / "a", tmp_path / "b")
    assert status == 0
    assert ["tokens", "per", "second", "not", "logged", "not", "logged"] in words(out)
    assert ["validation", "loss", "not", "logged", "not", "logged"] in words(out)
    assert "mode switches" not in out
    assert err.startswith("WARNING: Whether the pairing is exact is not known: ")


@pytest.mark.parametrize("width", ["80", "120"])
def test_no_line_is_wider_than_the_terminal_and_long_lists_are_cut(
    compare, pair, monkeypatch, width
):
    monkeypatch.setenv("COLUMNS", width)
    (pair[1] / MODE_EVENTS_FILE).unlink()
    write_modes(pair[1], num_layers=23)
    for phase in ("phase1", "phase2", "phase3"):
        _, out, _ = compare(*pair, "--criteria", phase)
        assert max(map(len, out.splitlines())) <= int(width)
        assert "3 more are not shown." in out
        assert "…" not in out


def test_runs_that_cannot_be_compared_are_refused_in_one_sentence(compare, pair, tmp_path):
    other = write_run(tmp_path / "other", {9: 2.0})
    (tmp_path / "empty").mkdir()
    for args, message in (
        ((pair[0], pair[0].parent), "The two runs must be different ones"),
        ((pair[0], other), "The two runs must have a validation step in common"),
        ((pair[0], tmp_path / "empty"), "must hold event files of TensorBoard or a metrics.csv"),
        ((tmp_path / "missing", pair[0]), "must be the folder of a run, got no folder"),
    ):
        status, out, err = compare(*args)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--help"], 0, ["--criteria", "--json", "phase1", "phase2", "phase3", "exit status"]),
        ([], 2, ["error: `BASELINE` must be given."]),
        (["a"], 2, ["error: `RUN` must be given."]),
        (["a", "b", "c"], 2, ["error: Unexpected argument `c`."]),
        (["a", "b", "--criterai=x"], 2, ["Unknown option `--criterai`; did you mean `--criteria`"]),
        (["a", "b", "--criteria=phase4"], 2, ["error: Argument --criteria: invalid choice"]),
    ],
)
def test_help_and_mistakes_in_the_arguments_need_no_torch(args, status, words):
    command = [sys.executable, "-c", WITHOUT_TORCH, "compare", *args]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    for word in words:
        assert word in result.stdout + result.stderr


@pytest.mark.slow
def test_what_spectral_fit_leaves_is_read(compare, tmp_path):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(f"the {name} of the quick brown fox\n" * 200)
    options = """
        seed_everything=0 trainer.max_steps=4 trainer.log_every_n_steps=1 trainer.accelerator=cpu
        trainer.val_check_interval=2 trainer.limit_val_batches=1 trainer.logger=TensorBoardLogger
        trainer.logger.save_dir=. model=LanguageModeling model.model=GPT model.model.depth=1
        model.model.vocab_size=270 model.model.model_dim=8 model.model.sequence_len=16
        model.sample_prompts=[a] model.sample_tokens=2 data=TextDataModule data.source=train.txt
        data.valid_source=valid.txt data.cache_dir=cache data.vocab_size=270 data.batch_size=2
        data.sequence_len=16
    """
    fit = [sys.executable, "-m", "spectral_lightning.cli.entry", "fit"]
    args = [f"--{option}" for option in options.split()]
    result = subprocess.run([*fit, *args], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "lightning_logs" / "version_0"
    shutil.copytree(run, tmp_path / "copy")
    status, out, err = compare(tmp_path / "copy", run, "--json")
    found = read_json(out)
    assert (status, err) == (0, "")
    assert found["validation"]["tag"] == "valid/bpb"
    assert [point["step"] for point in found["validation"]["points"]] == [1, 3]
    assert [point["difference"] for point in found["training_loss"]] == [0.0] * 4
    assert found["run"]["tokens_per_second"] > 0
    assert found["run"]["last_step"] == 3
    assert len(found["run"]["samples"]) == len(found["run"]["checkpoints"]) == 1
