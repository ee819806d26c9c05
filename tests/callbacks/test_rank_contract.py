"""What every callback must keep, for rank adaptation: with changes of rank and without."""

from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest

from spectral_lightning.callbacks import RankAdaptation
from spectral_lightning.testing.contracts import CallbackContract, MeasurementContract
from spectral_lightning.testing.ranks import Plan, low_rank_task


class LowRankTask:
    """Two of the task's layers are low-rank ones."""

    def make_task(self, **settings: Any) -> pl.LightningModule:
        """Return a fresh task."""
        return low_rank_task(**settings)

    def test_two_cost_what_the_more_demanding_one_costs(self, tmp_path):
        with pytest.raises(ValueError, match="`layers` of several RankAdaptation callbacks must"):
            self.fit(tmp_path, self.make(layers="net.2"), self.make(layers="net.[25]"))


def plan(ranks):
    return {
        "controller": {
            "class_path": "spectral_lightning.testing.ranks.Plan",
            "init_args": {"ranks": ranks},
        }
    }


CHANGES = {1: 5, 2: 7, 3: 14, 4: 6, 5: 9}


class TestCutting(LowRankTask, CallbackContract):
    """Ranks change at every step, at once."""

    callback_class = RankAdaptation
    init_args: ClassVar[dict[str, Any]] = {
        "every_n_steps": 1,
        "controller": Plan(ranks=CHANGES),
        "shrink": "cut",
        "probe_steps": 2,
    }
    yaml_args: ClassVar = plan(CHANGES)


class TestFading(LowRankTask, CallbackContract):
    """Checkpoints fall into the middle of a fade and of a window of probes."""

    callback_class = RankAdaptation
    init_args: ClassVar[dict[str, Any]] = {
        "every_n_steps": 1,
        "controller": Plan(ranks={2: 5}),
        "fade_steps": 2,
        "probe_steps": 2,
    }
    yaml_args: ClassVar = plan({2: 5})


class TestConstantRank(LowRankTask, MeasurementContract):
    """A run whose ranks never change is bitwise the run without the callback."""

    callback_class = RankAdaptation
    init_args: ClassVar[dict[str, Any]] = {
        "every_n_steps": 1,
        "controller": Plan(),
        "probes": 0,
    }
    yaml_args: ClassVar = plan({})
