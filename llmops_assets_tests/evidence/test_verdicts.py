"""`require` decides alone: it must say no to everything but the exact passed verdict."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llmops_assets.errors import EvidenceError, GateRefusedError
from llmops_assets.evidence import gates as all_gates
from llmops_assets.evidence.gates import (
    ACCURACY,
    BUILT,
    CHECKPOINT_SAFE,
    GATES,
    PROVEN,
    REGRESSION,
    Gate,
)
from llmops_assets.evidence.leaves import release_chain
from llmops_assets.evidence.log import LOG, Attestation, EvidenceLog
from llmops_assets.evidence.statements import GATE_VERDICT, Statement, subject
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import (
    NOTHING_SERVES,
    Circumstances,
    Judgement,
    State,
    policy_digest,
    record_verdict,
    require,
    standings,
    verdicts,
    waiver_uses,
)
from llmops_assets.evidence.waivers import Waiver
from llmops_assets.policy import Policy
from llmops_assets.spec import ModelSpec, parse_spec
from llmops_assets.storage.store import canonical_json, digest_of

from ..evidence_rig import blob_of, open_evidence
from ..release_rig import SPEC

RELEASE = "parrot.v1"
PARROT = parse_spec(SPEC, "test")
POLICY = Policy()
DIGESTS = {asset: digest_of(asset.encode()) for gate in PROVEN for asset in gate.subjects}
OTHER = digest_of(b"other")


def judgement(decision: Decision, baseline: str | None = None) -> Judgement:
    return Judgement(
        decision=decision,
        measured={"x": 1},
        threshold={"x": 2},
        reason="because",
        baseline=baseline,
    )


def judge(
    evidence: EvidenceLog,
    gate: Gate,
    passed: bool = True,
    spec: ModelSpec = PARROT,
    other: str | None = None,
    decision: Decision | None = None,
    baseline: str | None = None,
) -> None:
    """Records a verdict about `DIGESTS`, but for the asset `other`, whose bytes are others."""
    digests = DIGESTS if other is None else {**DIGESTS, other: OTHER}
    found = judgement(decision or Decision.of(passed), baseline)
    record_verdict(evidence, RELEASE, gate, spec, POLICY, found, digests, "run")


def facts(**changes: Any) -> Circumstances:
    return replace(Circumstances(RELEASE, PARROT, POLICY, DIGESTS), **changes)


def refused(evidence: EvidenceLog, *gates: Gate, **changes: Any) -> GateRefusedError:
    with pytest.raises(GateRefusedError) as caught:
        require(evidence, gates, facts(**changes))
    return caught.value


def waiver(**changes: Any) -> Waiver:
    content = {
        "gate": "accuracy", "release": RELEASE, "owner": "ada@example.org",
        "reason": "the new labels are wrong themselves",
        "expires": datetime.now(UTC) + timedelta(days=1), **changes,
    }  # fmt: skip
    return Waiver.model_validate(content)


def test_passed_verdict_about_these_bytes_lets_go_on(evidence: EvidenceLog) -> None:
    """And the caller learns what it rests on, for the audit."""
    judge(evidence, ACCURACY)
    judge(evidence, CHECKPOINT_SAFE)
    accepted = require(evidence, [ACCURACY, CHECKPOINT_SAFE], facts())
    assert [standing.gate for standing in accepted] == [ACCURACY, CHECKPOINT_SAFE]
    assert {standing.state for standing in accepted} == {State.PASSED}
    verdict = accepted[0].verdict
    assert verdict is not None
    assert verdict.subjects == {asset: DIGESTS[asset] for asset in ACCURACY.subjects}
    assert verdict.dataset == DIGESTS["evaluation_data"]


def test_missing_verdict_is_refused(evidence: EvidenceLog) -> None:
    """No verdict is not a good verdict; nor is that of another release."""
    found = judgement(Decision.PASSED)
    record_verdict(evidence, "parrot.v2", ACCURACY, PARROT, POLICY, found, DIGESTS, "run")
    error = refused(evidence, ACCURACY)
    assert "accuracy: no verdict" in str(error)
    assert error.cure == "run the checks of evaluation for parrot.v1"


def test_failed_verdict_is_refused_with_the_gates_own_cure(evidence: EvidenceLog) -> None:
    """Running the check again does not help; what to do is the gate's to say."""
    judge(evidence, ACCURACY, passed=False)
    error = refused(evidence, ACCURACY)
    assert "accuracy: failed: because" in str(error)
    assert error.cure == ACCURACY.next_action


