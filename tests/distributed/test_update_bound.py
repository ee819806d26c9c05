"""An update bound on two ranks: the same steps, whole or sharded, as in one process."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from spectral_lightning.callbacks import RankAdaptation, UpdateBound
from spectral_lightning.nn import factorize
from spectral_lightning.testing.distributed import run_ranks
from spectral_lightning.testing.ranks import Plan
from spectral_lightning.testing.tasks import TinyNetwork, TinyTask, quiet_trainer

BOUND = 0.05

pytestmark = [
    pytest.mark.distributed,
    # Gloo in torch 2.13 says so at every barrier; Lightning chooses the call.
    pytest.mark.filterwarnings("ignore:.*barrier\\(\\).*device:UserWarning"),
]


class Task(TinyTask):
    """Factors whose rows do not divide evenly among two ranks, and steps far outside the bound."""

    def __init__(self):
        net = TinyNetwork(width=41)
        factorize(net, ["2", "5"], rank=7, capacity=15)
        super().__init__(net, lr=3.0)


class ShardedTask(Task):
    def configure_model(self):
        if not isinstance(self.net[0].weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[2], mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class Steps(pl.Callback):
    """How far each optimizer step moved ``net.2``; has to be last in the list."""

    def __init__(self):
        self.sizes = []

    def on_train_start(self, trainer, pl_module):
        def before(*args):
            self.old = pl_module.net[2].spectral_weight().detach()

        def after(*args):
            change = pl_module.net[2].spectral_weight().detach() - self.old
            self.sizes.append(torch.linalg.matrix_norm(change, 2).item())

        trainer.optimizers[0].register_step_pre_hook(before)
        trainer.optimizers[0].register_step_post_hook(after)


def fit(folder, task, **changes):
    bound = UpdateBound("net.[25]", max_update_norm=BOUND)
    ranks = RankAdaptation("net.[25]", Plan(ranks={2: 4, 4: 9}), 1, "cut", probe_steps=2)
    steps = Steps()
    settings = {"max_steps": 6, "use_distributed_sampler": False} | changes
    quiet_trainer(folder, bound, ranks, steps, **settings).fit(task)
    weights = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in task.named_parameters()
    }
    return steps.sizes, weights


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_both_ranks_bound_their_steps_as_one_process_does(tmp_path, kind):
    def on_rank():
        if kind == "ddp":
            return fit(tmp_path, Task(), devices=2, strategy="ddp")
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        return fit(tmp_path, ShardedTask(), devices=2, strategy=strategy)

    sizes, weights = fit(tmp_path, Task())
    (first, one), (second, two) = run_ranks(on_rank)
    assert first == second
    assert first == pytest.approx(sizes, rel=1e-3)
    assert all(0.01 * BOUND < size <= BOUND for size in first)
    for name, weight in weights.items():
        assert torch.equal(one[name], two[name]), name
        assert torch.allclose(one[name], weight, rtol=1e-3, atol=1e-3), name
