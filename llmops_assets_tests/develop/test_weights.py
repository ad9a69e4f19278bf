"""What each source's action covers, and a trainer of one's own: killed, changed, careless."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from dagster import DagsterInstance
from mlflow.tracking import MlflowClient

from llmops_assets.compliance.model_card import check_card
from llmops_assets.develop.data import DATA_FILE
from llmops_assets.develop.sources import hold_still
from llmops_assets.develop.weights import (
    Step,
    checkpoint_action,
    from_mlflow,
    imported_action,
    trained_by_command,
    training_history,
)
from llmops_assets.errors import DataError, LLMOpsError, SettingsError, SpecError, ToolError
from llmops_assets.evidence.gates import DATA_COMPLIANCE, LEAKAGE
from llmops_assets.spec import CommandWeights, MLflowWeights, ModelSpec, parse_spec, read_spec
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.columns import Result, Workshop
from llmops_assets.storage.store import content_digest
from llmops_assets.tools import ToolRunner

from ..release_rig import FAILED, PASSED, SPEC, Rig
from ..test_reporting import Runs, description, materialized
from ..tiny_llama import write_checkpoint

pytestmark = pytest.mark.timeout(120)
RELEASE = "parrot.v1"
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

# Learns the number of rows, which is little, but from the data and with a state to lose.
TRAINER = """\
import json, os, shutil, signal, sys
from pathlib import Path
import numpy as np
import pyarrow.parquet as parquet
from safetensors.numpy import load_file, save_file
data, output, work = map(Path, sys.argv[1:4])
state = work / "step"
first = int(state.read_text()) if state.exists() else 0
for step in range(first, 4):
    print('@progress ' + json.dumps({"step": step + 1, "of": 4}), flush=True)
    print(f"trained step {step}", flush=True)
    state.write_text(str(step + 1))
    if os.environ.get("KILLED_AT") == str(step):
        os.kill(os.getpid(), signal.SIGKILL)
shutil.copytree("training/base", output)
weights = load_file(output / "model.safetensors")
weights["model.norm.weight"] += np.float32(parquet.read_metadata(data).num_rows)
save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
history = [{"step": step, "loss": 1 / step} for step in (1, 2, 3, 4)]
(output / "history.json").write_text(json.dumps(history))
"""
# Of the actions of releases that were made before there were other sources.
TRAIN_DIGEST = "sha256:ec7f575b5d19b178b97084ad07169e16a4ca0d3f4ddfeb72bb338bf36aba916c"
PATH_DIGEST = "sha256:7dfa5e66b59b7ddb8ee7f0d1fdb81ffd18b6168ec1fdd4f628e3df1078380881"
COMMAND = [sys.executable, "training/train.py", "{training_data}", "{output}", "{work}"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint that the trainer begins with."""
    directory = tmp_path_factory.mktemp("base") / "checkpoint"
    write_checkpoint(directory)
    return directory


@pytest.fixture
def repository(rig: Rig, base: Path) -> Path:
    """The rig's repository with a trainer in it."""
    shutil.copytree(base, rig.root / "training" / "base")
    write_trainer(rig.root, TRAINER)
    return rig.root


def write_trainer(repository: Path, code: str) -> None:
    (repository / "training" / "train.py").write_text(code)


def spec_text(**options: Any) -> str:
    """A spec with weights by the trainer."""
    weights = {"source": "command", "command": COMMAND, "code": ["training"], **options}
    before = "weights: {source: path, path: checkpoint}"
    assert before in SPEC
    return SPEC.replace(before, f"weights: {json.dumps(weights)}")


def command_spec(**options: Any) -> tuple[ModelSpec, CommandWeights]:
    spec = parse_spec(spec_text(**options), "test")
    assert isinstance(spec.weights, CommandWeights)
    return spec, spec.weights


def training_data(rig: Rig, rows: int = 3) -> ArtifactHandle:
    table = pd.DataFrame(
        {"prompt": ["a"] * rows, "completion": ["b"] * rows, "slice": ["s"] * rows}
    )
    result = rig.publish(RELEASE, "training_data", {DATA_FILE: table.to_parquet(index=False)})
    return ArtifactHandle(result, rig.platform.store)


