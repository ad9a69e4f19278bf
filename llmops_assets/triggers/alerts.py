"""The trigger on alerts: rollback at once, scaling, or telling people."""

import dagster as dg
from pydantic import Field

from llmops_assets.errors import TriggerError
from llmops_assets.jobs import asset_jobs, rollback
from llmops_assets.operate.incidents import Incident
from llmops_assets.operate.objectives import Window
from llmops_assets.partitions import RELEASES
from llmops_assets.platform import Platform
from llmops_assets.storage.store import Store
from llmops_assets.triggers.alert_watch import Watched, look_at_alerts
from llmops_assets.triggers.cursors import Cursor
from llmops_assets.triggers.requests import RUNS_PER_TICK, run_tags

LOG = "triggers/alerts"


class AlertsCursor(Cursor):
    """What fires and was handled, and where the measuring of objectives stands."""

    watched: str | None = None
    """Digest of the record of handled alerts; None for none."""
    windows: dict[str, Window] = Field(default_factory=dict)
    """By model, what objectives are measured from, where there is no Alertmanager."""

    def read(self, store: Store) -> Watched:
        """The handled alerts."""
        return Watched() if self.watched is None else Watched(**store.record(self.watched))


@dg.sensor(
    name="alerts",
    description="Asks Alertmanager (LLMOPS_ALERTMANAGER_URL) what fires, without what is "
    "silenced or inhibited. The rules under `alerts` in the spec of the release that serves say "
    "what is done about its model: `rollback` moves production's route back within the tick, and "
    "the job rollback then verifies and shows it; `scale` starts the job scale; `notify` leaves "
    "an incident open, which the job observe shows, until the alert ends. Each alert acts once, "
    "and a rule that acted rests for its damping_seconds. Without Alertmanager, error rates "
    "beyond the objective under `gates.service`, measured over half a minute or longer, fire as "
    "ServiceObjectiveBreached. The first tick acts on what fires then. To switch it off, stop "
    "this sensor; rules leave with the next release without them.",
    jobs=[rollback, *(job for job in asset_jobs if job.name in ("scale", "observe"))],
    minimum_interval_seconds=5,
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def alerts(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Acts on every alert that was not acted on, and asks for the runs that show it."""
    found = AlertsCursor.from_json(context.cursor)
    cursor = found or AlertsCursor()
    before = None if found is None else found.read(platform.store)
    look = look_at_alerts(platform, before, cursor.windows, RUNS_PER_TICK)
    for problem in look.problems:
        context.log.error(problem)

    record = cursor.watched
    if look.watched != (before or Watched()):
        record = platform.store.append(LOG, look.watched.model_dump(mode="json")).digest
    after = AlertsCursor(watched=record, windows=look.windows)
    asking = [incident for incident in look.incidents if incident.job is not None]
    if asking:
        # Each once: Dagster's database refuses a partition that is added twice.
        releases = sorted({each.release for each in asking if each.job != rollback.name})
        return dg.SensorResult(
            run_requests=[_run(incident) for incident in asking],
            dynamic_partitions_requests=[RELEASES.build_add_request(releases)] if releases else [],
            cursor=after.to_json(),
        )
    # A failed tick remembers nothing, so one that learnt something leaves it to the next.
    if look.problems and after == cursor:
        raise TriggerError(
            "Not every alert could be read and acted on",
            expected="alerts that can be understood, and routes that can be moved",
            found="; ".join(look.problems),
            cure="mend what it names; what was acted on stays, the rest is tried again",
        )
    return dg.SensorResult(
        skip_reason=f"{look.firing} alerts fire; nothing new that a rule is about."
        if look.listening
        else "LLMOPS_ALERTMANAGER_URL is unset, and no release that serves has rules under "
        "`alerts` in its spec.",
        cursor=after.to_json(),
    )


def _run(incident: Incident) -> dg.RunRequest:
    tags = run_tags(f"{incident.what} ({incident.model})", "alerts")
    if incident.job != rollback.name:
        return dg.RunRequest(
            run_key=incident.id, job_name=incident.job, partition_key=incident.release, tags=tags
        )
    config = {
        "model": incident.model,
        "reason": incident.what,
        "actor": incident.actor,
        "moved": True,
    }
    return dg.RunRequest(
        run_key=incident.id,
        job_name=rollback.name,
        run_config={"ops": {"roll_back_route": {"config": config}}},
        tags=tags,
    )
