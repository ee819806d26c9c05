"""`spectral watch` as a user meets it: alerts, summary, exit status."""

import json
import os
import subprocess
import sys

import pytest

from spectral_lightning.cli.entry import main
from spectral_lightning.spectra import (
    Condition,
    LayerAnalysis,
    ModeEventWriter,
    ModeSettings,
    SkippedAnalysis,
)

CONDITIONS = (
    Condition("principal_alignment", "danger", above=True, threshold=0.3),
    Condition("minor_alignment", "optimal", above=True, threshold=0.5),
    Condition("subspace_angle", "optimal", above=False, threshold=0.15),
)


def settings(step=0):
    return ModeSettings(
        step=step,
        every_n_steps=20,
        policy="SeedPolicy",
        protection="block",
        conditions=CONDITIONS,
    )


def analysis(step, principal=0.1, *, layer="blocks.0.c_q", mode="full", to=None, rank=12):
    return LayerAnalysis(
        step=step,
        layer=layer,
        mode=mode,
        rank=rank,
        num_principal=4,
        next_mode=to or mode,
        next_rank=rank,
        verdict="gradient_clobbering_risk" if to else "continue_current_mode",
        loss=2.5,
        measures={"principal_alignment": principal, "minor_alignment": 0.4},
    )


RUN = (
    settings(),
    analysis(20, 0.2),
    analysis(20, 0.1, layer="blocks.1.mlp"),
    analysis(40, 0.28),
    SkippedAnalysis(step=40, layer="blocks.1.mlp", reason="the optimizer took no step"),
    analysis(60, 0.35, to="lowrank"),
    analysis(60, 0.32, layer="blocks.1.mlp"),
    analysis(80, 0.35, mode="lowrank"),
)
ALERTS = """\
WARNING  step 40 blocks.0.c_q: less than 10 % from danger: principal_alignment 0.28 (danger above 0.3)
WARNING  step 40 blocks.1.mlp: analysis skipped: the optimizer took no step
CRITICAL step 60 blocks.0.c_q: danger in full mode: principal_alignment 0.35 is above 0.3
INFO     step 60 blocks.0.c_q: full mode -> low-rank mode, rank 12: gradient_clobbering_risk
CRITICAL step 60 blocks.1.mlp: danger in full mode: principal_alignment 0.32 is above 0.3
""".splitlines()  # noqa: E501


def write(path, *events):
    ModeEventWriter(path).append(*events)
    return path


@pytest.fixture
def file(tmp_path):
    """Events of a run with one layer that was critical, and one that still is."""
    return write(tmp_path / "runs" / "x" / "version_0" / "svd_mode.jsonl", *RUN)


