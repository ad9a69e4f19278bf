"""Policy floors: a spec may be stricter than the organisation, and never laxer."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmops_assets.errors import SettingsError, SpecError
from llmops_assets.policy import Policy, check_floors, read_policy
from llmops_assets.spec import parse_spec

from .release_rig import SPEC

PARROT = parse_spec(
    SPEC.replace("{largest_gap: 0.1}", "{largest_gap: 0.1, minimum_slice: 20}")
    .replace("metrics: [exact_match]", "metrics: [exact_match, perplexity]")
    .replace("{exact_match: {at_least: 0.9, every_slice: 0.8, regression: 0.05}}",
             "{exact_match: {at_least: 0.9, every_slice: 0.8, regression: 0.02},"
             " perplexity: {at_most: 3, every_slice: 4}}"),
    "test",
)  # fmt: skip


def floors(text: str) -> Policy:
    import yaml

    return Policy.model_validate({"floors": yaml.safe_load(text)})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("confidence: 0.99", "gates.confidence is 0.95, the floor is 0.99"),
        ("accuracy: {exact_match: {at_least: 0.95}}",
         "gates.accuracy.exact_match.at_least is 0.9, the floor is 0.95"),
        ("accuracy: {exact_match: {at_least: 0.5, every_slice: 0.85}}",
         "gates.accuracy.exact_match.every_slice is 0.8, the floor is 0.85"),
        ("accuracy: {exact_match: {at_least: 0.5, regression: 0.01}}",
         "gates.accuracy.exact_match.regression is 0.02, the floor is 0.01"),
        ("accuracy: {perplexity: {at_most: 2}}",
         "gates.accuracy.perplexity.at_most is 3, the floor is 2"),
        ("accuracy: {perplexity: {at_most: 5, every_slice: 3}}",
         "gates.accuracy.perplexity.every_slice is 4, the floor is 3"),
        ("accuracy: {macro_f1: {at_least: 0.5}}", "gates.accuracy has no macro_f1"),
        ("engine_accuracy: {exact_match: {at_least: 0.1, every_slice: 0.1}}",
         "gates.engine_accuracy.exact_match.every_slice is not given, the floor is 0.1"),
        ("fairness: {largest_gap: 0.05}",
         "gates.fairness.largest_gap is 0.1, the floor is 0.05"),
        ("fairness: {largest_gap: 0.2, minimum_slice: 30}",
         "gates.fairness.minimum_slice is 20, the floor is 30"),
        ("token_agreement: 0.99", "gates.parity.token_agreement is 0.98, the floor is 0.99"),
        ("logit_distance: 0.5", "gates.parity.logit_distance is 1, the floor is 0.5"),
        ("smoke_latency_seconds: 1", "gates.smoke.latency_seconds is 5, the floor is 1"),
        ("service_error_rate: 0.001", "gates.service.error_rate is 0.01, the floor is 0.001"),
        ("latency: {staging: [{measure: end_to_end, at_most: 1}]}",
         "gates.latency.staging has no bound of at most 1 s for the p95 of end_to_end"),
        ("latency: {staging: [{measure: end_to_end, percentile: p99, at_most: 5}]}",
         "for the p99 of end_to_end"),
        ("latency: {build: [{measure: time_to_first_token, at_most: 9}]}",
         "gates.latency.build has no bound of at most 9 s for the p95 of time_to_first_token"),
    ],
)  # fmt: skip
def test_laxer_spec_is_refused_with_the_floor_named(text: str, told: str) -> None:
    """Whoever wrote the spec must learn which line to tighten, and to what."""
    with pytest.raises(SpecError) as caught:
        check_floors(PARROT, floors(text).floors)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "confidence: 0.9",
        "accuracy: {exact_match: {at_least: 0.9, every_slice: 0.8, regression: 0.02}}",
        "accuracy: {perplexity: {at_most: 3.5, every_slice: 4}}",
        "fairness: {largest_gap: 0.1, minimum_slice: 20}",
        "latency: {staging: [{measure: end_to_end, percentile: p50, at_most: 6}]}",
    ],
)
def test_spec_at_a_floor_or_stricter_is_fine(text: str) -> None:
    """Tightening must never need anybody's permission."""
    check_floors(PARROT, floors(text).floors)


def test_all_floors_are_named_at_once() -> None:
    """One correction, not one after the other."""
    with pytest.raises(SpecError) as caught:
        check_floors(PARROT, floors("{confidence: 0.99, token_agreement: 1}").floors)
    assert "confidence" in str(caught.value)
    assert "token_agreement" in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "told"),
    [("slices: [de]", "leaves slices out"), ("metric: accuracy", "the floor is of exact_match")],
)
def test_fairness_floor_is_about_all_slices_by_its_metric(changed: str, told: str) -> None:
    """Leaving out the slice that fares badly is not fairness."""
    spec = parse_spec(SPEC.replace("{largest_gap: 0.1}", f"{{largest_gap: 0.1, {changed}}}"), "t")
    with pytest.raises(SpecError, match=told):
        check_floors(spec, floors("fairness: {largest_gap: 0.5}").floors)


def test_missing_fairness_gate_is_below_its_floor() -> None:
    """Null is the laxest of all."""
    without = parse_spec(SPEC.replace("{largest_gap: 0.1}", "null"), "test")
    with pytest.raises(SpecError, match=r"gates\.fairness is null"):
        check_floors(without, floors("fairness: {largest_gap: 0.5}").floors)


@pytest.mark.parametrize(
    "text", ["floors: {acuracy: {}}", "licenses: 3", ": :", "longest_waiver_days: -1"]
)
def test_policy_with_a_mistake_is_refused(tmp_path: Path, text: str) -> None:
    """A floor that is not understood must stop everything, not count as no floor."""
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=r"policy\.yaml cannot be used"):
        read_policy(file)


def test_policy_file_that_is_gone_is_refused(tmp_path: Path) -> None:
    """Nobody may get rid of the floors by deleting the file."""
    with pytest.raises(SettingsError, match="cannot be used"):
        read_policy(tmp_path / "gone.yaml")
