"""Configurations of sentence embeddings: they run, and match the flags of the original."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL, DATA = "model.init_args", "data.init_args"

DEFAULTS = {
    f"{MODEL}.model": "M456",
    "trainer.max_epochs": 3,
    "trainer.gradient_clip_val": 1.0,
    "seed_everything": 42,
    f"{MODEL}.warmup_steps": 0.08,
    f"{MODEL}.optimizer.init_args.lr": 2e-4,
    f"{MODEL}.optimizer.init_args.weight_decay": 0.05,
    f"{MODEL}.gradient_checkpointing": False,
    f"{DATA}.max_length": 160,
    f"{DATA}.batch_size": 64,  # 8 accumulations of 8
    f"{DATA}.max_train_pairs": 100_000,
    "trainer.val_check_interval": 500,
}
"""The original's settings of M456, by our options."""

FLAGS = {
    "--mode train": "spectral fit",
    "--mode eval": "spectral validate",
    "--mode extract": "spectral encode",
    "--mode param_estimate": "spectral params",
    "--size": "--model.model",
    "--epochs": "--trainer.max_epochs",
    "--seed": "--seed_everything",
    "--gradient-checkpointing": "--model.gradient_checkpointing",
    "--no-spectral": "spectral",
    "--no-anchor64": "anchor",
    "--no-anchor": "anchor",
    "--no-bridge": "bridge",
    "--no-matryoshka": "angular",
    "--no-angular": "angular",
    "--no-matry": "matryoshka",
    "--checkpoint": "--ckpt_path",
    "--resume": "--ckpt_path",
    "--texts": "--texts",
    "--use_wandb": "WandbLogger",
    "--quick": "--trainer.limit_val_batches",
    "--output": "CSVLogger",
}
"""Every flag of the original's two programs, and what does its work."""


def spectral(folder, *arguments):
    command = [sys.executable, "-m", "spectral_lightning.cli.entry", *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def at(config, path):
    for part in path.split("."):
        config = config[part]
    return config


def written(folder, *arguments):
    config = CONFIGS / "spectra_m456.yaml"
    return yaml.safe_load(spectral(folder, "fit", "--config", config, *arguments, "--print_config"))


def test_the_config_has_the_settings_of_the_original(tmp_path):
    config = written(tmp_path)
    assert {option: at(config, option) for option in DEFAULTS} == DEFAULTS


def test_the_readme_maps_every_flag():
    rows = [r for r in (CONFIGS.parent / "README.md").read_text().splitlines() if r.startswith("|")]
    start = rows.index("| flag there | here |")
    for flag, answer in FLAGS.items():
        found = [row for row in rows[start:] if f"`{flag}`" in row.split("|")[1]]
        assert any(answer in row.split("|")[2] for row in found), flag


def test_all_ablation_flags_together_are_options(tmp_path):
    parts = ["spectral", "anchor", "bridge", "angular"]
    config = written(tmp_path, *(f"--model.without+={part}" for part in parts))
    assert at(config, f"{MODEL}.without") == parts


SMALL = {
    "--trainer.accelerator": "cpu",
    "--trainer.max_epochs": 1,
    "--trainer.max_steps": 4,
    "--trainer.log_every_n_steps": 1,
    "--data.cache_dir": "cache",
    "--data.batch_size": 8,
    "--data.max_train_pairs": 64,
    "--data.max_valid": 20,
    "--data.max_length": 16,
}


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path):
    options = [f"{name}={value}" for name, value in SMALL.items()]
    spectral(tmp_path, "fit", "--config", CONFIGS / "spectra_quickstart.yaml", *options)
    (run,) = (tmp_path / "runs").glob("*/version_0")
    assert (run / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm", "m456"])
def test_those_that_need_the_network_run_on_local_folders(tmp_path, name):
    """By name nothing changes but where encoder, tokenizer and data come from."""
    from transformers import BertConfig, BertModel

    from spectral_lightning.data.pairs_tokenizer import train_pair_tokenizer

    words = [f"word{i} stands before number{i % 7}" for i in range(200)]
    tokenizer = train_pair_tokenizer(iter(words), vocab_size=300, max_length=32)
    tokenizer.save_pretrained(tmp_path / "encoder")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertConfig(vocab_size=320, intermediate_size=64, max_position_embeddings=64, **shape)
    BertModel(bert).save_pretrained(tmp_path / "encoder")
    lines = [f'{{"query": "{w}", "positive": "{w} twice", "negative": "{w[::-1]}"}}' for w in words]
    (tmp_path / "triplets.jsonl").write_text("\n".join(lines))
    scored = [f"a{i},b{i % 3},{i % 6}" for i in range(12)]
    (tmp_path / "sts.csv").write_text("sentence1,sentence2,score\n" + "\n".join(scored))
    options = dict(SMALL) | {"--trainer.precision": "32-true", "--trainer.devices": 1}
    options |= {"--data.sources": "triplets.jsonl", "--data.tokenizer": "encoder"}
    options |= {"--trainer.val_check_interval": 2}
    if name == "minilm":
        options |= {
            "--model.model.backbone": "encoder",
            "--model.model.semantic_dims": "[32,16]",
            "--model.model.max_length": 32,
        }
    else:
        options |= {
            "--model.model": "{preset: tiny, vocab_size: 320}",
            "--data.sts": "{stsb: sts.csv}",
            "--model.without": "[spectral, anchor, bridge, angular]",  # the guide's full ablation
        }
    arguments = [f"{key}={value}" for key, value in options.items()]
    spectral(tmp_path, "fit", "--config", CONFIGS / f"spectra_{name}.yaml", *arguments)
    (run,) = (tmp_path / "runs").glob("*/version_0")
    names = {path.stem for path in (run / "checkpoints").iterdir()}
    assert {"best_val", "last"} <= names
    assert name == "minilm" or {"best_sts", "final"} <= names
