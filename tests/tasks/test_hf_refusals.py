"""What `HFCausalLM` refuses, in a sentence: models, strategies, data and settings."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel

from spectral_lightning.losses import CrossEntropy
from spectral_lightning.tasks import HFCausalLM
from tests.tasks.hf_cases import CONFIGS, loader, make, task

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Every label was ignored in"),
]
STABLEMAX = CrossEntropy(transform="stablemax")


class Fused(GPT2LMHeadModel):
    def forward(self, input_ids, labels=None, **kwargs):
        outputs = super().forward(input_ids)
        outputs.loss = outputs.logits.mean()
        return outputs


def test_a_model_that_computes_its_own_loss_is_refused(make_trainer):
    ours = HFCausalLM(Fused(copy.deepcopy(CONFIGS["gpt2"])), STABLEMAX)
    with pytest.raises(ValueError, match="must hand labels on to its `loss_function`"):
        make_trainer(max_steps=1).fit(ours, loader())


def test_a_model_that_sees_the_future_is_refused(make_trainer):
    ours = HFCausalLM(
        {
            "model_type": "bert",
            "vocab_size": 40,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
    )
    with pytest.raises(ValueError, match="must be causal"):
        make_trainer(max_steps=1, num_sanity_val_steps=1).fit(ours, loader(), loader())


class DeepSpeedStrategy(pl.strategies.SingleDeviceStrategy):
    pass


def test_deepspeed_is_refused(make_trainer):
    trainer = make_trainer(max_steps=1, strategy=DeepSpeedStrategy("cpu"))
    with pytest.raises(ValueError, match="must not be DeepSpeed"):
        trainer.fit(task(), loader())


class Data(pl.LightningDataModule):
    def __init__(self, **attributes):
        super().__init__()
        vars(self).update(attributes)

    def train_dataloader(self):
        return loader()


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ({"vocab_size": 41}, "an embedding for each of the 41 token ids"),
        ({"sequence_len": 17}, "`sequence_len` of the data must be at most 16"),
    ],
)
def test_data_of_another_size_are_refused(make_trainer, attributes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_trainer(max_steps=1).fit(task(), Data(**attributes))


@pytest.mark.parametrize(
    ("batch", "error"),
    [([1, 2], "must be a dict"), ({"input_ids": torch.ones(1, 4).long()}, "`labels` when")],
)
def test_batches_of_another_kind_are_refused(make_trainer, batch, error):
    with pytest.raises((TypeError, ValueError), match=error):
        make_trainer(max_steps=1).fit(task(), DataLoader([batch] * 2, batch_size=None))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"warmup_steps": -1}, "`warmup_steps` must be >= 0"),
        ({"final_fraction": 2.0}, r"`final_fraction` must be in \[0, 1\]"),
        ({"sample_tokens": 0}, "`sample_tokens` must be >= 1"),
        ({"dtype": "int8"}, "`dtype` must name a floating dtype"),
    ],
)
def test_settings_outside_their_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        HFCausalLM(make(), **options)


def test_an_unused_warmup_is_named():
    with pytest.warns(UserWarning, match="`warmup_steps` has no effect"):
        HFCausalLM(
            make(), warmup_steps=1, lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, id)
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_sees_the_future_is_refused_without_a_sanity_check(make_trainer, dtype):
    bert = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
    task = HFCausalLM(bert | {"num_attention_heads": 2, "intermediate_size": 32}, dtype=dtype)
    with pytest.raises(ValueError, match="`model` must be causal"):
        make_trainer(max_steps=1, num_sanity_val_steps=0).fit(task, loader())
