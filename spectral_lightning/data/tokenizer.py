"""Byte-level BPE: training it, and counting the bytes each token stands for.

Where trained tokenizers are kept is decided in `preparation`.
"""

import json
from collections.abc import Iterator

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor

BOS = "<|bos|>"
"""Token that opens every document."""

MIN_VOCAB_SIZE = 257
"""The 256 single bytes and one special token."""

# The split of GPT-4 (OpenAI, tiktoken `cl100k_base`, https://github.com/openai/tiktoken) with
# digits in groups of at most two instead of three, which suits small vocabularies (nanochat).
_SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def train_tokenizer(documents: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE vocabulary in which any text can be written without loss.

    Ids 0 to 255 are the single bytes, then come the merges by frequency, then `BOS` last.
    Deterministic; training counts the words once, so its cost hardly grows with the text.

    Args:
        documents: Text to learn from; use training documents only.
        vocab_size: Number of token ids, including the bytes and `BOS`; at least 257.

    Returns:
        The tokenizer; `encode` puts `BOS` in front, and nowhere else even if the text spells it.

    Raises:
        ValueError: If `vocab_size` is below 257 or above what the text supports.

    References:
        Sennrich, Haddow and Birch (2016), "Neural machine translation of rare words with subword
        units", section 3.2. https://arxiv.org/abs/1508.07909

    Example:
        >>> tokenizer = train_tokenizer(iter(["aab aab"]), vocab_size=259)
        >>> tokenizer.encode("aab").tokens, tokenizer.encode("aab").ids
        (['<|bos|>', 'aab'], [258, 257])
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens([AddedToken(BOS, special=True, normalized=False)])
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"`vocab_size` must be at most {tokenizer.get_vocab_size()} for this text, whose words"
            f" hold no more pairs to merge, got {vocab_size}. Lower it or give more text."
        )
    return _with_bos(tokenizer)


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary that cannot hold every byte and `BOS`.

    Raises:
        ValueError: If `vocab_size` is below 257.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"`vocab_size` must be >= {MIN_VOCAB_SIZE} (256 bytes and {BOS}), got {vocab_size}."
        )


def parse_tokenizer(content: str, name: str) -> Tokenizer:
    """Read a tokenizer from the JSON text of the `tokenizers` library.

    Args:
        content: The JSON text.
        name: Where it came from, for error messages.

    Returns:
        The tokenizer; `encode` puts `BOS` in front, and nowhere else even if the text spells it.

    Raises:
        ValueError: If the text is no tokenizer, its tokens are not byte-level, or it has no `BOS`.
    """
    # The library raises a bare `Exception` for anything it cannot read, so the parts are looked
    # at before it sees them.
    try:
        fields = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"`tokenizer` must be a JSON file, but {name} is not: {error}.") from error
    if not isinstance(fields, dict) or not {"model", "decoder"} <= fields.keys():
        raise ValueError(
            f"`tokenizer` must be a file of the `tokenizers` library (its `Tokenizer.save`), but"
            f" {name} has no `model` and `decoder`."
        )
    if (fields["decoder"] or {}).get("type") != "ByteLevel":
        raise ValueError(
            f"`tokenizer` must be byte-level, or bits per byte cannot be exact, but the decoder of"
            f" {name} is {fields['decoder']}."
        )
    tokenizer = Tokenizer.from_str(content)
    if tokenizer.token_to_id(BOS) is None:
        raise ValueError(f"`tokenizer` must know the token {BOS}, but {name} does not.")
    return _with_bos(tokenizer)


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """Let every text open with `BOS`, as the documents of the training stream do."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    tokenizer.encode_special_tokens = True  # this one is not part of the JSON
    return tokenizer


def count_token_bytes(tokenizer: Tokenizer) -> Tensor:
    """Count the bytes of raw UTF-8 text that each token id stands for.

    A byte-level token is spelled with one printable character per byte, so its length is exact
    also for tokens that are no valid UTF-8 on their own.

    Args:
        tokenizer: A byte-level tokenizer.

    Returns:
        Bytes per id, shape ``(vocab_size,)``, int64, on the CPU; 0 for special tokens.

    Example:
        >>> tokenizer = train_tokenizer(iter(["aab aab"]), vocab_size=259)
        >>> count_token_bytes(tokenizer)[[65, 257, 258]].tolist()
        [1, 3, 0]
    """
    counts = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        counts[index] = len(token)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        counts[index] = 0 if added.special else len(added.content.encode())
    return counts