@pytest.fixture
def watch(capsys):
    """Run the command in this process: exit status, standard output and standard error."""

    def run(*args):
        try:
            status = main(["watch", *map(str, args)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def alert_lines(out):
    return [line for line in out.splitlines() if line.startswith(("CRITICAL", "WARNING", "INFO"))]


def test_a_run_is_told_by_its_alerts_and_its_summary(watch, file):
    status, out, err = watch(file)
    assert (status, err) == (1, "")
    assert out.splitlines()[:5] == ALERTS
    said = " ".join(out.split())
    assert " blocks.1.mlp 60 full 12 4 -0.02 DANGER 0/2 0 1 " in said
    assert " blocks.0.c_q 80 lowrank 12 4 -0.05 DANGER 0/2 1 0 " in said
    assert "critical at their latest analysis: blocks.1.mlp." in said
    assert "subspace_angle was not measured (-): blocks.1.mlp, blocks.0.c_q." in said


@pytest.mark.parametrize("above", ["runs/x/version_0", "runs/x", "runs"])
def test_a_folder_stands_for_the_newest_file_below_it(watch, file, tmp_path, above):
    old = write(tmp_path / "runs" / "x" / "old" / "svd_mode.jsonl", settings())
    os.utime(old, (0, 0))
    status, out, err = watch(above, "--summary-only")
    assert status == 1
    assert "version_0/svd_mode.jsonl\n" in out
    below = f"note: reading {above}/"
    if above == "runs/x/version_0":
        assert err == ""
    else:
        assert err.startswith(below)
        assert err.endswith(f"svd_mode.jsonl, the newest of 2 event files below {above}.\n")


def test_the_exit_status_is_of_the_latest_analysis_of_the_watched_layers(watch, file):
    assert watch(file, "--layers", "*.c_q")[0] == 0
    assert watch(file, "--layers", "*.c_q", "--layers", "*.mlp")[0] == 1


def test_layers_quiet_and_summary_only_choose_what_is_shown(watch, file):
    _, out, _ = watch(file, "--layers", "*.c_q")
    assert alert_lines(out) == [line for line in ALERTS if "c_q" in line]
    assert "mlp" not in out
    _, out, _ = watch(file, "--quiet")
    assert alert_lines(out) == [line for line in ALERTS if "CRITICAL" in line]
    status, out, _ = watch(file, "--summary-only")
    assert (status, alert_lines(out)) == (1, [])


def test_the_margin_moves_the_warnings_and_not_the_thresholds(watch, file):
    _, out, _ = watch(file, "--warn-margin", "0.5")
    levels = [line.split()[0] for line in alert_lines(out)]
    assert levels.count("WARNING") == 3
    assert levels.count("CRITICAL") == 2


def test_json_is_one_strict_document(watch, file):
    status, out, err = watch(file, "--json", "--quiet")
    assert (status, err) == (1, "")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["settings"]["file"] == str(file)
    assert found["run"]["every_n_steps"] == 20
    assert [alert["layer"] for alert in found["alerts"]] == ["blocks.0.c_q", "blocks.1.mlp"]
    assert {alert["level"] for alert in found["alerts"]} == {"CRITICAL"}
    first, second = found["summary"]
    assert (first["layer"], first["critical"]) == ("blocks.1.mlp", True)
    assert (second["num_switches"], second["not_measured"]) == (1, ["subspace_angle"])


def test_a_run_that_has_only_begun_is_not_critical(watch, tmp_path):
    file = write(tmp_path / "svd_mode.jsonl", settings())
    status, out, err = watch(file)
    assert (status, err) == (0, "")
    assert "0 layers" in out


def test_a_last_line_that_is_still_being_written_is_left_out(watch, file):
    whole = watch(file)
    with file.open("a") as open_file:
        open_file.write('{"event": "analysis", "st')
    assert watch(file) == whole


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--interval", "0"], "`interval` must be finite and > 0, got 0.0."),
        (["--warn-margin", "-1"], "`warn-margin` must be finite and >= 0, got -1.0."),
        (["--json", "--follow"], "`json` must not be given with `follow`"),
        (["--layers", "*.c_k"], "`layers` must match at least one layer, got '*.c_k'; the layers"),
        (["--margin", "1"], "Unknown option `--margin`; did you mean `--warn-margin`?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_the_arguments_is_one_sentence(watch, file, args, sentence):
    status, out, err = watch(file, *args)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("path", "what"), [("missing", "is missing"), (".", "has no event file")])
def test_without_an_event_file_the_sentence_says_what_writes_it(watch, path, what):
    status, out, err = watch(path)
    assert (status, out) == (2, "")
    assert err.startswith("error: `RUN_DIR` must be an event file or a folder with one, but")
    assert what in err
    assert "The callback SVDModeSwitch writes it; `--follow` waits for it." in err


def test_a_file_of_something_else_is_one_sentence(watch, tmp_path):
    (tmp_path / "notes.txt").write_text("no events\n")
    status, _, err = watch("notes.txt")
    assert status == 2
    assert err.startswith("error: `notes.txt` must be a file of mode events, but its line 1 is not")


WITHOUT_TORCH = """
import sys
from spectral_lightning.cli.entry import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
assert not {"torch", "lightning"} & set(sys.modules)
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["watch", "--help"], 0, ["--follow", "--warn-margin", "svd_mode.jsonl", "exit status: 0"]),
        (["watch"], 2, ["error: `RUN_DIR` must be given."]),
        (["watch", "x", "--follow", "--json"], 2, ["error: `json` must not be given with"]),
    ],
)
def test_help_and_mistakes_need_no_torch(args, status, words):
    command = [sys.executable, "-c", WITHOUT_TORCH, *args]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    for word in words:
        assert word in result.stdout + result.stderr
