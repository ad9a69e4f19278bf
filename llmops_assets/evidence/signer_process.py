"""A small process that holds the keys and signs for others, over a Unix socket.

It runs as a user of its own, so that what trains, converts and serves cannot read the
keys. It does not sign just any bytes: only the encodings (DSSE, pre-authentication
encoding) of what this platform writes, each kind with the key of its role. Who may ask is
decided by the user id that the kernel reports of the other side (SO_PEERCRED, unix(7)).

One request a connection: a JSON object each way, its end marked by the end of the stream.
The request has `keyid` and `payload` (base64); the answer `signature` (hex) or `error`.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import socketserver
import stat
import struct
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError
from securesystemslib import signer as signing
from securesystemslib.dsse import Envelope as SignedBytes
from securesystemslib.exceptions import Error as SignatureError

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence import checkpoint
from llmops_assets.evidence.dsse import Key, Signer
from llmops_assets.evidence.keys import UNIX_SCHEME, CryptoSigner, Role, create_keys, local_signer
from llmops_assets.evidence.package_signature import PREDICATE_TYPE as PACKAGE_SIGNATURE
from llmops_assets.evidence.statements import (
    ANCHOR,
    APPROVAL,
    APPROVERS,
    APPROVERS_CHANGE,
    AUDIT_EXPORT,
    DECISION,
    GATE_VERDICT,
    INCIDENT,
    INCIDENT_NOTE,
    LIFECYCLE_EVENT,
    PROVENANCE,
    REVOCATION,
    ROUTE_CHANGE,
    SETTINGS_CHANGE,
    TEST_RESULT,
    VERIFICATION_SUMMARY,
    WAIVER_USE,
    Statement,
)
from llmops_assets.evidence.statements import PAYLOAD_TYPE as STATEMENT
from llmops_assets.storage.store import digest_of

ROLES: Mapping[str, Role] = {
    PACKAGE_SIGNATURE: "package",
    **dict.fromkeys(
        (
            ANCHOR,
            APPROVAL,
            APPROVERS,
            APPROVERS_CHANGE,
            AUDIT_EXPORT,
            DECISION,
            GATE_VERDICT,
            INCIDENT,
            INCIDENT_NOTE,
            LIFECYCLE_EVENT,
            PROVENANCE,
            REVOCATION,
            ROUTE_CHANGE,
            SETTINGS_CHANGE,
            TEST_RESULT,
            VERIFICATION_SUMMARY,
            WAIVER_USE,
        ),
        "evidence",
    ),
}
"""The predicate types of the statements that it signs, and the role whose key signs each."""
MAX_REQUEST_BYTES = 8 << 20
"""A package signature names every file: enough for about 40,000 of them."""
TIMEOUT_SECONDS = 10.0
"""Of a whole request or answer, on either side."""
CHUNK_BYTES = 1 << 16
_PEER_CREDENTIALS = struct.Struct("3i")
"""`struct ucred`: process, user, group."""

# Public there, but in no `__all__`.
Signature: TypeAlias = signing.Signature  # pyright: ignore[reportPrivateImportUsage]
SecretsHandler: TypeAlias = signing.SecretsHandler  # pyright: ignore[reportPrivateImportUsage]

logger = logging.getLogger(__name__)


class SocketSigner(Signer):
    """Signs by asking a signer process, with the key that the trust root names."""

    def __init__(self, socket_path: Path, public_key: Key) -> None:
        self._socket_path = socket_path
        self._public_key = public_key

    @classmethod
    def from_priv_key_uri(
        cls,
        priv_key_uri: str,
        public_key: Key,
        secrets_handler: SecretsHandler | None = None,
    ) -> SocketSigner:
        """See `securesystemslib.signer.Signer`; the URI is `unix:/path/of/the.socket`."""
        return cls(Path(priv_key_uri.removeprefix(UNIX_SCHEME)), public_key)

    @property
    def public_key(self) -> Key:
        return self._public_key

    def sign(self, payload: bytes) -> Signature:
        """Signs a pre-authentication encoding.

        Raises:
            EvidenceError: the process does not answer, refuses, or has another key.
        """
        request = {
            "keyid": self._public_key.keyid,
            "payload": base64.b64encode(payload).decode("ascii"),
        }
        answer = self._ask(json.dumps(request).encode())
        if "signature" not in answer:
            raise self._refused(answer.get("error", "an answer without a signature"))
        found = Signature(self._public_key.keyid, str(answer["signature"]))
        try:
            self._public_key.verify_signature(found, payload)
        except (SignatureError, ValueError) as error:
            raise self._refused(f"a signature that key {found.keyid} did not make") from error
        return found

    def _ask(self, request: bytes) -> Mapping[str, object]:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(TIMEOUT_SECONDS)
                connection.connect(str(self._socket_path))
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
                answer = json.loads(_receive(connection, time.monotonic() + TIMEOUT_SECONDS))
        except (OSError, ValueError) as error:
            # It closes the connection of users that it does not sign for.
            raise EvidenceError(
                f"The signer process at {self._socket_path} does not answer",
                found=error,
                cure="see that `llmops signer` runs, that LLMOPS_SIGNER names its socket, and "
                f"that it was started with --allow-uid {os.geteuid()}; its log says whom it "
                "refused",
            ) from error
        return answer if isinstance(answer, dict) else {}

    def _refused(self, found: object) -> EvidenceError:
        return EvidenceError(
            f"The signer process at {self._socket_path} did not sign",
            expected=f"a signature of key {self._public_key.keyid}",
            found=found,
            cure="read its log; its keys and LLMOPS_KEYS must have the same trust root",
        )


class Request(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keyid: str
    payload: str
    """Base64."""


class SignerServer(socketserver.ThreadingUnixStreamServer):
    """Signs for the users it allows, until it is shut down."""

    request_queue_size = 64
    daemon_threads = False  # so that closing it finishes the requests that it has taken

    def __init__(
        self, socket_path: Path, keys: SigningKeys, allowed_users: Collection[int]
    ) -> None:
        self.keys = keys
        self._allowed_users = frozenset(allowed_users)
        super().__init__(str(socket_path), _Handler)

    def verify_request(self, request: object, client_address: object) -> bool:
        """See `socketserver`: whether the other side is a user that may ask."""
        assert isinstance(request, socket.socket)
        user = peer_user(request)
        if user not in self._allowed_users:
            logger.warning("refused user=%d: it is not in --allow-uid", user)
        return user in self._allowed_users


@dataclass(frozen=True)
class SigningKeys:
    """The keys of a signer process, and what each of them signs."""

    evidence: CryptoSigner
    package: CryptoSigner

    def sign(self, request: Request, user: int) -> str:
        """The signature, hex, of what a user asks for.

        Raises:
            EvidenceError: it is nothing that this platform signs, or there is no such key.
        """
        try:
            payload = base64.b64decode(request.payload, validate=True)
        except binascii.Error as error:
            raise _refusal("a payload in base64", error) from error
        kind, role, body = _read(payload)
        signer = self.evidence if role == "evidence" else self.package
        if request.keyid != signer.public_key.keyid:
            raise _refusal(f"key {signer.public_key.keyid} for the role {role}", request.keyid)
        signature = signer.sign(payload).signature
        logger.info("signed type=%s payload=%s role=%s user=%d", kind, digest_of(body), role, user)
        return signature


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, SignerServer)
        user = peer_user(self.request)
        try:
            self.request.settimeout(TIMEOUT_SECONDS)
            content = _receive(self.request, time.monotonic() + TIMEOUT_SECONDS)
            answer = {"signature": self.server.keys.sign(_request(content), user)}
        except EvidenceError as error:
            logger.warning("refused user=%d: %s", user, error)
            answer = {"error": str(error)}
        except OSError as error:
            logger.warning("lost user=%d: %s", user, error)
            return
        # The client may be gone by now.
        with contextlib.suppress(OSError):
            self.request.sendall(json.dumps(answer).encode())


def serve(socket_path: Path, key_folder: Path, allowed_users: Collection[int] = ()) -> None:
    """Signs with the keys of a folder until SIGTERM or SIGINT; call it in the main thread.

    Args:
        socket_path: where to listen; replaced if a process that is gone left it.
        key_folder: holds `trust_root.json`, `evidence.pem` and `package.pem`, which are made
            if there is no trust root.
        allowed_users: ids of users that may ask, beside the one this runs as.

    Raises:
        EvidenceError: keys are missing or open to others, or the socket cannot be made.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the keys
    create_keys(key_folder)
    keys = SigningKeys(local_signer(key_folder, "evidence"), local_signer(key_folder, "package"))
    users = {os.geteuid(), *allowed_users}
    _clear(socket_path)
    # Of a socket whose mode lets others connect, who is signed for is still decided by id.
    umask = os.umask(0o177 if users == {os.geteuid()} else 0o111)
    try:
        server = SignerServer(socket_path, keys, users)
    except OSError as error:
        raise EvidenceError(
            f"The signer cannot listen on {socket_path}",
            found=error,
            cure="pass --socket a short path in a folder that exists and that it can write to",
        ) from error
    finally:
        os.umask(umask)
    with server:
        try:
            _serve_until_told(server)
        finally:
            socket_path.unlink(missing_ok=True)


