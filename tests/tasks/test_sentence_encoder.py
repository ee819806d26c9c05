import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from spectral_lightning.tasks.embedding_statistics import spearman
from spectral_lightning.tasks.mteb_encoder import MTEBEncoder
from spectral_lightning.tasks.sentence_encoder import SentenceEncoder, evaluating

WORDS = ("cat", "dog", "kitten", "puppy", "car", "truck", "the", "a", "runs", "sleeps")
TEXTS = ["the cat sleeps", "a dog", "the truck runs", "a kitten", "car", "the puppy runs a car"]


class Encoder(nn.Module):
    """The mean of the word vectors; related words have related vectors."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(len(WORDS) + 3, 16)
        weights = torch.randn(len(WORDS) + 3, 16, generator=generator)
        for word, relative in ((5, 3), (6, 4), (8, 7)):
            weights[word] = weights[relative] + 0.1 * weights[word]
        self.embed.weight.data = weights
        self.dropout = nn.Dropout(0.5)
        self.batches = []

    def head_dims(self):
        return {"semantic": (16, 8), "retrieval": (4,)}

    def forward(self, input_ids, attention_mask=None):
        self.batches.append(tuple(input_ids.shape))
        mask = attention_mask.unsqueeze(-1)
        hidden = self.dropout(self.embed(input_ids)) * mask
        pooled = hidden.sum(1) / mask.sum(1)
        self.dtype = (pooled @ pooled.T).dtype
        return SimpleNamespace(
            semantic=F.normalize(pooled, dim=-1), retrieval=F.normalize(pooled[:, :4], dim=-1)
        )


@pytest.fixture
def tokenizer():
    vocab = {word: index for index, word in enumerate(("[PAD]", "[CLS]", "[SEP]", *WORDS))}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")


@pytest.fixture
def make_encoder(tokenizer):
    def make(max_length=16, **settings):
        return SentenceEncoder(Encoder(), tokenizer, max_length, **settings)

    return make


def test_vectors_come_in_the_order_of_the_texts_whatever_the_batch(make_encoder):
    encoder = make_encoder()
    together = encoder.encode(TEXTS, batch_size=2)
    assert isinstance(together, np.ndarray)
    assert together.shape == (6, 16)
    assert together.dtype == np.float32
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(encoder.encode(text), vector, atol=1e-6)
    lengths = [length for _, length in encoder.model.batches[:3]]
    assert lengths == [7, 5, 4]  # texts of one length are in one batch


def test_prefixes_are_normalised_again_and_heads_are_chosen(make_encoder):
    encoder = make_encoder(dim=8)
    full = encoder.encode(TEXTS, dim=16)
    prefix = full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode(TEXTS), prefix, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(TEXTS, truncate_dim=8), prefix, atol=1e-6)
    raw = encoder.encode(TEXTS, normalize_embeddings=False)
    np.testing.assert_allclose(raw, full[:, :8], atol=1e-6)
    assert encoder.encode(TEXTS, head="retrieval").shape == (6, 4)
    with pytest.raises(ValueError, match=r"`head` must be one of \['retrieval', 'semantic'\]"):
        encoder.encode(TEXTS, head="ranking")
    with pytest.raises(ValueError, match=r"`dim` must be in \[1, 16\] for head 'semantic', got 17"):
        encoder.encode(TEXTS, dim=17)
    with pytest.raises(ValueError, match=r"`dim` and `truncate_dim` must be equal .* got 8 and 4"):
        encoder.encode(TEXTS, dim=8, truncate_dim=4)


def test_results_come_as_asked(make_encoder):
    encoder = make_encoder()
    array = encoder.encode(TEXTS, show_progress_bar=True)
    tensor = encoder.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert not tensor.requires_grad
    listed = encoder.encode(TEXTS, convert_to_numpy=False, device="cpu")
    assert isinstance(listed, list)
    np.testing.assert_array_equal(torch.stack(listed).numpy(), array)
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert encoder.encode([]).shape == (0, 16)
    prompted = encoder.encode_query(["cat"], prompt="the ")
    np.testing.assert_allclose(prompted, encoder.encode_document(["the cat"]), atol=1e-6)


def test_every_module_is_left_in_its_own_mode(make_encoder):
    encoder = make_encoder()
    encoder.model.train()
    encoder.model.embed.eval()
    np.testing.assert_array_equal(encoder.encode(TEXTS), encoder.encode(TEXTS))  # no dropout
    modes = [module.training for module in encoder.model.modules()]
    assert modes == [True, False, True]

    def fail():
        with evaluating(encoder.model):
            assert not encoder.model.dropout.training
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert [module.training for module in encoder.model.modules()] == modes


def test_texts_that_are_too_long_are_cut_before_the_last_token_and_said_once(make_encoder):
    encoder = make_encoder(max_length=5)
    with pytest.warns(UserWarning, match="1 of 6 texts had more than `max_length` 5 tokens"):
        cut = encoder.encode(TEXTS)
    assert encoder.num_truncated == 1
    np.testing.assert_allclose(cut[5], encoder.encode("the puppy runs"), atol=1e-6)
    encoder.encode(TEXTS)  # silent; a warning is an error in these tests
    assert encoder.num_truncated == 2


def test_autocast_computes_in_half_precision_and_returns_float32(make_encoder):
    encoder = make_encoder(autocast=torch.bfloat16)
    half = encoder.encode(TEXTS)
    assert encoder.model.dtype == torch.bfloat16
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, make_encoder().encode(TEXTS), atol=1e-2)


def test_what_cannot_be_encoded_is_refused(make_encoder):
    encoder = make_encoder()
    with pytest.raises(ValueError, match=r"must not be empty or blank, got 2 .* at position 1;"):
        encoder.encode(["cat", " ", ""])
    with pytest.raises(ValueError, match=r"`prompt_name` must be None.* got 'query'"):
        encoder.encode(["cat"], prompt_name="query")
    with pytest.raises(ValueError, match="`precision` 'float32', got 'token_embeddings' and"):
        encoder.encode(["cat"], output_value="token_embeddings")
    with pytest.raises(ValueError, match="`batch_size` must be >= 1, got 0"):
        encoder.encode(["cat"], batch_size=0)
    with pytest.raises(ValueError, match="`head` must be one of"):
        make_encoder(head="ranking")


def test_similarities_are_cosines_of_arrays_and_tensors(make_encoder):
    encoder = make_encoder()
    first = np.array([[3.0, 0.0], [1.0, 1.0]])
    second = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    root = 2**-0.5
    expected = torch.tensor([[1.0, 0.0], [root, root]])
    torch.testing.assert_close(encoder.similarity(first, second), expected)
    torch.testing.assert_close(encoder.similarity_pairwise(first, second), expected.diagonal())
    assert encoder.similarity(first[0], list(second)).shape == (1, 2)


def test_evaluators_of_sentence_transformers_run_on_it(make_encoder):
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    encoder = make_encoder()
    pairs = evaluation.EmbeddingSimilarityEvaluator(
        ["cat", "dog", "car", "cat"],
        ["kitten", "puppy", "truck", "truck"],
        [0.9, 0.9, 0.8, 0.0],
        truncate_dim=8,
    )(encoder)
    cosines = encoder.similarity_pairwise(
        encoder.encode(["cat", "dog", "car", "cat"], dim=8),
        encoder.encode(["kitten", "puppy", "truck", "truck"], dim=8),
    )
    assert cosines[3] < cosines[:3].min()
    expected = spearman(cosines, torch.tensor([0.9, 0.9, 0.8, 0.0])).item()
    assert pairs["spearman_cosine"] == pytest.approx(expected)
    retrieval = evaluation.InformationRetrievalEvaluator(
        {"q1": "cat", "q2": "car"},
        {"d1": "the kitten", "d2": "the truck", "d3": "the puppy"},
        {"q1": {"d1"}, "q2": {"d2"}},
        show_progress_bar=False,
    )(encoder)
    assert retrieval["cosine_recall@1"] == 1.0
    triplets = evaluation.TripletEvaluator(["cat", "car"], ["kitten", "truck"], ["truck", "dog"])
    assert triplets(encoder)["cosine_accuracy"] == 1.0
    kept = encoder.model_card_data.evaluations
    assert [type(found.evaluator).__name__ for found in kept] == [
        "EmbeddingSimilarityEvaluator",
        "InformationRetrievalEvaluator",
        "TripletEvaluator",
    ]
    assert kept[2].metrics["cosine_accuracy"] == 1.0


def test_mteb_gets_all_texts_of_its_loader(make_encoder):
    model = MTEBEncoder(make_encoder(), "us/tiny")
    loader = [{"text": TEXTS[:4], "title": list("abcd")}, {"text": TEXTS[4:]}]
    vectors = model.encode(
        loader,
        task_metadata=None,
        hf_split="test",
        hf_subset="default",
        prompt_type=None,
        batch_size=4,
        convert_to_tensor=True,
    )
    np.testing.assert_allclose(vectors, model.encoder.encode(TEXTS), atol=1e-6)
    assert model.similarity(vectors, vectors).shape == (6, 6)
    torch.testing.assert_close(model.similarity_pairwise(vectors, vectors), torch.ones(6))


def test_mteb_may_have_blank_texts_which_are_the_special_tokens_alone(make_encoder):
    model = MTEBEncoder(make_encoder(dim=8), "us/tiny")
    encoder = model.encoder
    # Here a space is a token too, which must not get in.
    encoder.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    encoder.model.train()
    vectors = model.encode([{"text": ["cat", ""]}, {"text": [" \n", "a dog"]}], batch_size=3)
    cls_sep = encoder.model.embed.weight[1:3].mean(0)
    special = F.normalize(F.normalize(cls_sep, dim=-1)[:8], dim=-1).detach().numpy()
    expected = [*encoder.encode(["cat"]), special, special, *encoder.encode(["a dog"])]
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert vectors.dtype == np.float32
    assert encoder.model.dropout.training
    np.testing.assert_allclose(model.encode([{"text": [""]}]), [special], atol=1e-6)


@pytest.mark.parametrize("has_space_token", [True, False])
def test_blank_text_without_special_tokens_is_a_space_or_else_zeros(
    make_encoder, tokenizer, has_space_token
):
    words = tokenizer.backend_tokenizer
    words.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    if has_space_token:  # unknown to the vocabulary, so the token 0
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = MTEBEncoder(make_encoder(), "us/tiny")
    vectors = model.encode([{"text": ["cat", "", "  "]}])
    space = F.normalize(model.encoder.model.embed.weight[0], dim=-1).detach().numpy()
    expected = space if has_space_token else np.zeros(16)
    np.testing.assert_allclose(vectors[1:], [expected, expected], atol=1e-6)
    np.testing.assert_allclose(vectors[:1], model.encoder.encode(["cat"]), atol=1e-6)


def test_mteb_is_imported_only_for_the_description(make_encoder, monkeypatch):
    model = MTEBEncoder(make_encoder(), "us/tiny", license="apache-2.0")
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ImportError, match="needs mteb >= 2"):
        _ = model.mteb_model_meta
    for name in ("mteb", "mteb.models", "mteb.models.model_meta"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mteb.models.model_meta"].ModelMeta = SimpleNamespace
    meta = model.mteb_model_meta
    assert (meta.name, meta.embed_dim, meta.license) == ("us/tiny", 16, "apache-2.0")
    assert meta.n_parameters == 13 * 16
    with pytest.raises(ValueError, match="`name` must be 'organization/model', got 'tiny'"):
        MTEBEncoder(make_encoder(), "tiny")
