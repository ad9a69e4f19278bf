"""The tool runner: it reports what a tool says, and leaves nothing of it behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmops_assets import tools
from llmops_assets.errors import ToolError
from llmops_assets.tools import ToolRun, run_tool

from .waiting import wait_for

pytestmark = pytest.mark.timeout(90)

# Writes its process id and those of a child, and of a daemon that a child of it left.
FAMILY = """
import os, subprocess, sys, time
from pathlib import Path
def daemonise():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            Path("daemon.pid").write_text(str(os.getpid()))
            time.sleep(300)
        os._exit(0)
daemonise()
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"])
Path("child.pid").write_text(str(child.pid))
Path("tool.pid").write_text(str(os.getpid()))
"""
MEMBERS = ("tool", "child", "daemon")


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", textwrap.dedent(code)]


def run(folder: Path, command: list[str], **options: Any) -> ToolRun:
    defaults: dict[str, Any] = {
        "work": folder / "work", "log": folder / "logs" / "tool.log", "timeout_seconds": 30
    }  # fmt: skip
    return run_tool("the tool", command, **{**defaults, **options})


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def family(work: Path) -> dict[str, int]:
    """The process ids of `FAMILY`, once all have started."""
    files = [work / f"{name}.pid" for name in MEMBERS]
    wait_for(lambda: all(f.exists() and f.read_text() for f in files), "the tool's start")
    return {file.stem: int(file.read_text()) for file in files}


def worker(
    folder: Path, command: list[str], timeout_seconds: float = 60
) -> subprocess.Popen[bytes]:
    """Another process that runs a tool, as a Dagster run worker does."""
    code = f"""
        from pathlib import Path
        from llmops_assets.tools import run_tool
        run_tool("the tool", {command!r}, work=Path({str(folder / "work")!r}),
                 log=Path({str(folder / "log")!r}), timeout_seconds={timeout_seconds})
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], start_new_session=True)


def guard_of(worker: subprocess.Popen[bytes]) -> psutil.Process:
    (guard,) = psutil.Process(worker.pid).children()
    assert "tool_guard.py" in " ".join(guard.cmdline())
    return guard


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait(10)


def test_progress_and_lines_are_told_apart(tmp_path: Path) -> None:
    """The run page shows progress; a torn progress line must not end an hour of training."""
    progress: list[dict[str, Any]] = []
    lines: list[str] = []
    code = """
        print('@progress {"step": 1, "loss": 0.5}')
        print("loading", end="\\r"); print("loaded")
        print('@progress {"step": 2'); print("@progress 7")
        print("the last line has no end", end="")
    """
    result = run(
        tmp_path, python(code), on_progress=lambda p: progress.append(dict(p)), on_line=lines.append
    )
    assert progress == [{"step": 1, "loss": 0.5}]
    assert lines == [
        "loading", "loaded", '@progress {"step": 2', "@progress 7", "the last line has no end"
    ]  # fmt: skip
    assert "loaded" in result.log.read_text()
    assert result.seconds > 0


def test_report_progress_is_what_the_runner_reads(tmp_path: Path) -> None:
    """Both ends of the line are ours; they must not drift apart."""
    progress: list[dict[str, Any]] = []
    command = [sys.executable, "-c", "from llmops_assets.tools import report_progress as r; r(a=1)"]
    run(tmp_path, command, on_progress=lambda p: progress.append(dict(p)))
    assert progress == [{"a": 1}]


def test_log_keeps_earlier_runs(tmp_path: Path) -> None:
    """The log of the attempt that failed is what one wants to read after the next."""
    run(tmp_path, python("print('first')"))
    result = run(tmp_path, python("print('second')"))
    assert result.log.read_text().split() == ["first", "second"]


def test_failure_shows_exit_code_last_lines_and_log(tmp_path: Path) -> None:
    """The step's error is read before the log is; it must say what the tool said last."""
    code = "import sys; print('fine'); sys.exit('weights are missing') or 1"
    with pytest.raises(ToolError, match=r"exit code 1; .*fine | weights are missing") as caught:
        run(tmp_path, python(code))
    assert str(tmp_path / "logs" / "tool.log") in caught.value.cure
    assert "weights are missing" in (tmp_path / "logs" / "tool.log").read_text()


def test_killed_tool_shows_the_signal(tmp_path: Path) -> None:
    """Out of memory ends a tool with SIGKILL; the shell's number for it is known to all."""
    with pytest.raises(ToolError, match="exit code 137"):
        run(tmp_path, python("import os; os.kill(os.getpid(), 9)"))


def test_missing_executable_is_named(tmp_path: Path) -> None:
    """A toolchain that is not installed is the commonest failure of a new machine."""
    with pytest.raises(ToolError, match="cannot start no-such-builder") as caught:
        run(tmp_path, ["no-such-builder", "--help"])
    assert "exit code 127" in str(caught.value)


