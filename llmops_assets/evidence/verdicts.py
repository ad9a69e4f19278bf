"""Verdicts: signed statements that a gate judged exact bytes under an exact policy.

The asset check in Dagster is how a verdict is shown. What decides is the statement in the
evidence log: Dagster's events hold only within one run, and anyone who reaches its web
server can forge them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmops_assets.errors import EvidenceError, GateRefusedError
from llmops_assets.evidence import attest
from llmops_assets.evidence.gates import Gate, NextAction
from llmops_assets.evidence.leaves import release_chain
from llmops_assets.evidence.log import Attestation, EvidenceLog
from llmops_assets.evidence.statements import GATE_VERDICT, WAIVER_USE
from llmops_assets.evidence.statistics import Decision, Interval
from llmops_assets.evidence.waivers import Waiver, waiver_for
from llmops_assets.policy import Policy
from llmops_assets.spec import ModelSpec
from llmops_assets.storage.store import canonical_json, digest_of

DATASET = "evaluation_data"
"""The asset that measured values rest on."""
NOTHING_SERVES = "nothing"
"""Stands for the digest of what serves, where nothing does."""


class Finding(BaseModel):
    """One measured value beside what was asked for."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    metric: str
    slice: str | None = Field(default=None, description="None: over all rows.")
    value: float | None = Field(description="None: there is none.")
    interval: Interval | None = None
    n: int | None = Field(default=None, description="Rows, prompts or requests.")
    threshold: str = Field(description="Such as `at least 0.98`.")
    decision: Decision
    note: str = ""


class Judgement(BaseModel):
    """What a gate's function found."""

    model_config = ConfigDict(frozen=True)

    decision: Decision
    measured: dict[str, Any] = Field(description="What was found, by name.")
    threshold: dict[str, Any] = Field(description="What was asked for, by the same names.")
    reason: str = Field(description="One sentence for a person.")
    findings: tuple[Finding, ...] = Field(default=(), description="Each value that decided.")
    baseline: str | None = Field(
        default=None,
        description="Digest of the serving package that was compared with, or `nothing`.",
    )
    advice: str | None = Field(
        default=None, description="What to do in this very case, where the gate's is too general."
    )

    @property
    def passed(self) -> bool:
        return self.decision is Decision.PASSED


class Verdict(BaseModel):
    """A judgement about exact bytes under an exact policy; the predicate of a statement."""

    model_config = ConfigDict(frozen=True)

    gate: str
    release: str
    decision: Decision
    measured: dict[str, Any]
    threshold: dict[str, Any]
    reason: str
    findings: tuple[Finding, ...]
    subjects: dict[str, str] = Field(description="Digest of each judged artifact, by asset.")
    dataset: str | None = Field(description="Digest of the evaluation data, if it rests on any.")
    baseline: str | None = Field(description="See `Judgement.baseline`.")
    policy: str = Field(description="Digest of the gate's name, version and thresholds.")
    action: NextAction = Field(description="What the workflow does when it did not pass.")
    next_action: str = Field(description="The same for a person.")
    owner: str = Field(description="The role that does it.")
    run: str = Field(description="The Dagster run that judged.")
    time: datetime

    @property
    def passed(self) -> bool:
        return self.decision is Decision.PASSED


class State(StrEnum):
    """Where a release stands with a gate."""

    PASSED = "passed"
    FAILED = "failed"
    UNDECIDED = "undecided"
    """Not enough data to decide; it opens no gate."""
    WAIVED = "waived"
    """Did not pass, and a reviewed waiver lets it through for now."""
    MISSING = "missing"
    """Not judged yet."""
    STALE = "stale"
    """Judged about other bytes, under another policy, or beside another serving release."""


@dataclass(frozen=True)
class Standing:
    """Where a release stands with one gate, and why."""

    gate: Gate
    state: State
    verdict: Verdict | None
    reason: str
    next_action: str
    """What to do; empty when nothing is to be done."""
    waiver: Waiver | None = None
    statements: tuple[str, ...] = ()
    """Digests of the signed statements of the verdict, and of the use of the waiver."""

    @property
    def opens(self) -> bool:
        """Whether the release may go on."""
        return self.state in (State.PASSED, State.WAIVED)


class WaiverUse(BaseModel):
    """A release went on though a gate had not passed; the predicate of a statement."""

    model_config = ConfigDict(frozen=True)

    release: str
    gate: str
    waiver: Waiver
    judged: datetime = Field(description="Time of the verdict that was waived.")
    time: datetime


