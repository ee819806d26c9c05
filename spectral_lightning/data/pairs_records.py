"""Reading records, each with the place where it stands, out of one file or dataset of pairs.

What the columns mean is the matter of `pairs_columns`.
"""

import csv
import gzip
import json
import lzma
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from spectral_lightning.data.readers import open_text
from spectral_lightning.data.sources import is_dataset

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

Record = tuple[str, Mapping[str, Any]]
"""Where a record stands, such as ``line 7 of a.tsv``, and its fields."""

_DELIMITERS = {"csv": ",", "tsv": "\t"}
SUFFIXES = (
    ".parquet",
    *(f".{kind}{end}" for kind in ("json", "jsonl", "csv", "tsv") for end in ("", ".xz", ".gz")),
)
"""Endings of the files that can be read."""

# What three cells per line stand for in a file without a header, as STS-B has it.
_SCORED_COLUMNS = ("sentence1", "sentence2", "score")


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file.

    The first line of a ``.csv`` or ``.tsv`` names the columns, unless it has three cells of which
    the last is a number: these are ``sentence1``, ``sentence2`` and ``score``. Quotes have no
    meaning in a ``.tsv``, as in GLUE.

    Args:
        path: An existing file that ends in one of `SUFFIXES`.

    Raises:
        ValueError: If the file is damaged, is not UTF-8, or a record is malformed.
    """
    name = path.name.lower()
    kind = next(suffix for suffix in SUFFIXES if name.endswith(suffix)).split(".")[1]
    try:
        if kind == "parquet":
            yield from _read_parquet(path)
            return
        with open_text(path) as file:
            if kind in _DELIMITERS:
                yield from _read_cells(file, path, _DELIMITERS[kind])
            else:
                yield from _read_json(file, path)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A file of pairs must be UTF-8, but {path} is not ({error.reason}). Convert it first."
        ) from error
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        raise ValueError(f"The file {path} is damaged: {error}.") from error


def _read_cells(file: TextIO, path: Path, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # passages outgrow the default of 128 KiB
    if delimiter == "\t":
        reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(file, delimiter=delimiter)
    columns: tuple[str, ...] = ()
    line = 1
    for cells in reader:
        place, line = f"line {line} of {path}", reader.line_num + 1
        if not cells:
            continue
        if not columns:
            columns = tuple(cells)
            if len(cells) != 3 or not _is_number(cells[2]):
                continue
            columns = _SCORED_COLUMNS
        if len(cells) < len(columns):
            raise ValueError(
                f"Every line must have the fields {', '.join(columns)}, but {place} has no"
                f" '{columns[len(cells)]}'. Add it or remove the line."
            )
        if len(cells) > len(columns):
            raise ValueError(
                f"Every line must have the fields {', '.join(columns)}, but {place} has"
                f" {len(cells)} cells. Take the {'tab' if delimiter == chr(9) else 'comma'} out of"
                " its text or, in a .csv, quote it."
            )
        yield place, dict(zip(columns, cells, strict=True))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_json(file: TextIO, path: Path) -> Iterator[Record]:
    """Yield the objects of one array, or those of one line each, whatever the file is called."""
    first = next((line for line in file if line.strip()), "")
    file.seek(0)
    place = str(path)
    try:
        if first.lstrip().startswith("["):
            for number, record in enumerate(json.load(file), start=1):
                yield _checked(f"record {number} of {path}", record)
            return
        for number, line in enumerate(file, start=1):
            place = f"line {number} of {path}"
            if line.strip():
                yield _checked(place, json.loads(line))
    except json.JSONDecodeError as error:
        raise ValueError(
            "A JSON file must hold one array of objects or one object per line, but"
            f" {place} does not: {error}."
        ) from error


def _checked(place: str, record: object) -> Record:
    if not isinstance(record, dict):
        raise ValueError(
            f"A JSON file of pairs must hold objects, but {place} is {type(record).__name__}."
        )
    return place, record


def _read_parquet(path: Path) -> Iterator[Record]:
    # Slow to import, and most users have text.
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"The file {path} is damaged: {error}.") from error
    with file:
        row = 0
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                yield f"row {row} of {path}", record
                row += 1


def load_split(name: str, config: str | None, split: str) -> "Dataset":
    """Load one split of a dataset from the Hub or from a folder.

    Args:
        name: Name of the dataset, or a folder of which `is_dataset` holds.
        config: Configuration, or None for the only one.
        split: Name of the split; from the Hub also a slice such as ``train[:1000]``.

    Raises:
        ValueError: If it cannot be loaded or has no such split.
    """
    # Slow to import, and most users have files.
    from datasets.exceptions import DatasetsError
    from datasets.load import load_dataset, load_from_disk

    folder = Path(name)
    try:
        if folder.is_dir() and next(folder.rglob("*.parquet"), None) is None:
            loaded = load_from_disk(name)
            return loaded[split] if isinstance(loaded, dict) else loaded
        return load_dataset(name, config, split=split)
    except KeyError as error:
        raise ValueError(
            f"`split` must be a split of {name}, one of {list(loaded)}, got {split!r}."
        ) from error
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"A source must be an existing file or folder, or a dataset on the Hub that can be"
            f" loaded, got {name} [{split}] ({str(error).splitlines()[0]}). Without a network, give"
            " the folder where the dataset's `save_to_disk` has left it."
        ) from error


def resolve_path(name: str) -> Path | None:
    """Return the file that a name stands for, or None if it names a dataset or its folder.

    Raises:
        FileNotFoundError: If it looks like a path but does not exist or is of another kind.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.name.lower().endswith(SUFFIXES):
        return path
    if path.is_dir() and is_dataset(path):
        return None
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if path.exists() or is_path or name.lower().endswith((*SUFFIXES, ".txt", ".zip")):
        raise FileNotFoundError(
            f"A source must be an existing file that ends in {', '.join(SUFFIXES)}, a folder"
            f" written by a dataset's `save_to_disk`, or a dataset's name, got {name}."
        )
    return None
