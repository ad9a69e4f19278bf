"""Routes: changed by one at a time, applied for all, and with a past nobody can rewrite."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmops_assets.errors import EvidenceError, GatewayError, RefConflictError
from llmops_assets.evidence import attest
from llmops_assets.evidence.leaves import Entry, route_chain
from llmops_assets.evidence.log import Attestation, EvidenceLog
from llmops_assets.serving.gateway import EnvoyGateway
from llmops_assets.serving.routes import Routes
from llmops_assets.serving.slots import Colour, Environment

from ..evidence_rig import blob_of, open_evidence
from .envoy_rig import Rig, Upstream, rig, upstream

PRODUCTION = Environment.PRODUCTION


@pytest.fixture(scope="module")
def blue() -> Iterator[Upstream]:
    with upstream("blue") as server:
        yield server


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("routes")) as running:
        yield running


def test_second_of_two_decisions_on_the_same_route_is_refused(built: Rig, blue: Upstream) -> None:
    """Two people who both saw generation 1 must not both win; the loser learns who did."""
    target = blue.target(Colour.BLUE)
    built.serve("conflict", target)
    _, seen = built.routes.current(PRODUCTION, "conflict")
    built.routes.change(
        PRODUCTION, "conflict", [target], actor="ada", reason="rollback", expected=seen
    )
    with pytest.raises(RefConflictError, match=r"generation 2 by ada .*rollback"):
        built.routes.change(
            PRODUCTION, "conflict", [target], actor="bob", reason="deploy", expected=seen
        )
    with pytest.raises(RefConflictError, match="no route yet"):
        built.routes.change(
            PRODUCTION, "conflict", [target], actor="bob", reason="deploy", expected=None
        )
    current, _ = built.routes.current(PRODUCTION, "conflict")
    assert current is not None
    assert (current.generation, current.actor) == (2, "ada")
    assert built.gateway.applied(PRODUCTION)["conflict"] == 2


@pytest.mark.timeout(60)
def test_changes_of_different_models_at_once_do_not_lose_each_other(
    built: Rig, blue: Upstream
) -> None:
    """Each change applies the whole environment: a stale view of it would undo the other's."""
    models = [f"parallel-{number}" for number in range(4)]
    errors: list[Exception] = []

    def work(model: str) -> None:
        # As another process would: with its own view of store and gateway.
        gateway = EnvoyGateway(built.gateway.folder, timeout_seconds=30)
        routes = Routes(open_evidence(built.folder), gateway)
        try:
            for version in range(1, 6):
                _, digest = routes.current(PRODUCTION, model)
                target = blue.target(Colour.BLUE, version=version)
                routes.change(
                    PRODUCTION, model, [target], actor=model, reason="load", expected=digest
                )
                assert gateway.applied(PRODUCTION)[model] == version
        except (AssertionError, RefConflictError, GatewayError) as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []
    applied = built.gateway.applied(PRODUCTION)
    assert {model: applied[model] for model in models} == dict.fromkeys(models, 5)
    assert built.routes.differences(PRODUCTION) == {}


@pytest.mark.timeout(30)
def test_slow_change_does_not_apply_what_it_read_before_a_faster_one(
    built: Rig, blue: Upstream
) -> None:
    """The interleaving that could lose a change, made certain: read, another applies, apply."""
    reading = threading.Event()

    class SlowLog(EvidenceLog):
        def heads(self, prefix: str) -> Iterator[Entry]:
            found = list(super().heads(prefix))
            reading.set()
            time.sleep(1.0)
            return iter(found)

    log = open_evidence(built.folder)
    slow = Routes(
        SlowLog(log.store, log.index, log.signer, log.keys), EnvoyGateway(built.gateway.folder)
    )
    thread = threading.Thread(
        target=lambda: slow.change(
            PRODUCTION,
            "slow",
            [blue.target(Colour.BLUE)],
            actor="slow",
            reason="a test",
            expected=None,
        )
    )
    thread.start()
    assert reading.wait(timeout=10)
    built.serve("fast", blue.target(Colour.BLUE))
    thread.join(timeout=10)
    applied = built.gateway.applied(PRODUCTION)
    assert (applied.get("slow"), applied.get("fast")) == (1, 1)


