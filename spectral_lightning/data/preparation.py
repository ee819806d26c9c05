"""From documents to token shards in the cache, once per text and vocabulary.

The cache is content-addressed: a folder's name is a digest of the text and of everything else that
decides the tokens. How a folder comes to be is the matter of `cache`.
"""

import hashlib
import json
import sys
import zlib
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer
from torch import Tensor

from spectral_lightning.data.cache import fill_folder
from spectral_lightning.data.shards import ShardInfo, ShardWriter, TokenShard
from spectral_lightning.data.sources import Source, Sources
from spectral_lightning.data.splits import DocumentSplits
from spectral_lightning.data.tokenizer import (
    count_token_bytes,
    parse_tokenizer,
    train_tokenizer,
)

_LAYOUT = 1  # of the cache folder; a new number leaves old folders alone
_INDEX, _TOKENIZER = "index.json", "tokenizer.json"
_ENCODE_DOCUMENTS = 512  # per call of the tokenizer, which spreads them over its threads


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSettings:
    """What decides the tokens, apart from the text itself."""

    vocab_size: int
    """Number of token ids."""
    valid_fraction: float
    """Expected share of training documents that are held out where no validation text is given."""
    tokenizer: str | None = None
    """JSON of a ready tokenizer, or None to train one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedText:
    """Tokenized text in the cache."""

    folder: Path
    """Where it is kept."""
    tokenizer: Tokenizer
    """The tokenizer that wrote it."""
    token_bytes: Tensor
    """Bytes per token id, shape ``(vocab_size,)``, int64."""
    shards: dict[str, TokenShard]
    """Streams of tokens by name: ``train``, ``valid`` and, where a test text exists, ``test``."""


def prepare_text(sources: Sources, settings: TextSettings, cache_dir: Path) -> PreparedText:
    """Tokenize a text, or find it in the cache.

    A damaged folder in the cache is reported and built again. The text is read three or four times
    and never held in memory as a whole.

    Args:
        sources: The text.
        settings: What else decides the tokens.
        cache_dir: Folder for the results; created if missing.

    Returns:
        The tokenizer and the shards.

    Raises:
        ValueError: If the text is empty, a split would be empty, the vocabulary does not fit the
            text, the tokenizer does not preserve the text, or the cache cannot be written.

    Warns:
        UserWarning: If the cache was damaged, or training documents were left out because they
            stand in the evaluation text as well.
    """
    folder = cache_dir / _key(sources, settings)
    fill_folder(folder, lambda building: _build(sources, settings, building), _damage)
    return load_text(folder)


def load_text(folder: Path) -> PreparedText:
    """Open what `prepare_text` left in a folder."""
    tokenizer = parse_tokenizer((folder / _TOKENIZER).read_text(encoding="utf-8"), _TOKENIZER)
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return PreparedText(
        folder=folder,
        tokenizer=tokenizer,
        token_bytes=count_token_bytes(tokenizer),
        shards={
            name: TokenShard(folder / f"{name}.bin", ShardInfo(**info))
            for name, info in index["shards"].items()
        },
    )


def _key(sources: Sources, settings: TextSettings) -> str:
    parts = [source and source.fingerprint() for source in _all(sources)]
    trainer = tokenizers.__version__ if settings.tokenizer is None else None
    content = json.dumps([_LAYOUT, trainer, parts, asdict(settings)])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _all(sources: Sources) -> tuple[Source | None, ...]:
    return sources.train, sources.valid, sources.test


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a cache folder, or None."""
    try:
        expected = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["tokenizer_checksum"]
        if zlib.crc32((folder / _TOKENIZER).read_bytes()) != expected:
            return f"{folder / _TOKENIZER} does not match its checksum"
        text = load_text(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder} cannot be read ({error})"
    reasons = (shard.damage(deep=True) for shard in text.shards.values())
    return next((reason for reason in reasons if reason is not None), None)


def _build(sources: Sources, settings: TextSettings, folder: Path) -> None:
    splits = DocumentSplits(sources, settings.valid_fraction)
    if settings.tokenizer is None:
        tokenizer = train_tokenizer(splits.train_documents(), settings.vocab_size)
    else:
        tokenizer = parse_tokenizer(settings.tokenizer, "the given one")
    shards = _write_shards(splits, tokenizer, folder)
    content = tokenizer.to_str().encode()
    (folder / _TOKENIZER).write_bytes(content)
    index = {
        "python": sys.version,
        "sources": [source and source.description for source in _all(sources)],
        "tokenizer_checksum": zlib.crc32(content),
        "shards": {name: asdict(info) for name, info in shards.items()},
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _write_shards(
    splits: DocumentSplits, tokenizer: Tokenizer, folder: Path
) -> dict[str, ShardInfo]:
    token_bytes = count_token_bytes(tokenizer)
    writers: dict[str, ShardWriter] = {}
    with ExitStack() as stack:
        documents = iter(splits)
        while chunk := list(islice(documents, _ENCODE_DOCUMENTS)):
            encodings = tokenizer.encode_batch_fast([text for _, text in chunk])
            for (split, text), encoding in zip(chunk, encodings, strict=True):
                if split not in writers:
                    path = folder / f"{split}.bin"
                    writers[split] = stack.enter_context(ShardWriter(path, token_bytes))
                num_bytes = writers[split].append(encoding.ids)
                if num_bytes != len(text.encode()):
                    raise ValueError(
                        f"`tokenizer` must keep every byte of the text, but it turned"
                        f" {len(text.encode())} bytes into {num_bytes}. Has it a normalizer?"
                    )
        return {name: writer.info() for name, writer in writers.items()}
