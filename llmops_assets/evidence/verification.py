"""Verification of evidence: whether it is whole, genuine, and says that the rules were kept.

It needs the bundle and the fingerprint of the trust root, which the verifier must have from
elsewhere: a bundle that brought its own trust would vouch for itself. It reads no settings
and no store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmops_assets.errors import EvidenceError, LLMOpsError
from llmops_assets.evidence import merkle
from llmops_assets.evidence.admissions import admissions
from llmops_assets.evidence.bundle import Bundle, ProvenLeaf, hashes, read_bundle, unpack
from llmops_assets.evidence.checkpoint import Checkpoint, read_checkpoint
from llmops_assets.evidence.documents import check_documents
from llmops_assets.evidence.dsse import Envelope, Key, verified_payload
from llmops_assets.evidence.keys import TRUST_ROOT, TrustRoot
from llmops_assets.evidence.leaves import (
    ANCHORS,
    Entry,
    Link,
    LogRecord,
    envelope_digest,
    release_chain,
)
from llmops_assets.evidence.statements import AUDIT_EXPORT, PAYLOAD_TYPE, Statement
from llmops_assets.evidence.witnesses import Head, Testimony, Witnesses, anchored_heads, ask
from llmops_assets.storage.store import digest_of

RELEASES = release_chain("")
_TAMPERED = "do not rely on this evidence; ask for it again, and treat it as tampered with"

Value = TypeVar("Value")


class Check(BaseModel):
    """One thing that was checked."""

    model_config = ConfigDict(frozen=True)

    name: str
    holds: bool | None = Field(description="None: it could not be checked.")
    detail: str


class Verification(BaseModel):
    """What became of a verification."""

    model_config = ConfigDict(frozen=True)

    releases: tuple[str, ...]
    trust_root: str = Field(description="Fingerprint of the trusted keys.")
    checks: tuple[Check, ...]
    complete_up_to: str | None = Field(
        description="What vouches that nothing is missing; None where the evidence does not hold."
    )

    @property
    def holds(self) -> bool:
        """Whether everything that could be checked holds."""
        return all(check.holds is not False for check in self.checks)


class ChainEnd(BaseModel):
    """A chain up to an export."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    entries: int = Field(ge=0)
    head: str | None


