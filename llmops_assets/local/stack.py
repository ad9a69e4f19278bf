"""The local stack: what `llmops up`, `down`, `status` and `logs` do.

Everything is kept in one state folder and listens on one address. Every call may be
interrupted and repeated.
"""

from __future__ import annotations

import base64
import getpass
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import SecretStr

from llmops_assets.errors import EvidenceError, StackError
from llmops_assets.evidence.keys import create_keys, read_trust_root
from llmops_assets.evidence.log import evidence_log
from llmops_assets.local import health, log_files
from llmops_assets.local.databases import mlflow_database, prepare_databases
from llmops_assets.local.ports import PortRequest, claim_ports, read_ports
from llmops_assets.local.processes import end, supervised, wait_gone
from llmops_assets.local.slots import (
    SupervisedSlots,
    complaint,
    port_file,
    slot_folder,
    slot_of,
    slot_program,
)
from llmops_assets.local.supervisor import Program, ProgramState, Supervisor
from llmops_assets.operate.settings_changes import record_settings
from llmops_assets.serving import reconciliation, slot_process, triton
from llmops_assets.serving.gateway import EnvoyGateway
from llmops_assets.serving.routes import Routes
from llmops_assets.serving.slots import Environment
from llmops_assets.settings import Settings
from llmops_assets.storage.folder import FolderStore
from llmops_assets.tools import module_command

DEFINITIONS = "llmops_assets.definitions"
CODE_LOCATION = "llmops_assets"

MLFLOW = "mlflow"
ENVOY = "envoy"
CODE_SERVER = "code-server"
DAEMON = "daemon"
WEB_SERVER = "webserver"
# In the order of starting. What is in the first group needs nothing of the others.
FIRST = (MLFLOW, ENVOY, CODE_SERVER)
SECOND = (WEB_SERVER, DAEMON)
# Only with a secret to verify webhooks with.
WEBHOOKS = "webhooks"
WEBHOOK_NAME = "llmops-assets"

GATEWAY = "gateway"
STAGING_GATEWAY = "staging-gateway"

READY_TIMEOUT_SECONDS = 300.0
# Run workers, in the code server's process group, first stop their tools.
STOP_SECONDS = 30
END_TIMEOUT_SECONDS = 20.0
LOCK_TIMEOUT_SECONDS = 15.0
WEBHOOK_KEY_VARIABLE = "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"
POLL_SECONDS = 0.25
# So many processes of one program within one wait: it ends each time and is started again.
CRASH_LOOP_STARTS = 2

OnStep = Callable[[str], None]


@dataclass(frozen=True)
class Endpoints:
    """Where the stack's servers listen."""

    dagster_url: str
    mlflow_url: str
    gateway_url: str
    staging_gateway_url: str
    code_server_port: int
    webhooks_url: str | None
    """Where the receiver of webhooks listens; None when there never was one."""


@dataclass(frozen=True)
class StackInfo:
    """A running stack. `problems` names the slots that should serve and do not."""

    endpoints: Endpoints
    problems: tuple[str, ...]


@dataclass(frozen=True)
class ProgramStatus:
    """What is true of one program now.

    `ready`: it answered over its own interface just now. `detail` says what a slot
    holds, or why a program does not run. `differences` says what of it is not as it is
    recorded, with the command that heals it.
    """

    name: str
    running: bool
    ready: bool
    port: int | None
    pid: int | None
    uptime_seconds: float | None
    detail: str
    differences: tuple[str, ...] = ()


def endpoints(settings: Settings) -> Endpoints:
    """Where the stack's servers listen, whether they run just now or not.

    Raises:
        StackError: the stack was never started.
    """
    ports = read_ports(port_file(settings))
    missing = [
        request.name
        for request in _port_requests(settings)
        # The secret may have been set after the stack was started.
        if request.name not in ports and request.name != WEBHOOKS
    ]
    if missing:
        raise StackError(
            "The local stack has not been started",
            expected=f"ports in {port_file(settings)}",
            found="none for " + ", ".join(missing),
            cure="run `llmops up`",
        )
    return Endpoints(
        dagster_url=_url(settings, ports[WEB_SERVER]),
        mlflow_url=_url(settings, ports[MLFLOW]),
        gateway_url=_url(settings, ports[GATEWAY]),
        staging_gateway_url=_url(settings, ports[STAGING_GATEWAY]),
        code_server_port=ports[CODE_SERVER],
        webhooks_url=_url(settings, ports[WEBHOOKS]) if WEBHOOKS in ports else None,
    )


