"""The policy of approvers that is in force: what a protected ref has, once a quorum agreed.

The first version is taken on trust. A later one counts when its own commit has the
signatures of as many present approvers as the version before demands; until then the one
before stays in force, and everything that rests on it says so. Each that was taken over is
a statement in the evidence log, with its text.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from llmops_assets.deploy.approvers import POLICY_FILE, ApproversPolicy, parse_policy
from llmops_assets.develop import branch
from llmops_assets.develop.spec_files import LARGEST_SPEC_BYTES, Repository, decoded
from llmops_assets.errors import ApprovalError, EvidenceError, RefConflictError, SpecError
from llmops_assets.evidence import attest
from llmops_assets.evidence.dsse import Envelope, Signer, sign, verified_payload
from llmops_assets.evidence.leaves import APPROVERS, Entry
from llmops_assets.evidence.log import Attestation
from llmops_assets.evidence.statements import APPROVERS_CHANGE, PAYLOAD_TYPE, Statement
from llmops_assets.platform import Platform
from llmops_assets.settings import Settings
from llmops_assets.storage.store import digest_of

SIGNATURES_FOLDER = f"{POLICY_FILE}.approvals"
"""Beside the policy: a file `*.json` with an envelope of each approver who agrees to it."""
APPROVALS_FOLDER = "approvals"
"""At the root of the protected ref: envelopes of decisions, `*.json`."""
LOCAL_BRANCHES = "refs/heads/"

logger = logging.getLogger(__name__)


class AcceptedPolicy(BaseModel):
    """A version of the policy as it was taken over; the predicate of a statement."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: str
    commit: str
    digest: str
    """Of the file's bytes."""
    content: str
    approvers: tuple[str, ...]
    """Who agreed to it; nobody to the first version, which is taken on trust."""
    envelopes: tuple[Envelope, ...]
    """What they signed."""
    time: AwareDatetime


class PolicyChangeApproval(BaseModel):
    """An approver agrees to a version of the policy; the predicate of a statement."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    approver: str
    digest: str
    """Of the new file's bytes."""
    previous: str
    """Digest of the log's entry with the version before, so that it counts once."""
    reason: str
    time: AwareDatetime


@dataclass(frozen=True)
class PolicyInForce:
    """What decides now."""

    policy: ApproversPolicy
    digest: str
    """Of the file's bytes."""
    entry: str
    """Digest of the log's entry that took it over."""
    problem: str | None
    """Why what the ref has by now does not count; None if it is this."""

    @property
    def note(self) -> str:
        """The problem as an end of a sentence; empty without one."""
        return "" if self.problem is None else f"; note: {self.problem}"


@dataclass(frozen=True)
class _Commit:
    """The protected ref as it is now."""

    repository: Repository
    hash: str

    def file(self, path: str) -> bytes | None:
        """A file's bytes; None where there is none.

        Raises:
            SpecError: git does not answer, or the file is too large to be one of these.
        """
        size = self.repository.ask("cat-file", "-s", f"{self.hash}:{path}")
        if size is None:
            return None
        if int(size) > LARGEST_SPEC_BYTES:
            raise SpecError(
                f"{path} is too large", expected=f"at most {LARGEST_SPEC_BYTES} bytes",
                found=size, cure="commit the policy, or the signature, itself there",
            )  # fmt: skip
        return self.repository.read("cat-file", "blob", f"{self.hash}:{path}")

    def envelopes(self, folder: str) -> dict[str, Envelope | str]:
        """The envelopes in a folder by path; or what is wrong with a file."""
        listed = self.repository.ask("ls-tree", "--name-only", self.hash, "--", f"{folder}/")
        found: dict[str, Envelope | str] = {}
        for path in (listed or "").splitlines():
            if not path.endswith(".json"):
                continue
            try:
                found[path] = Envelope.model_validate_json(self.file(path) or b"")
            except (ValidationError, SpecError) as error:
                found[path] = f"{path} is no envelope: {error}"
        return found


def policy_in_force(platform: Platform) -> PolicyInForce | None:
    """The policy that decides who may approve; None where the settings name none.

    Raises:
        SpecError: there is none at the ref yet, or the first version is not valid.
        TriggerError: LLMOPS_GIT_REPOSITORY does not answer.
        EvidenceError: the version taken over before cannot be read.
    """
    ref = platform.settings.approvers_ref
    if ref is None:
        return None
    commit = _commit_of(platform.settings, ref)
    path = f"{commit.repository.models}/{POLICY_FILE}".removeprefix("./")
    content = commit.file(path)
    newest = platform.evidence.newest(APPROVERS)
    if newest is None:
        return _trusted_first(platform, ref, commit, path, content)
    before = _read(newest)
    if content is None:
        return _still(newest, before, f"{ref} has no {path} any more")
    if digest_of(content) == before.digest:
        return _still(newest, before, None)
    return _changed(platform, newest, before, commit, path, content)


