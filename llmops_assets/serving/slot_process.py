"""What a slot holds, and the process that becomes its Triton server.

A slot's directory holds `slot.json` (`SlotFile`) and `package/`, a copy of all folders of a
package: `repository/`, the model repository with the version folder renamed to its number,
and what its models read beside it, such as an engine; and its `package.json`, which says how
it is served. A server in a container has `package/` mounted where the package's
configurations look for it. The package's signature lies beside it, in `model.sig`.
`slot.json` is written last and removed first, so that a slot is either whole or empty,
whenever the machine stops.

`python -m llmops_assets.serving.slot_process SLOT_DIRECTORY` checks that `slot.json` lists
exactly what a key of the trust root signed, reads every byte in its final place and
compares it with `slot.json`, then replaces itself by tritonserver. Bytes that were right
when they were copied may be wrong when they are loaded, weeks later. Each is read once:
the digests that are compared with `slot.json` are the signed ones.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

from llmops_assets.errors import ArtifactCorruptError, EvidenceError, LLMOpsError, SlotError
from llmops_assets.evidence.keys import TrustRoot, read_trust_root
from llmops_assets.evidence.package_signature import SIGNATURE_FILE, check_files, signed_files
from llmops_assets.serving.package_description import PACKAGE_FILE
from llmops_assets.serving.slots import Deployment, Endpoint
from llmops_assets.serving.triton import (
    backend_directory,
    remove_leftovers,
    server_command,
)
from llmops_assets.settings import get_settings
from llmops_assets.storage.copying import copy_file
from llmops_assets.storage.store import Artifact, FileEntry
from llmops_assets.toolchains.base import VERSION_FOLDER

SLOT_FILE = "slot.json"
PACKAGE = "package"
REPOSITORY = "repository"
BYTECODE = "__pycache__"
EXIT_REFUSED = 3
"""Exit code for bytes that were not signed; starting again would not help."""


class SlotFile(BaseModel):
    """`slot.json`: what a slot holds and where it listens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    deployment: Deployment
    model: str
    endpoint: Endpoint
    manifest: tuple[FileEntry, ...]
    """Every file below `package/`, paths relative to it."""


def read_slot(slot_directory: Path) -> SlotFile | None:
    """What the slot holds; None when it is empty or was being filled when things stopped.

    Raises:
        SlotError: `slot.json` is not what `place` writes.
    """
    path = slot_directory / SLOT_FILE
    try:
        return SlotFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise SlotError(
            f"{path} is not a slot file",
            expected="deployment, model, endpoint and manifest, as `place` writes them",
            found=error,
            cure="deploy the release again; it fills the slot anew",
        ) from error


def place(
    package_directory: Path,
    package: Artifact,
    deployment: Deployment,
    model: str,
    endpoint: Endpoint,
    slot_directory: Path,
    signature: bytes,
) -> SlotFile:
    """Fills a stopped slot with copies of a package's files, replacing what it held.

    Files are cloned where the file system can share blocks (reflink) and copied
    elsewhere, never hard-linked: a changed byte in a slot must not reach the store. They
    end up read-only and on disk. The caller makes sure that one process at a time fills
    a slot.

    Args:
        package_directory: the files of `package`, as `Store.open` gives them.
        package: says which files there must be, with which digests.
        deployment: `deployment.version` becomes the name of the version folder.
        model: the model's name; the package must hold `repository/<model>/`.
        endpoint: where the slot's server will listen.
        slot_directory: is made if it does not exist; other files in it are left alone.
        signature: of the package; what starts the server verifies it.

    Raises:
        ArtifactCorruptError: the bytes copied are not the package's.
        SlotError: the package is another one than deployed, or holds no such model.
    """
    manifest, sources = _plan(package, deployment, model)
    beside = slot_directory / (PACKAGE + ".new")
    if beside.exists():
        shutil.rmtree(beside)  # left by a call that was killed
    beside.mkdir(parents=True)
    try:
        for entry, source in zip(manifest, sources, strict=True):
            target = beside / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = copy_file(package_directory / source, target)
            if digest != entry.digest:
                raise ArtifactCorruptError(
                    f"{source} of package {package.digest} changed before it was in the slot",
                    expected=entry.digest,
                    found=digest,
                    cure="check the store's disk, then deploy again",
                )
    except BaseException:
        shutil.rmtree(beside)
        raise
    slot = SlotFile(deployment=deployment, model=model, endpoint=endpoint, manifest=manifest)
    empty(slot_directory)
    beside.rename(slot_directory / PACKAGE)
    _write(slot_directory / SIGNATURE_FILE, signature)
    _write(slot_directory / SLOT_FILE, slot.model_dump_json(indent=2).encode())
    _sync_directory(slot_directory)
    return slot


