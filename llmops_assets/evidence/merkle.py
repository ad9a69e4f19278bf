"""Merkle trees as in Certificate Transparency: hashes, proofs and their checks.

The tree is that of RFC 6962, section 2.1 (the same in RFC 9162, section 2.1), over SHA-256.
This module keeps nothing: whoever holds the tree hands in `Nodes`, and every call asks it for
O(log size) hashes. Only hashes of complete subtrees are asked for. They never change while
the log grows, so they can be kept for good.

A proof alone does not fix the size of its tree: leaf 0 has the same path in trees of three and
of four leaves. Size and root must therefore come together from one signed checkpoint, never
one of them from the bundle that is being checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

from llmops_assets.errors import EvidenceError

Nodes = Callable[[int, int], bytes]
"""(level, index) -> hash of the complete subtree over the leaves index * 2**level up to, but
not including, (index + 1) * 2**level. Level 0 holds the leaf hashes."""

HASH_BYTES = hashlib.sha256().digest_size
EMPTY_ROOT = hashlib.sha256(b"").digest()
"""Root of the tree without leaves."""

_DISTRUST = (
    "do not rely on this evidence; take entry, proof and checkpoint again from the store, and "
    "compare its checkpoint with one that was anchored outside of it"
)


def leaf_hash(content: bytes) -> bytes:
    """Return SHA-256(0x00 || content), the 32 bytes that stand for one leaf."""
    return hashlib.sha256(b"\x00" + content).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return SHA-256(0x01 || left || right), the hash of an inner node.

    The prefix differs from that of a leaf, so that no inner node can be passed off as a leaf.
    """
    return hashlib.sha256(b"\x01" + left + right).digest()


def completed_by(nodes: Nodes, size: int, leaf: bytes) -> list[tuple[int, int, bytes]]:
    """Return the nodes that become complete when a leaf is added to a tree.

    Args:
        nodes: the tree before; asked for existing nodes only.
        size: leaves before, hence the 0-based number of the new leaf.
        leaf: its `leaf_hash`.

    Returns:
        (level, index, hash) of each, the leaf itself (level 0) first.

    Raises:
        EvidenceError: the size is negative, or the leaf is not a hash.
    """
    _require_size(size)
    _require_hash("the leaf", leaf)
    completed = [(0, size, leaf)]
    level, index, value = 0, size, leaf
    while index & 1:
        value = node_hash(nodes(level, index - 1), value)
        level, index = level + 1, index >> 1
        completed.append((level, index, value))
    return completed


def root(nodes: Nodes, size: int) -> bytes:
    """Return the root over the first `size` leaves, MTH(D_n) in RFC 6962, section 2.1.

    Raises:
        EvidenceError: the size is negative.
    """
    _require_size(size)
    return _root_of_range(nodes, 0, size) if size else EMPTY_ROOT


def inclusion_proof(nodes: Nodes, index: int, size: int) -> list[bytes]:
    """Return the audit path of a leaf, PATH(m, D_n) in RFC 6962, section 2.1.1.

    Args:
        nodes: the tree.
        index: 0-based number of the leaf.
        size: leaves of the tree that the proof is for; it may have grown since.

    Returns:
        The sibling hashes from the leaf's up to the one below the root; empty for one leaf.

    Raises:
        EvidenceError: there is no such leaf in a tree of this size.
    """
    _require_leaf(index, size)
    return list(_siblings(nodes, 0, index, size))


def consistency_proof(nodes: Nodes, old: int, new: int) -> list[bytes]:
    """Return the proof that a tree only grew, PROOF(m, D_n) in RFC 6962, section 2.1.2.

    Args:
        nodes: the tree.
        old: leaves before.
        new: leaves after.

    Returns:
        The hashes that rebuild both roots. Empty where there is nothing to prove: from no
        leaves, or to the same size. The RFC leaves these two cases open.

    Raises:
        EvidenceError: the new size is below the old one, or one is negative.
    """
    _require_growth(old, new)
    if old in (0, new):
        return []
    level, index = _last_complete(old)
    # The checker has this node already where it is the whole old tree: its root.
    seed = [nodes(level, index)] if index else []
    return [*seed, *_siblings(nodes, level, index, new)]


def root_from_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes]) -> bytes:
    """Return the root that a leaf and its audit path lead to; RFC 9162, section 2.1.3.2.

    The result says nothing until it is compared with a root from a signed checkpoint of
    exactly this size.

    Args:
        leaf: `leaf_hash` of the entry.
        index: its 0-based number.
        size: leaves of the tree.
        proof: as `inclusion_proof` returns it.

    Raises:
        EvidenceError: no tree of this size has such a path for this leaf.
    """
    _require_leaf(index, size)
    _require_hash("the leaf", leaf)
    sides = _sides(index, size - 1)
    _require_proof("inclusion", proof, len(sides))
    value = leaf
    for sibling_is_left, sibling in zip(sides, proof, strict=True):
        value = node_hash(sibling, value) if sibling_is_left else node_hash(value, sibling)
    return value


