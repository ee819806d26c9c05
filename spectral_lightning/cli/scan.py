"""`spectral scan`: the spectral health of a model on disk."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import spectral_lightning
from spectral_lightning.cli import errors, rules
from spectral_lightning.cli.options import CommandParser

if TYPE_CHECKING:  # torch is not imported before the arguments are known to be right
    from spectral_lightning.spectra import ScannedLayer, ScanReport

_DESCRIPTION = """\
Measure every weight matrix of a model on disk: spectral norm, stable rank and Frobenius norm, and
how far the stable rank, relative to a random matrix of the shape, is from a healthy range.
"""
_EPILOG = """\
PATH is a checkpoint of Lightning or a state dict (.ckpt, .pt, .pth, .bin), a .safetensors file, or
a folder of Hugging Face's. Fused projections (one matrix for query, key and value) are measured
whole, since nothing in a file says where a part ends.

columns and measures:
  distance              logarithm of the factor by which the healthy range is missed; 0 inside,
                        where the layers nearest to an end come first
  relative_stable_rank  stable rank over that of a Gaussian matrix of the shape
  stable_rank, spectral_norm, frobenius_norm
  condition_number, relative_condition_number, effective_rank   (need --full)
  name, shape, dtype, status                                    (columns only)

rules of --fail-on, each broken by a layer whose number it fits:
  MEASURE<NUMBER, also with <=, > and >=; a layer without the number breaks it too
  failure               not finite, or zero
  unhealthy             failure, rank one, or outside the healthy range

exit status: 0 if no rule is broken, 1 if one is, 2 for a mistake in the arguments.

examples:
  spectral scan model.safetensors
  spectral scan last.ckpt --layers "*.mlp.*" --full --sort condition_number
  spectral scan ./my-model --json --fail-on unhealthy --fail-on "condition_number>1e6"
"""
_MOST_NAMED = 20


def run(args: list[str]) -> int:
    """Write the report of a model on disk to standard output.

    Args:
        args: Options, as ``spectral scan --help`` lists them.

    Returns:
        Exit status: 0 for success, 1 if a layer breaks a rule of ``--fail-on``, 2 for a mistake
        that one sentence explains.
    """
    return errors.answered(_scan, _parser().parse(args, required=["PATH"]))


def _parser() -> CommandParser:
    parser = CommandParser(
        "spectral scan",
        _DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("path", metavar="PATH", nargs="?", help="the model's file or folder")
    add("--layers", metavar="GLOB", action="append", help="only these, by name; may be repeated")
    add("--embeddings", action="store_true", help="also measure embedding tables")
    add("--full", action="store_true", help="all singular values: condition number, effective rank")
    add("--floor", type=float, default=0.01, help="lower end of the healthy range (default 0.01)")
    add("--ceiling", type=float, default=2.0, help="upper end of the healthy range (default 2)")
    add("--sort", metavar="COLUMN", default="distance", help="largest first (default distance)")
    add("--ascending", action="store_true", help="sort the other way")
    add("--rows", type=int, default=20, help="most rows of the table (default 20)")
    add("--json", action="store_true", help="write one JSON document with all rows instead")
    add("--fail-on", metavar="RULE", action="append", help="exit with 1 if a layer breaks the rule")
    return parser


def _scan(options: argparse.Namespace) -> int:
    wanted = [rules.parse_rule(text) for text in options.fail_on or []]
    rules.require_column(options.sort)
    if options.rows < 1:
        raise ValueError(f"`rows` must be >= 1, got {options.rows}.")
    full = options.full or rules.needs_full(wanted, options.sort)
    from spectral_lightning.dashboards.scan import scan_document, scan_table, sorted_layers
    from spectral_lightning.spectra import HealthyRange, scan_model

    healthy = HealthyRange(floor=options.floor, ceiling=options.ceiling)
    with _progress() as progress:
        report = scan_model(
            options.path,
            options.layers or "*",
            embeddings=options.embeddings,
            full=full,
            healthy=healthy,
            progress=progress,
        )
    layers = sorted_layers(report.layers, options.sort, ascending=options.ascending)
    broken = _broken(report, wanted)
    if options.json:
        document = {
            "settings": _settings(options, full),
            **scan_document(report, layers),
            "broken": {text: [name for name, _ in found] for text, found in broken.items()},
        }
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    else:
        from rich.console import Console

        title = f"Weight matrices by {options.sort}"
        Console().print(scan_table(report, layers[: options.rows], title, full=full))
    for text, found in broken.items():
        sys.stderr.write(_sentence(text, found, len(layers)))
    return 1 if broken else 0


def _broken(report: "ScanReport", wanted: Sequence[rules.Rule]) -> dict[str, list[tuple[str, str]]]:
    """Names of the layers that break a rule, and what each was found to be, by the rule's text."""
    from spectral_lightning.dashboards.scan import layer_number
    from spectral_lightning.spectra import ScanStatus

    def finding(layer: "ScannedLayer", rule: rules.Rule) -> str | None:
        if rule.measure in rules.WORDS:
            failed = layer.reading.failure is not None
            unhealthy = layer.status is not ScanStatus.HEALTHY
            is_broken = failed if rule.measure == rules.FAILURE else unhealthy
            return str(layer.status) if is_broken else None
        value = layer_number(layer, rule.measure)
        return f"{value:.4g}" if rule.is_broken(value) else None

    broken = {}
    for rule in wanted:
        findings = [(layer.reading.name, finding(layer, rule)) for layer in report.layers]
        found = [(name, text) for name, text in findings if text is not None]
        if found:
            broken[rule.text] = found
    return broken


def _sentence(text: str, found: Sequence[tuple[str, str]], num_layers: int) -> str:
    named = ", ".join(f"{name} ({what})" for name, what in found[:_MOST_NAMED])
    more = len(found) - _MOST_NAMED
    rest = f" and {more} more" if more > 0 else ""
    verb = "breaks" if len(found) == 1 else "break"
    return f"error: {len(found)} of {num_layers} layers {verb} `{text}`: {named}{rest}.\n"


def _settings(options: argparse.Namespace, full: bool) -> dict[str, Any]:
    return {
        "spectral_lightning": spectral_lightning.__version__,
        "path": options.path,
        "layers": options.layers or ["*"],
        "embeddings": options.embeddings,
        "full": full,
        "floor": options.floor,
        "ceiling": options.ceiling,
        "sort": options.sort,
        "ascending": options.ascending,
        "fail_on": options.fail_on or [],
    }


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's standard error that is gone when the work is done."""
    from rich.console import Console
    from rich.progress import Progress

    hidden = not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("Measuring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
