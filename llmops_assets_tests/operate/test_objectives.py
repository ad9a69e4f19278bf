"""Service objectives as alerts: what a window must show before anything is done."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from llmops_assets.operate.objectives import FEWEST_REQUESTS, WINDOW_SECONDS, Window, look
from llmops_assets.serving.metrics import ServiceSample
from llmops_assets.serving.routes import Route, RouteTarget
from llmops_assets.serving.slots import Colour, Environment
from llmops_assets.spec import ServiceGate

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
GATE = ServiceGate(error_rate=0.1)


def route(generation: int = 2, model: str = "parrot") -> Route:
    target = RouteTarget(
        colour=Colour.BLUE, weight=100, package="sha256:" + "0" * 64, release=f"{model}.v1",
        version=1, host="127.0.0.1", http_port=1, grpc_port=2, metrics_port=3,
    )  # fmt: skip
    return Route(
        environment=Environment.PRODUCTION, model=model, generation=generation, targets=(target,),
        actor="ada", reason="test", time=START + timedelta(seconds=generation),
        predecessor="sha256:" + "0" * 64,
    )  # fmt: skip


class Service:
    """A service whose counters a test sets, looked at as the sensor does."""

    def __init__(self) -> None:
        self.now = START
        self.route = route()
        self.gate = GATE
        self.measured: int | None = None
        """Generation that the reading is of; the route's by default."""
        self.gateway: tuple[int, int] | None = (0, 0)
        """Failed, all."""
        self.triton: tuple[int, int] | None = (0, 0)
        self.windows: dict[str, Window] = {}
        self.problems: tuple[str, ...] = ()

    def sample(self, environment: Environment, model: str) -> ServiceSample:
        absent = {"gateway: away": self.gateway, "Triton: away": self.triton}
        return ServiceSample(
            time=self.now,
            environment=environment,
            model=model,
            generation=self.measured or self.route.generation,
            failures=self.gateway and self.gateway[0],
            requests=self.gateway and self.gateway[1],
            inferences_failed=self.triton and self.triton[0],
            inferences_succeeded=self.triton and self.triton[1] - self.triton[0],
            missing=tuple(name for name, counts in absent.items() if counts is None),
        )

    def samples(self, environment: Environment, model: str) -> tuple[ServiceSample, ...]:
        return (self.sample(environment, model),)

    def serve(self, failed: int, total: int) -> None:
        """So many requests, which the gateway and Triton both see."""
        for source in ("gateway", "triton"):
            before = getattr(self, source)
            if before is not None:
                setattr(self, source, (before[0] + failed, before[1] + total))

    def breached(self, after: float = WINDOW_SECONDS) -> bool:
        """Looks after so many seconds."""
        self.now += timedelta(seconds=after)
        reading, windows = look(self, {"parrot": (self.route, self.gate)}, self.windows)
        # Between ticks they are JSON in the cursor.
        self.windows = {m: Window.model_validate_json(w.model_dump_json()) for m, w in
                        windows.items()}  # fmt: skip
        self.problems = reading.problems
        self.alerts = reading.alerts
        return bool(reading.alerts)


@pytest.fixture
def service() -> Service:
    service = Service()
    service.gateway = service.triton = (500, 1000)  # long ago
    assert not service.breached(0)
    return service


def test_failures_within_a_window_are_a_breach(service: Service) -> None:
    """And those of before are not: counters never forget."""
    service.serve(50, 100)
    assert not service.breached(WINDOW_SECONDS - 1)
    assert service.breached(1)
    (alert,) = service.alerts
    assert alert.labels["model"] == "parrot"
    assert alert.labels["release"] == "parrot.v1"
    assert alert.labels["environment"] == "production"
    assert alert.acts
    service.serve(0, 100)
    assert not service.breached()


@pytest.mark.parametrize(
    ("failed", "total", "breach"),
    [
        (10, 100, False),  # as the objective allows
        (15, 100, False),  # beyond it, and by chance once in twenty windows
        (40, 100, True),
        (3, 20, False),
        (20, 20, True),
        (FEWEST_REQUESTS - 1, FEWEST_REQUESTS - 1, False),
    ],
)
def test_interval_decides_and_not_the_point(
    service: Service, failed: int, total: int, breach: bool
) -> None:
    """A rollback for bad luck takes off good releases every day: there are 2,880 windows."""
    service.serve(failed, total)
    assert service.breached() is breach


