"""When a rollout is stopped: sequential tests that may be looked at after every request.

Each objective has an e-process: a number that starts at 1, grows with the evidence that the
objective is broken, and whose mean never exceeds 1 while it is kept. By Ville's inequality
(Ville 1939, Étude critique de la notion de collectif) such a number ever reaches `m / rate`
with a probability of at most `rate / m`. So a rollout with `m` objectives is stopped without
cause with a probability of at most `rate`, however often and for however long one looks, and
whatever decides when to look. The e-processes go on through all steps: there is one rate for
the whole rollout, and nothing to share out between steps. Ramdas, Grünwald, Vovk and Shafer
(2023), Game-theoretic statistics and safe anytime-valid inference, is the survey.

All of them are one mixture of likelihood ratios (Wald 1945; mixtures: Robbins 1970) of
trials that hit with at most a known probability:

- A rate has a bound of its own: a request fails with at most the bound.
- Two releases are compared by where the hits fall. A request that failed was the candidate's
  with at most the candidate's share of the traffic, if it fails no more often than stable, for
  the gateway draws lots (Przyborowski and Wilenski 1940; sequentially Lindon and Malek 2022,
  Anytime-valid inference for multinomial count data). Nothing is assumed of how often requests
  fail, so what troubles both, as a peak of load, stops nothing.
- A p95 is compared in the same way. A hit is a stable request above stable's p95 so far, or a
  candidate's above that times the allowed ratio. Where the candidate's times are within the
  ratio of stable's at every quantile, as in a rollout of the same model, it hits no more often
  than stable, whatever the threshold. (Howard and Ramdas 2022, Sequential estimation of
  quantiles, bounds a quantile itself, by counting below a threshold as well.)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from llmops_assets.evidence.statistics import Record
from llmops_assets.spec import RolloutObjectives

ODDS_RATIOS = tuple(1.5 * 1.8**power for power in range(10))
"""How much likelier a hit may be: 1.5 to 300 times the odds, each with the same weight."""
SHOWN_AT_MOST = 1e12
"""JSON has no infinity."""

THRESHOLD_REQUESTS = 20
"""A p95 of fewer is none. It is taken anew after as many."""
WINDOW_REQUESTS = 500
"""Of stable's newest, for its p95: load changes over a day."""
SLACK_MILLISECONDS = 10.0
"""Added to the allowed time: nobody notices less, and the access log has whole milliseconds."""


@dataclass(frozen=True)
class Request:
    """What became of one request of a client."""

    candidate: bool
    """Whether the candidate answered, rather than stable."""
    share: float
    """Of the candidate in the traffic when it was routed, of 1."""
    failed: bool
    refused: bool
    """Answered with 4xx: by the client's fault, or by a model's error before its first token."""
    duration_ms: int | None
    first_byte_ms: int | None


@dataclass(frozen=True)
class Tally:
    """Trials, and how many of them were hits."""

    hits: int = 0
    trials: int = 0

    @property
    def rate(self) -> float | None:
        """Share of hits; None without trials."""
        return self.hits / self.trials if self.trials else None

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.hits + other.hits, self.trials + other.trials)


class Test(Record):
    """How one objective stands."""

    objective: str
    threshold: str
    candidate: float | None
    """Share of trials that were hits; None without trials."""
    stable: float | None
    """The same of stable, where the two are compared."""
    trials: int
    e_value: float
    """The evidence against it, at most 10^12 as shown."""
    stops_at: float
    """The evidence that stops the rollout."""

    @property
    def broken(self) -> bool:
        return self.e_value >= self.stops_at


@dataclass
class EProcess:
    """Evidence that trials hit more often than with a given probability."""

    _logarithms: list[float] = field(default_factory=lambda: [0.0] * len(ODDS_RATIOS))
    """Of the likelihood ratio of each alternative."""
    _largest: float = 1.0

    def add(self, hits: int, misses: int, at_most: float) -> None:
        """
        Args:
            hits: of independent trials, or of draws without replacement, which vary less
                (Hoeffding 1963, theorem 4).
            misses: of the same.
            at_most: probability of a hit under the hypothesis. It may differ from call to
                call, and must not depend on this call's trials.
        """
        if at_most >= 1.0:
            return
        if at_most <= 0.0:
            if hits:
                self._largest = math.inf
            return
        self._logarithms = [
            before + hits * of_hit + misses * of_miss
            for before, (of_hit, of_miss) in zip(
                self._logarithms, _log_ratios(at_most), strict=True
            )
        ]
        self._largest = max(self._largest, self.now)

    @property
    def largest(self) -> float:
        """The most that it ever was: what has once stopped a rollout is not undone."""
        return self._largest

    @property
    def now(self) -> float:
        """The mean of the likelihood ratios."""
        if max(self._logarithms) > math.log(SHOWN_AT_MOST * len(self._logarithms)):
            return math.inf
        return sum(math.exp(each) for each in self._logarithms) / len(self._logarithms)


@lru_cache(maxsize=256)
def _log_ratios(at_most: float) -> tuple[tuple[float, float], ...]:
    """Logarithms of the likelihood ratio of a hit and of a miss, for each alternative."""
    odds = at_most / (1.0 - at_most)
    alternatives = [odds * ratio / (1.0 + odds * ratio) for ratio in ODDS_RATIOS]
    return tuple(
        (math.log(alternative / at_most), math.log((1.0 - alternative) / (1.0 - at_most)))
        for alternative in alternatives
    )


