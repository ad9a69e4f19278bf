"""How the compliance gates judge the reports on data and package, by the policy of the day."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Finding, Judgement
from llmops_assets.storage.artifacts import ArtifactHandle, digests

if TYPE_CHECKING:
    from llmops_assets.compliance.package_report import PackageReport
    from llmops_assets.compliance.report import Report

PROBLEMS_SHOWN = 10
SCANNED = ("packaged_model", "checkpoint")


def judge_data(column: Mapping[str, ArtifactHandle], licenses: Collection[str]) -> Judgement:
    """The training data may be used: licence on the list, provenance, no personal data.

    Args:
        column: training_data and data_report.
        licenses: SPDX identifiers that are allowed.

    Raises:
        SpecError: an entry of the list is no licence.
    """
    from llmops_assets.compliance.data_report import read_data_report

    report = read_data_report(column["data_report"].path)
    personal_data = report.personal_data
    return _judgement(
        (
            _subjects(column, ["training_data"], {"training_data": report.data}),
            _licence("training data", report.license, licenses),
            _provenance("training data", report.provenance),
            _Examined(
                metric="personal data in training data",
                found=sum(personal_data.counts.values()),
                wanted="none",
                problems=personal_data.problems,
                n=report.rows,
            ),
        ),
        passed=f"{report.rows} rows under {report.license} without personal data, from a known "
        "source.",
    )


def judge_package_safety(column: Mapping[str, ArtifactHandle]) -> Judgement:
    """No file of checkpoint and package runs code when loaded, and none holds a secret.

    Args:
        column: packaged_model, checkpoint and compliance_report.
    """
    report = _package_report(column)
    examined = [_subjects(column, SCANNED, report.digests)]
    for asset in SCANNED:
        formats = report.formats.get(asset)
        examined.append(_scanned(f"unsafe formats in {asset}", formats, formats and formats.files))
    for asset in SCANNED:
        secrets = report.secrets.get(asset)
        examined.append(_scanned(f"secrets in {asset}", secrets, secrets and secrets.scanned))
    return _judgement(
        examined,
        passed="No file of checkpoint and package is a pickle, and none holds a secret.",
    )


def judge_compliance(column: Mapping[str, ArtifactHandle], licenses: Collection[str]) -> Judgement:
    """Licences of weights and data are on the list, the model card is complete, the ML-BOM valid.

    Args:
        column: packaged_model, checkpoint and compliance_report.
        licenses: SPDX identifiers that are allowed.

    Raises:
        SpecError: an entry of the list is no licence.
    """
    from llmops_assets.compliance.bill_of_materials import mismatches, validation_errors
    from llmops_assets.compliance.model_card import CARD_FILE, check_card
    from llmops_assets.compliance.package_report import BILL_FILE

    report = _package_report(column)
    card = check_card(report.card)
    bill = (column["compliance_report"].path / BILL_FILE).read_bytes()
    invalid = validation_errors(bill) or mismatches(bill, column["packaged_model"].artifact)
    examined = [
        _subjects(column, SCANNED, report.digests),
        _licence("weights", report.card.license, licenses),
        _licence("data", report.data_license, licenses),
        _provenance("data", report.data_provenance),
        _Examined(
            metric="model card",
            found=len(card.missing),
            wanted="every part is written",
            problems=card.problems,
        ),
        _Examined(
            metric="ML-BOM",
            found=len(invalid),
            wanted="valid CycloneDX 1.6, about this package",
            problems=[f"ML-BOM: {error}" for error in invalid],
        ),
    ]
    # An imported model's own word counts beside what the spec says of it.
    if report.readme_license and report.readme_license.casefold() != report.card.license.casefold():
        examined.append(_licence(f"weights in {CARD_FILE}", report.readme_license, licenses))
    return _judgement(
        examined,
        passed=f"Weights under {report.card.license}, data under {report.data_license}, a whole "
        "model card, a valid ML-BOM.",
    )


@dataclass(frozen=True)
class _Examined:
    """One thing that was looked at: what it is, what was asked for, and what is wrong."""

    metric: str
    found: int | str | None
    wanted: str
    problems: Sequence[str]
    n: int | None = None

    @property
    def note(self) -> str:
        more = len(self.problems) - PROBLEMS_SHOWN
        shown = "; ".join(self.problems[:PROBLEMS_SHOWN])
        return f"{shown}; and {more} more in the report" if more > 0 else shown

    @property
    def finding(self) -> Finding:
        return Finding(
            metric=self.metric,
            value=self.found if isinstance(self.found, int) else None,
            n=self.n,
            threshold=self.wanted,
            decision=Decision.of(not self.problems),
            note=self.note or (self.found if isinstance(self.found, str) else ""),
        )


def _judgement(examined: Sequence[_Examined], passed: str) -> Judgement:
    findings = tuple(one.finding for one in examined)
    decision = Decision.all_of(finding.decision for finding in findings)
    return Judgement(
        decision=decision,
        measured={one.metric: one.found for one in examined},
        threshold={one.metric: one.wanted for one in examined},
        reason=passed
        if decision is Decision.PASSED
        else "; ".join(one.note for one in examined if one.problems) + ".",
        findings=findings,
    )


def _package_report(column: Mapping[str, ArtifactHandle]) -> PackageReport:
    from llmops_assets.compliance.package_report import read_report

    return read_report(column["compliance_report"].path)


def _scanned(metric: str, scan: Report | None, files: int | None) -> _Examined:
    """A scan that looked at nothing found nothing, which is no good news."""
    problems = ("nothing was scanned; materialize the report again",)
    if scan is not None and files:
        problems = scan.problems
    return _Examined(metric=metric, found=len(problems), wanted="none", problems=problems, n=files)


def _subjects(
    column: Mapping[str, ArtifactHandle], required: Sequence[str], reported: Mapping[str, str]
) -> _Examined:
    """The report is about the bytes in hand, and not those of another release."""
    held = digests(column)
    others = [asset for asset in required if reported.get(asset) != held.get(asset)]
    return _Examined(
        metric="subjects of the report",
        found=", ".join(reported),
        wanted="the bytes that are judged",
        problems=[
            f"the report is about another {asset}, {reported.get(asset, 'none')}; materialize "
            "it again"
            for asset in others
        ],
    )


def _licence(subject: str, declared: str, licenses: Collection[str]) -> _Examined:
    from llmops_assets.compliance.licences import judge_licences

    report = judge_licences({subject: declared}, licenses)
    return _Examined(
        metric=f"licence of {subject}",
        found=report.licences.get(subject, declared) or None,
        wanted="one of " + ", ".join(report.allowed),
        problems=report.problems,
    )


def _provenance(subject: str, declared: str) -> _Examined:
    from llmops_assets.compliance.model_card import prose_problem

    problem = prose_problem(declared)
    return _Examined(
        metric=f"provenance of {subject}",
        found=declared.strip() or None,
        wanted="where the rows come from, and why they may be used",
        problems=[] if problem is None else [f"provenance of {subject}: {problem}"],
    )
