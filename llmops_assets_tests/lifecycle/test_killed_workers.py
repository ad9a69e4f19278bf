"""kill -9 of a run's worker in the middle of a step: nothing half-done is left, or served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterEventType

from llmops_assets.serving.slot_process import read_slot
from llmops_assets.serving.slots import Environment
from llmops_assets.tools import PROGRESS_PREFIX
from llmops_assets_tests.lifecycle.conftest import FirstRelease
from llmops_assets_tests.lifecycle.kills import (
    kill_when,
    runs_module,
    stop_when,
    survivors,
)
from llmops_assets_tests.lifecycle.stack_user import MODEL, StackUser
from llmops_assets_tests.lifecycle.traffic import Traffic, problems

pytestmark = pytest.mark.integration

ENGINE_BUILD = "llmops_assets.toolchains.onnxruntime_genai.build"
EVENTS = ("registered_model", "staging_deployment", "production_approval", "production_candidate")
"""Assets that record what happened in the world; doing it again is a new record."""


@pytest.fixture(autouse=True)
def production_keeps_answering(user: StackUser, first_release: FirstRelease) -> Iterator[None]:
    """Whatever dies on the way to production, or after it: clients must not notice."""
    with Traffic(user.gateway_url, MODEL, user.known_answers) as traffic:
        yield
    assert traffic.requests
    assert not problems(traffic.requests)


def test_killed_in_checkpoint(user: StackUser) -> None:
    """An hour of training must not be lost, nor go on beside its own second start."""
    # Half of the example's steps: enough to be killed in, too few to be good.
    steps = int(user.spec["weights"]["steps"]) // 2
    commit = user.commit_spec(weights={"seed": 1, "steps": steps})
    key, run = user.start_release(commit)
    states = "checkpoint-*/scratch/resume/state.safetensors"
    tools = kill_when(user.worker(run), lambda: list(user.settings.work.glob(states)))
    assert tools, "the training ran when its worker was killed"
    assert not survivors(tools)
    user.expect_death(run)
    saved = _saved_step(next(user.settings.work.glob(states)))
    assert saved > 0
    log = user.platform.tool_log(key, "checkpoint")
    before = len(log.read_text().splitlines())

    # What its gates say of so short a training is not the question here.
    user.follow(user.start_release(commit, key)[1])
    assert "checkpoint" in user.platform.columns.assets(key)
    trained = [
        json.loads(line.removeprefix(PROGRESS_PREFIX))["step"]
        for line in log.read_text().splitlines()[before:]
        if line.startswith(PROGRESS_PREFIX)
    ]
    assert trained[0] > saved
    assert trained[-1] == steps


def test_killed_in_engine(user: StackUser, first_release: FirstRelease) -> None:
    """The build is a process of its own; it must not outlive its worker and write on."""
    commit = user.commit_spec(engine={"block_size": 128})
    key, run = user.start_release(commit)
    worker = user.worker(run)
    log = user.platform.tool_log(key, "engine")
    tools = kill_when(
        worker,
        lambda: (
            log.exists()
            and any(runs_module(tool, ENGINE_BUILD) for tool in worker.children(recursive=True))
        ),
    )
    assert any(runs_module(tool, ENGINE_BUILD) for tool in tools)
    assert not survivors(tools)
    _finishes(user, key, run, "engine")


def test_killed_in_packaged_model(user: StackUser, first_release: FirstRelease) -> None:
    """Half a package must never be taken for a whole one."""
    # Nothing but the package depends on how many questions are known.
    questions = user.spec["serving"]["known_answers"][:2]
    commit = user.commit_spec(serving={"known_answers": questions})
    key, run = user.start_release(commit)
    kill_when(
        user.worker(run),
        lambda: any(user.settings.work.glob("packaged_model-*/attempt-*/output*/**/*")),
    )
    _finishes(user, key, run, "packaged_model")


def test_killed_in_staging_deployment(user: StackUser, first_release: FirstRelease) -> None:
    """A server that loads when its worker dies must not keep the slot for ever."""
    commit = user.commit_spec()
    key, run = user.start_release(commit)
    kill_when(user.worker(run), lambda: key in _placed(user, Environment.STAGING))
    _finishes(user, key, run, "staging_deployment")
    route, _ = user.platform.routes.current(Environment.STAGING, MODEL)
    assert route is not None
    assert route.serving is not None
    assert route.serving.release == key


def test_killed_in_production_candidate(user: StackUser, spare_release: str) -> None:
    """The candidate loads beside what serves; when it dies half-way, that must not matter."""
    serving = user.serving()
    run = user.start_promotion(spare_release)
    kill_when(user.worker(run), lambda: spare_release in _placed(user, Environment.PRODUCTION))
    assert user.serving() == serving
    _finishes(user, spare_release, run, "production_candidate")
    assert user.serving().release == spare_release


def test_killed_in_production_deployment(user: StackUser, spare_release: str) -> None:
    """The worst moment: the new route is recorded, and the gateway has not heard of it."""
    served = user.ask()["model_version"]
    # The release may have been a candidate before, when another one took its slot.
    earlier = user.platform.columns.find(spare_release, "production_candidate")
    run = user.start_promotion(spare_release)
    worker = user.worker(run)
    stop_when(
        worker,
        lambda: user.platform.columns.find(spare_release, "production_candidate") != earlier,
    )
    # Whoever holds the gateway keeps others from telling it of new routes.
    with user.platform.gateway.exclusive():
        worker.resume()
        kill_when(worker, lambda: user.serving().release == spare_release)
    assert user.platform.routes.differences(Environment.PRODUCTION)
    assert user.ask()["model_version"] == served
    _finishes(user, spare_release, run, "production_deployment")
    assert not user.platform.routes.differences(Environment.PRODUCTION)
    version = user.platform.columns.get(spare_release, "registered_model").facts["version"]
    assert user.ask()["model_version"] == str(version) != served


def test_killed_in_archive(user: StackUser, spare_release: str) -> None:
    """An archive that exists but is not on record, or half of one, restores nothing."""
    outcome = user.run_job("deprecate", spare_release)
    assert outcome.succeeded, outcome.failures
    run = user.client.launch("archive_release", spare_release)
    kill_when(user.worker(run), lambda: _unfinished_archives(user, spare_release))
    assert _unfinished_archives(user, spare_release)
    _finishes(user, spare_release, run, "archive")
    assert not _unfinished_archives(user, spare_release)


def _finishes(user: StackUser, release: str, killed: str, asset: str) -> None:
    """The killed run failed in its step, and the same job for the same release goes to the end.

    What the release had published before stays what it was.
    """
    user.expect_death(killed)
    begun, ended = (
        {entry.step_key for entry in user.dagster.all_logs(killed, of_type=kind)}
        for kind in (DagsterEventType.STEP_START, DagsterEventType.STEP_SUCCESS)
    )
    assert asset in begun - ended
    before = user.platform.columns.assets(release)
    user.expect_success(user.client.launch(user.run(killed).job_name, release))
    after = user.platform.columns.assets(release)
    assert asset in after
    for name, result in before.items():
        if name not in EVENTS:
            assert after[name].artifact == result.artifact


def _placed(user: StackUser, environment: Environment) -> set[str]:
    """Releases whose bytes are in slots of an environment, whether they are served or not."""
    folder = user.settings.slots / environment / MODEL
    held = (read_slot(slot) for slot in folder.iterdir() if slot.is_dir())
    return {slot.deployment.release for slot in held if slot is not None}


def _unfinished_archives(user: StackUser, release: str) -> list[Path]:
    return list(user.settings.cold.glob(f"{release}.*partial"))


def _saved_step(state: Path) -> int:
    """The step of a training's saved state, from the header of the safetensors file."""
    with state.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["__metadata__"]["step"])
