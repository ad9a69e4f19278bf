"""The registry trigger: every version that a person registers becomes one release, once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from mlflow.tracking import MlflowClient

from llmops_assets.develop import branch
from llmops_assets.develop.registry import ListedVersion, MLflowRegistry, Readiness
from llmops_assets.errors import RegistryError, TriggerError
from llmops_assets.release import Release
from llmops_assets.triggers import registry as trigger
from llmops_assets.triggers.registry import RegistryCursor
from llmops_assets.triggers.registry_watch import wake_file
from llmops_assets.triggers.requests import EVENT_TAG, REQUESTED_BY_TAG, RUNS_PER_TICK

from ..conftest import free_port
from ..fakes import FakeRegistry
from ..plain_mlflow import register_plainly
from ..release_rig import MODEL, SPEC, Rig

pytestmark = pytest.mark.timeout(120)
POLL = 60.0
"""The default of `registry_poll_seconds`."""


class Ticks:
    """The sensor as Dagster's daemon calls it, with a clock and cursor of the test's own."""

    def __init__(self, rig: Rig, instance: dg.DagsterInstance) -> None:
        self.rig = rig
        self.instance = instance
        self.cursor: str | None = None
        self.now = 1_800_000_000.0
        self.results: list[dg.SensorResult | dg.SkipReason] = []

    def tick(self, keep: bool = True) -> list[dg.RunRequest]:
        """The runs that one tick asks for. Without `keep` Dagster died before it took them."""
        context = dg.build_sensor_context(
            instance=self.instance, cursor=self.cursor, resources={"platform": self.rig.platform}
        )
        result: Any = trigger.registry(context)
        self.results.append(result)
        if isinstance(result, dg.SkipReason):
            return []
        if keep:
            self.cursor = result.cursor
        return list(result.run_requests or [])

    def after(self, seconds: float = POLL) -> list[str]:
        """Which releases the tick asks for that comes so much later."""
        self.now += seconds
        return keys(self.tick())

    def record_runs(self, requests: list[dg.RunRequest]) -> None:
        """What the daemon does with a tick's requests."""
        for request in requests:
            assert request.partition_key is not None
            self.instance.create_run_for_job(
                job_def=release,
                status=dg.DagsterRunStatus.STARTED,
                tags={**request.tags, "dagster/partition": request.partition_key},
            )


@dg.op
def nothing() -> None:
    """A stand-in for the assets of a release."""


@dg.job
def release() -> None:
    nothing()


def keys(requests: list[dg.RunRequest]) -> list[str]:
    assert all(request.run_key == request.partition_key for request in requests)
    return [str(request.partition_key) for request in requests]


def write_specs(rig: Rig, *models: str) -> None:
    (rig.models / f"{MODEL}.yaml").unlink(missing_ok=True)
    for model in models:
        text = SPEC.replace(f"name: {MODEL}", f"name: {model}")
        (rig.models / f"{model}.yaml").write_text(text)


@pytest.fixture
def ticks(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ticks]:
    with dg.DagsterInstance.ephemeral() as instance:
        ticks = Ticks(rig, instance)
        monkeypatch.setattr(trigger, "time", SimpleNamespace(time=lambda: ticks.now))
        yield ticks


@pytest.fixture
def people(rig: Rig) -> FakeRegistry:
    """The registry of a platform on doubles."""
    return rig.platform.registry


@pytest.fixture
def client(rig: Rig, mlflow_url: str) -> MlflowClient:
    """A client of the real MLflow, which the platform then uses as well."""
    vars(rig.platform)["registry"] = MLflowRegistry(mlflow_url, timeout_seconds=30)
    return MlflowClient(tracking_uri=mlflow_url, registry_uri=mlflow_url)


def registered(
    people: FakeRegistry, number: int, model: str = MODEL, readiness: Readiness = Readiness.READY
) -> None:
    people.people[model, number] = ListedVersion(model, number, readiness, "ada", None)


def test_versions_by_plain_mlflow_become_releases(
    rig: Rig, ticks: Ticks, client: MlflowClient
) -> None:
    """The trigger's purpose, at a real MLflow: two models, three versions, between two ticks."""
    write_specs(rig, "sense-a", "sense-b")
    register_plainly(client, "sense-a", 2)
    assert ticks.tick() == []  # what was there before is adopted
    register_plainly(client, "sense-a", 2)
    register_plainly(client, "sense-b")
    register_plainly(client, "sense-stranger")
    assert ticks.after(POLL - 1) == []
    ticks.now += 1
    requests = ticks.tick()
    assert keys(requests) == ["sense-a.v3", "sense-a.v4", "sense-b.v1"]
    assert {request.job_name for request in requests} == {"release"}
    assert requests[0].run_config == {"ops": {"model_spec": {"config": {}}}}
    assert requests[0].tags[REQUESTED_BY_TAG] == "mlflow"
    assert requests[0].tags[EVENT_TAG] == "version 3 of sense-a registered"
    result = ticks.results[-1]
    assert isinstance(result, dg.SensorResult)
    (partitions,) = result.dynamic_partitions_requests or []
    assert list(partitions.partition_keys) == keys(requests)
    assert ticks.after() == []


