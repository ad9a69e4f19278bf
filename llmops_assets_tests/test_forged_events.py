"""Dagster's web server believes whoever reaches it; no decision of the platform may.

A real web server takes reports that never happened, through each of its doors. What is
looked at before and after is everything that the platform decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg
import pytest
from click.testing import CliRunner
from dagster import DagsterInstance
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus
from graphql import (
    GraphQLField,
    get_named_type,
    is_enum_type,
    is_input_object_type,
    is_leaf_type,
    is_list_type,
    is_non_null_type,
)

from llmops_assets.cli import main
from llmops_assets.errors import GateRefusedError
from llmops_assets.evidence.gates import ACCURACY, APPROVED, BUILT, FAIRNESS, PROVEN, STAGED, Gate
from llmops_assets.partitions import RELEASES
from llmops_assets.serving.slots import Environment
from llmops_assets.settings import get_settings

from .dagster_rig import (
    LAUNCH,
    SELECTOR,
    DagsterServers,
    WebServer,
    dagster_servers,
    materializations,
    run_of,
)
from .release_rig import FAILED, MODEL, PASSED, Rig, deploy, serving
from .test_reporting import Runs, description, failures, materialized

pytestmark = pytest.mark.timeout(120)
SERVES = "parrot.v1"
REFUSED = "parrot.v2"
"""A release that failed two gates."""
GOOD = "parrot.v3"
"""A release whose gates all passed, and that went nowhere yet."""
OTHER = "sha256:" + "f" * 64
DECIDE_FOR = (BUILT, STAGED, APPROVED, PROVEN)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterServers]:
    """Web servers of a platform on which one release serves and one was refused."""
    with dagster_servers(tmp_path_factory.mktemp("forged")) as servers:
        for version, release in enumerate((SERVES, REFUSED, GOOD), start=1):
            servers.rig.build(release, version)
        deploy(servers.rig, 1)
        for release in (REFUSED, GOOD):  # beside what serves now
            servers.rig.judge(release, BUILT, PASSED)
        servers.rig.judge(REFUSED, (ACCURACY, FAIRNESS), FAILED)
        yield servers


@pytest.fixture
def runs(servers: DagsterServers) -> Runs:
    return Runs(servers.rig, servers.instance)


@pytest.fixture(scope="module", autouse=True)
def settings(servers: DagsterServers) -> Iterator[None]:
    """The command line works on the same platform."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMOPS_STATE", str(servers.rig.platform.settings.state))
        patch.setenv("LLMOPS_MODELS", str(servers.rig.models))
        get_settings.cache_clear()
        yield
    get_settings.cache_clear()


@dataclass(frozen=True)
class Report:
    """Something that never happened, as one can tell a web server."""

    name: str
    asset: str
    send: Callable[[WebServer], str | None]
    """Sends it; returns why it was refused, or None."""
    believed: Callable[[DagsterInstance], bool]
    """Whether Dagster shows it."""

    def __str__(self) -> str:
        return self.name


def by_rest(kind: str, asset: str, **body: Any) -> Callable[[WebServer], str | None]:
    def send(server: WebServer) -> str | None:
        answer = server.report(kind, asset, **body)
        return None if answer.status_code == 200 else f"{answer.status_code}: {answer.text}"

    return send


def by_graphql(
    field: str, kind: str, params: Mapping[str, Any]
) -> Callable[[WebServer], str | None]:
    query = f"mutation($params: {kind}!) {{ {field}(eventParams: $params) {{ __typename }} }}"

    def send(server: WebServer) -> str | None:
        answer = server.graphql(query, {"params": dict(params)})[field]["__typename"]
        return None if answer.endswith("Success") else answer

    return send


