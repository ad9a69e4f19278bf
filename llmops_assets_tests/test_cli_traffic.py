"""`llmops route`, `rollback` and `incident`: what is shown, asked, and answered by exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner, Result

from llmops_assets.cli import main
from llmops_assets.local import production
from llmops_assets.local.slots import port_file
from llmops_assets.operate import traffic
from llmops_assets.operate.incidents import Incident, report_incident
from llmops_assets.serving.slots import Colour, Environment, Slot
from llmops_assets.settings import get_settings

from .release_rig import MODEL, Rig, deploy, serving

GREEN = Slot(Environment.PRODUCTION, MODEL, Colour.GREEN)


@pytest.fixture(autouse=True)
def stack(rig: Rig, packages: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A state folder with a stack in it: version 1 is warm, version 2 serves."""
    settings = rig.platform.settings
    monkeypatch.setenv("LLMOPS_STATE", str(settings.state))
    names = ("webserver", "mlflow", "gateway", "staging-gateway", "code-server")
    port_file(settings).write_text(json.dumps({"ports": dict.fromkeys(names, 1)}))
    monkeypatch.setattr(production, "Platform", lambda settings: rig.platform)
    get_settings.cache_clear()
    deploy(rig, 1)
    deploy(rig, 2)
    yield
    get_settings.cache_clear()


def llmops(*arguments: str, typed: str | None = None) -> Result:
    result = CliRunner().invoke(main, arguments, input=typed)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_route_is_shown(rig: Rig) -> None:
    """Exit code 1 only when something is not as it is recorded."""
    shown = llmops("route", MODEL)
    assert shown.exit_code == 0, shown.output
    assert "production parrot: generation 2, the gateway uses it" in shown.output
    assert "green  100% serving      parrot.v2" in shown.output
    rig.platform.slots.crash(GREEN)
    shown = llmops("route", MODEL, "--json")
    assert shown.exit_code == 1
    document = json.loads(shown.stdout)
    assert [each["cure"] for each in document["differences"]] == ["llmops up"]
    assert document["slots"][1] == {
        "colour": "green", "release": "parrot.v2", "version": 2, "weight": 100, "running": False,
        "package": rig.deployment("parrot.v2", 2).package,
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [("--set", "parrot.v1"), ("--set", "parrot.v1=ten"), ("--set", "=10"),
     ("--set", "parrot.v1=50", "--set", "parrot.v1=50"), ("--set", "parrot.v1=²")],
)  # fmt: skip
def test_share_that_is_none(arguments: tuple[str, ...]) -> None:
    """A slip of the finger is no share."""
    assert llmops("route", MODEL, *arguments, "--reason", "why").exit_code == 2


def test_shares_are_asked_about_and_set(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing moves on no, on a dry run, or without a reason."""
    # Which gates there are is tested beside `plan_shares`.
    monkeypatch.setattr(traffic, "_check_may_serve", lambda *arguments: None)
    arguments = ("route", MODEL, "--set", "parrot.v1=10", "--set", "parrot.v2=90")
    assert "--set needs --reason" in llmops(*arguments).stderr
    rehearsal = llmops(*arguments, "--dry-run")
    assert rehearsal.exit_code == 0
    assert "parrot.v1 (version 1): 0 % -> 10 %" in rehearsal.output
    refused = llmops(*arguments, "--reason", "why", typed="n\n")
    assert refused.exit_code == 1
    assert rig.platform.routes.differences(Environment.PRODUCTION) == {}
    route, _ = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None and route.generation == 2
    done = llmops(*arguments, "--reason", "why", typed="y\n")
    assert done.exit_code == 0, done.output
    assert "generation 3, acknowledged by the gateway: parrot.v2 90 %, parrot.v1 10 %" in (
        done.output
    )
    document = llmops("route", MODEL, "--set", "parrot.v1=100", "--reason", "why", "--yes",
                      "--json").stdout  # fmt: skip
    assert json.loads(document)["generation"] == 4
    assert serving(rig) == 1


def test_rollback_is_rehearsed_and_done(rig: Rig) -> None:
    """The rehearsal says what and how; the real one who serves now."""
    rehearsal = llmops("rollback", MODEL, "--dry-run")
    assert rehearsal.exit_code == 0, rehearsal.output
    assert "take off and revoke parrot.v2 (version 2)" in rehearsal.output
    assert "parrot.v1 is warm: the route moves at once" in rehearsal.output
    assert "parrot.v1 had all traffic from " in rehearsal.output
    assert serving(rig) == 2
    done = llmops("rollback", MODEL, "--reason", "wrong dates")
    assert done.exit_code == 0, done.output
    assert "parrot.v1 serves parrot again: generation 3" in done.stdout
    # There is no Dagster here, and the traffic has moved all the same.
    assert "warning: Dagster does not show it" in done.stderr
    assert serving(rig) == 1
    again = llmops("rollback", MODEL, "--to", "2", "--reason", "I was wrong")
    assert again.exit_code == 2
    assert "revoked it" in again.stderr


def test_incidents_are_listed_noted_and_closed(rig: Rig) -> None:
    """Exit code 1 while one is open, for scripts that watch."""
    assert llmops("incident", "list").exit_code == 0
    report_incident(
        rig.platform.evidence,
        Incident(
            id="f00d@2026-03-01T12:00:00+00:00", model=MODEL, release="parrot.v2", what="slow",
            action=None, actor=None, detected=datetime.now(UTC), answered=None,
        ),
    )  # fmt: skip
    listed = llmops("incident", "list", MODEL)
    assert listed.exit_code == 1
    assert "open  parrot.v2: slow" in listed.output
    assert "noted on f00d@" in llmops("incident", "note", "f00d", "a noisy neighbour").output
    assert "closed f00d@" in llmops("incident", "close", "f00d", "--reason", "moved it").output
    assert llmops("incident", "list").output == ""
    (document,) = json.loads(llmops("incident", "list", "--all", "--json").stdout)
    assert [note["text"] for note in document["notes"]] == ["a noisy neighbour", "moved it"]
    assert document["seconds_to_detect"] is None
    assert llmops("incident", "close", "f00d", "--reason", "again").exit_code == 2
