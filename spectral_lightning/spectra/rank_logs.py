"""Logs of ranks as the scripts write them that this library was modelled on.

The scripts v8, v9, v10, v13, v14, v15 and v18 of TheApeMachine/adaptive-low-rank-training on GitHub
each log JSON lines with keys of their own, which tell the script. Lives here: reading them. Does
not live here: writing them (`rank_log_lines`), and our own format (`rank_events`).
"""

import json
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectral_lightning.spectra.rank_events import read_rank_events
from spectral_lightning.spectra.rank_history import (
    RankChange,
    RankHistory,
    RankPoint,
    RankSpread,
    Unit,
    controller_floor,
    finite,
)
from spectral_lightning.spectra.run_files import strict

_V10_LAYERS = ("q", "k", "v", "o", "ffn_up", "ffn_down")  # of each block, in this order
_CLOCKS = {"v8": "epoch", "v9": "epoch", "v10": "epoch", "v18": "step"}
_TARGETS = ("raw_target", "target_rank", "spectral_target", "spectral_rank")  # v18, v8, v9, v15
_SPREADS = (
    ("rank_min", "rank_avg", "rank_max"),
    ("r_min", "r_avg", "r_max"),
    ("r_min", "r_mean", "r_max"),
)
_Row = dict[str, Any]


def read_rank_log(path: str | Path) -> RankHistory:
    """Read a log of v8, v9, v10, v13, v14, v15 or v18, or our own rank events.

    v10 does not log names; ``blocks.0.q``, ``k``, ``v``, ``o``, ``ffn_up``, ``ffn_down``,
    ``blocks.1.q`` and so on are made up in its order. In logs of v18 the key ``step`` of a change
    holds the change, so its time is that of the update that it belongs to. A last line that is cut
    off, as a killed run leaves it, is left out and noted.

    Args:
        path: File of JSON lines.

    Raises:
        ValueError: If a line before the last is no JSON object, if no line has the keys of one of
            these scripts, or if the ranks of v10 are not six for each block.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    rows, notes = _rows(path)
    if rows and "event" in rows[0]:
        history = RankHistory.of(read_rank_events(path))
        return replace(history, notes=[*history.notes, *notes])
    script = _script(rows)
    if script is None:
        raise ValueError(
            f"`{path}` must be a log of v8, v9, v10, v13, v14, v15 or v18, or of rank events, but"
            " no line has the keys of one."
        )
    key = _CLOCKS.get(script) or _clock_key([row for row in rows if not _is_change(row)])
    clocks = _clocks(rows, key)
    loss_unit: Unit = "epoch" if key == "epoch" else "step"
    unit: Unit = "step" if script == "v15" else loss_unit
    if script == "v10":
        ranks, changes = _ranks_of_lists(path, rows, clocks)
    else:
        begin = min(clocks, default=0) if unit == loss_unit else 0
        ranks, changes = _ranks_of_changes(rows, script, _times(rows, script, clocks), begin)
    args: dict[str, Any] = next(
        (row["args"] for row in rows if isinstance(row.get("args"), dict)), {}
    )
    losses = [(at, row) for at, row in zip(clocks, rows, strict=True) if not _is_change(row)]
    return RankHistory(
        source=script,
        unit=unit,
        loss_unit=loss_unit,
        ranks=ranks,
        changes=changes,
        spread={at: spread for at, row in losses if (spread := _spread(row)) is not None},
        train_losses=finite(
            {at: row[k] for at, row in losses for k in ("train_loss", "loss") if k in row}
        ),
        val_losses=finite({at: row["val_loss"] for at, row in losses if "val_loss" in row}),
        floor=controller_floor(args),
        notes=[*notes, *_notes(script)],
    )


def _rows(path: Path) -> tuple[list[_Row], list[str]]:
    """Return the objects of a file, and what is to be said about its last line."""
    lines = path.read_bytes().splitlines()
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    rows: list[_Row] = []
    for number, line in numbered:
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == numbered[-1][0]:
                return rows, [f"Line {number}, the last, is cut off and was left out."]
            raise ValueError(
                f"`{path}` must hold one JSON object per line, but its line {number} is none:"
                f" {error}."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"`{path}` must hold one JSON object per line, but its line {number} is none."
            )
        rows.append(row)
    return rows, []


def _script(rows: Sequence[_Row]) -> str | None:
    kinds = {str(row.get("type")) for row in rows}
    keys = set().union(*rows)
    tells = {
        "v18": bool(kinds & {"run_start", "train_step", "rank_change"}),
        "v8": bool(kinds & {"epoch_summary", "rank_adjustment_epoch"}) or "energy_target" in keys,
        "v15": "epoch" in kinds or "spectral_rank" in keys,
        "v10": "ranks" in keys,
        "v14": "heads_avg" in keys,
        "v13": {"rank_avg", "global_step"} <= keys,
        "v9": "loss_trend" in keys,
    }
    return next((script for script, is_it in tells.items() if is_it), None)


def _is_change(row: _Row) -> bool:
    return {"layer", "old_rank", "new_rank"} <= row.keys()


def _clock_key(rows: Sequence[_Row]) -> str:
    keys = ("global_step", "step")
    return next((key for key in keys if any(key in row for row in rows)), "epoch")


def _clocks(rows: Sequence[_Row], key: str) -> list[int]:
    """Return the time of each row; a change, or a row that has none, takes the last one's."""
    own = [None if _is_change(row) else row.get(key) for row in rows]
    last = int(next((at for at in own if at is not None), 0))
    clocks = []
    for at in own:
        last = last if at is None else int(at)
        clocks.append(last)
    return clocks


