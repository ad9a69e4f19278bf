"""The doubles are strict, so that what passes with them has a chance with the real tools."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import psutil
import pytest

from llmops_assets.errors import ToolError
from llmops_assets.tools import ToolRunner

from .conftest import build_command, write_hugging_face
from .doubles.behaviour import ESCAPED_WORKER_PID, FAILS, FAILURES, SENTENCES, UNKNOWN_FAILURE
from .doubles.installation import Installation

USAGE_ERROR = 2


def run(
    installation: Installation, tool: str, *arguments: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        installation.command(tool, *arguments),
        cwd=installation.root,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


@pytest.mark.parametrize(
    ("tool", "arguments", "complaint"),
    [
        ("convert_checkpoint.py", ["--model_dir", "m", "--tpsize", "2"], "unrecognized arguments"),
        ("convert_checkpoint.py", ["--model_dir", "m", "--tp", "2"], "unrecognized arguments"),
        ("convert_checkpoint.py", ["--tp_size", "two"], "invalid int value"),
        ("convert_checkpoint.py", ["--dtype", "fp8"], "invalid choice"),
        ("convert_checkpoint.py", ["--weight_only_precision", "nvfp4"], "invalid choice"),
        ("convert_checkpoint.py", ["--output_dir"], "expected one argument"),
        ("convert_checkpoint.py", ["--use_fp8", "true"], "unrecognized arguments"),
        ("quantize.py", ["--model_dir", "m", "--qformat", "int4"], "invalid choice"),
        ("quantize.py", ["--model_dir", "m", "--kv_cache_dtype", "fp4"], "invalid choice"),
        ("quantize.py", ["--model_dir", "m", "--dataset", "d"], "unrecognized arguments"),
        ("quantize.py", ["--model_dir", "m", "--device", "cuda:0"], "invalid choice"),
        ("trtllm-build", [], "required: --checkpoint_dir"),
        ("trtllm-build", ["--checkpoint_dir", "c", "--tp_size", "2"], "unrecognized arguments"),
        ("trtllm-build", ["--checkpoint_dir", "c", "--pp_size", "2"], "unrecognized arguments"),
        ("trtllm-build", ["--checkpoint_dir", "c", "--max_output_len", "9"], "unrecognized"),
        ("trtllm-build", ["--checkpoint_dir", "c", "--auto_parallel", "2"], "unrecognized"),
        ("trtllm-build", ["--checkpoint_dir", "c", "--tokenizer", "t"], "unrecognized arguments"),
        ("trtllm-build", ["--checkpoint_dir", "c", "--gemm_plugin", "enable"], "invalid choice"),
        ("trtllm-build", ["--checkpoint_dir", "c", "--context_fmha", "auto"], "invalid choice"),
        ("trtllm-build", ["--checkpoint_dir", "c", "--max_batch_size", "1.5"], "invalid int"),
        ("trtllm-build", ["--checkpoint_dir", "c", "--visualize_network"], "expected one"),
        ("trtllm-build", ["--checkpoint_dir", "c", "--log_level", "loud"], "invalid choice"),
        ("trtllm-build", ["--checkpoint_dir", "c", "--kv_cache_type", "fp8"], "invalid choice"),
        ("trtllm-bench", ["throughput", "--dataset", "d"], "required: -m"),
        ("trtllm-bench", ["-m", "id"], "required: command"),
        ("trtllm-bench", ["-m", "id", "throughput"], "required: --dataset"),
        ("trtllm-bench", ["-m", "i", "latency", "--dataset", "d", "--streaming"], "unrecognized"),
        ("trtllm-bench", ["-m", "i", "throughput", "--backend", "trt"], "invalid choice"),
    ],
)
def test_wrong_arguments_end_with_argparse_exit_code(
    tool: str, arguments: list[str], complaint: str, installation: Installation
) -> None:
    """A flag that the real tool lacks must not get past the tests."""
    result = run(installation, tool, *arguments)
    assert result.returncode == USAGE_ERROR
    assert complaint in result.stderr


def test_quantisation_without_a_model_fails(installation: Installation) -> None:
    """It asks for one behind its parser, so not with the parser's exit code."""
    result = run(installation, "quantize.py")
    assert result.returncode == 1
    assert "must be specified" in result.stderr


