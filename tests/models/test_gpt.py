"""The GPT against closed forms, a naive transcription, and its constructor's promises."""

import math

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser

from spectral_lightning.models import GPT, KVCache


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def naive_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def naive_rotation(x, position):
    """Rotate by minus the angle, as a product of complex numbers."""
    half = len(x) // 2
    angles = position * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), -angles)
    return torch.cat((turned.real, turned.imag))


def naive_attention(attn, x_TC, qk_norm):
    """One head and one token at a time."""
    normalised = naive_norm if qk_norm else torch.Tensor.clone
    x_TC = naive_norm(x_TC)
    q, k, v = x_TC @ attn.c_q.weight.T, x_TC @ attn.c_k.weight.T, x_TC @ attn.c_v.weight.T
    width, group = attn.c_q.weight.shape[0] // attn.num_heads, attn.num_heads // attn.num_kv_heads
    mixed = torch.zeros_like(x_TC)
    for head in range(attn.num_heads):
        out, shared = slice(head * width, (head + 1) * width), head // group
        kv = slice(shared * width, (shared + 1) * width)
        for t in range(len(x_TC)):
            query = normalised(naive_rotation(q[t, out], t))
            keys = [normalised(naive_rotation(k[s, kv], s)) for s in range(t + 1)]
            weights = torch.softmax(torch.stack(keys) @ query / math.sqrt(width), dim=0)
            mixed[t, out] = weights @ v[: t + 1, kv]
    return mixed @ attn.c_proj.weight.T


def naive_forward(model, tokens_T):
    x_TC = naive_norm(model.wte.weight[tokens_T])
    for block in model.blocks:
        x_TC = x_TC + naive_attention(block.attn, x_TC, model.config["qk_norm"])
        hidden = naive_norm(x_TC) @ block.mlp.c_fc.weight.T
        x_TC = x_TC + hidden.clamp(min=0) ** 2 @ block.mlp.c_proj.weight.T
    return 15 * torch.tanh(naive_norm(x_TC) @ model.lm_head.weight.T / 15)


@pytest.mark.parametrize(
    ("num_kv_heads", "qk_norm"), [(None, True), (1, True), (2, True), (2, False)]
)
def test_forward_equals_a_naive_transcription(tiny_gpt, tokens, num_kv_heads, qk_norm):
    model = tiny_gpt(head_dim=6, num_kv_heads=num_kv_heads, qk_norm=qk_norm).double()
    tokens_BT = tokens(2, 9)
    with torch.no_grad():
        expected = torch.stack([naive_forward(model, row) for row in tokens_BT])
        torch.testing.assert_close(model(tokens_BT), expected, atol=1e-7, rtol=1e-6)


def test_depth_4_preset_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = GPT.nanochat_2025_11(4)
    assert num_parameters(model) == 36_700_160
    assert (model.model_dim, model.num_heads, model.num_kv_heads) == (256, 2, 2)
    assert (model.vocab_size, model.sequence_len) == (65_536, 2_048)


@pytest.mark.parametrize(("depth", "count"), [(20, 560_988_160), (12, 185_597_952)])
def test_depth_is_the_single_dial_of_size(depth, count):
    with torch.device("meta"):
        model = GPT(depth)
    dim = 64 * depth
    assert num_parameters(model) == 2 * 65_536 * dim + 12 * depth * dim**2 == count


@pytest.mark.parametrize("depth", range(1, 33))
def test_every_depth_gives_heads_of_even_width(depth):
    with torch.device("meta"):
        model = GPT(depth, vocab_size=4, sequence_len=4)
    width = model.model_dim // model.num_heads
    assert width * model.num_heads == 64 * depth
    assert width % 2 == 0
    assert width <= 128


def test_initial_loss_is_the_log_of_the_vocabulary_size(tokens):
    model = GPT(depth=2, vocab_size=50, sequence_len=8)
    logits_BTV = model(tokens(3, 8, vocab_size=50))
    assert torch.equal(logits_BTV, torch.zeros(3, 8, 50))
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), tokens(24, vocab_size=50))
    assert loss.item() == pytest.approx(math.log(50), abs=1e-6)


def test_every_layer_is_the_identity_at_initialisation():
    block = GPT(depth=1, vocab_size=5, sequence_len=8).blocks[0]
    x_BTC = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    no_rotation = (torch.ones(8, 32), torch.zeros(8, 32))
    assert torch.equal(block(x_BTC, no_rotation), x_BTC)


def test_initial_weights_have_the_stated_spread():
    model = GPT(depth=4, vocab_size=512, sequence_len=8)
    # fan_in = 256 everywhere: 1/16 for square and for tall matrices.
    assert model.wte.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert model.blocks[1].attn.c_k.weight.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert model.blocks[1].mlp.c_fc.weight.std().item() == pytest.approx(1 / 16, rel=0.02)
    wide = GPT(depth=4, vocab_size=8, sequence_len=8, head_dim=64, num_kv_heads=1)
    assert wide.blocks[0].attn.c_v.weight.std().item() == pytest.approx(1 / 32, rel=0.03)


