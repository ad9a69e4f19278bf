"""Staging under load: real requests at a server of known speed, in real Dagster runs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pandas as pd
import pytest
from dagster import DagsterInstance, ExecuteInProcessResult

from llmops_assets.definitions import definitions_for
from llmops_assets.deploy.delivery import LoadedPackage
from llmops_assets.deploy.load import (
    MOST_PROMPTS,
    choose_prompts,
    judge_staging_latency,
    request_timeout,
)
from llmops_assets.develop.data import DATA_FILE
from llmops_assets.errors import DataError
from llmops_assets.evidence.latency import LatencySummary
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Verdict, verdicts
from llmops_assets.partitions import RELEASES
from llmops_assets.serving import aiperf
from llmops_assets.serving.slots import Environment
from llmops_assets.spec import parse_spec

from ..release_rig import MODEL, SPEC, Rig

pytestmark = pytest.mark.timeout(120)
RELEASE = "parrot.v1"
STAGING = "    staging: [{measure: end_to_end, at_most: 5}]\n"
DELAY_SECONDS = 0.25


def spec_with(staging: str) -> str:
    """The rig's spec with other lines for staging in `gates.latency`."""
    assert STAGING in SPEC
    lines = "".join(f"    {line}\n" for line in staging.splitlines())
    return SPEC.replace(STAGING, lines)


# A median is decided by 6 requests, which keeps slow models affordable.
MEDIAN = spec_with(f"""\
staging:
  - {{measure: end_to_end, percentile: p50, at_most: {DELAY_SECONDS}}}
  - {{measure: time_to_first_token, percentile: p50, at_most: {DELAY_SECONDS}, concurrency: 2}}
concurrencies: [3]
requests: 6""")


def data(*prompts: str) -> bytes:
    """Rows as the data asset writes them."""
    columns = {"prompt": prompts, "completion": ["x"] * len(prompts), "slice": ["s"] * len(prompts)}
    buffer = io.BytesIO()
    pd.DataFrame(columns).to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    """A Dagster of the test's own, in memory."""
    with DagsterInstance.ephemeral() as instance:
        yield instance


def materialize(rig: Rig, instance: DagsterInstance, *assets: str) -> ExecuteInProcessResult:
    """As selected in the UI: these assets with their checks."""
    instance.add_dynamic_partitions(str(RELEASES.name), [RELEASE])
    job = definitions_for(rig.platform).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance, partition_key=RELEASE, raise_on_error=False,
        asset_selection=[dg.AssetKey(asset) for asset in assets],
    )  # fmt: skip


def stage(rig: Rig, instance: DagsterInstance, spec: str) -> ExecuteInProcessResult:
    """A built release with real evaluation data, on its way to staging."""
    rig.publish(RELEASE, "evaluation_data", {DATA_FILE: data("hello", "ping")})
    rig.build(RELEASE, 1, spec)
    return materialize(rig, instance, "staging_deployment")


def document(rig: Rig) -> LoadedPackage:
    handle = rig.platform.column(RELEASE)["staging_deployment"]
    return LoadedPackage.model_validate_json(handle.document)


def verdict(rig: Rig) -> Verdict:
    return verdicts(rig.platform.evidence, RELEASE)["staging_latency"]


def error(result: ExecuteInProcessResult, step: str) -> str:
    """What the UI shows of a failed step."""
    for event in result.all_events:
        if event.is_step_failure and event.step_key == step:
            failure = event.step_failure_data.user_failure_data
            assert failure is not None
            return str(failure.description)
    raise AssertionError(f"{step} did not fail")


def test_fast_model_passes_and_its_figures_are_on_record(
    rig: Rig, instance: DagsterInstance
) -> None:
    """The whole way: slot, load generator in its own process, document, verdict."""
    result = stage(rig, instance, MEDIAN)
    assert result.success, error(result, "staging_deployment")
    latency = document(rig).latency
    assert latency is not None
    assert (latency.source, latency.confidence) == ("built-in", 0.95)
    # Those of the bounds and those asked for besides.
    assert [level.concurrency for level in latency.levels] == [1, 2, 3]
    assert {(level.requests, level.errors) for level in latency.levels} == {(6, 0)}
    found = verdict(rig)
    assert found.decision is Decision.PASSED
    assert [finding.n for finding in found.findings] == [6, 6]
    inputs = rig.platform.columns.get(RELEASE, "staging_deployment").inputs
    evaluation_data = rig.platform.column(RELEASE)["evaluation_data"].digest
    assert inputs["evaluation_data"] == evaluation_data
    log = rig.platform.tool_log(RELEASE, "staging_deployment").read_text()
    assert "latency at concurrency 3" in log
    # Scratch of a thousand stagings would fill the disk.
    assert not [path for path in rig.platform.settings.work.iterdir() if RELEASE in path.name]


