"""The access log: what a real Envoy writes, read while it is written and rotated."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from llmops_assets.errors import GatewayError
from llmops_assets.serving import access_log
from llmops_assets.serving.access_log import FORMAT, AccessLog, Call, Position, summarize
from llmops_assets.serving.slots import Colour

from .envoy_rig import Rig, Upstream, rig, upstream

START = datetime(2026, 1, 1, tzinfo=UTC)
CALL: dict[str, Any] = {
    **dict.fromkeys(FORMAT),
    "environment": "production",
    "time": START.isoformat(),
    "model": "m",
    "generation": 1,
    "call": "generate",
    "pinned": False,
    "release": "m.v1",
    "version": 1,
    "colour": "blue",
    "cluster": "production/m/1/blue",
    "status": 200,
    "flags": "-",
    "bytes_received": 1,
    "bytes_sent": 1,
    "first_byte_ms": 10,
    "duration_ms": 20,
}


def call(**fields: object) -> Call:
    return Call.model_validate({**CALL, **fields})


def line(request_id: str) -> bytes:
    return json.dumps({**CALL, "request_id": request_id}).encode() + b"\n"


def ids(calls: tuple[Call, ...]) -> list[str | None]:
    return [each.request_id for each in calls]


@pytest.fixture(scope="module")
def blue() -> Iterator[Upstream]:
    with upstream("blue") as server:
        yield server


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, blue: Upstream) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("log")) as built:
        built.serve("m", blue.target(Colour.BLUE))
        yield built


def test_log_has_what_the_reader_wants() -> None:
    """A field that only one of them knows would be None for ever, without an error."""
    assert set(Call.model_fields) == {"environment", *FORMAT}


def test_call_is_told_in_full(serving: Rig) -> None:
    """A canary is judged from it: each call names generation, slot, result and times."""
    answer = serving.request("POST", "/v2/models/m/generate_stream", {"pause": "0.1"})
    entry = serving.logged(request_id=answer.headers["x-request-id"])
    assert abs(entry.time - datetime.now(UTC)) < timedelta(seconds=30)
    assert (entry.environment, entry.model, entry.generation) == ("production", "m", 1)
    assert (entry.call, entry.pinned, entry.method) == ("generate_stream", False, "POST")
    assert (entry.release, entry.version, entry.colour) == ("model.v1", 1, "blue")
    assert entry.cluster == entry.slot == "production/m/1/blue"
    assert (entry.status, entry.grpc_status, entry.flags) == (200, None, "-")
    assert (entry.attempts, entry.protocol, entry.details) == (1, "HTTP/1.1", "via_upstream")
    assert entry.path == "/v2/models/m/generate_stream"
    assert entry.bytes_sent == 3 * len(b"data: token\n\n")
    assert entry.upstream_first_byte_ms is not None
    assert entry.first_byte_ms is not None
    assert entry.upstream_first_byte_ms <= entry.first_byte_ms < 200 < entry.duration_ms
    assert not (entry.failed or entry.cancelled or entry.overflowed)


def test_log_keeps_no_secret(serving: Rig) -> None:
    """Prompts and credentials are the clients'; a log is read by many and kept for long."""
    secret = "hunter2"
    headers = {"authorization": f"Bearer {secret}", "x-request-id": secret, "cookie": secret,
               "user-agent": secret, "host": secret, "x-forwarded-for": secret}  # fmt: skip
    path = f"/v2/models/m/generate?text_input={secret}"
    answer = serving.request("POST", path, headers)
    serving.logged(request_id=answer.headers["x-request-id"])
    refused = serving.request("GET", "/" + "x" * 5000, headers)
    entry = serving.logged(request_id=refused.headers["x-request-id"])
    assert secret not in serving.gateway.access_log.file.read_text()
    assert entry.path is not None
    assert len(entry.path) == 256
    assert (entry.status, entry.slot, entry.failed) == (403, None, False)


