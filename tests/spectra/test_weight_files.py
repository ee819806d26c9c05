"""Models as they lie on disk: what is read, and what is said of files that cannot be."""

import json
import pickle
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from spectral_lightning.spectra import find_targets, scan_model
from spectral_lightning.testing.tasks import TinyTask, quiet_trainer

SCANNED = {"encoder.fc": (5, 4), "encoder.out": (4, 5)}


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {f"{name}.weight": torch.randn(s, generator=generator) for name, s in SCANNED.items()}
    return state | {"encoder.fc.bias": torch.ones(5)}


def shapes(path):
    return {layer.reading.name: layer.reading.shape for layer in scan_model(path).layers}


def norms(path):
    return {layer.reading.name: layer.reading.spectral_norm for layer in scan_model(path).layers}


def write_shards(folder, save, stem, suffix):
    """Two shards and their index, as Hugging Face writes them."""
    names = {}
    for number, (name, tensor) in enumerate(tensors().items(), start=1):
        file = f"{stem}-{number:05}-of-00003.{suffix}"
        save({name: tensor}, folder / file)
        names[name] = file
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


def test_a_checkpoint_of_lightning_is_read_without_its_optimizer(tmp_path):
    task = TinyTask()
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(task)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["optimizer_states"]
    found = norms(tmp_path / "last.ckpt")
    assert found.keys() == {target.name for target in find_targets(task).targets}
    for target in find_targets(task).targets:
        norm = torch.linalg.matrix_norm(target.matrix().double(), 2).item()
        assert found[target.name] == pytest.approx(norm, rel=5e-6)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module", None])
@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_found_in_every_file_of_torch_save(tmp_path, key, suffix, zipped):
    content = {key: tensors(), "epoch": 3} if key else tensors()
    file = tmp_path / f"model.{suffix}"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    assert shapes(file) == SCANNED


def test_a_folder_of_a_real_hugging_face_model_is_read(tmp_path):
    size = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = BertModel(BertConfig(**size, num_hidden_layers=2, vocab_size=50))
    model.save_pretrained(tmp_path)
    linear = {target.name: target.shape for target in find_targets(model).targets}
    assert shapes(tmp_path) == linear


def test_conv1d_of_hugging_face_is_measured_as_it_is_stored(tmp_path):
    model = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=8))
    model.save_pretrained(tmp_path)
    found = norms(tmp_path)
    for target in find_targets(model).targets:
        norm = torch.linalg.matrix_norm(target.matrix().double(), 2).item()
        assert found[target.name] == pytest.approx(norm, rel=5e-6)


@pytest.mark.parametrize(
    ("save", "stem", "suffix"),
    [(save_file, "model", "safetensors"), (torch.save, "pytorch_model", "bin")],
)
def test_a_model_in_shards_is_one_model(tmp_path, save, stem, suffix):
    write_shards(tmp_path, save, stem, suffix)
    assert shapes(tmp_path) == SCANNED


def test_a_folder_with_only_a_bin_file_is_read(tmp_path):
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    assert shapes(tmp_path) == SCANNED


def test_safetensors_come_before_a_bin_file_of_the_same_folder(tmp_path):
    save_file(tensors(seed=0), tmp_path / "model.safetensors")
    torch.save(tensors(seed=1), tmp_path / "pytorch_model.bin")
    assert norms(tmp_path) == norms(tmp_path / "model.safetensors")


def test_two_models_in_one_folder_are_refused(tmp_path):
    for name in ("first", "second"):
        save_file(tensors(), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"one model, but `encoder.* both in first.safetensors"):
        scan_model(tmp_path)


def test_a_path_that_does_not_exist_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`path` must be an existing file or folder"):
        scan_model(tmp_path / "nothing")


def test_a_folder_without_weights_is_told_what_could_be_given(tmp_path):
    with pytest.raises(ValueError, match=r"has neither\.$"):
        scan_model(tmp_path)
    torch.save(tensors(), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"give one of its files, such as last\.ckpt"):
        scan_model(tmp_path)


@pytest.mark.parametrize("name", ["meta.pt", ".metadata"])
def test_a_sharded_checkpoint_of_lightning_is_told_how_to_be_joined(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match="is a sharded checkpoint; join it first"):
        scan_model(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path, save_file, "model", "safetensors")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 of the 3 files .* such as model-00002-of-00003"):
        scan_model(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index of shards must hold|must be complete"):
        scan_model(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match="A file of weights must not be empty"):
        scan_model(tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "README.md"])
def test_a_file_that_is_no_model_is_refused(tmp_path, name):
    (tmp_path / name).write_text("# A text, which is no model.\n" * 50)
    with pytest.raises(ValueError, match=r"must be complete, but \S+ is cut off, damaged or"):
        scan_model(tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, name):
    file = tmp_path / name
    (torch.save if name.endswith("ckpt") else save_file)(tensors(), file)
    whole = file.read_bytes()
    for length in random.Random(0).sample(range(1, len(whole)), 20):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is cut off, damaged or"):
            scan_model(file)


def test_a_checkpoint_with_objects_is_not_run(tmp_path):
    touched = tmp_path / "touched"

    class Payload:
        def __reduce__(self):
            return type(touched).touch, (touched,)

    torch.save({"state_dict": tensors(), "extra": Payload()}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"tensors and plain containers only, .* could run any"):
        scan_model(tmp_path / "model.ckpt")
    assert not touched.exists()


def test_a_whole_pickled_module_is_not_loaded(tmp_path):
    torch.save(torch.nn.Linear(3, 3), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"holds other objects .*Linear.*save_model"):
        scan_model(tmp_path / "model.pt")


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="A checkpoint must"):
        scan_model(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("content", "holds"),
    [
        ({"epoch": 1, "steps": [1]}, "the keys epoch, steps"),
        ({}, "the keys of nothing"),
        ([torch.ones(2, 2)], "a list"),
        (torch.ones(2, 2), "a Tensor"),
    ],
)
def test_a_checkpoint_without_a_state_dict_says_what_it_holds(tmp_path, content, holds):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"must hold a state dict, but .* holds {holds}"):
        scan_model(tmp_path / "model.pt")


def test_reading_changes_no_file(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    before = load_file(tmp_path / "model.safetensors")
    scan_model(tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
