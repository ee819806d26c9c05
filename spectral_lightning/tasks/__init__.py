"""LightningModules: what a model is trained for, and how well it does."""

from spectral_lightning.tasks.bits_per_byte import BitsPerByte, TokenLoss
from spectral_lightning.tasks.checkpoint import load_language_model
from spectral_lightning.tasks.classification import Classification
from spectral_lightning.tasks.embedding_checkpoint import load_sentence_encoder
from spectral_lightning.tasks.embedding_metrics import AnomalyDetection, SimilarityCorrelation
from spectral_lightning.tasks.embedding_retrieval import CorpusRetrieval
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
from spectral_lightning.tasks.sentence_embedding import SentenceEmbedding
from spectral_lightning.tasks.sentence_encoder import SentenceEncoder

__all__ = [
    "AnomalyDetection",
    "BitsPerByte",
    "Classification",
    "CorpusRetrieval",
    "HFCausalLM",
    "LanguageModeling",
    "LoraSettings",
    "SentenceEmbedding",
    "SentenceEncoder",
    "SimilarityCorrelation",
    "StableMaxLogitsProcessor",
    "TokenLoss",
    "assert_loss_is_used",
    "install_loss",
    "load_language_model",
    "load_llama2c",
    "load_llama2c_tokenizer",
    "load_sentence_encoder",
    "save_llama2c",
    "stablemax_loss",
]
