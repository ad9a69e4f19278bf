"""All evidence hangs on these hashes, so they are compared with the RFC's own words, with
published vectors and with another implementation, and every small lie must be refused."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sigstore._internal.merkle import verify_merkle_inclusion
from sigstore.errors import VerificationError
from sigstore.models import TransparencyLogEntry

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence import merkle
from llmops_assets.evidence.merkle import Nodes

LARGEST = 130
"""Sizes up to here are compared with the RFC one by one: past 128, where the height changes."""
MUTATED = 28
"""Sizes up to here are mutated exhaustively."""
CLAIMED = 128
"""Every size and index below this is claimed falsely: all single-bit changes and more."""

# Entries, roots and proofs of the reference implementation of Certificate Transparency.
REFERENCE_ENTRIES = [
    bytes.fromhex(entry)
    for entry in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
REFERENCE_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
REFERENCE_INCLUSION = [
    (0, 1, []),
    (
        0,
        8,
        [
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ],
    ),
    (
        5,
        8,
        [
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    ),
    (2, 3, ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"]),
    (
        1,
        5,
        [
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ],
    ),
]
REFERENCE_CONSISTENCY = [
    (1, 1, []),
    (
        1,
        8,
        [
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ],
    ),
    (
        6,
        8,
        [
            "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    ),
    (
        2,
        5,
        [
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ],
    ),
]


class Definitions:
    """RFC 6962, section 2.1, word for word: by recursion from the root down, over ranges.

    It shares nothing with the module but the two hash functions, which the published
    vectors cover. Entries without content of their own are empty, so that trees too large
    to hold can be asked about.
    """

    def __init__(self, entries: Mapping[int, bytes]) -> None:
        self._entries = entries
        self._positions = sorted(entries)
        self._known: dict[tuple[int, int], bytes] = {}
        self._empty: dict[int, bytes] = {}

    def mth(self, begin: int, end: int) -> bytes:
        """MTH(D[begin:end])."""
        if begin == end:
            return merkle.EMPTY_ROOT
        if bisect_left(self._positions, begin) == bisect_left(self._positions, end):
            return self._of_empty_entries(end - begin)
        if (begin, end) not in self._known:
            if end - begin == 1:
                known = merkle.leaf_hash(self._entries[begin])
            else:
                k = begin + largest_power_below(end - begin)
                known = merkle.node_hash(self.mth(begin, k), self.mth(k, end))
            self._known[begin, end] = known
        return self._known[begin, end]

    def _of_empty_entries(self, n: int) -> bytes:
        if n not in self._empty:
            if n == 1:
                known = merkle.leaf_hash(b"")
            else:
                k = largest_power_below(n)
                known = merkle.node_hash(self._of_empty_entries(k), self._of_empty_entries(n - k))
            self._empty[n] = known
        return self._empty[n]

    def path(self, m: int, begin: int, end: int) -> list[tuple[bytes, bool]]:
        """PATH(m, D[begin:end]), each hash with whether it is the left of its pair."""
        n = end - begin
        if n == 1:
            return []
        k = largest_power_below(n)
        if m < k:
            return [*self.path(m, begin, begin + k), (self.mth(begin + k, end), False)]
        return [*self.path(m - k, begin + k, end), (self.mth(begin, begin + k), True)]

    def inclusion(self, m: int, n: int) -> list[bytes]:
        return [sibling for sibling, _ in self.path(m, 0, n)]

    def sides(self, m: int, n: int) -> list[bool]:
        return [is_left for _, is_left in self.path(m, 0, n)]

    def consistency(self, m: int, n: int) -> list[bytes]:
        """PROOF(m, D_n), and nothing in the cases that the RFC leaves open."""
        return [] if m in (0, n) else self._subproof(m, 0, n, True)

    def _subproof(self, m: int, begin: int, end: int, b: bool) -> list[bytes]:
        n = end - begin
        if m == n:
            return [] if b else [self.mth(begin, end)]
        k = largest_power_below(n)
        if m <= k:
            return [*self._subproof(m, begin, begin + k, b), self.mth(begin + k, end)]
        return [*self._subproof(m - k, begin + k, end, False), self.mth(begin, begin + k)]


def largest_power_below(n: int) -> int:
    return 1 << ((n - 1).bit_length() - 1)


class Tree:
    """A tree grown as the log grows it, holding only what it was told is complete."""

    def __init__(self, entries: Iterable[bytes] = ()) -> None:
        self.size = 0
        self._nodes: dict[tuple[int, int], bytes] = {}
        for entry in entries:
            self.add(entry)

    def nodes(self, level: int, index: int) -> bytes:
        return self._nodes[level, index]

    def add(self, entry: bytes) -> None:
        completed = merkle.completed_by(self.nodes, self.size, merkle.leaf_hash(entry))
        for level, index, value in completed:
            assert (level, index) not in self._nodes, "a complete subtree never changes"
            self._nodes[level, index] = value
        assert completed[0] == (0, self.size, merkle.leaf_hash(entry))
        self.size += 1

    def held(self) -> set[tuple[int, int]]:
        return set(self._nodes)


ENTRIES = [b"entry %d" % index for index in range(LARGEST)]
RFC = Definitions(dict(enumerate(ENTRIES)))
TREE = Tree(ENTRIES)


def limited(nodes: Nodes, size: int) -> Nodes:
    """Nodes of a tree that has grown since, held to what was complete at `size`."""

    def ask(level: int, index: int) -> bytes:
        assert index >= 0
        assert (index + 1) << level <= size, "asked for a subtree that is not complete"
        return nodes(level, index)

    return ask


def refused(check: Callable[..., object], *claim: object) -> bool:
    try:
        check(*claim)
    except EvidenceError:
        return True
    return False


def hashes(values: Sequence[str]) -> list[bytes]:
    return [bytes.fromhex(value) for value in values]


def test_published_vectors() -> None:
    """Roots and proofs of Certificate Transparency's reference: whoever verifies our bundles
    with other tools computes these."""
    tree = Tree()
    assert merkle.root(tree.nodes, 0).hex() == REFERENCE_ROOTS[0]
    for size, entry in enumerate(REFERENCE_ENTRIES, start=1):
        tree.add(entry)
        assert merkle.root(tree.nodes, size).hex() == REFERENCE_ROOTS[size]
    for index, size, proof in REFERENCE_INCLUSION:
        root = bytes.fromhex(REFERENCE_ROOTS[size])
        leaf = merkle.leaf_hash(REFERENCE_ENTRIES[index])
        assert merkle.inclusion_proof(tree.nodes, index, size) == hashes(proof)
        merkle.check_inclusion(leaf, index, size, hashes(proof), root)
    for old, new, proof in REFERENCE_CONSISTENCY:
        roots = [bytes.fromhex(REFERENCE_ROOTS[size]) for size in (old, new)]
        assert merkle.consistency_proof(tree.nodes, old, new) == hashes(proof)
        merkle.check_consistency(old, new, roots[0], roots[1], hashes(proof))


def test_leaf_and_node_are_told_apart() -> None:
    """Without the prefixes of RFC 6962 the content of two hashes would be an entry."""
    left, right = merkle.leaf_hash(b"left"), merkle.leaf_hash(b"right")
    assert merkle.leaf_hash(b"left") == hashlib.sha256(b"\x00left").digest()
    assert merkle.node_hash(left, right) == hashlib.sha256(b"\x01" + left + right).digest()
    assert merkle.leaf_hash(left + right) != merkle.node_hash(left, right)
    assert merkle.node_hash(left, right) != merkle.node_hash(right, left)


def test_grown_node_by_node_it_holds_each_complete_subtree_once() -> None:
    """The index keeps nodes for good: one missing or too many would spoil it for ever."""
    tree = Tree()
    for size in range(LARGEST + 1):
        expected = {
            (level, index) for level in range(size.bit_length()) for index in range(size >> level)
        }
        assert tree.held() == expected
        for level, index in expected:
            begin, end = index << level, (index + 1) << level
            assert tree.nodes(level, index) == RFC.mth(begin, end)
        if size < LARGEST:
            tree.add(ENTRIES[size])


def test_every_root_and_proof_is_that_of_the_definitions() -> None:
    """Each size to 130, each index, each pair of sizes: made as the RFC defines it, accepted
    by the check, and only complete subtrees of that size asked for."""
    compared = 0
    for size in range(LARGEST + 1):
        nodes = limited(TREE.nodes, size)
        root = merkle.root(nodes, size)
        assert root == RFC.mth(0, size)
        for index in range(size):
            proof = merkle.inclusion_proof(nodes, index, size)
            assert proof == RFC.inclusion(index, size)
            leaf = merkle.leaf_hash(ENTRIES[index])
            assert merkle.root_from_inclusion(leaf, index, size, proof) == root
            merkle.check_inclusion(leaf, index, size, proof, root)
            compared += 1
        for old in range(size + 1):
            proof = merkle.consistency_proof(nodes, old, size)
            assert proof == RFC.consistency(old, size)
            merkle.check_consistency(old, size, RFC.mth(0, old), root, proof)
            compared += 1
    assert compared == LARGEST * (LARGEST + 1) // 2 + (LARGEST + 1) * (LARGEST + 2) // 2


def changed_proofs(proof: Sequence[bytes], others: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Yield the proof with one bit, one hash, its length or the order of two changed."""
    for at, value in enumerate(proof):
        for changed in flipped(value):
            yield _replaced(proof, at, changed)
    places = range(len(proof))
    pool = [*proof, *others, bytes(32), merkle.EMPTY_ROOT]
    coarse = {
        *(tuple(_replaced(proof, at, value)) for at in places for value in pool),
        *(tuple(_replaced(proof, at, proof[at][:-1])) for at in places),
        *(tuple(_replaced(proof, at, proof[at] + b"\x00")) for at in places),
        *((*proof[:at], *proof[at + 1 :]) for at in places),
        *((*proof[:at], proof[at] + proof[at + 1], *proof[at + 2 :]) for at in places[:-1]),
        *((*proof[:at], value, *proof[at:]) for at in range(len(proof) + 1) for value in pool),
        *((*proof[:at], b"", *proof[at:]) for at in range(len(proof) + 1)),
        *(
            tuple(_replaced(_replaced(proof, a, proof[b]), b, proof[a]))
            for a, b in combinations(places, 2)
        ),
        tuple(reversed(proof)),
        (),
    }
    yield from (list(changed) for changed in coarse - {tuple(proof)})


