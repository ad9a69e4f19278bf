"""A release that must not serve leaves the route, whatever does not answer at that moment."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from dagster import DagsterInstance

from llmops_assets.deploy import approval as approvals
from llmops_assets.deploy import assets, canary
from llmops_assets.deploy.approval import record_approval
from llmops_assets.deploy.canary import Canary
from llmops_assets.deploy.delivery import move, move_back
from llmops_assets.deploy.revocation import revoke
from llmops_assets.errors import GatewayError, SlotError, TriggerError
from llmops_assets.evidence.gates import CANARY
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import verdicts
from llmops_assets.operate.incidents import Incident, incidents_of
from llmops_assets.serving.metrics import ServiceSample
from llmops_assets.serving.request_contract import EMBEDDED
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Environment

from ..release_rig import ANSWERS, MODEL, SPEC, Rig, deploy, loaded, serving
from ..test_reporting import APPROVE, Runs, description, evaluations, failures

pytestmark = pytest.mark.timeout(120)
RELEASE = "parrot.v2"
STEPS = SPEC + "rollout: {steps: [{weight: 10, bake: 300ms}, {weight: 100}], longest: 2s}\n"


@pytest.fixture
def runs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """Release 1 serves, release 2 is in staging, and nothing is waited for long."""
    monkeypatch.setattr(assets, "BACK_OUT_SECONDS", 1.0)
    with DagsterInstance.ephemeral() as instance:
        runs = Runs(rig, instance)
        rig.build("parrot.v1", 1, STEPS)
        deploy(rig, 1)
        rig.build(RELEASE, 2, STEPS)
        assert runs.assets(RELEASE, "staging_deployment").success
        yield runs


def incidents(runs: Runs) -> tuple[Incident, ...]:
    return incidents_of(runs.rig.platform.evidence, MODEL, RELEASE).incidents


def generation(runs: Runs) -> int:
    route, _ = runs.rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    return route.generation


@pytest.mark.parametrize("error", [SlotError, GatewayError])
def test_what_does_not_answer_for_a_moment_is_asked_again(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, error: type[SlotError | GatewayError]
) -> None:
    """To empty the route because stable's slot was slow once would be an outage."""
    runs.rig.platform.gateway.answers_of[2] = {**ANSWERS, "ping": "pang"}
    tries: list[object] = []

    def flaky(*arguments: Any) -> Route:
        tries.append(arguments)
        if len(tries) == 1:
            raise error("Nobody answers", cure="wait")
        return move_back(*arguments)

    monkeypatch.setattr(assets, "move_back", flaky)
    assert not runs.job("promote", RELEASE, APPROVE).success
    assert serving(runs.rig) == 1
    assert incidents(runs)[0].action == "the route went back to parrot.v1"


