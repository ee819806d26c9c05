"""What protecting principal directions buys when the training text changes: a frontier.

A byte-level Llama (4 layers of width 128) learns text A, then text B. Every arm starts from the
same weights and sees the same batches of B; reported are the losses on held-out A (retention) and B
(plasticity). As a smaller learning rate alone buys retention too, each arm runs at several rates
and is judged against plain training at *any* rate: `gain` is how much lower its loss on A is than
that of plain training at the same loss on B, interpolated between rates. Bases are those of the
weights after A. Prints a table and one JSON object as its last line::

    python scripts/svd_retention.py --first shakespeare.txt --second stories.txt

Without files A is the documentation that ships with CPython and B the source of its library.
"""

import argparse
import itertools
import random
import statistics
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from assr_stress import Llama, read_text, windows
from bench_common import report
from torch import Tensor, nn
from torch.nn import functional as F

from spectral_lightning.actuators import ProtectedPart
from spectral_lightning.linalg import orthonormalize, singular_triplets
from spectral_lightning.nn import FactoredLinear, add_factors

BATCH, NUM_EVALUATED, WARM_UP = 16, 12, 10
RATES = {"plain": (3e-5, 1e-4, 2e-4, 3e-4, 6e-4, 1e-3, 2e-3)}
OTHER_RATES = (3e-4, 1e-3, 2e-3)


class Arm(NamedTuple):
    """One way to train on B: what is protected, of how many directions, from which basis."""

    side: str | None = None
    fraction: float = 0.25
    basis: str = "weight"
    pull: float = 0.0


ARMS: dict[str, Arm] = {"plain": Arm()}
ARMS |= {f"L2 pull {pull:g}": Arm(pull=pull) for pull in (0.003, 0.01, 0.03)}
ARMS |= {
    f"{side} {fraction:g}": Arm(side, fraction)
    for side in ("two_sided", "left", "right", "block")
    for fraction in (0.125, 0.25, 0.5)
}
ARMS |= {
    f"{basis} {side} {fraction:g}": Arm(side, fraction, basis)
    for basis, side in (
        ("inputs", "right"),
        ("inputs", "block"),
        ("weighted", "block"),
        ("weighted", "left"),
    )
    for fraction in (0.125, 0.25)
}
ARMS |= {f"inputs right {fraction:g}": Arm("right", fraction, "inputs") for fraction in (0.06, 0.5)}
ARMS |= {f"gradients right {f:g}": Arm("right", f, "gradients") for f in (0.125, 0.25, 0.5)}
ARMS |= {"legacy 0.25": Arm("legacy")}
ARMS |= {"inputs two_sided 0.25": Arm("two_sided", 0.25, "inputs")}


