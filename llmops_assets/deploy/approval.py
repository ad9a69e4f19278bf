"""The human decision to put exactly these bytes into production."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmops_assets.errors import ApprovalError
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement

Choice = Literal["approve", "reject"]


class Approval(BaseModel):
    """Document of `production_approval`."""

    model_config = ConfigDict(frozen=True)

    approver: str
    decision: Choice
    reason: str
    package: str
    """Digest of the package that the decision is about."""
    requested_by: str
    """Who asked for the release."""
    evidence: Literal["claimed"] = "claimed"
    """How the approver is known: typed in by whoever launched the run, not signed."""
    time: datetime


def decide(
    release: str,
    package: str,
    requested_by: str,
    earlier: Approval | None,
    *,
    approver: str | None,
    decision: str | None,
    reason: str | None,
    about: str | None,
) -> Approval:
    """The decision that a run was launched with, or the one made before.

    Args:
        package: digest of the package in hand.
        earlier: the release's recorded decision.
        about: digest of the package that the approver decided about, where they said.

    Raises:
        ApprovalError: there is no decision, it is incomplete, or about other bytes.
    """
    cure = (
        f"llmops promote {release} --approver NAME --reason WHY --package-digest {package}; or "
        "fill in production_approval's config in the launchpad of the job promote"
    )
    if about is not None and about != package:
        raise ApprovalError(
            f"The decision about {release} is about another package",
            expected=package,
            found=about,
            cure=f"look at what changed, then decide about this package: {cure}",
        )
    if decision is None and approver is None:
        if earlier is not None and earlier.package == package:
            return earlier
        raise ApprovalError(
            f"Nobody has decided about {release} yet",
            expected=f"a decision about package {package}",
            found="none" if earlier is None else f"one about package {earlier.package}",
            cure=cure,
        )
    approver, reason = (approver or "").strip(), (reason or "").strip()
    if decision not in ("approve", "reject") or not approver or not reason:
        raise ApprovalError(
            f"The decision about {release} is incomplete",
            expected="approver, decision (approve or reject) and reason",
            found=f"approver {approver!r}, decision {decision!r}, reason {reason!r}",
            cure=cure,
        )
    return Approval(
        approver=approver,
        decision=decision,
        reason=reason,
        package=package,
        requested_by=requested_by,
        time=datetime.now(UTC),
    )


def judge_approval(approval: Approval, package: str) -> Judgement:
    """Approved, about this package, by somebody other than who asked for the release."""
    objections = [
        objection
        for objection, holds in {
            f"{approval.approver} rejected it: {approval.reason}": approval.decision != "approve",
            f"the decision is about package {approval.package}": approval.package != package,
            f"{approval.approver} asked for the release and cannot approve it": (
                approval.approver.casefold() == approval.requested_by.strip().casefold()
            ),
        }.items()
        if holds
    ]
    return Judgement(
        decision=Decision.of(not objections),
        measured={
            "decision": approval.decision,
            "approver": approval.approver,
            "requested_by": approval.requested_by,
            "package": approval.package,
            "evidence": approval.evidence,
        },
        threshold={"decision": "approve", "package": package, "approver": "not requested_by"},
        reason="; ".join(objections)
        or f"{approval.approver} ({approval.evidence}) approved it: {approval.reason}",
    )
