"""Dagster's real web servers, one that may write and one that may not, beside a platform."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
from dagster import DagsterInstance

from llmops_assets.local.databases import make_dagster_storages

from .conftest import free_port
from .release_rig import Rig

START_SECONDS = 60.0
END_SECONDS = 20.0
LOCATION = "llmops_assets"
SELECTOR = {"repositoryLocationName": LOCATION, "repositoryName": "__repository__"}
LAUNCH = """mutation($run: ExecutionParams!) { launchRun(executionParams: $run) {
    __typename ... on PythonError { message } ... on UnauthorizedError { message } } }"""


@dataclass(frozen=True)
class WebServer:
    """One web server, as anybody who reaches its port sees it."""

    port: int
    client: httpx.Client

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def graphql(self, query: str, variables: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Data of the answer to a query or mutation."""
        answer = self.client.post(
            f"{self.url}/graphql", json={"query": query, "variables": dict(variables or {})}
        ).json()
        assert "errors" not in answer, answer
        return answer["data"]

    def report(self, kind: str, asset: str, **body: Any) -> httpx.Response:
        """A report by the REST endpoints: kind is materialization, check or observation."""
        return self.client.post(f"{self.url}/report_asset_{kind}/{asset}", json=body)


@dataclass(frozen=True)
class DagsterServers:
    """Both web servers, and the instance that they and the test share."""

    rig: Rig
    instance: DagsterInstance
    writing: WebServer
    reading: WebServer
    """Started with `--read-only`."""


def run_of(job: str, release: str) -> dict[str, Any]:
    """Variables of `LAUNCH`."""
    return {
        "run": {
            "selector": {**SELECTOR, "pipelineName": job},
            "runConfigData": {},
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": release}]},
        }
    }


@contextlib.contextmanager
def dagster_servers(folder: Path) -> Iterator[DagsterServers]:
    """A platform in a folder, with one code server and two web servers on its definitions.

    No daemon runs, so what is launched stays in the queue.
    """
    rig = Rig(folder / "rig")
    home = folder / "dagster"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    # Two servers that make one fresh database corrupt it.
    make_dagster_storages(home)
    code, writing, reading = (free_port() for _ in range(3))
    workspace = folder / "workspace.yaml"
    workspace.write_text(
        "load_from:\n"
        f"  - grpc_server: {{host: 127.0.0.1, port: {code}, location_name: {LOCATION}}}\n"
    )
    settings = rig.platform.settings
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("LLMOPS_")},
        "DAGSTER_HOME": str(home),
        "LLMOPS_STATE": str(settings.state),
        "LLMOPS_MODELS": str(settings.models),
    }
    web = ("dagster_webserver", "--host", "127.0.0.1", "--workspace", str(workspace), "--port")
    log = folder / "servers.log"
    with contextlib.ExitStack() as stack:
        stack.callback(rig.close)
        client = stack.enter_context(httpx.Client(timeout=30, trust_env=False))
        started: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, started)

        def start(*arguments: str) -> subprocess.Popen[bytes]:
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", *arguments],
                    env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                )  # fmt: skip
            started.append(process)
            return process

        # Before the web servers, which otherwise look for it once and then a minute later.
        server = start(
            "dagster", "api", "grpc", "--host", "127.0.0.1", "--port", str(code),
            "--module-name", "llmops_assets.definitions", "--location-name", LOCATION,
        )  # fmt: skip
        _wait(lambda: _code_server_answers(code), server, log)
        found: list[WebServer] = []
        starting = [
            (writing, start(*web, str(writing))),
            (reading, start(*web, str(reading), "--read-only")),
        ]
        for port, process in starting:
            one = WebServer(port, client)
            _wait(lambda one=one: _has_definitions(one), process, log)
            found.append(one)
        instance = stack.enter_context(DagsterInstance.from_config(str(home)))
        yield DagsterServers(rig, instance, *found)


def materializations(
    instance: DagsterInstance, asset: str, partition: str
) -> list[dg.AssetMaterialization]:
    """What Dagster shows of an asset's partition, newest first."""
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[partition])
    records = instance.fetch_materializations(wanted, limit=100).records
    return [event for record in records if (event := record.asset_materialization) is not None]


def _code_server_answers(port: int) -> bool:
    from dagster._core.errors import DagsterUserCodeUnreachableError
    from dagster._grpc.client import DagsterGrpcClient

    try:
        DagsterGrpcClient(port=port, host="127.0.0.1").ping("")
    except DagsterUserCodeUnreachableError:
        return False
    return True


def _has_definitions(server: WebServer) -> bool:
    query = """{ repositoriesOrError { __typename
        ... on RepositoryConnection { nodes { location { name } } } } }"""
    try:
        found = server.graphql(query)["repositoriesOrError"]
    except httpx.HTTPError:
        return False
    return bool(found.get("nodes"))


def _wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=END_SECONDS)
