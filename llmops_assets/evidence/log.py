"""The evidence log: everything that happened, signed, in one order that nobody can change.

Every statement is appended at the next sequence number by conditional create, together with
a signed checkpoint over the log up to and including it. So there is no moment at which an
entry is there and not sealed, several writers cannot fork the log, and a writer that is
killed leaves a whole log behind.

Whoever can write to the store, and has no key, can take entries away from the end and can
stop the log from growing. The index beside the store notices both, see `index`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice

from llmops_assets.errors import EvidenceError, RefConflictError, StoreError
from llmops_assets.evidence import merkle
from llmops_assets.evidence.checkpoint import Checkpoint, read_checkpoint, sign_checkpoint
from llmops_assets.evidence.dsse import Envelope, Key, Signer, sign, verified_payload
from llmops_assets.evidence.index import EvidenceIndex, Place, View
from llmops_assets.evidence.keys import evidence_signer, read_trust_root
from llmops_assets.evidence.leaves import (
    Entry,
    Leaf,
    LogRecord,
    envelope_digest,
    read_log_record,
)
from llmops_assets.evidence.statements import PAYLOAD_TYPE, Statement
from llmops_assets.settings import Settings
from llmops_assets.storage.store import LogEntry, Store, canonical_json, digest_of

LOG = "evidence"
PAGE = 1000
"""Entries that are looked up at once, of many."""


@dataclass(frozen=True)
class Attestation:
    """A statement to be appended, and the chains that it belongs to."""

    statement: Statement
    chains: Sequence[str]


@dataclass(frozen=True)
class EvidenceLog:
    """The log in a store. Safe with several processes and machines at once."""

    store: Store
    index: EvidenceIndex
    signer: Callable[[], Signer]
    """Gives the signer; asked only when something is appended."""
    keys: Callable[[], Sequence[Key]]
    """Gives the keys that may have signed the log."""
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))

    def append(
        self, *attestations: Attestation, heads: Mapping[str, str | None] | None = None
    ) -> tuple[Entry, ...]:
        """Signs statements and appends them one by one, in this order.

        What was appended before something failed stays: repeating all is harmless.

        Args:
            attestations: what to append.
            heads: for a change that must follow another one: the digest of the last entry of
                a chain, as the caller saw it when it decided; None for an empty chain.

        Raises:
            RefConflictError: a chain of `heads` has another last entry by now; nothing was
                appended.
            EvidenceError: the signer does not answer, or the log is not what it was.
        """
        signer = self.signer()
        # Before anybody has to wait: a signer may be far away.
        signed = [
            (attestation, sign(attestation.statement.payload(), PAYLOAD_TYPE, signer))
            for attestation in attestations
        ]
        appended: list[Entry] = []
        with self.index.writing() as view:
            self._catch_up(view)
            for chain, digest in (heads or {}).items():
                _check_head(view, chain, digest)
            for attestation, envelope in signed:
                appended.append(self._append(view, attestation, envelope, signer, heads or {}))
                heads = None  # of what follows, the first one has changed them
        return tuple(appended)

    def entries(
        self, chain: str, *predicate_types: str, start: int = 0, newest_first: bool = False
    ) -> Iterator[Entry]:
        """Entries of a chain, oldest first, each verified when its turn comes.

        Args:
            chain: its name, see `leaves`.
            predicate_types: only these; all when none is given.
            start: ordinal in the chain of the first one wanted.
            newest_first: the other way round.

        Raises:
            EvidenceError: an entry is missing, changed, or not signed by a trusted key.
        """
        with self._caught_up() as view:
            places = view.places(chain, predicate_types, start)
        if newest_first:
            places.reverse()
        return self._read_all(places)

    def newest(self, chain: str, at: datetime | None = None) -> Entry | None:
        """The last entry of a chain, as of a time or now; None for an empty one.

        Raises:
            EvidenceError: as `entries`.
        """
        with self._caught_up() as view:
            place = view.newest(chain, at)
        return None if place is None else self._read(place, self.keys())

    def head(self, chain: str) -> str | None:
        """Digest of the last entry of a chain; None for an empty one.

        Raises:
            EvidenceError: the log is not what it was.
        """
        with self._caught_up() as view:
            return view.link(chain).previous

    def heads(self, prefix: str) -> Iterator[Entry]:
        """The last entry of every chain below `prefix/`, in the order of their names.

        Raises:
            EvidenceError: as `entries`.
        """
        with self._caught_up() as view:
            newest = [view.newest(chain) for chain in view.chains(prefix)]
        return self._read_all([place for place in newest if place is not None])

    def since(self, sequence: int) -> Iterator[Entry]:
        """All entries from a place of the log on, each verified.

        Raises:
            EvidenceError: as `entries`.
        """
        keys = self.keys()
        with self._caught_up() as view:
            size = view.size
        for start in range(sequence, size, PAGE):
            with self._caught_up() as view:
                places = view.between(start, min(start + PAGE, size))
            for place in places:
                yield self._read(place, keys)

    def entry(self, sequence: int) -> Entry:
        """The entry at a place of the log.

        Raises:
            EvidenceError: there is none, or as `entries`.
        """
        with self._caught_up() as view:
            if not 0 <= sequence < view.size:
                raise _lost(sequence)
            place = Place(sequence, view.digest(sequence))
        return self._read(place, self.keys())

    def checkpoint(self) -> Checkpoint:
        """The log as it is now, as its last entry signs it.

        Raises:
            EvidenceError: as `entries`, or the log is empty.
        """
        with self._caught_up() as view:
            last, root = view.last, view.root(view.size)
        if last is None:
            raise EvidenceError(
                "The evidence log is empty",
                expected="at least one entry",
                cure="make a release first: `llmops release MODEL`",
            )
        return _sealed(self._record(last), root, self.keys())

    def inclusion_proof(self, sequence: int, size: int) -> list[bytes]:
        """That an entry is among the first `size`; see `merkle.check_inclusion`."""
        with self._caught_up() as view:
            return merkle.inclusion_proof(view.node, sequence, size)

    def consistency_proof(self, old: int, new: int) -> list[bytes]:
        """That the log only grew from one size to another; see `merkle.check_consistency`."""
        with self._caught_up() as view:
            return merkle.consistency_proof(view.node, old, new)

    def verify(self, progress: Callable[[int, int], None] = lambda done, size: None) -> Checkpoint:
        """Reads the whole log and checks every byte of it against what the index remembers.

        Args:
            progress: called after each entry with the number of entries done and of all.

        Raises:
            EvidenceError: names the first entry that does not hold.
        """
        keys = self.keys()
        checkpoint = self.checkpoint()
        with self._caught_up() as view:
            # What others append meanwhile is not in this view.
            for entry in islice(self.since(0), checkpoint.size):
                _sealed(entry.record, view.root(entry.sequence + 1), keys)
                progress(entry.sequence + 1, checkpoint.size)
        return checkpoint

    @contextmanager
    def _caught_up(self) -> Iterator[View]:
        """A view of the whole log as it is now."""
        with self.index.reading() as view:
            last = view.last
            # Most of the time nobody has written, and nobody must wait for a writer.
            news = next(self._logged(0 if last is None else last.sequence + 1), None) is not None
            if not news and last is not None:
                self._record(last)  # still there, and no other in its place?
            if not view.shared:
                self._catch_up(view)
            if not news or not view.shared:
                yield view
                return
        with self.index.writing() as view:
            self._catch_up(view)
            if not view.shared:
                yield view
                return
        with self.index.reading() as view:
            if not view.shared:
                self._catch_up(view)
            yield view

    def _catch_up(self, view: View) -> None:
        """Adds to the index what others have appended.

        Raises:
            EvidenceError: it does not continue what the index remembers, or no trusted key
                signed it. The index stays as it was.
        """
        before = view.last
        if before is not None:
            self._record(before)  # or what is appended would not follow what is there
        last: LogRecord | None = None
        for logged in self._logged(view.size):
            last = read_log_record(logged.record, logged.sequence)
            view.add(last.leaf)
        if last is not None:
            _sealed(last, view.root(view.size), self.keys())

    def _append(
        self,
        view: View,
        attestation: Attestation,
        envelope: Envelope,
        signer: Signer,
        heads: Mapping[str, str | None],
    ) -> Entry:
        while True:
            leaf = Leaf(
                sequence=view.size,
                statement=envelope_digest(envelope),
                predicate_type=attestation.statement.predicate_type,
                time=self.now(),
                links={chain: view.link(chain) for chain in attestation.chains},
            )
            checkpoint = Checkpoint(
                size=leaf.sequence + 1, root=view.root_with(leaf), time=leaf.time
            )
            record = LogRecord(
                leaf=leaf, envelope=envelope, checkpoint=sign_checkpoint(checkpoint, signer)
            )
            try:
                self.store.append(LOG, record.model_dump(mode="json"), at=leaf.sequence)
            except RefConflictError:
                # A writer on another machine was faster.
                self._catch_up(view)
                if view.size == leaf.sequence:
                    raise _lost(leaf.sequence - 1) from None
                # Or object storage was asked twice, as its first answer got lost.
                if view.digest(leaf.sequence) != leaf.digest:
                    for chain, digest in heads.items():
                        _check_head(view, chain, digest)
                    continue
            else:
                view.add(leaf)
            return Entry(record=record, statement=attestation.statement)

    def _read_all(self, places: Sequence[Place]) -> Iterator[Entry]:
        keys = self.keys() if places else ()  # who has nothing to read needs no keys yet
        return (self._read(place, keys) for place in places)

    def _read(self, place: Place, keys: Sequence[Key]) -> Entry:
        record = self._record(place)
        what = f"Entry {place.sequence} of the evidence log"
        statement = Statement.parse(verified_payload(record.envelope, PAYLOAD_TYPE, keys, what))
        if statement.predicate_type != record.leaf.predicate_type:
            raise _broken(place.sequence, f"it is a {statement.predicate_type}")
        return Entry(record=record, statement=statement)

    def _record(self, place: Place) -> LogRecord:
        logged = next(self._logged(place.sequence), None)
        if logged is None:
            raise _lost(place.sequence)
        record = read_log_record(logged.record, place.sequence)
        if record.leaf.digest != place.digest:
            raise _broken(place.sequence, f"it is {record.leaf.digest}, and was {place.digest}")
        return record

    def _logged(self, start: int) -> Iterator[LogEntry]:
        """The records from a place on, as they stand in the store."""
        sequence = start
        try:
            for logged in self.store.log(LOG, start):
                # Bytes with a key twice would be the same record to us, and not to others.
                if digest_of(canonical_json(logged.record)) != logged.digest:
                    raise _broken(sequence, "a record that is not in its canonical form")
                yield logged
                sequence = logged.sequence + 1
        # Bytes that are no JSON, or JSON that is nested without end.
        except (StoreError, ValueError, RecursionError) as error:
            raise _broken(sequence, str(error)) from error


def evidence_log(settings: Settings, store: Store) -> EvidenceLog:
    """The log of an installation, with the keys that its settings name."""
    return EvidenceLog(
        store,
        EvidenceIndex(settings.evidence_index),
        signer=lambda: evidence_signer(settings),
        keys=lambda: read_trust_root(settings.key_folder).evidence_keys(),
    )


def _sealed(record: LogRecord, root: bytes, keys: Sequence[Key]) -> Checkpoint:
    """The checkpoint of an entry, over the log with this root, of which it is the last.

    Raises:
        EvidenceError: it is over another log, or no trusted key signed it.
    """
    sequence = record.leaf.sequence
    what = f"The checkpoint of entry {sequence} of the evidence log"
    sealed = read_checkpoint(record.checkpoint, keys, what)
    if (sealed.size, sealed.root) != (sequence + 1, root):
        raise _broken(sequence, "its checkpoint does not fit the entries up to here")
    return sealed


def _check_head(view: View, chain: str, digest: str | None) -> None:
    actual = view.link(chain).previous
    if actual != digest:
        raise RefConflictError(
            f"Somebody else changed {chain}",
            expected=digest or "nothing yet",
            found=actual or "nothing yet",
            cure="look at it as it is now and decide anew",
        )


def _lost(sequence: int) -> EvidenceError:
    return EvidenceError(
        f"Entry {sequence} of the evidence log is gone",
        expected="a log that only grows",
        cure="restore the store's logs/evidence from a backup; until then treat the log as "
        "tampered with",
    )


def _broken(sequence: int, found: str) -> EvidenceError:
    return EvidenceError(
        f"The evidence log was changed at entry {sequence}",
        expected="the log that its checkpoints signed",
        found=found,
        cure="restore the store's logs/evidence from a backup; until then treat the log as "
        "tampered with",
    )