def peer_user(connection: socket.socket) -> int:
    """Id of the user on the other side of a Unix socket, as it was when it connected."""
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size
    )
    return _PEER_CREDENTIALS.unpack(credentials)[1]


def _serve_until_told(server: SignerServer) -> None:
    def stop(*_: object) -> None:
        # `shutdown` waits for the loop, which this handler interrupts.
        threading.Thread(target=server.shutdown).start()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        logger.info("signing at %s", server.server_address)
        server.serve_forever()
        logger.info("stopped")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _request(content: bytes) -> Request:
    try:
        return Request.model_validate_json(content)
    except ValidationError as error:
        raise _refusal("a request with keyid and payload", error) from error


def _read(payload: bytes) -> tuple[str, Role, bytes]:
    """What is to be signed: its type for people, the role that signs it, and its bytes.

    Raises:
        EvidenceError: this platform signs no such thing.
    """
    for payload_type in (STATEMENT, checkpoint.PAYLOAD_TYPE):
        prefix = b"DSSEv1 %d %b " % (len(payload_type), payload_type.encode())
        if not payload.startswith(prefix):
            continue
        body = payload.removeprefix(prefix).partition(b" ")[2]
        if SignedBytes(body, payload_type, {}).pae() != payload:
            break
        if payload_type == checkpoint.PAYLOAD_TYPE:
            checkpoint.Checkpoint.parse(body.decode("utf-8", errors="replace"))
            return payload_type, "evidence", body
        predicate = Statement.parse(body).predicate_type
        if predicate not in ROLES:
            raise _refusal("a statement of a type in docs/predicates.md", predicate)
        return predicate, ROLES[predicate], body
    raise _refusal(
        f"the DSSE encoding of {STATEMENT} or {checkpoint.PAYLOAD_TYPE}", repr(payload[:80])
    )