def _replaced(proof: Sequence[bytes], at: int, value: bytes) -> list[bytes]:
    return [*proof[:at], value, *proof[at + 1 :]]


def flipped(value: bytes) -> Iterator[bytes]:
    """Yield the value with each of its bits changed."""
    number = int.from_bytes(value)
    for bit in range(len(value) * 8):
        yield (number ^ (1 << bit)).to_bytes(len(value))


def test_every_changed_inclusion_proof_is_refused() -> None:
    """A bundle is in the hands of whoever wants to fool its reader: no bit of leaf, root or
    proof, no hash, index or signed size may be another."""
    tried = 0
    for size in range(1, MUTATED + 1):
        root = RFC.mth(0, size)
        for index in range(size):
            leaf, proof = RFC.mth(index, index + 1), RFC.inclusion(index, size)
            merkle.check_inclusion(leaf, index, size, proof, root)
            lies: list[tuple[bytes, int, int, Sequence[bytes], bytes]] = [
                *(
                    (leaf, index, size, changed, root)
                    for changed in changed_proofs(proof, [leaf, root])
                ),
                *((changed, index, size, proof, root) for changed in flipped(leaf)),
                *((leaf, index, size, proof, changed) for changed in flipped(root)),
                *(
                    (leaf, claimed, size, proof, root)
                    for claimed in range(-1, CLAIMED)
                    if claimed != index
                ),
                *(
                    (leaf, index, claimed, proof, RFC.mth(0, claimed))
                    for claimed in range(CLAIMED)
                    if claimed != size
                ),
                *(
                    (RFC.mth(other, other + 1), index, size, proof, root)
                    for other in range(size)
                    if other != index
                ),
                (leaf, index, -size, proof, root),
            ]
            for lie in lies:
                assert refused(merkle.check_inclusion, *lie), (index, size, lie)
            tried += len(lies)
    print(f"{tried} changed inclusion proofs refused")
    assert tried > 700_000


