"""Models that see the future or ignore the past are found out, by probing and by training."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectral_lightning.models import (
    GPT,
    LowRankTransformer,
    assert_causal,
    assert_uses_past,
    generate,
)
from spectral_lightning.testing.models import tiny_gpt2

SIZES = {"depth": 2, "model_dim": 32, "num_heads": 4, "rank": 8}


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small are slowed down by a second thread, and by far if a core is busy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def low_rank(vocab_size=16, sequence_len=16, **settings):
    model = LowRankTransformer(vocab_size, sequence_len, **{**SIZES, **settings})
    model.init_weights(torch.Generator().manual_seed(0))
    return model


class OneLayer(nn.Module):
    """Embedding, positions, one hand-written attention, head; `mix` is the attention."""

    vocab_size, sequence_len = 16, 16

    def __init__(self, mix, seed=0):
        super().__init__()
        self.mix = mix
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.wte, self.wpe = nn.Embedding(16, 32), nn.Embedding(16, 32)
            self.qkv, self.lm_head = nn.Linear(32, 96), nn.Linear(32, 16)

    def forward(self, tokens_BT):
        x_BTC = self.wte(tokens_BT) + self.wpe.weight[: tokens_BT.shape[1]]
        q_BTHD, k_BTHD, v_BTHD = self.qkv(x_BTC).unflatten(-1, (3, 4, 8)).unbind(2)
        return self.lm_head(x_BTC + self.mix(q_BTHD, k_BTHD, v_BTHD))


def over_tokens(q_BTHD, k_BTHD, v_BTHD):
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)


def over_heads(q_BTHD, k_BTHD, v_BTHD):
    """Scores of shape ``(B, T, H, H)``: no token meets another, as in version 7."""
    return F.scaled_dot_product_attention(q_BTHD, k_BTHD, v_BTHD).flatten(-2)


def heads_not_put_back(q_BTHD, k_BTHD, v_BTHD):
    """Causal attention whose result is read as if heads were tokens."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    y_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y_BHTD.reshape(q_BTHD.shape).flatten(-2)


def shifted_by_one(q_BTHD, k_BTHD, v_BTHD):
    """A mask that is off by one: each token sees the next as well."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)


OURS = {
    "gpt": lambda: GPT(depth=2, vocab_size=16, sequence_len=80, model_dim=24),
    "low rank": low_rank,
    "masked": lambda: low_rank(mode="masked", head="tied", dropout=0.3),
    "dense": lambda: low_rank(rank=None),
    "v10": lambda: LowRankTransformer.v10(16, model_dim=32, num_heads=4, rank=8),
    "one layer": lambda: OneLayer(over_tokens),
}


@pytest.mark.parametrize("name", OURS)
def test_causal_models_pass_and_use_the_past(name):
    model = OURS[name]()
    assert_causal(model)
    assert_uses_past(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_causal_models_pass_to_the_bit_in_any_precision(dtype):
    assert_causal(low_rank(256, 256).to(dtype), sequence_len=256, num_cuts=8)


def test_a_model_that_returns_its_logits_in_an_object_is_probed():
    assert_causal(tiny_gpt2(), vocab_size=40, sequence_len=8)
    assert_uses_past(tiny_gpt2(), vocab_size=40, sequence_len=8)


LEAKING = {
    "bidirectional": (lambda: low_rank(bidirectional=True), 0),
    "v10": (
        lambda: LowRankTransformer.v10(16, model_dim=32, num_heads=4, rank=8, bidirectional=True),
        0,
    ),
    # Token 1 gets head 0 at positions 4 to 7.
    "heads not put back": (lambda: OneLayer(heads_not_put_back), 0),
    "shifted by one": (lambda: OneLayer(shifted_by_one), 0),
}


@pytest.mark.parametrize("name", LEAKING)
def test_a_model_that_sees_the_future_is_refused_by_its_first_position(name):
    build, position = LEAKING[name]
    message = (
        rf"`model` must be causal, got logits at position {position} that depend on tokens from "
        rf"position {position + 1} on; mask its attention\."
    )
    with pytest.raises(ValueError, match=message):
        assert_causal(build())


def test_a_leak_far_into_the_sequence_is_found_where_it_starts():
    class LateLeak(OneLayer):
        def forward(self, tokens_BT):
            logits_BTV = super().forward(tokens_BT)
            logits_BTV[:, 9] += tokens_BT[:, 14, None]
            return logits_BTV

    with pytest.raises(ValueError, match=r"position 9 that depend on tokens from position 10 on"):
        assert_causal(LateLeak(over_tokens))


def test_a_leak_behind_zero_weights_is_found():
    """A fresh GPT gives zero logits, whatever its attention does."""
    model = GPT(depth=2, vocab_size=16, sequence_len=16, model_dim=24)
    unmasked = GPT(depth=2, vocab_size=16, sequence_len=16, model_dim=24)
    for block in unmasked.blocks:
        block.attn.forward = lambda x_BTC, *_: x_BTC.mean(1, keepdim=True).expand_as(x_BTC)
    assert not unmasked(torch.zeros(1, 4, dtype=torch.int64)).any()
    assert_causal(model)
    with pytest.raises(ValueError, match="`model` must be causal, got logits at position 0"):
        assert_causal(unmasked)


@pytest.mark.parametrize("cuts", [1, 3, 100])
def test_a_model_without_token_mixing_is_causal_but_ignores_the_past(cuts):
    model = OneLayer(over_heads)
    assert_causal(model, num_cuts=cuts)
    position = 8 if cuts == 1 else 1
    with pytest.raises(ValueError, match=rf"use the past, got logits at position {position} that"):
        assert_uses_past(model, num_cuts=cuts)


def test_a_tolerance_lets_small_changes_pass():
    class NearlyCausal(OneLayer):
        def forward(self, tokens_BT):
            return super().forward(tokens_BT) + 1e-6 * tokens_BT.sum()

    model = NearlyCausal(over_tokens, seed=1)
    with pytest.raises(ValueError, match="must be causal"):
        assert_causal(model)
    assert_causal(model, atol=3e-4)


def test_probing_leaves_no_trace():
    model = GPT(depth=2, vocab_size=16, sequence_len=16, model_dim=24).train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    assert_causal(model)
    assert_uses_past(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        assert_causal(model)
    assert [module.training for module in model.modules()] == modes


def test_a_model_that_is_not_deterministic_is_named_so():
    class Noisy(OneLayer):
        def forward(self, tokens_BT):
            return F.dropout(super().forward(tokens_BT))  # on in evaluation mode too

    with pytest.raises(ValueError, match="`model` must be deterministic in evaluation mode"):
        assert_causal(Noisy(over_tokens))


@pytest.mark.parametrize("check", [assert_causal, assert_uses_past])
def test_logits_that_are_not_numbers_are_named_so(check):
    model = low_rank()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="`model` must give logits without NaN"):
        check(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 1}, r"`vocab_size` must be >= 2, got 1\."),
        ({"sequence_len": 1}, r"`sequence_len` must be >= 2, got 1\."),
        ({"num_cuts": 0}, r"`num_cuts` must be >= 1, got 0\."),
        ({"atol": -1.0}, r"`atol` must be >= 0, got -1\.0\."),
        ({"atol": math.nan}, r"`atol` must be >= 0, got nan\."),
    ],
)
def test_a_setting_outside_its_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        assert_causal(low_rank(), **settings)


@pytest.mark.parametrize("check", [assert_causal, assert_uses_past])
def test_a_model_that_does_not_say_its_sizes_needs_them_as_arguments(check):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    with pytest.raises(ValueError, match="`vocab_size` must be given for a model without such"):
        check(model)
    with pytest.raises(ValueError, match="`sequence_len` must be given for a model without such"):
        check(model, vocab_size=5)
    assert_causal(model, vocab_size=5, sequence_len=6)


def train(model, draw, num_steps, lr=0.01):
    """Mean loss of the last 50 steps, each on fresh tokens ``(B, T + 1)``."""
    optimizer, losses = (
        torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), foreach=True),
        [],
    )
    for _ in range(num_steps):
        tokens_BT = draw()
        logits_BTV = model(tokens_BT[:, :-1])
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses[-50:]).mean().item()


def test_random_tokens_are_learned_only_by_seeing_the_future():
    """Row 3: nothing but a leak gets below the entropy of independent uniform tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randint(16, (32, 17), generator=generator)

    assert train(low_rank(depth=1), draw, num_steps=300) >= math.log(16) - 0.02
    assert train(low_rank(depth=1, bidirectional=True), draw, num_steps=300) < 1.0


def test_the_dense_twin_learns_what_needs_the_past():
    """Row 4: each token repeats the one before the last, or is drawn anew."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        tokens_BT = torch.randint(16, (64, 17), generator=generator)
        repeats_BT = torch.rand(64, 17, generator=generator) < 0.8
        for t in range(2, 17):
            tokens_BT[:, t] = torch.where(repeats_BT[:, t], tokens_BT[:, t - 2], tokens_BT[:, t])
        return tokens_BT

    unigram_entropy = math.log(16)
    assert train(OneLayer(over_heads), draw, num_steps=150) > unigram_entropy - 0.05
    assert train(low_rank(rank=None), draw, num_steps=150) < unigram_entropy - 0.5


def test_generated_text_does_not_depend_on_what_follows():
    model = low_rank()
    prompt_BT = torch.tensor([[3, 1, 4]])
    short = generate(model, prompt_BT, max_new_tokens=3, temperature=0.0)
    longer = generate(model, prompt_BT, max_new_tokens=9, temperature=0.0)
    assert torch.equal(longer[:, :6], short)