def empty(slot_directory: Path) -> None:
    """Removes what a stopped slot holds; emptying an empty slot does nothing."""
    (slot_directory / SLOT_FILE).unlink(missing_ok=True)
    (slot_directory / SIGNATURE_FILE).unlink(missing_ok=True)
    if (slot_directory / PACKAGE).exists():
        shutil.rmtree(slot_directory / PACKAGE)
    remove_leftovers(slot_directory / PACKAGE / REPOSITORY)


def verify_signature(slot_directory: Path, slot: SlotFile, root: TrustRoot) -> None:
    """Checks that a trusted key signed what `slot.json` says the slot holds. Reads no package.

    Raises:
        EvidenceError: there is no signature, no trusted key made it, or it is about other
            files, which are named.
    """
    try:
        signature = (slot_directory / SIGNATURE_FILE).read_bytes()
    except FileNotFoundError as error:
        raise EvidenceError(
            f"{slot_directory} holds a package without a signature",
            expected=f"a {SIGNATURE_FILE} beside {PACKAGE}/",
            cure=f"materialize packaged_model of {slot.deployment.release} again, which signs it, "
            "then deploy the release again",
        ) from error
    deployment = slot.deployment
    # A signature has no sizes; a digest leaves no choice of them.
    signed = tuple(
        FileEntry(path, digest, 0)
        for path, digest in signed_files(signature, root, deployment.package).items()
    )
    expected, _ = _plan(Artifact(deployment.package, "", signed), deployment, slot.model)
    check_files(
        {entry.path: entry.digest for entry in slot.manifest},
        {entry.path: entry.digest for entry in expected},
        str(slot_directory),
    )


def verify(
    slot_directory: Path, slot: SlotFile, *, contents: bool = True, running: bool = False
) -> None:
    """Compares the slot's package with the manifest.

    Args:
        slot_directory: of the slot.
        slot: what it holds.
        contents: reads every byte; without, names and sizes alone are compared.
        running: passes over what Python caches beside the code of a model in use. Each start
            removes that.

    Raises:
        ArtifactCorruptError: naming everything that is missing, extra, a link or different.
    """
    root = slot_directory / PACKAGE
    expected = {entry.path: entry for entry in slot.manifest}
    folders = {str(parent) for path in expected for parent in PurePosixPath(path).parents}
    problems: list[str] = []
    seen: set[str] = set()
    queue = [root]
    while queue:
        folder = queue.pop()
        try:
            children = sorted(folder.iterdir())
        except OSError as error:
            problems.append(f"{folder.relative_to(root)} cannot be read ({error.strerror})")
            continue
        for child in children:
            path = child.relative_to(root).as_posix()
            mode = child.lstat().st_mode
            if running and child.name == BYTECODE and stat.S_ISDIR(mode):
                continue
            if stat.S_ISDIR(mode) and path in folders:
                queue.append(child)
            elif not stat.S_ISREG(mode) or path not in expected:
                problems.append(f"{path} does not belong there")
            else:
                seen.add(path)
                problems += _differences(child, expected[path], contents=contents)
    problems += [f"{path} is missing" for path in sorted(expected.keys() - seen)]
    if problems:
        raise ArtifactCorruptError(
            f"{slot_directory} does not hold the bytes of package {slot.deployment.package}",
            expected=f"the {len(expected)} files that {SLOT_FILE} lists",
            found="; ".join(problems),
            cure="check the disk and who can write there, then deploy the release again",
        )