def test_own_versions_are_no_news(rig: Rig, ticks: Ticks, client: MlflowClient) -> None:
    """Each release registers a version; were it news, releases would never end."""
    write_specs(rig, "own-model")
    ticks.tick()
    platform = rig.platform.registry
    platform.register("own-model", "own-model.m20260101t000000", {}, {})
    assert ticks.after() == []
    register_plainly(client, "own-model")
    assert ticks.after() == ["own-model.v2"]
    platform.register("own-model", "own-model.v2", {}, {}, 2)
    assert ticks.after() == []


def test_killed_between_tick_and_runs(ticks: Ticks, people: FakeRegistry) -> None:
    """The daemon goes on with the old cursor: the same runs, which Dagster makes once."""
    ticks.tick()
    registered(people, 1)
    registered(people, 2)
    ticks.now += POLL
    first = ticks.tick(keep=False)
    again = ticks.tick(keep=False)
    assert keys(first) == keys(again) == ["parrot.v1", "parrot.v2"]
    ticks.record_runs(first[:1])
    # Somebody asked for that one, whoever it was; the other one is still missing.
    assert keys(ticks.tick()) == ["parrot.v2"]


def test_outage_fails_visibly_and_loses_nothing(
    rig: Rig, ticks: Ticks, client: MlflowClient
) -> None:
    """A tick that skipped would show a healthy sensor for as long as MLflow is down."""
    write_specs(rig, "outage")
    ticks.tick()
    before, up = ticks.cursor, rig.platform.registry
    register_plainly(client, "outage")
    ticks.now += POLL
    vars(rig.platform)["registry"] = MLflowRegistry(f"http://127.0.0.1:{free_port()}", 2)
    with pytest.raises(RegistryError, match="llmops status"):
        ticks.tick()
    vars(rig.platform)["registry"] = up
    register_plainly(client, "outage")
    assert ticks.cursor == before
    # It was not asked in vain for another minute.
    assert ticks.after(5) == ["outage.v1", "outage.v2"]


def test_first_tick_in_an_outage_adopts_later(ticks: Ticks, people: FakeRegistry) -> None:
    """Without a cursor nothing is known; what is there at the first answer is adopted."""
    registered(people, 1)
    people.down = True
    with pytest.raises(RegistryError):
        ticks.tick()
    people.down = False
    assert ticks.after(5) == []
    registered(people, 2)
    assert ticks.after() == ["parrot.v2"]


@pytest.mark.parametrize("jump", [-86_400.0, -POLL, 86_400.0])
def test_clock_that_jumps(ticks: Ticks, people: FakeRegistry, jump: float) -> None:
    """Nothing is asked for twice, and nothing waits until the clock is back where it was."""
    ticks.tick()
    registered(people, 1)
    assert ticks.after(jump) == ["parrot.v1"]
    registered(people, 2)
    assert ticks.after() == ["parrot.v2"]
    assert ticks.after(-jump + POLL) == []


