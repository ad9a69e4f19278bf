"""How long a tick of each trigger takes at 1,000 specs and 10,000 recorded releases.

    .venv/bin/python benchmarks/trigger_ticks.py [--models 1000] [--releases 10]

In a temporary folder it builds a git repository, a store, a Dagster instance and an MLflow
server of that size, all real, and a double of Alertmanager. It then evaluates each sensor as
the daemon does: the first tick, which has seen nothing, those that ask for what the first one
had no room for (their number, and the slowest), five where nothing happened, and one after an
event. It prints a table, and exits with 1 if one of the five (median) or the one
after the event takes two seconds or more.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from unittest.mock import patch
from uuid import uuid4

import dagster as dg
import httpx
from dagster._core.storage.runs.schema import RunsTable, RunTagsTable
from dagster._serdes import serialize_value

from llmops_assets.deploy.approval import record_approval
from llmops_assets.develop.registration import Registration
from llmops_assets.develop.registry import RELEASE_TAG
from llmops_assets.develop.specs import SpecSource
from llmops_assets.jobs import RELEASE_ASSETS
from llmops_assets.partitions import RELEASES
from llmops_assets.platform import SPEC_FILE, Platform
from llmops_assets.release import Release
from llmops_assets.serving.routes import Route, RouteTarget
from llmops_assets.serving.slots import Colour, Environment
from llmops_assets.settings import Settings
from llmops_assets.spec import canonical, parse_spec
from llmops_assets.storage.columns import Result
from llmops_assets.tools import module_command

SENSORS = ("git_push", "registry", "approval", "retraining", "alerts", "toolchain_bump")
STEADY_TICKS = 5
SETTLING_TICKS = 100
LIMIT_SECONDS = 2.0
SERVING_MODELS = 200
RECORDED_ASSETS = ("model_spec", "registered_model", "packaged_model")
"""What is published of a release that does not serve; a whole column takes minutes to write."""
ALERTS = 1000
EXAMPLE = Path(__file__).parent.parent / "models" / "date-normalizer.yaml"
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
# What a spec says to each trigger, beside the example's sections.
TRIGGER_SECTIONS = """
retraining: {cron: "0 3 * * mon", timezone: Europe/Berlin}
alerts:
  - {match: {alertname: ErrorRate}, action: rollback}
  - {match: {alertname: Busy}, action: scale}
  - {match: {alertname: Other}, action: notify}
"""


class BenchmarkPlatform(Platform):
    """The platform with an MLflow that no local stack has started."""

    mlflow: ClassVar[str]

    @property
    def mlflow_url(self) -> str:
        return self.mlflow


@dataclass
class World:
    """What the triggers listen to."""

    platform: BenchmarkPlatform
    models: list[str]
    releases: int
    mlflow: Path
    """Folder of the MLflow server."""
    alerts: list[dict[str, Any]]
    """What Alertmanager answers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--releases", type=int, default=10, help="Of each model.")
    parser.add_argument("--only", nargs="*", choices=SENSORS, default=SENSORS)
    options = parser.parse_args()
    models = [f"model-{number:04d}" for number in range(options.models)]
    with tempfile.TemporaryDirectory(prefix="llmops-ticks-") as name:
        root = Path(name)
        alerts = [alert(number, models) for number in range(ALERTS)]
        with mlflow_server(root / "mlflow") as mlflow, alertmanager(alerts) as alertmanager_url:
            settings = Settings(
                state=root / "state",
                models=root / "repository" / "models",
                git_repository=str(root / "repository"),
                alertmanager_url=alertmanager_url,
                registry_poll_seconds=0.001,  # every tick asks
            )
            platform = BenchmarkPlatform(settings)
            BenchmarkPlatform.mlflow = mlflow
            world = World(platform, models, options.releases, root / "mlflow", alerts)
            timed("repository", lambda: write_repository(settings, models))
            timed("registry", lambda: fill_registry(world))
            timed("store", lambda: fill_store(platform, models, options.releases))
            with dg.DagsterInstance.local_temp(str(root)) as instance:
                timed("Dagster", lambda: fill_instance(instance, models, options.releases))
                # Or the first sensor that writes durably would wait for all of this.
                timed("nothing, but all of it reached the disk", os.sync)
                slow = measure(options.only, world, instance)
    sys.exit(1 if slow else 0)


