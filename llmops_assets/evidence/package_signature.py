"""Signatures of packages: OpenSSF Model Signing v1.0, in a Sigstore bundle.

A signature is an in-toto Statement that names every file of the package with its digest,
in a DSSE envelope, in a bundle: what `model_signing sign key` writes, and what
`model_signing verify key` checks (https://github.com/ossf/model-signing-spec). The bytes
are hashed by that library; the envelope is signed here, as the library signs only with a
key file or PKCS #11, and ours may be in a signer process or a key service.

A signature lies beside its package, never in it: it is an artifact of its own under the
ref `signatures/<hex digest of the package>`.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmops_assets.errors import ArtifactCorruptError, EvidenceError, RefConflictError, StoreError
from llmops_assets.evidence import dsse
from llmops_assets.evidence.keys import TrustRoot, package_signer, read_trust_root
from llmops_assets.evidence.statements import PAYLOAD_TYPE, SHA256, LowerHex, Statement, Subject
from llmops_assets.settings import Settings
from llmops_assets.storage.store import Artifact, Store, check_digest

BUNDLE_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
SIGNATURE_FILE = "model.sig"

logger = logging.getLogger(__name__)


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


class _PublicKeyIdentifier(_Form):
    hint: str
    """Hex SHA-256 of the public key's PEM; `model_signing` compares it."""


class _VerificationMaterial(_Form):
    public_key: _PublicKeyIdentifier = Field(alias="publicKey")
    tlog_entries: tuple[()] = Field(alias="tlogEntries", default=())


class _Bundle(_Form):
    """The part of Sigstore's bundle that signatures with a key have."""

    media_type: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"] = Field(alias="mediaType")
    verification_material: _VerificationMaterial = Field(alias="verificationMaterial")
    dsse_envelope: dsse.Envelope = Field(alias="dsseEnvelope")


class _Resource(_Form):
    name: str
    algorithm: Literal["sha256"]
    digest: LowerHex


class _Serialization(_Form):
    """How the files were hashed: each one whole, and none left out."""

    method: Literal["files"] = "files"
    hash_type: Literal["sha256"] = "sha256"
    allow_symlinks: Literal[False] = False
    ignore_paths: tuple[()] = ()


class _Predicate(_Form):
    serialization: _Serialization
    resources: tuple[_Resource, ...]


def sign_package(directory: Path, digest: str, signer: dsse.Signer) -> bytes:
    """Signs the files of a package.

    Args:
        directory: the package's files.
        digest: the package's digest; the signature names it.
        signer: has an ECDSA P-256 key.

    Returns:
        The bundle, JSON, which people call `model.sig`.

    Raises:
        EvidenceError: the signer does not sign, or the directory has a symbolic link.
    """
    return _sign(_hashed(directory), digest, signer)


def verify_package(
    directory: Path, signature: bytes, root: TrustRoot, digest: str | None = None
) -> None:
    """Checks that a directory has exactly the files that were signed.

    Args:
        directory: the package's files.
        signature: what `sign_package` returned.
        root: says whose signatures count.
        digest: the package's digest, if the reader knows it.

    Raises:
        EvidenceError: no trusted key signed, or naming every file that differs.
    """
    check_files(_hashed(directory), signed_files(signature, root, digest), str(directory))


def signed_files(signature: bytes, root: TrustRoot, digest: str | None = None) -> dict[str, str]:
    """The files that a signature is about: digest by path. Reads no file.

    Raises:
        EvidenceError: it is no signature of a package, not by a trusted key, or about
            another package than `digest`.
    """
    what = "The package's signature" if digest is None else f"The signature of package {digest}"
    try:
        bundle = _Bundle.model_validate_json(signature)
    except ValidationError as error:
        raise _not_a_signature(what, error) from error
    statement = Statement.parse(
        dsse.verified_payload(bundle.dsse_envelope, PAYLOAD_TYPE, root.package_keys(), what)
    )
    try:
        if statement.predicate_type != PREDICATE_TYPE:
            raise ValueError(f"a statement of type {statement.predicate_type}")
        predicate = _Predicate.model_validate(statement.predicate)
        files = {file.name: f"{SHA256}:{file.digest}" for file in predicate.resources}
        (subject,) = statement.subject
        if len(files) < len(predicate.resources) or subject != _subject(files, subject.name):
            raise ValueError("files that its subject does not summarise")
    except ValueError as error:
        raise _not_a_signature(what, error) from error
    if digest is not None and subject.name != digest:
        raise EvidenceError(
            f"{what} is about another package",
            expected=digest,
            found=subject.name,
            cure="materialize packaged_model of the release again, which signs the package",
        )
    return files


def check_files(found: Mapping[str, str], signed: Mapping[str, str], where: str) -> None:
    """Compares files with those that were signed; both are digests by path.

    Raises:
        EvidenceError: naming what is missing, extra or different.
    """
    problems = [f"{path} is missing" for path in sorted(signed.keys() - found.keys())]
    problems += [f"{path} is not signed" for path in sorted(found.keys() - signed.keys())]
    problems += [
        f"{path} has other bytes"
        for path in sorted(found.keys() & signed.keys())
        if found[path] != signed[path]
    ]
    if problems:
        raise EvidenceError(
            f"{where} is not the package that was signed",
            expected=f"the {len(signed)} files that the signature names",
            found="; ".join(problems),
            cure="check the disk and who can write there, then deploy the release again",
        )


