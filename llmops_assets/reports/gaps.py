"""What the evidence of a release does not show: each gap with why it matters and what to do.

Every rule looks at the record alone. Which statement must be there follows from how far the
release got: who is in production must have been judged, approved and admitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmops_assets.evidence.gates import (
    APPROVED,
    BUILT,
    CANARY,
    GATES,
    NOTHING_ROUTES,
    PROVEN,
    RESTORES,
    Gate,
)
from llmops_assets.evidence.statistics import Decision
from llmops_assets.reports.audit_record import AuditRecord, Gap, GateVerdict, RouteStep, Severity
from llmops_assets.reports.wording import moment, short, title
from llmops_assets.serving.slots import Environment

DEVELOPED_ASSETS = (
    "model_spec", "training_data", "data_report", "evaluation_data", "checkpoint", "evaluation",
)  # fmt: skip
BUILT_ASSETS = (*DEVELOPED_ASSETS, "converted_weights", "engine", "packaged_model")
STAGED_ASSETS = (*BUILT_ASSETS, "engine_validation", "compliance_report")
LOADED = {"staging_deployment": BUILT, "production_candidate": APPROVED}
"""What had to be judged before the package was loaded, by asset."""


def find_gaps(record: AuditRecord) -> tuple[Gap, ...]:
    """Everything that is missing or doubtful; what is missing first."""
    rules = (
        _provenance, _verdicts, _admissions, _approvals, _source, _terms, _waivers, _standing,
        _reuse, _hardware, _operation, _retirement, _log,
    )  # fmt: skip
    found = [gap for rule in rules for gap in rule(record)]
    order = list(Severity)
    return tuple(sorted(dict.fromkeys(found), key=lambda gap: order.index(gap.severity)))


def _provenance(record: AuditRecord) -> Iterator[Gap]:
    attested = {step.asset for step in record.build.steps}
    for asset in expected_assets(record):
        if asset not in attested:
            yield _missing(
                "provenance-missing",
                f"No signed statement says how {title(asset).lower()} ({asset}) was made.",
                "The release got further than this, so it was made from something; nothing "
                "proves from what.",
                "find the run in Dagster, and treat what was built on it as unproven until a "
                "new release replaces it",
            )
    made = {step.asset: step.artifact for step in record.build.steps}
    for step in record.build.steps:
        for asset, digest in step.inputs.items():
            if asset in made and made[asset] != digest:
                yield _missing(
                    "input-other-bytes",
                    f"{title(step.asset)} was made from {asset} {short(digest)}, and not from "
                    f"this release's, {short(made[asset])}.",
                    "The chain from data to what serves is broken at this point.",
                    "make a new release; its steps use what it published",
                )
    for asset in record.integrity.unattested:
        yield _missing(
            "result-unattested",
            f"The store shows a result of {asset} that no signed statement is about.",
            "Whoever can write to the store can put anything there.",
            f"do not use it; materialize {asset} again, or make a new release",
        )
    if record.integrity.package_signature == "missing":
        yield _missing(
            "package-unsigned",
            "The package has no signature.",
            "Whoever gets the package elsewhere cannot tell that this platform made it.",
            "materialize packaged_model of the release again, which signs the package",
        )
    for asset in record.integrity.missing:
        yield Gap(
            kind="artifact-gone",
            severity=Severity.DOUBTFUL,
            what=f"The bytes of {title(asset).lower()} ({asset}) are not in the store any more.",
            why="What was signed can be read, but not be looked at or run again.",
            to_do="restore it from the release's archive",
        )


def _verdicts(record: AuditRecord) -> Iterator[Gap]:
    for what, gates, before in _needs(record):
        for gate in gates:
            yield from _judged(record, gate, what, before)
    if record.deployments.served and _in_production(record):
        canary = record.counting.get(CANARY.name)
        if canary is None:
            yield _missing(
                "verdict-missing",
                f"The gate {CANARY.name} was not judged after traffic had moved.",
                CANARY.description,
                f"run the checks of {CANARY.asset} for {record.identity.release}",
            )


def _judged(record: AuditRecord, gate: Gate, what: str, before: int) -> Iterator[Gap]:
    """
    Args:
        what: happened, which needed a pass.
        before: sequence number of its statement.
    """
    judged = [
        found for found in record.gates if found.verdict.gate == gate.name
        and found.sequence < before
    ]  # fmt: skip
    if not judged:
        yield _missing(
            "verdict-missing",
            f"The gate {gate.name} was not judged before the release was {what}.",
            gate.description,
            f"find out how it got there; run the checks of {gate.asset} for "
            f"{record.identity.release}",
        )
        return
    newest = judged[0]
    if newest.verdict.decision is not Decision.PASSED and not _waived(record, newest):
        yield _missing(
            "verdict-not-passed",
            f"The gate {gate.name} had {newest.verdict.decision.value} when the release was "
            f"{what}, and no waiver was used.",
            newest.verdict.reason,
            newest.verdict.next_action,
        )
    for asset, digest in newest.verdict.subjects.items():
        step = record.step(asset)
        if step is not None and step.artifact != digest:
            yield _missing(
                "verdict-other-bytes",
                f"The gate {gate.name} judged {asset} {short(digest)}, and the release has "
                f"{short(step.artifact)}.",
                "A pass of other bytes says nothing about these.",
                f"run the checks of {gate.asset} for {record.identity.release}",
            )


def _waived(record: AuditRecord, judged: GateVerdict) -> bool:
    return any(
        use.gate == judged.verdict.gate and use.judged == judged.verdict.time
        for use in record.waivers
    )


def _admissions(record: AuditRecord) -> Iterator[Gap]:
    for load in record.deployments.loads:
        admitted = any(
            decision.passed
            and decision.package == load.package
            and decision.environment == load.environment
            and decision.sequence < load.sequence
            for decision in record.deployments.admissions
        )
        if not admitted:
            yield _missing(
                "admission-missing",
                f"No decision to deploy to {load.environment} is on record before the package "
                f"was loaded at {moment(load.time)}.",
                "The platform signs what it decided and on which evidence, before it loads.",
                "find out who loaded it; `llmops status` shows what the slots hold",
            )
    for decision in record.deployments.admissions:
        if not decision.passed:
            yield Gap(
                kind="admission-refused",
                severity=Severity.NOTE,
                what=f"Deploying to {decision.environment} was refused at {moment(decision.time)}.",
                why="Something it needed was missing then; the gates show what was mended since.",
                to_do="compare the verdicts before and after that time",
            )


def _approvals(record: AuditRecord) -> Iterator[Gap]:
    for change in _into_production(record):
        target = next(s for s in change.after if s.release == record.identity.release)
        verified = [
            approval for approval in record.approvals
            if approval.kind == "verified" and approval.sequence < change.sequence
        ]  # fmt: skip
        if not any(a.decision == "approve" and a.package == target.package for a in verified):
            yield _missing(
                "approval-missing",
                f"It got production traffic at {moment(change.time)} by {change.actor} without "
                "a verified approval of this package.",
                "Somebody other than who asked for the release must have looked at it.",
                "have it reviewed now, or roll back: `llmops rollback "
                f"{record.identity.model} --reason WHY`",
            )
    claimed = [a for a in record.approvals if a.known_by == "claimed" and a.decision == "approve"]
    if claimed:
        names = ", ".join(dict.fromkeys(approval.approver for approval in claimed))
        yield _doubtful(
            "approver-claimed",
            f"Who approved is claimed, not proven: {names}.",
            "Whoever may start the promotion can type in any name.",
            "ask that person, or have approvals signed by the approver's own key",
        )
    decisions = [approval for approval in record.approvals if approval.kind == "recorded"]
    if decisions and decisions[-1].decision == "reject" and _in_production(record):
        yield _doubtful(
            "rejected",
            f"The newest recorded decision rejects it: {decisions[-1].approver}, "
            f"{decisions[-1].reason}",
            "It had, or has, production traffic all the same.",
            "settle it: roll back, or record another decision with `llmops approve`",
        )


def _source(record: AuditRecord) -> Iterator[Gap]:
    identity = record.identity
    if identity.spec is None or identity.commit_holds:
        return
    what = (
        "The spec was in no commit when the release was made."
        if identity.commit is None
        else f"The spec differed from commit {short(identity.commit)} when the release was made."
    )
    yield _doubtful(
        "spec-not-committed",
        what,
        "Nobody reviewed what was built; git does not have it.",
        "commit the spec, and make releases with `llmops release MODEL --commit REVISION`",
    )


def _terms(record: AuditRecord) -> Iterator[Gap]:
    for given in record.inputs:
        for missing, name in ((given.license == "", "licence"), (given.provenance == "", "origin")):
            if missing:
                yield _doubtful(
                    f"{'license' if name == 'licence' else 'provenance'}-undeclared",
                    f"No {name} is declared for the {given.name}.",
                    "Whether it may be used for this purpose cannot be told.",
                    "declare it in the spec and make a new release",
                )
    imported = any(given.name == "base weights" for given in record.inputs)
    if record.card is not None and not record.card.license.strip() and not imported:
        yield _doubtful(
            "license-undeclared",
            "No licence is declared for the weights.",
            "Whether they may be passed on or served cannot be told.",
            "write `license` in the spec's card and make a new release",
        )


def _waivers(record: AuditRecord) -> Iterator[Gap]:
    for use in {use.gate: use for use in record.waivers}.values():
        yield _doubtful(
            "waiver-used",
            f"It went on though the gate {use.gate} had not passed: waived by "
            f"{use.waiver.owner} until {moment(use.waiver.expires)}.",
            use.waiver.reason,
            "judge whether the reason holds; the waiver was reviewed with the specs",
        )


def _standing(record: AuditRecord) -> Iterator[Gap]:
    for found in record.counting.values():
        verdict = found.verdict
        if verdict.decision is Decision.UNDECIDED:
            yield _doubtful(
                "gate-undecided",
                f"The gate {verdict.gate} could not be decided: {verdict.reason}",
                "The data were too few to say whether the threshold is met.",
                verdict.next_action,
            )
        elif verdict.decision is Decision.FAILED and found.waived is None:
            yield _doubtful(
                "gate-failed",
                f"The newest verdict of the gate {verdict.gate} is a failure: {verdict.reason}",
                GATES[verdict.gate].description if verdict.gate in GATES else "It is a gate.",
                verdict.next_action,
            )


def _reuse(record: AuditRecord) -> Iterator[Gap]:
    for step in record.build.steps:
        if step.origin_attested is False:
            yield _missing(
                "origin-missing",
                f"{title(step.asset)} was taken over from {step.reused_from}, whose own evidence "
                "of it is gone.",
                "How these bytes were made is only there.",
                f"restore the evidence of {step.reused_from}",
            )


def _hardware(record: AuditRecord) -> Iterator[Gap]:
    seen = "gpu" in record.build.hardware or any(
        reading.document.get("gpu_utilisation") is not None for reading in record.operation.metrics
    )
    if not seen and record.step("engine") is not None:
        yield Gap(
            kind="gpu-never-seen",
            severity=Severity.NOTE,
            what="No statement names a GPU: nothing was built or measured on one.",
            why="Latency and throughput on record are those of a processor.",
            to_do="nothing, if it is meant to be served without a GPU",
        )


def _operation(record: AuditRecord) -> Iterator[Gap]:
    if _in_production(record) and not record.operation.metrics:
        yield _doubtful(
            "never-observed",
            "It served in production, and no service metrics are on record.",
            "How it did there is not known.",
            f"run `llmops observe {record.identity.release}` while it serves",
        )
    for incident in record.operation.incidents:
        if incident.answered is None:
            yield _doubtful(
                "incident-open",
                f"Nobody answered an incident of {moment(incident.detected)}: {incident.what}",
                "What it did to users, and whether it ended, is not on record.",
                "answer it, and record what was done",
            )


def _retirement(record: AuditRecord) -> Iterator[Gap]:
    retired = record.retirement
    if retired.removed is not None and retired.archived is None:
        yield _missing(
            "archive-missing",
            "It was removed, and no archive is on record.",
            "Its bytes may be gone for good.",
            "archive it from the store while that has it",
        )
    judged = {RESTORES: retired.archived, NOTHING_ROUTES: retired.deprecated}
    for gate, happened in judged.items():
        if happened is not None and gate.name not in record.counting:
            yield _missing(
                "verdict-missing",
                f"The gate {gate.name} was not judged.",
                gate.description,
                f"run the checks of {gate.asset} for {record.identity.release}",
            )


def _log(record: AuditRecord) -> Iterator[Gap]:
    integrity = record.integrity
    if integrity.clock_backwards:
        entries = ", ".join(map(str, integrity.clock_backwards))
        yield _doubtful(
            "clock-backwards",
            f"Entries {entries} are dated before the entry in front of them.",
            "The order is certain, the times are not: a clock was wrong or was set.",
            "look at the clocks of the machines that wrote them",
        )
    for key in integrity.keys:
        if not key.current:
            yield Gap(
                kind="older-key",
                severity=Severity.NOTE,
                what=f"{key.statements} statements are signed by key {short(key.keyid)}, which "
                "is not the one that signs now.",
                why="It is still trusted. If it was replaced because others had it, they could "
                "have signed these.",
                to_do="check when and why the key was replaced",
            )


def expected_assets(record: AuditRecord) -> Sequence[str]:
    """Assets whose provenance must be there, as the release got beyond them."""
    attested = {step.asset for step in record.build.steps}
    if record.deployments.loads or _into_production(record):
        return STAGED_ASSETS
    if "packaged_model" in attested:
        return BUILT_ASSETS
    return DEVELOPED_ASSETS if record.identity.version is not None else ()


def _needs(record: AuditRecord) -> Iterator[tuple[str, Sequence[Gate], int]]:
    """What happened that needed gates: in words, the gates, and the sequence of its statement."""
    for load in record.deployments.loads:
        yield f"loaded in {load.environment}", LOADED[load.asset], load.sequence
    for change in _into_production(record):
        yield "given production traffic", PROVEN, change.sequence


def _into_production(record: AuditRecord) -> list[RouteStep]:
    """Changes that gave it production traffic which it had not before."""
    release = record.identity.release
    return [
        change
        for change in record.deployments.routes
        if change.environment is Environment.PRODUCTION
        and any(share.release == release and share.weight for share in change.after)
        and not any(share.release == release and share.weight for share in change.before)
    ]


def _in_production(record: AuditRecord) -> bool:
    return any(p.environment is Environment.PRODUCTION for p in record.deployments.served)


def _missing(kind: str, what: str, why: str, to_do: str) -> Gap:
    return Gap(kind=kind, severity=Severity.MISSING, what=what, why=why, to_do=to_do)


def _doubtful(kind: str, what: str, why: str, to_do: str) -> Gap:
    return Gap(kind=kind, severity=Severity.DOUBTFUL, what=what, why=why, to_do=to_do)
