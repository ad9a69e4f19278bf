"""The proxy of docs/access.md, as it is in the repository, before real web servers.

Only its ports and folders are replaced.
"""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from llmops_assets.serving.gateway import envoy_command

from .conftest import free_port
from .dagster_rig import (
    LAUNCH,
    DagsterServers,
    dagster_servers,
    materializations,
    run_of,
)

pytestmark = pytest.mark.timeout(120)
EXAMPLE = Path(__file__).parents[1] / "docs/examples/authenticating_proxy/envoy.yaml"
ENGINEERS, AUDITORS = "dagster.example.org", "audit.example.org"
GRACE = ("grace", "a password of an engineer")
ADA = ("ada", "a password of an auditor")
RELEASE = "parrot.v1"
QUERY = "{ version }"
START_SECONDS = 20.0


@dataclass(frozen=True)
class Proxy:
    """The running proxy, as browsers and scripts see it."""

    url: str
    client: httpx.Client
    access_log: Path

    def request(
        self,
        host: str,
        user: tuple[str, str] | None,
        method: str,
        path: str,
        *,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        return self.client.request(
            method, self.url + path, json=body, auth=user,
            headers={"Host": host, **(headers or {})}, extensions={"sni_hostname": host},
        )  # fmt: skip

    def graphql(
        self, host: str, user: tuple[str, str] | None, query: str, variables: Any = None
    ) -> httpx.Response:
        body = {"query": query, "variables": variables or {}}
        return self.request(host, user, "POST", "/graphql", body=body)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterServers]:
    with dagster_servers(tmp_path_factory.mktemp("access")) as servers:
        servers.instance.add_dynamic_partitions("releases", [RELEASE])
        yield servers


