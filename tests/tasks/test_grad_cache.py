"""Gradient caching: the gradients of the whole batch, whatever the chunks, dropout and ranks."""

import os

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from spectral_lightning.losses import LearnableTemperature, info_nce
from spectral_lightning.tasks.grad_cache import GradCache
from spectral_lightning.testing.distributed import run_ranks

CHUNKS = [3, 4, 1]  # of eight texts, two to a group


class Network(nn.Module):
    """Two heads with dropout, and a learned temperature."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Dropout(dropout))
        self.heads = nn.ModuleDict({name: nn.Linear(16, 4) for name in ("semantic", "ranking")})
        self.temperature = LearnableTemperature(start=0.3)

    def forward(self, x):
        hidden = self.body(x)
        return {name: head(hidden) for name, head in self.heads.items()}


@pytest.fixture
def texts():
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


def contrast(heads, temperature):
    pairs = [rows.unflatten(0, (-1, 2)).unbind(1) for rows in heads.values()]
    return sum(info_nce(*pair, temperature=temperature) for pair in pairs)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def at_once(model, chunks):
    """Forward of all chunks with their graphs kept."""
    parts = [model(chunk) for chunk in chunks]
    heads = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    loss = contrast(heads, model.temperature())
    loss.backward()
    return loss.detach()


def cached(model, chunks, **options):
    """The same with gradient caching; `model` may be wrapped."""
    own = getattr(model, "module", model)
    cache = GradCache(model, chunks, **options)
    loss = contrast(cache.representations, cache.detach(own.temperature()))
    cache.backward(loss)
    return loss.detach()


def assert_same_gradients(model, other):
    torch.testing.assert_close(gradients(model), gradients(other), rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_the_whole_batch(texts):
    model, whole = Network(), Network()
    torch.testing.assert_close(cached(model, texts.split(CHUNKS)), at_once(whole, [texts]))
    assert_same_gradients(model, whole)


def test_dropout_and_random_numbers_are_those_of_one_pass(texts):
    chunks = texts.split(CHUNKS)
    model, whole = Network(dropout=0.5), Network(dropout=0.5)
    torch.manual_seed(2)
    expected, state = at_once(whole, chunks), torch.get_rng_state()
    torch.manual_seed(2)
    torch.testing.assert_close(cached(model, chunks), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_gradients(model, whole)


def test_random_numbers_go_on_after_a_failure(texts):
    model = Network(dropout=0.5)
    cache = GradCache(model, texts.split(4))
    state = torch.get_rng_state()
    model.heads["ranking"].forward = None
    with pytest.raises(TypeError):
        cache.backward(contrast(cache.representations, 0.1))
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_learn_under_autocast(texts):
    model, whole = Network(), Network()
    with torch.autocast("cpu", torch.bfloat16):
        cached(model, texts.split(CHUNKS))
    with torch.autocast("cpu", torch.bfloat16):
        at_once(whole, texts.split(CHUNKS))
    torch.testing.assert_close(gradients(model), gradients(whole), rtol=1e-2, atol=1e-3)


def test_only_one_chunk_is_on_the_graph_and_only_the_last_synchronises(texts):
    model, calls = Network(), []

    class NoSync:
        def __enter__(self):
            calls.append("enter")

        def __exit__(self, *_):
            calls.append("exit")

    def encode(chunk):
        calls.append("graph" if torch.is_grad_enabled() else "plain")
        return model(chunk)

    cache = GradCache(encode, texts.split(4), no_sync=NoSync)
    cache.backward(
        contrast(cache.representations, 0.1), lambda x: (calls.append("backward"), x.backward())
    )
    assert calls == ["plain", "plain", "enter", "graph", "backward", "exit", "graph", "backward"]


def test_representations_that_the_loss_leaves_out_need_no_gradient(texts):
    model = Network()
    cache = GradCache(model, texts.split(4))
    cache.backward(cache.representations["semantic"].square().sum())
    assert model.heads["semantic"].weight.grad.any()
    assert model.heads["ranking"].weight.grad is None


@pytest.mark.distributed
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_ranks_have_the_gradients_of_the_whole_batch(texts, dropout):
    whole, chunks = Network(dropout), texts.split(2)
    torch.manual_seed(2)
    states = []
    for chunk in chunks:  # where each rank has to start for the same dropout
        states.append(torch.get_rng_state())
        whole(chunk)
    torch.manual_seed(2)
    expected = at_once(whole, chunks)

    def on_rank():
        rank = int(os.environ["LOCAL_RANK"])
        dist.init_process_group("gloo", rank=rank, world_size=2)
        model = DistributedDataParallel(Network(dropout))
        losses = []
        for _ in range(2):  # the second time fails if the first was not finished
            model.zero_grad()
            torch.set_rng_state(states[2 * rank])
            losses.append(cached(model, chunks[2 * rank :][:2], no_sync=model.no_sync))
        return losses[-1], gradients(model.module)

    (first, found), (second, other) = run_ranks(on_rank)
    torch.testing.assert_close((first + second) / 2, expected)
    for result in (found, other):
        torch.testing.assert_close(result, gradients(whole), rtol=1e-6, atol=1e-6)


class Task(pl.LightningModule):
    """One step of manual optimization, gradient caching or not."""

    def __init__(self, is_cached):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.is_cached, self.found = Network(), is_cached, None

    def training_step(self, batch, batch_idx):
        if self.is_cached:
            no_sync = self.trainer.strategy.block_backward_sync
            cache = GradCache(self.net, batch.split(1), device=self.device, no_sync=no_sync)
            temperature = cache.detach(self.net.temperature())
            cache.backward(contrast(cache.representations, temperature), self.manual_backward)
        else:
            self.manual_backward(contrast(self.net(batch), self.net.temperature()))
        self.found = gradients(self.net)
        self.optimizers().step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_train_batch_start(self, batch, batch_idx):
        self.zero_grad()


@pytest.mark.distributed
def test_under_lightning_ranks_have_the_gradients_of_the_whole_batch(texts, make_trainer):
    def fit(is_cached, batch_size, **settings):
        task = Task(is_cached)
        trainer = make_trainer(max_steps=2, use_distributed_sampler=False, **settings)
        rank = int(os.environ.get("LOCAL_RANK", 0))
        rows = texts[batch_size * rank :][:batch_size]
        trainer.fit(task, DataLoader(torch.cat([rows, rows]), batch_size=batch_size))
        return task.found

    expected = fit(False, 8)
    for found in run_ranks(lambda: fit(True, 4, devices=2, strategy="ddp")):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_on_a_device_is_that_of_one_pass(texts):
    chunks = texts.cuda().split(CHUNKS)
    model, whole = Network(dropout=0.5).cuda(), Network(dropout=0.5).cuda()
    torch.manual_seed(2)
    expected, state = at_once(whole, chunks), torch.cuda.get_rng_state()
    torch.manual_seed(2)
    torch.testing.assert_close(cached(model, chunks, device="cuda"), expected)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    torch.testing.assert_close(gradients(model), gradients(whole), rtol=1e-5, atol=1e-5)


def test_a_batch_has_chunks():
    with pytest.raises(ValueError, match="`chunks` must be at least one part of a batch, got none"):
        GradCache(Network(), [])


def test_a_loss_of_something_else_is_refused(texts):
    model = Network()
    cache = GradCache(model, [texts])
    temperature = cache.detach(model.temperature())
    with pytest.raises(ValueError, match="`loss` must be computed from `representations`"):
        cache.backward(temperature.square())
