"""The one runner of external tools and heavy Python steps.

Training, conversion, builds and validation run as processes of their own: they load
gigabytes, crash, and must be stoppable. Whatever they start ends with the process
that asked for them (see `tool_guard`), their output goes to a log file as it comes,
and a lock on the work folder keeps two of them from writing into one place.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmops_assets.errors import ToolError

GUARD = Path(__file__).with_name("tool_guard.py")
PROGRESS_PREFIX = "@progress "
TAIL_LINES = 30
# Longer than the guard of a killed run needs to end its tool.
LOCK_TIMEOUT_SECONDS = 15.0

# What a tool gets from our environment. Everything else stays here, so that a
# password in it cannot reach a tool's log, a core dump or a package.
INHERITED_ENVIRONMENT = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TZ",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
)
OFFLINE = {
    # Tools work on the bytes they are given; a download would escape lineage.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONUNBUFFERED": "1",
}

# Shorter values, such as 1 or true, are no secrets, and would take the log's words apart.
SHORTEST_SECRET = 8
HIDDEN = b"***"

Progress = Mapping[str, Any]


@dataclass(frozen=True)
class ToolRun:
    """What a finished tool leaves: how long it took (seconds), and its log file."""

    seconds: float
    log: Path


@dataclass(frozen=True)
class ToolRunner:
    """`run_tool` with everything bound that one asset's tools share.

    Attributes are the arguments of `run_tool`.
    """

    work: Path
    log: Path
    timeout_seconds: float
    niceness: int = 0
    on_progress: Callable[[Progress], None] | None = None
    on_line: Callable[[str], None] | None = None

    def run(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        folder: Path | None = None,
        secrets: Collection[str] = (),
    ) -> ToolRun:
        """Runs one command in `work`; see `run_tool`."""
        return run_tool(
            name,
            command,
            work=self.work,
            log=self.log,
            timeout_seconds=self.timeout_seconds,
            environment=environment,
            niceness=self.niceness,
            on_progress=self.on_progress,
            on_line=self.on_line,
            folder=folder,
            secrets=secrets,
        )


def report_progress(**values: Any) -> None:
    """Called inside a tool: one line that `run_tool` parses and hands to `on_progress`."""
    print(PROGRESS_PREFIX + json.dumps(values, allow_nan=False), flush=True)


def module_command(module: str, *arguments: str | os.PathLike[str]) -> list[str]:
    """The command line that runs one of our heavy modules with this interpreter."""
    return [sys.executable, "-m", module, *(os.fspath(argument) for argument in arguments)]


def run_tool(
    name: str,
    command: Sequence[str],
    *,
    work: Path,
    log: Path,
    timeout_seconds: float,
    environment: Mapping[str, str] | None = None,
    niceness: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
    on_line: Callable[[str], None] | None = None,
    folder: Path | None = None,
    secrets: Collection[str] = (),
) -> ToolRun:
    """Runs `command` in `work` until it ends; nothing it started survives.

    Args:
        name: what people call the tool; used in errors.
        command: argument list; no shell is involved.
        work: folder of the tool's own, locked exclusively while it runs.
        log: file that standard output and error are appended to.
        timeout_seconds: after this SIGTERM is sent, then SIGKILL.
        environment: added to the few inherited variables.
        niceness: added to this process's own.
        on_progress: receives what the tool passed to `report_progress`.
        on_line: receives every other line of output.
        folder: working directory; unset: `work`.
        secrets: values that are taken out of the output before anybody sees it, if they
            are not too short to be secrets.

    Raises:
        ToolError: the tool could not start, failed, or ran out of time, or another
            process is running in the same work folder.
    """
    work.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(name, work)
    started = time.monotonic()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    lifeline_read, lifeline_write = os.pipe()
    try:
        with log.open("ab") as log_file:
            guard = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    str(GUARD),
                    str(lifeline_read),
                    str(niceness),
                    "--",
                    *command,
                ],
                cwd=folder or work,
                env=_tool_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(lifeline_read, lock),
                start_new_session=True,
            )
            try:
                timed_out = not _follow(
                    guard,
                    log_file,
                    started + timeout_seconds,
                    tail,
                    on_progress,
                    on_line,
                    _Censor(secrets),
                )
            finally:
                _end(guard)
    finally:
        os.close(lifeline_read)
        os.close(lifeline_write)
        os.close(lock)
    seconds = time.monotonic() - started
    if timed_out:
        raise ToolError(
            f"{name} was stopped after {timeout_seconds:.0f} s",
            expected=f"an end within {timeout_seconds:.0f} s",
            found=_last_words(tail),
            cure=f"read {log}; raise LLMOPS_TOOL_TIMEOUT_SECONDS if it only needs longer",
        )
    if guard.returncode != 0:
        raise ToolError(
            f"{name} failed",
            expected="exit code 0",
            found=f"exit code {guard.returncode}; {_last_words(tail)}",
            cure=f"read {log}, mend the cause, and materialize the asset again",
        )
    return ToolRun(seconds=seconds, log=log)


def _lock(name: str, work: Path) -> int:
    """Locks the work folder. Returns the descriptor that holds the lock (flock(2)).

    The tool inherits the descriptor: the folder stays locked until its last process is
    gone, even when this one was killed first.
    """
    descriptor = os.open(work.with_name(work.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise ToolError(
                    f"{name} is already running in {work}",
                    cure="wait for the other run to end, or terminate it in Dagster's run page",
                ) from error
            time.sleep(0.1)


def _tool_environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in INHERITED_ENVIRONMENT if name in os.environ}
    return {**inherited, **OFFLINE, **(extra or {})}


def _follow(
    guard: subprocess.Popen[bytes],
    log: IO[bytes],
    deadline: float,
    tail: deque[str],
    on_progress: Callable[[Progress], None] | None,
    on_line: Callable[[str], None] | None,
    censor: _Censor,
) -> bool:
    """Copies output until the tool closes it. Returns False when time ran out first."""
    assert guard.stdout is not None
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(guard.stdout, selectors.EVENT_READ)
        while (remaining := deadline - time.monotonic()) > 0:
            if not selector.select(timeout=remaining):
                return False
            chunk = os.read(guard.stdout.fileno(), 65536)
            shown = censor.show(chunk) if chunk else censor.rest()
            log.write(shown)
            log.flush()
            # Progress bars redraw their line with a carriage return.
            *lines, pending = (pending + shown).replace(b"\r", b"\n").split(b"\n")
            for line in lines:
                _tell(line, tail, on_progress, on_line)
            if not chunk:
                _tell(pending, tail, on_progress, on_line)
                guard.wait(timeout=max(remaining, 1.0))
                return True
    return False


class _Censor:
    """Takes values out of a stream, also where a read cuts one in two."""

    def __init__(self, secrets: Collection[str]) -> None:
        values = {secret.encode() for secret in secrets if len(secret) >= SHORTEST_SECRET}
        # Of two values of which one holds the other, the longer one.
        self._secrets = sorted(values, key=len, reverse=True)
        self._held = b""

    def show(self, chunk: bytes) -> bytes:
        """What may be seen of the stream so far; the start of a value is held back."""
        text = self._held + chunk
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        held = max((_overlap(text, secret) for secret in self._secrets), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> bytes:
        """What is still held back, at the stream's end."""
        return self._held


