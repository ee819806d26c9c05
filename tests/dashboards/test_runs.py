"""What is read from a run's folder, on logs written by TensorBoard's writer and by hand."""

import math

import pytest
from torch.utils.tensorboard import SummaryWriter

from spectral_lightning.dashboards.runs import Scalar, read_run, run_folder
from spectral_lightning.spectra import MODE_EVENTS_FILE, ModeEventWriter, SkippedAnalysis


def write_board(folder, scalars, texts=(), start=1000.0, suffix=""):
    """One start of a run; a second of wall time for each entry."""
    writer = SummaryWriter(str(folder), filename_suffix=suffix)
    for number, (tag, step, value) in enumerate(scalars):
        writer.add_scalar(tag, value, step, walltime=start + number)
    for tag, step, text in texts:
        writer.add_text(tag, text, step)
    writer.close()


def write_csv(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text(text)


def test_tensorboard_scalars_come_back_with_their_steps_and_times(tmp_path):
    write_board(tmp_path, [("train/loss", 9, 4.0), ("train/loss", 19, 3.5), ("valid/bpb", 19, 2.0)])
    run = read_run(tmp_path)
    assert run.folder == tmp_path
    assert run.scalars["train/loss"] == (Scalar(9, 4.0, 1000.0), Scalar(19, 3.5, 1001.0))
    assert run.values("valid/bpb") == {19: 2.0}
    assert run.values("valid/loss") == {}
    assert len(run.starts) == 1


def test_every_entry_of_a_long_run_is_kept(tmp_path):
    write_board(tmp_path, [("train/loss", step, 1.0) for step in range(12_000)])
    assert len(read_run(tmp_path).scalars["train/loss"]) == 12_000


def test_numbers_that_are_not_finite_come_back_as_they_are(tmp_path):
    write_board(tmp_path / "board", [("train/loss", 0, math.nan), ("train/loss", 1, math.inf)])
    write_csv(tmp_path / "csv", "step,train/loss\n0,nan\n1,inf\n")
    for folder in ("board", "csv"):
        values = read_run(tmp_path / folder).values("train/loss")
        assert math.isnan(values[0])
        assert values[1] == math.inf


def test_csv_has_no_times_and_its_empty_cells_were_not_logged(tmp_path):
    write_csv(tmp_path, "epoch,step,train/loss,valid/bpb\n0,9,4.5,\n0,19,,2.25\n1,29,4.0")
    run = read_run(tmp_path)
    assert run.scalars["train/loss"] == (Scalar(9, 4.5, None), Scalar(29, 4.0, None))
    assert run.scalars["valid/bpb"] == (Scalar(19, 2.25, None),)
    assert run.values("epoch") == {9: 0, 19: 0, 29: 1}
    assert "step" not in run.scalars
    assert run.starts == ()


def test_tensorboard_counts_where_both_loggers_were_used(tmp_path):
    write_board(tmp_path, [("train/loss", 9, 4.0)])
    write_csv(tmp_path, "step,train/loss,only\n9,5.0,7.0\n")
    run = read_run(tmp_path)
    assert run.scalars["train/loss"] == (Scalar(9, 4.0, 1000.0),)
    assert run.values("only") == {9: 7.0}


def test_what_a_resumed_run_logs_again_counts(tmp_path):
    write_board(tmp_path, [("train/loss", step, 1.0) for step in (9, 19, 29, 39)], suffix=".0")
    write_board(tmp_path, [("train/loss", step, 2.0) for step in (19, 29)], start=2e3, suffix=".1")
    run = read_run(tmp_path)
    assert run.values("train/loss") == {9: 1.0, 19: 2.0, 29: 2.0}
    assert len(run.starts) == 2
    write_csv(tmp_path / "csv", "step,train/loss\n9,1\n19,1\n29,1\n19,2\n")
    assert read_run(tmp_path / "csv").values("train/loss") == {9: 1.0, 19: 2.0}


def test_last_step_is_that_of_the_tags_asked_for(tmp_path):
    write_board(tmp_path, [("train/loss", 9, 4.0), ("valid/bpb", 12, 2.0), ("svd/rank", 40, 1.0)])
    run = read_run(tmp_path)
    assert run.last_step(("train/loss", "valid/bpb", "missing")) == 12
    assert run.last_step(("missing",)) is None


def test_the_newest_version_is_taken_by_its_number(tmp_path):
    for version in ("version_2", "version_10", "version_9", "version_old"):
        write_csv(tmp_path / version, "step,train/loss\n0,1\n")
    assert run_folder(tmp_path) == tmp_path / "version_10"
    assert read_run(tmp_path).folder == tmp_path / "version_10"
    assert run_folder(str(tmp_path / "version_2")) == tmp_path / "version_2"


def test_an_older_version_is_never_taken_for_the_newest(tmp_path):
    write_csv(tmp_path / "version_0", "step,train/loss\n0,1\n")
    (tmp_path / "version_1").mkdir()
    with pytest.raises(ValueError, match="version_1`, the newest version, must hold event files"):
        run_folder(tmp_path)


def test_a_folder_without_logs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold event files of TensorBoard or a metrics"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="must be the folder of a run, got no folder"):
        read_run(tmp_path / "missing")
    write_board(tmp_path, [], [("samples/0/text", 0, "text alone is no number")])
    with pytest.raises(ValueError, match="must hold logs with at least one number, got none"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch,train/loss\n0,1\n", r"must have a column named step, got \['epoch', 'train/loss'"),
        ("step,train/loss\n0,1\n1,high\n", "must hold numbers, but its line 3 does not"),
        ("step,train/loss\n,1\n", "must hold numbers, but its line 2 does not"),
    ],
)
def test_a_csv_file_that_is_no_log_is_refused(tmp_path, text, message):
    write_csv(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_a_damaged_end_of_an_event_file_costs_only_the_end(tmp_path):
    write_board(tmp_path, [("train/loss", step, 1.0) for step in range(5)])
    (file,) = tmp_path.glob("events*")
    file.write_bytes(file.read_bytes()[:-3])
    assert list(read_run(tmp_path).values("train/loss")) == [0, 1, 2, 3]


def test_the_latest_sample_of_each_prompt_is_kept(tmp_path):
    texts = [("samples/0", 1, "early"), ("samples/0", 2, "late"), ("notes", 1, "no sample")]
    write_board(tmp_path, [("train/loss", 0, 1.0)], texts)
    assert list(read_run(tmp_path).samples.values()) == ["late"]


def test_settings_are_flat_and_config_yaml_comes_before_hparams(tmp_path):
    write_csv(tmp_path, "step,train/loss\n0,1\n")
    assert read_run(tmp_path).config is None
    (tmp_path / "hparams.yaml").write_text("{}\n")
    assert read_run(tmp_path).config is None
    (tmp_path / "hparams.yaml").write_text("depth: 4\n")
    run = read_run(tmp_path)
    assert (run.config, run.config_file) == ({"depth": 4}, "hparams.yaml")
    text = "seed_everything: 0\ntrainer:\n  max_steps: 9\n  plugins: {}\n  callbacks:\n  - {a: 1}\n"
    (tmp_path / "config.yaml").write_text(text)
    run = read_run(tmp_path)
    assert run.config_file == "config.yaml"
    assert run.config == {
        "seed_everything": 0,
        "trainer.max_steps": 9,
        "trainer.plugins": {},
        "trainer.callbacks": [{"a": 1}],
    }


@pytest.mark.parametrize("text", ["a: !!python/object:os.path {}\n", "a: [1\n"])
def test_settings_that_are_not_plain_yaml_are_not_known(tmp_path, text):
    write_csv(tmp_path, "step,train/loss\n0,1\n")
    (tmp_path / "config.yaml").write_text(text)
    run = read_run(tmp_path)
    assert run.config is None
    assert run.config_file == "a config.yaml that is not plain YAML"


def test_mode_events_are_read_and_told_from_their_absence(tmp_path):
    write_csv(tmp_path, "step,train/loss\n0,1\n")
    assert read_run(tmp_path).events is None
    event = SkippedAnalysis(step=20, layer="a", reason="its gradient is zero")
    ModeEventWriter(tmp_path / MODE_EVENTS_FILE).append(event)
    assert read_run(tmp_path).events == (event,)


def test_empty_checkpoints_are_none(tmp_path):
    write_csv(tmp_path, "step,train/loss\n0,1\n")
    folder = tmp_path / "checkpoints"
    sharded = folder / "sharded.ckpt"
    sharded.mkdir(parents=True)
    (folder / "empty.ckpt").touch()
    assert read_run(tmp_path).checkpoints == ()
    (sharded / "part").touch()
    (folder / "last.ckpt").write_bytes(b"x")
    assert read_run(tmp_path).checkpoints == (folder / "last.ckpt", sharded)
