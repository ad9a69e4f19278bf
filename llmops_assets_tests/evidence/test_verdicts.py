"""`require` decides alone: it must say no to everything but the exact passed verdict."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llmops_assets.errors import ArtifactCorruptError, GateRefusedError, StoreError
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
from llmops_assets.storage.folder import FolderStore
from llmops_assets.storage.store import digest_of

from ..release_rig import SPEC

RELEASE = "parrot.v1"
PARROT = parse_spec(SPEC, "test")
POLICY = Policy()
DIGESTS = {asset: digest_of(asset.encode()) for gate in PROVEN for asset in gate.subjects}
OTHER = digest_of(b"other")


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def judgement(decision: Decision, baseline: str | None = None) -> Judgement:
    return Judgement(
        decision=decision,
        measured={"x": 1},
        threshold={"x": 2},
        reason="because",
        baseline=baseline,
    )


def judge(
    store: FolderStore,
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
    record_verdict(store, RELEASE, gate, spec, POLICY, found, digests, "run")


def facts(**changes: Any) -> Circumstances:
    return replace(Circumstances(RELEASE, PARROT, POLICY, DIGESTS), **changes)


def refused(store: FolderStore, *gates: Gate, **changes: Any) -> GateRefusedError:
    with pytest.raises(GateRefusedError) as caught:
        require(store, gates, facts(**changes))
    return caught.value


def waiver(**changes: Any) -> Waiver:
    content = {
        "gate": "accuracy", "release": RELEASE, "owner": "ada@example.org",
        "reason": "the new labels are wrong themselves",
        "expires": datetime.now(UTC) + timedelta(days=1), **changes,
    }  # fmt: skip
    return Waiver.model_validate(content)


def test_passed_verdict_about_these_bytes_lets_go_on(store: FolderStore) -> None:
    """And the caller learns what it rests on, for the audit."""
    judge(store, ACCURACY)
    judge(store, CHECKPOINT_SAFE)
    accepted = require(store, [ACCURACY, CHECKPOINT_SAFE], facts())
    assert [standing.gate for standing in accepted] == [ACCURACY, CHECKPOINT_SAFE]
    assert {standing.state for standing in accepted} == {State.PASSED}
    verdict = accepted[0].verdict
    assert verdict is not None
    assert verdict.subjects == {asset: DIGESTS[asset] for asset in ACCURACY.subjects}
    assert verdict.dataset == DIGESTS["evaluation_data"]


def test_missing_verdict_is_refused(store: FolderStore) -> None:
    """No verdict is not a good verdict; nor is that of another release."""
    found = judgement(Decision.PASSED)
    record_verdict(store, "parrot.v2", ACCURACY, PARROT, POLICY, found, DIGESTS, "run")
    error = refused(store, ACCURACY)
    assert "accuracy: no verdict" in str(error)
    assert error.cure == "run the checks of evaluation for parrot.v1"


def test_failed_verdict_is_refused_with_the_gates_own_cure(store: FolderStore) -> None:
    """Running the check again does not help; what to do is the gate's to say."""
    judge(store, ACCURACY, passed=False)
    error = refused(store, ACCURACY)
    assert "accuracy: failed: because" in str(error)
    assert error.cure == ACCURACY.next_action


def test_newest_verdict_wins_both_ways(store: FolderStore) -> None:
    """A gate judged again replaces what it said, for better and for worse."""
    judge(store, ACCURACY, passed=False)
    judge(store, ACCURACY, passed=True)
    require(store, [ACCURACY], facts())
    judge(store, ACCURACY, passed=False)
    assert "failed" in str(refused(store, ACCURACY))
    assert verdicts(store, RELEASE)["accuracy"].passed is False


@pytest.mark.parametrize("subject", ACCURACY.subjects)
def test_verdict_about_other_bytes_is_refused(store: FolderStore, subject: str) -> None:
    """An old pass must not clear a rebuilt artifact, whichever of the subjects it is."""
    judge(store, ACCURACY, other=subject)
    message = str(refused(store, ACCURACY))
    assert subject in message
    assert OTHER in message
    assert DIGESTS[subject] in message


def test_subject_that_is_not_in_hand_is_refused(store: FolderStore) -> None:
    """A caller who cannot say which bytes are to go on gets no yes."""
    judge(store, ACCURACY)
    partial = {asset: digest for asset, digest in DIGESTS.items() if asset != "evaluation"}
    assert "evaluation is not in hand" in str(refused(store, ACCURACY, digests=partial))


