"""A process of another user signs what the platform writes, for whom it may, and no more."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from securesystemslib.dsse import Envelope as SignedBytes

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence import dsse, statements
from llmops_assets.evidence.checkpoint import Checkpoint, read_checkpoint, sign_checkpoint
from llmops_assets.evidence.keys import (
    TRUST_ROOT,
    create_keys,
    evidence_signer,
    local_signer,
    package_signer,
    private_key_file,
    read_trust_root,
)
from llmops_assets.evidence.package_signature import PREDICATE_TYPE as PACKAGE_SIGNATURE
from llmops_assets.evidence.package_signature import sign_package, verify_package
from llmops_assets.evidence.signer_process import (
    MAX_REQUEST_BYTES,
    ROLES,
    SignerServer,
    SigningKeys,
    SocketSigner,
)
from llmops_assets.evidence.statements import DECISION, PAYLOAD_TYPE, Statement, subject
from llmops_assets.settings import Settings

pytestmark = pytest.mark.timeout(60)

SERVE = """
import logging, sys
from pathlib import Path
from llmops_assets.evidence.signer_process import serve
logging.basicConfig(level=logging.INFO, format="%(message)s")
serve(Path(sys.argv[1]), Path(sys.argv[2]), [int(uid) for uid in sys.argv[3:]])
"""
NOBODY = 65534


class SignerProcess:
    """A signer in a process of its own; its keys are nowhere else."""

    def __init__(self, folder: Path) -> None:
        self.keys = folder / "signer"
        self.socket = folder / "signer.sock"
        self.log = folder / "log"
        root = create_keys(self.keys)
        # What a worker has: the trust root alone.
        self.settings = Settings(state=folder / "state", signer=f"unix:{self.socket}")
        self.settings.key_folder.mkdir(parents=True, mode=0o700)
        (self.settings.key_folder / TRUST_ROOT).write_text(root.model_dump_json())
        self.root = root

    @contextmanager
    def running(self, *allowed: int) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-c", SERVE, str(self.socket), str(self.keys)]
        with self.log.open("ab") as log:
            process = subprocess.Popen([*command, *map(str, allowed)], stderr=log)
        try:
            deadline = time.monotonic() + 20
            while "signing at" not in self.log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.02)
            yield process
        finally:
            process.kill()
            process.wait(10)


@pytest.fixture(scope="module")
def signer() -> Iterator[SignerProcess]:
    """A running signer; not below pytest's folder, which other users cannot enter."""
    folder = Path(tempfile.mkdtemp(prefix="llmops-"))
    folder.chmod(0o755)
    signer = SignerProcess(folder)
    with signer.running(NOBODY):
        yield signer
    shutil.rmtree(folder)


def statement(predicate_type: str = DECISION) -> Statement:
    about = subject("package", "sha256:" + "a" * 64)
    return Statement(subject=(about,), predicate_type=predicate_type, predicate={"by": "ada"})