def measure(names: Sequence[str], world: World, instance: dg.DagsterInstance) -> list[str]:
    """Prints the times of each sensor's ticks. Returns the sensors that are too slow."""
    slow: list[str] = []
    print(
        f"\n{'sensor':<15} {'first':>9} {'settling':>16} {'steady':>9} {'slowest':>9} {'event':>9} "
        f"{'cursor':>9}"
    )
    for name in names:
        sensor: dg.SensorDefinition = getattr(import_module(f"llmops_assets.triggers.{name}"), name)
        first = last = tick(sensor, world.platform, instance, None)
        settling: list[float] = []
        while last.runs and len(settling) < SETTLING_TICKS:
            last = tick(sensor, world.platform, instance, last.cursor)
            settling.append(last.seconds)
        steady: list[float] = []
        for _ in range(STEADY_TICKS):
            last = tick(sensor, world.platform, instance, last.cursor)
            steady.append(last.seconds)
        median = statistics.median(steady)
        event = None
        if name in EVENTS:
            EVENTS[name](world)
            last = tick(sensor, world.platform, instance, last.cursor)
            event = last.seconds
        print(
            f"{name:<15} {first.seconds:>7.3f} s "
            f"{len(settling):>4} x {max(settling, default=0):>7.3f} s {median:>7.3f} s "
            f"{max(steady):>7.3f} s {'-' if event is None else f'{event:.3f} s':>9} "
            f"{len(last.cursor or ''):>7} B  {last.answer}",
            flush=True,
        )
        if max(median, event or 0) >= LIMIT_SECONDS:
            slow.append(name)
    if slow:
        print(f"\ntoo slow, {LIMIT_SECONDS:g} s or more: {', '.join(slow)}")
    return slow


@dataclass(frozen=True)
class Tick:
    """One evaluation of a sensor."""

    seconds: float
    cursor: str | None
    """After it."""
    runs: int
    answer: str
    """What it did, shortened."""


def tick(
    sensor: dg.SensorDefinition,
    platform: Platform,
    instance: dg.DagsterInstance,
    cursor: str | None,
) -> Tick:
    context = dg.build_sensor_context(
        instance=instance,
        cursor=cursor,
        resources={"platform": platform},
        sensor_name=sensor.name,
    )
    started = time.perf_counter()
    result = sensor(context)
    seconds = time.perf_counter() - started
    if isinstance(result, dg.SensorResult):
        runs = len(result.run_requests or [])
        reason = result.skip_reason.skip_message if result.skip_reason else f"{runs} runs"
        return Tick(seconds, result.cursor or context.cursor, runs, (reason or "")[:50])
    reason = result.skip_message if isinstance(result, dg.SkipReason) else repr(result)
    return Tick(seconds, context.cursor, 0, (reason or "")[:50])


def timed(what: str, build: Callable[[], None]) -> None:
    started = time.perf_counter()
    build()
    print(f"built {what} in {time.perf_counter() - started:.0f} s", flush=True)


def write_repository(settings: Settings, models: list[str]) -> None:
    """A repository with a spec of each model, and one commit."""
    settings.models.mkdir(parents=True)
    for model in models:
        (settings.models / f"{model}.yaml").write_text(spec_text(model), encoding="utf-8")
    git(settings.models.parent, "init", "--quiet", "--initial-branch", settings.git_branch)
    commit_all(settings.models.parent)


def commit_all(repository: Path) -> None:
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "specs")


def git(repository: Path, *arguments: str) -> None:
    author = ("-c", "user.name=b", "-c", "user.email=b@example.org")
    subprocess.run(["git", *author, *arguments], cwd=repository, check=True, timeout=120)


def spec_text(model: str) -> str:
    text = EXAMPLE.read_text(encoding="utf-8")
    return text.replace("name: date-normalizer", f"name: {model}") + TRIGGER_SECTIONS


