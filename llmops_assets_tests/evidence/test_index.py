"""The index answers questions and is the memory that notices a cut log: a cache that can be
thrown away, and that never hides what the log says."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence import index as index_module
from llmops_assets.evidence import merkle
from llmops_assets.evidence.index import EvidenceIndex, View
from llmops_assets.evidence.leaves import Leaf, Link
from llmops_assets.storage.store import digest_of

fork = multiprocessing.get_context("fork")


@pytest.fixture
def index(tmp_path: Path) -> EvidenceIndex:
    return EvidenceIndex(tmp_path / "evidence" / "index.sqlite")


def leaf(view: View, *chains: str) -> Leaf:
    """The next one."""
    return Leaf(
        sequence=view.size,
        statement=digest_of(str(view.size).encode()),
        predicate_type="https://example.org/said/v1",
        time=datetime.now(UTC),
        links={chain: view.link(chain) for chain in chains or ("all",)},
    )


def fill(index: EvidenceIndex, count: int) -> None:
    with index.writing() as view:
        for _ in range(count):
            view.add(leaf(view))


def size(index: EvidenceIndex) -> int:
    with index.reading() as view:
        return view.size


def test_tree_is_that_of_the_leaves(index: EvidenceIndex) -> None:
    """Its roots are what gets signed."""
    contents: list[bytes] = []
    with index.writing() as view:
        assert view.root(0) == merkle.EMPTY_ROOT
        for _ in range(70):
            new = leaf(view, "all", f"own/{view.size % 3}")
            contents.append(new.content)
            announced = view.root_with(new)
            view.add(new)
            assert view.root(view.size) == announced
            assert announced == from_definition(contents)
        assert [view.root(n) for n in range(1, 71)] == [
            from_definition(contents[:n]) for n in range(1, 71)
        ]


def from_definition(contents: list[bytes]) -> bytes:
    """RFC 6962, section 2.1."""
    if len(contents) == 1:
        return merkle.leaf_hash(contents[0])
    half = 1 << (len(contents) - 1).bit_length() - 1
    return merkle.node_hash(from_definition(contents[:half]), from_definition(contents[half:]))


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence": 0},
        {"sequence": 2},
        {"links": {}},
        {"links": {"all": Link(ordinal=0, previous=None)}},
        {"links": {"all": Link(ordinal=1, previous=digest_of(b"another"))}},
        {"links": {"all": Link(ordinal=2, previous=digest_of(b"another"))}},
        {"links": {"other": Link(ordinal=0, previous=digest_of(b"another"))}},
        {"links": {"other": Link(ordinal=1, previous=None)}},
    ],
)
def test_leaf_that_does_not_continue_log_and_chains_is_refused(
    index: EvidenceIndex, changes: dict[str, object]
) -> None:
    """An entry with a wrong place would leave a gap that nobody sees, or fork a chain."""
    fill(index, 1)
    with index.reading() as view:
        wrong = leaf(view).model_copy(update=changes)
    if not changes.get("links", True):
        with pytest.raises(ValueError, match="links"):
            Leaf.model_validate(wrong.model_dump())
        return
    with (
        pytest.raises(EvidenceError, match=f"Entry {wrong.sequence} does not continue"),
        index.writing() as view,
    ):
        view.add(wrong)
    assert size(index) == 1


def test_what_fails_in_the_middle_is_taken_back(index: EvidenceIndex) -> None:
    """Half of a catching-up must not count: its end is where the signature is."""
    fill(index, 2)
    with pytest.raises(KeyboardInterrupt), index.writing() as view:
        view.add(leaf(view))
        assert view.size == 3
        raise KeyboardInterrupt
    assert size(index) == 2
    fill(index, 1)
    assert size(index) == 3


def test_reader_sees_one_moment_and_waits_for_nobody(index: EvidenceIndex) -> None:
    """A writer may wait long for its signer."""
    fill(index, 1)
    with index.writing() as writer:
        writer.add(leaf(writer))
        began = time.monotonic()
        assert size(index) == 1
        assert time.monotonic() - began < 2
        with index.reading() as reader:
            assert reader.size == 1
            threading.Thread(target=lambda: None).start()
    assert size(index) == 2


def test_writers_wait_for_each_other(index: EvidenceIndex) -> None:
    """Threads and processes alike: none may build on what another has not finished."""

    def work() -> None:
        for _ in range(10):
            with index.writing() as view:
                before = view.size
                view.add(leaf(view))
                time.sleep(0.001)
                assert view.size == before + 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    processes = [fork.Process(target=work) for _ in range(2)]
    for worker in (*processes, *threads):
        worker.start()
    for worker in (*processes, *threads):
        worker.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert size(index) == 60


def test_who_waits_in_vain_goes_on_with_a_copy(
    index: EvidenceIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped with the lock must not stop all others; nor may what they add
    to a copy get into the index in another order than the log's."""
    monkeypatch.setattr(index_module, "BUSY_SECONDS", 0.2)
    fill(index, 1)
    with index.writing() as held:
        assert held.shared
        with index.writing() as copy:
            assert not copy.shared
            assert copy.size == 1
            assert copy.root(1) == held.root(1)
        assert held.size == 1
    with index.writing() as view:
        assert view.shared


def killed(work: Callable[[], object]) -> None:
    """Does this in a process that then dies by kill -9, with the connection open."""

    def body() -> None:
        work()
        os.kill(os.getpid(), signal.SIGKILL)

    process = fork.Process(target=body)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_killed_writer_leaves_neither_lock_nor_half(index: EvidenceIndex) -> None:
    """The next one goes on from what was committed."""
    fill(index, 2)

    def die() -> None:
        with index.writing() as view:
            view.add(leaf(view))
            os.kill(os.getpid(), signal.SIGKILL)

    killed(die)
    began = time.monotonic()
    fill(index, 1)
    assert time.monotonic() - began < 5
    assert size(index) == 3


