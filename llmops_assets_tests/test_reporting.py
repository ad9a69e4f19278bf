"""Gates in real Dagster runs, in process: what fails stops, says why, and is on record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterInstance, ExecuteInProcessResult

from llmops_assets.definitions import definitions_for
from llmops_assets.errors import LLMOpsError, SpecError, StoreError
from llmops_assets.evidence.gates import (
    APPROVED,
    CANDIDATE_SMOKE,
    LEAKAGE,
    PROVEN,
    STAGING_LATENCY,
    STAGING_SMOKE,
)
from llmops_assets.evidence.verdicts import verdicts
from llmops_assets.operate.incidents import incidents_of
from llmops_assets.partitions import RELEASES
from llmops_assets.reporting import FAILED_GATE_TAG, explained
from llmops_assets.serving.slots import Colour, Environment, Slot
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.io_manager import ArtifactIOManager
from llmops_assets.tools import PROGRESS_PREFIX

from .release_rig import ANSWERS, FAILED, MODEL, SPEC, Rig, deploy, serving

pytestmark = pytest.mark.timeout(120)
BLUE = Slot(Environment.PRODUCTION, MODEL, Colour.BLUE)
DATA = ("model_spec", "training_data", "evaluation_data")
APPROVE = {
    "ops": {
        "production_approval": {
            "config": {"approver": "bob", "decision": "approve", "reason": "it answers well"}
        }
    }
}


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    """A Dagster of the test's own, in memory."""
    with DagsterInstance.ephemeral() as instance:
        yield instance


class Runs:
    """Runs of the real definitions on the rig's platform."""

    def __init__(self, rig: Rig, instance: DagsterInstance) -> None:
        self.rig = rig
        self.instance = instance
        self.definitions = definitions_for(rig.platform)

    def job(
        self, name: str, release: str | None, config: dict[str, Any] | None = None
    ) -> ExecuteInProcessResult:
        if release is not None:
            self.instance.add_dynamic_partitions(str(RELEASES.name), [release])
        return self.definitions.resolve_job_def(name).execute_in_process(
            instance=self.instance, partition_key=release, run_config=config or {},
            raise_on_error=False,
        )  # fmt: skip

    def check(self, release: str, asset: str, name: str) -> ExecuteInProcessResult:
        """One check alone, as "Execute" in the UI does."""
        self.instance.add_dynamic_partitions(str(RELEASES.name), [release])
        job = self.definitions.resolve_implicit_global_asset_job_def().get_subset(
            asset_selection=frozenset(),
            asset_check_selection=frozenset([dg.AssetCheckKey(dg.AssetKey(asset), name)]),
        )
        return job.execute_in_process(
            instance=self.instance, partition_key=release, raise_on_error=False
        )

    def assets(self, release: str, *names: str) -> ExecuteInProcessResult:
        """As selected in the UI: these assets with their checks."""
        self.instance.add_dynamic_partitions(str(RELEASES.name), [release])
        return self.definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=self.instance, partition_key=release, raise_on_error=False,
            asset_selection=[dg.AssetKey(name) for name in names],
        )  # fmt: skip


@pytest.fixture
def runs(rig: Rig, instance: DagsterInstance) -> Runs:
    return Runs(rig, instance)


def failures(result: ExecuteInProcessResult) -> dict[str, dg.StepFailureData]:
    """Why each failed step failed."""
    return {
        str(event.step_key): event.step_failure_data
        for event in result.all_events
        if event.is_step_failure
    }


def description(result: ExecuteInProcessResult, step: str) -> str:
    """What the UI shows of a failed step."""
    data = failures(result)[step].user_failure_data
    assert data is not None
    assert data.description is not None
    return data.description


def materialized(result: ExecuteInProcessResult) -> set[str]:
    return {
        event.asset_key.to_user_string()
        for event in result.get_asset_materialization_events()
        if event.asset_key is not None
    }


def evaluations(result: ExecuteInProcessResult) -> dict[str, bool]:
    return {e.check_name: e.passed for e in result.get_asset_check_evaluations()}


