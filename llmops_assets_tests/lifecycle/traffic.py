"""Clients that ask production all the time, over connections they keep."""

from __future__ import annotations

import http.client
import itertools
import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

REQUEST_SECONDS = 30.0


@dataclass(frozen=True)
class Request:
    """One request: when it began (seconds since the epoch), how long it took, what was wrong."""

    began: float
    seconds: float
    problem: str | None


class Traffic:
    """Clients in threads of their own; leaving the `with` block ends them.

    Every client asks one question after the other, and a moment passes between an answer
    and the next question, as people's requests do not come back to back.
    """

    def __init__(
        self,
        gateway_url: str,
        model: str,
        known: Mapping[str, str],
        clients: int = 1,
        pause_seconds: float = 0.2,
    ) -> None:
        """
        Args:
            gateway_url: who is asked.
            model: for what.
            known: answer of each question; another one is a failed request.
            clients: how many.
            pause_seconds: between an answer and the client's next question.
        """
        split = urlsplit(gateway_url)
        assert split.hostname is not None
        assert split.port is not None
        self._address = (split.hostname, split.port)
        self._path = f"/v2/models/{model}/generate"
        self._known = known
        self._pause_seconds = pause_seconds
        self._stopping = threading.Event()
        # Appending to a list is atomic; each client has its own all the same.
        self._requests: list[list[Request]] = [[] for _ in range(clients)]
        self._threads = [
            threading.Thread(target=self._ask_on_and_on, args=(mine,)) for mine in self._requests
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=REQUEST_SECONDS + 5)

    def between(self, start: float, end: float) -> list[Request]:
        """Requests that were on their way at some time between two moments."""
        return [
            request
            for mine in self._requests
            for request in mine
            if request.began <= end and request.began + request.seconds >= start
        ]

    @property
    def requests(self) -> list[Request]:
        """All that are answered, or failed, so far."""
        return [request for mine in self._requests for request in mine]

    def _ask_on_and_on(self, mine: list[Request]) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=REQUEST_SECONDS)
        for question, answer in itertools.cycle(self._known.items()):
            began, clock = time.time(), time.monotonic()
            problem = _problem(connection, self._path, question, answer)
            mine.append(Request(began, time.monotonic() - clock, problem))
            if problem is not None:
                connection.close()
            if self._stopping.wait(self._pause_seconds):
                connection.close()
                return


def problems(requests: Sequence[Request]) -> list[str]:
    """What was wrong with those that failed."""
    return [request.problem for request in requests if request.problem is not None]


def slowest(requests: Sequence[Request]) -> float:
    """Seconds of the slowest request."""
    return max(request.seconds for request in requests)


def percentile(requests: Sequence[Request], share: float) -> float:
    """Seconds that this share of the requests did not exceed (nearest rank)."""
    ordered = sorted(request.seconds for request in requests)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _problem(
    connection: http.client.HTTPConnection, path: str, question: str, answer: str
) -> str | None:
    try:
        connection.request("POST", path, json.dumps({"text_input": question}))
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        return repr(error)
    if response.status != 200:
        return f"status {response.status}: {body[:200]!r}"
    output = json.loads(body)["text_output"]
    return None if output == answer else f"{question!r} gave {output!r}"
