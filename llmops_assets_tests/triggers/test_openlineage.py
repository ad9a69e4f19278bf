"""What an OpenLineage server is told of the evidence log, and that an outage loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import dagster as dg
import pytest
from dagster import DagsterInstance
from jsonschema import Draft202012Validator, FormatChecker, ValidationError

from llmops_assets.errors import TriggerError
from llmops_assets.evidence.statements import LIFECYCLE_EVENT, PROVENANCE
from llmops_assets.reports.openlineage import RunEvent, run_event
from llmops_assets.settings import Settings
from llmops_assets.triggers.openlineage import OpenLineageCursor, openlineage

from ..conftest import free_port
from ..fakes import HttpDouble
from ..release_rig import MODEL, PlatformOnDoubles, Rig, deploy

pytestmark = pytest.mark.timeout(60)
RELEASE = "parrot.v1"

FACET = {
    "type": "object",
    "required": ["_producer", "_schemaURL"],
    "properties": {"_producer": {"format": "uri"}, "_schemaURL": {"format": "uri"}},
}
NAMED: dict[str, Any] = {
    "type": "object",
    "required": ["namespace", "name"],
    "properties": {
        "namespace": {"type": "string", "minLength": 1},
        "name": {"type": "string", "minLength": 1},
        "facets": {"type": "object", "additionalProperties": FACET},
    },
}
RUN_EVENT = Draft202012Validator(
    {
        "type": "object",
        "required": ["eventTime", "producer", "schemaURL", "run", "job"],
        "properties": {
            "eventTime": {"type": "string", "format": "date-time"},
            "eventType": {"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
            "producer": {"type": "string", "format": "uri"},
            "schemaURL": {"type": "string", "format": "uri"},
            "run": {
                "type": "object",
                "required": ["runId"],
                "properties": {
                    "runId": {"type": "string", "format": "uuid"},
                    "facets": {"type": "object", "additionalProperties": FACET},
                },
            },
            "job": NAMED,
            "inputs": {"type": "array", "items": NAMED},
            "outputs": {"type": "array", "items": NAMED},
        },
    },
    format_checker=FormatChecker(),
)
"""What the OpenLineage specification 2-0-2 demands of a run event, in our own words."""


class Server(HttpDouble):
    """A double of an OpenLineage server, which is down as long as a test wants it to be."""

    def __init__(self) -> None:
        self.taken: list[RunEvent] = []
        self.takes = 10**6
        """How many more events it takes before it is down."""
        super().__init__(self._receive)

    def _receive(self, path: str, event: RunEvent) -> tuple[int, Any]:
        assert path == "/api/v1/lineage"
        if self.takes == 0:
            return 503, {"message": "database is down"}
        self.takes -= 1
        self.taken.append(event)
        return 201, {}

    @property
    def runs(self) -> list[str]:
        return [event["run"]["runId"] for event in self.taken]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A release that was built and deployed: provenance, events, verdicts and a route."""
    rig = Rig(tmp_path_factory.mktemp("openlineage") / "rig")
    rig.build(RELEASE, 1)
    deploy(rig, 1)
    yield rig
    rig.close()


def told(rig: Rig, url: str | None) -> PlatformOnDoubles:
    """The rig's platform with the setting."""
    settings = rig.platform.settings.model_dump() | {"openlineage_url": url}
    return PlatformOnDoubles(Settings.model_validate(settings))


def tick(rig: Rig, url: str | None, cursor: str | None = None) -> str | None:
    """One tick; returns the cursor that it leaves."""
    with DagsterInstance.ephemeral() as instance:
        context = dg.build_sensor_context(
            instance=instance, cursor=cursor, resources={"platform": told(rig, url)}
        )
        result = openlineage(context)
    assert isinstance(result, dg.SensorResult | dg.SkipReason)
    return result.cursor if isinstance(result, dg.SensorResult) else cursor


def expected_runs(rig: Rig) -> list[str]:
    """Every entry that is about something made or something that happened, in order."""
    events = (run_event(entry) for entry in rig.platform.evidence.since(0))
    return [event["run"]["runId"] for event in events if event is not None]


def test_every_event_is_one_by_the_specification(released: Rig, server: Server) -> None:
    """Another one is refused by servers, and would hold up all that follow."""
    tick(released, server.url)
    assert len(server.taken) >= 10
    for event in server.taken:
        RUN_EVENT.validate(event)
    with pytest.raises(ValidationError, match="required"):
        RUN_EVENT.validate({**server.taken[0], "run": {}})


