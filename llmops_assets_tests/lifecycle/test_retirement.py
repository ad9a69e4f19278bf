"""A release's end: off the routes, into cold storage, out of Triton; in this order only."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmops_assets.retire.archive import ArchiveFile, restore
from llmops_assets.serving.slots import Environment
from llmops_assets.storage.folder import FolderStore
from llmops_assets_tests.lifecycle.conftest import FirstRelease
from llmops_assets_tests.lifecycle.stack_user import ANSWER, MODEL, StackUser


@pytest.fixture
def replaced_release(user: StackUser, first_release: FirstRelease) -> str:
    """A release that served, and no longer does."""
    serving = user.serving().release
    columns = user.platform.columns
    for release in columns.releases(MODEL):
        served = columns.find(release, "production_deployment") is not None
        retired = columns.find(release, "deprecated_version") is not None
        if served and not retired and release != serving:
            return release
    user.promote(user.release())
    return serving


def test_what_serves_cannot_retire(user: StackUser, first_release: FirstRelease) -> None:
    """The wrong partition picked in the UI must not take production down."""
    serving = user.serving()
    told = user.expect_failure(user.client.launch("deprecate", serving.release))
    assert f"{serving.release} serves in production" in told
    assert "To do: promote another release first" in told
    assert user.serving() == serving
    assert user.ask()["text_output"] == ANSWER


def test_a_release_retires_step_by_step(
    user: StackUser, replaced_release: str, tmp_path: Path
) -> None:
    """Each step refuses before its turn; bytes leave the slots only when an archive holds them."""
    release = replaced_release
    serving = user.serving()
    for job, missing in (("archive_release", "deprecated_version"), ("remove", "archive")):
        told = user.expect_failure(user.client.launch(job, release))
        assert f"Release {release} has no {missing} yet" in told
        assert f"To do: materialize {missing}" in told

    _succeed(user, "deprecate", release)
    for environment in Environment:
        route, _ = user.platform.routes.current(environment, MODEL)
        assert route is None or release not in {target.release for target in route.targets}
    told = user.expect_failure(user.client.launch("remove", release))
    assert f"Release {release} has no archive yet" in told
    told = user.expect_failure(user.start_promotion(release))
    assert f"Release {release} is deprecated" in told
    assert f"llmops release {MODEL}" in told

    _succeed(user, "archive_release", release)
    archived = ArchiveFile.model_validate(user.platform.columns.get(release, "archive").facts)
    column = user.platform.column(release)
    restored = restore(user.settings.cold, archived, tmp_path / "store")
    assert restored == archived.artifacts
    assert {"checkpoint", "packaged_model", "production_deployment"} <= set(restored)
    store = FolderStore(tmp_path / "store")
    for asset, digest in restored.items():
        artifact, directory = store.open(digest)
        for file in artifact.files:
            kept = (column[asset].path / file.path).read_bytes()
            assert (directory / file.path).read_bytes() == kept

    _succeed(user, "remove", release)
    assert release not in _held_in_slots(user)
    # What serves is as it was, though it is made of the same bytes.
    assert user.serving() == serving
    assert user.ask()["text_output"] == ANSWER


def _succeed(user: StackUser, job: str, release: str) -> None:
    outcome = user.run_job(job, release)
    assert outcome.succeeded, outcome.failures


def _held_in_slots(user: StackUser) -> set[str]:
    return {
        state.deployment.release
        for environment in Environment
        for state in user.platform.slots.slots(environment, MODEL)
        if state.deployment is not None
    }
