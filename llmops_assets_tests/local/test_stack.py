"""The stack as people use it: up, killed, up again, down."""

from __future__ import annotations

import itertools
import os
import socket
import stat
import threading
import time
from pathlib import Path

import psutil
import pytest

from llmops_assets.errors import StackError
from llmops_assets.local import stack
from llmops_assets.local.processes import run_workers, supervised, wait_gone
from llmops_assets.settings import Settings
from llmops_assets_tests.local.conftest import DEFINITIONS
from llmops_assets_tests.local.runs_client import RunsClient

pytestmark = pytest.mark.timeout(240)


def kill_everything(settings: Settings) -> None:
    processes = supervised(settings.state)
    for process in processes:
        process.kill()
    assert not wait_gone(processes, 10)


def test_up_starts_everything_and_again_changes_nothing(
    settings: Settings, running: stack.StackInfo
) -> None:
    """Whoever is not sure that the stack runs types `llmops up`; it must not restart it."""
    before = {program.name: program.pid for program in stack.status(settings)}
    assert all(program.ready for program in stack.status(settings))
    assert stack.up(settings, print, definitions=DEFINITIONS) == running
    assert {program.name: program.pid for program in stack.status(settings)} == before


def test_only_this_user_can_enter(settings: Settings, running: stack.StackInfo) -> None:
    """Whoever opens the process manager's socket can stop what serves."""
    assert stat.S_IMODE(settings.state.stat().st_mode) == 0o700
    manager = settings.state / "supervisor" / "supervisor.sock"
    assert stat.S_IMODE(manager.stat().st_mode) == 0o600


def test_nothing_listens_beyond_loopback(settings: Settings, running: stack.StackInfo) -> None:
    """None of the servers authenticates, so none may be reachable from elsewhere."""
    addresses = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in supervised(settings.state)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


@pytest.mark.integration
def test_a_run_killed_with_everything_fails_and_frees_its_pool(
    settings: Settings, running: stack.StackInfo
) -> None:
    """After a power cut Dagster alone leaves the run STARTED and its pool taken for ever."""
    client = RunsClient(running.endpoints.dagster_url)
    run = client.launch(seconds=600)
    client.wait_place_taken()

    kill_everything(settings)
    assert not any(program.running for program in stack.status(settings))
    again = stack.up(settings, print, definitions=DEFINITIONS)

    assert again.endpoints == running.endpoints
    client.wait(run, "FAILURE", timeout_seconds=1)
    assert client.places_taken() == 0
    client.wait(client.launch(seconds=0), "SUCCESS")


@pytest.mark.integration
def test_a_killed_code_server_comes_back_without_its_workers(
    settings: Settings, running: stack.StackInfo
) -> None:
    """A worker without its code server can neither be cancelled nor be missed when it dies."""
    client = RunsClient(running.endpoints.dagster_url)
    run = client.launch(seconds=600)
    client.wait_place_taken()
    server = next(p for p in stack.status(settings) if p.name == stack.CODE_SERVER)
    workers = [process for process in run_workers(settings.state) if process.pid != server.pid]
    assert workers

    assert server.pid is not None
    psutil.Process(server.pid).kill()

    client.wait(run, "FAILURE", "CANCELED")
    assert not wait_gone(workers, 40)
    client.wait(client.launch(seconds=0), "SUCCESS")


@pytest.mark.integration
def test_programs_of_a_killed_supervisor_are_replaced(
    settings: Settings, running: stack.StackInfo
) -> None:
    """Orphans hold ports and databases; a second set beside them would corrupt both."""
    supervisor = int((settings.state / "supervisor" / "supervisord.pid").read_text())
    orphans = [p for p in supervised(settings.state) if p.pid != supervisor]
    psutil.Process(supervisor).kill()
    wait_gone([process for process in orphans if process.pid == supervisor], 5)

    assert stack.up(settings, print, definitions=DEFINITIONS).endpoints == running.endpoints
    assert not wait_gone(orphans, 0)


