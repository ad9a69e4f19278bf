"""The bill of materials of a packaged model: a CycloneDX ML-BOM.

CycloneDX 1.6 (ECMA-424), https://cyclonedx.org/docs/1.6/json. The library has no classes
for a component's `modelCard` and `data`; these are added to its output, and all of it is
validated with CycloneDX's own schema.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.compliance.dependencies import Dependency
from llmops_assets.compliance.model_card import ModelCard
from llmops_assets.errors import DataError
from llmops_assets.storage.store import Artifact, FileEntry, check_digest
from llmops_assets.versions import versions_of

MODEL_REF = "model"
TOOLS = ("cyclonedx-python-lib", "llmops-assets")
ERRORS_SHOWN = 5


class Dataset(BaseModel):
    """Data that a model was trained or evaluated on; `digest` is that of its artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str
    description: str = ""
    licence: str | None = None


class Runtime(BaseModel):
    """What serves the package: an image by its digest, or a server from a wheel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["container", "wheel"]
    name: str
    version: str
    digest: str | None = Field(default=None, description="sha256:<hex>, where it is known.")


class Metric(BaseModel):
    """One measured value; `slice` names the part of the data, empty means all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    value: float
    slice: str = ""


class Materials(BaseModel):
    """What goes into a packaged model.

    `digest` and `files` are the package's; `made_from` has the digest of each artifact it
    was made from, by asset. `card` has its licence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str
    files: tuple[FileEntry, ...]
    card: ModelCard
    architecture: str = Field(description="As config.json names it, such as LlamaForCausalLM.")
    made_from: dict[str, str]
    datasets: tuple[Dataset, ...]
    metrics: tuple[Metric, ...] = ()
    runtime: Runtime
    dependencies: tuple[Dependency, ...]


def bill_of_materials(materials: Materials) -> bytes:
    """The ML-BOM as JSON, validated; equal materials give equal bytes.

    It has no timestamp, and its serial number derives from the package's digest, so it
    lies beside the package and not in it.

    Raises:
        StoreError: a digest is not of the form sha256:<hex>.
        DataError: what was made is not valid, see `validation_errors`.
    """
    cyclonedx = _library()
    model = _model(cyclonedx, materials)
    datasets = [_dataset(cyclonedx, dataset) for dataset in materials.datasets]
    runtime = _runtime(cyclonedx, materials.runtime)
    packages = {
        dependency.name: _package(cyclonedx, dependency) for dependency in materials.dependencies
    }
    bom = cyclonedx.Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"urn:llmops:package:{materials.digest}"),
        metadata=cyclonedx.BomMetaData(
            component=model, tools=cyclonedx.ToolRepository(components=_tools(cyclonedx))
        ),
        components=[*datasets, runtime, *packages.values()],
    )
    bom.register_dependency(model, [*datasets, runtime])
    bom.register_dependency(runtime, packages.values())
    for dependency in materials.dependencies:
        bom.register_dependency(
            packages[dependency.name],
            [packages[name] for name in dependency.requires if name in packages],
        )
    document: dict[str, Any] = json.loads(cyclonedx.JsonV1Dot6(bom).output_as_string())
    # The time of a verdict is in its record; here it would change equal bytes.
    del document["metadata"]["timestamp"]
    document["metadata"]["component"]["modelCard"] = _model_card(materials)
    described = {_dataset_ref(dataset): dataset for dataset in materials.datasets}
    for component in document["components"]:
        if (dataset := described.get(component["bom-ref"])) is not None:
            component["data"] = [{"type": "dataset", **_described(dataset)}]
    content = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    if errors := validation_errors(content.encode()):
        raise DataError(
            f"The bill of materials of {materials.name} is not valid CycloneDX",
            found="; ".join(errors),
            cure="correct the values it names; they come from the spec and from installed packages",
        )
    return content.encode()


def validation_errors(document: bytes) -> tuple[str, ...]:
    """Where a document differs from CycloneDX 1.6's JSON schema; empty if it is valid."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator: Any = JsonStrictValidator(SchemaVersion.V1_6)
    try:
        errors = validator.validate_str(document.decode(), all_errors=True)
    except ValueError as error:
        return (f"not JSON: {error}",)
    return tuple(f"{error.data.json_path}: {error.data.message}" for error in list(errors or ()))[
        :ERRORS_SHOWN
    ]


def mismatches(document: bytes, package: Artifact) -> tuple[str, ...]:
    """Where a valid bill speaks of other bytes than the package's; empty if it is about them."""
    model = json.loads(document)["metadata"]["component"]
    named = {part["name"]: _sha256(part) for part in model.get("components", ())}
    held = {file.path: file.digest for file in package.files}
    found = (
        [] if _sha256(model) == package.digest else [f"it is about the package {_sha256(model)}"]
    )
    found += [
        f"{path} is {named.get(path) or 'not there'} in it and {held.get(path) or 'not there'} in "
        "the package"
        for path in sorted({*named, *held})
        if named.get(path) != held.get(path)
    ]
    return tuple(found[:ERRORS_SHOWN])


def _sha256(component: Mapping[str, Any]) -> str:
    hashes = {entry["alg"]: entry["content"] for entry in component.get("hashes", ())}
    return f"sha256:{hashes.get('SHA-256')}"


