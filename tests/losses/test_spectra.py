"""The weighted sum of terms, each against its formula, and which heads it needs."""

import itertools

import pytest
import torch
from jsonargparse import ArgumentParser
from torch.nn import functional as F

from spectral_lightning.losses import CrossEntropy, Matryoshka, SpectraLoss

DIMS = {"semantic": 8, "entity": 6, "retrieval": 4, "anchor": 3, "ranking": 9, "spectral": 5}
SMALL = {
    "semantic_dims": Matryoshka(dims=(8, 4, 2), weights=(0.35, 0.3, 0.25)),
    "bridge_dims": (4,),
}
IDS = torch.tensor([[0, 10, 20], [1, 11, 21], [2, 11, 10], [0, 13, 1], [4, 14, 24]])
FALSE_TEXTS = [(0, 3), (3, 0), (1, 2), (2, 1), (0, 5 + 2), (1, 5 + 3)]
FALSE_ANCHORS = [(0, 3), (3, 0), (1, 2), (2, 1)]
TRIPLETS = {"retrieval_triplet", "ranking_triplet"}


@pytest.fixture
def parts(make_groups):
    """Representations of anchors, positives and hard negatives."""
    heads = {name: make_groups(5, 3, dim, seed=dim) for name, dim in DIMS.items()}
    return [{name: rows[:, i] for name, rows in heads.items()} for i in range(3)]


def cosines(x, y):
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T


def nce(rows, columns, false):
    logits = cosines(rows, columns) / 0.1
    for index in false:
        logits[index] = -torch.inf
    return -logits.log_softmax(1).diagonal().mean()


def sym(a, p, n):
    return (nce(a, torch.cat([p, n]), FALSE_TEXTS) + nce(p, a, FALSE_ANCHORS)) / 2


def triplet(a, p, n):
    a, p, n = (F.normalize(x, dim=-1) for x in (a, p, n))
    return ((a - p).norm(dim=1) - (a - n).norm(dim=1) + 0.3).clamp(min=0).mean()


def expected_terms(parts):
    """Every term as the original has it, but for hard and false negatives."""
    a, p, n = parts

    def head(name, dim=None):
        return [part[name][:, :dim] for part in parts]

    def cos(name, other):
        return cosines(a[name], other[name]).diagonal()

    spectral = F.normalize(a["spectral"], dim=-1)
    values = torch.linalg.eigvalsh(spectral.T @ spectral / 5)
    return {
        "semantic": sum(
            c * sym(*head("semantic", d)) for d, c in zip((8, 4, 2), (0.35, 0.3, 0.25), strict=True)
        ),
        "anchor": sym(*head("anchor")),
        "bridge": sum(
            1 - cosines(x["entity"][:, :4], x["semantic"][:, :4]).diagonal().mean() for x in (a, p)
        )
        / 2,
        "retrieval": sym(*head("retrieval")),
        "retrieval_triplet": triplet(*head("retrieval")),
        "ranking": sym(*head("ranking")),
        "ranking_triplet": triplet(*head("ranking")),
        "alignment": sum(
            (cos("retrieval", other) - cos("ranking", other)).square().mean() for other in (p, n)
        )
        / 2,
        "spectral": values.square().sum().log(),
    }


WEIGHTS = {
    "semantic": 1.0,
    "anchor": 0.15,
    "bridge": 0.02,
    "retrieval": 0.25,
    "retrieval_triplet": 0.25,
    "ranking": 1.0,
    "ranking_triplet": 1.0,
    "alignment": 0.08,
    "spectral": 0.005,
}


def test_each_term_is_its_formula_and_the_total_their_weighted_sum(parts):
    total, terms = SpectraLoss(**SMALL)(*parts, temperature=0.1, text_ids=IDS)
    expected = expected_terms(parts)
    assert list(terms) == list(expected)
    # PyTorch adds 1e-6 to differences in triplets.
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(total, sum(WEIGHTS[name] * terms[name] for name in terms))
    assert SpectraLoss().term_weights() == WEIGHTS


