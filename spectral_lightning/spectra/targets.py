"""Which weight matrices of a model are measured, under which names.

Lives here: discovery by module type, globs, splits of fused projections.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from spectral_lightning.spectra.names import some_names
from spectral_lightning.spectra.target import Target

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Splits = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Discovery:
    """What was found in a model."""

    targets: tuple[Target, ...]
    """Matrices to measure, in the order of the model's modules."""
    skipped: Mapping[str, str]
    """Weights of two or more dimensions that are not measured, each with the reason."""


def find_targets(
    model: nn.Module,
    layers: str | Sequence[str] = "*",
    *,
    embeddings: bool = False,
    splits: Splits | None = None,
) -> Discovery:
    """Find the weight matrices of any `nn.Module`.

    Measured are: linear layers (and subclasses), Hugging Face's Conv1D, convolutions flattened to
    ``(out_channels, in_channels * kernel)``, query, key and value of `nn.MultiheadAttention`,
    3-D stacks of experts (one matrix each), and any module with a method `spectral_weight()`. A
    weight that several modules share is measured once, under its first name.

    Args:
        model: Module to search.
        layers: Glob, or several, over names such as ``"blocks.*.mlp.*"``; a module's name also
            selects its parts.
        embeddings: Whether `nn.Embedding` tables are measured.
        splits: Fused projections to take apart: glob over module names to
            ``{part: number of output rows}``, e.g. ``{"*.qkv": {"q": 768, "k": 256, "v": 256}}``.

    Returns:
        The targets, and what was skipped and why.

    Raises:
        ValueError: If a glob selects nothing, or a split does not fit its weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(target.name, target.shape) for target in find_targets(model).targets]
        [('0', (8, 4)), ('2', (2, 8))]
    """
    globs = [layers] if isinstance(layers, str) else list(layers)
    splits = splits or {}
    found: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    seen: dict[tuple[int, str], str] = {}
    names: list[str] = []
    unused = {"layers": set(globs), "splits": set(splits)}
    for path, module in model.named_modules():
        name = clean_name(path)
        for target in _targets_of(module, name, embeddings, skipped):
            own = module._parameters.get(target.attribute)
            key = (id(module if own is None else own), "" if own is not None else target.attribute)
            owner = seen.setdefault(key, name)
            if owner != name:
                skipped[target.name] = f"shares its weight with {owner}"
                continue
            reason = _unfit(target.stored())
            if reason is not None:
                skipped[target.name] = reason
                continue
            pattern = next((glob for glob in splits if _selects(glob, name, target)), None)
            unused["splits"].discard(pattern or "")
            parts = [target] if pattern is None else list(_split(target, splits[pattern]))
            for part in parts:
                names.append(part.name)
                hits = {glob for glob in globs if _selects(glob, name, part)}
                unused["layers"] -= hits
                if hits:
                    found[part.name] = part
    for argument, patterns in unused.items():
        if patterns:
            glob = min(patterns)
            hint = next((f"{n} {why}" for n, why in skipped.items() if fnmatchcase(n, glob)), None)
            has = some_names(names, none="no weight matrices that can be measured")
            raise ValueError(
                f"`{argument}` must match at least one weight matrix, got {glob!r};"
                f" {hint or f'the model has {has}'}."
            )
    return Discovery(targets=tuple(found.values()), skipped=skipped)


def clean_name(path: str) -> str:
    """Module path without the parts that wrappers (compile, FSDP, checkpointing) put in.

    Example:
        >>> clean_name("_orig_mod.blocks.0._checkpoint_wrapped_module.attn")
        'blocks.0.attn'
    """
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _targets_of(
    module: nn.Module, name: str, embeddings: bool, skipped: dict[str, str]
) -> Iterator[Target]:
    if callable(getattr(module, "spectral_weight", None)):
        yield Target(name=name, module=module, attribute="spectral_weight")
    elif isinstance(module, nn.MultiheadAttention):
        yield from _attention_targets(module, name)
    elif isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        if isinstance(module._parameters.get("weight"), nn.UninitializedParameter):
            skipped[name] = "has no shape before the first forward pass (lazy module)"
        else:
            yield Target(name=name, module=module)
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        yield Target(name=name, module=module, transposed=True)
    elif isinstance(module, nn.Embedding):
        if embeddings:
            yield Target(name=name, module=module)
        else:
            skipped[name] = "is an embedding table (set `embeddings=True` to measure it)"
    elif not isinstance(module, ParametrizationList):  # its originals are behind a weight above
        yield from _loose_parameters(module, name, skipped)


def _attention_targets(module: nn.MultiheadAttention, name: str) -> Iterator[Target]:
    if not module._qkv_same_embed_dim:
        for part in "qkv":
            yield Target(name=_join(name, part), module=module, attribute=f"{part}_proj_weight")
    else:
        whole = Target(name=name, module=module, attribute="in_proj_weight")
        yield from _split(whole, dict.fromkeys("qkv", module.embed_dim))


def _loose_parameters(module: nn.Module, name: str, skipped: dict[str, str]) -> Iterator[Target]:
    """Weights held directly by a module of unknown type: stacks of experts, or skipped."""
    for attribute, parameter in module._parameters.items():
        if parameter is None or nn.parameter.is_lazy(parameter) or parameter.ndim < 2:
            continue
        label = _join(name, attribute)
        if parameter.ndim == 3 and len(parameter) > 1 and not isinstance(module, _ConvNd):
            for index in range(len(parameter)):
                yield Target(
                    name=f"{label}.{index}", module=module, attribute=attribute, expert=index
                )
        else:
            skipped[label] = (
                f"is a parameter of shape {tuple(parameter.shape)} of a {type(module).__name__}, "
                "whose meaning is unknown (give the module a method `spectral_weight()`)"
            )


def _split(target: Target, parts: Mapping[str, int]) -> Iterator[Target]:
    total = target.shape[0]
    if sum(parts.values()) != total or min(parts.values(), default=0) < 1:
        raise ValueError(
            f"`splits` must give positive row counts that sum to the {total} output rows of"
            f" {target.name}, got {dict(parts)}."
        )
    start = 0 if target.rows is None else target.rows[0]
    for part, rows in parts.items():
        yield Target(
            name=_join(target.name, part),
            module=target.module,
            attribute=target.attribute,
            transposed=target.transposed,
            expert=target.expert,
            rows=(start, start + rows),
        )
        start += rows


def _selects(glob: str, module_name: str, target: Target) -> bool:
    return fnmatchcase(target.name, glob) or fnmatchcase(module_name, glob)


def _unfit(weight: Tensor) -> str | None:
    """Why a weight has no singular values that can be read; None if it has."""
    if weight.dtype not in _DTYPES:
        return f"is stored as {weight.dtype}, which is quantised or not real"
    if weight.ndim < 2:
        return f"is of shape {tuple(weight.shape)}, which is no matrix"
    return None


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part
