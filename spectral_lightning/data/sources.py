"""Where text comes from: local files, Hugging Face datasets, or the embedded corpus.

`open_sources` turns the `source` argument of a data module into objects that yield documents.
Reading one file lives in `readers`, turning documents into tokens in `preparation`.
"""

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from spectral_lightning.data.corpus import EmbeddedSource
from spectral_lightning.data.readers import SUFFIXES, file_format, read_documents, require_text

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

_HASH_CHUNK_BYTES = 1 << 20
# Files that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave behind.
_SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")


class Source(Protocol):
    """A text as a sequence of documents that can be read more than once."""

    @property
    def description(self) -> str:
        """What this is, in a few words, for logs and error messages."""

    def fingerprint(self) -> str:
        """Return a digest that changes whenever `documents` would."""

    def documents(self) -> Iterator[str]:
        """Yield documents that are not blank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSource:
    """Local text, JSON Lines and Parquet files, in the given order."""

    paths: tuple[Path, ...]
    """Files to read; the suffix decides the format."""
    text_column: str
    """Field of a JSON Lines record and column of a Parquet file that holds the text."""

    @property
    def description(self) -> str:
        """The first path, and how many follow."""
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"

    def fingerprint(self) -> str:
        """Return a digest of the formats and bytes of all files, whatever their names."""
        digest = hashlib.blake2b(self.text_column.encode(), digest_size=16)
        for path in self.paths:
            digest.update(f"|{file_format(path)}{path.suffix} {path.stat().st_size}|".encode())
            with path.open("rb") as file:
                while chunk := file.read(_HASH_CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """Yield the documents of every file; `read_documents` says what it may raise."""
        for path in self.paths:
            yield from read_documents(path, self.text_column)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSource:
    """One split of a Hugging Face dataset, one document per row."""

    dataset: "Dataset"
    """The split."""
    description: str
    """Name of the dataset and of the split."""
    text_column: str
    """Column that holds the text."""

    def fingerprint(self) -> str:
        """Return a digest of all texts."""
        digest = hashlib.blake2b(digest_size=16)
        for text in self.documents():
            digest.update(f"{len(text)}:{text}".encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """Yield the rows that are not blank.

        Raises:
            ValueError: If a row of the text column holds no text.
        """
        for index, value in enumerate(self.dataset[self.text_column]):
            text = require_text(value, f"row {index} of {self.description}", self.text_column)
            if text.strip():
                yield text


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Text for training and, where the user or the dataset names them, for evaluation."""

    train: Source
    """Text to train on."""
    valid: Source | None = None
    """Text for validation; None holds out a part of `train`."""
    test: Source | None = None
    """Text for testing; None tests on the validation text."""


def open_sources(
    source: str | list[str] | None,
    *,
    text_column: str = "text",
    config_name: str | None = None,
    argument: str = "source",
) -> Sources:
    """Find out what `source` names and open it.

    A list, an existing path, a pattern with ``*``, ``?`` or ``[``, and anything that looks like a
    path (starts with ``.``, ``/`` or ``~``, has a file's suffix, a backslash or more than one
    slash) is local. Everything else, such as ``wikitext`` or ``owner/name``, is the name of a
    Hugging Face dataset. A folder stands for all its text and JSON Lines files, unless it was
    written by `save_to_disk` or holds Parquet files: then it is a Hugging Face dataset.

    Args:
        source: None for the embedded corpus, a local file, folder or pattern, a list of these, or
            a dataset's name.
        text_column: Field or column that holds the text.
        config_name: Configuration of a Hugging Face dataset, e.g. ``"wikitext-2-raw-v1"``.
        argument: Name of the user's argument, for error messages.

    Returns:
        The training text, with the ``validation`` and ``test`` splits of a Hugging Face dataset.

    Raises:
        FileNotFoundError: If a path does not exist or holds no file of a known format.
        ValueError: If a dataset cannot be loaded or has no text column.
    """
    if source is None:
        return Sources(train=EmbeddedSource())
    if isinstance(source, str):
        folder = Path(source).expanduser()
        is_local = folder.exists() or looks_local(source)
        if not is_local or (folder.is_dir() and is_dataset(folder)):
            name = str(folder) if is_local else source
            return _split_sources(name, load_splits(name, config_name, argument), text_column)
    names = [source] if isinstance(source, str) else source
    if not names:
        raise ValueError(f"`{argument}` must name at least one file, got an empty list.")
    paths = tuple(path for name in names for path in _expand(name, argument))
    return Sources(train=FileSource(paths=paths, text_column=text_column))


def looks_local(name: str) -> bool:
    """Tell whether a name that does not exist was meant as a path, not as a dataset's name."""
    return (
        name.startswith((".", "/", "~"))
        or name.lower().endswith((*SUFFIXES, ".xz", ".gz", ".zst", ".zip", ".csv", ".json", ".md"))
        or "\\" in name
        or glob.has_magic(name)
        or name.count("/") > 1
    )


def is_dataset(folder: Path) -> bool:
    """Tell whether a folder was written by `save_to_disk` or holds Parquet files."""
    return _is_saved(folder) or next(folder.rglob("*.parquet"), None) is not None


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SAVED_DATASET_FILES)


def _expand(name: str, argument: str) -> list[Path]:
    """Return the files that a path, folder or pattern stands for, sorted."""
    path = Path(name).expanduser()
    if path.exists():
        matches = [path]
    elif not glob.has_magic(name):
        raise FileNotFoundError(f"`{argument}` must be an existing path, got {name}.")
    else:
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files: list[Path] = []
    for match in matches:
        found = sorted(match.rglob("*")) if match.is_dir() else [match]
        files += [file for file in found if file.is_file() and file_format(file)]
    if not files:
        raise FileNotFoundError(
            f"`{argument}` must name files that end in {', '.join(SUFFIXES)}, got {name}, where"
            " there is none."
        )
    return files


def load_splits(name: str, config_name: str | None, argument: str) -> "dict[str, Dataset]":
    """Load a dataset from the Hub, or from a folder of which `is_dataset` holds.

    Args:
        name: Name of the dataset, or its folder.
        config_name: Configuration, or None for the only one.
        argument: Name of the user's argument, for error messages.

    Returns:
        The splits by name; ``train`` is one of them.

    Raises:
        ValueError: If it cannot be loaded or has no split ``train``.
    """
    # Slow to import, and most users have plain text.
    from datasets.exceptions import DatasetsError
    from datasets.load import load_dataset, load_from_disk

    try:
        saved = _is_saved(Path(name))
        loaded = load_from_disk(name) if saved else load_dataset(name, config_name)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"`{argument}` must be an existing path or the name of a Hugging Face dataset that can"
            f" be loaded, got {name} ({str(error).splitlines()[0]}). Without a network, give the"
            " folder where the dataset's `save_to_disk` has left it."
        ) from error
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if "train" not in splits:
        raise ValueError(
            f"`{argument}` must be a dataset with a split 'train', got {name} with {list(splits)}."
        )
    return splits


def _split_sources(name: str, splits: "dict[str, Dataset]", text_column: str) -> Sources:
    sources: dict[str, Source] = {}
    for split in ("train", "validation", "test"):
        if split not in splits:
            continue
        columns = splits[split].column_names
        if text_column not in columns:
            raise ValueError(
                f"`text_column` must be a column of {name}, one of {columns}, got {text_column}."
            )
        sources[split] = DatasetSource(
            dataset=splits[split], description=f"{name} [{split}]", text_column=text_column
        )
    return Sources(
        train=sources["train"], valid=sources.get("validation"), test=sources.get("test")
    )
