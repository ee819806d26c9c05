"""The loss inside Hugging Face models: theirs with softmax, and never left aside unnoticed."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, Trainer, TrainingArguments

from spectral_lightning.losses import CrossEntropy
from spectral_lightning.nn.functional import log_stablemax
from spectral_lightning.tasks import assert_loss_is_used, install_loss, stablemax_loss
from tests.tasks.hf_cases import CONFIGS, rows

STABLEMAX = CrossEntropy(transform="stablemax")


def make(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))


def batch():
    columns = rows()
    return {name: torch.stack([row[name] for row in columns]) for name in columns[0]}


@pytest.mark.parametrize("name", CONFIGS)
def test_softmax_is_the_loss_that_the_model_had(name):
    model, inputs = make(name), batch()
    variants = [
        {},
        {"num_items_in_batch": 17},
        {"num_items_in_batch": torch.tensor(17)},
        {"shift_labels": inputs["labels"].roll(3, 1)},
    ]
    expected = [model(**inputs, **options).loss.item() for options in variants]
    install_loss(model)
    found = [model(**inputs, **options).loss.item() for options in variants]
    assert found == pytest.approx(expected, abs=1e-6)
    assert len({round(loss, 3) for loss in found}) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_stablemax_is_computed_in_the_model_from_the_next_label(name):
    model, inputs = make(name), batch()
    hook = install_loss(model, STABLEMAX)
    assert model.loss_function is hook
    outputs = model(**inputs)
    targets = inputs["labels"][:, 1:]
    logs = log_stablemax(outputs.logits[:, :-1].double())
    nats = -logs.gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets != -100]
    assert outputs.loss.item() == pytest.approx(nats.mean().item(), rel=1e-6)


def test_another_ignored_label_and_no_label_at_all():
    model, inputs = make("llama"), batch()
    hook = install_loss(model)
    logits, labels = model(inputs["input_ids"]).logits, inputs["labels"]
    other = labels.masked_fill(labels == -100, -7)
    assert torch.equal(hook(logits, other, 40, ignore_index=-7), hook(logits, labels, 40))
    nothing = torch.full_like(labels, -100)
    loss = model(inputs["input_ids"], labels=nothing).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.isnan().any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("transform", ["softmax", "stablemax"])
def test_a_vocabulary_masked_by_minus_infinity_gives_finite_gradients(transform):
    hook = install_loss(make("llama"), CrossEntropy(transform=transform))
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    logits[..., 30:] = -torch.inf
    logits[0, 0, 1:] = -torch.inf
    logits.requires_grad_()
    hook(logits, torch.tensor([[5, 0, 3], [1, 2, 3]]), 40).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[..., 30:] == 0).all()


def test_settings_are_saved_and_taken_up_again(tmp_path):
    model = make("llama")
    model.lm_head.weight.data.mul_(50)  # far from zero, where both transforms are alike
    install_loss(model, CrossEntropy(transform="stablemax", z_loss=1e-4))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded(**batch()).loss.item() != pytest.approx(model(**batch()).loss.item(), rel=1e-3)
    assert install_loss(loaded).cross_entropy == CrossEntropy(transform="stablemax", z_loss=1e-4)
    assert loaded(**batch()).loss == model(**batch()).loss
    assert install_loss(loaded, CrossEntropy()).cross_entropy == CrossEntropy()


def test_a_copy_keeps_its_loss():
    model = make("gpt2")
    install_loss(model, STABLEMAX)
    assert copy.deepcopy(model)(**batch()).loss == model(**batch()).loss


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21
def test_peft_models_get_it_inside():
    peft = pytest.importorskip("peft")
    expected = make("llama")
    install_loss(expected, STABLEMAX)
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    hook = install_loss(model, STABLEMAX)
    assert model.get_base_model().loss_function is hook
    assert_loss_is_used(model)
    assert model(**batch()).loss == expected(**batch()).loss


class Fused(GPT2LMHeadModel):
    def forward(self, input_ids, labels=None, **kwargs):
        outputs = super().forward(input_ids)
        outputs.loss = outputs.logits.mean()
        return outputs


class Forgetful(GPT2LMHeadModel):
    def forward(self, input_ids, labels=None, **kwargs):
        return super().forward(input_ids, labels=labels)


class Stubborn(GPT2LMHeadModel):
    @property
    def loss_function(self):
        return sum

    @loss_function.setter
    def loss_function(self, value):
        pass


@pytest.mark.parametrize(("cls", "what"), [(Fused, "labels"), (Forgetful, "num_items_in_batch")])
def test_a_model_that_leaves_the_loss_aside_is_refused(cls, what):
    model = cls(copy.deepcopy(CONFIGS["gpt2"]))
    install_loss(model)
    with pytest.raises(ValueError, match=rf"must hand `?{what}`? on to its `loss_function`"):
        assert_loss_is_used(model)


def test_the_check_leaves_the_random_state_alone():
    model = make("llama")
    with pytest.raises(TypeError, match="must have a loss of ours"):
        assert_loss_is_used(model)
    install_loss(model)
    before = torch.get_rng_state()
    assert_loss_is_used(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_models_whose_loss_cannot_be_replaced_are_refused():
    with pytest.raises(TypeError, match="keeps its own"):
        install_loss(Stubborn(copy.deepcopy(CONFIGS["gpt2"])))
    with pytest.raises(TypeError, match="must be a causal LM of Hugging Face"):
        install_loss(torch.nn.Linear(2, 2))


def test_liger_is_refused_by_name():
    def forward(self, input_ids, labels=None, **kwargs):
        raise AssertionError

    forward.__module__ = "liger_kernel.transformers.model.gpt2"
    patched = type("Patched", (GPT2LMHeadModel,), {"forward": forward})
    model = patched(copy.deepcopy(CONFIGS["gpt2"]))
    with pytest.raises(ValueError, match="without `use_liger_kernel`"):
        install_loss(model)


@pytest.mark.parametrize("way", ["installed", "compute_loss_func"])
def test_hugging_face_trainer_learns_the_same_with_our_softmax(tmp_path, way):
    def train(prepare=None, **options):
        model = make("llama")
        if prepare is not None:
            prepare(model)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=0.01,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=rows(), **options)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    if way == "installed":
        found, stable = train(install_loss), train(lambda model: install_loss(model, STABLEMAX))
    else:
        found = train(compute_loss_func=stablemax_loss("softmax"))
        stable = train(compute_loss_func=stablemax_loss())
    assert found == pytest.approx(train(), abs=1e-5)
    assert stable != pytest.approx(found, abs=1e-3)
