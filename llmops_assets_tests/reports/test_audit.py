"""The audit record: every section from signed statements, as of any time, or said to be broken."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from llmops_assets.errors import ReleaseError
from llmops_assets.evidence.gates import BUILT, CANARY, GATES
from llmops_assets.evidence.leaves import release_chain
from llmops_assets.evidence.log import LOG, Attestation
from llmops_assets.evidence.statements import GATE_VERDICT
from llmops_assets.evidence.statistics import Decision
from llmops_assets.reports.audit import audit
from llmops_assets.reports.audit_record import AuditRecord, Severity
from llmops_assets.reports.audit_text import MOST_LINES, WIDTH, page
from llmops_assets.reports.publication import ANNEX_FILE, AUDIT_FILE, PAGE_FILE
from llmops_assets.serving.slots import Environment

from ..evidence_rig import blob_of
from ..release_rig import FAILED, Rig, deploy
from .audited import COMMIT, record_steps
from .conftest import FIRST, SECOND

PRODUCTION = Environment.PRODUCTION


@pytest.fixture(scope="module")
def first(audited: Rig) -> AuditRecord:
    return audit(audited.platform, FIRST)


@pytest.fixture(scope="module")
def second(audited: Rig) -> AuditRecord:
    return audit(audited.platform, SECOND)


def test_identity_says_which_release_and_who_asked(first: AuditRecord) -> None:
    """The first thing an auditor writes down."""
    identity = first.identity
    assert (identity.release, identity.model, identity.version) == (FIRST, "parrot", 1)
    assert (identity.spec_file, identity.commit) == ("models/parrot.yaml", COMMIT)
    assert identity.commit_holds
    assert identity.requested_by == "ada"
    assert identity.position == "removed; its archive stays"


def test_inputs_have_digest_licence_and_origin(audited: Rig, first: AuditRecord) -> None:
    """Whether data may be used is asked first by whoever regulates it."""
    given = {found.name: found for found in first.inputs}
    column = audited.platform.columns.assets(FIRST)
    assert given["training data"].digest == column["training_data"].artifact
    assert given["training data"].license == "CC0-1.0"
    assert given["training data"].provenance == "Typed by a person for the tests of this platform."
    assert given["training data"].facts["rows"] == 40_000
    assert given["model spec"].digest == column["model_spec"].artifact
    assert given["source code"].digest == f"gitCommit:{COMMIT}"


def test_build_has_tools_flags_commands_and_reuse(first: AuditRecord, second: AuditRecord) -> None:
    """It can only be repeated by whoever knows all of these."""
    build = second.build
    assert build.toolchain == "onnxruntime_genai"
    assert build.flags == {"precision": "fp32", "block_size": 32}
    assert build.versions["onnxruntime-genai"] == ("0.18.0",)
    assert build.hardware == {"architecture": "x86_64"}
    assert build.commands == (("builder", "--precision", "fp32"),)
    reused = {step.asset for step in build.steps if step.reused_from == FIRST}
    assert {"training_data", "checkpoint", "converted_weights"} <= reused
    assert {"engine", "packaged_model"}.isdisjoint(reused)
    assert all(step.origin_attested for step in build.steps if step.reused_from is not None)
    assert {step.reused_from for step in first.build.steps} == {None}


def test_steps_are_what_the_store_published(audited: Rig, first: AuditRecord) -> None:
    """Nothing may be lost between a result and its provenance that an audit is made from."""
    column = audited.platform.columns.assets(FIRST)
    for step in first.build.steps:
        result = column[step.asset]
        assert step.artifact == result.artifact
        assert result.inputs.items() <= step.inputs.items()
        assert (step.parameters, step.versions, step.facts) == (
            result.parameters, result.versions, result.facts
        )  # fmt: skip


def test_gates_are_all_there_newest_first(second: AuditRecord) -> None:
    """A verdict that was taken back must not hide the one before, nor the other way round."""
    sequences = [found.sequence for found in second.gates]
    assert sequences == sorted(sequences, reverse=True)
    assert {gate.name for gate in (*BUILT, CANARY)} <= second.counting.keys()
    assert list(second.counting) == [name for name in GATES if name in second.counting]
    # Compared again at the promotion.
    judged = [found for found in second.gates if found.verdict.gate == "no_regression"]
    assert [found.newest for found in judged] == [True, False]


def test_deployments_name_who_why_and_what_was_before(second: AuditRecord) -> None:
    """From a served byte back to the decision that let it serve."""
    moved = next(c for c in second.deployments.routes if c.environment is PRODUCTION)
    assert [(share.release, share.weight) for share in moved.before] == [(FIRST, 100)]
    assert [(share.release, share.weight) for share in moved.after] == [(SECOND, 100), (FIRST, 0)]
    assert moved.actor.startswith("run ")
    assert moved.reason == f"deploying {SECOND}"
    assert [(a.environment, a.passed) for a in second.deployments.admissions] == [
        ("staging", True), ("production", True), ("production", True)
    ]  # fmt: skip
    assert {load.asset for load in second.deployments.loads} == {
        "staging_deployment", "production_candidate"
    }  # fmt: skip
    assert all(load.right_answers == load.answers == 2 for load in second.deployments.loads)


def test_time_in_which_it_served_ends_where_the_next_begins(
    first: AuditRecord, second: AuditRecord
) -> None:
    """Two releases that both claim an instant, or none that does, would answer nobody."""
    (one,) = [p for p in first.deployments.served if p.environment is PRODUCTION]
    (two,) = [p for p in second.deployments.served if p.environment is PRODUCTION]
    assert one.until == two.since
    assert two.until is None


def test_approvals_operation_and_retirement_are_on_record(first: AuditRecord) -> None:
    """The life of a release does not end with its deployment."""
    (approval,) = first.approvals
    assert (approval.approver, approval.decision, approval.known_by) == (
        "bob",
        "approve",
        "claimed",
    )
    assert approval.requested_by == "ada"
    assert len(first.operation.metrics) == len(first.operation.scaling) == 1
    retired = first.retirement
    assert retired.deprecated is not None
    assert retired.archived is not None
    assert retired.removed is not None
    assert retired.deprecated < retired.archived < retired.removed
    assert (retired.archive_file, retired.restored) == (f"{FIRST}.tar", Decision.PASSED)


def test_integrity_names_log_keys_and_trust_root(audited: Rig, first: AuditRecord) -> None:
    """These are what a verifier compares on another machine."""
    integrity = first.integrity
    checkpoint = audited.platform.evidence.checkpoint()
    chain = list(audited.platform.evidence.entries(release_chain(FIRST)))
    assert integrity.holds
    assert integrity.statements == len(chain)
    assert integrity.log_size == checkpoint.size
    assert integrity.package_signature == "valid"
    assert [(key.statements, key.current) for key in integrity.keys] == [(len(chain), True)]
    assert (integrity.trust_root or "").startswith("sha256:")


def test_only_what_is_true_of_this_set_up_is_left_open(first: AuditRecord) -> None:
    """Gaps that are always there would teach people not to read them."""
    assert {gap.kind for gap in first.gaps} == {"approver-claimed", "gpu-never-seen"}
    assert all(gap.why and gap.to_do and gap.what for gap in first.gaps)


def test_as_of_shows_nothing_later(audited: Rig, second: AuditRecord) -> None:
    """An auditor asks what was known when it was let through."""
    (approved,) = second.approvals
    entry = audited.platform.evidence.entry(approved.sequence)
    then = audit(audited.platform, SECOND, entry.time)
    assert then.approvals == second.approvals
    assert then.identity.position == "in staging"
    assert not [p for p in then.deployments.served if p.environment is PRODUCTION]
    assert max(found.sequence for found in then.gates) <= approved.sequence
    before = audit(audited.platform, SECOND, entry.time - timedelta(microseconds=1))
    assert before.approvals == ()
    with pytest.raises(ReleaseError, match=r"on record of release parrot\.v2 at that time"):
        audit(audited.platform, SECOND, datetime(2020, 1, 1, tzinfo=UTC))


def test_document_is_the_same_after_json(second: AuditRecord) -> None:
    """It is archived, exported and read again by others."""
    assert AuditRecord.model_validate_json(second.model_dump_json()) == second
    AuditRecord.model_json_schema()


def test_release_that_nobody_asked_for_is_an_error(audited: Rig) -> None:
    """An empty page would look like a clean one."""
    with pytest.raises(ReleaseError, match="`llmops gates parrot`"):
        audit(audited.platform, "parrot.v9")


def test_changed_statement_is_shown_and_the_rest_stays(rig: Rig) -> None:
    """What was changed must not be presented, and must not hide what holds."""
    rig.build(FIRST, 1)
    whole = audit(rig.platform, FIRST)
    found = next(f for f in whole.gates if f.verdict.gate == "accuracy")
    blob = blob_of(rig.platform.evidence, found.sequence)
    blob.write_bytes(blob.read_bytes().replace(b'"keyid"', b'"keyiD"'))
    broken = audit(rig.platform, FIRST)
    assert not broken.integrity.holds
    assert "does NOT hold" in broken.summary
    assert broken.integrity.statements == whole.integrity.statements - 1
    assert whole.counting.keys() - broken.counting.keys() == {"accuracy"}
    assert "THE EVIDENCE DOES NOT HOLD" in "\n".join(page(broken))


def test_cut_off_log_is_said_and_nothing_is_presented(rig: Rig) -> None:
    """The index remembers what was there; the release must not look as if it had never been."""
    rig.build(FIRST, 1)
    size = audit(rig.platform, FIRST).integrity.log_size
    assert size is not None
    *_, last = sorted((rig.platform.settings.store / "logs" / LOG).iterdir())
    last.unlink()
    broken = audit(rig.platform, FIRST)
    assert not broken.integrity.holds
    assert f"Entry {size - 1} of the evidence log is gone" in broken.integrity.problems[0]
    assert broken.build.steps == ()
    assert "None of the evidence" in broken.summary


def test_statement_of_another_version_is_said(rig: Rig) -> None:
    """A record that cannot be read is no reason to leave out the others, nor to hide it."""
    rig.freeze(FIRST)
    entry = next(rig.platform.evidence.entries(release_chain(FIRST)))
    verdict = entry.statement.model_copy(
        update={"predicate_type": GATE_VERDICT, "predicate": {"gate": "of the future"}}
    )
    rig.platform.evidence.append(Attestation(verdict, (release_chain(FIRST),)))
    record = audit(rig.platform, FIRST)
    assert record.identity.spec is not None
    assert "another version of the platform" in record.integrity.problems[0]


def test_forged_ref_changes_nothing_but_the_gaps(rig: Rig) -> None:
    """Whoever can write to the store, and has no key, must not get into an audit."""
    record_steps(rig, FIRST)
    before = audit(rig.platform, FIRST)
    store = rig.platform.store
    result = rig.platform.columns.get(FIRST, "engine")
    forged = result.model_copy(
        update={"artifact": "sha256:" + "e" * 64, "facts": {"by": "mallory"}}
    )
    logged = store.append(f"releases/{FIRST}/engine", forged.model_dump(mode="json")).digest
    ref = f"releases/{FIRST}/engine"
    store.compare_and_set(ref, store.resolve(ref), logged)
    after = audit(rig.platform, FIRST)
    assert after.build == before.build
    assert "result-unattested" in {gap.kind for gap in after.gaps}
    assert "mallory" not in after.model_dump_json()


def test_page_of_a_terminal_stays_one_page(rig: Rig, first: AuditRecord) -> None:
    """Whoever asks at night reads one screen."""
    rig.build(FIRST, 1)
    for _ in range(2):
        rig.judge(FIRST, BUILT, FAILED)
    deploy(rig, 1)
    for record in (first, audit(rig.platform, FIRST)):
        lines = page(record)
        assert len(lines) <= MOST_LINES
        assert max(map(len, lines)) <= WIDTH + 2
        assert not any("\x1b" in line for line in lines)
        for section in ("Identity", "Inputs", "Build", "Gates", "Approvals", "Deployments",
                        "Operation", "Retirement", "Integrity", "Gaps"):  # fmt: skip
            assert any(line.startswith(section) for line in lines), section
    assert any("\x1b[31m" in line for line in page(record, colour=True))


def test_words_of_others_cannot_steer_the_terminal(rig: Rig) -> None:
    """A reason with escape codes could paint a failed gate green."""
    rig.build(FIRST, 1)
    hostile = FAILED.model_copy(update={"reason": "\x1b[2J\x1b[32mpassed\u202e"})
    rig.judge(FIRST, BUILT[:1], hostile)
    text = "\n".join(page(audit(rig.platform, FIRST)))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\u{1b}[2J" in text


def test_artifact_has_record_page_and_annex(audited: Rig) -> None:
    """What is kept of a removed release is read by people, machines and regulators."""
    result = audited.platform.columns.get(FIRST, "audit_record")
    _, folder = audited.platform.store.open(result.artifact)
    names = {file.name for file in folder.iterdir()}
    assert names == {"document.json", AUDIT_FILE, PAGE_FILE, ANNEX_FILE}
    stored = AuditRecord.model_validate_json((folder / AUDIT_FILE).read_bytes())
    assert stored.identity == audit(audited.platform, FIRST).identity
    assert result.inputs == {step.asset: step.artifact for step in stored.build.steps}
    assert result.facts["gaps"][0].startswith("doubtful: Who approved is claimed")


def test_severity_orders_the_gaps(rig: Rig) -> None:
    """What is missing is read before what is merely to be known."""
    rig.freeze(FIRST)
    rig.publish(FIRST, "packaged_model", {"package.json": "{}"})
    order = [list(Severity).index(gap.severity) for gap in audit(rig.platform, FIRST).gaps]
    assert order == sorted(order)
    assert order[0] == 0
