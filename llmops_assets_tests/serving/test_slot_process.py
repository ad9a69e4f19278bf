"""What a slot holds is exactly the package, or the server does not start."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llmops_assets.errors import ArtifactCorruptError, SlotError
from llmops_assets.evidence.package_signature import SIGNATURE_FILE
from llmops_assets.serving.slot_process import (
    EXIT_REFUSED,
    PACKAGE,
    REPOSITORY,
    SLOT_FILE,
    empty,
    place,
    read_slot,
    verify,
)
from llmops_assets.serving.slots import Deployment, Endpoint
from llmops_assets.storage.store import Artifact, FileEntry
from llmops_assets_tests.tiny_llama import TinyLlama

from .conftest import artifact_of, fill, start_process

ENDPOINT = Endpoint("127.0.0.1", 1, 2, 3)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package's shape without an engine."""
    version = tmp_path / "package" / "repository" / "m" / "version"
    (version / "engine").mkdir(parents=True)
    (version / "model.py").write_text("code")
    (version / "engine" / "weights").write_bytes(bytes(range(256)) * 9000)
    (version.parent / "config.pbtxt").write_text('name: "m"')
    (tmp_path / "package" / "package.json").write_text("{}")
    return tmp_path / "package"


def put(package: Path, slot: Path, artifact: Artifact | None = None, version: int = 12) -> None:
    artifact = artifact or artifact_of(package)
    deployment = Deployment(artifact.digest, "m.v1", version)
    place(package, artifact, deployment, "m", ENDPOINT, slot, b"a signature")


def files(slot: Path) -> set[str]:
    root = slot / PACKAGE / REPOSITORY
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_version_folder_gets_its_number(package: Path, tmp_path: Path) -> None:
    """Triton knows versions by the folder's name, which the package leaves open."""
    put(package, tmp_path / "slot")
    assert files(tmp_path / "slot") == {
        "m/config.pbtxt", "m/12/model.py", "m/12/engine/weights",
    }  # fmt: skip
    held = read_slot(tmp_path / "slot")
    assert held is not None
    assert (held.deployment.version, held.model, held.endpoint) == (12, "m", ENDPOINT)
    verify(tmp_path / "slot", held)


def test_whole_package_is_placed_and_verified(package: Path, tmp_path: Path) -> None:
    """An engine lies beside the repository, and an ensemble is several models: all of it
    serves, so all of it is checked. Inner models keep the number that the package gave them.
    """
    inner = package / "repository" / "preprocessing" / "1"
    inner.mkdir(parents=True)
    (inner / "model.py").write_text("code")
    (package / "engine").mkdir()
    (package / "engine" / "rank0.engine").write_bytes(b"engine")
    slot = tmp_path / "slot"
    put(package, slot)
    assert files(slot) == {
        "m/config.pbtxt", "m/12/model.py", "m/12/engine/weights", "preprocessing/1/model.py",
    }  # fmt: skip
    # Whoever starts a server has the slot alone to know image and GPUs from.
    assert (slot / PACKAGE / "package.json").read_text() == "{}"
    engine = slot / PACKAGE / "engine" / "rank0.engine"
    assert engine.read_bytes() == b"engine"
    held = read_slot(slot)
    assert held is not None
    verify(slot, held)
    engine.chmod(0o644)
    engine.write_bytes(b"Engine")
    with pytest.raises(ArtifactCorruptError, match=r"engine/rank0\.engine has other bytes"):
        verify(slot, held)


def test_files_are_read_only_copies(package: Path, tmp_path: Path) -> None:
    """A hard link would let damage in a slot reach the store, and every other slot."""
    put(package, tmp_path / "slot")
    copy = tmp_path / "slot" / PACKAGE / REPOSITORY / "m" / "12" / "engine" / "weights"
    original = package / "repository" / "m" / "version" / "engine" / "weights"
    assert copy.read_bytes() == original.read_bytes()
    assert copy.stat().st_nlink == 1
    assert not copy.samefile(original)
    assert copy.stat().st_mode & 0o777 == 0o444


def test_bytes_that_changed_on_the_way_are_refused(package: Path, tmp_path: Path) -> None:
    """The slot keeps what it held; nothing half-copied stays."""
    slot = tmp_path / "slot"
    put(package, slot, version=1)
    artifact = artifact_of(package)
    (package / "repository" / "m" / "version" / "model.py").write_text("evil")
    with pytest.raises(ArtifactCorruptError, match=r"version/model\.py"):
        put(package, slot, artifact, version=2)
    held = read_slot(slot)
    assert held is not None
    assert held.deployment.version == 1
    verify(slot, held)
    assert sorted(path.name for path in slot.iterdir()) == [SIGNATURE_FILE, PACKAGE, SLOT_FILE]


def test_replacing_leaves_nothing_of_the_old_package(package: Path, tmp_path: Path) -> None:
    """Two version folders would make Triton serve both."""
    slot = tmp_path / "slot"
    put(package, slot, version=1)
    put(package, slot, version=2)
    assert {path.split("/")[1] for path in files(slot)} == {"config.pbtxt", "2"}


def test_slot_whose_filling_was_killed_is_empty(package: Path, tmp_path: Path) -> None:
    """A machine that stopped anywhere in `place` leaves an empty slot, and can go on."""
    slot = tmp_path / "slot"
    put(package, slot, version=1)
    # Killed after the old files were removed, before slot.json: the worst moment.
    (slot / SLOT_FILE).unlink()
    (slot / (PACKAGE + ".new") / "m").mkdir(parents=True)
    assert read_slot(slot) is None
    put(package, slot, version=2)
    held = read_slot(slot)
    assert held is not None
    verify(slot, held)