def test_the_judged_version_is_measured_after_the_smoke(
    rig: Rig, instance: DagsterInstance
) -> None:
    """A figure of another version would be of other bytes; warm-up is no measurement."""
    assert stage(rig, instance, MEDIAN).success
    (state,) = rig.platform.slots.slots(Environment.STAGING, MODEL)
    requests = rig.platform.slots.requests(state.slot)
    streams = [(path, body) for path, body in requests if path.endswith("generate_stream")]
    assert {path for path, _ in streams} == {"/v2/models/parrot/versions/1/generate_stream"}
    assert {body["max_tokens"] for _, body in streams} == {12}
    assert {body["text_input"] for _, body in streams} == {"hello", "ping"}
    # 6 measured ones at each of three concurrencies, and two per client before.
    assert len(streams) == 3 * 6 + 2 * (1 + 2 + 3)
    assert [path for path, _ in requests[:3]] == ["/v2/models/parrot/generate"] * 3


def test_slow_model_fails_and_goes_no_further(rig: Rig, instance: DagsterInstance) -> None:
    """Right answers that come too late stop the release, and a run of its own does not help."""
    rig.platform.slots.delay_seconds = DELAY_SECONDS
    result = stage(rig, instance, MEDIAN)
    assert not result.success
    found = verdict(rig)
    assert found.decision is Decision.FAILED
    assert {finding.decision for finding in found.findings} == {Decision.FAILED}
    assert all((finding.value or 0) > DELAY_SECONDS for finding in found.findings)
    assert verdicts(rig.platform.evidence, RELEASE)["staging_smoke"].passed
    assert "p50 of end_to_end at concurrency 1" in error(result, "staging_deployment_gates")
    alone = materialize(rig, instance, "production_approval")
    assert "staging_latency: failed" in error(alone, "production_approval")


def test_too_few_requests_are_undecided_and_stop_as_well(
    rig: Rig, instance: DagsterInstance
) -> None:
    """Ten good requests do not show that nine of ten are good."""
    few = spec_with(
        "staging: [{measure: end_to_end, percentile: p50, at_most: 5}]\nrequests: 10\n"
        "objective: {end_to_end: 5}\ngoodput: 0.9"
    )
    result = stage(rig, instance, few)
    assert not result.success
    found = verdict(rig)
    assert found.decision is Decision.UNDECIDED
    assert found.next_action.startswith("Not enough data to decide: measure 35 requests or more")
    alone = materialize(rig, instance, "production_approval")
    assert "staging_latency: undecided" in error(alone, "production_approval")


def test_slow_answers_are_no_good_ones(rig: Rig, instance: DagsterInstance) -> None:
    """The objective of the spec is the one that is counted and judged by."""
    rig.platform.slots.delay_seconds = DELAY_SECONDS
    spec = spec_with(
        "staging: [{measure: end_to_end, percentile: p50, at_most: 5}]\nrequests: 6\n"
        f"objective: {{end_to_end: {DELAY_SECONDS}}}\ngoodput: 0.9"
    )
    assert not stage(rig, instance, spec).success
    assert [(finding.metric, finding.decision) for finding in verdict(rig).findings] == [
        ("p50 of end_to_end at concurrency 1", Decision.PASSED),
        ("goodput at concurrency 1", Decision.FAILED),
    ]


def test_wrong_answers_are_not_measured(rig: Rig, instance: DagsterInstance) -> None:
    """How fast nonsense comes is no evidence; the gate fails rather than stays open."""
    rig.platform.slots.answers = {"hello": "wrld", "ping": "pong"}
    assert not stage(rig, instance, MEDIAN).success
    assert document(rig).latency is None
    found = verdict(rig)
    assert found.decision is Decision.FAILED
    assert "known questions were not answered right" in found.reason
    assert "staging_smoke" in found.next_action
    assert not rig.platform.tool_log(RELEASE, "staging_deployment").exists()


