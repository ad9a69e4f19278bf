"""A release whose data, checkpoint and package are real enough to be reported on."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from llmops_assets.compliance.bill_of_materials import Runtime
from llmops_assets.compliance.data_report import DATA_REPORT_FILE, DataReport
from llmops_assets.compliance.dependencies import Dependency
from llmops_assets.compliance.package_report import declare, report_package, serving_environment
from llmops_assets.compliance.pii import find_pii
from llmops_assets.develop.data import build_data
from llmops_assets.storage.artifacts import ArtifactHandle

from ..release_rig import MODEL, SPEC, Rig
from ..tiny_llama import write_checkpoint

RELEASE = f"{MODEL}.v1"
PROVENANCE = "Written by the team for these tests."
DECLARED = SPEC.replace(
    "evaluation: evaluation.jsonl}",
    f"evaluation: evaluation.jsonl, license: MIT, provenance: {PROVENANCE}}}",
)
CARDED = (
    DECLARED
    + """\
card:
  license: Apache-2.0
  languages: [en]
  intended_use: Repeats in tests what it was told.
  limitations: Knows two answers and no more.
  training_data: Two sentences that the team wrote.
  evaluation: Exact match on four sentences.
  contact: team:tests
"""
)
METRICS = {
    "rows": 4, "exact_match": 0.5, "slices": {"even": {"rows": 2, "exact_match": 1.0}},
    "latency_seconds": {"p50": 0.1},
}  # fmt: skip
TOKENIZER_CONFIG = "repository/parrot/version/tokenizer_config.json"
PACKAGE: Mapping[str, str | bytes] = {
    "package.json": "{}",
    "repository/parrot/config.pbtxt": 'name: "parrot"',
    "repository/parrot/version/engine/model.onnx": bytes(range(256)),
    TOKENIZER_CONFIG: '{"eos_token": "</s>"}',
}
SUBJECTS = ("packaged_model", "checkpoint", "training_data", "evaluation_data", "evaluation")


@functools.cache
def checkpoint_files() -> Mapping[str, bytes]:
    """Those of a Llama with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder, "checkpoint"))
        return {path.name: path.read_bytes() for path in Path(folder, "checkpoint").iterdir()}


@functools.cache
def environment() -> tuple[Runtime, tuple[Dependency, ...]]:
    """What serves packages on this machine, without any toolchain."""
    return serving_environment(())


def publish(
    rig: Rig,
    spec: str = CARDED,
    package: Mapping[str, str | bytes] | None = None,
    checkpoint: Mapping[str, str | bytes] | None = None,
) -> Mapping[str, ArtifactHandle]:
    """Everything that is reported on; what is given is added to package and checkpoint."""
    rig.freeze(RELEASE, spec)
    for split in ("training_data", "evaluation_data"):
        rig.publish(RELEASE, split, {"content": split})
    rig.publish(RELEASE, "evaluation", {"evaluation.json": json.dumps(METRICS)}, facts=METRICS)
    rig.publish(RELEASE, "checkpoint", {**checkpoint_files(), **(checkpoint or {})})
    rig.publish(RELEASE, "packaged_model", {**PACKAGE, **(package or {})})
    return rig.platform.column(RELEASE)


def report(rig: Rig, column: Mapping[str, ArtifactHandle]) -> Mapping[str, ArtifactHandle]:
    """The same with a compliance report."""
    declaration = declare(
        rig.platform.spec(RELEASE), {asset: column[asset] for asset in SUBJECTS}, *environment()
    )
    output = rig.root / "compliance_report"
    report_package(declaration, column["packaged_model"].path, column["checkpoint"].path, output)
    rig.publish(
        RELEASE, "compliance_report", {path.name: path.read_bytes() for path in output.iterdir()}
    )
    return rig.platform.column(RELEASE)


def data_column(rig: Rig, prompts: list[str], spec: str = DECLARED) -> Mapping[str, ArtifactHandle]:
    """Training data with these prompts, and what was found in them."""
    data = rig.freeze(RELEASE, spec).data
    rows = [{"prompt": prompt, "completion": "fine", "slice": "all"} for prompt in prompts]
    (rig.root / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = rig.root / "training"
    build_data(data, "training", folder, rig.root)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    digest = rig.publish(RELEASE, "training_data", files).artifact
    found = find_pii(folder)
    document = DataReport(
        data=digest, rows=found.rows, license=data.license, provenance=data.provenance,
        personal_data=found,
    )  # fmt: skip
    rig.publish(RELEASE, "data_report", {DATA_REPORT_FILE: document.model_dump_json()})
    return rig.platform.column(RELEASE)
