"""StableMax: its values, and derivatives that hold at the points where formulas break."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from spectral_lightning.nn import log_stablemax, stablemax, symlog

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-8, -1e-8, 3.0, -7.5, 1e6, -1e6]
HALF = [torch.bfloat16, torch.float16]


def literal_stablemax(x):
    """The formula of the paper."""
    shares = torch.where(x >= 0, 1 + x, 1 / (1 - x.clamp(max=0)))
    return shares / shares.sum(-1, keepdim=True)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return 50 * torch.randn(64, 113, dtype=torch.float64, generator=generator)


def test_stablemax_is_the_formula_of_the_paper(logits):
    torch.testing.assert_close(stablemax(logits), literal_stablemax(logits), rtol=1e-12, atol=0)
    along_first = stablemax(logits.T, dim=0)
    torch.testing.assert_close(along_first, literal_stablemax(logits).T, rtol=1e-12, atol=0)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20))
@settings(deadline=None)
def test_probabilities_add_up_to_one_and_keep_the_order(values):
    x = torch.tensor(values)
    p, nats = stablemax(x), log_stablemax(x)
    assert p.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert nats.isfinite().all()
    ascending = x.argsort()
    assert (p[ascending].diff() >= 0).all()


def test_log_stablemax_is_the_logarithm_and_outlasts_it(logits):
    expected = literal_stablemax(logits).log()
    torch.testing.assert_close(log_stablemax(logits), expected, rtol=1e-12, atol=1e-12)
    extreme = torch.tensor([1e30, -1e30, 0.0])
    expected = torch.tensor([0.0, -2 * 69.0776, -69.0776])
    torch.testing.assert_close(log_stablemax(extreme), expected)


def test_derivative_is_right_where_formulas_break():
    x = torch.tensor(SPECIAL, dtype=torch.float64, requires_grad=True)
    symlog(x).sum().backward()
    torch.testing.assert_close(x.grad, 1 / (1 + x.detach().abs()), rtol=1e-15, atol=0)


def test_gradients_agree_with_differences(logits):
    x = logits[:2, :5].clone().requires_grad_()
    for function in (symlog, stablemax, log_stablemax):
        assert gradcheck(function, x)
        assert gradgradcheck(function, x)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_a_logit_of_one_has_a_finite_gradient_in_every_dtype(dtype):
    x = torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=dtype, requires_grad=True)
    log_stablemax(x)[0].backward()
    wide = x.detach().double().requires_grad_()
    log_stablemax(wide)[0].backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("function", [stablemax, log_stablemax])
def test_half_precision_is_normalised_in_float32(dtype, function):
    x = torch.zeros(128_256, dtype=dtype)  # float16 cannot hold their sum
    x[0] = 300.0
    found, expected = function(x), function(x.double())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("function", [stablemax, log_stablemax])
def test_masked_classes_have_no_probability_and_no_gradient(function):
    x = torch.tensor([2.0, -torch.inf, 0.0, -torch.inf], requires_grad=True)
    found = function(x)
    expected = torch.tensor([0.75, 0.0, 0.25, 0.0])
    torch.testing.assert_close(found if function is stablemax else found.exp(), expected)
    found[0].backward()
    assert (x.grad[1::2] == 0).all()
    assert x.grad.isfinite().all()
    assert (x.grad[::2] != 0).all()


def test_a_zero_head_learns():
    head = torch.zeros(5, 3, requires_grad=True)
    nats = F.nll_loss(log_stablemax(torch.ones(1, 3) @ head.T), torch.tensor([2]))
    nats.backward()
    torch.testing.assert_close(head.grad[:, 0], torch.tensor([0.2, 0.2, -0.8, 0.2, 0.2]))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.13
@pytest.mark.parametrize("function", [symlog, stablemax, log_stablemax])
def test_same_under_compile_and_autocast(logits, function):
    x = logits.float().requires_grad_()
    weights = torch.linspace(-1, 1, x.numel()).view_as(x)
    expected = function(x)
    (gradient,) = torch.autograd.grad(expected, x, weights)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        for found in (compiled(x), function(x)):
            assert torch.equal(found, expected)
            torch.testing.assert_close(torch.autograd.grad(found, x, weights)[0], gradient)


def test_vectorised_map_and_functional_gradient(logits):
    gradients = torch.vmap(torch.func.grad(lambda row: symlog(row).sum()))(logits)
    torch.testing.assert_close(gradients, 1 / (1 + logits.abs()))
