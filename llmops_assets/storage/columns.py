"""Write-once columns: what each asset of a release published, and reuse between releases.

An action digest covers everything a step's result depends on: digests of its inputs,
its own section of the spec, versions of code and tools. The first result of an action
is recorded under it; any later release that needs the same action takes that result
instead of running a tool. What a release published never changes.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from llmops_assets.errors import LifecycleOrderError, RefConflictError, StoreError
from llmops_assets.storage.store import Store, canonical_json, digest_of

logger = logging.getLogger(__name__)

DOCUMENT = "document.json"
"""The one file of an artifact that records an event, see `Columns.record`."""


@dataclass(frozen=True)
class Action:
    """A step that makes an artifact, described by what its result depends on."""

    asset: str
    media_type: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Digest of each input artifact, by asset."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The part of the spec that the step reads, as JSON values."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of our code and of the tools, by name."""

    @property
    def digest(self) -> str:
        return digest_of(
            canonical_json(
                {
                    "asset": self.asset,
                    "media_type": self.media_type,
                    "inputs": dict(self.inputs),
                    "parameters": dict(self.parameters),
                    "versions": dict(self.versions),
                }
            )
        )


class Result(BaseModel):
    """What one asset of one release published; stored as a record."""

    model_config = ConfigDict(frozen=True)

    asset: str
    release: str
    artifact: str
    """Digest of the artifact."""
    media_type: str
    action: str
    """Digest of the action."""
    inputs: dict[str, str]
    parameters: dict[str, Any]
    versions: dict[str, str]
    facts: dict[str, Any]
    """What the step said of its result, for people."""
    started: datetime
    finished: datetime
    reused_from: str | None = None
    """The release that ran the tools, when this one did not."""


@dataclass(frozen=True)
class Workshop:
    """Where a step works.

    `output` does not exist yet and becomes the artifact; `scratch` survives a kill.
    """

    scratch: Path
    output: Path


Make = Callable[[Workshop], Mapping[str, Any]]
"""Fills the workshop's output directory; returns facts for people."""


class Witness(Protocol):
    """Who is told of results, and says which ones count.

    Not the refs of the store: whoever writes there could exchange them. They only lead people
    and other tools to the records.
    """

    def performed(self, result: Result) -> None:
        """Is told that a step ran its tools."""
        ...

    def made(self, result: Result) -> None:
        """Is told that a result becomes its release's own."""
        ...

    def happened(self, result: Result) -> None:
        """Is told of an event, see `Columns.record`."""
        ...

    def results(self, release: str) -> Mapping[str, str]:
        """Digest of the record of each asset's result, by asset."""
        ...

    def result_of(self, asset: str, action: str) -> str | None:
        """Digest of the record of an action's result; None if nobody made it.

        Args:
            asset: that the action makes.
            action: its digest.
        """
        ...


