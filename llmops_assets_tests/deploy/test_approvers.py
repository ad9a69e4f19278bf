"""The policy of approvers: its file, the ref that it is read from, and its changes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmops_assets.deploy.accepted_approvers import policy_in_force, sign_policy
from llmops_assets.deploy.approval import record_signed, verify
from llmops_assets.deploy.approvers import parse_policy
from llmops_assets.errors import ApprovalError, SpecError
from llmops_assets.evidence.dsse import Envelope
from llmops_assets.evidence.leaves import APPROVERS
from llmops_assets.serving.slots import Environment

from ..git_rig import git
from ..release_rig import PlatformOnDoubles
from .approvers_rig import RELEASE, ApproversRig, Person, edited

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ApproversRig]:
    rig = ApproversRig(tmp_path / "rig")
    yield rig
    rig.close()


def yaml_policy(key: str, **replaced: str) -> str:
    """One that is right, each part in a line of its own."""
    parts = {
        "approvers": f'[{{name: grace, identities: [g@example.org], keys: [{{key: "{key}"}}]}}]',
        "groups": "{sre: [grace]}",
        "rules": "[{models: 'date-*', approvers: [sre]}, {approvers: [grace]}]",
        "policy_change": "{required: 1}",
        **replaced,
    }
    return "".join(f"{name}: {value}\n" for name, value in parts.items())


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> str:
    return Person(tmp_path_factory.mktemp("keys"), "grace").public


def test_first_rule_that_fits_decides(key: str) -> None:
    """A wide rule behind a narrow one must not open what the narrow one closes."""
    rules = "[{models: 'date-*', approvers: [sre], longest_validity_days: 1}, {approvers: [grace]}]"
    policy = parse_policy(yaml_policy(key, rules=rules), "it")
    dates = policy.rule_for(Environment.PRODUCTION, "date-normalizer")
    other = policy.rule_for(Environment.PRODUCTION, "parrot")
    assert dates is not None
    assert other is not None
    assert (dates.longest_validity_days, other.longest_validity_days) == (1, 7)
    assert policy.rule_for(Environment.STAGING, "parrot") is None
    assert policy.may_approve(dates, policy.approvers[0])


@pytest.mark.parametrize(
    ("replaced", "mistake"),
    [
        ({"policy_change": "{}"}, "line 4: policy_change.required"),
        ({"policy_change": "{required: 2}"}, "line 4: policy_change.required: 2 of 1"),
        ({"rules": "[{approvers: [nobody]}]"}, "line 3: rules.0.approvers: nobody is named nobody"),
        ({"rules": "[{approvers: [sre], required: 2}]"}, "line 3: rules.0.required: 2 of 1"),
        ({"rules": "[{approver: [sre]}]"}, "line 3: rules.0.approver: Extra inputs"),
        ({"groups": "{sre: [sam]}"}, "line 2: groups.sre: no approver is named sam"),
        ({"approvers": "[{name: a, keys: [{key: ssh-rsa A}]}]"}, "line 1: approvers.0.keys.0.key"),
        ({"approvers": "[]"}, "line 1: approvers"),
        ({"rules": "[]\nrules: []"}, "line 4: 'rules' is given twice"),
    ],
)  # fmt: skip
def test_mistakes_name_their_line(key: str, replaced: dict[str, str], mistake: str) -> None:
    """Whoever reviews the policy does not run it; the error must lead to the line."""
    with pytest.raises(SpecError) as caught:
        parse_policy(yaml_policy(key, **replaced), "approvers.yaml")
    assert mistake in str(caught.value)


def test_one_key_or_name_is_one_person(key: str) -> None:
    """Two names for one key would make two approvals of one signature's owner."""
    two = (
        f'[{{name: a, identities: [x@y], keys: [{{key: "{key}"}}]}}, '
        f'{{name: b, identities: [X@Y], keys: [{{key: "{key}"}}]}}]'
    )
    with pytest.raises(SpecError) as caught:
        parse_policy(yaml_policy(key, approvers=two, groups="{}", rules="[{approvers: [a]}]"), "it")
    assert "is given twice" in str(caught.value)
    assert "X@Y is another approver as well" in str(caught.value)


