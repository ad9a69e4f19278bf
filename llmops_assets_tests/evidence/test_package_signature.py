"""A package is served only if a trusted key signed exactly its bytes."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmops_assets.errors import ArtifactCorruptError, EvidenceError
from llmops_assets.evidence import dsse
from llmops_assets.evidence.keys import (
    TRUST_ROOT,
    TrustRoot,
    create_keys,
    local_signer,
    package_signer,
    private_key_file,
    read_trust_root,
)
from llmops_assets.evidence.package_signature import (
    BUNDLE_MEDIA_TYPE,
    SIGNATURE_FILE,
    require_signature,
    sign_once,
    sign_package,
    signature_of,
    signed_files,
    verify_package,
)
from llmops_assets.evidence.statements import DECISION, PAYLOAD_TYPE, Statement
from llmops_assets.serving.slot_process import (
    EXIT_REFUSED,
    PACKAGE,
    SLOT_FILE,
    SlotFile,
    place,
    read_slot,
    verify,
    verify_signature,
)
from llmops_assets.serving.slots import Deployment, Endpoint
from llmops_assets.settings import Settings
from llmops_assets.storage.folder import FolderStore
from llmops_assets.storage.store import Artifact, hash_file

pytestmark = pytest.mark.timeout(60)

MODEL_SIGNING = Path(sys.executable).with_name("model_signing")
CODE = Path("repository/m/version/model.py")


class Rig:
    """An installation with a package in its store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(state=folder / "state")
        self.root = create_keys(self.settings.key_folder)
        self.store = FolderStore(self.settings.store)
        self.directory = folder / "package"
        for name, content in {
            CODE: "code", Path("repository/m/version/engine/weights"): "weights",
            Path("repository/m/config.pbtxt"): 'name: "m"', Path("package.json"): "{}",
            Path("README.md"): "for people", Path(".gitattributes"): "*",
        }.items():  # fmt: skip
            (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
            (self.directory / name).write_text(content)
        self.package = self.store.put(self.directory, "application/vnd.llmops.test")
        self.slot = folder / "slot"

    def sign(self) -> bytes:
        signer = package_signer(self.settings)
        return sign_package(self.directory, self.package.digest, signer)

    def place(self, signature: bytes) -> SlotFile:
        deployment = Deployment(self.package.digest, "m.v1", 3)
        return place(
            self.directory, self.package, deployment, "m", Endpoint("127.0.0.1", 1, 2, 3),
            self.slot, signature,
        )  # fmt: skip


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def other_keys(folder: Path) -> dsse.Signer:
    """The package key of somebody else."""
    create_keys(folder)
    return local_signer(folder, "package")


def test_the_command_of_model_signing_verifies_it(rig: Rig) -> None:
    """An auditor must not need our code to check what was signed."""
    (rig.directory / ".gitattributes").unlink()  # which that command leaves out by itself
    signature, key = rig.folder / SIGNATURE_FILE, rig.folder / "package.pub"
    signature.write_bytes(rig.sign())
    key.write_bytes(rig.root.package_key_pems()[0])

    def verified() -> subprocess.CompletedProcess[str]:
        options = ["--signature", str(signature), "--public_key", str(key)]
        command = [str(MODEL_SIGNING), "verify", "key", str(rig.directory), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert verified().returncode == 0, verified().stderr
    (rig.directory / CODE).write_text("Code")
    changed = verified()
    assert changed.returncode != 0
    assert str(CODE) in changed.stderr


def change(directory: Path) -> None:
    (directory / CODE).write_text("Code")


def remove(directory: Path) -> None:
    (directory / CODE).unlink()


def add(directory: Path) -> None:
    (directory / CODE).with_name("sitecustomize.py").write_text("evil")


def add_ignored(directory: Path) -> None:
    (directory / ".gitignore").write_text("model_signing leaves it out by itself")


def rename(directory: Path) -> None:
    (directory / CODE).rename((directory / CODE).with_name("other.py"))


def link(directory: Path) -> None:
    (directory / CODE).rename(directory.parent / "model.py")
    (directory / CODE).symlink_to(directory.parent / "model.py")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change, r"model\.py has other bytes"), (remove, r"model\.py is missing"),
        (add, r"sitecustomize\.py is not signed"), (add_ignored, r"\.gitignore is not signed"),
        (rename, r"version/model\.py is missing; .*other\.py is not signed"),
        (link, r"model\.py"),
    ],
)  # fmt: skip
def test_every_difference_is_named(rig: Rig, damage: Callable[[Path], None], message: str) -> None:
    """Whoever is woken by a refusal must know which file to look at."""
    signature = rig.sign()
    verify_package(rig.directory, signature, rig.root, rig.package.digest)
    damage(rig.directory)
    with pytest.raises(EvidenceError, match=message):
        verify_package(rig.directory, signature, rig.root)


