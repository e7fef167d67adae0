"""Threads that an interrupt can't lose."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor


class ThreadPool(ThreadPoolExecutor):
    """``count`` threads, all of which :meth:`shutdown` waits for, whatever interrupts it or a ``submit`` before.

    The executor of the standard library starts a thread when there is work for it.  Ctrl-C in the main thread, while
    ``submit`` waits for the new thread to come up, leaves one that works on what was submitted and that no ``shutdown``
    knows of; memory that is not Python's own is then freed under it.  Here all threads run before the first ``submit``.
    """

    def __init__(self, count: int):
        super().__init__(count)
        up = threading.Barrier(count)
        try:
            for future in [self.submit(up.wait) for _ in range(count)]:
                future.result()
        except BaseException:
            up.abort()
            raise

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for the threads; an interrupt is raised once they have ended."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                super().shutdown(wait, cancel_futures=cancel_futures)
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
