"""Orthogonal gradients on two ranks: whole or sharded, they are those of one process."""

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from spectral_lightning.actuators import project_
from spectral_lightning.callbacks import OrthogonalGradient
from spectral_lightning.optim import OrthogonalSGD
from spectral_lightning.testing.distributed import run_ranks
from spectral_lightning.testing.tasks import TinyNetwork, TinyTask, quiet_trainer

pytestmark = [
    pytest.mark.distributed,
    # Gloo in torch 2.13 says so at every barrier; Lightning chooses the call.
    pytest.mark.filterwarnings("ignore:.*barrier\\(\\).*device:UserWarning"),
]

KINDS = ["tensor", "row", "global", "tensor", "global", "row"]


class Sharded(TinyTask):
    """The task under FSDP2, with rows that do not divide evenly."""

    def configure_model(self):
        if isinstance(self.net[0].weight, DTensor):
            return
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[2], mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def pairs():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(7, 5, generator=generator) for _ in KINDS]
    return weights, [torch.randn(7, 5, generator=generator) + 0.5 * w for w in weights]


def project_sharded():
    """Project shards of 7 x 5 matrices, by rows and by columns; also how often ranks talked."""
    mesh, calls = init_device_mesh("cpu", (2,)), []
    weights, gradients = pairs()
    dims = [0, 0, 0, 1, 1, 1]
    split = [
        [distribute_tensor(t, mesh, [Shard(d)]) for t, d in zip(tensors, dims, strict=True)]
        for tensors in (weights, gradients)
    ]
    reduce = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *args, **kwargs: (
        calls.append(1),
        reduce(*args, **kwargs),
    )
    cosines = project_(split[1], split[0], KINDS)
    torch.distributed.all_reduce = reduce
    return [gradient.full_tensor() for gradient in split[1]], cosines, len(calls)


def fit(folder, form, **settings):
    make = TinyTask if settings.get("strategy") in (None, "ddp") else Sharded
    optimizers = {
        "wrapper": lambda net: OrthogonalSGD(net.parameters(), 0.3),
        "callback": lambda net: torch.optim.SGD(net.parameters(), 0.3),
        "neither": lambda net: torch.optim.SGD(net.parameters(), 0.3),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net: nn.Module = TinyNetwork(width=41)
    task = make(net, optimizer=optimizers[form])
    callbacks = [OrthogonalGradient(project="both")] if form == "callback" else []
    trainer = quiet_trainer(
        folder, *callbacks, max_steps=4, use_distributed_sampler=False, **settings
    )
    trainer.fit(task)
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in task.named_parameters()
    }


def on_rank(folder, strategy):
    fits = []
    for form in ("wrapper", "callback"):
        sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        chosen = "ddp" if strategy == "ddp" else sharded
        fits.append(fit(folder, form, strategy=chosen, devices=2))
    return fits, project_sharded()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_do_what_one_does(tmp_path, strategy):
    alone = [fit(tmp_path, form) for form in ("wrapper", "callback", "neither")]
    weights, gradients = pairs()
    cosines = project_(gradients, weights, KINDS)
    for fits, (found, found_cosines, num_calls) in run_ranks(on_rank, tmp_path, strategy):
        for one, two in zip(alone, fits, strict=False):
            for name, value in two.items():
                torch.testing.assert_close(value, one[name], rtol=0, atol=1e-6, msg=name)
                assert name.endswith("bias") or not torch.allclose(value, alone[2][name], atol=1e-4)
        for gradient, dense in zip(found, gradients, strict=True):
            torch.testing.assert_close(gradient, dense, rtol=0, atol=1e-6)
        torch.testing.assert_close(found_cosines, cosines, rtol=0, atol=1e-6)
        assert num_calls == 1
