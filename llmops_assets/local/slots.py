"""Serving slots of the local stack: each one a Triton that the supervisor looks after.

A slot that should serve is a program of the supervisor, and comes back with the stack;
one that was stopped is not. What it holds and where it listens is in its folder.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from llmops_assets.errors import ArtifactCorruptError, EvidenceError, SlotError
from llmops_assets.evidence.keys import read_trust_root
from llmops_assets.evidence.package_signature import require_signature, signed_files
from llmops_assets.local import log_files
from llmops_assets.local.ports import PortRequest, claim_ports, release_ports
from llmops_assets.local.supervisor import Program, Supervisor
from llmops_assets.serving import slot_process, triton
from llmops_assets.serving.package_description import PackageDescription
from llmops_assets.serving.slots import (
    Colour,
    Deployment,
    Endpoint,
    Environment,
    Slot,
    SlotInspection,
    SlotState,
)
from llmops_assets.settings import Settings
from llmops_assets.storage.store import Artifact, Store
from llmops_assets.tools import module_command

UNANSWERED = ("nv_inference_pending_request_count", "llmops_requests_in_progress")
"""Triton's and the embedded model's gauges of requests in the server."""
POLL_SECONDS = 0.2
PORT_KINDS = ("http", "grpc", "metrics")
# Triton waits this long for requests in it before it ends (triton.EXIT_TIMEOUT_SECONDS).
STOP_SECONDS = triton.EXIT_TIMEOUT_SECONDS + 5
# A server that ends sooner than this did not load; starting it again would not help.
STABLE_SECONDS = 5
COMPLAINT_LINES = 200
TRITON_ERROR = re.compile(r"\S+Z E |refused:|cannot start:")


class SupervisedSlots:
    """`Slots` of the local stack; see the protocol for what each call does."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._supervisor = Supervisor(settings.state, settings.logs)
        self._ports = port_file(settings)

    def check_serves(self, package: PackageDescription) -> None:
        """See `Slots.check_serves`. A server here is the Triton of a wheel, in no container."""
        if package.image is not None:
            raise SlotError(
                "The slots of the local stack cannot serve this package",
                expected="a package that the Triton installed here serves",
                found=f"one for {package.image}, {package.world_size} x {package.architecture}",
                cure="serve it on a cluster with that image and these GPUs, see "
                "docs/tensorrt_llm.md",
            )

    def start(self, slot: Slot, package: Artifact, deployment: Deployment) -> Endpoint:
        """See `Slots.start`."""
        with self._locked(slot):
            held = self.state(slot)
            if held.running and held.deployment == deployment and held.endpoint is not None:
                return held.endpoint
            # What is not signed must not end the server that is there.
            signature = require_signature(self._store, package.digest)
            signed_files(signature, read_trust_root(self._settings.key_folder), package.digest)
            _, directory = self._store.open(package.digest)
            name = program_name(slot)
            self._supervisor.remove(name)
            endpoint = self._claim(slot)
            folder = slot_folder(self._settings, slot)
            slot_process.place(
                directory, package, deployment, slot.model, endpoint, folder, signature
            )
            log = self._supervisor.log(name)
            log_start = log_files.size(log)
            try:
                self._supervisor.add(slot_program(self._settings, slot))
                self._wait_ready(slot, endpoint, deployment.version, log_start)
            except BaseException:
                # Also when a person interrupts: what did not become ready must not linger.
                self._supervisor.remove(name)
                raise
            return endpoint

    def state(self, slot: Slot) -> SlotState:
        """See `Slots.state`."""
        held = slot_process.read_slot(slot_folder(self._settings, slot))
        if held is None:
            return SlotState(slot, deployment=None, endpoint=None, running=False)
        running = triton.ready(
            held.endpoint,
            slot.model,
            held.deployment.version,
            self._settings.http_timeout_seconds,
        )
        return SlotState(slot, held.deployment, held.endpoint, running)

    def inspect(self, slot: Slot, *, deep: bool = False) -> SlotInspection:
        """See `Slots.inspect`. Triton keeps its repository index to itself, see `triton`; its
        model's metadata say what is loaded."""
        folder = slot_folder(self._settings, slot)
        held = slot_process.read_slot(folder)
        if held is None:
            return SlotInspection(version=None, damage=None)
        version = damage = None
        # Of a server that does not answer, `state` tells.
        with suppress(SlotError):
            version = triton.loaded_version(
                held.endpoint, slot.model, self._settings.http_timeout_seconds
            )
        try:
            root = read_trust_root(self._settings.key_folder)
            slot_process.verify_signature(folder, held, root)
            slot_process.verify(folder, held, contents=deep, running=True)
        except (ArtifactCorruptError, EvidenceError) as error:
            damage = str(error.found or error.problem)
        return SlotInspection(version, damage)

    def drain(self, slot: Slot) -> None:
        """See `Slots.drain`.

        Triton 2.51 counts the requests that wait (`nv_inference_pending_request_count`), not
        those that run; the embedded model's own gauge counts both. What still runs without
        being counted, the server finishes itself when it is stopped, within
        `triton.EXIT_TIMEOUT_SECONDS`.
        """
        deadline = time.monotonic() + self._settings.drain_seconds
        idle = False
        while (held := self.state(slot)).running and held.endpoint is not None:
            try:
                unanswered = _unanswered_requests(held.endpoint)
            except SlotError:
                return  # a server that does not answer has nothing to wait for
            # Twice: the model sees a request only when its window to gather a batch is over.
            if (idle and unanswered == 0) or time.monotonic() > deadline:
                return
            idle = unanswered == 0
            time.sleep(POLL_SECONDS)

    def stop(self, slot: Slot, deployment: Deployment) -> None:
        """See `Slots.stop`. Triton first finishes the requests that are in it."""
        with self._locked(slot):
            if self._holds(slot, deployment):
                self._supervisor.remove(program_name(slot))

    def clear(self, slot: Slot, deployment: Deployment) -> None:
        """See `Slots.clear`. Its ports are free for others."""
        with self._locked(slot):
            if self._holds(slot, deployment):
                self._supervisor.remove(program_name(slot))
                slot_process.empty(slot_folder(self._settings, slot))
                release_ports(self._ports, _port_names(slot))

    def slots(self, environment: Environment, model: str) -> tuple[SlotState, ...]:
        """See `Slots.slots`."""
        candidates = (Slot(environment, model, colour) for colour in Colour)
        return tuple(
            self.state(slot) for slot in candidates if slot_folder(self._settings, slot).is_dir()
        )

    def _holds(self, slot: Slot, deployment: Deployment) -> bool:
        held = slot_process.read_slot(slot_folder(self._settings, slot))
        return held is not None and held.deployment == deployment

    def _claim(self, slot: Slot) -> Endpoint:
        requests = [PortRequest(name) for name in _port_names(slot)]
        ports = claim_ports(self._ports, self._settings.host, requests)
        http, grpc, metrics = (ports[request.name] for request in requests)
        return Endpoint(self._settings.host, http, grpc, metrics)

    def _wait_ready(self, slot: Slot, endpoint: Endpoint, version: int, log_start: int) -> None:
        """Waits until the slot's server is ready.

        Raises:
            ArtifactCorruptError: the bytes in the slot are not those that were signed.
            SlotError: the server ended, or was not ready in time.
        """
        name = program_name(slot)
        timeout = self._settings.slot_ready_timeout_seconds
        deadline = time.monotonic() + timeout
        while not triton.ready(endpoint, slot.model, version, self._settings.http_timeout_seconds):
            state = self._supervisor.states().get(name)
            ended = state is None or state.gave_up
            if ended or time.monotonic() > deadline:
                log = self._supervisor.log(name)
                if refusal := _refusal(log, log_start):
                    raise ArtifactCorruptError(
                        f"Slot {slot} does not hold the package that was put there",
                        found=refusal,
                        cure=f"check the disk and who can write to {self._settings.slots} and "
                        f"{self._settings.key_folder}, then deploy again",
                    )
                what = "ended while it loaded" if ended else f"was not ready within {timeout:.0f} s"
                raise SlotError(
                    f"The server of slot {slot} {what}",
                    expected=f"version {version} of {slot.model} ready on {endpoint.http}",
                    found=complaint(log, log_start),
                    cure=f"read {log}; mend the package and deploy again, or raise "
                    "LLMOPS_SLOT_READY_TIMEOUT_SECONDS if it only needs longer",
                )
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _locked(self, slot: Slot) -> Iterator[None]:
        folder = slot_folder(self._settings, slot)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        wait = self._settings.slot_ready_timeout_seconds + STOP_SECONDS
        try:
            lock.acquire(timeout=wait)
        except Timeout as error:
            raise SlotError(
                f"Slot {slot} is being changed by another process",
                expected=f"its end within {wait:.0f} s",
                cure="see the other run in Dagster; end it if it hangs, then try again",
            ) from error
        try:
            yield
        finally:
            lock.release()