def up(settings: Settings, on_step: OnStep, definitions: str = DEFINITIONS) -> StackInfo:
    """Starts what does not run, and waits until all of it answers.

    Args:
        settings: where, and on which ports.
        on_step: told in a few words what is being waited for.
        definitions: the module with Dagster's definitions.

    Raises:
        StackError: a port is taken, or a server did not start; the message has the end
            of its log. What did start keeps running.
        GatewayError: a recorded route cannot be served.
        EvidenceError: the keys cannot be used, or the evidence is not what was signed.
        RegistryError: MLflow does not take the webhook; what runs keeps running.
    """
    supervisor = _supervisor(settings)
    supervisor.check_paths()
    settings.state.mkdir(parents=True, exist_ok=True)
    settings.state.chmod(0o700)
    if settings.signer is None:
        create_keys(settings.key_folder)
    else:
        read_trust_root(settings.key_folder)  # who signs elsewhere must have put it there
    with _exclusively(settings):
        if supervisor.answers():
            _check_receiver_runs(settings, supervisor)
            _check_ports_unchanged(settings)
        else:
            _start_supervisor(settings, supervisor, on_step, definitions)
            record_settings(
                evidence_log(settings, FolderStore(settings.store)), settings, getpass.getuser()
            )
        where = endpoints(settings)
        for group in (FIRST, SECOND + _receiver(settings)):
            for name in group:
                supervisor.start_program(name)
            for name in group:
                on_step(f"waiting for {name}")
                _wait_ready(settings, supervisor, where, name)
        _register_webhook(settings, where, on_step)
        problems = tuple(
            problem
            for name in supervisor.added()
            if (problem := _bring_up_slot(settings, supervisor, name, on_step)) is not None
        )
        # Also where the generations agree: somebody may have changed what is behind them.
        on_step("applying the recorded routes")
        _routes(settings).reconcile()
    return StackInfo(where, problems)


def down(settings: Settings, on_step: OnStep = lambda step: None) -> None:
    """Stops everything, in reverse order; afterwards no process of the stack is left.

    Raises:
        StackError: another `llmops up` or `down` is at work, or a process cannot be ended.
    """
    if not settings.state.is_dir():
        return
    supervisor = _supervisor(settings)
    with _exclusively(settings):
        # Found before anything stops: a tool whose worker has ended is nobody's child.
        processes = supervised(settings.state)
        if supervisor.answers():
            names = (*FIRST[:2], *supervisor.added(), *FIRST[2:], *SECOND, WEBHOOKS)
            for name in reversed(names):
                on_step(f"stopping {name}")
                supervisor.stop_program(name)
            supervisor.shutdown()
            wait_gone(processes, END_TIMEOUT_SECONDS)
        end([*processes, *supervised(settings.state)], END_TIMEOUT_SECONDS)
        supervisor.socket.unlink(missing_ok=True)


def status(settings: Settings) -> list[ProgramStatus]:
    """Every program of the stack, each asked itself; all not running if there is no stack."""
    supervisor = _supervisor(settings)
    states = supervisor.states() if supervisor.answers() else {}
    receiver = (WEBHOOKS,) if WEBHOOKS in states else _receiver(settings)
    names = (*FIRST, *SECOND, *receiver, *supervisor.added())
    try:
        where = endpoints(settings)
    except StackError:
        where = None
    found = [_status(settings, where, name, states.get(name)) for name in names]
    drift = _drift(settings) if states else {}
    # What is about a slot that is no program of the stack is shown with the gateway.
    strays = [each for name in drift.keys() - set(names) for each in drift[name]]
    return [
        replace(
            program,
            differences=(*drift.get(program.name, ()), *(strays if program.name == ENVOY else ())),
        )
        for program in found
    ]


def logs(
    settings: Settings, program: str | None = None, follow: bool = False, lines: int = 50
) -> Iterator[str]:
    """Lines of a program's log, or of all programs' with their name in front.

    Args:
        settings: which stack.
        program: as `status` names it; None for all.
        follow: go on with new lines, for ever.
        lines: how many of the last ones to begin with, per program.

    Raises:
        StackError: there is no log of that program.
    """
    found = {file.stem: file for file in sorted(settings.logs.glob("*.log"))}
    if program is not None and program not in found:
        raise StackError(
            f"There is no log of {program}",
            expected=f"one of {', '.join(found) or 'none yet'}",
            cure="run `llmops status` for the programs' names, and `llmops up` if nothing runs",
        )
    chosen = found if program is None else {program: found[program]}
    past = ((name, line) for name, file in chosen.items() for line in log_files.tail(file, lines))
    for name, line in itertools.chain(past, log_files.follow(chosen) if follow else ()):
        yield line if program is not None else f"{name}: {line}"


