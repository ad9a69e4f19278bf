"""The human decision to put exactly these bytes into production, and whether it counts.

Without a policy of approvers a decision is *claimed*: its approver is a name that somebody
typed. With one, it is signed by the approver's own key, and carried in the platform's own
statement, so that the log has both signatures. `verify` alone says what counts, for the
trigger, for runs by hand, and for whatever deploys.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from llmops_assets.deploy.accepted_approvers import (
    PolicyInForce,
    policy_in_force,
    unknown_key,
)
from llmops_assets.deploy.approvers import Approver, ApproverKey, same_person
from llmops_assets.deploy.examination import Examination, examine
from llmops_assets.deploy.revocation import last_revocation, revocation_of, revoke
from llmops_assets.deploy.signed_decision import (
    Choice,
    SignedDecision,
    decision_about,
    parse_envelope,
    read_signed,
    sign_decision,
    verified_decision,
)
from llmops_assets.errors import ApprovalError, LifecycleOrderError, ReleaseError
from llmops_assets.evidence import attest
from llmops_assets.evidence.dsse import Envelope, Signer
from llmops_assets.evidence.leaves import APPROVALS, Entry, release_chain
from llmops_assets.evidence.log import Attestation, EvidenceLog
from llmops_assets.evidence.statements import DECISION, LIFECYCLE_EVENT
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.storage.store import canonical_json, digest_of

ASSET = "production_approval"
MEDIA_TYPE = "application/vnd.llmops.approval.v1"

Delivery = Literal["command", "file", "launchpad"]


class CountedApproval(BaseModel):
    """A signed approval that counted."""

    model_config = ConfigDict(frozen=True)

    approver: str
    statement: str
    """Digest of the platform's statement that carries it."""
    nonce: str
    expires: AwareDatetime


class Approval(BaseModel):
    """Document of `production_approval`."""

    model_config = ConfigDict(frozen=True)

    approver: str
    """Who decided; of several, their names with commas between."""
    decision: Choice
    reason: str
    package: str
    """Digest of the package that the decision is about."""
    requested_by: str
    """Who asked for the release."""
    evidence: Literal["claimed", "signed"] = "claimed"
    """How the approver is known: `claimed` is typed in by whoever launched the run."""
    signed: tuple[CountedApproval, ...] = ()
    """What was signed; nothing of a claimed one."""
    approvers_policy: str | None = None
    """Digest of the policy of approvers that it was held against."""
    started_by: str | None = None
    """Who started the run, where that is known and nothing else than an approval did."""
    expires: AwareDatetime | None = None
    """From when on it counts no more; None for a claimed one."""
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
    evidence: Literal["claimed", "signed"] = "claimed"
    """How the approver is known."""
    delivered: Delivery = "command"
    """How it came into the log."""
    envelope: Envelope | None = None
    """What the approver signed; None for a claimed one."""

    @property
    def identity(self) -> str:
        """Digest of what was decided, whenever and for whichever reason it was said."""
        return digest_of(canonical_json([self.release, self.approver, self.decision, self.package]))


@dataclass(frozen=True)
class Given:
    """A decision that a run was launched with; all None: the one on record."""

    approver: str | None = None
    decision: str | None = None
    reason: str | None = None
    about: str | None = None
    """Digest of the package that it is about, where that was said."""
    envelope: str | None = None
    """A signed one, as JSON."""