@dataclass
class _Objective:
    name: str
    threshold: str
    evidence: EProcess = field(default_factory=EProcess)
    candidate: Tally = Tally()
    stable: Tally | None = None

    def bounded(self, tally: Tally, at_most: float) -> None:
        """Counts trials of the candidate, which hit with at most this probability."""
        self.candidate += tally
        self.evidence.add(tally.hits, tally.trials - tally.hits, at_most)

    def compared(self, candidate: Tally, stable: Tally, share: float, ratio: float) -> None:
        """Counts trials of both, of which the candidate hits at most `ratio` times as often.

        Args:
            candidate: its trials.
            stable: those of the other.
            share: of the candidate in the trials.
            ratio: that is allowed.
        """
        self.candidate += candidate
        self.stable = (self.stable or Tally()) + stable
        odds = share * ratio
        self.evidence.add(candidate.hits, stable.hits, odds / (odds + 1.0 - share))

    def test(self, stops_at: float) -> Test:
        return Test(
            objective=self.name,
            threshold=self.threshold,
            candidate=self.candidate.rate,
            stable=None if self.stable is None else self.stable.rate,
            trials=self.candidate.trials + (self.stable.trials if self.stable else 0),
            e_value=min(self.evidence.largest, SHOWN_AT_MOST),
            stops_at=stops_at,
        )


class _SlowRequests:
    """Which requests count as slow: above stable's p95 so far, times what is allowed."""

    def __init__(self, objective: _Objective, ratio: float) -> None:
        self._objective = objective
        self._ratio = ratio
        self._times: deque[int] = deque(maxlen=WINDOW_REQUESTS)
        self._new = 0
        self._p95: float | None = None

    def add(self, request: Request, milliseconds: int) -> None:
        # The threshold is older than the request: it may not depend on it.
        if self._p95 is not None:
            allowed = self._p95 * self._ratio + SLACK_MILLISECONDS
            slow = milliseconds > (allowed if request.candidate else self._p95)
            one, none = Tally(int(slow), 1), Tally()
            candidate, stable = (one, none) if request.candidate else (none, one)
            self._objective.compared(candidate, stable, request.share, 1.0)
        if not request.candidate:
            self._times.append(milliseconds)
            self._new += 1
            if self._new == THRESHOLD_REQUESTS:
                self._new = 0
                self._p95 = p95(self._times)


class StopRule:
    """The objectives of one rollout, fed with what happens and asked whether to stop.

    Fed with the same requests again, in the same order, it says the same: a rollout that was
    cut off goes on from the access log.
    """

    def __init__(self, objectives: RolloutObjectives, false_abort_rate: float) -> None:
        """
        Args:
            objectives: of the spec.
            false_abort_rate: at most; probability that a rollout is stopped without cause.
        """
        self._asked = objectives
        rate, ratio = f"at most {objectives.error_rate:g}", objectives.error_ratio
        beside = f"at most {ratio:g} times stable's"
        self._failures = _Objective("failed requests", rate)
        self._ratio = _Objective("failed and refused requests", beside)
        self._inferences = _Objective("failed inferences (Triton)", rate)
        self._inference_ratio = _Objective("failed inferences (Triton) beside stable", beside)
        durations = _Objective("slow requests", _slow(objectives.duration_ratio))
        first_bytes = _Objective("slow first bytes", _slow(objectives.first_byte_ratio))
        self._durations = _SlowRequests(durations, objectives.duration_ratio)
        self._first_bytes = _SlowRequests(first_bytes, objectives.first_byte_ratio)
        self._probes = _Objective(
            "wrong answers to known questions", f"at most {1.0 - objectives.probes_right:.3g}"
        )
        self._objectives = (
            self._failures, self._ratio, self._inferences, self._inference_ratio,
            durations, first_bytes, self._probes,
        )  # fmt: skip
        self._stops_at = len(self._objectives) / false_abort_rate

    def requests(self, requests: Iterable[Request]) -> None:
        """Requests of clients, in the order of the access log. Cancelled ones are not judged."""
        for request in requests:
            self._request(request)

    def inferences(self, candidate: Tally, stable: Tally | None) -> None:
        """Inferences since the last call, as Triton counts them; it sees errors inside a 200.

        Args:
            candidate: failed ones among all.
            stable: the same; None while it is not counted.
        """
        self._inferences.bounded(candidate, self._asked.error_rate)
        if stable is not None and candidate.trials + stable.trials:
            share = candidate.trials / (candidate.trials + stable.trials)
            self._inference_ratio.compared(candidate, stable, share, self._asked.error_ratio)

    def probes(self, tally: Tally) -> None:
        """The candidate's answers to known questions; a hit is a wrong one."""
        self._probes.bounded(tally, 1.0 - self._asked.probes_right)

    @property
    def tests(self) -> tuple[Test, ...]:
        """How every objective stands."""
        return tuple(objective.test(self._stops_at) for objective in self._objectives)

    @property
    def stopped(self) -> bool:
        """Whether an objective is broken."""
        return any(each.evidence.largest >= self._stops_at for each in self._objectives)

    def _request(self, request: Request) -> None:
        if request.candidate:
            self._failures.bounded(Tally(int(request.failed), 1), self._asked.error_rate)
        one, none = Tally(int(request.failed or request.refused), 1), Tally()
        candidate, stable = (one, none) if request.candidate else (none, one)
        self._ratio.compared(candidate, stable, request.share, self._asked.error_ratio)
        # A quick refusal says nothing of how fast answers are.
        if not request.failed and not request.refused:
            if request.duration_ms is not None:
                self._durations.add(request, request.duration_ms)
            if request.first_byte_ms is not None:
                self._first_bytes.add(request, request.first_byte_ms)


def p95(values: Iterable[float]) -> float | None:
    """The smallest value that 95 % are not above; None of nothing."""
    ordered = sorted(values)
    return ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else None


def _slow(ratio: float) -> str:
    return f"p95 at most {ratio:g} times stable's"
