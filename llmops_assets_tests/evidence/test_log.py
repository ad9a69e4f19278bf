"""The log is what an auditor trusts instead of us: nothing may get lost, changed or forked.

Processes are real ones, and are really killed. Whoever tampers here has the store's files
and no key.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from llmops_assets.errors import EvidenceError, LLMOpsError, RefConflictError
from llmops_assets.evidence import index as index_module
from llmops_assets.evidence import merkle
from llmops_assets.evidence.checkpoint import Checkpoint, read_checkpoint
from llmops_assets.evidence.index import EvidenceIndex
from llmops_assets.evidence.leaves import Entry
from llmops_assets.evidence.log import LOG, Attestation, EvidenceLog
from llmops_assets.evidence.statements import Statement, subject
from llmops_assets.storage.folder import FolderStore
from llmops_assets.storage.store import LogEntry, Record, canonical_json, digest_of

from ..evidence_rig import blob_of, open_evidence

PROCESSES, STATEMENTS = 8, 40
TYPE = "https://example.org/said/v1"
OTHER_TYPE = "https://example.org/also-said/v1"
T0 = datetime(2026, 1, 1, tzinfo=UTC)
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed processes leave what they wrote; only a power loss, which is not tried here, does
    not. Forked processes have this as well."""
    monkeypatch.setattr("llmops_assets.storage.folder._sync", lambda file: file.flush())
    monkeypatch.setattr("llmops_assets.storage.folder._sync_directory", lambda directory: None)


def said(what: str, *chains: str, predicate_type: str = TYPE) -> Attestation:
    statement = Statement(
        subject=(subject("what", digest_of(what.encode())),),
        predicate_type=predicate_type,
        predicate={"said": what},
    )
    return Attestation(statement, chains or ("all",))


def text(entry: Entry) -> str:
    return entry.statement.predicate["said"]


def texts(evidence: EvidenceLog, chain: str = "all") -> list[str]:
    return [text(entry) for entry in evidence.entries(chain)]


def store_of(evidence: EvidenceLog) -> Path:
    assert isinstance(evidence.store, FolderStore)
    return evidence.store.root


def place(evidence: EvidenceLog, sequence: int) -> Path:
    """The store's file that says what the log has at a place."""
    return store_of(evidence) / "logs" / LOG / f"{sequence:012d}"


def elsewhere(evidence: EvidenceLog, name: str) -> EvidenceLog:
    """The same log as another machine sees it: with an index of its own."""
    index = EvidenceIndex(evidence.index.path.parent / name / "index.sqlite")
    return replace(evidence, store=FolderStore(store_of(evidence)), index=index)


def put(evidence: EvidenceLog, sequence: int, record: Record) -> None:
    """Has a record at a place of the log, by hand."""
    content = canonical_json(record)
    digest = digest_of(content)
    blob = store_of(evidence) / "blobs" / digest.replace(":", "/")
    if not blob.exists():
        blob.write_bytes(content)
    place(evidence, sequence).unlink(missing_ok=True)
    place(evidence, sequence).write_text(f"{digest}\n")


def record(evidence: EvidenceLog, sequence: int) -> dict[str, Any]:
    return json.loads(json.dumps(next(evidence.store.log(LOG, sequence)).record))


def started(*works: Callable[[], object]) -> list[BaseProcess]:
    """Processes that do this. They leave as a killed one does: nothing of pytest's runs."""

    def body(work: Callable[[], object]) -> None:
        work()
        os._exit(0)

    processes: list[BaseProcess] = [fork.Process(target=body, args=(work,)) for work in works]
    for process in processes:
        process.start()
    return processes


