"""Deploy: a package to staging, through a human decision, to production."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime

import dagster as dg

from llmops_assets.deploy import approval as approvals
from llmops_assets.deploy.delivery import (
    LoadedPackage,
    RouteMove,
    deployment_of,
    load,
    move,
    move_back,
    take_off,
    warm,
)
from llmops_assets.deploy.load import measure_latency
from llmops_assets.deploy.smoke import Answer, ask_known, judge_smoke, server_problem
from llmops_assets.develop.registration import Registration
from llmops_assets.errors import LifecycleOrderError, SlotError
from llmops_assets.evidence.gates import APPROVED, BUILT, CANARY, PROVEN, STAGED
from llmops_assets.evidence.latency import LatencySummary
from llmops_assets.evidence.verdicts import Judgement, Verdict
from llmops_assets.explained import explained
from llmops_assets.operate.incidents import Incident, report_incident
from llmops_assets.partitions import RELEASES
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.reporting import (
    check_result,
    check_specs,
    decide,
    materialized,
    report_route,
    stop,
)
from llmops_assets.serving.package_description import read_package
from llmops_assets.serving.request_contract import RequestContract
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Deployment, Environment, Slot
from llmops_assets.spec import ModelSpec
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.columns import Action, Result, Workshop
from llmops_assets.toolchains import toolchain_for

GROUP = "deploy"
ENGINEERS = ["team:ml-engineering"]
PLATFORM = ["team:platform"]
STAGING_POOL = "deploy_staging"
PRODUCTION_POOL = "deploy_production"
"""Pools of the steps that fill slots or move routes; one at a time in each environment."""
LOADED_MEDIA_TYPE = "application/vnd.llmops.deployment.v1"


class ApprovalConfig(dg.Config):
    """A decision about the release; leave everything empty to use the one made before."""

    approver: str | None = None
    """Who decides."""
    decision: str | None = None
    """`approve` or `reject`."""
    reason: str | None = None
    """Why."""
    package_digest: str | None = None
    """Digest of the packaged model that the approver looked at."""


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=ENGINEERS,
    kinds={"triton"},
    # Not inputs: nothing is loaded before they were judged.
    deps=["engine_validation", "compliance_report"],
    pool=STAGING_POOL,
)
@explained()
def staging_deployment(
    context: dg.AssetExecutionContext,
    packaged_model: ArtifactHandle,
    registered_model: ArtifactHandle,
    evaluation_data: ArtifactHandle,
    checkpoint: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """The package in staging: answers known questions, then load, and is put on the route."""
    release = context.partition_key
    actor = f"run {context.run.run_id}"
    started = datetime.now(UTC)
    platform.require(release, BUILT, platform.column(release))
    loaded = _load(
        platform, release, Environment.STAGING, packaged_model,
        Registration.model_validate_json(registered_model.document).version, actor,
    )  # fmt: skip
    smoke = platform.spec(release).gates.smoke
    right = judge_smoke(loaded.answers, smoke, loaded.deployment.version, loaded.problem).passed
    inputs = {"packaged_model": packaged_model.digest}
    if right:
        # Before the route moves, so that nobody else's requests are measured with.
        contract = read_package(packaged_model.path).asked
        latency = _measure(context, platform, loaded, contract, evaluation_data, checkpoint)
        loaded = loaded.model_copy(update={"latency": latency})
        inputs["evaluation_data"] = evaluation_data.digest
    result = _record(platform, "staging_deployment", loaded, inputs, started)
    if not right:
        # The gate stops the release; what is in staging for others to use stays there.
        context.log.error("it does not answer as it should, so staging's route stays as it is")
        return materialized(platform, result)
    route = move(platform.routes, loaded, actor, f"staging {release}")
    for state in platform.slots.slots(Environment.STAGING, loaded.model):
        # Staging keeps nothing warm: its memory is better spent on the next candidate.
        if state.slot.colour != loaded.colour and state.deployment is not None:
            platform.slots.drain(state.slot)
            platform.slots.stop(state.slot, state.deployment)
    return materialized(platform, result, {"route_generation": route.generation})


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=ENGINEERS,
    kinds={"approval"},
    # What serves may have changed since; then the job compares with it again, first.
    deps=["evaluation"],
)
@explained()
def production_approval(
    context: dg.AssetExecutionContext,
    config: ApprovalConfig,
    staging_deployment: ArtifactHandle,
    packaged_model: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """A person's decision about exactly this package. A run never waits for one."""
    release = context.partition_key
    started = datetime.now(UTC)
    column = platform.column(release)
    platform.require(release, STAGED, column)
    recorded = column.get("production_approval")
    document = approvals.decide(
        release,
        packaged_model.digest,
        str(column["model_spec"].result.facts["requested_by"]),
        None if recorded is None else approvals.Approval.model_validate_json(recorded.document),
        approver=config.approver,
        decision=config.decision,
        reason=config.reason,
        about=config.package_digest,
    )
    if document.decision == "approve":
        approvals.check_not_rejected(platform.store, release, packaged_model.digest)
    action = Action(
        asset="production_approval",
        media_type="application/vnd.llmops.approval.v1",
        inputs={
            "packaged_model": packaged_model.digest,
            "staging_deployment": staging_deployment.digest,
        },
    )
    return materialized(platform, platform.columns.record(release, action, document, started))


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=PLATFORM,
    kinds={"triton"},
    deps=["production_approval"],
    pool=PRODUCTION_POOL,
)
@explained()
def production_candidate(
    context: dg.AssetExecutionContext,
    packaged_model: ArtifactHandle,
    registered_model: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """The package loaded in production's idle slot and asked known questions; no traffic yet."""
    release = context.partition_key
    started = datetime.now(UTC)
    platform.require(release, APPROVED, platform.column(release))
    loaded = _load(
        platform, release, Environment.PRODUCTION, packaged_model,
        Registration.model_validate_json(registered_model.document).version,
        f"run {context.run.run_id}",
    )  # fmt: skip
    inputs = {"packaged_model": packaged_model.digest}
    return materialized(
        platform, _record(platform, "production_candidate", loaded, inputs, started)
    )


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=PLATFORM,
    kinds={"envoy", "triton"},
    check_specs=check_specs(CANARY),
    pool=PRODUCTION_POOL,
)
def production_deployment(
    context: dg.AssetExecutionContext,
    production_candidate: ArtifactHandle,
    packaged_model: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult[ArtifactHandle]]:
    """The route's move to the candidate, watched; it moves back when the release misbehaves."""
    release = context.partition_key
    with explained():
        started = datetime.now(UTC)
        # Read before the verdicts are held against it: a rollback between the two makes the
        # move fail, and not the candidate replace what it was never compared with.
        model = Release.parse(release).model
        seen = platform.routes.current(Environment.PRODUCTION, model)
        platform.require(release, PROVEN, platform.column(release))
        candidate = LoadedPackage.model_validate_json(production_candidate.document)
        _still_there(platform, candidate, packaged_model.digest)
        contract = read_package(packaged_model.path).asked
        actor = f"run {context.run.run_id}"
        route = move(platform.routes, candidate, actor, f"deploying {release}", seen)
        try:
            answers, verdict = _watch(platform, candidate, contract, context.run.run_id)
        except BaseException as error:
            # Without a verdict a release does not serve. One that served before this run
            # is not to blame for what went wrong in it.
            if route.actor == actor:
                _back_out(platform, route, release, actor, f"no verdict: {error}", started)
            raise
    report_route(context, route)
    yield check_result(CANARY, verdict)
    if not verdict.passed:
        with explained():
            reason = f"canary failed: {verdict.reason}"
            report_route(context, _back_out(platform, route, release, actor, reason, started))
        stop(context.instance, context.run.run_id, platform, release, [(CANARY, verdict)])
    previous = warm(route)
    action = Action(
        asset="production_deployment",
        media_type="application/vnd.llmops.route-move.v1",
        inputs={
            "production_candidate": production_candidate.digest,
            "packaged_model": packaged_model.digest,
        },
    )
    document = RouteMove(
        environment=Environment.PRODUCTION,
        model=candidate.model,
        generation=route.generation,
        deployment=candidate.deployment,
        colour=candidate.colour,
        previous=None if previous is None else deployment_of(previous),
        answers=answers,
        time=datetime.now(UTC),
    )
    with explained():
        result = platform.columns.record(release, action, document, started)
        yield materialized(
            platform, result, {"gateway": dg.MetadataValue.url(platform.gateway_url)}
        )


