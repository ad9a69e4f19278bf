"""From the platform's own records to Statements: pure functions, one for each kind of event.

Standard predicates are filled as their specifications say (SLSA Provenance v1 and
Verification Summary v1, in-toto Test Result v0.1); the platform's own hold the record as it
is. docs/predicates.md documents every field, and is what the URIs below stand for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from llmops_assets import __version__
from llmops_assets.evidence.statements import (
    ANCHOR,
    APPROVAL,
    APPROVERS,
    APPROVERS_CHANGE,
    AUDIT_EXPORT,
    DECISION,
    GATE_VERDICT,
    INCIDENT,
    INCIDENT_NOTE,
    LIFECYCLE_EVENT,
    PROVENANCE,
    REVOCATION,
    ROUTE_CHANGE,
    SETTINGS_CHANGE,
    SHA256,
    TEST_RESULT,
    VERIFICATION_SUMMARY,
    WAIVER_USE,
    Statement,
    Subject,
    subject,
)
from llmops_assets.storage.store import DIGEST, canonical_json, check_digest, digest_of

if TYPE_CHECKING:
    from pydantic import BaseModel

    from llmops_assets.deploy.accepted_approvers import AcceptedPolicy, PolicyChangeApproval
    from llmops_assets.deploy.approval import RecordedDecision
    from llmops_assets.deploy.revocation import Revocation
    from llmops_assets.deploy.signed_decision import SignedDecision
    from llmops_assets.evidence.verdicts import Verdict, WaiverUse
    from llmops_assets.operate.incidents import Incident, Note
    from llmops_assets.operate.settings_changes import SettingsChange
    from llmops_assets.serving.routes import Route
    from llmops_assets.storage.columns import Result

BUILD_TYPE = "https://llmops-assets.dev/build-type/asset/v1"
"""How `Columns.produce` makes an artifact, see docs/predicates.md."""
LOCAL_BUILDER = "https://llmops-assets.dev/builder/local/v1"
"""The platform on machines of its operator, tools and platform under one user: SLSA Build L1."""
VERIFIER = "https://llmops-assets.dev/verifier/v1"
"""What decides whether a release goes on: `verdicts.require`."""
SLSA_VERSION = "1.1"
"""The specification that the predicates of SLSA are filled by."""

MODEL_SPEC = "model_spec"
PACKAGE = "packaged_model"
APPROVERS_FILE = "approvers.yaml"
"""The policy of who may approve; in the folder of specs, and no spec."""

ResourceDescriptor = dict[str, Any]
"""A JSON object by in-toto's ResourceDescriptor v1."""
AnchorKind = Literal["git-ref", "time-stamp"]

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

# `Result.versions` mixes distributions with numbers of our own steps, architectures and GPUs.
DISTRIBUTIONS = frozenset(
    {
        "babel",
        "cyclonedx-python-lib",
        "detect-secrets",
        "fickling",
        "onnx",
        "onnx-ir",
        "onnxruntime",
        "onnxruntime-genai",
        "presidio-analyzer",
        "pyarrow",
        "tensorrt",
        "tensorrt_llm",
        "tokenizers",
        "torch",
        "transformers",
    }
)
"""Names in `Result.versions` that stand for packages of the Python Package Index."""


@dataclass(frozen=True)
class Builder:
    """Who is trusted to have run the tools and to have said so truly.

    Platforms that differ in what protects them need different ids, see SLSA's `builder.id`.
    """

    id: str = LOCAL_BUILDER
    version: Mapping[str, str] = field(default_factory=lambda: {"llmops-assets": __version__})
    """Version of each component of the platform, by name."""


