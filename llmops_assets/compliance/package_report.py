"""What is known of a package before a slot may load it: formats, secrets, licences, ML-BOM.

Facts only; whether they are acceptable is judged by policy (`judgements`). Run as
`python -m llmops_assets.compliance.package_report …`, through the tool runner: the bytes
may be hostile, and what looks at them may need long or crash.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.compliance.bill_of_materials import (
    Dataset,
    Materials,
    Metric,
    Runtime,
    bill_of_materials,
)
from llmops_assets.compliance.dependencies import Dependency, dependency_record
from llmops_assets.compliance.formats import FormatReport, scan_checkpoint, scan_formats
from llmops_assets.compliance.model_card import CARD_FILE, ModelCard, read_card
from llmops_assets.compliance.secrets import SecretReport, find_secrets
from llmops_assets.develop.checkpoints import CONFIG_FILE
from llmops_assets.develop.directory import whole_directory
from llmops_assets.errors import DataError, LLMOpsError
from llmops_assets.serving.triton import DISTRIBUTION
from llmops_assets.spec import ModelSpec
from llmops_assets.storage.store import FileEntry
from llmops_assets.tools import ToolRunner, module_command

if TYPE_CHECKING:
    # Imports Dagster, which the tool has no use for.
    from llmops_assets.storage.artifacts import ArtifactHandle
    from llmops_assets.toolchains.base import ServingImage

REPORT_FILE = "report.json"
BILL_FILE = "bom.cdx.json"
DATA = ("training_data", "evaluation_data")
COUNT = "rows"
"""Beside the metrics in an evaluation's facts, and none itself."""


class Declaration(BaseModel):
    """What is known of a package without looking at its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    digests: dict[str, str] = Field(description="Of everything the report is about, by asset.")
    files: tuple[FileEntry, ...] = Field(description="The package's.")
    made_from: dict[str, str] = Field(description="Digests of the package's inputs, by asset.")
    card: ModelCard = Field(description="The spec's; may be empty.")
    data_license: str = Field(description="As the spec declares it; empty: not at all.")
    data_provenance: str = Field(description="The same.")
    metrics: tuple[Metric, ...]
    runtime: Runtime
    dependencies: tuple[Dependency, ...]


class PackageReport(BaseModel):
    """What was declared of a package and its checkpoint, and what was found in them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digests: dict[str, str] = Field(description="Of everything the report is about, by asset.")
    card: ModelCard
    card_from: str = Field(description="`spec`, or the checkpoint's `README.md`.")
    readme_license: str = Field(description="What that README declares; empty: nothing.")
    data_license: str
    data_provenance: str
    formats: dict[str, FormatReport] = Field(description="By asset.")
    secrets: dict[str, SecretReport] = Field(description="By asset.")
    runtime: Runtime
    dependencies: int = Field(description="Packages in the bill of materials.")


def serving_environment(
    packages: Iterable[str], image: ServingImage | None = None
) -> tuple[Runtime, tuple[Dependency, ...]]:
    """What serves a package: an image, or Triton's wheel and the packages that it needs.

    Args:
        packages: those that the toolchain's packages need beside Triton; they are recorded
            with what they need themselves.
        image: of the toolchain's packages; None for Triton's wheel. What is in it, its
            own bill of materials says.

    Raises:
        ToolchainError: Triton's wheel is not installed.
    """
    if image is not None:
        runtime = Runtime(kind="container", name=image.name, version=image.tag, digest=image.digest)
        return runtime, dependency_record(packages)
    record = dependency_record([DISTRIBUTION, *packages])
    wheel = next(dependency for dependency in record if dependency.name == DISTRIBUTION)
    digest = None if wheel.archive_sha256 is None else f"sha256:{wheel.archive_sha256}"
    runtime = Runtime(kind="wheel", name=DISTRIBUTION, version=wheel.version, digest=digest)
    return runtime, record


def declare(
    spec: ModelSpec,
    column: Mapping[str, ArtifactHandle],
    runtime: Runtime,
    dependencies: tuple[Dependency, ...],
) -> Declaration:
    """Everything about a package that the platform knows already.

    Args:
        column: packaged_model, checkpoint, training_data, evaluation_data and evaluation.

    Raises:
        DataError: the evaluation states no metric.
    """
    package = column["packaged_model"]
    metrics = tuple(_metrics(column["evaluation"].result.facts))
    if not metrics:
        raise DataError(
            f"The evaluation of {spec.name} states no metric",
            expected="numbers by the metrics' names in the facts of `evaluation`",
            found=", ".join(column["evaluation"].result.facts) or "no facts",
            cure="materialize evaluation again; if it repeats, report it",
        )
    return Declaration(
        model=spec.name,
        digests={asset: handle.digest for asset, handle in column.items()},
        files=package.artifact.files,
        made_from=package.result.inputs,
        card=spec.card,
        data_license=spec.data.license,
        data_provenance=spec.data.provenance,
        metrics=metrics,
        runtime=runtime,
        dependencies=dependencies,
    )


