"""What the command says to a user's mistake, always through `spectral` itself."""

import pytest

from spectral_lightning.cli.entry import main

# LightningCLI 2.6 calls functions that jsonargparse 4.44 and later announce to remove.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)

TASK = ["--model", "LanguageModeling", "--model.model", "GPT", "--model.model.depth", "1"]
DATA = ["--data", "TextDataModule"]


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The sentence with which a command ends, without its prefix and its hint."""
    try:
        status = main(list(args))
    except SystemExit as end:
        status = end.code
    lines = capsys.readouterr().err.splitlines()
    assert status == 2
    assert lines[-1].startswith("error: ")
    assert [line for line in lines if "Traceback" in line] == []
    return lines[-1].removeprefix("error: ").removesuffix(" (--traceback shows where.)")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ["--trainer.max_stepss=2"],
            "Unknown option `--trainer.max_stepss`; did you mean `--trainer.max_steps`?",
        ),
        (
            ["--model", "LanguageModelling"],
            "`model` names the class LanguageModelling, which is not known; did you mean"
            " `LanguageModeling`?",
        ),
        (
            ["--model", "spectral_lightning.tasks.languagemodeling"],
            "`model` names the class spectral_lightning.tasks.languagemodeling, which is not"
            " known; did you mean `LanguageModeling`?",
        ),
        (
            ["--model", "LanguageModeling", "--model.model", "GTP"],
            "`model.model` names the class GTP, which is not known; did you mean `GPT`?",
        ),
        (
            ["--model", "LanguageModeling", "--model.model", "Zzyzx"],
            "`model.model` names the class Zzyzx, which is not known.",
        ),
        (
            ["--model", "LanguageModeling", "--model.model", "gpt.yaml"],
            "`model.model` names the file gpt.yaml, which does not exist.",
        ),
        (
            [*TASK, "--model.model.dept", "2"],
            "`GPT` has no option `dept`; did you mean `depth`?",
        ),
        (
            [*TASK, "--model.optimizer", "MuonAdam"],
            "`model.optimizer` names the class MuonAdam, which is not known; did you mean"
            " `MuonAdamW`?",
        ),
        (
            [*TASK, "--model.optimizer", "AdamW", "--model.optimizer.learning_rate", "1"],
            "`AdamW` has no option `learning_rate`; it has `params`, `lr`,",
        ),
        (
            [*TASK, "--data", "TextModule"],
            "`data` names the class TextModule, which is not known; did you mean `TextDataModule`?",
        ),
        (
            [*TASK, "--trainer.callbacks+=SpectralMonitr"],
            "`trainer.callbacks` names the class SpectralMonitr, which is not known; did you mean"
            " `SpectralMonitor`?",
        ),
        (
            [*TASK, "--trainer.callbacks+=SpectralMonitor", "--trainer.callbacks.every_n_step=2"],
            "`SpectralMonitor` has no option `every_n_step`; did you mean `every_n_steps`?",
        ),
        ([*TASK, "--trainer.max_steps=many"], "`trainer.max_steps` must be of type int, got many."),
        ([*TASK, "--model.sample_tokens=a"], "`model.sample_tokens` must be of type int, got a."),
        (["--model", "LanguageModeling"], "`LanguageModeling` needs `model`, which was not given."),
        ([*DATA], "`--model` must be given, or a `--config` file that holds it."),
        ([*TASK, "again"], "Unexpected argument `again`."),
        (["--config", "absent.yaml"], "`config`: File does not exist:"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misspelt_argument_is_answered_with_the_nearest_name(capsys, args, sentence):
    assert error_of(capsys, "fit", *args).startswith(sentence)


def test_options_cannot_be_abbreviated(capsys):
    said = error_of(capsys, "fit", *TASK, "--trainer.max_step=2")
    assert said == "Unknown option `--trainer.max_step`; did you mean `--trainer.max_steps`?"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("trainr: {max_steps: 1}", "Unknown key `trainr.max_steps`; did you mean `trainer.max_st"),
        ("trainer: {max_stepss: 1}", "Unknown key `trainer.max_stepss`; did you mean `trainer.ma"),
        ("trainer: {max_steps: [1", "Problems parsing config: while parsing a flow sequence"),
        (
            "trainer: {callbacks: [{class_path: SpectralMonitr}]}",
            "`trainer.callbacks` names the class SpectralMonitr, which is not known; did you mean",
        ),
        (
            "trainer: {callbacks: [{class_path: SpectralMonitor, init_args: {layer: x}}]}",
            "`SpectralMonitor` has no option `layer`; did you mean `layers`?",
        ),
        (
            "trainer: {callbacks: [{class_path: SpectralMonitor, init_arg: {layers: x}}]}",
            "`Callback` has no option `init_arg`; did you mean `init_args`?",
        ),
    ],
)
def test_a_mistake_in_a_configuration_file_is_one_sentence(capsys, tmp_path, text, sentence):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    assert error_of(capsys, "fit", *TASK, "--config", str(config)).startswith(sentence)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--model.warmup_steps=-1"], "`warmup_steps` must be >= 0, got -1."),
        (["--model.model.depth=0"], "`depth` must be >= 1, got 0."),
        (["--data.batch_size=0"], "`batch_size` must be >= 1, got 0."),
        (
            ["--trainer.callbacks+=SpectralMonitor", "--trainer.callbacks.every_n_steps=0"],
            "`every_n_steps` must be >= 1, got 0.",
        ),
        (["--trainer.accelerator=gqu"], "You selected an invalid accele"),
        (["--trainer.limit_val_batches=-2"], "You have passed invalid value -2 for limit_val"),
    ],
)
def test_a_value_that_a_class_refuses_is_one_sentence(capsys, args, sentence):
    assert error_of(capsys, "fit", *TASK, *DATA, *args, "--seed_everything=0").startswith(sentence)


def test_a_traceback_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("SPECTRAL_DEBUG", "1")
    with pytest.raises(ValueError, match="`warmup_steps` must be >= 0"):
        main(["fit", *TASK, *DATA, "--seed_everything=0", "--model.warmup_steps=-1"])


def test_the_parsers_own_report_is_shown_on_request(monkeypatch, capsys):
    monkeypatch.setenv("SPECTRAL_DEBUG", "1")
    with pytest.raises(SystemExit):
        main(["fit", "--model", "LanguageModelling"])
    assert "Does not validate against" in capsys.readouterr().err
