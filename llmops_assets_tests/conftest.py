"""What tests of several phases share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from llmops_assets.tools import module_command

from .release_rig import Rig

MLFLOW_START_SECONDS = 120


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A platform in the test's own folder."""
    rig = Rig(tmp_path / "rig")
    yield rig
    rig.close()


@pytest.fixture
def packages(rig: Rig) -> None:
    """Packages of three releases, as little as delivery needs of them."""
    for version in (1, 2, 3):
        rig.freeze(f"parrot.v{version}")
        description = json.dumps({"package": version})
        rig.publish(f"parrot.v{version}", "packaged_model", {"package.json": description})


@pytest.fixture(scope="session")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server of the test session's own."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    command = module_command(
        "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", folder / "artifacts", "--serve-artifacts",
    )  # fmt: skip
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + MLFLOW_START_SECONDS
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(process)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the server with its workers, which are its children."""
    import psutil

    family = (
        [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    )
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
    for child in family:
        if child.is_running():
            child.kill()
