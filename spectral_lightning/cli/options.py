"""The parser of the commands that are not LightningCLI's; standard library only."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from typing_extensions import override

from spectral_lightning.cli.suggest import did_you_mean


class CommandParser(argparse.ArgumentParser):
    """Parser whose errors are one sentence with the nearest known option.

    Options cannot be abbreviated, since a misspelt option would pass for an abbreviation.

    Args:
        prog: Command as it is typed.
        description: What it does, in a sentence.
        settings: Further arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, prog: str, description: str, **settings: Any) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **settings)

    @override
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {message[0].upper()}{message[1:].rstrip('.?')}.\n")
        sys.exit(2)

    def parse(self, args: list[str], required: Sequence[str]) -> argparse.Namespace:
        """Parse, and report a misspelt option before a required one that it should have been.

        Args:
            args: Arguments after the command's name.
            required: Options, or names of positional arguments, that must be given.

        Returns:
            The options. Ends the process with status 2 at a mistake.
        """
        options, unknown = self.parse_known_args(args)
        if unknown:
            name = unknown[0].split("=")[0]
            if name.startswith("-"):
                known = did_you_mean(name, self._option_string_actions)
                sys.stderr.write(f"error: Unknown option `{name}`{known}\n")
            else:
                sys.stderr.write(f"error: Unexpected argument `{unknown[0]}`.\n")
            sys.exit(2)
        for name in required:
            if getattr(options, name.lstrip("-").lower()) is None:
                self.error(f"`{name}` must be given")
        return options
