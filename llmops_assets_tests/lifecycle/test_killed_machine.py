"""kill -9 of everything at once, as a power cut does it, and `llmops up` afterwards."""

from __future__ import annotations

import time

import pytest
from dagster import DagsterRunStatus

from llmops_assets.local import stack
from llmops_assets.local.processes import supervised, wait_gone
from llmops_assets.local.runs import IN_WORKER_STATUSES
from llmops_assets_tests.lifecycle.conftest import FirstRelease
from llmops_assets_tests.lifecycle.kills import runs_module
from llmops_assets_tests.lifecycle.stack_user import StackUser

pytestmark = pytest.mark.integration

ENGINE_BUILD = "llmops_assets.toolchains.onnxruntime_genai.build"
BUILD_STARTS_SECONDS = 120.0
UP_SECONDS = 180.0


def test_everything_comes_back(user: StackUser, first_release: FirstRelease) -> None:
    """Dagster alone would leave the run STARTED and its pool taken, for ever."""
    serving, answer = user.serving(), user.ask()
    commit = user.commit_spec(engine={"block_size": 16})
    key, run = user.start_release(commit)
    worker = user.worker(run)
    user.wait_until(
        "the engine's build",
        lambda: any(runs_module(p, ENGINE_BUILD) for p in worker.children(recursive=True)),
        BUILD_STARTS_SECONDS,
    )
    assert user.runs_in_pools() == {run}
    published = user.platform.columns.assets(key)

    everything = supervised(user.settings.state)
    for process in everything:
        process.kill()
    assert not wait_gone(everything, 15)
    assert not any(program.running for program in stack.status(user.settings))

    started = time.monotonic()
    info = stack.up(user.settings, print)
    assert time.monotonic() - started < UP_SECONDS
    assert not info.problems
    assert user.run(run).status is DagsterRunStatus.FAILURE
    assert not [r for r in user.dagster.get_runs(limit=20) if r.status in IN_WORKER_STATUSES]
    assert not user.runs_in_pools()
    assert user.serving() == serving
    assert user.ask() == answer

    user.expect_success(user.start_release(commit, key)[1])
    finished = user.platform.columns.assets(key)
    assert "staging_deployment" in finished
    assert finished["checkpoint"] == published["checkpoint"]
