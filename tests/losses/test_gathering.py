"""Losses over two ranks: the numbers and gradients of one process with the whole batch."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spectral_lightning.losses import (
    LearnableTemperature,
    Matryoshka,
    SpectraLoss,
    cosent_loss,
    info_nce,
)
from spectral_lightning.testing.distributed import run_ranks

pytestmark = pytest.mark.distributed

# Rows 0 and 3, which are on different ranks, have one anchor; 1 and 2 have one positive; a hard
# negative of 2 is the positive of 0, and one of 3 the anchor of 1.
IDS = torch.tensor([[0, 10, 20], [1, 11, 21], [2, 11, 10], [0, 13, 1]])


class Network(nn.Module):
    """Heads by name, and a temperature."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"semantic": 8, "entity": 6, "retrieval": 4, "ranking": 8, "anchor": 4}
        sizes["spectral"] = 3
        self.heads = nn.ModuleDict({name: nn.Linear(5, size) for name, size in sizes.items()})
        self.temperature = LearnableTemperature(start=0.3)
        self.to(dtype)

    def forward(self, x):
        return {name: head(x) for name, head in self.heads.items()}, self.temperature()


def nce(heads, temperature, ids):
    names = ("anchor_ids", "positive_ids", "negative_ids")
    options = dict(zip(names, ids.unbind(1), strict=True)) | {"temperature": temperature}
    plain = [info_nce(*heads[name].unbind(1), **options) for name in sorted(heads)]
    close = info_nce(*heads["anchor"].unbind(1), margin=0.1, **options)
    return sum(plain) + close


def cosent(heads, temperature, ids):
    first, second, _ = heads["anchor"].unbind(1)
    rest = sum(values.square().sum() for values in heads.values()).div(len(ids))
    return cosent_loss(first, second, (7 * ids[:, 1]) % 5) + rest / temperature


def spectra(heads, temperature, ids, **settings):
    dims = Matryoshka(dims=(8, 4), weights=(0.5, 0.4))
    # Weights at which no term is lost among the others.
    loss = SpectraLoss(semantic_dims=dims, bridge_dims=(4,), spectral_weight=0.5, **settings)
    parts = [{name: rows[:, i] for name, rows in heads.items()} for i in range(3)]
    return loss(*parts, temperature=temperature, text_ids=ids).total


def spectra_by_rankings(heads, temperature, ids):
    settings = {"alignment_form": "kl", "spectral_form": "softmax", "negative_margin": 0.1}
    return spectra(heads, temperature, ids, **settings)


def loss_and_gradients(model, loss, x, ids):
    heads, temperature = model(x.flatten(0, 1))
    found = loss(
        {name: rows.unflatten(0, x.shape[:2]) for name, rows in heads.items()}, temperature, ids
    )
    found.backward()
    return found.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("loss", [nce, cosent, spectra, spectra_by_rankings])
def test_ranks_have_the_gradients_of_the_whole_batch(make_groups, join, loss, dtype, rtol):
    x = make_groups(num_rows=4, dtype=dtype)
    expected, gradients = loss_and_gradients(Network(dtype), loss, x, IDS)

    def on_rank():
        own = join(x, IDS)
        return loss_and_gradients(DistributedDataParallel(Network(dtype)), loss, *own)

    results = run_ranks(on_rank)
    mean = sum(value for value, _ in results) / 2
    torch.testing.assert_close(mean, expected, rtol=rtol, atol=0)
    scale = max(gradient.abs().max() for gradient in gradients)
    for _, found in results:
        torch.testing.assert_close(found, gradients, rtol=0, atol=(rtol * scale).item())


def test_one_row_per_rank_is_enough(make_groups, join):
    x = make_groups(num_rows=2, num_texts=2)
    expected = info_nce(*x.unbind(1), temperature=0.2)
    found = run_ranks(lambda: info_nce(*join(x)[0].unbind(1), temperature=0.2))
    torch.testing.assert_close(sum(found) / 2, expected)


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ([(3, 3), (2, 3)], r"same rows on all ranks, got \[3, 2\]; use `drop_last=True`"),
        ([(3, 3), (3, 2)], r"same texts per row on all ranks, got \[3, 2\].*one source of data"),
    ],
)
def test_ranks_with_batches_of_different_sizes_are_told_so(join, shares, sentence):
    def on_rank():
        (shape,) = join(torch.tensor(shares))
        groups = torch.ones(*shape[0], 4)
        negatives = groups[:, 2] if groups.shape[1] > 2 else None
        info_nce(groups[:, 0], groups[:, 1], negatives, temperature=1.0)

    with pytest.raises(ValueError, match=sentence):
        run_ranks(on_rank)
