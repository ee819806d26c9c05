import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import processors

from spectral_lightning.tasks import LanguageModeling
from spectral_lightning.tasks.samples import check_prompts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.13
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

PROMPTS = {"sample_prompts": ["Note", "norm rank"], "sample_tokens": 5}


class Writer:
    """Stands for the experiment of a logger that takes text."""

    def __init__(self):
        self.texts = []

    def add_text(self, tag, text, step):
        self.texts.append((tag, text, step))


class TextLogger(CSVLogger):
    def __init__(self, folder):
        super().__init__(folder)
        self.writer = Writer()

    @property
    def experiment(self):
        return self.writer

    def log_metrics(self, metrics, step=None):
        pass

    def save(self):
        pass


def test_continuations_are_written_after_every_validation(
    make_trainer, make_data, make_gpt, tmp_path
):
    logger = TextLogger(tmp_path)
    trainer = make_trainer(
        max_steps=4,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=1,
        logger=logger,
    )
    task = LanguageModeling(make_gpt(), **PROMPTS)
    trainer.fit(task, make_data())
    assert [(tag, step) for tag, _, step in logger.writer.texts] == [
        ("samples/0", 2),
        ("samples/1", 2),
        ("samples/0", 4),
        ("samples/1", 4),
    ]
    assert logger.writer.texts[1][1].startswith("    norm rank")
    assert task.training


def test_tensorboard_shows_the_continuations(make_trainer, make_data, make_gpt, tmp_path):
    trainer = make_trainer(
        max_steps=2, limit_val_batches=1, val_check_interval=2, logger=TensorBoardLogger(tmp_path)
    )
    trainer.fit(LanguageModeling(make_gpt(), **PROMPTS), make_data())
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    (event,) = events.Tensors("samples/0/text_summary")
    assert event.step == 2
    assert event.tensor_proto.string_val[0].decode().startswith("    Note")


@pytest.mark.parametrize("make_logger", [lambda path: False, CSVLogger], ids=["none", "csv"])
def test_loggers_without_text_are_left_alone(
    make_trainer, make_data, make_gpt, tmp_path, make_logger
):
    task = LanguageModeling(make_gpt(), **PROMPTS)
    trainer = make_trainer(logger=make_logger(tmp_path))
    trainer.validate(task, make_data(), verbose=False)


def test_samples_change_nothing_in_the_run(make_trainer, make_data, make_gpt, tmp_path):
    weights = []
    for settings in (PROMPTS, {}):
        pl.seed_everything(0, verbose=False)
        task = LanguageModeling(make_gpt(), **settings)
        trainer = make_trainer(
            max_steps=4, val_check_interval=2, limit_val_batches=1, logger=TextLogger(tmp_path)
        )
        trainer.fit(task, make_data())
        weights.append((task.model.lm_head.weight, torch.get_rng_state()))
    assert all(torch.equal(with_, without) for with_, without in zip(*weights, strict=True))


def test_model_that_has_diverged_gives_a_warning_and_no_sample(
    make_trainer, make_data, make_gpt, tmp_path
):
    model, logger = make_gpt(), TextLogger(tmp_path)
    torch.nn.init.constant_(model.wte.weight, float("nan"))
    trainer = make_trainer(logger=logger)
    with pytest.warns(UserWarning, match="No samples were written at step 0"):
        trainer.validate(LanguageModeling(model, **PROMPTS), make_data(), verbose=False)
    assert logger.writer.texts == []


def test_prompts_must_fit_the_model(make_trainer, make_data, make_gpt, make_bigram):
    task = LanguageModeling(make_gpt(), sample_prompts=["Note"], sample_tokens=16)
    with pytest.raises(
        ValueError, match=r"`sample_tokens` must be at most \d+ after the prompt 'Note' of \d tok"
    ):
        make_trainer().validate(task, make_data())
    data = make_data()
    data.prepare_data()
    data.setup("fit")
    data.tokenizer.post_processor = processors.Sequence([])  # one that adds no special token
    with pytest.raises(ValueError, match="`sample_prompts` must not be empty texts, got ''"):
        check_prompts([""], 5, data.tokenizer, 16)
    task = LanguageModeling(make_bigram(10), **PROMPTS)
    with pytest.raises(ValueError, match="`sample_prompts` must be empty unless the data module"):
        make_trainer().validate(task, torch.utils.data.DataLoader([torch.arange(5)]))