def main(arguments: Sequence[str]) -> NoReturn:
    """Verifies the slot, then becomes its Triton server; exits with a code when it refuses."""
    if len(arguments) != 1:
        sys.exit("usage: python -m llmops_assets.serving.slot_process SLOT_DIRECTORY")
    slot_directory = Path(arguments[0]).resolve()
    repository = slot_directory / PACKAGE / REPOSITORY
    try:
        slot = read_slot(slot_directory)
        if slot is None:
            raise SlotError(
                f"{slot_directory} is empty",
                expected=f"a {SLOT_FILE}",
                cure="deploy a release into this slot",
            )
        _remove_bytecode(repository)
        verify_signature(slot_directory, slot, read_trust_root(get_settings().key_folder))
        verify(slot_directory, slot)
    except LLMOpsError as error:
        print(f"refused: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_REFUSED)
    try:
        command, environment = server_command(
            repository,
            slot.endpoint,
            backend_directory(get_settings().state),
        )
    except LLMOpsError as error:
        sys.exit(f"cannot start: {error}")
    remove_leftovers(repository)
    deployment = slot.deployment
    print(f"verified {deployment.release} version {deployment.version}", flush=True)
    os.execve(command[0], command, environment)


def _plan(
    package: Artifact, deployment: Deployment, model: str
) -> tuple[tuple[FileEntry, ...], list[str]]:
    """Which files the slot gets, and where each of them is in the package."""
    if package.digest != deployment.package or deployment.version < 1:
        raise SlotError(
            "This deployment is not about this package",
            expected=f"package {package.digest}, a version from 1 on",
            found=f"package {deployment.package}, version {deployment.version}",
            cure="pass the artifact that the deployment names",
        )
    entries: list[FileEntry] = []
    sources: list[str] = []
    for file in sorted(package.files, key=lambda file: file.path):
        parts = PurePosixPath(file.path).parts
        if ".." in parts or file.path.startswith("/"):
            raise SlotError(
                f"Package {package.digest} names a file outside itself",
                found=file.path,
                cure="do not deploy it; find out how it came into the store",
            )
        if len(parts) < 2 and file.path != PACKAGE_FILE:
            continue  # for people, and not part of what serves
        inside = list(parts)
        if len(parts) > 3 and (parts[0], parts[2]) == (REPOSITORY, VERSION_FOLDER):
            inside[2] = str(deployment.version)
        entries.append(FileEntry("/".join(inside), file.digest, file.size))
        sources.append(file.path)
    served = f"{REPOSITORY}/{model}/{deployment.version}/"
    if not any(entry.path.startswith(served) for entry in entries):
        raise SlotError(
            f"Package {package.digest} cannot serve the model {model}",
            expected=f"files below {REPOSITORY}/{model}/{VERSION_FOLDER}/",
            found=", ".join(sources) or "none",
            cure=f"package the model again under the name {model}",
        )
    return tuple(entries), sources


def _write(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    unfinished = path.with_name(path.name + ".new")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def _differences(path: Path, entry: FileEntry, *, contents: bool) -> list[str]:
    size = path.lstat().st_size
    if size != entry.size:
        return [f"{entry.path} has {size} bytes instead of {entry.size}"]
    if not contents:
        return []
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return [f"{entry.path} cannot be read ({error.strerror})"]
    return [] if digest == entry.digest else [f"{entry.path} has other bytes"]


def _remove_bytecode(repository: Path) -> None:
    """Removes what Python cached beside the model's code in an earlier run.

    Nothing stops the backend's Python from writing it, and it would be executed instead
    of the verified code.
    """
    for folder in list(repository.rglob(BYTECODE)):
        if not folder.is_symlink():
            shutil.rmtree(folder)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main(sys.argv[1:])
