"""What the command line does with releases, as plain functions."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from llmops_assets.dagster_client import DagsterClient
from llmops_assets.deploy.accepted_approvers import SIGNATURES_FOLDER, sign_policy
from llmops_assets.deploy.approval import (
    Delivery,
    read_decision,
    record_approval,
    record_signed,
    required_policy,
    sign_approval,
    verify,
)
from llmops_assets.develop.branch import COMMIT
from llmops_assets.develop.specs import resolve_commit
from llmops_assets.errors import ApprovalError, ReleaseError, SpecError
from llmops_assets.evidence.approver_keys import signer_of
from llmops_assets.evidence.dsse import Envelope, Signer
from llmops_assets.local.stack import endpoints
from llmops_assets.platform import Platform
from llmops_assets.settings import Settings
from llmops_assets.triggers.requests import RELEASE_TAG, REQUESTED_BY_TAG

RELEASE_JOB = "release"


@dataclass(frozen=True)
class Decision:
    """A person's decision about a package."""

    approver: str
    reason: str
    approve: bool
    package: str
    """Digest of the package."""


@dataclass(frozen=True)
class SigningKey:
    """Where an approver's key is."""

    path: Path
    """A private key of OpenSSH, or a public one whose private key the ssh-agent holds."""
    passphrase: Callable[[], str]
    """Asks for the passphrase, where one is needed."""

    def signer(self) -> Signer:
        """
        Raises:
            ApprovalError: the key cannot be used.
        """
        return signer_of(self.path, self.passphrase)


@dataclass(frozen=True)
class Recorded:
    """A decision on record."""

    digest: str
    """Of the record."""
    objection: str | None
    """Why the decision does not count; None when it does."""


class Standing(StrEnum):
    """What became of asking for a release."""

    LAUNCHED = "launched"
    UNDER_WAY = "under way"
    IN_STAGING = "in staging"


@dataclass(frozen=True)
class Submission:
    """The run that makes, or made, a release."""

    run: str
    standing: Standing


def client_for(
    settings: Settings, url: str | None = None, token: str | None = None
) -> DagsterClient:
    """The Dagster at `url`, or the local stack's.

    Raises:
        StackError: neither is there, or the token may not be sent to it.
    """
    address = url or endpoints(settings).dagster_url
    return DagsterClient(address, settings.http_timeout_seconds, token)


def start_release(
    client: DagsterClient, release: str, requested_by: str, commit: str | None = None
) -> str:
    """Adds a release and submits its run. Returns the run's id.

    Raises:
        StackError: Dagster does not answer or refuses.
    """
    client.add_release(release)
    config: dict[str, Any] = {"commit": commit} if commit is not None else {}
    return client.launch(
        RELEASE_JOB,
        release,
        {"ops": {"model_spec": {"config": config}}} if config else {},
        {REQUESTED_BY_TAG: requested_by, RELEASE_TAG: release},
    )


def full_commit(settings: Settings, revision: str, *, elsewhere: bool) -> str:
    """The full hash of a git revision, of which the release's key is made.

    Args:
        elsewhere: the release is made by another machine, which may have commits that are
            not here; a full hash is then taken as it is.

    Raises:
        ReleaseError: it is no full hash, and there is nothing here to ask for it.
        SpecError: there is no such commit in the repository of specs.
    """
    if not elsewhere:
        return resolve_commit(settings, revision)
    if COMMIT.fullmatch(revision):
        return revision
    try:
        return resolve_commit(settings, revision)
    except SpecError as error:
        raise ReleaseError(
            "The commit's full hash is needed, as there is no repository here that has it",
            expected="40 hex digits",
            found=repr(revision),
            cure="pass `git rev-parse HEAD`; in CI that is $GITHUB_SHA or $CI_COMMIT_SHA",
        ) from error


def submit_release(
    client: DagsterClient, release: str, requested_by: str, commit: str | None, *, again: bool
) -> Submission:
    """Asks for a release, unless somebody did already: a trigger, a person, or CI.

    A run of it that failed is followed by another, which goes on where that stopped.

    Args:
        again: submit it even if its newest run succeeded.

    Raises:
        StackError: Dagster does not answer or refuses.
    """
    runs = client.runs(RELEASE_JOB, release)
    if under_way := [run for run in runs if run.under_way]:
        return Submission(min(under_way).run, Standing.UNDER_WAY)
    # Whoever lost a race ended its run, which says nothing of the release.
    newest = next((run for run in runs if not run.cancelled), None)
    if newest is not None and newest.succeeded and not again:
        return Submission(newest.run, Standing.IN_STAGING)
    run = start_release(client, release, requested_by, commit)
    # A trigger may have asked in the same moment. The first one does the work.
    now = (other for other in client.runs(RELEASE_JOB, release) if other.under_way)
    first = min(now, default=None)
    if first is None or first.run == run:
        return Submission(run, Standing.LAUNCHED)
    client.terminate(run)
    return Submission(first.run, Standing.UNDER_WAY)


