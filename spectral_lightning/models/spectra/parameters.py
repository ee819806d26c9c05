"""How many parameters a Spectra model has, and where."""

import torch

from .configuration_spectra import SpectraConfig
from .modeling_spectra import SpectraModel


def parameters_by_part(config: SpectraConfig) -> dict[str, int]:
    """Count the parameters of a model without building it.

    From a closed form, except for a backbone of Hugging Face, which is built on the meta device.

    Args:
        config: Shape and options of the model.

    Returns:
        Parameters by part; parts that are off are missing. The sum is the number of parameters.

    Example:
        >>> parts = parameters_by_part(SpectraConfig.preset("M456"))
        >>> parts["spectral branch"], sum(parts.values())
        (18912792, 466406896)
    """
    parts = _backbone(config) if config.backbone_config is not None else _encoder(config)
    counts = parts | _heads(config)
    return {name: count for name, count in counts.items() if count}


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _backbone(config: SpectraConfig) -> dict[str, int]:
    with torch.device("meta"):
        encoder = SpectraModel(config).encoder
    return {"backbone": sum(parameter.numel() for parameter in encoder.parameters())}


def _encoder(config: SpectraConfig) -> dict[str, int]:
    assert config.intermediate_size is not None
    dim, inner, num_layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tables = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    narrow = config.spectral_dim
    spectral = 3 * _linear(dim, narrow) + _linear(narrow, dim) + config.learnable_fusion
    num_inputs = 2 if config.feedforward == "swiglu" else 1
    num_norms = 2 * num_layers + config.final_norm + config.embedding_norm
    return {
        "embeddings": tables * dim,
        "attention": num_layers * 4 * _linear(dim, dim),
        "spectral branch": num_layers * spectral * config.use_spectral,
        "fractal weights": num_layers * config.fractal_depth * config.learnable_fractal,
        "feed-forward": num_layers * (num_inputs * _linear(dim, inner) + _linear(inner, dim)),
        "layer norms": num_norms * 2 * dim,
    }


def _heads(config: SpectraConfig) -> dict[str, int]:
    dim = config.hidden_size
    with_norm = {
        "semantic head": _semantic_width(config),
        "entity head": config.entity_dims[0] if config.use_entity else 0,
        "anchor head": config.anchor_dim if config.use_anchor else 0,
    }
    heads = {name: _linear(dim, width) + 2 * width for name, width in with_norm.items()}
    retrieval = _linear(dim, dim) + _linear(dim, config.retrieval_dim)
    heads["retrieval head"] = retrieval * config.use_retrieval
    heads["ranking head"] = _ranking(config) * config.use_ranking
    return heads


def _semantic_width(config: SpectraConfig) -> int:
    """Outputs of the semantic head's linear layer; 0 if there is none."""
    is_linear = config.semantic_dims and config.semantic_head == "linear"
    return config.semantic_dims[0] if is_linear else 0


def _ranking(config: SpectraConfig) -> int:
    assert config.anomaly_dim is not None
    dim, wide, narrow = config.hidden_size, config.anomaly_dim, config.spectral_dim
    linears = (
        *((dim, 2 * dim), (2 * dim, wide), (wide, narrow), (narrow, narrow)),
        (wide + narrow, config.ranking_dim),
    )
    norms = 2 * (2 * dim + wide + narrow + config.ranking_dim)
    basis = config.num_anomaly_basis * wide
    return sum(_linear(*shape) for shape in linears) + norms + basis
