"""Envoy's admin interface, read over its Unix socket.

It has `/quitquitquit` and no authentication, so it listens on a socket of mode 0600
and on no port.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from llmops_assets.errors import GatewayError


@dataclass(frozen=True)
class EnvoyStats:
    """Statistics as `/stats?format=json` gives them.

    `values` holds counters, gauges and text readouts by name. `quantiles` holds, by
    histogram and per cent (such as 99.0), the value over the histogram's whole life;
    a histogram nothing was flushed to yet is absent. Histograms of times are in ms.
    """

    values: Mapping[str, int | str]
    quantiles: Mapping[str, Mapping[float, float]]


@dataclass(frozen=True)
class EnvoyAdmin:
    """Client of one Envoy. Every call ends within `timeout_seconds`."""

    socket: Path
    timeout_seconds: float

    def ready(self) -> bool:
        """Whether Envoy accepts traffic. False when it does not answer at all."""
        try:
            return self._send("GET", "/ready", {}).status_code == httpx.codes.OK
        except GatewayError:
            return False

    def stats(self, pattern: str) -> EnvoyStats:
        """Statistics whose name matches a regular expression.

        Raises:
            GatewayError: Envoy does not answer.
        """
        response = self._asked("GET", "/stats", {"format": "json", "filter": pattern})
        values: dict[str, int | str] = {}
        quantiles: dict[str, Mapping[float, float]] = {}
        for entry in response.json()["stats"]:
            if "histograms" in entry:
                quantiles |= _quantiles(entry["histograms"])
            else:
                values[entry["name"]] = entry["value"]
        return EnvoyStats(values, quantiles)

    def config_dump(self, resource: str) -> Sequence[Mapping[str, Any]]:
        """What Envoy uses of one kind of resource, as `/config_dump` gives it.

        Raises:
            GatewayError: Envoy does not answer.
        """
        return self._asked("GET", "/config_dump", {"resource": resource}).json().get("configs", [])

    def reopen_logs(self) -> None:
        """Makes Envoy open its log files anew, after they were renamed.

        Raises:
            GatewayError: Envoy does not answer.
        """
        self._asked("POST", "/reopen_logs", {})

    def stop_accepting(self) -> None:
        """Closes the listeners; connections stay until their request is answered.

        Answers from now on tell clients to connect anew (`connection: close` in HTTP/1.1,
        GOAWAY in HTTP/2), which they cannot. Only a new start of Envoy ends this.

        Raises:
            GatewayError: Envoy does not answer.
        """
        self._asked("POST", "/drain_listeners", {})

    def _asked(self, method: str, path: str, query: Mapping[str, str]) -> httpx.Response:
        """The answer, which must be a 200.

        Raises:
            GatewayError: it is not, or there is none.
        """
        response = self._send(method, path, query)
        if response.status_code != httpx.codes.OK:
            raise GatewayError(
                f"Envoy refused {method} {path}",
                expected=200,
                found=f"{response.status_code} {response.text.strip()}",
                cure="read the gateway's log: `llmops logs envoy`",
            )
        return response

    def _send(self, method: str, path: str, query: Mapping[str, str]) -> httpx.Response:
        # No TLS here; reading the certificate authorities would cost 50 ms a call.
        transport = httpx.HTTPTransport(uds=str(self.socket), verify=False)
        try:
            with httpx.Client(
                transport=transport, base_url="http://envoy", timeout=self.timeout_seconds
            ) as client:
                return client.request(method, path, params=query)
        except httpx.HTTPError as error:
            raise GatewayError(
                "The gateway does not answer",
                expected=f"Envoy's admin interface on {self.socket}",
                found=error,
                cure="run `llmops up`; if it runs, read its log: `llmops logs envoy`",
            ) from error


def _quantiles(histograms: Mapping[str, Any]) -> dict[str, Mapping[float, float]]:
    """By histogram; the list of quantiles is given once, the values per histogram."""
    supported = histograms.get("supported_quantiles", [])
    return {
        computed["name"]: {
            float(quantile): float(value["cumulative"])
            for quantile, value in zip(supported, computed["values"], strict=True)
            if value["cumulative"] is not None
        }
        for computed in histograms.get("computed_quantiles", [])
    }
