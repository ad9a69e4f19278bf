"""Doubles of the parts that need a machine: slots, gateway, registry, metrics.

Each keeps the state that its protocol speaks of and refuses what the protocol forbids, so
that a caller who breaks the contract fails here as well.
"""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmops_assets.develop.registry import (
    RELEASE_TAG,
    ListedVersion,
    LossPoint,
    Readiness,
    Registered,
)
from llmops_assets.errors import GatewayError, RegistryError, SlotError
from llmops_assets.serving.access_log import AccessLog
from llmops_assets.serving.metrics import Latency, ServiceSample
from llmops_assets.serving.package_description import PackageDescription
from llmops_assets.serving.routes import Route, Routes, RouteTarget, ServedRoute
from llmops_assets.serving.slots import (
    Deployment,
    Endpoint,
    Environment,
    Slot,
    SlotInspection,
    SlotState,
)
from llmops_assets.storage.store import Artifact, Store

Respond = Callable[[str, dict[str, Any]], tuple[int, Any]]
"""From a request's path and JSON body to a status and a JSON body; a string is sent as it is."""


DELIBERATE = "the double fails on purpose"


class HttpDouble:
    """A double of any JSON server: a real one on loopback, whose answers the test decides."""

    def __init__(self, respond: Respond) -> None:
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        double = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                self._answer(json.loads(content))

            def _answer(self, body: dict[str, Any]) -> None:
                double.requests.append((self.path, body, dict(self.headers)))
                status, answer = respond(self.path, body)
                payload = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                if payload.startswith(b"data:"):
                    self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                self.wfile.write(payload)

            def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
                """Tests are quiet."""

        class Server(ThreadingHTTPServer):
            # A client that finds the queue full tries again after a second.
            request_queue_size = 64

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass
class Behaviour:
    """How a version does, in `FakeSlots` or as `FakeTraffic` shows it."""

    milliseconds: float = 40.0
    error_rate: float = 0.0
    stream_error_rate: float = 0.0
    """Of errors inside a 200, which the access log does not show; of `FakeTraffic` alone."""


