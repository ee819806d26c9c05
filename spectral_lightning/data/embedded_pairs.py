"""Pairs of texts that are at hand without a network: names and docstrings of CPython's library."""

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from spectral_lightning.data.corpus import (
    Documented,
    EmbeddedSource,
    docstrings,
    library_files,
)
from spectral_lightning.data.pairs_columns import PairRow

# A complete installation has 10,000; below this the sources are stripped or zipped away.
_MIN_PAIRS = 1_000
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


class EmbeddedPairs:
    """Two kinds of pairs from the docstrings of the standard library, in the order of its files.

    The signature of a function, class or module with the first paragraph of its docstring, and
    the first sentence of a docstring with all that follows it. About 10,000 pairs, the same on
    every machine with the same Python. Where the library has no sources, paragraphs of a small
    text that is part of this package take their place, with a warning.
    """

    description = EmbeddedSource.description
    weight: float | None = None

    def fingerprint(self) -> str:
        """Return a digest of the Python version and of every file that is read."""
        return EmbeddedSource().fingerprint()

    def rows(self) -> Iterator[PairRow]:
        """Yield the pairs.

        Warns:
            UserWarning: If CPython's documentation is missing and the small text is used.
        """
        pairs = [
            pair
            for path in library_files()
            for node, text in docstrings(path)
            for pair in _pairs(node, path, text)
        ]
        if len(pairs) < _MIN_PAIRS:
            warnings.warn(
                "This Python carries no documentation of its own (a stripped installation), so"
                " the embedded pairs are a small sample. Give `sources` for real training.",
                stacklevel=2,
            )
            pairs = [
                halves
                for text in EmbeddedSource().documents()
                if (halves := _summary_and_rest(text)) is not None
            ]
        # Overloads and forwarding methods repeat each other's docstrings.
        yield from (PairRow(pair) for pair in dict.fromkeys(pairs))


def _pairs(node: Documented, path: Path, text: str) -> Iterator[tuple[str, str]]:
    yield _signature(node, path), _PARAGRAPH_END.split(text.strip(), maxsplit=1)[0]
    if (halves := _summary_and_rest(text)) is not None:
        yield halves


def _signature(node: Documented, path: Path) -> str:
    """Return such as ``json.decoder: def scan(text, start=0)``, the module's name in front."""
    parts = path.with_suffix("").parts
    module = ".".join(part for part in parts[-2:] if part != "__init__" and "python" not in part)
    if isinstance(node, ast.Module):
        return f"module {module}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"{module}: class {node.name}({bases})" if bases else f"{module}: class {node.name}"
    return f"{module}: def {node.name}({ast.unparse(node.args)})"


def _summary_and_rest(text: str) -> tuple[str, str] | None:
    """Return a text's first sentence, at most its first paragraph, and what follows."""
    text = text.strip()
    ends = [match for end in (_PARAGRAPH_END, _SENTENCE_END) if (match := end.search(text))]
    if not ends:
        return None
    first = min(ends, key=lambda match: match.start())
    return text[: first.start()], text[first.end() :].strip()
