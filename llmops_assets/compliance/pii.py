"""Personal data in prompts and completions, found with Presidio's pattern recognisers.

Only what has a shape is found: addresses and numbers, not names, which would need a
language model. Run as `python -m llmops_assets.compliance.pii …`, through the tool runner:
importing Presidio takes seconds.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.compliance.report import Report
from llmops_assets.develop.data import read_data
from llmops_assets.errors import DataError, LLMOpsError
from llmops_assets.tools import ToolRunner, module_command

COLUMNS = ("prompt", "completion")
THRESHOLD = 0.4
"""Presidio gives a phone number 0.4, an IP address 0.6, whatever has a right checksum 1.0."""

EXAMPLES = 10
SHOWN_CHARACTERS = 2


class PiiExample(BaseModel):
    """Where one finding is: its row counts from 1, `redacted` is never the whole value."""

    model_config = ConfigDict(frozen=True)

    entity: str
    row: int
    column: str
    redacted: str


class PiiReport(Report):
    """What was found, without repeating it."""

    rows: int = Field(description="Rows of the data.")
    counts: dict[str, int] = Field(description="Findings by entity, as Presidio names it.")
    examples: tuple[PiiExample, ...] = Field(description="A few of the findings.")
    threshold: float = Field(description="Scores below it were not counted.")


def scan_pii(
    data: Path, output: Path, tools: ToolRunner, threshold: float = THRESHOLD
) -> PiiReport:
    """Runs `find_pii` as a tool.

    Args:
        data: data directory, see `develop.data`.
        output: file that the report is written to, JSON.
        tools: runs it; ten seconds for 40,000 short rows, most of them imports.
        threshold: least score of a finding, 0 to 1.

    Raises:
        ToolError: the scan failed; its log says why.
    """
    tools.run(
        "the scan for personal data",
        module_command(
            "llmops_assets.compliance.pii",
            *("--data", data, "--output", output, "--threshold", str(threshold)),
        ),
    )
    return PiiReport.model_validate_json(output.read_bytes())


def find_pii(data: Path, threshold: float = THRESHOLD) -> PiiReport:
    """Scans every prompt and completion of a data directory.

    Each different text is scanned once, and by a recogniser only if a cheap pattern
    allows a finding at all. What that costs: phone numbers of fewer than nine digits, as
    Presidio takes dates such as "02.10.1978" for some, and IPv6 addresses of fewer than
    three colons, as it takes "a::b" for one.

    Raises:
        DataError: it is no data directory, or a text took Presidio too long to judge.
    """
    rows = read_data(data)
    detectors = _detectors()
    columns = {column: rows[column].to_pylist() for column in COLUMNS}
    found: dict[str, list[_Finding]] = {}
    overruns = _Overruns()
    logger = logging.getLogger("presidio-analyzer")
    logger.addHandler(overruns)
    try:
        for text in dict.fromkeys(text for texts in columns.values() for text in texts):
            if findings := _find(text, detectors, threshold):
                found[text] = findings
    finally:
        logger.removeHandler(overruns)
    if overruns.messages:
        raise DataError(
            f"Not all of {data} could be scanned for personal data",
            expected="texts that every pattern can be matched against in a minute",
            found=overruns.messages[0],
            cure="shorten or remove the longest texts",
        )
    counts: Counter[str] = Counter()
    examples: list[PiiExample] = []
    for row, texts in enumerate(zip(*columns.values(), strict=True), start=1):
        for column, text in zip(columns, texts, strict=True):
            for finding in found.get(text, ()):
                counts[finding.entity] += 1
                if counts[finding.entity] == 1 or len(examples) < EXAMPLES:
                    examples.append(
                        PiiExample(
                            entity=finding.entity,
                            row=row,
                            column=column,
                            redacted=_redact(text[finding.start : finding.end]),
                        )
                    )
    return PiiReport(
        problems=tuple(
            f"{entity}: {count} in the data, the first in row "
            f"{next(example.row for example in examples if example.entity == entity)}; "
            "remove or replace them"
            for entity, count in sorted(counts.items())
        ),
        rows=rows.num_rows,
        counts=dict(sorted(counts.items())),
        examples=tuple(examples),
        threshold=threshold,
    )


@dataclass(frozen=True)
class _Detector:
    """A Presidio `EntityRecognizer`, and the shape that every one of its findings has."""

    recognizer: Any  # typed as if patterns, too, needed the result of a language model
    shape: re.Pattern[str]


@dataclass(frozen=True)
class _Finding:
    """A span of a text, in characters."""

    entity: str
    score: float
    start: int
    end: int


class _Overruns(logging.Handler):
    """Presidio only warns when a pattern took too long, and goes on without it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _digits(count: int) -> re.Pattern[str]:
    """So many digits with little between them."""
    return re.compile(rf"\d(?:[\s()./\-\u2013]{{0,2}}\d){{{count - 1}}}")


