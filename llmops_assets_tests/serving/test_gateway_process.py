"""The gateway's process under signals: what a supervisor, or a killer, does to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from llmops_assets.serving.gateway_process import LARGEST_LOG_BYTES
from llmops_assets.serving.slots import Colour, Environment

from .envoy_rig import TOKEN, Rig, Upstream, rig, upstream

PRODUCTION = Environment.PRODUCTION


@pytest.fixture(scope="module")
def blue() -> Iterator[Upstream]:
    with upstream("blue") as server:
        yield server


@pytest.fixture
def built(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path, start=False) as prepared:
        yield prepared


class Supervised:
    """The process as a supervisor has it."""

    def __init__(self, built: Rig) -> None:
        self._built = built
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._built.log.open("ab") as log:
            process = subprocess.Popen(self._built.gateway.command(), stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        while not self._built.gateway.admin.ready():
            assert process.poll() is None, self._built.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    def restart(self) -> None:
        self.process.wait(10)
        self.process = self._start()

    @property
    def envoy(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child


@pytest.fixture
def supervised(built: Rig) -> Iterator[Supervised]:
    process = Supervised(built)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
        process.process.wait(10)


@pytest.mark.timeout(60)
def test_running_calls_end_before_envoy_does(
    built: Rig, supervised: Supervised, blue: Upstream
) -> None:
    """`llmops down`, or a restart, must not cut a stream; nobody new gets in meanwhile."""
    built.serve("m", blue.target(Colour.BLUE))
    envoy = supervised.envoy
    answers: list[bytes] = []
    headers = {"tokens": "20", "pause": "0.1"}

    def ask() -> None:
        url = built.base() + "/v2/models/m/generate_stream"
        answers.append(httpx.post(url, headers=headers, timeout=20, trust_env=False).content)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    with httpx.Client(base_url=built.base(), trust_env=False) as client:
        client.post("/v2/models/m/infer").raise_for_status()
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        begin = time.monotonic()
        os.kill(supervised.process.pid, signal.SIGTERM)
        time.sleep(0.7)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", built.ports[PRODUCTION]), timeout=5)
        # A connection that is there already has its call answered, and is then closed.
        late = client.post("/v2/models/m/infer")
        assert (late.status_code, late.headers.get("connection")) == (200, "close")
        for thread in threads:
            thread.join(20)
    assert supervised.process.wait(10) == 0
    assert answers == [TOKEN * 20] * 4
    assert 1.0 < time.monotonic() - begin < 10
    assert not envoy.is_running()


@pytest.mark.timeout(60)
def test_killed_gateway_is_back_with_its_last_good_route(
    built: Rig, supervised: Supervised, blue: Upstream
) -> None:
    """Whichever of the two is killed: nothing stays behind, and one start is enough."""
    generation = built.serve("m", blue.target(Colour.BLUE))
    for victim in ("envoy", "process"):
        envoy = supervised.envoy
        begin = time.monotonic()
        if victim == "envoy":
            envoy.kill()
            assert supervised.process.wait(5) == 1
        else:
            supervised.process.kill()
        supervised.restart()
        answer = built.request("POST", "/v2/models/m/infer")
        away = time.monotonic() - begin
        print(f"{victim} killed: back after {away:.2f} s")
        assert answer.status_code == 200
        assert answer.headers["x-llmops-generation"] == str(generation)
        assert not envoy.is_running() or envoy.status() == psutil.STATUS_ZOMBIE
        # On a quiet machine it takes half a second.
        assert away < 5


@pytest.mark.timeout(60)
def test_process_rotates_the_log(built: Rig, supervised: Supervised, blue: Upstream) -> None:
    """Envoy appends for ever; somebody must set the file aside and tell it."""
    log = built.gateway.access_log
    built.serve("m", blue.target(Colour.BLUE))
    log.file.write_bytes(b"x" * LARGEST_LOG_BYTES + b"\n")
    since = log.end()
    deadline = time.monotonic() + 15
    sent: list[str] = []
    # Envoy makes the new file when it has something to write there.
    while not (log.file.with_name("access.log.1").exists() and log.file.exists()):
        assert time.monotonic() < deadline, built.log.read_text()
        sent.append(built.request("POST", "/v2/models/m/infer").headers["x-request-id"])
        time.sleep(0.1)
    built.logged(request_id=sent[-1])
    assert [call.request_id for call in log.read(since).calls] == sent
    assert log.file.stat().st_size < LARGEST_LOG_BYTES
