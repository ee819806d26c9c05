"""Configurations of adaptive low-rank training: they run, and match the flags of the original."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from spectral_lightning.spectra import RankCheck, read_rank_events

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL, LAYER = "model.init_args.model.init_args", "trainer.callbacks.0.init_args"
OPTIMIZER = "model.init_args.optimizer.init_args"
CLOCK = f"{LAYER}.controller.init_args.clock"

FLAGS = {
    "v10": {
        "--data-file": ("data.init_args.source", None),
        "--epochs": ("trainer.max_epochs", 30),
        "--init-rank": (f"{MODEL}.rank", 64),
        "--d-model": (f"{MODEL}.model_dim", 512),
        "--n-layers": (f"{MODEL}.depth", 6),
        "--n-heads": (f"{MODEL}.num_heads", 8),
        "--d-ff": (f"{MODEL}.mlp_dim", 2048),
        "--block-size": (f"{MODEL}.sequence_len", 256),
        "--batch-size": ("data.init_args.batch_size", 32),
        "--steps-per-epoch": ("trainer.limit_train_batches", 200),
        "--lr": (f"{OPTIMIZER}.lr", 3e-4),
        "--min-rank": (f"{CLOCK}.rank_min", 8),
        "--log-file": ("trainer.logger.init_args.save_dir", "runs"),
    },
    "v13": {
        "--data-file": ("data.init_args.source", None),
        "--epochs": ("trainer.max_epochs", 30),
        "--init-rank": (f"{MODEL}.rank", 64),
        "--d-model": (f"{MODEL}.model_dim", 256),
        "--n-layers": (f"{MODEL}.depth", 6),
        "--n-heads": (f"{MODEL}.num_heads", 4),
        "--max-rank-mult": (f"{MODEL}.capacity", 128),
        "--seq-len": (f"{MODEL}.sequence_len", 256),
        "--batch-size": ("data.init_args.batch_size", 32),
        "--lr": (f"{OPTIMIZER}.lr", 3e-4),
        "--steps-per-epoch": ("trainer.limit_train_batches", 200),
        "--log-file": ("trainer.logger.init_args.save_dir", "runs"),
    },
    "v18": {
        "--data": ("data.init_args.source", None),
        "--out-dir": ("trainer.logger.init_args.save_dir", "runs"),
        "--seed": ("seed_everything", 1337),
        "--block-size": (f"{MODEL}.sequence_len", 256),
        "--n-layer": (f"{MODEL}.depth", 6),
        "--n-head": (f"{MODEL}.num_heads", 8),
        "--n-embd": (f"{MODEL}.model_dim", 512),
        "--dropout": (f"{MODEL}.dropout", 0.1),
        "--init-rank": (f"{MODEL}.rank", 64),
        "--min-rank": (f"{CLOCK}.rank_min", 8),
        "--max-rank": (f"{CLOCK}.rank_max", 64),
        "--safety-factor": (f"{LAYER}.controller.init_args.safety_factor", 1.5),
        "--ema-decay": (f"{LAYER}.controller.init_args.ema_decay", 0.8),
        "--change-threshold": (f"{LAYER}.controller.init_args.change_threshold", 2.0),
        "--max-step": (f"{CLOCK}.max_step", 4),
        "--resize-method": (f"{LAYER}.shrink", "cut"),
        "--rank-update-every": (f"{LAYER}.every_n_steps", 1184),
        "--batch-size": ("data.init_args.batch_size", 32),
        "--max-steps": ("trainer.max_steps", 30000),
        "--grad-clip": ("trainer.gradient_clip_val", 1.0),
        "--lr": (f"{OPTIMIZER}.lr", 3e-4),
        "--min-lr": ("model.init_args.final_fraction", 0.1),
        "--warmup-steps": ("model.init_args.warmup_steps", 500),
        "--weight-decay": (f"{OPTIMIZER}.weight_decay", 0.01),
        "--amp": ("trainer.precision", None),
        "--eval-interval": ("trainer.val_check_interval", 500),
        "--eval-iters": ("trainer.limit_val_batches", 50),
        "--log-interval": ("trainer.log_every_n_steps", 50),
    },
}
"""Flags of the original's commands that a config has a value for: our option, and its default."""

