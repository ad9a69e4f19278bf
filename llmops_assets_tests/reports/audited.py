"""Releases whose records look like those of real tools, so that an audit of them says something."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmops_assets.build.packaging import PACKAGE_MEDIA_TYPE
from llmops_assets.compliance.model_card import ModelCard
from llmops_assets.develop.specs import SpecSource
from llmops_assets.evidence.package_signature import sign_once
from llmops_assets.platform import SPEC_FILE
from llmops_assets.spec import ModelSpec, canonical, parse_spec
from llmops_assets.storage.columns import Action, Workshop

from ..release_rig import SPEC, Rig

COMMIT = "c" * 40
CARD = ModelCard(
    license="Apache-2.0",
    languages=("en",),
    intended_use="Repeating words in tests of this platform.",
    limitations="Knows two words and no other.",
    training_data="Two rows that a person typed for this test.",
    evaluation="Exact match on held-out rows, by slice.",
    contact="team:tests",
)
AUDITED_SPEC = SPEC.replace(
    "data: {source: files, training: training.jsonl, evaluation: evaluation.jsonl}",
    "data: {source: files, training: training.jsonl, evaluation: evaluation.jsonl, "
    "license: CC0-1.0, provenance: Typed by a person for the tests of this platform.}",
).replace(
    "weights: {source: path, path: checkpoint}",
    "weights: {source: train, steps: 300}\ncard: " + CARD.model_dump_json(exclude={"base_model"}),
)  # fmt: skip
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}
TOOLS = {"onnxruntime": "1.32.0", "onnxruntime-genai": "0.18.0", "architecture": "x86_64"}


def record_release(
    rig: Rig,
    release: str,
    version: int,
    text: str = AUDITED_SPEC,
    *,
    wrong: Mapping[str, int] | None = None,
    rows: int = 40_000,
) -> None:
    """Brings a release to the end of Build, judged, each step with parameters and versions.

    Args:
        wrong: as `Rig.build`.
        rows: as `record_steps`.
    """
    record_steps(rig, release, text, rows=rows)
    # What is published already stays; the rest comes from there.
    rig.build(release, version, text, wrong)


def record_steps(
    rig: Rig,
    release: str,
    text: str = AUDITED_SPEC,
    *,
    source: SpecSource | None = None,
    versions: Mapping[str, str] = TOOLS,
    rows: int = 40_000,
) -> None:
    """Publishes the bytes of a release that nobody judged yet.

    Args:
        rows: of the training data; other rows are other data.
    """
    spec = parse_spec(text, "test")
    columns = rig.platform.columns
    source = source or SpecSource(file="models/parrot.yaml", commit=COMMIT, changed=False)
    parameters = {
        "release": release, "spec": canonical(spec), "source": source.model_dump()
    }  # fmt: skip
    facts = {
        "use_case": spec.use_case,
        "owner": spec.owner,
        "source": source.model_dump(),
        "derived_from": "nothing: the first release of this model",
        "requested_by": "ada",
    }
    frozen = {SPEC_FILE: json.dumps(canonical(spec)), "source.json": source.model_dump_json()}
    _made(rig, release, "model_spec", frozen, facts, parameters=parameters)
    slices = {"de": rows // 2, "fr": rows // 2}
    data = {"rows": rows, "slices": slices}
    _made(rig, release, "training_data", {"data": f"{rows} rows"}, data, parameters=data)
    _made(
        rig, release, "data_report", {"report.json": "{}"}, {"rows": rows},
        inputs=_digests(rig, release, "training_data"), parameters=_terms(spec),
    )  # fmt: skip
    _made(
        rig, release, "checkpoint", {"model.safetensors": f"weights of {rows}"}, {"loss": 0.05},
        inputs=_digests(rig, release, "training_data"),
        parameters={"weights": canonical(spec.weights)}, versions=VERSIONS,
    )  # fmt: skip
    _made(
        rig, release, "converted_weights", {"weights": f"converted {rows}"}, {},
        inputs=_digests(rig, release, "checkpoint"), versions=versions,
    )  # fmt: skip
    flags = canonical(spec.engine)
    command = ["builder", "--precision", str(flags.get("precision"))]
    _made(
        rig, release, "engine",
        {"engine.json": json.dumps({"commands": [command]}), "model.onnx": repr((flags, versions))},
        {"bytes": 12}, inputs=_digests(rig, release, "converted_weights"),
        parameters={key: value for key, value in flags.items() if key != "toolchain"},
        versions=versions,
    )  # fmt: skip
    engine = columns.get(release, "engine").artifact
    _made(
        rig, release, "packaged_model",
        {
            "package.json": "{}",
            "repository/parrot/config.pbtxt": 'name: "parrot"',
            "repository/parrot/engine": engine,
        },
        {"bytes": 12}, inputs=_digests(rig, release, "engine", "checkpoint"),
        media_type=PACKAGE_MEDIA_TYPE,
    )  # fmt: skip
    report = {"card": spec.card.model_dump(mode="json")}
    _made(
        rig, release, "compliance_report",
        {"report.json": json.dumps(report), "bom.cdx.json": '{"bomFormat": "CycloneDX"}'}, {},
        inputs=_digests(rig, release, "packaged_model", "checkpoint"),
    )  # fmt: skip
    sign_once(rig.platform.store, columns.get(release, "packaged_model").artifact,
              rig.platform.settings)  # fmt: skip


def _terms(spec: ModelSpec) -> dict[str, Any]:
    return {"license": spec.data.license, "provenance": spec.data.provenance}


def _digests(rig: Rig, release: str, *assets: str) -> dict[str, str]:
    return {asset: rig.platform.columns.get(release, asset).artifact for asset in assets}


def _made(
    rig: Rig,
    release: str,
    asset: str,
    files: Mapping[str, str],
    facts: Mapping[str, Any],
    *,
    inputs: Mapping[str, str] | None = None,
    parameters: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    media_type: str = "application/vnd.llmops.test",
) -> None:
    def make(workshop: Workshop) -> Mapping[str, Any]:
        for name, content in files.items():
            path = workshop.output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return facts

    action = Action(asset, media_type, inputs or {}, parameters or {}, versions or {})
    rig.platform.columns.produce(release, action, make)
