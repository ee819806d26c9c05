import os
from functools import partial
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from transformers import AutoTokenizer

from spectral_lightning.data import EvalSet, PairsDataModule, PairsSource
from tests.data.pairs_cases import SCORED, open_pairs, pairs, triplets, write_json_lines


@pytest.fixture
def make_data(tmp_path):
    return partial(open_pairs, tmp_path / "cache")


def rows(data, loader):
    """The texts of every row that counts."""
    for batch in loader:
        counted = batch.get("valid", torch.ones(len(batch["text_ids"]), dtype=torch.bool))
        for ids in batch["input_ids"][counted]:
            yield tuple(data.tokenizer.batch_decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize(("records", "k"), [(pairs(60), 2), (triplets(60), 3)])
def test_batch_has_the_texts_of_each_row_padded_to_its_own_longest(make_data, records, k):
    data = make_data(PairsSource(records=records))
    lengths = set()
    for batch in data.train_dataloader():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert sorted(batch) == ["attention_mask", "input_ids", "text_ids"]
        assert {value.dtype for value in batch.values()} == {torch.int64}
        assert ids.shape == mask.shape == (4, k, ids.shape[2])
        assert batch["text_ids"].shape == (4, k)
        longest = mask.sum(2).max().item()
        assert ids.shape[2] == -(-longest // 8) * 8 <= 32
        assert (mask.diff(dim=2) <= 0).all()  # on the right
        assert torch.equal(ids == data.tokenizer.pad_token_id, mask == 0)
        assert (ids[:, :, 0] == data.tokenizer.cls_token_id).all()
        assert (
            (ids == data.tokenizer.sep_token_id).sum(2) == 1
        ).all()  # also of texts that are cut
        lengths.add(ids.shape[2])
    assert len(lengths) > 1


def test_every_row_is_trained_or_validated_on_as_it_was_written(make_data):
    data = make_data(max_length=200, batch_size=1)
    found = {*rows(data, data.train_dataloader()), *rows(data, data.val_dataloader()[0])}
    assert found == {(row["anchor"], row["positive"]) for row in pairs(60)}


def test_scores_come_with_scored_pairs_alone(make_data):
    data = make_data([PairsSource(records=SCORED), PairsSource(records=pairs(60))])
    kinds = [
        ("scores" in batch, tuple(batch["text_ids"].shape)) for batch in data.train_dataloader()
    ]
    assert set(kinds) == {(True, (4, 2)), (False, (4, 2))}
    batch = next(batch for batch in data.train_dataloader() if "scores" in batch)
    assert batch["scores"].dtype == torch.float32
    lefts = data.tokenizer.batch_decode(batch["input_ids"][:, 0], skip_special_tokens=True)
    expected = [int(text.split()[1]) / 40 for text in lefts]
    torch.testing.assert_close(batch["scores"], torch.tensor(expected))
    held_out = [(one.name, one.kind) for one in data.eval_sets]
    assert held_out == [("pairs", "retrieval"), ("scored", "sts")]


def test_text_ids_are_equal_for_equal_texts_alone(make_data):
    records = [(f"anchor {n}", ("same  text", "same\ntext")[n % 2]) for n in range(40)]
    data = make_data(PairsSource(records=records), no_duplicates=False, valid_fraction=0.0)
    ids = torch.cat([batch["text_ids"] for batch in data.train_dataloader()])
    assert len(ids[:, 1].unique()) == 1
    assert len(ids[:, 0].unique()) == len(ids)
    assert (ids >= 0).all()


def test_mixture_keeps_each_batch_to_one_source(make_data):
    sources = [
        PairsSource(records=pairs(60), weight=1.0),
        PairsSource(records=triplets(60, first=100), weight=3.0),
    ]
    batches = list(make_data(sources).train_dataloader())
    widths = [batch["text_ids"].shape[1] for batch in batches]
    assert widths.count(3) == pytest.approx(0.75 * len(widths), abs=1)
    assert widths != sorted(widths)


def test_evaluation_sets_are_described_in_the_order_of_their_loaders(make_data, tmp_path):
    (tmp_path / "sts.csv").write_text("".join(f"{a},{b},{5 * s}\n" for a, b, s in SCORED[::6]))
    data = make_data(
        sts={"own": str(tmp_path / "sts.csv")},
        test_sources=PairsSource(records=triplets(5, first=200)),
        test_sts={"other": PairsSource(records=SCORED[10:20])},
        eval_batch_size=3,
    )
    held_out = data.eval_sets[0].num_rows
    assert data.eval_sets == (
        EvalSet(name="pairs", kind="retrieval", num_rows=held_out),
        EvalSet(name="own", kind="sts", num_rows=7),
    )
    assert [(one.name, one.num_rows) for one in data.test_sets] == [("pairs", 5), ("other", 10)]
    for sets, loaders in (
        (data.eval_sets, data.val_dataloader()),
        (data.test_sets, data.test_dataloader()),
    ):
        for one, loader in zip(sets, loaders, strict=True):
            batches = list(loader)
            assert sum(batch["valid"].sum().item() for batch in batches) == one.num_rows
            assert all(("scores" in batch) == (one.kind == "sts") for batch in batches)
            assert max(len(batch["valid"]) for batch in batches) == 3
    scores = torch.cat([batch["scores"] for batch in data.val_dataloader()[1]])
    torch.testing.assert_close(scores, torch.arange(0, 40, 6) / 40)


def test_filling_row_of_evaluation_has_text_but_does_not_count(make_data):
    data = make_data()
    batch = data.items("valid")[[0, ~0]]
    assert batch["valid"].tolist() == [True, False]
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])