class Export(BaseModel):
    """Predicate of an export's statement, see docs/predicates.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chains: dict[str, ChainEnd]
    actor: str
    time: datetime


class _Checks:
    """What was checked so far."""

    def __init__(self) -> None:
        self.done: list[Check] = []

    def add(self, name: str, check: Callable[[], tuple[Value, str]]) -> Value | None:
        """Checks something; what is wrong becomes part of the result, and gives None."""
        try:
            value, detail = check()
        except LLMOpsError as error:
            self.done.append(Check(name=name, holds=False, detail=str(error)))
            return None
        self.done.append(Check(name=name, holds=True, detail=detail))
        return value

    def result(self, releases: Sequence[str], fingerprint: str, ends: str | None) -> Verification:
        return Verification(
            releases=tuple(releases),
            trust_root=fingerprint,
            checks=tuple(self.done),
            complete_up_to=ends,
        )


def verify_bundle(
    content: bytes,
    fingerprint: str,
    witnesses: Witnesses | None = None,
    *,
    require_anchor: bool = False,
) -> Verification:
    """Checks a bundle.

    Args:
        content: its bytes.
        fingerprint: of the trust root that the verifier trusts, `sha256:<hex>`.
        witnesses: what the verifier has of the log from elsewhere.
        require_anchor: whether it fails when none of them vouches for the log.
    """
    checks = _Checks()
    bundle = checks.add("archive", lambda: _read(content))
    if bundle is None or checks.add("trust root", lambda: _trusted(bundle, fingerprint)) is None:
        return checks.result((), fingerprint, None)
    return _verify(checks, bundle, witnesses or Witnesses(), require_anchor, taken=None)


def verify_taken(
    bundle: Bundle,
    release: str,
    witnesses: Witnesses | None = None,
    *,
    require_anchor: bool = False,
) -> Verification:
    """As `verify_bundle`, for evidence taken from the log itself, which no export closed.

    Args:
        bundle: its trust root is trusted, and that nothing is missing at its end.
        release: whose evidence it is.
        witnesses: what the verifier has of the log from elsewhere.
        require_anchor: whether it fails when none of them vouches for the log.
    """
    witnesses = witnesses or Witnesses()
    return _verify(_Checks(), bundle, witnesses, require_anchor, taken=release)


def _read(content: bytes) -> tuple[Bundle, str]:
    files = unpack(content)
    return read_bundle(files), f"{len(files)} files, {len(content)} bytes, in canonical form"


def _trusted(bundle: Bundle, fingerprint: str) -> tuple[TrustRoot, str]:
    found = bundle.trust_root.fingerprint
    if found != fingerprint:
        raise EvidenceError(
            "The bundle was signed under another trust root",
            expected=fingerprint,
            found=found,
            cure="ask the platform's operator for the fingerprint, by another way than the "
            "bundle came; until then rely on nothing in it",
        )
    return bundle.trust_root, fingerprint


def _verify(
    checks: _Checks,
    bundle: Bundle,
    witnesses: Witnesses,
    require_anchor: bool,
    *,
    taken: str | None,
) -> Verification:
    """
    Args:
        taken: the release, of evidence that no export closed.
    """
    root = bundle.trust_root
    stopped = checks.result
    sealed = checks.add("checkpoint", lambda: _checkpoint(bundle))
    if sealed is None:
        return stopped((), root.fingerprint, None)
    entries = checks.add("statements", lambda: _proven(bundle, sealed))
    if entries is None:
        # The rest would speak of statements that nobody made.
        return stopped((), root.fingerprint, None)
    releases = _closed_releases(entries) if taken is None else (taken,)
    if checks.add("chains", lambda: _chains(entries, releases)) is None:
        return stopped((), root.fingerprint, None)
    if taken is None and checks.add("export", lambda: _closed(bundle, entries, sealed)) is None:
        return stopped((), root.fingerprint, None)
    heads = checks.add("anchors", lambda: _heads(bundle, entries, sealed))
    if heads is None:
        return stopped((), root.fingerprint, None)
    for release in releases:
        chain = _of_chain(entries, release_chain(release))
        checks.add(
            f"documents of {release}",
            lambda release=release, chain=chain: check_documents(
                bundle.documents, release, chain, root
            ),
        )
        checks.done += _admissions(release, chain)
    testimonies = list(ask(heads, sealed, witnesses, root, newest=taken is not None))
    checks.done += [
        Check(name=f"anchor: {said.kind}", holds=said.holds, detail=said.detail)
        for said in testimonies
    ]
    vouching = [said for said in testimonies if said.holds]
    best = max(vouching, key=lambda said: said.size, default=None)
    if require_anchor and best is None:
        checks.done.append(
            Check(
                name="anchor",
                holds=False,
                detail="nothing outside of the platform vouches for the log, and that was asked "
                "for; pass --anchor-git, --timestamp-certificates or --approvers",
            )
        )
    end = f"{'its export' if taken is None else 'the head of the log'} at {_shown(sealed.time)}"
    return checks.result(releases, root.fingerprint, _complete(best, entries, end))


def _checkpoint(bundle: Bundle) -> tuple[Checkpoint, str]:
    keys = bundle.trust_root.evidence_keys()
    sealed = read_checkpoint(bundle.checkpoint, keys, "The bundle's checkpoint")
    return sealed, f"a log of {sealed.size} entries, signed at {_shown(sealed.time)}"


def _proven(bundle: Bundle, sealed: Checkpoint) -> tuple[tuple[Entry, ...], str]:
    """The statements: each in the log at its place, and signed by a trusted key."""
    if len(bundle.attestations) != len(bundle.leaves) or not bundle.leaves:
        raise EvidenceError(
            "Statements and leaves do not belong together",
            expected="one leaf for each statement",
            found=f"{len(bundle.leaves)} leaves, {len(bundle.attestations)} statements",
            cure=_TAMPERED,
        )
    lines = list(zip(bundle.attestations, bundle.leaves, strict=True))
    last = -1
    # Hashes first: they are faster by far, and tell of almost everything.
    for envelope, line in lines:
        _check_leaf(envelope, line, last, sealed)
        last = line.leaf.sequence
    keys = bundle.trust_root.evidence_keys()
    entries = tuple(_entry(envelope, line, keys) for envelope, line in lines)
    for _, line in lines:
        _check_seal(line, sealed, keys)
    return entries, f"{len(entries)}, each signed by a trusted key and at its place in the log"


def _check_leaf(envelope: Envelope, line: ProvenLeaf, last: int, sealed: Checkpoint) -> None:
    leaf = line.leaf
    if leaf.sequence <= last:
        raise EvidenceError(
            "Leaves are not in the order of the log",
            expected=f"one after entry {last}",
            found=f"entry {leaf.sequence}",
            cure=_TAMPERED,
        )
    if (found := envelope_digest(envelope)) != leaf.statement:
        raise EvidenceError(
            f"The statement of entry {leaf.sequence} is not the one that the log has",
            expected=leaf.statement,
            found=found,
            cure=_TAMPERED,
        )
    merkle.check_inclusion(
        merkle.leaf_hash(leaf.content), leaf.sequence, sealed.size, hashes(line.inclusion),
        sealed.root,
    )  # fmt: skip


def _entry(envelope: Envelope, line: ProvenLeaf, keys: Sequence[Key]) -> Entry:
    what = f"The statement of entry {line.leaf.sequence}"
    statement = Statement.parse(verified_payload(envelope, PAYLOAD_TYPE, keys, what))
    if statement.predicate_type != line.leaf.predicate_type:
        raise EvidenceError(
            f"{what} is of another type than its leaf says",
            expected=line.leaf.predicate_type,
            found=statement.predicate_type,
            cure=_TAMPERED,
        )
    record = LogRecord(leaf=line.leaf, envelope=envelope, checkpoint=line.checkpoint)
    return Entry(record=record, statement=statement)


def _check_seal(line: ProvenLeaf, sealed: Checkpoint, keys: Sequence[Key]) -> None:
    what = f"The checkpoint of entry {line.leaf.sequence}"
    own = read_checkpoint(line.checkpoint, keys, what)
    if (own.size, own.time) != (line.leaf.sequence + 1, line.leaf.time):
        raise EvidenceError(
            f"{what} is that of another entry",
            expected=f"size {line.leaf.sequence + 1}, time {line.leaf.time}",
            found=f"size {own.size}, time {own.time}",
            cure=_TAMPERED,
        )
    merkle.check_consistency(own.size, sealed.size, own.root, sealed.root, hashes(line.consistency))


def _chains(entries: Sequence[Entry], releases: Sequence[str]) -> tuple[Sequence[str], str]:
    """The chains of releases and anchors: nothing in their middle is missing."""
    covered = [*map(release_chain, releases), ANCHORS]
    for entry in entries:
        if not any(chain in entry.leaf.links for chain in covered):
            raise EvidenceError(
                f"Entry {entry.sequence} belongs to no release of the bundle",
                found=", ".join(entry.leaf.links),
                cure=_TAMPERED,
            )
    lengths: list[str] = []
    for chain in covered:
        expected = Link(ordinal=0, previous=None)
        for entry in _of_chain(entries, chain):
            if (found := entry.leaf.links[chain]) != expected:
                raise EvidenceError(
                    f"Entries of the chain {chain} are missing",
                    expected=f"number {expected.ordinal}, after {expected.previous}",
                    found=f"number {found.ordinal}, after {found.previous}",
                    cure=_TAMPERED,
                )
            expected = Link(ordinal=expected.ordinal + 1, previous=entry.digest)
        lengths.append(f"{chain} {expected.ordinal}")
    return covered, "without a gap: " + ", ".join(lengths)


def _closed(bundle: Bundle, entries: Sequence[Entry], sealed: Checkpoint) -> tuple[Export, str]:
    """The export's own statement: the last entry, which names all chains and all files."""
    last = entries[-1]
    try:
        export = Export.model_validate(last.statement.predicate)
        if last.statement.predicate_type != AUDIT_EXPORT:
            raise ValueError(f"a {last.statement.predicate_type}")
    except (ValidationError, ValueError) as error:
        raise EvidenceError(
            "The bundle does not end with the statement of its export",
            expected=AUDIT_EXPORT,
            found=error,
            cure=_TAMPERED,
        ) from error
    if last.record.checkpoint != bundle.checkpoint:
        raise EvidenceError(
            "The bundle's checkpoint is not that of its export",
            expected=f"the checkpoint of entry {last.sequence}",
            found=f"one of {sealed.size} entries",
            cure=_TAMPERED,
        )
    before = entries[:-1]
    found = {
        chain: ChainEnd(entries=len(of_chain), head=of_chain[-1].digest if of_chain else None)
        for chain in export.chains
        for of_chain in [_of_chain(before, chain)]
    }
    releases = {chain for chain in export.chains if chain.startswith(RELEASES)}
    if (
        found != export.chains
        or export.chains.keys() != {*releases, ANCHORS}
        or last.leaf.links.keys() != releases
    ):
        raise EvidenceError(
            "The chains in the bundle are not those of its export",
            expected=_ends(export.chains),
            found=_ends(found),
            cure=_TAMPERED,
        )
    named = {subject.name: subject.sha256 for subject in last.statement.subject}
    present = {name: digest_of(content) for name, content in bundle.documents.items()}
    present[TRUST_ROOT] = bundle.trust_root.fingerprint
    if named != present:
        differing = sorted(
            name for name in {*named, *present} if named.get(name) != present.get(name)
        )
        raise EvidenceError(
            "Files in the bundle are not those that were exported",
            expected=f"the {len(named)} files that entry {last.sequence} names",
            found="missing, added or changed: " + ", ".join(differing),
            cure=_TAMPERED,
        )
    detail = f"by {export.actor} at {_shown(last.time)}: {len(named)} files, and all entries"
    return export, detail


