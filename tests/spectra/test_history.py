import json
import math
import time
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_lightning.spectra.history import HistoryWriter, read_history
from spectral_lightning.spectra.reading import Reading

NAN = math.nan


def make_reading(name="fc", step=1, **changes):
    reading = Reading(
        name=name,
        step=step,
        shape=(4, 3),
        spectral_norm=0.1 + step,
        spectral_norm_interval=(0.1 + step, 0.2 + step),
        frobenius_norm=1 / 3 + step,
        stable_rank=1.5,
        relative_stable_rank=0.7,
    )
    return replace(reading, **changes)


def failed_reading(name="fc", step=1):
    return make_reading(
        name,
        step,
        spectral_norm=NAN,
        spectral_norm_interval=(NAN, NAN),
        frobenius_norm=NAN,
        stable_rank=NAN,
        relative_stable_rank=NAN,
        failure="The weight holds a NaN.",
    )


def same(left, right):
    """Equality of readings that takes NaN for equal to NaN."""
    return repr(asdict(left)) == repr(asdict(right))


def write(path, *steps, start=0):
    with HistoryWriter(path, step=start) as writer:
        for readings in steps:
            writer.append(readings)
    return writer


def steps_of(path):
    return [entry.step for entry in read_history(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "logs" / "history.jsonl"


def test_readings_come_back_exactly(path):
    first = [make_reading("a", 1), make_reading("b", 1, trainable=False)]
    second = [make_reading("a", 2), make_reading("b", 2)]
    write(path, first, second)
    history = read_history(path)
    assert [list(entry.readings.values()) for entry in history] == [first, second]
    assert list(history[0].readings) == ["a", "b"]


def test_one_line_per_step_whose_keys_are_the_fields_of_a_reading(path):
    write(path, [make_reading("a", 1), make_reading("b", 1)], [make_reading("a", 2)])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["layers"]["b"] == {
        "shape": [4, 3],
        "spectral_norm": 1.1,
        "spectral_norm_interval": [1.1, 1.2],
        "frobenius_norm": 1 / 3 + 1,
        "stable_rank": 1.5,
        "relative_stable_rank": 0.7,
    }


def test_file_is_strict_json_whatever_the_numbers(path):
    readings = [failed_reading("a"), make_reading("b", spectral_norm_interval=(1.0, math.inf))]
    readings.append(make_reading("c", condition_number=math.inf, spectrum_step=1))
    write(path, readings)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert all(map(same, read_history(path)[0].readings.values(), readings))


def test_spectrum_is_written_only_when_it_changes(path):
    values = (3.0, 2.0, 0.5)
    slow = {
        "condition_number": 6.0,
        "relative_condition_number": 0.4,
        "effective_rank": 2.5,
        "values": values,
        "spectrum_step": 1,
    }
    newer = slow | {"values": (3.5, 2.0, 0.5), "spectrum_step": 3}
    none = dict.fromkeys(slow)
    sequence = [
        [make_reading(step=step, **fields)]
        for step, fields in enumerate([none, slow, slow, newer, newer, none])
    ]
    write(path, *sequence)
    written = ["values" in line for line in path.read_text().splitlines()]
    assert written == [False, True, False, True, False, False]
    assert [list(entry.readings.values()) for entry in read_history(path)] == sequence


numbers = st.floats(allow_nan=True, allow_infinity=True)
optional = st.none() | numbers


@settings(max_examples=50, deadline=None)
@given(
    cells=st.lists(
        st.tuples(
            numbers,
            numbers,
            optional,
            optional,
            optional,
            st.none() | st.lists(numbers, max_size=3),
        ),
        max_size=5,
    ),
    cut=st.integers(0, 6),
)
def test_any_numbers_survive_a_resume_in_between(tmp_path_factory, cells, cut):
    path = tmp_path_factory.mktemp("run") / "history.jsonl"
    sequence = [
        make_reading(
            step=step,
            spectral_norm=norm,
            stable_rank=rank,
            condition_number=condition,
            relative_condition_number=relative,
            effective_rank=effective,
            values=None if values is None else tuple(values),
            spectrum_step=None if values is None else step // 2,
        )
        for step, (norm, rank, condition, relative, effective, values) in enumerate(cells, start=1)
    ]
    write(path, *([reading] for reading in sequence))
    if cut and sequence:
        write(path, *([reading] for reading in sequence if reading.step > cut), start=cut)
    history = read_history(path) if sequence else []
    assert len(history) == len(sequence)
    assert all(same(e.readings["fc"], r) for e, r in zip(history, sequence, strict=True))


def test_resume_drops_the_steps_behind_its_checkpoint(path):
    write(path, *([make_reading(step=step)] for step in (1, 2, 3, 4)))
    write(path, [make_reading(step=3, spectral_norm=9.0)], start=2)
    assert steps_of(path) == [1, 2, 3]
    assert read_history(path)[-1].readings["fc"].spectral_norm == 9.0


def test_resume_drops_a_half_written_last_line(path):
    write(path, *([make_reading(step=step)] for step in (1, 2, 3)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert steps_of(path) == [1, 2]
    write(path, [make_reading(step=3)], start=3)
    assert path.read_bytes().splitlines()[:2] == whole.splitlines()[:2]
    assert steps_of(path) == [1, 2, 3]


def test_resume_repeats_a_spectrum_whose_line_was_dropped(path):
    slow = {"condition_number": 6.0, "values": (3.0, 0.5), "spectrum_step": 2}
    first, second = make_reading(step=1), make_reading(step=2, **slow)
    write(path, [first], [second])
    write(path, [second], start=1)
    assert read_history(path)[-1].readings["fc"] == second


def test_resume_does_not_repeat_a_spectrum_with_a_number_that_is_nan(path):
    def reading(step):
        fresh_nan = {"effective_rank": float("nan"), "condition_number": math.inf}
        return make_reading(step=step, **fresh_nan, values=(0.0, 0.0), spectrum_step=1)

    write(path, [reading(1)], [reading(2)])
    write(path, [reading(3)], start=2)
    written = ["values" in line for line in path.read_text().splitlines()]
    assert written == [True, False, False]


def test_step_that_is_measured_again_after_a_resume_is_not_doubled(path):
    write(path, [make_reading(step=1)], [make_reading(step=2)])
    write(path, [make_reading(step=2)], [make_reading(step=3)], start=2)
    assert steps_of(path) == [1, 2, 3]


def test_resume_restores_the_heat_map(path):
    steps = [[make_reading(step=step)] for step in (1, 2, 3, 4)]
    uninterrupted = write(path, *steps).timeline.grid()
    assert write(path, *steps[2:], start=2).timeline.grid() == uninterrupted


def test_resume_without_a_file_starts_one(path):
    write(path, [make_reading(step=8)], start=7)
    assert steps_of(path) == [8]


def test_new_run_keeps_the_history_of_another_run_in_its_folder(path):
    for step in (1, 2, 3):
        write(path, [make_reading(step=step)])
    assert steps_of(path) == [3]
    assert steps_of(path.with_name("history.1.jsonl")) == [1]
    assert steps_of(path.with_name("history.2.jsonl")) == [2]


def test_lines_wait_in_memory_until_flush_or_ten_seconds(path, monkeypatch):
    writer = HistoryWriter(path)
    writer.append([make_reading(step=1)])
    assert not path.exists()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 11)
    writer.append([make_reading(step=2)])
    assert steps_of(path) == [1, 2]
    writer.append([make_reading(step=3)])
    assert steps_of(path) == [1, 2]
    writer.flush()
    assert steps_of(path) == [1, 2, 3]


def test_large_lines_are_written_at_once(path):
    writer = HistoryWriter(path)
    values = tuple(float(i) for i in range(200_000))
    writer.append([make_reading(values=values, spectrum_step=1)])
    assert path.stat().st_size > 1 << 20


def test_exception_in_the_run_leaves_a_complete_file(path):
    def run():
        with HistoryWriter(path) as writer:
            writer.append([make_reading()])
            raise RuntimeError("loss")

    with pytest.raises(RuntimeError, match="loss"):
        run()
    assert steps_of(path) == [1]


def test_step_without_readings_leaves_no_line(path):
    write(path, [], [make_reading(step=2)])
    assert steps_of(path) == [2]


def test_refused_write_warns_once_and_the_run_goes_on(path):
    writer = HistoryWriter(path)
    path.mkdir()
    writer.append([make_reading(step=1)])
    with pytest.warns(UserWarning, match=r"The history of readings ends at .* Training goes on\."):
        writer.flush()
    writer.append([make_reading(step=2)])
    writer.close()
    assert writer.timeline.grid().steps == (1, 2)


def test_corrupt_line_in_the_middle_is_named_by_its_number(path):
    write(path, *([make_reading(step=step)] for step in (1, 2, 3)))
    lines = path.read_text().splitlines(keepends=True)
    for broken in ("{\n", "3\n", "{}\n", '{"step": 2, "layers": {"fc": {}}}\n', "\0\n", "\n"):
        path.write_text(lines[0] + broken + lines[2])
        with pytest.raises(ValueError, match=r"must be a history of readings, but its line 2"):
            read_history(path)
        with pytest.raises(ValueError, match=r"line 2 is not one .* or move the file away\."):
            HistoryWriter(path, step=3)


def test_negative_step_is_refused(path):
    with pytest.raises(ValueError, match=r"`step` must be >= 0, got -1\."):
        HistoryWriter(path, step=-1)


def test_readings_of_several_steps_are_refused(path):
    writer = HistoryWriter(path)
    with pytest.raises(ValueError, match=r"must be of one optimizer step, got steps \[1, 2\]\."):
        writer.append([make_reading("a", 1), make_reading("b", 2)])


def test_readings_of_an_earlier_step_are_refused(path):
    writer = HistoryWriter(path)
    writer.append([make_reading(step=5)])
    with pytest.raises(ValueError, match=r"step later than the last line's 5, got step 5\."):
        writer.append([make_reading(step=5)])
