"""The asset graph as a whole: complete, gated, cheap to load, and changed only on purpose.

After a change that is meant: `UPDATE_SNAPSHOTS=1 python -m pytest llmops_assets_tests/test_definitions.py`
"""  # noqa: E501

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import dagster as dg
import pytest

from llmops_assets.definitions import definitions_for
from llmops_assets.evidence import gates as gate_module
from llmops_assets.evidence.gates import Gate
from llmops_assets.partitions import MODELS, RELEASES
from llmops_assets.platform import Platform
from llmops_assets.settings import Settings

ROOT = Path(__file__).parent.parent
SNAPSHOT = Path(__file__).parent / "snapshots" / "asset_graph.txt"
GATES = [gate for gate in vars(gate_module).values() if isinstance(gate, Gate)]

# The design's table: asset, group, owner.
TABLE = """
pushed_specs develop data-science
model_spec develop data-science
training_data develop data-science
data_report develop data-science
evaluation_data develop data-science
checkpoint develop data-science
evaluation develop data-science
registered_model develop data-science
converted_weights build ml-engineering
engine build ml-engineering
engine_validation build ml-engineering
packaged_model build ml-engineering
compliance_report build ml-engineering
staging_deployment deploy ml-engineering
production_approval deploy ml-engineering
production_candidate deploy platform
production_deployment deploy platform
production_route operate sre
service_metrics operate sre
scaling_policy operate platform
incidents operate sre
deprecated_version retire sre
archive retire platform
removed_version retire platform
lifecycle_metrics reports sre
audit_record reports sre
"""
ROWS = [tuple(line.split()) for line in TABLE.strip().splitlines()]
HEAVY = (
    "torch", "transformers", "mlflow", "onnxruntime", "kubernetes", "pandas", "matplotlib", "scipy",
    "presidio_analyzer", "cyclonedx", "fickling", "detect_secrets", "lm_eval",
)  # fmt: skip


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> dg.Definitions:
    return definitions_for(Platform(Settings(state=tmp_path_factory.mktemp("state"))))


@pytest.fixture(scope="module")
def specs(definitions: dg.Definitions) -> Mapping[str, dg.AssetSpec]:
    return {spec.key.to_user_string(): spec for spec in definitions.resolve_all_asset_specs()}


@pytest.fixture(scope="module")
def checks(definitions: dg.Definitions) -> Mapping[str, dg.AssetCheckSpec]:
    graph = definitions.resolve_asset_graph()
    found = [graph.get_check_spec(key) for key in graph.asset_check_keys]
    return {f"{check.asset_key.to_user_string()}:{check.name}": check for check in found}


def described(definitions: dg.Definitions) -> str:
    """The graph as text, for people to read in a diff."""
    return "\n".join([*_assets(definitions), *_jobs(definitions)]) + "\n"


def _assets(definitions: dg.Definitions) -> Iterator[str]:
    graph = definitions.resolve_asset_graph()
    for spec in sorted(definitions.resolve_all_asset_specs(), key=lambda spec: spec.key):
        node = graph.get(spec.key)
        partitions = spec.partitions_def
        assert partitions is None or isinstance(partitions, dg.DynamicPartitionsDefinition)
        yield f"asset {spec.key.to_user_string()}"
        yield f"  group       {spec.group_name}"
        yield f"  owners      {_list(spec.owners)}"
        yield f"  kinds       {_list(spec.kinds)}"
        yield f"  partitions  {'none' if partitions is None else partitions.name}"
        yield f"  pool        {_list(node.pools or ())}"
        yield f"  deps        {_list(dep.asset_key.to_user_string() for dep in spec.deps)}"
        for key in sorted(graph.asset_check_keys, key=lambda key: key.name):
            if key.asset_key == spec.key:
                check = graph.get_check_spec(key)
                others = {dep.asset_key.to_user_string() for dep in check.additional_deps}
                yield (
                    f"  check       {key.name}, {'blocking' if check.blocking else 'not blocking'}"
                    + (f", waits for {_list(others)}" if others else "")
                )
        yield ""


