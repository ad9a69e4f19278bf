"""What a verifier has of the log from elsewhere, held against the heads that a bundle proves.

A bundle shows that the log only grew from every head that was put elsewhere. That means
something as soon as somebody other than the platform says that the head was really there.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import AwareDatetime, BaseModel, Field

from llmops_assets.errors import ApprovalError, EvidenceError
from llmops_assets.evidence import merkle
from llmops_assets.evidence.anchors import HeldCheckpoint, check_time_stamp
from llmops_assets.evidence.approver_keys import read_public_key
from llmops_assets.evidence.bundle import AnchoredHead, hashes
from llmops_assets.evidence.checkpoint import Checkpoint, read_checkpoint
from llmops_assets.evidence.dsse import Envelope, Key, verified_payload
from llmops_assets.evidence.keys import TrustRoot
from llmops_assets.evidence.leaves import Entry, envelope_digest
from llmops_assets.evidence.statements import ANCHOR, DECISION, PAYLOAD_TYPE, Statement

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

APPROVER = "approver"
"""Kind of a head that an approver saw and signed with the decision."""
SIGNED = "envelope"
"""Field of a decision: what the approver signed; null for a decision that is claimed."""
_TAMPERED = "do not rely on this evidence; ask for it again, and treat it as tampered with"


@dataclass(frozen=True)
class GitWitness:
    """What a ref of a git repository holds."""

    place: str
    held: tuple[HeldCheckpoint, ...]
    """Newest first."""


@dataclass(frozen=True)
class Witnesses:
    """What a verifier has from elsewhere."""

    certificates: tuple[Certificate, ...] = ()
    """Of time stamping authorities."""
    git: tuple[GitWitness, ...] = ()
    approvers: tuple[Key, ...] = ()


class _LogHead(BaseModel):
    """The log as an approver saw it."""

    size: int = Field(ge=0)
    root: str = Field(description="32 bytes in base64.")


class _SignedDecision(BaseModel):
    """The fields of what an approver signs that count here."""

    approver: str
    log: _LogHead
    time: AwareDatetime


class _Anchor(BaseModel):
    """The fields of an anchor's statement that count here."""

    kind: str
    place: str
    proof: str | None
    size: int


@dataclass(frozen=True)
class Head:
    """A head of the log that was put elsewhere, proven to be one of this log."""

    kind: str
    place: str
    """Where, or who."""
    seen: Checkpoint
    envelope: Envelope
    """The checkpoint that was put elsewhere, or what the approver signed."""
    proof: str | None = None


@dataclass(frozen=True)
class Testimony:
    """What became of asking a witness."""

    kind: str
    holds: bool | None
    """None: the verifier brought nothing to ask."""
    detail: str
    size: int = 0
    """Number of log entries that it vouches for."""


def names_head(entry: Entry) -> bool:
    """Whether a statement names a head of the log that was put elsewhere."""
    kind = entry.statement.predicate_type
    return kind == ANCHOR or (
        kind == DECISION and entry.statement.predicate.get(SIGNED) is not None
    )


def seen_head(entry: Entry) -> Head:
    """The head of the log that an approver signed with a decision, not proven yet.

    Raises:
        EvidenceError: what was signed has none.
    """
    try:
        envelope = Envelope.model_validate(entry.statement.predicate[SIGNED])
        statement = Statement.parse(base64.b64decode(envelope.payload, validate=True))
        signed = _SignedDecision.model_validate(statement.predicate)
        seen = Checkpoint(
            signed.log.size, base64.b64decode(signed.log.root, validate=True), signed.time
        )
    except ValueError as error:  # of pydantic and base64 as well
        raise EvidenceError(
            f"The decision in entry {entry.sequence} names no head of the log",
            expected="a signed decision with size and root of the log",
            found=error,
            cure="verify with the version of the platform that wrote it",
        ) from error
    return Head(APPROVER, signed.approver, seen, envelope)


def anchored_heads(
    entries: Sequence[Entry],
    anchored: Sequence[AnchoredHead],
    checkpoint: Checkpoint,
    root: TrustRoot,
) -> tuple[Head, ...]:
    """The heads that statements name, each proven to be one that the log grew from.

    Args:
        entries: all of a bundle, verified.
        anchored: what the bundle has of each, in the same order.
        checkpoint: the head that everything is proven against.
        root: whose keys sign checkpoints.

    Raises:
        EvidenceError: one is missing or left over, is another than its statement names, or
            is not of this log.
    """
    naming = [entry for entry in entries if names_head(entry)]
    if len(naming) != len(anchored):
        raise EvidenceError(
            "The heads of the log that were put elsewhere are not all there",
            expected=f"{len(naming)}, one for each statement that names one",
            found=len(anchored),
            cure=_TAMPERED,
        )
    return tuple(
        _proven(entry, line, checkpoint, root) for entry, line in zip(naming, anchored, strict=True)
    )


def read_approvers(content: bytes, what: str) -> tuple[Key, ...]:
    """Keys of approvers, from a file with one OpenSSH public key a line.

    Raises:
        EvidenceError: a line is none.
    """
    lines = content.decode("utf-8", "replace").splitlines()
    try:
        return tuple(
            read_public_key(line) for line in lines if line.strip() and not line.startswith("#")
        )
    except ApprovalError as error:
        raise EvidenceError(
            f"{what} holds something else than keys of approvers",
            expected="lines such as `ssh-ed25519 AAAA... ada@example.org`",
            found=error,
            cure="take them from the approvers, not from the platform",
        ) from error


