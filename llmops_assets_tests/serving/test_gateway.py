"""The gateway against a real Envoy: what passes, what does not, and how routes move."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from llmops_assets.errors import GatewayError
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Colour, Environment

from .envoy_rig import TOKEN, Rig, Upstream, http2_request, raw_request, rig, upstream

PRODUCTION, STAGING = Environment.PRODUCTION, Environment.STAGING

ALLOWED = [
    ("POST", "/v2/models/m/infer"),
    ("POST", "/v2/models/m/generate"),
    ("POST", "/v2/models/m/generate_stream"),
    ("GET", "/v2/models/m"),
    ("GET", "/v2/models/m/ready"),
    ("GET", "/v2/models/m/config"),
    ("POST", "/v2/models/m/versions/1/infer"),
    ("POST", "/v2/models/m/versions/1/generate"),
    ("POST", "/v2/models/m/versions/1/generate_stream"),
    ("GET", "/v2/models/m/versions/1"),
    ("GET", "/v2/models/m/versions/1/ready"),
    ("GET", "/v2/models/m/versions/1/config"),
]

ATTACKS = [
    b"POST /v2/repository/index HTTP/1.1",
    b"POST /v2/repository/models/m/load HTTP/1.1",
    b"POST /v2/repository/models/m/unload HTTP/1.1",
    b"POST /v2/models/m/../../repository/models/m/load HTTP/1.1",
    b"POST /v2/models/m/infer/../../../repository/models/m/load HTTP/1.1",
    b"POST /v2/models/m/%2e%2e/%2e%2e/repository/models/m/load HTTP/1.1",
    b"POST /v2/models/m/%2E%2E/%2e./repository/index HTTP/1.1",
    b"POST /v2/models/m%2F..%2F..%2Frepository%2Findex HTTP/1.1",
    b"POST /v2/models/m/infer%2f..%2f..%2f..%2frepository%2findex HTTP/1.1",
    b"POST /v2/models/m/infer%5c..%5c..%5c..%5crepository HTTP/1.1",
    b"POST /v2/models/m/%252e%252e/%252e%252e/repository/index HTTP/1.1",
    b"POST /v2/models/m\\..\\..\\repository\\index HTTP/1.1",
    b"POST //v2//repository//index HTTP/1.1",
    b"POST /v2/models//m/../../repository/index HTTP/1.1",
    b"POST /v2/models/m/infer;/../../../repository/index HTTP/1.1",
    b"POST /v2/models/m;x=1/infer HTTP/1.1",
    b"POST /v2/models/m/infer;x HTTP/1.1",
    b"POST /v2/models/m/infer/ HTTP/1.1",
    b"POST /v2/models/m/infer%00 HTTP/1.1",
    b"POST /v2/models/m/infer#/../../repository/index HTTP/1.1",
    b"POST /V2/models/m/infer HTTP/1.1",
    b"POST http://attacker/v2/repository/index HTTP/1.1",
    b"POST http://attacker/v2/models/m/../../repository/index HTTP/1.1",
    b"POST /v2/models/other/infer HTTP/1.1",
    b"POST /v2/models/mm/infer HTTP/1.1",
    b"POST /v2/models/m/versions/2/infer HTTP/1.1",
    b"POST /v2/models/m/versions/01/infer HTTP/1.1",
    b"POST /v2/models/m/versions/1/infer/ HTTP/1.1",
    b"POST /v2/models/m/versions/1/../../../../repository/index HTTP/1.1",
    b"POST /v2/models/m/versions/1%2f..%2f..%2f..%2f..%2frepository%2findex HTTP/1.1",
    b"GET /v2/models/m/versions/1/stats HTTP/1.1",
    b"POST /v2/models/m/versions/1/trace/setting HTTP/1.1",
    b"POST /v2/models/m/versions HTTP/1.1",
    b"POST /v2/models/m/infer/ HTTP/1.1",
    b"POST /v2/models/m/INFER HTTP/1.1",
    b"POST /v2/models/M/infer HTTP/1.1",
    b"POST /V2/REPOSITORY/INDEX HTTP/1.1",
    b"POST /v2/repository/index/ HTTP/1.1",
    b"POST /v2/repository/index;/v2/models/m/infer HTTP/1.1",
    b"POST /v2/repository/index?/v2/models/m/infer HTTP/1.1",
    b"POST /v2/%72epository/index HTTP/1.1",
    b"POST /v2/models/m/.%00./repository/index HTTP/1.1",
    b"POST /v2/models/m/..;/..;/repository/index HTTP/1.1",
    b"POST /v2/models/m/%c0%ae%c0%ae/%c0%ae%c0%ae/repository/index HTTP/1.1",
    b"GET /v2/models/m/stats HTTP/1.1",
    b"GET /v2/models/stats HTTP/1.1",
    b"POST /v2/models/m/trace/setting HTTP/1.1",
    b"POST /v2/systemsharedmemory/register HTTP/1.1",
    b"POST /v2/logging HTTP/1.1",
    b"POST /inference.GRPCInferenceService/RepositoryModelLoad HTTP/1.1",
    b"POST /inference.GRPCInferenceService/ModelInfer HTTP/1.1\r\nllmops-model: m",
    b"GET /metrics HTTP/1.1",
    b"GET /v2 HTTP/1.1",
    b"GET / HTTP/1.1",
    b"OPTIONS * HTTP/1.1",
    b"CONNECT /v2/repository/index HTTP/1.1",
    b"CONNECT 127.0.0.1:80 HTTP/1.1",
    b"TRACE /v2/models/m HTTP/1.1",
    b"DELETE /v2/models/m HTTP/1.1",
    b"PUT /v2/models/m/config HTTP/1.1",
    b"GET /v2/models/m/infer HTTP/1.1",
    b"POST /v2/models/m/config HTTP/1.1",
    b"post /v2/models/m/infer HTTP/1.1",
    b"GET /v2/models/m/infer HTTP/1.1\r\nX-HTTP-Method-Override: POST",
    b"GET /v2/models/m/ready HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket",
    b"POST /v2/repository/index HTTP/1.1\r\nX-Envoy-Original-Path: /v2/models/m/infer",
]


@pytest.fixture(scope="module")
def blue() -> Iterator[Upstream]:
    with upstream("blue") as server:
        yield server


@pytest.fixture(scope="module")
def green() -> Iterator[Upstream]:
    with upstream("green") as server:
        yield server


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, blue: Upstream) -> Iterator[Rig]:
    """Model `m` on version 1, for tests that move no route of it."""
    with rig(tmp_path_factory.mktemp("serving")) as built:
        built.serve("m", blue.target(Colour.BLUE))
        yield built


@pytest.mark.parametrize(("method", "path"), ALLOWED)
def test_listed_calls_reach_the_model(serving: Rig, blue: Upstream, method: str, path: str) -> None:
    """Clients need these; the answer says what gave it, whatever the model claims itself."""
    answer = serving.request(method, path)
    assert answer.status_code == 200
    assert blue.seen[-1] == (method, path)
    assert answer.headers["x-llmops-release"] == "model.v1"
    assert answer.headers["x-llmops-version"] == "1"
    assert answer.headers["x-llmops-generation"] == "1"


@pytest.mark.timeout(30)
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_else_reaches_triton(serving: Rig, blue: Upstream, attack: bytes) -> None:
    """Triton's management API has no authentication: the gateway is what keeps it in."""
    before = len(blue.seen)
    request = attack + b"\r\nHost: gateway\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    answer = raw_request(serving.ports[PRODUCTION], request)
    assert blue.seen[before:] == []
    assert not answer.startswith(b"HTTP/1.1 2"), answer


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4",
        b"Transfer-Encoding: xchunked\r\nContent-Length: 5",
        b"Transfer-Encoding : chunked",
        b"Content-Length: 5\r\nContent-Length: 90",
    ],
)
def test_no_request_is_smuggled_in_the_body_of_another(
    serving: Rig, blue: Upstream, framing: bytes
) -> None:
    """If Envoy and Triton disagreed where a body ends, its rest would be a request."""
    before = len(blue.seen)
    raw_request(
        serving.ports[PRODUCTION],
        b"POST /v2/models/m/infer HTTP/1.1\r\nHost: gateway\r\n" + framing + b"\r\n\r\n"
        b"0\r\n\r\nPOST /v2/repository/index HTTP/1.1\r\nHost: gateway\r\n"
        b"Content-Length: 0\r\nConnection: close\r\n\r\n",
    )
    assert set(blue.seen[before:]) <= {("POST", "/v2/models/m/infer")}


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ("/v2/repository/..//models/./m/x/../ready", "/v2/models/m/ready"),
        ("/v2/models/%6d/%72eady", "/v2/models/m/ready"),
        ("/v2/models/m/versions/%31/ready", "/v2/models/m/versions/1/ready"),
        ("http://attacker/v2/models/m/ready", "/v2/models/m/ready"),
    ],
)
def test_triton_sees_the_path_that_was_judged(
    serving: Rig, blue: Upstream, sent: str, seen: str
) -> None:
    """Were another one passed on, Triton could read it as a call that the gateway never saw."""
    raw_request(
        serving.ports[PRODUCTION],
        f"GET {sent} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n".encode(),
    )
    assert blue.seen[-1] == ("GET", seen)


