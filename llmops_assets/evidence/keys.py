"""The keys that sign, and the trust root: the public keys that a reader trusts.

A key folder holds

    trust_root.json   the public keys, for everybody who verifies
    evidence.pem      Ed25519, signs statements and checkpoints
    package.pem       ECDSA P-256, signs packages; model-signing accepts no Ed25519

Where a signer process or a key service holds the keys, the folder has `trust_root.json`
alone. docs/evidence.md says what each arrangement protects from.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from securesystemslib import signer as signing
from securesystemslib.exceptions import Error as SignatureError
from securesystemslib.exceptions import UnsupportedLibraryError

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence.dsse import Key, Signer
from llmops_assets.settings import Settings
from llmops_assets.storage.store import canonical_json, digest_of

# Public there, but in no `__all__`.
CryptoSigner: TypeAlias = signing.CryptoSigner  # pyright: ignore[reportPrivateImportUsage]

Role = Literal["evidence", "package"]

TRUST_ROOT = "trust_root.json"
LOCK_TIMEOUT_SECONDS = 30.0
UNIX_SCHEME = "unix:"

_GENERATE: Mapping[Role, Callable[[], CryptoSigner]] = {
    "evidence": CryptoSigner.generate_ed25519,
    "package": CryptoSigner.generate_ecdsa,
}
# Extras of securesystemslib that bring what a scheme needs.
_EXTRAS = {
    "awskms": "awskms",
    "azurekms": "azurekms",
    "gcpkms": "gcpkms",
    "hv": "vault",
}
_ECDSA_P256 = ("ecdsa", "ecdsa-sha2-nistp256")
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class TrustedKey(BaseModel):
    """A public key in securesystemslib's form, and what it may sign."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Role
    keyid: str = Field(min_length=1)
    keytype: str
    scheme: str
    keyval: dict[str, str]

    @model_validator(mode="after")
    def _readable(self) -> TrustedKey:
        # Keys without "public" and types that nobody implements are ValueErrors.
        key = self.key
        if self.role == "package" and (key.keytype, key.scheme) != _ECDSA_P256:
            raise ValueError("packages are signed with ECDSA P-256 only")
        return self

    @property
    def key(self) -> Key:
        """The key, which verifies signatures."""
        serialized = self.model_dump(include={"keytype", "scheme", "keyval"})
        return Key.from_dict(self.keyid, serialized)


class TrustRoot(BaseModel):
    """The public keys that a reader trusts.

    The first key of a role is the one that signs now; the others are trusted for what
    they signed before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[TrustedKey, ...]

    @model_validator(mode="after")
    def _unambiguous(self) -> TrustRoot:
        names = [(key.role, key.keyid) for key in self.keys]
        if len(set(names)) < len(names):
            raise ValueError("a keyid stands there twice in one role")
        return self

    @property
    def fingerprint(self) -> str:
        """`sha256:<hex>` of its canonical JSON; what verifiers compare out of band."""
        return digest_of(canonical_json(self.model_dump(mode="json")))

    def of_role(self, role: Role) -> list[Key]:
        """The keys of a role, the one that signs now first."""
        return [trusted.key for trusted in self.keys if trusted.role == role]

    def evidence_keys(self) -> list[Key]:
        """Keys that may sign statements and checkpoints."""
        return self.of_role("evidence")

    def package_keys(self) -> list[Key]:
        """Keys that may sign packages."""
        return self.of_role("package")

    def package_key_pems(self) -> list[bytes]:
        """The same as PEM (SubjectPublicKeyInfo), as `model_signing verify key` takes them."""
        return [key.keyval["public"].encode() for key in self.package_keys()]


def create_keys(folder: Path) -> TrustRoot:
    """Makes the keys of an installation, unless there is a trust root already.

    May be called by several processes at once and again after a kill: a key that is
    there is never replaced, and the trust root is written last.

    Raises:
        EvidenceError: others can read or write what is there, or it is no key of its role.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(folder):
        if not os.path.lexists(folder / TRUST_ROOT):
            root = TrustRoot(keys=tuple(_created(folder, role) for role in _GENERATE))
            _write(folder / TRUST_ROOT, root.model_dump_json(indent=2).encode() + b"\n", 0o644)
        return read_trust_root(folder)