def test_questions_and_pinned_calls_are_told_apart(serving: Rig) -> None:
    """A monitor that asks for readiness, or a comparing client, must not sway a canary."""
    question = serving.request("GET", "/v2/models/m/ready")
    asked = serving.logged(request_id=question.headers["x-request-id"])
    assert (asked.call, asked.slot) == ("ready", None)
    pinned = serving.request("POST", "/v2/models/m/versions/1/infer")
    chosen = serving.logged(request_id=pinned.headers["x-request-id"])
    assert (chosen.call, chosen.pinned) == ("infer", True)
    begin, end = asked.time, chosen.time + timedelta(seconds=1)
    assert summarize([asked, chosen], begin, end) == {}


def test_no_line_is_lost_or_read_twice_while_envoy_rotates(serving: Rig) -> None:
    """A comparison that misses the lines around a rotation would miss an outbreak there."""
    log = serving.gateway.access_log
    sent: list[str] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            answer = serving.request("POST", "/v2/models/m/infer")
            sent.append(answer.headers["x-request-id"])

    position = log.end()
    thread = threading.Thread(target=load)
    thread.start()
    found: list[str | None] = []
    try:
        for _ in range(40):
            log.rotate(serving.gateway.admin.reopen_logs, largest_bytes=4000, kept=1000)
            reading = log.read(position)
            assert reading.damaged == 0
            found += ids(reading.calls)
            position = reading.position
            stop.wait(0.05)
    finally:
        stop.set()
        thread.join(10)
    serving.logged(request_id=sent[-1])
    found += ids(log.read(position).calls)
    assert len(list(log.file.parent.glob("access.log.*"))) >= 2
    assert [each for each in found if each in set(sent)] == sent


def test_rotation_in_the_middle_of_a_reading_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking for the files and reading one, the name may have come to mean another."""
    log = AccessLog(tmp_path / "access.log")
    log.file.write_bytes(line("a"))
    position = log.end()
    log.file.write_bytes(line("a") + line("b"))
    read = access_log._rest

    def rotate_first(file: Path, offset: int) -> bytes | None:
        monkeypatch.setattr(access_log, "_rest", read)
        log.rotate(log.file.touch, largest_bytes=100, kept=2)
        log.file.write_bytes(line("c") * 5)
        return read(file, offset)

    monkeypatch.setattr(access_log, "_rest", rotate_first)
    assert ids(log.read(position).calls) == ["b", *"ccccc"]


def test_half_written_line_waits(tmp_path: Path) -> None:
    """Envoy writes in pieces; half a line is neither a call nor damage."""
    log = AccessLog(tmp_path / "access.log")
    assert log.read(log.start()).calls == ()
    content = line("a") + line("b")
    log.file.write_bytes(content[:-30])
    first = log.read(log.start())
    assert (ids(first.calls), first.damaged) == (["a"], 0)
    assert log.end() == first.position
    log.file.write_bytes(content)
    second = log.read(first.position)
    assert (ids(second.calls), second.damaged) == (["b"], 0)


def test_line_that_a_killed_envoy_left_is_counted(tmp_path: Path) -> None:
    """The next Envoy writes on behind it; one line is lost then, and that is said."""
    log = AccessLog(tmp_path / "access.log")
    log.file.write_bytes(line("a")[:40] + line("b") + line("c"))
    reading = log.read(log.start())
    assert (ids(reading.calls), reading.damaged) == (["c"], 1)


def test_log_is_bounded(tmp_path: Path) -> None:
    """A log that nobody empties fills the disk, and then the store cannot write."""
    log = AccessLog(tmp_path / "access.log")
    for number in range(10):
        log.file.write_bytes(line(str(number)))
        assert log.rotate(log.file.touch, largest_bytes=100, kept=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "access.log", "access.log.10", "access.log.9",
    ]  # fmt: skip
    assert not log.rotate(log.file.touch, largest_bytes=100, kept=2)
    assert ids(log.read(log.start()).calls) == ["8", "9"]


def test_lines_that_are_gone_are_missed(tmp_path: Path) -> None:
    """A comparison with a hole in it must not look like one without."""
    log = AccessLog(tmp_path / "access.log")
    log.file.write_bytes(line("a"))
    position = log.end()
    for _ in range(4):
        log.file.write_bytes(line("b"))
        log.rotate(log.file.touch, largest_bytes=100, kept=2)
    with pytest.raises(GatewayError, match="gone"):
        log.read(position)
    with pytest.raises(GatewayError, match="gone"):
        log.read(Position(log.end().file, 10_000))


def test_interrupted_rotation_is_finished(tmp_path: Path) -> None:
    """Envoy goes on writing into the renamed file; without a new call it would for ever."""
    log = AccessLog(tmp_path / "access.log")
    log.file.write_bytes(line("a"))

    def fail() -> None:
        raise GatewayError("Envoy does not answer", cure="none")

    with pytest.raises(GatewayError):
        log.rotate(fail, largest_bytes=100, kept=2)
    aside = tmp_path / "access.log.1"
    waiting = log.read(log.start())
    aside.write_bytes(aside.read_bytes() + line("b"))
    log.rotate(log.file.touch, largest_bytes=100, kept=2)
    log.file.write_bytes(line("c"))
    assert ids(waiting.calls + log.read(waiting.position).calls) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("fields", "failed"),
    [
        ({}, False),
        ({"status": 500}, True),
        ({"status": 503, "flags": "UO"}, True),
        ({"status": 429}, False),
        ({"status": 400}, False),
        ({"status": 200, "flags": "UPE"}, True),
        ({"status": 200, "flags": "DC"}, False),
        ({"status": 0, "flags": "DC"}, False),
        ({"status": 504, "flags": "UT"}, True),
        ({"status": 408, "flags": "SI"}, False),
        ({"status": 0, "flags": "UC,URX"}, True),
        ({"status": 200, "grpc_status": 0}, False),
        ({"status": 200, "grpc_status": 13}, True),
        ({"status": 200, "grpc_status": 14}, True),
        ({"status": 200, "grpc_status": 3}, False),
        ({"status": 200, "grpc_status": 1}, False),
    ],
)
def test_failures_are_the_servers(fields: dict[str, object], failed: bool) -> None:
    """A rollout is stopped by them: a client's mistake must not, a cut stream must."""
    assert call(**fields).failed is failed