def _http2(method: bytes, path: bytes, *more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    return [
        (b":method", method),
        (b":scheme", b"http"),
        (b":authority", b"gateway"),
        (b":path", path),
        *more,
    ]


def test_listed_calls_pass_by_http2(serving: Rig, blue: Upstream) -> None:
    """The attacks below prove nothing if HTTP/2 never reached the model."""
    before = len(blue.seen)
    http2_request(serving.ports[PRODUCTION], _http2(b"POST", b"/v2/models/m/infer"), b"{}")
    assert blue.seen[before:] == [("POST", "/v2/models/m/infer")]


@pytest.mark.parametrize(
    "headers",
    [
        *(
            _http2(method, path)
            for attack in ATTACKS
            if b"\r\n" not in attack  # with headers of HTTP/1.1
            for method, path in (attack.partition(b" HTTP/1.1")[0].split(b" ", 1),)
        ),
        # What only HTTP/2 can say: extended CONNECT (RFC 8441), odd pseudo-headers.
        _http2(b"CONNECT", b"/v2/repository/index", (b":protocol", b"websocket")),
        [(b":method", b"CONNECT"), (b":authority", b"127.0.0.1:80")],
        _http2(b"POST", b"/v2/models/m/infer", (b":path", b"/v2/repository/index")),
        _http2(b"POST", b"/v2/models/m/infer HTTP/1.1\r\nx: y"),
        _http2(b"POST", b"/v2/models/m/infer", (b"transfer-encoding", b"chunked")),
        _http2(b"POST", b"/v2/models/m/infer", (b"connection", b"upgrade")),
        _http2(b"POST", b"", (b"x", b"y")),
        _http2(b"GET", b"/v2/models/m/infer", (b"x-http-method-override", b"POST")),
    ],
    ids=lambda headers: b" ".join(value for _, value in headers).decode(),
)
def test_nothing_else_reaches_triton_by_http2(
    serving: Rig, blue: Upstream, headers: list[tuple[bytes, bytes]]
) -> None:
    """gRPC needs HTTP/2, so every disguise may come in binary frames as well."""
    before = len(blue.seen)
    http2_request(serving.ports[PRODUCTION], headers, b"{}")
    assert blue.seen[before:] == []


def test_version_is_pinned_by_its_path(serving: Rig, blue: Upstream, green: Upstream) -> None:
    """A client that compares versions asks one of them, also one without a share."""
    serving.serve(
        "pin",
        blue.target(Colour.BLUE, weight=100, version=3),
        green.target(Colour.GREEN, weight=0, version=4),
    )
    for version, name in ((3, "blue"), (4, "green")):
        for _ in range(5):
            answer = serving.request("POST", f"/v2/models/pin/versions/{version}/infer")
            assert answer.json() == {"answered_by": name}
            assert answer.headers["x-llmops-version"] == str(version)
    assert green.seen[-1] == ("POST", "/v2/models/pin/versions/4/infer")
    missing = serving.request("POST", "/v2/models/pin/versions/5/infer")
    assert missing.status_code == 404
    assert missing.json()["error"].endswith("loaded: 3, 4")
    serving.serve("pin", green.target(Colour.GREEN, weight=100, version=4))
    assert serving.request("POST", "/v2/models/pin/versions/3/infer").status_code == 404


def test_refusals_say_what_is_allowed(serving: Rig) -> None:
    """A person who gets a refusal should learn from it what to do."""
    refused = serving.request("POST", "/v2/repository/index")
    assert refused.status_code == 403
    assert "/v2/models/MODEL" in refused.json()["error"]
    unlisted = serving.request("GET", "/v2/models/m/stats")
    assert unlisted.status_code == 403
    assert "POST infer, POST generate, POST generate_stream" in unlisted.json()["error"]
    unknown = serving.request("POST", "/v2/models/unknown/infer")
    assert unknown.status_code == 404
    assert "production" in unknown.json()["error"]


def test_clients_cannot_set_the_gateways_headers(serving: Rig, blue: Upstream) -> None:
    """Loopback is an internal address to Envoy, which lets those change timeouts by headers."""
    before = len(blue.seen)
    blue.pause = 0.3
    try:
        answer = serving.request(
            "POST",
            "/v2/models/m/infer",
            {
                "x-envoy-upstream-rq-timeout-ms": "50",
                "x-envoy-retry-on": "5xx",
                "x-envoy-max-retries": "5",
                "x-llmops-release": "a lie of the client",
                "status": "500",
            },
        )
    finally:
        blue.pause = 0.0
    assert answer.status_code == 500
    assert blue.seen[before:] == [("POST", "/v2/models/m/infer")]
    assert "x-llmops-release" not in blue.headers[-1]


def test_admin_interface_is_private(serving: Rig) -> None:
    """`/quitquitquit` has no authentication: only this user may reach it, over no port."""
    assert serving.gateway.admin.socket.stat().st_mode & 0o777 == 0o600
    assert serving.gateway.folder.stat().st_mode & 0o777 == 0o700


def test_weights_share_the_traffic(serving: Rig, blue: Upstream, green: Upstream) -> None:
    """A canary gets its share; a warm slot at 0 gets nothing."""

    def answers() -> list[str]:
        return [
            serving.request("POST", "/v2/models/weights/infer").json()["answered_by"]
            for _ in range(40)
        ]

    serving.serve(
        "weights",
        blue.target(Colour.BLUE, weight=50),
        green.target(Colour.GREEN, weight=50, version=2),
    )
    # 40 fair draws are one-sided once in 10^11 runs.
    assert set(answers()) == {"blue", "green"}
    serving.serve(
        "weights",
        blue.target(Colour.BLUE, weight=0),
        green.target(Colour.GREEN, weight=100, version=2),
    )
    assert set(answers()) == {"green"}


def test_model_without_traffic_is_unavailable(serving: Rig, blue: Upstream) -> None:
    """Taking all traffic off a model is a legal route; clients get a reason, not a hang."""
    serving.serve("idle", blue.target(Colour.BLUE))
    serving.serve("idle", blue.target(Colour.BLUE, weight=0))
    answer = serving.request("POST", "/v2/models/idle/infer")
    assert answer.status_code == 503
    assert "no version of idle" in answer.json()["error"]
    serving.serve("idle")
    assert serving.request("GET", "/v2/models/idle").status_code == 503


def test_environments_do_not_touch_each_other(
    serving: Rig, blue: Upstream, green: Upstream
) -> None:
    """Both share one file of clusters: a change of staging must keep production's."""
    assert serving.request("GET", "/v2/health/ready", environment=STAGING).status_code == 503
    serving.serve("m", green.target(Colour.BLUE, version=7), environment=STAGING)
    staged = serving.request("POST", "/v2/models/m/infer", environment=STAGING)
    assert staged.json() == {"answered_by": "green"}
    assert serving.request("POST", "/v2/models/m/infer").json() == {"answered_by": "blue"}
    assert serving.request("GET", "/v2/health/ready", environment=STAGING).status_code == 200


@pytest.mark.timeout(120)
def test_route_moves_to_and_fro_without_a_failed_request(
    tmp_path: Path, blue: Upstream, green: Upstream
) -> None:
    """The promise of the whole design: nobody notices a deployment or a rollback.

    One stream runs the whole time, longer than Envoy's default timeout of 15 s, over
    clusters that leave while it runs.
    """
    failures: list[str] = []
    requests = 0
    stop = threading.Event()

    def check(answer: httpx.Response, tokens: int) -> None:
        if answer.status_code != 200:
            failures.append(f"{answer.status_code} {answer.text}")
        elif tokens and answer.content != TOKEN * tokens:
            failures.append(f"{len(answer.content)} bytes of {len(TOKEN) * tokens}")

    def load(base: str) -> None:
        nonlocal requests
        with httpx.Client(base_url=base, timeout=30, trust_env=False) as client:
            while not stop.is_set():
                try:
                    check(client.post("/v2/models/m/infer", json={}), 0)
                    check(client.post("/v2/models/m/generate_stream", json={}), 3)
                except httpx.HTTPError as error:
                    failures.append(repr(error))
                requests += 2

    def long_stream(base: str) -> None:
        headers = {"tokens": "85", "pause": "0.2"}
        url = f"{base}/v2/models/m/generate_stream"
        try:
            check(httpx.post(url, headers=headers, timeout=60, trust_env=False), 85)
        except httpx.HTTPError as error:
            failures.append(f"long stream: {error!r}")

    with rig(tmp_path) as built:
        built.serve("m", blue.target(Colour.BLUE))
        threads = [threading.Thread(target=load, args=(built.base(),)) for _ in range(3)]
        threads.append(threading.Thread(target=long_stream, args=(built.base(),)))
        for thread in threads:
            thread.start()
        try:
            time.sleep(0.5)
            for _ in range(10):
                for target in (green.target(Colour.GREEN, version=2), blue.target(Colour.BLUE)):
                    generation = built.serve("m", target)
                    # `serve` returned, so the very next request is answered by the new route.
                    answer = built.request("GET", "/v2/models/m")
                    assert answer.headers["x-llmops-generation"] == str(generation)
                    assert answer.headers["x-llmops-version"] == str(target.version)
                    time.sleep(0.1)
            threads[-1].join(timeout=60)
        finally:
            stop.set()
            for thread in threads:
                thread.join(timeout=60)
        assert failures == []
        assert requests > 100
        clusters = json.loads((built.gateway.folder / "clusters.json").read_text())["resources"]
        assert {cluster["name"] for cluster in clusters} == {
            "production/m/1/blue",
            "production/m/1/blue/questions",
            "production/m/1/blue/grpc",
            "production/m/1/blue/grpc/questions",
        }


def _route(upstream_server: Upstream, generation: int, **wrong: object) -> dict[str, Route]:
    """A route that our own checks let through only because they are sidestepped."""
    target = upstream_server.target(Colour.GREEN, version=2).model_copy(update=wrong)
    sound = Route.model_validate(
        {
            "environment": PRODUCTION,
            "model": "m",
            "generation": generation,
            "targets": [upstream_server.target(Colour.GREEN, version=2)],
            "actor": "test",
            "reason": "a test",
            "time": "2026-01-01T00:00:00Z",
            "predecessor": None,
        }
    )
    return {"m": sound.model_copy(update={"targets": (target,)})}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        # Envoy refuses the file of clusters, or only the file of routes after it.
        pytest.param({"http_port": 99999}, "PortValue", id="cluster"),
        pytest.param({"release": "a\nb"}, "Value", id="route"),
    ],
)
def test_refused_update_keeps_what_serves(
    tmp_path: Path, blue: Upstream, green: Upstream, wrong: dict[str, object], reason: str
) -> None:
    """A bad change must not hurt what serves, nor block the next good one."""
    with rig(tmp_path) as built:
        built.serve("m", blue.target(Colour.BLUE))
        files = [
            built.gateway.folder / name for name in ("clusters.json", "routes.production.json")
        ]
        before = [file.read_bytes() for file in files]
        with pytest.raises(GatewayError, match=reason) as caught:
            built.gateway.apply(PRODUCTION, _route(green, 2, **wrong))
        assert len(str(caught.value)) < 2500
        assert [file.read_bytes() for file in files] == before
        assert built.gateway.applied(PRODUCTION) == {"m": 1}
        assert built.request("POST", "/v2/models/m/infer").json() == {"answered_by": "blue"}
        built.kill()
        built.start()
        assert built.request("POST", "/v2/models/m/infer").json() == {"answered_by": "blue"}
        built.gateway.apply(PRODUCTION, _route(green, 2))
        assert built.request("POST", "/v2/models/m/infer").json() == {"answered_by": "green"}