def test_a_few_failures_a_day_at_the_objective_cause_nothing() -> None:
    """Wilson's interval at 95 % would alarm on 2 of 20, which a healthy service has daily."""
    service = Service()
    service.gate = ServiceGate(error_rate=0.01)
    service.breached(0)
    for failed in (2, 3, 4):
        service.serve(failed, 20)
        assert not service.breached(), failed


def test_quiet_service_is_measured_for_longer(service: Service) -> None:
    """Ten requests in half a minute that all fail are an outage of a small service."""
    service.serve(10, 10)
    assert not service.breached()
    service.serve(10, 10)
    assert service.breached()


def test_breach_lasts_through_a_quiet_time(service: Service) -> None:
    """Clients that give up are no recovery."""
    service.serve(100, 100)
    assert service.breached()
    for _ in range(3):
        assert service.breached()
    service.serve(0, 100)
    assert not service.breached()


def test_restarted_server_counts_from_nothing(service: Service) -> None:
    """A server that crashes and comes back all the time would otherwise never be judged."""
    service.gateway = None
    service.triton = (30, 30)  # 1000 before
    assert service.breached()
    service.triton = (0, 40)
    assert not service.breached()


def test_restart_of_one_does_not_hide_what_the_other_counted(service: Service) -> None:
    """Triton dies and the gateway answers 503."""
    service.serve(100, 100)
    service.triton = (0, 0)
    assert service.breached()


def test_another_generation_begins_anew(service: Service) -> None:
    """What came on the route is not judged by what was there before; its alert is another."""
    service.serve(100, 100)
    assert service.breached()
    (first,) = service.alerts
    service.route = route(3)
    service.gateway = service.triton = (0, 0)
    assert not service.breached()
    service.serve(100, 100)
    assert service.breached()
    (second,) = service.alerts
    assert first.id != second.id
    assert service.breached()
    assert [alert.id for alert in service.alerts] == [second.id]


def test_reading_of_a_route_that_moved_meanwhile_counts_for_nothing(service: Service) -> None:
    """The numbers are then of another release than the one that would be taken off."""
    service.serve(100, 100)
    service.measured = 3
    assert not service.breached()
    service.measured = None
    assert service.breached(0)


@pytest.mark.parametrize("away", ["gateway", "triton"])
def test_one_source_is_enough(service: Service, away: str) -> None:
    """Each sees failures that the other does not."""
    setattr(service, away, None)
    service.serve(50, 100)
    assert service.breached()
    assert service.problems == ()


def test_nobody_to_ask_is_a_problem_and_no_recovery(service: Service) -> None:
    """A breach must not count as over because the numbers are gone."""
    service.serve(100, 100)
    assert service.breached()
    service.gateway, service.triton, kept = None, None, service.gateway
    assert service.breached()
    assert service.problems == ("parrot: gateway: away; Triton: away",)
    service.gateway = kept
    service.serve(0, 100)
    assert not service.breached()
    assert service.problems == ()


def test_clock_put_back_neither_acts_nor_forgets(service: Service) -> None:
    """And put forward it only ends the window early."""
    service.serve(100, 100)
    assert service.breached()
    assert service.breached(-3600)
    service.serve(0, 100)
    assert not service.breached()
    service.serve(100, 100)
    assert service.breached(86400)


def test_impossible_counts_are_no_crash(service: Service) -> None:
    """Two counters are read one after the other: more may have failed than were asked."""
    service.serve(120, 100)
    assert service.breached()


def test_model_without_traffic_has_no_window() -> None:
    """Nothing is measured, and nothing is wrong."""
    service = Service()
    service.gateway = service.triton = None
    reading = look(service, {}, {"parrot": Window(generation=1, began=START, counts={})})
    assert reading[1] == {}
    assert reading[0].alerts == ()