def test_emptied_slot_is_empty(package: Path, tmp_path: Path) -> None:
    """A removed version must be gone from Triton's repository."""
    put(package, tmp_path / "slot")
    empty(tmp_path / "slot")
    empty(tmp_path / "slot")
    assert list((tmp_path / "slot").iterdir()) == []


def test_other_package_than_deployed_is_refused(package: Path, tmp_path: Path) -> None:
    """The digest that was approved must be the one that is copied."""
    other = Deployment("sha256:" + "1" * 64, "m.v1", 1)
    with pytest.raises(SlotError, match="not about this package"):
        place(package, artifact_of(package), other, "m", ENDPOINT, tmp_path / "slot", b"")


def test_package_of_another_model_is_refused(package: Path, tmp_path: Path) -> None:
    """Triton would start and serve the wrong name."""
    artifact = artifact_of(package)
    deployment = Deployment(artifact.digest, "other.v1", 1)
    with pytest.raises(SlotError, match="cannot serve the model other"):
        place(package, artifact, deployment, "other", ENDPOINT, tmp_path / "slot", b"")


def test_paths_cannot_leave_the_slot(package: Path, tmp_path: Path) -> None:
    """A manifest comes from the store, which others can write to."""
    artifact = artifact_of(package)
    evil = FileEntry("repository/m/../../../../evil", "sha256:" + "0" * 64, 1)
    with pytest.raises(SlotError, match="outside itself"):
        put(package, tmp_path / "slot", replace(artifact, files=(*artifact.files, evil)))
    assert not (tmp_path / "slot").exists()


def truncate(repository: Path) -> None:
    os.truncate(repository / "m" / "12" / "engine" / "weights", 100)


def flip(repository: Path) -> None:
    weights = repository / "m" / "12" / "engine" / "weights"
    weights.chmod(0o644)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def remove(repository: Path) -> None:
    (repository / "m" / "config.pbtxt").unlink()


def add(repository: Path) -> None:
    (repository / "m" / "12" / "sitecustomize.py").write_text("evil")


def add_version(repository: Path) -> None:
    (repository / "m" / "13").mkdir()


def link(repository: Path) -> None:
    model = repository / "m" / "12" / "model.py"
    model.rename(repository.parent / "model.py")
    model.symlink_to(repository.parent / "model.py")


def link_folder(repository: Path) -> None:
    (repository / "m" / "12").rename(repository.parent / "12")
    (repository / "m" / "12").symlink_to(repository.parent / "12")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "engine/weights has 100 bytes instead of"),
        (flip, "engine/weights has other bytes"),
        (remove, "config.pbtxt is missing"),
        (add, "sitecustomize.py does not belong there"),
        (add_version, "m/13 does not belong there"),
        (link, "model.py does not belong there"),
        (link_folder, "m/12 does not belong there"),
    ],
)
def test_every_kind_of_damage_is_named(
    package: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """What is loaded must be the package to the byte, with nothing beside it."""
    slot = tmp_path / "slot"
    put(package, slot)
    held = read_slot(slot)
    assert held is not None
    damage(slot / PACKAGE / REPOSITORY)
    with pytest.raises(ArtifactCorruptError, match=message):
        verify(slot, held)


def test_unreadable_slot_file_says_what_to_do(tmp_path: Path) -> None:
    """A slot file of another version must not look like an empty slot, which gets filled."""
    (tmp_path / SLOT_FILE).write_text('{"model": "m"}')
    with pytest.raises(SlotError, match="deploy the release again"):
        read_slot(tmp_path)


def test_truncated_engine_is_refused_before_triton_starts(
    tiny: TinyLlama, state: Path, tmp_path: Path
) -> None:
    """The exit code tells the supervisor not to try again; no port may open meanwhile."""
    slot = tmp_path / "slot"
    endpoint = fill(tiny.package, slot, state)
    os.truncate(slot / PACKAGE / REPOSITORY / "tiny" / "1" / "engine" / "model.onnx.data", 1000)
    assert start_process(slot, state).wait(30) == EXIT_REFUSED
    log = (slot / "log").read_text()
    assert "model.onnx.data has 1000 bytes" in log
    assert "tritonserver" not in log
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((endpoint.host, endpoint.http_port), timeout=5)


def test_empty_slot_is_refused(state: Path, tmp_path: Path) -> None:
    """A cleared slot that is started again must say that it holds nothing."""
    assert start_process(tmp_path, state).wait(30) == EXIT_REFUSED
    assert "is empty" in (tmp_path / "log").read_text()


def test_cached_bytecode_does_not_survive_a_start(
    tiny: TinyLlama, state: Path, tmp_path: Path
) -> None:
    """Python would execute it instead of the verified code."""
    slot = tmp_path / "slot"
    fill(tiny.package, slot, state)
    cache = slot / PACKAGE / REPOSITORY / "tiny" / "1" / "__pycache__"
    cache.mkdir()
    (cache / "model.cpython-311.pyc").write_bytes(b"evil")
    # Another fault keeps Triton from starting, so that the cache cannot come back.
    os.truncate(slot / PACKAGE / REPOSITORY / "tiny" / "1" / "tokenizer.json", 0)
    assert start_process(slot, state).wait(30) == EXIT_REFUSED
    assert not cache.exists()
    assert "__pycache__" not in (slot / "log").read_text()


def test_slot_survives_the_store(package: Path, tmp_path: Path) -> None:
    """Serving must not depend on the store being there."""
    put(package, tmp_path / "slot")
    shutil.rmtree(package)
    held = read_slot(tmp_path / "slot")
    assert held is not None
    verify(tmp_path / "slot", held)
