"""What may be decided from latency, and what is told to whom it stops."""

from __future__ import annotations

import random
import re

import pytest

from llmops_assets.errors import DataError
from llmops_assets.evidence import latency
from llmops_assets.evidence.latency import LatencySummary, RequestTimes
from llmops_assets.evidence.latency_judgement import judge_latency, requests_needed
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.serving.load import ClientOverhead
from llmops_assets.spec import LatencyBound, LatencyObjective, Measure, Percentile

OBJECTIVE = LatencyObjective(end_to_end=0.2)


def times(*seconds: float) -> list[RequestTimes]:
    """Requests that took so long; first token after half, 5 tokens."""
    return [RequestTimes.of(s / 2, [s / 8] * 4, s) for s in seconds]


def spread(n: int) -> list[RequestTimes]:
    """Requests that took 10 ms, 20 ms, and so on."""
    return times(*[number / 100 for number in range(1, n + 1)])


def summary(
    requests: list[RequestTimes], errors: int = 0, client: ClientOverhead | None = None
) -> LatencySummary:
    level = latency.level(
        4, requests, ["status 503"] * errors, duration=10.0, objective=OBJECTIVE, client=client
    )
    return LatencySummary(source="built-in", confidence=0.95, levels=(level,))


def bound(
    at_most: float,
    percentile: Percentile = "p50",
    measure: Measure = "end_to_end",
    concurrency: int = 4,
) -> LatencyBound:
    return LatencyBound(
        concurrency=concurrency, measure=measure, percentile=percentile, at_most=at_most
    )


def judge(found: LatencySummary, *bounds: LatencyBound, goodput: float | None = None) -> Judgement:
    return judge_latency(found, bounds, confidence=0.95, objective=OBJECTIVE, goodput=goodput)


def asked_for(judgement: Judgement) -> int:
    """The number of requests that an undecided judgement asks for."""
    assert judgement.advice is not None
    assert judgement.advice.startswith("Not enough data to decide: ")
    found = re.search(r"measure (\d+) requests or more", judgement.advice)
    assert found is not None, judgement.advice
    return int(found.group(1))


def test_enough_requests_decide() -> None:
    """With the numbers that `requests_needed` asks for, and clear figures, gates open and shut."""
    expected: dict[Percentile, int] = {"p50": 6, "p95": 72, "p99": 368}
    for percentile, needed in expected.items():
        assert requests_needed(percentile, 0.95) == needed
        enough = summary(times(*[0.1 + n / 10_000 for n in range(needed)]))
        slowest = 0.1 + needed / 10_000
        assert judge(enough, bound(slowest, percentile)).decision is Decision.PASSED
        assert judge(enough, bound(0.05, percentile)).decision is Decision.FAILED
        fewer = judge(summary(times(*[0.1] * (needed - 1))), bound(slowest, percentile))
        assert fewer.decision is Decision.UNDECIDED
        assert asked_for(fewer) == needed


def test_finding_says_all_that_a_verdict_needs() -> None:
    """Measured beside expected, how sure, over how many: what the UI and an auditor read."""
    judgement = judge(summary(spread(100), errors=1), bound(1.5))
    (finding,) = judgement.findings
    name = "p50 of end_to_end at concurrency 4"
    assert (finding.metric, finding.threshold, finding.n) == (name, "at most 1.5 s", 101)
    assert finding.value == pytest.approx(0.505)
    assert finding.interval is not None
    assert finding.value is not None
    assert finding.interval.low < finding.value < finding.interval.high
    assert (finding.interval.confidence, finding.interval.n) == (0.95, 101)
    assert judgement.measured == {name: finding.value}
    assert judgement.threshold == {name: "at most 1.5 s"}
    for part in (name, "between 0.41 s and 0.61 s", "at 95 % confidence over 101 requests",
                 "1 of them failed", "at most 1.5 s is asked"):  # fmt: skip
        assert part in f"{finding.metric} {finding.note}"
    assert judgement.reason == f"{name} is 0.505 over 101 requests, at most 1.5 s is asked"


