import pytest
import torch
import torch.nn.functional as F

from spectral_lightning.models.spectra import SpectraConfig
from spectral_lightning.models.spectra.attention_spectra import (
    SpectraAttention,
    SpectralBranch,
    fractal_factors,
)

PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0]]).bool()


def naive_logits(query, key, weights, mask):
    """Enriched logits by the definition, over the columns of tokens that are no padding."""
    logits = query @ key.mT
    for weight in weights:
        seen = logits * mask[:, None, None, :]
        products = seen @ seen.mT
        norms = (products * mask[:, None, None, :]).norm(dim=-1, keepdim=True)
        logits = logits + weight * products / norms
    return logits


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def attention(**settings):
    torch.manual_seed(0)
    return SpectraAttention(SpectraConfig.preset("tiny", **settings)).eval()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_factors_give_the_enriched_logits(depth, dtype, atol):
    query, key = draw(2, 3, 7, 4, dtype=dtype), draw(2, 3, 7, 4, dtype=dtype, seed=1)
    weights = torch.tensor([0.5, -0.7, 0.3], dtype=dtype)[:depth]
    left, right = fractal_factors(query, key, weights, PADDED)
    expected = naive_logits(query, key, weights, PADDED)
    error = (left @ right.mT - expected) * (PADDED[:, None, None, :] & PADDED[:, None, :, None])
    assert error.abs().max() <= atol * expected.abs().max()


@pytest.mark.parametrize("mask", [None, PADDED])
def test_gradients_of_the_factors_are_exact(mask):
    query, key = draw(2, 1, 7, 3).requires_grad_(), draw(2, 1, 7, 3, seed=1).requires_grad_()
    weights = torch.tensor([0.5, -0.7], dtype=torch.float64, requires_grad=True)

    def logits(query, key, weights):
        left, right = fractal_factors(query, key, weights, mask)
        products = left @ right.mT
        return products if mask is None else products * mask[:, None, None, :]

    assert torch.autograd.gradcheck(logits, (query, key, weights))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_factors_stay_finite_in_half_precision(scale):
    query, key = scale * draw(1, 2, 200, 32), draw(1, 2, 200, 32, seed=1)
    weights = torch.tensor([0.5], dtype=torch.float64)
    mask = torch.arange(200)[None] < 150
    exact = naive_logits(query, key, weights, mask)[..., :150, :150]
    left, right = fractal_factors(query.half(), key.half(), weights.half(), mask)
    error = (left.double() @ right.double().mT)[..., :150, :150] - exact
    assert error.abs().max() <= 1e-3 * exact.abs().max()  # float16 has 11 bits: 4e-4 seen


def test_attention_is_the_softmax_of_the_enriched_logits():
    layer = attention(use_spectral=False)
    layer.fractal.data.fill_(0.8)
    hidden = draw(2, 7, 64, dtype=torch.float32)
    query, key, value = (
        project(hidden).unflatten(-1, (4, 16)).transpose(1, 2)
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    logits = naive_logits(query / 4, key, layer.fractal, PADDED)
    logits = logits.masked_fill(~PADDED[:, None, None, :], -torch.inf)
    expected = layer.o_proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(hidden, PADDED)[PADDED], expected[PADDED], rtol=0, atol=1e-6)


def test_a_row_of_padding_alone_attends_to_its_padding():
    layer = attention(use_spectral=False, fractal_depth=0)  # kernels differ on rows of no key
    hidden = draw(2, 7, 64, dtype=torch.float32)
    torch.testing.assert_close(layer(hidden, torch.zeros(2, 7).bool()), layer(hidden, None))


def test_the_spectral_branch_is_a_mean_over_tokens_that_are_no_padding():
    branch = SpectralBranch(SpectraConfig.preset("tiny"))
    hidden = draw(2, 7, 64, dtype=torch.float32)
    short = hidden[1:, 2:5]
    weights = (branch.q_proj(short) @ branch.k_proj(short).mT / 4).sigmoid() ** 2
    expected = 0.1 * branch.o_proj(weights @ branch.v_proj(short) / 3)
    torch.testing.assert_close(branch(hidden, PADDED)[1:, 2:5], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(branch(short, None), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", [-6.0, 6.0])
def test_the_gate_stays_in_its_bounds_and_never_dies(start):
    branch = SpectralBranch(SpectraConfig.preset("tiny"))
    branch.gate.data.fill_(start)
    branch.fusion().sum().backward()
    assert 0 < branch.fusion().item() < 0.5
    assert branch.gate.grad.item() > 0


def test_the_gate_of_the_original_dies():
    branch = SpectralBranch(SpectraConfig.preset("tiny", compat="original"))
    branch.gate.data.fill_(-0.1)
    branch.fusion().sum().backward()
    assert branch.gate.grad.item() == 0


@pytest.mark.parametrize("learnable", [True, False])
def test_fractal_weights_are_trained_only_if_learnable(learnable):
    layer = attention(learnable_fractal=learnable, fractal_depth=2)
    layer(draw(2, 7, 64, dtype=torch.float32), PADDED).square().sum().backward()
    assert layer.fractal.tolist() == pytest.approx([0.02, 0.02])
    assert layer.fractal.requires_grad == learnable
    assert not learnable or layer.fractal.grad.abs().min() > 0


def test_compat_computes_what_the_original_computes():
    layer = attention(compat="original")
    hidden = draw(2, 7, 64, dtype=torch.float32)
    query, key, value = (
        project(hidden).unflatten(-1, (4, 16)).transpose(1, 2)
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    logits = query @ key.mT / 4 + (1 - PADDED[:, None, None, :].float()) * -10000.0
    logits = logits + 0.02 * F.normalize(logits @ logits.mT, dim=-1)
    main = layer.o_proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
    branch = layer.spectral
    weights = (branch.q_proj(hidden) @ branch.k_proj(hidden).mT / 4).sigmoid() ** 2
    expected = main + 0.1 * branch.o_proj(weights @ branch.v_proj(hidden))
    torch.testing.assert_close(layer(hidden, PADDED), expected, rtol=0, atol=1e-5)


def test_the_original_equals_the_fused_form_without_padding():
    original, ours = attention(compat="original"), attention()
    original.spectral = ours.spectral = None
    hidden = draw(2, 7, 64, dtype=torch.float32)
    torch.testing.assert_close(original(hidden, None), ours(hidden, None), rtol=0, atol=1e-6)