def test_newest_verdict_wins_both_ways(evidence: EvidenceLog) -> None:
    """A gate judged again replaces what it said, for better and for worse."""
    judge(evidence, ACCURACY, passed=False)
    judge(evidence, ACCURACY, passed=True)
    require(evidence, [ACCURACY], facts())
    judge(evidence, ACCURACY, passed=False)
    assert "failed" in str(refused(evidence, ACCURACY))
    assert verdicts(evidence, RELEASE)["accuracy"].passed is False


@pytest.mark.parametrize("subject", ACCURACY.subjects)
def test_verdict_about_other_bytes_is_refused(evidence: EvidenceLog, subject: str) -> None:
    """An old pass must not clear a rebuilt artifact, whichever of the subjects it is."""
    judge(evidence, ACCURACY, other=subject)
    message = str(refused(evidence, ACCURACY))
    assert subject in message
    assert OTHER in message
    assert DIGESTS[subject] in message


def test_subject_that_is_not_in_hand_is_refused(evidence: EvidenceLog) -> None:
    """A caller who cannot say which bytes are to go on gets no yes."""
    judge(evidence, ACCURACY)
    partial = {asset: digest for asset, digest in DIGESTS.items() if asset != "evaluation"}
    assert "evaluation is not in hand" in str(refused(evidence, ACCURACY, digests=partial))


def test_edited_threshold_makes_the_verdict_stale(evidence: EvidenceLog) -> None:
    """In both directions: a verdict is about one policy, and judging again is cheap."""
    judge(evidence, ACCURACY)
    stricter = parse_spec(SPEC.replace("at_least: 0.9, e", "at_least: 0.95, e"), "test")
    laxer = parse_spec(SPEC.replace("every_slice: 0.8", "every_slice: 0.1"), "test")
    for spec in (stricter, laxer):
        error = refused(evidence, ACCURACY, spec=spec)
        assert "another policy" in str(error)
        assert error.cure == "run the checks of evaluation for parrot.v1"
    elsewhere = parse_spec(SPEC.replace("{exact_match: {at_least: 0.9}}",
                                        "{exact_match: {at_least: 0.5}}"), "test")  # fmt: skip
    require(evidence, [ACCURACY], facts(spec=elsewhere))


def test_new_way_of_judging_makes_the_verdict_stale(evidence: EvidenceLog) -> None:
    """A bug mended in a gate must not leave the verdicts that it let pass."""
    judge(evidence, ACCURACY)
    assert "another policy" in str(refused(evidence, replace(ACCURACY, version=2)))


def test_all_objections_are_named_with_their_cures(evidence: EvidenceLog) -> None:
    """At night one wants the whole list, not one refusal after the other."""
    judge(evidence, ACCURACY, passed=False)
    judge(evidence, CHECKPOINT_SAFE, other="checkpoint")
    error = refused(evidence, *BUILT)
    for gate in BUILT:
        assert f"{gate.name}: " in str(error.found)
        expected = gate.next_action if gate is ACCURACY else f"run the checks of {gate.asset}"
        assert expected in error.cure


def test_tampered_record_is_detected(evidence: EvidenceLog) -> None:
    """A failed verdict edited into a passed one on disk must not open the gate."""
    judge(evidence, ACCURACY, passed=False)
    blob = blob_of(evidence, 0)
    passed = json.loads(blob.read_bytes())
    statement = base64.b64decode(passed["envelope"]["payload"])
    edited = statement.replace(b'"decision":"failed"', b'"decision":"passed"')
    assert edited != statement
    passed["envelope"]["payload"] = base64.b64encode(edited).decode()
    blob.write_bytes(canonical_json(passed))
    with pytest.raises(EvidenceError, match=r"entry 0\b.*damaged"):
        require(evidence, [ACCURACY], facts())


