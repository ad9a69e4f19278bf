"""What Envoy is told, as pure functions from routes to configuration.

Messages are Envoy's v3 API (https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/api),
as JSON objects. Files are JSON: every JSON text is read alike by all parsers, YAML is not.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llmops_assets.serving.routes import Route, RouteTarget
from llmops_assets.serving.slots import Environment
from llmops_assets.storage.store import canonical_json, digest_of

Message = dict[str, Any]
"""A protobuf message in its JSON form."""

RELEASE_HEADER = "x-llmops-release"
VERSION_HEADER = "x-llmops-version"
GENERATION_HEADER = "x-llmops-generation"
ANSWER_HEADERS = (RELEASE_HEADER, VERSION_HEADER, GENERATION_HEADER)
"""Headers that tell a client what answered it. Envoy sets them; nobody else can."""

METADATA = "llmops"
"""Name of our metadata on routes and clusters, which the access log reads."""

CALL_TIMEOUT = "120s"
QUESTION_TIMEOUT = "10s"
CONNECT_TIMEOUT = "2s"
STREAM_IDLE_TIMEOUT = "120s"
STREAM_MAXIMUM_DURATION = "3600s"

_TYPE = "type.googleapis.com/envoy"
CLUSTER_TYPE = f"{_TYPE}.config.cluster.v3.Cluster"
ROUTES_TYPE = f"{_TYPE}.config.route.v3.RouteConfiguration"


def cluster_name(environment: Environment, model: str, target: RouteTarget) -> str:
    """Envoy's name of a version in a slot. No dots: they separate parts of statistics' names."""
    return f"{environment}/{model}/{target.version}/{target.colour}"


def question_cluster_name(environment: Environment, model: str, target: RouteTarget) -> str:
    """The same slot, for readiness, metadata and config.

    Statistics are kept per cluster: a monitor that polls readiness would otherwise
    water down the latency and error rate of inference.
    """
    return cluster_name(environment, model, target) + "/questions"


def listener_stat_prefix(environment: Environment) -> str:
    """Start of the names of an environment's statistics below `http.`."""
    return str(environment)


def bootstrap(
    *,
    ports: Mapping[Environment, int],
    host: str,
    admin_socket: Path,
    access_log: Path,
    clusters: Path,
    routes: Mapping[Environment, Path],
) -> Message:
    """The configuration Envoy starts with: listeners that read everything else from files."""
    return {
        "node": {"id": "llmops-gateway", "cluster": "llmops"},
        "admin": {"address": {"pipe": {"path": str(admin_socket), "mode": 0o600}}},
        "stats_flush_interval": "1s",
        "dynamic_resources": {"cds_config": _file_source(clusters)},
        "static_resources": {
            "listeners": [
                _listener(
                    environment,
                    host,
                    port,
                    access_log,
                    {
                        "rds": {
                            "route_config_name": str(environment),
                            "config_source": _file_source(routes[environment]),
                        }
                    },
                )
                for environment, port in ports.items()
            ]
        },
    }


def static_bootstrap(clusters: Message, routes: Mapping[Environment, Message]) -> Message:
    """The contents of the dynamic files in one static file, for `envoy --mode validate`.

    Validation does not read dynamic files, and checks static ones more strictly.
    """
    return {
        "static_resources": {
            "clusters": _without_types(clusters),
            "listeners": [
                _listener(environment, "127.0.0.1", 0, None, {"route_config": configuration})
                for environment, response in routes.items()
                for configuration in _without_types(response)
            ],
        }
    }


def clusters_of(environment: Environment, routes: Mapping[str, Route]) -> dict[str, Message]:
    """The clusters of each version in a slot that is on a route, by name."""
    return {
        name: _cluster(name, target)
        for model, route in routes.items()
        for target in route.targets
        for name in (
            cluster_name(environment, model, target),
            question_cluster_name(environment, model, target),
        )
    }


def cluster_response(clusters: Mapping[str, Message]) -> Message:
    """The file of clusters (CDS)."""
    resources = [clusters[name] for name in sorted(clusters)]
    return {"version_info": digest_of(canonical_json(resources)), "resources": resources}


