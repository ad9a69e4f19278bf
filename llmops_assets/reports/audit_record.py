"""The audit record: everything that signed statements say of one release, section by section.

It is the document that `llmops audit --json` prints, and what the page, the regulatory
export and the comparison of two releases are made from. Times are in UTC, digests are
`sha256:<hex>`, and `sequence` is the place in the evidence log of the statement that a line
rests on.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.compliance.model_card import ModelCard
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Verdict, WaiverUse
from llmops_assets.operate.incidents import Incident
from llmops_assets.serving.slots import Environment

FORMAT = "https://llmops-assets.dev/audit-record/v1"
"""Identifies the document's form; an identifier, never fetched."""


class Section(BaseModel):
    """Base of all parts of the record."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(Section):
    """Which release it is, and who asked for it."""

    release: str
    model: str
    version: int | None = Field(description="In the model registry; None: not registered.")
    use_case: str | None
    owner: str | None
    spec_file: str | None
    commit: str | None = Field(description="That the spec stood at; None: in no commit.")
    commit_holds: bool = Field(description="Whether the spec is exactly what the commit has.")
    pinned: bool = Field(description="Whether code and data files are the commit's as well.")
    requested_by: str | None
    requested: datetime | None
    derived_from: str | None
    spec: str | None = Field(description="Digest of the frozen spec.")
    package: str | None = Field(description="Digest of the packaged model.")
    position: str = Field(description="How far it got, in words.")


class Input(Section):
    """Something that the release was made from and did not make itself."""

    name: str
    digest: str | None
    uri: str | None = Field(default=None, description="Such as a package URL.")
    license: str | None = Field(default=None, description="SPDX expression; empty: not declared.")
    provenance: str | None = Field(default=None, description="Empty: not declared.")
    facts: dict[str, Any] = Field(default={}, description="Such as rows and slices.")


class Dependency(Section):
    """What a step is known to have used: an in-toto ResourceDescriptor."""

    name: str
    digest: str | None
    uri: str | None


class Step(Section):
    """How one artifact of the release was made; from its SLSA provenance."""

    asset: str
    artifact: str
    media_type: str
    action: str = Field(description="Digest of everything that the result depends on.")
    inputs: dict[str, str] = Field(description="Digest by asset.")
    dependencies: tuple[Dependency, ...]
    parameters: dict[str, Any]
    versions: dict[str, str]
    facts: dict[str, Any]
    started: datetime
    finished: datetime
    reused_from: str | None
    origin_attested: bool | None = Field(
        description="Whether the release that ran the tools has signed provenance of the same "
        "bytes; None where nothing was reused."
    )
    sequence: int


class Build(Section):
    """How it was made."""

    steps: tuple[Step, ...]
    toolchain: str | None
    flags: dict[str, Any] = Field(description="Of the engine, as the tools got them.")
    versions: dict[str, tuple[str, ...]] = Field(description="All that took part, by name.")
    hardware: dict[str, str]
    images: dict[str, str] = Field(description="Digests of container images, by asset.")
    commands: tuple[tuple[str, ...], ...] = Field(
        description="Of the toolchain, from the sidecars in weights and engine; folders are names."
    )


class GateVerdict(Section):
    """A verdict, and whether it is the one that counts."""

    verdict: Verdict
    newest: bool
    waived: WaiverUse | None = Field(description="The last use of a waiver for it.")
    sequence: int


class Approval(Section):
    """A person's decision, as recorded or as verified by a promotion."""

    kind: Literal["recorded", "verified"]
    approver: str
    decision: str
    reason: str
    package: str
    requested_by: str | None
    known_by: str = Field(description="How the approver is known: `claimed`, or what proves it.")
    time: datetime
    sequence: int


class Load(Section):
    """The package was loaded into a slot and asked the known questions."""

    asset: str
    environment: Environment
    colour: str
    package: str
    version: int
    seconds: float
    right_answers: int
    answers: int
    time: datetime
    sequence: int


class Share(Section):
    """A slot on a route."""

    release: str
    version: int
    colour: str
    weight: int = Field(description="Per cent of the traffic.")
    package: str


class RouteStep(Section):
    """A change of a route that named the release before or after."""

    environment: Environment
    generation: int
    actor: str
    reason: str
    before: tuple[Share, ...]
    after: tuple[Share, ...]
    time: datetime
    sequence: int


class Admission(Section):
    """A decision to deploy: a SLSA verification summary."""

    environment: str
    passed: bool
    package: str
    policy: str
    levels: tuple[str, ...]
    rests_on: int = Field(description="Number of statements that were held against the policy.")
    time: datetime
    sequence: int


class ServingPeriod(Section):
    """A time in which the release had traffic."""

    environment: Environment
    weight: int = Field(description="Per cent of the traffic.")
    since: datetime
    until: datetime | None = Field(description="None: it still has.")


