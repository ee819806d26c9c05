import pytest
import torch

from spectral_lightning.testing.differences import first_difference


@pytest.mark.parametrize(
    ("got", "expected", "path"),
    [
        ({"a": 1}, {"b": 1}, ""),
        ([1, 2], [1], ""),
        ({"a": [torch.zeros(2)]}, {"a": [torch.tensor([0.0, -1.0])]}, "['a'][0]"),
        ([torch.zeros(2)], [torch.zeros(2, dtype=torch.float64)], "[0]"),
        ((1.0, float("nan")), (1.0, 2.0), "[1]"),
        ((1.0, 2.0), (1.0, float("nan")), "[1]"),
        ("abc", "abd", ""),
    ],
)
def test_differences_are_found_and_placed(got, expected, path):
    assert first_difference(got, expected).startswith(f"{path}: got ")


def test_equal_containers_have_no_difference():
    def nested():
        return {"a": [1, float("nan"), torch.ones(2)], "b": ("text", None)}

    assert first_difference(nested(), nested()) is None