def test_edited_threshold_makes_the_verdict_stale(store: FolderStore) -> None:
    """In both directions: a verdict is about one policy, and judging again is cheap."""
    judge(store, ACCURACY)
    stricter = parse_spec(SPEC.replace("at_least: 0.9, e", "at_least: 0.95, e"), "test")
    laxer = parse_spec(SPEC.replace("every_slice: 0.8", "every_slice: 0.1"), "test")
    for spec in (stricter, laxer):
        error = refused(store, ACCURACY, spec=spec)
        assert "another policy" in str(error)
        assert error.cure == "run the checks of evaluation for parrot.v1"
    elsewhere = parse_spec(SPEC.replace("{exact_match: {at_least: 0.9}}",
                                        "{exact_match: {at_least: 0.5}}"), "test")  # fmt: skip
    require(store, [ACCURACY], facts(spec=elsewhere))


def test_new_way_of_judging_makes_the_verdict_stale(store: FolderStore) -> None:
    """A bug mended in a gate must not leave the verdicts that it let pass."""
    judge(store, ACCURACY)
    assert "another policy" in str(refused(store, replace(ACCURACY, version=2)))


def test_all_objections_are_named_with_their_cures(store: FolderStore) -> None:
    """At night one wants the whole list, not one refusal after the other."""
    judge(store, ACCURACY, passed=False)
    judge(store, CHECKPOINT_SAFE, other="checkpoint")
    error = refused(store, *BUILT)
    for gate in BUILT:
        assert f"{gate.name}: " in str(error.found)
        expected = gate.next_action if gate is ACCURACY else f"run the checks of {gate.asset}"
        assert expected in error.cure


def blob_of_verdict(store: FolderStore) -> Path:
    (entry,) = store.log(f"verdicts/{RELEASE}")
    return store.root / "blobs" / entry.digest.replace(":", "/")


def test_tampered_record_is_detected(store: FolderStore) -> None:
    """A failed verdict edited into a passed one on disk must not open the gate."""
    judge(store, ACCURACY, passed=False)
    blob = blob_of_verdict(store)
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes().replace(b'"decision":"failed"', b'"decision":"passed"'))
    with pytest.raises(ArtifactCorruptError, match="damaged"):
        require(store, [ACCURACY], facts())


def test_verdict_binds_subjects_only(store: FolderStore) -> None:
    """Bytes that a gate never looked at are not cleared by it."""
    judge(store, CHECKPOINT_SAFE)
    assert verdicts(store, RELEASE)["checkpoint_safe"].subjects == {
        "checkpoint": DIGESTS["checkpoint"]
    }


def test_policies_of_all_gates_differ() -> None:
    """One gate's verdict must never pass for another's."""
    gates = [gate for gate in vars(all_gates).values() if isinstance(gate, Gate)]
    assert set(GATES) == {gate.name for gate in gates}
    assert len(GATES) == len(gates)
    assert len({policy_digest(gate, PARROT, POLICY) for gate in gates}) == len(gates)


def test_undecided_opens_no_gate(store: FolderStore) -> None:
    """Too few data to say no are too few to say yes."""
    judge(store, ACCURACY, decision=Decision.UNDECIDED)
    assert "accuracy: undecided: because" in str(refused(store, ACCURACY))


@pytest.mark.parametrize("decision", [Decision.FAILED, Decision.UNDECIDED])
def test_reviewed_waiver_lets_one_gate_pass_and_shows(
    store: FolderStore, decision: Decision
) -> None:
    """Whoever looks must see that it did not pass, who let it through, and until when."""
    judge(store, ACCURACY, decision=decision)
    judge(store, REGRESSION, decision=decision)
    given = waiver()
    (standing,) = require(store, [ACCURACY], facts(waivers=lambda: (given,)))
    assert standing.state is State.WAIVED
    assert standing.waiver == given
    for part in (decision.value, "ada@example.org", "the new labels are wrong themselves"):
        assert part in standing.reason
    (use,) = waiver_uses(store, RELEASE)
    assert (use.gate, use.waiver) == ("accuracy", given)
    assert "no_regression" in str(refused(store, REGRESSION, waivers=lambda: (given,)))


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
def test_waiver_for_something_else_blocks(store: FolderStore, changes: dict[str, Any]) -> None:
    """A waiver that has run out, or was given for another case, is none."""
    judge(store, ACCURACY, passed=False)
    given = waiver(**changes)
    assert "accuracy: failed" in str(refused(store, ACCURACY, waivers=lambda: (given,)))


