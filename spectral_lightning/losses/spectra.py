"""The loss of a sentence-embedding model with several heads: a weighted sum of terms."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from spectral_lightning.losses.cross_entropy import CrossEntropy
from spectral_lightning.losses.embedding_terms import (
    AlignmentForm,
    BridgeForm,
    SpectralForm,
    alignment_divergence,
    alignment_loss,
    bridge_loss,
    renyi_entropy,
    softmax_entropy,
    triplet_loss,
)
from spectral_lightning.losses.gathering import Group, gather_rows
from spectral_lightning.losses.in_batch import (
    Comparison,
    Groups,
    compare,
    contrast,
    stack_groups,
)
from spectral_lightning.losses.info_nce import check_contrast, check_temperature
from spectral_lightning.losses.matryoshka import Matryoshka
from spectral_lightning.losses.targets import check_choice

Part = Literal["anchor", "bridge", "matryoshka", "angular", "spectral"]
"""What can be switched off."""

_SEMANTIC_DIMS = Matryoshka(dims=(768, 512, 256), weights=(0.35, 0.30, 0.25))

# Heads of each term, in the order in which terms are computed and logged.
_HEADS = {
    "semantic": ("semantic",),
    "anchor": ("anchor",),
    "bridge": ("entity", "semantic"),
    "retrieval": ("retrieval",),
    "retrieval_triplet": ("retrieval",),
    "ranking": ("ranking",),
    "ranking_triplet": ("ranking",),
    "alignment": ("retrieval", "ranking"),
    "spectral": ("spectral",),
}

# Fields of which each switches a weighted term off.
_SWITCHES: dict[str, tuple[str, ...]] = {
    "semantic": (),
    "anchor": ("anchor",),
    "bridge": ("bridge",),
    "retrieval": (),
    "ranking": (),
    "alignment": ("angular", "matryoshka"),
    "spectral": ("spectral",),
}


class SpectraTerms(NamedTuple):
    """A loss and what it is made of.

    Attributes:
        total: Sum of the terms, each times its weight.
        terms: Each term, without its weight.
    """

    total: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class SpectraLoss:
    """Loss of the heads of a sentence-embedding model.

    Terms, of which one with weight 0 or switched off is not computed:

    - ``semantic``: InfoNCE of the semantic head's prefixes (`Matryoshka`);
    - ``anchor``, ``retrieval``, ``ranking``: InfoNCE of these heads;
    - ``retrieval_triplet``, ``ranking_triplet``: `triplet_loss`, where there are hard negatives;
    - ``bridge``: `bridge_loss` of entity and semantic head, anchors and positives;
    - ``alignment``: the retrieval head's cosines are to be those of the ranking head;
    - ``spectral``: minus the entropy of the anchors' spectral head.

    Weights and sizes are those of Spectra-NSA. Unlike there, hard negatives and the texts of other
    ranks are compared with in InfoNCE, and false negatives are not.

    Raises:
        ValueError: If a setting is outside its range, or a head or the loss is left without term.

    References:
        Cangi (2025), Spectra-NSA. https://github.com/Daniele-Cangi/Spectra-NSA
    """

    semantic_weight: float = 1.0
    """Weight of ``semantic``, at least 0."""
    anchor_weight: float = 0.15
    """Weight of ``anchor``, at least 0."""
    bridge_weight: float = 0.02
    """Weight of ``bridge``, at least 0."""
    retrieval_weight: float = 0.25
    """Weight of ``retrieval``, at least 0."""
    ranking_weight: float = 1.0
    """Weight of ``ranking``, at least 0."""
    alignment_weight: float = 0.08
    """Weight of ``alignment``, at least 0."""
    spectral_weight: float = 0.005
    """Weight of ``spectral``, at least 0."""
    triplet_weight: float = 1.0
    """Weight of a head's triplet term as a share of the head's weight, at least 0."""

    anchor: bool = True
    """Whether the anchor head is trained."""
    bridge: bool = True
    """Whether the entity head is trained, by ``bridge``."""
    matryoshka: bool = True
    """False: no ``alignment``, and the largest of `semantic_dims` alone, with the weight of all."""
    angular: bool = True
    """Whether ``alignment`` is computed."""
    spectral: bool = True
    """Whether ``spectral`` is computed."""

    semantic_dims: Matryoshka = _SEMANTIC_DIMS
    """Prefixes of the semantic head."""
    bridge_dims: tuple[int, ...] = (96,)
    """Prefixes that ``bridge`` compares."""
    bridge_form: BridgeForm = "cosine"
    """``cosine``, or ``original``, the mean square from which the semantic head learns, too."""
    alignment_form: AlignmentForm = "mse"
    """``mse`` of cosines, the original, or ``kl`` of the rankings of the batch."""
    spectral_form: SpectralForm = "renyi"
    """``renyi``, the entropy of the batch's spectrum, or ``softmax``, the original."""
    triplet_margin: float = 0.3
    """Wanted difference of distances, above 0."""
    symmetric: bool = True
    """Whether positives look for their anchors, too."""
    negative_margin: float | None = None
    """Texts whose cosine is above that of the positive minus this are no negatives."""
    cross_entropy: CrossEntropy | None = None
    """Cross-entropy in InfoNCE; None for softmax."""

    def __post_init__(self) -> None:
        weights = {name: getattr(self, f"{name}_weight") for name in (*_SWITCHES, "triplet")}
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"`{name}_weight` must be finite and >= 0, got {weight}.")
        if not 0 < self.triplet_margin < float("inf"):
            raise ValueError(f"`triplet_margin` must be finite and > 0, got {self.triplet_margin}.")
        if not self.bridge_dims or min(self.bridge_dims) < 1:
            raise ValueError(f"`bridge_dims` must be sizes >= 1, got {self.bridge_dims}.")
        check_choice("bridge_form", self.bridge_form, BridgeForm)
        check_choice("alignment_form", self.alignment_form, AlignmentForm)
        check_choice("spectral_form", self.spectral_form, SpectralForm)
        check_contrast(self.negative_margin, self.cross_entropy)
        self._check_all_heads_learn()

    def without(self, parts: Iterable[Part]) -> Self:
        """The loss with parts switched off: fields of this class that are true or false.

        Example:
            >>> SpectraLoss().without(["anchor", "bridge"]).required_heads()
            ('semantic', 'retrieval', 'ranking', 'spectral')
        """
        changes: dict[str, Any] = dict.fromkeys(parts, False)
        for part in changes:
            check_choice("without", part, Part)
        return replace(self, **changes)

    def term_weights(self) -> dict[str, float]:
        """Weight of each term that is computed."""
        weights = {}
        for name, switches in _SWITCHES.items():
            is_on = all(getattr(self, switch) for switch in switches)
            weights[name] = getattr(self, f"{name}_weight") if is_on else 0.0
        for name in ("retrieval", "ranking"):
            weights[f"{name}_triplet"] = self.triplet_weight * weights[name]
        return {name: weights[name] for name in _HEADS if weights[name] > 0}

    def required_heads(self) -> tuple[str, ...]:
        """Heads that a term needs; a model that is trained with this loss needs no other."""
        return tuple(dict.fromkeys(head for name in self.term_weights() for head in _HEADS[name]))

    def __call__(
        self,
        anchor: Mapping[str, Tensor],
        positive: Mapping[str, Tensor],
        negatives: Mapping[str, Tensor] | None = None,
        *,
        temperature: float | Tensor,
        text_ids: Tensor | None = None,
        step: int = 0,
        group: Group = None,
    ) -> SpectraTerms:
        """Return the loss and its terms.

        Args:
            anchor: Representations by the name of their head, shape ``(B, d)`` each.
            positive: The same of the positives.
            negatives: The same of the hard negatives, shape ``(B, d)`` or ``(B, n, d)``.
            temperature: What cosines are divided by, above 0; a tensor may be learned.
            text_ids: Ids of a row's texts, equal for equal texts, shape ``(B, 2 + n)``.
            step: Number of the step, which chooses prefixes if not all are taken.
            group: Ranks that share the batch; None for all.

        Returns:
            Scalars whose means over the ranks are those of the whole batch.

        Raises:
            ValueError: If a head is missing, or shapes or ids do not fit together.
        """
        check_temperature(temperature)
        texts = [anchor, positive] if negatives is None else [anchor, positive, negatives]
        self._check_heads(texts)
        groups = {
            head: stack_groups(*(part[head] for part in texts)) for head in self.required_heads()
        }
        num_rows, num_texts, _ = (first := next(iter(groups.values()))).shape
        comparison = compare(num_rows, num_texts, first.device, text_ids, group)
        heads = {
            head: Groups(own, own if head == "entity" else gather_rows(own, group))
            for head, own in groups.items()
        }
        batch = _Batch(heads, comparison, temperature, step)
        weights = self.term_weights()
        terms = {
            name: self._term(name, batch)
            for name in weights
            if num_texts > 2 or not name.endswith("_triplet")
        }
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return SpectraTerms(total, terms)

    def _term(self, name: str, batch: "_Batch") -> Tensor:
        heads = [batch.heads[head] for head in _HEADS[name]]
        match name:
            case "semantic":
                dims = self.semantic_dims if self.matryoshka else self.semantic_dims.top()
                return dims(partial(self._info_nce, batch), *heads[0], step=batch.step)
            case "retrieval_triplet" | "ranking_triplet":
                return triplet_loss(heads[0].own, self.triplet_margin)
            case "bridge":
                entity, semantic = (head.own[:, :2] for head in heads)
                return bridge_loss(entity, semantic, dims=self.bridge_dims, form=self.bridge_form)
            case "alignment" if self.alignment_form == "kl":
                return alignment_divergence(*heads, temperature=batch.temperature)
            case "alignment":
                return alignment_loss(*(head.own for head in heads))
            case "spectral":
                entropy = renyi_entropy if self.spectral_form == "renyi" else softmax_entropy
                return -entropy(heads[0].all[:, 0])
        return self._info_nce(batch, *heads[0])

    def _info_nce(self, batch: "_Batch", own: Tensor, everyone: Tensor) -> Tensor:
        return contrast(
            Groups(own, everyone),
            batch.comparison,
            temperature=batch.temperature,
            symmetric=self.symmetric,
            margin=self.negative_margin,
            loss=self.cross_entropy,
        )

    def _check_heads(self, texts: Sequence[Mapping[str, Tensor]]) -> None:
        for name in self.term_weights():
            for head in _HEADS[name]:
                if not all(head in part for part in texts):
                    raise ValueError(
                        f"Term `{name}` must have head `{head}`, got {', '.join(sorted(texts[0]))};"
                        " build the head, or switch the term off."
                    )

    def _check_all_heads_learn(self) -> None:
        terms = self.term_weights()
        if not terms:
            raise ValueError("`SpectraLoss` must have a term, got none on with a weight above 0.")
        # The teachers of `bridge` and `alignment` are fixed.
        taught = {_HEADS[name][0] for name in terms}
        if "bridge" in terms and self.bridge_form == "original":
            taught.add("semantic")
        for name in terms:
            for head in _HEADS[name]:
                if head not in taught:
                    raise ValueError(
                        f"Head `{head}`, from which term `{name}` learns, must have a term of its"
                        f" own, got `{head}_weight` 0; raise it, or switch `{name}` off."
                    )


class _Batch(NamedTuple):
    """What terms are computed from."""

    heads: dict[str, Groups]
    comparison: Comparison
    temperature: float | Tensor
    step: int
