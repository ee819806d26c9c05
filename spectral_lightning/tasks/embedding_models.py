"""What the model of a sentence-embedding task may be given as, and which parts it gets."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import AutoConfig

from spectral_lightning.models.spectra import PRESETS, SpectraConfig, SpectraModel

Part = Literal["spectral", "anchor", "bridge", "matryoshka", "angular"]
"""Parts of the model and the loss that can be left out."""

_HEADS = ("entity", "retrieval", "anchor", "ranking")


def check_parts(without: Iterable[str]) -> frozenset[str]:
    """Return the parts to leave out.

    Raises:
        ValueError: If one is unknown.
    """
    parts = frozenset(without)
    for part in sorted(parts):
        if part not in get_args(Part):
            known = ", ".join(get_args(Part))
            raise ValueError(f"`without` must hold only {known}, got {part!r}.")
    return parts


def embedding_model(
    model: str | dict[str, Any] | SpectraModel, heads: Iterable[str], *, spectral_branch: bool
) -> SpectraModel:
    """Build or load an embedding model with the heads that its loss trains, and no others.

    Args:
        model: A size (`PRESETS`); a folder or a name on the Hugging Face Hub, of a model saved by
            this library or of any encoder, which becomes the backbone; a dict with one of
            ``preset``, ``folder``, ``backbone`` (any encoder), ``bert`` (weights of a BERT to start
            from) and settings of `SpectraConfig` besides, or with settings alone; or a model.
        heads: Names of the heads that are trained.
        spectral_branch: Whether attention has its spectral branch, where it is built here.

    Returns:
        The model, in training mode.

    Raises:
        OSError: If a folder or name can not be had.
        ValueError: If a size or a setting is unknown, or a given model lacks a head.
    """
    heads = {"ranking" if head == "spectral" else head for head in heads}  # a part of it
    wanted: dict[str, Any] = {f"use_{head}": head in heads for head in _HEADS}
    if not spectral_branch:
        wanted["use_spectral"] = False
    if isinstance(model, SpectraModel):
        return _with_heads(model, heads)
    settings = (
        {"preset" if model in PRESETS else "folder": model} if isinstance(model, str) else model
    )
    settings = {**wanted, **settings}
    sources = [name for name in ("preset", "folder", "backbone", "bert") if name in settings]
    if len(sources) > 1:
        raise ValueError(
            f"`model` must have one of preset, folder, backbone and bert, got {sources}."
        )
    built = _BUILDERS[sources[0] if sources else "settings"](settings)
    return _with_heads(built, heads)


def _from_preset(settings: dict[str, Any]) -> SpectraModel:
    name = settings.pop("preset")
    return SpectraModel(SpectraConfig.preset(name, **settings))


def _from_folder(settings: dict[str, Any]) -> SpectraModel:
    folder = settings["folder"]
    is_name = not Path(folder).exists() and "/" not in folder
    if is_name:
        raise ValueError(
            f"`model` must be one of the sizes {', '.join(PRESETS)}, a folder, or a name on the"
            f" Hugging Face Hub with its owner, got {folder!r}."
        )
    config = AutoConfig.from_pretrained(folder)
    if isinstance(config, SpectraConfig):
        return SpectraModel.from_pretrained(folder)
    return _from_backbone({**settings, "backbone": folder})


def _from_backbone(settings: dict[str, Any]) -> SpectraModel:
    others = {k: v for k, v in settings.items() if k not in ("folder", "backbone", "use_spectral")}
    return SpectraModel.from_backbone(settings["backbone"], **others)


def _from_bert(settings: dict[str, Any]) -> SpectraModel:
    return SpectraModel.from_bert(settings.pop("bert"), **settings)


_BUILDERS = {
    "preset": _from_preset,
    "folder": _from_folder,
    "backbone": _from_backbone,
    "bert": _from_bert,
    "settings": lambda settings: SpectraModel(SpectraConfig(**settings)),
}


def _with_heads(model: SpectraModel, heads: Iterable[str]) -> SpectraModel:
    missing = sorted(set(heads) - set(model.head_dims()))
    if missing:
        raise ValueError(
            f"`model` must have the heads that the loss trains, but lacks {', '.join(missing)};"
            " leave those terms out, or build the model with them."
        )
    return model.train()
