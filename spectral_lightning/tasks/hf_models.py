"""Hugging Face causal LMs from a name, a folder or a config, and what is done to them once."""

import copy
import difflib
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from spectral_lightning.nn import merged_state

# Entries that a saved config may have beside those of its class.
_FOREIGN_KEYS = {"spectral_loss", "transformers_version", "_name_or_path", "dtype", "torch_dtype"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """Train low-rank additions to a frozen model, by the package `peft`.

    Args:
        rank: Rank of an addition, at least 1.
        alpha: An addition counts ``alpha / rank`` times. Like `rank`, chosen here.
        dropout: Probability of dropout before an addition, in ``[0, 1)``.
        target_modules: Names, or a pattern of names, of the layers to add to; ``"all-linear"``
            means all but the head.
        modules_to_save: Names of modules that are trained whole.

    Raises:
        ValueError: If an argument is outside its range.
    """

    rank: int = 16
    """Rank of an addition, at least 1."""
    alpha: float = 32.0
    """An addition counts ``alpha / rank`` times."""
    dropout: float = 0.0
    """Probability of dropout before an addition, in ``[0, 1)``."""
    target_modules: str | list[str] = "all-linear"
    """Names, or a pattern of names, of the layers to add to."""
    modules_to_save: list[str] = field(default_factory=list)
    """Names of modules that are trained whole."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"`rank` must be >= 1, got {self.rank}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout}.")


def causal_lm(
    model: str | dict[str, Any] | nn.Module,
    *,
    dtype: str | None = None,
    attn_implementation: str | None = None,
) -> nn.Module:
    """Return a Hugging Face causal LM.

    Args:
        model: Name on the Hugging Face Hub, folder written by ``save_pretrained``, config with
            a `model_type` as a dict or a JSON file (random weights, from the global random state),
            or a model.
        dtype: Of the weights, such as ``"bfloat16"``; None for float32, and for that of a model
            that is given.
        attn_implementation: Such as ``"sdpa"`` or ``"flash_attention_2"``; None for the model's.

    Raises:
        TypeError: If `model` is none of these.
        ValueError: If it is no causal LM, or `dtype` is no floating dtype.
        OSError: If a name is neither a folder nor can be had from the Hub.
    """
    if dtype is not None and not getattr(getattr(torch, dtype, None), "is_floating_point", False):
        raise ValueError(f"`dtype` must name a floating dtype such as bfloat16, got {dtype!r}.")
    if isinstance(model, nn.Module):
        return _adapted(model, dtype, attn_implementation)
    options = {"dtype": getattr(torch, dtype or "float32")}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if isinstance(model, str) and Path(model).expanduser().is_file():
        model = _read_config(Path(model).expanduser())
    if isinstance(model, dict):
        config = _config(model)
        return _built(lambda: AutoModelForCausalLM.from_config(config, **options), config)  # type: ignore[no-untyped-call]
    if not isinstance(model, str):
        raise TypeError(
            "`model` must be a name, a folder, a config or a model of Hugging Face, got a"
            f" {type(model).__name__}."
        )
    return _pretrained(model, options)


def _adapted(model: nn.Module, dtype: str | None, attn_implementation: str | None) -> nn.Module:
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)  # type: ignore[operator]
    return model if dtype is None else model.to(getattr(torch, dtype))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"`model` must hold a config when it is a JSON file, got {path}.")
    return config


def _config(settings: dict[str, Any]) -> Any:
    """Build a config, with a warning for keys that its class would ignore."""
    model_type = str(settings.get("model_type"))
    if model_type not in transformers.CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, transformers.CONFIG_MAPPING.keys(), 1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ValueError(
            "`model` must have a `model_type` such as gpt2 or llama when it is a config, got"
            f" {model_type!r}{hint}"
        )
    known = AutoConfig.for_model(model_type)
    unknown = [key for key in settings if not hasattr(known, key) and key not in _FOREIGN_KEYS]
    if unknown:
        close = difflib.get_close_matches(unknown[0], [*known.to_dict(), *known.attribute_map], 1)
        hint = f"; did you mean {close[0]}?" if close else "."
        rank_zero_warn(
            f"`model` has keys that a {type(known).__name__} does not know: {unknown}{hint}"
        )
    return AutoConfig.for_model(**settings)


def _pretrained(name: str, options: dict[str, Any]) -> nn.Module:
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():  # it knows neither the loss nor to train on
            raise ValueError(
                f"`model` must be a whole model, got {path} with a LoRA adapter alone; give the"
                " folder with the merged model, or load both with `peft` and give the object."
            )
        raise ValueError(
            f"`model` must be a folder with a config.json when it is a folder, got {path}."
        )
    source = str(path) if path.is_dir() else name
    try:
        return _built(lambda: AutoModelForCausalLM.from_pretrained(source, **options), source)
    except OSError as error:
        if path.is_dir():
            raise
        reason = str(error).splitlines()[0].rstrip(".:")
        raise OSError(
            f"`model` must be a folder or a name that the Hugging Face Hub answers for, got"
            f" {name!r} ({reason}). Without a network, fetch it elsewhere with `hf download {name}`"
            " and give the folder, or set HF_HOME to a cache that holds it."
        ) from error


def _built(build: Any, source: Any) -> nn.Module:
    try:
        model: nn.Module = build()
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        kind = getattr(source, "model_type", source)
        raise ValueError(f"`model` must be a causal language model, got {kind}.") from error
    return model


def with_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """Freeze a model and add low-rank layers to it.

    Args:
        model: A Hugging Face causal LM; its layers are replaced in place.
        settings: Which layers, and how.

    Returns:
        A `peft.PeftModel` around it.

    Raises:
        ModuleNotFoundError: If `peft` is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError(
            "`lora` must be None unless the package peft is installed; `pip install peft`."
        )
    import peft

    has_conv1d = any(type(module).__name__ == "Conv1D" for module in model.modules())
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        modules_to_save=settings.modules_to_save or None,
        fan_in_fan_out=has_conv1d,
    )
    return peft.get_peft_model(model, config)


def recompute_activations(model: nn.Module) -> None:
    """Have a Hugging Face model compute activations again in the backward pass, not keep them."""
    # Two names of one method; the older one, with "gradient", is deprecated in transformers 5.23.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # type: ignore[operator]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a decoder: the longest list of modules of one class in it.

    Args:
        model: Any model that keeps its blocks in an ``nn.ModuleList``.

    Raises:
        ValueError: If it has no such list.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(p.numel() for p in blocks.parameters()) for blocks in lists]
    if not any(sizes):
        raise ValueError(
            f"`model` must keep its layers in an nn.ModuleList to be compiled, but a"
            f" {type(model).__name__} has none; set `compile` to False."
        )
    return list(lists[sizes.index(max(sizes))])


def vocabulary_rows(model: nn.Module) -> int:
    """Return the number of token ids that a model takes."""
    weight: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return weight.shape[0]


def save_hf(model: nn.Module, tokenizer: Any, folder: str | Path) -> None:
    """Write a folder that `from_pretrained` takes: weights, config, generation config, tokenizer.

    The low-rank layers of a PEFT model are added into a copy of its weights, and also kept apart in
    the folder ``adapter``. `LowRankLinear` and `FactoredLinear` layers are saved as plain ones.

    Args:
        model: A Hugging Face causal LM, or a PEFT model around one.
        tokenizer: One of `transformers`, or None.
        folder: Where to write; made if it does not exist.
    """
    whole: Any = model
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(Path(folder) / "adapter")  # type: ignore[operator]
        whole = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    whole.save_pretrained(folder, state_dict=merged_state(whole))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