def joined(processes: Sequence[BaseProcess], seconds: float = 120) -> list[int | None]:
    """Their exit codes; None for one that did not end, which is ended here."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def check_whole(evidence: EvidenceLog) -> list[Entry]:
    """Reads all with an index that was never there, and checks what the log promises."""
    fresh = elsewhere(evidence, f"fresh-{random.random()}")
    final = fresh.verify()
    entries = list(fresh.since(0))
    assert [entry.sequence for entry in entries] == list(range(final.size))
    heads: dict[str, Entry] = {}
    for entry in entries:
        for chain, link in entry.leaf.links.items():
            before = heads.get(chain)
            ordinal = 0 if before is None else before.leaf.links[chain].ordinal + 1
            assert link.ordinal == ordinal, chain
            assert link.previous == (None if before is None else before.digest), chain
            heads[chain] = entry
    # What was signed at any size is a beginning of what is signed now.
    for entry in entries:
        then = read_checkpoint(entry.record.checkpoint, fresh.keys(), "It")
        proof = fresh.consistency_proof(then.size, final.size)
        merkle.check_consistency(then.size, final.size, then.root, final.root, proof)
        merkle.check_inclusion(
            merkle.leaf_hash(entry.leaf.content),
            entry.sequence,
            final.size,
            fresh.inclusion_proof(entry.sequence, final.size),
            final.root,
        )
    return entries


@pytest.mark.parametrize("machines", [1, 2])
def test_eight_processes_at_once_lose_and_fork_nothing(tmp_path: Path, machines: int) -> None:
    """On one machine an index keeps them apart; on two, the store's conditional create alone."""
    logs = [open_evidence(tmp_path)]
    logs += [elsewhere(logs[0], f"machine-{number}") for number in range(1, machines)]

    def work(number: int) -> Callable[[], None]:
        def append() -> None:
            evidence = logs[number % machines]
            for count in range(0, STATEMENTS, 2):
                pair = [said(f"{number}/{n}", "all", f"own/{number}") for n in (count, count + 1)]
                evidence.append(*pair) if count % 4 else [evidence.append(one) for one in pair]

        return append

    assert joined(started(*map(work, range(PROCESSES)))) == [0] * PROCESSES
    entries = check_whole(logs[0])
    expected = [f"{number}/{n}" for number in range(PROCESSES) for n in range(STATEMENTS)]
    assert sorted(map(text, entries)) == sorted(expected)
    for evidence in logs:
        evidence.verify()
        for number in range(PROCESSES):
            assert texts(evidence, f"own/{number}") == [f"{number}/{n}" for n in range(STATEMENTS)]


def test_processes_that_are_killed_leave_a_whole_log(tmp_path: Path) -> None:
    """Killed with -9 at any instruction. What a process was told is there, is there; what it was
    doing is there whole or not at all; and nobody has to clean up before the next append."""
    evidence = open_evidence(tmp_path)
    chance = random.Random(6)
    (tmp_path / "told").mkdir()

    def work(number: int) -> Callable[[], None]:
        def append() -> None:
            for count in range(10_000):
                name = f"{number}-{count}"
                evidence.append(said(name, "all", f"own/{number}"))
                (tmp_path / "told" / name).touch()

        return append

    for number in range(0, 24, 2):
        processes = started(work(number), work(number + 1))
        while not list((tmp_path / "told").glob(f"{number}-*")):
            time.sleep(0.001)
        for process in processes:
            time.sleep(chance.uniform(0, 0.03))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        assert joined(processes) == [-signal.SIGKILL] * 2
        evidence.append(said(f"after {number}"))
    there = list(map(text, check_whole(evidence)))
    assert len(set(there)) == len(there)
    told = {path.name for path in (tmp_path / "told").iterdir()}
    assert told <= set(there)


def test_killed_inside_of_the_index_gives_it_back(tmp_path: Path) -> None:
    """Its lock must not outlive the process, and the entry that it had stored stays."""
    evidence = open_evidence(tmp_path)
    evidence.append(said("first"))

    def die() -> None:
        append = evidence.store.append

        def stored(log: str, record: Record, at: int | None = None) -> LogEntry:
            append(log, record, at)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        evidence.store.append = stored  # pyright: ignore[reportAttributeAccessIssue]
        evidence.append(said("second"), said("third"))

    assert joined(started(die)) == [-signal.SIGKILL]
    began = time.monotonic()
    evidence.append(said("fourth"))
    assert time.monotonic() - began < 10
    assert texts(evidence) == ["first", "second", "fourth"]
    check_whole(evidence)


