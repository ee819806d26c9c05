"""What models are trained on: text, its tokenizers and shards, arithmetic; the data modules."""

from spectral_lightning.data.chat import PLAIN_CHAT_TEMPLATE
from spectral_lightning.data.instruction import InstructionDataModule
from spectral_lightning.data.modular_arithmetic import ModularArithmetic
from spectral_lightning.data.text import TextDataModule, default_cache_dir
from spectral_lightning.data.token_file import TokenFileDataModule
from spectral_lightning.data.tokenizer import BOS, count_token_bytes, train_tokenizer

__all__ = [
    "BOS",
    "PLAIN_CHAT_TEMPLATE",
    "InstructionDataModule",
    "ModularArithmetic",
    "TextDataModule",
    "TokenFileDataModule",
    "count_token_bytes",
    "default_cache_dir",
    "train_tokenizer",
]
