"""Anchors: heads of the log, put where whoever writes the store cannot take them back.

Whoever has the evidence key can rewrite the log after the newest anchor, and nothing before
it: a log that does not begin with what was anchored is one that was cut or rewritten. An
anchor that was made is a statement on the chain `anchors`; what it is worth, somebody else
says, whom the verifier asks: a git repository that others keep, or a time stamping authority.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pydantic import ValidationError

from llmops_assets.errors import EvidenceError, SpecError
from llmops_assets.evidence import attest, merkle
from llmops_assets.evidence.attest import AnchorKind
from llmops_assets.evidence.checkpoint import read_checkpoint
from llmops_assets.evidence.dsse import Envelope
from llmops_assets.evidence.leaves import ANCHORS, Entry, envelope_digest
from llmops_assets.evidence.log import Attestation, EvidenceLog
from llmops_assets.git import read_git
from llmops_assets.storage.store import canonical_json, check_digest

if TYPE_CHECKING:
    from cryptography.x509 import Certificate
    from rfc3161_client import TimeStampResponse

GIT_REF = "refs/heads/llmops-evidence"
CHECKPOINT_FILE = "checkpoint.json"
"""The file in each commit of the ref; its SHA-256 is the subject of the anchor's statement."""
GIT_TIMEOUT_SECONDS = 120.0
GIT_OPTIONS = (
    "-c", "gc.auto=0", "-c", "maintenance.auto=false", "-c", "core.hooksPath=/dev/null",
    "-c", "protocol.ext.allow=never", "-c", "core.askPass=true",
    "-c", "core.sshCommand=ssh -o BatchMode=yes -o ConnectTimeout=10",
    "-c", "user.name=llmops", "-c", "user.email=llmops@localhost",
)  # fmt: skip
QUERY, REPLY = "application/timestamp-query", "application/timestamp-reply"


@dataclass(frozen=True)
class HeldCheckpoint:
    """A checkpoint as a commit of a git ref has it."""

    commit: str
    envelope: Envelope


def anchor_in_git(evidence: EvidenceLog, repository: str, ref: str = GIT_REF) -> Entry:
    """Commits the newest signed checkpoint to a ref of a git repository, without force.

    May be repeated: a checkpoint that was pushed and never attested is attested now, and one
    after which nothing but its own anchor was appended is not pushed again.

    Args:
        evidence: the log.
        repository: path or URL, as git takes it. Whoever operates the platform should not be
            able to change the ref in another way than by adding to it.
        ref: full name of the ref.

    Returns:
        The entry of the statement about it.

    Raises:
        EvidenceError: the ref holds a checkpoint that the log does not begin with, which means
            that the log was cut or rewritten; or git does not take the commit.
    """
    place = f"{repository} {ref}"
    with _git(repository) as folder:
        held = _held(folder, repository, ref)
        if held:
            _check_prefix(evidence, held[0], place)
            known = _anchor_of(evidence, held[0].envelope)
            if known is None:
                size = read_checkpoint(held[0].envelope, evidence.keys(), place).size
                return _attest(evidence, "git-ref", place, None, held[0].envelope, size)
            if known.sequence + 1 == evidence.checkpoint().size:
                return known
        envelope, size = _newest(evidence)
        _push(folder, repository, ref, envelope, held[0].commit if held else None)
    return _attest(evidence, "git-ref", place, None, envelope, size)


def anchor_with_time_stamp(evidence: EvidenceLog, url: str, *, timeout_seconds: float) -> Entry:
    """Has a time stamping authority (RFC 3161) stamp the newest signed checkpoint.

    Args:
        evidence: the log.
        url: of the authority; http or https.
        timeout_seconds: limit of the call.

    Returns:
        The entry of the statement about it, which holds the authority's reply.

    Raises:
        EvidenceError: the authority does not answer, refuses, or stamps something else.
    """
    import httpx
    from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

    _check_address(url)
    envelope, size = _newest(evidence)
    request = (
        TimestampRequestBuilder()
        .data(_content(envelope))
        .hash_algorithm(HashAlgorithm.SHA256)
        .cert_request(cert_request=True)
        .build()
    )
    try:
        reply = httpx.post(
            url,
            content=request.as_bytes(),
            headers={"Content-Type": QUERY, "Accept": REPLY},
            timeout=timeout_seconds,
        )
        reply.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _not_stamped(url, error) from error
    stamp = _read_stamp(reply.content, url)
    # Whether the authority is to be trusted is for the verifier to say.
    _check_imprint(stamp, envelope, url)
    if stamp.tst_info.nonce != request.nonce:
        raise _not_stamped(url, "a reply to another request")
    proof = base64.b64encode(reply.content).decode("ascii")
    return _attest(evidence, "time-stamp", url, proof, envelope, size)


