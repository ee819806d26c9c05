"""Continuations of fixed prompts, as text in a logger."""

from collections.abc import Callable, Iterable
from textwrap import indent
from typing import cast

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn
from tokenizers import Tokenizer
from torch import nn

from spectral_lightning.models import CausalModel, generate
from spectral_lightning.nn.functional import Transform

# Chosen here: lively, but away from the tail, where small models fall apart.
_TEMPERATURE = 0.8
_TOP_K = 50


def check_prompts(prompts: list[str], num_tokens: int, tokenizer: Tokenizer, limit: int) -> None:
    """Refuse prompts that leave no room for their continuation.

    Args:
        prompts: Texts to continue.
        num_tokens: Length of a continuation in tokens.
        tokenizer: Cuts the prompts.
        limit: Longest sequence of the model, in tokens.

    Raises:
        ValueError: If a prompt is empty, or is too long together with its continuation.
    """
    for prompt in prompts:
        length = len(tokenizer.encode(prompt).ids)
        if length == 0:
            raise ValueError(f"`sample_prompts` must not be empty texts, got {prompt!r}.")
        if length + num_tokens > limit:
            raise ValueError(
                f"`sample_tokens` must be at most {max(limit - length, 0)} after the prompt"
                f" {prompt!r} of {length} tokens, so that both fit into the model's sequence_len of"
                f" {limit}, got {num_tokens}."
            )


def write_samples(
    model: nn.Module,
    prompts: list[str],
    num_tokens: int,
    tokenizer: Tokenizer,
    loggers: Iterable[Logger],
    step: int,
    transform: Transform,
) -> None:
    """Continue every prompt and write the texts to the loggers that take text.

    The same random numbers are used every time. Nothing is generated if no logger has a method
    ``add_text(tag, text, step)``, as TensorBoard's has.

    Args:
        model: A causal model whose parameters are all on this rank.
        prompts: Texts to continue, checked by `check_prompts`.
        num_tokens: Length of a continuation in tokens.
        tokenizer: Cuts the prompts and joins the results.
        loggers: Loggers of a Trainer.
        step: Optimizer step to write the texts under.
        transform: What turns the model's logits into probabilities.

    Warns:
        UserWarning: If the model's logits are not finite; a sample is no reason to lose a run.
    """
    write_continuations(
        lambda prompt: _continuation(model, prompt, num_tokens, tokenizer, transform),
        prompts,
        loggers,
        step,
    )


def write_continuations(
    continuation: Callable[[str], str], prompts: list[str], loggers: Iterable[Logger], step: int
) -> None:
    """Continue every prompt and write the texts to the loggers that take text.

    Args:
        continuation: Returns a prompt and what follows it; not called if no logger takes text.
        prompts: Texts to continue.
        loggers: Loggers of a Trainer.
        step: Optimizer step to write the texts under.

    Warns:
        UserWarning: If `continuation` raises FloatingPointError.
    """
    experiments = [getattr(logger, "experiment", None) for logger in loggers]
    methods = [getattr(experiment, "add_text", None) for experiment in experiments]
    writers = [method for method in methods if callable(method)]
    if not writers:
        return
    for number, prompt in enumerate(prompts):
        try:
            text = continuation(prompt)
        except FloatingPointError as error:
            rank_zero_warn(f"No samples were written at step {step}: {error}")
            return
        for add_text in writers:
            # Four spaces: TensorBoard renders Markdown, and this is verbatim.
            add_text(f"samples/{number}", indent(text, "    "), step)


def _continuation(
    model: nn.Module, prompt: str, num_tokens: int, tokenizer: Tokenizer, transform: Transform
) -> str:
    tokens = generate(
        cast(CausalModel, model),
        torch.tensor([tokenizer.encode(prompt).ids], device=next(model.parameters()).device),
        max_new_tokens=num_tokens,
        temperature=_TEMPERATURE,
        top_k=min(_TOP_K, tokenizer.get_vocab_size()),
        transform=transform,
    )
    return tokenizer.decode(tokens[0].tolist())