def test_server_that_answers_no_stream_fails_the_step(rig: Rig, instance: DagsterInstance) -> None:
    """Without one measured request there is nothing to judge, and the reason is in the log."""
    rig.publish(RELEASE, "evaluation_data", {DATA_FILE: data("what nobody knows")})
    result = stage(rig, instance, MEDIAN)
    text = error(result, "staging_deployment")
    assert "load generator failed" in text
    assert "no answer to 'what nobody knows'" in text
    assert "staging_deployment" not in rig.platform.column(RELEASE)


def test_aiperf_that_is_not_there_is_explained(rig: Rig, instance: DagsterInstance) -> None:
    """Falling back to another generator would change what the figures mean."""
    without = rig.platform.settings.model_copy(update={"aiperf": None})
    object.__setattr__(rig.platform, "settings", without)
    result = stage(rig, instance, MEDIAN + "    generator: aiperf\n")
    text = error(result, "staging_deployment")
    assert f"Found: no {aiperf.VARIABLE}" in text
    assert "pip install aiperf==0.13.0" in text
    assert "staging_deployment" not in rig.platform.column(RELEASE)


@pytest.mark.aiperf
@pytest.mark.timeout(200)
def test_aiperf_measures_when_the_spec_asks_for_it(
    rig: Rig, instance: DagsterInstance, tmp_path: Path
) -> None:
    """The same document and the same gate, whoever took the time."""
    from llmops_assets.develop.tokenizer import build_tokenizer, save_tokenizer

    if rig.platform.settings.aiperf is None:
        pytest.skip(f"{aiperf.VARIABLE} names no aiperf command")
    save_tokenizer(build_tokenizer([]), tmp_path / "tokenizer", 64)
    files = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    rig.publish(RELEASE, "checkpoint", files)
    spec = spec_with(
        "staging: [{measure: end_to_end, percentile: p50, at_most: 5, concurrency: 2}]\n"
        "requests: 8\ngenerator: aiperf\nobjective: {end_to_end: 5}\ngoodput: 0.5"
    )
    result = stage(rig, instance, spec)
    assert result.success, error(result, "staging_deployment")
    latency = document(rig).latency
    assert latency is not None
    assert latency.source == "aiperf"
    assert [(level.concurrency, level.requests) for level in latency.levels] == [(1, 8), (2, 8)]
    assert {level.errors for level in latency.levels} == {0}
    assert verdict(rig).decision is Decision.PASSED


def test_many_clients_get_a_request_each(rig: Rig, instance: DagsterInstance) -> None:
    """A spec may ask for more clients than requests; then the requests are too few, not wrong."""
    spec = spec_with(
        "staging: [{measure: end_to_end, percentile: p50, at_most: 5}]\n"
        "requests: 6\nconcurrencies: [7]"
    )
    assert stage(rig, instance, spec).success
    latency = document(rig).latency
    assert latency is not None
    assert [level.requests for level in latency.levels] == [7, 7]


def test_no_request_is_cut_off_that_a_bound_allows() -> None:
    """A model that may take half a minute would fail by the platform's own time limit."""
    slow = parse_spec(spec_with(
        "staging: [{measure: end_to_end, at_most: 30}]\nobjective: {end_to_end: 40}"
    ), "test")  # fmt: skip
    assert request_timeout(slow.gates.latency, 10) >= 40
    assert request_timeout(parse_spec(SPEC, "test").gates.latency, 20) == 20


def test_prompts_are_bounded_and_always_the_same(tmp_path: Path) -> None:
    """A million rows must not be sent to the load generator, nor others each time."""
    everything = [f"prompt {number}" for number in range(MOST_PROMPTS + 500)]
    (tmp_path / DATA_FILE).write_bytes(data(*everything))
    chosen = choose_prompts(tmp_path)
    assert chosen == choose_prompts(tmp_path)
    assert len(set(chosen)) == MOST_PROMPTS
    assert set(chosen) <= set(everything)
    # Sorted data would otherwise be asked of one slice only.
    assert set(chosen) & set(everything[-400:])


def test_measured_at_a_lower_confidence_is_refused() -> None:
    """The spec's confidence is the one that verdicts state."""
    strict = parse_spec(SPEC.replace("gates:\n", "gates:\n  confidence: 0.96\n"), "test")
    lax = LatencySummary(source="built-in", confidence=0.95, levels=())
    with pytest.raises(DataError, match="96 %"):
        judge_staging_latency(lax, strict.gates)