def resigned(rig: Rig, edit: Callable[[dict[str, Any]], object], role: str = "package") -> bytes:
    """A signature by a trusted key over another statement than the platform writes."""
    bundle = json.loads(rig.sign())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    edit(statement)
    payload = Statement.model_validate(statement).payload()
    signer = local_signer(rig.settings.key_folder, "package" if role == "package" else "evidence")
    bundle["dsseEnvelope"] = dsse.sign(payload, PAYLOAD_TYPE, signer).model_dump(mode="json")
    return json.dumps(bundle).encode()


@pytest.mark.parametrize(
    "edit",
    [
        lambda it: it.update(predicateType=DECISION),
        lambda it: it["subject"][0]["digest"].update(sha256="0" * 64),
        lambda it: it["predicate"]["resources"].pop(),
        lambda it: it["predicate"]["resources"].append(it["predicate"]["resources"][0]),
        lambda it: it["predicate"]["resources"][0].update(algorithm="blake2"),
        lambda it: it["predicate"]["serialization"].update(ignore_paths=["repository"]),
        lambda it: it["predicate"]["serialization"].update(allow_symlinks=True),
        lambda it: it["predicate"].update(more="than we understand"),
        lambda it: it["subject"].append({"name": "b", "digest": {"sha256": "0" * 64}}),
    ],
)
def test_a_signed_statement_that_says_something_else_is_refused(
    rig: Rig, edit: Callable[[dict[str, Any]], object]
) -> None:
    """The same key could sign a statement that leaves files out, or that is no signature."""
    signed_files(resigned(rig, lambda _: None), rig.root, rig.package.digest)
    with pytest.raises(EvidenceError, match="cannot be read"):
        signed_files(resigned(rig, edit), rig.root, rig.package.digest)


def test_only_package_keys_count(rig: Rig, tmp_path: Path) -> None:
    """The key beside a package is the attacker's own; and one for evidence is for evidence."""
    stranger = sign_package(rig.directory, rig.package.digest, other_keys(tmp_path / "other"))
    for signature in (stranger, resigned(rig, lambda _: None, role="evidence")):
        with pytest.raises(EvidenceError, match="No trusted key signed"):
            signed_files(signature, rig.root)
    with pytest.raises(EvidenceError, match="No key is trusted"):
        signed_files(rig.sign(), TrustRoot(keys=rig.root.keys[:1]))


def test_a_signature_is_about_one_package(rig: Rig) -> None:
    """The signature of what was approved must not let something else in."""
    with pytest.raises(EvidenceError, match="about another package"):
        signed_files(rig.sign(), rig.root, "sha256:" + "1" * 64)


def test_every_changed_byte_of_a_signature_is_refused(rig: Rig) -> None:
    """What the signature does not cover in its own file must at least change nothing."""
    signature = rig.sign()
    signed = signed_files(signature, rig.root)
    accepted = 0
    for position in range(len(signature)):
        changed = bytearray(signature)
        changed[position] ^= 1
        try:
            assert signed_files(bytes(changed), rig.root) == signed
            accepted += 1
        except EvidenceError:
            pass
    # The hint, which only helps to find the key, and is not looked at.
    assert accepted == 64


def test_it_is_signed_once_however_often_it_is_asked_for(rig: Rig) -> None:
    """A step that is run again, and a release that reuses a package, must change nothing."""
    first = sign_once(rig.store, rig.package.digest, rig.settings)
    assert sign_once(rig.store, rig.package.digest, rig.settings) == first
    assert rig.store.describe(first).media_type == BUNDLE_MEDIA_TYPE
    signature = signature_of(rig.store, rig.package.digest)
    assert signature is not None
    verify_package(rig.directory, signature, rig.root, rig.package.digest)
    # Beside the package, not in it.
    assert rig.store.describe(rig.package.digest) == rig.package


