"""What is known of training data before a model learns from them.

Facts only; whether they are acceptable is judged by policy (`judgements`).
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.compliance.pii import PiiReport, scan_pii
from llmops_assets.develop.directory import whole_directory
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.tools import ToolRunner

DATA_REPORT_FILE = "data_report.json"


class DataReport(BaseModel):
    """What a data artifact is declared to be, and what was found in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = Field(description="Digest of the artifact.")
    rows: int
    license: str = Field(description="As the spec declares it; empty: not at all.")
    provenance: str = Field(description="The same.")
    personal_data: PiiReport


def write_data_report(
    data: ArtifactHandle, licence: str, provenance: str, output: Path, tools: ToolRunner
) -> DataReport:
    """Scans data for personal data and writes `data_report.json`.

    Args:
        data: data directory, see `develop.data`.
        licence: SPDX expression that the spec declares.
        provenance: as the spec declares it.
        output: directory to write; must not exist.
        tools: runs the scan.

    Raises:
        ToolError: the scan failed, or the output exists.
    """
    found = scan_pii(data.path, tools.work / "personal_data.json", tools)
    report = DataReport(
        data=data.digest,
        rows=found.rows,
        license=licence,
        provenance=provenance,
        personal_data=found,
    )
    with whole_directory(output) as folder:
        (folder / DATA_REPORT_FILE).write_text(
            report.model_dump_json(indent=2) + "\n", encoding="utf-8"
        )
    return report


def read_data_report(directory: Path) -> DataReport:
    """The report in a `data_report` artifact."""
    return DataReport.model_validate_json((directory / DATA_REPORT_FILE).read_bytes())
