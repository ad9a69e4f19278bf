"""AIPerf and the built-in load generator, side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmops_assets.errors import SettingsError, ToolError
from llmops_assets.evidence import latency
from llmops_assets.evidence.latency import ConcurrencyLevel
from llmops_assets.serving import aiperf, load
from llmops_assets.settings import Settings
from llmops_assets.spec import LatencyObjective
from llmops_assets.toolchains.tensorrt_llm.packaging import ENSEMBLE_CONTRACT, LLMAPI_CONTRACT
from llmops_assets.tools import run_tool
from llmops_assets_tests.tiny_llama import TinyLlama

from .conftest import MODEL, fill, running
from .stream_double import stream_double

PROMPTS = [f"{day} août {1950 + day}" for day in range(1, 29)]
AGREEMENT = 0.15
TIMED_MODEL = Path(__file__).with_name("timed_model.py")  # imports what only Triton has


@pytest.fixture
def command() -> Path:
    found = Settings().aiperf
    if found is None:
        pytest.skip(
            f"{aiperf.VARIABLE} names no aiperf command; see llmops_assets/serving/aiperf.py"
        )
    return found


def ask(
    command: Path, url: str, prompts: list[str], folder: Path, tiny: TinyLlama, **numbers: Any
) -> ConcurrencyLevel:
    folder.mkdir()
    aiperf.write_prompts(prompts, folder / "prompts.jsonl")
    arguments = aiperf.command(
        command, url, MODEL, folder / "prompts.jsonl", folder / "output",
        tokenizer=tiny.checkpoint, max_tokens=32, timeout_seconds=20, **numbers,
    )  # fmt: skip
    run_tool(
        "aiperf", arguments, work=folder / "work", log=folder / "log", timeout_seconds=120,
        environment={**aiperf.ENVIRONMENT, "HOME": str(folder)},
    )  # fmt: skip
    return aiperf.read_level(folder / "output", numbers["concurrency"])


def figures(level: ConcurrencyLevel) -> dict[str, float | None]:
    return {
        "time to first token, p50": level.time_to_first_token.p50,
        "inter-token latency, p50": level.inter_token_latency.p50,
        "end to end, p50": level.end_to_end.p50,
        "end to end, p95": level.end_to_end.p95,
        "requests per second": level.request_throughput,
        "tokens per second": level.output_token_throughput,
    }


@pytest.mark.aiperf
@pytest.mark.timeout(400)
def test_agrees_with_the_built_in_generator(
    command: Path, tiny: TinyLlama, state: Path, tmp_path: Path
) -> None:
    """Two tools that disagree on the same server measure something else than it.

    Real Triton and real streams; only the model's time is made, so that neither other work
    on the machine nor AIPerf itself changes what there is to measure.
    """
    package = tmp_path / "package"
    shutil.copytree(tiny.package, package)
    model = package / "repository" / MODEL / "version" / "model.py"
    shutil.copyfile(TIMED_MODEL, model)
    slot = tmp_path / "slot"
    slot.mkdir()
    endpoint = fill(package, slot, state)
    with running(slot, endpoint, 1, state):
        for concurrency, requests in ((1, 40), (4, 120)):
            built_in = latency.summarize(
                [
                    load.measure(
                        endpoint.http, MODEL, PROMPTS, concurrency=concurrency,
                        requests=requests, max_tokens=32, timeout_seconds=20,
                    )
                ]
            )  # fmt: skip
            theirs = ask(
                command, endpoint.http, PROMPTS, tmp_path / f"aiperf{concurrency}", tiny,
                concurrency=concurrency, requests=requests,
            )  # fmt: skip
            ours = built_in.levels[0]
            assert (ours.requests, ours.errors) == (theirs.requests, theirs.errors)
            assert (ours.requests, ours.errors) == (requests, 0)
            for name, value in figures(ours).items():
                print(f"concurrency {concurrency}, {name}: {value} here, "
                      f"{figures(theirs)[name]} by AIPerf")  # fmt: skip
            assert figures(ours) == pytest.approx(figures(theirs), rel=AGREEMENT)


@pytest.mark.aiperf
@pytest.mark.timeout(200)
def test_what_aiperf_takes_for_an_answer_is_none(
    command: Path, tiny: TinyLlama, tmp_path: Path
) -> None:
    """AIPerf counts an error inside a stream as success; a gate must not."""
    prompts = ["fine", "unavailable", "error", "broken", "cut"]
    with stream_double() as url:
        level = ask(
            command, url, prompts, tmp_path / "aiperf", tiny,
            concurrency=1, requests=len(prompts), warm_up=0,
        )  # fmt: skip
    assert (level.requests, level.errors) == (5, 4)
    reasons = " ".join(level.error_reasons)
    assert "out of pages" in reasons
    assert "ended before the answer did" in reasons
    assert "no slot is ready" in reasons


def write(folder: Path, phase: str, start: float, raw: list[dict[str, object]]) -> None:
    """Adds a request to a folder as AIPerf 0.13 writes it; times in seconds."""
    metadata = {
        "x_request_id": f"{phase}-{start}",
        "request_start_ns": start * 1e9,
        "request_end_ns": (start + 0.5) * 1e9,
        "benchmark_phase": phase,
    }
    values = {"time_to_first_token": 50, "inter_token_latency": 10, "request_latency": 120}
    metrics = {name: {"value": value, "unit": "ms"} for name, value in values.items()}
    metrics["output_sequence_length"] = {"value": 8, "unit": "tokens"}
    responses = [{"packets": [{"name": "data", "value": json.dumps(piece)}]} for piece in raw]
    with (folder / aiperf.RECORDS_FILE).open("a") as records:
        records.write(json.dumps({"metadata": metadata, "metrics": metrics}) + "\n")
    with (folder / aiperf.RAW_FILE).open("a") as records:
        records.write(json.dumps({"metadata": metadata, "responses": responses}) + "\n")


def test_records_become_the_same_figures(tmp_path: Path) -> None:
    """Milliseconds taken for seconds, or warm-up for load, would pass any gate."""
    write(tmp_path, "warmup", 0, [{"finish_reason": "stop"}])
    for start in range(3):
        write(tmp_path, "profiling", 10 + start, [{"text_output": "1"}, {"finish_reason": "stop"}])
    write(tmp_path, "profiling", 13, [{"text_output": "1"}])
    level = aiperf.read_level(tmp_path, 2, LatencyObjective(end_to_end=0.2))
    assert (level.concurrency, level.requests, level.errors) == (2, 4, 1)
    assert level.error_reasons == {"the stream ended before the answer did": 1}
    assert level.time_to_first_token.mean == pytest.approx(0.05)
    assert level.inter_token_latency.mean == pytest.approx(0.01)
    assert level.end_to_end.mean == pytest.approx(0.12)
    assert level.duration == pytest.approx(3.5)
    assert level.request_throughput == pytest.approx(3 / 3.5)
    assert level.output_token_throughput == pytest.approx(24 / 3.5)
    assert level.goodput is not None
    assert level.goodput.share.value == pytest.approx(0.75)


def test_other_packages_are_asked_by_their_contract(tmp_path: Path) -> None:
    """AIPerf fills in a template: what the model is asked by has to be in it."""
    command = aiperf.command(
        tmp_path, "http://host", MODEL, tmp_path, tmp_path, tokenizer=tmp_path, concurrency=1,
        requests=1, max_tokens=7, timeout_seconds=1, contract=ENSEMBLE_CONTRACT,
    )  # fmt: skip
    extra = json.loads(command[command.index("--extra-inputs") + 1])
    assert json.loads(extra["payload_template"].replace("{{ text|tojson }}", '"p"')) == {
        "text_input": "p", "max_tokens": 7, "stream": True, "return_num_output_tokens": True,
    }  # fmt: skip
    assert extra["response_field"] == "text_output"
    write(tmp_path, "profiling", 10, [{"text_output": "1"}])
    write(tmp_path, "profiling", 11, [{"text_output": "1"}, {"error": "out of pages"}])
    write(tmp_path, "profiling", 12, [])
    level = aiperf.read_level(tmp_path, 1, contract=ENSEMBLE_CONTRACT)
    assert (level.requests, level.errors) == (3, 2)


def test_repeated_answers_are_refused() -> None:
    """AIPerf would count the tokens of an answer's beginning again in every piece."""
    aiperf.check_contract(ENSEMBLE_CONTRACT)
    with pytest.raises(SettingsError, match="built_in"):
        aiperf.check_contract(LLMAPI_CONTRACT)


@pytest.mark.parametrize("text", ["", "no JSON", '{"metadata": {}}'])
def test_other_records_are_refused(text: str, tmp_path: Path) -> None:
    """Another version's files must not become figures."""
    (tmp_path / aiperf.RECORDS_FILE).write_text(text)
    (tmp_path / aiperf.RAW_FILE).write_text(text)
    with pytest.raises(ToolError, match=r"0\.13"):
        aiperf.read_level(tmp_path, 1)


def test_variable_must_name_a_command(tmp_path: Path) -> None:
    """A typing error in the variable must not silently mean that there is no AIPerf."""
    command = tmp_path / "aiperf"
    with pytest.raises(SettingsError, match=aiperf.VARIABLE):
        aiperf.check_executable(command)
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    aiperf.check_executable(command)
