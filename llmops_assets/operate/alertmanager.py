"""Alerts, as Prometheus' Alertmanager has them now.

Source: Alertmanager's OpenAPI description of `GET /api/v2/alerts`.
"""

from __future__ import annotations

import json
import textwrap
import time
from dataclasses import dataclass
from datetime import UTC

import httpx
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from llmops_assets.errors import TriggerError

LARGEST_ANSWER = 8 * 1024 * 1024
"""Bytes; some ten thousand alerts. More is no list of what a person should look at."""
LONGEST_SUMMARY = 300


class AlertStatus(BaseModel):
    """What Alertmanager makes of an alert."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    state: str
    silenced_by: tuple[str, ...] = Field(default=(), alias="silencedBy")
    inhibited_by: tuple[str, ...] = Field(default=(), alias="inhibitedBy")


class Alert(BaseModel):
    """An alert that fires."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    fingerprint: str = Field(min_length=1, max_length=128)
    starts_at: AwareDatetime = Field(alias="startsAt")
    labels: dict[str, str]
    annotations: dict[str, str] = {}
    status: AlertStatus

    @property
    def id(self) -> str:
        """The same for as long as it fires: its labels' fingerprint, and when it began."""
        return f"{self.fingerprint}@{self.starts_at.astimezone(UTC).isoformat()}"

    @property
    def acts(self) -> bool:
        """Whether nobody has silenced it, and no other alert explains it."""
        status = self.status
        return status.state == "active" and not status.silenced_by and not status.inhibited_by

    @property
    def summary(self) -> str:
        """What it says to people."""
        name = self.labels.get("alertname", "an alert")
        said = self.annotations.get("summary") or self.annotations.get("description")
        text = f"{name}: {said}" if said else name
        return textwrap.shorten(text, LONGEST_SUMMARY, placeholder=" …")


@dataclass(frozen=True)
class Reading:
    """What a source of alerts said. `problems` are what of it cannot be understood."""

    alerts: tuple[Alert, ...]
    problems: tuple[str, ...] = ()


def active_alerts(url: str, timeout_seconds: float) -> Reading:
    """Everything that fires, silenced and inhibited alerts left out.

    Args:
        url: of Alertmanager, with its path prefix if it has one.
        timeout_seconds: of connecting, of every wait for more bytes, and of the whole answer.

    Raises:
        TriggerError: it does not answer, or not with a list of alerts.
    """
    wanted = {"active": "true", "silenced": "false", "inhibited": "false", "unprocessed": "false"}
    place, auth = _place(url)
    try:
        with httpx.stream(
            "GET", f"{place}/api/v2/alerts", params=wanted, auth=auth, timeout=timeout_seconds
        ) as response:
            response.raise_for_status()
            content = _bounded(response, timeout_seconds)
        listed = json.loads(content)
        if not isinstance(listed, list):
            raise ValueError(f"a {type(listed).__name__} and no list")
    except (httpx.HTTPError, ValueError) as error:
        raise TriggerError(
            f"Alertmanager at {place} does not say what fires",
            expected="a list of alerts from /api/v2/alerts",
            found=repr(error),
            cure="check that it runs and that LLMOPS_ALERTMANAGER_URL leads to it; what fires "
            "then still is acted on",
        ) from error
    alerts: list[Alert] = []
    problems: list[str] = []
    for entry in listed:
        try:
            alerts.append(Alert.model_validate(entry))
        except ValidationError as error:
            problems.append(f"an alert cannot be understood: {error}")
    return Reading(tuple(alert for alert in alerts if alert.acts), tuple(problems))


def _place(url: str) -> tuple[str, tuple[str, str] | None]:
    """The URL without user and password, which messages must not show, and those two."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise TriggerError(
            "LLMOPS_ALERTMANAGER_URL is no URL",
            expected="such as http://alertmanager:9093",
            found=error,
            cure="correct it and restart Dagster's code server",
        ) from error
    auth = (parsed.username, parsed.password) if parsed.userinfo else None
    return str(parsed.copy_with(userinfo=b"")).rstrip("/"), auth


def _bounded(response: httpx.Response, seconds: float) -> bytes:
    """The body.

    Raises:
        ValueError: it is too large, or takes too long.
    """
    deadline = time.monotonic() + seconds
    content = bytearray()
    for piece in response.iter_bytes():
        content += piece
        if len(content) > LARGEST_ANSWER:
            raise ValueError(f"more than {LARGEST_ANSWER} bytes")
        if time.monotonic() > deadline:
            raise ValueError(f"no end of the answer within {seconds:g} s")
    return bytes(content)
