import pytest
import torch
import torch.nn.functional as F

from spectral_lightning.models.spectra import parameters_by_part

EMBEDDINGS = ("semantic", "entity", "retrieval", "anchor", "ranking")


def embeddings(output):
    return {name: output[name] for name in (*EMBEDDINGS, "anomaly_score", "pooled")}


def pad(ids, left, right):
    mask = F.pad(torch.ones_like(ids), (left, right))
    return F.pad(ids, (left, right), value=7), mask


def largest_difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_heads_have_their_widths_and_unit_length(build, texts):
    model = build(use_ranking=True)
    output = model(texts(3, 9))
    for name, dims in model.head_dims().items():
        assert output[name].shape == (3, dims[0])
        assert output[name].norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert list(model.head_dims()) == list(EMBEDDINGS)
    assert model.head_dims()["semantic"] == (64, 48, 32)
    assert (output.anomalous.shape, output.spectral.shape) == ((3, 128), (3, 16))
    assert ((output.anomaly_score > 0) & (output.anomaly_score <= 0.5)).all()


def test_heads_that_are_off_return_nothing(build, texts):
    off = dict.fromkeys(("use_anchor", "use_entity", "use_ranking", "use_retrieval"), False)
    model = build(**off, semantic_dims=())
    assert model.head_dims() == {}
    assert list(model(texts(2, 5))) == ["last_hidden_state", "pooled"]


def test_the_ranking_head_follows_its_definition(build, texts):
    model = build(pooling="cls")
    ids, mask = pad(texts(2, 6), 0, 3)
    output, head = model(ids, mask), model.heads.ranking
    mean = output.last_hidden_state[:, :6].mean(dim=1)  # always the mean, also with `cls`
    wide = head.widen_norm(F.gelu(head.widen(mean)))
    anomalous = head.anomalous_norm(F.gelu(head.anomalous(wide)))
    score = 1 - (anomalous @ head.basis.T).abs().max(dim=1).values.sigmoid()
    spectral = head.spectral_norm(head.spectral(head.spectral_hidden(anomalous).tanh()))
    joined = torch.cat([anomalous * score[:, None], spectral], dim=1)
    ranking = F.normalize(head.output_norm(head.output(joined)))
    expected = {"ranking": ranking, "anomaly_score": score, "spectral": spectral}
    assert largest_difference(expected, output) < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_padding_changes_nothing(build, texts, pooling, norm, depth):
    model = build(pooling=pooling, norm=norm, fractal_depth=depth, max_length=64)
    for layer in model.encoder.layers:
        if depth:
            layer.attention.fractal.data.fill_(0.8)
    ids = texts(2, 9)
    alone = embeddings(model(ids))
    for left, right in [(0, 0), (0, 1), (1, 0), (5, 3), (0, 128), (128, 0), (64, 64)]:
        assert largest_difference(alone, embeddings(model(*pad(ids, left, right)))) <= 1e-5


def test_a_text_has_the_same_embeddings_in_any_batch(build, texts):
    model = build()
    ids, mask = pad(texts(4, 12), 0, 0)
    mask[1:, 7:] = 0
    together = embeddings(model(ids, mask))
    alone = embeddings(model(ids[2:3, :7]))
    assert largest_difference(alone, {k: v[2:3] for k, v in together.items()}) <= 1e-5


def test_the_original_depends_on_padding(build, texts):
    model = build(compat="original", norm="post")
    ids = texts(2, 9)
    assert largest_difference(*(embeddings(model(*pad(ids, 0, n))) for n in (0, 128))) > 0.1