def provenance(
    result: Result, *, builder: Builder | None = None, spec: Result | None = None
) -> Statement:
    """How an artifact came to be: SLSA Provenance v1.

    Args:
        result: of an asset that `Columns.produce` made or reused.
        builder: the platform that ran it; None for this one on its operator's machines.
        spec: what `model_spec` published in the release. It leads from the parameters to the
            commit; without it that link is missing.
    """
    builder = builder or Builder()
    record = digest_of(canonical_json(result.model_dump(mode="json")))
    metadata: dict[str, Any] = {
        "invocationId": f"llmops:record/{check_digest(record)}",
        "startedOn": _timestamp(result.started),
        "finishedOn": _timestamp(result.finished),
        "llmops_facts": result.model_dump(mode="json")["facts"],
    }
    if result.reused_from is not None:
        metadata["llmops_reusedFrom"] = result.reused_from
    return Statement(
        subject=(subject(result.asset, result.artifact),),
        predicate_type=PROVENANCE,
        predicate={
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "release": result.release,
                    "asset": result.asset,
                    "parameters": result.model_dump(mode="json")["parameters"],
                },
                "internalParameters": {
                    "action": result.action,
                    "mediaType": result.media_type,
                    "versions": dict(result.versions),
                },
                "resolvedDependencies": [*_sources(result, spec), *_dependencies(result)],
            },
            "runDetails": {
                "builder": {"id": builder.id, "version": dict(builder.version)},
                "metadata": metadata,
                "byproducts": [
                    {**_artifact("result", record), "mediaType": "application/json"},
                ],
            },
        },
    )


def verdict(judged: Verdict) -> tuple[Statement, Statement]:
    """What a gate found: the whole verdict, and in-toto's Test Result v0.1 beside it.

    Test Result has no word for "undecided". It becomes FAILED, as it opens no gate: WARNED
    is for tests that passed, and its readers may let such releases through.
    """
    subjects = _subjects(judged.subjects)
    configuration = [_artifact("policy", judged.policy)]
    if judged.dataset is not None:
        configuration.append(_artifact("dataset", judged.dataset))
    if judged.baseline is not None and DIGEST.fullmatch(judged.baseline):
        configuration.append(_artifact("baseline", judged.baseline))
    test = {
        "result": "PASSED" if judged.passed else "FAILED",
        "configuration": configuration,
        "passedTests": [judged.gate] if judged.passed else [],
        "warnedTests": [],
        "failedTests": [] if judged.passed else [judged.gate],
    }
    return (
        Statement(subject=subjects, predicate_type=GATE_VERDICT, predicate=_json(judged)),
        Statement(subject=subjects, predicate_type=TEST_RESULT, predicate=test),
    )


def waiver_use(use: WaiverUse, waived: Verdict) -> Statement:
    """A release went on though a gate had not passed.

    Args:
        waived: the verdict that did not pass; its artifacts are what went on.
    """
    return Statement(
        subject=_subjects(waived.subjects), predicate_type=WAIVER_USE, predicate=_json(use)
    )


def lifecycle_event(result: Result) -> Statement:
    """Something that happened to a release, as `Columns.record` published it.

    Deployments, approvals, service metrics, archives and removals are such events.
    """
    record = result.model_dump(mode="json")
    return Statement(
        subject=(subject(result.asset, result.artifact),),
        predicate_type=LIFECYCLE_EVENT,
        predicate={
            "asset": result.asset,
            "release": result.release,
            "media_type": result.media_type,
            "action": result.action,
            "inputs": record["inputs"],
            "parameters": record["parameters"],
            "versions": record["versions"],
            "document": record["facts"],
            "started": record["started"],
            "finished": record["finished"],
            "record": digest_of(canonical_json(record)),
        },
    )


def route_change(route: Route) -> Statement:
    """A model's traffic goes elsewhere; about the packages in the slots of the new route."""
    predicate = _json(route)
    packages = {
        f"{PACKAGE}/{place}/{target.colour}": target.package
        for place, target in enumerate(route.targets)
    }
    return Statement(
        subject=_subjects(packages) or _itself("route", predicate),
        predicate_type=ROUTE_CHANGE,
        predicate=predicate,
    )


def incident(reported: Incident) -> Statement:
    """Something went wrong with what serves, or somebody did something about it.

    Without its notes, which are statements of their own.
    """
    predicate = reported.model_dump(mode="json", exclude={"notes"})
    return Statement(
        subject=_itself("incident", predicate), predicate_type=INCIDENT, predicate=predicate
    )


def incident_note(note: Note) -> Statement:
    """What a person said of an incident, or that it is over."""
    predicate = _json(note)
    return Statement(
        subject=_itself("incident-note", predicate),
        predicate_type=INCIDENT_NOTE,
        predicate=predicate,
    )


