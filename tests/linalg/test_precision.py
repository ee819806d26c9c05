"""Whatever a run has switched on for its own products does not reach a reading."""

import pytest
import torch

from spectral_lightning.linalg import full_precision, leading_triplets

CPU = torch.device("cpu")
BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def settings():
    return [backend.fp32_precision for backend in BACKENDS]


@pytest.fixture
def restored():
    """Put the process's settings back after a test."""
    before = settings()
    yield
    for backend, setting in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = setting


def reading():
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    start = torch.randn(1, 2, 256, generator=torch.Generator().manual_seed(1))
    return leading_triplets([weight], start, num_passes=3)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_of_the_run_changes_no_reading_and_stays_as_it_was(precision):
    for backend in BACKENDS:
        backend.fp32_precision = "ieee"
    expected = reading()
    chosen = {"highest": ["ieee"] * 2, "high": ["tf32"] * 2, "medium": ["tf32", "bf16"]}[precision]
    for backend, setting in zip(BACKENDS, chosen, strict=True):
        backend.fp32_precision = setting
    assert all(map(torch.equal, reading(), expected))
    assert settings() == chosen


def test_autocast_changes_no_reading():
    expected = reading()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = reading()
        assert torch.is_autocast_enabled("cpu")
    assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("restored")
def test_settings_are_put_back_after_an_error():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with pytest.raises(RuntimeError, match="inside"), full_precision(CPU):
        raise RuntimeError(f"inside {torch.backends.mkldnn.matmul.fp32_precision}")
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_default_settings_are_not_written_to(monkeypatch):
    writes = []
    monkeypatch.setattr(
        torch._C, "_set_fp32_precision_setter", lambda *setting: writes.append(setting)
    )
    with full_precision(CPU):
        pass
    assert writes == []
