import pytest
import torch
from torch.optim import AdamW
from transformers import BertConfig, BertModel

from spectral_lightning.losses import (
    CosineTemperature,
    CrossEntropy,
    LearnableTemperature,
    Matryoshka,
    SpectraLoss,
)
from spectral_lightning.tasks import SentenceEmbedding, load_sentence_encoder
from tests.tasks.embedding_cases import BERT, loader, make_batch, make_task, pairs_data, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
TEXTS = ["a matrix", "the value of a norm"]


@pytest.fixture
def saved(make_trainer, tmp_path):
    """Trains a task for two steps and saves it; returns the path."""

    def save(task, **settings):
        trainer = make_trainer(max_steps=2, limit_val_batches=0)
        trainer.fit(task, pairs_data(tmp_path, **settings))
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        return tmp_path / "run.ckpt"

    return save


def model_of(kind, folder):
    if kind == "own":
        return None
    BertModel(BertConfig(**BERT)).save_pretrained(folder / "bert")
    return SentenceEmbedding({kind: str(folder / "bert"), "retrieval_dim": 32}).model


@pytest.mark.parametrize("kind", ["own", "backbone", "bert"])
def test_a_checkpoint_alone_gives_the_vectors_of_the_task(saved, tmp_path, kind):
    task = make_task(model_of(kind, tmp_path))
    path = saved(task)
    if kind != "own":
        (tmp_path / "bert").rename(tmp_path / "gone")
    expected = task.encode(TEXTS)
    assert abs(load_sentence_encoder(path).encode(TEXTS) - expected).max() < 1e-6
    loaded = SentenceEmbedding.load_from_checkpoint(path)
    assert abs(loaded.encode(TEXTS) - expected).max() < 1e-6
    assert loaded.max_length == task.max_length == 16
    assert weights(loaded).keys() == weights(task).keys()


@pytest.mark.parametrize(
    "temperature",
    [LearnableTemperature(start=0.1, lowest=0.05), CosineTemperature(start=0.2, end=0.1)],
    ids=["learned", "cosine"],
)
def test_loss_temperature_and_heads_come_from_the_checkpoint(saved, temperature):
    loss = SpectraLoss(
        ranking_weight=0.5,
        semantic_dims=Matryoshka(dims=(64, 16)),
        cross_entropy=CrossEntropy(transform="stablemax"),
    )
    settings = {"without": ["anchor"], "eval_heads": ["retrieval"], "temperature": temperature}
    task = make_task(loss=loss, **settings)
    loaded = SentenceEmbedding.load_from_checkpoint(saved(task))
    assert loaded.loss == task.loss
    assert not loaded.loss.anchor
    assert loaded.eval_heads == ("retrieval",)
    assert loaded.temperature.validation == temperature.validation
    if isinstance(temperature, LearnableTemperature):
        assert loaded.temperature.settings() == temperature.settings()
        assert loaded.temperature().item() == temperature().item()
    else:
        assert loaded.temperature == temperature


def test_arguments_go_before_the_checkpoint(saved):
    path = saved(make_task())
    loaded = SentenceEmbedding.load_from_checkpoint(path, eval_heads=["anchor"], chunk_size=3)
    assert loaded.eval_heads == ("anchor",)
    assert loaded.chunk_size == 3


def test_another_size_is_refused(make_trainer, saved, tmp_path):
    path = saved(make_task())
    other = make_task({"hidden_size": 32})
    with pytest.raises(ValueError, match=r"The checkpoint must fit the model, but .* tensors"):
        make_trainer(max_steps=3).fit(other, pairs_data(tmp_path), ckpt_path=path)


def test_data_with_other_tokens_are_refused(make_trainer, saved, tmp_path):
    path = saved(make_task())
    data = pairs_data(tmp_path, vocab_size=300)
    with pytest.raises(ValueError, match="tokenizer must be the one the model was trained with"):
        make_trainer().validate(make_task(), data, ckpt_path=path, verbose=False)
    loaded = SentenceEmbedding.load_from_checkpoint(path)
    with pytest.raises(ValueError, match="tokenizer must be the one the model was trained with"):
        make_trainer().validate(loaded, pairs_data(tmp_path, vocab_size=300), verbose=False)


def test_a_damaged_file_is_named_as_such(make_trainer, saved, tmp_path):
    path = saved(make_task())
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="A checkpoint must be complete, but"):
        make_trainer(max_steps=3).fit(make_task(), pairs_data(tmp_path), ckpt_path=path)


def test_a_checkpoint_without_a_tokenizer_can_not_be_used_alone(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_task(), loader(make_batch(4)))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="must hold an embedding model and its tokenizer to be u"):
        load_sentence_encoder(tmp_path / "run.ckpt")
    loaded = SentenceEmbedding.load_from_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="`encoder` needs a tokenizer"):
        loaded.encode(TEXTS)


def test_a_checkpoint_to_resume_holds_three_numbers_per_parameter(saved):
    task = make_task(optimizer=AdamW)
    path = saved(task)
    num_weights = sum(weight.numel() for weight in task.model.parameters())
    held = torch.load(path, weights_only=True)
    tensors = [
        *held["state_dict"].values(),
        *(t for s in held["optimizer_states"][0]["state"].values() for t in s.values()),
    ]
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    assert num_bytes == pytest.approx(12 * num_weights, rel=0.01)
    assert 12 * num_weights < path.stat().st_size < 13.5 * num_weights
