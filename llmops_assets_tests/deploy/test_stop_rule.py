"""The stop rule: seldom wrong about a good release, quick about a bad one."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from llmops_assets.deploy.stop_rule import EProcess, Request, StopRule, Tally
from llmops_assets.spec import RolloutObjectives

OBJECTIVES = RolloutObjectives()
RATE = 0.05
ROLLOUTS = 300
STEP_REQUESTS = 300
SHARES = (0.1, 0.5, 1.0)


@dataclass(frozen=True)
class Release:
    """How a simulated release does."""

    error_rate: float = 0.005
    refusal_rate: float = 0.02
    slower: float = 1.0


GOOD = Release()


def traffic(
    draw: random.Random, candidate: Release, load: Callable[[int], float] = lambda _: 1.0
) -> Iterator[Request]:
    """Requests of a whole rollout, each routed by lot.

    Args:
        candidate: beside a good release.
        load: factor on the times and errors of both, by number of the request.
    """
    for step, share in enumerate(SHARES):
        for number in range(STEP_REQUESTS):
            chosen = draw.random() < share
            release = candidate if chosen else GOOD
            factor = load(step * STEP_REQUESTS + number)
            time = draw.lognormvariate(4.0, 0.6) * release.slower * factor
            yield Request(
                candidate=chosen,
                share=share,
                failed=draw.random() < release.error_rate * factor,
                refused=draw.random() < release.refusal_rate,
                duration_ms=int(time),
                first_byte_ms=int(time / 4),
            )


def rolled_out(draw: random.Random, candidate: Release, rate: float = RATE) -> int | None:
    """Requests that the candidate had answered when the rule stopped it; None if it never did."""
    rule = StopRule(OBJECTIVES, rate)
    answered = 0
    for request in traffic(draw, candidate):
        rule.requests([request])
        answered += request.candidate
        if rule.stopped:
            return answered
    return None


def test_same_release_is_seldom_stopped() -> None:
    """A rule that cries wolf is switched off, and then protects nobody: 300 A/A rollouts."""
    draw = random.Random(1)
    stopped = sum(rolled_out(draw, GOOD) is not None for _ in range(ROLLOUTS))
    print(f"false aborts: {stopped} of {ROLLOUTS}, at most {RATE:.0%} stated")
    assert stopped <= RATE * ROLLOUTS


def test_rate_is_what_bounds_false_aborts() -> None:
    """Without the bound the same rollouts are stopped: the test above can fail."""
    draw = random.Random(1)
    assert sum(rolled_out(draw, GOOD, rate=7 / 1.01) is not None for _ in range(30)) > 3


def test_trouble_of_both_stops_nothing() -> None:
    """At a peak of load both are three times slower; comparing with an hour ago would abort."""
    draw = random.Random(2)
    stopped = 0
    for _ in range(40):
        rule = StopRule(RolloutObjectives(error_rate=0.05), RATE)
        rule.requests(traffic(draw, GOOD, lambda number: 3.0 if 200 < number < 500 else 1.0))
        stopped += rule.stopped
    assert stopped <= 40 * RATE


@pytest.mark.parametrize(
    ("release", "at_most"),
    [
        pytest.param(Release(error_rate=0.1), 150, id="10 % errors for 0.5 %"),
        pytest.param(Release(slower=3.0), 40, id="3 times slower"),
        pytest.param(Release(refusal_rate=0.5), 40, id="errors that are answered with 400"),
    ],
)
def test_bad_release_is_stopped(release: Release, at_most: int) -> None:
    """What the bound costs: how many requests a bad release answers before it is found out."""
    draw = random.Random(3)
    answered = [rolled_out(draw, release) for _ in range(40)]
    found = [count for count in answered if count is not None]
    print(f"{release}: stopped {len(found)} of 40, median {statistics.median(found)} requests")
    assert len(found) >= 39
    assert statistics.median(found) <= at_most


def test_wrong_answer_to_a_known_question_stops_at_once() -> None:
    """Its answer is known: there is no chance in it that more questions could rule out."""
    rule = StopRule(OBJECTIVES, RATE)
    rule.probes(Tally(0, 100))
    assert not rule.stopped
    rule.probes(Tally(1, 1))
    (broken,) = [test for test in rule.tests if test.broken]
    assert broken.objective == "wrong answers to known questions"


def test_some_wrong_answers_may_be_allowed() -> None:
    """A model that samples is sometimes wrong; its share of right answers is tested."""
    rule = StopRule(RolloutObjectives(probes_right=0.8), RATE)
    rule.probes(Tally(10, 60))
    assert not rule.stopped
    rule.probes(Tally(40, 40))
    assert rule.stopped


def test_errors_inside_answers_are_counted_by_triton() -> None:
    """To the gateway an error inside a stream's 200 is a success like any other."""
    rule = StopRule(OBJECTIVES, RATE)
    for _ in range(10):
        rule.inferences(Tally(3, 10), Tally(0, 90))
    broken = {test.objective for test in rule.tests if test.broken}
    assert broken == {
        "failed inferences (Triton)", "failed inferences (Triton) beside stable",
    }  # fmt: skip


def test_same_requests_give_the_same_evidence_however_they_are_read() -> None:
    """A rollout that was cut off reads the access log again, all at once."""
    requests = list(traffic(random.Random(4), Release(error_rate=0.05)))
    at_once, one_by_one = StopRule(OBJECTIVES, RATE), StopRule(OBJECTIVES, RATE)
    at_once.requests(requests)
    for request in requests:
        one_by_one.requests([request])
    assert at_once.tests == one_by_one.tests


def test_evidence_has_a_mean_of_one_at_most_under_the_hypothesis() -> None:
    """Ville's inequality holds of nothing else; exact over all outcomes of a few trials."""
    for at_most in (0.01, 0.3, 0.9):
        mean = 0.0
        for outcomes in range(2**6):
            hits = outcomes.bit_count()
            evidence = EProcess()
            evidence.add(hits, 6 - hits, at_most)
            likelihood = at_most**hits * (1 - at_most) ** (6 - hits)
            mean += likelihood * evidence.now
        assert mean == pytest.approx(1.0)


def test_no_share_beside_stable_is_no_evidence() -> None:
    """At 100 % nothing is compared: every failure is the candidate's."""
    evidence = EProcess()
    evidence.add(50, 0, 1.0)
    evidence.add(0, 50, 0.0)
    assert evidence.largest == 1.0
