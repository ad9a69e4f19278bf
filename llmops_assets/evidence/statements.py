"""What is attested: in-toto Statements, and the predicate types that this platform writes.

A Statement (in-toto Attestation Framework v1) says something, the predicate, about
artifacts that it names by their digests, the subjects. docs/predicates.md has the fields
of every predicate. Who says it is not part of a Statement, see `dsse`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)

from llmops_assets.errors import EvidenceError
from llmops_assets.storage.store import canonical_json, check_digest

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
"""Type of a Statement's bytes in a DSSE envelope."""

PROVENANCE = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
VERIFICATION_SUMMARY = "https://slsa.dev/verification_summary/v1"

OWN_PREDICATES = "https://llmops-assets.dev/predicate"
"""What the types of the platform's own predicates begin with: identifiers, never fetched."""
GATE_VERDICT = f"{OWN_PREDICATES}/gate-verdict/v1"
WAIVER_USE = f"{OWN_PREDICATES}/waiver-use/v1"
LIFECYCLE_EVENT = f"{OWN_PREDICATES}/lifecycle-event/v1"
ROUTE_CHANGE = f"{OWN_PREDICATES}/route-change/v1"
INCIDENT = f"{OWN_PREDICATES}/incident/v1"
INCIDENT_NOTE = f"{OWN_PREDICATES}/incident-note/v1"
SETTINGS_CHANGE = f"{OWN_PREDICATES}/settings-change/v1"
DECISION = f"{OWN_PREDICATES}/decision/v1"
"""A human approval or rejection as it was recorded."""
APPROVAL = f"{OWN_PREDICATES}/approval/v1"
"""A human approval or rejection as the approver signed it; inside of a decision."""
REVOCATION = f"{OWN_PREDICATES}/revocation/v1"
"""What approved a release before counts no more."""
APPROVERS = f"{OWN_PREDICATES}/approvers/v1"
"""The policy of who may approve was taken over."""
APPROVERS_CHANGE = f"{OWN_PREDICATES}/approvers-change/v1"
"""An approver agrees to a change of that policy; inside of its taking over."""
AUDIT_EXPORT = f"{OWN_PREDICATES}/audit-export/v1"
ANCHOR = f"{OWN_PREDICATES}/anchor/v1"

SHA256 = "sha256"

LowerHex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]+$")]
TypeUri = Annotated[str, StringConstraints(pattern=r"^https://[!-~]+$")]


class Subject(BaseModel):
    """An artifact that a Statement is about: an in-toto ResourceDescriptor with its digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="Says which one it is; not unique in the world.")
    digest: dict[str, LowerHex] = Field(description="Hex digests by algorithm, sha256 among them.")

    @field_validator("digest")
    @classmethod
    def _has_sha256(cls, digest: dict[str, str]) -> dict[str, str]:
        if len(digest.get(SHA256, "")) != 64:
            raise ValueError("a subject is known by its sha256 digest, 64 hex digits")
        return digest

    @property
    def sha256(self) -> str:
        """Its digest as the store writes digests, `sha256:<hex>`."""
        return f"sha256:{self.digest[SHA256]}"


class Statement(BaseModel):
    """An in-toto Statement v1."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True
    )

    type: Literal["https://in-toto.io/Statement/v1"] = Field(
        default=STATEMENT_TYPE, validation_alias="_type", serialization_alias="_type"
    )
    subject: tuple[Subject, ...] = Field(min_length=1)
    predicate_type: TypeUri = Field(
        validation_alias="predicateType", serialization_alias="predicateType"
    )
    predicate: dict[str, Any] = Field(description="JSON values, as the predicate type says.")

    @field_validator("predicate")
    @classmethod
    def _is_json(cls, predicate: dict[str, Any]) -> dict[str, Any]:
        try:
            canonical_json(predicate)  # refuses NaN and infinity too, which JSON has not
        except (TypeError, ValueError) as error:
            raise ValueError(f"a predicate is made of JSON values: {error}") from error
        return predicate

    @field_validator("subject")
    @classmethod
    def _names_differ(cls, subjects: tuple[Subject, ...]) -> tuple[Subject, ...]:
        if len({subject.name for subject in subjects}) != len(subjects):
            raise ValueError("the names of the subjects must differ")
        return subjects

    def payload(self) -> bytes:
        """Its bytes: canonical JSON, so that equal Statements have equal bytes."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))

    @classmethod
    def parse(cls, payload: bytes) -> Statement:
        """The Statement with these bytes.

        Only the canonical form is taken. In any other, such as one with a key twice, two
        readers could see two different Statements behind one signature.

        Raises:
            EvidenceError: they are none that this platform writes.
        """
        try:
            statement = cls.model_validate_json(payload)
        except ValidationError as error:
            raise EvidenceError(
                "These bytes are not a Statement",
                expected="an in-toto Statement v1 as this platform writes it",
                found=error,
                cure="treat the record as tampered with, unless a newer version wrote it",
            ) from error
        if statement.payload() != payload:
            raise EvidenceError(
                "A Statement is not in its canonical form",
                expected="sorted keys, each once, and no spaces",
                found=f"other bytes of a {statement.predicate_type}",
                cure="treat the record as tampered with: this platform writes no such bytes",
            )
        return statement


def subject(name: str, digest: str) -> Subject:
    """A subject from a digest as the store writes it.

    Args:
        digest: `sha256:<hex>`.

    Raises:
        StoreError: it is not a digest.
    """
    return Subject(name=name, digest={SHA256: check_digest(digest)})
