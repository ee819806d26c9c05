"""`spectral compare`: two runs side by side, and the criteria of the original project."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import spectral_lightning
from spectral_lightning.cli import errors
from spectral_lightning.cli.options import CommandParser

if TYPE_CHECKING:  # torch is not imported before the arguments are known to be right
    from rich.table import Table

    from spectral_lightning.dashboards.phases import PhaseReport

_DESCRIPTION = """\
Show two runs of a language model side by side: losses, validation bits per byte, speed and mode
switches, with the paired difference at every validation step that both have.
"""
_EPILOG = """\
BASELINE and RUN are folders of runs that `spectral fit` has logged with TensorBoardLogger or
CSVLogger, or folders of their versions, of which the newest is taken. Give both runs the same data
and seed, so that they differ in their callbacks alone; a warning names the settings that differ.

criteria, each judged against the baseline:
  phase1   finished, analyses at every interval, a mode switch, sane measures, a checkpoint, a
           text sample
  phase2   finished, validation at most 5 % above the baseline, all layers analysed, all attention
           layers switch, clobbering detected, the rank of a layer falls, validation curves
  phase3   finished, validation at most 3 % above the baseline, at most 10 % slower (a bound of
           ours), evidence of prevention, the rank of most layers falls

exit status: 0 if all criteria are met or none were asked for, 1 if one is not met or the logs do
not tell, 2 for a mistake in the arguments.

examples:
  spectral compare runs/baseline/version_0 runs/modes/version_0
  spectral compare runs/baseline runs/modes --criteria phase2
  spectral compare runs/baseline runs/modes --criteria phase1 --json
"""
_PHASES = ("phase1", "phase2", "phase3")


def run(args: list[str]) -> int:
    """Write the comparison of two runs to standard output.

    Args:
        args: Options, as ``spectral compare --help`` lists them.

    Returns:
        Exit status: 0 for success, 1 if a criterion is not met or the logs do not tell, 2 for a
        mistake that one sentence explains.
    """
    return errors.answered(_compare, _parser().parse(args, required=["BASELINE", "RUN"]))


def _parser() -> CommandParser:
    parser = CommandParser(
        "spectral compare",
        _DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("baseline", metavar="BASELINE", nargs="?", help="folder of the run to compare with")
    add("run", metavar="RUN", nargs="?", help="folder of the run to judge")
    add("--criteria", metavar="PHASE", choices=_PHASES, help=f"one of {', '.join(_PHASES)}")
    add("--json", action="store_true", help="write one JSON document instead of tables")
    return parser


def _compare(options: argparse.Namespace) -> int:
    from spectral_lightning.dashboards import comparison
    from spectral_lightning.dashboards.pairs import pairing_warnings, validation_pairs
    from spectral_lightning.dashboards.phases import Phase, judge
    from spectral_lightning.dashboards.runs import read_run

    baseline, other = read_run(options.baseline), read_run(options.run)
    pairs = validation_pairs(baseline, other)
    for given, record in ((options.baseline, baseline), (options.run, other)):
        if record.folder != Path(given):
            sys.stderr.write(f"Reading {record.folder}, the newest version in {given}.\n")
    report = judge(baseline, other, Phase(options.criteria)) if options.criteria else None
    if options.json:
        document = {
            "spectral_lightning": spectral_lightning.__version__,
            **comparison.comparison_document(baseline, other, pairs, report),
        }
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    else:
        tables = [comparison.summary_table(baseline, other), comparison.validation_table(pairs)]
        if switches := comparison.switches_table(other):
            tables.append(switches)
        if report:
            tables.append(comparison.criteria_table(report))
        _print(tables)
    for sentence in pairing_warnings(baseline, other):
        sys.stderr.write(f"WARNING: {sentence}\n")
    if report is None or report.passed:
        return 0
    sys.stderr.write(_sentence(report))
    return 1


def _print(tables: list["Table"]) -> None:
    from rich.console import Console

    console = Console()
    for number, table in enumerate(tables):
        if number:
            console.print()
        console.print(table)


def _sentence(report: "PhaseReport") -> str:
    open_ones = {
        "not met": [x.name for x in report.criteria if x.passed is False],
        "unknown": [x.name for x in report.criteria if x.passed is None],
    }
    parts = [f"{what}: {', '.join(names)}" for what, names in open_ones.items() if names]
    return f"error: Criteria of {report.phase} {'; '.join(parts)}.\n"
