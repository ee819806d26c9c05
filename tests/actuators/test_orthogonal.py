"""The projection: orthogonal to the weight, of the old norm, and safe where it has no meaning."""

import math

import pytest
import torch
from torch import nn

from spectral_lightning.actuators import (
    decay_conflict,
    orthogonal_parameters,
    project_,
    project_update_,
)
from spectral_lightning.testing import RefuseHostSync

SHAPE = (300, 401)  # of more than one piece, and the last one is short


def pair(shape=SHAPE, dtype=torch.float32, pull=0.5):
    """A weight, and a gradient that points along it to some degree."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64) + pull * weight
    return weight.to(dtype), gradient.to(dtype)


def cosine(one, other):
    one, other = one.detach().double(), other.detach().double()
    return ((one * other).sum() / one.norm() / other.norm()).item()


def expected(weight, gradient, rescale=True):
    w, g = weight.double(), gradient.double()
    p = g - (w * g).sum() / w.square().sum() * w
    return p * g.norm() / p.norm() if rescale else p


# A result is rounded to the gradient's dtype, entry by entry: 2^-9 and 2^-12 over 300 of them.
@pytest.mark.parametrize(
    ("dtype", "atol"),
    [
        (torch.float64, 1e-14),
        (torch.float32, 5e-7),
        (torch.bfloat16, 1e-4),
        (torch.float16, 1e-5),
    ],
)
@pytest.mark.parametrize("rescale", [True, False])
def test_it_is_the_formula(dtype, atol, rescale):
    weight, gradient = pair(dtype=dtype)
    before, out = cosine(gradient, weight), gradient.clone()
    (found,) = project_([out], [weight], rescale=rescale)
    assert found.item() == pytest.approx(before, abs=1e-5)
    assert abs(cosine(out, weight)) < atol
    truth = expected(weight, gradient, rescale)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), truth, rtol=4 * eps, atol=16 * eps)


def test_the_sums_of_many_numbers_are_exact():
    weight, gradient = pair((2048, 2048), pull=0.1)
    project_([gradient], [weight])
    assert abs(cosine(gradient, weight)) < 1e-8


@pytest.mark.parametrize("max_gain", [1.0, 10.0])
def test_a_parallel_gradient_leaves_noise_that_is_not_blown_up(max_gain):
    weight, _ = pair()
    gradient = 3 * weight
    rest = gradient.clone()
    project_([rest], [weight], rescale=False)
    project_([gradient], [weight], max_gain=max_gain)
    assert gradient.norm() <= 1.001 * max_gain * rest.norm()
    assert gradient.norm() < 1e-4 * weight.norm()


def test_the_gain_is_limited():
    weight, gradient = pair(pull=20.0)
    unlimited, limited, norm = gradient.clone(), gradient.clone(), gradient.norm()
    project_([unlimited], [weight], max_gain=math.inf)
    project_([limited], [weight], max_gain=2.0)
    assert unlimited.norm().item() == pytest.approx(norm.item(), rel=1e-4)
    rest = expected(weight, gradient, rescale=False).norm().item()
    assert limited.norm().item() == pytest.approx(2 * rest, rel=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda w, g: (w.T, g.T),
        lambda w, g: (w.T, g.T.contiguous()),
        lambda w, g: tuple(t[:, :400].reshape(30, 10, 20, 20) for t in (w, g)),
        lambda w, g: tuple(
            t[:, :400].reshape(30, 10, 20, 20).to(memory_format=torch.channels_last) for t in (w, g)
        ),
        lambda w, g: (w[0], g[0]),
    ],
)
def test_strides_and_dimensions_do_not_matter(make):
    weight, gradient = make(*pair())
    out = gradient.clone()
    project_([out], [weight])
    torch.testing.assert_close(out.double(), expected(weight, gradient), rtol=1e-5, atol=1e-5)


def test_rows_without_a_gradient_stay_without():
    weight, gradient = pair()
    gradient[[0, *range(3, 300)]] = 0
    out = gradient.clone()
    project_([out], [weight], "row")
    assert torch.count_nonzero(out.abs().sum(1)) == 2
    for row in (1, 2):
        assert abs(cosine(out[row], weight[row])) < 1e-6
        truth = expected(weight[row], gradient[row])
        torch.testing.assert_close(out[row].double(), truth, rtol=1e-5, atol=1e-5)


def test_global_takes_all_tensors_for_one_vector():
    pairs = [pair(), pair((7, 5), pull=-2.0)]
    weights, gradients = ([p[i].flatten() for p in pairs] for i in (0, 1))
    truth = expected(torch.cat(weights), torch.cat(gradients))
    (alone_weight, alone) = pair((3, 3))
    out = [pairs[0][1], pairs[1][1], alone]
    project_(out, [pairs[0][0], pairs[1][0], alone_weight], ["global", "global", "tensor"])
    found = torch.cat([out[0].flatten(), out[1].flatten()])
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    assert abs(cosine(out[1], pairs[1][0])) > 0.01
    assert abs(cosine(alone, alone_weight)) < 1e-6


def test_many_tensors_are_projected_each_for_itself():
    pairs = [pair((600, 700), pull=i / 5) for i in range(6)]
    before = [cosine(gradient, weight) for weight, gradient in pairs]
    found = project_([gradient for _, gradient in pairs], [weight for weight, _ in pairs])
    assert found.tolist() == pytest.approx(before, abs=1e-5)
    assert max(abs(cosine(gradient, weight)) for weight, gradient in pairs) < 1e-6


@pytest.mark.parametrize(
    ("weight", "gradient"),
    [
        (torch.zeros(4, 4), torch.ones(4, 4)),
        (torch.full((4, 4), 1e25), torch.ones(4, 4)),
        (torch.full((4, 4), 1e-30), torch.ones(4, 4)),
        (torch.tensor([2.0]), torch.tensor([1.0])),
        (torch.tensor(2.0), torch.tensor(1.0)),
        (torch.ones(2, 2, dtype=torch.complex64), torch.ones(2, 2, dtype=torch.complex64)),
        (torch.ones(4, 4), torch.zeros(4, 4)),
        (torch.ones(4, 4), torch.full((4, 4), math.inf)),
        (torch.ones(0, 4), torch.ones(0, 4)),
    ],
)
@pytest.mark.parametrize("kind", ["tensor", "row"])
def test_what_has_no_direction_is_left_alone(weight, gradient, kind):
    out = gradient.clone()
    project_([out], [weight], kind)
    assert torch.equal(out, gradient)


def test_sparse_gradients_are_left_alone():
    sparse = torch.eye(4).to_sparse()
    project_([sparse], [torch.ones(4, 4)])
    assert torch.equal(sparse.to_dense(), torch.eye(4))


def test_the_host_never_waits():
    weight, gradient = pair()
    with RefuseHostSync():
        project_([gradient, gradient.clone()], [weight, weight], ["tensor", "row"])
        project_update_([weight], [weight.clone()])


def test_an_update_becomes_orthogonal_and_keeps_its_size():
    before, update = pair()
    weight = before + 0.01 * update
    (found,) = project_update_([weight], [before])
    assert found.item() == pytest.approx(cosine(update, before), abs=1e-4)
    assert abs(cosine(weight - before, before)) < 1e-6
    assert (weight - before).norm() == pytest.approx(0.01 * update.norm().item(), rel=1e-4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.norm = nn.LayerNorm((2, 4))
        self.conv = nn.Conv1d(4, 4, 3)
        self.experts = nn.Parameter(torch.ones(3, 4, 4))
        self.experts_bias = nn.Parameter(torch.ones(3, 4))
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.scale = nn.Parameter(torch.ones(1, 1))
        self.head = nn.Linear(4, 9)


def kinds(model, *args, **options):
    chosen = orthogonal_parameters(model, *args, **options)
    return {name: kind for name, (_, kind) in chosen.items()}


def test_what_is_projected_by_default():
    assert kinds(Model()) == {
        "experts": "row",
        "embed.weight": "row",
        "conv.weight": "tensor",
        "head.weight": "tensor",
    }


def test_a_tied_head_is_projected_once_and_as_a_head():
    model = Model()
    model.head.weight = model.embed.weight
    assert kinds(model, ["embed", "head"]) == {"embed.weight": "tensor"}


def test_globs_select_layers_and_parameters():
    assert kinds(Model(), ["head", "embed.*"]) == {"embed.weight": "row", "head.weight": "tensor"}
    assert kinds(Model(), exclude=["embed", "*experts"], granularity="row") == {
        "conv.weight": "row",
        "head.weight": "row",
    }


def test_the_paper_leaves_out_nothing():
    found = kinds(Model(), everything=True)
    assert set(found) == {name for name, p in Model().named_parameters() if p.numel() > 1}
    assert set(found.values()) == {"tensor"}


@pytest.mark.parametrize("argument", ["layers", "exclude"])
def test_a_glob_without_a_match_is_refused(argument):
    with pytest.raises(ValueError, match=f"`{argument}` must match at least one .* got 'tail'; th"):
        orthogonal_parameters(Model(), **{argument: "tail"})


@pytest.mark.parametrize(
    ("make", "project", "message"),
    [
        (lambda p: torch.optim.SGD(p, weight_decay=0.1), "grad", "is added to gradients after"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "grad", "is added to gradients after"),
        (lambda p: torch.optim.AdamW(p, weight_decay=0.1), "update", "has no effect where updates"),
        (lambda p: torch.optim.AdamW(p, weight_decay=0.1), "grad", None),
        (lambda p: torch.optim.SGD(p), "both", None),
    ],
)
def test_weight_decay_that_undoes_the_projection_is_named(make, project, message):
    parameter = nn.Parameter(torch.ones(2, 2))
    found = decay_conflict(make([parameter]), [parameter], project)
    assert found is None if message is None else message in found
    assert decay_conflict(make([parameter]), [], project) is None


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`granularity` must be one of tensor, row, global, got"):
        project_([torch.ones(2)], [torch.ones(2)], "column")
    with pytest.raises(ValueError, match=r"`max_gain` must be >= 1, got 0\.5"):
        project_([torch.ones(2)], [torch.ones(2)], max_gain=0.5)
    with pytest.raises(ValueError, match="`gradients` must be shaped and sharded like their weig"):
        project_([torch.ones(2)], [torch.ones(3)])
