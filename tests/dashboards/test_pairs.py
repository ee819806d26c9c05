"""Two runs paired: validations in common, settings that differ, speed."""

import math
from pathlib import Path

import pytest

from spectral_lightning.dashboards.pairs import (
    ABSENT,
    ValidationPair,
    config_differences,
    pairing_warnings,
    training_speed,
    validation_pairs,
)
from spectral_lightning.dashboards.runs import RunRecord, Scalar

CONFIG = {
    "seed_everything": 0,
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.accumulate_grad_batches": 2,
    "data.init_args.batch_size": 4,
    "data.init_args.sequence_len": 8,
}


def record(name="run", config=None, starts=(0.0,), config_file="config.yaml", **scalars):
    """A run whose scalars are given as ``valid_bpb={step: value}`` or a list of `Scalar`."""
    entries = {}
    for tag, values in scalars.items():
        found = values if isinstance(values, list) else [Scalar(*x, None) for x in values.items()]
        entries[tag.replace("_", "/", 1)] = tuple(found)
    return RunRecord(
        folder=Path(name),
        scalars=entries,
        starts=starts,
        samples={},
        config=CONFIG if config is None else config or None,
        config_file=config_file,
        events=None,
        checkpoints=(),
    )


def times(*pairs):
    """Entries of the loss at steps and wall times."""
    return [Scalar(step, 1.0, time) for step, time in pairs]


def test_bits_per_byte_are_paired_at_the_common_steps():
    baseline = record("a", valid_bpb={4: 2.0, 9: 1.5, 14: 1.25}, valid_loss={4: 5.0})
    run = record("b", valid_bpb={14: 1.5, 9: 1.2, 19: 1.0}, valid_loss={4: 5.0})
    pairs = validation_pairs(baseline, run)
    assert pairs == ("valid/bpb", (ValidationPair(9, 1.5, 1.2), ValidationPair(14, 1.25, 1.5)))
    assert pairs.points[0].difference == pytest.approx(-0.3)
    assert pairs.points[1].relative_difference == pytest.approx(0.2)


def test_the_loss_is_paired_where_bits_per_byte_are_not_in_both():
    pairs = validation_pairs(
        record("a", valid_bpb={4: 2.0}, valid_loss={4: 5.0}), record("b", valid_loss={4: 6.0})
    )
    assert pairs == ("valid/loss", (ValidationPair(4, 5.0, 6.0),))


@pytest.mark.parametrize("baseline", [math.nan, math.inf, 0.0, -1.0])
def test_there_is_no_share_of_what_is_not_positive_and_finite(baseline):
    assert math.isnan(ValidationPair(0, baseline, 1.0).relative_difference)


def test_runs_without_a_common_validation_are_refused():
    message = (
        r"must have a validation step in common \(valid/bpb or valid/loss\), got 2 from step 4 to 9"
        r" in `a` and none in `b`"
    )
    with pytest.raises(ValueError, match=message):
        validation_pairs(record("a", valid_bpb={4: 2.0, 9: 1.0}), record("b", train_loss={4: 1.0}))


def test_a_run_is_not_compared_with_itself():
    with pytest.raises(ValueError, match="must be different ones, got `a` twice"):
        validation_pairs(record("b/../a", valid_bpb={4: 1.0}), record("a", valid_bpb={4: 1.0}))


def test_settings_that_differ_are_named_but_for_callbacks_and_loggers():
    extra = {"trainer.callbacks": [1], "trainer.logger.init_args.name": "a"}
    baseline = record("a", config={**CONFIG, **extra})
    other = {**CONFIG, "trainer.callbacks": [2], "seed_everything": 1, "new": "x" * 50}
    run = record("b", config=other)
    assert config_differences(baseline, run) == {
        "seed_everything": (0, 1),
        "new": (ABSENT, "x" * 50),
    }
    assert pairing_warnings(baseline, run) == [
        "The pairing is not exact, because settings differ: seed_everything (0, 1), new (absent,"
        f" {'x' * 37}...)."
    ]


