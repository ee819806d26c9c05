from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader

from spectral_lightning.callbacks import OrthogonalGradient, SoftmaxCollapse
from spectral_lightning.losses import CrossEntropy
from spectral_lightning.models import GPT
from spectral_lightning.nn.collapse import softmax_collapse
from spectral_lightning.tasks import Classification, HFCausalLM, LanguageModeling
from spectral_lightning.testing.host_sync import RefuseHostSync

# Runs without validation data on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

FLOAT32 = "collapse/train/zero_loss/float32"


class Given(nn.Module):
    """Logits that are the inputs, and a weight to train."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, logits):
        return logits * self.weight


def loader(logits, targets, batch_size=8):
    return DataLoader(list(zip(logits, targets, strict=True)), batch_size=batch_size)


@pytest.fixture
def sure():
    """Eight samples of four classes: two in four collapse in float32, three in half precision."""
    gaps = torch.tensor([1.0, 14.0, 20.0, 30.0, 1.0, 14.0, 20.0, 30.0])
    return torch.outer(gaps, torch.eye(4)[2]), torch.full((8,), 2)


def classification(model=None, **options):
    return Classification(Given() if model is None else model, partial(SGD, lr=0.1), **options)


def test_fractions_in_each_dtype_are_logged(make_trainer, sure):
    trainer = make_trainer(SoftmaxCollapse(every_n_steps=1), max_steps=1, limit_val_batches=2)
    trainer.fit(classification(), loader(*sure), loader(*sure, batch_size=4))
    found = trainer.callback_metrics
    shares = {"bfloat16": 0.75, "float16": 0.75, "float32": 0.5, "float64": 0.0}
    for stage in ("train", "valid"):
        for dtype, share in shares.items():
            for kind in ("zero_loss", "zero_gradient", "absorbed"):
                assert found[f"collapse/{stage}/{kind}/{dtype}"] == share, (stage, kind, dtype)
    expected = softmax_collapse(*sure)
    torch.testing.assert_close(found["collapse/train/logit_scaling"], expected.logit_scaling)
    headroom = expected.dtypes["float32"].headroom
    for key, value in zip(("p10", "p50", "p90"), headroom, strict=True):
        assert found[f"collapse/train/headroom_{key}/float32"] == value


def test_the_transform_is_that_of_the_loss(make_trainer, sure):
    task = classification(loss=CrossEntropy(transform="stablemax"))
    trainer = make_trainer(SoftmaxCollapse(every_n_steps=1), max_steps=1)
    trainer.fit(task, loader(*sure))
    assert trainer.callback_metrics[FLOAT32] == 0


def test_a_layer_whose_scale_does_not_matter_has_a_gradient_across_its_weight(make_trainer, sure):
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 4, bias=False))
    trainer = make_trainer(SoftmaxCollapse(every_n_steps=1), max_steps=1)
    torch.manual_seed(0)
    task = classification(model)
    trainer.fit(task, loader(torch.randn(8, 4), sure[1]))
    found = trainer.callback_metrics
    assert abs(found["collapse/cos/model.0"]) < 1e-4
    assert abs(found["collapse/cos/model.2"]) > 1e-2


@pytest.mark.parametrize("order", [1, -1])
def test_cosines_are_those_of_the_whole_gradient_before_projection(make_trainer, sure, order):
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 4, bias=False), torch.randn(8, 4)
    weight = model.weight.detach().clone()
    callbacks = [SoftmaxCollapse(every_n_steps=1), OrthogonalGradient()][::order]
    trainer = make_trainer(*callbacks, max_steps=1, accumulate_grad_batches=2)
    trainer.fit(classification(model), loader(inputs, sure[1], batch_size=4))
    weight.requires_grad_()
    F.cross_entropy(inputs @ weight.T, sure[1]).backward()
    expected = F.cosine_similarity(-weight.grad.flatten(), weight.detach().flatten(), 0)
    for name in ("model", "all"):
        torch.testing.assert_close(trainer.callback_metrics[f"collapse/cos/{name}"], expected)


def test_measures_only_the_steps_that_are_due(make_trainer, sure):
    measured = []

    class Spy(SoftmaxCollapse):
        def _log(self, trainer, *args):
            measured.append(trainer.global_step)
            super()._log(trainer, *args)

    trainer = make_trainer(Spy(every_n_steps=2), accumulate_grad_batches=2)
    trainer.fit(classification(), loader(*sure, batch_size=1))
    assert measured == [2, 4, 6]


def test_the_run_is_the_same_to_the_bit_and_the_host_does_not_wait(make_trainer, sure):
    class Refusing(SoftmaxCollapse):
        def on_after_backward(self, *args):
            with RefuseHostSync():
                super().on_after_backward(*args)

        def on_train_batch_end(self, *args):
            with RefuseHostSync():
                super().on_train_batch_end(*args)

    weights = []
    for callbacks in ([], [Refusing(every_n_steps=1)]):
        torch.manual_seed(0)
        task = classification(nn.Linear(4, 4))
        make_trainer(*callbacks).fit(task, loader(*sure, batch_size=4))
        weights.append(task.model.weight.detach())
    assert torch.equal(*weights)
    assert not task.model._forward_hooks


def test_of_large_batches_evenly_spaced_samples_are_measured(make_trainer, sure):
    trainer = make_trainer(SoftmaxCollapse(every_n_steps=1, max_samples=2), max_steps=1)
    trainer.fit(classification(), loader(*sure))  # samples 0 and 4, that are unsure
    assert trainer.callback_metrics["collapse/train/zero_loss/bfloat16"] == 0


def test_works_with_language_models(make_trainer):
    tokens = torch.randint(0, 16, (4, 9), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = GPT(depth=1, vocab_size=16, sequence_len=8, model_dim=16, head_dim=8)
    with torch.no_grad():
        for weight in model.parameters():  # a new head gives zeros
            weight.normal_()
        logits = model(tokens[:, :-1])
    expected = softmax_collapse(logits.flatten(0, 1), tokens[:, 1:].flatten()).logit_scaling
    trainer = make_trainer(SoftmaxCollapse(every_n_steps=1), max_steps=1)
    task = LanguageModeling(model, optimizer=partial(SGD, lr=0.1))
    trainer.fit(task, DataLoader(tokens, batch_size=4))
    found = trainer.callback_metrics["collapse/train/logit_scaling"]
    assert abs(expected) > 0.1
    torch.testing.assert_close(found, expected)


def test_works_with_hugging_face_models_and_shifts_their_labels(make_trainer):
    config = {"model_type": "gpt2", "vocab_size": 16, "n_positions": 8, "n_embd": 16, "n_layer": 1}
    config |= {"n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config |= {"bos_token_id": 0, "eos_token_id": 1}
    tokens = torch.randint(0, 16, (4, 8), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, :3] = -100
    task = HFCausalLM(config, optimizer=partial(SGD, lr=0.1))
    with torch.no_grad():
        logits = task(tokens)[:, 2:-1]
    expected = softmax_collapse(logits.flatten(0, 1), tokens[:, 3:].flatten()).logit_scaling
    batches = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
    trainer = make_trainer(SoftmaxCollapse(every_n_steps=1), max_steps=1)
    trainer.fit(task, DataLoader(batches, batch_size=4))
    found = trainer.callback_metrics["collapse/train/logit_scaling"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be >= 1 or None, got 0."),
        ({"dtypes": ["float8"]}, "`dtypes` must be some of bfloat16, .*, got float8."),
        ({"dtypes": []}, "`dtypes` must be some of bfloat16, .*, got none."),
        ({"transform": "sparsemax"}, "`transform` must be softmax, stablemax or None, got 'spar"),
        ({"max_samples": 0}, "`max_samples` must be >= 1, got 0."),
    ],
)
def test_bad_arguments_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        SoftmaxCollapse(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"logits": "head"}, ValueError, "`logits` must name a module of the task, got 'head'"),
        ({"logits": "valid_loss"}, TypeError, "must see logits, but its module returned a NoneT"),
        ({"targets": lambda batch: batch[1][:3]}, ValueError, r"shape \(8,\), .* got \(3,\)"),
        ({"targets": None}, TypeError, "or a dict with `labels`, got a dict; give SoftmaxColl"),
    ],
)
def test_what_cannot_be_measured_is_said(make_trainer, sure, arguments, error, sentence):
    class Odd(Classification):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    rows, task = list(zip(*sure, strict=True)), classification()
    if sentence.startswith("or a dict"):
        rows = [{"x": x, "y": y} for x, y in rows]
        task = Odd(Given(), partial(SGD, lr=0.1))
    trainer = make_trainer(SoftmaxCollapse(every_n_steps=1, **arguments))
    with pytest.raises(error, match=sentence):
        trainer.fit(task, DataLoader(rows, batch_size=8))
