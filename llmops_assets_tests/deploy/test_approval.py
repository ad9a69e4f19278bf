"""A person's decision is about exact bytes, complete, and not the requester's own."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from llmops_assets.deploy.approval import Approval, decide, judge_approval
from llmops_assets.errors import ApprovalError
from llmops_assets.storage.store import digest_of

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
