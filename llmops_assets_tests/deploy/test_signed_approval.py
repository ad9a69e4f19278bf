"""Signed approvals: what counts, and every way in which one does not, also by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from llmops_assets.deploy import examination
from llmops_assets.deploy.approval import (
    Approval,
    read_decision,
    record_approval,
    record_signed,
    sign_approval,
    verify,
)
from llmops_assets.deploy.revocation import check_not_revoked, revoke
from llmops_assets.deploy.signed_decision import LogHead, read_signed
from llmops_assets.errors import ApprovalError
from llmops_assets.evidence.dsse import Envelope
from llmops_assets.evidence.gates import ACCURACY, REGRESSION
from llmops_assets.operate.rollback import roll_back
from llmops_assets.serving.slots import Environment
from llmops_assets.settings import Settings
from llmops_assets.storage.store import digest_of
from llmops_assets.triggers.requests import REQUESTED_BY_TAG

from ..release_rig import FAILED, PASSED, PlatformOnDoubles, deploy, serving
from ..test_reporting import Runs, description, evaluations, failures
from .approvers_rig import RELEASE, ApproversRig, edited, shifted

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ApproversRig]:
    rig = ApproversRig(tmp_path / "rig")
    rig.stage()
    yield rig
    rig.close()


@pytest.fixture
def runs(rig: ApproversRig) -> Iterator[Runs]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Runs(rig, instance)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """One release for all approvals that do not count: they leave nothing that does."""
    rig = ApproversRig(tmp_path_factory.mktemp("shared") / "rig")
    rig.stage()
    rig.stage("parrot.v2", 2)
    with dg.DagsterInstance.ephemeral() as instance:
        yield Runs(rig, instance)
    rig.close()


def approve(rig: ApproversRig, by: str = "grace", release: str = RELEASE) -> Envelope:
    """As `llmops approve` does."""
    envelope = sign_approval(rig.platform, release, rig.people[by].signer, "approve", "it answers")
    record_signed(rig.platform, envelope, "command")
    return envelope


def refused(rig: ApproversRig, release: str = RELEASE, **options: Any) -> str:
    with pytest.raises(ApprovalError) as caught:
        verify(rig.platform, release, **options)
    return str(caught.value)


def test_signed_approval_counts_and_is_on_record_with_both_signatures(rig: ApproversRig) -> None:
    """The audit asks for the approver's own signature, and verifies it by itself."""
    envelope = approve(rig)
    approval = verify(rig.platform, RELEASE)
    assert (approval.approver, approval.evidence, approval.requested_by) == (
        "grace", "signed", "ivan",
    )  # fmt: skip
    (counted,) = approval.signed
    entries = list(rig.platform.evidence.entries(f"releases/{RELEASE}"))
    entry = next(e for e in entries if e.leaf.statement == counted.statement)
    assert read_decision(entry).envelope == envelope
    assert approval.expires == counted.expires
    assert record_signed(rig.platform, envelope, "file").sequence == entry.sequence, "once"


def forged(rig: ApproversRig) -> Envelope:
    """mallory signs and says that the key was grace's."""
    envelope = rig.sign(rig.decided(), "mallory")
    keyid = rig.people["grace"].signer.public_key.keyid
    signature = envelope.signatures[0].model_copy(update={"keyid": keyid})
    return envelope.model_copy(update={"signatures": (signature,)})


def of_another_release(rig: ApproversRig) -> Envelope:
    return rig.sign(rig.decided(release="parrot.v2"))


def with_a_changed_verdict(rig: ApproversRig) -> Envelope:
    envelope = rig.sign(rig.decided())
    rig.judge(RELEASE, [ACCURACY], PASSED.model_copy(update={"reason": "by a hair"}))
    return envelope


def without_a_verdict(rig: ApproversRig) -> Envelope:
    decided = rig.decided()
    verdicts = {g: d for g, d in decided.verdicts.items() if g != ACCURACY.name}
    return rig.sign(decided.model_copy(update={"verdicts": verdicts}))


def before_a_revocation(rig: ApproversRig) -> Envelope:
    envelope = rig.sign(rig.decided())
    revoke(rig.platform, RELEASE, "sam", "wrong years")
    return envelope


def with_another_log(rig: ApproversRig) -> Envelope:
    head = rig.decided().log
    return rig.sign(rig.decided(log=LogHead(size=head.size - 1, root=head.root)))


