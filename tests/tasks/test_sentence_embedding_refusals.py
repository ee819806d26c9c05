"""What a task that can not work says, and when."""

import pytest
import torch

from spectral_lightning.tasks import SentenceEmbedding
from tests.tasks.embedding_cases import TINY, loader, make_batch, make_task, pairs_data

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "M999"}, r"`model` must be one of the sizes M456, .*got 'M999'"),
        ({"without": ["ancor"]}, r"`without` must be one of anchor, .*got 'ancor'"),
        ({"eval_heads": ["semantics"]}, r"`eval_heads` must be out of .* got \['semantics'\]"),
        (
            {"eval_heads": []},
            r"`eval_heads` must be out of the model's heads .* got \[\]",
        ),
        ({"without": ["anchor"], "eval_heads": ["anchor"]}, r"`eval_heads` must be out of"),
        ({"chunk_size": 0}, "`chunk_size` must be >= 1, auto or None, got 0"),
        ({"recompute": True}, "`recompute` needs a number as `chunk_size`, got auto"),
        ({"warmup_steps": -1}, "`warmup_steps` must be >= 0, got -1"),
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SentenceEmbedding(**{"model": TINY} | settings)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"vocab_size": 300}, r"The model's `vocab_size` must be at least 3\d\d, that of the data"),
        (
            {"max_position_embeddings": 12, "max_length": 12},
            r"`max_position_embeddings` must be at least 16, that of the data, got 12",
        ),
    ],
    ids=["vocabulary", "length"],
)
def test_a_model_smaller_than_the_data_is_refused_before_the_first_step(
    make_trainer, tmp_path, model, message
):
    with pytest.raises(ValueError, match=message):
        make_trainer(max_steps=1).fit(make_task(model), pairs_data(tmp_path))


def test_a_batch_of_one_pair_has_nothing_to_learn_from(make_trainer):
    with pytest.raises(ValueError, match="A batch must have at least 2 rows over all ranks"):
        make_trainer(max_steps=1).fit(make_task(), loader(make_batch(1)))


def test_a_batch_of_one_triplet_trains(make_trainer):
    task = make_task(without=["spectral"])
    make_trainer(max_steps=1).fit(task, loader(make_batch(1, 3)))
    assert torch.stack(list(task.last_loss_terms().values())).isfinite().all()
