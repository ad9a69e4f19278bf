"""Telling dead runs from living ones; the whole story is told in test_stack.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.events import EngineEventData

from llmops_assets.local.runs import reap_dead_runs
from llmops_assets_tests.local.tiny_definitions import waiting


@pytest.fixture
def instance(tmp_path: Path) -> DagsterInstance:
    return DagsterInstance.local_temp(str(tmp_path))


def started(instance: DagsterInstance, pid: int | None) -> DagsterRun:
    """A run whose worker recorded itself as Dagster's do (`dagster/_core/execution/api.py`)."""
    run = instance.create_run_for_job(waiting, status=DagsterRunStatus.STARTED)
    if pid is not None:
        message = f"Started process for run (pid: {pid})."
        instance.report_engine_event(message, run, EngineEventData.in_process(pid))
    return run


def test_a_living_worker_is_left_alone(instance: DagsterInstance) -> None:
    """Somebody may run an asset in a terminal while the stack starts."""
    run = started(instance, os.getpid())
    assert reap_dead_runs(instance) == []
    found = instance.get_run_by_id(run.run_id)
    assert found is not None and found.status is DagsterRunStatus.STARTED


def test_a_process_that_got_the_workers_number_does_not_count(instance: DagsterInstance) -> None:
    """After a reboot the same process ids belong to others."""
    run = started(instance, os.getpid())
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as later:
        # The event names the later process, but is older than it.
        entry = instance.all_logs(run.run_id)[-1]
        assert entry.dagster_event is not None
        reused = started(instance, None)
        old = entry._replace(
            run_id=reused.run_id,
            timestamp=entry.timestamp - 60,
            dagster_event=entry.dagster_event._replace(
                event_specific_data=EngineEventData.in_process(later.pid)
            ),
        )
        instance.handle_new_event(old)
        try:
            assert reap_dead_runs(instance) == [reused.run_id]
        finally:
            later.kill()


def test_waiting_and_finished_runs_are_left_alone(instance: DagsterInstance) -> None:
    """A run that waits has no worker yet; a finished one must keep its result."""
    for status in (DagsterRunStatus.SUCCESS, DagsterRunStatus.NOT_STARTED):
        instance.create_run_for_job(waiting, status=status)
    starting = instance.create_run_for_job(waiting, status=DagsterRunStatus.STARTING)
    assert reap_dead_runs(instance) == [starting.run_id]
    assert reap_dead_runs(instance) == []
