"""kill -9 of a run's worker, at a moment that is known and not hit by luck."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

from llmops_assets.local.processes import wait_gone

# A worker gets so little at a time that it cannot run past the moment unseen.
SLICE_SECONDS = 0.005
PATIENCE_SECONDS = 240.0
# Its guard gives a tool five seconds to end by itself (tool_guard.GRACE_SECONDS).
TOOLS_GONE_SECONDS = 10.0


def stop_when(worker: psutil.Process, reached: Callable[[], object]) -> None:
    """Lets the worker run until `reached` is true, and leaves it stopped (SIGSTOP) there.

    `reached` is only asked while the worker stands still. Its tools are not stopped.

    Raises:
        TimeoutError: it never was.
        psutil.NoSuchProcess: the worker ended before.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        worker.suspend()
        if reached():
            return
        if time.monotonic() > deadline:
            worker.resume()
            raise TimeoutError(f"the moment did not come within {PATIENCE_SECONDS:.0f} s")
        worker.resume()
        time.sleep(SLICE_SECONDS)


def kill_when(worker: psutil.Process, reached: Callable[[], object]) -> list[psutil.Process]:
    """kill -9 of the worker as soon as `reached` is true.

    Returns:
        Its tools at that moment: all processes that it, or its tools, had started.
    """
    stop_when(worker, reached)
    tools = worker.children(recursive=True)
    worker.kill()
    return tools


def survivors(tools: list[psutil.Process]) -> list[str]:
    """Command lines of the tools that outlive their worker by more than ten seconds."""
    return [" ".join(tool.cmdline()) for tool in wait_gone(tools, TOOLS_GONE_SECONDS)]


def runs_module(process: psutil.Process, module: str) -> bool:
    """Whether a process that may end meanwhile is `python -m <module>`."""
    try:
        return module in process.cmdline()
    except psutil.Error:
        return False
