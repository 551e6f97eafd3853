"""What a peer says of itself: who trains and who waits, marks for the witness, and how the process is."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest
import torch

from elastic.telemetry import Activity, Telemetry
from elastic.vitals import Vitals
from elastic.witness import BEAT, BYTES, EXCHANGES, STEPPED, page_of


def test_who_trains_and_waits_for_nobody_is_idle_since_its_last_step() -> None:
    activity = Activity()
    assert activity.trainer().waiting, "nobody trains yet"
    activity.begin()
    for seconds in (0.1, 0.3, 0.2, 9.0):
        activity.stepped(seconds, time.monotonic())
    assert activity.trainer().steps == 4 and activity.trainer().usual_seconds == pytest.approx(0.25)
    activity._moved_at -= 50.0
    assert 50 < activity.trainer().idle_seconds < 60 and not activity.trainer().waiting
    with activity.waiting(), activity.waiting():
        assert activity.trainer().waiting and activity.trainer().idle_seconds == 0.0
    assert activity.trainer().idle_seconds < 10, "what was before it waited does not count"
    activity.end()
    assert activity.trainer().waiting


def test_what_others_wait_for_says_nothing_of_the_thread_that_trains_but_for_data() -> None:
    activity, inside, done = Activity(), threading.Event(), threading.Event()
    activity.begin()

    def wait(whoever: bool) -> None:
        with activity.waiting(whoever=whoever):
            inside.set()
            done.wait(30)

    for whoever in (False, True):
        inside.clear()
        done.clear()
        thread = threading.Thread(target=wait, args=(whoever,))
        thread.start()
        assert inside.wait(30)
        assert activity.trainer().waiting is whoever
        done.set()
        thread.join(30)
    assert not activity.trainer().waiting


def test_marks_are_left_in_the_page() -> None:
    activity, page = Activity(), page_of(bytearray(BYTES))
    activity.begin()
    activity.stepped(0.1, 77.0)
    activity.marked_in(page)
    assert page[STEPPED] == 77.0 and page[EXCHANGES] == 0.0
    with activity.exchanging(), activity.exchanging():
        assert page[EXCHANGES] == 2.0
    assert activity.beat(1.0) and page[BEAT] > 0 and page[EXCHANGES] == 0.0


def test_time_in_which_the_process_stood_still_is_not_its_training_threads() -> None:
    activity = Activity()
    activity.begin()
    assert activity.beat(1.0)
    activity._moved_at -= 100.0
    activity.page[BEAT] -= 60.0
    assert not activity.beat(1.0)
    assert 40 <= activity.trainer().idle_seconds < 50
    assert activity.beat(1.0)


def test_memory_disk_and_clock_are_known(tmp_path: Path) -> None:
    vitals = Vitals()
    assert vitals.look().disk_bytes == 0, "it writes nowhere"
    vitals.look_at_disk(tmp_path)
    vitals.look_at_disk(tmp_path / "missing")
    health = vitals.look()
    assert health.memory_bytes > 10 << 20 and 0 < health.disk_free < health.disk_bytes and health.clock > 1e9


def test_only_what_was_refused_for_want_of_room_counts() -> None:
    vitals = Vitals()
    vitals.refused(OSError(errno.EACCES, "no"))
    vitals.refused(ValueError("no"))
    assert vitals.look().disk_refused == 0
    vitals.refused(OSError(errno.ENOSPC, "full"))
    wrapped = ValueError("cannot write")
    wrapped.__cause__ = OSError(errno.EDQUOT, "quota")
    vitals.refused(wrapped)
    assert vitals.look().disk_refused == 2


def test_memory_of_gpus_is_asked_for_by_the_thread_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry = Telemetry()
    telemetry.stepped(0.1)
    assert telemetry.vitals.look().gpu_bytes == 0
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 + device)
    assert telemetry.vitals.look().gpu_bytes == 0, "not by the one that sends heartbeats"
    telemetry.stepped(0.1)
    assert telemetry.vitals.look().gpu_bytes == 11
