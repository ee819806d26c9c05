"""From one plain text file to streams of word, integer or character ids in the cache.

A folder's name is a digest of the text and of everything else that decides the ids; it holds the
vocabulary as JSON beside the streams.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from spectral_lightning.data.cache import fill_folder
from spectral_lightning.data.shards import ShardInfo, ShardWriter, TokenShard
from spectral_lightning.data.sources import FileSource
from spectral_lightning.data.units import TypeStream, Unit, read_types
from spectral_lightning.data.vocabulary import (
    UNKNOWN,
    build_vocabulary,
    ids_of_types,
    parse_vocabulary,
    type_bytes,
)

_LAYOUT = 1  # of the cache folder; a new number leaves old folders alone
_INDEX, _VOCABULARY = "index.json", "vocabulary.json"
_WRITE_TOKENS = 1 << 20  # per call of the writer, which wants a list


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFileSettings:
    """What decides the ids."""

    source: Path
    """Text to train on, an existing file."""
    unit: Unit
    """What one token is."""
    vocabulary: Literal["train", "all"]
    """Whether words of the validation text alone have ids of their own."""
    valid_source: Path | None
    """Text for validation, an existing file, or None to hold out the end of `source`."""
    valid_fraction: float
    """Share of `source` that is held out where no validation text is given."""
    tokenizer: str | None
    """JSON of a ready vocabulary, or None to build one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFile:
    """The ids of a text in the cache."""

    folder: Path
    """Where they are kept."""
    tokenizer: Tokenizer
    """The vocabulary."""
    unit: Unit
    """What one token is."""
    shards: Mapping[str, TokenShard]
    """Streams of ids by name: ``train`` and ``valid``."""
    num_unknown: Mapping[str, int]
    """How many tokens of each stream are `UNKNOWN`."""


def prepare_token_file(settings: TokenFileSettings, cache_dir: Path) -> TokenFile:
    """Number the tokens of a text, or find them in the cache.

    Args:
        settings: The text and what else decides the ids.
        cache_dir: Folder for the results; created if missing.

    Raises:
        ValueError: If a file cannot be read as `settings` say, holds fewer than two different
            tokens, or does not fit the vocabulary; or if the cache cannot be written.

    Warns:
        UserWarning: If the cache was damaged.
    """
    folder = cache_dir / _key(settings)
    fill_folder(folder, lambda building: _build(settings, building), _damage)
    return load_token_file(folder)


def load_token_file(folder: Path) -> TokenFile:
    """Open what `prepare_token_file` left in a folder."""
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    content = (folder / _VOCABULARY).read_text(encoding="utf-8")
    return TokenFile(
        folder=folder,
        tokenizer=parse_vocabulary(content, index["unit"], _VOCABULARY),
        unit=index["unit"],
        shards={
            name: TokenShard(folder / f"{name}.bin", ShardInfo(**info))
            for name, info in index["shards"].items()
        },
        num_unknown=index["num_unknown"],
    )


def _key(settings: TokenFileSettings) -> str:
    def fingerprint(path: Path | None) -> str | None:
        if path is None:
            return None
        return FileSource(paths=(path,), text_column="").fingerprint()

    parts = asdict(settings) | {
        name: fingerprint(getattr(settings, name)) for name in ("source", "valid_source")
    }
    content = json.dumps([_LAYOUT, parts], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a cache folder, or None."""
    try:
        expected = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["checksum"]
        if zlib.crc32((folder / _VOCABULARY).read_bytes()) != expected:
            return f"{folder / _VOCABULARY} does not match its checksum"
        shards = load_token_file(folder).shards
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder} cannot be read ({error})"
    reasons = (shard.damage(deep=True) for shard in shards.values())
    return next((reason for reason in reasons if reason is not None), None)


def _build(settings: TokenFileSettings, folder: Path) -> None:
    train, valid = _read(settings)
    unit, content = settings.unit, settings.tokenizer
    if content is not None:
        tokenizer = parse_vocabulary(content, unit, "the given one")
    elif unit == "int" or settings.vocabulary == "all":
        tokenizer = build_vocabulary([*train.types, *valid.types], unit)
    else:
        tokenizer = build_vocabulary([*train.types, UNKNOWN], unit)
    unknown = tokenizer.token_to_id(UNKNOWN)
    shards, num_unknown = {}, {}
    for name, stream in (("train", train), ("valid", valid)):
        ids = ids_of_types(tokenizer, stream.types, str(settings.source))[stream.indices]
        shards[name] = asdict(_write(folder / f"{name}.bin", ids, tokenizer, unit))
        num_unknown[name] = 0 if unknown is None else int((ids == unknown).sum())
    content = tokenizer.to_str()
    (folder / _VOCABULARY).write_bytes(content.encode())
    index = {
        "source": str(settings.source),
        "unit": unit,
        "checksum": zlib.crc32(content.encode()),
        "shards": shards,
        "num_unknown": num_unknown,
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _read(settings: TokenFileSettings) -> tuple[TypeStream, TypeStream]:
    """Read the training and the validation text."""
    whole = read_types(settings.source, settings.unit, "source")
    if len(whole.types) < 2:
        raise ValueError(
            f"`source` must hold at least two different tokens, but {settings.source} holds only"
            f" {whole.types[0][:40]!r}."
        )
    if settings.valid_source is not None:
        return whole, read_types(settings.valid_source, settings.unit, "valid_source")
    # Rounded as in version 10, so that WikiText-2 is cut where the original cut it.
    return whole.split(int(len(whole) * (1 - settings.valid_fraction)))


def _write(path: Path, ids: npt.NDArray[np.uint32], tokenizer: Tokenizer, unit: Unit) -> ShardInfo:
    num_bytes = type_bytes(tokenizer, unit)
    if num_bytes is None:
        num_bytes = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
    with ShardWriter(path, num_bytes) as writer:
        for start in range(0, len(ids), _WRITE_TOKENS):
            writer.append(ids[start : start + _WRITE_TOKENS].tolist())
        return replace(writer.info(), num_documents=1)