def test_signers_at_once_take_the_same_signature(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """ECDSA signatures differ each time; two releases of one package must name the same."""
    both = threading.Barrier(2, timeout=20)
    put = FolderStore.put

    def put_together(store: FolderStore, directory: Path, media_type: str) -> Artifact:
        made = put(store, directory, media_type)
        both.wait()
        return made

    monkeypatch.setattr(FolderStore, "put", put_together)
    found: list[str] = []

    def sign() -> None:
        store = FolderStore(rig.settings.store)
        found.append(sign_once(store, rig.package.digest, rig.settings))

    threads = [threading.Thread(target=sign) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 2
    assert len(set(found)) == 1


def test_an_unusable_signature_is_replaced(rig: Rig, tmp_path: Path) -> None:
    """After keys were lost, or a blob was damaged, running the step again must be the cure."""
    first = sign_once(rig.store, rig.package.digest, rig.settings)
    for name in (TRUST_ROOT, "package.pem"):
        (rig.settings.key_folder / name).unlink()
    root = create_keys(rig.settings.key_folder)
    second = sign_once(rig.store, rig.package.digest, rig.settings)
    assert second != first
    entry = rig.store.describe(second).files[0]
    damaged = rig.store.root / "blobs" / entry.digest.replace(":", "/")
    damaged.chmod(0o600)
    damaged.write_bytes(b"{}")
    for checkout in (rig.store.root / "checkouts").rglob(SIGNATURE_FILE):
        checkout.chmod(0o600)
        checkout.write_bytes(b"{}")
    third = sign_once(rig.store, rig.package.digest, rig.settings)
    assert third not in (first, second)
    signed_files(require_signature(rig.store, rig.package.digest), root, rig.package.digest)


def test_what_changed_in_the_store_is_not_signed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signature over damaged bytes would make the damage official."""
    opened = rig.store.open

    def changed(digest: str) -> tuple[Artifact, Path]:
        package, directory = opened(digest)
        (directory / CODE).chmod(0o600)
        (directory / CODE).write_text("Code")
        return package, directory

    monkeypatch.setattr(rig.store, "open", changed)
    with pytest.raises(ArtifactCorruptError, match="changed while"):
        sign_once(rig.store, rig.package.digest, rig.settings)
    assert signature_of(rig.store, rig.package.digest) is None


def test_an_unsigned_package_says_what_signs_it(rig: Rig) -> None:
    """A package that was made before there were signatures needs one step, not a new release."""
    with pytest.raises(EvidenceError, match="materialize packaged_model"):
        require_signature(rig.store, rig.package.digest)


def test_the_bytes_in_a_slot_are_those_that_were_signed(rig: Rig) -> None:
    """The slot renames the version folder and leaves out what is for people: nothing else."""
    slot = rig.place(rig.sign())
    verify_signature(rig.slot, slot, rig.root)
    verify(rig.slot, slot)
    assert {entry.path for entry in slot.manifest} >= {"repository/m/3/model.py", "package.json"}


def forge(rig: Rig) -> str:
    """Changed bytes, and a slot file that says they are right."""
    code = rig.slot / PACKAGE / "repository" / "m" / "3" / "model.py"
    code.chmod(0o600)
    code.write_text("evil")
    return rewrite(rig, code, "repository/m/3/model.py has other bytes")


def smuggle(rig: Rig) -> str:
    """A file more, and a slot file that lists it."""
    code = rig.slot / PACKAGE / "repository" / "m" / "3" / "sitecustomize.py"
    code.write_text("evil")
    return rewrite(rig, code, r"repository/m/3/sitecustomize\.py is not signed")


def rewrite(rig: Rig, file: Path, message: str) -> str:
    slot = read_slot(rig.slot)
    assert slot is not None
    path = file.relative_to(rig.slot / PACKAGE).as_posix()
    entry = replace(slot.manifest[0], path=path, digest=hash_file(file), size=file.stat().st_size)
    kept = tuple(other for other in slot.manifest if other.path != path)
    changed = slot.model_copy(update={"manifest": (*kept, entry)})
    (rig.slot / SLOT_FILE).write_text(changed.model_dump_json())
    verify(rig.slot, changed)  # the slot file alone is no witness
    return message


def unsign(rig: Rig) -> str:
    (rig.slot / SIGNATURE_FILE).unlink()
    return "without a signature.*materialize packaged_model"


def sign_with_another_key(rig: Rig) -> str:
    """As somebody does who may write everything but the trust root."""
    signer = other_keys(rig.folder / "other")
    forged = sign_package(rig.directory, rig.package.digest, signer)
    (rig.slot / SIGNATURE_FILE).write_bytes(forged)
    return "No trusted key signed"


def lose_trust_root(rig: Rig) -> str:
    (rig.settings.key_folder / TRUST_ROOT).unlink()
    return "llmops up"


def open_trust_root(rig: Rig) -> str:
    (rig.settings.key_folder / TRUST_ROOT).chmod(0o666)
    return "chmod 644"


@pytest.mark.parametrize(
    "attack",
    [forge, smuggle, unsign, sign_with_another_key, lose_trust_root, open_trust_root],
)
def test_a_slot_does_not_load_what_was_not_signed(rig: Rig, attack: Callable[[Rig], str]) -> None:
    """Right before every load, also weeks after the deployment, and saying what to do."""
    rig.place(rig.sign())
    message = attack(rig)
    process = subprocess.run(
        [sys.executable, "-m", "llmops_assets.serving.slot_process", str(rig.slot)],
        env={**os.environ, "LLMOPS_STATE": str(rig.settings.state)},
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert process.returncode == EXIT_REFUSED, process.stderr
    assert re.search(message, process.stderr), process.stderr
    assert "To do:" in process.stderr


def test_packages_signed_before_a_rotation_still_load(rig: Rig) -> None:
    """A new key must not take down what serves."""
    slot = rig.place(rig.sign())
    old = read_trust_root(rig.settings.key_folder)
    for name in (TRUST_ROOT, "package.pem"):
        (rig.settings.key_folder / name).unlink()
    new = create_keys(rig.settings.key_folder)
    assert private_key_file(rig.settings.key_folder, "package").exists()
    with pytest.raises(EvidenceError, match="No trusted key"):
        verify_signature(rig.slot, slot, new)
    first, *_ = (key for key in new.keys if key.role == "package")
    verify_signature(rig.slot, slot, TrustRoot(keys=(first, *old.keys)))
