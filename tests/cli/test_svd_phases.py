"""The original's first phase, small: train, watch, compare."""

import subprocess
import sys
from pathlib import Path

import pytest

from spectral_lightning.cli.entry import main
from spectral_lightning.spectra import read_mode_events

CONFIGS = Path(__file__).parents[2] / "configs"

pytestmark = pytest.mark.slow


def fit(folder, *configs):
    words = ("matrix", "vector", "value", "rank", "norm", "layer", "step", "model")
    lines = [f"The {a} of the {b} is a {c}." for a in words for b in words for c in words]
    (folder / "train.txt").write_text("\n\n".join(lines))
    (folder / "valid.txt").write_text("The value of the norm is a step. " * 60)
    command = [
        *(sys.executable, "-m", "spectral_lightning.cli.entry", "fit"),
        *(f"--config={CONFIGS / name}" for name in configs),
        *("--model.model.depth=2", "--model.model.model_dim=64", "--model.model.head_dim=32"),
        *("--model.model.vocab_size=300", "--data.vocab_size=300", "--model.sample_tokens=4"),
        *("--model.model.sequence_len=32", "--data.sequence_len=32", "--data.batch_size=4"),
        *("--data.source=train.txt", "--data.valid_source=valid.txt", "--data.cache_dir=cache"),
        *("--trainer.max_steps=60", "--trainer.val_check_interval=20"),
        *("--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"),
    ]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (run,) = (folder / "runs").glob("*/version_0")
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A baseline and a run with mode switching of the same settings."""
    folders = [tmp_path_factory.mktemp(name) for name in ("baseline", "switching")]
    quickstart = "gpt_quickstart.yaml"
    return fit(folders[0], quickstart), fit(folders[1], quickstart, "svd_phase1.yaml")


def test_the_first_phase_switches_by_its_policy(runs):
    events = read_mode_events(runs[1] / "svd_mode.jsonl")
    analyses = [event for event in events if event.event == "analysis"]
    assert {event.layer for event in analyses} == {"model.blocks.0.attn.c_q"}
    assert [event.step for event in analyses] == [20, 40]
    assert any(event.switches for event in analyses)
    assert list(runs[1].rglob("*.ckpt"))


def test_watch_tells_what_happened(runs, capsys):
    main(["watch", str(runs[1])])
    out = capsys.readouterr().out
    assert "lowrank" in out
    assert "gradient_clobbering_risk" in out


def test_compare_judges_the_pair(runs, capsys):
    main(["compare", *map(str, runs), "--criteria", "phase1"])
    out = capsys.readouterr().out
    assert "checkpoint" in out
    assert "text sample" in out
    assert "failed" not in out
