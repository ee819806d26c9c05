import pytest
import torch
from torch.nn import functional as F

from spectral_lightning.models import SymbolMLP, SymbolTransformer


@pytest.fixture
def pairs():
    return torch.cartesian_prod(torch.arange(5), torch.arange(5))


def test_the_perceptron_reads_one_hot_codes(pairs):
    model = SymbolMLP(5, hidden_dims=[8, 6]).double()
    hidden = F.one_hot(pairs, 5).flatten(1).double()
    first, *rest = model.layers
    hidden = first(hidden)
    for layer in rest:
        hidden = layer(hidden.relu())
    torch.testing.assert_close(model(pairs), hidden)


def test_the_perceptron_is_homogeneous_of_the_degree_of_its_depth(pairs):
    model = SymbolMLP(5, hidden_dims=[8, 6]).double()
    before = model(pairs)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 2
    torch.testing.assert_close(model(pairs), 8 * before)


def test_the_perceptron_of_the_paper_has_226_inputs_and_two_layers_of_200():
    shapes = [tuple(weight.shape) for weight in SymbolMLP().parameters()]
    assert shapes == [(200, 226), (200, 200), (113, 200)]


def test_the_transformer_tells_the_last_symbol_from_the_others():
    model = SymbolTransformer(5, model_dim=8, feedforward_dim=16).eval()
    symbols = torch.tensor([[0, 1, 2], [1, 0, 2], [0, 2, 1]])
    first, swapped, other = model(symbols)
    torch.testing.assert_close(first, swapped)
    assert (first - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SymbolMLP(0), "`num_symbols` must be >= 1, got 0."),
        (lambda: SymbolMLP(num_inputs=0), "`num_inputs` must be >= 1, got 0."),
        (lambda: SymbolMLP(hidden_dims=[]), r"`hidden_dims` must be one or more .* got \[\]."),
        (lambda: SymbolTransformer(0), "`num_symbols` must be >= 1, got 0."),
        (lambda: SymbolTransformer(5, num_layers=0), "`num_layers` must be >= 1, got 0."),
        (lambda: SymbolTransformer(5, 9), "`model_dim` must be a multiple of .*=4, got 9."),
    ],
)
def test_bad_arguments_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