def fill_store(platform: Platform, models: list[str], releases: int) -> None:
    """Columns of all releases, and a route of the models that serve."""
    store, scratch = platform.store, platform.settings.state / "artifact"
    # A power loss here would only end the benchmark.
    with patch("os.fsync", lambda descriptor: None):
        for number, model in enumerate(models):
            spec = parse_spec(spec_text(model), model)
            source = SpecSource(file=f"models/{model}.yaml", commit="c" * 40, changed=False)
            scratch.mkdir(exist_ok=True)
            (scratch / SPEC_FILE).write_text(json.dumps(canonical(spec)), encoding="utf-8")
            (scratch / "source.json").write_text(source.model_dump_json(), encoding="utf-8")
            artifact = store.put(scratch, "application/vnd.llmops.benchmark").digest
            store.open(artifact)
            for version in range(1, releases + 1):
                release = release_of(model, version).key
                serves = number < SERVING_MODELS and version == releases
                for asset in RELEASE_ASSETS if serves else RECORDED_ASSETS:
                    platform.columns.publish(result_of(release, asset, artifact, version))
                store.append(f"models/{model}", {"release": release})
            if number < SERVING_MODELS:
                add_route(platform, model, release_of(model, releases).key, artifact, releases)


def release_of(model: str, version: int) -> Release:
    return Release.by_hand(model, BEGAN + timedelta(hours=version))


def result_of(release: str, asset: str, artifact: str, version: int) -> Result:
    """What an asset published; the artifact is the model's one, whatever the asset."""
    facts: dict[str, Any] = {"requested_by": "ada"}
    if asset == "registered_model":
        registration = Registration(model=Release.parse(release).model, version=version, tags={})
        facts = registration.model_dump(mode="json")
    return Result(
        asset=asset,
        release=release,
        artifact=artifact,
        media_type="application/vnd.llmops.benchmark",
        action="sha256:" + "0" * 64,
        inputs={},
        parameters={},
        versions={},
        facts=facts,
        started=BEGAN,
        finished=BEGAN,
    )


def add_route(platform: Platform, model: str, release: str, package: str, version: int) -> None:
    """Production's route of a model, as a deployment records it; there is no gateway here."""
    target = RouteTarget(
        colour=Colour.BLUE,
        weight=100,
        package=package,
        release=release,
        version=version,
        host="127.0.0.1",
        http_port=1,
        grpc_port=2,
        metrics_port=3,
    )
    route = Route(
        environment=Environment.PRODUCTION,
        model=model,
        generation=1,
        targets=(target,),
        actor="benchmark",
        reason="it serves",
        time=BEGAN,
        predecessor=None,
    )
    name = f"routes/{Environment.PRODUCTION}/{model}"
    entry = platform.store.append(name, route.model_dump(mode="json"))
    platform.store.compare_and_set(name, None, entry.digest)


def fill_instance(instance: dg.DagsterInstance, models: list[str], releases: int) -> None:
    """A finished run of each release, and its partition."""
    keys = [release_of(model, v).key for model in models for v in range(1, releases + 1)]
    instance.add_dynamic_partitions(str(RELEASES.name), keys)
    runs = [
        dg.DagsterRun(
            job_name="release",
            run_id=str(uuid4()),
            status=dg.DagsterRunStatus.SUCCESS,
            tags={"dagster/partition": key},
        )
        for key in keys
    ]
    # One transaction; `add_run` makes one of each.
    with instance.run_storage.connect() as connection:  # pyright: ignore[reportAttributeAccessIssue]
        connection.execute(
            RunsTable.insert(),
            [
                {
                    "run_id": run.run_id,
                    "pipeline_name": run.job_name,
                    "status": run.status.value,
                    "run_body": serialize_value(run),
                    "partition": run.tags["dagster/partition"],
                }
                for run in runs
            ],
        )
        connection.execute(
            RunTagsTable.insert(),
            [
                {"run_id": run.run_id, "key": k, "value": v}
                for run in runs
                for k, v in run.tags.items()
            ],
        )


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """A real MLflow on SQLite. Gives its URL."""
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = module_command(
        "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", folder / "artifacts", "--serve-artifacts",
    )  # fmt: skip
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        timed("an MLflow server", lambda: wait_for(f"{url}/health", process))
        yield url
    finally:
        process.terminate()
        process.wait(30)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=2).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    sys.exit(f"MLflow does not answer at {url}")