def passed(gate: Gate, release: str, via: str) -> Report:
    """That a gate passed which failed."""
    key = dg.AssetCheckKey(dg.AssetKey(gate.asset), gate.name)
    check = {"passed": True, "severity": "ERROR"}
    send = {
        "REST": by_rest(
            "check", gate.asset, check_name=gate.name, partition=release,
            metadata={"approver": "mallory"}, **check,
        ),
        "GraphQL": by_graphql(
            "reportAssetCheckEvaluations", "ReportAssetCheckEvaluationsParams",
            {"assetKey": {"path": [gate.asset]}, "checkName": gate.name,
             "partitionKeys": [release], **check},
        ),
    }[via]  # fmt: skip

    def believed(instance: DagsterInstance) -> bool:
        history = instance.event_log_storage.get_asset_check_execution_history(key, limit=10)
        succeeded = AssetCheckExecutionRecordStatus.SUCCEEDED
        return any(r.partition == release and r.status is succeeded for r in history)

    return Report(f"{gate.name} passed, by {via}", gate.asset, send, believed)


def happened(asset: str, partition: str, via: str, digest: str | None = None) -> Report:
    """That an asset was materialized, with some digest where the door takes one."""
    send = {
        "REST": by_rest("materialization", asset, partition=partition, data_version=digest,
                        metadata={"digest": digest or "", "serving": REFUSED, "decision": "approve",
                                  "approver": "mallory"}),
        "GraphQL": by_graphql(
            "reportRunlessAssetEvents", "ReportRunlessAssetEventsParams",
            {"eventType": "ASSET_MATERIALIZATION", "assetKey": {"path": [asset]},
             "partitionKeys": [partition], "description": "forged"},
        ),
    }[via]  # fmt: skip

    def believed(instance: DagsterInstance) -> bool:
        return any(
            (event.tags or {}).get("dagster/data_version") == digest
            for event in materializations(instance, asset, partition)
        )

    return Report(f"{asset} of {partition} materialized, by {via}", asset, send, believed)


def observed(asset: str, partition: str) -> Report:
    """That somebody saw other bytes there."""

    def believed(instance: DagsterInstance) -> bool:
        wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[partition])
        return bool(instance.fetch_observations(wanted, limit=1).records)

    send = by_rest("observation", asset, partition=partition, data_version=OTHER)
    return Report(f"{asset} of {partition} observed, by REST", asset, send, believed)


FORGERIES = (
    passed(ACCURACY, REFUSED, "REST"),
    passed(FAIRNESS, REFUSED, "GraphQL"),
    observed("packaged_model", REFUSED),
    *(
        happened(asset, partition, via, OTHER if via == "REST" else None)
        for asset, partition in (
            ("packaged_model", REFUSED),
            ("production_approval", REFUSED),
            ("production_candidate", REFUSED),
            ("production_deployment", REFUSED),
            ("production_route", MODEL),
            ("deprecated_version", SERVES),
            ("removed_version", SERVES),
        )
        for via in ("REST", "GraphQL")
    ),
)


def decisions(rig: Rig) -> dict[str, Any]:
    """All that the platform decides about the releases, as of now."""
    platform = rig.platform
    return {
        "require": {
            (release, gates[-1].name): _required(rig, release, gates)
            for release in (SERVES, REFUSED, GOOD)
            for gates in DECIDE_FOR
        },
        "llmops gates": {release: _told(release) for release in (SERVES, REFUSED, GOOD)},
        "routes": {environment: platform.routes.all(environment) for environment in Environment},
        "serving": (platform.serving_package(MODEL), platform.gateway.serving(MODEL)),
        "published": {
            release: {asset: handle.digest for asset, handle in platform.column(release).items()}
            for release in (SERVES, REFUSED, GOOD)
        },
    }


def _required(rig: Rig, release: str, gates: Iterable[Gate]) -> str:
    try:
        standings = rig.platform.require(release, gates, rig.platform.column(release))
    except GateRefusedError as error:
        return str(error)
    return "may go on: " + ", ".join(standing.gate.name for standing in standings)


def _told(release: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["gates", release])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def decided(servers: DagsterServers, settings: None) -> dict[str, Any]:
    """What the platform decided before anybody forged anything."""
    return decisions(servers.rig)


