"""`spectral export`: the embedding model of a checkpoint as a folder for other libraries."""

import sys

from spectral_lightning.cli import errors
from spectral_lightning.cli.options import CommandParser


def run(args: list[str]) -> int:
    """Write an embedding model for use elsewhere.

    Args:
        args: Options, as ``spectral export --help`` lists them.

    Returns:
        Exit status: 0 for success, 2 for a mistake that one sentence explains.
    """
    options = _parser().parse(args, required=["--checkpoint", "--output"])

    def command(_: object) -> int:
        from transformers.utils.logging import disable_progress_bar

        from spectral_lightning.tasks import export_sentence_encoder, load_sentence_encoder

        disable_progress_bar()  # type: ignore[no-untyped-call]
        encoder = load_sentence_encoder(options.checkpoint, options.head)
        try:
            export_sentence_encoder(encoder, options.output, options.format)
        except ImportError as error:  # says what to install
            raise ValueError(str(error)) from error
        sys.stdout.write(f"{options.output}: head {encoder.head}, format {options.format}.\n")
        return 0

    return errors.answered(command, options)


def _parser() -> CommandParser:
    parser = CommandParser(
        "spectral export", "Write the embedding model of a checkpoint for other libraries."
    )
    add = parser.add_argument
    add("--checkpoint", help="checkpoint file written by `spectral fit`; must be given")
    add("--output", help="new or empty folder to write; must be given")
    add(
        "--format",
        default="sentence-transformers",
        help="sentence-transformers (default; one head), huggingface (all heads), or safetensors"
        " (weights alone)",
    )
    add("--head", help="head of the model; by default the one that was selected on")
    return parser