def fill_registry(world: World) -> None:
    """All versions as MLflow stores them, half of them registered by this platform."""
    at = int(BEGAN.timestamp() * 1000)
    numbers = range(1, world.releases + 1)
    with closing(sqlite3.connect(world.mlflow / "mlflow.db", timeout=60)) as database, database:
        database.executemany(
            "INSERT INTO registered_models (workspace, name, creation_time, last_updated_time) "
            "VALUES ('default', ?, ?, ?)",
            [(model, at, at) for model in world.models],
        )
        database.executemany(
            "INSERT INTO model_version_tags (workspace, name, version, key, value) "
            "VALUES ('default', ?, ?, ?, ?)",
            [
                (model, number, RELEASE_TAG, release_of(model, number).key)
                for model in world.models
                for number in numbers[::2]
            ],
        )
        add_versions(database, [(model, number) for model in world.models for number in numbers])


def add_versions(database: sqlite3.Connection, versions: Sequence[tuple[str, int]]) -> None:
    at = int(BEGAN.timestamp() * 1000)
    database.executemany(
        "INSERT INTO model_versions (workspace, name, version, creation_time, "
        "last_updated_time, current_stage, source, status) "
        "VALUES ('default', ?, ?, ?, ?, 'None', 'mlflow-artifacts:/weights', 'READY')",
        [(model, number, at + number, at + number) for model, number in versions],
    )


def push_a_spec(world: World) -> None:
    """A threshold of one spec changes."""
    settings = world.platform.settings
    file = settings.models / f"{world.models[-1]}.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("steps: 900", "steps: 901"))
    commit_all(settings.models.parent)


def register_a_version(world: World) -> None:
    with closing(sqlite3.connect(world.mlflow / "mlflow.db", timeout=60)) as database, database:
        add_versions(database, [(world.models[-1], world.releases + 1)])


def approve_a_release(world: World) -> None:
    release = release_of(world.models[-1], world.releases).key
    package = world.platform.columns.get(release, "packaged_model").artifact
    record_approval(world.platform, release, "bob", "approve", "it is good", package)


def let_a_week_pass(_: World) -> None:
    """Every model is due: more than one tick asks for."""
    later = datetime.now(UTC) + timedelta(days=7)
    patch("llmops_assets.triggers.retraining.now", lambda: later).start()


def fire_an_alert(world: World) -> None:
    world.alerts.append(alert(ALERTS, world.models, severity="info"))


EVENTS: Mapping[str, Callable[[World], None]] = {
    "git_push": push_a_spec,
    "registry": register_a_version,
    "approval": approve_a_release,
    "retraining": let_a_week_pass,
    "alerts": fire_an_alert,
}
"""What makes each trigger act. A bump of the toolchain is found by the first tick already."""


@contextmanager
def alertmanager(alerts: list[dict[str, Any]]) -> Iterator[str]:
    """A double of Alertmanager's API v2 with these alerts. Gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            payload = json.dumps(alerts).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Only the table is of interest."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def alert(number: int, models: list[str], severity: str = "page") -> dict[str, Any]:
    """One alert as `GET /api/v2/alerts` gives it."""
    model = models[number % min(SERVING_MODELS, len(models))]
    # No rollbacks: they would need a gateway and two loaded slots a model.
    name = "Other" if severity == "info" else ("Busy", "Other", "Unruled")[number % 3]
    return {
        "labels": {
            "alertname": name,
            "model": model,
            "environment": "production",
            "instance": str(number),
            "severity": severity,
        },
        "annotations": {"summary": f"{name} of {model}"},
        "fingerprint": f"{number:016x}",
        "startsAt": BEGAN.isoformat(),
        "updatedAt": BEGAN.isoformat(),
        "endsAt": (datetime.now(UTC) + timedelta(hours=1)).isoformat(),
        "generatorURL": "http://prometheus.example.org/graph",
        "receivers": [{"name": "llmops"}],
        "status": {"state": "active", "silencedBy": [], "inhibitedBy": [], "mutedBy": []},
    }


if __name__ == "__main__":
    main()
