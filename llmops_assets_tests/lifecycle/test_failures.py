"""What goes wrong, and what the reader is told: one error, its cure, and production serves."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llmops_assets.evidence.verdicts import verdicts
from llmops_assets.local import stack
from llmops_assets.local.slots import program_name, slot_folder
from llmops_assets.reporting import FAILED_GATE_TAG
from llmops_assets.serving.slots import Colour, Environment, Slot
from llmops_assets_tests.lifecycle.conftest import FirstRelease
from llmops_assets_tests.lifecycle.kills import stop_when
from llmops_assets_tests.lifecycle.stack_user import MODEL, StackUser
from llmops_assets_tests.lifecycle.traffic import Traffic, problems

WEIGHTS = "model.onnx.data"
RESTART_SECONDS = 60.0


@pytest.fixture(autouse=True)
def production_keeps_serving(user: StackUser, first_release: FirstRelease) -> Iterator[None]:
    """No failure on the way to production may reach it."""
    serving = user.serving()
    with Traffic(user.gateway_url, MODEL, user.known_answers) as traffic:
        yield
    assert traffic.requests
    assert not problems(traffic.requests)
    assert user.serving() == serving


def test_a_failed_gate_stops_the_release(user: StackUser) -> None:
    """An accuracy nobody can reach: the run says which gate, why, and who is to act."""
    key, run = user.start_release(
        user.commit_spec(gates={"accuracy": {"exact_match": {"at_least": 1.01}}})
    )
    told = user.expect_failure(run)
    assert f"Gate accuracy failed for {key}" in told
    measured = user.platform.columns.get(key, "evaluation").facts["exact_match"]
    assert f"'exact_match': {measured}" in told.partition("Measured:")[2]
    assert "'exact_match': 1.01" in told.partition("Threshold:")[2]
    assert "To do: iterate: train longer, or on better data, and make a new release" in told
    assert "Owner: team:data-science" in told
    assert user.run(run).tags[FAILED_GATE_TAG] == "accuracy"
    assert not {"registered_model", "converted_weights"} & set(user.platform.columns.assets(key))

    # Blocking checks hold within one run only.
    alone = [user.materialize(key, asset) for asset in ("registered_model", "converted_weights")]
    for refusal in [user.expect_failure(run) for run in alone]:
        assert f"Release {key} may not go on" in refusal
        assert "accuracy: failed: " in refusal
        assert "To do: iterate: train longer" in refusal
    assert not {"registered_model", "converted_weights"} & set(user.platform.columns.assets(key))


def test_a_failed_gate_cannot_be_walked_around(user: StackUser) -> None:
    """Somebody packages the engine that failed, alone, and tries to deploy it, alone."""
    commit = user.commit_spec(gates={"engine_accuracy": {"exact_match": {"at_least": 1.01}}})
    key, run = user.start_release(commit)
    assert f"Gate engine_accuracy failed for {key}" in user.expect_failure(run)
    refusal = user.expect_failure(user.materialize(key, "packaged_model", "staging_deployment"))
    assert "packaged_model" in user.platform.columns.assets(key)
    assert f"Release {key} may not go on" in refusal
    assert "engine_accuracy: failed: " in refusal
    assert "To do: optimise: choose a finer precision" in refusal
    assert "staging_deployment" not in user.platform.columns.assets(key)
    route, _ = user.platform.routes.current(Environment.STAGING, MODEL)
    assert route is not None
    assert key not in {target.release for target in route.targets}


def test_promotion_asks_for_every_gate(user: StackUser) -> None:
    """An approver who did not look: staging answered, but not in the time that was asked for."""
    commit = user.commit_spec(gates={"smoke": {"latency_seconds": 1e-6}})
    key, run = user.start_release(commit)
    assert f"Gate staging_smoke failed for {key}" in user.expect_failure(run)
    refusal = user.expect_failure(user.start_promotion(key))
    assert f"Release {key} may not go on" in refusal
    assert "staging_smoke: failed: the slowest answer took" in refusal
    refusal = user.expect_failure(user.materialize(key, "production_candidate"))
    assert "staging_smoke: failed: the slowest answer took" in refusal
    assert "separation_of_duties: no verdict" in refusal
    assert not {"production_approval", "production_candidate"} & set(
        user.platform.columns.assets(key)
    )


def test_a_pickle_in_a_checkpoint(user: StackUser, first_release: FirstRelease) -> None:
    """A pickle runs code when it is loaded; nothing may load it, or build from it."""
    imported = user.settings.models.parent / "weights" / "with-pickle"
    shutil.copytree(user.platform.column(first_release.key)["checkpoint"].path, imported)
    (imported / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1.0}))
    path = str(imported.relative_to(user.settings.models.parent))
    key, run = user.start_release(user.commit_spec(weights={"source": "path", "path": path}))
    told = user.expect_failure(run)
    assert f"Gate checkpoint_safe failed for {key}" in told
    assert "pytorch_model.bin" in told
    assert "To do: fix: export the weights as safetensors without code" in told
    refusal = user.expect_failure(user.materialize(key, "evaluation"))
    assert "checkpoint_safe: failed: " in refusal
    assert "evaluation" not in user.platform.columns.assets(key)


def test_a_truncated_engine_in_the_store(user: StackUser, spare_release: str) -> None:
    """A full disk or a broken one: the bytes must be missed before they are served."""
    package = user.platform.columns.get(spare_release, "packaged_model").artifact
    artifact, directory = user.platform.store.open(package)
    entry = next(file for file in artifact.files if file.path.endswith(WEIGHTS))
    hexadecimal = entry.digest.removeprefix("sha256:")
    _truncate(user.settings.store / "blobs" / "sha256" / hexadecimal)
    _truncate(directory / entry.path)

    told = user.expect_failure(user.start_promotion(spare_release))
    assert f"Artifact {package} is damaged in the store" in told
    assert f"Expected: {entry.path} with {entry.size} bytes" in told
    assert f"Found: {entry.size // 2} bytes" in told
    assert "To do: materialize the asset that made it again" in told
    assert user.platform.columns.find(spare_release, "production_candidate") is None

    # The cure works, and the digest stays.
    user.expect_success(user.materialize(spare_release, "packaged_model"))
    assert user.platform.columns.get(spare_release, "packaged_model").artifact == package
    assert user.platform.store.open(package)[0] == artifact


def test_a_truncated_file_in_a_slot(user: StackUser, first_release: FirstRelease) -> None:
    """Bytes that were right when they were copied may be wrong when they are loaded again."""
    route, _ = user.platform.routes.current(Environment.STAGING, MODEL)
    assert route is not None
    assert route.serving is not None
    staged = route.serving.release
    slot = Slot(Environment.STAGING, MODEL, route.serving.colour)
    weights = next(slot_folder(user.settings, slot).rglob(WEIGHTS))
    size = weights.stat().st_size
    _truncate(weights)
    _server(user, slot).kill()
    user.wait_until(
        "the refusal of the slot's bytes",
        lambda: any("refused:" in line for line in stack.logs(user.settings, program_name(slot))),
        RESTART_SECONDS,
    )

    done = user.command("up")
    assert done.returncode == 1
    problem = next(line for line in done.stderr.splitlines() if line.startswith("problem: "))
    assert f"{program_name(slot)} ({staged}) does not serve" in problem
    assert f"{WEIGHTS} has {size // 2} bytes instead of {size}" in problem
    assert "deploy the release again" in problem

    user.expect_success(user.materialize(staged, "staging_deployment"))
    assert user.platform.slots.state(slot).running


def test_a_triton_that_does_not_answer(user: StackUser, spare_release: str) -> None:
    """A server that hangs after its smoke test still has a process, and gets no traffic."""
    run = user.start_promotion(spare_release)
    worker = user.worker(run)
    stop_when(worker, lambda: "candidate_smoke" in verdicts(user.platform.evidence, spare_release))
    idle = next(colour for colour in Colour if colour != user.serving().colour)
    slot = Slot(Environment.PRODUCTION, MODEL, idle)
    server = _server(user, slot)
    server.suspend()
    worker.resume()
    try:
        told = user.expect_failure(run)
    finally:
        server.kill()
    assert f"Slot {slot} does not serve the candidate" in told
    assert "not running" in told
    assert f"To do: materialize production_candidate of {spare_release} again" in told


def test_a_port_that_is_taken(user: StackUser, tmp_path: Path) -> None:
    """The reader learns which port, who has it, and which variable to set."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = user.command("up", LLMOPS_STATE=str(tmp_path / "state"), LLMOPS_DAGSTER_PORT=port)
    assert done.returncode == 2
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert f"Port {port} for webserver is taken" in error
    assert f"process {os.getpid()}" in error
    assert "LLMOPS_DAGSTER_PORT" in error