def test_a_row_of_padding_alone_is_finite(build, texts):
    model = build(hidden_dropout=0.0).train()
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1] = 0
    output = model(texts(3, 9), mask)
    sum(value.sum() for value in embeddings(output).values()).backward()
    assert all(value.isfinite().all() for value in output.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    without = model(texts(3, 9)[[0, 2]])
    torch.testing.assert_close(output.semantic[[0, 2]], without.semantic, rtol=0, atol=1e-5)


def test_every_parameter_has_a_gradient(build, texts):
    model = build(fractal_depth=2, type_vocab_size=2, embedding_norm=True)
    output = model(texts(3, 9))
    sum((value.float() ** 3).sum() for value in embeddings(output).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_prefixes_get_gradients(build, texts):
    model = build()
    F.normalize(model(texts(3, 9)).semantic[:, :32]).pow(3).sum().backward()
    gradient = model.heads.semantic.output.weight.grad
    assert (gradient[:32].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(build, texts, dropout):
    gradients = []
    for checkpoints in (False, True):
        model = build(hidden_dropout=dropout).train()
        if checkpoints:
            model.activation_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.encoder.layers)
        torch.manual_seed(1)
        loss = model(texts(3, 9)).ranking.pow(3).sum()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.encoder.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_compiles_as_one_graph(build, texts, padded):
    model = build()
    layer = model.encoder.layers[0]
    hidden = model.encoder.embeddings(texts(2, 9), None, None).detach()
    mask = pad(texts(2, 6), 0, 3)[1].bool() if padded else None
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, mask), layer(hidden, mask))


@pytest.mark.parametrize("cast", ["autocast", "weights"])
def test_bfloat16_stays_close(build, texts, cast):
    model = build(initializer_range=0.02)
    ids, mask = pad(texts(4, 9), 2, 30)
    exact = embeddings(model(ids, mask))
    if cast == "weights":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        output = model(ids, mask)
    for name in EMBEDDINGS:
        assert output[name].dtype == torch.float32
        assert F.cosine_similarity(output[name], exact[name]).min() >= 0.99


def test_float16_is_finite_with_padding(build, texts):
    model = build().half()
    output = model(*pad(texts(4, 9), 2, 30))
    assert all(value.isfinite().all() for value in output.values())


def test_initial_weights_are_small_where_they_write_to_the_residual_stream(build):
    model = build(initializer_range=0.02)
    layer = model.encoder.layers[0]
    assert model.encoder.embeddings.tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for output in (layer.attention.o_proj, layer.feedforward.down_proj):
        assert output.weight.std().item() == pytest.approx(0.01, rel=0.1)  # 2 layers


def test_the_original_starts_as_pytorch_does(build):
    model = build(compat="original")
    assert model.encoder.embeddings.tokens.weight.std().item() == pytest.approx(1, rel=0.1)
    assert model.heads.semantic.output.weight.abs().max().item() <= 64**-0.5
    assert model.heads.ranking.basis.std().item() == pytest.approx(0.02, rel=0.1)


def test_texts_that_are_too_long_are_refused(build, texts):
    model = build(max_position_embeddings=8, max_length=8)
    message = "at most max_position_embeddings=8 tokens per text, got 9; truncate"
    for mask in (None, pad(texts(1, 9), 0, 0)[1]):
        with pytest.raises(ValueError, match=message):
            model(texts(1, 9), mask)
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape \(1, 9\)"):
        model(texts(1, 9), torch.ones(1, 8))


def test_the_encoder_alone_keeps_the_hidden_states(build, texts):
    model = build()
    encoder = model.encoder_only()
    assert encoder.encoder is model.encoder
    assert encoder.head_dims() == {}
    assert not any(parameter.is_meta for parameter in encoder.parameters())
    ids = texts(2, 5)
    assert torch.equal(encoder(ids).last_hidden_state, model(ids).last_hidden_state)


def test_without_a_semantic_head_the_embedding_is_the_pooled_state(build, texts):
    model = build(semantic_head="none")
    output = model(texts(3, 5))
    assert torch.equal(output.semantic, torch.nn.functional.normalize(output.pooled, dim=-1))
    assert not list(model.heads.semantic.parameters())
    assert "heads.semantic.output" not in model.head_names()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(parameters_by_part(model.config).values())


def test_gates_of_every_layer_can_be_watched(build):
    gates = build().gate_values()
    assert list(gates) == ["encoder.layers.0", "encoder.layers.1"]
    assert torch.allclose(gates["encoder.layers.0"], torch.tensor([0.1, 0.02]))
    assert not build(use_spectral=False, fractal_depth=0).gate_values()
