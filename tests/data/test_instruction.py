import json
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from spectral_lightning.data import InstructionDataModule
from spectral_lightning.data.instruction_encoding import DialogueEncoder
from spectral_lightning.data.instruction_records import open_records

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

PAIRS = [{"prompt": f"rank {n}: ", "completion": "value " * (n % 7)} for n in range(40)]


@pytest.fixture
def make_data(tmp_path, make_tokenizer):
    """A data module on records that is ready for its loaders."""

    def make(records=PAIRS, *, ready=True, **settings):
        path = tmp_path / "records.json"
        path.write_text(json.dumps(records))
        defaults = {
            "tokenizer": make_tokenizer(),
            "sequence_len": 64,
            "batch_size": 4,
            "valid_fraction": 0.2,
            "cache_dir": str(tmp_path / "cache"),
        }
        data = InstructionDataModule(str(path), **(defaults | settings))
        if ready:
            data.prepare_data()
            data.setup("fit")
        return data

    return make


def rows(data, loader):
    """Every example of a loader without its padding, as lists of ids and labels."""
    for batch in loader:
        for mask, ids, labels in zip(*(batch[key] for key in sorted(batch)), strict=True):
            yield ids[mask == 1].tolist(), labels[mask == 1].tolist()


def trained(data, loader):
    """The text that is trained on, by example."""
    return [
        data.tokenizer.decode([label for label in labels if label != -100])
        for _, labels in rows(data, loader)
    ]


def test_batch_goes_into_a_causal_language_model_as_it_is(make_data):
    data = make_data()
    config = GPT2Config(
        vocab_size=300,
        n_positions=64,
        n_embd=8,
        n_layer=1,
        n_head=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config).eval()
    batch = next(iter(data.train_dataloader()))
    assert all(value.dtype == torch.int64 for value in batch.values())
    output = model(**batch)
    nats = nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
    )
    # The mean over the tokens of all answers: those of a short one count like any other.
    counted = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(output.loss, nats.sum() / counted.sum())


def test_only_the_answer_and_the_end_of_the_sequence_are_trained_on(make_data):
    data = make_data()
    records = {f"{r['prompt']}{r['completion']}</s>": f"{r['completion']}</s>" for r in PAIRS}
    found = {}
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for (ids, _), answer in zip(rows(data, loader), trained(data, loader), strict=True):
            found[data.tokenizer.decode(ids)] = answer
    assert found == records


def test_alpaca_record_follows_the_tokens_in_front_of_every_text(make_data, make_tokenizer):
    records = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(9)]
    data = make_data(records, tokenizer=make_tokenizer(bos_token="<s>"), sequence_len=256)
    for ids, _ in rows(data, data.train_dataloader()):
        text = data.tokenizer.decode(ids)
        assert text.startswith("<s>Below is an instruction that describes a task. Write")
        assert text.endswith("\n\n### Response:" + text[-5] + "</s>")
    assert set(trained(data, data.val_dataloader())) <= {f"{n}</s>" for n in range(9)}


def test_every_token_is_trained_on_without_mask_prompt(make_data):
    data = make_data(mask_prompt=False)
    assert all(ids == labels for ids, labels in rows(data, data.train_dataloader()))
    batches = list(data.train_dataloader())
    assert all((b["labels"][b["attention_mask"] == 0] == -100).all() for b in batches)


def test_batch_is_padded_to_its_own_longest_example(make_data):
    data = make_data()
    lengths = set()
    for batch in data.train_dataloader():
        mask = batch["attention_mask"]
        assert mask.sum(1).max() == mask.shape[1]
        assert (mask.diff(dim=1) <= 0).all()  # on the right
        assert (batch["input_ids"][mask == 0] == data.tokenizer.pad_token_id).all()
        assert (batch["labels"][mask == 0] == -100).all()
        lengths.add(mask.shape[1])
    assert len(lengths) > 1


