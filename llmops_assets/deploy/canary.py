"""A rollout: a candidate's share of the traffic grows step by step, and is watched.

What is watched is the gateway's access log, Triton's own counters, and the answers to known
questions, of the candidate and of stable, the release that served before. The rule that
stops it is in `stop_rule`.

A rollout has no state but the route and the access log. One that was cut off leaves the
route as it is, and the next goes on at the step that the route is at: it reads the log of
all its steps again, so that the rule knows what it knew. The time of a step that nobody
watched counts, for the log has its requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from llmops_assets.deploy import approval as approvals
from llmops_assets.deploy.background import Background
from llmops_assets.deploy.delivery import LoadedPackage, Seen, deployment_of, move, warm
from llmops_assets.deploy.smoke import Answer, ask_known, ask_one, judge_smoke
from llmops_assets.deploy.stop_rule import Request, StopRule, Tally, Test, p95
from llmops_assets.errors import RefConflictError, TriggerError
from llmops_assets.evidence.gates import CANARY
from llmops_assets.evidence.statistics import Decision, Record
from llmops_assets.evidence.verdicts import Finding, Judgement, Verdict, all_verdicts
from llmops_assets.platform import Platform
from llmops_assets.serving.access_log import Call, Position
from llmops_assets.serving.metrics import ServiceSample
from llmops_assets.serving.request_contract import RequestContract
from llmops_assets.serving.routes import Route, RouteTarget
from llmops_assets.spec import RolloutStep, duration_seconds

LOOK_SECONDS = 0.5
"""Between two looks. The gateway's log is up to half a second behind besides."""
PROBE_SECONDS = 1.0
"""Between two rounds of known questions; it bounds what the platform itself asks."""
UNANSWERED_QUESTIONS = 3
"""In a row, and the candidate does not answer. One alone may be an error that is allowed."""

EndedBy = Literal["time and requests", "known questions alone", "an abort"]


class Figures(Record):
    """How one release did in one step. Times are milliseconds, of whole answers only."""

    release: str
    version: int
    weight: int
    """Share of the traffic, per cent."""
    requests: int
    """Of clients; those that they cancelled are left out."""
    failures: int
    refusals: int
    duration_p95_ms: float | None
    first_byte_p95_ms: float | None
    inferences: int | None
    """Of Triton's counters, the platform's own questions included; None if they were not read."""
    failed_inferences: int | None
    probes: int
    """Known questions asked of exactly this version."""
    probes_right: int


class StepFigures(Record):
    """One step of a rollout."""

    generation: int
    """Of the route."""
    since: datetime
    until: datetime
    ended_by: EndedBy
    candidate: Figures
    stable: Figures | None
    """None where nothing served before."""


@dataclass(frozen=True)
class Outcome:
    """How a rollout ended."""

    route: Route
    """As the rollout left it. After an abort the candidate still has its share."""
    passed: bool
    reason: str
    answers: tuple[Answer, ...] = ()
    """To the known questions, asked as clients ask; none after an abort before the end."""
    smoke: Judgement | None = None
    """Of these answers."""
    stays: bool = False
    """Not passed, and yet no reason to take it off: it is proven, and nothing answered wrong."""


@dataclass(frozen=True, slots=True)
class Served:
    """One request of a client, of those that the route's weights gave to one of the two."""

    time: datetime
    generation: int
    candidate: bool
    failed: bool
    refused: bool
    duration_ms: int
    first_byte_ms: int | None

    @property
    def answered(self) -> bool:
        """Whether it got what it asked for."""
        return not self.failed and not self.refused


@dataclass(frozen=True)
class _Probe:
    """A known question that was asked of one version."""

    asked: datetime
    candidate: bool
    answer: Answer
    right: bool

    @property
    def words(self) -> str:
        if self.answer.problem is not None:
            return f"{self.answer.prompt!r} gave no answer: {self.answer.problem}"
        return (
            f"{self.answer.prompt!r} gave {self.answer.answer!r} of version "
            f"{self.answer.version}, not {self.answer.expected!r}"
        )


@dataclass
class _Step:
    """A step as it goes on."""

    route: Route
    weight: int
    """Of the candidate."""
    until: datetime | None = None
    ended_by: EndedBy = "an abort"
    requests: int = 0
    """Of clients to the candidate."""
    candidate: Tally | None = None
    """Failed inferences among all, as Triton counts them."""
    stable: Tally | None = None
    probes: list[_Probe] = field(default_factory=list)

    def end(self, by: EndedBy) -> None:
        self.until = datetime.now(UTC)
        self.ended_by = by


