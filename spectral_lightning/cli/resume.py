"""Hyperparameters of a checkpoint under those of the command line.

LightningCLI lets a checkpoint's hyperparameters override the command line without a word. Here
they only fill in what the command line and its configuration files leave open.
"""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

# What torch.load raises for a file that is no checkpoint, or only part of one.
_UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, ValueError)


def checkpoint_model(path: str) -> dict[str, Any]:
    """Read which model a checkpoint holds, in the form of the ``model`` section of a config.

    Reads neither weights nor optimizer state into memory.

    Args:
        path: A checkpoint file of Lightning, or the folder of a sharded checkpoint.

    Returns:
        ``{"class_path": ..., "init_args": {...}}``; empty if the model's class does not save its
        hyperparameters, or if `path` is no local file (``"last"``, a URL).

    Raises:
        ValueError: If `path` cannot be read as a checkpoint.
    """
    file = Path(path) / "meta.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        return {}
    try:
        checkpoint = torch.load(file, weights_only=True, map_location="meta", mmap=True)
        hparams = dict(checkpoint.get("hyper_parameters", {}))
    except (*_UNREADABLE, AttributeError) as error:
        raise ValueError(
            f"`ckpt_path` must be a checkpoint of Lightning, but {path} cannot be read as one;"
            " it may be incomplete."
        ) from error
    hparams.pop("_instantiator", None)
    class_path = hparams.pop("_class_path", None)
    return {"class_path": class_path, "init_args": hparams} if class_path else {}


def with_checkpoint_model(args: list[str], subcommand: str, model: dict[str, Any]) -> list[str]:
    """Put a checkpoint's model before everything else on the command line.

    The parser applies what it is given from left to right, so whatever the user gave comes later
    and wins: first the checkpoint, then configuration files and options in the order they stand.
    """
    return [f"--config={json.dumps({subcommand: {'model': model}})}", *args]


def changes(model: dict[str, Any], config: Namespace) -> list[str]:
    """Say where a run's model differs from the checkpoint it starts from.

    Args:
        model: The checkpoint's model, as `checkpoint_model` returns it.
        config: The ``model`` section of the run's configuration.

    Returns:
        One line for each value that differs.
    """
    old, new = _flat(model), _flat(config.as_dict())
    return [
        f"`model.{key}` is {new[key]!r}, the checkpoint has {value!r}"
        for key, value in old.items()
        if key in new and new[key] != value
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries by dotted key, tuples as lists (as a checkpoint has them)."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
