"""Approvals: a recorded decision that counts promotes its release."""

import dagster as dg
from dagster import DagsterRunStatus

from llmops_assets.deploy.approval import (
    APPROVALS_LOG,
    Approval,
    RecordedDecision,
    read_decision,
    verify,
)
from llmops_assets.errors import ApprovalError, TriggerError
from llmops_assets.jobs import asset_jobs
from llmops_assets.partitions import RELEASES
from llmops_assets.platform import Platform
from llmops_assets.storage.store import LogEntry
from llmops_assets.triggers.cursors import Cursor
from llmops_assets.triggers.requests import (
    EVENT_TAG,
    REQUESTED_BY_TAG,
    RUNS_PER_TICK,
    outcome,
)

DECISION_TAG = "llmops/decision"
"""What was decided by whom about which package, as a digest."""
UNDER_WAY_OR_DONE = (
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.MANAGED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.SUCCESS,
)


class ApprovalCursor(Cursor):
    """How many of the recorded decisions were looked at."""

    seen: int


@dg.sensor(
    name="approval",
    description="Listens to decisions recorded by `llmops approve RELEASE --approver NAME "
    "--reason WHY`. One that counts starts the job promote: it approves, it is about the "
    "release's package, and whoever asked for the release did not make it. Others start nothing; "
    "the tick's log says why. A rejection wins over an earlier approval, also of a promotion "
    "that has not decided yet. Decisions that were recorded before the first tick are left "
    "alone. It needs no setting; while this sensor is stopped, decisions wait.",
    jobs=[job for job in asset_jobs if job.name == "promote"],
    minimum_interval_seconds=5,
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def approval(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Asks for the promotion of every release that a new decision approves."""
    cursor = ApprovalCursor.from_json(context.cursor)
    if cursor is None:
        return outcome([], ApprovalCursor(seen=len(list(platform.store.log(APPROVALS_LOG)))))
    entries = _unseen(platform, cursor)
    if not entries:
        return dg.SkipReason("Nobody has decided anything since.")
    # The last word about each release, also if this tick does not come to it.
    last = {str(entry.record.get("release")): entry.sequence for entry in entries}
    runs: list[dg.RunRequest] = []
    for entry in entries:
        if len(runs) == RUNS_PER_TICK:
            return outcome(runs, ApprovalCursor(seen=entry.sequence))
        try:
            decision = read_decision(entry.record)
            if last[decision.release] != entry.sequence:
                context.log.info(f"{decision.approver} decided about {decision.release} before "
                                 "somebody decided anew")  # fmt: skip
                continue
            verified = verify(platform, decision)
        except ApprovalError as error:
            context.log.warning(f"decision {entry.sequence}: {error}")
            continue
        if _can_promote(context, decision):
            runs.append(_promotion(entry, decision, verified))
    return outcome(runs, ApprovalCursor(seen=entries[-1].sequence + 1))


def _unseen(platform: Platform, cursor: ApprovalCursor) -> list[LogEntry]:
    """Decisions after the cursor.

    Raises:
        TriggerError: there are fewer than the cursor has seen; new ones would be missed.
    """
    before = max(cursor.seen - 1, 0)
    entries = list(platform.store.log(APPROVALS_LOG, start=before))
    if cursor.seen > 0 and not entries:
        raise TriggerError(
            "The store has fewer decisions than this sensor has seen",
            expected=f"{cursor.seen} or more in the log {APPROVALS_LOG}",
            cure="restore the store whole; or clear the cursor on the sensor's page in Dagster, "
            "and record again what was decided since",
        )
    return [entry for entry in entries if entry.sequence >= cursor.seen]


def _can_promote(context: dg.SensorEvaluationContext, decision: RecordedDecision) -> bool:
    """Whether a run would find its partition, and no other does the same."""
    instance, release = context.instance, decision.release
    if not instance.has_dynamic_partition(str(RELEASES.name), release):
        context.log.warning(f"{release} is no partition of Dagster any more; nothing starts")
        return False
    filters = dg.RunsFilter(
        job_name="promote",
        tags={DECISION_TAG: decision.identity},
        statuses=list(UNDER_WAY_OR_DONE),
    )
    if instance.get_run_records(filters, limit=1):
        context.log.info(f"{release} is being promoted, or was, by the same decision")
        return False
    return True


def _promotion(entry: LogEntry, decision: RecordedDecision, verified: Approval) -> dg.RunRequest:
    config = {
        "approver": verified.approver,
        "decision": verified.decision,
        "reason": verified.reason,
        "package_digest": verified.package,
    }
    return dg.RunRequest(
        run_key=entry.digest,
        job_name="promote",
        partition_key=decision.release,
        run_config={"ops": {"production_approval": {"config": config}}},
        tags={
            REQUESTED_BY_TAG: verified.approver,
            EVENT_TAG: f"approved by {verified.approver}",
            DECISION_TAG: decision.identity,
        },
    )