def test_hardware_key_in_the_policy_is_refused_by_name(key: str) -> None:
    """Found when it is reviewed, and not when that person first wants to approve."""
    sk = "[{name: a, keys: [{key: sk-ssh-ed25519@openssh.com AAAA a}]}]"
    with pytest.raises(SpecError, match="a hardware-token key"):
        parse_policy(yaml_policy(key, approvers=sk), "it")


def test_first_version_is_taken_on_trust_and_on_record(rig: ApproversRig) -> None:
    """From then on it is known which one, whatever the repository says later."""
    force = policy_in_force(rig.platform)
    assert force is not None
    assert force.problem is None
    (entry,) = rig.platform.evidence.entries(APPROVERS)
    assert entry.statement.subject[0].sha256 == force.digest
    again = policy_in_force(rig.platform)
    assert again == force
    assert len(list(rig.platform.evidence.entries(APPROVERS))) == 1


def test_working_tree_and_the_releases_own_commit_decide_nothing(rig: ApproversRig) -> None:
    """Whoever writes the change must not write who may approve it."""
    (rig.models / "approvers.yaml").write_text(json.dumps(rig.policy(change=1)))
    rig.commit_all()
    (rig.checkout / "models" / "approvers.yaml").write_text("approvers: []")  # not committed
    force = policy_in_force(rig.platform)
    assert force is not None
    assert force.policy.policy_change.required == 2


def test_ref_without_a_policy_fails_closed(rig: ApproversRig) -> None:
    """Nobody may approve by a mistake in a setting."""
    for ref, why in (("refs/heads/gone", "There is no ref"), ("refs/heads/main", "has no models/")):
        settings = rig.platform.settings.model_copy(update={"approvers_ref": ref})
        with pytest.raises(SpecError, match=why):
            policy_in_force(PlatformOnDoubles(settings))


def joined_by_mallory(rig: ApproversRig) -> dict[str, Any]:
    policy = rig.policy(change=1)
    policy["approvers"].append({"name": "mallory", "keys": [{"key": rig.people["mallory"].public}]})
    policy["groups"]["reviewers"].append("mallory")
    return policy


def signatures(rig: ApproversRig, content: bytes, *names: str) -> dict[str, Envelope]:
    return {
        name: sign_policy(rig.platform, content, rig.people[name].signer, "mallory joins")
        for name in names
    }


