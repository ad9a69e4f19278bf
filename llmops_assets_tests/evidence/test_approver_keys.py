"""People's keys: OpenSSH's own files and agent, Ed25519 alone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmops_assets.errors import ApprovalError
from llmops_assets.evidence.approver_keys import AgentSigner, read_public_key, signer_of
from llmops_assets.evidence.dsse import sign, verified_payload

pytestmark = pytest.mark.timeout(60)


def keygen(folder: Path, kind: str, passphrase: str = "") -> Path:
    """A key of ssh-keygen's own making."""
    file = folder / f"key_{kind}_{bool(passphrase)}"
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "grace", "-f", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return file


def asked() -> str:
    raise AssertionError("nobody may be asked for a passphrase")


@pytest.fixture(autouse=True)
def _no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real ssh-agent of the test's own."""
    socket = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():
            assert process.poll() is None
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        yield socket
    finally:
        process.kill()
        process.wait(timeout=10)


def test_key_of_ssh_keygen_signs_and_is_known_by_its_fingerprint(tmp_path: Path) -> None:
    """The id in an envelope is what `ssh-keygen -l` shows, so that people can compare."""
    file = keygen(tmp_path, "ed25519")
    signer = signer_of(file, asked)
    public = read_public_key(file.with_suffix(".pub").read_text())
    assert verified_payload(sign(b"yes", "t", signer), "t", [public], "it") == b"yes"
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(file)], check=True, capture_output=True, timeout=60
    ).stdout.decode()
    assert signer.public_key.keyid == public.keyid == shown.split()[1]


@pytest.mark.parametrize(("kind", "name"), [("rsa", "an RSA key"), ("ecdsa", "an ECDSA key")])
@pytest.mark.parametrize("passphrase", ["", "secret"])
def test_other_kinds_are_refused_by_name(
    tmp_path: Path, kind: str, name: str, passphrase: str
) -> None:
    """Before anybody types a passphrase; with the command that makes a right one."""
    file = keygen(tmp_path, kind, passphrase)
    for path in (file, file.with_suffix(".pub")):
        with pytest.raises(ApprovalError, match=name) as caught:
            signer_of(path, asked)
        assert "ssh-keygen -t ed25519" in caught.value.cure


def test_hardware_tokens_are_refused_by_name() -> None:
    """They sign a counter and flags along, which no DSSE verifier expects."""
    line = "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29t grace"
    with pytest.raises(ApprovalError, match="a hardware-token key \\(sk-ssh-ed25519"):
        read_public_key(line)


@pytest.mark.parametrize("line", ["", "hello", "ssh-ed25519", "ssh-ed25519 AAAA grace"])
def test_what_is_no_key_is_refused(line: str) -> None:
    """A policy with a truncated line must not be taken over."""
    with pytest.raises(ApprovalError):
        read_public_key(line)


def test_files_that_are_no_keys_are_refused(tmp_path: Path) -> None:
    """People point at the wrong file; the message says what was wanted."""
    file = tmp_path / "key"
    with pytest.raises(ApprovalError, match="cannot be read"):
        signer_of(file, asked)
    for content in ("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END", "-----BEGIN PRIVATE"):
        file.write_text(content)
        with pytest.raises(ApprovalError, match="not a private key in OpenSSH's format"):
            signer_of(file, asked)
    file.write_text("-----BEGIN RSA PRIVATE KEY-----\n")
    with pytest.raises(ApprovalError, match="an RSA key"):
        signer_of(file, asked)


def test_agent_signs_for_a_public_key_and_for_one_with_a_passphrase(
    tmp_path: Path, agent: Path
) -> None:
    """The private key stays on the approver's own machine, by a forwarded agent."""
    file = keygen(tmp_path, "ed25519")
    public = file.with_suffix(".pub")
    with pytest.raises(ApprovalError, match="No ssh-agent holds"):
        signer_of(public, asked)
    subprocess.run(["ssh-add", "-q", str(file)], check=True, timeout=60, env=os.environ)
    signer = signer_of(public, asked)
    assert isinstance(signer, AgentSigner)
    key = read_public_key(public.read_text())
    assert verified_payload(sign(b"yes", "t", signer), "t", [key], "it") == b"yes"
    # The same key, by now with a passphrase: nobody is asked for it.
    change = ["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(file)]
    subprocess.run(change, check=True, capture_output=True, timeout=60)
    assert isinstance(signer_of(file, asked), AgentSigner)
    subprocess.run(["ssh-add", "-q", "-D"], check=True, timeout=60, capture_output=True)
    with pytest.raises(ApprovalError, match="did not sign"):
        signer.sign(b"no")


def test_passphrase_is_asked_for_without_an_agent(tmp_path: Path) -> None:
    """Where bcrypt is not installed it cannot be used; the message leads to the agent."""
    file = keygen(tmp_path, "ed25519", "secret")
    try:
        import bcrypt  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(ApprovalError, match="ssh-add"):
            signer_of(file, lambda: "secret")
    else:
        assert sign(b"yes", "t", signer_of(file, lambda: "secret")).signatures
        with pytest.raises(ApprovalError, match="cannot be opened"):
            signer_of(file, lambda: "wrong")
