"""The receiver of webhooks: lets in what MLflow signed just now, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mlflow.tracking import MlflowClient
from starlette.testclient import TestClient

from llmops_assets.develop.registry import MLflowRegistry
from llmops_assets.errors import SettingsError
from llmops_assets.local import stack
from llmops_assets.settings import Settings, get_settings
from llmops_assets.tools import module_command
from llmops_assets.triggers import webhooks
from llmops_assets.triggers.registry_watch import read_wake, wake_file
from llmops_assets.triggers.webhooks import MAX_BODY_BYTES, TokenBucket, application

from ..conftest import free_port
from ..plain_mlflow import MLflowServer, ServerProcess, register_plainly

pytestmark = pytest.mark.timeout(180)
SECRET = "a secret for tests only"
NOW = 1_800_000_000
BODY = json.dumps({"entity": "model_version", "action": "created"}).encode()


def signed(
    body: bytes = BODY, at: int | str = NOW, delivery: str = "d-1", secret: str = SECRET
) -> dict[str, str]:
    """Headers as MLflow 3.17 writes them (mlflow/webhooks/delivery.py)."""
    content = f"{delivery}.{at}.".encode() + body
    digest = hmac.new(secret.encode(), content, hashlib.sha256).digest()
    return {
        "Content-Type": "application/json",
        "X-MLflow-Delivery-Id": delivery,
        "X-MLflow-Timestamp": str(at),
        "X-MLflow-Signature": "v1," + base64.b64encode(digest).decode(),
    }


SIGNATURE = signed()["X-MLflow-Signature"]


@pytest.fixture
def wake(tmp_path: Path) -> Path:
    return tmp_path / "triggers" / "registry.wake"


@pytest.fixture
def receiver(wake: Path) -> Iterator[TestClient]:
    """The application at a fixed time, with room for many calls."""
    bucket = TokenBucket(1000, 1000)
    with TestClient(application(SECRET, wake, lambda: NOW, bucket)) as client:
        yield client


def post(receiver: TestClient, headers: dict[str, str], body: bytes = BODY) -> int:
    return receiver.post("/webhooks/mlflow", content=body, headers=headers).status_code


def test_signed_webhook_wakes(receiver: TestClient, wake: Path) -> None:
    """The mark is of the delivery: one that comes again changes nothing."""
    marks: list[str] = []
    for delivery in ("d-1", "d-1", "d-2"):
        assert post(receiver, signed(delivery=delivery)) == 202
        marks.append(wake.read_text())
    assert marks[0] == marks[1] != marks[2]
    assert [file.name for file in wake.parent.iterdir()] == [wake.name]


@pytest.mark.parametrize(
    ("why", "headers"),
    [
        ("another secret", signed(secret="another secret, of theirs")),
        ("another body", signed(body=b"{}")),
        ("no signature", {**signed(), "X-MLflow-Signature": ""}),
        ("another version", {**signed(), "X-MLflow-Signature": "v2" + SIGNATURE[2:]}),
        ("no base64", {**signed(), "X-MLflow-Signature": "v1,\xe9\xff"}),
        ("another delivery", {**signed(), "X-MLflow-Delivery-Id": "d-2"}),
        ("another time", {**signed(), "X-MLflow-Timestamp": str(NOW - 1)}),
        ("old", signed(at=NOW - 301)),
        ("from the future", signed(at=NOW + 301)),
        ("no time", signed(at="soon")),
        ("no plain number", signed(at="²")),
        ("no delivery", signed(delivery="")),
    ],
)  # fmt: skip
def test_what_mlflow_did_not_sign_just_now_is_refused(
    receiver: TestClient,
    wake: Path,
    caplog: pytest.LogCaptureFixture,
    why: str,
    headers: dict[str, str],
) -> None:
    """The port may be reachable for others; they learn nothing, and write no log of theirs."""
    raw: Any = [(name, value.encode("latin-1")) for name, value in headers.items()]
    response = receiver.post("/webhooks/mlflow", content=BODY, headers=raw)
    assert response.status_code == 401, why
    assert response.text == "Unauthorized"
    assert not wake.exists()
    (record,) = [record for record in caplog.records if record.name == webhooks.__name__]
    message = record.getMessage()
    assert message.startswith("refused a webhook")
    assert not any(part in message for part in (SECRET, "model_version", "d-1", "v1,"))


@pytest.mark.parametrize("at", [NOW - 300, NOW + 300])
def test_clocks_may_differ_a_little(receiver: TestClient, at: int) -> None:
    """Two machines never agree to the second."""
    assert post(receiver, signed(at=at)) == 202


def test_other_methods_paths_and_types(receiver: TestClient, wake: Path) -> None:
    """Only what MLflow sends has a way in."""
    assert receiver.get("/health").status_code == 200
    assert receiver.get("/webhooks/mlflow").status_code == 405
    assert receiver.put("/webhooks/mlflow", content=BODY, headers=signed()).status_code == 405
    assert receiver.post("/webhooks/other", content=BODY, headers=signed()).status_code == 404
    assert post(receiver, {**signed(), "Content-Type": "text/plain"}) == 415
    charset = {**signed(), "Content-Type": "application/json; charset=utf-8"}
    assert not wake.exists()
    assert post(receiver, charset) == 202


def test_large_bodies_are_not_read(receiver: TestClient, wake: Path) -> None:
    """Whether their length is declared, or they just go on: signed or not."""
    largest = b" " * MAX_BODY_BYTES
    assert post(receiver, signed(largest), largest) == 202
    wake.unlink()
    larger = largest + b" "
    assert post(receiver, signed(larger), larger) == 413
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 100 * MAX_BODY_BYTES:
            sent += 1024
            yield b" " * 1024

    response = receiver.post("/webhooks/mlflow", content=endless(), headers=signed())
    assert response.status_code == 413
    assert not wake.exists()


def test_flood_is_slowed_down(wake: Path) -> None:
    """A flood must not keep the machine busy; who waits as told gets through."""
    now = 0.0
    bucket = TokenBucket(3, 0.5, lambda: now)
    with TestClient(application(SECRET, wake, lambda: NOW, bucket)) as receiver:
        codes = [post(receiver, signed()) for _ in range(5)]
        assert codes == [202, 202, 202, 429, 429]
        refused = receiver.post("/webhooks/mlflow", content=BODY, headers=signed())
        assert refused.headers["Retry-After"] == "2"
        assert receiver.get("/health").status_code == 200
        now += 2
        assert post(receiver, signed()) == 202
        assert post(receiver, signed()) == 429
        now += 1000
        assert [post(receiver, signed()) for _ in range(4)] == [202, 202, 202, 429]


def test_receiver_without_a_secret_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have to believe everybody."""
    monkeypatch.delenv("LLMOPS_WEBHOOK_SECRET", raising=False)
    get_settings.cache_clear()
    with pytest.raises(SettingsError, match="LLMOPS_WEBHOOK_SECRET"):
        webhooks.main("127.0.0.1", 0)


