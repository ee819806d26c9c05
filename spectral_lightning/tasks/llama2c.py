"""Files of llama2.c as Hugging Face models: small Llamas that are trained already.

Reads the first version of the format, which has no magic number: seven sizes, then float32 weights.

References:
    Karpathy (2023), llama2.c, export.py (`legacy_export`) and run.c. https://github.com/karpathy/llama2.c
"""

import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_MAGIC = 0x616B3432  # of the later versions
_HEADER = struct.Struct("<7i")
_SPACE = "\u2581"  # SentencePiece's sign for a space
_SPECIAL = ("<unk>", "<s>", "</s>")


def load_llama2c(path: str | Path) -> LlamaForCausalLM:
    """Load a checkpoint of llama2.c.

    Args:
        path: File of the first version of the format, such as ``stories260K.bin``.

    Returns:
        The model in evaluation mode on the CPU, float32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a complete file of this format.
    """
    header, numbers = _read(_existing(path))
    dim, hidden, depth, heads, kv_heads, vocab_size, sequence_len = header
    head_dim = dim // heads
    is_tied, vocab_size = vocab_size > 0, abs(vocab_size)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=sequence_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=is_tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    shapes = {
        "embed_tokens": (vocab_size, dim),
        "input_layernorm": (depth, dim),
        "self_attn.q_proj": (depth, dim, dim),
        "self_attn.k_proj": (depth, kv_heads * head_dim, dim),
        "self_attn.v_proj": (depth, kv_heads * head_dim, dim),
        "self_attn.o_proj": (depth, dim, dim),
        "post_attention_layernorm": (depth, dim),
        "mlp.gate_proj": (depth, hidden, dim),
        "mlp.down_proj": (depth, dim, hidden),
        "mlp.up_proj": (depth, hidden, dim),
        "norm": (dim,),
        "rotation": (2, sequence_len, head_dim // 2),  # cosines and sines, which the model makes
    }
    if not is_tied:
        shapes["lm_head"] = (vocab_size, dim)
    tensors = _cut(numbers, shapes, path)
    for name, count in (("self_attn.q_proj", heads), ("self_attn.k_proj", kv_heads)):
        tensors[name] = _half_rotated(tensors[name], count)
    model = LlamaForCausalLM(config)
    model.load_state_dict(_state_dict(tensors, depth))
    return nn.Module.eval(model)


def load_llama2c_tokenizer(path: str | Path, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Load a vocabulary of llama2.c: byte-pair encoding of characters, with bytes for the rest.

    Two neighbours merge if together they are in the vocabulary, the best score first. Texts open
    with ``<s>`` and a space.

    Args:
        path: File such as ``tok512.bin``.
        vocab_size: Number of tokens in it, which the file itself does not say.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold this many tokens.
    """
    pieces = _read_pieces(_existing(path), vocab_size)
    vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
    ranked = sorted(pieces[len(_SPECIAL) :], key=lambda item: -item[1])
    merges = [
        (piece[:cut], piece[cut:])
        for piece, _ in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_llama2c(model_path: str | Path, tokenizer_path: str | Path, folder: str | Path) -> None:
    """Write a checkpoint and a vocabulary of llama2.c as a folder that `from_pretrained` takes.

    Args:
        model_path: Checkpoint, see `load_llama2c`.
        tokenizer_path: Vocabulary, see `load_llama2c_tokenizer`.
        folder: Where to write; made if it does not exist.
    """
    model = load_llama2c(model_path)
    tokenizer = load_llama2c_tokenizer(tokenizer_path, model.config.vocab_size)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"`path` must be an existing file, got {path}.")
    return path


def _read(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """The seven sizes and all numbers after them."""
    content = path.read_bytes()
    if len(content) < _HEADER.size or struct.unpack_from("<I", content)[0] == _MAGIC:
        raise ValueError(
            f"`path` must be a checkpoint of the first version of llama2.c, got {path};"
            " export it with `--version 0`."
        )
    header = _HEADER.unpack_from(content)
    sizes = (*header[:5], abs(header[5]), header[6])
    if min(sizes) < 1 or header[0] % header[3] or header[3] % header[4]:
        raise ValueError(
            f"`path` must be a checkpoint of llama2.c, got {path} with sizes {header}."
        )
    rest = len(content) - _HEADER.size
    return header, np.frombuffer(content, "<f4", count=rest // 4, offset=_HEADER.size).copy()


def _cut(
    numbers: np.ndarray, shapes: dict[str, tuple[int, ...]], path: str | Path
) -> dict[str, Tensor]:
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    if numbers.size != sum(sizes):
        raise ValueError(
            f"`path` must hold {sum(sizes)} numbers after its header, got {path} with"
            f" {numbers.size}; the file is cut off or of another format."
        )
    parts = torch.split(torch.from_numpy(numbers), sizes)
    return {
        name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def _half_rotated(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head: llama2.c turns neighbours, Hugging Face the two halves."""
    depth, rows, dim = weight.shape
    pairs = weight.view(depth, num_heads, rows // num_heads // 2, 2, dim)
    return pairs.transpose(2, 3).reshape(depth, rows, dim)


def _state_dict(tensors: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    state = {}
    for name, tensor in tensors.items():
        if name in ("embed_tokens", "norm"):
            state[f"model.{name}.weight"] = tensor
            state.setdefault("lm_head.weight", tensors["embed_tokens"])
        elif name == "lm_head":
            state["lm_head.weight"] = tensor
        elif name != "rotation":
            for layer in range(depth):
                state[f"model.layers.{layer}.{name}.weight"] = tensor[layer]
    return state


def _read_pieces(path: Path, vocab_size: int) -> list[tuple[str, float]]:
    """Texts and scores of all tokens, in the order of their ids."""
    content, position = path.read_bytes(), 4  # after the length of the longest
    pieces: list[tuple[str, float]] = []
    while position + 8 <= len(content):
        score, length = struct.unpack_from("<fi", content, position)
        text = content[position + 8 : position + 8 + length].decode("utf-8", "replace")
        pieces.append((text.replace(" ", _SPACE), score))
        position += 8 + length
    if len(pieces) != vocab_size or position != len(content):
        raise ValueError(
            f"`path` must hold {vocab_size} tokens, got {path} with {len(pieces)}; give the"
            " vocabulary that the checkpoint was trained with."
        )
    for number, special in enumerate(_SPECIAL):
        pieces[number] = (special, 0.0)
    return pieces
