import pytest
import torch
from transformers import BertConfig, BertModel

from spectral_lightning.losses import SpectraLoss
from spectral_lightning.models.spectra import SpectraConfig, SpectraModel
from spectral_lightning.tasks.embedding_models import embedding_model
from tests.tasks.embedding_cases import BERT, TINY

ALL = SpectraLoss().required_heads()


def build(model, heads=ALL, *, spectral_branch=True):
    torch.manual_seed(0)
    return embedding_model(model, heads, spectral_branch=spectral_branch)


def trainable(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.fixture
def bert(tmp_path):
    """The folder of a BERT in the shape of the tiny preset."""
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def test_a_size_has_the_heads_that_are_trained_and_no_others():
    model = build(TINY, ("semantic", "retrieval", "spectral"))
    assert set(model.head_dims()) == {"semantic", "retrieval", "ranking"}
    assert set(build(TINY, ("ranking",)).head_dims()) == {"ranking"}
    assert model.training


@pytest.mark.parametrize("heads", [ALL, ("semantic", "spectral"), ("ranking",), ("retrieval",)])
def test_every_parameter_that_can_be_trained_has_a_gradient(heads):
    for given in (TINY, SpectraModel(SpectraConfig.preset("tiny", vocab_size=400))):
        model = build(given, heads)
        output = model(torch.randint(5, 400, (4, 6)))
        sum(output[head].pow(3).sum() for head in heads).backward()
        found = {name for name, weight in model.named_parameters() if weight.grad is not None}
        assert found == trainable(model)


def test_a_folder_of_this_library_is_loaded_with_its_weights(tmp_path):
    saved = build(TINY).eval()
    saved.save_pretrained(tmp_path / "model")
    loaded = build(str(tmp_path / "model")).eval()
    ids = torch.randint(5, 400, (2, 6))
    assert torch.equal(loaded(ids).ranking, saved(ids).ranking)


def test_a_folder_loses_the_parts_that_are_left_out(tmp_path):
    build(TINY).save_pretrained(tmp_path / "model")
    settings = {"folder": str(tmp_path / "model"), "hidden_dropout": 0.25}
    model = build(settings, ("semantic",), spectral_branch=False)
    assert set(model.head_dims()) == {"semantic"}
    assert not [name for name, _ in model.named_parameters() if ".spectral." in name]
    assert model.config.hidden_dropout == 0.25


@pytest.mark.parametrize("as_dict", [False, True])
def test_any_encoder_becomes_the_backbone(bert, as_dict):
    model = build({"backbone": bert, "semantic_dims": [64, 32]} if as_dict else bert)
    assert isinstance(model.encoder, BertModel)
    assert model.training
    assert model.encoder.training


def test_a_bert_can_be_warm_started_from(bert):
    model = build({"bert": bert, "spectral_dim": 8})
    reference = BertModel.from_pretrained(bert).eval()
    ids = torch.randint(5, 400, (2, 6))
    expected = reference(ids).last_hidden_state
    torch.testing.assert_close(model.eval()(ids).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("M999", "`model` must be one of the sizes M456, M600.*got 'M999'"),
        ({"preset": "M999"}, "`preset` must be one of M456.*got 'M999'"),
        ({"preset": "tiny", "hiden_size": 8}, "settings of SpectraConfig, got 'hiden_size'"),
        ({"hiden_size": 8}, "settings of SpectraConfig, got 'hiden_size'"),
        ({"preset": "tiny", "bert": "x/y"}, "must have one of preset, .* got preset, bert"),
        ({"preset": "tiny", "num_attention_heads": 3}, "`hidden_size` must be a multiple of"),
    ],
)
def test_a_model_that_does_not_exist_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        build(model)


def test_a_name_that_can_not_be_had_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for model in ("owner/no-such-model", {"bert": "owner/no-such-model"}):
        with pytest.raises(OSError, match="Without a network, fetch it elsewhere with `hf downl"):
            build(model)


def test_a_given_model_without_a_trained_head_is_refused():
    model = SpectraModel(SpectraConfig.preset("tiny", use_anchor=False))
    with pytest.raises(ValueError, match="must have the heads that the loss trains, but lacks anc"):
        build(model)


def test_a_given_model_with_a_branch_that_is_left_out_is_refused():
    model = SpectraModel(SpectraConfig.preset(name="tiny", vocab_size=50))
    with pytest.raises(ValueError, match="`model` must be built with use_spectral=False"):
        build(model, spectral_branch=False)
