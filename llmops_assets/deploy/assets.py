"""Deploy: a package to staging, through a human decision, to production."""

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime

import dagster as dg

from llmops_assets.deploy import approval as approvals
from llmops_assets.deploy.canary import LOOK_SECONDS, Canary, failed_or_passed
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
from llmops_assets.deploy.revocation import Revoked, last_revocation
from llmops_assets.deploy.rollout_chart import rollout_chart
from llmops_assets.deploy.smoke import ask_known, judge_smoke, server_problem
from llmops_assets.develop.registration import Registration
from llmops_assets.errors import (
    ApprovalError,
    EvidenceError,
    GateRefusedError,
    GatewayError,
    LifecycleOrderError,
    LLMOpsError,
    RefConflictError,
    SlotError,
)
from llmops_assets.evidence.gates import APPROVED, BUILT, CANARY, PROVEN, STAGED
from llmops_assets.evidence.latency import LatencySummary
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
from llmops_assets.storage.artifacts import ArtifactHandle, digests
from llmops_assets.storage.columns import Action, Result, Workshop
from llmops_assets.toolchains import toolchain_for
from llmops_assets.triggers.requests import DECISION_TAG, REQUESTED_BY_TAG

GROUP = "deploy"
ENGINEERS = ["team:ml-engineering"]
PLATFORM = ["team:platform"]
STAGING_POOL = "deploy_staging"
PRODUCTION_POOL = "deploy_production"
"""Pools of the steps that fill slots or move routes; one at a time in each environment."""
BACK_OUT_SECONDS = 30.0
"""How long a slot or the gateway may not answer before a release is taken off without it."""
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
    envelope: str | None = None
    """In place of these: a signed decision, the whole file of `llmops approve --output`."""


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
    platform.admit(release, BUILT, platform.column(release), Environment.STAGING)
    loaded = _load(
        platform, release, Environment.STAGING, packaged_model,
        Registration.model_validate_json(registered_model.document).version, actor,
    )  # fmt: skip
    smoke = platform.spec(release).gates.smoke
    right = judge_smoke(loaded.answers, smoke, loaded.deployment.version, loaded.problem).passed
    inputs = digests({"packaged_model": packaged_model, "registered_model": registered_model})
    if right:
        # Before the route moves, so that nobody else's requests are measured with.
        contract = read_package(packaged_model.path).asked
        latency = _measure(context, platform, loaded, contract, evaluation_data, checkpoint)
        loaded = loaded.model_copy(update={"latency": latency})
        inputs |= digests({"evaluation_data": evaluation_data, "checkpoint": checkpoint})
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
    platform.require(release, STAGED, platform.column(release))
    given = approvals.Given(
        approver=config.approver,
        decision=config.decision,
        reason=config.reason,
        about=config.package_digest,
        envelope=config.envelope,
    )
    # Whom an approval's own run names is its approver.
    by_approval = DECISION_TAG in context.run.tags
    started_by = None if by_approval else context.run.tags.get(REQUESTED_BY_TAG)
    document = approvals.decide(platform, release, given, started_by)
    action = Action(
        asset=approvals.ASSET,
        media_type=approvals.MEDIA_TYPE,
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
    platform.admit(release, APPROVED, platform.column(release), Environment.PRODUCTION)
    approvals.check_still_approved(platform, release)
    loaded = _load(
        platform, release, Environment.PRODUCTION, packaged_model,
        Registration.model_validate_json(registered_model.document).version,
        f"run {context.run.run_id}",
    )  # fmt: skip
    inputs = digests({"packaged_model": packaged_model, "registered_model": registered_model})
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
    """The route's way to the candidate, step by step and watched; it goes back at trouble."""
    release = context.partition_key
    with explained():
        started = datetime.now(UTC)
        # Read before the verdicts are held against it: a rollback between the two makes the
        # move fail, and not the candidate replace what it was never compared with.
        model = Release.parse(release).model
        seen = platform.routes.current(Environment.PRODUCTION, model)
        revoked = last_revocation(platform.evidence, release)
        actor = f"run {context.run.run_id}"
        try:
            platform.admit(release, PROVEN, platform.column(release), Environment.PRODUCTION)
            approved = approvals.check_still_approved(platform, release)
        except (ApprovalError, GateRefusedError) as error:
            # A rollout that was cut off left it a share, which nobody watches.
            if (left := _share_beside(seen[0], release)) is not None:
                reason = f"not admitted any more: {error}"
                report_route(context, _back_out(platform, left, release, actor, reason))
            raise
        candidate = LoadedPackage.model_validate_json(production_candidate.document)
        _check_not_failed_since(context, platform, candidate, approved.time, seen[0], actor)
        _still_there(platform, candidate, packaged_model.digest)
        contract = read_package(packaged_model.path).asked
        canary = Canary(platform, candidate, contract, actor)
        try:
            outcome = canary.roll_out(seen, lambda route: report_route(context, route))
        except BaseException as error:
            # Without a verdict a release does not serve. One that served well before this
            # run is not to blame for what went wrong in it.
            if not canary.proven and (route := _still_ours(platform, canary, candidate, actor)):
                _back_out(platform, route, release, actor, f"no verdict: {error}")
            raise
        detected = datetime.now(UTC)
        route, changed = outcome.route, None
        not_taken: LLMOpsError | None = None
        if outcome.stays:
            reason = f"known questions failed: {outcome.reason}"
            _report_open(platform, route, release, reason, detected)
        elif not outcome.passed:
            # Before anything is written down: every request until then goes to a bad release.
            reason = f"canary failed: {outcome.reason}"
            try:
                changed = _back_out(platform, route, release, actor, reason)
            except RefConflictError as error:
                context.log.warning(f"the route is left as it is: {error}")
            except (GatewayError, EvidenceError) as error:
                # Raised once there is a verdict, which keeps it from being rolled out again.
                not_taken = error
    judgement = canary.judgement(outcome)
    verdict = decide(context.run.run_id, platform, release, CANARY, lambda *_: judgement)
    yield check_result(CANARY, verdict, extra=_rollout_metadata(canary))
    if not verdict.passed:
        if changed is not None:
            report_route(context, changed)
        if not_taken is not None:
            with explained():
                raise not_taken
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
        answers=outcome.answers,
        time=datetime.now(UTC),
    )
    with explained():
        canary.check_undisturbed()
        _check_not_revoked_since(platform, release, revoked)
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