def test_every_changed_consistency_proof_is_refused() -> None:
    """The same for the proof that the log only grew: it is all that an auditor has against a
    past that was rewritten."""
    tried = 0
    for new in range(1, MUTATED + 1):
        for old in range(1, new + 1):
            before, after = RFC.mth(0, old), RFC.mth(0, new)
            proof = RFC.consistency(old, new)
            merkle.check_consistency(old, new, before, after, proof)
            lies: list[tuple[int, int, bytes, bytes, Sequence[bytes]]] = [
                *(
                    (old, new, before, after, changed)
                    for changed in changed_proofs(proof, [before, after])
                ),
                *((old, new, changed, after, proof) for changed in flipped(before)),
                *((old, new, before, changed, proof) for changed in flipped(after)),
                *(
                    (claimed, new, before, after, proof)
                    for claimed in range(-1, CLAIMED)
                    if claimed != old
                ),
                *(
                    (claimed, new, RFC.mth(0, claimed), after, proof)
                    for claimed in range(CLAIMED)
                    if claimed != old and RFC.consistency(min(claimed, new), new) != proof
                ),
                *(
                    (old, claimed, before, RFC.mth(0, claimed), proof)
                    for claimed in range(CLAIMED)
                    if claimed != new
                ),
            ]
            if old != new:
                lies.append((old, new, after, before, proof))
            for lie in lies:
                assert refused(merkle.check_consistency, *lie), (old, new, lie)
            tried += len(lies)
    print(f"{tried} changed consistency proofs refused")
    assert tried > 700_000