def test_validation_data_test_where_there_are_no_test_data(make_data):
    data = make_data()
    assert data.test_sets == data.eval_sets
    assert len(list(rows(data, data.test_dataloader()[0]))) == data.eval_sets[0].num_rows


def test_no_text_of_training_is_evaluated_on(make_data, tmp_path):
    records = [(f"text {n}", f"text {n * 7 % 90}") for n in range(1, 90)]
    data = make_data(
        PairsSource(records=records),
        test_sources=PairsSource(records=[("text 3", "new")]),
        sts={"own": PairsSource(records=[("text 8", "new", 0.1), ("new", "text 9", 0.9)])},
        batch_size=1,
    )
    seen = {text for row in rows(data, data.train_dataloader()) for text in row}
    loaders = [*data.val_dataloader(), *data.test_dataloader()]
    evaluated = {text for loader in loaders for row in rows(data, loader) for text in row}
    assert {"text 3", "text 8", "text 9"} < evaluated
    assert seen.isdisjoint(evaluated)
    assert data.counts.shared == 89 - len(data.items("train")) - len(data.items("valid")) > 0


def test_named_validation_rows_take_the_place_of_held_out_ones(make_data):
    data = make_data(valid_sources=PairsSource(records=pairs(9)))
    assert data.eval_sets == (EvalSet(name="pairs", kind="retrieval", num_rows=9),)
    assert (len(data.items("train")), data.counts.shared) == (51, 9)


def test_rows_that_are_left_out_and_texts_that_are_cut_are_counted_and_said(make_data, caplog):
    records = [*pairs(60), {"anchor": " ", "positive": "b"}, pairs(1)[0], pairs(2)[1]]
    for _ in range(2):  # the second time from the cache
        with (
            caplog.at_level("INFO"),
            pytest.warns(
                UserWarning, match=r"Left out 1 rows because .* empty, and 2 because they"
            ),
        ):
            data = make_data(PairsSource(records=records), max_train_pairs=30)
        assert (data.counts.empty, data.counts.duplicates, data.counts.train) == (1, 2, 30)
        assert data.counts.surplus == 60 - 30 - len(data.items("valid"))
        assert f"{data.counts.surplus} because of `max_train_pairs`; 1 of 82" in caplog.text
        caplog.clear()
    data.train_dataloader()
    assert "7 batches of 4 rows per epoch and rank; 2 of 30 rows fill no batch" in caplog.text


