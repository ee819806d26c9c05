"""Vocabularies of whole words, integers or characters: building, reading and counting bytes.

A vocabulary is a `Tokenizer` of the `tokenizers` library, so that one JSON text holds all of it
and a trained model can be prompted with text. Reading the file is the matter of `units`.
"""

import json
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from spectral_lightning.data.units import Unit

UNKNOWN = "<unk>"
"""Type that stands for all words outside the vocabulary, as in WikiText and Penn Treebank."""


def build_vocabulary(types: Iterable[str], unit: Unit) -> Tokenizer:
    """Number the types of a text in their sorted order.

    Args:
        types: The types, in any order; repetitions have no effect. Words and characters are
            sorted by code point. Of integers the largest counts, and each is its own id.
        unit: What a type is.

    Returns:
        A tokenizer that cuts text as `read_types` cuts files. What it does not know becomes
        `UNKNOWN`, or is refused if `UNKNOWN` is not among the types.

    Example:
        >>> tokenizer = build_vocabulary(["the", "<unk>", "cat"], "word")
        >>> tokenizer.encode("the  dog").ids
        [2, 0]
        >>> tokenizer.decode([2, 1])
        'the cat'
    """
    if unit == "int":
        names = [str(number) for number in range(max(map(int, types)) + 1)]
    else:
        names = sorted(set(types))
    return _tokenizer({name: index for index, name in enumerate(names)}, unit)


def _tokenizer(vocab: dict[str, int], unit: Unit) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    if unit == "char":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    else:
        # The four separators U+001C to U+001F are white space to `str.split` but not to Unicode.
        white_space = Regex(r"[\s\x1c-\x1f]+")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(white_space, "removed")
    return tokenizer


def parse_vocabulary(content: str, unit: Unit, name: str) -> Tokenizer:
    """Read a vocabulary from the JSON text of the `tokenizers` library.

    Args:
        content: The JSON text, as `build_vocabulary` makes it.
        unit: What a type should be.
        name: Where it came from, for error messages.

    Raises:
        ValueError: If the text is no vocabulary, or one of another unit.
    """
    try:
        vocab = json.loads(content)["model"]["vocab"]
        ids = sorted(vocab.values())
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`tokenizer` must be a vocabulary in JSON, as `Tokenizer.save` writes it, but {name}"
            " is not."
        ) from error
    if ids == list(range(len(ids))):
        tokenizer = _tokenizer(vocab, unit)
        is_known = unit != "int" or all(key == str(index) for key, index in vocab.items())
        if is_known and json.loads(tokenizer.to_str()) == json.loads(content):
            return tokenizer
    raise ValueError(f"`tokenizer` must be a vocabulary of unit '{unit}', but {name} is not.")


def ids_of_types(tokenizer: Tokenizer, types: Sequence[str], name: str) -> npt.NDArray[np.uint32]:
    """Return the token id of every type.

    Args:
        tokenizer: The vocabulary.
        types: The types.
        name: Where they came from, for error messages.

    Raises:
        ValueError: If the vocabulary lacks a type and has no `UNKNOWN` to stand for it.
    """
    vocab = tokenizer.get_vocab()
    unknown = vocab.get(UNKNOWN)
    ids = [vocab.get(text, unknown) for text in types]
    if None in ids:
        missing = types[ids.index(None)]
        raise ValueError(
            f"`tokenizer` must know every token of {name} or have {UNKNOWN}, but it lacks"
            f" {missing[:40]!r}."
        )
    return np.array(ids, dtype=np.uint32)


def type_bytes(tokenizer: Tokenizer, unit: Unit) -> Tensor | None:
    r"""Count the bytes of UTF-8 text that each token id stands for.

    A word counts with the one space that parts it from the next, so words stand for the text
    with every run of white space written as one space. `UNKNOWN` stands for words that nobody
    predicts and counts 0, so that its surprise counts neither above nor below the line.

    Args:
        tokenizer: The vocabulary.
        unit: What a type is.

    Returns:
        Bytes per id, shape ``(vocab_size,)``, int64, on the CPU; None for integers, whose text
        is not known.

    Example:
        >>> type_bytes(build_vocabulary(["cat", "na\u00efve", "<unk>"], "word"), "word")
        tensor([0, 4, 7])
    """
    if unit == "int":
        return None
    separator = 1 if unit == "word" else 0
    counts = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
    for text, index in tokenizer.get_vocab().items():
        counts[index] = 0 if text == UNKNOWN else len(text.encode()) + separator
    return counts
