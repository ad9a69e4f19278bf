"""How triggers ask for runs: named jobs, with keys that carry the event's identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from llmops_assets.partitions import RELEASES
from llmops_assets.release import Release
from llmops_assets.triggers.cursors import Cursor

REQUESTED_BY_TAG = "llmops/requested_by"
"""Who asked for a run: a person, or the trigger when it was nobody."""
RELEASE_TAG = "llmops/release"
"""Of runs of the job `release`: those of one release run one after the other (dagster.yaml)."""
DECISION_TAG = "llmops/decision"
"""What was decided by whom about which package, as a digest; of runs that an approval started."""
EVENT_TAG = "llmops/event"
"""What happened, in a few words; `llmops triggers` shows it."""
SUBMITTED = frozenset(dg.DagsterRunStatus) - {dg.DagsterRunStatus.NOT_STARTED}
RUNS_PER_TICK = 25
"""A tick asks for no more, so that it ends in time; the next one goes on."""


def run_tags(event: str, requested_by: str) -> dict[str, str]:
    """Tags of a run that a trigger asks for.

    Nobody waits for it, so one whose worker is lost is made again; one that ends with a
    failed step or gate is not (dagster.yaml).
    """
    return {
        REQUESTED_BY_TAG: requested_by,
        EVENT_TAG: event,
        "dagster/max_retries": "2",
        "dagster/retry_strategy": "ALL_STEPS",
    }


def release_run(
    release: Release, *, event: str, requested_by: str, config: Mapping[str, Any]
) -> dg.RunRequest:
    """A run of the job `release`. However often it is asked for, Dagster makes one run.

    Args:
        config: of `model_spec`.
    """
    return dg.RunRequest(
        # Keys are per sensor; the release's name is derived from the event.
        run_key=release.key,
        job_name="release",
        partition_key=release.key,
        run_config={"ops": {"model_spec": {"config": dict(config)}}},
        tags={**run_tags(event, requested_by), RELEASE_TAG: release.key},
    )


def was_requested(instance: dg.DagsterInstance, job: str, partition: str) -> bool:
    """Whether somebody, this trigger or another or CI, asked for the run before.

    One that a killed daemon made and did not submit does not count: Dagster submits it when
    it is asked for again.
    """
    filters = dg.RunsFilter(
        job_name=job, tags={"dagster/partition": partition}, statuses=list(SUBMITTED)
    )
    return bool(instance.get_run_records(filters, limit=1))


def outcome(runs: Sequence[dg.RunRequest], cursor: Cursor) -> dg.SensorResult:
    """A tick's result: runs, the partitions that they need, and what to remember."""
    # Also of releases that are there already: somebody may have taken their partition away.
    # Each once: Dagster's database refuses one that a request names twice.
    keys = sorted({run.partition_key for run in runs if run.partition_key})
    return dg.SensorResult(
        run_requests=list(runs),
        dynamic_partitions_requests=[RELEASES.build_add_request(keys)] if keys else [],
        cursor=cursor.to_json(),
    )
