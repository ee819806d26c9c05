import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from spectral_lightning.testing.tasks import TinyTask, quiet_trainer


class Snapshots(pl.Callback):
    """Keep all 2-D weights after each optimizer step, by step and layer."""

    def __init__(self):
        self.weights = {}

    def on_train_start(self, trainer, pl_module):
        self.weights[trainer.global_step] = {
            name.removesuffix(".weight"): parameter.detach().clone()
            for name, parameter in pl_module.named_parameters()
            if parameter.ndim == 2
        }

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.on_train_start(trainer, pl_module)


class AfterStep(pl.Callback):
    """Call a function with the trainer after each batch, when the callbacks before have acted."""

    def __init__(self, function):
        self.function = function

    def on_train_batch_end(self, trainer, *args):
        self.function(trainer)


@pytest.fixture(autouse=True)
def one_thread():
    """Ranks compute on one thread; two may round differently, and tiny products gain nothing."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def snapshots():
    return Snapshots()


@pytest.fixture
def after_step():
    return AfterStep


@pytest.fixture
def make_trainer(tmp_path):
    """A quiet Trainer of six optimizer steps, unless its settings say otherwise."""

    def make(*callbacks, **settings):
        return quiet_trainer(tmp_path, *callbacks, **{"max_steps": 6} | settings)

    return make


@pytest.fixture
def fit(make_trainer):
    """Fit a task, and return the Trainer."""

    def run(*callbacks, task=None, ckpt_path=None, **settings):
        trainer = make_trainer(*callbacks, **settings)
        trainer.fit(TinyTask() if task is None else task, ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture
def make_embedding_task():
    """A task that looks its input up in a table; the layers are `net.embed` and `net.head`."""

    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 6)

        def forward(self, x):
            return self.head(self.embed(x[:, 0].abs().long()))

    return lambda: TinyTask(Lookup())