def _still_ours(
    platform: Platform, canary: Canary, candidate: LoadedPackage, actor: str
) -> Route | None:
    """The route in force, if it is of this rollout and gives the candidate traffic.

    It may be newer than the rollout knows: recorded, and refused by the gateway.
    """
    route, _ = platform.routes.current(candidate.environment, candidate.model)
    if route is None or (route != canary.route and route.actor != actor):
        return None
    serves = (deployment_of(target) for target in route.targets if target.weight > 0)
    return route if candidate.deployment in serves else None


def _rollout_metadata(canary: Canary) -> dict[str, dg.MetadataValue]:
    """A row for each step and release, and a picture where there was anything to see."""
    steps = canary.steps()
    rows = [
        dg.TableRecord(
            {
                "step": str(number),
                "release": figures.release,
                "share": f"{figures.weight} %",
                "requests": str(figures.requests),
                "failed": str(figures.failures),
                "refused": str(figures.refusals),
                "p95 (ms)": _or_none(figures.duration_p95_ms),
                "p95 of first byte (ms)": _or_none(figures.first_byte_p95_ms),
                "failed inferences (Triton)": "none"
                if figures.inferences is None
                else f"{figures.failed_inferences} of {figures.inferences}",
                "known answers": f"{figures.probes_right} of {figures.probes} right",
                "from": f"{step.since:%F %T}",
                "until": f"{step.until:%F %T}",
                "ended by": step.ended_by,
            }
        )
        for number, step in enumerate(steps, start=1)
        for figures in (step.candidate, step.stable)
        if figures is not None
    ]
    found: dict[str, dg.MetadataValue] = {"steps": dg.MetadataValue.table(rows)} if rows else {}
    if canary.served:
        found["rollout"] = dg.MetadataValue.md(rollout_chart(steps, canary.served))
    return found


def _or_none(milliseconds: float | None) -> str:
    return "none" if milliseconds is None else f"{milliseconds:.0f}"


def _share_beside(route: Route | None, release: str) -> Route | None:
    """The route, if it gives the release a share beside another one."""
    targets = () if route is None else route.targets
    busy = [target.release for target in targets if target.weight > 0]
    return route if len(busy) > 1 and release in busy else None


