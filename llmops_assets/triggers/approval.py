"""Approvals: a recorded decision that counts promotes its release."""

from datetime import UTC, datetime, timedelta

import dagster as dg
from dagster import DagsterRunStatus
from pydantic import AwareDatetime

from llmops_assets.deploy.accepted_approvers import committed_decisions, policy_in_force
from llmops_assets.deploy.approval import (
    Approval,
    RecordedDecision,
    read_decision,
    record_signed,
    verify,
)
from llmops_assets.deploy.signed_decision import read_signed
from llmops_assets.errors import (
    ApprovalError,
    ArtifactCorruptError,
    ReleaseError,
    SpecError,
    TriggerError,
)
from llmops_assets.evidence.leaves import APPROVALS, Entry
from llmops_assets.jobs import asset_jobs
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.triggers.cursors import Cursor
from llmops_assets.triggers.requests import DECISION_TAG, RUNS_PER_TICK, outcome, run_tags

FILES_EVERY = timedelta(seconds=30)
"""How often the protected ref is asked for approvals that were committed to it."""
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
    commit: str | None = None
    """Of the protected ref, whose committed approvals were looked at."""
    asked: AwareDatetime | None = None
    """When the ref was asked for last."""


@dg.sensor(
    name="approval",
    description="Listens to decisions recorded by `llmops approve RELEASE --reason WHY`, and to "
    "files in the folder approvals of LLMOPS_APPROVERS_REF. One that counts starts the job "
    "promote: it approves the release's package, and enough people have who may "
    "(docs/approvals.md). Others start nothing; "
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
        newest = platform.evidence.newest(APPROVALS)
        start = ApprovalCursor(seen=0)
        return outcome([], start if newest is None else _after(start, newest))
    cursor = _collected(context, platform, cursor)
    entries = _unseen(platform, cursor)
    if not entries:
        return dg.SensorResult(
            skip_reason="Nobody has decided anything since.", cursor=cursor.to_json()
        )
    # A policy that cannot be read is no fault of one release: here it fails the tick.
    policy = policy_in_force(platform)
    # The last word about each release, also if this tick does not come to it. Beside a policy
    # an unsigned one is no word at all.
    last = {
        str(entry.statement.predicate.get("release")): entry.sequence
        for entry in entries
        if policy is None or entry.statement.predicate.get("evidence") == "signed"
    }
    runs: list[dg.RunRequest] = []
    seen = cursor
    for entry in entries:
        if len(runs) == RUNS_PER_TICK:
            return outcome(runs, seen)
        seen = _after(seen, entry)
        try:
            decision = read_decision(entry)
            if last.get(decision.release, entry.sequence) != entry.sequence:
                context.log.info(f"{decision.approver} decided about {decision.release} before "
                                 "somebody decided anew")  # fmt: skip
                continue
            if decision.delivered == "launchpad":
                continue  # the run that it was pasted into goes on with it
            claim = decision if decision.evidence == "claimed" else None
            verified = verify(platform, decision.release, claim)
        except (ApprovalError, ArtifactCorruptError, SpecError) as error:
            # Of one release; the others' decisions count all the same.
            context.log.warning(f"decision {entry.sequence}: {error}")
            continue
        if _is_news(context, platform, decision):
            runs.append(_promotion(entry, decision, verified))
    return outcome(runs, seen)


def _after(cursor: ApprovalCursor, entry: Entry) -> ApprovalCursor:
    seen = entry.leaf.links[APPROVALS].ordinal + 1
    return cursor.model_copy(update={"seen": seen, "last": entry.digest})


def _collected(
    context: dg.SensorEvaluationContext, platform: Platform, cursor: ApprovalCursor
) -> ApprovalCursor:
    """Takes approvals into the log that were committed to the protected ref since.

    Raises:
        SpecError, TriggerError: the ref, or its repository, does not answer.
    """
    now = datetime.now(UTC)
    if platform.settings.approvers_ref is None:
        return cursor
    if cursor.asked is not None and cursor.asked <= now < cursor.asked + FILES_EVERY:
        return cursor
    commit, found = committed_decisions(platform.settings, cursor.commit)
    if found:
        # A policy that cannot be read is no fault of one file: here it fails the tick.
        policy_in_force(platform)
    again = False
    for path, envelope in found.items():
        if isinstance(envelope, str):
            context.log.warning(envelope)
            continue
        early = False
        try:
            early = now < read_signed(envelope).not_before
            record_signed(platform, envelope, "file")
        except (ApprovalError, ReleaseError) as error:
            # Old ones stay there for ever, and count no more.
            context.log.warning(f"{path}: {error}")
            again = again or early
        except (ArtifactCorruptError, SpecError) as error:
            # Of the release that it is about, until somebody mends that.
            context.log.warning(f"{path}: {error}")
            again = True
    seen = cursor.commit if again else commit
    return cursor.model_copy(update={"commit": seen, "asked": now})


def _unseen(platform: Platform, cursor: ApprovalCursor) -> list[Entry]:
    """Decisions after the cursor.

    Raises:
        TriggerError: the log is another one than the cursor has seen; new decisions would be
            missed, or old ones taken for new.
    """
    entries = list(platform.evidence.entries(APPROVALS, start=max(cursor.seen - 1, 0)))
    if cursor.seen == 0:
        return entries
    if not entries or (cursor.last is not None and entries[0].digest != cursor.last):
        raise TriggerError(
            "The store has other decisions than this sensor has seen",
            expected=f"{cursor.seen} or more in the chain {APPROVALS}, of which one is "
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


def _promotion(entry: Entry, decision: RecordedDecision, verified: Approval) -> dg.RunRequest:
    config = {"package_digest": verified.package}
    if verified.evidence == "claimed":
        config |= {
            "approver": verified.approver,
            "decision": verified.decision,
            "reason": verified.reason,
        }
    return dg.RunRequest(
        run_key=entry.digest,
        job_name="promote",
        partition_key=decision.release,
        run_config={"ops": {"production_approval": {"config": config}}},
        tags={
            **run_tags(f"approved by {verified.approver}", decision.approver),
            DECISION_TAG: decision.identity,
        },
    )