def test_waiver_by_digest_covers_those_bytes(store: FolderStore) -> None:
    """Whichever release they are in."""
    judge(store, ACCURACY, passed=False)
    given = waiver(release=None, digest=DIGESTS["evaluation"])
    (standing,) = require(store, [ACCURACY], facts(waivers=lambda: (given,)))
    assert standing.state is State.WAIVED


def test_waiver_does_not_stand_for_judging(store: FolderStore) -> None:
    """It lets a known failure pass, not an unknown one, nor one of other bytes."""
    given = (waiver(),)
    assert "no verdict" in str(refused(store, ACCURACY, waivers=lambda: given))
    judge(store, ACCURACY, passed=False, other="checkpoint")
    assert "the verdict is about checkpoint" in str(refused(store, ACCURACY, waivers=lambda: given))


def test_another_serving_release_makes_the_comparison_stale(store: FolderStore) -> None:
    """No worse than what served last week says nothing of what serves today."""
    judge(store, REGRESSION, baseline=NOTHING_SERVES)
    require(store, [REGRESSION], facts(serving=NOTHING_SERVES))
    error = refused(store, REGRESSION, serving=OTHER)
    assert f"compared with package {NOTHING_SERVES}, but {OTHER} serves by now" in str(error)
    judge(store, REGRESSION, baseline=OTHER)
    require(store, [REGRESSION], facts(serving=OTHER))
    # What serves itself goes on, whatever it was compared with.
    require(store, [REGRESSION], facts(serving=DIGESTS["packaged_model"]))


def test_tries_before_a_pass_show(store: FolderStore) -> None:
    """A noisy measurement repeated until it passed must not look like one that passed."""
    judge(store, ACCURACY, passed=False)
    judge(store, ACCURACY, decision=Decision.UNDECIDED)
    judge(store, ACCURACY)
    (standing,) = standings(store, [ACCURACY], facts())
    assert standing.reason == "because (after 2 verdicts that did not pass)"


def test_verdict_of_another_version_is_explained(store: FolderStore) -> None:
    """After an upgrade old records are still there, and a stack trace helps nobody."""
    store.append(f"verdicts/{RELEASE}", {"gate": "accuracy", "passed": True})
    with pytest.raises(StoreError, match=r"A verdict about parrot\.v1 has a form"):
        require(store, [ACCURACY], facts())


def test_waiver_of_a_comparison_is_bound_to_what_it_compared_with(store: FolderStore) -> None:
    """Reviewed beside one serving release, it says nothing of a worse loss beside another."""
    given = waiver(gate="no_regression", baseline=OTHER)
    judge(store, REGRESSION, passed=False, baseline=OTHER)
    (standing,) = require(store, [REGRESSION], facts(waivers=lambda: (given,), serving=OTHER))
    assert standing.state is State.WAIVED
    third = digest_of(b"third")
    judge(store, REGRESSION, passed=False, baseline=third)
    refused(store, REGRESSION, waivers=lambda: (given,), serving=third)


def test_standings_tell_what_to_do(store: FolderStore) -> None:
    """The board of a release: each gate's state, and the next step where there is one."""
    judge(store, ACCURACY)
    judge(store, CHECKPOINT_SAFE, passed=False)
    judge(store, REGRESSION, other="evaluation")
    found = standings(store, (ACCURACY, CHECKPOINT_SAFE, REGRESSION, BUILT[0]), facts())
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
    store = FolderStore(tmp_path_factory.mktemp("verdicts"))
    chosen = (ACCURACY, CHECKPOINT_SAFE, all_gates.PARITY)
    stale = parse_spec(SPEC.replace("at_least: 0.9, e", "at_least: 1, e"), "test")
    for gate, history in zip(chosen, histories, strict=True):
        for kind in history:
            if kind == "policy":
                judge(store, replace(gate, version=9), spec=stale)
            elif kind == "other":
                judge(store, gate, other=gate.subjects[0])
            elif kind != "none":
                judge(store, gate, passed=kind == "passed")
    last = [next((k for k in reversed(h) if k != "none"), "none") for h in histories]
    if all(kind == "passed" for kind in last):
        assert len(require(store, chosen, facts())) == 3
    else:
        message = str(refused(store, *chosen))
        for gate, kind in zip(chosen, last, strict=True):
            assert (f"{gate.name}: " in message) == (kind != "passed")
