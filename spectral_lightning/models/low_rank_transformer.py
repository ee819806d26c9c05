"""A GPT-style transformer whose hidden matrices are products of thin factors."""

# Shape suffixes: B batch, T tokens, C model dimension, V vocabulary.

from dataclasses import asdict
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from spectral_lightning.models.kv_cache import KVCache
from spectral_lightning.models.low_rank_blocks import BlockSettings, LowRankBlock
from spectral_lightning.models.low_rank_init import (
    UNIT_EMBEDDINGS,
    TransformerInit,
    init_module_,
    residual_gain,
)
from spectral_lightning.nn.low_rank import Mode

Head = Literal["biased", "unbiased", "tied"]


class LowRankTransformer(nn.Module):
    """Decoder-only language model after GPT-2, with `LowRankLinear` in place of linear layers.

    Token and learned position embeddings; `depth` layers of causal attention and an exact-GELU
    feed-forward, each after a LayerNorm; LayerNorm; output head. Of each layer, queries, keys,
    values, the attention's output and both feed-forward matrices are factorised. With
    ``rank=None`` they are plain matrices, and all the rest is the same.

    The sizes are those of version 10 of the adaptive low-rank training that this model is after.
    That version has no causal mask, reads the next token off its input, and so its published loss
    is no loss of a language model; here tokens see no later ones unless `bidirectional` asks for
    it, and `assert_causal` refuses that.

    Args:
        vocab_size: Number of token ids, at least 1.
        sequence_len: Longest input in tokens, at least 1.
        depth: Number of layers, at least 1.
        model_dim: Width of the residual stream.
        num_heads: Attention heads, a divisor of `model_dim`.
        mlp_dim: Width in the middle of the feed-forward; None means ``4 * model_dim``.
        rank: Active components of every factorised layer at first, in ``[1, capacity]``; None
            makes plain linear layers.
        capacity: Components that every layer stores, the largest rank it can have; None for `rank`.
        mode: How a layer leaves inactive components out; see `LowRankLinear`.
        head: Output head: a linear layer of its own with bias (version 10) or without (13), or
            the token embedding (18).
        mlp_bias: Whether the feed-forward layers have a bias (version 18).
        dropout: Probability of dropout on the embeddings, attention weights and both contributions
            to the residual stream, in ``[0, 1)`` (0.1 in version 18).
        init: Initial values, see `init_weights`. ``"balanced"`` and ``"spectral"`` are this
            library's, the others those of the named version.
        bidirectional: Whether tokens see later ones, as in version 10.

    Attributes:
        vocab_size: Number of token ids.
        sequence_len: Longest input in tokens.
        model_dim: Width of the residual stream.
        num_heads: Attention heads per layer.
        bidirectional: Whether tokens see later ones.
        config: Constructor arguments as plain values: ``type(model)(**model.config)`` is of this
            shape. The ranks of the layers may have changed since; the state dict holds them.

    Raises:
        ValueError: If an argument is outside its range.

    References:
        Radford et al. (2019), "Language models are unsupervised multitask learners", sec. 2.3.
        TheApeMachine (2025), adaptive-low-rank-training, versions 10, 13 and 18.
        https://github.com/TheApeMachine/adaptive-low-rank-training

    Example:
        >>> model = LowRankTransformer(50, 16, depth=1, model_dim=32, num_heads=2, rank=4)
        >>> model(torch.zeros(2, 16, dtype=torch.int64)).shape
        torch.Size([2, 16, 50])
    """

    def __init__(
        self,
        vocab_size: int,
        sequence_len: int = 256,
        *,
        depth: int = 6,
        model_dim: int = 512,
        num_heads: int = 8,
        mlp_dim: int | None = None,
        rank: int | None = 64,
        capacity: int | None = None,
        mode: Mode = "sliced",
        head: Head = "biased",
        mlp_bias: bool = False,
        dropout: float = 0.0,
        init: TransformerInit = "balanced",
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        settings = BlockSettings(
            depth=depth,
            model_dim=model_dim,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            rank=rank,
            capacity=capacity,
            mode=mode,
            mlp_bias=mlp_bias,
            dropout=dropout,
            init=init,
            bidirectional=bidirectional,
        )
        _check(vocab_size, sequence_len, head, init)
        self.vocab_size = vocab_size
        self.sequence_len = sequence_len
        self.model_dim = model_dim
        self.num_heads = num_heads
        self.bidirectional = bidirectional
        self.init = init
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "sequence_len": sequence_len,
            "head": head,
            **asdict(settings),
        }
        self.wte = nn.Embedding(vocab_size, model_dim)
        self.wpe = nn.Embedding(sequence_len, model_dim)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(LowRankBlock(layer, settings) for layer in range(depth))
        self.ln_f = nn.LayerNorm(model_dim)
        # A tied head is the embedding itself: a second name for it would not survive `to_empty`.
        self.lm_head = (
            None if head == "tied" else nn.Linear(model_dim, vocab_size, bias=head == "biased")
        )
        self.init_weights()

    @classmethod
    def v10(cls, vocab_size: int, **changes: Any) -> Self:
        """Build version 10 of the original, with a causal mask added.

        Args:
            vocab_size: Number of token ids; 33,277 words in the original's run.
            **changes: Arguments that differ, such as ``bidirectional=True`` for the original.
        """
        return cls(**{"vocab_size": vocab_size, "init": "v10", **changes})

    @classmethod
    def v13(cls, vocab_size: int, **changes: Any) -> Self:
        """Build version 13 of the original: smaller, and stored at twice its rank.

        Args:
            vocab_size: Number of token ids; characters in the original.
            **changes: Arguments that differ.
        """
        sizes = {"model_dim": 256, "num_heads": 4, "rank": 64, "capacity": 128}
        return cls(
            **{"vocab_size": vocab_size, **sizes, "head": "unbiased", "init": "v13", **changes}
        )

    @classmethod
    def v18(cls, vocab_size: int, **changes: Any) -> Self:
        """Build version 18 of the original: tied head, dropout, biases, small initial values.

        Args:
            vocab_size: Number of token ids; 284 characters in the original's run.
            **changes: Arguments that differ.
        """
        kinds = {"head": "tied", "mlp_bias": True, "dropout": 0.1, "init": "v18"}
        return cls(**{"vocab_size": vocab_size, **kinds, **changes})

    def head_names(self) -> tuple[str, ...]:
        """Return the module names of the output heads, which optimizers treat apart."""
        return ("wte",) if self.lm_head is None else ("lm_head",)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Overwrite all weights with fresh initial values, at the layers' present ranks.

        ``"balanced"`` and ``"spectral"``: embeddings and head ``N(0, 0.02^2)``; factors as
        `LowRankLinear` has it, plain matrices ``N(0, 1 / fan_in)``, both times
        ``(2 * depth) ** -0.5`` where they write to the residual stream (Radford et al. 2019,
        sec. 2.3). ``"v10"`` and ``"v13"``: embeddings ``N(0, 1)``, plain matrices and head as
        PyTorch has them; factors ``U ~ N(0, 1 / m)`` and ``V ~ N(0, 1 / n)``, in version 13
        ``V ~ N(0, 1 / m)``. ``"v18"``: everything ``N(0, 0.02^2)``. Biases start at zero where
        nothing else is said, norms at the identity. Called by the constructor; call it again after
        ``to_empty`` when the model was built on the meta device.

        Args:
            generator: Source of randomness on the weights' device; None means PyTorch's global
                one, as in any PyTorch module.
        """
        gain = residual_gain(self.init, len(self.blocks))
        for name, module in self.named_modules():
            init_module_(
                module,
                self.init,
                gain=gain if name.endswith("c_proj") else 1.0,
                is_head=name == "lm_head",
                generator=generator,
            )

    @override
    def forward(self, tokens_BT: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """Score every token id as the successor of each token.

        Args:
            tokens_BT: Token ids, shape ``(B, T)``, int64, below `vocab_size`.
            kv_cache: Tokens already read, which come before `tokens_BT`; the new ones are added
                to it. None reads `tokens_BT` alone.

        Returns:
            Logits, shape ``(B, T, V)``, float32 also under autocast and in half precision (float64
            for a float64 model), on the device of the model.

        Raises:
            ValueError: If `tokens_BT` is no matrix or longer than `sequence_len`, counting the
                tokens in `kv_cache`, or a bidirectional model is given a cache.
        """
        if tokens_BT.ndim != 2:
            raise ValueError(
                f"`tokens_BT` must have shape (batch, tokens), got {tuple(tokens_BT.shape)}."
            )
        if kv_cache is not None and self.bidirectional:
            raise ValueError(
                "`kv_cache` must be None for a bidirectional model, got one; earlier tokens would "
                "have to be read again."
            )
        start = 0 if kv_cache is None else kv_cache.length
        stop = start + tokens_BT.shape[1]
        if stop > self.sequence_len:
            raise ValueError(
                f"`tokens_BT` must reach at most sequence_len={self.sequence_len} tokens, "
                f"got {stop}; shorten the input or build the model with a larger `sequence_len`."
            )
        x_BTC = self.drop(self.wte(tokens_BT) + self.wpe.weight[start:stop])
        for block in self.blocks:
            x_BTC = block(x_BTC, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(tokens_BT.shape[1])
        x_BTC = self.ln_f(x_BTC)
        logits_BTV: Tensor = (
            F.linear(x_BTC, self.wte.weight) if self.lm_head is None else self.lm_head(x_BTC)
        )
        return logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))


def _check(vocab_size: int, sequence_len: int, head: str, init: str) -> None:
    for name, value in (("vocab_size", vocab_size), ("sequence_len", sequence_len)):
        if value < 1:
            raise ValueError(f"`{name}` must be >= 1, got {value}.")
    if head not in get_args(Head):
        raise ValueError(f"`head` must be one of {get_args(Head)}, got {head!r}.")
    if head == "tied" and init in UNIT_EMBEDDINGS:  # version 14: an initial loss of 33 nats
        raise ValueError(
            f"`head` must not be 'tied' with the unit-variance embeddings of init={init!r}, whose "
            "logits would be huge; use init='balanced'."
        )