def test_slot_that_stays_silent_gets_no_traffic(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the wait: no answer is better than a wrong one."""
    runs.rig.platform.gateway.answers_of[2] = {**ANSWERS, "ping": "pang"}

    def silent(*_: object) -> Route:
        raise SlotError("The slot does not answer", cure="wait")

    monkeypatch.setattr(assets, "move_back", silent)
    assert not runs.job("promote", RELEASE, APPROVE).success
    assert serving(runs.rig) is None
    assert "emptied" in str(incidents(runs)[0].action)


def test_route_that_was_recorded_and_refused_is_applied_by_the_next_try(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change would be a conflict with the first, and the release would stay."""
    gateway = runs.rig.platform.gateway
    gateway.answers_of[2] = {**ANSWERS, "ping": "pang"}

    def refused(*arguments: Any) -> Route:
        gateway.refuses = True
        try:
            return move_back(*arguments)
        finally:
            gateway.refuses = False

    monkeypatch.setattr(assets, "move_back", refused)
    result = runs.job("promote", RELEASE, APPROVE)
    assert evaluations(result)["canary"] is False
    assert serving(runs.rig) == 1
    assert incidents(runs)[0].action == "the route went back to parrot.v1"


def test_abort_that_the_gateway_does_not_take_is_on_record_and_ends_next_time(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict keeps the release from a second rollout; a new approval lets it have one."""
    gateway = runs.rig.platform.gateway
    gateway.answers_of[2] = {**ANSWERS, "ping": "pang"}
    back = assets.move_back

    def refused(*arguments: Any) -> Route:
        gateway.refuses = True
        return back(*arguments)

    monkeypatch.setattr(assets, "move_back", refused)
    result = runs.job("promote", RELEASE, APPROVE)
    assert evaluations(result)["canary"] is False
    assert "refused the routes" in description(result, "production_deployment")
    assert not verdicts(runs.rig.platform.evidence, RELEASE)[CANARY.name].passed
    (incident,) = incidents(runs)
    assert (incident.action, incident.answered) == (None, None)
    found = gateway.applied_routes[Environment.PRODUCTION][MODEL]
    assert {target.version: target.weight for target in found.targets} == {1: 90, 2: 10}

    monkeypatch.setattr(assets, "move_back", back)
    gateway.refuses = False
    gateway.answers_of.clear()
    before = generation(runs)
    again = runs.assets(RELEASE, "production_deployment")
    assert "nobody approved it since" in description(again, "production_deployment")
    applied = gateway.applied_routes[Environment.PRODUCTION][MODEL]
    assert {target.version: target.weight for target in applied.targets} == {1: 100}
    assert generation(runs) == before, "the recorded route was applied, and no other made"
    assert runs.job("promote", RELEASE, APPROVE).success
    assert serving(runs.rig) == 2


def test_failed_release_that_still_has_a_share_is_taken_off_next_time(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway was down, so not even a route was recorded."""
    runs.rig.platform.gateway.answers_of[2] = {**ANSWERS, "ping": "pang"}

    def down(*_: object) -> Route:
        raise GatewayError("The gateway does not answer", cure="start it")

    with monkeypatch.context() as patched:
        patched.setattr(assets, "move_back", down)
        assert not runs.job("promote", RELEASE, APPROVE).success
    again = runs.assets(RELEASE, "production_deployment")
    assert "nobody approved it since" in description(again, "production_deployment")
    route, _ = runs.rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    assert [target.version for target in route.targets] == [1]


def test_killed_rollout_of_a_rejected_release_is_taken_off(runs: Runs) -> None:
    """Nobody watches its share, and no later run may roll it out."""
    rig, platform = runs.rig, runs.rig.platform
    assert runs.job("promote", RELEASE, APPROVE).success
    route, _ = platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    # As a run leaves it that is killed at its first step.
    move_back(platform.routes, platform.slots, route, "sre", "to begin with")
    move(platform.routes, loaded(rig, 2), "run of before", "10 % of the traffic", weight=10)
    package = platform.columns.get(RELEASE, "packaged_model").artifact
    record_approval(platform, RELEASE, "carol", "reject", "wrong years", package)
    result = runs.assets(RELEASE, "production_deployment")
    assert "wrong years" in description(result, "production_deployment")
    current, _ = platform.routes.current(Environment.PRODUCTION, MODEL)
    assert current is not None
    assert [target.version for target in current.targets] == [1]
    assert "wrong years" in incidents(runs)[-1].what


@pytest.mark.parametrize("what", ["route", "revocation"])
def test_deployment_that_was_overtaken_is_not_recorded_as_done(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A rollback while the verdict is written down has the last word."""
    platform = runs.rig.platform
    decide = assets.decide

    def overtaken(*arguments: Any) -> Any:
        verdict = decide(*arguments)
        route, digest = platform.routes.current(Environment.PRODUCTION, MODEL)
        assert route is not None
        if what == "revocation":
            revoke(platform, RELEASE, "sre", "it smells")
        else:
            platform.routes.change(
                Environment.PRODUCTION, MODEL, (), actor="sre", reason="it smells",
                expected=digest,
            )  # fmt: skip
        return verdict

    monkeypatch.setattr(assets, "decide", overtaken)
    result = runs.job("promote", RELEASE, APPROVE)
    assert "it smells" in description(result, "production_deployment")
    assert platform.columns.find(RELEASE, "production_deployment") is None


@pytest.mark.parametrize("wrong", [False, True])
def test_slow_answer_of_what_alone_serves_empties_no_route(runs: Runs, wrong: bool) -> None:
    """A deployment repeated in a busy minute must not be an outage; a wrong answer is one."""
    rig, platform = runs.rig, runs.rig.platform
    assert runs.job("promote", RELEASE, APPROVE).success
    route, digest = platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    alone = [target for target in route.targets if target.weight]
    platform.routes.change(
        Environment.PRODUCTION, MODEL, alone, actor="sre", reason="room", expected=digest
    )
    if wrong:
        platform.gateway.answers_of[2] = {**ANSWERS, "ping": "pang"}
    else:
        platform.gateway.answers_of[2] = {}  # an error to every question
    assert not runs.assets(RELEASE, "production_deployment").success
    judged = verdicts(platform.evidence, RELEASE)[CANARY.name]
    (incident,) = incidents(runs)
    if wrong:
        assert judged.decision is Decision.FAILED
        assert serving(rig) is None
        return
    assert judged.decision is Decision.UNDECIDED
    assert serving(rig) == 2
    assert incident.answered is None
    platform.gateway.answers_of.clear()
    again = runs.assets(RELEASE, "production_deployment")
    assert again.success, failures(again)


def test_incident_was_detected_when_it_was(runs: Runs) -> None:
    """Counted from the start of the run, every abort would seem to have taken the whole bake."""
    began = datetime.now(UTC)
    runs.rig.platform.gateway.answers_of[2] = {}
    assert not runs.job("promote", RELEASE, APPROVE).success
    (incident,) = incidents(runs)
    judged = verdicts(runs.rig.platform.evidence, RELEASE)[CANARY.name]
    first_step = datetime.fromisoformat(judged.measured["steps"][0]["since"])
    assert began < first_step < incident.detected
    assert incident.decided is not None
    assert incident.detected < incident.decided


@pytest.fixture
def approved(rig: Rig) -> Rig:
    """Release 1 serves, and release 2 may follow."""
    for version in (1, 2):
        rig.freeze(f"parrot.v{version}", STEPS)
        rig.publish(f"parrot.v{version}", "packaged_model", {"package.json": f'{{"n": {version}}}'})
    rig.approve(RELEASE)
    deploy(rig, 1)
    return rig


def rolled_out(rig: Rig) -> canary.Outcome:
    rollout = Canary(rig.platform, loaded(rig, 2), EMBEDDED, "run 2")
    seen = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    return rollout.roll_out(seen, lambda _: None)


def test_repository_that_does_not_answer_for_a_moment_stops_no_rollout(
    approved: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who approved is asked there before each step."""
    asked: list[object] = []
    check = approvals.check_still_approved

    def flaky(*arguments: Any) -> object:
        asked.append(arguments)
        if len(asked) in (1, 3):
            raise TriggerError("git does not answer", cure="wait")
        return check(*arguments)

    monkeypatch.setattr(approvals, "check_still_approved", flaky)
    assert rolled_out(approved).passed
    assert len(asked) == 4


def test_repository_that_stays_silent_stops_the_rollout(
    approved: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows whether the release may go on."""
    vars(approved.platform)["settings"] = approved.platform.settings.model_copy(
        update={"git_timeout_seconds": 0.6}
    )

    def silent(*_: object) -> object:
        raise TriggerError("git does not answer", cure="wait")

    monkeypatch.setattr(approvals, "check_still_approved", silent)
    with pytest.raises(TriggerError):
        rolled_out(approved)


def test_clock_that_is_set_back_holds_no_step(
    approved: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's time is a duration; by the wall clock this one would last a day longer."""
    move_to = canary.move

    class Earlier(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) - timedelta(days=1)

    def moved(*arguments: Any) -> Route:
        route = move_to(*arguments)
        monkeypatch.setattr(canary, "datetime", Earlier)
        return route

    monkeypatch.setattr(canary, "move", moved)
    monkeypatch.setattr(Canary, "_all_answered", lambda *_: True)
    assert rolled_out(approved).passed


def test_server_that_was_started_anew_is_known_by_either_counter(approved: Rig) -> None:
    """With more requests than before, but fewer failures, the difference would be negative."""
    candidate = loaded(approved, 2)
    rollout = Canary(approved.platform, candidate, EMBEDDED, "run 2")
    rollout.roll_out(
        approved.platform.routes.current(Environment.PRODUCTION, MODEL), lambda _: None
    )
    step = next(iter(rollout._steps.values()))
    step.candidate = None
    for failed, succeeded in ((5, 5), (1, 19)):
        sample = ServiceSample(
            time=datetime.now(UTC), environment=Environment.PRODUCTION, model=MODEL, generation=2,
            version=2, inferences_failed=failed, inferences_succeeded=succeeded,
        )  # fmt: skip
        rollout._count(step, [sample])
    assert step.candidate is not None
    assert (step.candidate.hits, step.candidate.trials) == (1, 20)