def _load(
    platform: Platform,
    release: str,
    environment: Environment,
    package: ArtifactHandle,
    version: int,
    actor: str,
) -> LoadedPackage:
    """Loads the package into the environment's idle slot and asks it the known questions."""
    started = datetime.now(UTC)
    model = Release.parse(release).model
    if platform.columns.find(release, "deprecated_version") is not None:
        raise LifecycleOrderError(
            f"Release {release} is deprecated and takes no traffic any more",
            expected="a release that was not deprecated",
            cure=f"make a new one of the same spec: `llmops release {model}`",
        )
    spec = platform.spec(release)
    description = read_package(package.path)
    deployment = Deployment(package.digest, release, version)
    slot, endpoint = load(
        platform.slots, platform.routes, environment, model, package.artifact, description,
        deployment, actor,
    )  # fmt: skip
    load_seconds = (datetime.now(UTC) - started).total_seconds()
    timeout_seconds = platform.settings.http_timeout_seconds
    answers = ask_known(spec, endpoint, description.asked, timeout_seconds)
    toolchain = toolchain_for(spec.engine, platform.settings)
    return LoadedPackage(
        environment=environment,
        model=model,
        colour=slot.colour,
        deployment=deployment,
        endpoint=endpoint,
        load_seconds=load_seconds,
        answers=answers,
        problem=server_problem(toolchain, package.path, endpoint, timeout_seconds),
        time=datetime.now(UTC),
    )