def _overlap(text: bytes, secret: bytes) -> int:
    """How many bytes at the end of a text are the start of a secret."""
    longest = min(len(secret) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(secret[:length])), 0)


def _tell(
    raw: bytes,
    tail: deque[str],
    on_progress: Callable[[Progress], None] | None,
    on_line: Callable[[str], None] | None,
) -> None:
    """Passes one line of output on, as progress or as text."""
    line = raw.decode("utf-8", "replace").rstrip()
    progress = _progress(line)
    if progress is not None:
        if on_progress is not None:
            on_progress(progress)
    elif line:
        tail.append(line)
        if on_line is not None:
            on_line(line)


def _progress(line: str) -> Progress | None:
    if not line.startswith(PROGRESS_PREFIX):
        return None
    try:
        values = json.loads(line[len(PROGRESS_PREFIX) :])
    except ValueError:
        # Another thread of the tool wrote in between: text like any other.
        return None
    return values if isinstance(values, dict) else None


def _end(guard: subprocess.Popen[bytes]) -> None:
    """Stops the guard if it still runs; it takes the tool with it."""
    if guard.poll() is None:
        guard.send_signal(signal.SIGTERM)
        try:
            guard.wait(timeout=15)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()
    if guard.stdout is not None:
        guard.stdout.close()


def _last_words(tail: deque[str]) -> str:
    return "its last lines were: " + " | ".join(list(tail)[-5:]) if tail else "it printed nothing"