def start_promotion(client: DagsterClient, release: str, decision: Decision | None) -> str:
    """Submits a promotion, with a decision or with the one recorded before.

    Returns:
        The run's id.

    Raises:
        StackError: Dagster does not answer or refuses.
    """
    config: dict[str, Any] = {}
    if decision is not None:
        config = {
            "ops": {
                "production_approval": {
                    "config": {
                        "approver": decision.approver,
                        "decision": "approve" if decision.approve else "reject",
                        "reason": decision.reason,
                        "package_digest": decision.package,
                    }
                }
            }
        }
    return client.launch("promote", release, config, {REQUESTED_BY_TAG: getpass.getuser()})


def package_digest(settings: Settings, release: str) -> str:
    """Digest of the release's package, as the store has it.

    Raises:
        StackError: there is no stack in the state folder.
        LifecycleOrderError: it has none yet.
    """
    endpoints(settings)  # an empty state folder is the wrong one
    return Platform(settings).columns.get(release, "packaged_model").artifact


def record_decision(settings: Settings, release: str, decision: Decision) -> Recorded:
    """Records a person's decision, for the trigger that promotes.

    Raises:
        StackError: there is no stack in the state folder.
        LLMOpsError: the decision is incomplete, or about another package.
    """
    endpoints(settings)  # an empty state folder is the wrong one
    platform = Platform(settings)
    entry = record_approval(
        platform,
        release,
        approver=decision.approver,
        decision="approve" if decision.approve else "reject",
        reason=decision.reason,
        package=decision.package,
    )
    objection = None
    # Without a policy a rejection always counts.
    if decision.approve or platform.settings.approvers_ref is not None:
        try:
            verify(platform, release, read_decision(entry))
        except ApprovalError as error:
            objection = str(error)
    return Recorded(entry.digest, objection)


def sign_release_decision(
    settings: Settings,
    release: str,
    key: SigningKey,
    reason: str,
    *,
    approve: bool,
    about: str | None,
    days: float | None,
) -> Envelope:
    """Signs a person's decision with their own key; nothing is recorded.

    Args:
        about: digest of the package that they looked at; None: the one in the store.
        days: for how long it shall count; None: as settings and policy say.

    Raises:
        StackError: there is no stack in the state folder.
        LLMOpsError: the key is no approver's, or the decision could not count.
    """
    endpoints(settings)  # an empty state folder is the wrong one
    platform = Platform(settings)
    required_policy(platform)  # before anybody looks for a key that is of no use
    return sign_approval(
        platform,
        release,
        key.signer(),
        "approve" if approve else "reject",
        reason,
        about=about,
        valid=None if days is None else timedelta(days=days),
    )


def record_signed_decision(
    settings: Settings, envelope: Envelope, delivered: Delivery = "command"
) -> Recorded:
    """Records a signed decision, for the trigger that promotes.

    Raises:
        LLMOpsError: it does not count.
    """
    platform = Platform(settings)
    entry = record_signed(platform, envelope, delivered)
    decision = read_decision(entry)
    objection = None
    if decision.decision == "approve":
        try:
            verify(platform, decision.release)
        except ApprovalError as error:
            objection = str(error)  # such as that another one is needed
    return Recorded(entry.digest, objection)


def sign_policy_file(settings: Settings, file: Path, key: SigningKey, reason: str) -> Path:
    """Signs a new version of approvers.yaml; the file beside it is to be committed with it.

    Returns:
        The file with the signature.

    Raises:
        StackError: there is no stack in the state folder.
        LLMOpsError: the new version is not valid, or the key is no approver's.
    """
    endpoints(settings)  # an empty state folder is the wrong one
    signer = key.signer()
    envelope = sign_policy(Platform(settings), file.read_bytes(), signer, reason)
    folder = file.parent / SIGNATURES_FOLDER
    folder.mkdir(exist_ok=True)
    # Fingerprints have slashes.
    name = signer.public_key.keyid.removeprefix("SHA256:").replace("/", "_")
    target = folder / f"{name}.json"
    target.write_text(envelope.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return target
