"""What the model of a sentence-embedding task may be given as, and which heads it gets."""

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from spectral_lightning.models.spectra import PRESETS, SpectraConfig, SpectraModel

_HEADS = ("entity", "retrieval", "anchor", "ranking")
_SOURCES = ("preset", "folder", "backbone", "bert")


def embedding_model(
    model: str | dict[str, Any] | SpectraModel, heads: Iterable[str], *, spectral_branch: bool
) -> SpectraModel:
    """Build or load an embedding model with the heads that its loss trains, and no others.

    A given model keeps its other heads, which are not trained.

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
        ValueError: If a size or a setting is unknown, or a given model lacks a head, or
            has the branch that is to be left out.
    """
    trained = frozenset(heads)
    if isinstance(model, SpectraModel):
        has_branch = model.config.use_spectral and model.config.backbone_config is None
        if has_branch and not spectral_branch:
            raise ValueError(
                "`model` must be built with use_spectral=False to leave out spectral, got one that"
                " has the branch."
            )
        return _trained(model, trained)
    built = _needed(trained)
    wanted: dict[str, Any] = {f"use_{head}": head in built for head in _HEADS}
    if "semantic" not in built:
        wanted["semantic_dims"] = ()
    if not spectral_branch:
        wanted["use_spectral"] = False
    settings = (
        {"preset" if model in PRESETS else "folder": model} if isinstance(model, str) else model
    )
    _check_names(settings)
    settings = {**wanted, **settings}
    source = next((name for name in _SOURCES if name in settings), "settings")
    try:
        return _trained(_BUILDERS[source](settings), trained)
    except OSError as error:
        raise _without_network(error, str(settings.get(source))) from error


def _check_names(settings: dict[str, Any]) -> None:
    sources = [name for name in _SOURCES if name in settings]
    if len(sources) > 1:
        raise ValueError(
            f"`model` must have one of {', '.join(_SOURCES)}, got {', '.join(sources)}."
        )
    for name in sorted(set(settings) - set(_SOURCES)):
        if name not in inspect.get_annotations(SpectraConfig):
            raise ValueError(
                f"`model` must hold {', '.join(_SOURCES)} and settings of SpectraConfig, got"
                f" {name!r}."
            )


def _without_network(error: OSError, source: str) -> OSError:
    if Path(source).is_dir():
        return error
    return OSError(
        f"`model` must be a folder or a name that the Hugging Face Hub answers for, got {source!r}"
        f" ({str(error).splitlines()[0].rstrip('.:')}). Without a network, fetch it elsewhere with"
        f" `hf download {source}` and give the folder, or set HF_HOME to a cache that holds it."
    )


def _from_preset(settings: dict[str, Any]) -> SpectraModel:
    name, others = _parted(settings, "preset")
    if name not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {name!r}.")
    return SpectraModel(SpectraConfig.preset(name, **others))


def _from_folder(settings: dict[str, Any]) -> SpectraModel:
    folder, others = _parted(settings, "folder")
    if not Path(folder).exists() and "/" not in folder:
        raise ValueError(
            f"`model` must be one of the sizes {', '.join(PRESETS)}, a folder, or a name on the"
            f" Hugging Face Hub with its owner, got {folder!r}."
        )
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, SpectraConfig):
        return _from_backbone({**others, "backbone": folder})
    config = SpectraConfig.from_dict({**config.to_dict(), **others})
    return SpectraModel.from_pretrained(folder, config=config)


def _from_backbone(settings: dict[str, Any]) -> SpectraModel:
    name, others = _parted(settings, "backbone")
    return SpectraModel.from_backbone(name, **others)


def _from_bert(settings: dict[str, Any]) -> SpectraModel:
    name, others = _parted(settings, "bert")
    return SpectraModel.from_bert(name, **others)


def _from_settings(settings: dict[str, Any]) -> SpectraModel:
    return SpectraModel(SpectraConfig(**settings))


def _parted(settings: dict[str, Any], source: str) -> tuple[Any, dict[str, Any]]:
    return settings[source], {name: settings[name] for name in settings if name != source}


_BUILDERS: dict[str, Callable[[dict[str, Any]], SpectraModel]] = {
    "preset": _from_preset,
    "folder": _from_folder,
    "backbone": _from_backbone,
    "bert": _from_bert,
    "settings": _from_settings,
}


def _needed(trained: frozenset[str]) -> set[str]:
    """Heads to build; the spectral output is a part of the ranking head."""
    return {"ranking" if head == "spectral" else head for head in trained}


def _trained(model: SpectraModel, trained: frozenset[str]) -> SpectraModel:
    """Check that what is trained exists, and freeze what is not: DDP waits for every gradient."""
    missing = sorted(_needed(trained) - set(model.head_dims()))
    if missing:
        raise ValueError(
            f"`model` must have the heads that the loss trains, but lacks {', '.join(missing)};"
            " leave those terms out, or build the model with them."
        )
    idle = [f"heads.{head}" for head in set(model.head_dims()) - _needed(trained)]
    if "spectral" in trained and "ranking" not in trained:
        idle += ["heads.ranking.output", "heads.ranking.output_norm"]
        model.heads.get_submodule("ranking").get_parameter("basis").requires_grad_(False)
    for name in idle:
        model.get_submodule(name).requires_grad_(False)
    return model.train()