def tokens_of(path: Path | None, kind: str) -> tuple[Tensor, Tensor]:
    """Bytes to train on and held-out bytes."""
    if path is not None or kind == "first":
        return read_text(path)
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py"))
    random.Random(0).shuffle(files)
    text = b"\n".join(file.read_bytes() for file in files)[:3_000_000]
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    split = int(0.9 * len(tokens))
    return tokens[:split], tokens[split:]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss in nats per byte."""
    logits = model(tokens)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out(model: nn.Module, tokens: Tensor) -> float:
    """Loss on some fixed windows of held-out text."""
    batches = windows(tokens, NUM_EVALUATED, seed=12345, batch=BATCH)
    return statistics.fmean(loss_of(model, batch).item() for batch in batches)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the blocks."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: module for name, module in found.items() if ".layers." in name}


def covariances(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Second moment of each layer's inputs, shape ``(n, n)``."""
    sums: dict[str, Tensor] = {}
    handles = []
    for name, module in linears(model).items():

        def add(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            x = inputs[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.mT @ x

        handles.append(module.register_forward_pre_hook(add))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return sums


def gradient_moments(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Second moment of the rows of each layer's gradient, shape ``(n, n)``."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        model.zero_grad()
        loss_of(model, batch).backward()
        for name, module in linears(model).items():
            gradient = module.weight.grad.double()  # type: ignore[union-attr]
            sums[name] = sums.get(name, 0) + gradient.mT @ gradient
    model.zero_grad()
    return sums


def parts_of(model: nn.Module, arm: Arm, batches: list[Tensor]) -> dict[str, ProtectedPart]:
    """Protected part of each layer.

    Basis ``weight``: singular vectors of ``W``. ``inputs``: the strongest inputs (eigenvectors of
    their second moment ``C``), and the strongest outputs, left singular vectors of ``W C^(1/2)``.
    ``gradients``: the inputs that the gradients on A read. ``weighted``: the same outputs, and the
    inputs that make them, ``C^(1/2)`` times right singular
    vectors.
    """
    if arm.side in (None, "legacy"):
        return {}
    moments = {}
    if arm.basis == "gradients":
        moments = gradient_moments(model, batches)
    elif arm.basis != "weight":
        moments = covariances(model, batches)
    parts = {}
    for name, module in linears(model).items():
        weight = module.weight.detach()
        k = int(arm.fraction * min(weight.shape))
        if arm.basis == "weight":
            left, _, right = singular_triplets(weight)
        else:
            eigen = singular_triplets(moments[name])  # symmetric: vectors of both sides agree
            root = eigen.left * eigen.values.sqrt() @ eigen.left.mT
            found = singular_triplets(weight.double() @ root)
            left = found.left.float()
            right = eigen.left
            if arm.basis == "weighted":
                right = orthonormalize(root @ found.right)
            right = right.float()
        parts[name] = ProtectedPart(weight, left[:, :k], right[:, :k], arm.side)  # type: ignore[arg-type]
    return parts


def split(model: nn.Module, fraction: float) -> None:
    """Put the minor directions of each layer into factors, as the original trains them."""
    add_factors(model, set(linears(model).values()))
    for module in linears(model).values():
        assert isinstance(module, FactoredLinear)
        left, values, right = singular_triplets(module.weight)
        k = int(fraction * len(values))
        module.split_(left[:, k:], values[k:], right[:, k:])


def train(
    model: nn.Module,
    batches: list[Tensor],
    lr: float,
    parts: dict[str, ProtectedPart],
    pull: float = 0.0,
) -> None:
    """AdamW with warm-up; protected parts stay, and `pull` draws all weights to where they were."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    layers = linears(model)
    anchors = [p.detach().clone() for p in model.parameters()] if pull else []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARM_UP)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        for module in layers.values():
            if isinstance(module, FactoredLinear):
                module.weight.grad = None  # only the factors are stepped
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name, part in parts.items():
            part.remove_(layers[name].weight.grad)  # type: ignore[arg-type]
        optimizer.step()
        for name, part in parts.items():
            part.restore_(layers[name].weight.data)
        with torch.no_grad():  # decoupled, as AdamW's own decay, but relative to the step
            for parameter, anchor in zip(model.parameters(), anchors, strict=False):
                parameter.lerp_(anchor, pull * min(1.0, (step + 1) / WARM_UP))


def run(job: tuple[int, list[tuple[str, float]]], options: argparse.Namespace) -> list[Any]:
    """All arms of one seed that a process takes, from one training on A."""
    seed, tasks = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    first, second = tokens_of(options.first, "first"), tokens_of(options.second, "second")
    model = Llama()
    train(model, windows(first[0], options.first_steps, seed, BATCH), 1e-3, {})
    before = held_out(model, first[1]), held_out(model, second[1])
    batches = windows(second[0], options.second_steps, seed + 1000, BATCH)
    known = windows(first[0], 8, seed + 2000, BATCH)
    found: list[Any] = [{"arm": "before", "lr": 0.0, "seed": seed, "A": before[0], "B": before[1]}]
    for name, lr in tasks:
        arm, copy = ARMS[name], deepcopy(model)
        if arm.side == "legacy":
            split(copy, arm.fraction)
        train(copy, batches, lr, parts_of(copy, arm, known), arm.pull)
        losses = {"A": held_out(copy, first[1]), "B": held_out(copy, second[1])}
        found.append({"arm": name, "lr": lr, "seed": seed, **losses})
        print(found[-1], flush=True)
    return found


def gain(point: dict[str, float], frontier: list[dict[str, float]]) -> float | None:
    """Loss on A below that of plain training at the same loss on B.

    Below the lowest loss on B that plain training reaches at any rate, it is compared with plain
    training there, which is less than it deserves; above the highest, None.
    """
    if not frontier:
        return None
    ordered = sorted(frontier, key=lambda other: other["B"])
    if point["B"] < ordered[0]["B"]:
        return ordered[0]["A"] - point["A"]
    for low, high in itertools.pairwise(ordered):
        if low["B"] <= point["B"] <= high["B"]:
            share = (point["B"] - low["B"]) / (high["B"] - low["B"])
            return low["A"] + share * (high["A"] - low["A"]) - point["A"]
    return None


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of each arm and rate, with the paired gain of each seed."""
    rows = []
    keys = dict.fromkeys((run["arm"], run["lr"]) for run in runs)
    for arm, lr in keys:
        mine = [r for r in runs if (r["arm"], r["lr"]) == (arm, lr)]
        gains = [
            gain(r, [o for o in runs if o["arm"] == "plain" and o["seed"] == r["seed"]])
            for r in mine
            if arm not in ("plain", "before")
        ]
        known = [g for g in gains if g is not None]
        row = {"arm": arm, "lr": lr, "seeds": len(mine)}
        row |= {key: round(statistics.fmean(r[key] for r in mine), 4) for key in ("A", "B")}
        row["gain"] = round(statistics.fmean(known), 4) if known else None
        best = min((r["B"] for r in runs if r["arm"] == "plain"), default=0.0)
        row["beyond"] = sum(r["B"] < best for r in mine)
        row["gains"] = [None if g is None else round(g, 4) for g in gains]
        rows.append(row)
    return rows


def main() -> None:
    """Run all arms at all rates and seeds, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=Path, help="text A (.txt or .txt.xz)")
    parser.add_argument("--second", type=Path, help="text B")
    parser.add_argument("--first-steps", type=int, default=250)
    parser.add_argument("--second-steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--without-plain", action="store_true", help="gains are then unknown")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    first = [] if options.without_plain else ["plain"]
    names = list(dict.fromkeys([*first, *options.arms]))
    tasks = [(name, lr) for name in names for lr in RATES.get(name, OTHER_RATES)]
    jobs = [
        (seed, tasks[part :: options.processes])
        for seed in range(options.seeds)
        for part in range(options.processes)
    ]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        results = list(pool.map(run, jobs, itertools.repeat(options)))
    runs = [entry for found in results for entry in found]
    rows = summary(runs)
    for row in rows:
        numbers = f"A {row['A']:.4f}  B {row['B']:.4f}  gain {row['gain']}"
        print(f"{row['arm']:24} lr {row['lr']:<8g} {numbers}  beyond {row['beyond']}")
    texts = {
        "A": "CPython's documentation" if options.first is None else options.first.name,
        "B": "CPython's library" if options.second is None else options.second.name,
    }
    settings = {
        "threads_per_process": 1,
        "first_steps": options.first_steps,
        "second_steps": options.second_steps,
    }
    report({"script": "svd_retention", **settings, "texts": texts, "rows": rows}, options.save)


if __name__ == "__main__":
    main()