def test_a_spec_with_an_unknown_key(user: StackUser) -> None:
    """A misspelt threshold that is ignored in silence is a gate that is not there."""
    commit = user.commit_spec(gates={"acuracy": {"exact_match": 0.98}})
    text = (user.settings.models / f"{MODEL}.yaml").read_text(encoding="utf-8")
    line = next(n for n, line in enumerate(text.splitlines(), 1) if "acuracy" in line)
    mistake = f"line {line}: gates.acuracy: Extra inputs are not permitted"

    done = user.command("release", MODEL)
    assert done.returncode == 2
    (error,) = done.stderr.splitlines()
    assert mistake in error
    assert "llmops spec validate" in error

    key, run = user.start_release(commit)
    told = user.expect_failure(run)
    assert mistake in told
    assert f"models/{MODEL}.yaml at {commit[:12]}" in told
    assert not user.platform.columns.assets(key)


def _truncate(file: Path) -> None:
    """Cuts a read-only file in half."""
    file.chmod(0o644)
    os.truncate(file, file.stat().st_size // 2)


def _server(user: StackUser, slot: Slot) -> psutil.Process:
    """The Triton of a slot."""
    name = program_name(slot)
    pid = next(program.pid for program in stack.status(user.settings) if program.name == name)
    assert pid is not None
    return psutil.Process(pid)
