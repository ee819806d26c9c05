"""Do ranks follow a need that rises and falls? Linear teachers whose ranks change during a run.

Layers of 64 x 64 learn teachers of known rank, by AdamW on isotropic inputs that are new at every
step (`testing.teachers`), under `RankAdaptation` with its defaults; so a layer needs exactly its
teacher's rank, which no bound of the controller's clock gives away. `EnergyController`: one layer,
ranks 16, 32, 24, 32, 16; with the lazy intervals of the default clock, and with checks at equal
distances. `BudgetAllocator`: two layers of ranks 16 and 32, a budget that just holds both, and
teachers that swap their ranks twice. Told for each phase and layer: the rank at its end, optimizer
steps from the switch until the rank was the teacher's within a quantum, and until it last changed,
how far it went beyond the teacher's, and how often it changed its direction. One JSON object comes
last::

    python scripts/low_rank_teacher.py --save scripts/results/<date>_low_rank_teacher_cpu.json
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from bench_common import SEED, quiet_trainer, report

from spectral_lightning.callbacks import RankAdaptation
from spectral_lightning.control import BudgetAllocator, EnergyController, RankController
from spectral_lightning.testing.teachers import TeacherTask

DIM, CAPACITY, START = 64, 48, 24
DECAY = 0.97
"""Ratio of neighbouring singular values of a teacher."""
RISING_AND_FALLING = [[16], [32], [24], [32], [16]]
SWAPPING = [[16, 32], [32, 16], [16, 32]]
BUDGET = (16 + 32) * 2 * DIM
"""Parameters of both teachers."""


def runs() -> dict[str, tuple[RankController, list[list[int]]]]:
    """Controller, and the teachers' ranks for each phase, by name."""
    lazy, budget = EnergyController(), BudgetAllocator(budget=float(BUDGET))
    eager = replace(lazy, clock=replace(lazy.clock, interval_max=lazy.clock.interval))
    return {
        "EnergyController": (lazy, RISING_AND_FALLING),
        "EnergyController, checks at equal distances": (eager, RISING_AND_FALLING),
        "BudgetAllocator": (budget, SWAPPING),
    }


def follow(
    controller: RankController, phases: list[list[int]], phase_steps: int, seed: int
) -> TeacherTask:
    """Train; the task has the ranks."""
    task = TeacherTask(
        phases, phase_steps, rank=START, capacity=CAPACITY, dim=DIM, decay=DECAY, seed=seed
    )
    adaptation, num_steps = RankAdaptation(controller=controller), phase_steps * len(phases)
    quiet_trainer(accelerator="cpu", callbacks=[adaptation], max_steps=num_steps).fit(task)
    return task


def describe(
    ranks: Sequence[int], before: int, teacher: int, old_teacher: int, quantum: int
) -> dict[str, Any]:
    """How a layer's rank went in one phase.

    Args:
        ranks: After each optimizer step of the phase.
        before: At the end of the phase before.
        teacher: Rank of its teacher.
        old_teacher: The same in the phase before.
        quantum: The clock's.
    """
    changes = [i for i, (old, new) in enumerate(pairwise([before, *ranks]), 1) if new != old]
    path = [rank for rank, _ in groupby([before, *ranks])]
    moves = [new - old for old, new in pairwise(path)]
    near = [i for i, rank in enumerate(ranks, 1) if abs(rank - teacher) <= quantum]
    beyond = teacher - min(ranks) if teacher < old_teacher else max(ranks) - teacher
    return {
        "teacher": teacher,
        "rank": ranks[-1],
        "within_quantum_after": near[0] if near else None,
        "last_change_after": changes[-1] if changes else 0,
        "overshoot": max(0, beyond),
        "flips": sum((a > 0) != (b > 0) for a, b in pairwise(moves)),
        "path": path,
    }


def phases_of(task: TeacherTask, quantum: int) -> list[dict[str, Any]]:
    """`describe` all phases of all layers."""
    found, size = [], task.phase_steps
    for layer, ranks in enumerate(zip(*task.ranks, strict=True)):
        before = old_teacher = START
        for phase, teachers in enumerate(task.phases):
            part, teacher = ranks[phase * size : (phase + 1) * size], teachers[layer]
            record = describe(part, before, teacher, old_teacher, quantum)
            found.append({"layer": layer, "phase": phase, **record})
            before, old_teacher = part[-1], teacher
    return found


def summary(records: Sequence[dict[str, Any]], quantum: int) -> dict[str, Any]:
    """What all seeds, phases and layers of a run have in common; of steps: least, median, most."""
    switches = [record for record in records if record["phase"] > 0]
    near = [record["within_quantum_after"] for record in switches]
    far = [steps for steps in near if steps is not None and steps > 1]  # not near from the start
    last = [record["last_change_after"] for record in switches]
    return {
        "quantum": quantum,
        "largest_error_at_the_end_of_a_phase": max(abs(r["rank"] - r["teacher"]) for r in records),
        "phases_never_within_a_quantum": near.count(None),
        "steps_until_within_a_quantum": [min(far), statistics.median(far), max(far)],
        "steps_until_the_last_change": [min(last), statistics.median(last), max(last)],
        "largest_overshoot": max(record["overshoot"] for record in records),
        "most_flips_in_a_phase": max(record["flips"] for record in records),
    }


def main() -> None:
    """Run all controllers for all seeds, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--phase-steps", type=int, default=5500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # products are small
    results: dict[str, Any] = {}
    for name, (controller, phases) in runs().items():
        quantum, found, most = controller.clock.quantum, {}, 0
        for seed in range(SEED, SEED + options.seeds):
            task = follow(controller, phases, options.phase_steps, seed)
            found[seed] = phases_of(task, quantum)
            most = max(most, *(sum(ranks) * 2 * DIM for ranks in task.ranks))
            print(name, seed, *(record["path"] for record in found[seed]), flush=True)
        everything = [record for records in found.values() for record in records]
        results[name] = {
            "summary": summary(everything, quantum) | {"most_parameters": most},
            "seeds": found,
        }
    shared = {"phase_steps": options.phase_steps, "budget": BUDGET, "start": START, "decay": DECAY}
    report({"script": "low_rank_teacher", **shared, "runs": results}, options.save)


if __name__ == "__main__":
    main()
