"""LightningModules: what a model is trained for, and how well it does."""

from spectral_lightning.tasks.bits_per_byte import BitsPerByte, TokenLoss
from spectral_lightning.tasks.checkpoint import load_language_model
from spectral_lightning.tasks.classification import Classification
from spectral_lightning.tasks.hf_causal_lm import HFCausalLM
from spectral_lightning.tasks.hf_generation import StableMaxLogitsProcessor
from spectral_lightning.tasks.hf_loss import assert_loss_is_used, install_loss, stablemax_loss
from spectral_lightning.tasks.hf_models import LoraSettings
from spectral_lightning.tasks.language_modeling import LanguageModeling
from spectral_lightning.tasks.llama2c import (
    load_llama2c,
    load_llama2c_tokenizer,
    save_llama2c,
)

__all__ = [
    "BitsPerByte",
    "Classification",
    "HFCausalLM",
    "LanguageModeling",
    "LoraSettings",
    "StableMaxLogitsProcessor",
    "TokenLoss",
    "assert_loss_is_used",
    "install_loss",
    "load_language_model",
    "load_llama2c",
    "load_llama2c_tokenizer",
    "save_llama2c",
    "stablemax_loss",
]