def test_bound_within_the_interval_is_undecided() -> None:
    """What another run could turn around is not decided by this one."""
    found = summary(spread(100))
    judgement = judge(found, bound(0.52))
    (finding,) = judgement.findings
    assert finding.value is not None
    assert finding.interval is not None
    assert finding.value < 0.52
    assert judgement.decision is Decision.UNDECIDED
    assert judge(found, bound(finding.interval.high)).decision is Decision.PASSED


def test_as_many_requests_as_asked_for_decide() -> None:
    """Advice that leads to the next undecided run would cost a release each time."""
    generator = random.Random(0)

    def measured(n: int) -> LatencySummary:
        return summary(times(*[generator.uniform(0.1, 0.3) for _ in range(n)]))

    first = judge(measured(80), bound(0.21))
    assert first.decision is Decision.UNDECIDED
    enough = asked_for(first)
    assert 80 < enough < 8000
    decided = [judge(measured(2 * enough), bound(0.21)).decision for _ in range(10)]
    assert Decision.FAILED not in decided
    assert decided.count(Decision.PASSED) >= 8


def test_advice_names_what_a_spec_can_change() -> None:
    """The spec says how many requests staging gets, not how many prompts are asked alone."""
    few = summary(times(*[0.1] * 40))
    alone = few.model_copy(update={"source": "in-process"})
    staged, evaluated = (judge(found, bound(5, "p95")).advice for found in (few, alone))
    assert "set gates.latency.requests" in str(staged)
    assert "lower percentile" in str(evaluated)
    assert "gates.latency.requests" not in str(evaluated)


def test_no_number_of_requests_decides_what_is_at_its_bound() -> None:
    """A team told to measure a million requests should change the bound or the model."""
    judgement = judge(summary(spread(101)), bound(0.51))
    assert judgement.decision is Decision.UNDECIDED
    assert judgement.advice is not None
    assert "no number of requests will" in judgement.advice


def test_failing_makes_nobody_faster() -> None:
    """A server that refuses what would take long has fine percentiles of what it answers."""
    answered = times(*[0.1] * 90)
    assert judge(summary(answered), bound(0.2, "p95")).passed
    refused = judge(summary(answered, errors=20), bound(0.2, "p95"))
    assert refused.decision is Decision.FAILED
    assert "that of a failed request" in refused.reason
    assert refused.findings[0].interval is None
    assert judge(summary([], errors=400), bound(0.2, "p99")).decision is Decision.FAILED
    few = judge(summary(answered, errors=2), bound(0.2, "p95"))
    assert few.decision is Decision.UNDECIDED
    assert asked_for(few) == 2 * 92


def test_nothing_measured_is_undecided() -> None:
    """A level that nobody measured, or a spec without bounds, opens no gate."""
    empty = LatencySummary(source="built-in", confidence=0.95, levels=())
    missing = judge(empty, bound(1.0))
    assert missing.decision is Decision.UNDECIDED
    assert "was not measured" in missing.reason
    assert missing.advice is not None
    assert "measure at concurrency 4" in missing.advice
    assert judge(summary([]), bound(1.0)).decision is Decision.UNDECIDED
    assert judge(summary(spread(100))).decision is Decision.UNDECIDED


def test_worst_decision_counts() -> None:
    """One bound that is broken, or open, is enough; only those are talked of."""
    found = summary(times(*[0.1] * 100))
    passed, failed, undecided = bound(0.2), bound(0.05), bound(0.2, "p99")
    assert judge(found, passed).passed
    open_ = judge(found, passed, undecided)
    assert open_.decision is Decision.UNDECIDED
    assert "p50" not in open_.reason
    broken = judge(found, undecided, passed, failed)
    assert broken.decision is Decision.FAILED
    assert len(broken.findings) == 3
    # What failed is not mended by measuring more.
    assert broken.advice is None


def test_each_measure_is_judged_by_itself() -> None:
    """Fast to begin and slow to end is not fast."""
    found = summary(times(*[0.8] * 100))
    values: dict[Measure, float] = {
        "time_to_first_token": 0.4, "inter_token_latency": 0.1, "end_to_end": 0.8
    }  # fmt: skip
    for measure, value in values.items():
        assert judge(found, bound(value * 1.01, measure=measure)).passed
        assert not judge(found, bound(value * 0.99, measure=measure)).passed


