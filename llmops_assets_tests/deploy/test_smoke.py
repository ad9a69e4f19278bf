"""Smoke requests: the right answers, of the right version, in time."""

from __future__ import annotations

import math

import pytest

from llmops_assets.deploy.smoke import Answer, ask_known, judge_smoke
from llmops_assets.serving.request_contract import EMBEDDED
from llmops_assets.spec import SmokeGate, parse_spec

from ..conftest import free_port
from ..fakes import HttpDouble
from ..release_rig import SPEC

GATE = SmokeGate(latency_seconds=2.0)
PARROT = parse_spec(SPEC, "test")


def answer(text: str | None = "world", seconds: float = 0.1, version: int | None = 3) -> Answer:
    problem = None if text is not None else "refused"
    return Answer(
        prompt="hello", expected="world", answer=text, problem=problem, seconds=seconds,
        version=version,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "passed", "because"),
    [
        ([answer()], True, "All 1 known questions"),
        ([answer(seconds=2.0)], True, "at most 2.000 s"),
        ([answer(seconds=math.nextafter(2.0, 3))], False, "slowest"),
        ([answer(seconds=math.nan), answer()], False, "slowest"),
        ([answer(), answer(seconds=math.nan)], False, "slowest"),
        ([answer(), answer("wrld")], False, "'hello' gave 'wrld', not 'world'"),
        ([answer(None)], False, "gave no answer: refused"),
        ([answer(), answer(version=2)], False, "version 2 answered, not 3"),
        ([answer(version=None)], False, "version None answered"),
        ([], False, ""),
    ],
)
def test_judging(answers: list[Answer], passed: bool, because: str) -> None:
    """A right answer of the old version is what a route that did not move looks like."""
    judgement = judge_smoke(answers, GATE, 3)
    assert judgement.passed is passed
    assert because in judgement.reason


def test_any_version_will_do_when_none_is_asked_for() -> None:
    """A gateway's answer may be judged without knowing the version behind."""
    assert judge_smoke([answer(version=None)], GATE).passed


def test_every_known_question_is_asked_after_a_warm_up() -> None:
    """The first request of a fresh server pays for its start, not for the model."""
    with HttpDouble(lambda _, body: (200, {
        "text_output": body["text_input"].upper(), "model_version": "3"
    })) as triton:  # fmt: skip
        answers = ask_known(PARROT, triton.url, EMBEDDED, 5)
        asked = [body for _, body, _ in triton.requests]
    assert [body["text_input"] for body in asked] == ["hello", "hello", "ping"]
    assert all(body["max_tokens"] == 12 for body in asked)
    assert {path for path, _, _ in triton.requests} == {"/v2/models/parrot/generate"}
    assert [(a.answer, a.expected, a.version) for a in answers] == [
        ("HELLO", "world", 3), ("PING", "pong", 3)
    ]  # fmt: skip


def test_no_answer_is_a_result_to_judge() -> None:
    """The failed check must show what happened; an exception would leave no verdict."""
    with HttpDouble(lambda _, body: (500, {"error": f"no {body['text_input']}"})) as triton:
        refused = ask_known(PARROT, triton.url, EMBEDDED, 5)
    nobody = ask_known(PARROT, f"http://127.0.0.1:{free_port()}", EMBEDDED, 5)
    for answers in (refused, nobody):
        assert [answer.answer for answer in answers] == [None, None]
        assert not judge_smoke(answers, GATE).passed
    assert "no ping" in str(refused[1].problem)
