"""`spectral generate`: text from the language model of a checkpoint."""

import argparse
import sys
from typing import NoReturn

from typing_extensions import override

from spectral_lightning.cli import errors
from spectral_lightning.cli.suggest import did_you_mean


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are one sentence with the nearest known option."""

    @override
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {message[0].upper()}{message[1:].rstrip('.?')}.\n")
        sys.exit(2)

    def parse(self, args: list[str]) -> argparse.Namespace:
        """Parse, and report a misspelt option before a required one that it should have been."""
        options, unknown = self.parse_known_args(args)
        if unknown:
            name = unknown[0].split("=")[0]
            known = did_you_mean(name, self._option_string_actions)
            sys.stderr.write(f"error: Unknown option `{name}`{known}\n")
            sys.exit(2)
        for name in ("checkpoint", "prompt"):
            if getattr(options, name) is None:
                self.error(f"`--{name}` must be given")
        return options


def run(args: list[str]) -> int:
    """Write samples of a checkpoint's language model to standard output.

    Args:
        args: Options, as ``spectral generate --help`` lists them.

    Returns:
        Exit status: 0 for success, 2 for a mistake that one sentence explains.
    """
    options = _parser().parse(args)
    try:
        texts = _samples(options)
    except errors.CANDIDATES as error:
        status = errors.report(error)
        if status is None:
            raise
        return status
    for number, text in enumerate(texts, start=1):
        if options.num_samples > 1:
            sys.stdout.write(f"--- sample {number} of {options.num_samples}\n")
        sys.stdout.write(text + "\n")
    return 0


def _parser() -> _Parser:
    parser = _Parser(
        prog="spectral generate",
        description="Write text with the language model of a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
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

    model, tokenizer = load_language_model(options.checkpoint)
    prompt = tokenizer.encode(options.prompt).ids
    tokens = generate(
        model,
        torch.tensor([prompt] * options.num_samples),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        stop_token=tokenizer.token_to_id(BOS),  # where the next document would begin
    )
    return [tokenizer.decode(row) for row in tokens.tolist()]
