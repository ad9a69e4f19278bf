"""Write-once columns: what was published stays, what was made is reused, a kill costs little."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from llmops_assets.errors import LifecycleOrderError, StoreError, ToolError
from llmops_assets.evidence.results import AttestedResults
from llmops_assets.storage.columns import DOCUMENT, Action, Columns, Make, Result, Workshop
from llmops_assets.storage.folder import FolderStore

from ..evidence_rig import open_evidence

MEDIA_TYPE = "application/vnd.llmops.test"
ACTION = Action(
    asset="engine",
    media_type=MEDIA_TYPE,
    inputs={"checkpoint": "sha256:" + "1" * 64},
    parameters={"precision": "int8"},
    versions={"builder": "1"},
)
OTHERS = (
    replace(ACTION, asset="evaluation"),
    replace(ACTION, media_type="application/vnd.llmops.other"),
    replace(ACTION, inputs={"checkpoint": "sha256:" + "2" * 64}),
    replace(ACTION, inputs={**ACTION.inputs, "data": "sha256:" + "3" * 64}),
    replace(ACTION, parameters={"precision": "fp32"}),
    replace(ACTION, versions={"builder": "2"}),
)


class Maker:
    """Counts how often it had to work."""

    def __init__(self, content: str = "engine bytes") -> None:
        self.content = content
        self.calls = 0

    def __call__(self, workshop: Workshop) -> Mapping[str, Any]:
        self.calls += 1
        assert not workshop.output.exists()
        workshop.output.mkdir()
        (workshop.output / "engine").write_text(self.content)
        return {"calls": self.calls}


class Killed(BaseException):
    """Stands for a kill: no handler of ours may catch it."""


def raise_killed(*_: object, **__: object) -> None:
    raise Killed


@pytest.fixture
def columns(tmp_path: Path) -> Columns:
    return open_columns(tmp_path)


def open_columns(root: Path) -> Columns:
    evidence = open_evidence(root)
    return Columns(evidence.store, root / "work", AttestedResults(evidence))


def content(columns: Columns, result: Result) -> str:
    return (columns.store.open(result.artifact)[1] / "engine").read_text()


def test_what_was_published_is_not_made_again(columns: Columns) -> None:
    """A run that is retried must give the same artifact, even if the action changed meanwhile."""
    make = Maker()
    first = columns.produce("m.v1", ACTION, make)
    changed = columns.produce("m.v1", OTHERS[-1], Maker("other bytes"))
    assert (make.calls, changed) == (1, first)
    assert columns.get("m.v1", "engine") == first
    assert columns.assets("m.v1") == {"engine": first}


def test_another_release_reuses_the_same_action(columns: Columns) -> None:
    """Editing a threshold must not retrain the model."""
    first = columns.produce("m.v1", ACTION, Maker())
    make = Maker()
    second = columns.produce("m.v2", ACTION, make)
    third = columns.produce("m.v3", ACTION, make)
    assert make.calls == 0
    assert second.artifact == first.artifact
    assert (second.release, second.reused_from) == ("m.v2", "m.v1")
    assert third.reused_from == "m.v1"
    assert second.finished - second.started < first.finished - first.started
    assert first.reused_from is None


@pytest.mark.parametrize("other", OTHERS)
def test_whatever_the_result_depends_on_makes_it_anew(columns: Columns, other: Action) -> None:
    """A reused engine of other weights or another builder would be a silent wrong release."""
    columns.produce("m.v1", ACTION, Maker())
    make = Maker()
    result = columns.produce("m.v2", other, make)
    assert make.calls == 1
    assert result.reused_from is None


def test_action_digest_does_not_depend_on_order() -> None:
    """Mappings are built in whatever order; equal actions must be found equal."""
    one = replace(ACTION, parameters={"a": 1, "b": {"c": 2, "d": 3}})
    two = replace(ACTION, parameters={"b": {"d": 3, "c": 2}, "a": 1})
    assert one.digest == two.digest
    assert len({action.digest for action in (ACTION, *OTHERS)}) == 1 + len(OTHERS)


def test_killed_between_making_and_publishing(
    columns: Columns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of training must not be lost to a kill in the last millisecond, nor their times."""
    make = Maker()
    with monkeypatch.context() as patched:
        patched.setattr(columns, "publish", raise_killed)
        with pytest.raises(Killed):
            columns.produce("m.v1", ACTION, lambda w: (time.sleep(0.05), make(w))[1])
    assert columns.find("m.v1", "engine") is None
    result = columns.produce("m.v1", ACTION, make)
    assert make.calls == 1
    assert result.reused_from is None
    assert (result.finished - result.started).total_seconds() >= 0.05


