"""A tiny embedding task and batches for it, which several tests share."""

import torch
from torch.optim import SGD
from torch.utils.data import DataLoader

from spectral_lightning.tasks import SentenceEmbedding
from tests.data.pairs_cases import open_pairs

TINY = {"preset": "tiny", "vocab_size": 400, "hidden_dropout": 0.0}

BERT = {
    "vocab_size": 400,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}


def sgd(groups):
    """Steps that are gradients, so that equal weights mean equal gradients."""
    return SGD(groups, lr=1.0)


def make_task(model=None, **settings):
    """The task of a seeded tiny model; settings of the model by ``model={...}``."""
    torch.manual_seed(0)
    if model is None or isinstance(model, dict):
        model = TINY | (model or {})
    constant = {"warmup_steps": 0, "warmdown_fraction": 0.0}
    return SentenceEmbedding(model, **{"optimizer": sgd} | constant | settings)


def make_batch(num_rows=8, num_columns=2, width=12, seed=0, **more):
    """Random texts of 1 to `width` tokens, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_columns)
    ids = torch.randint(5, 400, (*shape, width), generator=generator)
    lengths = torch.randint(1, width + 1, shape, generator=generator)
    mask = (torch.arange(width) < lengths[..., None]).long()
    first = seed * 1000
    text_ids = torch.arange(first, first + num_rows * num_columns).view(shape)
    return {"input_ids": ids * mask, "attention_mask": mask, "text_ids": text_ids} | more


def loader(*batches):
    return DataLoader(batches, batch_size=None)


def pairs_data(folder, sources=None, **settings):
    """The data module on 60 short pairs."""
    return open_pairs(folder, sources, ready=False, **{"max_length": 16} | settings)


def weights(task):
    return {name: weight.detach().clone() for name, weight in task.model.named_parameters()}


def assert_same(got, expected, atol=1e-6):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (got[name] - tensor).abs().max()
        assert difference <= atol, (name, difference)
