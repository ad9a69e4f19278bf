"""Which calls the gateway passes and to which slot: Envoy's route tables.

The table is an allow-list: exact methods on exact paths of Triton's inference API, by
HTTP (https://github.com/kserve/open-inference-protocol, with Triton's generate extension)
and by gRPC. Everything else is answered by Envoy, in words. Paths are matched after
Envoy resolved dots and doubled slashes in them; what it does not decode does not match.

gRPC names the model in the message, which a router does not read. So its clients also
send it as the header `llmops-model` (and, to pin a version, `llmops-version`), and the
header alone decides which slot gets the call. A message that names another model or
version then comes to a slot that does not have it, and the slot's Triton refuses it. A
stream (`ModelStreamInfer`) is one call: it stays with the slot that it began with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmops_assets.serving.access_log import METADATA
from llmops_assets.serving.envoy_config import TYPE, Message, Traffic, cluster_name, seconds
from llmops_assets.serving.gateway_limits import GatewayLimits
from llmops_assets.serving.routes import Route, RouteTarget
from llmops_assets.serving.slots import Environment
from llmops_assets.storage.store import canonical_json, digest_of

RELEASE_HEADER = "x-llmops-release"
VERSION_HEADER = "x-llmops-version"
GENERATION_HEADER = "x-llmops-generation"
ANSWER_HEADERS = (RELEASE_HEADER, VERSION_HEADER, GENERATION_HEADER)
"""Headers that tell a client what answered it. Envoy sets them; nobody else can."""

GRPC_MODEL_HEADER = "llmops-model"
GRPC_VERSION_HEADER = "llmops-version"
"""Metadata by which clients of gRPC say where a call goes."""

GRPC_SERVICE = "/inference.GRPCInferenceService"
ROUTES_TYPE = f"{TYPE}.config.route.v3.RouteConfiguration"
BUFFER_FILTER = "envoy.filters.http.buffer"


@dataclass(frozen=True)
class _Call:
    """A call that passes: `path` is below the model's (HTTP) or the service's (gRPC)."""

    name: str
    path: str
    traffic: Traffic
    method: str = "POST"
    stream: bool = False

    @property
    def grpc(self) -> bool:
        return self.traffic.grpc


HTTP_CALLS = (
    _Call("infer", "/infer", Traffic.INFERENCE),
    _Call("generate", "/generate", Traffic.INFERENCE),
    _Call("generate_stream", "/generate_stream", Traffic.INFERENCE, stream=True),
    _Call("metadata", "", Traffic.QUESTIONS, "GET"),
    _Call("ready", "/ready", Traffic.QUESTIONS, "GET"),
    _Call("config", "/config", Traffic.QUESTIONS, "GET"),
)
GRPC_CALLS = (
    _Call("ModelInfer", "/ModelInfer", Traffic.GRPC_INFERENCE),
    _Call("ModelStreamInfer", "/ModelStreamInfer", Traffic.GRPC_INFERENCE, stream=True),
    *(
        _Call(name, f"/{name}", Traffic.GRPC_QUESTIONS)
        for name in ("ModelReady", "ModelMetadata", "ModelConfig", "ServerLive", "ServerReady")
    ),
)


def route_response(
    environment: Environment, routes: Mapping[str, Route], limits: GatewayLimits
) -> Message:
    """The file of an environment's routes (RDS).

    Its version says what it holds, so that Envoy, which reports the version it uses,
    tells the generation of every route: see `generations`.
    """
    configuration = _route_configuration(environment, routes, limits)
    generations = ",".join(f"{model}={routes[model].generation}" for model in sorted(routes))
    return {
        "version_info": f"{digest_of(canonical_json(configuration))} {generations}",
        "resources": [configuration],
    }


def generations(version: str) -> dict[str, int]:
    """The generations in a version that `route_response` made, by model."""
    pairs = version.partition(" ")[2]
    return {
        model: int(generation)
        for model, _, generation in (pair.partition("=") for pair in pairs.split(",") if pair)
    }


def used_clusters(response: Message) -> set[str]:
    """Names of the clusters that a file of routes refers to."""
    return {
        cluster["name"]
        for configuration in response["resources"]
        for host in configuration["virtual_hosts"]
        for route in host["routes"]
        for cluster in route.get("route", {}).get("weighted_clusters", {}).get("clusters", ())
    }


def _route_configuration(
    environment: Environment, routes: Mapping[str, Route], limits: GatewayLimits
) -> Message:
    table: list[Message] = [
        _answer({"path": "/v2/health/live"}, 200, json.dumps({"live": True})),
        _readiness(environment, routes),
    ]
    for model in sorted(routes):
        table += _ModelTable(environment, routes[model], limits).routes()
    table += [
        _answer(
            {"path_separated_prefix": "/v2/models"},
            404,
            f"no such model has a route in {environment}",
        ),
        _answer(
            {
                "path_separated_prefix": GRPC_SERVICE,
                "headers": [{"name": GRPC_MODEL_HEADER, "present_match": True}],
            },
            404,
            f"no such model has a route in {environment}",
        ),
        _answer(
            {"path_separated_prefix": GRPC_SERVICE},
            403,
            f"calls of gRPC name their model in the header {GRPC_MODEL_HEADER}",
        ),
        _answer(
            {"prefix": "/"},
            403,
            "the gateway passes only /v2/models/MODEL/…, /v2/health/{live,ready} and"
            f" {GRPC_SERVICE}/…",
        ),
    ]
    return {
        "@type": ROUTES_TYPE,
        "name": str(environment),
        # A route to a cluster that Envoy does not have would answer 503; refuse it instead.
        "validate_clusters": True,
        "request_headers_to_remove": list(ANSWER_HEADERS),
        "virtual_hosts": [{"name": str(environment), "domains": ["*"], "routes": table}],
    }


def _readiness(environment: Environment, routes: Mapping[str, Route]) -> Message:
    """Ready means that some model takes traffic; a model's own readiness is Triton's answer."""
    match = {"path": "/v2/health/ready"}
    if any(route.serving is not None for route in routes.values()):
        return _answer(match, 200, json.dumps({"ready": True}))
    return _answer(match, 503, f"no model takes traffic in {environment}")


@dataclass(frozen=True)
class _ModelTable:
    """The allow-list of one model. Anything else below its name is answered by Envoy."""

    environment: Environment
    route: Route
    limits: GatewayLimits

    def routes(self) -> Iterator[Message]:
        """In the order in which Envoy tries them: pinned calls first, refusals last."""
        yield from self._http()
        yield from self._grpc()

    def _http(self) -> Iterator[Message]:
        base = f"/v2/models/{self.route.model}"
        for target in self._warm():
            pinned = f"{base}/versions/{target.version}"
            for call in HTTP_CALLS:
                yield self._forward(call, _http_match(call, pinned), [target], pinned=True)
            yield self._refuse({"path_separated_prefix": pinned}, 403, self._passed(HTTP_CALLS))
        yield self._refuse({"path_separated_prefix": f"{base}/versions"}, 404, self._not_warm())
        if self.route.serving is None:
            yield self._refuse({"path_separated_prefix": base}, 503, self._nothing_serves())
            return
        for call in HTTP_CALLS:
            yield self._forward(call, _http_match(call, base), self.route.targets)
        yield self._refuse({"path_separated_prefix": base}, 403, self._passed(HTTP_CALLS))

    def _grpc(self) -> Iterator[Message]:
        model = _header(GRPC_MODEL_HEADER, self.route.model)
        service: Message = {"path_separated_prefix": GRPC_SERVICE}
        for target in self._warm():
            version = _header(GRPC_VERSION_HEADER, str(target.version))
            for call in GRPC_CALLS:
                yield self._forward(call, _grpc_match(call, model, version), [target], pinned=True)
            refused = {**service, "headers": [model, version]}
            yield self._refuse(refused, 403, self._passed(GRPC_CALLS))
        pinned = {"name": GRPC_VERSION_HEADER, "present_match": True}
        yield self._refuse({**service, "headers": [model, pinned]}, 404, self._not_warm())
        rest = {**service, "headers": [model]}
        if self.route.serving is None:
            yield self._refuse(rest, 503, self._nothing_serves())
            return
        for call in GRPC_CALLS:
            yield self._forward(call, _grpc_match(call, model), self.route.targets)
        yield self._refuse(rest, 403, self._passed(GRPC_CALLS))

    def _warm(self) -> Iterable[RouteTarget]:
        """The slot for each version on the route; of two, the one with more traffic."""
        by_weight = sorted(self.route.targets, key=lambda target: target.weight)
        return {target.version: target for target in by_weight}.values()

    def _forward(
        self,
        call: _Call,
        match: Message,
        targets: Sequence[RouteTarget],
        *,
        pinned: bool = False,
    ) -> Message:
        message: Message = {
            "match": match,
            "metadata": self._metadata(call=call.name, pinned=pinned),
            "route": {
                "weighted_clusters": {
                    "clusters": [
                        {
                            "name": cluster_name(
                                self.environment, self.route.model, target, call.traffic
                            ),
                            # A pinned call goes to a warm slot without a share as well.
                            "weight": 1 if pinned else target.weight,
                            "response_headers_to_add": _headers(
                                {
                                    RELEASE_HEADER: target.release,
                                    VERSION_HEADER: str(target.version),
                                    GENERATION_HEADER: str(self.route.generation),
                                }
                            ),
                        }
                        for target in targets
                    ]
                },
                # Where no slot has seen a byte of the request: there was no connection, or
                # the slot says that it did not process the stream (RFC 9113, 8.7). An
                # inference that may have run is not repeated.
                "retry_policy": {
                    "retry_on": "connect-failure,refused-stream",
                    "num_retries": self.limits.retries,
                },
                **self._times(call),
            },
        }
        if call.grpc and call.stream:
            # A stream of requests ends when its client likes; waiting for all of it would
            # keep the first one from the model.
            message["typed_per_filter_config"] = {
                BUFFER_FILTER: {
                    "@type": f"{TYPE}.extensions.filters.http.buffer.v3.BufferPerRoute",
                    "disabled": True,
                }
            }
        return message

    def _times(self, call: _Call) -> Message:
        if call.stream:
            return {
                # Envoy's default of 15 s for the whole answer would cut a stream after its 200.
                "timeout": "0s",
                "idle_timeout": seconds(self.limits.stream_idle_seconds),
                # Zero takes the listener's limit off. Any other value must not be here: it
                # would switch the route's `timeout` off.
                "max_stream_duration": {"max_stream_duration": "0s"},
            }
        if call.traffic.questions:
            return {"timeout": seconds(self.limits.question_seconds)}
        return {"timeout": seconds(self.limits.call_seconds)}

    def _refuse(self, match: Message, status: int, reason: str) -> Message:
        return {**_answer(match, status, reason), "metadata": self._metadata()}

    def _metadata(self, **more: str | bool) -> Message:
        about = {"model": self.route.model, "generation": self.route.generation, **more}
        return {"filter_metadata": {METADATA: about}}

    def _passed(self, calls: Iterable[_Call]) -> str:
        passed = ", ".join(f"{call.method} {call.name}" for call in calls)
        return f"of {self.route.model} the gateway passes only {passed}"

    def _not_warm(self) -> str:
        versions = sorted({target.version for target in self.route.targets})
        return (
            f"this version of {self.route.model} is not loaded in {self.environment};"
            f" loaded: {', '.join(map(str, versions)) or 'none'}"
        )

    def _nothing_serves(self) -> str:
        return f"no version of {self.route.model} takes traffic in {self.environment}"


def _http_match(call: _Call, base: str) -> Message:
    return {"path": base + call.path, "headers": [_header(":method", call.method)]}


def _grpc_match(call: _Call, *headers: Message) -> Message:
    return {
        "path": GRPC_SERVICE + call.path,
        "headers": [_header(":method", call.method), *headers],
        # By its content type: a call in other clothes is none.
        "grpc": {},
    }


def _answer(match: Message, status: int, body: str) -> Message:
    """An answer that Envoy gives itself; the listener wraps an error in JSON."""
    return {
        "match": match,
        "direct_response": {"status": status, "body": {"inline_string": body}},
        "response_headers_to_add": _headers({"content-type": "application/json"}),
    }


def _header(name: str, value: str) -> Message:
    return {"name": name, "string_match": {"exact": value}}


def _headers(headers: Mapping[str, str]) -> list[Message]:
    return [
        {
            # A per cent sign would start one of Envoy's format commands.
            "header": {"key": key, "value": value.replace("%", "%%")},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        }
        for key, value in headers.items()
    ]
