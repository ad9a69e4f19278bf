"""Taking evidence out of an installation: into a bundle, or in memory to verify it at once."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from llmops_assets.errors import EvidenceError, RefConflictError
from llmops_assets.evidence import attest
from llmops_assets.evidence.attest import MODEL_SPEC, PACKAGE
from llmops_assets.evidence.bundle import (
    README,
    AnchoredHead,
    Bundle,
    ProvenLeaf,
    pack,
    proof,
)
from llmops_assets.evidence.documents import (
    file_name,
    folder_of,
    layers,
    manifest_name,
    signature_name,
)
from llmops_assets.evidence.keys import TRUST_ROOT, TrustRoot, read_trust_root
from llmops_assets.evidence.leaves import ANCHORS, Entry, release_chain
from llmops_assets.evidence.log import Attestation, EvidenceLog
from llmops_assets.evidence.package_signature import signature_of
from llmops_assets.evidence.statements import ANCHOR, PROVENANCE
from llmops_assets.evidence.witnesses import names_head, seen_head
from llmops_assets.release import Release
from llmops_assets.storage.store import canonical_json, digest_of

if TYPE_CHECKING:
    from llmops_assets.platform import Platform

READ_BY_AUDITORS = frozenset({MODEL_SPEC, "data_report", "compliance_report"})
"""Assets whose files are documents; model card and ML-BOM are in the last one."""
ATTEMPTS = 5
"""At an export of releases that change meanwhile."""
Progress = Callable[[str, int, int], None]
"""Gets what is being done, how much of it is done, and how much there is."""

_README = """\
Evidence about {releases}

Exported by {actor} from a platform with the trust root
    {fingerprint}

Everything here can be checked without the platform that wrote it. First get the fingerprint
above from the platform's operator by another way than you got this file: whoever could forge
this bundle could write another fingerprint here as well.

With llmops-assets (no account, no network, no settings):
    llmops verify BUNDLE --root FINGERPRINT

