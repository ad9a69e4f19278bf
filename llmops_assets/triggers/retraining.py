"""Retraining on a schedule: a new release because time has passed."""

from datetime import UTC, datetime, timedelta

import dagster as dg
from pydantic import AwareDatetime

from llmops_assets.develop.branch import current_specs, head_commit
from llmops_assets.develop.retraining import due
from llmops_assets.jobs import asset_jobs
from llmops_assets.platform import Platform
from llmops_assets.triggers.cursors import Cursor
from llmops_assets.triggers.requests import RUNS_PER_TICK, outcome, release_run, was_requested

CLOCK_TOLERANCE = timedelta(minutes=1)


class RetrainingCursor(Cursor):
    """The time up to which schedules were looked at, and how far a full tick got."""

    looked: AwareDatetime
    towards: AwareDatetime | None = None
    """End of the span whose due models did not fit into one tick."""
    done: str | None = None
    """The last model of that span, by name, that was dealt with."""


def now() -> datetime:
    """The time by this machine's clock."""
    return datetime.now(UTC)


@dg.sensor(
    name="retraining",
    description="Listens to the clock: every spec with a section `retraining` has a cron in its "
    "time zone. When it is due, the model gets one release, `<model>.s<time>`, however many "
    "times an outage missed. With `when: changed` its run ends at once, as a success, if data "
    "and code are those of the newest release; its tag llmops/skipped says so. A model is taken "
    "off by removing the section from its spec, all are by stopping this sensor. A schedule "
    "counts from the first tick on, and what passed while the sensor was stopped is made up for "
    "by one release.",
    jobs=[job for job in asset_jobs if job.name == "release"],
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def retraining(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult:
    """Asks for a release of every model whose schedule was due since the last tick."""
    time = now()
    cursor = RetrainingCursor.from_json(context.cursor)
    if cursor is None:
        return outcome([], RetrainingCursor(looked=time))
    if time < cursor.looked - CLOCK_TOLERANCE:
        # The clock was put back. What comes again has its release already.
        context.log.warning(f"the clock went back from {cursor.looked} to {time}")
        return outcome([], RetrainingCursor(looked=time))
    # A clock that is a little behind moves nothing: there is nothing before `looked` to see.
    until = cursor.towards or max(time, cursor.looked)
    waiting = [
        entry
        for entry in due(current_specs(platform.settings), cursor.looked, until)
        if cursor.done is None or entry.model > cursor.done
    ]
    batch = waiting[:RUNS_PER_TICK]
    head = head_commit(platform.settings)
    runs = [
        release_run(
            entry.release,
            event=entry.event,
            requested_by="retraining",
            config={
                **({"commit": head} if head is not None else {}),
                "unless_unchanged": entry.schedule.when == "changed",
            },
        )
        for entry in batch
        if not was_requested(context.instance, "release", entry.release.key)
    ]
    if len(waiting) > len(batch):
        rest = RetrainingCursor(looked=cursor.looked, towards=until, done=batch[-1].model)
        return outcome(runs, rest)
    after = RetrainingCursor(looked=until)
    if not runs:
        return dg.SensorResult(skip_reason="No schedule has come due.", cursor=after.to_json())
    return outcome(runs, after)
