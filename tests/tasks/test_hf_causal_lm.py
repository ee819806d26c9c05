"""Fine-tuning any Hugging Face causal LM: its loss to the digit, and every token alike."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from spectral_lightning.callbacks import ASSR, SpectralMonitor, SVDModeSwitch
from spectral_lightning.control import Regulator
from spectral_lightning.losses import CrossEntropy
from spectral_lightning.optim import parameter_groups
from spectral_lightning.tasks import HFCausalLM, LanguageModeling
from spectral_lightning.testing.distributed import run_ranks
from tests.tasks.hf_cases import CONFIGS, loader, rows, settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Every label was ignored in"),
]
STABLEMAX = CrossEntropy(transform="stablemax")


def make(name="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def adam(groups):
    return torch.optim.AdamW(groups, lr=0.01)


def task(name="llama", optimizer=adam, **options):
    return HFCausalLM(make(name), optimizer=optimizer, warmdown_fraction=0.0, **options)


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


@pytest.mark.filterwarnings("ignore:ASSR finds .* outside their bands at once")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_spectral_callbacks_run_unchanged(make_trainer, tmp_path, name):
    callbacks = [
        SpectralMonitor(every_n_steps=1, table_rows=0),
        ASSR(layers="*mlp*", table_rows=0, regulator=Regulator(calibration="static", floor=2.0)),
        SVDModeSwitch(layers="*attn*", every_n_steps=1),
    ]
    trainer = make_trainer(max_steps=4, accumulate_grad_batches=2, callbacks=callbacks)
    trainer.fit(task(name), loader())
    layer = "transformer.h.0.mlp.c_fc" if name == "gpt2" else "model.layers.0.mlp.up_proj"
    assert f"model.{layer}" in callbacks[0].readings
    assert callbacks[1].assr_stats["rank_int"] > 0
    assert callbacks[2].modes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_monitor_and_recomputed_activations_change_nothing(make_trainer, name):
    runs = []
    for options, callbacks in (({}, []), ({"gradient_checkpointing": True}, [SpectralMonitor()])):
        ours, calls = task(name, **options), []
        mlp = next(m for n, m in ours.model.named_modules() if n.endswith("0.mlp"))
        mlp.register_forward_pre_hook(lambda mlp, _, calls=calls: calls.append(mlp.training))
        make_trainer(max_steps=3, callbacks=callbacks).fit(ours, loader())
        assert sum(calls) == (6 if options else 3)
        runs.append(list(ours.model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", CONFIGS)
def test_each_layer_is_compiled_by_itself(make_trainer, name):
    plain, compiled = task(name), task(name, compile=True)
    make_trainer(max_steps=2).fit(plain, loader())
    with torch.compiler.set_stance("force_eager"):  # a compiler takes longer than all tests here
        make_trainer(max_steps=2).fit(compiled, loader())
    done = [n for n, module in compiled.model.named_modules() if module._compiled_call_impl]
    assert len(done) == 2
    assert all(layer.endswith(("layers.0", "h.0", "layers.1", "h.1")) for layer in done)
    assert plain.model.state_dict().keys() == compiled.model.state_dict().keys()


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


class Fused(GPT2LMHeadModel):
    def forward(self, input_ids, labels=None, **kwargs):
        outputs = super().forward(input_ids)
        outputs.loss = outputs.logits.mean()
        return outputs


def test_a_model_that_computes_its_own_loss_is_refused(make_trainer):
    ours = HFCausalLM(Fused(copy.deepcopy(CONFIGS["gpt2"])), STABLEMAX)
    with pytest.raises(ValueError, match="must hand labels on to its `loss_function`"):
        make_trainer(max_steps=1).fit(ours, loader())


def test_a_loss_that_was_replaced_is_installed_again(make_trainer):
    ours = task(loss=STABLEMAX)
    ours.model.loss_function = torch.nn.functional.cross_entropy
    make_trainer(max_steps=1).fit(ours, loader())
    assert ours.model.loss_function.cross_entropy == STABLEMAX


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


def test_a_model_that_sees_the_future_is_refused_without_a_sanity_check(make_trainer):
    bert = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
    task = HFCausalLM(bert | {"num_attention_heads": 2, "intermediate_size": 32})
    with pytest.raises(ValueError, match="`model` must be causal"):
        make_trainer(max_steps=1, num_sanity_val_steps=0).fit(task, loader())
