"""LightningModules: what a model is trained for, and how well it does."""

from spectral_lightning.tasks.bits_per_byte import BitsPerByte, TokenLoss
from spectral_lightning.tasks.checkpoint import load_language_model
from spectral_lightning.tasks.language_modeling import LanguageModeling

__all__ = ["BitsPerByte", "LanguageModeling", "TokenLoss", "load_language_model"]
