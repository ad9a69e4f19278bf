"""Every failure that the tools are known to print is found and explained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmops_assets.errors import ToolchainError, ToolError
from llmops_assets.toolchains.tensorrt_llm.complaints import (
    COMPLAINTS,
    LARGEST_NUMBER_OF_WARNINGS,
    LogScanner,
)
from llmops_assets.toolchains.tensorrt_llm.running import run_listening
from llmops_assets.tools import ToolRunner

from .conftest import build_command
from .doubles.behaviour import FAILURES, SENTENCES
from .doubles.installation import Installation
from .doubles.trtllm_build_double import EVER_PRESENT

# What no double prints: Triton's own sentences, and those of argument parsers.
OTHER_SENTENCES = {
    "backend_not_filled_in": "Invalid argument: unable to find backend library for backend "
    "'${triton_backend}', try specifying runtime on the model configuration.",
    "placeholder_left": "[libprotobuf ERROR] Error parsing text-format "
    "inference.ModelConfig: 29:17: Expected integer or identifier, got: $",
    "engine_directory_not_there": "Both encoder and decoder model paths are empty",
    "batching_strategy": "[TensorRT-LLM][ERROR] Invalid gpt_model_type: ${batching_strategy}",
    "arguments_not_understood": "trtllm-build: error: unrecognized arguments: --auto_parallel",
}
ALL_SENTENCES = {**SENTENCES, **OTHER_SENTENCES}
LOG = Path("tool.log")


def scan(*lines: str) -> LogScanner:
    scanner = LogScanner()
    for line in lines:
        scanner.read(line)
    return scanner


def found(*lines: str) -> str | None:
    complaint = scan(*lines).complaint
    return None if complaint is None else complaint.name


def test_every_complaint_has_a_sentence() -> None:
    """Otherwise a pattern that matches nothing would look as if it were tested."""
    assert set(ALL_SENTENCES) == set(COMPLAINTS)


@pytest.mark.parametrize("name", ALL_SENTENCES)
def test_complaint_is_found_in_the_middle_of_a_log(name: str) -> None:
    """Its own sentence is matched, and by its own pattern only."""
    scanner = scan(
        "[TRT-LLM] [I] Set dtype to bfloat16.",
        f"[1,0]<stderr>:{ALL_SENTENCES[name]}",
        "[TRT-LLM] [I] Loaded model.",
    )
    assert scanner.complaint is COMPLAINTS[name]
    matching = [other for other in COMPLAINTS.values() if other.pattern.search(ALL_SENTENCES[name])]
    assert matching == [COMPLAINTS[name]]
    error = scanner.error(LOG)
    assert error is not None
    assert type(error) is COMPLAINTS[name].error
    assert ALL_SENTENCES[name].rstrip(".") in str(error)
    assert COMPLAINTS[name].cure in error.cure
    assert str(LOG) in error.cure


@pytest.mark.parametrize(
    "line",
    [
        "error: argument --tp_size: invalid int value: 'two'",
        "error: the following arguments are required: --checkpoint_dir",
        "Error: No such option: --engine",
        "Error: Missing option '--model'",
        "Error: Invalid value for '--backend': 'trt' is not one of 'pytorch', 'tensorrt'",
    ],
)
def test_every_wrong_argument_is_understood(line: str) -> None:
    """argparse and click each say it in several ways."""
    assert found(line) == "arguments_not_understood"


def test_the_telling_sentence_wins() -> None:
    """Tools end with a general sentence that nobody can do anything with."""
    general, telling = SENTENCES["building_failed"], SENTENCES["plugin_not_on_this_gpu"]
    assert found(telling, general) == "plugin_not_on_this_gpu"
    assert found(general, telling) == "plugin_not_on_this_gpu"
    assert found(SENTENCES["cannot_deserialize"], SENTENCES["other_gpu"]) == "other_gpu"
    # Of two that tell something the first is the cause.
    assert found(SENTENCES["other_gpu"], SENTENCES["other_tensorrt"]) == "other_gpu"


def test_what_may_be_recovered_from_yields_and_counts_only_on_failure() -> None:
    """Calibration tries batches until one fits; a build that then breaks is a failure."""
    recovered = scan(SENTENCES["gpu_memory"])
    assert not recovered.failed
    assert found(SENTENCES["gpu_memory"], SENTENCES["streaming_llm"]) == "streaming_llm"
    broken = scan(SENTENCES["gpu_memory"], SENTENCES["building_failed"])
    assert broken.failed
    assert broken.complaint is COMPLAINTS["gpu_memory"]


def test_ever_present_warning_is_ignored_and_others_are_kept() -> None:
    """A warning of every build would hide those that say something."""
    other = "[TRT-LLM] [W] The TensorRT backend is deprecated."
    assert scan(EVER_PRESENT, other).warnings == [other]
    assert found(EVER_PRESENT) is None
    assert len(scan(*[other] * 100).warnings) == LARGEST_NUMBER_OF_WARNINGS


@pytest.mark.parametrize(
    "line",
    [
        "[TRT-LLM] [I] gemm_plugin = auto",
        "Total time of building all engines: 00:01:07",
        "[TRT] Detected 2 inputs; Engine generation completed in 12.1 seconds.",
        "[TRT-LLM] [I] Engine world size: 2, runtime world size: 2",
        "[TRT-LLM] [I] maxTokensInPagedKvCache: 8192",
    ],
)
def test_harmless_lines_are_no_complaints(line: str) -> None:
    """A false alarm throws an engine of an hour away."""
    assert found(line) is None


def test_run_without_complaint_reports_warnings_and_lines(
    installation: Installation, converted: Path, tools: ToolRunner, tmp_path: Path
) -> None:
    """The step's log must still get every line."""
    lines: list[str] = []
    tools = ToolRunner(tools.work, tools.log, 20, on_line=lines.append)
    command = build_command(installation, converted, tmp_path / "engine")
    heard = run_listening(tools, "trtllm-build", command)
    assert heard.warnings == ()
    assert EVER_PRESENT in lines
    assert heard.run.log == tools.log