def test_answers_of_one_token_have_nothing_between() -> None:
    """The number asked for is of requests, of which only some say anything."""
    some = [RequestTimes.of(0.1, [], 0.1)] * 36 + times(*[0.1] * 36)
    assert asked_for(judge(summary(some), bound(1.0, "p95", "inter_token_latency"))) == 144
    none = judge(summary(some[:36]), bound(1.0, measure="inter_token_latency"))
    assert none.decision is Decision.UNDECIDED
    assert none.advice is not None
    assert "no answer has a second token" in none.advice


@pytest.mark.parametrize(
    ("good", "bad", "decision"),
    [
        (100, 0, Decision.PASSED),
        (97, 3, Decision.PASSED),
        (90, 10, Decision.UNDECIDED),
        (80, 20, Decision.FAILED),
        (20, 0, Decision.UNDECIDED),
        (0, 0, Decision.UNDECIDED),
    ],
)
def test_goodput_is_judged_with_its_interval(good: int, bad: int, decision: Decision) -> None:
    """Nine of ten good ones, by luck or for good: Wilson's interval tells."""
    found = summary(times(*[0.1] * good, *[0.3] * bad))
    judgement = judge(found, bound(1.0), goodput=0.9)
    finding = judgement.findings[-1]
    assert (finding.metric, finding.threshold) == ("goodput at concurrency 4", "at least 0.9")
    assert (finding.decision, finding.n) == (decision, good + bad)
    if good + bad:
        assert finding.value == pytest.approx(good / (good + bad))
        assert finding.interval is not None
        assert finding.interval.method == "Wilson"


def test_goodput_says_how_many_requests_decide() -> None:
    """All 20 of 20 good ones are not 90 % at 95 % confidence; 35 of 35 are."""
    undecided = judge(summary(times(*[0.1] * 20)), bound(1.0), goodput=0.9)
    enough = asked_for(undecided)
    assert enough == 35
    assert judge(summary(times(*[0.1] * enough)), bound(1.0), goodput=0.9).passed
    assert not judge(summary(times(*[0.1] * (enough - 1))), bound(1.0), goodput=0.9).passed


def test_goodput_of_every_level_counts() -> None:
    """An idle server's good requests must not make up for a loaded one's."""
    alone = latency.level(1, times(*[0.1] * 900), duration=1.0, objective=OBJECTIVE)
    loaded = latency.level(8, times(*[0.3] * 100), duration=1.0, objective=OBJECTIVE)
    found = LatencySummary(source="aiperf", confidence=0.95, levels=(alone, loaded))
    judgement = judge(found, bound(1.0, concurrency=1), goodput=0.9)
    assert [finding.decision for finding in judgement.findings] == [
        Decision.PASSED, Decision.PASSED, Decision.FAILED
    ]  # fmt: skip


def test_other_measurements_than_asked_for_are_refused() -> None:
    """Narrow intervals, or goodput of a laxer objective, would open the gate."""
    found = summary(spread(100))
    with pytest.raises(DataError, match=r"99 % confidence.*Found: intervals of 95 %"):
        judge_latency(found, [bound(2.0)], confidence=0.99)
    stricter = LatencyObjective(end_to_end=0.1)
    for objective in (stricter, None):
        with pytest.raises(DataError, match="goodput under"):
            judge_latency(
                found, [bound(2.0)], confidence=0.95, objective=objective, goodput=0.1
            )  # fmt: skip
    assert judge_latency(found, [bound(2.0)], confidence=0.9).passed


def test_late_client_is_told_of() -> None:
    """A busy machine may be the reason, which the model's team would look for in vain."""
    late = ClientOverhead(delay_p50=0.01, delay_p99=0.04, cpu_share=0.9)
    found = summary(times(*[0.1] * 100), client=late)
    assert "the client itself was up to 0.04 s late" in judge(found, bound(0.05)).reason
    assert "client" not in judge(found, bound(0.2)).reason
    punctual = late.model_copy(update={"delay_p99": 0.001})
    found = summary(times(*[0.1] * 100), client=punctual)
    assert "client" not in judge(found, bound(0.05)).reason