def settings_change(change: SettingsChange) -> Statement:
    """The installation was started with other settings than before."""
    predicate = _json(change)
    return Statement(
        subject=_itself("settings", predicate), predicate_type=SETTINGS_CHANGE, predicate=predicate
    )


def decision(recorded: RecordedDecision) -> Statement:
    """A human approval or rejection of a package, before anybody checked whether it counts.

    What the approver signed is inside, so that the log has both signatures.
    """
    return Statement(
        subject=(subject(PACKAGE, recorded.package),),
        predicate_type=DECISION,
        predicate=_json(recorded),
    )


def approval(decided: SignedDecision) -> Statement:
    """A human approval or rejection as the approver signs it."""
    return Statement(
        subject=(subject(PACKAGE, decided.package),),
        predicate_type=APPROVAL,
        predicate=_json(decided),
    )


def revocation(revoked: Revocation) -> Statement:
    """What approved a package before counts no more."""
    return Statement(
        subject=(subject(PACKAGE, revoked.package),),
        predicate_type=REVOCATION,
        predicate=_json(revoked),
    )


def approvers(accepted: AcceptedPolicy) -> Statement:
    """The policy of who may approve was taken over, with the signatures of who agreed."""
    return Statement(
        subject=(subject(APPROVERS_FILE, accepted.digest),),
        predicate_type=APPROVERS,
        predicate=_json(accepted),
    )


def approvers_change(agreed: PolicyChangeApproval) -> Statement:
    """An approver agrees to a version of that policy, as the approver signs it."""
    return Statement(
        subject=(subject(APPROVERS_FILE, agreed.digest),),
        predicate_type=APPROVERS_CHANGE,
        predicate=_json(agreed),
    )


def verification_summary(
    *,
    release: str,
    model: str,
    package: str,
    environment: str,
    attestations: Iterable[str],
    provenance: str | None,
    policy: str,
    passed: bool,
    time: datetime,
) -> Statement:
    """Whether a package may be deployed: SLSA Verification Summary v1.

    Args:
        package: digest of the packaged model.
        environment: where to, such as `production`.
        attestations: digests of the envelopes, in the store, of all that the decision rests
            on: verdicts, uses of waivers, the approval.
        provenance: digest of the envelope of the package's provenance, if that was verified.
            Without it no SLSA level is claimed.
        policy: digest of everything that the package was held against.
        passed: whether it may be deployed.
        time: of the decision.
    """
    rests_on = [*attestations, *([] if provenance is None else [provenance])]
    level = "SLSA_BUILD_LEVEL_UNEVALUATED" if provenance is None else "SLSA_BUILD_LEVEL_1"
    return Statement(
        subject=(subject(PACKAGE, package),),
        predicate_type=VERIFICATION_SUMMARY,
        predicate={
            "verifier": {"id": VERIFIER, "version": {"llmops-assets": __version__}},
            "timeVerified": _timestamp(time),
            "resourceUri": _uri(environment, model, release),
            "policy": {"uri": _uri("policy", environment), "digest": _digest_set(policy)},
            "inputAttestations": [
                {"uri": f"llmops:record/{check_digest(digest)}", "digest": _digest_set(digest)}
                for digest in dict.fromkeys(rests_on)
            ],
            "verificationResult": "PASSED" if passed else "FAILED",
            "verifiedLevels": [level if passed else "FAILED"],
            "slsaVersion": SLSA_VERSION,
        },
    )


def audit_export(
    *,
    chains: Mapping[str, tuple[int, str | None]],
    documents: Mapping[str, str],
    actor: str,
    time: datetime,
) -> Statement:
    """Somebody took evidence out of the installation.

    It is appended before the bundle is written, as the last entry of each of its releases:
    so whoever has the bundle can prove that it holds all that there was.

    Args:
        chains: of each chain in the bundle, the number of its entries before this one, and
            the digest of the last; None for an empty chain.
        documents: digest of each file in the bundle that is no part of the log, by its name.
        actor: who did.
    """
    return Statement(
        subject=_subjects(documents),
        predicate_type=AUDIT_EXPORT,
        predicate={
            "chains": {
                chain: {"entries": entries, "head": head}
                for chain, (entries, head) in chains.items()
            },
            "actor": actor,
            "time": _timestamp(time),
        },
    )


