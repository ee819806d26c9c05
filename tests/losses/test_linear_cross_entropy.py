"""The head in chunks: what the dense form gives, and no matrix of all logits on the way."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_lightning.losses import cross_entropy, linear_cross_entropy

NUM_TOKENS, VOCAB_SIZE, DIM = 64, 5003, 16


@pytest.fixture
def head():
    """Hidden states, weight, bias, and targets of which one is ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, NUM_TOKENS // 4, DIM, generator=generator)
    weight = torch.randn(VOCAB_SIZE, DIM, generator=generator)
    bias = torch.randn(VOCAB_SIZE, generator=generator)
    ids = torch.randint(VOCAB_SIZE, hidden.shape[:-1], generator=generator)
    ids[0, 3] = -100
    return *(part.requires_grad_() for part in (hidden, weight, bias)), ids


def dense(hidden, weight, ids, bias, softcap=None, class_weight=None, **options):
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return cross_entropy(logits, ids, weight=class_weight, **options)


class LargestTensor(TorchDispatchMode):
    """Watch how many elements the largest result has."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "softcap": 3.0},
        {"transform": "stablemax", "label_smoothing": 0.1, "z_loss": 0.01},
        {"class_weight": torch.linspace(0.5, 2, VOCAB_SIZE), "transform": "stablemax"},
    ],
)
def test_value_and_gradients_are_those_of_the_dense_form(head, chunk_tokens, options):
    *parts, ids = head
    hidden, weight, bias = parts
    expected = dense(hidden, weight, ids, bias, **options)
    found = linear_cross_entropy(
        hidden, weight, ids, bias=bias, chunk_tokens=chunk_tokens, **options
    )
    torch.testing.assert_close(found, expected)
    # Not of scale 1, as under accumulation and loss scaling.
    for ours, theirs in zip(
        torch.autograd.grad(3 * found, parts), torch.autograd.grad(3 * expected, parts), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())


def test_no_tensor_holds_the_logits_of_all_tokens(head):
    hidden, weight, bias, ids = head
    with LargestTensor() as ours:
        linear_cross_entropy(hidden, weight, ids, bias=bias, chunk_tokens=7).backward()
    with LargestTensor() as theirs:
        dense(hidden, weight, ids, bias).backward()
    assert ours.numel == VOCAB_SIZE * DIM  # the weight
    assert theirs.numel == VOCAB_SIZE * NUM_TOKENS


def test_the_graph_keeps_no_logits(head):
    hidden, weight, bias, ids = head
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.shape) or x, lambda x: x
    ):
        linear_cross_entropy(hidden, weight, ids, bias=bias, chunk_tokens=7)
    assert (VOCAB_SIZE, DIM) in saved
    assert all(shape.numel() <= VOCAB_SIZE * DIM for shape in saved)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_gradients_only_losses_are_computed(head, reduction):
    hidden, weight, bias, ids = head
    options = {"bias": bias, "chunk_tokens": 20, "reduction": reduction}
    with torch.no_grad(), LargestTensor() as largest:
        found = linear_cross_entropy(hidden, weight, ids, **options)
    assert largest.numel == 20 * VOCAB_SIZE
    torch.testing.assert_close(found, dense(hidden, weight, ids, bias, reduction=reduction))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_part_can_be_the_only_one_that_learns(head, index):
    *parts, ids = head
    expected = torch.autograd.grad(dense(parts[0], parts[1], ids, parts[2]), parts[index])
    frozen = [part.detach() for part in parts]
    frozen[index].requires_grad_()
    hidden, weight, bias = frozen
    linear_cross_entropy(hidden, weight, ids, bias=bias).backward()
    torch.testing.assert_close(frozen[index].grad, expected[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("is_autocast", [True, False])
def test_gradients_of_bfloat16_are_summed_in_float32(is_autocast):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(*shape, generator=generator) for shape in ((1000, 4), (10, 4), (10,))]
    ids = torch.randint(10, (1000,), generator=generator)
    dtype = torch.float32 if is_autocast else torch.bfloat16
    low = [part.to(dtype).requires_grad_() for part in parts]
    wide = [part.detach().to(torch.bfloat16).float().requires_grad_() for part in parts]
    dense(wide[0], wide[1], ids, wide[2]).backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        loss = linear_cross_entropy(low[0], low[1], ids, bias=low[2], chunk_tokens=1)
    loss.backward()
    assert loss.dtype == torch.float32
    for ours, theirs in zip(low, wide, strict=True):
        assert ours.grad.dtype == dtype
        # Measured 3e-3; sums in bfloat16 are wrong by 4e-2.
        assert (ours.grad - theirs.grad).norm() < 0.01 * theirs.grad.norm()


def test_nothing_that_counts_gives_zero(head):
    hidden, weight, _, ids = head
    loss = linear_cross_entropy(hidden, weight, torch.full_like(ids, -100), chunk_tokens=7)
    loss.backward()
    assert loss.item() == 0
    assert (weight.grad == 0).all()
    with torch.no_grad():
        assert linear_cross_entropy(hidden[:0], weight, ids[:0]).item() == 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.13
def test_same_under_compile(head):
    hidden, weight, bias, ids = head

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, ids, bias=bias, chunk_tokens=32)

    found = torch.compile(loss, backend="aot_eager")(hidden, weight)
    torch.testing.assert_close(found, loss(hidden, weight))
    ours, theirs = (torch.autograd.grad(x, weight)[0] for x in (found, loss(hidden, weight)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"chunk_tokens": 0}, ValueError, "`chunk_tokens` must be >= 1, got 0"),
        ({"softcap": -1.0}, ValueError, r"`softcap` must be > 0, got -1\.0"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"`weight` must have shape \(V, D\) for `hid"),
        ({"bias": torch.zeros(4)}, ValueError, r"`bias` must have shape \(5,\), got \(4,\)"),
        ({"targets": torch.zeros(2, 5)}, TypeError, "`targets` must be integer ids, got torch.fl"),
        ({"targets": torch.tensor([0])}, ValueError, r"`targets` must have shape \(2,\) for logi"),
        ({"class_weight": torch.ones(4)}, ValueError, r"`class_weight` must have shape \(5,\)"),
        ({"reduction": "none"}, ValueError, "must be mean or sum where a gradient is needed"),
        ({"transform": "max"}, ValueError, "`transform` must be one of softmax, stablemax"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, sentence):
    weight = torch.zeros(5, 2, requires_grad=True)
    given = {"hidden": torch.zeros(2, 2), "weight": weight, "targets": torch.tensor([0, 1])}
    with pytest.raises(error, match=sentence):
        linear_cross_entropy(**given | change)