def test_first_users_at_once_make_one_index(index: EvidenceIndex) -> None:
    """Daemon, web server and runs start together on a new installation."""
    gate = fork.Barrier(6)

    def work() -> None:
        gate.wait(30)
        fill(index, 5)

    processes = [fork.Process(target=work) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert size(index) == 30


def test_deleted_index_begins_empty(index: EvidenceIndex) -> None:
    """Our own message says that it may be moved away. What a killed process has left of the old
    one beside it must not be played into the new one."""
    fill(index, 3)

    def leave_a_journal() -> None:
        index.reading().__enter__()  # or the last one to leave would clear it away
        connection = index._open()
        connection.execute("DELETE FROM leaves")
        connection.execute("INSERT INTO leaves VALUES (41, 'old', 'old', '2026')")
        connection.commit()
        os.kill(os.getpid(), signal.SIGKILL)

    killed(leave_a_journal)
    assert index.path.with_name("index.sqlite-wal").stat().st_size > 0
    index.path.unlink()
    assert size(index) == 0
    fill(index, 2)
    assert size(index) == 2


@pytest.mark.parametrize("content", [b"", b"garbage", b"SQLite format 3\0" + b"\0" * 4096])
def test_file_that_is_no_index_is_named(index: EvidenceIndex, content: bytes) -> None:
    """An empty file must not stand for an empty log, nor be repaired in silence: the index is
    what remembers."""
    index.path.parent.mkdir()
    index.path.write_bytes(content)
    for use in (index.reading, index.writing):
        with pytest.raises(EvidenceError, match=r"index.sqlite.*move the file away"), use() as view:
            assert view.size
    assert index.path.read_bytes() == content
    index.path.unlink()
    fill(index, 1)


def test_opening_makes_no_empty_file(index: EvidenceIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may take the index away right before it is opened: the next one makes it anew."""
    monkeypatch.setattr(EvidenceIndex, "_create", lambda self: self.path.parent.mkdir())
    with pytest.raises(EvidenceError, match="cannot be used"):
        size(index)
    monkeypatch.undo()
    fill(index, 1)
    assert size(index) == 1


@pytest.mark.parametrize("keep", [100, 4096, 10_000])
def test_truncated_file_is_named(index: EvidenceIndex, keep: int) -> None:
    """After a full disk or a crash."""
    fill(index, 200)
    with index.path.open("rb+") as file:
        file.truncate(keep)
    with pytest.raises(EvidenceError, match=r"cannot be used.*move the file away"):
        fill(index, 1)


@pytest.mark.parametrize("version", [0, 2])
def test_index_of_another_version_of_the_platform_is_refused(
    index: EvidenceIndex, version: int
) -> None:
    """Read as if it were ours it could answer wrongly; made anew unasked it would forget."""
    fill(index, 1)
    with closing(sqlite3.connect(index.path)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(EvidenceError, match=f"version {version} of its tables, not 1"):
        size(index)


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """Such as one below a file."""
    (tmp_path / "file").touch()
    with pytest.raises(EvidenceError, match="cannot be used"):
        size(EvidenceIndex(tmp_path / "file" / "evidence" / "index.sqlite"))


def test_read_only_folder_is_named(index: EvidenceIndex) -> None:
    """An auditor's account may read the state folder and nothing more."""
    index.path.parent.mkdir()
    index.path.parent.chmod(0o500)

    def as_another_user() -> None:
        with contextlib.suppress(PermissionError):
            os.setuid(65534)
        code = 1
        try:
            size(index)
        except EvidenceError as error:
            code = 0 if "permissions" in error.cure else 2
        os._exit(code)

    # Everybody may get there; and nobody but root is refused nothing.
    for folder in index.path.parents[1:]:
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
        if folder.name.startswith("pytest-of"):
            break
    process = fork.Process(target=as_another_user)
    process.start()
    process.join(30)
    index.path.parent.chmod(0o700)
    assert process.exitcode == 0


def test_full_disk_is_named_and_harmless(index: EvidenceIndex) -> None:
    """The reason must be in the message, and what was there stays."""
    fill(index, 10)

    def limited() -> sqlite3.Connection:
        connection = EvidenceIndex._open(index)
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    index._open = limited
    with pytest.raises(EvidenceError, match="full"):
        fill(index, 2000)
    del index._open
    assert size(index) == 10
    fill(index, 1)


def test_path_with_characters_that_mean_something_in_a_uri(tmp_path: Path) -> None:
    """The file is opened by URI."""
    odd = EvidenceIndex(tmp_path / "a?b=c#d %20 é" / "index.sqlite")
    fill(odd, 1)
    assert size(odd) == 1
    assert odd.path.exists()


def test_chains_are_found_by_their_beginning(index: EvidenceIndex) -> None:
    """Whole segments only, and characters of LIKE mean nothing."""
    names = ["a/b", "a/c", "a/c/d", "a", "ab/c", "a-/c", "a0/c", "A/b", "a%/b", "a_/b"]
    with index.writing() as view:
        for name in names:
            view.add(leaf(view, name))
            view.add(leaf(view, name))
        assert view.chains("a") == ["a/b", "a/c", "a/c/d"]
        assert view.chains("a/c") == ["a/c/d"]
        assert view.chains("a%") == ["a%/b"]
        assert view.chains("none") == []