def test_of_writers_that_saw_the_same_head_exactly_one_wins(tmp_path: Path) -> None:
    """A route is changed by one at a time, also from two machines."""
    here = open_evidence(tmp_path)
    logs = [here, elsewhere(here, "there")]
    rounds = 5
    for _ in range(rounds):
        head = here.newest("routes/m")
        gate = fork.Barrier(PROCESSES)
        results = fork.Queue()

        def work(number: int, head: Entry | None = head, gate: Any = gate, results: Any = results):
            def change() -> None:
                evidence = logs[number % 2]
                mine = [said(f"{number}", "routes/m"), said(f"{number}", "routes/m")]
                gate.wait(60)
                try:
                    evidence.append(*mine, heads={"routes/m": head.digest if head else None})
                    results.put(number)
                except RefConflictError:
                    results.put(None)
                results.close()
                results.join_thread()

            return change

        processes = started(*map(work, range(PROCESSES)))
        won = [winner for _ in processes if (winner := results.get(timeout=60)) is not None]
        assert joined(processes) == [0] * PROCESSES
        assert len(won) == 1
        # The winner's two, and nothing of anybody else.
        assert texts(here, "routes/m")[-2:] == [str(won[0])] * 2
    assert len(texts(here, "routes/m")) == 2 * rounds
    check_whole(here)


def test_refused_change_appends_nothing(evidence: EvidenceLog) -> None:
    """Also not those of its statements that would have been free to go."""
    (first,) = evidence.append(said("first", "routes/m"))
    size = evidence.checkpoint().size
    for head in (None, "sha256:" + "0" * 64):
        with pytest.raises(RefConflictError, match="Somebody else changed routes/m"):
            evidence.append(said("a", "b"), said("c", "routes/m"), heads={"routes/m": head})
    assert evidence.checkpoint().size == size
    evidence.append(said("second", "routes/m"), heads={"routes/m": first.digest, "none": None})


def test_threads_of_one_process_append_at_once(evidence: EvidenceLog) -> None:
    """Dagster evaluates sensors in threads."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: evidence.append(said(str(number))), range(40)))
    assert sorted(map(int, map(text, check_whole(evidence)))) == list(range(40))


def test_process_that_was_forked_in_the_middle_appends(evidence: EvidenceLog) -> None:
    """Dagster forks; nothing of the parent's connection may be used by the child."""
    evidence.append(said("parent"))
    with evidence.index.reading() as view:
        assert view.size == 1
        assert joined(started(lambda: evidence.append(said("child")))) == [0]
        assert view.size == 1  # what was begun before is not disturbed
    assert texts(evidence) == ["parent", "child"]


class Moody:
    """A signer that signs so many times."""

    def __init__(self, evidence: EvidenceLog, times: int) -> None:
        self.signer, self.times = evidence.signer(), times
        self.public_key = self.signer.public_key

    def sign(self, payload: bytes) -> Any:
        if self.times == 0:
            raise EvidenceError("The signer does not answer", cure="start it")
        self.times -= 1
        return self.signer.sign(payload)


@pytest.mark.parametrize("times", range(7))
def test_signer_that_fails_in_the_middle_leaves_a_whole_log(
    evidence: EvidenceLog, times: int
) -> None:
    """Three statements need six signatures. What was appended before stays, and is sealed."""
    evidence.append(said("before"))
    moody = Moody(evidence, times)
    broken = replace(evidence, signer=lambda: moody)  # pyright: ignore[reportArgumentType]
    three = [said(name) for name in "abc"]
    if times < 6:
        with pytest.raises(EvidenceError, match="does not answer"):
            broken.append(*three)
    else:
        broken.append(*three)
    assert texts(evidence) == ["before", *"abc"[: max(0, times - 3)]]
    evidence.append(said("after"))
    check_whole(evidence)


class Repeating(FolderStore):
    """As object storage whose answer got lost: the client asks again, and finds its own record."""

    def append(self, log: str, record: Record, at: int | None = None) -> LogEntry:
        super().append(log, record, at)
        return super().append(log, record, at)


def test_own_entry_is_not_taken_for_that_of_another(evidence: EvidenceLog) -> None:
    """Else a statement is there twice, and a route that was changed is reported as refused."""
    flaky = replace(evidence, store=Repeating(store_of(evidence)))
    flaky.append(said("one", "routes/m"), heads={"routes/m": None})
    flaky.append(said("two", "routes/m"), said("three", "routes/m"))
    assert texts(evidence, "routes/m") == ["one", "two", "three"]
    check_whole(evidence)