def _jobs(definitions: dg.Definitions) -> Iterator[str]:
    for job in sorted(_own_jobs(definitions), key=lambda job: job.name):
        yield f"job {job.name}"
        yield f"  {job.description}"
        for node in sorted(job.nodes, key=lambda node: node.name):
            yield f"  step        {node.name}"
        yield ""


def _own_jobs(definitions: dg.Definitions) -> list[dg.JobDefinition]:
    repository = definitions.get_repository_def()
    return [job for job in repository.get_all_jobs() if not job.name.startswith("__")]


def _list(values: Iterable[str]) -> str:
    return ", ".join(sorted(values)) or "none"


def test_graph_is_the_reviewed_one(definitions: dg.Definitions) -> None:
    """A dependency or a gate lost in a refactoring shows here, in a line one can read."""
    actual = described(definitions)
    if os.environ.get("UPDATE_SNAPSHOTS"):
        SNAPSHOT.write_text(actual)
    assert actual.splitlines() == SNAPSHOT.read_text().splitlines()


@pytest.mark.parametrize(("asset", "group", "owner"), ROWS)
def test_assets_of_the_design_are_there(
    specs: Mapping[str, dg.AssetSpec], asset: str, group: str, owner: str
) -> None:
    """No box of the workflow may lose its asset, nor its owner."""
    assert specs[asset].group_name == group
    assert specs[asset].owners == [f"team:{owner}"]


def test_every_asset_is_described_and_labelled(specs: Mapping[str, dg.AssetSpec]) -> None:
    """The graph in the UI is the platform's documentation for most people."""
    for name, spec in specs.items():
        assert spec.description, name
        assert len(spec.description) > 20, name
        assert spec.kinds, name


def test_partitions_are_releases_but_for_three(specs: Mapping[str, dg.AssetSpec]) -> None:
    """One release is one column: lineage for an audit is one key."""
    others = {name: spec.partitions_def for name, spec in specs.items()
              if spec.partitions_def != RELEASES}  # fmt: skip
    assert others == {
        "production_route": MODELS, "lifecycle_metrics": None, "pushed_specs": None
    }  # fmt: skip


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_every_gate_is_one_blocking_check_on_its_asset(
    checks: Mapping[str, dg.AssetCheckSpec], gate: Gate
) -> None:
    """A gate that is shown nowhere never gets a verdict; one shown twice gets two."""
    shown = [check for check in checks.values() if check.name == gate.name]
    assert [check.asset_key.to_user_string() for check in shown] == [gate.asset]
    assert shown[0].blocking
    assert shown[0].partitions_def == RELEASES
    assert shown[0].description == gate.description


def test_checks_that_are_no_gates(checks: Mapping[str, dg.AssetCheckSpec]) -> None:
    """Whatever else is shown as a check decides nothing; it must be known to be so."""
    names = {gate.name for gate in GATES}
    assert {key for key, check in checks.items() if check.name not in names} == {
        "production_route:recorded_is_observed",
        "pushed_specs:specs_valid",
        "pushed_specs:specs_deleted",
    }


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_what_a_gate_judges_is_there_when_it_judges(
    definitions: dg.Definitions, gate: Gate
) -> None:
    """A subject that is neither upstream nor waited for may not have been made yet."""
    graph = definitions.resolve_asset_graph()
    above: set[str] = {gate.asset, *gate.waits_for}
    queue = [dg.AssetKey(gate.asset)]
    while queue:
        for parent in graph.get(queue.pop()).parent_keys:
            if parent.to_user_string() not in above:
                above.add(parent.to_user_string())
                queue.append(parent)
    assert set(gate.subjects) <= above
    assert gate.next_action
    assert gate.next_action[0].islower(), "it follows `To do: `"


def test_steps_that_must_not_run_side_by_side_share_a_pool(definitions: dg.Definitions) -> None:
    """Two deployments would fill one slot; two trainings would take each other's cores."""
    graph = definitions.resolve_asset_graph()
    pools: dict[str, set[str]] = {}
    for key in graph.get_all_asset_keys():
        for pool in graph.get(key).pools or ():
            pools.setdefault(pool, set()).add(key.to_user_string())
    assert pools["deploy_staging"] == {"staging_deployment"}
    assert pools["deploy_production"] == {
        "production_candidate", "production_deployment", "deprecated_version", "removed_version"
    }  # fmt: skip
    assert {"checkpoint", "evaluation", "engine", "engine_validation"} <= pools["heavy_compute"]


