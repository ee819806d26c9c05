import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from spectral_lightning.callbacks import ASSR, RankAdaptation, SpectralMonitor, SVDModeSwitch
from spectral_lightning.nn import factorize
from spectral_lightning.optim import MuonAdamW, parameter_groups
from spectral_lightning.testing.distributed import run_ranks
from spectral_lightning.testing.tasks import TinyNetwork, TinyTask, quiet_trainer


class Task(TinyTask):
    """Layers whose rows do not divide evenly among two ranks."""

    def __init__(self, muon=False):
        super().__init__(TinyNetwork(width=41))
        self.muon = muon

    def configure_optimizers(self):
        if self.muon:
            groups = parameter_groups(self.net)
            return MuonAdamW(groups, weight_decay=0.1, ns_dtype="float32")
        return super().configure_optimizers()


class ShardedTask(Task):
    """The task under FSDP2, every parameter of it."""

    def configure_model(self):
        if isinstance(self.net[0].weight, DTensor):
            return
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[2], mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def fit(
    folder,
    strategy,
    task,
    *,
    ckpt_path=None,
    save=None,
    assr=None,
    svd=None,
    ranks=None,
    muon=False,
    **changes,
):
    """Fit, and return what a rank knows: readings, weights and metrics.

    With `assr`, the arguments of an ASSR callback, its interventions are among the metrics; with
    `svd`, those of mode switching, the modes and protected bases; with `ranks`, those of rank
    adaptation, whose layers become low-rank ones, the ranks.
    """
    task.muon = muon
    if ranks is not None:
        factorize(task.net, ["2", "5"], rank=8, capacity=16)
    monitor = SpectralMonitor(spectrum_every_n_steps=3)
    callbacks = [monitor] if assr is None else [monitor, ASSR(**assr)]
    callbacks += [] if svd is None else [SVDModeSwitch(**svd)]
    callbacks += [] if ranks is None else [RankAdaptation(**ranks)]
    logger = CSVLogger(folder, name="", version="")
    arguments = {"max_steps": 6, "strategy": strategy, "logger": logger} | changes
    trainer = quiet_trainer(folder, *callbacks, use_distributed_sampler=False, **arguments)
    trainer.fit(task, ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    weights = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in task.named_parameters()
    }
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    if assr is not None:
        metrics["interventions"] = callbacks[1].interventions
    if svd is not None:
        metrics["modes"] = callbacks[-1].modes
        metrics["bases"] = {name: part.left for name, part in callbacks[-1].parts.items()}
    if ranks is not None:
        metrics["ranks"] = callbacks[-1].ranks
    return monitor.readings, weights, metrics


@pytest.fixture(autouse=True)
def one_thread():
    """Ranks compute on one thread; two may round differently, and tiny products gain nothing."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def fit_one(tmp_path):
    """Fit in this process."""
    return lambda **changes: fit(tmp_path / "one", "auto", Task(), **changes)


@pytest.fixture
def fit_ddp(tmp_path):
    """Fit on two ranks that hold the whole model each."""

    def on_rank(changes):
        return fit(tmp_path / "ddp", "ddp", Task(), devices=2, **changes)

    return lambda **changes: run_ranks(on_rank, changes)


@pytest.fixture
def fit_sharded(tmp_path):
    """Fit on two ranks that hold half of every weight each."""

    def on_rank(changes):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        return fit(tmp_path / "fsdp2", strategy, ShardedTask(), devices=2, **changes)

    return lambda **changes: run_ranks(on_rank, changes)


@pytest.fixture(params=["ddp", "sharded"])
def fit_two(request):
    """Fit on two ranks, in either way."""
    return request.getfixturevalue(f"fit_{request.param}")


@pytest.fixture
def largest_value():
    return lambda weight: torch.linalg.svdvals(weight.double())[0].item()
