"""Low-rank layers that learn linear teachers, whose rank is known and changes during a run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from spectral_lightning.nn import LowRankLinear, factorize
from spectral_lightning.testing.tasks import TinyTask


class TeacherTask(TinyTask):
    """Each layer ``net.<i>`` learns a matrix of its own; the ranks change from phase to phase.

    Inputs are new and isotropic at every step, the loss is the mean squared error, so that a layer
    needs just as many components as its teacher has. Teachers of a layer are nested: of
    ``U diag(decay**i) V^T``, with random orthonormal ``U`` and ``V``, one of rank ``r`` has the
    first ``r`` components.

    Args:
        phases: Rank of each layer's teacher, for each phase; the last phase goes on for ever.
        phase_steps: Optimizer steps of a phase.
        rank: Components of each layer at the start.
        capacity: Most components of each layer.
        dim: Inputs and outputs of each layer.
        batch_size: Inputs of a step.
        decay: Ratio of neighbouring singular values of the teachers; 1 for equal ones.
        lr: Learning rate of AdamW.
        seed: Seed of all random numbers.
    """

    def __init__(
        self,
        phases: Sequence[Sequence[int]],
        phase_steps: int,
        *,
        rank: int,
        capacity: int,
        dim: int = 64,
        batch_size: int = 64,
        decay: float = 1.0,
        lr: float = 3e-3,
        seed: int = 0,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in phases[0])
            bases = [[nn.init.orthogonal_(torch.empty(dim, dim)) for _ in "UV"] for _ in net]
        factorize(net, rank=rank, capacity=capacity)
        super().__init__(net, num_batches=phase_steps * len(phases), lr=lr)
        self.phases, self.phase_steps = phases, phase_steps
        self.batch_size, self.dim = batch_size, dim
        values = decay ** torch.arange(dim)
        self.teachers = [
            [(U[:, :r] * values[:r]) @ V[:, :r].mT for r, (U, V) in zip(ranks, bases, strict=True)]
            for ranks in phases
        ]
        self.generator = torch.Generator().manual_seed(seed)
        self.ranks: list[tuple[int, ...]] = []
        """Ranks of all layers after each optimizer step."""

    @property
    def phase(self) -> int:
        """Index of the present phase."""
        return min(self.trainer.global_step // self.phase_steps, len(self.phases) - 1)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of all layers' mean squared errors."""
        x = torch.randn(self.batch_size, self.dim, generator=self.generator)
        errors = [
            nn.functional.mse_loss(layer(x), x @ teacher.mT)
            for layer, teacher in zip(self._layers, self.teachers[self.phase], strict=True)
        ]
        return torch.stack(errors).sum()

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the ranks, after all callbacks have acted."""
        self.ranks.append(tuple(layer.rank for layer in self._layers))

    @property
    def _layers(self) -> list[LowRankLinear]:
        return [layer for layer in self.net.modules() if isinstance(layer, LowRankLinear)]