def test_length_of_a_batch_can_be_rounded_up(make_data):
    for batch in make_data(pad_to_multiple_of=8).train_dataloader():
        length = batch["attention_mask"].sum(1).max().item()
        assert batch["labels"].shape[1] == -(-length // 8) * 8


def test_tokenizer_without_padding_token_still_trains_on_the_end(make_data, make_tokenizer):
    tokenizer = make_tokenizer(pad_token=None)
    size, end = len(tokenizer), tokenizer.eos_token_id
    data = make_data(tokenizer=tokenizer)
    padded = 0
    for batch in data.train_dataloader():
        mask = batch["attention_mask"]
        assert (batch["input_ids"][mask == 0] == end).all()
        assert (batch["labels"][mask == 0] == -100).all()
        assert ((batch["labels"] == end).sum(1) == 1).all()
        assert ((batch["input_ids"] == end) & (mask == 1)).sum() == len(mask)
        padded += (mask == 0).sum()
    assert padded > 0
    assert (tokenizer.pad_token, len(tokenizer)) == (None, size)


def test_long_answer_is_cut_and_does_not_pretend_to_end(make_data, caplog):
    records = [{"prompt": f"{n}", "completion": "a b " * (50 if n % 2 else 1)} for n in range(30)]
    with caplog.at_level("INFO"):
        data = make_data(records, sequence_len=32)
    assert "the answers of 15 of them are cut at `sequence_len` = 32" in caplog.text
    for ids, labels in rows(data, data.train_dataloader()):
        assert len(ids) <= 32
        assert (labels[-1] == data.tokenizer.eos_token_id) == (len(ids) < 32)
        assert labels[-1] != -100


def test_example_without_room_for_an_answer_is_left_out_and_counted(make_data):
    short = [{"prompt": f"{n}", "completion": "yes"} for n in range(30)]
    long = [{"prompt": f"{n} " * 40, "completion": "yes"} for n in range(10)]
    message = "Left out 10 of 40 examples whose prompt leaves no room for an answer in `seq"
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match=message):
            data = make_data([*short, *long], sequence_len=32)
    found = [*trained(data, data.train_dataloader()), *trained(data, data.val_dataloader())]
    assert set(found) == {"yes</s>"}
    with pytest.raises(ValueError, match=r"The (train|valid) data must hold .* no room for an"):
        make_data(long, sequence_len=32)


def test_chat_that_cannot_be_trained_on_is_left_out_with_its_reason(make_data):
    chats = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "a"}]}
        for n in range(20)
    ]
    with pytest.warns(UserWarning, match="Left out 1 of 21 examples without a turn of the assis"):
        data = make_data([*chats, {"messages": chats[0]["messages"][:1]}])
    assert set(trained(data, data.train_dataloader())) == {" a</s>"}


def test_copies_of_an_example_stand_on_one_side(make_data):
    data = make_data(PAIRS * 3)
    sides = [
        {tuple(ids) for ids, _ in rows(data, loader)}
        for loader in (data.train_dataloader(), data.val_dataloader())
    ]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0] | sides[1]) == len(PAIRS)


def test_named_validation_data_are_used_and_not_trained_on(make_data, tmp_path):
    (tmp_path / "valid.jsonl").write_text("\n".join(map(json.dumps, PAIRS[:3])))
    with pytest.warns(UserWarning, match="3 of 40 documents .* are left out of training"):
        data = make_data(valid_source=str(tmp_path / "valid.jsonl"))
    assert len(data.items("valid")) == 3
    assert len(data.items("train")) == 37
    assert len(data.items("test")) == 3
    batches = [list(data.val_dataloader()), list(data.predict_dataloader())]
    assert [b["input_ids"].tolist() for b in batches[0]] == [
        b["input_ids"].tolist() for b in batches[1]
    ]


def test_tokens_are_made_once_per_tokenizer_and_length(make_data, make_tokenizer, monkeypatch):
    first = make_data()

    def encode(self, dialogue):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(DialogueEncoder, "encode", encode)
    assert make_data(mask_prompt=False, seed=3).folder == first.folder
    for changed in ({"sequence_len": 63}, {"tokenizer": make_tokenizer(chat_template="x")}):
        with pytest.raises(AssertionError, match="tokenized again"):
            make_data(**changed)


def test_damaged_cache_is_built_again(make_data, tmp_path):
    whole = list(rows(data := make_data(), data.val_dataloader()))
    shard = tmp_path / "cache" / "instructions" / data.folder / "valid.bin"
    shard.write_bytes(bytes(reversed(shard.read_bytes())))
    with pytest.warns(UserWarning, match="does not match its checksum"):
        data = make_data()
    assert list(rows(data, data.val_dataloader())) == whole
    (shard.parent / "index.json").write_text("{}")
    with pytest.warns(UserWarning, match="cannot be read"):
        make_data()