def encoded(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    return SignedBytes(payload, payload_type, {}).pae()


def test_statements_and_checkpoints_are_signed_without_the_key(signer: SignerProcess) -> None:
    """The worker must be able to record evidence, and not be able to read the key."""
    worker = evidence_signer(signer.settings)
    assert not private_key_file(signer.settings.key_folder, "evidence").exists()
    envelope = dsse.sign(statement().payload(), PAYLOAD_TYPE, worker)
    keys = signer.root.evidence_keys()
    assert dsse.verified_payload(envelope, PAYLOAD_TYPE, keys, "it") == statement().payload()
    checkpoint = Checkpoint(7, bytes(32), datetime.now(UTC))
    assert read_checkpoint(sign_checkpoint(checkpoint, worker), keys, "it") == checkpoint


def test_packages_are_signed_with_the_package_key(signer: SignerProcess, tmp_path: Path) -> None:
    """So that model_signing, which takes no Ed25519, can verify them."""
    (tmp_path / "weights").write_bytes(b"weights")
    digest = "sha256:" + "b" * 64
    signature = sign_package(tmp_path, digest, package_signer(signer.settings))
    verify_package(tmp_path, signature, signer.root, digest)


def test_each_signature_leaves_a_line(signer: SignerProcess) -> None:
    """Whoever runs the signer must be able to tell what it signed, and for whom."""
    dsse.sign(statement().payload(), PAYLOAD_TYPE, evidence_signer(signer.settings))
    digest = hashlib.sha256(statement().payload()).hexdigest()
    expected = f"signed type={DECISION} payload=sha256:{digest} role=evidence user={os.geteuid()}"
    assert expected in signer.log.read_text().splitlines()


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"anything", statement().payload(), encoded(b"{}"), encoded(b"not json"),
        encoded(json.dumps(json.loads(statement().payload()), indent=1).encode()),
        encoded(statement().payload(), "application/json"),
        encoded(statement().payload(), "application/vnd.llmops.tlog-checkpoint.v1"),
        encoded(b"llmops-assets/evidence\n-1\nAAAA\n", "application/vnd.llmops.tlog-checkpoint.v1"),
        encoded(statement().payload()) + b" ", encoded(statement().payload())[:-1],
        encoded(statement().payload()).replace(b"DSSEv1", b"DSSEv2"),
        encoded(statement().payload()).replace(b"+json ", b"+json 1"),
        encoded(statement(PACKAGE_SIGNATURE).payload()),
        encoded(statement("https://example.org/anything/v1").payload()),
    ],
)  # fmt: skip
def test_nothing_else_is_signed(signer: SignerProcess, payload: bytes) -> None:
    """A key that signs any bytes signs an SSH login, a certificate, or another's statement."""
    with pytest.raises(EvidenceError, match="did not sign"):
        evidence_signer(signer.settings).sign(payload)


def test_every_type_that_the_platform_writes_is_signed() -> None:
    """A new one that is left out would fail only where a signer process is used."""
    written = {
        value
        for name, value in vars(statements).items()
        if name.isupper() and str(value).startswith("https://")
    } - {statements.STATEMENT_TYPE, statements.OWN_PREDICATES}
    assert ROLES.keys() == written | {PACKAGE_SIGNATURE}


def test_each_key_signs_for_its_role_only(signer: SignerProcess) -> None:
    """A package key that signs verdicts would be an evidence key."""
    with pytest.raises(EvidenceError, match=r"did not sign.*for the role evidence"):
        package_signer(signer.settings).sign(encoded(statement().payload()))


@pytest.mark.parametrize("request_", [b"", b"{", b"[]", b'{"keyid": "a"}', b"\xff", b"[" * 100_000])
def test_malformed_requests_are_answered(signer: SignerProcess, request_: bytes) -> None:
    """One broken client must not take the signer from the others."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(signer.socket))
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        assert "To do" in json.loads(connection.recv(1 << 16))["error"]
    evidence_signer(signer.settings).sign(encoded(statement().payload()))


def test_too_large_a_request_is_cut_off(signer: SignerProcess) -> None:
    """Memory of the process that holds the keys must not be anybody's to use up."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(signer.socket))
        with pytest.raises(OSError):
            for _ in range(3):
                connection.sendall(b" " * MAX_REQUEST_BYTES)
    evidence_signer(signer.settings).sign(encoded(statement().payload()))


def test_a_silent_client_holds_up_nobody(signer: SignerProcess) -> None:
    """A worker that was stopped in the middle of a request is an everyday thing."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(signer.socket))
        silent.sendall(b"{")
        started = time.monotonic()
        evidence_signer(signer.settings).sign(encoded(statement().payload()))
        assert time.monotonic() - started < 2


def test_many_ask_at_once(signer: SignerProcess) -> None:
    """Every step of every release records evidence."""
    worker = evidence_signer(signer.settings)
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(10):
                worker.sign(encoded(statement().payload()))
        except EvidenceError as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []


def as_user(user: int, settings: Settings) -> str:
    """What a process of another user gets from the signer."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signer = SocketSigner(
            Path(str(settings.signer).removeprefix("unix:")),
            read_trust_root(settings.key_folder).evidence_keys()[0],
        )
        os.setgid(user)
        os.setuid(user)
        try:
            os.write(write, signer.sign(encoded(statement().payload())).keyid.encode())
        except EvidenceError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as answer:
        return answer.read()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_users_are_told_apart_by_the_kernel(signer: SignerProcess) -> None:
    """The keys are worth as much as the list of who may use them."""
    assert as_user(NOBODY, signer.settings) == signer.root.evidence_keys()[0].keyid
    refused = as_user(NOBODY - 1, signer.settings)
    assert "does not answer" in refused and f"--allow-uid {NOBODY - 1}" in refused
    assert f"refused user={NOBODY - 1}" in signer.log.read_text()


