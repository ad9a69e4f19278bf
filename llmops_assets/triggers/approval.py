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
from llmops_assets.errors import ApprovalError, ArtifactCorruptError, TriggerError
from llmops_assets.jobs import asset_jobs
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.storage.store import LogEntry
from llmops_assets.triggers.cursors import Cursor
from llmops_assets.triggers.requests import RUNS_PER_TICK, outcome, run_tags

DECISION_TAG = "llmops/decision"
"""What was decided by whom about which package, as a digest."""
UNDER_WAY = (
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.MANAGED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
)


class ApprovalCursor(Cursor):
    """How many of the recorded decisions were looked at."""

    seen: int
    last: str | None = None
    """Digest of the newest of them, by which a log that was put back shows."""


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
        known = list(platform.store.log(APPROVALS_LOG))
        last = known[-1].digest if known else None
        return outcome([], ApprovalCursor(seen=len(known), last=last))
    entries = _unseen(platform, cursor)
    if not entries:
        return dg.SkipReason("Nobody has decided anything since.")
    # The last word about each release, also if this tick does not come to it.
    last = {str(entry.record.get("release")): entry.sequence for entry in entries}
    runs: list[dg.RunRequest] = []
    seen = cursor
    for entry in entries:
        if len(runs) == RUNS_PER_TICK:
            return outcome(runs, seen)
        seen = ApprovalCursor(seen=entry.sequence + 1, last=entry.digest)
        try:
            decision = read_decision(entry.record)
            if last[decision.release] != entry.sequence:
                context.log.info(f"{decision.approver} decided about {decision.release} before "
                                 "somebody decided anew")  # fmt: skip
                continue
            verified = verify(platform, decision)
        except (ApprovalError, ArtifactCorruptError) as error:
            # Of one release; the others' decisions count all the same.
            context.log.warning(f"decision {entry.sequence}: {error}")
            continue
        if _is_news(context, platform, decision):
            runs.append(_promotion(entry, decision, verified))
    return outcome(runs, seen)


def _unseen(platform: Platform, cursor: ApprovalCursor) -> list[LogEntry]:
    """Decisions after the cursor.

    Raises:
        TriggerError: the log is another one than the cursor has seen; new decisions would be
            missed, or old ones taken for new.
    """
    entries = list(platform.store.log(APPROVALS_LOG, start=max(cursor.seen - 1, 0)))
    if cursor.seen == 0:
        return entries
    if not entries or (cursor.last is not None and entries[0].digest != cursor.last):
        raise TriggerError(
            "The store has other decisions than this sensor has seen",
            expected=f"{cursor.seen} or more in the log {APPROVALS_LOG}, of which one is "
            f"{cursor.last}",
            found=f"{entries[0].digest} in its place" if entries else "fewer",
            cure="restore the store whole; or clear the cursor on the sensor's page in Dagster, "
            "and record again what was decided since",
        )
    return entries[1:]


def _is_news(
    context: dg.SensorEvaluationContext, platform: Platform, decision: RecordedDecision
) -> bool:
    """Whether nothing came of the decision yet, by what Dagster and the store say."""
    taken = platform.columns.find(decision.release, "production_approval")
    if (
        taken is not None
        and taken.finished >= decision.time
        and (Approval.model_validate(taken.facts).package == decision.package)
    ):
        # Dagster's records may be older than that, from a backup.
        context.log.info(f"{decision.release} was decided about since; nothing starts")
        return False
    model = Release.parse(decision.release).model
    statuses: list[DagsterRunStatus] = [*UNDER_WAY]
    if platform.serving_package(model) == decision.package:
        statuses.append(DagsterRunStatus.SUCCESS)
    filters = dg.RunsFilter(
        job_name="promote", tags={DECISION_TAG: decision.identity}, statuses=statuses
    )
    if context.instance.get_run_records(filters, limit=1):
        context.log.info(f"{decision.release} is being promoted, or serves, by the same decision")
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
            **run_tags(f"approved by {verified.approver}", verified.approver),
            DECISION_TAG: decision.identity,
        },
    )
