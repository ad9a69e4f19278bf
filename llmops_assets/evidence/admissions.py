"""Whether what was deployed had been let through: the rules, from signed statements alone.

This repeats, for somebody who was not there, what `verdicts.require` and `deploy/approval.py`
decided at the time. A release may get traffic if the newest verification summary for that
environment passed and is about its package, if all that the summary rests on is there, is
about what the release made, and passed, or was waived by a waiver that had not expired, and
if, in production, somebody other than who asked for the release approved it and nobody
rejected or revoked it since. A release that is still warm on the route may get its traffic
back if its canary had passed, and nobody revoked it since it was deployed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from llmops_assets import __version__
from llmops_assets.deploy.approvers import same_person
from llmops_assets.errors import EvidenceError
from llmops_assets.evidence.attest import MODEL_SPEC, PACKAGE
from llmops_assets.evidence.gates import APPROVAL, APPROVED, BUILT, CANARY, PROVEN, Gate
from llmops_assets.evidence.leaves import Entry
from llmops_assets.evidence.statements import (
    DECISION,
    GATE_VERDICT,
    LIFECYCLE_EVENT,
    PROVENANCE,
    REVOCATION,
    ROUTE_CHANGE,
    VERIFICATION_SUMMARY,
    WAIVER_USE,
)
from llmops_assets.evidence.verdicts import Verdict, WaiverUse
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Environment

GATES_OF_EVENT: Mapping[str, tuple[Environment, tuple[Gate, ...]]] = {
    "staging_deployment": (Environment.STAGING, BUILT),
    "production_candidate": (Environment.PRODUCTION, APPROVED),
    "production_deployment": (Environment.PRODUCTION, PROVEN),
}
"""What each deployment needed."""
GATES_OF_TRAFFIC = {Environment.STAGING: BUILT, Environment.PRODUCTION: PROVEN}
"""What a package needed to get traffic."""

Predicate = TypeVar("Predicate", bound=BaseModel)


@dataclass(frozen=True)
class Admission:
    """Something that brought a release closer to its users, and whether it was allowed to."""

    event: str
    sequence: int
    rests_on: str
    """In words."""
    problems: tuple[str, ...]
    """Why it was not allowed; empty if it was."""


class _Event(BaseModel):
    """The fields of a lifecycle event that count here."""

    asset: str
    inputs: dict[str, str]


class _Signed(BaseModel):
    """The fields of a signed approval that count here."""

    statement: str


class _Approval(BaseModel):
    """The fields of an approval's document that count here."""

    approver: str
    """Of several, their names with commas between."""
    decision: Literal["approve", "reject"]
    package: str
    signed: tuple[_Signed, ...] = ()
    expires: AwareDatetime | None = None


class _Decision(BaseModel):
    """The fields of a recorded decision that count here."""

    approver: str
    decision: Literal["approve", "reject"]
    package: str


class _Input(BaseModel):
    digest: dict[str, str]


class _Verifier(BaseModel):
    version: dict[str, str]


class _Summary(BaseModel):
    """The fields of a verification summary that count here."""

    resource: str = Field(validation_alias="resourceUri")
    result: Literal["PASSED", "FAILED"] = Field(validation_alias="verificationResult")
    inputs: tuple[_Input, ...] = Field(validation_alias="inputAttestations")
    time: datetime = Field(validation_alias="timeVerified")
    verifier: _Verifier


def admissions(release: str, entries: Sequence[Entry]) -> Iterator[Admission]:
    """Everything that deployed a release or gave it traffic, in order, held against the rules.

    Args:
        release: its key.
        entries: its whole chain, oldest first, verified.

    Raises:
        EvidenceError: a statement has a form that this version does not read.
    """
    for place, entry in enumerate(entries):
        before = entries[:place]
        kind = entry.statement.predicate_type
        if kind == LIFECYCLE_EVENT:
            event = _read(_Event, entry)
            if event.asset in GATES_OF_EVENT:
                environment, gates = GATES_OF_EVENT[event.asset]
                package = event.inputs.get(PACKAGE, "")
                yield _admission(
                    event.asset, entry, _let_through(release, package, environment, gates, before)
                )
        elif kind == ROUTE_CHANGE:
            yield from _traffic(release, entry, before)


