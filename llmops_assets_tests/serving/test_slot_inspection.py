"""A look into a slot of the local stack: what its server says, and what lies on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmops_assets.evidence.keys import create_keys
from llmops_assets.evidence.package_signature import require_signature, sign_once
from llmops_assets.local.slots import SupervisedSlots, slot_folder
from llmops_assets.serving.slot_process import PACKAGE, SLOT_FILE, place
from llmops_assets.serving.slots import (
    Colour,
    Deployment,
    Endpoint,
    Environment,
    Slot,
    SlotInspection,
)
from llmops_assets.settings import Settings
from llmops_assets.storage.folder import FolderStore

from ..conftest import free_port
from ..fakes import HttpDouble

BLUE = Slot(Environment.PRODUCTION, "m", Colour.BLUE)


@dataclass
class Placed:
    """A package in a slot, and a server that says which versions it has."""

    slots: SupervisedSlots
    folder: Path
    versions: list[str]

    def file(self, name: str) -> Path:
        return self.folder / PACKAGE / "repository" / "m" / name

    def rewrite(self, name: str, text: str) -> None:
        self.file(name).chmod(0o644)
        self.file(name).write_text(text)


@pytest.fixture
def placed(tmp_path: Path) -> Iterator[Placed]:
    settings = Settings(state=tmp_path / "state", http_timeout_seconds=2)
    create_keys(settings.key_folder)
    store = FolderStore(settings.store)
    version = tmp_path / "package" / "repository" / "m" / "version"
    version.mkdir(parents=True)
    (version / "model.py").write_text("code")
    (version.parent / "config.pbtxt").write_text('name: "m"')
    package = store.put(tmp_path / "package", "application/vnd.llmops.test")
    sign_once(store, package.digest, settings)
    versions = ["3"]

    def respond(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"name": "m", "versions": versions}

    with HttpDouble(respond) as server:
        endpoint = Endpoint("127.0.0.1", *(server.port for _ in range(3)))
        folder = slot_folder(settings, BLUE)
        place(
            store.open(package.digest)[1], package, Deployment(package.digest, "m.v3", 3), "m",
            endpoint, folder, require_signature(store, package.digest),
        )  # fmt: skip
        yield Placed(SupervisedSlots(settings, store), folder, versions)


def test_whole_slot(placed: Placed) -> None:
    """Also with what Python caches in it while it serves; the next start removes that."""
    cache = placed.file("3/__pycache__")
    cache.mkdir()
    (cache / "model.cpython-311.pyc").write_bytes(b"bytecode")
    assert placed.slots.inspect(BLUE) == SlotInspection(3, None)
    assert placed.slots.inspect(BLUE, deep=True) == SlotInspection(3, None)
    placed.versions[:] = ["4"]
    assert placed.slots.inspect(BLUE).version == 4


@pytest.mark.parametrize(
    ("damage", "cheap", "deep"),
    [
        (lambda p: p.rewrite("3/model.py", "CODE"), None, "has other bytes"),
        (lambda p: p.rewrite("3/model.py", "code!"), "has 5 bytes instead of 4", "instead of 4"),
        (lambda p: p.file("config.pbtxt").unlink(), "config.pbtxt is missing", "is missing"),
        (lambda p: p.file("3/more.py").write_text(""), "does not belong there", "not belong"),
        (
            lambda p: (p.folder / SLOT_FILE).write_text(
                (p.folder / SLOT_FILE).read_text().replace("model.py", "other.py")
            ),
            "other.py", "other.py",
        ),
    ],
)  # fmt: skip
def test_damage(
    placed: Placed, damage: Callable[[Placed], object], cheap: str | None, deep: str
) -> None:
    """Names and sizes are looked at each time, bytes on demand; `slot.json` is held against
    the signature, as whoever can change one can change the other."""
    damage(placed)
    found = placed.slots.inspect(BLUE).damage
    assert found is None if cheap is None else cheap in str(found)
    assert deep in str(placed.slots.inspect(BLUE, deep=True).damage)


def test_silent_and_empty_slots(placed: Placed) -> None:
    """A server that is gone has nothing loaded, and an empty slot has no damage."""
    slot = (placed.folder / SLOT_FILE).read_text()
    port = slot.partition('"http_port": ')[2].partition(",")[0]
    (placed.folder / SLOT_FILE).write_text(slot.replace(port, str(free_port())))
    assert placed.slots.inspect(BLUE) == SlotInspection(None, None)
    (placed.folder / SLOT_FILE).unlink()
    assert placed.slots.inspect(BLUE) == SlotInspection(None, None)
