"""The local index of the evidence log: its verified Merkle tree, and which entry is where.

It answers questions about 200,000 entries without reading them. It can be rebuilt from the
log at any time, and lies outside of the store, so that it also is the memory that notices
when somebody takes entries out of the store or puts an older store in its place.
"""

from __future__ import annotations

import logging
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence import merkle
from llmops_assets.evidence.leaves import Leaf, Link

logger = logging.getLogger(__name__)

BUSY_SECONDS = 2.0
"""Longer than a writer takes. Who waits in vain goes on with a copy."""
CREATION_SECONDS = 30.0
VERSION = 1
"""Of the schema; the file has it as SQLite's `user_version`."""
SCHEMA = """
CREATE TABLE leaves (
    sequence INTEGER PRIMARY KEY, digest TEXT NOT NULL, predicate_type TEXT NOT NULL,
    time TEXT NOT NULL);
CREATE TABLE links (
    chain TEXT NOT NULL, ordinal INTEGER NOT NULL, sequence INTEGER NOT NULL,
    PRIMARY KEY (chain, ordinal)) WITHOUT ROWID;
CREATE TABLE nodes (
    level INTEGER NOT NULL, position INTEGER NOT NULL, hash BLOB NOT NULL,
    PRIMARY KEY (level, position)) WITHOUT ROWID;
"""


class _BusyError(Exception):
    """Another process has the index, and does not come to an end."""

    def __init__(self, *, readable: bool) -> None:
        super().__init__()
        self.readable = readable


@dataclass(frozen=True)
class Place:
    """Where an entry is, and what its leaf must be."""

    sequence: int
    digest: str