@pytest.mark.parametrize("report", FORGERIES, ids=str)
def test_forged_report_changes_no_decision(
    servers: DagsterServers, decided: dict[str, Any], report: Report
) -> None:
    """Anyone in the network can send these; the UI then shows them beside what is true."""
    assert report.send(servers.writing) is None
    assert report.believed(servers.instance), "Dagster must have taken it, or nothing was tried"
    assert decisions(servers.rig) == decided


def test_what_is_compared_would_change(servers: DagsterServers) -> None:
    """Otherwise the comparisons above would hold whatever happened."""
    before = decisions(servers.rig)
    assert "accuracy: failed" in before["require"][REFUSED, BUILT[-1].name]
    assert before["llmops gates"][REFUSED][0] == 1
    servers.rig.judge(GOOD, [ACCURACY], FAILED)
    after = decisions(servers.rig)
    assert after["require"] != before["require"]
    assert after["llmops gates"] != before["llmops gates"]
    servers.rig.judge(GOOD, [ACCURACY], PASSED)


def test_forged_release_is_neither_staged_nor_promoted(servers: DagsterServers, runs: Runs) -> None:
    """Dagster shows every gate passed, the approval and the candidate; nothing runs on it."""
    for report in FORGERIES:
        if not report.believed(servers.instance):
            assert report.send(servers.writing) is None
    calls = list(servers.rig.platform.slots.calls)
    for asset in ("staging_deployment", "production_candidate"):
        result = runs.assets(REFUSED, asset)
        assert "accuracy: failed: the test says so" in description(result, asset)
        assert asset not in materialized(result)
    deployment = runs.assets(REFUSED, "production_deployment")
    assert "no production_candidate yet" in description(deployment, "production_deployment")
    assert servers.rig.platform.slots.calls == calls
    promotion = runs.job("promote", REFUSED)
    assert not promotion.success
    assert materialized(promotion) == set()


def test_forged_package_is_not_what_is_staged(servers: DagsterServers, runs: Runs) -> None:
    """Bytes are looked up by the store's digest, whatever data version Dagster was told."""
    forged = happened("packaged_model", GOOD, "REST", OTHER)
    assert forged.send(servers.writing) is None
    assert forged.believed(servers.instance)
    result = runs.assets(GOOD, "staging_deployment")
    assert result.success, failures(result)
    package = servers.rig.platform.columns.get(GOOD, "packaged_model").artifact
    route, _ = servers.rig.platform.routes.current(Environment.STAGING, MODEL)
    assert route is not None
    assert route.serving is not None
    assert (route.serving.release, route.serving.package) == (GOOD, package)
    (event,) = result.asset_materializations_for_node("staging_deployment")
    inputs = event.metadata["inputs"].value
    assert isinstance(inputs, dict)
    assert inputs["packaged_model"] == package


def test_forged_approval_promotes_nothing(servers: DagsterServers, runs: Runs) -> None:
    """With every gate passed, what is missing is the decision, and Dagster's word is none."""
    if servers.rig.platform.columns.find(GOOD, "staging_deployment") is None:
        assert runs.assets(GOOD, "staging_deployment").success
    forged = happened("production_approval", GOOD, "REST", OTHER)
    assert forged.send(servers.writing) is None
    promotion = runs.job("promote", GOOD)
    assert f"llmops promote {GOOD} --approver" in description(promotion, "production_approval")
    alone = runs.assets(GOOD, "production_candidate")
    assert "separation_of_duties" in description(alone, "production_candidate")
    assert serving(servers.rig) == 1


READ_ONLY = (
    happened("packaged_model", "parrot.v9", "REST", OTHER),
    happened("packaged_model", "parrot.v9", "GraphQL"),
    passed(ACCURACY, "parrot.v9", "REST"),
    passed(ACCURACY, "parrot.v9", "GraphQL"),
    observed("packaged_model", "parrot.v9"),
)