def test_a_proof_does_not_fix_the_size_of_its_tree() -> None:
    """Why size and root are taken from one signed checkpoint: with the same root another size
    passes exactly where the path has the same turns. Should this ever be stricter or laxer,
    the module's warning is wrong."""
    for size in range(1, MUTATED + 1):
        root = RFC.mth(0, size)
        for index in range(size):
            leaf, proof = RFC.mth(index, index + 1), RFC.inclusion(index, size)
            for claimed in range(CLAIMED):
                same_turns = index < claimed and RFC.sides(index, claimed) == RFC.sides(index, size)
                claim = leaf, index, claimed, proof, root
                passed = not refused(merkle.check_inclusion, *claim)
                assert passed == same_turns, (index, size, claimed)
    merkle.check_inclusion(RFC.mth(0, 1), 0, 4, RFC.inclusion(0, 3), RFC.mth(0, 3))


def test_no_tampered_log_is_consistent_with_what_was_seen() -> None:
    """An attacker who writes the store rebuilds the whole tree after an edit, a deletion or a
    swap, and makes the best proofs for it: they hold from before the place and never after."""
    tried = 0
    for new in range(2, 25):
        for at in range(new):
            edited = [*ENTRIES[:at], b"edited", *ENTRIES[at + 1 : new]]
            deleted = [*ENTRIES[:at], *ENTRIES[at + 1 : new]]
            inserted = [*ENTRIES[:at], b"inserted", *ENTRIES[at:new]]
            logs = [edited, deleted, inserted]
            if at + 1 < new:
                logs.append([*ENTRIES[:at], ENTRIES[at + 1], ENTRIES[at], *ENTRIES[at + 2 : new]])
            for log in logs:
                tree = Tree(log)
                root = merkle.root(tree.nodes, tree.size)
                for old in range(tree.size + 1):
                    proof = merkle.consistency_proof(tree.nodes, old, tree.size)
                    claim = old, tree.size, RFC.mth(0, old), root, proof
                    # Deleting the last entries is seen only by who saw them: see the next test.
                    untouched = old <= at
                    assert refused(merkle.check_consistency, *claim) != untouched
                    tried += 1
    assert tried > 20_000


