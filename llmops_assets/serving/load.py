"""Loads a model in Triton with requests and takes the time of every answer.

Closed loop: so many clients, each of which asks again as soon as it was answered, over
connections that stay open. Answers come through `generate_stream`, as users get them.

Run as `python -m llmops_assets.serving.load …`, through the tool runner: in a process of
its own nothing but the machine itself gets between an answer and the clock. Each client is
a thread: against delays that are known, 16 of them added 3 ms to the time to first token
where one event loop (httpx on asyncio) added 9 to 12 ms and took 1.4 times the processor.
`ClientOverhead` tells how late the clients were, or a busy machine made them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.errors import DataError, LLMOpsError, SlotError
from llmops_assets.serving.request_contract import EMBEDDED, RequestContract
from llmops_assets.tools import report_progress

DELAY_INTERVAL_SECONDS = 0.01
REPORT_INTERVAL_SECONDS = 1.0
LONGEST_REASON = 200


class RequestResult(BaseModel):
    """One request; times in seconds, monotonic."""

    model_config = ConfigDict(frozen=True)

    start: float = Field(description="Since the start of the measurement.")
    time_to_first_token: float | None = Field(
        description="From sending the request to the first piece with a token; None without one."
    )
    inter_token_latencies: tuple[float, ...] = Field(
        description="One per token after the first piece's. Tokens that came in one piece "
        "share the time since the piece before."
    )
    end_to_end: float = Field(
        description="To the piece that ended the answer (the last one, where the model gives no "
        "finish reason), or to the error."
    )
    output_tokens: int = Field(description="The end token included, where the model counts it.")
    error: str | None = Field(default=None, description="Why there is no whole answer.")


class ClientOverhead(BaseModel):
    """How late the client itself was: what a measured time may be too long by.

    Taken by a thread that wants to run every 10 ms beside the clients.
    """

    model_config = ConfigDict(frozen=True)

    delay_p50: float = Field(description="Seconds.")
    delay_p99: float = Field(description="Seconds.")
    cpu_share: float = Field(
        description="Share of one core that the client used; near 1 it measures itself."
    )


class LoadResult(BaseModel):
    """Every measured request at one concurrency; warm-up requests are not among them."""

    model_config = ConfigDict(frozen=True)

    url: str
    model: str
    concurrency: int
    max_tokens: int
    warm_up: int
    seed: int
    time: datetime = Field(description="When the measurement started.")
    duration: float = Field(
        description="Seconds from the first request to the end of the last answer."
    )
    client: ClientOverhead
    requests: tuple[RequestResult, ...] = Field(description="In the order of their ends.")


def measure(
    url: str,
    model: str,
    prompts: Sequence[str],
    *,
    concurrency: int,
    requests: int | None = None,
    seconds: float | None = None,
    warm_up: int | None = None,
    max_tokens: int,
    timeout_seconds: float,
    seed: int = 0,
    version: int | None = None,
    contract: RequestContract = EMBEDDED,
    on_progress: Callable[[int], None] | None = None,
) -> LoadResult:
    """Asks with `concurrency` clients at once until enough requests were answered.

    A request that fails is part of the result: its `error` says why.

    Args:
        url: a slot's or a gateway's address, such as `http://127.0.0.1:8000`.
        model: its name.
        prompts: what is asked, in an order that the seed decides, again and again.
        concurrency: how many requests are under way at any time.
        requests: how many to measure; or else
        seconds: for how long requests are started. What was started is waited for.
        warm_up: how many requests go first, with the same clients; all of them end
            before the measurement starts. None for two per client.
        max_tokens: longest answer, tokens.
        timeout_seconds: limit of a whole request; one that takes longer is an error.
        seed: of the order of prompts.
        version: pins the requests to a version; None leaves the choice to the server.
        contract: of the package that is asked.
        on_progress: called with the number of finished requests, about once a second.

    Raises:
        DataError: an argument cannot be.
        SlotError: not one request of the warm-up was answered.
    """
    _check(prompts, concurrency, requests, seconds, warm_up)
    pinned = "" if version is None else f"/versions/{version}"
    loop = _ClosedLoop(
        address=f"{url.rstrip('/')}/v2/models/{model}{pinned}/generate_stream",
        prompts=_shuffled(prompts, seed),
        max_tokens=max_tokens,
        timeout_seconds=timeout_seconds,
        contract=contract,
        on_progress=on_progress,
    )
    started = datetime.now(UTC)
    count = 2 * concurrency if warm_up is None else warm_up
    results, duration, client = loop.run(concurrency, count, requests, seconds)
    return LoadResult(
        url=url,
        model=model,
        concurrency=concurrency,
        max_tokens=max_tokens,
        warm_up=count,
        seed=seed,
        time=started,
        duration=duration,
        client=client,
        requests=tuple(results),
    )


def _check(
    prompts: Sequence[str],
    concurrency: int,
    requests: int | None,
    seconds: float | None,
    warm_up: int | None,
) -> None:
    found = None
    if not prompts:
        found = "no prompts"
    elif concurrency < 1:
        found = f"concurrency {concurrency}"
    elif (requests is None) == (seconds is None):
        found = f"requests {requests} and seconds {seconds}"
    elif requests is not None and requests < concurrency:
        found = f"{requests} requests for {concurrency} clients"
    elif seconds is not None and not seconds > 0:
        found = f"{seconds} seconds"
    elif warm_up is not None and warm_up < 0:
        found = f"{warm_up} requests of warm-up"
    if found is not None:
        raise DataError(
            "There is nothing to measure",
            expected="prompts, 1 client or more, and either seconds or at least one request "
            "per client",
            found=found,
            cure="correct the latency measurement's arguments",
        )


def _shuffled(prompts: Sequence[str], seed: int) -> Iterator[str]:
    order = list(prompts)
    random.Random(seed).shuffle(order)
    return itertools.cycle(order)


class _ClosedLoop:
    """Clients that ask again as soon as they were answered."""

    def __init__(
        self,
        address: str,
        prompts: Iterator[str],
        max_tokens: int,
        timeout_seconds: float,
        contract: RequestContract,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self._address = address
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._timeout_seconds = timeout_seconds
        self._contract = contract
        self._on_progress = on_progress
        self._reported = 0.0

    def run(
        self, concurrency: int, warm_up: int, requests: int | None, seconds: float | None
    ) -> tuple[list[RequestResult], float, ClientOverhead]:
        """The results, seconds from the first request to the last end, the client's delays."""
        limits = httpx.Limits(
            max_connections=concurrency,
            max_keepalive_connections=concurrency,
            keepalive_expiry=None,
        )
        with (
            httpx.Client(limits=limits, timeout=self._timeout_seconds) as client,
            ThreadPoolExecutor(concurrency) as pool,
        ):
            warmed = self._ask_all(client, pool, concurrency, warm_up, None)
            if warmed and all(request.error for request in warmed):
                raise SlotError(
                    f"{self._address} answered none of {warm_up} requests",
                    expected="streams of whole answers",
                    found=warmed[0].error,
                    cure="see `llmops status` and the slot's log (`llmops logs`)",
                )
            with _delays() as delays:
                processor = time.process_time()
                results = self._ask_all(client, pool, concurrency, requests, seconds)
                processor = time.process_time() - processor
        duration = max(result.start + result.end_to_end for result in results)
        return results, duration, _overhead(delays, processor / duration)

    def _ask_all(
        self,
        client: httpx.Client,
        pool: ThreadPoolExecutor,
        concurrency: int,
        requests: int | None,
        seconds: float | None,
    ) -> list[RequestResult]:
        """The results, in the order of their ends."""
        results: list[RequestResult] = []
        turns = itertools.count() if requests is None else iter(range(requests))
        stop = threading.Event()
        zero = time.perf_counter()

        def one_client() -> None:
            for _ in turns:
                if stop.is_set() or (seconds is not None and time.perf_counter() - zero >= seconds):
                    return
                results.append(self._ask(client, zero))
                self._report(len(results))

        clients = [pool.submit(one_client) for _ in range(concurrency)]
        try:
            for finished in clients:
                finished.result()
        finally:
            stop.set()  # an interrupt must not wait for all the requests
        return results

    def _ask(self, client: httpx.Client, zero: float) -> RequestResult:
        body = self._contract.body(next(self._prompts), self._max_tokens, stream=True)
        arrivals = _Arrivals(self._contract)
        started = time.perf_counter()
        error = None
        try:
            with client.stream("POST", self._address, json=body) as response:
                if response.status_code == httpx.codes.OK:
                    # To the very end, or the connection could not be used again.
                    for content in response.iter_bytes():
                        now = time.perf_counter()
                        arrivals.add(content, now)
                        # httpx limits each wait; this, a stream that drips on for ever.
                        if now - started > self._timeout_seconds:
                            raise httpx.ReadTimeout("the answer took too long")
                    arrivals.close()
                    error = arrivals.error
                else:
                    text = response.read().decode(errors="replace")
                    error = f"status {response.status_code}: {text}"
        except httpx.TimeoutException:
            error = f"no end within {self._timeout_seconds:g} s"
        except httpx.TransportError as reason:
            error = f"{type(reason).__name__}: {reason}"
        ended = arrivals.ended if error is None else None
        return RequestResult(
            start=started - zero,
            time_to_first_token=None if arrivals.first is None else arrivals.first - started,
            inter_token_latencies=tuple(arrivals.latencies),
            end_to_end=(ended or time.perf_counter()) - started,
            output_tokens=arrivals.tokens,
            error=error and error[:LONGEST_REASON],
        )

    def _report(self, finished: int) -> None:
        now = time.perf_counter()
        if self._on_progress and now - self._reported >= REPORT_INTERVAL_SECONDS:
            self._reported = now
            self._on_progress(finished)