@pytest.mark.parametrize("forger", ["no key", "another key"])
def test_forged_verdict_opens_no_gate(evidence: EvidenceLog, tmp_path: Path, forger: str) -> None:
    """Who can write the store can put a record there whose digests are all right."""
    judge(evidence, ACCURACY, passed=False)
    other = open_evidence(tmp_path / "other")
    judge(other, ACCURACY, passed=False)
    judge(other, ACCURACY, passed=True)
    (*_, logged) = (entry for entry in other.store.log(LOG) if entry.sequence == 2)
    forged = json.loads(json.dumps(logged.record))
    if forger == "no key":
        forged["envelope"]["signatures"][0]["keyid"] = evidence.keys()[0].keyid
        forged["checkpoint"]["signatures"][0]["keyid"] = evidence.keys()[0].keyid
    evidence.store.append(LOG, forged)
    with pytest.raises(EvidenceError):
        require(evidence, [ACCURACY], facts())


def test_verdict_binds_subjects_only(evidence: EvidenceLog) -> None:
    """Bytes that a gate never looked at are not cleared by it."""
    judge(evidence, CHECKPOINT_SAFE)
    assert verdicts(evidence, RELEASE)["checkpoint_safe"].subjects == {
        "checkpoint": DIGESTS["checkpoint"]
    }


def test_policies_of_all_gates_differ() -> None:
    """One gate's verdict must never pass for another's."""
    gates = [gate for gate in vars(all_gates).values() if isinstance(gate, Gate)]
    assert set(GATES) == {gate.name for gate in gates}
    assert len(GATES) == len(gates)
    assert len({policy_digest(gate, PARROT, POLICY) for gate in gates}) == len(gates)


def test_undecided_opens_no_gate(evidence: EvidenceLog) -> None:
    """Too few data to say no are too few to say yes."""
    judge(evidence, ACCURACY, decision=Decision.UNDECIDED)
    assert "accuracy: undecided: because" in str(refused(evidence, ACCURACY))


@pytest.mark.parametrize("decision", [Decision.FAILED, Decision.UNDECIDED])
def test_reviewed_waiver_lets_one_gate_pass_and_shows(
    evidence: EvidenceLog, decision: Decision
) -> None:
    """Whoever looks must see that it did not pass, who let it through, and until when."""
    judge(evidence, ACCURACY, decision=decision)
    judge(evidence, REGRESSION, decision=decision)
    given = waiver()
    (standing,) = require(evidence, [ACCURACY], facts(waivers=lambda: (given,)))
    assert standing.state is State.WAIVED
    assert standing.waiver == given
    for part in (decision.value, "ada@example.org", "the new labels are wrong themselves"):
        assert part in standing.reason
    (use,) = waiver_uses(evidence, RELEASE)
    assert (use.gate, use.waiver) == ("accuracy", given)
    assert "no_regression" in str(refused(evidence, REGRESSION, waivers=lambda: (given,)))


@pytest.mark.parametrize(
    "changes",
    [
        {"expires": datetime.now(UTC) - timedelta(seconds=1)},
        {"release": "parrot.v2"},
        {"release": None, "digest": OTHER},
        {"release": None, "digest": DIGESTS["evaluation_data"]},
        {"gate": "latency"},
    ],
    ids=["expired", "other release", "other digest", "data", "other gate"],
)
def test_waiver_for_something_else_blocks(evidence: EvidenceLog, changes: dict[str, Any]) -> None:
    """A waiver that has run out, or was given for another case, is none."""
    judge(evidence, ACCURACY, passed=False)
    given = waiver(**changes)
    assert "accuracy: failed" in str(refused(evidence, ACCURACY, waivers=lambda: (given,)))


def test_waiver_by_digest_covers_those_bytes(evidence: EvidenceLog) -> None:
    """Whichever release they are in."""
    judge(evidence, ACCURACY, passed=False)
    given = waiver(release=None, digest=DIGESTS["evaluation"])
    (standing,) = require(evidence, [ACCURACY], facts(waivers=lambda: (given,)))
    assert standing.state is State.WAIVED


def test_waiver_does_not_stand_for_judging(evidence: EvidenceLog) -> None:
    """It lets a known failure pass, not an unknown one, nor one of other bytes."""
    given = (waiver(),)
    assert "no verdict" in str(refused(evidence, ACCURACY, waivers=lambda: given))
    judge(evidence, ACCURACY, passed=False, other="checkpoint")
    assert "the verdict is about checkpoint" in str(
        refused(evidence, ACCURACY, waivers=lambda: given)
    )


