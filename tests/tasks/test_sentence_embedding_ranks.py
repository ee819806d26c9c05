"""Two processes over gloo do what one does with the whole batch."""

import os
from itertools import chain, combinations

import pytest
import torch

from spectral_lightning.data import PairsSource
from spectral_lightning.losses import LearnableTemperature
from spectral_lightning.testing.distributed import run_ranks
from tests.data.pairs_cases import SCORED, pairs
from tests.tasks.embedding_cases import (
    assert_same,
    loader,
    make_batch,
    make_task,
    pairs_data,
    weights,
)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

PARTS = ("spectral", "anchor", "bridge", "angular")
SUBSETS = [list(s) for s in chain.from_iterable(combinations(PARTS, n) for n in range(5))]


def share(batch, rank):
    size = len(batch["text_ids"]) // 2
    return {name: rows[rank * size : (rank + 1) * size] for name, rows in batch.items()}


def fitted(make_trainer, task, batches, rank=None):
    """Weights after a step on each batch, of which a rank has its half."""
    strategy = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    trainer = make_trainer(max_steps=len(batches), **({} if rank is None else strategy))
    trainer.fit(task, loader(*(batches if rank is None else [share(b, rank) for b in batches])))
    return weights(task)


def on_two_ranks(function):
    def run():
        return function(int(os.environ["LOCAL_RANK"]))

    return run_ranks(run)


@pytest.mark.parametrize("settings", [{}, {"chunk_size": 5, "recompute": True}], ids=str)
@pytest.mark.parametrize("num_columns", [2, 3])
def test_two_ranks_take_the_step_of_one_with_the_whole_batch(make_trainer, settings, num_columns):
    batches = [make_batch(8, num_columns)]

    def run(rank):
        return fitted(make_trainer, make_task(**settings).double(), batches, rank)

    first, second = on_two_ranks(run)
    assert_same(first, second, atol=0)
    assert_same(first, fitted(make_trainer, make_task().double(), batches), atol=1e-12)


def test_every_combination_of_parts_trains_under_ddp(make_trainer):
    batches = [make_batch(4), make_batch(4, seed=1)]

    def run(rank):
        for without in SUBSETS:
            task = make_task({"num_hidden_layers": 1}, without=without)
            fitted(make_trainer, task, batches, rank)
        return True

    assert on_two_ranks(run) == [True, True]


def test_every_parameter_has_a_gradient_in_a_batch_of_scored_pairs(make_trainer):
    """A second step under DDP fails if one had none in the first."""
    scored = make_batch(4, scores=torch.linspace(0, 1, 4))

    def run(rank):
        task = make_task(temperature=LearnableTemperature())
        fitted(make_trainer, task, [scored, scored, make_batch(4)], rank)
        return True

    assert on_two_ranks(run) == [True, True]


def test_a_given_model_with_a_head_that_nothing_trains_runs_under_ddp(make_trainer):
    batches = [make_batch(4), make_batch(4, seed=1)]

    def run(rank):
        model = make_task().model
        task = make_task(model, without=["anchor", "bridge"])
        return fitted(make_trainer, task, batches, rank)

    before, (after, _) = weights(make_task()), on_two_ranks(run)
    assert torch.equal(after["heads.anchor.output.weight"], before["heads.anchor.output.weight"])


def test_two_ranks_evaluate_as_one(make_trainer, tmp_path):
    settings = {"valid_fraction": 0.3, "sts": {"own": PairsSource(records=SCORED[:21])}}
    source = PairsSource(records=pairs(50))
    pairs_data(tmp_path, source, **settings).prepare_data()

    def numbers(**options):
        data = pairs_data(tmp_path, source, eval_batch_size=4, **settings)
        (found, *more) = make_trainer(**options).validate(make_task(), data, verbose=False)
        return found | {name: value for one in more for name, value in one.items()}

    def run(rank):
        return numbers(devices=2, strategy="ddp")

    one = numbers()
    first, second = on_two_ranks(run)
    assert first == second
    measures = {name: value for name, value in one.items() if name != "valid/loss"}
    assert len(measures) > 50
    assert first.keys() == one.keys()
    for name, value in measures.items():
        assert first[name] == pytest.approx(value, abs=1e-5), name
