"""`spectral params`: how many parameters an embedding model has, and where."""

import argparse
import json
import sys

from spectral_lightning.cli import errors
from spectral_lightning.cli.options import CommandParser

_BYTES = 4  # of a float32 number


def run(args: list[str]) -> int:
    """Print the parameters of an embedding model by part.

    Args:
        args: Options, as ``spectral params --help`` lists them.

    Returns:
        Exit status: 0 for success, 2 for a mistake that one sentence explains.
    """
    return errors.answered(_params, _parser().parse(args, required=[]))


def _parser() -> CommandParser:
    parser = CommandParser(
        "spectral params",
        "Count the parameters of an embedding model by part; builds and downloads nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--size", default="M456", help="name of a shape")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="setting that differs, such as hidden_size=1152 or use_spectral=false; may be repeated",
    )
    add("--json", action="store_true", help="print one JSON object")
    return parser


def _params(options: argparse.Namespace) -> int:
    settings = dict(map(_setting, options.set))

    from spectral_lightning.models.spectra import SpectraConfig, parameters_by_part

    parts = parameters_by_part(SpectraConfig.preset(options.size, **settings))
    total = sum(parts.values())
    if options.json:
        sys.stdout.write(json.dumps({"size": options.size, "total": total, "parts": parts}) + "\n")
        return 0
    for name, count in parts.items():
        sys.stdout.write(f"{name:<20}{count:>16,}{count / total:>8.1%}\n")
    sys.stdout.write(f"{'total':<20}{total:>16,}\n")
    sys.stdout.write(
        f"float32 weights {_BYTES * total / 1e9:.1f} GB; a checkpoint to resume from, with AdamW,"
        f" {3 * _BYTES * total / 1e9:.1f} GB.\n"
    )
    return 0


def _setting(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"`--set` must be NAME=VALUE, got {text!r}.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