def test_a_setting_whose_name_begins_like_a_logger_is_compared():
    run = record("b", config={**CONFIG, "trainer.logger_extra": 1})
    assert config_differences(record("a"), run) == {"trainer.logger_extra": (ABSENT, 1)}


def test_the_same_settings_and_a_seed_are_no_reason_to_warn():
    assert pairing_warnings(record("a"), record("b")) == []


@pytest.mark.parametrize("seed", [None, False])
def test_runs_without_a_seed_are_warned_of(seed):
    config = {**CONFIG, "seed_everything": seed}
    warnings = pairing_warnings(record("a", config=config), record("b", config=config))
    assert warnings == ["The pairing is not exact, because `seed_everything` was not set."]


def test_unknown_settings_are_warned_of():
    unknown = record("b", config={}, config_file="no config.yaml")
    assert pairing_warnings(record("a"), unknown) == [
        "Whether the pairing is exact is not known: `b` has no config.yaml."
    ]
    other = record("b", config_file="hparams.yaml")
    assert pairing_warnings(record("a"), other) == [
        "Whether the pairing is exact is not known: one has a config.yaml, the other a"
        " hparams.yaml."
    ]
    assert config_differences(record("a"), unknown) == config_differences(record("a"), other) == {}


def test_speed_is_tokens_over_the_time_between_entries():
    # 2 x 4 x 8 = 64 tokens per step; 20 steps in 10 seconds.
    run = record(train_loss=times((9, 100.0), (19, 104.0), (29, 110.0)))
    assert training_speed(run) == (128.0, "from the times of train/loss")


def test_validations_and_restarts_are_left_out_of_the_speed():
    run = record(
        train_loss=times((9, 100.0), (19, 105.0), (29, 180.0), (39, 185.0), (49, 985.0)),
        valid_bpb=[Scalar(19, 2.0, 150.0)],
        starts=(90.0, 900.0),
    )
    assert training_speed(run).tokens_per_second == 128.0


def test_a_logged_speed_counts_before_a_derived_one():
    run = record(
        train_loss=times((9, 100.0), (19, 105.0)),
        train_tokens_per_second={9: 300.0, 19: math.nan, 29: 100.0, 39: 200.0},
    )
    assert training_speed(run) == (200.0, "median of train/tokens_per_second")


@pytest.mark.parametrize(
    ("scalars", "config", "reason"),
    [
        ({"train_loss": {9: 1.0, 19: 1.0}}, {}, "CSV logs have no times"),
        ({"train_loss": times((9, 1.0))}, {}, "no two entries of the training loss tell"),
        ({"valid_bpb": {9: 1.0}}, {}, "no two entries of the training loss tell"),
        (
            {"train_loss": times((9, 1.0), (19, 3.0)), "valid_bpb": [Scalar(9, 1.0, 2.0)]},
            {},
            "no two entries of the training loss tell",
        ),
        *(
            ({"train_loss": times((9, 1.0), (19, 3.0))}, changes, "does not say the tokens")
            for changes in (
                {"trainer.devices": "auto"},
                {"trainer.devices": -1},
                {"data.init_args.batch_size": None},
                {
                    "trainer.devices": 2,
                    "trainer.strategy.class_path": "lightning.pytorch.ModelParallelStrategy",
                },
            )
        ),
    ],
)
def test_a_speed_that_the_logs_do_not_tell_is_not_made_up(scalars, config, reason):
    speed = training_speed(record(config={**CONFIG, **config}, **scalars))
    assert speed.tokens_per_second is None
    assert reason in speed.source


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({"trainer.devices": [0, 2, 3]}, 3),
        ({"trainer.devices": "2"}, 2),
        ({"trainer.devices": 2, "trainer.num_nodes": 3}, 6),
        ({"trainer.devices": "auto", "trainer.accelerator": "cpu"}, 1),
    ],
)
def test_the_tokens_of_all_ranks_are_counted(changes, ranks):
    run = record(config={**CONFIG, **changes}, train_loss=times((9, 100.0), (19, 105.0)))
    assert training_speed(run).tokens_per_second == 128.0 * ranks
