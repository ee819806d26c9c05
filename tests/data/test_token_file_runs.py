"""Training on a file of tokens: what is logged, and how a run goes on."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from spectral_lightning.models import GPT
from spectral_lightning.tasks import LanguageModeling, load_language_model
from tests.data.token_file_cases import RHYME, ids

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Models of a few numbers are slower with more threads, many times so on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def make_task(data):
    torch.manual_seed(0)
    gpt = GPT(depth=1, head_dim=16, vocab_size=data.vocab_size, sequence_len=data.sequence_len)
    return LanguageModeling(gpt)


class Plain(pl.LightningModule):
    """Knows nothing of vocabularies."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        pass


def test_language_model_trains_on_words(make_words, make_trainer):
    data = make_words("the cat saw the dog and ran\n" * 40, ready=False)
    before = make_trainer().validate(make_task(data), data, verbose=False)[0]["valid/loss"]
    trainer = make_trainer(max_epochs=2)
    trainer.fit(make_task(data), data)
    assert before == pytest.approx(math.log(data.vocab_size), rel=0.1)  # nats per word
    assert trainer.callback_metrics["valid/loss"] < before - 0.5
    assert math.isfinite(trainer.callback_metrics["valid/bpb"])


@pytest.mark.parametrize("unit", ["word", "char"])
def test_bits_per_byte_are_those_of_the_text(make_words, make_trainer, unit):
    data = make_words(unit=unit, vocabulary="all", text=RHYME.replace("<unk>", "caf\u00e9"))
    metrics = make_trainer().validate(make_task(data), data, verbose=False)[0]
    predicted = ids(data, "valid")[1:]
    num_bytes = len(data.decode(predicted).encode()) + (unit == "word")  # the last word's space
    bits = metrics["valid/loss"] * len(predicted) / math.log(2)
    assert metrics["valid/bpb"] == pytest.approx(bits / num_bytes)


def test_integers_have_a_loss_but_no_bits_per_byte(make_words, make_trainer):
    data = make_words(" ".join(str(number % 7) for number in range(100)))
    metrics = make_trainer().validate(make_task(data), data, verbose=False)[0]
    assert math.isfinite(metrics["valid/loss"])
    assert "valid/bpb" not in metrics


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("step", [3, 6])
def test_run_resumes_bit_exactly_inside_an_epoch(make_words, make_trainer, tmp_path, step, used):
    saves = pl.callbacks.ModelCheckpoint(
        tmp_path / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    settings = {"max_epochs": 2, "limit_val_batches": 0}  # of 5 steps
    whole, data = make_task(make_words(ready=False)), make_words(ready=False)
    trainer = make_trainer(callbacks=[saves], enable_checkpointing=True, **settings)
    trainer.fit(whole, data)
    assert trainer.global_step == 10
    resumed, data = make_task(data), data if used else make_words(ready=False)
    path = tmp_path / "checkpoints" / f"step={step}.ckpt"
    make_trainer(**settings).fit(resumed, data, ckpt_path=path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_evaluating_a_checkpoint_does_not_move_the_training_position(
    make_words, make_trainer, tmp_path
):
    data = make_words()
    trainer = make_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(Plain(), data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    data = make_words()
    make_trainer().validate(Plain(), data, ckpt_path=tmp_path / "run.ckpt", verbose=False)
    batches = [batch.tolist() for batch in make_words().train_dataloader()]
    assert [batch.tolist() for batch in data.train_dataloader()] == batches


def test_checkpoint_brings_its_vocabulary(make_words, make_trainer, tmp_path):
    data = make_words()
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(make_task(data), data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    model, tokenizer, _ = load_language_model(tmp_path / "run.ckpt")
    assert tokenizer.get_vocab() == data.tokenizer.get_vocab()
    assert model(torch.tensor([tokenizer.encode("the unicorn saw").ids])).shape[1] == 3


@pytest.mark.parametrize("plain", [True, False])
def test_run_refuses_to_go_on_with_another_vocabulary(make_words, make_trainer, tmp_path, plain):
    def task(data):
        return Plain() if plain else make_task(data)

    data, path = make_words(), tmp_path / "run.ckpt"
    trainer = make_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(task(data), data)
    trainer.save_checkpoint(path)
    settings = {"text": RHYME.replace("owl", "cow").replace("cats", "hens"), "name": "other.txt"}
    other = make_words(**settings, ready=False)
    message = (
        r"`source` must have the vocabulary of the checkpoint, got .*other.txt, whose 7 tokens"
        if plain
        else "The data module's tokenizer must be the one the model was trained with"
    )
    for run in (make_trainer(max_steps=4).fit, make_trainer().validate):
        with pytest.raises(ValueError, match=message):
            run(task(data), other, ckpt_path=path)
    saved = torch.load(path, weights_only=True)["TokenFileDataModule"]["vocabulary"]
    (tmp_path / "saved.json").write_text(saved)
    other = make_words(**settings, ready=False, tokenizer=str(tmp_path / "saved.json"))
    make_trainer(max_steps=4, limit_val_batches=0).fit(task(data), other, ckpt_path=path)
    assert other.tokenizer.get_vocab() == data.tokenizer.get_vocab()
