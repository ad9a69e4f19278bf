"""Runs one command so that nothing of it outlives the process that asked for it.

Started by `tools.run_tool` as `python -I -S tool_guard.py LIFELINE_FD NICENESS -- COMMAND…`;
it imports the standard library only, so it starts in milliseconds.

Why a process of its own: a worker killed with -9 cannot clean up after itself, and
`PR_SET_PDEATHSIG` alone reaches neither grandchildren nor children that called
`setsid`. The guard holds the read end of a pipe whose write end lives in the worker.
End of file means that the worker is gone. The guard is also the subreaper of the
tool's descendants (prctl(2)), so a daemonised grandchild becomes its child and can be
found and killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 5.0


def prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def lower_priority(niceness: int) -> None:
    """Makes this process and its future children yield to others.

    Where the kernel groups tasks by session (autogroup, sched(7)), niceness counts only
    within the tool's own session; against other sessions the group's own value does.
    """
    os.nice(niceness)
    with contextlib.suppress(OSError):  # a kernel without autogroups
        Path("/proc/self/autogroup").write_text(str(niceness))


def descendants(root: int) -> list[int]:
    """Process ids below `root`, read from /proc; processes that end meanwhile are skipped."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def reap() -> dict[int, int]:
    """Collects every ended child. Returns wait status by process id."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def end_everything(grace: float) -> dict[int, int]:
    """SIGTERM to all descendants, SIGKILL to what is left after `grace` seconds."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + grace
    number = signal.SIGTERM
    signalled: set[int] = set()
    while alive := descendants(os.getpid()):
        if time.monotonic() > deadline:
            number = signal.SIGKILL
            signalled.clear()
        for pid in alive:
            if pid not in signalled:
                signalled.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        time.sleep(0.02)
        ended |= reap()
    return ended | reap()


def main() -> int:
    lifeline, niceness, separator, *command = sys.argv[1:]
    if separator != "--":
        raise SystemExit("usage: tool_guard.py LIFELINE_FD NICENESS -- COMMAND…")
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    lower_priority(int(niceness))

    # Signals become readable bytes, so that one `select` waits for a dead worker, a
    # request to stop and an ended tool alike.
    signal_read, signal_write = os.pipe()
    os.set_blocking(signal_write, False)
    signal.set_wakeup_fd(signal_write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)

    tool = os.fork()
    if tool == 0:
        # If the guard itself is killed with -9, at least the tool goes too.
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        # Python ignores the last two, and what is ignored stays so in the tool.
        for number in (
            signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ
        ):  # fmt: skip
            signal.signal(number, signal.SIG_DFL)
        os.setpgid(0, 0)
        os.close(int(lifeline))
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"cannot start {command[0]}: {error}", file=sys.stderr)
            os._exit(127)

    status: int | None = None
    while status is None:
        readable, _, _ = select.select([int(lifeline), signal_read], [], [])
        stop = int(lifeline) in readable
        if signal_read in readable:
            received = os.read(signal_read, 64)
            stop = stop or signal.SIGTERM in received or signal.SIGINT in received
        ended = end_everything(GRACE_SECONDS) if stop else reap()
        status = ended.get(tool)
    end_everything(GRACE_SECONDS)  # helpers that the tool left behind
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
