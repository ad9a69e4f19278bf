"""The organisation's policy: licences that are allowed, and floors below every spec.

A YAML file that `LLMOPS_POLICY` names, so that whoever writes a spec cannot change it. A
spec may be stricter than a floor and never laxer. Without a file nothing is demanded
beyond the defaults here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from llmops_assets.compliance.licences import PERMISSIVE_LICENCES
from llmops_assets.errors import SettingsError, SpecError
from llmops_assets.spec import (
    LatencyBound,
    MetricBound,
    MetricRule,
    ModelSpec,
    Ratio,
    Section,
)


class FairnessFloor(Section):
    """What every fairness gate must demand."""

    metric: Literal["exact_match", "accuracy"] = "exact_match"
    largest_gap: Ratio = Field(description="A spec's may be at most this.")
    minimum_slice: int = Field(default=1, ge=1, description="A spec's may be at least this.")


class LatencyFloor(Section):
    """Bounds that every latency gate must contain, or be stricter than."""

    evaluation: tuple[LatencyBound, ...] = ()
    build: tuple[LatencyBound, ...] = ()
    staging: tuple[LatencyBound, ...] = ()


class Floors(Section):
    """The least that a spec's gates must demand; what is not given is not demanded."""

    confidence: float | None = Field(default=None, ge=0.5, lt=1)
    accuracy: dict[str, MetricRule] = Field(default={}, description="By metric.")
    engine_accuracy: dict[str, MetricBound] = Field(default={}, description="By metric.")
    fairness: FairnessFloor | None = None
    token_agreement: Ratio | None = Field(default=None, description="Of gates.parity.")
    logit_distance: float | None = Field(default=None, gt=0, description="Of gates.parity.")
    latency: LatencyFloor = LatencyFloor()
    smoke_latency_seconds: float | None = Field(default=None, gt=0, description="Of gates.smoke.")
    service_error_rate: Ratio | None = Field(default=None, description="Of gates.service.")


class Policy(Section):
    """What the organisation demands of every model."""

    licenses: tuple[str, ...] = Field(
        default=PERMISSIVE_LICENCES, description="SPDX identifiers that weights and data may have."
    )
    longest_waiver_days: int = Field(
        default=90, ge=0, description="A waiver that expires later than this from now is refused."
    )
    floors: Floors = Floors()


def read_policy(file: Path | None) -> Policy:
    """The policy in a file; the defaults without one.

    Raises:
        SettingsError: it cannot be read or is not valid. Nothing is judged without it.
    """
    if file is None:
        return Policy()
    try:
        return Policy.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(
            f"The policy {file} cannot be used",
            expected="YAML with licenses, longest_waiver_days and floors",
            found=_mistakes(error) if isinstance(error, ValidationError) else error,
            cure="mend the file that LLMOPS_POLICY names; see docs/gates.md",
        ) from error


def check_floors(spec: ModelSpec, floors: Floors) -> None:
    """Checks that a spec demands at least what the organisation does.

    Raises:
        SpecError: naming every floor that it is below.
    """
    if below := tuple(_below(spec, floors)):
        raise SpecError(
            f"The spec of {spec.name} is below the organisation's policy",
            expected="gates at least as strict as every floor",
            found="; ".join(below),
            cure="tighten these gates in the spec; the floors are in the file that "
            "LLMOPS_POLICY names",
        )


def _below(spec: ModelSpec, floors: Floors) -> Iterator[str]:
    gates = spec.gates
    yield from _laxer("gates.confidence", gates.confidence, at_least=floors.confidence)
    yield from _metrics("gates.accuracy", gates.accuracy, floors.accuracy)
    yield from _metrics("gates.engine_accuracy", gates.engine_accuracy, floors.engine_accuracy)
    if floors.fairness is not None:
        if gates.fairness is None:
            yield f"gates.fairness is null, the floor is {floors.fairness.largest_gap:g}"
        else:
            if gates.fairness.slices:
                yield "gates.fairness.slices leaves slices out, the floor compares all"
            if gates.fairness.metric != floors.fairness.metric:
                yield (
                    f"gates.fairness.metric is {gates.fairness.metric}, the floor is of "
                    f"{floors.fairness.metric}"
                )
            yield from _laxer(
                "gates.fairness.largest_gap",
                gates.fairness.largest_gap,
                at_most=floors.fairness.largest_gap,
            )
            yield from _laxer(
                "gates.fairness.minimum_slice",
                gates.fairness.minimum_slice,
                at_least=floors.fairness.minimum_slice,
            )
    parity, smoke, service = gates.parity, gates.smoke, gates.service
    yield from _laxer(
        "gates.parity.token_agreement", parity.token_agreement, at_least=floors.token_agreement
    )
    yield from _laxer(
        "gates.parity.logit_distance", parity.logit_distance, at_most=floors.logit_distance
    )
    yield from _laxer(
        "gates.smoke.latency_seconds", smoke.latency_seconds, at_most=floors.smoke_latency_seconds
    )
    yield from _laxer(
        "gates.service.error_rate", service.error_rate, at_most=floors.service_error_rate
    )
    for place in ("evaluation", "build", "staging"):
        for floor in getattr(floors.latency, place):
            if not any(_covers(bound, floor) for bound in getattr(gates.latency, place)):
                yield (
                    f"gates.latency.{place} has no bound of at most {floor.at_most:g} s for the "
                    f"{floor.percentile} of {floor.measure} at concurrency {floor.concurrency}"
                )


def _metrics(
    where: str, rules: Mapping[str, MetricBound], floors: Mapping[str, MetricBound]
) -> Iterator[str]:
    for name, floor in floors.items():
        rule = rules.get(name)
        if rule is None:
            yield f"{where} has no {name}"
            continue
        path = f"{where}.{name}"
        at_least = floor.at_least is not None
        yield from _laxer(f"{path}.at_least", rule.at_least, at_least=floor.at_least)
        yield from _laxer(f"{path}.at_most", rule.at_most, at_most=floor.at_most)
        yield from _laxer(
            f"{path}.every_slice",
            rule.every_slice,
            at_least=floor.every_slice if at_least else None,
            at_most=None if at_least else floor.every_slice,
        )
        if isinstance(floor, MetricRule) and isinstance(rule, MetricRule):
            yield from _laxer(f"{path}.regression", rule.regression, at_most=floor.regression)


def _laxer(
    name: str,
    value: float | None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Iterator[str]:
    floor = at_most if at_least is None else at_least
    if floor is None:
        return
    if value is None:
        yield f"{name} is not given, the floor is {floor:g}"
    elif value < floor if at_least is not None else value > floor:
        yield f"{name} is {value:g}, the floor is {floor:g}"


def _covers(bound: LatencyBound, floor: LatencyBound) -> bool:
    """Whether a bound that a spec has implies the floor's: as high a percentile, as much load."""
    return (
        bound.measure == floor.measure
        and bound.percentile >= floor.percentile
        and bound.concurrency >= floor.concurrency
        and bound.at_most <= floor.at_most
    )


def _mistakes(error: ValidationError) -> str:
    details: list[Any] = list(error.errors())
    return "; ".join(f"{'.'.join(map(str, d['loc']))}: {d['msg']}" for d in details)
