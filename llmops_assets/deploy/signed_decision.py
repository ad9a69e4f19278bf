"""A decision about a release as the approver signs it: an in-toto statement that binds
everything it was decided by."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from llmops_assets.errors import ApprovalError, EvidenceError
from llmops_assets.evidence import attest
from llmops_assets.evidence.attest import PACKAGE
from llmops_assets.evidence.dsse import Envelope, Key, Signer, sign, verified_payload
from llmops_assets.evidence.gates import STAGED
from llmops_assets.evidence.statements import APPROVAL, PAYLOAD_TYPE, Statement
from llmops_assets.evidence.verdicts import judged_by
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.serving.slots import Environment
from llmops_assets.storage.store import DIGEST

Choice = Literal["approve", "reject"]
Digest = Annotated[str, Field(pattern=DIGEST.pattern)]

NONCE_BYTES = 16
CLOCK_SKEW = timedelta(minutes=1)
"""By so much an approver's clock may be ahead of the platform's."""


class LogHead(BaseModel):
    """The evidence log as the approver saw it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=1, description="Number of entries.")
    root: str = Field(description="Root of the Merkle tree over them, in base64.")


class SignedDecision(BaseModel):
    """The predicate that an approver signs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    environment: Environment
    model: str
    release: str
    package: Digest = Field(description="Of the package that was decided about.")
    decision: Choice
    approver: str = Field(min_length=1, description="The name that the policy gives the key.")
    reason: str = Field(min_length=1)
    verdicts: dict[str, Digest] = Field(
        description="Digest of the signed statement of each gate's newest verdict, by gate."
    )
    policy: Digest = Field(description="Of all that these gates judge by.")
    log: LogHead
    nonce: str = Field(pattern=rf"^[0-9a-f]{{{2 * NONCE_BYTES}}}$")
    time: AwareDatetime
    not_before: AwareDatetime
    expires: AwareDatetime


def decision_about(
    platform: Platform,
    release: str,
    package: str,
    *,
    approver: str,
    decision: Choice,
    reason: str,
    valid: timedelta,
) -> SignedDecision:
    """What an approver decides, with everything it is decided by, as of now.

    Args:
        release: its key.
        package: digest of the package in hand.
        valid: for how long it shall count.

    Raises:
        ApprovalError: an approval of a release with a gate that does not let it go on.
    """
    column = platform.column(release)
    standings = platform.standings(release, STAGED, column)
    if decision == "approve" and (closed := [each for each in standings if not each.opens]):
        raise ApprovalError(
            f"{release} cannot be approved yet",
            expected="every gate up to staging passed, or waived",
            found="; ".join(f"{each.gate.name}: {each.reason}" for each in closed),
            cure="; ".join(dict.fromkeys(each.next_action for each in closed)),
        )
    now = datetime.now(UTC)
    checkpoint = platform.evidence.checkpoint()
    return SignedDecision(
        environment=Environment.PRODUCTION,
        model=Release.parse(release).model,
        release=release,
        package=package,
        decision=decision,
        approver=approver,
        reason=reason,
        verdicts={each.gate.name: each.statements[0] for each in standings if each.statements},
        policy=judged_by(STAGED, platform.spec(release), platform.policy),
        log=LogHead(size=checkpoint.size, root=base64.b64encode(checkpoint.root).decode("ascii")),
        nonce=secrets.token_hex(NONCE_BYTES),
        time=now,
        not_before=now - CLOCK_SKEW,
        expires=now + valid,
    )


def sign_decision(decided: SignedDecision, signer: Signer) -> Envelope:
    """The statement in a DSSE envelope.

    Raises:
        ApprovalError: the agent does not sign.
    """
    return sign(attest.approval(decided).payload(), PAYLOAD_TYPE, signer)


def parse_envelope(text: str | bytes) -> Envelope:
    """An envelope as `llmops approve --output` wrote it.

    Raises:
        ApprovalError: it is none.
    """
    try:
        return Envelope.model_validate_json(text)
    except ValidationError as error:
        raise ApprovalError(
            "This is not a signed approval",
            expected="the file that `llmops approve RELEASE --output FILE` wrote, whole",
            found=error,
            cure="paste or commit the file as it is",
        ) from error


def read_signed(envelope: Envelope) -> SignedDecision:
    """What an envelope says, whoever signed it.

    Raises:
        ApprovalError: it is no decision.
    """
    try:
        statement = Statement.parse(base64.b64decode(envelope.payload, validate=True))
    except (ValueError, EvidenceError) as error:
        raise _no_decision(error) from error
    return _decision_in(statement)


def verified_decision(envelope: Envelope, key: Key) -> SignedDecision:
    """What an envelope says that this key, alone, has signed.

    Raises:
        ApprovalError: the signature is not this key's, or it is no decision.
    """
    try:
        payload = verified_payload(envelope, PAYLOAD_TYPE, [key], "the approval")
        return _decision_in(Statement.parse(payload))
    except EvidenceError as error:
        raise ApprovalError(
            "The signature does not fit what is signed: it is forged, or was edited",
            expected=f"a signature by {key.keyid}",
            found=error,
            cure="have it signed again with `llmops approve`",
        ) from error


def changed_log(platform: Platform, head: LogHead) -> str | None:
    """Why the log that an approver saw is not this one; None if it is.

    Raises:
        EvidenceError: the log is not what it was.
    """
    size = platform.evidence.checkpoint().size
    if head.size > size:
        return f"it was signed for an evidence log of {head.size} entries, this one has {size}"
    with platform.evidence.index.reading() as view:
        root = base64.b64encode(view.root(head.size)).decode("ascii")
    return None if root == head.root else "it was signed for another evidence log"


def _decision_in(statement: Statement) -> SignedDecision:
    if statement.predicate_type != APPROVAL:
        raise _no_decision(f"a {statement.predicate_type}")
    try:
        decided = SignedDecision.model_validate(statement.predicate)
    except ValidationError as error:
        raise _no_decision(error) from error
    subjects: Mapping[str, str] = {s.name: s.sha256 for s in statement.subject}
    if subjects != {PACKAGE: decided.package}:
        raise _no_decision(f"a statement about {subjects}")
    return decided


def _no_decision(found: object) -> ApprovalError:
    return ApprovalError(
        "This is not a decision about a release",
        expected=f"a statement of type {APPROVAL} about a {PACKAGE}",
        found=found,
        cure="make it with `llmops approve RELEASE --reason WHY`",
    )
