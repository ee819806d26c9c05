"""Whose values count when a run starts from a checkpoint."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from spectral_lightning.cli.entry import main

pytestmark = [
    # LightningCLI 2.6 calls functions that jsonargparse 4.44 and later announce to remove.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

TASK = """
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader


class PlainTask(pl.LightningModule):
    def __init__(self, width: int = 2, rate: float = 0.1, betas: tuple[float, float] = (0.1, 0.2)):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("rate", self.hparams.rate)

    def train_dataloader(self):
        return DataLoader(torch.ones(2, self.layer.in_features))

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.rate)
"""

TRAINER = [
    *("--seed_everything=0", "--trainer.logger=false", "--trainer.enable_progress_bar=false"),
    *("--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"),
]


def run(command: str, *args: object) -> int:
    return main([command, *TRAINER, *map(str, args)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a run with a width and a rate of its own."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "plain_task.py").write_text(TASK)
    sys.path.insert(0, str(folder))
    args = ("--model.width=3", "--model.rate=0.5", f"--trainer.default_root_dir={folder}")
    run("fit", "--model", "plain_task.PlainTask", "--trainer.max_steps=1", *args)
    (path,) = folder.rglob("*.ckpt")
    yield path
    sys.path.remove(str(folder))
    del sys.modules["plain_task"]


def configuration(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, object]:
    """The arguments of the model that `spectral validate` would use."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run("validate", *args, "--print_config")
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]


def test_a_checkpoint_fills_in_what_the_command_line_leaves_open(checkpoint, capsys):
    used = configuration(capsys, "--ckpt_path", checkpoint)
    assert used == {"width": 3, "rate": 0.5, "betas": [0.1, 0.2]}


def test_the_command_line_wins_over_a_checkpoint(checkpoint, capsys):
    used = configuration(capsys, "--ckpt_path", checkpoint, "--model.rate=0.25")
    assert used == {"width": 3, "rate": 0.25, "betas": [0.1, 0.2]}


def test_a_configuration_file_wins_over_a_checkpoint(checkpoint, capsys, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model: {class_path: PlainTask, init_args: {rate: 0.125}}")
    used = configuration(capsys, "--ckpt_path", checkpoint, "--config", config)
    assert used == {"width": 3, "rate": 0.125, "betas": [0.1, 0.2]}


def test_a_sharded_checkpoint_fills_in_as_well(checkpoint, capsys, tmp_path):
    # Lightning keeps everything but tensors in this file of the folder.
    content = torch.load(checkpoint, weights_only=True)
    del content["state_dict"]
    torch.save(content, tmp_path / "meta.pt")
    assert configuration(capsys, "--ckpt_path", tmp_path)["width"] == 3


def test_a_checkpoint_named_in_a_configuration_file_fills_in_as_well(checkpoint, caplog, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"ckpt_path: {checkpoint}\nmodel: {{class_path: PlainTask}}")
    assert run("validate", "--config", config, "--model.rate=0.25") == 0
    assert "`model.init_args.rate` is 0.25, the checkpoint has 0.5." in caplog.messages


def test_a_configuration_of_several_commands_wins_over_its_checkpoint(checkpoint, caplog, tmp_path):
    config = tmp_path / "config.yaml"
    content = {"ckpt_path": str(checkpoint), "seed_everything": 0}
    content["trainer"] = {"logger": False, "enable_progress_bar": False}
    content["model"] = {"class_path": "PlainTask", "init_args": {"rate": 0.25}}
    config.write_text(yaml.safe_dump({"validate": content}))
    assert main(["--config", str(config), "validate"]) == 0
    assert "`model.init_args.rate` is 0.25, the checkpoint has 0.5." in caplog.messages


def test_what_differs_from_the_checkpoint_is_said(checkpoint, caplog):
    assert run("validate", "--ckpt_path", checkpoint, "--model.rate=0.25") == 0
    said = [message for message in caplog.messages if "the checkpoint has" in message]
    assert said == ["`model.init_args.rate` is 0.25, the checkpoint has 0.5."]


def test_nothing_is_said_when_nothing_differs(checkpoint, caplog):
    assert run("validate", "--ckpt_path", checkpoint) == 0
    assert [message for message in caplog.messages if "the checkpoint has" in message] == []


def test_a_checkpoint_of_another_shape_is_one_sentence(checkpoint, capsys):
    assert run("validate", "--ckpt_path", checkpoint, "--model.width=4") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: The checkpoint does not fit the model: size mismatch for layer.")


def test_a_checkpoint_that_does_not_exist_is_one_sentence(checkpoint, capsys):
    absent = Path(checkpoint).with_name("absent.ckpt")
    assert run("validate", "--model", "PlainTask", "--ckpt_path", absent) == 2
    assert f"error: Checkpoint file not found: {absent}" in capsys.readouterr().err


@pytest.mark.parametrize("num_bytes", [0, 100, 1500])
def test_a_checkpoint_that_is_cut_off_is_one_sentence(checkpoint, capsys, tmp_path, num_bytes):
    cut = tmp_path / "cut.ckpt"
    shutil.copy(checkpoint, cut)
    with cut.open("rb+") as file:
        file.truncate(num_bytes)
    assert run("validate", "--model", "PlainTask", "--ckpt_path", cut) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: `ckpt_path` must be a checkpoint of Lightning, but {cut} cann")