def test_original_forms(parts):
    a, p, _ = parts
    loss = SpectraLoss(bridge_form="original", spectral_form="softmax", **SMALL)
    terms = loss(*parts, temperature=0.1).terms
    bridge = [
        F.normalize(x["entity"][:, :4], dim=-1) - F.normalize(x["semantic"][:, :4], dim=-1)
        for x in (a, p)
    ]
    torch.testing.assert_close(terms["bridge"], torch.stack(bridge).square().mean())
    shares = a["spectral"].softmax(1)
    torch.testing.assert_close(terms["spectral"], (shares * shares.log()).sum(1).mean())


def test_alignment_may_compare_rankings_of_the_batch(parts):
    loss = SpectraLoss(alignment_form="kl", **SMALL)
    parts[0]["ranking"].requires_grad_()
    parts[0]["retrieval"].requires_grad_()
    found = loss(*parts, temperature=0.1, text_ids=IDS).terms["alignment"]

    def shares(name):
        texts = torch.cat([parts[1][name], parts[2][name]])
        return (cosines(parts[0][name], texts) / 0.1).softmax(1)

    teacher, student = shares("ranking"), shares("retrieval")
    torch.testing.assert_close(found, (teacher * (teacher / student).log()).sum(1).mean())
    found.backward()
    assert parts[0]["ranking"].grad is None
    assert parts[0]["retrieval"].grad.any()


def test_settings_reach_the_terms(parts):
    weights = {f"{name}_weight": 2.0 for name in WEIGHTS if name not in TRIPLETS}
    loss = SpectraLoss(triplet_weight=0.5, triplet_margin=1.0, symmetric=False, **weights, **SMALL)
    total, terms = loss(*parts, temperature=0.1, text_ids=IDS)
    a, p, n = parts
    expected = nce(a["anchor"], torch.cat([p["anchor"], n["anchor"]]), FALSE_TEXTS)
    torch.testing.assert_close(terms["anchor"], expected)
    scales = {name: 1.0 if name in TRIPLETS else 2.0 for name in terms}
    torch.testing.assert_close(total, sum(scales[name] * terms[name] for name in terms))
    plain = SpectraLoss(**SMALL)(*parts, temperature=0.1).terms
    assert terms["ranking_triplet"] > plain["ranking_triplet"]
    for change in (
        {"cross_entropy": CrossEntropy(transform="stablemax")},
        {"negative_margin": 0.5},
    ):
        assert (
            SpectraLoss(**SMALL, **change)(*parts, temperature=0.1).terms["anchor"]
            != plain["anchor"]
        )


def test_pairs_without_hard_negatives_have_no_triplets(parts):
    terms = SpectraLoss(**SMALL)(*parts[:2], temperature=0.1).terms
    assert set(terms) == set(WEIGHTS) - TRIPLETS
    a, p = (part["anchor"] for part in parts[:2])
    torch.testing.assert_close(terms["anchor"], (nce(a, p, []) + nce(p, a, [])) / 2)


def test_without_matryoshka_the_largest_prefix_is_trained_alone(parts):
    loss = SpectraLoss(matryoshka=False, **SMALL)
    terms = loss(*parts, temperature=0.1, text_ids=IDS).terms
    assert "alignment" not in terms
    expected = 0.9 * sym(*(part["semantic"] for part in parts))
    torch.testing.assert_close(terms["semantic"], expected)


def test_steps_take_prefixes_in_turn(parts):
    dims = Matryoshka(dims=(8, 4), num_dims_per_step=1)
    loss = SpectraLoss(semantic_dims=dims, bridge_dims=(4,))
    first, second = (
        loss(*parts, temperature=0.1, text_ids=IDS, step=step).terms["semantic"] for step in (0, 1)
    )
    semantic = [part["semantic"] for part in parts]
    torch.testing.assert_close(first, 2 * sym(*semantic))
    torch.testing.assert_close(second, 2 * sym(*(rows[:, :4] for rows in semantic)))


SWITCHES = ("anchor", "bridge", "matryoshka", "angular", "spectral")


