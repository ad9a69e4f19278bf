"""How results and verdicts of plain functions are shown in Dagster.

Assets and checks stay thin: they call plain functions and pass what comes back to the
functions here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import dagster as dg

from llmops_assets.errors import LifecycleOrderError
from llmops_assets.evidence.gates import Gate
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Finding, Judgement, Verdict, record_verdict
from llmops_assets.evidence.waivers import Waiver
from llmops_assets.explained import explained
from llmops_assets.partitions import MODELS, RELEASES
from llmops_assets.platform import Platform
from llmops_assets.serving.routes import Route
from llmops_assets.spec import ModelSpec
from llmops_assets.storage.artifacts import ArtifactHandle, digests
from llmops_assets.storage.columns import Action, Make, Result
from llmops_assets.storage.store import canonical_json, digest_of

Judge = Callable[[ModelSpec, Mapping[str, ArtifactHandle]], Judgement]
"""A gate's function: from the frozen spec and the release's artifacts to a judgement."""

FAILED_GATE_TAG = "llmops/failed_gate"


def produce(
    context: dg.AssetExecutionContext, platform: Platform, action: Action, make: Make
) -> Result:
    """The action's result for this release, published; see `Columns.produce`."""
    result = platform.columns.produce(context.partition_key, action, make)
    if result.reused_from is not None:
        context.log.info(f"reused from {result.reused_from}; no tool ran")
    return result


def materialized(
    platform: Platform, result: Result, extra: Mapping[str, Any] | None = None
) -> dg.MaterializeResult[ArtifactHandle]:
    """Reports a published result with digests of inputs and output, times and facts."""
    handle = ArtifactHandle(result, platform.store)
    metadata: dict[str, Any] = {
        "digest": result.artifact,
        "size_bytes": handle.artifact.size,
        "files": len(handle.artifact.files),
        "inputs": dg.MetadataValue.json(result.inputs),
        "parameters": dg.MetadataValue.json(result.parameters),
        "versions": dg.MetadataValue.json(result.versions),
        "action": result.action,
        "seconds": (result.finished - result.started).total_seconds(),
    }
    if result.reused_from is not None:
        metadata["reused_from"] = result.reused_from
    for name, value in result.facts.items():
        # An archive has a digest of its own, of its file: it must not hide the artifact's.
        metadata[f"{result.asset}_{name}" if name in metadata else name] = _metadata(value)
    metadata |= extra or {}
    return dg.MaterializeResult(
        value=handle, data_version=dg.DataVersion(result.artifact), metadata=metadata
    )


def check_specs(*gates: Gate) -> Sequence[dg.AssetCheckSpec]:
    """The blocking checks that show these gates."""
    with warnings.catch_warnings():
        # Partitions of checks are a preview in Dagster 1.13. Known, pinned and tested; a
        # line for each gate in every log would bury what matters.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return [
            dg.AssetCheckSpec(
                gate.name,
                asset=gate.asset,
                description=gate.description,
                blocking=True,
                partitions_def=RELEASES,
                additional_deps=gate.waits_for,
            )
            for gate in gates
        ]


def judge(
    context: dg.AssetCheckExecutionContext,
    platform: Platform,
    judges: Mapping[Gate, Judge],
) -> Iterator[dg.AssetCheckResult]:
    """Runs the selected gates, records their verdicts, reports them, and stops on a failure.

    Raises:
        dagster.Failure: a gate did not pass, and no waiver covers it; it names gate,
            measure, threshold, cure and owner.
    """
    release = context.partition_key
    selected = {key.name for key in context.selected_asset_check_keys}
    failed: list[tuple[Gate, Verdict]] = []
    for gate, judgement in judges.items():
        if gate.name in selected:
            verdict = decide(context.run.run_id, platform, release, gate, judgement)
            with explained():
                waiver = None if verdict.passed else platform.waiver(gate, verdict)
            yield check_result(gate, verdict, waiver)
            if not verdict.passed and waiver is None:
                failed.append((gate, verdict))
    if failed:
        stop(context.instance, context.run.run_id, platform, release, failed)


@explained()
def decide(run: str, platform: Platform, release: str, gate: Gate, judge: Judge) -> Verdict:
    """Judges what the release has published, and records the verdict about those bytes.

    Raises:
        dagster.Failure: the release lacks something that the gate judges.
    """
    column = platform.column(release)
    if missing := [asset for asset in gate.subjects if asset not in column]:
        raise LifecycleOrderError(
            f"Gate {gate.name} cannot judge release {release} yet",
            expected="published " + ", ".join(gate.subjects),
            found="no " + ", no ".join(missing),
            cure=f"materialize {', '.join(missing)} of partition {release} first",
        )
    spec = platform.spec(release)
    return record_verdict(
        platform.evidence,
        release,
        gate,
        spec,
        platform.policy,
        judge(spec, column),
        digests(column),
        run,
    )


