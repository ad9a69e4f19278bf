"""A real Envoy on free ports, and small servers that stand for Triton."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx

from llmops_assets.serving.access_log import Call
from llmops_assets.serving.gateway import DEFAULT_LIMITS, EnvoyGateway, envoy_command
from llmops_assets.serving.gateway_limits import GatewayLimits
from llmops_assets.serving.routes import Routes, RouteTarget
from llmops_assets.serving.slots import Colour, Environment

from ..evidence_rig import open_evidence

PACKAGE = "sha256:" + "0" * 64
START_SECONDS = 20.0
TOKEN = b"data: token\n\n"


def target(
    port: int,
    colour: Colour,
    *,
    weight: int = 100,
    version: int = 1,
    grpc_port: int | None = None,
) -> RouteTarget:
    """A slot on a port of this machine."""
    return RouteTarget(
        colour=colour,
        weight=weight,
        package=PACKAGE,
        release=f"model.v{version}",
        version=version,
        host="127.0.0.1",
        http_port=port,
        grpc_port=grpc_port or port,
        metrics_port=port,
    )


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

    def target(
        self,
        colour: Colour,
        *,
        weight: int = 100,
        version: int = 1,
        grpc_port: int | None = None,
    ) -> RouteTarget:
        return target(self.server_port, colour, weight=weight, version=version, grpc_port=grpc_port)


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


class GrpcUpstream(grpc.GenericRpcHandler):
    """Answers every method of every service with the bytes it got; remembers the methods.

    A stream is answered message by message.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._server = grpc.server(ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers((self,))
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        self.seen.append(handler_call_details.method)  # pyright: ignore[reportAttributeAccessIssue]
        return grpc.stream_stream_rpc_method_handler(lambda requests, context: requests)

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[GrpcUpstream]:
        upstream = cls()
        upstream._server.start()
        try:
            yield upstream
        finally:
            upstream._server.stop(0).wait(5)


@contextlib.contextmanager
def scripted(script: Callable[[socket.socket, int], None]) -> Iterator[int]:
    """A server that does with each connection what a function says; yields its port.

    The function gets the connection and its number, from 0. The connection is closed after
    it, with a reset if the function left data unread.
    """
    listening = socket.create_server(("127.0.0.1", 0))

    def one(connection: socket.socket, number: int) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(10)
            script(connection, number)

    def accept() -> None:
        with contextlib.suppress(OSError):  # the listening socket was closed
            number = 0
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=one, args=(connection, number), daemon=True).start()
                number += 1

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield int(listening.getsockname()[1])
    finally:
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def read_request(connection: socket.socket) -> bytes:
    """One request of HTTP/1.1 with its body, by content-length."""
    content = b""
    while b"\r\n\r\n" not in content:
        content += _some(connection)
    head, _, body = content.partition(b"\r\n\r\n")
    lengths = [
        int(line.partition(b":")[2])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length:")
    ]
    while len(body) < sum(lengths):
        body += _some(connection)
    return head


def _some(connection: socket.socket) -> bytes:
    piece = connection.recv(65536)
    if not piece:
        raise ConnectionResetError
    return piece


class Rig:
    """A gateway with its Envoy and a store."""

    def __init__(self, folder: Path, limits: GatewayLimits = DEFAULT_LIMITS) -> None:
        self.folder = folder
        self.evidence = open_evidence(folder)
        self.gateway = EnvoyGateway(folder / "gateway", timeout_seconds=10, limits=limits)
        self.routes = Routes(self.evidence, self.gateway)
        self.ports = {environment: free_port() for environment in Environment}
        self.gateway.bootstrap(self.ports)
        self.log = folder / "envoy.log"
        self._envoy: subprocess.Popen[bytes] | None = None

    def base(self, environment: Environment = Environment.PRODUCTION) -> str:
        return f"http://127.0.0.1:{self.ports[environment]}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._envoy = subprocess.Popen(
                envoy_command(self.gateway.bootstrap_file), stdout=log, stderr=log
            )
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

    def logged(self, **fields: object) -> Call:
        """What the access log says of the call with these fields; waits until it is there."""
        log = self.gateway.access_log
        deadline = time.monotonic() + 10
        while True:
            for call in log.read(log.start()).calls:
                if fields.items() <= dict(call).items():
                    return call
            assert time.monotonic() < deadline, log.file.read_text()
            time.sleep(0.05)


@contextlib.contextmanager
def rig(
    folder: Path, *, start: bool = True, limits: GatewayLimits = DEFAULT_LIMITS
) -> Iterator[Rig]:
    built = Rig(folder, limits)
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


def http2_request(port: int, headers: Sequence[tuple[bytes, bytes]], body: bytes = b"") -> None:
    """One request of HTTP/2 with exactly these headers; returns when the server is done with it.

    Frames are RFC 9113, headers are literals without indexing (RFC 7541, 6.2.2): nothing
    tidies them. The answer is not decoded.
    """
    block = b"".join(
        b"\x00" + _hpack_string(name) + _hpack_string(value) for name, value in headers
    )
    data = _frame(0x0, 0x1, 1, body) if body else b""
    request = (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + _frame(0x4, 0x0, 0, b"")
        + _frame(0x1, 0x4 if body else 0x5, 1, block)
        + data
    )
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.settimeout(5)
        connection.sendall(request)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while not _stream_ended(received) and (piece := connection.recv(65536)):
                received += piece


def _hpack_string(value: bytes) -> bytes:
    assert len(value) < 127
    return bytes([len(value)]) + value


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return (
        struct.pack(">I", len(payload))[1:]
        + bytes([kind, flags])
        + struct.pack(">I", stream)
        + payload
    )


def _stream_ended(received: bytes) -> bool:
    """Whether END_STREAM, RST_STREAM or GOAWAY is among the frames."""
    while len(received) >= 9:
        length = int.from_bytes(received[:3], "big")
        kind, flags = received[3], received[4]
        if kind in (0x3, 0x7) or (kind in (0x0, 0x1) and flags & 0x1):
            return True
        received = received[9 + length :]
    return False


def grpc_call(
    port: int,
    method: str,
    message: bytes = b"",
    metadata: Mapping[str, str] | None = None,
) -> tuple[grpc.StatusCode, str, bytes]:
    """One unary call of any method; returns status, details and answer."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary(method)
        try:
            answer = call(message, metadata=list((metadata or {}).items()), timeout=10)
        except grpc.RpcError as error:
            return error.code(), error.details() or "", b""  # pyright: ignore[reportAttributeAccessIssue]
        return grpc.StatusCode.OK, "", answer
