"""`spectral generate`: text from the language model of a checkpoint."""

import argparse
import sys

from spectral_lightning.cli import errors
from spectral_lightning.cli.options import CommandParser


def run(args: list[str]) -> int:
    """Write samples of a checkpoint's language model to standard output.

    Args:
        args: Options, as ``spectral generate --help`` lists them.

    Returns:
        Exit status: 0 for success, 2 for a mistake that one sentence explains.
    """
    return errors.answered(_generate, _parser().parse(args, required=["--checkpoint", "--prompt"]))


def _generate(options: argparse.Namespace) -> int:
    for number, text in enumerate(_samples(options), start=1):
        if options.num_samples > 1:
            sys.stdout.write(f"--- sample {number} of {options.num_samples}\n")
        sys.stdout.write(text + "\n")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        "spectral generate",
        "Write text with the language model of a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", help="checkpoint file written by `spectral fit`; must be given")
    add("--prompt", help="text to continue; must be given")
    add("--max_new_tokens", type=int, default=100, help="tokens to write after the prompt")
    add("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    add("--top_k", type=int, default=50, help="draw from this many likeliest tokens only")
    add("--seed", type=int, default=0, help="the same seed gives the same text")
    add("--num_samples", type=int, default=1, help="texts to write")
    return parser


def _samples(options: argparse.Namespace) -> list[str]:
    if options.num_samples < 1:
        raise ValueError(f"`num_samples` must be >= 1, got {options.num_samples}.")
    import torch

    from spectral_lightning.data import BOS
    from spectral_lightning.models import generate
    from spectral_lightning.tasks import load_language_model

    model, tokenizer, loss = load_language_model(options.checkpoint)
    prompt = tokenizer.encode(options.prompt).ids
    tokens = generate(
        model,
        torch.tensor([prompt] * options.num_samples),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        stop_token=tokenizer.token_to_id(BOS),  # where the next document would begin
        transform=loss.transform,
    )
    return [tokenizer.decode(row) for row in tokens.tolist()]
