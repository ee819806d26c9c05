"""The low-rank transformer against a naive transcription, and its constructor's promises."""

import math

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import nn

from spectral_lightning.models import KVCache, LowRankTransformer, generate
from spectral_lightning.nn import LowRankLinear
from spectral_lightning.optim import MuonAdamW, parameter_groups
from spectral_lightning.tasks.checkpoint import CHECKPOINT_KEY, build_model, model_recipe

TINY = {"depth": 2, "model_dim": 24, "num_heads": 4, "rank": 5, "capacity": 8}
DENSE = {"rank": None, "capacity": None}


@pytest.fixture
def tiny():
    """Build a model whose every active weight is random, biases and norms too."""

    def build(seed=0, **settings):
        model = LowRankTransformer(13, 16, **{**TINY, **settings})
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3, generator=generator)
        return model.eval()

    return build


def weight(layer):
    return layer.weight if isinstance(layer, nn.Linear) else layer.spectral_weight()


def naive_linear(layer, x_TC):
    y = x_TC @ weight(layer).T
    return y if layer.bias is None else y + layer.bias


def naive_norm(norm, x_TC):
    centred = x_TC - x_TC.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + (
        norm.bias
    )


def naive_attention(attn, x_TC, bidirectional):
    """One head and one token at a time."""
    q, k, v = (naive_linear(layer, x_TC) for layer in (attn.c_q, attn.c_k, attn.c_v))
    width = x_TC.shape[1] // attn.num_heads
    mixed = torch.zeros_like(x_TC)
    for head in range(attn.num_heads):
        part = slice(head * width, (head + 1) * width)
        for t in range(len(x_TC)):
            seen = slice(None if bidirectional else t + 1)
            weights = torch.softmax(k[seen, part] @ q[t, part] / math.sqrt(width), dim=0)
            mixed[t, part] = weights @ v[seen, part]
    return naive_linear(attn.c_proj, mixed)


def naive_forward(model, tokens_T):
    x_TC = model.wte.weight[tokens_T] + model.wpe.weight[: len(tokens_T)]
    for block in model.blocks:
        x_TC = x_TC + naive_attention(block.attn, naive_norm(block.ln_1, x_TC), model.bidirectional)
        hidden = naive_linear(block.mlp.c_fc, naive_norm(block.ln_2, x_TC))
        gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x_TC = x_TC + naive_linear(block.mlp.c_proj, gelu)
    x_TC = naive_norm(model.ln_f, x_TC)
    return x_TC @ model.wte.weight.T if model.lm_head is None else naive_linear(model.lm_head, x_TC)


def low_rank_layers(model):
    return [module for module in model.modules() if isinstance(module, LowRankLinear)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "masked", "head": "tied", "mlp_bias": True, "dropout": 0.5},
        {**DENSE, "head": "unbiased", "mlp_dim": 30},
        {"bidirectional": True},
    ],
    ids=str,
)
def test_forward_equals_a_naive_transcription(tiny, tokens, settings):
    model, tokens_BT = tiny(**settings).double(), tokens(2, 9)
    with torch.no_grad():
        expected = torch.stack([naive_forward(model, row) for row in tokens_BT])
        torch.testing.assert_close(model(tokens_BT), expected)


@pytest.mark.parametrize("pieces", [[10], [1] * 10, [6, 1, 1, 2], [3, 7]], ids=str)
def test_reading_in_pieces_gives_the_logits_of_reading_at_once(tiny, tokens, pieces):
    model, tokens_BT, kv_cache = tiny(), tokens(2, 10), KVCache(10)
    with torch.no_grad():
        parts = [model(part, kv_cache=kv_cache) for part in tokens_BT.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens_BT))
    assert kv_cache.length == 10


def test_generation_with_cache_equals_greedy_without(tiny, tokens):
    model, tokens_BT = tiny(), tokens(3, 4)
    generated = generate(model, tokens_BT, max_new_tokens=12, temperature=0.0)
    with torch.no_grad():
        for _ in range(12):
            next_B = model(tokens_BT)[:, -1].argmax(-1)
            tokens_BT = torch.cat((tokens_BT, next_B[:, None]), dim=1)
    assert torch.equal(generated, tokens_BT)


def test_a_bidirectional_model_takes_no_cache(tiny, tokens):
    with pytest.raises(ValueError, match="`kv_cache` must be None for a bidirectional model"):
        tiny(bidirectional=True)(tokens(1, 3), kv_cache=KVCache(8))


def test_each_layer_has_the_rank_and_capacity_asked_for(tiny):
    layers = low_rank_layers(tiny(mode="masked"))
    assert len(layers) == 12
    assert {(layer.rank, layer.capacity, layer.mode) for layer in layers} == {(5, 8, "masked")}
    assert low_rank_layers(tiny(**DENSE)) == []


