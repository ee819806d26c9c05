"""What evaluation says is what one computes from the vectors of the texts."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from spectral_lightning.data import PairsSource
from spectral_lightning.losses import Matryoshka, SpectraLoss
from spectral_lightning.tasks.embedding_statistics import spearman
from tests.data.pairs_cases import SCORED, pair, pairs
from tests.tasks.embedding_cases import loader, make_batch, make_task, pairs_data

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tokens and were cut; this is said once"),
    # All texts are alike to a model that has learned nothing.
    pytest.mark.filterwarnings("ignore:The correlation at dimensions"),
]

TEXTS = [pair(number)["anchor"] for number in range(24)]


@pytest.fixture
def tokenizer(tmp_path):
    data = pairs_data(tmp_path)
    data.prepare_data()
    data.setup("fit")
    return data.tokenizer


def validated(make_trainer, task, data):
    results = make_trainer().validate(task, data, verbose=False)
    return {name: value for result in results for name, value in result.items()}


def test_scores_that_are_the_cosines_give_a_spearman_of_one(make_trainer, tmp_path, tokenizer):
    task = make_task()
    validated(make_trainer, task, pairs_data(tmp_path, tokenizer=tokenizer))
    vectors = task.encode(TEXTS, convert_to_tensor=True)
    cosines = (vectors[::2] * vectors[1::2]).sum(1)
    for sign, expected in ((1, 1.0), (-1, -1.0)):
        rows = zip(TEXTS[::2], TEXTS[1::2], (sign * cosines).tolist(), strict=True)
        source = PairsSource(records=list(rows), score_range=(-1.0, 1.0))
        data = pairs_data(tmp_path, tokenizer=tokenizer, sts={"known": source})
        found = validated(make_trainer, task, data)
        assert found["valid/sts"] == pytest.approx(expected)
        assert found["valid/known/semantic/spearman_64"] == pytest.approx(expected)


def test_numbers_are_those_of_the_encoded_texts(make_trainer, tmp_path):
    sts = PairsSource(records=SCORED)
    source = PairsSource(records=pairs(50))
    data = pairs_data(tmp_path, source, sts={"own": sts}, valid_fraction=0.4, eval_batch_size=7)
    task = make_task()
    found = validated(make_trainer, task, data)
    for head, dim in (("semantic", 64), ("semantic", 32), ("retrieval", 32)):
        encoder = task.encoder(head, dim)
        first, second = (
            torch.from_numpy(encoder.encode([row[column] for row in SCORED])) for column in (0, 1)
        )
        expected = spearman((first * second).sum(1), torch.tensor([row[2] for row in SCORED]))
        name = f"valid/own/{head}/spearman_{dim}"
        assert found[name] == pytest.approx(expected.item(), abs=1e-4), name
    assert found["valid/sts"] == found["valid/own/semantic/spearman_64"]
    assert found["valid/recall@10"] == found["valid/pairs/semantic/recall@10_64"]


def test_recall_is_that_of_the_whole_corpus(make_trainer, tmp_path):
    records = pairs(12, first=200)
    data = pairs_data(
        tmp_path, valid_sources=[PairsSource(records=records)], eval_batch_size=5, max_length=32
    )
    task = make_task()
    found = validated(make_trainer, task, data)
    questions = task.encode([row["anchor"] for row in records], convert_to_tensor=True)
    answers = task.encode([row["positive"] for row in records], convert_to_tensor=True)
    scores = questions @ answers.T
    places = (scores > scores.diagonal()[:, None] + 1e-6).sum(1)
    assert found["valid/pairs/semantic/corpus_size"] == 12
    expected = (places < 5).float().mean().item()
    assert found["valid/pairs/semantic/recall@5_64"] == pytest.approx(expected, abs=1e-6)


def test_validation_leaves_the_model_in_training_mode(make_trainer, tmp_path):
    task = make_task()
    modes = []

    class Watch(pl.Callback):
        def on_before_backward(self, *_):
            modes.append(all(module.training for module in task.model.modules()))

    trainer = make_trainer(
        max_steps=3, val_check_interval=1, check_val_every_n_epoch=None, callbacks=[Watch()]
    )
    trainer.fit(task, pairs_data(tmp_path))
    assert modes == [True] * 3


def test_test_sets_have_no_part_in_what_is_selected_on(make_trainer, tmp_path):
    settings = {"sts": {"own": PairsSource(records=SCORED[:20])}}
    upside_down = [(a, b, 1 - score) for a, b, score in SCORED[:20]]
    data = pairs_data(tmp_path, **settings, test_sts={"other": PairsSource(records=upside_down)})
    task, trainer = make_task(), make_trainer(max_steps=1, val_check_interval=1)
    trainer.fit(task, data)
    selected = trainer.callback_metrics
    assert not [name for name in selected if name.startswith("test/") or "other" in name]
    assert selected["valid/sts"] == selected["valid/own/semantic/spearman_64"]
    (*found,) = trainer.test(task, data, verbose=False)
    numbers = {name: value for one in found for name, value in one.items()}
    assert numbers["test/sts"] == pytest.approx(-selected["valid/sts"].item(), abs=1e-4)
    assert not [name for name in numbers if name.startswith("valid/")]


def test_loss_of_validation_is_taken_at_a_fixed_temperature(make_trainer, tmp_path):
    data = pairs_data(tmp_path, batch_size=20, valid_fraction=0.3)
    found = validated(make_trainer, task := make_task(without=["spectral"]), data)
    batches = list(data.val_dataloader()[0])
    with torch.no_grad():
        values = [
            (len(b["text_ids"]), task.loss(*task.eval().represent(b), temperature=0.05)[0].item())
            for b in batches
        ]
    expected = sum(size * value for size, value in values) / sum(size for size, _ in values)
    assert found["valid/loss"] == pytest.approx(expected, rel=1e-4)


def test_prediction_gives_the_vectors_of_both_columns(make_trainer, tmp_path):
    data, task = pairs_data(tmp_path), make_task()
    (rows, *_) = make_trainer().predict(task, data)
    assert rows.shape == (4, 2, 64)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(4, 2))


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_text_has_one_vector_alone_in_a_batch_and_in_chunks(make_trainer, tmp_path, chunk_size):
    data, task = pairs_data(tmp_path), make_task(chunk_size=chunk_size)
    make_trainer(max_steps=2, limit_val_batches=0).fit(task, data)
    together = task.encode(TEXTS, batch_size=24)
    alone = [task.encode(text) for text in TEXTS[:5]]
    for single, row in zip(alone, together, strict=False):
        assert abs(single - row).max() < 1e-5
    assert task.training


def test_evaluation_without_a_data_module_says_what_it_needs(make_trainer):
    batches = loader(make_batch(4))
    with pytest.raises(ValueError, match="Evaluation needs a data module that says in `eval_sets`"):
        make_trainer().validate(make_task(), batches, verbose=False)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_measuring_alone_prints_a_table_with_intervals_and_chance(
    make_trainer, tmp_path, capsys, stage
):
    task, data = make_task(eval_heads=["anchor"]), pairs_data(tmp_path, valid_fraction=0.4)
    getattr(make_trainer(), stage)(task, data, verbose=False)
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("| anchor | 16 | recall@10 |"))
    result = task.results["pairs"]["anchor"]
    assert f"{result.by_dim[16].recall[10].item():.4f}" in row
    assert f"{result.chance.recall[10].item():.4f}" in row
    assert " to " in row


def test_the_loss_of_validation_is_that_of_all_prefixes_at_any_step():
    nested = Matryoshka(dims=(64, 32), num_dims_per_step=1)
    task, batch, losses = make_task(loss=SpectraLoss(semantic_dims=nested)), make_batch(6), []
    columns = task.represent(batch)
    for step in (0, 1):
        task._trainer = SimpleNamespace(global_step=step, world_size=1)
        losses.append(task.eval_loss(columns, batch))
    assert torch.equal(*losses)
