"""`spectral watch --follow`: alerts of a run that is still going on."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from spectral_lightning.cli.entry import main
from spectral_lightning.spectra import (
    Condition,
    LayerAnalysis,
    ModeEventWriter,
    ModeSettings,
)

DANGER = Condition("principal_alignment", "danger", above=True, threshold=0.3)


def settings(step=0):
    return ModeSettings(
        step=step, every_n_steps=20, policy="SeedPolicy", protection="block", conditions=(DANGER,)
    )


def analysis(step, principal):
    return LayerAnalysis(
        step=step,
        layer="c_q",
        mode="full",
        rank=12,
        num_principal=4,
        next_mode="full",
        next_rank=12,
        verdict="continue_current_mode",
        loss=None,
        measures={"principal_alignment": principal},
    )


RUN = (settings(), analysis(20, 0.2), analysis(40, 0.28), analysis(60, 0.35))
ALERTS = [
    "WARNING  step 40 c_q: less than 10 % from danger: principal_alignment 0.28 (danger above 0.3)",
    "CRITICAL step 60 c_q: danger in full mode: principal_alignment 0.35 is above 0.3",
]
IS_CRITICAL = "critical at their latest analysis: c_q."


def write(path, *events):
    ModeEventWriter(path).append(*events)
    return path


@pytest.fixture
def file(tmp_path):
    """Events of a run whose only layer is critical."""
    return write(tmp_path / "runs" / "x" / "version_0" / "svd_mode.jsonl", *RUN)


def alert_lines(out):
    return [line for line in out.splitlines() if line.startswith(("CRITICAL", "WARNING", "INFO"))]


@pytest.fixture
def follow(monkeypatch):
    """Follow a path in this thread, while another one acts; returns status, output and notes.

    An action is called once the text before it was written; the last text is waited for too.
    """

    def run(path, *script, number=signal.SIGTERM, options=()):
        out, err = io.StringIO(), io.StringIO()

        def act():
            try:
                for text, action in script:
                    wait_for(text)
                    action()
            finally:
                os.kill(os.getpid(), number)

        def wait_for(text):
            end = time.monotonic() + 30
            while text not in out.getvalue() + err.getvalue():
                assert time.monotonic() < end, f"{text!r} was not written"
                time.sleep(0.005)

        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        before = signal.signal(number, lambda *_: None)  # should the command have ended before
        thread = threading.Thread(target=act)
        thread.start()
        try:
            status = main(["watch", str(path), "--follow", "--interval", "0.01", *options])
        finally:
            thread.join()
            signal.signal(number, before)
        return status, out.getvalue(), err.getvalue()

    return run


def nothing():
    pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_alerts_come_as_they_are_written_and_a_signal_ends_with_the_summary(
    follow, tmp_path, number
):
    file = tmp_path / "later" / "svd_mode.jsonl"
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    status, out, err = follow(
        tmp_path,
        ("waiting for an event file", lambda: write(file, *RUN[:3])),
        (ALERTS[0], lambda: ModeEventWriter(file, step=1000).append(*RUN[3:])),
        (ALERTS[-1], nothing),
        number=number,
    )
    assert status == 1
    assert alert_lines(out) == ALERTS
    assert out.index(ALERTS[-1]) < out.index(IS_CRITICAL)
    assert f"reading {file}, the only one below {tmp_path}" in err
    assert signal.getsignal(signal.SIGINT) == before


def test_a_resumed_run_is_followed_from_where_it_goes_on(follow, file):
    def resume():
        ModeEventWriter(file, step=60).append(settings(60), analysis(60, 0.1))

    def go_on():
        ModeEventWriter(file, step=1000).append(analysis(80, 0.31))

    again = "CRITICAL step 80 c_q: danger in full mode: principal_alignment 0.31 is above 0.3"
    status, out, err = follow(
        file, (ALERTS[-1], resume), ("the file was cut", go_on), (again, nothing)
    )
    assert alert_lines(out) == [*ALERTS, again]
    assert "note: the file was cut: 3 of 4 events are left.\n" in err
    assert status == 1
    assert IS_CRITICAL in out


def test_a_run_that_begins_anew_in_the_folder_is_followed(follow, file):
    def begin():
        file.rename(file.with_name("svd_mode.1.jsonl"))
        time.sleep(0.03)  # a look or two at a file that is not there
        write(file, settings(), analysis(20, 0.29))

    near = "principal_alignment 0.29 (danger above 0.3)"
    status, out, _ = follow(file.parent, (ALERTS[-1], begin), (near, nothing))
    assert status == 0
    assert len(alert_lines(out)) == 3
    assert " c_q 20 full " in " ".join(out.split())


def test_a_run_that_never_began_has_an_empty_summary(follow, tmp_path):
    status, out, err = follow(tmp_path / "nowhere", ("waiting", nothing), options=["--layers", "x"])
    assert status == 0
    assert "0 layers" in out
    assert err == f"note: waiting for an event file at or below {tmp_path / 'nowhere'}.\n"


def test_the_console_command_writes_alerts_at_once_into_a_pipe(file):
    command = [str(Path(sys.executable).with_name("spectral")), "watch", "runs", "--follow"]
    env = {**os.environ, "COLUMNS": "80"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    with subprocess.Popen(command, **pipes) as process:
        lines = [process.stdout.readline().rstrip() for _ in ALERTS]
        process.terminate()
        out, _ = process.communicate(timeout=60)
    assert lines == ALERTS
    assert process.returncode == 1
    assert IS_CRITICAL in out
    assert "\x1b" not in out
