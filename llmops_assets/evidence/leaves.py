"""Leaves: what the Merkle tree of the evidence log is made of.

A leaf names a signed statement by its digest and links it into chains: one for each thing
that the statement is about, such as a release. A chain counts its entries and each names the
one before, so that whoever is given the entries of one release can see that none is missing.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence.dsse import Envelope
from llmops_assets.evidence.statements import Statement
from llmops_assets.storage.store import Record, canonical_json, digest_of

APPROVALS = "approvals"
"""The chain of all decisions of people."""
APPROVERS = "approvers"
"""The chain of the policies of who may approve; the last one is in force."""
SETTINGS = "settings"
"""The chain of the settings that the installation was started with."""
ANCHORS = "anchors"
"""The chain of all anchors of the log, see `anchors`."""


def release_chain(release: str) -> str:
    """The chain of everything about a release."""
    return f"releases/{release}"


def incident_chain(model: str) -> str:
    """The chain of a model's incidents."""
    return f"incidents/{model}"


def route_chain(environment: str, model: str) -> str:
    """The chain of a model's routes in an environment; the last one is in force."""
    return f"routes/{environment}/{model}"


class Link(BaseModel):
    """A leaf's place in a chain."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ordinal: int = Field(ge=0, description="Number of entries of the chain before this one.")
    previous: str | None = Field(description="Digest of the leaf before; None for the first.")


class Leaf(BaseModel):
    """One leaf."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequence: int = Field(ge=0, description="Place in the log.")
    statement: str = Field(description="Digest of the envelope, in its canonical form.")
    predicate_type: str
    time: AwareDatetime = Field(description="When it was added.")
    links: dict[str, Link] = Field(min_length=1, description="By the chain's name.")

    @property
    def content(self) -> bytes:
        """What is hashed into the tree: canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """Of the content; the entry is known by it."""
        return digest_of(self.content)


class LogRecord(BaseModel):
    """One record of the log: leaf, statement, and the checkpoint of the log up to here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    leaf: Leaf
    envelope: Envelope
    checkpoint: Envelope = Field(description="Over this leaf and all before it.")


class Entry(BaseModel):
    """A verified entry of the log."""

    model_config = ConfigDict(frozen=True)

    record: LogRecord
    statement: Statement

    @property
    def leaf(self) -> Leaf:
        return self.record.leaf

    @property
    def sequence(self) -> int:
        """Place in the log."""
        return self.leaf.sequence

    @property
    def time(self) -> datetime:
        """When it was added."""
        return self.leaf.time

    @property
    def digest(self) -> str:
        """Of the leaf."""
        return self.leaf.digest


def envelope_digest(envelope: Envelope) -> str:
    """Digest by which a leaf names an envelope."""
    return digest_of(canonical_json(envelope.model_dump(mode="json")))


def read_log_record(record: Record, sequence: int) -> LogRecord:
    """A record of the log, whose leaf names this place and this statement.

    Raises:
        EvidenceError: it is none, or belongs elsewhere.
    """
    try:
        read = LogRecord.model_validate(record)
        # A number as text would be read as the number: the same leaf from other bytes.
        if read.model_dump(mode="json") != record:
            raise ValueError("the same values in another form than ours")
    except ValueError as error:  # pydantic's are such
        raise EvidenceError(
            f"Entry {sequence} of the evidence log cannot be read",
            expected="leaf, envelope and checkpoint",
            found=error,
            cure="restore it from a backup; until then treat it as tampered with",
        ) from error
    actual = envelope_digest(read.envelope)
    if read.leaf.sequence != sequence or read.leaf.statement != actual:
        raise EvidenceError(
            f"Entry {sequence} of the evidence log is not what its leaf says",
            expected=f"place {read.leaf.sequence}, statement {read.leaf.statement}",
            found=f"place {sequence}, statement {actual}",
            cure="restore it from a backup; until then treat it as tampered with",
        )
    return read