def test_presets_have_the_sizes_of_the_original():
    with torch.device("meta"):
        v10, v13 = LowRankTransformer.v10(100), LowRankTransformer.v13(100)
        v18 = LowRankTransformer.v18(100, dropout=0.2)
    for model, dim, num_heads, capacity in (
        (v10, 512, 8, 64),
        (v13, 256, 4, 128),
        (v18, 512, 8, 64),
    ):
        assert (model.sequence_len, len(model.blocks)) == (256, 6)
        assert (model.model_dim, model.num_heads) == (dim, num_heads)
        assert not model.bidirectional
        for layer in low_rank_layers(model):
            assert (layer.rank, layer.capacity) == (64, capacity)
            assert {layer.in_features, layer.out_features} <= {dim, 4 * dim}
    assert v10.lm_head.bias is not None
    assert v13.lm_head.bias is None
    assert v18.lm_head is None
    assert v18.blocks[0].mlp.c_fc.bias is not None
    assert v18.blocks[0].attn.c_q.bias is None
    assert (v10.drop.p, v18.drop.p, v18.blocks[0].mlp.drop.p) == (0.0, 0.2, 0.2)


@pytest.mark.parametrize(
    ("init", "left", "right", "embedding"),
    [
        ("balanced", 16**-0.5, 128**-0.5, 0.02),
        ("v10", 512**-0.5, 128**-0.5, 1.0),
        ("v13", 512**-0.5, 512**-0.5, 1.0),
        ("v18", 0.02, 0.02, 0.02),
    ],
)
def test_initial_values_have_the_stated_spread(init, left, right, embedding):
    model = LowRankTransformer(300, 16, model_dim=128, rank=16, depth=2, init=init)
    up = model.blocks[1].mlp.c_fc
    assert up.left_factor.std().item() == pytest.approx(left, rel=0.03)
    assert up.right_factor.std().item() == pytest.approx(right, rel=0.05)
    assert model.wte.weight.std().item() == pytest.approx(embedding, rel=0.03)


@pytest.mark.parametrize("rank", [16, None])
@pytest.mark.parametrize(("init", "ratio"), [("balanced", 0.5), ("spectral", 0.5), ("v10", 1.0)])
def test_residual_projections_start_smaller_by_depth(rank, init, ratio):
    # `(2 * depth) ** -0.5` is 1/2 at depth 2.
    model = LowRankTransformer(10, 16, model_dim=128, rank=rank, depth=2, init=init)
    attn = model.blocks[1].attn
    norm, residual_norm = (weight(layer).norm().item() for layer in (attn.c_q, attn.c_proj))
    assert residual_norm / norm == pytest.approx(ratio, rel=0.15)


@pytest.mark.parametrize(
    ("init", "rank", "variance"),
    [
        ("balanced", 8, 1.0),
        ("balanced", 64, 1.0),
        ("balanced", None, 1.0),
        ("spectral", 64, 1.0),
        ("v10", 8, 8 / 1024),
        ("v10", 64, 64 / 1024),
    ],
)
def test_initial_outputs_have_the_stated_variance(init, rank, variance):
    model = LowRankTransformer(10, 16, model_dim=256, rank=rank, depth=1, init=init)
    model.init_weights(torch.Generator().manual_seed(0))
    x = torch.randn(500, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert model.blocks[0].mlp.c_fc(x).var().item() == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize(
    "settings", [{"head": "tied"}, {"head": "biased"}, {"init": "v18"}], ids=str
)
def test_initial_loss_is_about_the_log_of_the_vocabulary_size(tokens, settings):
    model = LowRankTransformer(50, 16, **{**TINY, **settings})
    logits_BTV = model(tokens(8, 16, vocab_size=50))
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), tokens(128, seed=1, vocab_size=50))
    assert loss.item() == pytest.approx(math.log(50), abs=0.1)


def test_a_generator_makes_initial_weights_reproducible_and_spares_the_global_one():
    model = LowRankTransformer(7, 4, **TINY)
    for init in ("balanced", "spectral", "v10", "v18"):
        model.init = init
        before = torch.get_rng_state()
        model.init_weights(torch.Generator().manual_seed(5))
        first = [parameter.clone() for parameter in model.parameters()]
        model.init_weights(torch.Generator().manual_seed(5))
        assert all(map(torch.equal, first, model.parameters()))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("settings", [{}, DENSE, {"head": "tied", "init": "v18"}], ids=str)
def test_a_model_from_the_meta_device_equals_one_built_directly(tokens, settings):
    with torch.device("meta"):
        late = LowRankTransformer(13, 16, **{**TINY, **settings})
    late.to_empty(device="cpu")
    late.init_weights(torch.Generator().manual_seed(0))
    direct = LowRankTransformer(13, 16, **{**TINY, **settings})
    direct.init_weights(torch.Generator().manual_seed(0))
    assert late.state_dict().keys() == direct.state_dict().keys()
    for name, value in direct.state_dict().items():
        assert torch.equal(late.state_dict()[name], value), name
    assert torch.equal(late.eval()(tokens(1, 5)), direct.eval()(tokens(1, 5)))