def test_killed_while_storing(columns: Columns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes in the store without a record of the action are nothing; they are made again."""
    make = Maker()
    with monkeypatch.context() as patched:
        patched.setattr(AttestedResults, "performed", raise_killed)
        with pytest.raises(Killed):
            columns.produce("m.v1", ACTION, make)
    assert columns.find("m.v1", "engine") is None
    assert columns.produce("m.v1", ACTION, make).facts == {"calls": 2}


def test_next_attempt_resumes_in_scratch_with_a_fresh_output(columns: Columns) -> None:
    """A trainer resumes from its own snapshots, but half an output is no output."""

    def die(workshop: Workshop) -> Mapping[str, Any]:
        workshop.output.mkdir()
        (workshop.output / "half").write_text("written before the kill")
        (workshop.scratch / "step-100").write_text("snapshot")
        raise ToolError("training failed", cure="try again")

    with pytest.raises(ToolError):
        columns.produce("m.v1", ACTION, die)

    def resume(workshop: Workshop) -> Mapping[str, Any]:
        assert (workshop.scratch / "step-100").read_text() == "snapshot"
        return Maker()(workshop)

    result = columns.produce("m.v1", ACTION, resume)
    assert [file.path for file in columns.store.describe(result.artifact).files] == ["engine"]


def test_tool_of_a_dead_attempt_cannot_write_into_the_next(columns: Columns) -> None:
    """A dying tool may still write for seconds, under the path that it was given."""
    outputs: list[Path] = []

    def die(workshop: Workshop) -> Mapping[str, Any]:
        outputs.append(workshop.output)
        raise Killed

    with pytest.raises(Killed):
        columns.produce("m.v1", ACTION, die)

    def make(workshop: Workshop) -> Mapping[str, Any]:
        outputs[0].mkdir(parents=True, exist_ok=True)
        (outputs[0] / "late").write_text("by the dead attempt's tool")
        return Maker()(workshop)

    result = columns.produce("m.v1", ACTION, make)
    assert [file.path for file in columns.store.describe(result.artifact).files] == ["engine"]


def test_work_folder_is_gone_afterwards(columns: Columns) -> None:
    """Scratch holds gigabytes of snapshots."""
    columns.produce("m.v1", ACTION, Maker())
    assert [path for path in columns.work.iterdir() if path.is_dir()] == []


def test_a_step_that_writes_nothing_publishes_nothing(columns: Columns) -> None:
    """A tool that exits with 0 and no output must not become an empty engine."""
    with pytest.raises(StoreError, match="holds no files"):
        columns.produce("m.v1", ACTION, lambda _: {})
    assert columns.find("m.v1", "engine") is None


def damage(columns: Columns, result: Result) -> None:
    store = columns.store
    assert isinstance(store, FolderStore)
    (engine,) = store.describe(result.artifact).files
    blob = store.root / "blobs" / engine.digest.replace(":", "/")
    blob.chmod(0o600)
    blob.write_text("rotten bytes")
    checkout = store.root / "checkouts" / result.artifact.removeprefix("sha256:") / "engine"
    if checkout.exists():
        checkout.chmod(0o600)
        checkout.write_text("rotten bytes")


def test_damaged_artifact_is_made_again(columns: Columns) -> None:
    """Disks rot; the same bytes mend the store, for this release and for those that reuse it."""
    first = columns.produce("m.v1", ACTION, Maker())
    damage(columns, first)
    make = Maker()
    again = columns.produce("m.v1", ACTION, make)
    assert (make.calls, again.artifact) == (1, first.artifact)
    assert content(columns, columns.get("m.v1", "engine")) == "engine bytes"

    damage(columns, first)
    assert columns.produce("m.v2", ACTION, make).artifact == first.artifact
    assert make.calls == 2


def test_damaged_artifact_cannot_become_another(columns: Columns) -> None:
    """What was judged and approved has one digest; other bytes need another release."""
    first = columns.produce("m.v1", ACTION, Maker())
    damage(columns, first)
    with pytest.raises(LifecycleOrderError, match="has published another engine") as caught:
        columns.produce("m.v1", ACTION, Maker("not the same"))
    assert "llmops release m" in caught.value.cure
    assert columns.get("m.v1", "engine").artifact == first.artifact


def test_get_names_what_to_materialize(columns: Columns) -> None:
    """An asset asked for too early is the commonest mistake in the UI."""
    with pytest.raises(LifecycleOrderError, match=r"materialize engine of partition m.v1"):
        columns.get("m.v1", "engine")


@pytest.mark.parametrize("kept", ["the ref", "nothing"])
def test_what_a_ref_says_counts_for_nothing(columns: Columns, kept: str) -> None:
    """Who can write the store must not choose what a release consists of."""
    mine = columns.produce("m.v1", ACTION, Maker())
    ref = "releases/m.v1/engine"
    record = columns.store.resolve(ref)
    assert record is not None
    forged = mine.model_copy(update={"artifact": "sha256:" + "f" * 64, "facts": {"by": "me"}})
    planted = columns.store.append("forgery", forged.model_dump(mode="json")).digest
    columns.store.compare_and_set(ref, record, planted if kept == "the ref" else None)
    assert columns.get("m.v1", "engine") == mine
    assert columns.assets("m.v1") == {"engine": mine}
    assert columns.produce("m.v1", ACTION, Maker("other")) == mine
    assert columns.store.resolve(ref) == record, "it leads people there again"


def test_planted_result_of_an_action_is_not_reused(columns: Columns) -> None:
    """Action digests can be computed by anybody; the tools run all the same."""
    honest = columns.produce("m.v1", ACTION, Maker())
    forged = honest.model_copy(update={"action": OTHERS[4].digest, "release": "m.v2"})
    planted = columns.store.append("actions/engine", forged.model_dump(mode="json")).digest
    name = f"actions/engine/{OTHERS[4].digest.removeprefix('sha256:')}"
    columns.store.compare_and_set(name, None, planted)
    make = Maker("fp32")
    assert columns.produce("m.v2", OTHERS[4], make).artifact != honest.artifact
    assert make.calls == 1


class Event(BaseModel):
    what: str


def test_record_replaces_and_keeps_the_history(columns: Columns) -> None:
    """A release may be deployed twice; the newest counts, and the audit sees both."""
    action = Action("staging_deployment", MEDIA_TYPE)
    one = columns.record("m.v1", action, Event(what="first"), datetime.now(UTC))
    two = columns.record("m.v1", action, Event(what="second"), datetime.now(UTC))
    assert columns.get("m.v1", "staging_deployment") == two
    log = [
        entry.record["artifact"] for entry in columns.store.log("releases/m.v1/staging_deployment")
    ]
    assert log == [one.artifact, two.artifact]
    folder = columns.store.open(two.artifact)[1]
    assert Event.model_validate_json((folder / DOCUMENT).read_text()).what == "second"
    assert [path for path in columns.work.iterdir() if path.is_dir()] == []


def test_releases_are_listed_once_and_in_order(columns: Columns) -> None:
    """`derived_from` names the newest earlier release of the model."""
    for release in ("m.v2", "m.v1", "m.v2"):
        columns.enlist("m", release)
    columns.enlist("other", "other.v1")
    assert columns.releases("m") == ["m.v2", "m.v1"]


def test_assets_of_a_release_are_not_those_of_a_longer_key(columns: Columns) -> None:
    """m.v1 and m.v10 share a prefix as text."""
    columns.produce("m.v1", ACTION, Maker())
    columns.produce("m.v10", ACTION, Maker())
    assert {result.release for result in columns.assets("m.v1").values()} == {"m.v1"}


def _produce(root: Path, release: str, make: Callable[[Path], Make]) -> None:
    columns = open_columns(root)
    columns.produce(release, ACTION, make(root))


def _slow_and_noted(root: Path) -> Make:
    def make(workshop: Workshop) -> Mapping[str, Any]:
        with (root / "made").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return Maker()(workshop)

    return make


def _endless(root: Path) -> Make:
    def make(workshop: Workshop) -> Mapping[str, Any]:
        (root / "started").touch()
        time.sleep(300)
        return {}

    return make


@pytest.mark.timeout(60)
def test_of_two_processes_one_makes_and_the_other_reuses(tmp_path: Path) -> None:
    """Two releases pushed together must not train the same model side by side."""
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_produce, args=(tmp_path, release, _slow_and_noted))
        for release in ("m.v1", "m.v2")
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(40)
        assert worker.exitcode == 0
    columns = open_columns(tmp_path)
    results = [columns.get(release, "engine") for release in ("m.v1", "m.v2")]
    assert len((tmp_path / "made").read_text().split()) == 1
    assert sorted(result.reused_from is None for result in results) == [False, True]
    assert results[0].artifact == results[1].artifact


@pytest.mark.timeout(60)
def test_killed_process_frees_the_action(tmp_path: Path) -> None:
    """A lock that outlives `kill -9` would stop the model's releases until somebody finds it."""
    worker = multiprocessing.get_context("spawn").Process(
        target=_produce, args=(tmp_path, "m.v1", _endless)
    )
    worker.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(10)
    columns = open_columns(tmp_path)
    make = Maker()
    columns.produce("m.v1", ACTION, make)
    assert make.calls == 1
