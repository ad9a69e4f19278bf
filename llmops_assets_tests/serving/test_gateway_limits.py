"""What the gateway does when a slot or a client misbehaves: real Envoy, scripted servers."""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest

from llmops_assets.serving.envoy_config import OVERLOADED
from llmops_assets.serving.gateway_limits import GatewayLimits
from llmops_assets.serving.slots import Colour, Environment

from ..waiting import wait_for
from .envoy_rig import (
    TOKEN,
    Rig,
    Upstream,
    free_port,
    raw_request,
    read_request,
    rig,
    scripted,
    target,
    upstream,
)

PRODUCTION = Environment.PRODUCTION
INFER = "/v2/models/m/infer"
STREAM = "/v2/models/m/generate_stream"
LIMITS = GatewayLimits(
    connect_seconds=0.5,
    call_seconds=1.0,
    question_seconds=0.5,
    upload_seconds=0.5,
    stream_idle_seconds=1.0,
    request_headers_seconds=1.0,
    request_bytes=10_000,
    header_kibibytes=8,
    connections=10,
    concurrent_requests=2,
    waiting_requests=1,
)
HEAD = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
QUESTION = b"GET /v2/models/m HTTP/1.1\r\nHost: x\r\n"
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 s: closing sends a reset."""


@pytest.fixture(scope="module")
def blue() -> Iterator[Upstream]:
    with upstream("blue") as server:
        yield server


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, blue: Upstream) -> Iterator[Rig]:
    """A gateway with little patience, `m` on a good slot."""
    with rig(tmp_path_factory.mktemp("strict"), limits=LIMITS) as built:
        built.serve("m", blue.target(Colour.BLUE))
        yield built


def counter(built: Rig, name: str) -> int:
    found = built.gateway.admin.stats(f"^{name}$").values
    assert len(found) == 1, found
    return int(next(iter(found.values())))


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\ncontent-le", b"nonsense\r\n\r\n"])
def test_request_that_reached_a_slot_is_not_repeated(strict: Rig, answer: bytes) -> None:
    """The slot may have run it: a second try could do the work, and its effects, twice."""
    arrived: list[bytes] = []

    def die(connection: socket.socket, number: int) -> None:
        arrived.append(read_request(connection))
        connection.sendall(answer)

    with scripted(die) as port:
        strict.serve("dying", target(port, Colour.BLUE))
        got = strict.request("POST", "/v2/models/dying/infer")
    call = strict.logged(request_id=got.headers["x-request-id"])
    assert got.status_code == 502 if answer.startswith(b"nonsense") else 503
    assert "error" in got.json()
    assert len(arrived) == 1
    assert call.attempts == 1
    assert call.failed


def test_request_is_tried_again_where_no_connection_was_made(strict: Rig) -> None:
    """Nothing was sent, so nothing can have run: a slot that just starts again gets its chance."""
    port = free_port()  # nobody listens there
    strict.serve("away", target(port, Colour.BLUE))
    got = strict.request("POST", "/v2/models/away/infer")
    assert got.status_code == 503
    call = strict.logged(request_id=got.headers["x-request-id"])
    assert call.attempts == 2
    assert "UF" in call.flags
    assert call.failed


def test_stream_that_breaks_off_is_a_failure_and_not_repeated(strict: Rig) -> None:
    """Its status is 200 for ever: only the flags tell that the answer is not whole."""
    arrived: list[bytes] = []

    def die(connection: socket.socket, number: int) -> None:
        arrived.append(read_request(connection))
        connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        connection.sendall(f"{len(TOKEN):x}\r\n".encode() + TOKEN + b"\r\n")
        time.sleep(0.1)

    with scripted(die) as port:
        strict.serve("broken", target(port, Colour.BLUE))
        with (
            pytest.raises(httpx.RemoteProtocolError),
            httpx.stream(
                "POST", strict.base() + "/v2/models/broken/generate_stream", trust_env=False
            ) as got,
        ):
            assert got.status_code == 200
            got.read()
    call = strict.logged(request_id=got.headers["x-request-id"])
    assert len(arrived) == 1
    assert call.status == 200
    assert call.failed
    assert not call.cancelled


def test_stream_may_last_but_not_fall_silent(strict: Rig) -> None:
    """An answer takes as long as it takes; a slot that hangs must not hold its client."""
    lasting = strict.request("POST", STREAM, {"tokens": "12", "pause": "0.15"})
    assert lasting.content == TOKEN * 12  # 1.8 s, with 1 s for other calls and between pieces
    headers = {"tokens": "2", "pause": "2.0"}
    with (
        pytest.raises(httpx.RemoteProtocolError),
        httpx.stream("POST", strict.base() + STREAM, headers=headers, trust_env=False) as got,
    ):
        got.read()
    call = strict.logged(request_id=got.headers["x-request-id"])
    assert (call.status, call.failed) == (200, True)


def test_slow_answers_end_in_time(strict: Rig, blue: Upstream) -> None:
    """No client waits for ever; a question has less time than an inference."""
    blue.pause = 2.0
    try:
        begin = time.monotonic()
        assert strict.request("GET", "/v2/models/m/ready").status_code == 504
        middle = time.monotonic()
        assert strict.request("POST", INFER).status_code == 504
        end = time.monotonic()
    finally:
        blue.pause = 0.0
    assert 0.4 < middle - begin < 0.95
    assert 0.9 < end - middle < 1.9


def test_slow_requests_end_in_time(strict: Rig, blue: Upstream) -> None:
    """Clients that trickle (slowloris) must not hold connections; the slot sees none of it."""
    before = len(blue.seen)
    for sent, status in (
        (b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\n", b"408"),
        (b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{", b"408"),
    ):
        begin = time.monotonic()
        with socket.create_connection(("127.0.0.1", strict.ports[PRODUCTION])) as connection:
            connection.settimeout(5)
            connection.sendall(sent)
            answer = connection.recv(4096)
        assert answer.split(b" ")[1] == status, answer
        assert time.monotonic() - begin < 2.5
    assert blue.seen[before:] == []


def test_trickled_body_ends_in_time(strict: Rig, blue: Upstream) -> None:
    """A byte now and then keeps every idle timer at rest; the call as a whole has an end."""
    before = len(blue.seen)
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", strict.ports[PRODUCTION])) as connection:
        connection.settimeout(0.2)
        connection.sendall(
            b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"
        )
        answer = b""
        while not answer:
            assert time.monotonic() - begin < 4
            try:
                answer = connection.recv(4096)
            except TimeoutError:
                connection.sendall(b"{")
    assert answer.split(b" ")[1] in (b"408", b"504"), answer
    assert blue.seen[before:] == []


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param(HEAD % 10001 + b"x" * 10001, b"413", id="body"),
        pytest.param(
            b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2711\r\n" + b"x" * 10001 + b"\r\n0\r\n\r\n",
            b"413",
            id="chunks",
        ),
        pytest.param(QUESTION + b"x: " + b"x" * 9000 + b"\r\n\r\n", b"431", id="header"),
        pytest.param(QUESTION + b"x: y\r\n" * 200 + b"\r\n", b"431", id="headers"),
        pytest.param(
            b"GET /v2/models/m?" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"431", id="path"
        ),
    ],
)
def test_large_requests_are_refused(
    strict: Rig, blue: Upstream, request_: bytes, status: bytes
) -> None:
    """Memory of gateway and slot belongs to all clients."""
    before = len(blue.seen)
    answer = raw_request(strict.ports[PRODUCTION], request_)
    assert answer.split(b" ")[1] == status, answer
    assert blue.seen[before:] == []


def test_largest_request_passes(strict: Rig) -> None:
    """The bound is where it says."""
    url = strict.base() + INFER
    assert httpx.post(url, content=b"x" * 9990, trust_env=False).status_code == 200


def test_overflow_is_answered_and_counted(strict: Rig, blue: Upstream) -> None:
    """A slot that has its fill must not collect requests that nobody waits for any more."""
    cluster = "cluster.production/m/1/blue"
    before = counter(strict, f"{cluster}.upstream_rq_pending_overflow")
    blue.pause = 0.4
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: strict.request("POST", INFER), range(8)))
    finally:
        blue.pause = 0.0
    full = [answer for answer in answers if answer.status_code == 503]
    assert {answer.status_code for answer in answers} == {200, 503}
    # Two run, one waits.
    assert len(full) == 5
    for answer in full:
        assert answer.headers["x-envoy-overloaded"] == "true"
        assert answer.headers["retry-after"] == "1"
        assert answer.json() == {"error": OVERLOADED}
    # Envoy counts after it has answered, so an answer may be here before its count.
    overflowed = partial(counter, strict, f"{cluster}.upstream_rq_pending_overflow")
    wait_for(lambda: overflowed() >= before + 5, "five overflows counted")
    assert overflowed() == before + 5
    calls = [strict.logged(request_id=answer.headers["x-request-id"]) for answer in answers]
    assert sum(call.overflowed for call in calls) == 5
    assert all(call.failed == call.overflowed for call in calls)


def test_connections_are_limited_and_counted(strict: Rig) -> None:
    """A client that opens connections without end must not take the file descriptors of all."""
    where = ("127.0.0.1", strict.ports[PRODUCTION])
    limited = "connection_limit.production.limited_connections"
    before = counter(strict, limited)
    connections = [socket.create_connection(where, timeout=5) for _ in range(12)]
    try:
        time.sleep(0.2)
        closed = 0
        for connection in connections:
            connection.setblocking(False)
            try:
                closed += connection.recv(1) == b""
            except BlockingIOError:
                continue
        assert closed == 2
        assert counter(strict, limited) == before + 2
        # Staging has a count of its own.
        assert strict.request("GET", "/v2/health/live", environment=Environment.STAGING)
    finally:
        for connection in connections:
            connection.close()
    active = partial(counter, strict, "connection_limit.production.active_connections")
    wait_for(lambda: not active(), "the end of the connections")
    assert strict.request("POST", INFER).status_code == 200


def test_client_that_leaves_is_nobodys_failure(strict: Rig) -> None:
    """A canary must not be judged by the patience of clients."""
    with socket.create_connection(("127.0.0.1", strict.ports[PRODUCTION])) as connection:
        connection.sendall(
            b"POST %s HTTP/1.1\r\nHost: x\r\ntokens: 20\r\npause: 0.1\r\n\r\n" % STREAM.encode()
        )
        answer = connection.recv(4096)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    (request_id,) = re.findall(rb"x-request-id: (\S+)", answer)
    call = strict.logged(request_id=request_id.decode())
    assert call.cancelled
    assert not call.failed
