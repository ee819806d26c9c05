"""Fine-tuning any Hugging Face causal LM: its loss to the digit, and every token alike."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from spectral_lightning.losses import CrossEntropy
from spectral_lightning.optim import parameter_groups
from spectral_lightning.tasks import HFCausalLM, LanguageModeling
from spectral_lightning.testing.distributed import run_ranks
from tests.tasks.hf_cases import CONFIGS, adam, loader, make, rows, settings, task

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Every label was ignored in"),
]
STABLEMAX = CrossEntropy(transform="stablemax")


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


class Losses(pl.Callback):
    """What was logged at each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(trainer.callback_metrics["train/loss"].item())


def by_hand(name, optimizer, window, num_steps):
    """Losses of a plain loop over the same batches, as Hugging Face's Trainer counts them."""
    model, losses = make(name), []
    batches = list(loader(batch_size=2))
    optimizer = optimizer(model.parameters())
    for step in range(num_steps):
        part = [batches[(step * window + i) % len(batches)] for i in range(window)]
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in part)
        losses.append(0.0)
        for batch in part:
            loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return losses, model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("window", [1, 4])
def test_losses_and_weights_are_those_of_hugging_face(make_trainer, name, window):
    expected, model = by_hand(name, sgd, window, num_steps=6)
    losses, ours = Losses(), task(name, optimizer=sgd)
    trainer = make_trainer(max_steps=6, accumulate_grad_batches=window, callbacks=[losses])
    trainer.fit(ours, loader(batch_size=2))
    assert losses.seen == pytest.approx(expected, abs=1e-6)
    for own, other in zip(ours.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(own, other, atol=1e-6)


def weights_after(make_trainer, batch_size, accumulate, num_steps=4, **options):
    ours, losses = task(optimizer=sgd, **options), Losses()
    trainer = make_trainer(
        max_steps=num_steps, accumulate_grad_batches=accumulate, callbacks=[losses]
    )
    trainer.fit(ours, loader(batch_size=batch_size))
    return torch.cat([p.detach().flatten() for p in ours.model.parameters()]), losses.seen


@pytest.mark.parametrize("loss", [None, STABLEMAX])
def test_how_a_step_is_split_into_batches_makes_no_difference(make_trainer, loss):
    whole, losses = weights_after(make_trainer, 8, 1, loss=loss)
    for batch_size, accumulate in ((4, 2), (1, 8)):
        split, others = weights_after(make_trainer, batch_size, accumulate, loss=loss)
        assert torch.allclose(split, whole, atol=2e-6)
        assert others == pytest.approx(losses, abs=1e-5)
    unweighted, _ = weights_after(make_trainer, 1, 8, loss=loss, token_weighted=False)
    assert not torch.allclose(unweighted, whole, atol=1e-3)


def test_a_short_last_window_of_an_epoch_weighs_its_tokens_alike(make_trainer):
    whole, _ = weights_after(make_trainer, 12, 1, num_steps=2)  # 16 rows: 12 and 4
    split, _ = weights_after(make_trainer, 4, 3, num_steps=2)
    assert torch.allclose(split, whole, atol=2e-6)


@pytest.mark.distributed
def test_how_a_step_is_split_over_ranks_makes_no_difference(make_trainer):
    whole, losses = weights_after(make_trainer, 8, 1, num_steps=2)

    def on_rank():
        import os

        rank = int(os.environ["LOCAL_RANK"])
        ours, seen = task(optimizer=sgd), Losses()
        trainer = make_trainer(
            devices=2,
            strategy="ddp",
            max_steps=2,
            accumulate_grad_batches=2,
            use_distributed_sampler=False,
            callbacks=[seen],
        )
        mine = [row for i, row in enumerate(rows()) if i // 4 % 2 == rank]
        trainer.fit(ours, DataLoader(mine, batch_size=2))
        trainer.validate(ours, DataLoader(mine[rank:], batch_size=2), verbose=False)
        flat = torch.cat([p.detach().flatten() for p in ours.model.parameters()])
        return flat.tolist(), seen.seen, trainer.callback_metrics["valid/loss"].item()

    (first, seen, valid), (second, *_, other_valid) = run_ranks(on_rank)
    assert first == second
    assert torch.allclose(torch.tensor(first), whole, atol=2e-6)
    assert seen == pytest.approx(losses, abs=1e-5)
    assert valid == other_valid


class Resumable:
    """Batches that an epoch can go on with."""

    def __init__(self):
        self.batches = list(loader(batch_size=2))
        self.start = self.position = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        start, self.start = self.start, 0
        for position in range(start, len(self.batches)):
            self.position = position + 1
            yield self.batches[position]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.start = state["position"]


def test_a_resumed_run_is_the_uninterrupted_one(make_trainer, tmp_path):
    options = {"accumulate_grad_batches": 2}
    whole, resumed = task(), task()
    make_trainer(max_steps=6, **options).fit(whole, Resumable())
    trainer = make_trainer(max_steps=2, **options)
    trainer.fit(task(), Resumable())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    trainer = make_trainer(max_steps=6, **options)
    trainer.fit(resumed, Resumable(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    for own, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_checkpoint_alone_builds_the_task(make_trainer, tmp_path):
    trainer, trained = make_trainer(max_steps=2), task(loss=STABLEMAX)
    trainer.fit(trained, loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = HFCausalLM.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert loaded.loss == STABLEMAX
    tokens = torch.arange(2, 10)[None]
    assert torch.equal(loaded(tokens), trained(tokens))
    given = {"model": make(), "weights_only": True}
    assert HFCausalLM.load_from_checkpoint(tmp_path / "run.ckpt", **given).loss == STABLEMAX
    with pytest.raises(ValueError, match="must fit the model"):
        HFCausalLM.load_from_checkpoint(tmp_path / "run.ckpt", model=make("gpt2"))


@pytest.mark.parametrize("options", [{"token_weighted": False}, {"dtype": "bfloat16"}])
def test_a_checkpoint_loads_as_the_task_that_it_was(make_trainer, tmp_path, options):
    trainer, trained = make_trainer(max_steps=2), task(**options)
    trainer.fit(trained, loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = HFCausalLM.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert (loaded.window is None) == (trained.window is None)
    assert next(loaded.model.parameters()).dtype == next(trained.model.parameters()).dtype


def test_validation_counts_every_token_alike(make_trainer):
    ours = task(loss=CrossEntropy(transform="stablemax", label_smoothing=0.1, z_loss=0.1))
    ours.model.lm_head.weight.data.mul_(30)
    whole = next(iter(loader(batch_size=16)))
    logits, targets = ours.model(whole["input_ids"]).logits[:, :-1], whole["labels"][:, 1:]
    (found,) = make_trainer().validate(ours, loader(batch_size=3), verbose=False)
    for name, loss in (("loss", STABLEMAX), ("softmax_loss", CrossEntropy())):
        assert found[f"valid/{name}"] == pytest.approx(loss(logits, targets).item(), rel=1e-6)
    assert found["valid/loss"] != pytest.approx(found["valid/softmax_loss"], rel=0.01)


def test_text_is_judged_as_by_language_modeling(make_trainer, make_data):
    """Windows of tokens from a data module for text, and its bits per byte."""
    torch.manual_seed(0)
    ours = HFCausalLM(settings("gpt2") | {"vocab_size": 300}, optimizer=adam)

    class Logits(torch.nn.Module):
        vocab_size, sequence_len = 300, 16

        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, tokens):
            return self.inner(tokens).logits

    twin = LanguageModeling(Logits(copy.deepcopy(ours.model)), adam)
    options = {"max_steps": 3, "num_sanity_val_steps": 1}
    metrics = []
    for module in (ours, twin):
        trainer, data = make_trainer(**options), make_data()
        trainer.fit(module, data)
        metrics.append(trainer.validate(module, data, verbose=False)[0])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    assert set(metrics[0]) == {"valid/loss", "valid/bpb"}


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_are_found_and_embeddings_told_apart(name):
    model = HFCausalLM(settings(name)).model
    roles = {group["role"]: group["params"] for group in parameter_groups(model)}
    assert roles["head"][0] is model.get_output_embeddings().weight
    assert (name == "gpt2") == (model.get_input_embeddings().weight is roles["head"][0])


def test_what_is_saved_trains_on_with_the_same_loss(make_trainer, tmp_path):
    ours = task(loss=STABLEMAX)
    logger = CSVLogger(tmp_path)
    make_trainer(max_steps=2, logger=logger, log_every_n_steps=1).fit(ours, loader())
    folder = str(tmp_path / "lightning_logs" / "version_0" / "huggingface")
    again = HFCausalLM(folder)
    assert again.loss == STABLEMAX
    assert all(module.training for module in again.model.modules())
    tokens = torch.arange(2, 10)[None]
    assert torch.equal(again(tokens), ours(tokens))
    assert HFCausalLM(folder, loss=CrossEntropy()).loss == CrossEntropy()


def test_nothing_is_saved_without_a_logger_or_when_told_so(make_trainer, tmp_path):
    make_trainer(max_steps=1, default_root_dir=tmp_path).fit(task(), loader())
    logger = CSVLogger(tmp_path)
    make_trainer(max_steps=1, logger=logger, log_every_n_steps=1).fit(
        task(save_folder=None), loader()
    )
    assert not list(tmp_path.rglob("config.json"))


def test_batches_without_labels_are_counted(make_trainer):
    data = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows(4)]
    data += [{"input_ids": row["input_ids"], "labels": row["labels"] * 0 - 100} for row in rows(2)]
    with pytest.warns(UserWarning, match="Every label was ignored in 3 of 6 batches"):
        make_trainer(max_epochs=1, accumulate_grad_batches=2).fit(
            task(), DataLoader(data, batch_size=1)
        )


def test_a_loss_that_was_replaced_is_installed_again(make_trainer):
    ours = task(loss=STABLEMAX)
    ours.model.loss_function = torch.nn.functional.cross_entropy
    make_trainer(max_steps=1).fit(ours, loader())
    assert ours.model.loss_function.cross_entropy == STABLEMAX
