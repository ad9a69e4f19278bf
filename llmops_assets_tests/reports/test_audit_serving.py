"""What served at a time: through changes, at the very instant of one, and before the first."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from llmops_assets.deploy.delivery import take_off
from llmops_assets.errors import EvidenceError, SettingsError
from llmops_assets.operate.rollback import roll_back
from llmops_assets.reports.serving_at import ServingAt, lines, read_time, serving_at
from llmops_assets.serving.routes import RouteTarget
from llmops_assets.serving.slots import Colour, Environment

from ..release_rig import MODEL, Rig, deploy

PRODUCTION = Environment.PRODUCTION
TICK = timedelta(microseconds=1)

pytestmark = pytest.mark.usefixtures("packages")


def at(rig: Rig, time: datetime) -> ServingAt:
    return serving_at(rig.platform, PRODUCTION, MODEL, time)


def served(found: ServingAt) -> list[tuple[str, int]]:
    return [(share.release, share.weight) for share in found.serving]


def changes(rig: Rig) -> list[datetime]:
    """Times of all changes of the route, as the log has them."""
    chain = f"routes/production/{MODEL}"
    return [entry.time for entry in rig.platform.evidence.entries(chain)]


def test_a_change_is_in_force_from_its_own_instant_on(rig: Rig) -> None:
    """Half-open times: every instant has one answer, and never two."""
    deploy(rig, 1)
    deploy(rig, 2)
    first, second = changes(rig)
    assert at(rig, first - TICK).serving == ()
    assert served(at(rig, first)) == [("parrot.v1", 100)]
    assert served(at(rig, second - TICK)) == [("parrot.v1", 100)]
    assert served(at(rig, second)) == [("parrot.v2", 100)]
    assert [share.release for share in at(rig, second).warm] == ["parrot.v1"]


def test_since_and_until_name_who_and_why(rig: Rig) -> None:
    """The auditor's next question, answered with the first."""
    deploy(rig, 1)
    deploy(rig, 2)
    first, second = changes(rig)
    found = at(rig, first)
    assert found.moved is not None
    assert found.ended is not None
    assert (found.moved.time, found.moved.actor) == (first, "ada")
    assert (found.ended.time, found.ended.reason) == (second, "deploying v2")
    assert at(rig, second).ended is None
    before = at(rig, first - TICK)
    assert before.moved is None
    assert before.ended is not None
    assert before.ended.time == first
    package = rig.platform.columns.get("parrot.v1", "packaged_model").artifact
    assert found.serving[0].package == package


def test_change_that_leaves_the_traffic_alone_does_not_end_it(rig: Rig) -> None:
    """What is warm comes and goes; to users nothing changed."""
    deploy(rig, 1)
    deploy(rig, 2)
    route, digest = rig.platform.routes.current(PRODUCTION, MODEL)
    assert route is not None
    kept = tuple(target for target in route.targets if target.weight)
    rig.platform.routes.change(PRODUCTION, MODEL, kept, actor="ada", reason="room", expected=digest)
    _, moved, tidied = changes(rig)
    found = at(rig, tidied)
    assert found.moved is not None
    assert (found.moved.time, found.moved.generation, found.ended) == (moved, 2, None)
    assert at(rig, moved).ended is None


def test_rollback_and_an_emptied_route(rig: Rig) -> None:
    """The nights that are asked about are those with a rollback in them."""
    deploy(rig, 1)
    deploy(rig, 2)
    roll_back(rig.platform, MODEL, "sre", "wrong dates")
    route, _ = rig.platform.routes.current(PRODUCTION, MODEL)
    assert route is not None
    take_off(rig.platform.routes, route, "sre", "all of it is wrong")
    _, _, back, emptied = changes(rig)
    found = at(rig, back)
    assert served(found) == [("parrot.v1", 100)]
    assert found.moved is not None
    assert (found.moved.actor, found.moved.reason) == ("sre", "wrong dates")
    nothing = at(rig, emptied)
    assert nothing.serving == ()
    assert nothing.moved is not None
    assert nothing.moved.reason == "all of it is wrong"
    assert "  nothing had traffic" in lines(nothing)


def test_shared_traffic_names_both(rig: Rig) -> None:
    """During a canary two releases answer; either may have given the answer asked about."""
    deploy(rig, 1)
    route, digest = rig.platform.routes.current(PRODUCTION, MODEL)
    assert route is not None
    old = route.targets[0].model_copy(update={"weight": 90})
    deployment = rig.deployment("parrot.v2", 2)
    new = RouteTarget(
        **{**old.model_dump(), "colour": Colour.GREEN, "weight": 10, "release": "parrot.v2",
           "version": 2, "package": deployment.package}
    )  # fmt: skip
    rig.platform.routes.change(
        PRODUCTION, MODEL, (new, old), actor="ada", reason="canary", expected=digest
    )
    found = at(rig, changes(rig)[-1])
    assert served(found) == [("parrot.v1", 90), ("parrot.v2", 10)]
    assert [command.split()[2] for command in found.commands] == ["parrot.v1", "parrot.v2"]


def test_each_environment_and_model_has_its_own(rig: Rig) -> None:
    """Staging's traffic is nobody's production."""
    deploy(rig, 1)
    now = datetime.now(UTC)
    with pytest.raises(EvidenceError, match=r"parrot never had a route in staging.*none was"):
        serving_at(rig.platform, Environment.STAGING, MODEL, now)
    # A mistyped name must not be answered with "nothing had traffic".
    with pytest.raises(EvidenceError, match=r"never had a route in production.* there: parrot\."):
        serving_at(rig.platform, PRODUCTION, "parot", now)


@pytest.mark.parametrize(
    "text", ["2026-11-17T14:05:00Z", "2026-11-17 15:05+01:00", "2026-11-17T14:05+00:00"]
)
def test_times_with_a_zone(text: str) -> None:
    """People copy times out of mails, logs and dashboards."""
    assert read_time(text) == datetime(2026, 11, 17, 14, 5, tzinfo=UTC)


def test_times_without_a_zone_are_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "Last Tuesday at 14:05" is meant where it was said."""
    import time

    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert read_time("2026-11-17 14:05") == datetime(2026, 11, 17, 13, 5, tzinfo=UTC)
        assert read_time("2026-07-17 14:05") == datetime(2026, 7, 17, 12, 5, tzinfo=UTC)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "14:05", "0001-01-01"])
def test_what_is_no_time_is_an_error(text: str) -> None:
    """A stack trace would not say how to write it."""
    with pytest.raises(SettingsError, match="ISO 8601"):
        read_time(text)
