"""Whether a language model sees the future, and whether it uses the past."""

# Shape suffixes: B batch, T tokens, V vocabulary.

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

Scorer = Callable[[Tensor], Tensor]
"""Turns token ids of shape ``(B, T)`` into logits of shape ``(B, T, V)``."""

LONGEST_DEFAULT = 64  # tokens; set by hand: a few milliseconds per pass of a small model


def assert_causal(
    model: nn.Module,
    vocab_size: int | None = None,
    sequence_len: int | None = None,
    *,
    num_cuts: int = 16,
    atol: float = 0.0,
    seed: int = 0,
) -> None:
    """Refuse a model whose logits at some position depend on a token after it.

    Such a model reads the answer off its input when it is trained to predict the next token, and
    its loss means nothing. For each of several cut points, all tokens from the cut on are replaced
    by others, and the logits before it must stay as they are, to the bit: the shapes are the same,
    so the kernels are, and what a mask hides is multiplied by an exact zero. Costs ``num_cuts + 2``
    forward passes of one sequence. A dependence of one position alone on the next token is found
    only if a cut lies between the two.

    The model is in evaluation mode meanwhile, and every submodule's mode is restored. Parameters
    that are entirely zero, as output heads often are at first, count as random ones: what a zero
    hides at the start shows itself in training. Nothing is written to the model, and nothing drawn
    from the global random state.

    Args:
        model: Turns token ids ``(B, T)`` into logits ``(B, T, V)``, or into an object with such
            `logits`.
        vocab_size: Token ids are drawn below it, at least 2; None for the model's `vocab_size`.
        sequence_len: Length of the sequence in tokens, at least 2; None for the model's
            `sequence_len`, but 64 at most.
        num_cuts: Cut points, spread evenly from after the first token to before the last, at least
            1. The default is set by hand.
        atol: Largest change of a logit that counts as none, for kernels whose order of summation
            depends on the values, at least 0.
        seed: Seed of the private random generator.

    Raises:
        ValueError: If the model is not causal, not deterministic in evaluation mode, or an argument
            is outside its range.
        FloatingPointError: If the logits are NaN.

    Example:
        >>> from spectral_lightning.models import GPT
        >>> assert_causal(GPT(depth=1, vocab_size=5, sequence_len=8))
    """
    _check(num_cuts, atol)
    generator = torch.Generator().manual_seed(seed)
    tokens_BT, vocab_size = _draw(model, vocab_size, sequence_len, generator)
    with _scorer(model, generator) as score:
        before_TV = score(tokens_BT)[0]
        if _changed(before_TV, score(tokens_BT)[0], atol).any():
            raise ValueError(
                "`model` must be deterministic in evaluation mode, got two different results for "
                "the same tokens; raise `atol` if the kernels are to blame."
            )
        for cut in _cuts(tokens_BT.shape[1], num_cuts):
            changed_BT = tokens_BT.clone()
            changed_BT[:, cut:] = _others(changed_BT[:, cut:], vocab_size, generator)
            leaks_T = _changed(before_TV, score(changed_BT)[0], atol)[:cut]
            if leaks_T.any():
                raise ValueError(
                    f"`model` must be causal, got logits at position {int(leaks_T.int().argmax())}"
                    f" that depend on tokens from position {cut} on; mask its attention."
                )


