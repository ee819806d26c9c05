"""Text generation with any causal model that takes a key/value cache."""

# Shape suffixes: B batch, T tokens, V vocabulary.

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, get_args

import torch
from torch import Tensor, nn

from spectral_lightning.models.kv_cache import KVCache
from spectral_lightning.nn.functional import Transform, symlog


class CausalModel(Protocol):
    """What `generate` needs of a model; `GPT` is one.

    Attributes:
        vocab_size: Number of token ids.
        sequence_len: Longest input in tokens.
    """

    vocab_size: int
    sequence_len: int

    def __call__(self, tokens_BT: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """Return logits of shape ``(B, T, V)`` for token ids of shape ``(B, T)``."""

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over the model and everything in it, as ``nn.Module`` does."""


@torch.no_grad()
def generate(
    model: CausalModel,
    prompt_BT: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_token: int | None = None,
    transform: Transform = "softmax",
) -> Tensor:
    """Continue every row of the prompt, one sampled token at a time.

    Reads the prompt once and then one token per step, with a `KVCache`. The model is in
    evaluation mode meanwhile, and every submodule's mode is restored. The same seed gives the
    same tokens on the same device and batch; the global random state is untouched.

    Args:
        model: A causal model such as `GPT`.
        prompt_BT: Token ids, shape ``(B, T)`` with ``B, T >= 1``, int64, on the model's device.
            Repeat a row to draw several samples of it.
        max_new_tokens: Number of tokens to add, at least 1. Prompt and new tokens together must
            fit into the model's `sequence_len`.
        temperature: Divides the logits, at least 0; 0 takes the most probable token. With StableMax
            it divides their `symlog`, and so is an exponent of the probabilities there too.
        top_k: Sample among this many most probable tokens, at least 1; None means all.
        seed: Seed of the private random generator.
        stop_token: Token id that ends a row; the rest of the row is filled with it. Generation
            ends early when all rows have ended. None never ends a row.
        transform: What turns logits into probabilities: ``softmax`` or ``stablemax``, as the model
            was trained with.

    Returns:
        Prompt and new tokens, shape ``(B, T + n)`` with ``n <= max_new_tokens``, int64, on the
        device of `prompt_BT`.

    Raises:
        ValueError: If an argument is outside its range.
        FloatingPointError: If the model's logits are NaN or infinite.

    Example:
        >>> from spectral_lightning.models import GPT
        >>> model = GPT(depth=1, vocab_size=4, sequence_len=8)
        >>> generate(model, torch.tensor([[3]]), max_new_tokens=2, temperature=0.0)
        tensor([[3, 0, 0]])
    """
    _check_prompt(model, prompt_BT, max_new_tokens)
    _check_sampling(model, temperature, top_k, stop_token)
    if transform not in get_args(Transform):
        raise ValueError(f"`transform` must be one of {get_args(Transform)}, got {transform!r}.")
    generator = torch.Generator(prompt_BT.device).manual_seed(seed)
    kv_cache = KVCache(prompt_BT.shape[1] + max_new_tokens)
    finished_B = torch.zeros(prompt_BT.shape[0], dtype=torch.bool, device=prompt_BT.device)
    tokens_BT, unread_BT = prompt_BT, prompt_BT
    with _evaluation_mode(model):
        for _ in range(max_new_tokens):
            logits_BV = model(unread_BT, kv_cache=kv_cache)[:, -1]
            next_B = _choose(logits_BV, temperature, top_k, transform, generator)
            if stop_token is not None:
                next_B = next_B.masked_fill(finished_B, stop_token)
                finished_B |= next_B == stop_token
            unread_BT = next_B[:, None]
            tokens_BT = torch.cat((tokens_BT, unread_BT), dim=1)
            if stop_token is not None and bool(finished_B.all()):
                break
    return tokens_BT


def _choose(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None,
    transform: Transform,
    generator: torch.Generator,
) -> Tensor:
    """Draw one token id per row, shape ``(B,)``."""
    if not bool((logits_BV < math.inf).all()):  # false for NaN too
        raise FloatingPointError(
            "`model` must give finite logits, got NaN or infinity; its training has diverged."
        )
    if temperature == 0 or top_k == 1:
        return logits_BV.argmax(dim=-1)
    num_candidates = logits_BV.shape[-1] if top_k is None else min(top_k, logits_BV.shape[-1])
    candidates = logits_BV.topk(num_candidates, dim=-1)
    values = symlog(candidates.values) if transform == "stablemax" else candidates.values
    probabilities = torch.softmax(values / temperature, dim=-1)
    choice_B1 = torch.multinomial(probabilities, num_samples=1, generator=generator)
    return candidates.indices.gather(-1, choice_B1).squeeze(-1)


@contextmanager
def _evaluation_mode(model: CausalModel) -> Iterator[None]:
    """Switch every submodule to evaluation mode, and back to its own mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_prompt(model: CausalModel, prompt_BT: Tensor, max_new_tokens: int) -> None:
    if prompt_BT.ndim != 2 or prompt_BT.numel() == 0 or prompt_BT.dtype != torch.int64:
        raise ValueError(
            "`prompt_BT` must be an int64 tensor of shape (batch, tokens) with at least one "
            f"token, got {prompt_BT.dtype} of shape {tuple(prompt_BT.shape)}."
        )
    low, high = (int(bound) for bound in prompt_BT.aminmax())
    if low < 0 or high >= model.vocab_size:
        raise ValueError(
            f"`prompt_BT` must hold token ids in [0, vocab_size={model.vocab_size}), "
            f"got ids from {low} to {high}."
        )
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be >= 1, got {max_new_tokens}.")
    total = prompt_BT.shape[1] + max_new_tokens
    if total > model.sequence_len:
        raise ValueError(
            f"`prompt_BT` and `max_new_tokens` together must be at most "
            f"sequence_len={model.sequence_len} tokens, got {prompt_BT.shape[1]} + "
            f"{max_new_tokens} = {total}; shorten the prompt or lower `max_new_tokens`."
        )


def _check_sampling(
    model: CausalModel, temperature: float, top_k: int | None, stop_token: int | None
) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"`temperature` must be finite and >= 0, got {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be >= 1 or None, got {top_k}.")
    if stop_token is not None and not 0 <= stop_token < model.vocab_size:
        raise ValueError(
            f"`stop_token` must be in [0, vocab_size={model.vocab_size}) or None, got {stop_token}."
        )
