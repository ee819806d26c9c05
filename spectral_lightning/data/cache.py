"""Folders that are made once: complete under their name, or not there at all.

A folder appears under its name in one step when it is complete, so readers never see half of it,
and processes that make the same folder at the same time do not disturb each other: the first one
wins. What stands in a folder is the matter of its preparation.
"""

import secrets
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def fill_folder(
    folder: Path, build: Callable[[Path], None], damage: Callable[[Path], str | None]
) -> None:
    """Make a folder, unless it is there and whole.

    Args:
        folder: The folder, named by a digest of everything that decides its content.
        build: Writes the content into the empty folder it is given.
        damage: Says what is wrong with a folder that exists, or None.

    Raises:
        ValueError: If the folder that `folder` stands in cannot be written.

    Warns:
        UserWarning: If the folder was damaged and is built again.
    """
    if folder.exists():
        if (reason := damage(folder)) is None:
            return
        warnings.warn(f"The token cache is built again: {reason}.", stacklevel=2)
    building = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}")
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"`cache_dir` must be a folder that can be written, got {folder.parent} ({error})."
        ) from error
    try:
        build(building)
        if folder.exists() and damage(folder) is not None:
            # Renamed first: removal takes time, and nobody may open a folder that is half gone.
            with suppress(FileNotFoundError):
                shutil.rmtree(folder.rename(f"{building}.damaged"))
        with suppress(OSError):  # the target exists and is not empty: someone else's equal result
            building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
