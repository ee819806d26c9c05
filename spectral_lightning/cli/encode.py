"""`spectral encode`: vectors of texts from the embedding model of a checkpoint."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spectral_lightning.cli import errors
from spectral_lightning.cli.options import CommandParser

if TYPE_CHECKING:
    import numpy as np

_SUFFIXES = (".npy", ".safetensors", ".jsonl")


def run(args: list[str]) -> int:
    """Write vectors of texts to a file.

    Args:
        args: Options, as ``spectral encode --help`` lists them.

    Returns:
        Exit status: 0 for success, 2 for a mistake that one sentence explains.
    """
    parser = _parser()
    return errors.answered(_encode, parser.parse(args, required=["--checkpoint", "--output"]))


def _parser() -> CommandParser:
    parser = CommandParser(
        "spectral encode",
        "Turn texts into vectors with the embedding model of a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", help="checkpoint file written by `spectral fit`; must be given")
    add("--input", help="a text per line, or .jsonl with the field `text`; - for standard input")
    add("--texts", nargs="+", help="texts in place of `--input`")
    add("--output", help="file to write: .npy, .safetensors or .jsonl; must be given")
    add("--head", help="head of the model; by default the one that was selected on")
    add("--dim", type=int, help="numbers per vector; by default all of the head's")
    add("--batch_size", type=int, default=64, help="texts at a time")
    add("--device", default="cpu", help="where to compute, such as cuda")
    return parser


def _encode(options: argparse.Namespace) -> int:
    output = Path(options.output)
    if output.suffix not in _SUFFIXES:
        known = ", ".join(_SUFFIXES)
        raise ValueError(f"`--output` must end in one of {known}, got {options.output}.")
    if (options.input is None) == (options.texts is None):
        raise ValueError("Exactly one of `--input` and `--texts` must be given.")
    texts = options.texts or _read(options.input)
    if not texts:
        raise ValueError(f"`--input` must hold at least one text, but {options.input} has none.")

    import numpy as np

    from spectral_lightning.tasks import load_sentence_encoder

    encoder = load_sentence_encoder(options.checkpoint, options.head, options.dim)
    vectors = encoder.encode(
        texts,
        batch_size=options.batch_size,
        device=options.device,
        show_progress_bar=sys.stderr.isatty(),
    )
    assert not isinstance(vectors, list)
    _write(output, texts, np.asarray(vectors))
    sys.stderr.write(
        f"{vectors.shape[0]:,} vectors of {vectors.shape[1]} numbers (head {encoder.head}) in"
        f" {output}.\n"
    )
    return 0


def _read(source: str) -> list[str]:
    """Texts of a file, one per line; empty lines do not count."""
    is_input = source == "-"
    content = sys.stdin.read() if is_input else Path(source).read_text("utf-8")
    lines = content.split("\n")  # other separators may be part of a text
    if not source.endswith(".jsonl"):
        return [line for line in lines if line.strip()]
    texts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)
            text = text["text"] if isinstance(text, dict) else text
        except (json.JSONDecodeError, KeyError):
            text = None
        if not isinstance(text, str):
            raise ValueError(
                f"Each line of a .jsonl file must be a string or an object with a string `text`,"
                f" but line {number} of {source} is not."
            )
        texts.append(text)
    return texts


def _write(output: Path, texts: list[str], vectors: "np.ndarray") -> None:
    """Write the vectors to a new file, which takes its name when it is complete."""
    import numpy as np
    from safetensors.numpy import save_file

    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f"{output.name}.part")
    if output.suffix == ".npy":
        with part.open("wb") as file:
            np.save(file, vectors)
    elif output.suffix == ".safetensors":
        save_file({"vectors": vectors}, part)
    else:
        with part.open("w", encoding="utf-8") as lines:
            for text, vector in zip(texts, vectors, strict=True):
                lines.write(json.dumps({"text": text, "vector": vector.tolist()}) + "\n")
    part.replace(output)
