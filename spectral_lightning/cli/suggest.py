"""Nearest known names for what was typed; standard library only."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant.

    Compares without regard to case, by the ratio of matching characters that `difflib` defines.

    Args:
        name: What was typed.
        known: The names that exist.

    Returns:
        ``"; did you mean `x`?"``, or ``"."`` when nothing is similar. Ends a sentence either way.

    Example:
        >>> did_you_mean("fti", ["fit", "test"])
        '; did you mean `fit`?'
        >>> did_you_mean("export", ["fit", "test"])
        '.'
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"; did you mean `{by_lower[matches[0]]}`?" if matches else "."
