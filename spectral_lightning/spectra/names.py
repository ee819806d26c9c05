"""Names of layers in messages."""

from collections.abc import Collection


def some_names(names: Collection[str], *, none: str) -> str:
    """Name the first few, and say how many more there are.

    Args:
        names: All names.
        none: What to say where there is no name.

    Returns:
        At most five names, for the middle of a sentence.

    Example:
        >>> some_names(list("abcdefg"), none="nothing")
        'a, b, c, d, e and 2 more'
    """
    shown = ", ".join(list(names)[:5]) or none
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
