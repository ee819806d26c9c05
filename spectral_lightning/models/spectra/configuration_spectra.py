"""Shape and options of a Spectra model."""

import inspect
from itertools import pairwise
from typing import Any, Literal

from transformers import AutoConfig, PretrainedConfig

from .presets import PRESETS

_CHOICES = {
    "pooling": ("mean", "cls"),
    "semantic_head": ("linear", "none"),
    "norm": ("pre", "post"),
    "feedforward": ("swiglu", "gelu"),
    "compat": ("none", "original"),
}
_COUNTS = (
    *("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "intermediate_size", "spectral_dim", "max_length", "retrieval_dim"),
    *("anchor_dim", "ranking_dim", "anomaly_dim", "num_anomaly_basis"),
)
# Settings that a backbone fixes, where its own config has them.
_OF_THE_BACKBONE = (
    *("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "intermediate_size", "type_vocab_size"),
)


class SpectraConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Shape and options of a `SpectraModel`.

    Every setting is a keyword argument. A head or branch that is off is not built: it has no
    parameter and costs nothing.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> SpectraConfig.preset("tiny", use_anchor=False).semantic_dims
        (64, 48, 32)
    """

    model_type = "spectra"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 - as transformers declares it

    vocab_size: int = 30522
    """Number of token ids; the default is that of bert-base-uncased."""
    max_position_embeddings: int = 512
    """Longest text, in tokens without padding."""
    hidden_size: int = 1024
    """Width of the residual stream, a multiple of `num_attention_heads`."""
    num_hidden_layers: int = 24
    """Layers."""
    num_attention_heads: int = 16
    """Heads of the main attention."""
    intermediate_size: int | None = None
    """Width inside the feed-forward; None for ``4 * hidden_size``."""
    spectral_dim: int = 192
    """Width of the spectral branch and of the `spectral` output."""
    fractal_depth: int = 1
    """Enrichments of the attention logits, 0 or more; each doubles the width of the keys."""
    learnable_fractal: bool = True
    """Whether the weights of the enrichments are trained."""
    learnable_fusion: bool = True
    """Whether the gate of the spectral branch is trained."""
    use_spectral: bool = True
    """Whether attention has its spectral branch."""
    use_anchor: bool = True
    """Whether there is an anchor head."""
    use_entity: bool = True
    """Whether there is an entity head."""
    use_ranking: bool = True
    """Whether there is a ranking head, which also gives the anomaly score."""
    use_retrieval: bool = True
    """Whether there is a retrieval head."""
    max_length: int = 160
    """Tokens that a text should be cut to, at most `max_position_embeddings`; in training the data
    module's own `max_length` counts."""
    hidden_dropout: float = 0.1
    """Probability of dropout of embeddings, attention outputs and feed-forward outputs."""
    pooling: Literal["mean", "cls"] = "mean"
    """A text's vector: mean over its tokens, or its first token."""
    semantic_dims: tuple[int, ...] = (768, 512, 256)
    """Widths of the semantic embedding and of its prefixes, descending; empty for no such head."""
    semantic_head: Literal["linear", "none"] = "linear"
    """What makes the semantic embedding of the pooled state: a linear layer and a layer norm, or
    nothing, as in most models of sentence-transformers; the first width is then `hidden_size`."""
    entity_dims: tuple[int, ...] = (384, 192, 96)
    """Widths of the entity embedding and of its prefixes, descending."""
    retrieval_dim: int = 128
    """Width of the retrieval embedding."""
    anchor_dim: int = 64
    """Width of the anchor embedding."""
    ranking_dim: int = 1536
    """Width of the ranking embedding."""
    anomaly_dim: int | None = None
    """Width of the `anomalous` output; None for ``max(1024, 2 * hidden_size)``."""
    num_anomaly_basis: int = 16
    """Directions that the anomaly score compares with."""
    norm: Literal["pre", "post"] = "pre"
    """Layer norm before each sublayer, or after the residual sum as in the original and BERT."""
    final_norm: bool = True
    """Whether a layer norm follows the last layer."""
    feedforward: Literal["swiglu", "gelu"] = "swiglu"
    """Three matrices with a gate, or two with a GELU as in BERT."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every layer norm of the encoder."""
    embedding_norm: bool = False
    """Whether a layer norm follows the embeddings, as in BERT."""
    type_vocab_size: int = 0
    """Token types with an embedding, 2 in BERT; 0 ignores token types."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights; from Devlin et al. 2019 (BERT)."""
    compat: Literal["none", "original"] = "none"
    """``"original"`` computes what the original model computes, where embeddings change with
    padding: no mask in the spectral branch, a gate that can die, masked logits of -10000. For
    reproduction only."""
    backbone_config: PretrainedConfig | dict[str, Any] | None = None
    """Config of the Hugging Face encoder in place of our own; settings of the latter then have no
    effect. Given by `SpectraModel.from_backbone`."""

    def __init__(self, **settings: Any) -> None:
        given = {name: settings.pop(name) for name in _FIELDS if name in settings}
        for name in _FIELDS:
            setattr(self, name, given.get(name, getattr(SpectraConfig, name)))
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        if self.backbone_config is not None:
            self._follow_backbone(self.backbone_config, given)
        self.semantic_dims, self.entity_dims = tuple(self.semantic_dims), tuple(self.entity_dims)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.anomaly_dim is None:
            self.anomaly_dim = max(1024, 2 * self.hidden_size)
        self._check()
        super().__init__(**settings)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "SpectraConfig":
        """Return one of the named shapes.

        ``M456, M600, M700, M1B`` are the original's, with 466, 719, 1036 and 2388 million
        parameters; with ``-advertised`` after the name, they are resized to 458, 600, 700 and
        1000 million within 1 %. ``mini`` has the shape of MiniLM-L6, ``tiny`` is for tests.

        Args:
            name: Name of the preset.
            **overrides: Settings that differ.

        Raises:
            ValueError: If there is no such preset or setting.
        """
        if name not in PRESETS:
            raise ValueError(f"`name` must be one of {', '.join(PRESETS)}, got {name!r}.")
        unknown = sorted(set(overrides) - set(_FIELDS))
        if unknown:
            raise ValueError(f"`overrides` must be settings of a SpectraConfig, got {unknown}.")
        return cls(**PRESETS[name] | overrides)

    def _follow_backbone(self, backbone: PretrainedConfig, given: dict[str, Any]) -> None:
        for name in _OF_THE_BACKBONE:
            value = getattr(backbone, name, None)
            if value is None:
                continue
            if given.get(name, value) != value:
                raise ValueError(
                    f"`{name}` must be the backbone's {value}, got {given[name]}; leave it out."
                )
            setattr(self, name, value)
        if "max_length" not in given:
            self.max_length = min(self.max_length, self.max_position_embeddings)

    def _check(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")
        for name in ("fractal_depth", "type_vocab_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be >= 0, got {getattr(self, name)}.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "`hidden_size` must be a multiple of"
                f" num_attention_heads={self.num_attention_heads}, got {self.hidden_size}."
            )
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"`hidden_dropout` must be in [0, 1), got {self.hidden_dropout}.")
        if self.max_length > self.max_position_embeddings:
            raise ValueError(
                "`max_length` must be at most"
                f" max_position_embeddings={self.max_position_embeddings}, got {self.max_length}."
            )
        self._check_prefixes()

    def _check_prefixes(self) -> None:
        if self.use_entity and not self.entity_dims:
            raise ValueError(
                "`entity_dims` must not be empty with an entity head, got (); use use_entity=False."
            )
        bare = self.semantic_head == "none" and self.semantic_dims
        if bare and self.semantic_dims[0] != self.hidden_size:
            raise ValueError(
                f"`semantic_dims` must begin with hidden_size={self.hidden_size} when"
                f" `semantic_head` is none, got {self.semantic_dims}."
            )
        for name in ("semantic_dims", "entity_dims"):
            dims = getattr(self, name)
            if min(dims, default=1) < 1 or any(small >= large for large, small in pairwise(dims)):
                raise ValueError(f"`{name}` must be descending numbers >= 1, got {dims}.")


_FIELDS = tuple(inspect.get_annotations(SpectraConfig))
