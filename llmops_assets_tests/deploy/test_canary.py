"""A rollout goes on while nothing speaks against it, stops at once, and survives its process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterInstance

from llmops_assets.deploy.approval import record_approval
from llmops_assets.deploy.canary import Canary, Outcome
from llmops_assets.deploy.delivery import move_back
from llmops_assets.deploy.revocation import revoke
from llmops_assets.errors import GatewayError, RefConflictError, SpecError
from llmops_assets.evidence.gates import CANARY
from llmops_assets.evidence.verdicts import verdicts
from llmops_assets.operate.incidents import incidents_of
from llmops_assets.serving.request_contract import EMBEDDED
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Environment
from llmops_assets.spec import parse_spec

from ..fakes import Behaviour, FakeTraffic
from ..release_rig import ANSWERS, MODEL, SPEC, Rig, deploy, loaded, serving
from ..test_reporting import APPROVE, Runs, description, evaluations

pytestmark = pytest.mark.timeout(120)
ROLLOUT = """\
rollout:
  steps: [{weight: 10, bake: 300ms}, {weight: 50, bake: 300ms}, {weight: 100, bake: 300ms}]
  minimum_requests: 20
"""
STEPS = SPEC + ROLLOUT


class KilledError(BaseException):
    """Stands for `kill -9`: nobody handles it."""


@pytest.fixture
def stepwise(rig: Rig) -> Rig:
    """Release 1 serves, and release 2 is to follow in three steps."""
    for version in (1, 2):
        rig.freeze(f"parrot.v{version}", STEPS)
        rig.publish(f"parrot.v{version}", "packaged_model", {"package.json": f'{{"n": {version}}}'})
    rig.approve("parrot.v2")
    deploy(rig, 1)
    return rig


@pytest.fixture
def traffic(stepwise: Rig) -> Iterator[FakeTraffic]:
    """Clients that ask for as long as the test runs."""
    with FakeTraffic(stepwise.platform.gateway, MODEL) as traffic:
        stepwise.platform.metrics.traffic = traffic
        yield traffic


def rolled_out(
    rig: Rig, moved: Callable[[Route], None] = lambda _: None, version: int = 2
) -> tuple[Canary, Outcome]:
    canary = Canary(rig.platform, loaded(rig, version), EMBEDDED, f"run {version}")
    seen = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    return canary, canary.roll_out(seen, moved)


def weights(rig: Rig) -> list[int]:
    """Release 2's share on every route, oldest first, since it came on it."""
    history = list(rig.platform.routes.history(Environment.PRODUCTION, MODEL))
    return [
        target.weight
        for _, route in reversed(history)
        for target in route.targets
        if target.version == 2
    ]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("[{weight: 50}, {weight: 10}, {weight: 100}]", "growing weights that end with 100"),
        ("[{weight: 10}]", "growing weights that end with 100"),
        ("[{weight: 100, bake: 2h}]", "longer than `longest`"),
        ("[{weight: 100, bake: soon}]", "rollout.steps"),
    ],
)
def test_steps_that_lead_nowhere_are_refused(steps: str, said: str) -> None:
    """Found while the spec is written, and not at 10 % of production's traffic."""
    with pytest.raises(SpecError, match=said):
        parse_spec(SPEC + f"rollout: {{steps: {steps}}}\n", "test")


