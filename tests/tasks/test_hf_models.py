"""Models by name, folder, config or object, and LoRA; and what is said when one cannot be had."""

import copy
import importlib.util
import json
from contextlib import nullcontext
from functools import partial

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config

from spectral_lightning.losses import CrossEntropy
from spectral_lightning.optim import OrthogonalSGD
from spectral_lightning.tasks import HFCausalLM, LoraSettings
from tests.tasks.hf_cases import CONFIGS, loader, settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft 0.21
    pytest.mark.filterwarnings("ignore:Every label was ignored in"),
]
STABLEMAX = CrossEntropy(transform="stablemax")
TOKENS = torch.arange(2, 10)[None]
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed"
)


def make(name="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))


def adam(groups):
    return torch.optim.AdamW(groups, lr=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_a_config_and_a_model_are_the_same_model(tmp_path, name):
    model = make(name)
    model.save_pretrained(tmp_path)
    from_folder, from_object = HFCausalLM(str(tmp_path)), HFCausalLM(model)
    assert torch.equal(from_folder(TOKENS), from_object(TOKENS))
    for config in (settings(name), str(tmp_path / "config.json")):
        torch.manual_seed(0)
        fresh = HFCausalLM(config)
        assert type(fresh.model) is type(model)
        assert torch.equal(fresh(TOKENS), from_object(TOKENS))
        assert all(module.training for module in fresh.modules())


def test_dtype_and_attention_are_handed_on(tmp_path):
    make().save_pretrained(tmp_path)
    for model in (str(tmp_path), settings("llama"), make()):
        task = HFCausalLM(model, dtype="bfloat16", attn_implementation="eager")
        assert {p.dtype for p in task.model.parameters()} == {torch.bfloat16}
        assert task.model.config._attn_implementation == "eager"
    half = make().bfloat16()
    half.save_pretrained(tmp_path)
    assert HFCausalLM(str(tmp_path)).model.dtype == torch.float32
    assert HFCausalLM(half).model.dtype == torch.bfloat16


def test_a_misspelt_key_of_a_config_is_named():
    with pytest.warns(UserWarning, match=r"does not know: \['n_emb'\]; did you mean n_embd\?"):
        HFCausalLM({**settings("gpt2"), "n_emb": 32})


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "lama"}, "got 'lama'; did you mean llama"),
        ({"hidden_size": 8}, "must have a `model_type` such as gpt2 or llama"),
        ({"model_type": "t5"}, "must be a causal language model, got t5"),
    ],
)
def test_configs_of_no_causal_model_are_refused(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        HFCausalLM(config)


def test_files_and_folders_of_no_causal_model_are_refused(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="must hold a config when it is a JSON file"):
        HFCausalLM(str(tmp_path / "list.json"))
    with pytest.raises(ValueError, match=r"must be a folder with a config.json"):
        HFCausalLM(str(tmp_path))
    config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="must be a causal language model"):
        HFCausalLM(str(tmp_path / "t5"))
    with pytest.raises(TypeError, match="must be a name, a folder, a config or a model"):
        HFCausalLM(3)


def test_a_name_without_a_network_says_what_to_do(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="`hf download someone/no-such-model`") as caught:
        HFCausalLM("someone/no-such-model")
    assert "\n" not in str(caught.value)


@needs_peft
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_trains_its_additions_alone_and_is_saved_whole(make_trainer, tmp_path, name):
    from lightning.pytorch.loggers import CSVLogger

    task = HFCausalLM(make(name), STABLEMAX, adam, lora={"rank": 2, "alpha": 4})
    before = {n: p.clone() for n, p in task.model.named_parameters()}
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(max_steps=3, logger=logger, log_every_n_steps=1)
    trainer.fit(task, loader(batch_size=8))
    changed = {n for n, p in task.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_" in n for n in changed)
    folder = tmp_path / "lightning_logs" / "version_0" / "huggingface"
    whole = HFCausalLM(str(folder))
    assert whole.loss == STABLEMAX
    assert torch.allclose(whole(TOKENS), task(TOKENS), atol=1e-5)
    assert (folder / "adapter" / "adapter_config.json").is_file()
    with pytest.raises(ValueError, match="with a LoRA adapter alone; give the folder with"):
        HFCausalLM(str(folder / "adapter"))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = HFCausalLM.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert torch.equal(loaded(TOKENS), task(TOKENS))


@needs_peft
def test_factors_of_lora_are_not_projected(make_trainer):
    """Their steps are those of the plain optimizer."""
    found = []
    for optimizer in (torch.optim.SGD, OrthogonalSGD):
        torch.manual_seed(0)
        ours = HFCausalLM(make("llama"), None, partial(optimizer, lr=0.1), lora={"rank": 2})
        says = pytest.warns(UserWarning, match="`lora` are not projected")
        with says if optimizer is OrthogonalSGD else nullcontext():
            make_trainer(max_steps=2).fit(ours, loader())
        found.append([p for p in ours.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_lora_without_peft_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "peft" else found(name)
    )
    with pytest.raises(ModuleNotFoundError, match="`pip install peft`"):
        HFCausalLM(make(), lora=LoraSettings())


@pytest.mark.parametrize(
    ("options", "sentence"), [({"rank": 0}, "`rank` must be >= 1"), ({"dropout": 1.0}, "`dropout`")]
)
def test_lora_settings_outside_their_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LoraSettings(**options)
