"""The notebooks run from top to bottom, with no network and no file but the package."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

# Number of pictures, and what the text shows.
EXPECTED = {"01_monitor_your_own_module": (5, "Layers whose stable rank is farthest from random")}

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook, kind):
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [output for cell in cells for output in cell.outputs if output.output_type == kind]


def test_notebook_is_committed_without_output(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_notebook_needs_nothing_outside_the_package(path):
    text = path.read_text()
    assert "../" not in text
    assert not [word for word in ("http://", "https://", "!pip", "%pip") if word in text]


@pytest.mark.slow
def test_notebook_runs_and_shows_its_pictures(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=60,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    streams = outputs(notebook, "stream")
    assert [stream.text for stream in streams if stream.name == "stderr"] == []
    shown = [output.data for output in outputs(notebook, "display_data")]
    num_pictures, text = EXPECTED[path.stem]
    assert sum("image/png" in data for data in shown) == num_pictures
    assert any(text in data["text/plain"] for data in shown)
    assert {file.name for file in tmp_path.iterdir()} <= {"ipython", "runtime"}