def step(rig: Rig, **options: Any) -> Step:
    spec, weights = command_spec(**options)
    platform = rig.platform

    def tools(workshop: Workshop) -> ToolRunner:
        return platform.tools(RELEASE, "checkpoint", workshop, lambda line: None)

    return trained_by_command(spec, weights, training_data(rig), rig.root, tools)


def produce(rig: Rig, made: Step, release: str = RELEASE) -> Result:
    return rig.platform.columns.produce(release, made.action, made.make)


def log(rig: Rig) -> str:
    return rig.platform.tool_log(RELEASE, "checkpoint").read_text()


def test_actions_of_before_keep_their_digests() -> None:
    """Another digest would train again what thousands of releases share."""
    weights = "weights: {source: train, steps: 5, seed: 3}"
    spec = parse_spec(SPEC.replace("weights: {source: path, path: checkpoint}", weights), "test")
    action = checkpoint_action(spec, "sha256:" + "0" * 64, Path("unused"))
    assert action.versions.keys() == {"train", "torch", "transformers", "tokenizers"}
    fixed = replace(action, versions={"train": "1"})
    assert fixed.digest == TRAIN_DIGEST
    imported = imported_action(parse_spec(SPEC, "test"), "sha256:" + "1" * 64)
    assert imported.digest == PATH_DIGEST


def test_a_trainer_of_ones_own(rig: Rig, repository: Path) -> None:
    """It learns from the release's data, and what it wrote is the artifact."""
    result = produce(rig, step(rig))
    _, directory = rig.platform.store.open(result.artifact)
    from safetensors.numpy import load_file

    assert load_file(directory / "model.safetensors")["model.norm.weight"][0] == 4  # 1 and 3 rows
    assert training_history(directory) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert result.facts["parameters"] > 0
    again = produce(rig, step(rig), "parrot.v2")
    assert (again.artifact, again.reused_from) == (result.artifact, RELEASE)
    assert log(rig).count("trained step 0") == 1


def test_changed_code_data_or_command_is_another_action(rig: Rig, repository: Path) -> None:
    """What is not covered is reused although it would come out differently."""
    actions = [step(rig).action.digest]
    write_trainer(repository, TRAINER.replace("range(first, 4)", "range(first, 5)"))
    actions.append(step(rig).action.digest)
    (repository / "training" / "base" / "config.json").write_text("{}")
    actions.append(step(rig).action.digest)
    actions.append(step(rig, command=[*COMMAND, "--fast"]).action.digest)
    spec, _ = command_spec()
    actions.append(checkpoint_action(spec, "sha256:" + "0" * 64, repository).digest)
    assert len(set(actions)) == len(actions)

    # Python leaves these behind wherever somebody tried the trainer by hand.
    (repository / "training" / "__pycache__").mkdir()
    (repository / "training" / "__pycache__" / "train.pyc").write_bytes(b"x")
    assert step(rig, command=[*COMMAND, "--fast"]).action.digest == actions[-2]


