"""The report on a model on disk: which tensors are measured, and what is said of each."""

import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectral_lightning.linalg import gaussian_stable_rank
from spectral_lightning.spectra import HealthyRange, ScanStatus, find_targets, scan_model


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def scan(tmp_path):
    """Report on tensors that are written to a safetensors file."""

    def run(tensors, *args, **settings):
        file = tmp_path / "model.safetensors"
        save_file(tensors, file)
        return scan_model(file, *args, **settings)

    return run


def by_name(report):
    return {layer.reading.name: layer for layer in report.layers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_matrix_is_measured_as_a_float64_decomposition_of_what_is_stored(scan, dtype):
    weights = {f"{m}x{n}": gaussian(m, n).to(dtype) for m, n in [(9, 5), (200, 150), (140, 300)]}
    layers = by_name(scan(weights))
    assert layers.keys() == weights.keys()
    for name, weight in weights.items():
        values = torch.linalg.svdvals(weight.double())
        stable_rank = (values.square().sum() / values[0] ** 2).item()
        reading = layers[name].reading
        assert reading.spectral_norm == pytest.approx(values[0].item(), rel=5e-6)
        assert reading.stable_rank == pytest.approx(stable_rank, rel=1e-5)
        ratio = stable_rank / gaussian_stable_rank(*weight.shape)
        assert reading.relative_stable_rank == pytest.approx(ratio, rel=1e-5)
        assert layers[name].dtype == str(dtype).removeprefix("torch.")


def test_the_worst_layer_comes_first(scan):
    healthy = gaussian(20, 20)
    spiked = healthy + 20 * torch.ones(20, 20)
    tensors = {
        "healthy": healthy,
        "orthogonal": torch.eye(20),
        "near": healthy + 2 * torch.ones(20, 20),
        "one": torch.outer(gaussian(20), gaussian(20, seed=1)),
        "spiked": spiked,
        "zero": torch.zeros(20, 20),
        "nan": torch.full((20, 20), math.nan),
    }
    report = scan(tensors, healthy=HealthyRange(floor=0.5, ceiling=2.0))
    names = [layer.reading.name for layer in report.layers]
    assert names == ["nan", "zero", "one", "spiked", "near", "orthogonal", "healthy"]
    assert [layer.status for layer in report.layers] == [
        ScanStatus.FAILED,
        ScanStatus.ZERO,
        ScanStatus.RANK_ONE,
        ScanStatus.BELOW,
        ScanStatus.BELOW,
        ScanStatus.ABOVE,
        ScanStatus.HEALTHY,
    ]
    assert report.layers[-2].distance == pytest.approx(
        math.log(20 / gaussian_stable_rank(20, 20) / 2)
    )
    assert report.layers[-1].distance == 0
    assert math.isnan(report.layers[0].distance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_of_rank_one_is_told_in_every_precision(scan, dtype):
    weight = torch.outer(gaussian(200), gaussian(300, seed=1)).to(dtype)
    (layer,) = scan({"w": weight}).layers
    assert layer.status is ScanStatus.RANK_ONE


@pytest.mark.parametrize("n", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("tall", [False, True])
def test_one_row_or_column_is_never_called_unhealthy(scan, n, tall):
    weight = gaussian(n, 1) if tall else gaussian(1, n)
    (layer,) = scan({"head.weight": weight}).layers
    assert layer.status is ScanStatus.HEALTHY
    assert layer.distance == 0
    assert layer.reading.stable_rank == pytest.approx(1)
    assert layer.reading.spectral_norm == pytest.approx(weight.norm().item())


def test_one_row_with_a_nan_or_zeros_is_told(scan):
    layers = by_name(scan({"nan": torch.full((1, 4), math.nan), "zero": torch.zeros(1, 4)}))
    assert layers["nan"].status is ScanStatus.FAILED
    assert layers["zero"].status is ScanStatus.ZERO


def test_an_empty_weight_is_skipped_and_said_so(scan):
    report = scan({"empty": torch.zeros(0, 4), "fc": gaussian(5, 4)})
    assert [layer.reading.name for layer in report.layers] == ["fc"]
    assert report.skipped == {"empty": "is of shape (0, 4), which is empty"}


def test_what_is_no_weight_matrix_is_skipped_with_the_reason(scan):
    report = scan(
        {
            "fc.weight": gaussian(5, 4),
            "fc.bias": gaussian(5),
            "scale": torch.ones(()),
            "quantised.weight": torch.ones(4, 4, dtype=torch.int8),
            "complex.weight": torch.ones(4, 4, dtype=torch.complex64),
            "float8.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
            "tok_embeddings.weight": gaussian(9, 4),
            "wte.weight": gaussian(9, 4),
            "attn.bias": torch.ones(1, 1, 4, 4),
            "volume": torch.ones(1, 1, 1, 1, 2, 2),
            "normed.weight_v": gaussian(5, 4),
        }
    )
    assert [layer.reading.name for layer in report.layers] == ["fc"]
    assert report.num_vectors == 2
    reasons = {name: reason.split()[2:4] for name, reason in report.skipped.items()}
    assert report.skipped["quantised"] == "is stored as int8, which is quantised or not real"
    assert "quantised or not real" in report.skipped["float8"]
    assert "quantised or not real" in report.skipped["complex"]
    assert reasons["tok_embeddings"] == reasons["wte"] == ["embedding", "table"]
    assert report.skipped["attn.bias"] == "is a bias, mask or table by its name"
    assert "whose meaning is unknown" in report.skipped["volume"]
    assert "reparametrized" in report.skipped["normed.weight_v"]


def test_embedding_tables_are_measured_when_asked_for(scan):
    tensors = {"model.embed_tokens.weight": gaussian(9, 4), "embed_proj.weight": gaussian(4, 4)}
    assert by_name(scan(tensors)).keys() == {"embed_proj"}
    assert by_name(scan(tensors, embeddings=True)).keys() == {"embed_proj", "model.embed_tokens"}


def test_convolutions_are_flattened_and_experts_taken_apart(scan):
    conv, experts = gaussian(6, 3, 2, 2), gaussian(2, 5, 4)
    layers = by_name(scan({"conv.weight": conv, "mlp.experts.up": experts}))
    assert layers.keys() == {"conv", "mlp.experts.up.0", "mlp.experts.up.1"}
    assert layers["conv"].reading.shape == (6, 12)
    assert layers["conv"].stored_shape == (6, 3, 2, 2)
    for index in range(2):
        norm = torch.linalg.matrix_norm(experts[index].double(), 2).item()
        found = layers[f"mlp.experts.up.{index}"].reading.spectral_norm
        assert found == pytest.approx(norm, rel=5e-6)


def test_names_are_those_a_monitor_gives(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.Conv2d(2, 3, 3), nn.Sequential(nn.Linear(8, 2)))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    found = {target.name for target in find_targets(model).targets}
    assert by_name(scan_model(tmp_path / "model.pt")).keys() == found


def test_wrapped_names_lose_their_wrappers_and_stay_unique(scan):
    tensors = {
        "_orig_mod.blocks.0.weight": gaussian(4, 4),
        "same": gaussian(4, 5),
        "same.weight": gaussian(4, 6),
    }
    shapes = {name: layer.reading.shape for name, layer in by_name(scan(tensors)).items()}
    assert shapes == {"blocks.0": (4, 4), "same": (4, 5), "same.weight": (4, 6)}


def test_tensors_that_share_memory_are_measured_once(tmp_path):
    weight = gaussian(6, 4)
    torch.save({"first": weight, "second": weight, "half": weight[:3]}, tmp_path / "model.pt")
    report = scan_model(tmp_path / "model.pt")
    assert by_name(report).keys() == {"first", "half"}
    assert report.skipped == {"second": "shares its memory with first"}


def test_a_glob_selects_layers_and_one_without_a_match_is_refused(scan):
    tensors = {f"blocks.{i}.{part}.weight": gaussian(4, 4) for i in (0, 1) for part in ("a", "b")}
    tensors["wte.weight"] = gaussian(9, 4)
    assert by_name(scan(tensors, ["blocks.0.*", "*.b"])).keys() == {
        "blocks.0.a",
        "blocks.0.b",
        "blocks.1.b",
    }
    with pytest.raises(ValueError, match=r"`layers` must match .* got 'c\.\*'; the model has bloc"):
        scan(tensors, ["*.a", "c.*"])
    with pytest.raises(ValueError, match=r"got 'wte'; wte is an embedding table by its name"):
        scan(tensors, "wte")


def test_a_model_without_matrices_is_refused(scan):
    with pytest.raises(ValueError, match="the model has no weight matrices that can be measured"):
        scan({"bias": torch.ones(3)})


def test_progress_counts_every_layer(scan):
    seen = []
    tensors = {str(i): gaussian(5 + i, 4) for i in range(3)}
    scan(tensors, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


PEAK = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from spectral_lightning.spectra import scan_model

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

torch.set_num_threads(1)
small = Path(sys.argv[1]).with_name("small.safetensors")
save_file({"w": torch.ones(200, 200)}, small)
scan_model(small)
before = memory("VmRSS")
report = scan_model(sys.argv[1])
assert len(report.layers) == int(sys.argv[2])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's account of memory")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_memory_is_bounded_by_the_largest_matrix(tmp_path, suffix):
    weight = gaussian(4608, 1024).add_(gaussian(4608, 1)).bfloat16()  # 9 MiB, 18 in float32
    tensors = {f"blocks.{i}.weight": weight.clone() for i in range(30)}
    file = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors, "optimizer_states": []}, file)
    else:
        save_file(tensors, file)
    command = [sys.executable, "-c", PEAK, str(file), str(len(tensors))]
    # Else glibc may keep what was freed, as little as nothing or as much as two matrices.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    file_mib = file.stat().st_size / 2**20
    assert file_mib > 260
    assert float(result.stdout) < 95, "32 MiB of the file, a matrix, its copy, and some scratch"
