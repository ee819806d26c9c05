"""The configurations of configs/ and what follows from them, end to end and tiny."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from spectral_lightning import optim
from spectral_lightning.callbacks import ASSR, RankAdaptation, SpectralMonitor, SVDModeSwitch
from spectral_lightning.cli.entry import main
from spectral_lightning.cli.main import SpectralCLI
from spectral_lightning.data import TextDataModule, TokenFileDataModule
from spectral_lightning.models import GPT, LowRankTransformer, generate
from spectral_lightning.optim import parameter_groups
from spectral_lightning.tasks import LanguageModeling, load_language_model

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
# Those of other tasks are built, and run, by the tests of the tasks.
OTHERS = ("grokking", "hf_", "spectra_")
TEXT_CONFIGS = [path for path in CONFIGS if not path.stem.startswith(OTHERS)]
QUICKSTART = next(path for path in CONFIGS if path.stem == "gpt_quickstart")

pytestmark = [
    # LightningCLI 2.6 calls functions that jsonargparse 4.44 and later announce to remove.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


def files_of(config):
    """What has to be given together: some are added to what trains something."""
    if config.stem == "lowrank_dense":
        return [config.with_stem("lowrank_adaptive"), config]
    return [QUICKSTART, config] if config.stem.startswith(("assr_", "svd_")) else [config]


def has_settings_of_its_own(task, config):
    """The optimizer is what its class makes of what the file says, and of nothing else."""
    written = [yaml.safe_load(path.read_text()) for path in files_of(config)]
    models = [content["model"]["init_args"] for content in written if "model" in content]
    (wanted,) = [model["optimizer"] for model in models if "optimizer" in model]
    name, groups = wanted["class_path"].split(".")[-1], parameter_groups(task.model)
    cls = getattr(optim, name, None) or getattr(torch.optim, name)
    expected = cls(groups, **wanted.get("init_args", {})).param_groups
    for group, other in zip(task.optimizer(groups).param_groups, expected, strict=True):
        assert {**group, "params": None} == {**other, "params": None}


@pytest.mark.parametrize("config", TEXT_CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_builds_what_it_names(config, tmp_path):
    args = [
        *(f"--config={path}" for path in files_of(config)),
        "--model.model.depth=1",
        f"--data.cache_dir={tmp_path}",
        *(["--data.source=text.txt"] if config.stem.startswith("lowrank_v") else []),
    ]
    cli = SpectralCLI([*args, f"--trainer.logger.save_dir={tmp_path}"], run=False)
    assert isinstance(cli.model, LanguageModeling)
    assert cli.model.model.sequence_len == cli.datamodule.sequence_len
    kinds = {type(callback) for callback in cli.trainer.callbacks}
    assert (ASSR in kinds) == config.stem.startswith("assr_")
    assert (SVDModeSwitch in kinds) == config.stem.startswith("svd_")
    is_low_rank = config.stem.startswith("lowrank_")
    assert (RankAdaptation in kinds) == (is_low_rank and config.stem != "lowrank_dense")
    assert (SpectralMonitor in kinds) == (not is_low_rank)
    assert isinstance(cli.model.model, LowRankTransformer if is_low_rank else GPT)
    reads_one_file = config.stem.startswith("lowrank_v")
    assert isinstance(cli.datamodule, TokenFileDataModule if reads_one_file else TextDataModule)
    if not reads_one_file:
        assert cli.model.model.vocab_size == cli.datamodule.vocab_size
    has_settings_of_its_own(cli.model, config)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_begins_with_command_cost_and_result(config):
    comment = [line for line in config.read_text().splitlines() if line.startswith("#")]
    options = " ".join(f"--config configs/{path.name}" for path in files_of(config))
    assert any(f"spectral fit {options}" in line for line in comment)
    assert any(line.startswith("# Cost:") for line in comment)
    assert any(line.startswith("# Result:") for line in comment)


def test_bare_names_of_this_library_lightning_and_torch_are_known(tmp_path):
    cli = SpectralCLI(
        [
            *("--model", "LanguageModeling", "--data", "TextDataModule"),
            *("--model.model", "GPT", "--model.model.depth", "1"),
            *("--trainer.callbacks+=SpectralMonitor", "--trainer.callbacks.every_n_steps=7"),
            *("--trainer.callbacks+=LearningRateMonitor", "--trainer.logger=CSVLogger"),
            *(f"--trainer.logger.save_dir={tmp_path}", "--model.optimizer=SGD"),
            "--seed_everything=0",
        ],
        run=False,
    )
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert {"SpectralMonitor", "LearningRateMonitor"} <= set(names)
    assert type(cli.trainer.logger).__name__ == "CSVLogger"
    optimizer = cli.model.optimizer([nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.SGD)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Two steps of the quick start on a small text, in a process of its own as for a user."""
    folder = tmp_path_factory.mktemp("quickstart")
    words = ("matrix", "vector", "value", "rank", "norm", "layer", "step", "model")
    lines = [f"The {a} of the {b} is a {c}." for a in words for b in words for c in words]
    (folder / "train.txt").write_text("\n\n".join(lines))
    (folder / "valid.txt").write_text("The value of the norm is a step. " * 20)
    command = [
        *(sys.executable, "-m", "spectral_lightning.cli.entry", "fit", f"--config={QUICKSTART}"),
        *("--model.model.depth=1", "--model.model.model_dim=32", "--model.model.sequence_len=32"),
        *("--model.model.vocab_size=300", "--data.vocab_size=300", "--data.sequence_len=32"),
        *("--data.source=train.txt", "--data.valid_source=valid.txt", "--data.cache_dir=cache"),
        *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.batch_size=2"),
        *("--trainer.limit_val_batches=1", "--trainer.accelerator=cpu", "--model.sample_tokens=4"),
    ]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder, result


