"""Archives: the whole release in one file, and proof that it comes back from that alone."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from llmops_assets.errors import ArtifactCorruptError, StoreError
from llmops_assets.evidence.gates import ACCURACY, CHECKPOINT_SAFE
from llmops_assets.reports.audit import audit
from llmops_assets.retire.archive import ArchiveFile, judge_restores, restore, write_archive
from llmops_assets.storage.store import hash_file

from ..release_rig import PASSED, Rig

RELEASE = "parrot.v1"
KEEP = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def cold(rig: Rig) -> Path:
    """Cold storage; the rig's release has artifacts that share a file, and verdicts."""
    rig.freeze(RELEASE)
    rig.publish(RELEASE, "checkpoint", {"model": b"\x00weights" * 1000, "tokenizer": "shared"})
    rig.publish(RELEASE, "evaluation_data", {"data": "rows"})
    rig.publish(RELEASE, "evaluation", {"evaluation.json": "{}"})
    rig.publish(RELEASE, "packaged_model", {"deep/er/engine": "engine", "tokenizer": "shared"})
    rig.judge(RELEASE, [CHECKPOINT_SAFE, ACCURACY], PASSED)
    return rig.platform.settings.cold


def archive(rig: Rig, cold: Path) -> ArchiveFile:
    platform = rig.platform
    evidence = audit(platform, RELEASE).model_dump(mode="json", exclude={"made"})
    column = platform.column(RELEASE)
    return write_archive(platform.store, cold, RELEASE, column, evidence, KEEP)


def redone(cold: Path, archived: ArchiveFile) -> ArchiveFile:
    """The archive's document as if its file had been written as it is now."""
    file = cold / archived.file
    return archived.model_copy(update={"digest": hash_file(file), "size": file.stat().st_size})


def add_member(cold: Path, archived: ArchiveFile, name: str, content: bytes) -> ArchiveFile:
    with tarfile.open(cold / archived.file, "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return redone(cold, archived)


def _json(tar: tarfile.TarFile, name: str) -> Any:
    member = tar.extractfile(name)
    assert member is not None
    return json.load(member)


def test_everything_restores_from_the_archive_alone(rig: Rig, cold: Path, tmp_path: Path) -> None:
    """Cold storage is what is left when the platform is not."""
    archived = archive(rig, cold)
    expected = {asset: handle.digest for asset, handle in rig.platform.column(RELEASE).items()}
    shutil.rmtree(rig.platform.settings.store)
    target = tmp_path / "restored"
    assert restore(cold, archived, target) == expected == archived.artifacts
    manifest = json.loads(
        (target / "blobs" / expected["packaged_model"].replace(":", "/")).read_text()
    )
    names = {
        layer["annotations"]["org.opencontainers.image.title"]: layer["digest"]
        for layer in manifest["layers"]
    }
    engine = target / "blobs" / names["deep/er/engine"].replace(":", "/")
    assert engine.read_text() == "engine"


def test_evidence_is_in_it(rig: Rig, cold: Path, tmp_path: Path) -> None:
    """An auditor asks years later who let it through."""
    restore(cold, archive(rig, cold), tmp_path / "restored")
    evidence = json.loads((tmp_path / "restored" / "evidence.json").read_text())
    judged = [found["verdict"]["gate"] for found in evidence["gates"]]
    assert judged == ["accuracy", "checkpoint_safe"]  # the newest first
    assert evidence["identity"]["requested_by"] == "ada"
    made = {step["asset"] for step in evidence["build"]["steps"]}
    assert {"model_spec", "checkpoint", "packaged_model"} <= made


def test_it_is_an_oci_layout_that_other_tools_read(rig: Rig, cold: Path) -> None:
    """OCI Image Specification 1.1: `oci-layout`, `index.json` and every blob it leads to."""
    with tarfile.open(cold / archive(rig, cold).file) as tar:
        members = {member.name: member for member in tar.getmembers()}
        index = _json(tar, "index.json")
        assert _json(tar, "oci-layout") == {"imageLayoutVersion": "1.0.0"}
        assert len(members) == len(tar.getmembers()), "a blob is in it twice"
        for descriptor in index["manifests"]:
            name = "blobs/" + descriptor["digest"].replace(":", "/")
            assert members[name].size == descriptor["size"]
            manifest = _json(tar, name)
            for blob in [manifest["config"], *manifest["layers"]]:
                assert members["blobs/" + blob["digest"].replace(":", "/")].size == blob["size"]


def test_equal_content_gives_equal_bytes(rig: Rig, cold: Path, tmp_path: Path) -> None:
    """An archive made again must not look like another one to whoever keeps digests."""
    one = archive(rig, cold)
    two = archive(rig, tmp_path / "elsewhere")
    assert one == two
    assert one.size == (cold / one.file).stat().st_size
    rig.judge(RELEASE, [ACCURACY], PASSED)
    assert archive(rig, cold).digest != one.digest


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "other"])
def test_damaged_missing_or_other_archive_is_refused(
    rig: Rig, cold: Path, tmp_path: Path, damage: str
) -> None:
    """Removal waits for this gate: it must see what would not come back."""
    archived = archive(rig, cold)
    assert judge_restores(cold, archived, tmp_path).passed
    file = cold / archived.file
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[content.index(b"weights")] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "remove":
        file.unlink()
    else:
        rig.publish("parrot.v2", "checkpoint", {"other": "bytes"})
        other = write_archive(
            rig.platform.store, cold, "parrot.v2", rig.platform.column("parrot.v2"), {}, KEEP
        )
        (cold / other.file).rename(file)
    with pytest.raises(ArtifactCorruptError):
        restore(cold, archived, tmp_path / "restored")
    judgement = judge_restores(cold, archived, tmp_path)
    assert not judgement.passed
    assert str(file) in judgement.reason or "gone" in judgement.reason


