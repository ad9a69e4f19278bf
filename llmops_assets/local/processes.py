"""Finding and ending processes that an earlier stack left behind.

A supervisor killed with -9 cannot end its programs. They are recognised by what only we
give them, never by a name alone: an environment variable that holds the state folder,
or, for Triton, whose environment is built from nothing, a slot of the state folder in
its arguments.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil

from llmops_assets.errors import StackError

SUPERVISED_BY = "LLMOPS_SUPERVISED_BY"
"""Environment variable of every supervised process: the state folder."""

RUN_WORKER_OF = "LLMOPS_RUN_WORKER_OF"
"""Environment variable of the code server and its run workers: the state folder."""

TRITON_PROGRAMS = {"tritonserver", "triton_python_backend_stub"}
KILL_WAIT_SECONDS = 5.0


def supervised(state: Path) -> list[psutil.Process]:
    """Everything of the stack of this state folder that runs, with all descendants."""
    slots = f"{state}/slots/"
    return _with_descendants(
        process
        for process in psutil.process_iter()
        if _environment(process).get(SUPERVISED_BY) == str(state) or _is_triton_of(process, slots)
    )


def run_workers(state: Path) -> list[psutil.Process]:
    """Run workers (and their tools) of this state folder's code server, whichever started them."""
    return _with_descendants(
        process
        for process in psutil.process_iter()
        if _environment(process).get(RUN_WORKER_OF) == str(state)
    )


def end(processes: Sequence[psutil.Process], grace_seconds: float) -> None:
    """SIGTERM, then SIGKILL to what is left after `grace_seconds`; waits until they are gone.

    Raises:
        StackError: one survives SIGKILL, which only the kernel can explain.
    """
    for process in processes:
        _signal(process.terminate)
    left = wait_gone(processes, grace_seconds)
    for process in left:
        _signal(process.kill)
    if left := wait_gone(left, KILL_WAIT_SECONDS):
        raise StackError(
            "Processes of the stack cannot be ended",
            found=", ".join(str(process.pid) for process in left),
            cure="look at them with `ps -o pid,stat,wchan,cmd`; they may wait for a broken disk",
        )


def wait_gone(processes: Sequence[psutil.Process], timeout_seconds: float) -> list[psutil.Process]:
    """Waits until the processes have ended. Returns those that have not."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        left = [process for process in processes if _alive(process)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def _with_descendants(found: Iterable[psutil.Process]) -> list[psutil.Process]:
    # A caller may itself run below the stack (a command typed in a run); it must not
    # end itself half way.
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    processes: dict[int, psutil.Process] = {}
    for process in found:
        if process.pid in spared:
            continue
        processes[process.pid] = process
        try:
            below = process.children(recursive=True)
        except psutil.Error:
            continue
        processes.update((child.pid, child) for child in below if child.pid not in spared)
    return list(processes.values())


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}  # ended meanwhile, or another user's: not ours


def _is_triton_of(process: psutil.Process, slots: str) -> bool:
    try:
        return process.name() in _PROC_NAMES and any(slots in a for a in process.cmdline())
    except psutil.Error:
        return False


# The kernel keeps 15 characters of a program's name.
_PROC_NAMES = TRITON_PROGRAMS | {name[:15] for name in TRITON_PROGRAMS}


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(send: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        send()
