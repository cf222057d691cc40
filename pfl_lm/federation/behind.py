"""What is written behind the work: a turn's files and its row, while the next client trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Behind:
    """Jobs that are done one after another, in the order they were asked for, by one thread.

    After one that fails no other is done: a row never stands for a file that is not there.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writing")
        self._asked: deque[Future[None]] = deque()
        self._failed = False

    def do(self, job: Callable[[], object]) -> None:
        """Ask for a job; it is done some time before `settle` returns."""
        self._asked.append(self._thread.submit(self._unless_failed, job))

    def settle(self) -> None:
        """Wait until all that was asked for is done.

        Raises:
            BaseException: what a job has raised, once; those asked for behind it were not done.
        """
        asked = tuple(self._asked)
        for job in asked:
            job.exception()
        self._asked.clear()
        self._failed = False
        for job in asked:
            job.result()

    def _unless_failed(self, job: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise
