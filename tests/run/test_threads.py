"""How many threads a process uses: its share of the cores, a container's quota, or what the user says."""

import os
import subprocess
import sys
import time

import pytest
import torch

from nanogpt.run import threads
from nanogpt.run.threads import Others, available_cores, choose_threads, threads_beside


@pytest.fixture(autouse=True)
def threads_before(monkeypatch):
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    else:
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "text, cores", [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("", 8)]
)
def test_a_quota_limits_the_cores(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert available_cores(tmp_path) == cores


@pytest.mark.parametrize("quota, cores", [("300000", 3), ("-1", 8), ("9900000", 8)])
def test_a_quota_of_the_first_version_limits_them_too(tmp_path, quota, cores):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert available_cores(tmp_path) == cores


def chosen(tmp_path, threads="auto", before=8, quota="max 100000"):
    """The number of threads that `choose_threads` sets, and what it says."""
    (tmp_path / "cpu.max").write_text(quota)
    torch.set_num_threads(before)
    said = []
    choose_threads(threads, said.append, tmp_path)
    return torch.get_num_threads(), said


def test_one_process_has_all_cores(tmp_path):
    assert chosen(tmp_path) == (8, [])


def test_pytorch_may_have_reasons_for_fewer(tmp_path):
    """It counts a core with two hardware threads once."""
    assert chosen(tmp_path, before=4) == (4, [])


def test_a_container_has_its_quota(tmp_path):
    line = "threads: 2, because 2 cores are available (--threads)"
    assert chosen(tmp_path, quota="200000 100000") == (2, [line])


def test_processes_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it
    line = "threads: 4, because 8 cores are available to 2 processes (--threads)"
    assert chosen(tmp_path, before=1) == (4, [line])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert chosen(tmp_path, before=1) == (1, [])


def test_the_users_number_counts(tmp_path, monkeypatch):
    assert chosen(tmp_path, threads=3, before=8) == (3, [])
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert chosen(tmp_path, before=5) == (5, [])
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert chosen(tmp_path, before=5) == (5, [])


@pytest.mark.parametrize(
    "busy, cores, threads, better",
    [(0.2, 2, 2, None), (1.0, 2, 2, 1), (2.0, 2, 2, None), (1.0, 2, 1, None), (4.4, 16, 16, 12), (9.0, 16, 16, None)],
)
def test_threads_fit_on_the_free_cores_if_those_are_half_or_more(busy, cores, threads, better):
    assert threads_beside(busy, cores, threads) == better


def test_the_time_of_other_programs_is_what_the_cores_have_worked_without_this_one(tmp_path, monkeypatch):
    stat, tick = tmp_path / "stat", 1 / os.sysconf("SC_CLK_TCK")
    stat.write_text("cpu 9 9 9 9 9 9 9\ncpu0 0 0 0 50 0 0 0 0\ncpu7 10 0 0 0 0 0 0 0\ncpu9 0 0 0 0 0 0 0\n")
    monkeypatch.setattr(threads, "WINDOW", 0.0)
    others = Others(stat)
    stat.write_text(
        "cpu 9 9 9 9 9 9 9\ncpu0 500000 1 2 999 999 3 4 999\ncpu7 10 0 0 0 0 0 0 0\ncpu9 7000 0 0 0 0 0 0\n"
    )
    began = others.mark[0]
    busy = others.busy_cores()
    assert busy == pytest.approx(500010 * tick / (others.mark[0] - began), rel=0.01)


def test_no_system_that_says_no_load(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "WINDOW", 0.0)
    assert Others(tmp_path / "missing").busy_cores() is None


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="Linux alone counts the time of cores here")
def test_another_program_is_noticed(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(threads, "WINDOW", 0.0)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        others, end = Others(), time.monotonic() + 60
        while not (busy := others.busy_cores()) and others.mark and time.monotonic() < end:
            time.sleep(0.5)
        other.kill()
    assert others.mark is None or busy > 0  # unknown in a container with a quota