def test_archive_of_other_artifacts_fails_though_it_is_whole(
    rig: Rig, cold: Path, tmp_path: Path
) -> None:
    """A file that restores perfectly, but not to this release, saves nothing of it."""
    archived = archive(rig, cold)
    other = archived.model_copy(update={"artifacts": {"checkpoint": archived.digest}})
    judgement = judge_restores(cold, other, tmp_path)
    assert not judgement.passed
    assert "Other artifacts" in judgement.reason


def test_damage_inside_is_found_by_restoring(rig: Rig, cold: Path, tmp_path: Path) -> None:
    """The file's digest says nothing of whether it was whole when it was written."""
    archived = archive(rig, cold)
    content = (cold / archived.file).read_bytes()
    (cold / archived.file).write_bytes(content.replace(b"\x00weights", b"\x00wrights", 1))
    judgement = judge_restores(cold, redone(cold, archived), tmp_path)
    assert not judgement.passed
    assert "damaged" in judgement.reason


@pytest.mark.parametrize("name", ["../outside", "blobs/../../outside"])
def test_member_that_would_leave_the_folder_is_refused(
    rig: Rig, cold: Path, tmp_path: Path, name: str
) -> None:
    """Cold storage is written by others too; restoring must not write where it pleases."""
    target = tmp_path / "a" / "restored"
    forged = add_member(cold, archive(rig, cold), name, b"malicious")
    with pytest.raises(tarfile.TarError):
        restore(cold, forged, target)
    assert not list(tmp_path.rglob("outside"))
    assert not judge_restores(cold, forged, tmp_path / "scratch").passed


def test_absolute_member_stays_inside(rig: Rig, cold: Path, tmp_path: Path) -> None:
    """The leading slash must not be honoured (PEP 706, filter `data`)."""
    outside = tmp_path / "outside"
    forged = add_member(cold, archive(rig, cold), str(outside), b"malicious")
    restore(cold, forged, tmp_path / "restored")
    assert not outside.exists()


def test_damaged_store_gives_no_archive(rig: Rig, cold: Path) -> None:
    """And the archive that was there stays: it may be the last good copy."""
    archived = archive(rig, cold)
    handle = rig.platform.column(RELEASE)["checkpoint"]
    folder = rig.platform.settings.store
    (folder / "blobs" / handle.artifact.files[0].digest.replace(":", "/")).unlink()
    shutil.rmtree(folder / "checkouts")
    with pytest.raises(StoreError):
        archive(rig, cold)
    assert hash_file(cold / archived.file) == archived.digest
    assert [path.name for path in cold.iterdir()] == [archived.file]


def test_what_a_killed_attempt_left_is_removed(rig: Rig, cold: Path) -> None:
    """Half an archive is as large as a whole one, and nobody looks into cold storage."""
    cold.mkdir(parents=True)
    (cold / f"{RELEASE}.0123.partial").write_bytes(b"half")
    (cold / "parrot.v10.0123.partial").write_bytes(b"another release's, being written")
    archive(rig, cold)
    assert sorted(path.name for path in cold.iterdir()) == [
        "parrot.v1.tar", "parrot.v10.0123.partial"
    ]  # fmt: skip


def test_restoring_leaves_no_scratch(rig: Rig, cold: Path, tmp_path: Path) -> None:
    """It unpacks gigabytes."""
    judge_restores(cold, archive(rig, cold), tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []
