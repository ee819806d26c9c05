"""Reading documents out of one local file: plain text, JSON Lines or Parquet.

Plain text and JSON Lines may be packed with xz or gzip. Finding the files is the matter of
`sources`.
"""

import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

from spectral_lightning.data.documents import split_documents

SUFFIXES = (".txt", ".txt.xz", ".txt.gz", ".jsonl", ".jsonl.xz", ".jsonl.gz", ".parquet")
"""Endings of the files that can be read."""


def file_format(path: Path) -> str | None:
    """Return ``"txt"``, ``"jsonl"`` or ``"parquet"``, or None for a file of another kind."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix.split(".")[1]
    return None


def open_text(path: Path) -> TextIO:
    """Open a text file for reading, unpacking what ends in ``.xz`` or ``.gz``."""
    # "utf-8-sig" drops the byte order mark that some editors put in front.
    if path.suffix.lower() == ".xz":
        return lzma.open(path, "rt", encoding="utf-8-sig")
    if path.suffix.lower() == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig"))
    return path.open(encoding="utf-8-sig")


def read_documents(path: Path, text_column: str) -> Iterator[str]:
    """Yield the documents of one file; blank ones are left out.

    A record of JSON Lines and a row of Parquet is one document; plain text is cut by
    `split_documents`. The file is read piece by piece, never as a whole.

    Args:
        path: An existing file that ends in one of `SUFFIXES`.
        text_column: Field or column that holds the text; unused for plain text.

    Raises:
        ValueError: If the file is damaged, is not UTF-8, or lacks the text column.
    """
    try:
        if file_format(path) == "parquet":
            yield from _read_parquet(path, text_column)
            return
        with open_text(path) as file:
            if file_format(path) == "jsonl":
                yield from _read_json_lines(file, path, text_column)
            else:
                yield from split_documents(file)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A text file must be UTF-8, but {path} is not ({error.reason}). Convert it first."
        ) from error
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"The text file {path} is damaged: {error}.") from error


def require_text(text: object, place: str, text_column: str) -> str:
    """Return `text` if it is a string that UTF-8 can hold.

    Args:
        text: What stands in the text column.
        place: Where it stands, for the error message.
        text_column: Name of the column, for the error message.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(text, str):
        raise ValueError(
            f"`text_column` must name a column of strings, but '{text_column}' holds"
            f" {type(text).__name__} in {place}."
        )
    # JSON can spell half a surrogate pair, which no tokenizer accepts.
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"Text must be valid Unicode, but {place} holds half a surrogate pair.")
    return text


def _read_json_lines(file: TextIO, path: Path, text_column: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        place = f"line {number} of {path}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"A .jsonl file must hold one JSON object per line, but {place} does not: {error}."
            ) from error
        if not isinstance(record, dict) or text_column not in record:
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"`text_column` must be a field of every record, but {place} has no"
                f" '{text_column}', only {found}."
            )
        if (text := require_text(record[text_column], place, text_column)).strip():
            yield text


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    # Slow to import, and most users have plain text.
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"The text file {path} is damaged: {error}.") from error
    with file:
        if text_column not in file.schema_arrow.names:
            raise ValueError(
                f"`text_column` must be a column of {path}, one of {file.schema_arrow.names},"
                f" got '{text_column}'."
            )
        row = 0
        for batch in file.iter_batches(columns=[text_column]):
            for value in batch.column(0).to_pylist():
                text = require_text(value, f"row {row} of {path}", text_column)
                row += 1
                if text.strip():
                    yield text
