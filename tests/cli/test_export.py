import sys

import pytest

from spectral_lightning.cli.entry import main
from tests.tasks.embedding_cases import make_task, pairs_data


@pytest.fixture
def checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(make_task(), pairs_data(tmp_path / "cache"))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    return str(tmp_path / "run.ckpt")


def export(checkpoint, *args):
    return main(["export", "--checkpoint", checkpoint, "--output", "out", *args])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format=onnx"], "`format` must be one of sentence-transformers, huggingface, safeten"),
        (["--head=ranking"], "`head` must be semantic, entity, anchor or retrieval for sentence-"),
        (["--head=x"], "`head` must be one of ['anchor', 'entity', "),
        (["--output=full"], "`output` must be a new or an empty folder, but full is not"),
    ],
    ids=str,
)
def test_a_mistake_is_answered_in_one_sentence(checkpoint, tmp_path, capsys, args, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    capsys.readouterr()
    assert export(checkpoint, *args) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    capsys.readouterr()
    assert export(checkpoint) == 2
    error = capsys.readouterr().err
    assert "needs that package: `pip install spectral-lightning[embeddings]`" in error


def test_other_formats_take_any_head(checkpoint, tmp_path, capsys):
    assert export(checkpoint, "--head=ranking", "--format=huggingface") == 0
    assert "out: head ranking, format huggingface." in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()
