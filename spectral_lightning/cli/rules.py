"""Rules that a scan is judged by; standard library only."""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spectral_lightning.cli.suggest import did_you_mean

FULL_MEASURES = ("condition_number", "relative_condition_number", "effective_rank")
"""Numbers that need all singular values."""
MEASURES = (
    "distance",
    "relative_stable_rank",
    "stable_rank",
    "spectral_norm",
    "frobenius_norm",
    *FULL_MEASURES,
)
"""Numbers of a scanned layer."""
COLUMNS = (*MEASURES, "name", "shape", "dtype", "status")
"""Columns that layers can be sorted by."""
FAILURE, UNHEALTHY = WORDS = ("failure", "unhealthy")
"""Rules without a number: a layer must be finite and not zero; it must also be of rank above one
and inside the healthy range."""

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A comparison that no layer may fulfil."""

    text: str
    """The rule as it was typed."""
    measure: str
    """Name of the number, or one of `WORDS`."""
    sign: str = ">"
    """How the number is compared; without meaning for a word."""
    bound: float = math.nan
    """What the number is compared with; NaN for a word."""

    def is_broken(self, value: float | None) -> bool:
        """Whether a layer breaks the rule, which is none of `WORDS`.

        Args:
            value: The layer's number. One that could not be computed (NaN or None) breaks every
                rule: nothing says that the layer is well.
        """
        if value is None or math.isnan(value):
            return True
        return _OPERATORS[self.sign](value, self.bound)


def parse_rule(text: str) -> Rule:
    """Read a rule such as ``"relative_stable_rank<0.01"`` or ``"unhealthy"``.

    Args:
        text: The rule as it was typed.

    Raises:
        ValueError: If it is no rule, or names no known measure.

    Example:
        >>> parse_rule("condition_number > 1e6").bound
        1000000.0
    """
    word = text.strip()
    if word in WORDS:
        return Rule(text=text, measure=word)
    if re.fullmatch(r"\w+", word):
        known = did_you_mean(word, WORDS)
        if known != ".":
            raise ValueError(f"`fail-on` names the rule `{word}`, which is not known{known}")
    match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*([^\s<>=]+)\s*", text)
    bound = _number(match.group(3)) if match else math.nan
    if match is None or math.isnan(bound):
        raise ValueError(
            "`fail-on` must be `failure`, `unhealthy` or a measure, one of < <= > >= and a number,"
            f" such as `relative_stable_rank<0.01`, got {text!r}."
        )
    measure, sign, _ = match.groups()
    if measure not in MEASURES:
        known = did_you_mean(measure, MEASURES)
        if known == ".":
            known = f"; the measures are {', '.join(MEASURES)}."
        raise ValueError(f"`fail-on` names the measure `{measure}`, which is not known{known}")
    return Rule(text=text, measure=measure, sign=sign, bound=bound)


def require_column(column: str) -> None:
    """Refuse a column that layers do not have.

    Raises:
        ValueError: If there is no such column.
    """
    if column not in COLUMNS:
        known = did_you_mean(column, COLUMNS)
        if known == ".":
            known = f"; the columns are {', '.join(COLUMNS)}."
        raise ValueError(f"`sort` names the column `{column}`, which is not known{known}")


def needs_full(rules: Sequence[Rule], column: str) -> bool:
    """Whether a rule or the order asks for a number that needs all singular values."""
    return any(name in FULL_MEASURES for name in (column, *(rule.measure for rule in rules)))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
