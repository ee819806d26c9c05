"""Text is sampled from the probabilities that a model was trained for."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from spectral_lightning.losses import CrossEntropy
from spectral_lightning.nn.functional import stablemax
from spectral_lightning.tasks import HFCausalLM, StableMaxLogitsProcessor, install_loss
from tests.tasks.hf_cases import loader, settings

STABLEMAX = CrossEntropy(transform="stablemax")


def words():
    """A tokenizer of forty words, without a token for padding."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


@pytest.fixture
def make_task():
    def make(loss=STABLEMAX, **options):
        torch.manual_seed(0)
        task = HFCausalLM(settings("llama") | {"eos_token_id": None}, loss, **options)
        task.model.lm_head.weight.data.mul_(60)
        return task

    return make


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_probabilities_of_stablemax(make_task, temperature):
    model = make_task().model.eval()
    prompt = torch.tensor([[7, 11]])
    with torch.no_grad():
        logits = model(prompt).logits[0, -1]
    expected = stablemax(logits.double()) ** (1 / temperature)
    expected /= expected.sum()
    num = 20_000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = model.generate(
            prompt.expand(num, -1),
            max_new_tokens=1,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            pad_token_id=0,
            logits_processor=[StableMaxLogitsProcessor()],
        )[:, -1]
    found = torch.bincount(tokens, minlength=40) / num
    bound = 5 * (expected * (1 - expected) / num).sqrt()
    assert (found - expected).abs().le(bound + 1e-4).all()
    assert (torch.softmax(logits, -1) - expected).abs().max() > 20 * bound.max()


@pytest.mark.parametrize("loss", [STABLEMAX, CrossEntropy()])
def test_a_task_generates_as_it_was_trained(make_task, loss):
    task = make_task(loss)
    task._tokenizer = PreTrainedTokenizerFast(tokenizer_object=words())
    prompt = "w7 w11"
    texts = [task.generate(prompt, 1, seed=seed, top_k=0) for seed in range(200)]
    own = [int(text.split()[-1][1:]) for text in texts]
    with torch.no_grad():
        logits = task.model(torch.tensor([[7, 11]])).logits[0, -1].double()
    likely = torch.softmax(logits, -1).max().item()
    share = sum(token == logits.argmax() for token in own) / len(own)
    expected = stablemax(logits).max().item() if loss == STABLEMAX else likely
    assert share == pytest.approx(expected, abs=0.1)
    assert all(module.training for module in task.model.modules())


def test_the_random_state_stays_and_seeds_decide(make_task):
    task = make_task()
    task._tokenizer = PreTrainedTokenizerFast(tokenizer_object=words())
    before = torch.get_rng_state()
    texts = {task.generate("w3 w4", 8, seed=seed) for seed in (0, 0, 1)}
    assert len(texts) == 2
    assert torch.equal(torch.get_rng_state(), before)


class Texts:
    """A logger's writer that keeps texts."""

    def __init__(self):
        self.texts = {}

    def add_text(self, tag, text, step):
        self.texts[tag, step] = text


@pytest.mark.parametrize("weight", [1.0, float("nan")])
def test_samples_are_written_after_validation(make_task, make_trainer, monkeypatch, weight):
    task, writer = make_task(sample_prompts=["w1 w2", "w3"], sample_tokens=4), Texts()
    task._tokenizer = PreTrainedTokenizerFast(tokenizer_object=words())
    task.model.lm_head.weight.data.mul_(weight)
    trainer = make_trainer()
    monkeypatch.setattr(type(trainer), "loggers", [type("Logger", (), {"experiment": writer})()])
    task.trainer = trainer
    if weight != weight:
        with pytest.warns(UserWarning, match="No samples were written"):
            task.on_validation_end()
        assert not writer.texts
        return
    task.on_validation_end()
    assert {tag for tag, _ in writer.texts} == {"samples/0", "samples/1"}
    assert all(len(text.split()) >= 5 for text in writer.texts.values())


def test_generating_without_a_tokenizer_is_refused(make_task):
    with pytest.raises(ValueError, match=r"must have a tokenizer.*a config"):
        make_task().generate("w1")


def test_an_empty_prompt_is_refused(make_task):
    task = make_task()
    task._tokenizer = PreTrainedTokenizerFast(tokenizer_object=words())
    with pytest.raises(ValueError, match="at least one token"):
        task.generate("")


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_a_saved_folder_has_all_that_generation_needs(make_task, make_trainer, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    task = make_task()
    task._tokenizer = PreTrainedTokenizerFast(tokenizer_object=words())
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(max_steps=1, logger=logger, log_every_n_steps=1)
    trainer.fit(task, loader(batch_size=8))
    folder = tmp_path / "lightning_logs" / "version_0" / "huggingface"
    assert (folder / "generation_config.json").is_file()
    again = HFCausalLM(str(folder))
    assert again.generate("w3 w4", 8) == task.generate("w3 w4", 8)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert install_loss(plain).cross_entropy == STABLEMAX


def test_text_is_drawn_from_all_words_and_not_from_the_likeliest_fifty():
    """transformers cuts to 50 where nothing is said, and takes the model's own temperature."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    task = HFCausalLM(settings("llama") | {"vocab_size": 300, "eos_token_id": None}, STABLEMAX)
    task._tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    task.model.generation_config.temperature = 1e-3
    found = {task.generate("w1 w2", 1, seed=seed).split()[-1] for seed in range(200)}
    assert len(found) > 100


def test_a_continuation_ends_where_the_context_does():
    task = HFCausalLM(settings("gpt2") | {"n_positions": 12, "eos_token_id": None})
    task._tokenizer = PreTrainedTokenizerFast(tokenizer_object=words())
    assert len(task.generate("w1 w2 w3", 64).split()) == 12
    with pytest.raises(ValueError, match="`prompt` must leave room in the model's context of 12"):
        task.generate(" ".join(["w1"] * 12), 1)