def held_in_git(repository: str, ref: str = GIT_REF) -> tuple[HeldCheckpoint, ...]:
    """All checkpoints that a ref of a git repository holds, newest first.

    Raises:
        EvidenceError: git does not answer, or the ref holds something else.
    """
    with _git(repository) as folder:
        return _held(folder, repository, ref)


def read_certificates(content: bytes, what: str) -> tuple[Certificate, ...]:
    """Certificates of time stamping authorities, from a PEM file.

    Raises:
        EvidenceError: there is none in it.
    """
    from cryptography.x509 import load_pem_x509_certificates

    try:
        return tuple(load_pem_x509_certificates(content))
    except ValueError as error:
        raise EvidenceError(
            f"{what} holds no certificates",
            expected="the authority's certificate and those above it, in PEM",
            found=error,
            cure="take them from where the authority publishes them",
        ) from error


def check_time_stamp(
    proof: str, envelope: Envelope, certificates: Sequence[Certificate], what: str
) -> datetime:
    """Checks a reply of a time stamping authority, offline.

    Args:
        proof: the reply as the anchor's statement has it.
        envelope: the checkpoint that it must be about.
        certificates: those that the verifier trusts: roots, and what is between.
        what: names the anchor in messages.

    Returns:
        When the authority saw the checkpoint.

    Raises:
        EvidenceError: none of the authorities stamped this checkpoint.
    """
    from rfc3161_client import VerificationError, VerifierBuilder

    stamp = _read_stamp(base64.b64decode(proof), what)
    _check_imprint(stamp, envelope, what)
    try:
        verifier = VerifierBuilder(roots=list(certificates)).build()
        verifier.verify_message(stamp, _content(envelope))
    except (VerificationError, ValueError) as error:
        raise EvidenceError(
            f"{what} is by no authority that the verifier trusts",
            expected="a signature that leads to one of the given certificates",
            found=error,
            cure="check that the certificates are the authority's; if they are, treat the "
            "anchor as forged",
        ) from error
    return stamp.tst_info.gen_time


def _newest(evidence: EvidenceLog) -> tuple[Envelope, int]:
    size = evidence.checkpoint().size
    return evidence.entry(size - 1).record.checkpoint, size


def _attest(
    evidence: EvidenceLog,
    kind: AnchorKind,
    place: str,
    proof: str | None,
    envelope: Envelope,
    size: int,
) -> Entry:
    statement = attest.anchor(
        kind=kind,
        place=place,
        proof=proof,
        checkpoint=envelope_digest(envelope),
        size=size,
        time=datetime.now(UTC),
    )
    (entry,) = evidence.append(Attestation(statement, (ANCHORS,)))
    return entry


def _anchor_of(evidence: EvidenceLog, envelope: Envelope) -> Entry | None:
    digest = envelope_digest(envelope)
    anchors = evidence.entries(ANCHORS, newest_first=True)
    return next((e for e in anchors if e.statement.subject[0].sha256 == digest), None)


def _check_prefix(evidence: EvidenceLog, held: HeldCheckpoint, place: str) -> None:
    """Checks that the log begins with what was anchored."""
    what = f"The checkpoint in commit {held.commit} of {place}"
    old = read_checkpoint(held.envelope, evidence.keys(), what)
    new = evidence.checkpoint()
    try:
        proof = evidence.consistency_proof(old.size, new.size)
        merkle.check_consistency(old.size, new.size, old.root, new.root, proof)
    except EvidenceError as error:
        raise EvidenceError(
            f"The evidence log is not the one that was anchored in {place}",
            expected=f"a log that begins with the {old.size} entries of commit {held.commit}",
            found=error,
            cure="the log was cut or rewritten: stop deploying, keep store and repository as "
            "they are, and restore the log from a backup",
        ) from error


def _check_address(address: str) -> None:
    """Checks that git takes an address for one, and that it may go into a signed statement."""
    try:
        secret = urlsplit(address).password is not None
    except ValueError:
        secret = True
    if secret or not address or address.startswith("-"):
        raise EvidenceError(
            "This cannot be the address of an anchor",
            expected="a path or a URL, without a password",
            found="one with a password, not shown" if secret else repr(address),
            cure="pass the repository as `git clone` takes it; passwords belong into git's "
            "credential helpers",
        )