class View:
    """The index within one transaction."""

    def __init__(self, connection: sqlite3.Connection, *, shared: bool = True) -> None:
        """
        Args:
            connection: to the index.
            shared: whether others see what is added; false for a copy.
        """
        self._connection = connection
        self.shared = shared

    @property
    def size(self) -> int:
        """Number of entries in the index."""
        (size,) = self._connection.execute(
            "SELECT COALESCE(MAX(sequence) + 1, 0) FROM leaves"
        ).fetchone()
        return size

    @property
    def last(self) -> Place | None:
        """The last entry in the index."""
        row = self._connection.execute(
            "SELECT sequence, digest FROM leaves ORDER BY sequence DESC LIMIT 1"
        ).fetchone()
        return None if row is None else Place(*row)

    def link(self, chain: str) -> Link:
        """What a new leaf of the chain must say of its place in it."""
        found = self._connection.execute(
            "SELECT ordinal, digest FROM links JOIN leaves USING (sequence) "
            "WHERE chain = ? ORDER BY ordinal DESC LIMIT 1",
            (chain,),
        ).fetchone()
        if found is None:
            return Link(ordinal=0, previous=None)
        return Link(ordinal=found[0] + 1, previous=found[1])

    def add(self, leaf: Leaf) -> None:
        """Adds the next leaf.

        Raises:
            EvidenceError: it does not continue log and chains.
        """
        expected = {chain: self.link(chain) for chain in leaf.links}
        if leaf.sequence != self.size or leaf.links != expected:
            raise EvidenceError(
                f"Entry {leaf.sequence} does not continue the evidence log",
                expected=f"place {self.size}, links {_shown(expected)}",
                found=f"place {leaf.sequence}, links {_shown(leaf.links)}",
                cure="restore the log from a backup; until then treat it as tampered with",
            )
        completed = merkle.completed_by(self.node, leaf.sequence, merkle.leaf_hash(leaf.content))
        self._connection.executemany("INSERT INTO nodes VALUES (?, ?, ?)", completed)
        self._connection.execute(
            "INSERT INTO leaves VALUES (?, ?, ?, ?)",
            (leaf.sequence, leaf.digest, leaf.predicate_type, _text(leaf.time)),
        )
        self._connection.executemany(
            "INSERT INTO links VALUES (?, ?, ?)",
            [(chain, link.ordinal, leaf.sequence) for chain, link in leaf.links.items()],
        )

    def root(self, size: int) -> bytes:
        """Root of the tree over the first `size` entries."""
        return merkle.root(self.node, size)

    def root_with(self, leaf: Leaf) -> bytes:
        """Root of the whole tree as it would be with one leaf more."""
        completed = merkle.completed_by(self.node, leaf.sequence, merkle.leaf_hash(leaf.content))
        new = {(level, position): node for level, position, node in completed}

        def node(level: int, position: int) -> bytes:
            return new.get((level, position)) or self.node(level, position)

        return merkle.root(node, leaf.sequence + 1)

    def node(self, level: int, position: int) -> bytes:
        """Hash of a complete subtree, see `merkle.Nodes`.

        Raises:
            EvidenceError: the log is too short for it.
        """
        row = self._connection.execute(
            "SELECT hash FROM nodes WHERE level = ? AND position = ?", (level, position)
        ).fetchone()
        if row is None:
            raise EvidenceError(
                "The evidence log is shorter than a proof needs",
                expected=f"{(position + 1) << level} entries or more",
                found=f"{self.size} entries",
                cure="compare the size that was asked for with `llmops verify`; if the log had "
                "it, treat the log as cut off",
            )
        return row[0]

    def places(
        self, chain: str, predicate_types: Sequence[str] = (), start: int = 0
    ) -> list[Place]:
        """Entries of a chain, oldest first.

        Args:
            chain: its name.
            predicate_types: only these; all when empty.
            start: ordinal of the first one wanted.
        """
        wanted = f" AND predicate_type IN ({', '.join('?' * len(predicate_types))})"
        rows = self._connection.execute(
            "SELECT sequence, digest FROM links JOIN leaves USING (sequence) "
            f"WHERE chain = ? AND ordinal >= ?{wanted if predicate_types else ''} "
            "ORDER BY ordinal",
            (chain, start, *predicate_types),
        )
        return [Place(*row) for row in rows]

    def newest(self, chain: str, at: datetime | None = None) -> Place | None:
        """The last entry of a chain that was there at a time, or is there now."""
        row = self._connection.execute(
            "SELECT sequence, digest FROM links JOIN leaves USING (sequence) "
            "WHERE chain = ? AND time <= ? ORDER BY ordinal DESC LIMIT 1",
            (chain, "9" if at is None else _text(at)),
        ).fetchone()
        return None if row is None else Place(*row)

    def chains(self, prefix: str) -> list[str]:
        """Names of the chains below `prefix/`, sorted."""
        rows = self._connection.execute(
            "SELECT chain FROM links WHERE ordinal = 0 AND chain > ? AND chain < ? ORDER BY chain",
            (f"{prefix}/", f"{prefix}0"),  # 0 follows / in ASCII
        )
        return [chain for (chain,) in rows]

    def between(self, start: int, end: int) -> list[Place]:
        """The entries from a place of the log up to, but not including, another."""
        rows = self._connection.execute(
            "SELECT sequence, digest FROM leaves WHERE sequence >= ? AND sequence < ? "
            "ORDER BY sequence",
            (start, end),
        )
        return [Place(*row) for row in rows]

    def digest(self, sequence: int) -> str:
        """Digest of the leaf at a place of the log."""
        (digest,) = self._connection.execute(
            "SELECT digest FROM leaves WHERE sequence = ?", (sequence,)
        ).fetchone()
        return digest


