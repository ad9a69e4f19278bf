"""Lineage for others: the evidence log as OpenLineage run events.

One event for each artifact that was made and each event of a release's life, in the order
of the log. By the OpenLineage specification 2-0-2 (https://openlineage.io/spec/2-0-2/OpenLineage.json):
a job is an asset of a model, a dataset what that asset publishes, its version the artifact's
digest. The evidence is in the log; what a server shows of it is for looking around.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from llmops_assets import __version__
from llmops_assets.errors import TriggerError
from llmops_assets.evidence.statements import LIFECYCLE_EVENT, PROVENANCE, SHA256
from llmops_assets.release import Release

if TYPE_CHECKING:
    from llmops_assets.evidence.leaves import Entry
    from llmops_assets.evidence.log import EvidenceLog

RunEvent = dict[str, Any]
"""A JSON object."""

NAMESPACE = "llmops-assets"
"""Of jobs and datasets. Names below it begin with the model."""
PRODUCER = f"https://llmops-assets.dev/producer/{__version__}"
SCHEMA = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/definitions/RunEvent"
VERSION_FACET = (
    "https://openlineage.io/spec/facets/1-0-1/DatasetVersionDatasetFacet.json"
    "#/$defs/DatasetVersionDatasetFacet"
)
EVIDENCE_FACET = "https://llmops-assets.dev/openlineage/evidence-run-facet/v1"
"""Identifies our own facet; like the types of predicates it is not fetched."""
RUNS = uuid.uuid5(uuid.NAMESPACE_URL, "https://llmops-assets.dev/openlineage/runs")

ENDPOINT = "/api/v1/lineage"
LONGEST_COMPLAINT = 500


@dataclass(frozen=True)
class Followed:
    """How far the log was followed.

    Attributes:
        following: place in the log of the next entry to look at.
        sent: number of events that the server took.
        problem: why it stopped before the end; None if it did not, or ran out of time.
    """

    following: int
    sent: int
    problem: TriggerError | None


def follow(
    evidence: EvidenceLog, start: int, url: str, timeout_seconds: float, longest_seconds: float
) -> Followed:
    """Sends what was appended to the log from a place on.

    Whatever was not taken is sent again by the next call that starts where this one ended;
    an event that is sent twice names the same run.

    Args:
        evidence: the log.
        start: place of the first entry.
        url: of the OpenLineage server, without the path of the call.
        timeout_seconds: limit of one call.
        longest_seconds: when to leave the rest to the next call.

    Raises:
        EvidenceError: an entry is missing, changed, or not signed by a trusted key.
    """
    following, sent = start, 0
    deadline = time.monotonic() + longest_seconds
    with httpx.Client(timeout=timeout_seconds) as client:
        for entry in evidence.since(start):
            event = run_event(entry)
            if event is not None:
                try:
                    send(client, url, event)
                except TriggerError as error:
                    return Followed(following, sent, error)
                sent += 1
            following = entry.sequence + 1
            if time.monotonic() > deadline:
                break
    return Followed(following, sent, None)


def send(client: httpx.Client, url: str, event: RunEvent) -> None:
    """Gives an event to an OpenLineage server.

    Raises:
        TriggerError: it does not answer, or does not take the event.
    """
    try:
        answer = client.post(url.rstrip("/") + ENDPOINT, json=event)
        found = f"status {answer.status_code}: {answer.text[:LONGEST_COMPLAINT]}"
        taken = answer.is_success
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        taken, found = False, f"{type(error).__name__}: {error}"
    if not taken:
        raise TriggerError(
            f"The OpenLineage server did not take the event of run {event['run']['runId']}",
            expected=f"status 200 or 201 of POST {ENDPOINT} at LLMOPS_OPENLINEAGE_URL",
            found=found,
            cure="mend the server or the address; the event is sent again until it is taken. "
            "Unset LLMOPS_OPENLINEAGE_URL to send none",
        )


def run_event(entry: Entry) -> RunEvent | None:
    """The event of an entry; None where nothing was made and nothing happened to a release.

    It is always one COMPLETE: the log has what ended, and failed steps leave none.
    """
    predicate = entry.statement.predicate
    match entry.statement.predicate_type:
        case predicate_type if predicate_type == PROVENANCE:
            definition, details = predicate["buildDefinition"], predicate["runDetails"]
            release = definition["externalParameters"]["release"]
            inputs = dict(_artifacts(definition["resolvedDependencies"]))
            finished = details["metadata"]["finishedOn"]
            more = {"reusedFrom": details["metadata"].get("llmops_reusedFrom")}
        case predicate_type if predicate_type == LIFECYCLE_EVENT:
            release, inputs = predicate["release"], predicate["inputs"]
            finished, more = predicate["finished"], {"reusedFrom": None}
        case _:
            return None
    (made,) = entry.statement.subject
    model = Release.parse(release).model
    evidence = {
        "release": release,
        "sequence": entry.sequence,
        "leaf": entry.digest,
        "statement": entry.leaf.statement,
        "predicateType": entry.statement.predicate_type,
        **more,
    }
    return {
        "eventType": "COMPLETE",
        "eventTime": finished,
        "producer": PRODUCER,
        "schemaURL": SCHEMA,
        "run": {
            # An entry is appended once; so its event has one id, however often it is sent.
            "runId": str(uuid.uuid5(RUNS, entry.digest)),
            "facets": {"llmops_evidence": _facet(EVIDENCE_FACET, evidence)},
        },
        "job": {"namespace": NAMESPACE, "name": f"{model}.{made.name}"},
        "inputs": [_dataset(model, asset, digest) for asset, digest in sorted(inputs.items())],
        "outputs": [_dataset(model, made.name, made.sha256)],
    }


def _artifacts(dependencies: list[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Those dependencies that assets published, as asset and digest."""
    for dependency in dependencies:
        digest = dependency.get("digest", {})
        # Files and packages are named by their path in the record, such as versions/torch.
        if SHA256 in digest and "/" not in dependency["name"]:
            yield dependency["name"], f"{SHA256}:{digest[SHA256]}"


def _dataset(model: str, asset: str, digest: str) -> dict[str, Any]:
    version = _facet(VERSION_FACET, {"datasetVersion": digest})
    return {"namespace": NAMESPACE, "name": f"{model}/{asset}", "facets": {"version": version}}


def _facet(schema: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"_producer": PRODUCER, "_schemaURL": schema, **fields}