def _traffic(release: str, entry: Entry, before: Sequence[Entry]) -> Iterator[Admission]:
    """What a route change gives the release that it did not have."""
    route = _read(Route, entry)
    predecessor = _route_at(before, route.predecessor)
    # A release that is not on the route before is not on its chain of that time either.
    former = {
        (target.release, target.package): target.weight
        for target in (() if predecessor is None else predecessor.targets)
    }
    for target in route.targets:
        weight_before = former.get((release, target.package))
        if target.release != release or target.weight == 0 or weight_before:
            continue
        gates = GATES_OF_TRAFFIC[route.environment]
        found = _let_through(release, target.package, route.environment, gates, before)
        if weight_before == 0 and (served := _served_well(target.package, before)):
            found = _Found(served, ())
        yield _admission(f"{route.environment} route, generation {route.generation}", entry, found)


@dataclass(frozen=True)
class _Found:
    rests_on: str
    problems: tuple[str, ...]


def _admission(event: str, entry: Entry, found: _Found) -> Admission:
    return Admission(event, entry.sequence, found.rests_on, found.problems)


def _let_through(
    release: str,
    package: str,
    environment: Environment,
    gates: Sequence[Gate],
    before: Sequence[Entry],
) -> _Found:
    entry, summary = _newest_summary(release, environment, before)
    if entry is None or summary is None:
        return _Found("nothing", (f"no verification summary for {environment} came before it",))
    problems: list[str] = []
    if summary.result != "PASSED":
        problems.append(f"the verification summary before it, entry {entry.sequence}, says no")
    if entry.statement.subject[0].sha256 != package:
        problems.append(
            f"the verification summary before it is about package "
            f"{entry.statement.subject[0].sha256}, not {package}"
        )
    known = [other for other in before if other.sequence < entry.sequence]
    problems += _missing_inputs(summary, known)
    inputs = _rests_on(summary, known)
    problems += _objections(inputs, known, package, summary.time)
    judged = {verdict.gate: verdict for verdict in _verdicts(inputs)}
    # An earlier version may have had other gates.
    if summary.verifier.version.get("llmops-assets") == __version__:
        problems += [
            f"it does not rest on a verdict of {gate.name}"
            for gate in gates
            if gate.name not in judged
        ]
    if any(_asset(other) == "deprecated_version" for other in before):
        problems.append("the release was deprecated before")
    words = f"entry {entry.sequence} and {len(judged)} gates"
    if environment is Environment.PRODUCTION:
        approver, objections = _approved(judged.get(APPROVAL.name), package, before, summary.time)
        problems += objections
        words += f", approved by {approver}"
    return _Found(words, tuple(problems))


def _newest_summary(
    release: str, environment: Environment, before: Sequence[Entry]
) -> tuple[Entry, _Summary] | tuple[None, None]:
    for entry in reversed(before):
        if entry.statement.predicate_type == VERIFICATION_SUMMARY:
            summary = _read(_Summary, entry)
            parts = summary.resource.removeprefix("llmops:").split("/")
            if (parts[0], parts[-1]) == (environment, release):
                return entry, summary
    return None, None


def _digests(summary: _Summary) -> Iterator[str]:
    return (f"sha256:{found.digest.get('sha256')}" for found in summary.inputs)


def _missing_inputs(summary: _Summary, known: Iterable[Entry]) -> list[str]:
    present = {entry.leaf.statement for entry in known}
    return [
        f"it rests on statement {digest}, which is not there before it"
        for digest in _digests(summary)
        if digest not in present
    ]


def _rests_on(summary: _Summary, known: Iterable[Entry]) -> list[Entry]:
    """The inputs of a summary that are there."""
    wanted = set(_digests(summary))
    return [entry for entry in known if entry.leaf.statement in wanted]


def _objections(
    inputs: Sequence[Entry], known: Sequence[Entry], package: str, time: datetime
) -> Iterator[str]:
    """What speaks against going on by these verdicts and waivers."""
    newest = {verdict.gate: verdict for verdict in _verdicts(known)}
    uses = [_read(WaiverUse, entry) for entry in _of_type(inputs, WAIVER_USE)]
    made = _made(known)
    for verdict in _verdicts(inputs):
        gate = verdict.gate
        for asset, digest in verdict.subjects.items():
            if (asset, digest) not in made:
                yield (
                    f"the verdict of {gate} is about {asset} {digest}, which no statement before "
                    "it says the release made"
                )
        if verdict.subjects.get(PACKAGE, package) != package:
            yield f"the verdict of {gate} is about package {verdict.subjects[PACKAGE]}"
        if newest[gate] != verdict:
            yield f"the verdict of {gate} that it rests on was not the newest"
        waived = any(
            (use.gate, use.judged) == (gate, verdict.time) and time < use.waiver.expires
            for use in uses
        )
        if not verdict.passed and not waived:
            yield f"{gate} had {verdict.decision}, and it rests on no waiver in force"


