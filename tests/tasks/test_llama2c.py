"""Files of llama2.c: written here from a Llama, and a real trained one."""

import lzma
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from spectral_lightning.tasks import load_llama2c, load_llama2c_tokenizer, save_llama2c

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def interleaved(weight, heads):
    """Rows of each head as llama2.c has them: what turns together stands together."""
    rows, dim = weight.shape
    return weight.view(heads, 2, rows // heads // 2, dim).transpose(1, 2).reshape(rows, dim)


def write(model, path):
    config, layers = model.config, model.model.layers
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = [model.model.embed_tokens.weight]
    tensors += [layer.input_layernorm.weight for layer in layers]
    for name in NAMES:
        for layer in layers:
            weight = getattr(layer.self_attn, name).weight
            tensors.append(interleaved(weight, heads[name]) if name in heads else weight)
    tensors += [layer.post_attention_layernorm.weight for layer in layers]
    for name in ("gate_proj", "down_proj", "up_proj"):
        tensors += [getattr(layer.mlp, name).weight for layer in layers]
    head_dim = config.hidden_size // config.num_attention_heads
    tensors += [model.model.norm.weight, torch.zeros(config.max_position_embeddings, head_dim)]
    if not config.tie_word_embeddings:
        tensors.append(model.lm_head.weight)
    vocab_size = config.vocab_size if config.tie_word_embeddings else -config.vocab_size
    header = (32, 48, 2, 4, config.num_key_value_heads, vocab_size, 16)
    numbers = np.concatenate([t.detach().numpy().ravel() for t in tensors])
    path.write_bytes(struct.pack("<7i", *header) + numbers.astype("<f4").tobytes())


@pytest.fixture
def make_file(tmp_path):
    def make(kv_heads=2, tied=True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=16,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
        )
        model = LlamaForCausalLM(config)
        write(model, tmp_path / "model.bin")
        return model, tmp_path / "model.bin"

    return make


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_a_written_model_is_read_to_the_bit(make_file, kv_heads, tied):
    model, path = make_file(kv_heads, tied)
    loaded = load_llama2c(path)
    tokens = torch.arange(12)[None]
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_damaged_and_foreign_files_are_refused(make_file, tmp_path):
    _, path = make_file()
    content = path.read_bytes()
    for cut, sentence in (
        (content[:-4], "numbers after its header"),
        (struct.pack("<I", 0x616B3432) + content, "first version of llama2.c"),
        (content[:8], "first version of llama2.c"),
        (struct.pack("<7i", 32, 48, 2, 5, 2, 40, 16) + content[28:], "with sizes"),
    ):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=sentence):
            load_llama2c(path)
    with pytest.raises(FileNotFoundError, match="must be an existing file"):
        load_llama2c(tmp_path / "none.bin")


@pytest.fixture
def vocabulary(tmp_path):
    """Specials, bytes, and a few pieces whose scores decide what merges first."""
    pieces = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    pieces += [(f"<0x{i:02X}>".encode(), 0.0) for i in range(256)]
    pieces += [(b"bc", -1.0), (b"ab", -2.0), (b" a", -5.0), (b"abc", -4.0)]
    pieces += [(c.encode(), -9.0) for c in " abc"]
    path = tmp_path / "tok.bin"
    packed = b"".join(struct.pack("<fi", score, len(text)) + text for text, score in pieces)
    path.write_bytes(struct.pack("<i", 10) + packed)
    return path


def test_the_best_score_merges_first_and_strange_letters_become_bytes(vocabulary):
    tokenizer = load_llama2c_tokenizer(vocabulary, 267)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc a\u00e9")["input_ids"]) == [
        "<s>",
        "\u2581",
        "abc",
        "\u2581a",
        "<0xC3>",
        "<0xA9>",
    ]
    text = "abc a\u00e9 cab\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    with pytest.raises(ValueError, match=r"must hold 512 tokens, got .* with 267"):
        load_llama2c_tokenizer(vocabulary)


needs_data = pytest.mark.skipif(
    "SPECTRAL_DATA" not in os.environ, reason="SPECTRAL_DATA does not name a folder with weights"
)
GREEDY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    " One day, she saw a big, red ball. She wanted to play with it, but it was too high.\nLily's"
    ' mom said, "Lily, let\'s go to the park." Lily was sad'
)
"""How llama2.c's own test continues nothing with stories260K at temperature 0."""


@pytest.fixture
def stories(tmp_path):
    folder = Path(os.environ["SPECTRAL_DATA"]) / "weights"
    save_llama2c(folder / "stories260K.bin", folder / "tok512.bin", tmp_path / "stories")
    return tmp_path / "stories"


def documents(count):
    path = Path(os.environ["SPECTRAL_DATA"]) / "lm" / "tinystories-sample.txt.xz"
    with lzma.open(path, "rt", encoding="utf-8") as file:
        texts = file.read().split("<|endoftext|>")
    return [text.strip() for text in texts if text.strip()][:count]


@needs_data
def test_a_trained_model_reads_and_writes_stories(stories):
    model = AutoModelForCausalLM.from_pretrained(stories)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokens = model.generate(torch.tensor([[1]]), max_new_tokens=100, do_sample=False)[0]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert text.startswith(GREEDY)
    nats, num = 0.0, 0
    for document in documents(30):
        ids = torch.tensor([tokenizer(document)["input_ids"][:512]])
        with torch.no_grad():
            nats += F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum")
        num += ids.shape[1] - 1
    assert nats / num == pytest.approx(1.246, abs=0.03)


@needs_data
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_fine_tuning_a_trained_model_has_the_losses_of_hugging_face(stories):
    from spectral_lightning.tasks import HFCausalLM
    from spectral_lightning.testing.tasks import quiet_trainer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    ids = [torch.tensor(tokenizer(text)["input_ids"][:200]) for text in documents(24)]
    batches = []
    for number in range(0, 24, 3):
        rows = torch.nn.utils.rnn.pad_sequence(ids[number : number + 3], batch_first=True)
        lengths = torch.tensor([len(row) for row in ids[number : number + 3]])
        mask = torch.arange(rows.shape[1]) < lengths[:, None]
        labels = rows.masked_fill(~mask, -100)
        labels[:, : 20 * (number % 4)] = -100  # prompts of several lengths
        batches.append({"input_ids": rows, "attention_mask": mask.long(), "labels": labels})
    model, expected = AutoModelForCausalLM.from_pretrained(stories), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        expected.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()

    class Seen(HFCausalLM):
        losses = ()

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.losses += (loss.item(),)
            return loss

    task = Seen(
        str(stories), optimizer=lambda g: torch.optim.SGD(g, lr=0.05), warmdown_fraction=0.0
    )
    trainer = quiet_trainer(stories, max_steps=8)
    trainer.fit(task, torch.utils.data.DataLoader(batches, batch_size=None))
    assert list(task.losses) == pytest.approx(expected, abs=1e-6)
