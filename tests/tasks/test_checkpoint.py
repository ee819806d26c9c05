import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from spectral_lightning.losses import CrossEntropy
from spectral_lightning.tasks import LanguageModeling, load_language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.13
]


@pytest.fixture
def edit(checkpoint):
    """Change what a checkpoint says about its model, or its other contents."""

    def edited(**changes):
        content = torch.load(checkpoint, weights_only=True)
        content["spectral_lightning"] |= changes
        torch.save(content, checkpoint)
        return checkpoint

    return edited


def test_checkpoint_alone_gives_back_model_and_tokenizer(checkpoint, make_data):
    model, tokenizer, loss = load_language_model(checkpoint)
    assert loss == CrossEntropy()
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not model.training
    assert model.config == {"vocab_size": 300, "sequence_len": 16, "dim": 8}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[f"model.{name}"])
    data = make_data()
    data.prepare_data()
    data.setup("fit")
    assert tokenizer.to_str() == data.tokenizer.to_str()
    assert tokenizer.encode("Note").tokens[0] == "<|bos|>"


def test_checkpoint_holds_plain_containers_only(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    assert content["state_dict"]["token_bytes"].sum() > 0
    assert isinstance(content["spectral_lightning"]["tokenizer"], str)


def test_checkpoint_tells_the_loss_and_so_what_the_logits_mean(
    make_trainer, make_data, make_bigram, tmp_path
):
    loss = CrossEntropy(transform="stablemax", z_loss=0.1)
    trainer = make_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(LanguageModeling(make_bigram(), loss=loss), make_data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert load_language_model(tmp_path / "run.ckpt").loss == loss
    assert LanguageModeling.load_from_checkpoint(tmp_path / "run.ckpt").loss == loss
    with pytest.warns(UserWarning, match="trained with stablemax, but `loss` has softmax"):
        other = LanguageModeling.load_from_checkpoint(tmp_path / "run.ckpt", loss=CrossEntropy())
    assert other.transform == "softmax"


def test_task_is_loaded_with_and_without_a_model(checkpoint, make_bigram, make_trainer, make_data):
    for settings in ({}, {"model": make_bigram()}):
        task = LanguageModeling.load_from_checkpoint(checkpoint, **settings)
        saved = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert torch.equal(task.model.head.weight, saved["model.head.weight"])
        (metrics,) = make_trainer().validate(task, make_data(), verbose=False)
        assert "valid/bpb" in metrics


def test_loaded_task_predicts_without_its_data_module(checkpoint, make_trainer):
    task = LanguageModeling.load_from_checkpoint(checkpoint)
    loader = DataLoader([torch.arange(60, 70)] * 4, batch_size=2)
    assert len(torch.cat(make_trainer().predict(task, loader))) == 4


def test_checkpoint_of_another_shape_names_the_first_tensor(
    checkpoint, make_bigram, make_trainer, make_data
):
    message = (
        r"The checkpoint must fit the model, but 2 of 3 tensors differ: `model.embed.weight` is"
        r" \(300, 8\) in the checkpoint and \(300, 4\) in the model\."
    )
    with pytest.raises(ValueError, match=message):
        LanguageModeling.load_from_checkpoint(checkpoint, model=make_bigram(dim=4))
    task = LanguageModeling(make_bigram(dim=4))
    before = task.model.head.weight.clone()
    with pytest.raises(ValueError, match=message):
        make_trainer(max_steps=3).fit(task, make_data(), ckpt_path=checkpoint)
    assert torch.equal(task.model.head.weight, before)


def test_checkpoint_with_other_layers_is_refused(checkpoint, make_gpt, make_bigram):
    with pytest.raises(ValueError, match=r"`model.wte.weight` is missing in the checkpoint and \("):
        LanguageModeling.load_from_checkpoint(checkpoint, model=make_gpt())
    bigger = make_bigram()
    bigger.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"2 of 5 .* `model.extra.weight` is missing in the che"):
        LanguageModeling.load_from_checkpoint(checkpoint, model=bigger)
    with pytest.warns(UserWarning, match="in the model state dict but not in the checkpoint"):
        LanguageModeling.load_from_checkpoint(checkpoint, model=bigger, strict=False)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path):
    path.write_bytes(b"hello, this is a text")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, overwrite, empty])