class Deployments(Section):
    """Where it was put, and who had it put there."""

    loads: tuple[Load, ...] = ()
    routes: tuple[RouteStep, ...] = ()
    admissions: tuple[Admission, ...] = ()
    served: tuple[ServingPeriod, ...] = ()


class Reading(Section):
    """A document that was recorded while the release served."""

    document: dict[str, Any]
    time: datetime
    sequence: int


class Operation(Section):
    """How it did."""

    metrics: tuple[Reading, ...] = ()
    scaling: tuple[Reading, ...] = ()
    incidents: tuple[Incident, ...] = Field(default=(), description="As they stand.")


class Retirement(Section):
    """How it ended."""

    deprecated: datetime | None = None
    archived: datetime | None = None
    archive_file: str | None = None
    archive_digest: str | None = None
    keep_until: datetime | None = None
    restored: Decision | None = Field(
        default=None, description="Whether the archive was found to restore byte for byte."
    )
    removed: datetime | None = None


class SigningKey(Section):
    """A key that signed statements about the release."""

    keyid: str
    statements: int
    current: bool = Field(description="Whether it is the first of its role in the trust root.")


class Integrity(Section):
    """Whether the evidence holds. What was read is in the other sections all the same."""

    problems: tuple[str, ...]
    statements: int = Field(description="Number whose signature and place were verified.")
    chain: str
    first: datetime | None
    last: datetime | None
    log_size: int | None
    root: str | None = Field(description="Root of the log's Merkle tree (RFC 6962), base64.")
    checkpoint_time: datetime | None
    trust_root: str | None = Field(description="Fingerprint of the trust root.")
    keys: tuple[SigningKey, ...]
    clock_backwards: tuple[int, ...] = Field(
        description="Entries of the chain that are dated before the one before them."
    )
    unattested: tuple[str, ...] = Field(
        description="Assets for which the store shows an artifact that no statement is about."
    )
    package_signature: Literal["valid", "invalid", "missing"] | None = Field(
        description="Of the package, by the trust root's package keys; None: no package."
    )
    missing: tuple[str, ...] = Field(
        description="Assets whose artifact, which a statement names, the store does not have."
    )

    @property
    def holds(self) -> bool:
        """Whether every statement was there, unchanged, in order, and signed as it must be."""
        return not self.problems


class Severity(StrEnum):
    """How much a gap matters."""

    MISSING = "missing"
    """Evidence that must be there is not."""
    DOUBTFUL = "doubtful"
    """It is there, and somebody must judge whether it is enough."""
    NOTE = "note"
    """To be known when reading the rest."""


class Gap(Section):
    """Something that the evidence does not show."""

    kind: str
    severity: Severity
    what: str
    why: str = Field(description="Why it matters.")
    to_do: str


class Document(Section):
    """A file for people or for tools in one of the release's artifacts."""

    name: str
    asset: str
    file: str
    digest: str = Field(description="Of the file; the artifact's manifest names it.")


class AuditRecord(Section):
    """Everything on record of a release."""

    format: Literal["https://llmops-assets.dev/audit-record/v1"] = FORMAT
    made: datetime | None = Field(
        default=None, description="When; None in an archive, which is made again byte for byte."
    )
    as_of: datetime | None = Field(description="Nothing later was looked at; None: all of it.")
    summary: str = Field(description="One paragraph for a person.")
    gaps: tuple[Gap, ...] = ()
    identity: Identity
    spec: dict[str, Any] | None = Field(description="As it was frozen; None: not on record.")
    card: ModelCard | None = Field(description="The model card that was judged.")
    documents: tuple[Document, ...]
    inputs: tuple[Input, ...]
    build: Build
    gates: tuple[GateVerdict, ...] = Field(description="Newest first.")
    waivers: tuple[WaiverUse, ...] = Field(description="Every use, oldest first.")
    approvals: tuple[Approval, ...] = Field(description="Oldest first.")
    deployments: Deployments
    operation: Operation
    retirement: Retirement
    integrity: Integrity

    @property
    def seen_until(self) -> datetime | None:
        """The end of the time that it speaks of."""
        return self.as_of or self.made or self.integrity.checkpoint_time

    def step(self, asset: str) -> Step | None:
        """How an asset of the release was made."""
        return next((step for step in self.build.steps if step.asset == asset), None)

    @property
    def counting(self) -> dict[str, GateVerdict]:
        """The newest verdict of each gate, by gate, in the order of the lifecycle."""
        newest = {found.verdict.gate: found for found in self.gates if found.newest}
        return {name: newest[name] for name in _in_order(newest)}


def _in_order(names: dict[str, GateVerdict]) -> list[str]:
    from llmops_assets.evidence.gates import GATES

    known = list(GATES)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))
