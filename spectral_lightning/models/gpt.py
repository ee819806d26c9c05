"""The GPT of nanochat, as a plain PyTorch module whose size follows from its depth."""

# Shape suffixes: B batch, T tokens, C model dimension, V vocabulary.

import math
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from spectral_lightning.models.kv_cache import KVCache
from spectral_lightning.models.layers import Block, rms_norm, rotary_table

SOFTCAP = 15.0  # nanochat of November 2025; the idea is from Gemma 2, sec. 2


class GPT(nn.Module):
    """Decoder-only language model after nanochat, with `depth` as the single dial of size.

    Token embedding, then norm; `depth` layers of rotary, query/key-normalised causal attention
    and a squared-ReLU feed-forward; norm; a separate output head; logits capped smoothly to
    ``(-15, 15)``. No biases, no norm weights. It has
    ``2 * vocab_size * dim + 12 * depth * dim^2`` parameters for ``dim = 64 * depth`` (with one
    key/value head per query head).

    The defaults are nanochat's of November 2025. At initialisation the logits are exactly zero,
    so the loss is ``ln(vocab_size)`` nats, and every layer is the identity.

    Args:
        depth: Number of layers, at least 1.
        vocab_size: Number of token ids, at least 1.
        sequence_len: Longest input in tokens, at least 1.
        model_dim: Width of the residual stream, even; None means ``64 * depth``.
        head_dim: Wanted channels per attention head, at least 2. There are
            ``ceil(model_dim / head_dim)`` heads, or the next number that divides `model_dim`
            into heads of even width.
        num_kv_heads: Key/value heads, a divisor of the number of heads; None means one per
            head. Fewer make the key/value cache smaller.
        qk_norm: Whether queries and keys are normalised, as in nanochat. Without it the scale of
            their weights sharpens attention without bound, which can make training unstable. The
            number of parameters is the same.

    Attributes:
        vocab_size: Number of token ids.
        sequence_len: Longest input in tokens.
        model_dim: Width of the residual stream.
        num_heads: Query heads per layer.
        num_kv_heads: Key/value heads per layer.
        config: Constructor arguments as plain values: ``GPT(**model.config)`` is of this shape.

    Raises:
        ValueError: If an argument is outside its range.

    References:
        Karpathy (2025), nanochat, nanochat/gpt.py. https://github.com/karpathy/nanochat
        Gemma Team (2024), "Gemma 2", sec. 2 (soft-capping). https://arxiv.org/abs/2408.00118

    Example:
        >>> model = GPT(depth=1, vocab_size=256, sequence_len=16)
        >>> model(torch.zeros(2, 16, dtype=torch.int64)).shape
        torch.Size([2, 16, 256])
    """

    def __init__(
        self,
        depth: int,
        vocab_size: int = 65_536,
        sequence_len: int = 2_048,
        *,
        model_dim: int | None = None,
        head_dim: int = 128,
        num_kv_heads: int | None = None,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        model_dim = 64 * depth if model_dim is None else model_dim
        _check_sizes(depth, vocab_size, sequence_len, model_dim, head_dim)
        self.vocab_size = vocab_size
        self.sequence_len = sequence_len
        self.model_dim = model_dim
        self.num_heads = _num_heads(model_dim, head_dim)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"`num_kv_heads` must divide the number of heads {self.num_heads}, "
                f"got {num_kv_heads}."
            )
        self.config = {
            "depth": depth,
            "vocab_size": vocab_size,
            "sequence_len": sequence_len,
            "model_dim": model_dim,
            "head_dim": head_dim,
            "num_kv_heads": num_kv_heads,
            "qk_norm": qk_norm,
        }
        self.wte = nn.Embedding(vocab_size, model_dim)
        self.blocks = nn.ModuleList(
            Block(layer, model_dim, self.num_heads, self.num_kv_heads, qk_norm=qk_norm)
            for layer in range(depth)
        )
        self.lm_head = nn.Linear(model_dim, vocab_size, bias=False)
        self.init_weights()

    @classmethod
    def nanochat_2025_11(
        cls, depth: int, *, vocab_size: int = 65_536, sequence_len: int = 2_048
    ) -> Self:
        """Build the model that nanochat trained in November 2025 at this depth.

        Args:
            depth: Number of layers; nanochat's speedrun used 20.
            vocab_size: Number of token ids; 65,536 in nanochat.
            sequence_len: Longest input in tokens; 2,048 in nanochat.

        Returns:
            The model, freshly initialised.
        """
        return cls(depth, vocab_size, sequence_len, head_dim=128)

    def head_names(self) -> tuple[str, ...]:
        """Return the module names of the output heads, which optimizers treat apart."""
        return ("lm_head",)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Overwrite all weights with fresh initial values.

        Linear weights are ``N(0, std)`` with ``std = min(1, sqrt(fan_out / fan_in)) /
        sqrt(fan_in)`` (Yang, Simon and Bernstein 2023, https://arxiv.org/abs/2310.17813),
        embeddings ``N(0, 1)``; the output head and both projections onto the residual stream
        are zero. Called by the constructor; call it again after ``to_empty`` when the model was
        built on the meta device.

        Args:
            generator: Source of randomness on the weights' device; None means PyTorch's global
                one, as in any PyTorch module.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)
            elif isinstance(module, nn.Linear) and name.endswith(("lm_head", "c_proj")):
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Linear):
                fan_out, fan_in = module.weight.shape
                std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
                nn.init.normal_(module.weight, std=std, generator=generator)

    @override
    def forward(self, tokens_BT: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """Score every token id as the successor of each token.

        Args:
            tokens_BT: Token ids, shape ``(B, T)``, int64, below `vocab_size`.
            kv_cache: Tokens already read, which come before `tokens_BT`; the new ones are added
                to it. None reads `tokens_BT` alone.

        Returns:
            Logits, shape ``(B, T, V)``, in ``(-15, 15)``, float32 also under autocast and in
            half precision (float64 for a float64 model), on the device of the model.

        Raises:
            ValueError: If `tokens_BT` is no matrix or longer than `sequence_len`, counting the
                tokens in `kv_cache`.
        """
        if tokens_BT.ndim != 2:
            raise ValueError(
                f"`tokens_BT` must have shape (batch, tokens), got {tuple(tokens_BT.shape)}."
            )
        start = 0 if kv_cache is None else kv_cache.length
        stop = start + tokens_BT.shape[1]
        if stop > self.sequence_len:
            raise ValueError(
                f"`tokens_BT` must reach at most sequence_len={self.sequence_len} tokens, "
                f"got {stop}; shorten the input or build the model with a larger `sequence_len`."
            )
        rotation = rotary_table(
            start, stop, self.model_dim // self.num_heads, device=tokens_BT.device
        )
        x_BTC = rms_norm(self.wte(tokens_BT))
        for block in self.blocks:
            x_BTC = block(x_BTC, rotation, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(tokens_BT.shape[1])
        logits_BTV: Tensor = self.lm_head(rms_norm(x_BTC))
        logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        return SOFTCAP * torch.tanh(logits_BTV / SOFTCAP)


def _check_sizes(
    depth: int, vocab_size: int, sequence_len: int, model_dim: int, head_dim: int
) -> None:
    for name, value in (
        ("depth", depth),
        ("vocab_size", vocab_size),
        ("sequence_len", sequence_len),
    ):
        if value < 1:
            raise ValueError(f"`{name}` must be >= 1, got {value}.")
    if model_dim < 2 or model_dim % 2:
        raise ValueError(f"`model_dim` must be even and >= 2, got {model_dim}.")
    if head_dim < 2:
        raise ValueError(f"`head_dim` must be >= 2, got {head_dim}.")


def _num_heads(model_dim: int, head_dim: int) -> int:
    """Smallest number of heads of even width, none wider than `head_dim`."""
    num_heads = math.ceil(model_dim / head_dim)
    while model_dim % (2 * num_heads):
        num_heads += 1
    return num_heads
