"""What Envoy is told at its start, and where the slots are: pure functions.

Messages are Envoy's v3 API (https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/api),
as JSON objects. Files are JSON: every JSON text is read alike by all parsers, YAML is not.
Which calls pass to which slot is in `envoy_routes`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from llmops_assets.serving.access_log import FORMAT, METADATA
from llmops_assets.serving.gateway_limits import GatewayLimits
from llmops_assets.serving.routes import Route, RouteTarget
from llmops_assets.serving.slots import Environment
from llmops_assets.storage.store import canonical_json, digest_of

Message = dict[str, Any]
"""A protobuf message in its JSON form."""

TYPE = "type.googleapis.com/envoy"
CLUSTER_TYPE = f"{TYPE}.config.cluster.v3.Cluster"

CONNECTION_BUFFER_BYTES = 2**20
"""What Envoy holds of an answer that its client is slow to read; then the slot waits."""
OVERLOADED = "too many requests wait for this model"


class Traffic(StrEnum):
    """Kinds of calls to a slot; each has an Envoy cluster of its own.

    Statistics are kept per cluster: a monitor that polls readiness would otherwise
    water down the latency and error rate of inference. And gRPC has another port.
    """

    INFERENCE = ""
    QUESTIONS = "/questions"
    GRPC_INFERENCE = "/grpc"
    GRPC_QUESTIONS = "/grpc/questions"

    @property
    def grpc(self) -> bool:
        return self in (Traffic.GRPC_INFERENCE, Traffic.GRPC_QUESTIONS)

    @property
    def questions(self) -> bool:
        """Readiness, metadata and config: nothing that runs the model."""
        return self in (Traffic.QUESTIONS, Traffic.GRPC_QUESTIONS)


def cluster_name(
    environment: Environment,
    model: str,
    target: RouteTarget,
    traffic: Traffic = Traffic.INFERENCE,
) -> str:
    """Envoy's name of a version in a slot. No dots: they separate parts of statistics' names."""
    return f"{environment}/{model}/{target.version}/{target.colour}{traffic}"


def listener_stat_prefix(environment: Environment) -> str:
    """Start of the names of an environment's statistics below `http.`."""
    return str(environment)


def seconds(duration: float) -> str:
    """A duration as JSON has it (google.protobuf.Duration)."""
    return f"{duration:.3f}s"


def bootstrap(
    *,
    ports: Mapping[Environment, int],
    host: str,
    admin_socket: Path,
    access_log: Path,
    clusters: Path,
    routes: Mapping[Environment, Path],
    limits: GatewayLimits,
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
                    limits,
                )
                for environment, port in ports.items()
            ]
        },
    }


def static_bootstrap(
    clusters: Message, routes: Mapping[Environment, Message], limits: GatewayLimits
) -> Message:
    """The contents of the dynamic files in one static file, for `envoy --mode validate`.

    Validation does not read dynamic files, and checks static ones more strictly.
    """
    return {
        "static_resources": {
            "clusters": _without_types(clusters),
            "listeners": [
                _listener(
                    environment, "127.0.0.1", 0, None, {"route_config": configuration}, limits
                )
                for environment, response in routes.items()
                for configuration in _without_types(response)
            ],
        }
    }


def clusters_of(
    environment: Environment, routes: Mapping[str, Route], limits: GatewayLimits
) -> dict[str, Message]:
    """The clusters of each version in a slot that is on a route, by name."""
    return {
        name: _cluster(name, target, traffic, limits)
        for model, route in routes.items()
        for target in route.targets
        for traffic in Traffic
        for name in (cluster_name(environment, model, target, traffic),)
    }


def cluster_response(clusters: Mapping[str, Message]) -> Message:
    """The file of clusters (CDS)."""
    resources = [clusters[name] for name in sorted(clusters)]
    return {"version_info": digest_of(canonical_json(resources)), "resources": resources}


def _file_source(path: Path) -> Message:
    return {"resource_api_version": "V3", "path_config_source": {"path": str(path)}}


def _without_types(response: Message) -> list[Message]:
    return [
        {key: value for key, value in resource.items() if key != "@type"}
        for resource in response["resources"]
    ]


