"""Runs a build recipe: read, normalise, find and check pictures, deduplicate, mix, write.

The build grows in a work folder beside its destination and takes its place in one rename, so an
earlier build stays whole whatever happens, and a killed one goes on where it stopped. Work on
records and pictures is done by pure stages in other processes and taken in order: the result
depends on inputs, recipe and seed only.
"""

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from cogvlm_sft.errors import CogVLMSFTError, DataError, RecipeError
from data_builders.archives import is_archive, resolve
from data_builders.decontaminate import overlap
from data_builders.deduplicate import drop_exact, drop_near
from data_builders.engine import WorkerDied
from data_builders.image_check import ImageFacts, ImageLimits
from data_builders.images import ImageFinder
from data_builders.manifest import input_facts, make_manifest, versions
from data_builders.mix import Ledger
from data_builders.picture_shards import check_images
from data_builders.progress import progress
from data_builders.recipe import BuildRecipe, SourceEntry, load_recipe
from data_builders.record_shards import process_sources
from data_builders.report import write_report
from data_builders.source import Source, load_source
from data_builders.workfolder import WorkFolder, work_folder

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BuildInterrupted(KeyboardInterrupt):
    """Ctrl-C during a build; the message says how to go on."""


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build made.

    Attributes:
        out: The build folder.
        conversations: Conversations written.
        read: Raw records read.
        dropped: Raw records dropped.
        manifest: Content of `manifest.json`.
        kept_shards: Shards of work that an interrupted run had finished.
        redone_shards: Shards of work that it had begun and lost.
    """

    out: Path
    conversations: int
    read: int
    dropped: int
    manifest: dict[str, Any]
    kept_shards: int
    redone_shards: int

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
        if self.kept_shards:
            lines.append(
                f"went on with an interrupted build: {self.kept_shards} shards of work were done, "
                f"{self.redone_shards} done again"
            )
        lines.append(f"{self.conversations:,} conversations in {self.out}")
        lines.append(f"look at {self.out / 'report.html'}")
        return "\n".join(lines)


def build(recipe_path: str | Path, overrides: Sequence[str] = ()) -> BuildResult:
    """Builds what a recipe describes.

    Args:
        recipe_path: YAML file, or the name of a packaged data recipe.
        overrides: `key.sub=value`.

    Raises:
        RecipeError: The recipe is wrong.
        DataError: A file is missing or broken, the disk is full, or nothing is left to write.
        BuildInterrupted: Ctrl-C; building again goes on.
    """
    return build_recipe(load_recipe(recipe_path, overrides))


def build_recipe(recipe: BuildRecipe) -> BuildResult:
    """Builds a parsed recipe; see `build`."""
    out = recipe.out
    if not out.name or (out.exists() and not _replaceable(out)):
        raise DataError(
            f"{out}: exists and is not a build folder (no manifest.json); choose another `out`"
        )
    try:
        with work_folder(out) as work:
            return _guarded(recipe, work)
    except OSError as error:
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise DataError(f"{error.filename}: {error.strerror}; cannot build here") from None
        if error.errno in _FULL:
            raise _disk_full(out) from None
        raise


def _guarded(recipe: BuildRecipe, work: WorkFolder) -> BuildResult:
    """Builds; whatever ends it early leaves a work folder to go on with, except a mistake."""
    out = recipe.out
    try:
        manifest = _build_into(work, recipe)
        work.release(out)
    except KeyboardInterrupt:
        raise BuildInterrupted(
            f"interrupted; what is done is kept in {work.path}. Build again with the same recipe "
            "to go on, or delete that folder"
        ) from None
    except WorkerDied:
        raise
    except CogVLMSFTError:
        work.remove()
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_full(out) from None
        raise
    totals = manifest["totals"]
    return BuildResult(
        out, totals["conversations"], totals["read"], totals["dropped"], manifest,
        work.kept, work.redone,
    )  # fmt: skip


def _disk_full(out: Path) -> DataError:
    return DataError(
        f"{out}: the disk is full; free some space and build again, which goes on where it stopped "
        "(a build needs about twice the size of its annotation files). An earlier build there is "
        "untouched"
    )


def _replaceable(out: Path) -> bool:
    return out.is_dir() and ((out / "manifest.json").is_file() or not any(out.iterdir()))


def _image_root(recipe: BuildRecipe, entries: list[SourceEntry]) -> Path:
    if recipe.image_root is not None:
        if recipe.images.check and not recipe.image_root.is_dir():
            raise DataError(f"image_root {recipe.image_root} is not a folder; check the path")
        return recipe.image_root
    folders = [str(folder) for entry in entries for folder in entry.images]
    if not folders:
        return Path()
    if len(set(folders)) == 1:
        return Path(folders[0])
    return Path(os.path.relpath(os.path.commonpath([os.path.abspath(f) for f in folders])))


def _build_into(work: WorkFolder, recipe: BuildRecipe) -> dict[str, Any]:
    """Makes the build in `work.path / "build"`; returns its manifest."""
    _check_together(recipe)
    entries, refused = _unpacked(recipe)
    root = _image_root(recipe, entries)
    sources = [load_source(entry.source)(entry) for entry in entries]
    inputs = [facts for source in sources for facts in _inputs(source)]
    finders = [ImageFinder(root, entry.images, recipe.images.check) for entry in entries]
    content = recipe.model_dump(mode="json", exclude={"workers", "out", "engine"})
    for entry in content["sources"]:  # an order that means nothing leaves no trace
        entry["annotations"].sort()
    work.begin(_fingerprint(recipe, content, root, inputs, finders))
    ledger = Ledger(work.path / "spill.bin", [entry.name for entry in entries])
    try:
        process_sources(sources, finders, recipe, ledger, work)
        ledger.seal()
        if recipe.deduplicate.text:
            drop_exact(ledger)
        facts = _look_at_pictures(ledger, recipe, root, work)
        hashes = {n: f.phash for n, f in facts.items() if f.phash is not None}
        twins: list[tuple[int, int]] = []
        if recipe.deduplicate.near is not None:
            twins = drop_near(ledger, facts, recipe.deduplicate.near)
        held_out = _decontaminate(ledger, recipe, hashes, work)
        records, copies = ledger.order(entries, recipe.seed)
        if not len(records):
            drops = sum((ledger.drops[name] for name in ledger.sources), Counter())
            why = ", ".join(f"{n:,} {reason}" for reason, n in drops.most_common(5))
            if set(drops) == {"held_out_split"}:
                why += "; for a build to evaluate on, name the split in the source's `splits`"
            raise DataError(
                f"no conversation is left of {sum(ledger.read.values()):,} records read"
                + (f" (dropped: {why})" if why else "; are the annotation files empty?")
            )
        staging = work.path / "build"
        staging.mkdir(exist_ok=True)
        manifest = make_manifest(
            recipe=content,
            image_root=root.as_posix(),
            seed=recipe.seed,
            inputs=inputs,
            sources=sources,
            ledger=ledger,
            written=_written(ledger, records),
            pictures=_picture_counts(ledger, facts),
            held_out=held_out,
            refused=refused,
            files=_write(work, staging, ledger, records, copies, recipe.shard_size),
        )
        text = orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        (staging / "manifest.json").write_bytes(text)
        write_report(
            staging / "report.html", manifest, ledger, records, facts, twins, root, recipe.tokenizer
        )
    finally:
        ledger.close()
    return manifest


def _check_together(recipe: BuildRecipe) -> None:
    """Settings that need each other, before anything is read."""
    compared = (
        ("deduplicate.near", recipe.deduplicate.near is not None),
        ("decontaminate.against", any(p.is_dir() for p in recipe.decontaminate.against)),
    )
    for key, given in compared:
        if given and not recipe.images.check:
            raise RecipeError(f"{key} compares pictures; it needs images.check: true")


def _unpacked(recipe: BuildRecipe) -> tuple[list[SourceEntry], dict[str, list[str]]]:
    """The sources with folders and files in place of archives, and the members refused."""
    entries: list[SourceEntry] = []
    refused: dict[str, list[str]] = {}
    for entry in recipe.sources:
        images, bad = resolve(entry.images, folder=True)
        annotations, worse = resolve(entry.annotations, load_source(entry.source).reads_folders)
        changed: dict[str, Any] = {"images": images, "annotations": annotations}
        refused |= bad | worse
        for key, value in (entry.model_extra or {}).items():
            listed = value if isinstance(value, list) else [value]
            paths = [Path(item) for item in listed if isinstance(item, str)]
            if paths and len(paths) == len(listed) and any(map(is_archive, paths)):
                files, bad = resolve(paths, folder=False)
                changed[key] = [str(file) for file in files]
                refused |= bad
        entries.append(entry.model_copy(update=changed))
    return entries, dict(sorted(refused.items()))


def _inputs(source: Source) -> list[dict[str, Any]]:
    for path in source.inputs():
        if not path.is_file():
            raise DataError(
                f"source {source.entry.name}: annotation file {path} is missing; "
                "`cogvlm-sft data sources` lists what to fetch"
            )
    return input_facts(source)


def _fingerprint(
    recipe: BuildRecipe,
    content: dict[str, Any],
    root: Path,
    inputs: list[dict[str, Any]],
    finders: list[ImageFinder],
) -> str:
    """A hash of all that the finished shards of an interrupted build depend on."""
    held_out = [
        [str(file), file.stat().st_size, file.stat().st_mtime_ns]
        for path in recipe.decontaminate.against
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file()
    ]
    seen = [finder.digest() for finder in finders]
    facts = [content, os.path.realpath(root), inputs, seen, held_out, versions()]
    return hashlib.sha256(orjson.dumps(facts)).hexdigest()


def _look_at_pictures(
    ledger: Ledger, recipe: BuildRecipe, root: Path, work: WorkFolder
) -> dict[int, ImageFacts]:
    """Decodes every picture that is still needed, and drops the records of unusable ones."""
    if not recipe.images.check:
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
    found = check_images(
        root, [ledger.pictures[number] for number in needed], limits, hashed,
        recipe.workers, recipe.engine, work,
    )  # fmt: skip
    facts = dict(zip(needed, found, strict=True))
    reasons: dict[str, set[int]] = {}
    for number, fact in facts.items():
        if fact.reason is not None:
            reasons.setdefault(fact.reason, set()).add(number)
    for reason in sorted(reasons):
        ledger.drop(ledger.with_pictures(reasons[reason]), reason)
    return facts


def _decontaminate(
    ledger: Ledger, recipe: BuildRecipe, hashes: dict[int, int], work: WorkFolder
) -> dict[str, Any]:
    held_out: dict[str, Any] = {}
    for name, numbers in overlap(ledger, recipe, hashes, work).items():
        mask = ledger.with_pictures(numbers) & ledger.alive
        held_out[name] = {
            "pictures": len(numbers),
            "records": int(ledger.columns["units"][mask].sum()),
            "mode": recipe.decontaminate.mode,
        }
        if recipe.decontaminate.mode == "drop":
            ledger.drop(mask, "held_out_picture")
    return held_out


def _write(
    work: WorkFolder, folder: Path, ledger: Ledger, records: Any, copies: Any, shard_size: int
) -> list[dict[str, Any]]:
    shards = max(1, -(-len(records) // shard_size))
    files: list[dict[str, Any]] = []
    with progress(len(records), "writing", " conversations", scale=True) as bar:
        for number in range(shards):
            part = slice(number * shard_size, (number + 1) * shard_size)
            path = folder / f"conversations-{number:05d}-of-{shards:05d}.jsonl"
            done = work.load("written", number)
            if done and path.is_file() and path.stat().st_size == done.facts["bytes"]:
                files.append(done.facts)
            else:
                work.start("written", number)
                files.append(_write_shard(path, ledger, records[part], copies[part]))
                work.finish("written", number, files[-1])
            bar.update(len(records[part]))
    return files


def _write_shard(path: Path, ledger: Ledger, records: Any, copies: Any) -> dict[str, Any]:
    digest = hashlib.sha256()
    size = 0
    partial = path.with_suffix(".partial")
    with partial.open("wb", buffering=1 << 20) as stream:
        for line in ledger.lines(records, copies):
            stream.write(line)
            digest.update(line)
            size += len(line)
    os.replace(partial, path)
    return {
        "name": path.name,
        "conversations": len(records),
        "bytes": size,
        "sha256": digest.hexdigest(),
    }


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


def _picture_counts(ledger: Ledger, facts: dict[int, ImageFacts]) -> dict[str, Any]:
    usable = [fact for fact in facts.values() if fact.reason is None]
    return {
        "distinct": len(ledger.pictures),
        "checked": len(facts),
        "kinds": dict(sorted(Counter(fact.kind for fact in usable).items())),
        "converted_when_read": dict(
            sorted(Counter(odd for fact in usable for odd in fact.oddities).items())
        ),
    }
