"""Texts to vectors with one head of an embedding model, as sentence-transformers does it."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

Vectors = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray]


class Evaluation(NamedTuple):
    """What an evaluator of sentence-transformers found.

    Attributes:
        evaluator: The evaluator.
        metrics: Its numbers, by name.
        epoch: Epoch given to it; -1 for none.
        step: Step given to it; -1 for none.
    """

    evaluator: Any
    metrics: Mapping[str, float]
    epoch: int
    step: int


class EvaluationLog:
    """Takes the numbers that sentence-transformers' evaluators leave in the model card."""

    def __init__(self) -> None:
        self.evaluations: list[Evaluation] = []

    def set_evaluation_metrics(
        self, evaluator: Any, metrics: Mapping[str, float], epoch: int = 0, step: int = 0
    ) -> None:
        """Keep the numbers of an evaluator."""
        self.evaluations.append(Evaluation(evaluator, dict(metrics), epoch, step))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside, and every module of it back into its own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class SentenceEncoder:
    """Turns texts into vectors of one head; evaluators of sentence-transformers run on it.

    Texts are encoded in batches of similar length, in eval mode and without gradients, and come
    back in the order given. The model is left in the mode it was in. Texts that are too long are
    cut; the first time, a warning says how many, and `num_truncated` counts on.

    Args:
        model: Takes `input_ids` and `attention_mask` of shape ``(B, S)``, returns an output with
            an attribute of shape ``(B, d)`` for each head, and has `head_dims()`.
        tokenizer: A tokenizer of transformers.
        max_length: Largest number of tokens, special tokens included.
        head: Head to encode with unless told otherwise.
        dim: Length of the prefix of the head to return; None for all of it.
        autocast: Half precision to compute in, e.g. ``torch.bfloat16``; None for the weights' own.

    Raises:
        ValueError: If the model has no such head, or the head no such prefix.
    """

    similarity_fn_name = "cosine"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Any],
        max_length: int,
        head: str = "semantic",
        dim: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.head_dims: dict[str, tuple[int, ...]] = dict(cast(Any, model).head_dims())
        self.head = head
        self.dim = self._check_dim(head, dim)
        self.autocast = autocast
        self.num_truncated = 0
        self.model_card_data = EvaluationLog()

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next((weight.device for weight in self.model.parameters()), torch.device("cpu"))

    def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = False,
        output_value: Literal["sentence_embedding"] = "sentence_embedding",
        precision: Literal["float32"] | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        head: str | None = None,
        dim: int | None = None,
    ) -> np.ndarray | Tensor | list[Tensor]:
        """Encode texts; the arguments are those of ``SentenceTransformer.encode``, and two more.

        Args:
            sentences: Texts, or one text.
            prompt_name: Not supported, since the model has no named prompts.
            prompt: Text put before every text.
            batch_size: Texts in a forward pass.
            show_progress_bar: Whether to show a progress bar.
            output_value: Only ``"sentence_embedding"`` is supported.
            precision: Only ``"float32"``, or None for the same, is supported.
            convert_to_numpy: Whether to return an array.
            convert_to_tensor: Whether to return a tensor on the device of the model; goes before
                `convert_to_numpy`. A list of tensors if neither.
            device: Device that the model is moved to first, and stays on; None for where it is.
            normalize_embeddings: Whether prefixes are normalised again; the full vector of a head
                has unit length anyhow.
            truncate_dim: Another name of `dim`.
            head: Head; None for the encoder's own.
            dim: Length of the prefix; None for the encoder's own with its own head, else for all.

        Returns:
            Vectors in float32, shape ``(n, dim)``; ``(dim,)`` for one text.

        Raises:
            ValueError: If a text is empty, an option is not supported, or a head or a prefix of it
                does not exist.
        """
        _check_options(prompt_name, output_value, precision, batch_size)
        if dim is not None and truncate_dim not in (None, dim):
            raise ValueError(
                f"`dim` and `truncate_dim` must be equal if both are given, got {dim} and"
                f" {truncate_dim}."
            )
        asked = truncate_dim if dim is None else dim
        if asked is None and head in (None, self.head):
            asked = self.dim
        head = self.head if head is None else head
        asked = self._check_dim(head, asked)
        if device is not None:
            self.model.to(device)
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        _check_texts(texts)
        texts = [(prompt or "") + text for text in texts]
        with evaluating(self.model), torch.no_grad():
            vectors = self._encode(texts, head, asked, batch_size, bool(show_progress_bar))
        if normalize_embeddings:
            vectors = F.normalize(vectors, dim=-1)
        result = vectors[0] if isinstance(sentences, str) else vectors
        if convert_to_tensor:
            return result
        if convert_to_numpy:
            return result.cpu().numpy()
        return result if isinstance(sentences, str) else list(result)

    def encode_query(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """Encode queries as any text; see `encode`."""
        return self.encode(sentences, **options)

    def encode_document(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """Encode documents as any text; see `encode`."""
        return self.encode(sentences, **options)

    def similarity(self, embeddings1: Vectors, embeddings2: Vectors) -> Tensor:
        """Return all cosines, shape ``(n, m)``, of vectors of shapes ``(n, d)`` and ``(m, d)``."""
        first, second = _unit_rows(embeddings1), _unit_rows(embeddings2)
        return first @ second.to(first.device).T

    def similarity_pairwise(self, embeddings1: Vectors, embeddings2: Vectors) -> Tensor:
        """Return the cosine of each pair of rows, shape ``(n,)``."""
        first, second = _unit_rows(embeddings1), _unit_rows(embeddings2)
        return (first * second.to(first.device)).sum(-1)

    def _check_dim(self, head: str, dim: int | None) -> int:
        if head not in self.head_dims:
            raise ValueError(f"`head` must be one of {sorted(self.head_dims)}, got {head!r}.")
        full = self.head_dims[head][0]
        if dim is not None and not 1 <= dim <= full:
            raise ValueError(f"`dim` must be in [1, {full}] for head {head!r}, got {dim}.")
        return full if dim is None else dim

    def _encode(
        self, texts: list[str], head: str, dim: int, batch_size: int, show_progress: bool
    ) -> Tensor:
        # The longest first, so that a batch too big for the memory fails at once.
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        starts = range(0, len(texts), batch_size)
        vectors = torch.empty((len(texts), dim), device=self.device)
        num_truncated = 0
        for start in track(starts, "Encoding", disable=not show_progress):
            rows = order[start : start + batch_size]
            ids, mask, cut = self._tokenize([texts[row] for row in rows])
            num_truncated += cut
            dtype = self.autocast
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                output = self.model(input_ids=ids, attention_mask=mask)
            vectors[rows] = getattr(output, head)[:, :dim].float()
        if num_truncated and not self.num_truncated:
            warnings.warn(
                f"{num_truncated} of {len(texts)} texts had more than `max_length`"
                f" {self.max_length} tokens and were cut; this is said once.",
                stacklevel=3,
            )
        self.num_truncated += num_truncated
        return vectors

    def _tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor, int]:
        """Return padded token ids, their mask, and how many texts were cut."""
        ids: list[list[int]] = self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        too_long = [row for row, tokens in enumerate(ids) if len(tokens) > self.max_length]
        for row in too_long:  # not sliced, to keep the special token at the end
            ids[row] = self.tokenizer(texts[row], truncation=True, max_length=self.max_length)[
                "input_ids"
            ]
        lengths = torch.tensor([len(tokens) for tokens in ids])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        # Without a padding token any will do, since the mask hides it.
        padded = torch.full_like(mask, getattr(self.tokenizer, "pad_token_id", None) or 0)
        padded[mask.bool()] = torch.tensor([token for tokens in ids for token in tokens])
        return padded.to(self.device), mask.to(self.device), len(too_long)


def _check_options(
    prompt_name: str | None, output_value: str, precision: str | None, batch_size: int
) -> None:
    if prompt_name is not None:
        raise ValueError(
            f"`prompt_name` must be None, since the model has no named prompts, got"
            f" {prompt_name!r}; give the text itself as `prompt`."
        )
    if output_value != "sentence_embedding" or precision not in ("float32", None):
        raise ValueError(
            "`output_value` must be 'sentence_embedding' and `precision` 'float32', got"
            f" {output_value!r} and {precision!r}."
        )
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be >= 1, got {batch_size}.")


def _check_texts(texts: list[str]) -> None:
    empty = [row for row, text in enumerate(texts) if not text.strip()]
    if empty:
        raise ValueError(
            f"`sentences` must not be empty or blank, got {len(empty)} such texts, the first at"
            f" position {empty[0]}; leave them out."
        )


def _unit_rows(vectors: Vectors) -> Tensor:
    rows = vectors if isinstance(vectors, Tensor) else torch.as_tensor(np.asarray(vectors))
    rows = rows[None] if rows.ndim == 1 else rows
    return F.normalize(rows.float(), dim=-1)
