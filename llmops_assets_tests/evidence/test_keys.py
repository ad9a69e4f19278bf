"""Keys are made once, stay with their user, and decide whose signatures count."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pydantic import ValidationError
from securesystemslib.exceptions import UnverifiedSignatureError

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence import keys
from llmops_assets.evidence.keys import (
    TRUST_ROOT,
    CryptoSigner,
    TrustedKey,
    TrustRoot,
    create_keys,
    evidence_signer,
    package_signer,
    parse_trust_root,
    private_key_file,
    read_trust_root,
)
from llmops_assets.settings import Settings

CREATE = (
    "import sys; from pathlib import Path; from llmops_assets.evidence.keys import create_keys; "
    "print(create_keys(Path(sys.argv[1])).fingerprint)"
)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An installation with keys."""
    settings = Settings(state=tmp_path / "state")
    create_keys(settings.key_folder)
    return settings


def pem(private_key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.touch(mode=0o600)
    path.write_bytes(content)


def trusted(role: keys.Role, signer: CryptoSigner) -> TrustedKey:
    public = signer.public_key
    return TrustedKey.model_validate({"role": role, "keyid": public.keyid, **public.to_dict()})


def test_keys_are_this_users_alone_whatever_the_umask(tmp_path: Path) -> None:
    """Who reads a key can forge every verdict."""
    umask = os.umask(0)
    try:
        create_keys(tmp_path / "a" / "keys")
    finally:
        os.umask(umask)
    folder = tmp_path / "a" / "keys"
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert modes == {"evidence.pem": 0o600, "package.pem": 0o600, TRUST_ROOT: 0o644, "lock": 0o600}


def test_each_role_has_the_key_that_its_verifiers_take(settings: Settings) -> None:
    """model-signing verifies no Ed25519, and a key must not sign for another role."""
    root = read_trust_root(settings.key_folder)
    assert [(key.role, key.scheme) for key in root.keys] == [
        ("evidence", "ed25519"), ("package", "ecdsa-sha2-nistp256"),
    ]  # fmt: skip
    for signer, verifiers, others in (
        (evidence_signer(settings), root.evidence_keys(), root.package_keys()),
        (package_signer(settings), root.package_keys(), root.evidence_keys()),
    ):
        signature = signer.sign(b"something")
        verifiers[0].verify_signature(signature, b"something")
        with pytest.raises(UnverifiedSignatureError):
            verifiers[0].verify_signature(signature, b"something else")
        assert signature.keyid not in {key.keyid for key in others}


def test_keys_are_never_replaced(settings: Settings) -> None:
    """`llmops up` runs every day; with other keys, all evidence would look forged."""
    folder = settings.key_folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    root = read_trust_root(folder)
    assert create_keys(folder) == root
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    # Also if the process was killed before it wrote the trust root.
    (folder / TRUST_ROOT).unlink()
    assert create_keys(folder).fingerprint == root.fingerprint
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_trust_root_without_keys_gets_none(settings: Settings) -> None:
    """Where a signer process holds the keys, others here would sign what nobody trusts."""
    folder = settings.key_folder
    private_key_file(folder, "evidence").unlink()
    private_key_file(folder, "package").unlink()
    create_keys(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["lock", TRUST_ROOT]


def test_processes_at_once_agree_on_the_keys(tmp_path: Path) -> None:
    """Two `llmops up` at once must not sign with different keys."""

    def create(_: int) -> str:
        command = [sys.executable, "-c", CREATE, str(tmp_path / "keys")]
        return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout.decode()

    with ThreadPoolExecutor(4) as pool:
        fingerprints = set(pool.map(create, range(4)))
    assert len(fingerprints) == 1
    assert fingerprints == {read_trust_root(tmp_path / "keys").fingerprint + "\n"}


@pytest.mark.parametrize("writes", [0, 1, 2])
@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_kill_at_any_write_leaves_whole_keys_or_none(
    tmp_path: Path, writes: int, step: str
) -> None:
    """Half a key, or a trust root without its keys, would stop the installation for good."""
    folder = tmp_path / "keys"
    child = os.fork()
    if child == 0:
        calls = 0
        module, name = (os, "fsync") if step == "fsync" else (Path, "rename")
        real: Callable[..., object] = getattr(module, name)

        def killed(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            # A write flushes its file and its folder.
            if calls > writes * (2 if step == "fsync" else 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(module, name, killed)
        create_keys(folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    whole = {path.name: path.read_bytes() for path in folder.glob("*.pem")}
    assert len(whole) == writes
    create_keys(folder)
    assert {name: (folder / name).read_bytes() for name in whole} == whole
    settings = Settings(state=tmp_path, keys=folder)
    for signer in (evidence_signer(settings), package_signer(settings)):
        assert signer.sign(b"x").signature
    assert not list(folder.glob("*.new"))


def test_the_fingerprint_is_that_of_the_canonical_form(settings: Settings) -> None:
    """An auditor who has it on paper must get it from any copy, however it is laid out."""
    content = json.loads((settings.key_folder / TRUST_ROOT).read_bytes())
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    root = read_trust_root(settings.key_folder)
    assert root.fingerprint == "sha256:" + hashlib.sha256(canonical).hexdigest()
    assert parse_trust_root(json.dumps(content, indent=7).encode()).fingerprint == root.fingerprint


@pytest.mark.parametrize(
    ("name", "mode", "refused"),
    [
        ("evidence.pem", 0o640, True), ("evidence.pem", 0o604, True), ("package.pem", 0o602, True),
        (".", 0o750, True), (".", 0o701, True), (TRUST_ROOT, 0o664, True),
        (TRUST_ROOT, 0o646, True), (TRUST_ROOT, 0o600, False), ("evidence.pem", 0o400, False),
    ],
)  # fmt: skip
def test_what_others_can_reach_is_refused(
    settings: Settings, name: str, mode: int, refused: bool
) -> None:
    """A key that a colleague can read proves nothing; better to hear of it before it signs."""
    path = settings.key_folder / name
    path.chmod(mode)
    if not refused:
        evidence_signer(settings)
        return
    with pytest.raises(EvidenceError, match=f"mode {mode:o}.*chmod"):
        read_trust_root(settings.key_folder)
    with pytest.raises(EvidenceError, match=f"mode {mode:o}.*chmod"):
        evidence_signer(settings)


def test_a_trust_root_alone_may_be_read_by_others(settings: Settings) -> None:
    """It is public, and a worker needs it where another user holds the keys."""
    folder = settings.key_folder
    private_key_file(folder, "evidence").unlink()
    private_key_file(folder, "package").unlink()
    folder.chmod(0o755)
    assert read_trust_root(folder).keys
    folder.chmod(0o775)
    with pytest.raises(EvidenceError, match="Others can write"):
        read_trust_root(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_another_users_files_are_refused(settings: Settings) -> None:
    """Whoever owns a file can open it to themselves at any time."""
    os.chown(settings.key_folder / "evidence.pem", 65534, 65534)
    with pytest.raises(EvidenceError, match="belongs to another user"):
        evidence_signer(settings)


@pytest.mark.parametrize("name", ["evidence.pem", TRUST_ROOT])
def test_links_are_refused(settings: Settings, tmp_path: Path, name: str) -> None:
    """A link's target may lie where others write."""
    path = settings.key_folder / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EvidenceError, match=f"{name} .*no link"):
        evidence_signer(settings)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(EvidenceError, match="regular file"):
        evidence_signer(settings)


def test_a_linked_folder_is_refused(settings: Settings, tmp_path: Path) -> None:
    """As a link of a file."""
    settings.key_folder.rename(tmp_path / "elsewhere")
    settings.key_folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EvidenceError, match="no link"):
        read_trust_root(settings.key_folder)


def test_no_keys_says_what_makes_them(tmp_path: Path) -> None:
    """The first thing a new user meets if they skip a step."""
    for folder in (tmp_path / "nothing", tmp_path):
        tmp_path.chmod(0o700)
        with pytest.raises(EvidenceError, match="llmops up"):
            read_trust_root(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"not a key", pem(rsa.generate_private_key(65537, 2048)),
        pem(ec.generate_private_key(ec.SECP256R1())), pem(ec.generate_private_key(ec.SECP256K1())),
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
    ],
)  # fmt: skip
def test_another_kind_of_key_does_not_sign(settings: Settings, content: bytes) -> None:
    """A key that the trust root does not have would sign what nobody can verify."""
    replace(private_key_file(settings.key_folder, "evidence"), content)
    with pytest.raises(EvidenceError, match=r"cannot be used|not a key that"):
        evidence_signer(settings)


def test_a_wrong_kind_of_key_makes_no_trust_root(tmp_path: Path) -> None:
    """A package key on another curve would fail only when the first slot loads."""
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    path = private_key_file(folder, "package")
    path.touch(mode=0o600)
    path.write_bytes(pem(ec.generate_private_key(ec.SECP384R1())))
    with pytest.raises(EvidenceError, match="ECDSA P-256"):
        create_keys(folder)
    assert not (folder / TRUST_ROOT).exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key | {"role": "approver"},
        lambda key: key | {"scheme": "none"},
        lambda key: key | {"keyval": {}},
        lambda key: key | {"keyid": ""},
        lambda key: key | {"expires": "never"},
        lambda key: key | {"role": "package"},
    ],
)
def test_what_is_no_trusted_key_is_refused(
    settings: Settings, change: Callable[[dict[str, object]], dict[str, object]]
) -> None:
    """A trust root that is half understood would trust something else than it says."""
    key = read_trust_root(settings.key_folder).keys[0].model_dump()
    with pytest.raises((ValidationError, ValueError)):
        TrustRoot.model_validate({"keys": [change(key)]})
    with pytest.raises(ValidationError, match="twice"):
        TrustRoot.model_validate({"keys": [key, key]})
    with pytest.raises(EvidenceError, match=r"(?s)is not a trust root.*backup"):
        parse_trust_root(b'{"keys": [7]}')


def test_after_rotation_the_new_key_signs_and_the_old_is_still_trusted(settings: Settings) -> None:
    """What was signed with the old key stays true; only new evidence needs the new one."""
    folder = settings.key_folder
    old_root = read_trust_root(folder)
    old = evidence_signer(settings).sign(b"before")
    new = CryptoSigner.generate_ed25519()
    rotated = TrustRoot(keys=(trusted("evidence", new), *old_root.keys))
    (folder / TRUST_ROOT).write_text(rotated.model_dump_json())
    # The new public key may be there before its private one.
    assert evidence_signer(settings).sign(b"between").keyid == old.keyid
    replace(private_key_file(folder, "evidence"), new.private_bytes)
    assert evidence_signer(settings).sign(b"after").keyid == new.public_key.keyid
    root = read_trust_root(folder)
    assert root.fingerprint != old_root.fingerprint
    trusted_keys = {key.keyid: key for key in root.evidence_keys()}
    trusted_keys[old.keyid].verify_signature(old, b"before")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("awskms:alias/llmops", r"securesystemslib\[awskms\]"),
        ("gcpkms:projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1", "gcpkms"),
        ("hv:llmops/1", r"securesystemslib\[vault\]"),
        ("sigstore:", "docs/evidence.md"),
        ("carrier-pigeon:home", "docs/evidence.md"),
    ],
)
def test_a_key_service_that_cannot_be_used_says_why(
    settings: Settings, uri: str, message: str
) -> None:
    """It must not fall back to the key file, and must name what to install."""
    configured = settings.model_copy(update={"signer": uri})
    with pytest.raises(EvidenceError, match=message):
        evidence_signer(configured)


