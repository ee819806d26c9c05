"""Which document is for training and which for evaluation, without leaks."""

import warnings
from collections.abc import Iterator
from typing import Literal

from spectral_lightning.data.documents import content_digest, is_held_out
from spectral_lightning.data.sources import Source, Sources

Split = Literal["train", "valid", "test"]


class DocumentSplits:
    """Route every document of a text to one split.

    Where no validation text is given, documents are held out by a digest of their content, so
    copies of one document land on the same side. Where evaluation texts are given, documents of
    the training text that also stand there are left out of training. Sixteen bytes are kept per
    evaluation document, and no text.

    Args:
        sources: The text.
        valid_fraction: Expected share of held-out documents, in ``(0, 1)``.

    Raises:
        ValueError: If a source is empty, or nothing is left to train on or to validate on.
    """

    def __init__(self, sources: Sources, valid_fraction: float) -> None:
        self.sources = sources
        self.valid_fraction = valid_fraction
        self._reserved: set[bytes] = set()
        for name, source in (("valid_source", sources.valid), ("test_source", sources.test)):
            if source is not None:
                self._reserved |= _digests(source, name)
        self._check()

    def __iter__(self) -> Iterator[tuple[Split, str]]:
        """Yield every document with its split, in the order of the sources."""
        for document in self.sources.train.documents():
            split = self._split(document)
            if split is not None:
                yield split, document
        if self.sources.valid is not None:
            for document in self.sources.valid.documents():
                yield "valid", document
        if self.sources.test is not None:
            for document in self.sources.test.documents():
                yield "test", document

    def train_documents(self) -> Iterator[str]:
        """Yield the documents to train on."""
        for document in self.sources.train.documents():
            if self._split(document) == "train":
                yield document

    def _split(self, document: str) -> Split | None:
        digest = content_digest(document)
        if digest in self._reserved:
            return None
        if self.sources.valid is None and is_held_out(digest, self.valid_fraction):
            return "valid"
        return "train"

    def _check(self) -> None:
        counts: dict[Split | None, int] = {None: 0, "train": 0, "valid": 0}
        for document in self.sources.train.documents():
            counts[self._split(document)] += 1
        total, name = sum(counts.values()), self.sources.train.description
        if total == 0:
            raise ValueError(f"`source` must hold text, but {name} is empty.")
        if counts[None] == total:
            raise ValueError(
                f"`source` must hold a document that is not in the evaluation text, but all"
                f" {total} documents of {name} are."
            )
        rules: dict[Split, str] = {"train": "leave one to train on", "valid": "hold one out"}
        for split, rule in rules.items():
            if self.sources.valid is None and counts[split] == 0:
                raise ValueError(
                    f"`valid_fraction` must {rule} of the {total} documents of {name}, got"
                    f" {self.valid_fraction}, which takes {counts['valid']}. Change it or give"
                    " `valid_source`."
                )
        if counts[None] > 0:
            warnings.warn(
                f"{counts[None]} of {total} documents of {name} also stand in the evaluation text"
                " and are left out of training.",
                stacklevel=2,
            )


def _digests(source: Source, name: str) -> set[bytes]:
    digests = {content_digest(document) for document in source.documents()}
    if not digests:
        raise ValueError(f"`{name}` must hold text, but {source.description} is empty.")
    return digests