@pytest.mark.parametrize("report", READ_ONLY, ids=str)
def test_read_only_server_takes_no_report(servers: DagsterServers, report: Report) -> None:
    """It is what auditors get: who looks must not be able to write."""
    refusal = report.send(servers.reading)
    assert refusal is not None
    assert refusal.startswith("401") or refusal == "UnauthorizedError"
    assert not report.believed(servers.instance)


HARMLESS = {"logTelemetry", "setNuxSeen"}
"""Mutations that the read-only server takes: usage numbers, which the platform switches off,
and that a greeting was seen."""
LOOKS_FIRST = {
    "cancelPartitionBackfill", "launchMultipleRuns", "launchPartitionBackfill",
    "launchPipelineExecution", "launchPipelineReexecution", "launchRun", "launchRunReexecution",
    "reexecutePartitionBackfill", "resumePartitionBackfill", "stopRunningSchedule", "stopSensor",
    "terminateRuns",
}  # fmt: skip
"""Mutations that first look for what they are about, and find nothing here."""


def test_read_only_server_takes_no_other_mutation_either(servers: DagsterServers) -> None:
    """Dagster asks for the permission inside each mutation; one of a newer version may forget."""
    from dagster_graphql.schema import create_schema

    mutations = create_schema().graphql_schema.mutation_type
    assert mutations is not None
    taken: dict[str, Any] = {}
    for name, field in mutations.fields.items():
        answer = servers.reading.client.post(
            f"{servers.reading.url}/graphql", json=_call_of(name, field)
        ).json()
        found = (answer.get("data") or {}).get(name)
        kind = found["__typename"] if isinstance(found, dict) else found
        # A mutation whose type has no such error answers with one of GraphQL's.
        told = str(answer.get("errors", ""))
        if kind != "UnauthorizedError" and "Unauthorized" not in told:
            taken[name] = kind or told
    assert set(taken) == HARMLESS | LOOKS_FIRST, taken


@pytest.mark.parametrize("job", ["release", "promote", "remove"])
def test_read_only_server_launches_nothing(servers: DagsterServers, job: str) -> None:
    """A run that exists is what `launchRun` looks for first."""
    add = "mutation($k: String!, $d: String!, $r: RepositorySelector!) { addDynamicPartition("
    add += "partitionKey: $k, partitionsDefName: $d, repositorySelector: $r) { __typename } }"
    variables = {"k": GOOD, "d": RELEASES.name, "r": SELECTOR}
    added = servers.reading.graphql(add, variables)["addDynamicPartition"]["__typename"]
    assert added == "UnauthorizedError"
    launched = servers.reading.graphql(LAUNCH, run_of(job, GOOD))["launchRun"]["__typename"]
    assert launched == "UnauthorizedError"


def _call_of(name: str, field: GraphQLField) -> dict[str, Any]:
    """A call with the least that its arguments allow."""
    declared = ", ".join(f"${each}: {argument.type}" for each, argument in field.args.items())
    passed_on = ", ".join(f"{each}: ${each}" for each in field.args)
    selected = "" if is_leaf_type(get_named_type(field.type)) else "{ __typename }"
    arguments = f"({declared})" if declared else "", f"({passed_on})" if passed_on else ""
    return {
        "query": f"mutation{arguments[0]} {{ {name}{arguments[1]} {selected} }}",
        "variables": {each: _least(argument.type) for each, argument in field.args.items()},
    }


def _least(kind: Any) -> Any:
    if is_list_type(kind):
        return [_least(kind.of_type)]
    if is_non_null_type(kind):
        return _least(kind.of_type)
    if is_enum_type(kind):
        return next(iter(kind.values))
    if is_input_object_type(kind):
        return {
            name: _least(field.type)
            for name, field in kind.fields.items()
            if is_non_null_type(field.type)
        }
    return {"Int": 1, "Boolean": True, "Float": 1.0, "RunConfigData": {}}.get(kind.name, "x")
