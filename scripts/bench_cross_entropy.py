r"""Speed and memory of the cross-entropies, against PyTorch's.

First part: forward and backward pass of `cross_entropy` against
``torch.nn.functional.cross_entropy`` (for StableMax, on `symlog` of the logits), 1,024 tokens and
32,000 classes in float32, blocks in the order A B B A; the ratio is the speed relative to
PyTorch's. Second part: a linear head of width 256 at 4,096 tokens, dense and in chunks, each in a
process of its own: seconds of the second pass, and peak memory, by which the largest resident set
(VmHWM of Linux) grows in the first pass above that with all inputs and parameters, after a pass of
the same code on a tiny head. The last line printed is one JSON object::

    python scripts/bench_cross_entropy.py --threads 2 \
        --save scripts/results/<date>_cross_entropy_cpu.json
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import SEED, report
from bench_low_rank import interleaved
from torch import Tensor
from torch.nn import functional as F

from spectral_lightning.losses import cross_entropy, linear_cross_entropy
from spectral_lightning.nn import symlog

NUM_TOKENS, VOCAB_SIZE = 1024, 32000
HEAD_TOKENS, HEAD_DIM = 4096, 256
CHUNKS = (64, 128, 256, 512, 1024)

Loss = Callable[[Tensor, Tensor], Tensor]


def speed(transform: str, quadruples: int) -> dict[str, Any]:
    """Time of forward and backward pass of ours and PyTorch's, and how far they differ."""
    generator = torch.Generator().manual_seed(SEED)
    logits = 3 * torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator)
    targets = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)

    def run(loss: Loss) -> Tensor:
        leaf = logits.detach().requires_grad_()
        loss(leaf, targets).backward()
        return leaf.grad

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(x, y, transform=transform)

    def torchs(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(symlog(x) if transform == "stablemax" else x, y)

    gradients = [run(loss) for loss in (ours, torchs)]
    difference = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
    timed = interleaved(lambda: run(ours), lambda: run(torchs), quadruples)
    return {"transform": transform, "difference": difference.item(), **timed}


def head(kind: str) -> dict[str, Any]:
    """Peak memory and time of one form of the linear head, in this process."""
    generator = torch.Generator().manual_seed(SEED)

    def head_of(vocab_size: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.randn(num_tokens, HEAD_DIM, generator=generator).requires_grad_()
        weight = torch.randn(vocab_size, HEAD_DIM, generator=generator).mul_(0.1).requires_grad_()
        return hidden, weight, torch.randint(vocab_size, (num_tokens,), generator=generator)

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
        hidden.grad = weight.grad = None
        if kind == "torch":
            loss = F.cross_entropy(F.linear(hidden, weight), targets)
        elif kind == "dense":
            loss = cross_entropy(F.linear(hidden, weight), targets)
        else:
            loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=int(kind))
        loss.backward()
        return loss.item()

    run(*head_of(8, 8))
    tensors = head_of(VOCAB_SIZE, HEAD_TOKENS)
    before = largest_resident_kib()
    loss = run(*tensors)
    peak = largest_resident_kib() - before
    start = time.perf_counter()
    run(*tensors)
    seconds = round(time.perf_counter() - start, 3)
    return {"kind": kind, "loss": loss, "peak_mib": round(peak / 1024, 1), "seconds": seconds}


def largest_resident_kib() -> int:
    """Largest resident set of this process since it started its program."""
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def heads(threads: int) -> list[dict[str, Any]]:
    """All forms of the linear head, each in a new process."""
    found = []
    for kind in ("torch", "dense", *map(str, CHUNKS)):
        command = [sys.executable, __file__, "--head", kind, "--threads", str(threads)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(result.stdout))
        found[-1]["peak_ratio"] = round(found[-1]["peak_mib"] / found[0]["peak_mib"], 3)
        print(found[-1], flush=True)
    return found


def main() -> None:
    """Run both parts, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quadruples", type=int, default=8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--head", help="measure one form of the linear head only")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.head:
        print(json.dumps(head(options.head)))
        return
    found = []
    for transform in ("softmax", "stablemax"):
        found.append(speed(transform, options.quadruples))
        print(found[-1], flush=True)
    shapes = {"tokens": NUM_TOKENS, "classes": VOCAB_SIZE}
    shapes |= {"head_tokens": HEAD_TOKENS, "head_dim": HEAD_DIM}
    results = {"speed": found, "head": heads(torch.get_num_threads())}
    report({"script": "bench_cross_entropy", **shapes, **results}, options.save)


if __name__ == "__main__":
    main()
