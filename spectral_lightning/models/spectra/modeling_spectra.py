"""Sentence-embedding model with several heads, in the manner of Hugging Face transformers."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils.generic import ModelOutput

from .attention_spectra import SpectraAttention, SpectralBranch
from .configuration_spectra import SpectraConfig
from .encoder_spectra import SpectraEncoder, SpectraLayer
from .heads_spectra import BASIS_STD, RankingHead, SpectraHeads
from .warm_start import bert_settings, copy_bert_, load_encoder


@dataclass
class SpectraOutput(ModelOutput):
    """What a `SpectraModel` returns; outputs of heads that are off are None.

    Embeddings are unit rows in float32 at least. A prefix of `semantic` or `entity` is an
    embedding too once it is scaled to norm one again.
    """

    last_hidden_state: Tensor | None = None
    """Hidden states, shape ``(B, S, H)``; at padding they mean nothing."""
    pooled: Tensor | None = None
    """One vector per text, shape ``(B, H)``."""
    semantic: Tensor | None = None
    """Unit rows, shape ``(B, semantic_dims[0])``."""
    entity: Tensor | None = None
    """Unit rows, shape ``(B, entity_dims[0])``."""
    retrieval: Tensor | None = None
    """Unit rows, shape ``(B, retrieval_dim)``."""
    anchor: Tensor | None = None
    """Unit rows, shape ``(B, anchor_dim)``."""
    ranking: Tensor | None = None
    """Unit rows, shape ``(B, ranking_dim)``."""
    anomalous: Tensor | None = None
    """Wide vector that the anomaly score is read from, shape ``(B, anomaly_dim)``."""
    spectral: Tensor | None = None
    """Narrow vector of the ranking head, shape ``(B, spectral_dim)``."""
    anomaly_score: Tensor | None = None
    """Distance from a learned set of directions, shape ``(B,)``, in ``(0, 0.5]``: one minus the
    sigmoid of the largest projection in size, so 0.5 is orthogonal to all. No loss trains it."""


class SpectraModel(PreTrainedModel):
    """Sentence-embedding model: an encoder, and heads of different widths on it.

    A text's embeddings do not depend on its padding, of whichever side, nor on the other texts of
    its batch, up to rounding (with ``compat="none"``; a backbone of Hugging Face may want padding
    on one side).

    Args:
        config: Shape and options.
        backbone: Encoder to use in place of a new one, which `config` then describes.

    Example:
        >>> model = SpectraModel(SpectraConfig.preset("tiny", vocab_size=100)).eval()
        >>> model(torch.tensor([[5, 6, 7]])).semantic.shape
        torch.Size([1, 64])
    """

    config_class = SpectraConfig
    config: SpectraConfig
    base_model_prefix = "spectra"
    supports_gradient_checkpointing = True
    _no_split_modules = [SpectraLayer.__name__]  # noqa: RUF012 - as transformers declares it
    _supports_sdpa = True

    def __init__(self, config: SpectraConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.encoder: nn.Module
        if config.backbone_config is None:
            self.encoder = SpectraEncoder(config)
        else:
            self.encoder = backbone or AutoModel.from_config(config.backbone_config)  # type: ignore[no-untyped-call]
            if getattr(self.encoder, "pooler", None) is not None:
                self.encoder.pooler = None  # never used: DDP would wait for its gradient
        self.heads = SpectraHeads(config)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_backbone(cls, source: Any, **settings: Any) -> "SpectraModel":
        """Put new heads on any encoder of Hugging Face.

        Args:
            source: Name on the Hugging Face Hub, folder, or model. A model becomes part of the new
                one and loses its pooler, which nothing here uses.
            **settings: Settings of `SpectraConfig` on heads and pooling.

        Raises:
            ValueError: If `source` is no encoder, or a setting contradicts its shape.
        """
        backbone = load_encoder(source)
        # A copy: transformers overwrites what a nested config says about attention kernels.
        backbone_config = copy.deepcopy(backbone.config)
        return cls(SpectraConfig(backbone_config=backbone_config, **settings), backbone)

    @classmethod
    def from_bert(cls, source: Any, **settings: Any) -> "SpectraModel":
        """Start from a copy of a BERT's weights, in our own encoder.

        The encoder first computes what the BERT computes: enrichments and spectral branches have
        zero effect, and gradients that change it.

        Args:
            source: Name on the Hugging Face Hub, folder, or `transformers.BertModel`.
            **settings: Settings of `SpectraConfig` that BERT does not fix.

        Raises:
            ValueError: If `source` is no BERT, or a setting contradicts its shape.
        """
        bert = load_encoder(source)
        model = cls(SpectraConfig(**bert_settings(bert.config, settings)))
        assert isinstance(model.encoder, SpectraEncoder)
        copy_bert_(model.encoder, bert)
        return model

    def encoder_only(self) -> "SpectraModel":
        """Return a model of the same encoder, not copied, and no heads."""
        config = copy.deepcopy(self.config)
        config.semantic_dims = ()
        config.use_entity = config.use_retrieval = config.use_anchor = config.use_ranking = False
        with torch.device("meta"):
            model = type(self)(config)
        model.encoder = self.encoder
        return model.train(self.training)

    def head_dims(self) -> dict[str, tuple[int, ...]]:
        """Return the widths of each embedding head that is built, largest first."""
        return dict(self.heads.dims)

    def gate_values(self) -> dict[str, Tensor]:
        """Return the gate of the spectral branch and the enrichments' weights of each layer."""
        found = {}
        for name, module in self.named_modules():
            if not isinstance(module, SpectraAttention):
                continue
            gates = [] if module.spectral is None else [module.spectral.fusion()]
            gates += [] if module.fractal is None else [module.fractal]
            if gates:
                found[name.removesuffix(".attention")] = torch.cat(gates).detach()
        return found

    def head_names(self) -> tuple[str, ...]:
        """Return the module names of the output layers, which optimizers treat apart."""
        built = [name for name in self.heads.dims if hasattr(getattr(self.heads, name), "output")]
        return tuple(f"heads.{name}.output" for name in built)

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of token embeddings."""
        if isinstance(self.encoder, SpectraEncoder):
            return self.encoder.embeddings.tokens
        return self.encoder.get_input_embeddings()  # type: ignore[operator]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of token embeddings."""
        if isinstance(self.encoder, SpectraEncoder):
            self.encoder.embeddings.tokens = value  # type: ignore[assignment]
        else:
            self.encoder.set_input_embeddings(value)  # type: ignore[operator]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SpectraOutput | tuple[Any, ...]:
        """Embed texts.

        Args:
            input_ids: Token ids, shape ``(B, S)``, int64.
            attention_mask: Nonzero for tokens that are no padding, shape ``(B, S)``; None if all
                are.
            token_type_ids: Shape ``(B, S)``; None for type 0.
            return_dict: False for a tuple of all outputs that are not None.

        Raises:
            ValueError: If the shapes differ, or a text has more tokens than there are positions.
        """
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape {tuple(input_ids.shape)} of `input_ids`,"
                f" got {tuple(attention_mask.shape)}."
            )
        mask = None if attention_mask is None else attention_mask.bool()
        if isinstance(self.encoder, SpectraEncoder):
            hidden = self.encoder(input_ids, mask, token_type_ids)
        else:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            hidden = self.encoder(input_ids, attention_mask=attention_mask, **types)[0]
        output = SpectraOutput(last_hidden_state=hidden, **self.heads(hidden, mask))
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Overwrite a module's own weights with initial values; those just loaded are kept."""
        if isinstance(module, SpectraAttention | SpectralBranch):
            module.reset_gates()
        elif isinstance(module, RankingHead):
            nn.init.normal_(module.basis, std=BASIS_STD)
        elif self.config.compat == "original":
            if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
                module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Embedding):
            std = self.config.initializer_range
            if getattr(module, "writes_to_residual", False):
                std /= (2 * self.config.num_hidden_layers) ** 0.5
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
