"""Everything the assets work with, as one resource: settings, store, slots, routes, registry.

What differs between one machine and a cluster is which implementations stand here.
Nothing is opened or imported before an asset asks for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from llmops_assets.errors import GateRefusedError, SpecError
from llmops_assets.evidence import attest
from llmops_assets.evidence.gates import PROVEN, Gate
from llmops_assets.evidence.leaves import release_chain
from llmops_assets.evidence.log import Attestation, EvidenceLog, evidence_log
from llmops_assets.evidence.results import AttestedResults
from llmops_assets.evidence.statements import PROVENANCE
from llmops_assets.evidence.verdicts import (
    NOTHING_SERVES,
    Circumstances,
    Standing,
    Verdict,
    judged_by,
    judged_bytes,
    require,
    standings,
)
from llmops_assets.evidence.waivers import Waiver, committed_waivers, waiver_for
from llmops_assets.policy import Policy, check_floors, read_policy
from llmops_assets.release import Release
from llmops_assets.settings import Settings, get_settings
from llmops_assets.spec import ModelSpec
from llmops_assets.storage.artifacts import ArtifactHandle, digests
from llmops_assets.storage.columns import Columns, Workshop
from llmops_assets.storage.folder import FolderStore
from llmops_assets.tools import Progress, ToolRunner

if TYPE_CHECKING:
    from llmops_assets.develop.registry import ModelRegistry
    from llmops_assets.serving.gateway import EnvoyGateway
    from llmops_assets.serving.metrics import Metrics
    from llmops_assets.serving.routes import Routes
    from llmops_assets.serving.slots import Environment, Slots
    from llmops_assets.storage.store import Store

SPEC_FILE = "spec.json"
"""The frozen spec in the `model_spec` artifact."""
PROGRESS_INTERVAL_SECONDS = 5.0


@dataclass(frozen=True)
class Platform:
    """The platform's parts on one machine."""

    settings: Settings

    @cached_property
    def store(self) -> Store:
        return FolderStore(self.settings.store)

    @cached_property
    def columns(self) -> Columns:
        return Columns(self.store, self.settings.work, AttestedResults(self.evidence))

    @cached_property
    def evidence(self) -> EvidenceLog:
        return evidence_log(self.settings, self.store)

    @cached_property
    def registry(self) -> ModelRegistry:
        from llmops_assets.develop.registry import MLflowRegistry, custom_registry

        if self.settings.registry != "mlflow":
            return custom_registry(self.settings)
        return MLflowRegistry(self.mlflow_url, self.settings.http_timeout_seconds)

    @property
    def mlflow_url(self) -> str:
        """Where MLflow keeps the versions that specs take weights from.

        Raises:
            StackError: the local stack was never started.
        """
        from llmops_assets.local.stack import endpoints

        return endpoints(self.settings).mlflow_url

    @property
    def gateway_url(self) -> str:
        """Where production traffic goes.

        Raises:
            StackError: the local stack was never started.
        """
        from llmops_assets.local.stack import endpoints

        return endpoints(self.settings).gateway_url

    @cached_property
    def slots(self) -> Slots:
        from llmops_assets.local.slots import SupervisedSlots

        return SupervisedSlots(self.settings, self.store)

    @cached_property
    def gateway(self) -> EnvoyGateway:
        from llmops_assets.serving.gateway import EnvoyGateway

        return EnvoyGateway(
            self.settings.gateway, timeout_seconds=self.settings.http_timeout_seconds
        )

    @cached_property
    def routes(self) -> Routes:
        from llmops_assets.serving.routes import Routes

        return Routes(self.evidence, self.gateway)

    @cached_property
    def metrics(self) -> Metrics:
        from llmops_assets.serving.metrics import LocalMetrics

        return LocalMetrics(self.routes, self.gateway.admin, self.settings.http_timeout_seconds)

    def column(self, release: str) -> Mapping[str, ArtifactHandle]:
        """Everything the release has published, by asset, as of now."""
        return {
            asset: ArtifactHandle(result, self.store)
            for asset, result in self.columns.assets(release).items()
        }

    def spec(self, release: str) -> ModelSpec:
        """The release's frozen spec.

        Raises:
            LifecycleOrderError: `model_spec` was not materialized yet.
        """
        return frozen_spec(ArtifactHandle(self.columns.get(release, "model_spec"), self.store))

    def repository(self, release: str) -> Path:
        """Folder that the release's tasks, code and data are relative to.

        Of a release that was asked for at a commit it is read-only and holds that commit.

        Raises:
            SpecError: the commit is in no repository any more.
            TriggerError: it is not here, and LLMOPS_GIT_REPOSITORY does not answer.
        """
        from llmops_assets.develop.freezing import frozen_source, repository_of

        if self.columns.find(release, "model_spec") is None:
            return self.settings.models.parent
        return repository_of(self.settings, frozen_source(self, release))

    def require(
        self, release: str, gates: Iterable[Gate], column: Mapping[str, ArtifactHandle]
    ) -> tuple[Standing, ...]:
        """`verdicts.require` for the artifacts in hand.

        Raises:
            GateRefusedError: the release may not go on.
            SpecError: its spec is below the policy as it is now.
        """
        facts = self.circumstances(release, column)
        gates = tuple(gates)
        if set(gates) & set(PROVEN):
            # What is below a floor goes nowhere, but into the archive.
            check_floors(facts.spec, facts.policy.floors)
        return require(self.evidence, gates, facts)

    def standings(
        self, release: str, gates: Iterable[Gate], column: Mapping[str, ArtifactHandle]
    ) -> tuple[Standing, ...]:
        """Where the release stands with each gate, for people."""
        return standings(self.evidence, gates, self.circumstances(release, column))

    def admit(
        self,
        release: str,
        gates: Iterable[Gate],
        column: Mapping[str, ArtifactHandle],
        environment: Environment,
    ) -> tuple[Standing, ...]:
        """As `require`, for a deployment: the decision itself becomes evidence, also a refusal.

        Raises:
            GateRefusedError, SpecError: as `require`.
        """
        gates = tuple(gates)
        found = self.standings(release, gates, column)

        def decided(rests_on: Iterable[Standing], passed: bool) -> None:
            summary = attest.verification_summary(
                release=release,
                package=column["packaged_model"].digest,
                environment=environment,
                model=Release.parse(release).model,
                attestations=[digest for standing in rests_on for digest in standing.statements],
                provenance=self._provenance(release, column["packaged_model"].digest),
                policy=judged_by(gates, self.spec(release), self.policy),
                passed=passed,
                time=datetime.now(UTC),
            )
            self.evidence.append(Attestation(summary, (release_chain(release),)))

        try:
            accepted = self.require(release, gates, column)
        except (GateRefusedError, SpecError):
            decided(found, passed=False)
            raise
        decided(accepted, passed=True)
        return accepted

    def circumstances(self, release: str, column: Mapping[str, ArtifactHandle]) -> Circumstances:
        """What verdicts of the release are held against, as of now."""
        return Circumstances(
            release=release,
            spec=self.spec(release),
            policy=self.policy,
            digests=digests(column),
            waivers=self.waivers,
            serving=self.serving_package(Release.parse(release).model),
        )

    def _provenance(self, release: str, artifact: str) -> str | None:
        """Digest of the newest signed provenance of an artifact in this release."""
        entries = self.evidence.entries(release_chain(release), PROVENANCE, newest_first=True)
        return next(
            (e.leaf.statement for e in entries if e.statement.subject[0].sha256 == artifact), None
        )

    def waivers(self) -> tuple[Waiver, ...]:
        """The reviewed waivers.

        Raises:
            SpecError: one is not valid.
        """
        return committed_waivers(self.settings.models, self.policy.longest_waiver_days)

    def waiver(self, gate: Gate, verdict: Verdict) -> Waiver | None:
        """The waiver that covers a verdict that did not pass, if there is one."""
        return waiver_for(
            self.waivers(), gate, verdict.release, judged_bytes(verdict), verdict.baseline
        )

    @property
    def policy(self) -> Policy:
        """The organisation's policy."""
        return read_policy(self.settings.policy)

    def serving_package(self, model: str) -> str:
        """Digest of the package that serves in production, or `NOTHING_SERVES`."""
        from llmops_assets.serving.slots import Environment

        route, _ = self.routes.current(Environment.PRODUCTION, model)
        serving = None if route is None else route.serving
        return NOTHING_SERVES if serving is None else serving.package

    def tools(
        self, release: str, asset: str, workshop: Workshop, log: Callable[[str], None]
    ) -> ToolRunner:
        """A runner whose tools work in the workshop's scratch folder.

        Args:
            log: gets a line of progress every few seconds.
        """
        return ToolRunner(
            work=workshop.scratch,
            log=self.tool_log(release, asset),
            timeout_seconds=self.settings.tool_timeout_seconds,
            niceness=self.settings.tool_niceness,
            on_progress=_throttled(log),
        )

    def tool_log(self, release: str, asset: str) -> Path:
        """Where the output of an asset's tools goes."""
        return self.settings.logs / "tools" / release / f"{asset}.log"


def frozen_spec(model_spec: ArtifactHandle) -> ModelSpec:
    """The spec in a `model_spec` artifact.

    Raises:
        SpecError: another version of the platform froze it.
    """
    try:
        return ModelSpec.model_validate_json((model_spec.path / SPEC_FILE).read_bytes())
    except ValidationError as error:
        raise SpecError(
            f"The spec that {model_spec.result.release} froze has a form that this platform "
            "does not read",
            found=error,
            cure="make a new release, or handle this one with the version that made it",
        ) from error


def local_platform() -> Platform:
    """The platform as this process's environment describes it."""
    return Platform(get_settings())


def _throttled(log: Callable[[str], None]) -> Callable[[Progress], None]:
    last = 0.0

    def on_progress(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_INTERVAL_SECONDS:
            last = now
            log(_sentence(progress))

    return on_progress


def _sentence(progress: Progress) -> str:
    """Such as "step 20 of 450, loss 0.05"."""
    parts = {
        name: f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in progress.items()
    }
    if "step" in parts and "of" in parts:
        parts["step"] += f" of {parts.pop('of')}"
    return ", ".join(f"{name} {value}" for name, value in parts.items())
