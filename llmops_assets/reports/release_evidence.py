"""The signed statements of one release, each verified, as the records that they were made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llmops_assets.errors import EvidenceError, ReleaseError, StoreError
from llmops_assets.evidence import merkle
from llmops_assets.evidence.checkpoint import Checkpoint
from llmops_assets.evidence.leaves import Entry, release_chain
from llmops_assets.evidence.log import EvidenceLog
from llmops_assets.evidence.statements import LIFECYCLE_EVENT, PROVENANCE, SHA256
from llmops_assets.release import Release
from llmops_assets.reports.audit_record import Dependency, Step
from llmops_assets.storage.store import Record, Store

R = TypeVar("R", bound=BaseModel)

REUSED = "llmops_reusedFrom"
FACTS = "llmops_facts"


class Event(BaseModel):
    """Something that happened to the release: the predicate of a lifecycle event."""

    model_config = ConfigDict(frozen=True)

    asset: str
    release: str
    inputs: dict[str, str]
    document: dict[str, Any]
    started: datetime
    finished: datetime


@dataclass(frozen=True)
class Found(Generic[R]):
    """A record, and the entry of the log that holds it."""

    record: R
    entry: Entry


class ReleaseEvidence:
    """What the evidence log has of one release.

    What cannot be verified is left out and named in `problems`: an auditor sees what holds
    beside what does not.
    """

    def __init__(self, evidence: EvidenceLog, release: str, as_of: datetime | None) -> None:
        """Reads and verifies the release's chain.

        Args:
            evidence: the log.
            release: its key.
            as_of: nothing later is looked at; None: all of it.

        Raises:
            ReleaseError: nothing is on record of it.
        """
        self.release = release
        self.chain = release_chain(Release.parse(release).key)
        self.problems: list[str] = []
        self.clock_backwards: list[int] = []
        self.verified = 0
        self.checkpoint: Checkpoint | None = None
        self._evidence = evidence
        chain = self._read_chain()
        if not chain and not self.problems:
            raise ReleaseError(
                f"Nothing is on record of release {release}",
                expected="the key of a release that was asked for",
                cure=f"`llmops gates {Release.parse(release).model}` lists the releases",
            )
        self.entries = [entry for entry in chain if as_of is None or entry.time <= as_of]
        if chain and not self.entries:
            raise ReleaseError(
                f"Nothing was on record of release {release} at that time",
                expected=f"a time from {chain[0].time:%Y-%m-%d %H:%M:%S} UTC on",
                found=as_of,
                cure="ask for a later time, or for all of it without one",
            )

    def of(self, predicate_type: str, form: type[R]) -> Iterator[Found[R]]:
        """Records of a kind, oldest first."""
        for entry in self.entries:
            if entry.leaf.predicate_type == predicate_type:
                record = self.read(entry, form)
                if record is not None:
                    yield Found(record, entry)

    def raw(self, predicate_type: str) -> list[Entry]:
        """Entries of a kind, oldest first."""
        return [entry for entry in self.entries if entry.leaf.predicate_type == predicate_type]

    @cached_property
    def events(self) -> list[Found[Event]]:
        """What happened to the release, oldest first."""
        return list(self.of(LIFECYCLE_EVENT, Event))

    @cached_property
    def steps(self) -> dict[str, Step]:
        """How each artifact was made, by asset, in the order in which it first was."""
        return {
            entry.statement.subject[0].name: _step(entry, self._origin_attested(entry))
            for entry in self.raw(PROVENANCE)
        }

    def read(self, entry: Entry, form: type[R]) -> R | None:
        """A statement's predicate; None, and a problem, if it has another form."""
        try:
            return form.model_validate(entry.statement.predicate)
        except ValidationError as error:
            self.problems.append(
                f"Entry {entry.sequence} was written by another version of the platform: "
                f"{error.error_count()} fields of {form.__name__} cannot be read."
            )
            return None

    def before(self, entry: Entry, chain: str) -> Entry | None:
        """The entry of a chain before this one; None for the first, and if it does not verify."""
        ordinal = entry.leaf.links[chain].ordinal
        if ordinal == 0:
            return None
        try:
            return next(self._evidence.entries(chain, start=ordinal - 1))
        except (EvidenceError, StoreError) as error:
            self.problems.append(str(error))
            return None

    def _read_chain(self) -> list[Entry]:
        try:
            self.checkpoint = self._evidence.checkpoint()
        except (EvidenceError, StoreError) as error:
            self.problems.append(str(error))
        found: list[Entry] = []
        start = 0
        while True:
            try:
                rest = self._evidence.entries(self.chain, start=start)
            except (EvidenceError, StoreError) as error:
                # Of the log as a whole: nothing of it can be relied on.
                self.problems.append(str(error))
                break
            try:
                for entry in rest:
                    self._check(entry, found[-1] if found else None, start)
                    found.append(entry)
                    start += 1
                break
            except (EvidenceError, StoreError) as error:
                self.problems.append(str(error))
                start += 1  # what comes after it may still hold
        self.problems = list(dict.fromkeys(self.problems))
        return found

    def _check(self, entry: Entry, previous: Entry | None, ordinal: int) -> None:
        """Checks the entry's place in chain and tree, beyond what the log has checked.

        Raises:
            EvidenceError: it does not hold.
        """
        link = entry.leaf.links[self.chain]
        expected = link.previous  # where the one before could not be read
        if previous is not None and previous.leaf.links[self.chain].ordinal == ordinal - 1:
            expected = previous.digest
        if (link.ordinal, link.previous) != (ordinal, expected):
            raise EvidenceError(
                f"Entry {entry.sequence} does not follow the one before it in {self.chain}",
                expected=f"place {ordinal} after {expected}",
                found=f"place {link.ordinal} after {link.previous}",
                cure="treat the log as tampered with: an entry was left out or put in between",
            )
        if self.checkpoint is not None and entry.sequence < self.checkpoint.size:
            size = self.checkpoint.size
            merkle.check_inclusion(
                merkle.leaf_hash(entry.leaf.content),
                entry.sequence,
                size,
                self._evidence.inclusion_proof(entry.sequence, size),
                self.checkpoint.root,
            )
        if previous is not None and entry.time < previous.time:
            self.clock_backwards.append(entry.sequence)
        self.verified += 1

    def _origin_attested(self, entry: Entry) -> bool | None:
        """Whether the release that a result was reused from has provenance of the same bytes."""
        origin = entry.statement.predicate["runDetails"]["metadata"].get(REUSED)
        if origin is None:
            return None
        subject = entry.statement.subject[0]
        try:
            return any(
                made.statement.subject[0] == subject
                for made in self._evidence.entries(release_chain(origin), PROVENANCE)
            )
        except (EvidenceError, StoreError) as error:
            self.problems.append(f"Of {origin}, which {subject.name} was reused from: {error}")
            return False


