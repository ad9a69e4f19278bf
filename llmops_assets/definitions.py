"""The one Definitions of the code location: assets, checks, jobs, triggers, resources.

Importing this is cheap: no torch, transformers, mlflow, onnxruntime or kubernetes.
"""

from __future__ import annotations

import dagster as dg

from llmops_assets.build import assets as build_assets
from llmops_assets.build import checks as build_checks
from llmops_assets.deploy import assets as deploy_assets
from llmops_assets.deploy import checks as deploy_checks
from llmops_assets.develop import assets as develop_assets
from llmops_assets.develop import checks as develop_checks
from llmops_assets.jobs import asset_jobs, rollback
from llmops_assets.operate import assets as operate_assets
from llmops_assets.operate import checks as operate_checks
from llmops_assets.platform import Platform, local_platform
from llmops_assets.reports import assets as report_assets
from llmops_assets.reports.automation import reports
from llmops_assets.retire import assets as retire_assets
from llmops_assets.retire import checks as retire_checks
from llmops_assets.storage.io_manager import ArtifactIOManager
from llmops_assets.triggers.alerts import alerts
from llmops_assets.triggers.approval import approval
from llmops_assets.triggers.git_push import git_push
from llmops_assets.triggers.openlineage import openlineage
from llmops_assets.triggers.registry import registry
from llmops_assets.triggers.retraining import retraining
from llmops_assets.triggers.toolchain_bump import toolchain_bump

PHASES = (
    develop_assets, build_assets, deploy_assets, operate_assets, retire_assets, report_assets,
)  # fmt: skip
CHECKS = (develop_checks, build_checks, deploy_checks, operate_checks, retire_checks)
TRIGGERS = (git_push, registry, approval, retraining, alerts, toolchain_bump)


def definitions_for(platform: Platform) -> dg.Definitions:
    """The definitions on the given parts; tests pass their own."""
    return dg.Definitions(
        assets=dg.load_assets_from_modules(PHASES, include_specs=True),
        asset_checks=dg.load_asset_checks_from_modules(CHECKS),
        jobs=[*asset_jobs, rollback],
        sensors=[*TRIGGERS, openlineage, reports],
        resources={"platform": platform, "io_manager": ArtifactIOManager(lambda: platform.columns)},
        # Heavy steps are processes of their own (tools.py); a process a step besides
        # would cost seconds each and gain nothing.
        executor=dg.in_process_executor,
    )


@dg.definitions
def defs() -> dg.Definitions:
    """What Dagster loads."""
    return definitions_for(local_platform())