def record_approval(
    platform: Platform, release: str, approver: str, decision: Choice, reason: str, package: str
) -> Entry:
    """Records a claimed decision. The trigger `approval` then promotes the release, if it counts.

    A rejection revokes all approvals before it, unless there is a policy of approvers: beside
    one it counts as little as an unsigned approval.

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
        EvidenceError: it cannot be signed.
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
        raise _other_package(key, built, package)
    decided = RecordedDecision(
        release=key,
        approver=approver,
        decision=decision,
        reason=reason,
        package=package,
        time=datetime.now(UTC),
    )
    attestations = [Attestation(attest.decision(decided), (APPROVALS, release_chain(key)))]
    if decision == "reject" and platform.settings.approvers_ref is None:
        attestations.append(revocation_of(platform, key, approver, f"rejected: {reason}", package))
    return platform.evidence.append(*attestations)[0]


def sign_approval(
    platform: Platform,
    release: str,
    signer: Signer,
    decision: Choice,
    reason: str,
    *,
    about: str | None = None,
    valid: timedelta | None = None,
) -> Envelope:
    """Signs a decision with an approver's key. It counts once it is in the log.

    Args:
        release: its key.
        signer: holds the approver's key.
        about: digest of the package that the approver looked at; None: the release's.
        valid: for how long it shall count; None: as LLMOPS_APPROVAL_DAYS and the policy say.

    Raises:
        ApprovalError: no policy is in force, the key is no approver's, the reason is empty, or
            a gate does not let the release go on.
        LifecycleOrderError: the release has no package yet.
    """
    key = Release.parse(release).key
    force = required_policy(platform)
    approver, key_used = _holder(force, signer.public_key.keyid)
    built = platform.columns.get(key, "packaged_model").artifact
    if about is not None and about != built:
        raise _other_package(key, built, about)
    if not reason.strip():
        raise ApprovalError(
            f"The decision about {key} is incomplete",
            expected="a reason",
            found="none",
            cure=f"llmops approve {key} --reason WHY",
        )
    examination = examine(platform, key, force, None)
    if valid is None:
        longest = examination.rule.longest_validity
        valid = min(longest, timedelta(days=platform.settings.approval_days))
    decided = decision_about(
        platform, key, built,
        approver=approver.name, decision=decision, reason=reason.strip(), valid=valid,
    )  # fmt: skip
    # Found while the person still sits there.
    _check_counts(examination, decided, approver, key_used)
    return sign_decision(decided, signer)


def record_signed(
    platform: Platform, envelope: Envelope, delivered: Delivery, release: str | None = None
) -> Entry:
    """Takes a signed decision into the log, inside of a statement of the platform's own.

    A rejection revokes all approvals before it. A decision that is there already changes
    nothing.

    Args:
        envelope: what the approver signed.
        delivered: how it came.
        release: the release that it must be about; None: the one that it names.

    Raises:
        ApprovalError: it can never count, or counts no more; the message says why.
        EvidenceError: the platform's statement cannot be signed.
    """
    force = required_policy(platform)
    claimed = read_signed(envelope)
    about = Release.parse(release or claimed.release).key
    approver, key, signed = _opened(force, envelope)
    try:
        examination = examine(platform, about, force, None)
    except LifecycleOrderError as error:
        raise _nothing_to_decide(about, error) from error
    _check_counts(examination, signed, approver, key)
    for entry in platform.evidence.entries(release_chain(about), DECISION):
        earlier = read_decision(entry)
        if earlier.envelope is not None and read_signed(earlier.envelope).nonce == signed.nonce:
            if earlier.envelope.payload == envelope.payload:
                return entry
            raise ApprovalError(
                f"The decision about {about} is a replay",
                expected="a nonce that was not used before",
                found=f"that of entry {entry.sequence}, with another content",
                cure=f"decide anew: llmops approve {about} --reason WHY",
            )
    recorded = RecordedDecision(
        release=about,
        approver=signed.approver,
        decision=signed.decision,
        reason=signed.reason,
        package=signed.package,
        time=signed.time,
        evidence="signed",
        delivered=delivered,
        envelope=envelope,
    )
    attestations = [Attestation(attest.decision(recorded), (APPROVALS, release_chain(about)))]
    if signed.decision == "reject":
        # A statement of its own: it holds also when the approver leaves the policy.
        attestations.append(
            revocation_of(
                platform, about, signed.approver, f"rejected: {signed.reason}", signed.package
            )
        )
    return platform.evidence.append(*attestations)[0]


def read_decision(entry: Entry) -> RecordedDecision:
    """The decision in an entry of the chain of approvals.

    Raises:
        ApprovalError: it is none that this platform wrote.
    """
    try:
        decision = RecordedDecision.model_validate(entry.statement.predicate)
        Release.parse(decision.release)
    except (ValidationError, ReleaseError) as error:
        raise ApprovalError(
            "A recorded decision cannot be read",
            expected="a decision that `llmops approve` recorded",
            found=error,
            cure="record it again with `llmops approve`",
        ) from error
    return decision


def verify(
    platform: Platform,
    release: str,
    claim: Approval | RecordedDecision | None = None,
    *,
    started_by: str | None = None,
) -> Approval:
    """The approval that lets a release into production now: the one place that says so.

    With a policy of approvers: enough different people whom it names have signed for exactly
    this, none of them is behind the release, and nothing has happened since that they did
    not know. Without one: somebody approved, in another name than that of who asked for the
    release, and nobody rejected or revoked it since.

    Args:
        release: its key.
        claim: the claimed decision in hand; None: those in the log.
        started_by: who started the run, where that is known.

    Raises:
        ApprovalError: it does not count; the message says why.
        SpecError, TriggerError: the policy, or who wrote the release, cannot be asked for.
        EvidenceError: evidence is missing or does not fit.
    """
    force = policy_in_force(platform)
    try:
        if force is not None:
            if claim is not None and claim.evidence == "claimed":
                raise _unsigned(release, claim.approver, force)
            return _signed(platform, release, force, started_by)
        package = platform.columns.get(release, "packaged_model").artifact
        approval = _claimed(platform, release, claim or claim_on_record(platform, release))
    except LifecycleOrderError as error:
        raise _nothing_to_decide(release, error) from error
    judgement = judge_claim(approval, package)
    objections = [] if judgement.passed else [judgement.reason]
    if not platform.settings.unsigned_approvals:
        objections.append("it is not signed, and LLMOPS_UNSIGNED_APPROVALS is false")
    revoked = last_revocation(platform.evidence, release)
    if revoked is not None and revoked.time >= approval.time:
        objections.append(f"it was made before {revoked.words}")
    if objections:
        raise ApprovalError(
            f"The decision about {release} does not promote it",
            expected="an approval of its package by somebody who did not ask for the release",
            found="; ".join(objections),
            cure=f"llmops approve {release} --approver NAME --reason WHY, if it shall "
            "go to production",
        )
    check_not_rejected(platform.evidence, release, package)
    return approval


def decide(platform: Platform, release: str, given: Given, started_by: str | None) -> Approval:
    """The decision that a run goes by: the one it was launched with, or what is on record.

    A claimed one that the run was launched with is returned also if it does not count; its
    gate says so.

    Raises:
        ApprovalError: there is no decision, it is incomplete, about other bytes, or it is or
            should be signed and does not count.
        SpecError, TriggerError: as `verify`.
    """
    package = platform.columns.get(release, "packaged_model").artifact
    if given.about is not None and given.about != package:
        raise _other_package(release, package, given.about)
    unsigned = given.approver is not None or given.decision is not None
    if given.envelope is not None and unsigned:
        raise ApprovalError(
            f"There are two decisions about {release}",
            expected="either envelope, or approver, decision and reason",
            found="both",
            cure="leave one of them empty",
        )
    force = policy_in_force(platform)
    if given.envelope is not None:
        record_signed(platform, parse_envelope(given.envelope), "launchpad", release)
    if not unsigned:
        return verify(platform, release, started_by=started_by)
    if force is not None:
        raise _unsigned(release, given.approver or "nobody", force)
    approver, reason = (given.approver or "").strip(), (given.reason or "").strip()
    if given.decision not in ("approve", "reject") or not approver or not reason:
        raise ApprovalError(
            f"The decision about {release} is incomplete",
            expected="approver, decision (approve or reject) and reason",
            found=f"approver {approver!r}, decision {given.decision!r}, reason {reason!r}",
            cure=_how_to_decide(release, package),
        )
    if given.decision == "approve":
        check_not_rejected(platform.evidence, release, package)
    else:
        revoke(platform, release, approver, f"rejected: {reason}", package)
    return Approval(
        approver=approver,
        decision="approve" if given.decision == "approve" else "reject",
        reason=reason,
        package=package,
        requested_by=_requested_by(platform, release),
        started_by=started_by,
        time=datetime.now(UTC),
    )


def judge(platform: Platform, release: str, document: Approval, package: str) -> Judgement:
    """The gate: what `verify` says of a published decision, as of now.

    Args:
        document: the published one.
        package: digest of the package in hand.

    Raises:
        SpecError, TriggerError, EvidenceError: as `verify`.
    """
    judged = judge_claim(document, package)
    measured = {**judged.measured, "signed": [each.approver for each in document.signed]}
    try:
        verified = verify_document(platform, release, document)
    except ApprovalError as error:
        reason = judged.reason if not judged.passed else str(error.found or error.problem)
        return judged.model_copy(
            update={"decision": Decision.FAILED, "measured": measured, "reason": reason}
        )
    words = f"{verified.approver} ({verified.evidence}) approved it: {verified.reason}"
    return judged.model_copy(
        update={"decision": Decision.PASSED, "measured": measured, "reason": words}
    )


def verify_document(platform: Platform, release: str, document: Approval) -> Approval:
    """`verify`, for a decision that `production_approval` has published.

    Raises:
        ApprovalError, SpecError, TriggerError, EvidenceError: as `verify`.
    """
    claim = document if document.evidence == "claimed" else None
    return verify(platform, release, claim, started_by=document.started_by)


def check_still_approved(platform: Platform, release: str) -> Approval:
    """Checks, right before something is loaded or routed, that the approval still counts.

    Returns:
        What lets the release into production now.

    Raises:
        ApprovalError: it was revoked, expired, or counts no more for another reason.
        LifecycleOrderError: there is none.
        SpecError, TriggerError, EvidenceError: as `verify`.
    """
    facts = platform.columns.get(release, ASSET).facts
    try:
        document = Approval.model_validate(facts)
    except ValidationError as error:
        raise ApprovalError(
            f"The approval of {release} cannot be read",
            expected="a document that production_approval published",
            found=error,
            cure=f"materialize production_approval of {release} again",
        ) from error
    return verify_document(platform, release, document)


def newest_decision(evidence: EvidenceLog, release: str) -> RecordedDecision | None:
    """What was recorded last about a release; None for nothing.

    Raises:
        ApprovalError: a record about it cannot be read.
        EvidenceError: it is missing, changed, or not signed by a trusted key.
    """
    entries = evidence.entries(release_chain(release), DECISION, newest_first=True)
    newest = next(entries, None)
    return None if newest is None else read_decision(newest)


def check_not_rejected(evidence: EvidenceLog, release: str, package: str) -> None:
    """Checks that the newest recorded decision about a package is no rejection.

    A run that an earlier approval started may be under way.

    Raises:
        ApprovalError: it is one.
    """
    newest = newest_decision(evidence, release)
    if newest is not None and newest.decision == "reject" and newest.package == package:
        raise ApprovalError(
            f"{newest.approver} rejected {release}: {newest.reason}",
            expected="no recorded rejection after the approval",
            found=f"one of {newest.time:%Y-%m-%d %H:%M:%S} UTC",
            cure=f"llmops approve {release} --approver NAME --reason WHY, if that has changed",
        )


def claim_on_record(platform: Platform, release: str) -> Approval | RecordedDecision:
    """The last claimed decision about a release: recorded, or published by a run.

    Raises:
        ApprovalError: there is none about its package.
        EvidenceError: evidence is missing or does not fit.
    """
    package = platform.columns.get(release, "packaged_model").artifact
    entries = platform.evidence.entries(
        release_chain(release), DECISION, LIFECYCLE_EVENT, newest_first=True
    )
    other: str | None = None
    for entry in entries:
        predicate = entry.statement.predicate
        if entry.statement.predicate_type == DECISION:
            claim = read_decision(entry)
        elif predicate["asset"] == ASSET:
            claim = Approval.model_validate(predicate["document"])
        else:
            continue
        if claim.package == package and claim.evidence == "claimed":
            return claim
        other = other or claim.package
    raise ApprovalError(
        f"Nobody has decided about {release} yet",
        expected=f"a decision about package {package}",
        found="none" if other is None else f"one about package {other}",
        cure=_how_to_decide(release, package),
    )


def judge_claim(approval: Approval, package: str) -> Judgement:
    """Approved, about this package, by somebody other than who asked for the release."""
    objections = [
        objection
        for objection, holds in {
            f"{approval.approver} rejected it: {approval.reason}": approval.decision != "approve",
            f"the decision is about package {approval.package}": approval.package != package,
            f"{approval.approver} asked for the release and cannot approve it": (
                same_person(approval.approver, approval.requested_by)
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


def _signed(
    platform: Platform, release: str, force: PolicyInForce, started_by: str | None
) -> Approval:
    """What enough approvers have signed.

    Raises:
        ApprovalError: too few of what is in the log counts.
    """
    examination = examine(platform, release, force, started_by)
    counted: dict[str, tuple[SignedDecision, Entry]] = {}
    objections: list[str] = []
    nonces: set[str] = set()
    for entry in platform.evidence.entries(release_chain(release), DECISION):
        recorded = read_decision(entry)
        if recorded.decision == "reject":
            continue  # with a revocation behind it, if it counts
        if recorded.envelope is None:
            objections.append(f"{recorded.approver}: it is not signed")
            continue
        try:
            approver, key, signed = _opened(force, recorded.envelope)
        except ApprovalError as error:
            objections.append(f"{recorded.approver}: {error.problem}")
            continue
        objection = examination.objection(signed, approver, key, entry.time)
        if signed.nonce in nonces:
            objection = "it is a replay: its nonce was used before"
        nonces.add(signed.nonce)
        if objection is None and approver.name in counted:
            objection = "counts once, however often they approve"
        if objection is not None:
            objections.append(f"{approver.name}: {objection}")
            continue
        counted[approver.name] = signed, entry
    required = examination.rule.required
    if len(counted) < required:
        said = ", ".join(counted) or "nobody"
        raise ApprovalError(
            f"{release} is not approved for production",
            expected=f"signed approvals by {required} of those whom the policy names",
            found="; ".join([f"{len(counted)} that count, by {said}", *objections]) + force.note,
            cure=f"llmops approve {release} --reason WHY, by somebody who may approve it",
        )
    approvals = [signed for signed, _ in counted.values()]
    return Approval(
        approver=", ".join(counted),
        decision="approve",
        reason="; ".join(dict.fromkeys(signed.reason for signed in approvals)),
        package=examination.package,
        requested_by=_requested_by(platform, release),
        evidence="signed",
        signed=tuple(
            CountedApproval(
                approver=name,
                statement=entry.leaf.statement,
                nonce=signed.nonce,
                expires=signed.expires,
            )
            for name, (signed, entry) in counted.items()
        ),
        approvers_policy=force.digest,
        started_by=started_by,
        # While so many are left that they are enough.
        expires=sorted((s.expires for s in approvals), reverse=True)[required - 1],
        time=max(entry.time for _, entry in counted.values()),
    )


def _claimed(platform: Platform, release: str, claim: Approval | RecordedDecision) -> Approval:
    if isinstance(claim, Approval):
        return claim
    return Approval(
        approver=claim.approver,
        decision=claim.decision,
        reason=claim.reason,
        package=claim.package,
        requested_by=_requested_by(platform, release),
        time=claim.time,
    )


def _opened(
    force: PolicyInForce, envelope: Envelope
) -> tuple[Approver, ApproverKey, SignedDecision]:
    """Whose key made an envelope, and what it says.

    Raises:
        ApprovalError: nobody's, or not as it is.
    """
    if len(envelope.signatures) != 1:
        raise ApprovalError(
            "An approval has several signatures",
            expected="one, of its approver",
            found=len(envelope.signatures),
            cure="let each approver make an approval of their own",
        )
    approver, key = _holder(force, envelope.signatures[0].keyid)
    return approver, key, verified_decision(envelope, key.public_key)


def _holder(force: PolicyInForce, keyid: str) -> tuple[Approver, ApproverKey]:
    found = force.policy.holder(keyid)
    if found is None:
        raise unknown_key(keyid, force)
    return found


def _check_counts(
    examination: Examination, signed: SignedDecision, approver: Approver, key: ApproverKey
) -> None:
    """
    Raises:
        ApprovalError: a signed decision does not count, for itself alone.
    """
    if signed.decision == "approve":
        objection = examination.objection(signed, approver, key, examination.now)
    else:
        objection = _against_rejection(examination, signed, approver, key)
    if objection is not None:
        raise ApprovalError(
            f"The {'approval' if signed.decision == 'approve' else 'rejection'} by "
            f"{approver.name} does not count for {examination.release}",
            expected="a signed decision of somebody who may decide about this release, as it is",
            found=objection + examination.force.note,
            cure=f"llmops approve {examination.release} --reason WHY, by somebody who may",
        )


def _against_rejection(
    examination: Examination, signed: SignedDecision, approver: Approver, key: ApproverKey
) -> str | None:
    """Why a rejection does not count: any approver may reject, and also their own work."""
    if signed.release != examination.release:
        return f"it rejects {signed.release}, not {examination.release}"
    if signed.package != examination.package:
        return f"it is about package {signed.package}, not {examination.package}"
    if signed.approver != approver.name:
        return f"it was signed by {approver.name}, in the name of {signed.approver}"
    if examination.now >= signed.expires:
        return f"it expired at {signed.expires:%F %T} UTC"
    return key.objection(examination.now)


def required_policy(platform: Platform) -> PolicyInForce:
    """The policy in force, for what cannot be done without one.

    Raises:
        ApprovalError: none is set.
        SpecError, TriggerError: it cannot be read.
    """
    force = policy_in_force(platform)
    if force is None:
        raise ApprovalError(
            "Nobody can tell whose key this is: no policy of approvers is set",
            expected="LLMOPS_APPROVERS_REF",
            cure="set it (docs/approvals.md), or decide unsigned with --approver NAME",
        )
    return force


def _requested_by(platform: Platform, release: str) -> str:
    return str(platform.columns.get(release, "model_spec").facts["requested_by"])


def _how_to_decide(release: str, package: str) -> str:
    return (
        f"llmops promote {release} --approver NAME --reason WHY --package-digest {package}; or "
        "fill in production_approval's config in the launchpad of the job promote"
    )


def _unsigned(release: str, approver: str, force: PolicyInForce) -> ApprovalError:
    return ApprovalError(
        f"The decision about {release} is not signed",
        expected="a signature, as there is a policy of approvers",
        found=f"the name {approver}, which somebody typed{force.note}",
        cure=f"llmops approve {release} --reason WHY, with the approver's own key",
    )


def _other_package(release: str, built: str, about: str) -> ApprovalError:
    return ApprovalError(
        f"The decision about {release} is about another package",
        expected=built,
        found=about,
        cure=f"look at the release as it is, then decide: {_how_to_decide(release, built)}",
    )


def _nothing_to_decide(release: str, error: LifecycleOrderError) -> ApprovalError:
    return ApprovalError(
        f"The decision about {release} has nothing to be about",
        found=error,
        cure="decide about a release that is in staging",
    )