WITHOUT_VALUE = {
    **dict.fromkeys(["--resume", "--ckpt"], "--ckpt_path"),
    "--train-frac": "--data.valid_fraction",
    "--device": "--trainer.accelerator",
    "--overfit-one-batch": "--trainer.overfit_batches",
    "--sample-every": "validation",
    "--sample-len": "--model.sample_tokens",
    "--log-ranks-full": "rank_events.jsonl",
    "--power-iters": "exact",
    **dict.fromkeys(["--mode", "--prompt", "--max-new-tokens"], "spectral generate"),
    **dict.fromkeys(["--temperature", "--top-k"], "spectral generate"),
    "--top-p": "none",
}
"""The others, all of version 18, and what does their work."""


def spectral(folder, *arguments):
    command = [sys.executable, "-m", "spectral_lightning.cli.entry", "fit", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def at(config, path):
    for part in path.split("."):
        config = config[int(part)] if part.isdigit() else config[part]
    return config


@pytest.mark.parametrize("version", FLAGS)
def test_every_flag_of_the_original_has_an_option_with_its_default(tmp_path, version):
    (tmp_path / "text.txt").write_text("a b c")
    path = CONFIGS / f"lowrank_{version}.yaml"
    out = spectral(tmp_path, f"--config={path}", "--data.source=text.txt", "--print_config")
    config = yaml.safe_load(out)
    for flag, (option, default) in FLAGS[version].items():
        found = at(config, option)
        assert default is None or found == default, flag


def test_the_readme_maps_every_flag():
    readme = (CONFIGS.parent / "README.md").read_text()
    readme = readme[: readme.index("## Sentence embeddings")]  # which has a table of its own
    rows = [row for row in readme.splitlines() if row.startswith("|")]
    for version, flags in FLAGS.items():
        for flag, (option, _) in flags.items():
            (row,) = (row for row in rows if f"`{flag}`" in row.split("|")[1])
            name = option.rpartition(".")[2]
            assert name in row.split("|")[2], (version, flag)
    for flag, answer in WITHOUT_VALUE.items():
        (row,) = (row for row in rows if f"`{flag}`" in row.split("|")[1])
        assert answer in row.split("|")[2], flag


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v10", "v13", "v18", "adaptive"])
def test_a_short_run_writes_its_ranks_and_a_checkpoint(tmp_path, version):
    words = [f"word{i % 37} is number{i % 11}." for i in range(4000)]
    (tmp_path / "text.txt").write_text("\n\n".join(words))
    small = {
        **{f"--model.model.{name}": value for name, value in SMALL_MODEL.items()},
        "--data.sequence_len": 16,
        "--data.batch_size": 4,
        "--data.cache_dir": "cache",
        "--trainer.max_epochs": 2,
        "--trainer.max_steps": 6,
        "--trainer.limit_train_batches": 3,
        "--trainer.limit_val_batches": 1,
        "--trainer.accelerator": "cpu",
    }
    if version == "adaptive":
        small |= {"--data.vocab_size": 290, "--trainer.val_check_interval": 3}
        small |= {"--model.warmup_steps": 2}
        small |= {"--trainer.limit_train_batches": 1.0}
    if version == "v18":
        small |= {"--trainer.val_check_interval": 3}
    config = yaml.safe_load((CONFIGS / f"lowrank_{version}.yaml").read_text())
    adaptation = config["trainer"]["callbacks"][0]["init_args"]
    adaptation["every_n_steps"] = 2
    clock = adaptation["controller"].setdefault("init_args", {}).setdefault("clock", {})
    clock |= {"warmup_steps": 0, "interval": 2, "interval_max": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    if version == "v18":
        small |= {"--model.warmup_steps": 2, "--model.warmdown_fraction": 0.5}
    options = [f"{name}={value}" for name, value in small.items()]
    spectral(tmp_path, "--config=config.yaml", "--data.source=text.txt", *options)
    (run,) = (tmp_path / "runs").glob("*/version_0")
    events = read_rank_events(run / "rank_events.jsonl")
    checks = [event for event in events if isinstance(event, RankCheck)]
    assert {check.step for check in checks} >= {2}
    assert len({check.layer for check in checks}) == 6
    assert events[-1].event == "summary"
    assert list(run.rglob("*.ckpt"))


SMALL_MODEL = {
    "vocab_size": 300,
    "sequence_len": 16,
    "depth": 1,
    "model_dim": 32,
    "num_heads": 2,
    "mlp_dim": 64,
    "rank": 8,
    "capacity": 16,
}
