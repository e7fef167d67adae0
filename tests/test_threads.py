"""Ctrl-C at the moments at which the standard library's executor loses a thread, and with it what that works on."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import pytest

from ccq_converters.threads import ThreadPool


def interrupt_starts(monkeypatch: pytest.MonkeyPatch, first: int = 1) -> None:
    """Ctrl-C while the main thread waits for a new thread to come up, from the ``first`` such thread on."""
    start, count = threading.Thread.start, 0

    def interrupted(thread: threading.Thread) -> None:
        nonlocal count
        start(thread)
        count += 1
        if count >= first:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)


def test_shutdown_waits_for_all_that_was_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Semaphore(0), []

    def work() -> None:
        begun.release()
        time.sleep(0.05)
        ended.append(True)

    with ThreadPool(2) as pool:
        interrupt_starts(monkeypatch)
        for _ in range(3):
            with suppress(KeyboardInterrupt):
                pool.submit(work)
        assert begun.acquire(timeout=10)
    assert len(ended) == 3


@pytest.mark.parametrize("first", [1, 2, 3])
def test_an_interrupt_of_the_start_leaves_no_thread(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    before = set(threading.enumerate())
    interrupt_starts(monkeypatch, first)
    with pytest.raises(KeyboardInterrupt):
        ThreadPool(3)
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_shutdown_goes_on_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    release, ended = threading.Event(), threading.Event()

    def work() -> None:
        release.wait(10)
        ended.set()

    pool = ThreadPool(1)
    pool.submit(work)
    join = threading.Thread.join
    interrupts = [KeyboardInterrupt("first"), KeyboardInterrupt("second")]

    def interrupted_join(thread: threading.Thread, timeout: float | None = None) -> None:
        if interrupts:
            raise interrupts.pop()
        release.set()
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted_join)
    with pytest.raises(KeyboardInterrupt, match="first"):
        pool.shutdown()
    assert ended.is_set()
