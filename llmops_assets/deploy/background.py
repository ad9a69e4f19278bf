"""Asking again and again beside a loop that must not wait for an answer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

News = TypeVar("News")


class Background(Generic[News]):
    """Calls a function over and over in a thread of its own, once it was started.

    Leaving the `with` block asks it to stop and does not wait: a release that hangs must
    not keep its own abort waiting.
    """

    def __init__(self, ask: Callable[[], Iterator[News]], every_seconds: float) -> None:
        """
        Args:
            ask: yields what it finds, one by one; each of its calls must end by itself.
            every_seconds: pause between two calls.
        """
        self._ask = ask
        self._every_seconds = every_seconds
        self._found: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._threads = ThreadPoolExecutor(max_workers=1)
        self._running: Future[None] | None = None

    def start(self) -> None:
        """Begins, if it has not."""
        if self._running is None:
            self._running = self._threads.submit(self._run)

    def news(self) -> list[News]:
        """What was found since the last call. An error of the function is raised here."""
        if self._running is not None and self._running.done():
            self._running.result()
        return [self._found.get() for _ in range(self._found.qsize())]

    def _run(self) -> None:
        while not self._stopped.is_set():
            for found in self._ask():
                if self._stopped.is_set():
                    return
                self._found.put(found)
            self._stopped.wait(self._every_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._threads.shutdown(wait=False)
