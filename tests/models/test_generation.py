"""Generation against a loop without cache, its reproducibility and its refusals."""

import math

import pytest
import torch

from spectral_lightning.models import generate
from spectral_lightning.nn import stablemax


def naive_greedy(model, tokens_BT, num_new):
    """Read everything anew for every token."""
    with torch.no_grad():
        for _ in range(num_new):
            next_B = model(tokens_BT)[:, -1].argmax(-1)
            tokens_BT = torch.cat((tokens_BT, next_B[:, None]), dim=1)
    return tokens_BT


@pytest.mark.parametrize("num_kv_heads", [None, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_with_cache_equals_greedy_without(tiny_gpt, tokens, num_kv_heads, seed):
    model = tiny_gpt(seed=seed, head_dim=6, num_kv_heads=num_kv_heads)
    prompt_BT = tokens(3, 4, seed=seed)
    result = generate(model, prompt_BT, max_new_tokens=12, temperature=0.0)
    assert torch.equal(result, naive_greedy(model, prompt_BT, 12))


def test_a_prompt_of_one_token_is_enough(tiny_gpt, tokens):
    model = tiny_gpt()
    result = generate(model, tokens(1, 1), max_new_tokens=15, temperature=0.0)
    assert torch.equal(result, naive_greedy(model, tokens(1, 1), 15))


def test_the_same_seed_gives_the_same_sample(tiny_gpt, tokens):
    model, prompt_BT = tiny_gpt(), tokens(2, 3)
    first = generate(model, prompt_BT, max_new_tokens=13, seed=4)
    assert torch.equal(first, generate(model, prompt_BT, max_new_tokens=13, seed=4))
    assert not torch.equal(first, generate(model, prompt_BT, max_new_tokens=13, seed=5))


def test_the_global_random_state_is_untouched(tiny_gpt, tokens):
    model, before = tiny_gpt(), torch.get_rng_state()
    generate(model, tokens(1, 3), max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_top_1_equals_greedy_even_when_all_logits_tie(tiny_gpt, tokens):
    model, prompt_BT = tiny_gpt(), tokens(2, 3)
    for scale in (1.0, 0.0):
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        greedy = generate(model, prompt_BT, max_new_tokens=9, temperature=0.0)
        assert torch.equal(generate(model, prompt_BT, max_new_tokens=9, top_k=1), greedy)


def test_top_k_draws_only_the_k_most_probable_tokens(tiny_gpt, tokens):
    model, prompt_BT = tiny_gpt(), tokens(1, 3).expand(200, -1)
    with torch.no_grad():
        allowed = set(model(prompt_BT[:1])[0, -1].topk(3).indices.tolist())
    drawn = generate(model, prompt_BT, max_new_tokens=1, temperature=3.0, top_k=3)[:, -1]
    assert set(drawn.tolist()) == allowed


def test_a_top_k_beyond_the_vocabulary_restricts_nothing(tiny_gpt, tokens):
    model, prompt_BT = tiny_gpt(), tokens(2, 3)
    free = generate(model, prompt_BT, max_new_tokens=9)
    assert torch.equal(generate(model, prompt_BT, max_new_tokens=9, top_k=50), free)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize(
    ("transform", "probabilities"), [("softmax", torch.softmax), ("stablemax", stablemax)]
)
def test_samples_follow_the_transform_at_the_temperature(
    tiny_gpt, tokens, temperature, transform, probabilities
):
    model, prompt_BT = tiny_gpt(), tokens(1, 3)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that the two transforms are far apart
        powers = probabilities(model(prompt_BT)[0, -1], dim=-1) ** (1 / temperature)
    expected = powers / powers.sum()
    settings = {"temperature": temperature, "transform": transform}
    drawn = generate(model, prompt_BT.expand(4000, -1), max_new_tokens=1, **settings)[:, -1]
    frequency = drawn.bincount(minlength=13) / 4000
    # Four standard deviations of a frequency out of 4000 draws.
    assert (frequency - expected).abs().max() < 4 * 0.5 / math.sqrt(4000)


def test_a_finished_row_is_filled_with_its_stop_token(tiny_gpt, tokens):
    model, prompt_BT = tiny_gpt(), tokens(6, 2)
    free = generate(model, prompt_BT, max_new_tokens=14, temperature=0.0)[:, 2:]
    stop_token = int(free[0, 3])
    stopped = generate(model, prompt_BT, max_new_tokens=14, temperature=0.0, stop_token=stop_token)[
        :, 2:
    ]
    for free_row, row in zip(free.tolist(), stopped.tolist(), strict=True):
        end = free_row.index(stop_token) + 1 if stop_token in free_row else len(row)
        assert row[:end] == free_row[:end][: len(row)]
        assert set(row[end:]) <= {stop_token}


def test_generation_ends_when_all_rows_have_ended(tiny_gpt, tokens):
    model, prompt_BT = tiny_gpt(), tokens(1, 2)
    free = generate(model, prompt_BT, max_new_tokens=14, temperature=0.0)
    stop_token = int(free[0, 2])
    stopped = generate(model, prompt_BT, max_new_tokens=14, temperature=0.0, stop_token=stop_token)
    assert stopped.tolist() == [[*prompt_BT[0].tolist(), stop_token]]


def test_a_stop_token_in_the_prompt_ends_nothing(tiny_gpt):
    prompt_BT = torch.tensor([[12, 12]])
    model = tiny_gpt()
    free = generate(model, prompt_BT, max_new_tokens=3, temperature=0.0)
    assert 12 not in free[0, 2:].tolist()
    assert torch.equal(
        generate(model, prompt_BT, max_new_tokens=3, temperature=0.0, stop_token=12), free
    )


def test_every_submodule_keeps_its_own_mode(tiny_gpt, tokens):
    model = tiny_gpt().train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(model.training))
    generate(model, tokens(1, 3), max_new_tokens=2)
    assert seen == [False, False]
    assert [module.training for module in model.modules()] == before
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, tokens(1, 3), max_new_tokens=2)
    assert [module.training for module in model.modules()] == before


def test_no_graph_is_built(tiny_gpt, tokens):
    model, graphs = tiny_gpt(), []
    model.lm_head.register_forward_hook(lambda *args: graphs.append(args[-1].requires_grad))
    generate(model, tokens(1, 3), max_new_tokens=2)
    assert graphs == [False, False]


def test_the_prompt_is_not_changed(tiny_gpt, tokens):
    prompt_BT = tokens(2, 3)
    result = generate(tiny_gpt(), prompt_BT, max_new_tokens=2)
    assert torch.equal(prompt_BT, tokens(2, 3))
    assert torch.equal(result[:, :3], prompt_BT)


def test_a_diverged_model_is_named_as_the_cause(tiny_gpt, tokens):
    model = tiny_gpt()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="`model` must give finite logits, got NaN"):
        generate(model, tokens(1, 3), max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompt_BT", "message"),
    [
        (torch.tensor([1, 2]), r"`prompt_BT` must be an int64 tensor .* of shape \(2,\)\."),
        (torch.zeros(1, 0, dtype=torch.int64), r"with at least one token, .* shape \(1, 0\)\."),
        (torch.tensor([[1.0]]), r"`prompt_BT` must be an int64 tensor .*, got torch\.float32"),
        (torch.tensor([[3, 13]]), r"token ids in \[0, vocab_size=13\), got ids from 3 to 13\."),
        (torch.tensor([[-1, 2]]), r"token ids in \[0, vocab_size=13\), got ids from -1 to 2\."),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused(tiny_gpt, prompt_BT, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_gpt(), prompt_BT, max_new_tokens=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, r"`max_new_tokens` must be >= 1, got 0\."),
        ({"max_new_tokens": 14}, r"at most sequence_len=16 tokens, got 3 \+ 14 = 17; shorten"),
        ({"temperature": -0.1}, r"`temperature` must be finite and >= 0, got -0\.1\."),
        ({"temperature": math.nan}, r"`temperature` must be finite and >= 0, got nan\."),
        ({"top_k": 0}, r"`top_k` must be >= 1 or None, got 0\."),
        ({"stop_token": 13}, r"`stop_token` must be in \[0, vocab_size=13\) or None, got 13\."),
    ],
)
def test_a_setting_outside_its_range_is_refused(tiny_gpt, tokens, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_gpt(), tokens(1, 3), **{"max_new_tokens": 2, **settings})
