"""The audit record as a page for a browser: one file, without scripts, that needs no network."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from llmops_assets.evidence.gates import GATES
from llmops_assets.evidence.statistics import Decision
from llmops_assets.reports.audit_record import AuditRecord, GateVerdict
from llmops_assets.reports.lineage_drawing import draw
from llmops_assets.reports.timeline import timeline
from llmops_assets.reports.wording import duration, moment, number, short, title

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE = "audit_page.html.j2"


def html(record: AuditRecord) -> str:
    """The page. Everything that others wrote is escaped by the template engine."""
    end = record.seen_until
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            record=record,
            spec=json.dumps(record.spec, indent=2, ensure_ascii=False),
            drawing=draw(record),
            moments=timeline(record),
            descriptions={name: gate.description for name, gate in GATES.items()},
            periods=[
                (period, duration((period.until or end or period.since) - period.since))
                for period in record.deployments.served
            ],
        )
    )


@cache
def _environment() -> Environment:
    # Only where a page is made: definitions import what imports this.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "short": short, "moment": moment, "number": number, "title_of": title, "outcome": _outcome,
    }  # fmt: skip
    return environment


def _outcome(found: GateVerdict) -> str:
    """How a verdict stands, as a word that is also a class of the style sheet."""
    if found.verdict.decision is Decision.PASSED:
        return "passed"
    return "waived" if found.waived is not None else found.verdict.decision.value
