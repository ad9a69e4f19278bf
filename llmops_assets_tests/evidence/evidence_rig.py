"""Releases brought into production by every rule, with all evidence of it, without any tool."""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import BaseModel

from llmops_assets.deploy.approval import Approval, record_approval
from llmops_assets.deploy.delivery import RouteMove, deployment_of
from llmops_assets.evidence.gates import (
    APPROVAL,
    APPROVED,
    BUILT,
    CANDIDATE_SMOKE,
    PROVEN,
    STAGING_LATENCY,
    STAGING_SMOKE,
)
from llmops_assets.evidence.keys import read_trust_root
from llmops_assets.evidence.package_signature import sign_once
from llmops_assets.evidence.verification import Verification
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Environment
from llmops_assets.storage.columns import Action

from ..release_rig import MODEL, PASSED, Rig, deploy, loaded


def fingerprint(rig: Rig) -> str:
    """Of the rig's trust root."""
    return read_trust_root(rig.platform.settings.key_folder).fingerprint


def happened(rig: Rig, release: str, asset: str, document: BaseModel) -> None:
    """Records an event about the release's package."""
    package = rig.platform.columns.get(release, "packaged_model").artifact
    action = Action(asset, "application/vnd.llmops.test", inputs={"packaged_model": package})
    rig.platform.columns.record(release, action, document, datetime.now(UTC))


def approve(rig: Rig, release: str, approver: str = "grace") -> None:
    """Records an approval, and what `production_approval` makes of it."""
    package = rig.platform.columns.get(release, "packaged_model").artifact
    record_approval(rig.platform, release, approver, "approve", "looks well", package)
    approval = Approval(
        approver=approver, decision="approve", reason="looks well", package=package,
        requested_by="ada", time=datetime.now(UTC),
    )  # fmt: skip
    happened(rig, release, "production_approval", approval)
    rig.judge(release, [APPROVAL], PASSED)


def into_production(rig: Rig, version: int, approver: str = "grace") -> Route:
    """Builds `parrot.v<version>` and puts it into production, as the assets do."""
    release = f"parrot.v{version}"
    platform = rig.platform
    rig.build(release, version)
    sign_once(
        platform.store, platform.columns.get(release, "packaged_model").artifact, platform.settings
    )
    platform.admit(release, BUILT, platform.column(release), Environment.STAGING)
    in_slot = loaded(rig, version)
    happened(rig, release, "staging_deployment", in_slot)
    rig.judge(release, [STAGING_SMOKE, STAGING_LATENCY], PASSED)
    approve(rig, release, approver)
    platform.admit(release, APPROVED, platform.column(release), Environment.PRODUCTION)
    happened(rig, release, "production_candidate", in_slot)
    rig.judge(release, [CANDIDATE_SMOKE], PASSED)
    platform.admit(release, PROVEN, platform.column(release), Environment.PRODUCTION)
    route = deploy(rig, version)
    assert route.serving is not None
    move = RouteMove(
        environment=Environment.PRODUCTION, model=MODEL, generation=route.generation,
        deployment=deployment_of(route.serving), colour=route.serving.colour, previous=None,
        answers=(), time=datetime.now(UTC),
    )  # fmt: skip
    happened(rig, release, "production_deployment", move)
    return route


def failures(found: Verification) -> str:
    """What does not hold, in words; empty if all does."""
    return "\n".join(
        f"{check.name}: {check.detail}" for check in found.checks if check.holds is False
    )
