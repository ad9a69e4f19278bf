"""The keys of people: OpenSSH keys that sign approvals.

Only Ed25519 is taken: its raw signature over the DSSE encoding is what DSSE verifiers
expect. A private key is used from its file, or by the ssh-agent that holds it, also one
that ssh forwards from the approver's own machine.

Formats: OpenSSH's PROTOCOL.key, the agent's draft-ietf-sshm-ssh-agent.
"""

from __future__ import annotations

import base64
import binascii
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    load_ssh_private_key,
    load_ssh_public_key,
    ssh_key_fingerprint,
)
from securesystemslib import signer as signing

from llmops_assets.errors import ApprovalError
from llmops_assets.evidence.dsse import Key, Signer

# Public there, but in no `__all__`.
CryptoSigner: TypeAlias = signing.CryptoSigner  # pyright: ignore[reportPrivateImportUsage]
SecretsHandler: TypeAlias = signing.SecretsHandler  # pyright: ignore[reportPrivateImportUsage]
Signature: TypeAlias = signing.Signature  # pyright: ignore[reportPrivateImportUsage]
SSlibKey: TypeAlias = signing.SSlibKey  # pyright: ignore[reportPrivateImportUsage]

ED25519 = "ssh-ed25519"
MAKE_ONE = "make one with `ssh-keygen -t ed25519` and have it added to approvers.yaml"
AGENT_SOCKET = "SSH_AUTH_SOCK"
AGENT_SCHEME = "ssh-agent:"
AGENT_TIMEOUT_SECONDS = 60.0
"""An agent may ask its user to confirm."""
LARGEST_ANSWER_BYTES = 256 * 1024
"""OpenSSH's own limit of an agent's message."""

_MAGIC = b"openssh-key-v1\0"
_REQUEST_IDENTITIES, _IDENTITIES, _REQUEST_SIGNATURE, _SIGNATURE = 11, 12, 13, 14


