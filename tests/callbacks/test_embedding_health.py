"""Embedding health measures what it says, warns before a collapse, and never of a healthy run."""

import re
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from spectral_lightning.callbacks.embedding_health import EmbeddingHealth
from spectral_lightning.control.explosion_watch import ExplosionWatch
from spectral_lightning.linalg.embeddings import alignment, embedding_spread, unit_gram
from spectral_lightning.testing.differences import first_difference
from spectral_lightning.testing.distributed import run_ranks
from spectral_lightning.testing.host_sync import RefuseHostSync
from spectral_lightning.testing.tasks import TinyTask, quiet_trainer


class Pairs(pl.LightningModule):
    """Contrastive learning of topics; from step `onset` on nothing keeps embeddings apart."""

    def __init__(self, onset=None, lr=1e-3, num_topics=64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.topics = torch.randn(num_topics, 24, generator=self.generator)
        self.net = nn.Sequential(*widths(24, 64, 64, 32))
        self.onset, self.lr = onset, lr
        self.cosines, self.last = [], None

    def last_representations(self):
        return self.last

    def training_step(self, batch, batch_idx):
        ids = torch.randint(len(self.topics), (32,), generator=self.generator)
        noise = torch.randn(32, 2, 24, generator=self.generator)
        rows = F.normalize(self.net(self.topics[ids][:, None] + 0.3 * noise), dim=-1)
        first, second = rows.unbind(1)
        gram = first.detach() @ first.detach().T
        self.cosines.append((gram.sum() - 32).item() / (32 * 31))
        self.last = {"semantic": rows.detach(), "anomaly_score": gram[0]}
        if self.onset is not None and self.global_step >= self.onset:
            return (first - second).square().sum(-1).mean()
        same = (ids[:, None] == ids) & ~torch.eye(32, dtype=torch.bool)
        logits = (first @ second.T / 0.1).masked_fill(same, -torch.inf)
        return F.cross_entropy(logits, torch.arange(32))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(range(1000), batch_size=1)


def widths(*sizes):
    layers = [nn.Linear(m, n) for m, n in pairwise(sizes)]
    return [part for layer in layers for part in (layer, nn.ReLU())][:-1]


class Given(TinyTask):
    """Publishes given embeddings, one batch after the other, and has a gate."""

    def __init__(self, batches, **settings):
        super().__init__(num_batches=len(batches), **settings)
        self.batches, self.last = batches, None

    def training_step(self, batch, batch_idx):
        self.last = self.batches[batch_idx]
        return super().training_step(batch, batch_idx)

    def last_representations(self):
        return self.last

    def gate_values(self):
        return {"0": torch.tensor(0.25), "1": torch.tensor([0.5, 0.75])}


def given(num=6, rows=16, dim=8, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, dim) if isinstance(rows, int) else (*rows, dim)
    return [{"semantic": torch.randn(shape, generator=generator), **more} for _ in range(num)]


def run(folder, task, *callbacks, **settings):
    trainer = quiet_trainer(folder, *callbacks, **{"max_steps": 6} | settings)
    trainer.fit(task)
    return trainer


def step_of(warned, what):
    found = [re.search(rf"{what} at step (\d+)", str(w.message)) for w in warned]
    steps = [int(match[1]) for match in found if match]
    assert len(steps) == 1, [str(w.message) for w in warned]
    return steps[0]


@pytest.mark.parametrize("every_n_steps", [10, 25])
def test_warns_once_and_50_steps_before_a_collapse_shows(tmp_path, every_n_steps):
    task, health = Pairs(onset=100, lr=3e-4), EmbeddingHealth(every_n_steps)
    with pytest.warns(UserWarning, match="mean cosine is .*, on its way to above") as warned:
        run(tmp_path, task, health, max_steps=400)
    shows = next(i + 1 for i, cosine in enumerate(task.cosines) if cosine > 0.9)
    assert 100 < step_of(warned, "embeddings collapse") < shows - 50


@pytest.mark.parametrize("settings", [{}, {"lr": 1e-2}, {"num_topics": 4}, {"seed": 1, "lr": 3e-3}])
def test_a_healthy_run_is_not_warned_of(tmp_path, settings):
    run(tmp_path, Pairs(**settings), EmbeddingHealth(10), max_steps=200)  # warnings are errors


def test_constant_embeddings_are_warned_of_and_random_ones_are_not(tmp_path):
    row = torch.ones(16, 8)
    with pytest.warns(UserWarning, match="mean cosine is 1, which is above 0.999") as warned:
        trainer = run(tmp_path, Given([{"semantic": row}] * 6), EmbeddingHealth(1, buffer=16))
    assert sum("mean cosine" in str(w.message) for w in warned) == 1
    assert trainer.callback_metrics["embedding/mean_cosine"] == 1
    assert trainer.callback_metrics["embedding/effective_rank"] == 1
    run(tmp_path, Given(given()), EmbeddingHealth(1, buffer=16), max_steps=6)


def test_logs_the_measures_of_the_latest_embeddings(tmp_path):
    batches = given(rows=(8, 2), anomaly_score=torch.tensor([1.0, 3.0]))
    logger = CSVLogger(tmp_path, "", "")
    trainer = run(tmp_path, Given(batches), EmbeddingHealth(3, buffer=32), logger=logger)
    logger.save()
    found = {k: v.item() for k, v in trainer.callback_metrics.items()}
    assert found["embedding/anomaly_std"] == 1
    assert [found[f"embedding/gate/{n}"] for n in ("0", "1/0", "1/1")] == [0.25, 0.5, 0.75]
    # What is measured at step 3 arrives at step 4, and that of step 6 at the end of training.
    rows = torch.cat([batch["semantic"].flatten(0, 1) for batch in batches[1:3]])
    pairs = batches[2]["semantic"].unbind(1)
    expected = embedding_spread(unit_gram(rows))._asdict()
    expected |= {"alignment": alignment(*pairs).item(), "std": rows.std(0).mean().item()}
    for name, value in expected.items():
        assert found[f"embedding/{name}"] == pytest.approx(value, rel=1e-5), name
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {f"embedding/{name}" for name in expected} < set(header.split(","))
    steps = [line.split(",")[header.split(",").index("step")] for line in lines]
    assert steps == ["2", "5"]


def test_a_gradient_that_explodes_is_warned_of_once_and_before_clipping(tmp_path):
    class Spiky(Given):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (1e6 if batch_idx in (29, 30) else 1)

    health = EmbeddingHealth(5, buffer=16)
    with pytest.warns(UserWarning, match="its norm before clipping is .*e\\+0., above") as warned:
        run(tmp_path, Spiky(given(40), lr=1e-5), health, max_steps=40, gradient_clip_val=0.1)
    assert step_of(warned, "the gradient explodes") == 30


def test_several_batches_of_a_step_are_all_kept(tmp_path):
    health = EmbeddingHealth(1, buffer=32)
    task = Given(given(2))
    run(tmp_path, task, health, accumulate_grad_batches=2, max_steps=1)
    rows = health.state_dict()["rows"]["rows"]
    assert torch.equal(rows, torch.cat([batch["semantic"] for batch in task.batches]))


def test_the_run_is_bitwise_the_run_without_and_the_host_does_not_wait(tmp_path):
    class Refusing(EmbeddingHealth):
        def on_before_optimizer_step(self, *args):
            with RefuseHostSync():
                super().on_before_optimizer_step(*args)

        def _launch(self, *args):
            with RefuseHostSync():
                super()._launch(*args)

    tasks = [Given(given()), Given(given())]
    run(tmp_path, tasks[0], max_steps=6)
    run(tmp_path, tasks[1], Refusing(1, buffer=16), max_steps=6)
    assert first_difference(tasks[0].state_dict(), tasks[1].state_dict()) is None


def test_a_resumed_run_has_the_state_of_one_that_was_not_interrupted(tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    whole = EmbeddingHealth(2, buffer=24)
    run(tmp_path, Given(given(9)), whole, Save(), max_steps=9)
    for step in (2, 5):
        resumed = EmbeddingHealth(2, buffer=24)
        trainer = quiet_trainer(tmp_path, resumed, max_steps=9)
        path = tmp_path / f"{step}.ckpt"
        trainer.fit(Given(given(9)), ckpt_path=path, weights_only=True)
        assert first_difference(resumed.state_dict(), whole.state_dict()) is None


def test_ranks_agree_and_read_the_embeddings_of_all(tmp_path):
    def on_rank():
        health = EmbeddingHealth(1, buffer=32)
        settings = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        trainer = quiet_trainer(tmp_path, health, max_steps=3, **settings)
        task = Given([])
        task.num_batches = 3

        def fill(*args):
            task.batches = given(3, seed=trainer.global_rank)

        task.on_train_start = fill
        trainer.fit(task)
        return {k: v.item() for k, v in trainer.callback_metrics.items()}

    first, second = run_ranks(on_rank)
    assert first == second
    rows = torch.cat([given(3, seed=rank)[1]["semantic"] for rank in (0, 1)])
    expected = embedding_spread(unit_gram(rows))._asdict()
    for name, value in expected.items():
        assert first[f"embedding/{name}"] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be >= 1, got 0."),
        ({"buffer": 7}, "`buffer` must be >= 8, got 7."),
    ],
)
def test_bad_arguments_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        EmbeddingHealth(**arguments)
    assert EmbeddingHealth().explosion == ExplosionWatch()


def test_what_cannot_be_watched_is_said(tmp_path):
    with pytest.raises(TypeError, match=r"needs a module with `last_representations\(\)`.*TinyT"):
        run(tmp_path, TinyTask(), EmbeddingHealth(), max_steps=1)
    with pytest.raises(ValueError, match="`head` must be one of semantic, got 'entity'"):
        run(tmp_path, Given(given()), EmbeddingHealth(head="entity"), max_steps=1)
    with pytest.raises(ValueError, match=r"must give shape \(B, d\) or .* got \(16,\) for 'sem"):
        run(tmp_path, Given([{"semantic": torch.ones(16)}]), EmbeddingHealth(), max_steps=1)
