"""The scripts that compare trained sentence embeddings, on data and models of a few kilobytes."""

import importlib
import json
import lzma
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers of others

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("aba", "eke", "ino", "omu")]
PARTS = ["spectral", "anchor", "bridge", "angular", "matryoshka"]


def sentence(number: int, length: int) -> str:
    return " ".join(WORDS[(number * 7 + i * (i + number)) % len(WORDS)] for i in range(length))


def packed(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress("\n".join(lines).encode()))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with the files that the scripts read, of nonsense."""
    folder = tmp_path / "data"
    monkeypatch.setenv("SPECTRAL_DATA", str(folder))
    nli = ["dataset\tlabel\tpremise\thypothesis"]
    for i in range(12):
        premise = f"nli {sentence(i, 9)}"
        nli += [f"snli\tentailment\t{premise}\tso {sentence(i, 4)}"]
        nli += [f"snli\tcontradiction\t{premise}\tno {sentence(i + 50, 5)}"]
    packed(folder / "pairs/nli-dev.tsv.xz", nli)
    glosses = [f"noun\tword {sentence(i, 2)}\tthat {sentence(i, 6)}\t" for i in range(12, 24)]
    packed(folder / "pairs/wordnet-glosses.tsv.xz", ["pos\twords\tdefinition\texamples", *glosses])
    split = [f"tune\tone {sentence(i, 9)}\ttwo {sentence(i, 11)}" for i in range(24, 36)]
    packed(folder / "pairs/wikisplit.tsv.xz", ["split\tsentence\ttwo_sentences", *split])
    scored = [f"{sentence(i, 5)},{sentence(i + i % 6, 5)},{5 - i % 6}" for i in range(40, 100)]
    for part in ("dev", "train"):
        packed(folder / f"sts/stsb-en-{part}.csv.xz", scored)
    return folder


@pytest.fixture
def backbone(tmp_path):
    """A folder with a tiny BERT without dropout, and its tokenizer."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    special |= {"sep_token": "[SEP]", "mask_token": "[MASK]"}
    vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path / "backbone"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def script(monkeypatch):
    """Run the main function of a script."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))

    def run(name: str, *arguments: object):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        module = importlib.import_module(name)
        module.main()
        return module

    return run


def table_arguments(work: Path, backbone: Path) -> list[object]:
    sizes = ["--steps", 6, "--batch-size", 4, "--max-length", 16, "--dims", 32, 16]
    return ["--folder", backbone, "--work", work, *sizes, "--chunk-size", 5, "--rates", 3e-3]


def test_both_libraries_learn_the_same_from_the_same_batches(tmp_path, data, backbone, script):
    save = tmp_path / "saved.json"
    arguments = [*table_arguments(tmp_path / "work", backbone), "--seeds", 0, "--save", save]
    script("embedding_table", *arguments, "--blocks", 2, "--block-steps", 2)
    table = json.loads(save.read_text())["table"]
    found = {s: [one["mean"] for one in row["spearman"].values()] for s, row in table.items()}
    assert found["ours"] == pytest.approx(found["sentence_transformers"], abs=0.05)
    for other in ("untrained", "ours_full"):
        assert found["ours"] != pytest.approx(found[other], abs=0.5)
    assert all(table[s]["rows_per_second"] > 0 for s in table if s != "untrained")


def test_a_killed_table_goes_on_where_it_was(tmp_path, data, backbone, script, capsys):
    arguments = [*table_arguments(tmp_path / "work", backbone), "--systems", "ours", "--blocks", 0]
    script("embedding_table", *arguments, "--seeds", 0)
    kept = (tmp_path / "work/embedding_table.jsonl").read_text()
    capsys.readouterr()
    script("embedding_table", *arguments, "--seeds", 0, 1)
    now = (tmp_path / "work/embedding_table.jsonl").read_text()
    assert now.startswith(kept)
    assert [json.loads(line)["settings"]["seed"] for line in now.splitlines()] == [0, 0, 1]
    assert "| ours | 0.003 |" in capsys.readouterr().out


def test_the_ablation_compares_each_part_with_the_full_model(tmp_path, data, script):
    save, plot = tmp_path / "saved.json", tmp_path / "plot.png"
    pairs = tmp_path / "pairs.tsv"
    rows = [f"{sentence(i, 3)} {i}\t{sentence(i, 8)}" for i in range(200)]
    pairs.write_text("\n".join(["anchor\tpositive", *rows]))
    sizes = ["--steps", 2, "--batch-size", 8, "--max-length", 16, "--sources", pairs]
    outputs = ["--work", tmp_path / "work", "--save", save, "--plot", plot]
    script("embedding_ablation", *sizes, *outputs, "--seeds", 0, 1)
    saved = json.loads(save.read_text())
    assert list(saved["table"]) == ["none", *PARTS]
    by_run = {(run["settings"]["without"], run["settings"]["seed"]): run for run in saved["runs"]}
    for part in PARTS:
        for measure in ("recall@10 at 64", "recall@10 at 32", "STS-B Spearman"):
            lacks = [by_run[part, s][measure] - by_run["none", s][measure] for s in (0, 1)]
            found, half = saved["table"][part][measure], 12.706 * abs(lacks[0] - lacks[1]) / 2
            assert found["mean"] == pytest.approx(sum(lacks) / 2, abs=1e-3)
            assert found["high"] - found["mean"] == pytest.approx(half, abs=2e-3)
    claims = {part: row.get("claimed_unverified_percent") for part, row in saved["table"].items()}
    assert claims["spectral"] == -1.5
    assert claims["angular"] is None
    counts = {part: row["parameters"] for part, row in saved["table"].items()}
    assert min(counts["spectral"], counts["anchor"], counts["bridge"]) < counts["none"]
    assert plot.read_bytes().startswith(b"\x89PNG")