@pytest.fixture(scope="module")
def checkpoint(quickstart):
    (path,) = quickstart[0].rglob("*.ckpt")
    return path


def test_the_quick_start_leaves_a_run_that_can_be_repeated(quickstart):
    folder, _ = quickstart
    (run,) = (folder / "runs/gpt_quickstart").iterdir()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["model"]["init_args"]["model_dim"] == 32
    assert list(run.glob("events.out.tfevents.*"))


def test_the_quick_start_shows_no_advertisement_and_no_inner_warnings(quickstart):
    said = quickstart[1].stderr + quickstart[1].stdout
    assert "Tip: For seamless" not in said
    assert "LeafSpec" not in said


def test_generate_writes_the_same_text_for_the_same_seed(checkpoint, capsys):
    args = ["generate", f"--checkpoint={checkpoint}", "--prompt=The rank", "--max_new_tokens=8"]
    assert main(args) == 0
    first = capsys.readouterr().out
    assert first.startswith("The rank")
    assert main(args) == 0
    assert capsys.readouterr().out == first


def test_generate_draws_from_the_probabilities_of_the_training(checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["model.lm_head.weight"] *= 50  # so that the transforms are far apart
    texts = {}
    for transform in ("softmax", "stablemax"):
        content["spectral_lightning"]["loss"] = {"transform": transform}
        torch.save(content, tmp_path / "run.ckpt")
        options = ["--max_new_tokens=20", "--temperature=1", "--top_k=300"]
        assert (
            main(["generate", f"--checkpoint={tmp_path / 'run.ckpt'}", "--prompt=T", *options]) == 0
        )
        texts[transform] = capsys.readouterr().out.strip()
        model, tokenizer, _ = load_language_model(tmp_path / "run.ckpt")
        prompt = torch.tensor([tokenizer.encode("T").ids])
        tokens = generate(model, prompt, max_new_tokens=20, top_k=300, transform=transform)
        assert texts[transform] == tokenizer.decode(tokens[0].tolist()).strip()
    assert texts["softmax"] != texts["stablemax"]


def test_generate_writes_as_many_samples_as_asked(checkpoint, capsys):
    args = [f"--checkpoint={checkpoint}", "--prompt=The", "--num_samples=3", "--max_new_tokens=2"]
    assert main(["generate", *args]) == 0
    out = capsys.readouterr().out
    assert [f"--- sample {n} of 3\nThe" in out for n in (1, 2, 3)] == [True] * 3


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--num_samples=0", "`num_samples` must be >= 1, got 0."),
        ("--temperature=-1", "`temperature` must be finite and >= 0, got -1.0."),
        ("--top_k=0", "`top_k` must be >= 1 or None, got 0."),
        ("--max_new_tokens=0", "`max_new_tokens` must be >= 1, got 0."),
        ("--max_new_tokens=32", "`prompt_BT` and `max_new_tokens` together must be at most"),
        ("--checkpoint=absent.ckpt", "`checkpoint_path` must be an existing file, got absent.ckpt"),
    ],
)
def test_generate_refuses_in_one_sentence(checkpoint, capsys, option, sentence):
    args = ["generate", f"--checkpoint={checkpoint}", "--prompt=The", "--max_new_tokens=2", option]
    assert main(args) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {sentence}")
    assert said.count("\n") == 1


def test_generate_refuses_a_damaged_checkpoint_in_one_sentence(checkpoint, capsys, tmp_path):
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(checkpoint.read_bytes()[:5000])
    assert main(["generate", f"--checkpoint={damaged}", "--prompt=The"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: A checkpoint must be complete, but {damaged} is cut off")
    assert said.count("\n") == 1
