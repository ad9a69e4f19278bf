"""Anchors: what somebody else holds of the log, and that a log which is not its is found out."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

from llmops_assets.deploy.approval import RecordedDecision
from llmops_assets.deploy.signed_decision import LogHead, SignedDecision, sign_decision
from llmops_assets.errors import EvidenceError
from llmops_assets.evidence import anchors, attest, log
from llmops_assets.evidence.anchors import (
    GIT_REF,
    anchor_in_git,
    anchor_with_time_stamp,
    held_in_git,
    read_certificates,
)
from llmops_assets.evidence.approver_keys import SSlibKey, read_public_key
from llmops_assets.evidence.dsse import Envelope
from llmops_assets.evidence.export import export
from llmops_assets.evidence.gates import BUILT
from llmops_assets.evidence.keys import CryptoSigner
from llmops_assets.evidence.leaves import ANCHORS, release_chain
from llmops_assets.evidence.log import Attestation, EvidenceLog
from llmops_assets.evidence.verification import Verification, verify_bundle
from llmops_assets.evidence.witnesses import GitWitness, Witnesses, read_approvers
from llmops_assets.serving.slots import Environment
from llmops_assets.storage.store import canonical_json

from ..git_rig import git
from ..release_rig import PASSED, Rig
from .evidence_rig import failures, fingerprint

RELEASE = "parrot.v1"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A bare repository that takes no force, as that of an anchor should."""
    path = tmp_path / "anchors.git"
    git(tmp_path, "init", "--quiet", "--bare", "anchors.git")
    git(path, "config", "receive.denyNonFastForwards", "true")
    return path


@pytest.fixture
def evidence(rig: Rig) -> EvidenceLog:
    rig.freeze(RELEASE)
    return rig.platform.evidence


def verified(rig: Rig, witnesses: Witnesses) -> Verification:
    content = export(rig.platform, [RELEASE], "ada")
    return verify_bundle(content, fingerprint(rig), witnesses, require_anchor=True)


def held(repository: Path) -> Witnesses:
    return Witnesses(git=(GitWitness(str(repository), held_in_git(str(repository))),))


def test_the_log_in_a_git_repository(rig: Rig, evidence: EvidenceLog, repository: Path) -> None:
    """Each anchor is a commit after the one before, and vouches for the log up to it; git
    shows it to everybody."""
    first = anchor_in_git(evidence, str(repository))
    rig.judge(RELEASE, BUILT[:1], PASSED)
    second = anchor_in_git(evidence, str(repository))
    assert [first.statement.predicate["size"], second.statement.predicate["size"]] == [2, 5]
    assert list(second.leaf.links) == [ANCHORS]
    assert len(git(repository, "rev-list", GIT_REF).split()) == 2
    shown = json.loads(git(repository, "show", f"{GIT_REF}:checkpoint.json"))
    assert Envelope.model_validate(shown) == evidence.entry(4).record.checkpoint
    found = verified(rig, held(repository))
    assert found.holds, failures(found)
    assert found.complete_up_to is not None
    assert "anchor git-ref" in found.complete_up_to
    assert "covers 4 of the 6 entries" in found.complete_up_to


def test_an_anchor_without_news(evidence: EvidenceLog, repository: Path) -> None:
    """A daily anchor of a log in which nothing happened must not make it grow."""
    first = anchor_in_git(evidence, str(repository))
    assert anchor_in_git(evidence, str(repository)) == first
    assert len(held_in_git(str(repository))) == 1