def stack_settings(state: Path, secret: str | None = SECRET) -> Settings:
    values: dict[str, Any] = {"state": state, "models": state, "webhook_secret": secret}
    return Settings(**values)


def test_stack_keeps_the_secret_in_the_environment(tmp_path: Path) -> None:
    """Command lines and supervisord's files can be read by more people than environments."""
    settings = stack_settings(tmp_path)
    ports = {request.name: 1024 + n for n, request in enumerate(stack._port_requests(settings))}
    environment = stack._environment(settings, ports)
    assert environment["LLMOPS_WEBHOOK_SECRET"] == SECRET
    programs = stack._programs(settings, ports, ["envoy"], tmp_path / "workspace.yaml", "module")
    supervisor = stack._supervisor(settings)
    supervisor.configure(programs)
    written = supervisor.configuration.read_text()
    assert "[program:webhooks]" in written
    assert SECRET not in written
    assert environment[stack.WEBHOOK_KEY_VARIABLE] not in written
    key = tmp_path / "mlflow" / "webhooks.key"
    assert key.stat().st_mode & 0o777 == 0o600
    # The same at the next start, even without a receiver: MLflow's database needs it.
    for again in (settings, stack_settings(tmp_path, None)):
        assert (
            stack._environment(again, ports)[stack.WEBHOOK_KEY_VARIABLE]
            == environment[stack.WEBHOOK_KEY_VARIABLE]
        )


def test_stack_without_a_secret_has_no_receiver(tmp_path: Path) -> None:
    """Nothing listens that nobody asked for, and MLflow may not call private addresses."""
    settings = stack_settings(tmp_path, None)
    ports = {request.name: 1024 + n for n, request in enumerate(stack._port_requests(settings))}
    assert stack.WEBHOOKS not in ports
    programs = stack._programs(settings, ports, ["envoy"], tmp_path / "workspace.yaml", "module")
    assert stack.WEBHOOKS not in {program.name for program in programs}
    assert not [name for name in stack._environment(settings, ports) if "MLFLOW_WEBHOOK" in name]


def wait_for_mark(settings: Settings, other_than: str | None) -> str:
    deadline = time.monotonic() + 20
    while (mark := read_wake(settings)) is None or mark == other_than:
        assert time.monotonic() < deadline, "no webhook came"
        time.sleep(0.05)
    return mark


def test_real_mlflow_wakes_through_the_real_receiver(tmp_path: Path) -> None:
    """Signed by MLflow itself; and after a restart, with the secret from its database."""
    settings = stack_settings(tmp_path / "state")
    mlflow = MLflowServer(tmp_path, free_port())
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    receiver = ServerProcess(tmp_path, "webhooks", f"{url}/health")
    client = MlflowClient(tracking_uri=mlflow.url, registry_uri=mlflow.url)
    environment = stack._webhook_environment(settings)
    try:
        receiver.start(
            module_command("llmops_assets.triggers.webhooks", "127.0.0.1", str(port)),
            {
                **os.environ,
                "LLMOPS_STATE": str(settings.state),
                "LLMOPS_WEBHOOK_SECRET": SECRET,
            },
        )
        assert SECRET not in " ".join(psutil.Process(receiver.pid).cmdline())
        mlflow.serve(environment)
        registry = MLflowRegistry(mlflow.url, timeout_seconds=30)
        for secret in ("the secret before this one", SECRET):
            registry.send_webhooks(stack.WEBHOOK_NAME, url + webhooks.MLFLOW_PATH, secret)
        (webhook,) = client.list_webhooks()
        assert webhook.name == stack.WEBHOOK_NAME
        register_plainly(client, "woken")
        first = wait_for_mark(settings, None)

        mlflow.kill()
        mlflow.serve(environment)
        register_plainly(client, "woken")
        wait_for_mark(settings, first)

        wake_file(settings).unlink()
        forged = signed(at=int(time.time()), secret="not the secret we have")
        response = httpx.post(url + webhooks.MLFLOW_PATH, content=BODY, headers=forged, timeout=5)
        assert response.status_code == 401
        assert "server" not in response.headers
        assert read_wake(settings) is None
        assert SECRET not in receiver.log.read_text() + mlflow.log.read_text()
    finally:
        mlflow.kill()
        receiver.kill()
