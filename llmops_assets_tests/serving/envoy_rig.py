"""A real Envoy on free ports, and small HTTP servers that stand for Triton."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from llmops_assets.serving.gateway import EnvoyGateway
from llmops_assets.serving.routes import Routes, RouteTarget
from llmops_assets.serving.slots import Colour, Environment
from llmops_assets.storage.folder import FolderStore

PACKAGE = "sha256:" + "0" * 64
START_SECONDS = 20.0
TOKEN = b"data: token\n\n"


class Upstream(ThreadingHTTPServer):
    """Answers everything with 200 and remembers what reached it, byte for byte.

    `generate_stream` streams `tokens` pieces, one every `pause` seconds; a request
    header `status` picks another status.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name = name
        self.seen: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.pause = 0.0
        self.metrics_page = ""

    def target(self, colour: Colour, *, weight: int = 100, version: int = 1) -> RouteTarget:
        return RouteTarget(
            colour=colour,
            weight=weight,
            package=PACKAGE,
            release=f"model.v{version}",
            version=version,
            host="127.0.0.1",
            http_port=self.server_port,
            grpc_port=self.server_port,
            metrics_port=self.server_port,
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60

    @property
    def upstream(self) -> Upstream:
        assert isinstance(self.server, Upstream)
        return self.server

    def __getattr__(self, name: str) -> Callable[[], None]:
        # The base class calls `do_<METHOD>`; all methods are answered alike.
        if name.startswith("do_"):
            return self._respond
        raise AttributeError(name)

    def _respond(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/metrics":
            self._answer(200, self.upstream.metrics_page.encode())
            return
        self.upstream.seen.append((self.command, self.path))
        self.upstream.headers.append({key.lower(): value for key, value in self.headers.items()})
        if self.path.partition("?")[0].endswith("/generate_stream"):
            self._stream(int(self.headers.get("tokens", "3")))
            return
        time.sleep(self.upstream.pause)
        body = json.dumps({"answered_by": self.upstream.name}).encode()
        self._answer(int(self.headers.get("status", "200")), body)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-llmops-release", "a lie of the model")
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, tokens: int) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for _ in range(tokens):
            self.wfile.write(f"{len(TOKEN):x}\r\n".encode() + TOKEN + b"\r\n")
            time.sleep(float(self.headers.get("pause", "0.01")))
        self.wfile.write(b"0\r\n\r\n")

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@contextlib.contextmanager
def upstream(name: str) -> Iterator[Upstream]:
    server = Upstream(name)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Rig:
    """A gateway with its Envoy and a store."""

    def __init__(self, folder: Path) -> None:
        self.store_folder = folder / "store"
        self.store = FolderStore(self.store_folder)
        self.gateway = EnvoyGateway(folder / "gateway", timeout_seconds=10)
        self.routes = Routes(self.store, self.gateway)
        self.ports = {environment: free_port() for environment in Environment}
        self.gateway.bootstrap(self.ports)
        self.log = folder / "envoy.log"
        self._envoy: subprocess.Popen[bytes] | None = None

    def base(self, environment: Environment = Environment.PRODUCTION) -> str:
        return f"http://127.0.0.1:{self.ports[environment]}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._envoy = subprocess.Popen(self.gateway.command(), stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self.gateway.admin.ready():
            assert self._envoy.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        if self._envoy is not None:
            self._envoy.kill()
            self._envoy.wait(timeout=10)
            self._envoy = None

    def serve(
        self,
        model: str,
        *targets: RouteTarget,
        environment: Environment = Environment.PRODUCTION,
    ) -> int:
        """Routes a model to targets; returns the route's generation."""
        _, digest = self.routes.current(environment, model)
        return self.routes.change(
            environment, model, targets, actor="test", reason="a test", expected=digest
        ).generation

    def request(
        self,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        environment: Environment = Environment.PRODUCTION,
    ) -> httpx.Response:
        url = self.base(environment) + path
        # `verify` matters to https only, and takes 30 ms a call.
        return httpx.request(
            method, url, headers=headers, timeout=10, trust_env=False, verify=False
        )


@contextlib.contextmanager
def rig(folder: Path, *, start: bool = True) -> Iterator[Rig]:
    built = Rig(folder)
    try:
        if start:
            built.start()
        yield built
    finally:
        built.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def raw_request(port: int, request: bytes) -> bytes:
    """Sends bytes as they are, so that no client library tidies them; returns the answer's start.

    Empty when the server closed the connection without an answer.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.settimeout(5)
        connection.sendall(request)
        try:
            return connection.recv(4096)
        except ConnectionResetError:
            return b""