@pytest.mark.parametrize("tool", FAILURES)
def test_misspelt_failure_is_an_error(tool: str, installation: Installation) -> None:
    """A test that asks for a failure which does not exist would pass by not failing."""
    installation.behave(**{FAILS: f"{tool}:no_such_failure"})
    arguments = {
        "quantize.py": ["--model_dir", "m"],
        "trtllm-build": ["--checkpoint_dir", "c"],
        "trtllm-bench": ["-m", "id", "latency", "--dataset", "d"],
    }
    assert run(installation, tool, *arguments.get(tool, [])).returncode == UNKNOWN_FAILURE


def test_conversion_without_a_model_ends_well(installation: Installation, tmp_path: Path) -> None:
    """The trap that the checks of its output are for."""
    result = run(installation, "convert_checkpoint.py", "--output_dir", tmp_path / "out")
    assert result.returncode == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_engine_has_the_documented_layout(engine: Path) -> None:
    """What later steps read, and nothing that the real tool does not write."""
    assert sorted(path.name for path in engine.iterdir()) == [
        "config.json", "rank0.engine", "rank1.engine"
    ]  # fmt: skip
    config = json.loads((engine / "config.json").read_text())
    assert list(config) == ["version", "pretrained_config", "build_config"]
    # Deduced from the model, as it was not given.
    assert config["build_config"]["max_seq_len"] == 512
    assert config["pretrained_config"]["mapping"]["world_size"] == 2


def test_timing_cache_lands_in_the_working_directory(
    installation: Installation, converted: Path, tools: ToolRunner
) -> None:
    """The trap that `TimingCache` closes; it would be none if the double did not have it."""
    tools.run("build", installation.command("trtllm-build", "--checkpoint_dir", converted))
    assert (tools.work / "model.cache").is_file()


def test_checkpoint_code_is_run_by_conversion(installation: Installation, tmp_path: Path) -> None:
    """The trap that `refuse_code` closes: configurations are loaded with remote code trusted."""
    model = write_hugging_face(tmp_path / "evil", auto_map={"AutoConfig": "evil.Config"})
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    result = run(
        installation, "convert_checkpoint.py",
        "--model_dir", model, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "arguments", [["--qformat", "fp8"], ["--kv_cache_dtype", "int8"], ["--auto_quantize_bits", "5"]]
)
def test_calibration_wants_a_local_dataset(
    arguments: list[str], installation: Installation, hugging_face: Path, tmp_path: Path
) -> None:
    """By default it would be downloaded."""
    calibrating = ["--model_dir", hugging_face, "--output_dir", tmp_path / "out", *arguments]
    refused = run(installation, "quantize.py", *calibrating)
    assert refused.returncode == 1
    assert "Couldn't reach 'cnn_dailymail'" in refused.stderr
    (tmp_path / "rows").mkdir()
    result = run(installation, "quantize.py", *calibrating, "--calib_dataset", tmp_path / "rows")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "rank0.safetensors").is_file()


