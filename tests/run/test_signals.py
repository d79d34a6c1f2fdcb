"""Stopping on request: saved every time, within seconds, and the run goes on as if nothing had been."""

import os
import re
import signal
import time
from functools import partial

import pytest
from faults import ALL, PHASES, dwell_in_evaluation, dwell_in_the_exact_loss, dwell_in_training
from support import ending

from nanogpt.run import checkpoint, signals
from nanogpt.run.signals import Stop

pytestmark = pytest.mark.usefixtures("undrawn")

ARGS = ["--dropout=0.1", "--out_dir=parts"]


UNFINISHED = {"evaluation": r"^step \d", "exact evaluation": "exact val loss"}  # what is broken off says nothing


ENDING = []


@pytest.fixture
def whole(run):
    """What a run that nobody stopped leaves; made once."""
    if not ENDING:
        run("--dropout=0.1", "--out_dir=whole")
        ENDING.append(ending("whole"))
    return ENDING[0]


@pytest.mark.parametrize("signum", ALL, ids=lambda s: s.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_is_answered_by_saving_and_a_line_on_how_to_go_on(start, run, whole, tmp_path, phase, signum):
    door = start(*ARGS, before=PHASES[phase])
    door.wait_for("^NOW")
    door.send(signum)
    assert door.end() == 128 + signum, door.printed
    assert f"\n{signum.name}: saving, then stopping" in door.printed and "Traceback" not in door.printed
    if phase in UNFINISHED:
        assert not re.search(UNFINISHED[phase], door.printed, re.M)
    [(step, folder)] = re.findall(
        r"^stopped at step (\d+), saved in (\S+); .*--init_from=resume goes on$", door.printed, re.M
    )
    assert not checkpoint.damage(tmp_path / folder) and checkpoint.newest(tmp_path / "parts").step == int(step)
    run(*ARGS, "--init_from=resume")
    assert ending("parts") == whole


def test_a_process_of_two_that_gets_the_signal_takes_the_other_along(start_two):
    args = ["--dropout=0.1", "--max_iters=100000"]
    doors = start_two(*args)
    doors[0].wait_for(r"^iter 3:")
    doors[1].send(signal.SIGUSR1)
    assert [d.end() for d in doors] == [128 + signal.SIGUSR1] * 2
    found = checkpoint.newest(doors[0].log.parent / "out")
    assert f"stopped at step {found.step}, saved in" in doors[0].printed
    assert "Traceback" not in doors[0].printed + doors[1].printed and "saving" not in doors[1].printed


def report_agreeing():
    """In each of two processes: it says each time that it asks the other whether they stop."""
    real = Stop.agree_to_stop
    Stop.agree_to_stop = lambda stop: print("asks", flush=True) or real(stop)


def test_a_step_takes_no_reduction_to_agree_on_going_on(start_two):
    asked = []
    for steps in (3, 9):
        doors = start_two(f"--max_iters={steps}", "--eval_interval=100", before=report_agreeing)
        assert [d.end() for d in doors] == [0, 0], doors[0].printed
        asked.append([d.printed.count("asks\n") for d in doors])
    assert asked[0] == asked[1]


def test_a_second_interrupt_stops_at_once(start, tmp_path):
    door = start(before=partial(dwell_in_training, awaited=3))
    door.wait_for("^NOW")
    door.send(signal.SIGINT)
    door.wait_for("SIGINT: saving, then stopping; once more stops at once")
    assert door.process.is_alive()
    door.send(signal.SIGINT)
    assert door.end() == 130
    assert not (tmp_path / "out/checkpoints/step-00000006").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1], ids=lambda s: s.name)
def test_the_other_signals_may_come_again_and_change_nothing(start, signum):
    door = start(before=partial(dwell_in_training, awaited=5))
    door.wait_for("^NOW")
    for _ in range(5):
        door.send(signum)
        time.sleep(0.05)
    assert door.end() == 128 + signum
    assert "saved in out/checkpoints/step-00000006" in door.printed


def test_a_run_that_only_evaluates_stops_and_writes_nothing(start, tmp_path):
    door = start("--eval_only=True", before=dwell_in_evaluation)
    door.wait_for("^NOW")
    door.send(signal.SIGTERM)
    assert door.end() == 128 + signal.SIGTERM
    assert not (tmp_path / "out").exists() and "saved" not in door.printed.replace("saving", "")


def test_stopping_saves_each_step_once(start, tmp_path):
    door = start("--max_iters=8", before=dwell_in_the_exact_loss)  # step 8 is saved already when the signal comes
    door.wait_for("^NOW")
    door.send(signal.SIGTERM)
    assert door.end() == 128 + signal.SIGTERM
    assert "saved in out/checkpoints/step-00000008;" in door.printed
    assert sorted(p.name for p in (tmp_path / "out/checkpoints").iterdir()) == ["step-00000004", "step-00000008"]


def test_the_handlers_are_put_back(dist):
    before = [signal.getsignal(s) for s in signals.SIGNALS]
    with signals.stopping(dist):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(s) for s in signals.SIGNALS] == before


def test_a_closed_terminal_changes_nothing_under_nohup(dist):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stopping(dist) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.agree_to_stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_may_be_broken_off_is_broken_off_at_once_also_when_asked_before(dist):
    with signals.stopping(dist) as stop:
        with pytest.raises(signals.Interrupted), stop.at_once():
            signal.raise_signal(signal.SIGTERM)
        assert stop.agree_to_stop()
        with pytest.raises(signals.Interrupted), stop.at_once():
            pytest.fail("it was begun")
        signal.raise_signal(signal.SIGUSR1)  # outside of it, nothing is raised
    assert stop.signum == signal.SIGTERM


def test_a_second_interrupt_counts_with_any_other_signals_before_and_between(dist, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = Stop(dist)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        stop._handle(signum, None)
    assert stop.agree_to_stop() and stop.agreed == signal.SIGTERM and not ended
    stop._handle(signal.SIGINT, None)
    assert ended == [130]
