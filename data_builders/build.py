"""Runs a build recipe: read, normalise, find and check pictures, deduplicate, mix, write.

The build grows in a hidden folder beside its destination and takes its place in one rename when it
is complete, so an earlier build stays whole whatever happens. Records are processed in worker
processes by a pure function and taken in order; pictures are decoded in threads. The result depends
on inputs, recipe and seed only.
"""

import errno
import hashlib
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from cogvlm_sft.errors import DataError, RecipeError
from data_builders.annotations import Batch
from data_builders.decontaminate import overlap
from data_builders.deduplicate import drop_exact, drop_near
from data_builders.images import ImageFacts, ImageFinder, ImageLimits, check_images
from data_builders.manifest import input_facts, make_manifest
from data_builders.mix import Ledger
from data_builders.recipe import BuildRecipe, load_recipe
from data_builders.report import write_report
from data_builders.source import Processed, RecordStage, Source, load_source

PARALLEL_FROM = 48 << 20
_stage: RecordStage | None = None


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build made.

    Attributes:
        out: The build folder.
        conversations: Conversations written.
        read: Raw records read.
        dropped: Raw records dropped.
        manifest: Content of `manifest.json`.
    """

    out: Path
    conversations: int
    read: int
    dropped: int
    manifest: dict[str, Any]

    def summary(self) -> str:
        """A table of the sources and of what was dropped."""
        lines = [f"{'source':24} {'read':>10} {'kept':>10} {'dropped':>10} {'written':>10}"]
        for name, row in self.manifest["sources"].items():
            gone = sum(row["dropped"].values())
            lines.append(
                f"{name:24} {row['read']:>10,} {row['kept']:>10,} {gone:>10,} "
                f"{row['conversations']:>10,}"
            )
            lines += [f"  dropped {n:>7,}  {reason}" for reason, n in row["dropped"].items()]
        lines.append(f"{self.conversations:,} conversations in {self.out}")
        return "\n".join(lines)


def build(recipe_path: str | Path, overrides: Sequence[str] = ()) -> BuildResult:
    """Builds what a recipe describes.

    Args:
        recipe_path: YAML file, or the name of a packaged data recipe.
        overrides: `key.sub=value`.

    Raises:
        RecipeError: The recipe is wrong.
        DataError: A file is missing or broken, or nothing is left to write.
    """
    return build_recipe(load_recipe(recipe_path, overrides))


def build_recipe(recipe: BuildRecipe) -> BuildResult:
    """Builds a parsed recipe; see `build`."""
    out = recipe.out
    if out.exists() and not _replaceable(out):
        raise DataError(
            f"{out}: exists and is not a build folder (no manifest.json); choose another `out`"
        )
    staging = out.with_name(f".{out.name}.building")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        manifest = _build_into(staging, recipe)
        _replace(staging, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{out}: the disk is full; free some space and build again (a build needs about "
                "twice the size of its annotation files). An earlier build there is untouched"
            ) from None
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise DataError(f"{error.filename}: {error.strerror}; cannot build here") from None
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    totals = manifest["totals"]
    return BuildResult(out, totals["conversations"], totals["read"], totals["dropped"], manifest)


def _replaceable(out: Path) -> bool:
    return out.is_dir() and ((out / "manifest.json").is_file() or not any(out.iterdir()))


def _replace(staging: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(staging, out)
    shutil.rmtree(old, ignore_errors=True)


def _image_root(recipe: BuildRecipe) -> Path:
    if recipe.image_root is not None:
        if recipe.images.check and not recipe.image_root.is_dir():
            raise DataError(f"image_root {recipe.image_root} is not a folder; check the path")
        return recipe.image_root
    folders = [str(folder) for entry in recipe.sources for folder in entry.images]
    if not folders:
        return Path()
    if len(set(folders)) == 1:
        return Path(folders[0])
    return Path(os.path.relpath(os.path.commonpath([os.path.abspath(f) for f in folders])))


def _build_into(staging: Path, recipe: BuildRecipe) -> dict[str, Any]:
    root = _image_root(recipe)
    sources = [load_source(entry.source)(entry) for entry in recipe.sources]
    inputs = [facts for source in sources for facts in _inputs(source)]
    ledger = Ledger(staging / "spill.bin", [source.entry.name for source in sources])
    try:
        for source in sources:
            finder = ImageFinder(root, source.entry.images, recipe.images.check)
            for part in _process(source, finder, recipe):
                ledger.add(source.entry.name, part)
        ledger.seal()
        if recipe.deduplicate.text:
            drop_exact(ledger)
        facts = _look_at_pictures(ledger, recipe, root)
        hashes = {n: f.phash for n, f in facts.items() if f.phash is not None}
        twins: list[tuple[int, int]] = []
        if recipe.deduplicate.near is not None:
            twins = drop_near(ledger, hashes, recipe.deduplicate.near)
        held_out = _decontaminate(ledger, recipe, hashes)
        records, copies = ledger.order(
            {entry.name: entry.weight for entry in recipe.sources},
            {entry.name: entry.max for entry in recipe.sources},
            recipe.seed,
        )
        if not len(records):
            drops = sum((ledger.drops[name] for name in ledger.sources), Counter())
            why = ", ".join(f"{n:,} {reason}" for reason, n in drops.most_common(5))
            raise DataError(
                f"no conversation is left of {sum(ledger.read.values()):,} records read"
                + (f" (dropped: {why})" if why else "; are the annotation files empty?")
            )
        files = _write(staging, ledger, records, copies, recipe.shard_size)
        manifest = make_manifest(
            recipe=recipe.model_dump(mode="json", exclude={"workers", "out"}),
            image_root=root.as_posix(),
            seed=recipe.seed,
            inputs=inputs,
            sources=sources,
            ledger=ledger,
            written=_written(ledger, records),
            pictures=_picture_counts(ledger, facts),
            held_out=held_out,
            files=files,
        )
        text = orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        (staging / "manifest.json").write_bytes(text)
        write_report(staging / "report.html", manifest, ledger, records, facts, twins, root)
    finally:
        ledger.close()
        (staging / "spill.bin").unlink(missing_ok=True)
    return manifest


def _inputs(source: Source) -> list[dict[str, Any]]:
    for path in source.inputs():
        if not path.is_file():
            raise DataError(
                f"source {source.entry.name}: annotation file {path} is missing; "
                "`cogvlm-sft data sources` lists what to fetch"
            )
    return input_facts(source)


def _process(source: Source, finder: ImageFinder, recipe: BuildRecipe) -> Iterator[Processed]:
    """Processed batches in order, by workers where the input is large enough to pay for them."""
    size = sum(path.stat().st_size for path in source.inputs())
    batches = source.batches(finder)
    if recipe.workers < 2 or size < PARALLEL_FROM:
        stage = RecordStage(source, finder, recipe.seed)
        for batch in batches:
            batch.raw = None
            yield stage.run(batch)
        return
    with ProcessPoolExecutor(
        recipe.workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(source.entry, finder, recipe.seed),
    ) as pool:
        waiting: deque[Future[Processed]] = deque()
        try:
            for batch in batches:
                if batch.raw is not None:
                    batch.records = []
                waiting.append(pool.submit(_work, batch))
                while len(waiting) > 2 * recipe.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(entry: Any, finder: ImageFinder, seed: int) -> None:
    global _stage
    _stage = RecordStage(load_source(entry.source)(entry), finder, seed)


def _work(batch: Batch) -> Processed:
    assert _stage is not None
    return _stage.run(batch)


def _look_at_pictures(ledger: Ledger, recipe: BuildRecipe, root: Path) -> dict[int, ImageFacts]:
    """Decodes every picture that is still needed, and drops the records of unusable ones."""
    if not recipe.images.check:
        for key, given in (
            ("deduplicate.near", recipe.deduplicate.near is not None),
            ("decontaminate.against", any(p.is_dir() for p in recipe.decontaminate.against)),
        ):
            if given:
                raise RecipeError(f"{key} compares pictures; it needs images.check: true")
        return {}
    hashed = recipe.deduplicate.near is not None or any(
        path.is_dir() for path in recipe.decontaminate.against
    )
    needed = sorted(
        {n for record in np.flatnonzero(ledger.alive) for n in ledger.pictures_of(int(record))},
        key=lambda number: ledger.pictures[number],
    )
    rules = recipe.images
    limits = ImageLimits(rules.min_side, rules.max_aspect, rules.max_pixels)
    paths = [ledger.pictures[number] for number in needed]
    facts = dict(zip(needed, check_images(root, paths, limits, recipe.workers, hashed),
                     strict=True))  # fmt: skip
    reasons: dict[str, set[int]] = {}
    for number, fact in facts.items():
        if fact.reason is not None:
            reasons.setdefault(fact.reason, set()).add(number)
    for reason in sorted(reasons):
        ledger.drop(ledger.with_pictures(reasons[reason]), reason)
    return facts


def _decontaminate(ledger: Ledger, recipe: BuildRecipe, hashes: dict[int, int]) -> dict[str, Any]:
    rules = recipe.decontaminate
    for path in rules.against:
        if not path.exists():
            raise DataError(f"decontaminate.against: {path} does not exist")
    found = overlap(ledger, rules.against, hashes, rules.near, recipe.workers)
    held_out: dict[str, Any] = {}
    for name, numbers in found.items():
        mask = ledger.with_pictures(numbers) & ledger.alive
        held_out[name] = {
            "pictures": len(numbers),
            "records": int(ledger.columns["units"][mask].sum()),
            "mode": rules.mode,
        }
        if rules.mode == "drop":
            ledger.drop(mask, "held_out_picture")
    return held_out


def _write(
    folder: Path, ledger: Ledger, records: Any, copies: Any, shard_size: int
) -> list[dict[str, Any]]:
    shards = max(1, -(-len(records) // shard_size))
    files: list[dict[str, Any]] = []
    for shard in range(shards):
        part = slice(shard * shard_size, (shard + 1) * shard_size)
        path = folder / f"conversations-{shard:05d}-of-{shards:05d}.jsonl"
        digest = hashlib.sha256()
        size = 0
        with path.open("wb", buffering=1 << 20) as stream:
            for line in ledger.lines(records[part], copies[part]):
                stream.write(line)
                digest.update(line)
                size += len(line)
        files.append(
            {
                "name": path.name,
                "conversations": len(records[part]),
                "bytes": size,
                "sha256": digest.hexdigest(),
            }
        )
    return files


def _written(ledger: Ledger, records: Any) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for number, name in enumerate(ledger.sources):
        own = records[ledger.columns["source"][records] == number]
        table[name] = {
            "conversations": len(own),
            "questions": int(ledger.columns["pairs"][own].sum()),
            "answer_characters": int(ledger.columns["answer_chars"][own].sum(dtype=np.int64)),
            "text_only": int((ledger.columns["picture"][own] < 0).sum()),
        }
    return table


def _picture_counts(ledger: Ledger, facts: dict[int, ImageFacts]) -> dict[str, int]:
    kinds = Counter(fact.kind for fact in facts.values() if fact.reason is None)
    return {"distinct": len(ledger.pictures), "checked": len(facts), **dict(sorted(kinds.items()))}