def check_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> None:
    """Check that a leaf stands at an index of the tree with this size and root.

    Args:
        leaf: `leaf_hash` of the entry.
        index: its 0-based number.
        size: leaves of the tree, from the same signed checkpoint as `root`.
        proof: as `inclusion_proof` returns it.
        root: of the tree.

    Raises:
        EvidenceError: the proof is of impossible shape or leads to another root.
    """
    found = root_from_inclusion(leaf, index, size, proof)
    if found != root:
        raise EvidenceError(
            f"entry {index} is not in the log of {size} entries at this place",
            expected=f"a proof that leads to the root {root.hex()}",
            found=f"one that leads to {found.hex()}",
            cure=_DISTRUST,
        )


def check_consistency(
    old: int, new: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """Check that the new tree begins with all of the old one; RFC 9162, section 2.1.4.2.

    Every tree begins with the tree without leaves, so that nothing is said of the `new_root`
    of a tree with leaves where `old` is 0.

    Args:
        old: leaves before, from the same signed checkpoint as `old_root`.
        new: leaves after, from the same signed checkpoint as `new_root`.
        old_root: root before.
        new_root: root after.
        proof: as `consistency_proof` returns it.

    Raises:
        EvidenceError: the log was cut, its past was rewritten, or the proof is of impossible
            shape.
    """
    _require_growth(old, new)
    _require_hash("the old root", old_root)
    _require_hash("the new root", new_root)
    if old in (0, new):
        _require_proof("consistency", proof, 0)
        if old == 0:
            _require_root("before", old, EMPTY_ROOT, old_root)
        if old == new:
            _require_root("after", new, old_root, new_root)
        return
    level, index = _last_complete(old)
    sides = _sides(index, (new - 1) >> level)
    _require_proof("consistency", proof, len(sides) + (1 if index else 0))
    seed, siblings = (proof[0], proof[1:]) if index else (old_root, proof)
    before = after = seed
    for sibling_is_left, sibling in zip(sides, siblings, strict=True):
        if sibling_is_left:
            before, after = node_hash(sibling, before), node_hash(sibling, after)
        else:
            after = node_hash(after, sibling)
    _require_root("before", old, before, old_root)
    _require_root("after", new, after, new_root)


def _root_of_range(nodes: Nodes, begin: int, end: int) -> bytes:
    """Return MTH(D[begin:end]), where `begin` is where a subtree of that width begins."""
    width = end - begin
    level, index = _last_complete(width)
    value = nodes(level, (begin >> level) + index)
    for higher in range(level + 1, width.bit_length()):
        if width >> higher & 1:
            value = node_hash(nodes(higher, (end >> higher) - 1), value)
    return value


def _siblings(nodes: Nodes, level: int, index: int, size: int) -> Iterator[bytes]:
    """Yield the siblings on the way from a complete node to the root of `size` leaves."""
    last = (size - 1) >> level
    while last:
        sibling = index ^ 1
        # A last node without a sibling moves up unchanged.
        if sibling <= last:
            yield _root_of_range(nodes, sibling << level, min((sibling + 1) << level, size))
        level, index, last = level + 1, index >> 1, last >> 1


def _sides(index: int, last: int) -> list[bool]:
    """Return, for each sibling on the way to the root, whether it is the left one.

    Args:
        index: number of the node to start from, on its level.
        last: number of the last node on that level.
    """
    sides: list[bool] = []
    while last:
        if index & 1:
            sides.append(True)
        elif index < last:
            sides.append(False)
        index, last = index >> 1, last >> 1
    return sides


def _last_complete(size: int) -> tuple[int, int]:
    """Return (level, index) of the largest complete subtree that ends with the last leaf."""
    level = (size & -size).bit_length() - 1
    return level, (size >> level) - 1


def _require_size(size: int) -> None:
    if size < 0:
        raise EvidenceError(
            "a log cannot have this size", expected="0 or more", found=size, cure=_DISTRUST
        )


def _require_leaf(index: int, size: int) -> None:
    if not 0 <= index < size:
        raise EvidenceError(
            "the log has no such entry",
            expected=f"an entry from 0 to {size - 1}" if size > 0 else "a log with entries",
            found=f"entry {index} of a log of {size} entries",
            cure=_DISTRUST,
        )


def _require_growth(old: int, new: int) -> None:
    _require_size(old)
    if new < old:
        raise EvidenceError(
            "the log is shorter than it was: entries were cut off at its end",
            expected=f"at least {old} entries",
            found=f"{new} entries",
            cure=_DISTRUST,
        )


def _require_hash(what: str, value: bytes) -> None:
    if len(value) != HASH_BYTES:
        raise EvidenceError(
            f"{what} is no SHA-256 hash",
            expected=f"{HASH_BYTES} bytes",
            found=f"{len(value)} bytes",
            cure=_DISTRUST,
        )


def _require_proof(kind: str, proof: Sequence[bytes], length: int) -> None:
    if len(proof) != length:
        raise EvidenceError(
            f"the {kind} proof does not belong to a log of this size",
            expected=f"{length} hashes",
            found=f"{len(proof)} hashes",
            cure=_DISTRUST,
        )
    for position, value in enumerate(proof):
        _require_hash(f"hash {position} of the {kind} proof", value)


def _require_root(when: str, size: int, computed: bytes, claimed: bytes) -> None:
    if computed != claimed:
        raise EvidenceError(
            "the log did not only grow: entries that were in it changed, moved or are gone",
            expected=f"the root {when}, of {size} entries, to be {computed.hex()} by the proof",
            found=claimed.hex(),
            cure=_DISTRUST,
        )