def write_data(rig: Rig, training: list[str], evaluation: list[str]) -> None:
    for split, prompts in (("training", training), ("evaluation", evaluation)):
        rows = [{"prompt": p, "completion": "x", "slice": "s"} for p in prompts]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (rig.root / f"{split}.jsonl").write_text(lines)


def test_failing_gate_stops_the_run_and_says_all(runs: Runs) -> None:
    """The real data tool, a real leak: nothing behind the gate may start."""
    write_data(runs.rig, ["one", "two"], ["two", "three"])
    result = runs.assets("parrot.v1", *DATA, "checkpoint")
    assert not result.success
    assert materialized(result) == set(DATA)
    assert evaluations(result) == {"spec_complete": True, "no_leakage": False}
    text = description(result, "training_data_gates")
    for part in ("no_leakage", "parrot.v1", "Measured: {'leaked_rows': 1", "'examples': ['two']",
                 "Threshold: {'leaked_rows': 0}", LEAKAGE.next_action, "team:tests"):  # fmt: skip
        assert part in text
    run = runs.instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.tags[FAILED_GATE_TAG] == "no_leakage"


def test_verdict_is_on_record_before_the_check_is_shown(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the check may rely on the record; the other order could lose it."""
    seen: list[bool] = []

    def show(gate: Any, verdict: Any, waiver: Any) -> dg.AssetCheckResult:
        recorded = verdicts(runs.rig.platform.evidence, "parrot.v1").get(gate.name)
        seen.append(recorded == verdict)
        return dg.AssetCheckResult(passed=True, check_name=gate.name, asset_key=gate.asset)

    monkeypatch.setattr("llmops_assets.reporting.check_result", show)
    assert runs.assets("parrot.v1", "model_spec").success
    assert seen == [True]


def test_verdict_names_the_run_that_judged(runs: Runs) -> None:
    """From the record an auditor goes to the run's log."""
    result = runs.assets("parrot.v1", "model_spec")
    assert verdicts(runs.rig.platform.evidence, "parrot.v1")["spec_complete"].run == result.run_id


def test_downstream_asset_alone_in_another_run_is_refused(runs: Runs) -> None:
    """`blocking=True` holds within one run only; `require` holds always."""
    runs.rig.build("parrot.v1", 1)
    runs.rig.judge("parrot.v1", [LEAKAGE], FAILED)
    result = runs.assets("parrot.v1", "staging_deployment")
    assert not result.success
    text = description(result, "staging_deployment")
    assert "no_leakage: failed: the test says so" in text
    assert LEAKAGE.next_action in text
    assert runs.rig.platform.slots.calls == []


def test_gate_of_something_that_is_not_there_yet_is_explained(runs: Runs) -> None:
    """Running a check before its asset is one click in the UI."""
    runs.rig.freeze("parrot.v1")
    runs.instance.add_dynamic_partitions(str(RELEASES.name), ["parrot.v1"])
    job = runs.definitions.resolve_implicit_global_asset_job_def()
    key = dg.AssetCheckKey(dg.AssetKey("evaluation"), "accuracy")
    result = job.get_subset(asset_selection=set(), asset_check_selection={key}).execute_in_process(
        instance=runs.instance, partition_key="parrot.v1", raise_on_error=False
    )
    text = description(result, "evaluation_gates")
    assert "no checkpoint, no evaluation_data, no evaluation" in text
    assert "materialize checkpoint, evaluation_data, evaluation of partition parrot.v1" in text
    assert verdicts(runs.rig.platform.evidence, "parrot.v1") == {}


def test_a_release_reaches_production_and_is_retired(runs: Runs) -> None:
    """Staging to removal through the real jobs, each gate judging what really happened."""
    rig = runs.rig
    for version in (1, 2):
        rig.build(f"parrot.v{version}", version)
        assert runs.assets(f"parrot.v{version}", "staging_deployment").success
        result = runs.job("promote", f"parrot.v{version}", APPROVE)
        assert result.success, failures(result)
        assert serving(rig) == version
        assert evaluations(result) == dict.fromkeys(
            ["no_regression", "separation_of_duties", "candidate_smoke", "canary"], True
        )
    column = rig.platform.column("parrot.v2")
    assert len(rig.platform.require("parrot.v2", PROVEN, column)) == len(PROVEN)
    (event,) = [e for e in result.get_asset_materialization_events()
                if e.asset_key == dg.AssetKey("production_route")]  # fmt: skip
    assert event.partition == MODEL

    assert runs.job("observe", "parrot.v2").success
    assert runs.job("scale", "parrot.v2").success
    for job in ("deprecate", "archive_release", "remove", "audit"):
        result = runs.job(job, "parrot.v1")
        assert result.success, (job, failures(result))
    assert not rig.platform.slots.state(BLUE).running
    assert (rig.platform.settings.cold / "parrot.v1.tar").exists()
    assert runs.job("report", None).success
    assert serving(rig) == 2


def test_promotion_without_a_decision_fails_with_the_command(runs: Runs) -> None:
    """A run never waits for a human."""
    runs.rig.build("parrot.v1", 1)
    assert runs.assets("parrot.v1", "staging_deployment").success
    result = runs.job("promote", "parrot.v1")
    assert "llmops promote parrot.v1 --approver" in description(result, "production_approval")
    assert materialized(result) == set()
    assert serving(runs.rig) is None


def test_requester_cannot_approve(runs: Runs) -> None:
    """Separation of duties stops the run before production loads anything."""
    runs.rig.build("parrot.v1", 1)
    assert runs.assets("parrot.v1", "staging_deployment").success
    config = json.loads(json.dumps(APPROVE).replace("bob", "ada"))
    result = runs.job("promote", "parrot.v1", config)
    assert not evaluations(result)["separation_of_duties"]
    assert runs.rig.platform.slots.slots(Environment.PRODUCTION, MODEL) == ()
    refused = runs.assets("parrot.v1", "production_candidate")
    assert "separation_of_duties: failed" in description(refused, "production_candidate")


def test_wrong_answers_in_staging_stop_the_release(runs: Runs) -> None:
    """The model that passed its gates is not what Triton serves: found before production."""
    runs.rig.build("parrot.v1", 1)
    runs.rig.platform.slots.answers = {**ANSWERS, "ping": "pang"}
    result = runs.assets("parrot.v1", "staging_deployment")
    assert evaluations(result) == {STAGING_SMOKE.name: False, STAGING_LATENCY.name: False}
    assert "'ping' gave 'pang', not 'pong'" in description(result, "staging_deployment_gates")


def failed_canary(runs: Runs) -> ExecuteInProcessResult:
    """A second release that is well in its slot, but wrong through the gateway."""
    for version in (1, 2):
        runs.rig.build(f"parrot.v{version}", version)
        assert runs.assets(f"parrot.v{version}", "staging_deployment").success
    assert runs.job("promote", "parrot.v1", APPROVE).success
    runs.rig.platform.gateway.answers = {**ANSWERS, "hello": "wrld"}
    return runs.job("promote", "parrot.v2", APPROVE)


def test_failed_canary_moves_the_route_back_and_claims_nothing(runs: Runs) -> None:
    """The column must never say that a release deployed which did not."""
    result = failed_canary(runs)
    assert not result.success
    assert evaluations(result)["canary"] is False
    assert "production_deployment" not in materialized(result)
    assert runs.rig.platform.columns.find("parrot.v2", "production_deployment") is None
    record = runs.instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(dg.AssetKey("production_deployment"), "canary"), limit=1
    )[0]
    assert record.status.value == "FAILED"
    assert serving(runs.rig) == 1
    verdict = verdicts(runs.rig.platform.evidence, "parrot.v2")["canary"]
    assert (verdict.passed, verdict.run) == (False, result.run_id)
    (incident,) = incidents_of(runs.rig.platform.evidence, MODEL, "parrot.v2").incidents
    assert incident.action == "the route went back to parrot.v1"
    assert "'hello' gave 'wrld'" in incident.what
    run = runs.instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.tags[FAILED_GATE_TAG] == "canary"
    assert "Owner: team:platform; of the model: team:tests" in (
        description(result, "production_deployment")
    )
    records = runs.instance.fetch_materializations(dg.AssetKey("production_route"), limit=10)
    shown = [record.asset_materialization for record in reversed(records.records)]
    assert [m.metadata["generation"].value for m in shown if m is not None] == [1, 2, 3]


