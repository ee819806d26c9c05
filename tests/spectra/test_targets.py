"""Which matrices are found in plain modules, and what the globs, splits and errors do."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from spectral_lightning.spectra import find_targets


def shapes(model, *args, **settings):
    return {t.name: t.shape for t in find_targets(model, *args, **settings).targets}


class Experts(nn.Module):
    """Stack of experts in one parameter, with what else such modules hold."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 4))
        self.scale = nn.Parameter(torch.ones(3))
        self.position = nn.Parameter(torch.randn(1, 7, 4))
        self.table = nn.Parameter(torch.randn(7, 4))


class Factored(nn.Module):
    """A layer that says itself what its weight is."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.randn(2, 4))
        self.B = nn.Parameter(torch.randn(6, 2))

    def spectral_weight(self):
        return self.B @ self.A


MODULES = {
    "linear": (nn.Linear(4, 8), {"x": (8, 4)}),
    "bilinear": (nn.Bilinear(3, 4, 2), {"x.weight.0": (3, 4), "x.weight.1": (3, 4)}),
    "conv1d": (nn.Conv1d(3, 8, 5), {"x": (8, 15)}),
    "conv2d": (nn.Conv2d(3, 8, 5), {"x": (8, 75)}),
    "conv3d": (nn.Conv3d(3, 8, 2), {"x": (8, 24)}),
    "grouped_conv": (nn.Conv2d(4, 8, 3, groups=2), {"x": (8, 18)}),
    "attention": (
        nn.MultiheadAttention(6, 2),
        {"x.q": (6, 6), "x.k": (6, 6), "x.v": (6, 6), "x.out_proj": (6, 6)},
    ),
    "attention_of_three": (
        nn.MultiheadAttention(6, 2, kdim=3, vdim=4),
        {"x.q": (6, 6), "x.k": (6, 3), "x.v": (6, 4), "x.out_proj": (6, 6)},
    ),
    "experts": (Experts(), {"x.up.0": (5, 4), "x.up.1": (5, 4), "x.up.2": (5, 4)}),
    "own_protocol": (Factored(), {"x": (6, 4)}),
}


@pytest.mark.parametrize("kind", MODULES)
def test_every_kind_of_matrix_is_found_with_out_features_first(kind):
    module, expected = MODULES[kind]
    model = nn.ModuleDict({"x": module, "last": nn.Linear(1, 1)})
    found = shapes(model)
    assert found.pop("last") == (1, 1)
    assert found == expected
    for target in find_targets(model).targets:
        assert target.matrix().shape == target.shape
        assert not target.matrix().requires_grad


def test_parts_hold_the_rows_they_are_named_after():
    model = nn.Sequential(nn.MultiheadAttention(6, 2), nn.Conv2d(2, 3, 2), Experts(), Factored())
    found = {t.name: t.matrix() for t in find_targets(model).targets}
    attention, convolution, experts, factored = model
    assert torch.equal(found["0.k"], attention.in_proj_weight[6:12])
    assert torch.equal(found["1"], convolution.weight.reshape(3, 8))
    assert torch.equal(found["2.up.1"], experts.up[1])
    assert torch.equal(found["3"], factored.B @ factored.A)


def test_matrix_is_a_view_of_the_weight():
    layer = nn.Linear(4, 8)
    (target,) = find_targets(nn.Sequential(layer)).targets
    assert target.matrix().data_ptr() == layer.weight.data_ptr()


SKIPPED = {
    "embedding": (nn.Embedding(5, 4), "x", "is an embedding table (set `embeddings=True`"),
    "lazy": (nn.LazyLinear(4), "x", "has no shape before the first forward pass"),
    "transposed": (nn.ConvTranspose1d(3, 4, 2), "x.weight", "shape (3, 4, 2) of a ConvTranspose1d"),
    "recurrent": (nn.RNN(3, 4), "x.weight_ih_l0", "of a RNN, whose meaning is unknown"),
    "position": (Experts(), "x.position", "is a parameter of shape (1, 7, 4) of a Experts"),
    "table": (Experts(), "x.table", "(give the module a method `spectral_weight()`)"),
}


@pytest.mark.parametrize("kind", SKIPPED)
def test_what_is_not_measured_is_listed_with_its_reason(kind):
    module, name, reason = SKIPPED[kind]
    found = find_targets(nn.ModuleDict({"x": module, "last": nn.Linear(1, 1)}))
    assert reason in found.skipped[name]
    assert name not in {target.name for target in found.targets}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_quantised_and_complex_weights_are_skipped(dtype):
    layer = nn.Linear(4, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 4).to(dtype), requires_grad=False)
    found = find_targets(nn.ModuleDict({"x": layer, "last": nn.Linear(1, 1)}))
    assert found.skipped == {"x": f"is stored as {dtype}, which is quantised or not real"}


def test_a_protocol_that_returns_no_matrix_is_skipped():
    layer = Factored()
    layer.spectral_weight = lambda: torch.ones(3)
    found = find_targets(nn.ModuleDict({"x": layer, "last": nn.Linear(1, 1)}))
    assert found.skipped == {"x": "is of shape (3,), which is no matrix"}


def test_embeddings_are_measured_on_request():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    assert shapes(model) == {"1": (2, 4)}
    assert shapes(model, embeddings=True) == {"0": (5, 4), "1": (2, 4)}


def test_a_shared_weight_is_measured_once_under_its_first_name():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "e": nn.Embedding(4, 4)})
    model["c"] = model["a"]
    model["b"].weight = model["a"].weight
    model["e"].weight = model["a"].weight
    found = find_targets(model, embeddings=True)
    assert [target.name for target in found.targets] == ["a"]
    assert found.skipped == {"b": "shares its weight with a", "e": "shares its weight with a"}


def test_frozen_layers_are_marked():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Factored(), nn.Linear(4, 4))
    model[1].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    parametrizations.weight_norm(model[3])
    model[3].parametrizations.requires_grad_(False)  # its bias is still trained
    assert [t.trainable for t in find_targets(model).targets] == [True, False, False, False]


@pytest.fixture
def blocks():
    """Two blocks of two layers and a head."""
    parts = {"attn": nn.Linear(4, 12), "mlp": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))}
    other = {"attn": nn.Linear(4, 12), "mlp": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))}
    layers = nn.ModuleList([nn.ModuleDict(parts), nn.ModuleDict(other)])
    return nn.ModuleDict({"blocks": layers, "head": nn.Linear(4, 3)})


def test_globs_select_by_name_one_or_several(blocks):
    assert len(shapes(blocks)) == 7
    assert list(shapes(blocks, "blocks.*.mlp.*")) == [
        "blocks.0.mlp.0",
        "blocks.0.mlp.1",
        "blocks.1.mlp.0",
        "blocks.1.mlp.1",
    ]
    assert list(shapes(blocks, ["head", "blocks.1.*"])) == [
        "blocks.1.attn",
        "blocks.1.mlp.0",
        "blocks.1.mlp.1",
        "head",
    ]


def test_a_module_name_selects_its_parts():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.Linear(4, 4)})
    assert list(shapes(model, "a")) == ["a.q", "a.k", "a.v"]
    assert list(shapes(model, "a.q")) == ["a.q"]


def test_fused_projections_are_split_by_declaration(blocks):
    splits = {"*.attn": {"q": 6, "k": 3, "v": 3}}
    found = {t.name: t for t in find_targets(blocks, "*.attn*", splits=splits).targets}
    assert found["blocks.0.attn.q"].shape == (6, 4)
    assert list(found) == [f"blocks.{i}.attn.{part}" for i in (0, 1) for part in "qkv"]
    fused = blocks["blocks"][1]["attn"].weight
    assert torch.equal(found["blocks.1.attn.k"].matrix(), fused[6:9])


def test_a_part_can_be_split_again():
    attention = nn.MultiheadAttention(6, 2)
    splits = {"a.k": {"head0": 3, "head1": 3}}
    targets = find_targets(nn.ModuleDict({"a": attention}), splits=splits).targets
    found = {target.name: target.matrix() for target in targets}
    assert list(found) == ["a.q", "a.k.head0", "a.k.head1", "a.v", "a.out_proj"]
    assert torch.equal(found["a.k.head1"], attention.in_proj_weight[9:12])


@pytest.mark.parametrize("parts", [{"q": 6, "k": 3}, {"q": 12, "k": 0}, {"q": 13, "k": -1}, {}])
def test_a_split_that_does_not_fit_is_refused(blocks, parts):
    message = "`splits` must give positive row counts that sum to the 12 output rows of blocks.0"
    with pytest.raises(ValueError, match=message):
        find_targets(blocks, splits={"*.attn": parts})


@pytest.mark.parametrize("argument", ["layers", "splits"])
def test_a_glob_that_matches_nothing_is_refused_with_what_there_is(blocks, argument):
    globs = {"layers": ["*.mlp.*", "decoder.*"], "splits": {"decoder.*": {"q": 1}}}
    message = (
        rf"`{argument}` must match at least one weight matrix, got 'decoder\.\*'; the model has"
        r" blocks\.0\.attn, .* and 2 more\."
    )
    with pytest.raises(ValueError, match=message):
        find_targets(blocks, **{argument: globs[argument]})


def test_a_glob_that_matches_only_what_is_skipped_is_told_why():
    model = nn.ModuleDict({"wte": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    with pytest.raises(ValueError, match=r"got 'wte'; wte is an embedding table \(set `embedd"):
        find_targets(model, "wte")


def test_a_model_without_matrices_is_refused():
    with pytest.raises(ValueError, match="the model has no weight matrices that can be measured"):
        find_targets(nn.Sequential(nn.LayerNorm(4)))


def test_a_weight_replaced_after_discovery_is_read_anew():
    layer = nn.Linear(4, 8)
    (target,) = find_targets(nn.Sequential(layer)).targets
    layer.weight = nn.Parameter(torch.full((8, 4), 7.0))
    assert target.matrix().unique().tolist() == [7.0]
    layer.weight.data = torch.full((8, 4), 8.0)
    assert target.matrix().unique().tolist() == [8.0]