def read_trust_root(folder: Path) -> TrustRoot:
    """The trust root of an installation.

    Raises:
        EvidenceError: there is none, others could have changed it, or it is no trust root.
    """
    holds_keys = any(os.path.lexists(private_key_file(folder, role)) for role in _GENERATE)
    _check_folder(folder, _OTHERS if holds_keys else _OTHERS_WRITE)
    for role in _GENERATE:
        if os.path.lexists(path := private_key_file(folder, role)):
            _check_file(path, path.lstat(), _OTHERS)
    path = folder / TRUST_ROOT
    return parse_trust_root(_read(path, _OTHERS_WRITE), str(path))


def parse_trust_root(content: bytes, what: str = "The trust root") -> TrustRoot:
    """Reads `trust_root.json`.

    Args:
        content: the file's bytes.
        what: names it in messages.

    Raises:
        EvidenceError: it is no trust root, or has a key that cannot be used.
    """
    try:
        return TrustRoot.model_validate_json(content)
    except ValidationError as error:
        raise EvidenceError(
            f"{what} is not a trust root",
            expected='{"keys": [{"role", "keyid", "keytype", "scheme", "keyval"}, ...]}',
            found=error,
            cure=f"restore {TRUST_ROOT} from a backup, or from another machine that has it",
        ) from error


def private_key_file(folder: Path, role: Role) -> Path:
    """Where a key folder keeps the private key of a role."""
    return folder / f"{role}.pem"


def evidence_signer(settings: Settings) -> Signer:
    """What signs statements and checkpoints; see `signer_of`."""
    return signer_of(settings, "evidence")


def package_signer(settings: Settings) -> Signer:
    """What signs packages; see `signer_of`."""
    return signer_of(settings, "package")


def signer_of(settings: Settings, role: Role) -> Signer:
    """What signs for a role, as LLMOPS_SIGNER says: key file, signer process or key service.

    Raises:
        EvidenceError: there is no trust root or key, or the key service cannot be used.
    """
    if settings.signer is None:
        return local_signer(settings.key_folder, role)
    key = _current(read_trust_root(settings.key_folder), role, settings.key_folder)
    if settings.signer.startswith(UNIX_SCHEME):
        # Which itself needs this module.
        from llmops_assets.evidence.signer_process import SocketSigner

        return SocketSigner.from_priv_key_uri(settings.signer, key)
    return _key_service(settings.signer, key)


def local_signer(folder: Path, role: Role) -> CryptoSigner:
    """Signs with the private key in a key folder.

    Raises:
        EvidenceError: there is none, others can read it, or the trust root does not have it.
    """
    root = read_trust_root(folder)
    path = private_key_file(folder, role)
    found = _load(path)
    for key in root.of_role(role):
        if key.keyid == found.public_key.keyid and key == found.public_key:
            return found
    raise EvidenceError(
        f"{path} is not a key that the trust root has",
        expected="the private key of one of "
        + (", ".join(key.keyid for key in root.of_role(role)) or "no keys"),
        found=found.public_key.keyid,
        cure=f"put the right key there, or add the public one to {folder / TRUST_ROOT}",
    )


def _current(root: TrustRoot, role: Role, folder: Path) -> Key:
    key = next(iter(root.of_role(role)), None)
    if key is None:
        raise EvidenceError(
            f"The trust root has no key that signs for the role {role}",
            found=", ".join(f"{key.role} {key.keyid}" for key in root.keys) or "no keys",
            cure=f"add the public key of LLMOPS_SIGNER to {folder / TRUST_ROOT}, see "
            "docs/evidence.md",
        )
    return key


def _key_service(uri: str, key: Key) -> Signer:
    scheme = uri.partition(":")[0]
    try:
        return Signer.from_priv_key_uri(uri, key)
    except UnsupportedLibraryError as error:
        extra = _EXTRAS.get(scheme, "crypto")
        raise EvidenceError(
            f"LLMOPS_SIGNER={uri} needs a library that is not installed",
            found=error,
            cure=f"pip install 'securesystemslib[{extra}]' beside this platform",
        ) from error
    except (SignatureError, ValueError, LookupError, OSError) as error:
        # A scheme of key that the service does not know is a KeyError.
        raise EvidenceError(
            f"LLMOPS_SIGNER={uri} cannot sign with key {key.keyid}",
            expected=f"unix:/path/of/a.sock, or a URI of {', '.join(sorted(_EXTRAS))}",
            found=error,
            cure="correct LLMOPS_SIGNER or the trust root, see docs/evidence.md",
        ) from error