def test_good_release_gets_all_traffic_step_by_step(stepwise: Rig, traffic: FakeTraffic) -> None:
    """The whole way, with what an auditor is shown of every step."""
    canary, outcome = rolled_out(stepwise)
    assert outcome.passed, outcome.reason
    assert weights(stepwise) == [10, 50, 100]
    assert serving(stepwise) == 2
    ten, fifty, all_of_it = canary.steps()
    assert ten.stable is not None
    assert 0.02 < ten.candidate.requests / (ten.candidate.requests + ten.stable.requests) < 0.25
    assert min(step.candidate.requests for step in (ten, fifty, all_of_it)) >= 20
    assert ten.candidate.probes == ten.candidate.probes_right > 0
    assert ten.candidate.duration_p95_ms
    assert fifty.candidate.inferences
    assert all_of_it.stable is not None
    assert all_of_it.stable.requests == 0
    judgement = canary.judgement(outcome)
    assert judgement.passed
    assert [step["ended_by"] for step in judgement.measured["steps"]] == ["time and requests"] * 3
    assert {finding.metric for finding in judgement.findings} >= {
        "failed requests", "slow requests", "failed inferences (Triton)",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("behaviour", "objective"),
    [
        pytest.param(Behaviour(error_rate=0.3), "failed requests", id="errors"),
        pytest.param(Behaviour(milliseconds=120), "slow requests", id="3 times slower"),
        pytest.param(
            Behaviour(stream_error_rate=0.3), "failed inferences (Triton)", id="inside a 200"
        ),
    ],
)
def test_bad_release_is_stopped(
    stepwise: Rig, traffic: FakeTraffic, behaviour: Behaviour, objective: str
) -> None:
    """Each shows in one source only; who does not look there would deploy it."""
    traffic.behaviours[2] = behaviour
    canary, outcome = rolled_out(stepwise)
    assert not outcome.passed
    assert objective in outcome.reason
    assert weights(stepwise) in ([10], [10, 50])
    assert canary.steps()[-1].ended_by == "an abort"
    assert not canary.judgement(outcome).passed


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        pytest.param({**ANSWERS, "ping": "pang"}, "'ping' gave 'pang' of version 2", id="nonsense"),
        pytest.param({}, "3 known questions in a row", id="none"),
    ],
)
def test_wrong_answer_stops_at_once(stepwise: Rig, answers: dict[str, str], said: str) -> None:
    """Nobody asks yet, and no statistics are needed: the right answer is known."""
    stepwise.platform.gateway.answers_of[2] = answers
    began = time.monotonic()
    _, outcome = rolled_out(stepwise)
    assert not outcome.passed
    assert said in outcome.reason
    assert weights(stepwise) == [10]
    assert time.monotonic() - began < 10


def test_without_traffic_known_questions_decide(rig: Rig) -> None:
    """A model that nobody asks at night must not hold the deployment for ever."""
    text = SPEC + (
        "rollout: {steps: [{weight: 10, bake: 100ms}, {weight: 100}], minimum_requests: 20, "
        "longest: 1s}\n"
    )
    for version in (1, 2):
        rig.freeze(f"parrot.v{version}", text)
        rig.publish(f"parrot.v{version}", "packaged_model", {"package.json": f'{{"n": {version}}}'})
    rig.approve("parrot.v2")
    deploy(rig, 1)
    canary, outcome = rolled_out(rig)
    assert outcome.passed
    assert [step.ended_by for step in canary.steps()] == ["known questions alone"] * 2


def test_first_release_gets_all_traffic_at_once(stepwise: Rig) -> None:
    """There is nothing that could take the rest."""
    route, digest = stepwise.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    stepwise.platform.routes.change(
        Environment.PRODUCTION, MODEL, (), actor="sre", reason="empty", expected=digest
    )
    with FakeTraffic(stepwise.platform.gateway, MODEL):
        _, outcome = rolled_out(stepwise)
    assert outcome.passed
    assert weights(stepwise) == [100]


@pytest.mark.parametrize("killed_at", [10, 50, 100])
def test_killed_process_is_followed_by_one_that_goes_on(
    stepwise: Rig, traffic: FakeTraffic, killed_at: int
) -> None:
    """At every step: the route stays as it was, and nothing that was seen is forgotten."""

    def kill(route: Route) -> None:
        if route.targets[0].weight == killed_at:
            raise KilledError

    with pytest.raises(KilledError):
        rolled_out(stepwise, kill)
    assert weights(stepwise)[-1] == killed_at
    time.sleep(0.2)
    canary, outcome = rolled_out(stepwise)
    assert outcome.passed, outcome.reason
    assert weights(stepwise) == [10, 50, 100]
    assert [step.candidate.weight for step in canary.steps()] == [10, 50, 100]
    assert all(step.candidate.requests for step in canary.steps())


def test_what_happened_while_nobody_watched_counts(stepwise: Rig) -> None:
    """A bad release whose rollout was killed is found out from the log, without more traffic."""
    with FakeTraffic(stepwise.platform.gateway, MODEL) as traffic:
        traffic.behaviours[2] = Behaviour(error_rate=0.3)

        def kill(_: Route) -> None:
            raise KilledError

        with pytest.raises(KilledError):
            rolled_out(stepwise, kill)
        time.sleep(1.0)
    _, outcome = rolled_out(stepwise)
    assert not outcome.passed
    assert "failed requests" in outcome.reason


def test_route_that_the_gateway_never_took_is_applied(stepwise: Rig, traffic: FakeTraffic) -> None:
    """Recorded, and then killed or refused: the next one brings the gateway to it."""
    stepwise.platform.gateway.refuses = True
    with pytest.raises(GatewayError):
        rolled_out(stepwise)
    stepwise.platform.gateway.refuses = False
    _, outcome = rolled_out(stepwise)
    assert outcome.passed
    assert weights(stepwise) == [10, 50, 100]


