"""Checkpoints of language models that explain themselves: what they hold, and what is wrong.

`LanguageModeling` stores its tokenizer, its loss and the recipe of its model under one key of the
checkpoint, as plain containers, so that text can be generated from the file alone.
"""

import importlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tokenizers import Tokenizer
from torch import nn
from typing_extensions import override

from spectral_lightning.losses import CrossEntropy
from spectral_lightning.models import CausalModel

CHECKPOINT_KEY = "spectral_lightning"
"""Key of the checkpoint under which the model's recipe, the tokenizer and the loss are kept."""

_MODEL_PREFIX = "model."
# All of these were seen when files were cut or overwritten at random places.
_UNREADABLE = (RuntimeError, ValueError, LookupError, EOFError, OSError, pickle.UnpicklingError)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file of tensors and plain containers.

    Tensors stay on disk until they are used.

    Args:
        path: File written by Lightning or `torch.save`.

    Returns:
        Its contents, tensors on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is incomplete, damaged, or no checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`checkpoint_path` must be an existing file, got {path}.")
    checkpoint = _explained(
        path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    )
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"A checkpoint must hold a `state_dict`, but {path} has none.")
    return checkpoint


class CheckedCheckpointIO(TorchCheckpointIO):
    """Lightning's own reading and writing, with a clear sentence for a file that is damaged."""

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint as Lightning does.

        Raises:
            ValueError: If the file is incomplete, damaged, or no checkpoint.
        """
        return _explained(
            path, lambda: super(CheckedCheckpointIO, self).load_checkpoint(path, *args, **kwargs)
        )


def _explained(path: str | Path, load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return load()
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except _UNREADABLE as error:
        if "Unsupported global" in str(error):  # a whole file; torch says best what to do
            raise
        raise ValueError(
            f"A checkpoint must be complete, but {path} is cut off, damaged or no checkpoint at"
            " all. Use an earlier one."
        ) from error


def check_tensors(model: Mapping[str, Any], checkpoint: Mapping[str, Any], *, strict: bool) -> None:
    """Refuse a checkpoint whose tensors do not fit a model.

    Args:
        model: State dict of the model.
        checkpoint: State dict of the checkpoint.
        strict: Whether a tensor that only one of the two has is a mistake.

    Raises:
        ValueError: If a tensor's shape differs, or with `strict` its presence.
    """
    names = (
        dict.fromkeys([*model, *checkpoint]) if strict else [n for n in model if n in checkpoint]
    )
    differing = [name for name in names if _shape(model, name) != _shape(checkpoint, name)]
    if differing:
        first = differing[0]
        raise ValueError(
            f"The checkpoint must fit the model, but {len(differing)} of {len(model)} tensors"
            f" differ: `{first}` is {_shape(checkpoint, first)} in the checkpoint and"
            f" {_shape(model, first)} in the model. Build the model with the arguments it was"
            " trained with."
        )


def _shape(state_dict: Mapping[str, Any], name: str) -> str:
    if name not in state_dict:
        return "missing"
    return str(tuple(getattr(state_dict[name], "shape", ())))


def agreed_tokenizer(own: str | None, other: str | None) -> str | None:
    """Return whichever tokenizer is known.

    Args:
        own: JSON of a task's tokenizer, or None.
        other: JSON of that of a data module or checkpoint, or None.

    Raises:
        ValueError: If both are known and differ, so that their token ids mean different texts.
    """
    if own is not None and other is not None and own != other:
        raise ValueError(
            "The data module's tokenizer must be the one the model was trained with, but it is"
            " another one. Write that one to a file with"
            " `load_language_model(checkpoint)[1].save(path)` and give the data module"
            " `tokenizer=path`."
        )
    return other if own is None else own


def model_recipe(model: nn.Module) -> dict[str, Any] | None:
    """Return what `build_model` needs to build this model again, as plain containers.

    Args:
        model: A model whose attribute `config` holds its constructor's arguments.

    Returns:
        ``{"class_path": ..., "init_args": {...}}``, or None if the model has no such attribute.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, dict):
        return None
    cls = type(model)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": dict(config)}


def build_model(checkpoint: Mapping[str, Any]) -> nn.Module:
    """Build the model of a checkpoint, without its weights.

    Args:
        checkpoint: Result of `read_checkpoint`.

    Raises:
        ValueError: If the checkpoint has no recipe, or names something else than a model.
    """
    recipe = checkpoint.get(CHECKPOINT_KEY, {}).get("model")
    if recipe is None:
        raise ValueError(
            "The checkpoint must say how to build its model, but it was written by another task or"
            " for a model without `config`. Build the model yourself and load its state dict."
        )
    module_name, _, name = recipe["class_path"].rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"The checkpoint's model {recipe['class_path']} must be importable, but it is not"
            f" ({error})."
        ) from error
    # The file may come from anywhere, and calling whatever it names would run any program.
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(
            f"The checkpoint's model must be a torch.nn.Module, got {recipe['class_path']}."
        )
    return cls(**recipe["init_args"])


def saved_loss(checkpoint: Mapping[str, Any]) -> CrossEntropy | None:
    """Return the loss that the model of a checkpoint was trained with; None for PyTorch's own.

    Args:
        checkpoint: Result of `read_checkpoint`.
    """
    settings = checkpoint.get(CHECKPOINT_KEY, {}).get("loss")
    return None if settings is None else CrossEntropy(**settings)


class TrainedLanguageModel(NamedTuple):
    """What the checkpoint of a language model holds.

    Attributes:
        model: The model, in evaluation mode on the CPU.
        tokenizer: What it was trained with.
        loss: Its loss, whose transform turns its logits into probabilities.
    """

    model: CausalModel
    tokenizer: Tokenizer
    loss: CrossEntropy


def load_language_model(checkpoint_path: str | Path) -> TrainedLanguageModel:
    """Load a trained language model and its tokenizer from a checkpoint alone.

    Args:
        checkpoint_path: File written while a `LanguageModeling` was trained.

    Returns:
        The model in evaluation mode on the CPU, its tokenizer, and its loss.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or is not the checkpoint of a language model.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    content = checkpoint.get(CHECKPOINT_KEY, {}).get("tokenizer")
    if content is None:
        raise ValueError(
            f"A checkpoint must hold a tokenizer to be used alone, but {checkpoint_path} has none."
            " Train with a data module that offers `tokenizer`."
        )
    model = build_model(checkpoint)
    weights = {
        name.removeprefix(_MODEL_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(_MODEL_PREFIX)
    }
    check_tensors(model.state_dict(), weights, strict=True)
    model.load_state_dict(weights)
    loss = saved_loss(checkpoint) or CrossEntropy()
    return TrainedLanguageModel(cast(CausalModel, model.eval()), Tokenizer.from_str(content), loss)
