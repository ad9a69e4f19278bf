"""A rollout through a real Envoy, under load: bad releases leave in time, nobody is harmed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

import httpx
import pytest

from llmops_assets.deploy.canary import Canary
from llmops_assets.deploy.delivery import LoadedPackage, move_back
from llmops_assets.deploy.stop_rule import Request, StopRule
from llmops_assets.serving.metrics import LocalMetrics
from llmops_assets.serving.request_contract import EMBEDDED
from llmops_assets.serving.routes import RouteTarget
from llmops_assets.serving.slots import Environment

from ..fakes import DELIBERATE, Behaviour
from ..release_rig import MODEL, SPEC, PlatformOnDoubles, Rig, deploy, loaded
from ..serving import envoy_rig

pytestmark = pytest.mark.timeout(120)
STEPS = SPEC + (
    "rollout: {steps: [{weight: 10, bake: 2s}, {weight: 50, bake: 2s}, {weight: 100, bake: 2s}]}\n"
)
USUAL = Behaviour(milliseconds=15)
CLIENTS = 5


class PlatformWithEnvoy(PlatformOnDoubles):
    """Doubles of slots behind a real gateway."""

    @property
    def gateway_url(self) -> str:
        return vars(self)["base"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Rig]:
    """Release 1 serves through Envoy."""
    rig = Rig(tmp_path / "rig")
    with envoy_rig.rig(tmp_path / "envoy") as envoy:
        platform = PlatformWithEnvoy(rig.platform.settings)
        parts = {"gateway": envoy.gateway, "base": envoy.base()}
        vars(platform).update(parts)
        vars(platform)["metrics"] = LocalMetrics(platform.routes, envoy.gateway.admin, 5)
        rig.platform = platform
        for version in (1, 2, 3):
            rig.freeze(f"parrot.v{version}", STEPS)
            content = {"package.json": f'{{"n": {version}}}'}
            rig.publish(f"parrot.v{version}", "packaged_model", content)
            rig.approve(f"parrot.v{version}")
        platform.slots.behaviours = dict.fromkeys((1, 2, 3), USUAL)
        deploy(rig, 1)
        yield rig
        platform.slots.close()


@dataclass
class Load:
    """Clients that keep their connections, and ask whole and streamed answers in turn."""

    url: str
    answers: list[tuple[datetime, str, int, str]] = field(default_factory=list)
    """When it was asked, version, status, and the body of what is no 200."""
    broken: list[str] = field(default_factory=list)
    """Requests without an answer."""

    def __enter__(self) -> Self:
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=10)

    def _ask(self) -> None:
        calls = 0
        with httpx.Client(base_url=self.url, timeout=10, trust_env=False, verify=False) as client:
            while not self._stopped.is_set():
                calls += 1
                stream = calls % 2 == 0
                asked = datetime.now(UTC)
                body = {"text_input": "hello", "max_tokens": 12, "stream": stream}
                call = "generate_stream" if stream else "generate"
                try:
                    answer = client.post(f"/v2/models/{MODEL}/{call}", json=body)
                except httpx.HTTPError as error:
                    self.broken.append(repr(error))
                    continue
                version = answer.headers.get("x-llmops-version", "none")
                text = "" if answer.status_code == 200 else answer.text
                self.answers.append((asked, version, answer.status_code, text))
                time.sleep(0.01)

    def not_on_purpose(self) -> list[str]:
        """Failures that no release is to blame for."""
        return self.broken + [
            text for _, _, status, text in self.answers if status != 200 and DELIBERATE not in text
        ]


def rule_satisfied(rig: Rig, version: int) -> datetime | None:
    """When the access log, read line by line, first had enough to stop a version's rollout."""
    rollout = rig.platform.spec(f"parrot.v{version}").rollout
    rule = StopRule(rollout.objectives, rollout.false_abort_rate)
    shares = {
        route.generation: target.weight / 100
        for _, route in rig.platform.routes.history(Environment.PRODUCTION, MODEL)
        for target in route.targets
        if target.version == version
    }
    log = rig.platform.gateway.access_log
    for call in log.read(log.start()).calls:
        if call.generation in shares and not call.pinned and not call.cancelled:
            rule.requests([
                Request(
                    candidate=call.version == version,
                    share=shares[call.generation],
                    failed=call.failed,
                    refused=400 <= call.status < 500,
                    duration_ms=call.duration_ms,
                    first_byte_ms=call.first_byte_ms,
                )
            ])  # fmt: skip
        if rule.stopped:
            return call.time + timedelta(milliseconds=call.duration_ms)
    return None


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(Behaviour(milliseconds=15, error_rate=0.25), id="errors"),
        pytest.param(Behaviour(milliseconds=90), id="slow"),
    ],
)
def test_bad_release_is_off_within_two_seconds(served: Rig, behaviour: Behaviour) -> None:
    """From the line of the log that decides to the last request that the release gets."""
    platform = served.platform
    platform.slots.behaviours[2] = behaviour
    with Load(platform.gateway_url) as load:
        time.sleep(1.0)
        canary = Canary(platform, loaded(served, 2), EMBEDDED, "run 2")
        seen = platform.routes.current(Environment.PRODUCTION, MODEL)
        outcome = canary.roll_out(seen, lambda _: None)
        assert not outcome.passed
        back = move_back(platform.routes, platform.slots, outcome.route, "run 2", outcome.reason)
        time.sleep(1.0)
    decided = rule_satisfied(served, 2)
    bad = [asked for asked, version, _, _ in load.answers if version == "2"]
    assert decided is not None, outcome.reason
    delay = (max(bad) - decided).total_seconds()
    print(f"{outcome.reason}\n{len(bad)} of {len(load.answers)} requests went to the bad release; "
          f"the last one {delay:.2f} s after the rule was satisfied")  # fmt: skip
    assert back.serving is not None
    assert back.serving.version == 1
    assert delay <= 2.0
    assert not load.not_on_purpose()


def kill_rollout(rig: Rig, candidate: LoadedPackage, weight: int) -> None:
    """Runs a rollout in a process of its own and kills it when the candidate has a share."""
    platform = rig.platform
    process = subprocess.Popen(
        [
            sys.executable, "-m", "llmops_assets_tests.deploy.rollout_process",
            platform.settings.model_dump_json(), str(vars(platform)["gateway"].folder),
            platform.gateway_url, candidate.model_dump_json(),
        ],
    )  # fmt: skip
    deadline = time.monotonic() + 20
    try:
        while candidate.target.model_copy(update={"weight": weight}) not in targets(rig):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait(timeout=10)


def targets(rig: Rig) -> tuple[RouteTarget, ...]:
    route, _ = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    return route.targets


def test_good_release_gets_there_though_its_rollout_is_killed_at_every_step(served: Rig) -> None:
    """`kill -9` at 10, 50 and 100 %, under load: not one request fails, none is forgotten."""
    platform = served.platform
    candidate = loaded(served, 3)
    with Load(platform.gateway_url) as load:
        for weight in (10, 50, 100):
            kill_rollout(served, candidate, weight)
        canary = Canary(platform, candidate, EMBEDDED, "run 3")
        seen = platform.routes.current(Environment.PRODUCTION, MODEL)
        outcome = canary.roll_out(seen, lambda _: None)
        time.sleep(0.5)
    assert outcome.passed, outcome.reason
    steps = [step.candidate for step in canary.steps()]
    assert [step.weight for step in steps] == [10, 50, 100]
    assert all(step.requests for step in steps)
    print(outcome.reason, Counter(version for _, version, _, _ in load.answers))
    assert load.answers[-1][1] == "3"
    assert not load.not_on_purpose()