def test_a_user_who_is_not_allowed_is_refused(tmp_path: Path) -> None:
    """As above, for whoever runs these tests as a plain user."""
    process = SignerProcess(tmp_path)
    keys = SigningKeys(*(local_signer(process.keys, role) for role in ("evidence", "package")))
    with SignerServer(process.socket, keys, {os.geteuid() + 1}) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(EvidenceError, match="does not answer"):
                evidence_signer(process.settings).sign(encoded(statement().payload()))
        finally:
            server.shutdown()
            thread.join(10)


def test_socket_mode_follows_who_may_ask(signer: SignerProcess, tmp_path: Path) -> None:
    """Nobody else can even connect, where nobody else may ask."""
    assert signer.socket.stat().st_mode & 0o777 == 0o666
    alone = SignerProcess(tmp_path)
    with alone.running():
        assert alone.socket.stat().st_mode & 0o777 == 0o600


def test_it_ends_cleanly_and_starts_after_a_kill(tmp_path: Path) -> None:
    """systemd sends SIGTERM and looks at the exit code; a power cut sends nothing."""
    signer = SignerProcess(tmp_path)
    worker = evidence_signer(signer.settings)
    with signer.running() as process:
        process.kill()
        process.wait(10)
        assert signer.socket.exists()
        with pytest.raises(EvidenceError, match=r"does not answer.*llmops signer"):
            worker.sign(encoded(statement().payload()))
    signer.log.unlink()
    with signer.running() as process:
        worker.sign(encoded(statement().payload()))
        second = subprocess.run(
            [sys.executable, "-c", SERVE, str(signer.socket), str(signer.keys)],
            capture_output=True, timeout=30,
        )  # fmt: skip
        assert second.returncode != 0
        assert b"a signer that answers" in second.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert not signer.socket.exists()
    assert signer.log.read_text().splitlines()[-1] == "stopped"


def test_another_files_place_is_not_taken(tmp_path: Path) -> None:
    """A mistyped --socket must not delete a file."""
    from llmops_assets.evidence.signer_process import serve

    create_keys(tmp_path / "keys")
    (tmp_path / "precious").write_text("data")
    with pytest.raises(EvidenceError, match="no socket"):
        serve(tmp_path / "precious", tmp_path / "keys")
    assert (tmp_path / "precious").read_text() == "data"
    with pytest.raises(EvidenceError, match="cannot listen"):
        serve(tmp_path / "no such folder" / "socket", tmp_path / "keys")


def test_a_signer_with_other_keys_is_noticed(signer: SignerProcess, tmp_path: Path) -> None:
    """What it signs would be refused by everybody who reads it, years later."""
    other = create_keys(tmp_path / "other")
    worker = SocketSigner(signer.socket, other.evidence_keys()[0])
    with pytest.raises(EvidenceError, match="same trust root"):
        worker.sign(encoded(statement().payload()))


def test_an_answer_is_not_believed_unchecked(signer: SignerProcess, tmp_path: Path) -> None:
    """Whoever took the socket's place must not get a false signature into the log."""
    path = tmp_path / "false.sock"
    with socket.socket(socket.AF_UNIX) as false:
        false.bind(str(path))
        false.listen()

        def answer() -> None:
            connection, _ = false.accept()
            with connection:
                while connection.recv(1 << 16):
                    pass
                connection.sendall(json.dumps({"signature": "ab" * 64}).encode())

        thread = threading.Thread(target=answer)
        thread.start()
        worker = SocketSigner(path, signer.root.evidence_keys()[0])
        with pytest.raises(EvidenceError, match="did not make"):
            worker.sign(encoded(statement().payload()))
        thread.join(10)
