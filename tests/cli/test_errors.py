"""Which errors count as a user's mistake."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from spectral_lightning.cli.errors import report, user_sentence
from spectral_lightning.models import GPT


def raised(function) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the kind is what the tests are about
        function()
    return caught.value


def test_a_missing_file_names_itself(tmp_path):
    error = raised((tmp_path / "text.txt").read_text)
    assert user_sentence(error) == f"No such file or directory: {tmp_path / 'text.txt'}."


def test_a_checkpoint_of_another_shape_names_the_first_tensor_that_differs():
    state = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)).state_dict()
    error = raised(lambda: nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4)).load_state_dict(state))
    sentence = user_sentence(error)
    assert sentence.startswith("The checkpoint does not fit the model: size mismatch for 0.weight")
    assert "1.weight" not in sentence


def test_a_value_refused_by_this_library_is_a_mistake():
    assert user_sentence(raised(lambda: GPT(depth=0))).startswith("`depth` must be")


def test_a_value_error_from_elsewhere_keeps_its_traceback(capsys):
    error = raised(lambda: torch.zeros(2).view(3).reshape("x"))
    assert report(error) is None
    assert user_sentence(raised(lambda: int("x"))) is None
    assert capsys.readouterr().err == ""


def test_misconfiguration_from_elsewhere_keeps_its_traceback():
    def misconfigure() -> None:
        raise MisconfigurationException("nothing to do with us")

    assert user_sentence(raised(misconfigure)) is None


def test_a_mistake_is_reported_in_one_line_with_exit_status_2(capsys, monkeypatch):
    monkeypatch.delenv("SPECTRAL_DEBUG", raising=False)
    assert report(raised(lambda: GPT(depth=0))) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: `depth` must be")
    assert said.endswith("(--traceback shows where.)\n")
    assert said.count("\n") == 1
