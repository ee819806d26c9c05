"""Partition of a model's parameters by the kind of module that owns them."""

from typing import Any, Literal, get_args

from torch import nn

Role = Literal["matrix", "embedding", "head", "vector"]
ROLES: tuple[Role, ...] = get_args(Role)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters into optimizer groups by what each parameter does.

    The roles are ``matrix`` (weight of a hidden ``nn.Linear`` or of Hugging Face's ``Conv1D``, or a
    factor of a layer with a ``spectral_weight``), ``embedding`` (weight of an ``nn.Embedding`` or
    ``nn.EmbeddingBag``), ``head`` (weight of an output head) and ``vector``
    (all the rest: biases, norm weights, scalars, weights of other module types). Every trainable
    parameter is in exactly one group; a weight that an embedding shares with the head counts as
    ``head``. Any torch optimizer accepts the groups; `MuonAdamW` gives each role its own rule.

    The output heads are the modules named by ``model.head_names()`` if the model has it, else
    the module returned by ``model.get_output_embeddings()`` (Hugging Face models), else the
    ``nn.Linear`` that was registered last.

    Args:
        model: Any module with a trainable parameter.

    Returns:
        One dict per role that occurs, with keys ``params`` (in the model's order), ``name`` and
        ``role`` (equal strings; loggers show the name). Weights of ``Conv1D``, stored as ``(in,
        out)``, are a group ``matrix_transposed`` of role ``matrix`` with ``transposed=True``.

    Raises:
        ValueError: If no parameter is trainable.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
        >>> [(group["name"], len(group["params"])) for group in parameter_groups(model)]
        [('matrix', 1), ('embedding', 1), ('head', 1), ('vector', 2)]
    """
    heads = _output_heads(model)
    roles: dict[nn.Parameter, Role] = {}
    for module in (*heads, *model.modules()):  # heads first: they win a shared weight
        for parameter in module.parameters(recurse=False):
            roles.setdefault(parameter, _role(parameter, module, heads))
    by_role: dict[Role, list[nn.Parameter]] = {role: [] for role in ROLES}
    for parameter in model.parameters():
        if parameter.requires_grad:
            by_role[roles[parameter]].append(parameter)
    transposed = {m.weight for m in model.modules() if _is_conv1d(m)}
    groups: list[dict[str, Any]] = []
    for role, parameters in by_role.items():
        plain = [p for p in parameters if role != "matrix" or p not in transposed]
        if plain:
            groups.append({"params": plain, "name": role, "role": role})
        if len(plain) < len(parameters):
            others = {"name": "matrix_transposed", "role": role, "transposed": True}
            groups.append({"params": [p for p in parameters if p in transposed], **others})
    if not groups:
        raise ValueError(
            "`model` must have a trainable parameter, got none; set `requires_grad` where needed."
        )
    return groups


def _role(parameter: nn.Parameter, module: nn.Module, heads: list[nn.Module]) -> Role:
    if parameter.ndim == 2:
        if module in heads:
            return "head"
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return "embedding"
        if isinstance(module, nn.Linear) or hasattr(module, "spectral_weight"):
            return "matrix"
        if _is_conv1d(module):
            return "matrix"
    return "vector"


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2 in `transformers`, which is not imported here."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _output_heads(model: nn.Module) -> list[nn.Module]:
    head_names = getattr(model, "head_names", None)
    if head_names is not None:
        return [model.get_submodule(name) for name in head_names()]
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if get_output_embeddings is not None else None
    if head is not None:
        return [head]
    linears: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return linears[-1:]