def test_rollback_ends_the_rollout(stepwise: Rig, traffic: FakeTraffic) -> None:
    """Whoever is faster, an alert or a person, has the last word about the route."""
    platform = stepwise.platform

    def roll_back(route: Route) -> None:
        if route.targets[0].weight == 10:
            undo = (platform.routes, platform.slots, route, "sre", "it smells")
            threading.Timer(0.3, move_back, undo).start()

    with pytest.raises(RefConflictError, match="by sre \\(it smells\\)"):
        rolled_out(stepwise, roll_back)
    assert weights(stepwise) == [10]
    assert serving(stepwise) == 1


def test_release_that_served_well_is_not_rolled_out_again(stepwise: Rig) -> None:
    """To deploy twice is harmless: it is asked the known questions, and that is all."""
    deploy(stepwise, 2)
    canary, outcome = rolled_out(stepwise)
    assert outcome.passed
    assert canary.proven
    assert weights(stepwise) == [100]


@pytest.fixture
def runs(rig: Rig) -> Iterator[Runs]:
    """Two releases in Dagster: the first serves, the second is approved and in its slot."""
    with DagsterInstance.ephemeral() as instance:
        runs = Runs(rig, instance)
        rig.build("parrot.v1", 1, STEPS)
        deploy(rig, 1)
        rig.build("parrot.v2", 2, STEPS)
        assert runs.assets("parrot.v2", "staging_deployment").success
        yield runs


def check_metadata(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    """What Dagster shows of the canary, by name."""
    (shown,) = [e for e in result.get_asset_check_evaluations() if e.check_name == CANARY.name]
    return dict(shown.metadata)


def test_bad_release_leaves_at_once_and_is_shown(runs: Runs) -> None:
    """In Dagster: the failed check with its picture, the incident, and stable serves again."""
    rig = runs.rig
    with FakeTraffic(rig.platform.gateway, MODEL) as traffic:
        rig.platform.metrics.traffic = traffic
        traffic.behaviours[2] = Behaviour(error_rate=0.3)
        result = runs.job("promote", "parrot.v2", APPROVE)
        last = max(moment for moment, version in traffic.sent if version == 2)
    assert not result.success
    assert evaluations(result)["canary"] is False
    assert "failed requests" in description(result, "production_deployment")
    assert serving(rig) == 1
    verdict = verdicts(rig.platform.evidence, "parrot.v2")["canary"]
    assert not verdict.passed
    assert verdict.measured["steps"][0]["candidate"]["weight"] == 10
    (incident,) = incidents_of(rig.platform.evidence, MODEL, "parrot.v2").incidents
    assert incident.action == "the route went back to parrot.v1"
    assert incident.answered is not None
    assert last <= incident.answered
    shown = check_metadata(result)
    assert shown["rollout"].value.startswith("![rollout](data:image/png;base64,")
    assert len(shown["steps"].records) >= 2


def test_release_without_a_verdict_does_not_serve(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What went wrong in the watching itself must not leave a release watched by nobody."""

    def lost(*_: object) -> None:
        raise GatewayError("Lines of the access log are gone", cure="none")

    monkeypatch.setattr(Canary, "_watch", lost)
    result = runs.job("promote", "parrot.v2", APPROVE)
    assert "Lines of the access log are gone" in description(result, "production_deployment")
    assert serving(runs.rig) == 1
    (incident,) = incidents_of(runs.rig.platform.evidence, MODEL, "parrot.v2").incidents
    assert "no verdict: Lines of the access log" in incident.what


@pytest.mark.parametrize("how", ["rejected", "revoked"])
def test_release_that_is_not_approved_any_more_goes_no_further(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A person's no at 10 % of the traffic must not wait until the release has all of it."""
    rig, platform = runs.rig, runs.rig.platform
    package = platform.columns.get("parrot.v2", "packaged_model").artifact

    def take_back(*_: object) -> None:
        if how == "rejected":
            record_approval(platform, "parrot.v2", "bob", "reject", "wrong years", package)
        else:
            revoke(platform, "parrot.v2", "sre", "wrong years")

    # In place of watching the step.
    monkeypatch.setattr(Canary, "_watch", take_back)
    result = runs.job("promote", "parrot.v2", APPROVE)
    assert not result.success
    assert "wrong years" in description(result, "production_deployment")
    assert weights(rig) == [10]
    assert serving(rig) == 1
    (incident,) = incidents_of(platform.evidence, MODEL, "parrot.v2").incidents
    assert incident.action == "the route went back to parrot.v1"
    assert "wrong years" in incident.what
    assert incident.decided is not None
    assert incident.restored is not None
    assert incident.detected < incident.decided <= incident.restored
