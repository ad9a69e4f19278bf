"""Verdicts: immutable records that a gate judged exact bytes under an exact policy.

The asset check in Dagster is how a verdict is shown. What decides is the record: Dagster's
events hold only within one run, and anyone who reaches its web server can forge them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.errors import GateRefusedError
from llmops_assets.evidence.gates import Gate
from llmops_assets.spec import ModelSpec
from llmops_assets.storage.store import Store, canonical_json, digest_of


class Judgement(BaseModel):
    """What a gate's function found."""

    model_config = ConfigDict(frozen=True)

    passed: bool
    measured: dict[str, Any] = Field(description="What was found, by name.")
    threshold: dict[str, Any] = Field(description="What was asked for, by the same names.")
    reason: str = Field(description="One sentence for a person.")


class Verdict(BaseModel):
    """A judgement about exact bytes under an exact policy; stored as a record."""

    model_config = ConfigDict(frozen=True)

    gate: str
    release: str
    passed: bool
    measured: dict[str, Any]
    threshold: dict[str, Any]
    reason: str
    subjects: dict[str, str] = Field(description="Digest of each judged artifact, by asset.")
    policy: str = Field(description="Digest of the gate's name, version and thresholds.")
    run: str = Field(description="The Dagster run that judged.")
    time: datetime


def policy_digest(gate: Gate, spec: ModelSpec) -> str:
    """Digest of everything that a judgement of this gate depends on, but for the bytes."""
    return digest_of(
        canonical_json({"gate": gate.name, "version": gate.version, "policy": gate.policy(spec)})
    )


def record_verdict(
    store: Store,
    release: str,
    gate: Gate,
    spec: ModelSpec,
    judgement: Judgement,
    digests: Mapping[str, str],
    run: str,
) -> Verdict:
    """Writes the verdict to the release's log; the newest of a gate is the one that counts.

    Args:
        digests: digest of each asset in hand; the gate's subjects must be among them.
    """
    verdict = Verdict(
        gate=gate.name,
        release=release,
        passed=judgement.passed,
        measured=judgement.measured,
        threshold=judgement.threshold,
        reason=judgement.reason,
        subjects={asset: digests[asset] for asset in gate.subjects},
        policy=policy_digest(gate, spec),
        run=run,
        time=datetime.now(UTC),
    )
    store.append(_log(release), verdict.model_dump(mode="json"))
    return verdict


def verdicts(store: Store, release: str) -> dict[str, Verdict]:
    """The newest verdict of each gate that judged in this release."""
    return {verdict.gate: verdict for verdict in all_verdicts(store, release)}


def all_verdicts(store: Store, release: str) -> Iterator[Verdict]:
    """Every verdict about the release, oldest first."""
    return (Verdict.model_validate(entry.record) for entry in store.log(_log(release)))


def require(
    store: Store,
    release: str,
    gates: Iterable[Gate],
    spec: ModelSpec,
    digests: Mapping[str, str],
) -> tuple[Verdict, ...]:
    """Decides whether a release may go on. The only function that does.

    Args:
        gates: the gates that must have passed.
        spec: the release's frozen spec, which holds the thresholds.
        digests: digest of each asset in hand: the very bytes that are to go on.

    Returns:
        The verdicts it rests on.

    Raises:
        GateRefusedError: a verdict is missing, failed, about other bytes, or was made
            under another policy. All of these are named.
    """
    newest = verdicts(store, release)
    accepted: list[Verdict] = []
    objections: list[str] = []
    actions: list[str] = []
    for gate in gates:
        verdict = newest.get(gate.name)
        objection = _objection(gate, verdict, policy_digest(gate, spec), digests)
        if objection is None:
            assert verdict is not None
            accepted.append(verdict)
        else:
            objections.append(f"{gate.name}: {objection}")
            failed = verdict is not None and not verdict.passed
            actions.append(
                gate.next_action if failed else f"run the checks of {gate.asset} for {release}"
            )
    if objections:
        raise GateRefusedError(
            f"Release {release} may not go on",
            expected="a passed verdict of every gate, about exactly these bytes",
            found="; ".join(objections),
            cure="; ".join(dict.fromkeys(actions)),
        )
    return tuple(accepted)


def _objection(
    gate: Gate, verdict: Verdict | None, policy: str, digests: Mapping[str, str]
) -> str | None:
    if verdict is None:
        return "no verdict"
    for asset in gate.subjects:
        if asset not in digests:
            return f"{asset} is not in hand, so the verdict cannot be about it"
        if verdict.subjects.get(asset) != digests[asset]:
            return (
                f"the verdict is about {asset} {verdict.subjects.get(asset)}, not {digests[asset]}"
            )
    if verdict.policy != policy:
        return "judged under another policy"
    if not verdict.passed:
        return f"failed: {verdict.reason}"
    return None


def _log(release: str) -> str:
    return f"verdicts/{release}"
