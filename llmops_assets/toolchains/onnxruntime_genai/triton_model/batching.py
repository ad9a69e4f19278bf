"""Answers requests in batches: a queue with a bound, and one worker that owns the engine.

A batch is static: it begins with those who wait, and nobody joins it. Its rows end one by
one, and with the last of them the batch. It knows nothing of Triton.

A package takes this file along, so it imports nothing of the platform.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .generation import Sampling, TextGenerator

# Asking for cancellations costs a round trip for each row, as much as a small model's token.
CANCELLATION_INTERVAL_SECONDS = 0.005


class UnavailableError(RuntimeError):
    """The request cannot be taken now; the message says why. Another time it can."""


class Reply(Protocol):
    """A request on its way to its end. `take`, `is_gone` or `fail` ends it, once."""

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids, not empty."""
        ...

    @property
    def sampling(self) -> Sampling: ...

    @property
    def count(self) -> int:
        """How many tokens it has taken."""
        ...

    def take(self, token: int) -> bool:
        """Takes the answer's next token; returns whether it wants another.

        Raises:
            RuntimeError: the token cannot be used; the reply has not ended.
        """
        ...

    def is_gone(self) -> bool:
        """Whether nobody waits for it any more; if so, it has ended."""
        ...

    def fail(self, error: RuntimeError) -> None:
        """Tells whoever waits that no more comes, and why."""
        ...


class Observer(Protocol):
    """Is told what happens, always by the thread of `run`."""

    def began(self, requests: int, in_progress: int) -> None:
        """A batch of so many requests; `in_progress` counts those that wait as well."""
        ...

    def ended(self, tokens: int, in_progress: int) -> None:
        """A request of a batch, however it ended, for which so many tokens were generated."""
        ...


@dataclass(frozen=True)
class Limits:
    """Of batches and of waiting."""

    batch_size: int
    """Most requests of one batch."""
    window_seconds: float
    """How long the first request of a batch waits for company."""
    queue_size: int
    """Most requests that wait."""
    drain_seconds: float
    """How long `close` goes on answering."""


class Batcher:
    """Takes requests from any thread; `run`, in a thread of its own, answers them."""

    def __init__(self, generator: TextGenerator, limits: Limits, observer: Observer) -> None:
        """Takes over the generator.

        Args:
            generator: only `run` uses it to generate.
            limits: of batches and of waiting.
            observer: is told.
        """
        self._generator = generator
        self._limits = limits
        self._observer = observer
        self._waiting: deque[Reply] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._deadline = math.inf

    def submit(self, reply: Reply) -> None:
        """Puts a request into the queue.

        Raises:
            UnavailableError: the queue is full, or the batcher is closing.
        """
        with self._changed:
            if self._closing:
                raise UnavailableError("the server is stopping; ask another one")
            if len(self._waiting) >= self._limits.queue_size:
                raise UnavailableError(
                    f"{len(self._waiting)} requests wait already, which is the most; "
                    "ask again later"
                )
            self._waiting.append(reply)
            self._changed.notify()

    def close(self) -> None:
        """Takes no more requests, and lets `run` return when the others have ended.

        Those not answered `drain_seconds` from now fail.
        """
        with self._changed:
            self._closing = True
            self._deadline = time.monotonic() + self._limits.drain_seconds
            self._changed.notify()

    def run(self) -> None:
        """Answers requests until the batcher is closed."""
        while taken := self._next_batch():
            batch = [reply for reply in taken if not reply.is_gone()]
            if time.monotonic() > self._deadline:
                for reply in batch:
                    reply.fail(UnavailableError("the server stopped before it came to this"))
            elif batch:
                self._observer.began(len(batch), self._in_progress(len(batch)))
                self._answer(batch)

    def _next_batch(self) -> list[Reply]:
        """Takes from the queue who can be answered together; empty when no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            end = time.monotonic() + self._limits.window_seconds
            batch = self._fitting()
            while len(batch) < self._limits.batch_size and not self._closing:
                left = end - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
                batch = self._fitting()
            for reply in batch:
                self._waiting.remove(reply)
            return batch

    def _fitting(self) -> list[Reply]:
        """Who has waited longest, and the next in the queue who go with it."""
        batch: list[Reply] = []
        for reply in self._waiting:
            if len(batch) == self._limits.batch_size:
                break
            candidates = [*batch, reply]
            prompts = [candidate.prompt for candidate in candidates]
            if self._generator.together(prompts, [one.sampling for one in candidates]):
                batch = candidates
        return batch

    def _answer(self, batch: Sequence[Reply]) -> None:
        # Those of a batch that failed were given some tokens before.
        given = [reply.count for reply in batch]
        unfinished = dict(enumerate(batch))

        def ended(row: int) -> None:
            del unfinished[row]
            self._observer.ended(batch[row].count, self._in_progress(len(unfinished)))

        asked = time.monotonic()
        prompts = [reply.prompt for reply in batch]
        try:
            for step in self._generator.steps(prompts, [reply.sampling for reply in batch]):
                for row, token in enumerate(step):
                    if token is None or row not in unfinished:
                        continue
                    if given[row]:
                        given[row] -= 1
                    elif not _wants_more(batch[row], token):
                        ended(row)
                now = time.monotonic()
                if now > self._deadline:
                    for row, reply in list(unfinished.items()):
                        reply.fail(UnavailableError("the server stopped before the answer's end"))
                        ended(row)
                elif now - asked > CANCELLATION_INTERVAL_SECONDS:
                    for row, reply in list(unfinished.items()):
                        if reply.is_gone():
                            ended(row)
                    asked = time.monotonic()
                if not unfinished:
                    return
        except RuntimeError as error:  # what ONNX Runtime GenAI raises
            if len(batch) == 1:
                batch[0].fail(error)
                ended(0)
                return
            # It may be the fault of one: the others must not meet its end.
            for reply in unfinished.values():
                self._answer([reply])

    def _in_progress(self, running: int) -> int:
        with self._changed:
            return running + len(self._waiting)


def _wants_more(reply: Reply, token: int) -> bool:
    try:
        return reply.take(token)
    except RuntimeError as error:
        reply.fail(error)
        return False
