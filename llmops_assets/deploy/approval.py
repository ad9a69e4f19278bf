"""The human decision to put exactly these bytes into production."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from llmops_assets.errors import ApprovalError, LifecycleOrderError, ReleaseError
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.storage.store import LogEntry, Record, Store, canonical_json, digest_of

APPROVALS_LOG = "approvals"
"""Log of the store with every decision that was recorded, see `RecordedDecision`."""

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


class RecordedDecision(BaseModel):
    """A decision as somebody recorded it, before anybody checked whether it counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    release: str
    approver: str
    decision: Choice
    reason: str
    package: str
    """Digest of the package that it is about."""
    time: AwareDatetime

    @property
    def identity(self) -> str:
        """Digest of what was decided, whenever and for whichever reason it was said."""
        return digest_of(canonical_json([self.release, self.approver, self.decision, self.package]))


def record_approval(
    platform: Platform, release: str, approver: str, decision: Choice, reason: str, package: str
) -> LogEntry:
    """Records a decision. The trigger `approval` then verifies it and promotes the release.

    Args:
        release: its key.
        approver: who decides.
        decision: `approve` or `reject`.
        reason: why.
        package: digest of the package that the approver looked at.

    Raises:
        ReleaseError: the key is malformed.
        LifecycleOrderError: the release has no package yet.
        ApprovalError: the decision is incomplete, or about another package.
    """
    key = Release.parse(release).key
    built = platform.columns.get(key, "packaged_model").artifact
    approver, reason = approver.strip(), reason.strip()
    if not approver or not reason or decision not in ("approve", "reject"):
        raise ApprovalError(
            f"The decision about {key} is incomplete",
            expected="approver, decision (approve or reject) and reason",
            found=f"approver {approver!r}, decision {decision!r}, reason {reason!r}",
            cure=f"llmops approve {key} --approver NAME --reason WHY",
        )
    if package != built:
        raise ApprovalError(
            f"The decision about {key} is about another package",
            expected=built,
            found=package,
            cure="look at the release as it is, then decide about its package",
        )
    decided = RecordedDecision(
        release=key,
        approver=approver,
        decision=decision,
        reason=reason,
        package=package,
        time=datetime.now(UTC),
    )
    return platform.store.append(APPROVALS_LOG, decided.model_dump(mode="json"))


def read_decision(record: Record) -> RecordedDecision:
    """A record of the log of approvals.

    Raises:
        ApprovalError: it is none that this platform wrote.
    """
    try:
        decision = RecordedDecision.model_validate(record)
        Release.parse(decision.release)
    except (ValidationError, ReleaseError) as error:
        raise ApprovalError(
            "A recorded decision cannot be read",
            expected="a decision that `llmops approve` recorded",
            found=error,
            cure="record it again with `llmops approve`",
        ) from error
    return decision


def verify(platform: Platform, recorded: RecordedDecision) -> Approval:
    """The approval that a recorded decision is, if it counts: the one place that says so.

    It counts if it approves, is about the release's package, and is not by whoever asked
    for the release. Who the approver is, is claimed: whoever can write to the store can
    record a decision in any name. A signature by the approver, and whether that person may
    approve this model, will be checked here.

    Raises:
        ApprovalError: it does not count; the message says why.
    """
    try:
        package = platform.columns.get(recorded.release, "packaged_model").artifact
        facts = platform.columns.get(recorded.release, "model_spec").facts
    except LifecycleOrderError as error:
        raise ApprovalError(
            f"The decision about {recorded.release} has nothing to be about",
            found=error,
            cure="decide about a release that is in staging",
        ) from error
    approval = Approval(
        approver=recorded.approver,
        decision=recorded.decision,
        reason=recorded.reason,
        package=recorded.package,
        requested_by=str(facts["requested_by"]),
        time=recorded.time,
    )
    judgement = judge_approval(approval, package)
    if not judgement.passed:
        raise ApprovalError(
            f"The decision about {recorded.release} does not promote it",
            expected="an approval of its package by somebody who did not ask for the release",
            found=judgement.reason,
            cure=f"llmops approve {recorded.release} --approver NAME --reason WHY, if it shall "
            "go to production",
        )
    return approval


def newest_decision(store: Store, release: str) -> RecordedDecision | None:
    """What was recorded last about a release; None for nothing.

    Raises:
        ApprovalError: a record about it cannot be read.
    """
    newest = None
    for entry in store.log(APPROVALS_LOG):
        if entry.record.get("release") == release:
            newest = entry.record
    return None if newest is None else read_decision(newest)


def check_not_rejected(store: Store, release: str, package: str) -> None:
    """Checks that the newest recorded decision about a package is no rejection.

    A run that an earlier approval started may be under way.

    Raises:
        ApprovalError: it is one.
    """
    newest = newest_decision(store, release)
    if newest is not None and newest.decision == "reject" and newest.package == package:
        raise ApprovalError(
            f"{newest.approver} rejected {release}: {newest.reason}",
            expected="no recorded rejection after the approval",
            found=f"one of {newest.time:%Y-%m-%d %H:%M:%S} UTC",
            cure=f"llmops approve {release} --approver NAME --reason WHY, if that has changed",
        )


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
                _same_person(approval.approver, approval.requested_by)
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


def _same_person(one: str, other: str) -> bool:
    """Whether two names may be one person's: git knows an address, a machine a login name."""
    names = [name.strip().casefold() for name in (one, other)]
    return names[0] == names[1] or names[0].partition("@")[0] == names[1].partition("@")[0]
