"""`spectral scan` as a user meets it: table, JSON, exit status and sentences about mistakes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectral_lightning.cli.entry import main
from spectral_lightning.cli.rules import COLUMNS
from spectral_lightning.spectra import scan_model


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(tmp_path):
    """A file with three healthy layers, one of them larger, and what is skipped."""
    file = tmp_path / "model.safetensors"
    tensors = {
        "blocks.0.attn.weight": gaussian(12, 12),
        "blocks.0.mlp.weight": gaussian(20, 12, seed=1),
        "blocks.1.attn.weight": 3 * gaussian(12, 12, seed=2).half(),
        "embed.weight": gaussian(30, 12),
        "norm.weight": torch.ones(12),
    }
    save_file(tensors, file)
    return file


@pytest.fixture
def broken_model(tmp_path):
    """A file with one layer of each kind that is not healthy, and a healthy one."""
    file = tmp_path / "broken.safetensors"
    tensors = {
        "good": gaussian(8, 8),
        "bad_nan": torch.full((8, 8), math.nan),
        "bad_zero": torch.zeros(8, 8),
        "bad_one": torch.ones(8, 8),
        "bad_orthogonal": torch.eye(8),
    }
    save_file(tensors, file)
    return file


@pytest.fixture
def scan(capsys):
    """Run the command in this process: exit status, standard output and standard error."""

    def run(*args):
        try:
            status = main(["scan", *map(str, args)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def document(scan):
    """The JSON document of a scan that succeeds."""

    def run(*args):
        status, out, err = scan(*args, "--json")
        assert (status, err) == (0, "")
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    return run


def names(found):
    return [row["name"] for row in found["rows"]]


def test_the_table_shows_every_layer_and_says_what_was_skipped(scan, model):
    status, out, err = scan(model)
    assert (status, err) == (0, "")
    for name in ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn"):
        assert out.count(name) == 1
    said = " ".join(out.split())
    assert "3 of 3 matrices (528 parameters); relative stable rank in [0.01, 2]: 3 inside." in said
    assert "1 tensor has fewer than two dimensions." in said
    assert "embedding table by its name (measured with `embeddings`): embed." in said


@pytest.mark.parametrize("width", ["80", "60", "200"])
@pytest.mark.parametrize("full", [[], ["--full"]])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(
    scan, tmp_path, monkeypatch, width, full
):
    monkeypatch.setenv("COLUMNS", width)
    name = "base_model.model.encoder.layers.11.self_attention.query_key_value.lora_A.default"
    save_file({f"{name}.weight": gaussian(16, 256)}, tmp_path / "model.safetensors")
    status, out, _ = scan(tmp_path / "model.safetensors", *full)
    assert status == 0
    assert max(map(len, out.splitlines())) <= int(width)
    assert " 16x256 " in out
    if width == "80":
        assert "inside" in out
        assert "…" not in out


def test_the_readings_are_those_of_the_library(document, model):
    found = document(model)
    layers = {layer.reading.name: layer for layer in scan_model(model).layers}
    assert set(names(found)) == layers.keys()
    for row in found["rows"]:
        layer = layers[row["name"]]
        assert row["spectral_norm"] == layer.reading.spectral_norm
        assert row["stable_rank"] == layer.reading.stable_rank
        assert row["status"] == "healthy"
        assert row["condition_number"] is None
        assert tuple(row["stored_shape"]) == layer.stored_shape
    assert found["summary"]["matrices"] == found["summary"]["healthy"] == 3
    assert found["settings"]["path"] == str(model)


def test_json_is_strict_and_whole_where_numbers_are_not_finite(scan, broken_model):
    status, out, _ = scan(broken_model, "--json", "--full", "--rows", "1", "--fail-on", "failure")
    assert status == 1
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == 5
    assert rows["bad_nan"]["spectral_norm"] == "nan"
    assert rows["bad_one"]["condition_number"] == "inf"
    assert rows["bad_nan"]["failure"] == "the weight has a NaN or infinite entry"
    assert found["broken"] == {"failure": ["bad_nan", "bad_zero"]}


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_sorts_both_ways(document, model, column):
    order = names(document(model, "--sort", column))
    assert sorted(order) == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn"]
    turned = document(model, "--sort", column, "--ascending")
    if column not in ("shape", "dtype", "status"):  # in which layers are equal
        assert names(turned) == order[::-1]
    if isinstance(turned["rows"][0].get(column), float):
        values = [row[column] for row in turned["rows"]]
        assert values == sorted(values)


@pytest.mark.parametrize(
    ("column", "first"),
    [("name", "blocks.0.attn"), ("shape", "blocks.0.mlp"), ("dtype", "blocks.1.attn")],
)
def test_words_sort_by_the_alphabet_and_shapes_by_size(document, model, column, first):
    assert names(document(model, "--sort", column))[0] == first


def test_the_worst_come_first_and_are_named_in_the_table(scan, broken_model):
    status, out, err = scan(broken_model)
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if " 8x8 " in line]
    assert [line[0] for line in lines] == [
        *("bad_nan", "bad_zero", "bad_one", "bad_orthogonal", "good")
    ]
    assert [" ".join(line[7:]) for line in lines] == [
        *("not finite", "zero", "rank one", "above", "inside")
    ]


def test_rows_bounds_the_table(scan, model):
    _, out, _ = scan(model, "--rows", "1")
    assert out.count("blocks.") == 1


def test_layers_and_embeddings_choose_what_is_measured(document, model):
    assert names(document(model, "--layers", "*.mlp")) == ["blocks.0.mlp"]
    both = names(document(model, "--layers", "*.mlp", "--layers", "embed", "--embeddings"))
    assert set(both) == {"blocks.0.mlp", "embed"}


def test_the_range_can_be_moved(document, model):
    rows = document(model, "--floor", "5", "--ceiling", "10")["rows"]
    assert {row["status"] for row in rows} == {"below"}
    for row in rows:
        assert row["distance"] == pytest.approx(math.log(5 / row["relative_stable_rank"]))


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ("spectral_norm>1000", []),
        ("spectral_norm > 10", ["blocks.1.attn"]),
        ("condition_number>1e9", []),
        ("condition_number>=1", ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn"]),
        ("distance>0", []),
        ("unhealthy", []),
    ],
)
def test_a_rule_decides_the_exit_status(scan, model, rule, found):
    status, out, err = scan(model, "--json", "--fail-on", rule)
    assert status == (1 if found else 0)
    broken = json.loads(out)["broken"]
    assert sorted(broken.get(rule, [])) == found
    assert err.startswith(f"error: {len(found)} of 3 layers break") if found else err == ""
    for name in found:
        assert name in err


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ("failure", {"bad_nan", "bad_zero"}),
        ("unhealthy", {"bad_nan", "bad_zero", "bad_one", "bad_orthogonal"}),
        ("stable_rank<0", {"bad_nan", "bad_zero"}),  # which have none
        ("relative_stable_rank>2", {"bad_nan", "bad_zero", "bad_orthogonal"}),
    ],
)
def test_a_layer_without_the_number_breaks_the_rule_too(scan, broken_model, rule, found):
    status, out, err = scan(broken_model, "--json", "--fail-on", rule)
    assert status == 1
    assert set(json.loads(out)["broken"][rule]) == found
    assert all(name in err for name in found)


def test_a_broken_rule_names_layer_and_number_after_the_table(scan, broken_model):
    status, out, err = scan(broken_model, "--fail-on", "unhealthy", "--fail-on", "spectral_norm>7")
    assert status == 1
    assert "Weight matrices by distance" in out
    first, second = err.splitlines()
    assert first.startswith("error: 4 of 5 layers break `unhealthy`: bad_nan (not finite), bad_zer")
    assert second == "error: 2 of 5 layers break `spectral_norm>7`: bad_nan (nan), bad_one (8)."


def test_a_long_list_of_broken_layers_is_cut(scan, tmp_path):
    save_file({f"layer{i}": gaussian(4, 4) for i in range(30)}, tmp_path / "m.safetensors")
    _, _, err = scan(tmp_path / "m.safetensors", "--fail-on", "spectral_norm>0")
    assert "30 of 30 layers break" in err
    assert err.endswith("and 10 more.\n")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--sort", "stabel_rank"], "not known; did you mean `stable_rank`?"),
        (["--rows", "0"], "`rows` must be >= 1, got 0."),
        (["--fail-on", "spectral_nrm>3"], "not known; did you mean `spectral_norm`?"),
        (["--fail-on", "failures"], "not known; did you mean `failure`?"),
        (["--fail-on", "zzz<1"], "the measures are distance, relative_stable_rank,"),
        (["--fail-on", "stable_rank"], "`fail-on` must be `failure`, `unhealthy` or a measure,"),
        (["--fail-on", "stable_rank<nan"], "`fail-on` must be `failure`, `unhealthy` or a meas"),
        (["--floor", "3"], "with 0 < floor < ceiling, got 3.0 and 2.0."),
        (["--layers", "*.qury"], "must match at least one weight matrix, got '*.qury'; the model"),
        (["--layers", "embed"], "embed is an embedding table by its name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_the_arguments_is_one_sentence(scan, model, args, sentence):
    status, out, err = scan(model, *args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.ckpt", None, "`path` must be an existing file or folder, got "),
        ("model.safetensors", b"", "A file of weights must not be empty"),
        ("model.safetensors", b"no model at all", "A safetensors file must be complete"),
        ("notes.txt", b"no model at all", "A checkpoint must be complete"),
    ],
)
def test_a_path_that_is_no_model_is_one_sentence(scan, tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    status, out, err = scan(tmp_path / name)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {sentence}")
    assert str(tmp_path / name) in err
    assert err.count("\n") == 1


def test_an_empty_folder_is_one_sentence(scan, tmp_path):
    (tmp_path / "folder").mkdir()
    status, _, err = scan(tmp_path / "folder")
    assert status == 2
    assert err.startswith("error: `path` must be a file of weights or a folder with model.safet")


def test_the_console_command_writes_plain_text_into_a_pipe(model):
    command = Path(sys.executable).with_name("spectral")
    env = {**os.environ, "COLUMNS": "80"}
    args = [str(command), "scan", str(model), "--fail-on", "spectral_norm>10"]
    result = subprocess.run(args, capture_output=True, text=True, env=env)
    assert result.returncode == 1
    assert "\x1b" not in result.stdout + result.stderr
    assert result.stderr.count("\n") == 1  # no progress bar
    assert "blocks.1.attn" in result.stdout
