"""From records to statements: complete, true to the specifications, and without secrets."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from in_toto_attestation.v1.statement import Statement as IntotoStatement

from llmops_assets import __version__
from llmops_assets.deploy.accepted_approvers import AcceptedPolicy, PolicyChangeApproval
from llmops_assets.deploy.approval import RecordedDecision
from llmops_assets.deploy.revocation import Revocation
from llmops_assets.deploy.signed_decision import LogHead, SignedDecision
from llmops_assets.develop.specs import SpecSource
from llmops_assets.evidence import attest
from llmops_assets.evidence import statements as types
from llmops_assets.evidence.gates import NextAction
from llmops_assets.evidence.statements import Statement
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import NOTHING_SERVES, Finding, Verdict, WaiverUse
from llmops_assets.evidence.waivers import Waiver
from llmops_assets.operate.incidents import Incident, Note
from llmops_assets.operate.settings_changes import SettingsChange
from llmops_assets.serving.routes import Route, RouteTarget
from llmops_assets.serving.slots import Colour, Environment
from llmops_assets.storage.columns import Result
from llmops_assets.storage.folder import FolderStore
from llmops_assets.storage.store import canonical_json, digest_of
from llmops_assets.toolchains.onnxruntime_genai.toolchain import DISTRIBUTIONS
from llmops_assets_tests.evidence import intoto_models

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "predicates.md"

RELEASE = "parrot.v1"
STARTED = datetime(2026, 1, 31, 12, 0, 0, 250_000, tzinfo=UTC)
FINISHED = STARTED + timedelta(seconds=90)
COMMIT = "c0ffee" * 6 + "c0ff"


def digest(of: str) -> str:
    return digest_of(of.encode())


def hexadecimal(of: str) -> str:
    return digest(of).removeprefix("sha256:")


ENGINE = Result(
    asset="engine",
    release=RELEASE,
    artifact=digest("engine"),
    media_type="application/vnd.llmops.engine.onnxruntime_genai.v1",
    action=digest("action"),
    inputs={"converted_weights": digest("weights")},
    parameters={"precision": "int4", "block_size": 32},
    versions={"onnxruntime": "1.24.1+cpu", "llmops_assets": digest("our"), "architecture": "x86"},
    facts={"seconds_of_tool": 61.5},
    started=STARTED,
    finished=FINISHED,
)
SPEC = ENGINE.model_copy(
    update={
        "asset": "model_spec",
        "artifact": digest("spec"),
        "inputs": {},
        "versions": {},
        "parameters": {
            "release": RELEASE,
            "spec": {"image": digest("used later")},
            "source": SpecSource(
                file="models/parrot.yaml", commit=COMMIT, changed=False, pinned=True
            ).model_dump(),
        },
    }
)
DEPLOYED = ENGINE.model_copy(
    update={"asset": "staging_deployment", "facts": {"colour": "blue"}, "parameters": {}}
)
VERDICT = Verdict(
    gate="accuracy",
    release=RELEASE,
    decision=Decision.PASSED,
    measured={"exact_match": 0.99},
    threshold={"exact_match": "at least 0.9"},
    reason="good enough",
    findings=(
        Finding(
            metric="exact_match",
            value=0.99,
            n=400,
            threshold="at least 0.9",
            decision=Decision.PASSED,
        ),
    ),
    subjects={name: digest(name) for name in ("checkpoint", "evaluation_data", "evaluation")},
    dataset=digest("evaluation_data"),
    baseline=digest("package that serves"),
    policy=digest("policy"),
    action=NextAction.ITERATE,
    next_action="iterate: train longer",
    owner="team:data-science",
    run="8f14e45f",
    time=STARTED,
)
USE = WaiverUse(
    release=RELEASE,
    gate="accuracy",
    waiver=Waiver(
        gate="accuracy",
        release=RELEASE,
        owner="ada@example.org",
        reason="the labels of the new slice are wrong",
        expires=FINISHED,
    ),
    judged=STARTED,
    time=FINISHED,
)
ROUTE = Route(
    environment=Environment.PRODUCTION,
    model="parrot",
    generation=2,
    targets=tuple(
        RouteTarget(
            colour=colour,
            weight=weight,
            package=digest(f"package {colour}"),
            release=RELEASE,
            version=1,
            host="127.0.0.1",
            http_port=8000,
            grpc_port=8001,
            metrics_port=8002,
        )
        for colour, weight in ((Colour.BLUE, 100), (Colour.GREEN, 0))
    ),
    actor="ada",
    reason="canary passed",
    time=STARTED,
    predecessor=digest("route 1"),
)
INCIDENT = Incident(
    model="parrot",
    release=RELEASE,
    what="error rate 0.2",
    action=None,
    actor=None,
    detected=STARTED,
    answered=None,
)
CHOICE = RecordedDecision(
    release=RELEASE,
    approver="grace",
    decision="approve",
    reason="fine",
    package=digest("package"),
    time=STARTED,
)


def summary(passed: bool = True, provenance: str | None = digest("provenance")) -> Statement:
    return attest.verification_summary(
        release=RELEASE,
        model="parrot",
        package=digest("package"),
        environment="production",
        attestations=[digest("verdict 1"), digest("verdict 2"), digest("verdict 1")],
        provenance=provenance,
        policy=digest("policy"),
        passed=passed,
        time=STARTED,
    )


EVERY_KIND: Mapping[str, Statement] = {
    "provenance": attest.provenance(ENGINE, spec=SPEC),
    "provenance of the spec": attest.provenance(SPEC),
    "provenance, reused": attest.provenance(
        ENGINE.model_copy(update={"reused_from": "parrot.v0"}), spec=SPEC
    ),
    "verdict": attest.verdict(VERDICT)[0],
    "test result": attest.verdict(VERDICT)[1],
    "waiver": attest.waiver_use(USE, VERDICT),
    "event": attest.lifecycle_event(DEPLOYED),
    "route": attest.route_change(ROUTE),
    "empty route": attest.route_change(ROUTE.model_copy(update={"targets": ()})),
    "incident": attest.incident(INCIDENT),
    "incident note": attest.incident_note(
        Note(
            incident="incident-parrot-0",
            model="parrot",
            release=RELEASE,
            actor="ada",
            text="a noisy neighbour, moved away",
            closes=True,
            time=STARTED,
        )
    ),
    "settings": attest.settings_change(
        SettingsChange(
            settings={"drain_seconds": 9.0, "webhook_secret": "(hidden)"},
            changed=("drain_seconds",),
            actor="ada",
            time=STARTED,
        )
    ),
    "decision": attest.decision(CHOICE),
    "approval": attest.approval(
        SignedDecision(
            environment=Environment.PRODUCTION,
            model="parrot",
            release=RELEASE,
            package=digest("package"),
            decision="approve",
            approver="grace",
            reason="fine",
            verdicts={"accuracy": digest("verdict 1")},
            policy=digest("policy"),
            log=LogHead(size=12, root="TKfVZDH/8vOLWzRhpGEPSKMrTIQDtxzw+pKD/t5rlZk="),
            nonce="0123456789abcdef0123456789abcdef",
            time=STARTED,
            not_before=STARTED,
            expires=FINISHED,
        )
    ),
    "revocation": attest.revocation(
        Revocation(
            release=RELEASE,
            package=digest("package"),
            actor="ada",
            reason="wrong years",
            time=STARTED,
        )
    ),
    "approvers": attest.approvers(
        AcceptedPolicy(
            ref="refs/heads/approvers",
            commit=COMMIT,
            digest=digest("approvers"),
            content="approvers: ...",
            approvers=(),
            envelopes=(),
            time=STARTED,
        )
    ),
    "change of approvers": attest.approvers_change(
        PolicyChangeApproval(
            approver="grace",
            digest=digest("approvers"),
            previous=digest("entry"),
            reason="heidi joins",
            time=STARTED,
        )
    ),
    "summary": summary(),
    "refusal": summary(passed=False),
    "export": attest.audit_export(
        chains={f"releases/{RELEASE}": (12, digest("head")), "anchors": (0, None)},
        documents={"README.txt": digest("readme")},
        actor="ada",
        time=STARTED,
    ),
    "anchor": attest.anchor(
        kind="time-stamp",
        place="https://tsa.example.org",
        proof="MIIC",
        checkpoint=digest("checkpoint"),
        size=12,
        time=STARTED,
    ),
}
STANDARD: Mapping[str, type[Message]] = {
    types.PROVENANCE: intoto_models.PROVENANCE,
    types.TEST_RESULT: intoto_models.TEST_RESULT,
    types.VERIFICATION_SUMMARY: intoto_models.VERIFICATION_SUMMARY,
}
REQUIRED: Mapping[str, tuple[str, ...]] = {
    # SLSA Provenance v1: "REQUIRED for SLSA Build L1", and what L2 and L3 add to be complete.
    types.PROVENANCE: (
        "buildDefinition",
        "buildDefinition.buildType",
        "buildDefinition.externalParameters",
        "buildDefinition.resolvedDependencies",
        "runDetails",
        "runDetails.builder",
        "runDetails.builder.id",
        "runDetails.metadata.invocationId",
        "runDetails.metadata.startedOn",
        "runDetails.metadata.finishedOn",
    ),
    # SLSA Verification Summary v1.
    types.VERIFICATION_SUMMARY: (
        "verifier",
        "verifier.id",
        "timeVerified",
        "resourceUri",
        "policy",
        "policy.uri",
        "verificationResult",
        "verifiedLevels",
    ),
    # in-toto Test Result v0.1.
    types.TEST_RESULT: ("result", "configuration"),
}


def standard_fields(value: Any) -> Any:
    """Without the extension fields that SLSA allows: those with our prefix."""
    if isinstance(value, dict):
        return {k: standard_fields(v) for k, v in value.items() if not k.startswith("llmops_")}
    return [standard_fields(item) for item in value] if isinstance(value, list) else value


def equal_as_slsa_says(one: Any, other: Any) -> bool:
    """Unset and empty are the same; protobuf writes times and whole numbers in its own way."""
    return normal(one) == normal(other)


def normal(value: Any) -> Any:
    if isinstance(value, dict):
        fields = {name: normal(inner) for name, inner in value.items()}
        return {name: inner for name, inner in fields.items() if inner not in (None, "", [], {})}
    if isinstance(value, list):
        return [normal(item) for item in value]
    if isinstance(value, str) and value.startswith("2026-") and value.endswith("Z"):
        return datetime.fromisoformat(value)
    return value


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_is_read_by_intoto_and_by_us(kind: str) -> None:
    """Evidence is worth what others can read: in-toto's model takes each without an unknown
    field, and each comes back from its bytes as it was."""
    statement = EVERY_KIND[kind]
    message = json_format.Parse(statement.payload(), intoto_models.STATEMENT())
    IntotoStatement.copy_from_pb(message).validate()
    assert Statement.parse(statement.payload()) == statement


def test_every_own_predicate_has_a_kind_above_and_a_place_in_the_docs() -> None:
    """A predicate that nobody documented means nothing to an auditor in five years."""
    documented = DOCUMENTATION.read_text(encoding="utf-8")
    declared = {
        value
        for value in vars(types).values()
        if isinstance(value, str) and value.startswith("https://") and value.endswith(("v1", "0.1"))
    } - {types.STATEMENT_TYPE}
    assert len(declared) == 17
    assert {statement.predicate_type for statement in EVERY_KIND.values()} == declared
    for uri in (*declared, attest.BUILD_TYPE, attest.LOCAL_BUILDER, attest.VERIFIER):
        assert uri in documented, uri
    for statement in EVERY_KIND.values():
        if statement.predicate_type.startswith(types.OWN_PREDICATES):
            for name in statement.predicate:
                assert f"`{name}`" in documented, (statement.predicate_type, name)


def test_the_examples_in_the_docs_are_statements() -> None:
    """Whoever writes a verifier begins with these: one of each type, and each is valid."""
    text = DOCUMENTATION.read_text(encoding="utf-8")
    text = re.sub(r'("llmops-assets": )"[^"]*"', rf'\1"{__version__}"', text)
    examples = [
        Statement.parse(canonical_json(json.loads(block)))
        for block in re.findall(r"^```json\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]
    made = list(EVERY_KIND.values())
    assert all(example in made for example in examples)
    assert {e.predicate_type for e in examples} == {m.predicate_type for m in made}


@pytest.mark.parametrize(
    "kind", [kind for kind, made in EVERY_KIND.items() if made.predicate_type in STANDARD]
)
def test_standard_predicates_are_those_of_their_authors(kind: str) -> None:
    """in-toto's protobuf models know exactly the fields of the specifications: with our
    extensions taken out, nothing may be left that they do not know."""
    statement = EVERY_KIND[kind]
    predicate = standard_fields(statement.predicate)
    if statement.predicate_type == types.VERIFICATION_SUMMARY:
        # The models of in-toto-attestation 0.9.3 lag behind: they lack a field of SLSA 1.1, and
        # take one string for what the specification says is a list.
        assert set(predicate["verifier"].pop("version")) == {"llmops-assets"}
        (predicate["verifiedLevels"],) = predicate["verifiedLevels"]
    message = json_format.ParseDict(predicate, STANDARD[statement.predicate_type]())
    # It has kept all of it, and not only got over it.
    assert equal_as_slsa_says(json_format.MessageToDict(message), predicate)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (kind, path)
        for kind, made in EVERY_KIND.items()
        for path in REQUIRED.get(made.predicate_type, ())
    ],
)
def test_required_fields_are_there(kind: str, path: str) -> None:
    """One by one, as the specifications list them: unset and empty are the same to them."""
    value: Any = EVERY_KIND[kind].predicate
    for name in path.split("."):
        assert name in value, path
        value = value[name]
    # A frozen spec has a commit, so that no list of dependencies here is empty.
    assert value not in (None, "", {}, []), path


def test_provenance_says_how_the_artifact_was_made() -> None:
    """The whole of one, against the record it is made from: what an auditor follows back."""
    statement = attest.provenance(ENGINE, spec=SPEC)
    assert [(s.name, s.sha256) for s in statement.subject] == [("engine", digest("engine"))]
    build, run = statement.predicate["buildDefinition"], statement.predicate["runDetails"]
    assert build["externalParameters"] == {
        "release": RELEASE,
        "asset": "engine",
        "parameters": {"precision": "int4", "block_size": 32},
    }
    assert build["internalParameters"] == {
        "action": digest("action"),
        "mediaType": "application/vnd.llmops.engine.onnxruntime_genai.v1",
        "versions": dict(ENGINE.versions),
    }
    assert not set(build["externalParameters"]) & set(build["internalParameters"])
    assert build["resolvedDependencies"] == [
        {"name": "model_spec", "digest": {"sha256": hexadecimal("spec")}},
        {"name": "source", "digest": {"gitCommit": COMMIT}},
        {"name": "converted_weights", "digest": {"sha256": hexadecimal("weights")}},
        {"name": "versions/llmops_assets", "digest": {"sha256": hexadecimal("our")}},
        {"name": "versions/onnxruntime", "uri": "pkg:pypi/onnxruntime@1.24.1%2Bcpu"},
    ]
    assert run["builder"]["id"] == attest.LOCAL_BUILDER
    assert run["metadata"]["startedOn"] == "2026-01-31T12:00:00.250000Z"
    assert run["metadata"]["finishedOn"] == "2026-01-31T12:01:30.250000Z"
    assert run["metadata"]["llmops_facts"] == {"seconds_of_tool": 61.5}
    assert "llmops_reusedFrom" not in run["metadata"]


def test_provenance_names_the_record_in_the_store(tmp_path: Path) -> None:
    """Who reads a provenance finds what the platform itself wrote down at the time."""
    entry = FolderStore(tmp_path).append("engine", ENGINE.model_dump(mode="json"))
    run = attest.provenance(ENGINE).predicate["runDetails"]
    assert digest_of(canonical_json(entry.record)) == entry.digest
    assert run["metadata"]["invocationId"] == "llmops:record/" + entry.digest[7:]
    assert run["byproducts"][0]["digest"] == {"sha256": entry.digest[7:]}


def test_reuse_changes_no_field_but_its_own() -> None:
    """SLSA: an extension must not alter what another field means. Who ignores ours must read
    of a reused artifact what is true without it."""
    made = attest.provenance(ENGINE)
    reused = attest.provenance(ENGINE.model_copy(update={"reused_from": "parrot.v0"}))
    assert reused.predicate["runDetails"]["metadata"]["llmops_reusedFrom"] == "parrot.v0"
    assert reused.predicate["buildDefinition"] == made.predicate["buildDefinition"]
    assert reused.subject == made.subject


@pytest.mark.parametrize(
    ("source", "of_the_spec", "of_the_engine"),
    [
        ({"commit": COMMIT, "changed": False, "pinned": True}, True, True),
        # The spec is the commit's; code and data are what lies in the folder.
        ({"commit": COMMIT, "changed": False, "pinned": False}, True, False),
        ({"commit": COMMIT, "changed": True, "pinned": False}, False, False),
        ({"commit": None, "changed": False, "pinned": False}, False, False),
    ],
)
def test_a_commit_is_named_only_where_the_bytes_are_its_own(
    source: dict[str, Any], of_the_spec: bool, of_the_engine: bool
) -> None:
    """A commit beside bytes that somebody edited afterwards would be false evidence."""
    spec = SPEC.model_copy(update={"parameters": {**SPEC.parameters, "source": source}})
    for statement, expected in (
        (attest.provenance(spec), of_the_spec),
        (attest.provenance(ENGINE, spec=spec), of_the_engine),
    ):
        found = {"name": "source", "digest": {"gitCommit": COMMIT}} in statement.predicate[
            "buildDefinition"
        ]["resolvedDependencies"]
        assert found is expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"versions": {"image": digest("image"), "tensorrt_llm": "1.2.0", "gpu": "H100"}},
            [
                {"name": "versions/image", "digest": {"sha256": hexadecimal("image")}},
                {"name": "versions/tensorrt_llm", "uri": "pkg:pypi/tensorrt-llm@1.2.0"},
            ],
        ),
        (
            {"versions": {"train": "1", "torch": "absent"}, "parameters": {"code": {"a.py": "x"}}},
            [],
        ),
        (
            {
                "versions": {},
                "parameters": {
                    "code": {"train.py": digest("code")},
                    "harness": [digest("task")],
                    "image": f"registry/image:1@{digest('in a longer text')}",
                },
            },
            [
                {"name": "parameters/code/train.py", "digest": {"sha256": hexadecimal("code")}},
                {"name": "parameters/harness/0", "digest": {"sha256": hexadecimal("task")}},
            ],
        ),
        (
            {"versions": {}, "parameters": {"repository": "org/model", "revision": COMMIT}},
            [
                {
                    "name": "parameters/repository",
                    "uri": f"pkg:huggingface/org/model@{COMMIT}",
                    "digest": {"gitCommit": COMMIT},
                }
            ],
        ),
    ],
)
def test_whatever_the_record_knows_by_digest_or_version_is_a_dependency(
    fields: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    """A leaked dataset or a bad package is traced to releases through these."""
    result = ENGINE.model_copy(update={"inputs": {}, **fields})
    build = attest.provenance(result).predicate["buildDefinition"]
    assert build["resolvedDependencies"] == expected
    for dependency in build["resolvedDependencies"]:
        json_format.ParseDict(dependency, intoto_models.RESOURCE_DESCRIPTOR())


def test_the_packages_of_the_default_toolchain_are_known() -> None:
    """A package that is added to a toolchain must not be missing from the dependencies."""
    assert set(DISTRIBUTIONS) <= attest.DISTRIBUTIONS


@pytest.mark.parametrize("chosen", Decision)
def test_a_test_result_passes_only_what_passed(chosen: Decision) -> None:
    """Readers of `warnedTests` may let a release through; undecided opens no gate."""
    own, test = attest.verdict(VERDICT.model_copy(update={"decision": chosen}))
    passed = chosen is Decision.PASSED
    assert own.predicate["decision"] == chosen.value
    assert test.predicate["result"] == ("PASSED" if passed else "FAILED")
    assert test.predicate["passedTests"] == (["accuracy"] if passed else [])
    assert test.predicate["failedTests"] == ([] if passed else ["accuracy"])
    assert test.predicate["warnedTests"] == []


def test_a_verdict_is_whole_in_its_statement_and_about_the_judged_bytes() -> None:
    """`require` will read verdicts from statements: what is lost here is lost for ever."""
    own, test = attest.verdict(VERDICT)
    assert Verdict.model_validate(own.predicate) == VERDICT
    assert {s.name: s.sha256 for s in own.subject} == VERDICT.subjects
    assert test.subject == own.subject
    assert {d["name"]: d["digest"]["sha256"] for d in test.predicate["configuration"]} == {
        "policy": hexadecimal("policy"),
        "dataset": hexadecimal("evaluation_data"),
        "baseline": hexadecimal("package that serves"),
    }
    alone = VERDICT.model_copy(update={"baseline": NOTHING_SERVES, "dataset": None})
    assert [d["name"] for d in attest.verdict(alone)[1].predicate["configuration"]] == ["policy"]


def test_records_come_back_whole() -> None:
    """Routes, waivers, incidents and decisions are read from statements as well."""
    assert Route.model_validate(attest.route_change(ROUTE).predicate) == ROUTE
    assert WaiverUse.model_validate(attest.waiver_use(USE, VERDICT).predicate) == USE
    assert Incident.model_validate(attest.incident(INCIDENT).predicate) == INCIDENT
    assert RecordedDecision.model_validate(attest.decision(CHOICE).predicate) == CHOICE
    event = attest.lifecycle_event(DEPLOYED).predicate
    assert event["document"] == {"colour": "blue"}
    restored = {**event, "facts": event["document"], "artifact": DEPLOYED.artifact}
    assert Result.model_validate(restored) == DEPLOYED


def test_what_a_statement_is_about() -> None:
    """Auditors search by digest: each event must be found by the bytes that it moved, also
    where two slots hold the same."""
    assert {s.sha256 for s in attest.route_change(ROUTE).subject} == {
        digest("package blue"),
        digest("package green"),
    }
    both = tuple(t.model_copy(update={"package": digest("one")}) for t in ROUTE.targets)
    assert len(attest.route_change(ROUTE.model_copy(update={"targets": both})).subject) == 2
    assert {s.sha256 for s in attest.waiver_use(USE, VERDICT).subject} == set(
        VERDICT.subjects.values()
    )
    assert attest.decision(CHOICE).subject[0].sha256 == CHOICE.package


@pytest.mark.parametrize("kind", ["empty route", "incident"])
def test_an_event_without_an_artifact_is_about_its_own_record(kind: str) -> None:
    """in-toto asks for a subject with a digest; it must be one that a reader can recompute."""
    statement = EVERY_KIND[kind]
    assert [s.sha256 for s in statement.subject] == [digest_of(canonical_json(statement.predicate))]


def test_a_summary_claims_what_was_verified() -> None:
    """A refusal must never read as a level, and no level is claimed without a provenance."""
    said = summary().predicate
    assert said["resourceUri"] == "llmops:production/parrot/parrot.v1"
    assert said["policy"] == {
        "uri": "llmops:policy/production",
        "digest": {"sha256": hexadecimal("policy")},
    }
    assert [a["digest"]["sha256"] for a in said["inputAttestations"]] == [
        hexadecimal(name) for name in ("verdict 1", "verdict 2", "provenance")
    ]
    assert (said["verificationResult"], said["verifiedLevels"]) == (
        "PASSED",
        ["SLSA_BUILD_LEVEL_1"],
    )
    assert summary(provenance=None).predicate["verifiedLevels"] == ["SLSA_BUILD_LEVEL_UNEVALUATED"]
    refused = summary(passed=False).predicate
    assert (refused["verificationResult"], refused["verifiedLevels"]) == ("FAILED", ["FAILED"])


def test_times_are_those_of_the_clock_in_utc() -> None:
    """in-toto's Timestamp is RFC 3339 with Z; a time with another offset is the same moment."""
    elsewhere = STARTED.astimezone(timezone(timedelta(hours=5, minutes=30)))
    result = ENGINE.model_copy(update={"started": elsewhere})
    metadata = attest.provenance(result).predicate["runDetails"]["metadata"]
    assert metadata["startedOn"] == "2026-01-31T12:00:00.250000Z"


