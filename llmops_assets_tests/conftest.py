"""What tests of several phases share."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmops_assets.evidence.log import EvidenceLog

from .evidence_rig import open_evidence
from .release_rig import Rig


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
def evidence(tmp_path: Path) -> EvidenceLog:
    """An evidence log in the test's own folder."""
    return open_evidence(tmp_path / "state")


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
    from .plain_mlflow import MLflowServer  # which imports MLflow, as few tests need

    server = MLflowServer(tmp_path_factory.mktemp("mlflow"), free_port())
    try:
        server.serve({})
        yield server.url
    finally:
        server.kill()