CASES: dict[str, tuple[Callable[[ApproversRig], Envelope], str]] = {
    "forged": (forged, "it is forged, or was edited"),
    "edited": (lambda rig: edited(rig.sign(rig.decided()), reason="x"), "it is forged, or was"),
    "expired": (
        lambda rig: rig.sign(rig.decided(expires=datetime.now(UTC) - timedelta(seconds=1))),
        "it expired at",
    ),
    "not yet valid": (
        lambda rig: rig.sign(rig.decided(not_before=datetime.now(UTC) + timedelta(hours=1))),
        "it counts from",
    ),
    "for too long": (lambda rig: rig.sign(rig.decided(days=8)), "longer than the 7 days"),
    "for too long, by its clock": (
        lambda rig: rig.sign(rig.decided(days=8, time=datetime.now(UTC) + timedelta(days=2))),
        "longer than the 7 days",
    ),
    "another release's": (of_another_release, "it approves parrot.v2, not parrot.v1"),
    "another package's": (
        lambda rig: rig.sign(rig.decided(package=digest_of(b"other"))),
        "it is about package",
    ),
    "another environment's": (
        lambda rig: rig.sign(rig.decided(environment=Environment.STAGING)),
        "it is about parrot in staging",
    ),
    "another's name": (
        lambda rig: rig.sign(rig.decided("grace"), "heidi"),
        "signed by heidi, in the name of grace",
    ),
    "unknown key": (lambda rig: rig.sign(rig.decided("mallory")), "No approver has the key SHA256"),
    "expired key": (lambda rig: rig.sign(rig.decided("late")), "the key expired at 2026-01-01"),
    "by the author": (lambda rig: rig.sign(rig.decided("ada")), "ada@example.org wrote the change"),
    "by who asked": (lambda rig: rig.sign(rig.decided("ivan")), "ivan asked for the release"),
    "verdict changed": (with_a_changed_verdict, "the verdict of accuracy has changed since"),
    "verdict missing": (without_a_verdict, "it names no verdict of accuracy"),
    "gates changed": (
        lambda rig: rig.sign(rig.decided(policy=digest_of(b"laxer"))),
        "the gates judge by another policy",
    ),
    "revoked since": (before_a_revocation, "before sam revoked it"),
    "another log": (with_another_log, "signed for another evidence log"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_approval_that_does_not_count_is_refused_everywhere(shared: Runs, case: str) -> None:
    """Where it is recorded; and in the log, where whoever has the platform's key can put it,
    also when the asset is launched by hand."""
    rig = shared.rig
    assert isinstance(rig, ApproversRig)
    make, why = CASES[case]
    envelope = make(rig)
    with pytest.raises(ApprovalError) as caught:
        record_signed(rig.platform, envelope, "command", RELEASE)
    assert why in str(caught.value)
    before = refused(rig).count(why)
    rig.force(envelope)
    assert refused(rig).count(why) == before + 1
    result = shared.assets(RELEASE, "production_approval")
    assert description(result, "production_approval").count(why) == before + 1
    assert rig.platform.columns.find(RELEASE, "production_approval") is None


def test_unsigned_approval_never_counts_beside_a_policy(rig: ApproversRig, runs: Runs) -> None:
    """Whoever can write a name could otherwise approve; neither the log nor the launchpad."""
    package = rig.platform.columns.get(RELEASE, "packaged_model").artifact
    record_approval(rig.platform, RELEASE, "grace", "approve", "fine", package)
    assert "grace: it is not signed" in refused(rig)
    config = {"approver": "grace", "decision": "approve", "reason": "fine"}
    result = runs.job("promote", RELEASE, {"ops": {"production_approval": {"config": config}}})
    assert "is not signed" in description(result, "production_approval")
    # A document that a run without the policy published, and its verdict with it.
    claim = Approval(
        approver="grace", decision="approve", reason="fine", package=package, requested_by="ivan",
        time=datetime.now(UTC),
    )  # fmt: skip
    approve(rig)
    assert "The decision about parrot.v1 is not signed" in refused(rig, claim=claim)


def test_as_many_people_as_the_policy_says(rig: ApproversRig) -> None:
    """Two keys, or two clicks, of one person are no second pair of eyes."""
    rig.write_policy(rig.policy(required=2))
    approve(rig, "grace")
    assert "1 that count, by grace" in refused(rig)
    approve(rig, "grace")
    assert "grace: counts once" in refused(rig)
    approve(rig, "heidi")
    assert verify(rig.platform, RELEASE).approver == "grace, heidi"


def test_same_nonce_counts_once(rig: ApproversRig) -> None:
    """A signed file that is put into the log a second time is one approval."""
    rig.write_policy(rig.policy(required=2))
    envelope = approve(rig)
    rig.force(envelope)
    assert "grace: it is a replay" in refused(rig)
    other = rig.sign(rig.decided("heidi", nonce=rig.decided().nonce))
    rig.force(other)
    twin = rig.sign(rig.decided("heidi", nonce=read_nonce(other), reason="another"))
    with pytest.raises(ApprovalError, match="is a replay"):
        record_signed(rig.platform, twin, "command")


def read_nonce(envelope: Envelope) -> str:
    return read_signed(envelope).nonce


def test_who_started_the_run_does_not_approve_in_it(rig: ApproversRig, runs: Runs) -> None:
    """One person would otherwise approve and deploy alone."""
    approve(rig)
    assert "grace started the run" in refused(rig, started_by="grace")
    assert verify(rig.platform, RELEASE, started_by="sam").started_by == "sam"
    runs.instance.add_dynamic_partitions("releases", [RELEASE])
    job = runs.definitions.resolve_job_def("promote")
    result = job.execute_in_process(
        instance=runs.instance, partition_key=RELEASE, raise_on_error=False,
        tags={REQUESTED_BY_TAG: "Grace@example.org"},
    )  # fmt: skip
    assert "Grace@example.org started the run" in description(result, "production_approval")


def test_author_of_an_earlier_commit_since_what_serves(rig: ApproversRig) -> None:
    """The change is all that is new, not only its last commit."""
    deploy(rig, 1)
    (rig.models / "more.txt").write_text("by grace")
    rig.commit_all(None, "--author=Grace <grace@example.org>")
    rig.commit = rig.commit_all()
    rig.stage("parrot.v2", 2)
    rig.force(rig.sign(rig.decided(release="parrot.v2")), "parrot.v2")
    assert "Grace wrote the change" in refused(rig, "parrot.v2")


def test_release_of_a_commit_that_nobody_has_is_not_approved(rig: ApproversRig) -> None:
    """Nobody can tell whether its author is the approver."""
    rig.commit = "c" * 40
    rig.stage("parrot.v2", 2)
    with pytest.raises(ApprovalError, match="Nobody can tell who wrote"):
        approve(rig, release="parrot.v2")


def promote(rig: ApproversRig, runs: Runs, release: str) -> Envelope:
    """Compared with what serves, approved, and put into production; returns the approval."""
    assert runs.check(release, "evaluation", REGRESSION.name).success
    envelope = approve(rig, release=release)
    result = runs.job("promote", release)
    assert result.success, failures(result)
    return envelope


def test_promotion_is_idempotent_while_approved_and_refused_after_a_rollback(
    rig: ApproversRig, runs: Runs
) -> None:
    """The same run again changes nothing; what a rollback took off stays off until somebody
    approves anew, and the old signature brings nothing back."""
    promote(rig, runs, RELEASE)
    assert serving(rig) == 1
    rig.stage("parrot.v2", 2)
    first = promote(rig, runs, "parrot.v2")
    assert serving(rig) == 2
    again = runs.job("promote", "parrot.v2")
    assert again.success, failures(again)

    roll_back(rig.platform, "parrot", "sam", "wrong years")
    assert serving(rig) == 1
    with pytest.raises(ApprovalError, match="sam revoked it"):
        check_not_revoked(rig.platform.evidence, "parrot.v2")
    with pytest.raises(ApprovalError, match="before sam revoked it"):
        record_signed(rig.platform, first, "command")
    rig.force(first, "parrot.v2")
    assert runs.check("parrot.v2", "evaluation", REGRESSION.name).success
    for asset in ("production_approval", "production_candidate", "production_deployment"):
        result = runs.assets("parrot.v2", asset)
        assert "sam revoked it" in description(result, asset), asset
    assert serving(rig) == 1
    promote(rig, runs, "parrot.v2")
    assert serving(rig) == 2
    check_not_revoked(rig.platform.evidence, "parrot.v2")


def test_approval_that_expires_before_the_deployment(
    rig: ApproversRig, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may wait for hours in the queue; its gate passed at the time."""
    approve(rig)
    assert runs.assets(RELEASE, "production_approval").success
    monkeypatch.setattr(examination, "datetime", shifted(timedelta(days=8)))
    result = runs.assets(RELEASE, "production_candidate")
    assert "grace: it expired at" in description(result, "production_candidate")
    judged = runs.check(RELEASE, "production_approval", "separation_of_duties")
    assert evaluations(judged) == {"separation_of_duties": False}


def test_rejection_revokes_and_outlives_the_approver(rig: ApproversRig) -> None:
    """Also by who wrote it; and when the policy names that person no more."""
    approve(rig)
    rejection = sign_approval(
        rig.platform, RELEASE, rig.people["ada"].signer, "reject", "it is mine, and wrong"
    )
    record_signed(rig.platform, rejection, "command")
    assert "before ada revoked it" in refused(rig)
    record_signed(rig.platform, rejection, "file")  # once: it does not revoke what follows
    approve(rig, "heidi")
    record_signed(rig.platform, rejection, "file")
    assert verify(rig.platform, RELEASE).approver == "heidi"


def test_launchpad_takes_the_envelope(rig: ApproversRig, runs: Runs) -> None:
    """For who can reach the UI alone. One for another release is refused there."""
    rig.stage("parrot.v2", 2)
    assert runs.check(RELEASE, "evaluation", REGRESSION.name).success
    envelope = sign_approval(
        rig.platform, RELEASE, rig.people["grace"].signer, "approve", "it answers"
    )
    config = {"ops": {"production_approval": {"config": {"envelope": envelope.model_dump_json()}}}}
    other = runs.job("promote", "parrot.v2", config)
    assert "it approves parrot.v1, not parrot.v2" in description(other, "production_approval")
    broken = {"ops": {"production_approval": {"config": {"envelope": "{}"}}}}
    assert "not a signed approval" in description(
        runs.job("promote", RELEASE, broken), "production_approval"
    )
    result = runs.job("promote", RELEASE, config)
    assert result.success, failures(result)
    assert evaluations(result)["separation_of_duties"]
    assert serving(rig) == 1


def test_signing_finds_mistakes_while_the_person_sits_there(rig: ApproversRig) -> None:
    """Otherwise the tick's log says it, which nobody reads at once."""
    grace = rig.people["grace"].signer
    with pytest.raises(ApprovalError, match="ivan asked for the release"):
        sign_approval(rig.platform, RELEASE, rig.people["ivan"].signer, "approve", "fine")
    with pytest.raises(ApprovalError, match="another package"):
        sign_approval(rig.platform, RELEASE, grace, "approve", "x", about=digest_of(b"other"))
    with pytest.raises(ApprovalError, match="incomplete"):
        sign_approval(rig.platform, RELEASE, grace, "approve", " ")
    rig.judge(RELEASE, [ACCURACY], FAILED)
    with pytest.raises(ApprovalError, match="accuracy: failed"):
        sign_approval(rig.platform, RELEASE, grace, "approve", "fine")
    plain = PlatformOnDoubles(rig.platform.settings.model_copy(update={"approvers_ref": None}))
    with pytest.raises(ApprovalError, match="no policy of approvers is set"):
        sign_approval(plain, RELEASE, grace, "approve", "fine")


def test_unsigned_approvals_can_be_switched_off(rig: ApproversRig) -> None:
    """Without a policy nothing is approved then."""
    settings: Settings = rig.platform.settings.model_copy(update={"approvers_ref": None})
    package = rig.platform.columns.get(RELEASE, "packaged_model").artifact
    record_approval(rig.platform, RELEASE, "bob", "approve", "fine", package)
    assert verify(PlatformOnDoubles(settings), RELEASE).evidence == "claimed"
    strict = PlatformOnDoubles(settings.model_copy(update={"unsigned_approvals": False}))
    with pytest.raises(ApprovalError, match="LLMOPS_UNSIGNED_APPROVALS is false"):
        verify(strict, RELEASE)
    revoke(PlatformOnDoubles(settings), RELEASE, "sam", "wrong years")
    with pytest.raises(ApprovalError, match="before sam revoked it"):
        verify(PlatformOnDoubles(settings), RELEASE)
