"""A person's decision is about exact bytes, complete, and not the requester's own."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from llmops_assets.deploy.approval import (
    ASSET,
    MEDIA_TYPE,
    Approval,
    Given,
    check_not_rejected,
    check_still_approved,
    decide,
    judge,
    judge_claim,
    newest_decision,
    read_decision,
    record_approval,
    verify,
)
from llmops_assets.deploy.revocation import last_revocation, revoke
from llmops_assets.errors import ApprovalError, LifecycleOrderError, ReleaseError
from llmops_assets.evidence.leaves import APPROVALS
from llmops_assets.storage.columns import Action
from llmops_assets.storage.store import digest_of

from ..release_rig import Rig

PACKAGE = digest_of(b"package")
OTHER = digest_of(b"other package")
RELEASE = "parrot.v1"


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


def decided(rig: Rig, **given: str | None) -> Approval:
    """What a run goes by that was launched with this."""
    return decide(rig.platform, RELEASE, Given(**given), None)


def package_of(rig: Rig, release: str = RELEASE) -> str:
    return rig.platform.columns.get(release, "packaged_model").artifact


def publish(rig: Rig, document: Approval) -> None:
    """As production_approval does."""
    action = Action(ASSET, MEDIA_TYPE)
    rig.platform.columns.record(RELEASE, action, document, datetime.now(UTC))


@pytest.mark.usefixtures("packages")
def test_complete_decision_is_about_the_package_in_hand(rig: Rig) -> None:
    """What is written down is what the gate and the audit read."""
    about = package_of(rig)
    made = decided(rig, approver="bob", decision="approve", reason="fine", about=about)
    assert (made.approver, made.decision, made.package) == ("bob", "approve", about)
    assert (made.requested_by, made.evidence) == ("ada", "claimed")


@pytest.mark.usefixtures("packages")
def test_without_a_decision_the_run_fails_with_the_command(rig: Rig) -> None:
    """A run never waits for a human; it says how to go on."""
    with pytest.raises(ApprovalError, match="Nobody has decided") as caught:
        decided(rig)
    assert f"llmops promote {RELEASE} --approver NAME --reason WHY --package-digest " in (
        caught.value.cure
    )


@pytest.mark.usefixtures("packages")
def test_earlier_decision_counts_for_the_same_package_only(rig: Rig) -> None:
    """A promotion that is repeated needs no second decision; other bytes do."""
    publish(rig, approval(package=OTHER))
    with pytest.raises(ApprovalError, match=f"one about package {OTHER}"):
        decided(rig)
    earlier = approval(package=package_of(rig))
    publish(rig, earlier)
    assert decided(rig) == earlier
    record_approval(rig.platform, RELEASE, "carol", "approve", "fine too", package_of(rig))
    assert decided(rig).approver == "carol", "the last word"


@pytest.mark.usefixtures("packages")
def test_new_decision_replaces_the_earlier(rig: Rig) -> None:
    """A rejection after an approval must stick."""
    publish(rig, approval(package=package_of(rig)))
    made = decided(rig, approver="carol", decision="reject", reason="it is slow")
    assert (made.approver, made.decision) == ("carol", "reject")
    publish(rig, made)
    with pytest.raises(ApprovalError, match="carol rejected it: it is slow"):
        decided(rig)
    judged = judge(rig.platform, RELEASE, made, package_of(rig))
    assert (judged.passed, judged.reason) == (False, "carol rejected it: it is slow")


@pytest.mark.usefixtures("packages")
def test_decision_about_other_bytes_is_refused(rig: Rig) -> None:
    """The approver looked at something else than what is about to be deployed."""
    for earlier in (False, True):
        if earlier:
            publish(rig, approval(package=package_of(rig)))
        for approver in ("bob", None):
            with pytest.raises(ApprovalError, match="another package"):
                decided(rig, approver=approver, decision="approve", reason="x", about=OTHER)


@pytest.mark.usefixtures("packages")
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
    rig: Rig, approver: str | None, decision: str | None, reason: str | None
) -> None:
    """Even with an approval on record: somebody wanted to say something else."""
    publish(rig, approval(package=package_of(rig)))
    with pytest.raises(ApprovalError, match="incomplete"):
        decided(rig, approver=approver, decision=decision, reason=reason)


@pytest.mark.usefixtures("packages")
def test_signed_decision_needs_somebody_who_says_whose_key_it_is(rig: Rig) -> None:
    """Without a policy of approvers a signature says nothing; and two decisions are none."""
    with pytest.raises(ApprovalError, match="not a signed approval"):
        decided(rig, envelope="{}")
    with pytest.raises(ApprovalError, match="two decisions"):
        decided(rig, envelope="{}", approver="bob", decision="approve", reason="x")


@pytest.mark.usefixtures("packages")
def test_revoked_approval_does_not_come_back_by_itself(rig: Rig) -> None:
    """What a rollback took off needs a decision that was made since."""
    publish(rig, approval(package=package_of(rig)))
    check_still_approved(rig.platform, RELEASE)
    revoke(rig.platform, RELEASE, "sam", "wrong years")
    for again in (decided, lambda rig: check_still_approved(rig.platform, RELEASE)):
        with pytest.raises(ApprovalError, match=r"sam revoked it at .*: wrong years"):
            again(rig)
    record_approval(rig.platform, RELEASE, "bob", "approve", "mended", package_of(rig))
    publish(rig, decided(rig))
    check_still_approved(rig.platform, RELEASE)


@pytest.mark.usefixtures("packages")
def test_document_that_is_no_approval_lets_nothing_through(rig: Rig) -> None:
    """Such as one that another version wrote."""
    rig.publish(RELEASE, ASSET, {"document.json": "{}"})
    with pytest.raises(ApprovalError, match="cannot be read"):
        check_still_approved(rig.platform, RELEASE)


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
    judgement = judge_claim(decision, PACKAGE)
    assert judgement.passed is passed
    assert because in judgement.reason


def test_recorded_decision_is_kept_as_it_was_said(rig: Rig, packages: None) -> None:
    """What is verified, and audited years later, is exactly this."""
    package = rig.platform.columns.get("parrot.v1", "packaged_model").artifact
    entry = record_approval(rig.platform, "parrot.v1", " bob ", "approve", " it answers ", package)
    (logged,) = rig.platform.evidence.entries(APPROVALS)
    assert logged == entry
    assert newest_decision(rig.platform.evidence, "parrot.v1") == read_decision(entry)
    verified = verify(rig.platform, "parrot.v1", read_decision(entry))
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
    assert list(rig.platform.evidence.entries(APPROVALS)) == []


@pytest.mark.usefixtures("packages")
def test_rejection_holds_until_somebody_approves_again(rig: Rig) -> None:
    """A promotion that an earlier approval started must not outrun it."""
    package = rig.platform.columns.get("parrot.v1", "packaged_model").artifact
    for decision in ("approve", "reject"):
        check_not_rejected(rig.platform.evidence, "parrot.v1", package)
        record_approval(rig.platform, "parrot.v1", "carol", decision, "so it is", package)
    with pytest.raises(ApprovalError, match=r"carol rejected parrot\.v1: so it is"):
        check_not_rejected(rig.platform.evidence, "parrot.v1", package)
    check_not_rejected(rig.platform.evidence, "parrot.v2", package)
    record_approval(rig.platform, "parrot.v1", "bob", "approve", "mended", package)
    check_not_rejected(rig.platform.evidence, "parrot.v1", package)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("how", ["recorded", "launched with"])
def test_rejection_revokes_what_was_approved(rig: Rig, how: str) -> None:
    """A rollout that is under way asks for revocations, and so does a rollback."""
    package = package_of(rig)
    assert last_revocation(rig.platform.evidence, RELEASE) is None
    if how == "recorded":
        record_approval(rig.platform, RELEASE, "carol", "reject", "it is slow", package)
    else:
        decided(rig, approver="carol", decision="reject", reason="it is slow")
    revoked = last_revocation(rig.platform.evidence, RELEASE)
    assert revoked is not None
    assert "carol revoked it" in revoked.words
    assert "rejected: it is slow" in revoked.words
