"""The lineage of a release as a drawing: boxes with digests, and what was made from what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from llmops_assets.evidence.gates import CANARY, GATES
from llmops_assets.evidence.statistics import Decision
from llmops_assets.reports.audit_record import AuditRecord
from llmops_assets.reports.gaps import expected_assets
from llmops_assets.reports.summary import in_production
from llmops_assets.reports.wording import count, short, title
from llmops_assets.serving.slots import Environment

BOX_WIDTH, BOX_HEIGHT = 134, 74
COLUMN_WIDTH, ROW_HEIGHT = 157, 104
MARGIN, TOP = 4, 30
LONGEST_LINE = 22
"""Characters that fit into a box."""

COLUMNS = (
    "What it is made from", "Training", "Registration", "Engine", "Package", "Staging",
    "Production", "Retirement",
)  # fmt: skip
# Column and row of each box.
PLACES = {
    "model_spec": (0, 0),
    "training_data": (0, 1),
    "evaluation_data": (0, 2),
    "data_report": (1, 0),
    "checkpoint": (1, 1),
    "evaluation": (1, 2),
    "registered_model": (2, 0),
    "converted_weights": (2, 1),
    "engine": (3, 1),
    "engine_validation": (3, 2),
    "packaged_model": (4, 1),
    "compliance_report": (4, 2),
    "staging_deployment": (5, 1),
    "production_approval": (6, 0),
    "production_deployment": (6, 1),
    "archive": (7, 1),
    "removed_version": (7, 2),
}
ARROWS = (
    ("model_spec", "training_data"),
    ("training_data", "data_report"),
    ("training_data", "checkpoint"),
    ("evaluation_data", "evaluation"),
    ("checkpoint", "evaluation"),
    ("checkpoint", "registered_model"),
    ("checkpoint", "converted_weights"),
    ("converted_weights", "engine"),
    ("engine", "engine_validation"),
    ("engine", "packaged_model"),
    ("packaged_model", "compliance_report"),
    ("packaged_model", "staging_deployment"),
    ("staging_deployment", "production_approval"),
    ("staging_deployment", "production_deployment"),
    ("production_approval", "production_deployment"),
    ("production_deployment", "archive"),
    ("archive", "removed_version"),
)
BEFORE_PRODUCTION = ("staging_deployment", "production_approval")
"""Events that must have been before users got answers."""


class Mark(StrEnum):
    """How a box stands, in the word that it carries beside its colour."""

    OK = "in order"
    WAIVED = "waived"
    FAILED = "not passed"
    MISSING = "missing"
    ABSENT = "not there"


@dataclass(frozen=True)
class Box:
    """One box; lengths in units of the drawing, one pixel at full size."""

    asset: str
    title: str
    digest: str
    """Short form; empty where there is none."""
    line: str
    mark: Mark
    x: int
    y: int
    explanation: str
    """All of it, for whoever points at it or listens."""


@dataclass(frozen=True)
class Arrow:
    """From one box to another."""

    path: str
    """An SVG path."""
    recorded: bool
    """Whether a statement names the one as what the other was made from."""


@dataclass(frozen=True)
class Drawing:
    """The whole drawing."""

    width: int
    height: int
    box_width: int
    box_height: int
    columns: tuple[tuple[int, str], ...]
    """Left edge and heading of each."""
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


def draw(record: AuditRecord) -> Drawing:
    """Draws the lineage."""
    return Drawing(
        width=2 * MARGIN + (len(COLUMNS) - 1) * COLUMN_WIDTH + BOX_WIDTH,
        height=TOP + 2 * ROW_HEIGHT + BOX_HEIGHT + MARGIN,
        box_width=BOX_WIDTH,
        box_height=BOX_HEIGHT,
        columns=tuple((_left(column), name) for column, name in enumerate(COLUMNS)),
        boxes=tuple(_boxes(record)),
        arrows=tuple(_arrows(record)),
    )


def _boxes(record: AuditRecord) -> Iterator[Box]:
    events = _events(record)
    for asset, (column, row) in PLACES.items():
        step = record.step(asset)
        if step is not None:
            digest, line = short(step.artifact), _line(record, asset)
        else:
            digest, line = events.get(asset, ("", ""))
        there = step is not None or asset in events
        mark = _mark(record, asset, there)
        yield Box(
            asset=asset,
            title=title(asset),
            digest=digest,
            line=_clipped(line),
            mark=mark,
            x=_left(column),
            y=TOP + row * ROW_HEIGHT,
            explanation=f"{title(asset)}: {mark.value}. {line} "
            + (step.artifact if step is not None else ""),
        )


def _line(record: AuditRecord, asset: str) -> str:
    step = record.step(asset)
    if step is None:
        return ""
    if step.reused_from is not None:
        return f"from {step.reused_from}"
    if isinstance(rows := step.facts.get("rows"), int):
        return f"{rows:,} rows"
    judged = [name for name in record.counting if name in GATES and GATES[name].asset == asset]
    return count(len(judged), "gate") + " judged" if judged else "made here"


def _events(record: AuditRecord) -> dict[str, tuple[str, str]]:
    """Digest and line of boxes that stand for events, by asset."""
    found: dict[str, tuple[str, str]] = {}
    if record.identity.version is not None:
        found["registered_model"] = ("", f"version {record.identity.version}")
    for load in record.deployments.loads:
        if load.environment is Environment.STAGING:
            answered = f"{load.right_answers} of {load.answers} answers right"
            found["staging_deployment"] = (short(load.package), answered)
    for approval in record.approvals:
        if approval.kind == "verified":
            verb = "by" if approval.decision == "approve" else "rejected by"
            found["production_approval"] = (short(approval.package), f"{verb} {approval.approver}")
    if periods := in_production(record):
        line = "serves now" if periods[-1].until is None else f"until {periods[-1].until:%Y-%m-%d}"
        found["production_deployment"] = (short(record.identity.package), line)
    retired = record.retirement
    if retired.archived is not None:
        line = f"restore {retired.restored.value}" if retired.restored else "restore not tried"
        found["archive"] = (short(retired.archive_digest), line)
    if retired.removed is not None:
        found["removed_version"] = ("", f"{retired.removed:%Y-%m-%d}")
    return found


def _mark(record: AuditRecord, asset: str, there: bool) -> Mark:
    if not there:
        skipped = asset in BEFORE_PRODUCTION and bool(in_production(record))
        return Mark.MISSING if skipped or asset in expected_assets(record) else Mark.ABSENT
    # The canary is shown where the traffic goes, the candidate's own gates as well.
    assets = {asset, "production_candidate"} if asset == GATES[CANARY.name].asset else {asset}
    judged = [
        found
        for name, found in record.counting.items()
        if name in GATES and GATES[name].asset in assets
    ]
    if any(f.verdict.decision is not Decision.PASSED and f.waived is None for f in judged):
        return Mark.FAILED
    return Mark.WAIVED if any(found.waived is not None for found in judged) else Mark.OK


def _arrows(record: AuditRecord) -> Iterator[Arrow]:
    there = {step.asset for step in record.build.steps} | set(_events(record))
    for source, target in ARROWS:
        made = record.step(target)
        used = None if made is None else made.inputs.get(source)
        origin = record.step(source)
        recorded = used is not None and origin is not None and used == origin.artifact
        # Events name the package that they are about.
        recorded = recorded or (made is None and {source, target} <= there)
        yield Arrow(_path(PLACES[source], PLACES[target]), recorded)


def _path(source: tuple[int, int], target: tuple[int, int]) -> str:
    (column, row), (to_column, to_row) = source, target
    if column == to_column:
        x = _left(column) + BOX_WIDTH // 2
        down = to_row > row
        y1 = TOP + row * ROW_HEIGHT + (BOX_HEIGHT if down else 0)
        y2 = TOP + to_row * ROW_HEIGHT + (-3 if down else BOX_HEIGHT + 3)
        return f"M{x} {y1}L{x} {y2}"
    x1, x2 = _left(column) + BOX_WIDTH, _left(to_column) - 3
    y1, y2 = (TOP + each * ROW_HEIGHT + BOX_HEIGHT // 2 for each in (row, to_row))
    middle = (x1 + x2) // 2
    return f"M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}"


def _left(column: int) -> int:
    return MARGIN + column * COLUMN_WIDTH


def _clipped(line: str) -> str:
    return line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 1] + "…"