def _start_supervisor(
    settings: Settings, supervisor: Supervisor, on_step: OnStep, definitions: str
) -> None:
    if leftovers := supervised(settings.state):
        on_step(f"ending {len(leftovers)} processes of an earlier stack")
        end(leftovers, END_TIMEOUT_SECONDS)
    FolderStore(settings.store).sweep()
    ports = claim_ports(port_file(settings), settings.host, _port_requests(settings))
    environment = _environment(settings, ports)
    on_step("preparing the databases")
    prepare_databases(settings, environment)
    gateway = EnvoyGateway(settings.gateway)
    gateway.bootstrap(
        {
            Environment.PRODUCTION: ports[GATEWAY],
            Environment.STAGING: ports[STAGING_GATEWAY],
        },
        settings.host,
    )
    # Envoy must find what is recorded, not what was there when it last ran.
    routes = Routes(evidence_log(settings, FolderStore(settings.store)), gateway)
    gateway.write({environment: routes.all(environment) for environment in Environment})
    workspace = settings.state / "workspace.yaml"
    workspace.write_text(
        "load_from:\n"
        "  - grpc_server:\n"
        f"      host: {settings.host}\n"
        f"      port: {ports[CODE_SERVER]}\n"
        f"      location_name: {CODE_LOCATION}\n",
        encoding="utf-8",
    )
    for name in supervisor.added():
        if (slot := slot_of(name)) is not None:
            # Written again, as this folder or the environment may have moved.
            supervisor.describe(slot_program(settings, slot))
    supervisor.configure(_programs(settings, ports, gateway.command(), workspace, definitions))
    on_step("starting the process manager")
    supervisor.start(environment)


def _programs(
    settings: Settings,
    ports: Mapping[str, int],
    envoy: list[str],
    workspace: Path,
    definitions: str,
) -> list[Program]:
    mlflow = settings.state / "mlflow"
    commands = {
        MLFLOW: module_command(
            "mlflow", "server",
            "--host", settings.host,
            "--port", str(ports[MLFLOW]),
            "--workers", "1",
            "--backend-store-uri", f"sqlite:///{mlflow_database(settings)}",
            "--artifacts-destination", mlflow / "artifacts",
            "--serve-artifacts",
        ),
        ENVOY: envoy,
        CODE_SERVER: module_command(
            "llmops_assets.local.code_server",
            settings.host, str(ports[CODE_SERVER]), CODE_LOCATION, definitions,
        ),
        WEB_SERVER: module_command(
            "dagster_webserver",
            "--host", settings.host,
            "--port", str(ports[WEB_SERVER]),
            "--workspace", workspace,
        ),
        DAEMON: module_command("dagster._daemon", "run", "--workspace", workspace),
    }  # fmt: skip
    for name in _receiver(settings):
        commands[name] = module_command(
            "llmops_assets.triggers.webhooks", settings.host, str(ports[WEBHOOKS])
        )
    # None starts by itself, as daemon and web server want a code server that answers.
    return [
        Program(name, command, stop_seconds=STOP_SECONDS, autostart=False)
        for name, command in commands.items()
    ]


def _environment(settings: Settings, ports: Mapping[str, int]) -> dict[str, str]:
    ours = {
        f"LLMOPS_{name.upper()}": value.get_secret_value()
        if isinstance(value, SecretStr)
        else str(value)
        for name, value in settings.model_dump().items()
        if value is not None
    }
    return {
        **os.environ,
        **ours,
        "DAGSTER_HOME": str(settings.dagster_home),
        "DAGSTER_DISABLE_TELEMETRY": "true",
        # A tick of the git trigger makes several calls, each of which may take this long.
        "DAGSTER_SENSOR_GRPC_TIMEOUT_SECONDS": str(max(60, int(8 * settings.git_timeout_seconds))),
        "MLFLOW_TRACKING_URI": _url(settings, ports[MLFLOW]),
        # Its job runner doubles the time to start, and runs nothing here.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PYTHONUNBUFFERED": "1",
        **_webhook_environment(settings),
    }