def test_trained_tokenizer_is_saved_with_the_data_and_reads_like_bert(make_data, tmp_path):
    data = make_data()
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), make_data().tokenizer):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("Matrix \n RANK")["input_ids"])
        assert tokens == ["[CLS]", "\u0120matrix", "\u0120rank", "[SEP]"]
        assert (tokenizer.model_max_length, tokenizer.mask_token_id) == (32, 4)
        assert tokenizer.decode(tokenizer("a 14")["input_ids"]) == "[CLS] a 14[SEP]"


def test_given_tokenizer_is_used_from_a_folder_or_as_it_is(make_data, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(bos_token="<s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = []
    for given in (tokenizer, str(tmp_path / "tokenizer")):
        data = make_data(tokenizer=given)
        assert data.tokenizer.get_vocab() == tokenizer.get_vocab()
        found.append([batch["input_ids"].tolist() for batch in data.val_dataloader()[0]])
    assert found[0] == found[1]
    with pytest.raises(ValueError, match=r"`tokenizer` must be a folder .* or None to train one"):
        make_data(tokenizer=str(tmp_path / "missing"))
    data = make_data(tokenizer=make_tokenizer(eos_token=None, pad_token=None))
    with pytest.raises(ValueError, match="`tokenizer` must have a padding token"):
        data.train_dataloader()


def test_damaged_cache_is_built_again(make_data, tmp_path):
    data = make_data()
    whole = list(rows(data, data.val_dataloader()[0]))
    folder = tmp_path / "cache" / "pairs" / data.folder
    for name in ("texts.bin", "rows.npz", "index.json"):
        (folder / name).write_bytes(b"{}")
        with pytest.warns(UserWarning, match="The token cache is built again"):
            data = make_data()
        assert list(rows(data, data.val_dataloader()[0])) == whole


def test_settings_come_from_a_config(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", pairs(9))
    parser = ArgumentParser()
    parser.add_class_arguments(PairsDataModule, "data")
    sources = [path, {"path": path, "weight": 2.0, "columns": {"negative": ["x", "y"]}}]
    config = {"sources": sources, "sts": {"dev": path}}
    data = parser.instantiate_classes(parser.parse_object({"data": config})).data
    assert data.sources[0] == path
    assert data.sources[1] == PairsSource(path=path, weight=2.0, columns={"negative": ["x", "y"]})
    assert data.sts == {"dev": path}


@pytest.mark.filterwarnings("ignore:Left out 0 rows because a text is empty")
@pytest.mark.skipif(
    "SPECTRAL_DATA" not in os.environ, reason="SPECTRAL_DATA does not name a folder with pairs"
)
def test_real_pairs_are_mixed_and_evaluated(tmp_path):
    folder = Path(os.environ["SPECTRAL_DATA"])
    columns = {"anchor": "sentence", "positive": "two_sentences"}
    splits = PairsSource(path=str(folder / "pairs" / "wikisplit.tsv.xz"), columns=columns)
    data = PairsDataModule(
        [str(folder / "pairs" / "nli-dev.tsv.xz"), splits],
        sts={"stsb-dev": str(folder / "sts" / "stsb-en-dev.csv.xz")},
        max_valid=500,
        max_train_pairs=4_000,
        cache_dir=str(tmp_path),
    )
    data.prepare_data()
    data.setup("fit")
    assert [one.num_rows for one in data.eval_sets] == [500, 1_500]
    widths = [batch["text_ids"].shape[1] for batch in data.train_dataloader()]
    assert set(widths) == {2, 3}
    for batch in data.train_dataloader():
        # Eight premises entail themselves.
        num_texts = sum(len(row.unique()) for row in batch["text_ids"])
        assert len(batch["text_ids"].unique()) == num_texts
