"""A real Prometheus and Alertmanager, as Debian packages them, on a metric that a test sets."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import free_port
from .fakes import HttpDouble
from .waiting import wait_for

PROGRAMS = ("prometheus", "prometheus-alertmanager", "amtool")
START_SECONDS = 30
END_SECONDS = 10

needs_prometheus = pytest.mark.skipif(
    not all(shutil.which(program) for program in PROGRAMS),
    reason="needs Debian's packages prometheus and prometheus-alertmanager",
)


class Server:
    """A server process that can be killed and started again on what it stored."""

    def __init__(self, command: list[str], url: str, folder: Path) -> None:
        self.url = url
        self._command = command
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        wait_for(lambda: self._ready(), f"{self._command[0]} to be ready", START_SECONDS)

    def kill(self) -> None:
        """As a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(END_SECONDS)
            self._process = None

    def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=2).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


class Monitoring:
    """Both servers, and the metrics that they watch.

    `errors` is, by model, what the metric `error_rate` says; the rule ErrorRate fires for a
    model above 0.5, and Busy while it is above 0. An alert GatewayDown, of which the metric
    is `gateway_down`, inhibits all others.
    """

    def __init__(self, folder: Path) -> None:
        self.errors: dict[str, float] = {}
        self.gateway_down = 0
        self._metrics = HttpDouble(lambda path, body: (200, self._text()))
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        self.alertmanager = Server(
            [
                "prometheus-alertmanager",
                f"--config.file={_write(folder / 'alertmanager.yml', _alertmanager())}",
                f"--storage.path={folder / 'alertmanager' / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--cluster.listen-address=",  # or it opens a port for gossip
            ],
            url,
            folder / "alertmanager",
        )
        _write(folder / "rules.yml", _rules())
        configuration = _prometheus(self._metrics.port, port)
        prometheus_port = free_port()
        self.prometheus = Server(
            [
                "prometheus",
                f"--config.file={_write(folder / 'prometheus.yml', configuration)}",
                f"--storage.tsdb.path={folder / 'prometheus' / 'data'}",
                f"--web.listen-address=127.0.0.1:{prometheus_port}",
                "--rules.alert.resend-delay=1s",
            ],
            f"http://127.0.0.1:{prometheus_port}",
            folder / "prometheus",
        )

    def names(self) -> set[str]:
        """Alerts that Alertmanager calls active now."""
        listed = httpx.get(
            f"{self.alertmanager.url}/api/v2/alerts?silenced=false&inhibited=false", timeout=5
        )
        return {alert["labels"]["alertname"] for alert in listed.json()}

    def silence(self, matcher: str) -> str:
        """Silences what matches, as an SRE does. Returns the silence's id."""
        return self._amtool(
            "silence", "add", matcher, "--duration=1h", "--comment=test", "--author=sre"
        )

    def expire(self, silence: str) -> None:
        self._amtool("silence", "expire", silence)

    def post(self, labels: Mapping[str, str], began: datetime) -> None:
        """An alert from another source than Prometheus, which ends in an hour."""
        alert = {
            "labels": dict(labels),
            "startsAt": began.isoformat(),
            "endsAt": (datetime.now(UTC) + timedelta(hours=1)).isoformat(),
        }
        httpx.post(
            f"{self.alertmanager.url}/api/v2/alerts", json=[alert], timeout=5
        ).raise_for_status()

    def close(self) -> None:
        self.prometheus.kill()
        self.alertmanager.kill()
        self._metrics.close()

    def _amtool(self, *words: str) -> str:
        command = ["amtool", f"--alertmanager.url={self.alertmanager.url}", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    def _text(self) -> str:
        lines = [f'error_rate{{model="{model}"}} {rate}' for model, rate in self.errors.items()]
        return "\n".join([*lines, f"gateway_down {self.gateway_down}", ""])


@contextmanager
def monitoring(folder: Path) -> Iterator[Monitoring]:
    """Both servers, ended at the end."""
    servers = Monitoring(folder)
    try:
        servers.alertmanager.start()
        servers.prometheus.start()
        yield servers
    finally:
        servers.close()


def _write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def _alertmanager() -> Any:
    return {
        "route": {
            "receiver": "nobody",
            "group_by": ["model"],
            "group_wait": "1s",
            "group_interval": "1s",
        },
        "receivers": [{"name": "nobody"}],
        "inhibit_rules": [
            {"source_matchers": ["alertname = GatewayDown"], "target_matchers": ["model != ''"]}
        ],
    }


def _rules() -> Any:
    labels = {"environment": "production", "severity": "page"}
    rules = [
        {
            "alert": "ErrorRate",
            "expr": "error_rate > 0.5",
            "for": "1s",
            "labels": labels,
            "annotations": {"summary": "{{ $value }} of the answers of {{ $labels.model }} fail"},
        },
        {"alert": "Busy", "expr": "error_rate > 0 and error_rate < 0.5", "labels": labels},
        {"alert": "GatewayDown", "expr": "gateway_down > 0"},
    ]
    return {"groups": [{"name": "models", "interval": "1s", "rules": rules}]}


def _prometheus(metrics: int, alertmanager: int) -> Any:
    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [
            {"job_name": "m", "static_configs": [{"targets": [f"127.0.0.1:{metrics}"]}]}
        ],
        "alerting": {
            "alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}]
        },
    }
