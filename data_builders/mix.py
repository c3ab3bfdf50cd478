"""The ledger of a build: every kept record as numbers, its text in one spill file on disk.

Later stages (image checks, duplicates, held-out overlap, caps, weights) only need hashes, so they
run on arrays of a few dozen bytes a record while the lines wait on disk; memory does not grow with
the text. Order is by hash(seed, id): adding a source or a worker moves no other conversation
relative to its neighbours of the same source.
"""

import os
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from cogvlm_sft.errors import DataError
from data_builders.source import EXAMPLES, Drop, Processed, Source

_COLUMNS = {
    "keys": np.uint64, "texts": np.uint64, "exact": np.uint64, "lengths": np.uint32,
    "pairs": np.uint32, "answer_chars": np.uint32, "units": np.uint32,
}  # fmt: skip


class Ledger:
    """Records of all sources, and what happened to each.

    Attributes:
        sources: Names, in the order of the recipe.
        read, drops, notes, examples: Per source: raw records read, dropped by reason, repairs by
            name, the first few drops of each reason.
        pictures: Every distinct picture path, in order of first sight.
        alive: Which records are still in, after `seal`.
    """

    def __init__(self, spill: Path, sources: list[str]) -> None:
        self.sources = sources
        self.read = dict.fromkeys(sources, 0)
        self.drops: dict[str, Counter[str]] = {name: Counter() for name in sources}
        self.notes: dict[str, Counter[str]] = {name: Counter() for name in sources}
        self.examples: dict[str, list[Drop]] = {name: [] for name in sources}
        self.pictures: list[str] = []
        self.alive: Any = np.zeros(0, bool)
        self.columns: dict[str, Any] = {}
        self._picture_ids: dict[str, int] = {}
        self._parts: dict[str, list[Any]] = {name: [] for name in [*_COLUMNS, "source"]}
        self._first_picture: list[Any] = []
        self._more_pictures: dict[int, tuple[int, ...]] = {}
        self._count = 0
        spill.touch()
        self._spill: BinaryIO = spill.open("r+b")

    def add(self, source: str, part: Processed) -> None:
        """Takes in a processed batch."""
        self._spill.write(part.lines)
        self._take(source, part)

    def flush(self) -> None:
        """Writes out all lines taken in so far."""
        self._spill.flush()

    def restore(self, source: str, part: Processed, size: int, crc: int) -> bool:
        """Takes in what an earlier run processed and whose lines are in the spill file already.

        Args:
            source: Name of the source.
            part: All but its lines.
            size: Bytes of its lines, which follow what was taken in before.
            crc: CRC-32 of them.

        Returns:
            Whether the lines are really there; nothing is taken in otherwise.
        """
        start = self._spill.tell()
        found, left = 0, size
        while left and (piece := self._spill.read(min(left, 1 << 22))):
            found = zlib.crc32(piece, found)
            left -= len(piece)
        if left or found != crc:
            self._spill.seek(start)
            return False
        self._take(source, part)
        return True

    def _take(self, source: str, part: Processed) -> None:
        for name, kind in _COLUMNS.items():
            self._parts[name].append(np.array(getattr(part, name), dtype=kind))
        count = len(part.lengths)
        self._parts["source"].append(np.full(count, self.sources.index(source), np.uint16))
        first = np.full(count, -1, np.int32)
        for place, paths in enumerate(part.images):
            if paths:
                first[place] = self._picture(paths[0])
                if len(paths) > 1:
                    self._more_pictures[self._count + place] = tuple(map(self._picture, paths[1:]))
        self._first_picture.append(first)
        self._count += count
        self.read[source] += part.read
        self.notes[source] += part.notes
        for example in part.examples:
            kept = self.examples[source]
            if sum(other.reason == example.reason for other in kept) < EXAMPLES:
                kept.append(example)
        self.drops[source] += part.drops

    def _picture(self, path: str) -> int:
        known = self._picture_ids.get(path)
        if known is None:
            known = self._picture_ids[path] = len(self.pictures)
            self.pictures.append(path)
        return known

    def seal(self) -> None:
        """Ends reading: the columns become arrays; ids that occur twice lose their later copy."""
        self._spill.flush()
        empty: list[Any] = [np.zeros(0, np.uint32)]
        self.columns = {name: np.concatenate(parts or empty) for name, parts in self._parts.items()}
        self.columns["picture"] = np.concatenate(self._first_picture or [np.zeros(0, np.int32)])
        ends = np.cumsum(self.columns["lengths"], dtype=np.int64)
        self.columns["offset"] = ends - self.columns["lengths"]
        self.alive = np.ones(self._count, bool)
        self._parts.clear()
        self._first_picture.clear()
        _, first = np.unique(self.columns["keys"], return_index=True)
        twice = np.ones(self._count, bool)
        twice[first] = False
        self.drop(twice, "duplicate_id")

    def pictures_of(self, record: int) -> tuple[int, ...]:
        """Picture numbers of a record."""
        first = int(self.columns["picture"][record])
        return () if first < 0 else (first, *self._more_pictures.get(record, ()))

    def shown_by(self, records: Any) -> set[int]:
        """Numbers of the pictures that the records show."""
        first = np.unique(self.columns["picture"][records])
        shown = set(first[first >= 0].tolist())
        chosen = np.zeros(len(self.alive), bool)
        chosen[records] = True
        for record, more in self._more_pictures.items():
            if chosen[record]:
                shown.update(more)
        return shown

    def with_pictures(self, numbers: set[int]) -> Any:
        """Mask of the records that show one of the pictures."""
        wanted = np.fromiter(numbers, np.int64, len(numbers))
        mask = np.isin(self.columns["picture"], wanted)
        for record, more in self._more_pictures.items():
            if not numbers.isdisjoint(more):
                mask[record] = True
        return mask

    def drop(self, mask: Any, reason: str) -> int:
        """Drops the records of a mask that are still in; returns how many records of the files."""
        going = np.flatnonzero(mask & self.alive)
        if not len(going):
            return 0
        going = going[np.argsort(self.columns["keys"][going], kind="stable")]
        for number, name in enumerate(self.sources):
            of_source = going[self.columns["source"][going] == number]
            if len(of_source):
                self.drops[name][reason] += int(self.columns["units"][of_source].sum())
                shown_already = sum(e.reason == reason for e in self.examples[name])
                for record in of_source[: EXAMPLES - shown_already]:
                    line = orjson.loads(self.line(int(record)))
                    meta = line["meta"]
                    shown = f"{line['images']} {line['messages'][0]['content']}"[:240]
                    self.examples[name].append(
                        Drop(reason, meta["orig_file"], meta["orig_index"], shown)
                    )
        self.alive[going] = False
        return int(self.columns["units"][going].sum())

    def line(self, record: int) -> bytes:
        """The JSON line of a record."""
        offset, length = self.columns["offset"][record], self.columns["lengths"][record]
        return os.pread(self._spill.fileno(), int(length), int(offset))

    def order(self, sources: list[Source], seed: int) -> list[Any]:
        """Applies weights, then caps, or quotas; what they leave out is dropped by name.

        Args:
            sources: The sources of the recipe.
            seed: The seed of the build.

        Returns:
            Two arrays, in the order of the build: record numbers, and which copy (0 first).

        Raises:
            DataError: A source with a quota has no conversation left to repeat.
        """
        records: list[Any] = []
        copies: list[Any] = []
        keys: list[Any] = []
        for number, source in enumerate(sources):
            entry = source.entry
            own = np.flatnonzero(self.alive & (self.columns["source"] == number))
            own = own[np.argsort(self.columns["keys"][own], kind="stable")]
            if source.limit is not None:
                own = self._within(own, *source.limit)
            weighted = int(entry.weight) * len(own) + round(len(own) * (entry.weight % 1))
            wanted = min(weighted, entry.max or weighted)
            if entry.quota is not None:
                if not len(own):
                    raise DataError(
                        f"source {entry.name}: a quota of {entry.quota:,}, and no conversation is "
                        f"left of {self.read[entry.name]:,} records read (dropped: "
                        f"{self.why(entry.name)})"
                    )
                weighted, wanted = len(own), entry.quota
            whole, rest = divmod(wanted, max(1, len(own)))
            partial = own[:rest]
            if not whole:
                reason = "over_max" if entry.quota is None else "over_quota"
                self._drop_list(own[rest:weighted], reason)
                self._drop_list(own[weighted:], "left_out_by_weight")
            for copy in range(whole + 1 if len(own) else 0):
                chosen = own if copy < whole else partial
                records.append(chosen)
                copies.append(np.full(len(chosen), copy, np.uint32))
                keys.append(self._copy_keys(chosen, copy, seed))
        if not records:
            return [np.zeros(0, np.int64), np.zeros(0, np.uint32)]
        by_key = np.argsort(np.concatenate(keys), kind="stable")
        return [np.concatenate(records)[by_key], np.concatenate(copies)[by_key]]

    def _within(self, records: Any, answer: str, share: float) -> Any:
        """The records in an order of which every beginning keeps an answer's share.

        So whatever a cap or a weight takes from it keeps the share, too. Records in excess of it
        are dropped.
        """
        ordered: list[int] = []
        waiting: deque[int] = deque()
        placed = 0
        for record in records.tolist():
            said = orjson.loads(self.line(record))["messages"][-1]["content"]
            if said.lower() == answer:
                waiting.append(record)
            else:
                ordered.append(record)
            while waiting and placed + 1 <= share * (len(ordered) + 1) + 1e-9:
                ordered.append(waiting.popleft())
                placed += 1
        if waiting:
            self._drop_list(list(waiting), f"{answer}_over_share")
        return np.array(ordered, np.int64)

    def why(self, source: str | None = None) -> str:
        """The most frequent reasons to drop, of one source or of all, as text."""
        names = self.sources if source is None else [source]
        drops = sum((self.drops[name] for name in names), Counter())
        return ", ".join(f"{n:,} {reason}" for reason, n in drops.most_common(5))

    def _drop_list(self, records: Any, reason: str) -> None:
        mask = np.zeros(len(self.alive), bool)
        mask[records] = True
        self.drop(mask, reason)

    def _copy_keys(self, records: Any, copy: int, seed: int) -> Any:
        keys = self.columns["keys"][records]
        if not copy:
            return keys
        again = (
            blake2b(int(key).to_bytes(8, "big"), digest_size=8, key=f"{seed}~{copy}".encode())
            for key in keys
        )
        return np.array([int.from_bytes(key.digest(), "big") for key in again], np.uint64)

    def lines(self, records: Any, copies: Any) -> Iterator[bytes]:
        """The JSON lines in order; a copy's id ends in `~2`, `~3` and so on."""
        descriptor = self._spill.fileno()
        offsets = self.columns["offset"][records].tolist()
        lengths = self.columns["lengths"][records].tolist()
        for offset, length, copy in zip(offsets, lengths, copies.tolist(), strict=True):
            line = os.pread(descriptor, length, offset)
            if copy:
                mark = b"~%d" % (copy + 1)
                line = line.replace(b'","source":', mark + b'","source":', 1)
            yield line

    def close(self) -> None:
        """Closes the spill file."""
        self._spill.close()