def test_a_log_cut_at_its_end_is_refused() -> None:
    """Truncation leaves a perfect smaller tree. Only who remembers the larger one sees it."""
    for seen in range(1, 33):
        for cut in range(seen):
            with pytest.raises(EvidenceError, match="shorter than it was"):
                merkle.check_consistency(seen, cut, RFC.mth(0, seen), RFC.mth(0, cut), [])
            with pytest.raises(EvidenceError, match="shorter than it was"):
                merkle.consistency_proof(TREE.nodes, seen, cut)


def test_the_empty_tree_proves_nothing_but_is_itself_checked() -> None:
    """The first checkpoint follows on none: allowed, but not as a way around the old root."""
    merkle.check_consistency(0, 0, merkle.EMPTY_ROOT, merkle.EMPTY_ROOT, [])
    merkle.check_consistency(0, 7, merkle.EMPTY_ROOT, RFC.mth(0, 7), [])
    for size in (0, 7):
        for lie in (
            (0, size, RFC.mth(0, 3), RFC.mth(0, size), []),
            (0, size, merkle.EMPTY_ROOT, RFC.mth(0, size), [RFC.mth(0, 1)]),
            (0, size, b"", RFC.mth(0, size), []),
            (0, size, merkle.EMPTY_ROOT, b"", []),
        ):
            assert refused(merkle.check_consistency, *lie), lie
    assert refused(merkle.check_consistency, 0, 0, merkle.EMPTY_ROOT, RFC.mth(0, 1), [])


def test_impossible_requests_are_refused() -> None:
    """A size or index read from a file may be anything; Python would shift negative ones."""
    leaf = RFC.mth(0, 1)
    requests: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (merkle.root, (TREE.nodes, -1)),
        (merkle.completed_by, (TREE.nodes, -1, leaf)),
        (merkle.completed_by, (TREE.nodes, LARGEST, b"not hashed")),
        (merkle.inclusion_proof, (TREE.nodes, -1, 5)),
        (merkle.inclusion_proof, (TREE.nodes, 5, 5)),
        (merkle.inclusion_proof, (TREE.nodes, 0, 0)),
        (merkle.consistency_proof, (TREE.nodes, -1, 5)),
        (merkle.root_from_inclusion, (b"not hashed", 0, 1, [])),
        (merkle.root_from_inclusion, (leaf, 0, 0, [])),
        (merkle.root_from_inclusion, (leaf, 0, 1, [leaf])),
    ]
    for function, arguments in requests:
        assert refused(function, *arguments), arguments


def test_a_refusal_says_what_was_expected_and_found() -> None:
    """It is read by an auditor who has to name what does not hold."""
    with pytest.raises(EvidenceError) as caught:
        merkle.check_inclusion(RFC.mth(3, 4), 3, 5, RFC.inclusion(3, 5), RFC.mth(0, 6))
    assert RFC.mth(0, 6).hex() in str(caught.value.expected)
    assert RFC.mth(0, 5).hex() in str(caught.value.found)
    assert "To do:" in str(caught.value)
    old_root, new_root, proof = RFC.mth(0, 3), RFC.mth(0, 5), RFC.consistency(3, 5)
    with pytest.raises(EvidenceError, match="the old root is no SHA-256 hash"):
        merkle.check_consistency(3, 5, old_root[:-1], new_root, proof)
    with pytest.raises(EvidenceError, match="hash 1 of the consistency proof is no SHA-256"):
        merkle.check_consistency(
            3, 5, old_root, new_root, [proof[0], proof[1] + b"\x00", *proof[2:]]
        )


sizes = st.integers(1, 2**40)