def test_reading_beside_writing_never_sees_half(tmp_path: Path) -> None:
    """What a reader gets is a beginning of the log, verified, whoever writes meanwhile."""
    evidence = open_evidence(tmp_path)
    there = elsewhere(evidence, "there")
    evidence.append(said("0"))

    def write(log: EvidenceLog, name: str) -> Callable[[], object]:
        return lambda: [log.append(said(name, "all", "routes/m")) for _ in range(60)]

    writers = started(write(evidence, "here"), write(there, "there"))
    reader = elsewhere(evidence, "reader")
    reads, before = 0, 0
    while any(process.is_alive() for process in writers):
        for log in (evidence, reader):
            entries = list(log.entries("all"))
            assert [entry.leaf.links["all"].ordinal for entry in entries] == list(
                range(len(entries))
            )
            size = log.checkpoint().size
            assert before <= len(entries) <= size
            before = len(entries)
            log.newest("routes/m")
            reads += 1
    assert joined(writers) == [0, 0]
    assert reads > 2
    assert len(texts(reader)) == 121


# Tampering: each must be noticed, by an error that names the entry.


@pytest.fixture
def ten(evidence: EvidenceLog) -> EvidenceLog:
    """A log with ten entries, odd and even ones on chains of their own as well."""
    for number in range(10):
        evidence.append(said(str(number), "all", f"parity/{number % 2}"))
    return evidence


def noticed(evidence: EvidenceLog, sequence: int, what: str = "") -> None:
    """Whoever reads the entry, or all, is told which one it is."""
    named = rf"(?i)entry {sequence}\b.*{what}"
    with pytest.raises(EvidenceError, match=named):
        list(evidence.entries("all"))
    with pytest.raises(EvidenceError, match=named):
        list(evidence.entries("all", newest_first=True))
    with pytest.raises(EvidenceError, match=named):
        evidence.entry(sequence)
    with pytest.raises(EvidenceError, match=named):
        evidence.verify()


def noticed_at_the_end(evidence: EvidenceLog, sequence: int, what: str = "") -> None:
    """Nobody reads anything or appends: the log's end is looked at each time."""
    noticed(evidence, sequence, what)
    named = rf"(?i)entry {sequence}\b.*{what}"
    uses: list[Callable[[], Any]] = [
        evidence.checkpoint,
        lambda: evidence.newest("parity/0"),
        lambda: evidence.entries("nothing"),
        lambda: evidence.heads("parity"),
        lambda: evidence.append(said("more")),
    ]
    for use in uses:
        with pytest.raises(EvidenceError, match=named):
            use()


def gone(evidence: EvidenceLog, sequence: int) -> None:
    place(evidence, sequence).unlink()


def without_bytes(evidence: EvidenceLog, sequence: int) -> None:
    blob_of(evidence, sequence).unlink()


def edited(evidence: EvidenceLog, sequence: int) -> None:
    blob = blob_of(evidence, sequence)
    blob.write_bytes(blob.read_bytes().replace(b"example", b"exampel"))


def edited_with_its_digest(evidence: EvidenceLog, sequence: int) -> None:
    changed = record(evidence, sequence)
    changed["leaf"]["time"] = T0.isoformat()
    put(evidence, sequence, changed)


def another(evidence: EvidenceLog, sequence: int) -> None:
    put(evidence, sequence, record(evidence, sequence - 1))


def another_with_the_right_place(evidence: EvidenceLog, sequence: int) -> None:
    changed = record(evidence, sequence - 1)
    changed["leaf"]["sequence"] = sequence
    put(evidence, sequence, changed)


def another_statement(evidence: EvidenceLog, sequence: int) -> None:
    changed = record(evidence, sequence)
    changed["envelope"] = record(evidence, sequence - 1)["envelope"]
    put(evidence, sequence, changed)


def no_record(evidence: EvidenceLog, sequence: int) -> None:
    place(evidence, sequence).write_text("not a digest\n")


def other_bytes(evidence: EvidenceLog, sequence: int) -> None:
    """Such as the weights of a model, which somebody stored in all honour."""
    blob = store_of(evidence) / "blobs" / digest_of(b"\xff weights").replace(":", "/")
    blob.write_bytes(b"\xff weights")
    place(evidence, sequence).write_text(digest_of(b"\xff weights"))