def test_rollback_waits_in_no_pool(definitions: dg.Definitions) -> None:
    """A deployment that hangs must not keep the bad release in place."""
    job = definitions.resolve_job_def("rollback")
    assert [node.definition.pools for node in job.nodes] == [set()]


def test_every_job_with_release_assets_takes_no_required_config(
    definitions: dg.Definitions,
) -> None:
    """The launchpad, and whoever launches by a key alone, must be able to start them."""
    for job in _own_jobs(definitions):
        if job.name != "rollback":
            assert not job.run_config_schema.config_type.fields["ops"].is_required, job.name  # type: ignore[attr-defined]


def test_triggers_run_by_themselves_and_start_named_jobs(definitions: dg.Definitions) -> None:
    """People must be able to forget that they exist, and to learn what they do in the UI."""
    sensors = {
        sensor.name: sensor for sensor in definitions.sensors or () if sensor.name != "reports"
    }
    assert {
        name: sorted(target.job_name for target in sensor.targets)
        for name, sensor in sensors.items()
        if isinstance(sensor, dg.SensorDefinition)
    } == {
        "git_push": ["release", "review_push"],
        "registry": ["release"],
        "approval": ["promote"],
        "retraining": ["release"],
        "alerts": ["observe", "rollback", "scale"],
        "toolchain_bump": ["release"],
        "openlineage": [],
    }
    for sensor in sensors.values():
        assert isinstance(sensor, dg.SensorDefinition)
        assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
        assert len((sensor.description or "").split()) >= 20
        assert "stop" in (sensor.description or ""), "how to switch it off"


def test_conditions_serve_only_the_reports(specs: Mapping[str, dg.AssetSpec]) -> None:
    """Whatever changes a model or its route has a trigger that counts events."""
    automated = {name for name, spec in specs.items() if spec.automation_condition is not None}
    assert automated == {"lifecycle_metrics", "audit_record"}


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_loading_imports_nothing_heavy() -> None:
    """The code server, the daemon's ticks and every command pay for each import."""
    loaded = python(
        f"""
        import sys
        import dagster
        before = set(sys.modules)
        from llmops_assets.definitions import definitions_for, local_platform
        definitions_for(local_platform()).get_repository_def().get_all_jobs()
        print(" ".join(sorted(set({HEAVY!r}) & (set(sys.modules) - before))))
        """
    )
    assert loaded == ""


def test_loading_costs_little_more_than_dagster() -> None:
    """At most a second of CPU; the minimum of three, side by side, as the machine is shared."""
    code = "import time; {}; print(time.process_time())"
    alone, ours = [], []
    for _ in range(3):
        alone.append(float(python(code.format("import dagster"))))
        ours.append(float(python(code.format("import llmops_assets.definitions"))))
    assert min(ours) - min(alone) <= 1.0


def test_dg_accepts_the_definitions(tmp_path: Path) -> None:
    """What CI and `dg dev` run; it also loads every job and resource."""
    environment = {**os.environ, "LLMOPS_STATE": str(tmp_path / "state"), "DAGSTER_HOME": ""}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("dg")), "check", "defs"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_deprecated_is_used(tmp_path: Path) -> None:
    """Dagster's deprecations become removals with its next minor version."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        definitions = definitions_for(Platform(Settings(state=tmp_path)))
        definitions.get_repository_def().get_all_jobs()
    kinds = (DeprecationWarning, dg.SupersessionWarning)
    ours = [w for w in caught if issubclass(w.category, kinds) and "llmops_assets" in w.filename]
    assert ours == []
    message = python(
        """
        import warnings
        import dagster
        warnings.filterwarnings("error", category=DeprecationWarning, module="llmops_assets")
        warnings.filterwarnings("error", category=dagster.SupersessionWarning)
        import llmops_assets.definitions
        llmops_assets.definitions.definitions_for(llmops_assets.definitions.local_platform())
        """
    )
    assert message == ""
