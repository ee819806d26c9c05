"""Cutting plain text into documents, and deciding which of them are held out.

Pure functions on strings. Which files exist and how they are opened is the matter of `sources`.
"""

import hashlib
from collections.abc import Iterable, Iterator

# Two valid splits of a book should not differ by whole chapters, yet a piece should outlast the
# longest sequence: 8,000 characters are about 2,000 tokens. Chosen here.
_PIECE_CHARS = 8_000


def split_documents(lines: Iterable[str]) -> Iterator[str]:
    r"""Cut a text into documents, reading it line by line.

    A form feed and two or more blank lines end a document. A document of more than 8,000
    characters ends at the next single blank line, and one of more than 32,000 at the next line
    end, so that a book without chapters still has parts to hold out. Blank lines and form feeds
    between documents belong to none of them; nothing else is left out.

    Args:
        lines: Lines with their line ends, as an open file yields them.

    Yields:
        Documents that are not blank.

    Example:
        >>> list(split_documents(["one\n", "\n", "still one\n", "\n", "\n", "two\n"]))
        ['one\n\nstill one', 'two']
    """
    pending: list[str] = []
    size = blank = 0
    for line in lines:
        # `str.splitlines` would also cut at characters that are ordinary text in a file.
        for index, part in enumerate(line.split("\f")):
            is_blank = not part.strip()
            blank = blank + 1 if is_blank else 0
            too_long = size > _PIECE_CHARS and (is_blank or size > 4 * _PIECE_CHARS)
            if index > 0 or blank >= 2 or too_long:
                yield from _joined(pending)
                pending, size = [], 0
            pending.append(part)
            size += len(part)
    yield from _joined(pending)


def _joined(parts: list[str]) -> Iterator[str]:
    """Yield one document without the blank lines around it, or nothing if all are blank."""
    kept = [index for index, part in enumerate(parts) if part.strip()]
    if kept:
        yield "".join(parts[kept[0] : kept[-1] + 1]).rstrip("\n")


def content_digest(document: str) -> bytes:
    """Return a digest of a document's words, equal for copies that differ in white space only."""
    words = " ".join(document.split())
    return hashlib.blake2b(words.encode(), digest_size=16).digest()


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Tell whether a document belongs to the validation set.

    Depends on the content alone, so copies of one document always land on the same side, and a
    document keeps its side when others are added.

    Args:
        digest: Result of `content_digest`.
        fraction: Expected share of held-out documents, in ``[0, 1]``.
    """
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
