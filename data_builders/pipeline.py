"""The stages of a build, in order: read, check pictures, deduplicate, decontaminate, mix, write.

Work on records and pictures is done by pure stages in other processes and taken in order, the rest
is arithmetic on the ledger's arrays: the result depends on inputs, recipe and seed only. What a
finished shard depends on goes into a fingerprint, so that an interrupted build is gone on with only
while nothing that it read has changed.
"""

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from cogvlm_sft.errors import DataError, RecipeError
from data_builders.archives import is_archive, resolve
from data_builders.decontaminate import HeldOut, overlap, read_held_out
from data_builders.deduplicate import drop_copies, drop_exact, drop_near
from data_builders.image_check import ImageFacts, ImageLimits
from data_builders.images import ImageFinder
from data_builders.manifest import input_facts, make_manifest, versions
from data_builders.mix import Ledger
from data_builders.picture_shards import check_images
from data_builders.recipe import BuildRecipe, SourceEntry
from data_builders.record_shards import process_sources
from data_builders.report import write_report
from data_builders.source import Source, load_source
from data_builders.token_count import counter_of
from data_builders.workfolder import WorkFolder
from data_builders.write_shards import write_shards


def run_pipeline(work: WorkFolder, recipe: BuildRecipe) -> dict[str, Any]:
    """Makes the build in `work.path / "build"`.

    Args:
        work: Where it grows; finished shards of an interrupted run are taken from there.
        recipe: The recipe.

    Returns:
        Content of the manifest.

    Raises:
        RecipeError: Settings contradict each other.
        DataError: A file is missing or broken, or nothing is left to write.
    """
    _check_together(recipe)
    held_out = read_held_out(recipe.decontaminate)
    counter_of(recipe.tokenizer)  # the report counts in the end; a mistake shows now
    entries, refused = _unpacked(recipe)
    sources = [load_source(entry.source)(entry) for entry in entries]
    inputs = [facts for source in sources for facts in _inputs(source)]
    entries = [
        entry.model_copy(update={"images": entry.images + source.unpack_pictures()})
        for entry, source in zip(entries, sources, strict=True)
    ]
    root = _image_root(recipe, entries)
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
        if recipe.deduplicate.text and recipe.images.check:
            drop_copies(ledger, root)
        hashes = {n: f.phash for n, f in facts.items() if f.phash is not None}
        twins: list[tuple[int, int]] = []
        if recipe.deduplicate.near is not None:
            twins = drop_near(ledger, facts, recipe.deduplicate.near)
        met = _decontaminate(ledger, held_out, recipe, hashes, work)
        records, copies = ledger.order(sources, recipe.seed)
        if not len(records):
            why = ledger.why()
            if all(set(drops) <= {"held_out_split"} for drops in ledger.drops.values()) and why:
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
            pictures=_picture_counts(ledger, records, facts),
            held_out=met,
            refused=refused,
            files=write_shards(work, staging, ledger, records, copies, recipe.shard_size),
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
    """Settings that need or forbid each other, before anything is read."""
    classes = {entry.name: load_source(entry.source) for entry in recipe.sources}
    for entry in recipe.sources if recipe.image_root is None else ():
        # Pictures are looked for below the working directory then, whatever it may hold.
        if not (entry.annotations or entry.images or classes[entry.name].needs_annotations):
            raise RecipeError(
                f"source {entry.name}: neither annotations nor images given; set `annotations` to "
                "a table, or `images` to a folder of labelled pictures"
            )
    refused = [f"{name} ({of.license})" for name, of in classes.items() if not of.commercial]
    if recipe.commercial and refused:
        raise RecipeError(
            f"commercial: true, and the licences of {', '.join(refused)} forbid it; take these "
            "sources out, or set commercial=false for research"
        )
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
            found = "is a folder, name the files in it" if path.is_dir() else "is missing"
            raise DataError(
                f"source {source.entry.name}: annotation file {path} {found}; "
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
    rules = recipe.decontaminate
    listed = rules.against + ([rules.visual_genome] if rules.visual_genome else [])
    held_out = [
        [str(file), file.stat().st_size, file.stat().st_mtime_ns]
        for path in listed
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
        ledger.shown_by(np.flatnonzero(ledger.alive)), key=lambda number: ledger.pictures[number]
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
    ledger: Ledger,
    held_out: HeldOut,
    recipe: BuildRecipe,
    hashes: dict[int, int],
    work: WorkFolder,
) -> dict[str, Any]:
    """Counts what held-out sets share with the build, and drops it unless it is only reported."""
    table: dict[str, Any] = {}
    for name, met in overlap(ledger, held_out, recipe, hashes, work).items():
        mask = ledger.with_pictures(met.pictures) & ledger.alive
        table[name] = {
            "pictures": len(met.pictures),
            "records": int(ledger.columns["units"][mask].sum()),
            "unreadable": met.unreadable,
            "mode": recipe.decontaminate.mode,
        }
        if recipe.decontaminate.mode == "drop":
            ledger.drop(mask, "held_out_picture")
    return table


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


def _picture_counts(ledger: Ledger, records: Any, facts: dict[int, ImageFacts]) -> dict[str, Any]:
    """Pictures of the build, those named by any record of the files, and what was found in them."""
    usable = [fact for fact in facts.values() if fact.reason is None]
    return {
        "distinct": len(ledger.shown_by(records)),
        "seen": len(ledger.pictures),
        "checked": len(facts),
        "kinds": dict(sorted(Counter(fact.kind for fact in usable).items())),
        "converted_when_read": dict(
            sorted(Counter(odd for fact in usable for odd in fact.oddities).items())
        ),
    }


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