With common tools only (openssl 3, jq, sha256sum, base64):
  The trust root is the one you were told:
    sha256sum trust_root.json
  The public keys:
    jq -r '.keys[] | select(.role == "evidence") | .keyval.public' trust_root.json
    (Ed25519 keys are in hex; openssl takes them as
     302a300506032b6570032100 followed by that hex, in DER)
  The statement in line N of attestations.intoto.jsonl:
    sed -n Np attestations.intoto.jsonl | jq -r .payload | base64 -d | jq .
  What is signed of it (DSSE): the text
    DSSEv1 LENGTH-OF-TYPE TYPE LENGTH-OF-PAYLOAD PAYLOAD
    with openssl pkeyutl -verify -pubin -inkey KEY -rawin -in SIGNED -sigfile SIGNATURE
  The leaf in the same line of leaves.jsonl names the statement by its SHA-256 (of the JSON
  without the line's end), its place in the log, and the entry before it of the same release:
    sed -n Np attestations.intoto.jsonl | tr -d '\\n' | sha256sum
  That it is in the log: the Merkle path "inclusion" leads from SHA-256(0x00 || leaf) to the
  root in checkpoint.json (RFC 6962, section 2.1.1).
  The last statement names every other file in this bundle by its SHA-256:
    tail -n 1 attestations.intoto.jsonl | jq -r .payload | base64 -d \\
      | jq -r '.subject[] | .digest.sha256 + "  " + .name' | sha256sum -c
  A package's own signature, with the package at hand (OpenSSF Model Signing):
    jq -r '.keys[] | select(.role == "package") | .keyval.public' trust_root.json > package.pem
    model_signing verify key PACKAGE --signature releases/RELEASE/packaged_model/model.sig \\
      --public_key package.pem

Files
    trust_root.json             public keys; its SHA-256 is the fingerprint
    checkpoint.json             the signed head of the log that all proofs lead to
    attestations.intoto.jsonl   signed in-toto statements, oldest first
    leaves.jsonl                their leaves in the log, with proofs
    anchored.jsonl              heads of the log that were put elsewhere, with proofs
    releases/                   documents: specs, model card, ML-BOM, reports, audit page

Weights and data are not here, only their digests. The audit page, audit.json and annex_iv.md
are what the platform made of the statements; where they differ, the statements count.
"""


def export(
    platform: Platform,
    releases: Sequence[str],
    actor: str,
    progress: Progress = lambda what, done, of: None,
) -> bytes:
    """A bundle with all evidence about some releases. The export itself becomes evidence.

    Args:
        platform: the installation.
        releases: their keys.
        actor: who takes it out.
        progress: see `Progress`.

    Raises:
        ReleaseError: a key is malformed.
        EvidenceError: there is nothing about a release, the log is not what it was, or it
            kept changing.
    """
    keys = tuple(sorted({Release.parse(release).key for release in releases}))
    chains = [release_chain(key) for key in keys]
    root = read_trust_root(platform.settings.key_folder)
    for key in keys:
        check_known(platform.evidence, key)
    for _ in range(ATTEMPTS):
        ends = {chain: _end(platform.evidence, chain) for chain in (*chains, ANCHORS)}
        documents = {README: _readme(keys, actor, root)}
        for done, key in enumerate(keys):
            progress("reading documents", done, len(keys))
            documents |= documents_of(platform, key) | _reports(platform, key)
        named = {name: digest_of(content) for name, content in documents.items()}
        statement = attest.audit_export(
            chains=ends,
            documents={**named, TRUST_ROOT: root.fingerprint},
            actor=actor,
            time=datetime.now(UTC),
        )
        try:
            (closing,) = platform.evidence.append(
                Attestation(statement, chains),
                heads={chain: head for chain, (_, head) in ends.items()},
            )
        except RefConflictError:
            continue  # something happened to a release meanwhile; it shall be in it
        bundle = _taken(platform.evidence, keys, root, documents, closing, progress)
        return pack(bundle.files())
    raise EvidenceError(
        f"The evidence about {', '.join(keys)} changed all the time",
        expected="a moment without new entries",
        found=f"changes during each of {ATTEMPTS} attempts",
        cure="export when the releases' runs have ended",
    )


def take(
    platform: Platform, release: str, progress: Progress = lambda what, done, of: None
) -> Bundle:
    """The evidence about one release as it is now, without a statement that closes it.

    Raises:
        ReleaseError, EvidenceError: as `export`.
    """
    key = Release.parse(release).key
    evidence = platform.evidence
    check_known(evidence, key)
    last = evidence.entry(evidence.checkpoint().size - 1)
    root = read_trust_root(platform.settings.key_folder)
    return _taken(evidence, (key,), root, documents_of(platform, key), last, progress)


def documents_of(platform: Platform, release: str) -> dict[str, bytes]:
    """The documents that a release's artifacts hold, by their names in a bundle.

    Raises:
        StoreError: stored bytes are gone or damaged.
    """
    documents: dict[str, bytes] = {}
    artifacts: dict[str, str] = {}
    for entry in platform.evidence.entries(release_chain(release), PROVENANCE):
        made = entry.statement.subject[0]
        artifacts.setdefault(made.name, made.sha256)
    for asset, digest in artifacts.items():
        name = manifest_name(release, asset)
        # The store writes manifests in canonical form, so these are its very bytes.
        documents[name] = canonical_json(platform.store.record(digest))
        if asset in READ_BY_AUDITORS:
            _, folder = platform.store.open(digest)
            for path in layers(documents[name], name):
                documents[file_name(release, asset, path)] = (folder / path).read_bytes()
    if PACKAGE in artifacts:
        signature = signature_of(platform.store, artifacts[PACKAGE])
        if signature is not None:
            documents[signature_name(release)] = signature
    return documents


def check_free(path: Path, *, force: bool) -> None:
    """Checks that a bundle can be written to a path, before it is made.

    Raises:
        EvidenceError: there is such a file already, and it is not to be replaced.
    """
    if path.exists() and not force:
        raise EvidenceError(
            f"{path} exists already",
            expected="a new file",
            cure="name another one with --output, or pass --force",
        )


def write_bundle(content: bytes, path: Path, *, force: bool) -> None:
    """Writes a bundle, whole or not at all.

    Raises:
        EvidenceError: there is such a file already, and it is not to be replaced; or it
            cannot be written.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        check_free(path, force=force)
        beside.replace(path)
    except OSError as error:
        raise EvidenceError(
            f"{path} cannot be written", found=error, cure="check the folder, space and permissions"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def _taken(
    evidence: EvidenceLog,
    releases: Sequence[str],
    root: TrustRoot,
    documents: Mapping[str, bytes],
    last: Entry,
    progress: Progress,
) -> Bundle:
    """
    Args:
        last: the entry whose checkpoint everything is proven against.
    """
    size = last.sequence + 1
    entries = {
        entry.sequence: entry
        for chain in (*map(release_chain, releases), ANCHORS)
        for entry in evidence.entries(chain)
        if entry.sequence < size
    }
    ordered = [entries[sequence] for sequence in sorted(entries)]
    leaves: list[ProvenLeaf] = []
    for done, entry in enumerate(ordered):
        progress("proving entries", done, len(ordered))
        leaves.append(_proven(evidence, entry, size))
    progress("proving entries", len(ordered), len(ordered))
    return Bundle(
        trust_root=root,
        checkpoint=last.record.checkpoint,
        attestations=tuple(entry.record.envelope for entry in ordered),
        leaves=tuple(leaves),
        anchored=tuple(_anchored(evidence, entry, size) for entry in ordered if names_head(entry)),
        documents=documents,
    )


def _proven(evidence: EvidenceLog, entry: Entry, size: int) -> ProvenLeaf:
    return ProvenLeaf(
        leaf=entry.leaf,
        checkpoint=entry.record.checkpoint,
        inclusion=proof(evidence.inclusion_proof(entry.sequence, size)),
        consistency=proof(evidence.consistency_proof(entry.sequence + 1, size)),
    )


def _anchored(evidence: EvidenceLog, entry: Entry, size: int) -> AnchoredHead:
    if entry.statement.predicate_type == ANCHOR:
        head = entry.statement.predicate["size"]
        checkpoint = evidence.entry(head - 1).record.checkpoint
    else:
        head, checkpoint = seen_head(entry).seen.size, None
    return AnchoredHead(
        checkpoint=checkpoint, consistency=proof(evidence.consistency_proof(head, size))
    )


def _end(evidence: EvidenceLog, chain: str) -> tuple[int, str | None]:
    """Number of entries of a chain, and the digest of the last."""
    newest = evidence.newest(chain)
    return (0, None) if newest is None else (newest.leaf.links[chain].ordinal + 1, newest.digest)


def _reports(platform: Platform, release: str) -> dict[str, bytes]:
    """What the platform itself says of a release, for people."""
    # They import what draws and renders.
    from llmops_assets.reports.annex_iv import annex_iv
    from llmops_assets.reports.audit import audit
    from llmops_assets.reports.audit_page import html

    record = audit(platform, release)
    folder = folder_of(release)
    return {
        f"{folder}/audit.json": record.model_dump_json(indent=2).encode() + b"\n",
        f"{folder}/audit.html": html(record).encode(),
        f"{folder}/annex_iv.md": annex_iv(record).markdown().encode(),
    }


def _readme(releases: Iterable[str], actor: str, root: TrustRoot) -> bytes:
    return _README.format(
        releases=", ".join(releases), actor=actor, fingerprint=root.fingerprint
    ).encode()


def check_known(evidence: EvidenceLog, release: str) -> None:
    """Checks that there is evidence about a release.

    Raises:
        EvidenceError: there is none, or the log is not what it was.
    """
    if evidence.newest(release_chain(release)) is None:
        raise EvidenceError(
            f"There is no evidence about {release}",
            expected="at least one entry of the evidence log",
            cure="check the key with `llmops gates MODEL`",
        )