def test_a_key_service_signs_with_the_key_of_the_trust_root(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One P-256 key of a service may have both roles, as a setting has room for one URI."""
    service = CryptoSigner.generate_ecdsa()
    asked: list[str] = []

    class Service(CryptoSigner):
        @classmethod
        def from_priv_key_uri(cls, priv_key_uri, public_key, secrets_handler=None):  # type: ignore[no-untyped-def]
            asked.append(priv_key_uri)
            assert public_key == service.public_key
            return service

    from securesystemslib.signer import _signer

    monkeypatch.setitem(_signer.SIGNER_FOR_URI_SCHEME, "awskms", Service)
    folder = settings.key_folder
    for role in ("evidence", "package"):
        private_key_file(folder, role).unlink()
    root = TrustRoot(keys=(trusted("evidence", service), trusted("package", service)))
    (folder / TRUST_ROOT).write_text(root.model_dump_json())
    configured = settings.model_copy(update={"signer": "awskms:alias/llmops"})
    for signer in (evidence_signer(configured), package_signer(configured)):
        root.evidence_keys()[0].verify_signature(signer.sign(b"x"), b"x")
    assert asked == ["awskms:alias/llmops"] * 2
    (folder / TRUST_ROOT).write_text(TrustRoot(keys=root.keys[:1]).model_dump_json())
    with pytest.raises(EvidenceError, match="no key that signs for the role package"):
        package_signer(configured)


def test_importing_keys_is_cheap() -> None:
    """Every process of the platform imports them; Sigstore's libraries take a second."""
    heavy = "'model_signing', 'sigstore', 'torch', 'mlflow', 'boto3', 'dagster'"
    code = (
        "import sys, llmops_assets.evidence.keys, llmops_assets.evidence.package_signature, "
        "llmops_assets.evidence.signer_process; "
        f"print([name for name in ({heavy}) if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, timeout=60
    )
    assert found.stdout.decode().strip() == "[]"