def test_events_are_the_logs_entries_in_order(released: Rig, server: Server) -> None:
    """One for each provenance and lifecycle event, and none for verdicts and routes."""
    tick(released, server.url)
    entries = [
        entry
        for entry in released.platform.evidence.since(0)
        if entry.statement.predicate_type in (PROVENANCE, LIFECYCLE_EVENT)
    ]
    facets = [event["run"]["facets"]["llmops_evidence"] for event in server.taken]
    assert [facet["sequence"] for facet in facets] == [entry.sequence for entry in entries]
    assert [facet["leaf"] for facet in facets] == [entry.digest for entry in entries]
    assert len(set(server.runs)) == len(server.runs)
    assert all(UUID(run).version == 5 for run in server.runs)


def test_datasets_are_assets_with_digests(released: Rig, server: Server) -> None:
    """What joins one event to the next: name and version of what was read and made."""
    tick(released, server.url)
    by_job = {
        event["job"]["name"]: event
        for event in server.taken
        if event["run"]["facets"]["llmops_evidence"]["release"] == RELEASE
    }
    column = released.platform.column(RELEASE)
    event = by_job[f"{MODEL}.evaluation"]
    (made,) = event["outputs"]
    assert made["name"] == f"{MODEL}/evaluation"
    assert made["facets"]["version"]["datasetVersion"] == column["evaluation"].digest
    read = {each["name"]: each["facets"]["version"]["datasetVersion"] for each in event["inputs"]}
    assert read == {
        f"{MODEL}/{asset}": column[asset].digest
        for asset in ("model_spec", "checkpoint", "evaluation_data")
    }
    assert by_job[f"{MODEL}.registered_model"]["outputs"][0]["facets"]["version"][
        "datasetVersion"
    ] == column["registered_model"].digest  # fmt: skip


def test_next_tick_sends_what_is_new_only(released: Rig, server: Server) -> None:
    """The log grows for years; the cursor is where the last tick ended."""
    cursor = tick(released, server.url)
    first = len(server.taken)
    cursor = tick(released, server.url, cursor)
    assert len(server.taken) == first
    released.freeze("parrot.v2")
    released.publish("parrot.v2", "engine", {"a": "2"})
    tick(released, server.url, cursor)
    new = server.taken[first:]
    assert new
    assert {e["run"]["facets"]["llmops_evidence"]["release"] for e in new} == {"parrot.v2"}
    assert server.runs == expected_runs(released)


def test_outage_fails_the_tick_and_loses_nothing(released: Rig, server: Server) -> None:
    """Down from the start, down in the middle, and gone: then all of it, in order, once."""
    with pytest.raises(TriggerError, match=r"LLMOPS_OPENLINEAGE_URL.*ConnectError"):
        tick(released, f"http://127.0.0.1:{free_port()}")
    server.takes = 4
    cursor = tick(released, server.url)
    assert len(server.taken) == 4
    with pytest.raises(TriggerError, match=r"503.*database is down"):
        tick(released, server.url, cursor)
    server.takes = 10**6
    tick(released, server.url, cursor)
    assert server.runs == expected_runs(released)


def test_event_that_is_sent_again_names_the_same_run(released: Rig, server: Server) -> None:
    """A tick may die after the server took an event and before Dagster kept the cursor."""
    tick(released, server.url)
    first = list(server.taken)
    tick(released, server.url)
    assert server.taken == [*first, *first]


def test_nothing_is_sent_unless_asked_for(released: Rig, server: Server) -> None:
    """What is made here is nobody else's business by default."""
    assert tick(released, None) is None
    assert server.taken == []


def test_tick_ends_in_time_and_the_next_goes_on(
    released: Rig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server told of years for the first time; Dagster ends a tick after a minute."""
    monkeypatch.setattr("llmops_assets.triggers.openlineage.LONGEST_SECONDS", 0.0)
    size = released.platform.evidence.checkpoint().size
    cursor = OpenLineageCursor(following=size - 5).to_json()
    for looked_at in range(1, 6):
        cursor = tick(released, server.url, cursor)
        assert OpenLineageCursor.from_json(cursor) == OpenLineageCursor(
            following=size - 5 + looked_at
        )
    assert tick(released, server.url, cursor) == cursor