def anchor(
    *, kind: AnchorKind, place: str, proof: str | None, checkpoint: str, size: int, time: datetime
) -> Statement:
    """A checkpoint was put where whoever writes the store cannot take it back.

    Args:
        kind: what holds it.
        place: where, such as a git ref or the URL of a time stamping authority.
        proof: what the place gave for it, such as a time stamp token in base64; None for
            places that are looked at themselves.
        checkpoint: digest of the checkpoint's envelope.
        size: number of log entries that it covers.
    """
    return Statement(
        subject=(subject("checkpoint", checkpoint),),
        predicate_type=ANCHOR,
        predicate={
            "kind": kind,
            "place": place,
            "proof": proof,
            "size": size,
            "time": _timestamp(time),
        },
    )


def _sources(result: Result, spec: Result | None) -> Iterator[ResourceDescriptor]:
    """The frozen spec, and the commit where the bytes in hand are surely those of it."""
    own = result.asset == MODEL_SPEC
    frozen = result if own else spec
    if frozen is None:
        return
    if not own:
        yield _artifact(MODEL_SPEC, frozen.artifact)
    source = frozen.parameters.get("source")
    if not isinstance(source, dict) or source.get("commit") is None:
        return
    # Code and data are those of the commit only if the release was asked for at it.
    if source.get("pinned") or (own and not source.get("changed")):
        yield {"name": "source", "digest": {"gitCommit": source["commit"]}}


def _dependencies(result: Result) -> Iterator[ResourceDescriptor]:
    """Everything that the step is known to have used, by where its record names it."""
    for asset, digest in result.inputs.items():
        yield _artifact(asset, digest)
    for name, digest in _digests("parameters", result.parameters):
        # A spec that is frozen names what later steps will use.
        if result.asset != MODEL_SPEC:
            yield _artifact(name, digest)
    if model := _hugging_face(result.parameters):
        yield model
    for name, digest in _digests("versions", result.versions):
        yield _artifact(name, digest)
    for name, version in result.versions.items():
        if name in DISTRIBUTIONS and version != "absent":
            package = name.lower().replace("_", "-")
            yield {"name": f"versions/{name}", "uri": f"pkg:pypi/{package}@{_quoted(version)}"}


def _hugging_face(parameters: Mapping[str, Any]) -> ResourceDescriptor | None:
    """What weights from the Hugging Face Hub were taken from, as a package URL."""
    repository, revision = parameters.get("repository"), parameters.get("revision")
    if not isinstance(repository, str) or not isinstance(revision, str):
        return None
    found: ResourceDescriptor = {
        "name": "parameters/repository",
        "uri": f"pkg:huggingface/{quote(repository)}@{_quoted(revision)}",
    }
    if _COMMIT.fullmatch(revision):
        found["digest"] = {"gitCommit": revision}
    return found


def _digests(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Digests among nested JSON values, each with its path."""
    if isinstance(value, str) and DIGEST.fullmatch(value):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _digests(f"{name}/{key}", inner)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _digests(f"{name}/{place}", inner)


def _artifact(name: str, digest: str) -> ResourceDescriptor:
    return {"name": name, "digest": _digest_set(digest)}


def _digest_set(digest: str) -> dict[str, str]:
    return {SHA256: check_digest(digest)}


def _subjects(digests: Mapping[str, str]) -> tuple[Subject, ...]:
    return tuple(subject(name, digest) for name, digest in digests.items())


def _itself(kind: str, predicate: Mapping[str, Any]) -> tuple[Subject, ...]:
    """The record as the subject, where there is no artifact: in-toto asks for one."""
    return (subject(kind, digest_of(canonical_json(predicate))),)


def _json(record: BaseModel) -> dict[str, Any]:
    return record.model_dump(mode="json")


def _timestamp(time: datetime) -> str:
    """RFC 3339 in UTC with Z, as in-toto's Timestamp asks for."""
    return time.astimezone(UTC).isoformat().removesuffix("+00:00") + "Z"


def _uri(*segments: str) -> str:
    """One of the platform's own resources; unlike names, a URI has few characters (RFC 3986)."""
    return "llmops:" + "/".join(_quoted(segment) for segment in segments)


def _quoted(segment: str) -> str:
    return quote(segment, safe="")
