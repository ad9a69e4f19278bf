"""The trigger on alerts with a real Prometheus and Alertmanager."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import dagster as dg
import httpx
import pytest

from llmops_assets.errors import TriggerError
from llmops_assets.operate.alertmanager import active_alerts
from llmops_assets.triggers import alerts as trigger

from ..operate.test_alerts import set_clock
from ..prometheus import Monitoring, monitoring, needs_prometheus
from ..release_rig import MODEL, SPEC, Rig, deploy, serving
from ..waiting import wait_for
from .daemon import Daemon
from .test_alerts import RULES, current, incidents, jobs, release, with_settings

pytestmark = [pytest.mark.integration, needs_prometheus, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitoring]:
    with monitoring(tmp_path_factory.mktemp("monitoring")) as servers:
        yield servers


@pytest.fixture
def daemon(servers: Monitoring, rig: Rig) -> Iterator[Daemon]:
    """Version 2 serves, version 1 is warm, and nothing fires."""
    with_settings(rig, alertmanager_url=servers.alertmanager.url)
    release(rig, SPEC + RULES)
    deploy(rig, 1)
    deploy(rig, 2)
    with dg.DagsterInstance.ephemeral() as instance:
        yield Daemon(trigger.alerts, rig.platform, instance)
    servers.errors.clear()
    servers.gateway_down = 0
    wait_for(lambda: not servers.names(), "all alerts to end")


def fire(servers: Monitoring, rate: float, name: str) -> None:
    servers.errors[MODEL] = rate
    wait_for(lambda: name in servers.names(), f"{name} to fire")


def test_rule_fires_and_flaps_and_the_route_moves_once(
    rig: Rig, servers: Monitoring, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a metric that goes bad to the release that served before."""
    assert daemon.tick() == []
    assert serving(rig) == 2
    fire(servers, 0.9, "ErrorRate")
    (run,) = daemon.tick()
    assert (run.job_name, serving(rig), current(rig).generation) == ("rollback", 1, 3)
    for _ in range(3):
        assert daemon.tick() == []
    (incident,) = incidents(rig)
    assert incident.what == f"ErrorRate: 0.9 of the answers of {MODEL} fail"
    # It comes again with another start: the rule rests.
    servers.errors[MODEL] = 0.0
    wait_for(lambda: not servers.names(), "the alert to end")
    daemon.tick()
    fire(servers, 0.8, "ErrorRate")
    assert daemon.tick() == []
    assert (len(incidents(rig)), current(rig).generation) == (2, 3)
    set_clock(monkeypatch, timedelta(seconds=61))
    (run,) = daemon.tick()
    assert run.job_name == "observe"
    assert daemon.tick() == []
    assert (serving(rig), current(rig).generation) == (1, 3)
    assert jobs(daemon) == {"rollback": 1, "observe": 1}


def test_silence_and_inhibition_are_respected(
    rig: Rig, servers: Monitoring, daemon: Daemon
) -> None:
    """What Alertmanager keeps from people it keeps from the route as well."""
    silence = servers.silence(f"model={MODEL}")
    servers.errors[MODEL] = 0.9
    wait_for(lambda: len(suppressed(servers)) == 1, "a silenced alert")
    assert daemon.tick() == []
    servers.gateway_down = 1
    wait_for(lambda: "GatewayDown" in servers.names(), "what inhibits it")
    servers.expire(silence)
    wait_for(lambda: suppressed(servers) == ["inhibitedBy"], "an inhibited alert")
    assert daemon.tick() == []
    assert (serving(rig), incidents(rig)) == (2, [])
    servers.gateway_down = 0
    wait_for(lambda: "ErrorRate" in servers.names(), "the end of the inhibition")
    (run,) = daemon.tick()
    assert (run.job_name, serving(rig)) == ("rollback", 1)
    assert daemon.tick() == []


def test_alertmanager_killed_and_started_again(
    rig: Rig, servers: Monitoring, daemon: Daemon
) -> None:
    """It forgets its alerts until Prometheus sends them again; we forget none."""
    daemon.tick()
    fire(servers, 0.2, "Busy")
    (run,) = daemon.tick()
    assert run.job_name == "scale"
    began = incidents(rig)[0].detected
    servers.post({"alertname": "ErrorRate", "severity": "info", "model": MODEL}, began)
    (told,) = daemon.tick()
    assert told.job_name == "observe"
    servers.alertmanager.kill()
    with pytest.raises(TriggerError, match="does not say what fires"):
        daemon.tick()
    assert incidents(rig)[1].answered is None
    servers.alertmanager.start()
    daemon.tick()
    fire(servers, 0.9, "ErrorRate")
    (run,) = daemon.tick()
    assert (run.job_name, serving(rig)) == ("rollback", 1)
    # The other source sends its alert again, as it began then: open again, and no run.
    servers.post({"alertname": "ErrorRate", "severity": "info", "model": MODEL}, began)
    wait_for(lambda: len(active_alerts(servers.alertmanager.url, 5).alerts) == 2, "both")
    assert incidents(rig)[1].answered is not None
    assert daemon.tick() == []
    assert incidents(rig)[1].answered is None
    assert jobs(daemon) == {"scale": 1, "observe": 1, "rollback": 1}
    assert current(rig).generation == 3
    servers.alertmanager.kill()  # with the alert that would last for an hour
    servers.alertmanager.start()


def suppressed(servers: Monitoring) -> list[str]:
    """By what each suppressed alert of the model is kept back."""
    listed = httpx.get(f"{servers.alertmanager.url}/api/v2/alerts", timeout=5).json()
    return [
        name
        for alert in listed
        if alert["labels"].get("model") == MODEL
        for name in ("silencedBy", "inhibitedBy")
        if alert["status"][name]
    ]