def test_a_killed_trainer_goes_on_where_it_was(
    rig: Rig, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """{work} is all that a training of days has left after a machine's crash."""
    monkeypatch.setenv("KILLED_AT", "2")
    with pytest.raises(ToolError, match=r"the trainer failed.*exit code 137"):
        produce(rig, step(rig, environment=["KILLED_AT"]))
    monkeypatch.setenv("KILLED_AT", "never")
    produce(rig, step(rig, environment=["KILLED_AT"]))
    assert [log(rig).count(f"trained step {number}") for number in range(4)] == [1, 1, 1, 1]


def test_values_of_the_environment_are_never_seen(
    rig: Rig, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that prints what it was given, in pieces, and then fails with it."""
    secret = "s3cret-of-the-tracker"
    monkeypatch.setenv("TRACKER_KEY", secret)
    monkeypatch.setenv("NOT_NAMED", "another-secret-here")
    write_trainer(
        repository,
        "import os, sys, time\n"
        "key = os.environ['TRACKER_KEY']\n"
        "assert 'NOT_NAMED' not in os.environ\n"
        "for part in ('first ', key[:5], key[5:], ' done\\n'):\n"
        "    print(part, end='', flush=True); time.sleep(0.2)\n"
        "print('@progress {\"step\": \"' + key + '\"}', flush=True)\n"
        "sys.stderr.write('refused with ' + key + ' and ' + key[:7])\n"
        "sys.exit(1)\n",
    )
    made = step(rig, environment=["TRACKER_KEY"])
    with pytest.raises(ToolError) as caught:
        produce(rig, made)
    assert "first *** done" in log(rig)
    assert "refused with *** and s3cret-" in log(rig), "the end of the output was lost"
    assert secret not in log(rig) + str(caught.value)
    assert secret not in json.dumps(dict(made.action.parameters))


def test_a_missing_variable_is_an_error_before_anything_runs(
    rig: Rig, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours later the trainer would fail at its first upload."""
    monkeypatch.delenv("TRACKER_KEY", raising=False)
    with pytest.raises(SettingsError, match="no TRACKER_KEY"):
        produce(rig, step(rig, environment=["TRACKER_KEY"]))
    assert not rig.platform.tool_log(RELEASE, "checkpoint").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "ended without an error and wrote no checkpoint"),
        ("import os, sys; os.mkdir(sys.argv[2])", r"no usable checkpoint.*config\.json: missing"),
        (
            TRAINER + "(output / 'training_args.bin').write_bytes(b'x')\n",
            r"training_args\.bin: may hold a pickle",
        ),
        (TRAINER + "(output / 'x.txt').symlink_to('/etc/hostname')\n", "which is outside"),
        (TRAINER + "Path('training/notes').write_text('x')\n", "code changed while it ran"),
    ],
)
def test_what_a_careless_trainer_leaves_is_not_published(
    rig: Rig, repository: Path, code: str, message: str
) -> None:
    """Exit code 0 proves nothing, and what is published once is reused for ever."""
    write_trainer(repository, code)
    with pytest.raises(DataError, match=message):
        produce(rig, step(rig))
    assert rig.platform.columns.find(RELEASE, "checkpoint") is None


def link_outside(repository: Path) -> None:
    (repository.parent / "elsewhere.py").write_text("print(1)")
    (repository / "training" / "link.py").symlink_to(repository.parent / "elsewhere.py")


def link_to_folder(repository: Path) -> None:
    (repository / "training" / "models").symlink_to(repository / "models")


@pytest.mark.parametrize("plant", [link_outside, link_to_folder])
def test_code_outside_of_the_repository_is_refused(rig: Rig, repository: Path, plant: Any) -> None:
    """Nobody reviewed it, and its changes would go unseen."""
    plant(repository)
    with pytest.raises(SpecError, match="which is not of the repository"):
        step(rig)


@pytest.mark.parametrize("path", ["/etc/hostname", "../elsewhere.py", "training/gone.py"])
def test_code_that_is_not_there_is_refused(rig: Rig, repository: Path, path: str) -> None:
    """A path mistyped in the spec; without code the action would cover nothing."""
    with pytest.raises(SpecError, match=r"not (of|in) the repository"):
        step(rig, code=["training", path])


def test_another_programs_history_is_none_of_ours(tmp_path: Path) -> None:
    """Many trainers have a history.json; only one like ours makes a curve."""
    for content in ("{}", "[]", '[{"epoch": 1}]', "not json"):
        (tmp_path / "history.json").write_text(content)
        assert training_history(tmp_path) is None


@pytest.fixture
def runs(rig: Rig) -> Iterator[Runs]:
    with DagsterInstance.ephemeral() as instance:
        yield Runs(rig, instance)


