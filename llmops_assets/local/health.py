"""Asking each server itself whether it works, over its own interface."""

from __future__ import annotations

import httpx

TIMEOUT_SECONDS = 5.0

DAEMON_QUERY = """{ instance { daemonHealth { allDaemonStatuses {
    daemonType required healthy lastHeartbeatTime } } } }"""


def http_answers(url: str) -> bool:
    """Whether a GET of `url` gives 200."""
    try:
        return httpx.get(url, timeout=TIMEOUT_SECONDS).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def code_server_answers(host: str, port: int) -> bool:
    """Whether Dagster's code server has loaded the definitions (gRPC health protocol)."""
    # gRPC takes long to import; only this question needs it.
    import grpc
    from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )
        try:
            answer = check(HealthCheckRequest(service="DagsterApi"), timeout=TIMEOUT_SECONDS)
        except grpc.RpcError:
            return False
    return answer.status == HealthCheckResponse.SERVING


def daemons_report(dagster_url: str, since: float) -> bool:
    """Whether all of Dagster's daemons sent a heartbeat after `since` (seconds since the epoch).

    The web server is asked, as the daemon has no interface of its own. It calls a daemon
    healthy up to five minutes after its last sign of life, hence `since`.
    """
    try:
        response = httpx.post(
            f"{dagster_url}/graphql", json={"query": DAEMON_QUERY}, timeout=TIMEOUT_SECONDS
        )
    except httpx.TransportError:
        return False
    if response.status_code != httpx.codes.OK:
        return False
    statuses = response.json()["data"]["instance"]["daemonHealth"]["allDaemonStatuses"]
    required = [status for status in statuses if status["required"]]
    return bool(required) and all(
        status["healthy"] and (status["lastHeartbeatTime"] or 0) >= since for status in required
    )
