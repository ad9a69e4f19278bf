"""Real Triton servers in real slots, serving the tiny Llama."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmops_assets.evidence.keys import create_keys, local_signer
from llmops_assets.evidence.package_signature import sign_package
from llmops_assets.serving import triton
from llmops_assets.serving.slot_process import place
from llmops_assets.serving.slots import Deployment, Endpoint
from llmops_assets.settings import Settings
from llmops_assets.storage.store import Artifact, FileEntry, hash_file
from llmops_assets_tests.tiny_llama import TinyLlama, tiny_llama

MODEL = "tiny"
READY_SECONDS = 60


@dataclass(frozen=True)
class Server:
    """A running slot."""

    slot_directory: Path
    endpoint: Endpoint
    version: int
    process: subprocess.Popen[bytes]


def artifact_of(directory: Path) -> Artifact:
    """A directory as the store would describe it."""
    files = tuple(
        FileEntry(path.relative_to(directory).as_posix(), hash_file(path), path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    )
    return Artifact(digest="sha256:" + "0" * 64, media_type="test", files=files)


def free_endpoint() -> Endpoint:
    """Loopback ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return Endpoint("127.0.0.1", *ports)


def fill(package: Path, slot_directory: Path, state: Path, version: int = 1) -> Endpoint:
    """Signs the package with the keys of `state` and places it into a slot on free ports."""
    artifact = artifact_of(package)
    endpoint = free_endpoint()
    signer = local_signer(key_folder(state), "package")
    signature = sign_package(package, artifact.digest, signer)
    deployment = Deployment(package=artifact.digest, release="tiny.v1", version=version)
    place(package, artifact, deployment, MODEL, endpoint, slot_directory, signature)
    return endpoint


def key_folder(state: Path) -> Path:
    """The keys that servers with this state folder trust."""
    folder = Settings(state=state).key_folder
    create_keys(folder)
    return folder


def start_process(slot_directory: Path, state: Path) -> subprocess.Popen[bytes]:
    """The slot's process, its output in `log` in the slot's directory."""
    with (slot_directory / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "llmops_assets.serving.slot_process", str(slot_directory)],
            env={**os.environ, "LLMOPS_STATE": str(state)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@contextmanager
def running(
    slot_directory: Path, endpoint: Endpoint, version: int, state: Path
) -> Iterator[Server]:
    """The slot's server, ready; ended at the end."""
    process = start_process(slot_directory, state)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not triton.ready(endpoint, MODEL, version):
            log = (slot_directory / "log").read_text(errors="replace")
            assert process.poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.05)
        yield Server(slot_directory, endpoint, version, process)
    finally:
        process.terminate()
        try:
            process.wait(triton.EXIT_TIMEOUT_SECONDS + 10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return tiny_llama(tmp_path_factory.getbasetemp() / "tiny_llama")


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the servers of the session share their backends."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="session")
def server(
    tiny: TinyLlama, state: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One server for the tests that only ask it something."""
    slot_directory = tmp_path_factory.mktemp("slot")
    endpoint = fill(tiny.package, slot_directory, state, version=7)
    with running(slot_directory, endpoint, 7, state) as started:
        yield started


@pytest.fixture
def start(tiny: TinyLlama, state: Path, tmp_path: Path) -> Iterator[Callable[[str, int], Server]]:
    """Starts a server of the test's own: `start(name, version)`."""
    with ExitStack() as stack:

        def start_one(name: str, version: int) -> Server:
            endpoint = fill(tiny.package, tmp_path / name, state, version)
            return stack.enter_context(running(tmp_path / name, endpoint, version, state))

        yield start_one
