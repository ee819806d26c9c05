"""`spectral params`: how many parameters an embedding model has, and where."""

import argparse
import inspect
import json
import sys
from collections.abc import Mapping

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
        help="setting that differs, such as hidden_size=1152 or use_spectral=false; repeatable",
    )
    add("--json", action="store_true", help="print one JSON object")
    return parser


def _params(options: argparse.Namespace) -> int:
    written = [_parted(text) for text in options.set]

    from spectral_lightning.models.spectra import PRESETS, SpectraConfig, parameters_by_part

    if options.size not in PRESETS:
        raise ValueError(f"`--size` must be one of {', '.join(PRESETS)}, got {options.size!r}.")
    preset = SpectraConfig.preset(options.size)
    known = {name: getattr(preset, name) for name in inspect.get_annotations(SpectraConfig)}
    settings = {name: _value(name, text, known) for name, text in written}
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


def _parted(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"`--set` must be NAME=VALUE, got {text!r}.")
    return name, value


def _value(name: str, text: str, known: Mapping[str, object]) -> object:
    """What a setting is given as, of the kind that it has in a preset."""
    if name not in known:
        raise ValueError(f"`--set` must name a setting of SpectraConfig, got {name!r}.")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    kinds = {tuple: (list,), float: (float, int)}
    kind = type(known[name])
    if isinstance(value, kinds.get(kind, (kind,))):
        return value
    raise ValueError(f"`--set` must give `{name}` as such as {known[name]}, got {text!r}.")
