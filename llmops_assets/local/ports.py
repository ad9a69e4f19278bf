"""Which port each local server has, remembered so that a restart gets the same.

All ports of a state folder are in one file, `stack.json`: those of the stack's servers,
and three of every slot that ever held something.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from llmops_assets.errors import StackError

# Below the ports that Linux gives to outgoing connections (from 32768 on), so that a
# remembered port is rarely taken by chance while the stack is down.
FALLBACK_PORTS = range(20000, 32000)
LOCK_TIMEOUT_SECONDS = 10
LINGERING_SECONDS = 5.0
LINGERING_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class PortRequest:
    """A port that a server is about to listen on.

    `configured` must be free; without it the remembered port is taken, then `preferred`,
    then any free one. `variable` is what a person sets to configure it.
    """

    name: str
    preferred: int | None = None
    configured: int | None = None
    variable: str | None = None


def claim_ports(file: Path, host: str, requests: Sequence[PortRequest]) -> dict[str, int]:
    """Gives every request a port that is free now, and remembers it in `file`.

    Returns:
        The requests' ports by name.

    Raises:
        StackError: a configured port is taken, or none is free.
    """
    with _locked(file):
        remembered = read_ports(file)
        fallback = _fallback_ports(file)
        reserved = {
            port for name, port in remembered.items() if name not in {r.name for r in requests}
        }
        claimed: dict[str, int] = {}
        for request in requests:
            port = _choose(request, host, remembered.get(request.name), reserved, fallback)
            claimed[request.name] = port
            reserved.add(port)
        _write(file, {**remembered, **claimed})
    return claimed


def release_ports(file: Path, names: Sequence[str]) -> None:
    """Forgets ports; names that have none are ignored."""
    with _locked(file):
        _write(file, {name: p for name, p in read_ports(file).items() if name not in names})


def read_ports(file: Path) -> dict[str, int]:
    """The remembered ports by name; empty when there are none yet.

    Raises:
        StackError: the file is not what this module writes.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): int(port) for name, port in content["ports"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StackError(
            f"{file} is not readable",
            expected='{"ports": {name: number}}',
            found=repr(error),
            cure="delete it and run `llmops up`; servers may then get other ports",
        ) from error


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do it: connections of an ended server that linger are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _comes_free(host: str, port: int, was_ours: bool) -> bool:
    """Whether a server can listen there, if need be in a moment.

    A server of ours that was killed counts as gone once its main thread is, but keeps its
    port until the last of its threads has ended.
    """
    deadline = time.monotonic() + (LINGERING_SECONDS if was_ours else 0)
    while not is_free(host, port):
        if time.monotonic() >= deadline:
            return False
        time.sleep(LINGERING_POLL_SECONDS)
    return True


def holder(port: int) -> str:
    """Who listens on a port, for people; other users' processes cannot be seen."""
    try:
        connections = psutil.net_connections(kind="inet")
    except psutil.AccessDenied:
        connections = []
    for connection in connections:
        if (
            connection.status == psutil.CONN_LISTEN
            and connection.laddr
            and connection.laddr.port == port
            and connection.pid is not None
        ):
            try:
                command = " ".join(psutil.Process(connection.pid).cmdline())
            except psutil.Error:
                command = "?"
            return f"process {connection.pid} ({command[:120]})"
    return "a process that this user cannot see"


def _fallback_ports(file: Path) -> list[int]:
    """All fallback ports, from a place that depends on the file.

    Stacks of several state folders would otherwise take each other's ports whenever one
    of them is down for a moment.
    """
    start = int.from_bytes(hashlib.sha256(str(file.resolve()).encode()).digest()[:4], "big")
    ports = list(FALLBACK_PORTS)
    start %= len(ports)
    return ports[start:] + ports[:start]


def _choose(
    request: PortRequest,
    host: str,
    remembered: int | None,
    reserved: set[int],
    fallback: Sequence[int],
) -> int:
    if request.configured is not None:
        if request.configured in reserved:
            raise StackError(
                f"Port {request.configured} for {request.name} belongs to another of our servers",
                cure=f"set {request.variable} to another port",
            )
        if not _comes_free(host, request.configured, request.configured == remembered):
            raise StackError(
                f"Port {request.configured} for {request.name} is taken",
                expected=f"a free port on {host}",
                found=holder(request.configured),
                cure=f"end that process, or set {request.variable} to another port or unset it",
            )
        return request.configured
    first = [port for port in (remembered, request.preferred) if port is not None]
    for port in (*first, *fallback):
        if port not in reserved and _comes_free(host, port, port == remembered):
            return port
    raise StackError(
        f"No free port for {request.name}",
        expected=f"one of {first} or {FALLBACK_PORTS.start} to {FALLBACK_PORTS.stop - 1}",
        cure=f"end some servers on {host}",
    )


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{file}.lock")
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_SECONDS)
    except Timeout as error:
        raise StackError(
            f"{file} is locked by another process",
            expected=f"the lock within {LOCK_TIMEOUT_SECONDS} s",
            cure="see whether another `llmops` command hangs, and end it",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _write(file: Path, ports: Mapping[str, int]) -> None:
    beside = file.with_name(file.name + ".new")
    with beside.open("w", encoding="utf-8") as stream:
        json.dump({"ports": dict(sorted(ports.items()))}, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    beside.rename(file)
