"""A sentence encoder as MTEB 2 wants it; mteb is imported only for its model description."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spectral_lightning.tasks.sentence_encoder import SentenceEncoder, Vectors, evaluating


class MTEBEncoder:
    """What ``mteb.evaluate(model, tasks)`` takes: the EncoderProtocol of mteb 2 or later.

    Args:
        encoder: Encoder to evaluate, with its head and dimension.
        name: Name in the results, as ``organization/model``.
        revision: Revision in the results.
        description: More fields of ``mteb.ModelMeta``, e.g. ``license`` or ``training_datasets``.

    Raises:
        ValueError: If `name` is not of the form ``organization/model``.

    References:
        Muennighoff et al. (2022), "MTEB: Massive Text Embedding Benchmark".
        https://arxiv.org/abs/2210.07316
    """

    def __init__(
        self, encoder: SentenceEncoder, name: str, revision: str = "local", **description: Any
    ) -> None:
        if name.count("/") != 1 or not all(name.split("/")):
            raise ValueError(f"`name` must be 'organization/model', got {name!r}.")
        self.encoder = encoder
        self.name = name
        self.revision = revision
        self.description = description

    @property
    def mteb_model_meta(self) -> Any:
        """Description of the model, a ``ModelMeta`` of mteb.

        Raises:
            ImportError: If mteb is not installed.
        """
        try:
            from mteb.models.model_meta import ModelMeta  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError(
                "The MTEB description of a model needs mteb >= 2; `pip install mteb`."
            ) from error
        unknown = dict.fromkeys(
            (
                *("loader", "release_date", "languages", "memory_usage_mb", "license"),
                *("open_weights", "public_training_code", "public_training_data"),
                "training_datasets",
            )
        )
        known = {
            "name": self.name,
            "revision": self.revision,
            "n_parameters": sum(weight.numel() for weight in self.encoder.model.parameters()),
            "max_tokens": self.encoder.max_length,
            "embed_dim": self.encoder.dim,
            "framework": ["PyTorch"],
            "similarity_fn_name": self.encoder.similarity_fn_name,
            "use_instructions": False,
        }
        return ModelMeta(**(unknown | known | self.description))

    def encode(
        self,
        inputs: Iterable[Mapping[str, list[str]]],
        *,
        task_metadata: Any = None,
        hf_split: str | None = None,
        hf_subset: str | None = None,
        prompt_type: Any = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> np.ndarray:
        """Encode the texts of a loader.

        Blank texts, which `SentenceEncoder.encode` refuses, are the tokenizer's special tokens
        alone; without special tokens, a single space; where that has no token either, zeros.

        Args:
            inputs: Batches with a list of texts under ``"text"``.
            task_metadata: Not used; queries and documents of all tasks are encoded alike.
            hf_split: Not used.
            hf_subset: Not used.
            prompt_type: Not used, since the model has no prompts.
            batch_size: Texts in a forward pass.
            show_progress_bar: Whether to show a progress bar.
            options: Other options of mteb, which have no effect here.

        Returns:
            Vectors in float32, shape ``(n, dim)``.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        written = [row for row, text in enumerate(texts) if text.strip()]
        vectors = self.encoder.encode(
            [texts[row] for row in written],
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        )
        assert isinstance(vectors, np.ndarray)
        if len(written) == len(texts):
            return vectors
        found = np.tile(self._blank_vector(), (len(texts), 1))
        found[written] = vectors
        return found

    def similarity(self, embeddings1: Vectors, embeddings2: Vectors) -> Tensor:
        """Return all cosines, shape ``(n, m)``."""
        return self.encoder.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Vectors, embeddings2: Vectors) -> Tensor:
        """Return the cosine of each pair of rows, shape ``(n,)``."""
        return self.encoder.similarity_pairwise(embeddings1, embeddings2)

    def _blank_vector(self) -> np.ndarray:
        encoder = self.encoder
        text = next((text for text in ("", " ") if encoder.tokenizer(text)["input_ids"]), None)
        if text is None:
            return np.zeros(encoder.dim, dtype=np.float32)
        with evaluating(encoder.model), torch.no_grad():
            vector = encoder._encode([text], encoder.head, encoder.dim, 1, False)
        return F.normalize(vector, dim=-1)[0].cpu().numpy()