def nested_without_end(evidence: EvidenceLog, sequence: int) -> None:
    """Deeper than a reader's stack."""
    _put_bytes(evidence, sequence, b'{"leaf":' + b"[" * 100_000)


def a_key_twice(evidence: EvidenceLog, sequence: int) -> None:
    """The same record to who takes the last value of a key, and another to who takes the first."""
    content = canonical_json(record(evidence, sequence))
    _put_bytes(evidence, sequence, b'{"leaf":{},' + content.removeprefix(b"{"))


def _put_bytes(evidence: EvidenceLog, sequence: int, content: bytes) -> None:
    blob = store_of(evidence) / "blobs" / digest_of(content).replace(":", "/")
    blob.write_bytes(content)
    place(evidence, sequence).write_text(digest_of(content))


def something_else(evidence: EvidenceLog, sequence: int) -> None:
    put(evidence, sequence, {"decision": "passed"})


TAMPERINGS = [
    gone, without_bytes, edited, edited_with_its_digest, another, another_with_the_right_place,
    another_statement, no_record, other_bytes, nested_without_end, a_key_twice, something_else,
]  # fmt: skip


@pytest.mark.parametrize("tamper", TAMPERINGS)
def test_tampering_in_the_middle_is_noticed(
    ten: EvidenceLog, tamper: Callable[[EvidenceLog, int], None]
) -> None:
    """The first read of the entry says which one it is; the others stay readable."""
    tamper(ten, 5)
    noticed(ten, 5)
    assert texts(ten, "parity/0") == list("02468")


@pytest.mark.parametrize("tamper", TAMPERINGS)
def test_tampering_at_the_end_is_noticed_by_everybody(
    ten: EvidenceLog, tamper: Callable[[EvidenceLog, int], None]
) -> None:
    """Who appends after a changed entry would sign that all before it is well."""
    tamper(ten, 9)
    noticed_at_the_end(ten, 9)


@pytest.mark.parametrize("tamper", [t for t in TAMPERINGS if t is not gone])
def test_tampering_is_noticed_by_who_never_saw_the_log(
    ten: EvidenceLog, tamper: Callable[[EvidenceLog, int], None]
) -> None:
    """A new machine must not learn a wrong past. That entries are gone it cannot know."""
    for sequence in (5, 9):
        there = elsewhere(ten, f"there-{sequence}")
        before = place(ten, sequence).read_text()
        tamper(ten, sequence)
        with pytest.raises(EvidenceError, match=r"(?i)entry \d"):
            there.checkpoint()
        with pytest.raises(EvidenceError, match=r"(?i)entry \d"):
            there.append(said("more"))
        if tamper in (without_bytes, edited):
            return
        place(ten, sequence).write_text(before)


def test_two_entries_that_changed_places_are_noticed(ten: EvidenceLog) -> None:
    """The order of what happened is part of what is signed."""
    fourth, fifth = record(ten, 4), record(ten, 5)
    fourth["leaf"]["sequence"], fifth["leaf"]["sequence"] = 5, 4
    put(ten, 4, fifth)
    put(ten, 5, fourth)
    for evidence in (ten, elsewhere(ten, "there")):
        with pytest.raises(EvidenceError, match=r"(?i)entry 4"):
            list(evidence.entries("all"))


def test_other_checkpoint_is_noticed(ten: EvidenceLog) -> None:
    """One of another size is signed just as well, and says another thing of the log."""
    for sequence in (5, 9):
        whole = record(ten, sequence)
        put(ten, sequence, {**whole, "checkpoint": record(ten, 3)["checkpoint"]})
        with pytest.raises(EvidenceError, match=f"entry {sequence}.*checkpoint"):
            ten.verify()
        if sequence == 9:
            for evidence in (ten, elsewhere(ten, "there")):
                with pytest.raises(EvidenceError, match=r"entry 9.*checkpoint"):
                    evidence.checkpoint()
        put(ten, sequence, whole)
    ten.verify()


