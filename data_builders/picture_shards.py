"""Decodes every picture that a build needs, shard by shard, in worker processes.

Processes rather than threads: around the decoding, which threads could share, stands Python that
they could not, and it is what would hold a machine of many cores back. Facts of a finished shard
are saved, so a killed build decodes at most one shard of pictures again.
"""

from pathlib import Path
from typing import Any

from data_builders.engine import stage_map
from data_builders.image_check import CheckStage, ImageFacts, ImageLimits
from data_builders.progress import progress
from data_builders.workfolder import WorkFolder

SHARD = 4000
_ITEM = 32
_SMALL = 200


def check_images(
    root: Path,
    paths: list[str],
    limits: ImageLimits,
    hashed: bool,
    workers: int,
    engine: str = "local",
    work: WorkFolder | None = None,
    stage: str = "pictures",
    what: str = "pictures",
) -> list[ImageFacts]:
    """Facts of every picture, in the order of the paths.

    Args:
        root: What paths are relative to.
        paths: The pictures.
        limits: What counts as usable.
        hashed: Whether to compute perceptual hashes.
        workers: Processes.
        engine: `local` or `ray`.
        work: Keeps finished shards, under the name `stage`.
        stage: See `work`.
        what: Title of the progress bar.
    """
    shards = [paths[start : start + SHARD] for start in range(0, len(paths), SHARD)]
    known = [work.load(stage, n) if work else None for n in range(len(shards))]
    done = sum(len(part) for part, shard in zip(shards, known, strict=True) if shard)
    facts: list[ImageFacts] = []
    if done == len(paths):
        engine = "local"  # nothing to do, so no cluster to wake
    small = len(paths) - done < _SMALL
    with (
        stage_map(engine, workers, CheckStage, root, limits,
                  hashed, small=small) as over,
        progress(len(paths), what, " pictures", done) as bar,
    ):  # fmt: skip
        for number, (part, shard) in enumerate(zip(shards, known, strict=True)):
            if shard is not None:
                facts += [_fact(row) for row in shard.facts["rows"]]
                continue
            if work:
                work.start(stage, number)
            found: list[ImageFacts] = []
            for some in over(part[i : i + _ITEM] for i in range(0, len(part), _ITEM)):
                found += some
                bar.update(len(some))
            if work:
                work.finish(stage, number, {"rows": [_row(fact) for fact in found]})
            facts += found
    return facts


def _row(fact: ImageFacts) -> list[Any]:
    return [fact.reason, fact.width, fact.height, fact.kind, fact.phash, fact.oddities]


def _fact(row: list[Any]) -> ImageFacts:
    reason, width, height, kind, phash, odd = row
    return ImageFacts(reason, width, height, kind, phash, tuple(odd))
