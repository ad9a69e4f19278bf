"""One real stack for all tests of the lifecycle, with one model trained once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmops_assets.evidence.verdicts import verdicts
from llmops_assets.local import stack
from llmops_assets.local.processes import supervised
from llmops_assets.serving.slots import Environment
from llmops_assets.settings import Settings
from llmops_assets_tests.lifecycle.stack_user import MODEL, StackUser
from llmops_assets_tests.local.conftest import free_ports

SPEC = Path(__file__).parents[2] / "models" / f"{MODEL}.yaml"
# Training takes about a minute on two quiet cores, and runs niced.
TIMEOUT_SECONDS = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.stack)
            item.add_marker(pytest.mark.timeout(TIMEOUT_SECONDS))


@dataclass(frozen=True)
class FirstRelease:
    """The release whose training all others reuse; it was promoted at once."""

    key: str
    commit: str
    promotion: str
    """The run that promoted it."""


@pytest.fixture(scope="session")
def user() -> Iterator[StackUser]:
    """The user of a stack of its own; whatever runs there is stopped at the end."""
    # Not pytest's folder: its path is too long for Unix sockets.
    folder = Path(tempfile.mkdtemp(prefix="llmops-"))
    dagster, mlflow, gateway, staging = free_ports(4)
    settings = Settings(
        state=folder / "state",
        models=folder / "repository" / "models",
        dagster_port=dagster,
        mlflow_port=mlflow,
        gateway_port=gateway,
        staging_gateway_port=staging,
    )
    try:
        user = StackUser(settings, SPEC)
        stack.up(settings, print)
        yield user
    finally:
        stack.down(settings)
        left = supervised(settings.state)
        shutil.rmtree(folder, ignore_errors=True)
        assert not left


@pytest.fixture(scope="session")
def first_release(user: StackUser) -> FirstRelease:
    """The first release of the example: trained at full size, and serving."""
    commit = user.commit_spec()
    key, run = user.start_release(commit)
    user.expect_success(run)
    return FirstRelease(key, commit, user.promote(key))


@pytest.fixture
def spare_release(user: StackUser, first_release: FirstRelease) -> str:
    """A release that passed staging and that no slot of production holds."""
    held = {
        state.deployment.release
        for state in user.platform.slots.slots(Environment.PRODUCTION, MODEL)
        if state.deployment is not None
    }
    for release in user.platform.columns.releases(MODEL):
        staged = verdicts(user.platform.evidence, release).get("staging_smoke")
        retired = user.platform.columns.find(release, "deprecated_version")
        if release not in held and staged is not None and staged.passed and retired is None:
            return release
    return user.release()