@dataclass(frozen=True)
class Circumstances:
    """What verdicts of a release are held against."""

    release: str
    spec: ModelSpec
    policy: Policy
    digests: Mapping[str, str]
    """Digest of each asset in hand: the very bytes that are to go on."""
    waivers: Callable[[], Iterable[Waiver]] = tuple
    """The reviewed waivers; asked only when a gate did not pass."""
    serving: str | None = None
    """Digest of the package that serves, or `NOTHING_SERVES`; None: it does not matter yet."""


def policy_digest(gate: Gate, spec: ModelSpec, policy: Policy) -> str:
    """Digest of everything that a judgement of this gate depends on, but for the bytes."""
    return digest_of(
        canonical_json(
            {
                "gate": gate.name,
                "version": gate.version,
                "judged_by": gate.judged_by(spec, policy),
            }
        )
    )


def judged_by(gates: Iterable[Gate], spec: ModelSpec, policy: Policy) -> str:
    """Digest of everything that judgements of these gates depend on, but for the bytes."""
    return digest_of(
        canonical_json({gate.name: policy_digest(gate, spec, policy) for gate in gates})
    )


def record_verdict(
    evidence: EvidenceLog,
    release: str,
    gate: Gate,
    spec: ModelSpec,
    policy: Policy,
    judgement: Judgement,
    digests: Mapping[str, str],
    run: str,
) -> Verdict:
    """Attests the verdict; the newest of a gate is the one that counts.

    Args:
        digests: digest of each asset in hand; the gate's subjects must be among them.

    Raises:
        EvidenceError: it cannot be signed, or the log is not what it was.
    """
    subjects = {asset: digests[asset] for asset in gate.subjects}
    verdict = Verdict(
        gate=gate.name,
        release=release,
        decision=judgement.decision,
        measured=judgement.measured,
        threshold=judgement.threshold,
        reason=judgement.reason,
        findings=judgement.findings,
        subjects=subjects,
        dataset=subjects.get(DATASET),
        baseline=judgement.baseline,
        policy=policy_digest(gate, spec, policy),
        action=gate.action,
        next_action=gate.next_action if judgement.advice is None else judgement.advice,
        owner=gate.owner,
        run=run,
        time=datetime.now(UTC),
    )
    chains = (release_chain(release),)
    evidence.append(*(Attestation(statement, chains) for statement in attest.verdict(verdict)))
    return verdict


def verdicts(evidence: EvidenceLog, release: str) -> dict[str, Verdict]:
    """The newest verdict of each gate that judged in this release."""
    return {verdict.gate: verdict for verdict, _ in all_verdicts(evidence, release)}


def all_verdicts(evidence: EvidenceLog, release: str) -> Iterator[tuple[Verdict, str]]:
    """Every verdict about the release, oldest first, with the digest of its statement.

    Raises:
        EvidenceError: one is missing, changed, not signed by a trusted key, about another
            release, or was written by another version of the platform.
    """
    for entry in evidence.entries(release_chain(release), GATE_VERDICT):
        try:
            verdict = Verdict.model_validate(entry.statement.predicate)
        except ValidationError as error:
            raise EvidenceError(
                f"A verdict about {release} has a form that this platform does not read",
                expected="a verdict as it writes them",
                found=f"one of gate {entry.statement.predicate.get('gate')}",
                cure="make a new release, or read it with the version that wrote it",
            ) from error
        if verdict.release == release:
            yield verdict, entry.leaf.statement


def require(
    evidence: EvidenceLog, gates: Iterable[Gate], facts: Circumstances
) -> tuple[Standing, ...]:
    """Decides whether a release may go on. The only function that does.

    Args:
        gates: the gates that must have passed.

    Each waiver that it rests on is recorded.

    Returns:
        What it rests on, waived gates among them.

    Raises:
        GateRefusedError: a verdict is missing, failed, undecided, about other bytes, or was
            made under another policy or beside another serving release, and no waiver
            covers it. All of these are named.
    """
    found = standings(evidence, gates, facts)
    if closed := [standing for standing in found if not standing.opens]:
        raise GateRefusedError(
            f"Release {facts.release} may not go on",
            expected="a passed verdict of every gate, about exactly these bytes",
            found="; ".join(f"{standing.gate.name}: {standing.reason}" for standing in closed),
            cure="; ".join(dict.fromkeys(standing.next_action for standing in closed)),
        )
    return tuple(_record_use(evidence, facts.release, standing) for standing in found)


