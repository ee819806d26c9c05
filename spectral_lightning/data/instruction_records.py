"""Reading records, dicts of columns, out of files and Hugging Face datasets.

What the columns mean is the matter of `instruction_formats`.
"""

import csv
import gzip
import hashlib
import json
import lzma
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from spectral_lightning.data.instruction_formats import Format, parse_record, write_dialogue
from spectral_lightning.data.readers import open_text
from spectral_lightning.data.sources import Sources, is_dataset, load_splits, looks_local

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

_PACKINGS = ("", ".xz", ".gz")
SUFFIXES = (
    ".parquet",
    *(f".{kind}{end}" for kind in ("json", "jsonl", "csv") for end in _PACKINGS),
)
"""Endings of the files that can be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordSource:
    """A file or one split of a dataset, one dialogue per record, as a `Source` of documents."""

    records: "Path | Dataset"
    """A file that ends in one of `SUFFIXES`, or a split."""
    description: str
    """What this is, for logs and error messages."""
    format: Format
    """What the columns mean."""

    def fingerprint(self) -> str:
        """Return a digest of all dialogues."""
        digest = hashlib.blake2b(digest_size=16)
        for document in self.documents():
            digest.update(f"{len(document)}:{document}".encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """Yield every dialogue as `write_dialogue` writes it.

        Raises:
            ValueError: If the file is damaged or a record does not have the format.
        """
        rows = _read_file(self.records) if isinstance(self.records, Path) else iter(self.records)
        for number, record in enumerate(rows, start=1):
            place = f"record {number} of {self.description}"
            yield write_dialogue(parse_record(record, self.format, place))


def open_records(
    source: str,
    format: Format,
    *,
    config_name: str | None = None,
    argument: str = "source",
) -> Sources:
    """Find out what `source` names and open it.

    Args:
        source: A file that ends in one of `SUFFIXES`, a folder written by `save_to_disk` or that
            holds Parquet files, or the name of a dataset on the Hub.
        format: What the columns mean.
        config_name: Configuration of a dataset.
        argument: Name of the user's argument, for error messages.

    Returns:
        The training records, with the ``validation`` and ``test`` splits of a dataset.

    Raises:
        FileNotFoundError: If a path does not exist or is of another kind.
        ValueError: If a dataset cannot be loaded.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.name.lower().endswith(SUFFIXES):
        return Sources(train=RecordSource(records=path, description=str(path), format=format))
    if path.is_dir() and is_dataset(path):
        source = str(path)
    elif path.exists() or looks_local(source):
        raise FileNotFoundError(
            f"`{argument}` must be an existing file that ends in {', '.join(SUFFIXES)}, a folder"
            f" written by a dataset's `save_to_disk`, or a dataset's name, got {source}."
        )
    splits = load_splits(source, config_name, argument)
    opened = {
        name: RecordSource(records=splits[name], description=f"{source} [{name}]", format=format)
        for name in ("train", "validation", "test")
        if name in splits
    }
    return Sources(train=opened["train"], valid=opened.get("validation"), test=opened.get("test"))


def _read_file(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if path.name.lower().endswith(".parquet"):
            yield from _read_parquet(path)
            return
        with open_text(path) as file:
            if ".csv" in "".join(path.suffixes[-2:]).lower():
                csv.field_size_limit(sys.maxsize)  # answers outgrow the default of 128 KiB
                yield from csv.DictReader(file)
            else:
                yield from _read_json(file, path)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A file of records must be UTF-8, but {path} is not ({error.reason}). Convert it"
            " first."
        ) from error
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        raise ValueError(f"The file {path} is damaged: {error}.") from error


def _read_json(file: TextIO, path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of one array, or those of one line each, whatever the file is called."""
    first = next((line for line in file if line.strip()), "")
    file.seek(0)
    place = str(path)
    try:
        if first.lstrip().startswith("["):
            yield from json.load(file)
            return
        for number, line in enumerate(file, start=1):
            place = f"line {number} of {path}"
            if line.strip():
                yield json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            "A JSON file must hold one array of objects or one object per line, but"
            f" {place} does not: {error}."
        ) from error


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    # Slow to import, and most users have JSON.
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"The file {path} is damaged: {error}.") from error
    with file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()