def test_summary_is_of_one_slot_and_one_time() -> None:
    """Stable and candidate are compared over the same time, by what they answered."""
    calls = [
        call(duration_ms=duration, first_byte_ms=duration // 2, time=START + timedelta(seconds=1))
        for duration in range(1, 101)
    ]
    green = {
        "version": 2,
        "release": "m.v2",
        "colour": "green",
        "cluster": "production/m/2/green/grpc",
        "time": START + timedelta(seconds=2),
    }
    calls += [
        call(**green, status=503, flags="UO", duration_ms=1),
        call(**green, status=400, duration_ms=1),
        call(**green, flags="DC", duration_ms=9999),
        call(**green, duration_ms=40),
        call(**{**green, "cluster": "production/m/2/green"}, grpc_status=13, duration_ms=1),
        # Before, after, pinned, a question, and refused by the gateway.
        call(time=START - timedelta(seconds=1)),
        call(time=START + timedelta(seconds=10)),
        call(pinned=True),
        call(cluster="production/m/1/blue/questions"),
        call(cluster=None, call=None),
    ]
    found = summarize(reversed(calls), START, START + timedelta(seconds=10))
    assert set(found) == {"production/m/1/blue", "production/m/2/green"}
    blue, green_found = found["production/m/1/blue"], found["production/m/2/green"]
    assert (blue.requests, blue.failures) == (100, 0)
    assert blue.duration_p50_ms == pytest.approx(50.5)
    assert blue.duration_p95_ms == pytest.approx(95.05)
    assert blue.first_byte_p50_ms == pytest.approx(25, abs=0.5)
    assert (green_found.release, green_found.version) == ("m.v2", 2)
    assert (green_found.requests, green_found.failures, green_found.overflows) == (5, 2, 1)
    assert (green_found.refusals, green_found.cancelled) == (1, 1)
    assert green_found.duration_p50_ms == green_found.duration_p95_ms == 40
