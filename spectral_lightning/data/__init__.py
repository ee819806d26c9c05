"""What models are trained on: text, its tokenizers and shards, arithmetic; the data modules."""

from spectral_lightning.data.chat import PLAIN_CHAT_TEMPLATE
from spectral_lightning.data.instruction import InstructionDataModule
from spectral_lightning.data.modular_arithmetic import ModularArithmetic
from spectral_lightning.data.pairs import PairsDataModule
from spectral_lightning.data.pairs_batches import EvalSet
from spectral_lightning.data.pairs_columns import nli_triplets
from spectral_lightning.data.pairs_sources import PairsSource
from spectral_lightning.data.text import TextDataModule, default_cache_dir
from spectral_lightning.data.token_file import TokenFileDataModule
from spectral_lightning.data.tokenizer import BOS, count_token_bytes, train_tokenizer

__all__ = [
    "BOS",
    "PLAIN_CHAT_TEMPLATE",
    "EvalSet",
    "InstructionDataModule",
    "ModularArithmetic",
    "PairsDataModule",
    "PairsSource",
    "TextDataModule",
    "TokenFileDataModule",
    "count_token_bytes",
    "default_cache_dir",
    "nli_triplets",
    "train_tokenizer",
]