@pytest.fixture(scope="module")
def proxy(servers: DagsterServers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("proxy")
    certificate = write_certificate(folder)
    write_passwords(folder / "engineers.htpasswd", GRACE)
    write_passwords(folder / "auditors.htpasswd", ADA)
    port = free_port()
    text = EXAMPLE.read_text()
    for old, new in (
        ("address: 0.0.0.0, port_value: 443", f"address: 127.0.0.1, port_value: {port}"),
        ("port_value: 3000", f"port_value: {servers.writing.port}"),
        ("port_value: 3001", f"port_value: {servers.reading.port}"),
        ("/etc/dagster-proxy/", f"{folder}/"),
        ("/var/log/dagster-proxy/", f"{folder}/"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    configuration = folder / "envoy.yaml"
    configuration.write_text(text)
    log = folder / "envoy.log"
    with log.open("wb") as output:
        envoy = subprocess.Popen(envoy_command(configuration), stdout=output, stderr=output)
    trusted = ssl.create_default_context(cafile=str(certificate))
    with httpx.Client(verify=trusted, timeout=30, trust_env=False) as client:
        proxy = Proxy(f"https://127.0.0.1:{port}", client, folder / "access.log")
        try:
            deadline = time.monotonic() + START_SECONDS
            while not answers(proxy):
                assert envoy.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.05)
            yield proxy
        finally:
            envoy.terminate()
            envoy.wait(timeout=10)


def answers(proxy: Proxy) -> bool:
    try:
        proxy.request(ENGINEERS, None, "GET", "/")
    except httpx.TransportError:
        return False
    return True


def write_passwords(file: Path, *users: tuple[str, str]) -> None:
    """As `htpasswd -s` writes them, the one form that Envoy reads."""
    lines = (
        f"{name}:{{SHA}}{base64.b64encode(hashlib.sha1(password.encode()).digest()).decode()}\n"
        for name, password in users
    )
    file.write_text("".join(lines))


def write_certificate(folder: Path) -> Path:
    """A certificate for both hosts, signed by its own key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ENGINEERS)])
    hosts = x509.SubjectAlternativeName([x509.DNSName(ENGINEERS), x509.DNSName(AUDITORS)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(hosts, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    file = folder / "certificate.pem"
    file.write_bytes(certificate.public_bytes(pem))
    return file


@pytest.mark.parametrize(
    ("host", "user"),
    [
        (ENGINEERS, None), (AUDITORS, None),
        (ENGINEERS, ("grace", "wrong")), (ENGINEERS, ("mallory", GRACE[1])),
        (ENGINEERS, ADA),
        (AUDITORS, GRACE),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("POST", "/graphql"), ("POST", "/report_asset_materialization/engine"),
     ("GET", "/server_info"), ("GET", "/logs/x/out")],
)  # fmt: skip
def test_nobody_gets_in_without_the_hosts_own_credentials(
    proxy: Proxy, host: str, user: tuple[str, str] | None, method: str, path: str
) -> None:
    """No path may be open, and one group's password is none at the other's door."""
    assert proxy.request(host, user, method, path, body={}).status_code == 401


def test_unknown_host_leads_nowhere(proxy: Proxy) -> None:
    """A name that nobody configured must not fall through to a server."""
    for user in (None, GRACE, ADA):
        answer = proxy.request(ENGINEERS, user, "GET", "/", headers={"Host": "127.0.0.1"})
        assert answer.status_code == 401


def test_auditor_looks(proxy: Proxy, servers: DagsterServers) -> None:
    """The pages, their data, and nothing missing that an auditor needs."""
    assert "<html" in proxy.request(AUDITORS, ADA, "GET", "/assets").text.lower()
    answer = proxy.graphql(AUDITORS, ADA, "{ assetNodes { assetKey { path } } }").json()
    found = {node["assetKey"]["path"][-1] for node in answer["data"]["assetNodes"]}
    assert {"packaged_model", "production_route", "audit_record"} <= found


def test_auditor_neither_launches_nor_reports(proxy: Proxy, servers: DagsterServers) -> None:
    """Whoever audits must not be able to change what is audited."""
    launched = proxy.graphql(AUDITORS, ADA, LAUNCH, run_of("release", RELEASE)).json()
    assert launched["data"]["launchRun"]["__typename"] == "UnauthorizedError"
    assert servers.instance.get_runs() == []
    report = {"partition": RELEASE, "data_version": "sha256:forged"}
    for path in (
        "/report_asset_materialization/engine", "/report_asset_check/engine",
        "/report_asset_observation/engine", "/report_asset%5fmaterialization/engine",
        "/report_asset_materialization/?asset_key=engine",
    ):  # fmt: skip
        answer = proxy.request(AUDITORS, ADA, "POST", path, body=report)
        assert (answer.status_code, "closed by the proxy" in answer.text) == (403, True), path
    assert materializations(servers.instance, "engine", RELEASE) == []


@pytest.mark.parametrize(("host", "user"), [(ENGINEERS, GRACE), (AUDITORS, ADA)])
def test_another_site_acts_in_nobodys_name(proxy: Proxy, host: str, user: tuple[str, str]) -> None:
    """Browsers add the password to whatever a page of another site asks for."""
    mutation = "mutation { setNuxSeen }"
    assert proxy.graphql(host, user, QUERY).status_code == 200
    elsewhere = {"Origin": "https://evil.example.org"}
    body = {"query": QUERY}
    for headers in (elsewhere, {"Origin": "null"}):
        answer = proxy.request(host, user, "POST", "/graphql", body=body, headers=headers)
        assert answer.status_code == 403
    own = {"Origin": f"https://{host}"}
    assert proxy.request(host, user, "POST", "/graphql", body=body, headers=own).is_success
    # An image's address, and a form: no header says where these come from.
    query = httpx.QueryParams({"query": mutation})
    assert proxy.request(host, user, "GET", f"/graphql?{query}").status_code == 403
    plain = {"Content-Type": "text/plain"}
    answer = proxy.request(host, user, "POST", f"/graphql?{query}", body={}, headers=plain)
    assert answer.status_code == 403


def test_dagster_itself_would_have_taken_it(servers: DagsterServers) -> None:
    """Why the proxy closes these; when Dagster does so, it need not."""
    query = {"query": "mutation { setNuxSeen }"}
    client, url = servers.writing.client, f"{servers.writing.url}/graphql"
    assert client.get(url, params=query).json() == {"data": {"setNuxSeen": True}}
    assert client.post(url, params=query).json() == {"data": {"setNuxSeen": True}}


def test_engineer_works(proxy: Proxy, servers: DagsterServers) -> None:
    """Launch and report; that no decision trusts a report is `test_forged_events.py`."""
    launched = proxy.graphql(ENGINEERS, GRACE, LAUNCH, run_of("report", RELEASE)).json()
    assert launched["data"]["launchRun"]["__typename"] == "LaunchRunSuccess", launched
    report = {"partition": "parrot.v2", "data_version": "sha256:forged"}
    path = "/report_asset_materialization/engine"
    assert proxy.request(ENGINEERS, GRACE, "POST", path, body=report).status_code == 200
    assert len(materializations(servers.instance, "engine", "parrot.v2")) == 1


@pytest.mark.parametrize(("host", "user"), [(ENGINEERS, GRACE), (AUDITORS, ADA)])
def test_pages_that_follow_a_run_are_let_through(
    proxy: Proxy, host: str, user: tuple[str, str]
) -> None:
    """Without the upgrade the UI shows runs that never go on."""
    upgrade = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(b"0" * 16).decode(),
        "Sec-WebSocket-Protocol": "graphql-ws",
    }  # fmt: skip
    own = {**upgrade, "Origin": f"https://{host}"}
    with proxy.client.stream(
        "GET", f"{proxy.url}/graphql", auth=user, headers={"Host": host, **own},
        extensions={"sni_hostname": host},
    ) as answer:  # fmt: skip
        assert answer.status_code == 101
    other = {**upgrade, "Origin": "https://evil.example.org"}
    assert proxy.request(host, user, "GET", "/graphql", headers=other).status_code == 403


def test_access_log_says_who(proxy: Proxy) -> None:
    """Dagster records no user; without this line nobody could be asked."""
    path = "/server_info"
    assert proxy.request(ENGINEERS, GRACE, "GET", path).is_success
    lying = {"X-Forwarded-User": "ada"}
    assert proxy.request(ENGINEERS, GRACE, "GET", path, headers=lying).is_success
    deadline = time.monotonic() + START_SECONDS
    lines: list[dict[str, Any]] = []
    while len(lines) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        text = proxy.access_log.read_text()
        lines = [line for line in map(json.loads, text.splitlines())
                 if line["path"] == path and line["status"] == 200]  # fmt: skip
    assert [line["user"] for line in lines] == ["grace", "grace"]
    assert GRACE[1] not in proxy.access_log.read_text()