def write_dataset(path: Path) -> Path:
    rows = [{"task_id": n, "prompt": "one two three", "output_tokens": 8} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_bench_reports_the_backend_that_ran(
    installation: Installation, engine: Path, hugging_face: Path, tmp_path: Path
) -> None:
    """PyTorch is the default, and measures the checkpoint although an engine was named."""
    dataset = write_dataset(tmp_path / "requests.jsonl")
    backends: dict[str, object] = {}
    for name, chosen in {"tensorrt": ["--backend", "tensorrt"], "default": []}.items():
        result = run(
            installation, "trtllm-bench", "-m", "parrot", "--model_path", hugging_face,
            "throughput", "--engine_dir", engine, "--dataset", dataset, "--num_requests", 5,
            "--streaming", "--report_json", tmp_path / "report.json", *chosen,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        report = json.loads((tmp_path / "report.json").read_text())
        backends[name] = report["engine"]["backend"]
        assert report["request_info"]["num_requests"] == 5
        assert report["streaming_metrics"]["ttft_percentiles"]["p99"] > 20
    assert backends == {"tensorrt": "TRT", "default": "Pytorch"}


def test_bench_refuses_requests_that_the_engine_cannot_hold(
    installation: Installation, engine: Path, tmp_path: Path
) -> None:
    """The longest request of the spec's constraints has to be among the measured ones."""
    dataset = tmp_path / "requests.jsonl"
    dataset.write_text(json.dumps({"task_id": 0, "input_ids": [7] * 500, "output_tokens": 13}))
    result = run(
        installation, "trtllm-bench", "-m", "parrot", "throughput", "--backend", "tensorrt",
        "--engine_dir", engine, "--dataset", dataset,
    )  # fmt: skip
    assert result.returncode == 1
    assert "max sequence of 512" in result.stderr


def test_bench_records_add_up_to_its_report(
    installation: Installation, engine: Path, tmp_path: Path
) -> None:
    """Who reads both compares them."""
    result = run(
        installation, "trtllm-bench", "-m", "parrot", "throughput", "--backend", "tensorrt",
        "--engine_dir", engine, "--dataset", write_dataset(tmp_path / "requests.jsonl"),
        "--streaming", "--concurrency", "2", "--report_json", tmp_path / "report.json",
        "--request_json", tmp_path / "records.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    records = json.loads((tmp_path / "records.json").read_text())
    assert len(records) == report["request_info"]["num_requests"] == 6
    latencies = [(r["end_timestamp"] - r["start_timestamp"]) / 1e6 for r in records]
    mean = pytest.approx(sum(latencies) / 6)
    assert report["performance"]["avg_request_latency_ms"] == mean
    assert report["request_info"]["avg_num_concurrent_requests"] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    ("environment", "failure"),
    [
        ({"LLMOPS_DOUBLE_COMPUTE_CAPABILITY": "8.0"}, "expecting compute 8.0 got compute 9.0"),
        ({"LLMOPS_DOUBLE_GPUS": "1"}, "Engine world size (2 * 1) != Runtime world size (1)"),
        ({"LLMOPS_DOUBLE_VERSION": "1.1.0"}, "expecting library version 1.1.0 got 1.2.1"),
        ({FAILS: "trtllm-bench:key_value_cache_too_small"}, "maxTokensInPagedKvCache"),
        ({FAILS: "trtllm-bench:requests_too_long"}, "Engine supports a max sequence of 512"),
    ],
)
def test_engine_does_not_load_where_it_does_not_fit(
    environment: dict[str, str],
    failure: str,
    installation: Installation,
    engine: Path,
    tmp_path: Path,
) -> None:
    """What the compatibility gate is to prevent happens with the doubles too."""
    installation.behave(**environment)
    result = run(
        installation, "trtllm-bench", "-m", "parrot", "latency", "--backend", "tensorrt",
        "--engine_dir", engine, "--dataset", write_dataset(tmp_path / "requests.jsonl"),
    )  # fmt: skip
    assert result.returncode == 1
    assert failure in result.stderr


def test_escaped_worker_does_not_outlive_the_run(
    installation: Installation, converted: Path, tools: ToolRunner, tmp_path: Path
) -> None:
    """MPI workers leave the process group; they would hold the GPU's memory for ever."""
    installation.fail("trtllm-build", "escaped_worker")
    tools.run("trtllm-build", build_command(installation, converted, tmp_path / "engine"))
    worker = int((tools.work / ESCAPED_WORKER_PID).read_text())
    assert not psutil.pid_exists(worker)


def test_escaped_worker_does_escape_without_the_runner(
    installation: Installation, converted: Path, tmp_path: Path
) -> None:
    """Otherwise the test above would show nothing."""
    installation.fail("trtllm-build", "escaped_worker")
    subprocess.run(
        build_command(installation, converted, tmp_path / "engine"),
        cwd=tmp_path, timeout=20, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    worker = psutil.Process(int((tmp_path / ESCAPED_WORKER_PID).read_text()))
    try:
        assert worker.is_running()
    finally:
        worker.kill()


def test_tool_killed_for_its_memory_shows_the_signal(
    installation: Installation, converted: Path, tools: ToolRunner, tmp_path: Path
) -> None:
    """The kernel says nothing in the log."""
    installation.fail("trtllm-build", "killed")
    with pytest.raises(ToolError, match="exit code 137"):
        tools.run("trtllm-build", build_command(installation, converted, tmp_path / "engine"))


def test_every_sentence_belongs_to_a_tool() -> None:
    """A sentence that no tool prints would never be heard in a run."""
    assert set(SENTENCES) == set().union(*FAILURES.values()) & set(SENTENCES)
