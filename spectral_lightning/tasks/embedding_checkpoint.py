"""What a checkpoint of a sentence-embedding task holds besides weights, as plain containers."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spectral_lightning.losses import (
    CosineTemperature,
    CrossEntropy,
    LearnableTemperature,
    Matryoshka,
    SpectraLoss,
)
from spectral_lightning.models.spectra import SpectraConfig, SpectraModel
from spectral_lightning.tasks.checkpoint import CHECKPOINT_KEY, check_tensors, read_checkpoint
from spectral_lightning.tasks.sentence_encoder import SentenceEncoder

_TOKENIZER_FILE = "tokenizer.json"


def pack_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str] | None:
    """Return the files of a tokenizer's folder by their names.

    Warns:
        UserWarning: If it has no ``tokenizer.json`` and is not kept: its files are no text.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if not (Path(folder) / _TOKENIZER_FILE).is_file():
            rank_zero_warn(
                f"The checkpoint holds no tokenizer: a {type(tokenizer).__name__} writes no"
                f" {_TOKENIZER_FILE}. Keep its folder with the checkpoint."
            )
            return None
        texts = (".json", ".txt", ".jinja")
        files = [path for path in sorted(Path(folder).iterdir()) if path.suffix in texts]
        return {path.name: path.read_text("utf-8") for path in files}


def unpack_tokenizer(files: Mapping[str, str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `pack_tokenizer`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / Path(name).name).write_text(text, "utf-8")
        return AutoTokenizer.from_pretrained(folder)


def check_same_tokens(own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose token ids mean other texts than those of the trained one.

    Raises:
        ValueError: If the two differ in a token.
    """
    if own.get_vocab() != other.get_vocab():
        raise ValueError(
            "The data module's tokenizer must be the one the model was trained with, but it is"
            " another one. Write that one to a folder with"
            " `load_sentence_encoder(checkpoint).tokenizer.save_pretrained(folder)` and give the"
            " data module `tokenizer=folder`."
        )


def task_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a `SentenceEmbedding` that a checkpoint's part knows.

    Args:
        saved: Entry `CHECKPOINT_KEY` of a checkpoint, possibly empty.
    """
    settings: dict[str, Any] = {}
    if "config" in saved:
        settings["model"] = SpectraModel(SpectraConfig.from_dict(saved["config"]))
    if "loss" in saved:
        settings["loss"] = unpack_loss(saved["loss"])
    if saved.get("temperature") is not None:
        settings["temperature"] = unpack_temperature(saved["temperature"])
    if "eval_heads" in saved:
        settings["eval_heads"] = saved["eval_heads"]
    return settings


def pack_loss(loss: SpectraLoss) -> dict[str, Any]:
    """Return the settings of a loss as plain containers."""
    return asdict(loss)


def unpack_loss(settings: Mapping[str, Any]) -> SpectraLoss:
    """Return the loss of `pack_loss`."""
    own = dict(settings)
    own["semantic_dims"] = Matryoshka(**own["semantic_dims"])
    if own["cross_entropy"] is not None:
        own["cross_entropy"] = CrossEntropy(**own["cross_entropy"])
    return SpectraLoss(**own)


def pack_temperature(temperature: CosineTemperature | LearnableTemperature) -> dict[str, float]:
    """Return the settings of a temperature as plain containers."""
    if isinstance(temperature, LearnableTemperature):
        return temperature.settings()
    return asdict(temperature)


def unpack_temperature(settings: Mapping[str, float]) -> CosineTemperature | LearnableTemperature:
    """Return the temperature of `pack_temperature`."""
    if "lowest" in settings:
        return LearnableTemperature(**settings)
    return CosineTemperature(**settings)


def load_sentence_encoder(
    checkpoint_path: str | Path, head: str | None = None, dim: int | None = None
) -> SentenceEncoder:
    """Load what turns texts into vectors from a checkpoint alone.

    Args:
        checkpoint_path: File written while a `SentenceEmbedding` was trained.
        head: Name of a head; None for the one that was selected on.
        dim: Length of the prefix; None for all of it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, is not the checkpoint of an embedding model, or the model has
            no such head or prefix.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    saved = checkpoint.get(CHECKPOINT_KEY, {})
    if saved.get("tokenizer") is None or "config" not in saved:
        raise ValueError(
            "A checkpoint must hold an embedding model and its tokenizer to be used alone, but"
            f" {checkpoint_path} does not. Give one written by `SentenceEmbedding` with a data"
            " module that offers `tokenizer`."
        )
    model = SpectraModel(SpectraConfig.from_dict(saved["config"]))
    prefix = "model."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    check_tensors(model.state_dict(), weights, strict=True)
    model.load_state_dict(weights)
    return SentenceEncoder(
        model.train(mode=False),
        unpack_tokenizer(saved["tokenizer"]),
        saved["max_length"],
        head=head or saved["eval_heads"][0],
        dim=dim,
    )
