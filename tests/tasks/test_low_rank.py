"""Low-rank models as language models: causal, and of any capacity that their ranks fit into."""

import pytest
import torch

from spectral_lightning.models import LowRankTransformer
from spectral_lightning.nn import LowRankLinear
from spectral_lightning.tasks import LanguageModeling


def make_model(data, **settings):
    torch.manual_seed(0)
    options = {"depth": 1, "model_dim": 32, "num_heads": 2, "rank": 4, "capacity": 8} | settings
    return LowRankTransformer(data.vocab_size, data.sequence_len, **options)


@pytest.mark.parametrize("num_sanity_val_steps", [0, 1])
def test_a_model_that_sees_the_next_token_is_refused(make_trainer, make_data, num_sanity_val_steps):
    """In the sanity check, or where that is left out at the start of training."""
    data = make_data()
    task = LanguageModeling(make_model(data, bidirectional=True))
    trainer = make_trainer(max_steps=2, num_sanity_val_steps=num_sanity_val_steps)
    with pytest.raises(ValueError, match="`model` must be causal, got logits at position 0"):
        trainer.fit(task, datamodule=data)
    assert trainer.global_step == 0


@pytest.mark.parametrize("width", [64, 256])
def test_a_leak_that_is_small_at_first_is_refused_too(make_trainer, make_data, width):
    """Initial values of 0.02 hide the future at first; training finds it."""
    data = make_data()
    model = LowRankTransformer.v18(
        data.vocab_size,
        sequence_len=data.sequence_len,
        depth=2,
        model_dim=width,
        num_heads=4,
        rank=16,
        capacity=16,
        bidirectional=True,
    )
    with pytest.raises(ValueError, match="`model` must be causal"):
        make_trainer(max_steps=1).fit(LanguageModeling(model), datamodule=data)


def test_the_check_leaves_the_run_as_it_is(make_trainer, make_data, monkeypatch):
    losses = []
    for steps in (0, 1, None):
        if steps is None:
            module = "spectral_lightning.tasks.language_modeling"
            monkeypatch.setattr(f"{module}.assert_causal", lambda *args, **kwargs: None)
        data = make_data()
        task = LanguageModeling(make_model(data, dropout=0.1))
        trainer = make_trainer(max_steps=3, num_sanity_val_steps=steps or 0)
        torch.manual_seed(1)
        trainer.fit(task, datamodule=data)
        losses.append(trainer.callback_metrics["train/loss"].item())
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("capacity", [4, 16])
def test_a_checkpoint_loads_into_another_capacity(make_trainer, make_data, tmp_path, capacity):
    data = make_data()
    trainer = make_trainer(max_steps=2)
    task = LanguageModeling(make_model(data))
    trainer.fit(task, datamodule=data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    other = LanguageModeling.load_from_checkpoint(
        tmp_path / "run.ckpt", model=make_model(data, rank=2, capacity=capacity)
    )
    tokens = torch.arange(8)[None]
    layers = [m for m in other.modules() if isinstance(m, LowRankLinear)]
    assert {layer.rank for layer in layers} == {4}
    assert {layer.capacity for layer in layers} == {capacity}
    assert torch.allclose(other.eval()(tokens), task.cpu().eval()(tokens), atol=1e-5)


def test_a_capacity_below_the_ranks_of_a_checkpoint_is_refused(make_trainer, make_data, tmp_path):
    data = make_data()
    trainer = make_trainer(max_steps=1)
    trainer.fit(LanguageModeling(make_model(data)), datamodule=data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    small = make_model(data, rank=2, capacity=2)
    with pytest.raises(ValueError, match="`capacity` must be at least the rank of the checkpoint"):
        LanguageModeling.load_from_checkpoint(tmp_path / "run.ckpt", model=small)
