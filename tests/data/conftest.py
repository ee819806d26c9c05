import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from spectral_lightning.data import TextDataModule, TokenFileDataModule
from tests.data.token_file_cases import RHYME

WORDS = ("matrix", "vector", "layer", "norm", "rank", "value", "step", "weight", "loss", "token")


def prose(num_documents, seed=0, num_words=40):
    """Different documents of random words, separated by two blank lines."""
    generator = random.Random(seed)
    documents = (
        f"Note {seed}.{number}: " + " ".join(generator.choices(WORDS, k=num_words))
        for number in range(num_documents)
    )
    return "\n\n\n".join(documents) + "\n"


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(prose(30))
    return path


@pytest.fixture
def make_data(text_file, tmp_path):
    """A data module on 30 short documents that is ready for its loaders."""

    def make(source=None, *, ready=True, **settings):
        settings = {
            "vocab_size": 300,
            "sequence_len": 16,
            "batch_size": 4,
            "valid_fraction": 0.2,
            "cache_dir": str(tmp_path / "cache"),
        } | settings
        data = TextDataModule(str(text_file) if source is None else source, **settings)
        if ready:
            data.prepare_data()
            data.setup("fit")
        return data

    return make


@pytest.fixture
def make_tokenizer():
    """A byte-level tokenizer with the named special tokens, whose decoding loses nothing."""

    def make(*, chat_template=None, bos_token=None, eos_token="</s>", pad_token="<pad>"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([prose(20), "\n\n:\n =4 user assistant system"], trainer)
        if bos_token:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos_token} $A", special_tokens=[(bos_token, special.index(bos_token))]
            )
        names = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=chat_template,
            **{name: token for name, token in names.items() if token},
        )

    return make


@pytest.fixture
def make_words(tmp_path):
    """A data module on a tiny text, by default 98 words of which 20 are held out."""

    def make(text=RHYME, *, ready=True, name="rhyme.txt", **settings):
        (tmp_path / name).write_text(text, encoding="utf-8")
        settings = {
            "sequence_len": 8,
            "batch_size": 2,
            "valid_fraction": 0.2,
            "cache_dir": str(tmp_path / "cache"),
        } | settings
        data = TokenFileDataModule(str(tmp_path / name), **settings)
        if ready:
            data.prepare_data()
            data.setup("fit")
        return data

    return make