@given(name=st.text(min_size=1), version=st.text())
@settings(max_examples=60, deadline=None)
def test_odd_names_break_nothing(name: str, version: str) -> None:
    """Names come from specs, git and people. Whatever they are, a statement stays readable and
    a URI has only characters that URIs have."""
    result = ENGINE.model_copy(
        update={
            "asset": name,
            "release": name,
            "inputs": {name: digest("input")},
            "parameters": {name: {name: digest("parameter")}},
            "versions": {name: version, "torch": version},
        }
    )
    made = attest.provenance(result, spec=SPEC)
    decided = attest.verification_summary(
        release=name,
        model=name,
        package=digest("package"),
        environment="production",
        attestations=[],
        provenance=None,
        policy=digest("policy"),
        passed=True,
        time=STARTED,
    )
    for statement in (
        made,
        decided,
        attest.lifecycle_event(result),
        *attest.verdict(VERDICT.model_copy(update={"gate": name, "subjects": {name: digest("")}})),
        attest.incident(INCIDENT.model_copy(update={"what": name, "actor": name})),
        attest.decision(CHOICE.model_copy(update={"approver": name, "reason": version})),
    ):
        assert Statement.parse(statement.payload()) == statement
        json_format.Parse(statement.payload(), intoto_models.STATEMENT())
    dependencies = made.predicate["buildDefinition"]["resolvedDependencies"]
    uris = [decided.predicate["resourceUri"], *(d["uri"] for d in dependencies if "uri" in d)]
    for uri in uris:
        assert uri.isascii()
        assert not set(uri) & set(' "<>\\^`{|}#?')
    assert decided.predicate["resourceUri"].count("/") == 2