@pytest.mark.parametrize("off", [c for n in range(6) for c in itertools.combinations(SWITCHES, n)])
def test_whatever_is_off_needed_heads_are_those_that_learn(parts, off):
    loss = SpectraLoss(**SMALL).without(off)
    given = [{head: part[head] for head in loss.required_heads()} for part in parts]
    for part in given:
        for rows in part.values():
            rows.requires_grad_()
    total, terms = loss(*given, temperature=0.1)
    total.backward()
    assert all(rows.grad is not None for rows in given[0].values())
    gone = {"angular": "alignment", "matryoshka": "alignment"}
    assert set(terms) == set(WEIGHTS) - {gone.get(name, name) for name in off}
    hidden = {"anchor": "anchor", "bridge": "entity", "spectral": "spectral"}
    assert set(given[0]) == set(DIMS) - {hidden[name] for name in off if name in hidden}


def test_a_weight_of_zero_switches_a_term_off():
    loss = SpectraLoss(anchor_weight=0.0, triplet_weight=0.0, bridge_weight=0.0)
    assert loss.required_heads() == ("semantic", "retrieval", "ranking", "spectral")
    assert not TRIPLETS & set(loss.term_weights())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_missing_head_is_named_with_its_term(parts, place):
    del parts[place]["entity"]
    with pytest.raises(ValueError, match=r"Term `bridge` must have head `entity`.*build the head"):
        SpectraLoss(**SMALL)(*parts, temperature=0.1)


def test_half_precision_is_computed_in_float32(parts):
    half = [{name: rows.bfloat16() for name, rows in part.items()} for part in parts]
    wide = [{name: rows.double() for name, rows in part.items()} for part in half]
    with torch.autocast("cpu", torch.bfloat16):
        found, terms = SpectraLoss(**SMALL)(*half, temperature=0.05, text_ids=IDS)
    expected = SpectraLoss(**SMALL)(*wide, temperature=0.05, text_ids=IDS)
    assert {term.dtype for term in (found, *terms.values())} == {torch.float32}
    torch.testing.assert_close(found.double(), expected.total, rtol=1e-5, atol=0)


def test_settings_can_come_from_a_file():
    parser = ArgumentParser()
    parser.add_class_arguments(SpectraLoss, "loss")
    settings = {
        "anchor": False,
        "semantic_dims": {"dims": [8, 4], "weights": None, "num_dims_per_step": 1},
        "bridge_dims": [4],
        "cross_entropy": {"transform": "stablemax"},
    }
    loss = parser.instantiate(parser.parse_object({"loss": settings})).loss
    dims = Matryoshka(dims=(8, 4), num_dims_per_step=1)
    entropy = CrossEntropy(transform="stablemax")
    expected = SpectraLoss(
        anchor=False, semantic_dims=dims, bridge_dims=(4,), cross_entropy=entropy
    )
    assert loss == expected


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"anchor_weight": -1.0}, "`anchor_weight` must be finite and >= 0, got -1.0"),
        ({"triplet_weight": float("nan")}, "`triplet_weight` must be finite and >= 0, got nan"),
        ({"triplet_margin": 0.0}, "`triplet_margin` must be finite and > 0, got 0.0"),
        ({"bridge_dims": ()}, r"`bridge_dims` must be sizes >= 1, got \(\)"),
        ({"bridge_form": "mse"}, "`bridge_form` must be one of cosine, original, got 'mse'"),
        ({"alignment_form": "cosine"}, "`alignment_form` must be one of mse, kl"),
        ({"spectral_form": "shannon"}, "`spectral_form` must be one of renyi, softmax"),
        ({"semantic_weight": 0.0}, "Head `semantic`, from which term `bridge` learns, must have"),
        ({"ranking_weight": 0.0}, "`ranking_weight` 0; raise it, or switch `alignment` off"),
        ({"cross_entropy": CrossEntropy(label_smoothing=0.1)}, "`label_smoothing` must be 0"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SpectraLoss(**settings)


def test_a_loss_of_nothing_is_refused():
    weights = {f"{name}_weight": 0.0 for name in WEIGHTS if name not in TRIPLETS}
    with pytest.raises(ValueError, match="`SpectraLoss` must have a term, got none"):
        SpectraLoss(**weights)


def test_only_what_can_be_switched_is_switched_off():
    with pytest.raises(
        ValueError, match=r"`without` must be one of anchor, bridge.* got 'ranking'"
    ):
        SpectraLoss().without(["ranking"])