def _created(folder: Path, role: Role) -> TrustedKey:
    path = private_key_file(folder, role)
    if not os.path.lexists(path):
        _write(path, _GENERATE[role]().private_bytes, 0o600)
    key = _load(path).public_key
    try:
        return TrustedKey.model_validate({"role": role, "keyid": key.keyid, **key.to_dict()})
    except ValidationError as error:
        raise _wrong_key(path, error) from error


def _load(path: Path) -> CryptoSigner:
    content = _read(path, _OTHERS)
    try:
        private_key = load_pem_private_key(content, password=None)
        return CryptoSigner(private_key)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _wrong_key(path, error) from error


def _wrong_key(path: Path, found: object) -> EvidenceError:
    return EvidenceError(
        f"{path} cannot be used",
        expected="a private key in PEM without password, Ed25519 for evidence, "
        "ECDSA P-256 for packages",
        found=found,
        cure="restore it from a backup; or move it away and run `llmops up`, which makes a new one",
    )


def _check_folder(folder: Path, forbidden: int) -> None:
    try:
        found = folder.lstat()
    except FileNotFoundError as error:
        raise _missing(folder) from error
    if not stat.S_ISDIR(found.st_mode):
        raise EvidenceError(
            f"{folder} is not a folder of its own",
            expected="a folder, and no link to one",
            cure="put the key folder itself there, or set LLMOPS_KEYS to where it is",
        )
    _check_mode(folder, found, forbidden, "700")


def _check_file(path: Path, found: os.stat_result, forbidden: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise EvidenceError(
            f"{path} is not a regular file",
            expected="the file itself, and no link to it",
            cure=f"copy the file to {path}",
        )
    _check_mode(path, found, forbidden, "600" if forbidden == _OTHERS else "644")


def _check_mode(path: Path, found: os.stat_result, forbidden: int, right: str) -> None:
    if stat.S_IMODE(found.st_mode) & forbidden:
        can = "read or write" if forbidden == _OTHERS else "write"
        raise EvidenceError(
            f"Others can {can} {path}",
            expected=f"mode {right}",
            found=f"mode {stat.S_IMODE(found.st_mode):o}",
            cure=f"chmod {right} {path}; if others use this machine, make new keys, see "
            "docs/evidence.md",
        )
    if found.st_uid not in (os.geteuid(), 0):
        raise EvidenceError(
            f"{path} belongs to another user",
            expected=f"user {os.geteuid()} or root",
            found=f"user {found.st_uid}",
            cure="run this as that user, or set LLMOPS_SIGNER to its signer process",
        )


def _read(path: Path, forbidden: int) -> bytes:
    try:
        # Judged by the descriptor: the name could mean another file a moment later.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except OSError as error:
        raise EvidenceError(
            f"{path} cannot be read",
            expected="a regular file of this user, and no link to one",
            found=error.strerror,
            cure="put the file itself there; if another user holds the keys, set LLMOPS_SIGNER "
            f"to its signer process and copy {TRUST_ROOT} to LLMOPS_KEYS",
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        _check_file(path, os.fstat(file.fileno()), forbidden)
        return file.read()


def _missing(path: Path) -> EvidenceError:
    return EvidenceError(
        f"There is no {path}",
        expected="the keys or the trust root of this installation",
        cure="run `llmops up`, which makes them; or restore them, and set LLMOPS_KEYS to their "
        "folder",
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    """Writes a new file, whole or not at all. The caller holds the folder's lock."""
    beside = path.with_name(path.name + ".new")
    beside.unlink(missing_ok=True)  # of a process that was killed
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "lock", mode=0o600)
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_SECONDS)
    except Timeout as error:
        raise EvidenceError(
            f"Another process is making the keys in {folder}",
            expected=f"its end within {LOCK_TIMEOUT_SECONDS:.0f} s",
            cure="end it if it hangs, then try again",
        ) from error
    try:
        yield
    finally:
        lock.release()
