"""The console command. Answers help, version and misspelt commands before torch is imported."""

import importlib
import os
import sys

import spectral_lightning
from spectral_lightning.cli.suggest import did_you_mean

TRAINER_COMMANDS = {
    "fit": "train a model",
    "validate": "measure a checkpoint on the validation data",
    "test": "measure a checkpoint on the test data",
    "predict": "run a checkpoint on the prediction data",
}
COMMANDS = {
    **TRAINER_COMMANDS,
    "generate": "write text with the language model of a checkpoint",
    "encode": "turn texts into vectors with the embedding model of a checkpoint",
    "export": "write the embedding model of a checkpoint for other libraries",
    "params": "count the parameters of an embedding model",
    "scan": "measure the weight matrices of a model on disk",
    "watch": "report on a run that switches modes, also while it trains",
    "compare": "compare two runs, and judge one against the other",
}

# Options that Lightning's command line takes before the command.
LEADING_OPTIONS = ("-c", "--config", "--print_config")

HELP = """\
usage: spectral COMMAND [options]

Train models in PyTorch Lightning with the spectra of their weight matrices measured on the way.

commands:
{commands}

options:
  -h, --help     show this help; `spectral COMMAND --help` lists the options of a command
  --version      show the version
  --traceback    show the whole traceback of an error (same as SPECTRAL_DEBUG=1)

examples:
  spectral fit --config configs/gpt_quickstart.yaml --trainer.max_steps 100
  spectral fit --model.help LanguageModeling
  spectral generate --checkpoint last.ckpt --prompt "The function returns"
  spectral encode --checkpoint last.ckpt --input texts.txt --output vectors.npy
  spectral scan last.ckpt --fail-on unhealthy
  spectral watch runs/x --follow
  spectral compare runs/baseline runs/x --criteria phase1
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name. Defaults to those of the process.

    Returns:
        Exit status: 0 for success, 1 if a scan breaks one of its rules, a watched run is critical
        or a compared run misses a criterion, 2 for a mistake in the arguments.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if "--traceback" in args:
        args.remove("--traceback")
        os.environ["SPECTRAL_DEBUG"] = "1"  # the environment also reaches the other ranks

    if not args:
        sys.stderr.write(_help())
        return 2
    command, *rest = args
    if command in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if command == "--version":
        sys.stdout.write(f"spectral_lightning {spectral_lightning.__version__}\n")
        return 0

    if command in COMMANDS and command not in TRAINER_COMMANDS:
        module = importlib.import_module(f"spectral_lightning.cli.{command}")
        status: int = module.run(rest)
        return status
    if command in TRAINER_COMMANDS or command.split("=")[0] in LEADING_OPTIONS:
        from spectral_lightning.cli import main as trainer

        return trainer.run(args)
    kind, known = (
        ("option", [*LEADING_OPTIONS, "--help", "--version", "--traceback"])
        if command.startswith("-")
        else ("command", list(COMMANDS))
    )
    sys.stderr.write(f"error: Unknown {kind} `{command}`{did_you_mean(command, known)}\n")
    return 2


def _help() -> str:
    width = max(map(len, COMMANDS)) + 5
    lines = (f"  {name:<{width}}{text}" for name, text in COMMANDS.items())
    return HELP.format(commands="\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
