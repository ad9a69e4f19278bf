"""Reading Alertmanager: what counts as firing, and answers that cannot be used."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from llmops_assets.errors import TriggerError
from llmops_assets.operate import alertmanager
from llmops_assets.operate.alertmanager import LONGEST_SUMMARY, Alert, active_alerts

from ..fakes import HttpDouble

BEGAN = datetime(2026, 3, 1, 12, tzinfo=UTC)


def entry(fingerprint: str = "f00d", state: str = "active", **changes: Any) -> dict[str, Any]:
    """One alert as `GET /api/v2/alerts` gives it."""
    return {
        "labels": {"alertname": "ErrorRate", "model": "parrot"},
        "annotations": {"summary": "half of the answers fail"},
        "fingerprint": fingerprint,
        "startsAt": BEGAN.isoformat(),
        "updatedAt": BEGAN.isoformat(),
        "endsAt": BEGAN.isoformat(),
        "generatorURL": "",
        "receivers": [{"name": "llmops"}],
        "status": {"state": state, "silencedBy": [], "inhibitedBy": []},
        **changes,
    }


class Answers:
    """What the double of Alertmanager says."""

    def __init__(self) -> None:
        self.status = 200
        self.body: Any = []


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def server(answers: Answers) -> Iterator[HttpDouble]:
    with HttpDouble(lambda path, body: (answers.status, answers.body)) as double:
        yield double


def test_only_what_fires_is_asked_for(server: HttpDouble, answers: Answers) -> None:
    """Alertmanager leaves out what it was told to leave out, and we say so in its own words."""
    answers.body = [entry()]
    (alert,) = active_alerts(server.url + "/", 5).alerts
    assert alert.summary == "ErrorRate: half of the answers fail"
    ((path, _, _),) = server.requests
    assert path.startswith("/api/v2/alerts?")
    for word in ("active=true", "silenced=false", "inhibited=false", "unprocessed=false"):
        assert word in path


@pytest.mark.parametrize(
    "status",
    [
        {"state": "suppressed", "silencedBy": ["1"], "inhibitedBy": []},
        {"state": "active", "silencedBy": ["1"], "inhibitedBy": []},
        {"state": "active", "silencedBy": [], "inhibitedBy": ["2"]},
        {"state": "unprocessed", "silencedBy": [], "inhibitedBy": []},
    ],
)
def test_silenced_and_inhibited_alerts_are_left_out_again(
    server: HttpDouble, answers: Answers, status: dict[str, Any]
) -> None:
    """A proxy that drops the query must not cause a rollback that somebody silenced."""
    answers.body = [entry("a", status=status), entry("b")]
    assert [alert.fingerprint for alert in active_alerts(server.url, 5).alerts] == ["b"]


@pytest.mark.parametrize(
    "broken",
    [
        None,
        7,
        {},
        entry(startsAt="yesterday"),
        entry(startsAt="2026-03-01T12:00:00"),
        entry(labels=["model"]),
        entry(fingerprint=""),
    ],
)
def test_malformed_alert_beside_good_ones(
    server: HttpDouble, answers: Answers, broken: Any
) -> None:
    """One that nobody can read must not hide the others, nor be forgotten."""
    answers.body = [entry("a"), broken, entry("b")]
    reading = active_alerts(server.url, 5)
    assert [alert.fingerprint for alert in reading.alerts] == ["a", "b"]
    assert len(reading.problems) == 1


@pytest.mark.parametrize("body", [{"alerts": []}, "no JSON", "null", '[{"fingerprint"'])
def test_answer_that_is_no_list_is_an_outage(
    server: HttpDouble, answers: Answers, body: Any
) -> None:
    """An empty list would close every open incident."""
    answers.body = body
    with pytest.raises(TriggerError, match="does not say what fires"):
        active_alerts(server.url, 5)


@pytest.mark.parametrize("status", [302, 404, 500, 503])
def test_refusal_is_an_outage(server: HttpDouble, answers: Answers, status: int) -> None:
    """Also from a proxy in front of it."""
    answers.status = status
    with pytest.raises(TriggerError, match=str(status)):
        active_alerts(server.url, 5)


def test_nobody_there_is_an_outage(server: HttpDouble) -> None:
    """The message says where it was looked for, and that nothing is lost."""
    server.close()
    with pytest.raises(TriggerError, match=r"LLMOPS_ALERTMANAGER_URL .* still is acted on") as e:
        active_alerts(server.url, 5)
    assert server.url in str(e.value)


@pytest.mark.parametrize("url", ["localhost:9093", "http://[::1", "http://a:b", ""])
def test_what_is_no_url_is_explained(url: str) -> None:
    """A setting that somebody mistyped is shown as one."""
    with pytest.raises(TriggerError, match="LLMOPS_ALERTMANAGER_URL"):
        active_alerts(url, 5)


def test_huge_answer_is_not_read_to_its_end(
    server: HttpDouble, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of the code server is everybody's."""
    answers.body = [entry(str(number)) for number in range(100)]
    assert len(active_alerts(server.url, 5).alerts) == 100
    monkeypatch.setattr(alertmanager, "LARGEST_ANSWER", 1000)
    with pytest.raises(TriggerError, match="more than 1000 bytes"):
        active_alerts(server.url, 5)


def test_answer_that_never_ends_is_given_up() -> None:
    """Each byte may be in time, and the tick would still last for ever."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            try:
                for _ in range(40):
                    self.wfile.write(b"[")
                    time.sleep(0.05)
            except OSError:
                """Whoever asked has gone."""

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Tests are quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        with pytest.raises(TriggerError, match=r"no end of the answer within 0\.3 s"):
            active_alerts(f"http://127.0.0.1:{server.server_address[1]}", 0.3)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def test_password_in_the_url_is_used_and_not_shown(server: HttpDouble, answers: Answers) -> None:
    """What a failed tick says is on a page that everybody reads."""
    url = server.url.replace("http://", "http://ada:s3cret@")
    active_alerts(url, 5)
    ((_, _, headers),) = server.requests
    assert headers["Authorization"] == "Basic " + base64.b64encode(b"ada:s3cret").decode()
    answers.status = 500
    with pytest.raises(TriggerError) as caught:
        active_alerts(url, 5)
    assert "s3cret" not in str(caught.value)


def test_id_is_of_the_moment_and_not_of_its_spelling() -> None:
    """Two Alertmanagers in different time zones must not make an alert act twice."""
    spellings = ("2026-03-01T12:00:00Z", "2026-03-01T13:00:00.000+01:00", BEGAN.isoformat())
    ids = {Alert.model_validate(entry(startsAt=text)).id for text in spellings}
    assert len(ids) == 1
    later = Alert.model_validate(entry(startsAt="2026-03-01T12:00:00.001Z"))
    assert later.id not in ids


def test_summary_is_bounded() -> None:
    """It becomes a tag of a run and the reason of a route."""
    long = Alert.model_validate(entry(annotations={"summary": json.dumps("ab \n" * 10_000)}))
    assert len(long.summary) <= LONGEST_SUMMARY
    assert "\n" not in long.summary
    bare = Alert.model_validate(entry(annotations={}, labels={}))
    assert bare.summary == "an alert"
