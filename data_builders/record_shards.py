"""Reads the sources into the ledger, shard by shard, so that a killed build keeps what was done.

A shard is a run of consecutive batches of one source; their records go through the pure
`RecordStage`, in worker processes where the input is large enough to pay for them. When the last
batch of a shard is in, its numbers are saved beside the lines. A resumed build reads a half-done
file again up to where it stopped, which is cheap, but processes no record twice.
"""

import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np

from data_builders.annotations import Batch
from data_builders.engine import stage_map
from data_builders.images import ImageFinder
from data_builders.mix import Ledger
from data_builders.progress import progress
from data_builders.recipe import BuildRecipe, SourceEntry
from data_builders.source import Drop, Processed, RecordStage, Source, load_source
from data_builders.workfolder import Shard, WorkFolder

PARALLEL_FROM = 48 << 20
_ARRAYS = ("lengths", "keys", "texts", "exact", "pairs", "answer_chars", "units")


def process_sources(
    sources: list[Source],
    finders: list[ImageFinder],
    recipe: BuildRecipe,
    ledger: Ledger,
    work: WorkFolder,
) -> None:
    """Processes every record of every source into the ledger.

    Args:
        sources: In the order of the recipe.
        finders: Where each source's pictures are.
        recipe: The recipe.
        ledger: Takes the records in.
        work: Takes the finished shards in.
    """
    size = sum(path.stat().st_size for source in sources for path in source.inputs())
    with progress(size, "reading", "B", scale=True) as bar:
        for number, (source, finder) in enumerate(zip(sources, finders, strict=True)):
            _process(f"records{number:02d}", source, finder, recipe, ledger, work, _Meter(bar))
        bar.update(size - bar.n)


def make_stage(entry: SourceEntry, finder: ImageFinder, seed: int) -> RecordStage:
    """The stage of a source, in any process."""
    return RecordStage(load_source(entry.source)(entry), finder, seed)


class _Meter:
    """Moves the bar by what batches say of their size; where they are silent, by whole files."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.records = 0

    def update(self, size: int, records: int) -> None:
        self.records += records
        self.bar.set_postfix_str(f"{self.records:,} records", refresh=False)
        self.bar.update(min(size, self.bar.total - self.bar.n))


def _process(
    stage: str,
    source: Source,
    finder: ImageFinder,
    recipe: BuildRecipe,
    ledger: Ledger,
    work: WorkFolder,
    meter: _Meter,
) -> None:
    name = source.entry.name
    number = done = 0
    while (shard := work.load(stage, number)) is not None:
        facts = shard.facts
        if not ledger.restore(name, _restored(shard), facts["size"], facts["crc"]):
            break
        meter.update(facts["bytes"], facts["read"])
        done += facts["batches"]
        number += 1
        if facts["last"]:
            return
    small = sum(path.stat().st_size for path in source.inputs()) < PARALLEL_FROM
    batches = islice(source.batches(finder), done, None)
    with stage_map(
        recipe.engine, recipe.workers, make_stage, source.entry, finder, recipe.seed, small=small
    ) as over:
        following = next(batches, None)
        last = False
        while not last:
            work.start(stage, number)
            shard_batches = _Run(following, batches, recipe.shard_size)
            parts: list[Processed] = []
            size = crc = 0
            for part in over(iter(shard_batches)):
                ledger.add(name, part)
                size += len(part.lines)
                crc = zlib.crc32(part.lines, crc)
                part.lines = b""
                parts.append(part)
                meter.update(shard_batches.sizes[len(parts) - 1], part.read)
            following, last = shard_batches.following, shard_batches.following is None
            ledger.flush()
            facts, arrays = _packed(parts)
            facts |= {"size": size, "crc": crc, "last": last, "batches": len(parts),
                      "bytes": sum(shard_batches.sizes)}  # fmt: skip
            work.finish(stage, number, facts, **arrays)
            number += 1


class _Run:
    """Batches of one shard; knows the batch that follows it."""

    def __init__(self, first: Batch | None, rest: Iterator[Batch], records: int) -> None:
        self.following = first
        self.sizes: list[int] = []
        self._rest = rest
        self._records = records

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        while self.following is not None and (not count or count < self._records):
            batch = self.following
            count += len(batch.records)
            self.sizes.append(batch.size or len(batch.raw or b""))
            if batch.raw is not None:
                batch.records = []  # the text is cheaper to send, and decoded once more there
            yield batch
            self.following = next(self._rest, None)


def _packed(parts: list[Processed]) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays = {
        name: np.concatenate(
            [np.zeros(0, np.uint8), *(np.asarray(getattr(part, name)) for part in parts)]
        )
        for name in _ARRAYS
    }
    facts = {
        "images": list(chain.from_iterable(part.images for part in parts)),
        "notes": sum((part.notes for part in parts), Counter()),
        "drops": sum((part.drops for part in parts), Counter()),
        "read": sum(part.read for part in parts),
        "examples": [
            [e.reason, e.file, e.index, e.excerpt] for part in parts for e in part.examples
        ],
    }
    return facts, arrays


def _restored(shard: Shard) -> Processed:
    facts = shard.facts
    return Processed(
        lines=b"",
        images=[tuple(paths) for paths in facts["images"]],
        notes=Counter(facts["notes"]),
        drops=Counter(facts["drops"]),
        examples=[Drop(*fields) for fields in facts["examples"]],
        read=facts["read"],
        **{name: array(shard.arrays[name].dtype.char, shard.arrays[name].tobytes())
           for name in _ARRAYS},
    )  # fmt: skip
