"""Embedding models as folders that other libraries load."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from spectral_lightning.models.spectra import SpectraModel
from spectral_lightning.tasks.sentence_encoder import SentenceEncoder, evaluating

ExportFormat = Literal["sentence-transformers", "huggingface", "safetensors"]

_CARD = """\
---
library_name: {library}
pipeline_tag: sentence-similarity
tags: [sentence-similarity, feature-extraction{tag}]
---

# Sentence embeddings: head `{head}`, {dim} dimensions

Made with spectral_lightning. Vectors have length 1
and are compared by their cosine; texts are cut to {max_length} tokens. {parameters:,} parameters.
{matryoshka}
{usage}
"""
_MATRYOSHKA = """
The first {dims} numbers can be used alone. Scale them to length 1 again: with
sentence-transformers, `encode(texts, truncate_dim={smallest}, normalize_embeddings=True)`; without
`normalize_embeddings` they are not.
"""
_USAGE = {
    "sentence-transformers": """
```python
from sentence_transformers import SentenceTransformer{registration}

model = SentenceTransformer("path/of/this/folder"{trust})
vectors = model.encode(["A sentence.", "Another one."])
```
""",
    "huggingface": """
```python
from transformers import AutoModel, AutoTokenizer{registration}

model = AutoModel.from_pretrained("path/of/this/folder"{trust}).eval()
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
batch = tokenizer(["A sentence.", "Another one."], padding=True, return_tensors="pt")
vectors = model(batch["input_ids"], batch["attention_mask"]).{head}
```
""",
}


def export_sentence_encoder(
    encoder: SentenceEncoder, output: str | Path, format: ExportFormat = "sentence-transformers"
) -> None:
    """Write an embedding model for use elsewhere.

    - ``sentence-transformers``: one head, of modules that library has itself. The folder of a model
      on a Hugging Face backbone loads anywhere; that of our own encoder where this library has been
      imported, or with ``trust_remote_code=True``, since it carries its code.
    - ``huggingface``: all heads, for ``AutoModel.from_pretrained``, with the tokenizer.
    - ``safetensors``: weights alone, ``model.safetensors``, with the config in its metadata.

    Args:
        encoder: Model, tokenizer and head (`load_sentence_encoder`, `SentenceEmbedding.encoder`).
        output: New or empty folder to write.
        format: For which library.

    Raises:
        ImportError: If sentence-transformers is wanted and not installed.
        ValueError: If the format is unknown or has no modules for the head, the folder holds
            something, or the encoder cuts its vectors.
    """
    if format not in _WRITERS:
        raise ValueError(f"`format` must be one of {', '.join(_WRITERS)}, got {format!r}.")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`output` must be a new or an empty folder, but {folder} is not.")
    if encoder.dim != encoder.head_dims[encoder.head][0]:
        raise ValueError(
            f"`encoder` must give whole vectors to be exported, got dim={encoder.dim}; cut them"
            " where they are used (`truncate_dim`)."
        )
    with evaluating(encoder.model):
        _WRITERS[format](encoder, folder)


def _write_sentence_transformers(encoder: SentenceEncoder, folder: Path) -> None:
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Transformer
    except ImportError as error:
        raise ImportError(
            "The format sentence-transformers needs that package:"
            " `pip install spectral-lightning[embeddings]`."
        ) from error
    model = _spectra(encoder)
    head = _head_modules(model, encoder.head)
    with tempfile.TemporaryDirectory() as scratch:
        is_own = model.config.backbone_config is None
        backbone: Any = model.encoder_only() if is_own else model.encoder
        backbone.save_pretrained(scratch)
        _tokenizer(encoder).save_pretrained(scratch)
        first = Transformer(scratch, max_seq_length=encoder.max_length)
        whole = SentenceTransformer(
            modules=[first, *head], similarity_fn_name="cosine", device="cpu"
        )
        whole.save_pretrained(str(folder), create_model_card=False)
    _write_card(encoder, folder, "sentence-transformers", whole)


def _head_modules(model: SpectraModel, head: str) -> list[nn.Module]:
    """Modules of sentence-transformers that compute a head from the encoder's output.

    Raises:
        ValueError: If there are none for it.
    """
    from sentence_transformers.sentence_transformer.modules import (
        Dense,
        LayerNorm,
        Normalize,
        Pooling,
    )

    width = model.config.hidden_size
    modules: list[nn.Module] = [Pooling(width, model.config.pooling)]

    def dense(layer: nn.Linear, activation: Callable[..., Any]) -> nn.Module:
        copy = Dense(layer.in_features, layer.out_features, activation_function=activation)
        copy.linear.load_state_dict(layer.state_dict())
        return copy

    ours: Any = model.heads.get_submodule(head)
    if head == "retrieval":
        modules += [dense(ours.hidden, nn.GELU()), dense(ours.output, nn.Identity())]
    elif head in ("semantic", "entity", "anchor"):
        if getattr(ours, "output", None) is not None:
            norm = LayerNorm(ours.output.out_features)
            norm.norm.load_state_dict(ours.norm.state_dict())
            modules += [dense(ours.output, nn.Identity()), norm]
    else:
        raise ValueError(
            "`head` must be semantic, entity, anchor or retrieval for sentence-transformers, which"
            f" has no modules for {head!r}; use the format huggingface."
        )
    return [*modules, Normalize()]


def _write_huggingface(encoder: SentenceEncoder, folder: Path) -> None:
    _spectra(encoder).save_pretrained(folder)
    _tokenizer(encoder).save_pretrained(folder)
    _write_card(encoder, folder, "huggingface", _spectra(encoder))


def _write_safetensors(encoder: SentenceEncoder, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = _spectra(encoder)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    config = json.dumps(json.loads(model.config.to_json_string(use_diff=False)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "config": config})


def _write_card(encoder: SentenceEncoder, folder: Path, kind: str, written: nn.Module) -> None:
    model = _spectra(encoder)
    dims = model.head_dims()[encoder.head]
    is_own = model.config.backbone_config is None or kind == "huggingface"
    prefixes = _MATRYOSHKA.format(dims=" or ".join(str(dim) for dim in dims[1:]), smallest=dims[-1])
    own = {
        "registration": "\nimport spectral_lightning.models.spectra  # knows the architecture",
        "trust": "",
    }
    usage = _USAGE[kind].format(head=encoder.head, **(own if is_own else dict.fromkeys(own, "")))
    if is_own:
        usage += "\nWithout spectral_lightning, pass `trust_remote_code=True`.\n"
    card = _CARD.format(
        library="sentence-transformers" if kind == "sentence-transformers" else "transformers",
        tag=", sentence-transformers" if kind == "sentence-transformers" else "",
        head=encoder.head,
        dim=dims[0],
        max_length=encoder.max_length,
        parameters=sum(parameter.numel() for parameter in written.parameters()),
        matryoshka=prefixes if len(dims) > 1 else "",
        usage=usage.strip(),
    )
    (folder / "README.md").write_text(card, "utf-8")


def _tokenizer(encoder: SentenceEncoder) -> PreTrainedTokenizerBase:
    tokenizer = encoder.tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"`encoder` must hold a tokenizer of transformers, got a {type(tokenizer).__name__}."
        )
    return tokenizer


def _spectra(encoder: SentenceEncoder) -> SpectraModel:
    model = encoder.model
    if not isinstance(model, SpectraModel):
        raise ValueError(f"`encoder` must hold a SpectraModel, got a {type(model).__name__}.")
    return model


_WRITERS: dict[str, Callable[[SentenceEncoder, Path], None]] = {
    "sentence-transformers": _write_sentence_transformers,
    "huggingface": _write_huggingface,
    "safetensors": _write_safetensors,
}
