"""People who wait for a build see how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmops_assets.toolchains.tensorrt_llm.progress import progress_of
from llmops_assets.toolchains.tensorrt_llm.running import run_listening
from llmops_assets.tools import ToolRunner

from .conftest import build_command
from .doubles.installation import Installation


def test_build_reports_each_rank(
    installation: Installation, converted: Path, tools: ToolRunner, tmp_path: Path
) -> None:
    """A 70B model takes an hour, rank after rank."""
    seen: list[Mapping[str, Any]] = []
    tools = ToolRunner(tools.work, tools.log, 20, on_progress=seen.append)
    run_listening(tools, "trtllm-build", build_command(installation, converted, tmp_path / "out"))
    assert seen == [
        {"stage": "writing", "rank": 0},
        {"stage": "written"},
        {"stage": "writing", "rank": 1},
        {"stage": "written"},
        {"stage": "built"},
    ]


def test_calibration_reports_batches(
    installation: Installation, hugging_face: Path, tools: ToolRunner, tmp_path: Path
) -> None:
    """It is most of a quantisation's time."""
    (tmp_path / "rows").mkdir()
    seen: list[Mapping[str, Any]] = []
    tools = ToolRunner(tools.work, tools.log, 20, on_progress=seen.append)
    command = installation.command(
        "quantize.py", "--model_dir", hugging_face, "--output_dir", tmp_path / "out",
        "--qformat", "fp8", "--calib_dataset", tmp_path / "rows",
    )  # fmt: skip
    run_listening(tools, "quantize.py", command)
    assert seen == [
        {"stage": "quantising"},
        {"stage": "calibrating", "batch": 0},
        {"stage": "calibrating", "batch": 1},
        {"stage": "quantised"},
    ]


def test_other_lines_say_nothing_of_progress() -> None:
    """A conversion's end is one; a path with rank0.engine in it is none."""
    assert progress_of("Total time of converting checkpoints: 00:00:17") == {"stage": "converted"}
    assert progress_of("[TRT-LLM] [I] Loading rank0.engine") is None
    assert progress_of("") is None
