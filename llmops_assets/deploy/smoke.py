"""Smoke requests: known questions, asked before a deployment gets traffic."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from llmops_assets.errors import SlotError, ToolchainError
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.serving import triton
from llmops_assets.serving.request_contract import RequestContract
from llmops_assets.serving.slots import Endpoint
from llmops_assets.spec import KnownAnswer, ModelSpec, SmokeGate
from llmops_assets.toolchains.base import EngineToolchain, ServerCheck

METRICS_INTERVAL_SECONDS = 0.5
PROBE_HEADERS = {"x-llmops-probe": "known-answer"}
"""By which a model or a proxy can tell the platform's questions from those of clients."""


class Answer(BaseModel):
    """What a deployment said to a known question."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    expected: str
    answer: str | None
    """None when there was no answer; then `problem` says why."""
    problem: str | None = None
    seconds: float
    version: int | None = None
    """The version that answered, as Triton names it."""


def ask_known(
    spec: ModelSpec, url: str | Endpoint, contract: RequestContract, timeout_seconds: float
) -> tuple[Answer, ...]:
    """Asks every known question of the spec, after one that only warms up.

    A question without an answer is part of the result, not an error: the gate judges it.

    Args:
        url: a slot, or the address of a gateway.
        contract: of the package that is asked.
        timeout_seconds: limit of connecting, and of every wait for more bytes.
    """
    questions = spec.serving.known_answers
    ask_one(spec, url, contract, questions[0], timeout_seconds)
    return tuple(ask_one(spec, url, contract, known, timeout_seconds) for known in questions)


def ask_one(
    spec: ModelSpec,
    url: str | Endpoint,
    contract: RequestContract,
    known: KnownAnswer,
    timeout_seconds: float,
    pinned: int | None = None,
) -> Answer:
    """Asks one known question; no answer is part of the result, as in `ask_known`.

    Args:
        spec: of the model.
        url: a slot, or the address of a gateway.
        contract: of the package that is asked.
        known: the question.
        timeout_seconds: limit of connecting, and of every wait for more bytes.
        pinned: version that is to answer; None leaves the choice to the route.
    """
    started = time.monotonic()
    problem: str | None = None
    text: str | None = None
    version: int | None = None
    try:
        output = triton.generate(
            url,
            spec.name,
            known.prompt,
            max_tokens=spec.constraints.max_output_tokens,
            contract=contract,
            version=pinned,
            timeout_seconds=timeout_seconds,
            headers=PROBE_HEADERS,
        )
    except SlotError as error:
        problem = str(error)
    else:
        if output.get(contract.text) is None or output.get("model_version") is None:
            problem = f"the answer lacks {contract.text} or model_version: {dict(output)}"
        else:
            text, version = str(output[contract.text]), int(output["model_version"])
    return Answer(
        prompt=known.prompt,
        expected=known.answer,
        answer=text,
        problem=problem,
        seconds=time.monotonic() - started,
        version=version,
    )


def server_problem(
    toolchain: EngineToolchain[Any], package: Path, endpoint: Endpoint, wait_seconds: float
) -> str | None:
    """What a server that was asked says of itself that speaks against it; None if nothing does.

    Args:
        toolchain: of the package.
        package: its directory.
        endpoint: of the server.
        wait_seconds: how long a figure may be bad: servers count a moment after they answered.
    """
    if not isinstance(toolchain, ServerCheck):
        return None
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            toolchain.check_server(package, triton.metrics_text(endpoint))
        except (SlotError, ToolchainError) as error:
            if time.monotonic() > deadline:
                return str(error)
            time.sleep(METRICS_INTERVAL_SECONDS)
        else:
            return None


def judge_smoke(
    answers: Sequence[Answer],
    gate: SmokeGate,
    version: int | None = None,
    problem: str | None = None,
) -> Judgement:
    """Every known question got its answer, in time.

    Args:
        version: the version that must have answered; None to accept any.
        problem: what `server_problem` found.
    """
    wrong = [
        f"{answer.prompt!r} gave {answer.answer!r}, not {answer.expected!r}"
        if answer.problem is None
        else f"{answer.prompt!r} gave no answer: {answer.problem}"
        for answer in answers
        if answer.answer != answer.expected
    ]
    strangers = sorted(
        {
            str(answer.version)
            for answer in answers
            if version is not None and answer.problem is None and answer.version != version
        }
    )
    if strangers:
        wrong.append(f"version {', '.join(strangers)} answered, not {version}")
    if problem is not None:
        wrong.append(problem)
    slowest = max((answer.seconds for answer in answers), default=0.0)
    # Asked of each, and so that a NaN, which compares as neither, does not pass.
    if not all(answer.seconds <= gate.latency_seconds for answer in answers):
        wrong.append(f"the slowest answer took {slowest:.3f} s")
    return Judgement(
        decision=Decision.of(bool(answers) and not wrong),
        measured={"answers": [answer.answer for answer in answers], "latency_seconds": slowest},
        threshold={
            "answers": [answer.expected for answer in answers],
            "latency_seconds": gate.latency_seconds,
        },
        reason="; ".join(wrong)
        or f"All {len(answers)} known questions were answered, in at most {slowest:.3f} s.",
    )