class _Arrivals:
    """When the tokens of one answer came."""

    def __init__(self, contract: RequestContract) -> None:
        self.first: float | None = None
        self.ended: float | None = None
        self.tokens = 0
        self.latencies: list[float] = []
        self._contract = contract
        self._reason: str | None = None
        self._last_token = 0.0
        self._last_piece: float | None = None
        self._unfinished_line = b""

    @property
    def error(self) -> str | None:
        """Why this is no whole answer; None if it is one."""
        if self._reason is None and self.ended is None:
            return "the stream ended before the answer did"
        return self._reason

    def add(self, content: bytes, now: float) -> None:
        """Takes what came, any part of the stream, at time `now`."""
        *lines, self._unfinished_line = (self._unfinished_line + content).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and self._reason is None:
                self._add_piece(line.removeprefix(b"data:"), now)

    def close(self) -> None:
        """Takes the clean end of the response, which HTTP tells from a broken one."""
        if self._contract.finish_reason is None:
            self.ended = self._last_piece

    def _add_piece(self, text: bytes, now: float) -> None:
        try:
            piece = json.loads(text)
        except ValueError:
            piece = None
        if not isinstance(piece, dict):
            self._reason = (
                f"not a JSON object in the stream: {text.decode(errors='replace').strip()}"
            )
            return
        if "error" in piece:
            self._reason = f"error in the stream: {piece['error']}"
            return
        self._last_piece = now
        tokens = self._contract.tokens(piece, self.tokens)
        new = tokens - self.tokens
        if new > 0:
            if self.first is None:
                self.first = now
            else:
                self.latencies += [(now - self._last_token) / new] * new
            self.tokens = tokens
            self._last_token = now
        if self._contract.ends(piece):
            self.ended = now