def forged(evidence: EvidenceLog, folder: Path) -> EvidenceLog:
    """The same store, written by somebody with keys of his own."""
    stranger = open_evidence(folder / "stranger")
    return replace(evidence, index=stranger.index, signer=stranger.signer)


def test_entry_signed_with_another_key_is_noticed(ten: EvidenceLog, tmp_path: Path) -> None:
    """Whoever writes the store can append; only the key makes it evidence."""
    forged(ten, tmp_path).append(said("forged"))
    for evidence in (ten, elsewhere(ten, "there")):
        for use in (evidence.checkpoint, lambda e=evidence: e.append(said("more"))):
            with pytest.raises(EvidenceError, match=r"No trusted key signed.* entry 10 "):
                use()
        with pytest.raises(EvidenceError, match="entry 10 "):
            evidence.entries("all")
    gone(ten, 10)
    ten.append(said("well"))
    check_whole(ten)


def test_forged_statement_under_a_good_checkpoint_is_noticed(
    ten: EvidenceLog, tmp_path: Path
) -> None:
    """A signer that signs any checkpoint must not make a statement trusted."""
    stranger = open_evidence(tmp_path / "stranger")

    class Mixed(Moody):
        def sign(self, payload: bytes) -> Any:
            return (stranger if b"in-toto" in payload else ten).signer().sign(payload)

    mixed = Mixed(ten, 0)
    replace(ten, signer=lambda: mixed).append(said("forged"))  # pyright: ignore[reportArgumentType]
    noticed(ten, 10)


def test_entry_appended_by_hand_is_noticed(ten: EvidenceLog) -> None:
    """Made of what was signed once: a statement that was there, said again."""
    replayed = record(ten, 9)
    replayed["leaf"]["sequence"] = 10
    replayed["leaf"]["links"] = {"all": {"ordinal": 10, "previous": ten.entry(9).digest}}
    put(ten, 10, replayed)
    for evidence in (ten, elsewhere(ten, "there")):
        with pytest.raises(EvidenceError, match=r"entry 10.*checkpoint"):
            evidence.checkpoint()
        with pytest.raises(EvidenceError, match=r"entry 10.*checkpoint"):
            evidence.append(said("more"))


def test_older_copy_of_the_store_is_noticed(ten: EvidenceLog, tmp_path: Path) -> None:
    """Restoring a backup takes back what happened since, a failed gate among it."""
    store = store_of(ten)
    shutil.copytree(store, tmp_path / "backup")
    ten.append(said("failed"), said("revoked"))
    shutil.rmtree(store)
    shutil.copytree(tmp_path / "backup", store)
    noticed_lost = pytest.raises(EvidenceError, match="Entry 11 of the evidence log is gone")
    for use in (ten.checkpoint, ten.verify, lambda: ten.append(said("more"))):
        with noticed_lost:
            use()
    # Another machine, which never saw the newer ones, goes on: the log is forked.
    there = elsewhere(ten, "there")
    there.append(said("other"))
    with noticed_lost:
        ten.checkpoint()
    for count in range(3):
        there.append(said(f"other {count}"))
        with pytest.raises(EvidenceError, match=r"(?i)entry 1[12]\b"):
            ten.checkpoint()
        with pytest.raises(EvidenceError, match=r"(?i)entry 1[12]\b"):
            ten.append(said("more"))


def test_emptied_log_is_noticed(ten: EvidenceLog) -> None:
    """An empty log is the easiest one to put in place."""
    shutil.rmtree(store_of(ten) / "logs" / LOG)
    with pytest.raises(EvidenceError, match="Entry 9 of the evidence log is gone"):
        ten.append(said("more"))
    with pytest.raises(EvidenceError, match="Entry 9 of the evidence log is gone"):
        ten.checkpoint()


def test_index_of_another_log_is_noticed(ten: EvidenceLog, tmp_path: Path) -> None:
    """A state folder beside the wrong store: whichever of the two logs is the longer one."""
    for size in (3, 10, 12):
        other = open_evidence(tmp_path / str(size))
        other.append(*(said(str(number)) for number in range(size)))
        mixed = replace(ten, index=other.index)
        with pytest.raises(EvidenceError, match=r"(?i)entry \d+"):
            mixed.checkpoint()
        with pytest.raises(EvidenceError, match=r"(?i)entry \d+"):
            mixed.append(said("more"))
    assert ten.checkpoint().size == 10