def _refusal(expected: str, found: object) -> EvidenceError:
    return EvidenceError(
        "The signer does not sign this",
        expected=expected,
        found=found,
        cure="use the same version of this platform, and the same trust root, on both sides",
    )


def _receive(connection: socket.socket, deadline: float) -> bytes:
    """All that the other side sends until it ends the stream.

    Raises:
        OSError: that took too long, or the connection broke.
        EvidenceError: it is too much.
    """
    content = bytearray()
    while chunk := connection.recv(CHUNK_BYTES):
        content += chunk
        if len(content) > MAX_REQUEST_BYTES:
            raise _refusal(f"at most {MAX_REQUEST_BYTES} bytes", "more")
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError(f"not all of it came within {TIMEOUT_SECONDS:.0f} s")
        connection.settimeout(remaining)
    return bytes(content)


def _clear(socket_path: Path) -> None:
    """Removes the socket that a killed signer left.

    Raises:
        EvidenceError: something else is there, or a process still listens.
    """
    try:
        is_socket = stat.S_ISSOCK(socket_path.lstat().st_mode)
    except FileNotFoundError:
        return
    if is_socket:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(TIMEOUT_SECONDS)
            try:
                probe.connect(str(socket_path))
            except ConnectionRefusedError:
                socket_path.unlink()
                return
    raise EvidenceError(
        f"{socket_path} is in use",
        expected="no file, or the socket of a signer that is gone",
        found="a signer that answers" if is_socket else "a file that is no socket",
        cure="stop the other signer, or pass --socket another path",
    )
