"""kill -9 of Dagster's daemon between a tick and its run, and a registry that goes away."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dagster import DagsterInstance, RunsFilter
from dagster._core.scheduler.instigation import InstigatorTick, TickStatus
from mlflow.tracking import MlflowClient

from llmops_assets.local import stack
from llmops_assets.local.processes import supervised
from llmops_assets.local.supervisor import Supervisor
from llmops_assets.partitions import RELEASES
from llmops_assets.settings import Settings
from llmops_assets_tests.local.conftest import free_ports
from llmops_assets_tests.plain_mlflow import register_plainly
from llmops_assets_tests.release_rig import MODEL, SPEC

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

NOTICED_SECONDS = 90.0
KILLS = 5


class Watched:
    """A running stack whose registry trigger looks every few seconds."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.dagster = DagsterInstance.from_config(str(settings.dagster_home))
        self.mlflow = MlflowClient(stack.endpoints(settings).mlflow_url)

    def releases(self) -> Counter[str]:
        """How many runs of the job `release` each partition has had."""
        runs = self.dagster.get_runs(RunsFilter(job_name="release"))
        return Counter(run.tags["dagster/partition"] for run in runs)

    def ticks(self) -> list[InstigatorTick]:
        """The newest ticks of the registry's trigger, newest first; none before its first."""
        for state in self.dagster.all_instigator_state():
            if state.instigator_name == "registry":
                return list(
                    self.dagster.get_ticks(state.instigator_origin_id, state.selector_id, limit=20)
                )
        return []

    def kill_daemon(self) -> None:
        """kill -9; the process manager starts it again."""
        (daemon,) = (each for each in stack.status(self.settings) if each.name == stack.DAEMON)
        if daemon.pid is not None:
            os.kill(daemon.pid, signal.SIGKILL)

    def wait_until(self, what: str, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + NOTICED_SECONDS
        while not holds():
            assert time.monotonic() < deadline, what
            time.sleep(0.005)


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    """A stack of its own, with one model; its releases end at once, as their data is missing."""
    # Not pytest's folder: its path is too long for Unix sockets.
    folder = Path(tempfile.mkdtemp(prefix="llmops-"))
    dagster, mlflow, gateway, staging = free_ports(4)
    (folder / "models").mkdir()
    (folder / "models" / f"{MODEL}.yaml").write_text(SPEC, encoding="utf-8")
    settings = Settings(
        state=folder / "state",
        models=folder / "models",
        dagster_port=dagster,
        mlflow_port=mlflow,
        gateway_port=gateway,
        staging_gateway_port=staging,
        registry_poll_seconds=1,
    )
    try:
        stack.up(settings, print)
        watched = Watched(settings)
        # Which takes what is registered by then for known.
        watched.wait_until(
            "the end of the first tick",
            lambda: any(tick.status is TickStatus.SKIPPED for tick in watched.ticks()),
        )
        yield watched
        watched.dagster.dispose()
    finally:
        stack.down(settings)
        left = supervised(settings.state)
        shutil.rmtree(folder, ignore_errors=True)
        assert not left


def test_killed_between_tick_and_run(watched: Watched) -> None:
    """The tick has added the partition and not yet its run: neither is lost, nor made twice."""
    expected: set[str] = set()
    for _ in range(KILLS):
        (version,) = register_plainly(watched.mlflow, MODEL)
        key = f"{MODEL}.v{version}"
        expected.add(key)
        watched.wait_until(
            f"the partition {key}",
            lambda key=key: watched.dagster.has_dynamic_partition(str(RELEASES.name), key),
        )
        watched.kill_daemon()
    watched.wait_until("all runs", lambda: set(watched.releases()) >= expected)
    # Time for what would make a second run.
    time.sleep(10)
    assert watched.releases() == dict.fromkeys(expected, 1)


def test_registry_that_goes_away(watched: Watched) -> None:
    """An outage is a failed tick, not a quiet one; what was registered around it counts once."""
    before = set(watched.releases())
    supervisor = Supervisor(watched.settings.state, watched.settings.logs)
    (version,) = register_plainly(watched.mlflow, MODEL)
    supervisor.stop_program(stack.MLFLOW)
    watched.wait_until(
        "a failed tick", lambda: any(t.status is TickStatus.FAILURE for t in watched.ticks())
    )
    failed = next(t for t in watched.ticks() if t.status is TickStatus.FAILURE)
    assert failed.error is not None
    assert "MLflow" in failed.error.to_string()
    stack.up(watched.settings, print)
    (after,) = register_plainly(watched.mlflow, MODEL)
    expected = before | {f"{MODEL}.v{version}", f"{MODEL}.v{after}"}
    watched.wait_until("both runs", lambda: set(watched.releases()) >= expected)
    time.sleep(10)
    assert watched.releases() == dict.fromkeys(expected, 1)