def check_result(
    gate: Gate,
    verdict: Verdict,
    waiver: Waiver | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dg.AssetCheckResult:
    """A verdict as Dagster shows it: a waived one as a warning, which blocks nothing."""
    metadata: dict[str, Any] = {
        "result": verdict.decision.value,
        "measured": dg.MetadataValue.json(verdict.measured),
        "threshold": dg.MetadataValue.json(verdict.threshold),
        "subjects": dg.MetadataValue.json(verdict.subjects),
        "policy": verdict.policy,
    }
    if verdict.findings:
        metadata["findings"] = _table(verdict.findings)
    if verdict.baseline is not None:
        metadata["baseline"] = verdict.baseline
    if not verdict.passed:
        metadata |= {"next_action": verdict.next_action, "owner": verdict.owner}
    description = verdict.reason
    if waiver is not None:
        description = f"Waived by {waiver.owner} until {waiver.expires:%F %R %Z}, as "
        description += f"{waiver.reason.rstrip('.')}. {verdict.decision}: {verdict.reason}"
        metadata["waiver"] = dg.MetadataValue.json(waiver.model_dump(mode="json"))
    metadata |= extra or {}
    return dg.AssetCheckResult(
        passed=verdict.passed,
        severity=dg.AssetCheckSeverity.ERROR if waiver is None else dg.AssetCheckSeverity.WARN,
        check_name=gate.name,
        asset_key=gate.asset,
        description=description,
        metadata=metadata,
    )


def stop(
    instance: dg.DagsterInstance,
    run: str,
    platform: Platform,
    release: str,
    failed: Sequence[tuple[Gate, Verdict]],
) -> NoReturn:
    """Tags the run with the failed gates and ends the step.

    Raises:
        dagster.Failure: always.
    """
    owner = platform.spec(release).owner
    instance.add_run_tags(run, {FAILED_GATE_TAG: ",".join(gate.name for gate, _ in failed)})
    raise dg.Failure(
        description=" ".join(
            f"Gate {gate.name} {_outcome(verdict)} for {release}: {verdict.reason} "
            f"Measured: {verdict.measured}. Threshold: {verdict.threshold}. "
            f"To do: {verdict.next_action}. Owner: {verdict.owner}; of the model: {owner}."
            for gate, verdict in failed
        ),
        metadata={
            "gates": ", ".join(gate.name for gate, _ in failed),
            "next_action": "; ".join(verdict.next_action for _, verdict in failed),
            "owner": ", ".join(dict.fromkeys(verdict.owner for _, verdict in failed)),
        },
        allow_retries=False,
    )


def report_route(context: dg.AssetExecutionContext, route: Route) -> None:
    """Shows a change of a production route as an event of the external asset `production_route`."""
    event = route_event(route)
    context.instance.add_dynamic_partitions(str(MODELS.name), [route.model])
    context.log_event(event)


def route_event(route: Route) -> dg.AssetMaterialization:
    """A route as Dagster shows it."""
    return dg.AssetMaterialization(
        "production_route",
        partition=route.model,
        description=f"{route.reason}, by {route.actor}",
        metadata={
            "serving": route.serving.release if route.serving else "nothing",
            "package": route.serving.package if route.serving else "none",
            "generation": route.generation,
            "actor": route.actor,
            "reason": route.reason,
            "route": dg.MetadataValue.json(route.model_dump(mode="json")),
        },
        tags={"dagster/data_version": digest_of(canonical_json(route.model_dump(mode="json")))},
    )


def _outcome(verdict: Verdict) -> str:
    return "failed" if verdict.decision is Decision.FAILED else "could not be decided"


def _table(findings: Sequence[Finding]) -> dg.TableMetadataValue:
    """Measured beside expected, a row for each value that decided."""
    return dg.MetadataValue.table(
        [
            dg.TableRecord(
                {
                    "metric": finding.metric,
                    "slice": finding.slice or "all",
                    "measured": "none" if finding.value is None else f"{finding.value:.6g}",
                    "expected": finding.threshold,
                    "result": finding.decision.value,
                    "interval": ""
                    if finding.interval is None
                    else f"{finding.interval.low:.6g} to {finding.interval.high:.6g} "
                    f"({finding.interval.confidence:.0%}, {finding.interval.method})",
                    "n": "" if finding.n is None else str(finding.n),
                    "note": finding.note,
                }
            )
            for finding in findings
        ]
    )


def _metadata(value: Any) -> Any:
    if isinstance(value, bool | int | float | str | dg.MetadataValue):
        return value
    return dg.MetadataValue.json(value)
