"""Slots of the local stack: a real Triton under a real supervisor."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llmops_assets.errors import ArtifactCorruptError, SlotError
from llmops_assets.evidence.keys import create_keys
from llmops_assets.evidence.package_signature import sign_once
from llmops_assets.local.processes import end, supervised
from llmops_assets.local.slots import SupervisedSlots, program_name, slot_folder, slot_of
from llmops_assets.local.supervisor import Supervisor
from llmops_assets.serving import triton
from llmops_assets.serving.slots import Colour, Deployment, Environment, Slot
from llmops_assets.settings import Settings
from llmops_assets.storage.folder import FolderStore
from llmops_assets.storage.store import Artifact

pytestmark = pytest.mark.timeout(240)

BLUE = Slot(Environment.PRODUCTION, "echo-model", Colour.BLUE)
CONFIGURATION = """
name: "echo-model"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
version_policy { all {} }
input [ { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""
# Answers with its input, after as many seconds as a number in it says.
MODEL = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()[0]
            if text.isdigit():
                time.sleep(int(text))
            sender = request.get_response_sender()
            output = pb_utils.Tensor("text_output", np.array([text], dtype=object))
            sender.send(pb_utils.InferenceResponse([output]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


class Rig:
    """A supervisor, a store with packages, and slots."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        create_keys(settings.key_folder)
        self.supervisor = Supervisor(settings.state, settings.logs)
        self.store = FolderStore(settings.store)
        self.slots = SupervisedSlots(settings, self.store)

    def up(self) -> None:
        self.supervisor.configure([])
        self.supervisor.start({**os.environ, "LLMOPS_STATE": str(self.settings.state)})

    def package(self, model: str) -> Artifact:
        with tempfile.TemporaryDirectory() as folder:
            version = Path(folder) / "repository" / BLUE.model / "version"
            version.mkdir(parents=True)
            (version / "model.py").write_text(model)
            (version.parent / "config.pbtxt").write_text(CONFIGURATION)
            package = self.store.put(Path(folder), "application/vnd.llmops.test")
        sign_once(self.store, package.digest, self.settings)
        return package

    def pid(self, slot: Slot) -> int | None:
        state = self.supervisor.states().get(program_name(slot))
        return None if state is None else state.pid


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    folder = Path(tempfile.mkdtemp(prefix="llmops-"))
    rig = Rig(Settings(state=folder, drain_seconds=10))
    rig.up()
    yield rig
    end(supervised(folder), 10)
    shutil.rmtree(folder)


@pytest.fixture
def good(rig: Rig) -> tuple[Artifact, Deployment]:
    package = rig.package(MODEL)
    return package, Deployment(package.digest, "echo-model.m1", 3)


def test_start_again_does_nothing_and_another_deployment_replaces_it(
    rig: Rig, good: tuple[Artifact, Deployment]
) -> None:
    """A step that is run again after a crash must not restart what serves already."""
    package, deployment = good
    endpoint = rig.slots.start(BLUE, package, deployment)
    pid = rig.pid(BLUE)
    assert rig.slots.start(BLUE, package, deployment) == endpoint
    assert rig.pid(BLUE) == pid

    later = Deployment(package.digest, "echo-model.m2", 4)
    assert rig.slots.start(BLUE, package, later) == endpoint
    assert triton.loaded_version(endpoint, BLUE.model) == 4
    assert rig.slots.state(BLUE).deployment == later


def test_a_package_that_does_not_load_says_why_and_leaves_nothing_running(
    rig: Rig, good: tuple[Artifact, Deployment]
) -> None:
    """The engineer at night must read the cause in the failed step, not go looking for logs."""
    package = rig.package(MODEL + "\nraise RuntimeError('weights are missing')\n")
    with pytest.raises(SlotError, match="weights are missing"):
        rig.slots.start(BLUE, package, Deployment(package.digest, "echo-model.m3", 5))
    assert rig.pid(BLUE) is None
    assert not rig.slots.state(BLUE).running
    rig.slots.start(BLUE, *good)


def test_bytes_changed_in_the_slot_are_refused_and_not_retried(
    rig: Rig, good: tuple[Artifact, Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that loads other bytes than were judged makes every gate worthless."""
    from llmops_assets.serving import slot_process

    rig.slots.stop(BLUE, good[1])
    place = slot_process.place

    def place_and_damage(*arguments):  # type: ignore[no-untyped-def]
        placed = place(*arguments)
        model = next(slot_folder(rig.settings, BLUE).rglob("model.py"))
        model.chmod(0o600)
        model.write_text(model.read_text() + "#")
        return placed

    monkeypatch.setattr(slot_process, "place", place_and_damage)
    with pytest.raises(ArtifactCorruptError, match=r"model\.py"):
        rig.slots.start(BLUE, *good)
    assert rig.pid(BLUE) is None


def test_after_everything_was_killed_the_slots_that_ran_come_back(
    rig: Rig, good: tuple[Artifact, Deployment]
) -> None:
    """After a power cut, what served must serve again, on the ports that the gateway knows."""
    green = Slot(BLUE.environment, BLUE.model, Colour.GREEN)
    endpoint = rig.slots.start(BLUE, *good)
    rig.slots.start(green, *good)
    rig.slots.stop(green, good[1])

    for process in supervised(rig.settings.state):
        process.kill()
    assert not rig.slots.state(BLUE).running
    end(supervised(rig.settings.state), 10)
    rig.up()

    deadline = time.monotonic() + 60
    while not rig.slots.state(BLUE).running:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert rig.slots.state(BLUE).endpoint == endpoint
    assert rig.slots.state(BLUE).deployment == good[1]
    assert not rig.slots.state(green).running
    assert {state.slot for state in rig.slots.slots(BLUE.environment, BLUE.model)} == {BLUE, green}


def test_a_crashed_server_is_started_again(rig: Rig, good: tuple[Artifact, Deployment]) -> None:
    """Triton can crash at any time; nobody should have to notice."""
    rig.slots.start(BLUE, *good)
    pid = rig.pid(BLUE)
    assert pid is not None
    while time.time() - psutil.Process(pid).create_time() < 7:
        time.sleep(0.2)
    psutil.Process(pid).kill()
    deadline = time.monotonic() + 60
    while rig.pid(BLUE) == pid or not rig.slots.state(BLUE).running:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_drain_and_stop_lose_no_request(rig: Rig, good: tuple[Artifact, Deployment]) -> None:
    """Replacing a release must not fail the requests that were sent to the old one."""
    endpoint = rig.slots.start(BLUE, *good)
    answers: list[object] = []

    def ask() -> None:
        answers.append(triton.generate(endpoint, BLUE.model, "2")["text_output"])

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    time.sleep(1)
    rig.slots.drain(BLUE)
    rig.slots.stop(BLUE, good[1])
    for client in clients:
        client.join(timeout=30)
    assert answers == ["2", "2", "2"]
    rig.slots.drain(BLUE)  # nothing runs any more: returns at once


def test_a_cleared_slot_is_empty(rig: Rig, good: tuple[Artifact, Deployment]) -> None:
    """Removing a version means that its bytes are gone from the model repository."""
    rig.slots.start(BLUE, *good)
    rig.slots.clear(BLUE, good[1])
    state = rig.slots.state(BLUE)
    assert state.deployment is None and not state.running
    assert not list(slot_folder(rig.settings, BLUE).rglob("model.py"))
    rig.slots.clear(BLUE, good[1])


def test_program_names_lead_back_to_slots() -> None:
    """Model names hold hyphens, as the separators of program names are."""
    assert slot_of(program_name(BLUE)) == BLUE
    assert slot_of("mlflow") is None


def test_a_slot_that_holds_something_else_by_now_is_left_alone(
    rig: Rig, good: tuple[Artifact, Deployment]
) -> None:
    """Retiring a release must not end the server of the one that took its slot meanwhile."""
    package, deployment = good
    rig.slots.start(BLUE, package, deployment)
    pid = rig.pid(BLUE)
    retired = Deployment(package.digest, "echo-model.m0", 1)
    rig.slots.stop(BLUE, retired)
    rig.slots.clear(BLUE, retired)
    assert rig.pid(BLUE) == pid
    assert rig.slots.state(BLUE).deployment == deployment