@contextmanager
def _git(repository: str) -> Iterator[Path]:
    """An empty repository to fetch into, so that the other one is only ever added to."""
    _check_address(repository)
    with tempfile.TemporaryDirectory(prefix="llmops-anchor-") as folder:
        _call(Path(folder), repository, "init", "--quiet", "--bare", "--template=", ".")
        yield Path(folder)


def _call(folder: Path, repository: str, *arguments: str, given: bytes = b"") -> bytes:
    try:
        output = read_git(
            folder, *GIT_OPTIONS, *arguments, given=given, timeout_seconds=GIT_TIMEOUT_SECONDS
        )
    except SpecError as error:
        raise _git_refuses(repository, error.found) from error
    if output is None:
        raise _git_refuses(repository, "no repository with such a ref")
    return output


def _held(folder: Path, repository: str, ref: str) -> tuple[HeldCheckpoint, ...]:
    address = _address(repository)
    if not _call(folder, repository, "ls-remote", address, ref).strip():
        return ()
    _call(folder, repository, "fetch", "--quiet", "--no-tags", address, f"+{ref}:{GIT_REF}")
    commits = _call(folder, repository, "rev-list", GIT_REF).decode("ascii").split()
    return tuple(
        HeldCheckpoint(commit, _in_commit(folder, repository, commit)) for commit in commits
    )


def _in_commit(folder: Path, repository: str, commit: str) -> Envelope:
    content = _call(folder, repository, "cat-file", "blob", f"{commit}:{CHECKPOINT_FILE}")
    try:
        return Envelope.model_validate_json(content)
    except ValidationError as error:
        raise EvidenceError(
            f"Commit {commit} of {repository} holds no checkpoint",
            expected=f"{CHECKPOINT_FILE} as `llmops anchor --git` writes it",
            found=error,
            cure="name another ref with --ref: this one has another use, or was tampered with",
        ) from error


def _push(folder: Path, repository: str, ref: str, envelope: Envelope, parent: str | None) -> None:
    def call(*arguments: str, given: bytes = b"") -> str:
        return _call(folder, repository, *arguments, given=given).decode("ascii").strip()

    blob = call("hash-object", "-w", "--stdin", given=_content(envelope))
    entry = f"100644 blob {blob}\t{CHECKPOINT_FILE}\n"
    tree = call("mktree", given=entry.encode())
    parents = () if parent is None else ("-p", parent)
    message = f"Evidence log\n\nCheckpoint {envelope_digest(envelope)}\n"
    commit = call("commit-tree", *parents, tree, given=message.encode())
    # Never by force: whoever was faster has a newer checkpoint there.
    call("push", "--quiet", _address(repository), f"{commit}:{ref}")


def _address(repository: str) -> str:
    """As git takes it from another folder."""
    path = Path(repository).expanduser()
    return str(path.resolve()) if path.exists() else repository


def _content(envelope: Envelope) -> bytes:
    return canonical_json(envelope.model_dump(mode="json"))


def _read_stamp(reply: bytes, what: str) -> TimeStampResponse:
    from rfc3161_client import decode_timestamp_response

    try:
        stamp = decode_timestamp_response(reply)
        _ = stamp.tst_info  # which a refusal does not have
    except ValueError as error:
        raise _not_stamped(what, error) from error
    return stamp


def _check_imprint(stamp: TimeStampResponse, envelope: Envelope, what: str) -> None:
    expected = check_digest(envelope_digest(envelope))
    if (found := stamp.tst_info.message_imprint.message.hex()) != expected:
        raise _not_stamped(what, f"a time stamp over {found}, not {expected}")


def _not_stamped(what: str, found: object) -> EvidenceError:
    return EvidenceError(
        f"There is no time stamp from {what}",
        expected="a reply by RFC 3161 over the checkpoint's SHA-256",
        found=found,
        cure="check the address and that the authority answers, then try again",
    )


def _git_refuses(repository: str, found: object) -> EvidenceError:
    return EvidenceError(
        f"git does not do what was asked in {repository}",
        found=found,
        cure="check that the repository is there, and that git answers without asking for a "
        "password; if somebody else pushed meanwhile, try again",
    )