SPOKEN = sorted(
    (tool, failure)
    for tool, failures in FAILURES.items()
    for failure in failures
    if failure in SENTENCES and tool in ("convert_checkpoint.py", "trtllm-build")
)


@pytest.mark.parametrize(("tool", "failure"), SPOKEN)
def test_failing_tool_is_explained(
    tool: str,
    failure: str,
    installation: Installation,
    hugging_face: Path,
    tools: ToolRunner,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """From the tool's output to the error of the step, past the general sentence."""
    if tool == "trtllm-build":
        converted = request.getfixturevalue("converted")
        command = build_command(installation, converted, tmp_path / "engine")
    else:
        command = installation.command(tool, "--model_dir", hugging_face, "--output_dir", "out")
    installation.fail(tool, failure)
    with pytest.raises((ToolchainError, ToolError)) as caught:
        run_listening(tools, tool, command)
    assert caught.value.problem == COMPLAINTS[failure].problem
    assert isinstance(caught.value.__cause__, ToolError)
    assert "exit code 1" in str(caught.value.__cause__)


def test_unknown_failure_stays_what_it_is(installation: Installation, tools: ToolRunner) -> None:
    """Nobody is told a cure that has nothing to do with the failure."""
    command = installation.command("convert_checkpoint.py", "--model_dir", "nowhere")
    with pytest.raises(ToolError, match=r"exit code 1.*No such file") as caught:
        run_listening(tools, "convert_checkpoint.py", command)
    assert caught.value.problem == "convert_checkpoint.py failed"


def test_complaint_with_exit_code_zero_is_a_failure(tools: ToolRunner) -> None:
    """A worker process can fail while the one that started it ends well."""
    command = ["/bin/echo", SENTENCES["other_gpu"]]
    with pytest.raises(ToolchainError, match="compute capability"):
        run_listening(tools, "the tool", command)
    heard = run_listening(tools, "the tool", ["/bin/echo", SENTENCES["gpu_memory"]])
    assert heard.run.seconds > 0


def test_tools_find_the_images_mpi(tools: ToolRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """`import tensorrt_llm` starts MPI, which images with HPC-X find by OPAL_PREFIX alone
    (srv#6741); a job that this process is part of is none of the tool's.
    """
    passed = {"OPAL_PREFIX": "/opt/hpcx/ompi", "NCCL_DEBUG": "INFO", "UCX_TLS": "tcp",
              "OMPI_MCA_btl": "self", "CUDA_HOME": "/usr/local/cuda"}  # fmt: skip
    kept = {"OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0", "AWS_SECRET_ACCESS_KEY": "hidden"}
    for name, value in {**passed, **kept}.items():
        monkeypatch.setenv(name, value)
    seen: list[str] = []
    run_listening(replace(tools, on_line=seen.append), "env", ["/usr/bin/env"], {"UCX_TLS": "ours"})
    found = dict(line.split("=", 1) for line in seen)
    assert {name: found.get(name) for name in passed} == {**passed, "UCX_TLS": "ours"}
    assert not kept.keys() & found.keys()
