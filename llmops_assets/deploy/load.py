"""A package in staging under load: how fast it answers, and whether that is fast enough."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from pydantic import TypeAdapter

from llmops_assets.errors import SettingsError
from llmops_assets.evidence.latency import LatencySummary, summarize
from llmops_assets.evidence.latency_judgement import judge_latency
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.serving import aiperf
from llmops_assets.serving.load import LoadResult
from llmops_assets.serving.request_contract import RequestContract
from llmops_assets.serving.slots import Endpoint
from llmops_assets.spec import Gates, LatencyGate, ModelSpec
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.tools import ToolRunner, module_command

SEED = 0
MOST_PROMPTS = 1000
"""Prompts of the evaluation data that are asked, at most; again and again if need be."""


def measure_latency(
    spec: ModelSpec,
    endpoint: Endpoint,
    version: int,
    contract: RequestContract,
    evaluation_data: ArtifactHandle,
    checkpoint: ArtifactHandle,
    tools: ToolRunner,
    timeout_seconds: float,
    aiperf_command: Path | None,
) -> LatencySummary:
    """Asks a slot prompts of the evaluation data, at every concurrency that the spec names.

    Args:
        endpoint: of the slot; no gateway is measured with it.
        version: that must answer.
        contract: of the package that is asked.
        checkpoint: AIPerf counts tokens with its tokenizer; the built-in generator needs none.
        tools: works in a folder that may hold what a killed attempt left.
        timeout_seconds: limit of one request, at least; more where the spec allows more.
        aiperf_command: the setting; None where it is not installed.

    Raises:
        SettingsError: the spec asks for AIPerf, and it is not there or cannot measure this
            package.
        ToolError: the generator failed, as when no request was answered.
        DataError: the evaluation data are not valid.
    """
    prompts = choose_prompts(evaluation_data.path)
    tools.work.mkdir(parents=True, exist_ok=True)
    timeout_seconds = request_timeout(spec.gates.latency, timeout_seconds)
    if spec.gates.latency.generator == "built_in":
        return _by_built_in(spec, endpoint, version, contract, prompts, tools, timeout_seconds)
    return _by_aiperf(
        spec,
        endpoint,
        version,
        contract,
        prompts,
        checkpoint,
        tools,
        timeout_seconds,
        aiperf_command,
    )


def judge_staging_latency(latency: LatencySummary | None, gates: Gates) -> Judgement:
    """The server keeps the spec's bounds under load; without a measurement it does not.

    Raises:
        DataError: it was measured otherwise than the gates ask for.
    """
    gate = gates.latency
    if latency is None:
        return Judgement(
            decision=Decision.FAILED,
            measured={"requests": 0},
            threshold={"requests": _requests(gate)},
            reason="Nothing was measured, because the known questions were not answered right.",
            advice="fix: see staging_smoke, and make a new release",
        )
    return judge_latency(
        latency,
        gate.staging,
        confidence=gates.confidence,
        objective=gate.objective,
        goodput=gate.goodput,
    )


def choose_prompts(evaluation_data: Path) -> list[str]:
    """Prompts of a data directory, at random and always the same ones.

    Raises:
        DataError: it is not a data directory.
    """
    from llmops_assets.develop.data import read_data

    prompts: list[str] = read_data(evaluation_data)["prompt"].to_pylist()
    return random.Random(SEED).sample(prompts, min(MOST_PROMPTS, len(prompts)))


def request_timeout(gate: LatencyGate, at_least: float) -> float:
    """Seconds after which a request has failed: none is cut off that a bound still allows."""
    allowed = [bound.at_most for bound in gate.staging]
    if gate.objective is not None:
        allowed += [seconds for seconds in gate.objective.model_dump().values() if seconds]
    return max(at_least, 2 * max(allowed))


def _by_built_in(
    spec: ModelSpec,
    endpoint: Endpoint,
    version: int,
    contract: RequestContract,
    prompts: list[str],
    tools: ToolRunner,
    timeout_seconds: float,
) -> LatencySummary:
    gate = spec.gates.latency
    questions, output = tools.work / "prompts.json", tools.work / "load.json"
    questions.write_text(json.dumps(prompts), encoding="utf-8")
    tools.run(
        "load generator",
        module_command(
            "llmops_assets.serving.load",
            "--url", endpoint.http,
            "--model", spec.name,
            "--version", str(version),
            "--contract", contract.model_dump_json(),
            "--prompts", questions,
            "--concurrency", *map(str, gate.measured_concurrencies),
            "--requests", str(_requests(gate)),
            "--max-tokens", str(spec.constraints.max_output_tokens),
            "--timeout-seconds", str(timeout_seconds),
            "--seed", str(SEED),
            "--output", output,
        ),
    )  # fmt: skip
    results = TypeAdapter(tuple[LoadResult, ...]).validate_json(output.read_text(encoding="utf-8"))
    return summarize(results, gate.objective, spec.gates.confidence)


def _by_aiperf(
    spec: ModelSpec,
    endpoint: Endpoint,
    version: int,
    contract: RequestContract,
    prompts: list[str],
    checkpoint: ArtifactHandle,
    tools: ToolRunner,
    timeout_seconds: float,
    executable: Path | None,
) -> LatencySummary:
    if executable is None:
        raise SettingsError(
            f"The spec of {spec.name} has its latency measured by AIPerf, which is not there",
            expected=f"{aiperf.VARIABLE}, the aiperf command of a virtual environment of its own",
            found=f"no {aiperf.VARIABLE} in the environment of this run",
            cure="`python -m venv DIR && DIR/bin/pip install aiperf==0.13.0`, set "
            f"{aiperf.VARIABLE}=DIR/bin/aiperf and start the platform again; or make a new "
            "release with gates.latency.generator: built_in",
        )
    aiperf.check_executable(executable)
    aiperf.check_contract(contract)
    gate, confidence = spec.gates.latency, spec.gates.confidence
    questions = tools.work / "prompts.jsonl"
    aiperf.write_prompts(prompts, questions)
    levels = []
    for concurrency in gate.measured_concurrencies:
        output = tools.work / f"concurrency-{concurrency}"
        shutil.rmtree(output, ignore_errors=True)  # what a killed attempt left
        tools.run(
            "AIPerf",
            aiperf.command(
                executable,
                endpoint.http,
                spec.name,
                questions,
                output,
                tokenizer=checkpoint.path,
                concurrency=concurrency,
                requests=_requests(gate),
                max_tokens=spec.constraints.max_output_tokens,
                timeout_seconds=timeout_seconds,
                seed=SEED,
                version=version,
                contract=contract,
            ),
            # It keeps files in the home folder.
            {**aiperf.ENVIRONMENT, "HOME": str(tools.work)},
        )
        levels.append(aiperf.read_level(output, concurrency, gate.objective, confidence, contract))
    return aiperf.summarize(levels, confidence)


def _requests(gate: LatencyGate) -> int:
    """Of each concurrency: as many as the spec says, and one for every client at least."""
    return max(gate.requests, *gate.measured_concurrencies)