def test_policy_changed_in_the_same_push_approves_nothing(
    rig: ApproversRig, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever can push would otherwise add a key and approve with it. The version before
    stays in force, and whoever is refused reads why."""
    rig.stage()
    policy_in_force(rig.platform)
    rig.write_policy(joined_by_mallory(rig))
    decided = rig.decided("mallory")
    envelope = rig.sign(decided)
    with caplog.at_level(logging.ERROR), pytest.raises(ApprovalError) as caught:
        record_signed(rig.platform, envelope, "file")
    assert "No approver has the key" in str(caught.value)
    assert "signed by 0 of 2 approvers" in str(caught.value)
    assert "the version before stays in force" in caplog.text
    rig.force(envelope)
    with pytest.raises(ApprovalError, match="signed by 0 of 2 approvers"):
        verify(rig.platform, RELEASE)
    record_signed(rig.platform, rig.sign(rig.decided("grace")), "file")
    assert verify(rig.platform, RELEASE).approver == "grace"


def test_quorum_of_present_approvers_changes_the_policy(rig: ApproversRig) -> None:
    """Two different ones, for exactly this content; then the new one decides alone."""
    before = policy_in_force(rig.platform)
    content = rig.write_policy(joined_by_mallory(rig))
    signed = signatures(rig, content, "grace", "heidi")
    mallory = rig.people["mallory"].signer
    with pytest.raises(ApprovalError, match="No approver has the key"):
        sign_policy(rig.platform, content, mallory, "I join")
    refused: dict[str, dict[str, Envelope]] = {
        "1 of 2": {"grace": signed["grace"]},
        # The same person twice.
        "by 1 of 2": {"a": signed["grace"], "b": signatures(rig, content, "grace")["grace"]},
        "forged": {"grace": edited(signed["grace"], reason="y"), "heidi": signed["heidi"]},
        "the key expired": {"late": signatures(rig, content, "late")["late"],
                            "heidi": signed["heidi"]},
    }  # fmt: skip
    for files in refused.values():
        rig.write_policy(joined_by_mallory(rig), files)
        found = policy_in_force(rig.platform)
        assert found is not None
        assert before is not None
        assert found.entry == before.entry
        assert "signed by 1 of 2" in str(found.problem)
    rig.write_policy(joined_by_mallory(rig), signed)
    after = policy_in_force(rig.platform)
    assert after is not None
    assert after.problem is None
    assert after.policy.holder(mallory.public_key.keyid) is not None
    newest = rig.platform.evidence.newest(APPROVERS)
    assert newest is not None
    assert newest.statement.predicate["approvers"] == ["grace", "heidi"]


def test_signatures_of_a_change_count_once_and_for_one_content(rig: ApproversRig) -> None:
    """A policy that was left must not come back by what was signed for it in its time."""
    policy_in_force(rig.platform)
    first, second = rig.policy(), joined_by_mallory(rig)
    second["policy_change"] = {"required": 2}
    content = rig.write_policy(second)
    to_second = signatures(rig, content, "grace", "heidi")
    rig.write_policy({**second, "groups": {"reviewers": ["mallory"]}}, to_second)
    found = policy_in_force(rig.platform)
    assert found is not None
    assert "agreed to another content" in str(found.problem)
    rig.write_policy(second, to_second)
    policy_in_force(rig.platform)
    content = rig.write_policy(first)
    rig.write_policy(first, signatures(rig, content, "grace", "heidi"))
    policy_in_force(rig.platform)
    rig.write_policy(second, to_second)
    found = policy_in_force(rig.platform)
    assert found is not None
    assert "agreed to a change of another version" in str(found.problem)
    assert found.policy.holder(rig.people["mallory"].signer.public_key.keyid) is None


def test_broken_or_deleted_policy_leaves_the_one_before(rig: ApproversRig) -> None:
    """A bad push must neither open the gate nor stop everybody."""
    policy_in_force(rig.platform)
    git(rig.checkout, "rm", "--quiet", "models/approvers.yaml")
    rig.commit_all(rig.checkout)
    found = policy_in_force(rig.platform)
    assert found is not None
    assert "has no models/approvers.yaml any more" in str(found.problem)
    assert found.policy.policy_change.required == 2


def test_policy_of_a_remote_branch(rig: ApproversRig, tmp_path: Path) -> None:
    """As platforms have it that follow a repository; a push is seen at once."""
    bare = tmp_path / "bare.git"
    git(tmp_path, "clone", "--quiet", "--bare", str(rig.root), str(bare))
    settings = rig.platform.settings.model_copy(update={"git_repository": str(bare)})
    platform = PlatformOnDoubles(settings)
    force = policy_in_force(platform)
    assert force is not None
    content = rig.write_policy(joined_by_mallory(rig))
    signed = {
        name: sign_policy(platform, content, rig.people[name].signer, "mallory joins")
        for name in ("grace", "heidi")
    }
    rig.write_policy(joined_by_mallory(rig), signed)
    git(rig.checkout, "push", "--quiet", str(bare), "HEAD:refs/heads/approvers")
    after = policy_in_force(platform)
    assert after is not None
    assert after.problem is None
    assert after.digest != force.digest
    with pytest.raises(SpecError, match="is no branch of LLMOPS_GIT_REPOSITORY"):
        policy_in_force(PlatformOnDoubles(
            settings.model_copy(update={"approvers_ref": "refs/remotes/origin/main"})
        ))  # fmt: skip
