"""What differs between two releases, and nothing else, from the evidence of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from llmops_assets.errors import EvidenceError, StoreError
from llmops_assets.platform import Platform
from llmops_assets.reports.audit import audit
from llmops_assets.reports.audit_record import AuditRecord, Section
from llmops_assets.reports.printable import printable
from llmops_assets.reports.summary import in_production
from llmops_assets.reports.wording import number, title

DATA = ("training_data", "evaluation_data")
WEIGHTS = ("checkpoint", "converted_weights")
CODE = ("code", "harness", "tasks")
"""Parameters of steps that hold digests of a team's own code."""


class Change(Section):
    """Something that is not the same in both."""

    what: str
    first: Any = Field(description="None: the first release does not have it.")
    second: Any = Field(description="None: the second release does not have it.")


class ReleaseDifference(Section):
    """All that differs, by topic; a topic without a difference is left out."""

    first: str
    second: str
    notes: tuple[str, ...]
    holds: bool = Field(description="Whether the evidence of both holds.")
    topics: dict[str, tuple[Change, ...]]

    @property
    def equal(self) -> bool:
        """Whether nothing differs but key, times and who asked, as evidence that holds says."""
        return self.holds and not self.topics


def difference(platform: Platform, first: str, second: str) -> ReleaseDifference:
    """Compares two releases, of one model or of two.

    Raises:
        ReleaseError: a key is malformed, or nothing is on record of it.
        EvidenceError: nothing that is on record of it can be verified.
    """
    one, other = audit(platform, first), audit(platform, second)
    for record in (one, other):
        if record.integrity.statements == 0:
            raise EvidenceError(
                f"The evidence of {record.identity.release} cannot be read",
                expected="signed statements to compare",
                found="; ".join(record.integrity.problems),
                cure="run `llmops verify` on it, and restore the evidence from a backup",
            )
    return compare(one, other, platform)


def compare(one: AuditRecord, other: AuditRecord, platform: Platform) -> ReleaseDifference:
    """Compares what is on record of two releases.

    Args:
        one: the first.
        other: the second.
        platform: whose store has the file lists of their packages.
    """
    files = [_package_files(record, platform) for record in (one, other)]
    topics = {
        "spec": _changes(_flat(one.spec or {}), _flat(other.spec or {})),
        "code": _changes(_code(one), _code(other)),
        "data": _changes(_data(one), _data(other)),
        "weights": _changes(_artifacts(one, WEIGHTS), _artifacts(other, WEIGHTS)),
        "toolchain": _changes(_tools(one), _tools(other)),
        "engine": _changes(_engine(one), _engine(other)),
        "package": _changes(files[0] or {}, files[1] or {}),
        "gates": _changes(_gates(one), _gates(other)),
        "approvals": _changes(_approvals(one), _approvals(other)),
        "serving": _changes(_serving(one), _serving(other)),
    }
    return ReleaseDifference(
        first=one.identity.release,
        second=other.identity.release,
        notes=tuple(_notes(one, other, files)),
        holds=one.integrity.holds and other.integrity.holds,
        topics={name: changes for name, changes in topics.items() if changes},
    )


def lines(found: ReleaseDifference) -> list[str]:
    """It as the command line shows it."""
    shown = [f"note: {note}" for note in found.notes]
    if found.equal:
        shown.append(f"{found.first} and {found.second} are equal but for key, times and people")
    else:
        shown += [f"- {found.first}", f"+ {found.second}"]
    for topic, changes in found.topics.items():
        shown.append(topic)
        for change in changes:
            shown.append(f"  {change.what}")
            if change.first is not None:
                shown.append(f"    - {number(change.first)}")
            if change.second is not None:
                shown.append(f"    + {number(change.second)}")
    return [printable(line) for line in shown]


