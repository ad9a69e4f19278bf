"""Failing the runs whose worker is gone.

Dagster's default launcher does not look after the processes it started: after a crash
of the machine a run stays STARTED and keeps its place in a pool. A worker records its
process id in the engine event "Started process for run (pid: …)"
(`dagster/_core/execution/api.py`), which is what tells whether it still lives.
"""

from __future__ import annotations

import psutil
from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

IN_WORKER_STATUSES = (
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
)
# How much earlier than its worker's start an event may seem to be: process start times
# are counted from the boot in ticks, events in wall-clock time.
CLOCK_TOLERANCE_SECONDS = 2.0


def reap_dead_runs(instance: DagsterInstance) -> list[str]:
    """Fails every run whose worker process is gone, and frees its places in pools.

    To be called while nothing launches runs: a run that is STARTING and has recorded no
    worker counts as dead. Queued runs are left alone.

    Returns:
        The ids of the failed runs.
    """
    reaped: list[str] = []
    for run in instance.get_runs(filters=RunsFilter(statuses=list(IN_WORKER_STATUSES))):
        worker = _recorded_worker(instance, run)
        if worker is not None and _lives(*worker):
            continue
        process = "no process" if worker is None else f"process {worker[0]}"
        instance.report_run_failed(
            run,
            f"The worker of this run is gone ({process} is left of it): the stack or the machine "
            "was stopped while it ran. It published nothing half-done. "
            "To do: re-execute the run; steps that had finished are reused.",
        )
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        reaped.append(run.run_id)
    return reaped


def _recorded_worker(instance: DagsterInstance, run: DagsterRun) -> tuple[int, float] | None:
    """Process id of the run's latest worker, and when it recorded it (seconds since the epoch)."""
    for entry in reversed(instance.all_logs(run.run_id, of_type=DagsterEventType.ENGINE_EVENT)):
        if entry.message.startswith("Started process for run") and entry.dagster_event:
            pid = entry.dagster_event.engine_event_data.metadata.get("pid")
            if pid is not None:
                return int(str(pid.value)), entry.timestamp
    return None


def _lives(pid: int, recorded: float) -> bool:
    """Whether the process that recorded itself then is still there, not a later one's."""
    try:
        process = psutil.Process(pid)
        return (
            process.status() != psutil.STATUS_ZOMBIE
            and process.create_time() <= recorded + CLOCK_TOLERANCE_SECONDS
        )
    except psutil.NoSuchProcess:
        return False
