"""Cross-entropy: PyTorch's values and gradients, and digits where PyTorch's are gone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from spectral_lightning.losses import cross_entropy, stablemax_cross_entropy
from spectral_lightning.nn import log_stablemax, symlog

TRANSFORMS = ["softmax", "stablemax"]
MAPS = {"softmax": lambda x: x, "stablemax": symlog}
TARGET = torch.tensor([0])


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 5 * torch.randn(*shape, dtype=torch.float64, generator=generator)


def some_ids(num_rows, num_classes):
    ids = torch.randint(num_classes, (num_rows,), generator=torch.Generator().manual_seed(1))
    ids[3] = -100
    return ids


def some_shares(num_rows, num_classes):
    return numbers(num_rows, num_classes, seed=1).softmax(1)


def gradient(loss, x):
    weights = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    return torch.autograd.grad(loss, x, weights)[0]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("make_targets", [some_ids, some_shares])
def test_values_and_gradients_are_those_of_torch(
    transform, reduction, smoothing, is_weighted, make_targets
):
    x = numbers(11, 7).requires_grad_()
    targets = make_targets(11, 7)
    weight = numbers(7, seed=2).abs() if is_weighted else None
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    found = cross_entropy(x, targets, transform=transform, **options)
    expected = F.cross_entropy(MAPS[transform](x), targets, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(found, x), gradient(expected, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("make_targets", [some_ids, some_shares])
def test_gradients_agree_with_differences(transform, make_targets):
    x = numbers(5, 4)
    x[0] = torch.tensor([0.0, 1.0, -1.0, 2.0])
    targets = make_targets(5, 4)

    def loss(x):
        options = {"transform": transform, "label_smoothing": 0.1, "z_loss": 0.01}
        return cross_entropy(x, targets, weight=torch.arange(1.0, 5.0), **options)

    assert gradcheck(loss, x.requires_grad_())


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_z_loss_is_the_squared_normaliser_of_what_counts(transform):
    x, ids = numbers(6, 5).requires_grad_(), some_ids(6, 5)
    found = cross_entropy(x, ids, transform=transform, z_loss=0.3)
    squares = MAPS[transform](x).logsumexp(1)[ids >= 0].square()
    expected = F.cross_entropy(MAPS[transform](x), ids) + 0.3 * squares.mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, x), gradient(expected, x))


def test_the_last_dimension_is_the_classes():
    x, ids = numbers(2, 3, 5), torch.tensor([[0, 4, -100], [2, 1, 0]])
    nats = cross_entropy(x, ids, reduction="none")
    expected = F.cross_entropy(x.movedim(-1, 1), ids, reduction="none")
    torch.testing.assert_close(nats, expected)
    torch.testing.assert_close(cross_entropy(x[0, 0], ids[0, 0]), expected[0, 0])


def test_stablemax_loss_is_the_likelihood_and_goes_to_zero():
    x, ids = numbers(6, 113), torch.arange(6)
    nats = F.nll_loss(log_stablemax(x), ids)
    torch.testing.assert_close(stablemax_cross_entropy(x, ids), nats)
    sure = 1e6 * (2 * F.one_hot(ids, 113) - 1)
    assert stablemax_cross_entropy(sure.double(), ids) < 1e-3


def confident(lead, dtype, num_classes=113):
    x = torch.full((1, num_classes), -lead, dtype=dtype)
    x[0, 0] = lead
    return x.requires_grad_()


def exact(x, transform):
    """Loss of class 0 and gradient for its logit, by closed form in float64."""
    wide = x.detach().double()
    gap = torch.logsumexp(MAPS[transform](wide)[0, 1:], 0) - MAPS[transform](wide)[0, 0]
    slope = 1 / (1 + wide[0, 0]) if transform == "stablemax" else 1.0
    return math.log1p(gap.exp()), -slope / (1 + torch.exp(-gap))


# Half of the gap between 113 logits at which PyTorch's cross-entropy of the logits, or of their
# symlog, is 0 in a dtype: the first lead here is above that, and all but half precision goes on.
@pytest.mark.parametrize(
    ("dtype", "transform", "leads"),
    [
        (torch.float16, "softmax", [7.0, 11.0]),
        (torch.bfloat16, "softmax", [5.5, 45.0]),
        (torch.float32, "softmax", [10.5, 20.0, 50.0]),
        (torch.float64, "softmax", [21.0, 300.0]),
        (torch.float16, "stablemax", [512.0, 6e4]),
        (torch.bfloat16, "stablemax", [256.0, 1e15]),
        (torch.float32, "stablemax", [32768.0, 1e15]),
        (torch.float64, "stablemax", [4e8, 1e15]),
    ],
)
def test_no_collapse_where_torch_gives_zero(dtype, transform, leads):
    for lead in leads:
        x = confident(lead, dtype)
        assert F.cross_entropy(MAPS[transform](x), TARGET) == 0
        loss = cross_entropy(x, TARGET, transform=transform)
        nats, slope = exact(x, transform)
        assert loss.item() == pytest.approx(nats, rel=1e-4, abs=1e-44)
        loss.backward()
        # The gradient is of the dtype of the logits, whose smallest number limits it.
        tolerance = {torch.float16: 1e-3, torch.bfloat16: 4e-3}.get(dtype, 1e-4)
        least = {torch.float16: 1e-7, torch.bfloat16: 1e-40}.get(dtype, 1e-44)
        assert x.grad[0, 0].item() == pytest.approx(slope.item(), rel=tolerance, abs=least)


def test_a_gap_of_forty_keeps_its_loss_in_float32():
    x = torch.zeros(1, 113)
    x[0, 0] = 40.0
    ours, torchs = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = cross_entropy(ours, TARGET)
    loss.backward()
    F.cross_entropy(torchs, TARGET).backward()
    assert loss.item() == pytest.approx(4.75816e-16, rel=1e-4)
    assert ours.grad[0, 0].item() == pytest.approx(-4.75816e-16, rel=1e-4)
    assert F.cross_entropy(torchs, TARGET) == 0
    assert torchs.grad[0, 0] == 0
    torch.testing.assert_close(ours.grad[0, 1:], torchs.grad[0, 1:], rtol=1e-5, atol=0)


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=12),
    st.sampled_from(TRANSFORMS),
    st.floats(-1e3, 1e3),
)
@settings(deadline=None)
def test_float32_is_close_to_float64_for_any_logits(values, transform, offset):
    x = torch.tensor(values).add(offset).requires_grad_()
    wide = x.detach().double().requires_grad_()
    losses = [cross_entropy(y, TARGET[0], transform=transform) for y in (x, wide)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5, abs=1e-37)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-37)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_that_counts_gives_zero(transform, reduction):
    for num_rows in (3, 0):
        x = numbers(num_rows, 4).requires_grad_()
        ids = torch.full((num_rows,), -100)
        loss = cross_entropy(x, ids, transform=transform, reduction=reduction, z_loss=0.1)
        loss.backward()
        assert loss.item() == 0
        assert (x.grad == 0).all()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_the_only_class_is_certain(transform, z_loss):
    for row in ([5.0], [5.0, -torch.inf, -torch.inf]):
        x = torch.tensor([row], requires_grad=True)
        loss = cross_entropy(x, TARGET, transform=transform, z_loss=z_loss)
        loss.backward()
        normaliser = MAPS[transform](torch.tensor(5.0)).item()
        assert loss.item() == pytest.approx(z_loss * normaliser**2)
        slope = 2 * z_loss * normaliser / (6 if transform == "stablemax" else 1)
        assert x.grad.tolist()[0] == pytest.approx([slope] + [0.0] * (len(row) - 1))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_masked_classes_change_nothing(transform):
    x = numbers(2, 4)
    masked = F.pad(x, (0, 2), value=-torch.inf).requires_grad_()
    x.requires_grad_()
    shares = some_shares(2, 4)
    for narrow, wide in ((torch.tensor([0, 3]),) * 2, (shares, F.pad(shares, (0, 2)))):
        expected = cross_entropy(x, narrow, transform=transform)
        found = cross_entropy(masked, wide, transform=transform)
        torch.testing.assert_close(found, expected)
        grown = gradient(found, masked)
        torch.testing.assert_close(grown, F.pad(gradient(expected, x), (0, 2)))


def test_an_ignored_row_may_be_masked_as_a_whole():
    x = torch.tensor([[-torch.inf] * 3, [1.0, 2.0, 3.0]], requires_grad=True)
    cross_entropy(x, torch.tensor([-100, 0])).backward()
    assert (x.grad[0] == 0).all()
    assert x.grad[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_half_precision_is_computed_in_float32(dtype, transform):
    x = numbers(4, 2000).to(dtype)
    x[0, 7] = 1.0
    x.requires_grad_()
    ids = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(x, ids, transform=transform, label_smoothing=0.1)
        loss.backward()
    wide = x.detach().double().requires_grad_()
    expected = cross_entropy(wide, ids, transform=transform, label_smoothing=0.1)
    expected.backward()
    assert loss.dtype == torch.float32
    assert x.grad.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-2, atol=1e-7)


def test_the_dtype_of_the_computation_can_be_chosen():
    x = numbers(2, 3).float().requires_grad_()
    loss = cross_entropy(x, torch.tensor([0, 1]), compute_dtype=torch.float64)
    loss.backward()
    assert loss.dtype == torch.float64
    assert x.grad.dtype == torch.float32
    assert cross_entropy(x.double(), torch.tensor([0, 1])).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.13
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_same_under_compile_and_without_gradients(transform):
    def loss(x, ids):
        return cross_entropy(x, ids, transform=transform, label_smoothing=0.1, z_loss=1e-3)

    x, ids = numbers(11, 7).requires_grad_(), some_ids(11, 7)
    expected = loss(x, ids)
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, ids)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, x), gradient(expected, x))
    with torch.no_grad():
        assert torch.equal(loss(x, ids), expected)


def test_a_graph_can_be_walked_twice_and_leaves_the_logits():
    x, ids = numbers(3, 4), torch.arange(3)
    before = x.clone()
    loss = cross_entropy(x.requires_grad_(), ids, transform="stablemax")
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(x, before)
