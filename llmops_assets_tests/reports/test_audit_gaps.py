"""Gaps: each kind is provoked once, and found; a release in order has none of them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import BaseModel

from llmops_assets.deploy.approval import record_approval
from llmops_assets.develop.specs import SpecSource
from llmops_assets.errors import GateRefusedError
from llmops_assets.evidence import attest
from llmops_assets.evidence.gates import (
    ACCURACY,
    APPROVED,
    COMPLIANCE,
    FITS_TARGET,
    PARITY,
    WEIGHTS_COMPLETE,
)
from llmops_assets.evidence.keys import (
    TRUST_ROOT,
    CryptoSigner,
    TrustedKey,
    TrustRoot,
    read_trust_root,
)
from llmops_assets.evidence.leaves import release_chain
from llmops_assets.evidence.log import Attestation
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import WaiverUse, record_verdict
from llmops_assets.evidence.waivers import Waiver
from llmops_assets.operate.incidents import Incident, report_incident
from llmops_assets.reports.audit import audit
from llmops_assets.reports.audit_record import AuditRecord, Gap, Severity
from llmops_assets.reports.lineage_drawing import Mark, draw
from llmops_assets.retire.withdrawal import Deprecation, Removal
from llmops_assets.serving.slots import Environment
from llmops_assets.storage.artifacts import digests
from llmops_assets.storage.columns import Action, Workshop

from ..release_rig import FAILED, PASSED, SPEC, Rig, deploy, loaded
from .audited import AUDITED_SPEC, COMMIT, record_release, record_steps

RELEASE = "parrot.v1"
NOW = datetime(2026, 11, 17, 14, 5, tzinfo=UTC)
OTHER = "sha256:" + "e" * 64


def record_of(rig: Rig) -> AuditRecord:
    record = audit(rig.platform, RELEASE)
    assert record.integrity.holds, record.integrity.problems
    return record


def found(rig: Rig, kind: str) -> list[Gap]:
    """Gaps of a kind."""
    return [gap for gap in record_of(rig).gaps if gap.kind == kind]


def mark(rig: Rig, asset: str) -> Mark:
    """How a box of the drawing stands."""
    return next(box.mark for box in draw(record_of(rig)).boxes if box.asset == asset)


def event(rig: Rig, asset: str, document: BaseModel) -> None:
    action = Action(asset=asset, media_type="application/vnd.llmops.test")
    rig.platform.columns.record(RELEASE, action, document, NOW)


@pytest.mark.usefixtures("packages")
def test_package_that_was_just_put_into_production(rig: Rig) -> None:
    """The worst case: it serves, and nothing says why it may."""
    deploy(rig, 1)
    gaps = record_of(rig).gaps
    missing = [gap for gap in gaps if gap.severity is Severity.MISSING]
    assert {gap.kind for gap in missing} == {
        "provenance-missing", "verdict-missing", "approval-missing", "package-unsigned",
    }  # fmt: skip
    assert any("training data" in gap.what for gap in missing)
    assert any("separation_of_duties" in gap.what for gap in missing)
    assert "never-observed" in {gap.kind for gap in gaps}
    assert mark(rig, "engine") is Mark.MISSING
    assert mark(rig, "production_approval") is Mark.MISSING
    assert mark(rig, "archive") is Mark.ABSENT


def test_load_without_a_decision_to_deploy(rig: Rig) -> None:
    """The platform decides before it loads, and signs that; who loads by hand does not."""
    record_steps(rig, RELEASE)
    event(rig, "production_candidate", loaded(rig, 1))
    (gap,) = found(rig, "admission-missing")
    assert "production" in gap.what
    assert len(found(rig, "verdict-missing")) == len(APPROVED)


def test_refused_deployment_stays_visible(rig: Rig) -> None:
    """Who tried until it went through must show."""
    record_steps(rig, RELEASE)
    column = rig.platform.column(RELEASE)
    with pytest.raises(GateRefusedError):
        rig.platform.admit(RELEASE, APPROVED, column, Environment.PRODUCTION)
    (gap,) = found(rig, "admission-refused")
    assert gap.severity is Severity.NOTE


def test_gate_that_had_not_passed_when_it_was_deployed(rig: Rig) -> None:
    """A pass afterwards does not heal that it went on without."""
    record_release(rig, RELEASE, 1)
    rig.judge(RELEASE, [ACCURACY], FAILED)
    deploy(rig, 1)
    rig.judge(RELEASE, [ACCURACY], PASSED)
    (gap,) = found(rig, "verdict-not-passed")
    assert "accuracy" in gap.what
    assert gap.why == "the test says so"


def test_failed_and_undecided_gates(rig: Rig) -> None:
    """Both stop a release; that one was not sure is another thing to tell an auditor."""
    record_steps(rig, RELEASE)
    rig.judge(RELEASE, [WEIGHTS_COMPLETE], FAILED)
    rig.judge(RELEASE, [FITS_TARGET], FAILED.model_copy(update={"decision": Decision.UNDECIDED}))
    assert ["weights_complete" in gap.what for gap in found(rig, "gate-failed")] == [True]
    assert ["fits_target" in gap.what for gap in found(rig, "gate-undecided")] == [True]
    assert mark(rig, "engine") is Mark.FAILED
    assert record_of(rig).identity.position == "stopped at gate weights_complete, fits_target"


def test_verdict_about_other_bytes(rig: Rig) -> None:
    """A pass of another engine says nothing about this one."""
    record_release(rig, RELEASE, 1)
    column = {**digests(rig.platform.column(RELEASE)), "engine": OTHER}
    record_verdict(
        rig.platform.evidence, RELEASE, PARITY, rig.platform.spec(RELEASE), rig.platform.policy,
        PASSED, column, "run",
    )  # fmt: skip
    deploy(rig, 1)
    (gap,) = found(rig, "verdict-other-bytes")
    assert "parity" in gap.what
    assert "eeeeeeeeeeee" in gap.what


def test_step_made_from_other_bytes(rig: Rig) -> None:
    """The chain from data to what serves must not change horses."""

    def make(workshop: Workshop) -> dict[str, str]:
        workshop.output.mkdir(parents=True)
        (workshop.output / "engine").write_text("of other weights")
        return {}

    action = Action("engine", "application/vnd.llmops.test", {"converted_weights": OTHER})
    rig.freeze(RELEASE)
    rig.platform.columns.produce(RELEASE, action, make)
    rig.build(RELEASE, 1)
    (gap,) = found(rig, "input-other-bytes")
    assert "eeeeeeeeeeee" in gap.what


def test_result_in_the_store_that_nobody_signed(rig: Rig) -> None:
    """Whoever writes the store can add what they like; it must not look like the rest."""
    record_steps(rig, RELEASE)
    result = rig.platform.columns.get(RELEASE, "engine")
    forged = result.model_copy(update={"asset": "archive", "artifact": OTHER})
    store = rig.platform.store
    logged = store.append(f"releases/{RELEASE}/archive", forged.model_dump(mode="json"))
    store.compare_and_set(f"releases/{RELEASE}/archive", None, logged.digest)
    (gap,) = found(rig, "result-unattested")
    assert "archive" in gap.what


def test_bytes_that_the_store_lost(rig: Rig) -> None:
    """The signature still holds; what it is about cannot be looked at any more."""
    record_steps(rig, RELEASE)
    artifact = rig.platform.columns.get(RELEASE, "engine").artifact
    (rig.platform.settings.store / "blobs" / artifact.replace(":", "/")).unlink()
    (gap,) = found(rig, "artifact-gone")
    assert "engine" in gap.what


def test_rejected_and_still_serving(rig: Rig) -> None:
    """A person said no, and the machine does not know it."""
    record_steps(rig, RELEASE)
    deploy(rig, 1)
    package = rig.platform.columns.get(RELEASE, "packaged_model").artifact
    record_approval(rig.platform, RELEASE, "carol", "reject", "it lies", package)
    (gap,) = found(rig, "rejected")
    assert "carol, it lies" in gap.what


@pytest.mark.parametrize(
    ("commit", "changed", "words"),
    [(None, True, "in no commit"), (COMMIT, True, "differed from commit cccccccccccc")],
)
def test_spec_that_was_not_committed(
    rig: Rig, commit: str | None, changed: bool, words: str
) -> None:
    """Nobody reviewed it, and nobody finds it again."""
    source = SpecSource(file="models/parrot.yaml", commit=commit, changed=changed)
    record_steps(rig, RELEASE, source=source)
    (gap,) = found(rig, "spec-not-committed")
    assert words in gap.what


def test_data_without_licence_and_origin(rig: Rig) -> None:
    """And the weights, imported or trained, which then may not be served either."""
    record_steps(rig, RELEASE, SPEC)
    assert [gap.what for gap in found(rig, "license-undeclared")] == [
        "No licence is declared for the training data.",
        "No licence is declared for the base weights.",
    ]
    assert len(found(rig, "provenance-undeclared")) == 1
    without_card = AUDITED_SPEC[: AUDITED_SPEC.index("card:")] + "data:"
    record_steps(rig, "parrot.v2", without_card + AUDITED_SPEC.split("\ndata:")[1])
    gaps = [gap.what for gap in audit(rig.platform, "parrot.v2").gaps]
    assert "No licence is declared for the weights." in gaps


def test_waiver_names_owner_and_end(rig: Rig) -> None:
    """An exception must not look like a pass, and must not look like a failure either."""
    record_steps(rig, RELEASE)
    (verdict,) = rig.judge(RELEASE, [COMPLIANCE], FAILED)
    waiver = Waiver(
        gate="compliance", release=RELEASE, owner="dana", reason="Known, and mended next week.",
        expires=NOW + timedelta(days=7),
    )  # fmt: skip
    use = WaiverUse(
        release=RELEASE, gate="compliance", waiver=waiver, judged=verdict.time, time=NOW
    )
    rig.platform.evidence.append(
        Attestation(attest.waiver_use(use, verdict), (release_chain(RELEASE),))
    )
    deploy(rig, 1)
    (gap,) = found(rig, "waiver-used")
    assert "dana until 2026-11-24 14:05:00 UTC" in gap.what
    assert gap.why == "Known, and mended next week."
    assert not found(rig, "gate-failed")
    assert not found(rig, "verdict-not-passed")
    assert mark(rig, "compliance_report") is Mark.WAIVED


def test_reuse_of_what_nobody_attested(rig: Rig) -> None:
    """`reused_from` is worth what the release it names can show."""
    record_steps(rig, "parrot.v2")
    engine = rig.platform.columns.get("parrot.v2", "engine")
    taken = {"release": RELEASE, "reused_from": "parrot.v8"}
    rig.freeze(RELEASE)
    rig.platform.columns.publish(engine.model_copy(update=taken))
    (gap,) = found(rig, "origin-missing")
    assert "parrot.v8" in gap.what


def test_gpu_is_noted_unless_one_was_seen(rig: Rig) -> None:
    """Numbers of a processor must not be read as those of the GPU that will serve."""
    record_steps(rig, RELEASE)
    assert found(rig, "gpu-never-seen")
    record_steps(rig, "parrot.v2", versions={"gpu": "NVIDIA H100", "architecture": "sm_90"})
    kinds = {gap.kind for gap in audit(rig.platform, "parrot.v2").gaps}
    assert "gpu-never-seen" not in kinds


def test_incident_that_nobody_answered(rig: Rig) -> None:
    """Also one of a release that does not serve any more."""
    record_steps(rig, RELEASE)
    incident = Incident(
        model="parrot", release=RELEASE, what="wrong dates", action=None, actor=None,
        detected=NOW, answered=None, id="alert-1",
    )  # fmt: skip
    report_incident(rig.platform.evidence, incident)
    (gap,) = found(rig, "incident-open")
    assert "wrong dates" in gap.what
    done = {"action": "rolled back", "actor": "sre", "answered": NOW}
    report_incident(rig.platform.evidence, incident.model_copy(update=done))
    assert not found(rig, "incident-open")
    assert [i.action for i in record_of(rig).operation.incidents] == ["rolled back"]


def test_removed_without_an_archive(rig: Rig) -> None:
    """The bytes are gone and nothing says that they can come back."""
    record_steps(rig, RELEASE)
    event(rig, "deprecated_version", Deprecation(release=RELEASE, stopped=(), time=NOW))
    event(rig, "removed_version", Removal(release=RELEASE, cleared=(), time=NOW))
    assert found(rig, "archive-missing")
    assert ["nothing_routes" in gap.what for gap in found(rig, "verdict-missing")] == [True]


def test_clock_that_went_backwards(rig: Rig) -> None:
    """The order of the log is certain, its times are what machines believed."""
    rig.freeze(RELEASE)
    earlier = replace(rig.platform.evidence, now=lambda: NOW - timedelta(days=3650))
    report = Incident(
        model="parrot", release=RELEASE, what="x", action="y", actor="z", detected=NOW,
        answered=NOW,
    )  # fmt: skip
    report_incident(earlier, report)
    (gap,) = found(rig, "clock-backwards")
    assert "Entries 2 " in gap.what


def test_statements_of_a_key_that_was_replaced(rig: Rig) -> None:
    """They are still trusted; whether they should be depends on why the key went."""
    rig.freeze(RELEASE)
    folder = rig.platform.settings.key_folder
    root = read_trust_root(folder)
    new = CryptoSigner.generate_ed25519().public_key
    first = TrustedKey.model_validate({"role": "evidence", "keyid": new.keyid, **new.to_dict()})
    rotated = TrustRoot(keys=(first, *root.keys))
    (folder / TRUST_ROOT).write_text(rotated.model_dump_json())
    (gap,) = found(rig, "older-key")
    assert gap.severity is Severity.NOTE


def test_release_in_order_has_no_gap_of_these(audited: Rig) -> None:
    """Otherwise all of the above would prove nothing."""
    record = audit(audited.platform, "parrot.v2")
    assert {gap.kind for gap in record.gaps} == {"approver-claimed", "gpu-never-seen"}
    assert any("not proven: bob" in gap.what for gap in record.gaps)
