"""One clear sentence for a user's mistake, the traceback for everything else."""

import os
import re
import sys
import sysconfig
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

_Options = TypeVar("_Options")

# Whoever raises from here is talking to the user; elsewhere a ValueError may be a bug.
SPEAKS_TO_USERS = ("spectral_lightning.", "lightning.pytorch.", "lightning.fabric.")

# What a command looks at before it gives up; MisconfigurationException is Lightning's.
CANDIDATES = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError)


def debug_mode() -> bool:
    """Whether the user asked for tracebacks, by ``--traceback`` or ``SPECTRAL_DEBUG=1``."""
    return os.environ.get("SPECTRAL_DEBUG", "0") not in ("", "0")


def user_sentence(error: BaseException) -> str | None:
    """Put a user's mistake in one line.

    A mistake is an error of the operating system (a missing file, a full disk), a checkpoint
    that does not fit the model, or a `ValueError`, `TypeError` about an argument,
    `MisconfigurationException` or `ArithmeticError` (numbers that are not finite) raised by this
    library or by Lightning. Errors from anywhere else may be bugs.

    Args:
        error: What ended the command.

    Returns:
        The sentence, or None if the traceback should be shown.
    """
    # The parser wraps what a constructor raises in a report on every type that did not fit.
    while error.__cause__ is not None and _origin(error.__traceback__).startswith("jsonargparse"):
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        subject = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{subject}."
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and text.startswith("Error(s) in loading state_dict"):
        return f"The checkpoint does not fit the model: {_first_mismatch(text)}."
    is_mistake = (
        isinstance(error, (ValueError, OSError, ArithmeticError))
        # Python's own messages of this type, which are bugs, never open with a backtick.
        or (isinstance(error, TypeError) and text.startswith("`"))
        or type(error).__name__ == "MisconfigurationException"
    )
    if text and is_mistake and _origin(error.__traceback__).startswith(SPEAKS_TO_USERS):
        return text
    return None


def answered(command: Callable[[_Options], int], options: _Options) -> int:
    """Run a command, and answer a user's mistake in one sentence.

    Args:
        command: The command; returns its exit status.
        options: Its options.

    Returns:
        The command's exit status, or that of `report`.
    """
    try:
        return command(options)
    except CANDIDATES as error:
        status = report(error)
        if status is None:
            raise
        return status


def report(error: BaseException) -> int | None:
    """Write the sentence for a user's mistake to standard error.

    Args:
        error: What ended the command.

    Returns:
        The exit status 2, or None when the error has to be raised again, because it is no
        mistake of the user or because tracebacks were asked for.
    """
    sentence = user_sentence(error)
    if sentence is None or debug_mode():
        return None
    sys.stderr.write(f"error: {sentence} (--traceback shows where.)\n")
    return 2


def _origin(traceback: TracebackType | None) -> str:
    """Name of the module that raised, leaving out the standard library's own frames."""
    library, origin = sysconfig.get_path("stdlib"), ""
    while traceback is not None:
        frame = traceback.tb_frame
        path = frame.f_code.co_filename
        in_stdlib = path.startswith(library) and "site-packages" not in path
        if not in_stdlib and not path.startswith("<frozen"):
            origin = str(frame.f_globals.get("__name__", ""))
        traceback = traceback.tb_next
    return origin


def _first_mismatch(text: str) -> str:
    """The first thing torch found wrong in a state dict, without its list of the rest."""
    details = text.split(": ", 1)[-1]
    found = re.search(r"size mismatch for .+? in current model is \S+?\([^)]*\)", details)
    return (found.group() if found else details[:200]).rstrip(". ")
