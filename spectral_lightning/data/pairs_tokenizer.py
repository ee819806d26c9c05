"""The tokenizer of a data module of pairs: loading one, or training one on the training texts."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Special tokens of a trained tokenizer, with the ids 0 to 4, named as in BERT."""

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
"""The single bytes and the special tokens."""


def train_pair_tokenizer(
    texts: Iterator[str], *, vocab_size: int, max_length: int
) -> "PreTrainedTokenizerBase":
    """Train a byte-level BPE tokenizer that puts a text between ``[CLS]`` and ``[SEP]``.

    Text is cleaned, stripped of accents and lower-cased as for BERT (uncased), and any white space
    becomes one space. Deterministic, which training WordPiece is not: ``tokenizers`` numbers its
    pieces in the order of a hash map.

    Args:
        texts: What to learn from; use training texts only.
        vocab_size: Largest number of token ids; a small text gives fewer.
        max_length: Largest number of tokens of a text, the special ones included.
    """
    # Slow to import, and data with a ready tokenizer do not need it.
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.BertNormalizer(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    # The space in front, which makes a word the same token wherever it stands, goes again.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B {SEP}", special_tokens=ids
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token=PAD,
        unk_token=UNK,
        cls_token=CLS,
        sep_token=SEP,
        mask_token=MASK,
    )


def load_pair_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer from a folder or the Hub.

    Raises:
        ValueError: If it cannot be loaded.
    """
    # Slow to import, and a ready tokenizer does not need it.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            "`tokenizer` must be a folder or a name that `AutoTokenizer.from_pretrained` can load,"
            f" got {name} ({str(error).splitlines()[0]}). Without a network, give the folder where"
            " its `save_pretrained` has left it, or None to train one."
        ) from error


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token that fills up texts: that for padding, else the end-of-sequence token.

    Raises:
        ValueError: If the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        f"`tokenizer` must have a padding token, but {tokenizer.name_or_path} has none. Set its"
        " `pad_token`."
    )


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a digest of everything the tokenizer saves."""
    digest = hashlib.blake2b(digest_size=16)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"|{path.name} {path.stat().st_size}|".encode() + path.read_bytes())
    return digest.hexdigest()


def encode(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], max_length: int
) -> tuple[list[list[int]], int]:
    """Encode texts with their special tokens, cut to `max_length` tokens.

    Returns:
        Token ids of each text, and how many texts were cut.
    """
    ids: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    long = [index for index, tokens in enumerate(ids) if len(tokens) > max_length]
    for index in long:
        ids[index] = tokenizer(texts[index], truncation=True, max_length=max_length)["input_ids"]
    return ids, len(long)