class EvidenceIndex:
    """The index in a file. Safe with several processes and threads at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def reading(self) -> Iterator[View]:
        """A view of what is in the index now; an empty copy if nobody can read it for now.

        Raises:
            EvidenceError: the file cannot be used.
        """
        with ExitStack() as stack:
            try:
                view = stack.enter_context(self._transaction("BEGIN"))
            except _BusyError:
                self._warn("making another from the log")
                view = stack.enter_context(self._copied(readable=False))
            yield view

    @contextmanager
    def writing(self) -> Iterator[View]:
        """A view that may add, alone on this machine; what it adds counts if it ends well.

        A process that is stopped while it has the index must not stop all others, least of
        all a rollback: who waits in vain gets a copy, of which nothing is kept. What keeps
        the log whole is not the index but that entries are created at the next place only.

        Raises:
            EvidenceError: the file cannot be used.
        """
        with ExitStack() as stack:
            try:
                view = stack.enter_context(self._transaction("BEGIN IMMEDIATE"))
            except _BusyError as busy:
                self._warn("going on with a copy")
                view = stack.enter_context(self._copied(readable=busy.readable))
            yield view

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[View]:
        try:
            # A connection for each use: they can be shared neither by threads nor by forks.
            with closing(self._begun(begin)) as connection:
                yield View(connection)
                connection.execute("COMMIT")  # without it, closing takes everything back
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _begun(self, begin: str) -> sqlite3.Connection:
        """A connection in a transaction.

        Raises:
            _BusyError: another process keeps the index.
        """
        readable = False
        try:
            connection = self._open()
            readable = True
            connection.execute(begin)
            # Only now SQLite holds on to what is read.
            connection.execute("SELECT sequence FROM leaves LIMIT 1").fetchone()
        except sqlite3.OperationalError as error:
            if _is_busy(error):
                raise _BusyError(readable=readable) from error
            raise
        return connection

    @contextmanager
    def _copied(self, *, readable: bool) -> Iterator[View]:
        try:
            with closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
                if readable:
                    with closing(self._open()) as connection:
                        connection.backup(copy)
                else:
                    copy.executescript(SCHEMA)
                yield View(copy, shared=False)
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _warn(self, what: str) -> None:
        logger.warning(
            "another process keeps the index of the evidence log; %s. If it stays so, find it: "
            "`fuser %s`",
            what,
            self.path,
        )

    def _open(self) -> sqlite3.Connection:
        try:
            if not self.path.exists():
                self._create()
        except OSError as error:
            raise self._unusable(error) from error
        # Not created by opening: an empty file would stand for an empty log.
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
        )
        # What a power cut loses of it is read from the log again.
        connection.execute("PRAGMA synchronous = NORMAL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != VERSION:
            connection.close()
            raise self._unusable(f"version {version} of its tables, not {VERSION}")
        return connection

    def _create(self) -> None:
        """Makes an empty index beside, so that nobody sees half of one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f"{self.path.name}.lock"), timeout=CREATION_SECONDS):
            if self.path.exists():
                return  # another process was faster
            # Of an index that was deleted: SQLite would play it into the new one.
            for leftover in ("-wal", "-shm"):
                self.path.with_name(self.path.name + leftover).unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                beside = Path(folder) / self.path.name
                with closing(sqlite3.connect(beside, isolation_level=None)) as connection:
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.executescript(SCHEMA)
                    connection.execute(f"PRAGMA user_version = {VERSION}")
                beside.rename(self.path)

    def _unusable(self, found: object) -> EvidenceError:
        return EvidenceError(
            "The index of the evidence log cannot be used",
            expected=f"a writable SQLite file {self.path}, made by this version of the platform",
            found=found,
            cure="check space and permissions; or move the file away, and it is made from the log "
            "again, but entries that were taken from the log's end before are not missed then",
        )


def _is_busy(error: sqlite3.Error) -> bool:
    """Whether another process has what was asked for."""
    return getattr(error, "sqlite_errorcode", None) in (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_BUSY_RECOVERY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PROTOCOL,
    )


def _text(time: datetime) -> str:
    """A time as text that sorts as the times do."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _shown(links: dict[str, Link]) -> str:
    return ", ".join(
        f"{chain} {link.ordinal} after {link.previous}" for chain, link in links.items()
    )