def test_the_asset_trains_only_behind_its_gates(runs: Runs, repository: Path) -> None:
    """The same door as for our own trainer: nothing is learned from data that leak."""
    rig = runs.rig
    rig.freeze(RELEASE, spec_text())
    training_data(rig)
    for asset in ("data_report", "evaluation_data"):
        rig.publish(RELEASE, asset, {"content": asset})
    rig.judge(RELEASE, [DATA_COMPLIANCE], PASSED)
    rig.judge(RELEASE, [LEAKAGE], FAILED)
    refused = runs.assets(RELEASE, "checkpoint")
    assert "no_leakage" in description(refused, "checkpoint")
    assert not rig.platform.tool_log(RELEASE, "checkpoint").exists()

    rig.judge(RELEASE, [LEAKAGE], PASSED)
    assert "checkpoint" in materialized(runs.assets(RELEASE, "checkpoint"))
    # The checkout may go; the release has its own copy.
    shutil.rmtree(repository / "training")
    assert "checkpoint" in materialized(runs.assets(RELEASE, "checkpoint"))


def test_the_asset_imports_a_directory_as_it_is(runs: Runs, base: Path) -> None:
    """The oldest source, now one of five: its bytes, and no gate of training before it."""
    rig = runs.rig
    shutil.copytree(base, rig.root / "checkpoint")
    rig.freeze(RELEASE)
    training_data(rig)
    runs.assets(RELEASE, "checkpoint")
    result = rig.platform.columns.get(RELEASE, "checkpoint")
    assert result.parameters == {"content": content_digest(base)}
    hold_still(rig.platform.store.open(result.artifact)[1], content_digest(base))
    shutil.rmtree(rig.root / "checkpoint")
    assert "checkpoint" in materialized(runs.assets(RELEASE, "checkpoint"))


def test_a_version_of_mlflow_is_fetched_once(
    rig: Rig, base: Path, mlflow_url: str, tmp_path: Path
) -> None:
    """The real process; killed after the fetch, the next attempt finds what it left."""
    client = MlflowClient(mlflow_url, mlflow_url)
    run = client.create_run("0").info.run_id
    client.log_artifacts(run, str(base), "model")
    client.create_registered_model("weights-test")
    client.create_model_version("weights-test", f"runs:/{run}/model", run_id=run)
    weights = MLflowWeights(source="mlflow", model="weights-test", version=1)
    spec = parse_spec(SPEC, "test").model_copy(update={"weights": weights})
    folder = tmp_path / "fetched"

    def fetched(url: str) -> Step:
        return from_mlflow(
            spec,
            weights,
            url,
            folder,
            lambda workshop: ToolRunner(workshop.scratch, tmp_path / "log", 60),
        )

    made = fetched(mlflow_url)
    content = content_digest(base)
    assert made.action.parameters == {"model": "weights-test", "version": 1, "content": content}
    assert fetched("http://127.0.0.1:9").action == made.action
    result = produce(rig, made)
    hold_still(rig.platform.store.open(result.artifact)[1], content)
    assert made.fetched == folder

    shutil.rmtree(folder)
    missing = weights.model_copy(update={"version": 9})
    with pytest.raises(ToolError, match=r"Version 9 of weights-test cannot be fetched"):
        from_mlflow(
            spec, missing, mlflow_url, folder,
            lambda workshop: ToolRunner(workshop.scratch, tmp_path / "log", 60),
        )  # fmt: skip


def test_actions_are_asked_of_the_right_function() -> None:
    """Asked the wrong way an answer would compare weights with nothing."""
    with pytest.raises(LLMOpsError, match="use imported_action"):
        checkpoint_action(parse_spec(SPEC, "test"), "sha256:" + "0" * 64, Path())
    with pytest.raises(LLMOpsError, match="use checkpoint_action"):
        imported_action(command_spec()[0])


@pytest.mark.parametrize(
    ("name", "source"), [("nemo-order-assistant", "command"), ("qwen3-8b", "huggingface")]
)
def test_examples_are_valid(name: str, source: str) -> None:
    """They are copied, so they must stay what the platform reads."""
    spec = read_spec(EXAMPLES / f"{name}.yaml")
    assert spec.weights.source == source
    assert check_card(spec.card).missing == ()