def _record_use(evidence: EvidenceLog, release: str, standing: Standing) -> Standing:
    """Attests that a release goes on by a waiver, if it does."""
    if standing.waiver is None or standing.verdict is None:
        return standing
    use = WaiverUse(
        release=release,
        gate=standing.gate.name,
        waiver=standing.waiver,
        judged=standing.verdict.time,
        time=datetime.now(UTC),
    )
    statement = attest.waiver_use(use, standing.verdict)
    (entry,) = evidence.append(Attestation(statement, (release_chain(release),)))
    return replace(standing, statements=(*standing.statements, entry.leaf.statement))


def waiver_uses(evidence: EvidenceLog, release: str) -> Iterator[WaiverUse]:
    """Every time that the release went on by a waiver, oldest first."""
    entries = evidence.entries(release_chain(release), WAIVER_USE)
    return (WaiverUse.model_validate(entry.statement.predicate) for entry in entries)


def judged_bytes(verdict: Verdict) -> tuple[str, ...]:
    """Digests that a waiver may name: of what was judged, and not of the data it was judged by."""
    return tuple(
        digest for asset, digest in verdict.subjects.items() if not asset.endswith("_data")
    )


def standings(
    evidence: EvidenceLog, gates: Iterable[Gate], facts: Circumstances
) -> tuple[Standing, ...]:
    """Where the release stands with each gate."""
    judged: dict[str, list[Verdict]] = {}
    newest: dict[str, str] = {}
    for verdict, statement in all_verdicts(evidence, facts.release):
        judged.setdefault(verdict.gate, []).append(verdict)
        newest[verdict.gate] = statement
    return tuple(
        replace(
            _standing(gate, judged.get(gate.name, []), facts),
            statements=(newest[gate.name],) if gate.name in newest else (),
        )
        for gate in gates
    )


def _standing(gate: Gate, judged: Sequence[Verdict], facts: Circumstances) -> Standing:
    """
    Args:
        judged: every verdict of the gate in this release, oldest first; the newest counts.
    """
    judge = f"run the checks of {gate.asset} for {facts.release}"
    if gate.compares:
        judge = f"materialize {gate.asset} of {facts.release} again with its checks"
    if not judged:
        return Standing(gate, State.MISSING, None, "no verdict", judge)
    verdict = judged[-1]
    if doubt := _doubt(gate, verdict, facts):
        return Standing(gate, State.STALE, verdict, doubt, judge)
    if verdict.decision is Decision.PASSED:
        # A noisy measurement repeated until it passes must show.
        tries = sum(not earlier.passed for earlier in judged)
        after = f" (after {tries} verdicts that did not pass)" if tries else ""
        return Standing(gate, State.PASSED, verdict, verdict.reason + after, "")
    state = State.FAILED if verdict.decision is Decision.FAILED else State.UNDECIDED
    waiver = waiver_for(
        facts.waivers(), gate, facts.release, judged_bytes(verdict), verdict.baseline
    )
    if waiver is not None:
        reason = f"{state}, waived by {waiver.owner} until {waiver.expires:%F %R %Z}: " + (
            waiver.reason
        )
        return Standing(gate, State.WAIVED, verdict, reason, verdict.next_action, waiver)
    return Standing(gate, state, verdict, f"{state}: {verdict.reason}", verdict.next_action)


def _doubt(gate: Gate, verdict: Verdict, facts: Circumstances) -> str | None:
    """Why a verdict is not about the case in hand; None if it is."""
    for asset in gate.subjects:
        if asset not in facts.digests:
            return f"{asset} is not in hand, so the verdict cannot be about it"
        if verdict.subjects.get(asset) != facts.digests[asset]:
            return (
                f"the verdict is about {asset} {verdict.subjects.get(asset)}, "
                f"not {facts.digests[asset]}"
            )
    if verdict.policy != policy_digest(gate, facts.spec, facts.policy):
        return "judged under another policy"
    # What already serves is not compared with itself.
    others = facts.serving not in (None, facts.digests.get("packaged_model"))
    if gate.compares and others and verdict.baseline != facts.serving:
        return f"compared with package {verdict.baseline}, but {facts.serving} serves by now"
    return None