def _check_not_failed_since(
    context: dg.AssetExecutionContext,
    platform: Platform,
    candidate: LoadedPackage,
    approved: datetime,
    route: Route | None,
    actor: str,
) -> None:
    """Checks that the release did not fail its canary since it was approved.

    One that did, and still has traffic, loses it first: the run that found out may not have
    reached the gateway.

    Raises:
        GateRefusedError: it did.
        RefConflictError, GatewayError, EvidenceError: it could not be taken off.
    """
    release = candidate.deployment.release
    judged = failed_or_passed(platform, release)
    if (
        judged is None
        or judged.passed
        or judged.time < approved
        or candidate.deployment.package not in judged.subjects.values()
    ):
        return
    targets = () if route is None else route.targets
    if route is not None and candidate.deployment in (
        deployment_of(target) for target in targets if target.weight > 0
    ):
        reason = f"canary failed: {judged.reason}"
        report_route(context, _back_out(platform, route, release, actor, reason))
    else:
        platform.routes.reconcile()
    raise GateRefusedError(
        f"{release} failed its canary, and nobody approved it since",
        expected="an approval that was made after that",
        found=f"failed at {judged.time:%F %T} UTC: {judged.reason}",
        cure=f"find out why; then `llmops approve {release} --reason WHY`, or make a new release",
    )


def _check_not_revoked_since(platform: Platform, release: str, before: Revoked | None) -> None:
    """
    Raises:
        RefConflictError: the release was revoked while it was rolled out.
    """
    revoked = last_revocation(platform.evidence, release)
    if revoked is not None and revoked != before:
        raise RefConflictError(
            f"{release} was revoked while it was rolled out",
            expected="no revocation since the run began",
            found=revoked.words,
            cure=f"if it still serves: `llmops rollback {Release.parse(release).model}`",
        )


def _back_out(platform: Platform, route: Route, release: str, actor: str, reason: str) -> Route:
    """Takes a release off the route again and records the incident.

    Raises:
        RefConflictError: somebody changed the route since; theirs stands.
        GatewayError, EvidenceError: it was not taken; the incident is recorded as open.
    """
    detected = datetime.now(UTC)
    try:
        changed = _without(platform, route, actor, reason)
    except (GatewayError, EvidenceError):
        _report_open(platform, route, release, reason, detected)
        raise
    restored = datetime.now(UTC)
    serving = changed.serving
    report_incident(
        platform.evidence,
        Incident(
            model=route.model,
            release=release,
            what=reason,
            action=f"the route went back to {serving.release}"
            if serving is not None
            else "the route was emptied, as nothing else could serve",
            actor=actor,
            detected=detected,
            decided=changed.time,
            restored=restored,
            answered=restored,
        ),
    )
    return changed


def _without(platform: Platform, route: Route, actor: str, reason: str) -> Route:
    """The route with all traffic given back, or with none where nothing else can serve.

    Raises:
        RefConflictError, EvidenceError: as `move_back`.
        GatewayError: the gateway did not take it for `BACK_OUT_SECONDS`.
    """
    late = time.monotonic() + BACK_OUT_SECONDS
    alone: LLMOpsError | None = None
    while True:
        try:
            current, _ = platform.routes.current(route.environment, route.model)
            if (
                current is not None
                and current.actor == actor
                and current.generation == route.generation + 1
            ):
                # Recorded by the try before, and refused by the gateway.
                platform.routes.reconcile()
                return current
            if alone is not None:
                # Nothing answers in its place: no answer is better than a wrong one.
                return take_off(platform.routes, route, actor, f"{reason} ({alone.problem})")
            return move_back(platform.routes, platform.slots, route, actor, reason)
        except LifecycleOrderError as error:
            alone = error
            continue
        except SlotError as error:
            if time.monotonic() >= late:
                alone = error
                continue
        except GatewayError:
            if time.monotonic() >= late:
                raise
        time.sleep(LOOK_SECONDS)


def _report_open(
    platform: Platform, route: Route, release: str, what: str, detected: datetime
) -> None:
    """Records an incident that a person has to answer."""
    report_incident(
        platform.evidence,
        Incident(
            model=route.model,
            release=release,
            what=what,
            action=None,
            actor=None,
            detected=detected,
            answered=None,
        ),
    )