def test_timeout_asks_first_and_then_kills(tmp_path: Path) -> None:
    """A tool that cleans up on SIGTERM may; one that ignores it ends all the same."""
    polite = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (open("asked", "w").close(), sys.exit(0)))
        print("ready", flush=True); time.sleep(300)
    """
    started = time.monotonic()
    with pytest.raises(ToolError, match=r"stopped after 1 s.*ready.*LLMOPS_TOOL_TIMEOUT_SECONDS"):
        run(tmp_path, python(polite), timeout_seconds=1)
    assert (tmp_path / "work" / "asked").exists()
    assert time.monotonic() - started < 5

    stubborn = """
        import os, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open("pid", "w").write(str(os.getpid()))
        time.sleep(300)
    """
    with pytest.raises(ToolError, match="stopped after"):
        run(tmp_path, python(stubborn), timeout_seconds=1)
    assert not alive(int((tmp_path / "work" / "pid").read_text()))


def test_no_secret_reaches_a_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools log and dump their environment; passwords of the platform stay out of it."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("LLMOPS_DAGSTER_TOKEN", "hunter2")
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    # Where the keys are, or who signs, is nothing that a tool needs to know.
    monkeypatch.setenv("LLMOPS_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("LLMOPS_SIGNER", "unix:/run/llmops/signer.sock")
    code = "import json, os; json.dump(dict(os.environ), open('environ', 'w'))"
    run(tmp_path, python(code), environment={"OMP_NUM_THREADS": "2"})
    environ = json.loads((tmp_path / "work" / "environ").read_text())
    assert "hunter2" not in environ.values()
    assert not [name for name in environ if name.startswith("LLMOPS_")]
    assert environ["PATH"] == os.environ["PATH"]
    assert environ["OMP_NUM_THREADS"] == "2"
    assert environ["HF_HUB_OFFLINE"] == "1"


def test_tool_has_the_default_signals_and_no_input(tmp_path: Path) -> None:
    """A pipeline inside a tool ends by SIGPIPE; Python ignores it and would pass that on."""
    run(tmp_path, ["/bin/sh", "-c", "grep SigIgn /proc/self/status > ignored; read line || true"])
    ignored = int((tmp_path / "work" / "ignored").read_text().split()[1], 16)
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGINT):
        assert not ignored & (1 << (number - 1)), number.name


def test_second_run_in_a_work_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainers that write one checkpoint would mix their weights."""
    first = worker(tmp_path, python(FAMILY + "time.sleep(300)"))
    try:
        family(tmp_path / "work")
        monkeypatch.setattr(tools, "LOCK_TIMEOUT_SECONDS", 0.3)
        with pytest.raises(ToolError, match="already running"):
            run(tmp_path, python("print('second')"))
    finally:
        end(first)


def test_killed_worker_leaves_nothing_and_frees_the_folder(tmp_path: Path) -> None:
    """`kill -9` of a run worker: tool, grandchild and daemon end, and the next run starts."""
    killed = worker(tmp_path, python(FAMILY + "time.sleep(300)"))
    try:
        pids = family(tmp_path / "work")
        os.kill(killed.pid, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, pids.values())), f"the end of {pids}")
    finally:
        end(killed)
    run(tmp_path, python("print('next')"))


def test_killed_worker_takes_a_stubborn_tool_with_it(tmp_path: Path) -> None:
    """The guard has to kill what ignores SIGTERM; and the folder stays locked until then."""
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    killed = worker(tmp_path, python(stubborn + FAMILY + "time.sleep(300)"))
    try:
        pids = family(tmp_path / "work")
        os.kill(killed.pid, signal.SIGKILL)
        run(tmp_path, python("print('next')"))
        assert not any(map(alive, pids.values()))
    finally:
        end(killed)


def test_killed_guard_takes_the_tool_with_it(tmp_path: Path) -> None:
    """Whoever ends the guard by hand must not leave a trainer that nobody watches."""
    running = worker(tmp_path, python("import time; open('up', 'w'); time.sleep(300)"))
    try:
        wait_for((tmp_path / "work" / "up").exists, "the tool's start")
        guard = guard_of(running)
        (tool,) = guard.children()
        guard.kill()
        wait_for(lambda: not alive(tool.pid), "the tool's end", 5)
        assert running.wait(10) != 0
    finally:
        end(running)


def test_helper_left_behind_on_success_is_ended(tmp_path: Path) -> None:
    """A compile server that a tool started would hold memory, or the folder, for ever."""
    started = time.monotonic()
    run(tmp_path, python(FAMILY + "print('done')"))
    assert not any(map(alive, family(tmp_path / "work").values()))
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_worker_stops_its_tool(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, and Dagster's termination, reach the worker only; the tool must go with it."""
    running = worker(tmp_path, python(FAMILY + "time.sleep(300)"))
    try:
        pids = family(tmp_path / "work")
        running.send_signal(number)
        assert running.wait(20) != 0
        wait_for(lambda: not any(map(alive, pids.values())), f"the end of {pids}")
    finally:
        end(running)


def test_error_in_a_callback_stops_the_tool(tmp_path: Path) -> None:
    """A Dagster log call that fails must not leave a tool that nobody reads from."""

    def refuse(_: str) -> None:
        raise RuntimeError("the log is gone")

    with pytest.raises(RuntimeError, match="the log is gone"):
        run(tmp_path, python(FAMILY + "print('up', flush=True); time.sleep(300)"), on_line=refuse)
    assert not any(map(alive, family(tmp_path / "work").values()))