class FakeSlots:
    """A double of `Slots`: each slot that was ever started has an HTTP server that answers.

    `answers` is what every slot says to a prompt; a prompt that is not in it gets an error.
    A stream comes in one go, after `delay_seconds`, in the pieces that `pieces` makes of a
    text. `metrics` is what every slot says of itself.
    """

    def __init__(self, store: Store, answers: Mapping[str, str]) -> None:
        self.answers = dict(answers)
        self.calls: list[tuple[str, str]] = []
        self.broken: set[Slot] = set()
        """Slots that do not become ready."""
        self.loaded: dict[Slot, int | None] = {}
        """What servers say they have loaded, where it is not what they were given."""
        self.damage: dict[Slot, dict[str, str]] = {}
        """What a look into a slot finds: `cheap` or `deep`."""
        self.delay_seconds = 0.0
        """How long every answer takes."""
        self.behaviours: dict[int, Behaviour] = {}
        """Of versions that take their own time or fail."""
        self.pieces: Callable[[str, Mapping[str, Any]], list[dict[str, Any]]] = embedded_pieces
        self.metrics = ""
        self.images: set[str] = set()
        """Images that servers can be started from, beside the Triton that is always here."""
        self._store = store
        self._held: dict[Slot, Deployment] = {}
        self._running: set[Slot] = set()
        self._servers: dict[Slot, HttpDouble] = {}

    def check_serves(self, package: PackageDescription) -> None:
        if package.image is not None and str(package.image) not in self.images:
            raise SlotError(f"No slot has {package.image}", cure="serve it on a cluster")

    def start(self, slot: Slot, package: Artifact, deployment: Deployment) -> Endpoint:
        assert package.digest == deployment.package, "the slot is told of another package"
        self._store.open(package.digest)
        if self._held.get(slot) == deployment and slot in self._running:
            return self._endpoint(slot)
        self.calls.append(("start", str(slot)))
        self._held[slot] = deployment
        self._running.discard(slot)
        if slot in self.broken:
            raise SlotError(f"The server of slot {slot} ended while it loaded", cure="read its log")
        if slot not in self._servers:
            self._servers[slot] = HttpDouble(lambda path, body: self._answer(slot, path, body))
        self._running.add(slot)
        return self._endpoint(slot)

    def state(self, slot: Slot) -> SlotState:
        held = self._held.get(slot)
        return SlotState(
            slot,
            held,
            None if held is None or slot not in self._servers else self._endpoint(slot),
            slot in self._running,
        )

    def inspect(self, slot: Slot, *, deep: bool = False) -> SlotInspection:
        held = self._held.get(slot)
        version = held.version if held is not None and slot in self._running else None
        damage = self.damage.get(slot, {}).get("deep" if deep else "cheap")
        return SlotInspection(self.loaded.get(slot, version), damage)

    def drain(self, slot: Slot) -> None:
        self.calls.append(("drain", str(slot)))

    def stop(self, slot: Slot, deployment: Deployment) -> None:
        if self._held.get(slot) != deployment:
            return
        if slot in self._running:
            assert self.calls[-1:] == [("drain", str(slot))], f"{slot} was not drained first"
        self.calls.append(("stop", str(slot)))
        self._running.discard(slot)

    def clear(self, slot: Slot, deployment: Deployment) -> None:
        if self._held.get(slot) != deployment:
            return
        self.calls.append(("clear", str(slot)))
        self._running.discard(slot)
        self._held.pop(slot, None)

    def slots(self, environment: Environment, model: str) -> tuple[SlotState, ...]:
        return tuple(
            self.state(slot)
            for slot in sorted(self._held, key=str)
            if (slot.environment, slot.model) == (environment, model)
        )

    def requests(self, slot: Slot) -> list[tuple[str, dict[str, Any]]]:
        """Path and body of everything that the slot was asked, in order."""
        return [(path, body) for path, body, _ in self._servers[slot].requests]

    def crash(self, slot: Slot) -> None:
        """The server is gone, and nobody asked for it."""
        self._running.remove(slot)

    def close(self) -> None:
        for server in self._servers.values():
            server.close()

    def _endpoint(self, slot: Slot) -> Endpoint:
        port = self._servers[slot].port
        return Endpoint("127.0.0.1", port, port, port)

    def _answer(self, slot: Slot, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        version = self._held[slot].version
        model = f"/v2/models/{slot.model}"
        addresses = [
            f"{address}/{call}"
            for address in (model, f"{model}/versions/{version}")
            for call in ("generate", "generate_stream")
        ]
        if slot in self._running and path == "/metrics":
            return 200, self.metrics
        if slot not in self._running or path not in addresses:
            return 404, {"error": f"{slot} does not serve {path}"}
        time.sleep(self.delay_seconds)
        if (behaviour := self.behaviours.get(version)) is not None:
            time.sleep(behaviour.milliseconds / 1000)
            if random.random() < behaviour.error_rate:
                return 500, {"error": DELIBERATE}
        status, answer = generated(self.answers, body["text_input"], version)
        if status != 200 or path.endswith("/generate"):
            return status, answer
        pieces = self.pieces(answer["text_output"], body)
        events = [{**answer, **piece} for piece in pieces]
        return status, "".join(f"data: {json.dumps(event)}\n\n" for event in events)


class FakeGateway:
    """A double of `Gateway`, with an address that answers for whatever is routed.

    `answers` is what clients get through it, whichever slot is behind; `answers_of` has other
    ones of some versions. Its access log has what `FakeTraffic` writes.
    """

    def __init__(self, answers: Mapping[str, str]) -> None:
        self.answers = dict(answers)
        self.answers_of: dict[int, Mapping[str, str]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="gateway-double-")
        self.access_log = AccessLog(Path(self._folder.name) / "access.log")
        self.down = False
        self.refuses = False
        self.applied_routes: dict[Environment, dict[str, Route]] = {
            environment: {} for environment in Environment
        }
        self._lock = threading.RLock()
        self._held = False
        self._server = HttpDouble(self._answer)

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The body of every request that clients sent, in order."""
        return [body for _, body, _ in self._server.requests]

    def apply(self, environment: Environment, routes: Mapping[str, Route]) -> None:
        assert self._held, "routes are read and applied under the gateway's lock"
        self._reach()
        if self.refuses:
            raise GatewayError("The gateway refused the routes", cure="read its log")
        self.applied_routes[environment] = dict(routes)

    def applied(self, environment: Environment) -> Mapping[str, int]:
        self._reach()
        routes = self.applied_routes[environment]
        return {model: route.generation for model, route in routes.items()}

    def in_use(self, environment: Environment) -> Mapping[str, ServedRoute]:
        self._reach()
        routes = self.applied_routes[environment]
        return {model: ServedRoute.of(route) for model, route in routes.items()}

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._lock:
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def serving(self, model: str) -> RouteTarget | None:
        """Where production's traffic really goes."""
        route = self.applied_routes[Environment.PRODUCTION].get(model)
        return None if route is None else route.serving

    def close(self) -> None:
        self._server.close()
        self._folder.cleanup()

    def _reach(self) -> None:
        if self.down:
            raise GatewayError("The gateway does not answer", cure="start it with `llmops up`")

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        _, _, _, model, *rest = path.split("/")
        route = self.applied_routes[Environment.PRODUCTION].get(model)
        answering = None if route is None else route.serving
        if route is not None and rest[0] == "versions":
            pinned = (target for target in route.targets if str(target.version) == rest[1])
            answering = next(pinned, None)
        if answering is None:
            return 404, {"error": f"no route for {path}"}
        answers = self.answers_of.get(answering.version, self.answers)
        return generated(answers, body["text_input"], answering.version)


class FakeTraffic:
    """Clients of `FakeGateway`: writes what Envoy and Triton would note of them, by lot."""

    def __init__(self, gateway: FakeGateway, model: str, per_second: int = 400) -> None:
        self.behaviours: dict[int, Behaviour] = {}
        self.succeeded: Counter[int] = Counter()
        self.failed: Counter[int] = Counter()
        """Triton's counters, by version."""
        self.sent: list[tuple[datetime, int]] = []
        """When, and to which version."""
        self._gateway = gateway
        self._model = model
        self._per_second = per_second
        self._draw = random.Random(7)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        began, sent = time.monotonic(), 0
        while not self._stopped.wait(0.02):
            due = int((time.monotonic() - began) * self._per_second)
            with self._gateway.access_log.file.open("a") as log:
                for _ in range(due - sent):
                    log.write(self._one())
            sent = due

    def _one(self) -> str:
        route = self._gateway.applied_routes[Environment.PRODUCTION].get(self._model)
        if route is None or route.serving is None:
            return ""
        weights = [target.weight for target in route.targets]
        (target,) = self._draw.choices(route.targets, weights)
        behaviour = self.behaviours.get(target.version, Behaviour())
        failed = self._draw.random() < behaviour.error_rate
        inside = self._draw.random() < behaviour.stream_error_rate
        (self.failed if failed or inside else self.succeeded)[target.version] += 1
        now = datetime.now(UTC)
        self.sent.append((now, target.version))
        milliseconds = int(behaviour.milliseconds * self._draw.lognormvariate(0.0, 0.4))
        return access_line(route, target, now, 500 if failed else 200, milliseconds)


class FakeRegistry:
    """A double of `ModelRegistry` in memory; versions count from 1 in each model.

    `people` is what others registered: put versions there, take them away, change them.
    """

    def __init__(self) -> None:
        self.versions: dict[str, dict[str, Registered]] = {}
        self.people: dict[tuple[str, int], ListedVersion] = {}
        self.down = False

    def log_training(
        self, model: str, release: str, parameters: Mapping[str, Any], history: Sequence[LossPoint]
    ) -> str:
        return f"http://registry.invalid/{model}/{release}"

    def log_evaluation(self, model: str, release: str, metrics: Mapping[str, float]) -> str:
        return f"http://registry.invalid/{model}/{release}"

    def register(
        self,
        model: str,
        release: str,
        tags: Mapping[str, str],
        manifest: Mapping[str, Any],
        version: int | None = None,
    ) -> Registered:
        versions = self.versions.setdefault(model, {})
        if release not in versions:
            if version is None:
                version = max(self.newest([model]).values(), default=0) + 1
            elif (model, version) not in self.people:
                raise RegistryError(f"There is no version {version} of {model}", cure="register it")
            versions[release] = Registered(
                model=model,
                version=version,
                tags={**tags, RELEASE_TAG: release},
                url=f"http://registry.invalid/{model}/versions/{version}",
            )
        return versions[release]

    def find(self, model: str, release: str) -> Registered | None:
        return self.versions.get(model, {}).get(release)

    def registered_since(self, seen: Mapping[str, int]) -> Sequence[ListedVersion]:
        return [
            version
            for version in self._all().values()
            if version.model in seen and version.version > seen[version.model]
        ]

    def listed(self, model: str, version: int) -> ListedVersion | None:
        return self._all().get((model, version))

    def newest(self, models: Collection[str]) -> Mapping[str, int]:
        return {model: number for model, number in sorted(self._all()) if model in models}

    def _all(self) -> dict[tuple[str, int], ListedVersion]:
        if self.down:
            raise RegistryError("The registry does not answer", cure="start it")
        ours = {
            (model, registered.version): ListedVersion(
                model, registered.version, Readiness.READY, None, release
            )
            for model, releases in self.versions.items()
            for release, registered in releases.items()
        }
        return {**self.people, **ours}


class FakeMetrics:
    """A double of `Metrics`: the numbers a test sets, for whatever the routes say serves."""

    def __init__(self, routes: Routes) -> None:
        self.requests = 100
        self.failures = 0
        self.p99 = 0.1
        self.traffic: FakeTraffic | None = None
        """Whose inferences Triton counts; None: it counts none."""
        self._routes = routes

    def sample(self, environment: Environment, model: str) -> ServiceSample:
        return self.samples(environment, model)[0]

    def samples(self, environment: Environment, model: str) -> tuple[ServiceSample, ...]:
        route, _ = self._routes.current(environment, model)
        return tuple(
            ServiceSample(
                time=datetime.now(UTC),
                environment=environment,
                model=model,
                generation=route.generation,
                release=target.release,
                version=target.version,
                weight=target.weight,
                requests=self.requests,
                failures=self.failures,
                inferences_succeeded=self.traffic and self.traffic.succeeded[target.version],
                inferences_failed=self.traffic and self.traffic.failed[target.version],
                latency_seconds=Latency(p50=self.p99, p95=self.p99, p99=self.p99),
            )
            for target in (() if route is None else route.targets)
            if route is not None and target.weight > 0
        )


def access_line(
    route: Route, target: RouteTarget, time: datetime, status: int, milliseconds: int
) -> str:
    """A line of the gateway's access log about a call that was answered whole."""
    fields = {
        "time": time.isoformat(),
        "request_id": None,
        "environment": str(route.environment),
        "model": route.model,
        "generation": route.generation,
        "call": "generate",
        "pinned": False,
        "release": target.release,
        "version": target.version,
        "colour": str(target.colour),
        "cluster": f"{route.environment}/{route.model}/{target.version}/{target.colour}",
        "upstream": f"{target.host}:{target.http_port}",
        "attempts": 1,
        "protocol": "HTTP/1.1",
        "method": "POST",
        "path": f"/v2/models/{route.model}/generate",
        "status": status,
        "grpc_status": None,
        "flags": "-",
        "details": "via_upstream",
        "bytes_received": 100,
        "bytes_sent": 100,
        "upstream_first_byte_ms": milliseconds // 2,
        "first_byte_ms": milliseconds // 2,
        "duration_ms": milliseconds,
    }
    return json.dumps(fields) + "\n"


def generated(answers: Mapping[str, str], prompt: str, version: int) -> tuple[int, Any]:
    """What Triton's generate extension answers."""
    if prompt not in answers:
        return 400, {"error": f"no answer to {prompt!r}"}
    return 200, {"text_output": answers[prompt], "model_version": str(version)}


def embedded_pieces(text: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How the embedded toolchain's model streams an answer: a character is a token."""
    assert body["stream"] is True, "without it the packaged model answers in one piece"
    assert len(text) < body["max_tokens"], "the end token needs room as well"
    pieces = [*text, ""]
    return [
        {
            "text_output": piece,
            "output_tokens": count,
            "finish_reason": "stop" if count == len(pieces) else "",
        }
        for count, piece in enumerate(pieces, start=1)
    ]


def ensemble_pieces(text: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How NVIDIA's ensemble streams it: each piece counts its own, and no reason is given."""
    assert body["stream"] is True, "without it the ensemble answers in one piece"
    counted = {"num_output_tokens": 1} if body.get("return_num_output_tokens") else {}
    return [{"text_output": piece, **counted} for piece in text[: body["max_tokens"]]]
