"""Counts against hand arithmetic, and the published numbers of version 10."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from spectral_lightning.models import (
    GPT,
    LowRankTransformer,
    macs_per_token,
    optimizer_bytes,
    parameter_counts,
)
from spectral_lightning.nn import LowRankLinear

NUM_WORDS = 33_277  # vocabulary of WikiText-2 in the original's run
# Sums over the 6 blocks of the ranks that version 10 ended with: the only integers that round to
# the published means by type, 11.2, 11.2, 14.5, 22.8, 16.0 and 24.0.
FINAL_SUMS = {
    "attn.c_q": 67,
    "attn.c_k": 67,
    "attn.c_v": 87,
    "attn.c_proj": 137,
    "mlp.c_fc": 96,
    "mlp.c_proj": 144,
}


@pytest.fixture
def v10():
    """Version 10 without memory for its weights."""
    with torch.device("meta"):
        return LowRankTransformer.v10(NUM_WORDS)


def set_final_ranks(model):
    for name, total in FINAL_SUMS.items():
        for i in range(6):  # spread as evenly as integers allow
            rank = total // 6 + (i < total % 6)
            model.blocks[i].get_submodule(name).set_rank(rank)


def test_version_10_has_the_published_number_of_parameters(v10):
    counts = parameter_counts(v10)
    assert counts.stored == counts.active == 37_792_253
    assert counts.factors_stored == counts.factors_active == 3_538_944
    assert counts.factors_dense == 18_874_368
    assert counts.dense == 37_792_253 - 3_538_944 + 18_874_368


def test_the_published_final_ranks_leave_most_parameters(v10):
    set_final_ranks(v10)
    counts = parameter_counts(v10)
    assert counts.factors_active == 980_992
    assert counts.active == 35_234_301
    assert counts.stored == 37_792_253
    assert counts.active / counts.stored == pytest.approx(1 - 0.068, abs=0.001)


def test_version_10_needs_the_published_multiplications(v10):
    before = macs_per_token(v10, 256)
    assert before.head == NUM_WORDS * 512 == 17_037_824
    assert before.attention == 6 * 2 * 256 * 512
    assert before.active == before.executed == before.stored == 22_149_632
    set_final_ranks(v10)
    after = macs_per_token(v10, 256)
    assert after.active == 19_591_680
    assert (after.stored, after.dense) == (before.stored, before.dense)
    assert after.active / before.active == pytest.approx(1 - 0.115, abs=0.001)


def test_the_dense_reference_with_a_tied_head_has_its_published_size():
    with torch.device("meta"):
        model = LowRankTransformer(NUM_WORDS, rank=None, head="tied")
    counts = parameter_counts(model)
    assert counts.stored == counts.active == counts.dense == 36_056_576  # "36.06M"
    assert counts.factors_stored == 0


def test_a_tied_head_is_multiplied_but_not_stored_again():
    settings = {"vocab_size": 50, "sequence_len": 8, "depth": 1, "model_dim": 16, "num_heads": 2}
    tied = LowRankTransformer(**settings, rank=4, head="tied")
    untied = LowRankTransformer(**settings, rank=4, head="unbiased")
    assert macs_per_token(tied, 8) == macs_per_token(untied, 8)
    assert parameter_counts(untied).stored - parameter_counts(tied).stored == 50 * 16


@pytest.mark.parametrize(
    ("mode", "rank", "executed"),
    [("sliced", 1, 8), ("sliced", 8, 8), ("sliced", 9, 16), ("sliced", 17, 20), ("masked", 1, 20)],
)
def test_layers_multiply_in_whole_blocks(mode, rank, executed):
    model = LowRankTransformer(
        10, 8, depth=1, model_dim=32, num_heads=2, rank=rank, capacity=20, mode=mode
    )
    macs, sizes = macs_per_token(model, 8), 4 * 64 + 2 * 160
    rest = macs.head + macs.attention
    assert macs.active - rest == rank * sizes
    assert macs.executed - rest == executed * sizes
    assert macs.stored - rest == 20 * sizes
    assert macs.dense - rest == 12 * 32**2


def test_a_forward_pass_makes_the_multiplications_that_are_counted():
    model = LowRankTransformer(
        10, 8, depth=2, model_dim=32, num_heads=2, rank=9, capacity=24, bidirectional=True
    )
    tokens_BT = torch.zeros(3, 8, dtype=torch.int64)
    # The counter does not know the fused attention of the CPU.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens_BT)
    assert counter.get_total_flops() == 2 * 3 * 8 * macs_per_token(model, 8).executed


def test_gpt_with_fewer_key_value_heads_is_counted_by_its_layers():
    model = GPT(depth=2, vocab_size=10, sequence_len=8, head_dim=32, num_kv_heads=1)
    macs = macs_per_token(model, 8)
    assert macs.active - macs.head - macs.attention == 2 * (10 * 128**2 + 2 * 128 * 32)
    assert (macs.head, macs.attention) == (1_280, 2 * 2 * 8 * 128)
    assert parameter_counts(model).stored == sum(p.numel() for p in model.parameters())


def test_a_shared_layer_counts_once():
    layer = LowRankLinear(10, 6, rank=2, capacity=3)
    counts = parameter_counts(nn.Sequential(layer, nn.Linear(6, 10), layer))
    assert counts.factors_stored == 48
    assert (counts.stored, counts.active, counts.dense) == (48 + 70, 32 + 70, 60 + 70)


def test_adam_holds_two_moments_and_a_step_for_each_parameter():
    model = LowRankTransformer(10, 8, depth=1, model_dim=16, num_heads=2, rank=4)
    optimizer = torch.optim.AdamW(model.parameters())
    assert optimizer_bytes(optimizer) == 0
    model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    optimizer.step()
    num_tensors = len(list(model.parameters()))
    assert optimizer_bytes(optimizer) == 8 * parameter_counts(model).stored + 4 * num_tensors


def test_state_in_nested_containers_is_counted_too():
    weight = torch.ones(5, requires_grad=True)
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight] = {
        "history": [torch.zeros(3), (torch.zeros(2, dtype=torch.float64), None)],
        "block": {"scale": torch.zeros(4, dtype=torch.int8), "step": 7},
    }
    assert optimizer_bytes(optimizer) == 12 + 16 + 4


def test_an_empty_sequence_is_refused(v10):
    with pytest.raises(ValueError, match=r"`sequence_len` must be >= 1, got 0\."):
        macs_per_token(v10, 0)
