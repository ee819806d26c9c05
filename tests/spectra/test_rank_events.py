"""Events of changing ranks on disk: what is written, what is read, how a killed run goes on."""

import json
import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_lightning.spectra import (
    RANK_EVENTS_FILE,
    LayerSize,
    RankCheck,
    RankEventWriter,
    RankSettings,
    RankSummary,
    SkippedCheck,
    read_rank_events,
)

SETTINGS = RankSettings(
    step=0,
    every_n_steps=20,
    controller="StableRankController",
    settings={"min_rank": 8, "change_threshold": 2.0, "bounds": [1, 2], "freeze": None},
    resize="svd, moments mapped",
    layers={"fc": LayerSize((32, 16), 16, 12), "out": LayerSize((8, 32), 8, 8)},
)
CHECK = RankCheck(
    step=20,
    layer="fc",
    rank=12,
    next_rank=8,
    target=7.5,
    null_target=7.25,
    verdict="target is below the rank",
    growth=0.5,
    stable_rank=5.0,
    energy_kept=0.96875,
    loss=2.5,
    milliseconds=1.5,
)
SKIPPED = SkippedCheck(step=40, layer="fc", reason="the factors are not finite")
SUMMARY = RankSummary(step=60, num_stored=1088, num_active=896, num_dense=768, num_other=100)
RUN = [SETTINGS, CHECK, SKIPPED, SUMMARY]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "logs" / RANK_EVENTS_FILE


def write(path, *events, step=0):
    RankEventWriter(path, step=step).append(*events)


def steps_of(path):
    return [event.step for event in read_rank_events(path)]


def test_events_come_back_as_they_were_written(path):
    write(path, *RUN)
    assert read_rank_events(path) == RUN


def test_each_event_is_on_disk_when_append_returns(path):
    writer = RankEventWriter(path)
    for number, event in enumerate(RUN, start=1):
        writer.append(event)
        assert len(read_rank_events(path)) == number


def test_keys_of_a_line_are_the_fields_of_its_event(path):
    write(path, *RUN)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.pop("event") for line in lines] == ["settings", "check", "skipped", "summary"]
    assert [list(line) for line in lines] == [[f.name for f in fields(event)] for event in RUN]
    assert lines[0]["layers"]["fc"] == {"shape": [32, 16], "capacity": 16, "rank": 12}


def test_a_change_of_rank_never_overwrites_the_step(path):
    write(path, CHECK)
    line = json.loads(path.read_text())
    assert (line["step"], line["rank"], line["next_rank"]) == (20, 12, 8)


@given(
    target=st.none() | st.floats(),
    numbers=st.dictionaries(st.text(), st.floats() | st.lists(st.floats())),
)
def test_every_line_is_strict_json_whatever_the_numbers(tmp_path_factory, target, numbers):
    path = tmp_path_factory.mktemp("run") / RANK_EVENTS_FILE
    write(path, replace(SETTINGS, settings=numbers), replace(CHECK, target=target, loss=target))
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not strict JSON"))
    settings, check = read_rank_events(path)
    is_finite = target is not None and math.isfinite(target)
    assert check.target == check.loss == (target if is_finite else None)
    assert settings.settings.keys() == numbers.keys()


def test_what_is_not_finite_is_null_at_any_depth(path):
    write(path, replace(SETTINGS, settings={"a": math.inf, "b": {"c": [math.nan, 1.0]}}))
    (event,) = read_rank_events(path)
    assert event.settings == {"a": None, "b": {"c": [None, 1.0]}}


def test_an_event_that_json_cannot_hold_leaves_no_half_line(path):
    write(path, CHECK)
    with pytest.raises(TypeError, match="not JSON serializable"):
        RankEventWriter(path, step=20).append(SKIPPED, replace(SETTINGS, settings={"a": object()}))
    assert read_rank_events(path) == [CHECK]


def test_a_resumed_run_keeps_the_step_it_goes_on_from_and_drops_what_was_after(path):
    later = [replace(CHECK, step=step) for step in (40, 60)]
    write(path, SETTINGS, CHECK, *later)
    resumed = replace(SETTINGS, step=40)
    write(path, resumed, replace(CHECK, step=60, next_rank=10), step=40)
    events = read_rank_events(path)
    assert [event.step for event in events] == [0, 20, 40, 40, 60]
    assert events[-1].next_rank == 10


def test_a_run_resumed_before_its_first_check_keeps_its_settings(path):
    write(path, SETTINGS, CHECK)
    RankEventWriter(path, step=10)
    assert read_rank_events(path) == [SETTINGS]


def test_a_half_written_line_is_left_out_and_cut_off_on_resume(path):
    write(path, SETTINGS, CHECK)
    with path.open("a") as file:
        file.write('{"event": "che')
    assert steps_of(path) == [0, 20]
    write(path, SKIPPED, step=20)
    assert steps_of(path) == [0, 20, 40]


def test_another_runs_file_is_set_aside(path):
    for number in range(3):
        write(path, replace(CHECK, rank=number))
    names = [path.name, "rank_events.1.jsonl", "rank_events.2.jsonl"]
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(names)
    ranks = [read_rank_events(path.with_name(name))[0].rank for name in names]
    assert ranks == [2, 0, 1]


def test_a_new_run_without_events_leaves_no_file(path):
    RankEventWriter(path)
    assert not path.exists()
    assert path.parent.is_dir()


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "3",
        "[]",
        "{}",
        '{"event": "analysis", "step": 3}',
        '{"event": "check", "step": 3}',
        '{"event": "settings", "step": 3, "layers": {"fc": {"rank": 3}}}',
    ],
)
def test_a_line_that_is_no_event_is_named(path, line):
    write(path, CHECK)
    with path.open("a") as file:
        file.write(line + "\n")
    wrong = "must be a file of rank events, but its line 2 is not one"
    with pytest.raises(ValueError, match=wrong):
        read_rank_events(path)
    with pytest.raises(ValueError, match=wrong):
        RankEventWriter(path, step=100)


def test_resizes_is_whether_the_rank_changes():
    assert CHECK.resizes
    assert not replace(CHECK, next_rank=12).resizes


def test_numbers_that_were_not_measured_may_be_left_out(path):
    check = RankCheck(step=20, layer="fc", rank=12, next_rank=12, verdict="too early")
    write(path, check)
    (found,) = read_rank_events(path)
    assert found == check
    assert found.target is found.null_target is found.loss is found.energy_kept is None