def scan_package(
    declaration: Declaration, package: Path, checkpoint: Path, output: Path, tools: ToolRunner
) -> PackageReport:
    """Runs `report_package` as a tool.

    Args:
        package: directory of the package.
        checkpoint: Hugging Face directory that it was made from.
        output: directory to write; must not exist.
        tools: runs it; some seconds, and for large weights the time it takes to read them.

    Raises:
        ToolError: it failed; its log says why.
    """
    declared = tools.work / "declaration.json"
    declared.parent.mkdir(parents=True, exist_ok=True)
    declared.write_text(declaration.model_dump_json(), encoding="utf-8")
    tools.run(
        "the compliance report",
        module_command(
            "llmops_assets.compliance.package_report",
            *("--declaration", declared, "--package", package),
            *("--checkpoint", checkpoint, "--output", output),
        ),
    )
    return read_report(output)


def report_package(declaration: Declaration, package: Path, checkpoint: Path, output: Path) -> None:
    """Scans package and checkpoint, and writes `report.json` and `bom.cdx.json`.

    Not for several threads at once, see `secrets`.

    Raises:
        DataError: a directory is missing, or the checkpoint's card or config cannot be read.
        ToolError: the output exists.
    """
    readme = read_card(checkpoint) if (checkpoint / CARD_FILE).is_file() else ModelCard()
    from_spec = declaration.card != ModelCard() or readme == ModelCard()
    report = PackageReport(
        digests=declaration.digests,
        card=declaration.card if from_spec else readme,
        card_from="spec" if from_spec else CARD_FILE,
        readme_license=readme.license,
        data_license=declaration.data_license,
        data_provenance=declaration.data_provenance,
        formats={
            "packaged_model": scan_formats(package),
            "checkpoint": scan_checkpoint(checkpoint),
        },
        secrets={
            "packaged_model": find_secrets(package),
            "checkpoint": find_secrets(checkpoint),
        },
        runtime=declaration.runtime,
        dependencies=len(declaration.dependencies),
    )
    bill = bill_of_materials(
        Materials(
            name=declaration.model,
            digest=declaration.digests["packaged_model"],
            files=declaration.files,
            card=report.card,
            architecture=_architecture(checkpoint),
            made_from=declaration.made_from,
            datasets=tuple(
                Dataset(
                    name=asset,
                    digest=declaration.digests[asset],
                    description=declaration.data_provenance,
                    licence=declaration.data_license or None,
                )
                for asset in DATA
            ),
            metrics=declaration.metrics,
            runtime=declaration.runtime,
            dependencies=declaration.dependencies,
        )
    )
    with whole_directory(output) as folder:
        (folder / REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / BILL_FILE).write_bytes(bill)


def read_report(directory: Path) -> PackageReport:
    """The report in a `compliance_report` artifact."""
    return PackageReport.model_validate_json((directory / REPORT_FILE).read_bytes())


def _metrics(facts: Mapping[str, Any]) -> Iterator[Metric]:
    """An evaluation's numbers, over all rows and by slice; see `develop.metrics.Metrics`."""
    yield from _numbers(facts, "")
    for name, values in facts.get("slices", {}).items():
        yield from _numbers(values, name)


def _numbers(values: Mapping[str, Any], slice_name: str) -> Iterator[Metric]:
    for name, value in values.items():
        if name != COUNT and isinstance(value, int | float) and math.isfinite(value):
            yield Metric(name=name, value=value, slice=slice_name)


def _architecture(checkpoint: Path) -> str:
    path = checkpoint / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
        return str(config["architectures"][0])
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} does not say what the model is",
            expected="JSON with a list `architectures`, such as LlamaForCausalLM",
            found=f"{type(error).__name__}: {error}",
            cure="save the model with `save_pretrained`, and make a new release",
        ) from error


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="llmops_assets.compliance.package_report", description=__doc__
    )
    parser.add_argument("--declaration", required=True, type=Path, help="see Declaration, JSON")
    parser.add_argument("--package", required=True, type=Path, help="directory of the package")
    parser.add_argument("--checkpoint", required=True, type=Path, help="Hugging Face directory")
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    options = parser.parse_args(None if arguments is None else list(arguments))
    declaration = Declaration.model_validate_json(options.declaration.read_bytes())
    try:
        report_package(declaration, options.package, options.checkpoint, options.output)
    except LLMOpsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
