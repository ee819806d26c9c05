"""Weights of a BERT in a Spectra encoder."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from .attention_spectra import SpectraAttention
from .encoder_spectra import SpectraEncoder

# Our module to BERT's, in a layer.
_LAYER = {
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.o_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feedforward.up_proj": "intermediate.dense",
    "feedforward.down_proj": "output.dense",
    "feedforward_norm": "output.LayerNorm",
}
_EMBEDDINGS = {
    "tokens": "word_embeddings",
    "positions": "position_embeddings",
    "token_types": "token_type_embeddings",
    "norm": "LayerNorm",
}


def load_encoder(source: Any) -> PreTrainedModel:
    """Return a Hugging Face encoder in float32 from a name, a folder or a model.

    Args:
        source: Name on the Hugging Face Hub, folder, or model, which is returned without its task
            head and as it is otherwise.

    Raises:
        ValueError: If it is an encoder-decoder.
    """
    if isinstance(source, PreTrainedModel):
        model = source.base_model
    else:
        model = AutoModel.from_pretrained(str(source), dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"`source` must be an encoder, got the encoder-decoder {type(model).__name__}."
        )
    return model


def bert_settings(bert: PretrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a `SpectraConfig` for an encoder that computes what a BERT computes.

    Args:
        bert: Config of the BERT.
        given: Further settings; they must not change the encoder's shape.

    Raises:
        ValueError: If `bert` is of another kind, or a setting is BERT's.
    """
    if bert.model_type != "bert" or bert.hidden_act != "gelu" or bert.is_decoder:
        raise ValueError(
            "`source` must be a BERT encoder with hidden_act='gelu', got model_type="
            f"{bert.model_type!r}, hidden_act={getattr(bert, 'hidden_act', None)!r}; use"
            " `from_backbone` for other encoders."
        )
    same = (
        *("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers"),
        *("num_attention_heads", "intermediate_size", "layer_norm_eps", "type_vocab_size"),
    )
    fixed = {name: getattr(bert, name) for name in same} | {
        "norm": "post",
        "final_norm": False,
        "feedforward": "gelu",
        "embedding_norm": True,
        "compat": "none",
    }
    for name, value in given.items():
        if fixed.get(name, value) != value:
            raise ValueError(f"`{name}` must be {fixed[name]!r} as in BERT, got {value!r}.")
    return {"max_length": min(256, bert.max_position_embeddings)} | given | fixed


@torch.no_grad()
def copy_bert_(encoder: SpectraEncoder, bert: nn.Module) -> None:
    """Overwrite an encoder's weights with those of a BERT, and silence what BERT does not have.

    Weights of enrichments and the output layers of spectral branches become zero: the encoder then
    computes what BERT computes, and those zeros have gradients.

    Args:
        encoder: Built with `bert_settings`.
        bert: A `transformers.BertModel`.
    """
    pairs = {f"embeddings.{ours}": f"embeddings.{name}" for ours, name in _EMBEDDINGS.items()}
    for index in range(len(encoder.layers)):
        pairs |= {
            f"layers.{index}.{ours}": f"encoder.layer.{index}.{name}"
            for ours, name in _LAYER.items()
        }
    for ours, name in pairs.items():
        encoder.get_submodule(ours).load_state_dict(bert.get_submodule(name).state_dict())
    for module in encoder.modules():
        if isinstance(module, SpectraAttention):
            if module.fractal is not None:
                module.fractal.zero_()
            if module.spectral is not None:
                module.spectral.o_proj.weight.zero_()
                module.spectral.o_proj.bias.zero_()
