"""What happened to a release, in the order of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from llmops_assets.evidence.statistics import Decision
from llmops_assets.reports.audit_record import AuditRecord
from llmops_assets.reports.wording import title


@dataclass(frozen=True)
class Moment:
    """Something that happened."""

    time: datetime
    what: str
    good: bool = True
    """Whether all is well with it."""


def timeline(record: AuditRecord) -> list[Moment]:
    """The moments that a reader wants to know of, oldest first."""
    return sorted(_moments(record), key=lambda moment: moment.time)


def _moments(record: AuditRecord) -> Iterator[Moment]:
    identity = record.identity
    if identity.requested is not None:
        yield Moment(identity.requested, f"{identity.requested_by or 'Somebody'} asked for it.")
    for step in record.build.steps:
        done = "made" if step.reused_from is None else f"taken over from {step.reused_from}"
        yield Moment(step.finished, f"{title(step.asset)}: {done}.")
    for found in record.gates:
        if found.verdict.decision is not Decision.PASSED:
            waived = " (let through by a waiver)" if found.waived is not None else ""
            what = f"Gate {found.verdict.gate} {found.verdict.decision.value}{waived}: "
            yield Moment(found.verdict.time, what + found.verdict.reason, good=False)
    for admission in record.deployments.admissions:
        word = "admitted to" if admission.passed else "refused for"
        what = f"{word.capitalize()} {admission.environment} by the platform."
        yield Moment(admission.time, what, good=admission.passed)
    for approval in record.approvals:
        word = "approved" if approval.decision == "approve" else "rejected"
        yield Moment(
            approval.time,
            f"{approval.approver} {word} it ({approval.known_by}): {approval.reason}",
            good=approval.decision == "approve",
        )
    for load in record.deployments.loads:
        yield Moment(
            load.time,
            f"Loaded in {load.environment}, slot {load.colour}; {load.right_answers} of "
            f"{load.answers} known questions answered right.",
            good=load.right_answers == load.answers,
        )
    for change in record.deployments.routes:
        after = ", ".join(f"{share.weight} % to {share.release}" for share in change.after)
        what = f"{change.environment.capitalize()} traffic: {after or 'none to anything'}; "
        yield Moment(change.time, f"{what}by {change.actor}, {change.reason}.")
    for incident in record.operation.incidents:
        yield Moment(
            incident.detected,
            f"Incident: {incident.what}; {incident.action or 'nobody answered'}.",
            good=False,
        )
    retired = record.retirement
    for time, what in (
        (retired.deprecated, "Taken out of service."),
        (retired.archived, f"Archived as {retired.archive_file}."),
        (retired.removed, "Removed from the servers."),
    ):
        if time is not None:
            yield Moment(time, what)
