"""Revocations: approvals of a release that were made before count no more."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import AwareDatetime, BaseModel, ConfigDict

from llmops_assets.errors import ApprovalError
from llmops_assets.evidence import attest
from llmops_assets.evidence.leaves import Entry, release_chain
from llmops_assets.evidence.log import Attestation, EvidenceLog
from llmops_assets.evidence.statements import (
    DECISION,
    LIFECYCLE_EVENT,
    REVOCATION,
    ROUTE_CHANGE,
)
from llmops_assets.platform import Platform

DEPLOYMENT = "production_deployment"
"""The asset that records that a release serves."""


class Revocation(BaseModel):
    """All earlier approvals of a release count no more; the predicate of a statement."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    release: str
    package: str
    """Digest of the package that they were about."""
    actor: str
    """Who rejected the release or took it off."""
    reason: str
    time: AwareDatetime


@dataclass(frozen=True)
class Revoked:
    """The last revocation of a release."""

    sequence: int
    """Its place in the log."""
    words: str
    time: datetime


def revoke(
    platform: Platform, release: str, actor: str, reason: str, package: str | None = None
) -> Entry:
    """Makes all approvals of a release void that were made so far.

    For who takes a release off: to be called before its traffic goes, so that nothing can
    bring it back that was decided before.

    Args:
        release: its key.
        actor: who takes it off.
        reason: why.
        package: digest of its package, for who has it from the route: a damaged store then
            keeps nobody from taking it off. None: the one that it published.

    Raises:
        LifecycleOrderError: the release has no package.
        EvidenceError: the statement cannot be signed.
    """
    (entry,) = platform.evidence.append(revocation_of(platform, release, actor, reason, package))
    return entry


def revoke_unless_revoked(
    platform: Platform, release: str, actor: str, reason: str, package: str
) -> None:
    """As `revoke`, for who may have to try again: not while the last revocation stands alone.

    It does until the release is decided about, comes a step further or is on a changed route.

    Raises:
        EvidenceError: the statement cannot be signed.
    """
    kinds = (REVOCATION, DECISION, LIFECYCLE_EVENT, ROUTE_CHANGE)
    entries = platform.evidence.entries(release_chain(release), *kinds, newest_first=True)
    newest = next(entries, None)
    if newest is None or newest.statement.predicate_type != REVOCATION:
        revoke(platform, release, actor, reason, package)


def revocation_of(
    platform: Platform, release: str, actor: str, reason: str, package: str | None = None
) -> Attestation:
    """The statement that `revoke` appends, for who appends another one with it.

    Raises:
        LifecycleOrderError: the release has no package.
    """
    revoked = Revocation(
        release=release,
        package=package or platform.columns.get(release, "packaged_model").artifact,
        actor=actor,
        reason=reason,
        time=datetime.now(UTC),
    )
    return Attestation(attest.revocation(revoked), (release_chain(release),))


def last_revocation(evidence: EvidenceLog, release: str) -> Revoked | None:
    """The last revocation of a release; None where there was none.

    Raises:
        EvidenceError: it is missing, changed, or not signed by a trusted key.
    """
    entries = evidence.entries(release_chain(release), REVOCATION, newest_first=True)
    newest = next(entries, None)
    if newest is None:
        return None
    said = Revocation.model_validate(newest.statement.predicate)
    words = f"{said.actor} revoked it at {said.time:%F %T} UTC: {said.reason}"
    return Revoked(newest.sequence, words, newest.time)


def check_not_revoked(evidence: EvidenceLog, release: str) -> None:
    """Checks that a release that served may do so again: it was not revoked since.

    Raises:
        ApprovalError: it was, and was not deployed anew.
        EvidenceError: evidence is missing or does not fit.
    """
    revoked = last_revocation(evidence, release)
    if revoked is None:
        return
    events = evidence.entries(release_chain(release), LIFECYCLE_EVENT, newest_first=True)
    deployed = next((e for e in events if e.statement.predicate["asset"] == DEPLOYMENT), None)
    if deployed is None or deployed.sequence < revoked.sequence:
        raise ApprovalError(
            f"{release} may not serve again",
            expected="a release that nobody revoked since it was deployed",
            found=revoked.words,
            cure=f"approve it anew, then `llmops promote {release}`; or choose another one",
        )