def _times(rows: Sequence[_Row], script: str, clocks: Sequence[int]) -> dict[int, int]:
    """Return the time of each change, by the index of its row.

    v8 and v18 log an update beside its changes, some before and some after them: which of the two
    is told by the first that has any.
    """
    changes = [index for index, row in enumerate(rows) if _is_change(row)]
    kind = {"v8": "rank_adjustment_epoch", "v18": "rank_update"}.get(script, "")
    updates = [
        index
        for index, row in enumerate(rows)
        if row.get("type") == kind and not _is_change(row) and row.get("changed_layers", 1)
    ]
    is_ahead = bool(updates and changes) and updates[0] < changes[0]
    times = {}
    for index in changes:
        number = bisect(updates, index) - is_ahead
        known = 0 <= number < len(updates)
        times[index] = clocks[updates[number] if known else index]
        key = "epoch" if script in ("v8", "v9") else "step"
        if key in rows[index] and (script != "v18" or "change" in rows[index]):
            times[index] = int(rows[index][key])
    return times


def _ranks_of_changes(
    rows: Sequence[_Row], script: str, times: Mapping[int, int], begin: int
) -> tuple[dict[str, list[RankPoint]], list[RankChange]]:
    ranks: dict[str, list[RankPoint]] = {}
    changes = []
    for index, at in times.items():
        row = rows[index]
        layer, old, new = str(row["layer"]), int(row["old_rank"]), int(row["new_rank"])
        target = next((strict(row[key]) for key in _TARGETS if key in row), None)
        found = ranks.setdefault(layer, [RankPoint(min(begin, at), old)])
        while len(found) > 1 and found[-1].at > at:  # a run that was resumed has logged these again
            found.pop()
        found.append(RankPoint(at, new, target))
        added = row.get("step") if script == "v18" and "change" not in row else row.get("change")
        if old != new:
            changes.append(
                RankChange(at, layer, old, new, float(new - old if added is None else added))
            )
    return ranks, changes


def _ranks_of_lists(
    path: Path, rows: Sequence[_Row], clocks: Sequence[int]
) -> tuple[dict[str, list[RankPoint]], list[RankChange]]:
    ranks: dict[str, list[RankPoint]] = {}
    changes = []
    for at, row in zip(clocks, rows, strict=True):
        logged = row.get("ranks", ())
        if len(logged) % len(_V10_LAYERS):
            raise ValueError(
                f"`{path}` must list {len(_V10_LAYERS)} ranks for each block, got {len(logged)} in"
                f" epoch {at}."
            )
        for index, rank in enumerate(logged):
            block, part = divmod(index, len(_V10_LAYERS))
            layer = f"blocks.{block}.{_V10_LAYERS[part]}"
            found = ranks.setdefault(layer, [])
            if found and found[-1].rank != rank:
                old = found[-1].rank
                changes.append(RankChange(at, layer, old, rank, float(rank - old)))
            found.append(RankPoint(at, rank))
    return ranks, changes


def _spread(row: _Row) -> RankSpread | None:
    keys = next((keys for keys in _SPREADS if set(keys) <= row.keys()), None)
    return None if keys is None else RankSpread(*(float(row[key]) for key in keys))


def _notes(script: str) -> list[str]:
    if script in ("v13", "v14"):
        return [f"{script} logs the ranks over all layers, not those of each."]
    if script == "v9":
        return ["v9 does not log when a rank changed; it is the epoch of the line before it."]
    return []