class Canary:
    """One rollout of a candidate that is loaded in production's idle slot."""

    def __init__(
        self, platform: Platform, candidate: LoadedPackage, contract: RequestContract, actor: str
    ) -> None:
        """
        Args:
            platform: where.
            candidate: loaded and proven in its slot.
            contract: of the candidate's package.
            actor: who or what changes the route.
        """
        self.route: Route | None = None
        """The newest that this rollout found or made."""
        self.proven = False
        """Whether the candidate has had all traffic, and found well, before this rollout."""
        self.served: list[Served] = []
        """What clients asked in this rollout."""
        self._platform = platform
        self._candidate = candidate
        self._contract = contract
        self._actor = actor
        self._release = candidate.deployment.release
        self._spec = platform.spec(self._release)
        self._rollout = self._spec.rollout
        self._rule = StopRule(self._rollout.objectives, self._rollout.false_abort_rate)
        self._log = platform.gateway.access_log
        self._position: Position | None = None
        self._seen: Seen = (None, None)
        self._steps: dict[int, _Step] = {}
        """By the generation of the route."""
        self._counters: dict[int, Tally] = {}
        """Triton's, by version, as read last."""
        self._last: list[_Probe] = []
        """Of the candidate; those without an answer at the end are in a row."""

    def roll_out(self, seen: Seen, moved: Callable[[Route], None]) -> Outcome:
        """Moves the route step by step, as long as nothing speaks against it.

        It does not take the candidate off. The caller does so, at once when the outcome is
        bad, and knows what an error means.

        Args:
            seen: the route that it was decided to change.
            moved: is told of the route of every step.

        Raises:
            ApprovalError: the release is not approved any more.
            LifecycleOrderError, SpecError, TriggerError: that cannot be found out.
            RefConflictError: somebody else changed the route; theirs stands.
            GatewayError: the gateway did not take a route, or lines of its log are lost.
            EvidenceError: a route could not be signed.
        """
        left = self._begin(seen)
        with (
            Background(self._ask_round, PROBE_SECONDS) as probes,
            Background(self._read_counters, LOOK_SECONDS) as counters,
        ):
            for step in left:
                # It may have been rejected or revoked while the step before it was watched.
                self._check_approved()
                now = self._move(step.weight, moved)
                if not self._watched(step):
                    now.end("time and requests")
                    continue
                probes.start()
                counters.start()
                complaint = self._watch(step, now, probes, counters)
                if complaint is not None:
                    now.end("an abort")
                    return self._aborted(f"at {step.weight} % of the traffic: {complaint}")
        return self._end()

    def judgement(self, outcome: Outcome) -> Judgement:
        """The outcome with everything that was measured."""
        tests = self._rule.tests
        measured = {} if outcome.smoke is None else outcome.smoke.measured
        threshold = {} if outcome.smoke is None else outcome.smoke.threshold
        return Judgement(
            decision=Decision.UNDECIDED if outcome.stays else Decision.of(outcome.passed),
            measured={
                **measured,
                "steps": [step.model_dump(mode="json") for step in self.steps()],
                "tests": [test.model_dump(mode="json") for test in tests],
            },
            threshold={
                **threshold,
                "objectives": self._rollout.objectives.model_dump(mode="json"),
                "false_abort_rate": self._rollout.false_abort_rate,
                "minimum_requests": self._rollout.minimum_requests,
            },
            reason=outcome.reason,
            findings=tuple(_finding(test) for test in tests if test.trials),
        )

    def steps(self) -> tuple[StepFigures, ...]:
        """What is known of every step, those before an interruption included."""
        return tuple(self._figures(step) for step in self._steps.values())

    def _begin(self, seen: Seen) -> Sequence[RolloutStep]:
        """The steps that are left."""
        self._seen = seen
        self.route, _ = seen
        targets = () if self.route is None else self.route.targets
        weight = next((target.weight for target in targets if self._is_candidate(target)), 0)
        if weight == 100 and self._passed_before():
            self.proven = True
            return self._rollout.steps[-1:]
        self._position = self._log.start() if weight else self._log.end()
        if weight:
            self._remember()
        beside = any(target.weight and not self._is_candidate(target) for target in targets)
        if not beside:
            return self._rollout.steps[-1:]  # nothing could have the rest of the traffic
        return [step for step in self._rollout.steps if step.weight >= weight]

    def _passed_before(self) -> bool:
        judged = failed_or_passed(self._platform, self._release)
        package = self._candidate.deployment.package
        return judged is not None and judged.passed and package in judged.subjects.values()

    def _check_approved(self) -> None:
        """
        Raises:
            ApprovalError, LifecycleOrderError, SpecError, EvidenceError: it is not.
            TriggerError: nobody could say so for as long as git may take.
        """
        late = time.monotonic() + self._platform.settings.git_timeout_seconds
        while True:
            try:
                approvals.check_still_approved(self._platform, self._release)
            except TriggerError:
                if time.monotonic() >= late:
                    raise
            else:
                return
            if self.route is not None:
                self.check_undisturbed()
            time.sleep(LOOK_SECONDS)

    def _remember(self) -> None:
        """The steps of a rollout that was cut off."""
        earlier: list[Route] = []
        history = self._platform.routes.history(self._candidate.environment, self._candidate.model)
        for _, route in history:
            if not self._weight_on(route):
                break
            earlier.insert(0, route)
        for route, after in zip(earlier, [*earlier[1:], None], strict=True):
            step = _Step(route, self._weight_on(route))
            if after is not None:
                step.until, step.ended_by = after.time, "time and requests"
            self._steps[route.generation] = step

    def _move(self, weight: int, moved: Callable[[Route], None]) -> _Step:
        reason = f"deploying {self._release}"
        if weight < 100:
            reason += f", {weight} % of the traffic"
        route = move(
            self._platform.routes, self._candidate, self._actor, reason, self._seen, weight
        )
        self.route = route
        self._seen = self._platform.routes.current(route.environment, route.model)
        step = self._steps.setdefault(route.generation, _Step(route, weight))
        self.check_undisturbed()
        moved(route)
        return step

    def _watched(self, step: RolloutStep) -> bool:
        """Whether there is anything to wait for."""
        waits = duration_seconds(step.bake) > 0 or self._rollout.minimum_requests > 0
        return waits and not self.proven

    def _watch(
        self,
        step: RolloutStep,
        now: _Step,
        probes: Background[_Probe],
        counters: Background[Sequence[ServiceSample]],
    ) -> str | None:
        """Waits until a step has had its time and requests; returns what speaks against it."""
        # By the clock that nobody sets; the other one only says how long it was not watched.
        entered = time.monotonic()
        passed = max((datetime.now(UTC) - now.route.time).total_seconds(), 0.0)
        baked = entered + duration_seconds(step.bake) - passed
        late = entered + duration_seconds(self._rollout.longest)
        while True:
            self._look(now, probes.news(), counters.news())
            if (complaint := self._complaint()) is not None:
                return complaint
            enough = now.requests >= self._rollout.minimum_requests
            too_late = time.monotonic() >= late
            answered = self._all_answered(now)
            if too_late and not answered:
                return f"not every known question was answered within {self._rollout.longest}"
            if time.monotonic() >= baked and answered and (enough or too_late):
                now.end("time and requests" if enough else "known questions alone")
                return None
            time.sleep(LOOK_SECONDS)
            self.check_undisturbed()

    def _look(
        self,
        step: _Step,
        probes: Sequence[_Probe],
        counters: Sequence[Sequence[ServiceSample]],
    ) -> None:
        """Feeds the rule with what is new."""
        self._read_log()
        for samples in counters:
            self._count(step, samples)
        step.probes += probes
        for probe in probes:
            if probe.candidate:
                self._last = [*self._last, probe][-UNANSWERED_QUESTIONS:]
                if probe.answer.problem is None:
                    self._rule.probes(Tally(int(not probe.right), 1))

    def _read_log(self) -> None:
        if self._position is None:
            return
        reading = self._log.read(self._position)
        self._position = reading.position
        for call in reading.calls:
            if (step := self._step_of(call)) is not None:
                served = self._served(call)
                step.requests += served.candidate
                self.served.append(served)
                self._rule.requests([
                    Request(
                        candidate=served.candidate,
                        share=step.weight / 100,
                        failed=served.failed,
                        refused=served.refused,
                        duration_ms=served.duration_ms,
                        first_byte_ms=served.first_byte_ms,
                    )
                ])  # fmt: skip

    def _step_of(self, call: Call) -> _Step | None:
        """The step that a call was part of; None for one that no weight decided about."""
        about = (self._candidate.environment, self._candidate.model)
        if (call.environment, call.model) != about or call.slot is None or call.generation is None:
            return None
        # What its client cancelled says nothing of who answered it.
        return None if call.pinned or call.cancelled else self._steps.get(call.generation)

    def _served(self, call: Call) -> Served:
        candidate = self._candidate.deployment
        assert call.generation is not None  # or it is in no step
        return Served(
            time=call.time,
            generation=call.generation,
            candidate=(call.release, call.version) == (candidate.release, candidate.version),
            failed=call.failed,
            refused=400 <= call.status < 500,
            duration_ms=call.duration_ms,
            first_byte_ms=call.first_byte_ms,
        )

    def _count(self, step: _Step, samples: Sequence[ServiceSample]) -> None:
        """What Triton counted since it was asked before. The first look only sets the zero."""
        new: dict[int, Tally] = {}
        for sample in samples:
            failed, succeeded = sample.inferences_failed, sample.inferences_succeeded
            if sample.version is None or failed is None or succeeded is None:
                continue
            now = Tally(failed, failed + succeeded)
            before = self._counters.get(sample.version, now)
            if now.trials < before.trials or now.hits < before.hits:
                before = Tally()  # the server was started anew
            self._counters[sample.version] = now
            new[sample.version] = Tally(now.hits - before.hits, now.trials - before.trials)
        candidate = new.pop(self._candidate.deployment.version, None)
        if candidate is None:
            return
        stable = next(iter(new.values()), None)
        self._rule.inferences(candidate, stable)
        step.candidate = (step.candidate or Tally()) + candidate
        if stable is not None:
            step.stable = (step.stable or Tally()) + stable

    def _complaint(self) -> str | None:
        """Why the rollout must stop; None if it need not."""
        unanswered = [probe for probe in self._last if probe.answer.problem is not None]
        if len(unanswered) == UNANSWERED_QUESTIONS:
            return f"{len(unanswered)} known questions in a row; {unanswered[-1].words}"
        if not self._rule.stopped:
            return None
        broken = [_words(test) for test in self._rule.tests if test.broken]
        probes = [probe for step in self._steps.values() for probe in step.probes]
        wrong = [
            probe
            for probe in probes
            if probe.candidate and not probe.right and probe.answer.problem is None
        ]
        return "; ".join([*broken, *(probe.words for probe in wrong[:1])])

    def _aborted(self, complaint: str) -> Outcome:
        assert self.route is not None  # it is watched, so it was moved
        asked = sum(served.candidate for served in self.served)
        said = complaint[0].upper() + complaint[1:].rstrip(".")
        reason = f"{said}. {asked} requests of clients were answered by {self._release}."
        return Outcome(self.route, passed=False, reason=reason)

    def _end(self) -> Outcome:
        """The last look, and the known questions asked as clients ask."""
        assert self.route is not None  # the last step moved it
        answers = self._ask_as_clients()
        self.check_undisturbed()
        self._read_log()
        if (complaint := self._complaint()) is not None:
            return self._aborted(f"with all of the traffic: {complaint}")
        smoke = judge_smoke(answers, self._spec.gates.smoke, self._candidate.deployment.version)
        if not smoke.passed:
            stays = self.proven and warm(self.route) is None and not self._wrong(answers)
            return Outcome(self.route, False, smoke.reason, answers, smoke, stays)
        weights = ", ".join(f"{step.weight} %" for step in self._steps.values())
        asked = sum(served.candidate for served in self.served)
        reason = f"{weights} of the traffic, {asked} requests of clients, every objective kept. "
        return Outcome(self.route, True, reason + smoke.reason, answers, smoke)

    def check_undisturbed(self) -> None:
        """Checks that the route is still the one of this rollout.

        Raises:
            RefConflictError: somebody else changed it.
        """
        assert self.route is not None  # nothing is watched before it was moved
        current, digest = self._platform.routes.current(self.route.environment, self.route.model)
        if current != self.route or digest != self._seen[1]:
            raise RefConflictError(
                f"Somebody else changed the route while {self._release} was rolled out",
                expected=f"generation {self.route.generation}",
                found="no route"
                if current is None
                else f"generation {current.generation} by {current.actor} ({current.reason})",
                cure="find out why; the rollout has stopped and left their route as it is",
            )

    def _ask_round(self) -> Iterator[_Probe]:
        """Each known question, asked of the candidate and of what it replaces."""
        for known in self._spec.serving.known_answers:
            for target in () if self.route is None else self.route.targets:
                asked = datetime.now(UTC)
                answer = ask_one(
                    self._spec,
                    self._platform.gateway_url,
                    self._contract,
                    known,
                    self._platform.settings.http_timeout_seconds,
                    target.version,
                )
                right = (answer.answer, answer.version) == (known.answer, target.version)
                yield _Probe(asked, self._is_candidate(target), answer, right)

    def _read_counters(self) -> Iterator[Sequence[ServiceSample]]:
        yield self._platform.metrics.samples(self._candidate.environment, self._candidate.model)

    def _ask_as_clients(self) -> tuple[Answer, ...]:
        """The known questions through the whole route; again where one got no answer."""
        answers: tuple[Answer, ...] = ()
        for _ in range(UNANSWERED_QUESTIONS):
            answers = ask_known(
                self._spec,
                self._platform.gateway_url,
                self._contract,
                self._platform.settings.http_timeout_seconds,
            )
            if all(answer.problem is None for answer in answers):
                break
        return answers

    def _wrong(self, answers: Sequence[Answer]) -> bool:
        """Whether one is wrong, or another version's; late or none at all is neither."""
        version = self._candidate.deployment.version
        return any(
            answer.problem is None and (answer.answer, answer.version) != (answer.expected, version)
            for answer in answers
        )

    def _all_answered(self, step: _Step) -> bool:
        """Whether the candidate has answered every known question in this step."""
        answered = {
            probe.answer.prompt
            for probe in step.probes
            if probe.candidate and probe.answer.problem is None and probe.asked >= step.route.time
        }
        return answered >= {known.prompt for known in self._spec.serving.known_answers}

    def _figures(self, step: _Step) -> StepFigures:
        served = [each for each in self.served if each.generation == step.route.generation]
        found: dict[bool, Figures] = {}
        for target in step.route.targets:
            candidate = self._is_candidate(target)
            mine = [each for each in served if each.candidate == candidate]
            probes = [each for each in step.probes if each.candidate == candidate]
            counted = step.candidate if candidate else step.stable
            answered = [each for each in mine if each.answered]
            found[candidate] = Figures(
                release=target.release,
                version=target.version,
                weight=target.weight,
                requests=len(mine),
                failures=sum(each.failed for each in mine),
                refusals=sum(each.refused for each in mine),
                duration_p95_ms=p95(each.duration_ms for each in answered),
                first_byte_p95_ms=p95(
                    each.first_byte_ms for each in answered if each.first_byte_ms is not None
                ),
                inferences=None if counted is None else counted.trials,
                failed_inferences=None if counted is None else counted.hits,
                probes=len(probes),
                probes_right=sum(each.right for each in probes),
            )
        return StepFigures(
            generation=step.route.generation,
            since=step.route.time,
            until=step.until or datetime.now(UTC),
            ended_by=step.ended_by,
            candidate=found[True],
            stable=found.get(False),
        )

    def _weight_on(self, route: Route) -> int:
        weights = (target.weight for target in route.targets if self._is_candidate(target))
        return next(weights, 0)

    def _is_candidate(self, target: RouteTarget) -> bool:
        return (target.colour, deployment_of(target)) == (
            self._candidate.colour,
            self._candidate.deployment,
        )


def failed_or_passed(platform: Platform, release: str) -> Verdict | None:
    """The newest verdict of `canary` that decided; None where there is none.

    Raises:
        EvidenceError: it is missing, changed, or not signed by a trusted key.
    """
    decided = [
        verdict
        for verdict, _ in all_verdicts(platform.evidence, release)
        if verdict.gate == CANARY.name and verdict.decision is not Decision.UNDECIDED
    ]
    return decided[-1] if decided else None


def _words(test: Test) -> str:
    beside = "" if test.stable is None else f", stable {test.stable:.2%}"
    found = "none" if test.candidate is None else f"{test.candidate:.2%}"
    return (
        f"{test.objective} {found}{beside} ({test.threshold}; evidence {test.e_value:.4g}, "
        f"which stops at {test.stops_at:g})"
    )


def _finding(test: Test) -> Finding:
    beside = "" if test.stable is None else f"stable {test.stable:.6g}; "
    return Finding(
        metric=test.objective,
        value=test.candidate,
        n=test.trials,
        threshold=test.threshold,
        decision=Decision.of(not test.broken),
        note=f"{beside}evidence {test.e_value:.4g}, which stops at {test.stops_at:g}",
    )