def _heads(
    bundle: Bundle, entries: Sequence[Entry], sealed: Checkpoint
) -> tuple[tuple[Head, ...], str]:
    heads = anchored_heads(entries, bundle.anchored, sealed, bundle.trust_root)
    return heads, f"the log only grew from each of {len(heads)} heads that were put elsewhere"


def _admissions(release: str, chain: Sequence[Entry]) -> list[Check]:
    """The rules: nothing got traffic that had not been let through."""
    checks = _Checks()
    found = checks.add(f"rules of {release}", lambda: _rules(release, chain))
    return checks.done if found is None else found


def _rules(release: str, chain: Sequence[Entry]) -> tuple[list[Check], str]:
    made = [
        Check(
            name=f"{release}: {admission.event}",
            holds=not admission.problems,
            detail="; ".join(admission.problems)
            or f"entry {admission.sequence} rests on {admission.rests_on}",
        )
        for admission in admissions(release, chain)
    ]
    none = Check(name=f"{release}: deployments", holds=True, detail="it never got any traffic")
    return made or [none], ""


def _complete(best: Testimony | None, entries: Sequence[Entry], end: str) -> str:
    if best is None:
        return f"{end}; no anchor outside of the platform"
    covered = sum(entry.sequence < best.size for entry in entries)
    rest = len(entries) - covered
    later = f"; entries after it, up to {end}, rest on the platform's key alone: {rest}"
    return (
        f"anchor {best.kind} ({best.detail}), which covers {covered} of the {len(entries)} "
        f"entries here{later if rest else ''}"
    )


def _closed_releases(entries: Sequence[Entry]) -> tuple[str, ...]:
    """The releases of a bundle: those whose chain its last entry closes."""
    chains = [chain for chain in entries[-1].leaf.links if chain.startswith(RELEASES)]
    return tuple(sorted(chain.removeprefix(RELEASES) for chain in chains))


def _of_chain(entries: Sequence[Entry], chain: str) -> list[Entry]:
    return [entry for entry in entries if chain in entry.leaf.links]


def _ends(chains: dict[str, ChainEnd]) -> str:
    return ", ".join(f"{chain} {end.entries} up to {end.head}" for chain, end in chains.items())


def _shown(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"
