"""Results: which result of a step counts, as signed statements say.

Refs and records of results are files that anybody who writes the store can exchange. Whatever
a release rests on is therefore taken from its chain in the evidence log: statements name the
record of each result by its digest. What a step made counts from its first statement on, as
columns are written once; of events, such as a deployment, the newest counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence import attest
from llmops_assets.evidence.leaves import Entry, release_chain
from llmops_assets.evidence.log import Attestation, EvidenceLog
from llmops_assets.evidence.statements import LIFECYCLE_EVENT, PROVENANCE
from llmops_assets.storage.columns import Result

MODEL_SPEC = "model_spec"
REMEMBERED_RELEASES = 1024


def action_chain(asset: str, action: str) -> str:
    """The chain of the runs of an action.

    Args:
        asset: that the action makes.
        action: its digest.
    """
    return f"actions/{asset}/{action.removeprefix('sha256:')}"


@dataclass(frozen=True)
class AttestedResults:
    """The witness of `Columns`: attests results, and says which ones were."""

    evidence: EvidenceLog

    def performed(self, result: Result) -> None:
        """See `Witness.performed`."""
        self._attest(result, action_chain(result.asset, result.action))

    def made(self, result: Result) -> None:
        """See `Witness.made`."""
        self._attest(result, release_chain(result.release))

    def happened(self, result: Result) -> None:
        """See `Witness.happened`."""
        statement = attest.lifecycle_event(result)
        self.evidence.append(Attestation(statement, (release_chain(result.release),)))

    def results(self, release: str) -> Mapping[str, str]:
        """See `Witness.results`.

        Raises:
            EvidenceError: the release's evidence is not what was signed.
        """
        chain = release_chain(release)
        return self._read(chain, self.evidence.head(chain))

    def result_of(self, asset: str, action: str) -> str | None:
        """See `Witness.result_of`.

        Raises:
            EvidenceError: the evidence of the action is not what was signed.
        """
        newest = self.evidence.newest(action_chain(asset, action))
        return None if newest is None else attested_record(newest)

    @cached_property
    def _read(self):
        """Reading a chain that has not grown again and again would be most of the work."""

        @lru_cache(maxsize=REMEMBERED_RELEASES)
        def read(chain: str, head: str | None) -> Mapping[str, str]:
            found: dict[str, str] = {}
            if head is None:
                return found
            for entry in self.evidence.entries(chain, PROVENANCE, LIFECYCLE_EVENT):
                asset = entry.statement.subject[0].name
                if entry.statement.predicate_type == PROVENANCE:
                    found.setdefault(asset, attested_record(entry))
                else:
                    found[asset] = attested_record(entry)
            return found

        return read

    def _attest(self, result: Result, chain: str) -> None:
        spec = self.results(result.release).get(MODEL_SPEC)
        published = None if spec is None else self._result(spec)
        self.evidence.append(Attestation(attest.provenance(result, spec=published), (chain,)))

    def _result(self, record: str) -> Result:
        return Result.model_validate(self.evidence.store.record(record))


def attested_record(entry: Entry) -> str:
    """Digest of the result's record that a provenance or an event names.

    Raises:
        EvidenceError: it names none.
    """
    predicate = entry.statement.predicate
    try:
        if entry.statement.predicate_type == PROVENANCE:
            byproduct = next(
                each for each in predicate["runDetails"]["byproducts"] if each["name"] == "result"
            )
            return f"sha256:{byproduct['digest']['sha256']}"
        return str(predicate["record"])
    except (KeyError, StopIteration, TypeError) as error:
        raise EvidenceError(
            f"Entry {entry.sequence} of the evidence log names no result",
            expected="a statement as this platform writes it",
            found=entry.statement.predicate_type,
            cure="make a new release, or read it with the version that wrote it",
        ) from error