def test_rollback_does_not_lead_to_a_release_that_failed_its_canary(runs: Runs) -> None:
    """It never served fully; a hurried rollback afterwards must not bring it back."""
    failed_canary(runs)
    result = runs.job("rollback", None, {
        "ops": {"roll_back_route": {"config": {"model": MODEL, "reason": "at night"}}}
    })  # fmt: skip
    assert "nothing to roll parrot back to" in description(result, "roll_back_route")
    assert serving(runs.rig) == 1


@pytest.mark.usefixtures("packages")
def test_rollback_job_moves_the_route_and_shows_it(runs: Runs) -> None:
    """The same as on the command line, for whoever is in the UI."""
    deploy(runs.rig, 1)
    deploy(runs.rig, 2)
    result = runs.job("rollback", None, {
        "ops": {"roll_back_route": {"config": {"model": MODEL, "reason": "wrong dates"}}}
    })  # fmt: skip
    assert result.success
    assert serving(runs.rig) == 1
    assert materialized(result) == {"production_route"}


def test_evicted_candidate_is_not_deployed(runs: Runs) -> None:
    """Between candidate and deployment another release may have taken the idle slot."""
    rig = runs.rig
    rig.build("parrot.v1", 1)
    rig.build("parrot.v2", 2)
    assert runs.assets("parrot.v1", "staging_deployment").success
    assert runs.job("promote", "parrot.v1", APPROVE).success
    other = rig.deployment("parrot.v2", 2)
    rig.platform.slots.start(BLUE, rig.platform.store.describe(other.package), other)
    result = runs.assets("parrot.v1", "production_deployment")
    assert "does not serve the candidate" in description(result, "production_deployment")


