"""The process manager of the local stack: supervisord, and how to talk to it.

supervisord restarts what crashes, rotates logs, and outlives the command that started
it. Its XML-RPC interface listens on a Unix socket that only this user can open.
http://supervisord.org/api.html describes the calls.
"""

from __future__ import annotations

import http.client
import os
import shlex
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmops_assets.errors import StackError
from llmops_assets.local.processes import SUPERVISED_BY

# sun_path holds 108 bytes on Linux and 104 on BSD (unix(7)); supervisord first binds a
# name with its process id appended.
SOCKET_PATH_BYTES = 90
CALL_TIMEOUT_SECONDS = 10.0
START_TIMEOUT_SECONDS = 30.0
LOG_BYTES = 10_000_000
LOG_BACKUPS = 3
BAD_NAME = 10  # supervisor.xmlrpc.Faults; importing them would pull in the whole server
NOT_RUNNING = 70
ALREADY_STARTED = 60
ALREADY_ADDED = 90
SPAWN_ERROR = 50
ABNORMAL_TERMINATION = 40


@dataclass(frozen=True)
class Program:
    """One supervised process.

    It is started again when it ends, unless with one of `final_exit_codes`. If it ends
    within `stable_seconds` of a start, that start failed, and is tried again `retries`
    times. `stop_seconds` is how long it may take to end when it is told to. With
    `autostart` it starts with the supervisor.
    """

    name: str
    command: Sequence[str]
    stop_seconds: int = 15
    stable_seconds: int = 1
    retries: int = 3
    autostart: bool = True
    final_exit_codes: tuple[int, ...] = ()


@dataclass(frozen=True)
class ProgramState:
    """What the supervisor says of a program. `state` is its word for it, such as RUNNING."""

    name: str
    state: str
    pid: int | None
    started: float | None
    """Seconds since the epoch; None when it does not run."""
    explanation: str

    @property
    def running(self) -> bool:
        return self.state in ("STARTING", "RUNNING")

    @property
    def gave_up(self) -> bool:
        """Whether it ended and is not being started again just now."""
        return self.state in ("BACKOFF", "FATAL", "EXITED", "UNKNOWN")


class Supervisor:
    """The supervisord of one state folder, running or not."""

    def __init__(self, state: Path, logs: Path) -> None:
        self.folder = state / "supervisor"
        self.programs_folder = self.folder / "programs"
        self.socket = self.folder / "supervisor.sock"
        self.configuration = self.folder / "supervisord.conf"
        self.logs = logs
        self.state = state

    def check_paths(self) -> None:
        """Refuses a state folder that supervisord or Unix sockets cannot work with.

        Raises:
            StackError: its path is too long, or has characters with a meaning in
                supervisord's configuration.
        """
        length = len(os.fsencode(self.socket))
        if length > SOCKET_PATH_BYTES:
            raise StackError(
                f"The path of the state folder {self.state} is too long for a Unix socket",
                expected=f"at most {SOCKET_PATH_BYTES - length + len(os.fsencode(self.state))} "
                "bytes",
                found=f"{len(os.fsencode(self.state))} bytes",
                cure="set LLMOPS_STATE to a folder with a shorter path",
            )
        forbidden = sorted(set(str(self.state)) & set(";#%\"'\n"))
        if forbidden:
            raise StackError(
                f"The path of the state folder {self.state} cannot be used",
                expected="a path without ; # % quotes and line breaks",
                found=" ".join(map(repr, forbidden)),
                cure="set LLMOPS_STATE to another folder",
            )

    def configure(self, programs: Sequence[Program]) -> None:
        """Writes the configuration: these programs, and those that were added before."""
        self.programs_folder.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        server = [
            "[unix_http_server]",
            f"file={self.socket}",
            "chmod=0600",
            "[supervisord]",
            f"logfile={self.logs / 'supervisord.log'}",
            f"logfile_maxbytes={LOG_BYTES}",
            f"logfile_backups={LOG_BACKUPS}",
            f"pidfile={self.folder / 'supervisord.pid'}",
            "umask=077",
            "[rpcinterface:supervisor]",
            "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
            "[include]",
            f"files={self.programs_folder}/*.conf",
        ]
        sections = ["\n".join(server), *(self._section(program) for program in programs)]
        _write(self.configuration, "\n\n".join(sections) + "\n")

    def start(self, environment: Mapping[str, str]) -> None:
        """Starts supervisord in the background with the written configuration.

        Programs get its environment, with a mark by which they are found should it be
        killed.

        Raises:
            StackError: it does not start.
        """
        self.socket.unlink(missing_ok=True)
        output = self.logs / "supervisord.start.log"
        with output.open("wb") as stream:
            completed = subprocess.run(
                [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.configuration)],
                env={**environment, SUPERVISED_BY: str(self.state)},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=START_TIMEOUT_SECONDS,
                check=False,
            )
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while completed.returncode == 0 and time.monotonic() < deadline:
            if self.answers():
                return
            time.sleep(0.1)
        raise StackError(
            "The process manager did not start",
            expected=f"supervisord answering on {self.socket}",
            found=f"exit code {completed.returncode}; {output.read_text(errors='replace')[-500:]}",
            cure=f"read {self.logs / 'supervisord.log'}; then run `llmops up` again",
        )

    def answers(self) -> bool:
        """Whether it is there."""
        try:
            self._call("getPID")
        except (OSError, http.client.HTTPException):
            return False
        return True

    def states(self) -> dict[str, ProgramState]:
        """All programs by name.

        Raises:
            StackError: supervisord does not answer.
        """
        return {info["name"]: _state(info) for info in self.call("getAllProcessInfo")}

    def start_program(self, name: str) -> None:
        """Starts a program unless it runs; does not wait for it.

        Raises:
            StackError: there is no such program, or supervisord does not answer.
        """
        self.call("startProcess", name, False, ignore=(ALREADY_STARTED, SPAWN_ERROR))

    def stop_program(self, name: str, timeout_seconds: float = 60.0) -> None:
        """Stops a program and waits for its end; a program that is not there is fine.

        Raises:
            StackError: it does not end, or supervisord does not answer.
        """
        self.call("stopProcess", name, False, ignore=(NOT_RUNNING, BAD_NAME))
        deadline = time.monotonic() + timeout_seconds
        while (state := self.states().get(name)) and (state.running or state.state == "STOPPING"):
            if time.monotonic() > deadline:
                raise StackError(
                    f"{name} does not end",
                    expected=f"an end within {timeout_seconds:.0f} s",
                    found=state.explanation,
                    cure="run `llmops down`, which ends processes by force",
                )
            time.sleep(0.1)

    def add(self, program: Program) -> None:
        """Adds a program for good, and starts it if it is to start by itself.

        Raises:
            StackError: supervisord does not take it.
        """
        self.describe(program)
        self.call("reloadConfig")
        self.call("addProcessGroup", program.name, ignore=(ALREADY_ADDED,))

    def describe(self, program: Program) -> None:
        """Writes how an added program runs; it counts from the next start or `add`."""
        _write(self.programs_folder / f"{program.name}.conf", self._section(program) + "\n")

    def remove(self, name: str) -> None:
        """Stops a program and forgets it; it does not come back when the stack restarts.

        Raises:
            StackError: it does not end, or supervisord does not answer.
        """
        (self.programs_folder / f"{name}.conf").unlink(missing_ok=True)
        self.stop_program(name)
        self.call("reloadConfig")
        self.call("removeProcessGroup", name, ignore=(BAD_NAME,))

    def added(self) -> tuple[str, ...]:
        """Names of the programs that were added, whether supervisord runs or not."""
        return tuple(sorted(file.stem for file in self.programs_folder.glob("*.conf")))

    def shutdown(self) -> None:
        """Asks supervisord to stop everything and end; does not wait."""
        self.call("shutdown")

    def log(self, program: str) -> Path:
        """The file with a program's output."""
        return self.logs / f"{program}.log"

    def call(self, method: str, *arguments: Any, ignore: Sequence[int] = ()) -> Any:
        """One call of supervisord's API; faults in `ignore` give None.

        Raises:
            StackError: it does not answer, or answers with another fault.
        """
        try:
            return self._call(method, *arguments)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode in ignore:
                return None
            raise StackError(
                f"The process manager refused {method} {' '.join(map(str, arguments))}",
                found=fault.faultString,
                cure=f"read {self.logs / 'supervisord.log'}; `llmops down` and `llmops up` start "
                "afresh",
            ) from fault
        except (OSError, http.client.HTTPException) as error:
            raise StackError(
                "The process manager of the local stack does not answer",
                expected=f"supervisord on {self.socket}",
                found=error,
                cure="run `llmops up`",
            ) from error

    def _call(self, method: str, *arguments: Any) -> Any:
        proxy = xmlrpc.client.ServerProxy("http://localhost/RPC2", _Transport(self.socket))
        with proxy:
            return getattr(proxy.supervisor, method)(*arguments)

    def _section(self, program: Program) -> str:
        # supervisord expands %(…)s in every value.
        command = shlex.join(program.command).replace("%", "%%")
        lines = [
            f"[program:{program.name}]",
            f"command={command}",
            f"autostart={str(program.autostart).lower()}",
            "autorestart=unexpected" if program.final_exit_codes else "autorestart=true",
            f"startsecs={program.stable_seconds}",
            f"startretries={program.retries}",
            # The whole process group: servers have workers of their own.
            "stopasgroup=true",
            "killasgroup=true",
            f"stopwaitsecs={program.stop_seconds}",
            "redirect_stderr=true",
            f"stdout_logfile={self.log(program.name)}",
            f"stdout_logfile_maxbytes={LOG_BYTES}",
            f"stdout_logfile_backups={LOG_BACKUPS}",
        ]
        if program.final_exit_codes:
            lines.append("exitcodes=" + ",".join(map(str, program.final_exit_codes)))
        return "\n".join(lines)


class _Transport(xmlrpc.client.Transport):
    """XML-RPC over a Unix socket, with a timeout, which supervisor's own lacks."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return _UnixConnection(self._path)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=CALL_TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CALL_TIMEOUT_SECONDS)
        self.sock.connect(str(self._path))


def _state(info: Mapping[str, Any]) -> ProgramState:
    alive = bool(info["pid"])
    return ProgramState(
        name=info["name"],
        state=info["statename"],
        pid=info["pid"] if alive else None,
        started=float(info["start"]) if alive else None,
        explanation=info["spawnerr"] or info["description"],
    )


def _write(file: Path, text: str) -> None:
    beside = file.with_name(file.name + ".new")
    beside.write_text(text, encoding="utf-8")
    beside.rename(file)
