"""The configurations for Hugging Face models run offline, with few options changed."""

import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from spectral_lightning.cli.main import SpectralCLI
from spectral_lightning.tasks import HFCausalLM

CONFIGS = Path(__file__).parents[2] / "configs"
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
]
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _empty_folder_and_environment_as_before(tmp_path, monkeypatch):
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.clear()
    os.environ.update(before)


def fit(name, *options):
    with torch.random.fork_rng():
        return SpectralCLI(["fit", f"--config={CONFIGS / name}.yaml", *QUIET, *options])


def test_a_gpt2_from_its_config_learns_text(tmp_path):
    words = ("function", "returns", "value", "class", "object", "method", "string", "number")
    notes = [" ".join(f"{words[i * k % 8]}{i % 50}" for i in range(60)) for k in range(1, 60)]
    (tmp_path / "notes.txt").write_text("\n\n\n".join(notes))
    cli = fit(
        "hf_gpt2_toy",
        "--data.source=notes.txt",
        "--data.vocab_size=320",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=4",
        "--trainer.limit_val_batches=2",
        "--model.warmup_steps=1",
        "--model.sample_tokens=4",
        f"--data.cache_dir={tmp_path / 'cache'}",
    )
    assert cli.trainer.global_step == 4
    assert {"valid/loss", "valid/softmax_loss", "valid/bpb"} <= cli.trainer.callback_metrics.keys()
    folder = tmp_path / "runs" / "hf_gpt2_toy" / "version_0" / "huggingface"
    saved = HFCausalLM(str(folder))
    assert saved.loss.transform == "stablemax"
    assert saved.generate("The function returns", 4).startswith("The function returns")


@pytest.fixture
def llama(tmp_path):
    """Folder of a tiny Llama and its tokenizer of words, which has no token for padding."""
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *"abcdefgh"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "llama")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_llama_learns_instructions_from_a_file(tmp_path, llama):
    records = [
        {"instruction": f"a b {'c ' * (i % 5)}", "input": "", "output": f"d e {'f ' * (i % 7)}{i}"}
        for i in range(80)
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    cli = fit(
        "hf_llama_alpaca",
        f"--model.model={llama}",
        f"--data.tokenizer={llama}",
        "--data.source=alpaca.json",
        "--model.warmup_steps=0",
        "--data.valid_fraction=0.2",
        f"--data.cache_dir={tmp_path / 'cache'}",
    )
    assert cli.trainer.global_step >= 2
    assert cli.trainer.callback_metrics["valid/loss"].isfinite()
    folder = tmp_path / "runs" / "hf_llama_alpaca" / "version_0" / "huggingface"
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    assert isinstance(HFCausalLM(str(folder)).generate("a b", 4), str)


def test_options_of_loss_and_lora_are_read_from_the_command_line(llama):
    cli = SpectralCLI(
        [
            "--model=HFCausalLM",
            f"--model.model={llama}",
            "--model.loss.transform=stablemax",
            "--model.loss.z_loss=0.0001",
            "--model.save_folder=null",
        ],
        run=False,
    )
    assert isinstance(cli.model, HFCausalLM)
    assert (cli.model.loss.transform, cli.model.loss.z_loss) == ("stablemax", 1e-4)