def route_response(environment: Environment, routes: Mapping[str, Route]) -> Message:
    """The file of an environment's routes (RDS).

    Its version says what it holds, so that Envoy, which reports the version it uses,
    tells the generation of every route: see `generations`.
    """
    configuration = _route_configuration(environment, routes)
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


def _file_source(path: Path) -> Message:
    return {"resource_api_version": "V3", "path_config_source": {"path": str(path)}}


def _without_types(response: Message) -> list[Message]:
    return [
        {key: value for key, value in resource.items() if key != "@type"}
        for resource in response["resources"]
    ]


def _listener(
    environment: Environment, host: str, port: int, access_log: Path | None, routes: Message
) -> Message:
    manager: Message = {
        "@type": f"{_TYPE}.extensions.filters.network.http_connection_manager.v3"
        ".HttpConnectionManager",
        "stat_prefix": listener_stat_prefix(environment),
        **routes,
        # `/v2/models/m/../../repository/index` would otherwise match a route of m and
        # reach Triton, which resolves the dots itself.
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        # A request from an internal address may set timeouts and retries by x-envoy-…
        # headers, and loopback is internal by default. So nobody is internal: the range
        # holds the limited broadcast address (RFC 919), which is no sender's.
        "use_remote_address": True,
        "internal_address_config": {
            "cidr_ranges": [{"address_prefix": "255.255.255.255", "prefix_len": 32}]
        },
        "request_headers_timeout": "10s",
        "always_set_request_id_in_response": True,
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPE}.extensions.filters.http.router.v3.Router"},
            }
        ],
    }
    if access_log is not None:
        manager["access_log"] = [_access_log(environment, access_log)]
    return {
        "name": str(environment),
        "address": {"socket_address": {"address": host, "port_value": port}},
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": manager,
                    }
                ]
            }
        ],
    }


def _access_log(environment: Environment, path: Path) -> Message:
    """One JSON object a request; times in ms. Paths come without their query."""
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": f"{_TYPE}.extensions.access_loggers.file.v3.FileAccessLog",
            "path": str(path),
            "log_format": {
                "json_format": {
                    "time": "%START_TIME%",
                    "request_id": "%REQ(X-REQUEST-ID)%",
                    "environment": str(environment),
                    "model": f"%METADATA(ROUTE:{METADATA}:model)%",
                    "generation": f"%METADATA(ROUTE:{METADATA}:generation)%",
                    "release": f"%METADATA(CLUSTER:{METADATA}:release)%",
                    "version": f"%METADATA(CLUSTER:{METADATA}:version)%",
                    "cluster": "%UPSTREAM_CLUSTER%",
                    "upstream": "%UPSTREAM_HOST%",
                    "method": "%REQ(:METHOD)%",
                    "path": "%PATH(NQ)%",
                    "status": "%RESPONSE_CODE%",
                    "flags": "%RESPONSE_FLAGS%",
                    "details": "%RESPONSE_CODE_DETAILS%",
                    "time_to_first_byte_ms": "%RESPONSE_DURATION%",
                    "duration_ms": "%DURATION%",
                    "bytes_received": "%BYTES_RECEIVED%",
                    "bytes_sent": "%BYTES_SENT%",
                }
            },
        },
    }