def test_a_checkpoint_rebuilds_a_model_whose_ranks_have_changed(tiny, tokens):
    source = tiny()
    for rank, layer in enumerate(low_rank_layers(source)):
        layer.set_rank(1 + rank % 8)
    copy = build_model({CHECKPOINT_KEY: {"model": model_recipe(source)}}).eval()
    copy.load_state_dict(source.state_dict())
    assert [layer.rank for layer in low_rank_layers(copy)] == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4]
    assert torch.equal(copy(tokens(2, 9)), source(tokens(2, 9)))


def test_dropout_acts_in_training_only(tiny, tokens):
    model = tiny(dropout=0.3)
    assert torch.equal(model(tokens(1, 9)), model(tokens(1, 9)))
    model.train()
    assert not torch.equal(model(tokens(1, 9)), model(tokens(1, 9)))


def test_logits_are_float32_in_half_precision_and_under_autocast(tiny, tokens):
    model = tiny()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(tokens(1, 4)).dtype == torch.float32
    assert model.bfloat16()(tokens(1, 4)).dtype == torch.float32
    assert model.double()(tokens(1, 4)).dtype == torch.float64


def test_every_parameter_receives_a_gradient(tiny, tokens):
    model = tiny(mlp_bias=True)
    model(tokens(2, 16)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name


def test_a_tied_head_is_one_parameter_and_counts_as_the_head(tiny):
    model = tiny(head="tied")
    assert model.head_names() == ("wte",)
    assert not any("lm_head" in name for name in model.state_dict())
    groups = {group["role"]: group["params"] for group in parameter_groups(model)}
    assert [id(parameter) for parameter in groups["head"]] == [id(model.wte.weight)]


@pytest.mark.parametrize("optimizer", [MuonAdamW, torch.optim.AdamW])
def test_any_optimizer_takes_all_parameters_and_lowers_the_loss(tokens, optimizer):
    model = LowRankTransformer(13, 16, **TINY)
    model.init_weights(torch.Generator().manual_seed(0))
    groups = parameter_groups(model)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimizer = optimizer(groups, lr=0.01)
    tokens_BT, losses = tokens(4, 17), []
    for _ in range(20):
        logits_BTV = model(tokens_BT[:, :-1])
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


# jsonargparse 4.49 renamed `instantiate_classes`; older supported versions know only this name.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_yaml_file_builds_the_model():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(torch.nn.Module, "model")
    text = """
    model:
      class_path: spectral_lightning.models.LowRankTransformer
      init_args: {vocab_size: 30, depth: 2, model_dim: 32, num_heads: 2, rank: 8, head: tied}
    """
    model = parser.instantiate_classes(parser.parse_string(text)).model
    assert isinstance(model, LowRankTransformer)
    assert (model.model_dim, model.vocab_size, model.lm_head) == (32, 30, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, r"`vocab_size` must be >= 1, got 0\."),
        ({"sequence_len": -1}, r"`sequence_len` must be >= 1, got -1\."),
        ({"depth": 0}, r"`depth` must be >= 1, got 0\."),
        ({"model_dim": 0}, r"`model_dim` must be >= 1, got 0\."),
        ({"num_heads": 0}, r"`num_heads` must be >= 1, got 0\."),
        ({"num_heads": 5}, r"`num_heads` must divide model_dim=24, got 5\."),
        ({"mlp_dim": 0}, r"`mlp_dim` must be >= 1, got 0\."),
        ({"rank": None}, r"`capacity` must be None for a dense model \(rank=None\), got 8\."),
        ({"rank": 9}, r"`rank` must be in \[1, capacity = 8\], got 9\."),
        ({"capacity": 25}, r"`capacity` must be in \[1, 24\], .* got 25\."),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1\.0\."),
        ({"head": "none"}, r"`head` must be one of .*'tied'.*, got 'none'\."),
        ({"init": "v11"}, r"`init` must be one of .*'v18'.*, got 'v11'\."),
        ({"head": "tied", "init": "v10"}, r"`head` must not be 'tied' with .* init='v10', .*use"),
    ],
)
def test_a_setting_outside_its_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LowRankTransformer(**{"vocab_size": 4, "sequence_len": 4, **TINY, **settings})


def test_an_input_longer_than_the_context_is_refused(tiny, tokens):
    model, kv_cache = tiny(), KVCache(32)
    with pytest.raises(ValueError, match=r"at most sequence_len=16 tokens, got 17; shorten"):
        model(tokens(1, 17))
    model(tokens(1, 16), kv_cache=kv_cache)
    with pytest.raises(ValueError, match=r"at most sequence_len=16 tokens, got 17; shorten"):
        model(tokens(1, 1), kv_cache=kv_cache)


def test_tokens_without_a_batch_dimension_are_refused(tiny, tokens):
    with pytest.raises(ValueError, match=r"must have shape \(batch, tokens\), got \(5,\)\."):
        tiny()(tokens(5))