def _notes(
    one: AuditRecord, other: AuditRecord, files: list[dict[str, Any] | None]
) -> Iterator[str]:
    if one.identity.model != other.identity.model:
        yield f"they are releases of two models, {one.identity.model} and {other.identity.model}"
    for record, found in zip((one, other), files, strict=True):
        release = record.identity.release
        if not record.integrity.holds:
            yield f"the evidence of {release} does not hold; see `llmops audit {release}`"
        if found is None:
            yield f"the store does not have the package of {release}; its files are not compared"


def _changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Change, ...]:
    names = dict.fromkeys([*one, *other])
    return tuple(
        Change(what=name, first=one.get(name), second=other.get(name))
        for name in names
        if one.get(name) != other.get(name)
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested values by their paths, such as `gates.accuracy.exact_match.at_least`."""
    if isinstance(value, Mapping) and value:
        pairs = [(f"{name}.{key}" if name else str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple) and value:
        pairs = [(f"{name}[{place}]", inner) for place, inner in enumerate(value)]
    else:
        return {name: value}
    return {path: leaf for path, inner in pairs for path, leaf in _flat(inner, path).items()}


def _code(record: AuditRecord) -> dict[str, Any]:
    identity = record.identity
    found: dict[str, Any] = {"commit": identity.commit}
    if identity.commit is not None and not identity.commit_holds:
        found["changed since the commit"] = True
    for step in record.build.steps:
        for name in CODE:
            if step.parameters.get(name):
                found |= _flat(step.parameters[name], f"{step.asset}.{name}")
    return found


def _data(record: AuditRecord) -> dict[str, Any]:
    found = _artifacts(record, DATA)
    for given in record.inputs:
        if given.name.endswith(" data"):
            terms = {"licence": given.license, "provenance": given.provenance}
            for name, value in {**given.facts, **terms}.items():
                found |= _flat(value, f"{given.name}: {name}")
    return found


def _artifacts(record: AuditRecord, assets: tuple[str, ...]) -> dict[str, Any]:
    return {
        f"{title(step.asset)} digest": step.artifact
        for step in record.build.steps
        if step.asset in assets
    }


def _tools(record: AuditRecord) -> dict[str, Any]:
    found: dict[str, Any] = {"toolchain": record.build.toolchain}
    for step in record.build.steps:
        found |= {f"{step.asset}: {name}": value for name, value in step.versions.items()}
    return found


def _engine(record: AuditRecord) -> dict[str, Any]:
    return {**_flat(record.build.flags, "flags"), **_artifacts(record, ("engine",))}


def _package_files(record: AuditRecord, platform: Platform) -> dict[str, Any] | None:
    """Digest of each file by its path; None where the store has no such package."""
    if record.identity.package is None:
        return {}
    try:
        artifact = platform.store.describe(record.identity.package)
    except StoreError:
        return None  # the notes say so
    return {file.path: file.digest for file in artifact.files}


def _gates(record: AuditRecord) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, counting in record.counting.items():
        verdict = counting.verdict
        found[f"{name}: result"] = verdict.decision.value
        found[f"{name}: policy"] = verdict.policy
        if counting.waived is not None:
            found[f"{name}: waived by"] = counting.waived.waiver.owner
        for finding in verdict.findings:
            what = f"{name}: {finding.metric}" + (f" of {finding.slice}" if finding.slice else "")
            found[what] = finding.value
            found[f"{what}, expected"] = finding.threshold
    return found


def _approvals(record: AuditRecord) -> dict[str, Any]:
    verified = [approval for approval in record.approvals if approval.kind == "verified"]
    newest = (verified or record.approvals or (None,))[-1]
    if newest is None:
        return {}
    return {
        "decision": newest.decision,
        "approver": newest.approver,
        "known by": newest.known_by,
        "reason": newest.reason,
    }


def _serving(record: AuditRecord) -> dict[str, Any]:
    periods = in_production(record)
    found: dict[str, Any] = {"position": record.identity.position}
    for place, period in enumerate(periods, start=1):
        until = None if period.until is None else period.until.isoformat()
        found[f"production, time {place}"] = {
            "from": period.since.isoformat(), "until": until or "now", "per cent": period.weight,
        }  # fmt: skip
    return found
