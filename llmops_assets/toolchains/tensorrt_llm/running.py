"""Runs TensorRT-LLM's tools: their progress is reported and their failures are explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmops_assets.errors import ToolError
from llmops_assets.toolchains.tensorrt_llm.complaints import LogScanner
from llmops_assets.toolchains.tensorrt_llm.progress import progress_of
from llmops_assets.tools import ToolRun, ToolRunner


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
        run = replace(tools, on_line=hear).run(name, command, environment)
    except ToolError as failure:
        if (explained := scanner.error(tools.log)) is not None:
            raise explained from failure
        raise
    explained = scanner.error(run.log)
    if explained is not None and scanner.failed:
        raise explained
    return HeardRun(run, tuple(scanner.warnings))