def ask(
    heads: Sequence[Head],
    checkpoint: Checkpoint,
    witnesses: Witnesses,
    root: TrustRoot,
    *,
    newest: bool,
) -> Iterator[Testimony]:
    """What the witnesses say of the heads; of each kind the newest that is vouched for.

    Args:
        heads: those that the evidence proves, oldest first.
        checkpoint: the head that they are proven against.
        witnesses: what the verifier has from elsewhere.
        root: whose keys sign checkpoints.
        newest: whether that head is the log's own, so that nobody can have a later one.
    """
    stamps = [head for head in heads if head.proof is not None]
    if stamps:
        yield _stamped(stamps, witnesses.certificates)
    decided = [head for head in heads if head.kind == APPROVER]
    if decided:
        yield _decided(decided, witnesses.approvers)
    for repository in witnesses.git:
        yield _held(repository, heads, checkpoint, root, newest)
    places = {head.place for head in heads if head.kind == "git-ref"}
    if places and not witnesses.git:
        yield Testimony(
            "git-ref", None, f"in {', '.join(sorted(places))}; pass --anchor-git to look there"
        )


def _proven(entry: Entry, line: AnchoredHead, checkpoint: Checkpoint, root: TrustRoot) -> Head:
    if entry.statement.predicate_type == DECISION:
        if line.checkpoint is not None:
            raise _other_head(entry, "a checkpoint where the decision itself has the head")
        head = seen_head(entry)
    else:
        head = _put_elsewhere(entry, line, root)
    merkle.check_consistency(
        head.seen.size, checkpoint.size, head.seen.root, checkpoint.root, hashes(line.consistency)
    )
    return head


def _put_elsewhere(entry: Entry, line: AnchoredHead, root: TrustRoot) -> Head:
    if line.checkpoint is None:
        raise _other_head(entry, "no checkpoint")
    try:
        anchor = _Anchor.model_validate(entry.statement.predicate)
    except ValueError as error:
        raise _other_head(entry, error) from error
    if entry.statement.subject[0].sha256 != envelope_digest(line.checkpoint):
        raise _other_head(entry, "another checkpoint than its statement names")
    what = f"The checkpoint that entry {entry.sequence} names"
    seen = read_checkpoint(line.checkpoint, root.evidence_keys(), what)
    if seen.size != anchor.size:
        raise _other_head(entry, f"a checkpoint of {seen.size} entries, not {anchor.size}")
    return Head(anchor.kind, anchor.place, seen, line.checkpoint, anchor.proof)


def _other_head(entry: Entry, found: object) -> EvidenceError:
    return EvidenceError(
        f"The head of the log that entry {entry.sequence} names is not there",
        expected="what its statement says",
        found=found,
        cure=_TAMPERED,
    )


def _stamped(heads: Sequence[Head], certificates: Sequence[Certificate]) -> Testimony:
    newest = heads[-1]
    if not certificates:
        return Testimony(
            "time-stamp",
            None,
            f"{len(heads)} by {newest.place}; pass --timestamp-certificates to check them",
        )
    assert newest.proof is not None  # `ask` takes no others
    try:
        time = check_time_stamp(
            newest.proof, newest.envelope, certificates, f"The time stamp by {newest.place}"
        )
    except EvidenceError as error:
        return Testimony("time-stamp", False, str(error))
    return Testimony(
        "time-stamp",
        True,
        f"{newest.place} saw the log's first {newest.seen.size} entries at {time:%F %T %Z}",
        newest.seen.size,
    )


def _decided(heads: Sequence[Head], approvers: Sequence[Key]) -> Testimony:
    known = {key.keyid: key for key in approvers}
    vouched: Head | None = None
    try:
        for head in heads:
            for signature in head.envelope.signatures:
                if (key := known.get(signature.keyid)) is not None:
                    what = f"The decision of {head.place} at {head.seen.time:%F %T %Z}"
                    verified_payload(head.envelope, PAYLOAD_TYPE, [key], what)
                    vouched = head
    except EvidenceError as error:
        return Testimony(APPROVER, False, str(error))
    if vouched is None:
        return Testimony(
            APPROVER, None, f"{len(heads)} signed decisions; pass --approvers to check their keys"
        )
    return Testimony(
        APPROVER,
        True,
        f"{vouched.place} signed the log's first {vouched.seen.size} entries at "
        f"{vouched.seen.time:%F %T %Z}",
        vouched.seen.size,
    )


def _held(
    repository: GitWitness,
    heads: Sequence[Head],
    checkpoint: Checkpoint,
    root: TrustRoot,
    newest: bool,
) -> Testimony:
    proven = {envelope_digest(head.envelope): head for head in heads}
    vouched: Head | None = None
    try:
        for held in repository.held:
            what = f"The checkpoint in commit {held.commit} of {repository.place}"
            size = read_checkpoint(held.envelope, root.evidence_keys(), what).size
            head = proven.get(envelope_digest(held.envelope))
            vouched = vouched or head
            # A bundle says nothing of what came after it.
            if head is None and (newest or size <= checkpoint.size):
                raise EvidenceError(
                    f"{what} is not of this log",
                    expected=f"a log that grew from these {size} entries",
                    found=f"one of {checkpoint.size} entries, and no proof of that",
                    cure="run `llmops anchor` with this repository, and export again; if it "
                    "refuses, the log was cut or rewritten",
                )
    except EvidenceError as error:
        return Testimony("git-ref", False, str(error))
    if vouched is None:
        return Testimony("git-ref", None, f"{repository.place} holds nothing of this log yet")
    return Testimony(
        "git-ref",
        True,
        f"{repository.place} holds the log's first {vouched.seen.size} entries of "
        f"{vouched.seen.time:%F %T %Z}",
        vouched.seen.size,
    )