def test_another_serving_release_makes_the_comparison_stale(evidence: EvidenceLog) -> None:
    """No worse than what served last week says nothing of what serves today."""
    judge(evidence, REGRESSION, baseline=NOTHING_SERVES)
    require(evidence, [REGRESSION], facts(serving=NOTHING_SERVES))
    error = refused(evidence, REGRESSION, serving=OTHER)
    assert f"compared with package {NOTHING_SERVES}, but {OTHER} serves by now" in str(error)
    judge(evidence, REGRESSION, baseline=OTHER)
    require(evidence, [REGRESSION], facts(serving=OTHER))
    # What serves itself goes on, whatever it was compared with.
    require(evidence, [REGRESSION], facts(serving=DIGESTS["packaged_model"]))


def test_tries_before_a_pass_show(evidence: EvidenceLog) -> None:
    """A noisy measurement repeated until it passed must not look like one that passed."""
    judge(evidence, ACCURACY, passed=False)
    judge(evidence, ACCURACY, decision=Decision.UNDECIDED)
    judge(evidence, ACCURACY)
    (standing,) = standings(evidence, [ACCURACY], facts())
    assert standing.reason == "because (after 2 verdicts that did not pass)"


def test_verdict_of_another_version_is_explained(evidence: EvidenceLog) -> None:
    """After an upgrade old records are still there, and a stack trace helps nobody."""
    subjects = (subject("checkpoint", DIGESTS["checkpoint"]),)
    earlier = {"gate": "accuracy", "passed": True}
    statement = Statement(subject=subjects, predicate_type=GATE_VERDICT, predicate=earlier)
    evidence.append(Attestation(statement, [release_chain(RELEASE)]))
    with pytest.raises(EvidenceError, match=r"A verdict about parrot\.v1 has a form"):
        require(evidence, [ACCURACY], facts())


def test_waiver_of_a_comparison_is_bound_to_what_it_compared_with(evidence: EvidenceLog) -> None:
    """Reviewed beside one serving release, it says nothing of a worse loss beside another."""
    given = waiver(gate="no_regression", baseline=OTHER)
    judge(evidence, REGRESSION, passed=False, baseline=OTHER)
    (standing,) = require(evidence, [REGRESSION], facts(waivers=lambda: (given,), serving=OTHER))
    assert standing.state is State.WAIVED
    third = digest_of(b"third")
    judge(evidence, REGRESSION, passed=False, baseline=third)
    refused(evidence, REGRESSION, waivers=lambda: (given,), serving=third)


def test_standings_tell_what_to_do(evidence: EvidenceLog) -> None:
    """The board of a release: each gate's state, and the next step where there is one."""
    judge(evidence, ACCURACY)
    judge(evidence, CHECKPOINT_SAFE, passed=False)
    judge(evidence, REGRESSION, other="evaluation")
    found = standings(evidence, (ACCURACY, CHECKPOINT_SAFE, REGRESSION, BUILT[0]), facts())
    assert [(standing.state, standing.next_action) for standing in found] == [
        (State.PASSED, ""),
        (State.FAILED, CHECKPOINT_SAFE.next_action),
        (State.STALE, "materialize evaluation of parrot.v1 again with its checks"),
        (State.MISSING, "run the checks of model_spec for parrot.v1"),
    ]


subjects = st.lists(st.sampled_from(["passed", "failed", "other", "policy", "none"]), max_size=5)


@given(st.lists(subjects, min_size=3, max_size=3))
@hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_yes_needs_every_newest_verdict_to_be_right(
    tmp_path_factory: pytest.TempPathFactory, histories: list[list[str]]
) -> None:
    """Whatever was recorded before, in any order, only the last word of each gate counts."""
    evidence = open_evidence(tmp_path_factory.mktemp("verdicts"))
    chosen = (ACCURACY, CHECKPOINT_SAFE, all_gates.PARITY)
    stale = parse_spec(SPEC.replace("at_least: 0.9, e", "at_least: 1, e"), "test")
    for gate, history in zip(chosen, histories, strict=True):
        for kind in history:
            if kind == "policy":
                judge(evidence, replace(gate, version=9), spec=stale)
            elif kind == "other":
                judge(evidence, gate, other=gate.subjects[0])
            elif kind != "none":
                judge(evidence, gate, passed=kind == "passed")
    last = [next((k for k in reversed(h) if k != "none"), "none") for h in histories]
    if all(kind == "passed" for kind in last):
        assert len(require(evidence, chosen, facts())) == 3
    else:
        message = str(refused(evidence, *chosen))
        for gate, kind in zip(chosen, last, strict=True):
            assert (f"{gate.name}: " in message) == (kind != "passed")