def sign_once(store: Store, digest: str, settings: Settings) -> str:
    """Makes sure that the store has a valid signature of a package.

    May be repeated, and run by several processes at once: all get the same signature. One
    that is damaged, or that no trusted key made, as after new keys, is replaced.

    Returns:
        Digest of the signature's artifact.

    Raises:
        EvidenceError: there are no keys, or the signer does not sign.
        ArtifactCorruptError: the package's bytes are damaged.
    """
    root = read_trust_root(settings.key_folder)
    ref = _ref(digest)
    while True:
        present = store.resolve(ref)
        if present is not None and _is_valid(store, digest, root):
            return present
        package, directory = store.open(digest)
        with tempfile.TemporaryDirectory() as folder:
            signature = _sign(_unchanged(package, directory), digest, package_signer(settings))
            (Path(folder) / SIGNATURE_FILE).write_bytes(signature)
            made = store.put(Path(folder), BUNDLE_MEDIA_TYPE).digest
        try:
            store.compare_and_set(ref, present, made)
        except RefConflictError:
            continue  # somebody else signed meanwhile: theirs is taken
        return made


def signature_of(store: Store, digest: str) -> bytes | None:
    """The signature of a package, or None if it was never signed.

    Raises:
        StoreError: it is damaged or gone.
    """
    artifact = store.resolve(_ref(digest))
    return None if artifact is None else (store.open(artifact)[1] / SIGNATURE_FILE).read_bytes()


def require_signature(store: Store, digest: str) -> bytes:
    """The signature of a package.

    Raises:
        EvidenceError: it was never signed.
    """
    signature = signature_of(store, digest)
    if signature is None:
        raise EvidenceError(
            f"Package {digest} has no signature",
            expected=f"one under the ref {_ref(digest)}",
            cure="materialize packaged_model of the release again, which signs the package",
        )
    return signature


def _ref(digest: str) -> str:
    return f"signatures/{check_digest(digest)}"


def _is_valid(store: Store, digest: str, root: TrustRoot) -> bool:
    try:
        signed_files(require_signature(store, digest), root, digest)
    except (EvidenceError, StoreError) as error:
        logger.warning("signing package %s again: %s", digest, error)
        return False
    return True


def _unchanged(package: Artifact, directory: Path) -> dict[str, str]:
    """Digests of the files, hashed again, as what is signed must be what the store holds."""
    found = _hashed(directory)
    expected = {file.path: file.digest for file in package.files}
    if found != expected:
        raise ArtifactCorruptError(
            f"Package {package.digest} changed while it was signed",
            expected=expected,
            found=found,
            cure="check the store's disk and who can write there, then materialize "
            "packaged_model again",
        )
    return found


def _hashed(directory: Path) -> dict[str, str]:
    # Loads Sigstore's libraries, which servers that only check a signature can do without.
    from model_signing import hashing

    # It leaves .git* out unless told otherwise, and what is left out is not signed.
    config = hashing.Config().set_ignored_paths(paths=(), ignore_git_paths=False)
    try:
        manifest = config.hash(directory)
    except (OSError, ValueError) as error:
        raise EvidenceError(
            f"{directory} cannot be hashed",
            expected="a folder of regular files, without symbolic links",
            found=error,
            cure="make the package again; it may hold copies only",
        ) from error
    return {
        file.identifier: f"{SHA256}:{file.digest.digest_hex}"
        for file in manifest.resource_descriptors()
    }


def _sign(files: Mapping[str, str], digest: str, signer: dsse.Signer) -> bytes:
    predicate = _Predicate(
        serialization=_Serialization(),
        resources=tuple(
            _Resource(name=path, algorithm=SHA256, digest=check_digest(files[path]))
            for path in sorted(files)
        ),
    )
    statement = Statement(
        subject=(_subject(files, digest),),
        predicate_type=PREDICATE_TYPE,
        predicate=predicate.model_dump(mode="json"),
    )
    bundle = {
        "mediaType": BUNDLE_MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": _hint(signer)}, "tlogEntries": []},
        "dsseEnvelope": dsse.sign(statement.payload(), PAYLOAD_TYPE, signer).model_dump(
            mode="json"
        ),
    }
    return _Bundle.model_validate(bundle).model_dump_json().encode()


def _subject(files: Mapping[str, str], name: str) -> Subject:
    """The subject as the specification has it: the hash of all files' raw digests."""
    summary = hashlib.sha256()
    for path in sorted(files):
        summary.update(bytes.fromhex(check_digest(files[path])))
    return Subject(name=name, digest={SHA256: summary.hexdigest()})


def _hint(signer: dsse.Signer) -> str:
    pem = load_pem_public_key(signer.public_key.keyval["public"].encode()).public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(pem).hexdigest()


def _not_a_signature(what: str, found: object) -> EvidenceError:
    return EvidenceError(
        f"{what} cannot be read",
        expected=f"a Sigstore bundle with a statement {PREDICATE_TYPE} over all files",
        found=found,
        cure="materialize packaged_model of the release again, which signs the package",
    )