@st.composite
def large_logs(draw: st.DrawFn) -> tuple[Definitions, int, int, int]:
    """A log of up to 2**40 entries, some with content; (log, old size, new size, index)."""
    new = draw(st.one_of(sizes, st.integers(1, 40).map(lambda bits: 2**bits)))
    old = draw(st.integers(0, new))
    index = draw(st.one_of(st.integers(0, new - 1), st.just(new - 1), st.just(max(old - 1, 0))))
    marked = draw(st.sets(st.integers(0, new - 1), max_size=6)) | {0, index, new - 1}
    return Definitions({at: b"entry %d" % at for at in marked}), old, new, index


@given(large_logs(), st.data())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_large_trees_follow_the_definitions_with_few_asks(
    log: tuple[Definitions, int, int, int], data: st.DataObject
) -> None:
    """Ten thousand releases are 200,000 entries, and a log only grows: the proofs stay right,
    and cost the logarithm of it, at sizes that no loop reaches."""
    rfc, old, new, index = log
    asked: list[tuple[int, int]] = []

    def nodes(level: int, at: int) -> bytes:
        asked.append((level, at))
        return rfc.mth(at << level, (at + 1) << level)

    within = limited(nodes, new)
    height = new.bit_length()
    leaf, root = rfc.mth(index, index + 1), rfc.mth(0, new)
    assert merkle.root(within, new) == root
    assert len(asked) == new.bit_count()
    asked.clear()
    inclusion = merkle.inclusion_proof(within, index, new)
    assert len(asked) <= 2 * height
    assert inclusion == rfc.inclusion(index, new)
    merkle.check_inclusion(leaf, index, new, inclusion, root)
    asked.clear()
    consistency = merkle.consistency_proof(within, old, new)
    assert len(asked) <= 2 * height
    assert consistency == rfc.consistency(old, new)
    merkle.check_consistency(old, new, rfc.mth(0, old), root, consistency)
    asked.clear()
    completed = merkle.completed_by(within, new, leaf)
    assert len(asked) == len(completed) - 1 <= height

    if inclusion:
        at = data.draw(st.integers(0, len(inclusion) - 1))
        bit = data.draw(st.integers(0, 255))
        lie = _replaced(inclusion, at, list(flipped(inclusion[at]))[bit])
        assert refused(merkle.check_inclusion, leaf, index, new, lie, root)
    if consistency:
        at = data.draw(st.integers(0, len(consistency) - 1))
        bit = data.draw(st.integers(0, 255))
        lie = _replaced(consistency, at, list(flipped(consistency[at]))[bit])
        assert refused(merkle.check_consistency, old, new, rfc.mth(0, old), root, lie)


def accepted_by_sigstore(
    content: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> bool:
    """Whether the verifier for Rekor's log, which comes with model-signing, accepts this."""
    entry = SimpleNamespace(
        _inner=SimpleNamespace(
            canonicalized_body=content,
            inclusion_proof=SimpleNamespace(
                log_index=index, tree_size=size, hashes=list(proof), root_hash=root
            ),
        )
    )
    try:
        verify_merkle_inclusion(cast(TransparencyLogEntry, entry))
    except VerificationError:
        return False
    return True


def test_sigstore_agrees() -> None:
    """A bundle must verify with tools that we did not write: each proof does, and they refuse
    what we refuse."""
    accepted = 0
    for size in range(1, 71):
        root = RFC.mth(0, size)
        for index in range(size):
            leaf, proof = RFC.mth(index, index + 1), RFC.inclusion(index, size)
            assert accepted_by_sigstore(ENTRIES[index], index, size, proof, root)
            accepted += 1
            for lie in (
                (index, size + 1, proof, root),
                ((index + 1) % size, size, proof, root),
                (index, size, proof[1:], root),
                (index, size, proof[::-1], root),
                (index, size, proof, RFC.mth(0, size + 1)),
            ):
                ours = not refused(merkle.check_inclusion, leaf, *lie)
                assert ours == accepted_by_sigstore(ENTRIES[index], *lie)
    assert accepted == 70 * 71 // 2