def wake(rig: Rig, mark: str) -> None:
    file = wake_file(rig.platform.settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(mark + "\n")


def test_webhook_wakes_the_sensor_once(rig: Rig, ticks: Ticks, people: FakeRegistry) -> None:
    """Five deliveries of one webhook are one look at the registry, and one run."""
    ticks.tick()
    registered(people, 1)
    found: list[str] = []
    looks = 0
    for _ in range(5):
        wake(rig, "delivery")
        found += ticks.after(5)
        looks += not isinstance(ticks.results[-1], dg.SkipReason)
    assert (found, looks) == (["parrot.v1"], 1)
    wake(rig, "another")
    registered(people, 2)
    assert ticks.after(5) == ["parrot.v2"]


def test_webhook_during_a_tick_is_not_missed(
    rig: Rig, ticks: Ticks, people: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its version may have come after the registry answered."""
    ticks.tick()
    answer = people.registered_since

    def answer_and_wake(seen: Any) -> Any:
        found = answer(seen)
        wake(rig, "meanwhile")
        registered(people, 1)
        return found

    monkeypatch.setattr(people, "registered_since", answer_and_wake)
    assert ticks.after() == []
    monkeypatch.setattr(people, "registered_since", answer)
    assert ticks.after(5) == ["parrot.v1"]


def test_many_versions_take_several_ticks(ticks: Ticks, people: FakeRegistry) -> None:
    """A tick that asks for hundreds of runs may time out; none may be lost or wait a minute."""
    ticks.tick()
    count = 2 * RUNS_PER_TICK + 1
    for number in range(1, count + 1):
        registered(people, number)
    found = [ticks.after(), ticks.after(5), ticks.after(5), ticks.after(5)]
    assert [len(some) for some in found] == [RUNS_PER_TICK, RUNS_PER_TICK, 1, 0]
    assert sum(found, []) == [f"parrot.v{number}" for number in range(1, count + 1)]  # noqa: RUF017


def test_version_that_is_not_ready_is_waited_for(ticks: Ticks, people: FakeRegistry) -> None:
    """Its files are still on their way; later versions do not wait for it."""
    ticks.tick()
    registered(people, 1, readiness=Readiness.PENDING)
    registered(people, 2)
    registered(people, 3, readiness=Readiness.FAILED)
    registered(people, 4, readiness=Readiness.PENDING)
    registered(people, 5, readiness=Readiness.PENDING)
    assert ticks.after() == ["parrot.v2"]
    assert ticks.after() == []
    registered(people, 1)
    del people.people[MODEL, 4]
    registered(people, 5, readiness=Readiness.FAILED)
    assert ticks.after() == ["parrot.v1"]
    # One that was deleted or failed is not waited for any more.
    registered(people, 4)
    registered(people, 5)
    assert ticks.after() == []


def test_watch_of_a_model_begins_with_its_spec(
    rig: Rig, ticks: Ticks, people: FakeRegistry
) -> None:
    """Years of versions must not become releases when somebody adds a spec."""
    registered(people, 1, "later")
    ticks.tick()
    registered(people, 2, "later")
    assert ticks.after() == []
    write_specs(rig, MODEL, "later")
    assert ticks.after() == []
    registered(people, 3, "later")
    assert ticks.after() == ["later.v3"]


def test_versions_wait_while_the_spec_is_broken(
    rig: Rig, ticks: Ticks, people: FakeRegistry
) -> None:
    """A typing error in YAML must not lose what is registered meanwhile."""
    ticks.tick()
    rig.write_spec("name: [")
    assert MODEL not in branch.current_specs(rig.platform.settings)
    registered(people, 1)
    assert ticks.after() == []
    rig.write_spec(SPEC + "# mended\n")
    assert ticks.after() == ["parrot.v1"]


def test_release_takes_the_newest_commit_of_the_branch(
    rig: Rig, ticks: Ticks, people: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a repository, the files in LLMOPS_MODELS may be anything."""
    ticks.tick()
    registered(people, 1)
    specs = branch.current_specs(rig.platform.settings)
    monkeypatch.setattr(branch, "current_specs", lambda settings: specs)
    monkeypatch.setattr(branch, "head_commit", lambda settings: "c" * 40)
    ticks.now += POLL
    (request,) = ticks.tick()
    assert request.run_config == {"ops": {"model_spec": {"config": {"commit": "c" * 40}}}}
    assert request.tags[REQUESTED_BY_TAG] == "ada"
    assert request.tags[EVENT_TAG] == "version 1 of parrot registered by ada"


def test_unreadable_memory_is_an_error(rig: Rig, ticks: Ticks) -> None:
    """Beginning anew by itself would lose what was registered meanwhile."""
    ticks.tick()
    cursor = RegistryCursor.from_json(ticks.cursor)
    assert cursor is not None
    foreign = rig.platform.store.append("triggers/registry", {"models": {MODEL: "newest"}})
    ticks.cursor = cursor.model_copy(update={"seen": foreign.digest, "polled": None}).to_json()
    with pytest.raises(TriggerError, match="clear the sensor's cursor"):
        ticks.tick()


def test_memory_is_written_only_when_it_changes(
    rig: Rig, ticks: Ticks, people: FakeRegistry
) -> None:
    """A record a minute would be half a million a year."""
    ticks.tick()
    for _ in range(3):
        ticks.after()
    registered(people, 1)
    ticks.after()
    assert len(list(rig.platform.store.log("triggers/registry"))) == 2


def test_tick_at_a_thousand_specs(
    rig: Rig, ticks: Ticks, people: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tick that takes longer than its interval starves the other sensors."""
    spec = rig.freeze(f"{MODEL}.m20260101t000000")
    models = [f"model-{number:04d}" for number in range(1000)]
    specs = {name: spec.model_copy(update={"name": name}) for name in models}
    monkeypatch.setattr(branch, "current_specs", lambda settings: specs)
    template = ListedVersion("", 0, Readiness.READY, None, None)
    for name in models:
        for number in range(1, 11):
            people.people[name, number] = replace(template, model=name, version=number)
    ticks.tick()
    registered(people, 11, "model-0500")
    ticks.now += POLL
    started = time.perf_counter()
    assert keys(ticks.tick()) == [Release.from_registry("model-0500", 11).key]
    assert time.perf_counter() - started < 2
