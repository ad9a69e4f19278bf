"""One real stack for the tests that need one: starting it takes ten seconds or more."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmops_assets.local import stack
from llmops_assets.local.ports import FALLBACK_PORTS, is_free
from llmops_assets.local.processes import supervised
from llmops_assets.settings import Settings

DEFINITIONS = "llmops_assets_tests.local.tiny_definitions"


def free_ports(count: int) -> list[int]:
    """Ports apart from those that a developer's own stack prefers or falls back to."""
    candidates = (port for port in range(FALLBACK_PORTS.stop, 32768) if is_free("127.0.0.1", port))
    return [next(candidates) for _ in range(count)]


@pytest.fixture(scope="package")
def settings() -> Iterator[Settings]:
    """Settings of a state folder of its own; whatever runs there is stopped at the end."""
    # Not pytest's folder: its path is too long for Unix sockets.
    folder = Path(tempfile.mkdtemp(prefix="llmops-"))
    dagster, mlflow, gateway, staging = free_ports(4)
    settings = Settings(
        state=folder,
        dagster_port=dagster,
        mlflow_port=mlflow,
        gateway_port=gateway,
        staging_gateway_port=staging,
    )
    yield settings
    stack.down(settings)
    assert not supervised(folder)
    shutil.rmtree(folder)


@pytest.fixture
def running(settings: Settings) -> stack.StackInfo:
    """The stack, running, whatever the test before did to it."""
    return stack.up(settings, print, definitions=DEFINITIONS)