def _detectors() -> tuple[_Detector, ...]:
    import tldextract
    from presidio_analyzer import predefined_recognizers as predefined

    class OfflineEmailRecognizer(predefined.EmailRecognizer):
        """With the list of top-level domains that comes in the wheel; its default downloads."""

        domains = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)

        def validate_result(self, pattern_text: str) -> bool:
            return self.domains(pattern_text).fqdn != ""

    # A date has up to eight digits, and "02.10.1978" could be a German phone number.
    nine_digits = _digits(9)
    shapes = (
        (OfflineEmailRecognizer(), re.compile("@")),
        (predefined.PhoneRecognizer(), nine_digits),
        (predefined.CreditCardRecognizer(), _digits(12)),
        (predefined.IbanRecognizer(), re.compile(r"[A-Z]{2}\d{2}[ -]?[A-Z0-9]{4}")),
        (predefined.IpRecognizer(), re.compile(r"(\d{1,3}\.){3}\d|([0-9A-Fa-f]{0,4}:){3}")),
        (
            predefined.MacAddressRecognizer(),
            re.compile(r"[0-9A-Fa-f]{2}[:-][0-9A-Fa-f]{2}[:-]|[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}\."),
        ),
        (predefined.CryptoRecognizer(), re.compile(r"[A-Za-z0-9]{26}")),
        (predefined.UsSsnRecognizer(), nine_digits),
        (predefined.UkNinoRecognizer(), re.compile(r"\d{2} ?\d{2} ?\d{2} ?[A-Da-d]")),
        (predefined.EsNifRecognizer(), re.compile(r"\d{7}-?[A-Za-z]")),
        (predefined.ItFiscalCodeRecognizer(), re.compile(r"[A-Za-z0-9]{16}")),
        (predefined.DeTaxIdRecognizer(), re.compile(r"\d{11}")),
    )
    return tuple(_Detector(recognizer, shape) for recognizer, shape in shapes)


def _find(text: str, detectors: Sequence[_Detector], threshold: float) -> list[_Finding]:
    """Findings in order of their place; of those that overlap the most certain one."""
    findings = [
        _Finding(result.entity_type, result.score, result.start, result.end)
        for detector in detectors
        if detector.shape.search(text)
        for result in detector.recognizer.analyze(text, detector.recognizer.supported_entities)
        # Only where the shape is, and not elsewhere in a text that has it.
        if result.score >= threshold and detector.shape.search(text[result.start : result.end])
    ]
    kept: list[_Finding] = []
    for finding in sorted(findings, key=lambda one: (-one.score, one.start - one.end, one.start)):
        if not any(finding.start < other.end and other.start < finding.end for other in kept):
            kept.append(finding)
    return sorted(kept, key=lambda one: one.start)


def _redact(value: str) -> str:
    return f"{value[:SHOWN_CHARACTERS]}… ({len(value)} characters)"


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llmops_assets.compliance.pii", description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="data directory")
    parser.add_argument("--output", required=True, type=Path, help="report to write, JSON")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="least score, 0 to 1")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        report = find_pii(options.data, options.threshold)
    except LLMOpsError as error:
        print(error, file=sys.stderr)
        return 1
    options.output.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
