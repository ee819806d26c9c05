"""Callbacks, recomputed activations and compiled layers of Hugging Face causal LMs."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM

from spectral_lightning.callbacks import ASSR, RankAdaptation, SpectralMonitor, SVDModeSwitch
from spectral_lightning.control import RankClock, Regulator, ScheduledController
from spectral_lightning.nn import add_factors, factorize
from spectral_lightning.tasks import HFCausalLM
from tests.tasks.hf_cases import CONFIGS, adam, loader, make, task

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Every label was ignored in"),
]


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


def saved_by(make_trainer, ours, tmp_path, callbacks):
    """What `from_pretrained` makes of the folder that four steps leave."""
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(max_steps=4, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    trainer.fit(ours, loader())
    return AutoModelForCausalLM.from_pretrained(f"{logger.log_dir}/huggingface").eval()


def test_ranks_adapt_and_what_is_saved_is_a_plain_model(make_trainer, tmp_path):
    model = make()
    factorize(model, "*mlp*", rank=24, capacity=28, quantum=4)
    clock = RankClock(warmup_steps=0, cooldown_steps=0, interval=1, interval_max=1, quantum=4)
    schedule = ScheduledController(clock=clock, initial_rank=24, target_rank=16, total_steps=4)
    callback = RankAdaptation("*mlp*", schedule, every_n_steps=1, shrink="cut")
    ours = HFCausalLM(model, optimizer=adam)
    saved = saved_by(make_trainer, ours, tmp_path, [callback])
    assert set(callback.ranks.values()) == {16}
    tokens = torch.arange(2, 10)[None]
    assert torch.allclose(saved(tokens).logits, ours.eval()(tokens), atol=1e-5)


def test_layers_in_two_parts_are_saved_as_plain_ones(make_trainer, tmp_path):
    model = make()
    add_factors(model, {m for n, m in model.named_modules() if n.endswith("q_proj")})
    for module in model.modules():
        if hasattr(module, "to_linear"):
            torch.nn.init.normal_(module.left_factor, std=0.1)
            torch.nn.init.normal_(module.right_factor, std=0.1)
    ours = HFCausalLM(model, optimizer=adam)
    saved = saved_by(make_trainer, ours, tmp_path, [])
    tokens = torch.arange(2, 10)[None]
    assert torch.allclose(saved(tokens).logits, ours.eval()(tokens), atol=1e-5)