def _made(entries: Iterable[Entry]) -> set[tuple[str, str]]:
    """Asset and digest of all artifacts that the release made, its events among them."""
    return {
        (subject.name, subject.sha256)
        for entry in entries
        if entry.statement.predicate_type in (PROVENANCE, LIFECYCLE_EVENT)
        for subject in entry.statement.subject
    }


def _verdicts(entries: Iterable[Entry]) -> list[Verdict]:
    return [_read(Verdict, entry) for entry in _of_type(entries, GATE_VERDICT)]


def _approved(
    verdict: Verdict | None, package: str, before: Sequence[Entry], time: datetime
) -> tuple[str, list[str]]:
    """Who approved a package, and what speaks against that approval."""
    if verdict is None:
        return "nobody", ["nobody is recorded to have approved it"]
    digest = verdict.subjects.get(APPROVAL.asset)
    approvals = (entry for entry in before if _asset(entry) == APPROVAL.asset)
    entry = next((e for e in approvals if e.statement.subject[0].sha256 == digest), None)
    if entry is None:
        return "nobody", [f"the approval {digest} that {APPROVAL.name} judged is not there"]
    approval = _read(_Approval, entry, "document")
    problems: list[str] = []
    if approval.decision != "approve" or approval.package != package:
        problems.append(f"{approval.approver} did not approve package {package}")
    requested_by = _requested_by(before)
    approvers = approval.approver.split(",")
    if requested_by is None or any(same_person(name, requested_by) for name in approvers):
        problems.append(f"{approval.approver} approved, and {requested_by} asked for the release")
    if approval.expires is not None and approval.expires <= time:
        problems.append(f"the approval had expired at {approval.expires:%F %T %Z}")
    decisions = {found.leaf.statement for found in _of_type(before, DECISION)}
    if any(signed.statement not in decisions for signed in approval.signed):
        problems.append("a signed decision that the approval rests on is not there")
    if any(found.sequence > entry.sequence for found in _of_type(before, REVOCATION)):
        problems.append("the approval had been revoked")
    last = next((_read(_Decision, e) for e in reversed(_of_type(before, DECISION))), None)
    if last is not None and (last.decision, last.package) == ("reject", package):
        problems.append(f"{last.approver} had rejected it")
    return approval.approver, problems


def _requested_by(before: Iterable[Entry]) -> str | None:
    for entry in _of_type(before, PROVENANCE):
        if entry.statement.subject[0].name == MODEL_SPEC:
            metadata = entry.statement.predicate.get("runDetails", {}).get("metadata", {})
            return metadata.get("llmops_facts", {}).get("requested_by")
    return None


def _served_well(package: str, before: Sequence[Entry]) -> str | None:
    """Why a warm package may have its traffic back, in words; None if it may not."""
    if _revoked_since_deployed(before):
        return None
    for entry in reversed(_of_type(before, GATE_VERDICT)):
        verdict = _read(Verdict, entry)
        if verdict.gate == CANARY.name and verdict.subjects.get(PACKAGE) == package:
            return f"its canary, entry {entry.sequence}; still warm" if verdict.passed else None
    return None


def _revoked_since_deployed(before: Sequence[Entry]) -> bool:
    for entry in reversed(before):
        if _asset(entry) == "production_deployment":
            return False
        if entry.statement.predicate_type == REVOCATION:
            return True
    return False


def _route_at(before: Iterable[Entry], digest: str | None) -> Route | None:
    return next((_read(Route, entry) for entry in before if entry.digest == digest), None)


def _asset(entry: Entry) -> str | None:
    """The asset whose event this is; None for other statements."""
    is_event = entry.statement.predicate_type == LIFECYCLE_EVENT
    return _read(_Event, entry).asset if is_event else None


def _of_type(entries: Iterable[Entry], predicate_type: str) -> list[Entry]:
    return [entry for entry in entries if entry.statement.predicate_type == predicate_type]


def _read(model: type[Predicate], entry: Entry, field: str | None = None) -> Predicate:
    predicate = entry.statement.predicate
    try:
        return model.model_validate(predicate if field is None else predicate.get(field))
    except ValidationError as error:
        raise EvidenceError(
            f"Entry {entry.sequence} of the evidence log has a form that this version does "
            "not read",
            expected=f"a {entry.statement.predicate_type} as it writes them",
            found=error,
            cure="verify with the version of the platform that wrote it",
        ) from error