def port_file(settings: Settings) -> Path:
    """The file that remembers all ports of the stack."""
    return settings.state / "stack.json"


def slot_folder(settings: Settings, slot: Slot) -> Path:
    """Where a slot keeps what it holds."""
    return settings.slots / slot.environment / slot.model / slot.colour


def program_name(slot: Slot) -> str:
    """The supervisor's name of a slot."""
    return f"slot-{slot.environment}-{slot.model}-{slot.colour}"


def slot_of(program: str) -> Slot | None:
    """The slot whose `program_name` this is; None for other programs."""
    kind, _, rest = program.partition("-")
    environment, _, rest = rest.partition("-")
    model, _, colour = rest.rpartition("-")
    if kind != "slot" or not model:
        return None
    return Slot(Environment(environment), model, Colour(colour))


def slot_program(settings: Settings, slot: Slot) -> Program:
    """How the supervisor runs a slot."""
    return Program(
        name=program_name(slot),
        command=module_command("llmops_assets.serving.slot_process", slot_folder(settings, slot)),
        stop_seconds=STOP_SECONDS,
        stable_seconds=STABLE_SECONDS,
        retries=0,
        final_exit_codes=(slot_process.EXIT_REFUSED,),
    )


def complaint(log: Path, since: int = 0) -> str:
    """What a slot's log says of a failed start: its errors, or how it ends.

    Triton prints tables of its options after the error that matters; an error's line
    has severity E (`--log-format=ISO8601`).
    """
    lines = log_files.tail(log, COMPLAINT_LINES, since)
    errors = [line.strip() for line in lines if TRITON_ERROR.match(line)]
    return " | ".join(errors[-3:]) or log_files.last_words(log, since)


def _unanswered_requests(endpoint: Endpoint) -> float:
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(triton.metrics_text(endpoint))
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name in UNANSWERED
    )


def _refusal(log: Path, since: int) -> str | None:
    """What the slot's process said when it refused the bytes in the slot, if it did."""
    lines = log_files.tail(log, COMPLAINT_LINES, since)
    return next((line for line in lines if line.startswith("refused:")), None)


def _port_names(slot: Slot) -> list[str]:
    return [f"{program_name(slot)}-{kind}" for kind in PORT_KINDS]
