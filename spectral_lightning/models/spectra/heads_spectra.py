"""Embedding heads on the encoder's hidden states."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_spectra import SpectraConfig

BASIS_STD = 0.02  # the original's
NORM_EPS = 1e-5  # the original's, and what sentence-transformers has


def unit_rows(rows: Tensor) -> Tensor:
    """Scale rows to norm one, in float32 at least."""
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)


def mean_pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that are no padding.

    Args:
        hidden: Shape ``(B, S, H)``.
        mask: True for tokens that are no padding, shape ``(B, S)``; None if all are.

    Returns:
        Shape ``(B, H)``; zero for a row without tokens.
    """
    if mask is None:
        return hidden.mean(dim=1)
    share = mask / mask.sum(dim=-1, keepdim=True).clamp_min(1)
    return (share[:, None, :].to(hidden.dtype) @ hidden).squeeze(1)


def first_token(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """First token that is no padding; arguments and shapes as in `mean_pool`."""
    if mask is None:
        return hidden[:, 0]
    first = mask.int().argmax(dim=-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), first]


class LinearHead(nn.Module):
    """Linear layer, layer norm, unit length: the semantic, entity and anchor heads.

    Args:
        config: Shape and options.
        dim: Width of the embedding.
    """

    def __init__(self, config: SpectraConfig, dim: int) -> None:
        super().__init__()
        self.output = nn.Linear(config.hidden_size, dim)
        self.norm = nn.LayerNorm(dim, NORM_EPS)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return unit rows of shape ``(B, dim)``."""
        return unit_rows(self.norm(self.output(pooled)))


class NoHead(nn.Module):
    """The pooled state itself, at unit length."""

    def forward(self, pooled: Tensor) -> Tensor:
        """Return unit rows of shape ``(B, H)``."""
        return unit_rows(pooled)


class RetrievalHead(nn.Module):
    """Two linear layers with a GELU between, unit length.

    Args:
        config: Shape and options.
    """

    def __init__(self, config: SpectraConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.retrieval_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return unit rows of shape ``(B, retrieval_dim)``."""
        return unit_rows(self.output(F.gelu(self.hidden(pooled))))


class RankingHead(nn.Module):
    """Ranking embedding, and how unlike a learned set of directions a text is.

    Args:
        config: Shape and options.
    """

    def __init__(self, config: SpectraConfig) -> None:
        super().__init__()
        assert config.anomaly_dim is not None
        wide, eps = 2 * config.hidden_size, NORM_EPS
        anomaly, spectral = config.anomaly_dim, config.spectral_dim
        self.widen = nn.Linear(config.hidden_size, wide)
        self.widen_norm = nn.LayerNorm(wide, eps)
        self.anomalous = nn.Linear(wide, anomaly)
        self.anomalous_norm = nn.LayerNorm(anomaly, eps)
        self.spectral_hidden = nn.Linear(anomaly, spectral)
        self.spectral = nn.Linear(spectral, spectral)
        self.spectral_norm = nn.LayerNorm(spectral, eps)
        self.basis = nn.Parameter(BASIS_STD * torch.randn(config.num_anomaly_basis, anomaly))
        self.output = nn.Linear(anomaly + spectral, config.ranking_dim)
        self.output_norm = nn.LayerNorm(config.ranking_dim, eps)

    def forward(self, mean: Tensor) -> dict[str, Tensor]:
        """Return the outputs of this head by their names in `SpectraOutput`.

        Args:
            mean: Mean over the tokens of a text, shape ``(B, H)``.
        """
        wide = self.widen_norm(F.gelu(self.widen(mean)))
        anomalous = self.anomalous_norm(F.gelu(self.anomalous(wide)))
        spectral = self.spectral_norm(self.spectral(torch.tanh(self.spectral_hidden(anomalous))))
        with torch.autocast(mean.device.type, enabled=False):
            dtype = torch.promote_types(anomalous.dtype, torch.float32)
            likeness = (anomalous.to(dtype) @ self.basis.to(dtype).mT).abs().amax(dim=-1)
            score = 1 - likeness.sigmoid()
        scored = anomalous * score[:, None].to(anomalous.dtype)
        ranking = self.output_norm(self.output(torch.cat((scored, spectral), dim=-1)))
        return {
            "ranking": unit_rows(ranking),
            "anomalous": anomalous.to(dtype),
            "spectral": spectral.to(dtype),
            "anomaly_score": score,
        }


class SpectraHeads(nn.Module):
    """All heads that the config asks for; the others do not exist.

    Args:
        config: Shape and options.
    """

    def __init__(self, config: SpectraConfig) -> None:
        super().__init__()
        self.pool = mean_pool if config.pooling == "mean" else first_token
        semantic, entity = config.semantic_dims, config.entity_dims
        self.semantic: nn.Module | None = None
        if semantic:
            bare = config.semantic_head == "none"
            self.semantic = NoHead() if bare else LinearHead(config, semantic[0])
        self.entity = LinearHead(config, entity[0]) if config.use_entity else None
        self.retrieval = RetrievalHead(config) if config.use_retrieval else None
        self.anchor = LinearHead(config, config.anchor_dim) if config.use_anchor else None
        self.ranking = RankingHead(config) if config.use_ranking else None
        dims = {
            "semantic": tuple(semantic),
            "entity": tuple(entity),
            "retrieval": (config.retrieval_dim,),
            "anchor": (config.anchor_dim,),
            "ranking": (config.ranking_dim,),
        }
        self.dims = {name: dims[name] for name in dims if getattr(self, name) is not None}

    def forward(self, hidden: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Return the pooled hidden state and the outputs of all heads, by name.

        Args:
            hidden: Hidden states, shape ``(B, S, H)``.
            mask: True for tokens that are no padding, shape ``(B, S)``; None if all are.
        """
        pooled = self.pool(hidden, mask)
        outputs = {"pooled": pooled}
        for name in self.dims:
            if name != "ranking":
                outputs[name] = self.get_submodule(name)(pooled)
        if self.ranking is not None:
            outputs |= self.ranking(mean_pool(hidden, mask))
        return outputs
