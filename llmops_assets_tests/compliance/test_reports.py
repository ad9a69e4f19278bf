"""`data_report` and `compliance_report` in real Dagster runs, in process: what stops a release."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import dagster as dg
import pytest
from dagster import DagsterInstance, ExecuteInProcessResult

from llmops_assets.compliance.bill_of_materials import validation_errors
from llmops_assets.compliance.package_report import BILL_FILE, declare, read_report
from llmops_assets.definitions import definitions_for
from llmops_assets.errors import DataError, GateRefusedError
from llmops_assets.evidence.gates import COMPLIANCE, DATA_COMPLIANCE, PACKAGE_SAFE
from llmops_assets.evidence.verdicts import verdicts
from llmops_assets.partitions import RELEASES

from ..release_rig import Rig
from .reports import CARDED, METRICS, RELEASE, environment, publish

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A platform whose tools are as urgent as the tests: on a busy machine others starve."""
    monkeypatch.setenv("LLMOPS_TOOL_NICENESS", "0")
    rig = Rig(tmp_path / "rig")
    yield rig
    rig.close()


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    """A Dagster of the test's own, in memory."""
    with DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(str(RELEASES.name), [RELEASE])
        yield instance


def run(rig: Rig, instance: DagsterInstance, *assets: str) -> ExecuteInProcessResult:
    """As selected in the UI: these assets with their checks."""
    job = definitions_for(rig.platform).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance, partition_key=RELEASE, raise_on_error=False,
        asset_selection=[dg.AssetKey(name) for name in assets],
    )  # fmt: skip


def materialized(result: ExecuteInProcessResult) -> set[str]:
    return {
        event.asset_key.to_user_string()
        for event in result.get_asset_materialization_events()
        if event.asset_key is not None
    }


def checked(result: ExecuteInProcessResult) -> Mapping[str, bool]:
    return {check.check_name: check.passed for check in result.get_asset_check_evaluations()}


def test_address_in_the_training_text_stops_the_training(
    rig: Rig, instance: DagsterInstance
) -> None:
    """What a model has learned cannot be taken out of it again."""
    rig.write_spec(CARDED)
    for split, prompts in {
        "training": ["one", "ask jane.doe@example.com"],
        "evaluation": ["two"],
    }.items():
        rows = [{"prompt": prompt, "completion": "x", "slice": "s"} for prompt in prompts]
        (rig.root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (rig.root / "checkpoint").mkdir()
    (rig.root / "checkpoint" / "config.json").write_text("{}")
    wanted = ("model_spec", "training_data", "evaluation_data", "data_report")
    result = run(rig, instance, *wanted, "checkpoint")
    assert not result.success
    assert materialized(result) == {*wanted}
    assert checked(result)["data_compliance"] is False
    verdict = verdicts(rig.platform.evidence, RELEASE)["data_compliance"]
    assert "EMAIL_ADDRESS: 1 in the data, the first in row 2" in verdict.reason
    assert "jane" not in verdict.model_dump_json()
    published = rig.platform.column(RELEASE)["data_report"].result
    assert published.facts["personal_data"] == {"EMAIL_ADDRESS": 1}
    assert published.parameters["license"] == "MIT"
    assert "presidio-analyzer" in published.versions
    with pytest.raises(GateRefusedError, match="EMAIL_ADDRESS"):
        rig.platform.require(RELEASE, [DATA_COMPLIANCE], rig.platform.column(RELEASE))


def test_clean_package_opens_both_gates_with_a_valid_bill(
    rig: Rig, instance: DagsterInstance
) -> None:
    """The bill that is written, of the toolchain that builds here, is valid and complete."""
    publish(rig)
    result = run(rig, instance, "compliance_report")
    assert result.success
    assert checked(result) == {"package_safe": True, "compliance": True}
    column = rig.platform.column(RELEASE)
    rig.platform.require(RELEASE, [PACKAGE_SAFE, COMPLIANCE], column)
    content = (column["compliance_report"].path / BILL_FILE).read_bytes()
    assert validation_errors(content) == ()
    bill = json.loads(content)
    components = {component["bom-ref"]: component for component in bill["components"]}
    assert components["runtime"]["name"] == "nvidia-pytriton"
    assert {"pypi:onnxruntime-genai", "pypi:tokenizers", "pypi:nvidia-pytriton"} <= {*components}
    assert "pypi:dagster" not in components
    model = bill["metadata"]["component"]["modelCard"]
    assert model["modelParameters"]["modelArchitecture"] == "LlamaForCausalLM"
    assert model["quantitativeAnalysis"]["performanceMetrics"] == [
        {"type": "exact_match", "value": "0.5"},
        {"type": "exact_match", "value": "1.0", "slice": "even"},
    ]
    report = read_report(column["compliance_report"].path)
    assert report.digests == {
        asset: column[asset].digest
        for asset in (
            "packaged_model", "checkpoint", "training_data", "evaluation_data", "evaluation",
        )
    }  # fmt: skip


def test_pickle_and_gpl_fail_both_gates(rig: Rig, instance: DagsterInstance) -> None:
    """Both verdicts stand side by side: who mends one thing should know of the other."""
    publish(
        rig,
        CARDED.replace("license: Apache-2.0", "license: GPL-3.0-only"),
        {"repository/parrot/weights.txt": b"\x80\x04N."},
    )
    result = run(rig, instance, "compliance_report")
    assert not result.success
    assert materialized(result) == {"compliance_report"}
    assert checked(result) == {"package_safe": False, "compliance": False}
    found = verdicts(rig.platform.evidence, RELEASE)
    assert "weights.txt: a pickle" in found["package_safe"].reason
    assert "GPL-3.0-only is not allowed" in found["compliance"].reason
    with pytest.raises(GateRefusedError, match="a pickle"):
        rig.platform.require(RELEASE, [PACKAGE_SAFE], rig.platform.column(RELEASE))


def test_evaluation_without_metrics_is_an_error(rig: Rig) -> None:
    """A bill that silently lost them would still be valid."""
    column = publish(rig)
    assert "slices" in METRICS
    rig.publish("parrot.v2", "evaluation", {"evaluation.json": "{}"}, facts={"rows": 4})
    other = {**column, "evaluation": rig.platform.column("parrot.v2")["evaluation"]}
    with pytest.raises(DataError, match="states no metric"):
        declare(rig.platform.spec(RELEASE), other, *environment())
