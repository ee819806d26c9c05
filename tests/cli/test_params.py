import json
import socket

import pytest

from spectral_lightning.cli.entry import main

SIZES = {"M456": 466_406_896, "M600": 719_202_800, "M700": 1_036_249_328, "M1B": 2_388_144_384}


@pytest.mark.parametrize(("size", "total"), SIZES.items())
def test_the_count_is_that_of_the_closed_form(capsys, size, total):
    assert main(["params", "--size", size, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["size"] == size
    assert found["total"] == total == sum(found["parts"].values())


def test_a_size_of_ones_own_is_counted(capsys):
    settings = ["hidden_size=1152", "num_hidden_layers=20", "num_attention_heads=18"]
    options = [f"--set={setting}" for setting in settings]
    assert main(["params", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == 493_759_848


def test_a_part_that_is_off_counts_nothing(capsys):
    assert main(["params", "--set", "use_spectral=false", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "spectral branch" not in found["parts"]
    assert found["total"] == SIZES["M456"] - 24 * (4 * 1024 * 192 + 3 * 192 + 1024 + 1)


def test_the_table_ends_with_sum_and_bytes(capsys):
    assert main(["params"]) == 0
    *parts, total, size = capsys.readouterr().out.splitlines()
    assert total.split() == ["total", "466,406,896"]
    assert "float32 weights 1.9 GB" in size
    assert "AdamW, 5.6 GB" in size
    assert sum(int(line.split()[-2].replace(",", "")) for line in parts) == SIZES["M456"]


def test_nothing_is_fetched(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert main(["params"]) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "M999"], "`--size` must be one of M456, M600"),
        (["--set", "hidden_size"], "`--set` must be NAME=VALUE, got 'hidden_size'."),
        (["--set", "hiden_size=8"], "`--set` must name a setting of SpectraConfig, got 'hiden_si"),
        (["--set", "hidden_size=wide"], "`--set` must give `hidden_size` as such as 1024, got 'wi"),
        (["--set", "num_attention_heads=7"], "`hidden_size` must be a multiple of"),
    ],
    ids=str,
)
def test_a_mistake_is_answered_in_one_sentence(capsys, args, message):
    assert main(["params", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