def test_killed_envoy_serves_the_same_after_its_restart(tmp_path: Path, blue: Upstream) -> None:
    """A supervisor restarts Envoy and nobody else acts: the files must be enough."""
    with rig(tmp_path) as built:
        generation = built.serve("m", blue.target(Colour.BLUE))
        built.kill()
        with pytest.raises(GatewayError, match="llmops up"):
            built.gateway.applied(PRODUCTION)
        built.start()
        answer = built.request("POST", "/v2/models/m/infer")
        assert answer.status_code == 200
        assert answer.headers["x-llmops-generation"] == str(generation)
        assert built.gateway.applied(PRODUCTION) == {"m": generation}


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[: len(content) // 2], id="cut short"),
        pytest.param(
            lambda content: content.replace(b'"virtual_hosts"', b'"virtual_hotss"'), id="misspelt"
        ),
        pytest.param(
            lambda content: content.replace(b"production/m/1/blue", b"production/m/9/blue"),
            id="unknown cluster",
        ),
    ],
)
def test_corrupt_file_is_found_before_the_start(
    tmp_path: Path, blue: Upstream, damage: Callable[[bytes], bytes]
) -> None:
    """Envoy that starts on a corrupt file reports ready and answers every request with 404."""
    with rig(tmp_path) as built:
        built.serve("m", blue.target(Colour.BLUE))
        built.gateway.validate_files()
        built.kill()
        file = built.gateway.folder / "routes.production.json"
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(GatewayError):
            built.gateway.validate_files()
        built.gateway.write(
            {environment: built.routes.all(environment) for environment in Environment}
        )
        built.gateway.validate_files()
        built.start()
        assert built.request("POST", "/v2/models/m/infer").status_code == 200


def test_stale_files_are_caught_up_with_the_store(
    tmp_path: Path, blue: Upstream, green: Upstream
) -> None:
    """Files restored from a backup, or a crash between store and gateway, must not last."""
    with rig(tmp_path) as built:
        built.serve("m", blue.target(Colour.BLUE))
        stale = {file: file.read_bytes() for file in built.gateway.folder.glob("*.json")}
        built.serve("m", green.target(Colour.GREEN, version=2))
        built.kill()
        for file, content in stale.items():
            file.write_bytes(content)
        built.start()
        assert built.routes.differences(PRODUCTION) == {"m": (2, 1)}
        built.routes.reconcile()
        assert built.routes.differences(PRODUCTION) == {}
        assert built.request("POST", "/v2/models/m/infer").json() == {"answered_by": "green"}


def test_too_long_socket_path_is_refused(tmp_path: Path) -> None:
    """Envoy would only say that it cannot bind; the cure is a setting."""
    with pytest.raises(GatewayError, match="LLMOPS_STATE"):
        Rig(tmp_path / ("deep" * 25))