class Reader(pl.LightningModule):
    """Learns nothing and writes down which batches it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def configure_optimizers(self):
        # Lightning then makes the loader before it restores its state.
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        self.seen.append([value.tolist() for value in batch.values()])
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        pass


def read(data, folder=None, ckpt_path=None):
    saver = pl.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saver] if folder is not None else [],
        max_epochs=2,
        limit_val_batches=0,
    )
    reader = Reader()
    trainer.fit(reader, data, ckpt_path=ckpt_path)
    return reader.seen


@pytest.mark.parametrize("step", [2, 8, 10])
def test_resumed_run_sees_the_batches_it_would_have_seen(make_data, tmp_path, step):
    whole = read(make_data(), tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / f"step={step}.ckpt"
    assert read(make_data(), ckpt_path=path) == whole[step:]


def test_order_depends_on_seed_and_epoch(make_data):
    first = read(make_data())
    assert read(make_data()) == first
    assert read(make_data(seed=1)) != first
    assert first[: len(first) // 2] != first[len(first) // 2 :]


def test_rank_that_runs_short_gets_an_example_that_counts_for_nothing(make_data):
    data = make_data()
    items = data.items("valid")
    batch = data.loader_options()["collate_fn"]([items[-1]])
    assert [value.tolist() for value in batch.values()] == [[[1]], [[data.pad_id]], [[-100]]]


def test_tokenizer_is_named_in_a_config_and_linked_to_the_model(make_tokenizer, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "model")
    parser = ArgumentParser()
    parser.add_argument("--model", type=str)
    parser.add_class_arguments(InstructionDataModule, "data")
    parser.link_arguments("model", "data.tokenizer")
    config = parser.parse_args([f"--model={tmp_path / 'model'}", "--data.source=a.json"])
    data = parser.instantiate_classes(config).data
    assert len(data.tokenizer) == len(make_tokenizer())


def test_tokenizer_that_cannot_be_loaded_is_named_with_offline_advice(monkeypatch):
    def from_pretrained(name):
        raise OSError("We couldn't connect\nto the Hub")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    message = r"got gpt2 \(We couldn't connect\)\. Without a network, give the folder where its"
    with pytest.raises(ValueError, match=message):
        _ = InstructionDataModule("a.json", "gpt2").tokenizer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "csv"}, r"`format` must be one of \('auto', .*\), got 'csv'"),
        ({"valid_fraction": 1.0}, r"`valid_fraction` must be in \(0, 1\), got 1.0"),
        ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of` must divide .* = 1024, got 0"),
        ({"pad_to_multiple_of": 7}, "`pad_to_multiple_of` must divide .* = 1024, got 7"),
        ({"batch_size": 0}, "`batch_size` must be >= 1, got 0"),
    ],
)
def test_setting_outside_its_range_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        InstructionDataModule("a.json", "gpt2", **settings)


def test_data_must_be_prepared_before_use(make_data):
    data = make_data(ready=False)
    with pytest.raises(RuntimeError, match="`prepare_data` must be called before `setup`"):
        data.setup("fit")
    with pytest.raises(RuntimeError, match="`setup` must be called before the data are used"):
        data.train_dataloader()


@pytest.mark.skipif(
    "SPECTRAL_DATA" not in os.environ, reason="SPECTRAL_DATA does not name a folder with chats"
)
@pytest.mark.filterwarnings("ignore:.*also stand in the evaluation text")
def test_real_chats_are_trained_on_exactly_where_the_assistant_speaks(tmp_path, make_tokenizer):
    path = Path(os.environ["SPECTRAL_DATA"]) / "sft" / "nanochat-identity.jsonl.xz"
    tokenizer = make_tokenizer()
    data = InstructionDataModule(
        str(path), tokenizer, sequence_len=20_000, batch_size=1, cache_dir=str(tmp_path)
    )
    data.prepare_data()
    data.setup("fit")
    expected = {
        "".join(
            f" {turn['content']}</s>"
            for turn in json.loads(document)
            if turn["role"] == "assistant"
        )
        for document in open_records(str(path), "chat").train.documents()
    }
    found = {*trained(data, data.train_dataloader()), *trained(data, data.val_dataloader())}
    assert found == expected