class Columns:
    """The published results in a store."""

    def __init__(self, store: Store, work: Path, witness: Witness) -> None:
        self.store = store
        self.work = work
        self._witness = witness

    def find(self, release: str, asset: str) -> Result | None:
        """What the asset published in this release, or None."""
        record = self._witness.results(release).get(asset)
        return None if record is None else self._read(record)

    def published(self, release: str, asset: str) -> Result | None:
        """What the asset published in this release, if the store still has its bytes whole."""
        result = self.find(release, asset)
        return result if result is not None and self._intact(result) else None

    def get(self, release: str, asset: str) -> Result:
        """What the asset published in this release.

        Raises:
            LifecycleOrderError: nothing yet.
        """
        result = self.find(release, asset)
        if result is None:
            raise LifecycleOrderError(
                f"Release {release} has no {asset} yet",
                expected=f"a published {asset}",
                cure=f"materialize {asset} of partition {release} first",
            )
        return result

    def assets(self, release: str) -> dict[str, Result]:
        """Everything the release published, by asset."""
        results = self._witness.results(release)
        return {asset: self._read(record) for asset, record in sorted(results.items())}

    def releases(self, model: str) -> list[str]:
        """Keys of the model's releases that froze a spec, oldest first."""
        return list(
            dict.fromkeys(entry.record["release"] for entry in self.store.log(_list(model)))
        )

    def enlist(self, model: str, release: str) -> None:
        """Adds a release to its model's list; once is enough."""
        if release not in self.releases(model):
            self.store.append(_list(model), {"release": release})

    def produce(self, release: str, action: Action, make: Make) -> Result:
        """The action's result for this release: published, reused, or made now.

        Only one process makes an action at a time; the others wait and reuse. A killed
        one leaves its scratch folder behind for the next to resume from. A result whose
        stored bytes are damaged is made again, and stands only if it has the same digest.

        Raises:
            LifecycleOrderError: damaged bytes came out differently this time.
        """
        published = self.published(release, action.asset)
        if published is not None:
            self._point(release, action.asset)  # if a killed run did not come to it
            return published
        result = self.perform(release, action, make)
        self.publish(result)
        return result

    def perform(self, release: str, action: Action, make: Make) -> Result:
        """The action's result, made now if nobody has; not published as the release's own."""
        name = f"{action.asset}-{action.digest[7:23]}"
        with self._alone(_made(self.work) / f"{name}.making"):
            return self._reuse(release, action) or self._make(
                release, action, make, self.work / name
            )

    def performed(self, action: Action) -> Result | None:
        """The action's result, if somebody made it."""
        record = self._witness.result_of(action.asset, action.digest)
        return None if record is None else self._read(record)

    def record(
        self,
        release: str,
        action: Action,
        document: BaseModel,
        started: datetime,
        files: Mapping[str, str] | None = None,
    ) -> Result:
        """Publishes what a deployment, an approval or a retirement did, as an artifact.

        Such assets are events in the world: they may happen again, and the release's ref
        then points to the newest. The older ones stay in the log.

        Args:
            files: texts beside the document, by name.
        """
        with tempfile.TemporaryDirectory(dir=_made(self.work)) as folder:
            for name, content in (files or {}).items():
                (Path(folder) / name).write_text(content, encoding="utf-8")
            (Path(folder) / DOCUMENT).write_text(document.model_dump_json(indent=2) + "\n")
            artifact = self.store.put(Path(folder), action.media_type)
        result = _result(
            release, action, artifact.digest, document.model_dump(mode="json"), started
        )
        self._log(result)
        self._witness.happened(result)
        self._point(release, action.asset)
        return result

    def publish(self, result: Result) -> None:
        """Makes a result the release's. Publishing the same artifact again changes nothing.

        Raises:
            LifecycleOrderError: the release has published other bytes.
        """
        if self.find(result.release, result.asset) is None:
            self._log(result)
            self._witness.made(result)
        published = self.get(result.release, result.asset)
        if published.artifact != result.artifact:
            raise LifecycleOrderError(
                f"Release {result.release} has published another {result.asset}",
                expected=published.artifact,
                found=result.artifact,
                cure=f"make a new release: `llmops release {result.release.split('.')[0]}`",
            )
        self._point(result.release, result.asset)

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """Waits, for as long as it takes and saying so, until no other process makes the action."""
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("another run makes the same artifact; waiting for its end (%s)", path)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _log(self, result: Result) -> None:
        log = f"releases/{result.release}/{result.asset}"
        self.store.append(log, result.model_dump(mode="json"))

    def _read(self, record: str) -> Result:
        return Result.model_validate(self.store.record(record))

    def _point(self, release: str, asset: str) -> None:
        """Lets the release's ref point to the result that counts."""
        ref = f"releases/{release}/{asset}"
        current = self.store.resolve(ref)
        counts = self._witness.results(release)[asset]
        if current != counts:
            with suppress(RefConflictError):  # another run points it there
                self.store.compare_and_set(ref, current, counts)

    def _intact(self, result: Result) -> bool:
        try:
            self.store.open(result.artifact)
        except StoreError as error:
            logger.warning("making %s of %s again: %s", result.asset, result.release, error)
            return False
        return True

    def _reuse(self, release: str, action: Action) -> Result | None:
        made = self.performed(action)
        if made is None or not self._intact(made):
            return None
        if made.release == release:
            return made  # by a run of this release that was killed before it published
        now = datetime.now(UTC)
        return made.model_copy(
            update={
                "release": release,
                "started": now,
                "finished": now,
                "reused_from": made.release,
            }
        )

    def _make(self, release: str, action: Action, make: Make, work: Path) -> Result:
        scratch = _made(work / "scratch")
        # A folder of its own for each attempt: what a dying tool of a killed attempt
        # still writes cannot end up in this one's output.
        for leftover in work.glob("attempt-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        output = Path(tempfile.mkdtemp(prefix="attempt-", dir=work)) / "output"
        started = datetime.now(UTC)
        facts = make(Workshop(scratch=scratch, output=output))
        artifact = self.store.put(output, action.media_type)
        result = _result(release, action, artifact.digest, facts, started)
        self.store.append(f"actions/{action.asset}", result.model_dump(mode="json"))
        self._witness.performed(result)
        shutil.rmtree(work)
        return result


def _result(
    release: str, action: Action, artifact: str, facts: Mapping[str, Any], started: datetime
) -> Result:
    return Result(
        asset=action.asset,
        release=release,
        artifact=artifact,
        media_type=action.media_type,
        action=action.digest,
        inputs=dict(action.inputs),
        parameters=dict(action.parameters),
        versions=dict(action.versions),
        facts=dict(facts),
        started=started,
        finished=datetime.now(UTC),
    )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _list(model: str) -> str:
    return f"models/{model}"
