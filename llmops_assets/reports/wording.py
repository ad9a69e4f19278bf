"""What the platform's names are called towards people who do not know them, and how values look."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

TITLES: Mapping[str, str] = {
    "model_spec": "Model spec",
    "training_data": "Training data",
    "evaluation_data": "Evaluation data",
    "data_report": "Data report",
    "checkpoint": "Trained weights",
    "evaluation": "Evaluation",
    "registered_model": "Registration",
    "converted_weights": "Converted weights",
    "engine": "Engine",
    "engine_validation": "Engine validation",
    "packaged_model": "Package",
    "compliance_report": "Compliance report",
    "staging_deployment": "Staging",
    "production_approval": "Approval",
    "production_candidate": "Production, before traffic",
    "production_deployment": "Production",
    "service_metrics": "Service metrics",
    "scaling_policy": "Scaling",
    "incidents": "Incidents",
    "deprecated_version": "Taken out of service",
    "archive": "Archive",
    "removed_version": "Removed",
}
"""Assets by name."""
SHORT_DIGITS = 12


def title(asset: str) -> str:
    """What an asset is called; its own name if it is not one of the platform's."""
    return TITLES.get(asset, asset.replace("_", " "))


def short(digest: str | None) -> str:
    """The first digits of a digest; a dash for none."""
    return "-" if digest is None else digest.rpartition(":")[2][:SHORT_DIGITS]


def moment(time: datetime | None) -> str:
    """A time in UTC, to the second; a dash for none."""
    return "-" if time is None else f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def duration(length: timedelta) -> str:
    """A length of time in its two largest units."""
    seconds = int(length.total_seconds())
    days, hours = divmod(seconds // 3600, 24)
    minutes = seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def number(value: object) -> str:
    """A value of a record as people read it; a dash for none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        there = {name: inner for name, inner in value.items() if inner not in (None, [], ())}
        return ", ".join(f"{name} {number(inner)}" for name, inner in there.items())
    return ", ".join(map(number, value)) if isinstance(value, list | tuple) else str(value)


def count(amount: int, thing: str) -> str:
    """Such as "1 gate" and "2 gates"."""
    return f"{amount:,} {thing}" if amount == 1 else f"{amount:,} {thing}s"