def read_public_key(line: str) -> Key:
    """A public key as `ssh-keygen` writes it: kind, base64, comment.

    Returns:
        The key; its id is OpenSSH's fingerprint, `SHA256:...`, as `ssh-keygen -l` shows it.

    Raises:
        ApprovalError: it is no Ed25519 key, which says what to do.
    """
    kind = line.split(maxsplit=1)[0] if line.strip() else "nothing"
    _check_kind(kind)
    try:
        key = load_ssh_public_key(line.strip().encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ApprovalError(
            "A public key cannot be read",
            expected=f"one line: {ED25519}, base64, comment",
            found=error,
            cure="copy the line of the .pub file whole",
        ) from error
    assert isinstance(key, Ed25519PublicKey)  # the kind says so
    return _key(key)


def signer_of(path: Path, passphrase: Callable[[], str]) -> Signer:
    """Signs with the key in a file.

    Args:
        path: a private key in OpenSSH's format; or a public one, whose private key the
            ssh-agent holds.
        passphrase: asked for the passphrase, if the file has one and the agent not the key.

    Raises:
        ApprovalError: there is no such key, it is of another kind than Ed25519, or the
            passphrase is wrong.
    """
    try:
        content = path.expanduser().read_bytes()
    except OSError as error:
        raise ApprovalError(
            f"The key {path} cannot be read",
            found=error.strerror,
            cure=f"pass --key; or {MAKE_ONE}",
        ) from error
    if not content.startswith(b"-----BEGIN"):
        key = read_public_key(content.decode("utf-8", "replace"))
        if (agent := _agent_with(key)) is not None:
            return agent
        raise ApprovalError(
            f"No ssh-agent holds the private key of {path}",
            expected=f"{key.keyid} in the list of `ssh-add -l`",
            cure=f"ssh-add it, or pass the private key itself, --key {path.with_suffix('')}",
        )
    blob = _public_blob(content, path)
    kind = next(_strings(blob)).decode("ascii", "replace")
    _check_kind(kind)
    key = read_public_key(f"{ED25519} {base64.b64encode(blob).decode()}")
    if not _encrypted(content):
        return _loaded(content, None, path)
    return _agent_with(key) or _loaded(content, passphrase().encode(), path)


class AgentSigner(Signer):
    """Signs by asking the ssh-agent, so that the private key stays where it is."""

    def __init__(self, socket_path: Path, public_key: Key) -> None:
        self._socket_path = socket_path
        self._public_key = public_key

    @classmethod
    def from_priv_key_uri(
        cls,
        priv_key_uri: str,
        public_key: Key,
        secrets_handler: SecretsHandler | None = None,
    ) -> AgentSigner:
        """See `securesystemslib.signer.Signer`; the URI is `ssh-agent:/path/of/the.socket`."""
        return cls(Path(priv_key_uri.removeprefix(AGENT_SCHEME)), public_key)

    @property
    def public_key(self) -> Key:
        return self._public_key

    def sign(self, payload: bytes) -> Signature:
        """A raw Ed25519 signature of the payload.

        Raises:
            ApprovalError: the agent does not answer, or refuses.
        """
        message = _string(_blob_of(self._public_key)) + _string(payload) + struct.pack(">I", 0)
        answer = _ask_agent(self._socket_path, _REQUEST_SIGNATURE, message, _SIGNATURE)
        kind, signature = _strings(next(_strings(answer)))
        if kind != ED25519.encode():
            raise _agent_failed(f"a signature of kind {kind!r}")
        return Signature(self._public_key.keyid, signature.hex())


def _loaded(content: bytes, passphrase: bytes | None, path: Path) -> CryptoSigner:
    try:
        key = load_ssh_private_key(content, passphrase)
    except UnsupportedAlgorithm as error:
        raise ApprovalError(
            f"The passphrase of {path} cannot be used here",
            found=error,
            cure=f"`ssh-add {path}`, then try again: the agent signs; or `pip install bcrypt`",
        ) from error
    except (ValueError, TypeError) as error:
        raise ApprovalError(
            f"The key {path} cannot be opened",
            expected="a private key in OpenSSH's format, and its passphrase",
            found=error,
            cure="check the passphrase with `ssh-keygen -y -f` and the file's path",
        ) from error
    assert isinstance(key, Ed25519PrivateKey)  # the kind beside it says so
    public = _key(key.public_key())
    return CryptoSigner(key, public)


def _key(key: Ed25519PublicKey) -> SSlibKey:
    fingerprint = base64.b64encode(ssh_key_fingerprint(key, SHA256())).decode().rstrip("=")
    return SSlibKey.from_crypto(key, f"SHA256:{fingerprint}")


def _blob_of(key: Key) -> bytes:
    """The key as SSH writes it (RFC 8709, section 4)."""
    return _string(ED25519.encode()) + _string(bytes.fromhex(key.keyval["public"]))


def _check_kind(kind: str) -> None:
    """
    Raises:
        ApprovalError: a key of this kind signs no approvals.
    """
    if kind == ED25519:
        return
    if kind.startswith("sk-"):
        what = f"a hardware-token key ({kind}), whose signatures cover more than the message"
    elif kind == "ssh-rsa":
        what = f"an RSA key ({kind})"
    elif kind.startswith("ecdsa-"):
        what = f"an ECDSA key ({kind})"
    else:
        what = f"a key of kind {kind[:40]!r}"
    raise ApprovalError(
        "This key cannot sign approvals", expected=f"an Ed25519 key ({ED25519})", found=what,
        cure=MAKE_ONE,
    )  # fmt: skip


def _public_blob(content: bytes, path: Path) -> bytes:
    """The public key in a private key's file, which is in the clear also with a passphrase."""
    for kind, mark in (("ssh-rsa", b"BEGIN RSA "), ("ecdsa-pem", b"BEGIN EC ")):
        if mark in content[:64]:
            _check_kind(kind)
    try:
        body = _openssh_body(content)
        *_, rest = _header(body)
        return next(_strings(rest))
    except (ValueError, binascii.Error, struct.error, StopIteration) as error:
        raise ApprovalError(
            f"{path} is not a private key in OpenSSH's format",
            expected="-----BEGIN OPENSSH PRIVATE KEY-----",
            found=content[:40].decode("ascii", "replace").splitlines()[0],
            cure=MAKE_ONE,
        ) from error


def _encrypted(content: bytes) -> bool:
    cipher, _, _, _ = _header(_openssh_body(content))
    return cipher != b"none"


def _openssh_body(content: bytes) -> bytes:
    lines = content.decode("ascii").strip().splitlines()
    body = base64.b64decode("".join(lines[1:-1]), validate=True)
    if not body.startswith(_MAGIC):
        raise ValueError("no OpenSSH key")
    return body.removeprefix(_MAGIC)


def _header(body: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Cipher, key derivation, its options, and what follows the number of keys."""
    strings = _strings(body)
    cipher, derivation, options = next(strings), next(strings), next(strings)
    start = sum(4 + len(part) for part in (cipher, derivation, options)) + 4
    return cipher, derivation, options, body[start:]


def _agent_with(key: Key) -> AgentSigner | None:
    """The agent, if there is one and it holds the key."""
    address = os.environ.get(AGENT_SOCKET)
    if not address:
        return None
    answer = _ask_agent(Path(address), _REQUEST_IDENTITIES, b"", _IDENTITIES)
    blobs = list(_strings(answer[4:]))[::2]  # each with a comment behind
    return AgentSigner(Path(address), key) if _blob_of(key) in blobs else None


def _ask_agent(socket_path: Path, kind: int, message: bytes, expected: int) -> bytes:
    try:
        with socket.socket(socket.AF_UNIX) as agent:
            agent.settimeout(AGENT_TIMEOUT_SECONDS)
            agent.connect(str(socket_path))
            agent.sendall(struct.pack(">IB", len(message) + 1, kind) + message)
            (length,) = struct.unpack(">I", _received(agent, 4))
            if not 1 <= length <= LARGEST_ANSWER_BYTES:
                raise _agent_failed(f"an answer of {length} bytes")
            answer = _received(agent, length)
    except (OSError, struct.error) as error:
        raise _agent_failed(error) from error
    if answer[0] != expected:
        raise _agent_failed(f"answer {answer[0]}: it refuses, or does not hold the key")
    return answer[1:]


def _received(agent: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length:
        if not (part := agent.recv(length - len(found))):
            raise ConnectionError("it closed the connection")
        found += part
    return found


def _agent_failed(found: object) -> ApprovalError:
    return ApprovalError(
        "The ssh-agent did not sign",
        expected=f"the agent at ${AGENT_SOCKET} to hold the key and to sign with it",
        found=found,
        cure=f"check `ssh-add -l`; or unset {AGENT_SOCKET} and pass the private key with --key",
    )


def _string(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def _strings(content: bytes) -> Iterator[bytes]:
    """Strings as SSH writes them (RFC 4251, section 5): four bytes of length, then content."""
    while content:
        (length,) = struct.unpack(">I", content[:4])
        if len(content) < 4 + length:
            raise ValueError("a string is cut off")
        yield content[4 : 4 + length]
        content = content[4 + length :]
