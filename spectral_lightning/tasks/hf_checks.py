"""What has to fit together before a Hugging Face causal LM is trained."""

from collections.abc import Sized
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch import nn

from spectral_lightning.tasks.hf_loss import inner_model
from spectral_lightning.tasks.hf_models import vocabulary_rows


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that keep gradients where they cannot be scaled.

    Raises:
        ValueError: If the strategy is DeepSpeed's.
    """
    if "DeepSpeed" in type(strategy).__name__:
        raise ValueError(
            f"`strategy` must not be DeepSpeed for HFCausalLM, got {type(strategy).__name__}: its"
            " gradients can neither be weighted nor measured; take ddp, and `lora` or a `dtype` of"
            " bfloat16 to save memory."
        )


def check_data(model: nn.Module, data: Any) -> None:
    """Refuse a data module whose tokens or sequences are not for this model.

    Args:
        model: A Hugging Face causal LM.
        data: Data module, or None.

    Raises:
        ValueError: If it has more token ids or longer sequences than the model.
    """
    tokenizer = getattr(data, "tokenizer", None)
    num_tokens = getattr(data, "vocab_size", None)
    if num_tokens is None:
        num_tokens = len(tokenizer) if isinstance(tokenizer, Sized) else 0
    rows = vocabulary_rows(model)
    if num_tokens > rows:
        raise ValueError(
            f"The model must have an embedding for each of the {num_tokens} token ids of the data,"
            f" got {rows}; give the tokenizer that belongs to the model, or call the model's"
            " `resize_token_embeddings`."
        )
    limit = getattr(inner_model(model).config, "max_position_embeddings", None)
    needed = getattr(data, "sequence_len", 0)
    if limit is not None and needed > limit:
        raise ValueError(
            f"`sequence_len` of the data must be at most {limit}, the model's"
            f" `max_position_embeddings`, got {needed}."
        )