def test_damaged_checkpoint_is_one_sentence(
    checkpoint, damage, make_bigram, make_trainer, make_data
):
    damage(checkpoint)
    message = r"A checkpoint must be complete, but .*run\.ckpt is cut off, damaged or no checkpoint"
    with pytest.raises(ValueError, match=message):
        load_language_model(checkpoint)
    with pytest.raises(ValueError, match=message):
        LanguageModeling.load_from_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=message):
        make_trainer(max_steps=3).fit(
            LanguageModeling(make_bigram()), make_data(), ckpt_path=checkpoint
        )


def test_checkpoint_that_does_not_exist_is_named(tmp_path):
    for load in (load_language_model, LanguageModeling.load_from_checkpoint):
        with pytest.raises(FileNotFoundError, match=r"`checkpoint_path` must be an existing file"):
            load(tmp_path / "missing.ckpt")


def test_file_of_something_else_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"A checkpoint must hold a `state_dict`, but .*other\.pt"):
        load_language_model(tmp_path / "other.pt")


def test_objects_in_a_checkpoint_keep_the_explanation_of_torch(tmp_path):
    torch.save({"state_dict": {}, "object": nn.Linear(1, 1)}, tmp_path / "object.ckpt")
    with pytest.raises(Exception, match="Unsupported global"):
        load_language_model(tmp_path / "object.ckpt")


def test_checkpoint_without_tokenizer_or_recipe_says_so(edit):
    with pytest.raises(ValueError, match="must say how to build its model, but it was written by"):
        load_language_model(edit(model=None))
    with pytest.raises(
        ValueError, match=r"must hold a tokenizer to be used alone, but .*run\.ckpt"
    ):
        load_language_model(edit(tokenizer=None))


def test_checkpoint_can_only_build_models(edit):
    recipe = {"class_path": "subprocess.Popen", "init_args": {"args": ["false"]}}
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, got subprocess\.Popen"):
        load_language_model(edit(model=recipe))
    for name in ("no.such.Model", "torch.nn.NoSuch", "Model"):
        with pytest.raises(ValueError, match=f"The checkpoint's model {name} must be importable"):
            load_language_model(edit(model=recipe | {"class_path": name}))


def test_model_without_config_is_saved_without_a_recipe(
    make_bigram, make_trainer, make_data, tmp_path
):
    model = make_bigram()
    del model.config
    trainer = make_trainer()
    trainer.validate(LanguageModeling(model), make_data(), verbose=False)
    trainer.save_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="must say how to build its model"):
        LanguageModeling.load_from_checkpoint(tmp_path / "run.ckpt")
    LanguageModeling.load_from_checkpoint(tmp_path / "run.ckpt", model=make_bigram())


def test_another_tokenizer_than_in_training_is_refused(
    checkpoint, make_bigram, make_trainer, make_data
):
    message = "The data module's tokenizer must be the one the model was trained with"
    other = {"valid_fraction": 0.4}
    with pytest.raises(ValueError, match=message):
        make_trainer().validate(
            LanguageModeling(make_bigram()), make_data(**other), ckpt_path=checkpoint
        )
    task = LanguageModeling.load_from_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=message):
        make_trainer().validate(task, make_data(**other))


def test_tokenizer_of_a_checkpoint_reads_other_text(checkpoint, make_trainer, make_data, tmp_path):
    path = tmp_path / "tokenizer.json"
    load_language_model(checkpoint)[1].save(str(path))
    task = LanguageModeling.load_from_checkpoint(checkpoint)
    data = make_data(valid_fraction=0.4, tokenizer=str(path))
    (metrics,) = make_trainer().validate(task, data, verbose=False)
    assert metrics["valid/bpb"] > 0