def json_file(store: Store, artifact: str, name: str) -> Record | None:
    """A JSON object in an artifact that a statement names; None if it has no such file.

    Only this one file is read, and checked against the digest in the artifact's manifest:
    an engine may have hundreds of gigabytes.

    Raises:
        StoreError: the artifact is not in the store (any more), or damaged.
    """
    files = {file.path: file.digest for file in store.describe(artifact).files}
    return None if name not in files else store.record(files[name])


def _step(entry: Entry, origin_attested: bool | None) -> Step:
    """From SLSA provenance as `attest.provenance` writes it."""
    definition = entry.statement.predicate["buildDefinition"]
    details = entry.statement.predicate["runDetails"]
    dependencies = tuple(_dependency(found) for found in definition["resolvedDependencies"])
    return Step(
        asset=definition["externalParameters"]["asset"],
        artifact=entry.statement.subject[0].sha256,
        media_type=definition["internalParameters"]["mediaType"],
        action=definition["internalParameters"]["action"],
        # Assets have plain names; what else was used is named by its path in the record.
        inputs={
            found.name: found.digest
            for found in dependencies
            if found.digest is not None and "/" not in found.name and found.name != "source"
        },
        dependencies=dependencies,
        parameters=definition["externalParameters"]["parameters"],
        versions=definition["internalParameters"]["versions"],
        facts=details["metadata"][FACTS],
        started=details["metadata"]["startedOn"],
        finished=details["metadata"]["finishedOn"],
        reused_from=details["metadata"].get(REUSED),
        origin_attested=origin_attested,
        sequence=entry.sequence,
    )


def _dependency(found: Mapping[str, Any]) -> Dependency:
    digest = found.get("digest", {})
    return Dependency(
        name=found["name"],
        digest=f"{SHA256}:{digest[SHA256]}"
        if SHA256 in digest
        else next((f"{name}:{value}" for name, value in digest.items()), None),
        uri=found.get("uri"),
    )