def test_nothing_of_the_process_or_the_machine_is_told(tmp_path: Path) -> None:
    """Statements are exported. What they hold comes from the records alone: the environment,
    with its secrets, the user and the host are in none."""
    secret = "correct-horse-battery-staple"
    script = (
        "import sys\n"
        "from llmops_assets_tests.evidence.test_attest import EVERY_KIND\n"
        "sys.stdout.buffer.write(b'\\n'.join(s.payload() for s in EVERY_KIND.values()))\n"
    )
    home = tmp_path / "home-of-somebody"
    home.mkdir()
    told = subprocess.run(
        [sys.executable, "-c", script],
        env={
            **os.environ,
            "LLMOPS_WEBHOOK_SECRET": secret,
            "LLMOPS_STATE": str(home / "state"),
            "AWS_SECRET_ACCESS_KEY": secret,
            "USER": "somebody",
            "LOGNAME": "somebody",
            "HOME": str(home),
        },
        check=True,
        capture_output=True,
        timeout=60,
    ).stdout
    here = b"\n".join(statement.payload() for statement in EVERY_KIND.values())
    assert told == here
    for private in (secret, "somebody", str(tmp_path), socket.gethostname(), str(Path.cwd())):
        assert private.encode() not in told
    # "root" is a word too; any other name is nobody's business.
    assert getpass.getuser() == "root" or getpass.getuser().encode() not in told


def test_extensions_are_named_as_slsa_asks() -> None:
    """`<vendor>_<field>`: no other underscore may be in a name of a standard predicate."""
    for statement in EVERY_KIND.values():
        if statement.predicate_type == types.PROVENANCE:
            run = statement.predicate["runDetails"]
            build = statement.predicate["buildDefinition"]
            names = {*statement.predicate, *build, *run, *run["metadata"], *run["builder"]}
            extensions = {name for name in names if "_" in name}
            assert extensions <= {"llmops_facts", "llmops_reusedFrom"}


def test_importing_it_imports_no_orchestrator() -> None:
    """A verifier reads statements offline, without Dagster and without a model's tools."""
    heavy = ("dagster", "mlflow", "torch", "model_signing", "sigstore", "transformers")
    script = (
        "import json, sys, llmops_assets.evidence.attest\n"
        "json.dump(sorted(sys.modules), sys.stdout)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, timeout=60, text=True
    )
    assert not set(heavy) & {name.partition(".")[0] for name in json.loads(run.stdout)}