def assert_uses_past(
    model: nn.Module,
    vocab_size: int | None = None,
    sequence_len: int | None = None,
    *,
    num_cuts: int = 16,
    seed: int = 0,
) -> None:
    """Refuse a model whose logits at some position depend on the present token alone.

    The other half of `assert_causal`, which a model passes as well if it mixes no tokens at all,
    for example by attending over heads in place of tokens. For each of several positions, all
    tokens before it are replaced by others, and the logits there must change.

    Args:
        model: As for `assert_causal`.
        vocab_size: As for `assert_causal`.
        sequence_len: As for `assert_causal`.
        num_cuts: Positions, spread evenly from the second to the last, at least 1.
        seed: Seed of the private random generator.

    Raises:
        ValueError: If the model ignores the past, or an argument is outside its range.
        FloatingPointError: If the logits are NaN.

    Example:
        >>> from spectral_lightning.models import GPT
        >>> assert_uses_past(GPT(depth=1, vocab_size=5, sequence_len=8))
    """
    _check(num_cuts, atol=0.0)
    generator = torch.Generator().manual_seed(seed)
    tokens_BT, vocab_size = _draw(model, vocab_size, sequence_len, generator)
    with _scorer(model, generator) as score:
        before_TV = score(tokens_BT)[0]
        for cut in _cuts(tokens_BT.shape[1], num_cuts):
            changed_BT = tokens_BT.clone()
            changed_BT[:, :cut] = _others(changed_BT[:, :cut], vocab_size, generator)
            if not _changed(before_TV, score(changed_BT)[0], atol=0.0)[cut]:
                raise ValueError(
                    f"`model` must use the past, got logits at position {cut} that no token before "
                    "it changes; let its attention mix tokens."
                )


def _check(num_cuts: int, atol: float) -> None:
    if num_cuts < 1:
        raise ValueError(f"`num_cuts` must be >= 1, got {num_cuts}.")
    if not atol >= 0:
        raise ValueError(f"`atol` must be >= 0, got {atol}.")


def _draw(
    model: nn.Module, vocab_size: int | None, sequence_len: int | None, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Random token ids of shape ``(1, T)`` on the model's device, and the number of ids."""
    sizes = {"vocab_size": vocab_size, "sequence_len": sequence_len}
    for name, size in sizes.items():
        if size is None:
            own = getattr(model, name, None)
            if not isinstance(own, int):
                raise ValueError(
                    f"`{name}` must be given for a model without such an attribute, got None."
                )
            sizes[name] = min(own, LONGEST_DEFAULT) if name == "sequence_len" else own
    for name, size in sizes.items():
        assert size is not None
        if size < 2:
            raise ValueError(f"`{name}` must be >= 2, got {size}.")
    vocab_size, sequence_len = sizes["vocab_size"], sizes["sequence_len"]
    assert vocab_size is not None
    assert sequence_len is not None
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    tokens_BT = torch.randint(vocab_size, (1, sequence_len), generator=generator)
    return tokens_BT.to(device), vocab_size


def _others(tokens_BT: Tensor, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Random token ids, every one of which differs from the given one."""
    shift_BT = torch.randint(1, vocab_size, tokens_BT.shape, generator=generator)
    return (tokens_BT + shift_BT.to(tokens_BT.device)) % vocab_size


def _cuts(sequence_len: int, num_cuts: int) -> list[int]:
    """Positions from 1 to the last, ascending, without repetition."""
    if num_cuts == 1:
        return [sequence_len // 2]
    return sorted({round(cut) for cut in torch.linspace(1, sequence_len - 1, num_cuts).tolist()})


def _changed(before_TV: Tensor, after_TV: Tensor, atol: float) -> Tensor:
    """Which positions' logits differ, shape ``(T,)``."""
    equal_TV = (before_TV == after_TV) | ((before_TV - after_TV).abs() <= atol)
    return ~equal_TV.all(dim=-1)


@contextmanager
def _scorer(model: nn.Module, generator: torch.Generator) -> Iterator[Scorer]:
    """The model in evaluation mode as a function, with random numbers for all-zero parameters."""
    modes = [(module, module.training) for module in model.modules()]
    filled = {
        name: _random_like(parameter, generator)
        for name, parameter in model.named_parameters()
        if not parameter.any()
    }

    def score(tokens_BT: Tensor) -> Tensor:
        # A model without such parameters is called as it is: compiled ones are no other way.
        output = functional_call(model, filled, (tokens_BT,)) if filled else model(tokens_BT)
        logits_BTV: Tensor = getattr(output, "logits", output)
        if logits_BTV.isnan().any():
            raise FloatingPointError("`model` must give logits without NaN, got NaN.")
        return logits_BTV

    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield score
    finally:
        for module, mode in modes:
            module.training = mode


def _random_like(parameter: Tensor, generator: torch.Generator) -> Tensor:
    scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 0 else 1.0
    return (scale * torch.randn(parameter.shape, generator=generator)).to(parameter)