def test_deprecated_release_is_not_deployed_again(runs: Runs) -> None:
    """It was taken off all routes on purpose."""
    runs.rig.build("parrot.v1", 1)
    assert runs.job("deprecate", "parrot.v1").success
    result = runs.assets("parrot.v1", "staging_deployment")
    assert "is deprecated" in description(result, "staging_deployment")


def test_removal_waits_for_an_archive_that_restores(runs: Runs) -> None:
    """Deleting first would be the end of the bytes."""
    rig = runs.rig
    rig.build("parrot.v1", 1)
    assert runs.assets("parrot.v1", "staging_deployment").success
    assert runs.job("deprecate", "parrot.v1").success
    assert runs.job("archive_release", "parrot.v1").success
    (rig.platform.settings.cold / "parrot.v1.tar").write_bytes(b"rotten")
    job = runs.definitions.resolve_implicit_global_asset_job_def()
    key = dg.AssetCheckKey(dg.AssetKey("archive"), "restores")
    judged = job.get_subset(asset_selection=set(), asset_check_selection={key}).execute_in_process(
        instance=runs.instance, partition_key="parrot.v1", raise_on_error=False
    )
    assert evaluations(judged) == {"restores": False}
    result = runs.job("remove", "parrot.v1")
    assert "restores: failed" in description(result, "removed_version")
    assert ("clear", "staging/parrot/blue") not in rig.platform.slots.calls


def test_error_with_a_cure_is_the_failures_description(runs: Runs) -> None:
    """A stack trace on the run page hides the one sentence that helps."""
    runs.rig.write_spec(SPEC.replace("owner: team:tests", "owner: nobody"))
    result = runs.assets("parrot.v1", "model_spec")
    text = description(result, "model_spec")
    assert "line 3: owner" in text
    assert "To do: " in text
    with pytest.raises(dg.Failure) as caught, explained():
        raise SpecError("It is wrong", cure="mend it")
    assert caught.value.description == "It is wrong. To do: mend it."
    assert caught.value.allow_retries is False
    with pytest.raises(ZeroDivisionError), explained():
        raise ZeroDivisionError


