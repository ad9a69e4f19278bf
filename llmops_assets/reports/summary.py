"""One release in one paragraph, for a reader who knows nothing of how it was made."""

from __future__ import annotations

from datetime import timedelta

from llmops_assets.evidence.statistics import Decision
from llmops_assets.reports.audit_record import AuditRecord, ServingPeriod, Severity
from llmops_assets.reports.wording import count, duration, moment, short
from llmops_assets.serving.slots import Environment


def position(record: AuditRecord) -> str:
    """How far the release got, in a few words."""
    if record.integrity.statements == 0:
        return "unknown, as its evidence cannot be read"
    retired = record.retirement
    if retired.removed is not None:
        return "removed; its archive stays" if retired.archived else "removed"
    if retired.archived is not None:
        return "archived"
    if retired.deprecated is not None:
        return "taken out of service"
    production = in_production(record)
    if production and production[-1].until is None:
        return f"serves in production ({production[-1].weight} % of the traffic)"
    if production:
        return f"served in production until {moment(production[-1].until)}"
    failed = [
        name
        for name, found in record.counting.items()
        if found.verdict.decision is not Decision.PASSED and found.waived is None
    ]
    if failed:
        return "stopped at gate " + ", ".join(failed)
    if any(load.environment is Environment.PRODUCTION for load in record.deployments.loads):
        return "loaded in production, without traffic so far"
    if record.deployments.loads:
        return "in staging"
    if record.identity.package is not None:
        return "packaged, not deployed"
    return "in development"


def summarise(record: AuditRecord) -> str:
    """The whole record in one paragraph."""
    if record.integrity.statements == 0:
        return (
            f"None of the evidence about release {record.identity.release} could be verified. "
            "Nothing can be said about it until the cause, under Integrity, is mended."
        )
    sentences = [_made(record), _judged(record), _decided(record), _served(record)]
    retired = record.retirement
    if retired.deprecated is not None:
        sentences.append(f"It was taken out of service at {moment(retired.deprecated)}.")
    if retired.archived is not None:
        proven = (
            " and found to restore byte for byte" if retired.restored is Decision.PASSED else ""
        )
        sentences.append(f"It was archived at {moment(retired.archived)}{proven}.")
    if retired.removed is not None:
        sentences.append(f"It was removed from the servers at {moment(retired.removed)}.")
    sentences.append(_evidence(record))
    return " ".join(sentence for sentence in sentences if sentence)


def in_production(record: AuditRecord) -> list[ServingPeriod]:
    """Times of production traffic, oldest first."""
    return [p for p in record.deployments.served if p.environment is Environment.PRODUCTION]


def _made(record: AuditRecord) -> str:
    identity = record.identity
    version = "" if identity.version is None else f", version {identity.version} of the model"
    who = f"was asked for by {identity.requested_by} at {moment(identity.requested)}"
    first = f"Release {identity.release}{version}, "
    first += who if identity.requested_by is not None else "has no statement about who asked for it"
    weights = (record.spec or {}).get("weights", {}).get("source")
    data = next((given for given in record.inputs if given.name == "training data"), None)
    rows = None if data is None else data.facts.get("rows")
    amount = f"{rows:,} rows of " if isinstance(rows, int) else ""
    made = {
        "train": f" It was trained from nothing on {amount}training data",
        "command": f" It was trained by a program of its team on {amount}training data",
        "path": " Its weights were brought in as they were from a folder",
        "mlflow": " Its weights were brought in as they were from the model registry",
        "huggingface": " Its weights were brought in as they were from the Hugging Face Hub",
    }.get(str(weights), " How its weights were made is not on record")
    if data is not None and weights in ("train", "command"):
        made += f" (digest {short(data.digest)})"
    return f"{first}.{made}."


def _judged(record: AuditRecord) -> str:
    found = record.counting.values()
    if not found:
        return "No gate judged it."
    passed = sum(judged.verdict.decision is Decision.PASSED for judged in found)
    waived = [judged.verdict.gate for judged in found if judged.waived is not None]
    others = [
        f"{judged.verdict.gate} {judged.verdict.decision.value}"
        for judged in found
        if judged.verdict.decision is not Decision.PASSED and judged.waived is None
    ]
    text = f"It passed {passed} of {count(len(found), 'decision gate')}"
    if waived:
        text += f", was let through {', '.join(waived)} by a reviewed exception (waiver)"
    if others:
        text += f"; not passed: {', '.join(others)}"
    return f"{text}."


def _decided(record: AuditRecord) -> str:
    verified = [approval for approval in record.approvals if approval.kind == "verified"]
    approval = verified[-1] if verified else (record.approvals or (None,))[-1]
    if approval is None:
        return "No person's decision about it is on record."
    verb = "approved" if approval.decision == "approve" else "rejected"
    claimed = ", whose name is claimed and not proven" if approval.known_by == "claimed" else ""
    return (
        f"It was {verb} by {approval.approver}{claimed}, at {moment(approval.time)}, "
        f"with the reason “{approval.reason}”."
    )


def _served(record: AuditRecord) -> str:
    periods = in_production(record)
    if not periods:
        return "It never had production traffic."
    end = record.seen_until
    total = sum(((p.until or end or p.since) - p.since for p in periods), timedelta())
    first, last = periods[0], periods[-1]
    until = (
        "and did at the time of this report"
        if last.until is None
        else f"until {moment(last.until)}"
    )
    often = "" if len(periods) == 1 else f" in {len(periods)} periods"
    return (
        f"It served in production from {moment(first.since)} {until}{often}, "
        f"{duration(total)} in all."
    )


def _evidence(record: AuditRecord) -> str:
    if not record.integrity.holds:
        return "The evidence does NOT hold; see Integrity before relying on anything here."
    serious = sum(gap.severity is not Severity.NOTE for gap in record.gaps)
    gaps = (
        f"they leave {count(serious, 'point')} open, see the gaps" if serious else "no gap is left"
    )
    return f"All {record.integrity.statements} signed statements about it were verified; {gaps}."
