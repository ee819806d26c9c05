"""The console command up to the point where it hands over; nothing here may need torch."""

import os
import subprocess
import sys

import pytest

import spectral_lightning
from spectral_lightning.cli import entry, rules

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


def spectral(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that fails if torch or Lightning was imported."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *args]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_every_command_without_torch(option):
    result = spectral(option)
    assert result.returncode == 0, result.stderr
    for command in entry.COMMANDS:
        assert f"\n  {command} " in result.stdout


def test_version_is_answered_without_torch():
    result = spectral("--version")
    assert result.stdout == f"spectral_lightning {spectral_lightning.__version__}\n"
    assert result.returncode == 0, result.stderr


def test_no_command_shows_the_help_and_fails():
    result = spectral()
    assert result.returncode == 2
    assert result.stderr.startswith("usage: spectral COMMAND")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate", ["--max_new_tokens"]),
        ("encode", ["--head", "--dim", ".safetensors"]),
        ("export", ["sentence-transformers", "huggingface", "safetensors"]),
        ("params", ["--size", "--set"]),
        ("scan", ["--fail-on", "failure", "unhealthy", *rules.COLUMNS]),
    ],
)
def test_help_of_a_command_needs_no_torch(command, words):
    result = spectral(command, "--help")
    assert result.returncode == 0, result.stderr
    for word in words:
        assert word in result.stdout


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["fti"], "Unknown command `fti`; did you mean `fit`?"),
        (["Generate"], "Unknown command `Generate`; did you mean `generate`?"),
        (["publish"], "Unknown command `publish`."),
        (["--hlep"], "Unknown option `--hlep`; did you mean `--help`?"),
        (["generate", "--promt", "x"], "Unknown option `--promt`; did you mean `--prompt`?"),
        (["generate", "--prompt=x"], "`--checkpoint` must be given."),
        (["generate", "--checkpoint=x"], "`--prompt` must be given."),
        (["generate", "--check=x", "--prompt=x"], "Unknown option `--check`"),
        (["generate", "--top_k=many"], "Argument --top_k: invalid int value: 'many'."),
        (["encode", "--checkpoint=x"], "`--output` must be given."),
        (["export", "--output=x"], "`--checkpoint` must be given."),
        (["params", "--sise=x"], "Unknown option `--sise`; did you mean `--size`?"),
        (["scan"], "`PATH` must be given."),
        (["scan", "model", "--jsn"], "Unknown option `--jsn`; did you mean `--json`?"),
        (["scan", "x", "--fail_on=y"], "Unknown option `--fail_on`; did you mean `--fail-on`?"),
        (["scan", "model", "second"], "Unexpected argument `second`."),
        (["scan", "model", "--rows=many"], "Argument --rows: invalid int value: 'many'."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_without_torch(args, sentence):
    result = spectral(*args)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {sentence}")
    assert result.stderr.count("\n") == 1


def test_traceback_is_taken_anywhere_and_reaches_other_processes(monkeypatch, capsys):
    monkeypatch.setenv("SPECTRAL_DEBUG", "")
    assert entry.main(["--version", "--traceback"]) == 0
    assert os.environ["SPECTRAL_DEBUG"] == "1"
    capsys.readouterr()