def test_failing_tool_is_shown_with_its_last_words(runs: Runs) -> None:
    """The data team reads why their file was refused on the run page."""
    write_data(runs.rig, ["one"], ["two"])
    (runs.rig.root / "training.jsonl").write_text('{"prompt": 1}\n')
    text = description(runs.assets("parrot.v1", *DATA), "training_data")
    assert "building data failed" in text
    assert "training.jsonl" in text
    assert PROGRESS_PREFIX not in text


def test_edited_spec_does_not_change_a_frozen_release(runs: Runs) -> None:
    """Materializing model_spec again must not swap the thresholds under a release."""
    assert runs.assets("parrot.v1", "model_spec").success
    frozen = runs.rig.platform.spec("parrot.v1")
    runs.rig.write_spec(SPEC.replace("at_least: 0.9,", "at_least: 0.1,"))
    assert runs.assets("parrot.v1", "model_spec").success
    assert runs.rig.platform.spec("parrot.v1") == frozen
    assert runs.assets("parrot.v2", "model_spec").success
    assert runs.rig.platform.spec("parrot.v2") != frozen
    facts = runs.rig.platform.columns.get("parrot.v2", "model_spec").facts
    assert facts["derived_from"] == "parrot.v1"


def test_metadata_names_inputs_and_output_by_digest(runs: Runs) -> None:
    """Dagster's own partition pointers are not reliable; the audit reads these."""
    write_data(runs.rig, ["one"], ["two"])
    result = runs.assets("parrot.v1", *DATA)
    assert result.success, failures(result)
    column = runs.rig.platform.column("parrot.v1")
    for event in result.get_asset_materialization_events():
        material = event.step_materialization_data.materialization
        handle = column[material.asset_key.to_user_string()]
        assert material.metadata["digest"].value == handle.digest
        assert material.metadata["inputs"].value == handle.result.inputs
        assert material.tags is not None
        assert material.tags["dagster/data_version"] == handle.digest


def test_io_manager_refuses_what_was_not_published(rig: Rig) -> None:
    """An asset that reports other bytes than the store has would break lineage silently."""
    published = rig.publish("parrot.v1", "engine", {"a": "1"})
    other = rig.publish("parrot.v2", "engine", {"a": "2"})
    manager = ArtifactIOManager(lambda: rig.platform.columns)
    context = dg.build_output_context(
        asset_key=dg.AssetKey("engine"), partition_key="parrot.v1", step_key="engine", name="result"
    )
    manager.handle_output(context, ArtifactHandle(published, rig.platform.store))
    with pytest.raises(StoreError, match="reports what it has not published"):
        manager.handle_output(context, ArtifactHandle(other, rig.platform.store))
    missing = dg.build_output_context(
        asset_key=dg.AssetKey("evaluation"), partition_key="parrot.v1", step_key="e", name="result"
    )
    with pytest.raises(LLMOpsError, match="has no evaluation yet"):
        manager.handle_output(missing, ArtifactHandle(published, rig.platform.store))


def test_io_manager_passes_handles_whose_bytes_are_verified(rig: Rig) -> None:
    """Bytes never pass through Dagster, and are checked when first asked for."""
    result = rig.publish("parrot.v1", "engine", {"a": "1"})
    upstream = dg.build_output_context(asset_key=dg.AssetKey("engine"))
    context = dg.build_input_context(
        asset_key=dg.AssetKey("engine"), partition_key="parrot.v1", upstream_output=upstream
    )
    handle = ArtifactIOManager(lambda: rig.platform.columns).load_input(context)
    assert handle.digest == result.artifact
    assert (handle.path / "a").read_text() == "1"
    blob = (
        Path(rig.platform.settings.store)
        / "blobs"
        / handle.artifact.files[0].digest.replace(":", "/")
    )
    blob.unlink()
    (handle.path / "a").chmod(0o600)
    (handle.path / "a").write_text("2")
    fresh = ArtifactIOManager(lambda: rig.platform.columns).load_input(context)
    with pytest.raises(StoreError):
        _ = fresh.path


def test_what_production_needs_is_everything_before_it() -> None:
    """The chain of gate lists must not lose a member on its way."""
    assert CANDIDATE_SMOKE not in APPROVED
    assert set(APPROVED) < set(PROVEN)
    assert STAGING_SMOKE in APPROVED
    assert LEAKAGE in PROVEN
