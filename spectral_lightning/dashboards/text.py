"""Short forms of names."""


def shorten(name: str, length: int) -> str:
    """Return a layer's name in at most `length` characters of printable ASCII.

    Parts of the dotted path are cut to three letters and then to one, from the left; numbers and
    the last part stay whole, because they tell layers apart. What is still too long loses its
    middle.

    Example:
        >>> shorten("model.layers.11.self_attn.q_proj", 28)
        'mod.lay.11.self_attn.q_proj'
        >>> shorten("model.layers.11.self_attn.q_proj", 16)
        'm.l.11.s.q_proj'
        >>> shorten("model.layers.11.self_attn.q_proj", 10)
        'm.l....roj'
    """
    *parts, last = name.encode("ascii", "backslashreplace").decode().split(".")
    for letters in (3, 1):
        for index, part in enumerate(parts):
            if len(".".join([*parts, last])) > length and not part.isdecimal():
                parts[index] = part[:letters]
    short = ".".join([*parts, last])
    if len(short) <= length:
        return short
    kept = max(length - 3, 0)
    return short[: (kept + 1) // 2] + "..."[:length] + short[len(short) - kept // 2 :]
