"""What every callback must keep, for mode switching: in full mode and while it protects."""

from typing import Any, ClassVar

import pytest

from spectral_lightning.callbacks import SVDModeSwitch
from spectral_lightning.control import CalibratedPolicy, ScheduledPolicy, SeedPolicy
from spectral_lightning.testing.contracts import CallbackContract, MeasurementContract

EAGER = CalibratedPolicy(enter_erosion=0.01, exit_erosion=0.0, patience=1, dwell=0, warmup_steps=0)


class OneForEachLayer:
    """Two instances would undo each other's work, so that there is no bill to share."""

    def test_two_cost_what_the_more_demanding_one_costs(self, tmp_path):
        with pytest.raises(ValueError, match="`layers` of several SVDModeSwitch callbacks must"):
            self.fit(tmp_path, self.make(layers="net.2"), self.make(layers="net.[25]"))


class TestProtecting(OneForEachLayer, CallbackContract):
    """From the first analysis on, layers are protected."""

    callback_class = SVDModeSwitch
    init_args: ClassVar[dict[str, Any]] = {
        "every_n_steps": 1,
        "policy": ScheduledPolicy(schedule={0: "lowrank", 4: "full"}, principal=0.25),
        "protection": "two_sided",
    }
    yaml_args: ClassVar = {
        "policy": {
            "class_path": "spectral_lightning.control.ScheduledPolicy",
            "init_args": {"schedule": {0: "lowrank", 4: "full"}, "principal": 0.25},
        }
    }


class TestSwitching(OneForEachLayer, CallbackContract):
    """A policy that switches as it measures."""

    callback_class = SVDModeSwitch
    init_args: ClassVar[dict[str, Any]] = {"every_n_steps": 1, "policy": EAGER}
    yaml_args: ClassVar = {
        "policy": {
            "class_path": "spectral_lightning.control.CalibratedPolicy",
            "init_args": {
                "enter_erosion": 0.01,
                "exit_erosion": 0.0,
                "patience": 1,
                "dwell": 0,
                "warmup_steps": 0,
            },
        }
    }


class TestSeed(OneForEachLayer, CallbackContract):
    """The original's policy, which needs whole spectra."""

    callback_class = SVDModeSwitch
    init_args: ClassVar[dict[str, Any]] = {
        "every_n_steps": 1,
        "policy": SeedPolicy(preset="phase1", warmup_steps=1, rank_min=2),
        "protection": "two_sided",
    }
    yaml_args: ClassVar = {
        "policy": {
            "class_path": "spectral_lightning.control.SeedPolicy",
            "init_args": {"preset": "phase1", "warmup_steps": 1, "rank_min": 2},
        }
    }


@pytest.mark.filterwarnings("ignore:SVDModeSwitch skips the analysis")
class TestFullMode(OneForEachLayer, MeasurementContract):
    """A run that never leaves full mode is bitwise the run without the callback."""

    callback_class = SVDModeSwitch
    init_args: ClassVar[dict[str, Any]] = {
        "every_n_steps": 1,
        "policy": ScheduledPolicy(schedule={}),
    }
    yaml_args: ClassVar = {
        "policy": {
            "class_path": "spectral_lightning.control.ScheduledPolicy",
            "init_args": {"schedule": {}},
        }
    }


class TestFactored(OneForEachLayer, CallbackContract):
    """Factors kept out of the principal subspaces."""

    callback_class = SVDModeSwitch
    init_args: ClassVar[dict[str, Any]] = {
        "every_n_steps": 1,
        "policy": ScheduledPolicy(schedule={0: "lowrank", 4: "full"}, principal=0.25),
        "protection": "factored",
    }
    yaml_args: ClassVar = {
        "policy": {
            "class_path": "spectral_lightning.control.ScheduledPolicy",
            "init_args": {"schedule": {0: "lowrank", 4: "full"}, "principal": 0.25},
        }
    }