def test_an_anchor_that_was_killed_before_it_was_attested(
    rig: Rig, evidence: EvidenceLog, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit is there and no statement of it: the next call makes it good, or bundles
    would look as if the log had been rewritten."""
    with monkeypatch.context() as killed:
        killed.setattr(anchors, "_attest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            anchor_in_git(evidence, str(repository))
    found = verified(rig, held(repository))
    assert "is not of this log" in failures(found)
    anchor_in_git(evidence, str(repository))
    assert len(held_in_git(str(repository))) == 1
    assert verified(rig, held(repository)).holds


def test_a_log_that_was_cut_or_rewritten(
    rig: Rig, evidence: EvidenceLog, repository: Path, tmp_path: Path
) -> None:
    """The attacker has the key, and the index is gone: the log is cut before the anchor and
    written anew, perfectly signed. Only what was anchored tells, when the next anchor is made
    and when a bundle is verified."""
    rig.judge(RELEASE, BUILT[:1], PASSED)
    anchor_in_git(evidence, str(repository))
    witnesses = held(repository)
    logs = rig.platform.settings.store / "logs" / log.LOG
    for sequence in range(2, 5):
        (logs / f"{sequence:012d}").unlink()
    shutil.rmtree(rig.platform.settings.evidence_index.parent)
    with pytest.raises(EvidenceError, match="cut or rewritten"):
        anchor_in_git(evidence, str(repository))
    for _ in range(3):
        rig.judge(RELEASE, BUILT[:1], PASSED)
    with pytest.raises(EvidenceError, match="cut or rewritten"):
        anchor_in_git(evidence, str(repository))
    content = export(rig.platform, [RELEASE], "ada")
    assert verify_bundle(content, fingerprint(rig)).holds  # by signatures alone
    assert "is not of this log" in failures(verify_bundle(content, fingerprint(rig), witnesses))


def test_an_older_bundle_beside_a_newer_anchor(
    rig: Rig, evidence: EvidenceLog, repository: Path
) -> None:
    """The bundle of last month stays good while the log goes on."""
    anchor_in_git(evidence, str(repository))
    content = export(rig.platform, [RELEASE], "ada")
    rig.judge(RELEASE, BUILT[:1], PASSED)
    anchor_in_git(evidence, str(repository))
    found = verify_bundle(content, fingerprint(rig), held(repository), require_anchor=True)
    assert found.holds, failures(found)


def test_a_ref_that_holds_something_else(evidence: EvidenceLog, repository: Path) -> None:
    """Nothing of others is built upon, and nothing is overwritten by force."""
    other = repository.parent / "other"
    git(repository.parent, "init", "--quiet", str(other))
    (other / "readme").write_text("something else")
    git(other, "add", "--all")
    git(other, "commit", "--quiet", "--message", "mine")
    git(other, "push", "--quiet", str(repository), f"HEAD:{GIT_REF}")
    before = git(repository, "rev-parse", GIT_REF)
    with pytest.raises(EvidenceError):
        anchor_in_git(evidence, str(repository))
    assert git(repository, "rev-parse", GIT_REF) == before
    assert list(evidence.entries(ANCHORS)) == []


def test_checkpoints_of_another_installation(
    evidence: EvidenceLog, repository: Path, tmp_path: Path
) -> None:
    """Two installations must not share a ref: each would take the other for an attacker."""
    stranger = Rig(tmp_path / "stranger")
    try:
        stranger.freeze(RELEASE)
        anchor_in_git(stranger.platform.evidence, str(repository))
        with pytest.raises(EvidenceError, match="No trusted key signed"):
            anchor_in_git(evidence, str(repository))
    finally:
        stranger.close()


@pytest.mark.parametrize(
    "name",
    ["--upload-pack=touch x", "", "ext::sh -c touch% x", "/nowhere", "https://ada:secret@[host/x"],
)
def test_what_is_no_repository(evidence: EvidenceLog, name: str, tmp_path: Path) -> None:
    """An address may not become an option or a command of git, and a wrong one is said so."""
    with pytest.raises(EvidenceError) as refused:
        anchor_in_git(evidence, name)
    assert not list(tmp_path.rglob("x"))
    assert "secret" not in str(refused.value)
    assert list(evidence.entries(ANCHORS)) == []


class Authority:
    """A real time stamping authority: `openssl ts` behind HTTP."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                      "-nodes", "-days", "2", "-subj", "/CN=Root", "-keyout", "root.key",
                      "-out", "root.pem")  # fmt: skip
        self._openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                      "-nodes", "-subj", "/CN=Stamps", "-keyout", "tsa.key",
                      "-out", "tsa.csr")  # fmt: skip
        (folder / "extensions").write_text("extendedKeyUsage=critical,timeStamping\n")
        self._openssl("x509", "-req", "-in", "tsa.csr", "-CA", "root.pem", "-CAkey", "root.key",
                      "-CAcreateserial", "-days", "2", "-extfile", "extensions",
                      "-out", "tsa.pem")  # fmt: skip
        (folder / "tsa.cnf").write_text(
            "[tsa]\ndefault_tsa=t\n[t]\nserial=serial\nsigner_digest=sha256\n"
            "default_policy=1.2.3.4\ndigests=sha256,sha512\nordering=yes\ntsa_name=no\n"
            "ess_cert_id_chain=no\n"
        )
        authority = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = self.rfile.read(int(self.headers["Content-Length"]))
                reply = authority.reply(query)
                self.send_response(200)
                self.send_header("Content-Type", "application/timestamp-reply")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/stamp"
        self.replies: bytes | None = None
        """What it sends instead of an honest reply."""

    def reply(self, query: bytes) -> bytes:
        if self.replies is not None:
            return self.replies
        (self.folder / "query").write_bytes(query)
        self._openssl("ts", "-reply", "-config", "tsa.cnf", "-queryfile", "query", "-signer",
                      "tsa.pem", "-inkey", "tsa.key",
                      "-out", "reply")  # fmt: skip
        return (self.folder / "reply").read_bytes()

    def certificates(self) -> Witnesses:
        content = (self.folder / "root.pem").read_bytes()
        return Witnesses(certificates=read_certificates(content, "root.pem"))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def _openssl(self, *arguments: str) -> None:
        done = subprocess.run(
            ["openssl", *arguments], cwd=self.folder, capture_output=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr.decode()


@pytest.fixture
def authority(tmp_path: Path) -> Iterator[Authority]:
    folder = tmp_path / "authority"
    folder.mkdir()
    authority = Authority(folder)
    yield authority
    authority.close()


def test_a_time_stamp(rig: Rig, evidence: EvidenceLog, authority: Authority) -> None:
    """The authority's word is in the bundle, and is believed by whoever trusts the authority
    and nobody else, offline."""
    entry = anchor_with_time_stamp(evidence, authority.url, timeout_seconds=10)
    assert entry.statement.predicate["size"] == 2
    certificates = authority.certificates()
    authority.close()
    found = verified(rig, certificates)
    assert found.holds, failures(found)
    assert found.complete_up_to is not None
    assert "saw the log's first 2 entries at" in found.complete_up_to
    unasked = verified(rig, Witnesses())
    assert "nothing outside of the platform" in failures(unasked)
    assert any("--timestamp-certificates" in check.detail for check in unasked.checks)


def test_a_time_stamp_by_somebody_else(
    rig: Rig, evidence: EvidenceLog, authority: Authority, tmp_path: Path
) -> None:
    """Everybody can run an authority, so can an attacker."""
    anchor_with_time_stamp(evidence, authority.url, timeout_seconds=10)
    folder = tmp_path / "other"
    folder.mkdir()
    other = Authority(folder)
    other.close()
    found = verified(rig, other.certificates())
    assert "no authority that the verifier trusts" in failures(found)


def test_a_time_stamp_over_something_else(evidence: EvidenceLog, authority: Authority) -> None:
    """An old reply, or one to another question, stamps nothing."""
    anchor_with_time_stamp(evidence, authority.url, timeout_seconds=10)
    authority.replies = (authority.folder / "reply").read_bytes()
    with pytest.raises(EvidenceError, match="no time stamp"):
        anchor_with_time_stamp(evidence, authority.url, timeout_seconds=10)
    authority.replies = b"not even that"
    with pytest.raises(EvidenceError, match="no time stamp"):
        anchor_with_time_stamp(evidence, authority.url, timeout_seconds=10)
    assert len(list(evidence.entries(ANCHORS))) == 1


def test_an_old_reply_over_the_same_checkpoint(evidence: EvidenceLog, authority: Authority) -> None:
    """Whoever is between can send what the authority once said, and so an earlier time."""
    envelope = evidence.entry(evidence.checkpoint().size - 1).record.checkpoint
    content = canonical_json(envelope.model_dump(mode="json"))
    request = TimestampRequestBuilder().data(content).hash_algorithm(HashAlgorithm.SHA256).build()
    authority.replies = authority.reply(request.as_bytes())
    with pytest.raises(EvidenceError, match="reply to another request"):
        anchor_with_time_stamp(evidence, authority.url, timeout_seconds=10)


def test_an_authority_that_does_not_answer(evidence: EvidenceLog, authority: Authority) -> None:
    """Said so, and nothing is attested."""
    authority.close()
    with pytest.raises(EvidenceError, match="no time stamp"):
        anchor_with_time_stamp(evidence, authority.url, timeout_seconds=2)
    assert list(evidence.entries(ANCHORS)) == []


def test_an_approver_who_signed_the_head_of_the_log(rig: Rig, evidence: EvidenceLog) -> None:
    """An approver's own key vouches for what the log was when they approved; whose keys count
    is for the verifier to say."""
    private_key = Ed25519PrivateKey.generate()
    line = openssh(private_key)
    package, now = "sha256:" + "1" * 64, datetime.now(UTC)
    head = evidence.checkpoint()
    signed = SignedDecision(
        environment=Environment.PRODUCTION, model="parrot", release=RELEASE, package=package,
        decision="approve", approver="grace", reason="looks well", verdicts={}, policy=package,
        log=LogHead(size=head.size, root=base64.b64encode(head.root).decode()), nonce="0" * 32,
        time=now, not_before=now, expires=now + timedelta(days=1),
    )  # fmt: skip
    envelope = sign_decision(signed, signer_of(private_key))

    def record(envelope: Envelope) -> None:
        recorded = RecordedDecision(
            release=RELEASE, approver="grace", decision="approve", reason="looks well",
            package=package, time=now, evidence="signed", envelope=envelope,
        )  # fmt: skip
        evidence.append(Attestation(attest.decision(recorded), (release_chain(RELEASE),)))

    def verify(*lines: bytes) -> Verification:
        return verified(rig, Witnesses(approvers=read_approvers(b"\n".join(lines), "approvers")))

    record(envelope)
    found = verify(b"# approvers", openssh(Ed25519PrivateKey.generate()), line + b" grace@host")
    assert found.holds, failures(found)
    assert "grace signed the log's first 2 entries" in str(found.complete_up_to)
    stranger = verify(openssh(Ed25519PrivateKey.generate()))
    assert "nothing outside of the platform" in failures(stranger)
    assert any("pass --approvers" in check.detail for check in stranger.checks)
    # The platform cannot put words into her mouth.
    forged = envelope.signatures[0].model_copy(update={"sig": base64.b64encode(b"x" * 64).decode()})
    record(envelope.model_copy(update={"signatures": (forged,)}))
    assert "The decision of grace" in failures(verify(line))


def test_an_approver_who_saw_another_log(rig: Rig, evidence: EvidenceLog) -> None:
    """The head that was signed is not one that this log had: it was rewritten since."""
    private_key = Ed25519PrivateKey.generate()
    package, now = "sha256:" + "1" * 64, datetime.now(UTC)
    signed = SignedDecision(
        environment=Environment.PRODUCTION, model="parrot", release=RELEASE, package=package,
        decision="approve", approver="grace", reason="looks well", verdicts={}, policy=package,
        log=LogHead(size=1, root=base64.b64encode(b"r" * 32).decode()), nonce="0" * 32,
        time=now, not_before=now, expires=now + timedelta(days=1),
    )  # fmt: skip
    recorded = RecordedDecision(
        release=RELEASE, approver="grace", decision="approve", reason="looks well",
        package=package, time=now, evidence="signed",
        envelope=sign_decision(signed, signer_of(private_key)),
    )  # fmt: skip
    evidence.append(Attestation(attest.decision(recorded), (release_chain(RELEASE),)))
    assert "did not only grow" in failures(verified(rig, Witnesses()))


def signer_of(private_key: Ed25519PrivateKey) -> CryptoSigner:
    key = read_public_key(openssh(private_key).decode())
    assert isinstance(key, SSlibKey)
    return CryptoSigner(private_key, key)


def openssh(private_key: Ed25519PrivateKey) -> bytes:
    return private_key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def test_files_that_hold_no_keys(tmp_path: Path) -> None:
    """A mistake in a verifier's file must not look like evidence that fails."""
    with pytest.raises(EvidenceError, match="keys of approvers"):
        read_approvers(b"ssh-ed25519 nonsense", "approvers")
    with pytest.raises(EvidenceError, match="no certificates"):
        read_certificates(b"nonsense", "root.pem")
