"""What tests of several packages use."""

import lightning.pytorch as pl
import pytest


@pytest.fixture
def make_trainer():
    """A quiet Trainer on the CPU."""

    def make(**settings):
        quiet = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "max_epochs": -1,
        }
        return pl.Trainer(**quiet | settings)

    return make