def committed_decisions(
    settings: Settings, known: str | None
) -> tuple[str, dict[str, Envelope | str]]:
    """The envelopes of decisions in the protected ref's folder `approvals`.

    Args:
        known: the commit that was looked at before.

    Returns:
        The commit, and envelopes or what is wrong by path; none at the known commit.

    Raises:
        SpecError: there is no such ref, or git does not answer.
        TriggerError: LLMOPS_GIT_REPOSITORY does not answer.
    """
    assert settings.approvers_ref is not None  # or there is nothing to ask for
    commit = _commit_of(settings, settings.approvers_ref)
    return commit.hash, {} if commit.hash == known else commit.envelopes(APPROVALS_FOLDER)


def sign_policy(platform: Platform, content: bytes, signer: Signer, reason: str) -> Envelope:
    """An approver's agreement to a version of the policy, to be committed with it.

    Raises:
        SpecError: the new version is not valid.
        ApprovalError: there is no version to follow, or the key is no approver's.
    """
    force = policy_in_force(platform)
    if force is None:
        raise ApprovalError(
            "No policy of approvers is in force",
            expected="a protected ref with one",
            cure="set LLMOPS_APPROVERS_REF; the first version needs no signatures",
        )
    parse_policy(decoded(content, POLICY_FILE), POLICY_FILE)
    holder = force.policy.holder(signer.public_key.keyid)
    if holder is None:
        raise unknown_key(signer.public_key.keyid, force)
    said = PolicyChangeApproval(
        approver=holder[0].name,
        digest=digest_of(content),
        previous=force.entry,
        reason=reason,
        time=datetime.now(UTC),
    )
    return sign(attest.approvers_change(said).payload(), PAYLOAD_TYPE, signer)


def unknown_key(keyid: str, force: PolicyInForce) -> ApprovalError:
    """That no approver in force has a key."""
    return ApprovalError(
        f"No approver has the key {keyid}",
        expected="a key that the policy in force names"
        + ("" if force.problem is None else f" ({force.problem})"),
        found=keyid,
        cure="sign with a key that is in approvers.yaml, or have it added by a quorum",
    )


def _commit_of(settings: Settings, ref: str) -> _Commit:
    if settings.git_repository is not None:
        if not ref.startswith(LOCAL_BRANCHES):
            raise SpecError(
                f"LLMOPS_APPROVERS_REF={ref} is no branch of LLMOPS_GIT_REPOSITORY",
                expected=f"{LOCAL_BRANCHES}<branch>",
                cure="name the branch as the repository itself has it",
            )
        # Its own mirror: what pushes of specs need is not touched.
        settings = settings.model_copy(update={"git_branch": ref.removeprefix(LOCAL_BRANCHES)})
        head = branch.remote_head(settings)
        repository = branch.repository(settings)
        if repository.resolve(head) is None:
            head = branch.fetch(settings)
        return _Commit(branch.repository(settings), head)
    repository = branch.repository(settings)
    found = repository.resolve(ref)
    if found is None:
        raise SpecError(
            f"There is no ref {ref} in {repository.folder}",
            expected=f"a commit with {repository.models}/{POLICY_FILE}",
            cure="make it, or correct LLMOPS_APPROVERS_REF",
        )
    return _Commit(repository, found)


def _trusted_first(
    platform: Platform, ref: str, commit: _Commit, path: str, content: bytes | None
) -> PolicyInForce:
    if content is None:
        raise SpecError(
            f"{ref} has no {path}",
            expected="the policy of who may approve",
            cure="commit it there (docs/approvals.md has an example), or unset "
            "LLMOPS_APPROVERS_REF",
        )
    policy = parse_policy(decoded(content, path), f"{path} at {commit.hash[:12]}")
    logger.warning("the first policy of approvers, %s at %s, is taken on trust", path, commit.hash)
    return _accept(platform, None, policy, commit, content, {})