def _record(
    platform: Platform,
    asset: str,
    loaded: LoadedPackage,
    inputs: Mapping[str, str],
    started: datetime,
) -> Result:
    action = Action(asset=asset, media_type=LOADED_MEDIA_TYPE, inputs=inputs)
    return platform.columns.record(loaded.deployment.release, action, loaded, started)


def _measure(
    context: dg.AssetExecutionContext,
    platform: Platform,
    loaded: LoadedPackage,
    contract: RequestContract,
    evaluation_data: ArtifactHandle,
    checkpoint: ArtifactHandle,
) -> LatencySummary:
    """Loads the slot itself with requests, in a process of its own."""
    release = loaded.deployment.release
    folder = platform.settings.work / f"staging_deployment-{release}"
    workshop = Workshop(scratch=folder / "scratch", output=folder / "output")
    tools = platform.tools(release, "staging_deployment", workshop, context.log.info)
    summary = measure_latency(
        platform.spec(release),
        loaded.endpoint,
        loaded.deployment.version,
        contract,
        evaluation_data,
        checkpoint,
        # Who takes the time must not wait for the processor.
        replace(tools, niceness=0),
        platform.settings.http_timeout_seconds,
        platform.settings.aiperf,
    )
    shutil.rmtree(folder)
    return summary


def _still_there(platform: Platform, candidate: LoadedPackage, package: str) -> None:
    """Checks that the slot still holds, and serves, the judged package.

    Raises:
        SlotError: it does not; another release may have taken the idle slot.
    """
    slot = Slot(candidate.environment, candidate.model, candidate.colour)
    state = platform.slots.state(slot)
    if (
        not state.running
        or state.deployment != candidate.deployment
        or state.endpoint != candidate.endpoint
        or candidate.deployment.package != package
    ):
        raise SlotError(
            f"Slot {slot} does not serve the candidate",
            expected=f"{candidate.deployment.release} with package {package}",
            found=state.deployment if state.running else f"{state.deployment}, not running",
            cure=f"materialize production_candidate of {candidate.deployment.release} again",
        )


def _watch(
    platform: Platform, candidate: LoadedPackage, contract: RequestContract, run: str
) -> tuple[tuple[Answer, ...], Verdict]:
    """Asks the known questions through the gateway, and judges and records the answers."""
    release = candidate.deployment.release
    answers = ask_known(
        platform.spec(release),
        platform.gateway_url,
        contract,
        platform.settings.http_timeout_seconds,
    )

    def canary(spec: ModelSpec, _: Mapping[str, ArtifactHandle]) -> Judgement:
        return judge_smoke(answers, spec.gates.smoke, candidate.deployment.version)

    return answers, decide(run, platform, release, CANARY, canary)


def _back_out(
    platform: Platform, route: Route, release: str, actor: str, reason: str, started: datetime
) -> Route:
    """Takes a release off the route again and records the incident."""
    try:
        changed = move_back(platform.routes, platform.slots, route, actor, reason)
    except LifecycleOrderError as error:
        # Nothing answers in its place: no answer is better than a wrong one.
        changed = take_off(platform.routes, route, actor, f"{reason} ({error.problem})")
    serving = changed.serving
    report_incident(
        platform.store,
        Incident(
            model=route.model,
            release=release,
            what=reason,
            action=f"the route went back to {serving.release}"
            if serving is not None
            else "the route was emptied, as nothing else could serve",
            actor=actor,
            detected=started,
            answered=datetime.now(UTC),
        ),
    )
    return changed
