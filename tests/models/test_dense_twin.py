"""The dense twin is the width whose cost is nearest, and otherwise the same model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_lightning.models import (
    LowRankTransformer,
    dense_twin,
    macs_per_token,
    parameter_counts,
)


def low_rank(**changes):
    with torch.device("meta"):
        return LowRankTransformer(
            **{"vocab_size": 40, "sequence_len": 8, "model_dim": 64, "rank": 8, **changes}
        )


def costs(model, match):
    if match == "parameters":
        return parameter_counts(model.blocks).active
    return macs_per_token(model, model.sequence_len).active


@pytest.mark.parametrize("match", ["parameters", "flops"])
@settings(max_examples=10, deadline=None)
@given(rank=st.integers(1, 64), multiple_of=st.sampled_from([1, 4, 8]))
def test_no_other_width_is_nearer(match, rank, multiple_of):
    model = low_rank(depth=1, rank=rank)
    with torch.device("meta"):
        twin = dense_twin(model, match, multiple_of=multiple_of)
        width = twin.model.model_dim
        others = [
            LowRankTransformer(**{**twin.model.config, "model_dim": other, "num_heads": 1})
            for other in (width - multiple_of, width + multiple_of)
            if other > 0
        ]
    assert width % multiple_of == 0  # costs grow with the width: the neighbours decide
    assert twin.wanted == costs(model, match)
    assert twin.reached == costs(twin.model, match)
    distances = [abs(costs(other, match) - twin.wanted) for other in others]
    assert abs(twin.reached - twin.wanted) <= min(distances)
    assert twin.relative_error == pytest.approx(twin.reached / twin.wanted - 1)


def test_all_but_the_width_stays():
    model = low_rank(mlp_dim=96, mlp_bias=True, head="tied", dropout=0.1, capacity=16)
    with torch.device("meta"):
        config = dense_twin(model).model.config
    assert config["mlp_dim"] == round(1.5 * config["model_dim"])
    assert (config["rank"], config["capacity"]) == (None, None)
    changed = {"model_dim", "num_heads", "mlp_dim", "rank", "capacity"}
    assert {name for name in config if config[name] != model.config[name]} == changed


def test_twins_follow_the_present_ranks():
    model = low_rank(rank=32)
    with torch.device("meta"):
        before = dense_twin(model).model.model_dim
        for block in model.blocks:
            for layer in (block.mlp.c_fc, block.mlp.c_proj, block.attn.c_q, block.attn.c_k):
                layer.set_rank(4)
        assert dense_twin(model).model.model_dim < before


def test_heads_are_no_wider_than_in_the_low_rank_model():
    with torch.device("meta"):
        twin = dense_twin(LowRankTransformer.v10(33_277))
    assert twin.wanted == 3_538_944 + 6 * 2 * 1_024
    assert (twin.model.model_dim, twin.model.num_heads) == (224, 4)
    assert twin.reached == 6 * (12 * 224**2 + 4 * 224)
    assert abs(twin.relative_error) < 0.04


def test_twins_of_equal_cost_trade_the_head_for_the_blocks():
    with torch.device("meta"):
        model = LowRankTransformer.v10(33_277)
        twin = dense_twin(model, "flops")
    assert twin.wanted == 22_149_632
    assert twin.model.model_dim == 360
    assert abs(twin.relative_error) < 0.02
    assert parameter_counts(twin.model.blocks).active > parameter_counts(model.blocks).active


def test_the_twin_has_weights():
    model = LowRankTransformer(40, 8, depth=1, model_dim=64, rank=8)
    logits_BTV = dense_twin(model).model(torch.zeros(1, 8, dtype=torch.int64))
    assert logits_BTV.std() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"match": "time"}, r"`match` must be one of \('parameters', 'flops'\), got 'time'\."),
        ({"multiple_of": 0}, r"`multiple_of` must be >= 1, got 0\."),
    ],
)
def test_an_argument_outside_its_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        dense_twin(low_rank(), **arguments)
