"""`spectral fit|validate|test|predict`: LightningCLI with this library's classes at hand."""

import argparse
import logging
import sys
import warnings
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

# Imported for their classes: the parser knows by its bare name whatever has been imported.
import spectral_lightning.callbacks
import spectral_lightning.data
import spectral_lightning.models
import spectral_lightning.tasks  # noqa: F401
from spectral_lightning.cli import errors, messages, resume
from spectral_lightning.cli.entry import TRAINER_COMMANDS

_SECTIONS: dict[str, type] = {
    "model": pl.LightningModule,
    "data": pl.LightningDataModule,
    "trainer.callbacks": pl.Callback,
    "trainer.logger": Logger,
    "trainer.strategy": Strategy,
    "trainer.profiler": Profiler,
}
_ARGUMENTS: dict[str, type] = {"optimizer": Optimizer, "lr_scheduler": LRScheduler}


class SpectralArgumentParser(LightningArgumentParser):
    """Parser whose errors are one sentence with the nearest known name."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error or errors.debug_mode():
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        options = parser._option_string_actions
        sys.stderr.write(f"error: {messages.sentence(message, options, class_names)}\n")
        sys.exit(2)


class SpectralCLI(LightningCLI):
    """LightningCLI whose command line wins over checkpoints.

    The classes of this library, of Lightning and of torch are known by their bare names:
    ``--model LanguageModeling --data TextDataModule --trainer.callbacks+=SpectralMonitor``.
    Options cannot be abbreviated, since a misspelt option would pass for an abbreviation.
    Optimizers and schedulers are arguments of the model, not sections of their own: built at
    start, before a sharded strategy replaces the parameters, they would train nothing.

    Args:
        args: Arguments after the program's name. Defaults to those of the process.
        run: Whether to run the subcommand that `args` begins with; without it, `args` has no
            subcommand and the classes are only built.
    """

    def __init__(self, args: list[str] | None = None, *, run: bool = True) -> None:
        self._args = list(sys.argv[1:] if args is None else args)
        super().__init__(
            args=self._args,
            run=run,
            parser_class=SpectralArgumentParser,
            parser_kwargs={"prog": "spectral", "allow_abbrev": False},
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # LightningCLI's own version warns about explicit arguments beside those of the process.
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--ckpt_path", nargs="?")
        path = early.parse_known_args(args)[0].ckpt_path
        subcommand = next((arg for arg in args if arg in TRAINER_COMMANDS), None)
        self._parse_over_checkpoint(path if subcommand else None, subcommand)

    @override
    def _parse_ckpt_path(self) -> None:
        if subcommand := self.config.get("subcommand"):
            path = self.config[subcommand].get("ckpt_path")
            if path != self._ckpt_path:  # it stands in a configuration file
                self._parse_over_checkpoint(path, subcommand)

    def _parse_over_checkpoint(self, path: str | None, subcommand: str | None) -> None:
        args, self._ckpt_path = self._args, path
        model = resume.checkpoint_model(path) if path else {}
        if model and subcommand:
            args = resume.with_checkpoint_model(args, subcommand, model)
        self.config = self.parser.parse_args(args)
        if model and subcommand:
            for change in resume.changes(model, self.config[subcommand].model):
                rank_zero_info(f"{change}.")


def class_names(key: str) -> list[str]:
    """List the classes that a key of the configuration accepts by bare name.

    Args:
        key: Dotted key, such as ``"trainer.callbacks"``.

    Returns:
        Names in the order in which the classes were defined, without private ones.
    """
    base = _SECTIONS.get(key) or _ARGUMENTS.get(key.rsplit(".", 1)[-1], nn.Module)
    names: dict[str, None] = {}
    queue = [base]
    while queue:
        cls = queue.pop()
        queue += type.__subclasses__(cls)
        if not cls.__name__.startswith("_") and "<locals>" not in cls.__qualname__:
            names[cls.__name__] = None
    return list(names)


def run(args: list[str]) -> int:
    """Run one of the trainer's subcommands.

    Args:
        args: The subcommand and its options.

    Returns:
        Exit status: 0 for success, 2 for a mistake that one sentence explains.
    """
    _silence_what_users_cannot_change()
    try:
        SpectralCLI(args)
    except (*errors.CANDIDATES, MisconfigurationException) as error:
        status = errors.report(error)
        if status is None:
            raise
        return status
    return 0


def _silence_what_users_cannot_change() -> None:
    # Lightning 2.6 with torch 2.13 calls a deprecated function of torch at every step.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # Advertisements of other packages, logged with the messages about the run.
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: "Tip: For seamless" not in record.getMessage())