def test_a_generator_makes_initial_weights_reproducible_and_spares_the_global_one():
    model = GPT(depth=1, vocab_size=7, sequence_len=4)
    before = torch.get_rng_state()
    model.init_weights(torch.Generator().manual_seed(5))
    first = model.wte.weight.clone()
    model.init_weights(torch.Generator().manual_seed(5))
    assert torch.equal(model.wte.weight, first)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_from_the_meta_device_equals_one_built_directly(tokens):
    settings = {"depth": 2, "vocab_size": 13, "sequence_len": 16, "model_dim": 24}
    with torch.device("meta"):
        late = GPT(**settings)
    late.to_empty(device="cpu")
    late.init_weights(torch.Generator().manual_seed(0))
    direct = GPT(**settings)
    direct.init_weights(torch.Generator().manual_seed(0))
    for (name, left), right in zip(late.named_parameters(), direct.parameters(), strict=True):
        assert torch.equal(left, right), name
    assert not list(late.buffers())  # nothing that `to_empty` could leave undefined
    assert torch.equal(late(tokens(1, 5)), direct(tokens(1, 5)))


def test_the_scale_of_queries_matters_only_without_their_norm(tiny_gpt, tokens):
    models = {qk_norm: tiny_gpt(qk_norm=qk_norm) for qk_norm in (True, False)}
    assert num_parameters(models[True]) == num_parameters(models[False])
    with torch.no_grad():
        for qk_norm, model in models.items():
            before = model(tokens(2, 9))
            for block in model.blocks:
                block.attn.c_q.weight.mul_(3)
            assert torch.allclose(model(tokens(2, 9)), before, atol=1e-4) == qk_norm


@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_configuration_builds_the_same_function(tiny_gpt, tokens, qk_norm):
    source = tiny_gpt(qk_norm=qk_norm, num_kv_heads=1)
    copy = GPT(**source.config)
    copy.load_state_dict(source.state_dict())
    assert torch.equal(copy(tokens(2, 9)), source(tokens(2, 9)))


def test_later_tokens_do_not_change_earlier_logits(tiny_gpt, tokens):
    model, tokens_BT = tiny_gpt(), tokens(1, 10)
    changed = tokens_BT.clone()
    changed[0, 6:] = (changed[0, 6:] + 1) % 13
    with torch.no_grad():
        before, after = model(tokens_BT), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6], after[:, 6])


def test_logits_stay_inside_the_cap(tiny_gpt, tokens):
    model = tiny_gpt()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e3)
        assert 14 < model(tokens(2, 8)).abs().max() <= 15


def test_logits_are_float32_in_half_precision_and_under_autocast(tiny_gpt, tokens):
    model = tiny_gpt()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(tokens(1, 4)).dtype == torch.float32
    assert model.bfloat16()(tokens(1, 4)).dtype == torch.float32
    assert model.double()(tokens(1, 4)).dtype == torch.float64


def test_every_parameter_receives_a_gradient(tiny_gpt, tokens):
    model = tiny_gpt(head_dim=6, num_kv_heads=2)
    model(tokens(2, 9)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name


def test_parameter_names_are_those_of_nanochat():
    model = GPT(depth=1, vocab_size=4, sequence_len=4)
    assert list(model.state_dict()) == [
        "wte.weight",
        "blocks.0.attn.c_q.weight",
        "blocks.0.attn.c_k.weight",
        "blocks.0.attn.c_v.weight",
        "blocks.0.attn.c_proj.weight",
        "blocks.0.mlp.c_fc.weight",
        "blocks.0.mlp.c_proj.weight",
        "lm_head.weight",
    ]
    assert model.head_names() == ("lm_head",)


def test_state_dict_round_trip_keeps_the_function(tiny_gpt, tokens):
    source, target = tiny_gpt(seed=1), tiny_gpt(seed=2)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(tokens(2, 5)), target(tokens(2, 5)))


# jsonargparse 4.49 renamed `instantiate_classes`; older supported versions know only this name.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_yaml_file_builds_the_model():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(torch.nn.Module, "model")
    text = """
    model:
      class_path: spectral_lightning.models.GPT
      init_args: {depth: 2, vocab_size: 30, sequence_len: 12, model_dim: 32, head_dim: 16}
    """
    model = parser.instantiate_classes(parser.parse_string(text)).model
    assert isinstance(model, GPT)
    assert (model.model_dim, model.num_heads, model.sequence_len) == (32, 2, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, r"`depth` must be >= 1, got 0\."),
        ({"vocab_size": 0}, r"`vocab_size` must be >= 1, got 0\."),
        ({"sequence_len": -1}, r"`sequence_len` must be >= 1, got -1\."),
        ({"model_dim": 7}, r"`model_dim` must be even and >= 2, got 7\."),
        ({"head_dim": 1}, r"`head_dim` must be >= 2, got 1\."),
        ({"head_dim": 16, "num_kv_heads": 3}, r"`num_kv_heads` must divide .* heads 4, got 3\."),
        ({"num_kv_heads": 0}, r"`num_kv_heads` must divide the number of heads 1, got 0\."),
    ],
)
def test_a_setting_outside_its_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GPT(**{"depth": 1, "vocab_size": 4, "sequence_len": 4, **settings})


def test_an_input_longer_than_the_context_is_refused(tiny_gpt, tokens):
    model = tiny_gpt()
    with pytest.raises(ValueError, match=r"at most sequence_len=16 tokens, got 17; shorten"):
        model(tokens(1, 17))
    kv_cache = KVCache(32)
    model(tokens(1, 16), kv_cache=kv_cache)
    with pytest.raises(ValueError, match=r"at most sequence_len=16 tokens, got 17; shorten"):
        model(tokens(1, 1), kv_cache=kv_cache)


def test_tokens_without_a_batch_dimension_are_refused(tiny_gpt, tokens):
    with pytest.raises(ValueError, match=r"must have shape \(batch, tokens\), got \(5,\)\."):
        tiny_gpt()(tokens(5))