def _listener(
    environment: Environment,
    host: str,
    port: int,
    access_log: Path | None,
    routes: Message,
    limits: GatewayLimits,
) -> Message:
    prefix = listener_stat_prefix(environment)
    manager: Message = {
        "stat_prefix": prefix,
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
        "always_set_request_id_in_response": True,
        "request_headers_timeout": seconds(limits.request_headers_seconds),
        # There is no request_timeout: a stream of gRPC's requests ends when its client likes.
        "stream_idle_timeout": seconds(max(limits.stream_idle_seconds, limits.call_seconds)),
        "max_request_headers_kb": limits.header_kibibytes,
        "common_http_protocol_options": {
            "idle_timeout": seconds(limits.connection_idle_seconds),
            "max_headers_count": limits.headers,
            # The time-out of an answer begins when the request is there: one that trickles
            # in for ever would never meet it. Streams have none, see `envoy_routes`.
            "max_stream_duration": seconds(limits.call_seconds + limits.upload_seconds),
        },
        "http2_protocol_options": {"max_concurrent_streams": limits.streams_per_connection},
        "local_reply_config": _own_answers(),
        "http_filters": [
            # Only with all of a body can its size be judged before a slot gets any of it.
            _filter(
                "envoy.filters.http.buffer",
                "filters.http.buffer.v3.Buffer",
                {"max_request_bytes": limits.request_bytes},
            ),
            _filter("envoy.filters.http.router", "filters.http.router.v3.Router", {}),
        ],
    }
    if access_log is not None:
        manager["access_log"] = [
            _filter(
                "envoy.access_loggers.file",
                "access_loggers.file.v3.FileAccessLog",
                {
                    "path": str(access_log),
                    "log_format": {"json_format": {"environment": str(environment), **FORMAT}},
                },
            )
        ]
    return {
        "name": str(environment),
        "address": {"socket_address": {"address": host, "port_value": port}},
        # With SO_REUSEPORT an Envoy that was left behind would share the port unseen.
        "enable_reuse_port": False,
        "per_connection_buffer_limit_bytes": CONNECTION_BUFFER_BYTES,
        "filter_chains": [
            {
                "filters": [
                    _filter(
                        "envoy.filters.network.connection_limit",
                        "filters.network.connection_limit.v3.ConnectionLimit",
                        {"stat_prefix": prefix, "max_connections": limits.connections},
                    ),
                    _filter(
                        "envoy.filters.network.http_connection_manager",
                        "filters.network.http_connection_manager.v3.HttpConnectionManager",
                        manager,
                    ),
                ]
            }
        ],
    }


def _own_answers() -> Message:
    """Errors that Envoy answers itself are JSON, as Triton's are.

    A slot that has its fill is told by `x-envoy-overloaded`, which Envoy sets, and
    `retry-after` (RFC 9110, 10.2.3).
    """
    return {
        "mappers": [
            {
                "filter": {"response_flag_filter": {"flags": ["UO"]}},
                "headers_to_add": [{"header": {"key": "retry-after", "value": "1"}}],
                "body_format_override": {"json_format": {"error": OVERLOADED}},
            },
            {
                "filter": {
                    "status_code_filter": {
                        "comparison": {
                            "op": "GE",
                            "value": {"default_value": 400, "runtime_key": "llmops.error"},
                        }
                    }
                },
                "body_format_override": {"json_format": {"error": "%LOCAL_REPLY_BODY%"}},
            },
        ]
    }


def _filter(name: str, message: str, content: Message) -> Message:
    return {"name": name, "typed_config": {"@type": f"{TYPE}.extensions.{message}", **content}}


def _cluster(name: str, target: RouteTarget, traffic: Traffic, limits: GatewayLimits) -> Message:
    protocol = "http2_protocol_options" if traffic.grpc else "http_protocol_options"
    return {
        "@type": CLUSTER_TYPE,
        "name": name,
        "type": "STATIC" if _is_address(target.host) else "STRICT_DNS",
        "connect_timeout": seconds(limits.connect_seconds),
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{TYPE}.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {protocol: {}},
                "common_http_protocol_options": {"idle_timeout": seconds(limits.slot_idle_seconds)},
            }
        },
        "circuit_breakers": {
            "thresholds": [
                {
                    # HTTP/1.1 has one request a connection.
                    "max_connections": limits.concurrent_requests,
                    "max_requests": limits.concurrent_requests,
                    "max_pending_requests": limits.waiting_requests,
                    "max_retries": limits.concurrent_retries,
                }
            ]
        },
        "metadata": {
            "filter_metadata": {
                METADATA: {
                    "release": target.release,
                    "version": target.version,
                    "colour": str(target.colour),
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
                                        "port_value": target.grpc_port
                                        if traffic.grpc
                                        else target.http_port,
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
