"""Text for language models: sources, tokenizers, token shards and the data modules over them."""

from spectral_lightning.data.chat import PLAIN_CHAT_TEMPLATE
from spectral_lightning.data.instruction import InstructionDataModule
from spectral_lightning.data.text import TextDataModule, default_cache_dir
from spectral_lightning.data.token_file import TokenFileDataModule
from spectral_lightning.data.tokenizer import BOS, count_token_bytes, train_tokenizer

__all__ = [
    "BOS",
    "PLAIN_CHAT_TEMPLATE",
    "InstructionDataModule",
    "TextDataModule",
    "TokenFileDataModule",
    "count_token_bytes",
    "default_cache_dir",
    "train_tokenizer",
]
