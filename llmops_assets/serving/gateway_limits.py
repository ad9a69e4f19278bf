"""What the gateway grants a client and a slot: times, sizes and numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GatewayLimits:
    """Bounds of one gateway; those of connections hold for each environment by itself.

    Envoy has defaults for some, which are meant for meshes (15 s a request, streams
    included) or are no bound at all. None of them is left to it.
    """

    connect_seconds: float = 2.0
    """Until a slot takes a connection."""
    call_seconds: float = 120.0
    """From the end of a request to the end of its answer; not for streams."""
    question_seconds: float = 10.0
    """The same, for readiness, metadata and config."""
    upload_seconds: float = 60.0
    """For sending a request, beside the time of its answer; not for streams."""
    stream_idle_seconds: float = 120.0
    """Between two pieces of a stream. How long it runs as a whole has no limit."""
    request_headers_seconds: float = 10.0
    """From a request's first byte to the end of its headers."""
    connection_idle_seconds: float = 300.0
    """Of a client's connection without a request."""
    slot_idle_seconds: float = 60.0
    """Of a connection to a slot without a request."""
    connections: int = 1024
    """Of clients; one more is closed at once."""
    streams_per_connection: int = 100
    """Requests at once on one connection of HTTP/2 (RFC 9113, 5.1.2)."""
    request_bytes: int = 8 * 2**20
    """Of a body; more is answered with 413. Streams of gRPC have no end to measure."""
    header_kibibytes: int = 32
    """Of all headers and the path together; more is answered with 431."""
    headers: int = 100
    concurrent_requests: int = 256
    """That a slot works on, by protocol."""
    waiting_requests: int = 256
    """That wait for a connection to a slot; one more is answered with 503."""
    retries: int = 1
    """Of a request that no slot has seen a byte of."""
    concurrent_retries: int = 16
    """To a slot; when it is gone, its requests fail at once rather than twice."""
