"""The store keeps what it is given, says when it cannot, and survives several writers."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from llmops_assets.errors import ArtifactCorruptError, RefConflictError, StoreError
from llmops_assets.storage.folder import FolderStore

MEDIA_TYPE = "application/vnd.llmops.test"


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def make_directory(root: Path, **files: str) -> Path:
    root.mkdir(parents=True)
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_equal_directories_have_one_digest(store: FolderStore, tmp_path: Path) -> None:
    """Reuse and write-once columns rest on this."""
    one = store.put(make_directory(tmp_path / "a", x="1", sub__y="2"), MEDIA_TYPE)
    two = store.put(make_directory(tmp_path / "b", sub__y="2", x="1"), MEDIA_TYPE)
    other = store.put(make_directory(tmp_path / "c", x="1", sub__z="2"), MEDIA_TYPE)
    assert one == two
    assert one.digest != other.digest


def test_identical_files_are_stored_once(store: FolderStore, tmp_path: Path) -> None:
    """Releases share tokenizers and weights; their bytes cost money once."""
    store.put(make_directory(tmp_path / "a", x="same", y="same"), MEDIA_TYPE)
    contents = [path.read_bytes() for path in (store.root / "blobs/sha256").iterdir()]
    assert contents.count(b"same") == 1


def test_it_is_an_oci_image_layout(store: FolderStore, tmp_path: Path) -> None:
    """Other tools must be able to read the store without us."""
    artifact = store.put(make_directory(tmp_path / "a", x="1"), MEDIA_TYPE)
    manifest = store.record(artifact.digest)
    assert (store.root / "oci-layout").read_text() == '{"imageLayoutVersion":"1.0.0"}'
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["artifactType"] == MEDIA_TYPE
    for descriptor in [manifest["config"], *manifest["layers"]]:
        blob = store.root / "blobs" / descriptor["digest"].replace(":", "/")
        assert blob.stat().st_size == descriptor["size"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_found_on_read_and_mended_by_the_same_bytes(
    store: FolderStore, tmp_path: Path, damage: str
) -> None:
    """A truncated engine must never reach a slot, and making it again must help."""
    source = make_directory(tmp_path / "a", engine="engine bytes", config="{}")
    artifact = store.put(source, MEDIA_TYPE)
    engine = next(file for file in artifact.files if file.path == "engine")
    blob = store.root / "blobs" / engine.digest.replace(":", "/")
    blob.chmod(0o600)
    if damage == "truncate":
        blob.write_bytes(b"engine")
    elif damage == "flip":
        blob.write_bytes(b"engine bytez")
    else:
        blob.unlink()
    with pytest.raises(StoreError, match=r"damaged|lacks") as caught:
        store.open(artifact.digest)
    assert caught.value.cure
    assert store.put(source, MEDIA_TYPE) == artifact
    assert (store.open(artifact.digest)[1] / "engine").read_text() == "engine bytes"


@pytest.mark.parametrize("damage", ["truncate", "surplus", "remove"])
def test_a_damaged_checkout_is_made_again_from_the_blobs(
    store: FolderStore, tmp_path: Path, damage: str
) -> None:
    """A tool that writes into its input must not change what the next one reads."""
    source = make_directory(tmp_path / "a", engine="engine bytes", config="{}")
    artifact = store.put(source, MEDIA_TYPE)
    _, checkout = store.open(artifact.digest)
    (checkout / "engine").chmod(0o600)
    if damage == "truncate":
        (checkout / "engine").write_text("engine")
    elif damage == "surplus":
        (checkout / "extra").write_text("x")
    else:
        (checkout / "engine").unlink()
    _, again = store.open(artifact.digest)
    assert {path.name: path.read_text() for path in again.iterdir()} == {
        "engine": "engine bytes",
        "config": "{}",
    }


def test_a_damaged_manifest_or_record_is_found(store: FolderStore) -> None:
    """Verdicts are records: a changed one must not be believed."""
    entry = store.append("verdicts/a", {"passed": False})
    blob = store.root / "blobs" / entry.digest.replace(":", "/")
    blob.chmod(0o600)
    blob.write_text('{"passed":true}')
    with pytest.raises(ArtifactCorruptError):
        list(store.log("verdicts/a"))


def test_links_and_empty_directories_are_refused(store: FolderStore, tmp_path: Path) -> None:
    """A link could point at a secret outside of the artifact."""
    folder = make_directory(tmp_path / "a", x="1")
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(StoreError, match="link"):
        store.put(folder, MEDIA_TYPE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="no files"):
        store.put(tmp_path / "empty", MEDIA_TYPE)


@pytest.mark.parametrize("name", ["../x", "a/../b", "/a", "a//b", "", "a\nb", ".hidden", "a/"])
def test_names_cannot_leave_their_folder(store: FolderStore, name: str) -> None:
    """Release keys and model names come from outside."""
    with pytest.raises(StoreError):
        store.resolve(name)
    with pytest.raises(StoreError):
        store.append(name, {})


def test_compare_and_set_refuses_a_stale_writer(store: FolderStore) -> None:
    """Two promotions at once: the second must not overwrite what it never saw."""
    one, two, three = (store.append("l", {"n": n}).digest for n in range(3))
    store.compare_and_set("routes/m", None, one)
    store.compare_and_set("routes/m", one, two)
    with pytest.raises(RefConflictError):
        store.compare_and_set("routes/m", one, three)
    with pytest.raises(RefConflictError):
        store.compare_and_set("routes/m", None, three)
    assert store.resolve("routes/m") == two
    store.compare_and_set("routes/m", two, None)
    assert store.resolve("routes/m") is None


def _hammer(root: Path, worker: int) -> None:
    store = FolderStore(root)
    for number in range(25):
        entry = store.append("shared", {"worker": worker, "number": number})
        while True:
            current = store.resolve("counter")
            try:
                store.compare_and_set("counter", current, entry.digest)
                break
            except RefConflictError:
                continue


def test_many_processes_lose_nothing(store: FolderStore) -> None:
    """The daemon, run workers and the command line write at the same time."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_hammer, args=(store.root, n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    entries = list(store.log("shared"))
    assert [entry.sequence for entry in entries] == list(range(100))
    assert {(e.record["worker"], e.record["number"]) for e in entries} == {
        (worker, number) for worker in range(4) for number in range(25)
    }
    assert store.resolve("counter") in {entry.digest for entry in entries}


def test_log_is_read_from_a_place_on(store: FolderStore) -> None:
    """Whoever follows a log must not read all of it again each time, nor damaged old records."""
    digests = [store.append("decisions", {"number": number}).digest for number in range(4)]
    (store.root / "blobs/sha256" / digests[0].removeprefix("sha256:")).unlink()
    assert [entry.sequence for entry in store.log("decisions", start=2)] == [2, 3]
    assert list(store.log("decisions", start=4)) == []
    with pytest.raises(StoreError):
        list(store.log("decisions"))