def test_status_asks_the_servers_themselves(settings: Settings, running: stack.StackInfo) -> None:
    """A server that hangs still has a process, and the process manager calls it RUNNING."""
    mlflow = next(p for p in stack.status(settings) if p.name == stack.MLFLOW)
    assert mlflow.ready and mlflow.pid is not None
    tree = [psutil.Process(mlflow.pid), *psutil.Process(mlflow.pid).children(recursive=True)]
    for process in tree:
        process.suspend()
    try:
        hung = next(p for p in stack.status(settings) if p.name == stack.MLFLOW)
    finally:
        for process in tree:
            process.resume()
    assert hung.running
    assert not hung.ready


def test_logs_of_one_program_and_following(settings: Settings, running: stack.StackInfo) -> None:
    """The cure of most errors is "read the log"; `llmops logs` is how."""
    assert any("sqlite" in line or "Uvicorn" in line for line in stack.logs(settings, "mlflow"))
    assert {line.split(":")[0] for line in stack.logs(settings)} >= {"mlflow", "webserver"}
    with pytest.raises(StackError, match="mlflow"):
        next(stack.logs(settings, "no-such-program"))

    log = settings.logs / "followed.log"
    log.write_text("old\n")
    lines = stack.logs(settings, "followed", follow=True)
    assert next(lines) == "old"
    threading.Timer(0.5, lambda: log.write_text("rotated\nnew\n")).start()
    log.unlink()
    assert list(itertools.islice(lines, 2)) == ["rotated", "new"]


@pytest.mark.integration
def test_down_ends_runs_too_and_can_be_repeated(
    settings: Settings, running: stack.StackInfo
) -> None:
    """After `llmops down` nothing may go on using the machine, runs and their tools included."""
    client = RunsClient(running.endpoints.dagster_url)
    run = client.launch(seconds=600)
    client.wait_place_taken()
    processes = supervised(settings.state)

    stack.down(settings)

    assert not wait_gone(processes, 0)
    assert not supervised(settings.state)
    assert not any(program.running for program in stack.status(settings))
    stack.down(settings)

    stack.up(settings, print, definitions=DEFINITIONS)
    assert client.wait(run, "FAILURE", "CANCELED", timeout_seconds=1)
    assert client.places_taken() == 0


@pytest.mark.integration
def test_broken_definitions_are_named_and_the_stack_can_go_on(
    settings: Settings,
) -> None:
    """A typo in the definitions is the commonest reason why the stack does not start."""
    stack.down(settings)
    with pytest.raises(StackError, match=r"code-server.*no_such_module"):
        stack.up(settings, print, definitions="no_such_module")
    stack.down(settings)
    assert not supervised(settings.state)


def test_a_configured_port_that_is_taken_is_named(settings: Settings) -> None:
    """The reader must learn which port, who has it, and what to set."""
    stack.down(settings)
    with (
        socket.create_server(("127.0.0.1", settings.mlflow_port or 0)),
        pytest.raises(StackError) as caught,
    ):
        stack.up(settings, print, definitions=DEFINITIONS)
    message = str(caught.value)
    assert str(settings.mlflow_port) in message
    assert f"process {os.getpid()}" in message
    assert "LLMOPS_MLFLOW_PORT" in message


def test_a_state_path_too_long_for_sockets_is_refused_at_once(tmp_path: Path) -> None:
    """Otherwise the process manager fails much later, with a message about bind(2)."""
    settings = Settings(state=tmp_path / ("x" * 100))
    started = time.monotonic()
    with pytest.raises(StackError, match="LLMOPS_STATE"):
        stack.up(settings, print)
    assert time.monotonic() - started < 2
    assert not settings.state.exists()


def test_endpoints_of_a_stack_that_never_ran(tmp_path: Path) -> None:
    """An asset that runs without the stack must say so, not fail on a missing file."""
    with pytest.raises(StackError, match="llmops up"):
        stack.endpoints(Settings(state=tmp_path))
