"""LightningModules: what a model is trained for, and how well it does."""

from spectral_lightning.tasks.bits_per_byte import BitsPerByte, TokenLoss
from spectral_lightning.tasks.checkpoint import load_language_model
from spectral_lightning.tasks.classification import Classification
from spectral_lightning.tasks.embedding_checkpoint import load_sentence_encoder
from spectral_lightning.tasks.embedding_export import export_sentence_encoder
from spectral_lightning.tasks.embedding_metrics import AnomalyDetection, SimilarityCorrelation
from spectral_lightning.tasks.embedding_report import (
    TargetScore,
    log_values,
    report_rows,
    report_table,
    target_table,
)
from spectral_lightning.tasks.embedding_retrieval import CorpusRetrieval, neighbour_overlap
from spectral_lightning.tasks.embedding_statistics import bootstrap_interval, retained_fraction
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
from spectral_lightning.tasks.mteb_encoder import MTEBEncoder
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
    "MTEBEncoder",
    "SentenceEmbedding",
    "SentenceEncoder",
    "SimilarityCorrelation",
    "StableMaxLogitsProcessor",
    "TargetScore",
    "TokenLoss",
    "assert_loss_is_used",
    "bootstrap_interval",
    "export_sentence_encoder",
    "install_loss",
    "load_language_model",
    "load_llama2c",
    "load_llama2c_tokenizer",
    "load_sentence_encoder",
    "log_values",
    "neighbour_overlap",
    "report_rows",
    "report_table",
    "retained_fraction",
    "save_llama2c",
    "stablemax_loss",
    "target_table",
]
