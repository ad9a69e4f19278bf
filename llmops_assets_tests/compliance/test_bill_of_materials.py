"""The ML-BOM: valid by CycloneDX's own schema, complete, and equal for equal materials."""

from __future__ import annotations

import functools
import json
import uuid
from typing import Any

import pytest

from llmops_assets.compliance.bill_of_materials import (
    Dataset,
    Materials,
    Metric,
    Runtime,
    bill_of_materials,
    validation_errors,
)
from llmops_assets.compliance.dependencies import dependency_record
from llmops_assets.compliance.model_card import ModelCard
from llmops_assets.errors import StoreError
from llmops_assets.storage.store import FileEntry, digest_of

MATERIALS = Materials(
    name="date-normalizer",
    digest=digest_of(b"package"),
    files=(
        FileEntry("package.json", digest_of(b"{}"), 2),
        FileEntry("repository/date-normalizer/config.pbtxt", digest_of(b""), 0),
    ),
    card=ModelCard(
        license="Apache-2.0 OR MIT",
        languages=("en", "de"),
        intended_use="Turns a written date into ISO 8601.",
        limitations="Knows five languages.",
        contact="team:data-science",
    ),
    architecture="LlamaForCausalLM",
    made_from={"checkpoint": digest_of(b"checkpoint"), "engine": digest_of(b"engine")},
    datasets=(
        Dataset(name="training_data", digest=digest_of(b"t"), description="Dates", licence="MIT"),
        Dataset(name="evaluation_data", digest=digest_of(b"e"), licence="LicenseRef-own"),
    ),
    metrics=(
        Metric(name="exact_match", value=0.998),
        Metric(name="exact_match", value=0.99, slice="de"),
    ),
    runtime=Runtime(kind="wheel", name="nvidia-pytriton", version="0.7.0"),
    dependencies=dependency_record(["httpx", "pydantic"]),
)


@functools.cache
def bill() -> bytes:
    return bill_of_materials(MATERIALS)


def parts(materials: Materials = MATERIALS) -> tuple[dict[str, Any], dict[str, Any]]:
    """The document, and its components by reference."""
    document = json.loads(bill_of_materials(materials) if materials != MATERIALS else bill())
    return document, {component["bom-ref"]: component for component in document["components"]}


def test_bill_is_complete() -> None:
    """An auditor finds model, data, server and packages with their digests and licences."""
    document, components = parts()
    model = document["metadata"]["component"]
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert model["type"] == "machine-learning-model"
    assert model["licenses"] == [{"expression": "Apache-2.0 OR MIT"}]
    assert model["hashes"] == [{"alg": "SHA-256", "content": MATERIALS.digest[7:]}]
    assert {file["name"]: file["hashes"][0]["content"] for file in model["components"]} == {
        file.path: file.digest[7:] for file in MATERIALS.files
    }
    assert {entry["name"]: entry["value"] for entry in model["properties"]} == {
        f"llmops:made-from:{asset}": digest for asset, digest in MATERIALS.made_from.items()
    }
    card = model["modelCard"]
    assert card["considerations"]["useCases"] == ["Turns a written date into ISO 8601."]
    assert card["quantitativeAnalysis"]["performanceMetrics"][1] == {
        "type": "exact_match", "value": "0.99", "slice": "de",
    }  # fmt: skip
    for reference in card["modelParameters"]["datasets"]:
        dataset = components[reference["ref"]]
        assert dataset["type"] == "data"
        assert dataset["data"][0]["type"] == "dataset"
    assert components["runtime"]["purl"] == "pkg:pypi/nvidia-pytriton@0.7.0"
    for dependency in MATERIALS.dependencies:
        component = components[f"pypi:{dependency.name}"]
        assert component["purl"] == f"pkg:pypi/{dependency.name}@{dependency.version}"
        assert component["licenses"]
    edges = {entry["ref"]: entry.get("dependsOn", []) for entry in document["dependencies"]}
    assert set(edges["model"]) == {"data:training_data", "data:evaluation_data", "runtime"}
    assert "pypi:httpcore" in edges["pypi:httpx"]


def test_image_is_recorded_by_its_digest() -> None:
    """On a cluster an image serves, and its name says nothing about its bytes."""
    runtime = Runtime(kind="container", name="triton", version="25.01", digest=digest_of(b"image"))
    component = parts(MATERIALS.model_copy(update={"runtime": runtime}))[1]["runtime"]
    assert component["type"] == "container"
    assert component["hashes"][0]["content"] == digest_of(b"image")[7:]


def test_equal_materials_give_equal_bytes() -> None:
    """The bill is an artifact: a clock or a random number in it would make each a new one."""
    first = bill()
    shuffled = MATERIALS.model_copy(
        update={
            "dependencies": MATERIALS.dependencies[::-1],
            "files": MATERIALS.files[::-1],
            "made_from": dict(reversed(MATERIALS.made_from.items())),
        }
    )
    assert bill_of_materials(shuffled) == first
    other = bill_of_materials(MATERIALS.model_copy(update={"digest": digest_of(b"other")}))
    serials = [json.loads(document)["serialNumber"] for document in (first, other)]
    assert serials[0] != serials[1]
    assert uuid.UUID(serials[0]).version == 5
    assert b"timestamp" not in first


def test_real_environment_gives_a_valid_bill() -> None:
    """Some 270 packages declare their licences in every way there is."""
    everything = MATERIALS.model_copy(update={"dependencies": dependency_record()})
    assert len(parts(everything)[1]) > 200


@pytest.mark.parametrize(
    ("break_it", "place"),
    [
        (lambda bom: bom.update(specVersion=1.6), "$.specVersion"),
        (lambda bom: bom.update(serialNumber="1"), "$.serialNumber"),
        (lambda bom: bom["metadata"]["component"].update(type="model"), "$.metadata.component"),
        (lambda bom: bom["metadata"]["component"]["modelCard"].update(author="x"), "modelCard"),
        (lambda bom: bom["metadata"]["component"]["hashes"][0].update(alg="x"), "hashes"),
        (lambda bom: bom.update(extra=1), "$: "),
    ],
)
def test_broken_bill_is_refused(break_it: Any, place: str) -> None:
    """The schema must really be applied, also to what the library has no classes for."""
    document, _ = parts()
    break_it(document)
    errors = validation_errors(json.dumps(document).encode())
    assert errors
    assert place in errors[0]


def test_what_is_not_json_is_not_valid() -> None:
    """A document cut off in the middle is the commonest broken one."""
    assert "not JSON" in validation_errors(b'{"bomFormat": ')[0]
    assert "not JSON" in validation_errors(b"\xff")[0]


def test_malformed_digest_is_refused() -> None:
    """A hash that is none would still be a string in the bill."""
    with pytest.raises(StoreError, match="not a digest"):
        bill_of_materials(MATERIALS.model_copy(update={"digest": "sha256:123"}))