def _webhook_environment(settings: Settings) -> dict[str, str]:
    """What MLflow needs to send webhooks to this machine."""
    key = settings.state / "mlflow" / "webhooks.key"
    if settings.webhook_secret is None:
        # Webhooks of earlier times are still in its database, and read at every new version.
        return {WEBHOOK_KEY_VARIABLE: key.read_text("ascii")} if key.is_file() else {}
    if not key.is_file():
        key.parent.mkdir(parents=True, exist_ok=True)
        beside = key.with_name(key.name + ".new")
        beside.unlink(missing_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(base64.urlsafe_b64encode(os.urandom(32)))
        beside.rename(key)
    return {
        # Without a key of its own MLflow makes one up at each start, and cannot read the
        # secrets in its database that it encrypted before.
        WEBHOOK_KEY_VARIABLE: key.read_text("ascii"),
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    }


def _receiver(settings: Settings) -> tuple[str, ...]:
    """The receiver of webhooks, where there is one."""
    return () if settings.webhook_secret is None else (WEBHOOKS,)


def _register_webhook(settings: Settings, where: Endpoints, on_step: OnStep) -> None:
    """Tells MLflow of the receiver.

    Raises:
        RegistryError: MLflow does not take it.
    """
    if settings.webhook_secret is None or where.webhooks_url is None:
        return
    # Starlette and MLflow take long to import; only this needs them.
    from llmops_assets.develop.registry import MLflowRegistry
    from llmops_assets.triggers.webhooks import MLFLOW_PATH

    on_step("registering the webhook in MLflow")
    MLflowRegistry(where.mlflow_url, settings.http_timeout_seconds).send_webhooks(
        WEBHOOK_NAME,
        where.webhooks_url + MLFLOW_PATH,
        settings.webhook_secret.get_secret_value(),
    )


def _port_requests(settings: Settings) -> list[PortRequest]:
    return [
        PortRequest(WEB_SERVER, 3000, settings.dagster_port, "LLMOPS_DAGSTER_PORT"),
        PortRequest(MLFLOW, 5000, settings.mlflow_port, "LLMOPS_MLFLOW_PORT"),
        PortRequest(GATEWAY, 8080, settings.gateway_port, "LLMOPS_GATEWAY_PORT"),
        PortRequest(
            STAGING_GATEWAY, 8081, settings.staging_gateway_port, "LLMOPS_STAGING_GATEWAY_PORT"
        ),
        PortRequest(CODE_SERVER),
        *(
            PortRequest(name, 8082, settings.webhook_port, "LLMOPS_WEBHOOK_PORT")
            for name in _receiver(settings)
        ),
    ]


def _check_receiver_runs(settings: Settings, supervisor: Supervisor) -> None:
    if _receiver(settings) and WEBHOOKS not in supervisor.states():
        raise StackError(
            "The stack runs without a receiver of webhooks",
            expected="one, as LLMOPS_WEBHOOK_SECRET is set",
            cure="run `llmops down`, then `llmops up`; or unset LLMOPS_WEBHOOK_SECRET",
        )


def _check_ports_unchanged(settings: Settings) -> None:
    ports = read_ports(port_file(settings))
    for request in _port_requests(settings):
        if request.configured is not None and request.configured != ports.get(request.name):
            raise StackError(
                f"The stack runs, with {request.name} on another port",
                expected=f"port {request.configured}, as {request.variable} says",
                found=f"port {ports.get(request.name)}",
                cure=f"run `llmops down`, then `llmops up`; or unset {request.variable}",
            )


def _wait_ready(settings: Settings, supervisor: Supervisor, where: Endpoints, name: str) -> None:
    """Waits until a program answers.

    Raises:
        StackError: it ended for good, keeps ending, or does not answer in time; it is
            stopped then, so that it does not go on failing in the background.
    """
    deadline = time.monotonic() + READY_TIMEOUT_SECONDS
    starts: set[int] = set()
    while True:
        state = supervisor.states()[name]
        if state.running and _ready(settings, where, name, state):
            return
        if state.pid is not None:
            starts.add(state.pid)
        failing = state.state == "FATAL" or len(starts) >= CRASH_LOOP_STARTS
        if failing or time.monotonic() > deadline:
            supervisor.stop_program(name)
            log = supervisor.log(name)
            raise StackError(
                f"{name} " + ("does not start" if failing else "does not answer"),
                expected=f"an answer within {READY_TIMEOUT_SECONDS:.0f} s",
                found=f"{state.state} ({state.explanation}); {log_files.last_words(log)}",
                cure=f"read {log} and mend the cause; then run `llmops down` and `llmops up`",
            )
        time.sleep(POLL_SECONDS)


def _bring_up_slot(
    settings: Settings, supervisor: Supervisor, name: str, on_step: OnStep
) -> str | None:
    """Waits for a slot that should serve. Returns what is wrong with it, or None.

    A slot that fails does not stop the stack: people need it to deploy another release.
    """
    slot = slot_of(name)
    held = None if slot is None else slot_process.read_slot(slot_folder(settings, slot))
    if held is None:
        supervisor.remove(name)  # a start that was cut off before the package was in place
        return None
    on_step(f"waiting for {name}")
    supervisor.start_program(name)
    deadline = time.monotonic() + settings.slot_ready_timeout_seconds
    while not triton.ready(held.endpoint, held.model, held.deployment.version):
        state = supervisor.states().get(name)
        if state is None or state.gave_up or time.monotonic() > deadline:
            return (
                f"{name} ({held.deployment.release}) does not serve: "
                f"{complaint(supervisor.log(name))}. To do: read {supervisor.log(name)}, "
                "then deploy the release again or roll back."
            )
        time.sleep(POLL_SECONDS)
    return None


def _status(
    settings: Settings, where: Endpoints | None, name: str, state: ProgramState | None
) -> ProgramStatus:
    running = state is not None and state.running
    detail = "" if running or state is None else f"{state.state}: {state.explanation}"
    port = read_ports(port_file(settings)).get(GATEWAY if name == ENVOY else name)
    slot = slot_of(name)
    held = None if slot is None else slot_process.read_slot(slot_folder(settings, slot))
    if held is not None:
        port = held.endpoint.http_port
        detail = f"{held.deployment.release} version {held.deployment.version} {detail}".rstrip()
    return ProgramStatus(
        name=name,
        running=running,
        ready=state is not None
        and running
        and where is not None
        and _ready(settings, where, name, state),
        port=port,
        pid=None if state is None else state.pid,
        uptime_seconds=None
        if state is None or state.started is None
        else max(0.0, time.time() - state.started),
        detail=detail,
    )


def _drift(settings: Settings) -> dict[str, list[str]]:
    """What is not as it is recorded, by the program that it is about."""
    store = FolderStore(settings.store)
    gateway = EnvoyGateway(settings.gateway, timeout_seconds=settings.http_timeout_seconds)
    found: dict[str, list[str]] = {}
    try:
        for environment in Environment:
            for difference in reconciliation.differences(
                Routes(evidence_log(settings, store), gateway),
                gateway,
                SupervisedSlots(settings, store),
                environment,
            ):
                about = ENVOY
                if difference.slot is not None:
                    about = f"slot-{difference.slot.replace('/', '-')}"
                found.setdefault(about, []).append(str(difference))
    except EvidenceError as error:
        # Nobody knows then what should serve; the rest of the status is true all the same.
        found.setdefault(ENVOY, []).append(str(error))
    return found


def _ready(settings: Settings, where: Endpoints, name: str, state: ProgramState) -> bool:
    """Whether a running program answers over its own interface."""
    if name == MLFLOW:
        return health.http_answers(f"{where.mlflow_url}/health")
    if name == ENVOY:
        return EnvoyGateway(settings.gateway).admin.ready()
    if name == CODE_SERVER:
        return health.code_server_answers(settings.host, where.code_server_port)
    if name == WEB_SERVER:
        return health.http_answers(f"{where.dagster_url}/server_info")
    if name == WEBHOOKS:
        return where.webhooks_url is not None and health.http_answers(
            f"{where.webhooks_url}/health"
        )
    if name == DAEMON:
        return health.daemons_report(where.dagster_url, state.started or 0.0)
    slot = slot_of(name)
    held = None if slot is None else slot_process.read_slot(slot_folder(settings, slot))
    return held is not None and triton.ready(held.endpoint, held.model, held.deployment.version)


@contextmanager
def _exclusively(settings: Settings) -> Iterator[None]:
    """One `up` or `down` at a time."""
    lock = FileLock(settings.state / "stack.lock")
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_SECONDS)
    except Timeout as error:
        raise StackError(
            "Another `llmops up` or `llmops down` is at work",
            expected=f"its end within {LOCK_TIMEOUT_SECONDS:.0f} s",
            cure="wait for it, or interrupt it (Ctrl-C); both can be repeated",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _routes(settings: Settings) -> Routes:
    return Routes(
        evidence_log(settings, FolderStore(settings.store)), EnvoyGateway(settings.gateway)
    )


def _supervisor(settings: Settings) -> Supervisor:
    return Supervisor(settings.state, settings.logs)


def _url(settings: Settings, port: int) -> str:
    return f"http://{settings.host}:{port}"
