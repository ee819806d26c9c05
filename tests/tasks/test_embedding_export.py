import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import spectral_lightning.models.spectra  # noqa: F401 - knows the architecture
from spectral_lightning.tasks import export_sentence_encoder
from tests.tasks.embedding_cases import BERT, make_task, pairs_data

TEXTS = ["a matrix", "the value of a norm", "x"]


@pytest.fixture
def make_encoder(tmp_path):
    def make(head="semantic", model=None):
        task = make_task(model)
        data = pairs_data(tmp_path)
        data.prepare_data()
        data.setup("fit")
        task._tokenizer, task.max_length = data.tokenizer, 16
        return task.encoder(head)

    return make


@pytest.mark.parametrize("head", ["semantic", "entity", "retrieval", "anchor"])
def test_sentence_transformers_gives_the_same_vectors(make_encoder, tmp_path, head):
    encoder = make_encoder(head)
    export_sentence_encoder(encoder, tmp_path / "out")
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert abs(loaded.encode(TEXTS) - encoder.encode(TEXTS)).max() < 1e-5
    assert abs(loaded.encode(TEXTS[0]) - encoder.encode(TEXTS)[0]).max() < 1e-5
    assert loaded.max_seq_length == 16
    assert loaded.similarity_fn_name == "cosine"


def test_a_backbone_of_hugging_face_loads_as_itself(make_encoder, tmp_path):
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path / "bert")
    encoder = make_encoder(model=str(tmp_path / "bert"))
    export_sentence_encoder(encoder, tmp_path / "out")
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert abs(loaded.encode(TEXTS) - encoder.encode(TEXTS)).max() < 1e-5
    assert not list((tmp_path / "out").rglob("*.py"))
    assert "trust_remote_code" not in (tmp_path / "out" / "README.md").read_text()


def test_hugging_face_gives_all_heads(make_encoder, tmp_path):
    encoder = make_encoder()
    export_sentence_encoder(encoder, tmp_path / "out", "huggingface")
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(batch["input_ids"], batch["attention_mask"])
    for head in encoder.head_dims:
        expected = torch.from_numpy(encoder.encode(TEXTS, head=head))
        torch.testing.assert_close(output[head], expected, rtol=0, atol=1e-5)


def test_a_file_of_weights_has_four_bytes_per_parameter(make_encoder, tmp_path):
    encoder = make_encoder()
    export_sentence_encoder(encoder, tmp_path / "out", "safetensors")
    (path,) = (tmp_path / "out").iterdir()
    num_weights = sum(weight.numel() for weight in encoder.model.parameters())
    assert 4 * num_weights <= path.stat().st_size < 4.1 * num_weights
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        assert set(file.keys()) == set(encoder.model.state_dict())
    assert config["hidden_size"] == 64


@pytest.mark.parametrize("format", ["sentence-transformers", "huggingface"])
def test_the_card_says_how_to_use_prefixes(make_encoder, tmp_path, format):
    export_sentence_encoder(make_encoder(), tmp_path / "out", format)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "truncate_dim=32, normalize_embeddings=True" in card
    assert "head `semantic`, 64 dimensions" in card
    export_sentence_encoder(make_encoder("anchor"), tmp_path / "anchor", format)
    assert "truncate_dim" not in (tmp_path / "anchor" / "README.md").read_text()


@pytest.mark.parametrize(
    ("format", "alone"), [("sentence-transformers", True), ("huggingface", False)]
)
def test_the_snippet_of_the_card_runs_in_a_fresh_process(make_encoder, tmp_path, format, alone):
    encoder = make_encoder()
    export_sentence_encoder(encoder, tmp_path / "out", format)
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", "out")
    if alone:  # as the card says for whoever has not installed this library
        code = code.replace("import spectral_lightning", "# ")
        code = code.replace('("out")', '("out", trust_remote_code=True)')
        code = "import sys\nsys.modules['spectral_lightning'] = None\n" + code
    code += "\nprint(float(abs(vectors - expected).max()))"
    expected = encoder.encode(["A sentence.", "Another one."]).tolist()
    code = f"import numpy\nexpected = numpy.array({expected})\n" + code.replace(
        "abs(vectors", "abs(numpy.array(vectors.tolist())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout.split()[-1]) < 1e-5


def test_the_card_counts_what_is_in_the_folder(make_encoder, tmp_path):
    export_sentence_encoder(make_encoder("anchor"), tmp_path / "out")
    files = (tmp_path / "out").rglob("*.safetensors")
    count = sum(t.numel() for path in files for t in load_file(path).values())
    assert f" {count:,} parameters" in (tmp_path / "out" / "README.md").read_text()


def test_an_encoder_that_cuts_its_vectors_is_refused(make_encoder, tmp_path):
    encoder = make_encoder()
    encoder.dim = 32
    with pytest.raises(ValueError, match=r"`encoder` must give whole vectors .* dim=32"):
        export_sentence_encoder(encoder, tmp_path / "out")


def test_exporting_leaves_the_model_in_its_mode(make_encoder, tmp_path):
    encoder = make_encoder()
    encoder.model.train()
    export_sentence_encoder(encoder, tmp_path / "out")
    assert all(module.training for module in encoder.model.modules())


def test_a_head_without_modules_is_refused_and_nothing_written(make_encoder, tmp_path):
    with pytest.raises(ValueError, match=r"`head` must be semantic, .* 'ranking'; use the fo"):
        export_sentence_encoder(make_encoder("ranking"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_refused(make_encoder, tmp_path):
    with pytest.raises(ValueError, match=r"`format` must be one of sentence-tr.*'onnx'"):
        export_sentence_encoder(make_encoder(), tmp_path / "out", "onnx")


def test_a_folder_that_holds_something_is_refused(make_encoder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="`output` must be a new or an empty folder, but"):
        export_sentence_encoder(make_encoder(), tmp_path / "out")
    with pytest.raises(ValueError, match="`output` must be a new or an empty folder, but"):
        export_sentence_encoder(make_encoder(), tmp_path / "out" / "mine.txt")
