"""Where two nested results differ."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def first_difference(got: Any, expected: Any, path: str = "") -> str | None:
    """Say where two nested containers first differ; tensors and floats bitwise, NaN equals NaN.

    Args:
        got: Nested mappings, sequences, tensors and plain values.
        expected: The same.
        path: What to call the outermost level.

    Returns:
        Path and both values of the first difference; None if there is none.

    Example:
        >>> first_difference({"a": [1.0, math.nan]}, {"a": [1.0, math.nan]})
        >>> first_difference({"a": [1.0, 2.0]}, {"a": [1.0, 3.0]})
        "['a'][1]: got 2.0, expected 3.0"
    """
    if isinstance(expected, Mapping) and isinstance(got, Mapping) and got.keys() == expected.keys():
        pairs = [(f"{path}[{key!r}]", got[key], expected[key]) for key in expected]
    elif _is_sequence(expected) and _is_sequence(got) and len(got) == len(expected):
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(got, expected, strict=True))]
    elif isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor):
        same = got.dtype == expected.dtype and torch.equal(got, expected)
        return None if same else f"{path}: got {got}, expected {expected}"
    elif isinstance(expected, float) and isinstance(got, float) and math.isnan(expected):
        return None if math.isnan(got) else f"{path}: got {got!r}, expected {expected!r}"
    else:
        return None if got == expected else f"{path}: got {got!r}, expected {expected!r}"
    differences = (first_difference(one, other, name) for name, one, other in pairs)
    return next((difference for difference in differences if difference is not None), None)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
