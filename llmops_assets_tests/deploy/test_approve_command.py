"""`llmops approve` with a key: what people type, and what they are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llmops_assets.cli import main
from llmops_assets.deploy.accepted_approvers import policy_in_force
from llmops_assets.deploy.approval import read_decision, record_signed, verify
from llmops_assets.deploy.revocation import last_revocation
from llmops_assets.deploy.signed_decision import parse_envelope
from llmops_assets.evidence.leaves import APPROVALS
from llmops_assets.local import stack
from llmops_assets.local.ports import PortRequest, claim_ports
from llmops_assets.local.stack import port_file
from llmops_assets.settings import get_settings

from .approvers_rig import REF, RELEASE, ApproversRig

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApproversRig]:
    """A release in staging, in the state folder of a stack, and a policy that wants two."""
    rig = ApproversRig(tmp_path / "rig")
    rig.write_policy(rig.policy(required=2, change=1))
    rig.stage()
    settings = rig.platform.settings
    for name, value in (("STATE", settings.state), ("MODELS", rig.models), ("APPROVERS_REF", REF)):
        monkeypatch.setenv(f"LLMOPS_{name}", str(value))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    get_settings.cache_clear()
    servers = (stack.WEB_SERVER, stack.MLFLOW, stack.GATEWAY, stack.STAGING_GATEWAY,
               stack.CODE_SERVER)  # fmt: skip
    claim_ports(port_file(settings), "127.0.0.1", [PortRequest(name) for name in servers])
    yield rig
    rig.close()
    get_settings.cache_clear()


def approve(rig: ApproversRig, by: str, *arguments: str) -> Result:
    key = ("--key", str(rig.people[by].file))
    return CliRunner().invoke(main, ["approve", "--reason", "it answers", *key, *arguments])


def test_two_people_approve(rig: ApproversRig) -> None:
    """The first is told that another one is needed, in the exit code as well."""
    first = approve(rig, "grace", RELEASE)
    assert first.exit_code == 1, first.output
    assert "grace approved parrot.v1: it answers" in first.stdout
    assert rig.people["grace"].signer.public_key.keyid in first.stdout
    assert "1 that count, by grace" in first.stderr
    second = approve(rig, "heidi", RELEASE, "--days", "1")
    assert second.exit_code == 0, second.output
    assert "The trigger `approval` promotes it" in second.stdout
    assert verify(rig.platform, RELEASE).approver == "grace, heidi"
    rejected = approve(rig, "ada", RELEASE, "--reject")
    assert rejected.exit_code == 0, rejected.output
    assert "ada rejected parrot.v1" in rejected.stdout


def test_file_is_written_and_nothing_recorded(rig: ApproversRig, tmp_path: Path) -> None:
    """It counts once somebody delivers it."""
    file = tmp_path / "approval.json"
    result = approve(rig, "grace", RELEASE, "--output", str(file))
    assert result.exit_code == 0, result.output
    assert list(rig.platform.evidence.entries(APPROVALS)) == []
    entry = record_signed(rig.platform, parse_envelope(file.read_text()), "file")
    assert read_decision(entry).approver == "grace"


def test_refusals_are_told_at_once(rig: ApproversRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The person still sits there; and nothing is recorded."""
    for by, why in (("ivan", "ivan asked for the release"), ("mallory", "No approver has the key")):
        result = approve(rig, by, RELEASE)
        assert result.exit_code == 2
        assert why in result.stderr
    assert list(rig.platform.evidence.entries(APPROVALS)) == []
    unsigned = approve(rig, "grace", RELEASE, "--approver", "grace")
    assert unsigned.exit_code == 1
    assert "is not signed" in unsigned.stderr
    rejected = approve(rig, "grace", RELEASE, "--approver", "grace", "--reject")
    assert rejected.exit_code == 1
    assert "is not signed" in rejected.stderr
    assert last_revocation(rig.platform.evidence, RELEASE) is None
    for arguments in ([], [RELEASE, "--policy", str(rig.models / "parrot.yaml")]):
        assert approve(rig, "grace", *arguments).exit_code == 2
    monkeypatch.delenv("LLMOPS_APPROVERS_REF")
    get_settings.cache_clear()
    result = CliRunner().invoke(main, ["approve", RELEASE, "--reason", "x"])
    assert result.exit_code == 2
    assert "decide unsigned with --approver NAME" in result.stderr


def test_new_policy_is_signed_and_counts_when_committed(rig: ApproversRig) -> None:
    """The file lies where it is to be committed."""
    policy_in_force(rig.platform)
    file = rig.checkout / "models" / "approvers.yaml"
    file.write_text(json.dumps(rig.policy(required=1)))
    result = approve(rig, "heidi", "--policy", str(file))
    assert result.exit_code == 0, result.output
    rig.commit_all(rig.checkout)
    found = policy_in_force(rig.platform)
    assert found is not None
    assert found.problem is None
    assert found.policy.rules[0].required == 1
    valid = CliRunner().invoke(main, ["spec", "validate", str(file)])
    assert valid.exit_code == 0, valid.output
    file.write_text("approvers: []\n")
    broken = CliRunner().invoke(main, ["spec", "validate", str(file)])
    assert broken.exit_code == 1
    assert "line 1: approvers" in broken.stderr
