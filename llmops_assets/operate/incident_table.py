"""How incidents are shown in Dagster."""

from __future__ import annotations

from collections.abc import Iterable

import dagster as dg

from llmops_assets.operate.incidents import Incident

COLUMNS = (
    "id", "release", "what", "done", "by", "began", "detected", "to detect, s", "to decide, s",
    "to restore, s", "notes",
)  # fmt: skip


def incident_table(incidents: Iterable[Incident]) -> dg.TableMetadataValue:
    """A row for each incident; times in UTC."""
    return dg.MetadataValue.table(
        [
            dg.TableRecord(
                {
                    "id": str(incident.id),
                    "release": incident.release,
                    "what": incident.what,
                    "done": incident.action or "nothing yet",
                    "by": incident.actor or "",
                    "began": "" if incident.began is None else f"{incident.began:%F %T}",
                    "detected": f"{incident.detected:%F %T}",
                    "to detect, s": _rounded(incident.seconds_to_detect),
                    "to decide, s": _rounded(incident.seconds_to_decide),
                    "to restore, s": _rounded(incident.seconds_to_restore),
                    "notes": " | ".join(f"{note.actor}: {note.text}" for note in incident.notes),
                }
            )
            for incident in incidents
        ],
        schema=dg.TableSchema([dg.TableColumn(name) for name in COLUMNS]),
    )


def _rounded(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f}"
