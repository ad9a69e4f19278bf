"""NVIDIA AIPerf as the load generator, for those who want the field's own figures.

Optional. AIPerf needs another numpy than Triton's Python backend, so it lives in a virtual
environment of its own: `python -m venv DIR && DIR/bin/pip install aiperf==0.13.0`, then set
`LLMOPS_AIPERF=DIR/bin/aiperf`.

It asks `generate_stream` through its `template` endpoint, and its records of single
requests become the same `LatencySummary` that the built-in generator's do. AIPerf takes an
error inside a stream, and a stream that just ends, for an answer; here they are failures,
as its raw export tells them apart.

AIPerf is several processes. Beside a model on the same few cores it slows down what it
measures, and it adds about half a millisecond per token: leave it to models that take
several milliseconds for one, or to another machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmops_assets.errors import DataError, SettingsError, ToolError
from llmops_assets.evidence.latency import (
    CONFIDENCE,
    ConcurrencyLevel,
    LatencySummary,
    RequestTimes,
    level,
)
from llmops_assets.serving.request_contract import EMBEDDED, RequestContract
from llmops_assets.spec import LatencyObjective

VARIABLE = "LLMOPS_AIPERF"
RECORDS_FILE = "profile_export.jsonl"
RAW_FILE = "profile_export_raw.jsonl"
MILLISECONDS = 1e-3
NANOSECONDS = 1e-9

# AIPerf 0.13 mistakes a tokenizer's folder for a name on the hub when it is told to stay
# offline. Given a folder it downloads nothing anyway.
ENVIRONMENT = {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""}


def check_contract(contract: RequestContract) -> None:
    """Checks that AIPerf can count the tokens of a package's answers.

    Raises:
        SettingsError: each piece repeats the answer so far, which AIPerf would count again.
    """
    if contract.text_so_far:
        raise SettingsError(
            "AIPerf cannot measure a model whose stream repeats the answer in every piece",
            expected="pieces that add up to the answer",
            found=f"{contract.text} with the answer so far",
            cure="make a new release with gates.latency.generator: built_in",
        )


def check_executable(path: Path) -> None:
    """Checks that a path is that of a command.

    Raises:
        SettingsError: it names no executable file.
    """
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise SettingsError(
            f"{VARIABLE} does not name the aiperf command",
            expected="an executable file, such as DIR/bin/aiperf of a virtual environment",
            found=path,
            cure=f"install aiperf==0.13.0 there, or unset {VARIABLE}",
        )


def write_prompts(prompts: Sequence[str], path: Path) -> None:
    """Writes prompts as AIPerf's `single_turn` dataset.

    Raises:
        DataError: there are none.
    """
    if not prompts:
        raise DataError("There are no prompts to ask", cure="give the prompts to measure with")
    path.write_text(
        "".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts), encoding="utf-8"
    )


def command(
    aiperf: Path,
    url: str,
    model: str,
    prompts: Path,
    output: Path,
    *,
    tokenizer: Path,
    concurrency: int,
    requests: int,
    warm_up: int | None = None,
    max_tokens: int,
    timeout_seconds: float,
    seed: int = 0,
    version: int | None = None,
    contract: RequestContract = EMBEDDED,
) -> list[str]:
    """The command that measures one concurrency, for the tool runner with `ENVIRONMENT`.

    Args:
        aiperf: from `executable`.
        url: a slot's or a gateway's address.
        model: its name.
        prompts: from `write_prompts`.
        output: folder for AIPerf's files, to be read by `read_level`.
        tokenizer: Hugging Face directory that answers are counted with.
        concurrency: requests under way at once.
        requests: how many to measure.
        warm_up: how many go first; None for two per client.
        max_tokens: longest answer, tokens.
        timeout_seconds: limit of a whole request.
        seed: of the order of prompts.
        version: pins the requests to a version; None leaves the choice to the server.
        contract: of the package that is asked, which `check_contract` let pass.
    """
    pinned = "" if version is None else f"/versions/{version}"
    extra = {
        "payload_template": _payload_template(contract, max_tokens),
        "response_field": _response_field(contract),
    }
    warm_up = 2 * concurrency if warm_up is None else warm_up
    return [
        os.fspath(aiperf), "profile",
        "--model", model,
        "--url", url,
        "--endpoint", f"/v2/models/{model}{pinned}/generate_stream",
        "--endpoint-type", "template",
        "--streaming",
        "--extra-inputs", json.dumps(extra),
        "--input-file", os.fspath(prompts),
        "--custom-dataset-type", "single-turn",
        "--dataset-sampling-strategy", "shuffle",
        "--tokenizer", os.fspath(tokenizer.resolve()),
        "--concurrency", str(concurrency),
        "--request-count", str(requests),
        *(["--warmup-request-count", str(warm_up)] if warm_up else []),
        "--random-seed", str(seed),
        "--request-timeout-seconds", str(timeout_seconds),
        "--output-artifact-dir", os.fspath(output),
        "--export-level", "raw",
        "--ui", "none",
        # One of each is plenty for a model that a CPU serves, and leaves it the cores.
        "--workers-max", "1",
        "--record-processors", "1",
        "--no-gpu-telemetry",
        "--no-server-metrics",
    ]  # fmt: skip


def read_level(
    output: Path,
    concurrency: int,
    objective: LatencyObjective | None = None,
    confidence: float = CONFIDENCE,
    contract: RequestContract = EMBEDDED,
) -> ConcurrencyLevel:
    """What AIPerf measured at one concurrency, from its records of single requests.

    Raises:
        ToolError: a file is missing or is not what AIPerf 0.13 writes.
    """
    answered: list[RequestTimes] = []
    errors: list[str] = []
    starts: list[float] = []
    ends: list[float] = []
    try:
        broken = {
            record["metadata"]["x_request_id"]: reason
            for record in _measured_records(output / RAW_FILE)
            if (reason := _broken(record, contract)) is not None
        }
        for record in _measured_records(output / RECORDS_FILE):
            metadata = record["metadata"]
            start = metadata["request_start_ns"] * NANOSECONDS
            starts.append(start)
            if reason := _error(record) or broken.get(metadata["x_request_id"]):
                errors.append(reason)
                ends.append(metadata["request_end_ns"] * NANOSECONDS)
            else:
                request = _times(record["metrics"])
                answered.append(request)
                ends.append(start + request.end_to_end)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(output, error) from error
    if not starts:
        raise _unreadable(output, "no record of the profiling phase")
    return level(
        concurrency,
        answered,
        errors,
        duration=max(ends) - min(starts),
        objective=objective,
        confidence=confidence,
    )


def summarize(levels: Sequence[ConcurrencyLevel], confidence: float = CONFIDENCE) -> LatencySummary:
    """The levels that `read_level` read, as one summary."""
    return LatencySummary(source="aiperf", confidence=confidence, levels=tuple(levels))


def _payload_template(contract: RequestContract, max_tokens: int) -> str:
    """The body of a request, in Jinja."""
    body = contract.body("", max_tokens, stream=True)
    del body[contract.prompt]
    return f'{{"{contract.prompt}": {{{{ text|tojson }}}}, {json.dumps(body)[1:]}'


def _response_field(contract: RequestContract) -> str:
    """The text of a piece, in JMESPath.

    The piece with the end token has no text, which AIPerf would not take for an answer's
    part; a space stands for that token, so that it is timed and counted as by the model.
    """
    if contract.finish_reason is None:
        return contract.text
    return f"{contract.text} || ({contract.finish_reason} == 'stop' && ' ')"


def _measured_records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["metadata"]["benchmark_phase"] == "profiling":
                yield record


def _error(record: dict[str, Any]) -> str | None:
    """What AIPerf itself says went wrong; None if nothing did."""
    error = record.get("error")
    if error:
        return f"{error.get('type')}: {error.get('message')}"
    if record["metadata"].get("was_cancelled"):
        return "cancelled"
    return None


def _broken(raw: dict[str, Any], contract: RequestContract) -> str | None:
    """Why a stream holds no whole answer; None if it does.

    Where the model gives no finish reason, a stream without an error that AIPerf read to its
    end is one.
    """
    pieces = [
        json.loads(packet["value"])
        for response in raw["responses"]
        for packet in response.get("packets", ())
        if packet["name"] == "data"
    ]
    for piece in pieces:
        if "error" in piece:
            return f"error in the stream: {piece['error']}"
        if contract.ends(piece):
            return None
    if pieces and contract.finish_reason is None:
        return None
    return "the stream ended before the answer did"


def _times(metrics: dict[str, dict[str, Any]]) -> RequestTimes:
    def milliseconds(name: str) -> float:
        metric = metrics[name]
        if metric["unit"] != "ms":
            raise ValueError(f"{name} is in {metric['unit']}, not in ms")
        return float(metric["value"]) * MILLISECONDS

    return RequestTimes(
        time_to_first_token=milliseconds("time_to_first_token"),
        inter_token_latency=(
            milliseconds("inter_token_latency") if "inter_token_latency" in metrics else None
        ),
        end_to_end=milliseconds("request_latency"),
        output_tokens=int(metrics["output_sequence_length"]["value"]),
    )


def _unreadable(output: Path, found: object) -> ToolError:
    return ToolError(
        f"AIPerf's records in {output} cannot be used",
        expected=f"{RECORDS_FILE} and {RAW_FILE}, as AIPerf 0.13 writes them",
        found=found,
        cure="read AIPerf's log there; install aiperf==0.13.0 if it is another version",
    )