def _changed(
    platform: Platform,
    newest: Entry,
    before: AcceptedPolicy,
    commit: _Commit,
    path: str,
    content: bytes,
) -> PolicyInForce:
    """The new version if a quorum signed it; else the one before, loudly."""
    old = _parsed(before)
    signatures = commit.envelopes(f"{path}.approvals")
    agreed: dict[str, Envelope] = {}
    refused: list[str] = []
    for file, envelope in signatures.items():
        if isinstance(envelope, str):
            refused.append(envelope)
            continue
        try:
            agreed.setdefault(_agreeing(envelope, old, newest, content), envelope)
        except (ApprovalError, EvidenceError) as error:
            refused.append(f"{file}: {error.problem}")
    required = old.policy_change.required
    if len(agreed) < required:
        said = f" ({'; '.join(refused)})" if refused else ""
        return _still(newest, before, (
            f"{path} was changed at {commit.hash[:12]}, signed by {len(agreed)} of {required} "
            f"approvers that a change needs{said}; the version before stays in force"
        ))  # fmt: skip
    try:
        policy = parse_policy(decoded(content, path), f"{path} at {commit.hash[:12]}")
    except SpecError as error:
        return _still(newest, before, str(error))
    logger.warning("the policy of approvers is now that of %s", commit.hash)
    return _accept(platform, newest.digest, policy, commit, content, agreed)


def _agreeing(envelope: Envelope, old: ApproversPolicy, newest: Entry, content: bytes) -> str:
    """Who agrees by an envelope to a new version.

    Raises:
        ApprovalError, EvidenceError: nobody does.
    """
    keyid = envelope.signatures[0].keyid
    holder = old.holder(keyid) if len(envelope.signatures) == 1 else None
    if holder is None:
        raise _no_agreement(f"no approver has the key {keyid}")
    approver, key = holder
    if objection := key.objection(datetime.now(UTC)):
        raise _no_agreement(f"{approver.name}: {objection}")
    payload = verified_payload(
        envelope, PAYLOAD_TYPE, [key.public_key], "the signature of a policy"
    )
    statement = Statement.parse(payload)
    try:
        said = PolicyChangeApproval.model_validate(statement.predicate)
    except ValidationError as error:
        raise _no_agreement("it is no agreement to a policy") from error
    if statement.predicate_type != APPROVERS_CHANGE or said.approver != approver.name:
        raise _no_agreement("it is no agreement to a policy by that approver")
    if said.digest != digest_of(content):
        raise _no_agreement(f"{approver.name} agreed to another content")
    if said.previous != newest.digest:
        raise _no_agreement(f"{approver.name} agreed to a change of another version")
    return approver.name


def _no_agreement(problem: str) -> ApprovalError:
    return ApprovalError(problem, cure="sign the new file: `llmops approve --policy FILE`")


def _accept(
    platform: Platform,
    previous: str | None,
    policy: ApproversPolicy,
    commit: _Commit,
    content: bytes,
    agreed: dict[str, Envelope],
) -> PolicyInForce:
    accepted = AcceptedPolicy(
        ref=str(platform.settings.approvers_ref),
        commit=commit.hash,
        digest=digest_of(content),
        content=decoded(content, POLICY_FILE),
        approvers=tuple(agreed),
        envelopes=tuple(agreed.values()),
        time=datetime.now(UTC),
    )
    try:
        (entry,) = platform.evidence.append(
            Attestation(attest.approvers(accepted), (APPROVERS,)), heads={APPROVERS: previous}
        )
    except RefConflictError:
        # Another process has just taken it, or another one, over.
        found = policy_in_force(platform)
        assert found is not None  # the settings still name the ref
        return found
    return PolicyInForce(policy, accepted.digest, entry.digest, None)


def _still(newest: Entry, accepted: AcceptedPolicy, problem: str | None) -> PolicyInForce:
    if problem is not None:
        logger.error("%s", problem)
    return PolicyInForce(_parsed(accepted), accepted.digest, newest.digest, problem)


def _read(entry: Entry) -> AcceptedPolicy:
    try:
        return AcceptedPolicy.model_validate(entry.statement.predicate)
    except ValidationError as error:
        raise EvidenceError(
            f"Entry {entry.sequence} of the evidence log is not a policy of approvers",
            expected="one as this platform writes it",
            found=error,
            cure="read it with the version of the platform that wrote it",
        ) from error


def _parsed(accepted: AcceptedPolicy) -> ApproversPolicy:
    return parse_policy(accepted.content, f"{POLICY_FILE} of commit {accepted.commit[:12]}")
