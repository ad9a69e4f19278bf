"""The receiver of MLflow's registry webhooks: it only wakes the sensor `registry` earlier.

It holds no state and believes nothing that a webhook says: the sensor asks the registry
itself. `python -m llmops_assets.triggers.webhooks HOST PORT`, with `LLMOPS_WEBHOOK_SECRET`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from llmops_assets.errors import SettingsError
from llmops_assets.settings import get_settings
from llmops_assets.triggers.registry_watch import wake_file

MLFLOW_PATH = "/webhooks/mlflow"
HEALTH_PATH = "/health"
MAX_BODY_BYTES = 64 * 1024
MAX_AGE_SECONDS = 300
BODY_TIMEOUT_SECONDS = 5.0
BURST = 60
REQUESTS_PER_SECOND = 10.0
MAX_CONNECTIONS = 64

_log = logging.getLogger(__name__)


class TokenBucket:
    """Lets through a burst, and then so many requests a second."""

    def __init__(
        self, burst: int, per_second: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst = burst
        self._per_second = per_second
        self._clock = clock
        self._tokens = float(burst)
        self._filled = clock()

    def take(self) -> float:
        """Takes a token and returns 0, or returns the seconds until there is one."""
        now = self._clock()
        gained = (now - self._filled) * self._per_second
        self._tokens = min(float(self._burst), self._tokens + gained)
        self._filled = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._per_second


def application(
    secret: str,
    wake: Path,
    clock: Callable[[], float] = time.time,
    bucket: TokenBucket | None = None,
) -> Starlette:
    """The receiver as an ASGI application.

    Args:
        secret: what the registry signs with.
        wake: the file that a webhook changes.
        clock: seconds since the epoch.
        bucket: limits how often somebody may call, signed or not.
    """
    limit = bucket or TokenBucket(BURST, REQUESTS_PER_SECOND)

    async def receive(request: Request) -> Response:
        if (seconds := limit.take()) > 0:
            raise HTTPException(429, headers={"Retry-After": str(math.ceil(seconds))})
        media_type = request.headers.get("Content-Type", "").partition(";")[0].strip()
        if media_type.lower() != "application/json":
            raise HTTPException(415)
        body = await _bounded_body(request)
        if (refusal := refusal_of(secret, request.headers, body, clock())) is not None:
            # Not what was sent: anybody can write into the log that way.
            _log.warning("refused a webhook from %s: %s", _sender(request), refusal)
            raise HTTPException(401)
        delivery = request.headers["X-MLflow-Delivery-Id"]
        # Of the delivery, so that one that comes again changes nothing.
        _replace(wake, hashlib.sha256(delivery.encode("latin-1")).hexdigest())
        return Response(status_code=202)

    async def health(request: Request) -> Response:
        return PlainTextResponse("OK")

    return Starlette(
        routes=[
            Route(MLFLOW_PATH, receive, methods=["POST"]),
            Route(HEALTH_PATH, health, methods=["GET"]),
        ]
    )


def refusal_of(secret: str, headers: Headers, body: bytes, now: float) -> str | None:
    """Why a webhook is not to be believed; None when the registry sent it, and just now.

    Args:
        secret: what the registry signs with.
        headers: `X-MLflow-Signature`, `-Timestamp` and `-Delivery-Id`.
        body: as it came.
        now: seconds since the epoch.
    """
    delivery = headers.get("X-MLflow-Delivery-Id", "")
    timestamp = headers.get("X-MLflow-Timestamp", "")
    given = headers.get("X-MLflow-Signature", "")
    if not (delivery and timestamp and given):
        return "it is not signed"
    # Starlette decodes headers as Latin-1; these are the bytes that came.
    signed = f"{delivery}.{timestamp}.".encode("latin-1") + body
    signature = base64.b64encode(hmac.digest(secret.encode(), signed, "sha256"))
    if not hmac.compare_digest(b"v1," + signature, given.encode("latin-1")):
        return "its signature is not ours"
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= 12):
        return "its time is no number"
    if abs(now - int(timestamp)) > MAX_AGE_SECONDS:
        return f"it was signed more than {MAX_AGE_SECONDS} s from now"
    return None


async def _bounded_body(request: Request) -> bytes:
    """The body, of which no more is read than it may have."""
    declared = request.headers.get("Content-Length", "")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise HTTPException(413)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise HTTPException(413)
    except TimeoutError as error:
        raise HTTPException(408) from error
    except ClientDisconnect as error:
        raise HTTPException(400) from error
    return bytes(body)


def _sender(request: Request) -> str:
    return "an unknown address" if request.client is None else request.client.host


def _replace(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(file.name + ".new")
    beside.write_text(content + "\n", encoding="ascii")
    beside.replace(file)


def main(host: str, port: int) -> None:
    """Serves until it is told to end.

    Raises:
        SettingsError: there is no secret to verify webhooks with.
    """
    settings = get_settings()
    if settings.webhook_secret is None:
        raise SettingsError(
            "The receiver of webhooks has no secret to verify them with",
            expected="LLMOPS_WEBHOOK_SECRET with at least 16 characters",
            cure="set it to what MLflow signs with, such as the output of `openssl rand -hex 32`",
        )
    uvicorn.run(
        application(settings.webhook_secret.get_secret_value(), wake_file(settings)),
        host=host,
        port=port,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
