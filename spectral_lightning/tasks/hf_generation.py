"""Text from Hugging Face causal LMs, sampled from the probabilities they were trained for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from spectral_lightning.nn.functional import symlog
from spectral_lightning.tasks.hf_loss import inner_model, saved_loss

_BOS = "<|bos|>"  # the special token of our own tokenizers


class StableMaxLogitsProcessor(LogitsProcessor):
    """Have `generate` sample from StableMax probabilities.

    Maps scores to ``symlog(scores)``, whose softmax is StableMax. `generate` applies it before
    temperature, top-k and top-p, which act on the StableMax probabilities then. The most probable
    token stays the same one.

    Example:
        >>> processor = StableMaxLogitsProcessor()
        >>> scores = torch.tensor([[0.0, 2.0]])  # s(0) = 1 and s(2) = 3
        >>> torch.softmax(processor(torch.tensor([[1]]), scores), dim=-1)
        tensor([[0.2500, 0.7500]])
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``symlog(scores)``, shape ``(B, V)``."""
        return symlog(scores)


def logits_processors(model: nn.Module) -> list[LogitsProcessor]:
    """Return what `generate` needs as `logits_processor` for a model trained by our loss.

    Args:
        model: A Hugging Face causal LM; its config says which transform it was trained with.
    """
    loss = saved_loss(model)
    is_stablemax = loss is not None and loss.transform == "stablemax"
    return [StableMaxLogitsProcessor()] if is_stablemax else []


def hf_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """Return a tokenizer as `transformers` knows it.

    Args:
        tokenizer: One of `transformers`, or a `tokenizers.Tokenizer` such as those of our data
            modules, which opens texts with ``<|bos|>`` if it has it.
    """
    if not isinstance(tokenizer, Tokenizer):
        return tokenizer
    special = {}
    if tokenizer.token_to_id(_BOS) is not None:
        special = {"bos_token": _BOS, "eos_token": _BOS}  # one ends where the next begins
    copy = Tokenizer.from_str(tokenizer.to_str())  # wrapping changes its padding
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=copy, **special
    )


def tokenizer_of(model: nn.Module) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies in the folder or Hub repository a model was loaded from.

    Args:
        model: A Hugging Face causal LM.

    Raises:
        ValueError: If there is none.
    """
    name = inner_model(model).config.name_or_path
    try:
        if name:
            return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        pass
    raise ValueError(
        "Generating text must have a tokenizer, but there is none where the model came from"
        f" ({name or 'a config'}); use a data module that offers `tokenizer`."
    )


@torch.no_grad()
def continue_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    seed: int = 0,
    **options: Any,
) -> str:
    """Continue a text by sampling from the probabilities that a model was trained for.

    The model is in evaluation mode meanwhile, and the global random state stays as it is.

    Args:
        model: A Hugging Face causal LM.
        tokenizer: Cuts the prompt and joins the result.
        prompt: Text to continue, at least one token, shorter than the model's context.
        max_new_tokens: Tokens to add at most, at least 1; the context may allow less.
        seed: Seed of the random numbers.
        options: Further arguments of the model's `generate`, such as `temperature` or `top_p`.

    Returns:
        Prompt and continuation, without special tokens.

    Raises:
        FloatingPointError: If the model's logits are NaN.
        ValueError: If the prompt is no token long, or fills the context.
    """
    device = next(model.parameters()).device
    encoded = tokenizer(prompt, return_tensors="pt").to(device)
    if encoded["input_ids"].shape[-1] == 0:
        raise ValueError(f"`prompt` must be at least one token long, got {prompt!r}.")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    # One row needs no padding, but `generate` asks for it.
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    # What is left out here, transformers fills in: the 50 likeliest tokens, the model's own taste.
    exact = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    settings = {**exact, "logits_processor": logits_processors(model), **options}
    max_new_tokens = _fitting(model, encoded["input_ids"].shape[-1], max_new_tokens)
    with _evaluation_mode(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            tokens = model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **settings
            )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise FloatingPointError(
                "`model` must give finite logits, got NaN; its training has diverged."
            ) from error
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _fitting(model: nn.Module, num_prompt: int, max_new_tokens: int) -> int:
    """Tokens to add that the context has room for, if the model's config tells its length."""
    length = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(length, int):
        return max_new_tokens
    if num_prompt >= length:
        raise ValueError(
            f"`prompt` must leave room in the model's context of {length} tokens, got"
            f" {num_prompt}; shorten it."
        )
    return min(max_new_tokens, length - num_prompt)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch every submodule to evaluation mode, and back to its own mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