def _library() -> Any:
    """What is used of the library, untyped: its decorators hide the classes' constructors."""
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.tool import ToolRepository
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    return SimpleNamespace(
        Bom=Bom,
        BomMetaData=BomMetaData,
        Component=Component,
        ComponentType=ComponentType,
        HashAlgorithm=HashAlgorithm,
        HashType=HashType,
        JsonV1Dot6=JsonV1Dot6,
        LicenseFactory=LicenseFactory,
        PackageURL=PackageURL,
        Property=Property,
        ToolRepository=ToolRepository,
    )


def _tools(cyclonedx: Any) -> list[Any]:
    """What made the bill. Without addresses, whose syntax the validator needs a second to check."""
    return [
        cyclonedx.Component(type=cyclonedx.ComponentType.LIBRARY, name=name, version=version)
        for name, version in versions_of(*TOOLS).items()
    ]


def _model(cyclonedx: Any, materials: Materials) -> Any:
    files = [
        cyclonedx.Component(
            type=cyclonedx.ComponentType.FILE,
            name=file.path,
            bom_ref=f"file:{file.path}",
            hashes=[_hash(cyclonedx, file.digest)],
            properties=[cyclonedx.Property(name="llmops:size", value=str(file.size))],
        )
        for file in materials.files
    ]
    return cyclonedx.Component(
        type=cyclonedx.ComponentType.MACHINE_LEARNING_MODEL,
        name=materials.name,
        version=materials.digest,
        bom_ref=MODEL_REF,
        description=materials.card.intended_use or None,
        hashes=[_hash(cyclonedx, materials.digest)],
        licenses=_licences(cyclonedx, materials.card.license),
        components=files,
        properties=[
            cyclonedx.Property(name=f"llmops:made-from:{asset}", value=digest)
            for asset, digest in materials.made_from.items()
        ],
    )


def _dataset(cyclonedx: Any, dataset: Dataset) -> Any:
    return cyclonedx.Component(
        type=cyclonedx.ComponentType.DATA,
        name=dataset.name,
        version=dataset.digest,
        bom_ref=_dataset_ref(dataset),
        description=dataset.description or None,
        hashes=[_hash(cyclonedx, dataset.digest)],
        licenses=_licences(cyclonedx, dataset.licence),
    )


def _dataset_ref(dataset: Dataset) -> str:
    return f"data:{dataset.name}"


def _described(dataset: Dataset) -> dict[str, str]:
    described = {"name": dataset.name}
    return {**described, "description": dataset.description} if dataset.description else described


def _runtime(cyclonedx: Any, runtime: Runtime) -> Any:
    is_wheel = runtime.kind == "wheel"
    return cyclonedx.Component(
        type=cyclonedx.ComponentType.APPLICATION if is_wheel else cyclonedx.ComponentType.CONTAINER,
        name=runtime.name,
        version=runtime.version,
        bom_ref="runtime",
        hashes=[_hash(cyclonedx, runtime.digest)] if runtime.digest else None,
        purl=cyclonedx.PackageURL("pypi", None, runtime.name, runtime.version)
        if is_wheel
        else None,
    )


def _package(cyclonedx: Any, dependency: Dependency) -> Any:
    return cyclonedx.Component(
        type=cyclonedx.ComponentType.LIBRARY,
        name=dependency.name,
        version=dependency.version,
        bom_ref=f"pypi:{dependency.name}",
        purl=cyclonedx.PackageURL("pypi", None, dependency.name, dependency.version),
        licenses=_licences(cyclonedx, dependency.licence),
        hashes=[_hash(cyclonedx, f"sha256:{dependency.archive_sha256}")]
        if dependency.archive_sha256
        else None,
        properties=[
            cyclonedx.Property(name="llmops:content-sha256", value=dependency.content_sha256)
        ]
        if dependency.content_sha256
        else None,
    )


def _hash(cyclonedx: Any, digest: str) -> Any:
    return cyclonedx.HashType(alg=cyclonedx.HashAlgorithm.SHA_256, content=check_digest(digest))


def _licences(cyclonedx: Any, declared: str | None) -> list[Any]:
    """An SPDX identifier or expression; any other text as a name."""
    return [cyclonedx.LicenseFactory().make_from_string(declared)] if declared else []


def _model_card(materials: Materials) -> Mapping[str, Any]:
    card = materials.card
    parameters: dict[str, Any] = {
        "task": "text-generation",
        "architectureFamily": "transformer",
        "modelArchitecture": materials.architecture,
        "datasets": [{"ref": _dataset_ref(dataset)} for dataset in materials.datasets],
        "inputs": [{"format": "text"}],
        "outputs": [{"format": "text"}],
    }
    considerations = {
        "useCases": [card.intended_use] if card.intended_use else [],
        "technicalLimitations": [card.limitations] if card.limitations else [],
    }
    further = {
        "llmops:training-data": card.training_data,
        "llmops:evaluation": card.evaluation,
        "llmops:contact": card.contact,
        "llmops:languages": ", ".join(card.languages),
        "llmops:base-model": card.base_model or "",
    }
    return {
        "modelParameters": parameters,
        "quantitativeAnalysis": {
            "performanceMetrics": [
                {"type": metric.name, "value": repr(metric.value)}
                | ({"slice": metric.slice} if metric.slice else {})
                for metric in materials.metrics
            ]
        },
        "considerations": considerations,
        "properties": [{"name": name, "value": value} for name, value in further.items() if value],
    }
