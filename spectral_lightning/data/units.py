"""Reading a plain text file as words, integers or characters, in one pass.

Which of them belong to a vocabulary, and under which id, is decided in `vocabulary`.
"""

import gzip
import lzma
import re
import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
import numpy.typing as npt

from spectral_lightning.data.readers import open_text

Unit = Literal["word", "int", "char"]
"""What one token is: a run of characters without white space, a number, or a character."""

MAX_INT = (1 << 20) - 1
"""Largest id in a file of integers, set by hand: four times the vocabularies in use in 2025."""

_DETECT_FIELDS = 50  # as versions 14 and 15 of adaptive-low-rank-training
_CHUNK_CHARS = 1 << 20
_INTEGER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class TypeStream:
    """A text as a sequence of types, that is, of different tokens."""

    types: tuple[str, ...]
    """The types in the order in which they first appear."""
    indices: npt.NDArray[np.uint32]
    """For every token of the text the place of its type in `types`."""

    def __len__(self) -> int:
        return len(self.indices)

    def split(self, num_tokens: int) -> tuple["TypeStream", "TypeStream"]:
        """Cut behind the first `num_tokens` tokens; the first part knows only its own types."""
        first, rest = self.indices[:num_tokens], self.indices[num_tokens:]
        num_types = int(first.max()) + 1 if len(first) else 0
        return (
            TypeStream(types=self.types[:num_types], indices=first),
            TypeStream(types=self.types, indices=rest),
        )


def detect_unit(path: Path, argument: str) -> Unit:
    """Find out what the tokens of a file are.

    A text that is one single word is read by character; one whose first 50 words are all integers
    is a file of integers; every other one is a file of words. An integer may be negative here, so
    that `read_types` can refuse it instead of taking it for a word.

    Args:
        path: An existing file of plain text, also packed with xz or gzip.
        argument: Name of the user's argument, for error messages.

    Raises:
        ValueError: If the file is damaged or not UTF-8.
    """
    with _opened(path, argument) as file:
        fields = list(islice(chain.from_iterable(_words(file)), _DETECT_FIELDS))
    if len(fields) == 1:
        return "char"
    return "int" if all(map(_INTEGER.fullmatch, fields)) else "word"


def read_types(path: Path, unit: Unit, argument: str) -> TypeStream:
    """Read all tokens of a file, which takes 4 bytes of memory each.

    Args:
        path: An existing file of plain text, also packed with xz or gzip.
        unit: What one token is. Integers lose their leading zeros.
        argument: Name of the user's argument, for error messages.

    Raises:
        ValueError: If the file is empty, damaged or not UTF-8, or should hold integers and holds
            something else.
    """
    # A new type gets the number of types before it.
    numbers: defaultdict[str, int] = defaultdict()
    numbers.default_factory = numbers.__len__
    indices = array("I")
    with _opened(path, argument) as file:
        pieces: Iterable[Iterable[str]] = _chunks(file) if unit == "char" else _words(file)
        for piece in pieces:
            indices.extend(map(numbers.__getitem__, piece))
    if not indices:
        raise ValueError(f"`{argument}` must hold text, but {path} is empty.")
    stream = TypeStream(types=tuple(numbers), indices=np.frombuffer(indices, dtype=np.uint32))
    return _integers(stream, path, argument) if unit == "int" else stream


@contextmanager
def _opened(path: Path, argument: str) -> Iterator[TextIO]:
    try:
        with open_text(path) as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`{argument}` must be UTF-8 text, but {path} is not ({error.reason}). Convert it"
            " first."
        ) from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"`{argument}` must be a whole file, but {path} is damaged: {error}."
        ) from error


def _chunks(file: TextIO) -> Iterator[str]:
    # Not by line: a text may be one line of a gigabyte, as text8 nearly is.
    while chunk := file.read(_CHUNK_CHARS):
        yield chunk


def _words(file: TextIO) -> Iterator[list[str]]:
    """Yield the words of one chunk after the other; no word is cut."""
    rest = ""
    for chunk in _chunks(file):
        words = (rest + chunk).split()
        rest = "" if chunk[-1].isspace() else words.pop()
        yield words
    if rest:
        yield [rest]


def _integers(stream: TypeStream, path: Path, argument: str) -> TypeStream:
    """Check that all types are ids, and join those that differ in leading zeros only."""
    numbers: dict[str, int] = {}
    table = np.empty(len(stream.types), dtype=np.uint32)
    for index, text in enumerate(stream.types):
        number = text.lstrip("0") or "0"
        rule = None
        if not _INTEGER.fullmatch(text) or text.startswith("-"):
            rule = "non-negative integers"
        elif len(number) > len(str(MAX_INT)) or int(number) > MAX_INT:
            rule = f"integers of at most {MAX_INT}"
        if rule is not None:
            field = int(np.argmax(stream.indices == index)) + 1
            raise ValueError(
                f"`{argument}` must hold {rule}, but field {field} of {path} is {text[:40]!r}."
                " Give `unit='word'` to read words."
            )
        table[index] = numbers.setdefault(number, len(numbers))
    return TypeStream(types=tuple(numbers), indices=table[stream.indices])
