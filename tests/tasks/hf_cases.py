"""Tiny Hugging Face models and batches with uneven masks."""

import copy

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from spectral_lightning.tasks import HFCausalLM

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(  # a tied head, and Conv1D layers
        vocab_size=40,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "gpt_neox": GPTNeoXConfig(  # its head has another name
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
    ),
}


def settings(name):
    """A config as it would stand in YAML."""
    return CONFIGS[name].to_dict()


def rows(count=16, length=8, seed=1):
    """Sentences of which every second label or so is ignored, and one that has none at all."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 40, (count, length), generator=generator)
    share = torch.rand(count, 1, generator=generator)
    labels = tokens.masked_fill(torch.rand(count, length, generator=generator) < share, -100)
    labels[count // 2] = -100
    return [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]


def loader(batch_size=4, **options):
    return DataLoader(rows(**options), batch_size=batch_size)


def make(name="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))


def adam(groups):
    return torch.optim.AdamW(groups, lr=0.01)


def task(name="llama", optimizer=adam, **options):
    return HFCausalLM(make(name), optimizer=optimizer, warmdown_fraction=0.0, **options)