def _cluster(name: str, target: RouteTarget) -> Message:
    return {
        "@type": CLUSTER_TYPE,
        "name": name,
        "type": "STATIC" if _is_address(target.host) else "STRICT_DNS",
        "connect_timeout": CONNECT_TIMEOUT,
        "metadata": {
            "filter_metadata": {
                METADATA: {
                    "release": target.release,
                    "version": target.version,
                    "package": target.package,
                }
            }
        },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [
                {
                    "lb_endpoints": [
                        {
                            "endpoint": {
                                "address": {
                                    "socket_address": {
                                        "address": target.host,
                                        "port_value": target.http_port,
                                    }
                                }
                            }
                        }
                    ]
                }
            ],
        },
    }


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _route_configuration(environment: Environment, routes: Mapping[str, Route]) -> Message:
    table: list[Message] = [
        _direct({"path": "/v2/health/live"}, 200, {"live": True}),
        _direct({"path": "/v2/health/ready"}, *_readiness(environment, routes)),
    ]
    for model in sorted(routes):
        table += _model_routes(environment, routes[model])
    table += [
        _direct(
            {"path_separated_prefix": "/v2/models"},
            404,
            _error(f"no such model has a route in {environment}"),
        ),
        _direct(
            {"prefix": "/"},
            403,
            _error("the gateway passes only /v2/models/MODEL/… and /v2/health/{live,ready}"),
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


def _readiness(environment: Environment, routes: Mapping[str, Route]) -> tuple[int, Message]:
    """Ready means that some model takes traffic; a model's own readiness is Triton's answer."""
    if any(route.serving is not None for route in routes.values()):
        return 200, {"ready": True}
    return 503, _error(f"no model takes traffic in {environment}")


def _model_routes(environment: Environment, route: Route) -> Iterable[Message]:
    """The allow-list of one model. Anything else below its name is answered by Envoy."""
    base = f"/v2/models/{route.model}"
    if route.serving is None:
        error = _error(f"no version of {route.model} takes traffic in {environment}")
        return [_direct({"path_separated_prefix": base}, 503, error, route)]
    call = {"timeout": CALL_TIMEOUT}
    question = {"timeout": QUESTION_TIMEOUT}
    stream = {
        # Envoy's default of 15 s would cut a stream after its 200.
        "timeout": "0s",
        "idle_timeout": STREAM_IDLE_TIMEOUT,
        "max_stream_duration": {"max_stream_duration": STREAM_MAXIMUM_DURATION},
    }
    return [
        _forward("POST", f"{base}/infer", cluster_name, call, environment, route),
        _forward("POST", f"{base}/generate", cluster_name, call, environment, route),
        _forward("POST", f"{base}/generate_stream", cluster_name, stream, environment, route),
        _forward("GET", base, question_cluster_name, question, environment, route),
        _forward("GET", f"{base}/ready", question_cluster_name, question, environment, route),
        _forward("GET", f"{base}/config", question_cluster_name, question, environment, route),
        _direct(
            {"path_separated_prefix": base},
            403,
            _error(
                f"of {route.model} the gateway passes only POST infer, generate and"
                " generate_stream, and GET of its metadata, ready and config"
            ),
            route,
        ),
    ]


def _forward(
    method: str,
    path: str,
    cluster: Callable[[Environment, str, RouteTarget], str],
    limits: Message,
    environment: Environment,
    route: Route,
) -> Message:
    return {
        "match": {
            "path": path,
            "headers": [{"name": ":method", "string_match": {"exact": method}}],
        },
        "metadata": _route_metadata(route),
        "route": {
            "weighted_clusters": {
                "clusters": [
                    {
                        "name": cluster(environment, route.model, target),
                        "weight": target.weight,
                        "response_headers_to_add": _headers(
                            {
                                RELEASE_HEADER: target.release,
                                VERSION_HEADER: str(target.version),
                                GENERATION_HEADER: str(route.generation),
                            }
                        ),
                    }
                    for target in route.targets
                ]
            },
            # Only where no byte of the request was sent: an inference is not repeated.
            "retry_policy": {"retry_on": "connect-failure,refused-stream", "num_retries": 1},
            **limits,
        },
    }


def _direct(match: Message, status: int, body: Message, route: Route | None = None) -> Message:
    """An answer that Envoy gives itself."""
    answer: Message = {
        "match": match,
        "direct_response": {"status": status, "body": {"inline_string": json.dumps(body)}},
        "response_headers_to_add": _headers({"content-type": "application/json"}),
    }
    if route is not None:
        answer["metadata"] = _route_metadata(route)
    return answer


def _route_metadata(route: Route) -> Message:
    return {"filter_metadata": {METADATA: {"model": route.model, "generation": route.generation}}}


def _headers(headers: Mapping[str, str]) -> list[Message]:
    return [
        {
            # A per cent sign would start one of Envoy's format commands.
            "header": {"key": key, "value": value.replace("%", "%%")},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        }
        for key, value in headers.items()
    ]


def _error(message: str) -> Message:
    return {"error": message}
