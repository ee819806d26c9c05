import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from spectral_lightning.models import spectra
from spectral_lightning.models.spectra import SpectraModel

WITHOUT_THE_LIBRARY = """
import sys
sys.modules["spectral_lightning"] = None  # importing it fails from now on
import torch
from transformers import AutoModel
folder, ids, output = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
torch.save(dict(model(torch.load(ids))), output)
"""


@pytest.mark.parametrize(
    "settings", [{}, {"learnable_fractal": False, "learnable_fusion": False, "norm": "post"}]
)
@pytest.mark.parametrize("auto", [SpectraModel, AutoModel])
def test_a_saved_model_comes_back_to_the_bit(build, texts, tmp_path, settings, auto):
    model = build(**settings)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data += 0.01 * torch.rand_like(tensor)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is SpectraModel
    outputs = loaded(texts(3, 9))
    assert len(outputs) == 10
    for name, value in model(texts(3, 9)).items():
        assert torch.equal(outputs[name], value), name


def test_a_saved_model_loads_without_the_library(build, texts, tmp_path, monkeypatch):
    model, ids = build(), texts(3, 9)
    folder, ids_file, output_file = (str(tmp_path / name) for name in ("model", "ids", "output"))
    model.save_pretrained(folder)
    torch.save(ids, ids_file)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-c", WITHOUT_THE_LIBRARY, folder, ids_file, output_file]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outputs = torch.load(output_file)
    for name, value in model(ids).items():
        assert torch.equal(outputs[name], value), name


def test_a_loaded_prefix_of_a_model_starts_its_new_heads_afresh(build, tmp_path):
    build(use_ranking=False, use_spectral=False, fractal_depth=0).save_pretrained(tmp_path)
    settings = {"use_ranking": True, "use_spectral": True, "fractal_depth": 1}
    model = SpectraModel.from_pretrained(tmp_path, **settings)
    attention = model.encoder.layers[1].attention
    assert attention.fractal.tolist() == pytest.approx([0.02])
    assert attention.spectral.fusion().item() == pytest.approx(0.1)
    assert model.heads.ranking.basis.std().item() == pytest.approx(0.02, rel=0.1)


def test_the_files_that_travel_need_only_torch_and_transformers():
    wrong = []
    for path in Path(spectra.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            wrong += [
                f"{path.name} imports {name}"
                for name in names
                if name.split(".")[0] not in sys.stdlib_module_names | {"torch", "transformers"}
            ]
    assert wrong == []
