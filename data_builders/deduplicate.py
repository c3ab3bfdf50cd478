"""Takes out conversations that are in the build already.

Exact: the same texts about the same picture path. Near: the same texts about pictures whose
perceptual hashes differ in a few bits at most. A near-duplicate picture with *other* text is kept:
it teaches something else. The copy that stays is the one whose source comes first in the recipe,
then the one with the smallest key, so it does not depend on the order of files.
"""

from typing import Any

import numpy as np

from data_builders.mix import Ledger


def drop_exact(ledger: Ledger) -> int:
    """Drops repeated conversations; returns how many raw records went."""
    return ledger.drop(_later_copies(ledger, ledger.columns["exact"]), "duplicate")


def drop_near(ledger: Ledger, hashes: dict[int, int], bits: int) -> list[tuple[int, int]]:
    """Drops conversations whose twin has a nearly equal picture.

    Args:
        ledger: The records.
        hashes: 64-bit perceptual hash of each picture number.
        bits: Hamming distance within which two pictures count as the same.

    Returns:
        Pairs (kept record, dropped record).
    """
    rank = _rank(ledger)
    live = np.flatnonzero(ledger.alive & (ledger.columns["picture"] >= 0))
    texts = ledger.columns["texts"][live]
    order = np.lexsort((rank[live], texts))
    live, texts = live[order], texts[order]
    starts = np.flatnonzero(np.r_[True, texts[1:] != texts[:-1]])
    pairs: list[tuple[int, int]] = []
    for start, end in zip(starts, np.r_[starts[1:], len(live)], strict=True):
        if end - start > 1:
            pairs += _near_in_group([int(r) for r in live[start:end]], ledger, hashes, bits)
    mask = np.zeros(len(ledger.alive), bool)
    mask[[gone for _, gone in pairs]] = True
    ledger.drop(mask, "near_duplicate")
    return pairs


def _near_in_group(
    records: list[int], ledger: Ledger, hashes: dict[int, int], bits: int
) -> list[tuple[int, int]]:
    """Pairs within records of equal text. Hashes that differ in d bits share one of d+1 bands."""
    bands = [(64 * k // (bits + 1), 64 * (k + 1) // (bits + 1)) for k in range(bits + 1)]
    kept: dict[tuple[int, int], list[tuple[int, int]]] = {}
    pairs: list[tuple[int, int]] = []
    for record in records:
        pictures = ledger.pictures_of(record)
        value = hashes.get(pictures[0]) if len(pictures) == 1 else None
        if value is None:
            continue
        slots = [(k, (value >> low) & ((1 << (high - low)) - 1)) for k, (low, high) in
                 enumerate(bands)]  # fmt: skip
        twin = next(
            (
                other
                for slot in slots
                for other, theirs in kept.get(slot, ())
                if (value ^ theirs).bit_count() <= bits
            ),
            None,
        )
        if twin is not None:
            pairs.append((twin, record))
            continue
        for slot in slots:
            kept.setdefault(slot, []).append((record, value))
    return pairs


def _later_copies(ledger: Ledger, hashes: Any) -> Any:
    """Mask of every record but the first of its hash, by rank."""
    live = np.flatnonzero(ledger.alive)
    live = live[np.argsort(_rank(ledger)[live], kind="stable")]
    _, first = np.unique(hashes[live], return_index=True)
    mask = np.zeros(len(ledger.alive), bool)
    mask[live] = True
    mask[live[first]] = False
    return mask


def _rank(ledger: Ledger) -> Any:
    """Position of each record by (source of the recipe, key)."""
    order = np.lexsort((ledger.columns["keys"], ledger.columns["source"]))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank
