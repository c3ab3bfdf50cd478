"""Takes out conversations that are in the build already.

Exact: the same texts about the same picture, which is the same path, or another path whose file
holds the same bytes (`train2017/000000000009.jpg` and `COCO_train2014_000000000009.jpg`). Near: the
same texts about pictures whose perceptual hashes differ in a few bits at most and whose shapes are
alike (the hash looks at a square, so a wide picture and a narrow piece of it can share one). A copy
of a picture with *other* text is kept: it teaches something else. The copy that stays is the one
whose source comes first in the recipe, then the one with the smallest key, so it does not depend on
the order of files.
"""

import os
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from data_builders.hash_bands import bands
from data_builders.image_check import ImageFacts
from data_builders.mix import Ledger

_SHAPE = 1.1  # how far two aspect ratios may lie apart


def drop_exact(ledger: Ledger) -> int:
    """Drops repeated conversations; returns how many raw records went."""
    return ledger.drop(_later_copies(ledger, ledger.columns["exact"]), "duplicate")


def drop_copies(ledger: Ledger, root: Path) -> int:
    """Drops conversations that say the same about another file with the same bytes.

    Args:
        ledger: The records.
        root: What picture paths are relative to; only files of equal size are read.

    Returns:
        How many raw records went.
    """
    sizes: dict[int, int] = {}
    digests: dict[int, bytes] = {}

    def size(picture: int) -> int:
        if picture not in sizes:
            sizes[picture] = os.stat(root / ledger.pictures[picture]).st_size
        return sizes[picture]

    def digest(picture: int) -> bytes:
        if picture not in digests:
            content = (root / ledger.pictures[picture]).read_bytes()
            digests[picture] = blake2b(content, digest_size=16).digest()
        return digests[picture]

    mask = np.zeros(len(ledger.alive), bool)
    for group in _same_texts(ledger):
        pictures = {record: ledger.pictures_of(record) for record in group}
        lengths = Counter(tuple(map(size, shown)) for shown in pictures.values())
        kept: set[tuple[bytes, ...]] = set()
        for record, shown in pictures.items():
            if lengths[tuple(map(size, shown))] > 1:
                content = tuple(map(digest, shown))
                mask[record] = content in kept
                kept.add(content)
    return ledger.drop(mask, "duplicate")


def drop_near(ledger: Ledger, facts: dict[int, ImageFacts], bits: int) -> list[tuple[int, int]]:
    """Drops conversations whose twin has a nearly equal picture.

    Args:
        ledger: The records.
        facts: Size and 64-bit perceptual hash of each picture number.
        bits: Hamming distance within which two pictures count as the same.

    Returns:
        Pairs (kept record, dropped record).
    """
    pairs: list[tuple[int, int]] = []
    for group in _same_texts(ledger):
        pairs += _near_in_group(group, ledger, facts, bits)
    mask = np.zeros(len(ledger.alive), bool)
    mask[[gone for _, gone in pairs]] = True
    ledger.drop(mask, "near_duplicate")
    return pairs


def _same_texts(ledger: Ledger) -> Iterator[list[int]]:
    """Records that say the same about a picture, several at a time, each group by rank."""
    rank = _rank(ledger)
    live = np.flatnonzero(ledger.alive & (ledger.columns["picture"] >= 0))
    texts = ledger.columns["texts"][live]
    order = np.lexsort((rank[live], texts))
    live, texts = live[order], texts[order]
    starts = np.flatnonzero(np.r_[True, texts[1:] != texts[:-1]])
    for start, end in zip(starts, np.r_[starts[1:], len(live)], strict=True):
        if end - start > 1:
            yield live[start:end].tolist()


def _near_in_group(
    records: list[int], ledger: Ledger, facts: dict[int, ImageFacts], bits: int
) -> list[tuple[int, int]]:
    """Pairs within records of equal text."""
    kept: dict[tuple[int, int], list[tuple[int, ImageFacts]]] = {}
    pairs: list[tuple[int, int]] = []
    for record in records:
        pictures = ledger.pictures_of(record)
        fact = facts.get(pictures[0]) if len(pictures) == 1 else None
        if fact is None or fact.phash is None:
            continue
        slots = bands(fact.phash, bits)
        twin = next(
            (
                other
                for slot in slots
                for other, theirs in kept.get(slot, ())
                if _alike(fact, theirs, bits)
            ),
            None,
        )
        if twin is not None:
            pairs.append((twin, record))
            continue
        for slot in slots:
            kept.setdefault(slot, []).append((record, fact))
    return pairs


def _alike(one: ImageFacts, other: ImageFacts, bits: int) -> bool:
    shapes = one.width * other.height, one.height * other.width
    near = ((one.phash or 0) ^ (other.phash or 0)).bit_count() <= bits
    return near and max(shapes) <= _SHAPE * min(shapes)


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
