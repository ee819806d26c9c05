"""From one command that trains to the vectors of texts, with nothing but the checkpoint."""

import io
import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer

from spectral_lightning.cli.entry import main
from spectral_lightning.data import embedded_pairs
from spectral_lightning.data.corpus import library_files
from spectral_lightning.tasks import SentenceEmbedding, load_sentence_encoder
from tests.tasks.embedding_cases import TINY

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*tokens and were cut; this is said once"),
    pytest.mark.filterwarnings("ignore:The correlation at dimensions"),
]

TEXTS = ["return the sum of two numbers", "open a file", "a text of its own, as the third one is"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of one command on the embedded pairs."""
    folder = tmp_path_factory.mktemp("run")
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "SentenceEmbedding",
            "init_args": {
                "model": TINY,
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 5e-3}},
                "without": ["bridge"],
            },
        },
        "data": {
            "class_path": "PairsDataModule",
            "init_args": {
                "vocab_size": 400,
                "max_length": 24,
                "batch_size": 8,
                "max_train_pairs": 200,
                "max_valid": 20,
                "cache_dir": str(folder / "cache"),
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 40,
            "max_epochs": -1,
            "val_check_interval": 20,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder)}},
            "callbacks": [
                {
                    "class_path": "ModelCheckpoint",
                    "init_args": {"dirpath": str(folder / "kept"), "save_last": True},
                }
            ],
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:  # to read all of the library takes seconds
        patch.setattr(embedded_pairs, "library_files", lambda: list(library_files())[::4])
        assert main(["fit", f"--config={folder / 'config.yaml'}"]) == 0
    return folder


@pytest.fixture(scope="module")
def checkpoint(run):
    return str(run / "kept" / "last.ckpt")


def encode(*args):
    return main(["encode", *map(str, args)])


def test_one_command_learns_from_the_embedded_pairs(run):
    (log,) = run.rglob("metrics.csv")
    header, *rows = (line.split(",") for line in log.read_text().splitlines())
    column = header.index("train/loss")
    losses = [float(row[column]) for row in rows if row[column]]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert {"valid/recall@10", "valid/loss", "train/temperature"} <= set(header)


def test_a_run_can_be_validated_from_its_checkpoint(run, checkpoint, capsys):
    args = [f"--config={run / 'config.yaml'}", f"--ckpt_path={checkpoint}"]
    assert main(["validate", *args]) == 0
    assert "valid/recall@10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.model=M999"], "`model` must be one of the sizes M456"),
        (["--model.model=owner/none"], "`model` must be a folder or a name that the Hugging Face"),
        (["--model.model=tiny", "--model.without=[ancor]"], ""),
    ],
    ids=str,
)
def test_a_model_that_can_not_be_had_is_answered_in_one_sentence(
    monkeypatch, capsys, args, message
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    try:
        status = main(["fit", "--model=SentenceEmbedding", "--data=PairsDataModule", *args])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".jsonl"])
def test_each_kind_of_file_holds_the_vectors_of_the_task(checkpoint, tmp_path, capsys, suffix):
    output = tmp_path / "new" / f"vectors{suffix}"
    assert encode("--checkpoint", checkpoint, "--output", output, "--texts", *TEXTS) == 0
    assert "3 vectors of 64 numbers (head semantic)" in capsys.readouterr().err
    if suffix == ".npy":
        vectors = np.load(output)
    elif suffix == ".safetensors":
        vectors = load_file(output)["vectors"]
    else:
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert [line["text"] for line in lines] == TEXTS
        vectors = np.array([line["vector"] for line in lines])
    task = SentenceEmbedding.load_from_checkpoint(checkpoint)
    assert abs(vectors - task.encode(TEXTS)).max() < 1e-5
    assert abs(vectors[0] - task.encode(TEXTS[0])).max() < 1e-5
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_head_and_dimension_can_be_chosen(checkpoint, tmp_path):
    options = ["--checkpoint", checkpoint, "--texts", *TEXTS, "--output"]
    assert encode(*options, tmp_path / "a.npy", "--dim", 32) == 0
    assert encode(*options, tmp_path / "b.npy", "--head", "anchor") == 0
    short, anchor = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    encoder = load_sentence_encoder(checkpoint)
    assert abs(short - encoder.encode(TEXTS, dim=32)).max() < 1e-5
    assert abs(np.linalg.norm(short, axis=1) - 1).max() < 1e-5
    assert anchor.shape == (3, 16)


def test_texts_come_from_files_and_standard_input(checkpoint, tmp_path, monkeypatch):
    odd = "one text\u2028of two lines"
    (tmp_path / "in.txt").write_text("\n".join([TEXTS[0], "", TEXTS[1]]) + "\n")
    records = [TEXTS[0], {"text": TEXTS[1], "id": 7}, {"text": odd}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, ""]), "utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS[:2])))
    expected = load_sentence_encoder(checkpoint).encode([*TEXTS[:2], odd])
    for number, source in enumerate((tmp_path / "in.txt", tmp_path / "in.jsonl", "-")):
        output = tmp_path / f"{number}.npy"
        assert encode("--checkpoint", checkpoint, "--input", source, "--output", output) == 0
        found = np.load(output)
        assert len(found) == (3 if number == 1 else 2)
        assert abs(found - expected[: len(found)]).max() < 1e-5


@pytest.mark.parametrize("format", ["sentence-transformers", "huggingface", "safetensors"])
def test_a_checkpoint_is_exported_in_each_format(checkpoint, tmp_path, capsys, format):
    output = tmp_path / "model"
    args = ["--checkpoint", checkpoint, "--output", str(output), "--format", format]
    assert main(["export", *args]) == 0
    assert f"head semantic, format {format}" in capsys.readouterr().out
    if format == "sentence-transformers":
        expected = load_sentence_encoder(checkpoint).encode(TEXTS)
        loaded = SentenceTransformer(str(output), device="cpu").encode(TEXTS)
        assert abs(loaded - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--texts", "a", "--output=v.txt"], "`--output` must end in one of .npy, .safetensors, "),
        (["--output=v.npy"], "Exactly one of `--input` and `--texts` must be given"),
        (["--texts", "a", "--input=-", "--output=v.npy"], "Exactly one of `--input` and `--texts`"),
        (["--input=empty.txt", "--output=v.npy"], "`--input` must hold at least one text, but emp"),
        (
            ["--input=bad.jsonl", "--output=v.npy"],
            "Each line of a .jsonl file must be a string",
        ),
        (["--input=none.txt", "--output=v.npy"], "No such file or directory: none.txt"),
        (["--texts", "a", " ", "--output=v.npy"], "`sentences` must not be empty or blank, got 1"),
        (["--texts", "a", "--output=v.npy", "--head=x"], "`head` must be one of ['anchor', "),
        (["--texts", "a", "--output=v.npy", "--dim=65"], "`dim` must be in [1, 64] for head 'sem"),
    ],
    ids=str,
)
def test_a_mistake_is_answered_in_one_sentence(checkpoint, tmp_path, capsys, args, message):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{"txt": "b"}\n')
    assert encode("--checkpoint", checkpoint, *args) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("v.*"))
    assert "bad.jsonl" not in args[0] or "line 3 of bad.jsonl is not" in error


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, capsys):
    options = ["--texts", "a", "--output", "v.npy", "--checkpoint"]
    assert encode(*options, "none.ckpt") == 2
    assert "`checkpoint_path` must be an existing file" in capsys.readouterr().err
    (tmp_path / "text.ckpt").write_text("text")
    assert encode(*options, "text.ckpt") == 2
    assert "A checkpoint must be complete, but text.ckpt" in capsys.readouterr().err