def test_reader_without_keys_is_told(ten: EvidenceLog) -> None:
    """A trust root that was emptied must not open everything."""
    for evidence in (ten, elsewhere(ten, "there")):
        with pytest.raises(EvidenceError, match="No key is trusted"):
            list(replace(evidence, keys=lambda: ()).entries("all"))


# Questions.


def clock(*seconds: float) -> Callable[[], datetime]:
    """Shows these times, one after the other, in seconds after T0."""
    times = iter(seconds)
    return lambda: T0 + timedelta(seconds=next(times))


def test_as_of_a_time_is_what_was_there_then(evidence: EvidenceLog) -> None:
    """ "What served at 14:05?": an entry counts from its own microsecond on."""
    evidence = replace(evidence, now=clock(0, 10, 20.000001))
    for name in "abc":
        evidence.append(said(name, "routes/production/m"))

    def newest(seconds: float) -> str | None:
        entry = evidence.newest("routes/production/m", T0 + timedelta(seconds=seconds))
        return None if entry is None else text(entry)

    assert [newest(at) for at in (-0.000001, 0, 9.999999, 10, 20, 20.000001, 1e9)] == [
        None, "a", "a", "b", "b", "c", "c",
    ]  # fmt: skip
    east = T0.astimezone(tz=None) + timedelta(seconds=10)
    entry = evidence.newest("routes/production/m", east)
    assert entry is not None
    assert text(entry) == "b"


def test_clock_that_goes_backwards_changes_no_order(evidence: EvidenceLog) -> None:
    """The order is that of appending; times are what the writer's clock showed, and said so."""
    evidence = replace(evidence, now=clock(100, 50, 60, 200))
    for name in "abcd":
        evidence.append(said(name))
    assert texts(evidence) == list("abcd")
    newest = evidence.newest("all")
    assert newest is not None
    assert text(newest) == "d"
    for at, expected in ((49, None), (55, "b"), (100, "c"), (199, "c"), (200, "d")):
        entry = evidence.newest("all", T0 + timedelta(seconds=at))
        assert (None if entry is None else text(entry)) == expected, at
    check_whole(evidence)


def test_entries_of_a_chain_are_found_by_type_place_and_direction(evidence: EvidenceLog) -> None:
    """Readers ask for a few of very many."""
    for number in range(6):
        kind = OTHER_TYPE if number % 3 == 0 else TYPE
        evidence.append(said(str(number), "a", predicate_type=kind), said("other", "ab"))

    def found(*types: str, **options: Any) -> list[str]:
        return [text(entry) for entry in evidence.entries("a", *types, **options)]

    assert found() == list("012345")
    assert found(OTHER_TYPE) == list("03")
    assert found(TYPE, OTHER_TYPE, start=2, newest_first=True) == list("5432")
    assert found("https://example.org/none") == []
    assert list(evidence.entries("none")) == []


def test_heads_are_those_of_the_chains_below(evidence: EvidenceLog) -> None:
    """`routes/production` is not a beginning of `routes/production-eu`."""
    names = ["routes/production/b", "routes/production/a", "routes/production-eu/a", "routes/x"]
    for number in (1, 2):
        evidence.append(*(said(f"{name} {number}", name) for name in names))
    heads = [text(entry) for entry in evidence.heads("routes/production")]
    assert heads == ["routes/production/a 2", "routes/production/b 2"]


def test_places_that_the_log_has_not_are_refused(ten: EvidenceLog) -> None:
    """By an error that a person understands, not by one of SQLite's rows."""
    for sequence in (-1, 10, 10**6):
        with pytest.raises(EvidenceError, match=f"Entry {sequence} "):
            ten.entry(sequence)
    for ask in (
        lambda: ten.inclusion_proof(3, 11),
        lambda: ten.inclusion_proof(11, 11),
        lambda: ten.consistency_proof(3, 16),
    ):
        with pytest.raises(EvidenceError):
            ask()


def test_empty_log(evidence: EvidenceLog) -> None:
    """Before the first release there is nothing to read, and no error in that."""
    assert list(evidence.entries("all")) == list(evidence.heads("all")) == list(evidence.since(0))
    assert evidence.newest("all") is None
    assert evidence.append() == ()
    with pytest.raises(EvidenceError, match="is empty"):
        evidence.checkpoint()