def test_same_route_decided_by_many_at_once_is_won_by_one(built: Rig, blue: Upstream) -> None:
    """The compare-and-set decides, however the writers interleave."""
    outcomes: list[str] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        routes = Routes(
            open_evidence(built.folder), EnvoyGateway(built.gateway.folder, timeout_seconds=30)
        )
        barrier.wait(timeout=10)
        try:
            routes.change(
                PRODUCTION,
                "race",
                [blue.target(Colour.BLUE)],
                actor=threading.current_thread().name,
                reason="race",
                expected=None,
            )
            outcomes.append("won")
        except RefConflictError:
            outcomes.append("lost")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(outcomes) == ["lost", "lost", "lost", "won"]
    assert len(list(built.routes.history(PRODUCTION, "race"))) == 1


def test_nothing_is_recorded_while_the_gateway_is_down(tmp_path: Path, blue: Upstream) -> None:
    """A route that nobody serves must not look like one in the audit."""
    with (
        rig(tmp_path, start=False) as stopped,
        pytest.raises(GatewayError, match="llmops up"),
    ):
        stopped.serve("m", blue.target(Colour.BLUE))
    assert stopped.routes.current(PRODUCTION, "m") == (None, None)
    assert list(stopped.evidence.entries(route_chain("production", "m"))) == []


def test_history_tells_every_change_newest_first(built: Rig, blue: Upstream) -> None:
    """Auditors ask what served when, and who decided it."""
    for version in (1, 2, 3):
        built.serve("history", blue.target(Colour.BLUE, version=version))
    chain = list(built.routes.history(PRODUCTION, "history"))
    assert [route.generation for _, route in chain] == [3, 2, 1]
    assert [route.targets[0].version for _, route in chain] == [3, 2, 1]
    assert [route.predecessor for _, route in chain] == [chain[1][0], chain[2][0], None]
    assert chain[0][0] == built.routes.current(PRODUCTION, "history")[1]
    assert all(route.actor == "test" for _, route in chain)


def test_changed_record_in_the_past_is_found(built: Rig, blue: Upstream) -> None:
    """Who can write the store's files could otherwise put another name to a change."""
    for version in (1, 2, 3):
        built.serve("tampered", blue.target(Colour.BLUE, version=version))
    (*_, second, _) = built.evidence.entries(route_chain("production", "tampered"))
    blob = blob_of(built.evidence, second.sequence)
    content = blob.read_bytes()
    blob.write_bytes(content.replace(b'"ordinal":1', b'"ordinal":0'))
    chain = built.routes.history(PRODUCTION, "tampered")
    assert next(chain)[1].generation == 3
    with pytest.raises(EvidenceError, match=rf"entry {second.sequence}\b.*damaged"):
        next(chain)
    blob.write_bytes(content)


@pytest.mark.parametrize(
    "forged",
    [
        pytest.param({"generation": 7}, id="generations left out"),
        pytest.param({"predecessor": None}, id="past cut off"),
        pytest.param({"model": "another"}, id="route of another model"),
        pytest.param({"targets": "none"}, id="no route"),
    ],
)
def test_route_that_does_not_fit_its_chain_is_found(
    tmp_path: Path, blue: Upstream, forged: dict[str, object]
) -> None:
    """A signature says who wrote it; that it follows the route before is checked as well."""
    with rig(tmp_path) as built:
        built.serve("m", blue.target(Colour.BLUE))
        route, digest = built.routes.current(PRODUCTION, "m")
        assert route is not None
        following = route.model_copy(update={"generation": 2, "predecessor": digest})
        statement = attest.route_change(following)
        statement = statement.model_copy(update={"predicate": {**statement.predicate, **forged}})
        built.evidence.append(Attestation(statement, [route_chain("production", "m")]))
        with pytest.raises(EvidenceError):
            list(built.routes.history(PRODUCTION, "m"))


def test_weights_that_do_not_add_up_change_nothing(built: Rig, blue: Upstream) -> None:
    """Envoy would share such weights silently; the mistake is the caller's to see."""
    built.serve("weights", blue.target(Colour.BLUE))
    before = built.routes.current(PRODUCTION, "weights")
    with pytest.raises(ValidationError, match="add up to 100"):
        built.serve("weights", blue.target(Colour.BLUE, weight=60))
    assert built.routes.current(PRODUCTION, "weights") == before


def test_record_is_plain_json(built: Rig, blue: Upstream) -> None:
    """Evidence must be readable in ten years without this code."""
    built.serve("plain", blue.target(Colour.BLUE))
    entry = built.evidence.newest(route_chain("production", "plain"))
    assert entry is not None
    envelope = json.loads(blob_of(built.evidence, entry.sequence).read_bytes())["envelope"]
    record = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
    assert record["environment"] == "production"
    assert record["targets"][0]["colour"] == "blue"
    assert record["time"].endswith("Z")
