"""A person's decision is about exact bytes, complete, and not the requester's own."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from llmops_assets.deploy.approval import (
    APPROVALS_LOG,
    Approval,
    check_not_rejected,
    decide,
    judge_approval,
    newest_decision,
    read_decision,
    record_approval,
    verify,
)
from llmops_assets.errors import ApprovalError, LifecycleOrderError, ReleaseError
from llmops_assets.storage.store import digest_of

from ..release_rig import Rig

PACKAGE = digest_of(b"package")
OTHER = digest_of(b"other package")


def approval(
    approver: str = "bob", decision: str = "approve", package: str = PACKAGE, by: str = "ada"
) -> Approval:
    return Approval.model_validate(
        {
            "approver": approver,
            "decision": decision,
            "reason": "it answers well",
            "package": package,
            "requested_by": by,
            "time": datetime.now(UTC),
        }
    )


def decided(
    earlier: Approval | None = None,
    approver: str | None = None,
    decision: str | None = None,
    reason: str | None = None,
    about: str | None = None,
) -> Approval:
    return decide(
        "parrot.v1", PACKAGE, "ada", earlier,
        approver=approver, decision=decision, reason=reason, about=about,
    )  # fmt: skip


def test_complete_decision_is_recorded_about_the_package_in_hand() -> None:
    """What is written down is what the gate and the audit read."""
    made = decided(approver="bob", decision="approve", reason="it answers well", about=PACKAGE)
    assert (made.approver, made.decision, made.package) == ("bob", "approve", PACKAGE)
    assert (made.requested_by, made.evidence) == ("ada", "claimed")


def test_without_a_decision_the_run_fails_with_the_command() -> None:
    """A run never waits for a human; it says how to go on."""
    with pytest.raises(ApprovalError, match="Nobody has decided") as caught:
        decided()
    assert f"llmops promote parrot.v1 --approver NAME --reason WHY --package-digest {PACKAGE}" in (
        caught.value.cure
    )


def test_earlier_decision_counts_for_the_same_package_only() -> None:
    """A promotion that is repeated needs no second decision; other bytes do."""
    earlier = approval()
    assert decided(earlier) is earlier
    with pytest.raises(ApprovalError, match=f"one about package {OTHER}"):
        decided(approval(package=OTHER))


def test_new_decision_replaces_the_earlier() -> None:
    """A rejection after an approval must stick."""
    made = decided(approval(), approver="carol", decision="reject", reason="it is slow")
    assert (made.approver, made.decision) == ("carol", "reject")


@pytest.mark.parametrize("earlier", [None, approval()])
def test_decision_about_other_bytes_is_refused(earlier: Approval | None) -> None:
    """The approver looked at something else than what is about to be deployed."""
    for approver in ("bob", None):
        with pytest.raises(ApprovalError, match="another package"):
            decided(earlier, approver=approver, decision="approve", reason="fine", about=OTHER)


@pytest.mark.parametrize(
    ("approver", "decision", "reason"),
    [
        ("bob", None, "fine"),
        (None, "approve", "fine"),
        ("", "approve", "fine"),
        ("  ", "approve", "fine"),
        ("bob", "approve", None),
        ("bob", "approve", " "),
        ("bob", "yes", "fine"),
    ],
)
def test_incomplete_decision_is_refused(
    approver: str | None, decision: str | None, reason: str | None
) -> None:
    """Even with an approval on record: somebody wanted to say something else."""
    with pytest.raises(ApprovalError, match="incomplete"):
        decided(approval(), approver=approver, decision=decision, reason=reason)


@pytest.mark.parametrize(
    ("decision", "passed", "because"),
    [
        (approval(), True, "bob (claimed) approved it: it answers well"),
        (approval(decision="reject"), False, "bob rejected it: it answers well"),
        (approval(package=OTHER), False, f"the decision is about package {OTHER}"),
        (approval(approver="ada"), False, "ada asked for the release"),
        (approval(approver="Ada", by="ada "), False, "Ada asked for the release"),
    ],
)
def test_separation_of_duties(decision: Approval, passed: bool, because: str) -> None:
    """Four eyes, and a capital letter does not make a second pair."""
    judgement = judge_approval(decision, PACKAGE)
    assert judgement.passed is passed
    assert because in judgement.reason


def test_recorded_decision_is_kept_as_it_was_said(rig: Rig, packages: None) -> None:
    """What is verified, and audited years later, is exactly this."""
    package = rig.platform.columns.get("parrot.v1", "packaged_model").artifact
    entry = record_approval(rig.platform, "parrot.v1", " bob ", "approve", " it answers ", package)
    (logged,) = rig.platform.store.log(APPROVALS_LOG)
    assert logged == entry
    assert newest_decision(rig.platform.store, "parrot.v1") == read_decision(entry.record)
    verified = verify(rig.platform, read_decision(entry.record))
    assert (verified.approver, verified.reason, verified.package) == ("bob", "it answers", package)
    assert (verified.requested_by, verified.evidence) == ("ada", "claimed")


@pytest.mark.usefixtures("packages")
def test_decision_that_cannot_count_is_not_recorded(rig: Rig) -> None:
    """Found while the person still sits there."""
    package = rig.platform.columns.get("parrot.v1", "packaged_model").artifact
    with pytest.raises(LifecycleOrderError, match="no packaged_model yet"):
        record_approval(rig.platform, "parrot.v9", "bob", "approve", "fine", package)
    with pytest.raises(ReleaseError):
        record_approval(rig.platform, "parrot", "bob", "approve", "fine", package)
    with pytest.raises(ApprovalError, match="another package"):
        record_approval(rig.platform, "parrot.v2", "bob", "approve", "fine", package)
    for approver, reason in ((" ", "fine"), ("bob", "")):
        with pytest.raises(ApprovalError, match="incomplete"):
            record_approval(rig.platform, "parrot.v1", approver, "approve", reason, package)
    assert list(rig.platform.store.log(APPROVALS_LOG)) == []


@pytest.mark.usefixtures("packages")
def test_rejection_holds_until_somebody_approves_again(rig: Rig) -> None:
    """A promotion that an earlier approval started must not outrun it."""
    package = rig.platform.columns.get("parrot.v1", "packaged_model").artifact
    for decision in ("approve", "reject"):
        check_not_rejected(rig.platform.store, "parrot.v1", package)
        record_approval(rig.platform, "parrot.v1", "carol", decision, "so it is", package)
    with pytest.raises(ApprovalError, match=r"carol rejected parrot\.v1: so it is"):
        check_not_rejected(rig.platform.store, "parrot.v1", package)
    check_not_rejected(rig.platform.store, "parrot.v2", package)
    record_approval(rig.platform, "parrot.v1", "bob", "approve", "mended", package)
    check_not_rejected(rig.platform.store, "parrot.v1", package)
