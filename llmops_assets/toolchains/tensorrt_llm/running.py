"""Runs TensorRT-LLM's tools: their progress is reported and their failures are explained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmops_assets.errors import ToolError
from llmops_assets.toolchains.tensorrt_llm.complaints import LogScanner
from llmops_assets.toolchains.tensorrt_llm.progress import progress_of
from llmops_assets.tools import ToolRun, ToolRunner

# `import tensorrt_llm` starts MPI, which images with HPC-X find by OPAL_PREFIX alone
# (triton-inference-server/server#6741); how GPUs talk to each other is set by the others.
# OMPI_COMM_* and PMIX_* stay behind: a tool is no process of an MPI job that we are in.
OF_THE_IMAGE = ("OPAL_PREFIX", "CUDA_HOME")
SETTINGS_OF_LIBRARIES = ("OMPI_MCA_", "UCX_", "NCCL_")


@dataclass(frozen=True)
class HeardRun:
    """A finished tool run that nothing complained about, and what it warned of."""

    run: ToolRun
    warnings: tuple[str, ...]


def run_listening(
    tools: ToolRunner,
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> HeardRun:
    """Runs a tool of TensorRT-LLM, reports its progress and explains its failure.

    An exit code of 0 does not count when the output holds a complaint.

    Raises:
        ToolchainError: a complaint about the request or the engine.
        ToolError: any other failure, see `tools.run_tool`.
    """
    scanner = LogScanner()

    def hear(line: str) -> None:
        scanner.read(line)
        progress = progress_of(line)
        if progress is not None and tools.on_progress is not None:
            tools.on_progress(progress)
        if tools.on_line is not None:
            tools.on_line(line)

    try:
        run = replace(tools, on_line=hear).run(
            name, command, {**_image_environment(), **(environment or {})}
        )
    except ToolError as failure:
        if (explained := scanner.error(tools.log)) is not None:
            raise explained from failure
        raise
    explained = scanner.error(run.log)
    if explained is not None and scanner.failed:
        raise explained
    return HeardRun(run, tuple(scanner.warnings))


def _image_environment() -> dict[str, str]:
    """What of this process's environment the image's libraries need beside what tools get."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in OF_THE_IMAGE or name.startswith(SETTINGS_OF_LIBRARIES)
    }