def test_verification_is_of_what_was_there_when_it_began(
    ten: EvidenceLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`llmops verify` takes minutes, and the platform goes on meanwhile."""
    seen: list[tuple[int, int]] = []
    checkpoint = EvidenceLog.checkpoint

    def and_another(log: EvidenceLog) -> Checkpoint:
        found = checkpoint(log)
        ten.append(said("meanwhile"))
        return found

    def progress(done: int, size: int) -> None:
        seen.append((done, size))
        ten.append(said("later"))

    monkeypatch.setattr(EvidenceLog, "checkpoint", and_another)
    assert ten.verify(progress).size == 10
    assert seen == [(done, 10) for done in range(1, 11)]


def test_catching_up_is_linear(evidence: EvidenceLog) -> None:
    """A machine's first look at 200,000 entries: ten times as many may take ten times as long."""
    steps: list[int] = []

    class Counting(FolderStore):
        def log(self, log: str, start: int = 0) -> Iterator[LogEntry]:
            for entry in super().log(log, start):
                steps.append(entry.sequence)
                yield entry

    def catch_up(size: int) -> float:
        there = elsewhere(evidence, f"there-{random.random()}")
        there = replace(there, store=Counting(store_of(evidence)))
        steps.clear()
        began = time.process_time()
        assert there.checkpoint().size == size
        took = time.process_time() - began
        assert len(steps) < size + 10, "an entry is read more than once"
        return took

    def grow(size: int) -> None:
        many = [said(str(n), f"releases/{n // 20}", "all") for n in range(size)]
        evidence.append(*many)

    grow(500)
    few = min(catch_up(500) for _ in range(3))
    grow(4500)
    many = catch_up(5000)
    assert many < 10 * few * 2, f"{few:.2f} s for 500 entries, {many:.2f} s for 5,000"


def test_errors_say_what_to_do(ten: EvidenceLog) -> None:
    """The reader is an engineer at night."""
    gone(ten, 9)
    with pytest.raises(LLMOpsError) as raised:
        ten.checkpoint()
    assert "restore" in raised.value.cure


def test_writer_that_is_stopped_stops_nobody(
    evidence: EvidenceLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A paused container or a debugger holds the index's lock for ever; routes must move."""
    monkeypatch.setattr(index_module, "BUSY_SECONDS", 0.2)
    evidence.append(said("before"))
    with evidence.index.writing():
        evidence.append(said("meanwhile"))
        assert evidence.checkpoint().size == 2
        assert [entry.sequence for entry in evidence.since(0)] == [0, 1]
        evidence.append(said("again"))
    assert evidence.checkpoint().size == 3
    with evidence.index.reading() as view:
        assert view.size == 3, "the index has caught up"
    evidence.verify()


def _append_on_and_on(folder: Path) -> None:
    evidence = open_evidence(folder)
    while True:
        evidence.append(said("again"))


@pytest.mark.timeout(120)
def test_writer_that_is_stopped_anywhere_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of what SQLite does when a file is opened, committed or closed."""
    monkeypatch.setattr(index_module, "BUSY_SECONDS", 0.3)
    evidence = open_evidence(tmp_path)
    evidence.append(said("first"))
    worker = multiprocessing.get_context("spawn").Process(
        target=_append_on_and_on, args=(tmp_path,), daemon=True
    )
    worker.start()
    assert worker.pid is not None
    chance, slowest = random.Random(7), 0.0
    try:
        while evidence.checkpoint().size < 5:
            time.sleep(0.05)
        for _ in range(15):
            time.sleep(chance.uniform(0.001, 0.02))
            os.kill(worker.pid, signal.SIGSTOP)
            start = time.monotonic()
            (mine,) = evidence.append(said("while it stands still"))
            assert evidence.checkpoint().size == mine.sequence + 1
            slowest = max(slowest, time.monotonic() - start)
            os.kill(worker.pid, signal.SIGCONT)
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(10)
    print(f"slowest beside a stopped writer: {slowest:.2f} s")
    assert slowest < 30
    check_whole(evidence)