@contextmanager
def _delays() -> Iterator[list[float]]:
    """How late a thread beside the clients runs each time, seconds."""
    delays: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            planned = time.perf_counter() + DELAY_INTERVAL_SECONDS
            time.sleep(DELAY_INTERVAL_SECONDS)
            delays.append(max(0.0, time.perf_counter() - planned))

    ticker = threading.Thread(target=tick, name="delays")
    ticker.start()
    try:
        yield delays
    finally:
        stop.set()
        ticker.join()


def _overhead(delays: list[float], cpu_share: float) -> ClientOverhead:
    ordered = sorted(delays) or [0.0]  # shorter than one interval
    return ClientOverhead(
        delay_p50=ordered[len(ordered) // 2],
        delay_p99=ordered[int(0.99 * (len(ordered) - 1))],
        cpu_share=cpu_share,
    )


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: a JSON array of strings.

    Raises:
        DataError: it is something else.
    """
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"The prompts in {path} cannot be read", found=error, cure="write a JSON array"
        ) from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise DataError(
            f"{path} does not hold prompts",
            expected="a JSON array of strings",
            found=type(prompts).__name__,
            cure="write the prompts as one JSON array",
        )
    return prompts


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="llmops_assets.serving.load",
        description="Measures a model in Triton; prints one result per concurrency as a JSON "
        "array.",
    )
    parser.add_argument("--url", required=True, help="a slot's or a gateway's address")
    parser.add_argument("--model", required=True)
    parser.add_argument("--version", type=int, help="pin the requests to this version")
    parser.add_argument("--prompts", required=True, type=Path, help="JSON array of strings")
    parser.add_argument("--concurrency", required=True, type=int, nargs="+", help="clients at once")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--requests", type=int, help="to measure at each concurrency")
    amount.add_argument("--seconds", type=float, help="to measure at each concurrency")
    parser.add_argument("--warm-up", type=int, help="requests before; 2 per client unless given")
    parser.add_argument("--max-tokens", required=True, type=int, help="longest answer")
    parser.add_argument("--timeout-seconds", required=True, type=float, help="of one request")
    parser.add_argument(
        "--contract",
        type=RequestContract.model_validate_json,
        default=EMBEDDED,
        help="JSON of how the package is asked; the embedded toolchain's unless given",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of prompts")
    parser.add_argument("--output", type=Path, help="write to this file instead of printing")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        prompts = read_prompts(options.prompts)
        results = [
            measure(
                options.url,
                options.model,
                prompts,
                concurrency=concurrency,
                requests=options.requests,
                seconds=options.seconds,
                warm_up=options.warm_up,
                max_tokens=options.max_tokens,
                timeout_seconds=options.timeout_seconds,
                seed=options.seed,
                version=options.version,
                contract=options.contract,
                on_progress=_reporter(concurrency, options.requests),
            )
            for concurrency in options.concurrency
        ]
    except LLMOpsError as error:
        print(error, file=sys.stderr)
        return 1
    text = json.dumps([result.model_dump(mode="json") for result in results], allow_nan=False)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0


def _reporter(concurrency: int, of: int | None) -> Callable[[int], None]:
    def report(step: int) -> None:
        report_progress(phase=f"latency at concurrency {concurrency}", step=step, of=of)

    return report


if __name__ == "__main__":
    sys.exit(main())
